"""data.py against literal references: letters, k-mers, span masks, genomes, their windows and their cache."""
import errno
import gzip
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import tarfile
import tempfile
import zlib
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyfaidx
import pytest
import torch
from scipy.stats import chisquare

import data
from harness import SHARED, cases, expand, fork, random_dna, wait, write_case, write_fasta
from tools.predict import read_sequences

GOLDEN = SHARED / "golden" / "genemask_golden.json"
YEAST = SHARED / "data" / "genomes" / "yeast_S288C_R64_16chr.fa.gz"


def refusal(function, *args):
    with pytest.raises(ValueError) as e:
        function(*args)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500
    return str(e.value)


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_letters_and_reverse_complement(kind):
    assert data.encode("ATCGNatcgnRy").tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 4, 4]
    assert data.decode(data.encode("acgtnNwACGT")) == "ACGTNNNACGT" and data.encode("").shape == (0,)
    assert "position 3" in refusal(data.encode, "ACGU") and "position 2" in refusal(data.encode, "ACé")
    bases = kind(np.random.default_rng(0).integers(5, size=(7, 33), dtype=np.uint8))
    other, pairs = data.reverse_complement(bases), dict(zip("ATCGN", "TAGCN"))
    assert type(other) is type(bases) and (data.reverse_complement(other) == bases).all()
    for row, back in zip(bases, other):
        assert data.decode(back) == "".join(pairs[c] for c in reversed(data.decode(row)))


def literal_ids(text, k, stride):
    words = [text.upper()[i:i + k] for i in range(0, len(text) - k + 1, stride)]
    return [1 if "N" in w else 5 + int("".join(str("ATCG".index(c)) for c in w), 4) for w in words]


@pytest.mark.parametrize("k", range(1, 9))
def test_tokens(k):
    rng = np.random.default_rng(k)
    texts = [random_dna(n, rng, "ACGTacgtNn" if n % 2 else "ACGTacgt")
             for n in (0, 1, k - 1, k, k + 1, 2 * k, 57, 200, 3 * k + 1)]
    for stride in {1, k}:
        rows = [[2, *literal_ids(text, k, stride), 3] for text in texts]
        width = max(map(len, rows))
        assert data.tokenize(texts, k, stride).tolist() == [row + [0] * (width - len(row)) for row in rows]
        for n_letters in (4, 5):                             # without and with N
            bases = torch.from_numpy(rng.integers(n_letters, size=(20, 60), dtype=np.uint8))
            want = [literal_ids(data.decode(row), k, stride) for row in bases]
            assert data.kmer_tokens(bases, k, stride).tolist() == want
    assert "sequence 1, position 2" in refusal(data.tokenize, ["ACGT", "ACX"], k)
    assert "give a list of strings" in refusal(data.tokenize, "ACGT", k)


