"""--init hf:FOLDER of any encoder, bare BERTs, classifiers, against transformers; findna:FILE; nt."""
import dataclasses
import itertools
import json
import shutil
import sys

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors
from tokenizers import models as token_models
from tokenizers import trainers
from transformers import AutoModel, AutoTokenizer

import data
import finetune
import models
import training
from harness import at_call, equal, random_dna, refused, run, write_fasta
from tools import figures

N, LENGTH = 3, 40                                            # k of the ESM's vocabulary; its positions
SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
TEXTS = [random_dna(n, np.random.default_rng(n), letters) for n, letters in (
    (20, "ACGT"), (1, "ACGT"), (37, "ACGTN"), (300, "ACGT"), (2, "N"), (150, "AACCGGTTN"))]


def close(a, b):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=1e-5)


def esm_tokenizer(folder):
    """A tokenizer as Nucleotide Transformer's: specials, k-mers, letters; [CLS] in front, nothing behind."""
    folder.mkdir()
    kmers = map("".join, itertools.product("TCAG", repeat=N))
    (folder / "vocab.txt").write_text("\n".join(["<unk>", "<pad>", "<mask>", "<cls>", *kmers, *"ACGTN"]))
    return transformers.EsmTokenizer(str(folder / "vocab.txt"), eos_token=None, model_max_length=LENGTH)


def bpe_tokenizer(folder):
    """A tokenizer as GENA-LM's: byte-pair encoding, [CLS] in front and [SEP] behind."""
    tokenizer = Tokenizer(token_models.BPE(unk_token="[UNK]"))
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    texts = [random_dna(300, np.random.default_rng(i), "ACGTACGTN") for i in range(20)]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=90, special_tokens=words,
                                                             show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        pad_token="[PAD]", mask_token="[MASK]")


KINDS = {                                                    # name: (architecture, settings)
    "esm": ("Esm", dict(pad_token_id=1, mask_token_id=2, max_position_embeddings=LENGTH + 2)),
    "esm_rotary": ("Esm", dict(pad_token_id=1, mask_token_id=2, max_position_embeddings=LENGTH,
                               position_embedding_type="rotary", token_dropout=True)),
    "bert": ("Bert", dict(pad_token_id=3, max_position_embeddings=LENGTH)),
    "modernbert": ("ModernBert", dict(pad_token_id=3, cls_token_id=1, sep_token_id=2, bos_token_id=1,
                                      eos_token_id=2, max_position_embeddings=LENGTH)),
    "roberta": ("Roberta", dict(pad_token_id=3, max_position_embeddings=LENGTH + 4))}


def write_folder(folder, kind):
    """A folder as transformers writes it, with random weights everywhere."""
    architecture, settings = KINDS[kind]
    tokenizer = esm_tokenizer(folder) if "esm" in kind else bpe_tokenizer(folder)
    config = getattr(transformers, f"{architecture}Config")(vocab_size=len(tokenizer), **SIZES, **settings)
    torch.manual_seed(0)
    net = getattr(transformers, f"{architecture}ForMaskedLM")(config)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.2 * torch.randn_like(p)
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    return {kind: write_folder(root / kind, kind) for kind in KINDS}


def copy(folder, to):
    return shutil.copytree(folder, to)


