"""Bert, its classifier and the CNN against transformers and formulas; reading and writing its folders."""
import json
import math
import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer,
                          BertConfig, BertForMaskedLM)

import data
import finetune
import models
from harness import cases, equal, expand, random_dna, refused, run, write_fasta


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """transformers' model with random weights everywhere, our model read from its folder, and the folder."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=69, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=48, max_position_embeddings=24, attn_implementation="eager")
    theirs, folder = BertForMaskedLM(config).eval(), tmp_path_factory.mktemp("hf")
    with torch.no_grad():
        for p in theirs.parameters():                        # biases and LayerNorms, too
            p += 0.3 * torch.randn_like(p)
    theirs.save_pretrained(folder)
    return theirs, models.load_hf(folder).eval(), folder


@pytest.fixture
def batch():
    """inputs, labels (5, 24), and a mask of rows of 7 to 23 tokens."""
    torch.manual_seed(1)
    tokens = data.kmer_tokens(torch.randint(4, (5, 24), dtype=torch.uint8), 3, 1, specials=True)
    inputs, labels = data.corrupt(tokens, (torch.rand(5, 24) < 0.3) & (tokens > 4), 69)
    return inputs, labels, torch.arange(24) < 7 + 4 * torch.arange(5)[:, None]


def test_logits_loss_and_gradients_equal_transformers(hf, batch, tmp_path):
    (theirs, ours, folder), (inputs, labels, _) = hf, batch
    close(ours(inputs), theirs(inputs).logits)
    want, (loss_sum, count) = theirs(inputs, labels=labels).loss, ours(inputs, labels)
    assert count == (labels != -100).sum() > 20
    close(loss_sum / count, want)
    want.backward(), (loss_sum / count).backward()
    gradients = models.load_hf(folder)
    gradients.load_state_dict({name: p.grad for name, p in ours.named_parameters()})
    models.save_hf(gradients, tmp_path / "gradients")        # an export renames them as it does weights
    renamed = load_file(tmp_path / "gradients" / "model.safetensors")
    for name, p in theirs.named_parameters():
        close(renamed[name], p.grad)
    with torch.device("meta"):
        assert sum(p.numel() for p in models.Bert(models.BertConfig()).parameters()) == 89_196_549


@pytest.mark.parametrize("padded", [False, True])
def test_attention_equals_transformers_and_sdpa(hf, batch, padded):
    (theirs, ours, _), (tokens, _, mask) = hf, batch
    tokens, mask, real = (tokens * mask, mask, mask) if padded else (tokens, None, tokens > 0)
    want = theirs.bert(tokens, attention_mask=mask, output_attentions=True)
    x, weights = ours.encode(tokens, mask, need_weights=True)
    assert len(weights) == 2
    for w, v in zip(weights, want.attentions):
        close(w.transpose(1, 2)[real], v.transpose(1, 2)[real])                  # (real tokens, heads, T)
    close(x[real], want.last_hidden_state[real])
    close(x[real], ours.encode(tokens, mask)[real])          # SDPA
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    mean = sum(models.attend(q, k, v, None, 0.3, False)[0] for _ in range(4000)) / 4000
    want = models.attend(q, k, v, None, 0.0, False)[0]       # dropout: other values, the same mean
    assert 1e-4 < (mean - want).abs().max() < 0.1


def test_padding_changes_nothing(hf, batch):
    (_, ours, _), (inputs, labels, mask) = hf, batch
    inputs, labels, alone = inputs * mask, labels.masked_fill(~mask, -100), 0
    logits, (loss_sum, count) = ours(inputs, mask=mask), ours(inputs, labels, mask=mask)
    for row, n in enumerate(mask.sum(1)):
        close(logits[row, :n], ours(inputs[row:row + 1, :n])[0])
        alone += ours(inputs[row:row + 1, :n], labels[row:row + 1, :n])[0]
    assert count == (labels >= 0).sum() and loss_sum.item() == pytest.approx(alone.item(), rel=1e-5)


def classifier(bert, n_out):
    spec = finetune.BertHead.body_spec(bert.config) | {"n_out": n_out}
    return finetune.build_net(spec, bert.state_dict())


@pytest.fixture
def classifiers(hf, tmp_path):
    """Our classifier with random weights, in training mode, and transformers' one read from its export."""
    ours = classifier(models.load_hf(hf[2]), 3)
    for p in [*ours.pooler.parameters(), *ours.out.parameters()]:
        p.data.normal_(std=0.3)
    models.save_hf(ours, folder := tmp_path / "hf", ["none", "donor", "acceptor"])
    theirs, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info                      # no weight is missing, none is left over
    return ours, theirs.eval()


