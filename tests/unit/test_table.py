"""The table of results beside the papers' numbers."""
import csv
import json
import re

import numpy as np
import pytest
from harness import ROOT, results_row
from scipy import stats

import data
import finetune
import training
from tools.table import METRICS, PROBE, UNLIKE, write_table

PAPER = ROOT / "results" / "paper.csv"
ROWS = list(csv.DictReader(PAPER.open(newline="", encoding="utf-8")))
EMP = data.GROUPS["emp"]


def run(task, init, score, seed=42, **fields):
    return results_row(task=task, init=init, score=score, seed=seed, protocol="randommask",
                       metric=data.TASKS[task].metric) | fields


def split(train, test, dev=None, tested_on="test"):
    """The fields of a run that tell its rows."""
    return {"rows": {"train": train, "test": test} | ({"dev": dev} if dev else {}), "tested_on": tested_on}


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
                  run("silencer", "a", 1) | {"task": "mine"}, run("silencer", "a", 1) | {"task": "a|b"}])
    assert list(cells(text, "emp/H3"))[3:] == ["a, stride 1", "a, stride 6", "a, probe, stride 1"]
    assert cells(text, "mine")["a, stride 1"] == "100.00 (1 seed)"
    assert "protocol randommask or protocol findna; long chunk; no overrides or epochs 5" in text
    tasks = re.findall(r"^\| (\S+(?: \d+-shot)?) ", text.split("Beside")[0], re.M)[2:]
    assert tasks == ["emp/H3", "gb/demo_human_or_worm", "prom_core 10-shot", "prom_core 50-shot",
                     r"a\|b", "mine"]


def test_of_a_grid_dev_chooses(table):
    """The setting with the best mean on dev is in the table, though another one is better on test."""
    last = "25.00 ± 7.07 (2)"

    def grid(lr, dev, score, seed, **fields):
        return run("emp/H3", "a", score, seed, overrides={"lr": lr} | fields.pop("overrides", {}),
                   dev={"mcc": dev, "loss": 1 - dev}, numbers={"select": "score"}) | fields
    text = table([grid(1e-4, 0.5, 0.9, 42), grid(1e-4, 0.3, 0.9, 43), grid(3e-4, 0.45, 0.2, 42),
                  grid(3e-4, 0.45, 0.3, 43), run("emp/H3", "kmer", 0.1), run("emp/H4", "a", 0.4)])
    assert cells(text, "emp/H3")["a"] == f"**{last}**" and text.count("90.00") == 1
    assert text.count("- emp/H3, a: lr 0.0001: dev MCC 40, test 90.00 ± 0.00 (2)\n") == 1
    assert text.count(f"- emp/H3, a: lr 0.0003: dev MCC 45, test {last}, **chosen**\n") == 1
    low = {"numbers": {"select": "loss"}, "dev": {"mcc": 0.9, "loss": 2.0}}
    by_loss = {"numbers": {"select": "loss"}}
    text = table([grid(1e-4, 0.5, 0.9, 42) | low, grid(3e-4, 0.45, 0.2, 42) | by_loss])
    assert cells(text, "emp/H3")["a"].startswith("20.00") and "dev loss 0.55, test 20.00" in text
    text = table([grid(1e-4, 0.5, 0.9, 42), grid(3e-4, 0.6, 0.2, 42, overrides={"pool": "cls"})])
    assert "Settings" not in text                            # they differ in more than a number
    draw = {"task": "prom_core", "shots": 10, "metric": "mcc"}
    text = table([grid(lr, dev, score, seed, data=f"d{seed}") | draw for lr, seed, dev, score in (
        (1e-4, 42, 0.7, 0.9), (1e-4, 43, 0.5, 0.9), (3e-4, 42, 0.65, 0.2), (3e-4, 43, 0.75, 0.3))])
    assert cells(text, "prom_core 10-shot")["a"] == last and text.count("chosen**") == 1


