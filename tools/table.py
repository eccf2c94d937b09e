"""All results of finetune.py in one table: seeds pooled, beside the papers' numbers.

    python -m tools.table                  of out/finetune; writes table.md and table.csv there, too
    python -m tools.table out/mine
    python -m tools.table --results        of results/: the tables of our experiments, in the documents

results/paper.csv holds the papers' numbers and their caveats. A column of ours is one setup (--init, mode and
whatever differs between runs of a task); a row is one task with one metric.
"""
import csv
import io
import itertools
import os
import sys
from collections import namedtuple

import training                                              # first: it answers Ctrl-C in the slow imports

import numpy as np
from scipy import stats

import data
import finetune
from tools import evidence

PAPER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "results", "paper.csv")
METRICS = {"mcc": "MCC", "acc": "accuracy", "f1_macro": "macro F1", "f1_binary": "binary F1",
           "f1_micro": "micro F1", "pcc": "mean PCC", "spearman": "mean Spearman", "auroc": "AUROC",
           "auprc": "AUPRC", "balanced_acc": "balanced accuracy"}
FIELDS = "pool", "protocol", "stride", "long", "dtype", "overrides"    # of a setup; named where they differ
PARTS = "key", "init", "weights", "data", "mode", *FIELDS, "seed"              # tell runs apart
PROBE = " (linear probe)"                                    # after a metric of paper.csv
UNLIKE = "§"                                                 # on other rows than the published split
LEGEND = ("100 x mean ± sd (seeds); the best of ours is bold; † a run collapsed (one prediction for all); "
          f"‡ runs without a score are left out; {UNLIKE} other rows than published (footnote): not in "
          "means, not compared with papers.")

Key = namedtuple("Key", "task shots metric")                 # of a row of the table
Cell = namedtuple("Cell", "mean sd n text note")
Table = namedtuple("Table", "lines rows columns")            # Markdown; [(Key, label)]; {name: {Key: Cell}}
NO_CELL = Cell(np.nan, "", "", "", "")


def difference(row):
    """Returns in words how a run's rows differ from the published split; "" if not, or if it is unknown."""
    task, rows = data.TASKS.get(row["task"]), row.get("rows")
    tested_on, _, share = row.get("tested_on", "test").partition("; ")         # "dev is 10% of train"
    if not task or not task.rows or not rows:
        return ""
    sizes = {"train": rows["train"] + (rows["dev"] if "dev is" in share else 0), "test": rows["test"]}
    chosen = {"test"} if "fitted on" in share else {"train", "test"}           # by the protocol: 90% of train
    if tested_on == "test" and all(task.rows.get(split, sizes[split]) == sizes[split] for split in chosen):
        return ""
    published = ", ".join(f"{split} {n:,}" for split, n in task.rows.items())
    return (f"{task.name}: trained on {sizes['train']:,} rows, tested on {sizes['test']:,} of {tested_on}; "
            f"published: {published}")


def in_words(row):
    """Returns a row of results.jsonl with its fields as text for the table."""
    key = Key(row["task"], row["shots"], row["metric"])
    named = {field: f"{field} {row[field]}" if row.get(field) else "" for field in FIELDS[:-1]}
    named["stride"] = f"stride {row['stride'] or 'of the tokenizer'}"
    return row | named | {
        "key": key, "collapsed": bool(row["collapsed"]), "difference": difference(row),
        "overrides": in_text(row["overrides"]), "flags": row["overrides"],
        "dev": row.get("dev") or {}, "by_loss": (row.get("numbers") or {}).get("select") == "loss",
        "score": np.nan if row["score"] is None else 100 * float(row["score"])}


def read_runs(out, ids=None):
    """Reads runs of results.jsonl (with these ids). Where only the score differs, the last one counts."""
    path, runs = os.path.join(out, "results.jsonl"), {}
    if os.path.isfile(out):
        raise ValueError(f"{out}: a file; give the folder of results.jsonl")
    for row in finetune.read_rows(out):
        if ids is None or row["id"] in ids:
            run = in_words(row)
            runs[tuple(run[part] for part in PARTS)] = run
    if not runs:
        raise ValueError(f"{path}: no results yet; run finetune.py first")
    return name_versions(list(runs.values()))


def dev_score(run):
    """Returns what the protocol selects by, the higher the better: the score on dev, or minus its loss."""
    value = run["dev"].get("loss" if run["by_loss"] else run["metric"])
    return -np.inf if value is None else -value if run["by_loss"] else 100 * value