@pytest.mark.skipif(not GOLDEN.exists(), reason="no shared data")
def test_golden_cases():
    table = json.loads(GOLDEN.read_text())
    for case in table["tokenizer"]:
        assert data.tokenize([case["kmer"]]).tolist() == [[2, case["id"], 3]]
    one_row = [{"k": c["k"]} | {x: [c[x]] for x in ("n", "centers", "masked")} for c in table["dnabert_span"]]
    for case in [*one_row, table["dnabert_span_batch_with_padding"]]:
        at, n = torch.arange(64), torch.tensor(case["n"])[:, None]
        centers = torch.stack([torch.isin(at, torch.tensor(c)) for c in case["centers"]])
        masked = data.span_mask(centers, (at > 0) & (at <= n), (case["k"] - 1) // 2, case["k"] // 2)
        assert [row.nonzero()[:, 0].tolist() for row in masked] == case["masked"]


def test_span_mask():
    torch.manual_seed(0)
    for draw in range(300):
        B, T = 1 + draw % 13, 1 + draw % 41
        maskable, centers = torch.rand(B, T) < 0.7, torch.rand(B, T) < draw % 7 / 10
        left, right, rows = draw % 5, draw % 4, draw % 3
        if rows:                                             # each has its own, on both sides or on one
            left, right = torch.randint(0, 9, (2, B)) if rows == 1 else (left, torch.randint(0, 9, (B,)))
        want = torch.zeros(B, T, dtype=torch.bool)
        for b, c in (centers & maskable).nonzero().tolist():
            low, high = (int(torch.as_tensor(side).expand(B)[b]) for side in (left, right))
            want[b, max(0, c - low):c + high + 1] = True
        assert torch.equal(data.span_mask(centers, maskable, left, right), want & maskable)
        if rows == 1:
            at = torch.where(centers, torch.arange(T), T).sort(1).values
            assert torch.equal(data.row_spans(at, maskable, left, right), want & maskable)


def test_corrupt_80_10_10():
    torch.manual_seed(1)
    tokens = torch.randint(5, 21, (400, 512))
    masked = torch.rand(tokens.shape) < 0.6
    inputs, labels = data.corrupt(tokens, masked, 21)
    assert torch.equal(labels, torch.where(masked, tokens, -100))
    assert torch.equal(inputs[~masked], tokens[~masked])
    after, before = inputs[masked], tokens[masked]
    changed = after[(after != 4) & (after != before)]        # 15 of 16 random k-mers are other ones
    shares = [(after == 4).float().mean(), len(changed) / len(after) * 16 / 15]
    assert shares == pytest.approx([0.8, 0.1], abs=0.01) and len(after) > 100_000
    assert changed.min() == 5 and changed.max() == 20 and chisquare(torch.bincount(changed)[5:]).pvalue > 1e-4


def check_fasta(case, folder, chunk):
    """Reads or refuses a case as its table says; what is read at a time may end anywhere."""
    path, word = folder / "case.fa", "".join(case.get("word", "").partition(":")[:3 if chunk > 99 else 1])
    if "contigs" in case:
        genome = data.Genome(path, folder / str(chunk))
        texts = {name: genome.fetch(name, 0, n) for name, n in genome.contigs.items()}
        assert texts == {name: expand(text) for name, text in case["contigs"].items()}
    elif "split" in case:
        assert word in refusal(data.Genome(path, folder / str(chunk)).split, case["split"])
    else:
        assert re.search(f"{path}.*{word}", refusal(data.Genome, path))
        assert os.listdir(folder) == ["case.fa"]


@pytest.mark.fault("FASTA cases")
@pytest.mark.parametrize("case", cases("fasta.json"), ids=lambda c: c["name"])
def test_fasta(case, tmp_path):
    write_case(case, tmp_path / "case.fa")
    check_fasta(case, tmp_path, data.CHUNK)


@pytest.mark.fault("FASTA chunk boundaries", n=13)
@pytest.mark.parametrize("case", cases("fasta.json"), ids=lambda c: c["name"])
def test_fasta_chunk_boundaries(case, tmp_path, monkeypatch, survived):
    step = 1 if write_case(case, tmp_path / "case.fa").stat().st_size < 9999 else 9001
    for chunk in (4, 5, 6, 7, 8, 9, 11, 13, 16, 23, 32, 64, 99):
        monkeypatch.setattr(data, "CHUNK", step * chunk)
        check_fasta(case, tmp_path, step * chunk)
        survived()


def as_nobody(function):                                     # root ignores chmod
    return wait(fork(lambda: (os.getuid() or os.setgroups([]) or os.setuid(65534), function())))


@pytest.mark.fault("FASTA paths", n=10)
def test_paths_and_permissions(tmp_path, monkeypatch, survived):
    os.mkfifo(tmp_path / "pipe")
    os.symlink("nowhere", tmp_path / "link")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(tmp_path / "socket"))
    for path, word in (("nowhere", "no such file"), ("link", "no such file"), (".", "regular"),
                       ("pipe", "regular"), ("socket", "regular"), ("/dev/zero", "regular")):
        assert word in refusal(data.Genome, tmp_path / path)
        survived()
    with tempfile.TemporaryDirectory() as folder:            # pytest's own folder is closed to nobody
        fasta = write_fasta(Path(folder) / "a.fa", {"a": "ACGT" * 10})
        os.mkdir(f"{folder}/home"), os.chmod(f"{folder}/home", 0o777), os.chmod(folder, 0o555)
        monkeypatch.setenv("XDG_CACHE_HOME", f"{folder}/home")
        result = as_nobody(lambda: print(data.Genome(fasta).fetch("a", 0, 8)))
        assert result.out == "ACGTACGT\n" and os.listdir(f"{folder}/home/nanodna"), result
        survived()
        for cache in (folder, "/proc/nanodna"):              # read-only; never there
            assert "--cache" in as_nobody(lambda: data.Genome(fasta, cache)).err.splitlines()[-1]
            survived()
        os.chmod(fasta, 0o000)
        assert "no permission" in as_nobody(lambda: data.Genome(fasta)).err.splitlines()[-1]
        assert sorted(os.listdir(folder)) == ["a.fa", "home"]
        survived()


