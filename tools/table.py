"""All results of finetune.py in one table: seeds pooled, beside the papers' numbers.

    python -m tools.table                  of out/finetune; writes table.md and table.csv there, too
    python -m tools.table out/mine

results/paper.csv holds the papers' numbers and their caveats. A column of ours is one setup (--init, mode and
whatever differs between runs of a task); a row is one task with one metric.
"""
import argparse
import csv
import itertools
import os
from collections import namedtuple

import numpy as np
from scipy import stats

import data
import finetune
import training

PAPER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "results", "paper.csv")
METRICS = {"mcc": "MCC", "acc": "accuracy", "f1_macro": "macro F1", "f1_binary": "binary F1",
           "f1_micro": "micro F1", "pcc": "mean PCC"}
FIELDS = "pool", "protocol", "stride", "long", "overrides"    # of a setup, named where they differ
PARTS = "key", "init", "weights", "data", "mode", *FIELDS, "seed"              # tell runs apart
PROBE = " (linear probe)"                                    # after a metric of paper.csv
LEGEND = ("100 x mean ± sd (seeds); the best of ours is bold; † a run collapsed (one prediction for all); "
          "‡ without runs of undefined score.")

Key = namedtuple("Key", "task shots metric")                 # of a row of the table
Cell = namedtuple("Cell", "mean sd n text note")
Table = namedtuple("Table", "lines rows columns")            # Markdown; [(Key, label)]; {name: {Key: Cell}}


def check_run(row):
    """A row of results.jsonl with its fields as text for the table. An exception if it is not a run."""
    return row | {
        "key": Key(row["task"], row["shots"], row["metric"]), "stride": f"stride {row['stride'] or 'of the tokenizer'}",
        "protocol": f"protocol {row['protocol']}", "collapsed": bool(row["collapsed"]),
        "pool": f"pool {row['pool']}" if row["pool"] else "", "long": f"long {row['long']}",
        "overrides": ", ".join(f"{name} {value}" for name, value in sorted(row["overrides"].items())),
        "score": np.nan if row["score"] is None else 100 * float(row["score"])}


def read_runs(out, ids=None):
    """Runs of results.jsonl (with these ids). Of runs that differ only in the score, the last one counts."""
    path, runs = os.path.join(out, "results.jsonl"), {}
    for n, row in enumerate(finetune.read_rows(out), 1):
        if ids is not None and row.get("id") not in ids:
            continue
        try:
            run = check_run(row)
            runs[tuple(run[part] for part in PARTS)] = run
        except (ValueError, LookupError, TypeError, AttributeError) as e:
            what = f"no {e}" if isinstance(e, KeyError) else "not a run"
            raise ValueError(f"{path}: line {n}: {what}; delete the line and run its task again") from None
    if not runs:
        raise ValueError(f"{path}: no results yet; run finetune.py first")
    return name_versions(list(runs.values()))


def name_versions(runs):
    """Adds a fingerprint to --init where its checkpoint, or the table of a task, changed between runs."""
    weights, tables = {}, {}
    for run in runs:
        weights.setdefault(run["init"], set()).add(run["weights"])
        tables.setdefault((run["key"], run["seed"]), set()).add(run["data"])
    for run in runs:
        init = run["init"]
        if len(weights[init]) > 1:
            run["init"] += f" ({run['weights']})"
        if len(tables[run["key"], run["seed"]]) > 1:
            run["init"] += f" (data {run['data']})"
    return runs


def our_columns(runs):
    """{setup: {key: cell}}, and in words the fields left out of its name: equal in all runs of a task."""
    tasks, setups = {}, {}
    for run in runs:
        tasks.setdefault(run["key"], []).append(run)
    same = [f for f in FIELDS if all(len({run[f] for run in group}) == 1 for group in tasks.values())]
    for run in sorted(runs, key=lambda run: run["init"]):
        parts = [run["init"], "probe" if run["mode"] == "probe" else ""]
        parts += [run[field] for field in FIELDS if field not in same]
        setups.setdefault(", ".join(filter(None, parts)), {}).setdefault(run["key"], []).append(run)
    columns = {name: {key: our_cell(group) for key, group in cells.items()} for name, cells in setups.items()}
    return columns, [" or ".join(dict.fromkeys(run[field] or f"no {field}" for run in runs))
                     for field in same if field != "pool"]


