"""The fault campaign, stops and strangers: signals anywhere, broken terminals, planted links, edited logs.

Whatever stops a run, it goes on as if never stopped; what cannot go on says so in one line."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import training
from harness import ROOT, fork, log_rows, refused, run, start, wait
from methods import (METHODS, PRETRAINING, STEPS, check_ending, check_goes_on, each, fault, flags_of, go,
                     fresh, run_folder, whole)               # noqa: F401, fixtures


def stop_at_evaluation(*numbers):
    """Patch: SIGTERM arrives at the start of the evaluations with these numbers."""
    def patch():
        import training                                      # the run's own
        calls = []

        def stopping(real):
            def wrapped(*args):
                calls.append(1)
                if len(calls) in numbers:
                    os.kill(os.getpid(), signal.SIGTERM)
                return real(*args)
            return wrapped
        training.Run.eval_batches = stopping(training.Run.eval_batches)
        training.until_stopped = stopping(training.until_stopped)
    return {0: patch}


@each("stop signal in an evaluation", [1, 2, 3, 4], {"cm_gems": 1, "finetune": 1})
def test_stop_in_an_evaluation(fresh, method, case):
    """The evaluation is given up, and made up for; also when that is stopped, too."""
    whole = fresh(method)
    for number in (case, 1):
        result = go(method, stop_at_evaluation(number))
        step = training.load(run_folder(method) / "last.pt")["step"]
        assert result.code == 143 and f"after step {step}" in result.out and result.err == "", result
        if method != "finetune":
            assert log_rows(Path("out"))[-1]["step"] == step
            assert not [name for name in log_rows(Path("out"))[-1] if name.startswith("val")]
    check_goes_on(method, whole)


@each("stop signal in the last evaluation", [1], {"cm_gems": 1}, PRETRAINING)
def test_stop_in_the_last_evaluation(fresh, method, case):
    """Nothing is left to train: --resume evaluates, and the checkpoint is the undisturbed one."""
    whole = fresh(method)
    assert go(method, {0: lambda: at_last(method)}).code == 143
    assert training.load("out/last.pt")["step"] == STEPS
    check_goes_on(method, whole)


def at_last(method):
    import training
    real = training.Run.eval_batches

    def wrapped(self):
        if self.step == STEPS:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self)
    training.Run.eval_batches = wrapped


def receive(*pairs):
    """Fork's main: sends itself (signal, seconds to wait before); prints what it knows; 7: interrupted."""
    def main():
        training.signals.clear()
        training.catch_signals()
        try:
            for which, pause in pairs:
                time.sleep(pause)
                os.kill(os.getpid(), which)
            print(training.stop_requested(), flush=True)
        except KeyboardInterrupt:
            raise SystemExit(7) from None
    return wait(fork(main))


@fault("stop signal that is caught", n=len(training.STOPS))
@pytest.mark.parametrize("signals", [training.STOPS])
def test_signals_that_stop(survived, signals):
    for which in signals:
        result = receive((which, 0))
        assert (result.code, result.out) == (0, "True\n"), (which, result)
        survived()


def test_nohup_stays():
    def main():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        training.signals.clear()
        training.catch_signals()
        os.kill(os.getpid(), signal.SIGHUP)
        print(training.stop_requested(), flush=True)
    assert wait(fork(main)).out == "False\n"


@fault("two Ctrl-C", n=4)
def test_second_ctrl_c(survived):
    """At once it is the first one, passed on by a launcher; later it interrupts."""
    INT, TERM, later = signal.SIGINT, signal.SIGTERM, training.AGAIN + 0.1
    for pairs, code in (([(INT, 0), (INT, 0.05)], 0), ([(INT, 0), (INT, later)], 7),
                        ([(TERM, 0), (INT, later)], 0), ([(INT, 0), (INT, 0), (INT, later)], 7)):
        assert receive(*pairs).code == code
        survived()


@fault("two Ctrl-C in a probe")
def test_second_ctrl_c_in_a_probe(fresh):
    """A fit of scikit-learn reads no flag: the second Ctrl-C ends it, with one line and no row."""
    def twice(*args):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(training.AGAIN + 0.1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)

    def patch():
        from sklearn import linear_model
        linear_model.LogisticRegression.fit = twice
    fresh("finetune")
    result = go("finetune", {0: patch}, init="kmer", mode="probe")
    assert (result.code, result.err) == (130, "stopped  by Ctrl-C\n"), result
    assert not Path("out/results.jsonl").exists()


SCRIPTS = [f"{method}.py" for method in METHODS]


