"""results.jsonl, a row a run, and the table of it: seeds pooled, beside the papers' numbers.

Knows nothing of how the runs were made. The papers' numbers and their caveats are in results/paper.csv.
"""
import csv
import fcntl
import itertools
import json
import os

import numpy as np
from scipy import stats

import data

PAPER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "results", "paper.csv")
METRICS = {"mcc": "MCC", "acc": "accuracy", "f1_macro": "macro F1", "f1_binary": "binary F1",
           "f1_micro": "micro F1", "pcc": "mean PCC"}
FIELDS = "pool", "protocol", "stride", "long", "overrides"    # of a way, named where they differ
PARTS = "key", "init", "weights", "data", "mode", *FIELDS, "seed"              # what tells runs apart
PROBE = " (linear probe)"                                    # behind a metric of paper.csv


def append_row(out, row):
    """One more line of results.jsonl; ranks and other runs may write at the same time."""
    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, "results.jsonl"), "a+b") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        f.seek(0)
        f.truncate(f.read().rfind(b"\n") + 1)                # drops half a row
        f.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        f.flush()
        os.fsync(f.fileno())


def read_rows(out):
    """Rows of results.jsonl, [] where there is none. ValueError names a line that is broken."""
    path, rows = os.path.join(out, "results.jsonl"), []
    if not os.path.exists(path):
        return rows
    with open(path, errors="replace") as f:
        fcntl.flock(f, fcntl.LOCK_SH)
        for n, line in enumerate(f, 1):
            if not line.endswith("\n"):                      # half a row: the disk was full; its run goes on
                break
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError):
                raise ValueError(f"{path}: line {n}: not a run; delete the line and run its task "
                                 f"again") from None
    return rows


def read_runs(out):
    """Runs of results.jsonl; of those that differ in nothing but the score, the last."""
    path, runs = os.path.join(out, "results.jsonl"), {}
    for n, run in enumerate(read_rows(out), 1):
        try:
            run |= {"key": (run["task"], run["shots"], run["metric"]), "stride": f"stride {run['stride']}",
                    "protocol": f"protocol {run['protocol']}", "collapsed": bool(run["collapsed"]),
                    "pool": f"pool {run['pool']}" * bool(run["pool"]), "long": f"long {run['long']}",
                    "overrides": ", ".join(f"{k} {v}" for k, v in sorted(run["overrides"].items())),
                    "score": np.nan if run["score"] is None else 100 * float(run["score"])}
            runs[tuple(run[part] for part in PARTS)] = run
        except (ValueError, LookupError, TypeError, AttributeError) as e:
            what = f"no {e}" if isinstance(e, KeyError) else "not a run"
            raise ValueError(f"{path}: line {n}: {what}; delete the line and run its task again") from None
    if not runs:
        raise ValueError(f"{path}: no results yet; run a --task first")
    weights, tables = {}, {}
    for run in runs.values():
        weights.setdefault(run["init"], set()).add(run["weights"])
        tables.setdefault((run["key"], run["seed"]), set()).add(run["data"])
    for run in runs.values():                                # a changed checkpoint or table is another way
        run["init"] += f" ({run['weights']})" * (len(weights[run["init"]]) > 1)
        run["init"] += f" (data {run['data']})" * (len(tables[run["key"], run["seed"]]) > 1)
    return list(runs.values())


def our_columns(runs):
    """{way: {key: cell}}; and in words what the ways' names leave out, as it is the same in a task's runs.
    A key is (task, shots, metric); a cell is (mean, sd, n, text, note)."""
    tasks, ways = {}, {}
    for run in runs:
        tasks.setdefault(run["key"], []).append(run)
    same = [f for f in FIELDS if all(len({run[f] for run in group}) == 1 for group in tasks.values())]
    for run in sorted(runs, key=lambda run: run["init"]):
        parts = [run["init"], "probe" * (run["mode"] == "probe"), *(run[f] for f in FIELDS if f not in same)]
        ways.setdefault(", ".join(filter(None, parts)), {}).setdefault(run["key"], []).append(run)
    rest = [" or ".join(dict.fromkeys(run[f] or f"no {f}" for run in runs)) for f in same if f != "pool"]
    return {way: {key: our_cell(group) for key, group in cells.items()} for way, cells in ways.items()}, rest


