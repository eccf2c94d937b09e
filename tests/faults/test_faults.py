"""The fault campaign, death and storage: every method is killed, stopped, filled up and fed broken files.

A run that goes on must end, bit by bit, like the undisturbed one; what cannot go on is refused in one line
and changes nothing. The faults of ranks are in test_fault_ranks.py."""
import collections
import contextlib
import ctypes
import datetime
import errno
import fcntl
import functools
import gzip
import io
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import finetune                                              # noqa: F401, its imports take long
import training
from harness import (ROOT, at_call, cases, changed, contents, die, fork, log_rows, refused, run, wait,
                     wait_rows)
from methods import (METHODS, PRETRAINING, STEPS, begin, begin_slowly, bits, check_ending, check_goes_on,
                     each, fault, flags_of, fresh, go, in_save, run_folder, whole)   # noqa: F401, fixtures

ALL = dict.fromkeys(METHODS, 1)                              # one quick case of each


@each("resume at every step", {"finetune": [12, *range(1, 12), *range(13, STEPS)]} | dict.fromkeys(
      PRETRAINING, [11, *range(1, 11), *range(12, STEPS)]), ALL)
def test_resume_at_every_step(fresh, method, case):
    check_goes_on(method, fresh(method, case))


OUT_ALONE = ["--resume", "--out", "out"]


@each("resume with --out alone", [[], ["--save_every", 3], ["--lr", 0.003]], {"cm_gems": 2}, PRETRAINING)
def test_resume_takes_the_flags_from_the_run(fresh, method, case):
    """A flag beside --resume may be one that may change, or have the value that it had."""
    whole = fresh(method, 9)
    result = run(OUT_ALONE + case, script=f"{method}.py")
    assert result.code == 0, result
    check_ending(method, whole)


WRONG = {"empty": "", "cut": '{"steps": 20, "l', "a list": "[]"}                # in place of args.json


@each("resume with wrong flags", ["--lr", "missing", *WRONG], {"randommask": 5}, PRETRAINING)
def test_resume_with_wrong_flags(fresh, method, case):
    """A flag of another value, named with both values; an args.json that cannot be read, or is missing."""
    whole, path = fresh(method, 9), Path("out/args.json")
    sound, flags, words = path.read_text(), [], ["args.json"]
    if case in ("--lr", "missing"):
        flags, words = ["--lr", 0.5], ["lr", "0.5", "0.003"]
    if case == "missing":                                    # then the flags are those in the checkpoint
        path.unlink()
    elif case != "--lr":
        path.write_text(WRONG[case])
    before = contents(Path("out"))
    result = run(OUT_ALONE + flags, script=f"{method}.py")
    message = refused(result)
    assert ("args.json is missing" in result.out) == (case == "missing"), result
    assert all(word in message for word in words) and contents(Path("out")) == before, message
    if case == "missing":
        assert run(OUT_ALONE, script=f"{method}.py").code == 0
        check_ending(method, whole)
        assert json.loads(path.read_text()) == json.loads(sound) | {"resume": True}
    else:
        path.write_text(sound)
        check_goes_on(method, whole)


def flag_cases():
    """The flags of the case tables; the common ones are quick for one method, slow for the others."""
    for method, table in itertools.product(PRETRAINING, ("common", "own")):
        slow = [pytest.mark.slow] if table == "common" and method != "randommask" else []
        for case in cases(f"{method if table == 'own' else table}_flags.json"):
            yield pytest.param(method, case, id=f"{method} {case['args']}",
                               marks=[fault(f"flags: {method}"), *slow])


@pytest.mark.parametrize("method, case", [*flag_cases()])
def test_wrong_flags(fresh, tmp_path, method, case):
    """Refused in one line with the word of the case; nothing is printed or made."""
    if case.get("no_cuda") and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    names = {"whole": fresh(method) / "out/last.pt", "tmp": tmp_path, "fasta": "genome.fa"}
    flags = case["args"].split() if isinstance(case["args"], str) else case["args"]
    before = os.listdir()
    flags = [flag.format(**names) for flag in flags]
    result = run(changed(flags_of(method), flags), script=f"{method}.py")
    assert case["word"].format(**names) in refused(result) and result.out == "" and os.listdir() == before


