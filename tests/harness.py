"""Runs scripts in forks of the test process, to the end or to a fault; writes and reads their files."""
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
LOCAL = {"tools", *(path.stem for path in ROOT.glob("*.py"))}                 # the modules of this repository


def fork(function):
    """Starts function() in a fork; its output goes to files."""
    files = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]

    def main():
        for fd, file in enumerate(files, 1):
            os.dup2(file.fileno(), fd)
        sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
        function()
    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    process.files = files
    return process


def wait(*processes, limit=300):
    """Waits for forks; returns their exit codes (-9: killed) and what the first printed. None may take longer
    than limit seconds."""
    for process in processes:
        process.join(limit)
        if process.is_alive():
            process.kill()
            raise AssertionError("the process hung")
    out, err = (file.seek(0) or file.read().decode() for file in processes[0].files)
    codes = [process.exitcode for process in processes]
    return SimpleNamespace(code=codes[0], codes=codes, out=out, err=err)


def start(args, patches={}, ranks=1, script="randommask.py"):
    """Starts a script (`X.py` or `tools.X`), one fork for each rank; patches[rank]() runs before it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1]), "WORLD_SIZE": str(ranks)}

    def main(rank):
        for name in [name for name in sys.modules if name.split(".")[0] in LOCAL]:
            del sys.modules[name]                            # imported anew, as in a new process
        os.environ.update(env | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
        path = script if script.endswith(".py") else f"{script.replace('.', '/')}.py"
        sys.argv = [str(ROOT / path), *map(str, args)]
        patches.get(rank, lambda: None)()
        if script.endswith(".py"):
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
    return [fork(lambda: main(rank)) for rank in range(ranks)]


def run(*args, **kwargs):
    return wait(*start(*args, **kwargs))


def at_call(module, name, n, fault, only=lambda *args: True):
    """Patch: the n-th call of module.name becomes fault(real, *args). `only` picks the calls that count."""
    def patch():
        owner, calls = importlib.import_module(module), []
        real = getattr(owner, name)

        def wrapped(*args, **kwargs):
            calls.extend([1] * only(*args))
            return fault(real, *args, **kwargs) if only(*args) and len(calls) == n else real(*args, **kwargs)
        setattr(owner, name, wrapped)
    return patch


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def slow():
    """Patch: a step takes at least 40 ms, so that a test can act in the middle of a run."""
    training = importlib.import_module("training")
    scale = training.scale_gradients                         # once a step
    training.scale_gradients = lambda *args: time.sleep(0.04) or scale(*args)


def command_line(flags):
    """{name: value} as arguments: a list or range is several values, True none; False leaves a flag out."""
    args = []
    for name, value in flags.items():
        if value is not False:
            values = value if isinstance(value, (list, range)) else [value]
            args += [f"--{name}", *(str(x) for x in values if x is not True)]
    return args


def wait_rows(process, out, n):
    """Waits until the log of a running fork has n rows."""
    while not (out / "log.jsonl").exists() or (out / "log.jsonl").read_text().count("\n") < n:
        assert process.is_alive(), "the run ended too early"
        time.sleep(0.003)


def random_dna(n, rng, letters="ACGT"):
    return "".join(np.array(list(letters))[rng.integers(len(letters), size=n)])


def write_fasta(path, contigs):
    path.write_text("".join(f">{name}\n{text}\n" for name, text in contigs.items()))
    return path


def cases(name):
    return json.loads((ROOT / "tests" / "cases" / name).read_text())


def expand(spec):
    """Expands the text of a case: a string, or a list of [string, times]."""
    return spec if isinstance(spec, str) else "".join(text * times for text, times in spec)


def write_case(case, path):
    path.write_bytes(bytes.fromhex(case["hex"]) if "hex" in case else expand(case["text"]).encode("latin-1"))
    return path


def results_row(**fields):
    """A row of results.jsonl."""
    return {"id": "0", "task": "csv/t", "shots": None, "seed": 42, "init": "kmer", "weights": "", "data": "",
            "mode": "finetune", "pool": None, "protocol": "strict", "overrides": {}, "long": "chunk",
            "stride": 1, "metric": "mcc", "score": 0.5, "collapsed": False, "test": {}} | fields


def equal(a, b):
    """Asserts that two nested structures of tensors and numbers are the same, bit for bit."""
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def changed(flags, by):
    """These flags and values without those that `by` gives, then `by`: a flag of a list may be given once."""
    kept, drop = [], False
    for word in map(str, flags):
        drop = word in by if word.startswith("--") else drop
        kept += [] if drop else [word]
    return [*kept, *by]


def log_rows(out):
    """Reads log.jsonl; drops the timing."""
    rows = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in ("tokens_per_s", "mfu", "time")} for row in rows]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(result):
    """Asserts exit code 2 and one line `error: ...`, behind argparse's usage if any; returns the line."""
    *usage, last = result.err.strip().splitlines() or [""]
    assert set(result.codes) == {2} and "error: " in last and len(last) < 900, result
    assert "error: " not in "".join(usage) and (not usage or usage[0].startswith("usage: ")), result
    return last