@fault("Ctrl-C while a script starts", n=3 * len(SCRIPTS) + 2)
def test_ctrl_c_in_imports(tmp_path, survived):
    """In the first slow import, the last one, and before the run; also where Python leaves out the folder."""
    def stopped(*command, **env):
        result = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT,
                                env=os.environ | {"PYTHONPATH": str(tmp_path)} | env)
        assert (result.returncode, result.stderr) == (130, "stopped  by Ctrl-C\n"), result
        survived()
    for name in ("numpy", "torch"):
        (tmp_path / f"{name}.py").write_text("raise KeyboardInterrupt")
        for script in SCRIPTS:
            stopped(script)
        stopped("-m", "tools.table")
        if name == "numpy":
            for script in SCRIPTS:
                stopped(ROOT / script, PYTHONSAFEPATH="1")
        (tmp_path / f"{name}.py").unlink()
        (tmp_path / "numpy.py").write_text("")               # found, for torch to be next


BROKEN = {"full": lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), 1), "pipe": lambda: broken_pipe(1),
          "both": lambda: (broken_pipe(1), broken_pipe(2)), "closed": lambda: setattr(sys, "stdout", None)}


def broken_pipe(fd):
    reader, writer = os.pipe()
    os.dup2(writer, fd)
    os.close(reader)


@each("broken stdout", [*BROKEN], {"randommask": 1})
def test_broken_stdout(fresh, method, case):
    """A full disk, a closed pipe or terminal: the run goes on to its end, and says so once on stderr."""
    whole = fresh(method)
    result = go(method, {0: BROKEN[case]})
    assert result.code == 0, result
    assert case in ("both", "closed") or result.err.count("the run goes on without it") == 1, result.err
    assert result.err.count("\n") <= 1
    check_ending(method, whole)


AT = "MASTER_ADDR=localhost"
RANKS = ["WORLD_SIZE=0", "WORLD_SIZE=-1", "WORLD_SIZE=two", "WORLD_SIZE=", "WORLD_SIZE=1.0", "RANK=1",
         "RANK=-1", "RANK=", "RANK=x", "WORLD_SIZE=2", "RANK=0 WORLD_SIZE=2",
         "RANK=1 WORLD_SIZE=2 MASTER_PORT=1",
         f"RANK=1 WORLD_SIZE=2 {AT}", f"WORLD_SIZE=2 {AT} MASTER_PORT=1", "LOCAL_RANK=-1", "LOCAL_RANK=cuda",
         f"RANK=2 WORLD_SIZE=2 {AT} MASTER_PORT=1"]


@fault("nonsense in torchrun's variables", n=len(RANKS))
def test_ranks(monkeypatch, survived):
    assert training.read_ranks() == (0, 1, 0)
    for text in RANKS:
        with monkeypatch.context() as m:
            for pair in text.split():
                m.setenv(*pair.split("="))
            with pytest.raises(ValueError, match="start with torchrun"):
                training.read_ranks()
        survived()


def test_ranks_of_a_script(fresh, monkeypatch):
    fresh("randommask")
    monkeypatch.setenv("WORLD_SIZE", "0")
    assert "WORLD_SIZE '0'" in refused(run(flags_of("randommask")))


ROWS = [{"step": step, "loss": 0.1 * step, "note": None} for step in range(1, 6)]
LINES = [json.dumps(row) for row in ROWS]
# a log as another program leaves it: which steps are rows, how many lines are kept aside
LOGS = {"as written": ("\n".join(LINES) + "\n", 5, 0), "no newline": ("\n".join(LINES), 5, 0),
        "no blanks": ("\n".join(json.dumps(row, separators=(",", ":")) for row in ROWS), 5, 0),
        "a BOM": ("\ufeff" + "\n".join(LINES), 5, 0), "Windows": ("\r\n".join(LINES) + "\r\n", 5, 0),
        "blank lines": ("\n\n".join(LINES) + "\n \n", 5, 0), "sorted keys": (
            "\n".join(json.dumps(row, sort_keys=True) for row in ROWS), 5, 0),
        "floats": ("\n".join(LINES).replace('"step": 2', '"step": 2.0'), 5, 0),
        "indented": (json.dumps(ROWS[0], indent=1) + "\n" + "\n".join(LINES[1:]), 4, 5),
        "one list": (json.dumps(ROWS), 0, 1), "half a row": ("\n".join(LINES)[:-9], 4, 1),
        "no step": ("\n".join(LINES).replace('"step": 3', '"stop": 3'), 4, 1),
        "other": ("\n".join([*LINES, "[1]", "3", "null", '"step"', "{}", "hello", "[" * 9999]), 5, 7),
        "notes": ("# my run\n" + "\n".join(LINES), 5, 1)}
LOGS |= {f"step {text}": ("\n".join(LINES).replace('"step": 3', f'"step": {text}'), 4, 1)
         for text in ('"3"', "null", "true", "NaN", "Infinity", "-Infinity", "2.5", "[3]", "{}", "9" * 5000,
                      "1e999")}


