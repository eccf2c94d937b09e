"""Rules that a score rests on: nothing of test reaches training, each seed counts, nothing is lost unsaid.

The right values come from literal programs, from scikit-learn on the training rows, and, for what a power cut
would leave, from a record of what was written, synced and renamed in which order.
"""
import collections
import functools
import itertools
import json
import math
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import random_dna, results_row, run
from sklearn import linear_model, metrics
from sklearn.model_selection import train_test_split
from torch._dynamo.utils import counters

import data
import finetune
import training

K, BLOCK = 3, 34                                             # one window: 32 3-mers, 34 bases
BERT = dict(vocab_size=69, block_size=BLOCK, n_layer=1, n_head=2, n_embd=16, n_inner=32, dropout=0.0)
SPEC = {"kind": "bert", "bert": BERT, "k": K, "stride": 1, "long": "chunk", "n_out": 2}
STAY = dict(lr=1e-30, weight_decay=0.0, batch_size=99, warmup=0)               # the weights stay as they are
CLASSES = SimpleNamespace(name="t", classes=("no", "yes"), regression=False, multilabel=False)
TARGETS = SimpleNamespace(name="t", classes=("x", "y"), regression=True, multilabel=False)
ARGS = SimpleNamespace(micro_batch_size=9, strands=None, class_weights=None)
FLAGS = dict(k=K, block_size=BLOCK, n_layer=1, n_head=2, n_embd=16, device="cpu", out="out", seeds=1,
             epochs=1)


def texts_of(n, seed, shortest=20, longest=60):
    rng = np.random.default_rng(seed)
    return [random_dna(m, rng) for m in rng.integers(shortest, longest, n)]


def tuned(parts, task, seed=7, spec={}, compiled=False, **numbers):
    """Fine-tunes in out/ by the strict protocol with these numbers: outputs on test, rows of the log."""
    net = finetune.build_net(SPEC | {"n_out": len(task.classes), "regression": task.regression} | spec)
    p = finetune.PROTOCOLS["strict"][0] | STAY | dict(epochs=1, select="loss") | numbers
    key = {"task": "t", "seed": seed, "numbers": p, "metric": "pcc" if task.regression else "mcc"}
    args = SimpleNamespace(micro_batch_size=5, save_every=99, compile=compiled, seed=seed + 1, out="out",
                           class_weights=None)
    made = {"method": "finetune", "config": net.spec, "data": "", "args": key}
    outputs, _ = finetune.tuned_outputs(net, parts, task, made, "out", args)
    return outputs, [json.loads(line) | {"time": 0} for line in open("out/log.jsonl")], net


# compiled, a network is the same

def test_compiled_fine_tuning(out, monkeypatch):
    """Two sets of one length each and one of mixed lengths: same scores, no graph break, 2 x 2 graphs."""
    tables = [{split: data.rows_from(texts_of(n, n, *lengths), [i % 2 for i in range(n)])
               for split, n in (("train", 9), ("dev", 5), ("test", 7))}
              for lengths in ((20, 21), (25, 26), (20, 34))]
    learns = dict(lr=3e-3, batch_size=5, epochs=2)
    plain = [tuned(parts, CLASSES, **learns)[:2] for parts in tables]
    compiling = functools.partialmethod(torch.nn.Module.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch.nn.Module, "compile", compiling)
    monkeypatch.setattr(training, "can_compile", lambda device: True)          # its trial is a graph, too
    torch._dynamo.reset()
    counters.clear()
    for parts, (outputs, rows) in zip(tables, plain):
        again, rows_again, _ = tuned(parts, CLASSES, compiled=True, **learns)
        assert again == pytest.approx(outputs, rel=1e-5) and rows_again[-1] == pytest.approx(rows[-1])
    assert counters["stats"]["unique_graphs"] == 4           # trained or evaluated, with a mask or without


# nothing of test (or dev) reaches what is fitted

