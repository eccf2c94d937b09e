"""tools.mutagenesis: effects, gradients and attention against literal loops; planted motifs stand out."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import random_dna
from sklearn.metrics import roc_auc_score
from test_finetune_rules import K, SPEC

import data
import finetune
from tools import mutagenesis

NAMES = ("no", "maybe", "yes")
MIXER = dict(length=26, n_layer=1, track_size=4, hidden=8, dropout=0.0)
SPECS = {"bert": SPEC, "bert, stride 3": SPEC | {"stride": K}, "cut": SPEC | {"long": "truncate"},
         "mixer": {"kind": "mixer", "mixer": MIXER, "n_cls": 0}, "cnn": {"kind": "cnn", "length": 64},
         "penguinn": {"kind": "penguinn", "length": 64, "binary": False}}
BAR = SimpleNamespace(update=lambda n: None)


def make_model(kind, outputs="classes", **more):
    """A model of random weights whose outputs differ between sequences."""
    spec = {"n_out": 3, "classes": NAMES, "regression": outputs == "targets"} | more
    net = finetune.build_net(SPECS[kind] | spec | {"multilabel": outputs == "labels"}, seed=3)
    for p in net.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=1.5 / p[0].numel() ** 0.5)
    return finetune.Model("x.pt", net, "cpu")


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("outputs", ["classes", "labels", "targets"])
def test_effects_are_those_of_a_literal_loop(kind, outputs, monkeypatch):
    """One substitution and one prediction at a time; two windows, an N, several parts."""
    monkeypatch.setattr(mutagenesis, "BLOCK", 40 * 50)
    model, text = make_model(kind, outputs), random_dna(40, np.random.default_rng(1))
    text = text[:7] + "N" + text[8:]

    found, moved = mutagenesis.effects(model, data.encode(text), 1, BAR), []
    for at, ref in enumerate(text):
        p = model.predict([text[:at] + letter + text[at + 1:] for letter in ref + "ACGT"])[:, 1].astype(float)
        value = p if outputs == "targets" else np.log(p / (1 - p))
        want = np.full(4, np.nan) if ref == "N" else value[1:] - value[0]
        assert found[:, at] == pytest.approx(want, abs=2e-5, nan_ok=True)
        moved += [*abs(want)]
    assert np.nanmean(moved) > 1e-3


def with_scaled_input(net, at, scale):
    """The network, in which position `at` of what READER gives or takes is multiplied by scale."""
    def change(module, inputs, output=None):
        x = (inputs[0] if output is None else output).clone()
        x.view(-1, x.shape[-1])[at] *= scale
        return x
    reader = net.get_submodule(net.READER)
    return reader.register_forward_hook(change) if isinstance(reader, torch.nn.Embedding) else \
        reader.register_forward_pre_hook(change)


@pytest.mark.parametrize("kind", ["bert", "bert, stride 3", "mixer"])
def test_gradient_x_input_is_the_slope_when_the_input_is_scaled(kind):
    """gradient . x is the derivative of the output by a factor of x. A base has the mean over its k-mers."""
    model, length = make_model(kind), 31
    net, codes = model.net, data.encode(random_dna(length, np.random.default_rng(2)))
    rows = data.on_device(mutagenesis.copies(codes), "cpu")
    is_bert, stride = "bert" in kind, K if "3" in kind else 1
    inputs = net.inputs(rows, mutagenesis.ONE)

    def slope(at):
        ends = []
        for scale in (0.99, 1.01):
            with torch.no_grad(), with_scaled_input(net, at, scale):
                outputs = net(*inputs)[0]
                ends.append((outputs[1] - outputs[[0, 2]].logsumexp(0)).item())
        return (ends[1] - ends[0]) / 0.02
    slopes = [slope(at) for at in range(length if not is_bert else (length - K) // stride + 3)]
    got = mutagenesis.gradient_x_input(net, rows, 1)
    for at in range(length):
        over = [t for t in range(len(slopes) - 2) if t * stride <= at < t * stride + K]
        want = slopes[at] if not is_bert else np.mean([slopes[1 + t] for t in over]) if over else np.nan
        assert got[at] == pytest.approx(want, abs=3e-3 * np.abs(slopes).max(), nan_ok=True)


def test_gradient_x_input_of_a_cnn_is_that_of_the_one_hot_bases():
    net, codes = make_model("cnn").net, data.encode(random_dna(50, np.random.default_rng(2)))
    rows = data.on_device(mutagenesis.copies(codes), "cpu")
    got, [inputs] = mutagenesis.gradient_x_input(net, rows, 1), net.inputs(rows, mutagenesis.ONE)
    one_hot = torch.nn.functional.one_hot(inputs.long(), 5).float().requires_grad_()
    net.emb.forward = lambda bases: one_hot @ net.emb.weight
    outputs = net(inputs)[0]
    (outputs[1] - outputs[[0, 2]].logsumexp(0)).backward()
    assert got == pytest.approx((one_hot.grad * one_hot).sum(-1)[0, :50].detach().numpy(), abs=1e-6)


def test_attention_is_the_mean_over_heads_and_k_mers():
    model, text = make_model("bert"), random_dna(30, np.random.default_rng(3))
    rows = data.on_device(mutagenesis.copies(data.encode(text)), "cpu")
    got = mutagenesis.attention(model.net, rows)
    with torch.no_grad():
        weights = model.net.bert.encode(data.tokenize([text], K), need_weights=True)[1][-1][0, :, 0, 1:-1]
    for at in range(30):
        over = range(max(at - K + 1, 0), min(at + 1, 30 - K + 1))
        assert got[at] == pytest.approx(float(np.mean([weights[:, t].mean() for t in over])), abs=1e-6)


@pytest.mark.parametrize("strands", ["forward", "average"])
def test_the_mean_over_both_strands_is_that_of_the_other_strand(strands):
    """Everything about the reverse complement is the same, from right to left."""
    model, codes = make_model("bert", strands=strands), data.encode(random_dna(45, np.random.default_rng(4)))
    checks, turned = [mutagenesis.gradient_x_input, mutagenesis.attention], data.reverse_complement(codes)
    one, other = (mutagenesis.explain(model, x, 1, checks, BAR) for x in (codes, turned))
    same = [np.allclose(one[1], other[1][::-1, ::-1], atol=1e-5)]                  # A, C, G, T: T, G, C, A
    same += [np.allclose(one[2][name], other[2][name][::-1], atol=1e-6) for name in one[2]]
    assert same == [strands == "average"] * 3


def test_flags_that_do_not_fit_are_refused():
    for kind, outputs, flags, message in (
            ("cnn", "classes", {"attention": True}, "--attention: not for a network of the kind cnn"),
            ("penguinn", "classes", {"gradient": True}, "--gradient: not for a network of the kind penguinn"),
            ("cnn", "classes", {"output": "x"}, "--class 'x': the model has no, maybe, yes; name one"),
            ("cnn", "targets", {}, "--class is missing: the model has no, maybe, yes; name one of them")):
        args = SimpleNamespace(**{"gradient": False, "attention": False, "output": None} | flags)
        with pytest.raises(ValueError, match=message):
            mutagenesis.mutate(make_model(kind, outputs), args)


def test_a_table_is_not_called_a_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = SimpleNamespace(gradient=False, attention=False, output="yes", draw=1, out="mine.png", file="a.fa")
    with pytest.raises(ValueError, match="^--out mine.png: this is the table, and pictures go beside it"):
        mutagenesis.mutate(make_model("cnn"), args)
    assert not [*tmp_path.iterdir()]


def test_a_picture_of_yours_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.pdf").write_text("mine")
    args = SimpleNamespace(gradient=False, attention=False, output="yes", draw=1, out="mine.tsv", file="a.fa")
    with pytest.raises(ValueError, match="^mine.pdf: already exists; name another one by --out, or give"):
        mutagenesis.mutate(make_model("cnn"), args)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.pdf"]


def planted(folder):
    """A CNN trained on shorter sequences of the demo task, one that is not; (20, 64) bases with a motif, and
    where it is."""
    task = data.TASKS["demo"]._replace(length="64", rows={"train": 2000, "dev": 2, "test": 40})
    splits, nets = data.read_demo(task, str(folder)), []
    rows, labels = data.on_device(splits["train"], "cpu"), torch.from_numpy(splits["train"].labels)
    for epochs in (6, 0):
        net = finetune.build_net(SPECS["cnn"] | {"n_out": 2, "classes": task.classes, "regression": False})
        optimizer = torch.optim.Adam(net.parameters(), 2e-3)
        for epoch in range(epochs):
            for index in finetune.epoch_batches(np.diff(rows.offsets), 32, 1, epoch):
                finetune.loss_of(net(*net.inputs(rows, index)), labels[index], "mean").backward()
                optimizer.step()
                optimizer.zero_grad()
        nets.append(finetune.Model("cnn.pt", net, "cpu"))
    sequences = splits["test"].bases.reshape(40, 64)[1::2]
    first = np.array([data.decode(codes).index(data.DEMO_MOTIF) for codes in sequences])[:, None]
    return nets, sequences, (np.arange(64) - first) // len(data.DEMO_MOTIF) == 0


def test_planted_motifs_stand_out(tmp_path):
    """AUROC of the mean size of the effects on a base: bases in a motif against others. Only bases that are
    as likely to be in one as any: near the ends a motif is rare, and the CNN sees less."""
    def auroc(sizes):
        return roc_auc_score(inside[:, 11:-11].ravel(), np.abs(sizes)[:, 11:-11].ravel())
    (trained, random), sequences, inside = planted(tmp_path)
    found = [np.abs([mutagenesis.effects(model, codes, 1, BAR) for codes in sequences]).mean(1)
             for model in (trained, random)]
    rows = [data.on_device(mutagenesis.copies(codes), "cpu") for codes in sequences]
    gradient = [mutagenesis.gradient_x_input(trained.net, one, 1) for one in rows]
    assert auroc(found[0]) > 0.9 and abs(auroc(found[1]) - 0.5) < 0.1 and auroc(gradient) > 0.8
