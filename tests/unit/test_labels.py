"""Multi-label sets, AUPRC and class weights: compared with plain loops."""
import math

import numpy as np
import pytest
import torch
from test_finetune_rules import CLASSES, SPEC, texts_of

import data
import finetune

LABELS = data.Task("t", "csv", ("a", "b", "c"), False, "auroc", "", {}, "", "", "", True)


def average_precision(labels, scores):
    """Mean over the positives of the share of positives among the rows that score at least as high."""
    return np.mean([np.mean(labels[scores >= s]) for s, y in zip(scores, labels) if y])


def auroc(labels, scores):
    pairs = [(x > y) + (x == y) / 2 for x in scores[labels] for y in scores[~labels]]
    return np.mean(pairs)


def test_scores_of_labels():
    rng = np.random.default_rng(0)
    labels, outputs = rng.random((40, 3)) < [0.2, 0.5, 0.9], rng.normal(size=(40, 3))
    got = finetune.scores(outputs, labels, LABELS)
    each = {f"{name}_{label}": score(labels[:, i], outputs[:, i]) for name, score in (
        ("auroc", auroc), ("auprc", average_precision)) for i, label in enumerate("abc")}
    means = {name: np.mean([each[f"{name}_{label}"] for label in "abc"]) for name in ("auroc", "auprc")}
    hits = (outputs > 0) & labels
    f1 = np.mean(2 * hits.sum(0) / ((outputs > 0).sum(0) + labels.sum(0)))
    assert got == pytest.approx(each | means | {"f1_macro": f1, "acc": np.mean((outputs > 0) == labels)})
    labels[:, 1] = True                                      # of b, nothing can be said; the others count
    got = finetune.scores(outputs, labels, LABELS)
    assert got["auroc_b"] is None and got["auprc_b"] is None
    assert got["auroc"] == pytest.approx((each["auroc_a"] + each["auroc_c"]) / 2)
    each_f1 = 2 * hits.sum(0) / ((outputs > 0).sum(0) + hits.sum(0) + (~(outputs > 0) & labels).sum(0))
    assert got["f1_macro"] == pytest.approx((each_f1[0] + each_f1[2]) / 2)
    one = finetune.scores(outputs[:, :1], labels[:, :1], LABELS._replace(classes=("a",)))
    assert one["f1_macro"] == pytest.approx(each_f1[0])      # of 1; not the mean of those of 0 and 1


def test_auprc_of_classes():
    rng = np.random.default_rng(1)
    labels, outputs = rng.integers(2, size=30), rng.normal(size=(30, 2))
    p = 1 / (1 + np.exp(outputs[:, 0] - outputs[:, 1]))
    got = finetune.class_scores(outputs, labels, 2)["auprc"]
    assert got == pytest.approx(average_precision(labels == 1, p))
    labels, outputs = rng.integers(3, size=30), rng.normal(size=(30, 3))
    p = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
    want = np.mean([average_precision(labels == i, p[:, i]) for i in range(3)])
    assert finetune.class_scores(outputs, labels, 3)["auprc"] == pytest.approx(want)
    assert math.isnan(finetune.class_scores(outputs, labels % 2, 3)["auprc"])  # no row of class 2: undefined
    labels, log_odds = rng.integers(2, size=30), rng.normal(size=30) * 9 + 50  # of which p is 1 in 32 bits
    outputs = np.stack([0 * log_odds, log_odds], 1).astype(np.float32)
    got = finetune.class_scores(outputs, labels, 2)["auprc"]
    assert got == pytest.approx(average_precision(labels == 1, outputs[:, 1]))


def test_losses_of_labels_and_weights():
    """Binary cross-entropy of each label; balanced: each class, or value of a label, weighs the same."""
    torch.manual_seed(0)
    outputs, labels = torch.randn(12, 3), torch.rand(12, 3) < torch.tensor([0.2, 0.5, 0.8])
    labels[0], labels[1] = True, False
    p = 1 / (1 + (-outputs).exp())
    losses = -torch.where(labels, p.log(), (1 - p).log())
    torch.testing.assert_close(finetune.loss_of(outputs, labels, "sum"), losses.mean(1).sum())
    torch.testing.assert_close(finetune.loss_of(outputs, labels, "mean"), losses.mean())
    weights = finetune.balanced_weights(labels, 3)
    n = labels.sum(0).float()
    want = (losses * torch.where(labels, 12 / (2 * n), 12 / (2 * (12 - n)))).mean(1).sum()
    torch.testing.assert_close(finetune.loss_of(outputs, labels, "sum", weights), want)
    ids = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    weights = finetune.balanced_weights(ids, 3)
    assert weights.tolist() == pytest.approx([12 / (3 * 6), 12 / (3 * 3), 12 / (3 * 3)])
    want = sum(-weights[y] * outputs[i].log_softmax(0)[y] for i, y in enumerate(ids.tolist()))
    torch.testing.assert_close(finetune.loss_of(outputs, ids, "sum", weights), want)