def our_cell(runs):
    """Mean and sd over seeds. † a run collapsed; ‡ a run's score is undefined, and left out."""
    scores = [run["score"] for run in runs if np.isfinite(run["score"])]
    marks = "†" * any(run["collapsed"] for run in runs) + "‡" * (len(scores) < len(runs))
    if not scores:
        return np.nan, "", 0, "undefined" + marks, ""
    mean, sd = np.mean(scores), np.std(scores, ddof=1) if len(scores) > 1 else ""
    seeds = f" ± {sd:.2f} ({len(scores)})" if len(scores) > 1 else " (1 seed)"
    return mean, sd, len(scores), f"{mean:.2f}{seeds}{marks}", ""


def paper_columns(path, runs):
    """{column: {key: cell}} of the papers' values with the task, metric and mode of runs of ours; {paper:
    caveats about these} (rows without a value); and in words the values with another metric or mode."""
    columns, caveats, used, other = {}, {}, [], {}
    have = {(run["task"], run["metric"] + PROBE * (run["mode"] == "probe")) for run in runs}
    for row in csv.DictReader(open(path, newline="", encoding="utf-8")):
        paper, tasks = row["paper"], data.GROUPS.get(row["task"], [row["task"]])
        metric, note = row["metric"].removesuffix(PROBE), row["note"] and f"{row['paper']}: {row['note']}"
        probe = row["metric"][len(metric):]
        if not row["value"]:                                 # behind the values that it is about
            if any(row["task"] in ("", u["task"]) or u["task"] in tasks for u in used
                   if all(row[part] in ("", u[part]) for part in ("paper", "table", "method"))):
                caveats.setdefault(paper, []).append(note)
        elif all((task, row["metric"]) in have for task in tasks):
            text = row["value"] + f" ± {row['sd']}" * bool(row["sd"])
            column = columns.setdefault(f"{paper}: {row['method']}{probe}", {})
            column[row["task"], None, metric] = float(row["value"]), row["sd"], "", text, note
            used.append(row)
        elif row["task"] in dict(have):
            other.setdefault(f"{paper}, {METRICS[metric]}{probe}", {})[row["task"]] = None
    return columns, caveats, [f"not shown, as ours has another metric or mode: {name} of {', '.join(tasks)}"
                              for name, tasks in other.items()]


def means_of(columns, key):
    return np.array([column[key][0] if key in column else np.nan for column in columns])


def add_means(keys, ours, columns):
    """Adds the means over groups of sets to columns; returns the table's (key, label). A mean is over the
    sets that all of ours have which have any; a column gets it if it has values for all of these."""
    rows = []
    for prefix, group in itertools.groupby(keys, lambda key: key[0].split("/")[0]):
        group = list(group)
        rows += [(key, f"{key[0]} {key[1]}-shot" if key[1] else key[0]) for key in group]
        for metric in dict.fromkeys(key[2] for key in group if "/" in key[0]):
            sets = [key for key in group if key[2] == metric]
            present = [column for column in ours if any(key in column for key in sets)]
            sets = [key for key in sets if np.isfinite(means_of(present, key)).all()]
            label, tasks = f"mean of the {len(sets)} {prefix} sets", {key[0] for key in sets}
            whole = [name for name in data.GROUPS if set(data.GROUPS[name]) == tasks]
            mean = (whole or [label])[0], None, metric
            for column in columns if len(sets) > 1 else ():
                value = sum(means_of([column], key)[0] for key in sets) / len(sets)
                if np.isfinite(value):                       # else there may be an average as published
                    column[mean] = value, "", "", f"{value:.2f}", ""
            rows += [(mean, label)] * (len(sets) > 1)
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
        table.append([label, METRICS.get(key[2], key[2])])
        for name, column in columns.items():
            mean, _, _, text, note = column.get(key, ("", "", "", "", ""))
            text = f"**{text}**" if name in ours and mean == best else text
            table[-1].append(text + (f" [{notes.setdefault(note, len(notes) + 1)}]" if note else ""))
    widths = [max(map(len, cells)) for cells in zip(*table)]
    table.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in table]


