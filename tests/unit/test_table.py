"""The table of results beside the papers' numbers."""
import csv
import json
import re

import numpy as np
import pytest
from harness import ROOT
from scipy import stats

import data
from tools.table import METRICS, PROBE, write_table

PAPER = ROOT / "results" / "paper.csv"
ROWS = list(csv.DictReader(PAPER.open(newline="", encoding="utf-8")))
EMP = data.GROUPS["emp"]


def run(task, init, score, seed=42, **fields):
    return {"id": "0", "task": task, "shots": None, "seed": seed, "init": init, "weights": "",
            "data": "", "long": "chunk", "pool": None, "mode": "finetune", "protocol": "randommask",
            "stride": 1, "overrides": {}, "metric": data.TASKS[task].metric,
            "score": score, "collapsed": False, "test": {}} | fields


@pytest.fixture
def table(tmp_path, capsys):
    """Writes runs, makes the table of them and returns it."""
    def make(runs):
        (tmp_path / "results.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
        write_table(tmp_path, PAPER)
        text = (tmp_path / "table.md").read_text()
        assert capsys.readouterr().out == text and not list(tmp_path.glob("*.tmp"))
        return text
    return make


def cells(text, task, n=0):
    """{column head: cell} of the n-th row of a task."""
    lines = text.splitlines()
    at = [i for i, line in enumerate(lines) if line.startswith(f"| {task} ")][n]
    head = max(i for i in range(at) if lines[i].startswith("| task "))
    return dict(zip(*([cell.strip() for cell in lines[i].split("|")] for i in (head, at))))


def test_seeds_are_pooled(table, tmp_path):
    text = table([run("emp/H3", "a", 0.6762), run("emp/H3", "a", 0.7762, 43), run("emp/H3", "a", 0.4, 44),
                  run("emp/H3", "a", 0.8762, 44), run("emp/H3", "b", 0.1, collapsed=True),
                  run("emp/H3", "b", 0.3, 43), run("emp/H3", "c", 0.05), run("emp/H3", "c", None, 43),
                  run("eap", "c", None)])
    assert cells(text, "emp/H3") == {"": "", "task": "emp/H3", "metric": "MCC", "a": "**77.62 ± 10.00 (3)**",
                                     "b": "20.00 ± 14.14 (2)†", "c": "5.00 (1 seed)‡"}
    assert cells(text, "eap")["c"] == "undefined‡" and "† a run collapsed" in text
    assert cells(text, "emp/H3", 1)["RandomMask: DNABERT+RandomMask"] == "77.62"
    rows = list(csv.DictReader((tmp_path / "table.csv").open(newline="")))
    assert [float(rows[0][name]) for name in ("mean", "sd", "n")] == pytest.approx([77.62, 10, 3])


def test_setups_are_named_by_what_differs_in_a_task(table):
    text = table([run("emp/H3", "a", 0.1), run("emp/H3", "a", 0.2, stride=6),
                  run("emp/H3", "a", 0.3, mode="probe"),
                  run("gb/demo_human_or_worm", "a", 0.9, protocol="findna", overrides={"epochs": 5}),
                  run("prom_core", "a", 0.7, shots=50), run("prom_core", "a", 0.6, shots=10),
                  run("silencer", "a", 1) | {"task": "mine"}])
    assert list(cells(text, "emp/H3"))[3:] == ["a, stride 1", "a, stride 6", "a, probe, stride 1"]
    assert cells(text, "mine")["a, stride 1"] == "100.00 (1 seed)"
    assert "protocol randommask or protocol findna; long chunk; no overrides or epochs 5" in text
    tasks = re.findall(r"^\| (\S+(?: \d+-shot)?) ", text.split("Beside")[0], re.M)[2:]
    assert tasks == ["emp/H3", "gb/demo_human_or_worm", "prom_core 10-shot", "prom_core 50-shot", "mine"]


def test_means_are_over_the_sets_in_common(table):
    runs = [run(task, "a", i / 10) for i, task in enumerate(EMP)]
    text = table([*runs, *(run(task, "b", 0.5) for task in EMP[2:5]), run("tf_m/0", "c", 0.5)])
    mean = cells(text, "mean of the 3 emp sets", 1)
    assert (mean["a"], mean["b"]) == ("30.00", "**50.00**") and "tf_m sets" not in text
    assert mean["RandomMask: NT*"] == f"{np.mean([44.25, 35.47, 27.59]):.2f}"
    assert "RandomMask: NT, stride 6 (Table 2)" not in mean
    mean = cells(table(runs), "mean of the 10 emp sets", 1)  # the whole group: averages as published, too
    assert mean["RandomMask: DNABERT+RandomMask"] == "65.83"
    assert mean["RandomMask: DNABERT, stride 6 (Table 2)"].startswith("43.65 [")
    runs = [run(task, "a", 0.5, metric="f1_binary") for task in data.GROUPS["gb5"]]
    text = table([*runs, run("gb/human_ocr_ensembl", "a", 0.5)])
    assert cells(text, "mean of the 5 gb sets", 1)["Martinek: CNN"] == "74.20"


def test_wins_and_wilcoxon(table):
    a = np.array([0.5, 0.62, 0.71, 0.4, 0.55, 0.66, 0.8, 0.3])
    b = a + [0.01, -0.02, 0.03, 0.05, 0.04, -0.005, 0.06, 0]
    text = table([run(task, "ab"[i], x) for i in (0, 1) for task, x in zip(EMP, (a, b)[i])]
                 + [run(EMP[9], "a", 0.9), *(run(task, "c", 0.1) for task in EMP[:5])])
    p = stats.wilcoxon(100 * a, 100 * b).pvalue
    assert f"- a minus b: median -2.00, n = 8, p = {p:.2g}\n" in text
    assert "- a minus c: n = 5 tasks: too few for a test" in text
    assert "- a: best of ours on 3 of 8 tasks" in text and "- b: best of ours on 6 of 8 tasks" in text


def test_footnotes_belong_to_shown_cells(table):
    text = table([run("pd/tata", "a", 0.8), run("tf_h/0", "a", 0.6)])
    marks = re.findall(r"\[(\d+)\]", text.rsplit("\n\n", 1)[0])
    notes = dict(re.findall(r"^- \[(\d+)\] (.*)$", text, re.M))
    assert set(marks) == set(notes) and list(map(int, notes)) == [*range(1, len(notes) + 1)]
    assert cells(text, "pd/tata", 1)["RandomMask: NT"].startswith("90.75 [")
    assert any("CM-GEMS lists NT at" in note for note in notes.values()) and "FinDNA:" not in text
    assert not any(word in text for word in ("EMP", "EAP", "MTcDNA", "Martinek", "not shown"))
    assert "[" not in table([run("demo", "a", 0.8)])


def test_only_the_same_metric_and_mode_is_shown(table):
    assert "its own models" not in table([run("covid", "a", 0.5)])
    text = table([run("covid", "a", 0.5), run("gb/human_enhancers_cohn", "a", 0.7)])
    assert cells(text, "covid", 1)["FinDNA: DNABERT-2"] == "71.02"
    assert cells(text, "covid", 1)["FinDNA: FinDNA"] == "" and "FinDNA, micro F1 of covid" in text
    assert cells(text, "gb/human_enhancers_cohn", 1)["FinDNA: FinDNA"] == "74.20 ± 0.03"
    assert "Martinek, binary F1 of gb/human_enhancers_cohn" in text
    assert "selects the model" in text and "its own models" in text
    text = table([run("gb/human_enhancers_cohn", "a", 0.7, mode="probe")])
    assert cells(text, "gb/human_enhancers_cohn", 1)["FinDNA: FinDNA (linear probe)"] == "70.04 ± 0.05"
    assert "FinDNA, accuracy of gb/" in text and "selects the model" not in text


@pytest.mark.parametrize("line, what", {
    "{": "not a run", "[1]": "not a run", "": "not a run", '{"task": "emp/H3"}': "no 'shots'",
    json.dumps(run("eap", "a", "high")): "not a run", json.dumps(run("eap", ["a"], 1)): "not a run"}.items())
def test_a_broken_line_is_named(tmp_path, line, what):
    path = tmp_path / "results.jsonl"
    for text in (None, ""):
        with pytest.raises(ValueError, match=r"results.jsonl: no results yet; run finetune.py first"):
            write_table(tmp_path, PAPER)
        path.write_text("")
    path.write_text(json.dumps(run("emp/H3", "a", 0.5)) + f"\n{line}\n")
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: line 2: {what}; delete the line"):
        write_table(tmp_path, PAPER)


def test_paper_csv():
    values = {(r["paper"], r["table"], r["method"], r["task"]): float(r["value"]) for r in ROWS if r["value"]}
    assert len(values) == sum(r["value"] != "" for r in ROWS) == 688                # no two of one cell
    groups = {r["task"] for r in ROWS if r["value"]} - set(data.TASKS)              # RandomMask's Table 2
    assert groups == {"emp", "tf_m", "tf_h", "pd", "cpd"} and all(0 < x < 100 for x in values.values())
    assert {r["metric"].removesuffix(PROBE) for r in ROWS if r["value"]} == set(METRICS)
    assert all(r["note"] and r["task"] in {"", *data.TASKS, *data.GROUPS} for r in ROWS if not r["value"])
    assert values["CM-GEMS", "GUE", "CMGEMS_10K", "cpd/tata"] == 83.5
    assert values["FinDNA", "5", "FinDNA", "mtcdna/8192"] == 98.82
    human = [task for task in data.GROUPS["cmgems27"] if task.split("/")[0] not in ("emp", "tf_m")]
    for paper, at, method, tasks, mean in (                  # means that the papers print
            ("RandomMask", "3", "DNABERT+RandomMask", EMP, 65.83), ("RandomMask", "3", "NT*", EMP, 46.47),
            ("RandomMask", "3", "DNABERT+RandomMask", data.GROUPS["tf_m"], 67.96),
            ("RandomMask", "3", "DNABERT", data.GROUPS["tf_h"], 64.10),
            ("FinDNA", "3", "FinDNA", EMP + ["covid"], 66.49),
            ("FinDNA", "3", "DNABERT-2", EMP + ["covid"], 57.34),
            ("FinDNA", "4", "MDT+NR", data.GROUPS["gb8"], 78.31),
            ("CM-GEMS", "GUE", "CMGEMS_10K", human, 73.81),
            ("CM-GEMS", "GUE", "DNABERT_120K", EMP + data.GROUPS["tf_m"], 51.55)):
        assert np.mean([values[paper, at, method, task] for task in tasks]) == pytest.approx(mean, abs=0.011)
