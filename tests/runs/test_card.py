"""Exports: the card is complete, and its snippet runs as it stands."""
import json
import re
import subprocess
import sys

import pytest
import torch
from harness import ROOT, run

import data
import findna
import models
from tools import export


def save(path, method, net, config, **args):
    torch.save({"format": 1, "method": method, "step": 7, "model": net.state_dict(), "optimizer": {},
                "config": config, "data": "abcdef123456", "args": args}, path)


@pytest.mark.parametrize("method", ["randommask", "findna"])
def test_the_snippet_of_a_card_runs(tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").write_text('{"step": 7, "loss": 1.5, "val_loss": 1.25}\n')
    if method == "findna":
        config = dict(length=26, n_layer=1, track_size=4, hidden=8, dropout=0.0)
        net = models.BaseModel(models.make_backbone(config))
        save("run/last.pt", method, net, config, length=26 - findna.N_CLS, lr=0.25)
    else:
        config = dict(vocab_size=69, block_size=40, n_layer=1, n_head=2, n_embd=8, n_inner=16, dropout=0.0)
        net = models.Bert(models.BertConfig(**config)).eval()
        save("run/last.pt", method, net, config, stride=1, lr=0.25)
    result = run(["new", "--init", "run/last.pt", "--license", "mit", "--base_model", "me/old"],
                 script="tools.export")
    assert result.code == 0, result
    text = (tmp_path / "new/README.md").read_text()
    for part in ("abcdef123456", "steps: 7", '"lr": 0.25', "1.25", "Cite", "Not for clinical use", method):
        assert part in text
    facts = dict(line.split(": ", 1) for line in text.split("---")[1].strip().splitlines())
    assert facts == {"license": "mit", "base_model": "me/old", "tags": "[biology, genomics, dna]",
                     **({"library_name": "safetensors"} if method == "findna" else
                        {"library_name": "transformers", "pipeline_tag": "fill-mask"})}
    assert {oct(path.stat().st_mode & 0o444) for path in (tmp_path / "new").iterdir()} == {"0o444"}
    code = re.search(r"```python\n(.*?)```", text, re.S)[1] + "import torch\n"
    code += "x = net(data.one_hot(bases))" if method == "findna" else \
        "x = model(**tokenizer(dna, return_tensors='pt')).logits"
    code += "\ntorch.save(x.detach(), 'out.pt')"
    env = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, capture_output=True)
    dna = "ACGTTGCAACGTTGCA"
    with torch.no_grad():
        want = net(data.tokenize([dna], 3)) if method == "randommask" else \
            net.backbone(data.one_hot(torch.from_numpy(data.encode(dna))[None]))
    torch.testing.assert_close(torch.load("out.pt"), want, rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "new/config.json").read_text())


def test_the_card_of_a_classifier_names_the_place_on_the_hub():
    spec = {"kind": "bert", "k": 6, "stride": 1, "classes": ["no", "yes"], "regression": False}
    state = {"method": "finetune", "step": 3, "data": "x", "args": {}, "numbers": []}
    card = export.model_card(state, spec, "/home/me/tata", {"hub_id": "me/tata"}, export.use_bert(spec))
    assert "pipeline_tag: text-classification" in card and "license" not in card and "/home" not in card
    assert card.count('from_pretrained("me/tata")') == 2


@pytest.mark.parametrize("flag, value", [("--license", "MIT Licence"), ("--hub_id", "tata"),
                                         ("--base_model", "a/b\nlicense: mit")])
def test_facts_of_the_card_are_checked(tmp_path, monkeypatch, flag, value):
    monkeypatch.chdir(tmp_path)
    result = run(["new", "--init", "last.pt", flag, value], script="tools.export")
    assert result.code == 2 and flag in result.err and "Traceback" not in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.fault("export: log cut by a kill", n=5)
def test_a_log_that_was_cut(tmp_path, survived):
    row, losses = '{"loss": 1.5, "lr": 0.1, "step": 7}\n', {"loss": 1.5, "step": 7}
    for text, last in (("", []), (row[:-9], []), (row + row[:-9], losses), (row + "\0" * 99, losses),
                       (row + "[1]\n{}\n" + "[" * 10 ** 5 + "\n", losses)):
        (tmp_path / "log.jsonl").write_text(text)
        assert export.recorded(str(tmp_path / "last.pt"), {}) == last
        survived()


def test_stock_transformers_fine_tune_an_export(tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    torch.manual_seed(0)
    config = models.BertConfig(69, 40, 1, 2, 16, 32, 0.0)
    models.save_hf(models.Bert(config), tmp_path / "hf", card="x")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf", num_labels=2)
    dna = ["ACGT" * 5, "TTTA" * 5] * 8
    batch = tokenizer(dna, return_tensors="pt")
    assert torch.equal(batch["input_ids"], data.tokenize(dna, 3))
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2), []
    for _ in range(30):
        loss = model(**batch, labels=torch.tensor([0, 1] * 8)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
