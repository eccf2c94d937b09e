"""Predict classes and their probabilities (or values) of new sequences with a fine-tuned model, as a TSV.

    python -m tools.predict new.fa --init out/finetune/csv_my/randommask.pt              new.predictions.tsv
    python -m tools.predict genome.fa --window 500 --step 100 --init out/finetune/csv_my/randommask.pt
"""
import collections
import io
import itertools
import os

import training                                              # first: it answers Ctrl-C in the slow imports
from training import file_name, number

import numpy as np
import torch

import data
import finetune

OTHER_ENDINGS = (".csv", ".gz", ".json", ".npy", ".npz", ".tsv", ".xlsx")      # of what is not written
LONGEST = 1 << 20                                            # bases of a sequence without --window


def read_sequences(args):
    """Yields (id, codes) of each sequence of a FASTA file or a table, or of each of its windows.

    A row of a table has its id in --id_column, or in a column id or name; its number if it has none or both.
    """
    path, window, step = args.file, args.window, args.step
    is_table = os.path.splitext(path.removesuffix(".gz"))[1].lower() in data.DELIMITER
    if is_table and not data.file_start(path).startswith(b">"):                # a FASTA may be named .txt
        texts, _, notes = data.read_table(path, labels=False, flags=data.column_flags(args))
        names = notes["names"] or map(str, range(1, len(texts) + 1))
        rows = data.rows_from(texts)
        if window and rows.first is not None:
            raise ValueError(f"{path}: --window: not for pairs (sequence_2); drop it")
        records = zip(names, np.split(rows.bases, rows.offsets[1:-1]))
    else:
        data.check_file(path)
        if given := [name for name, value in data.column_flags(args).items() if value]:
            raise ValueError(f"--{given[0]}{'_column' * (given[0] != 'delimiter')}: {path} is a FASTA, not a "
                             f"table; drop it")
        records = ((name, codes) for name, codes, _ in data.fasta_records(path))
    for name, codes in records:
        if window:
            yield from cut_windows(name, codes, window, step or window)
        elif len(codes) > LONGEST:
            raise ValueError(f"{path}: {name} has {len(codes):,} bases; give --window (and --step)")
        else:
            yield name, codes


def cut_windows(name, codes, window, step):
    """Yields (name:start-end, codes) of a sequence's windows; the last one ends where the sequence ends."""
    last = max(len(codes) - window, 0)
    for start in [*range(0, last, step), last]:
        part = codes[start:start + window]
        yield f"{name}:{start}-{start + len(part)}", part


def read_blocks(sequences, size=1 << 24):
    """Yields (ids, Rows) of about `size` bases from (id, codes) pairs."""
    ids, parts, total = [], [], 0
    for name, codes in itertools.chain(sequences, [(None, ())]):
        if ids and (name is None or total + len(codes) > size):
            yield ids, data.rows_of(np.concatenate(parts), [len(part) for part in parts], None, {})
            ids, parts, total = [], [], 0
        ids.append(name)
        parts.append(codes)
        total += len(codes)


def output(args, suffix):
    """Returns --out; by default FILE's stem + suffix, in this folder. ValueError for another ending."""
    own, out = suffix[suffix.rindex("."):], args.out or suffix
    if out == "-" or out.endswith(("/", *OTHER_ENDINGS)) and not out.endswith(own):
        raise ValueError(f"--out {out}: not the name of a {own} file; give one")
    return args.out or os.path.splitext(os.path.basename(args.file).removesuffix(".gz"))[0] + suffix