@pytest.mark.fault("positions behind 2**32", n=3)
def test_a_genome_of_more_than_4_gib(tmp_path, monkeypatch, survived):
    """A sparse cache of 5.4 GB with DNA at its end; its checksum, seconds of zeros, is taken as right."""
    text, at, size = random_dna(5000, np.random.default_rng(4)), 5_300_000_000, 2_700_000_000
    index = {"names": ["a", "b"], "ends": np.array([size, 2 * size]), "n_ambiguous": 0, "fingerprint": "",
             "intervals": np.array([0, 1000, at, at + 5000])}
    with open(tmp_path / "bases.u8", "wb") as f:
        f.seek(at)
        f.write(data.encode(text))
        f.truncate(2 * size)
    bases = np.memmap(tmp_path / "bases.u8", np.uint8, mode="c")
    monkeypatch.setattr(data, "open_cache", lambda *_: (index, bases))
    genome = data.Genome("a.fa")
    assert genome.fetch("b", at - size, at - size + 5000) == text
    survived()
    train, val = genome.split(20, ["a"])
    assert (train.tolist(), val.tolist()) == ([[at, at + 5000]], [[0, 1000]])
    starts = data.draw_starts(data.window_table(train, 20), 500, np.random.default_rng(0))
    assert starts.dtype == np.int64 and starts.min() >= at > 2 ** 32 and starts.max() <= at + 4980
    survived()
    windows = [data.decode(row) for row in data.take_windows(genome.bases, starts, 20)]
    assert windows == [text[start - at:start - at + 20] for start in starts]
    survived()


@pytest.mark.parametrize("source", [None, YEAST], ids=["made", "yeast"])
def test_fetch_equals_pyfaidx(tmp_path, source):
    rng, path = np.random.default_rng(2), tmp_path / "a.fa"
    if source and not source.exists():
        pytest.skip("no shared data")
    texts = [random_dna(int(rng.integers(1, 400)), rng, "ACGTacgtNRyw") for _ in range(9)]
    made = "".join(f">c{i} x\n" + re.sub("(.{60})", r"\1\n", t) + "\n" for i, t in enumerate(texts))
    path.write_bytes(gzip.decompress(source.read_bytes()) if source else made.encode())
    genome, theirs = data.Genome(path), pyfaidx.Fasta(str(path))
    assert genome.contigs == {name: len(theirs[name]) for name in theirs.keys()}
    for _ in range(200):
        contig = str(rng.choice(list(genome.contigs)))
        start = int(rng.integers(genome.contigs[contig]))
        end = int(rng.integers(start, min(genome.contigs[contig], start + 2000))) + 1
        for strand, want in (("+", theirs[contig][start:end]), ("-", -theirs[contig][start:end])):
            assert genome.fetch(contig, start, end, strand) == re.sub("[^ACGT]", "N", want.seq.upper())
    for args in (("?", 0, 1), (contig, -1, 3), (contig, 5, 5), (contig, 0, 10 ** 9), (contig, 0, 1, ".")):
        assert args[0] in refusal(genome.fetch, *args)


@pytest.mark.parametrize("val_contigs", [(), ("b",), ("a", "d")], ids=str)
def test_windows(tmp_path, val_contigs):
    rng, length, offset, train, val = np.random.default_rng(5), 11, 0, set(), set()
    texts = {"a": random_dna(2100, rng, "ACGT" * 90 + "N"), "b": random_dna(1100, rng), "c": "ACGTACG",
             "d": "NNN" + random_dna(1900, rng) + "N" + random_dna(11, rng) + "NN", "e": random_dna(900, rng)}
    for name, text in texts.items():                         # every window, one by one
        held = len(text) * (name in val_contigs) if val_contigs else len(text) // 100
        cut = len(text) - (held if held >= length else 0)
        valid = [s for s in range(len(text) - length + 1) if "N" not in text[s:s + length]]
        train |= {offset + s for s in valid if s + length <= cut}
        val |= {offset + s for s in valid if s >= cut}
        offset += len(text)
    genome = data.Genome(write_fasta(tmp_path / "a.fa", texts))
    for intervals, want in zip(genome.split(length, val_contigs), (train, val)):
        starts = data.draw_starts(data.window_table(intervals, length), 60 * len(want), rng)
        seen, counts = np.unique(starts, return_counts=True)
        assert set(seen.tolist()) == want and chisquare(counts).pvalue > 1e-4
        windows = [data.decode(row) for row in data.take_windows(genome.bases, starts[:500], length)]
        assert windows == ["".join(texts.values())[s:s + length] for s in starts[:500]]
    assert "nowhere" in refusal(genome.split, length, ["nowhere"])
    pair = {name: texts[name] for name in "ac"}              # one has a window
    assert "validation" in refusal(data.Genome(write_fasta(tmp_path / "b.fa", pair)).split, 60)
    assert "training" in refusal(genome.split, length, [*texts])


