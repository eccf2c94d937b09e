"""--repeat_weight, --strands and --bed in runs of the pretraining scripts, against the text of the FASTA."""
import importlib
import json
import shutil

import numpy as np
import pytest
import torch

from harness import command_line, equal, log_rows, random_dna, refused, run, write_fasta

rng = np.random.default_rng(0)
TEXTS = {"a": random_dna(3000, rng, "ACGTacgt"), "b": random_dna(900, rng) + random_dna(900, rng).lower()}
ALL = "".join(TEXTS.values())
RUN = dict(genome="genome.fa", device="cpu", out="out", batch_size=10, micro_batch_size=4, steps=3,
           log_every=1, eval_every=3, eval_windows=6, n_layer=1, dropout=0)
FLAGS = {"randommask": dict(k=3, n_head=2, n_embd=8, block_size=20),
         "cm_gems": dict(k=3, n_head=2, n_embd=8, block_size=20, n_inner=16),
         "findna": dict(length=30, windows=60, track_size=2, hidden=8)}


def go(script, **flags):
    return run(command_line(RUN | FLAGS[script] | flags), script=f"{script}.py")


def spy(path):
    """Patch: writes the starts of windows, labels, weights and losses of all calls of Bert to a file."""
    def patch():
        data, models = importlib.import_module("data"), importlib.import_module("models")
        take, forward = data.take_windows, models.Bert.forward

        def taking(bases, starts, length):
            taking.starts = starts.tolist()
            return take(bases, starts, length)

        def watched(self, inputs, labels=None, mask=None, capacity=None, weights=None):
            each = -self(inputs, mask=mask).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            row = {"training": torch.is_grad_enabled(), "starts": taking.starts, "labels": labels.tolist(),
                   "weights": None if weights is None else weights.tolist(), "losses": each.tolist()}
            with open(path, "a") as f:
                f.write(json.dumps(row) + "\n")
            return forward(self, inputs, labels, mask, capacity, weights)
        data.take_windows = taking
        models.Bert.forward = lambda self, inputs, labels=None, **more: \
            forward(self, inputs, **more) if labels is None else watched(self, inputs, labels, **more)
    return patch


@pytest.mark.parametrize("strands", ["forward", "both"])
@pytest.mark.parametrize("script", ["randommask", "cm_gems"])
def test_the_weighted_loss_of_a_step(out, script, strands):
    """Over all micro-batches: the sum of weight x loss by that of weights; weights by the FASTA's letters."""
    write_fasta(out.with_name("genome.fa"), TEXTS)
    args = command_line(RUN | FLAGS[script] | dict(repeat_weight=0.1, strands=strands, batch_size=40,
                                                   micro_batch_size=16))
    result = run(args, {0: spy(out.with_name("seen"))}, script=f"{script}.py")
    n_soft = sum(x.islower() for text in TEXTS.values() for x in text)
    assert result.code == 0 and f"repeats  {n_soft:,} bases are in lower case" in result.out, result
    calls = [json.loads(line) for line in out.with_name("seen").open()]
    assert all(call["weights"] is None for call in calls if not call["training"])
    total, seen, other = [], 0, 0
    for call in [call for call in calls if call["training"]]:
        for start, labels, weights, losses in zip(*map(call.get, ("starts", "labels", "weights", "losses"))):
            masked = [i for i, label in enumerate(labels) if label >= 0]
            length = 20 if script == "randommask" else 19    # bases of a window: block_size - 3 + k; - 1
            window = ALL[start:start + length]
            want = [[sum(0.1 if x.islower() else 1 for x in text[i - 1:i + 2]) / 3 for i in masked]
                    for text in (window, window[::-1])]
            got = pytest.approx([weights[i] for i in masked])
            assert want[0] == got or strands == "both" and want[1] == got
            seen, other = seen + bool(masked), other + (want[0] != got)
            total.append([sum(weights[i] * losses[i] for i in masked), sum(weights[i] for i in masked)])
    rows = log_rows(out)
    sums = np.array(total).reshape(3, 40, 2).sum(1)
    assert [row["loss"] for row in rows] == pytest.approx((sums[:, 0] / sums[:, 1]).tolist(), rel=1e-4)
    assert seen > 25 and (0.1 < other / seen < 0.9 if strands == "both" else other == 0)


