"""The tables of our experiments: made from the rows in results/, written between marks in the documents.

    python -m tools.table --results                          the tables anew, from the rows that are there
    python -m tools.table --results out/findna               first adds the rows of this experiment

An experiment NAME has results/NAME.jsonl (rows of finetune.py), results/NAME.pretraining.jsonl (the last
values in log.jsonl), of a BERT results/NAME.observations.jsonl (its embeddings and attention over time), and
its lines in results/comparisons.csv. Its checkpoints are out/NAME/ARM/SEED/last.pt. A document says which
table stands where: "<!-- rows: NAME scores probe -->", the table, "<!-- end -->"; in a line, "<!-- rows: NAME
primary -->" stands for the main result in words.
"""
import csv
import functools
import glob
import json
import os
import re
import warnings
from collections import namedtuple

import numpy as np
from scipy import stats

import data
import training

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DOCUMENTS = "results/README.md", "docs/results.md", "README.md"
TABLE = re.compile(r"(<!-- rows: ([^>]+) -->\n?).*?(<!-- end -->)", re.S)
CHECKPOINT = re.compile(r"(random:)?out/[^/]+/([^/]+)/(\d+)/last\.pt")
DRAWS = 10_000                                               # of the bootstrap
WINDOWS = 128                                                # whose attention is averaged
# That an arm is better than another. gaps: (datasets, seeds), None where not run; p over datasets, over seeds
Comparison = namedtuple("Comparison", "claim mode primary sets gaps interval p verdict")


def read_jsonl(path):
    """Reads the rows of a JSON lines file, as dicts."""
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def arm_of(row, several=False):
    """Returns (arm, seed) of a row of finetune.py: the seed of the pretraining, or that of a run without any
    (penguinn), or None for 5-mers, which do not depend on one.

    several: the experiment has random weights of several networks, which are told apart.
    """
    found = CHECKPOINT.fullmatch(row["init"])
    if not found:
        return ("5-mers", None) if row["init"] == "kmer" else (row["init"], row["seed"])
    random, arm, seed = found.groups()
    words = [arm if several or not random else "", "random weights" if random else "",
             "" if random else row["overrides"].get("eval_network"),
             "non-overlapping" if row["stride"] > 1 else ""]
    return ", ".join(filter(None, words)), int(seed)


def read_scores(name, root=ROOT, metric=None):
    """Reads an experiment's scores: {(mode, arm): {task: {seed of arm_of: [100 x score, one per run]}}}.

    metric: another one of the test rows, as "auroc"; tasks that have none (of more than two classes) are left
    out. ValueError if an arm's rows of a task differ in their settings, or those of a seed in their weights.
    """
    alike = {}
    rows, scores = read_jsonl(os.path.join(root, "results", f"{name}.jsonl")), {}
    random = {found[2] for row in rows if (found := CHECKPOINT.fullmatch(row["init"])) and found[1]}
    for row in rows:
        arm, seed = arm_of(row, len(random) > 1)
        task = f"{row['task']} {row['shots']}-shot" if row["shots"] else row["task"]
        place = row["mode"], arm, task
        settings = [row.get(key) for key in ("protocol", "overrides", "numbers")]
        for key, value in (place, settings), ((*place, seed), row.get("weights")):
            if alike.setdefault(key, value) != value:
                raise ValueError(f"results/{name}.jsonl: {arm} on {task}, seed {seed}: rows of other "
                                 f"settings or weights; keep those of one kind")
        score = row["test"].get(metric) if metric else row["score"]
        if score is not None or not metric:
            runs = scores.setdefault((row["mode"], arm), {}).setdefault(task, {}).setdefault(seed, [])
            runs.append(np.nan if score is None else 100 * score)
    return scores


def differences(x, y):
    """Subtracts arm y from arm x, each {task: {seed: runs}}: tasks, gaps (tasks, seeds) of means over runs,
    paired by pretraining seed. Where both arms have several runs (draws of rows, in order), those that both
    have count. An arm without pretraining seeds is the same for all seeds of the other."""
    tasks = [task for task in data.TASKS if task in x and task in y]
    tasks += sorted(task for task in x if task in y and task not in tasks)
    held = [set(arm[task]) for arm in (x, y) for task in tasks if None not in arm[task]]
    seeds = sorted(set.intersection(*held)) if held else [None]

    def gap(task, seed):
        runs = [arm[task][seed if seed in arm[task] else None] for arm in (x, y)]
        n = min(map(len, runs))
        return float(np.subtract(*(np.mean(each[:n] if n > 1 else each) for each in runs)))
    return tasks, np.array([[gap(task, seed) for seed in seeds] for task in tasks])


