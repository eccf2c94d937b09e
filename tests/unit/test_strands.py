"""--strands of fine-tuning: both strands in training, their mean in the outputs, by plain loops."""
from types import SimpleNamespace

import numpy as np
import pytest
from harness import random_dna
from test_finetune_rules import CLASSES, SPEC, kmer_table, texts_of, tuned

import data
import finetune
from tools import embed

MIXER = {"kind": "mixer", "mixer": dict(length=40, n_layer=1, track_size=4, hidden=8, dropout=0.0),
         "n_cls": 2, "n_out": 2, "long": "chunk"}
NETS = {"bert": SPEC, "non-overlapping": SPEC | {"stride": 3}, "mixer": MIXER,
        "cnn": {"kind": "cnn", "length": 64, "n_out": 2, "binary": False}}
TEXTS = texts_of(9, 3)


def flipped(texts):
    return [text[::-1].translate(str.maketrans("ACGT", "TGCA")) for text in texts]


OTHER = flipped(TEXTS)


def rows_of(texts, labels=None):
    return data.rows_from(texts, labels)


def decoded(rows):
    bases = np.asarray(rows.bases)
    return [data.decode(bases[start:end]) for start, end in zip(rows.offsets, rows.offsets[1:])]


def steep(kind):
    """A network whose outputs differ between sequences."""
    net = finetune.build_net(NETS[kind]).eval()
    for p in net.parameters():
        p.data.mul_(4)
    return net


def test_both_strands():
    both = data.both_strands(rows_of(TEXTS, list(range(9))))
    assert decoded(both) == TEXTS + OTHER[::-1]
    assert both.labels.tolist() == [*range(9), *range(8, -1, -1)]
    on_device = data.both_strands(data.on_device(rows_of(TEXTS), "cpu"))
    assert on_device.bases.tolist() == both.bases.tolist() and on_device.labels is None


@pytest.mark.parametrize("kind", NETS)
def test_average_is_the_mean_over_both_strands(kind):
    net = steep(kind)
    functions = [None, net.embed] if net.BODY else [None]
    for function in functions:
        one, two = (finetune.apply(net, data.on_device(rows_of(texts), "cpu"), 4, function)
                    for texts in (TEXTS, OTHER))
        assert abs(one - two).max() > 1e-3
        net.spec["strands"] = "average"
        for texts in (TEXTS, OTHER):                         # the same for a sequence and its other strand
            got = finetune.apply(net, data.on_device(rows_of(texts), "cpu"), 4, function)
            np.testing.assert_allclose(got, (one + two) / 2, rtol=1e-4, atol=1e-5)
        net.spec["strands"] = "forward"


@pytest.mark.parametrize("kind", ["bert", "mixer"])
def test_per_base_average(kind):
    """The vector of a base is the mean of its own and of that of its partner on the other strand."""
    net = steep(kind)
    one, two = (embed.per_base(net, data.on_device(rows_of([text]), "cpu"), 4)
                for text in (TEXTS[0], OTHER[0]))
    net.spec["strands"] = "average"
    got = embed.per_base(net, data.on_device(rows_of(TEXTS), "cpu"), 4)[:len(TEXTS[0])]
    np.testing.assert_allclose(got, (one + two[::-1]) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "mixer"])
def test_per_base_follows_dtype(kind):
    net, rows = steep(kind), data.on_device(rows_of(TEXTS), "cpu")
    exact = embed.per_base(net, rows, 4)
    net.spec["dtype"] = "bfloat16"
    low = embed.per_base(net, rows, 4)
    assert low.dtype == np.float32 and not np.array_equal(low, exact)
    assert np.abs(low - exact).max() < 0.05 * np.abs(exact).max()


def seen_in_training(out, monkeypatch, strands, seed=7):
    """[(sequence, label)] of each training step of two epochs."""
    steps, train_batch = [], finetune.train_batch

    def record(net, rows, index, size, scaler, weights):
        texts = decoded(rows)
        steps.append([(texts[i], rows.labels[i].item()) for i in index])
        return train_batch(net, rows, index, size, scaler, weights)
    monkeypatch.setattr(finetune, "train_batch", record)
    parts = {split: rows_of(texts, labels) for split, texts, labels in (
        ("train", LONG, LABELS), ("dev", TEXTS, [0, 1] * 4 + [1]), ("test", TEXTS, [0, 1] * 4 + [1]))}
    spec = {"strands": strands} if strands else {}
    tuned(parts, CLASSES, seed, spec, epochs=2, batch_size=50)
    monkeypatch.setattr(finetune, "train_batch", train_batch)
    return steps


LONG = [random_dna(30, np.random.default_rng(i)) for i in range(200)]
LABELS = [i % 2 for i in range(200)]


@pytest.mark.parametrize("strands", ["augment", "average"])
def test_training_sees_both_strands(tmp_path, monkeypatch, strands):
    """Each epoch has each sequence once, on a strand drawn anew, with its own label."""
    def run(name, *args):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        return seen_in_training(tmp_path, monkeypatch, *args)
    steps, plain = run("a", strands), run("b", None)
    assert steps == run("c", strands) != run("d", strands, 8)                  # a function of the seed
    known = {text: (i, "+") for i, text in enumerate(LONG)}
    known |= {text: (i, "-") for i, text in enumerate(flipped(LONG))}
    seen = [[(*known[text], label) for text, label in step] for step in steps]
    assert all(label == LABELS[i] for step in seen for i, _, label in step)
    order = [[i for i, _, _ in step] for step in seen]
    assert order == [[known[text][0] for text, _ in step] for step in plain]   # the batches do not change
    assert len({"".join(strand for _, strand, _ in step) for step in seen}) == len(seen)
    first, second = ({i: strand for step in part for i, strand, _ in step} for part in (seen[:4], seen[4:]))
    assert len(first) == len(second) == 200
    for epoch in (first, second):
        assert 70 < list(epoch.values()).count("-") < 130
    assert 70 < sum(first[i] != second[i] for i in range(200)) < 130


def test_linear_models_on_both_strands():
    """Of 5-mers: augment fits on both strands; average counts both, so that either strand gives the same."""
    labels, test = np.array([0, 1] * 4 + [1]), LONG[:5] + flipped(LONG[:5])
    parts = {"train": rows_of(TEXTS, labels.tolist()), "test": rows_of(test)}
    forward, other = kmer_table(TEXTS), kmer_table(OTHER)
    for strands, x, y, z in (
            ("augment", np.concatenate([forward, other]), np.tile(labels, 2), kmer_table(test)),
            ("average", (forward + other) / 2, labels, (kmer_table(test) + kmer_table(flipped(test))) / 2)):
        args = SimpleNamespace(strands=strands, micro_batch_size=9, class_weights=None)
        got = finetune.linear_outputs(None, parts, CLASSES, args, "cpu")
        want = finetune.fit_linear(x.astype(np.float32), y, z.astype(np.float32), CLASSES)
        np.testing.assert_allclose(got, want, atol=2e-3)
    np.testing.assert_allclose(got[:5], got[5:], rtol=1e-4, atol=1e-5)
