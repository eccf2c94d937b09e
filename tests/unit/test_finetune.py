"""finetune.py's windows, batches, scores, protocols against data.tokenize, hand calculations, the papers."""
import collections
import csv
import gzip
import hashlib
import os
import re
import time
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import finetune
import models
import training
from harness import SHARED, cases, random_dna

BLOCK, K = 34, 3                                             # a window: 32 3-mers, 34 bases
COORDINATES = SHARED / "data/GenomicBenchmarks/coordinates/human_enhancers_ensembl/train/negative.csv.gz"


def bert_head(k=K, stride=1, block_size=BLOCK, long="chunk"):
    config = models.BertConfig(4 ** k + 5, block_size, 1, 2, 16, 32)
    spec = finetune.BertHead.body_spec(config, stride) | {"long": long, "n_out": 2}
    return finetune.build_net(spec, seed=1).eval()


def made_rows(lengths):
    """Sequences with a few N, as texts and as Rows."""
    rng = np.random.default_rng(len(lengths))
    texts = [random_dna(n, rng, "ACGT" * 9 + "N") for n in lengths]
    return texts, data.on_device(data.rows_from(texts), "cpu")


@pytest.mark.parametrize("long", ["chunk", "truncate"])
@pytest.mark.parametrize("k, stride, block_size", [
    (3, 1, 34), (3, 3, 34), (6, 1, 200), (6, 6, 64), (4, 2, 3)])
def test_windows_hold_every_kmer_once(k, stride, block_size, long):
    texts, rows = made_rows([200, 1, 2, 3, 33, 34, 35, 36, 98, 99, 640, 100, 101, 102, 5, 6, 7, 203])
    index = np.random.default_rng(0).permutation(len(texts))
    tokens, mask, n_windows = bert_head(k, stride, block_size, long).inputs(rows, index)
    owner = np.repeat(np.arange(len(index)), 1 if n_windows is None else n_windows)
    found = [[] for _ in texts]
    assert tokens.shape[1] % 64 == 0 or tokens.shape[1] == block_size
    for i, row, n in zip(owner, tokens.tolist(), mask.sum(1).tolist()):
        assert row[0] == data.CLS and row[n - 1] == data.SEP and row[n:] == [data.PAD] * (len(row) - n)
        assert data.PAD not in row[:n] and (n > 2 or len(texts[index[i]]) < k)   # no window is empty
        found[i] += row[1:n - 1]
    n_kept = None if long == "chunk" else block_size - 2
    assert found == [data.tokenize([texts[i]], k, stride)[0, 1:-1].tolist()[:n_kept] for i in index]


def test_windows_of_equal_lengths_need_no_mask():
    texts, rows = made_rows([40] * 5 + [39, 2, 1])
    head = bert_head(6, 1, 512)
    tokens, *others = head.inputs(rows, np.arange(5))
    assert others == [None, None] and torch.equal(tokens, data.tokenize(texts[:5], 6))
    for index, T in (([0, 5], 64), ([6, 7], 32)):            # one is shorter; none has a k-mer
        tokens, mask, _ = head.inputs(rows, np.array(index))
        assert tokens.shape == (2, T) and torch.equal(mask, tokens != data.PAD)


