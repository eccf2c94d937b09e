"""The fault campaign, ranks: one dies, hangs, gets a signal or a NaN; torchrun dies; their number changes.

Forked ranks first, then real torchrun. A run that goes on must end like the undisturbed one on one rank."""
import datetime
import importlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import training
from harness import ROOT, at_call, contents, die, equal, log_rows, refused, slow, wait, wait_rows
from methods import (PRETRAINING, STEPS, begin, begin_slowly, check_ending, check_goes_on, each, fault,
                     flags_of, fresh, go, in_save, whole)    # noqa: F401, fixtures


def stop_at_7():
    """Patch: SIGTERM in the seventh step of a process."""
    training = importlib.import_module("training")           # the run's own
    real = training.Run.sum_over_ranks

    def wrapped(self):
        if self.step - self.start == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self)
    training.Run.sum_over_ranks = wrapped


def last_step():
    return training.load("out/last.pt")["step"]


def check_sound(n_least=0):
    """There is a sound checkpoint, or none yet; no log row is lost."""
    step = last_step() if Path("out/last.pt").exists() else 0
    steps = [row["step"] for row in log_rows(Path("out"))]
    assert n_least <= step < STEPS and steps[:step] == [*range(1, step + 1)]


@each("ranks 1, 2, 1 and 2, 1, 2", [(1, 2, 1), (2, 1, 2)], {"findna": 1}, PRETRAINING)
def test_resume_on_other_ranks(fresh, method, case):
    """Stopped after 7 and 14 steps; two micro-batches: every bit is the same."""
    first, second, third = case
    alone = fresh(method)
    assert set(go(method, {0: stop_at_7}, first).codes) == {143} and last_step() == 7
    assert set(go(method, {second - 1: stop_at_7}, second).codes) == {143} and last_step() == 14
    check_goes_on(method, alone, third)


@each("stop signal to one rank", [1], {"randommask": 1}, PRETRAINING)
def test_stop_signal_to_one_rank(fresh, method, case):
    """Both ranks stop after the same step."""
    alone = fresh(method)
    processes = begin_slowly(method, 8, ranks=2)
    os.kill(processes[case].pid, signal.SIGTERM)
    assert wait(*processes).codes == [143, 143]
    assert 8 <= log_rows(Path("out"))[-1]["step"] == last_step() < STEPS
    check_goes_on(method, alone, 2)


def check_ranks_agree(fresh, method, ranks, tolerance, **flags):
    """More ranks end like one: losses within 1e-5 relative, weights within tolerance."""
    found = []
    for n in (1, ranks):
        fresh(method)
        assert go(method, ranks=n, **flags).codes == [0] * n
        found.append((log_rows(Path("out")), training.load("out/last.pt")["model"]))
    (rows, weights), (rows_there, weights_there) = found
    for a, b in zip(rows, rows_there, strict=True):
        assert a["step"] == b["step"] and a["loss"] == pytest.approx(b["loss"], rel=1e-5 * (tolerance > 0))
    torch.testing.assert_close(weights, weights_there, rtol=0, atol=tolerance)


@each("2 and 4 ranks, 4 micro-batches", [2, 4], {}, PRETRAINING)
def test_four_micro_batches(fresh, method, case):
    check_ranks_agree(fresh, method, case, 1e-3, micro_batch_size=2, steps=40)


# 4 + 3: one micro-batch a rank, so that the order of the sums is the same; 4 + 4 + 3: it is not
@each("uneven shares on two ranks", [(11, 1e-3), (7, 0)], {"randommask": 2}, ["randommask", "cm_gems"])
def test_uneven_shares(fresh, method, case):
    batch_size, tolerance = case
    check_ranks_agree(fresh, method, 2, tolerance, batch_size=batch_size)


@each("replicas at the end", [2], {"findna": 1}, PRETRAINING)
def test_replicas_are_equal(fresh, method, case):
    def tell(rank):
        def finish(real, *args):
            main = sys.modules["__main__"]
            state = {name: getattr(main, name).state_dict() for name in ("model", "teacher", "optimizer")
                     if hasattr(main, name)} | {"center": getattr(main, "center", None)}
            torch.save(state | {"curriculum": getattr(main, "curriculum", None)}, f"{rank}.pt")
            real(*args)
        return at_call("training", "finish", 1, finish)
    alone = fresh(method)
    assert go(method, {rank: tell(rank) for rank in range(case)}, case).codes == [0] * case
    check_ending(method, alone)
    states = [torch.load(f"{rank}.pt", weights_only=True) for rank in range(case)]
    assert states[0].pop("curriculum") == states[1].pop("curriculum")
    equal(*states)
    equal(states[0]["model"], training.load("out/last.pt")["model"])


@each("fewer micro-batches than ranks", [2], dict.fromkeys(PRETRAINING, 1), PRETRAINING)
def test_too_many_ranks(fresh, method, case):
    fresh(method)
    before = contents(Path())
    result = go(method, ranks=case, batch_size=4)
    assert "--micro_batch_size" in refused(result) and contents(Path()).keys() <= before.keys()