@each("resume of a finished run", [range(2)], {"findna": 1, "finetune": 1})
def test_a_finished_run_stays(fresh, survived, method, case):
    """The command of a finished run changes nothing, nor does a start over it; also without last.pt."""
    whole = fresh(method, STEPS)
    check_goes_on(method, whole)
    before = contents(Path())
    out = check_goes_on(method, whole).out
    assert ("done before, see out/results.jsonl" if method == "finetune" else "\ndone  ") in out
    assert contents(Path()) == before
    survived()
    if method != "finetune":
        assert "holds a run" in refused(go(method, resume=False))
        os.rename("out/last.pt", "out/prev.pt")
        assert "holds a run" in refused(go(method, resume=False))
        os.rename("out/prev.pt", "out/last.pt")
    assert contents(Path()) == before
    survived()


@each("kill -9 at random", range(20), {"cm_gems": 1, "finetune": 1})
def test_kill_at_random(fresh, method, case):
    rng, code = random.Random(case), 0
    while code != -9:                                    # it may have ended before
        whole = fresh(method)
        [process] = begin(method)
        time.sleep(rng.random() * 0.5)
        process.kill()
        code = wait(process).code
    check_goes_on(method, whole)


def after(real, *args):
    real(*args)
    die()


def amid(save, state, file):
    """Half of a checkpoint is written."""
    raw = io.BytesIO()
    save(state, raw)
    file.write(raw.getvalue()[:raw.tell() // 2])
    file.flush()
    die()


def last(_, to):
    return to.endswith("last.pt")


def prev(_, to):
    return to.endswith("prev.pt")


def milestone(_, to):
    return to.endswith(f"step_{STEPS}.pt")


POINTS = {
    "opened": at_call("torch", "save", 1, die), "amid": at_call("torch", "save", 1, amid),
    "before fsync": at_call("os", "fsync", 1, die), "after fsync": at_call("os", "fsync", 1, after),
    "before rename": at_call("os", "replace", 1, die, only=last),
    "after rename": at_call("os", "replace", 1, after, only=last),
    "after the folder's fsync": at_call("os", "fsync", 2, after),
    "before prev.pt is linked": at_call("os", "link", 1, die), "after it": at_call("os", "link", 1, after),
    "before prev.pt is renamed": at_call("os", "replace", 1, die, only=prev),
    "after prev.pt is renamed": at_call("os", "replace", 1, after, only=prev),
    "before a milestone is renamed": at_call("os", "replace", 1, die, only=milestone)}
SAVES = [("before rename", 5), ("before prev.pt is renamed", 3), ("amid", 3),  # the first save has no prev.pt
         *itertools.product([*POINTS][:7], (1, 2)), *itertools.product([*POINTS][:11], (4,))]


@each("kill inside a save", {method: SAVES for method in METHODS} | {
      "randommask": [*SAVES, ("before a milestone is renamed", STEPS)]}, {"randommask": 3, "finetune": 1})
def test_kill_inside_a_save(fresh, method, case):
    point, n = case
    whole = fresh(method)
    assert go(method, in_save(n, POINTS[point])).code == -9
    assert {path.name for path in Path("out").rglob("*.tmp")} <= {"last.pt.tmp", "link.tmp"}
    check_goes_on(method, whole)


@pytest.mark.parametrize("n", [
    pytest.param(20, marks=fault("kill -9 in a tight save loop", n=20)),
    pytest.param(80, marks=[fault("kill -9 in a tight save loop", n=80), pytest.mark.slow])])
def test_kill_in_a_tight_save_loop(tmp_path, survived, n):
    model, rng = torch.nn.Linear(100, 100), random.Random(n)
    state = dict(method="m", model=model.state_dict(), optimizer={}, config={}, args={}, data="")

    def loop():
        for step in itertools.count():
            training.save(state | {"step": step}, tmp_path)
            os.pwrite(1, b"%9d" % step, 0)
    training.save(state | {"step": 0}, tmp_path)
    for _ in range(n):
        process = fork(loop)
        time.sleep(0.02 + rng.random() * 0.05)
        process.kill()
        result = wait(process)
        assert result.code == -9 and result.err == ""
        step, printed = training.load(tmp_path / "last.pt")["step"], int(result.out or -1)
        assert printed < 0 or step in (printed, printed + 1)
        survived()


def check_stopped(method, result):
    """Exit code 143, a checkpoint of the last step, the log with its row."""
    step = training.load(run_folder(method) / "last.pt")["step"]
    assert result.code == 143 and result.err == "" and step < STEPS, result
    assert f"stopped  by a signal after step {step};" in result.out
    assert method == "finetune" or log_rows(run_folder(method))[-1]["step"] == step


def begin_and_wait(method, rng, **flags):
    """Starts a slow run and waits for up to half of its log."""
    [process] = begin_slowly(method, rng.randint(1, 2 if method == "finetune" else 5), **flags)
    return process


@each("signal at a random moment", ["SIGTERM", "SIGKILL", "SIGINT", "SIGUSR1", "SIGHUP", "SIGUSR2",
                                       "SIGXCPU"], {"findna": 2, "finetune": 1})
def test_signal_at_a_random_moment(fresh, method, case):
    """SIGKILL, and the last log row is cut; stop signals, while only evaluations are logged."""
    rng, whole = random.Random(case), fresh(method)
    sparse = {} if case == "SIGKILL" or method == "finetune" else {"log_every": 99}
    process = begin_and_wait(method, rng, **sparse)
    time.sleep(rng.random() * 0.08)
    os.kill(process.pid, getattr(signal, case))
    result, log = wait(process), run_folder(method) / "log.jsonl"
    if case == "SIGKILL":
        assert result.code == -9
        text = log.read_text()                               # a row of a step that is saved was whole before
        if json.loads(text.splitlines()[-1])["step"] > training.load(log.with_name("last.pt"))["step"]:
            log.write_text(text[:-20])
    else:
        check_stopped(method, result)
    assert go(method).code == 0
    check_ending(method, whole, ignored=["log"] if sparse else [])


@each("storm of 5 stop signals", range(1, 9), {"findna": 2})
def test_storm(fresh, method, case):
    """Five signals: from outside at any moment, or (even numbers) from within a save."""
    rng, whole = random.Random(case), fresh(method)
    five = [rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]) for _ in range(5)]
    if case % 2:
        process = begin_and_wait(method, rng)
        for which in five:
            time.sleep(rng.random() * 0.02)
            os.kill(process.pid, which)
    else:
        [process] = begin(method, in_save(rng.randint(1, 3), at_call("os", "fsync", 1, lambda real, fd: (
            [os.kill(os.getpid(), which) for which in five], real(fd)))))
    check_stopped(method, wait(process))
    check_goes_on(method, whole)


