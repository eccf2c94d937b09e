"""tools/predict, embed, export over several blocks and runs; the draws of MTcDNA and of the few-shot sets."""
import argparse
import csv
import functools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import random_dna, results_row, write_fasta
from sklearn.model_selection import train_test_split
from test_benchmarks import pairs, put_fasta, put_table
from test_finetune_rules import K, SPEC

import data
import finetune
import models
from tools import embed, export, predict, variants

NAMES = ("no", "maybe", "yes")


@pytest.fixture
def model(out, monkeypatch):
    """A classifier; t.fa has 7 sequences, which are read in blocks of about 70 bases."""
    for module in (predict, embed):
        monkeypatch.setattr(module, "read_blocks", functools.partial(predict.read_blocks, size=70))
    spec = {"n_out": 3, "classes": NAMES, "regression": False, "pool": "mean"}
    net = finetune.build_net(SPEC | spec, seed=3)
    return finetune.Model("x.pt", net, "cpu")


def texts_and_args(lengths, **more):
    rng, parser = np.random.default_rng(0), argparse.ArgumentParser()
    texts = {f"s{i}": random_dna(n, rng) for i, n in enumerate(lengths)}
    texts["s1"] = texts["s1"][:9] + "N" + texts["s1"][10:]
    write_fasta(Path("t.fa"), texts)
    predict.add_flags(parser)
    args = parser.parse_args(["t.fa", "--init", "x.pt", "--out", "t.out"])
    vars(args).update(dict(empty=False, excel_safe=False) | more)
    return texts, args


@pytest.mark.parametrize("name, fits", [("x.tsv", True), ("x.txt", True), ("run.v1", True), ("-", False),
                                        ("there/", False), ("x.tsv.gz", False), ("x.csv", False),
                                        ("x.npz", False)])
def test_an_output_is_what_its_name_says(name, fits):
    args = argparse.Namespace(file="a/new.fa.gz", out=name)
    if fits:
        assert predict.output(args, ".predictions.tsv") == name
    else:
        with pytest.raises(ValueError, match="not the name of a .tsv file"):
            predict.output(args, ".predictions.tsv")
    for out, want in ((None, "new.npz"), ("e.npz", "e.npz")):
        assert predict.output(argparse.Namespace(file="a/new.fa.gz", out=out), ".npz") == want


def test_column_flags_are_for_tables(model):
    _, args = texts_and_args([30, 33], sequence_column="x")
    with pytest.raises(ValueError, match="--sequence_column: t.fa is a FASTA, not a table; drop it"):
        predict.predict(model, args)


def test_predictions_of_several_blocks(model, capsys):
    texts, args = texts_and_args([30, 33, 40, 50, 21, 34, 35])
    model.net.out.bias.data -= torch.from_numpy(model.apply([*texts.values()]).mean(0))
    model.net.out.weight.data *= 1000                        # all three classes occur
    model.net.out.bias.data *= 1000
    predict.predict(model, args)
    with open("t.out") as f:
        rows = list(csv.DictReader(f, delimiter="\t"))
    assert [row["id"] for row in rows] == [*texts] and len({row["class"] for row in rows}) > 1
    for row, text in zip(rows, texts.values(), strict=True):
        p = model.predict([text])[0]
        assert [float(row[f"p_{name}"]) for name in NAMES] == pytest.approx(p, abs=1e-5)
        assert row["class"] == NAMES[[*p].index(max(p))] and int(row["length"]) == len(text)
    counts = capsys.readouterr().out
    assert all(count in counts for count in ("sequences 7", "with_n 1", "in_windows 3"))


def test_embeddings_of_several_blocks(model):
    """Each base has the mean of the 3-mers that cover it, of one window here."""
    texts, args = texts_and_args([30, 33, 12, 3, 21, 34, 31], per_base=True, pool="mean", layer=-1)
    embed.embed(model, args)
    made = np.load("t.out")
    assert made["ids"].tolist() == [*texts]
    assert made["offsets"].tolist() == [0, *np.cumsum([*map(len, texts.values())])]
    for i, text in enumerate(texts.values()):
        with torch.no_grad():
            hidden = model.net.bert.encode(data.tokenize([text], K))[0, 1:-1].numpy()
        assert made["embeddings"][i] == pytest.approx(hidden.mean(0), abs=1e-5)
        of = made["per_base"][made["offsets"][i]:made["offsets"][i + 1]]
        for at, base in enumerate(of):
            assert base == pytest.approx(hidden[max(at - K + 1, 0):at + 1].mean(0), abs=1e-5)


