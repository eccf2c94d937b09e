"""cm_gems.py as a user runs it: curricula, the switch, NPMI tables, demo. Its faults are in tests/faults."""
import csv
import importlib
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import cm_gems
import models
from harness import SHARED, at_call, equal, log_rows, random_dna, refused, run, write_fasta
from methods import METHODS, STEPS, fresh, go, whole         # noqa: F401, fixtures

GOLDEN = SHARED / "golden" / "genemask_golden.json"
SWITCH = 10                                                  # the undisturbed run goes to Global after it


def curriculum(path="out/last.pt"):
    state = torch.load(path, weights_only=True)
    return [state[key] for key in ("strategy", "switch_step", "perplexities")]


def test_a_run_switches_once_and_by_the_rule(whole):
    folder = whole("cm_gems")
    rows = log_rows(folder / "out")
    seen = [row["val_ppl"] for row in rows if "val_ppl" in row]
    drop = METHODS["cm_gems"]["switch_drop"]
    steps = [2 * n + 2 for n in range(1, len(seen)) if abs(seen[n] - seen[n - 1]) < drop]
    assert steps[0] == SWITCH and [row["step"] for row in rows if "switch_step" in row] == [SWITCH]
    assert [row["strategy"] for row in rows] == ["genemask"] * SWITCH + ["global"] * (STEPS - SWITCH)
    assert curriculum(folder / "out/last.pt") == ["global", SWITCH, seen] and len(seen) == 10
    assert curriculum(folder / f"steps/{SWITCH - 1}.pt") == ["genemask", None, seen[:4]]
    assert all(math.log(row["val_ppl"]) == pytest.approx(row["val_loss"]) for row in rows if "val_ppl" in row)
    assert rows[SWITCH - 1]["val_ppl_global"] != rows[SWITCH - 1]["val_ppl"]


def scripted(perplexities, start, fires):
    """Patch: the evaluations after `start` give these perplexities; the other sums of each are 1."""
    def patch():
        training = importlib.import_module("training")       # the fork's own
        values = [x for e in range(start, len(perplexities))
                  for x in [perplexities[e], 1] + [1] * (e == fires)]
        real = training.all_reduce

        def all_reduce(numbers):
            if len(numbers) == 5:                            # of an evaluation, with the stop flag
                numbers[0] = math.log(values.pop(0)) * numbers[1]
            return real(numbers)
        training.all_reduce = all_reduce
    return {0: patch}


@pytest.mark.skipif(not GOLDEN.exists(), reason="no shared data")
@pytest.mark.parametrize("which", [0, 2])
def test_golden_switch_in_a_run(fresh, which):
    """The script with the perplexities of a golden case in place of its own, whole and resumed."""
    fresh("cm_gems")
    case = json.loads(GOLDEN.read_text())["cm_gems_switch"][which]
    seen, fires = case["perplexities"], case["first_eval_index_after_which_global_is_used"]
    flags = dict(steps=len(seen), eval_every=1, switch_drop=case["threshold"], keep=range(1, len(seen) + 1))
    assert go("cm_gems", scripted(seen, 0, fires), **flags).code == 0
    strategy, switch_step, perplexities = curriculum()
    assert (strategy, switch_step) == ("global", fires + 1) and perplexities == pytest.approx(seen)
    for step in {1, fires, fires + 1} - {len(seen)}:
        Path(f"out/step_{step}.pt").rename("out/last.pt")
        assert go("cm_gems", scripted(seen, step, fires), **flags).code == 0
        assert curriculum() == [strategy, switch_step, perplexities]


def test_the_last_evaluation_counts_only_where_it_is_due(fresh):
    """After steps 3, 6 and 7: the last one comes too soon after the other to show that all has settled."""
    fresh("cm_gems")
    result = go("cm_gems", steps=7, eval_every=3, switch_drop=1e9, switch_after=7)
    assert result.code == 0 and "note: it stays with GeneMask: no evaluation before step 7" in result.out
    rows = log_rows(Path("out"))
    seen = {row["step"]: row["val_ppl"] for row in rows if "val_ppl" in row}
    assert [*seen] == [3, 6, 7] and not any("switch_step" in row for row in rows)
    assert curriculum() == ["genemask", None, [seen[3], seen[6]]]


@pytest.mark.parametrize("strategy, share", {"genemask": 0.16, "global": 0.145, "random": 0.13,
                                             "cm_step": 0.15}.items())
def test_strategies(fresh, strategy, share):
    flags, masked = dict(strategy=strategy, block_size=40, batch_size=64, micro_batch_size=32, steps=10), []
    for scale in (1, 2):
        fresh("cm_gems")
        result = go("cm_gems", p_scale=scale, switch_drop=99, seed=42, **flags)
        assert result.code == 0 and "stays with GeneMask" not in result.out
        rows = log_rows(Path("out"))
        masked.append(np.mean([row["masked"] for row in rows]))
        assert {row["strategy"] for row in rows} == {strategy} and "switch_step" not in rows[-1]
    assert masked[0] == pytest.approx(share, abs=0.02) and masked[1] > 1.6 * share


