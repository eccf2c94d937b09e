"""What a run says before and while it runs: dtype, speed, time left, log, size, memory, steps, trackers."""
import argparse
import io
import json
import math
import os
import re
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import models
import randommask
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
    out = capsys.readouterr().out
    assert ("the run would take 3 days" in out) == ("days" in out) == said
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


def test_the_papers_passes_over_another_genome():
    """480,000 steps of 512 windows are 43 passes over hg38; so many over a yeast of 12 Mb are 1,961 steps.
    Non-overlapping 6-mers (windows of 3,060 bases) have as many steps there, as on hg38."""
    flags = dict(stride=1, k=6, mask="randommask", p=None, size=None, genome=["x.fa"], bed=None,
                 batch_size=512, block_size=512, steps=None, warmup=None, keep=[])
    args = argparse.Namespace(**flags)
    assert [round(randommask.paper_passes(6, stride)) for stride in (1, 6)] == [43, 256]
    randommask.complete_args(args, 12_000_000)
    assert args.steps == math.ceil(480_000 * 12e6 / 2_937_639_113) == 1961 and args.warmup == 39
    assert args.keep == [4, 123, 1226]
    other = argparse.Namespace(**flags | {"batch_size": 64, "block_size": 128})
    randommask.complete_args(other, 12_000_000)
    assert round(other.steps * 64 * 131 / 12_000_000, 2) == round(480_000 * 512 * 515 / 2_937_639_113, 2)
    apart = argparse.Namespace(**flags | {"mask": "single", "stride": 6})
    randommask.complete_args(apart, 12_000_000)
    assert apart.steps == 1961 and apart.p == 0.15
    for bed, steps in ((None, 480_000), ("x.bed", None)):    # regions of hg38 are another genome
        args = argparse.Namespace(**flags | {"genome": ["hg38"], "bed": bed})
        randommask.complete_args(args)
        assert args.steps == steps


@pytest.mark.parametrize("passes, demo, warned", [(101, False, True), (99, False, False), (101, True, False)])
def test_many_passes_and_unused_flags_are_warned_of(make_run, monkeypatch, capsys, passes, demo, warned):  # noqa: F811
    run = make_run(genome=["x"])
    run.args.demo, run.needs = demo, ""
    monkeypatch.setattr(training, "IDLE", ["--ema", "--flip"] if warned else [])
    run.describe(torch.nn.Linear(1, 1), "", passes, 1)
    said = capsys.readouterr().out
    assert ("warning: 101 passes" in said) == warned
    assert ("note: --ema, --flip: without effect beside the other flags\n" in said) == warned


def kept_bytes(network, *inputs, **options):
    """Bytes of what autograd saves in a forward pass, but for the weights."""
    kept = {p.untyped_storage().data_ptr(): p for p in network.parameters()}
    n = len(kept)

    def pack(t):
        kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        network(*inputs, **options)
    return sum(t.untyped_storage().nbytes() for t in [*kept.values()][n:])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_a_pass_keeps_is_estimated(dropout):
    bert = models.Bert(models.BertConfig(69, 128, 3, 2, 64, 256, dropout))
    tokens = torch.randint(5, 69, (8, 128))
    labels = tokens.where(torch.rand(8, 128) < 0.25, -100)
    mixer = models.BaseModel(models.ChordMixer(models.ChordMixerConfig(128, 2, 8, 64, dropout)))
    encoder = models.BaseModel(models.Encoder(models.EncoderConfig(128, 2, 4, 64, dropout)))
    bases = torch.rand(8, 128, 5)
    for kept, net in ((kept_bytes(bert, tokens, labels), bert), (kept_bytes(mixer, bases), mixer),
                      (kept_bytes(encoder, bases), encoder)):
        assert 0.9 < kept / (8 * 128 * 4 * net.saved_per_token(128, False)) < 1.1


@pytest.mark.parametrize("free, flags, advice", [
    (8e9, {}, "--micro_batch_size 7 or --size small"), (1e9, {}, "use --size small"),
    (8e9, {"resume": True}, "use a larger machine"), (1e6, {"size": "mini"}, "use a smaller network"),
    (99e9, {}, None), (1e6, {"show_masks": 2}, None)])