def choose(runs):
    """Chooses, of runs that differ in numbers of the protocol alone (a grid), those with the best mean score
    on dev; returns these, and lines with the scores of all of them, on dev and on test."""
    groups, kept, lines = {}, [], []
    for run in runs:
        numbers = {name: value for name, value in run["flags"].items() if name in finetune.FLAGS}
        others = {name: value for name, value in run["flags"].items() if name not in numbers}
        varying = {"overrides", "seed", "data" if run["key"].shots else ""}    # few-shot draws are other rows
        key = str([*(run[part] for part in PARTS if part not in varying), others])
        key = key if run["dev"] else key + str(numbers)  # no dev: nothing to choose by
        groups.setdefault(key, {}).setdefault(in_text(numbers), []).append(run)
    for settings in groups.values():
        means = {setting: np.mean([dev_score(run) for run in found]) for setting, found in settings.items()}
        best = max(means, key=means.get)
        if len(settings) > 1:
            overrides = in_text({name: value for name, value in settings[best][0]["flags"].items()
                                 if name not in finetune.FLAGS})
            lines += [setting_line(setting, settings[setting], means[setting], setting == best)
                      for setting in sorted(means, key=means.get, reverse=True)]
            settings[best] = [run | {"overrides": overrides} for run in settings[best]]
        kept += settings[best]
    return kept, lines


def setting_line(setting, runs, dev, chosen):
    """Describes a setting of a grid: its mean on dev, and on test."""
    run, loss = runs[0], runs[0]["by_loss"]
    return (f"- {run['task']}, {run['init']}: {setting}: dev {'loss' if loss else METRICS[run['metric']]} "
            f"{-dev if loss else dev:.4g}, test {our_cell(runs).text}" + (", **chosen**" if chosen else ""))


def in_text(flags):
    return ", ".join(f"{name} {value}" for name, value in sorted(flags.items()))


def name_versions(runs):
    """Adds a fingerprint to --init where its checkpoint, or the table of a task, changed between runs; to the
    name of an own table, as those of two projects may share one."""
    for part, same in (("weights", ("init",)), ("data", ("key", "seed"))):
        versions, label = {}, "" if part == "weights" else "data "
        for run in runs:
            fields = same[:1] if run.get("given_split") else same              # no seed has drawn it
            versions.setdefault(tuple(run[field] for field in fields), set()).add(run[part])
        changed = {group[0] for group, found in versions.items() if len(found) > 1}    # in one seed: in all
        for run in runs:
            if run[same[0]] in changed and label and run["task"].startswith("csv/"):
                run["key"] = run["key"]._replace(task=f"{run['task']} ({run[part]})")
            elif run[same[0]] in changed:
                run["init"] += f" ({label}{run[part]})"
    return runs


def our_columns(runs):
    """Returns {setup: {key: cell}}, and in words the fields not in its name: equal in all runs of a task."""
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
                     for field in same if field not in ("pool", "dtype")]


def our_cell(runs):
    """Pools runs: mean and sd over seeds, with the marks of LEGEND. The note says how the rows differ."""
    scores = [run["score"] for run in runs if np.isfinite(run["score"])]
    note = "; ".join(dict.fromkeys(run["difference"] for run in runs if run["difference"]))
    marks = {"†": any(run["collapsed"] for run in runs), "‡": len(scores) < len(runs), UNLIKE: note}
    marks = "".join(mark for mark, applies in marks.items() if applies)
    if not scores:
        return Cell(np.nan, "", 0, "undefined" + marks, note)
    mean, sd = np.mean(scores), np.std(scores, ddof=1) if len(scores) > 1 else ""
    seeds = f" ± {sd:.2f} ({len(scores)})" if len(scores) > 1 else " (1 seed)"
    return Cell(mean, sd, len(scores), f"{mean:.2f}{seeds}{marks}", note)


def paper_columns(path, runs):
    """Reads the papers' values for runs of ours with the same task, metric and mode: ({column: {key: cell}},
    {paper: caveats of these values}, [in words, values with another metric or mode])."""
    columns, caveats, used, other = {}, {}, [], {}
    have = {(run["task"], run["metric"] + (PROBE if run["mode"] == "probe" else "")) for run in runs}
    with open(path, newline="", encoding="utf-8") as f:
        rows = [row for row in csv.DictReader(f) if row["metric"].split(" ")[0] in {"", *METRICS}]
    for row in rows:
        tasks, metric = data.GROUPS.get(row["task"], [row["task"]]), row["metric"].split(" ")[0]
        mode, note = row["metric"][len(metric):], row["note"] and f"{row['paper']}: {row['note']}"
        if not row["value"]:                                 # a caveat; it follows the values it is about
            if any(is_about(row, tasks, value) for value in used):
                caveats.setdefault(row["paper"], []).append(note)
        elif all((task, row["metric"]) in have for task in tasks):
            text = row["value"] + (f" ± {row['sd']}" if row["sd"] else "")
            column = columns.setdefault(f"{row['paper']}: {row['method']}{mode}", {})
            column[Key(row["task"], None, metric)] = Cell(float(row["value"]), row["sd"], "", text, note)
            used.append(row)
        elif row["task"] in dict(have):
            other.setdefault(f"{row['paper']}, {METRICS[metric]}{mode}", {})[row["task"]] = None
    return columns, caveats, [f"not shown, as ours has another metric or mode: {name} of {', '.join(tasks)}"
                              for name, tasks in other.items()]


