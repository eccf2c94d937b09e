"""DNA in, integer tensors out: base codes, genomes, k-mer tokens, span masks.

Bases are uint8 codes A,T,C,G,N = 0,1,2,3,4 (DNABERT's vocabulary order, so the complement is code XOR 1);
k-mer ids are 5 + the k-mer read as a base-4 number, behind [PAD] [UNK] [CLS] [SEP] [MASK] = 0..4.
Coordinates are 0-based and half-open, as in BED. Mistakes in the input raise ValueError with one line that
says where, what and what to do.
"""
import contextlib
import fcntl
import gzip
import hashlib
import json
import math
import os
import re
import shutil
import zlib

import numpy as np
import torch
import torch.nn.functional as F

LETTERS = "ATCGN"
PAD, UNK, CLS, SEP, MASK = range(5)
AMBIGUOUS = b"NRYSWKMBDHVnryswkmbdhv"                        # IUPAC codes of more than one base: all become N
CODE = np.full(256, 255, np.uint8)                           # byte -> base code; 255 = not DNA
CODE[np.frombuffer(AMBIGUOUS, np.uint8)] = 4
CODE[np.frombuffer(b"ATCGatcg", np.uint8)] = [0, 1, 2, 3] * 2
HG38_URL = "https://hgdownload.soe.ucsc.edu/goldenPath/hg38/bigZips/hg38.fa.gz"
HG38_CONTIGS = [f"chr{c}" for c in (*range(1, 23), "X", "Y")]
CHUNK = 1 << 23                                              # bytes read from a FASTA at a time
DEMO_MOTIF = "TGACTCAGCATG"                                  # planted in the demo genome and in the demo task


def encode(text):
    """DNA text, any case -> uint8 codes (L,): A,T,C,G,N = 0..4, IUPAC codes are N. ValueError on the rest."""
    bases = CODE[np.frombuffer(text.encode("ascii", "replace"), np.uint8)]
    if bases.size and bases.max() > 4:
        at = int(np.argmax(bases > 4))
        raise ValueError(f"position {at}: not a DNA letter ({text[at]!r}); use A, C, G, T, N or IUPAC codes")
    return bases


def decode(bases):
    """uint8 codes (L,) -> text over ATCGN."""
    return np.frombuffer(LETTERS.encode(), np.uint8)[np.asarray(bases)].tobytes().decode()


def reverse_complement(bases):
    """Codes (..., L), numpy or torch -> the other strand read 5' to 3'. N stays N; an involution."""
    flipped = bases.flip(-1) if torch.is_tensor(bases) else np.asarray(bases)[..., ::-1]
    return flipped ^ (flipped < 4)


def kmer_tokens(bases, k, stride):
    """Codes (B, L) uint8 -> k-mer ids (B, (L - k) // stride + 1) int64; a k-mer with an N is [UNK].

    stride 1: DNABERT's overlapping tokens; stride k: non-overlapping ones (a rest of < k bases is dropped).
    """
    if bases.shape[1] < k:
        return bases.new_zeros((len(bases), 0), dtype=torch.int64)
    codes = bases.to(torch.int16 if k < 8 else torch.int32)
    ids, width = codes, 1
    for bit in bin(k)[3:]:                                   # double and add: 3 passes for k = 6
        ids, width = torch.add(ids[:, width:], ids[:, :-width], alpha=4 ** width), 2 * width
        if bit == "1":
            ids, width = torch.add(codes[:, width:], ids[:, :-1], alpha=4), width + 1
    tokens = (ids[:, ::stride] + 5).to(torch.int64)
    if bases.is_cuda or bases.numel() and bases.max() > 3:   # asking a GPU would make it wait
        seen = F.pad((bases > 3).cumsum(1), (1, 0))
        tokens = tokens.masked_fill((seen[:, k:] != seen[:, :-k])[:, ::stride], UNK)
    return tokens