def test_several_files_and_keep(tmp_path):
    x, y, z = (write_fasta(tmp_path / f"{name}.fa", texts) for name, texts in (
        ("x", {"chr1": "ACGTA", "chr2": "CCCC"}), ("y", {"chr1": "GGNG"}), ("z", {"m": "TTT"})))
    assert data.Genome([x, z]).contigs == {"chr1": 5, "chr2": 4, "m": 3}
    genome, copy = data.Genome([x, y]), data.Genome(shutil.copy(x, tmp_path / "copy.fa"))
    assert genome.contigs == {"x.fa:chr1": 5, "x.fa:chr2": 4, "y.fa:chr1": 4}
    assert genome.fetch("y.fa:chr1", 0, 4) == "GGNG" and genome.fetch("x.fa:chr2", 0, 4) == "CCCC"
    assert genome.intervals.tolist() == [[0, 5], [5, 9], [9, 11], [12, 13]]
    assert data.Genome(x, keep=["chr2"]).contigs == {"chr2": 4} and len(data.Genome(x).contigs) == 2
    assert "chr7" in refusal(data.Genome, x, None, ["chr7"]) and "twice" in refusal(data.Genome, [x, f"{x}"])
    assert copy.fingerprint == data.Genome(x).fingerprint == "4c34bd4ea06f"    # as ever: run folders hold it
    assert genome.fingerprint == "0ec24bb4a998"


@pytest.fixture
def cached(tmp_path, capsys):
    """A function that opens a genome and checks what it reads and says; the files of its cache."""
    text, cache = random_dna(120, np.random.default_rng(8), "ACGTN"), tmp_path / "cache"
    fasta = write_fasta(tmp_path / "a.fa", {"a": text})

    def check(said, text=text):
        assert data.Genome(fasta, cache).fetch("a", 0, 120) == text
        out = capsys.readouterr().out
        assert said in out and bool(out) == bool(said), out
    check("")
    return check, fasta, *(next(cache.iterdir()) / name for name in ("bases.u8", "index.json"))


def damage(check, damaged, survived):
    """Each of the damaged [(file, bytes)] must be seen, and the file must become again what it was."""
    for file, raw in damaged:
        sound = file.read_bytes()
        file.write_bytes(raw)
        check("damaged")
        assert file.read_bytes() == sound
        check("")
        survived()


@pytest.mark.fault("genome cache: truncations", n=240)
def test_truncated_cache(cached, survived):
    check, _, bases, index = cached
    damage(check, [(bases, bases.read_bytes()[:n]) for n in range(120)] + [
        (index, index.read_bytes()[:n]) for n in np.linspace(0, index.stat().st_size - 1, 120).astype(int)],
        survived)


@pytest.mark.fault("genome cache: bit flips", n=300)
def test_flipped_cache(cached, survived):
    check, _, *files = cached
    for file, draws in zip(files, np.random.default_rng(8).random((2, 150, 2)).tolist()):
        sound = file.read_bytes()
        places = [(int(at * len(sound)), 1 << int(8 * bit)) for at, bit in draws]
        damage(check, [(file, sound[:at] + bytes([sound[at] ^ bit]) + sound[at + 1:]) for at, bit in places],
               survived)


@pytest.mark.fault("genome cache: stale or foreign", n=12)
def test_stale_or_foreign_cache(cached, tmp_path, survived):
    check, fasta, bases, index = cached
    foreign = data.Genome(write_fasta(tmp_path / "b.fa", {"a": "AC" * 60}), tmp_path / "b")
    folder, = (tmp_path / "b").glob("*.nanodna")
    damage(check, [(index, b"[]"), (index, b"{}"), (index, b"[" * 10 ** 5), (bases, bytes(120)),
                   (bases, bases.read_bytes() + b"x"), (bases, (folder / "bases.u8").read_bytes())], survived)
    shutil.copy(folder / "index.json", index)
    check("damaged"), survived()
    for file in ("bases.u8", "index.json"):                  # both: a whole cache, of another FASTA
        shutil.copy(folder / file, index.with_name(file))
    check("changed"), survived()
    for text, when in (("ACGTT" * 24, 1), ("ACGTA" + "ACGTT" * 23, 1), ("CCGTA" + "ACGTT" * 23, None),
                       ("CCGTA" + "ACGTT" * 23, 2)):         # older; as old and as long; newer; only touched
        write_fasta(fasta, {"a": text})
        os.utime(fasta, when and (when, when))
        check("changed" if when != 2 else "", text), survived()
    assert foreign.fetch("a", 0, 4) == "ACAC"