def test_changed_weights_and_tables_are_columns_of_their_own(table):
    text = table([run("emp/H3", "a", 0.5, weights="w1", data="d1"), run("emp/H4", "a", 0.6, weights="w2"),
                  run("emp/H3", "b", 0.5, data="d1"), run("emp/H3", "b", 0.6, data="d2"),
                  run("emp/H4", "c", 0.7)])
    assert {*cells(text, "emp/H4")} - {"", "task", "metric"} == {
        "a (w1) (data d1)", "a (w2)", "b (data d1)", "b (data d2)", "c"}
    text = table([run("emp/H3", "a", 0.5, seed, data="d1") for seed in (42, 43)] +
                 [run("emp/H3", "b", 0.6, data="d2")])       # a clash in one seed names the data of all
    assert cells(text, "emp/H3")["a (data d1)"] == "50.00 ± 0.00 (2)"
    for given in (True, False):                              # a seed may split a table, but not two of them
        text = table([run("emp/H3", "a", 0.5, data="d1", given_split=given),
                      run("emp/H3", "a", 0.75, 43, data="d2", given_split=given)])
        assert {*cells(text, "emp/H3")} - {"", "task", "metric"} == (
            {"a (data d1)", "a (data d2)"} if given else {"a"})


def test_two_tables_of_one_name_are_rows_of_their_own(table):
    """As the train.csv of two projects: nothing is compared with what it was not tested on."""
    runs = ("kmer", 0.5, "d1"), ("kmer", 0.25, "d2"), ("cnn", 0.75, "d2")
    text = table([results_row(task="csv/train", init=init, score=score, seed=42, metric="mcc", data=digest)
                  for init, score, digest in runs])
    assert cells(text, "csv/train (d1)")["kmer"] == "50.00 (1 seed)"
    two = cells(text, "csv/train (d2)")
    assert [two[name].strip("*")[:5] for name in ("kmer", "cnn")] == ["25.00", "75.00"]


def test_dtypes_are_setups_of_their_own(table):
    text = table([run("emp/H3", "a", 0.5, dtype="float32"), run("emp/H3", "a", 0.25, dtype="bfloat16")])
    assert cells(text, "emp/H3")["a, dtype bfloat16"] == "25.00 (1 seed)"
    assert cells(text, "emp/H3")["a, dtype float32"] == "**50.00 (1 seed)**"
    assert "float32" not in table([run("emp/H3", "a", 0.5, dtype="float32")])


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


OWN_DEV = "test; dev is 10% of train"
NO_TEST = "dev (there is no test); dev is 10% of train"


@pytest.mark.parametrize("task, fields, words", [
    ("emp/H3", split(1347, 1497, 150),
     "trained on 1,347 rows, tested on 1,497 of test; published: train 11,971, test 1,497, dev 1,497"),
    ("emp/H3", split(11971, 1496, 1497), "tested on 1,496 of test"),
    ("eap", split(900, 1000, 100, NO_TEST),
     "trained on 1,000 rows, tested on 1,000 of dev (there is no test); published: train 402,296, test"),
    ("eap", split(402296, 41186, tested_on="dev (there is no test)"), "tested on 41,186 of dev"),
    ("gb/human_enhancers_cohn", split(18759, 6948, 2085, OWN_DEV), "trained on 20,844 rows"),
    ("gb/human_enhancers_cohn", split(18759, 6948, 2084, OWN_DEV), ""),
    ("gb/human_enhancers_cohn", split(18759, 6948, tested_on="test; fitted on 90% of train"), ""),
    ("emp/H3", split(11971, 1497, 1497), ""), ("emp/H3", split(11971, 1497), ""),    # a probe has no dev
    ("prom_core", split(20, 5920), ""), ("prom_core", split(20, 592), "trained on 20 rows, tested on 592"),
    ("mtcdna/1024", split(60, 20, 20), ""), ("emp/H3", {}, "")])                     # nothing to compare with
