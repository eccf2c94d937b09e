"""A small run of 20 steps of each method: how a test starts, damages and continues it, and how it must end.

All paths are relative: each test, and each round of the soak, has a working folder of its own."""
import importlib
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from harness import at_call, command_line, log_rows, random_dna, run, slow, start, wait_rows, write_fasta

STEPS, N_SEQUENCES = 20, 144
ALWAYS = 1e-9                                                # minutes: a checkpoint after each step
BERT = dict(k=3, n_layer=1, n_head=2, n_embd=16, dropout=0.1, device="cpu", out="out", lr=3e-3)
LOOP = dict(genome="genome.fa", batch_size=8, micro_batch_size=4, steps=STEPS, eval_every=2, eval_windows=10,
            log_every=1, save_every=ALWAYS)
METHODS = {
    "randommask": BERT | LOOP | dict(block_size=22, keep=STEPS),
    "findna": dict(length=30, windows=23, n_layer=1, track_size=2, hidden=8, dropout=0.1, device="cpu",
                   out="out", lr=3e-3) | LOOP,
    # with this seed perplexity first changes by less than 0.24 at step 10
    "cm_gems": BERT | LOOP | dict(block_size=22, n_inner=32, seed=57, switch_drop=0.24),
    # evaluated every 5 steps; dev gets worse each time, so that a patience of 3 ends the run after 20
    "finetune": BERT | dict(block_size=34, csv=["train.csv", "dev.csv", "test.csv"], protocol="martinek",
                            seeds=1, lr=0.01, batch_size=29, epochs=99,
                            save_every=ALWAYS)}
PRETRAINING = [method for method in METHODS if method != "finetune"]
UNDISTURBED = {}                                             # method: folder of the undisturbed run
fault = pytest.mark.fault


def write_inputs(folder):
    """Writes the genome and the tables; dev has the opposite labels of train."""
    rng = np.random.default_rng(0)
    write_fasta(folder / "genome.fa", {"a": random_dna(4000, rng), "b": random_dna(3000, rng) + "NN"})
    for name, n in {"train": N_SEQUENCES, "dev": 40, "test": 40}.items():
        rows = (f"{random_dna(rng.integers(20, 60), rng, ('GT', 'AC')[i % 2])},{(i + (name == 'dev')) % 2}\n"
                for i in range(n))
        (folder / f"{name}.csv").write_text("sequence,label\n" + "".join(rows))


def keep(folder):
    """Patch: the checkpoint of each step is copied to folder/STEP.pt."""
    def patch():
        training = importlib.import_module("training")
        save = training.save

        def saved(state, out, *args):
            save(state, out, *args)
            if "id" not in state:                            # the fine-tuned model has one
                shutil.copy(Path(out, "last.pt"), folder / f"{state['step']}.pt")
        training.save = saved
    return {0: patch}


def write_whole(method, folder, steps=True):
    """Makes the inputs and the undisturbed run of a method in folder: out/, and its checkpoints in steps/."""
    write_inputs(folder)
    (folder / "steps").mkdir()
    result = go(method, keep(folder / "steps") if steps else {})
    assert result.code == 0 and (not steps or len([*folder.glob("steps/*")]) == STEPS), result
    return folder


def run_folder(method, here=Path()):
    """The folder of last.pt and log.jsonl; finetune.py makes it when it begins."""
    found = [here / "out"]
    if method == "finetune":
        found = [path for path in here.glob("out/csv_train/*") if path.is_dir()]
    return found[0] if found else here / "nothing"


def flags_of(method, **flags):
    """The command line, with --resume where there is something to resume, as a user would."""
    there = [path for name in ("last.pt", "prev.pt") for path in Path().glob(f"out/{name}")]
    resume = bool(there) and method != "finetune"
    return command_line(METHODS[method] | {"resume": resume} | flags)


def begin(method, patches={}, ranks=1, **flags):
    return start(flags_of(method, **flags), patches, ranks, f"{method}.py")


def go(method, patches={}, ranks=1, **flags):
    """Starts or continues a run, and waits for its end."""
    return run(flags_of(method, **flags), patches, ranks, f"{method}.py")


