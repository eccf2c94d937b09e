"""finetune.py as a user runs it, whole and through faults: results, predictions, embeddings, exports."""
import csv
import functools
import gzip
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import data
import finetune
import models
import training
from harness import (ROOT, SHARED, at_call, cases, contents, die, expand, log_rows, random_dna, refused, run,
                     slow, start, wait, wait_rows, write_fasta)
from tools import embed, predict

MOTIF, BLOCK, K = "CGCGCGCGCGCG", 34, 3                      # a window: 32 3-mers, 34 bases
SPLITS = ["train.csv", "dev.csv", "test.csv"]
LEARN = dict(lr=0.005, dropout=0, batch_size=16, epochs=5)
SMALL = dict(csv="small.csv", lr=0.01, epochs=2, batch_size=16)                # 2 x 8 steps


def tiny(**flags):
    """Flags of a small network on the CPU."""
    flags = dict(out="out", k=K, block_size=BLOCK, n_layer=1, n_head=2, n_embd=16, device="cpu") | flags
    return [str(x) for name, value in flags.items() if value is not None
            for x in (f"--{name}", *(value if isinstance(value, (list, tuple)) else [value]))]


def tune(patches={}, ranks=1, **flags):
    return run(tiny(**flags), patches, ranks, script="finetune.py")


def done(**flags):
    """What a command that must succeed printed; the rows of results it left."""
    result = tune(**flags)
    assert result.code == 0 and result.err == "", result
    return result.out, results()


def use(tool, file, **flags):
    """What python -m tools.TOOL, which must succeed, printed."""
    flags = ({} if tool == "export" else {"device": "cpu"}) | flags
    result = run([file, *(str(x) for name, value in flags.items() for x in (
        [f"--{name}"] if value is True else [f"--{name}", value]))], script=f"tools.{tool}")
    assert result.code == 0 and result.err == "", result
    return result.out