def test_targets_are_standardised_by_train_alone(out):
    """The network stays as it is, so that its answer in the table's units is raw * sd + mean, of train."""
    rng, parts = np.random.default_rng(0), {}
    for split, n, scale in (("train", 12, 1), ("dev", 7, 50), ("test", 9, 1000)):
        targets = scale * (rng.normal(size=(n, 2)) * [3, 0.1] + [40, -2])
        parts[split] = data.rows_from(texts_of(n, n), targets.tolist())
    net = finetune.build_net(SPEC | {"regression": True}).eval()
    raw = {split: finetune.apply(net, data.on_device(rows, "cpu"), 99) for split, rows in parts.items()}
    mean, sd = parts["train"].labels.mean(0), parts["train"].labels.std(0)
    outputs, [row], _ = tuned(parts, TARGETS)
    assert outputs == pytest.approx(raw["test"] * sd + mean, rel=1e-4)
    for split, name in (("train", "loss"), ("dev", "dev_loss")):
        loss = np.mean((raw[split] - (parts[split].labels - mean) / sd) ** 2)
        assert row[name] == pytest.approx(loss, rel=1e-4)


def kmer_table(texts):
    """Counts of each 5-mer of these texts, by a slow program: (n, 1024)."""
    names = ["".join(letters) for letters in itertools.product("ACGT", repeat=5)]
    counts = [collections.Counter(text[i:i + 5] for i in range(len(text) - 4)) for text in texts]
    return np.array([[count[name] for name in names] for count in counts], float)


def literal_probe(train, labels, test, regression=False):
    """A linear model on features standardised by the mean and sd of train; a constant one is only shifted."""
    mean, sd = train.mean(0), train.std(0)
    sd = np.where(sd > 0, sd, 1)
    train, test = (train - mean) / sd, (test - mean) / sd
    if regression:
        return linear_model.RidgeCV(np.logspace(-1, 5, 7)).fit(train, labels).predict(test)
    logit = linear_model.LogisticRegression(C=0.01, max_iter=1000).fit(train, labels).decision_function(test)
    return np.stack([-logit, logit], 1) / 2


@pytest.mark.parametrize("regression", [False, True], ids=["classes", "targets"])
def test_features_are_standardised_by_train_alone(regression):
    """Sequences of test are longer: standardised with them, all features and outputs would be others.

    scikit-learn's own solver stops within a thousandth of the optimum.
    """
    texts = {"train": texts_of(60, 0), "test": texts_of(20, 1, 200, 400)}
    labels = {split: [[text.count("A") / 9, i / 7] if regression else i % 2 for i, text in enumerate(of)]
              for split, of in texts.items()}
    parts = {split: data.rows_from(of, labels[split]) for split, of in texts.items()}
    task = TARGETS if regression else CLASSES
    want = literal_probe(kmer_table(texts["train"]), labels["train"], kmer_table(texts["test"]), regression)
    assert finetune.linear_outputs(None, parts, task, ARGS, "cpu") == pytest.approx(want, rel=0.01, abs=2e-3)
    net = finetune.build_net(SPEC | {"pool": "mean"}).eval()                   # the probe
    train, test = (finetune.apply(net, data.on_device(parts[split], "cpu"), 9, net.embed).astype(float)
                   for split in ("train", "test"))
    want = literal_probe(train, labels["train"], test, regression)
    assert finetune.linear_outputs(net, parts, task, ARGS, "cpu") == pytest.approx(want, rel=0.01, abs=2e-3)


# what is seen, cut or repeated is counted

def write_csv(name, texts, labels):
    with open(name, "w") as f:
        f.write("\n".join(["sequence,label", *(f"{text},{label}" for text, label in zip(texts, labels))]))


def tune(files, *flags, **more):
    """Runs finetune.py on these tables; rows of results by --init."""
    args = [str(x) for name, value in (FLAGS | more).items() for x in (f"--{name}", value)]
    result = run(["--csv", *files, *args, *flags], script="finetune.py")
    assert result.code == 0, result
    return {row["init"].split()[0]: row for row in map(json.loads, open("out/results.jsonl"))}


