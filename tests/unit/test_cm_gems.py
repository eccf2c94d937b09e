"""cm_gems.py against the golden cases, literal readings of the algorithms, and itself through faults."""
import csv
import itertools
import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import cm_gems
import data
import models
import training
from harness import SHARED, random_dna, write_fasta

GOLDEN, COUNTS = SHARED / "golden" / "genemask_golden.json", SHARED / "golden" / "genemask_6mer_counts.csv"
COHN = SHARED / "data" / "fewshot" / "Cohn-enh" / "500" / "train.tsv.gz"
golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
needs_golden = pytest.mark.skipif(not golden, reason="no shared data")
P = {"random": 0.025, "genemask": 0.0176, "global": 0.0136}


def where(masked):
    return masked.nonzero()[:, -1].tolist()


def number(kmer):
    return int("".join(str("ATCG".index(c)) for c in kmer), 4)


def published_counts():
    return np.array([int(n) for _, n in sorted(csv.reader(COUNTS.read_text().splitlines()[1:]),
                                               key=lambda row: number(row[0]))])


@needs_golden
@pytest.mark.parametrize("case", golden and golden["genemask"] + golden["global"], ids=lambda c: c["id"])
def test_golden_masks(case):
    tokens, ranks = data.tokenize([case["dna"]]), torch.full((4101,), 4096)
    want = case["expect"]["token_rank"]
    ranks[tokens[0, 1:-1]] = torch.tensor(case["rank"])      # the published rank of each k-mer
    if "m" in case:
        m = torch.tensor([case["m"]])
        assert where(cm_gems.global_mask(tokens, ranks, m)) == want["masked"]
        assert where(cm_gems.top_tokens(tokens, ranks, m)) == sorted(want["centers_in_rank_order"])
    else:
        centers = torch.isin(torch.arange(tokens.shape[1]), torch.tensor(case["centers"]))[None]
        assert where(cm_gems.gene_mask(tokens, ranks, centers)) == want
        best = sorted(case["best"], key=lambda best: best["best_rank"])[:case["high_size"]]
        assert where(cm_gems.best_tokens(tokens, ranks, centers)) == sorted({b["best_pos"] for b in best})