def their_states(folder, text, room):
    """Hidden states of a text in windows of room tokens, without the specials, by transformers alone."""
    tokenizer, net = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer("ACG")["input_ids"]
    after = whole[1 + len(tokenizer("ACG", add_special_tokens=False)["input_ids"]):]
    windows = [[whole[0], *ids[i:i + room], *after] for i in range(0, len(ids), room)]
    with torch.no_grad():
        states = [net(torch.tensor([window])).last_hidden_state[0] for window in windows]
    return [x[1:len(x) - len(after)] for x in states], [x[0] for x in states]


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_equal_transformers(folders, kind):
    model = finetune.load_model(f"hf:{folders[kind]}")
    room = LENGTH - (1 if "esm" in kind else 2)
    assert model.net.room == room and model.net.k == (N if "esm" in kind else 0)
    cls = finetune.load_model(f"hf:{folders[kind]}", pool="cls")
    got = {"mean": model.embed(TEXTS), "cls": cls.embed(TEXTS)}
    for i, text in enumerate(TEXTS):
        if not text.strip("N"):                              # a vector of nothing
            assert np.isnan(got["mean"][i]).all() and np.isnan(got["cls"][i]).all()
            continue
        states, first = their_states(folders[kind], text, room)
        close(got["mean"][i], torch.cat(states).mean(0))
        close(got["cls"][i], torch.stack(first).mean(0))
    n = [len(their_states(folders[kind], text, room)[0]) for text in TEXTS]
    assert max(n) > 1 and min(n) == 1
    rows = data.rows_from(TEXTS)
    assert model.net.inputs(data.on_device(rows, "cpu"), np.arange(6))[-1].tolist() == n
    truncated = finetune.load_model(f"hf:{folders[kind]}", long="truncate")
    close(truncated.embed(TEXTS)[3], their_states(folders[kind], TEXTS[3], room)[0][0].mean(0))


@pytest.mark.parametrize("kind", ["esm", "roberta", "bert"])
def test_logits_equal_transformers_classifier(folders, kind):
    """One window: theirs is dense, tanh, linear on [CLS], too."""
    torch.manual_seed(1)
    name = f"{KINDS[kind][0]}ForSequenceClassification"
    theirs = getattr(transformers, name).from_pretrained(folders[kind], num_labels=3).eval()
    spec, weights = finetune.read_network(f"hf:{folders[kind]}")
    net = finetune.build_net(spec | {"n_out": 3}, weights).eval()
    dense, out = (theirs.bert.pooler.dense, theirs.classifier) if kind == "bert" else (
        theirs.classifier.dense, theirs.classifier.out_proj)
    net.pooler.load_state_dict(dense.state_dict())
    net.out.load_state_dict(out.state_dict())
    tokenizer, texts = AutoTokenizer.from_pretrained(folders[kind]), [TEXTS[0], TEXTS[1], TEXTS[2]]
    rows = data.on_device(data.rows_from(texts), "cpu")
    with torch.no_grad():
        close(net(*net.inputs(rows, np.arange(3))), theirs(**tokenizer(
            texts, padding=True, return_tensors="pt")).logits)


def test_spans_of_the_stride(folders):
    tokenizer = AutoTokenizer.from_pretrained(folders["esm"])
    for text in [*TEXTS, "ACGTNNACGTAC", "NACG", "AC", "ACGNAC", "A" * 9]:
        ids, starts, widths = models.tokens_of(tokenizer, text, N, N)          # as its tokenizer does
        assert ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
        own = models.tokens_of(tokenizer, text, N, None)
        assert np.array_equal([ids, starts, widths], own) and widths.sum() == len(text)
        for stride in (1, 2, N):
            _, starts, widths = models.tokens_of(tokenizer, text, N, stride)
            words = [text[i:i + n] for i, n in zip(starts, widths)]
            assert all(len(word) == 1 or len(word) == N and "N" not in word for word in words)
            assert set(np.concatenate([np.arange(i, i + n) for i, n in zip(starts, widths)])) == {
                *range(len(text))}                           # every base is read
    names = tokenizer.convert_ids_to_tokens(models.tokens_of(tokenizer, "ACGTANACG" "NAC", N, 1)[0])
    assert names == ["ACG", "CGT", "GTA", "N", "ACG", "N", "A", "C"]