def test_rows_that_train_has_seen(out):
    """7 of 30 test rows are in train, one of them twice: counted, and left out of test_unseen."""
    texts, test = texts_of(60, 0), texts_of(23, 1)
    labels, tested_as = [i % 2 for i in range(60)], [i // 2 % 2 for i in range(30)]
    test[3:3], test[20:20] = [texts[5].lower(), texts[9], texts[9]], texts[20:24]
    write_csv("train.csv", texts, labels)
    write_csv("test.csv", test, tested_as)
    row, test = tune(["train.csv", "test.csv"], "--init", "kmer")["kmer"], [text.upper() for text in test]
    predicted = literal_probe(kmer_table(texts), labels, kmer_table(test)).argmax(1)
    unseen = [i for i, text in enumerate(test) if text not in texts]
    assert len(unseen) == 23 and row["counts"]["test_in_train"] == 7
    for name, index in (("test", range(30)), ("test_unseen", unseen)):
        a, b = predicted[[*index]], np.array(tested_as)[[*index]]
        want = {"mcc": metrics.matthews_corrcoef(b, a), "acc": np.mean(a == b),
                "f1_macro": metrics.f1_score(b, a, average="macro")}
        assert row[name] == pytest.approx(row[name] | want)
    assert row["score"] == row["test"]["mcc"] != row["test_unseen"]["mcc"]


@pytest.mark.parametrize("long, name", [("chunk", "in_windows"), ("truncate", "truncated")])
def test_what_is_cut_is_counted(out, long, name):
    """In train, dev and test alike: BERT counts more than 102 bases, a CNN more than the longest of train."""
    lengths = {"train": [102] * 6 + [103, 104], "dev": [102, 104, 250], "test": [101, 102, 103, 105]}
    rng, splits = np.random.default_rng(0), [f"{split}.csv" for split in lengths]
    for path, of in zip(splits, lengths.values()):
        write_csv(path, [random_dna(n, rng) for n in of], [i % 2 for i in range(len(of))])
    rows = tune(splits, "--init", "random", "cnn", "penguinn", long=long, block_size=102)
    assert rows["random"]["counts"] == {name: 2 + 2 + 2}
    assert rows["cnn"]["counts"] == rows["penguinn"]["counts"] == {"truncated": 1 + 1}
    some = np.arange(150)
    for stride in (1, K):                                    # what makes more than 32 tokens
        head = finetune.build_net(SPEC | {"stride": stride, "long": long})
        n = sum(len(range(0, length - K + 1, stride)) > BLOCK - 2 for length in some)
        assert head.count(some) == {name: n, "shorter_than_k": sum(some < K)}
    encoder = {"length": 30, "n_layer": 1, "n_head": 2, "n_embd": 8, "dropout": 0.0}
    spec = {"kind": "mixer", "mixer": encoder, "n_cls": 4, "n_out": 2, "pool": "cls", "long": long}
    assert finetune.build_net(spec).count(np.arange(150)) == {name: 150 - 27}    # 30 positions, 4 of [CLS]


# each seed counts

def test_dropout_is_another_at_each_step(out):
    """One batch, the same weights: the losses differ by the dropout alone, that of (seed, step)."""
    parts = {"train": data.rows_from(texts_of(12, 0, 30, 34), [0, 1] * 6), "dev": None,
             "test": data.rows_from(texts_of(4, 1), [0, 1] * 2)}
    rows, found = data.on_device(parts["train"], "cpu"), {}
    for seed in (7, 8):
        _, log, net = tuned(parts, CLASSES, seed, {"bert": BERT | {"dropout": 0.4}}, epochs=4, select="last")
        for row in log:
            training.seed(seed, row["step"])
            net.train()
            total, [index] = 0, finetune.epoch_batches(np.diff(rows.offsets), 99, seed, row["step"] - 1)
            for piece in np.split(index, [5, 10]):
                log_p = net(*net.inputs(rows, piece)).log_softmax(1)
                total -= sum(log_p[i, parts["train"].labels[at]].item() for i, at in enumerate(piece))
            assert row["loss"] == pytest.approx(total / 12, rel=1e-5)
            found[seed, row["step"]] = row["loss"]
        os.rename("out", f"out_{seed}")
    assert len(found) == len({round(loss, 6) for loss in found.values()}) == 8


def keys_of(rows):
    return sorted(data.decode(np.frombuffer(key, np.uint8)) for key in data.row_keys(rows, strands=False))


def sk_split(index, labels, share, seed):
    return train_test_split(index, train_size=share, stratify=[labels[i] for i in index], random_state=seed)


@pytest.mark.parametrize("seed", [42, 5])
def test_splits_are_those_of_the_seed(out, seed):
    """As scikit-learn splits by this seed: one table in three; dev from train; a probe's share of train."""
    texts, labels = texts_of(100, 0), [int(i % 5 == 0) for i in range(100)]
    write_csv("t.csv", texts, labels)
    args = SimpleNamespace(csv=["t.csv"], targets=None, multilabel=None, split=(0.7, 0.2, 0.1), split_by=None,
                           seed=seed)
    _, splits = finetune.read_user_csv(args)
    train, rest = sk_split(range(100), labels, 0.7, seed)
    dev, test = sk_split(rest, labels, 0.2 / (0.2 + 0.1), seed)
    for split, want in (("train", train), ("dev", dev), ("test", test)):
        assert keys_of(splits[split]) == sorted(texts[i] for i in want)
    rows = {"train": data.rows_from(texts, labels), "dev": None, "test": splits["test"]}
    train, dev = sk_split(range(100), labels, 0.9, seed)
    tuning, probing = ({split: of and keys_of(of) for split, of in finetune.assign(rows, p, seed)[0].items()}
                       for p in (dict(val=0.1, select="score"), dict(val=0.1)))
    assert tuning["train"] == probing["train"] == sorted(texts[i] for i in train)
    assert tuning["dev"] == sorted(texts[i] for i in dev) and probing["dev"] is None


# what a power cut would leave

@pytest.fixture
def disk(monkeypatch):
    """What is on the disk for certain: disk.files {inode: bytes at its last fsync}, disk.names {folder: names
    at its last fsync}. disk.check() is called after each fsync, link, rename and unlink."""
    disk = SimpleNamespace(files={}, names={}, check=lambda: None, order=[])

    def recorded(name):
        real = getattr(os, name)

        def call(*args, **kwargs):
            result = real(*args, **kwargs)
            if name in ("fsync", "fdatasync"):
                path = os.readlink(f"/proc/self/fd/{args[0]}")
                if os.path.isdir(path):
                    disk.names[os.path.realpath(path)] = sorted(os.listdir(path))
                elif os.path.isfile(path):
                    with open(path, "rb") as f:
                        disk.files[os.fstat(args[0]).st_ino] = f.read()
            disk.order.append((name, *map(str, args)))
            disk.check()
            return result
        monkeypatch.setattr(os, name, call)
    for name in ("fsync", "fdatasync", "replace", "rename", "link", "unlink"):
        recorded(name)
    return disk


def is_certain(disk, path):
    with open(path, "rb") as f:
        return disk.files.get(os.stat(path).st_ino) == f.read()


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="no /proc")


