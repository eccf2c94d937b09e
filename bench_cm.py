"""Items for bench.py (to be moved there): the masks of cm_gems.py, its k-mer counts, what padding costs.

    python bench_cm.py --rounds 5
"""
import os
import sys
from collections import Counter
from statistics import median

import numpy as np
import torch

import cm_gems
import data
import models
import training
from bench import B, K, MINI, T, V, WORDS, compare, interleave, line

NAMES = models.vocabulary(K)


def released_rank(rank_of):
    """Rank of a token id as the released code finds it: the tokenizer decodes the id, a dict has the rank."""
    from transformers import BertTokenizer
    tokenizer = BertTokenizer(vocab=WORDS, do_lower_case=False)
    return lambda token: rank_of.get(tokenizer.decode(token).replace(" ", ""), len(rank_of))


def loop_gene_mask(tokens, centers, rank):
    """GeneMask, a Python loop over sequences, centers and candidates; rank: token id -> rank."""
    masked = torch.zeros_like(centers)
    for row, ids in enumerate(tokens.tolist()):
        special = torch.tensor([token <= data.MASK for token in ids])
        end, hidden, best = torch.where(~special)[0].tolist()[-1], set(), {}
        for center in torch.where(centers[row] & ~special)[0].tolist():
            near = [center] + [center + o for o in (-2, -1, 1, 2, 3) if 1 <= center + o <= end]
            hidden.update(near)
            ranks = [rank(ids[position]) for position in near]
            best[center] = near[ranks.index(min(ranks))], min(ranks)
        half = (len(best) + 1) // 2
        high = sorted(best.values(), key=lambda found: found[1])[:len(best) if half < 5 else half]
        for position, _ in high:
            hidden.update(q for q in range(position - 5, position + 6) if 1 <= q <= end)
        masked[row, list(hidden)] = True
    return masked


def loop_global_mask(tokens, m, rank):
    """Global, a Python loop over sequences and tokens."""
    masked = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, (ids, n) in enumerate(zip(tokens.tolist(), m.tolist())):
        real = [position for position, token in enumerate(ids) if token > data.MASK]
        hidden = set()
        for center in sorted(real, key=lambda position: (rank(ids[position]), position))[:n]:
            hidden.update(q for q in range(center - 5, center + 6) if 1 <= q <= real[-1])
        masked[row, list(hidden)] = True
    return masked


def cm_masks(rounds):
    """Masks of a micro-batch of 64 x 512 tokens; peers: loops with the released look-up, and with a list."""
    npmi_rank = cm_gems.npmi_rank(np.random.default_rng(0).random(4 ** K))
    table, rank_of = npmi_rank.tolist(), dict(zip(NAMES[5:], npmi_rank[5:].tolist()))
    tokens = data.kmer_tokens(torch.randint(4, (B, T - 2 + K - 1), dtype=torch.uint8), K, 1, specials=True)
    released = released_rank(rank_of)
    for masker, loop in (("genemask", loop_gene_mask), ("global", loop_global_mask)):
        p = cm_gems.center_probability(masker, K)

        def get(mask, rank=None):
            centers = data.draw_centers(tokens.shape, p, tokens.device) & (tokens > data.MASK)
            return mask(tokens, *((npmi_rank, centers) if rank is None else
                                  (centers if masker == "genemask" else centers.sum(1), rank)))
        centers = data.draw_centers(tokens.shape, p, tokens.device) & (tokens > data.MASK)
        want = loop(tokens, centers if masker == "genemask" else centers.sum(1), released)
        assert torch.equal(cm_gems.MASKERS[masker](tokens, npmi_rank, centers), want)
        compare(masker, {"released loop": (lambda: get(loop, released), 100),
                         "loop, list": (lambda: get(loop, table.__getitem__), None)},
                lambda: get(cm_gems.MASKERS[masker]), rounds, B * T / 1e6, "Mtok/s")


def npmi_counts(rounds):
    """1..6-mers of 1 Mb, those of 6 alone by collections.Counter; equal counts."""
    bases = np.random.default_rng(0).integers(4, size=1 << 20, dtype=np.uint8)
    text, runs = data.decode(bases), np.array([[0, len(bases)]])

    def peer():
        return Counter(text[i:i + K] for i in range(len(text) - K + 1))
    theirs = peer()
    assert cm_gems.count_kmers(bases, runs, K)[-1].tolist() == [theirs[name] for name in NAMES[5:]]
    rate = compare("count k-mers", {"Counter": (peer, 40)}, lambda: cm_gems.count_kmers(bases, runs, K),
                   rounds, len(bases) / 1e6, "Mb/s", 310)
    line("count k-mers", f"3.1 Gb in {3100 / rate:.1f} s on this core")


def cm_step_parts(rounds):
    """Of a training step (MINI, 16 pieces of the corpus): its batch and masks; its time per k-mer, against whole
    windows without an attention mask."""
    npmi_rank, model = cm_gems.npmi_rank(np.random.default_rng(0).random(4 ** K)), models.Bert(MINI)
    bases = np.random.default_rng(1).integers(4, size=10 ** 7, dtype=np.uint8)
    table = data.window_table(np.array([[0, len(bases)]]), T - 1)
    optimizer = training.make_optimizer(model, 1e-4, 0.01, cm_gems.BETAS, cm_gems.EPS)

    def batch(masker, whole=False):
        starts = data.draw_starts(table, 16, training.seed(4))                 # 4: 74 % are no padding
        windows = data.take_windows(bases, starts, T - 1)
        tokens = data.kmer_tokens(windows, K, 1, True) if whole else cm_gems.cut_pieces(windows, K)
        centers = data.draw_centers(tokens.shape, cm_gems.center_probability(masker, K), "cpu")
        return tokens, cm_gems.MASKERS[masker](tokens, npmi_rank, centers & (tokens > data.MASK))

    def step(tokens, masked, whole=False):
        inputs, labels = data.corrupt(tokens, masked, V)
        loss_sum, count = model(inputs, labels, mask=None if whole else tokens != data.PAD)
        (loss_sum / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    pieces, windows = batch("genemask"), batch("genemask", whole=True)
    real, full = ((tokens > data.MASK).sum().item() for tokens, _ in (pieces, windows))
    for masker in ("genemask", "global"):
        compare(f"{masker} batch", {"training step": (lambda: step(*pieces), 20)}, lambda: batch(masker), rounds,
                real / 1e6, "Mtok/s")
    times = interleave({"pieces": lambda: step(*pieces), "windows": lambda: step(*windows, whole=True)}, rounds)
    ratios = [a / b * full / real for a, b in zip(times["pieces"], times["windows"])]
    line("pieces", f"time per k-mer {median(ratios):.3g}x that of whole windows [{min(ratios):.3g}.."
         f"{max(ratios):.3g}]; {real / full:.0%} are no padding", (median(ratios) <= 1.15, "<= 1.15x (on a GPU)"))


if __name__ == "__main__":
    rounds = int(sys.argv[sys.argv.index("--rounds") + 1]) if "--rounds" in sys.argv else 5
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    torch.set_num_threads(1)
    for item in (cm_masks, npmi_counts, cm_step_parts):
        item(rounds)