def test_a_batch_with_weights_is_one_gradient():
    """In pieces or whole, the gradient is that of the weighted sum divided by the number of sequences."""
    rows = data.rows_from(texts_of(8, 2), [0, 0, 0, 0, 0, 0, 1, 1])
    labels, gradients = torch.from_numpy(rows.labels), []
    weights = finetune.balanced_weights(labels, 2)
    for size in (99, 2):
        net = finetune.build_net(SPEC)
        on_cpu = data.on_device(rows, torch.device("cpu"), labels)
        finetune.train_batch(net, on_cpu, np.arange(8), size, weights=weights)
        gradients.append(net.out.weight.grad)
    net = finetune.build_net(SPEC)
    outputs = net(*net.inputs(data.on_device(rows, "cpu"), np.arange(8)))
    losses = torch.nn.functional.cross_entropy(outputs, labels, reduction="none")
    (losses * torch.tensor([8 / 12] * 6 + [2.0] * 2)).mean().backward()
    for gradient in gradients:
        torch.testing.assert_close(gradient, net.out.weight.grad)


def test_the_loss_on_dev_has_the_weights():
    """What chooses the network is what training minimises."""
    rows = data.rows_from(texts_of(8, 3), [0, 0, 0, 0, 0, 0, 1, 1])
    net, weights = finetune.build_net(SPEC), torch.tensor([0.5, 3.0])
    on_cpu = data.on_device(rows, torch.device("cpu"), rows.labels)
    outputs = net.eval()(*net.inputs(on_cpu, np.arange(8)))
    losses = torch.nn.functional.cross_entropy(outputs, torch.from_numpy(rows.labels), reduction="none")
    want = (0.5 * losses[:6].sum() + 3 * losses[6:].sum()) / 9
    assert finetune.evaluate(net, on_cpu, CLASSES, 99, weights)["loss"] == pytest.approx(want.item())
    assert finetune.evaluate(net, on_cpu, CLASSES, 99)["loss"] == pytest.approx(losses.mean().item())


def test_linear_models_of_labels():
    """One logistic regression a label; balanced weights reach scikit-learn's."""
    rng = np.random.default_rng(0)
    x, test = rng.normal(size=(80, 5)).astype(np.float32), rng.normal(size=(9, 5)).astype(np.float32)
    labels = np.stack([x[:, 0] > 0, x[:, 1] > 1, x[:, 2] > -1], 1)
    got = finetune.fit_linear(x, labels, test, LABELS)
    for i in range(3):
        want = finetune.fit_linear(x, labels[:, i].astype(int), test, CLASSES)
        np.testing.assert_allclose(got[:, i], want[:, 1] - want[:, 0], rtol=1e-3, atol=1e-4)
    one = LABELS._replace(classes=("a",))
    assert finetune.fit_linear(x, labels[:, :1], test, one).shape == (9, 1)
    even, balanced = (finetune.fit_linear(x, labels[:, 1].astype(int), test, CLASSES, weights)
                      for weights in (None, "balanced"))
    assert (balanced[:, 1] > even[:, 1]).all()               # the rare class is predicted more often


@pytest.mark.parametrize("cell, word", [("2", "b is '2'"), ("", "b is ''"), ("yes", "b is 'yes'")])
def test_a_label_is_0_or_1(tmp_path, cell, word):
    (tmp_path / "t.csv").write_text(f"sequence,a,b\nACGTACGT,0,1\nACGTACGA,1,{cell}\n")
    with pytest.raises(ValueError, match=f"t.csv: line 3: {word}"):
        data.read_table(tmp_path / "t.csv", targets=["a", "b"], multilabel=True)


def test_a_table_of_labels(tmp_path):
    (tmp_path / "t.csv").write_text("sequence,a,b\nACGTACGT,0,1\nACGTACGA,1,0\n")
    sequences, labels, _ = data.read_table(tmp_path / "t.csv", targets=["b", "a"], multilabel=True)
    rows = data.rows_from(sequences, labels)
    assert rows.labels.dtype == bool and rows.labels.tolist() == [[True, False], [False, True]]