@pytest.mark.parametrize("objective", ["both", "mnm"])
def test_the_weighted_loss_of_findna(out, objective):
    """Where all bases have the same weight it cancels out, of the gradients too."""
    lower, results = {name: text.lower() for name, text in TEXTS.items()} | {"short": "A"}, []
    for contigs, weights, flags in ((lower, (1, 0.25), {}), (TEXTS, (1, 0.25, 0), dict(lr=1e-30))):
        write_fasta(out.with_name("genome.fa"), contigs)
        for weight in weights:
            assert go("findna", repeat_weight=weight, objective=objective, views="MN+NR", **flags).code == 0
            results.append([log_rows(out), torch.load(out / "last.pt", weights_only=True)["model"]])
            shutil.rmtree(out)
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-5)
    for all_alike, quarter, none in zip(*([row["mnm_loss"] for row in rows] for rows, _ in results[2:])):
        # the share of soft-masked bases that weighted means with these three weights imply: about a half
        share = (none + all_alike / 3 - quarter * 4 / 3) / (none - quarter)
        assert 0.25 < share < 0.75


@pytest.mark.parametrize("script", FLAGS)
def test_bed_is_part_of_a_run(out, script):
    write_fasta(out.with_name("genome.fa"), TEXTS)
    bed = out.with_name("r.bed")
    bed.write_text("chra 100 900\nb 0 500\nb 1700 1800\na 5 9\n")
    result = go(script, bed=bed, val_contigs="b")
    assert result.code == 0 and "4 intervals; its names of a (in all 1) differ by chr" in result.out
    assert "1 of 4 stretches without N, 4 bases, are shorter than a window" in result.out
    model = torch.load(out / "last.pt", weights_only=True)
    moved = bed.rename(out.with_name("moved.bed"))
    flags = dict(steps=3, resume=True, val_contigs="b")
    assert "r.bed: no such file" in refused(go(script, **flags))
    assert go(script, **flags, bed=moved).code == 0
    moved.write_text("a 100 900\nb 0 501\nb 1700 1800\na 5 9\n")
    assert "FASTA and BED files as they were" in refused(go(script, **flags, bed=moved))
    equal(torch.load(out / "last.pt", weights_only=True)["model"], model["model"])
    moved.write_text("a 100 900\nnone 1 5\n")
    shutil.rmtree(out)
    assert "moved.bed: line 2" in refused(go(script, bed=moved)) and not out.exists()


def test_a_run_of_before_these_flags_goes_on(out):
    write_fasta(out.with_name("genome.fa"), TEXTS)
    assert go("randommask", keep=2).code == 0
    state = torch.load(out / "step_2.pt", weights_only=True)
    whole = torch.load(out / "last.pt", weights_only=True)["model"]
    args = json.loads((out / "args.json").read_text())
    for flags in (state["args"], args):
        for name in ("bed", "strands", "repeat_weight"):
            del flags[name]
    (out / "args.json").write_text(json.dumps(args))
    torch.save(state, out / "last.pt")
    assert "strands 'forward' there" in refused(run(["--resume", "--out", "out", "--strands", "both"]))
    assert run(["--resume", "--out", "out"]).code == 0
    equal(torch.load(out / "last.pt", weights_only=True)["model"], whole)


@pytest.mark.parametrize("script", FLAGS)
def test_two_ranks_are_as_one(out, script):
    """Weights and their sums over uneven shares of the batch: 2 and 1 micro-batches."""
    write_fasta(out.with_name("genome.fa"), TEXTS)
    args, rows = command_line(RUN | FLAGS[script] | dict(repeat_weight=0.1)), []
    for ranks in (1, 2):
        assert run(args, ranks=ranks, script=f"{script}.py").code == 0
        rows.append([{name: x for name, x in row.items() if name != "strategy"} for row in log_rows(out)])
        shutil.rmtree(out)
    for one, two in zip(*rows, strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-6)
