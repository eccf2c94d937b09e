"""A step of each method against a slow, literal program in float64.

A real run keeps its checkpoints after steps n - 1 and n. From the first one the test computes the second: the
batch, the loss as the paper writes it, the gradient, clipping, AdamW, schedule, teacher and center. Only the
random draws come from the code under test; the unit tests hold those. Everything else is written out here.
"""
import importlib
import json
import math
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch.func import functional_call

import cm_gems
import data
import findna
import models
import randommask
import training
from harness import command_line, log_rows, random_dna, run, write_fasta

SEED, K, VOCAB = 7, 3, 69                                    # 64 3-mers and 5 special tokens
rng = np.random.default_rng(0)
CONTIGS = {"a": random_dna(4000, rng), "b": "NNNN" + random_dna(3000, rng) + "N", "c": random_dna(900, rng)}
TEXT = "".join(CONTIGS.values())
RUN = dict(genome="genome.fa", device="cpu", out="out", seed=SEED, batch_size=11, micro_batch_size=4,
           log_every=1, eval_every=1000, save_every=0)
BERT = dict(k=K, block_size=22, n_layer=1, n_head=2, n_embd=16, dropout=0)
MIXER = dict(length=30, windows=23, n_layer=2, track_size=2, hidden=8, dropout=0)
DNABERT_ADAM, TORCH_ADAM = dict(betas=(0.9, 0.98), eps=1e-6), dict(betas=(0.9, 0.999), eps=1e-8)
Kept = namedtuple("Kept", "before after row")                # checkpoints around a step, its row of the log
close = torch.testing.assert_close


# what a run leaves behind

def pretrain(script, steps_kept, **flags):
    """Runs a script in the working folder of the test until it has kept the last of these steps.

    Returns a function: step -> Kept. flags: with out, the run folder.
    """
    def stop_early():
        training = importlib.import_module("training")
        log = training.log

        def logged(*args):
            log(*args)
            if args[-1]["step"] > max(steps_kept):
                raise SystemExit(0)
        training.log = logged
    write_fasta(flags["out"].with_name("genome.fa"), CONTIGS)
    kept = ["--keep", *map(str, sorted({n for step in steps_kept for n in (step - 1, step)}))]
    result = run(command_line(RUN | flags) + kept, {0: stop_early}, script=f"{script}.py")
    assert result.code == 0, result
    rows = {row["step"]: row for row in log_rows(flags["out"])}

    def load(step):
        return torch.load(flags["out"] / f"step_{step}.pt", weights_only=True)
    return lambda step: Kept(load(step - 1), load(step), rows[step])


def double(weights):
    return {name: tensor.double() for name, tensor in weights.items()}


def moments(state):
    """{parameter: its step count and Adam's two moments}: first all matrices, then all vectors."""
    names = sorted(state["model"], key=lambda name: state["model"][name].dim() < 2)
    return {names[i]: double(found) for i, found in state["optimizer"]["state"].items()}


# the step, written out

def check_step(step, kept, loss_of, adam):
    """Checks the weights and moments after a step; returns the loss and the norm of its gradient.

    loss_of(weights): the loss of the whole batch, float64. adam: lr, betas, eps, decay, and where to clip.
    The moments are checked first. The weights are then computed from those in the checkpoint: where a
    gradient is zero but for rounding, Adam turns the rounding into a step.
    """
    lr, clip, betas, eps = (adam[name] for name in ("lr", "clip", "betas", "eps"))
    weights = {name: w.requires_grad_() for name, w in double(kept.before["model"]).items()}
    loss = loss_of(weights)
    grads = dict(zip(weights, torch.autograd.grad(loss, [*weights.values()], allow_unused=True)))
    norm = math.sqrt(sum(g.square().sum().item() for g in grads.values() if g is not None))
    old, new, after = moments(kept.before), moments(kept.after), double(kept.after["model"])
    for name, w in weights.items():
        if grads[name] is None:
            assert name not in new and torch.equal(after[name], w), name
            continue
        g, small = grads[name] * min(1, clip / norm), 2e-6 * min(norm, clip)
        m = betas[0] * old[name]["exp_avg"] + (1 - betas[0]) * g
        v = betas[1] * old[name]["exp_avg_sq"] + (1 - betas[1]) * g ** 2
        assert new[name]["step"].item() == old[name]["step"].item() + 1 == step
        close(new[name]["exp_avg"], m, rtol=1e-4, atol=small, msg=lambda text: f"{name}: first moment {text}")
        close(new[name]["exp_avg_sq"], v, rtol=1e-3, atol=(1 - betas[1]) * small * min(norm, clip),
              msg=lambda text: f"{name}: second moment {text}")
        m_hat = new[name]["exp_avg"] / (1 - betas[0] ** step)
        v_hat = new[name]["exp_avg_sq"] / (1 - betas[1] ** step)
        shrink = lr * adam["decay"] if w.dim() == 2 else 0   # no decay of biases and LayerNorm
        want = w - shrink * w - lr * m_hat / (v_hat.sqrt() + eps)
        close(after[name], want.detach(), rtol=2e-7, atol=2e-6 * lr, msg=lambda text: f"{name}: {text}")
    return loss.item(), norm


