"""float16 with its loss scaling in whole runs on a CPU; on a GPU it was not run."""
import functools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import training
from harness import equal, log_rows
from methods import METHODS, PRETRAINING, ending, go, keep, run_folder, write_inputs

SHORT = {method: dict(steps=8, eval_every=4, keep=8) for method in PRETRAINING} | {"finetune": dict(epochs=3)}
FIRST = dict.fromkeys(METHODS, 19) | {"finetune": 30, "cm_gems": 16}           # exponents of the first scale


def scale_too_much(method, *patches):
    """Patch: a first scale at which the gradients overflow; and these patches."""
    def patch():
        torch.amp.GradScaler = functools.partial(torch.amp.GradScaler, init_scale=2.0 ** FIRST[method])
        for other in patches:
            other()
    return {0: patch}


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_in_float16(tmp_path, monkeypatch, method):
    """Ends bit for bit like one that never stopped: scale, skipped steps, weights, log."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("steps")
    write_inputs(Path())
    flags = SHORT[method] | {"dtype": "float16"}
    assert go(method, scale_too_much(method, keep(Path("steps").resolve())[0]), **flags).code == 0
    here, wanted, rows = run_folder(method), ending(method), log_rows(run_folder(method))
    states = [training.load(f"steps/{step}.pt") for step in range(1, len(os.listdir("steps")) + 1)]
    last, skipped = states[-1], int(states[-1]["skipped"])
    assert last["scaler"]["scale"] == 2 ** (FIRST[method] - skipped) and 0 < skipped < last["step"]
    assert rows[-1]["skipped"] == skipped and "NaN" not in (here / "log.jsonl").read_text()
    if method != "finetune":
        assert [row["grad_norm"] is None for row in rows] == [
            now["skipped"] > before["skipped"] for before, now in zip([{"skipped": 0}, *states], states)]
        norms = [row["grad_norm"] for row in rows if row["grad_norm"]]         # 0 where nothing is masked
        assert norms and max(norms) < 50
    for name in ("results.jsonl", "prev.pt", "last.pt", "csv_train/random.pt"):
        Path("out", name).unlink(missing_ok=True)
    shutil.copy("steps/3.pt", here / "last.pt")
    assert go(method, scale_too_much(method), **flags).code == 0
    assert ending(method) | {"args": 0} == wanted | {"args": 0}                # --resume is in them


def test_float16_learns_as_float32_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_inputs(Path())
    losses = {}
    for dtype in ("float32", "float16"):
        assert go("finetune", dtype=dtype, out=dtype, epochs=6, protocol="strict").code == 0
        [row] = map(json.loads, Path(dtype, "results.jsonl").read_text().splitlines())
        [log] = Path(dtype).glob("csv_train/*/log.jsonl")
        losses[dtype] = [entry["loss"] for entry in log_rows(log.parent)]
        assert row["dtype"] == dtype
    assert losses["float16"][-1] == pytest.approx(losses["float32"][-1], abs=0.1)
    assert losses["float32"][-1] < losses["float32"][0] - 0.1


def test_two_ranks_in_float16(tmp_path, monkeypatch):
    """They skip the same steps as one rank does, and end like it, bit for bit."""
    monkeypatch.chdir(tmp_path)
    write_inputs(Path())
    states, flags = [], SHORT["randommask"] | {"dtype": "float16"}
    for ranks in (1, 2):
        patches = {rank: scale_too_much("randommask")[0] for rank in range(ranks)}
        assert go("randommask", patches, ranks, out=f"out{ranks}", **flags).codes == [0] * ranks
        states.append(training.load(f"out{ranks}/last.pt"))
    assert states[0]["skipped"] == states[1]["skipped"] > 0
    equal(*({name: state[name] for name in ("model", "optimizer", "scaler")} for state in states))
