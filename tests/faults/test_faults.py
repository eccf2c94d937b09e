"""The fault campaign, death and storage: every method is killed, stopped, filled up and fed broken files in
every way we know. What goes on must end, bit by bit, where the run left alone ends; what cannot go on says so
in one line and touches nothing. The faults of ranks: test_fault_ranks.py."""
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
from harness import ROOT, at_call, contents, die, fork, log_rows, refused, wait, wait_rows
from methods import (METHODS, PRETRAINING, STEPS, begin, begin_slowly, bits, check_ending, check_goes_on,
                     each, fault, flags_of, fresh, go, in_save, run_folder, whole)   # noqa: F401, fixtures

EVERY = range(1, STEPS)


@each("resume at every step", {"finetune": (9, 12)}, {method: EVERY for method in METHODS})
def test_resume_at_every_step(fresh, survived, method, todo):
    for step in todo:
        check_goes_on(method, fresh(method, step))
        survived()


@each("resume of a finished run", ["step", "prev.pt"])
def test_a_finished_run_stays(fresh, survived, method, todo):
    """The command of a finished run changes nothing, nor does a start over it; also without last.pt."""
    whole = fresh(method, STEPS)
    said = [check_goes_on(method, whole).out.splitlines()[-1] for _ in todo]
    assert said[1] == said[0] or method == "finetune" and "done before, see out/results.jsonl" in said[1]
    survived()
    before = contents(Path())
    if method != "finetune":
        assert "holds a run" in refused(go(method, resume=False))
        os.rename("out/last.pt", "out/prev.pt")
        assert "holds a run" in refused(go(method, resume=False))
        os.rename("out/prev.pt", "out/last.pt")
        before["out/prev.pt"] = before["out/last.pt"]
    assert contents(Path()).keys() <= before.keys()
    survived()


@each("kill -9 at random", range(1), range(1, 20))
def test_kill_at_random(fresh, survived, method, todo):
    for i in todo:
        rng, code = random.Random(i), 0
        while code != -9:                                    # it may have ended before
            whole = fresh(method)
            [process] = begin(method)
            time.sleep(rng.random() * 0.5)
            process.kill()
            code = wait(process).code
        check_goes_on(method, whole)
        survived()


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


POINTS = {
    "opened": at_call("torch", "save", 1, die), "amid": at_call("torch", "save", 1, amid),
    "before fsync": at_call("os", "fsync", 1, die), "after fsync": at_call("os", "fsync", 1, after),
    "before rename": at_call("os", "replace", 1, die, only=lambda _, to: to.endswith("last.pt")),
    "after rename": at_call("os", "replace", 1, after, only=lambda _, to: to.endswith("last.pt")),
    "after the folder's fsync": at_call("os", "fsync", 2, after)}
SAVES = [*itertools.product(POINTS, (1, 3, 5))]


@each("kill inside a save", SAVES[14:15], SAVES[:14] + SAVES[15:])
def test_kill_inside_a_save(fresh, survived, method, todo):
    for point, n in todo:
        whole = fresh(method)
        assert go(method, in_save(n, POINTS[point])).code == -9
        assert len([*Path("out").rglob("*.tmp")]) <= 1
        check_goes_on(method, whole)
        survived()


@pytest.mark.parametrize("n", [
    pytest.param(20, marks=fault("kill -9 in a tight save loop", n=20)),
    pytest.param(80, marks=[fault("kill -9 in a tight save loop", n=80), pytest.mark.slow])])
def test_kill_in_a_tight_save_loop(tmp_path, survived, n):
    model, rng = torch.nn.Linear(100, 100), random.Random(n)
    state = dict(method="m", model=model.state_dict(), optimizer={}, config={}, args={}, data="")

    def loop():
        for step in itertools.count():
            training.save(state | {"step": step}, tmp_path)
            os.pwrite(1, b"%9d" % step, 0)                   # told
    training.save(state | {"step": 0}, tmp_path)
    for _ in range(n):
        process = fork(loop)
        time.sleep(0.02 + rng.random() * 0.05)
        process.kill()
        result = wait(process)
        assert result.code == -9 and result.err == ""
        step, told = training.load(tmp_path / "last.pt")["step"], int(result.out or -1)
        assert told < 0 or step in (told, told + 1)
        survived()


