"""cm_gems.py against the golden cases, literal readings of the algorithms, and itself through faults."""
import csv
import itertools
import json
import math
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
import torch

import cm_gems
import data
import models
from harness import (SHARED, cases, contents, equal, log_rows, random_dna, refused, run, slow, start, wait,
                     wait_rows, write_fasta)

GOLDEN, COUNTS = SHARED / "golden" / "genemask_golden.json", SHARED / "golden" / "genemask_6mer_counts.csv"
COHN = SHARED / "data" / "fewshot" / "Cohn-enh" / "500" / "train.tsv.gz"
golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else None
needs_golden = pytest.mark.skipif(golden is None, reason="no shared data")
STEPS, SWITCH = 20, 12                                       # of the runs below


def ranked(case):
    """Tokens of a golden case, and a table with the published ranks of its k-mers."""
    tokens, ranks = data.tokenize([case["dna"]]), torch.full((4101,), 4096)
    ranks[tokens[0, 1:-1]] = torch.tensor(case["rank"])
    return tokens, ranks


def where(masked):
    return masked.nonzero()[:, -1].tolist()


def published():
    """6-mer counts behind the published table, in token order."""
    rows = list(csv.DictReader(COUNTS.open()))
    return np.array([int(row["count"]) for row in sorted(rows, key=lambda row: token(row["kmer"]))])


def token(kmer):
    return int("".join(str("ATCG".index(c)) for c in kmer), 4)


@needs_golden
def test_golden_masks():
    for case in golden["genemask"]:
        tokens, ranks = ranked(case)
        centers = torch.isin(torch.arange(tokens.shape[1]), torch.tensor(case["centers"]))[None]
        assert where(cm_gems.gene_mask(tokens, ranks, centers)) == case["expect"]["token_rank"], case["id"]
        best = {b["best_pos"] for b in case["best"]}
        chosen = where(cm_gems.best_tokens(tokens, ranks, centers))
        assert set(chosen) <= best and (len(chosen) == len(best) or case["high_size"] < len(case["centers"]))
    for case in golden["global"]:
        tokens, ranks = ranked(case)
        want = case["expect"]["token_rank"]
        assert where(cm_gems.global_mask(tokens, ranks, torch.tensor([case["m"]]))) == want["masked"]
        chosen = where(cm_gems.top_tokens(tokens, ranks, torch.tensor([case["m"]])))
        assert chosen == sorted(want["centers_in_rank_order"])


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
    for batch in range(40):
        longest = int(rng.integers(1, 60))
        texts = [random_dna(int(rng.integers(k, k + longest)), rng, ("A", "ACGT")[row % 9 > 0])     # and poly-A
                 for row in range(28)] + ["ACGT" * k, "A" * k]                  # one-token row
        tokens = data.tokenize(texts, k)
        tokens[torch.rand(tokens.shape) < 0.02 * (tokens > 4)] = data.UNK
        ranks = torch.cat([torch.full((5,), 4 ** k), torch.from_numpy(rng.permutation(4 ** k))])
        if batch % 2:
            ranks[5:] = torch.from_numpy(rng.integers(3, size=4 ** k))          # ties
        centers = torch.rand(tokens.shape) < (0, 0.05, 0.2, 0.6, 1)[batch % 5]
        gene = cm_gems.gene_mask(tokens, ranks, centers)
        m = torch.from_numpy(rng.integers(0, longest + 9, size=len(tokens)))
        top = cm_gems.global_mask(tokens, ranks, m)
        table = ranks.tolist()
        for row, ids in enumerate(tokens.tolist()):
            assert where(gene[row]) == literal_gene_mask(ids, table, where(centers[row]), k)
            assert where(top[row]) == literal_global_mask(ids, table, int(m[row]), k)
        assert not ((gene | top) & (tokens < 5)).any()       # specials never


def test_ranks_are_of_tokens_not_of_positions():
    text = random_dna(80, np.random.default_rng(1))
    ranks = cm_gems.npmi_rank(np.random.default_rng(2).random(4096))
    one, other = data.tokenize([text]), data.tokenize(["ACGTTGCA" + text])
    a, b = (where(cm_gems.top_tokens(t, ranks, torch.tensor([3]))) for t in (one, other[:, 8:]))
    assert a == b and where(cm_gems.top_tokens(one, ranks.flip(0), torch.tensor([3]))) != a
    best = where(cm_gems.top_tokens(one, ranks, torch.tensor([1])))
    assert best == [int(ranks[one[0]].argmin())]