@pytest.mark.parametrize("easy", ["genemask", "random"])
def test_cm_step_begins_with_the_easy_one(fresh, easy):
    """And in a run of one stage it is all there is."""
    weights, losses = [], []
    for flags in (dict(strategy=easy), dict(strategy="cm_step", cm_step_easy=easy, cm_step_stages=1),
                  dict(strategy="cm_step", cm_step_easy=easy)):
        fresh("cm_gems")
        assert go("cm_gems", **flags).code == 0
        weights.append(torch.load("out/last.pt", weights_only=True)["model"])
        losses.append([row["loss"] for row in log_rows(Path("out"))])
    equal(weights[0], weights[1])
    assert losses[0] == losses[1] and losses[2][:2] == losses[0][:2] and losses[2] != losses[0]


def pretrain(args):
    return run(args, script="cm_gems.py")


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


@pytest.mark.fault("stopped while counting k-mers", n=2)
def test_a_stop_while_counting_leaves_no_table(out, tmp_path, survived):
    fasta = write_fasta(tmp_path / "g.fa", {"a": random_dna(3000, np.random.default_rng(0))})
    for which, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        stop = {0: at_call("data", "kmer_tokens", 2, lambda real, *args: os.kill(os.getpid(), which))}
        result = run(["--npmi_only", "--k", 3, "--genome", fasta, "--device", "cpu"], stop, 1, "cm_gems.py")
        assert result.code == code and result.err.count("\n") == 1 and "counting k-mers" in result.err, result
        assert not [*tmp_path.glob("*.nanodna/npmi*")]
        survived()


def test_a_run_says_what_its_windows_reach(out, tmp_path):
    """One contig of windows, 9 too short for one: passes are over what is reached."""
    texts = {"a": random_dna(3000, np.random.default_rng(0))} | {f"c{i}": "ACGTTG" * 4 for i in range(9)}
    fasta = write_fasta(tmp_path / "g.fa", texts)
    result = run(["--k", 2, "--genome", fasta, "--device", "cpu", "--block_size", 30, "--n_layer", 1,
                  "--n_head", 1, "--n_embd", 8, "--n_inner", 8, "--steps", 1, "--batch_size", 4,
                  "--micro_batch_size", 4, "--eval_windows", 2, "--out", out],
                 script="cm_gems.py")
    reached = "reach    training windows: 2,970 bases in 1 of 10 contigs; validation windows: 30 bases in 1"
    assert result.code == 0 and reached in result.out, result
    assert "warning" not in result.out and "0.03 passes over the bases reached" in result.out, result


PUBLISHED = ("ngram,naive.pmi,norm_dp_true_pmi,norm_pmi_rank_rel\n"
             "AAC,1,2.5,1\nTGA,1,1e-3,2\nCCC,1,-1.25,3\n")


def test_published_table(fresh):
    fresh("cm_gems")
    Path("table.csv").write_text(PUBLISHED.replace("TGA", "tga"))
    ranks = cm_gems.npmi_rank(cm_gems.read_npmi("table.csv", 3))
    names = models.vocabulary(3)
    assert [ranks[names.index(kmer)] for kmer in ("AAC", "TGA", "CCC", "AAA")] == [0, 1, 2, 3]
    assert go("cm_gems", npmi_table="table.csv", steps=2).code == 0


@pytest.mark.parametrize("old, new, word", [
    (PUBLISHED, "", "empty"), ("\nAAC", "\n", "line 2"), ("ngram", "gram", "no column kmer or ngram"),
    ("TGA", "TGAA", "line 3"), ("TGA", "TNA", "line 3"), ("TGA", "AAC", "line 3"), ("-1.25", "nan", "line 4"),
    ("-1.25,", "", "line 4"), (",", ";", "no column")])
def test_bad_table(fresh, old, new, word):
    fresh("cm_gems")
    Path("table.csv").write_text(PUBLISHED.replace(old, new))
    assert word in refused(go("cm_gems", npmi_table="table.csv")) and not Path("out").exists()


@pytest.mark.parametrize("strategy, names", [("cm_gems", ["genemask", "global"]), ("random", ["random"])])
def test_show_masks(fresh, strategy, names):
    fresh("cm_gems")
    result = go("cm_gems", show_masks=30, block_size=36, strategy=strategy, val_contigs="b")
    lines = result.out.splitlines()
    assert result.code == 0 and len(lines) == 90 * len(names) and not Path("out").exists(), result
    for head, bases, marks in zip(lines[::3], lines[1::3], lines[2::3]):
        chosen = [i for i, mark in enumerate(marks) if mark == "*"]
        assert len(bases) == len(marks) + 2 and head.split(",")[0] in names and set(marks) <= set(".#o*")
        assert all(bases[i:i + 3] in head and "." not in marks[max(i - 2, 0):i + 3] for i in chosen)
        assert bool(chosen) == ("none" not in head)


def test_models_and_demo(out):
    for name, n_params in (("dnabert", 89_196_549), ("logo", 4_933_125)):
        with torch.device("meta"):
            model = models.Bert(models.BertConfig(4101, 512, **cm_gems.MODELS[name]))
        assert sum(p.numel() for p in model.parameters()) == n_params
    result = pretrain(f"--demo --steps 9 --data_dir {out} --out demo --eval_windows 64 --device cpu".split())
    assert result.code == 0 and "the context" in result.out, result
    assert log_rows(out.with_name("demo"))[-1]["step"] == 9  # an explicit flag wins


@pytest.mark.fault("numerics: nothing masked")
def test_nothing_masked(fresh):
    fresh("cm_gems")
    assert go("cm_gems", p_scale=1e-9).code == 0
    assert {row[name] for row in log_rows(Path("out")) for name in ("loss", "grad_norm", "masked")} == {0}