@pytest.mark.parametrize("n_windows", [1, 10, 1000])
def test_apply_gives_each_sequence_its_own_outputs(n_windows):
    lengths = np.random.default_rng(1).integers(1, 200, 40)
    texts, rows = made_rows(lengths)
    net, cnn = bert_head(), finetune.build_net({"kind": "cnn", "length": 90, "n_out": 3}).eval()
    outputs = finetune.apply(net, rows, n_windows)
    for text, got in zip(texts, outputs, strict=True):
        windows = [text[at:at + BLOCK] for at in range(0, max(len(text) - K + 1, 1), BLOCK - 2)]
        with torch.no_grad():
            pooled = [net.pooler(net.bert.encode(data.tokenize([x], K))[:, 0]).tanh() for x in windows]
            torch.testing.assert_close(torch.from_numpy(got), net.out(sum(pooled) / len(pooled))[0])
    for text, got in zip(texts, finetune.apply(cnn, rows, n_windows), strict=True):
        bases = torch.from_numpy(data.encode(text.ljust(90, "N")[:90]))
        torch.testing.assert_close(torch.from_numpy(got), cnn(bases[None])[0].detach())
    parts = finetune.pieces(net, np.arange(40), lengths, n_windows)
    windows = [sum(max(-(-(n - K + 1) // (BLOCK - 2)), 1) for n in lengths[part]) for part in parts]
    assert all(n <= n_windows or len(part) == 1 for n, part in zip(windows, parts))      # a sequence is whole
    assert all(a + b > n_windows for a, b in zip(windows, windows[1:]))          # and no pass is wasted


def test_means_over_windows_are_float32():
    """A GPU adds up in the dtype of what is added: in bfloat16 the mean of many windows would be coarse."""
    _, rows = made_rows([34 * 40] * 3)
    net, seen = bert_head(), []
    net.out.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        net(*net.inputs(rows, np.arange(3)))
    assert seen[0].dtype == torch.float32 and not torch.equal(seen[0], seen[0].bfloat16().float())


def test_a_model_takes_strings():
    head, texts = bert_head(), ["ACGTACGT", "acgtn", "T" * 80]
    model = finetune.Model("x.pt", head, "cpu")
    rows = data.on_device(data.rows_from(texts), "cpu")
    assert np.array_equal(model.embed(texts), finetune.apply(head, rows, 1, head.embed))
    with pytest.raises(ValueError, match="x.pt: not fine-tuned"):
        model.predict(texts)
    outputs = finetune.apply(head, rows, 9)
    shares = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
    for regression, want in ((True, outputs), (False, shares)):
        head.spec |= {"classes": ("a", "b"), "regression": regression}
        assert model.predict(texts) == pytest.approx(want)


def test_batches_of_an_epoch():
    with gzip.open(COORDINATES, "rt") if COORDINATES.exists() else open(os.devnull) as f:
        lengths = np.array([int(row["end"]) - int(row["start"]) for row in csv.DictReader(f)][:16_000])
    lengths = lengths if len(lengths) else np.random.default_rng(0).integers(2, 500, 16_000)
    batches, again, other = (finetune.epoch_batches(lengths, 48, 3, epoch) for epoch in (1, 1, 2))
    for kind in (batches, other):
        assert sorted(np.concatenate(kind)) == list(range(len(lengths)))
        assert {len(batch) for batch in kind} <= {48, len(lengths) % 2400 % 48}  # parts of 50 batches
    assert all(map(np.array_equal, batches, again)) and not np.array_equal(batches[0], other[0])
    longer = np.diff([lengths[batch].mean() for batch in batches]) > 0           # than the one before
    assert 0.4 < longer.mean() < 0.6
    rows = data.rows_of(np.zeros(lengths.sum(), np.uint8), lengths, None, {})
    head, rows = bert_head(6, 1, 512), data.on_device(rows, "cpu")
    tokens = [head.inputs(rows, batch)[0] for batch in batches]
    computed, real = (sum(f(x) for x in tokens) for f in (torch.numel, lambda x: (x > 0).sum().item()))
    assert computed / real <= 1.12 and len({x.shape[1] for x in tokens}) <= 16


def test_scores_equal_hand_calculations():
    two, three, xy = (task_of(*names, regression=names == "xy") for names in ("ab", "abc", "xy"))
    labels, logit = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0]), np.array([5, 4, 2, -3, 3, 1, -1, -2, -4, -5])
    got = finetune.scores(np.stack([-logit, logit], 1) / 2, labels, two)         # TP 3, FN 1, FP 2, TN 4
    assert got == pytest.approx({"mcc": 10 / 600 ** 0.5, "acc": 0.7, "f1_macro": (2 / 3 + 8 / 11) / 2,
                                 "balanced_acc": (3 / 4 + 4 / 6) / 2, "f1_binary": 2 / 3, "auroc": 19 / 24,
                                 "auprc": (1 + 1 + 3 / 4 + 4 / 8) / 4})
    labels, guess = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 2, 2])
    assert finetune.scores(np.eye(3)[guess], labels, three) == pytest.approx({
        "mcc": (4 * 6 - 12) / (24 * 22) ** 0.5, "acc": 4 / 6, "f1_macro": (4 / 5 + 1 / 2 + 2 / 3) / 3,
        "balanced_acc": (2 / 3 + 1 / 2 + 1) / 3, "auprc": (5 / 6 + 5 / 12 + 1 / 2) / 3})
    outputs, labels = np.array([[1., 3], [2, 2], [3, 1]]), np.array([[1., 1], [3, 2], [2, 3]])
    assert finetune.scores(outputs, labels, xy) == pytest.approx({
        "pcc": -0.25, "spearman": -0.25, "mse": 10 / 6, "pcc_x": 0.5, "pcc_y": -1})
    got = finetune.scores(np.full((3, 2), 1.5), labels, xy)  # constant predictions
    assert [got[name] for name in ("pcc", "spearman", "pcc_x")] == [None] * 3 and got["mse"] == 11 / 12
    assert finetune.scores(outputs[:1], labels[:1], xy)["pcc"] is None           # one row
    got = finetune.scores(np.tile([0., 1], (4, 1)), np.array([0, 1, 1, 1]), two)
    assert got == pytest.approx(got | {"mcc": 0, "f1_binary": 6 / 7, "f1_macro": 3 / 7, "auroc": 0.5})
    got = finetune.scores(np.eye(2), np.array([1, 1]), two)  # labels of one class
    assert (got["mcc"], got["auroc"], got["f1_binary"], got["acc"]) == (None, None, 2 / 3, 0.5)
    got = finetune.scores(np.tile([1., 0], (3, 1)), np.zeros(3, int), two)
    assert (got["mcc"], got["f1_binary"], got["f1_macro"], got["balanced_acc"]) == (None, None, 1, 1)
    tasks = {"emp/H3": "mcc", "covid": "f1_macro", "eap": "pcc", "gb/human_ocr_ensembl": "acc"}
    assert {name: finetune.main_metric("randommask", data.TASKS[name]) for name in tasks} == tasks
    assert [finetune.main_metric("martinek", data.TASKS[f"gb/human_{name}"]) for name in (
        "enhancers_cohn", "ensembl_regulatory")] == ["f1_binary", "f1_macro"]