@fault("rank that leaves while another joins")
def test_a_rank_leaves_early(fresh):
    """The other rank exits with 2 as well; only the message of the one that left names the cause."""
    def leave(*_, **__):
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = torch.distributed.TCPStore(*where, is_master=True, wait_for_workers=False)
        time.sleep(1)
        raise ValueError(f"all is wrong, {store.port}")
    fresh("randommask")
    processes = begin("randommask", {0: at_call("torch.distributed", "init_process_group", 1, leave)}, 2)
    assert "all is wrong" in refused(wait(*processes))
    last = wait(processes[1]).err.splitlines()[-1]           # after torch's own messages
    assert last.startswith("error: rank 1 cannot join") and not Path("out").exists()


def fail(*_):
    raise RuntimeError("as of a broken GPU")


@each("dead rank", [(1, 16, die), (0, 16, die), (0, 9, die), (1, 25, fail), (0, 25, fail)], {"findna": 1},
      PRETRAINING)
def test_a_rank_dies(fresh, method, case):
    victim, call, how = case
    alone, start = fresh(method), time.monotonic()
    codes = go(method, {victim: at_call("training", "all_reduce", call, how)}, 2).codes
    assert codes[victim] == (-9 if how is die else 1) and codes[1 - victim] not in (0, 143)
    assert time.monotonic() - start < 60                     # torch would wait for 30 minutes
    check_sound()
    check_goes_on(method, alone, 1 + victim)


def short_timeout():
    """Patch: collectives wait 3 seconds for each other, not 30 minutes."""
    real = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda *args, **kwargs: real(
        *args, **kwargs, timeout=datetime.timedelta(seconds=3))


@each("hanging rank", {"randommask": [1, 0], "findna": [1], "cm_gems": [1]}, {"randommask": 1})
def test_a_rank_hangs(fresh, method, case):
    alone = fresh(method)
    processes = begin(method, dict.fromkeys((0, 1), lambda: (short_timeout(), slow())), 2)
    wait_rows(processes[0], Path("out"), 6)
    os.kill(processes[case].pid, signal.SIGSTOP)
    processes[1 - case].join(60)
    assert processes[1 - case].exitcode == 1
    processes[case].kill()
    wait(*processes)
    check_sound(4)
    check_goes_on(method, alone)


# called once for each micro-batch by a loss, six times by a student or a teacher
NAN = {"randommask": ("cross_entropy", 1), "cm_gems": ("cross_entropy", 1), "findna": ("gelu", 6)}


def check_nan(fresh, method, ranks, victim, in_teacher=False, log_every=1):
    """A NaN in step 7 of a rank: all stop with 3 before the weights change, and keep log and checkpoint."""
    (name, n), alone = NAN[method], fresh(method)
    nan = at_call("torch.nn.functional", name, 6 * n * 2 // ranks + 1,         # 2 micro-batches a step
                  lambda real, *args, **kwargs: real(*args, **kwargs) * np.nan,
                  only=lambda x, *_: x.requires_grad != in_teacher)
    flags = dict(log_every=log_every, eval_every=99 if in_teacher else 2)      # evaluations have no gradient
    result = go(method, {victim: nan}, ranks, **flags)
    assert result.codes == [3] * ranks and "step 7: not finite" in result.err, result
    assert result.err.count("\n") == 1 and "out" in result.err
    assert log_rows(Path("out"))[-1]["step"] == last_step() == 6
    equal(*(training.load(path)["model"] for path in ("out/last.pt", alone / "steps/6.pt")))
    return alone


@each("NaN on one rank", {"cm_gems": [1, 0], "randommask": [0], "findna": [0]}, {"cm_gems": 1})
def test_nan_on_one_rank(fresh, method, case):
    alone = check_nan(fresh, method, 2, case)
    check_goes_on(method, alone, 2)


EVERYWHERE = [dict(ranks=ranks, **where) for where in ({}, {"log_every": 99}) for ranks in (1, 2)]
IN_TEACHER = [dict(ranks=ranks, **where) for where in ({}, {"in_teacher": True}) for ranks in (1, 2)]


@each("loss that is not finite", {"findna": IN_TEACHER, "randommask": EVERYWHERE, "cm_gems": EVERYWHERE},
      {"findna": 3})
def test_loss_is_not_finite(fresh, method, case):
    check_nan(fresh, method, victim=case["ranks"] - 1, **case)


@each("full disk on two ranks", [2], {"randommask": 1}, PRETRAINING)
def test_full_disk(fresh, method, case):
    """Rank 0, which writes, names the cause; rank 1 does not wait for it for ever."""
    alone, start = fresh(method), time.monotonic()
    full = in_save(case, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999)))
    result = go(method, full, 2)
    assert result.code == 2 and result.err.startswith("error: cannot write") and result.codes[1], result
    assert time.monotonic() - start < 60 and last_step() == case - 1
    check_goes_on(method, alone, 2)


