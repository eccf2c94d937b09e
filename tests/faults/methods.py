"""A tiny run of 20 steps of each method, what is started to go on with it and what it must end as.

All paths are relative: a test, or a round of the soak, has a working folder of its own."""
import importlib
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from harness import at_call, log_rows, random_dna, run, slow, start, wait_rows, write_fasta

STEPS, N_SEQUENCES = 20, 144
BERT = dict(k=3, n_layer=1, n_head=2, n_embd=16, dropout=0.1, device="cpu", out="out", lr=3e-3)
LOOP = dict(genome="genome.fa", batch_size=8, micro_batch_size=4, steps=STEPS, eval_every=2, eval_windows=10,
            log_every=1, save_every=4)
METHODS = {
    "randommask": BERT | LOOP | dict(block_size=22, keep=STEPS),
    "findna": dict(length=30, windows=23, n_layer=1, track_size=2, hidden=8, dropout=0.1, device="cpu",
                   out="out", lr=3e-3) | LOOP,
    "cm_gems": BERT | LOOP | dict(block_size=22, n_inner=32, switch_after=10, switch_drop=99),
    # evaluated every 5 steps, ever worse, so that a patience of 3 ends it after 20
    "finetune": BERT | dict(block_size=34, csv=["train.csv", "dev.csv", "test.csv"], protocol="martinek",
                            seeds=1, lr=0.01, batch_size=29, epochs=99, save_every=0)}
ALONE = {}                                                   # method: folder of the run left alone
fault = pytest.mark.fault
PRETRAINING = [method for method in METHODS if method != "finetune"]


def write_inputs(folder):
    """The genome and the tables; what the label is in train, it is not in dev."""
    rng = np.random.default_rng(0)
    write_fasta(folder / "genome.fa", {"a": random_dna(4000, rng), "b": random_dna(3000, rng) + "NN"})
    for name, n in {"train": N_SEQUENCES, "dev": 40, "test": 40}.items():
        rows = (f"{random_dna(rng.integers(20, 60), rng, ('GT', 'AC')[i % 2])},{(i + (name == 'dev')) % 2}\n"
                for i in range(n))
        (folder / f"{name}.csv").write_text("sequence,label\n" + "".join(rows))


def keep(folder):
    """Patch: the checkpoint of each step stays, as folder/STEP.pt."""
    def patch():
        training = importlib.import_module("training")
        save = training.save

        def saved(state, out, *args):
            save(state, out, *args)
            if "id" not in state:                            # not a fine-tuned model
                shutil.copy(Path(out, "last.pt"), folder / f"{state['step']}.pt")
        training.save = saved
    return {0: patch}


def write_whole(method, folder, steps=True):
    """In folder: inputs, and in out/ the run of a method that nothing disturbs, its steps kept in steps/."""
    write_inputs(folder)
    (folder / "steps").mkdir()
    each_step = {"save_every": 0 if method == "finetune" else 1} if steps else {}
    result = go(method, keep(folder / "steps") if steps else {}, **each_step)
    assert result.code == 0 and (not steps or len([*folder.glob("steps/*")]) == STEPS), result
    return folder


def run_folder(method, here=Path()):
    """Where last.pt and log.jsonl lie; of finetune once it has begun."""
    found = [*here.glob("out/csv_train/*/")] if method == "finetune" else [here / "out"]
    return found[0] if found else here / "nothing"


def flags_of(method, **flags):
    """The command line; it goes on with what is there, as a user would."""
    there = [path for name in ("last.pt", "prev.pt") for path in Path().glob(f"out/{name}")]
    flags = METHODS[method] | ({"resume": True} if there and method != "finetune" else {}) | flags
    return [str(x) for name, value in flags.items() if value is not False for x in
            (f"--{name}", *(value if isinstance(value, (list, range)) else [value] * (value is not True)))]


def begin(method, patches={}, ranks=1, **flags):
    return start(flags_of(method, **flags), patches, ranks, f"{method}.py")


def go(method, patches={}, ranks=1, **flags):
    """Starts or goes on, and waits."""
    return run(flags_of(method, **flags), patches, ranks, f"{method}.py")


