"""data.py against literal references: letters, k-mers, span masks, genomes, their windows and their cache."""
import gzip
import json
import os
import random
import re
import resource
import shutil
import socket
import tempfile
import time
from pathlib import Path

import numpy as np
import pyfaidx
import pytest
import torch
from scipy.stats import chisquare

import data
from harness import SHARED, cases, expand, fork, random_dna, wait, write_case, write_fasta

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
        left, right = (draw % 5, draw % 4) if draw % 3 == 0 else torch.randint(0, 9, (2, B))
        want = torch.zeros(B, T, dtype=torch.bool)
        for b, c in (centers & maskable).nonzero().tolist():
            low, high = (x if isinstance(x, int) else x[b].item() for x in (left, right))
            want[b, max(0, c - low):c + high + 1] = True
        assert torch.equal(data.span_mask(centers, maskable, left, right), want & maskable)


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
    index = {"contigs": [["a", size], ["b", size]], "intervals": [[0, 1000], [at, at + 5000]],
             "n_ambiguous": 0, "fingerprint": ""}
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
    assert "validation" in refusal(genome.split, 60) and "training" in refusal(genome.split, length, [*texts])


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
    assert copy.fingerprint == data.Genome(x).fingerprint != genome.fingerprint


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
        check("changed", text), survived()
    assert foreign.fetch("a", 0, 4) == "ACAC"


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
    assert "cannot write" in wait(fork(lambda: read(50_000))).err.splitlines()[-1]
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
    deadline = time.monotonic() + 60
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
    [survived() for _ in log.read_text().split()]


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