def by_dataset(tasks, gaps):
    """Averages gaps (tasks, seeds) over the training sizes of a dataset, as "worm/100" and "worm/1000", or
    "prom_core 10-shot" and "50-shot": (datasets, seeds). Sizes share test rows: they are not independent."""
    names = [task if task in data.TASKS else re.sub(r"( \d+-shot|/\d+)$", "", task) for task in tasks]
    return np.array([gaps[[name == of for of in names]].mean(0) for name in dict.fromkeys(names)])


def interval(gaps, draws=DRAWS):
    """Returns the 95 % interval of the mean of gaps (datasets, seeds): draws both anew, with replacement."""
    rng = np.random.default_rng(0)
    sets = rng.integers(gaps.shape[0], size=(draws, gaps.shape[0], 1))
    seeds = rng.integers(gaps.shape[1], size=(draws, 1, gaps.shape[1]))
    return np.percentile(gaps[sets, seeds].mean((1, 2)), [2.5, 97.5])


def p_values(gaps):
    """Returns two-sided p of gaps (datasets, seeds): Wilcoxon on dataset means, paired t on seed means."""
    with warnings.catch_warnings():                          # too few values give nan, which is printed
        warnings.simplefilter("ignore")
        sets, seeds = gaps.mean(1), gaps.mean(0)
        over_sets = stats.wilcoxon(np.round(sets, 8)).pvalue if len(sets) > 1 and sets.any() else np.nan
        return over_sets, stats.ttest_1samp(seeds, 0).pvalue if len(seeds) > 1 else np.nan


def verdict(gaps, low, high, p):
    """Applies the rule of results/PLAN.md for the claim that an arm is better; gaps (datasets, seeds)."""
    if min(gaps.shape) < 2:
        return "cannot tell"
    return "held" if low > 0 and p < 0.05 else "not held" if high < 1 else "cannot tell"


def compare(line, root=ROOT):
    """Makes the Comparison of a line of comparisons.csv."""
    scores, arms = read_scores(line["experiment"], root, line["metric"]), [line["a"], line["b"]]
    mode = ", ".join(filter(None, [line["mode"], line["metric"].upper()]))
    x = Comparison(" > ".join(arms), mode, bool(line["primary"]), None, None, None, None, "not run")
    if any((line["mode"], arm) not in scores for arm in arms):
        return x
    tasks, gaps = differences(*[scores[line["mode"], arm] for arm in arms])
    gaps = by_dataset(tasks, gaps)
    (low, high), p = interval(gaps), p_values(gaps)
    result = verdict(gaps, low, high, p[0])
    return x._replace(sets=len(tasks), gaps=gaps, interval=(low, high), p=p, verdict=result)


def planned_comparisons(root=ROOT):
    """Reads comparisons.csv: {experiment: its lines}."""
    found = {}
    with open(os.path.join(root, "results", "comparisons.csv"), newline="", encoding="utf-8") as f:
        for line in csv.DictReader(f):
            found.setdefault(line["experiment"], []).append(line)
    return found


def comparison_rows(name, root=ROOT):
    """Returns the cells of the table of an experiment's comparisons; the primary one is bold."""
    rows = [["claim", "mode", "datasets", "seeds", "difference [95 %]", "p, datasets", "p, seeds", "verdict"]]
    for x in (compare(line, root) for line in planned_comparisons(root)[name]):
        claim = f"**{x.claim}**" if x.primary else x.claim
        numbers = [""] * 5
        if x.gaps is not None:
            datasets, seeds = x.gaps.shape
            numbers = [f"{datasets} ({x.sets} sets)" if x.sets > datasets else str(datasets), str(seeds),
                       f"{x.gaps.mean():+.1f} [{x.interval[0]:+.1f}, {x.interval[1]:+.1f}]",
                       *[f"{p:.2g}" for p in x.p]]
        rows.append([claim, x.mode, *numbers, x.verdict])
    return rows


def primary_text(name, root=ROOT):
    """Returns an experiment's primary comparison in words, for a cell of another table."""
    [row] = [row for row in comparison_rows(name, root) if row[0].startswith("**")]
    claim, _, datasets, seeds, difference, *_, result = row
    return f"{claim.strip('*')}: {difference}, {datasets.split()[0]} datasets, {seeds} seeds: {result}"


def spread(values, digits=1):
    """Returns mean ± sd (n) of numbers as text; "" of none."""
    sd = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{sd} ({len(values)})" if values else ""


def score_rows(name, mode, metric=None, root=ROOT):
    """Returns the cells of the table of scores in a mode: mean ± sd over pretraining seeds (their number)."""
    arms = {arm: tasks for (of, arm), tasks in read_scores(name, root, metric).items() if of == mode}
    tasks = dict.fromkeys(task for tasks in arms.values() for task in tasks)
    means = {arm: {t: [np.mean(runs) for runs in seeds.values()] for t, seeds in found.items()}
             for arm, found in arms.items()}
    rows = [["set", *arms]]
    for task in tasks:
        rows.append([task, *[spread(means[arm].get(task, [])) for arm in arms]])
    common = [task for task in tasks if all(task in means[arm] for arm in arms)]
    last = [np.mean([np.mean(means[arm][task]) for task in common]) for arm in arms] if common else []
    return rows + [[f"mean of the {len(common)} in all", *[f"{mean:.1f}" for mean in last]]]