def linear_rate(step, steps, warmup):
    """Rises to 1 at step `warmup`, then falls by equal amounts; 0 would be at step `steps` + 1."""
    return step / warmup if step <= warmup else (steps + 1 - step) / (steps + 1 - warmup)


def cosine_rate(step, steps, warmup):
    turn = math.pi * (step - warmup) / (steps + 1 - warmup)
    return step / warmup if step <= warmup else (1 + math.cos(turn)) / 2


def log_softmax(x, dim=-1):
    return x - x.exp().sum(dim, keepdim=True).log()


# the batch, written out

def window_starts(length, held_out=False):
    """Every position in TEXT where a training window, or a held-out one, can begin: there is no N in it.

    Held out is the last 1 % of each contig, if a window fits in it.
    """
    starts, offset = [], 0
    for text in CONTIGS.values():
        held = len(text) // 100
        cut = len(text) - held * (held >= length)
        first, last = (cut, len(text)) if held_out else (0, cut)
        starts += [offset + at for at in range(first, last - length + 1) if "N" not in text[at:at + length]]
        offset += len(text)
    return np.array(starts)


def micro_batches(size, step, held_out=False, length=22):
    """(number of its first sequence, texts, numpy generator) of each micro-batch of 4; seeds torch for it."""
    starts = window_starts(length, held_out)
    for i, first in enumerate(range(0, size, 4)):
        generator = training.seed(SEED, step, i)
        drawn = starts[generator.integers(len(starts), size=min(4, size - first))]
        yield first, [TEXT[at:at + length] for at in drawn], generator


def encode(texts):
    return torch.stack([torch.from_numpy(data.encode(text)) for text in texts])


def test_every_part_of_a_key_counts():
    """The programs here draw with training.seed, too: this holds it."""
    drawn = set()
    for key in ((7, 0, 0), (8, 0, 0), (7, 1, 0), (7, 0, 1), (7, 1, 1), (7, 2, 1), (7, 1, 2), (7, 0, 0)):
        generator = training.seed(*key)
        drawn.add((torch.rand(1).item(), torch.randint(2 ** 40, (1,)).item(), generator.random()))
    assert len(drawn) == 7 and all(len({*column}) == 7 for column in zip(*drawn))


# masked language models

def mlm_loss(config, rows):
    """-log p of each masked token, summed, by their number. rows: (inputs, labels) of single sequences."""
    net = models.Bert(models.BertConfig(**config)).double().eval()

    def loss_of(weights):
        total, count = 0, 0
        for inputs, labels in rows:
            real = inputs != data.PAD                        # each sequence alone, without its padding
            inputs, labels = inputs[real], labels[real]
            log_p = log_softmax(functional_call(net, weights, (inputs[None],))[0])
            for at in (labels != -100).nonzero()[:, 0]:
                total, count = total - log_p[at, labels[at]], count + 1
        return total / count
    return loss_of


def randommask_rows(step, size, n_spans, held_out=False, p=0.05):
    """Algorithm 1: each sequence draws its span from 3, 5, ... (so many); a center has P = 0.15 / 3."""
    rows = []
    for _, texts, _ in micro_batches(size, step, held_out):
        tokens = data.tokenize(texts, K)
        masked = randommask.random_mask(tokens, n_spans, p, 3)
        rows += zip(*data.corrupt(tokens, masked, VOCAB))
    return rows