@fault("log.jsonl of another program", n=len(LOGS))
def test_edited_logs(tmp_path, survived, capsys):
    """Rows are parsed, not matched; what is no row is kept and announced; later rows are cut."""
    for i, (name, (text, n, aside)) in enumerate(LOGS.items()):
        out = tmp_path / str(i)
        out.mkdir()
        (out / "log.jsonl").write_text(text, newline="")
        training.cut_log(out, 5)
        kept = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        old = out / "log.old.jsonl"
        assert len(kept) == n and all(row in ROWS for row in kept), name
        assert (len(old.read_text().splitlines()) if old.exists() else 0) == aside, name
        assert capsys.readouterr().out.count("\n") == bool(aside) and not [*out.glob("*.tmp")]
        training.cut_log(out, 2)
        assert [json.loads(line)["step"] for line in open(out / "log.jsonl")] == [
            row["step"] for row in kept if row["step"] <= 2]
        survived()


def test_kept_lines_pile_up(tmp_path):
    for text in ("a\xff\n", "b\n"):
        (tmp_path / "log.jsonl").write_bytes(text.encode("latin-1"))
        training.cut_log(tmp_path, 1)
    assert (tmp_path / "log.old.jsonl").read_bytes() == b"a\xff\nb\n"


PLANTED = ["lock", "log.jsonl", "log.jsonl.tmp", "log.old.jsonl", "args.json.tmp", "last.pt.tmp", "link.tmp",
           "randommask.py"]


@fault("planted link in a run folder", n=3 * len(PLANTED))
def test_planted_links(tmp_path, monkeypatch, survived):
    """The file behind a link, to a file or to nothing yet, stays as it was; or a pipe."""
    state = dict(method="m", model={}, optimizer={}, config={}, args={}, data="", step=1)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "randommask.py")])
    parse = training.argparse.Namespace
    for n, name in enumerate(PLANTED):
        for kind in ("file", "nothing", "pipe"):
            out, mine = tmp_path / f"{n}{kind}", tmp_path / f"{n}{kind}.mine"
            out.mkdir()
            if kind == "pipe":
                os.mkfifo(out / name)
            else:
                os.symlink(mine, out / name)
                if kind == "file":
                    mine.write_text("precious\n")
            if name == "log.old.jsonl":
                (out / "log.jsonl").write_text("no row\n")
            try:
                lock = training.open_run(out, parse(), 1)
                training.save(state, out)
                training.save(state, out)
                lock.close()
            except OSError as e:
                assert name in ("lock", "log.jsonl", "log.old.jsonl") and str(out / name) in str(e)
            assert (mine.read_text() if mine.exists() else None) == ("precious\n" if kind == "file" else None)
            survived()


def test_a_link_in_place_of_the_log(tmp_path):
    (tmp_path / "mine").write_text("precious\n")
    os.symlink(tmp_path / "mine", tmp_path / "log.jsonl")
    with pytest.raises(OSError, match="log.jsonl: a link, not followed"):
        training.log(tmp_path, {"step": 1})
    assert (tmp_path / "mine").read_text() == "precious\n"


