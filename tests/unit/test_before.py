"""What a run says before and while it runs: dtype, speed, time left, log, size, memory, steps, trackers."""
import json
import re
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import training
from test_training import make_run  # noqa: F401, a fixture


def test_a_row_has_its_time(tmp_path, capsys):
    training.log(tmp_path, {"step": 1, "loss": 0.5})
    row = json.loads((tmp_path / "log.jsonl").read_text())
    assert abs(row.pop("time") - time.time()) < 5 and row == {"step": 1, "loss": 0.5}
    assert capsys.readouterr().out == "step 1 | loss 0.5\n"


@pytest.mark.parametrize("terminal, ago, said", [(False, 61, True), (False, 59, False), (True, 61, False)])
def test_a_line_a_minute_without_a_terminal(make_run, monkeypatch, capsys, terminal, ago, said):  # noqa: F811
    run = make_run(steps=100)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    run.step, run.numbers, run.per_step = 40, torch.zeros(4, dtype=torch.float64), 10
    run.clock, run.told = time.perf_counter() - 40, time.monotonic() - ago
    run.read()
    out = capsys.readouterr().out
    assert bool(re.match(r"speed    10 tokens/s, .*, 0.017 h left after step 40 of 100\n$", out)) == said
    run.read()
    assert not capsys.readouterr().out                       # once a minute


@pytest.mark.parametrize("days, device, said", [(3.1, "cpu", True), (2.9, "cpu", False), (9, "cuda", False)])
def test_a_run_of_days_on_a_cpu_is_remarked_upon(make_run, capsys, monkeypatch, days, device, said):  # noqa: F811
    run = make_run(steps=100)
    monkeypatch.setattr(training, "memory", str)
    run.device, run.speed, run.per_step = SimpleNamespace(type=device), 1.0, days * 864
    run.tell_speed()
    assert ("the run would take 3 days" in capsys.readouterr().out) == said
    run.tell_speed()
    assert "would take" not in capsys.readouterr().out       # once


@pytest.mark.parametrize("dtype, flags, lacking", [
    ("bfloat16", "avx2 avx512f", True), ("bfloat16", "avx512_bf16", False), ("bfloat16", "amx_bf16", False),
    ("float16", "avx512_bf16", True), ("float16", "avx512_fp16", False), ("float16", "fphp asimdhp", False),
    ("float32", "avx2", False), ("bfloat16", None, False)])
def test_16_bits_that_a_cpu_only_emulates(tmp_path, monkeypatch, capsys, dtype, flags, lacking):
    if flags:
        (tmp_path / "cpuinfo").write_text(f"model name: x\nflags : {flags}\n")
    assert training.lacks(dtype, tmp_path / "cpuinfo") == lacking
    monkeypatch.setattr(training, "lacks", lambda dtype: lacking)
    training.say_once.cache_clear()
    training.set_up("cpu", dtype)
    assert (f"note: --dtype {dtype}: this CPU has no instructions" in capsys.readouterr().out) == lacking