@needs_proc
@pytest.mark.parametrize("links", [True, False], ids=["links", "no hard links"])
def test_a_power_cut_leaves_a_checkpoint(out, disk, monkeypatch, links):
    """At any moment last.pt is whole on the disk, once there is one; after a save, so is its name."""
    out.mkdir()
    state = dict(method="m", model={"w": torch.zeros(9999)}, optimizer={}, config={}, args={}, data="")
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: exec("raise OSError(1, 'no links')"))

    def check():
        assert not (out / "last.pt").exists() or is_certain(disk, out / "last.pt")
        assert not links or not (out / "prev.pt").exists() or is_certain(disk, out / "prev.pt")
    disk.check = check
    for step in (1, 2, 3):
        state["model"]["w"] += 1
        training.save(state | {"step": step}, out, "step_2.pt" if step == 2 else None)
        for path in [out / name for name in os.listdir(out)] if links else [out / "last.pt"]:
            assert is_certain(disk, path)
        assert disk.names[os.path.realpath(out)] == sorted(os.listdir(out))
    assert sorted(os.listdir(out)) == ["last.pt", "prev.pt", "step_2.pt"]
    assert [training.load(out / name)["step"] for name in ("last.pt", "prev.pt", "step_2.pt")] == [3, 2, 2]


@needs_proc
def test_a_power_cut_leaves_the_row_of_results(out, disk):
    """A row is on the disk before append_row returns, hence before the run's checkpoints are removed."""
    for n in range(3):
        finetune.append_row(str(out), results_row(id=str(n)))
        assert is_certain(disk, out / "results.jsonl")
        assert [row["id"] for row in finetune.read_rows(str(out))] == [str(i) for i in range(n + 1)]


