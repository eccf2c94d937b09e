"""data.py against literal references: letters, k-mers, span masks, genomes, their windows and their cache."""
import gzip
import json
import os
import re
import resource
import shutil
import tempfile
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


@pytest.mark.parametrize("case", cases("fasta.json"), ids=lambda c: c["name"])
def test_fasta(case, tmp_path, monkeypatch):
    path = write_case(case, tmp_path / "case.fa")
    for chunk in [data.CHUNK, 50_001] + [4, 5, 6, 7, 9, 11, 16, 23, 64] * (path.stat().st_size < 9999):
        monkeypatch.setattr(data, "CHUNK", chunk)            # what is read at a time may end anywhere
        word = "".join(case.get("word", "").partition(":")[:3 if chunk > 99 else 1])
        if "contigs" in case:
            genome = data.Genome(path, tmp_path / str(chunk))
            texts = {name: genome.fetch(name, 0, n) for name, n in genome.contigs.items()}
            assert texts == {name: expand(text) for name, text in case["contigs"].items()}
        elif "split" in case:
            assert word in refusal(data.Genome(path, tmp_path / str(chunk)).split, case["split"])
        else:
            assert re.search(f"{path}.*{word}", refusal(data.Genome, path))
            assert os.listdir(tmp_path) == ["case.fa"]


def test_permissions(tmp_path, monkeypatch):
    def as_nobody(function):                                 # root ignores chmod
        return wait(fork(lambda: (os.getuid() or os.setgroups([]) or os.setuid(65534), function())))
    os.mkfifo(tmp_path / "pipe")
    assert "regular" in refusal(data.Genome, tmp_path / "pipe")
    with tempfile.TemporaryDirectory() as folder:            # pytest's own folder is closed to nobody
        fasta = write_fasta(Path(folder) / "a.fa", {"a": "ACGT" * 10})
        os.mkdir(f"{folder}/home"), os.chmod(f"{folder}/home", 0o777), os.chmod(folder, 0o555)
        monkeypatch.setenv("XDG_CACHE_HOME", f"{folder}/home")
        result = as_nobody(lambda: print(data.Genome(fasta).fetch("a", 0, 8)))
        assert result.out == "ACGTACGT\n" and os.listdir(f"{folder}/home/nanodna"), result
        assert "--cache" in as_nobody(lambda: data.Genome(fasta, folder)).err.splitlines()[-1]
        os.chmod(fasta, 0o000)
        assert "no permission" in as_nobody(lambda: data.Genome(fasta)).err.splitlines()[-1]
        assert sorted(os.listdir(folder)) == ["a.fa", "home"]


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


def test_damaged_or_stale_cache_is_built_again(tmp_path, capsys):
    rng, cache = np.random.default_rng(8), tmp_path / "cache"
    text = random_dna(70, rng, "ACGTN")
    fasta = write_fasta(tmp_path / "a.fa", {"a": text})

    def check(name, said):
        genome = data.Genome(fasta, cache)
        assert genome.fetch("a", 0, 70) == text and said in capsys.readouterr().out, name
    check("new", "")
    for file in (next(cache.iterdir()) / "bases.u8", next(cache.iterdir()) / "index.json"):
        sound = file.read_bytes()
        cuts = [sound[:n] for n in np.linspace(0, len(sound) - 1, 25).astype(int)]
        flips = [sound[:at] + bytes([sound[at] ^ 1 << bit]) + sound[at + 1:]
                 for at, bit in zip(rng.integers(len(sound), size=100), rng.integers(8, size=100))]
        for n, damaged in enumerate(cuts + flips + [b"[]", b"{}", sound + b"x"]):
            file.write_bytes(damaged)
            check((file.name, n), "damaged")
            assert file.read_bytes() == sound
    for text in ("ACGTT" * 14, "ACGTA" * 14):                # as long; the first is older, the second as old
        os.utime(write_fasta(fasta, {"a": text}), (1, 1))
        check(text, "changed")


def test_processes_build_the_cache_at_once_and_a_full_disk_leaves_nothing(tmp_path):
    text, cache = random_dna(1_000_000, np.random.default_rng(9)), tmp_path / "cache"
    fasta = write_fasta(tmp_path / "a.fa", {"a": text})

    def read(limit=1 << 30):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        assert data.Genome(fasta, cache).fetch("a", 0, len(text)) == text
    for _ in range(6):
        result = wait(*[fork(read) for _ in range(4)])
        assert result.codes == [0] * 4, result.err
        shutil.rmtree(cache)
    assert "cannot write" in wait(fork(lambda: read(50_000))).err.splitlines()[-1]
    assert not list(cache.iterdir())


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