def our_cell(runs):
    """Mean and sd over seeds. † a run collapsed; ‡ a run's score is undefined, and left out."""
    scores = [run["score"] for run in runs if np.isfinite(run["score"])]
    marks = "†" if any(run["collapsed"] for run in runs) else ""
    marks += "‡" if len(scores) < len(runs) else ""
    if not scores:
        return Cell(np.nan, "", 0, "undefined" + marks, "")
    mean, sd = np.mean(scores), np.std(scores, ddof=1) if len(scores) > 1 else ""
    seeds = f" ± {sd:.2f} ({len(scores)})" if len(scores) > 1 else " (1 seed)"
    return Cell(mean, sd, len(scores), f"{mean:.2f}{seeds}{marks}", "")


def paper_columns(path, runs):
    """The papers' values for runs of ours with the same task, metric and mode: ({column: {key: cell}},
    {paper: caveats of these values}, [in words, values with another metric or mode])."""
    columns, caveats, used, other = {}, {}, [], {}
    have = {(run["task"], run["metric"] + (PROBE if run["mode"] == "probe" else "")) for run in runs}
    with open(path, newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    for row in rows:
        tasks, metric = data.GROUPS.get(row["task"], [row["task"]]), row["metric"].removesuffix(PROBE)
        probe, note = row["metric"][len(metric):], row["note"] and f"{row['paper']}: {row['note']}"
        if not row["value"]:                                 # a caveat; it follows the values it is about
            if any(is_about(row, tasks, value) for value in used):
                caveats.setdefault(row["paper"], []).append(note)
        elif all((task, row["metric"]) in have for task in tasks):
            text = row["value"] + (f" ± {row['sd']}" if row["sd"] else "")
            column = columns.setdefault(f"{row['paper']}: {row['method']}{probe}", {})
            column[Key(row["task"], None, metric)] = Cell(float(row["value"]), row["sd"], "", text, note)
            used.append(row)
        elif row["task"] in dict(have):
            other.setdefault(f"{row['paper']}, {METRICS[metric]}{probe}", {})[row["task"]] = None
    return columns, caveats, [f"not shown, as ours has another metric or mode: {name} of {', '.join(tasks)}"
                              for name, tasks in other.items()]


def is_about(caveat, tasks, value):
    """Whether a caveat on these tasks concerns a row with a value; its empty fields match all."""
    same = all(caveat[part] in ("", value[part]) for part in ("paper", "table", "method"))
    return same and (caveat["task"] in ("", value["task"]) or value["task"] in tasks)


def means_of(columns, key):
    return np.array([column[key].mean if key in column else np.nan for column in columns])


def group_mean(sets, metric, ours, columns):
    """Adds the mean over sets to columns, where they have all; returns its (key, label), None if of one set.

    Only sets count that all of ours have which have any.
    """
    present = [column for column in ours if any(key in column for key in sets)]
    sets = [key for key in sets if np.isfinite(means_of(present, key)).all()]
    if len(sets) < 2:
        return None
    tasks, label = {key.task for key in sets}, f"mean of the {len(sets)} {sets[0].task.split('/')[0]} sets"
    names = [name for name in data.GROUPS if set(data.GROUPS[name]) == tasks]
    mean = Key(names[0] if names else label, None, metric)
    for column in columns:
        value = sum(means_of([column], key)[0] for key in sets) / len(sets)
        if np.isfinite(value):                               # otherwise there may be a published average
            column[mean] = Cell(value, "", "", f"{value:.2f}", "")
    return mean, label


def add_means(keys, ours, columns):
    """The table's rows (key, label) with a mean after each group of sets, which is added to columns."""
    rows = []
    for _, group in itertools.groupby(keys, lambda key: key.task.split("/")[0]):
        group = list(group)
        rows += [(key, f"{key.task} {key.shots}-shot" if key.shots else key.task) for key in group]
        for metric in dict.fromkeys(key.metric for key in group if "/" in key.task):
            sets = [key for key in group if key.metric == metric]
            rows += filter(None, [group_mean(sets, metric, ours, columns)])
    return rows


def table_lines(rows, ours, others, notes):
    """Markdown of ours and others, where these have values; new footnotes are numbered in notes."""
    rows = [row for row in rows if not others or any(row[0] in column for column in others.values())]
    columns = {name: column for name, column in (ours | others).items()
               if any(key in column for key, _ in rows)}
    table = [["task", "metric", *columns]]
    for key, label in rows:
        means = means_of(ours.values(), key)
        best = np.nanmax(means) if np.isfinite(means).sum() > 1 else None
        table.append([label, METRICS.get(key.metric, key.metric)])
        for name, column in columns.items():
            cell = column.get(key, Cell("", "", "", "", ""))
            text = f"**{cell.text}**" if name in ours and cell.mean == best else cell.text
            number = f" [{notes.setdefault(cell.note, len(notes) + 1)}]" if cell.note else ""
            table[-1].append(text + number)
    widths = [max(map(len, cells)) for cells in zip(*table)]
    table.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in table]


