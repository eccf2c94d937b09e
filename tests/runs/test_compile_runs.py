"""--compile in whole runs on a CPU: as without it, also where there is no compiler. On a GPU: test_gpu.py."""
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness import ROOT, log_rows, wait
from methods import METHODS, PRETRAINING, begin, go, run_folder, write_inputs

SHORT = dict(steps=3, eval_every=3, save_every=0)
FLAGS = {method: SHORT | dict(dropout=0) for method in PRETRAINING} | {
    "randommask": SHORT | dict(dropout=0, keep=3), "finetune": dict(epochs=2, dropout=0, protocol="strict")}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    write_inputs(Path())


def no_compiler():
    importlib.import_module("torch._inductor.config").cpp.cxx = (None, "/nothing")


def losses(method, out):
    return [[x for name, x in row.items() if "loss" in name] for row in log_rows(run_folder(method, out))]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler, g++")
@pytest.mark.parametrize("method", METHODS)
def test_compiled_runs_have_the_same_losses(method):
    """Two to four minutes each on a core of its own."""
    eager, compiled = Path("eager").absolute(), Path("compiled").absolute()
    for folder, flags in ((eager, {}), (compiled, {"compile": True})):
        folder.mkdir()
        os.chdir(folder)
        write_inputs(Path())
        result = wait(*begin(method, **FLAGS[method], **flags), limit=1200)
        assert result.code == 0 and "compile  off" not in result.out, result
    assert (eager.parent / "cache").exists()                 # of inductor
    for rows in zip(losses(method, eager), losses(method, compiled), strict=True):
        assert rows[0] == pytest.approx(rows[1], rel=1e-4)


@pytest.mark.parametrize("method", ["randommask", *(pytest.param(method, marks=pytest.mark.slow)
                                                    for method in METHODS if method != "randommask")])
def test_without_a_compiler(method):
    """One line, and the run goes on as without --compile, bit for bit."""
    assert go(method, **FLAGS[method]).code == 0
    wanted = log_rows(run_folder(method))
    shutil.rmtree("out")
    result = go(method, {0: no_compiler}, compile=True, **FLAGS[method])
    assert result.code == 0 and result.out.count("compile  off, as torch.compile fails here") == 1, result
    assert "No working C++ compiler" in result.out and "Traceback" not in result.err, result
    if method == "cm_gems":                                  # its rows are padded to fewer lengths
        assert [row["loss"] for row in log_rows(Path("out"))] == pytest.approx(
            [row["loss"] for row in wanted], rel=1e-5)
    else:
        assert log_rows(run_folder(method)) == wanted


def test_one_rank_without_a_compiler():
    """Then none compiles: both ranks take the same decision, and rank 0 alone says so."""
    processes = begin("findna", {1: no_compiler}, 2, compile=True, **FLAGS["findna"])
    result = wait(*processes)
    assert result.codes == [0, 0] and result.out.count("compile  off") == 1, result
    assert "/nothing" in result.out
    [_, of_rank_1] = [file.seek(0) or file.read().decode() for file in processes[1].files]
    assert "Traceback" not in of_rank_1
    compiled = log_rows(Path("out"))
    shutil.rmtree("out")
    assert go("findna", {}, 2, **FLAGS["findna"]).codes == [0, 0]
    assert log_rows(Path("out")) == compiled


NO_FCNTL = """
import runpy, sys
sys.modules |= {{"fcntl": None, "resource": None}}
sys.argv = {argv!r}
sys.path[0] = {folder!r}
runpy.{how}({name!r}, run_name="__main__")
"""


@pytest.mark.parametrize("script", [*(f"{method}.py" for method in METHODS), "tools.table", "tools.download",
                                    "tools.bench"])
def test_windows(script):
    """Python there has no fcntl and no resource: one line, exit code 2."""
    how, name = ("run_path", str(ROOT / script)) if script.endswith(".py") else ("run_module", script)
    code = NO_FCNTL.format(argv=[name, "--help"], folder=str(ROOT), how=how, name=name)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stderr, result.stdout) == (
        2, "error: nanoDNA needs Linux or macOS (file locks); use WSL on Windows\n", "")