def trained(steps=2):
    """A network with a part that never has a gradient; its optimizer; their checkpoint."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({name: torch.nn.Linear(3, 3) for name in ("a", "b", "unused")})
    optimizer = training.make_optimizer(model, 0.1, 0.1, (0.9, 0.99), 1e-8)
    for _ in range(steps):
        model["b"](model["a"](torch.ones(2, 3))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"model": model, "optimizer": optimizer}


def moments_cases():
    """Names and functions that take something from the state of an optimizer of four trained parameters."""
    yield "all", lambda state: state.clear()
    for i in (0, 1, 3, 4):
        yield f"{i}", lambda state, i=i: state.pop(i)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            yield f"{i} {key}", lambda state, i=i, key=key: state[i].pop(key)
        yield f"step of {i}", lambda state, i=i: state[i]["step"].add_(1)
        yield f"shape of {i}", lambda state, i=i: state[i].update(exp_avg=torch.zeros(2))
        yield f"type of {i}", lambda state, i=i: state[i].update(exp_avg=3.0)


@fault("checkpoint without Adam moments", n=len([*moments_cases()]))
def test_missing_moments(survived):
    def saved():
        parts = trained()
        return {"step": 2} | {name: part.state_dict() for name, part in parts.items()}
    training.restore(saved(), trained(0))                    # the part without gradients has none
    for name, take in moments_cases():
        state = saved()
        assert [*state["optimizer"]["state"]] == [0, 1, 3, 4]
        take(state["optimizer"]["state"])
        with pytest.raises(ValueError, match="--resume: optimizer"):
            training.restore(state, trained(0))
        survived()


@pytest.mark.slow
@each("notices of a resume on two ranks", [1], {}, PRETRAINING)
def test_notices_once(fresh, method, case):
    """The flags are those of the checkpoint where args.json is missing; rank 0 alone says so."""
    fresh(method, 9)
    state = training.load("out/last.pt")
    torch.save(state | {"made_with": "torch 1.0"}, "out/last.pt")
    os.unlink("out/args.json")
    processes = start(["--resume", "--out", "out"], ranks=2, script=f"{method}.py")
    result = wait(*processes)
    assert result.codes == [0, 0] and "args.json is missing" in result.out and "torch 1.0" in result.out
    assert [file.seek(0) or file.read() for file in processes[1].files] == [b"", b""]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "randommask.py")])


@pytest.mark.parametrize("names, resume, error", [
    (["step_9.pt", "step_10.pt"], False, "holds step_10.pt of a run, but no last.pt; rename it"),
    (["step_9.pt"], True, "holds step_9.pt of a run, but no last.pt; rename it"),
    (["randommask.py"], False, "holds a randommask.py that no run wrote"),
    (["log.jsonl"], False, "holds a log.jsonl that no run wrote"),
    (["args.json"], False, "holds a args.json that no run wrote")])
def test_a_start_takes_nothing_away(here, names, resume, error):
    """Kept checkpoints are work; so is a fork of the script in the folder that --out names."""
    os.mkdir("out")
    for name in names:
        Path("out", name).write_text("mine")
    with pytest.raises(ValueError, match=error):
        training.check_out("out", resume)
    Path("out/lock").touch()
    if "step_9.pt" not in names:                             # of a run that ended before its first checkpoint
        training.check_out("out", resume)


def test_an_out_folder_without_permission(here, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path))
    os.mkdir("locked")
    with pytest.raises(ValueError, match="--out locked/a/b: .*/locked: Permission denied; choose another"):
        training.check_out("locked/a/b", False)


def test_another_run_between_the_look_and_the_lock(here):
    """Two starts: the second still packs its genome while the first begins, saves and is stopped."""
    os.mkdir("out")
    Path("out/last.pt").write_text("of the first")
    with pytest.raises(ValueError, match="holds a run"):
        training.open_run("out", training.argparse.Namespace(), 0, fresh=True)
    assert sorted(os.listdir("out")) == ["last.pt", "lock"]


@pytest.mark.parametrize("change, error", [
    ({"views": "MDIT+NR"}, "out is a run of another script, which has --views; resume it with that script"),
    ({"genome": []}, r"genome \[\] has the wrong type"),
    ({"genome": ["a.fa", 3]}, r"genome \['a.fa', 3\] has the wrong type"),
    ({"keep": ["x"]}, r"keep \['x'\] has the wrong type"),
    ({"verify": True}, None)])
def test_flags_of_a_resumed_run(here, change, error):
    """--verify is for one start: a resumed run does not do it again."""
    parser = training.new_parser("")
    training.add_run_flags(parser, "out", 1)
    os.mkdir("out")
    args = parser.parse_args([])
    Path("out/args.json").write_text(json.dumps(vars(args) | {"out": "out"} | change))
    if not error:
        assert "verify" not in training.read_args(parser, args)
        return
    with pytest.raises(ValueError, match=error):
        training.read_args(parser, args)


def test_advice_fits(here, capsys):
    """What an error advises: changed bases, a checkpoint that is none, a step behind the end, a folder."""
    run = {"method": "m", "config": {}, "data": "new", "args": {"seed": 1}}
    state = run | {"data": "old"}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="its FASTA and BED files"):
        patch.setattr(training, "load_newest", lambda out: (state, None))
        training.load_run("out", run)
    flags = dict(out="out", resume=False, device="cpu", dtype="float32", demo=False, batch_size=1,
                 micro_batch_size=1, steps=6, keep=[7], dry_run=False, track=None)
    with pytest.raises(ValueError, match="--keep 7: the run has 6 steps"):
        training.complete_warmup(training.argparse.Namespace(**flags, warmup=0), 0)
    nan = training.Run(training.argparse.Namespace(**flags | {"keep": []}), writes=True)
    nan.sums, nan.norm = [float("nan")], 0
    with pytest.raises(SystemExit):
        nan.check_finite(1)
    assert "start again with a lower --lr" in capsys.readouterr().err
    os.mkdir("log.jsonl")
    with pytest.raises(SystemExit), training.user_errors():
        open("log.jsonl")
    assert capsys.readouterr().err == "error: log.jsonl: Is a directory\n"


def test_a_broken_checkpoint_without_another(here):
    """The error is about last.pt, not about the prev.pt that never was."""
    os.mkdir("out")
    Path("out/last.pt").write_bytes(b"PK half")
    with pytest.raises(ValueError, match="out/last.pt: not a readable checkpoint"):
        training.load_newest("out")
