"""findna.py as a user runs it, whole, through faults and in each of its ablations; what finetune.py makes of
its checkpoints."""
import hashlib
import itertools
import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import findna
import finetune                                              # noqa: F401, its imports take long
import models
import training
from harness import (at_call, cases, check_bad_flags, command_line, contents, die, equal, log_rows,
                     random_dna, refused, run, slow, start, stop_two_ranks, wait, wait_rows, write_fasta)

STEPS, K = 8, findna.N_CLS


def tiny(out, **flags):
    """Flags of a run of 8 steps of two micro-batches; 3 steps are an epoch of 24 windows less one."""
    flags = dict(genome=FASTA, length=30, windows=23, n_layer=1, track_size=2, hidden=8, lr=3e-3, steps=STEPS,
                 batch_size=8, micro_batch_size=4, eval_every=4, eval_windows=10, log_every=1, save_every=3,
                 device="cpu", out=out) | flags
    return command_line(flags)


def pretrain(args, patches={}, ranks=1):
    return run(args, patches, ranks, script="findna.py")


def checkpoint(path):
    state = torch.load(path, weights_only=True)
    return {key: state[key] for key in ("step", "model", "optimizer", "teacher", "center")}


@pytest.fixture(scope="module", autouse=True)
def left_alone(tmp_path_factory):
    """The run that nothing disturbs, with the checkpoint of every step, in the folder WHOLE."""
    global FASTA, WHOLE
    folder, rng = tmp_path_factory.mktemp("whole"), np.random.default_rng(0)
    FASTA = write_fasta(folder / "genome.fa", {"a": random_dna(4000, rng), "b": random_dna(3000, rng)})
    WHOLE = folder / "out"
    assert pretrain(tiny(WHOLE, keep=range(1, STEPS + 1))).code == 0


def stopped(out, step):
    """Makes a run folder as a stop after `step` leaves it, but with rows of later steps in its log."""
    out.mkdir()
    shutil.copy(WHOLE / "log.jsonl", out)
    return shutil.copy(WHOLE / f"step_{step}.pt", out / "last.pt")


def check_resume(out, ranks=1, **flags):
    """Resumes the run in `out`; it must end as the one left alone."""
    result = pretrain(tiny(out, resume=True, **flags), ranks=ranks)
    assert set(result.codes) == {0}, result.err
    equal(checkpoint(out / "last.pt"), checkpoint(WHOLE / "last.pt"))
    assert log_rows(out) == log_rows(WHOLE)


def test_whole_run_is_what_the_paper_says():
    """Teacher, center and losses of each step from the checkpoint before, in float64."""
    rows, genome, before = log_rows(WHOLE), data.Genome(FASTA), None
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    table = data.window_table(genome.split(30)[0], 30)
    windows = data.draw_starts(table, 23, np.random.default_rng((42, 0, 1, 2)))
    config = models.ChordMixerConfig(40, 1, 2, 8)
    student, teacher = (models.BaseModel(models.ChordMixer(config)).double() for _ in range(2))
    for step, row in enumerate(rows, 1):
        state = torch.load(WHOLE / f"step_{step}.pt", weights_only=True)
        if before:
            student.load_state_dict(before["model"]), teacher.load_state_dict(before["teacher"])
            center, total, Q = before["center"].double(), 0, []
            for i in range(2):
                training.seed(42, step, i)
                starts = findna.pass_over(windows, 42, (step - 1) * 8 + 4 * i, 4)
                views = findna.make_views(data.take_windows(genome.bases, starts, 30), "MDIT+NR", 20)
                view_u, target, view_v = (F.pad(view.double(), (0, 0, 0, K)) for view in views)
                with torch.no_grad():
                    (x, logits), (y, _) = student(view_u), teacher(view_v)
                q, log_p = ((y[:, -K:] - center) / 0.04).softmax(2), (x[:, -K:] / 0.1).log_softmax(2)
                total += np.array([-(logits.log_softmax(2) * target).sum() / 9, -(q * log_p).sum() / K]) / 8
                Q.append(y[:, -K:])
            got = row["mnm_loss"], row["cl_loss"], row["loss"]
            assert got == pytest.approx([*total, total.mean()], rel=1e-5)
            want = 0.996 * center + 0.004 * torch.cat(Q).mean(0)
            torch.testing.assert_close(state["center"].double(), want, rtol=1e-4, atol=1e-7)
            ema = 1 - 0.004 * (math.cos(math.pi * (step - 1) / STEPS) + 1) / 2
            for name, p in before["teacher"].items():
                want = ema * p.double() + (1 - ema) * state["model"][name].double()
                torch.testing.assert_close(state["teacher"][name].double(), want, rtol=1e-5, atol=1e-7)
        before = state
    want = {"val_loss", "val_mnm_loss", "val_acc", "val_cl_loss", "view_kl", "view_kl_sum", "center_norm",
            "q_entropy", "mean_q_entropy", "q_information", "cls_cos"}
    assert [row["step"] for row in rows if want <= row.keys()] == [4, 8]


