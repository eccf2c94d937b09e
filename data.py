"""DNA in, integer tensors out: base codes, genomes, k-mer tokens, span masks, benchmark sets.

Bases are uint8 codes A,T,C,G,N = 0,1,2,3,4: DNABERT's vocabulary order, so the complement is code XOR 1.
The id of a k-mer is 5 + the k-mer read as a base-4 number; [PAD] [UNK] [CLS] [SEP] [MASK] are 0..4.
Coordinates are 0-based and half-open, as in BED. Invalid input raises ValueError: where, what, what to do.
"""
import argparse
import base64
import contextlib
import csv
import errno
import fcntl
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import secrets
import shlex
import shutil
import signal
import sys
import threading
import tempfile
import unicodedata
import zlib
from collections import namedtuple

import numpy as np
import torch
import torch.nn.functional as F

LETTERS_ONLY = "use A, C, G, T, N or IUPAC codes"           # the end of messages
PAD, UNK, CLS, SEP, MASK = range(5)
BLANK = 5                                                    # stands for "no base": zeros in one_hot
SOFT = 8                                                     # added to the codes of soft-masked bases
BETWEEN = 6                                                  # stands between the two sequences of a pair
AMBIGUOUS = b"NRYSWKMBDHVnryswkmbdhv"                        # IUPAC codes of several bases: all become N,
DRAWN = {"R": "AG", "Y": "CT", "S": "CG", "W": "AT", "K": "GT", "M": "AC",     # or one of these bases
         "B": "CGT", "D": "AGT", "H": "ACT", "V": "ACG"}
CODE = np.full(256, 255, np.uint8)                           # byte -> base code; 255: not DNA
CODE[np.frombuffer(AMBIGUOUS, np.uint8)] = 4
CODE[np.frombuffer(b"ATCGatcg", np.uint8)] = [0, 1, 2, 3] * 2
FASTA_CODE = bytes(5 if code == 4 and chr(i) not in "Nn" else code for i, code in enumerate(CODE))
IS_LOWER = bytes(chr(byte).islower() for byte in range(128)) + bytes(128)      # byte -> 1 or 0
HG38_CONTIGS = [f"chr{c}" for c in (*range(1, 23), "X", "Y")]
END = 24                                                     # bases of a contig's end: 5 ** 24 fits int64
CHUNK = 1 << 20                                              # bytes of a FASTA at a time
HASHED = 200_000_000                                         # larger files are not always hashed whole
CACHE_FORMAT = 3                                             # of the genome cache; 2 held lists of numbers
PLANTED, OTHER = "other users can write to it", "another version of this program made it"
DEMO_MOTIF = "TGACTCAGCATG"                                  # planted in the demo genome and in the demo task
NEAR_K, NEAR_SHARE, NEAR_RUN = 15, 0.5, 64                   # near-duplicates: see similar_groups
KMER = 5                                                     # k of the 5-mer baseline: kmer_counts
SPLITS = {"train": 0, "dev": 1, "val": 1, "validation": 1, "test": 2}          # what a column split may say


def quoted(text):
    """Quotes text from outside for a message: without terminal escapes, at most 80 characters."""
    if isinstance(text, (bytes, bytearray)):
        text = text.decode("utf-8", "replace")
    return repr(text)[:80]


def encode(text, width=None):
    """Turns DNA text of any case into uint8 codes (L,): A,T,C,G,N = 0..4; other IUPAC codes become N.
    ValueError names the position of any other letter; width: length of the sequences in the text."""
    bases = CODE[np.frombuffer(text.encode("ascii", "replace"), np.uint8)]
    if bases.size and bases.max() > 4:
        at = int(np.argmax(bases > 4))
        place = f"sequence {at // width}, position {at % width}" if width else f"position {at}"
        raise ValueError(f"{place}: {text[at]!r} is not a DNA letter; {LETTERS_ONLY}")
    return bases


def decode(bases):
    """Turns uint8 codes (L,) into text over A, T, C, G, N."""
    return np.frombuffer(b"ATCGN", np.uint8)[np.asarray(bases)].tobytes().decode()


def reverse_complement(bases):
    """Returns the other strand of codes (..., L), numpy or torch, read 5' to 3'. N stays N."""
    flipped = bases.flip(-1) if torch.is_tensor(bases) else np.asarray(bases)[..., ::-1]
    return flipped ^ (flipped < 4)


@functools.cache
def channels(device):
    """Returns the table of one_hot (13, 5): rows A,T,C,G,N,BLANK, from SOFT on -A,...; columns A,C,G,T,N."""
    rows = torch.eye(8, 5, device=device)[torch.tensor([0, 3, 1, 2, 4, 5, 6, 7], device=device)]
    return torch.cat([rows, -rows[:5]])


def one_hot(bases):
    """Turns codes (B, L) into float (B, L, 5), A,C,G,T,N; a BLANK (masked, padding, [CLS]) is zeros, and a
    base with SOFT added has -1 in place of 1."""
    return F.embedding(bases.int(), channels(bases.device))


def kmer_numbers(bases, k):
    """Turns codes (B, L) uint8 into base-4 numbers (B, L - k + 1), int16 or int32.
    The numbers of k-mers with an N are wrong."""
    codes = bases.to(torch.int16 if k < 8 else torch.int32)
    numbers, width = codes, 1                                # of `width` bases
    for digit in bin(k)[3:]:                                 # double and add: 3 passes for k = 6
        numbers, width = torch.add(numbers[:, width:], numbers[:, :-width], alpha=4 ** width), 2 * width
        if digit == "1":
            numbers, width = torch.add(codes[:, width:], numbers[:, :-1], alpha=4), width + 1
    return numbers


def kmer_tokens(bases, k, stride, specials=False):
    """Turns codes (B, L) uint8 into k-mer ids (B, (L - k) // stride + 1) int64; a k-mer with an N is [UNK].
    stride 1: DNABERT's overlapping tokens; stride k: non-overlapping ones, without what is left at the end.
    specials=True puts [CLS] before and [SEP] after each row."""
    ids = kmer_numbers(bases, k)[:, ::stride] + 5
    if ids.numel() and (bases.is_cuda or bases.max() > 3):   # max() of a GPU tensor would make the host wait
        n_before = F.pad((bases > 3).cumsum(1), (1, 0))      # N before each position
        ids = ids.masked_fill((n_before[:, k:] != n_before[:, :-k])[:, ::stride], UNK)
    if not specials:
        return ids.to(torch.int64)
    tokens = ids.new_empty((len(ids), ids.shape[1] + 2), dtype=torch.int64)
    tokens[:, 0], tokens[:, -1], tokens[:, 1:-1] = CLS, SEP, ids
    return tokens


