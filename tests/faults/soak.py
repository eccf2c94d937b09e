"""Kills and stops small runs of every method at random, on one and two ranks in turn, for half an hour:

    python tests/faults/soak.py --minutes 30

Each must end, bit by bit, like the same run undisturbed. Exit code 0 if all did."""
import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[:3])

import conftest                                              # noqa: F401, one thread, before torch
import finetune                                              # noqa: F401, its imports take long
import training
from harness import wait
from methods import METHODS, begin, check_ending, link_inputs, write_whole

OFTEN = 0.002                                                # minutes between checkpoints
LONG = dict(steps=500, eval_every=50, save_every=OFTEN)
for method, flags in METHODS.items():                        # a soak has runs of its own
    flags |= dict(protocol="strict", epochs=60, save_every=OFTEN) if method == "finetune" else LONG
METHODS["randommask"] |= dict(keep=500)
METHODS["cm_gems"] |= dict(switch_after=250, switch_drop=99)


def live(method, rng, seen):
    """Starts or continues a run, on one or two ranks, until a fault; True when the run has ended instead."""
    ranks = 1 if method == "finetune" else rng.randint(1, 2)
    fault = rng.choice(["kill -9 of a rank", "kill -9 of all", "SIGTERM"])
    processes = begin(method, ranks=ranks)
    victim = rng.choice(processes)
    time.sleep(rng.random() ** 2 * 3)                        # often in the start, or soon after it
    for process in processes if fault == "kill -9 of all" else [victim]:
        os.kill(process.pid, signal.SIGTERM if fault == "SIGTERM" else signal.SIGKILL)
    while any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes):
            for process in processes:                        # as torchrun does; but it would kill, after 30 s
                process.terminate()
            break
        time.sleep(0.01)
    result = wait(*processes)
    ended = set(result.codes) == {0}
    ends = {143, -signal.SIGTERM} if fault == "SIGTERM" else {-signal.SIGKILL}
    right = ended or victim.exitcode in ends                 # before the loop, others end as they can
    assert right and "continuing from the one before" not in result.out, (fault, result)
    seen["ended" if ended else fault] += 1
    seen[f"starts on {ranks}"] += 1
    return ended


def soak(minutes, seed=0):
    """Rounds of all methods in the working folder until the time is over; returns counts of what was seen."""
    rng, seen, root, alone = random.Random(seed), Counter(), Path().resolve(), {}
    for method in METHODS:
        (root / method).mkdir()
        os.chdir(root / method)
        alone[method] = write_whole(method, root / method, steps=False)
    start = time.monotonic()
    while time.monotonic() - start < 60 * minutes:
        for method in METHODS:
            seen["runs"] += 1
            folder = root / f"run {seen['runs']}"
            folder.mkdir()
            os.chdir(folder)
            link_inputs(alone[method])
            before = seen.copy()
            while not live(method, rng, seen):
                pass
            check_ending(method, alone[method])
            now = ", ".join(f"{name} {n - before[name]}" for name, n in seen.items() if n > before[name])
            minutes_now = (time.monotonic() - start) / 60
            print(f"{minutes_now:5.1f} min  {method:10}  bitwise equal after {now}", flush=True)
    print(f"{seen.pop('runs')} runs, all bitwise equal: {dict(seen)}", flush=True)
    return seen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--minutes", type=training.number(float, 0.01), default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        soak(args.minutes, args.seed)