def begin_slowly(method, rows, ranks=1, **flags):
    """A run, made slow, that has logged so many rows."""
    processes = begin(method, {0: slow}, ranks, **flags)
    while method == "finetune" and not run_folder(method).exists():
        assert processes[0].is_alive()
    wait_rows(processes[0], run_folder(method), rows)
    return processes


def link_inputs(whole):
    """The genome, packed, and the tables in the working folder."""
    for path in whole.glob("*.*"):
        os.symlink(path, path.name)


def stopped(method, whole, step):
    """Makes of the working folder what a stop after `step` leaves, with later rows in the log."""
    here = Path(run_folder(method, whole).relative_to(whole))
    here.mkdir(parents=True)
    shutil.copy(whole / here / "log.jsonl", here)
    return shutil.copy(whole / f"steps/{step}.pt", here / "last.pt")


def bits(x):
    """A nested structure with its tensors as bytes, to be compared with ==."""
    if isinstance(x, dict):
        return {key: bits(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [*map(bits, x)]
    return (str(x.dtype), [*x.shape], x.numpy().tobytes()) if isinstance(x, torch.Tensor) else x


def ending(method, here=Path()):
    """All that a run leaves: rows of the log, and the checkpoint; of finetune the model and the result."""
    if method != "finetune":
        state = torch.load(here / "out/last.pt", weights_only=True)
    else:
        state = torch.load(here / "out/csv_train/random.pt", weights_only=True)
        [result] = [json.loads(line) for line in (here / "out/results.jsonl").read_text().splitlines()]
        assert result.pop("seconds") >= 0
        assert not [path for name in ("last.pt", "prev.pt") for path in here.glob(f"out/*/*/{name}")]
        state["result"] = result
    return bits({"log": log_rows(run_folder(method, here))} | state)


def check_ending(method, whole):
    """The run in the working folder has ended as the one left alone: every bit, every row, no file more."""
    ours, wanted = ending(method), ending(method, whole)
    differ = [key for key in wanted | ours if key != "args" and ours.get(key) != wanted.get(key)]
    assert not differ and not [*Path("out").rglob("*.tmp")], f"not equal: {differ}"


def check_goes_on(method, whole, ranks=1, **flags):
    """The command again, or with --resume, to the end."""
    result = go(method, ranks=ranks, **flags)
    assert set(result.codes) == {0}, result
    check_ending(method, whole)
    return result


def in_save(n, patch):
    """Patch: `patch` when the n-th save begins."""
    return {0: at_call("training", "save", n, lambda save, *args: (patch(), save(*args)))}


def each(kind, quick, later=(), methods=METHODS):
    """Parameters (method, todo), marked: the quick cases of each method, and apart from them its slow ones.
    Cases: a list, or a dict of one for each method."""
    quick, later = (of if isinstance(of, dict) else dict.fromkeys(methods, of) for of in (quick, later))
    return pytest.mark.parametrize("method, todo", [
        pytest.param(method, list(part[method]), id=f"{method}-{name}", marks=[
            fault(f"{kind}: {method}", n=len(part[method])), *[pytest.mark.slow] * (name == "slow")])
        for method in methods for name, part in (("quick", quick), ("slow", later)) if part.get(method)])


@pytest.fixture
def whole(tmp_path_factory):
    """whole(method): the folder of the run that nothing disturbs."""
    def make(method):
        if method not in ALONE:
            folder, before = tmp_path_factory.mktemp(method), os.getcwd()
            os.chdir(folder)
            ALONE[method] = write_whole(method, folder)
            os.chdir(before)
        return ALONE[method]
    return make


@pytest.fixture
def fresh(tmp_path, monkeypatch, whole):
    """fresh(method, step): a new working folder, as a stop after `step` leaves it (0: with the inputs only);
    and the run left alone."""
    number = itertools.count()

    def enter(method, step=0):
        folder = tmp_path / str(next(number))
        folder.mkdir()
        monkeypatch.chdir(folder)
        link_inputs(whole(method))
        if step:
            stopped(method, whole(method), step)
        return whole(method)
    return enter