@pytest.mark.fault("resume at every step: findna", n=7)
def test_resume_at_every_step(out):
    shutil.copytree(WHOLE, out)
    check_resume(out)                                        # nothing is left to do,
    assert "--resume" in refused(pretrain(tiny(out)))        # nothing is overwritten
    for step in range(1, STEPS):
        shutil.rmtree(out)
        stopped(out, step)
        check_resume(out)


@pytest.mark.fault("checkpoint without a part of the state: findna")
@pytest.mark.parametrize("part", ["model", "optimizer", "teacher", "center"])
def test_lost_state_shows(out, part):
    last, first = stopped(out, 5), torch.load(WHOLE / "step_1.pt", weights_only=True)
    torch.save(torch.load(last, weights_only=True) | {part: first[part]}, last)
    with pytest.raises(AssertionError, match="not equal"):
        check_resume(out)


@pytest.mark.fault("signal at a random moment: findna")
@pytest.mark.parametrize("fault", ["save", "SIGKILL", "SIGTERM"])
def test_killed(out, fault):
    amid = at_call("torch", "save", 2, lambda save, state, file: (file.write(b"P" * 99), file.flush(), die()))
    [process] = start(tiny(out), {0: amid if fault == "save" else slow}, script="findna.py")
    if fault != "save":
        wait_rows(process, out, 4)
        os.kill(process.pid, getattr(signal, fault))
    assert wait(process).code == (143 if fault == "SIGTERM" else -9)
    check_resume(out)


@pytest.mark.fault("stop signal to one rank: findna")
def test_two_ranks_equal_one(out):
    step = stop_two_ranks(tiny(out), out, 3, "findna.py")
    assert 3 <= step == checkpoint(out / "last.pt")["step"] < STEPS
    check_resume(shutil.copytree(out, out.with_name("one")))
    check_resume(out, ranks=2)


ABLATIONS = [dict(batch_size=11), dict(objective="cl", dropout=0.1, fresh_windows=True),
             dict(objective="mnm"), dict(cl_space="projected", cl_softmax="tokens"),
             dict(backbone="transformer", n_embd=8, n_head=2),
             dict(views="MDT+DIT", translocation=30, alpha=0.9)]


