"""Reports what a benchmark set holds: sizes against the published ones, balance, duplicates, leaks.

    python -m tools.report emp/H3 gb8                          tasks or groups, as in finetune.py --task
    python -m tools.report gb/human_ocr_ensembl --fasta GENOME.fa             cut from its coordinate tables
"""
import argparse
import itertools
import os

import training                                              # first: it answers Ctrl-C in the slow imports
from training import file_name, folder_name

import numpy as np

import data


def published(n, task, split):
    """Return a number of rows as text, with the published number where there is one."""
    known = task.rows.get(split)
    return f"{n:,} (published {known:,}: {'OK' if n == known else 'differs'})" if known else f"{n:,}"


def report_intervals(task, folder):
    """Print the sizes, repeats and leak of the coordinate tables of a GenomicBenchmarks set."""
    train = set()
    for split in ("train", "test"):
        intervals = []
        for path in data.class_paths(task, os.path.join(folder, split), ".csv"):
            intervals += [interval[:3] for interval in data.read_intervals(path)[0]]   # without strand
        n, repeats = len(intervals), len(intervals) - len(set(intervals))
        line = f"  {split} table: {published(n, task, split)} intervals, {repeats:,} repeats"
        if split == "test":
            leak = sum(interval in train for interval in intervals)
            line += f", {leak:,} ({leak / n:.1%}) are training intervals"
        print(line)
        train = set(intervals)


def balance(task, rows):
    """Return the number of rows by class, or the range of each target, as text."""
    if task.multilabel:
        return ", ".join(f"{name} {n:,}" for name, n in zip(task.classes, rows.labels.sum(0)))
    if task.regression:
        targets = zip(task.classes, rows.labels.T)
        return ", ".join(f"{name} {x.min():.2f} to {x.max():.2f}" for name, x in targets)
    counts = np.bincount(rows.labels, minlength=len(task.classes))
    return ", ".join(f"{i}:{n:,}" for i, n in enumerate(counts))


def report_rows(task, split, rows):
    """Print the size, lengths and balance of one split, and how many rows are unusual."""
    lengths = np.diff(rows.offsets)
    unusual = ", ".join(f"{name} {n:,}" for name, n in rows.notes.items() if n)
    print(f"  {split}: {published(len(lengths), task, split)} rows; bases min {lengths.min()}, median "
          f"{np.median(lengths):g}, max {lengths.max()}; {balance(task, rows)}; {unusual or 'sound'}")


def report_overlap(splits):
    """Print how many sequences, on either strand, each two splits share; train files of a few-shot task
    overlap by design."""
    keys = {split: data.row_keys(rows) for split, rows in splits.items()}
    for a, b in itertools.combinations(keys, 2):
        both = set(keys[a]) & set(keys[b])
        shares = [f"{sum(key in both for key in keys[split]) / len(keys[split]):.1%}" for split in (a, b)]
        if not b.startswith("train"):
            print(f"  {a} and {b}: {len(both):,} sequences in both, {' and '.join(shares)} of the rows")


def report_task(task, data_dir, fasta):
    """Print where a benchmark set comes from and what its files hold."""
    print(f"{task.name}: {task.suite}, {', '.join(task.classes)}; {task.metric}, {task.length} bases\n"
          f"  from {task.source}; licence: {task.licence}")
    folder = data.coordinate_folder(task, data_dir)
    if data.find(folder, f"train/{task.classes[0]}.csv"):
        report_intervals(task, folder)
    splits = {split: rows for split, rows in data.read_task(task.name, data_dir, fasta=fasta).items() if rows}
    if task.suite == "few-shot":                             # all its train files, and a dev file not for use
        files = {f"train/{n}": data.FEW_SHOT[task.name][0].format(n) for n in (10, 50, 100, 500, 1000)}
        files["dev"] = "full-dataset/dev.tsv"
        wanted = {split: [name] for split, name in files.items() if data.find(folder, name)}
        splits = data.read_tables(task, data_dir, wanted) | {"test": splits["test"]}
    for split, rows in splits.items():
        report_rows(task, split, rows)
    report_overlap(splits)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("tasks", nargs="+", help=f"tasks (emp/H3) or groups: {' '.join(data.GROUPS)}")
    add("--data_dir", type=folder_name, default="data", help="folder of the benchmark sets (%(default)s)")
    add("--fasta", type=file_name, nargs="+", help="genome of coordinate tables: one FASTA, or one a class")
    args = parser.parse_args()
    status = 0
    with training.user_errors():
        names = data.task_names(args.tasks)
    for name in names:
        try:
            report_task(data.TASKS[name], args.data_dir, args.fasta)
        except ValueError as e:                              # go on: the next set may be there
            print(f"  not read: {training.plain(str(e))}")
            status = 2
    parser.exit(status)
