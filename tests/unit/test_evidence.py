"""The tables of our experiments: numbers worked out by hand; the documents hold what the rows give."""
import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import torch
from harness import random_dna, write_fasta
from scipy import stats

import models
from tools import evidence


def write_experiment(root, scores):
    """results/toy.jsonl of {(init, task, network): [scores]} and a comparison of two arms."""
    rows = [{"init": init, "task": task, "shots": None, "mode": "probe", "stride": 1, "score": score,
             "overrides": {"eval_network": network} if network else {}}
            for (init, task, network), values in scores.items() for score in values]
    (root / "results").mkdir()
    (root / "results/toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "results/comparisons.csv").write_text(
        "experiment,mode,metric,a,b,primary\n"
        "toy,probe,,\"long, teacher\",short,1\ntoy,probe,,short,5-mers,\n")


def checkpoint(arm, seed):
    return f"out/toy/{arm}/{seed}/last.pt"


def test_scores_and_differences_by_hand(tmp_path):
    """Runs of a checkpoint are averaged; a seed without partner is left out; 5-mers have no seed."""
    write_experiment(tmp_path, {
        (checkpoint("long", 1), "emp/H3", "teacher"): [0.5, 0.7],
        (checkpoint("long", 2), "emp/H3", "teacher"): [0.8],
        (checkpoint("long", 1), "emp/H4", "teacher"): [0.2],
        (checkpoint("long", 2), "emp/H4", "teacher"): [0.3],
        (checkpoint("short", 1), "emp/H3", None): [0.4], (checkpoint("short", 2), "emp/H3", None): [0.1],
        (checkpoint("short", 3), "emp/H3", None): [0.9],
        (checkpoint("short", 1), "emp/H4", None): [0.25], (checkpoint("short", 2), "emp/H4", None): [0.1],
        ("random:" + checkpoint("short", 1), "emp/H4", None): [0.0], ("kmer", "emp/H4", None): [0.35]})
    scores = evidence.read_scores("toy", tmp_path)
    assert set(scores) == {("probe", arm) for arm in ("long, teacher", "short", "random weights", "5-mers")}
    tasks, gaps = evidence.differences(scores["probe", "long, teacher"], scores["probe", "short"])
    assert tasks == ["emp/H3", "emp/H4"]
    np.testing.assert_allclose(gaps, [[20, 70], [-5, 20]])
    tasks, gaps = evidence.differences(scores["probe", "short"], scores["probe", "5-mers"])
    assert tasks == ["emp/H4"]
    np.testing.assert_allclose(gaps, [[-10, -25]])
    table = {row[0]: row[1:] for row in evidence.score_rows("toy", "probe", root=tmp_path)}
    assert table["set"] == ["long, teacher", "short", "random weights", "5-mers"]
    assert table["emp/H3"] == ["70.0 ± 14.1 (2)", "46.7 ± 40.4 (3)", "", ""]
    assert table["mean of the 1 in all"] == ["25.0", "17.5", "0.0", "35.0"]


def test_random_weights_of_several_networks_are_told_apart(tmp_path):
    write_experiment(tmp_path, {("random:" + checkpoint(arm, 1), "emp/H3", "teacher"): [score]
                                for arm, score in (("long", 0.5), ("short", 0.25))})
    scores = evidence.read_scores("toy", tmp_path)
    assert scores == {("probe", "long, random weights"): {"emp/H3": {1: [50]}},
                      ("probe", "short, random weights"): {"emp/H3": {1: [25]}}}


def test_differences_are_over_the_draws_that_both_arms_have():
    ten, two = {"silencer 10-shot": {1: [50, 60, 90]}}, {"silencer 10-shot": {1: [40, 40]}}
    for x, y, want in (ten, two, 15), (two, ten, -15), (ten, ten, 0):
        np.testing.assert_allclose(evidence.differences(x, y)[1], [[want]])