@each("second run in a run folder", dict.fromkeys(PRETRAINING, [range(3)]) | {"finetune": [range(2)]},
      {"finetune": 1, "randommask": 1})
def test_lock(fresh, survived, method, case):
    whole = fresh(method)
    [process] = begin_slowly(method, 2)
    os.kill(process.pid, signal.SIGSTOP)
    before, result = contents(run_folder(method)), go(method)
    assert "in use" in result.err and result.err.count("\n") == 1 and result.code == 2, result
    assert contents(run_folder(method)) == before
    survived()
    if method != "finetune":                                 # rank 1 does not hang, either
        result = go(method, ranks=2)
        assert result.codes == [2, 2] and "Traceback" not in result.err
        assert contents(run_folder(method)) == before
        survived()
    process.kill()                                           # and the lock is free again
    check_goes_on(method, whole)
    survived()


ENVIRONMENTS = [dict(PYTHONHASHSEED="1", LC_ALL="C", TZ="Asia/Kathmandu"),
                dict(PYTHONHASHSEED="2", LC_ALL="tr_TR.UTF-8", TZ="America/St_Johns"),
                dict(PYTHONHASHSEED="0", LC_ALL="POSIX", PYTHONUTF8="0", PYTHONOPTIMIZE="1")]


def in_new_process(method, **env):
    command = [sys.executable, ROOT / f"{method}.py", *flags_of(method)]
    subprocess.run(command, env=os.environ | env, check=True, capture_output=True)