@pytest.mark.skipif(not (COHN.exists() and COUNTS.exists()), reason="no shared data")
@pytest.mark.parametrize("masker, share", {"random": 13.9, "genemask": 15.2, "global": 11.2}.items())
def test_masked_share_of_real_sequences(masker, share):
    columns, _ = data.read_columns(str(COHN), {"sequence": ("sequence",)})
    words = [text.split() for text in columns["sequence"]]
    tokens = data.tokenize(["".join(w[0] for w in row) + row[-1][1:] for row in words])
    ranks = cm_gems.npmi_rank(cm_gems.npmi(published()))
    torch.manual_seed(0)
    centers = data.draw_centers(tokens.shape, cm_gems.center_probability(masker, 6), "cpu") & (tokens > 4)
    masked = cm_gems.MASKERS[masker](tokens, ranks, centers)
    assert 100 * masked.sum() / (tokens > 4).sum() == pytest.approx(share, abs=0.5)
    assert not masked[tokens < 5].any()


@pytest.mark.parametrize("masker", cm_gems.MASKERS)
def test_center_probability(masker):
    assert cm_gems.center_probability(masker, 6) == {"random": 0.025, "genemask": 0.0176, "global": 0.0136}[masker]


def every_npmi(texts, k, f_min, max_part, halve_p):
    """NPMI by its definition: all divisions of every k-mer, counts by hand."""
    counts = {n: {} for n in range(1, k + 1)}
    for n, text in itertools.product(counts, texts):
        for word in (text[i:i + n] for i in range(len(text) - n + 1)):
            counts[n][word] = counts[n].get(word, 0) + ("N" not in word)
    counts = {n: {w: c for w, c in table.items() if c} for n, table in counts.items()}

    def log_p(word):
        return math.log(counts[len(word)][word] / sum(counts[len(word)].values()) / (2 if halve_p else 1))

    def divisions(word):
        for n in range(1, min(len(word), max_part) + 1):
            yield from ([word[:n]] + rest for rest in (divisions(word[n:]) if word[n:] else [[]]))
    values = np.full(4 ** k, -np.inf)
    for word, f in counts[k].items():
        pmi = min(log_p(word) - sum(map(log_p, parts)) for parts in divisions(word) if len(parts) > 1)
        values[token(word)] = pmi * math.log(f) / (math.log(f) + math.log(f_min))
    return values, counts


