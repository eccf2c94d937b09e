"""The step that the pretraining scripts share: when it saves, float16 and its loss scaling, what compiles."""
import argparse
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import models
import training
from harness import equal

FLAGS = dict(out="out", resume=False, device="cpu", dtype="float32", demo=False, batch_size=1, steps=999,
             micro_batch_size=1, keep=[], dry_run=False, track=None, eval_every=998, log_every=998,
             save_every=1.0)


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """make_run(**flags): a Run in an empty folder, in its loop."""
    monkeypatch.chdir(tmp_path)

    def make(**flags):
        run = training.Run(training.argparse.Namespace(**FLAGS | flags), writes=False)
        run.values, run.per_step, run.unit = {"skipped": 0}, 1, "tokens"
        run.step, run.timed, run.clock, run.saved = 0, 0, time.perf_counter(), time.monotonic()
        return run
    return make


def next_step(run, sums=(1.0, 1.0), norm=1.0):
    """What a loop does between the backward pass and the log, without a network; True if it then saves."""
    run.step += 1
    run.numbers = torch.tensor([0, 0, 0, *sums], dtype=torch.float64)
    run.sum_over_ranks()
    run.numbers[2] = norm
    run.read()
    return run.to_save


@pytest.mark.parametrize("minutes, ago, rank, due", [
    (1.0, 61, 0, True), (1.0, 58, 0, False), (0.0, 10 ** 6, 0, False), (1e-9, 0.001, 0, True),
    (1.0, 10 ** 6, 1, False)])                               # rank 0's clock decides
def test_a_save_is_due_by_the_clock(make_run, minutes, ago, rank, due):
    run = make_run(save_every=minutes)
    run.rank, run.saved = rank, time.monotonic() - ago
    assert next_step(run) == due
    if due and minutes == 1:
        run.rank = 1                                         # writes nothing, but restarts the clock
        run.save()
        run.rank = 0
        assert not next_step(run)


def test_all_ranks_save_when_rank_0_is_due(make_run, monkeypatch):
    def with_rank_0(numbers):
        numbers[1] += 1
        return numbers
    run = make_run(save_every=1.0)
    run.rank = 1
    monkeypatch.setattr(training, "all_reduce", with_rank_0)
    assert next_step(run)


def test_a_gpu_saves_a_step_later(make_run):
    """The host reads the numbers of a step during the next one; a save waits for both."""
    run = make_run(save_every=1.0)
    run.device, run.saved = SimpleNamespace(type="cuda"), time.monotonic() - 61
    assert not next_step(run) and len(run.unread) == 1
    assert next_step(run) and run.unread == []
    run.saved = time.monotonic()
    assert not next_step(run) and not next_step(run) and len(run.unread) == 1
    run.device = SimpleNamespace(type="cuda")
    with pytest.raises(SystemExit):                          # the step that is read late is checked, too
        next_step(run, sums=(math.nan, 1.0))
        next_step(run)


def test_a_run_whose_saves_counted_steps(make_run, capsys):
    """Of version 0.2: 1000 steps must not become 1000 minutes."""
    make_run()
    parser = training.new_parser("")
    training.add_run_flags(parser, "out", 1)
    args = parser.parse_args([])
    Path("out").mkdir()
    for value, kept in ((1000, None), (1000.0, "1000.0")):
        Path("out/args.json").write_text(json.dumps(vars(args) | {"save_every": value}))
        assert training.read_args(parser, args).get("save_every") == kept
        assert ("counts steps: now 10 minutes" in capsys.readouterr().out) == (kept is None)


def train(run, losses):
    """Steps of a linear layer under these losses (functions of its output); returns it and its optimizer."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 1)
    optimizer = training.make_optimizer(layer, 0.1, 0.1, (0.9, 0.99), 1e-8)
    for loss_of in losses:
        run.step += 1
        sums = run.new_sums(1)
        loss = loss_of(layer(torch.ones(2, 3)))
        run.scaler.scale(loss).backward()
        sums += loss.detach()
        run.sum_over_ranks()
        run.scaler.unscale_(optimizer)
        run.update(optimizer, 0.1, training.scale_gradients(layer, torch.tensor(0.5), 0.2))
        run.read()
    return layer, optimizer


def square(x):
    return x.square().sum()


def steep(x):
    """A finite loss whose gradient overflows once it is scaled."""
    return (x * 1e36).sum()


def test_loss_scaling_changes_no_step(make_run):
    """Without an overflow the weights are those without scaling: the scale is a power of two."""
    plain, scaled = (train(make_run(dtype=dtype), [square] * 5) for dtype in ("float32", "float16"))
    equal(*(layer.state_dict() for layer, _ in (plain, scaled)))
    equal(*(optimizer.state_dict() for _, optimizer in (plain, scaled)))


def test_an_overflow_skips_the_step_and_halves_the_scale(make_run):
    run = make_run(dtype="float16")
    layer, optimizer = train(run, [square, steep, square, steep])
    wanted, other = train(make_run(dtype="float16"), [square, square])
    equal(layer.state_dict(), wanted.state_dict())
    equal(optimizer.state_dict(), other.state_dict())        # its steps, too
    assert run.values["skipped"] == 2 and run.scaler.get_scale() == 2 ** 14 and run.norm is None


def test_what_ends_a_run_in_float16(make_run, capsys):
    """A loss that is not finite, at once; a gradient, after 100 steps in a row; in float32, both at once."""
    run = make_run(dtype="float16")
    for _ in range(99):
        next_step(run, norm=math.inf)
    next_step(run)
    for _ in range(99):
        next_step(run, norm=math.nan)
    with pytest.raises(SystemExit) as end:
        next_step(run, norm=math.inf)
    assert end.value.code == 3 and "step 200: not finite" in capsys.readouterr().err
    for dtype, sums, norm in (("float16", (math.nan, 1.0), 1.0), ("float32", (1.0, 1.0), math.inf)):
        with pytest.raises(SystemExit) as end:
            next_step(make_run(dtype=dtype), sums, norm)
        assert end.value.code == 3


def test_dtypes_of_a_gpu_without_bf16(monkeypatch):
    """As on a T4 or 2080 Ti."""
    gpu = dict(is_available=True, device_count=1, set_device=None, is_bf16_supported=False)
    for name, value in gpu.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    assert training.set_up("auto", "auto", join=False)[1] == "float16"
    with pytest.raises(ValueError, match="does not support it; use --dtype float16"):
        training.set_up("cuda", "bfloat16", join=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert training.set_up("cuda", "auto", join=False)[1] == "bfloat16"
    assert training.set_up("cpu", "auto", join=False)[1] == "float32"


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H200", 989e12), ("NVIDIA RTX A1000 Laptop GPU", None), ("NVIDIA A10", None)])
def test_mfu(make_run, monkeypatch, name, peak):
    """Peaks: dense bf16, NVIDIA's data sheets."""
    run = make_run()
    run.device, run.world, run.speed = torch.device("cuda", 0), 2, 1e6
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert run.mfu(3e8) == ({"mfu": pytest.approx(1e6 * 3e8 / 2 / peak)} if peak else {})