@each("storm of 5 stop signals", range(1), range(1, 8))
def test_storm(fresh, survived, method, todo):
    """Five signals: of odd storms from outside at any moment, of even ones from within a save."""
    for i in todo:
        rng, whole = random.Random(i), fresh(method)
        five = [rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]) for _ in range(5)]
        if i % 2:
            [process] = begin_slowly(method, rng.randint(1, len(log_rows(run_folder(method, whole))) // 2))
            for which in five:
                time.sleep(rng.random() * 0.02)
                os.kill(process.pid, which)
        else:
            [process] = begin(method, in_save(rng.randint(1, 3), at_call("os", "fsync", 1, lambda real, fd: (
                [os.kill(os.getpid(), which) for which in five], real(fd)))))
        result, here = wait(process), run_folder(method)
        step = training.load(here / "last.pt")["step"]
        assert result.code == 143 and result.err == "" and step < STEPS, result
        assert f"stopped  by a signal after step {step};" in result.out
        assert method == "finetune" or log_rows(here)[-1]["step"] == step
        check_goes_on(method, whole)
        survived()


@each("second run in a run folder", ["in use", "after a kill"])
def test_lock(fresh, survived, method, todo):
    whole = fresh(method)
    [process] = begin_slowly(method, 2)
    os.kill(process.pid, signal.SIGSTOP)
    before, result = contents(run_folder(method)), go(method)
    assert "in use" in result.err and result.err.count("\n") == 1 and result.code == 2, result
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


@each("another environment", (), ENVIRONMENTS)
def test_environment(fresh, survived, tmp_path, method, todo):
    """Hash seed, locale and time zone."""
    subprocess.run(["localedef", "-i", "tr_TR", "-f", "UTF-8", tmp_path / "tr_TR.UTF-8"], check=False)
    for env in todo:
        whole = fresh(method)
        in_new_process(method, LOCPATH=str(tmp_path), **env)
        check_ending(method, whole)
        survived()


@each("kill -9 of a run of two threads", (), [2])
def test_two_threads(fresh, survived, method, todo):
    """Other weights than those of one thread, but always the same, also from a new process."""
    for n in todo:
        fresh(method)
        assert go(method, {0: lambda: torch.set_num_threads(n)}).code == 0
        alone = Path().resolve()
        fresh(method)
        assert go(method, {0: lambda: (torch.set_num_threads(n), in_save(2, die)[0]())}).code == -9
        in_new_process(method, OMP_NUM_THREADS=str(n))
        check_ending(method, alone)
        survived()


# of a checkpoint after step 9 (of cm_gems also after the switch, of finetune in its third epoch); other: any
MUST = ("format", "method", "step", "model", "optimizer", "config", "args", "data")
OWN = {"randommask": [], "findna": ["teacher", "center"], "finetune": ["best", "total"],
       "cm_gems": ["strategy", "switch_step", "perplexities"]}
BEST = [f"reset best.{name} after 12" for name in ("value", "step", "worse", "weights", "scores")]
LOST = {method: [f"drop {key} after 12" for key in (*MUST, *OWN[method])]
        + [f"reset {key} after 12" for key in ("step", "model", "optimizer", "exp_avg", "exp_avg_sq",
                                               "moments' step", *OWN[method])]
        + [f"other {key} after 12" for key in ("format", "method", "config", "args", "data")]
        for method in METHODS}
LOST["cm_gems"] += ["reset perplexities after 9"]


@each("checkpoint without a part of the state", {"finetune": BEST}, LOST)
def test_lost_state_shows(fresh, survived, method, todo):
    """The tests here see each part of the state: dropped or set back to that of step 1, it is refused, or the
    run ends elsewhere."""
    for text in todo:
        how, key, _, step = text.replace("moments' step", "moments'step").split()
        whole = fresh(method, int(step))
        state, first = (training.load(whole / f"steps/{n}.pt") for n in (step, 1))
        assert state.keys() == {"made_with", *MUST, *OWN[method]}              # made_with only tells
        owner, _, name = key.rpartition(".")
        if "exp" in key or "moments" in key:
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
        if how == "drop" and key in MUST or text.startswith("other format"):
            assert refused(result) and f"'{key}'" in result.out or "of another format" in result.out, result
        elif how == "other":
            assert "another run" in refused(result)
        elif result.code == 0:
            with pytest.raises(AssertionError, match="not equal"):
                check_ending(method, whole)
        survived()


@pytest.mark.parametrize("kills", [pytest.param(2, marks=fault("kill -9 in a sweep of runs", n=2)),
                                   pytest.param(18, marks=[fault("kill -9 in a sweep of runs", n=18),
                                                           pytest.mark.slow])])
def test_kill_in_a_sweep(fresh, survived, kills):
    """Fine-tuning of two starts, two seeds: each row once, as if never killed."""
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


@each("full disk (file size limit)", ["after"], ["before"])
def test_file_size_limit(fresh, survived, method, todo):
    """Half a checkpoint is too large, from the start or from its second save on."""
    for what in todo:
        whole = fresh(method, 9)
        size = (whole / "steps/9.pt").stat().st_size // 2
        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        step = check_full(method, go(method, {0: limit} if what == "before" else in_save(2, limit)))
        assert (step == 9) == (what == "before")
        check_goes_on(method, whole)
        survived()


@each("full disk (in a row of the log)", {"randommask": [1]}, [3], PRETRAINING)
def test_full_disk_in_a_row(fresh, survived, method, todo):
    def half(log, out, row):
        with open(f"{out}/log.jsonl", "a") as f:
            f.write(json.dumps(row)[:20])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for n in todo:
        whole = fresh(method, 9)
        assert check_full(method, go(method, {0: at_call("training", "log", n, half)})) == 9
        check_goes_on(method, whole)
        survived()


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


@each("full disk (tmpfs)", ["in the run", "before it"])
def test_full_disk(fresh, survived, disk, method, todo):
    """No place for the third of three checkpoints; then, when it goes on, for any file."""
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
    others = [json.dumps({"id": str(i), "note": "x" * 50_000}) + "\n" for i in range(2)]
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


@each("read-only folder", ["in the run", "from the start"])
def test_read_only_folder(fresh, survived, method, todo):
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
    """0 silently wrong: a checkpoint damaged anywhere is refused, or has the right content."""
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


@each("bit flip in a checkpoint", range(40), range(40, 500))
def test_flipped(whole, survived, tmp_path, method, todo):
    check_damage(whole(method), survived, tmp_path / "x.pt", flip, todo)


@each("zeroed page of a checkpoint", range(15), range(15, 75))
def test_zeroed(whole, survived, tmp_path, method, todo):
    check_damage(whole(method), survived, tmp_path / "x.pt", zero, todo)


@each("truncated checkpoint", range(15), range(15, 80))
def test_cut(whole, survived, tmp_path, method, todo):
    check_damage(whole(method), survived, tmp_path / "x.pt", cut, todo)


def legacy(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


def raw_pickle(state, path):
    path.write_bytes(pickle.dumps(state))


def jit(state, path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.zeros(1)), path)


def zipped(state, path):
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("archive/data.pkl", b"hello")


def deflated(state, path):
    torch.save(state, path)
    with zipfile.ZipFile(path) as z, zipfile.ZipFile(f"{path}.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in z.namelist():
            packed.writestr(name, z.read(name))
    os.replace(f"{path}.zip", path)


FOREIGN = [b"", b"hello\n", b"<!DOCTYPE html><title>404</title>", b"\x89PNG\r\n\x1a\n" + bytes(99),
           gzip.compress(b"ACGT"), bytes(9999), b"version https://git-lfs.github.com/spec/v1\n", b"PK\3\4",
           b"\x80\x04.", legacy, raw_pickle, jit, zipped, deflated, lambda _, path: path.mkdir(),
           lambda state, path: torch.save([*state], path), lambda _, path: torch.save(torch.zeros(2), path),
           lambda state, path: np.savez(open(path, "wb"), **{"a": np.zeros(3)})]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@fault("foreign file as a checkpoint", n=len(FOREIGN))
def test_foreign_file(fresh, survived):
    state = training.load(fresh("randommask") / "steps/9.pt")
    os.mkdir("out")
    for content in FOREIGN:
        path = Path("out/last.pt")
        path.write_bytes(content) if isinstance(content, bytes) else content(state, path)
        before = contents(Path("out"))
        assert "prev.pt: no such checkpoint" in refused(go("randommask"))
        assert contents(Path("out")) == before
        survived()
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.write_bytes((fresh("randommask", 9) / "steps/9.pt").read_bytes() + b"and more")
    try:
        assert training.load(path)["step"] == 9
    except ValueError as e:
        assert "not a readable checkpoint" in str(e)


LAST = {"flipped": lambda path: path.write_bytes(flip(path.read_bytes(), 9999, np.random.default_rng(0))),
        "half": lambda path: path.write_bytes(path.read_bytes()[:9999]), "gone": os.unlink,
        "empty": lambda path: path.write_bytes(b""), "not a file": lambda path: (path.unlink(), path.mkdir())}


@each("broken last.pt, sound prev.pt", ["flipped"], ["half", "gone", "empty", "not a file"])
def test_the_checkpoint_before(fresh, survived, method, todo):
    """The run goes on from prev.pt, also when it is killed in its first save, and then stopped."""
    stop = in_save(1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    for how in todo:
        whole = fresh(method, 9)
        here = run_folder(method)
        shutil.copy(whole / "steps/7.pt", here / "prev.pt")
        LAST[how](here / "last.pt")
        assert go(method, in_save(1, POINTS["before rename"])).code == -9
        assert training.load(here / "prev.pt")["step"] == 7
        result = go(method, stop)
        assert result.code == 143 and "prev.pt" in result.out, result
        assert [training.load(here / name)["step"] for name in ("prev.pt", "last.pt")] == [8, 9]
        check_goes_on(method, whole)
        survived()


def newer(state):
    return state | {"format": training.FORMAT + 1}


# a checkpoint of another run in place of one's own, or other flags -> what the message names
ANOTHER = {method: [*[(other, {}, "method") for other in METHODS if other != method], (newer, {}, "format")]
           for method in METHODS}
for method, flags in {"randommask": dict(n_embd=32, lr=0.1, seed=1, mask="single"),
                      "findna": dict(hidden=16, views="M+none", alpha=0.9, temp=None),
                      "cm_gems": dict(n_embd=32, p_scale=2, npmi="textbook", eval_every=3)}.items():
    ANOTHER[method] += [(None, {name: value}, name) for name, value in flags.items() if value is not None]
    ANOTHER[method] += [(None, dict(genome="other.fa"), "data"), (None, dict(micro_batch_size=2), "micro")]


@each("checkpoint of another run", {method: part[:1] for method, part in ANOTHER.items()},
      {method: part[1:] for method, part in ANOTHER.items()})
def test_another_run(fresh, whole, survived, method, todo):
    for other, flags, word in todo:
        alone = fresh(method, 9)
        here = run_folder(method)
        sound = (here / "last.pt").read_bytes()
        Path("other.fa").write_text(Path("genome.fa").read_text()[:-9] + "\n")
        if other is newer:
            torch.save(newer(training.load(here / "last.pt")), here / "last.pt")
        elif other:
            shutil.copy(whole(other) / "steps/9.pt", here / "last.pt")
        before, result = contents(here), go(method, **flags)
        assert word in refused(result) or word == "format" in result.out, result
        assert contents(here) == before
        (here / "last.pt").write_bytes(sound)
        check_goes_on(method, alone)
        survived()


@each("stale temporary files", [b"PK"])
def test_stale_files(fresh, survived, method, todo):
    whole = fresh(method, 9)
    for name in ("last.pt.tmp", "link.tmp", "log.jsonl.tmp"):
        (run_folder(method) / name).write_bytes(todo[0])
    check_goes_on(method, whole)
    survived()


@pytest.mark.slow
@fault("soak: random kills, stops and numbers of ranks")
def test_soak(tmp_path):
    """A minute of soak.py, which is to run for longer."""
    command = [sys.executable, ROOT / "tests/faults/soak.py", "--minutes", "1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "runs, all bitwise equal" in result.stdout, result.stderr


@pytest.mark.slow
@fault("stop signal to a model of BERT's size")
def test_stop_of_a_large_model(fresh):
    """86 million parameters: from the signal to the end within half a minute, on a busy machine too."""
    fresh("randommask")
    [process] = begin("randommask", k=6, n_layer=12, n_head=12, n_embd=768, batch_size=2, micro_batch_size=1,
                      steps=999, eval_every=999, save_every=999, keep=999)
    wait_rows(process, Path("out"), 3)
    start = time.monotonic()
    process.terminate()
    assert wait(process).code == 143 and time.monotonic() - start < 30
    assert Path("out/last.pt").stat().st_size > 1e9
    assert training.load("out/last.pt")["step"] == log_rows(Path("out"))[-1]["step"]
    shutil.rmtree("out")