def test_other_rows_than_published_are_marked(table, task, fields, words):
    text = table([run(task, "a", 0.5, **fields)])
    assert cells(text, task)["a"] == ("50.00 (1 seed)§ [1]" if words else "50.00 (1 seed)")
    assert not words or words in re.search(rf"^- \[1\] {task}: (.*)$", text, re.M)[1]


def test_other_rows_are_kept_apart(table):
    less = {"emp/H3": split(1347, 1497, 150), "eap": split(900, 1000, 100, NO_TEST)}
    runs = [run(task, init, score, **less.get(task, {})) for task in [*EMP, "eap"]
            for init, score in (("a", 0.9), ("b", 0.8))]
    text = table(runs)
    ours, beside = (cells(text, "emp/H3", n)["a"] for n in (0, 1))
    assert ours == "**90.00 (1 seed)§** [1]" and beside == "90.00 (1 seed)§ [1]"     # the best of ours only
    assert cells(text, "eap", 1)["a"] == "90.00 (1 seed)§ [2]"
    assert cells(text, "emp/H3K14ac", 1)["a"] == "**90.00 (1 seed)**"
    mean = cells(text, "mean of the 9 emp sets", 1)
    assert (mean["a"], mean["b"]) == ("**90.00**", "80.00") and "10 emp sets" not in text
    values = [float(r["value"]) for r in ROWS if (r["paper"], r["table"], r["method"]) == (
        "RandomMask", "3", "NT*") and r["task"] in EMP[1:]]
    assert mean["RandomMask: NT*"] == f"{np.mean(values):.2f}"
    assert "- a: above all columns on 9 of 9 tasks (NT 9 of 9;" in text
    assert "- a: best of ours on 11 of 11 tasks" in text                 # on the same rows as b
    text = table([*runs[1:], run("emp/H3", "a", 0.9, **split(11971, 1497, 1497))])       # unlike b's rows
    for n in (0, 1):
        assert [cells(text, "emp/H3", n)[init] for init in "ab"] == ["90.00 (1 seed)", "80.00 (1 seed)§ [1]"]
    assert "mean of the 9 emp sets" in text and "- a: best of ours on 10 of 10 tasks" in text
    assert "- a: above all columns on 10 of 10 tasks (NT 10 of 10;" in text
    assert "- b: above all columns on 9 of 9 tasks (NT 9 of 9;" in text and UNLIKE in text.splitlines()[0]
    text = table([run(task, "a", 0.9, **split(100, 100)) for task in EMP])
    assert "Beside RandomMask" in text and "emp sets" not in text and "above all" not in text


def test_wins_over_a_paper_are_counted_as_the_paper_counts(table):
    columns = {}
    for r in ROWS:
        if (r["paper"], r["table"]) == ("RandomMask", "3") and r["value"]:
            columns.setdefault(r["method"], {})[r["task"]] = float(r["value"])
    best = columns["DNABERT+RandomMask"]
    assert len(best) == 28
    wins = {name: sum(best[task] > column[task] for task in best) for name, column in columns.items()}
    text = table([run(task, "a", (value + 0.001) / 100) for task, value in best.items()])
    line = re.search(r"^- a: (above all columns on 25 of 28 tasks .*)$", text, re.M)[1]
    for name in ("NT", "NT*", "HyenaDNA", "DNABERT"):
        assert f"{name} {wins[name]} of 28" in line
    assert "DNABERT+RandomMask 28 of 28" in line and "DNABERT, stride 6 (Table 2) 2 of 2" in line
    rivals = [column for name, column in columns.items() if name not in ("NT*", "DNABERT+RandomMask")]
    assert sum(all(best[task] > column[task] for column in rivals) for task in best) == 26  # the text's count
    assert "above all" not in table([run("pd/tata", "a", 0.9)])


def test_wins_are_within_a_mode(table):
    gb = data.GROUPS["gb8"]
    runs = [run(task, "a", 0.9, mode="probe") for task in gb] + [run(task, "a", 0.99) for task in gb[:2]]
    text = table(runs)
    assert re.search(r"^- a: above all columns on 2 of 2 tasks \(DNABERT 2 of 2; (?!.*probe)", text, re.M)
    line = re.search(r"^- a, probe: above all columns on 7 of 8 tasks \((.*)\)$", text, re.M)[1]
    assert "FinDNA (linear probe) 7 of 8" in line and line.count("(linear probe)") == line.count(" of 8")


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