@pytest.mark.fault("genome cache: one base changed, size and time kept", n=30)
@pytest.mark.parametrize("hashed", [10 ** 6, 1000], ids=["hashed whole", "large"])
def test_one_base_changed_at_the_same_time_and_size(tmp_path, capsys, monkeypatch, survived, hashed):
    monkeypatch.setattr(data, "HASHED", hashed)
    text, rng = random_dna(50_000, np.random.default_rng(3)), random.Random(4)
    fasta = write_fasta(tmp_path / "a.fa", {"a": text})
    print(data.Genome(fasta))
    for at in rng.sample(range(len(text)), 30):
        stat = os.stat(fasta)
        text = text[:at] + {"A": "C", "C": "G", "G": "T", "T": "A"}[text[at]] + text[at + 1:]
        write_fasta(fasta, {"a": text})
        os.utime(fasta, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        capsys.readouterr()
        assert data.Genome(fasta).fetch("a", 0, len(text)) == text
        assert "the FASTA has changed; building it again" in capsys.readouterr().out
        survived()


def test_a_large_file_is_hashed_whole_once_for_each_inode_and_time(tmp_path, capsys, monkeypatch):
    fasta, digest, whole = write_fasta(tmp_path / "a.fa", {"a": "ACGTT" * 999}), data.file_digest, []

    def counted(path, *blocks):
        whole.extend([path] * (not blocks))
        return digest(path, *blocks)
    monkeypatch.setattr(data, "HASHED", 1000)
    monkeypatch.setattr(data, "file_digest", counted)
    for change in (None, lambda: os.utime(fasta, (5, 5)), lambda: os.chmod(fasta, 0o600),
                   lambda: os.replace(shutil.copy(fasta, tmp_path / "b.fa"), fasta)):
        if change:
            change()
        for n in (1, 0):                                     # once to see that it is the same, then never
            assert data.Genome(fasta).fetch("a", 0, 5) == "ACGTT" and len(whole) == n
            whole.clear()
    assert capsys.readouterr().out == ""                     # never built again


@pytest.mark.fault("genome cache: planted or not private", n=11)
@pytest.mark.skipif(os.getuid() != 0, reason="needs two users")
def test_caches_of_other_users(survived, monkeypatch):
    """65533 plants in a sticky folder where all may write; root and nobody open. Nothing of theirs is read
    or overwritten, unless --cache names the place; then --verify finds what is planted."""
    def go(user, function):
        return wait(fork(lambda: (os.setgroups([]), os.setgid(user), os.setuid(user), function())))

    def read(user, cache=None, **how):
        return go(user, lambda: print(data.Genome(fasta, cache, **how).fetch("a", 0, 8)))
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o1777)
        monkeypatch.setenv("XDG_CACHE_HOME", f"{folder}/home")
        os.mkdir(f"{folder}/home", 0o777), os.chmod(f"{folder}/home", 0o777)
        fasta, sound = write_fasta(Path(folder) / "a.fa", {"a": "ACGTTGCA" * 50}), "ACGTTGCA\n"
        assert read(65533).out == sound
        cache, = Path(folder).glob("*.nanodna")
        assert [path.stat().st_mode & 0o777 for path in (cache, *cache.iterdir())] == [0o700, *[0o600] * 3]
        survived()
        index = json.loads((cache / "index.json").read_text()) | {"crc_bases": zlib.crc32(bytes(400))}
        del index["crc_index"]
        index["crc_index"] = zlib.crc32(json.dumps(index).encode())
        (cache / "bases.u8").write_bytes(bytes(400)), (cache / "index.json").write_text(json.dumps(index))
        os.chmod(cache, 0o755), [os.chmod(path, 0o644) for path in cache.iterdir()]
        for user in (0, 65534):
            result = read(user)
            assert "uid 65533" in result.out and result.out.endswith(sound), result
            survived()
            assert read(user, folder).out == "AAAAAAAA\n"    # named: trusted, but
            result = read(user, folder, verify=True)
            assert result.code and "it is not what the FASTA holds" in result.err.splitlines()[-1]
            survived()
            shutil.rmtree(f"{folder}/home/nanodna")
        secret = Path(folder) / "secret"
        for owner, mode, named in ((65533, 0o755, None), (65533, 0o777, folder), (65534, 0o777, None),
                                   (65534, 0o775, folder), (65534, 0o755, None)):
            shutil.rmtree(cache), cache.mkdir()
            secret.write_text("mine"), os.chown(secret, 65534, 65534)
            for name in ("lock", "bases.u8.tmp", "index.json"):
                os.symlink(secret, cache / name)
            os.chmod(cache, mode), os.chown(cache, owner, owner)
            result = read(65534, named)
            assert result.out.endswith(sound) or "--cache" in result.err.splitlines()[-1], result
            assert secret.read_text() == "mine"
            survived()
        (link := Path(folder) / "elsewhere").mkdir(), shutil.rmtree(cache), os.chown(link, 65534, 65534)
        os.symlink(link, cache), os.chown(cache, 65533, 65533, follow_symlinks=False)
        assert "uid 65533" in read(65534).out and not os.listdir(link)
        survived()


