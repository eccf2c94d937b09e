"""Soft-masked bases, BED intervals and strands of pretraining windows, against the text of the files."""
import base64
import gzip
import json
import zlib

import numpy as np
import pytest
import torch

import data
import findna
import models
from harness import equal, random_dna, write_fasta

rng = np.random.default_rng(0)
TEXTS = {"a": "acgtNNnnAC" + random_dna(300, rng, "ACGTacgt") + "ggg", "b": "aac" + random_dna(50, rng),
         "c": "ACGTAC", "chrD": random_dna(90, rng, "ACGTacgtN"), "e": random_dna(40, rng, "acgt")}
ALL = "".join(TEXTS.values())


@pytest.fixture
def genome(tmp_path):
    return data.Genome(write_fasta(tmp_path / "g.fa", TEXTS))


@pytest.mark.parametrize("lines", [str, lambda text: "\r\n".join([text[:7], "", text[7:] + " "])],
                         ids=["one line", "uneven lines"])
def test_the_cache_keeps_the_case(tmp_path, lines):
    """in_repeats at every start, also at the ends of contigs and in N, against the letters of the FASTA."""
    fasta = write_fasta(tmp_path / "g.fa", {name: lines(text) for name, text in TEXTS.items()})
    (tmp_path / "g.fa.gz").write_bytes(gzip.compress(fasta.read_bytes()))
    for path in (fasta, tmp_path / "g.fa.gz"):
        for verify in (False, True):                         # packed now; read again
            genome = data.Genome(path, verify=verify)
            starts, edges = np.arange(len(ALL) - 6), genome.repeats(0.5, "cpu")
            soft = data.in_repeats(data.take_windows(genome.bases, starts, 7), starts, edges)
            assert soft.tolist() == [[letter.islower() for letter in ALL[i:i + 7]] for i in starts]
            assert genome.bases.max() == 4                   # the codes are as before
        n = sum(letter.islower() for letter in ALL)
        assert f"{n} bases are in lower case ({n / len(ALL):.1%}): weight 0.5" in genome.about[0]


def test_the_case_is_part_of_the_data_only_where_it_weighs(tmp_path):
    prints = []
    for name, change in (("a", str), ("b", str.swapcase)):
        texts = {contig: change(text) for contig, text in TEXTS.items()}
        genome = data.Genome(write_fasta(tmp_path / f"{name}.fa", texts))
        assert genome.repeats(1.0, "cpu") is None
        prints.append([genome.fingerprint])
        genome.repeats(0.5, "cpu")
        prints[-1].append(genome.fingerprint)
    assert prints[0][0] == prints[1][0] and prints[0][1] != prints[1][1]


@pytest.mark.parametrize("change, word", [(str.upper, "none of"), (str.lower, "all of")])
def test_a_weight_without_repeats_is_refused(tmp_path, change, word):
    genome = data.Genome(write_fasta(tmp_path / "g.fa", {"a": change(ALL)}))
    assert genome.repeats(1.0, "cpu") is None
    with pytest.raises(ValueError, match=f"--repeat_weight 0.1: {word} the genome is in lower case"):
        genome.repeats(0.1, "cpu")


def test_a_cache_of_the_old_format_is_built_again(tmp_path, capsys):
    fasta = write_fasta(tmp_path / "g.fa", TEXTS)
    data.Genome(fasta)
    folder, = tmp_path.glob("*.nanodna")
    for change in ({"format": 2}, {"format": 1}, {"format": None}):
        index, _ = data.load_cache(folder)
        index |= change
        del index["case"]
        if index["format"] is None:
            del index["format"]                              # as version 0.2 wrote it
        data.write_index(folder, index)
        capsys.readouterr()
        assert data.Genome(fasta).fetch("a", 0, 4) == "ACGT"
        assert f"genome cache {folder}: another version of this program made it; building it again" \
            in capsys.readouterr().out
        assert json.loads((folder / "index.json").read_text())["format"] == 3
        assert data.load_cache(folder)[0]["case"][0] == 0    # a starts in lower case


def test_verify_notices_another_case(tmp_path):
    """But not another compression, which a newer zlib may choose."""
    fasta = write_fasta(tmp_path / "g.fa", TEXTS)
    genome = data.Genome(fasta)
    folder, = tmp_path.glob("*.nanodna")
    text = (folder / "index.json").read_text()
    for shift, level in ((0, 0), (1, 9)):
        gaps = np.diff(genome.index["case"], prepend=0) + shift
        case = base64.b64encode(zlib.compress(gaps.tobytes(), level)).decode()
        data.write_index(folder, genome.index | {"case": case})
        if not shift:
            assert (folder / "index.json").read_text() != text
            data.Genome(fasta, verify=True)
        else:
            with pytest.raises(ValueError, match="is not what the FASTA holds"):
                data.Genome(fasta, verify=True)