@each("another environment", ENVIRONMENTS, {})
def test_environment(fresh, tmp_path, method, case):
    """Hash seed, locale and time zone."""
    subprocess.run(["localedef", "-i", "tr_TR", "-f", "UTF-8", tmp_path / "tr_TR.UTF-8"], check=False)
    whole = fresh(method)
    in_new_process(method, LOCPATH=str(tmp_path), **case)
    check_ending(method, whole)


def test_another_torch_is_named(fresh):
    """A resume names the versions that a checkpoint was made with, if they are others."""
    whole = fresh("randommask", 9)
    state = training.load("out/last.pt")
    assert "made with" not in check_goes_on("randommask", whole).out
    torch.save(state | {"made_with": "torch 1.0, 96 threads\x1b[2J"}, "out/last.pt")
    printed = go("randommask").out
    assert "96 threads\\x1b" in printed and f"now torch {torch.__version__}, 1 threads" in printed
    assert "masks and dropout" not in printed


def test_another_device_is_named(fresh):
    """Its random numbers are others, so that the run is not the one that it would have been."""
    fresh("randommask", 9)
    state = training.load("out/last.pt")
    assert state["device"] == "cpu"
    torch.save(state | {"device": "cuda\x1b[2J"}, "out/last.pt")
    printed = go("randommask").out
    assert "resume   a run from cuda\\x1b[2J: on cpu, masks and dropout are drawn differently" in printed


@each("kill -9 of a run of two threads", [2], {})
def test_two_threads(fresh, method, case):
    """Other weights than those of one thread, but always the same, also from a new process."""
    fresh(method)
    assert go(method, {0: lambda: torch.set_num_threads(case)}).code == 0
    alone = Path().resolve()
    fresh(method)
    assert go(method, {0: lambda: (torch.set_num_threads(case), in_save(2, die)[0]())}).code == -9
    in_new_process(method, OMP_NUM_THREADS=str(case))
    check_ending(method, alone)


# in a checkpoint after step 12: after the switch of cm_gems, in the third epoch of finetune
MUST = ("format", "method", "step", "model", "optimizer", "config", "args", "data")
OWN = {"randommask": [], "findna": ["teacher", "center"], "finetune": ["best", "total"],
       "cm_gems": ["strategy", "switch_step", "perplexities"]}
BEST = [f"reset best.{name} after 12" for name in ("value", "step", "worse", "weights", "scores")]
LOST = {method: [f"drop {key} after 12" for key in (*MUST, *OWN[method])]
        + [f"reset {key} after 12" for key in ("step", "model", "optimizer", "exp_avg", "exp_avg_sq",
                                               "moments' step", *OWN[method])]
        + [f"drop {key} after 12" for key in ("moments' exp_avg", "moments' step", "moments' all")]
        + [f"other {key} after 12" for key in ("format", "method", "config", "args", "data")]
        for method in METHODS}
LOST["finetune"] += BEST
LOST["cm_gems"] += ["reset perplexities after 9"]            # before the switch
for texts in LOST.values():                                  # what is lost without a message comes first
    texts.sort(key=lambda text: "reset" not in text)


@each("checkpoint without a part of the state", LOST, {"finetune": 2, "findna": 4, "cm_gems": 1})
def test_lost_state_shows(fresh, method, case):
    """Each part of the state matters: without it, or with that of step 1, a checkpoint is refused or the run
    ends elsewhere."""
    how, key, _, step = case.replace("moments' ", "moments'").split()
    whole = fresh(method, int(step))
    state, first = (training.load(whole / f"steps/{n}.pt") for n in (step, 1))
    assert state.keys() - {"device"} == {"made_with", *MUST, *OWN[method]}
    owner, _, name = key.rpartition(".")
    if how == "drop" and "moments" in key:
        moments, name = state["optimizer"]["state"], key.removeprefix("moments'")
        moments.clear() if name == "all" else moments[0].pop(name)
    elif "exp" in key or "moments" in key:
        for moments in state["optimizer"]["state"].values():
            moments[key.removeprefix("moments'")] *= 0
    elif how == "drop":
        del state[key]
    elif how == "other":
        state[key] = {"format": training.FORMAT + 1}.get(key, type(state[key])())
    else:
        there, then = (state[owner], first[owner]) if owner else (state, first)
        assert there[name] is not then[name] and str(there[name]) != str(then[name])
        there[name] = then[name]
    torch.save(state, run_folder(method) / "last.pt")
    result = go(method)
    if how == "drop" and key in MUST or case.startswith("other format"):
        message = refused(result)
        assert f"'{key}'" in message or "of another format" in message, result
    elif how == "other":
        assert "another run" in refused(result)
    elif how == "drop" or "moments" in key or key == "step":
        assert refused(result)
    elif result.code == 0:
        with pytest.raises(AssertionError, match="not equal"):
            check_ending(method, whole)