def add_model_flags(parser):
    """Adds the flags that say what to run and where to write; returns the function that adds the next one."""
    add, positive = parser.add_argument, number(int, 1)
    add("--init", type=file_name, required=True,
        help="checkpoint (predict: a fine-tuned one), hf:FOLDER or findna:FILE")
    add("--stride", type=positive, help="1: overlapping k-mers, k: non-overlapping (as trained)")
    add("--strands", choices=("forward", "average"), help="average: mean over both strands (as fine-tuned)")
    add("--eval_network", choices=("teacher", "student"), help="FinDNA: network to use (as finetune.py)")
    add("--micro_batch_size", type=positive, default=128, help="windows per forward pass (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    add("--dtype", choices=training.DTYPES, default="auto", help=training.AUTO)
    add("--out", type=file_name,
        help="file to write (default: FILE's name with another ending, in this folder)")
    return add


def add_flags(parser):
    """Adds the flags of predict, embed and mutagenesis; returns the function that adds the next one."""
    add, positive = add_model_flags(parser), number(int, 1)
    add("file", type=file_name, metavar="FILE",
        help="FASTA, or a .csv, .tsv or .txt with a column sequence; plain or gzip")
    data.add_column_flags(add, "sequence", "id")
    add("--window", type=positive, help="cut each sequence into windows of N bases")
    add("--step", type=positive, help="bases between the starts of windows (--window)")
    add("--long", choices=("chunk", "truncate"), help="beyond block_size: windows, or cut (as fine-tuned)")
    return add


def open_model(args, **changes):
    """Opens the Model of these flags, on the device."""
    if args.step and not args.window:
        raise ValueError("--step: belongs to --window; add that or drop it")
    if args.step and args.step > args.window:
        print(f"--step {args.step} is beyond --window {args.window}: of every {args.step:,} bases "
              f"{args.step - args.window:,} are in no window")
    device, dtype, *_ = training.set_up(args.device, args.dtype, join=False)
    torch.set_float32_matmul_precision("highest")            # not TF32, which set_up allows for training
    model = finetune.load_model(args.init, device, args.eval_network, stride=args.stride, long=args.long,
                                dtype=dtype, strands=args.strands, **changes)
    model.micro_batch_size = args.micro_batch_size
    return model


def excel_safe(cell):
    """Returns text that a spreadsheet does not run as a formula."""
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@")) else cell


def count_block(net, rows, n_bases):
    """Counts what is unusual in the sequences of a block: {name: number of them}."""
    unread = int((n_bases == 0).sum())
    return {"sequences": len(n_bases), "with_n": rows.notes["with_n"]} | finetune.count_unfit(net, rows) | {
        "without a base that the network reads": unread}


def say_counts(counts):
    print(", ".join(f"{name} {count:,}" for name, count in counts.items()))


def predict(model, args):
    """Writes a row a sequence: id, length, n_bases, class with probabilities, or values of a regression.

    The labels of a multi-label model have probabilities, and no class.
    """
    names, spec, counts = model.classes(), model.net.spec, collections.Counter()
    text, out = excel_safe if args.excel_safe else str, output(args, ".predictions.tsv")
    with data.new_path(out) as file, io.TextIOWrapper(file, "utf-8") as f:
        columns = names if spec["regression"] else [f"p_{name}" for name in names]
        one_class = not (spec["regression"] or spec["multilabel"])
        columns = ["class"] * one_class + [*columns]
        f.write("\t".join(["id", "length", "n_bases", *map(text, columns)]) + "\n")
        for ids, rows in read_blocks(read_sequences(args)):
            n_bases, outputs = finetune.n_bases(model.net, rows), model.predict(rows, args.empty)
            lengths = np.diff(rows.offsets) - (rows.first is not None)         # of both of a pair
            for name, length, n, values in zip(ids, lengths, n_bases, outputs):
                cells = [text(names[values.argmax()])] if one_class else []
                cells += [f"{value:{'.9g' if spec['regression'] else '.6g'}}" for value in values]
                if not n and not args.empty:
                    cells = [""] * len(cells)
                f.write("\t".join([text(name), str(length), str(n), *cells]) + "\n")
            counts.update(count_block(model.net, rows, n_bases))
    print(f"wrote {out}")
    say_counts(counts)


if __name__ == "__main__":
    parser = training.make_parser(__doc__)
    add = add_flags(parser)
    add("--empty", action="store_true", help="also predict sequences of which the network reads no base")
    add("--excel_safe", action="store_true", help="an apostrophe before names that begin with =, +, - or @")
    with training.user_errors():
        args = parser.parse_args()
        predict(open_model(args), args)