def test_randommask(out):
    """Warm-up is 2 % of 240 steps; edges of the phases: 30k, 60k, 100k and 150k of 480k, of 240."""
    kept = pretrain("randommask", (3, 50, 51, 90), **BERT, out=out, steps=240, lr=4e-3, weight_decay=0.1,
                    grad_clip=0.8, eval_windows=10)
    clipped = []
    for step, phase in ((3, 1), (50, 3), (51, 4), (90, 5)):
        lr = 4e-3 * linear_rate(step, 240, 5)
        loss_of = mlm_loss(kept(step).before["config"], randommask_rows(step, 11, phase))
        loss, norm = check_step(step, kept(step), loss_of, DNABERT_ADAM | dict(lr=lr, clip=0.8, decay=0.1))
        row = kept(step).row
        assert [row["loss"], row["grad_norm"], row["lr"]] == pytest.approx([loss, norm, lr], rel=1e-5)
        clipped.append(norm > 0.8)
    assert {*clipped} == {True, False}


def piece_rows(step, size, strategy, ranks, held_out=False, share=0.0):
    """Pieces of many lengths, padded in each micro-batch. p: 0.15 by the mean span, of k = 3; twice that, but
    for DNABERT's masks."""
    rows, p = [], {"random": 0.05, "genemask": 0.075, "global": 0.06}
    for first, texts, generator in micro_batches(size, step, held_out, 21):
        masker = strategy
        if strategy == "cm_step":
            masker = "global" if generator.random() < share else "genemask"
        tokens = cm_gems.cut_pieces(encode(texts), K, first / size, (first + len(texts)) / size)
        centers = data.draw_centers(tokens.shape, p[masker], "cpu") & (tokens > 4)
        masked = cm_gems.MASKERS[masker](tokens, ranks, centers)
        rows += zip(*data.corrupt(tokens, masked, VOCAB))
    return rows


def write_npmi(folder):
    """A table in which no two k-mers share an NPMI; the rank of each token in it, specials last."""
    order = np.random.default_rng(1).permutation(64)
    names = [a + b + c for a in "ATCG" for b in "ATCG" for c in "ATCG"]
    lines = [f"{names[i]},{-n / 10}" for n, i in enumerate(order)]
    (folder / "npmi.csv").write_text("\n".join(["kmer,npmi", *lines]))
    ranks = torch.full((VOCAB,), 64)
    ranks[torch.from_numpy(order) + 5] = torch.arange(64)
    return ranks


@pytest.mark.parametrize("strategy, expected, wide", [
    ("cm_gems", {2: "genemask", 34: "global"}, False), ("cm_step", {55: "cm_step", 71: "cm_step"}, True)])