@pytest.mark.parametrize("kills", [pytest.param(2, marks=fault("kill -9 in a sweep of runs", n=2)),
                                   pytest.param(18, marks=[fault("kill -9 in a sweep of runs", n=18),
                                                           pytest.mark.slow])])
def test_kill_in_a_sweep(fresh, survived, kills):
    """Fine-tuning of three starts, two seeds: each row once, as if never killed."""
    def rows():
        found = [json.loads(line) for line in open("out/results.jsonl")]
        assert all(row.pop("seconds") >= 0 for row in found)
        return sorted(found, key=lambda row: row["id"])
    flags, rng = dict(init=["random", "cnn", "kmer"], seeds=2, epochs=2), random.Random(kills)
    fresh("finetune")
    assert go("finetune", **flags).code == 0
    wanted = rows()
    fresh("finetune")
    while kills:
        [process] = begin("finetune", **flags)
        time.sleep(0.1 + rng.random() * 0.5)
        process.kill()
        if wait(process).code == 0:
            assert rows() == wanted
            fresh("finetune")
        else:
            kills -= 1
            survived()
    assert go("finetune", **flags).code == 0 and rows() == wanted and len(wanted) == 5


def check_full(method, result):
    """Refused in one line, with a sound checkpoint; no temporary file takes up the disk."""
    message, here = refused(result), run_folder(method)
    assert "No space left" in message or "too large" in message, message
    step = training.load(here / "last.pt")["step"]
    assert contents(here).keys().isdisjoint({"last.pt.tmp", "link.tmp"}) and step < STEPS
    return step


@each("full disk (file size limit)", ["after", "before"], {"randommask": 1, "finetune": 1})
def test_file_size_limit(fresh, method, case):
    """Half a checkpoint is too large, from the start or from its second save on."""
    whole = fresh(method, 9)
    size = (whole / "steps/9.pt").stat().st_size // 2

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    step = check_full(method, go(method, {0: limit} if case == "before" else in_save(2, limit)))
    assert (step == 9) == (case == "before")
    check_goes_on(method, whole)


@each("full disk (in a row of the log)", {"randommask": [1, 3], "findna": [3], "cm_gems": [3]}, {"findna": 1})
def test_full_disk_in_a_row(fresh, method, case):
    def half(log, out, row):
        with open(f"{out}/log.jsonl", "a") as f:
            f.write(json.dumps(row)[:20])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    whole = fresh(method, 9)
    assert check_full(method, go(method, {0: at_call("training", "log", case, half)}, save_every=0)) == 9
    check_goes_on(method, whole)


@pytest.fixture
def disk(tmp_path):
    """disk(kilobytes): a new or resized small disk."""
    there = tmp_path / "disk"

    def size(n):
        there.mkdir(exist_ok=True)
        how = [f"remount,size={n}k"] if os.path.ismount(there) else [f"size={n}k", "-t", "tmpfs", "tmpfs"]
        if subprocess.run(["mount", "-o", *how, there], capture_output=True).returncode:
            pytest.skip("no right to mount")
        return there
    yield size
    while os.path.ismount(there):
        subprocess.run(["umount", there])