def test_too_little_memory(make_run, monkeypatch, free, flags, advice):  # noqa: F811
    """The network is not built: BERT-base on the meta device allocates nothing."""
    monkeypatch.setattr(training, "free_memory", lambda device: free)
    base = dict(k=6, block_size=512, n_layer=12, n_head=12, n_embd=768, dropout=0.1, seed=1, init=None,
                size=None, show_masks=None)
    run = make_run(**base | {"batch_size": 512, "micro_batch_size": 64})
    vars(run.args).update(flags)
    if advice is None:                                       # what only shows masks trains nothing
        run.check_memory(randommask.build_model, 512)
        assert flags or run.needs == "about 53 GB of 99 GB free"
        return
    with pytest.raises(ValueError, match=f"memory: the run needs about 53 GB of .*{advice}$"):
        run.check_memory(randommask.build_model, 512)


def test_free_memory_is_the_least_of_machine_and_group(monkeypatch):
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    4000 kB\n",
             "/proc/self/cgroup": "5:cpu:/x\n4:memory:/job\n0::/slice\n",
             "/sys/fs/cgroup/memory.max": "max\n"}

    def read(path):
        if path not in files:
            raise FileNotFoundError
        return io.StringIO(files[path])
    monkeypatch.setattr("builtins.open", read)
    cpu = torch.device("cpu")
    assert training.free_memory(cpu) == 4_096_000
    for path in ("/sys/fs/cgroup/slice/memory.max", "/sys/fs/cgroup/memory/job/memory.limit_in_bytes"):
        files[path] = "1000\n"
        assert training.free_memory(cpu) == 1000
        del files[path]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert training.free_memory(cpu) == 1_024_000


class Tracker:
    def __init__(self):
        self.calls = []

    def init(self, **flags):
        self.calls.append(flags)

    def log(self, row, step):
        self.calls.append((step, row))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_the_rows_and_a_resumed_run_its_curve(make_run, monkeypatch, name):  # noqa: F811
    fake = Tracker()
    monkeypatch.setitem(sys.modules, name, fake)
    run = make_run(track=name)
    os.mkdir("out")
    run.track, run.to_evaluate = training.open_tracker(run.args, 0), False
    run.step = 3
    run.log({"loss": 0.5, "strategy": "global", "grad_norm": None}, None)
    assert fake.calls[1:] == [(3, {"loss": 0.5})]
    run.to_evaluate, run.stop = True, True                   # the evaluation is left to the resumed run,
    run.log({"loss": 0.25}, None)                            # which gives the tracker the whole row
    assert len(fake.calls) == 2 and run.row == {"loss": 0.25}
    run.to_evaluate, run.stop = False, False
    first = fake.calls[0]
    assert first["project"] == "nanoDNA" and first["resume"] == "allow" and first["name"].startswith("out-")
    training.open_tracker(run.args, 3)
    assert fake.calls[2]["name"] == first["name"]            # resumed
    time.sleep(0.002)
    training.open_tracker(run.args, 0)
    assert fake.calls[3]["name"] != first["name"]            # a new run in its place
    assert training.open_tracker(argparse.Namespace(track=None), 0) is None


def test_tensorboard(make_run, monkeypatch):  # noqa: F811
    writer, made = SimpleNamespace(rows=[]), []
    writer.add_scalar = lambda *row: writer.rows.append(row)
    fake = SimpleNamespace(SummaryWriter=lambda out, **flags: made.append((out, flags)) or writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    training.open_tracker(make_run(track="tensorboard").args, 7)({"loss": 1.5}, 8)
    assert made == [("out", {"purge_step": 8, "flush_secs": 30})] and writer.rows == [("loss", 1.5, 8)]


def test_a_missing_tracker_is_said_at_once(make_run, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "trackio", None)
    args = make_run(track="trackio").args
    with pytest.raises(ValueError, match="--track trackio: its package is missing; pip install trackio"):
        training.Run(args, writes=True)
    assert not os.path.exists("out")