@pytest.mark.parametrize("k, stride", [(1, 1), (3, 1), (3, 3), (6, 2), (6, 6)])
def test_weights_of_tokens(k, stride):
    soft = torch.rand(5, 41) < 0.5
    weights = data.token_weights(soft, k, stride, 0.1)
    bases = torch.zeros(5, 41, dtype=torch.uint8)
    assert weights.shape == data.kmer_tokens(bases, k, stride, specials=True).shape
    for row, marks in zip(weights.tolist(), soft.tolist()):
        want = [sum(0.1 if x else 1 for x in marks[i:i + k]) / k for i in range(0, 41 - k + 1, stride)]
        assert row[1:-1] == pytest.approx(want)
    assert (data.token_weights(torch.zeros(2, 9, dtype=torch.bool), k, stride, 0.1)[:, 1:-1] == 1).all()


@pytest.mark.parametrize("capacity", [None, 60])
def test_weighted_loss_of_bert(capacity):
    """The weighted sum over the masked positions and the sum of their weights, by a loop; and gradients."""
    torch.manual_seed(0)
    model = models.Bert(models.BertConfig(69, 12, 1, 2, 8, 16, 0.0))
    tokens, masked, weights = torch.randint(5, 69, (4, 12)), torch.rand(4, 12) < 0.4, torch.rand(4, 12)
    labels = torch.where(masked, tokens, -100)
    loss_sum, total = model(tokens, labels, capacity=capacity, weights=weights)
    loss_sum.backward()
    gradient, logits, want, n = model.head.weight.grad.clone(), model(tokens), 0, 0
    for i, j in masked.nonzero().tolist():
        want = want - weights[i, j] * logits[i, j].log_softmax(0)[tokens[i, j]]
        n += weights[i, j].item()
    model.zero_grad()
    want.backward()
    assert [loss_sum.item(), total.item()] == pytest.approx([want.item(), n], rel=1e-5)
    torch.testing.assert_close(gradient, model.head.weight.grad)
    ones = model(tokens, labels, capacity=capacity, weights=torch.ones(4, 12))
    torch.testing.assert_close(ones, model(tokens, labels, capacity=capacity), check_dtype=False)
    nothing = model(tokens, labels.fill_(-100), weights=weights)
    assert [x.item() for x in nothing] == [0, 0]


def test_either_strand():
    """Half of the windows, independently, are reverse complements; what is soft goes with its base."""
    bases = torch.from_numpy(rng.integers(4, size=(4000, 30), dtype=np.uint8))
    soft = bases == 2                                        # the C: on the other strand, G
    torch.manual_seed(1)
    dna, moved = data.either_strand(bases, soft)
    other = torch.tensor([1, 0, 3, 2])[bases.long()].flip(1)
    flipped = (dna == other).all(1)
    assert torch.equal(dna[~flipped], bases[~flipped])
    assert torch.equal(moved, dna == 2 + flipped.long()[:, None])
    assert abs(flipped.float().mean() - 0.5) < 0.03
    assert abs((flipped[1:] == flipped[:-1]).float().mean() - 0.5) < 0.03
    torch.manual_seed(1)
    equal(data.either_strand(bases), (dna, None))


@pytest.mark.parametrize("views", ["MDIT+NR", "MNR+T", "MDITNR+none"])
def test_targets_of_findna_follow_the_edits(views):
    """-1 where the base in the view is soft-masked (here A and C); those that edits insert are not."""
    torch.manual_seed(2)
    bases = torch.randint(4, (30, 60), dtype=torch.uint8)
    soft = bases % 2 == 0                                    # A, C
    torch.manual_seed(3)
    plain = findna.make_views(bases, views, 20)
    torch.manual_seed(3)
    view_u, target, view_v = findna.make_views(bases + data.SOFT * soft, views, 20)
    equal((view_u, target.abs(), view_v), plain)
    torch.manual_seed(3)
    edited = findna.augment(10 + soft.byte(), views.split("+")[0], 20)         # 11: soft; < 4: inserted
    at, is_soft, first_half = target.any(-1), target.sum(-1) == -1, target.abs().argmax(-1) < 2    # A, C
    if "R" not in views.split("+")[0]:
        assert torch.equal(is_soft[at], (edited == 11)[at])
        assert (edited < 4)[at].any() == ("D" in views)
        return
    either = []                                              # rows as they are; rows of the other strand,
    for strand in (first_half, ~first_half):                 # whose soft A, C are T, G
        wrong = is_soft & ~strand | (strand & ~is_soft if "D" not in views else False)
        either.append(~(wrong & at).any(1))
    assert (either[0] ^ either[1]).all() and 5 < either[1].sum() < 25