@each("full disk (tmpfs)", [range(2)], {"findna": 1})
def test_full_disk(fresh, survived, disk, method, case):
    """No room for the third of three checkpoints; then, when it goes on, for any file."""
    whole = fresh(method)
    os.symlink(disk((whole / "steps/9.pt").stat().st_size * 5 // 2048 + 40), "out")
    step = check_full(method, go(method))
    survived()
    with open("out/more", "wb", buffering=0) as f, contextlib.suppress(OSError):
        while f.write(bytes(4096)):
            pass
    before = contents(run_folder(method))
    assert check_full(method, go(method)) == step
    same = ("last.pt", "prev.pt", "log.jsonl")
    assert [contents(run_folder(method))[name] for name in same] == [before[name] for name in same]
    disk(99_999)
    check_goes_on(method, whole)
    survived()


@fault("full disk (in a row of the results)")
def test_full_disk_in_the_results(fresh):
    whole = fresh("finetune", 12)
    others = [json.dumps(json.loads(Path(whole, "out/results.jsonl").read_text()) | {
        "id": str(i), "note": "x" * 50_000}) + "\n" for i in range(2)]
    Path("out/results.jsonl").write_text("".join(others))
    full = at_call("fcntl", "flock", 1, lambda real, *args: (
        resource.setrlimit(resource.RLIMIT_FSIZE, (sum(map(len, others)) + 99,) * 2), real(*args)),
        only=lambda f, how: how == fcntl.LOCK_EX and "results" in f.name)
    assert "too large" in refused(go("finetune", {0: full}))
    assert len(Path("out/results.jsonl").read_text()) > sum(map(len, others))          # a part of a row
    assert go("finetune").code == 0
    rows = Path("out/results.jsonl").read_text().splitlines(keepends=True)
    assert rows[:2] == others and len(rows) == 3
    Path("out/results.jsonl").write_text(rows[2])
    check_ending("finetune", whole)


def no_rights():
    """Patch: root, too, is bound by the mode of a file (it drops its capabilities)."""
    if os.getuid() == 0:
        header, none = (ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(header, none) == 0


@each("read-only folder", [range(2)], {"cm_gems": 1})
def test_read_only_folder(fresh, survived, method, case):
    whole, here = fresh(method), functools.partial(run_folder, method)
    close = in_save(2, lambda: (no_rights(), here().chmod(0o555)))
    message = refused(go(method, close))
    assert "cannot write" in message and "Permission denied" in message, message
    assert training.load(here() / "last.pt")["step"] < STEPS
    survived()
    before = contents(here())
    assert "Permission denied" in refused(go(method, {0: no_rights}))
    assert contents(here()) | {"args.json": 0} == before | {"args.json": 0}
    survived()
    here().chmod(0o755)
    check_goes_on(method, whole)


@fault("run folder that cannot be one", n=3)
def test_no_run_folder(fresh, survived):
    fresh("randommask")
    Path("file").touch()
    os.mkdir("closed", 0o555)
    for out, patch in (("file", {}), ("file/out", {}), ("closed/out", {0: no_rights})):
        assert out in refused(go("randommask", patch, out=out))
        survived()


# what torch.save writes or not, but a loader with weights_only does not load
UNLOADABLE = [np.float64(1), np.zeros(2), np.random.default_rng(0), Path("a"), collections.deque([1]),
              collections.defaultdict(int), frozenset([1]), slice(1), datetime.date.min, np.bool_(True),
              SimpleNamespace(a=1), torch.nn.Linear(1, 1), lambda: 0, open(os.devnull)]


@fault("object that cannot be saved or loaded", n=len(UNLOADABLE))
def test_unloadable_state(tmp_path, survived):
    training.save({"step": 1}, tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    for thing in UNLOADABLE:
        with pytest.raises(Exception):
            training.save({"step": 2, "thing": thing}, tmp_path)
        assert (tmp_path / "last.pt").read_bytes() == before and not (tmp_path / "prev.pt").exists()
        survived()
    training.save({"step": 3}, tmp_path)                     # what is left over is in nobody's way
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "prev.pt"]


def flip(raw, at, rng):
    return raw[:at] + bytes([raw[at] ^ 1 << int(rng.integers(8))]) + raw[at + 1:]


def zero(raw, at, rng):
    at -= at % 4096
    return raw[:at] + bytes(len(raw[at:at + 4096])) + raw[at + 4096:]


def cut(raw, at, rng):
    return raw[:at]


def larger(path, state):
    """A megabyte more in a checkpoint: its pages are of tensors, not of headers."""
    torch.save(state | {"more": torch.ones(1 << 18)}, path)
    return path.read_bytes()


def check_damage(whole, survived, path, how, todo):
    """A checkpoint damaged anywhere is refused, or its content is right."""
    rng = np.random.default_rng(todo[0])
    for n in todo:
        step = 1 + n % STEPS
        sound = training.load(whole / f"steps/{step}.pt")
        raw = broken = larger(path, sound) if how is zero else (whole / f"steps/{step}.pt").read_bytes()
        while broken == raw:
            broken = how(raw, int(rng.integers(len(raw))), rng)
        path.write_bytes(broken)
        try:
            state = training.load(path)                      # a bit that means nothing, as in a date
        except ValueError as e:
            assert "not a readable checkpoint" in str(e)
        else:
            assert how is flip and bits(state) == bits(sound)
        survived()


@each("bit flip in a checkpoint", [range(40), range(40, 600)], ALL)
def test_flipped(whole, survived, tmp_path, method, case):
    check_damage(whole(method), survived, tmp_path / "x.pt", flip, case)


@each("zeroed page of a checkpoint", [range(15), range(15, 75)], ALL)
def test_zeroed(whole, survived, tmp_path, method, case):
    check_damage(whole(method), survived, tmp_path / "x.pt", zero, case)


@each("truncated checkpoint", [range(15), range(15, 80)], ALL)
def test_cut(whole, survived, tmp_path, method, case):
    check_damage(whole(method), survived, tmp_path / "x.pt", cut, case)


def deflated(state, path):
    torch.save(state, "stored")
    with zipfile.ZipFile("stored") as z, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in z.namelist():
            packed.writestr(name, z.read(name))


FOREIGN = [b"", b"hello\n", b"<!DOCTYPE html><title>404</title>", b"\x89PNG\r\n\x1a\n" + bytes(99),
           gzip.compress(b"ACGT"), bytes(9999), b"version https://git-lfs.github.com/spec/v1\n", b"PK\3\4",
           b"\x80\x04.", pickle.dumps({"step": 1}), deflated, lambda _, path: path.mkdir(),
           lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
           lambda state, path: torch.save([*state], path), lambda _, path: torch.save(torch.zeros(2), path),
           lambda _, path: np.savez(open(path, "wb"), a=np.zeros(3))]


@each("foreign file as a checkpoint", {"randommask": FOREIGN}, {"randommask": 4})
def test_foreign_file(fresh, method, case):
    state, path = training.load(fresh(method) / "steps/9.pt"), Path("out/last.pt")
    os.mkdir("out")
    path.write_bytes(case) if isinstance(case, bytes) else case(state, path)
    before = contents(Path("out"))
    assert refused(go(method)).startswith("error: out/last.pt: ")
    assert contents(Path("out")) == before


def test_bytes_after_the_end(fresh):
    """A checkpoint with more bytes behind it is read as it was, or refused."""
    path = fresh("randommask") / "steps/9.pt"
    Path("longer.pt").write_bytes(path.read_bytes() + b"and more")
    try:
        assert bits(training.load("longer.pt")) == bits(training.load(path))
    except ValueError as e:
        assert "not a readable checkpoint" in str(e)


def without(key):
    def damage(path):
        state = training.load(path)
        del state[key]
        torch.save(state, path)
    return damage


LAST = {"flipped": lambda path: path.write_bytes(flip(path.read_bytes(), 9999, np.random.default_rng(0))),
        "half": lambda path: path.write_bytes(path.read_bytes()[:9999]), "gone": os.unlink,
        "empty": lambda path: path.write_bytes(b""), "not a file": lambda path: (path.unlink(), path.mkdir()),
        "text": lambda path: path.write_text("<html>404</html>"), "no model": without("model"),
        "no optimizer": without("optimizer"), "no step": without("step")}


@each("broken last.pt, sound prev.pt", [*LAST], {"randommask": 2, "findna": 1})
def test_the_checkpoint_before(fresh, method, case):
    """The run goes on from prev.pt, also when it is killed in its first save, and then stopped."""
    stop = in_save(1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    whole = fresh(method, 9)
    here = run_folder(method)
    shutil.copy(whole / "steps/7.pt", here / "prev.pt")
    LAST[case](here / "last.pt")
    assert go(method, in_save(1, POINTS["before rename"])).code == -9
    assert training.load(here / "prev.pt")["step"] == 7
    result = go(method, stop)
    assert result.code == 143 and "prev.pt" in result.out, result
    assert [training.load(here / name)["step"] for name in ("prev.pt", "last.pt")] == [8, 9]
    check_goes_on(method, whole)


def newer(state):
    return state | {"format": training.FORMAT + 1}


# a checkpoint of another run in place of one's own, or other flags -> what the message names
ANOTHER = {method: [*[(other, {}, "method") for other in METHODS if other != method], (newer, {}, "format")]
           for method in METHODS}
OTHER_FLAGS = {"randommask": dict(n_embd=32, lr=0.1, seed=1, mask="single", steps=30),
               "findna": dict(hidden=16, views="M+none", alpha=0.9),
               "cm_gems": dict(n_embd=32, p_scale=2, npmi="textbook", eval_every=3, switch_drop=2,
                               eval_windows=9, strategy="cm_step", npmi_contigs="a", npmi_table="t.csv")}
for method, flags in OTHER_FLAGS.items():
    ANOTHER[method] += [(None, {name: value}, name) for name, value in flags.items()]
    ANOTHER[method] += [(None, dict(genome="other.fa"), "data"), (None, dict(micro_batch_size=2), "micro")]


@each("checkpoint of another run", ANOTHER, {"findna": 2, "cm_gems": 1, "finetune": 1})
def test_another_run(fresh, whole, method, case):
    other, flags, word = case
    alone = fresh(method, 9)
    here = run_folder(method)
    sound = (here / "last.pt").read_bytes()
    text = Path("genome.fa").read_text()
    Path("other.fa").write_text(text[:-9] + "\n")
    Path("same.fa").write_text(text.replace("ACG", "acg").replace("\n>", "\n\n>"))
    Path("t.csv").write_text("kmer,npmi\nAAA,2\nAAC,1\n")
    if other is newer:
        torch.save(newer(training.load(here / "last.pt")), here / "last.pt")
    elif other:
        shutil.copy(whole(other) / "steps/9.pt", here / "last.pt")
    before, result = contents(here), go(method, **flags)
    assert word in refused(result) or word == "format" in result.out, result
    assert contents(here) == before
    (here / "last.pt").write_bytes(sound)
    check_goes_on(method, alone, **({} if method == "finetune" else {"genome": "same.fa"}))


@each("stale temporary files", [b"PK"], {"findna": 1})
def test_stale_files(fresh, method, case):
    whole = fresh(method, 9)
    for name in ("last.pt.tmp", "link.tmp", "log.jsonl.tmp"):
        (run_folder(method) / name).write_bytes(case)
    check_goes_on(method, whole)


@pytest.mark.slow
@fault("soak: random kills, stops and numbers of ranks")
def test_soak(tmp_path):
    """One minute of soak.py, which is meant to run for longer."""
    command = [sys.executable, ROOT / "tests/faults/soak.py", "--minutes", "1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "runs, all bitwise equal" in result.stdout, result.stderr


@pytest.mark.slow
@fault("stop signal to a model of BERT's size")
def test_stop_of_a_large_model(fresh):
    """86 million parameters, a validation in each step: the run ends within half a minute, even when busy."""
    fresh("randommask")
    [process] = begin("randommask", k=6, n_layer=12, n_head=12, n_embd=768, batch_size=2, micro_batch_size=1,
                      steps=999, eval_every=1, save_every=0, keep=999)
    wait_rows(process, Path("out"), 3)
    start = time.monotonic()
    process.terminate()
    assert wait(process).code == 143 and time.monotonic() - start < 30
    assert Path("out/last.pt").stat().st_size > 1e9
    last_row, state = log_rows(Path("out"))[-1], training.load("out/last.pt")
    assert state["step"] == last_row["step"] and ("val_loss" in last_row) != ("row" in state)
    shutil.rmtree("out")
