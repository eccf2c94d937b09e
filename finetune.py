"""Fine-tune, probe and score a pretrained model: every downstream task of the papers, or your own table.

    python finetune.py --demo                                         no data; after randommask.py --demo
    python finetune.py --task emp --init out/randommask/last.pt       a group, by the RandomMask protocol
    python finetune.py --task pd/tata --init hf:data/DNA_bert_6 random cnn kmer     what does pretraining add?
    torchrun --nproc_per_node 8 finetune.py --task gue28 --seeds 5    8 GPUs share the runs
    python finetune.py --csv my.csv --init out/randommask/last.pt     your table: columns sequence, label

The same command continues a sweep and skips finished runs. Afterwards: python -m tools.table, tools.predict,
tools.embed, tools.mutagenesis, tools.export. From Python:
model = finetune.load_model("out/finetune/csv_my/randommask.pt"), then model.predict(["ACGT..."]) and
model.embed(["ACGT..."], layer=-1); model.score(["ACGT..."]) for a pretrained BERT.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))                # python -I leaves it out
import training                                              # first: it answers Ctrl-C in the slow imports
from training import file_name, folder_name, number

import argparse
import contextlib
import dataclasses
import datetime
import fcntl
import functools
import hashlib
import itertools
import json
import math
import re
import signal
import time
import warnings
from collections import Counter, namedtuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from scipy import special, stats
from sklearn import linear_model, metrics, multiclass, pipeline, preprocessing
from tqdm import tqdm

import data
import models

BETAS, EPS = (0.9, 0.999), 1e-8                              # AdamW: DNABERT-2, Liang et al., GeneMask
SORTED = 50                                                  # batches sorted by length together; ours
FAR = 1e15                                                   # sd: the square of a target has to fit float32

# warmup: an int counts steps, a float is a share of them; eval_every 0: once an epoch; select: which weights
# are tested, by score or loss on dev, or the last ones (no dev); val: share of train that becomes dev where
# there is none; dropout None: the model's own
BASE = dict(batch_size=32, lr=3e-5, weight_decay=0.01, epochs=10, max_steps=0, warmup=0.1, schedule="linear",
            grad_clip=1.0, eval_every=0, select="score", patience=0, val=0.1, dropout=None, seeds=1)
# DNABERT-2's run_dnabert1.sh: epochs, warm-up steps, evaluation interval; best dev loss
DNABERT2 = {group: dict(epochs=epochs, warmup=warmup, eval_every=every) for group, epochs, warmup, every in (
    ("emp", 3, 50, 200), ("cpd", 4, 50, 400), ("cpd/tata", 10, 50, 200), ("pd", 4, 50, 400),
    ("pd/tata", 10, 50, 200), ("ssp", 5, 50, 200), ("covid", 9, 50, 200), ("tf_m", 5, 30, 200),
    ("tf_h", 3, 30, 200))}
DNABERT2["tf_m"]["max_steps"] = 1000                         # replaces the epochs there
LIANG = {"emp": dict(epochs=100), "tf_m": dict(epochs=10), "tf_h": dict(epochs=10), "cpd": dict(epochs=10),
         "pd": dict(epochs=5), "ssp": dict(epochs=10), "eap": dict(epochs=10, batch_size=64)}
PROTOCOLS = {                                                # name: (numbers, changes for a group or task)
    # Liang et al. Table 4; unstated, so DNABERT-2's: warm-up, decay, clipping; choice by dev score: ours
    "randommask": (BASE | dict(weight_decay=0.0, warmup=50), LIANG),
    # Their Table 5, for Nucleotide Transformer: another lr, but for EMP
    "nt": (BASE | dict(weight_decay=0.0, warmup=50, lr=1e-4), LIANG | {"emp": dict(epochs=100, lr=3e-5)}),
    "dnabert2": (BASE | dict(select="loss"), DNABERT2),
    "cmgems": (BASE | dict(select="loss"), DNABERT2),        # Roy et al.: the same; 2 GPUs x 8 x 2 = 32
    # GeneMask Script-B: no dev set, the last epoch is tested; by shots, see get_protocol; ten draws
    "fewshot": (BASE | dict(select="last", dropout=0.1, seeds=10), {}),
    # Yu et al. 4.3, 4.4: five runs, 30 % warm-up, cosine; clipping, MTcDNA, decay of EMP, covid: their code
    "findna": (BASE | dict(warmup=0.3, schedule="cosine", grad_clip=0.5, seeds=5), {
        "gb": dict(batch_size=1024, lr=0.01, weight_decay=0.1, epochs=50),
        "emp": dict(lr=5e-4, weight_decay=0.1, epochs=20, dropout=0.1),
        "covid": dict(batch_size=256, lr=1e-3, weight_decay=0.01, epochs=100, dropout=0.1),
        "mtcdna": dict(batch_size=16, lr=1e-4, weight_decay=0.1, warmup=0.2, epochs=50, dropout=0.1),
        "mtcdna/1024": dict(epochs=80)}),
    # Martinek et al.: early stopping on validation loss, 5 repeats; its size, patience, the rest: ours
    "martinek": (BASE | dict(batch_size=48, weight_decay=0.1, lr=2e-4, select="loss", patience=3, seeds=5),
                 {}),
    "strict": (BASE, {})}                                    # ours: dev from train, test once, MCC
# Where linear models (probe, 5-mer baseline) repeat: each run leaves out another share `val` of train
LINEAR = {"findna": dict(val=0.1)}                           # Yu et al., Table 1: five runs
# Adam of both CNNs: Klimentova et al., GenomicBenchmarks
CNN = dict(batch_size=32, lr=1e-3, weight_decay=0.0, warmup=0, schedule="constant", grad_clip=1e9)
DEFAULT_PROTOCOL = {"GUE": "randommask", "DeepSTARR": "randommask", "GenomicBenchmarks": "martinek",
                    "MTcDNA": "findna", "few-shot": "fewshot"}                         # others: strict
SCHEDULES = {"linear": training.linear, "cosine": training.cosine, "constant": lambda *_: 1.0}
FLAGS = ("batch_size", "lr", "weight_decay", "epochs", "warmup", "dropout")            # override a protocol
DEMO = dict(task=["demo"], k=3, block_size=34, n_layer=2, n_head=4, n_embd=64, lr=[1e-3], epochs=[4])

# A row of results.jsonl: how its line begins, what it must hold
HALF = b'{"id": "'
ROW = {"id": str, "task": str, "shots": int | None, "seed": int, "init": str, "weights": str, "data": str,
       "mode": str, "pool": str | None, "protocol": str, "overrides": dict, "long": str, "stride": int | None,
       "metric": str, "score": float | int | None, "collapsed": bool, "test": dict}

# One run of the plan (flags: what replaces numbers of the protocol); what --init gives (spec and weights, or
# None; its name and the digest of the weights)
Plan = namedtuple("Plan", "name shots repeat init protocol flags")
Start = namedtuple("Start", "spec weights name digest")
OWN_METRICS = {"classes": ["mcc", "acc", "balanced_acc", "f1_macro", "f1_binary", "auroc", "auprc"],
               "targets": ["pcc", "spearman"], "labels": ["auroc", "auprc", "f1_macro"]}      # of --tasks


def get_protocol(name, task, shots, kind, flags):
    """Returns a protocol's numbers for a task; later ones win: its own, group, task, few-shot, CNN, flags."""
    p, changes = PROTOCOLS[name]
    if task in data.TASKS:                                   # not one of --tasks that is named like a group
        p = p | changes.get(task.split("/")[0], {}) | changes.get(task, {})
    if name == "fewshot":                                    # GeneMask Script-B
        p |= dict(batch_size=5, lr=1e-4, epochs=20) if (shots or 0) <= 100 else \
            dict(batch_size=15, lr=5e-5, epochs=5)
    if "epochs" in flags:
        p |= {"max_steps": 0}
    return p | (CNN if kind in ("cnn", "penguinn") else {}) | flags


def main_metric(protocol, task):
    """Returns the metric of a task: its own or, for classes (but those of --tasks), the protocol's. Martinek
    et al. report F1 of the positive class (of more than two, macro F1); strict balances classes (MCC)."""
    if task.suite == "tasks" or task.regression or task.multilabel:            # tasks: stated by the user
        return task.metric
    if protocol == "martinek":
        return "f1_binary" if len(task.classes) == 2 else "f1_macro"
    return "mcc" if protocol == "strict" else task.metric


# Heads: each kind of network is one class, which owns its inputs, and one entry in HEADS. Its spec is stored
# with the weights and rebuilds it; spec[kind] holds the sizes of the pretrained part.
#   BODY                  attribute that takes the pretrained weights; None: trained from scratch only
#   FLAGS                 command-line flags that only this kind has, with their defaults
#   complete(spec, args, longest)   its part of a run's spec, given that of --init, the task's n_out and
#                         regression, and the bases of the longest training sequence
#   inputs(rows, index)   arguments of forward and embed for these sequences (bases already on the device)
#   forward(*inputs)      outputs (B, n_out), through the linear layer `out`
#   embed(*inputs, layer) one vector a sequence (B, C), pooled as spec["pool"] says; layer: as in models.py
#   per_base(rows, index, layer)  hidden states (N, C) and the bases that each one covers (N, width)
#   spread(x, rows, index)        the same of any x (windows, T, C) over the inputs of the network
#   READER                the Embedding of its tokens, or what reads one-hot bases, for gradients; or None
#   n_windows(lengths)    windows of each sequence, the unit of --micro_batch_size
#   micro_batch_size      windows of one sequence that are computed at a time
#   read(lengths)         (number of bases of each sequence that are read, k, stride of its k-mers)
#   count(lengths)        {what does not fit the network: number of sequences}