@pytest.mark.parametrize("case", cases("ft_protocols.json"), ids=lambda c: f"{c['protocol']} {c['tasks']}")
def test_protocol_equals_its_spec(case):
    path = SHARED / "spec" / case["file"]
    if not path.exists():
        pytest.skip("no shared specification")
    text = path.read_text()
    stated = re.search(case["pattern"], text[text.index(case["start"]):], re.S).groupdict()
    want = {name: float((value or "0").replace(" %", "e-2")) for name, value in stated.items()} | case["also"]
    for task in data.task_names(case["tasks"].split()):
        args = case["protocol"], task, case.get("shots"), case.get("init", "random")
        got = finetune.get_protocol(*args, {})
        assert {name: got[name] for name in want} == pytest.approx(want), task
        assert finetune.get_protocol(*args, {"lr": 7.0}) == got | {"lr": 7.0}


def test_kmer_counts():
    texts, rows = made_rows([1, 4, 5, 6, 50, 4, 70])
    names = models.vocabulary(5)[5:]
    for text, row in zip(texts, data.kmer_counts(rows._replace(bases=rows.bases.numpy())), strict=True):
        want = collections.Counter(text[i:i + 5] for i in range(len(text) - 4) if "N" not in text[i:i + 5])
        assert {names[i]: row[i] for i in row.nonzero()[0]} == want


def task_of(*classes, regression=True):
    return SimpleNamespace(name="csv/t", regression=regression, classes=classes, multilabel=False)


def some_rows(labels, texts=None):
    rng = np.random.default_rng(0)
    return data.rows_from(texts or [random_dna(20, rng) for _ in labels], labels)