def comparison_lines(keys, ours):
    """How often each way is the best of ours, and a signed-rank test over the tasks for each pair of ways."""
    table, lines = np.array([means_of(ours.values(), key) for key in keys]), []
    table = table[np.isfinite(table).sum(1) > 1]
    for way, scores in zip(ours, table.T):
        wins = sum(score == np.nanmax(row) for score, row in zip(scores, table))
        lines.append(f"- {way}: best of ours on {wins} of {np.isfinite(scores).sum()} tasks")
    for (a, x), (b, y) in itertools.combinations(zip(ours, table.T), 2):
        gap = np.round((x - y)[np.isfinite(x - y)], 8)       # equal gaps must stay equal
        if len(gap) >= 6:
            p = stats.wilcoxon(gap).pvalue if gap.any() else 1
            lines.append(f"- {a} minus {b}: median {np.median(gap):+.2f}, n = {len(gap)}, p = {p:.2g}")
        elif len(gap):
            lines.append(f"- {a} minus {b}: n = {len(gap)} tasks: too few for a test")
    return lines


def write_table(out, paper_csv=PAPER):
    """Prints the tables of out/results.jsonl; writes them to out/table.md, their values to out/table.csv."""
    runs, notes, order = read_runs(out), {}, [*data.TASKS]
    ours, rest = our_columns(runs)
    papers, caveats, other = paper_columns(paper_csv, runs)
    keys = sorted({run["key"] for run in runs}, key=lambda key: (
        order.index(key[0]) if key[0] in order else len(order), key[0], key[1] or 0, key[2]))
    columns = ours | papers
    rows = add_means(keys, ours.values(), columns.values())
    lines = ["100 x mean ± sd (seeds); the best of ours is bold; † a run collapsed (one prediction for all); "
             "‡ without runs of undefined score." + f" All runs of a task: {'; '.join(rest)}." * bool(rest),
             "", *table_lines(rows, ours, {}, notes)]
    for paper in dict.fromkeys(name.split(":")[0] for name in papers):
        marks = "".join(f" [{notes.setdefault(text, len(notes) + 1)}]" for text in caveats.get(paper, ()))
        others = {name: column for name, column in papers.items() if name.startswith(f"{paper}:")}
        lines += ["", f"Beside {paper}{marks}:", "", *table_lines(rows, ours, others, notes)]
    if len(ours) > 1 and len(keys) > 1:
        lines += ["", "Wins; Wilcoxon's signed-rank test (two-sided, paired over n tasks, p not corrected):",
                  "", *comparison_lines(keys, ours)]
    lines += ["", *(f"- [{n}] {text}" for text, n in notes.items()), *(f"- {text}" for text in other)]
    with open(os.path.join(out, "table.md.tmp"), "w", encoding="utf-8") as f:
        f.write("\n".join(lines) + "\n")
    with open(os.path.join(out, "table.csv.tmp"), "w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows([["column", "task", "shots", "metric", "mean", "sd", "n", "text", "note"]] + [
            [name, *key, *column[key]] for name, column in columns.items()
            for key, _ in rows if key in column])
    for name in ("table.md", "table.csv"):
        os.replace(os.path.join(out, f"{name}.tmp"), os.path.join(out, name))
    print("\n".join(lines))