@pytest.mark.parametrize("padded", [False, True])
def test_classifier_equals_transformers(classifiers, batch, padded):
    (ours, theirs), (tokens, _, mask) = classifiers, batch
    tokens, mask = (tokens * mask, mask) if padded else (tokens, None)
    assert (ours(tokens, mask, None) - ours(tokens, mask, None)).abs().max() > 0.01      # dropout
    assert theirs.config.id2label == {0: "none", 1: "donor", 2: "acceptor"}
    assert theirs.config.problem_type == "single_label_classification"
    want = theirs(tokens, attention_mask=mask).logits
    close(ours.eval()(tokens, mask, None), want)
    close(ours.bert.encode(tokens, mask, first=1), ours.bert.encode(tokens, mask)[:, :1])
    close(ours(tokens, mask, torch.ones(5, dtype=int)), want)
    pooled = theirs.bert(tokens, attention_mask=mask).pooler_output              # windows of three sequences
    means = torch.stack([pooled[0], pooled[1:4].mean(0), pooled[4]])
    close(ours(tokens, mask, torch.tensor([1, 3, 1])), theirs.classifier(means))


def test_export_of_a_regression(hf, tmp_path):
    net = classifier(models.load_hf(hf[2]), 2)
    models.save_hf(net, tmp_path / "hf", ("Dev", "Hk"), "regression")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["problem_type"], config["label2id"]) == ("regression", {"Dev": 0, "Hk": 1})
    with pytest.raises(ValueError, match="masked-LM head"):  # a classifier has none; nothing is made up
        models.load_hf(tmp_path / "hf")


def test_a_single_label_stays_a_label(hf, tmp_path):
    """transformers takes one output for a regression unless the folder says otherwise; ours does."""
    net = classifier(models.load_hf(hf[2]), 1)
    for problem in ("multi_label_classification", "regression"):
        models.save_hf(net, tmp_path / problem, ["liver"], problem)
        assert models.read_hf(tmp_path / problem, needs_head=False)[2][1:] == (["liver"], problem)


def test_an_export_reads_sequences_as_the_model_does(hf, tmp_path):
    net = classifier(models.load_hf(hf[2]), 2)
    how = {"pairs": True, "strands": "average", "long": "truncate"}
    net.spec = how
    models.save_hf(net, tmp_path / "hf", ["a", "b"])
    spec, _ = finetune.read_folder(str(tmp_path / "hf"))
    assert {name: spec[name] for name in how} == how
    path = tmp_path / "hf/config.json"
    path.write_text(path.read_text().replace('"average"', '"both"'))
    with pytest.raises(ValueError, match="strands is 'both'"):
        finetune.read_folder(str(tmp_path / "hf"))


