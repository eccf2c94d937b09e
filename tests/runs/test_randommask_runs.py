"""randommask.py as a user runs it, whole and through faults. What goes on must end, bit by bit, where the
same run left alone ends: weights, Adam's moments and log."""
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import models
import training
from harness import (ROOT, at_call, cases, check_bad_flags, checkpoint, command_line, contents, die, equal,
                     log_rows, refused, run, slow, start, stop_two_ranks, wait, wait_rows, write_case,
                     write_fasta, write_genome)

STEPS = 20


def tiny(out, **flags):
    """Flags of a run of 20 steps of two micro-batches; the same but for `flags`, so that runs compare."""
    flags = dict(genome=FASTA, k=3, block_size=22, n_layer=1, n_head=2, n_embd=16, lr=3e-3, batch_size=8,
                 micro_batch_size=4, steps=STEPS, eval_every=5, eval_windows=10, log_every=1, save_every=5,
                 keep=STEPS, device="cpu", out=out) | flags
    return command_line(flags)


@pytest.fixture(scope="module", autouse=True)
def left_alone(tmp_path_factory):
    """The run that nothing disturbs, with the checkpoint of every step, in the folder WHOLE."""
    global FASTA, WHOLE
    folder = tmp_path_factory.mktemp("whole")
    FASTA, WHOLE = write_genome(folder / "genome.fa"), folder / "out"
    assert run(tiny(WHOLE, keep=range(1, STEPS + 1))).code == 0


def stopped(out, step=10):
    """Makes a run folder as a stop after `step` leaves it, but with rows of later steps in its log."""
    out.mkdir()
    shutil.copy(WHOLE / "log.jsonl", out)
    return shutil.copy(WHOLE / f"step_{step}.pt", out / "last.pt")


def check_equal(out, log=True):
    equal(checkpoint(out / "last.pt"), checkpoint(WHOLE / "last.pt"))
    assert not log or log_rows(out) == log_rows(WHOLE)


def check_resume(out, log=True, ranks=1, **flags):
    """Resumes the run in `out`; it must end as the one left alone."""
    result = run(tiny(out, resume=True, **flags), ranks=ranks)
    assert set(result.codes) == {0}, result.err
    check_equal(out, log)
    return result.out


@pytest.mark.fault("resume of a finished run: randommask")
def test_whole_run(out):
    rows = log_rows(WHOLE)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["phase"] for row in rows] == [1, 2, 3, 3, 4, 4] + [5] * 14
    assert [row["step"] for row in rows if "val_loss" in row] == [1, 2, 4, 5, 6, 10, 15, 20]
    assert [row["step"] for row in rows if "val_loss_next_phase" in row] == [1, 2, 4, 6]
    assert all(0 < row["masked"] < 0.6 and 3 < row["loss"] < 6 for row in rows)
    shutil.copytree(WHOLE, out)
    assert "done" in check_resume(out)                       # nothing is left to do,
    assert "--resume" in refused(run(tiny(out)))             # nothing is overwritten
    assert contents(out) | {"args.json": 0} == contents(WHOLE) | {"args.json": 0}


def test_schedule_clipping_and_decay():
    rates = [training.linear(step, 20, 4) for step in range(1, 21)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1] + [n / 17 for n in range(16, 0, -1)])
    model = models.Bert(models.BertConfig(69, 22, 1, 2, 16, 32))
    for clip in (0.1, 1e9):
        want = [torch.randn_like(p) for p in model.parameters()]
        for p, grad in zip(model.parameters(), want, strict=True):
            p.grad = grad / 0.25
        norm = training.scale_gradients(model, torch.tensor(0.25), clip)
        total = torch.cat([grad.flatten() for grad in want]).norm()
        torch.testing.assert_close(norm, total)
        want = [grad * min(1, clip / total) for grad in want]
        torch.testing.assert_close([p.grad for p in model.parameters()], want)
    groups = training.make_optimizer(model, 1, 0.1, (0.9, 0.98), 1e-6).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, p in model.named_parameters():                 # as DNABERT: none on biases and LayerNorm
        assert decays.pop(id(p)) == (0 if "bias" in name or "ln_" in name else 0.1), name
    assert not decays


@pytest.mark.fault("resume at every step: randommask", n=19)
def test_resume_at_every_step(out):
    for step in range(1, STEPS):
        stopped(out, step)
        check_resume(out)
        shutil.rmtree(out)


@pytest.mark.fault("kill inside a save: randommask")
@pytest.mark.parametrize("module, name, n, when, to", [
    ("torch", "save", 2, "before", ""), ("torch", "save", 2, "amid", ""),
    ("os", "fsync", 2, "before", ""), ("os", "fsync", 3, "before", ""), ("os", "fsync", 3, "after", ""),
    ("os", "link", 1, "before", ""), ("os", "link", 1, "after", ""),
    ("os", "replace", 1, "before", "prev.pt"), ("os", "replace", 1, "after", "prev.pt"),
    ("os", "replace", 2, "after", "last.pt"), ("os", "replace", 1, "before", f"step_{STEPS}.pt")])