def tokenize(sequences, k=6, stride=1):
    """Turns DNA strings into ids (B, T + 2): [CLS] k-mers [SEP], right-padded with [PAD].
    A sequence shorter than k gives [CLS] [SEP]. ValueError for one string."""
    if isinstance(sequences, str):
        raise ValueError("sequences: give a list of strings, not one string")
    longest = max(map(len, sequences), default=0)
    text = "".join(sequence.ljust(longest, "N") for sequence in sequences)
    bases = torch.from_numpy(encode(text, longest).reshape(len(sequences), longest))
    tokens = kmer_tokens(bases, k, stride, specials=True)
    n_kmers = torch.tensor([max(0, (len(sequence) - k) // stride + 1) for sequence in sequences])[:, None]
    at = torch.arange(tokens.shape[1])
    return tokens.masked_fill(at == n_kmers + 1, SEP).masked_fill(at > n_kmers + 1, PAD)


def span_mask(centers, maskable, left, right):
    """Returns the union of the spans c - left .. c + right around centers, within the maskable positions.
    centers, maskable: bool (B, T); left, right: for all rows, or each row's own (B,)."""
    if torch.is_tensor(left) or torch.is_tensor(right):
        B, T = centers.shape
        at = torch.where(centers, torch.arange(T, device=centers.device), T)
        left, right = (torch.as_tensor(x, device=at.device).expand(B) for x in (left, right))
        return row_spans(at, maskable, left, right)
    x, width = F.pad(centers & maskable, (right, left)), 1
    while width <= left + right:                             # doubles: position i holds the centers from
        step = min(width, left + right + 1 - width)          # i - right on, `width` of them
        x, width = x[:, step:] | x[:, :-step], width + step
    return x & maskable


def row_spans(at, maskable, left, right):
    """Returns span_mask for centers at positions `at` (B, S), T: none; left, right (B,): each row's own."""
    B, T = maskable.shape
    weight = F.pad(maskable, (0, 1)).gather(1, at).to(torch.int16)
    first, end = (at - left[:, None]).clamp_(0, T), (at + (right[:, None] + 1)).clamp_(max=T)
    n_open = weight.new_zeros(B, T + 1).scatter_add_(1, first, weight).scatter_add_(1, end, -weight)
    return n_open.cumsum(1, dtype=torch.int16)[:, :T].bool() & maskable


def mark(at, T):
    """Marks the positions `at` (B, S), where T stands for none: bool (B, T)."""
    return torch.zeros(len(at), T + 1, dtype=torch.bool, device=at.device).scatter_(1, at, True)[:, :T]


def draw_positions(shape, p, device):
    """Draws centers (B, S): each of T positions is one with probability p, independently of the others.
    They are positions in order, then T. It draws geometric gaps between them, which takes far fewer random
    numbers than positions. The mean + 10 standard deviations + 10 gaps always reach the end of a row."""
    B, T = shape
    n = math.ceil(T * p + 10 * math.sqrt(T * p) + 10)
    gaps = torch.log1p(-torch.rand(B, n, device=device)).div_(math.log1p(-p)).floor_().add_(1)
    return gaps.cumsum(1).sub_(1).clamp_(max=T).long()


def draw_centers(shape, p, device):
    """Draws bool (B, T) where each position is a center with probability p, independently of the others."""
    return mark(draw_positions(shape, p, device), shape[1])


def corrupt(tokens, masked, n_vocab):
    """Replaces masked tokens 80/10/10 (BERT's): by [MASK], by a random k-mer (ids 5..n_vocab-1), or not.
    tokens (B, T), masked bool (B, T) -> inputs (B, T), labels (B, T) with -100 where nothing is predicted."""
    n = n_vocab - 5                                          # one draw out of 10 n: 8 n give [MASK], then
    draw = torch.randint(5 - 8 * n, 5 + 2 * n, tokens.shape, device=tokens.device)         # n k-mers, n keep
    inputs = torch.where(masked & (draw < 5 + n), draw.clamp_(min=MASK), tokens)
    return inputs, torch.where(masked, tokens, -100)


class Genome:
    """One or more FASTA files, packed once into a checked, memory-mapped cache of base codes (1 byte each).
    cache: folder for the cache (default: beside the FASTA); keep: names of contigs to take (default: all);
    ambiguous: "random" draws a base for each IUPAC code but N; verify: compare the cache with the FASTA."""

    def __init__(self, paths, cache=None, keep=None, ambiguous="N", verify=False):
        paths = [paths] if isinstance(paths, (str, os.PathLike)) else paths
        paths = [os.fspath(path) for path in paths]
        if len({os.path.realpath(path) for path in paths}) < len(paths):
            raise ValueError(f"{', '.join(paths)}: the same FASTA file is given twice; name each file once")
        source = {"keep": keep and sorted(keep), "ambiguous": ambiguous}
        index, self.bases = open_cache(paths, cache, source)                   # all contigs, end to end
        if verify:
            check_packed(index, self.bases, paths, source)
        self.contigs = dict(zip(index["names"], np.diff(index["ends"], prepend=0).tolist()))  # {name: length}
        self.offsets = dict(zip(index["names"], [0, *index["ends"].tolist()]))
        self.intervals = index["intervals"].reshape(-1, 2)   # (n, 2): stretches without N, positions in bases
        self.n_ambiguous = index["n_ambiguous"]              # IUPAC codes but N
        self.drawn = ambiguous == "random"                   # a base was drawn for each; else they are N
        self.fingerprint = index["fingerprint"]              # depends on the bases, not on where the file is
        self.index, self.bed, self.about = index, None, []   # the lines of restrict and repeats

    def __str__(self):
        n_unknown = len(self.bases) - int(np.diff(self.index["intervals"])[::2].sum())
        codes = "IUPAC codes drawn among their bases" if self.drawn else "were other IUPAC codes"
        return (f"{len(self.contigs)} contigs, {len(self.bases):,} bases, {n_unknown:,} N "
                f"({self.n_ambiguous:,} {codes}), fingerprint {self.fingerprint}")

    def restrict(self, bed):
        """Keeps only the intervals of a BED file (None: all); those that overlap or touch become one."""
        if bed:
            found, line = read_bed(bed, self)
            self.intervals = parts_within(self.intervals, found)
            if not len(self.intervals):
                raise ValueError(f"{bed}: its intervals hold nothing but N; give others")
            self.bed, self.about = bed, [*self.about, line]
            self.fingerprint += f"+bed{zlib.crc32(self.intervals.tobytes()):08x}"

    def repeats(self, weight, device):
        """Returns the case_edges on a device, for in_repeats; None where --repeat_weight is 1."""
        if weight == 1:
            return None
        edges, n = self.index["case"], len(self.bases)
        n_soft = int((edges[1::2] - edges[::2]).sum())
        if n_soft in (0, n):
            raise ValueError(f"--repeat_weight {weight}: {'all' if n_soft else 'none'} of the genome is in "
                             f"lower case; give a soft-masked FASTA or drop the flag")
        self.about.append(f"repeats  {n_soft:,} bases are in lower case ({n_soft / n:.1%}): weight {weight}")
        self.fingerprint += f"+case{zlib.crc32(edges.tobytes()):08x}"
        return torch.from_numpy(edges).to(device)

    def fetch(self, contig, start, end, strand="+"):
        """Returns the text of contig[start:end], 0-based half-open; strand '-': its reverse complement."""
        if contig not in self.contigs:
            raise ValueError(f"contig {quoted(contig)} is not in the genome; use one of "
                             f"{', '.join([*self.contigs][:5])} ...")
        if not 0 <= start < end <= self.contigs[contig] or strand not in ("+", "-"):
            raise ValueError(f"{contig}:{start}-{end} {strand!r} is not an interval of the contig; use 0 <= "
                             f"start < end <= {self.contigs[contig]} and strand '+' or '-'")
        bases = self.bases[self.offsets[contig] + start:self.offsets[contig] + end]
        return decode(reverse_complement(bases) if strand == "-" else bases)

    def split(self, length, val_contigs=()):
        """Returns the intervals (n, 2) for training and for validation that hold a window of `length` bases.
        Validation is val_contigs where given, else the last 1 % of each contig whose 1 % holds a window; if
        none does, whole contigs by a hash of their names, until they hold 1 % of the bases."""
        train, val = self.cut(self.held_out(length, val_contigs), length)
        if not len(train) or not len(val):
            raise ValueError(f"the genome is too small: {self.too_small(length, val_contigs, len(train))}")
        return train, val

    def named(self, parts, flag):
        """Returns the contigs that a flag names. parts: its text, split at commas; as a name may hold commas
        itself, the longest name that fits counts."""
        found, most = [], 1 + max(name.count(",") for name in self.contigs)
        at = 0
        while at < len(parts):
            names = (",".join(parts[at:at + n]) for n in range(most, 0, -1))
            name = next((name for name in names if name in self.contigs), None)
            if name is None:
                raise ValueError(f"{flag}: {quoted(parts[at])} is not in the genome; use some of "
                                 f"{', '.join([*self.contigs][:5])} ...")
            found.append(name)
            at += 1 + name.count(",")
        return found

    def repeated(self, held_out):
        """Returns [line] if contigs repeat others, on either strand, else []. The line says how many held-out
        bases are also trained on. Only contigs of equal length and ends are compared, by digests."""
        ends, groups = self.index["ends"], {}
        sizes = np.diff(ends, prepend=0)
        at = np.minimum(np.arange(END), sizes[:, None] - 1)  # from either end: (contigs, END)
        starts = [self.bases[(ends - sizes)[:, None] + at], self.bases[ends[:, None] - 1 - at]]
        starts[1] ^= starts[1] < 4                           # of the other strand
        starts = np.sort([codes @ 5 ** np.arange(END) for codes in starts], 0)
        _, alike, n_of = np.unique([sizes, *starts], axis=1, return_inverse=True, return_counts=True)
        names = [*self.contigs]
        for i in np.flatnonzero(n_of[alike.ravel()] > 1).tolist():
            codes = self.bases[ends[i] - sizes[i]:ends[i]]
            strands = [hashlib.sha256(x).digest() for x in (codes, reverse_complement(codes))]
            groups.setdefault(min(strands), []).append((i, strands[0] <= strands[1]))
        groups, n_leaked = [group for group in groups.values() if len(group) > 1], 0
        if not groups:
            return []
        for group in groups:
            for i, strand in group:                          # what is held out is the end of a contig
                leaks = (held_out[i] - held_out[j] if strand == other else
                         min(held_out[i], sizes[j] - held_out[j]) for j, other in group if j != i)
                n_leaked += max(0, *leaks)
        kind, n = "warning" if n_leaked else "note", sum(map(len, groups)) - len(groups)
        return [f"{kind}: {n:,} of the contigs repeat another, on either strand ("
                f"{names[groups[0][1][0]]} is {names[groups[0][0][0]]}, ...): {n_leaked:,} of "
                f"{held_out.sum():,} held-out bases are also trained on; give each contig once"]

    def held_out(self, length, val_contigs=()):
        """Returns how many bases at the end of each contig are for validation; see split."""
        sizes = np.diff(self.index["ends"], prepend=0)
        wanted = set(self.named(val_contigs, "--val_contigs"))
        held_out = sizes * [name in wanted for name in self.contigs] if val_contigs else sizes // 100
        held_out[held_out < length] = 0
        if val_contigs or len(self.cut(held_out, length)[1]):
            return held_out
        at = np.searchsorted(self.index["ends"], self.intervals[:, 0], side="right")
        fit = np.unique(at[np.diff(self.intervals)[:, 0] >= length])           # contigs with a window
        names = [*self.contigs]
        order = fit[np.argsort([zlib.crc32(names[i].encode()) for i in fit.tolist()], kind="stable")]
        n_before = np.cumsum(sizes[order]) - sizes[order]
        order = order[n_before < sizes[order].sum() / 100][:max(0, len(fit) - 1)]         # one is to train on
        held_out[:] = 0
        held_out[order] = sizes[order]
        return held_out

    def cut(self, held_out, length):
        """Returns the intervals that hold a window, before and in the held-out bases that end each contig."""
        ends, (start, end) = self.index["ends"], self.intervals.T
        cut = (ends - held_out)[np.searchsorted(ends, start, side="right")]
        cut = np.clip(cut, start, end)                       # training before it, validation from it on
        train, val = np.stack([start, cut], 1), np.stack([cut, end], 1)
        return train[cut - start >= length], val[end - cut >= length]

    def too_small(self, length, val_contigs, trains):
        """Returns why a split has no window of `length` bases to train on or, if `trains`, to validate on."""
        sizes = np.diff(self.intervals)[:, 0]
        if sizes.max() < length:
            return (f"no window of {length} bases without N (longest: {sizes.max():,}); use shorter windows"
                    + self.advice())
        if val_contigs or not trains:
            part = "validation" if trains else "training"
            return f"no window of {length} bases without N is left for {part}; change --val_contigs"
        return (f"no contig's last 1 % holds a window of {length} bases for validation, and only one contig "
                f"holds any, so no whole one can be held out; use shorter windows or more contigs"
                + self.advice())

    def advice(self):
        """Returns what else may help where stretches without N are too short, as the end of a message."""
        ambiguous = " or --ambiguous random" if self.n_ambiguous and not self.drawn else ""
        return ambiguous + (" or other intervals in --bed" if self.bed else "")

    def reach(self, length, val_contigs=()):
        """Returns the number of bases in training windows, and lines that say what windows reach and miss."""
        ends, held_out = self.index["ends"], self.held_out(length, val_contigs)
        parts = self.cut(held_out, length)
        n_bases = [int(np.diff(part).sum()) for part in parts]
        n_contigs = [len(np.unique(np.searchsorted(ends, part[:, 0], side="right"))) for part in parts]
        n_known = int(np.diff(self.intervals).sum()) + (0 if self.drawn or self.bed else self.n_ambiguous)
        missed = n_known - sum(n_bases)
        lines = [f"reach    training windows: {n_bases[0]:,} bases in {n_contigs[0]:,} of {len(ends):,} "
                 f"contigs; validation windows: {n_bases[1]:,} bases in {n_contigs[1]:,}"
                 + (f"; never read: {missed:,}" if missed else "")]
        sizes, lines = np.diff(ends, prepend=0), lines + self.repeated(held_out)
        if not val_contigs and (held_out[held_out > 0] == sizes[held_out > 0]).all():
            lines.append(f"held out {np.count_nonzero(held_out):,} whole contigs, by a hash of names: no "
                         f"contig's last 1 % holds a window of {length} bases (--val_contigs takes others)")
        sizes = np.diff(self.intervals)[:, 0]
        if self.bed:
            lines.append(f"bed      {(sizes < length).sum():,} of {len(sizes):,} stretches without N, "
                         f"{sizes[sizes < length].sum():,} bases, are shorter than a window: never read")
        if missed > n_known / 10:
            where = "intervals" if self.bed else "contigs"
            lines.append(f"warning: {missed:,} of {n_known:,} bases ({missed / n_known:.1%}) are never read, "
                         f"because they lie between N or in {where} too short for windows of {length} bases; "
                         f"use shorter windows{self.advice()}")
        return n_bases[0], self.about + lines


def open_genome(names, data_dir, cache=None, ambiguous="N", verify=False):
    """Opens the Genome of --genome: FASTA paths, or hg38 (chr1-22, X, Y of data_dir/hg38.fa.gz), or demo."""
    demo, hg38 = (os.path.join(data_dir, name) for name in ("demo.fa", "hg38.fa.gz"))
    if len(names) > 1 and {"demo", "hg38"} & set(names):
        raise ValueError(f"--genome {' '.join(names)}: hg38 and demo stand alone; name one, or FASTA files")
    paths, keep = {"demo": (demo, None), "hg38": (hg38, HG38_CONTIGS)}.get(names[0], (names, None))
    if paths == demo and not os.path.exists(demo):
        write_demo_genome(demo)
    if paths == hg38 and not os.path.exists(hg38):
        raise ValueError(f"{hg38}: no such file; get it (1 GB) with python -m tools.download hg38 --data_dir "
                         f"{data_dir}, or use --genome YOUR.fa, or --demo")
    return Genome(paths, cache, keep, ambiguous, verify)


def check_file(path):
    """Raises ValueError unless path is a regular file that can be read."""
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file; check the path")
    if not os.path.isfile(path):
        raise ValueError(f"{path}: not a regular file; give a plain or gzip file")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{path}: no permission to read it; chmod +r it or copy it")


@contextlib.contextmanager
def opened(path):
    """Opens a plain or gzip file for reading bytes; ValueError where that fails."""
    check_file(path)
    with open(path, "rb") as f:
        reader = gzip.open if f.read(2) == b"\x1f\x8b" else open
    try:
        with reader(path, "rb") as f:
            yield f
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise ValueError(f"{path}: damaged gzip file ({e}); download it again") from None


@contextlib.contextmanager
def stoppable(work):
    """Turns SIGINT, SIGTERM and SIGHUP within its block into one line and exit code 130, 143 or 129, so that
    what is half done can be removed. A signal that is ignored (nohup) stays so."""
    main = threading.current_thread() is threading.main_thread()               # only it may set handlers
    before = {which: now for which in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
              if main and (now := signal.getsignal(which)) not in (signal.SIG_IGN, None)}

    def stop(which, frame):
        for each in before:                                  # a second one must not disturb the removal
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + which)
    try:
        for which in before:
            signal.signal(which, stop)
        yield
    except SystemExit:
        print(f"stopped  by a signal while {work}; partial files are removed", file=sys.stderr, flush=True)
        raise
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


@contextlib.contextmanager
def new_path(path, folder=False, replace=False):
    """Makes a file (yielded open, binary) or a folder (its name) that becomes `path` once it is whole.
    Until then it lies beside `path`, under a name that no other process uses; an exception leaves nothing.
    replace: it may replace a file; else ValueError where there is one, also if it comes in the meantime."""
    path = os.fspath(path).rstrip("/") or "/"
    tmp, taken = f"{path}.{secrets.token_hex(4)}.tmp", f"{path}: already exists; name another one"
    is_empty = folder and os.path.isdir(path) and not os.listdir(path)
    if not replace and os.path.lexists(path) and not is_empty:
        raise ValueError(taken)
    try:
        if folder:
            os.mkdir(tmp)
            yield tmp
        else:
            with open(tmp, "xb") as f:
                yield f
        if not (folder or replace):
            open(path, "xb").close()                         # of two processes that come here, one fails
        os.replace(tmp, path)
    except OSError as e:
        if e.errno in (errno.EEXIST, errno.ENOTEMPTY):       # it came in the meantime
            raise ValueError(taken) from None
        if e.errno and str(e.filename or tmp).startswith(tmp):
            advice = "make its folder" if e.errno == errno.ENOENT else "free space"
            raise OSError(f"{path}: cannot be written ({e.strerror}); {advice}, or name another "
                          f"place") from None
        raise
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.unlink(tmp)


def file_digest(path, blocks=None, algorithm="sha256"):
    """Returns the checksum, in hexadecimal digits, of a file or of so many evenly spread blocks of 4 KiB."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as f:
        if blocks is None:
            for block in iter(lambda: f.read(1 << 20), b""):
                digest.update(block)
        else:
            for at in np.linspace(0, max(0, os.fstat(f.fileno()).st_size - 4096), blocks).astype(int):
                f.seek(at)
                digest.update(f.read(4096))
    return digest.hexdigest()


def file_fingerprint(path):
    """Returns [name, size, sha256]; for a file of more than 200 MB, the sha256 of 64 blocks, and what changes
    when it is replaced or written to: inode, mtime, and ctime, which no user can set."""
    check_file(path)
    stat = os.stat(path)
    known = [os.path.basename(path), stat.st_size]
    if stat.st_size <= HASHED:
        return [*known, file_digest(path)]
    return [*known, file_digest(path, 64), stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def cache_home():
    """Returns the user's cache folder."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "nanodna")


def open_cache(paths, cache, source):
    """Finds the cache of these FASTA files, or builds it in the first writable folder: (index, bases)."""
    roots = [cache] if cache else [os.path.dirname(os.path.abspath(paths[0])), cache_home()]
    keep, drawn = source["keep"], ["random"] * (source["ambiguous"] == "random")
    source["files"] = [file_fingerprint(path) for path in paths]
    for root in roots:
        key = json.dumps([[os.path.relpath(path, root) for path in paths], keep, *drawn])
        name = f"{os.path.basename(paths[0])}.{hashlib.sha256(key.encode()).hexdigest()[:8]}.nanodna"
        folder, error = os.path.join(root, name), "it does not read back as written"
        for _ in range(100):                                 # another process may remove the folder
            try:
                check_owner(folder, named=cache)
                found = read_cache(folder, paths, source) or lock_and_build(paths, source, folder)
            except FileNotFoundError as e:                   # removed meanwhile: once more
                found, error = None, e.strerror
            except OSError as e:                             # read-only, full or not ours: the next root
                error = e.strerror
                break
            if found:
                return found
    advice = "give another folder to --cache" if cache else "use --cache FOLDER"
    if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
        advice = f"its owner must chmod -R go+rX it; or {advice}"
    raise ValueError(f"{folder}: cannot read or write the genome cache ({error}); {advice}")


def check_owner(folder, named):
    """Raises PermissionError where a cache is another user's, unless --cache names its place: what others
    have planted in a folder where all may write must not become the genome."""
    with contextlib.suppress(FileNotFoundError):
        for owner in {os.lstat(folder).st_uid, os.stat(folder).st_uid} - {os.geteuid(), 0}:
            if not named:
                print(f"genome cache {folder}: belongs to another user (uid {owner}), not used; to trust it, "
                      f"give --cache {os.path.dirname(folder)}", flush=True)
                raise PermissionError(errno.EPERM, "it belongs to another user")


def make_folder(folder):
    """Makes the folder of a cache: nobody else may write to it, nor read it where the place is not ours.
    One that others could write to is made anew, because all of it may be theirs."""
    if os.path.isdir(folder) and os.stat(folder).st_mode & 0o022:          # others may write
        print(f"genome cache {folder}: {PLANTED}; building it again", flush=True)
        shutil.rmtree(folder)
    root = os.path.dirname(os.path.abspath(folder))
    os.makedirs(root, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o755 if os.stat(root).st_uid == os.geteuid() else 0o700)


def private(path, flags):
    """Opens a file as opener= of open(): follows no link; whoever can read the folder can read a new file."""
    return os.open(path, flags | os.O_NOFOLLOW, os.stat(os.path.dirname(path)).st_mode & 0o644)


def new_file(path):
    """Opens a new file of a cache for writing. What has its name, left by a kill or planted, is removed."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    return open(path, "xb", opener=private)


def lock_and_build(paths, source, folder):
    """Builds the cache under a lock, so that ranks that start together build it once.
    Returns index, bases where another process was faster, else None: the caller reads what was built."""
    with stoppable("packing the genome"):
        make_folder(folder)
        with open(os.path.join(folder, "lock"), "ab", opener=private) as lock:
            with contextlib.suppress(OSError):               # some network file systems have no locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name)):
                return None                                  # this locks a folder that was removed
            found = read_cache(folder, paths, source, verbose=True)
            if not found:
                build_cache(paths, source, folder)
            return found


def load_cache(folder):
    """Returns (index, bases) of a cache. ValueError and others where it is damaged or may be planted."""
    owners = {os.geteuid(), 0, os.stat(folder).st_uid}
    with (open(os.path.join(folder, "index.json"), "rb", opener=private) as text,
          open(os.path.join(folder, "bases.u8"), "rb", opener=private) as codes):
        for stat in (os.stat(folder), os.fstat(text.fileno()), os.fstat(codes.fileno())):
            if stat.st_mode & 0o022 or stat.st_uid not in owners:
                raise ValueError(PLANTED)
        content = text.read()
        index, crc = json.loads(content), zlib.crc32(content.rpartition(b', "crc_index": ')[0] + b"}")
        bases = np.memmap(codes, np.uint8, mode="c")
    if crc != index.pop("crc_index") or index["crc_bases"] != zlib.crc32(bases):
        raise ValueError("checksum")
    if index.get("format") != CACHE_FORMAT:
        raise ValueError(OTHER)
    for name in ("ends", "intervals", "case"):               # see packed
        index[name] = np.cumsum(np.frombuffer(zlib.decompress(base64.b64decode(index[name])), np.int64))
    return index, bases


def read_cache(folder, paths, source, verbose=False):
    """Returns (index, bases) of a cache that is whole and made from these sources, else None.
    The bases are the same mapping that was checked, because the files may be replaced at any moment."""
    if not os.path.exists(os.path.join(folder, "index.json")):
        return None
    try:
        index, bases = load_cache(folder)
        if index["source"] == source or is_unchanged(index, paths, source, folder):
            return index, bases
        reason = "the FASTA has changed"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, MemoryError) as e:
        if isinstance(e, MemoryError) or getattr(e, "errno", None) == errno.ENOMEM:
            raise ValueError(f"{folder}: not enough memory to map the genome; raise the limit (ulimit -v, or "
                             f"that of the job)") from None
        reason = str(e) if str(e) in (PLANTED, OTHER) else "it is damaged"
    if verbose:                                              # say why it is built again
        print(f"genome cache {folder}: {reason}; building it again", flush=True)
    return None


def is_unchanged(index, paths, source, folder):
    """Tells whether files that look changed hold what was packed, by all of their bytes; if so, notes
    their new inodes and times in the index, for the next time."""
    there, now = (x | {"files": [file[:2] for file in x["files"]]} for x in (index["source"], source))
    if there != now or index["digests"] != [file_digest(path) for path in paths]:
        return False
    with contextlib.suppress(OSError):                       # in a folder that is read only
        write_index(folder, index | {"source": source})
    return True


def pack_contigs(paths, source, write):
    """Passes the base codes of each contig to write(codes); returns their part of index.json as a dict."""
    contigs, intervals, size, crc, n_ambiguous, case = [], [], 0, 0, 0, []
    keep, drawn = source["keep"], source["ambiguous"] == "random"
    for path in paths:
        for name, codes, ambiguous, changes in fasta_records(path, drawn, case=True):
            if keep and name not in keep:
                continue
            contigs.append((path, name, len(codes)))
            case.append(changes + size)
            runs = re.finditer(rb"[^\4]+", codes)            # stretches without N
            intervals += [size + at for run in runs for at in run.span()]
            size, crc = size + len(codes), zlib.crc32(codes, crc)
            n_ambiguous += ambiguous
            write(codes)
    missing = set(keep or ()) - {name for _, name, _ in contigs}
    if missing:
        raise ValueError(f"{', '.join(paths)}: no contig {min(missing)}; check that it is the right genome")
    if not intervals:
        raise ValueError(f"{', '.join(paths)}: no A, C, G or T in it; check that it is the right file")
    if len({name for _, name, _ in contigs}) < len(contigs):                   # two files share it: file:name
        contigs = [(path, f"{os.path.basename(path)}:{name}", n) for path, name, n in contigs]
    if len({name for _, name, _ in contigs}) < len(contigs):
        raise ValueError(f"{contigs[-1][0]}: two files share their name and a contig's name; rename a file")
    contigs = [[name, n] for _, name, n in contigs]
    digest = hashlib.sha256(json.dumps([contigs, crc]).encode()).hexdigest()
    return {"names": [name for name, _ in contigs], "ends": np.cumsum([n for _, n in contigs]),
            "intervals": np.array(intervals), "case": np.concatenate(case), "n_ambiguous": n_ambiguous,
            "crc_bases": crc, "fingerprint": digest[:12]}


def packed(positions):
    """Turns positions (n,) int64, in order, into text for index.json that load_cache reads quickly."""
    return base64.b64encode(zlib.compress(np.diff(positions, prepend=0).tobytes())).decode()


def write_whole(path, text):
    """Writes a small file of a cache, whole or not at all."""
    tmp = f"{path}.{os.getpid()}.tmp"                        # ranks may write it at the same time
    try:
        with new_file(tmp) as f:
            f.write(text.encode())
        os.replace(tmp, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(tmp)
        raise


def write_index(folder, index):
    """Writes index.json with its checksum."""
    text = json.dumps(index, default=packed)
    text = f'{text[:-1]}, "crc_index": {zlib.crc32(text.encode())}}}'
    write_whole(os.path.join(folder, "index.json"), text)


def build_cache(paths, source, folder):
    """Checks and packs the FASTA files: writes bases.u8 and index.json under other names, then renames them.
    If that fails, it removes only what it has written: an older cache stays."""
    bases = os.path.join(folder, "bases.u8")
    try:
        with new_file(bases + ".tmp") as out:
            index = {"format": CACHE_FORMAT, "source": source}
            index["digests"] = [file[2] if file[1] <= HASHED else file_digest(path)
                                for file, path in zip(source["files"], paths)]
            index |= pack_contigs(paths, source, out.write)
        os.replace(bases + ".tmp", bases)
        write_index(folder, index)
    except FileNotFoundError:                                # another process removed the folder, and may
        raise                                                # already work in a new one
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.unlink(bases + ".tmp")
        if not os.path.exists(os.path.join(folder, "index.json")):
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(e, MemoryError):
            raise MemoryError(f"{', '.join(paths)}: not enough memory to pack the largest contig; raise the "
                              f"limit (ulimit -v, or that of the job)") from None
        raise


def check_packed(index, bases, paths, source):
    """Raises ValueError unless the FASTA files, packed anew, give these bases: the cache may be another's."""
    digest, folder = hashlib.sha256(), os.path.dirname(bases.filename)
    with stoppable("comparing the genome cache with the FASTA"):
        again = pack_contigs(paths, source, digest.update)
    was, now = (json.dumps(x, default=packed) for x in (index, index | again))
    if was != now or digest.digest() != hashlib.sha256(bases).digest():
        raise ValueError(f"genome cache {folder}: it is not what the FASTA holds; delete it or use another")
    print(f"genome cache {folder}: equal to the FASTA, base by base", flush=True)


OTHER_FORMATS = (                                            # how a file starts, what it is and what to do
    (rb">", "FASTA, not a table; make one with columns sequence and label, for example by seqkit fx2tab"),
    (rb"BZh", "bzip2; unpack it with bunzip2"),
    (rb"PK[\x01-\x08]", "a zip archive or an Excel workbook; unpack it, or save the sheet as CSV UTF-8"),
    (rb"\xd0\xcf\x11\xe0", "an old Excel workbook; save the sheet as CSV UTF-8"),
    (rb"(?s:.{257})ustar", "a tar archive; unpack it"),
    (rb"\(\xb5/\xfd", "Zstandard; unpack it with unzstd"), (rb"\xfd7zXZ", "xz; unpack it with unxz"),
    (rb"7z\xbc\xaf|Rar!", "an archive; unpack it"), (rb"\x04\x22M\x18", "LZ4; unpack it with unlz4"),
    (rb"C'A\x1a|\x1aA'C", "2bit; convert it with twoBitToFa"),
    (rb"BAM\x01|CRAM|@(HD|SQ|RG|PG)\t", "SAM, BAM or CRAM; convert it with samtools fasta"),
    (rb"@", "FASTQ; convert it, for example with seqkit fq2fa"),
    (rb"##fileformat=VCF|#CHROM\t|BCF|\S+\t\d+\t\S+\t[ACGTN]+\t",
     "VCF, only differences; make sequences with bcftools consensus -f GENOME.fa"),
    (rb"\S+(\t\d+){4}(?!\S)", "a FASTA index; give the FASTA itself"),
    (rb"(track|browser) |(#.*\n)*\S+[\t ]+\d+[\t ]+\d+(?!\S)",
     "BED, only intervals; cut them out of the genome with bedtools getfasta -fi GENOME.fa -bed FILE"),
    (rb"##gff|(#.*\n)*[^\t\n]+\t[^\t\n]+\t\w+\t\d+\t\d+\t",
     "GFF or GTF, only intervals; cut them out of the genome with bedtools getfasta -fi GENOME.fa -bed FILE"),
    (rb"\x26\xfc\x8f\x88|\xeb\xf2\x89\x87|fixedStep|variableStep", "a browser track; it has no sequences"),
    (rb"(LOCUS|ID) {3}", "GenBank or EMBL; convert it, for example with seqret"),
    (rb"CLUSTAL|#NEXUS|# STOCKHOLM", "an alignment; convert it to FASTA without gaps"),
    (rb"\x89HDF|PAR1", "HDF5 or Parquet; convert it"), (rb"<", "an HTML page; download the file again"),
    (rb";(?!.*;)", "a ';' comment; remove it"),                # with a second one it is the header of a table
    (rb"version https://git-lfs", "a git-LFS pointer; run git lfs pull"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16; save it as plain text"))
BAD_LETTER = {b"U": "RNA? replace U by T", b"-": "a gap; remove alignment gaps",
              b".": "a gap; remove alignment gaps", b"*": "a stop codon; this may be protein",
              b"\r": "an old Mac line end", b"\0": "NUL; the file is damaged",
              b" ": "a blank inside a line; remove it", b"\t": "a tab inside a line; remove it",
              b">": "a header must start on its own line"}


def other_format(text):
    """Returns what the first bytes of a file show it to be, or None."""
    return next((what for start, what in OTHER_FORMATS if re.match(start, text[:1000])), None)


def file_start(path):
    """Returns the first bytes of a file, plain or gzip, without a byte-order mark or leading blanks."""
    with opened(path) as f:
        return f.read(1000).removeprefix(b"\xef\xbb\xbf").lstrip()


def fasta_records(path, drawn=False, case=False):
    """Yields (name, base codes uint8 (L,), number of IUPAC codes other than N) of each record, checked.
    Plain, gzip or bgzip; CRLF, blank lines, lower case and uneven lines are accepted.
    drawn: these codes become not N, but one of their bases, by the position. case: also case_edges."""
    seen, line = set(), 1
    for n_blank, record in raw_records(path):
        line += n_blank
        end = record.index(b"\n")
        header = record[:end].rstrip(b"\r")
        del record[:end + 1]                                 # in place: a contig is large
        if b"\r" in header:
            raise ValueError(f"{path}: line {line}: old Mac (CR) line ends; convert them to LF")
        word = re.match(rb">(\S+)", header)
        try:
            name = word[1].decode() if word else ""
        except UnicodeDecodeError:
            raise ValueError(f"{path}: line {line}: the name {quoted(word[1])} is not UTF-8; convert the "
                             f"file, for example with iconv -f latin1 -t utf-8") from None
        if not name:
            raise ValueError(f"{path}: line {line}: no name in the header ({quoted(header[:40])}); add one")
        if not name.isprintable():
            raise ValueError(f"{path}: line {line}: control character in the name {quoted(name)}; remove it")
        if name in seen:
            raise ValueError(f"{path}: line {line}: contig name {quoted(name)} occurs twice; rename one")
        seen.add(name)
        codes, n_ambiguous, n_lines = contig_codes(record, path, line, drawn)
        line += 1 + n_lines
        yield name, codes, n_ambiguous, *([case_edges(record)] if case else [])


def raw_records(path):
    """Yields (number of blank lines before it, bytearray) of each '>' record of a FASTA file."""
    with opened(path) as f:
        n_blank, record = 0, bytearray(f.readline(CHUNK).removeprefix(b"\xef\xbb\xbf"))
        while record and not record.strip():                 # blank lines before the first record
            n_blank, record = n_blank + 1, bytearray(f.readline(CHUNK))
        if not record:
            raise ValueError(f"{path}: the file is empty; check it")
        if not record.startswith(b">"):
            start = record.strip()
            other = other_format((record + f.read(1000)).lstrip())
            if not other and (b"," in start or b"\t" in start):
                other = "a table, not FASTA; write each row as a line >NAME and a line with its sequence"
            reason = f"this is {other}" if other else f"no header '>name' but {quoted(start[:40])}; add one"
            raise ValueError(f"{path}: line {n_blank + 1}: {reason}")
        while chunk := f.read(CHUNK):
            for i, part in enumerate(chunk.split(b">")):     # one byte is found 10 times faster than two
                if i and record.endswith(b"\n"):
                    yield n_blank, record
                    n_blank, record = 0, bytearray()
                record += b">" + part if i else part
    record += b"\n"
    yield n_blank, record


def contig_codes(body, path, line, drawn=False):
    """Turns the sequence lines under the header at `line` into codes (L,), the number of IUPAC codes but N,
    and the number of lines."""
    if b"\r" in body:
        body = body.replace(b"\r\n", b"\n").rstrip(b"\r")
    codes = np.frombuffer(body.translate(FASTA_CODE, b"\n"), np.uint8)
    highest = codes.max(initial=0)
    if highest > 5:                                          # blanks at line ends are fine, all else is not
        body = re.sub(rb"[ \t]+(?=\n|\Z)", b"", body)
        codes = np.frombuffer(body.translate(FASTA_CODE, b"\n"), np.uint8)
        highest = codes.max(initial=0)
    if not codes.size:
        raise ValueError(f"{path}: line {line}: contig without a sequence; remove it or complete the file")
    if highest > 5:
        bad = re.search(rb"[^\nATCGatcg" + AMBIGUOUS + rb"]", body)
        line += 1 + body.count(b"\n", 0, bad.start())
        hint = BAD_LETTER.get(bad.group().upper(), "no IUPAC code")
        letter = quoted(bad.group())
        raise ValueError(f"{path}: line {line}: {letter} is not a DNA letter ({hint}); {LETTERS_ONLY}")
    n_ambiguous, n_lines = int(np.count_nonzero(codes == 5)) if highest == 5 else 0, len(body) - len(codes)
    if n_ambiguous:
        codes = draw_bases(codes, body) if drawn else codes.clip(max=4)
    return codes, n_ambiguous, n_lines


def case_edges(body):
    """Returns where lower-case stretches start and end, in turn, in the letters of a contig: int64."""
    if body.isupper():
        return np.zeros(0, np.int64)
    lower = np.frombuffer(b"\0" + body.translate(IS_LOWER, b" \t\r\n") + b"\0", np.uint8)
    return np.flatnonzero(lower[1:] != lower[:-1])


def draw_bases(codes, body):
    """Returns the codes (L,) of a contig's lines with a base drawn for each 5 (an IUPAC code but N)."""
    letters = np.frombuffer(body.translate(None, b"\n").upper(), np.uint8)
    table = np.full((256, 6), 4, np.uint8)                   # each base of a letter equally often
    for letter, bases in DRAWN.items():
        table[ord(letter)] = np.tile(encode(bases), 6 // len(bases))
    at = np.flatnonzero(codes == 5)
    x = (at.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # splitmix64's mixing
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    codes = codes.copy()
    codes[at] = table[letters[at], (x >> np.uint64(33)) % np.uint64(6)]
    return codes


def read_bed(path, genome):
    """Reads a BED file, plain or gzip: intervals (n, 2) in positions of the genome, and a line about it."""
    found, renamed = [], set()
    with opened(path) as f:
        for n, line in enumerate(f, 1):
            words = line.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace").split()
            if not words or words[0] in ("track", "browser") or words[0].startswith("#"):
                continue
            contig, start, end = (*words, "", "")[:3]
            if contig not in genome.contigs:
                contig = contig[3:] if contig.startswith("chr") else f"chr{contig}"
                renamed.add(contig)
            size = genome.contigs.get(contig, 0)
            is_number = start.isdecimal() and end.isdecimal() and len(end) < 16
            if not (is_number and int(start) < int(end) <= size):
                wanted = f"0 <= start < end <= {size}" if size else f"contigs like {[*genome.contigs][0]}"
                raise ValueError(f"{path}: line {n}: {quoted(line.strip())} is not contig, start and end of "
                                 f"an interval of this genome; use {wanted}")
            found.append([genome.offsets[contig] + int(x) for x in (start, end)])
    if not found:
        raise ValueError(f"{path}: no intervals in it; check that it is the right file")
    line = f"bed      {path}: {len(found):,} intervals"
    if renamed:
        line += f"; its names of {', '.join(sorted(renamed)[:5])} (in all {len(renamed)}) differ by chr"
    return np.array(found), line


def parts_within(a, b):
    """Returns the parts of intervals a (n, 2) that lie in b (m, 2), in order. Those of a must not overlap."""
    at, n = np.concatenate([a[:, 1], a[:, 0], b[:, 0], b[:, 1]]), [len(a)] * 2 + [len(b)] * 2
    order = np.argsort(at, kind="stable")                    # at a position: ends of a, starts, ends of b
    in_a, in_b = (np.repeat(steps, n)[order].cumsum() > 0 for steps in ([-1, 1, 0, 0], [0, 0, 1, -1]))
    parts = at[order][np.diff(in_a & in_b, prepend=False)].reshape(-1, 2)
    return parts[parts[:, 0] < parts[:, 1]]


def window_table(intervals, length):
    """Returns draw_starts' table, by interval: shift from window number to start; count of windows so far."""
    counts = intervals[:, 1] - intervals[:, 0] - length + 1
    n_up_to = np.cumsum(counts)
    return intervals[:, 0] - (n_up_to - counts), n_up_to


def draw_starts(table, n, rng):
    """Draws n window starts (int64); each window of the table's intervals is equally likely."""
    shift, n_up_to = table
    number = rng.integers(n_up_to[-1], size=n)
    return number + shift[np.searchsorted(n_up_to, number, side="right")]


def to_device(x, device):
    """Copies a tensor or array of the host to a device. From pinned memory, a GPU does it without a wait."""
    x = x if torch.is_tensor(x) else torch.from_numpy(np.asarray(x))
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def take_windows(bases, starts, length):
    """Returns bases[start:start + length] for each start: uint8 tensor (n, length) on the device of bases."""
    if torch.is_tensor(bases):
        starts = to_device(starts, bases.device)
        return bases[starts[:, None] + torch.arange(length, device=bases.device)]
    return torch.from_numpy(np.lib.stride_tricks.sliding_window_view(bases, length)[starts])


def in_repeats(windows, starts, edges):
    """Tells which bases of windows (n, L) at `starts` are soft-masked: bool (n, L); None if edges is None."""
    if edges is None:
        return None
    at = torch.arange(windows.shape[1], device=edges.device)
    at = to_device(starts, edges.device)[:, None] + at
    return torch.searchsorted(edges, at, right=True) % 2 == 1


def either_strand(windows, soft=None):
    """Turns each window (n, L), with what is soft in it, to the other strand with probability 1/2."""
    flipped = torch.rand(len(windows), 1, device=windows.device) < 0.5
    windows = torch.where(flipped, reverse_complement(windows), windows)
    return windows, None if soft is None else torch.where(flipped, soft.flip(1), soft)


def token_weights(soft, k, stride, repeat_weight):
    """Returns the weights (n, T) of [CLS] k-mers [SEP]: a k-mer's is the mean of its bases', which have
    repeat_weight where soft (n, L), else 1."""
    weights = torch.where(soft, repeat_weight, 1.0)[:, None]
    return F.pad(F.avg_pool1d(weights, k, stride)[:, 0], (1, 1))


def resident(bases, device):
    """Moves the bases to a GPU where they take less than a third of its free memory; else leaves them."""
    if device.type == "cuda" and bases.nbytes < torch.cuda.mem_get_info(device)[0] / 3:
        return torch.from_numpy(bases).to(device)
    return bases


def score_guesses(bases, flank):
    """Returns (accuracy, nats) of guessing a base of codes (L,) or (B, L) by its frequency, and the same from
    `flank` bases on either side."""
    side = 4 ** flank
    tokens = kmer_tokens(torch.from_numpy(np.atleast_2d(bases)), 2 * flank + 1, 1).flatten()
    joint = torch.bincount(tokens, minlength=4 * side ** 2 + 5)[5:].double().view(side, 4, side)
    joint /= joint.sum()                                     # left, base, right
    base = joint.sum((0, 2))
    order0, flanks, whole = (torch.special.entr(p).sum().item() for p in (base, joint.sum(1), joint))
    return (base.max().item(), order0), (joint.max(1).values.sum().item(), whole - flanks)


def write_demo_genome(path):
    """Writes the synthetic genome of the demos: 4 contigs of 250 kb, the same on every machine.
    An order-3 Markov background; copies of 3 interspersed repeats of 300 bases over 15 % of it, with 10 % of
    their bases redrawn; a copy of DEMO_MOTIF about every 500 bases."""
    rng = np.random.default_rng(42)
    rows, length = 64, 4 * 250_000 // 64                     # 64 stretches side by side
    steps = np.cumsum(rng.dirichlet(np.full(4, 0.6), size=64), axis=1)         # P(next base | three bases)
    bases = np.empty((length, rows), np.uint8)
    context = rng.integers(64, size=rows)
    for t, u in enumerate(rng.random((length, rows))):
        bases[t] = (u[:, None] > steps[context][:, :3]).sum(1)
        context = (context * 4 + bases[t]) % 64
    genome = bases.T.reshape(-1).copy()
    repeats = rng.integers(4, size=(3, 300), dtype=np.uint8)
    for start in rng.integers(len(genome) - 300, size=len(genome) * 15 // 100 // 300):
        mutated = rng.random(300) < 0.1
        genome[start:start + 300] = np.where(mutated, rng.integers(4, size=300), repeats[rng.integers(3)])
    motif = encode(DEMO_MOTIF)
    for start in rng.integers(len(genome) - len(motif), size=len(genome) // 500):
        genome[start:start + len(motif)] = motif
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with new_path(path, replace=True) as f:                  # ranks may write it at the same time
        for c, contig in enumerate(genome.reshape(4, -1), 1):
            f.write((f">demo{c}\n" + re.sub("(.{80})", r"\1\n", decode(contig)) + "\n").encode())


# A benchmark set. classes: names in the order of their ids (targets of a regression, labels of a multi-label
# set); length: bases, one number or from-to; rows: published row counts by split; folder: under data_dir, in
# the source's own layout.
Task = namedtuple("Task", "name suite classes regression metric length rows folder source licence multilabel",
                  defaults=[False])
# The sequences of a split. bases: uint8 codes, end to end; offsets: int64 (n + 1,), their limits in bases;
# labels: int64 (n,) ids, float64 (n, targets), bool (n, labels) or None; notes: {what is unusual but
# accepted: its rows}.
Rows = namedtuple("Rows", "bases offsets labels notes first", defaults=[None])
BINARY = "negative", "positive"
SUITES = {                                                   # suite: where it comes from, licence as stated
    "GUE": ("github.com/MAGICS-LAB/DNABERT_2 (GUE.zip)", "not stated"),
    "DeepSTARR": ("zenodo.org/records/5502060", "not stated"),
    "GenomicBenchmarks": ("zenodo.org/records/16605299 ({0}_v0.zip; or use --fasta and datasets/{0} of "
                          "github.com/ML-Bioinfo-CEITEC/genomic_benchmarks)",
                          "CC BY 4.0 (Zenodo), Apache-2.0 (repository)"),
    "MTcDNA": ("ftp.ensembl.org/pub (fasta/SPECIES/cdna/*.cdna.all.fa.gz)", "not stated"),
    "few-shot": ("github.com/roysoumya/GeneMask, curriculum-GeneMask (silencer)", "GPL-3.0"),
    "own": ("your own files", "yours"),
    "demo": ("the demo genome (written by this file)", "MIT")}


def task(suite, name, folder, length, metric="mcc", classes=BINARY, **rows):
    """Returns a Task; the suite decides how its files are read, and gives its source and licence."""
    source, licence = SUITES[suite]
    source = source.format(os.path.basename(folder))
    return Task(name, suite, classes, metric == "pcc", metric, str(length), rows, folder, source, licence)


def genomic(name, length, train, test, classes=BINARY):
    """Returns a Task of GenomicBenchmarks."""
    return task("GenomicBenchmarks", f"gb/{name}", f"GenomicBenchmarks/{name}", length, "acc", classes,
                train=train, test=test)


# A set of your own is one row: task("own", "mine", "my/folder", 300) reads my/folder/{train,dev,test}.csv.
# Row counts of GUE: DNABERT-2's appendix. The splice classes are what the middle of the sequences shows.
TASKS = {row.name: row for row in (
    task("GUE", "emp/H3",       "GUE/EMP/H3",                 500, train=11_971, test=1_497, dev=1_497),
    task("GUE", "emp/H3K14ac",  "GUE/EMP/H3K14ac",            500, train=26_438, test=3_305, dev=3_305),
    task("GUE", "emp/H3K36me3", "GUE/EMP/H3K36me3",           500, train=27_904, test=3_488, dev=3_488),
    task("GUE", "emp/H3K4me1",  "GUE/EMP/H3K4me1",            500, train=25_341, test=3_168, dev=3_168),
    task("GUE", "emp/H3K4me2",  "GUE/EMP/H3K4me2",            500, train=24_545, test=3_069, dev=3_069),
    task("GUE", "emp/H3K4me3",  "GUE/EMP/H3K4me3",            500, train=29_439, test=3_680, dev=3_680),
    task("GUE", "emp/H3K79me3", "GUE/EMP/H3K79me3",           500, train=23_069, test=2_884, dev=2_884),
    task("GUE", "emp/H3K9ac",   "GUE/EMP/H3K9ac",             500, train=22_224, test=2_779, dev=2_779),
    task("GUE", "emp/H4",       "GUE/EMP/H4",                 500, train=11_679, test=1_461, dev=1_461),
    task("GUE", "emp/H4ac",     "GUE/EMP/H4ac",               500, train=27_275, test=3_410, dev=3_410),
    task("GUE", "tf_m/0",       "GUE/mouse/0",                101, train=6_478, test=810, dev=810),
    task("GUE", "tf_m/1",       "GUE/mouse/1",                101, train=53_952, test=6_745, dev=6_745),
    task("GUE", "tf_m/2",       "GUE/mouse/2",                101, train=2_620, test=328, dev=328),
    task("GUE", "tf_m/3",       "GUE/mouse/3",                101, train=1_904, test=239, dev=239),
    task("GUE", "tf_m/4",       "GUE/mouse/4",                101, train=15_064, test=1_883, dev=1_883),
    task("GUE", "tf_h/0",       "GUE/tf/0",                   101, train=32_378, test=1_000, dev=1_000),
    task("GUE", "tf_h/1",       "GUE/tf/1",                   101, train=30_672, test=1_000, dev=1_000),
    task("GUE", "tf_h/2",       "GUE/tf/2",                   101, train=19_000, test=1_000, dev=1_000),
    task("GUE", "tf_h/3",       "GUE/tf/3",                   101, train=27_294, test=1_000, dev=1_000),
    task("GUE", "tf_h/4",       "GUE/tf/4",                   101, train=19_000, test=1_000, dev=1_000),
    task("GUE", "pd/all",       "GUE/prom/prom_300_all",      300, train=47_356, test=5_920, dev=5_920),
    task("GUE", "pd/notata",    "GUE/prom/prom_300_notata",   300, train=42_452, test=5_307, dev=5_307),
    task("GUE", "pd/tata",      "GUE/prom/prom_300_tata",     300, train=4_904, test=613, dev=613),
    task("GUE", "cpd/all",      "GUE/prom/prom_core_all",     70,  train=47_356, test=5_920, dev=5_920),
    task("GUE", "cpd/notata",   "GUE/prom/prom_core_notata",  70,  train=42_452, test=5_307, dev=5_307),
    task("GUE", "cpd/tata",     "GUE/prom/prom_core_tata",    70,  train=4_904, test=613, dev=613),
    task("GUE", "ssp/reconstructed", "GUE/splice/reconstructed", 400, "mcc", ("acceptor", "donor", "neither"),
         train=36_496, test=4_562, dev=4_562),
    task("GUE", "covid", "GUE/virus/covid", 999, "f1_macro", tuple("012345678"),
         train=77_669, test=7_000, dev=7_000),
    task("DeepSTARR", "eap", "DeepSTARR", 249, "pcc",
         ("Dev_log2_enrichment", "Hk_log2_enrichment"), train=402_296, test=41_186, dev=40_570),
    genomic("human_nontata_promoters",          251,        train=27_097, test=9_034),
    genomic("human_enhancers_cohn",             500,        train=20_843, test=6_948),
    genomic("human_enhancers_ensembl",          "2-573",    train=123_872, test=30_970),
    genomic("human_ensembl_regulatory",         "71-802",   train=231_348, test=57_713,
            classes=("enhancer", "ocr", "promoter")),
    genomic("human_ocr_ensembl",                "71-593",   train=139_804, test=34_952),
    genomic("dummy_mouse_enhancers_ensembl",    "331-4776", train=968, test=242),
    genomic("demo_coding_vs_intergenomic_seqs", 200,        train=75_000, test=25_000,
            classes=("coding_seqs", "intergenomic_seqs")),
    genomic("demo_human_or_worm", 200, train=75_000, test=25_000, classes=("human", "worm")),
    genomic("drosophila_enhancers_stark",       "236-3237", train=5_184, test=1_730),
    *(task("MTcDNA", f"mtcdna/{n}", "MTcDNA", n, "acc", ("mouse", "turtle")) for n in (1024, 4096, 8192)),
    task("few-shot", "prom_core", "fewshot/Prom-core", 70, "acc", BINARY, test=5_920),
    task("few-shot", "prom_300", "fewshot/Prom-300", 300, "acc", BINARY),
    task("few-shot", "cohn_enh", "fewshot/Cohn-enh", 500, "acc", BINARY),
    task("few-shot", "splice_40", "fewshot/Splice-40", 40, "acc", ("none", "donor", "acceptor"), test=3_000),
    task("few-shot", "silencer", "fewshot/silencer", "101-299", "acc", BINARY, test=1_657),
    task("demo", "demo", "demo", 200, "mcc", ("background", "motif"), train=4_000, test=500, dev=500),
)}
GROUPS = {group: [name for name in TASKS if name.split("/")[0] == group]
          for group in ("emp", "tf_m", "tf_h", "pd", "cpd", "ssp", "covid", "eap", "mtcdna")}
GROUPS["cmgems27"] = [name for group in ("emp", "tf_m", "tf_h", "pd", "cpd", "ssp") for name in GROUPS[group]]
GROUPS["gue28"] = [*GROUPS["cmgems27"], "covid"]
GROUPS["randommask28"] = [*GROUPS["cmgems27"], "eap"]
GROUPS["gb8"] = [name for name in TASKS if name.startswith("gb/") and "drosophila" not in name]
GROUPS["gb5"] = ["gb/human_nontata_promoters", "gb/demo_human_or_worm", "gb/human_enhancers_ensembl",
                 "gb/demo_coding_vs_intergenomic_seqs", "gb/human_enhancers_cohn"]          # Martinek et al.
FEW_SHOT = {                       # task: file with N shots, sets of N per class in it, test file (or files)
    "prom_core": ("{}/train.tsv", 1, "test.tsv"),
    "silencer": ("{}/train.tsv", 10, "{}/dev.tsv"),
    "splice_40": ("{0}/train_splice40_{0}.tsv", 10, "test.tsv"),
    "prom_300": ("{}/train.tsv", 1, "test.tsv", "test_standin.csv"),
    "cohn_enh": ("{}/train.tsv", 1, "test.tsv", "../../GenomicBenchmarks/human_enhancers_cohn/test.csv")}
GROUPS["fewshot"] = [*FEW_SHOT]
MTCDNA = {"Mus_musculus": 0, "Mus_spretus": 0, "Chelonoidis_abingdonii": 1, "Gopherus_agassizii": 1}
DELIMITER = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
WHOLE = re.compile(r"0|-?[1-9]\d*", re.ASCII)
DIGITS = re.compile(r"\d+", re.ASCII)                        # 01, 02, 10: names where one begins with a zero
CLASS_NAME = re.compile(r"(?!=|[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$)[^\x00-\x1f\x7f-\x9f\u2028\u2029]+",
                        re.IGNORECASE)


def task_names(args):
    """Turns names of groups and tasks into task names, each once."""
    for name in args:
        if name not in GROUPS and name not in TASKS:
            raise ValueError(f"task {quoted(name)} is unknown; use {' '.join([*GROUPS, *TASKS])}")
    return list(dict.fromkeys(name for arg in args for name in GROUPS.get(arg, [arg])))


def row_keys(rows, strands=True):
    """Returns one bytes object per sequence, to compare and count. A sequence and its reverse complement
    share the lesser of the two; strands=False tells them apart."""
    bases, offsets, n = rows.bases.tobytes(), rows.offsets.tolist(), len(rows.bases)
    keys = [bases[start:end] for start, end in zip(offsets, offsets[1:])]
    if not strands:
        return keys
    other = other_strands(rows).tobytes()
    return [min(key, other[n - end:n - start]) for key, start, end in zip(keys, offsets, offsets[1:])]


def first_rows(rows):
    """Returns for each row the number of the first row with its sequence, on either strand: int (n,)."""
    first = {}
    return np.array([first.setdefault(key, i) for i, key in enumerate(row_keys(rows))])


def rows_in(rows, others):
    """Tells which sequences of rows also occur in others: bool (n,)."""
    keys = set(row_keys(others))
    return np.array([key in keys for key in row_keys(rows)])


def fingerprint(splits):
    """Returns 12 hex digits of a digest of the sequences and labels of all splits.
    Targets count as float32; if that moves one by over a millionth of their sd, what it loses counts, too."""
    digest = hashlib.sha256()
    for bases, offsets, labels, *_ in filter(None, splits.values()):
        arrays = [bases, offsets, labels]
        if labels.ndim > 1:
            arrays[2] = labels.astype(np.float32)
            lost = labels - arrays[2]
            arrays += [lost] * bool((abs(lost) > 1e-6 * labels.std(0)).any())
        for array in arrays:
            digest.update(np.ascontiguousarray(array).view(np.uint8))
    return digest.hexdigest()[:12]


def similar_groups(rows):
    """Numbers the groups that equal sequences and near-duplicates form, also through others: int (n,).
    Two are near-duplicates if they share, on either strand, at least half as many different 15-mers as the
    shorter has 15-mers. It takes about as long as sorting all 15-mers: a 15-mer that more than 64 sequences
    hold links them in runs of 64, which chains a family without comparing all its pairs."""
    from scipy.sparse import coo_matrix, csgraph, csr_matrix
    different, of = np.unique(first_rows(rows), return_inverse=True)
    rows, n, links = take_rows(rows, different), len(different), []
    strands = torch.from_numpy(np.stack([rows.bases, reverse_complement(rows.bases)]))
    ids = kmer_tokens(strands, NEAR_K, 1).numpy()
    ids = np.minimum(ids[0], ids[1, ::-1])
    at, _ = members(np.diff(rows.offsets))
    whole = (ids != UNK) & (at[NEAR_K - 1:] == at[:len(ids)])                  # in one sequence, without N
    at = at[:len(ids)][whole]
    total, keys = np.bincount(at, minlength=n), np.sort(ids[whole] << 32 | at)
    keys = keys[np.diff(keys, prepend=-1) > 0]
    new = np.diff(keys >> 32, prepend=-1) > 0                                  # the first holder of a 15-mer
    size = np.diff(np.flatnonzero(new), append=len(new))
    size = np.repeat(size, size)
    keys, new, size = (x[size > 1] for x in (keys, new, size))
    column = np.cumsum(new | (size > NEAR_RUN) & (np.arange(len(new)) % NEAR_RUN == 0))
    held = csr_matrix((np.ones(len(keys), np.int32), (keys & 0xFFFFFFFF, column)), (n, len(keys) + 1))
    holders = held.T.tocsr()
    for start in range(0, n, 512):                           # bounds the memory
        shared = (held[start:start + 512] @ holders).tocoo()
        i, j = shared.row + start, shared.col
        near = shared.data >= NEAR_SHARE * np.minimum(total[i], total[j])
        links.append((i[near], j[near]))
    i, j = np.concatenate(links, 1)
    return csgraph.connected_components(coo_matrix((np.ones(len(i)), (i, j)), (n, n)))[1][of]


def rows_of(bases, lengths, labels, notes, **masks):
    """Makes Rows of base codes. Integer labels are class ids, floats are targets (n, targets), bools labels.
    masks: {name: bool over bases}; the rows that hold a True are counted in the notes."""
    if labels is not None:
        labels = np.asarray(labels)
        is_ids = labels.dtype.kind == "i"
        labels = labels.astype(np.int64 if is_ids else bool if labels.dtype.kind == "b" else np.float64)
        labels = labels if is_ids else labels.reshape(len(lengths), -1)
    rows, between = Rows(bases, np.concatenate([[0], np.cumsum(lengths)]), labels, {}), bases == BETWEEN
    rows = rows._replace(first=np.flatnonzero(between) - rows.offsets[:-1]) if between.any() else rows
    n_exact, keys = len(set(row_keys(rows, strands=False))), row_keys(rows)
    counts = {"duplicates": len(keys) - n_exact, "reverse_complements": n_exact - len(set(keys))}
    if labels is not None:                                   # of one sequence, on either strand
        counts["conflicting_labels"] = len(set(zip(keys, map(str, labels.tolist())))) - len(set(keys))
    for name, mask in {"with_n": bases == 4, **masks}.items():
        counts[name] = int(np.logical_or.reduceat(mask, rows.offsets[:-1]).sum())
    return rows._replace(notes=counts | notes)


def rows_from(sequences, labels=None, notes=None, places=None):
    """Makes Rows of DNA strings, or of pairs of strings. ValueError for what is not DNA; places: what to call
    each sequence there."""
    places, first, shown = places or [f"sequence {i}" for i in range(len(sequences))], None, sequences
    if sequences and not isinstance(sequences[0], str):
        for pair, place in zip(sequences, places):
            if not all(pair):
                raise ValueError(f"{place}: no sequence{'_2' * bool(pair[0])}; complete or remove the pair")
        first, shown = [len(a) for a, _ in sequences], [" ".join(pair) for pair in sequences]
        sequences = [f"{a}N{b}" for a, b in sequences]
    text, lengths = "".join(sequences), np.array(list(map(len, sequences)))
    ascii_codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8)
    bases = CODE[ascii_codes]
    if not lengths.all():
        raise ValueError(f"{places[lengths.argmin()]}: no sequence; complete or remove it")
    if bases.max() > 4:
        at = int(np.argmax(bases > 4))
        row = int(np.searchsorted(np.cumsum(lengths), at, side="right"))
        hint = BAD_LETTER.get(text[at].upper().encode(), f"in {quoted(shown[row][:40])}")
        raise ValueError(f"{places[row]}: {quoted(text[at])} is not a DNA letter ({hint}); {LETTERS_ONLY}")
    if first:
        bases[np.cumsum(lengths) - lengths + first] = BETWEEN
    is_n = ascii_codes & 0xDF == ord("N")                    # N or n
    return rows_of(bases, lengths, labels, notes or {}, lower_case=ascii_codes > ord("Z"),
                   ambiguous=(bases == 4) & ~is_n)


def as_rows(sequences):
    """Makes Rows of what a user gives: strings, or pairs of strings. Rows stay as they are."""
    if isinstance(sequences, Rows):
        return sequences
    found = [] if isinstance(sequences, str | dict) else list(sequences)
    kinds = {str if isinstance(x, str) else (*map(type, x),) if isinstance(x, tuple) else None for x in found}
    if kinds not in ({str}, {(str, str)}):
        raise ValueError(f"sequences: {quoted(str(sequences)[:40])}: give a list of one string or more, "
                         f"or of one pair (string, string) or more")
    return rows_from(found)


def halves(rows):
    """Returns the offsets of the parts of pairs: the first sequence, what is between them, the second."""
    start = rows.offsets[:-1]
    return np.append(np.stack([start, start + rows.first, start + rows.first + 1], 1), rows.offsets[-1])


def lengths_of(rows, index):
    """Returns the lengths of these sequences: int (B,)."""
    return rows.offsets[index + 1] - rows.offsets[index]


def gathered(bases, starts, lengths, width, fill):
    """Returns bases[start:start + length] of each row, (B, width): longer ones cut, shorter ones filled."""
    at = torch.arange(width, device=bases.device)
    starts, lengths = (to_device(x, bases.device)[:, None] for x in (starts, lengths))
    return bases[(starts + at).clamp_(max=len(bases) - 1)].masked_fill(at >= lengths, fill)


def padded(rows, index, width, fill):
    """Returns the bases (B, width) of these sequences: longer ones cut, shorter ones filled."""
    return gathered(rows.bases, rows.offsets[index], lengths_of(rows, index), width, fill)


def members(sizes):
    """Returns for each member of groups of these sizes the number of its group, and its place there."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    return group, np.arange(len(group)) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def bases_read(rows, lengths, k=1, stride=1):
    """Counts the bases in k-mers without N within the first `lengths` bases of each sequence: (n,)."""
    row, at = members(np.diff(rows.offsets))
    first = np.flatnonzero((at % stride == 0) & (at + k <= lengths[row]))      # of each k-mer
    n_known = np.concatenate([[0], np.cumsum(rows.bases < 4)])
    first = first[n_known[first + k] - n_known[first] == k]
    edges = np.zeros(len(row) + 1, np.int32)
    edges[first] += 1
    edges[first + k] -= 1
    return np.add.reduceat(np.cumsum(edges[:-1]) > 0, rows.offsets[:-1], dtype=np.int64)


def kmer_counts(rows):
    """Counts the 5-mers without N: float32 (n, 1024); of a pair, those of both side by side (n, 2048)."""
    if rows.first is not None:
        counts = kmer_counts(rows._replace(offsets=halves(rows), first=None)).reshape(-1, 3, 4 ** KMER)
        return counts[:, ::2].reshape(len(counts), -1)
    ids = kmer_tokens(torch.from_numpy(rows.bases)[None], KMER, 1)[0].numpy()
    parts = (ids[start:max(end - KMER + 1, start)] for start, end in zip(rows.offsets, rows.offsets[1:]))
    return np.stack([np.bincount(part, minlength=4 ** KMER + 5)[5:].astype(np.float32) for part in parts])


def on_device(rows, device, labels=None):
    """Returns rows with their bases on the device, and with these labels."""
    return rows._replace(bases=torch.from_numpy(rows.bases).to(device), labels=labels)


def other_strands(rows):
    """Returns the bases of the reverse complements, last row first; the two of a pair keep their order."""
    if rows.first is None:
        return reverse_complement(rows.bases)
    offsets = halves(rows)
    end, size = (x.reshape(-1, 3)[::-1].ravel() for x in (offsets[1:], np.diff(offsets)))
    part, at = members(size)
    bases = rows.bases[end[part] - 1 - at]
    return bases ^ (bases < 4)


def both_strands(rows):
    """Returns Rows of n sequences and, behind them, their reverse complements: that of i is 2 n - 1 - i."""
    join = torch.cat if torch.is_tensor(rows.bases) else np.concatenate
    labels, first = (None if x is None else np.concatenate([x, x[::-1]]) for x in (rows.labels, rows.first))
    return rows._replace(bases=join([rows.bases, other_strands(rows)]), labels=labels, first=first,
                         offsets=np.concatenate([rows.offsets, 2 * len(rows.bases) - rows.offsets[-2::-1]]))


def mean_of_strands(outputs):
    """Averages outputs for the sequences of both_strands over the two strands: (n, ...)."""
    n = len(outputs) // 2
    return (outputs[:n] + outputs[n:][::-1]) / 2


def random_strands(index, n, seed, step):
    """Turns indices of n sequences into indices of both_strands, each on a strand drawn by (seed, step)."""
    other = np.random.default_rng((seed, step, 1)).random(len(index)) < 0.5
    return np.where(other, 2 * n - 1 - index, index)


def take_rows(rows, index):
    """Returns the rows of an index array, in its order, with those notes that the base codes can tell."""
    lengths = lengths_of(rows, index)
    row, at = members(lengths)
    bases = rows.bases[rows.offsets[index][row] + at]
    return rows_of(bases, lengths, None if rows.labels is None else rows.labels[index], {})


def classes_of(rows):
    """Returns the class of each row; 0 for all where there are none."""
    has_ids = rows.labels is not None and rows.labels.ndim == 1
    return rows.labels if has_ids else np.zeros(len(rows.offsets) - 1, int)


def split_rows(rows, fractions, seed, names=()):
    """Splits Rows at random, class by class, into one Rows per fraction of the different sequences.
    Scikit-learn's stratified split; equal sequences, on either strand, stay together and count with their
    first label. names: of the classes, for the message where one is too small."""
    from sklearn.model_selection import train_test_split
    first = first_rows(rows)
    parts, rest, classes = [], np.unique(first), classes_of(rows)
    try:
        for i, fraction in enumerate(fractions[:-1]):
            part, rest = train_test_split(rest, train_size=fraction / sum(fractions[i:]),
                                          stratify=classes[rest], random_state=seed)
            parts.append(part)
    except ValueError as e:
        raise ValueError(f"split {fractions}: {too_few(classes[np.unique(first)], names, e)}") from None
    return [take_rows(rows, np.flatnonzero(np.isin(first, part))) for part in (*parts, rest)]


def assign_groups(groups, classes, fractions, seed, where):
    """Returns the part of each row, int (n,), with groups (n,) kept whole. In random order, but the largest
    first, each goes where the fullest of its classes is the least full, the last ones where nothing is yet.
    where: how messages begin."""
    counts = np.zeros((groups.max() + 1, classes.max() + 1))
    np.add.at(counts, (groups, classes), 1)
    sizes, want = counts.sum(1), np.outer(fractions, counts.sum(0))
    have, part = np.zeros(want.shape), np.zeros(len(counts), int)
    order = np.random.default_rng(seed).permutation(len(counts))
    for n_left, group in zip(range(len(counts), 0, -1), order[np.argsort(-sizes[order], kind="stable")]):
        full, empty = ((have + counts[group]) / want)[:, counts[group] > 0].max(1), ~have.any(1)
        part[group] = np.where(empty | (n_left > empty.sum()), full, np.inf).argmin()
        have[part[group]] += counts[group]
    share, (small, *_, large) = sizes.max() / len(groups), sorted(fractions)
    said = f"{where}: {len(counts):,} groups, the largest with {share:.1%} of the rows"
    if share > large or not have.sum(1).all():
        raise ValueError(f"{said}: no split with shares of {fractions}; give the splits as tables")
    print(f"{said}{f', more than the smallest share ({small:.0%})' if share > small else ''}", flush=True)
    return part[groups]


def read_groups(path, by, delimiter=None):
    """Returns for split_table the path, its columns `by` (if a column) and split (if any), and row places."""
    wanted = {} if by in (None, "similarity") else {by: [by.lower()]}
    return path, *read_columns(path, wanted | {"split": ["split"]}, {"split"} - {by}, delimiter)


def split_table(table, rows, by, fractions, seed, names=()):
    """Splits a table into [train, dev, test] (None: no row): as its column split says; else, with `by`, in
    groups of rows with one value in that column, or of similar sequences; else by split_rows.
    fractions=None: 80, 10, 10 %. table: what read_groups returns."""
    shares, (path, columns, places) = fractions or (0.8, 0.1, 0.1), table
    if "split" in columns and by is not None:
        raise ValueError(f"{path}: line 1: the column split contradicts --split_by {by}; drop one of them")
    for name, column in columns.items():
        for text, place in zip(column, places):
            if not text or name == "split" and text.lower() not in SPLITS:
                allowed = ", ".join(SPLITS) if name == "split" else "any text"
                raise ValueError(f"{place}: {name} is {quoted(text)}; use {allowed}")
    if "split" in columns:
        part = np.array([SPLITS[text.lower()] for text in columns["split"]])
        print(f"{path}: split by its column split{', not by --split' if fractions else ''}", flush=True)
    elif by is None:
        return split_rows(rows, shares, seed, names)
    else:
        similar = by == "similarity"
        groups = similar_groups(rows) if similar else np.unique(columns[by], return_inverse=True)[1]
        part = assign_groups(groups, classes_of(rows), shares, seed, f"{path}: --split_by {by}")
    for i in np.setdiff1d(classes_of(rows), classes_of(rows)[part == 0]):
        raise ValueError(f"{path}: no row of {quoted(names[i])} is in train; split in another way")
    return [take_rows(rows, np.flatnonzero(part == i)) if i in part else None for i in range(3)]


def too_few(labels, names, error):
    """Returns in words why these labels of the different sequences cannot be split."""
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2:
        return f"{len(labels)} different sequences are too few ({error}); give more"
    rarest = int(classes[counts.argmin()])
    name = quoted(names[rarest]) if names else rarest
    return (f"{len(labels)} different sequences, of which class {name} has {counts.min()}: too few; give "
            f"more of it, leave it out, or give train, dev and test as tables")


def table_text(path):
    """Returns the text of a UTF-8 file, plain or gzip."""
    with opened(path) as f:
        content = f.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = content.count(b"\n", 0, e.start) + 1
        other = other_format(content)
        reason = f"this is {other}" if other else f"not UTF-8 text (byte {content[e.start]:#x}); convert it"
        raise ValueError(f"{path}: line {line}: {reason}") from None


def read_csv(path, delimiter):
    """Reads a CSV file strictly: header and rows (lists of str), 'FILE: line N' of each, start of the text.
    Blank lines are passed over; ValueError where no row follows the header."""
    csv.field_size_limit(1 << 24)
    text, rows, places, line = table_text(path), [], [], 1
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if len(row) > 1 or row and row[0].strip():
                rows.append(row)
                places.append(f"{path}: line {line}")
            line = reader.line_num + 1
    except csv.Error as e:
        raise ValueError(f"{path}: line {line}: {e}; correct its quotes or line ends") from None
    if len(rows) < 2:
        raise ValueError(f"{path}: empty, or no row below the header ({quoted(text[:40])}); check the file")
    return rows, places, text.lstrip()[:40]


def add_column_flags(add, *names):
    """Adds the flags that say which column of a table is what, and what is between columns."""
    for name in names:
        add(f"--{name}_column", metavar="COLUMN", help=f"tables: the column of the {name}s")
    add("--delimiter", type=delimiter, help="tables: what separates columns (comma in .csv, else tab)")


def delimiter(text):
    """Parses one character, or the word tab: an argparse type."""
    text = "\t" if text in ("tab", "\\t") else text
    if len(text) != 1 or text in "\r\n\"":
        raise argparse.ArgumentTypeError(f"expected one character, or tab, not {quoted(text)}")
    return text


def fractions(text):
    """Parses '0.8,0.1,0.1', three positive floats that sum to 1: an argparse type."""
    parts = [float(part) for part in text.split(",")]
    if len(parts) != 3 or min(parts) <= 0 or not math.isclose(sum(parts), 1):
        raise argparse.ArgumentTypeError(f"{text}: give three shares that sum to 1, as 0.8,0.1,0.1")
    return parts


def column_flags(args):
    """Returns what the flags of add_column_flags say: {sequence, label, id, delimiter: text or None}."""
    found = {name: getattr(args, f"{name}_column", None) for name in ("sequence", "label", "id")}
    return found | {"delimiter": getattr(args, "delimiter", None)}


def read_columns(path, wanted, optional=(), delimiter=None):
    """Reads columns of a CSV (.csv) or TSV (.tsv, .txt) file, plain or gzip; other columns are passed over.
    wanted: {name: its spellings in the header}; optional: names that may be missing there. Returns
    {name: list of str}, 'FILE: line N' of each row."""
    suffix = os.path.splitext(path.removesuffix(".gz"))[1].lower()
    if suffix not in DELIMITER:
        other = other_format(file_start(path))
        reason = f"this is {other}" if other else "no table by its name"
        raise ValueError(f"{path}: {reason}; use .csv (commas), .tsv or .txt (tabs)")
    try:
        delimiter = delimiter or DELIMITER[suffix]
        (header, *rows), (place, *places), start = read_csv(path, delimiter)
    except ValueError:
        if other := other_format(file_start(path)):
            raise ValueError(f"{path}: line 1: this is {other}") from None
        raise
    header, columns = [cell.strip().lower() for cell in header], {}
    for name, spellings in wanted.items():
        found = [i for i, cell in enumerate(header) if cell in spellings]
        if not found and name in optional:
            continue
        if len(found) != 1:
            if other := other_format(file_start(path)):
                raise ValueError(f"{place}: this is {other}")
            count = f"{len(found)} columns" if found else "no column"
            hint = f"{delimiter!r} between columns{column_advice(name, start, delimiter)}"
            raise ValueError(f"{place}: {count} {' or '.join(spellings)} in the header ({quoted(start)}); "
                             f"give exactly one, with {hint}")
        columns[name] = found[0]
    for row, place in zip(rows, places):
        if len(row) != len(header):
            raise ValueError(f"{place}: {len(row)} fields, but {len(header)} in the header; correct the row")
    return {name: [row[i].strip(" \t") for row in rows] for name, i in columns.items()}, places


def column_advice(name, start, delimiter):
    """Returns the flags that may help where a header that starts like this has no column of this name."""
    flags = [f"--{name}_column"] if name in ("sequence", "label", "id") else []
    others = {";": "';'", "\t": "tab"}
    flags += [f"--delimiter {word}" for c, word in others.items() if c in start and c != delimiter]
    return f" (or see {' and '.join(flags)})" if flags else ""


def label_kind(names):
    """Returns the pattern of a table's own labels: WHOLE if one is a whole number, else CLASS_NAME. If all
    are digits, one begins with a zero and no two are the same number, they are names: DIGITS."""
    codes = all(map(DIGITS.fullmatch, names)) and len({name.lstrip("0") for name in names}) == len(set(names))
    if codes and not all(map(WHOLE.fullmatch, names)):
        return DIGITS
    return WHOLE if any(map(WHOLE.fullmatch, names)) else CLASS_NAME


def class_ids(texts, classes, places):
    """Turns labels into ids; returns the ids and the classes in their order. '1.0' and '+1' are 1.
    classes=None takes those found, sorted: all whole numbers or all names, and at least two."""
    names = {text: re.sub(r"^(?:\+|(-))?(\d+)(?:\.0*)?$", r"\1\2", text) for text in dict.fromkeys(texts)}
    kind = label_kind(names.values())
    for text, name in names.items():
        known = name in classes if classes else kind.fullmatch(name)
        if not known:
            advice = f"use one of {', '.join(classes)}" if classes else "use only whole numbers or only names"
            if not classes and re.search(r"[\x00-\x1f\x7f-\x9f]", text):
                advice = "remove the control character"
            if NUMBER.fullmatch(text) and float(text) % 1 > 0:
                advice += "; for a regression give --targets label"
            raise ValueError(f"{places[texts.index(text)]}: label {quoted(text)} is not a class; {advice}")
    if not classes:
        classes = tuple(sorted(set(names.values()), key=int if kind is WHOLE else None))
        if len(classes) < 2:
            raise ValueError(f"{places[0]}: label {quoted(texts[0])} in all rows; give two classes or more")
    ids = {name: i for i, name in enumerate(classes)}
    return [ids[names[text]] for text in texts], classes


def numbers(columns, places):
    """Turns columns of text into one tuple of finite floats per row."""
    for column in columns.values():
        for text, place in zip(column, places):
            if not NUMBER.fullmatch(text):
                raise ValueError(f"{place}: {quoted(text)} is not a finite decimal number; correct it")
            if abs(float(text)) > 3e38:
                raise ValueError(f"{place}: {quoted(text)} is beyond 3e38; give the column in other units")
    return list(zip(*(map(float, column) for column in columns.values())))


def zeros_and_ones(columns, places):
    """Turns columns of 0 and 1 into one tuple of bools per row."""
    for name, column in columns.items():
        for text, place in zip(column, places):
            if text not in ("0", "1", "0.0", "1.0"):
                raise ValueError(f"{place}: {name} is {quoted(text)}; a label of --multilabel is 0 or 1")
    return list(zip(*([float(text) == 1 for text in column] for column in columns.values())))


def join_kmers(text, place):
    """Turns overlapping k-mers with spaces between them into the sequence they were made from."""
    k = text.index(" ")
    sequence = text[::k + 1] + text[len(text) - k + 1:]
    if " ".join(sequence[i:i + k] for i in range(len(sequence) - k + 1)) != text:
        raise ValueError(f"{place}: blanks in {quoted(text)}, which is not overlapping k-mers; remove them")
    return sequence


def read_table(path, classes=None, targets=None, labels=True, multilabel=False, flags=column_flags(None)):
    """Reads a table with columns sequence (or seq) and label (or class): sequences, labels, notes.
    classes: the labels in the order of their ids; None: notes["classes"] holds those found, sorted.
    targets: number columns of a regression, or of 0 and 1 (multilabel); labels=False: sequences only, and
    notes["names"], a column id or name, if there is one of them; flags: of column_flags. K-mer text is
    joined. With a column sequence_2 the sequences are pairs."""
    wanted = {"sequence": ["sequence", "seq"], "sequence_2": ["sequence_2"]}
    wanted |= {name: [name.lower()] for name in targets or ()}
    if labels and not targets:
        wanted["label"] = ["label", "class"]
    wanted |= {} if labels else {"id": ["id"]} if flags["id"] else {"id": ["id"], "name": ["name"]}
    wanted |= {name: [flags[name].lower()] for name in {*wanted} - {*(targets or ())} if flags.get(name)}
    if wanted["sequence"] == ["sequence_2"]:                 # the second of each pair alone
        del wanted["sequence_2"]
    optional = ("sequence_2",) if flags["id"] or labels else ("id", "name", "sequence_2")
    columns, places = read_columns(os.fspath(path), wanted, optional, flags["delimiter"])
    texts, notes = [columns.pop(x) for x in ("sequence", "sequence_2") if x in columns], {"kmer_text": 0}
    if not labels:
        notes["names"] = next(iter(columns.values())) if len(columns) == 1 else None
        for name, place in zip(notes["names"] or (), places):
            if not name or not name.isprintable():
                raise ValueError(f"{place}: {quoted(name)} is not a name; give one without control codes")
    for column, i in itertools.product(texts, range(len(places))):
        if " " in column[i]:
            column[i] = join_kmers(column[i], places[i])
            notes["kmer_text"] += 1
    sequences = texts[0] if len(texts) == 1 else list(zip(*texts))
    rows_from(sequences, places=places)                      # ValueError where one is not DNA
    if targets:
        return sequences, (zeros_and_ones if multilabel else numbers)(columns, places), notes
    if not labels:
        return sequences, None, notes
    ids, found = class_ids(columns["label"], classes, places)
    return sequences, ids, notes if classes else notes | {"classes": found}


def read_own_tables(paths, columns, multilabel, flags):
    """Reads a user's tables, the classes as in the first one: a list of Rows, and the classes in their order,
    or the columns if there are any: of targets, or of labels (multilabel). flags: of column_flags."""
    sequences, labels, notes = read_table(paths[0], None, columns, True, multilabel, flags)
    classes = tuple(columns or notes.pop("classes"))
    rows = [rows_from(sequences, labels, notes)]
    pairs = rows[0].first is not None
    print(f"{paths[0]}: {len(labels):,} rows; {rows[0].notes}{', pairs (sequence_2)' * pairs}", flush=True)
    if columns:
        describe_targets(rows[0].labels, columns)
    else:
        say_confusing(classes)
    for path in paths[1:]:
        rows.append(rows_from(*read_table(path, classes, columns, True, multilabel, flags)))
        if pairs != (rows[-1].first is not None):
            raise ValueError(f"{paths[0]}, {path}: only one has a column sequence_2; give it in all, or in "
                             f"none")
    return rows, classes


def say_confusing(names):
    """Prints which classes a reader would take for one, and which are lists of others."""
    alike = {}
    for name in names:
        form = unicodedata.normalize("NFKC", name).casefold()
        seen = "".join(c for c in form if unicodedata.category(c) not in ("Cf", "Zs"))         # not invisible
        alike.setdefault(seen, []).append(ascii(name))
    for group in alike.values():
        if len(group) > 1:
            print(f"  note: the classes {', '.join(group)} differ only in case, blanks or Unicode form",
                  flush=True)
    several = [name for name in names if set(re.split("[;,|] *", name)) & {*names} - {name}]
    if several:
        print(f"  note: lists of labels ({len(several)}, such as {ascii(several[0])}) are classes of their "
              f"own; to learn each label, give 0/1 columns and --multilabel", flush=True)


def describe_targets(labels, names):
    """Prints how many values each target has, or rows each label, and what a target of 0 and 1 calls for."""
    if labels.dtype == bool:
        print(f"  {', '.join(f'{name} {n:,}' for name, n in zip(names, labels.sum(0)))}", flush=True)
        return
    values = {name: np.unique(x) for name, x in zip(names, labels.T)}
    print(f"  different values: {', '.join(f'{name} {len(x):,}' for name, x in values.items())}", flush=True)
    binary = [name for name, x in values.items() if set(x) <= {0, 1}]
    if binary:
        print(f"  {', '.join(binary)}: only 0 and 1, which --targets trains as a regression (MSE, PCC); for "
              f"labels use --multilabel", flush=True)


def find(folder, *names):
    """Returns the path of the first of these files that exists, plain or .gz; None where none does."""
    paths = (os.path.join(folder, name + suffix) for name in names for suffix in ("", ".gz"))
    return next(filter(os.path.exists, paths), None)


def how_to_get(task, data_dir):
    """Returns the end of a message on files that are missing in --data_dir."""
    if task.suite == "own":
        return f"({task.name}); check --data_dir and the task's row in data.py"
    where = "" if str(data_dir) == "data" else f" --data_dir {shlex.quote(str(data_dir))}"
    return f"({task.name}); run python -m tools.download {task.name}{where}, or get it from {task.source}"


def find_files(task, data_dir, wanted):
    """Returns the paths of a task's files. wanted: for each its name, and names of what may replace it."""
    folder = os.path.join(data_dir, task.folder)
    found = {names[0]: find(folder, *names) for names in wanted}
    missing = [name for name, path in found.items() if not path]
    if missing:
        raise ValueError(f"{folder}: no {', '.join(missing)} {how_to_get(task, data_dir)}")
    for name, path in found.items():
        if not find(folder, name):
            print(f"{task.name}: {name} is not there, {path} stands in for it", flush=True)
    return list(found.values())


def read_tables(task, data_dir, wanted):
    """Reads tables, {split: names as in find_files}, into {split: Rows}; labels are ids, or targets."""
    ids, targets = [str(i) for i in range(len(task.classes))], task.classes if task.regression else None
    paths = find_files(task, data_dir, wanted.values())
    return {split: rows_from(*read_table(path, ids, targets)) for split, path in zip(wanted, paths)}


def class_paths(task, data_dir, folder, suffix=""):
    """Returns the class files or folders of one split in the order of the ids, not of the directory."""
    entries = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    names = {name.removesuffix(".gz").removesuffix(suffix): name for name in entries if name[0] != "."}
    if set(names) != set(task.classes):
        raise ValueError(f"{folder}: holds {', '.join(names)[:80] or 'nothing'}, not the classes "
                         f"{', '.join(task.classes)} {how_to_get(task, data_dir)}")
    return [os.path.join(folder, names[name]) for name in task.classes]


def read_texts(path):
    """Reads a folder of one-sequence files: texts in the order of the file names, and the paths."""
    paths = [os.path.join(path, name) for name in sorted(os.listdir(path)) if name[0] != "."]
    if not paths:
        raise ValueError(f"{path}: the folder is empty; unpack the archive again")
    return [table_text(path).strip() for path in paths], paths


def read_intervals(path):
    """Reads a coordinate table: [(region, start, end, strand)], places. 0-based, half-open; '' is '+'."""
    columns, places = read_columns(path, {name: [name] for name in ("region", "start", "end", "strand")})
    intervals = []
    for place, region, start, end, strand in zip(places, *columns.values()):
        are_numbers = re.fullmatch(r"\d+ \d+", f"{start} {end}", re.ASCII)
        if not are_numbers or int(start) >= int(end) or strand not in ("", "+", "-"):
            raise ValueError(f"{place}: {quoted(f'{region}:{start}-{end} {strand}')} is not an interval; use "
                             f"whole numbers with 0 <= start < end, and strand '+', '-' or none")
        intervals.append((region, int(start), int(end), strand))
    return intervals, places


def region_key(name):
    """Returns what all spellings of a region share: no 'chr', no transcript version, one name for chrM."""
    name = re.sub(r"^chr|^(ENS\w+)\.\d+$", r"\1", name)
    return "MT" if name in ("M", "mitochondrion_genome") else name


def open_fasta(path):
    """Opens pyfaidx.Fasta over our own index of exactly this file, in the user's cache folder."""
    import pyfaidx
    key = hashlib.sha256(json.dumps(file_fingerprint(path)).encode()).hexdigest()[:12]
    index = os.path.join(cache_home(), f"{os.path.basename(path)}.{key}.fai")
    try:
        if not os.path.exists(index):
            os.makedirs(cache_home(), exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache_home()) as tmp:
                pyfaidx.Faidx(path, indexname=os.path.join(tmp, "fai")).close()
                os.replace(os.path.join(tmp, "fai"), index)
        return pyfaidx.Fasta(path, indexname=index, as_raw=True, rebuild=False)
    except (OSError, ValueError, LookupError, ImportError, pyfaidx.FastaIndexingError) as e:
        with open(path, "rb") as f:
            start = f.read(1000)
        if start.startswith(b"\x1f\x8b"):
            reason = "intervals cannot be cut out of a gzip file; unpack it with gunzip -k"
        elif other := not start.startswith(b">") and other_format(start):
            reason = f"this is {other}"
        else:
            reason = f"pyfaidx cannot index it ({quoted(str(e))}); mend it"
        raise ValueError(f"{path}: {reason}") from None


def cut_intervals(path, fasta):
    """Cuts the intervals of a coordinate table out of a pyfaidx.Fasta: sequences, places."""
    intervals, places = read_intervals(path)
    complement = str.maketrans("ACGTacgt", "TGCAtgca")       # other codes all become N
    contigs, sequences = {}, []
    for name in fasta.keys():
        contigs.setdefault(region_key(name), []).append(name)
    fix = f"in {fasta.filename} ({', '.join(list(fasta.keys())[:5])} ...); use the genome of the table"
    for place, (region, start, end, strand) in zip(places, intervals):
        matches = contigs.get(region_key(region), [])
        if len(matches) != 1:
            raise ValueError(f"{place}: region {quoted(region)} is {' and '.join(matches) or 'not'} {fix}")
        contig = fasta[matches[0]]
        if end > len(contig):
            raise ValueError(f"{place}: {region}:{start}-{end}, but {matches[0]} ends at {len(contig)} {fix}")
        text = contig[start:end]
        sequences.append(text.translate(complement)[::-1] if strand == "-" else text)
    n_unknown = sum(not text.strip("Nn") for text in sequences)
    if n_unknown > len(sequences) / 100:
        raise ValueError(f"{path}: {n_unknown} of {len(sequences)} intervals are all N {fix}")
    return sequences, places


def coordinate_folder(task, data_dir):
    """Returns the folder of a task's coordinate tables: coordinates/SET, as published, or its own."""
    folder = find(data_dir, f"GenomicBenchmarks/coordinates/{task.name.removeprefix('gb/')}")
    return folder or os.path.join(data_dir, task.folder)


def read_classes(task, data_dir, folder, fastas):
    """Reads a split that has one coordinate table per class (with fastas), or one folder per class."""
    texts, labels, places = [], [], []
    for label, path in enumerate(class_paths(task, data_dir, folder, ".csv" if fastas else "")):
        sequences, where = cut_intervals(path, fastas[label]) if fastas else read_texts(path)
        texts += sequences
        labels += [label] * len(sequences)
        places += where
    return rows_from(texts, labels, None, places)


def read_genomic(task, data_dir, fastas):
    """Reads a set of GenomicBenchmarks: with FASTA files (one, or one per class, in order) from its
    coordinate tables; else from the package's class folders of one-sequence files; else from
    {train,test}.csv."""
    folder = os.path.join(data_dir, task.folder)
    if fastas:
        n, n_classes = len(fastas), len(task.classes)
        if len(set(map(os.path.realpath, fastas))) < n or n not in (1, n_classes):
            raise ValueError(f"--fasta {' '.join(map(str, fastas))}: {n} files for {n_classes} classes; give "
                             f"one, or a different one for each of {', '.join(task.classes)}")
        fastas = [open_fasta(os.fspath(path)) for path in fastas] * (n_classes // n)
        folder = coordinate_folder(task, data_dir)
    elif not any(os.path.isdir(os.path.join(folder, "train", name)) for name in task.classes):
        return read_tables(task, data_dir, {"train": ["train.csv"], "test": ["test.csv"]})
    folders = {split: os.path.join(folder, split) for split in ("train", "test")}
    return {split: read_classes(task, data_dir, folder, fastas) for split, folder in folders.items()}


def read_deepstarr(task, data_dir):
    """Reads the published FASTA and activity files, row by row; else sample tables, without a test split."""
    folder, splits = os.path.join(data_dir, task.folder), {"train": "Train", "dev": "Val", "test": "Test"}
    if find(folder, "sample_train.txt") and not find(folder, "Sequences_Train.fa"):
        print(f"{task.name}: sample tables, not the published splits; there is no test split", flush=True)
        return read_tables(task, data_dir, {"train": ["sample_train.txt"], "dev": ["sample_val.txt"]})
    fastas = [[f"Sequences_{name}.fa"] for name in splits.values()]
    tables = [[f"Sequences_activity_{name}.txt"] for name in splits.values()]
    paths = find_files(task, data_dir, fastas + tables)
    for split, fasta, table in zip(list(splits), paths, paths[3:]):
        columns, places = read_columns(table, {target: [target.lower()] for target in task.classes})
        codes = [record[1] for record in fasta_records(fasta)]
        if len(codes) != len(places):
            raise ValueError(f"{fasta}: {len(codes)} sequences, but {len(places)} rows in {table}; get both")
        labels = numbers(columns, places)
        splits[split] = rows_of(np.concatenate(codes), list(map(len, codes)), labels, {})
    return splits


def read_mtcdna(task, data_dir):
    """Reads the cDNA of two mice and two turtles: transcripts of more than 5,000 bases, cut or N-padded.
    60 % train, 20 % dev, 20 % test by train_test_split twice, seed 1 (FinDNA's code; unstratified)."""
    from sklearn.model_selection import train_test_split
    folder, length = os.path.join(data_dir, task.folder), int(task.length)
    bases, labels, sizes = [], [], []
    for species, label in MTCDNA.items():
        paths = glob.glob(os.path.join(glob.escape(folder), f"{species}*.fa*"))
        if len(paths) != 1:
            raise ValueError(f"{folder}: {len(paths)} files {species}*.fa ({task.name}); get one for each of "
                             f"{', '.join(MTCDNA)} from {task.source}")
        for _, codes, _ in fasta_records(paths[0]):
            sizes.append(len(codes))
            if len(codes) > 5000:
                bases.append(np.pad(codes[:length], (0, max(0, length - len(codes))), constant_values=4))
                labels.append(label)
    long = np.array([n for n in sizes if n > 5000])
    if len(long) < 5:
        raise ValueError(f"{folder}: only {len(long)} transcripts of more than 5,000 bases; check the files")
    print(f"{task.name}: {len(long)} of {len(sizes)} transcripts have more than 5,000 bases (mouse, turtle: "
          f"{np.bincount(labels)}); {(long > length).sum()} cut, {(long < length).sum()} padded", flush=True)
    rows = rows_of(np.concatenate(bases), np.full(len(long), length), labels, {})
    rest, test = train_test_split(np.arange(len(long)), test_size=0.2, random_state=1)
    train, dev = train_test_split(rest, test_size=0.25, random_state=1)
    return {"train": take_rows(rows, train), "dev": take_rows(rows, dev), "test": take_rows(rows, test)}


def read_few_shot(task, data_dir, shots, draw):
    """Reads N rows per class to train on, and the test file. No dev set: Splice-40's is part of its test.
    Where a file holds ten sets of N, draw 0..9 is one: a slice of each class after a seeded shuffle."""
    train, n_sets, *tests = FEW_SHOT[task.name]
    wanted = {"train": [train.format(shots)], "test": [name.format(shots) for name in tests]}
    if not 0 <= draw < 10:
        raise ValueError(f"{task.name}: draw {draw} does not exist; use 0 to 9")
    rows = read_tables(task, data_dir, wanted)
    labels = rows["train"].labels
    counts = np.bincount(labels, minlength=len(task.classes))
    if (counts != n_sets * shots).any():
        raise ValueError(f"{task.folder}/{wanted['train'][0]}: {counts.tolist()} rows by class, not {n_sets} "
                         f"x {shots} of each; get the file again")
    if n_sets > 1:
        order = np.random.default_rng(42).permutation(len(labels))
        order = order[np.argsort(labels[order], kind="stable")].reshape(-1, n_sets, shots)
        rows["train"] = take_rows(rows["train"], np.sort(order[:, draw].ravel()))
    return rows


def read_demo(task, data_dir):
    """Makes the demo task: windows of the demo genome without DEMO_MOTIF; every other gets it (class 1)."""
    genome, rng, splits = open_genome(["demo"], data_dir), np.random.default_rng(42), {}
    length, motif = int(task.length), encode(DEMO_MOTIF)
    hits = (np.lib.stride_tricks.sliding_window_view(genome.bases, len(motif)) == motif).all(1)
    n_before = np.concatenate([[0], np.cumsum(hits)])        # motifs that begin before each position
    for split, contigs in (("train", ("demo1", "demo2")), ("dev", ("demo3",)), ("test", ("demo4",))):
        n = task.rows[split]
        starts = np.concatenate([np.arange(genome.contigs[c] - length) + genome.offsets[c] for c in contigs])
        starts = starts[n_before[starts + length + 1 - len(motif)] == n_before[starts]]
        bases = take_windows(genome.bases, rng.choice(starts, n, replace=False), length).numpy()
        at = rng.integers(length + 1 - len(motif), size=(n // 2, 1)) + np.arange(len(motif))
        bases[np.arange(1, n, 2)[:, None], at] = motif
        splits[split] = rows_of(bases.ravel(), np.full(n, length), np.arange(n) % 2, {})
    return splits


def read_task(name, data_dir, shots=None, draw=0, fasta=None):
    """Reads a benchmark set: {"train", "dev", "test": Rows, or None where there is none}.
    shots, draw: of a few-shot task, rows per class (10) and number of the draw; fasta: see read_genomic."""
    if name not in TASKS:
        raise ValueError(f"task {quoted(name)} is not the name of one set; use {' '.join(TASKS)}")
    task = TASKS[name]
    if task.suite in ("GUE", "own"):
        splits = read_tables(task, data_dir, {split: [f"{split}.csv"] for split in ("train", "dev", "test")})
    elif task.suite == "GenomicBenchmarks":
        splits = read_genomic(task, data_dir, fasta)
    elif task.suite == "few-shot":
        splits = read_few_shot(task, data_dir, shots or 10, draw)
    else:
        read = {"DeepSTARR": read_deepstarr, "MTcDNA": read_mtcdna, "demo": read_demo}[task.suite]
        splits = read(task, data_dir)
    missing = [name for i, name in enumerate(task.classes) if i not in splits["train"].labels]
    if missing and not task.regression:
        raise ValueError(f"{os.path.join(data_dir, task.folder)}: no training row of {', '.join(missing)} "
                         f"({task.name}); get the whole set from {task.source}")
    return {split: splits.get(split) for split in ("train", "dev", "test")}