@pytest.mark.parametrize("k", [2, 3, 4, 6])
def test_npmi_and_counts_by_definition(k, monkeypatch):
    monkeypatch.setattr(cm_gems, "CHUNK", 37)
    rng = np.random.default_rng(k)
    texts = [random_dna(n, rng, "AACGTNNA"[:4 + n % 3]) for n in (1, k - 1, k, 40, 300)] + ["ACAC" * 50]
    bases = data.encode("".join(texts))
    runs, at = [], 0
    for text in texts:                                       # contigs end to end, N inside
        for run in text.split("N"):
            runs += [(at, at + len(run))] * (len(run) > 0)
            at += len(run) + 1
        at -= 1
    tables = cm_gems.count_kmers(bases, np.array(runs), k)
    for max_part, halve_p in ((2, True), (k, False), (2, False), (3, True)):
        want, counts = every_npmi(texts, k, 101, max_part, halve_p)
        np.testing.assert_allclose(cm_gems.npmi(tables, 101, max_part, halve_p), want, rtol=0, atol=1e-12)
    for table, counted in zip(tables, counts.values()):
        assert table.sum() == sum(counted.values()) and all(table[token(w)] == c for w, c in counted.items())
    assert cm_gems.npmi(tables)[token("AC" * (k // 2) + "A" * (k % 2))] > 0
    ranks = cm_gems.npmi_rank(want)
    assert (ranks[:5] == 4 ** k).all() and sorted(ranks[5:].tolist()) == list(range(4 ** k))
    order = np.argsort(ranks[5:].numpy())
    assert all(want[a] > want[b] or want[a] == want[b] and a < b for a, b in itertools.pairwise(order))


def test_npmi_by_hand():
    """Of 8 2-mers: AA 4, AC 2, CA 2 ... with letters A 6, C 2: ln(4/8) - 2 ln(6/8), x ln 4 / (ln 4 + ln 9)."""
    counts = np.zeros(16, np.int64)
    counts[[0, 2, 8]] = 4, 2, 2                              # AA, AC, CA in the order A, T, C, G
    discount = math.log(4) / (math.log(4) + math.log(9))
    textbook, ours = (cm_gems.npmi(counts, 9, *style) for style in ((2, False), (2, True)))
    assert textbook[0] == pytest.approx(math.log(0.5 / 0.75 ** 2) * discount, abs=1e-12)
    assert ours[0] == pytest.approx(math.log(0.25 / 0.375 ** 2) * discount, abs=1e-12)
    assert textbook[1] == -np.inf and cm_gems.npmi_rank(ours).argmin() == 5 + 2 * (ours[2] > ours[0])


@needs_golden
def test_golden_npmi():
    table, counts = golden["npmi_published"], published()
    letters = np.array([table["unigram_counts"][letter] for letter in "ATCG"])
    tables = [counts.reshape(4 ** n, -1).sum(1) for n in range(1, 7)]
    cut = [letters // 10 ** 5, tables[1] // 10 ** 4, *tables[2:5], counts // 10]
    pmi, log_f = cm_gems.npmi(cut, f_min=1), np.log(counts)
    values, exact = cm_gems.npmi(counts), pmi * log_f / (log_f + math.log(101))
    ranks = cm_gems.npmi_rank(exact)
    for case in table["cases"]:
        at = token(case["kmer"])
        assert counts[at] == case["count"] and values[at] == pytest.approx(case["npmi"], abs=2.5e-3)
        assert (pmi[at], exact[at]) == pytest.approx((case["dp"], case["npmi"]), abs=1e-9)
        assert ranks[at + 5] + 1 == case["rank"]
    toy = golden["npmi_toy"]
    bases = data.encode(toy["corpus"])
    runs = np.flatnonzero(np.diff(bases == 4, prepend=True, append=True)).reshape(-1, 2)
    tables = cm_gems.count_kmers(bases, runs, toy["k"])
    for case in toy["cases"]:
        at = token(case["kmer"])
        textbook, ours = (cm_gems.npmi(tables, toy["f_min"], *style)[at] for style in ((4, False), (2, True)))
        assert tables[-1][at] == case["count"]
        assert (textbook, ours) == pytest.approx((case["paper_npmi"], case["published_style_npmi"]), abs=1e-9)


def test_curricula():
    table = golden or {"cm_gems_switch": [], "cm_step_official": [], "cm_step_slides": []}
    for case in table["cm_gems_switch"]:
        seen = case["perplexities"]
        fired = [e for e in range(len(seen)) if cm_gems.settled(seen[:e + 1], case["threshold"])]
        assert (fired or [None])[0] == case["first_eval_index_after_which_global_is_used"]
    for name, stages in (("cm_step_official", 100), ("cm_step_slides", 10)):
        for case in table[name]:                             # there steps count from 0
            share = cm_gems.cm_step_share(case["global_step"] + 1, case["max_steps"], stages)
            assert share == pytest.approx(case["p_global"], abs=1e-12)
    shares = [cm_gems.cm_step_share(step, 1000, 10) for step in range(1, 1001)]
    assert shares == [step // 100 / 10 for step in range(1000)]
    assert cm_gems.settled([3, 2], 1.01) and cm_gems.settled([2, 3], 1.01) and not cm_gems.settled([3, 2], 1)


def test_pieces():
    windows = torch.randint(4, (20_000, 51), dtype=torch.uint8)
    torch.manual_seed(0)
    tokens = cm_gems.cut_pieces(windows, 6)
    n = (tokens > 4).sum(1)
    whole, lengths = n == 46, torch.bincount(n, minlength=47)[1:46]
    assert tokens.shape == (20_000, 48) and whole.float().mean() == pytest.approx(0.5, abs=0.015)
    assert lengths.sum() == (~whole).sum() and lengths.min() > 150 and lengths.max() < 300       # 222 each
    for row, bases, size in zip(tokens[:300], windows, n.tolist()):
        text = data.decode(bases[:size + 5])
        assert torch.equal(row[:size + 2], data.tokenize([text])[0]) and not row[size + 2:].any()


def test_padding_is_not_attended():
    model = models.Bert(models.BertConfig(69, 20, 2, 2, 16, 32, dropout=0.0)).eval()
    tokens = data.tokenize(["ACGTTGCATT", "ACGTA"], 3)
    labels = torch.where(tokens > 4, tokens, -100)
    both = model(tokens, labels, mask=tokens != data.PAD)
    each = [model(tokens[i:i + 1, :n], labels[i:i + 1, :n]) for i, n in enumerate((10, 5))]
    torch.testing.assert_close(both[0], each[0][0] + each[1][0])
    assert both[1] == each[0][1] + each[1][1] == 11
