"""DNA in, integer tensors out: base codes, genomes, k-mer tokens, span masks, benchmark sets.

Bases are uint8 codes A,T,C,G,N = 0,1,2,3,4 (DNABERT's vocabulary order, so the complement is code XOR 1);
k-mer ids are 5 + the k-mer read as a base-4 number, behind [PAD] [UNK] [CLS] [SEP] [MASK] = 0..4.
Coordinates are 0-based and half-open, as in BED. Mistakes in the input raise ValueError with one line that
says where, what and what to do. `python data.py TASK...` reports on benchmark sets (TASKS, GROUPS).
"""
import argparse
import contextlib
import csv
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
import shutil
import zlib
from collections import namedtuple

import numpy as np
import torch
import torch.nn.functional as F

LETTERS = "ATCGN"
PAD, UNK, CLS, SEP, MASK = range(5)
BLANK = 5                                                    # base code of no base: zeros in one_hot
AMBIGUOUS = b"NRYSWKMBDHVnryswkmbdhv"                        # IUPAC codes of more than one base: all become N
CODE = np.full(256, 255, np.uint8)                           # byte -> base code; 255 = not DNA
CODE[np.frombuffer(AMBIGUOUS, np.uint8)] = 4
CODE[np.frombuffer(b"ATCGatcg", np.uint8)] = [0, 1, 2, 3] * 2
HG38_URL = "https://hgdownload.soe.ucsc.edu/goldenPath/hg38/bigZips/hg38.fa.gz"
HG38_CONTIGS = [f"chr{c}" for c in (*range(1, 23), "X", "Y")]
CHUNK = 1 << 23                                              # bytes read from a FASTA at a time
DEMO_MOTIF = "TGACTCAGCATG"                                  # planted in the demo genome and in the demo task


def encode(text, width=None):
    """DNA text, any case -> uint8 codes (L,): A,T,C,G,N = 0..4, IUPAC codes are N. ValueError on the rest,
    which names the sequence, too, where the text is sequences of `width` letters."""
    bases = CODE[np.frombuffer(text.encode("ascii", "replace"), np.uint8)]
    if bases.size and bases.max() > 4:
        at = int(np.argmax(bases > 4))
        place = f"sequence {at // width}, position {at % width}" if width else f"position {at}"
        raise ValueError(f"{place}: not a DNA letter ({text[at]!r}); use A, C, G, T, N or IUPAC codes")
    return bases


def decode(bases):
    """uint8 codes (L,) -> text over ATCGN."""
    return np.frombuffer(LETTERS.encode(), np.uint8)[np.asarray(bases)].tobytes().decode()


def reverse_complement(bases):
    """Codes (..., L), numpy or torch -> the other strand read 5' to 3'. N stays N; an involution."""
    flipped = bases.flip(-1) if torch.is_tensor(bases) else np.asarray(bases)[..., ::-1]
    return flipped ^ (flipped < 4)


@functools.cache
def channels(device):
    """(6, 5): the row of base code A,T,C,G,N in the channels A,C,G,T,N (FinDNA's order), and one of zeros."""
    return torch.eye(6, 5, device=device)[torch.tensor([0, 3, 1, 2, 4, 5], device=device)]


def one_hot(bases):
    """Codes (B, L) -> float (B, L, 5), channels A,C,G,T,N; a BLANK (masked, padding, [CLS]) is all zeros."""
    return F.embedding(bases.int(), channels(bases.device))


def kmer_tokens(bases, k, stride, specials=False):
    """Codes (B, L) uint8 -> k-mer ids (B, (L - k) // stride + 1) int64; a k-mer with an N is [UNK].
    stride 1: DNABERT's overlapping tokens; stride k: non-overlapping ones (a rest of < k bases is dropped).
    specials: with [CLS] before and [SEP] behind."""
    codes = bases.to(torch.int16 if k < 8 else torch.int32)
    ids, width = codes, 1
    for bit in bin(k)[3:] if bases.shape[1] >= k else "":    # double and add: 3 passes for k = 6
        ids, width = torch.add(ids[:, width:], ids[:, :-width], alpha=4 ** width), 2 * width
        if bit == "1":
            ids, width = torch.add(codes[:, width:], ids[:, :-1], alpha=4), width + 1
    ids = ids[:, ::stride] + 5 if width == k else ids[:, :0]
    if ids.numel() and (bases.is_cuda or bases.max() > 3):   # asking a GPU would make it wait
        seen = F.pad((bases > 3).cumsum(1), (1, 0))
        ids = ids.masked_fill((seen[:, k:] != seen[:, :-k])[:, ::stride], UNK)
    if not specials:
        return ids.to(torch.int64)
    tokens = ids.new_empty((len(ids), ids.shape[1] + 2), dtype=torch.int64)
    tokens[:, 0], tokens[:, -1], tokens[:, 1:-1] = CLS, SEP, ids
    return tokens


