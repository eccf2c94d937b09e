"""Reports what a benchmark set or your own table holds: sizes, balance, duplicates, near-duplicates, leaks.

    python -m tools.report emp/H3 gb8                          tasks or groups, as in finetune.py --task
    python -m tools.report gb/human_ocr_ensembl --fasta GENOME.fa             cut from its coordinate tables
    python -m tools.report my.csv                              your table, or two or three: finetune.py --csv
    python -m tools.report strands new.fa --init out/finetune/csv_my/randommask.pt     do its strands agree?
"""
import itertools
import os
from types import SimpleNamespace

import training                                              # first: it answers Ctrl-C in the slow imports
from training import file_name, folder_name

import numpy as np

import data
import finetune
from tools.predict import read_blocks, read_sequences

TABLES = tuple(suffix + packed for suffix in data.DELIMITER for packed in ("", ".gz"))


def published(n, task, split):
    """Returns a number of rows as text, with the published number where there is one."""
    known = task.rows.get(split)
    return f"{n:,} (published {known:,}: {'OK' if n == known else 'differs'})" if known else f"{n:,}"


def report_intervals(task, data_dir, folder):
    """Prints the sizes, repeats and leak of the coordinate tables of a GenomicBenchmarks set."""
    train = set()
    for split in ("train", "test"):
        intervals = []
        for path in data.class_paths(task, data_dir, os.path.join(folder, split), ".csv"):
            intervals += [interval[:3] for interval in data.read_intervals(path)[0]]   # without strand
        n, repeats = len(intervals), len(intervals) - len(set(intervals))
        line = f"  {split} table: {published(n, task, split)} intervals, {repeats:,} repeats"
        if split == "test":
            leak = sum(interval in train for interval in intervals)
            line += f", {leak:,} ({leak / n:.1%}) are training intervals"
        print(line)
        train = set(intervals)


def balance(task, rows):
    """Returns the number of rows by class, or the range of each target, as text."""
    if task.multilabel:
        return ", ".join(f"{name} {n:,}" for name, n in zip(task.classes, rows.labels.sum(0)))
    if task.regression:
        targets = zip(task.classes, rows.labels.T)
        return ", ".join(f"{name} {x.min():.2f} to {x.max():.2f}" for name, x in targets)
    counts = np.bincount(rows.labels, minlength=len(task.classes))
    return ", ".join(f"{i}:{n:,}" for i, n in enumerate(counts))


def report_rows(task, split, rows):
    """Prints the size, lengths and balance of one split, and how many rows are unusual."""
    lengths = np.diff(rows.offsets) - (rows.first is not None)                 # of both of a pair
    unusual = ", ".join(f"{name} {n:,}" for name, n in rows.notes.items() if n)
    print(f"  {split}: {published(len(lengths), task, split)} rows; bases min {lengths.min()}, median "
          f"{np.median(lengths):g}, max {lengths.max()}; {balance(task, rows)}; {unusual or 'sound'}")


def report_overlap(splits):
    """Prints how many sequences, on either strand, each two splits share, but not two train files of a
    few-shot task, which overlap by design."""
    keys = {split: data.row_keys(rows) for split, rows in splits.items()}
    for a, b in itertools.combinations(keys, 2):
        both = set(keys[a]) & set(keys[b])
        shares = [f"{sum(key in both for key in keys[split]) / len(keys[split]):.1%}" for split in (a, b)]
        if not b.startswith("train"):
            print(f"  {a} and {b}: {len(both):,} sequences in both, {' and '.join(shares)} of the rows")


def gc_and_length(rows):
    """Returns the share of G and C among the bases other than N, and the length, of each sequence: (n, 2)."""
    lengths = np.diff(rows.offsets) - (rows.first is not None)
    gc, known = rows.bases // 2 == 1, rows.bases < 4
    gc, known = (np.add.reduceat(x, rows.offsets[:-1], dtype=int) for x in (gc, known))
    return np.stack([gc / np.maximum(known, 1), lengths], 1)