@pytest.mark.fault("genome cache: not enough memory", n=3)
def test_a_sound_cache_stays_where_memory_is_short(tmp_path, survived):
    """Under ulimit -v: one line; the cache that others use is as it was, and none is left half made."""
    text = "ACGTTGCA" * 1_250_000
    fasta, cache = write_fasta(tmp_path / "a.fa", {"a": text}), tmp_path / "cache"

    def read(room, keep=None):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + room,) * 2)
        print(data.Genome(fasta, cache, keep).fetch("a", 0, 8))
    message = wait(fork(lambda: read(6 << 20))).err          # a heap with room can pack it, but not map it
    assert "memory to pack" in message and not any(cache.iterdir()) or "memory to map" in message
    survived()
    genome = data.Genome(fasta, cache)
    before = {path: os.stat(path) for path in cache.glob("*/*")}
    result = wait(fork(lambda: read(6 << 20)))
    assert "not enough memory to map" in result.err.splitlines()[-1] and "damaged" not in result.out
    assert before == {path: os.stat(path) for path in cache.glob("*/*")}
    assert genome.fetch("a", 0, 8) == text[:8]
    survived()
    assert wait(fork(lambda: read(1 << 30))).out == "ACGTTGCA\n"
    survived()


@pytest.mark.fault("genome cache: stopped while packing", n=3)
@pytest.mark.parametrize("which, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_stop_while_packing_leaves_nothing(tmp_path, monkeypatch, survived, which, code):
    """One line, no traceback; a stale cache of before stays; a second signal changes nothing."""
    fasta, cache = write_fasta(tmp_path / "a.fa", {f"c{i}": "ACGT" * 9 for i in range(9)}), tmp_path / "cache"
    codes = data.contig_codes

    def stop(*args, n=1):
        [os.kill(os.getpid(), which) for _ in range(n)]
        return codes(*args)
    for n, ready in ((1, False), (2, False), (1, True)):
        if ready:
            data.Genome(fasta, cache)
            write_fasta(fasta, {"a": "ACGTA"})
        before = {path: os.stat(path) for path in cache.glob("*/*")}
        with monkeypatch.context() as patch:
            patch.setattr(data, "contig_codes", lambda *args: stop(*args, n=n))
            result = wait(fork(lambda: data.Genome(fasta, cache)))
        assert result.code == code and result.err.count("\n") == 1, result
        assert result.err.startswith("stopped  by a signal while packing the genome")
        assert before == {path: os.stat(path) for path in cache.glob("*/*")} and any(cache.iterdir()) == ready
        survived()


def test_an_ignored_signal_stays_ignored():
    def work():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with data.stoppable("x"):
            os.kill(os.getpid(), signal.SIGHUP)
        print(signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP))
    result = wait(fork(work))
    assert result.code == 0 and result.out == f"{int(signal.SIG_DFL)} {int(signal.SIG_IGN)}\n", result


IUPAC = {"R": "AG", "Y": "CT", "S": "CG", "W": "AT", "K": "GT", "M": "AC", "B": "CGT", "D": "AGT", "H": "ACT",
         "V": "ACG"}


@pytest.mark.parametrize("code", IUPAC)
def test_iupac_codes_are_drawn_among_their_bases(tmp_path, code):
    """All bases of a code equally often, by position alone; N stays N, and the other letters stay."""
    text = random_dna(6000, np.random.default_rng(6), f"ACTN{code}{code.lower()}")
    fasta, drawn = tmp_path / "a.fa", []
    for lines in (text, re.sub("(.{70})", r"\1 \r\n", text), text.replace("A", "T")):
        fasta.write_text(f">a\n{lines}\n")
        genome = data.Genome(fasta, ambiguous="random", verify=True)
        drawn.append(genome.fetch("a", 0, 6000))
        assert f"{text.upper().count(code):,} IUPAC codes drawn" in str(genome)
        plain = re.sub("[^ACGT]", "N", "".join(lines.split()).upper())
        assert data.Genome(fasta).fetch("a", 0, 6000) == plain
    assert drawn[0] == drawn[1]
    first, other = ([b for a, b in zip(text.upper(), now) if a == code] for now in (drawn[0], drawn[2]))
    assert first == other and set(first) == set(IUPAC[code])
    assert chisquare([first.count(b) for b in IUPAC[code]]).pvalue > 1e-4
    assert all(a == b for a, b in zip(text.upper(), drawn[0]) if a != code)
    assert len(list(tmp_path.glob("*.nanodna"))) == 2        # a cache for each


