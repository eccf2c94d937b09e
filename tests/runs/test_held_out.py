"""Held out means held out: the test sees every window that a real run reads for training or evaluation."""
import importlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from harness import command_line, random_dna, run, write_fasta

rng = np.random.default_rng(0)
CONTIGS = {"a": random_dna(5000, rng), "b": "NN" + random_dna(4000, rng) + "N", "c": random_dna(900, rng),
           "d": random_dna(3500, rng)}
ENDS = np.cumsum([len(text) for text in CONTIGS.values()])
IS_N = np.array([*"".join(CONTIGS.values())]) == "N"
RUN = dict(genome="genome.fa", device="cpu", out="out", batch_size=10, micro_batch_size=4, steps=24,
           eval_every=7, eval_windows=14, n_layer=1, dropout=0)
BERT = dict(k=3, n_head=2, n_embd=8, block_size=20)
MIXER = dict(length=22, windows=60, track_size=2, hidden=8)


def spy(path):
    """Patch: each call of data.take_windows adds a line to a file: for training or not, starts, length."""
    def patch():
        data = importlib.import_module("data")
        take = data.take_windows

        def taking(bases, starts, length):
            call = {"training": torch.is_grad_enabled(), "starts": starts.tolist(), "length": length}
            with open(path, "a") as f:
                f.write(json.dumps(call) + "\n")
            return take(bases, starts, length)
        data.take_windows = taking
    return patch


def held_out(length, val_contigs):
    """bool for each position of the genome: the named contigs, or the last 1 % where a window fits in it."""
    parts = []
    for name, text in CONTIGS.items():
        n = len(text) * (name in val_contigs) if val_contigs else len(text) // 100
        n = n if n >= length else 0
        parts += [np.zeros(len(text) - n, bool), np.ones(n, bool)]
    return np.concatenate(parts)


@pytest.mark.parametrize("val_contigs", [(), ("b", "c")], ids=["last 1 %", "contigs"])
@pytest.mark.parametrize("script, flags, n_evaluations", [
    ("randommask", BERT, 8),                                 # the last steps of phases 1 to 4: 2, 3, 5, 8
    ("findna", MIXER, 4), ("findna", MIXER | dict(fresh_windows=True), 4),
    ("cm_gems", BERT | dict(n_inner=16, switch_drop=99), 4)],
    ids=["randommask", "findna", "findna fresh", "cm_gems"])
def test_windows(out, script, flags, n_evaluations, val_contigs):
    write_fasta(out.with_name("genome.fa"), CONTIGS)
    flags = RUN | flags | ({"val_contigs": ",".join(val_contigs)} if val_contigs else {})
    assert run(command_line(flags), {0: spy(out.with_name("seen"))}, script=f"{script}.py").code == 0
    calls = [SimpleNamespace(**json.loads(line)) for line in out.with_name("seen").open()]
    held, trained, evaluations = held_out(calls[0].length, val_contigs), [], [[]]
    for call in calls:
        for start in call.starts:
            window = slice(start, start + call.length)
            assert not IS_N[window].any()
            assert np.searchsorted(ENDS, start, "right") == np.searchsorted(ENDS, window.stop - 1, "right")
            assert not held[window].any() if call.training else held[window].all()
        if call.training:
            trained += call.starts
            evaluations += [[]] if evaluations[-1] else []   # the next one begins
        else:
            evaluations[-1] += call.starts
    fixed, n = "windows" in flags and "fresh_windows" not in flags, len({*trained})
    assert len(trained) == 240 and (58 <= n <= 60 if fixed else n > 200)
    seen = [sorted({*starts}) for starts in evaluations if starts]
    assert len(seen) == n_evaluations and all(starts == seen[0] for starts in seen)
    assert len(seen[0]) > 5 and all(len(starts) % 14 == 0 for starts in evaluations)