def report_similar(splits):
    """Prints how many sequences have near-duplicates within and across splits; returns whether other
    splits have any in train. Those that are linked through others count, as in data.similar_groups."""
    bases, lengths = zip(*[(rows.bases, np.diff(rows.offsets)) for rows in splits.values()])
    rows = data.rows_of(np.concatenate(bases), np.concatenate(lengths), None, {})
    ends, leaks = np.cumsum(list(map(len, lengths)))[:-1], False
    groups = dict(zip(splits, np.split(data.similar_groups(rows), ends)))
    print(f"  near-duplicates (half of the {data.NEAR_K}-mers in common, on either strand):")
    for (split, x), different in zip(groups.items(), np.split(data.first_rows(rows), ends)):
        sizes = np.bincount(x[np.unique(different, return_index=True)[1]])
        n, near = sizes.sum(), sizes[sizes > 1]
        print(f"    within {split}: {near.sum():,} of {n:,} different sequences ({near.sum() / n:.1%}) in "
              f"{len(near):,} groups, the largest of {sizes.max():,}")
    for a, b in itertools.combinations(groups, 2):
        if not b.startswith("train"):
            near = np.isin(groups[b], groups[a])
            leaks |= a == "train" and near.any()
            print(f"    {a} and {b}: {near.sum():,} rows of {b} ({near.mean():.1%}) have one, or an equal "
                  f"sequence, in {a}")
    return leaks


def report_floors(task, splits, functions):
    """Prints length and GC by class, and how well linear models do on features, {name: function of Rows}."""
    split, rows = next(iter(splits.items()))
    for i, name in enumerate(["all"] if task.regression else task.classes):
        own = rows.labels[:, i] if task.multilabel else rows.labels == i
        x = gc_and_length(rows)[slice(None) if task.regression else own]
        if not len(x):                                       # a label that no row has
            continue
        (gc, length), (gc_sd, length_sd) = x.mean(0), x.std(0)
        print(f"  {split}, {name}: length {length:.1f} (sd {length_sd:.1f}), GC {gc:.1%} (sd {gc_sd:.1%})")
    test = splits.get("test") or splits.get("dev")
    if split == "train" and test:
        metric, found = finetune.main_metric("strict", task), []
        for name, function in functions.items():
            outputs = finetune.fit_linear(function(rows), rows.labels, function(test), task)
            score = finetune.scores(outputs, test.labels, task)[metric]
            found.append(f"{name}: {finetune.shown(metric, score)}")
        print(f"  linear models on {'test' if 'test' in splits else 'dev'}: {', '.join(found)}")


def report_splits(task, splits, functions):
    """Prints what the splits of a task hold and share; returns whether test or dev has near-duplicates in
    train."""
    splits = {split: rows for split, rows in splits.items() if rows}
    for split, rows in splits.items():
        report_rows(task, split, rows)
    report_overlap(splits)
    leaks = report_similar(splits)
    report_floors(task, splits, functions)
    return leaks