def test_cm_gems(out, strategy, expected, wide, monkeypatch):
    """Warm-up is 5 % of 100 steps. Two evaluations and it switches: GeneMask to step 20, then Global.

    wide: rows are padded to few lengths, as for a compiled network; that has no effect.
    """
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    ranks = write_npmi(out.parent)
    kept = pretrain("cm_gems", expected, **BERT, out=out, n_inner=32, steps=100, lr=6e-3, weight_decay=0.1,
                    grad_clip=0.8, eval_windows=10, npmi_table="npmi.csv", p_scale=2, strategy=strategy,
                    eval_every=10, switch_drop=99, compile=wide)
    clipped, padded = [], []
    for step, in_force in expected.items():
        lr, row = 6e-3 * linear_rate(step, 100, 5), kept(step).row
        rows = piece_rows(step, 11, in_force, ranks, share=(step - 1) // 10 / 10)
        loss_of = mlm_loss(kept(step).before["config"], rows)
        loss, norm = check_step(step, kept(step), loss_of, DNABERT_ADAM | dict(lr=lr, clip=0.8, decay=0.1))
        assert [row["loss"], row["grad_norm"], row["lr"]] == pytest.approx([loss, norm, lr], rel=1e-5)
        assert row["strategy"] == kept(step).before["strategy"] == in_force
        clipped.append(norm > 0.8)
        padded += [data.PAD in inputs for inputs, _ in rows]
    assert any(clipped) and {*padded} == {True, False}


# FinDNA

def mixer(weights, one_hot):
    """ChordMixer, 2 layers of 6 blocks, tracks of 2 channels: (B, 40, 5) -> latent (B, 40, 14), bases."""
    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
    x = linear("backbone.proj", one_hot.double())
    for i in range(12):
        y = linear(f"backbone.blocks.{i}.fc1", x)
        y = linear(f"backbone.blocks.{i}.fc2", y * (1 + torch.erf(y / math.sqrt(2))) / 2)
        first, *tracks = y.split(2, dim=2)
        x = x + torch.cat([first, *(t.roll(-2 ** g, dims=1) for g, t in enumerate(tracks))], 2)
    return x, linear("head", x)


def findna_loss(mnm, cl, alpha):
    """Eq. 1 of one sequence over its 9 masked bases. mnm, cl: the cross-entropies that Eqs 2 and 7 sum."""
    return (alpha * mnm.sum(1) + (1 - alpha) * cl.sum(1)) / 9


def findna_views(step, reach=20, *numbers):
    """(view_u, target, view_v) of each micro-batch. There are 23 windows; each epoch shuffles them anew."""
    starts, found = window_starts(30), []
    drawn = starts[np.random.default_rng((SEED, 0, 1, 2)).integers(len(starts), size=23)]
    order = np.concatenate([drawn[np.random.default_rng((SEED, epoch, 1, 1)).permutation(23)]
                            for epoch in range(30)])[(step - 1) * 11:]
    for first, texts, _ in micro_batches(11, step, length=30):
        texts = [TEXT[at:at + 30] for at in order[first:first + len(texts)]]
        found.append(findna.make_views(encode(texts), "MDIT+NR", reach, *numbers))
    return found


def with_cls(view):
    """Ten blank [CLS] behind the bases."""
    return torch.cat([view, torch.zeros(len(view), 10, 5)], 1)


def teach(teacher, view_v, center, space, dim):
    """Eqs 5 and 6: the teacher's outputs Q at the [CLS] of a micro-batch, and q."""
    with torch.no_grad():
        Q = mixer(teacher, with_cls(view_v))[space == "projected"][:, -10:]
        return Q, ((Q - center) / 0.04).softmax(dim)


def terms(weights, views, q, space, dim):
    """Cross-entropies (B, 9) of the masked bases and (B, 10) of the [CLS]; the logits of the bases."""
    view_u, target, _ = views
    outputs = mixer(weights, with_cls(view_u))
    logits, P = outputs[1][:, :30], outputs[space == "projected"][:, -10:]
    mnm = -(target * log_softmax(logits)).sum(2)[target.sum(2) > 0].view(len(target), 9)
    cl = torch.zeros(len(target), 10)
    if q is not None:
        cl = -(q * log_softmax(P / 0.1, dim)).sum(dim)       # (B, 10), or over the tokens (B, 5)
    return mnm, cl, logits


FINDNA = [dict(cl_space="latent", alpha=0.3), dict(cl_space="projected", cl_softmax="tokens", alpha=0.3),
          dict(cl_space="latent", alpha=0.3, objective="mnm")]


@pytest.mark.parametrize("flags", FINDNA, ids=lambda flags: " ".join(map(str, flags.values())))
def test_findna(out, flags):
    """Warm-up is 30 % of 40 steps. The batch of step 5 is of two epochs."""
    kept = pretrain("findna", (5, 24), **MIXER, **flags, out=out, steps=40, lr=5e-3, weight_decay=0.2,
                    grad_clip=1, eval_windows=10)
    taught, space, dim = "objective" not in flags, flags["cl_space"], 1 if "cl_softmax" in flags else 2
    alpha, parts, clipped = 0.3 if taught else 1, {}, []
    for step in (5, 24):
        before, after, row = kept(step)
        batch, lr = findna_views(step), 5e-3 * cosine_rate(step, 40, 12)
        asked = [teach(double(before["teacher"]), views[2], before["center"].double(), space, dim)
                 if taught else (None, None) for views in batch]

        def loss_of(weights):
            each = [terms(weights, views, q, space, dim)[:2] for views, (_, q) in zip(batch, asked)]
            mnm, cl = map(torch.cat, zip(*each))
            parts.update(mnm_loss=mnm.mean().item(), cl_loss=cl.mean().item())
            return findna_loss(mnm, cl, alpha).mean()
        loss, norm = check_step(step, kept(step), loss_of, TORCH_ADAM | dict(lr=lr, clip=1, decay=0.2))
        assert [row["loss"], row["grad_norm"], row["lr"]] == pytest.approx([loss, norm, lr], rel=1e-5)
        clipped.append(norm > 1)
        assert row["mnm_loss"] == pytest.approx(parts["mnm_loss"], rel=1e-5)
        if not taught:
            assert "teacher" not in after and "cl_loss" not in row
            continue
        assert row["cl_loss"] == pytest.approx(parts["cl_loss"], rel=1e-5)
        ema = 1 - 0.004 * (1 + math.cos(math.pi * (step - 1) / 40)) / 2
        assert row["ema"] == pytest.approx(ema, abs=1e-12)
        student, old, new = (double(state) for state in (after["model"], before["teacher"], after["teacher"]))
        for name, w in new.items():
            close(w, ema * old[name] + (1 - ema) * student[name], rtol=1e-7, atol=2e-8)
        mean = torch.cat([Q for Q, _ in asked]).mean(0)
        close(after["center"].double(), 0.996 * before["center"] + 0.004 * mean, rtol=1e-6, atol=1e-8)
    assert (space == "latent") == (True in clipped)


# what is measured on held-out windows, and training with dropout around it

def test_randommask_validates_without_dropout(out):
    """Phases 1, 3 and 5 of 32 steps: under the masks in force, DNABERT's (whatever --p) and, at an edge, the
    next phase's."""
    kept = pretrain("randommask", (2, 7, 8, 32), **BERT | dict(dropout=0.3), out=out, steps=32, lr=1e-2,
                    eval_windows=10, p=0.1)
    for step, masks in {2: {"": 1, "_span3": 1, "_next_phase": 2}, 7: {"": 3, "_span3": 1, "_next_phase": 4},
                        32: {"": 5, "_span3": 1}}.items():
        state, row = kept(step).after, kept(step).row
        for name, n_spans in masks.items():
            p = 0.05 if name == "_span3" else 0.1
            loss = mlm_loss(state["config"], randommask_rows(0, 10, n_spans, held_out=True, p=p))
            assert row[f"val_loss{name}"] == pytest.approx(loss(double(state["model"])).item(), rel=1e-5)
    before, row = kept(8).before, kept(8).row
    loss = mlm_loss(before["config"], randommask_rows(8, 11, 4, p=0.1))(double(before["model"])).item()
    assert row["loss"] != pytest.approx(loss, rel=1e-4)      # with dropout again


def test_cm_gems_validates_without_dropout(out):
    """With the masks in force; after the second evaluation also with those that it switches to."""
    ranks = write_npmi(out.parent)
    kept = pretrain("cm_gems", (4, 8, 9, 12), **BERT | dict(dropout=0.3), out=out, n_inner=32, steps=12,
                    lr=1e-2, eval_every=4, eval_windows=10, npmi_table="npmi.csv", p_scale=2, switch_drop=99)

    def loss_of(state, *batch, **flags):
        return mlm_loss(state["config"], piece_rows(*batch, ranks, **flags))(double(state["model"])).item()
    for step, in_force in {4: "genemask", 8: "genemask", 12: "global"}.items():
        state, row = kept(step).after, kept(step).row
        loss, random = (loss_of(state, 0, 10, masker, held_out=True) for masker in (in_force, "random"))
        want = {"val_loss": loss, "val_ppl": math.exp(loss), "val_loss_span3": random}
        if step == 8:
            want["val_ppl_global"] = math.exp(loss_of(state, 0, 10, "global", held_out=True))
        assert {name: row.get(name) for name in want} == pytest.approx(want, rel=1e-5)
    assert kept(9).row["loss"] != pytest.approx(loss_of(kept(9).before, 9, 11, "global"), rel=1e-4)


def test_findna_with_dropout(out):
    """The teacher has none, nor has what is validated; the student has it before and after."""
    kept = pretrain("findna", (5, 6, 7), **MIXER | dict(dropout=0.3), out=out, steps=7, lr=1e-2, alpha=0.3,
                    cl_space="latent", eval_every=6, eval_windows=10)

    def losses(state, batch):
        asked = [teach(double(state["teacher"]), views[2], state["center"].double(), "latent", 2)
                 for views in batch]
        each = [terms(double(state["model"]), views, q, "latent", 2) for views, (_, q) in zip(batch, asked)]
        return (*map(torch.cat, zip(*each)), torch.cat([Q for Q, _ in asked]).mean(0))
    for step in (5, 7):
        before, after, row = kept(step)
        mnm, cl, _, mean = losses(before, findna_views(step))
        close(after["center"].double(), 0.996 * before["center"] + 0.004 * mean, rtol=1e-6, atol=1e-8)
        assert row["loss"] != pytest.approx(findna_loss(mnm, cl, 0.3).mean().item(), rel=1e-4)
    state, row, batch, plain = kept(6).after, kept(6).row, [], []
    for _, texts, _ in micro_batches(10, 0, True, 30):
        batch.append(findna.make_views(encode(texts), "MDIT+NR", 20))
        plain.append(findna.make_views(encode(texts), "M+none", 0))            # the next draws
    mnm, cl, *_ = losses(state, batch)
    plain_mnm, _, logits, _ = losses(state, plain)
    target = torch.cat([target for _, target, _ in plain])
    right = (logits.argmax(2) == target.argmax(2))[target.sum(2) > 0]
    want = {"val_loss": findna_loss(mnm, cl, 0.3).mean(), "val_cl_loss": cl.mean(),
            "val_mnm_loss": plain_mnm.mean(), "val_acc": right.double().mean(),
            "center_norm": state["center"].norm()}
    assert {name: row[name] for name in want} == pytest.approx(
        {name: value.item() for name, value in want.items()}, rel=1e-5)


# fine-tuning

FT = dict(init="random", k=K, block_size=34, n_layer=1, n_head=2, n_embd=16, device="cpu", out="out",
          seed=SEED, seeds=1, batch_size=12, micro_batch_size=5, epochs=8, save_every=1e-9)


def write_tables():
    """{split: (texts, labels)} of 50, 20 and 10 sequences, some longer than one window; written as CSVs."""
    tables, generator = {}, np.random.default_rng(2)
    for split, n in {"train": 50, "dev": 20, "test": 10}.items():
        labels = [i % 2 for i in range(n)]
        texts = [random_dna(generator.integers(20, 60), generator, ("ACGTGT", "ACGTAC")[label])
                 for label in labels]
        rows = [f"{text},{label}" for text, label in zip(texts, labels)]
        with open(f"{split}.csv", "w") as f:
            f.write("\n".join(["sequence,label", *rows]))
        tables[split] = texts, labels
    return tables


def fine_tune(out, tables, **flags):
    """Runs finetune.py; a function (step, seed) -> its checkpoint, and the rows of its log by step."""
    def patch():
        training = importlib.import_module("training")
        save = training.save

        def keeping(state, *args, **kwargs):
            save(state, *args, **kwargs)
            if "id" not in state:                            # not the model that stays
                torch.save(state, out.parent / f"{state['args']['seed']}_{state['step']}.pt")
        training.save = keeping
    csv = ["--csv", *(f"{split}.csv" for split in tables)]
    result = run(csv + command_line(FT | flags), {0: patch}, script="finetune.py")
    assert result.code == 0, result
    logs = [json.loads(line) for path in out.glob("csv_train/*/log.jsonl") for line in open(path)]
    return (lambda step, seed=SEED: torch.load(out.parent / f"{seed}_{step}.pt", weights_only=True),
            {row["step"]: row for row in logs})


def batches_of(lengths, size, seed, epoch):
    """Shuffled, sorted by length (all of these are one part), cut into batches, shuffled again."""
    generator = np.random.default_rng((seed, epoch))
    order = generator.permutation(len(lengths))
    order = order[np.argsort(lengths[order], kind="stable")]
    batches = [order[at:at + size] for at in range(0, len(order), size)]
    return [batches[i] for i in generator.permutation(len(batches))]


class FirstToken(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.bert = models.Bert(models.BertConfig(**config))

    def forward(self, tokens):
        return self.bert.encode(tokens)[:, 0]


def classifier_loss(config, texts, labels):
    """Cross-entropy (n,) of each sequence: its windows of 34 bases one by one, their mean, the head."""
    net = FirstToken(config).double().eval()

    def loss_of(weights):
        losses, bert = [], {name: w for name, w in weights.items() if name.startswith("bert.")}
        for text, label in zip(texts, labels, strict=True):
            parts = [text[at:at + 34] for at in range(0, len(text) - 2, 32)]
            first = torch.cat([functional_call(net, bert, (data.tokenize([part], K),)) for part in parts])
            pooled = torch.tanh(first @ weights["pooler.weight"].T + weights["pooler.bias"]).mean(0)
            losses.append(-log_softmax(weights["out.weight"] @ pooled + weights["out.bias"])[label])
        return torch.stack(losses)
    return loss_of


@pytest.mark.parametrize("protocol, rate, warmup, clip", [("strict", linear_rate, 4, 1),
                                                          ("findna", cosine_rate, 12, 0.5)])
def test_finetune(out, protocol, rate, warmup, clip):
    """40 steps, 5 an epoch; 10 and 30 % of them are warm-up."""
    tables = write_tables()
    texts, labels = tables["train"]
    state, _ = fine_tune(out, tables, protocol=protocol, dropout=0, lr=2e-2, weight_decay=0.3)
    clipped, lengths = [], np.array([*map(len, texts)])
    for step in (3, 7, 16, 24):
        epoch, i = divmod(step - 1, 5)
        index = batches_of(lengths, 12, SEED, epoch)[i]
        kept = Kept(state(step - 1), state(step), None)
        each = classifier_loss(kept.after["config"]["bert"], [texts[i] for i in index],
                               [labels[i] for i in index])
        adam = TORCH_ADAM | dict(lr=2e-2 * rate(step, 40, warmup), clip=clip, decay=0.3)
        loss, norm = check_step(step, kept, lambda weights: each(weights).mean(), adam)
        seen = kept.after["total"] - kept.before["total"]     # both 0 after an evaluation
        assert seen.tolist() == pytest.approx([loss * len(index), len(index)], rel=1e-5)
        clipped.append(norm > clip)
    assert any(clipped)


def test_finetune_scores_dev_without_dropout(out):
    tables = write_tables()
    state, log = fine_tune(out, tables, protocol="strict", dropout=0.3, lr=1e-2)
    config = state(10)["config"]["bert"]
    loss = classifier_loss(config, *tables["dev"])(double(state(10)["model"])).mean().item()
    assert log[10]["dev_loss"] == pytest.approx(loss, rel=1e-5)
    texts, labels = tables["train"]
    index = batches_of(np.array([*map(len, texts)]), 12, SEED, 2)[0]
    each = classifier_loss(config, [texts[i] for i in index], [labels[i] for i in index])
    loss = each(double(state(10)["model"])).sum().item()
    assert state(11)["total"][0].item() != pytest.approx(loss, rel=1e-4)


def test_a_seed_sets_head_dev_and_order(out):
    """Two seeds from the same weights, which a learning rate of nothing leaves as they are."""
    tables = write_tables()
    texts, labels = tables["train"]
    del tables["dev"]
    training.seed(0)
    config = vars(models.BertConfig(VOCAB, 34, 1, 2, 16, 32, 0.0))
    body = models.Bert(models.BertConfig(**config)).state_dict()
    torch.save({"format": 1, "method": "randommask", "step": 1, "model": body, "optimizer": {}, "data": "",
                "config": config, "args": {"stride": 1}}, "body.pt")
    state, _ = fine_tune(out, tables, protocol="strict", init="body.pt", seeds=2, dropout=0, lr=1e-30,
                         epochs=1)
    heads, rows = [], data.rows_from(texts, labels)
    logs = {json.loads(path.read_text().splitlines()[-1])["dev_loss"] for path in out.glob("*/*/log.jsonl")}
    for seed in (SEED, SEED + 1):
        weights = state(1, seed)["model"]
        close({name: weights[f"bert.{name}"] for name in body}, body, rtol=0, atol=1e-20)
        heads.append(weights["out.weight"])
        parts = [([data.decode(part.bases[a:b]) for a, b in zip(part.offsets, part.offsets[1:])],
                  part.labels.tolist()) for part in data.split_rows(rows, (0.9, 0.1), seed)]
        train, dev = (classifier_loss(config, *part)(double(weights)) for part in parts)
        index = batches_of(np.array([*map(len, parts[0][0])]), 12, seed, 0)[0]
        assert state(1, seed)["total"][0].item() == pytest.approx(train[index].sum().item(), rel=1e-5)
        assert any(loss == pytest.approx(dev.mean().item(), rel=1e-6) for loss in logs)
    assert len(logs) == 2 and (heads[0] - heads[1]).abs().max() > 1e-3


NUMBERS = dict(noise=0.5, flip=0.9, translocation=3, mask_rate=0.2, temp_student=0.3, temp_teacher=0.2,
               ema=0.9, center_momentum=0.7)


def test_findna_takes_its_numbers_from_the_flags(out):
    """Step 5 with other numbers than the paper's: views, Eqs 1 to 8, teacher, center; what is measured."""
    kept = pretrain("findna", (5,), **MIXER, **NUMBERS, out=out, steps=40, lr=5e-3, cl_space="latent",
                    alpha=0.3, eval_every=5, eval_windows=10)
    before, after, row = kept(5)
    student, teacher = double(before["model"]), double(before["teacher"])
    mnm, cl, kept_Q = 0, 0, []
    for view_u, target, view_v in findna_views(5, 3, 0.2, 0.5, 0.9):
        Q = mixer(teacher, with_cls(view_v))[0][:, -10:]
        x, logits = mixer(student, with_cls(view_u))
        q = ((Q - before["center"].double()) / 0.2).softmax(2)
        mnm -= (target * log_softmax(logits[:, :30])).sum().item()
        cl -= (q * log_softmax(x[:, -10:] / 0.3)).sum().item()
        kept_Q.append(Q)
    want = {"mnm_loss": mnm / 66, "cl_loss": cl / 110, "loss": (0.3 * mnm + 0.7 * cl) / 66, "masked": 0.2}
    ema = 1 - 0.1 * (1 + math.cos(math.pi * 4 / 40)) / 2
    for name, w in double(after["teacher"]).items():
        close(w, ema * teacher[name] + (1 - ema) * double(after["model"])[name], rtol=1e-7, atol=2e-8)
    center = after["center"].double()
    close(center, 0.7 * before["center"] + 0.3 * torch.cat(kept_Q).mean(0), rtol=1e-5, atol=1e-7)
    kl, plain, qs = 0, 0, []
    for _, texts, _ in micro_batches(10, 0, True, 30):
        views = [findna.make_views(encode(texts), "MDIT+NR", 3, 0.2, 0.5, 0.9),
                 findna.make_views(encode(texts), "M+none", 0, 0.2)]         # the next draws
        u, v = (views[0][i].double().softmax(2) for i in (0, 2))
        kl += (u * (u / v).log()).sum().item()               # Eq. 10
        Q = mixer(double(after["teacher"]), with_cls(views[0][2]))[0][:, -10:]
        qs.append(((Q - center) / 0.2).softmax(2))
        logits = mixer(double(after["model"]), with_cls(views[1][0]))[1][:, :30]
        plain -= (views[1][1] * log_softmax(logits)).sum().item()
    want |= {"view_kl": kl / 300, "view_kl_sum": kl / 10, "val_mnm_loss": plain / 60}
    q = torch.cat(qs)
    entropy = [-(x * x.log()).sum(-1).mean().item() for x in (q, q.mean(0))]
    want |= {"q_entropy": entropy[0], "mean_q_entropy": entropy[1], "q_information": entropy[1] - entropy[0]}
    assert {name: row[name] for name in want} == pytest.approx(want, rel=1e-4)