def failing(inner):
    """Patch of torch.nn.Module.compile: the first call of what was compiled raises this."""
    def compile_(module):
        def call(*_):
            raise torch._dynamo.exc.BackendCompilerFailed("inductor", inner, None)
        module._compiled_call_impl = call
    return compile_


def test_a_network_that_cannot_be_compiled_stays_as_it_is(monkeypatch, capsys):
    """One line says why, however many networks there are."""
    training.can_compile.cache_clear()
    monkeypatch.setattr(torch.nn.Module, "compile", failing(RuntimeError("no compiler\nat all")))
    for _ in range(2):
        net = training.wrap(torch.nn.Linear(2, 2), True, torch.device("cpu"), 1)
        assert net(torch.ones(2)).shape == (2,)
    assert capsys.readouterr().out == "compile  off, as torch.compile fails here: RuntimeError: no compiler\n"
    training.can_compile.cache_clear()


def test_a_compilation_that_fails_later(capsys):
    """For instance, with a half-written file of inductor's cache: one line and exit code 2."""
    error = torch._dynamo.exc.BackendCompilerFailed("inductor", OSError("a.so: file too short"), None)
    with pytest.raises(SystemExit) as end, training.user_errors(OSError):
        raise error
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1 and "a.so: file too short; remove its cache" in line
    with pytest.raises(RuntimeError, match="ours"), training.user_errors(OSError):
        raise RuntimeError("ours")


def test_sums_over_the_windows_of_a_sequence():
    x, n_windows, close = torch.randn(6, 2), torch.tensor([1, 3, 2]), torch.testing.assert_close
    parts = x.split(n_windows.tolist())
    close(models.by_sequence(x, n_windows), torch.stack([part.sum(0) for part in parts]))
    close(models.over_windows(x, n_windows), torch.stack([part.mean(0) for part in parts]))
    assert models.over_windows(x, None) is x


def test_a_schedule_without_warm_up_starts_at_the_peak():
    """As transformers' schedules do, whose step 0 is our step 1."""
    for ours, theirs in ((training.linear, transformers.get_linear_schedule_with_warmup),
                         (training.cosine, transformers.get_cosine_schedule_with_warmup)):
        schedule = theirs(torch.optim.SGD([torch.zeros(1)], 1.0), 0, 10).lr_lambdas[0]
        assert [ours(step, 10, 0) for step in range(1, 11)] == pytest.approx([schedule(i) for i in range(10)])
        assert max(ours(step, 10, 4) for step in range(1, 11)) == ours(4, 10, 4) == 1


def test_shares_take_both_ends():
    assert [training.share(text) for text in ("0", "0.5", "1")] == [0, 0.5, 1]
    for text in ("-0.1", "1.01", "nan"):
        with pytest.raises(argparse.ArgumentTypeError, match=rf"{text} is outside \[0, 1\]$"):
            training.share(text)
    with pytest.raises(argparse.ArgumentTypeError, match=r"1 is outside \[0, 1\)$"):
        training.number(float, 0, 1)("1")


def test_a_list_is_given_once(capsys):
    """argparse would forget the first of two; of a single value the last counts, as usual."""
    parser = training.make_parser("")
    parser.add_argument("--genome", nargs="+", default=["hg38"])
    parser.add_argument("--lr", type=float, default=1.0)
    for _ in range(2):                                       # a parser parses several times
        assert vars(parser.parse_args(["--genome", "a", "b", "--lr", "2", "--lr", "3"])) == {
            "genome": ["a", "b"], "lr": 3}
        assert parser.parse_args([]).genome == ["hg38"]
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--genome", "a", "--genome", "b"])
    assert "argument --genome: given twice; give all its values after one --genome" in capsys.readouterr().err


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: a folder; give {tmp_path}/last.pt, or hf:{tmp_path}"):
        training.load(tmp_path)
