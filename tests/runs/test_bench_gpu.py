"""tools/bench_gpu.py, the prepared call for a GPU machine, on the CPU: tiny sizes, and jobs that break."""
import os
import signal
import time
from types import SimpleNamespace

import harness
import pytest
import torch
from harness import refused

from tools import bench, bench_gpu
from tools.bench_gpu import TINY, Call


@pytest.fixture
def call(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "gpu.jsonl").touch()
    return Call(str(tmp_path / "gpu.jsonl"), str(tmp_path), "cpu", TINY)


def rows_of(call):
    return {row["name"]: row for row in bench_gpu.finished_rows(call.rows)}


def works():
    yield {"name": "a", "x": 1 / 3, "y": float("nan")}
    yield {"name": "b"}


def raises():
    yield {"name": "first"}
    raise ArithmeticError("too large")


def crashes():
    os.kill(os.getpid(), signal.SIGKILL)
    yield


def hangs():
    print("waiting for the device", flush=True)
    if os.fork():
        time.sleep(100)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(100)
    yield


def test_a_job_that_breaks_costs_no_other_job_its_row(call):
    jobs = [(function, function.__name__) for function in (raises, crashes, hangs, works)]
    started = time.monotonic()
    bench_gpu.run_item(call, "item", jobs, limit=60, most=0.7)
    rows = rows_of(call)
    assert rows["raises"]["failed"] == "exit 1: ArithmeticError: too large" and "first" in rows
    assert rows["crashes"]["failed"].startswith("exit -9")
    assert rows["hangs"]["failed"] == "killed after 1 s: waiting for the device"
    assert rows["a"]["x"] == 0.3333 and "y" not in rows["a"] and "b" in rows
    assert time.monotonic() - started < 80              # the one that hangs would sleep for 100
    log = open(call.rows.replace(".jsonl", ".log")).read()
    assert [log.count(f"##### item: {name}\n") for name in ("raises", "crashes", "hangs", "works")] == [1] * 4


def test_an_item_ends_at_its_limit(call):
    bench_gpu.run_item(call, "item", [(hangs, "hangs"), (works, "works")], limit=0.5, most=90)
    rows = rows_of(call)
    assert rows["hangs"]["failed"].startswith("killed") and rows["works"]["failed"].startswith("not started")


def test_jobs_start_side_by_side_and_time_in_turn(call):
    def turn():
        with bench_gpu.in_turn(call):
            start = time.time()
            time.sleep(0.2)
            yield {"name": str(start), "start": start, "end": time.time()}
    jobs = [(turn, str(i)) for i in range(3)]
    bench_gpu.run_item(call._replace(size=SimpleNamespace(lanes=3)), "item", jobs, 30, 30)
    times = sorted((row["start"], row["end"]) for row in bench_gpu.finished_rows(call.rows))
    assert len(times) == 3 and times[0][1] <= times[1][0] and times[1][1] <= times[2][0]


def test_a_run_of_one_rank_takes_the_path_of_many():
    one = bench_gpu.OneOfMany(1)
    assert one > 1 and not 2 < one and 0 + one < 2 and 2 / one == 2 and 3 % one == 0


def test_bytes_of_findnas_step():
    """By hand: 40 blocks, 308 and 512 wide, 2 bytes a number, read or written once."""
    forward = 308 + 512 + 512 + 308 + 3 * 308
    backward = 2 * 308 + 2 * (308 + 512) + 512 + 2 * (512 + 308) + 2 * 308
    assert bench_gpu.mixer_bytes(bench.MIXER) == 40 * 2 * (2 * forward + backward)


def test_the_kinds_of_kernels():
    class Event(SimpleNamespace):
        device_type = torch.autograd.DeviceType.CUDA
    names = {"sm90_xmma_gemm_bf16": 6, "nvjet_tst_128x256": 2, "pytorch_flash::flash_bwd_kernel": 4,
             "cudnn_generated_fort_native_sdpa_sm90_bprop": 1, "Memcpy HtoD": 1, "triton_poi_fused_gelu": 6}
    events = [Event(key=name, self_device_time_total=t) for name, t in names.items()]
    found = bench_gpu.shares(SimpleNamespace(key_averages=lambda: events), cuda=True)
    assert found == {"matrix products": 0.4, "attention": 0.25, "copies": 0.05, "other": 0.3}


def test_what_cannot_be_called(tmp_path):
    (tmp_path / "gpu.jsonl").touch()
    with pytest.raises(ValueError, match="holds a call"):
        bench_gpu.main(tmp_path, "cpu")
    with pytest.raises(ValueError, match="no item speed"):
        bench_gpu.main(tmp_path / "a", "cpu", ["speed"])
    if not torch.version.cuda:
        with pytest.raises(ValueError, match="no CUDA device; --device cpu proves the call"):
            bench_gpu.main(tmp_path / "a", "auto")
    assert "with --out DIR" in refused(harness.run(["gpu"], script="tools.bench"))
    assert not (tmp_path / "a").exists()


def check_rows(rows):
    assert [row for row in rows if "failed" in row] == []
    for row in rows:
        if row["item"] in ("bert", "findna", "tuning", "card"):
            assert row["from"] <= row["ms"] <= row["to"] and 0.99 < sum(row["shares"].values()) < 1.01, row
        if row["item"] == "resume":
            assert row["bitwise"] and row["stopped with"] == 143, row
        if row["item"] == "ranks" and row["name"] != "finetune.py":
            assert row["relative difference"] < 1e-6 and row["infinite gradient: exit code"] == 3, row


def test_a_script_is_watched(tmp_path, monkeypatch, capsys):
    """The call with one job."""
    jobs_of = bench_gpu.jobs_of
    monkeypatch.setattr(bench_gpu, "jobs_of", lambda item, call: [
        job for job in jobs_of(item, call) if job[1] == "bert 0.1 --no-compile"])
    assert bench_gpu.main(tmp_path / "out", "cpu", ["bert"]) == 0
    machine, row = rows = bench_gpu.finished_rows(tmp_path / "out" / "gpu.jsonl")
    check_rows(rows)
    assert row["tokens/s"] == pytest.approx(8 * 18 / row["ms"] * 1e3, rel=1e-3)
    assert f"torch {torch.__version__}" in machine["machine"]
    assert "| bert | ours, dropout 0.1 --no-compile | tokens/s" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_call(tmp_path):
    """Every job of every item, as on a GPU but for the sizes; takes minutes."""
    code = bench_gpu.main(tmp_path / "out", "cpu")
    rows = bench_gpu.finished_rows(tmp_path / "out" / "gpu.jsonl")
    check_rows(rows)
    n = {item: sum(row["item"] == item for row in rows) for item in ("machine", *bench_gpu.LIMITS)}
    assert code == 0 and n == {"machine": 1, "ceilings": 17, "resume": 8, "ranks": 4, "bert": 10, "findna": 7,
                               "tuning": 10, "card": 2}