def test_a_test_of_one_class_has_no_mcc_and_is_not_collapsed(capsys):
    ids, seen = np.zeros(4, int), np.array([True, False, False, False])
    for guess, labels, collapsed, said in ((0, ids, False, "mcc undefined, acc 100,"),
                                           (1, ids, False, "mcc undefined, acc 0,"),
                                           (0, [0, 0, 0, 1], True, "mcc 0, acc 75,")):
        parts = {"train": some_rows([0, 1]), "test": some_rows(labels)}
        task = task_of("a", "b", regression=False)
        row = finetune.score_run(np.eye(2)[[guess] * 4], parts, task, "mcc", seen)
        assert row["collapsed"] is collapsed
        finetune.print_scores(row | {"metric": "mcc"})
        out = capsys.readouterr().out
        assert said in out and ("COLLAPSED" in out) == collapsed
        assert f"without rows of train: mcc {'0' if collapsed else 'undefined'}" in out
    parts = {"train": some_rows([[1.], [2.]]), "test": some_rows([[1.]])}
    assert not finetune.score_run(np.ones((1, 1)), parts, task_of("y"), "pcc", ids[:1])["collapsed"]


def test_targets_stay_apart_until_they_are_standardised(capsys):
    labels = [[1e9 + i, i / 7] for i in range(60)]
    parts, task = {"train": some_rows(labels), "dev": None, "test": some_rows(labels[:9])}, task_of("a", "b")
    assert parts["train"].labels.tolist() == labels          # as in the table
    found, mean, sd = finetune.standardised(parts, task)
    x = found["train"].labels
    assert x.dtype == np.float32 and len(np.unique(x[:, 0])) == 60 and found["dev"] is None
    assert x.mean(0) == pytest.approx([0, 0], abs=1e-6) and x.std(0) == pytest.approx([1, 1])
    assert found["test"].labels * sd + mean == pytest.approx(np.array(labels[:9]), rel=1e-15, abs=1e-5)
    net = SimpleNamespace(out=torch.nn.Linear(3, 2))
    weight, bias = net.out.weight.detach().clone(), net.out.bias.detach().clone()
    finetune.to_units(net, mean, sd, task)
    assert re.fullmatch(r"  a: the model file will predict in steps of 64 .*\n", capsys.readouterr().out)
    torch.testing.assert_close(net.out.weight[1], weight[1] * sd[1].item())
    torch.testing.assert_close(net.out.bias[1], bias[1] * sd[1].item() + mean[1].item())
    counts = np.random.default_rng(0).random((60, 4)).astype(np.float32)         # the floor, too
    got = finetune.fit_linear(counts, parts["train"].labels, counts, task)
    small = finetune.fit_linear(counts, parts["train"].labels - [1e9, 0], counts, task)
    assert got - [1e9, 0] == pytest.approx(small, abs=1e-5) and len(np.unique(got[:, 0])) == 60


@pytest.mark.parametrize("labels, dev, what", [
    ([1, 2, 3], [1, 1e30], "a 1e[+]30 in dev: over 1e[+]15 sd"), ([1, 2, 3], [-3e38], "a -3e[+]38 in dev"),
    ([1e38, 3e38], None, "a has mean 2e[+]38 and sd 1e[+]38"), ([0, 1e-39], None, ".* sd 5e-40 .* units")])
def test_targets_that_overflow_are_refused(labels, dev, what):
    parts = {"train": some_rows([[x] for x in labels]), "dev": dev and some_rows([[x] for x in dev])}
    with pytest.raises(ValueError, match=f"^csv/t: {what}"):
        finetune.check_parts(parts, task_of("a"), {})
        finetune.standardised(parts, task_of("a"))


def test_labels_that_teach_nothing_are_refused():
    key = {"numbers": {"select": "score"}, "metric": "mcc"}
    parts = {"train": some_rows([[1., 0.1], [2., 0.1]]), "dev": None}
    with pytest.raises(ValueError, match="csv/t: b is 0.1 in all rows of train"):
        finetune.check_parts(parts, task_of("a", "b"), key)
    parts, task = {"train": some_rows([0, 1]), "dev": some_rows([1, 1])}, task_of("a", "b", regression=False)
    with pytest.raises(ValueError, match="csv/t: all dev rows are of one class"):
        finetune.check_parts(parts, task, key)
    with pytest.raises(ValueError, match="so f1_binary cannot choose the weights"):
        finetune.check_parts(parts, task, key | {"metric": "f1_binary"})
    finetune.check_parts(parts, task, key | {"numbers": {"select": "loss"}})
    finetune.check_parts(parts | {"dev": None}, task, {"numbers": {}, "metric": "mcc"})