def is_about(caveat, tasks, value):
    """Tells whether a caveat on these tasks concerns a row with a value; its empty fields match all."""
    same = all(caveat[part] in ("", value[part]) for part in ("paper", "table", "method"))
    return same and (caveat["task"] in ("", value["task"]) or value["task"] in tasks)


def means_of(columns, key, ours=False):
    """Returns a row's means, nan for none or a §. ours=True: § counts where all are on the same rows."""
    cells = [column.get(key, NO_CELL) for column in columns]
    same = ours and len({cell.note for cell in cells if cell is not NO_CELL}) == 1
    return np.array([cell.mean if same or UNLIKE not in cell.text else np.nan for cell in cells])


def group_mean(sets, ours, columns):
    """Adds to columns the mean over the sets that all of ours have; those of ours with none do not count.
    Returns its (key, label), or None if there are fewer than two such sets."""
    has = np.isfinite([means_of(ours, key) for key in sets])                   # (sets, columns)
    has = has[:, has.any(0)]
    sets = [key for key, row in zip(sets, has) if len(row) and row.all()]
    if len(sets) < 2:
        return None
    tasks, label = {key.task for key in sets}, f"mean of the {len(sets)} {sets[0].task.split('/')[0]} sets"
    names = [name for name in data.GROUPS if set(data.GROUPS[name]) == tasks]
    mean = Key(names[0] if names else label, None, sets[0].metric)
    for column in columns:
        value = sum(means_of([column], key)[0] for key in sets) / len(sets)
        if np.isfinite(value):                               # a published average stays as it is
            column.setdefault(mean, Cell(value, "", "", f"{value:.2f}", ""))
    return mean, label


def add_means(keys, ours, columns):
    """Returns the table's rows (key, label) with a mean after each group of sets; adds that to columns."""
    rows = []
    for _, group in itertools.groupby(keys, lambda key: key.task.split("/")[0]):
        group = list(group)
        rows += [(key, f"{key.task} {key.shots}-shot" if key.shots else key.task) for key in group]
        for metric in dict.fromkeys(key.metric for key in group if "/" in key.task):
            sets = [key for key in group if key.metric == metric]
            rows += filter(None, [group_mean(sets, ours, columns)])
    return rows


def table_lines(rows, ours, others, notes):
    """Returns Markdown of ours and others, where these have values; numbers new footnotes in notes."""
    rows = [row for row in rows if not others or any(row[0] in column for column in others.values())]
    columns = {name: column for name, column in (ours | others).items()
               if any(key in column for key, _ in rows)}
    table = [["task", "metric", *columns]]
    for key, label in rows:
        means = means_of(ours.values(), key, ours=not others)
        best = np.nanmax(means) if np.isfinite(means).sum() > 1 else None
        best = {name for name, mean in zip(ours, means) if mean == best}
        table.append([label, METRICS.get(key.metric, key.metric)])
        for name, column in columns.items():
            cell = column.get(key, NO_CELL)
            text = f"**{cell.text}**" if name in best else cell.text
            number = f" [{notes.setdefault(cell.note, len(notes) + 1)}]" if cell.note else ""
            table[-1].append(text + number)
    table = [[cell.replace("|", r"\|") for cell in row] for row in table]       # of a file's name
    widths = [max(map(len, cells)) for cells in zip(*table)]
    table.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in table]


def comparison_lines(keys, ours):
    """Counts the wins of each setup of ours; compares each pair by a signed-rank test over the tasks."""
    table = np.array([means_of(ours.values(), key, ours=True) for key in keys])
    table, lines = table[np.isfinite(table).sum(1) > 1], []
    for name, scores in zip(ours, table.T):
        wins = (scores == np.nanmax(table, 1)).sum()
        lines.append(f"- {name}: best of ours on {wins} of {np.isfinite(scores).sum()} tasks")
    for (a, x), (b, y) in itertools.combinations(zip(ours, table.T), 2):
        gap = np.round((x - y)[np.isfinite(x - y)], 8)       # equal gaps must stay equal
        if len(gap) >= 6:
            p = stats.wilcoxon(gap).pvalue if gap.any() else 1
            lines.append(f"- {a} minus {b}: median {np.median(gap):+.2f}, n = {len(gap)}, p = {p:.2g}")
        elif len(gap):
            lines.append(f"- {a} minus {b}: n = {len(gap)} tasks: too few for a test")
    return lines