def literal_gene_mask(tokens, ranks, centers, k):
    """Section 2.2 of the specification, for one row."""
    real = [i for i, t in enumerate(tokens) if t > 4]
    masked, best, C = set(), {}, [c for c in centers if c in real]
    for c in C:
        candidates = [c] + [c + o for o in range(-((k - 1) // 2), k // 2 + 1) if o and c + o in real]
        masked |= set(candidates)
        best[c] = candidates[0]
        for q in candidates:
            if ranks[tokens[q]] < ranks[tokens[best[c]]]:
                best[c] = q
    h = math.ceil(len(C) / 2)
    high = C if h < 5 else sorted(C, key=lambda c: ranks[tokens[best[c]]])[:h]
    for c in high:
        masked |= {q for q in range(best[c] - k + 1, best[c] + k) if q in real}
    return sorted(masked)


def literal_global_mask(tokens, ranks, m, k):
    """Section 3, for one row."""
    real = [i for i, t in enumerate(tokens) if t > 4]
    top = sorted(real, key=lambda i: (ranks[tokens[i]], i))[:m]
    return sorted({q for c in top for q in range(c - k + 1, c + k) if q in real})


@pytest.mark.parametrize("k", [2, 3, 6])
def test_equals_the_literal_algorithms(k):
    rng = np.random.default_rng(k)
    for batch in range(40):                                  # 3,600 rows
        longest = int(rng.integers(1, 60))
        texts = [random_dna(int(n), rng, "ACGT") for n in rng.integers(k, k + longest, size=26)]
        texts += ["A" * (k + longest), "ACGT" * k, "A" * k, "CA" + "G" * k]     # poly-A, one token
        tokens = data.tokenize(texts, k)
        tokens[torch.rand(tokens.shape) < 0.02 * (tokens > 4)] = data.UNK
        ranks = torch.full((4 ** k + 5,), 4 ** k)
        ranks[5:] = torch.from_numpy(rng.integers(3, size=4 ** k) if batch % 2 else rng.permutation(4 ** k))
        centers = torch.rand(tokens.shape) < torch.tensor([0, 0.05, 0.2, 0.6, 1])[torch.randint(5, (30, 1))]
        m = torch.from_numpy(rng.integers(0, longest + 9, size=len(tokens)))
        gene, top = cm_gems.gene_mask(tokens, ranks, centers), cm_gems.global_mask(tokens, ranks, m)
        for row, ids in enumerate(tokens.tolist()):
            assert where(gene[row]) == literal_gene_mask(ids, ranks.tolist(), where(centers[row]), k)
            assert where(top[row]) == literal_global_mask(ids, ranks.tolist(), int(m[row]), k)
        assert not ((gene | top) & (tokens < 5)).any()       # specials never


def test_the_rank_is_of_the_token_not_of_its_position():
    text, ranks = random_dna(80, np.random.default_rng(1)), torch.randperm(4101)
    tokens, shifted = data.tokenize([text]), data.tokenize(["GATTACA" + text])
    one, m = ranks[tokens[0, 1:-1]].argmin() + 1, torch.tensor([40])
    assert where(cm_gems.top_tokens(tokens, ranks, m // 40)) == [one]
    near, far = (where(cm_gems.top_tokens(t, ranks, m)) for t in (tokens, shifted))
    assert len(set(near) & {at - 7 for at in far}) > 30


@pytest.mark.skipif(not (COHN.exists() and golden), reason="no shared data")
@pytest.mark.parametrize("masker, share", {"random": 13.9, "genemask": 15.2, "global": 11.2}.items())
def test_masked_share_of_real_sequences(masker, share):
    words = [text.split() for text in data.read_columns(str(COHN), {"x": ("sequence",)})[0]["x"]]
    tokens = data.tokenize(["".join(word[0] for word in row) + row[-1][1:] for row in words])
    ranks = cm_gems.npmi_rank(cm_gems.npmi(published_counts()))
    assert cm_gems.center_probability(masker, 6) == P[masker] and tokens.shape == (1000, 497)
    torch.manual_seed(0)
    centers = data.draw_centers(tokens.shape, P[masker], "cpu") & (tokens > 4)
    masked = cm_gems.MASKERS[masker](tokens, ranks, centers)
    assert 100 * masked.sum() / (tokens > 4).sum() == pytest.approx(share, abs=0.5) and not masked[:, 0].any()


def npmi_by_definition(texts, k, f_min, max_part, halve_p):
    """({k-mer: NPMI}, counts) over all divisions of every k-mer, counted one by one."""
    counts = {n: Counter(text[i:i + n] for text in texts for i in range(len(text) - n + 1)
                         if "N" not in text[i:i + n]) for n in range(1, k + 1)}

    def log_p(word):
        return math.log(counts[len(word)][word] / counts[len(word)].total() / (2 if halve_p else 1))

    def divisions(word):
        for n in range(1, min(len(word), max_part) + 1):
            yield from ([word[:n]] + rest for rest in (divisions(word[n:]) if word[n:] else [[]]))
    pmi = {word: min(log_p(word) - sum(map(log_p, parts)) for parts in divisions(word) if len(parts) > 1)
           for word in counts[k]}
    return {word: pmi[word] * math.log(f) / math.log(f * f_min) for word, f in counts[k].items()}, counts


@pytest.mark.parametrize("k", [2, 3, 4, 6])
def test_npmi_and_counts_by_definition(k, tmp_path, monkeypatch):
    monkeypatch.setattr(cm_gems, "KMERS_AT_ONCE", 37)
    rng = np.random.default_rng(k)                           # with N, some under k bases
    texts = [random_dna(n, rng, "AACGTNNA"[:4 + n % 3]) for n in (1, k - 1, k, 40, 300)] + ["ACAC" * 50]
    genome = data.Genome(write_fasta(tmp_path / "a.fa", {str(i): text for i, text in enumerate(texts)}))
    tables = cm_gems.count_kmers(genome.bases, genome.intervals, k)
    for style in ((2, True), (k, False), (2, False), (3, True)):
        want, counts = npmi_by_definition(texts, k, 101, *style)
        values = cm_gems.npmi(tables, 101, *style)
        assert {word: values[number(word)] for word in want} == pytest.approx(want, abs=1e-12)
        assert np.isfinite(values).sum() == len(want)
    for table, counted in zip(tables, counts.values()):
        assert table.sum() == counted.total() and all(table[number(word)] == n for word, n in counted.items())
    ranks = cm_gems.npmi_rank(values).numpy()
    order = np.argsort(ranks[5:])
    assert all((-values[a], a) < (-values[b], b) for a, b in itertools.pairwise(order))
    assert set(ranks[:5]) == {4 ** k}


def test_npmi_by_hand():
    counts = np.zeros(16, np.int64)
    counts[[0, 2, 8]] = 4, 2, 2                              # AA, AC, CA; as prefixes A 6, C 2
    discount = math.log(4) / (math.log(4) + math.log(9))
    textbook, ours = (cm_gems.npmi(counts, 9, *style)[0] for style in ((2, False), (2, True)))
    assert textbook == pytest.approx(math.log(4 / 8 / (6 / 8) ** 2) * discount, abs=1e-12)
    assert ours == pytest.approx(textbook + math.log(2) * discount, abs=1e-12)


@needs_golden
def test_golden_npmi():
    table, toy, counts = golden["npmi_published"], golden["npmi_toy"], published_counts()
    letters = np.array([table["unigram_counts"][letter] for letter in "ATCG"])
    shorter = [counts.reshape(4 ** n, -1).sum(1) for n in range(1, 6)]
    pmi = cm_gems.npmi([letters // 10 ** 5, shorter[1] // 10 ** 4, *shorter[2:], counts // 10], f_min=1)
    values, exact = cm_gems.npmi(counts), pmi * np.log(counts) / np.log(counts * 101.0)
    for case in table["cases"]:
        at = number(case["kmer"])
        assert counts[at] == case["count"] and values[at] == pytest.approx(case["npmi"], abs=2.5e-3)
        assert [pmi[at], exact[at]] == pytest.approx([case["dp"], case["npmi"]], abs=1e-9)
        assert cm_gems.npmi_rank(exact)[at + 5] + 1 == case["rank"]
    bases = data.encode(toy["corpus"])
    runs = np.flatnonzero(np.diff(bases == 4, prepend=True, append=True)).reshape(-1, 2)
    tables = cm_gems.count_kmers(bases, runs, toy["k"])
    textbook, ours = (cm_gems.npmi(tables, toy["f_min"], *style) for style in ((4, False), (2, True)))
    for case in toy["cases"]:
        at = number(case["kmer"])
        assert tables[-1][at] == case["count"]
        assert textbook[at] == pytest.approx(case["paper_npmi"], abs=1e-9)
        assert ours[at] == pytest.approx(case["published_style_npmi"], abs=1e-9)


@needs_golden
def test_golden_curricula():
    for case in golden["cm_gems_switch"]:
        seen = case["perplexities"]
        fired = [e for e in range(len(seen)) if cm_gems.settled(seen[:e + 1], case["threshold"])]
        assert (fired or [None])[0] == case["first_eval_index_after_which_global_is_used"]
    for name, stages in (("cm_step_official", 100), ("cm_step_slides", 10)):
        for case in golden[name]:                            # there steps count from 0
            share = cm_gems.cm_step_share(case["global_step"] + 1, case["max_steps"], stages)
            assert share == pytest.approx(case["p_global"], abs=1e-12)


def test_switch_and_stages_by_hand():
    assert not cm_gems.settled([], 1) and not cm_gems.settled([5.0], 1)
    for last, switches in ((4.1, True), (5.9, True), (4.0, False), (6.5, False), (2.0, False)):
        assert cm_gems.settled([9.0, 5.0, last], 1) == switches
    shares = [cm_gems.cm_step_share(step, 60, 10) for step in range(1, 61)]
    assert shares == pytest.approx([stage / 10 for stage in range(10) for _ in range(6)])


def test_can_switch_is_what_a_run_does():
    """The loop of a run whose perplexity never changes: does it switch while there are steps left?"""
    for steps, every, after in itertools.product(range(1, 9), range(1, 5), range(10)):
        due = range(every, steps + 1, every)
        fires = [step for nth, step in enumerate(due) if nth and after <= step < steps]
        args = SimpleNamespace(steps=steps, eval_every=every, switch_after=after)
        assert cm_gems.can_switch(args) == bool(fires)


def test_pieces():
    windows = torch.randint(4, (20_000, 51), dtype=torch.uint8)
    torch.manual_seed(0)
    tokens = cm_gems.cut_pieces(windows, 6)
    n = (tokens > 4).sum(1)
    lengths = torch.bincount(n, minlength=47)[1:46]          # of the cut ones, in k-mers
    assert tokens.shape == (20_000, 48) and (n == 46).float().mean() == pytest.approx(0.5, abs=0.02)
    assert lengths.sum() == (n < 46).sum() and lengths.min() > 150 and lengths.max() < 300       # 222 each
    for parts in (2, 3, 4, 8, 91, 200):                      # by length, the same lengths in all
        each = [cm_gems.cut_pieces(windows[:20_000 // parts], 6, part / parts, (part + 1) / parts)
                for part in range(parts)]
        sizes = [(tokens > 4).sum(1) for tokens in each]
        assert all(a.max() <= b.min() for a, b in itertools.pairwise(sizes)) and sizes[-1].max() == 46
        assert all(tokens.shape[1] - 2 - n.max() <= (parts > 90) for tokens, n in zip(each, sizes))
        assert all(((tokens == 3).sum(1) == 1).all() for tokens in each)
        whole, *_, shortest = torch.bincount(torch.cat(sizes), minlength=47).flip(0)[:46].tolist()
        assert whole == pytest.approx(10_000, abs=400) and shortest == pytest.approx(222, abs=60)
    for row, bases, size in zip(tokens[:300], windows, n.tolist()):
        want = data.tokenize([data.decode(bases[:size + 5])])[0]
        assert torch.equal(row[:size + 2], want) and not row[size + 2:].any()
    model = models.Bert(models.BertConfig(4101, 48, 2, 2, 16, 32, dropout=0.0))            # pads are not seen
    labels = torch.where(tokens > 4, tokens, -100)
    both = model(tokens[:9], labels[:9], mask=tokens[:9] != data.PAD)
    each = [model(tokens[i:i + 1, :n[i] + 2], labels[i:i + 1, :n[i] + 2]) for i in range(9)]
    torch.testing.assert_close(both[0], sum(loss for loss, _ in each))


def test_ranks_share_the_tokens_evenly():
    for n, world in ((1, 1), (7, 1), (8, 8), (11, 3), (63, 8)):                # equal costs: every world-th
        assert training.share_out([1] * n, world) == [[*range(r, n, world)] for r in range(world)]
    for micro, world, most in ((32, 2, 0.033), (16, 4, 0.03), (8, 8, 0.012), (8, 2, 0.001)):     # idle
        parts, tokens, costs = range(0, 250, micro), [], []
        for first in parts:
            n = min(micro, 250 - first)
            tokens.append(cm_gems.cut_pieces(torch.zeros(n, 511, dtype=torch.uint8), 6, first / 250,
                                             (first + n) / 250).numel())
            costs.append(n * cm_gems.longest_piece(511, 6, (first + n) / 250))
        shares = training.share_out(costs, world)
        assert sorted(i for share in shares for i in share) == [*range(len(parts))] and all(shares)
        loads = [sum(tokens[i] for i in share) for share in shares]
        assert 1 - sum(loads) / world / max(loads) < most


@pytest.mark.parametrize("style, rule", {"published": (2, True), "textbook": (3, False)}.items())
def test_the_table_of_a_genome_has_its_style_contigs_and_intervals(tmp_path, style, rule):
    """Counted, then read from the cache; hg38: GeneMask's chr1, chr2 and chr3."""
    rng, bed = np.random.default_rng(0), tmp_path / "r.bed"
    texts = {f"chr{i}": random_dna(3000, rng, "AACGT") for i in (1, 2, 3, 4)}
    fasta, three = write_fasta(tmp_path / "g.fa", texts), [*texts][:3]
    bed.write_text("chr1 0 2000\nchr2 0 2000\n")
    for kept, contigs, name in ((None, ["chr1"], "x"), (None, three[:2], "x"), (bed, three[:2], "x"),
                                (None, None, "hg38"), (None, None, "x")):
        genome = data.Genome(fasta)
        genome.restrict(kept)
        args = SimpleNamespace(k=3, npmi=style, npmi_contigs=contigs, npmi_table=None, npmi_only=False,
                               genome=[name])
        used = contigs or (three if name == "hg38" else texts)
        want, _ = npmi_by_definition([texts[x][:2000 if kept else None] for x in used], 3, 101, *rule)
        for _ in range(2):
            values, *_ = cm_gems.npmi_table(args, genome)
            assert {word: values[number(word)] for word in want} == pytest.approx(want, abs=1e-12)