@pytest.mark.fault("uneven shares on two ranks: findna")
@pytest.mark.parametrize("flags", ABLATIONS, ids=lambda flags: " ".join(map(str, flags.values())))
def test_ablations_and_uneven_shares_on_two_ranks(out, flags):
    two, objective, alpha = out.with_name("2"), flags.get("objective"), flags.get("alpha", 0.5)
    assert pretrain(tiny(out, **flags)).code == 0 and pretrain(tiny(two, **flags), ranks=2).codes == [0, 0]
    state, other = (torch.load(folder / "last.pt", weights_only=True) for folder in (out, two))
    assert ("teacher" in state) == ("cl_loss" in log_rows(out)[0]) == (objective != "mnm")
    for part in {"model", "teacher", "center"} & state.keys():
        torch.testing.assert_close(state[part], other[part], rtol=0, atol=1e-6)
    for a, b in zip(log_rows(out), log_rows(two), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
        mnm, cl = a["mnm_loss"], a.get("cl_loss")
        want = {"mnm": mnm, "cl": cl}[objective] if objective else alpha * mnm + (1 - alpha) * cl
        assert a["loss"] == pytest.approx(want)
    assert objective or state["center"].shape == (K, flags.get("n_embd", 5 if "cl_space" in flags else 14))


@pytest.mark.fault("loss that is not finite: findna")
@pytest.mark.parametrize("ranks, call", [(1, 74), (1, 80), (2, 38), (2, 44)])
def test_nan(out, ranks, call):
    """In step 4, in the teacher or in the student: 6 blocks each."""
    nan = at_call("torch.nn.functional", "gelu", call, lambda real, x: real(x) * np.nan)
    result = pretrain(tiny(out, log_every=100), {ranks - 1: nan}, ranks=ranks)
    assert result.codes == [3] * ranks and "step 4: not finite" in result.err, result
    assert result.err.count("\n") == 1
    equal(checkpoint(out / "last.pt"), checkpoint(WHOLE / "step_3.pt"))


def test_it_learns_and_warns(out, tmp_path):
    fasta = write_fasta(tmp_path / "a.fa", {"a": "ACGGT" * 1000})
    assert pretrain(tiny(out, genome=fasta, steps=100, lr=0.02, track_size=4, hidden=32, alpha=0.9,
                         views="M+none", log_every=50, eval_every=100)).code == 0
    assert log_rows(out)[-1]["val_acc"] > 0.9
    fasta = write_fasta(tmp_path / "b.fa", {"a": "A" * 5000})                # all sequences are alike
    result = pretrain(tiny("alike", genome=fasta, views="M+none", eval_every=1))
    assert result.code == 0 and result.out.count("warning: ") == 1 and "collapsed" in result.out, result


def test_demo_and_show_masks(out, tmp_path):
    result = pretrain(f"--demo --steps 2 --data_dir {out} --out demo --eval_windows 64 --device cpu".split())
    assert result.code == 0 and "were these never masked" in result.out, result
    before, result = contents(tmp_path), pretrain(tiny(WHOLE, show_masks=3))
    lines = result.out.splitlines()
    assert result.code == 0 and len(lines) == 12 and contents(tmp_path) == before, result
    for said, clean, masked, other in (lines[i:i + 4] for i in range(0, 12, 4)):
        assert "30.0% masked" in said and masked.count(".") == 9 and set(clean + other) <= set("ACGT")
        assert all(a == b or b == "." for a, b in zip(clean, masked, strict=True)) and len(other) == 30


@pytest.mark.fault("flags: findna")
@pytest.mark.parametrize("case", cases("common_flags.json") + cases("findna_flags.json"),
                         ids=lambda c: str(c["args"]))
def test_bad_flags(out, tmp_path, case):
    check_bad_flags(case, pretrain, tiny(out), tmp=tmp_path, fasta=FASTA, whole=WHOLE / "last.pt")


def tune(*args):
    """Rows of results of a run of finetune.py that must succeed."""
    result = run(["--csv", "a.csv", "--device", "cpu", "--out", "ft", *map(str, args)], script="finetune.py")
    assert result.code == 0 and result.err == "", result
    return [json.loads(line) for line in open("ft/results.jsonl")]


@pytest.fixture(scope="module")
def table():
    """Sequences of 8 to 30 bases, all A and C, or G and T."""
    rng = np.random.default_rng(0)
    return [random_dna(rng.integers(8, 31), rng, "AC" if i % 2 else "GT") for i in range(60)]


def write_csv(texts):
    with open("a.csv", "w") as f:
        f.write("sequence,label\n" + "".join(f"{text},{i % 2}\n" for i, text in enumerate(texts)))


def test_finetune_and_probe(out, table):
    init = WHOLE / "last.pt"
    write_csv(table)
    for flags in (["--epochs", 8, "--lr", 0.05], ["--mode", "probe"],
                  ["--mode", "probe", "--pool", "cls", "--eval_network", "student"],
                  ["--epochs", 1, "--head", "mlp", "--blocks", "log2"], ["--epochs", 1, "--pool", "cls"]):
        rows = tune("--init", init, *[f"random:{init}"] * ("--lr" in flags), *flags)
    assert [row["score"] for row in rows[:3]] == [1, 1, 1] and rows[4]["head"] == "mlp"
    assert [row["overrides"] for row in rows] == [{"epochs": 8, "lr": 0.05}] * 2 + [
        {}, {"pool": "cls", "eval_network": "student"}, {"epochs": 1, "head": "mlp", "blocks": "log2"},
        {"epochs": 1, "pool": "cls"}]
    assert [row["n_blocks"] for row in rows] == [None] * 4 + [5, None]
    state, want = torch.load(init, weights_only=True), {}
    for network in ("teacher", "model"):
        digest = hashlib.sha256()
        for name, tensor in state[network].items():
            digest.update(tensor.numpy().tobytes() if name != "head.weight" and name != "head.bias" else b"")
        want[network] = digest.hexdigest()[:12]
    weights = [row["weights"] for row in rows]
    assert weights == [want["teacher"], weights[1], *[want["teacher"], want["model"]], *[want["teacher"]] * 2]
    assert weights[1] not in want.values()                   # fresh ones


def test_predict_and_embed(out, table):
    """A sequence's outputs do not depend on the batch that it is in, and are those of the teacher."""
    init = WHOLE / "last.pt"
    write_csv(table)
    model = tune("--init", init, "--epochs", 8, "--lr", 0.05)[0]["model"]
    write_fasta(out.parent / "all.fa", {f"s{i}": text for i, text in enumerate(table)})
    write_fasta(out.parent / "one.fa", {"s7": table[7]})
    for name, flags in itertools.product(("all", "one"), (
            f"predict --init {model} --out {{0}}.tsv", f"embed --init {init} --out {{0}}.npz --per_base",
            f"embed --init {init} --out {{0}}.cls.npz --pool cls")):
        tool, *args = flags.format(name).split()
        assert run([f"{name}.fa", *args], script=f"tools.{tool}").code == 0
    rows, [row] = ([line.split("\t")[2:] for line in open(f"{name}.tsv")][1:] for name in ("all", "one"))
    assert [row[0] for row in rows] == ["0", "1"] * 30
    assert [float(p) for p in rows[7][1:]] == pytest.approx([float(p) for p in row[1:]], abs=1e-5)
    state = torch.load(init, weights_only=True)
    net = models.BaseModel(models.make_backbone(state["config"]))
    net.load_state_dict(state["teacher"])
    bases = data.one_hot(torch.from_numpy(data.encode(table[7]))[None])
    with torch.no_grad():
        x, y = net(bases)[0][0], net(F.pad(bases, (0, 0, 0, K)))[0][0, -K:]
    for name, i in (("all", 7), ("one", 0)):
        found, cls = np.load(f"{name}.npz"), np.load(f"{name}.cls.npz")["embeddings"]
        here = found["per_base"][found["offsets"][i]:found["offsets"][i + 1]]
        for got, want in ((here, x), (found["embeddings"][i], x.mean(0)), (cls[i], y.mean(0))):
            np.testing.assert_allclose(got, want, atol=1e-5)


def test_finetune_refusals(out, table):
    state = torch.load(shutil.copy(WHOLE / "last.pt", "both.pt"), weights_only=True)
    del state["teacher"], state["center"]
    torch.save(state, "mnm.pt")
    write_csv(table)
    assert pretrain(tiny("t", backbone="transformer", n_embd=8, n_head=2, steps=1, length=21)).code == 0
    write_fasta(out.parent / "all.fa", {"a": "A" * 40})
    for script, args, word in (("finetune.py", "--csv a.csv --init mnm.pt --eval_network teacher", "use student"),
                               ("finetune.py", "--csv a.csv --init t/last.pt --blocks log2", "transformer"),
                               ("tools.embed", "all.fa --init t/last.pt", "40 bases for 31 positions"),
                               ("finetune.py", "--csv a.csv --init random:nowhere.pt", "nowhere.pt"),
                               ("tools.embed", "a.csv --init random:both.pt", "no such checkpoint")):
        assert word in refused(run([*args.split(), "--device", "cpu"], script=script))
    assert tune("--init", "mnm.pt", "--epochs", 1)[0]["mixer"] == state["config"]