class BertHead(nn.Module):
    """A Bert with transformers' classification head on [CLS]: dense, tanh, dropout, linear.
    A sequence longer than block_size takes several windows, whose pooled vectors are averaged."""
    BODY, READER, FLAGS, micro_batch_size = "bert", "bert.tok_emb", {}, 128
    n_before = 1                                             # states before the first k-mer: [CLS]

    @staticmethod
    def body_spec(config, stride=1):
        return {"kind": "bert", "bert": dataclasses.asdict(config), "k": config.k, "stride": stride}

    @staticmethod
    def complete(spec, args, longest):
        return {name: spec[name] for name in ("bert", "k", "stride")}

    def __init__(self, spec):
        super().__init__()
        config = models.BertConfig(**spec["bert"])
        if config.k != spec["k"] or not 1 <= spec["stride"] <= config.k:
            raise ValueError(f"--stride {spec['stride']}: {config.k}-mers take a stride of 1 to {config.k}")
        C, self.p, self.n_layer = config.n_embd, config.dropout, config.n_layer
        self.spec, self.bert = spec, models.Bert(config)
        self.k, self.stride, self.room = config.k, spec["stride"], config.block_size - 2       # room: k-mers
        self.pooler, self.out = nn.Linear(C, C), models.Outputs(C, spec["n_out"])
        for layer in (self.pooler, self.out):                # as BERT's own layers
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def n_kmers(self, lengths):
        return np.maximum((lengths - self.k) // self.stride + 1, 0)

    def n_covered(self, n):
        """Returns the number of bases that n successive k-mers cover."""
        return np.where(n, (n - 1) * self.stride + self.k, 0)

    def windows(self, lengths):
        """Cuts sequences of these lengths into windows: owner (the sequence), first (base), n (k-mers).
        Each k-mer is in one window; long "truncate" keeps the first window only."""
        n, room = self.n_kmers(lengths), self.room
        n_windows = np.ones_like(n) if self.spec["long"] == "truncate" else np.maximum(-(-n // room), 1)
        owner, nth = data.members(n_windows)
        return owner, nth * room * self.stride, np.minimum(n[owner] - nth * room, room)

    def n_windows(self, lengths):
        return np.bincount(self.windows(lengths)[0])

    def read(self, lengths):
        n = self.n_kmers(lengths)
        n = np.minimum(n, self.room) if self.spec["long"] == "truncate" else n
        return self.n_covered(n), self.k, self.stride

    def count(self, lengths):
        name = "truncated" if self.spec["long"] == "truncate" else "in_windows"
        n = self.n_kmers(lengths)
        return {name: int((n > self.room).sum()), "shorter_than_k": int((n == 0).sum())}

    def tokens(self, bases, starts, n):
        """Returns n k-mers from each start: tokens (B, T), mask (B, T) or None where all n are equal, not 0.
        Otherwise T is a multiple of 32 (or block_size): few shapes and little padding (12 % of the tokens on
        the lengths of human_enhancers_ensembl; 18 % with 64)."""
        longest, alike, device = max(int(n.max()), 1), n.min() == n.max() > 0, bases.device
        T = longest if alike else min(-(-(longest + 2) // 32) * 32 - 2, self.room)
        starts, n = (data.to_device(x, device)[:, None] for x in (starts, n))
        at = starts + torch.arange((T - 1) * self.stride + self.k, device=device)
        tokens = data.kmer_tokens(bases[at.clamp_(max=len(bases) - 1)], self.k, self.stride, specials=True)
        if alike:
            return tokens, None
        at = torch.arange(T + 2, device=device)
        return tokens.masked_fill(at == n + 1, data.SEP).masked_fill(at > n + 1, data.PAD), at < n + 2

    def inputs(self, rows, index):
        """Returns tokens, mask, and the number of windows of each sequence (None: one window a sequence)."""
        if rows.first is not None:
            return self.pair_inputs(rows, index)
        owner, first, n = self.windows(data.lengths_of(rows, index))
        tokens, mask = self.tokens(rows.bases, rows.offsets[index][owner] + first, n)
        alone = len(owner) == len(index)
        return tokens, mask, None if alone else data.to_device(np.bincount(owner), tokens.device)

    def pair_kmers(self, rows, index):
        """Counts the k-mers of the two sequences of each pair, those that are read and all: (B, 2) each."""
        first, room = rows.first[index], self.room - 1       # for the second [SEP]
        n = self.n_kmers(np.stack([first, data.lengths_of(rows, index) - 1 - first], 1))
        n_long = int((n.sum(1) > room).sum())
        if n_long and self.spec["long"] == "chunk":
            raise ValueError(f"sequence_2: {n_long:,} pairs have more than {room} k-mers; cut the "
                             f"longer sequence by --long truncate, or give shorter ones")
        return np.minimum(n, np.maximum(room - n[:, ::-1], [room - room // 2, room // 2])), n

    def pair_inputs(self, rows, index):
        """Returns tokens [CLS] k-mers [SEP] k-mers [SEP], mask, None. All tokens are of type 0: no other is
        pretrained."""
        n, k, device = self.pair_kmers(rows, index)[0], self.k, rows.bases.device
        T = min(-(-(int(n.sum(1).max()) + 3) // 32) * 32, self.room + 2)
        a, end, start, second = (data.to_device(x, device)[:, None] for x in (
            n[:, 0] + 1, n.sum(1) + 2, rows.offsets[index], rows.offsets[index] + rows.first[index] + 1))
        at, kmer = (torch.arange(n, device=device) for n in (T, k))
        first = torch.where(at < a, start - self.stride, second - (a + 1) * self.stride)
        first = first + at * self.stride                     # base of each k-mer; [SEP] are at a and end
        bases = rows.bases[(first[..., None] + kmer).clamp_(0, len(rows.bases) - 1)].view(-1, k)
        tokens = data.kmer_tokens(bases, k, 1).view(first.shape).masked_fill(at == 0, data.CLS)
        tokens = tokens.masked_fill((at == a) | (at == end), data.SEP).masked_fill(at > end, data.PAD)
        return tokens, at <= end, None

    def states(self, tokens, mask, layer=None):
        return self.bert.encode(tokens, mask, layer=layer)   # (B, T, C)

    def read_window(self, tokens, mask):
        return torch.tanh(self.pooler(self.bert.encode(tokens, mask, first=1)[:, 0]))          # (B, C)

    def forward(self, *inputs):
        *windows, n_windows = inputs
        x = models.in_parts(self.read_window, self.micro_batch_size, *windows)
        x = models.over_windows(x.float(), n_windows)
        return self.out(F.dropout(x, self.p, self.training))

    def sums(self, tokens, mask, layer=None):
        """Sums and counts, for `pooled`, the states of the k-mers, or of the [CLS], by window."""
        return models.summed(self.spec["pool"], self.states(tokens, mask, layer), {
            "mean": (tokens == data.UNK) | (tokens > data.MASK), "cls": tokens == data.CLS})

    def embed(self, *inputs, layer=None):
        *windows, n_windows = inputs
        sums = functools.partial(self.sums, layer=layer)
        return models.pooled(*models.in_parts(sums, self.micro_batch_size, *windows), n_windows)

    def per_base(self, rows, index, layer=None):
        x = models.in_parts(lambda *windows: self.states(*windows, layer).float().cpu(),
                            self.micro_batch_size, *self.inputs(rows, index)[:2])
        return self.spread(x, rows, index)

    def spread(self, x, rows, index):
        owner, first, n = self.windows(data.lengths_of(rows, index))
        starts = rows.offsets[index][owner] + first
        return models.covered(x[:, self.n_before:], starts, n, self.k, self.stride)


class HfHead(nn.Module):
    """An encoder of transformers, and dense, tanh, dropout, linear on [CLS], or on the mean without a [CLS].
    Its own tokenizer reads the sequences; with a stride, they become overlapping k-mers of its vocabulary. A
    sequence of more tokens than positions takes several windows, whose pooled vectors are averaged."""
    BODY, READER, FLAGS, micro_batch_size = "hf", None, {}, 128
    forward, embed = BertHead.forward, BertHead.embed

    @staticmethod
    def complete(spec, args, longest):
        return {name: spec[name] for name in ("hf", "files", "stride")}

    def __init__(self, spec):
        super().__init__()
        self.spec, self.hf = spec, models.make_other(**spec["hf"])             # config, dropout
        self.tokenizer = models.make_tokenizer(spec["files"])
        facts = models.tokenizer_facts(self.hf, self.tokenizer, spec["stride"])
        self.first, self.last, self.k, self.room = facts
        self.has_cls = self.first[:1] == [self.tokenizer.cls_token_id]
        C, self.p = self.hf.config.hidden_size, getattr(self.hf.config, "hidden_dropout_prob", 0.0)
        self.n_layer = self.hf.config.num_hidden_layers
        self.pooler, self.out = nn.Linear(C, C), models.Outputs(C, spec["n_out"])
        self.tokenize = functools.partial(models.tokens_of, self.tokenizer, k=self.k, stride=spec["stride"])
        sample = data.decode(np.random.default_rng(0).integers(4, size=4096))
        self.bases_in_room = self.room * 4096 / self.tokenize(sample).shape[1]

    def windows(self, rows, index):
        """Returns the sequence of each window (n,), and for each window an array (3, <= room): the ids of its
        tokens, their first bases in rows and their widths."""
        lengths, owner, parts = data.lengths_of(rows, index), [], []
        bases = data.padded(rows, index, int(lengths.max()), 4).cpu().numpy()
        for i, length in enumerate(lengths):
            tokens = self.tokenize(data.decode(bases[i, :length]))
            tokens[1] += rows.offsets[index[i]]
            windows = np.split(tokens, range(self.room, tokens.shape[1], self.room), 1)
            parts += windows[:1] if self.spec["long"] == "truncate" else windows
            owner += [i] * (len(parts) - len(owner))
        return torch.tensor(owner), parts

    def n_windows(self, lengths):
        n = np.ceil(lengths / self.bases_in_room).astype(int)                  # about: as the letters are
        return np.ones_like(n) if self.spec["long"] == "truncate" else n

    def read(self, lengths):
        long = int(self.bases_in_room) if self.spec["long"] == "truncate" else lengths.max()
        return np.minimum(lengths, long), 1, 1

    def count(self, lengths):
        name = "truncated_about" if self.spec["long"] == "truncate" else "in_windows_about"
        return {name: int((lengths > self.bases_in_room).sum())}

    def inputs(self, rows, index):
        """Returns tokens, masks of those of the sequence and of all but padding (B, T each), and the windows
        of each sequence (None: one each)."""
        owner, parts = self.windows(rows, index)
        rows_of_ids = [[*self.first, *ids, *self.last] for ids, *_ in parts]
        n, at = torch.tensor(list(map(len, rows_of_ids)))[:, None], torch.arange(max(map(len, rows_of_ids)))
        pad = self.hf.config.pad_token_id or 0               # some count positions from it
        tokens = torch.full((len(parts), len(at)), pad)
        tokens[at < n] = torch.tensor(np.concatenate(rows_of_ids))
        real = (at >= len(self.first)) & (at < n - len(self.last))
        tensors = tokens, real, at < n, None if len(owner) == len(index) else owner.bincount()
        return tuple(x if x is None else data.to_device(x, rows.bases.device) for x in tensors)

    def states(self, tokens, mask, layer=None):
        found = self.hf(input_ids=tokens, attention_mask=mask.long(), output_hidden_states=layer is not None)
        return (found.last_hidden_state if layer is None else found.hidden_states[layer]).float()  # (B, T, C)

    def read_window(self, tokens, real, mask):
        x = self.states(tokens, mask)
        x = x[:, 0] if self.has_cls else models.pooled(*models.summed("mean", x, {"mean": real}))
        return torch.tanh(self.pooler(x))                    # (B, C)

    def sums(self, tokens, real, mask, layer=None):
        if self.spec["pool"] != "mean" and not self.has_cls:
            raise ValueError(f"--pool {self.spec['pool']}: its tokenizer adds no [CLS]; use --pool mean")
        first = torch.arange(tokens.shape[1], device=tokens.device) == 0
        return models.summed(self.spec["pool"], self.states(tokens, mask, layer), {
            "mean": real, "cls": first.expand_as(real)})

    def per_base(self, rows, index, layer=None):
        _, starts, widths = np.concatenate(self.windows(rows, index)[1], 1)
        tokens, real, mask, _ = self.inputs(rows, index)
        bases = np.repeat(starts - widths.cumsum() + widths, widths) + np.arange(widths.sum())
        x = models.in_parts(lambda *windows: self.states(*windows, layer).cpu(),
                            self.micro_batch_size, tokens, mask)
        x = x[real.cpu()].repeat_interleave(torch.from_numpy(widths), 0)
        return x, torch.from_numpy(bases)[:, None]


class MixerHead(nn.Module):
    """A ChordMixer or Encoder, and one or two layers on the mean over the bases, over the [CLS], or on both.
    A ChordMixer reads a sequence of any length. For an Encoder, one that is longer than its positions is cut
    into windows of equal length (to one base); the means are over all of them."""
    BODY, READER, micro_batch_size = "backbone", "backbone.proj", 128
    k, stride, n_before = 1, 1, 0
    FLAGS = {"pool": "mean", "head": "linear", "blocks": "all", "eval_network": None}
    per_base, spread = BertHead.per_base, BertHead.spread

    @staticmethod
    def complete(spec, args, longest):
        own = {"mixer": spec["mixer"], "n_cls": spec["n_cls"], "pool": args.pool, "head": args.head}
        if args.blocks == "all":
            return own | {"n_blocks": None}
        if "track_size" not in spec["mixer"]:
            raise ValueError("--blocks log2: a transformer has no such blocks; use another --init")
        longest += 0 if args.pool == "mean" else spec["n_cls"]
        return own | {"n_blocks": max(1, (longest - 1).bit_length())}    # as if made for the longest sequence

    def __init__(self, spec):
        super().__init__()
        self.spec, self.backbone = spec, models.make_backbone(spec["mixer"])
        self.n_layer = self.backbone.config.n_layer
        self.options = {"n_blocks": spec["n_blocks"]} if spec["n_blocks"] else {}
        C = self.backbone.config.n_embd
        width = 2 * C if spec["pool"] == "both" else C
        self.hidden = nn.Linear(width, C) if spec["head"] == "mlp" else None
        self.out = models.Outputs(width if self.hidden is None else C, spec["n_out"])

    @property
    def n_cls(self):
        """Returns the number of blank [CLS] behind the bases."""
        return 0 if self.spec["pool"] == "mean" else self.spec["n_cls"]

    @property
    def room(self):
        """Returns the number of bases that fit one window; None: any number."""
        return None if "track_size" in self.spec["mixer"] else self.spec["mixer"]["length"] - self.n_cls

    def windows(self, lengths):
        """Cuts sequences of these lengths into windows: owner (the sequence), first (base), n (bases)."""
        lengths = self.read(lengths)[0]
        n_windows = -(-lengths // (self.room or lengths.max()))
        owner, nth = data.members(n_windows)
        first, end = (at * lengths[owner] // n_windows[owner] for at in (nth, nth + 1))
        return owner, first, end - first

    def n_windows(self, lengths):
        """Counts the windows of each sequence; for a ChordMixer, the pretraining inputs that would hold its
        bases: the memory grows with these."""
        if self.room is None:
            return -(-lengths // self.spec["mixer"]["length"])
        return np.bincount(self.windows(lengths)[0])

    def read(self, lengths):
        room = self.room if self.spec["long"] == "truncate" else None
        return np.minimum(lengths, room or lengths.max()), 1, 1

    def count(self, lengths):
        if self.room is None:
            return {}
        name = "truncated" if self.spec["long"] == "truncate" else "in_windows"
        return {name: int((lengths > self.room).sum())}

    def inputs(self, rows, index):
        """Returns one-hot bases, [CLS] behind them (B, L, 5); lengths (B,), None where each sequence is one
        window and all are equal; windows a sequence, None where each is one. Where there are lengths, the
        bases take a multiple of 64, or an Encoder's room."""
        owner, first, n = self.windows(data.lengths_of(rows, index))
        longest, several = int(n.max()), len(owner) > len(index)
        alike = n.min() == longest and not several
        if not alike:
            longest = min(-(-longest // 64) * 64, self.room or math.inf)
        starts = rows.offsets[index][owner] + first
        bases = data.gathered(rows.bases, starts, n, longest + self.n_cls, data.BLANK)
        lengths, n_windows = (data.to_device(x, bases.device) for x in (n, np.bincount(owner)))
        return data.one_hot(bases), None if alike else lengths + self.n_cls, n_windows if several else None

    def states(self, one_hot, lengths=None, layer=None):
        return self.backbone(one_hot, lengths, layer=layer, **self.options)    # (B, L, C)

    def sums(self, one_hot, lengths, layer=None):
        """Sums and counts, for `pooled`, the states of the bases, or of the [CLS] behind them, by window."""
        x, ends = self.states(one_hot, lengths, layer), lengths[:, None]
        at = torch.arange(x.shape[1], device=x.device)
        return models.summed(self.spec["pool"], x, {"mean": at < ends - self.n_cls,
                                                    "cls": (at < ends) & (at >= ends - self.n_cls)})

    def embed(self, one_hot, lengths=None, n_windows=None, layer=None):
        if lengths is None:                                  # one window a sequence, all equally long
            x = self.states(one_hot, layer=layer)
            parts = dict(zip(("mean", "cls"), x.split([x.shape[1] - self.n_cls, self.n_cls], 1)))
            return models.concatenated(self.spec["pool"], lambda pool: parts[pool].float().mean(1))
        return BertHead.embed(self, one_hot, lengths, n_windows, layer=layer)

    def forward(self, one_hot, lengths=None, n_windows=None):
        x = self.embed(one_hot, lengths, n_windows)
        return self.out(x if self.hidden is None else F.gelu(self.hidden(x)))


class CnnHead(models.Cnn):
    """GenomicBenchmarks' CNN on the first `length` bases; shorter sequences are filled with N."""
    BODY, READER, FLAGS = None, "emb", {}

    @staticmethod
    def complete(spec, args, longest):
        return {"length": longest}

    def __init__(self, spec):
        super().__init__(spec["length"], spec["n_out"])
        self.spec = spec

    def n_windows(self, lengths):
        return np.ones_like(lengths)

    def read(self, lengths):
        return np.minimum(lengths, self.length), 1, 1

    def count(self, lengths):
        return {"truncated": int((lengths > self.length).sum())}

    def inputs(self, rows, index):
        return (data.padded(rows, index, self.length, 4),)

    def spread(self, x, rows, index):
        return models.covered(x, rows.offsets[index], np.minimum(data.lengths_of(rows, index), self.length))


class PenguinnHead(models.Penguinn):
    """Martinek et al.'s CNN, with the inputs of the other one."""
    BODY, READER, FLAGS = None, None, {}
    n_windows, read, count, inputs = CnnHead.n_windows, CnnHead.read, CnnHead.count, CnnHead.inputs

    @staticmethod
    def complete(spec, args, longest):
        is_classes = not (spec["regression"] or spec["multilabel"])
        return {"length": longest, "binary": spec["n_out"] == 2 and is_classes}

    def __init__(self, spec):
        super().__init__(spec["length"], spec["n_out"], spec["binary"])
        self.spec = spec


def is_size(x):
    return type(x) is int and x > 0


HEADS = {"bert": BertHead, "mixer": MixerHead, "cnn": CnnHead, "penguinn": PenguinnHead, "hf": HfHead}
# What the parts of a spec may be; models.py checks the sizes of the network
SPEC = {"kind": HEADS.__contains__, "n_out": is_size, "k": is_size, "length": is_size,
        "stride": lambda x: x is None or is_size(x), "n_blocks": lambda x: x is None or is_size(x),
        "n_cls": lambda x: x == 0 or is_size(x), "regression": lambda x: type(x) is bool,
        "classes": lambda x: type(x) in (list, tuple) and all(type(name) is str and name for name in x),
        "long": lambda x: x in ("chunk", "truncate"), "dtype": lambda x: x in training.DTYPES[1:],
        "pool": lambda x: x in ("mean", "cls", "both"), "head": lambda x: x in ("linear", "mlp"),
        "binary": lambda x: type(x) is bool, "multilabel": lambda x: type(x) is bool,
        "pairs": lambda x: type(x) is bool, "strands": lambda x: x in ("forward", "augment", "average")}
DEFAULTS = models.HOW | {"dtype": "float32", "n_out": 1, "pool": "mean", "head": "linear", "n_blocks": None,
                         "multilabel": False}                # may be left out


def build_net(spec, weights=None, seed=42):
    """Builds a spec's network: a fine-tuned one as saved, else a new head on pretrained or random weights."""
    training.seed(seed)
    net = HEADS[spec["kind"]](DEFAULTS | spec)
    if weights and "classes" in spec:
        net.load_state_dict(weights)
    elif weights:                                            # pretrained, or fine-tuned without the head
        getattr(net, net.BODY).load_state_dict({
            name.removeprefix(f"{net.BODY}."): tensor for name, tensor in weights.items()
            if not name.startswith(("pooler.", "hidden.", "out."))})
    return net


def check_spec(spec, weights):
    """Raises if a spec and its weights disagree; allocates nothing, whatever sizes the spec claims."""
    if spec.get(spec["kind"], {}).get("n_layer", 0) > len(weights):
        raise LookupError("more layers than weights")
    wrong = [name for name, value in spec.items() if name in SPEC and not SPEC[name](value)]
    if wrong:
        raise LookupError(f"{wrong[0]} is {spec[wrong[0]]!r:.20}")
    if "classes" in spec and (type(spec["regression"]) is not bool or len(spec["classes"]) != spec["n_out"]):
        raise LookupError("classes and outputs disagree")
    if len(set(spec.get("classes", ()))) < len(spec.get("classes", ())):
        raise LookupError("two classes of one name")
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        raise LookupError(f"NaN or inf in {broken[0]:.50}")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")                      # loading into meta tensors copies nothing
        build_net(spec, weights)


def choose_network(path, state):
    """Returns FinDNA's "teacher", or "student" if the teacher still has over 1 % of its initial weights."""
    if "teacher" not in state:
        return "student"
    steps, ema = state["args"].get("steps"), state["args"].get("ema", 0.996)
    if type(steps) is not int or type(ema) is not float or steps < 1 or not 0 <= ema <= 1:
        raise ValueError(f"--init {path}: steps {steps!r:.20}, ema {ema!r:.20} in its flags; use another one")
    done = min(state["step"], steps)                         # lambda rises from ema to 1 by half a cosine
    left = math.exp(-(1 - ema) / 2 * (done + steps / math.pi * math.sin(math.pi * done / steps)))
    if left <= 0.01:
        return "teacher"
    print(f"{path}: the teacher has {left:.1%} of its initial weights: using the student (--eval_network)")
    return "student"


def read_checkpoint(path, eval_network=None):
    """Reads a checkpoint of ours: (spec, weights). Of FinDNA's two networks it takes eval_network, else what
    choose_network returns."""
    state = training.load(path)
    spec, weights, method = state["config"], state["model"], state["method"]
    network = eval_network or choose_network(path, state)
    if method == "findna" and network not in ("student", *state):
        raise ValueError(f"--eval_network teacher: {path} was pretrained without one; use student")
    try:
        if method == "findna":
            weights = {name: t for name, t in state.get(network, weights).items() if "backbone" in name}
            spec = {"kind": "mixer", "mixer": spec, "n_cls": spec["length"] - state["args"]["length"]}
        elif method != "finetune":
            spec = BertHead.body_spec(models.BertConfig(**spec), state["args"].get("stride", 1))
        check_spec(spec, weights)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise ValueError(f"--init {path}: not a model of these scripts ({e!r:.80}); use another") from None
    return spec, weights


def read_network(init, eval_network=None):
    """Reads a checkpoint of ours, hf:FOLDER or findna:FILE: (spec, weights)."""
    if init.startswith("hf:"):
        return read_folder(init[3:])
    if not init.startswith("findna:"):
        return read_checkpoint(init, eval_network)
    config, weights = models.load_findna(init[7:], eval_network)
    weights = {name: tensor for name, tensor in weights.items() if name.startswith("backbone.")}
    return {"kind": "mixer", "mixer": config, "n_cls": 10}, weights


def read_folder(folder):
    """Reads a folder of transformers: (spec, weights). A BERT over k-mers becomes ours, no other does."""
    path = os.path.join(folder, "config.json")
    try:
        config = models.read_json(path)
        is_ours = models.is_kmer_bert(config)
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise ValueError(f"{path}: {str(e):.200}; give a folder with a model of transformers") from None
    if is_ours:
        bert, stride, outputs = models.read_hf(folder, needs_head=False)
        spec, weights = BertHead.body_spec(bert.config, stride), bert.state_dict()
        if outputs:                                          # a classifier
            own, classes, problem = outputs
            spec |= {"n_out": len(classes), "classes": classes, "regression": problem == "regression",
                     "multilabel": problem == "multi_label_classification"}
            spec |= {name: config.get(name, plain) for name, plain in models.HOW.items()}
            weights = {f"bert.{name}": tensor for name, tensor in weights.items()} | own
    else:
        config, files, weights = models.load_other(folder)
        spec = {"kind": "hf", "hf": {"config": config}, "files": files, "stride": None}
    try:
        check_spec(spec, weights)
    except (LookupError, RuntimeError, TypeError, ValueError) as e:
        raise ValueError(f"{folder}: {str(e).splitlines()[-1].strip():.250}; give another folder") from None
    return spec, weights


def read_start(init, args):
    """Turns an --init into a Start. ValueError for what cannot be trained."""
    spec, weights, name = {"kind": init}, None, init
    if init == "random":
        spec = BertHead.body_spec(models.BertConfig(4 ** args.k + 5, args.block_size, args.n_layer,
                                                    args.n_head, args.n_embd, 4 * args.n_embd, 0.1))
        name = f"random {args.n_layer}x{args.n_embd} h{args.n_head} k{args.k}"
    elif init.startswith("random:"):                         # the architecture of a checkpoint, no weights
        spec, _ = read_network(init[7:], args.eval_network)
    elif init not in ("cnn", "penguinn", "kmer"):
        spec, weights = read_network(init, args.eval_network)
    if args.stride:
        spec["stride"] = args.stride
    if spec["kind"] in HEADS and not HEADS[spec["kind"]].BODY and (weights or args.mode == "probe"):
        advice = "drop it" if args.mode == "probe" else f"use --init {spec['kind']}"
        raise ValueError(f"--init {init}: a CNN is trained from scratch, never probed or continued; {advice}")
    digest = hashlib.sha256()
    for tensor in (weights or {}).values():
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return Start(spec, weights, name, digest.hexdigest()[:12])


def check_pairs(spec, rows):
    """Raises ValueError for pairs that the network cannot read, or single sequences where it wants pairs."""
    pairs = rows.first is not None
    if pairs and spec["kind"] not in ("bert", "kmer"):
        raise ValueError(f"sequence_2: a network of the kind {spec['kind']} reads no pairs; use a BERT "
                         f"over k-mers, or --init kmer")
    if "classes" in spec and pairs != spec["pairs"]:
        was = ("single sequences; give no pairs", "pairs of sequences (sequence, sequence_2); give these")
        raise ValueError(f"the model was fine-tuned on {was[spec['pairs']]}")


def count_unfit(net, rows):
    """Counts the sequences, or pairs, that do not fit the network: {what does not fit: their number}."""
    if rows.first is None:
        return net.count(np.diff(rows.offsets))
    kept, n = net.pair_kmers(rows, np.arange(len(rows.first)))
    return {"truncated": int((kept < n).any(1).sum()), "shorter_than_k": int((n == 0).any(1).sum())}


def n_bases(net, rows):
    """Counts the A, C, G and T that the network reads of each sequence; if 0, its outputs mean nothing."""
    if net is None:                                          # the 5-mer baseline
        return data.bases_read(rows, np.diff(rows.offsets), data.KMER)
    check_pairs(net.spec, rows)
    if rows.first is None:
        return data.bases_read(rows, *net.read(np.diff(rows.offsets)))
    lengths = net.n_covered(net.pair_kmers(rows, np.arange(len(rows.first)))[0])
    lengths, parts = np.insert(lengths, 1, 0, axis=1).ravel(), rows._replace(offsets=data.halves(rows))
    return data.bases_read(parts, lengths, net.k, net.stride).reshape(-1, 3).sum(1)


def pieces(net, index, lengths, micro_batch_size):
    """Splits an index array so that a forward pass has at most so many windows. A sequence that has more
    stays whole here; `in_parts` splits it."""
    net.micro_batch_size = micro_batch_size
    cuts, full = [], 0
    for i, n in enumerate(net.n_windows(lengths[index]).tolist()):
        if full and full + n > micro_batch_size:
            cuts.append(i)
            full = 0
        full += n
    return np.split(index, cuts)


@torch.no_grad()
def apply(net, rows, micro_batch_size, function=None):
    """Returns the outputs of the network, or of a function of its inputs (net.embed), in the order of rows:
    float32; means over both strands if the spec says average. Sequences of similar length share a forward
    pass. InterruptedError after a stop signal."""
    check_pairs(net.spec, rows)
    average = net.spec["strands"] == "average"
    rows = data.both_strands(rows) if average else rows
    function, lengths = function or net, np.diff(rows.offsets)
    order = np.argsort(lengths, kind="stable")
    with training.autocast(rows.bases.device, net.spec["dtype"]):
        parts = [function(*net.inputs(rows, index)).float()
                 for index in training.until_stopped(pieces(net, order, lengths, micro_batch_size))]
    outputs = torch.cat(parts).cpu().numpy()[np.argsort(order)]
    return data.mean_of_strands(outputs) if average else outputs


class Model:
    """A trained network for use from Python: sequences are a list of strings, or Rows."""
    micro_batch_size = 128

    def __init__(self, init, net, device):
        self.init, self.net, self.device = init, net.to(device).eval(), device
        self.pool = net.spec["pool"]                         # with which a head was trained

    def classes(self):
        """Returns the names of the outputs; ValueError if the model is not fine-tuned."""
        if "classes" not in self.net.spec:
            raise ValueError(f"--init {self.init}: not fine-tuned; make a classifier with finetune.py")
        names = self.net.spec["classes"]
        for name in names:                                   # they become cells of a table
            if re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", name):
                raise ValueError(f"--init {self.init}: a control character in the class {data.quoted(name)}; "
                                 f"rename it and train again")
        return names

    def apply(self, sequences, function=None, empty=False):
        rows = data.as_rows(sequences)
        outputs = apply(self.net, data.on_device(rows, self.device), self.micro_batch_size, function)
        if not empty:
            outputs[n_bases(self.net, rows) == 0] = math.nan
        return outputs

    def at_layer(self, layer):
        """Returns {"layer": n} for the n layers up to this one, counted as in `embed`; {} for all of them."""
        if not self.net.BODY:
            raise ValueError(f"--init {self.init}: a CNN has no embeddings; use a pretrained network")
        last = self.net.n_layer
        if not -last - 1 <= layer <= last:
            raise ValueError(f"--layer {layer}: {self.init} takes 0 (the input embeddings) to {last} (the "
                             f"last layer), or -1 to {-last - 1}, from the end")
        return {} if layer in (-1, last) else {"layer": layer % (last + 1)}

    def embed(self, sequences, layer=-1):
        """Returns one vector a sequence, (n, C); NaN where the network reads no base (shorter than k, all N).
        layer: 0 is the input embeddings, 1 the first layer, -1 the last one, -2 the one before."""
        layer = self.at_layer(layer)                         # a CNN is refused here
        return self.apply(sequences, functools.partial(self.net.embed, **layer))

    def score(self, sequences):
        """Scores how likely a pretrained BERT finds each sequence: (n,) in nats a base; -1.386: pure chance.
        The pseudo-log-likelihood: the mean of log P(base | all other bases). A base is hidden by masking all
        k-mers over it; a pass masks about 15 % of them. ValueError for a classifier, which has `predict`."""
        net = self.net
        if net.BODY != "bert" or "classes" in net.spec or not net.bert.ln_head.weight.any():
            raise ValueError(f"--init {self.init}: no masked-LM head to score with; give a BERT as "
                             f"randommask.py or cm_gems.py pretrains it (a classifier has predict)")
        rows = data.as_rows(sequences)
        if rows.first is not None:
            raise ValueError("score takes single sequences, not pairs; score each by itself")
        log_p = functools.partial(models.log_p, net.bert, stride=net.stride)
        return self.apply(rows, lambda tokens, mask, n_windows: models.pooled(
            *models.in_parts(log_p, self.micro_batch_size, tokens, mask), n_windows))[:, 0]

    def predict(self, sequences, empty=False):
        """Returns probabilities of classes or labels, or the values of a regression: (n, number of outputs).
        NaN where the network reads no base, unless empty=True."""
        self.classes()                                       # is it fine-tuned?
        if self.net.BODY == "backbone" and self.net.spec["pool"] != self.pool:
            raise ValueError(f"pool={self.net.spec['pool']!r}: {self.init} was fine-tuned with "
                             f"{self.pool!r}; load it without pool= to predict")
        outputs = self.apply(sequences, empty=empty)
        if self.net.spec["multilabel"]:
            return special.expit(outputs)
        return outputs if self.net.spec["regression"] else special.softmax(outputs, 1)


def load_model(init, device="cpu", eval_network=None, pool=None, **changes):
    """Loads a Model from a checkpoint, hf:FOLDER or findna:FILE. changes, where not None: pool, long, stride,
    dtype, strands ("average": means over both strands)."""
    init = os.fspath(init)
    spec, weights = read_network(init, eval_network)
    if eval_network and (spec["kind"] != "mixer" or "classes" in spec):
        raise ValueError(f"--eval_network {eval_network}: {init} has one network; drop it")
    readers = {"stride": ("bert", "hf"), "long": ("bert", "hf", "mixer")}      # of k-mers, of windows
    changes = {name: value for name, value in {"dtype": "float32", **changes}.items() if value is not None}
    for name, value in (changes | ({"pool": pool} if pool else {})).items():
        if name not in ("pool", "long", "stride", "dtype", "strands") or not SPEC[name](value):
            raise ValueError(f"{name}={value!r:.20}: no such option or value; see the flags of tools.embed")
        if spec["kind"] not in readers.get(name, HEADS):
            raise ValueError(f"--{name}: not for a network of the kind {spec['kind']}; drop it")
    spec |= changes
    model = Model(init, build_net(spec, weights), device)
    model.net.spec["pool"] = pool or model.pool              # a trained head keeps its width
    return model


def scores(outputs, labels, task):
    """Returns {metric: value} of outputs (n, n_out) and labels; None where undefined (PCC of a constant, MCC
    where all labels are one class). ArithmeticError when an output is not finite."""
    if not np.isfinite(outputs).all():
        raise ArithmeticError(f"{task.name}: the outputs are not finite; lower --lr")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                      # constant predictions: None, and flagged
        row = regression_scores(outputs, labels, task.classes) if task.regression else \
            label_scores(outputs, labels, task.classes) if task.multilabel else \
            class_scores(outputs, labels, len(task.classes))
    return {name: float(value) if math.isfinite(value) else None for name, value in row.items()}


def vary(labels):
    """Tells whether any rows differ in their labels or targets."""
    return bool((labels != labels[0]).any())


def regression_scores(outputs, labels, names):
    pcc, rho = ([correlation(x, y)[0] if len(x) > 1 else math.nan for x, y in zip(outputs.T, labels.T)]
                for correlation in (stats.pearsonr, stats.spearmanr))
    row = {"pcc": np.mean(pcc), "spearman": np.mean(rho), "mse": np.mean((outputs - labels) ** 2)}
    return row | ({f"pcc_{name}": value for name, value in zip(names, pcc)} if len(pcc) > 1 else {})


def label_scores(outputs, labels, names):
    """Returns AUROC and AUPRC of each label; the means of these and of F1 at p = 0.5 over the labels that
    have both values; accuracy at p = 0.5."""
    found = {"auroc": metrics.roc_auc_score, "auprc": metrics.average_precision_score,
             "f1": lambda y, x: metrics.f1_score(y, x > 0)}
    found = {metric: [score(y, x) if vary(y) else math.nan for x, y in zip(outputs.T, labels.T)]
             for metric, score in found.items()}
    row = {metric: np.nanmean(values) for metric, values in found.items()}
    row |= {"f1_macro": row.pop("f1"), "acc": np.mean((outputs > 0) == labels)}
    return row | {f"{metric}_{name}": x for metric in ("auroc", "auprc")
                  for name, x in zip(names, found[metric])}


def class_scores(outputs, labels, n_classes):
    predicted = outputs.argmax(1)
    row = {"mcc": metrics.matthews_corrcoef(labels, predicted) if vary(labels) else math.nan,
           "acc": metrics.accuracy_score(labels, predicted),
           "f1_macro": metrics.f1_score(labels, predicted, average="macro"),
           "balanced_acc": metrics.balanced_accuracy_score(labels, predicted)}
    if n_classes == 2:
        row |= {"f1_binary": metrics.f1_score(labels, predicted, zero_division=math.nan),
                "auroc": metrics.roc_auc_score(labels, outputs[:, 1] - outputs[:, 0])}
    known = labels[:, None] == np.arange(n_classes)          # AUPRC of class 1; of more classes, the mean
    log_odds = np.stack([x - special.logsumexp(np.delete(outputs, i, 1).astype(float), 1)        # p has ties
                         for i, x in enumerate(outputs.T)], 1)
    auprc = [metrics.average_precision_score(known[:, i], log_odds[:, i]) if vary(known[:, i]) else math.nan
             for i in ([1] if n_classes == 2 else range(n_classes))]
    return row | {"auprc": np.mean(auprc)}


def epoch_batches(lengths, batch_size, seed, epoch):
    """Draws an epoch's batches from (seed, epoch): index arrays, shuffled, sorted by length within parts."""
    rng = np.random.default_rng((seed, epoch))
    order, batches = rng.permutation(len(lengths)), []
    for part in np.split(order, range(SORTED * batch_size, len(order), SORTED * batch_size)):
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += np.split(part, range(batch_size, len(part), batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]


def fit_linear(train, labels, test, task, class_weights=None):
    """Fits scikit-learn's logistic regression (regression: ridge) to standardised features; returns outputs
    on test."""
    model = linear_model.RidgeCV(np.logspace(-1, 5, 7)) if task.regression else \
        linear_model.LogisticRegression(max_iter=1000, C=0.01, class_weight=class_weights)
    model = multiclass.OneVsRestClassifier(model) if task.multilabel else model
    mean = labels.mean(0) if task.regression else 0          # apart, as float32 features give float32 outputs
    model = pipeline.make_pipeline(preprocessing.StandardScaler(), model).fit(train, labels - mean)
    if task.regression:
        return mean + model.predict(test).reshape(len(test), -1)
    outputs = model.decision_function(test)
    if task.multilabel:
        return outputs.reshape(len(test), -1)
    return outputs if outputs.ndim > 1 else np.stack([-outputs, outputs], 1) / 2


def linear_outputs(net, parts, task, args, device):
    """Returns outputs on test of a linear model on embeddings (probe) or, without a network, on k-mer counts.
    --strands augment fits it on both strands of train; with average, its features are means over both."""
    train = data.both_strands(parts["train"]) if args.strands == "augment" else parts["train"]

    def features(rows):
        if net is not None:
            return apply(net.eval(), data.on_device(rows, device), args.micro_batch_size, net.embed)
        if args.strands == "average":
            return data.mean_of_strands(data.kmer_counts(data.both_strands(rows)))
        return data.kmer_counts(rows)
    return fit_linear(features(train), train.labels, features(parts["test"]), task, args.class_weights)


def balanced_weights(labels, n_out):
    """Returns weights that give equal shares to classes (n_out,), or to 0 and 1 of each label (2, n_out)."""
    counts = torch.stack([(~labels).sum(0), labels.sum(0)]) if labels.dtype == torch.bool else \
        labels.bincount(minlength=n_out)
    return len(labels) / (len(counts) * counts.clamp(min=1).float())


def loss_of(outputs, labels, reduction, weights=None):
    """Returns the cross-entropy of class ids, the binary cross-entropy of labels, or the mean squared error
    of float targets."""
    if labels.dtype == torch.int64:
        return F.cross_entropy(outputs, labels, weights, reduction=reduction)
    share = labels.shape[1] if reduction == "sum" else 1
    if labels.dtype == torch.bool:
        weights = weights if weights is None else torch.where(labels, weights[1], weights[0])
        loss = F.binary_cross_entropy_with_logits(outputs, labels.float(), weights, reduction=reduction)
        return loss / share
    return F.mse_loss(outputs, labels, reduction=reduction) / share


def train_batch(net, rows, index, micro_batch_size, scaler=torch.amp.GradScaler(enabled=False), weights=None):
    """Runs a batch of rows, with their labels on the device, forward and backward in pieces; returns (loss
    sum, number of sequences) on the device."""
    total, lengths, device = 0, np.diff(rows.offsets), rows.bases.device
    for piece in pieces(net, index, lengths, micro_batch_size):
        with training.autocast(device, net.spec["dtype"]):
            outputs = net(*net.inputs(rows, piece))
        loss = loss_of(outputs.float(), rows.labels[data.to_device(piece, device)], "sum", weights)
        scaler.scale(loss / len(index)).backward()
        total += torch.stack([loss.detach(), loss.new_full((), len(piece))])   # new_tensor would sync a GPU
    return total


def take_step(trained, scaler, clip):
    """Clips the gradients and updates the weights; in float16 skips and counts steps that overflowed."""
    optimizer, total = trained["optimizer"], trained["total"]
    scaler.unscale_(optimizer)
    norm = training.scale_gradients(trained["model"], total.new_ones(()), clip)
    if scaler.is_enabled():
        trained["skipped"] += 1 - norm.isfinite().float()
    else:
        total[0] += 0 * norm                                 # stays NaN once a norm is not finite
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def evaluate(net, dev, task, micro_batch_size, weights=None):
    """Returns the scores on dev and the "loss" there (with the weights of --class_weights)."""
    net.eval()
    outputs = apply(net, dev, micro_batch_size)
    net.train()
    weights = weights if weights is None else weights.cpu()
    loss = loss_of(torch.from_numpy(outputs), torch.from_numpy(dev.labels), "mean", weights).item()
    return {"loss": loss} | scores(outputs, dev.labels, task)


def keep_best(best, net, step, found, key):
    """Keeps in best the weights of the best score (None: undefined), or loss, so far; returns log columns."""
    value = -found["loss"] if key["numbers"]["select"] == "loss" else found[key["metric"]]
    best["worse"] += 1                                       # evaluations since the best one
    if not best["weights"] or value is not None and value > best["value"]:
        weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        best |= {"value": -math.inf if value is None else value, "step": step, "worse": 0, "scores": found,
                 "weights": weights}
    return {"dev_loss": found["loss"], f"dev_{key['metric']}": found[key["metric"]]}


def get_schedule(p, n_train):
    """Returns (steps, steps of an epoch, steps of warm-up) for so many training sequences."""
    per_epoch = math.ceil(n_train / p["batch_size"])
    steps = p["max_steps"] or per_epoch * p["epochs"]
    warmup = p["warmup"] if type(p["warmup"]) is int else round(p["warmup"] * steps)
    return steps, per_epoch, min(warmup, steps)


def resume(folder, run, **parts):
    """Puts the checkpoint in folder, if any, into parts; returns (steps done, the best evaluation so far)."""
    best = {"value": -math.inf, "step": 0, "worse": 0, "weights": {}, "scores": {}}
    if not training.has_checkpoint(folder):
        return 0, best
    state = training.load_run(folder, run, **parts)
    if not isinstance(state.get("best"), dict) or state["best"].keys() != best.keys():
        raise ValueError(f"{folder}: its checkpoint lacks the best evaluation; remove the folder")
    return state["step"], state["best"]


def mean_loss(total, task, step):
    """Returns the mean loss from total (loss sum, sequences); ArithmeticError when it is not finite."""
    loss, n = total.tolist()
    if not math.isfinite(loss):
        raise ArithmeticError(f"{task}: the loss is not finite before step {step}; lower --lr")
    return loss / n


def fine_tune(net, parts, task, run, folder, args):
    """Trains net, leaves in it the weights that the protocol selects, and returns what happened.
    Resumes from folder's checkpoint as if never stopped; at a stop signal it saves, and exits with 143."""
    key, p, train, dev = run["args"], run["args"]["numbers"], parts["train"], parts["dev"]
    lengths = np.diff(train.offsets)
    n = len(lengths) // (1 if net.spec["strands"] == "forward" else 2)         # else train holds both strands
    weights = balanced_weights(train.labels, len(task.classes)) if args.class_weights else None
    steps, per_epoch, warmup = get_schedule(p, n)
    optimizer = training.make_optimizer(net, p["lr"], p["weight_decay"], BETAS, EPS)
    total, batches = train.labels.new_zeros(2, dtype=torch.float32), None      # loss sum, sequences
    scaler = training.make_scaler(total.device, net.spec["dtype"])
    trained = {"model": net, "optimizer": optimizer, "total": total}
    trained |= {"scaler": scaler, "skipped": total.new_zeros(())} if scaler.is_enabled() else {}
    first, best = resume(folder, run, **trained)
    every, done, saved = p["eval_every"] or per_epoch, first, time.monotonic()
    lock = training.open_run(folder, args, done - bool(total[1]))              # noqa: F841, held until the end
    bar = tqdm(initial=done, total=steps, unit="step", disable=not sys.stderr.isatty())
    while True:
        with contextlib.suppress(InterruptedError):          # then total still says that this is to be done
            if (done % every == 0 or done == steps) and total[1]:
                row = {"step": done, "epoch": done / per_epoch, "loss": mean_loss(total, key["task"], done)}
                if dev:
                    found = evaluate(net, dev, task, args.micro_batch_size, weights)
                    row |= keep_best(best, net, done, found, key)
                total.zero_()
                row |= {"skipped": int(trained["skipped"])} if "skipped" in trained else {}
                training.log(folder, row)
        stop = training.stop_requested()
        if done > first and (stop or 0 < 60 * args.save_every < time.monotonic() - saved):
            training.save(run | {"step": done, "best": best} | training.states(trained), folder)
            saved = time.monotonic()
        if stop:
            print(f"stopped  by a signal after step {done}; the same command continues there", flush=True)
            raise SystemExit(143)
        if done == steps or p["patience"] and best["worse"] >= p["patience"]:
            break
        epoch, i = divmod(done, per_epoch)
        if i == 0 or batches is None:
            batches = epoch_batches(lengths[:n], p["batch_size"], key["seed"], epoch)
        done += 1
        training.seed(key["seed"], done)
        training.set_lr(optimizer, p["lr"] * SCHEDULES[p["schedule"]](done, steps, warmup))
        index = batches[i] if n == len(lengths) else data.random_strands(batches[i], n, key["seed"], done)
        total += train_batch(net, train, index, args.micro_batch_size, scaler, weights)
        take_step(trained, scaler, p["grad_clip"])
        bar.update()
    if dev:
        net.load_state_dict(best["weights"])
    return {"steps": done, "epochs": done / per_epoch, "dev": best["scores"],
            "tested_step": best["step"] or done}


def labels_split(args):
    """Tells whether, by the flags, the column `split` of --csv holds labels or targets."""
    columns = args.targets or args.multilabel or [data.column_flags(args)["label"] or ""]
    return "split" in map(str.lower, columns)


def read_user_csv(args):
    """Reads --csv: (Task, splits). One table is split, two are train and test, three train, dev and test."""
    first, *others = args.csv
    if len(others) > 2:
        raise ValueError(f"--csv: {len(args.csv)} tables; give one, train and test, or train, dev and test")
    columns, multilabel = args.targets or args.multilabel or (), bool(args.multilabel)
    names = {name.lower() for name in columns}
    if len(names) < len(columns) or {"sequence", "seq", "sequence_2"} & names:
        raise ValueError(f"--targets or --multilabel {' '.join(columns)}: give each column once")
    flags = data.column_flags(args)
    rows, classes = data.read_own_tables(args.csv, columns, multilabel, flags)
    names = ("train", "test") if len(others) == 1 else ("train", "dev", "test")
    for path, name in zip(args.csv, names) if others and not labels_split(args) else ():
        columns, places = data.read_columns(path, {"split": ["split"]}, ["split"], flags["delimiter"])
        splits = columns.get("split", ())
        for text, place in zip(splits, places):
            if text != splits[0] or data.SPLITS.get(text.lower(), data.SPLITS[name]) != data.SPLITS[name]:
                raise ValueError(f"{place}: column split: {data.quoted(text)} in table {name} of "
                                 f"{', '.join(names)}; give one table for each split, in this order, or one "
                                 f"of all rows")
    if not others:
        table = data.read_groups(first, args.split_by, flags["delimiter"])
        if labels_split(args):
            table[1].pop("split", None)
        rows = data.split_table(table, rows[0], args.split_by, args.split, args.seed, classes)
    stem, _ = os.path.splitext(os.path.basename(first).removesuffix(".gz"))
    metric = "pcc" if args.targets else "auroc" if multilabel else "mcc"
    task = data.Task(f"csv/{stem}", "csv", classes, bool(args.targets), metric, "", {}, "", first, "yours",
                     multilabel)
    return task, dict.fromkeys(("train", "dev", "test")) | dict(zip(names, rows))


def read_benchmark(path):
    """Reads a --tasks table: {name: line}; files, targets, multilabel are lists, place is FILE: line N."""
    wanted = ("name", "files", "metric", "protocol", "targets", "multilabel")
    columns, places = data.read_columns(path, {name: [name] for name in wanted}, optional=wanted[4:])
    lines, folder = {}, os.path.dirname(path)
    for place, *cells in zip(places, *columns.values()):
        line = {"targets": "", "multilabel": "", "place": place} | dict(zip(columns, cells))
        name, targets, labels = line["name"], line["targets"].split(), line["multilabel"].split()
        metrics = OWN_METRICS["targets" if targets else "labels" if labels else "classes"]
        files = [os.path.join(folder, file) for file in line["files"].split()]
        there = len(files) in (1, 2, 3) and all(map(os.path.isfile, files))
        wrong_name = name in (*lines, *data.TASKS, *data.GROUPS) or not re.fullmatch(
            r"[\w-][\w.-]*(/[\w-][\w.-]*)*", name)         # it becomes a folder in --out
        for wrong, what, advice in (
                (wrong_name, "name", "give each set a name of its own, of letters, digits, _ . - and /"),
                (not there, "files", f"name one to three tables in {folder or '.'}, spaces between them"),
                (line["metric"] not in metrics, "metric", f"use one of {', '.join(metrics)}"),
                (targets and labels, "targets", "give targets or multilabel, not both"),
                (line["protocol"] not in ("", *PROTOCOLS), "protocol", f"use one of {', '.join(PROTOCOLS)}")):
            if wrong:
                raise ValueError(f"{place}: {what} {data.quoted(line[what])}: {advice}")
        lines[name] = line | {"files": files, "targets": targets, "multilabel": labels}
    return lines


def read_own(line, args):
    """Reads the tables that a line of --tasks names: (Task, splits)."""
    flags = {name: line[name] for name in ("targets", "multilabel")} | {"csv": line["files"]}
    task, splits = read_user_csv(argparse.Namespace(**vars(args) | flags))
    if line["metric"] in ("f1_binary", "auroc") and not task.multilabel and len(task.classes) > 2:
        raise ValueError(f"{line['place']}: metric {line['metric']} is for two classes, not "
                         f"{len(task.classes)}; use mcc")
    return task._replace(name=line["name"], suite="tasks", metric=line["metric"]), splits


def assign(splits, p, seed, names=()):
    """Returns rows to train on, to select by (or None) and to test on; and, in words, what is tested on."""
    (train, dev, test), tested_on = (splits[split] for split in ("train", "dev", "test")), "test"
    if test is None:
        dev, test, tested_on = None, dev, "dev (there is no test)"
    if test is None:
        raise ValueError("neither a test nor a dev split to test on; give one")
    if not p or p.get("select") == "last":                   # no numbers: a linear model
        dev = None
    elif "select" not in p:                                  # a linear model that repeats
        train, dev = data.split_rows(train, (1 - p["val"], p["val"]), seed, names)[0], None
        tested_on += f"; fitted on {1 - p['val']:.0%} of train"
    elif dev is None:
        train, dev = data.split_rows(train, (1 - p["val"], p["val"]), seed, names)
        tested_on += f"; dev is {p['val']:.0%} of train"
    return {"train": train, "dev": dev, "test": test}, tested_on


def count_rows(parts, net, seen):
    """Counts what was accepted, cut or repeated, for the row of results. seen: which test rows train has."""
    parts = {split: rows for split, rows in parts.items() if rows}
    counts = {f"{split}_{name}": n for split, rows in parts.items() for name, n in rows.notes.items()}
    if "dev" in parts:
        counts["test_in_dev"] = int(data.rows_in(parts["test"], parts["dev"]).sum())
    if net is not None:
        counts |= sum((Counter(count_unfit(net, rows)) for rows in parts.values()), Counter())
    counts |= {f"{split}_no_base": int((n_bases(net, rows) == 0).sum()) for split, rows in parts.items()}
    counts["test_in_train"] = int(seen.sum())
    return {name: n for name, n in counts.items() if n}


def complete(spec, key, args, task, longest):
    """Makes a run's spec from its pretrained part, the flags and the task. It is stored with the model."""
    kind, dropout = spec["kind"], key["numbers"].get("dropout")
    given = spec | {"n_out": len(task.classes), "regression": task.regression, "multilabel": task.multilabel}
    own = HEADS[kind].complete(given, args, longest) if kind in HEADS else {}
    if kind in own and dropout is not None:
        own[kind] = own[kind] | {"dropout": dropout}
    own |= {"strands": args.strands} if args.strands else {}
    own |= {"multilabel": True} if task.multilabel else {}
    return {"kind": kind, "long": args.long or "chunk", "dtype": args.dtype, "n_out": len(task.classes)} | own


def model_path(key, folder):
    """Returns the path of a run's model: TASK/INIT.pt, or TASK/ID.pt if another run has that name."""
    name = key["init"].removesuffix("/last.pt").rstrip("/").split("/")[-1].removesuffix(".pt").split(":")[-1]
    name = "".join(name.split()[:1]).strip(".") or "model"   # of ./last.pt
    name = ("random_" if key["init"].startswith("random:") else "") + name
    parent, identity = os.path.split(folder)
    path = os.path.join(parent, f"{name}.pt")
    with contextlib.suppress(ValueError):                    # no file there, or not a model: it is replaced
        if training.load(path).get("id") != identity:
            return os.path.join(parent, f"{identity}.pt")
    return path


def save_model(net, task, run, steps, folder, args):
    """Writes the fine-tuned model, with its classes; returns its path, which no other run takes meanwhile."""
    config = run["config"] | {"classes": task.classes, "regression": task.regression}
    state = {"step": steps, "model": net.state_dict(), "optimizer": {}, "id": os.path.basename(folder)}
    os.makedirs(os.path.join(folder, "model"), exist_ok=True)
    training.save(run | state | {"config": config}, os.path.join(folder, "model"))
    with locked_results(args.out):
        path = model_path(run["args"], folder)
        os.replace(os.path.join(folder, "model", "last.pt"), path)
    return path


def standardised(parts, task):
    """Returns (parts with float32 targets of mean 0, sd 1 on train; mean; sd). ValueError for a target over
    FAR sd from the mean."""
    mean, sd = parts["train"].labels.mean(0), parts["train"].labels.std(0)
    targets = {split: (rows.labels - mean) / sd for split, rows in parts.items() if rows}
    for split, x in targets.items():
        i, j = np.unravel_index(abs(x).argmax(), x.shape)
        if abs(x[i, j]) > FAR:
            value = f"{task.classes[j]} {parts[split].labels[i, j]:g} in {split}"
            raise ValueError(f"{task.name}: {value}: over {FAR:g} sd from the mean of train; correct it")
    return {split: rows and rows._replace(labels=targets[split].astype(np.float32))
            for split, rows in parts.items()}, mean, sd


def to_units(net, mean, sd, task):
    """Changes the last layer of net, trained on standardised targets, to predict in the units of the table;
    says where float32 is too coarse for these."""
    for name, m, s, step in zip(task.classes, mean, sd, np.spacing(abs(mean).astype(np.float32))):
        if step > s / 1000:
            print(f"  {name}: the model file will predict in steps of {step:g} (mean {m:g}, sd {s:g}); "
                  f"subtract {m:g} from the column for finer ones", flush=True)
    with torch.no_grad():
        sd, mean = (torch.as_tensor(x, dtype=torch.float32, device=net.out.weight.device) for x in (sd, mean))
        net.out.weight.mul_(sd[:, None])
        net.out.bias.mul_(sd).add_(mean)


def tuned_outputs(net, parts, task, run, folder, args):
    """Fine-tunes net and returns (outputs on test, what happened); keeps the model of the first seed."""
    device = next(net.parameters()).device
    if task.regression:
        parts, mean, sd = standardised(parts, task)
    if net.spec["strands"] != "forward":
        parts = parts | {"train": data.both_strands(parts["train"])}
    parts = {split: rows and data.on_device(rows, device, rows.labels) for split, rows in parts.items()}
    parts["train"] = parts["train"]._replace(labels=data.to_device(parts["train"].labels, device))
    if args.compile and training.can_compile(device):
        torch._dynamo.config.recompile_limit = 64            # beyond it (8), torch goes on uncompiled
        net.compile(dynamic=True)                            # the same graphs for sequences of all lengths
    result = fine_tune(net, parts, task, run, folder, args)
    net.eval()
    outputs = apply(net, parts["test"], args.micro_batch_size)
    if task.regression:                                      # predicts in the units of the table
        outputs = outputs * sd + mean
        to_units(net, mean, sd, task)
    if run["args"]["seed"] == args.seed:
        result["model"] = save_model(net, task, run, result["steps"], folder, args)
    return outputs, result


def score_run(outputs, parts, task, metric, seen):
    """Returns the row's scores: on test, on test without rows of train, and whether the outputs collapsed."""
    labels = parts["test"].labels
    test = scores(outputs, labels, task)
    collapsed = len(set(outputs.argmax(1))) == 1
    if task.regression or task.multilabel:                   # one value, relative to the spread of targets
        collapsed = (outputs.std(0) <= 1e-6 * parts["train"].labels.std(0)).all()
    row = {"score": test[metric], "collapsed": bool(collapsed) and vary(labels), "test": test}
    if 0 < seen.sum() < len(seen):
        row["test_unseen"] = scores(outputs[~seen], labels[~seen], task)
    return row


def shown(name, value):
    """Returns a score as text, in percent unless it is the mean squared error."""
    return f"{name} undefined" if value is None else f"{name} {value if name == 'mse' else 100 * value:.4g}"


def print_scores(row):
    scores, metric = [shown(*score) for score in row["test"].items()], row["metric"]
    if "test_unseen" in row:
        scores.append(f"without rows of train: {shown(metric, row['test_unseen'][metric])}")
    collapsed = " | COLLAPSED: one class (or value) for all rows" if row["collapsed"] else ""
    model = f" | model {row['model']}" if "model" in row else ""
    print(f"  test {', '.join(scores)}{collapsed}{model}", flush=True)


def check_parts(parts, task, key):
    """Raises ValueError for labels from which nothing can be learnt, or that cannot choose the weights."""
    train, dev = parts["train"], parts["dev"]
    if task.regression or task.multilabel:
        for name, x in zip(task.classes, train.labels.T):
            if not vary(x):
                raise ValueError(f"{task.name}: {name} is {float(x[0]):g} in all rows of train; leave it out")
            mean, sd = abs(x.mean()), x.std()
            if max(mean, sd) > 1e30 or sd < 1e-30:           # float32 features, so linear models use it, too
                raise ValueError(f"{task.name}: {name} has mean {mean:.3g} and sd {sd:.3g} in train, which "
                                 f"float32 cannot hold; give it in other units")
    chosen_by = key["metric"] if dev and not task.regression and key["numbers"]["select"] == "score" else ""
    if chosen_by in ("mcc", "auroc", "auprc", "f1_binary") and not vary(dev.labels):
        raise ValueError(f"{task.name}: all dev rows are of one class, so {chosen_by} cannot choose the "
                         f"weights; give rows of each class")


def done_before(row, out):
    """Returns what to say of a run that has a row already, and of its model if that is not there any more."""
    path, model = f"{out}/results.jsonl", str(row.get("model") or "").split("/")[-2:]
    if any(model) and not os.path.exists(os.path.join(out, *model)):           # out may have moved
        return f"done before, but its model {row['model']} is gone; remove its row from {path} to train again"
    return f"done before, see {path}"


def run_one(task, splits, key, start, args, device):
    """Trains by the protocol, tests once, appends the row of results unless it is there; returns its id."""
    began, shots = time.perf_counter(), f" {key['shots']}-shot" if key["shots"] else ""
    parts, tested_on = assign(splits, key["numbers"], key["seed"], task.classes)
    check_parts(parts, task, key)
    train = parts["train"]
    spec = complete(start.spec, key, args, task, int(np.diff(train.offsets).max()))
    spec |= {"pairs": True} if train.first is not None else {}
    check_pairs(spec, train)
    identity = hashlib.sha256(json.dumps([key, spec], sort_keys=True).encode()).hexdigest()[:8]
    title = f"{task.name}{shots} | {key['init']} | seed {key['seed']}"
    for row in read_rows(args.out):
        if row["id"] == identity:
            print(f"{title} | {done_before(row, args.out)}", flush=True)
            return identity
    net, seen = None, data.rows_in(parts["test"], train)
    if spec["kind"] in HEADS:                                # the 5-mer baseline has no network
        net = build_net(spec | {"pool": args.pool}, start.weights, key["seed"]).to(device)
    sizes = {split: len(rows.labels) for split, rows in parts.items() if rows}
    counts = count_rows(parts, net, seen)
    binary = len(task.classes) == 2 and not (task.regression or task.multilabel)
    positive = f"; f1_binary and auprc: of {task.classes[1]!r}" if binary else ""
    print(f"{title} | protocol {key['protocol']}\n  rows {sizes}; tested on {tested_on}; counts {counts}\n"
          f"  classes {dict(enumerate(task.classes))}{positive}; {key['numbers']}", flush=True)
    folder = os.path.join(args.out, f"{task.name}{shots}".replace("/", "_").replace(" ", "_"), identity)
    if not is_linear(key["init"], key["mode"]):
        run = {"method": "finetune", "config": spec, "data": key["data"],
               "args": key | {"micro_batch_size": args.micro_batch_size}}      # dropout depends on it
        outputs, result = tuned_outputs(net, parts, task, run, folder, args)
    else:
        outputs, result = linear_outputs(net, parts, task, args, device), {}
    given = len(args.own[task.name]["files"] if task.name in args.own else args.csv or ()) > 1
    row = {"id": identity} | key | score_run(outputs, parts, task, key["metric"], seen) | {
        "tested_on": tested_on, "rows": sizes, "counts": counts, "given_split": given,
        "device": str(device), "stride": 1, "seconds": round(time.perf_counter() - began, 1)} | spec | result
    row.pop("files", None)                                   # of a tokenizer: megabytes, in the model
    append_row(args.out, row)
    for name in ("last.pt", "prev.pt"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(folder, name))
    print_scores(row)
    return identity


@contextlib.contextmanager
def locked_results(out):
    """Yields results.jsonl, open to append to; ranks and other runs wait until it is closed."""
    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, "results.jsonl"), "a+b", opener=training.no_links) as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield f


def append_row(out, row):
    """Adds a line to results.jsonl, unless the run is there: two commands may have done it at once. Removes
    only half a row of ours, which a full disk left at the end."""
    with locked_results(out) as f:
        f.seek(0)
        text = f.read()
        if any(old["id"] == row["id"] for old in filter(None, map(parse_row, text.splitlines()))):
            return
        start = text.rfind(b"\n") + 1
        if text[start:].startswith(HALF) and not parse_row(text[start:]):
            f.truncate(start)
        elif text[start:]:
            f.write(b"\n")
        f.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        f.flush()
        os.fsync(f.fileno())


def parse_row(line):
    """Returns the row of a run that a line of results.jsonl holds, or None."""
    try:
        row = json.loads(line)
        sizes, own_dev = row.get("rows", {"train": 0, "test": 0}), "dev is" in row.get("tested_on", "")
        sound = {"train", "test", *["dev"] * own_dev} <= sizes.keys()
        sound = sound and all(type(n) is int for n in sizes.values()) and abs(row["score"] or 0) < 1.001
        return row if sound and all(isinstance(row[name], kinds) for name, kinds in ROW.items()) else None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None


def read_rows(out):
    """Reads the rows of results.jsonl, [] where there is none; names a line that is no run and skips it."""
    path, rows = os.path.join(out, "results.jsonl"), []
    if not os.path.exists(path):
        return rows
    with open(path, encoding="utf-8-sig", errors="replace", opener=training.no_links) as f:
        fcntl.flock(f, fcntl.LOCK_SH)
        for n, line in enumerate(f, 1):
            row = parse_row(line)
            rows += [row] if row else []
            if not row and line.strip():
                training.say_once(f"{path}: line {n}: not a run ({data.quoted(line[:40])}); passed over")
    return rows


def is_linear(init, mode):
    """Tells whether a run fits a linear model: then it has no protocol but LINEAR, and no repeats on the same
    rows, which would give the same."""
    return mode == "probe" or init == "kmer"


def grid(args):
    """Returns all combinations of the values that flags give for numbers of a protocol: [{flag: value}]."""
    given = {name: getattr(args, name) for name in FLAGS if getattr(args, name, None) is not None}
    return [dict(zip(given, values)) for values in itertools.product(*given.values())]


def plan_runs(args):
    """Yields a Plan for every run that the flags ask for. A linear model ignores a grid, and is repeated only
    where its rows differ (few-shot draws, LINEAR)."""
    for name in data.task_names(args.task) if args.task else args.own or [None]:
        suite = data.TASKS[name].suite if name in data.TASKS else "csv"
        stated = args.protocol or name in args.own and args.own[name]["protocol"]
        protocol = stated or DEFAULT_PROTOCOL.get(suite, "strict")
        repeats = range(args.seeds or PROTOCOLS[protocol][0]["seeds"])
        draws = data.FEW_SHOT[name][1] if name in data.FEW_SHOT else 1
        shots_list = args.shots or [10] if suite == "few-shot" else [None]
        for shots, repeat, init, flags in itertools.product(shots_list, repeats, args.init, grid(args)):
            once = flags == grid(args)[0] and (repeat < draws or protocol in LINEAR)
            if once or not is_linear(init, args.mode):
                yield Plan(name, shots, repeat, init, protocol, flags)


def make_key(plan, task, start, digest, args):
    """Returns what identifies a run, with its spec: equal keys give equal results. digest: of the data."""
    if task.regression and args.class_weights:
        raise ValueError(f"{task.name}: --class_weights: a regression has no classes; drop it")
    flags, p = {}, LINEAR.get(plan.protocol, {})             # a linear model ignores the grid
    if not is_linear(plan.init, args.mode):
        flags = dict(plan.flags)
        p = get_protocol(plan.protocol, task.name, plan.shots, start.spec["kind"], flags)
        if task.regression and p["select"] == "score":
            p["select"] = "loss"                             # PCC ignores the scale
        if p["select"] == "last" and len(grid(args)) > 1:
            raise ValueError(f"{task.name}: protocol {plan.protocol} has no dev rows to choose among "
                             f"{len(grid(args))} settings; give one value per flag, or --protocol strict")
    head_flags = HEADS[start.spec["kind"]].FLAGS if start.spec["kind"] in HEADS else {}
    others = dict.fromkeys(("strands", "class_weights", "split_by"))
    flags |= {name: getattr(args, name) for name, default in (head_flags | others).items()
              if getattr(args, name) != default}
    return {"task": task.name, "shots": plan.shots, "seed": args.seed + plan.repeat, "init": start.name,
            "weights": start.digest, "mode": args.mode, "pool": args.pool if args.mode == "probe" else None,
            "protocol": plan.protocol, "overrides": flags, "metric": main_metric(plan.protocol, task),
            "numbers": p, "data": digest, "classes": list(task.classes)}


def run_all(plans, starts, args, device):
    """Does the runs one after the other: (exit code, ids). A failed run is reported; the next one follows."""
    errors, code, ids, cached = set(), 0, [], None
    for k, plan in enumerate(plans, 1):
        try:
            if training.stop_requested():                    # after the last step of a run, or in a probe
                raise InterruptedError
            source = plan.name, plan.shots, plan.repeat if plan.shots else None
            if cached != source:                             # a set is read once, a few-shot draw each time
                task, splits = read_user_csv(args) if args.csv else read_own(args.own[plan.name], args) if (
                    plan.name in args.own) else (data.TASKS[plan.name], data.read_task(
                        plan.name, args.data_dir, plan.shots, plan.repeat % 10, args.fasta))
                cached = source
            key = make_key(plan, task, starts[plan.init], data.fingerprint(splits), args)
            print(f"run {k} of {len(plans)}", flush=True)
            ids.append(run_one(task, splits, key, starts[plan.init], args, device))
        except InterruptedError:
            print("stopped  by a signal; the same command continues there", flush=True)
            return 143, ids
        except (ValueError, ArithmeticError) as e:
            code = 3 if isinstance(e, ArithmeticError) else 2
            if str(e) not in errors:                         # repeats would repeat it
                print(f"error: {training.plain(str(e))}", file=sys.stderr, flush=True)
            errors.add(str(e))
    return code, ids


def gather_ids(ids, world):
    """Gathers the ids of all ranks once all have ended, as torchrun kills the others if one ends in error."""
    training.release_signals()
    signal.signal(signal.SIGINT, signal.SIG_DFL)             # Python would only look after the wait
    dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    parts = [None] * world
    dist.all_gather_object(parts, ids)
    return sum(parts, [])


def print_table(out, ids):
    """Prints the results of this command beside the papers' numbers."""
    from tools import table                                  # the one import of a tool
    print(f"\nThe runs of this command (for all runs in {out}: python -m tools.table {out})\n")
    sys.stdout.reconfigure(errors="replace")                 # an ASCII terminal has no plus-minus sign
    print("\n".join(table.make_table(table.read_runs(out, ids)).lines), flush=True)


def add_protocol_flags(parser):
    positive = number(int, 1)
    add = parser.add_argument_group("protocol").add_argument
    add("--mode", choices=("finetune", "probe"), default="finetune", help="probe: a linear model only")
    add("--protocol", choices=PROTOCOLS, help="default: that of the papers that use the set; --csv: strict")
    add("--seeds", type=positive, help="number of repeats (default: the protocol's)")
    add("--seed", type=number(int, 0, 2 ** 31), default=42, help="seed of the first repeat (%(default)s)")
    add("--shots", type=positive, nargs="+", help="few-shot: rows per class (10)")
    add("--long", choices=("chunk", "truncate"),
        help="sequences that do not fit the network: chunk into windows, or truncate (chunk)")
    add("--class_weights", choices=["balanced"], help="each class gets the same share of the loss")
    add("--strands", choices=("augment", "average"),
        help="augment: train on both strands; average: also predict the mean over both (default: as given)")
    add = parser.add_argument_group("optimization (default: the protocol's)").add_argument
    for name, kind, what in (
            ("batch_size", positive, "sequences per step"), ("lr", number(float, 1e-30),
             "peak learning rate; several values of these six flags are a grid"),
            ("weight_decay", number(float, 0), "AdamW decay, not on biases and LayerNorm"),
            ("epochs", positive, "passes over the training set"),
            ("warmup", number(int, 0), "steps of linear warm-up"),
            ("dropout", number(float, 0, 1), "dropout (default: the protocol's, else the model's)")):
        add(f"--{name}", type=kind, nargs="+", metavar=name.upper(), help=what)


def parse_args():
    parser = training.make_parser(__doc__)
    positive, group = number(int, 1), parser.add_argument_group("data")
    add = group.add_mutually_exclusive_group(required=True).add_argument
    add("--task", nargs="+", help=f"benchmark sets (emp/H3) or groups: {' '.join(data.GROUPS)}")
    add("--csv", type=file_name, nargs="+",
        help="your tables (columns sequence, label): ALL, or TRAIN TEST, or TRAIN DEV TEST")
    add("--tasks", type=file_name, metavar="TABLE",
        help="your benchmark: a .tsv with columns name, files, metric, protocol; a set a line")
    add("--demo", action="store_true", help="a planted motif in synthetic DNA; needs no data")
    add = group.add_argument
    add("--data_dir", type=folder_name, default="data", help="folder of the benchmark sets (%(default)s)")
    add("--fasta", type=file_name, nargs="+", help="reference genome for GenomicBenchmarks' coordinates")
    add("--split", type=data.fractions, help="shares of one --csv table (.8,.1,.1)")
    add("--split_by", metavar="COLUMN",
        help="--csv: keep rows with equal values in this column in one split; or: similarity")
    add("--targets", nargs="+", metavar="COLUMN", help="--csv: regression on these columns")
    add("--multilabel", nargs="+", metavar="COLUMN", help="--csv: these columns are labels, each 0 or 1")
    data.add_column_flags(add, "sequence", "label")
    add = parser.add_argument_group("model").add_argument
    add("--init", type=file_name, nargs="+", default=["random"],
        help="checkpoint, hf:FOLDER, findna:FILE, random:ONE OF THESE (its architecture), random, "
             "cnn, penguinn or kmer (random)")
    add("--stride", type=positive, help="1: overlapping k-mers, k: non-overlapping (default: as pretrained)")
    add("--k", type=number(int, 1, 9), default=6, help="random: k-mer length (%(default)s)")
    add("--block_size", type=number(int, 3), default=512, help="random: positions (%(default)s)")
    add("--n_layer", type=positive, default=12, help="random: layers (%(default)s)")
    add("--n_head", type=positive, default=12, help="random: attention heads (%(default)s)")
    add("--n_embd", type=positive, default=768, help="random: width (%(default)s)")
    add("--pool", choices=("mean", "cls", "both"), default="mean",
        help="probe, FinDNA: pooling; both: concatenated (%(default)s)")
    add("--eval_network", choices=("teacher", "student"),
        help="FinDNA: network to use (the teacher, unless it is still close to its initial weights)")
    add("--head", choices=("linear", "mlp"), default="linear", help="FinDNA: its head (%(default)s)")
    add("--blocks", choices=("all", "log2"), default="all",
        help="FinDNA: blocks per layer, all or log2 of the longest training sequence (%(default)s)")
    add_protocol_flags(parser)
    add = parser.add_argument_group("run").add_argument
    add("--out", type=file_name, default="out/finetune", help="folder of results and models (%(default)s)")
    add("--save_every", type=number(float, 0), default=1.0,
        help="minutes between checkpoints; 0: none until a stop (%(default)g)")
    add("--micro_batch_size", type=positive, default=128, help="windows per forward pass (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    add("--dtype", choices=training.DTYPES, default="auto", help=training.AUTO)
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="torch.compile the network (default: no)")
    if parser.parse_args().demo:
        parser.set_defaults(**DEMO)
    args = parser.parse_args()
    return args, [name for name, value in vars(args).items() if value != parser.get_default(name)]


def unused_flags(given, starts, args):
    """Returns those of these flags that change nothing for any of the starts."""
    kinds = {start.spec["kind"] for start in starts}
    nets = kinds - {"kmer"}
    encoders = ["track_size" not in start.spec["mixer"] for start in starts if start.spec["kind"] == "mixer"]
    used = dict.fromkeys(("k", "block_size", "n_layer", "n_head", "n_embd"), "random" in args.init)
    used |= dict.fromkeys(("head", "blocks", "eval_network"), "mixer" in kinds)
    used |= dict.fromkeys(FLAGS, nets and args.mode == "finetune")
    used |= {"stride": kinds & {"bert", "hf"}, "long": kinds & {"bert", "hf"} or any(encoders),
             "dropout": used["dropout"] and nets - {"cnn", "penguinn"},
             "pool": nets if args.mode == "probe" else "mixer" in kinds}
    return [name for name in given if not used.get(name, True)]


def check_args(args):
    """Raises ValueError for flags that contradict each other, or an --out that is not a folder."""
    for name in ("targets", "multilabel"):
        if getattr(args, name) and (not args.csv or args.targets and args.multilabel):
            raise ValueError(f"--{name}: belongs to --csv; --targets and --multilabel exclude each other; "
                             f"drop it")
    for flag in ("sequence_column", "label_column", "delimiter"):
        if getattr(args, flag) is not None and not (args.csv or args.tasks):
            raise ValueError(f"--{flag}: belongs to --csv or --tasks; drop it")
    if args.label_column and (args.targets or args.multilabel):
        raise ValueError("--label_column: --targets or --multilabel name these columns; drop it")
    if args.fasta and not args.task:
        raise ValueError("--fasta: belongs to --task; drop it")
    for flag in ("split", "split_by"):
        if getattr(args, flag) is not None and len(args.csv or ()) != 1:
            raise ValueError(f"--{flag}: belongs to one --csv table; drop it")
    names = data.task_names(args.task) if args.task else []
    if args.shots and not any(data.TASKS[name].suite == "few-shot" for name in names):
        raise ValueError("--shots: belongs to the few-shot sets (--task fewshot); drop it")
    if os.path.lexists(args.out) and not os.path.isdir(args.out):
        raise ValueError(f"--out {args.out!r}: not a folder; name one")


if __name__ == "__main__":
    training.outlive_streams()
    with training.user_errors():
        args, given = parse_args()
        if args.demo:
            torch.set_num_threads(1)
            if os.path.exists("out/demo/last.pt"):
                args.init = ["out/demo/last.pt", "random"] if args.init == ["random"] else args.init
            else:
                print("no out/demo/last.pt (run randommask.py --demo first): starting from random weights")
        device, args.dtype, rank, world = training.set_up(args.device, args.dtype, join=False)
        check_args(args)
        args.own = read_benchmark(args.tasks) if args.tasks else {}
        starts, plans = {init: read_start(init, args) for init in args.init}, list(plan_runs(args))
        unused = unused_flags(given, starts.values(), args)
        if unused and rank == 0:
            print(f"note: no --init here uses {', '.join(f'--{name}' for name in unused)}", flush=True)
    training.catch_signals()
    with training.user_errors(OSError, MemoryError, torch.OutOfMemoryError):
        code, ids = run_all(plans[rank::world], starts, args, device)
    if world > 1:
        ids = gather_ids(ids, world)
    if rank == 0 and ids and code != 143:
        with training.user_errors():
            print_table(args.out, ids)
    if args.demo and not code:
        print("\nThe table shows what pretraining adds. Next, your own table (columns sequence, label):\n"
              "  python finetune.py --csv YOUR.csv --init out/mine/last.pt random kmer --lr 3e-4\n"
              "  python -m tools.predict NEW.fa --init out/finetune/csv_YOUR/mine.pt")
    training.finish(code)
