"""cm_gems.py as a user runs it: curricula, stops before and after the switch, ranks, NPMI tables, refusals.
The faults inside training.py (saves, disks, locks) are tested with randommask.py."""
import csv
import importlib
import json
import math
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
import torch

import cm_gems
import models
from harness import (SHARED, cases, check_bad_flags, command_line, contents, equal, log_rows, random_dna,
                     refused, run, slow, start, stop_two_ranks, wait, wait_rows, write_fasta, write_genome)

GOLDEN = SHARED / "golden" / "genemask_golden.json"
STEPS, SWITCH = 20, 14                                       # the run left alone goes to Global after 14
STATE = ("strategy", "switch_step", "perplexities", "step", "model", "optimizer")


def tiny(out, **flags):
    """Flags of a run of 20 steps of two micro-batches, evaluated every 2 steps."""
    flags = dict(genome=FASTA, k=3, block_size=22, n_layer=1, n_head=2, n_embd=16, n_inner=32, lr=3e-3,
                 batch_size=8, micro_batch_size=4, steps=STEPS, eval_every=2, eval_windows=10, log_every=1,
                 switch_drop=0.3, save_every=5, keep=STEPS, device="cpu", out=out) | flags
    return command_line(flags)


def pretrain(args, patches={}, ranks=1):
    return run(args, patches, ranks, script="cm_gems.py")


@pytest.fixture(scope="module", autouse=True)
def left_alone(tmp_path_factory):
    """The run that nothing disturbs, with the checkpoint of every step, in the folder WHOLE."""
    global FASTA, WHOLE
    folder = tmp_path_factory.mktemp("whole")
    FASTA, WHOLE = write_genome(folder / "genome.fa"), folder / "out"
    assert pretrain(tiny(WHOLE, keep=range(1, STEPS + 1))).code == 0


def checkpoint(path):
    return [torch.load(path, weights_only=True)[key] for key in STATE]


def stopped(out, step, whole=None):
    """A run folder as a stop after `step` leaves it, but with rows of later steps in its log."""
    out.mkdir()
    shutil.copy((whole or WHOLE) / "log.jsonl", out)
    return shutil.copy((whole or WHOLE) / f"step_{step}.pt", out / "last.pt")


def check_resume(out, ranks=1, **flags):
    """Resumes the run in `out`; it must end as the one left alone."""
    result = pretrain(tiny(out, resume=True, **flags), ranks=ranks)
    assert set(result.codes) == {0}, result.err
    (*ours, a), (*wanted, b) = (checkpoint(folder / "last.pt") for folder in (out, WHOLE))
    assert ours[:3] == wanted[:3] and log_rows(out) == log_rows(WHOLE), "not equal"
    equal([*ours[3:], a], [*wanted[3:], b])


def test_whole_run_switches_once_and_by_the_rule():
    rows = log_rows(WHOLE)
    seen = [row["val_ppl"] for row in rows if "val_ppl" in row]
    steps = [2 * n + 2 for n in range(1, len(seen)) if abs(seen[n] - seen[n - 1]) < 0.3]
    assert steps[0] == SWITCH and [row["step"] for row in rows if "switch_step" in row] == [SWITCH]
    assert [row["strategy"] for row in rows] == ["genemask"] * SWITCH + ["global"] * (STEPS - SWITCH)
    assert checkpoint(WHOLE / "last.pt")[:3] == ["global", SWITCH, seen] and len(seen) == 10
    assert checkpoint(WHOLE / f"step_{SWITCH - 1}.pt")[:3] == ["genemask", None, seen[:6]]
    assert all(math.log(row["val_ppl"]) == pytest.approx(row["val_loss"]) for row in rows if "val_ppl" in row)
    assert rows[SWITCH - 1]["val_ppl_global"] != rows[SWITCH - 1]["val_ppl"]


@pytest.mark.fault("resume at every step: cm_gems")
@pytest.mark.parametrize("step", [1, 11, 13, 14, 15, 19])
def test_resume_before_and_after_the_switch(out, step):
    stopped(out, step)
    check_resume(out)


@pytest.mark.fault("signal at a random moment: cm_gems")
@pytest.mark.parametrize("name, rows", [("SIGKILL", 4), ("SIGKILL", 16), ("SIGTERM", 7), ("SIGUSR1", 15)])
def test_signal_at_a_random_moment(out, name, rows):
    [process] = start(tiny(out, save_every=2 if name == "SIGKILL" else 100), {0: slow}, script="cm_gems.py")
    wait_rows(process, out, rows)
    time.sleep(random.Random(rows).random() * 0.08)
    os.kill(process.pid, getattr(signal, name))
    assert wait(process).code == (-9 if name == "SIGKILL" else 143)
    check_resume(out)


@pytest.mark.fault("stop signal to one rank: cm_gems")
def test_two_ranks_equal_one(out):
    assert 8 <= stop_two_ranks(tiny(out), out, 8, "cm_gems.py") < STEPS
    check_resume(shutil.copytree(out, out.with_name("one")))
    check_resume(out, ranks=2)