def test_targets_are_described(capsys):
    data.describe_targets(np.array([[0., 1, 5], [1, 1, 6], [1, 1, 7.5]]), ["a", "b", "c"])
    first, second = capsys.readouterr().out.splitlines()
    assert first == "  different values: a 2, b 1, c 3"
    assert second.startswith("  a, b: only 0 and 1, ") and "regression" in second and "label" in second
    data.describe_targets(np.array([[0.], [0.5]]), ["a"])
    assert capsys.readouterr().out == "  different values: a 2\n"


def test_fingerprints_of_targets():
    def digest(*splits):
        parts = [array for rows in splits for array in rows[:3]]
        return hashlib.sha256(b"".join(array.tobytes() for array in parts)).hexdigest()[:12]
    ids, plain, fine = some_rows([0, 1, 1]), some_rows([[0.1], [7], [8]]), some_rows([[1e9], [1e9 + 1], [0]])
    rounded = [rows._replace(labels=rows.labels.astype(np.float32)) for rows in (plain, fine)]
    assert data.fingerprint({"train": ids, "dev": None, "test": ids}) == digest(ids, ids)
    assert data.fingerprint({"train": plain}) == digest(rounded[0])          # as before float64
    near = [some_rows([[1e9 + i], [1e9 + 1], [1e9 + 9]]) for i in (0, 2)]        # alike in float32
    assert len({data.fingerprint({"train": rows}) for rows in near}) == 2


def test_both_strands_are_one_sequence():
    texts = [random_dna(30, np.random.default_rng(i)) for i in range(40)]
    other = [data.decode(data.reverse_complement(data.encode(text))) for text in texts]
    rows = data.rows_from(texts + other, [0, 1] * 20 + [0, 1] * 19 + [1, 0])
    assert rows.notes["reverse_complements"] == 40 and rows.notes["conflicting_labels"] == 2
    splits = {"train": rows, "dev": None, "test": data.rows_from(other[:3] + ["ACGT"], [0, 1, 0, 1])}
    assert data.rows_in(splits["test"], rows).tolist() == [True] * 3 + [False]
    parts, _ = finetune.assign(splits, {"val": 0.25, "select": "score"}, 1)
    assert [len(parts[split].labels) for split in ("train", "dev")] == [60, 20]
    assert not data.rows_in(parts["dev"], parts["train"]).any()
    counts = finetune.count_rows(parts | {"dev": None}, None, data.rows_in(parts["test"], rows))
    assert counts["train_reverse_complements"] == 30 and counts["test_in_train"] == 3


@pytest.mark.parametrize("init, name", [
    ("out/rm/last.pt", "rm"), ("./last.pt", "model"), ("/last.pt", "model"), ("a/ /last.pt", "model"),
    ("x/.pt", "model"), ("hf:models/dnabert 6/", "dnabert"), ("random:out/cnn.pt", "random_cnn")])
def test_the_file_of_a_model_has_a_name(init, name):
    assert finetune.model_path({"init": init}, "csv_t/id") == f"csv_t/{name}.pt"


def test_two_runs_of_one_name_that_end_at_once(tmp_path, monkeypatch):
    """Each decides on its file before the other one has written; the lock keeps them apart."""
    decide = finetune.model_path
    monkeypatch.setattr(finetune, "model_path", lambda *args: (decide(*args), time.sleep(0.2))[0])
    monkeypatch.setattr(finetune.training, "save", lambda state, out: torch.save(
        {"format": 1} | state, os.path.join(out, "last.pt")))            # as it is, but for the fsync
    args, task, net = SimpleNamespace(out=tmp_path), task_of("a", regression=True), bert_head()

    def save(i):
        run = {"method": "finetune", "config": {}, "data": "", "args": {"init": f"e{i}/rm/last.pt"}}
        return finetune.save_model(net, task, run, 1, tmp_path / "csv_t" / f"id{i}", args)
    with ThreadPool(3) as pool:
        paths = pool.map(save, range(3))
    assert [training.load(path)["id"] for path in paths] == ["id0", "id1", "id2"] and len(set(paths)) == 3
    assert sum(os.path.basename(path) == "rm.pt" for path in paths) == 1
    assert save(0) == paths[0]                               # again, after a kill before the row