@pytest.mark.parametrize("length, window, step, starts", [
    (10, 4, 2, [0, 2, 4, 6]), (10, 4, 4, [0, 4, 6]), (10, 4, 9, [0, 6]), (10, 10, 3, [0]), (10, 99, 3, [0]),
    (11, 4, 3, [0, 3, 6, 7])])
def test_every_base_is_in_a_window(length, window, step, starts):
    codes = np.arange(length)
    cut = [*predict.cut_windows("a", codes, window, step)]
    assert [name for name, _ in cut] == [f"a:{at}-{min(at + window, length)}" for at in starts]
    assert [part.tolist() for _, part in cut] == [codes[at:at + window].tolist() for at in starts]


def test_bases_between_windows_are_said(out, capsys):
    args = texts_and_args([60, 60], step=70, window=60)[1]
    with pytest.raises(ValueError, match="no such"):
        predict.open_model(args)
    assert "of every 70 bases 10 are in no window" in capsys.readouterr().out


@pytest.mark.parametrize("change, message", [
    ({"weight": np.nan}, "NaN or inf in out.weight"), ({"weight": np.inf}, "NaN or inf in out.weight"),
    ({"classes": ("no", "no", "yes")}, "two classes of one name")])
def test_a_model_that_can_only_mislead_is_refused(change, message):
    spec = SPEC | {"n_out": 3, "classes": NAMES, "regression": False, "pool": "mean"}
    weights = finetune.build_net(spec, seed=3).state_dict()
    weights["out.weight"][0, 0] = change.pop("weight", 0)
    with pytest.raises(LookupError, match=message):
        finetune.check_spec(spec | change, weights)


def test_a_name_with_control_characters_is_called_that(tmp_path):
    path = tmp_path / "a.fa"
    path.write_text(">a\u202eb\nACGT\n", "utf-8")
    with pytest.raises(ValueError, match=r"line 1: control character in the name 'a\\u202eb'; remove it"):
        list(data.fasta_records(str(path)))


def test_a_vocabulary_that_is_no_file_is_refused(tmp_path):
    (tmp_path / "vocab.txt").mkdir()
    with pytest.raises(ValueError, match="vocab.txt: not a regular file"):
        models.kmer_order(str(tmp_path), 3)


def test_an_export_tells_the_scores_of_its_own_run(out):
    (out / "t").mkdir(parents=True)
    rows = [results_row(id=id, task="t", seed=i, test={"mcc": i / 4}) for i, id in enumerate("abc")]
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert export.recorded(str(out / "t/x.pt"), {"id": "b"}) == [{"mcc": 0.25, "task": "t", "seed": 1}]
    (out / "t/log.jsonl").write_text('{"step": 5, "loss": 3.0}\n{"step": 9, "loss": 2.0, "val_loss": 4.0}\n')
    assert export.recorded(str(out / "t/x.pt"), {"step": 9}) == {"step": 9, "loss": 2.0, "val_loss": 4.0}
    assert export.recorded(str(out / "t/step_7.pt"), {"step": 7}) == {"step": 5, "loss": 3.0}
    os.chdir(out / "t")                                      # a log that is not theirs
    assert export.recorded("hf:x", {"step": "unknown"}) == export.recorded("findna:x.pt", {}) == []


@pytest.mark.parametrize("more, words, call", [
    ({}, "averages windows of sequences of more than 14 tokens", "tokenizer(dna, return"),
    ({"long": "truncate"}, None, "tokenizer(dna, return"),
    ({"pairs": True}, "averages", "tokenizer(dna, dna, return")])