def comparison_lines(keys, ours):
    """Wins of each setup of ours, and a signed-rank test over the tasks for each pair of setups."""
    table, lines = np.array([means_of(ours.values(), key) for key in keys]), []
    table = table[np.isfinite(table).sum(1) > 1]
    for name, scores in zip(ours, table.T):
        wins = sum(score == np.nanmax(row) for score, row in zip(scores, table))
        lines.append(f"- {name}: best of ours on {wins} of {np.isfinite(scores).sum()} tasks")
    for (a, x), (b, y) in itertools.combinations(zip(ours, table.T), 2):
        gap = np.round((x - y)[np.isfinite(x - y)], 8)       # equal gaps must stay equal
        if len(gap) >= 6:
            p = stats.wilcoxon(gap).pvalue if gap.any() else 1
            lines.append(f"- {a} minus {b}: median {np.median(gap):+.2f}, n = {len(gap)}, p = {p:.2g}")
        elif len(gap):
            lines.append(f"- {a} minus {b}: n = {len(gap)} tasks: too few for a test")
    return lines


def make_table(runs, paper_csv=PAPER):
    """Runs of read_runs -> Table: all of ours, then ours beside each paper, wins, footnotes."""
    notes, order = {}, [*data.TASKS]
    ours, rest = our_columns(runs)
    papers, caveats, other = paper_columns(paper_csv, runs)
    keys = sorted({run["key"] for run in runs}, key=lambda key: (
        order.index(key.task) if key.task in order else len(order), key.task, key.shots or 0, key.metric))
    columns = ours | papers
    rows = add_means(keys, ours.values(), columns.values())
    legend = LEGEND + (f" All runs of a task: {'; '.join(rest)}." if rest else "")
    lines = [legend, "", *table_lines(rows, ours, {}, notes)]
    for paper in dict.fromkeys(name.split(":")[0] for name in papers):
        marks = "".join(f" [{notes.setdefault(text, len(notes) + 1)}]" for text in caveats.get(paper, ()))
        others = {name: column for name, column in papers.items() if name.startswith(f"{paper}:")}
        lines += ["", f"Beside {paper}{marks}:", "", *table_lines(rows, ours, others, notes)]
    if len(ours) > 1 and len(keys) > 1:
        lines += ["", "Wins; Wilcoxon's signed-rank test (two-sided, paired over n tasks, p not corrected):",
                  "", *comparison_lines(keys, ours)]
    lines += ["", *(f"- [{n}] {text}" for text, n in notes.items()), *(f"- {text}" for text in other)]
    return Table(lines, rows, columns)


def write_table(out, paper_csv=PAPER):
    """Prints the table of out/results.jsonl; writes it to out/table.md, its values to out/table.csv."""
    table = make_table(read_runs(out), paper_csv)
    with open(os.path.join(out, "table.md.tmp"), "w", encoding="utf-8") as f:
        f.write("\n".join(table.lines) + "\n")
    with open(os.path.join(out, "table.csv.tmp"), "w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows([["column", *Key._fields, *Cell._fields]] + [
            [name, *key, *column[key]] for name, column in table.columns.items()
            for key, _ in table.rows if key in column])
    for name in ("table.md", "table.csv"):
        os.replace(os.path.join(out, f"{name}.tmp"), os.path.join(out, name))
    print("\n".join(table.lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", default="out/finetune", metavar="OUT",
                        help="folder of results.jsonl (%(default)s)")
    with training.user_errors():
        write_table(parser.parse_args().out)