def literal_reach(texts, length, val_contigs):
    """The contigs and bases that training and validation windows reach, base by base."""
    reached = [set(), set()]
    for name, text in texts.items():
        held = len(text) * (name in val_contigs) if val_contigs else len(text) // 100
        cut = len(text) - (held if held >= length else 0)
        for start in range(len(text) - length + 1):
            if set(text[start:start + length]) <= set("ACGT") and not start < cut < start + length:
                reached[start >= cut] |= {(name, at) for at in range(start, start + length)}
    return [f"{len({name for name, _ in part}):,}" for part in reached], [len(part) for part in reached]


def test_what_no_window_reaches_is_counted(tmp_path):
    rng, length = np.random.default_rng(5), 11
    texts = {"a": random_dna(2100, rng, "ACGT" * 90 + "N"), "b": random_dna(1150, rng), "c": "ACGTACG",
             "d": "NNN" + random_dna(1900, rng) + "N" + random_dna(11, rng) + "NN",
             "e": "R".join(random_dna(9, rng) for _ in range(200)), "f": random_dna(10, rng)}
    genome = data.Genome(write_fasta(tmp_path / "a.fa", texts))
    drawn = data.Genome(tmp_path / "a.fa", ambiguous="random")
    for val_contigs in ((), ("b",), ("a", "d")):
        (n_train, n_val), n_bases = literal_reach(texts, length, val_contigs)
        n, (line, warning) = genome.reach(length, val_contigs)
        known = sum(len(text) - text.count("N") for text in texts.values())
        assert n == n_bases[0] and f"training windows: {n:,} bases in {n_train} of 6 contigs" in line
        assert f"validation windows: {n_bases[1]:,} bases in {n_val}; never read: " in line
        assert line.endswith(f" {known - sum(n_bases):,}")
        assert f"{known - sum(n_bases):,} of {known:,} bases" in warning and "--ambiguous random" in warning
        assert len(drawn.reach(length, val_contigs)[1]) == 1  # over 90 % now


def test_of_short_contigs_whole_ones_are_held_out(tmp_path):
    """500 viruses of 10 kb: 1 % of each is no window of 515. By their names, in whatever order they come."""
    rng, parts = np.random.default_rng(5), []
    texts = {f"v{i}": random_dna(1000, rng) for i in range(500)} | {"short": random_dna(50, rng)}
    for i, names in enumerate((texts, reversed(texts))):
        genome = data.Genome(write_fasta(tmp_path / f"{i}.fa", {name: texts[name] for name in names}))
        contigs, offsets = [*genome.contigs], [*genome.offsets.values()]
        train, val = ([contigs[offsets.index(start)] for start in part[:, 0]] for part in genome.split(51))
        assert len(train) == 495 and {*train} | {*val} == {*texts} - {"short"} and not {*train} & {*val}
        parts.append({*val})
    by_hash = sorted({*texts} - {"short"}, key=lambda name: zlib.crc32(name.encode()))
    assert parts[0] == parts[1] == {*by_hash[:5]}            # 5,000 of 500,000 bases
    assert "held out 5 whole contigs, by a hash of names" in genome.reach(51)[1][1]
    train, val = genome.split(51, ["v0"])
    assert (len(train), len(val)) == (499, 1)
    pair = data.Genome(write_fasta(tmp_path / "b.fa", {"a": random_dna(60, rng), "b": random_dna(5099, rng)}))
    assert [len(part) for part in pair.split(51)] == [1, 1]
    assert "longest: 1,000" in refusal(genome.split, 1001) and "change --val_contigs" in refusal(
        genome.split, 51, [*genome.contigs])


@pytest.mark.fault("foreign files as tables or genomes", n=6)
@pytest.mark.parametrize("case", [case for case in cases("fasta.json") if "format" in case],
                         ids=lambda case: case["name"])
def test_other_formats_are_named(case, tmp_path, monkeypatch, survived):
    """Under any name, packed or not, as a table and as the --fasta of intervals: what it is, what helps."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    word, raw = case["word"].removeprefix("line 1: "), write_case(case, tmp_path / "case.fa").read_bytes()
    for name in ("case.bed", "case.csv", "case.txt", "case.csv.gz", "case.bed.gz"):
        (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
        assert re.search(word, refusal(data.read_table, tmp_path / name))
        survived()
    assert re.search(word, refusal(data.open_fasta, str(tmp_path / "case.fa")))
    survived()


def test_an_archive_is_named(tmp_path):
    (tmp_path / "a.fa").write_text(">a\nACGT\n")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "a.fa", "a.fa")
    assert "line 1: this is a tar archive; unpack it" in refusal(data.Genome, tmp_path / "a.tar.gz")


def test_a_fasta_under_another_name(tmp_path, monkeypatch):
    """As a table it is named; tools.predict reads it; --fasta needs it unpacked."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    text = b"\n>a x\nACGT\n>b\nGG\n"
    for name, raw in (("a.txt", text), ("b.csv.gz", gzip.compress(text)), ("c.fna", text)):
        (tmp_path / name).write_bytes(raw)
        assert "this is FASTA, not a table" in refusal(data.read_table, tmp_path / name)
        found = [(name, data.decode(codes)) for name, codes in read_sequences(
            SimpleNamespace(file=str(tmp_path / name), window=None, step=None))]
        assert found == [("a", "ACGT"), ("b", "GG")]
    (tmp_path / "d.fa.gz").write_bytes(gzip.compress(b">a\nACGT\n"))
    assert "unpack it with gunzip" in refusal(data.open_fasta, str(tmp_path / "d.fa.gz"))
    assert not [*tmp_path.rglob("*.fai*")]