def test_kill_inside_a_save(out, module, name, n, when, to):
    fault = {"before": die, "after": lambda real, *args: (real(*args), die()),
             "amid": lambda save, state, file: (file.write(b"PK" * 999), file.flush(), die())}[when]
    kill = at_call(module, name, n, fault, only=lambda *args: not to or args[1].endswith(to))
    assert run(tiny(out), {0: kill}).code == -9
    check_resume(out)


@pytest.mark.fault("second run in a run folder: randommask", n=2)
def test_another_environment_is_said(out):
    last = stopped(out)
    assert "made with" not in check_resume(shutil.copytree(out, out.with_name("same")))
    torch.save(torch.load(last, weights_only=True) | {"made_with": "torch 1.0, 96 threads\x1b[2J"}, last)
    said = check_resume(out)
    assert "96 threads\\x1b" in said and f"now torch {torch.__version__}, 1 threads" in said


def test_lock(out):
    [process] = start(tiny(out), {0: slow})
    wait_rows(process, out, 6)
    os.kill(process.pid, signal.SIGSTOP)
    assert "in use" in refused(run(tiny(out, resume=True)))
    assert 0 not in run(tiny(out, resume=True), ranks=2).codes               # rank 1 does not hang, either
    os.kill(process.pid, signal.SIGCONT)
    assert wait(process).code == 0
    check_equal(out)


@pytest.mark.fault("signal at a random moment: randommask")
@pytest.mark.parametrize("names, rows, log_every", [
    ("SIGKILL", 3, 1), ("SIGKILL", 7, 1), ("SIGKILL", 11, 1), ("SIGTERM", 4, 1), ("SIGINT", 9, 1),
    ("SIGUSR1", 6, 100), ("SIGTERM SIGINT SIGUSR1", 4, 1), ("SIGINT SIGTERM SIGTERM", 6, 100)])
def test_signal_at_a_random_moment(out, names, rows, log_every):
    [process] = start(tiny(out, save_every=2 if names == "SIGKILL" else 100, log_every=log_every), {0: slow})
    wait_rows(process, out, rows)
    time.sleep(random.Random(rows).random() * 0.08)
    for name in names.split():
        os.kill(process.pid, getattr(signal, name))
    if names == "SIGKILL":
        assert wait(process).code == -9
        text = (out / "log.jsonl").read_text()
        (out / "log.jsonl").write_text(text[:text.rindex('"lr"')])               # a row half written
    else:
        assert wait(process).code == 143
        assert rows <= checkpoint(out / "last.pt")["step"] == log_rows(out)[-1]["step"] < STEPS
    check_resume(out, log=log_every == 1)


@pytest.mark.fault("stop signal to one rank: randommask")
def test_two_ranks_equal_one(out):
    assert 8 <= stop_two_ranks(tiny(out), out, 8) == checkpoint(out / "last.pt")["step"] < STEPS
    check_resume(shutil.copytree(out, out.with_name("one")))
    check_resume(out, ranks=2)


@pytest.mark.fault("uneven shares on two ranks: randommask")
@pytest.mark.parametrize("batch_size, tolerance", [(7, 0), (11, 1e-4)], ids=["4 + 3", "4 + 4 + 3"])
def test_uneven_shares(out, batch_size, tolerance):
    flags, two, none = dict(batch_size=batch_size, p=0.999, lr=1e-3), out.with_name("2"), out.with_name("no")
    assert run(tiny(out, **flags)).code == 0 and run(tiny(two, **flags), ranks=2).codes == [0, 0]
    weights = [checkpoint(folder / "last.pt")["model"] for folder in (out, two)]
    torch.testing.assert_close(*weights, rtol=0, atol=tolerance)
    for a, b in zip(log_rows(out), log_rows(two), strict=True):
        assert a == pytest.approx(b, rel=tolerance) and a["masked"] == 1         # each sequence once
    result = run(tiny(none, batch_size=4), ranks=2)
    result.codes.pop()                                       # rank 0 may be gone before rank 1 has found it
    assert "--micro_batch_size" in refused(result) and not none.exists()


@pytest.mark.fault("dead rank: randommask")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_dies(out, victim):
    codes = run(tiny(out), {victim: at_call("training", "all_reduce", 16, die)}, ranks=2).codes
    assert codes[victim] == -9 and codes[1 - victim] not in (0, 143)
    check_resume(out)