@pytest.mark.fault("checkpoint without a part of the state: cm_gems")
@pytest.mark.parametrize("key, step, value", [("strategy", 15, "genemask"), ("switch_step", 15, None),
                                              ("perplexities", 13, []), ("perplexities", 15, [])])
def test_lost_state_shows(out, key, step, value):
    last = stopped(out, step)
    torch.save(torch.load(last, weights_only=True) | {key: value}, last)
    with pytest.raises(AssertionError, match="not equal"):
        check_resume(out)


def scripted(perplexities, start, fires):
    """Patch: the evaluations after `start` give these perplexities, and the second (third) sum of each 1."""
    def patch():
        training = importlib.import_module("training")       # the fork's own
        values = [x for e in range(start, len(perplexities))
                  for x in [perplexities[e], 1] + [1] * (e == fires)]
        real = training.all_reduce

        def all_reduce(numbers):
            if len(numbers) == 3:                            # of an evaluation
                numbers[0] = math.log(values.pop(0)) * numbers[1]
            return real(numbers)
        training.all_reduce = all_reduce
    return {0: patch}


@pytest.mark.skipif(not GOLDEN.exists(), reason="no shared data")
@pytest.mark.parametrize("which", [0, 2])
def test_golden_switch_in_a_run(out, which):
    """The script with the perplexities of a golden case in place of its own, whole and resumed."""
    case = json.loads(GOLDEN.read_text())["cm_gems_switch"][which]
    seen, fires = case["perplexities"], case["first_eval_index_after_which_global_is_used"]
    flags = dict(steps=len(seen), eval_every=1, switch_drop=case["threshold"], keep=range(1, len(seen) + 1))
    assert pretrain(tiny(out, **flags), scripted(seen, 0, fires)).code == 0
    strategy, switch_step, perplexities, *_ = checkpoint(out / "last.pt")
    assert (strategy, switch_step) == ("global", fires + 1) and perplexities == pytest.approx(seen)
    for step in {1, fires, fires + 1} - {len(seen)}:
        other = out.with_name(str(step))
        stopped(other, step, out)
        assert pretrain(tiny(other, resume=True, **flags), scripted(seen, step, fires)).code == 0
        assert checkpoint(other / "last.pt")[:3] == [strategy, switch_step, perplexities]


@pytest.mark.parametrize("strategy, share", {"genemask": 0.16, "global": 0.145, "random": 0.13,
                                             "cm_step": 0.15}.items())
def test_strategies(out, strategy, share):
    flags = dict(strategy=strategy, block_size=40, batch_size=64, micro_batch_size=32, steps=10, keep=10)
    assert pretrain(tiny(out, **flags, switch_drop=99)).code == 0
    rows, double = log_rows(out), out.with_name("double")
    assert np.mean([row["masked"] for row in rows]) == pytest.approx(share, abs=0.02)
    assert {row["strategy"] for row in rows} == {strategy} and "switch_step" not in rows[-1]
    assert pretrain(tiny(double, **flags, p_scale=2)).code == 0
    assert np.mean([row["masked"] for row in log_rows(double)]) > 1.6 * share


@pytest.mark.parametrize("easy", ["genemask", "random"])
def test_cm_step_begins_with_the_easy_one(out, easy):
    """And in a run of one stage it is all there is."""
    one, other = out.with_name("one"), out.with_name("other")
    assert pretrain(tiny(one, strategy="cm_step", cm_step_stages=1, cm_step_easy=easy)).code == 0
    assert pretrain(tiny(other, strategy=easy)).code == 0
    equal(*(checkpoint(folder / "last.pt")[3:] for folder in (one, other)))
    assert pretrain(tiny(out, strategy="cm_step", cm_step_easy=easy)).code == 0
    losses = [[row["loss"] for row in log_rows(folder)] for folder in (out, other)]
    assert losses[0][:2] == losses[1][:2] and losses[0] != losses[1]


@pytest.mark.fault("checkpoint of another run: cm_gems", n=8)
def test_another_run_is_not_resumed(out, tmp_path):
    stopped(out, 10)
    (tmp_path / "t.csv").write_text("kmer,npmi\nAAA,2\nAAC,1\n")
    for flag, value in (("eval_every", 3), ("switch_drop", 2), ("strategy", "cm_step"), ("eval_windows", 9),
                        ("npmi", "textbook"), ("npmi_contigs", "a"), ("npmi_table", "t.csv"), ("p_scale", 2)):
        assert flag in refused(pretrain(tiny(out, **{"resume": True, flag: value})))
    check_resume(out, log_every=1, genome=shutil.copy(FASTA, tmp_path / "moved.fa"))


