"""finetune.py's windows, batches, scores, protocols against data.tokenize, hand calculations, the papers."""
import collections
import csv
import gzip
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import finetune
import models
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
    return texts, finetune.on_device(data.rows_from(texts), "cpu")


@pytest.mark.parametrize("long", ["chunk", "truncate"])
@pytest.mark.parametrize("k, stride, block_size", [
    (3, 1, 34), (3, 3, 34), (6, 1, 200), (6, 6, 64), (4, 2, 3)])
def test_windows_hold_every_kmer_once(k, stride, block_size, long):
    texts, rows = made_rows([200, 1, 2, 3, 33, 34, 35, 36, 98, 99, 640, 100, 101, 102, 5, 6, 7, 203])
    index = np.random.default_rng(0).permutation(len(texts))
    tokens, mask, owner = bert_head(k, stride, block_size, long).inputs(rows, index)
    owner, found = range(len(texts)) if owner is None else owner.tolist(), [[] for _ in texts]
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


def test_a_model_takes_strings():
    head, texts = bert_head(), ["ACGTACGT", "acgtn", "T" * 80]
    model = finetune.Model("x.pt", head, "cpu")
    rows = finetune.on_device(data.rows_from(texts), "cpu")
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
    head, rows = bert_head(6, 1, 512), finetune.on_device(rows, "cpu")
    tokens = [head.inputs(rows, batch)[0] for batch in batches]
    computed, real = (sum(f(x) for x in tokens) for f in (torch.numel, lambda x: (x > 0).sum().item()))
    assert computed / real <= 1.12 and len({x.shape[1] for x in tokens}) <= 16


def test_scores_equal_hand_calculations():
    two, three, xy = (SimpleNamespace(name="", regression=names == "xy", classes=tuple(names))
                      for names in ("ab", "abc", "xy"))
    labels, logit = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0]), np.array([5, 4, 2, -3, 3, 1, -1, -2, -4, -5])
    got = finetune.scores(np.stack([-logit, logit], 1) / 2, labels, two)         # TP 3, FN 1, FP 2, TN 4
    assert got == pytest.approx({"mcc": 10 / 600 ** 0.5, "acc": 0.7, "f1_macro": (2 / 3 + 8 / 11) / 2,
                                 "balanced_acc": (3 / 4 + 4 / 6) / 2, "f1_binary": 2 / 3, "auroc": 19 / 24})
    labels, guess = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 2, 2])
    assert finetune.scores(np.eye(3)[guess], labels, three) == pytest.approx({
        "mcc": (4 * 6 - 12) / (24 * 22) ** 0.5, "acc": 4 / 6, "f1_macro": (4 / 5 + 1 / 2 + 2 / 3) / 3,
        "balanced_acc": (2 / 3 + 1 / 2 + 1) / 3})
    outputs, labels = np.array([[1., 3], [2, 2], [3, 1]]), np.array([[1., 1], [3, 2], [2, 3]])
    assert finetune.scores(outputs, labels, xy) == pytest.approx({
        "pcc": -0.25, "spearman": -0.25, "mse": 10 / 6, "pcc_x": 0.5, "pcc_y": -1})
    got = finetune.scores(np.full((3, 2), 1.5), labels, xy)  # constant predictions
    assert [got[name] for name in ("pcc", "spearman", "pcc_x")] == [None] * 3 and got["mse"] == 11 / 12
    assert finetune.scores(outputs[:1], labels[:1], xy)["pcc"] is None           # one row
    got = finetune.scores(np.tile([0., 1], (4, 1)), np.array([0, 1, 1, 1]), two)
    assert got == pytest.approx(got | {"mcc": 0, "f1_binary": 6 / 7, "f1_macro": 3 / 7, "auroc": 0.5})
    assert finetune.scores(np.eye(2), np.array([1, 1]), two)["auroc"] is None
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
    for text, row in zip(texts, finetune.kmer_counts(rows._replace(bases=rows.bases.numpy())), strict=True):
        want = collections.Counter(text[i:i + 5] for i in range(len(text) - 4) if "N" not in text[i:i + 5])
        assert {names[i]: row[i] for i in row.nonzero()[0]} == want