def covered(intervals):
    return {i for start, end in intervals for i in range(start, end)}


def test_parts_within():
    for seed in range(60):
        draw = np.random.default_rng(seed)
        cuts = np.sort(draw.choice(60, 2 * draw.integers(1, 9), replace=False)).reshape(-1, 2)
        halves = [part for x, z in cuts.tolist() for part in ([x, (x + z) // 2], [(x + z) // 2, z])]
        a = np.array([part for part in halves if part[0] < part[1]])           # some touch: ends of contigs
        b = np.sort(draw.integers(60, size=(draw.integers(1, 9), 2)), 1) + [0, 1]
        parts = data.parts_within(a, b)
        assert covered(parts) == covered(a) & covered(b) and (parts[:, 0] < parts[:, 1]).all()
        assert sum(np.diff(parts)[:, 0]) == len(covered(parts)) and (np.diff(parts[:, 0]) > 0).all()
        inner = {i for start, end in a.tolist() for i in range(start + 1, end)}
        assert not [end for _, end in parts if end in inner and {end - 1, end} <= covered(b)]


BED = ("browser position chr1:1-9\ntrack name=x\n#contig\n\na\t10\t50\tname\t0\t+\r\na 40 90\na\t90\t95\n"
       "D 3 60\nb\t0\t53\nchrb 5 9")


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_bed(tmp_path, genome, packed):
    """Windows of a genome kept to a BED file: those within its intervals, merged, and no others."""
    path, text = tmp_path / "r.bed", BED.encode()
    path.write_bytes(gzip.compress(text) if packed else b"\xef\xbb\xbf" + text)
    at, n_known = genome.offsets, str(genome)
    before = genome.fingerprint
    genome.restrict(path)
    kept = [(at["a"] + 10, at["a"] + 95), (at["chrD"] + 3, at["chrD"] + 60), (at["b"], at["b"] + 53)]
    for length in (1, 5, 20):
        shift, n_up_to = data.window_table(np.concatenate(genome.cut(0, length)), length)
        numbers = np.arange(n_up_to[-1])
        starts = numbers + shift[np.searchsorted(n_up_to, numbers, side="right")]
        want = [i for start, end in kept for i in range(start, end - length + 1)
                if "N" not in ALL[i:i + length].upper()]
        assert sorted(starts.tolist()) == sorted(want)
    assert "6 intervals; its names of b, chrD (in all 2) differ by chr" in genome.about[0]
    sizes = [len(part) for start, end in kept for part in ALL[start:end].upper().split("N") if part]
    short = [size for size in sizes if size < 20]
    line, = [line for line in genome.reach(20, ["b"])[1] if "stretches" in line]
    assert line.startswith(f"bed      {len(short)} of {len(sizes)} stretches without N, {sum(short)} bases, ")
    assert genome.fingerprint.startswith(before + "+bed")
    assert str(genome).split("fingerprint")[0] == n_known.split("fingerprint")[0]


def test_the_order_of_a_bed_file_does_not_matter(tmp_path):
    prints = set()
    for text in ("a 10 50\na 40 90", "chra 40 90\na 10 50", "a\t10\t90\n", "a 10 91"):
        (tmp_path / "r.bed").write_text(text)
        genome = data.Genome(write_fasta(tmp_path / "g.fa", TEXTS))
        genome.restrict(tmp_path / "r.bed")
        prints.add(genome.fingerprint)
    assert len(prints) == 2


@pytest.mark.parametrize("text, word", {
    "a 1": "line 1: 'a 1' is not", "a 1 5\na 5 5": "line 2.*0 <= start < end <= 313",
    "a 1 5\n\na 5 314": "line 3", "a -1 5": "line 1", "a 1 5.0": "line 1", "a 1_0 50": "line 1",
    f"a 1 {'9' * 5000}": "line 1", "track\nz 1 5": "line 2.*contigs like a", ">a\nACGT": "line 1",
    "": "no intervals", "#a 1 5\n": "no intervals", "a 4 8": "nothing but N",
    "\0\1\2": "line 1"}.items(), ids=lambda x: repr(x[:12]))
def test_bad_bed(tmp_path, genome, text, word):
    (tmp_path / "r.bed").write_text(text)
    with pytest.raises(ValueError, match=rf"r\.bed: .*{word}") as e:
        genome.restrict(tmp_path / "r.bed")
    assert len(str(e.value)) < 400 and "\n" not in str(e.value)


def test_no_such_bed(tmp_path, genome):
    with pytest.raises(ValueError, match="no such file"):
        genome.restrict(tmp_path / "none.bed")