def test_per_base(folders, tmp_path):
    from tools import embed
    for kind, stride in (("esm", None), ("esm", 1), ("bert", None)):
        model = finetune.load_model(f"hf:{folders[kind]}", stride=stride)
        rows = data.on_device(data.rows_from(TEXTS), "cpu")
        got, at = embed.per_base(model.net, rows, 4), 0
        for text in TEXTS:
            ids, starts, widths = models.tokens_of(model.net.tokenizer, text, N, stride)
            want, n = np.zeros((len(text), 16)), np.zeros((len(text), 1))
            for i in range(0, len(ids), model.net.room):
                window = torch.tensor([[*model.net.first, *ids[i:i + model.net.room], *model.net.last]])
                with torch.no_grad():
                    x = model.net.hf(window).last_hidden_state[0][1:]
                for state, start, width in zip(x, starts[i:i + model.net.room], widths[i:i + model.net.room]):
                    want[start:start + width] += state.numpy()
                    n[start:start + width] += 1
            close(got[at:at + len(text)], (want / n).astype(np.float32))
            at += len(text)


def write_csv(path, n=60):
    rng = np.random.default_rng(0)
    rows = [(random_dna(30, rng, letters), label) for _ in range(n) for letters, label in (
        ("AAAAAACGT", "no"), ("ACGTTTTTT", "yes"))]
    path.write_text("sequence,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return path


@pytest.mark.parametrize("kind, stride", [("esm", None), ("esm", 1), ("modernbert", None), ("bert", None)])
def test_fine_tune_probe_and_predict(folders, tmp_path, monkeypatch, kind, stride):
    monkeypatch.chdir(tmp_path)
    folder, table = copy(folders[kind], tmp_path / "net"), write_csv(tmp_path / "a.csv")
    flags = ["--csv", table, "--init", "hf:net", "--device", "cpu", *(["--stride", stride] if stride else [])]
    result = run([*flags, "--epochs", "3", "--lr", "3e-3"], script="finetune.py")
    assert result.code == 0 and "trust_remote_code=False" in result.out, result
    assert run([*flags, "--mode", "probe"], script="finetune.py").code == 0
    tuned, probed = map(json.loads, (tmp_path / "out/finetune/results.jsonl").read_text().splitlines())
    assert tuned["score"] > 0.7 and probed["score"] > 0.5 and "files" not in tuned
    assert (tuned["kind"], tuned["stride"]) == ("hf", stride) and len(json.dumps(tuned)) < 20_000
    again = run([*flags, "--epochs", "3", "--lr", "3e-3"], script="finetune.py")
    assert "done before" in again.out, again
    shutil.rmtree(folder)                                    # the checkpoint needs it no more
    for tool, more in (("predict", ["--out", "p.tsv"]), ("embed", ["--per_base", "--out", "e.npz"])):
        result = run(["a.csv", "--init", tuned["model"], *more], script=f"tools.{tool}")
        assert result.code == 0, result
    rows = [line.split("\t") for line in (tmp_path / "p.tsv").read_text().splitlines()]
    assert rows[0][2:] == ["n_bases", "class", "p_no", "p_yes"] and len(rows) == 121
    model = finetune.load_model(tuned["model"])
    texts = [line.split(",")[0] for line in table.read_text().splitlines()[1:]]
    close(model.predict(texts), np.array([row[4:] for row in rows[1:]], np.float32))
    labels = [line.split(",")[1] for line in table.read_text().splitlines()[1:]]
    right = [row[3] == label for row, label in zip(rows[1:], labels, strict=True)]
    assert np.mean(right) > 0.8 and np.load("e.npz")["per_base"].shape == (3600, 16)


def test_a_stopped_run_continues(folders, tmp_path, monkeypatch):
    """Bit for bit, with dropout in the network."""
    monkeypatch.chdir(tmp_path)
    flags = ["--csv", write_csv(tmp_path / "a.csv", 20), "--init", f"hf:{folders['modernbert']}", "--epochs",
             2, "--batch_size", 8, "--dropout", 0.2, "--device", "cpu", "--out"]
    stop = at_call("training", "stop_requested", 5, lambda *_: True)
    assert run([*flags, "a"], {0: stop}, script="finetune.py").code == 143
    for out in "ab":
        assert run([*flags, out], script="finetune.py").code == 0
    one, two = (training.load(str(tmp_path / out / "csv_a" / "modernbert.pt"))["model"] for out in "ab")
    equal(one, two)


def test_dropout_reaches_the_network(folders):
    spec, weights = finetune.read_network(f"hf:{folders['modernbert']}")
    spec["hf"] = spec["hf"] | {"dropout": 0.4}
    config = finetune.build_net(spec, weights).hf.config
    assert config.mlp_dropout == config.attention_dropout == config.embedding_dropout == 0.4
    assert finetune.build_net(spec, weights).hf.training


BAD = {                                                      # name: (change of the folder, word)
    "its own code": (lambda f: edit(f / "config.json", auto_map={"AutoModel": "m.M"}), "own code"),
    "unknown architecture": (lambda f: edit(f / "config.json", model_type="hyena"), "hyena"),
    "more layers": (lambda f: edit(f / "config.json", num_hidden_layers=3), "disagree"),
    "fewer layers": (lambda f: edit(f / "config.json", num_hidden_layers=1), "disagree"),
    "10**9 layers": (lambda f: edit(f / "config.json", num_hidden_layers=10 ** 9), "1,000 layers"),
    "10**8 wide": (lambda f: edit(f / "config.json", hidden_size=10 ** 8), "config.json"),
    "a text for a size": (lambda f: edit(f / "config.json", hidden_size="x"), "config.json"),
    "another width": (lambda f: edit(f / "config.json", intermediate_size=25), "disagree"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "net"),
    "weights are garbage": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99999), "net"),
    "no tokenizer": (lambda f: [(f / name).unlink() for name in ("vocab.txt", "tokenizer_config.json")],
                     "net"),
    "a tokenizer of words": (lambda f: (f / "vocab.txt").write_text(
        "<unk>\n<pad>\n<mask>\n<cls>\nhello"), "DNA"),
    "a larger vocabulary": (lambda f: (f / "vocab.txt").write_text(
        (f / "vocab.txt").read_text() + "\n" + "\n".join("BDEFHI")), "more than the network")}


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.fault("folders of other encoders")
@pytest.mark.parametrize("name", BAD)
def test_bad_folders(folders, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    folder = copy(folders["esm"], tmp_path / "net")
    change, word = BAD[name]
    change(folder)
    result = run(["--csv", write_csv(tmp_path / "a.csv", 4), "--init", "hf:net"], script="finetune.py")
    assert word in refused(result) and "Traceback" not in result.err


def test_no_cls_for_the_pool(folders, tmp_path):
    """A tokenizer without specials: the head reads the mean, and --pool cls is refused."""
    folder = copy(folders["bert"], tmp_path / "net")
    edit(folder / "tokenizer.json", post_processor=None)
    model = finetune.load_model(f"hf:{folder}")
    assert not model.net.has_cls and model.net.room == LENGTH
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        want = AutoModel.from_pretrained(folder).eval()(ids).last_hidden_state[0].mean(0)
        close(model.embed([TEXTS[0]])[0], want)
        close(model.apply([TEXTS[0]])[0], model.net.out(torch.tanh(model.net.pooler(want))))
    with pytest.raises(ValueError, match="--pool mean"):
        finetune.load_model(f"hf:{folder}", pool="cls").embed(TEXTS)


@pytest.mark.parametrize("flags, word", [(["--stride", 4], "--stride 4"), (["--stride", 0], "--stride")])
def test_a_stride_that_does_not_fit(folders, tmp_path, monkeypatch, flags, word):
    monkeypatch.chdir(tmp_path)
    table = write_csv(tmp_path / "a.csv", 20)
    for kind in ("esm", "bert"):
        result = run(["--csv", table, "--init", f"hf:{folders[kind]}", *flags], script="finetune.py")
        assert word in refused(result)


def test_without_transformers(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = write_csv(tmp_path / "a.csv", 4)
    result = run(["--csv", table, "--init", f"hf:{folders['esm']}"], {0: lambda: sys.modules.update(
        transformers=None)}, script="finetune.py")
    assert "pip install transformers" in refused(result)


def kmer_bert(folder, cls, order="ATCG", **settings):
    """A BERT over 3-mers as transformers writes it."""
    torch.manual_seed(0)
    net = cls(transformers.BertConfig(vocab_size=69, max_position_embeddings=24, **SIZES, **settings)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.2 * torch.randn_like(p)
    net.save_pretrained(folder)
    words = [*models.vocabulary(N)[:5], *map("".join, itertools.product(order, repeat=N))]
    ids = {word: i for i, word in enumerate(words)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": ids}}))
    return net, ids


def test_a_bin_that_is_not_of_tensors(tmp_path):
    kmer_bert(tmp_path, transformers.BertModel)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"embeddings.word_embeddings.weight": 3, "a": {}}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not a dict of tensors"):
        finetune.load_model(f"hf:{tmp_path}")


@pytest.mark.parametrize("order", ["ATCG", "ACGT"])
def test_bare_bert_and_the_order_of_tokenizer_json(tmp_path, capsys, order):
    theirs, ids = kmer_bert(tmp_path, transformers.BertModel, order)
    model, text = finetune.load_model(f"hf:{tmp_path}"), TEXTS[0]
    tokens = [2, *(ids[text[i:i + N]] for i in range(len(text) - N + 1)), 3]
    with torch.no_grad():
        close(model.embed([text])[0], theirs(torch.tensor([tokens])).last_hidden_state[0, 1:-1].mean(0))
    assert "assuming" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="masked-LM head is needed"):
        models.load_hf(tmp_path)                             # as randommask.py --init reads it
    from tools import export
    with pytest.raises(ValueError, match="no masked-LM head"):
        export.export(str(tmp_path / "new"), f"hf:{tmp_path}")


def test_classifier_of_transformers(tmp_path):
    names = {0: "low", 1: "mid", 2: "high"}
    theirs, ids = kmer_bert(tmp_path, transformers.BertForSequenceClassification, id2label=names)
    model, text = finetune.load_model(f"hf:{tmp_path}"), TEXTS[0]
    tokens = [2, *(ids[text[i:i + N]] for i in range(len(text) - N + 1)), 3]
    with torch.no_grad():
        close(model.predict([text])[0], theirs(torch.tensor([tokens])).logits[0].softmax(-1))
    assert model.classes() == [*names.values()]
    spec, weights = finetune.read_network(f"hf:{tmp_path}")  # fine-tuning replaces its head
    own = {name: spec[name] for name in ("bert", "k", "stride")}
    net = finetune.build_net({"kind": "bert", "n_out": 2} | own, weights)
    equal(net.bert.blocks[0].fc.weight, weights["bert.blocks.0.fc.weight"])
    edit(tmp_path / "config.json", problem_type="multi_label_classification")
    with torch.no_grad():
        close(finetune.load_model(f"hf:{tmp_path}").predict([text])[0],
              theirs(torch.tensor([tokens])).logits[0].sigmoid())
    edit(tmp_path / "config.json", problem_type=None)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"classifier.weight": torch.ones(3, 15)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="size mismatch for out.weight"):
        finetune.load_model(f"hf:{tmp_path}")
    save_file({n: t for n, t in tensors.items() if "pooler" not in n}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="without bert.pooler"):
        finetune.load_model(f"hf:{tmp_path}")


@pytest.mark.parametrize("stride", [1, N])
@pytest.mark.parametrize("tuned", [True, False])
def test_our_export_comes_back(tmp_path, tuned, stride):
    spec = finetune.BertHead.body_spec(models.BertConfig(69, 24, 1, 2, 16, 24), stride)
    spec |= {"n_out": 2, "classes": ["no", "yes"], "regression": False} if tuned else {}
    net = finetune.build_net(spec)
    state = {"format": 1, "method": "finetune" if tuned else "randommask", "step": 1, "optimizer": {},
             "data": "x", "config": spec if tuned else spec["bert"], "args": {"stride": stride},
             "model": net.state_dict() if tuned else net.bert.state_dict()}
    training.save(state, str(tmp_path))
    from tools import export
    export.export(str(tmp_path / "hf"), str(tmp_path / "last.pt"))
    one, two = (finetune.load_model(init) for init in (str(tmp_path / "last.pt"), f"hf:{tmp_path / 'hf'}"))
    assert json.loads((tmp_path / "hf/config.json").read_text())["stride"] == two.net.spec["stride"] == stride
    np.testing.assert_array_equal(one.embed(TEXTS), two.embed(TEXTS))
    if tuned:
        assert two.classes() == ["no", "yes"]
        np.testing.assert_array_equal(one.predict(TEXTS), two.predict(TEXTS))
    for bad in (0, N + 1, "1"):
        edit(tmp_path / "hf/config.json", stride=bad)
        with pytest.raises(ValueError, match="stride is"):
            finetune.load_model(f"hf:{tmp_path / 'hf'}")


def swan(network, prefix=""):
    """Weights of a BaseModel in the released layout: Model4Pretrain of the FinDNA repository."""
    order, n = [0, 1, 2, 4, 3], network.config.n_blocks      # our A, C, G, T, N; theirs a, c, g, n, t
    tensors = {"embedding.weight": network.backbone.proj.weight[:, order], "embedding.bias":
               network.backbone.proj.bias, "linear.weight": network.head.weight[order], "linear.bias":
               network.head.bias[order]}
    for i, block in enumerate(network.backbone.blocks):
        for name, p in block.named_parameters():
            tensors[f"encoder.SwanDNA_blocks.{i // n}.SwanDNA_blocks.{i % n}.column_transform.{name}"] = p
    return {prefix + name: tensor.detach().clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_released_findna(tmp_path, prefix):
    torch.manual_seed(0)
    config = models.ChordMixerConfig(32, 2, 3, 8)
    teacher, student = (models.BaseModel(models.ChordMixer(config)).eval() for _ in range(2))
    path = tmp_path / "released.pt"
    torch.save({"Teacher": swan(teacher, prefix), "Student": swan(student, prefix), "epoch": 29}, path)
    for network, name in ((teacher, None), (teacher, "teacher"), (student, "student")):
        model = finetune.load_model(f"findna:{path}", eval_network=name)
        for text in ("ACGTTGCANNAC", "GATTACA"):
            one_hot = torch.eye(5)[["ACGTN".index(letter) for letter in text]][None]
            with torch.no_grad():
                close(model.embed([text])[0], network.backbone(one_hot)[0].mean(0))
        got, weights = models.load_findna(path, name)
        assert got == dataclasses.asdict(config)
        equal(weights, dict(network.state_dict()))
    fresh = models.BaseModel(models.ChordMixer(config))
    models.copy_weights(fresh, f"findna:{path}", None)       # findna.py --init
    equal(dict(fresh.state_dict()), dict(teacher.state_dict()))
    torch.save(swan(student, prefix), path)                  # one network alone
    equal(models.load_findna(path)[1], dict(student.state_dict()))


@pytest.mark.parametrize("name, change", [
    ("another name", lambda t: t.update(extra=torch.ones(2))), ("a block is missing", lambda t: t.pop(
        "encoder.SwanDNA_blocks.0.SwanDNA_blocks.1.column_transform.fc1.weight")),
    ("no embedding", lambda t: t.pop("embedding.weight")), ("another shape", lambda t: t.update({
        "embedding.bias": torch.ones(3)})), ("not tensors", lambda t: t.update({"linear.bias": 3}))])
def test_released_findna_that_is_none(tmp_path, monkeypatch, name, change):
    monkeypatch.chdir(tmp_path)
    tensors = swan(models.BaseModel(models.ChordMixer(models.ChordMixerConfig(8, 1, 2, 4))))
    change(tensors)
    torch.save({"Teacher": tensors}, "a.pt")
    result = run(["--csv", write_csv(tmp_path / "a.csv", 4), "--init", "findna:a.pt"], script="finetune.py")
    assert "released weights" in refused(result)


def test_protocol_nt():
    """Liang et al., Table 5: NT takes 1e-4, EMP 3e-5; all else as in Table 4."""
    for task, lr in (("emp/H3", 3e-5), ("tf_m/2", 1e-4), ("tf_h/0", 1e-4), ("pd/all", 1e-4),
                     ("cpd/tata", 1e-4), ("ssp/reconstructed", 1e-4), ("eap", 1e-4)):
        table4 = finetune.get_protocol("randommask", task, None, "", {})
        assert finetune.get_protocol("nt", task, None, "", {}) == table4 | {"lr": lr}


@pytest.mark.parametrize("kind, n", [("esm", 10), ("esm_rotary", 10)])
def test_attention_of_nucleotide_transformer(tmp_path, kind, n):
    """Fig 9a: [CLS], n k-mers without overlap and no [SEP]."""
    write_folder(tmp_path / "nt", kind)
    net = figures.read_attention(f"hf:{tmp_path / 'nt'}", "cpu")
    assert net[2:4] == (N, N) and net.n_last == 0
    text = random_dna(2 * N * n, np.random.default_rng(0))
    bases = torch.from_numpy(data.encode(text)).view(2, -1)
    tokens, found = net.tokens(bases), figures.attention(net, net.tokens(bases))
    hf = transformers.AutoModel.from_pretrained(tmp_path / "nt", attn_implementation="eager").eval()
    with torch.no_grad():
        layers = hf(input_ids=tokens, output_attentions=True).attentions
    assert tokens.shape == (2, n + 1) and len(layers) == len(found["numbers"]) == 2
    for w, numbers in zip(layers, found["numbers"]):
        w = w.double().numpy()                               # (2, H, n + 1, n + 1)
        rows = [(i, w[b, h, i]) for b in range(2) for h in range(2) for i in range(1, n + 1)]
        near = [sum(row[j] for j in range(1, n + 1) if abs(i - j) <= 6) for i, row in rows]
        want = [np.mean([row[0] for _, row in rows]), np.nan, np.mean(near),
                np.mean([-(row * np.log(row)).sum() for _, row in rows])]
        np.testing.assert_allclose(numbers[:4], want, atol=1e-5)
    assert found["profiles"].shape == (2, 2, N * n)
    received = layers[-1][0].mean(0)[1:, 1:].mean(0)
    np.testing.assert_allclose(found["profiles"][1, 1], received.repeat_interleave(N), atol=1e-6)


def test_attention_side_by_side(tmp_path, monkeypatch):
    """A BERT with overlapping k-mers and NT on the same bases; a byte-pair encoder is refused."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    for kind in ("esm", "roberta"):
        write_folder(tmp_path / kind, kind)
    models.save_hf(models.Bert(models.BertConfig(69, 40, 2, 2, 16, 32)), "bert")
    write_fasta(tmp_path / "a.fa", {"a": random_dna(500, np.random.default_rng(0))})
    flags = "--fasta a.fa --windows 2 --dpi 50 --out f/x".split()
    result = run(["attention", "hf:bert", "hf:esm", *flags, "--names", "ours", "nt"], script="tools.figures")
    assert result.code == 0 and "2 windows of 40 bases, the same for all" in result.out, result
    assert "| nt | uniform, 14 tokens | " in result.out and "| ours | uniform, 40 tokens | " in result.out
    refusal = refused(run(["attention", "hf:roberta", *flags], script="tools.figures"))
    assert "hf:roberta: not an encoder that reads [CLS] k-mers" in refusal