def run_rows(kind, name, *columns, root=ROOT):
    """Returns the cells of the table of pretraining runs or observations, by arm and step: mean ± sd (n)."""
    arms = {}
    for row in read_jsonl(os.path.join(root, "results", f"{name}.{kind}.jsonl")):
        arms.setdefault((row["arm"], row["step"]), []).append(row)
    rows = [["arm", "steps", *columns]]
    for (arm, step), runs in sorted(arms.items()):
        known = ([run[column] for run in runs if run.get(column) is not None] for column in columns)
        rows.append([arm, f"{step:,}", *[spread(values, 3) for values in known]])
    return rows


def markdown(rows):
    """Turns rows of cells, of which the first is the header, into a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def fill(text, root=ROOT):
    """Returns a document with the tables between its marks made anew."""
    kinds = {"scores": score_rows, "comparisons": comparison_rows}
    kinds |= {kind: functools.partial(run_rows, kind) for kind in ("pretraining", "observations")}

    def table(found):
        name, kind, *words = found[2].split()
        if kind == "primary":
            return found[1] + primary_text(name, root) + found[3]
        return found[1] + markdown(kinds[kind](name, *words, root=root)) + found[3]
    return TABLE.sub(table, text)


def add_rows(path, rows, *key):
    """Adds dicts to a JSON lines file. A row replaces one of the same key: of a run that was done again."""
    old = read_jsonl(path) if os.path.exists(path) else []
    rows = {tuple(row[name] for name in key): row for row in [*old, *rows]}
    with data.new_path(path, replace=True) as f:
        f.write("".join(json.dumps(row) + "\n" for row in rows.values()).encode())


def observe(path):
    """Measures a BERT: {column: value}, silhouettes of its k-mer embeddings; attention of its middle and last
    layer on windows of its own length, as shares over those of equal attention, and its entropy in nats."""
    from tools import figures                                # here, because it imports this through table
    net = figures.read_attention(path, "cpu")
    found = {f"silhouette_{by}": x for by, x in figures.silhouettes(figures.read_bert(path)[0]).items()}
    length = (net.room - 1) * net.stride + net.k
    flags = training.load(path)["args"]
    genome = data.open_genome(flags["genome"], flags["data_dir"], flags["cache"], flags["ambiguous"])
    bases, *_ = figures.random_windows(genome, WINDOWS, length, length)
    seen = figures.attention(net, net.tokens(bases))
    for layer, row in (("middle", (len(seen["numbers"]) - 1) // 2), ("last", -1)):
        shares, (*_, entropy, _) = seen["numbers"][row] / seen["uniform"], seen["numbers"][row]
        found |= {f"{layer}_{what}": float(x) for what, x in zip(("cls", "sep", "near"), shares)}
        found[f"{layer}_entropy"] = float(entropy)
    return found


def collect(out, root=ROOT):
    """Adds the rows of an experiment's folder to results/: its scores, how each pretraining ended, and what
    is seen in the checkpoints of a run that kept some."""
    target, ends = os.path.join(root, "results", os.path.basename(os.path.normpath(out))), []
    add_rows(f"{target}.jsonl", read_jsonl(os.path.join(out, "scores", "results.jsonl")), "id")
    seen = []
    for log in sorted(glob.glob(os.path.join(glob.escape(out), "*", "*", "log.jsonl"))):
        folder, (arm, seed) = os.path.dirname(log), log.split(os.sep)[-3:-1]
        run = {"arm": arm, "seed": int(seed)}
        ends.append(run | {name: x for row in read_jsonl(log) for name, x in row.items()})
        kept = sorted(glob.glob(os.path.join(glob.escape(folder), "step_*.pt")))
        for path in [*kept, os.path.join(folder, "last.pt")] if kept else []:
            seen.append(run | {"step": training.load(path)["step"]} | observe(path))
    if ends:
        add_rows(f"{target}.pretraining.jsonl", ends, "arm", "seed")
    if seen:
        add_rows(f"{target}.observations.jsonl", seen, "arm", "seed", "step")
    print(f"{out}: {len(ends)} pretraining runs, {len(seen)} checkpoints looked into")


def write_results(outs=(), root=ROOT):
    """Collects the rows of experiments' folders, then writes the tables of all documents anew."""
    for out in outs:
        collect(out, root)
    for document in DOCUMENTS:
        path = os.path.join(root, document)
        with open(path, encoding="utf-8") as f:
            old = f.read()
        new = fill(old, root)
        if new != old:
            with data.new_path(path, replace=True) as f:
                f.write(new.encode())
        print(f"{document}: {len(TABLE.findall(new))} tables, {'changed' if new != old else 'as they were'}")