@pytest.mark.fault("loss that is not finite: randommask")
@pytest.mark.parametrize("log_every, last_row", [(1, 7), (100, 6)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_nan(out, ranks, log_every, last_row):
    nan = at_call("torch.nn.functional", "cross_entropy", 15 if ranks == 1 else 8,             # in step 8
                  lambda real, *args, **kwargs: real(*args, **kwargs) * np.nan, lambda x, *_: x.requires_grad)
    result = run(tiny(out, log_every=log_every, save_every=4), {ranks - 1: nan}, ranks=ranks)
    assert result.codes == [3] * ranks and "step 8" in result.err and result.err.count("\n") == 1, result
    equal(checkpoint(out / "last.pt"), checkpoint(WHOLE / "step_4.pt"))
    assert log_rows(out)[-1]["step"] == last_row and str(out) in result.err


@pytest.mark.fault("torchrun: hash seed, locale, time zone")
def test_torchrun(out):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = os.environ | {"PYTHONHASHSEED": "7", "LC_ALL": "C", "TZ": "Asia/Tokyo"}
    subprocess.run([*command, ROOT / "randommask.py", *tiny(out)], env=env, check=True, capture_output=True)
    check_equal(out)


DAMAGE = {"empty": lambda raw: b"", "half": lambda raw: raw[:9999], "text": lambda raw: b"<html>404</html>",
          "bit": lambda raw: raw[:9999] + bytes([raw[9999] ^ 1]) + raw[10_000:]}
KEYS = ("format", "method", "step", "model", "optimizer", "config", "args", "data")


@pytest.mark.fault("broken last.pt, sound prev.pt: randommask")
@pytest.mark.parametrize("damage", [*DAMAGE, *KEYS])
def test_broken_checkpoint(out, damage):
    last = stopped(out)
    if damage in DAMAGE:
        last.write_bytes(DAMAGE[damage](last.read_bytes()))
    else:                                                    # one key is not there
        torch.save({k: v for k, v in torch.load(last, weights_only=True).items() if k != damage}, last)
    before = contents(out)
    assert "prev.pt" in refused(run(tiny(out, resume=True))) and contents(out) == before
    shutil.copy(WHOLE / "step_7.pt", out / "prev.pt")
    assert "prev.pt" in check_resume(out)


@pytest.mark.fault("checkpoint without a part of the state: randommask")
@pytest.mark.parametrize("part", [*KEYS[2:5], "adam exp_avg", "adam exp_avg_sq", "adam step"])
def test_lost_state_shows(out, part):
    """The tests here can see each part of the state: where it is set back, the run ends elsewhere."""
    last, first = stopped(out), torch.load(WHOLE / "step_1.pt", weights_only=True)
    state = torch.load(last, weights_only=True)
    for moments in state["optimizer"]["state"].values():
        moments |= {name: t * 0 for name, t in moments.items() if f"adam {name}" == part}
    torch.save(state | ({part: first[part]} if part in first else {}), last)
    with pytest.raises(AssertionError, match="not equal"):
        check_resume(out)


@pytest.mark.fault("bit flip in a checkpoint: randommask", n=300)
def test_cut_and_flipped_checkpoints(tmp_path):
    raw, sound, path = (WHOLE / "last.pt").read_bytes(), training.load(WHOLE / "last.pt"), tmp_path / "x.pt"
    flips = np.random.default_rng(3).integers((len(raw), 8), size=(300, 2)).tolist()
    flipped = [raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1:] for at, bit in flips]
    for damaged in [raw[:n] for n in range(0, len(raw), 1999)] + flipped:
        path.write_bytes(damaged)
        try:
            state = training.load(path)                      # a bit that means nothing, as in a date
        except ValueError as e:
            assert "not a readable checkpoint" in str(e)
        else:
            equal([state.pop(key) for key in KEYS[2:5]], [sound[key] for key in KEYS[2:5]])
            assert state.items() <= sound.items() and len(damaged) == len(raw)


@pytest.mark.fault("checkpoint of another run: randommask")
@pytest.mark.parametrize("flag, value", [("seed", 1), ("lr", 0.1), ("micro_batch_size", 2), ("steps", 30),
                                         ("mask", "dnabert"), ("n_embd", 32), ("genome", "other.fa")])
def test_another_run_is_not_resumed(out, tmp_path, flag, value):
    stopped(out)
    text = FASTA.read_text()
    (tmp_path / "other.fa").write_text(text[:-9] + text[-8:])
    (tmp_path / "same.fa").write_text(text.replace("ACG", "acg").replace("\n>", "\n\n>"))
    assert {"genome": "data"}.get(flag, flag) in refused(run(tiny(out, **{"resume": True, flag: value})))
    check_resume(out, genome="same.fa")                      # nothing was touched; bases may lie elsewhere


@pytest.mark.fault("full disk (file size limit): randommask")
def test_full_disk(out):
    raw = stopped(out).read_bytes()
    full = {0: lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(raw) // 2,) * 2)}
    message = refused(run(tiny(out, resume=True), full))
    assert "cannot write" in message and "too large" in message, message
    assert (out / "last.pt").read_bytes() == raw and not list(out.glob("*.tmp"))
    check_resume(out)


def test_init(out, tmp_path):
    state = training.load(WHOLE / "last.pt")
    model = models.Bert(models.BertConfig(**state["config"]))
    model.load_state_dict(state["model"])
    models.save_hf(model, tmp_path / "hf")
    for init in (WHOLE / "last.pt", f"hf:{tmp_path / 'hf'}"):
        assert "n_embd" in refused(run(tiny(out, init=init, n_embd=32))) and not out.exists()
        args = tiny(out, init=init, steps=2, lr=1e-30, weight_decay=0, save_every=1, keep=1)
        assert run(args).code == 0 and "drop one" in refused(run([*args, "--resume"]))
        assert run([a for a in args if a not in ("--init", init, str(init))] + ["--resume"]).code == 0
        torch.testing.assert_close(checkpoint(out / "last.pt")["model"], state["model"], rtol=0, atol=1e-25)
        shutil.rmtree(out)


@pytest.mark.parametrize("mask, phases", [("randommask", 5), ("dnabert", 1)])
def test_show_masks(mask, phases):
    before = contents(WHOLE)
    result = run(tiny(WHOLE, show_masks=40, mask=mask, block_size=102, val_contigs="b"))
    lines = result.out.splitlines()
    assert result.code == 0 and len(lines) == 2 * 40 * phases and contents(WHOLE) == before, result
    for said, shown in zip(lines[::2], lines[1::2]):
        assert set(shown) <= {".", "#"} and len(shown) == 100 and f"{shown.count('#')}.0% masked" in said
    shares = ["".join(lines[80 * i + 1:80 * (i + 1):2]).count("#") / 4000 for i in range(phases)]
    assert 0.1 < shares[0] < 0.2 and (phases == 1 or shares[4] > 0.2)


@pytest.mark.parametrize("mask, stride, p, share", [
    ("dnabert", 1, 0.025, 0.125), ("single", 6, 0.15, 0.15),
    pytest.param("randommask", 1, 1e-9, 0, marks=pytest.mark.fault("numerics: nothing masked"))])
def test_maskings(out, mask, stride, p, share):
    flags = dict(k=6, stride=stride, block_size=14, batch_size=32, micro_batch_size=16, val_contigs="c")
    assert run(tiny(out, **flags, mask=mask, **({"p": p} if share == 0 else {}))).code == 0
    rows = log_rows(out)
    assert np.mean([row["masked"] for row in rows]) == pytest.approx(share, abs=0.03)
    assert {row["phase"] for row in rows} == ({1, 2, 3, 4, 5} if mask == "randommask" else {1})
    assert share or {row["loss"] for row in rows} == {row["grad_norm"] for row in rows} == {0}
    assert ("val_loss_span6" in rows[-1]) == (mask != "single") and (rows[-1]["val_loss"] > 3) == (share > 0)


def test_it_learns_and_the_demo_runs(out, tmp_path):
    fasta = write_fasta(tmp_path / "a.fa", {"a": "ACGT" * 1000})
    assert run(tiny(out, genome=fasta, steps=100, lr=0.01, mask="dnabert", n_embd=32)).code == 0
    assert log_rows(out)[0]["loss"] > 4 and log_rows(out)[-1]["val_loss"] < 1.5  # ln 64 = 4.2, ln 4 = 1.4
    result = run(f"--demo --steps 9 --data_dir {out} --out demo --eval_windows 64 --device cpu".split())
    assert result.code == 0 and "order-3" in result.out, result
    assert log_rows(tmp_path / "demo")[-1]["step"] == 9      # an explicit flag wins


@pytest.mark.fault("flags: randommask")
@pytest.mark.parametrize("case", cases("common_flags.json") + cases("randommask_flags.json"),
                         ids=lambda c: str(c["args"]))
def test_bad_flags(out, tmp_path, case):
    check_bad_flags(case, run, tiny(out), tmp=tmp_path, fasta=FASTA, whole=WHOLE / "last.pt")


@pytest.mark.fault("FASTA cases: randommask")
@pytest.mark.parametrize("case", [c for c in cases("fasta.json") if "word" in c], ids=lambda c: c["name"])
def test_bad_fasta(out, tmp_path, case):
    assert refused(run(tiny(out, genome=write_case(case, tmp_path / "case.fa"))))
    assert not out.exists() and ("split" in case or os.listdir() == ["case.fa"])