def tokenize(sequences, k=6, stride=1):
    """List of DNA strings -> ids (B, T + 2): [CLS] k-mers [SEP], right-padded with [PAD] to the longest.
    A sequence shorter than k gives [CLS] [SEP]."""
    longest = max(map(len, sequences), default=0)
    bases = encode("".join(s.ljust(longest, "N") for s in sequences), longest)
    bases = torch.from_numpy(bases.reshape(len(sequences), longest))
    tokens = kmer_tokens(bases, k, stride, specials=True)
    n = torch.tensor([max(0, (len(s) - k) // stride + 1) for s in sequences])[:, None]    # k-mers of each row
    at = torch.arange(tokens.shape[1])
    return tokens.masked_fill(at == n + 1, SEP).masked_fill(at > n + 1, PAD)


def span_mask(centers, maskable, left, right):
    """Union of the spans c - left .. c + right around the centers, clipped to the maskable positions.
    centers, maskable: bool (B, T); left, right: int or (B,) tensor. Returns bool (B, T)."""
    left, right = (x[:, None] if torch.is_tensor(x) else x for x in (left, right))
    at = torch.arange(centers.shape[1], device=centers.device)
    # before[:, i] = centers in [0, i), in 16 bits: only differences count
    before = F.pad((centers & maskable).cumsum(1, dtype=torch.int16), (1, 0))
    first = (at - right).clamp_(min=0).expand_as(centers)    # position i is hidden by any center in
    end = (at + (left + 1)).clamp_(max=len(at)).expand_as(centers)             # i - right .. i + left
    return (before.gather(1, end) - before.gather(1, first)).bool() & maskable


def draw_centers(shape, p, device):
    """bool (B, T): every position a center with probability p, independently of the others. Drawn as the
    gaps between centers, which are geometric: far fewer random numbers than positions. There are gaps for
    the mean + 10 standard deviations + 10 centers: never too few."""
    B, T = shape
    n = math.ceil(T * p + 10 * math.sqrt(T * p) + 10)
    gaps = torch.log1p(-torch.rand(B, n, device=device)).div_(math.log1p(-p)).floor_().add_(1)
    at = gaps.cumsum(1).sub_(1).clamp_(max=T).long()         # position in the row; T = behind its end
    at = torch.where(at < T, at + T * torch.arange(B, device=device)[:, None], B * T)
    centers = torch.zeros(B * T + 1, dtype=torch.bool, device=device)
    return centers.scatter_(0, at.flatten(), True)[:-1].view(B, T)


def corrupt(tokens, masked, n_vocab):
    """80/10/10: of the masked tokens 80 % become [MASK], 10 % a random k-mer (5..n_vocab-1), 10 % stay.
    tokens (B, T), masked bool (B, T) -> inputs (B, T), labels (B, T) with -100 where nothing is predicted."""
    n = n_vocab - 5                                          # one draw: 8 n [MASK], n k-mers, n unchanged
    draw = torch.randint(5 - 8 * n, 5 + 2 * n, tokens.shape, device=tokens.device)
    inputs = torch.where(masked & (draw < 5 + n), draw.clamp_(min=MASK), tokens)
    return inputs, torch.where(masked, tokens, -100)


class Genome:
    """One or more FASTA files, packed once into a validated, memory-mapped cache of base codes (1 byte each).
    cache: folder for the cache (default beside the FASTA); keep: names of contigs to take (default all)."""

    def __init__(self, paths, cache=None, keep=None):
        paths = [os.fspath(p) for p in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
        if len({os.path.realpath(p) for p in paths}) < len(paths):
            raise ValueError(f"{', '.join(paths)}: the same FASTA twice; name each file once")
        index, self.bases = open_cache(paths, cache, keep and sorted(keep))     # bases: of all, end to end
        self.contigs = dict(index["contigs"])                # {name: length}
        self.offsets = dict(zip(self.contigs, np.cumsum([0, *self.contigs.values()]).tolist()))
        self.intervals = np.array(index["intervals"])        # (n, 2): stretches without N, positions in bases
        self.n_ambiguous = index["n_ambiguous"]
        self.fingerprint = index["fingerprint"]              # the same wherever the genome's file lies

    def __str__(self):
        n = len(self.bases) - int(np.diff(self.intervals).sum())
        return (f"{len(self.contigs)} contigs, {len(self.bases):,} bases, {n:,} N ({self.n_ambiguous:,} were "
                f"other IUPAC codes), fingerprint {self.fingerprint}")

    def fetch(self, contig, start, end, strand="+"):
        """Text of contig[start:end], 0-based half-open; strand '-' gives the reverse complement."""
        if contig not in self.contigs:
            raise ValueError(f"contig {show(contig)}: not in the genome; use one of "
                             f"{', '.join([*self.contigs][:5])} ...")
        if not 0 <= start < end <= self.contigs[contig] or strand not in ("+", "-"):
            raise ValueError(f"{contig}:{start}-{end} {strand!r}: not an interval of the contig; need 0 <= "
                             f"start < end <= {self.contigs[contig]} and strand '+' or '-'")
        bases = self.bases[self.offsets[contig] + start:self.offsets[contig] + end]
        return decode(reverse_complement(bases) if strand == "-" else bases)

    def split(self, length, val_contigs=()):
        """Intervals (n, 2) for training and for validation, each with room for a window of `length` bases.
        Validation is val_contigs where given, else the last 1 % of every contig whose 1 % holds a window."""
        unknown = set(val_contigs) - set(self.contigs)
        if unknown:
            raise ValueError(f"--val_contigs: {show(min(unknown))} is not in the genome; use some of "
                             f"{', '.join([*self.contigs][:5])} ...")
        sizes = np.array(list(self.contigs.values()))
        held = sizes * np.isin(list(self.contigs), val_contigs) if val_contigs else sizes // 100
        held[held < length] = 0
        start, end = self.intervals.T
        ends = np.cumsum(sizes)
        cut = (ends - held)[np.searchsorted(ends, start, side="right")]
        cut = np.clip(cut, start, end)                       # training up to here, validation behind it
        train, val = np.stack([start, cut], 1), np.stack([cut, end], 1)
        train, val = train[cut - start >= length], val[end - cut >= length]
        if not len(train) or not len(val):
            part = "validation, 1 % of a contig" if len(train) else "training"
            raise ValueError(f"genome too small: no window of {length} bases without N for {part} (longest "
                             f"{(end - start).max()}); lower --block_size or use --val_contigs")
        return train, val


def open_genome(names, data_dir, cache=None):
    """The Genome of --genome: FASTA paths; or hg38 (chr1-22, X, Y of data_dir/hg38.fa.gz); or demo."""
    demo, hg38 = (os.path.join(data_dir, name) for name in ("demo.fa", "hg38.fa.gz"))
    if len(names) > 1 and {"demo", "hg38"} & set(names):
        raise ValueError(f"--genome {' '.join(names)}: hg38 and demo stand alone; name FASTA files")
    if names[0] == "demo" and not os.path.exists(demo):
        write_demo_genome(demo)
    if names[0] == "hg38" and not os.path.exists(hg38):
        raise ValueError(f"{hg38}: no such file; get it (1 GB): python -m tools.download hg38 --data_dir "
                         f"{data_dir} (or use --genome YOUR.fa, or --demo)")
    paths, keep = {"demo": (demo, None), "hg38": (hg38, HG38_CONTIGS)}.get(names[0], (names, None))
    return Genome(paths, cache, keep)


def check_file(path):
    """ValueError unless path is a regular file that can be read."""
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file; check the path")
    if not os.path.isfile(path):
        raise ValueError(f"{path}: not a regular file; give a plain or gzip file")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{path}: no permission to read it; chmod +r it or copy it")


@contextlib.contextmanager
def opened(path):
    """A file open for reading bytes, plain or gzip; ValueError where that fails."""
    check_file(path)
    with open(path, "rb") as f:
        reader = gzip.open if f.read(2) == b"\x1f\x8b" else open
    try:
        with reader(path, "rb") as f:
            yield f
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise ValueError(f"{path}: damaged gzip file ({e}); download it again") from None


def file_fingerprint(path):
    """[name, size, mtime, hash of 64 blocks of 4 KiB]: all of a small file, a sample of a larger one."""
    check_file(path)
    stat, digest = os.stat(path), hashlib.sha256()
    with open(path, "rb") as f:
        for at in np.linspace(0, max(0, stat.st_size - 4096), 64).astype(int):
            f.seek(at)
            digest.update(f.read(4096))
    return [os.path.basename(path), stat.st_size, stat.st_mtime_ns, digest.hexdigest()]


def cache_home():
    """The user's cache folder."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "nanodna")


def open_cache(paths, cache, keep):
    """Finds the cache of these FASTA files or builds it where that can be written: (index, bases)."""
    roots = [cache] if cache else [os.path.dirname(os.path.abspath(paths[0])), cache_home()]
    source = [file_fingerprint(p) for p in paths] + [keep]
    for root in roots:
        key = json.dumps([[os.path.relpath(p, root) for p in paths], keep])
        name = f"{os.path.basename(paths[0])}.{hashlib.sha256(key.encode()).hexdigest()[:8]}.nanodna"
        folder, error = os.path.join(root, name), "it does not read back as written"
        for _ in range(100):                                 # another process may remove the folder
            if found := read_cache(folder, source, lambda *_, **__: None):
                return found
            try:
                os.makedirs(folder, exist_ok=True)
                with open(os.path.join(folder, "lock"), "w") as lock:
                    with contextlib.suppress(OSError):       # some network file systems have no locks
                        fcntl.flock(lock, fcntl.LOCK_EX)     # ranks that start together build it once
                    if not os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name)):
                        continue                             # the lock of a folder that was removed
                    if found := read_cache(folder, source):
                        return found
                    build_cache(paths, keep, source, folder)
            except FileNotFoundError as e:
                error = e.strerror
            except OSError as e:                             # read-only or full: the next place
                error = e.strerror
                break
    raise ValueError(f"{folder}: cannot write the genome cache ({error}); use --cache FOLDER")


def read_cache(folder, source, say=print):
    """(index, bases) of a cache that is whole and of these sources; else None, and says why it is built anew.
    The bases are the very mapping that was checked: files of these names may change at any moment."""
    if not os.path.exists(os.path.join(folder, "index.json")):
        return None
    try:
        with open(os.path.join(folder, "index.json")) as f:
            index = json.load(f)
        crc = index.pop("crc_index")
        bases = np.memmap(os.path.join(folder, "bases.u8"), np.uint8, mode="c")
        sound = crc == zlib.crc32(json.dumps(index).encode()) and index["crc_bases"] == zlib.crc32(bases)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        sound = False
    if sound and index["source"] == source:
        return index, bases
    say(f"genome cache {folder}: {'FASTA changed' if sound else 'damaged'}, building it again", flush=True)


def build_cache(paths, keep, source, folder):
    """Validates and packs the FASTA files: bases.u8, index.json (temp names, renamed)."""
    contigs, intervals, size, crc, n_ambiguous = [], [], 0, 0, 0
    files = [os.path.join(folder, name) for name in ("bases.u8", "index.json")]
    try:
        with open(files[0] + ".tmp", "wb") as out:
            for path in paths:
                for name, codes, ambiguous in fasta_records(path):
                    if keep and name not in keep:
                        continue
                    contigs.append((path, name, len(codes)))
                    edges = np.r_[0, np.flatnonzero(np.diff(codes == 4)) + 1, len(codes)]  # N begins or ends
                    edges = edges[codes[0] // 4:] + size     # from the first base that is none
                    intervals += edges[:len(edges) // 2 * 2].reshape(-1, 2).tolist()
                    size, crc = size + len(codes), zlib.crc32(codes, crc)
                    n_ambiguous += ambiguous
                    out.write(codes)
        if missing := set(keep or ()) - {name for _, name, _ in contigs}:
            raise ValueError(f"{', '.join(paths)}: without contig {min(missing)}; is it the right genome?")
        if not intervals:
            raise ValueError(f"{', '.join(paths)}: no A, C, G or T; is it the right file?")
        contigs = contig_names(contigs)
        fingerprint = hashlib.sha256(json.dumps([contigs, crc]).encode()).hexdigest()[:12]
        index = {"source": source, "contigs": contigs, "intervals": intervals, "n_ambiguous": n_ambiguous,
                 "crc_bases": crc, "fingerprint": fingerprint}
        with open(files[1] + ".tmp", "w") as f:
            json.dump(index | {"crc_index": zlib.crc32(json.dumps(index).encode())}, f)
        for file in files:
            os.replace(file + ".tmp", file)
    except FileNotFoundError:                                # another process removed the folder, and may
        raise                                                # be at work in a new one
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def contig_names(contigs):
    """[(path, name, length)] -> [[name, length]]; where two files share a name, all become file:name."""
    if len({name for _, name, _ in contigs}) < len(contigs):
        contigs = [(path, f"{os.path.basename(path)}:{name}", n) for path, name, n in contigs]
    if len({name for _, name, _ in contigs}) < len(contigs):
        raise ValueError(f"{contigs[-1][0]}: file and contig names both occur twice; rename a file")
    return [[name, n] for _, name, n in contigs]


NOT_FASTA = ((b"BZh", "bzip2; unpack it"), (b"PK", "a zip archive; unpack it"), (b"@", "FASTQ; convert it"),
             (b"<", "an HTML page; download the file again"), (b";", "a ';' comment; remove it"),
             (b"version https://git-lfs", "a git-LFS pointer"), (b"LOCUS", "GenBank; convert it"),
             (b"\xff\xfe", "UTF-16; save it as plain text"), (b"\xfe\xff", "UTF-16; save it as plain text"))
BAD_LETTER = {b"U": "RNA? replace U by T", b"-": "a gap; remove alignment gaps", b"*": "a stop: protein?",
              b".": "a gap; remove alignment gaps", b"\r": "old Mac line ends", b"\0": "NUL: a damaged file",
              b" ": "a blank inside a line; remove it", b"\t": "a tab inside a line; remove it",
              b">": "a header must start on its own line"}


def show(text):
    """Foreign text for a message: repr (no terminal escapes), at most 80 characters."""
    return repr(text.decode("utf-8", "replace") if isinstance(text, (bytes, bytearray)) else text)[:80]


def fasta_records(path):
    """Yields (name, base codes uint8 (L,), number of IUPAC codes other than N) of each record, validated.
    Plain, gzip, bgzip; CRLF, blank lines, lower case, uneven lines are fine. ValueError: file, line, what."""
    seen = set()
    for line, record in raw_records(path):
        end = record.index(b"\n")
        header = record[:end].rstrip(b"\r")
        del record[:end + 1]                                 # in place: a contig is large
        if b"\r" in header:
            raise ValueError(f"{path}: line {line}: old Mac (CR) line ends; convert them to LF")
        word = re.match(rb">(\S+)", header)
        name = word[1].decode("utf-8", "replace") if word else ""
        if not name.isprintable() or not name:
            raise ValueError(f"{path}: line {line}: header without name ({show(header[:40])}); write '>name'")
        if name in seen:
            raise ValueError(f"{path}: line {line}: contig name {show(name)} occurs twice; rename one")
        seen.add(name)
        yield name, *contig_codes(record, path, line)


def raw_records(path):
    """Yields (line number, bytearray) of each '>' record. ValueError, before reading on, if there is none."""
    with opened(path) as f:
        line, buffer, searched = 1, bytearray(f.readline(CHUNK).removeprefix(b"\xef\xbb\xbf")), 0
        while buffer and not buffer.strip():                 # blank lines before the first record
            line, buffer = line + 1, bytearray(f.readline(CHUNK))
        if not buffer:
            raise ValueError(f"{path}: empty, there is no FASTA record in it; check the file")
        if not buffer.startswith(b">"):
            text = buffer.strip()
            kind = [what for magic, what in NOT_FASTA if text.startswith(magic)] or [show(text[:40])]
            raise ValueError(f"{path}: line {line}: not a FASTA header ({kind[0]}); write '>name'")
        while chunk := f.read(CHUNK):
            buffer += chunk
            while (end := buffer.find(b"\n>", searched)) >= 0:
                record, searched = buffer[:end + 1], 0
                del buffer[:end + 1]
                lines = record.count(b"\n")
                yield line, record
                line += lines
            searched = len(buffer) - 1
    buffer += b"\n"
    yield line, buffer


def contig_codes(body, path, line):
    """Sequence lines under the header at `line` -> (codes (L,), number of IUPAC codes other than N)."""
    if b"\r" in body:
        body = body.replace(b"\r\n", b"\n").rstrip(b"\r")
    codes = np.frombuffer(body.translate(CODE.tobytes(), b"\n"), np.uint8)
    if codes.size and codes.max() > 4:                       # blanks at line ends are fine, all else is not
        body = re.sub(rb"[ \t]+(?=\n|\Z)", b"", body)
        codes = np.frombuffer(body.translate(CODE.tobytes(), b"\n"), np.uint8)
    if not codes.size:
        raise ValueError(f"{path}: line {line}: contig without a sequence; remove it or complete the file")
    if codes.max() > 4:
        bad = re.search(rb"[^\nATCGatcg" + AMBIGUOUS + rb"]", body)
        line += 1 + body.count(b"\n", 0, bad.start())
        what = f"{show(bad.group())}: {BAD_LETTER.get(bad.group().upper(), 'no IUPAC code')}"
        raise ValueError(f"{path}: line {line}: not a DNA letter ({what}); use ACGTN and IUPAC codes")
    n = int(np.count_nonzero(codes == 4))
    return codes, n and n - body.count(b"N") - body.count(b"n")


def window_table(intervals, length):
    """What draw_starts needs, per interval: the shift from window number to start; windows up to its end."""
    counts = intervals[:, 1] - intervals[:, 0] - length + 1
    upto = np.cumsum(counts)
    return intervals[:, 0] - (upto - counts), upto


def draw_starts(table, n, rng):
    """n window starts (int64), every window of the table's intervals equally likely."""
    shift, upto = table
    number = rng.integers(upto[-1], size=n)
    return number + shift[np.searchsorted(upto, number, side="right")]


def take_windows(bases, starts, length):
    """bases[start:start + length] for each start -> uint8 tensor (n, length), where the bases are."""
    if torch.is_tensor(bases):
        starts = torch.from_numpy(starts).pin_memory().to(bases.device, non_blocking=True)
        return bases[starts[:, None] + torch.arange(length, device=bases.device)]
    return torch.from_numpy(np.lib.stride_tricks.sliding_window_view(bases, length)[starts])


def resident(bases, device):
    """The bases as a tensor on a GPU where they take a third of its memory at most, else as they are."""
    if device.type == "cuda" and bases.nbytes < torch.cuda.get_device_properties(device).total_memory / 3:
        return torch.from_numpy(bases).to(device)
    return bases


def base_entropies(bases):
    """Entropies of a base in nats: order 0 (its frequency), order 3 (given three bases on either side)."""
    seven = kmer_tokens(torch.from_numpy(bases)[None], 7, 1)[0]
    joint = torch.bincount(seven, minlength=4 ** 7 + 5)[5:].double().view(64, 4, 64)      # left, base, right
    joint /= joint.sum()
    parts = joint.sum((0, 2)), joint.sum(1), joint
    order0, flanks, all7 = (torch.special.entr(p).sum().item() for p in parts)
    return order0, all7 - flanks


def write_demo_genome(path, seed=42):
    """Writes the synthetic genome of the demos: 4 contigs of 250 kb, the same on every machine. Order-3
    Markov background; 15 % of it overwritten by copies of 3 interspersed repeats of 300 bases (10 % of them
    mutated); a copy of DEMO_MOTIF about every 500 bases."""
    rng = np.random.default_rng(seed)
    rows, length = 64, 4 * 250_000 // 64
    steps = np.cumsum(rng.dirichlet(np.full(4, 0.6), size=64), axis=1)          # P(next base | three bases)
    bases = np.empty((length, rows), np.uint8)
    context = rng.integers(64, size=rows)
    for t, u in enumerate(rng.random((length, rows))):                          # 64 stretches side by side
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
    with open(f"{path}.{os.getpid()}.tmp", "w") as f:        # ranks may write it at the same time
        for c, contig in enumerate(genome.reshape(4, -1), 1):
            f.write(f">demo{c}\n" + re.sub("(.{80})", r"\1\n", decode(contig)) + "\n")
    os.replace(f.name, path)


# A benchmark set. classes: names in id order (targets of a regression); length: bases, one number or from-to;
# rows: published, by split; folder: under data_dir, in the source's own layout
Task = namedtuple("Task", "name suite classes regression metric length rows folder source licence")
# The sequences of a split. bases: uint8 codes of all, end to end; offsets: int64 (n + 1,), where each begins
# and ends; labels: int64 (n,) ids, float32 (n, targets) or None; notes: rows of each oddity that was accepted
Rows = namedtuple("Rows", "bases offsets labels notes")
SOURCES = {                                                  # folder: suite, where from, licence as stated
    "GUE": ("GUE", "github.com/MAGICS-LAB/DNABERT_2 (GUE.zip)", "not stated"),
    "DeepSTARR": ("DeepSTARR", "zenodo.org/records/5502060", "not stated"),
    "GenomicBenchmarks": ("GenomicBenchmarks", "zenodo.org/records/16605299 ({0}_v0.zip; or use --fasta and "
                          "datasets/{0} of github.com/ML-Bioinfo-CEITEC/genomic_benchmarks)",
                          "CC BY 4.0 (Zenodo), Apache-2.0 (repository)"),
    "MTcDNA": ("MTcDNA", "ftp.ensembl.org/pub (fasta/SPECIES/cdna/*.cdna.all.fa.gz)", "not stated"),
    "fewshot": ("few-shot", "github.com/roysoumya/GeneMask, curriculum-GeneMask (silencer)", "GPL-3.0"),
    "demo": ("demo", "the demo genome (written by this file)", "MIT")}
# task, folder, bases, metric, classes (-: negative,positive), sets:published rows of train:test:dev (GUE:
# DNABERT-2's appendix, dev as test). GUE's splice classes are what the middle of the sequences shows.
TABLE = """
emp/{} GUE/EMP/{} 500 mcc - H3:11971:1497 H3K14ac:26438:3305 H3K36me3:27904:3488 H3K4me1:25341:3168
emp/{} GUE/EMP/{} 500 mcc - H3K4me2:24545:3069 H3K4me3:29439:3680 H3K79me3:23069:2884 H3K9ac:22224:2779
emp/{} GUE/EMP/{} 500 mcc - H4:11679:1461 H4ac:27275:3410
tf_m/{} GUE/mouse/{} 101 mcc - 0:6478:810 1:53952:6745 2:2620:328 3:1904:239 4:15064:1883
tf_h/{} GUE/tf/{} 101 mcc - 0:32378:1000 1:30672:1000 2:19000:1000 3:27294:1000 4:19000:1000
pd/{} GUE/prom/prom_300_{} 300 mcc - all:47356:5920 notata:42452:5307 tata:4904:613
cpd/{} GUE/prom/prom_core_{} 70 mcc - all:47356:5920 notata:42452:5307 tata:4904:613
ssp/{} GUE/splice/{} 400 mcc acceptor,donor,neither reconstructed:36496:4562
{} GUE/virus/{} 999 f1_macro 0,1,2,3,4,5,6,7,8 covid:77669:7000
{} DeepSTARR 249 pcc Dev_log2_enrichment,Hk_log2_enrichment eap:402296:41186:40570
gb/{} GenomicBenchmarks/{} 251 acc - human_nontata_promoters:27097:9034
gb/{} GenomicBenchmarks/{} 500 acc - human_enhancers_cohn:20843:6948
gb/{} GenomicBenchmarks/{} 2-573 acc - human_enhancers_ensembl:123872:30970
gb/{} GenomicBenchmarks/{} 71-802 acc enhancer,ocr,promoter human_ensembl_regulatory:231348:57713
gb/{} GenomicBenchmarks/{} 71-593 acc - human_ocr_ensembl:139804:34952
gb/{} GenomicBenchmarks/{} 331-4776 acc - dummy_mouse_enhancers_ensembl:968:242
gb/{} GenomicBenchmarks/{} 200 acc coding_seqs,intergenomic_seqs demo_coding_vs_intergenomic_seqs:75000:25000
gb/{} GenomicBenchmarks/{} 200 acc human,worm demo_human_or_worm:75000:25000
gb/{} GenomicBenchmarks/{} 236-3237 acc - drosophila_enhancers_stark:5184:1730
mtcdna/{} MTcDNA {} acc mouse,turtle 1024 4096 8192
{} fewshot/Prom-core 70 acc - prom_core::5920
{} fewshot/Prom-300 300 acc - prom_300
{} fewshot/Cohn-enh 500 acc - cohn_enh
{} fewshot/Splice-40 40 acc none,donor,acceptor splice_40::3000
{} fewshot/silencer 101-299 acc - silencer::1657
{} demo 200 mcc background,motif demo:4000:500:500"""
# few-shot task: train file of N shots; sets of N per class in it; test files (the second stands in)
FEW_SHOT = {"prom_core": ("{}/train.tsv", 1, "test.tsv"), "silencer": ("{}/train.tsv", 10, "{}/dev.tsv"),
            "splice_40": ("{0}/train_splice40_{0}.tsv", 10, "test.tsv"),
            "prom_300": ("{}/train.tsv", 1, "test.tsv", "test_standin.csv"), "cohn_enh": (
                "{}/train.tsv", 1, "test.tsv", "../../GenomicBenchmarks/human_enhancers_cohn/test.csv")}
MTCDNA = {"Mus_musculus": 0, "Mus_spretus": 0, "Chelonoidis_abingdonii": 1, "Gopherus_agassizii": 1}
DELIMITER = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
WHOLE = re.compile(r"0|-?[1-9]\d*", re.ASCII)
CLASS_NAME = re.compile(r"(?!=|[+-]?(nan|inf|infinity|na|n/a|none|null|[\d.]+e[+-]?\d+)$)(?=.*[^\W\d_])"
                        r"[^\x00-\x1f\x7f-\x9f]+", re.IGNORECASE)


def task_table():
    """TABLE -> {name: Task}."""
    tasks = {}
    for name, folder, length, metric, classes, *sets in map(str.split, TABLE.strip().splitlines()):
        suite, source, licence = SOURCES[folder.split("/")[0]]
        for of, *counts in (text.split(":") for text in sets):
            counts += counts[1:] * (suite == "GUE")
            rows = {split: int(n) for split, n in zip(("train", "test", "dev"), counts) if n}
            names = tuple(classes.replace("-", "negative,positive").split(","))
            task = Task(name.format(of), suite, names, metric == "pcc", metric, length.format(of), rows,
                        folder.format(of), source.format(of), licence)
            tasks[task.name] = task
    return tasks


TASKS = task_table()
GUE = [name for name in TASKS if TASKS[name].suite == "GUE"]                    # covid is the last
GROUPS = {group: [name for name in TASKS if name.split("/")[0] == group]
          for group in ("emp", "tf_m", "tf_h", "pd", "cpd", "ssp", "covid", "eap", "mtcdna")}
GROUPS |= {"cmgems27": GUE[:-1], "gue28": GUE, "randommask28": [*GUE[:-1], "eap"],
           "gb8": [name for name in TASKS if name.startswith("gb/") and "drosophila" not in name],
           "gb5": [f"gb/{name}" for name in (                # of Martinek et al.
               "human_nontata_promoters", "demo_human_or_worm", "human_enhancers_ensembl",
               "demo_coding_vs_intergenomic_seqs", "human_enhancers_cohn")], "fewshot": list(FEW_SHOT)}


def task_names(args):
    """Names of groups and tasks -> task names, each once."""
    for name in args:
        if name not in GROUPS and name not in TASKS:
            raise ValueError(f"task {show(name)}: unknown; use {' '.join([*GROUPS, *TASKS])}")
    return list(dict.fromkeys(name for arg in args for name in GROUPS.get(arg, [arg])))


def row_keys(rows):
    """One bytes object per sequence, to compare and count."""
    bases, offsets = rows.bases.tobytes(), rows.offsets.tolist()
    return [bases[start:end] for start, end in zip(offsets, offsets[1:])]


def rows_of(bases, lengths, labels, notes, **masks):
    """Rows of codes. Integer labels are ids, floats targets; masks are over bases, their rows are counted."""
    if labels is not None:
        labels = np.asarray(labels)
        labels = labels.astype(np.int64) if labels.dtype.kind == "i" else \
            labels.astype(np.float32).reshape(len(lengths), -1)
    rows = Rows(bases, np.concatenate([[0], np.cumsum(lengths)]), labels, {})
    counts = {name: int(np.logical_or.reduceat(mask, rows.offsets[:-1]).sum())
              for name, mask in ({"with_n": bases == 4} | masks).items()}
    return rows._replace(notes={"duplicates": len(lengths) - len(set(row_keys(rows)))} | counts | notes)


def rows_from(sequences, labels=None, notes=None, places=None):
    """DNA strings -> Rows. ValueError for what is not DNA; places: what to call each sequence there."""
    places = places or [f"sequence {i}" for i in range(len(sequences))]
    text, lengths = "".join(sequences), np.array(list(map(len, sequences)))
    letters = np.frombuffer(text.encode("ascii", "replace"), np.uint8)
    codes = CODE[letters]
    if not lengths.all():
        raise ValueError(f"{places[lengths.argmin()]}: no sequence; complete or remove it")
    if codes.max() > 4:
        at = int(np.argmax(codes > 4))
        row = int(np.searchsorted(np.cumsum(lengths), at, side="right"))
        hint = BAD_LETTER.get(text[at].upper().encode(), f"in {show(sequences[row][:40])}")
        raise ValueError(f"{places[row]}: not a DNA letter ({show(text[at])}: {hint}); use ACGTN and IUPAC")
    return rows_of(codes, lengths, labels, notes or {}, lower_case=letters > ord("Z"),
                   ambiguous=(codes == 4) & (letters & 0xDF != ord("N")))


def take_rows(rows, index):
    """The rows of an index array, in its order. Of the notes, those that the codes can tell."""
    lengths = np.diff(rows.offsets)[index]
    shift = rows.offsets[index] - (np.cumsum(lengths) - lengths)
    bases = rows.bases[np.arange(lengths.sum()) + np.repeat(shift, lengths)]
    return rows_of(bases, lengths, None if rows.labels is None else rows.labels[index], {})


def split_rows(rows, fractions, seed):
    """Rows -> one Rows per fraction of the different sequences, at random, class by class (scikit-learn's
    stratified split; by its first label). Equal sequences go together."""
    from sklearn.model_selection import train_test_split
    seen = {}                                                # sequence: its first row
    first = np.array([seen.setdefault(key, i) for i, key in enumerate(row_keys(rows))])
    parts, rest = [], np.unique(first)
    classes = np.zeros(len(first)) if rows.labels is None or rows.labels.ndim > 1 else rows.labels
    try:
        for i, fraction in enumerate(fractions[:-1]):
            part, rest = train_test_split(rest, train_size=fraction / sum(fractions[i:]),
                                          stratify=classes[rest], random_state=seed)
            parts.append(part)
    except ValueError as e:
        raise ValueError(f"split {fractions}: {len(seen)} different rows: too few ({e}); give more") from None
    return [take_rows(rows, np.flatnonzero(np.isin(first, part))) for part in (*parts, rest)]


def table_text(path):
    """Text of a UTF-8 file, plain or gzip."""
    with opened(path) as f:
        data = f.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        kinds = [kind for magic, kind in NOT_FASTA if data.startswith(magic)] + [f"byte {data[e.start]:#x}"]
        line = data.count(b"\n", 0, e.start) + 1
        raise ValueError(f"{path}: line {line}: not UTF-8 text ({kinds[0]}); save it as UTF-8 text") from None


def read_columns(path, wanted):
    """Columns of a CSV (.csv) or TSV (.tsv, .txt) file, plain or gzip, read strictly; others are passed over.
    wanted: {name: what the header may call it}. Returns {name: list of str} and each row's 'FILE: line N'."""
    suffix = os.path.splitext(path.removesuffix(".gz"))[1].lower()
    if suffix not in DELIMITER:
        raise ValueError(f"{path}: no table by its name; name it .csv (commas), .tsv or .txt (tabs)")
    csv.field_size_limit(1 << 24)
    text, rows, places, line = table_text(path), [], [], 1
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=DELIMITER[suffix], strict=True)
    try:
        for row in reader:
            if len(row) > 1 or row and row[0].strip():       # blank lines are fine
                rows.append(row)
                places.append(f"{path}: line {line}")
            line = reader.line_num + 1
    except csv.Error as e:
        raise ValueError(f"{path}: line {line}: {e}; correct its quotes or line ends") from None
    if len(rows) < 2:
        raise ValueError(f"{path}: empty, or nothing below the header ({show(text[:40])}); check the file")
    header, columns = [cell.strip().lower() for cell in rows.pop(0)], {}
    head, *places = places
    for name, names in wanted.items():
        at = [i for i, cell in enumerate(header) if cell in names]
        if len(at) != 1:
            raise ValueError(f"{head}: {len(at) or 'no'} column {' or '.join(names)} in the header "
                             f"({show(text.lstrip()[:40])}); name one, with {DELIMITER[suffix]!r} in between")
        columns[name] = at[0]
    for row, place in zip(rows, places):
        if len(row) != len(header):
            raise ValueError(f"{place}: {len(row)} fields, but {len(header)} in the header; correct it")
    return {name: [row[i].strip(" \t") for row in rows] for name, i in columns.items()}, places


def class_ids(texts, classes, places):
    """Labels -> ids, classes (None: those there are, sorted; all whole numbers or all names). '1.0' is 1."""
    names = {text: re.sub(r"^(-?\d+)\.0*$", r"\1", text) for text in dict.fromkeys(texts)}
    kind = WHOLE if WHOLE.fullmatch(names[texts[0]]) else CLASS_NAME
    for text, name in names.items():
        if name not in classes if classes else not kind.fullmatch(name):
            known = f"use one of {', '.join(classes)}" if classes else "use only whole numbers, or only names"
            if NUMBER.fullmatch(text) and float(text) % 1 > 0:
                known += "; for a regression give --targets label"
            raise ValueError(f"{places[texts.index(text)]}: label {show(text)}; {known}")
    if not classes:
        classes = tuple(sorted(set(names.values()), key=int if kind is WHOLE else None))
        if len(classes) < 2:
            raise ValueError(f"{places[0]}: label {show(texts[0])} in all rows; two classes are needed")
    ids = {name: i for i, name in enumerate(classes)}
    return [ids[names[text]] for text in texts], classes


def numbers(columns, places):
    """Columns of text -> one tuple of finite floats per row."""
    for column in columns:
        for text, place in zip(column, places):
            if not NUMBER.fullmatch(text) or abs(float(text)) > 3e38:
                raise ValueError(f"{place}: {show(text)}; use a finite decimal number")
    return list(zip(*(map(float, column) for column in columns)))


def read_table(path, classes=None, targets=None, labels=True):
    """A table with columns sequence (or seq) and label (or class) -> sequences, labels, notes.
    classes: the labels in the order of their ids; None: notes["classes"] tells those found, sorted.
    targets: the number columns of a regression; labels=False: sequences only.
    Overlapping k-mers with blanks between them become the sequence they were made of."""
    wanted = {name: [name.lower()] for name in targets or ()}
    if labels and not targets:
        wanted["label"] = ["label", "class"]
    columns, places = read_columns(os.fspath(path), {"sequence": ["sequence", "seq"]} | wanted)
    sequences, notes = columns.pop("sequence"), {"kmer_text": 0}
    for i, text in enumerate(sequences):
        if " " in text:
            k = text.index(" ")
            sequences[i] = bare = text[::k + 1] + text[len(text) - k + 1:]
            notes["kmer_text"] += 1
            if " ".join(bare[j:j + k] for j in range(len(bare) - k + 1)) != text:
                raise ValueError(f"{places[i]}: blanks in {show(text)}, no overlapping k-mers; remove them")
    rows_from(sequences, places=places)                      # ValueError where one is not DNA
    if targets or not labels:
        return sequences, numbers(columns.values(), places) if targets else None, notes
    ids, found = class_ids(columns["label"], classes, places)
    return sequences, ids, notes if classes else notes | {"classes": found}


def find(folder, *names):
    """Path of the first of these files that there is, plain or .gz; None where there is none."""
    paths = (os.path.join(folder, name + suffix) for name in names for suffix in ("", ".gz"))
    return next(filter(os.path.exists, paths), None)


def find_files(task, data_dir, wanted):
    """Paths of a task's files. wanted: for each its name, and those that may stand in for it (said)."""
    folder = os.path.join(data_dir, task.folder)
    found = {names[0]: find(folder, *names) for names in wanted}
    lost = [name for name, path in found.items() if not path]
    if lost:
        raise ValueError(f"{folder}: no {', '.join(lost)} ({task.name}); python -m tools.download {task.name}, or "
                         f"{task.source}")
    for name, path in found.items():
        if not find(folder, name):
            print(f"{task.name}: {name} is not there, {path} stands in for it", flush=True)
    return list(found.values())


def read_tables(task, data_dir, wanted):
    """{split: Rows} of tables {split: names, as find_files wants them}; labels are ids, or the targets."""
    ids, targets = [str(i) for i in range(len(task.classes))], task.classes if task.regression else None
    paths = find_files(task, data_dir, wanted.values())
    return {split: rows_from(*read_table(path, ids, targets)) for split, path in zip(wanted, paths)}


def class_paths(task, folder, suffix=""):
    """The class files or folders of one split, in the order of the ids whatever the directory's order."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    names = {name.removesuffix(".gz").removesuffix(suffix): name for name in names if name[0] != "."}
    if set(names) != set(task.classes):
        raise ValueError(f"{folder}: {', '.join(names)[:80] or 'nothing'} there, not the classes "
                         f"{', '.join(task.classes)} ({task.name}); python -m tools.download {task.name}, or "
                         f"{task.source}")
    return [os.path.join(folder, names[name]) for name in task.classes]


def read_folder(path):
    """A folder of one-sequence files -> texts in the order of the file names, and the paths."""
    paths = [os.path.join(path, name) for name in sorted(os.listdir(path)) if name[0] != "."]
    if not paths:
        raise ValueError(f"{path}: an empty folder; unpack the archive again")
    return [table_text(path).strip() for path in paths], paths


def read_intervals(path):
    """Coordinate table -> [(region, start, end, strand)], places. 0-based, half-open; no strand is '+'."""
    columns, places = read_columns(path, {name: [name] for name in ("region", "start", "end", "strand")})
    intervals = []
    for place, region, start, end, strand in zip(places, *columns.values()):
        numeric = re.fullmatch(r"\d+ \d+", f"{start} {end}", re.ASCII)
        if not numeric or int(start) >= int(end) or strand not in ("", "+", "-"):
            raise ValueError(f"{place}: interval {show(f'{region}:{start}-{end} {strand}')}; need whole "
                             f"numbers, 0 <= start < end, and strand '+', '-' or none")
        intervals.append((region, int(start), int(end), strand))
    return intervals, places


def region_key(name):
    """What the spellings of a region share: no 'chr', no version of an Ensembl transcript, one name for M."""
    name = re.sub(r"^chr|^(ENS\w+)\.\d+$", r"\1", name)
    return "MT" if name in ("M", "mitochondrion_genome") else name


def open_fasta(path):
    """pyfaidx.Fasta over our own index of exactly this file, in the user's cache folder."""
    import pyfaidx
    key = hashlib.sha256(json.dumps(file_fingerprint(path)).encode()).hexdigest()[:12]
    index = os.path.join(cache_home(), f"{os.path.basename(path)}.{key}.fai")
    try:
        if not os.path.exists(index):
            os.makedirs(cache_home(), exist_ok=True)
            pyfaidx.Faidx(path, indexname=f"{index}.{os.getpid()}").close()
            os.replace(f"{index}.{os.getpid()}", index)
        return pyfaidx.Fasta(path, indexname=index, as_raw=True, rebuild=False)
    except (OSError, ValueError, LookupError, ImportError, pyfaidx.FastaIndexingError) as e:
        raise ValueError(f"{path}: pyfaidx cannot index it ({show(str(e))}); unpack or correct it") from None


def cut_intervals(path, fasta):
    """Sequences of a coordinate table's intervals in a pyfaidx.Fasta ('-': reverse complement), places."""
    intervals, places = read_intervals(path)
    names, sequences, flip = {}, [], str.maketrans("ACGTacgt", "TGCAtgca")       # other codes all become N
    for name in fasta.keys():
        names.setdefault(region_key(name), []).append(name)
    advice = f"in {fasta.filename} ({', '.join(list(fasta.keys())[:5])} ...); use the genome of the table"
    for place, (region, start, end, strand) in zip(places, intervals):
        spelt = names.get(region_key(region), [])
        if len(spelt) != 1:
            raise ValueError(f"{place}: region {show(region)} is {' and '.join(spelt) or 'not'} {advice}")
        contig = fasta[spelt[0]]
        if end > len(contig):
            raise ValueError(f"{place}: {region}:{start}-{end}, {spelt[0]} ends at {len(contig)} {advice}")
        text = contig[start:end]
        sequences.append(text.translate(flip)[::-1] if strand == "-" else text)
    n_blank = sum(not text.strip("Nn") for text in sequences)
    if n_blank > len(sequences) / 100:
        raise ValueError(f"{path}: {n_blank} of {len(sequences)} intervals are all N {advice}")
    return sequences, places


def coordinate_folder(task, data_dir):
    """Where a task's coordinate tables are: GenomicBenchmarks/coordinates/SET, or the task's own folder."""
    folder = find(data_dir, f"GenomicBenchmarks/coordinates/{task.name.removeprefix('gb/')}")
    return folder or os.path.join(data_dir, task.folder)


def read_genomic(task, data_dir, fastas):
    """GenomicBenchmarks: with FASTA files (one, or one per class, in order) from coordinate tables; else from
    the package's class folders of one-sequence files; else from {train,test}.csv."""
    folder, suffix, n = os.path.join(data_dir, task.folder), "", len(task.classes)
    if fastas:
        if len(set(map(os.path.realpath, fastas))) < len(fastas) or len(fastas) not in (1, n):
            raise ValueError(f"--fasta {' '.join(map(str, fastas))}: {len(fastas)} files, {n} classes; give "
                             f"one, or one of its own for each of {', '.join(task.classes)}")
        fastas = [open_fasta(os.fspath(path)) for path in fastas] * (n // len(fastas))
        folder, suffix = coordinate_folder(task, data_dir), ".csv"
    elif not any(os.path.isdir(os.path.join(folder, "train", name)) for name in task.classes):
        return read_tables(task, data_dir, {"train": ["train.csv"], "test": ["test.csv"]})
    splits = {}
    for split in ("train", "test"):
        paths = class_paths(task, os.path.join(folder, split), suffix)
        texts, places = zip(*(map(cut_intervals, paths, fastas) if fastas else map(read_folder, paths)))
        labels = np.repeat(np.arange(n), list(map(len, texts)))
        splits[split] = rows_from(sum(texts, []), labels, None, sum(places, []))
    return splits


def read_deepstarr(task, data_dir):
    """The published FASTA and activity files, row by row; else sample tables, which have no test split."""
    folder, names = os.path.join(data_dir, task.folder), ("Train", "Val", "Test")
    if find(folder, "sample_train.txt") and not find(folder, "Sequences_Train.fa"):
        print(f"{task.name}: sample tables, not the published splits; no test split", flush=True)
        return read_tables(task, data_dir, {"train": ["sample_train.txt"], "dev": ["sample_val.txt"]})
    paths = find_files(task, data_dir, [[f"Sequences_{name}.fa"] for name in names]
                       + [[f"Sequences_activity_{name}.txt"] for name in names])
    splits = {}
    for split, fasta, table in zip(("train", "dev", "test"), paths, paths[3:]):
        columns, places = read_columns(table, {target: [target.lower()] for target in task.classes})
        codes = [record[1] for record in fasta_records(fasta)]
        if len(codes) != len(places):
            raise ValueError(f"{fasta}: {len(codes)} sequences, but {len(places)} rows in {table}; get both")
        labels = numbers(columns.values(), places)
        splits[split] = rows_of(np.concatenate(codes), list(map(len, codes)), labels, {})
    return splits


def read_mtcdna(task, data_dir):
    """cDNA of two mice and two turtles: transcripts of more than 5,000 bases, cut or N-padded to the length;
    60 % train, 20 % dev, 20 % test by train_test_split twice, seed 1 (FinDNA's code; unstratified)."""
    from sklearn.model_selection import train_test_split
    folder, length = os.path.join(data_dir, task.folder), int(task.length)
    bases, labels, sizes = [], [], []
    for species, label in MTCDNA.items():
        paths = glob.glob(os.path.join(glob.escape(folder), f"{species}*.fa*"))
        if len(paths) != 1:
            raise ValueError(f"{folder}: {len(paths)} files {species}*.fa ({task.name}); get one of each of "
                             f"{', '.join(MTCDNA)} from {task.source}")
        for _, codes, _ in fasta_records(paths[0]):
            sizes.append(len(codes))
            if len(codes) > 5000:
                bases.append(np.pad(codes[:length], (0, max(0, length - len(codes))), constant_values=4))
                labels.append(label)
    long = np.array([n for n in sizes if n > 5000])
    if len(long) < 5:
        raise ValueError(f"{folder}: {len(long)} transcripts of more than 5,000 bases; check the files")
    print(f"{task.name}: {len(long)} of {len(sizes)} transcripts have more than 5,000 bases (mouse, turtle: "
          f"{np.bincount(labels)}); {(long > length).sum()} cut, {(long < length).sum()} padded", flush=True)
    rows = rows_of(np.concatenate(bases), np.full(len(long), length), labels, {})
    rest, test = train_test_split(np.arange(len(long)), test_size=0.2, random_state=1)
    train, dev = train_test_split(rest, test_size=0.25, random_state=1)
    return {"train": take_rows(rows, train), "dev": take_rows(rows, dev), "test": take_rows(rows, test)}


def read_few_shot(task, data_dir, shots, draw):
    """N rows per class to train on, and the test file. If a file has ten sets of N (FEW_SHOT), draw 0..9 is
    one: a slice of each class after a seeded shuffle. No dev set: Splice-40's lies in its test."""
    train, n_sets, *tests = FEW_SHOT[task.name]
    wanted = {"train": [train.format(shots)], "test": [name.format(shots) for name in tests]}
    rows = read_tables(task, data_dir, wanted)
    labels = rows["train"].labels
    counts = np.bincount(labels, minlength=len(task.classes))
    if (counts != n_sets * shots).any() or not 0 <= draw < 10:
        raise ValueError(f"{task.folder}/{wanted['train'][0]}: {counts.tolist()} rows by class, draw {draw}; "
                         f"need {n_sets} x {shots} rows of each class and a draw from 0 to 9")
    if n_sets > 1:
        order = np.random.default_rng(42).permutation(len(labels))
        order = order[np.argsort(labels[order], kind="stable")].reshape(-1, n_sets, shots)
        rows["train"] = take_rows(rows["train"], np.sort(order[:, draw].ravel()))
    return rows


def read_demo(task, data_dir):
    """Windows of the demo genome without DEMO_MOTIF, which is then planted in every other one (class 1)."""
    genome, rng, splits = open_genome(["demo"], data_dir), np.random.default_rng(42), {}
    length, motif = int(task.length), encode(DEMO_MOTIF)
    hits = (np.lib.stride_tricks.sliding_window_view(genome.bases, len(motif)) == motif).all(1)
    before = np.concatenate([[0], np.cumsum(hits)])
    for split, contigs in (("train", ("demo1", "demo2")), ("dev", ("demo3",)), ("test", ("demo4",))):
        n = task.rows[split]
        starts = np.concatenate([np.arange(genome.contigs[c] - length) + genome.offsets[c] for c in contigs])
        starts = starts[before[starts + length + 1 - len(motif)] == before[starts]]
        bases = take_windows(genome.bases, rng.choice(starts, n, replace=False), length).numpy()
        at = rng.integers(length + 1 - len(motif), size=(n // 2, 1)) + np.arange(len(motif))
        bases[np.arange(1, n, 2)[:, None], at] = motif
        splits[split] = rows_of(bases.ravel(), np.full(n, length), np.arange(n) % 2, {})
    return splits


def read_task(name, data_dir, shots=None, draw=0, fasta=None):
    """A benchmark set -> {"train", "dev", "test": Rows, or None where there is none}.
    shots, draw: of a few-shot task, rows per class (10) and number of the run; fasta: see read_genomic."""
    if name not in TASKS:
        raise ValueError(f"task {show(name)}: not the name of one set; use {' '.join(TASKS)}")
    task = TASKS[name]
    if task.suite == "GUE":
        splits = read_tables(task, data_dir, {split: [f"{split}.csv"] for split in ("train", "dev", "test")})
    elif task.suite == "GenomicBenchmarks":
        splits = read_genomic(task, data_dir, fasta)
    elif task.suite == "few-shot":
        splits = read_few_shot(task, data_dir, shots or 10, draw)
    else:
        read = {"DeepSTARR": read_deepstarr, "MTcDNA": read_mtcdna, "demo": read_demo}[task.suite]
        splits = read(task, data_dir)
    lost = [name for i, name in enumerate(task.classes) if i not in splits["train"].labels]
    if lost and not task.regression:
        raise ValueError(f"{os.path.join(data_dir, task.folder)}: no training row of class {', '.join(lost)} "
                         f"({task.name}); get the whole set from {task.source}")
    return {split: splits.get(split) for split in ("train", "dev", "test")}


def beside(n, task, split):
    """A number of rows, with the published one beside it."""
    known = task.rows.get(split)
    return f"{n:,}" + (f" (published {known:,}: {'OK' if n == known else 'differs'})" if known else "")


def report_intervals(task, folder):
    """Prints sizes, repeats and leak of the coordinate tables of a GenomicBenchmarks task."""
    train = ()
    for split in ("train", "test"):
        paths = class_paths(task, os.path.join(folder, split), ".csv")
        every = [interval[:3] for path in paths for interval in read_intervals(path)[0]]
        repeats, leak = len(every) - len(set(every)), sum(interval in train for interval in every)
        print(f"  {split} table: {beside(len(every), task, split)} intervals, {repeats:,} repeats"
              + f", {leak:,} ({leak / len(every):.1%}) are training intervals" * (split == "test"))
        train = set(every)


def report_rows(task, split, rows):
    """Prints sizes, balance and oddities of one split."""
    lengths, keys = np.diff(rows.offsets), row_keys(rows)
    if task.regression:
        balance = [f"{name} {x.min():.2f} to {x.max():.2f}" for name, x in zip(task.classes, rows.labels.T)]
    else:
        balance = [f"{i}:{n:,}" for i, n in enumerate(np.bincount(rows.labels, minlength=len(task.classes)))]
    conflicts = len(set(zip(keys, map(str, rows.labels.tolist())))) - len(set(keys))
    odd = [f"{name} {n:,}" for name, n in (rows.notes | {"conflicting_labels": conflicts}).items() if n]
    print(f"  {split}: {beside(len(keys), task, split)} rows; bases min {lengths.min()}, median "
          f"{np.median(lengths):g}, max {lengths.max()}; {', '.join(balance)}; {', '.join(odd) or 'sound'}")


def report_task(task, data_dir, fasta):
    """Prints what is in a benchmark set: rows, lengths, balance, oddities, overlap of its splits."""
    print(f"{task.name}: {task.suite}, {', '.join(task.classes)}; {task.metric}, {task.length} bases\n"
          f"  from {task.source}; licence: {task.licence}")
    folder = coordinate_folder(task, data_dir)
    if find(os.path.join(folder, "train"), f"{task.classes[0]}.csv"):
        report_intervals(task, folder)
    splits = {split: rows for split, rows in read_task(task.name, data_dir, fasta=fasta).items() if rows}
    if task.suite == "few-shot":                             # all its train files, and a dev file not for use
        files = {f"train/{n}": FEW_SHOT[task.name][0].format(n) for n in (10, 50, 100, 500, 1000)}
        files = {split: [name] for split, name in (files | {"dev": "full-dataset/dev.tsv"}).items()
                 if find(folder, name)}
        splits = read_tables(task, data_dir, files) | {"test": splits["test"]}
    for split, rows in splits.items():
        report_rows(task, split, rows)
    for (a, first), (b, second) in itertools.combinations(splits.items(), 2):
        keys = row_keys(first), row_keys(second)
        both = set(keys[0]) & set(keys[1])
        shares = [f"{sum(key in both for key in rows) / len(rows):.1%}" for rows in keys]
        if not b.startswith("train"):
            print(f"  {a} and {b}: {len(both):,} sequences in both, {' and '.join(shares)} of the rows")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Sizes and leaks of benchmark sets.", allow_abbrev=False)
    parser.add_argument("tasks", nargs="+", help=f"tasks (emp/H3) or groups: {' '.join(GROUPS)}")
    parser.add_argument("--data_dir", default="data", help="where the sets lie (default data)")
    parser.add_argument("--fasta", nargs="+", help="of GenomicBenchmarks' coordinates: one, or one a class")
    args = parser.parse_args()
    status = 0
    try:
        names = task_names(args.tasks)
    except ValueError as e:
        parser.exit(2, f"error: {e}\n")
    for name in names:
        try:
            report_task(TASKS[name], args.data_dir, args.fasta)
        except ValueError as e:                              # the next set may be there
            print("  not read:", "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(e)))
            status = 2
    parser.exit(status)
