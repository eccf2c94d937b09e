"""Draws few-shot tables from GUE's training tables, for the experiments that few datasets cannot decide.

    python results/draw.py FOLDER

From each of five tables three disjoint draws of 50 rows per class, with all test rows, and FOLDER/drawn.tsv,
which names them for finetune.py --tasks.
"""
import os
import sys

import numpy as np

TABLES = {"tf_h_2": "tf/2", "tf_h_4": "tf/4", "tf_m_1": "mouse/1", "emp_H3": "EMP/H3",
          "emp_H3K36me3": "EMP/H3K36me3"}


def draw(folder, count=3, rows=50):
    """Yields (number, lines) of a table's draws of so many rows per class, then ("test", lines)."""
    files = []
    for part in ("train", "test"):
        with open(f"data/GUE/{folder}/{part}.csv") as f:
            files.append(f.readlines())
    (header, *train), test = files
    train = [train[i] for i in np.random.default_rng(0).permutation(len(train))]
    classes = [[row for row in train if row.strip().endswith(f",{label}")] for label in "01"]
    for i in range(count):
        yield i, [header, *(row for part in classes for row in part[rows * i:rows * (i + 1)])]
    yield "test", test


if __name__ == "__main__":
    _, out = sys.argv
    os.makedirs(out, exist_ok=True)
    tasks = ["name\tfiles\tmetric\tprotocol\n"]
    for name, folder in TABLES.items():
        for part, lines in draw(folder):
            with open(os.path.join(out, f"{name}_{part}.csv"), "w") as f:
                f.writelines(lines)
            if part != "test":
                tasks.append(f"{name}/{part}\t{name}_{part}.csv {name}_test.csv\tacc\tfewshot\n")
    with open(os.path.join(out, "drawn.tsv"), "w") as f:
        f.writelines(tasks)