@needs_proc
def test_a_checkpoint_goes_after_its_row_is_certain(out, disk, monkeypatch):
    """The last checkpoint of a fine-tuning is on the disk until its row and its model are."""
    write_csv("t.csv", texts_of(40, 0), [0, 1] * 20)
    args = ["--csv", "t.csv", "--init", "random", "--save_every", 1e-9]
    args += [x for name, value in FLAGS.items() for x in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, args)])
    monkeypatch.setattr(training, "open_run", lambda folder, *_: os.makedirs(folder, exist_ok=True))
    args, removed = finetune.parse_args()[0], []
    args.dtype, args.own = "float32", {}

    def check():
        if disk.order[-1][0] == "unlink" and disk.order[-1][1].endswith("/last.pt"):
            removed.append(disk.order[-1][1])
            assert is_certain(disk, out / "results.jsonl") and is_certain(disk, out / "csv_t/random.pt")
    disk.check = check
    plans, starts = list(finetune.plan_runs(args)), {"random": finetune.read_start("random", args)}
    code, [identity] = finetune.run_all(plans, starts, args, torch.device("cpu"))
    assert code == 0 and [path.split("/")[-2] for path in removed] == [identity]
    assert math.isfinite(finetune.read_rows("out")[0]["score"])


def test_class_weights_reach_training_and_linear_models(out, monkeypatch):
    """10 of 60 rows are of class 1: they weigh 60 / (2 x 10), the others 60 / (2 x 50)."""
    texts, labels = {"train": texts_of(60, 0), "test": texts_of(9, 1)}, [int(i % 6 == 0) for i in range(60)]
    parts = {split: data.rows_from(of, labels[:len(of)]) for split, of in texts.items()} | {"dev": None}
    args, tune = SimpleNamespace(**vars(ARGS) | {"class_weights": "balanced"}), finetune.fine_tune
    monkeypatch.setattr(finetune, "fine_tune", lambda *given: tune(*given[:-1], SimpleNamespace(
        **vars(given[-1]) | {"class_weights": "balanced"})))
    net = finetune.build_net(SPEC).eval()                    # the weights that `tuned` leaves as they are
    outputs = finetune.apply(net, data.on_device(parts["train"], "cpu"), 99).astype(float)
    losses = np.log(np.exp(outputs).sum(1)) - outputs[range(60), labels]
    _, [row], _ = tuned(parts, CLASSES, select="last")
    assert row["loss"] == pytest.approx(np.mean(losses * np.where(labels, 3, 0.6)), rel=1e-4)
    assert row["loss"] != pytest.approx(losses.mean(), rel=1e-3)
    x, test = (kmer_table(of) for of in texts.values())
    mean, sd = x.mean(0), np.where(x.std(0) > 0, x.std(0), 1)
    model = linear_model.LogisticRegression(C=0.01, max_iter=1000, class_weight={0: 0.6, 1: 3})
    want = model.fit((x - mean) / sd, labels).decision_function((test - mean) / sd)
    no, yes = finetune.linear_outputs(None, parts, CLASSES, args, "cpu").T
    assert yes - no == pytest.approx(want, rel=0.01, abs=4e-3)


def test_steps_and_evaluations_of_a_protocol(out):
    """As in DNABERT-2's script: max_steps replaces the epochs (here of 3 steps), evaluated every 2 steps."""
    parts = {split: data.rows_from(texts_of(n, n), [i % 2 for i in range(n)])
             for split, n in (("train", 9), ("dev", 6), ("test", 4))}
    _, log, _ = tuned(parts, CLASSES, batch_size=4, epochs=9, max_steps=7, eval_every=2)
    assert [row["step"] for row in log] == [2, 4, 6, 7]
    assert finetune.get_protocol("dnabert2", "tf_m/0", None, "", {"epochs": 2})["max_steps"] == 0
    assert finetune.get_protocol("dnabert2", "tf_m/0", None, "", {})["max_steps"] == 1000
    assert not finetune.get_protocol("dnabert2", "tf_m/mine", None, "", {})["max_steps"]     # of --tasks


def test_of_equal_scores_the_first_is_kept():
    """As the trainer of transformers does; an undefined score never replaces one."""
    key, net = {"numbers": {"select": "score"}, "metric": "mcc"}, torch.nn.Linear(1, 1)
    best = {"value": -math.inf, "step": 0, "worse": 0, "weights": {}, "scores": {}}
    for step, mcc in enumerate((None, 0.5, 0.5, 0.25, None), 1):
        finetune.keep_best(best, net, step, {"loss": 1.0, "mcc": mcc}, key)
    assert (best["step"], best["worse"], best["value"]) == (2, 3, 0.5)
