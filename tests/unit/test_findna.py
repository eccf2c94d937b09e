"""FinDNA: ChordMixer, views, losses and measures against literal readings of the paper."""
import argparse
import collections
import itertools
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import findna
import finetune
import models
from harness import equal, random_dna


def test_parameters():
    model = models.BaseModel(models.ChordMixer(models.ChordMixerConfig()))
    block = [(512, 308), (512,), (308, 512), (308,)]
    assert [tuple(p.shape) for p in model.parameters()] == [(308, 5), (308,), *block * 40, (5, 308), (5,)]
    assert sum(p.numel() for p in model.parameters()) == 12_651_873 == 1_848 + 40 * 316_212 + 1_545


def roll(x, track_size, n_rotated, lengths):
    """Rotation as in the paper, a sequence and a track at a time: x (B, L, C)."""
    rows = []
    for row, length in zip(x, lengths):
        tracks = row[:length].split(track_size, -1)
        tracks = [track.roll(-2 ** (g - 1), 0) if 0 < g <= n_rotated else track
                  for g, track in enumerate(tracks)]
        rows.append(torch.cat([torch.cat(tracks, -1), row[length:]]))
    return torch.stack(rows)


@pytest.mark.parametrize("L, n_rotated, lengths", [
    (64, 6, None), (37, 6, None), (1, 6, None), (99, 3, None), (37, 6, [37, 1, 2, 9]), (37, 2, [7, 9, 8, 1])])