@pytest.mark.fault("genome cache: concurrent builds", n=24)
def test_processes_build_the_cache_at_once_and_a_full_disk_leaves_nothing(tmp_path, survived):
    text, cache = random_dna(1_000_000, np.random.default_rng(9)), tmp_path / "cache"
    fasta = write_fasta(tmp_path / "a.fa", {"a": text})

    def read(limit=1 << 30):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        assert data.Genome(fasta, cache).fetch("a", 0, len(text)) == text
    for _ in range(6):
        result = wait(*[fork(read) for _ in range(4)])
        for code in result.codes:
            assert code == 0, result.err
            survived()
        shutil.rmtree(cache)
    assert "cannot read or write" in wait(fork(lambda: read(50_000))).err.splitlines()[-1]
    assert not list(cache.iterdir())


@pytest.mark.fault("genome cache: concurrent builds, killed and removed", n=60)
def test_builders_are_killed_and_the_cache_removed(tmp_path, survived):
    """Four processes open the genome again and again; some are killed, and now and then the cache goes."""
    rng, cache, log = random.Random(3), tmp_path / "cache", tmp_path / "log"
    texts = {f"c{i}": random_dna(5000, np.random.default_rng(i)) for i in range(40)}
    fasta = write_fasta(tmp_path / "a.fa", texts)

    def reader():
        while True:
            genome = data.Genome(fasta, cache)
            right = all(genome.fetch(name, 0, 5000) == text for name, text in texts.items())
            with open(log, "a") as f:
                f.write("wrong right".split()[right] + "\n")
    log.touch()
    processes, kills = [fork(reader) for _ in range(4)], 0
    deadline = time.monotonic() + 240
    while kills < 15 or len(log.read_text().split()) < 60:
        assert time.monotonic() < deadline
        time.sleep(rng.random() * 0.02)
        shutil.rmtree(cache, ignore_errors=True)
        if rng.random() < 0.3:
            victim = processes.pop(rng.randrange(4))
            assert victim.is_alive(), wait(victim).err       # a reader never stops by itself
            victim.kill()
            victim.join()
            processes, kills = [*processes, fork(reader)], kills + 1
    for process in processes:
        process.kill()
    assert "wrong" not in log.read_text()
    [survived() for _ in log.read_text().split()[:60]]       # at least so many were read


@pytest.mark.parametrize("p", (0.0136, 0.025, 0.15, 0.9))
def test_centers_are_independent(p):
    """Geometric gaps are Bernoulli trials: the same share at every position, neighbours independent."""
    torch.manual_seed(3)
    centers = data.draw_centers((20_000, 64), p, "cpu").numpy()
    counts = centers.sum(0)
    assert chisquare(counts, np.full(64, counts.sum() / 64)).pvalue > 1e-4 and counts.min() > 0
    assert abs(centers.mean() - p) < 5 * (p * (1 - p) / centers.size) ** 0.5
    pairs = (centers[:, 1:] & centers[:, :-1]).mean()
    assert abs(pairs - p * p) < 6 * (p * p / centers.size) ** 0.5


def test_a_cache_that_cannot_be_used(tmp_path, monkeypatch):
    """The advice is not to give the --cache that was given; a cache that is closed to us has an owner."""
    fasta = write_fasta(tmp_path / "g.fa", {"a": "ACGT" * 9})
    index = data.Genome(fasta, tmp_path / "cache").bases.size and next((tmp_path / "cache").iterdir())

    def closed(*_):
        raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(data, "read_cache", closed)
    with pytest.raises(ValueError, match=r"\(Permission denied\); give another folder to --cache"):
        data.Genome(fasta, tmp_path / "cache")
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(index))
    with pytest.raises(ValueError, match=r"its owner must chmod -R go\+rX it; or give another"):
        data.Genome(fasta, tmp_path / "cache")


def test_one_contig_cannot_be_held_out(tmp_path):
    genome = data.Genome(write_fasta(tmp_path / "g.fa", {"a": "ACGT" * 9, "b": "AC"}), tmp_path)
    with pytest.raises(ValueError, match="use shorter windows or more contigs$"):
        genome.split(20)