def test_runs_without_a_checkpoint_are_paired_by_their_seed(tmp_path):
    write_experiment(tmp_path, {(checkpoint("long", seed), "emp/H3", None): [score]
                                for seed, score in ((1, 0.5), (2, 0.75))})
    path = tmp_path / "results/toy.jsonl"
    rows = evidence.read_jsonl(path)
    rows += [row | {"init": "penguinn", "seed": seed, "score": 0.25} for seed, row in zip((1, 2), rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = evidence.read_scores("toy", tmp_path)
    assert scores["probe", "penguinn"] == {"emp/H3": {1: [25], 2: [25]}}
    _, gaps = evidence.differences(scores["probe", "long"], scores["probe", "penguinn"])
    np.testing.assert_allclose(gaps, [[25, 50]])


@pytest.mark.parametrize("key, other, seed", [
    ("overrides", {"epochs": 5}, 2), ("protocol", "findna", 1), ("numbers", {"lr": 1}, 2),
    ("weights", "b", 1)])
def test_rows_of_other_settings_are_not_averaged(tmp_path, key, other, seed):
    """Settings are those of an arm on a set; weights differ between the seeds, but not within one."""
    write_experiment(tmp_path, {(checkpoint("long", 1), "emp/H3", None): [0.5, 0.7],
                                (checkpoint("long", 2), "emp/H3", None): [0.5]})
    path = tmp_path / "results/toy.jsonl"
    rows = [row | {"weights": row["init"]} for row in evidence.read_jsonl(path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evidence.read_scores("toy", tmp_path)["probe", "long"]["emp/H3"] == {1: [50, 70], 2: [50]}
    rows[seed] |= {key: other}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=f"results/toy.jsonl: long on emp/H3, seed {seed}: rows of other"):
        evidence.read_scores("toy", tmp_path)


def test_training_sizes_of_a_dataset_are_one(tmp_path):
    """Sets of one benchmark (tf_m/0, tf_m/1) are several datasets."""
    tasks = ["tf_m/0", "tf_m/1", "prom_core 10-shot", "silencer 10-shot", "prom_core 100-shot", "worm/100",
             "worm/8080"]
    gaps = np.array([[1, 10], [2, 20], [3, 30], [4, 40], [5, 50], [6, 60], [8, 80.0]])
    np.testing.assert_allclose(evidence.by_dataset(tasks, gaps),
                               [[1, 10], [2, 20], [4, 40], [4, 40], [7, 70]])
    write_experiment(tmp_path, {(checkpoint(arm, seed), f"worm/{n}", None): [score]
                                for arm, score in (("long, teacher", 0.5), ("short", 0.25))
                                for seed in (1, 2) for n in (100, 1000)})
    first, _ = evidence.comparison_rows("toy", tmp_path)[1:]
    assert first[2:] == ["1 (2 sets)", "2", "+25.0 [+25.0, +25.0]", "nan", "0", "cannot tell"]


def test_another_metric(tmp_path):
    """A comparison, and a table of scores, by a metric that is not the set's own and that not all have."""
    write_experiment(tmp_path, {(checkpoint(arm, seed), "emp/H3", None): [0.5]
                                for arm in ("a", "b") for seed in (1, 2)})
    path = tmp_path / "results/toy.jsonl"
    rows = [row | {"test": {"auroc": 0.75 if "/a/" in row["init"] else 0.5}}
            for row in evidence.read_jsonl(path)]
    rows += [row | {"task": "ssp/reconstructed", "test": {"auroc": None}} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "results/comparisons.csv").write_text(
        "experiment,mode,metric,a,b,primary\ntoy,probe,,a,b,1\ntoy,probe,auroc,a,b,\ntoy,probe,auroc,a,c,\n")
    _, own, auroc, missing = evidence.comparison_rows("toy", tmp_path)
    assert own[:5] == ["**a > b**", "probe", "2", "2", "+0.0 [+0.0, +0.0]"]
    assert auroc[:5] == ["a > b", "probe, AUROC", "1", "2", "+25.0 [+25.0, +25.0]"]
    assert missing == ["a > c", "probe, AUROC", *[""] * 5, "not run"]
    assert evidence.score_rows("toy", "probe", "auroc", root=tmp_path)[1] == ["emp/H3", "75.0 ± 0.0 (2)",
                                                                              "50.0 ± 0.0 (2)"]


def test_documents_are_filled(tmp_path):
    """Tables and words between their marks are made anew; the rest stays."""
    write_experiment(tmp_path, {(checkpoint(arm, seed), task, network): [score + seed / 100]
                                for arm, network, score in (("long", "teacher", 0.5), ("short", None, 0.25))
                                for seed in (1, 2) for task in ("emp/H3", "emp/H4")})
    text = ("a\n| <!-- rows: toy primary -->old<!-- end --> | b |\n"
            "<!-- rows: toy scores probe -->\nold\n<!-- end -->\nc\n")
    assert evidence.fill(text, tmp_path) == (
        "a\n| <!-- rows: toy primary -->long, teacher > short: +25.0 [+25.0, +25.0], 2 datasets, 2 seeds: "
        "cannot tell<!-- end --> | b |\n"
        "<!-- rows: toy scores probe -->\n| set | long, teacher | short |\n|---|---|---|\n"
        "| emp/H3 | 51.5 ± 0.7 (2) | 26.5 ± 0.7 (2) |\n| emp/H4 | 51.5 ± 0.7 (2) | 26.5 ± 0.7 (2) |\n"
        "| mean of the 2 in all | 51.5 | 26.5 |\n<!-- end -->\nc\n")


def test_interval_equals_a_literal_bootstrap():
    gaps = np.random.default_rng(5).normal(1, 2, (4, 3))
    rng, means = np.random.default_rng(0), []
    tasks, seeds = rng.integers(4, size=(500, 4, 1)), rng.integers(3, size=(500, 1, 3))
    for draw in range(500):
        means.append(np.mean([gaps[t, s] for t in tasks[draw, :, 0] for s in seeds[draw, 0]]))
    np.testing.assert_allclose(evidence.interval(gaps, draws=500), np.percentile(means, [2.5, 97.5]))


def test_interval_covers_the_mean():
    """Sets and seeds vary: about 95 of 100 intervals hold the true difference."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        gaps = 3 + rng.normal(0, 2, (12, 1)) + rng.normal(0, 1, (1, 8)) + rng.normal(0, 1, (12, 8))
        low, high = evidence.interval(gaps, draws=500)
        held += low <= 3 <= high
    assert 170 <= held <= 199


def test_p_values_are_scipys():
    gaps = np.array([[1.0, 2], [3, 5], [-1, 0], [2, 2], [4, 1], [0.5, 3]])
    p_sets, p_seeds = evidence.p_values(gaps)
    assert p_sets == pytest.approx(2 * 2 / 64)               # ranks of -: 1, one of 64 sign patterns is lower
    assert p_seeds == pytest.approx(stats.ttest_rel([9.5 / 6, 13 / 6], [0, 0]).pvalue)


@pytest.mark.parametrize("low, high, p, expected", [
    (0.5, 3, 0.01, "held"), (0.5, 3, 0.06, "cannot tell"), (-1, 3, 0.01, "cannot tell"),
    (-2, 0.9, 0.5, "not held"), (-3, -1, 0.01, "not held")])
def test_verdict(low, high, p, expected):
    assert evidence.verdict(np.zeros((2, 2)), low, high, p) == expected
    for few in (1, 5), (5, 1):                               # of sets, of seeds
        assert evidence.verdict(np.zeros(few), low, high, p) == "cannot tell"


def test_collect(tmp_path):
    """The last values of each log, with its arm and seed; the rows of the scores as they are."""
    out = tmp_path / "out/toy"
    for arm, seed, acc in ("long", 2, 0.5), ("long", 11, 0.25), ("short", 2, 0.75):
        (out / arm / str(seed)).mkdir(parents=True)
        rows = f'{{"step": 1, "val_acc": 0, "switch_step": 1}}\n{{"step": 9000, "val_acc": {acc}}}\n'
        (out / arm / str(seed) / "log.jsonl").write_text(rows)
    (out / "scores").mkdir()
    (out / "scores/results.jsonl").write_text('{"id": "1"}\n')
    (tmp_path / "results").mkdir()
    evidence.collect(str(out), tmp_path)
    assert evidence.read_jsonl(tmp_path / "results/toy.jsonl") == [{"id": "1"}]
    assert evidence.read_jsonl(tmp_path / "results/toy.pretraining.jsonl")[0] == {
        "arm": "long", "seed": 11, "step": 9000, "val_acc": 0.25, "switch_step": 1}
    log = out / "long/2/log.jsonl"                           # done again on another machine: 11 is not there
    log.write_text('{"step": 9000, "val_acc": 0.75}\n')
    shutil.rmtree(out / "long/11")
    (out / "scores/results.jsonl").write_text('{"id": "2"}\n{"id": "1", "score": 0.5}\n')
    evidence.collect(str(out), tmp_path)
    assert evidence.read_jsonl(tmp_path / "results/toy.jsonl") == [{"id": "1", "score": 0.5}, {"id": "2"}]
    rows = evidence.read_jsonl(tmp_path / "results/toy.pretraining.jsonl")
    assert [(row["arm"], row["seed"], row["val_acc"]) for row in rows] == [
        ("long", 11, 0.25), ("long", 2, 0.75), ("short", 2, 0.75)]
    log.write_text('{"step": 9000, "val_acc": 0.5}\n')
    evidence.collect(str(out), tmp_path)
    assert evidence.run_rows("pretraining", "toy", "val_acc", root=tmp_path) == [
        ["arm", "steps", "val_acc"], ["long", "9,000", "0.375 ± 0.177 (2)"], ["short", "9,000", "0.750 (1)"]]


def test_observations(tmp_path, monkeypatch):
    """A network that attends to all alike has the shares of equal attention; embeddings that are the center
    of the k-mer alone have a silhouette of 1. Only runs that kept checkpoints are looked into."""
    bert = models.Bert(models.BertConfig(4 ** 4 + 5, 14, n_layer=3, n_head=2, n_embd=16, n_inner=32))
    letters = np.arange(4 ** 4)[:, None] // 4 ** np.arange(3, -1, -1) % 4
    with torch.no_grad():
        for block in bert.blocks:
            block.qkv.weight.zero_()
        bert.tok_emb.weight[5:] = torch.eye(16)[letters[:, 1] * 4 + letters[:, 2]]
    monkeypatch.setattr(evidence, "WINDOWS", 4)
    fasta = write_fasta(tmp_path / "a.fa", {"a": random_dna(5000, np.random.default_rng(0))})
    out, state = tmp_path / "out/toy", {"model": bert.state_dict(), "optimizer": {}, "data": ""}
    state |= {"format": 1, "method": "randommask", "config": dataclasses.asdict(bert.config)}
    for arm, stride, names in (("overlapping", 1, ["last", "step_2"]), ("nothing", 1, ["last"]),
                               ("apart", 4, ["last", "step_2", "prev"])):
        (out / arm / "7").mkdir(parents=True)
        (out / arm / "7/log.jsonl").write_text('{"step": 9}\n')
        for name in names:
            state |= {"args": {"stride": stride, "genome": ["demo"] if arm == "apart" else [str(fasta)],
                               "data_dir": str(tmp_path), "cache": None, "ambiguous": "N"}}
            torch.save(state | {"step": 2 if name == "step_2" else 9}, out / arm / "7" / f"{name}.pt")
    (out / "scores").mkdir()
    (out / "scores/results.jsonl").write_text("")
    (tmp_path / "results").mkdir()
    evidence.collect(str(out), tmp_path)
    seen = evidence.read_jsonl(tmp_path / "results/toy.observations.jsonl")
    assert [(row["arm"], row["seed"], row["step"]) for row in seen] == [
        ("apart", 7, 2), ("apart", 7, 9), ("overlapping", 7, 2), ("overlapping", 7, 9)]
    for row in seen:
        assert row["silhouette_center"] == pytest.approx(1)
        assert row["silhouette_shuffled"] < 0
        for layer in ("middle", "last"):
            found = [row[f"{layer}_{what}"] for what in ("cls", "sep", "near", "entropy")]
            assert found == pytest.approx([1, 1, 1, np.log(14)], rel=1e-5)
    assert evidence.run_rows("observations", "toy", "last_entropy", root=tmp_path) == [
        ["arm", "steps", "last_entropy"], *([arm, step, "2.639 (1)"] for arm in ("apart", "overlapping")
                                            for step in ("2", "9"))]


def test_documents_hold_the_tables_of_the_rows():
    for document in evidence.DOCUMENTS:
        with open(os.path.join(evidence.ROOT, document), encoding="utf-8") as f:
            text = f.read()
        assert evidence.fill(text) == text, f"{document}: run python -m tools.table --results"