FOREIGN = ["{", "[1]", "hello", "\x1b[2J", "null", "1", "[" * 99_999, '{"id": "0"}', *map(json.dumps, (
    run("eap", "a", "high"), run("eap", "a", 7.5), run("eap", "a", np.nan), run("eap", ["a"], 1),
    run("eap", "a", 1, rows={"test": 5}),
    run("eap", "a", 1, rows=5), run("eap", "a", 1, rows={"train": "5", "test": 5}),
    run("eap", "a", 1, rows={"train": 5, "test": 5}, tested_on=OWN_DEV), run("eap", "a", 1, tested_on=5),
    *({name: value for name, value in run("eap", "a", 1).items() if name != lost} for lost in finetune.ROW),
    *(run("eap", "a", 1) | {name: [[]]} for name in finetune.ROW)))]


@pytest.mark.fault("foreign rows in results.jsonl", n=len(FOREIGN))
def test_foreign_rows_are_named_passed_over_and_kept(tmp_path, capsys, survived):
    path, ours = tmp_path / "results.jsonl", [run("emp/H3", "a", 0.5), run("emp/H4", "a", 0.6)]
    for text in (None, "", "hello\n"):
        if text is not None:
            path.write_text(text)
        with pytest.raises(ValueError, match=r"results.jsonl: no results yet; run finetune.py first"):
            write_table(tmp_path, PAPER)
    first, second = map(json.dumps, ours)
    for line in FOREIGN:
        training.say_once.cache_clear()
        capsys.readouterr()
        path.write_text(f"\ufeff{first}\r\n\n{line}\n{second}", encoding="utf-8")    # without a last newline
        assert finetune.read_rows(tmp_path) == ours == finetune.read_rows(tmp_path)
        said = capsys.readouterr().out
        assert said.startswith(f"{path}: line 3: not a run (") and said.count("\n") == 1
        assert said[:-1].isprintable()
        before = path.read_bytes()
        finetune.append_row(tmp_path, ours[0])               # another command did this run: it is there
        assert path.read_bytes() == before
        finetune.append_row(tmp_path, new := ours[0] | {"id": "new"})
        assert path.read_bytes() == before + b"\n" + json.dumps(new).encode() + b"\n"
        survived()
    write_table(tmp_path, PAPER)
    assert "60.00 (1 seed)" in capsys.readouterr().out


def test_a_linked_results_file_is_refused(tmp_path):
    (tmp_path / "victim").write_text("keep\n")
    (tmp_path / "results.jsonl").symlink_to("victim")
    for function in (finetune.read_rows, lambda out: finetune.append_row(out, run("eap", "a", 0.5))):
        with pytest.raises(FileExistsError, match=r"results.jsonl: a link, not followed; remove it"):
            function(tmp_path)
    assert (tmp_path / "victim").read_text() == "keep\n"


def test_half_a_row_of_ours_is_replaced(tmp_path):
    row = run("emp/H3", "a", 0.5)
    text = json.dumps(row) + "\n"
    for tail, kept in ((text[:-9], ""), (text[:8], ""), (text[:-1], text), ('{"a"', '{"a"\n'), ("[", "[\n")):
        (tmp_path / "results.jsonl").write_text(text + tail)
        finetune.append_row(tmp_path, new := row | {"id": "new"})
        assert (tmp_path / "results.jsonl").read_text() == text + kept + json.dumps(new) + "\n"