def results():
    """Rows of results.jsonl by id, without the seconds; none is there twice."""
    path = Path("out/results.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert all(row.pop("seconds") >= 0 for row in rows) and len({row["id"] for row in rows}) == len(rows)
    return sorted(rows, key=lambda row: row["id"])


def write_table(name, head, rows):
    Path(name).write_text("\n".join(",".join(map(str, row)) for row in [head.split(), *rows]) + "\n")
    return name


def column(path, n=0):
    with open(path) as f:
        return [row[n] for row in csv.reader(f, delimiter="," if str(path).endswith("csv") else "\t")][1:]


def motif_rows(n, rng):
    """(sequence of 20 to 59 bases, 'yes' where it holds MOTIF)."""
    for i in range(n):
        text = random_dna(rng.integers(20, 60), rng).replace(MOTIF, "A" * len(MOTIF))
        at = rng.integers(len(text) - len(MOTIF) + 1)
        yield (text[:at] + MOTIF + text[at + len(MOTIF):], "yes") if i % 2 else (text, "no")


@pytest.fixture(scope="module", autouse=True)
def learnt(tmp_path_factory):
    """In the folder HERE: tables with a planted motif, files of the flag cases, two runs. ROW is that of the
    one that learnt the motif, ALONE that of SMALL, which nothing disturbed."""
    global HERE, ROW, ALONE, MODEL
    HERE, rng = tmp_path_factory.mktemp("learnt"), np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(HERE)
        for name, n in (("train", 800), ("dev", 100), ("test", 100), ("small", 160)):
            write_table(f"{name}.csv", "sequence label", motif_rows(n, rng))
        short = [("".join(bases), i % 2) for i, bases in enumerate(itertools.product("ACGT", repeat=3))]
        write_table("short.csv", "sequence label", short)
        write_table("two.csv", "sequence label", [("ACGT", 0), ("ACGG", 1)])
        write_table("floats.csv", "sequence label", [("ACGT", 0), ("ACGT", 0.5)] * 9)
        write_table("letter.csv", "sequence label", [("ACGT", 1), ("ACGU", 0)])
        write_table("blank.csv", "sequence label", [("ACGT", 1), ("", 0)])
        [ROW] = done(csv=SPLITS, **LEARN)[1]
        [ALONE] = [row for row in done(**SMALL)[1] if row != ROW]
        cnn = {"kind": "cnn", "length": 60, "n_out": 2}
        bert = models.BertConfig(4 ** K + 5, BLOCK, 1, 2, 16, 64)
        state = training.load(ROW["model"]) | {"model": finetune.build_net(cnn).state_dict()}
        torch.save(state | {"config": cnn | {"classes": ("no", "yes"), "regression": False}}, "cnn.pt")
        state |= {"method": "randommask", "model": models.Bert(bert).state_dict(), "args": {"stride": K}}
        torch.save(state | {"config": vars(bert)}, "bert.pt")
    MODEL = HERE / ROW["model"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working folder of a test, with the tables in it."""
    monkeypatch.chdir(tmp_path)
    for path in HERE.glob("*.csv"):
        shutil.copy(path, tmp_path)
    return tmp_path


def test_pairs_are_learnt_together(here):
    """'yes' where both sequences hold a motif: who reads only one of them has an MCC of 0.58 at best."""
    rng, rows = np.random.default_rng(0), []
    for i in range(800):
        texts = [random_dna(rng.integers(14, 20), rng).replace("CGCGCG", "AAAAAA") for _ in range(2)]
        for j in (0, 1) if i % 4 < 2 else [i % 2]:
            at = rng.integers(len(texts[j]) - 5)
            texts[j] = texts[j][:at] + "CGCGCG" + texts[j][at + 6:]
        rows.append((*texts, "yes" if i % 4 < 2 else "no"))
    write_table("pairs.csv", "sequence sequence_2 label", rows)
    [row] = done(csv="pairs.csv", **LEARN | dict(epochs=8), block_size=40)[1]
    assert row["score"] > 0.8 and row["pairs"] is True
    assert "sequences 800" in use("predict", "pairs.csv", init=row["model"])
    truth = np.array([label for *_, label in rows])
    assert np.mean(np.array(column("pairs.predictions.tsv", 3)) == truth) > 0.9
    assert column("pairs.predictions.tsv", 1)[0] == str(len(rows[0][0] + rows[0][1]))
    for name, head in ("train", "sequence label"), ("test", "sequence sequence_2 label"):
        write_table(f"{name}.csv", head, [("ACGTACGT", *["ACGTACGA"] * (name == "test"), i) for i in (0, 1)])
    assert "only one has a column sequence_2" in refused(tune(csv=["train.csv", "test.csv"]))
    assert "kind penguinn reads no pairs" in refused(tune(csv="pairs.csv", init="penguinn"))
    assert "a model of single ones" in refused(run(["pairs.csv", "--init", row["model"]],
                                                   script="tools.mutagenesis"))


def test_a_run_and_its_row(here):
    shutil.copytree(HERE / "out", "out")
    assert min(ROW["score"], ROW["dev"]["mcc"]) > 0.8 and ROW["score"] == ROW["test"]["mcc"]
    n_long = sum(len(text) > BLOCK for name in SPLITS for text in column(name))
    want = {"task": "csv/train", "init": "random 1x16 h2 k3", "seed": 42, "mode": "finetune", "shots": None,
            "metric": "mcc", "overrides": LEARN, "tested_on": "test", "classes": ["no", "yes"], "steps": 250,
            "rows": {"train": 800, "dev": 100, "test": 100}, "counts": {"in_windows": n_long}, "epochs": 5,
            "collapsed": False, "protocol": "strict", "dtype": "float32", "stride": 1}
    assert ROW == ROW | want and ROW["tested_step"] in range(50, 251, 50)
    before, text = contents(here / "out"), Path("test.csv").read_text()
    assert "done before" in done(csv=SPLITS, **LEARN)[0]
    Path("test.csv").write_text(text.replace("A", "a"))      # the same bases
    assert "done before" in done(csv=SPLITS, **LEARN)[0] and contents(here / "out") == before
    Path("test.csv").write_text(text + "ACGTACGT,no\n")
    rows = done(csv=SPLITS, **LEARN)[1]
    assert sorted(row["rows"]["test"] for row in rows) == [16, 100, 101] and ROW in rows and ALONE in rows
    assert len(done(csv=SPLITS, **LEARN | {"epochs": 1})[1]) == 4                # another number: another run


def test_class_names_belong_to_the_identity_of_a_run(here):
    done(csv="small.csv", init="kmer")
    text = Path("small.csv").read_text()
    Path("small.csv").write_text(text.replace(",no", ",absent").replace(",yes", ",present"))   # in this order
    rows = done(csv="small.csv", init="kmer")[1]
    assert sorted(row["classes"] for row in rows) == [["absent", "present"], ["no", "yes"]]
    Path("small.csv").write_text(text)
    out, rows = done(csv="small.csv", init="kmer")
    assert "done before" in out and len(rows) == 2


@pytest.mark.parametrize("protocol, name, best", [("strict", "dev_mcc", max), ("dnabert2", "dev_loss", min),
                                                  ("martinek", "dev_loss", min), ("fewshot", "step", max)])
def test_which_evaluation_is_tested(here, protocol, name, best):
    other = {"yes": "no", "no": "yes"}                       # the more is learnt, the worse for dev
    labels = [other[label] for label in column("dev.csv", 1)]
    write_table("dev.csv", "sequence label", zip(column("dev.csv"), labels))
    [row] = done(csv=SPLITS, protocol=protocol, seeds=1, **LEARN)[1]
    rows = log_rows(Path("out/csv_train", row["id"]))
    values = [row[name] for row in rows]
    assert row["tested_step"] == rows[values.index(best(values))]["step"]
    stop = row["tested_step"] + 150 if protocol == "martinek" else 250           # its patience: 3 epochs
    assert row["steps"] == min(250, stop)
    use("predict", "dev.csv", init=row["model"], out="dev.tsv")
    right = np.mean([a == b for a, b in zip(column("dev.tsv", 3), labels)])
    assert right == row["dev"]["acc"] if row["dev"] else protocol == "fewshot" and "dev" not in row["rows"]


@pytest.mark.parametrize("files, sizes, tested_on", [
    (["small.csv"], {"train": 128, "dev": 16, "test": 16}, "test"),
    (["small.csv", "test.csv"], {"train": 144, "dev": 16, "test": 100}, "test; dev is 10% of train"),
    (["small.csv", "dev.csv", "test.csv"], {"train": 160, "dev": 100, "test": 100}, "test")])
def test_one_two_and_three_tables(here, files, sizes, tested_on):
    [row] = done(csv=files, epochs=1)[1]
    assert (row["rows"], row["tested_on"], row["task"]) == (sizes, tested_on, "csv/small")


def test_regression_answers_in_the_units_of_its_targets(here):
    rng, rows = np.random.default_rng(0), []
    for share in rng.integers(11, size=400):
        text = random_dna(20, rng, "GC" * share + "AT" * (10 - share))
        gc = sum(letter in "GC" for letter in text) / 20
        rows.append((text, 1000 * gc + 500, f"{-1e-9 * gc:.3g}"))
    write_table("gc.csv", "sequence up down", rows)
    [row] = done(csv="gc.csv", targets=["up", "down"], protocol="dnabert2", lr=0.01, epochs=9, dropout=0)[1]
    assert min(row["test"][name] for name in ("pcc_up", "pcc_down", "spearman")) > 0.95
    assert not row["collapsed"] and row["metric"] == "pcc"   # however small the units
    use("predict", "gc.csv", init=row["model"], out="p.tsv")
    for n in (1, 2):
        want, got = np.float64(column("gc.csv", n)), np.float64(column("p.tsv", n + 2))
        assert np.mean((want - got) ** 2) < 0.1 * np.var(want) and np.corrcoef(want, got)[0, 1] > 0.95


def check_alone(**flags):
    """The command again: row and model file are those of the run left alone, and nothing else is left."""
    out, rows = done(**SMALL | flags)
    assert [ALONE] == rows and Path(ALONE["model"]).read_bytes() == (HERE / ALONE["model"]).read_bytes()
    folder = Path("out/csv_small", ALONE["id"])
    assert log_rows(folder) == log_rows(HERE / folder) and len(log_rows(folder)) == 2
    assert not [path for name in ("*.tmp", "last.pt", "prev.pt") for path in Path("out").rglob(name)]
    return out


@pytest.mark.fault("kill -9 one after the other: finetune", n=6)
def test_kills(here, survived):
    def amid(save, state, file):
        file.write(b"PK" * 999), file.flush(), die()

    def after(real, *args):
        real(*args), die()
    for module, name, n, fault in (                          # one after the other, of the same run
            ("training", "stop_requested", 5, die), ("torch", "save", 3, amid), ("os", "fsync", 2, die),
            ("training", "stop_requested", 2, die), ("os", "link", 1, after), ("fcntl", "flock", 3, die)):
        assert tune({0: at_call(module, name, n, fault)}, save_every=1e-9, **SMALL).code == -9
        assert results() == []
        survived()
    assert Path(ALONE["model"]).exists()                     # the last kill was before the row
    check_alone()


@pytest.mark.fault("broken last.pt, sound prev.pt: finetune", n=2)
def test_stop_and_broken_checkpoints(here, survived):
    folder = here / "out/csv_small" / ALONE["id"]
    [process] = start(tiny(**SMALL, save_every=1e-9), {0: slow}, script="finetune.py")
    wait_rows(process, folder, 1)                            # the first epoch is evaluated
    os.kill(process.pid, signal.SIGSTOP)
    assert "in use" in refused(tune(**SMALL))                # a second process is kept out
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGCONT)
    result = wait(process)
    assert (result.code, result.err, results()) == (143, "", []) and "stopped" in result.out
    raw = (folder / "last.pt").read_bytes()
    assert 8 <= training.load(folder / "last.pt")["step"] < 16
    shutil.move("out", "kept")
    for broken in (raw, raw[:999], b""):
        shutil.copytree("kept", "out")
        (folder / "last.pt").write_bytes(broken)
        assert ("prev.pt" in check_alone()) == (broken != raw)
        shutil.rmtree("out")
        if broken != raw:
            survived()


@pytest.mark.fault("stop signal between two runs: finetune")
def test_a_stop_between_runs(here):
    flags = dict(csv="small.csv", mode="probe", init=[MODEL, HERE / ALONE["model"]])
    stop = at_call("data", "read_table", 1, lambda read, *args, **kwargs: (
        os.kill(os.getpid(), signal.SIGTERM), read(*args, **kwargs))[1])
    assert tune({0: stop}, **flags).code == 143 and len(results()) == 0 and len(done(**flags)[1]) == 2


@pytest.mark.fault("sweep on two ranks: finetune")
def test_two_ranks_share_the_runs(here):
    flags = SMALL | dict(init=["random", "kmer"], seeds=2, epochs=1)
    rows = done(**flags)[1]
    shutil.rmtree("out")
    result = tune(ranks=2, **flags)
    assert result.codes == [0, 0] and results() == rows and len(rows) == 3
    assert "| kmer |" not in result.out and "| seed 43 |" in result.out          # rank 0: first and third


def test_every_kind_of_start(here):
    shutil.copy(HERE / "bert.pt", here)
    use("export", "hf", init="bert.pt")
    starts = ["bert.pt", "hf:hf", MODEL, "cnn", "kmer"]
    rows = {row["init"]: row for row in done(init=starts, **SMALL)[1]}
    bert, folder, tuned, cnn, kmer = (rows[str(init)] for init in starts)
    assert (bert["stride"], folder["stride"]) == (K, K) and bert["weights"] == folder["weights"]
    assert bert["weights"] != tuned["weights"] and tuned["score"] > 0.8 and kmer["score"] > 0.5
    assert cnn["length"] == 59 and not cnn.keys() & {"bert", "k"}
    shutil.rmtree("out")                                     # the same weights and network, hardly moved:
    flags = SMALL | dict(init=starts[:2], stride=1, lr=1e-30, weight_decay=0)
    one, two = done(**flags)[1]
    assert one["test"] == two["test"] and one["id"] != two["id"]
    want, left = training.load("bert.pt")["model"], training.load(one["model"])["model"]
    left = {name.removeprefix("bert."): p for name, p in left.items() if name.startswith("bert.")}
    torch.testing.assert_close(left, want, rtol=0, atol=1e-25)


@pytest.mark.fault("loss that is not finite: finetune")
@pytest.mark.parametrize("flags", [{}, {"batch_size": 999}, {"batch_size": 999, "epochs": 1,
                                   "protocol": "fewshot"}], ids=["later", "at once", "in the last step"])
@pytest.mark.parametrize("classes", ["ab", "abc"])
def test_a_loss_that_is_not_finite(here, flags, classes):
    write_table("t.csv", "sequence label", zip(column("small.csv"), classes * 99))
    result = tune(csv="t.csv", lr=1e30, seeds=1, **flags)
    assert result.code == 3 and re.fullmatch("error: csv/t: .*not finite.*lower --lr\n", result.err), result
    assert results() == []


def test_collapse_is_reported(here):
    rng = np.random.default_rng(0)
    write_table("t.csv", "sequence label", [(random_dna(20, rng), i % 10 // 9) for i in range(200)])
    out, [row] = done(csv="t.csv", epochs=3, lr=1e-3)
    assert row["collapsed"] and "COLLAPSED" in out
    assert (row["test"]["acc"], row["test"]["f1_binary"], row["score"]) == (0.9, 0, 0)


def test_a_missing_set_does_not_stop_the_others(here):
    assert "train.csv" in refused(tune(task=["tf_m/2", "demo"], data_dir="data", init="kmer"))
    [row] = results()
    assert (row["task"], row["rows"]["test"]) == ("demo", 500) and row["score"] > 0.2    # 5-mers show it


@pytest.mark.skipif(not (SHARED / "data/GUE").exists(), reason="no shared data")
def test_kmer_floors_of_real_sets(here):
    flags = dict(data_dir=SHARED / "data", init="kmer")
    [row] = done(task="tf_m/2", **flags)[1]
    assert row["score"] == pytest.approx(0.733, abs=0.05) and row["rows"] == {"train": 2620, "test": 328}
    few = [row for row in done(task=["silencer"], seeds=3, **flags)[1] if row["shots"]]
    few += [row for row in done(task="prom_core", seeds=2, shots=[50], **flags)[1] if row["shots"] == 50]
    assert [row["rows"]["train"] for row in few] == [20, 20, 20, 100]          # one of prom_core: no draws
    assert len({row["data"] for row in few}) == 4            # three draws of the one, one set of the other
    assert all((row["protocol"], row["metric"]) == ("fewshot", "acc") and row["score"] > 0.53 for row in few)


def test_probe(here):
    flags = dict(csv=SPLITS, init=["random", MODEL], mode="probe")
    rows = done(**flags)[1]
    shutil.rmtree("out")
    assert done(**flags | {"init": flags["init"][::-1]})[1] == rows and not list(here.rglob("*.pt"))
    assert len(rows) == 2 and max(row["score"] for row in rows) > 0.8


def windows_of(text, stride=1):
    """A text in windows of 32 k-mers, each as its k-mers."""
    kmers = [text[i:i + K] for i in range(0, len(text) - K + 1, stride)]
    return [kmers[i:i + BLOCK - 2] for i in range(0, max(len(kmers), 1), BLOCK - 2)]


def test_predict_and_export(here):
    texts, labels = column("test.csv"), column("test.csv", 1)
    use("export", "hf", init=MODEL)
    theirs = AutoModelForSequenceClassification.from_pretrained("hf")
    tokenizer, others = AutoTokenizer.from_pretrained("hf"), {"short": "AC", "n": "N" * 50}
    write_fasta(here / "t.fa", {f"{i} x": text for i, text in enumerate(texts, 1)} | others)
    Path("t.gz").write_bytes(gzip.compress(Path("t.fa").read_bytes()))
    files = {}
    for name, more in (("test.csv", []), ("t.fa", ["short", "n"]), ("t.gz", ["short", "n"])):
        assert f"sequences {100 + len(more)}" in use("predict", name, init=MODEL, out=f"{name}.tsv")
        head, *rows = [line.split("\t") for line in Path(f"{name}.tsv").read_text().splitlines()]
        assert head == "id length n_bases class p_no p_yes".split() and len(rows) == 100 + len(more)
        assert [row[0] for row in rows] == [*map(str, range(1, 101)), *more]
        assert all(row[2:] == ["0", "", "", ""] for row in rows[100:])         # they show the network no base
        files[name] = rows = rows[:100]
        p = np.array([row[4:] for row in rows], float)
        assert np.allclose(p.sum(1), 1) and [row[3] == "yes" for row in rows] == p.argmax(1).tolist()
        assert all(row[1] == row[2] for row in rows)
    assert files["test.csv"] == files["t.fa"] == files["t.gz"]
    assert ROW["test"]["acc"] == np.mean([row[3] == label for row, label in zip(rows, labels)])
    no, yes = ([float(row[5]) for row, label in zip(rows, labels) if label == name] for name in ("no", "yes"))
    over = np.subtract.outer(yes, no)                        # as at the test: pairs in order
    assert ROW["test"]["auroc"] == pytest.approx(np.mean(over > 0) + np.mean(over == 0) / 2, abs=1e-3)
    for text, row in zip(texts[:20], rows):
        inputs = [tokenizer(" ".join(kmers), return_tensors="pt") for kmers in windows_of(text)]
        pooled = torch.stack([theirs.bert(**x).pooler_output for x in inputs]).mean(0)
        want = theirs.classifier(pooled).softmax(-1)[0].detach().numpy()
        assert np.float64(row[4:]) == pytest.approx(want, abs=1e-5)
    Path("t.npz").touch()
    for tool, out in (("predict", "t.fa.tsv"), ("embed", "t.npz")):
        flags = ["t.fa", "--init", MODEL, "--out", out]
        assert "exists" in refused(run(flags, script=f"tools.{tool}"))
    assert np.allclose(finetune.load_model(Path(MODEL)).predict(texts), p, atol=1e-5)


def test_several_labels_a_sequence(here):
    """Two planted motifs, two labels: learnt, predicted with a probability each, exported, read back."""
    motifs, rng = {"gc": MOTIF, "at": "ATATATATATAT"}, np.random.default_rng(1)
    for name, n in (("many", 800), ("some", 100), ("few", 100)):
        rows = []
        for _ in range(n):
            text, has = random_dna(BLOCK, rng), rng.random(2) < 0.4
            for at, motif, planted in zip((2, 20), motifs.values(), has):
                text = text[:at] + motif + text[at + 12:] if planted else text
            rows.append((text, *has.astype(int)))
        write_table(f"{name}.csv", "sequence gc at", rows)
    flags = dict(csv=["many.csv", "some.csv", "few.csv"], multilabel=["gc", "at"], seed=43,
                 **LEARN | {"epochs": 10})                   # other seeds learn one motif only
    out, [row] = done(**flags, class_weights="balanced")
    assert row["metric"] == "auroc" and row["score"] > 0.9 and "auprc_gc" in row["test"]
    assert row["overrides"]["class_weights"] == "balanced" and "gc 3" in out
    out, rows = done(**flags, init="kmer")
    assert rows[1]["score"] > 0.9
    use("predict", "few.csv", init=row["model"], out="few.tsv")
    head, *lines = [line.split("\t") for line in Path("few.tsv").read_text().splitlines()]
    assert head == "id length n_bases p_gc p_at".split()
    p = np.array([line[3:] for line in lines], float)
    assert np.mean((p > 0.5) == np.array([column("few.csv", 1), column("few.csv", 2)]).T.astype(int)) == \
        pytest.approx(row["test"]["acc"])
    use("export", "hf", init=row["model"])
    theirs = AutoModelForSequenceClassification.from_pretrained("hf").eval()
    assert theirs.config.problem_type == "multi_label_classification"
    text = column("few.csv")[0]
    logits = theirs(**AutoTokenizer.from_pretrained("hf")(text, return_tensors="pt")).logits
    for init in (row["model"], "hf:hf"):
        assert np.allclose(finetune.load_model(init).predict([text]), logits.sigmoid().detach(), atol=1e-5)
    for wrong, word in ((dict(targets=["gc"], multilabel=["at"]), "exclude"),
                        (dict(targets=["gc"], class_weights="balanced"), "no classes"),
                        (dict(task="pd/tata", multilabel=["gc"], csv=None), "belongs to --csv")):
        assert word in refused(tune(**{"csv": "few.csv"} | wrong))


def test_a_benchmark_of_ones_own(here):
    """--tasks: each line is a set, with its metric, protocol and kind of labels; files beside the table."""
    (here / "sets").mkdir()
    for name in SPLITS + ["small.csv"]:
        shutil.move(here / name, here / "sets" / name)
    write_table("sets/sizes.csv", "sequence size", [(text, len(text)) for text in column("sets/small.csv")])
    write_table("sets/labels.csv", "sequence a b", [(text, int("AA" in text), int("CC" in text))
                                                    for text in column("sets/small.csv")])
    lines = [f"mine/motif\t{' '.join(SPLITS)}\tauprc\t\t\t", "mine/small\tsmall.csv\tf1_macro\tdnabert2\t\t",
             "sizes\tsizes.csv\tspearman\tstrict\tsize\t", "both\tlabels.csv\tauprc\t\t\ta b"]
    head = "name\tfiles\tmetric\tprotocol\ttargets\tmultilabel\n"
    Path("sets/mine.tsv").write_text(head + "\n".join(lines))
    flags = dict(tasks="sets/mine.tsv", epochs=1, seeds=1, init=["random", "kmer"])
    out, rows = done(**flags)
    got = {(row["task"], row["init"]): (row["metric"], row["protocol"]) for row in rows}
    want = {"mine/motif": ("auprc", "strict"), "mine/small": ("f1_macro", "dnabert2"),
            "sizes": ("spearman", "strict"), "both": ("auprc", "strict")}
    inits = "random 1x16 h2 k3", "kmer"
    assert got == {(task, init): ours for task, ours in want.items() for init in inits}
    assert all(row["score"] == row["test"][row["metric"]] for row in rows)
    assert [row["rows"] for row in rows if row["task"] == "mine/motif" and row["init"] != "kmer"] == [
        {"train": 800, "dev": 100, "test": 100}] and "AUPRC" in out
    assert "done before" in done(**flags)[0] and len(results()) == 8


@pytest.mark.parametrize("line, word", [
    ("emp/H3\tsmall.csv\tmcc\t", "line 2: name 'emp/H3'"), ("a b\tsmall.csv\tmcc\t", "line 2: name 'a b'"),
    ("../a\tsmall.csv\tmcc\t", "line 2: name '../a'"), ("a/.b\tsmall.csv\tmcc\t", "line 2: name 'a/.b'"),
    ("a\t\tmcc\t", "line 2: files ''"), ("a\tsmall.csv" + " small.csv" * 3 + "\tmcc\t", "line 2: files 's"),
    ("a\tsmall.csv\tmcc\t\nb\tsmall.csv none.csv\tmcc\t", "line 3: files 'small.csv none.csv': name one"),
    ("a\tsmall.csv\tauc\t", "line 2: metric 'auc'"),
    ("a\tsmall.csv\tmcc\tmine", "line 2: protocol 'mine'"), ("a\tnone.csv\tmcc\t", "none.csv"),
    ("a\tsmall.csv\tmcc", "3 fields"), ("a\tsmall.csv\tmcc\t\na\tsmall.csv\tmcc\t", "line 3: name 'a'")])
def test_a_wrong_line_of_a_benchmark(here, line, word):
    Path("mine.tsv").write_text(f"name\tfiles\tmetric\tprotocol\n{line}\n")
    assert word in refused(tune(tasks="mine.tsv")) and not Path("out").exists()          # nothing has run


def test_of_a_grid_dev_chooses(here):
    """Two rates, two seeds: four runs; the table holds the one with the better mean on dev, and says so."""
    flags = SMALL | dict(lr=[1e-9, 0.01], epochs=4, seeds=2, init=["random", "kmer"])
    out, rows = done(**flags)
    assert sorted(row["overrides"]["lr"] for row in rows if row["init"] != "kmer") == [1e-9] * 2 + [0.01] * 2
    assert len([row for row in rows if row["init"] == "kmer"]) == 1
    dev = {lr: np.mean([row["dev"]["mcc"] for row in rows if row["overrides"].get("lr") == lr])
           for lr in flags["lr"]}
    [line] = [line for line in out.splitlines() if "**chosen**" in line]
    assert dev[0.01] > dev[1e-9] and "lr 0.01" in line and f"dev MCC {100 * dev[0.01]:.4g}, test" in line
    [row] = [line for line in out.splitlines() if line.startswith("| csv/small")]
    assert len(row.split("|")) == 6                          # task, metric, random, kmer
    assert "no dev rows to choose" in refused(tune(csv="small.csv", lr=[0.1, 0.2], protocol="fewshot"))


def test_both_strands(here):
    """--strands average makes another run, whose model answers the same for both strands of a sequence."""
    flags = dict(csv=SPLITS, **LEARN | {"epochs": 1})
    rows = [done(strands=strands, **flags)[1][-1] for strands in (None, "augment", "average")]
    assert [row["overrides"].get("strands") for row in rows] == [None, "augment", "average"]
    assert len({row["id"] for row in rows}) == 3 and len({row["score"] for row in rows}) > 1
    texts = column("test.csv")[:20]
    other = [data.decode(data.reverse_complement(data.encode(text))) for text in texts]
    write_fasta(here / "t.fa", {str(i): text for i, text in enumerate(texts + other)})
    for name, strands, equal in (("mean.tsv", None, True), ("one.tsv", "forward", False)):
        use("predict", "t.fa", init=rows[2]["model"], out=name, **{"strands": strands} if strands else {})
        p = np.float64(column(name, 4))
        assert np.allclose(p[:20], p[20:], atol=1e-5) == equal
    use("predict", "t.fa", init=rows[1]["model"], out="augment.tsv")
    assert not np.allclose(*np.float64(column("augment.tsv", 4)).reshape(2, 20), atol=1e-5)
    use("export", "hf", init=rows[2]["model"])
    assert "both strands" in Path("hf/README.md").read_text()


def test_windows_of_long_sequences(here):
    texts = {name: random_dna(n, np.random.default_rng(n)) for name, n in zip("abcd", (107, 20, 7, 35))}
    write_fasta(here / "t.fa", texts)
    use("predict", "t.fa", init=MODEL, window=20, step=15, out="t.tsv")
    want = [("a", start) for start in (0, 15, 30, 45, 60, 75, 87)] + [("b", 0), ("c", 0), ("d", 0), ("d", 15)]
    cut = {f"{name}:{at}-{min(at + 20, len(texts[name]))}": texts[name][at:at + 20] for name, at in want}
    assert column("t.tsv") == list(cut)                      # the last is flush with the end
    write_fasta(here / "cut.fa", cut)
    use("predict", "cut.fa", init=MODEL, out="cut.tsv")
    assert Path("t.tsv").read_text() == Path("cut.tsv").read_text()


@pytest.mark.parametrize("stride", [1, K])
def test_embed(here, stride):
    texts = column("test.csv")[:9] + ["ACGNACGTACGTACNNNACG", random_dna(300, np.random.default_rng(0)), "AC"]
    write_fasta(here / "t.fa", {f"s{i}": text for i, text in enumerate(texts)})
    for pool in ("mean", "cls"):
        use("embed", "t.fa", init=MODEL, pool=pool, stride=stride, out=f"{pool}.npz", per_base=True)
    mean, cls, state = np.load("mean.npz"), np.load("cls.npz"), training.load(MODEL)
    bert, words = models.Bert(models.BertConfig(**state["config"]["bert"])).eval(), models.vocabulary(K)
    bert.load_state_dict({name[5:]: p for name, p in state["model"].items() if name.startswith("bert.")})
    ends, close = mean["offsets"], functools.partial(pytest.approx, abs=1e-5, nan_ok=True)
    assert mean["ids"].tolist() == [f"s{i}" for i in range(12)]
    assert ends.tolist() == [0, *np.cumsum([*map(len, texts)])]
    for i, text in enumerate(texts):
        windows = [[2, *(data.UNK if "N" in kmer else words.index(kmer) for kmer in kmers), 3]
                   for kmers in windows_of(text, stride)]
        x = [bert.encode(torch.tensor([window]))[0].detach().numpy() for window in windows]
        hidden = np.concatenate([part[1:-1] for part in x])
        none = np.full(16, np.nan)                           # "AC" has no k-mer
        assert cls["embeddings"][i] == close(np.mean([part[0] for part in x], 0) if len(hidden) else none)
        assert mean["embeddings"][i] == close(hidden.mean(0) if len(hidden) else none)
        for at, base in enumerate(cls["per_base"][ends[i]:ends[i + 1]]):         # mean of its k-mers
            kmers = [hidden[j] for j in range(len(hidden)) if j * stride <= at < j * stride + K]
            assert base == close(np.mean(kmers, 0) if kmers else none)


def test_nothing_is_half_written(here, monkeypatch):
    write_fasta(here / "t.fa", {"a": "ACGT" * 9, "b": "ACGT" * 9, "c": "ACGU"})
    model, seen, before = finetune.load_model(str(MODEL)), [], sorted(os.listdir())
    args = SimpleNamespace(file="t.fa", out="t.out", window=None, step=None, per_base=False, layer=-1,
                           empty=False, excel_safe=False)
    blocks = functools.partial(predict.read_blocks, size=40)
    apply = finetune.apply
    monkeypatch.setattr(finetune, "apply", lambda *args: seen.extend(os.listdir()) or apply(*args))
    for module, function in ((predict, predict.predict), (embed, embed.embed)):
        monkeypatch.setattr(module, "read_blocks", blocks)
        with pytest.raises(ValueError, match="t.fa: line 6"):
            function(model, args)
        assert sorted(os.listdir()) == before              # the first block was done
        assert any(re.fullmatch(r"t.out.\w{8}.tmp", name) for name in seen)
        seen.clear()


def test_the_table_of_a_command(here):
    shutil.copytree(HERE / "out", "out")
    out = done(init=["random", "kmer"], **SMALL)[0]
    head, *rows = [line for line in out.splitlines() if line.startswith("| ")]
    assert "kmer" in head and "random 1x16 h2 k3" in head and "csv/train" not in out and len(rows) == 2
    result = run(["out"], script="tools.table")
    assert result.code == 0 and "csv/train" in result.out == Path("out/table.md").read_text(), result


@pytest.mark.fault("flags: finetune")
@pytest.mark.parametrize("case", cases("ft_flags.json"), ids=lambda case: str(case["args"]))
def test_bad_flags(here, case):
    if "cuda" in case["args"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    names, before = {"here": str(HERE), "tmp": str(here), "model": str(MODEL)}, contents(here)
    flags = case["args"].split() if isinstance(case["args"], str) else case["args"]
    flags = [flag.format(**names) for flag in flags]
    script = f"tools.{case['tool']}" if "tool" in case else "finetune.py"
    if case.get("tool") not in ("export", "table"):
        flags = ["--device", "cpu", "--out", "out", *flags]
    assert case["word"].format(**names) in refused(run(flags, script=script))
    assert contents(here) == before and not Path("out").exists()


@pytest.mark.fault("CSV cases: finetune", n=20)
def test_the_most_likely_mistakes_in_tables(here, survived):
    for case in [case for case in cases("csv.json") if "word" in case and case.get("own", True)][:20]:
        path = here / case.get("file", "t.csv")
        path.write_bytes(expand(case["text"]).encode(case.get("encoding", "latin-1")))
        assert re.search(f"t.csv: .*({case['word']})", refused(tune(csv=path))) and not Path("out").exists()
        survived()


def test_a_terminal_that_lacks_a_letter(here):
    """The letter is shown as an escape; the run goes on."""
    rng = np.random.default_rng(0)
    rows = [f"{random_dna(40, rng)},{label}\n" for label in ("\u00b5-exon", "b") * 30]
    Path("mu.csv").write_text("".join(["sequence,label\n", *rows]), encoding="utf-8")
    result = subprocess.run([sys.executable, ROOT / "finetune.py", "--csv", "mu.csv", "--init", "kmer"],
                            env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert result.returncode == 0 and rb"'\xb5-exon'" in result.stdout, result