def test_a_card_says_how_sequences_are_given(more, words, call):
    spec = SPEC | {"classes": NAMES, "long": "chunk"} | more
    _, tokens, snippet = export.use_bert(spec | {"bert": spec["bert"] | {"block_size": 14}})
    assert call in snippet and (words in tokens if words else "windows" not in tokens)


def test_a_cnn_has_no_embeddings():
    model = finetune.Model("x.pt", finetune.build_net({"kind": "cnn", "length": 64, "n_out": 2}), "cpu")
    for embedded in (lambda: model.embed(["ACGT"]), lambda: variants.choose_score(model, True)):
        with pytest.raises(ValueError, match="a CNN has no embeddings; use a pretrained network"):
            embedded()


def test_a_regression_is_written_as_it_is(out):
    """Nine digits tell all float32 apart: at 100,000, six would round to whole numbers."""
    spec = {"n_out": 1, "classes": ["y"], "regression": True, "pool": "mean"}
    net = finetune.build_net(SPEC | spec, seed=3)
    net.out.bias.data.fill_(100_002.0)
    net.out.weight.data *= 10_000
    texts, args = texts_and_args([30, 33, 40, 50])
    model = finetune.Model("x.pt", net, "cpu")
    predict.predict(model, args)
    rows = [*csv.DictReader(open("t.out"), delimiter="\t")]
    written, want = [np.float32(row["y"]) for row in rows], model.predict([*texts.values()])[:, 0]
    assert written == want.astype(np.float32).tolist() and len({*written}) > 1


def test_an_export_of_a_pretrained_mixer_has_no_untrained_head(out):
    safetensors = pytest.importorskip("safetensors.torch")
    mixer = dict(length=26, n_layer=1, track_size=4, hidden=8, dropout=0.0)
    spec = {"kind": "mixer", "mixer": mixer, "n_cls": 10, "long": "chunk"}
    for classes, prefixes in (({}, {"backbone"}), ({"classes": NAMES, "n_out": 3}, {"backbone", "out"})):
        net = finetune.build_net(spec | classes)
        folder = f"new{len(classes)}"
        export.write_mixer(net, folder, "card")
        weights = safetensors.load_file(f"{folder}/model.safetensors")
        assert {name.split(".")[0] for name in weights} == prefixes
        assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in weights.items())


def test_mtcdna_is_split_as_the_paper_splits_it(tmp_path):
    """train_test_split twice with seed 1: 20 % test, 25 % of the rest dev; 5,000 bases are not enough."""
    rng, want = np.random.default_rng(0), []
    for species, label in data.MTCDNA.items():
        cdna = [random_dna(n, rng) for n in (5001, 5000, 5100, 6000, 5050, 5200, 5300)]
        put_fasta(tmp_path / f"MTcDNA/{species}.cdna.all.fa", dict(enumerate(cdna)))
        want += [(text[:1024], label) for text in cdna if len(text) > 5000]
    rest, test = train_test_split(np.arange(24), test_size=0.2, random_state=1)
    train, dev = train_test_split(rest, test_size=0.25, random_state=1)
    for split, rows in data.read_task("mtcdna/1024", tmp_path).items():
        assert pairs(rows) == [want[i] for i in {"train": train, "dev": dev, "test": test}[split]]


def test_few_shot_draws_are_of_shuffled_rows(tmp_path):
    """Draw i of silencer: rows 10 i to 10 i + 9 of each class, in the order of a shuffle by seed 42."""
    rng = np.random.default_rng(0)
    texts, labels = [random_dna(30, rng) for _ in range(200)], [i % 2 for i in range(200)]
    folder = tmp_path / data.TASKS["silencer"].folder
    put_table(folder / "10/train.tsv", texts, labels)
    put_table(folder / "10/dev.tsv", texts[:4], labels[:4])
    order = np.random.default_rng(42).permutation(200)
    for draw in (0, 3, 9):
        chosen = [i for label in (0, 1) for i in [j for j in order if labels[j] == label][10 * draw:][:10]]
        got = pairs(data.read_task("silencer", tmp_path, 10, draw)["train"])
        assert got == [(texts[i], labels[i]) for i in sorted(chosen)]