def begin_slowly(method, rows, ranks=1, **flags):
    """Starts a slow run and waits until it has logged so many rows."""
    processes = begin(method, {0: slow}, ranks, **flags)
    while method == "finetune" and not run_folder(method).exists():
        assert processes[0].is_alive()
    wait_rows(processes[0], run_folder(method), rows)
    return processes


def link_inputs(whole):
    """Links the packed genome and the tables into the working folder."""
    for path in whole.glob("*.*"):
        os.symlink(path, path.name)


def stopped(method, whole, step):
    """Makes the run folder as a stop after `step` leaves it, but with later rows in the log."""
    here = Path(run_folder(method, whole).relative_to(whole))
    here.mkdir(parents=True)
    for name in ("log.jsonl", "args.json"):
        if (whole / here / name).exists():
            shutil.copy(whole / here / name, here)
    shutil.copy(whole / f"steps/{step}.pt", here / "last.pt")


def bits(x):
    """Turns the tensors of a nested structure into bytes, so that == compares it."""
    if isinstance(x, dict):
        return {key: bits(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [*map(bits, x)]
    return (str(x.dtype), [*x.shape], x.numpy().tobytes()) if isinstance(x, torch.Tensor) else x


def ending(method, here=Path()):
    """All that a run leaves: log and checkpoint; of finetune.py log, model and row of results."""
    if method != "finetune":
        state = torch.load(here / "out/last.pt", weights_only=True)
    else:
        state = torch.load(here / "out/csv_train/random.pt", weights_only=True)
        [result] = [json.loads(line) for line in (here / "out/results.jsonl").read_text().splitlines()]
        assert result.pop("seconds") >= 0
        assert not [path for name in ("last.pt", "prev.pt") for path in here.glob(f"out/*/*/{name}")]
        state["result"] = result
    return bits({"log": log_rows(run_folder(method, here))} | state)


def check_ending(method, whole, ignored=()):
    """The run in the working folder ended like the undisturbed one: every bit, every row, no extra file."""
    ours, wanted = ending(method), ending(method, whole)
    keys = (wanted | ours).keys() - {"args", *ignored}
    differ = sorted(key for key in keys if ours.get(key) != wanted.get(key))
    assert not differ and not [*Path("out").rglob("*.tmp")], f"not equal: {differ}"


def check_goes_on(method, whole, ranks=1, **flags):
    """Continues the run to its end, which must be that of the undisturbed run."""
    result = go(method, ranks=ranks, **flags)
    assert set(result.codes) == {0}, result
    check_ending(method, whole)
    return result


def in_save(n, patch):
    """Patch: patch() when the n-th save begins."""
    return {0: at_call("training", "save", n, lambda save, *args: (patch(), save(*args)))}


def each(kind, cases, quick, methods=METHODS):
    """Parametrizes a test with (method, case), marked as a fault of a kind; a range as so many of them.

    cases: a list for every method, or {method: its list}. quick: {method: how many of the first ones the
    default suite runs}; the others are slow."""
    cases = cases if isinstance(cases, dict) else dict.fromkeys(methods, cases)
    params = []
    for method in cases:
        for i, case in enumerate(cases[method]):
            n = len(case) if isinstance(case, range) else 1
            slow = [] if i < quick.get(method, 0) else [pytest.mark.slow]
            marks = [fault(f"{kind}: {method}", n=n), *slow]
            params.append(pytest.param(method, case, id=f"{method}-{i}", marks=marks))
    return pytest.mark.parametrize("method, case", params)


@pytest.fixture
def whole(tmp_path_factory):
    """whole(method): the folder of the undisturbed run, made once."""
    def make(method):
        if method not in UNDISTURBED:
            folder, before = tmp_path_factory.mktemp(method), os.getcwd()
            os.chdir(folder)
            UNDISTURBED[method] = write_whole(method, folder)
            os.chdir(before)
        return UNDISTURBED[method]
    return make


@pytest.fixture
def fresh(tmp_path, monkeypatch, whole):
    """fresh(method, step): enters a new working folder as a stop after `step` leaves it (0: only inputs);
    returns the folder of the undisturbed run."""
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
