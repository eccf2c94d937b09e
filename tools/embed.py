"""Embed sequences with a pretrained or fine-tuned model, as an .npz of ids and embeddings (n, C).

    python -m tools.embed new.fa --init out/randommask/last.pt                           new.npz
    python -m tools.embed new.fa --init out/findna/last.pt --per_base

--per_base adds per_base (bases, C) of all sequences in one array: that of sequence i is
per_base[offsets[i]:offsets[i + 1]]. With k-mers, a base has the mean of the k-mers that cover it.
"""
import argparse
import signal
import sys

import numpy as np
import torch

import finetune
import training
from tools.predict import add_flags, new_file, open_model, read_blocks, read_sequences


@torch.no_grad()
def per_base(net, rows, micro_batch_size):
    """Embedding of every base of rows (bases, C): the mean of the hidden states that cover it."""
    total, lengths = torch.zeros(len(rows.bases), net.out.in_features), np.diff(rows.offsets)
    count = torch.zeros(len(rows.bases), 1)
    for index in finetune.pieces(net, np.arange(len(lengths)), lengths, micro_batch_size):
        states, covered = net.per_base(rows, index)          # (N, C), (N, width)
        for at in covered.T:
            total.index_add_(0, at, states)
            count.index_add_(0, at, torch.ones(len(at), 1))
    return (total / count.clamp(min=1)).numpy()


def embed(model, args):
    """Writes ids and embeddings of all sequences; with --per_base those of all bases, and their offsets."""
    if not model.net.BODY:
        raise ValueError(f"--init {args.init}: a CNN has no embeddings; use a pretrained network")
    ids, embeddings, bases, offsets = [], [], [], [np.zeros(1, np.int64)]
    with new_file(args.out, args.file, ".npz") as f:
        for names, rows in read_blocks(read_sequences(args.file, args.window, args.step)):
            ids += names
            embeddings.append(model.embed(rows))
            if args.per_base:
                rows = finetune.on_device(rows, model.device)
                bases.append(per_base(model.net, rows, args.micro_batch_size))
                offsets.append(rows.offsets[1:] + offsets[-1][-1])
        arrays = {"ids": np.array(ids), "embeddings": np.concatenate(embeddings)}
        if args.per_base:
            arrays |= {"per_base": np.concatenate(bases), "offsets": np.concatenate(offsets)}
        np.savez(f, **arrays)
    print(", ".join(f"{name} {array.shape}" for name, array in arrays.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = add_flags(parser)
    add("--pool", choices=("mean", "cls", "both"), default="mean", help="mean, [CLS] or both (%(default)s)")
    add("--per_base", action="store_true", help="also the embedding of each base")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves no half-written file
    with training.user_errors():
        args = parser.parse_args()
        embed(open_model(args, pool=args.pool), args)