@each("broken last.pt, two ranks", {"findna": [5], "randommask": [13], "cm_gems": [13]}, {"findna": 1})
def test_the_checkpoint_before(fresh, method, case):
    alone = fresh(method, case)
    os.rename("out/last.pt", "out/prev.pt")
    Path("out/last.pt").write_bytes(Path("out/prev.pt").read_bytes()[:9999])
    check_goes_on(method, alone, 2)


LAUNCH = """import os, runpy, sys
sys.path[:0] = {paths!r}
import harness, test_fault_ranks
test_fault_ranks.short_timeout() if os.environ.get("SHORT") else None
harness.slow()
if os.environ.get("FAIL") == os.environ["RANK"]:
    harness.at_call("training", "all_reduce", 16, test_fault_ranks.fail)()
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def torchrun():
    """torchrun(method, env): starts two slow workers; returns (launcher, their pids) after 6 log rows."""
    started = []

    def launch(method, env={}):
        script, paths = str(ROOT / f"{method}.py"), [str(ROOT / x) for x in ("", "tests", "tests/faults")]
        Path("launch.py").write_text(LAUNCH.format(paths=paths, script=script))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        launcher = subprocess.Popen([*command, "launch.py", *flags_of(method)], stdout=open("stdout", "w"),
                                    stderr=open("stderr", "w"), env=os.environ | env, start_new_session=True)
        started.append(launcher.pid)
        log, deadline = Path("out/log.jsonl"), time.monotonic() + 90
        while not log.exists() or log.read_text().count("\n") < 6:
            assert launcher.poll() is None and time.monotonic() < deadline, Path("stderr").read_text()[-999:]
            time.sleep(0.01)
        pids = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        workers = [int(pid) for pid in pids if b"launch.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        workers.sort(key=lambda pid: b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
        started.extend(workers)
        assert len(workers) == 2
        return launcher, workers
    yield launch
    for pid in filter(alive, started):
        os.kill(pid, signal.SIGKILL)


def send(which, *to):
    """Fault: sends a signal to the launcher (L), rank 0 or rank 1."""
    def fault(launcher, workers):
        for target in to:
            os.kill(launcher.pid if target == "L" else workers[target], which)
    return fault


# (method, what, fault, does the stop write a checkpoint, seconds until all are gone, environment)
TORCHRUN = [
    ("randommask", "SIGTERM to torchrun", send(signal.SIGTERM, "L"), True, 20, {}),
    ("findna", "SIGTERM to torchrun and all ranks", send(signal.SIGTERM, "L", 0, 1), True, 20, {}),
    ("cm_gems", "SIGINT (Ctrl-C) to torchrun and all ranks", send(signal.SIGINT, "L", 0, 1), True, 20, {}),
    ("findna", "SIGTERM to rank 1", send(signal.SIGTERM, 1), True, 20, {}),
    ("cm_gems", "SIGUSR1 to rank 0", send(signal.SIGUSR1, 0), True, 20, {}),
    ("randommask", "kill -9 of torchrun", send(signal.SIGKILL, "L"), True, 20, {}),
    ("cm_gems", "kill -9 of torchrun", send(signal.SIGKILL, "L"), True, 20, {}),
    ("findna", "kill -9 of rank 0", send(signal.SIGKILL, 0), False, 45, {}),
    ("randommask", "kill -9 of rank 1", send(signal.SIGKILL, 1), False, 45, {}),
    ("cm_gems", "exception in rank 1", send(signal.SIGCONT, 1), False, 45, {"FAIL": "1"}),
    ("findna", "rank 1 hangs", send(signal.SIGSTOP, 1), False, 60, {"SHORT": "1"})]      # torchrun waits 30 s


@pytest.mark.slow
@pytest.mark.parametrize("method, act, stops, seconds, env", [
    pytest.param(method, *case, marks=fault(f"torchrun: {what}"), id=f"{what}-{method}")
    for method, what, *case in TORCHRUN])
def test_torchrun(fresh, torchrun, method, act, stops, seconds, env):
    alone = fresh(method)
    launcher, workers = torchrun(method, env)
    act(launcher, workers)
    start = time.monotonic()
    assert launcher.wait(seconds) != 0
    while any(map(alive, workers)):                          # no orphan stays
        assert time.monotonic() - start < seconds
        time.sleep(0.05)
    if stops:
        assert log_rows(Path("out"))[-1]["step"] == last_step() and 6 <= last_step() < STEPS
        assert f"stopped  by a signal after step {last_step()};" in Path("stdout").read_text()
    check_sound(4)
    check_goes_on(method, alone, 2)


@fault("torchrun: hash seed, locale, time zone")
def test_torchrun_in_another_environment(fresh, torchrun):
    alone = fresh("randommask")
    launcher, _ = torchrun("randommask", dict(PYTHONHASHSEED="7", LC_ALL="C", TZ="Asia/Tokyo"))
    assert launcher.wait(60) == 0
    check_ending("randommask", alone)