NAN = float("nan")
SIZES, RATES = (0, -1, 1.5, "2", True, None, [2], NAN), (NAN, -0.1, 1, 2.0, "0.1", None, [])
NAMES, WORDS = ([1, 2], ["a"], ["a", None], ["a", ""], [["a"], "b"], [NAN, "b"], 5), ("x", 5, None, NAN, [])
WRONG = {"bert": {**dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "vocab_size"), SIZES),
                  "dropout": RATES},
         "mixer": {**dict.fromkeys(("length", "n_layer", "track_size", "hidden"), SIZES), "dropout": RATES},
         "of bert": {**dict.fromkeys(("n_out", "k", "kind"), SIZES), "classes": NAMES, "regression": (0, "x"),
                     "stride": (0, 4, -1, 1.0, "1", [1], NAN), "long": WORDS, "dtype": WORDS},
         "of mixer": {"classes": NAMES, "pool": WORDS, "head": WORDS, "n_cls": (-1, "1", 1.5, None, NAN),
                      "n_blocks": (0, -1, 1.5, "2", NAN, [1])}}
WRONG = [(part, name, value) for part in WRONG for name, values in WRONG[part].items() for value in values]


@pytest.mark.fault("checkpoints with a wrong value: finetune", n=len(WRONG))
def test_a_wrong_value_in_a_checkpoint_is_one_line(monkeypatch, survived):
    head = dict(classes=["a", "b"], n_out=2, regression=False, long="chunk", dtype="float32", pool="mean")
    mixer = dict(length=26, n_layer=1, track_size=4, hidden=8, dropout=0.0)
    bert = finetune.BertHead.body_spec(models.BertConfig(69, 34, 1, 2, 16, 32))
    sound = {"bert": bert | head, "mixer": head | {
        "kind": "mixer", "mixer": mixer, "n_cls": 0, "head": "linear", "n_blocks": None}}
    weights = {kind: finetune.build_net(spec).state_dict() for kind, spec in sound.items()}

    def read(kind, spec):
        monkeypatch.setattr(training, "load", lambda path: {
            "config": spec, "model": weights[kind], "method": "finetune", "args": {}})
        return finetune.read_checkpoint("x.pt")
    for kind in sound:
        assert read(kind, sound[kind]) == (sound[kind], weights[kind])
    for part, name, value in WRONG:
        kind = part.split()[-1]
        change = {name: value} if "of" in part else {part: sound[kind][part] | {name: value}}
        with pytest.raises(ValueError, match="^--init x.pt: not a model of these scripts"):
            print(part, name, value, read(kind, sound[kind] | change)[0])
        survived()


def test_model_takes_a_list_of_strings():
    model = finetune.Model("m.pt", bert_head(), "cpu")
    assert model.embed(["ACGTACGT"]).shape == model.embed(s for s in ["ACGTACGT"]).shape
    for sequences in ("ACGT", b"ACGT", [], [b"ACGT"], {"a": "ACGT"}, [None]):
        with pytest.raises(ValueError, match="give a list of one string or more"):
            model.embed(sequences)


def test_a_lost_model_of_a_run_done_before_is_named(tmp_path):
    """It is looked for in --out, as that folder may have moved since."""
    path, row = tmp_path / "csv_t/cnn.pt", {"model": "old/o/csv_t/cnn.pt"}
    assert "its model old/o/csv_t/cnn.pt is gone; remove its row from" in finetune.done_before(row, tmp_path)
    path.parent.mkdir()
    path.touch()
    for each in (row, {"model": None}, {}):
        assert finetune.done_before(each, tmp_path) == f"done before, see {tmp_path}/results.jsonl"