def test_rotation(L, n_rotated, lengths):
    x = torch.randn(4, L, 7 * 3, dtype=torch.float64, requires_grad=True)
    index = models.rotations(L, 7, n_rotated, lengths and torch.tensor(lengths))

    def ours(x):
        return models.Rotate.apply(x.flatten(0, 1), *index, 3).view_as(x)
    want, grad = roll(x, 3, n_rotated, lengths or [L] * 4), torch.randn_like(x)
    equal(ours(x), want)
    equal(torch.autograd.grad(ours(x), x, grad), torch.autograd.grad(want, x, grad))
    assert torch.autograd.gradcheck(ours, x.detach().requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("L, sizes", [(1010, {0: 1, 1: 11, 2: 57, 7: 986, 8: 1010}), (37, {1: 7, 2: 22}),
                                      (64, {1: 7, 5: 63, 6: 64})])
def test_reach(L, sizes):
    """After b blocks a base has changed exactly the outputs that it is a sum of b offsets ahead of."""
    torch.manual_seed(L)
    model = models.ChordMixer(models.ChordMixerConfig(L, 1, 2, 8)).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    blocks, x = model.blocks, data.one_hot(torch.randint(4, (1, L))).double()
    changed, reached = x.clone(), {L // 3}
    changed[0, L // 3] = torch.randn(5)
    for b in range(max(sizes) + 1):
        model.blocks = blocks[:b]
        with torch.no_grad():
            differ = (model(x) != model(changed)).any(-1)[0]
        assert set(torch.where(differ)[0].tolist()) == reached and len(reached) == sizes.get(b, len(reached))
        reached |= {(t - 2 ** g) % L for t in reached for g in range(model.config.n_blocks)}


@pytest.mark.parametrize("config", [models.ChordMixerConfig(40, 2, 3), models.EncoderConfig(200, 2, 2, 16)])
@pytest.mark.parametrize("n_cls, n_blocks", [(0, None), (10, None), (0, 4)])
def test_padding_does_not_leak(config, n_cls, n_blocks):
    torch.manual_seed(0)
    n_blocks = n_blocks if isinstance(config, models.ChordMixerConfig) else None
    spec = {"kind": "mixer", "mixer": vars(config), "n_cls": n_cls, "head": "mlp", "n_out": 3,
            "pool": "cls" if n_cls else "mean"}
    net = finetune.build_net(spec | {"n_blocks": n_blocks}).eval()
    lengths = torch.tensor([11, 20, 40, 64, 150])            # some longer than in pretraining
    one_hot = torch.randn(5, 160, 5)                         # what is behind the ends could be anything
    together = net.states(one_hot, lengths), net.embed(one_hot, lengths), net(one_hot, lengths)
    for i, n in enumerate(lengths):
        alone = one_hot[i:i + 1, :n]
        x = net.states(alone)
        torch.testing.assert_close(together[0][i:i + 1, :n], x)
        torch.testing.assert_close(together[1][i:i + 1], x[:, -n_cls:].mean(1))
        torch.testing.assert_close(together[2][i:i + 1], net(alone))
    assert n_blocks is None or not torch.allclose(net.backbone(alone), x)


def test_layers_start_apart():
    """nn.TransformerEncoder copies one layer, weights and all; a network of ours draws each."""
    for config in models.ChordMixerConfig(40, 3, 3), models.EncoderConfig(40, 3, 2, 16):
        weights = [p for p in models.make_backbone(vars(config)).parameters() if p.dim() == 2]
        assert len({p.flatten()[0].item() for p in weights}) == len(weights) > 6


def test_dropout_and_unused_blocks():
    torch.manual_seed(0)
    config = models.ChordMixerConfig(16, 2, 4, 8, dropout=0.2)
    block, index = models.MixerBlock(config), models.rotations(16, 5, 4)
    torch.nn.init.ones_(block.fc2.bias), torch.nn.init.zeros_(block.fc2.weight)
    kept = torch.stack([block(torch.zeros(16, 20), *index) for _ in range(200)])
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.64]) and abs(kept.mean() - 1) < 0.02
    model = models.ChordMixer(config).eval()
    model(data.one_hot(torch.randint(4, (2, 6))), n_blocks=3).sum().backward()
    assert [block.fc1.weight.grad is not None for block in model.blocks] == [True, True, True, False] * 2


def literal_edits(row, deletion, insertion, shift):
    """One sequence, a list, edited as the paper says; deletion, insertion: length, start, filler."""
    length, at, filler = deletion
    row = filler[20 - length // 2:20] + row[:at] + row[at + length:] + filler[20:20 + length - length // 2]
    length, at, filler = insertion
    row = (row[:at] + filler[:length] + row[at:])[:len(row)]
    return row[len(row) - shift % len(row):] + row[:len(row) - shift % len(row)]


def test_edits():
    L, row, filler = 45, list(range(45)), list(range(100, 160))                # every base has a name
    rng = random.Random(0)
    drawn = [(d := rng.randint(0, 20), rng.randint(0, L - d), rng.randint(0, 20), rng.randint(0, L - 1),
              rng.randint(-L, L)) for _ in range(500)]
    d, start, n, at, shift = torch.tensor(drawn).T
    rows, fillers = (torch.tensor([x] * 500, dtype=torch.uint8) for x in (row, filler))
    got = findna.insert(findna.delete(rows, d, start, fillers[:, :40]), n, at, fillers[:, 40:])
    want = [literal_edits(row, (d, start, filler[:40]), (n, at, filler[40:]), shift)
            for d, start, n, at, shift in drawn]
    assert got.dtype == torch.uint8 and findna.translocate(got, shift).tolist() == want


def test_draws_of_edits(monkeypatch):
    drawn, n = {name: [] for name in ("delete", "insert", "translocate")}, 20_000
    for name in drawn:
        monkeypatch.setattr(findna, name, lambda bases, *args, name=name: drawn[name].append(args) or bases)
    findna.augment(torch.zeros(n, 30, dtype=torch.uint8), "MDIT", 20)
    for name, starts in (("delete", lambda d: 31 - d), ("insert", lambda n: 30)):
        [(length, start, filler)] = drawn[name]
        assert (length.bincount() / n - 1 / 21).abs().max() < 0.01
        assert (filler.flatten().bincount() / filler.numel() - 0.25).abs().max() < 0.01
        assert all(set(start[length == d].tolist()) == set(range(starts(d))) for d in range(21))
    assert ((drawn["translocate"][0][0] + 20).bincount() / n - 1 / 41).abs().max() < 0.01


def test_one_hot_and_other_strand():
    bases = data.encode("ACGTNacgtRY")
    assert data.one_hot(torch.tensor([0, 2, 3, 1, 4, 5])).tolist() == torch.eye(6, 5).tolist()   # A C G T N
    x = data.one_hot(torch.from_numpy(bases)[None])
    want = data.one_hot(torch.from_numpy(data.reverse_complement(bases).copy())[None])
    equal(findna.other_strand(x), want)
    noisy = x + torch.randn_like(x)
    equal(findna.other_strand(findna.other_strand(noisy)), noisy)


@pytest.mark.parametrize("views", ["MDIT+NR", "M+none", "M+DIT", "MDT+DIT"])           # Table 4
def test_views(views):
    bases = torch.randint(4, (400, 50), dtype=torch.uint8)
    torch.manual_seed(1)
    view_u, target, view_v = findna.make_views(bases, views, 20)
    torch.manual_seed(1)
    edited, plain = findna.augment(bases, views.split("+")[0], 20), data.one_hot(bases)
    equal(view_u + target, data.one_hot(edited))             # the same draws: the targets follow the edits
    masked = target.any(-1)
    assert (masked.sum(1) == 15).all() and not view_u[masked].any() and view_u[~masked].any(-1).all()
    assert (masked.float().mean(0) - 0.3).abs().max() < 0.12
    assert torch.equal(edited, bases) == (views[1] == "+")
    if views.endswith("NR"):
        back = findna.other_strand(view_v)
        flipped = (back - plain).flatten(1).std(1) < (view_v - plain).flatten(1).std(1)
        noise = torch.where(flipped[:, None, None], back, view_v) - plain
        assert 160 < flipped.sum() < 240 and abs(noise.mean()) < 0.01 and abs(noise.std() - 0.2) < 0.005
    else:
        assert torch.equal(view_v, plain) == views.endswith("none") and torch.equal(view_v, view_v.round())


def test_dissimilarity():
    u, v = torch.randn(2, 3, 7, 5)
    p, q = u.softmax(-1).double(), v.softmax(-1).double()
    want = sum(p[i] * math.log(p[i] / q[i]) for i in itertools.product(range(3), range(7), range(5))) / 21
    assert findna.dissimilarity(u, v).item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("dim", [2, 1], ids=["features", "tokens"])
def test_losses(dim):
    """A literal reading of Eqs 2 to 8."""
    B, L, K, C = 3, 20, 4, 6
    bases, logits = torch.randint(4, (B, L)), torch.randn(B, L, 5, dtype=torch.float64)
    masked, channel = findna.draw_masked((B, L), "cpu"), ["ACGTN".index(letter) for letter in "ATCGN"]
    want = -sum(math.log(logits[b, t].softmax(0)[channel[bases[b, t]]])
                for b in range(B) for t in range(L) if masked[b, t])
    target = data.one_hot(bases.masked_fill(~masked, data.BLANK))
    assert findna.mnm_loss(logits, target).item() == pytest.approx(want, rel=1e-5)
    (P, Q), center, want = torch.randn(2, B, K, C), torch.randn(K, C), 0
    for b, k, i in itertools.product(range(B), range(K), range(C)):
        over = [(k, j) for j in range(C)] if dim == 2 else [(j, i) for j in range(K)]
        p = math.exp(P[b, k, i] / 0.1) / sum(math.exp(P[b][at] / 0.1) for at in over)
        q = math.exp((Q[b, k, i] - center[k, i]) / 0.04)
        want -= q / sum(math.exp((Q[b][at] - center[at]) / 0.04) for at in over) * math.log(p)
    q = findna.teacher_outputs(Q, center, dim)
    assert findna.cl_loss(P, q, dim).item() == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("steps", [600, 1000, 3000])
def test_what_is_left_of_the_initial_weights(steps):
    assert findna.initial_share(steps, steps, 0.996) == pytest.approx(math.exp(-0.004 * steps / 2), rel=0.02)
    assert findna.initial_share(2, steps, 0.996) == pytest.approx(0.996 ** 2, abs=1e-6)


@pytest.mark.parametrize("text", ["MDIT", "NR+M", "M+", "+M", "MM+N", "M+X", "none+M", "m+n"])
def test_pairs_of_views_that_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="the student needs M"):
        findna.view_pair(text)
    assert findna.view_pair("MNR+T") == "MNR+T" and findna.view_pair("MDT+NR") == "MDT+NR"


def test_views_with_noise_and_mask_on_the_other_side():
    """MNR+MT: noise and flip for the student, whose targets are the flipped bases; a masked teacher."""
    bases = torch.randint(4, (200, 40), dtype=torch.uint8)
    view_u, target, view_v = findna.make_views(bases, "MNR+MT", 0, 0.25, 0.1, 1.0)
    masked = target.any(-1)
    assert (masked.sum(1) == 10).all() and not view_u[masked].any()
    flipped = data.one_hot(data.reverse_complement(bases))
    equal(target[masked], flipped[masked])
    assert abs((view_u - flipped)[~masked].std() - 0.1) < 0.005
    assert ((view_v == 0).all(-1).sum(1) == 10).all()


def test_collapse_measures():
    def measures(q, dim=2):
        return findna.collapse(findna.teacher_sums(q, q, dim).double(), len(q), q.shape[1:], dim)
    got = measures(torch.randn(1, 10, 16).softmax(-1).expand(50, -1, -1))
    assert abs(got["q_information"]) < 1e-5 and got["cls_cos"] == pytest.approx(1, abs=1e-5)
    each = F.one_hot(torch.arange(48) % 16, 16).float()[:, None].expand(-1, 10, -1)
    for got in (measures(each), measures(each.mT, dim=1)):
        assert got["q_entropy"] == 0 and got["q_information"] == pytest.approx(math.log(16), abs=1e-5)
    assert measures(each)["cls_cos"] == pytest.approx(2 / 47, abs=1e-5)


def test_windows_and_guesses():
    windows = np.arange(100, 123)
    parts = [findna.pass_over(windows, 7, first, 10) for first in range(0, 120, 10)]
    order = np.concatenate(parts)[:115].reshape(5, 23)
    assert (np.sort(order) == windows).all() and len({tuple(epoch) for epoch in order}) == 5
    text = random_dna(3000, np.random.default_rng(0), "AACGT") + "NNN" + "ACG" * 500
    counts = collections.Counter(x for x in zip(text, text[2:], text[1:]) if "N" not in x)
    joint = np.array([[counts[a, c, b] for b in "ACGT"] for a in "ACGT" for c in "ACGT"]) / counts.total()
    with np.errstate(all="ignore"):
        order1 = -np.nansum(joint * np.log(joint / joint.sum(1, keepdims=True)))
    one = joint.sum(0)
    want = [one.max(), -(one * np.log(one)).sum()], [joint.max(1).sum(), order1]
    np.testing.assert_allclose(findna.guesses(data.encode(text)), want)
    few = "N".join(text[start:start + 50] for start in (0, (len(text) - 50) // 2, len(text) - 50))
    np.testing.assert_allclose(findna.guesses(data.encode(text), 3, 50), findna.guesses(data.encode(few)))


def test_entropies_of_a_genome():
    """Of the demo of randommask.py, against counts of strings."""
    text = random_dna(9000, np.random.default_rng(0), "AACGT")
    text = "".join(a + ("C" if a == "A" else "T") for a in text)

    def entropy(items):
        p = np.unique(items, return_counts=True)[1] / len(items)
        return -(p * np.log(p)).sum()
    sevens = [text[i:i + 7] for i in range(len(text) - 6)]
    want = entropy([x[3] for x in sevens]), entropy(sevens) - entropy([x[:3] + x[4:] for x in sevens])
    assert [nats for _, nats in data.score_guesses(data.encode(text), 3)] == pytest.approx(want, abs=1e-9)