def with_specials(tokens):
    """k-mer ids (B, T) -> [CLS] ids [SEP] (B, T + 2)."""
    out = F.pad(tokens, (1, 1), value=CLS)
    out[:, -1] = SEP
    return out


def tokenize(sequences, k=6, stride=1):
    """List of DNA strings -> ids (B, T + 2): [CLS] k-mers [SEP], right-padded with [PAD] to the longest.

    A sequence shorter than k gives [CLS] [SEP]. ValueError names the sequence with a letter that is not DNA.
    """
    lengths = torch.tensor([len(s) for s in sequences], dtype=torch.int64)
    longest = max(map(len, sequences), default=0)
    text = "".join(s.ljust(longest, "N") for s in sequences)
    bases = CODE[np.frombuffer(text.encode("ascii", "replace"), np.uint8)]
    if bases.size and bases.max() > 4:
        row, at = divmod(int(np.argmax(bases > 4)), longest)
        raise ValueError(f"sequence {row}, position {at}: not a DNA letter ({sequences[row][at]!r}); "
                         f"use A, C, G, T, N or IUPAC codes")
    bases = bases.reshape(len(sequences), longest)
    tokens = with_specials(kmer_tokens(torch.from_numpy(bases), k, stride))
    n = ((lengths - k).div(stride, rounding_mode="floor") + 1).clamp(min=0)[:, None]      # k-mers of each row
    at = torch.arange(tokens.shape[1])
    return tokens.masked_fill(at == n + 1, SEP).masked_fill(at > n + 1, PAD)


def span_mask(centers, maskable, left, right):
    """Union of the spans c - left .. c + right around the centers, clipped to the maskable positions.

    centers, maskable: bool (B, T); left, right: int or (B,) tensor. Returns bool (B, T).
    """
    left, right = (x[:, None] if torch.is_tensor(x) else x for x in (left, right))
    at = torch.arange(centers.shape[1], device=centers.device)
    # before[:, i] = centers in [0, i), in 16 bits: only differences count
    before = F.pad((centers & maskable).cumsum(1, dtype=torch.int16), (1, 0))
    first = (at - right).clamp_(min=0).expand_as(centers)    # position i is hidden by any center in
    end = (at + (left + 1)).clamp_(max=len(at)).expand_as(centers)             # i - right .. i + left
    return (before.gather(1, end) - before.gather(1, first)).bool() & maskable


def draw_centers(shape, p, device):
    """bool (B, T): every position a center with probability p, independently of the others.

    Drawn as the gaps between centers, which are geometric: far fewer random numbers than positions. There are
    gaps for the mean + 10 standard deviations + 10 centers: never too few.
    """
    B, T = shape
    n = math.ceil(T * p + 10 * math.sqrt(T * p) + 10)
    gaps = torch.log1p(-torch.rand(B, n, device=device)).div_(math.log1p(-p)).floor_().add_(1)
    at = gaps.cumsum(1).sub_(1).clamp_(max=T).long()         # position in the row; T = behind its end
    at = torch.where(at < T, at + T * torch.arange(B, device=device)[:, None], B * T)
    centers = torch.zeros(B * T + 1, dtype=torch.bool, device=device)
    return centers.scatter_(0, at.flatten(), True)[:-1].view(B, T)


def corrupt(tokens, masked, n_vocab):
    """80/10/10: of the masked tokens 80 % become [MASK], 10 % a random k-mer (5..n_vocab-1), 10 % stay.

    tokens (B, T), masked bool (B, T) -> inputs (B, T), labels (B, T) with -100 where nothing is predicted.
    """
    n = n_vocab - 5                                          # one draw: 8 n [MASK], n k-mers, n unchanged
    draw = torch.randint(5 - 8 * n, 5 + 2 * n, tokens.shape, device=tokens.device)
    inputs = torch.where(masked & (draw < 5 + n), draw.clamp_(min=MASK), tokens)
    return inputs, torch.where(masked, tokens, -100)