def report_strands(args):
    """Prints how much the predictions of args.init differ between a sequence and its reverse complement."""
    if not args.init or len(args.tasks) < 2:
        raise ValueError("strands: give files with sequences, and the model with --init")
    if args.targets or args.multilabel:
        raise ValueError("--targets, --multilabel: the model knows its outputs; drop them")
    model = finetune.load_model(args.init, strands="forward")
    for file in args.tasks[1:]:
        sequences = read_sequences(SimpleNamespace(**vars(args), file=file, window=None, step=None))
        outputs = [model.predict(data.both_strands(rows)) for _, rows in read_blocks(sequences)]
        pairs = np.concatenate([np.stack([x[:len(x) // 2], x[len(x) // 2:][::-1]]) for x in outputs], 1)
        known = np.isfinite(pairs).all((0, 2))               # (2, n, outputs)
        (one, two), n = pairs[:, known], known.sum()
        line = f"{file}: {n:,} sequences (and {len(known) - n:,} that the network does not read)"
        if n > 1 and not (model.net.spec["regression"] or model.net.spec["multilabel"]):
            line += f"; another class on the other strand {(one.argmax(1) != two.argmax(1)).mean():.1%}"
        for name, x, y in zip(model.classes(), one.T, two.T) if n > 1 else ():
            r = np.corrcoef(x, y)[0, 1]
            line += f"; {name}: mean difference {abs(x - y).mean():.3g}, correlation {r:.3f}"
        print(line)


def report_tables(args):
    """Prints what a user's table holds, or two or three that belong together, split as finetune.py does."""
    paths = args.tasks
    args = SimpleNamespace(**vars(args), csv=paths, split=None, split_by=None, seed=42)
    functions = {"GC and length": gc_and_length, "5-mer counts": data.kmer_counts}
    task, splits = finetune.read_user_csv(args)
    leaks = report_splits(task, splits, functions)
    groups = data.read_groups(paths[0], None, data.column_flags(args)["delimiter"])[1]
    one = len(paths) == 1 and ("split" not in groups or finetune.labels_split(args))
    if leaks and not one:
        print("Near-duplicates in train make a test too easy; give one table with --split_by similarity")
    elif leaks:
        print("Near-duplicates in train make a test too easy. Split by --split_by similarity instead:")
        args.split_by = "similarity"
        try:
            task, splits = finetune.read_user_csv(args)
        except ValueError as e:                              # one group may hold nearly all rows
            print(f"  not possible: {training.plain(str(e))}")
        else:
            report_splits(task, splits, functions)


def report_task(task, data_dir, fasta):
    """Prints where a benchmark set comes from and what its files hold."""
    print(f"{task.name}: {task.suite}, {', '.join(task.classes)}; {task.metric}, {task.length} bases\n"
          f"  from {task.source}; licence: {task.licence}")
    folder = data.coordinate_folder(task, data_dir)
    if data.find(folder, f"train/{task.classes[0]}.csv"):
        report_intervals(task, data_dir, folder)
    splits = data.read_task(task.name, data_dir, fasta=fasta)
    if task.suite == "few-shot":                             # all its train files, and a dev file not for use
        files = {f"train/{n}": data.FEW_SHOT[task.name][0].format(n) for n in (10, 50, 100, 500, 1000)}
        files["dev"] = "full-dataset/dev.tsv"
        wanted = {split: [name] for split, name in files.items() if data.find(folder, name)}
        splits = data.read_tables(task, data_dir, wanted) | {"test": splits["test"]}
    report_splits(task, splits, {"GC and length": gc_and_length})


if __name__ == "__main__":
    parser = training.make_parser(__doc__)
    add = parser.add_argument
    add("tasks", nargs="+", help=f"tasks (emp/H3), groups ({' '.join(data.GROUPS)}), or your tables")
    add("--targets", nargs="+", metavar="COLUMN", help="your tables: number columns of a regression")
    add("--multilabel", nargs="+", metavar="COLUMN", help="your tables: columns of 0 and 1, a label each")
    data.add_column_flags(add, "sequence", "label")
    add("--init", type=file_name, help="strands: a fine-tuned model")
    add("--data_dir", type=folder_name, default="data", help="folder of the benchmark sets (%(default)s)")
    add("--fasta", type=file_name, nargs="+", help="genome of coordinate tables: one FASTA, or one a class")
    args = parser.parse_args()
    training.outlive_streams()                               # ... | head
    status = 0
    with training.user_errors():
        if args.tasks[0] == "strands":
            report_strands(args)
        elif args.init:
            raise ValueError("--init: belongs to strands; drop it")
        elif all(name.lower().endswith(TABLES) for name in args.tasks):
            report_tables(args)
        elif args.targets or args.multilabel:
            raise ValueError("--targets, --multilabel: belong to tables of your own; drop them")
        elif any(data.column_flags(args).values()):
            raise ValueError("--sequence_column, --label_column, --delimiter: belong to tables of your own; "
                             "drop them")
        else:
            for name in data.task_names(args.tasks):
                try:
                    report_task(data.TASKS[name], args.data_dir, args.fasta)
                except ValueError as e:                      # go on: the next set may be there
                    print(f"  not read: {training.plain(str(e))}")
                    status = 2
    parser.exit(status)
