"""Embed sequences with a pretrained or fine-tuned model, as an .npz of ids and embeddings (n, C).

    python -m tools.embed new.fa --init out/randommask/last.pt                           new.npz
    python -m tools.embed new.fa --init out/findna/last.pt --per_base
    python -m tools.embed new.fa --init out/randommask/last.pt --layer -2        the layer before the last

--per_base adds per_base (bases, C) of all sequences in one array: that of sequence i is
per_base[offsets[i]:offsets[i + 1]]. With k-mers, a base has the mean of the k-mers that cover it. A vector is
NaN where the network reads nothing: sequences shorter than k or all N, bases in no k-mer or cut off.
"""
import collections

import training                                              # first: it answers Ctrl-C in the slow imports

import numpy as np
import torch

import data
import finetune
import models
from tools.predict import add_flags, count_block, open_model, output, read_blocks, read_sequences, say_counts

WIDTH = 256                                                  # of a name in `ids`
NAMED = 10                                                   # names that are printed


@torch.no_grad()
def per_base(net, rows, micro_batch_size, **layer):
    """Embeds every base of rows: (bases, C), the mean of the hidden states that cover it."""
    average = net.spec["strands"] == "average"
    rows = data.both_strands(rows) if average else rows
    lengths, parts = np.diff(rows.offsets), []
    for index in finetune.pieces(net, np.arange(len(lengths)), lengths, micro_batch_size):
        with training.autocast(rows.bases.device, net.spec["dtype"]):
            states, covered = net.per_base(rows, index, **layer)               # (N, C), (N, width)
        first, end = (int(rows.offsets[i]) for i in (index[0], index[-1] + 1))
        parts.append(models.over_bases(states, covered - first, end - first))
    states = torch.cat(parts).numpy()
    return data.mean_of_strands(states) if average else states


def name_arrays(ids):
    """Returns {"ids": array}; if WIDTH cuts names, also long_at (which) and long_ids (whole, one a line).

    numpy gives each text of an array the room of the longest one: one name of 1 MB would multiply.
    """
    at = [i for i, name in enumerate(ids) if len(name) > WIDTH]
    if not at:
        return {"ids": np.array(ids)}
    print(f"{len(at):,} names of more than {WIDTH} characters are cut in ids, and whole in long_ids")
    return {"ids": np.array([name[:WIDTH] for name in ids]), "long_at": np.array(at),
            "long_ids": np.array("\n".join(ids[i] for i in at))}


def say_empty(what, ids):
    """Prints how many sequences have NaN, and the first of them."""
    if ids:
        more = ", ..." if len(ids) > NAMED else ""
        print(f"{what}: {', '.join(name[:80] for name in ids[:NAMED])}{more}")


def embed(model, args):
    """Writes ids and embeddings of all sequences; with --per_base those of all bases, and their offsets."""
    ids, embeddings, bases, offsets = [], [], [], [np.zeros(1, np.int64)]
    out, counts, empty, partial, n_nan = output(args, ".npz"), collections.Counter(), [], [], 0
    layer = model.at_layer(args.layer)
    with data.new_path(out) as f:
        for names, rows in read_blocks(read_sequences(args)):
            ids += names
            n_bases = finetune.n_bases(model.net, rows)
            embeddings.append(model.embed(rows, args.layer))
            counts.update(count_block(model.net, rows, n_bases))
            empty += [name for name, n in zip(names, n_bases) if not n]
            if args.per_base and rows.first is not None:
                raise ValueError(f"{args.file}: --per_base: not for pairs (sequence_2); drop it")
            if args.per_base:
                device_rows = data.on_device(rows, model.device)
                vectors = per_base(model.net, device_rows, args.micro_batch_size, **layer)
                vectors[np.repeat(n_bases == 0, np.diff(rows.offsets))] = np.nan
                missing = np.add.reduceat(np.isnan(vectors[:, 0]), rows.offsets[:-1], dtype=np.int64)
                partial += [name for name, n in zip(names, missing) if n]
                n_nan += missing.sum()
                bases.append(vectors)
                offsets.append(rows.offsets[1:] + offsets[-1][-1])
        arrays = name_arrays(ids) | {"embeddings": np.concatenate(embeddings)}
        if args.per_base:
            arrays |= {"per_base": np.concatenate(bases), "offsets": np.concatenate(offsets)}
        np.savez(f, **arrays)
    print(f"wrote {out}: {', '.join(f'{name} {array.shape}' for name, array in arrays.items())}")
    say_counts(counts)
    say_empty(f"NaN for {len(empty):,} sequences of which the network reads no base", empty)
    say_empty(f"NaN for {n_nan:,} of {offsets[-1][-1]:,} bases that the network does not read, in "
              f"{len(partial):,} sequences", partial)


if __name__ == "__main__":
    parser = training.make_parser(__doc__)
    add = add_flags(parser)
    add("--pool", choices=("mean", "cls", "both"), default="mean", help="mean, [CLS] or both (%(default)s)")
    add("--layer", type=int, default=-1, help="0: input embeddings, 1: first layer, -1: last (%(default)s)")
    add("--per_base", action="store_true", help="also the embedding of each base")
    with training.user_errors():
        args = parser.parse_args()
        embed(open_model(args, pool=args.pool), args)