def test_values_of_unknown_mode_and_costs_are_beside_nothing(table):
    task = "gb/demo_human_or_worm"
    for mode in ("finetune", "probe"):
        text = table([run(task, "a", 0.7, mode=mode)])
        assert f"another metric or mode: FinDNA, accuracy (mode unknown) of {task}\n" in text
        assert "69.24" not in text and "student" not in text
    text = table([run("mtcdna/1024", "a", 0.7)])
    assert cells(text, "mtcdna/1024", 1)["FinDNA: FinDNA"] == "95.26" and "95.97" not in text
    text = table([run(task, "a", 0.7, mode="probe") for task in data.GROUPS["gb8"]])
    mean = cells(text, "mean of the 8 gb sets", 1)                       # as published; its values give 76.60
    assert mean["FinDNA: M+NoAug (linear probe)"].startswith("76.59 [")
    assert mean["FinDNA: FinDNA (linear probe)"] == "78.24"


def test_paper_csv():
    values = [r for r in ROWS if r["value"]]
    scores = [r for r in values if r["metric"].split(" ")[0] in METRICS]
    facts = {(r["table"], r["method"], r["metric"]): r["value"] for r in values if r not in scores}
    cell = {(r["paper"], r["table"], r["method"], r["task"]): float(r["value"]) for r in scores}
    assert len(scores) == len(cell) == 692 and len(values) - 692 == len(facts) == 27         # each cell once
    assert {r["task"] for r in scores} - set(data.TASKS) == {"emp", "tf_m", "tf_h", "pd", "cpd", "gb8"}
    assert all(0 < x < 100 for x in cell.values())
    ours = {"auroc", "auprc", "balanced_acc", "spearman"}
    assert {r["metric"].split(" ")[0] for r in scores} == set(METRICS) - ours
    modes = {r["table"]: r["metric"].removeprefix("acc") for r in scores if r["paper"] == "FinDNA"}
    assert modes == {"1": PROBE, "2": "", "3": "f1_micro", "4": PROBE, "5": "", "9": " (mode unknown)"}
    assert all(r["note"] for r in ROWS if not r["value"])
    assert {r["task"] for r in ROWS if r not in scores} <= {"", *data.TASKS, *data.GROUPS}
    assert cell["CM-GEMS", "GUE", "CMGEMS_10K", "cpd/tata"] == 83.5
    assert cell["FinDNA", "5", "FinDNA", "mtcdna/8192"] == 98.82
    assert [facts["4", views, "kl"] for views in ("M+NoAug", "M+DIT", "MDT+DIT", "MDT+NR")] == [
        "0.025", "0.149", "0.152", "0.175"]
    assert facts["6", "NT-500m-human", "flops_ratio"] == "8.35"
    assert facts["8", "CM-MNM", "gb_per_batch"] == "4.52"
    assert sorted(value for (at, *_), value in facts.items() if at == "slides") == ["1.79", "4.71"]
    human = [task for task in data.GROUPS["cmgems27"] if task.split("/")[0] not in ("emp", "tf_m")]
    averages = [("FinDNA", at, method, EMP + ["covid"], float(value))
                for (at, method, metric), value in facts.items() if metric == "average"]
    averages += [("FinDNA", "4", method, data.GROUPS["gb8"], value)
                 for (_, _, method, task), value in cell.items() if task == "gb8"]
    assert len(averages) == 10
    for paper, at, method, tasks, mean in (                  # means that the papers print
            ("RandomMask", "3", "DNABERT+RandomMask", EMP, 65.83), ("RandomMask", "3", "NT*", EMP, 46.47),
            ("RandomMask", "3", "DNABERT+RandomMask", data.GROUPS["tf_m"], 67.96),
            ("RandomMask", "3", "DNABERT", data.GROUPS["tf_h"], 64.10),
            ("RandomMask", "3", "DNABERT", ["pd/all", "pd/notata"], 91.765), *averages,
            ("CM-GEMS", "GUE", "CMGEMS_10K", human, 73.81),
            ("CM-GEMS", "GUE", "DNABERT_120K", EMP + data.GROUPS["tf_m"], 51.55)):
        assert np.mean([cell[paper, at, method, task] for task in tasks]) == pytest.approx(mean, abs=0.011)