def win_lines(paper, keys, ours, others):
    """Counts on how many tasks each setup of ours beats all columns of a paper in its mode, and each one."""
    lines = []
    for name, column in ours.items():
        same = {head: other for head, other in others.items() if (PROBE in head) == (", probe" in name)}
        gaps = np.array([means_of([column], key) - means_of(same.values(), key) for key in keys])
        gaps = gaps[np.isfinite(gaps).any(1)]                # (tasks, columns)
        if len(gaps) > 1:
            each = [f"{head.removeprefix(paper + ': ')} {(gap > 0).sum()} of {np.isfinite(gap).sum()}"
                    for head, gap in zip(same, gaps.T) if np.isfinite(gap).any()]
            wins = f"above all columns on {(np.nanmin(gaps, 1) > 0).sum()} of {len(gaps)} tasks"
            lines.append(f"- {name}: {wins} ({'; '.join(each)})")
    return lines


def make_table(runs, paper_csv=PAPER):
    """Turns runs of read_runs into a Table: all of ours, then ours beside each paper, wins, footnotes."""
    notes, order = {}, {task: i for i, task in enumerate(data.TASKS)}
    runs, settings = choose(runs)
    ours, rest = our_columns(runs)
    papers, caveats, other = paper_columns(paper_csv, runs)
    keys = sorted({run["key"] for run in runs}, key=lambda key: (
        order.get(key.task, len(order)), key.task, key.shots or 0, key.metric))
    columns = ours | papers
    rows = add_means(keys, ours.values(), columns.values())
    parts = [[LEGEND + (f" All runs of a task: {'; '.join(rest)}." if rest else "")],
             table_lines(rows, ours, {}, notes)]
    for paper in dict.fromkeys(name.split(":")[0] for name in papers):
        marks = "".join(f" [{notes.setdefault(text, len(notes) + 1)}]" for text in caveats.get(paper, ()))
        others = {name: column for name, column in papers.items() if name.startswith(f"{paper}:")}
        parts += [[f"Beside {paper}{marks}:"], table_lines(rows, ours, others, notes),
                  win_lines(paper, keys, ours, others)]
    if settings:
        parts.append(["Settings tried, by their score on dev; the table has the chosen ones:", *settings])
    if len(ours) > 1 and len(keys) > 1:
        parts += [["Among ours, wins and Wilcoxon's signed-rank test (two-sided, paired over n tasks, p not "
                   "corrected):"], comparison_lines(keys, ours)]
    parts.append([f"- [{n}] {text}" for text, n in notes.items()] + [f"- {text}" for text in other])
    return Table([line for part in parts if part for line in (*part, "")][:-1], rows, columns)


def write_table(out, paper_csv=PAPER):
    """Prints the table of out/results.jsonl; writes it to out/table.md, its values to out/table.csv."""
    table = make_table(read_runs(out), paper_csv)
    values = [[name, *key, *column[key]] for name, column in table.columns.items()
              for key, _ in table.rows if key in column]
    as_csv = io.StringIO()
    csv.writer(as_csv).writerows([["column", *Key._fields, *Cell._fields], *values])
    markdown = "".join(f"{line}\n" for line in table.lines)
    with (data.new_path(os.path.join(out, "table.md"), replace=True) as md,
          data.new_path(os.path.join(out, "table.csv"), replace=True) as f):
        md.write(markdown.encode())
        f.write(as_csv.getvalue().encode())
        md.flush()                                           # both are whole, or neither is there
    sys.stdout.reconfigure(errors="replace")                 # an ASCII terminal has no plus-minus sign
    print(*table.lines, sep="\n")


if __name__ == "__main__":
    parser = training.make_parser(__doc__)
    parser.add_argument("out", type=training.file_name, nargs="?", default="out/finetune", metavar="OUT",
                        help="folder of results.jsonl (%(default)s)")
    parser.add_argument("--results", type=training.file_name, nargs="*", metavar="OUT",
                        help="write our experiments' tables anew, after collecting the rows of these folders")
    with training.user_errors():
        args = parser.parse_args()
        training.outlive_streams()                           # ... | head
        write_table(args.out) if args.results is None else evidence.write_results(args.results)