class Genome:
    """One or more FASTA files, packed once into a validated, memory-mapped cache of base codes (1 byte each).

    bases        uint8 memmap of all contigs, end to end
    contigs      {name: length}; offsets {name: first position in bases}
    intervals    int64 (n, 2): the stretches without N, as positions in bases; none crosses a contig's end
    fingerprint  hash of names, lengths and bases: the same for the same genome, wherever its file lies
    keep: names of the contigs to take (default all). cache: folder for the cache (default beside the FASTA).
    """

    def __init__(self, paths, cache=None, keep=None):
        paths = [os.fspath(p) for p in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
        for path in paths:
            check_file(path)
        if len({os.path.realpath(p) for p in paths}) < len(paths):
            raise ValueError(f"{', '.join(paths)}: the same FASTA twice; name each file once")
        index, folder = open_cache(paths, cache, keep and sorted(keep))
        self.bases = np.memmap(os.path.join(folder, "bases.u8"), np.uint8, mode="c")
        self.contigs = dict(index["contigs"])
        ends = np.cumsum(list(self.contigs.values()))
        self.offsets = {name: int(end) - n for (name, n), end in zip(self.contigs.items(), ends)}
        self.intervals = np.array(index["intervals"], np.int64).reshape(-1, 2)
        self.n_ambiguous, self.fingerprint = index["n_ambiguous"], index["fingerprint"]

    def __str__(self):
        n = len(self.bases) - int(np.diff(self.intervals).sum())
        return (f"{len(self.contigs)} contigs, {len(self.bases):,} bases, {n:,} N ({self.n_ambiguous:,} were "
                f"other IUPAC codes), fingerprint {self.fingerprint}")

    def names(self, n):
        """The first n contig names, for a message."""
        return ", ".join(list(self.contigs)[:n]) + (" ..." if len(self.contigs) > n else "")

    def fetch(self, contig, start, end, strand="+"):
        """Text of contig[start:end], 0-based half-open; strand '-' gives the reverse complement."""
        if contig not in self.contigs:
            raise ValueError(f"contig {show(contig)}: not in the genome, which has {self.names(5)}")
        if not 0 <= start < end <= self.contigs[contig]:
            raise ValueError(f"{contig}:{start}-{end}: outside the contig (length {self.contigs[contig]}); "
                             f"coordinates are 0-based, half-open")
        if strand not in ("+", "-"):
            raise ValueError(f"{contig}:{start}-{end}: strand {strand!r}; use '+' or '-'")
        bases = self.bases[self.offsets[contig] + start:self.offsets[contig] + end]
        return decode(reverse_complement(bases) if strand == "-" else bases)

    def split(self, length, val_contigs=()):
        """Intervals (n, 2) for training and for validation, each with room for a window of `length` bases.

        Validation is val_contigs where given, else the last 1 % of every contig whose 1 % holds a window.
        """
        unknown = [name for name in val_contigs if name not in self.contigs]
        if unknown:
            raise ValueError(f"--val_contigs: {show(unknown[0])} is not in the genome: {self.names(8)}")
        sizes = np.array(list(self.contigs.values()))
        if val_contigs:
            held = np.where([name in val_contigs for name in self.contigs], sizes, 0)
        else:
            held = np.where(sizes // 100 >= length, sizes // 100, 0)
        ends = np.cumsum(sizes)
        contig = np.searchsorted(ends, self.intervals[:, 0], side="right")
        start, end = self.intervals.T
        cut = np.clip((ends - held)[contig], start, end)     # training up to here, validation behind it
        train, val = np.stack([start, cut], 1), np.stack([cut, end], 1)
        train, val = train[cut - start >= length], val[end - cut >= length]
        for part, name in ((train, "training"), (val, "validation")):
            if not len(part):
                raise ValueError(
                    f"genome too small: no window of {length} bases without N is left for {name} (longest "
                    f"contig {sizes.max()}, stretch without N {(end - start).max()}; validation is the last "
                    f"1 % of a contig); lower --block_size or use --val_contigs")
        return train, val


def open_genome(names, data_dir, cache=None):
    """The Genome of --genome: FASTA paths; or hg38 (chr1-22, X, Y of data_dir/hg38.fa.gz); or demo."""
    if "demo" in names or "hg38" in names:
        if len(names) > 1:
            raise ValueError(f"--genome {' '.join(names)}: hg38 and demo stand alone; name FASTA files")
        path = os.path.join(data_dir, {"demo": "demo.fa", "hg38": "hg38.fa.gz"}[names[0]])
        if names[0] == "hg38" and not os.path.exists(path):
            raise ValueError(f"{path}: no such file; get it (1 GB): mkdir -p {data_dir} && curl -L -o {path} "
                             f"{HG38_URL} (or use --genome YOUR.fa, or --demo)")
        if names[0] == "demo" and not os.path.exists(path):
            write_demo_genome(path)
        return Genome(path, cache, HG38_CONTIGS if names[0] == "hg38" else None)
    return Genome(names, cache)


def check_file(path):
    """ValueError unless path is a regular file that can be read."""
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file; check the path")
    if not os.path.isfile(path):
        raise ValueError(f"{path}: not a regular file; give a FASTA file (plain or gzip)")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{path}: no permission to read it; chmod +r it or copy it")


def file_fingerprint(path):
    """[name, size, mtime, hash of 64 blocks of 4 KiB]: all of a small file, a sample of a larger one."""
    stat, digest = os.stat(path), hashlib.sha256()
    with open(path, "rb") as f:
        for at in np.linspace(0, max(0, stat.st_size - 4096), 64).astype(int):
            f.seek(at)
            digest.update(f.read(4096))
    return [os.path.basename(path), stat.st_size, stat.st_mtime_ns, digest.hexdigest()]


def open_cache(paths, cache, keep):
    """Finds the cache of these FASTA files or builds it where that can be written: (index, folder)."""
    home = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "nanodna")
    roots = [cache] if cache else [os.path.dirname(os.path.abspath(paths[0])), home]
    source = [file_fingerprint(p) for p in paths] + [keep]
    folders = []
    for root in roots:
        key = json.dumps([[os.path.relpath(p, root) for p in paths], keep])
        name = f"{os.path.basename(paths[0])}.{hashlib.sha256(key.encode()).hexdigest()[:8]}.nanodna"
        folders.append(os.path.join(root, name))
        index = read_index(folders[-1], source)
        if index:
            return index, folders[-1]
    for folder in folders:
        try:
            os.makedirs(folder, exist_ok=True)
            lock = open(os.path.join(folder, "lock"), "w")
        except OSError as e:                                 # a read-only place: the next one
            error = e
            continue
        with lock:
            with contextlib.suppress(OSError):               # some network file systems have no locks
                fcntl.flock(lock, fcntl.LOCK_EX)             # ranks that start together build it once
            os.makedirs(folder, exist_ok=True)               # the one before us may have failed and tidied up
            return read_index(folder, source) or build_cache(paths, keep, source, folder), folder
    raise ValueError(f"{folders[-1]}: cannot write the genome cache ({error.strerror}); give --cache FOLDER")


def read_index(folder, source):
    """The index of a cache that is whole and of these sources; else None, and says why it is built again."""
    if not os.path.exists(os.path.join(folder, "index.json")):
        return None
    try:
        with open(os.path.join(folder, "index.json")) as f:
            index = json.load(f)
        crc = index.pop("crc_index")
        bases = np.memmap(os.path.join(folder, "bases.u8"), np.uint8, mode="r")
        sound = crc == zlib.crc32(json.dumps(index).encode()) and index["crc_bases"] == zlib.crc32(bases)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        sound = False
    if sound and index["source"] == source:
        return index
    print(f"genome cache {folder}: {'FASTA changed' if sound else 'damaged'}, building it again", flush=True)


def build_cache(paths, keep, source, folder):
    """Validates and packs the FASTA files: bases.u8, index.json (temp names, renamed). Returns the index."""
    contigs, intervals, size, crc, n_ambiguous = [], [], 0, 0, 0
    target = os.path.join(folder, "bases.u8")
    try:
        with open(target + ".tmp", "wb") as out:
            for path in paths:
                for name, codes, ambiguous in fasta_records(path):
                    if keep and name not in keep:
                        continue
                    contigs.append((path, name, len(codes)))
                    intervals += (n_free(codes) + size).tolist()
                    size, crc = size + len(codes), zlib.crc32(codes, crc)
                    n_ambiguous += ambiguous
                    out.write(codes)
        missing = set(keep or ()) - {name for _, name, _ in contigs}
        if missing:
            raise ValueError(f"{', '.join(paths)}: without contig {min(missing)}; is it the right genome?")
        if not intervals:
            raise ValueError(f"{', '.join(paths)}: no A, C, G or T; is it the right file?")
        contigs = contig_names(contigs)
        fingerprint = hashlib.sha256(json.dumps([contigs, crc]).encode()).hexdigest()[:12]
        index = {"source": source, "contigs": contigs, "intervals": intervals, "n_ambiguous": n_ambiguous,
                 "crc_bases": crc, "fingerprint": fingerprint}
        with open(os.path.join(folder, "index.json.tmp"), "w") as f:
            json.dump(index | {"crc_index": zlib.crc32(json.dumps(index).encode())}, f)
        os.replace(target + ".tmp", target)
        os.replace(os.path.join(folder, "index.json.tmp"), os.path.join(folder, "index.json"))
    except OSError as e:
        shutil.rmtree(folder, ignore_errors=True)
        raise ValueError(f"{folder}: cannot write the genome cache ({e.strerror}); use --cache FOLDER") from e
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return index


def contig_names(contigs):
    """[(path, name, length)] -> [[name, length]]; where two files share a name, all become file:name."""
    if len({name for _, name, _ in contigs}) < len(contigs):
        contigs = [(path, f"{os.path.basename(path)}:{name}", n) for path, name, n in contigs]
    names = [name for _, name, _ in contigs]
    if len(set(names)) < len(names):
        raise ValueError(f"{contigs[-1][0]}: file and contig names both occur twice; rename a file")
    return [[name, n] for _, name, n in contigs]


def n_free(codes):
    """Codes (L,) -> int64 (n, 2): the stretches without N."""
    is_n = codes == 4
    edges = np.concatenate([[0], np.flatnonzero(is_n[1:] != is_n[:-1]) + 1, [len(codes)]])
    stretches = np.stack([edges[:-1], edges[1:]], 1)
    return stretches[~is_n[edges[:-1]]]


NOT_FASTA = ((b"BZh", "bzip2; unpack it"), (b"PK", "a zip archive; unpack it"), (b"@", "FASTQ; convert it"),
             (b"<", "an HTML page; download the file again"), (b";", "a ';' comment; remove it"),
             (b"version https://git-lfs", "a git-LFS pointer"), (b"LOCUS", "GenBank; convert it"),
             (b"\xff\xfe", "UTF-16; save it as plain text"), (b"\xfe\xff", "UTF-16; save it as plain text"))
BAD_LETTER = {b"U": "RNA? replace U by T", b"u": "RNA? replace U by T", b"-": "a gap; remove alignment gaps",
              b".": "a gap; remove alignment gaps", b"*": "a stop: protein?", b"\r": "old Mac line ends",
              b">": "a header must start on its own line", b" ": "a blank inside a line; remove it",
              b"\t": "a tab inside a line; remove it", b"\0": "a NUL byte: the file is damaged"}


def show(text):
    """Foreign text for a message: repr (no terminal escapes), at most 80 characters."""
    return repr(text.decode("utf-8", "replace") if isinstance(text, (bytes, bytearray)) else text)[:80]


def fasta_records(path):
    """Yields (name, base codes uint8 (L,), number of IUPAC codes other than N) of each record, validated.

    Plain, gzip, bgzip; CRLF, blank lines, lower case, uneven lines are fine. ValueError: file, line, what.
    """
    with open(path, "rb") as f:
        opened = gzip.open if f.read(2) == b"\x1f\x8b" else open
    seen = set()
    with opened(path, "rb") as f:
        try:
            for line, record in raw_records(f):
                if not seen and not record.strip():          # blank lines before the first record
                    continue
                if not record.startswith(b">"):
                    line += record.count(b"\n", 0, len(record) - len(record.lstrip()))
                    text = record[:4096].strip()
                    kind = [what for magic, what in NOT_FASTA if text.startswith(magic)] or [show(text[:40])]
                    raise ValueError(f"{path}: line {line}: not a FASTA header ({kind[0]}); write '>name'")
                end = record.find(b"\n") % (len(record) + 1)  # without a line end: all of it
                name = contig_name(record[:end], seen, path, line)
                del record[:end + 1]                         # in place: a contig is large
                yield name, *contig_codes(record, path, line)
        except (EOFError, zlib.error, gzip.BadGzipFile) as e:
            raise ValueError(f"{path}: damaged gzip file ({e}); download it again") from None
    if not seen:
        raise ValueError(f"{path}: empty, there is no FASTA record in it; check the file")


def raw_records(f):
    """Yields (line number, bytearray) of each '>' record of a stream, and of what precedes the first."""
    buffer, line, searched = bytearray(), 1, 0
    while chunk := f.read(CHUNK):
        buffer += chunk.removeprefix(b"\xef\xbb\xbf") if line == 1 and not buffer else chunk
        while (end := buffer.find(b"\n>", searched)) >= 0:
            record, searched = buffer[:end + 1], 0
            del buffer[:end + 1]
            lines = record.count(b"\n")
            yield line, record
            line += lines
        searched = max(0, len(buffer) - 1)
        start = buffer[:4096].strip()
        if start and not start.startswith(b">"):             # no FASTA: stop before reading all of it
            break
    if buffer:
        yield line, buffer


def contig_name(header, seen, path, line):
    """Checks the header line, adds its name (first word) to `seen` and returns it."""
    header = header.rstrip(b"\r")
    if b"\r" in header:
        raise ValueError(f"{path}: line {line}: old Mac (CR) line ends; convert them to LF")
    name = header[1:].split(None, 1)[0].decode("utf-8", "replace") if header[1:2].strip() else ""
    if not name.isprintable() or not name:
        raise ValueError(f"{path}: line {line}: header without a name ({show(header[:40])}); write '>name'")
    if name in seen:
        raise ValueError(f"{path}: line {line}: contig name {show(name)} occurs twice; rename one")
    seen.add(name)
    return name


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
        raise ValueError(f"{path}: line {line}: not a DNA letter ({show(bad.group())}"
                         f"{': ' + BAD_LETTER[bad.group()] if bad.group() in BAD_LETTER else ''}); "
                         f"allowed are A, C, G, T, N and IUPAC codes")
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
    """Writes the synthetic genome of the demos: 4 contigs of 250 kb, the same on every machine.

    Order-3 Markov background; 15 % of it overwritten by copies of 3 interspersed repeats of 300 bases (10 %
    of them mutated); a copy of DEMO_MOTIF about every 500 bases.
    """
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
        copy = np.where(mutated, rng.integers(4, size=300), repeats[rng.integers(3)])
        genome[start:start + 300] = copy
    motif = encode(DEMO_MOTIF)
    for start in rng.integers(len(genome) - len(motif), size=len(genome) // 500):
        genome[start:start + len(motif)] = motif
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(f"{path}.{os.getpid()}.tmp", "w") as f:        # ranks may write it at the same time
        for c, contig in enumerate(genome.reshape(4, -1), 1):
            f.write(f">demo{c}\n" + re.sub("(.{80})", r"\1\n", decode(contig)) + "\n")
    os.replace(f.name, path)