def test_cnn_equals_its_formula():
    torch.manual_seed(0)
    cnn, bases = models.Cnn(75, 3), torch.randint(5, (6, 75), dtype=torch.uint8)
    for _ in range(3):
        cnn(bases)                                           # running means and variances
    x = cnn.eval().emb.weight[bases.long()]                  # (B, L, channels)
    for first, relu in ((0, True), (4, False), (7, False)):  # as published: one non-linearity in all
        conv, norm = cnn.convs[first], cnn.convs[first + 1]
        x = torch.einsum("blcw,dcw->bld", x.unfold(1, 8, 1), conv.weight) + conv.bias
        x = (x - norm.running_mean) / (norm.running_var + 1e-5).sqrt() * norm.weight + norm.bias
        x = x.relu() if relu else x
        x = x[:, :x.shape[1] // 2 * 2].unflatten(1, (-1, 2)).amax(2)
    x = x.transpose(1, 2).flatten(1) @ cnn.hidden.weight.T + cnn.hidden.bias
    close(cnn(bases), x @ cnn.out.weight.T + cnn.out.bias)
    assert models.Cnn(57, 2)(torch.zeros(2, 57, dtype=torch.uint8)).shape == (2, 2)
    with pytest.raises(ValueError, match="56 bases are too few"):
        models.Cnn(56, 2)


def test_penguinn_has_the_published_layers():
    """Klimentova et al. 2020, for the paper's 200 bases: shapes and parameters counted by hand."""
    net, shapes = models.Penguinn(200, 2, binary=True), []
    for layer in net.modules():
        if isinstance(layer, (torch.nn.Conv1d, torch.nn.MaxPool1d, torch.nn.Linear)):
            layer.register_forward_hook(lambda layer, given, x: shapes.append(tuple(x.shape[1:])))
    assert net(torch.randint(5, (4, 200), dtype=torch.uint8)).shape == (4, 2)
    assert shapes == [(16, 200), (16, 100), (8, 100), (8, 50), (4, 50), (4, 25), (3, 25), (3, 12),
                      (512,), (1,)]
    convs = (4 * 8 * 16 + 16) + (16 * 8 * 8 + 8) + (8 * 8 * 4 + 4) + (4 * 8 * 3 + 3)
    norms, dense = 2 * (16 + 8 + 4 + 3 + 512), 3 * 12 * 512 + 512 + 512 + 1
    assert sum(p.numel() for p in net.parameters()) == convs + norms + dense == 22_462
    assert [layer.p for layer in net.modules() if isinstance(layer, torch.nn.Dropout)] == [0.3] * 4
    assert models.Penguinn(16, 3, binary=False)(torch.zeros(2, 16, dtype=torch.uint8)).shape == (2, 3)
    with pytest.raises(ValueError, match="15 bases are too few"):
        models.Penguinn(15, 2, binary=True)


def test_penguinn_equals_a_literal_forward_pass():
    torch.manual_seed(0)
    net, bases = models.Penguinn(45, 2, binary=True), torch.randint(5, (6, 45), dtype=torch.uint8)
    for _ in range(9):
        net(bases)                                           # running means and variances
    w = {name: p.detach().double().numpy() for name, p in net.eval().state_dict().items()}
    got, labels = net(bases), torch.tensor([0, 1, 1, 0, 1, 0])

    def norm(x, name):
        return (x - w[f"{name}.running_mean"]) / np.sqrt(w[f"{name}.running_var"] + 1e-3) * w[
            f"{name}.weight"] + w[f"{name}.bias"]
    for row, outputs in zip(bases.tolist(), got):
        x = np.array([[float(base == code) for code in range(4)] for base in row])         # N: zeros
        for layer in range(1, 24, 6):                        # pad, conv, ReLU, norm, pool, dropout
            weight, bias = w[f"convs.{layer}.weight"], w[f"convs.{layer}.bias"]            # (D, C, 8)
            y = np.zeros((len(x), len(bias)))
            for at in range(len(x)):                         # Keras's "same": 3 on the left, 4 on the right
                for j in range(8):
                    if 0 <= at + j - 3 < len(x):
                        y[at] += weight[:, :, j] @ x[at + j - 3]
            y = norm(np.maximum(y + bias, 0), f"convs.{layer + 2}")
            x = np.array([np.maximum(y[2 * i], y[2 * i + 1]) for i in range(len(y) // 2)])
        x = norm(np.maximum(w["hidden.weight"] @ x.T.flatten() + w["hidden.bias"], 0), "norm")
        [z] = w["out.weight"] @ x + w["out.bias"]
        np.testing.assert_allclose(outputs.tolist(), [0, z], atol=1e-5)
    bce = torch.nn.functional.binary_cross_entropy(got[:, 1].sigmoid(), labels.float())
    close(torch.nn.functional.cross_entropy(got, labels), bce)
    close(got.softmax(1)[:, 1], got[:, 1].sigmoid())


def test_penguinn_takes_a_lone_sequence_and_drops_out():
    torch.manual_seed(0)
    net, bases = models.Penguinn(40, 3, binary=False), torch.randint(4, (5, 40), dtype=torch.uint8)
    assert net(bases[:1]).isfinite().all() and not torch.equal(net(bases), net(bases))
    assert torch.equal(net.eval()(bases), net(bases))
    close(net(bases)[:1], net(bases[:1]))


def test_capacity(hf, batch):
    (_, ours, _), (inputs, labels, _) = hf, batch
    flat = labels.flatten()
    at = (flat != -100).nonzero()[:, 0]
    wanted = flat[at]
    at1, wanted1 = models.labelled_positions(labels)         # the next multiple of 256
    assert len(at1) == 256 and (wanted1[len(at):] == -100).all()
    equal([at1[:len(at)], wanted1[:len(at)]], [at, wanted])
    for extra in (0, 1, len(flat) - len(at)):
        at2, wanted2 = models.labelled_positions(labels, len(at) + extra)
        equal([at2[:len(at)], wanted2], [at, torch.cat([wanted, torch.full((extra,), -100)])])
        close(ours(inputs, labels, capacity=len(at) + extra), ours(inputs, labels))
        assert len({*at2[len(at):].tolist()}) == extra       # equal indices are slow in the backward pass
    assert ours(inputs, labels, capacity=len(at) - 1)[0].isnan()
    for capacity in (None, 7):
        assert [x.item() for x in ours(inputs, torch.full_like(labels, -100), capacity=capacity)] == [0, 0]


def test_the_loss_of_low_precision_is_float32(hf, batch, monkeypatch):
    """A GPU's autocast leaves the logarithm of the softmax in the dtype of the logits (a CPU's does not)."""
    (_, ours, _), (inputs, labels, _), seen, loss = hf, batch, [], models.F.cross_entropy
    monkeypatch.setattr(models.F, "cross_entropy", lambda x, *args, **kwargs: [
        seen.append(x.dtype), loss(x, *args, **kwargs)][1])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert ours(inputs).dtype == torch.bfloat16
        loss_sum, _ = ours(inputs, labels)
    assert seen == [torch.float32] and loss_sum.dtype == torch.float32


def test_export_loads_in_transformers(hf, tmp_path):
    ours, folder = hf[1], tmp_path / "export"
    models.save_hf(ours, folder)
    equal(dict(models.load_hf(folder).state_dict()), dict(ours.state_dict()))
    tokenizer, text = AutoTokenizer.from_pretrained(folder), random_dna(24, np.random.default_rng(0))
    tokens = tokenizer(" ".join(text[i:i + 3] for i in range(22)), return_tensors="pt")["input_ids"]
    equal(tokens, data.tokenize([text], k=3))
    assert tokenizer("[MASK] [PAD] ANT AAA", "GGG")["input_ids"] == [2, 4, 0, 1, 5, 3, 68, 3]
    close(AutoModelForMaskedLM.from_pretrained(folder).eval()(tokens).logits, ours(tokens))
    close(AutoModel.from_pretrained(folder).eval()(tokens).last_hidden_state, ours.encode(tokens))
    with pytest.raises(ValueError, match="exists"):
        models.save_hf(ours, folder)


@pytest.mark.parametrize("k, stride", [(1, 1), (3, 1), (3, 2), (6, 1), (6, 4), (6, 6)])
def test_the_exported_tokenizer_reads_dna(tmp_path, k, stride):
    """DNA of any case, with N and IUPAC codes, gives the tokens of data.tokenize, and so do its k-mers."""
    config = models.BertConfig(vocab_size=4 ** k + 5, block_size=64, n_layer=1, n_head=1, n_embd=4, n_inner=4)
    models.save_hf(models.Bert(config), tmp_path / "export", stride=stride)
    tokenizer, rng = AutoTokenizer.from_pretrained(tmp_path / "export"), np.random.default_rng(k)
    for length in (0, k - 1, k, k + 1, k + stride, 60, 61, 300):
        text = "".join(rng.choice(list("ACGTacgtNnRy"), length, p=[0.11] * 8 + [0.03] * 4))
        wanted = data.tokenize([text], k, stride)[0].tolist()
        assert tokenizer(text)["input_ids"] == wanted
        words = [text[i:i + k].upper() for i in range(0, len(text) - k + 1, stride)]
        assert tokenizer(" ".join(words))["input_ids"] == wanted
    assert tokenizer.tokenize("ACGTTG"[:k] + " [MASK]") == ["ACGTTG"[:k], "[MASK]"]
    batch = tokenizer(["ACGTTGCA", "ACGTTGCAACGT"], padding=True, return_tensors="pt")
    equal(batch["input_ids"], data.tokenize(["ACGTTGCA", "ACGTTGCAACGT"], k, stride))
    equal(batch["attention_mask"], (batch["input_ids"] != data.PAD).long())


@pytest.mark.fault("Hugging Face folders")
@pytest.mark.parametrize("case", cases("hf.json"), ids=lambda c: c["name"])
def test_load_hf_refuses(hf, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(hf[2], tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | case.get("config", {})))
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: torch.ones(shape or 0) for name, shape in case.get("tensors", {}).items()}
    save_file({name: t for name, t in tensors.items() if len(t)}, folder / "model.safetensors")
    for name, text in case.get("files", {}).items():
        (folder / name).unlink() if text is None else (folder / name).write_bytes(
            expand(text).encode("latin-1"))
    with pytest.raises(ValueError) as e:
        models.load_hf(folder)
    assert case["word"] in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 400
    assert os.listdir(tmp_path) == ["hf"]                    # nothing was executed


def test_load_hf_reads_no_pipe(hf, tmp_path):
    """A pipe or a device may never end."""
    folder = shutil.copytree(hf[2], tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no model.safetensors"):
        models.load_hf(folder)


@pytest.mark.parametrize("zipped", [True, False])
def test_load_hf_reads_old_files(hf, tmp_path, capsys, zipped):
    theirs, ours, folder = hf
    shutil.copy(folder / "config.json", tmp_path)
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): p
           for n, p in theirs.state_dict().items()}          # the decoder's copies among them
    old |= {"bert.embeddings.position_ids": torch.arange(24)[None], "bert.pooler.dense.weight": torch.eye(32),
            "cls.seq_relationship.weight": torch.ones(2, 32), "cls.seq_relationship.bias": torch.ones(2)}
    assert {"bert.embeddings.LayerNorm.gamma", "cls.predictions.decoder.weight"} < old.keys()
    torch.save(old, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    equal(dict(models.load_hf(tmp_path).state_dict()), dict(ours.state_dict()))
    assert "A,T,C,G" in capsys.readouterr().out              # no vocab.txt: says which order it takes


@pytest.mark.parametrize("sizes", [{"n_layer": 0}, {"n_head": 5}, {"n_embd": "32"}, {"vocab_size": 1e3},
                                   {"dropout": 1.0}, {"dropout": "0.1"}])
def test_sizes_that_are_no_network(sizes):
    [name] = sizes
    with pytest.raises(ValueError, match=name):
        models.BertConfig(**sizes)


def hide_safetensors():
    sys.modules |= {"safetensors": None, "safetensors.torch": None}


@pytest.mark.parametrize("script", ["randommask.py", "findna.py", "cm_gems.py", "finetune.py"])
def test_scripts_start_without_safetensors(script):
    result = run(["--help"], {0: hide_safetensors}, script=script)
    assert result.code == 0 and result.out.startswith("usage: "), result


def test_only_its_own_files_need_safetensors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_fasta(tmp_path / "a.fa", {"a": random_dna(3000, np.random.default_rng(0))})
    bert = models.Bert(models.BertConfig(69, 24, 1, 2, 8, 32))
    models.save_hf(bert, "new")
    (tmp_path / "old").mkdir()
    shutil.copy("new/config.json", "old")
    torch.save(load_file("new/model.safetensors"), "old/pytorch_model.bin")
    flags = """--genome a.fa --device cpu --k 3 --block_size 24 --n_layer 1 --n_head 2 --n_embd 8
               --batch_size 4 --micro_batch_size 4 --steps 1 --eval_windows 4"""
    for init, out in (("hf:old", "from_bin"), ("from_bin/last.pt", "from_run"), ("hf:new", "none")):
        result = run([*flags.split(), "--init", init, "--out", out], {0: hide_safetensors})
        if init == "hf:new":
            assert "pip install safetensors" in refused(result)
        else:
            assert result.code == 0, result
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    equal(dict(models.load_hf("old").state_dict()), dict(bert.state_dict()))
    with pytest.raises(ValueError, match="pip install safetensors"):
        models.save_hf(bert, "export")
    assert not [name for name in os.listdir() if name.startswith("export")]


@pytest.mark.parametrize("padded", [False, True])
def test_dropout_is_where_transformers_has_it(hf, batch, monkeypatch, tmp_path, padded):
    """Each dropout halves its input instead: in training, equal logits then need the same dropouts."""
    (_, _, folder), (tokens, _, mask) = hf, batch
    monkeypatch.setattr(F, "dropout", lambda x, p=0.5, training=True, inplace=False: x / 2 if training else x)
    tokens, mask, real = (tokens * mask, mask, mask) if padded else (tokens, None, tokens > 0)
    theirs = BertForMaskedLM.from_pretrained(folder, attn_implementation="eager").train()
    want = theirs(tokens, attention_mask=mask).logits[real]
    close(models.load_hf(folder).train()(tokens, mask=mask)[real], want)
    ours = classifier(models.load_hf(folder), 3)             # a dropout before the last layer, too
    models.save_hf(ours, tmp_path / "x", ["a", "b", "c"])
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "x", attn_implementation="eager")
    close(ours.train()(tokens, mask, None), theirs.train()(tokens, attention_mask=mask).logits)


def test_initial_weights_are_those_of_bert():
    """DNABERT's config.json: matrices N(0, 0.02), biases 0, LayerNorm 1, [PAD] 0; dropout 0.1."""
    spec = finetune.BertHead.body_spec(models.BertConfig(4101, 64, 2, 2, 64, 128)) | {"n_out": 9}
    net = finetune.build_net(spec)
    for name, p in net.named_parameters():
        if p.dim() == 2:
            assert [p.mean().item(), p.std().item()] == pytest.approx([0, 0.02], abs=0.003), name
        else:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
    assert not net.bert.tok_emb.weight[data.PAD].any()
    sizes = dict(k=6, block_size=512, n_layer=12, n_head=12, n_embd=768)
    args = SimpleNamespace(**sizes, stride=None, mode="finetune")
    assert finetune.read_start("random", args).spec["bert"] == vars(models.BertConfig())


def test_penguinn_starts_and_trains_as_published():
    """Keras: Glorot's uniform weights, batch norm with momentum 0.99; dropout 0.2 of the dense layer."""
    torch.manual_seed(0)
    net, bases, seen = models.Penguinn(160, 3, binary=False), torch.randint(4, (64, 160)), []
    for layer in net.modules():
        if isinstance(layer, (torch.nn.Conv1d, torch.nn.Linear)):
            n_out, n_in, *width = layer.weight.shape
            limit = math.sqrt(6 / ((n_in + n_out) * math.prod(width)))
            assert 0.9 * limit < layer.weight.abs().max() <= limit and not layer.bias.any()
    net.convs[2].register_forward_hook(lambda layer, given, x: seen.append(x))
    net.out.register_forward_hook(lambda layer, given, x: seen.append(given[0]))
    net(bases)
    close(net.convs[3].running_mean, 0.01 * seen[0].mean((0, 2)))
    assert (seen[1] == 0).float().mean() == pytest.approx(0.2, abs=0.02)
    protocol = finetune.get_protocol("martinek", "gb/human_ocr_ensembl", None, "penguinn", {})
    assert protocol["grad_clip"] > 1e6                       # none