def test_npmi_only(out, tmp_path):
    texts = {"a": "ACGT" * 3000, "b": random_dna(3000, np.random.default_rng(0))}
    fasta = write_fasta(tmp_path / "g.fa", texts)
    count = ["--npmi_only", "--k", 3, "--genome", fasta]
    result = pretrain(count)
    [table] = tmp_path.glob("*.nanodna/npmi_3_published_*.csv")
    rows, lines = list(csv.DictReader(table.open())), result.out.splitlines()
    assert result.code == 0 and lines[1:21] == table.read_text().splitlines()[1:21] and not out.exists()
    assert len(lines) == 43 and lines[-2].split(",") == [*rows[-1].values()] and str(table) in lines[-1]
    assert [int(row["rank"]) for row in rows] == list(range(1, 65))
    values = cm_gems.read_npmi(str(table), 3)
    assert sorted(values, reverse=True) == [float(row["npmi"]) for row in rows]          # to the last bit
    assert pretrain([*count, "--npmi_table", table]).out.splitlines()[1].startswith(rows[0]["kmer"])
    assert pretrain([*count, "--npmi_contigs", "b", "--npmi", "textbook"]).code == 0
    [b] = tmp_path.glob("*.nanodna/npmi_3_textbook_*.csv")
    assert sum(int(row["count"]) for row in csv.DictReader(b.open())) == 2998
    assert "too small for an NPMI" in refused(pretrain([*count, "--k", "7", "--npmi_contigs", "b"]))


PUBLISHED = ("ngram,naive.pmi,norm_dp_true_pmi,norm_pmi_rank_rel\n"
             "AAC,1,2.5,1\nTGA,1,1e-3,2\nCCC,1,-1.25,3\n")


def test_published_table(out, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(PUBLISHED.replace("TGA", "tga"))
    ranks = cm_gems.npmi_rank(cm_gems.read_npmi(str(path), 3))
    names = models.vocabulary(3)
    assert [ranks[names.index(kmer)] for kmer in ("AAC", "TGA", "CCC", "AAA")] == [0, 1, 2, 3]
    assert pretrain(tiny(out, npmi_table=path, steps=2, keep=1)).code == 0


@pytest.mark.parametrize("old, new, word", [
    (PUBLISHED, "", "empty"), ("\nAAC", "\n", "line 2"), ("ngram", "gram", "no column kmer or ngram"),
    ("TGA", "TGAA", "line 3"), ("TGA", "TNA", "line 3"), ("TGA", "AAC", "line 3"), ("-1.25", "nan", "line 4"),
    ("-1.25,", "", "line 4"), (",", ";", "no column")])
def test_bad_table(out, tmp_path, old, new, word):
    (tmp_path / "table.csv").write_text(PUBLISHED.replace(old, new))
    assert word in refused(pretrain(tiny(out, npmi_table="table.csv"))) and not out.exists()


@pytest.mark.parametrize("strategy, names", [("cm_gems", ["genemask", "global"]), ("random", ["random"])])
def test_show_masks(strategy, names):
    before = contents(WHOLE)
    result = pretrain(tiny(WHOLE, show_masks=30, block_size=36, strategy=strategy, val_contigs="c"))
    lines = result.out.splitlines()
    assert result.code == 0 and len(lines) == 90 * len(names) and contents(WHOLE) == before, result
    for said, bases, marks in zip(lines[::3], lines[1::3], lines[2::3]):
        chosen = [i for i, mark in enumerate(marks) if mark == "*"]
        assert len(bases) == len(marks) + 2 and said.split(",")[0] in names and set(marks) <= set(".#o*")
        assert all(bases[i:i + 3] in said and "." not in marks[max(i - 2, 0):i + 3] for i in chosen)
        assert bool(chosen) == ("none" not in said)


def test_models_and_demo(out, tmp_path):
    for name, n_params in (("dnabert", 89_196_549), ("logo", 4_933_125)):
        with torch.device("meta"):
            model = models.Bert(models.BertConfig(4101, 512, **cm_gems.MODELS[name]))
        assert sum(p.numel() for p in model.parameters()) == n_params
    result = pretrain(f"--demo --steps 9 --data_dir {out} --out demo --eval_windows 64 --device cpu".split())
    assert result.code == 0 and "what is around" in result.out, result
    assert log_rows(tmp_path / "demo")[-1]["step"] == 9      # an explicit flag wins


@pytest.mark.fault("numerics: nothing masked")
def test_nothing_masked(out):
    assert pretrain(tiny(out, p_scale=1e-9)).code == 0
    assert {row[name] for row in log_rows(out) for name in ("loss", "grad_norm", "masked")} == {0}


@pytest.mark.fault("flags: cm_gems")
@pytest.mark.parametrize("case", cases("common_flags.json") + cases("cm_flags.json"),
                         ids=lambda case: str(case["args"]))
def test_bad_flags(out, tmp_path, case):
    check_bad_flags(case, pretrain, tiny(out), tmp=tmp_path, fasta=FASTA, whole=WHOLE / "last.pt")
