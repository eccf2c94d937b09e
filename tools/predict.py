"""Predict classes and their probabilities (or values) of new sequences with a fine-tuned model, as a TSV.

    python -m tools.predict new.fa --init out/finetune/csv_my/randommask.pt              new.predictions.tsv
    python -m tools.predict genome.fa --window 500 --step 100 --init out/finetune/csv_my/randommask.pt
"""
import argparse
import collections
import contextlib
import io
import itertools
import os
import signal
import sys

import numpy as np

import data
import finetune
import training
from training import number

LONGEST = 1 << 20                                            # bases of a sequence without --window


def read_sequences(path, window=None, step=None):
    """(id, codes) of each sequence of a FASTA file or a table (id: its number), or of each of its windows."""
    is_table = os.path.splitext(path.removesuffix(".gz"))[1].lower() in data.DELIMITER
    if is_table and not data.file_start(path).startswith(b">"):                # a FASTA may be named .txt
        texts = data.read_table(path, labels=False)[0]
        records = ((str(i), data.encode(text)) for i, text in enumerate(texts, 1))
    else:
        data.check_file(path)
        records = ((name, codes) for name, codes, _ in data.fasta_records(path))
    for name, codes in records:
        if window:
            yield from cut_windows(name, codes, window, step or window)
        elif len(codes) > LONGEST:
            raise ValueError(f"{path}: {name} has {len(codes):,} bases; give --window (and --step)")
        else:
            yield name, codes


def cut_windows(name, codes, window, step):
    """(name:start-end, codes) of the windows of a sequence; the last one ends where the sequence ends."""
    last = max(len(codes) - window, 0)
    for start in [*range(0, last, step), last]:
        part = codes[start:start + window]
        yield f"{name}:{start}-{start + len(part)}", part


def read_blocks(sequences, size=1 << 24):
    """(ids, Rows) of about `size` bases from (id, codes) pairs."""
    ids, parts, total = [], [], 0
    for name, codes in itertools.chain(sequences, [(None, ())]):
        if ids and (name is None or total + len(codes) > size):
            yield ids, data.rows_of(np.concatenate(parts), [len(part) for part in parts], None, {})
            ids, parts, total = [], [], 0
        ids.append(name)
        parts.append(codes)
        total += len(codes)


@contextlib.contextmanager
def new_file(out, source, suffix):
    """A binary file that becomes `out` once it is whole; default: source's stem + suffix, in this folder."""
    out = out or os.path.splitext(os.path.basename(source).removesuffix(".gz"))[0] + suffix
    if os.path.exists(out):
        raise ValueError(f"--out {out}: exists already; name another file")
    try:
        with open(out + ".tmp", "wb") as f:
            yield f
        os.replace(f.name, out)
        print(f"wrote {out}")
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(out + ".tmp")


def add_flags(parser):
    """The flags that predict and embed share; returns the function that adds the next one."""
    add, positive = parser.add_argument, number(int, 1)
    add("file", metavar="FILE", help="FASTA, or a .csv, .tsv or .txt with a column sequence; plain or gzip")
    add("--init", required=True, help="checkpoint (predict: a fine-tuned one), hf:FOLDER or findna:FILE")
    add("--window", type=positive, help="cut each sequence into windows of N bases")
    add("--step", type=positive, help="bases between the starts of windows (--window)")
    add("--long", choices=("chunk", "truncate"), help="beyond block_size: windows, or cut (as fine-tuned)")
    add("--stride", type=positive, help="1: overlapping k-mers, k: non-overlapping (as trained)")
    add("--eval_network", choices=("teacher", "student"), help="FinDNA: network to use (as finetune.py)")
    add("--micro_batch_size", type=positive, default=128, help="windows per forward pass (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on CUDA")
    add("--out", help="file to write (default: FILE's name with another ending, in this folder)")
    return add


def open_model(args, **changes):
    """The Model of these flags, on the device."""
    if not args.file or args.out == "":
        raise ValueError(f"{'FILE' if not args.file else '--out'} '': is empty; name a file")
    if args.step and not args.window:
        raise ValueError("--step: belongs to --window; add that or drop it")
    device, dtype, *_ = training.set_up(args.device, args.dtype, join=False)
    model = finetune.load_model(args.init, device, args.eval_network, stride=args.stride, long=args.long,
                                dtype=dtype, **changes)
    model.micro_batch_size = args.micro_batch_size
    return model


def predict(model, args):
    """Writes a row a sequence: id, length, class with probabilities, or values of a regression."""
    names, regression, counts = model.classes(), model.net.spec["regression"], collections.Counter()
    with new_file(args.out, args.file, ".predictions.tsv") as file, io.TextIOWrapper(file) as f:
        columns = names if regression else ["class", *(f"p_{name}" for name in names)]
        f.write("\t".join(["id", "length", *columns]) + "\n")
        for ids, rows in read_blocks(read_sequences(args.file, args.window, args.step)):
            lengths = np.diff(rows.offsets)
            for name, length, values in zip(ids, lengths, model.predict(rows)):
                cells = [] if regression else [names[values.argmax()]]
                f.write("\t".join([name, str(length), *cells, *(f"{value:.6g}" for value in values)]) + "\n")
            counts.update({"sequences": len(ids), "with_n": rows.notes["with_n"]} | model.net.count(lengths))
    print(", ".join(f"{name} {count:,}" for name, count in counts.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves no half-written file
    with training.user_errors():
        args = parser.parse_args()
        predict(open_model(args), args)
