"""CM-GEMS (Roy et al.): a curriculum of two maskings. GeneMask masks around random centers and the k-mers of
highest NPMI near them; once the validation perplexity has settled, Global masks the k-mers of highest NPMI.

    python cm_gems.py --demo                                 two minutes on a laptop, no data needed
    python cm_gems.py --genome my.fa.gz --model logo         your own genome, a small model
    torchrun --nproc_per_node 8 cm_gems.py                   the paper's run: hg38, 10,000 steps of 250
    torchrun --nproc_per_node 8 cm_gems.py --steps 1000      its short run
    python cm_gems.py --strategy genemask                    baselines: genemask, global, random, cm_step
    python cm_gems.py --npmi_only --genome my.fa.gz          the k-mers of highest and lowest NPMI
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))                # python -I leaves it out
import training                                              # first: it answers Ctrl-C in the slow imports
from training import file_name, number

import math
import re
import zlib

import numpy as np
import torch
import torch.nn.functional as F

import data
import models

MASK_RATE = 0.15                                             # the papers'; over the mean span: p of a center
F_MIN = 101                                                  # lowest count in GeneMask's NPMI vocabulary
HG38_NPMI_CONTIGS = ["chr1", "chr2", "chr3"]                 # GeneMask's published table was counted on these
BETAS, EPS = (0.9, 0.98), 1e-6                               # GeneMask's pretraining script
MODELS = {"dnabert": dict(n_layer=12, n_head=12, n_embd=768, n_inner=3072, dropout=0.1),     # and its configs
          "logo": dict(n_layer=2, n_head=8, n_embd=256, n_inner=3072, dropout=0.0)}
KMERS_AT_ONCE = 1 << 17                                      # k-mers counted at a time: their ids fit in L2
DEMO = dict(genome=["demo"], k=3, block_size=34, n_layer=2, n_head=4, n_embd=64, n_inner=256, dropout=0.0,
            lr=5e-3, batch_size=64, micro_batch_size=32, steps=2500, switch_drop=0.5, switch_after=1200,
            out="out/demo_cm_gems", eval_windows=256)


def join_intervals(bases, intervals, ends, low, high):
    """Returns bases low to high of the intervals (n, 2) end to end; ends: where each of them ends there."""
    first, last = np.searchsorted(ends, (low, high - 1), side="right")
    ends, shift = ends[first:last + 1], intervals[first:last + 1, 1] - ends[first:last + 1]
    if (shift == shift[0]).all():                            # no N between them
        return bases[low + shift[0]:high + shift[0]]
    return bases[np.arange(low, high) + np.repeat(shift, np.diff(ends.clip(max=high), prepend=low))]


def count_starts(bases, k, but):
    """Counts the k-mers in bases, without N, that start anywhere but at these positions: (4**k,) in order."""
    numbers = data.kmer_numbers(torch.from_numpy(bases)[None], k)[0]
    counts = torch.bincount(numbers, minlength=4 ** k)
    if len(but):
        counts -= torch.bincount(numbers[but], minlength=4 ** k)
    return counts.numpy()


def count_kmers(bases, intervals, k):
    """Counts the 1- to k-mers in the intervals (n, 2) of bases, one strand: k tables in token order."""
    table, ends = np.zeros(4 ** k, np.int64), np.cumsum(np.diff(intervals)[:, 0])
    tails = intervals[:, 1:] - np.arange(k - 1, 0, -1)       # no k-mer starts here, but shorter ones do
    inside = tails >= intervals[:, :1]
    tails = np.where(inside, bases[tails.clip(0)], np.uint8(4))
    but = (ends[:, None] - np.arange(k - 1, 0, -1))[inside]
    starts = int(ends[-1:].sum()) - k + 1
    for low in range(0, starts, KMERS_AT_ONCE):              # of many short intervals at a time
        high = min(low + KMERS_AT_ONCE, starts)
        first, last = np.searchsorted(but, (low, high))
        chunk = join_intervals(bases, intervals, ends, low, high + k - 1)
        table += count_starts(chunk, k, but[first:last] - low)
    tables = [table.reshape(4 ** n, -1).sum(1) for n in range(1, k)]
    for n, shorter in enumerate(tables, 1):
        ids = data.kmer_tokens(torch.from_numpy(tails), n, 1).flatten()
        shorter += torch.bincount(ids, minlength=4 ** n + 5)[5:].numpy()
    return [*tables, table]


def npmi(counts, f_min=F_MIN, max_part=2, halve_p=True):
    """Computes the NPMI of the k-mers in token order, (4**k,) float64; -inf for those that do not occur.

    PMI is the minimum of ln p(k-mer) - sum of ln p(part) over all divisions into parts of at most max_part
    letters; NPMI = PMI x ln f / (ln f + ln f_min). The defaults are those of GeneMask's published table;
    max_part=k, halve_p=False is the textbook PMI. counts: from count_kmers, or of the k-mers alone.
    """
    if np.ndim(counts[0]) == 0:
        k = round(math.log(len(counts), 4))
        counts = [np.reshape(counts, (4 ** n, -1)).sum(1) for n in range(1, k + 1)]
    k, best = len(counts), [np.zeros(1)]
    with np.errstate(divide="ignore", invalid="ignore"):
        log_p = [np.log(c / c.sum() / (1 + halve_p)) for c in counts]
        for n in range(1, k + 1):                            # best[n]: division of each n-letter prefix
            parts = range(1, min(n, max_part, k - 1) + 1)
            best.append(np.max([np.add.outer(best[n - j], log_p[j - 1]).ravel() for j in parts], axis=0))
        log_f = np.log(counts[-1])
        values = (log_p[-1] - best[-1]) * log_f / (log_f + math.log(f_min))
    return np.where(np.isfinite(values), values, -np.inf)


def npmi_rank(values):
    """Ranks NPMI (4**k,) by token id: (4**k + 5,) int64, 0 = highest, ties by id, specials last."""
    ranks = torch.full((len(values) + 5,), len(values))
    ranks[torch.from_numpy(np.argsort(-values, kind="stable")) + 5] = torch.arange(len(values))
    return ranks


def npmi_lines(values, counts, k):
    """Returns the table as lines of a CSV, highest NPMI (rank 1) first, without k-mers that do not occur."""
    names, order = models.vocabulary(k)[5:], np.argsort(-values, kind="stable").tolist()
    rows = [f"{names[i]},{counts[i]},{values[i]},{n}" for n, i in enumerate(order, 1) if values[i] > -np.inf]
    return ["kmer,count,npmi,rank", *rows]


def read_npmi(path, k):
    """Reads NPMI (4**k,) from our CSV or GeneMask's (ngram, norm_dp_true_pmi); -inf for missing k-mers."""
    wanted = {"kmer": ("kmer", "ngram"), "npmi": ("npmi", "norm_dp_true_pmi")}
    columns, places = data.read_columns(path, wanted)
    values, npmi = {}, data.numbers({"npmi": columns["npmi"]}, places)
    for kmer, (value,), place in zip(columns["kmer"], npmi, places):
        if not re.fullmatch(f"[ACGT]{{{k}}}", kmer.upper()) or kmer.upper() in values:
            raise ValueError(f"{place}: {data.quoted(kmer)}; each line needs another {k}-mer of ACGT (--k)")
        values[kmer.upper()] = value
    return np.array([values.get(kmer, -np.inf) for kmer in models.vocabulary(k)[5:]])


def npmi_contigs(args, genome):
    """Returns the contigs whose k-mers are counted."""
    return genome.named(args.npmi_contigs or (), "--npmi_contigs") or (
        HG38_NPMI_CONTIGS if args.genome == ["hg38"] else list(genome.contigs))


def npmi_table(args, genome):
    """Returns NPMI, counts ('' if not counted now), file: --npmi_table or that in the genome's cache."""
    if args.npmi_table:
        return read_npmi(args.npmi_table, args.k), [""] * 4 ** args.k, args.npmi_table
    contigs = npmi_contigs(args, genome)
    key = f"{genome.fingerprint}_{zlib.crc32(repr(sorted(set(contigs))).encode()):08x}"
    path = os.path.join(os.path.dirname(genome.bases.filename), f"npmi_{args.k}_{args.npmi}_{key}.csv")
    if os.path.exists(path) and not args.npmi_only:
        return read_npmi(path, args.k), [""] * 4 ** args.k, path
    at = np.searchsorted(np.cumsum(list(genome.contigs.values())), genome.intervals[:, 0], side="right")
    wanted = set(contigs)
    chosen = np.array([name in wanted for name in genome.contigs])[at]
    with data.stoppable("counting k-mers"):
        counts = count_kmers(genome.bases, genome.intervals[chosen], args.k)
    if not counts[-1].sum():
        raise ValueError(f"no {args.k}-mer to count in {', '.join(contigs)[:80]}; name contigs with "
                         f"sequence (with --bed, in its intervals) in --npmi_contigs")
    if counts[-1].sum() < 4 ** args.k:
        raise ValueError(f"genome too small for an NPMI: {counts[-1].sum()} {args.k}-mers, of {4 ** args.k} "
                         f"different ones; use a larger genome, a smaller --k or --npmi_table")
    values = npmi(counts) if args.npmi == "published" else npmi(counts, max_part=args.k, halve_p=False)
    try:
        data.write_whole(path, "\n".join(npmi_lines(values, counts[-1], args.k)) + "\n")
    except OSError as e:
        raise ValueError(f"{path}: cannot be written ({e.strerror}); give --cache FOLDER") from None
    return values, counts[-1], path


def k_of(npmi_rank):
    """Returns k of a table by token id."""
    return round(math.log(len(npmi_rank) - 5, 4))


def lowest(key, n):
    """Returns the positions (B, S) of the n (B,) lowest keys of each row (B, T) in order, padded with T."""
    T = key.shape[1]
    S = T if key.is_cuda else min(int(n.max()), T)           # asking a GPU would make it wait
    at = key.topk(S, largest=False).indices
    return torch.where(torch.arange(S, device=key.device) < n[:, None], at, T)


def center_mask(tokens, npmi_rank, centers):
    """Masks the k tokens around every center, as DNABERT: bool (B, T)."""
    k = k_of(npmi_rank)
    return data.span_mask(centers, tokens > data.MASK, (k - 1) // 2, k // 2)


def best_tokens(tokens, npmi_rank, centers):
    """Marks the token of highest NPMI among the k around each of the best centers: bool (B, T).

    Ties: the center, then the leftmost. The best centers are ceil(m / 2) of a row's m centers by that NPMI,
    then by position; all m if that is fewer than 5.
    """
    T, left, right = tokens.shape[1], (k_of(npmi_rank) - 1) // 2, k_of(npmi_rank) // 2
    n_up_to = (centers & (tokens > data.MASK)).cumsum(1)
    m = n_up_to[:, -1]
    S = T if m.is_cuda else int(m.max())                     # asking a GPU would make it wait
    nth = torch.arange(1, S + 1, device=tokens.device).expand(len(tokens), S).contiguous()
    at = torch.searchsorted(n_up_to, nth)                    # (B, S): the centers in order, then T
    near = at[..., None] + torch.arange(-left, right + 1, device=tokens.device)
    near = near.clamp_(0, T - 1)                             # (B, S, k); a position twice changes nothing
    rank = npmi_rank.index_select(0, tokens.gather(1, near.flatten(1)).flatten()).view(near.shape)
    best, which = rank.min(2)                                # ties: the leftmost
    best_at = torch.where(rank[..., left] == best, at, near.gather(2, which[..., None])[..., 0])
    half, key = (m + 1) // 2, (best * T + at).masked_fill(at == T, torch.iinfo(torch.int64).max)
    high = lowest(key, torch.where(half < 5, m, half))       # fewer than 5: all, as in GeneMask's code
    return data.mark(F.pad(best_at, (0, 1), value=T).gather(1, high), T)


def gene_mask(tokens, npmi_rank, centers):
    """Masks the k tokens around every center and the 2k - 1 around best_tokens, as GeneMask: bool (B, T).

    tokens int64 (B, T), npmi_rank by token id (0 = highest NPMI, specials last), centers bool (B, T). 2k - 1
    masked tokens hide all letters of the one in the middle.
    """
    k, best = k_of(npmi_rank), best_tokens(tokens, npmi_rank, centers)
    return center_mask(tokens, npmi_rank, centers) | data.span_mask(best, tokens > data.MASK, k - 1, k - 1)


def top_tokens(tokens, npmi_rank, m):
    """Marks the m (B,) tokens of highest NPMI of each row, ties: the leftmost: bool (B, T)."""
    T, maskable = tokens.shape[1], tokens > data.MASK
    rank = npmi_rank.index_select(0, tokens.flatten()).view(tokens.shape)      # 4 x faster than [tokens]
    key = rank * T + torch.arange(T, device=tokens.device)
    return data.mark(lowest(key.masked_fill(~maskable, torch.iinfo(key.dtype).max), m), T) & maskable


def global_mask(tokens, npmi_rank, m):
    """Masks the 2k - 1 tokens around each of the m (B,) top_tokens: Global, bool (B, T)."""
    top, reach = top_tokens(tokens, npmi_rank, m), k_of(npmi_rank) - 1
    return data.span_mask(top, tokens > data.MASK, reach, reach)


MASKERS = {"random": center_mask, "genemask": gene_mask,     # (tokens, npmi_rank, centers) -> masked
           "global": lambda tokens, npmi_rank, centers: global_mask(tokens, npmi_rank, centers.sum(1))}


def center_probability(masker, k):
    """Returns the p that masks 15 % if spans do not overlap; k = 6: 0.025, 0.0176, 0.0136, as published."""
    return round(MASK_RATE / {"random": k, "genemask": (3 * k - 1) / 2, "global": 2 * k - 1}[masker], 4)


def longest_piece(L, k, high):
    """Returns the bases of the longest piece of windows of L bases up to the share `high` of all lengths."""
    return min(L, max(k, k + math.ceil(2 * (L - k) * high) - 1))


def cut_pieces(windows, k, low=0.0, high=1.0):
    """Cuts half of the windows (B, L) to k..L - 1 bases: tokens [CLS] k-mers [SEP] [PAD]... (B, T).

    The lengths are drawn from the share `low` to `high` of all lengths in order, to save padding.
    """
    L = windows.shape[1]
    longest = longest_piece(L, k, high)
    quantile = low + (high - low) * torch.rand(len(windows), device=windows.device)  # from 1/2 on: whole
    end = (k + (2 * (L - k) * quantile).long()).clamp(max=longest)[:, None] - k + 2        # place of [SEP]
    tokens = data.kmer_tokens(windows[:, :longest], k, 1, specials=True)
    at = torch.arange(tokens.shape[1], device=windows.device)
    return tokens.masked_fill_(at == end, data.SEP).masked_fill_(at > end, data.PAD)


def settled(perplexities, drop):
    """Tells whether the last two perplexities differ by less than `drop`, up or down, so CM-GEMS switches."""
    return len(perplexities) > 1 and abs(perplexities[-1] - perplexities[-2]) < drop


def can_switch(args):
    """Tells whether any evaluation but the first comes at or after --switch_after, before the last step."""
    last = (args.steps - 1) // args.eval_every * args.eval_every
    return last >= max(2 * args.eval_every, args.switch_after)


def cm_step_share(step, steps, stages):
    """Returns CM-Step's share of Global at step 1..steps: 0, 1 / stages, ... 1 - 1 / stages."""
    return stages * (step - 1) // steps / stages


def print_masks(masker, npmi_rank, tokens, centers, masked):
    """Prints sequences; below the first base of each k-mer: # masked, o center, * chosen for its NPMI."""
    names, chosen = models.vocabulary(k_of(npmi_rank)), torch.zeros_like(masked)
    if masker == "genemask":
        chosen = best_tokens(tokens, npmi_rank, centers)
    if masker == "global":                                   # only the number of centers counts
        chosen, centers = top_tokens(tokens, npmi_rank, centers.sum(1)), chosen
    marks = torch.where(chosen, 3, masked.long() + centers)
    for n, row in enumerate(tokens > data.MASK):
        words = [names[token] for token in tokens[n, row]]
        picked = ", ".join(f"{names[token]} {npmi_rank[token] + 1}" for token in tokens[n, chosen[n]])
        print(f"{masker}, sequence {n}: {masked[n].sum() / row.sum():.1%} masked (#); chosen (*), with rank: "
              f"{picked or 'none'}", "".join(word[0] for word in words) + words[-1][1:],
              "".join(".#o*"[mark] for mark in marks[n, row]), sep="\n")


def idle(args):
    """Returns the names of the flags that do nothing beside the others."""
    of = {"cm_gems": ["switch_drop", "switch_after"], "cm_step": ["cm_step_stages", "cm_step_easy"]}
    return [name for strategy, names in of.items() if strategy != args.strategy for name in names]


def parse_args():
    parser, positive = training.new_parser(__doc__), number(int, 1)
    add = parser.add_argument_group("model").add_argument
    add("--k", type=number(int, 2, 9), default=6, help="k-mer length, 2 to 8 (%(default)s)")
    add("--block_size", type=positive, default=512,
        help="tokens; the longest piece has block_size - 1 bases (%(default)s)")
    add("--model", choices=MODELS, default="dnabert",
        help="preset of --n_layer, --n_head, --n_embd, --n_inner and --dropout (%(default)s)")
    training.add_size_flag(add)
    add("--n_layer", type=positive, help="layers (dnabert 12, logo 2)")
    add("--n_head", type=positive, help="attention heads (dnabert 12, logo 8)")
    add("--n_embd", type=positive, help="width (dnabert 768, logo 256)")
    add("--n_inner", type=positive, help="width of the feed-forward layers (3072)")
    add("--dropout", type=number(float, 0, 1), help="dropout (dnabert 0.1, logo 0)")
    add("--init", type=file_name, help="start from these weights: a checkpoint, or hf:FOLDER")
    add = parser.add_argument_group("method").add_argument
    add("--strategy", choices=("cm_gems", "cm_step", *MASKERS), default="cm_gems",
        help="what is masked, and when (%(default)s)")
    add("--p_scale", type=number(float, 1e-9, 6), default=1.0,
        help="multiplies the probability of a center (%(default)s)")
    add("--switch_drop", type=number(float, 0), default=1.0,                   # released code
        help="cm_gems: switch when the perplexity changes by less than this (%(default)s)")
    add("--switch_after", type=number(int, 0), default=0, help="cm_gems: do not switch before this step (0)")
    add("--cm_step_stages", type=positive, default=10,       # the talk's slides
        help="stages of cm_step (10; released code: 100)")
    add("--cm_step_easy", choices=("genemask", "random"), default="genemask",
        help="cm_step: the masking it starts with (%(default)s; released code: random)")
    add("--npmi", choices=("published", "textbook"), default="published", help="NPMI formula (%(default)s)")
    add("--npmi_contigs", type=lambda text: text.split(","),
        help="contigs whose k-mers are counted, comma-separated (all; of hg38 chr1,chr2,chr3)")
    add("--npmi_table", type=file_name,
        help="read NPMI from this CSV, ours or GeneMask's, instead of counting")
    add("--npmi_only", action="store_true", help="count, print the top and bottom k-mers, then stop")
    add = training.add_optimization_flags(                   # GeneMask's pretraining script; steps: slides
        parser, batch_size=250, micro_batch_size=32, lr=8e-4, warmup="5 %%", weight_decay=0.01)
    add("--steps", type=positive, default=10_000, help="steps (%(default)s)")
    training.add_run_flags(parser, "out/cm_gems", eval_windows=2000)           # ours
    parser.set_defaults(**MODELS[parser.parse_args().model])
    return training.parse_flags(parser, DEMO, idle)


def complete_args(args):
    """Fills in the defaults that depend on other flags. ValueError for flags that contradict each other."""
    if args.block_size < args.k + 2:
        raise ValueError(f"--block_size {args.block_size}: give {args.k + 2} or more for k = {args.k}")
    if args.npmi_table and (args.npmi_contigs or args.npmi != "published"):
        flag = "--npmi_contigs" if args.npmi_contigs else "--npmi"
        raise ValueError(f"--npmi_table and {flag}: a table needs no counting; drop one of them")
    if args.size not in (None, "base") and args.model != "dnabert":
        raise ValueError(f"--size {args.size}: sets what --model {args.model} sets; drop one of them")
    training.complete_warmup(args, 0.05)                     # 500 of 10,000
    if args.eval_every is None:
        args.eval_every = max(1, round(args.steps / 20))     # ours: see docs/cm_gems.md, choice 7


def build_model(args):
    """Returns the network of the flags, started from --init where given."""
    config = models.BertConfig(4 ** args.k + 5, args.block_size, args.n_layer, args.n_head, args.n_embd,
                               args.n_inner, args.dropout)
    training.seed(args.seed)
    model = models.Bert(config)
    if args.init and not args.resume:
        models.copy_weights(model, args.init, training.load)
    return model


if __name__ == "__main__":
    with training.user_errors():
        args = parse_args()
        complete_args(args)
        run = training.Run(args, writes=not (args.show_masks or args.npmi_only))
        device = run.device
        genome = data.open_genome(args.genome, args.data_dir, args.cache, args.ambiguous, args.verify)
        genome.restrict(args.bed)
        repeats = genome.repeats(args.repeat_weight, device)
        values, counts, npmi_path = npmi_table(args, genome)
        ranks, (header, *lines) = npmi_rank(values), npmi_lines(values, counts, args.k)
        contigs = [] if args.npmi_table else npmi_contigs(args, genome)
        corpus = f", counted on {', '.join(contigs)}" if 0 < len(contigs) < len(genome.contigs) else ""
        about_npmi = f"npmi     of {len(lines)} of {4 ** args.k} {args.k}-mers{corpus}: {npmi_path}"
        if args.npmi_only:
            run.say(header, *lines[:20], "...", *lines[20:][-20:], about_npmi, sep="\n")
            training.finish()
        bases, n_vocab = data.resident(genome.bases, device), 4 ** args.k + 5
        run.check_memory(build_model, args.block_size)       # of what the genome leaves
        model = build_model(args).to(device)
        optimizer = training.make_optimizer(model, args.lr, args.weight_decay, BETAS, EPS)
        parts = {"model": model, "optimizer": optimizer}

        length = args.block_size - 1                         # bases of a whole piece: 511 for 512
        train, val = (data.window_table(part, length) for part in genome.split(length, args.val_contigs))
        in_force = "genemask" if args.strategy == "cm_gems" else args.strategy
        curriculum = {"strategy": in_force, "perplexities": [], "switch_step": None}
        if run.writes:
            run.fixed = "eval_every",                        # it decides when the strategy switches
            fingerprint = f"{genome.fingerprint}, NPMI {zlib.crc32(ranks.numpy()):08x}"
            run.open("cm_gems", model.config, fingerprint, parts, curriculum)
    ranks = ranks.to(device)
    held_out = val, args.eval_windows, 0, args.p_scale       # key 0: steps count from 1
    comparable = val, args.eval_windows, 0, 1.0              # whatever --p_scale

    def get_batch(source, strategy, step, i, n):
        """Draws micro-batch i (n sequences) of source (window table, its number of sequences, random key,
        factor of p).

        Returns tokens, centers, masked, weights (n, T; None: all 1).
        """
        table, size, key, scale = source
        rng, masker = training.seed(args.seed, key, i), strategy
        starts = data.draw_starts(table, n, rng)
        if strategy == "cm_step":
            share = cm_step_share(step, args.steps, args.cm_step_stages)
            masker = "global" if rng.random() < share else args.cm_step_easy
        windows, soft = data.to_device(data.take_windows(bases, starts, length), device), None
        if key:                                              # of a step; evaluations: forward, unweighted
            soft = data.in_repeats(windows, starts, repeats)
            if args.strands == "both":
                windows, soft = data.either_strand(windows, soft)
        first = i * args.micro_batch_size                    # the `size` sequences are in order of length
        tokens = cut_pieces(windows, args.k, first / size, (first + n) / size)
        p = scale * center_probability(masker, args.k)
        centers = data.draw_centers(tokens.shape, p, device) & (tokens > data.MASK)
        weights = None if soft is None else data.token_weights(soft, args.k, 1, args.repeat_weight)
        return tokens, centers, MASKERS[masker](tokens, ranks, centers), weights

    if args.show_masks:
        both = {"cm_gems": ("genemask", "global"), "cm_step": (args.cm_step_easy, "global")}
        for masker in both.get(args.strategy, [args.strategy]) if run.rank == 0 else ():
            batch = get_batch((train, args.show_masks, 0, args.p_scale), masker, 1, 0, args.show_masks)
            print_masks(masker, ranks, *batch[:3])
        training.finish()

    mean = length / 2 + (args.k + length - 1) / 4            # bases of a piece
    reached, lines = genome.reach(length, args.val_contigs)
    passes = args.steps * args.batch_size * mean / reached
    run.describe(model, genome, passes, args.batch_size * (mean - args.k + 1))
    run.say(*lines, about_npmi, sep="\n")
    run.say(f"pieces   half {length} bases, half {args.k} to {length - 1}; {passes:.2g} passes over the "
            f"bases reached")
    center_p = {masker: center_probability(masker, args.k) for masker in MASKERS}
    run.say(f"masks    {args.strategy}; p " + ", ".join(
        f"{args.p_scale * p:.4g} ({masker})" for masker, p in center_p.items()))
    if args.strategy == "cm_gems" and not can_switch(args):
        run.say(f"note: it stays with GeneMask: no evaluation before step {args.steps} can switch; lower "
                f"--eval_every or --switch_after")
    if run.start:
        run.say(f"strategy {curriculum['strategy']} in force")

    run.cost = lambda i, n, size: n * longest_piece(length, args.k, (i * args.micro_batch_size + n) / size)
    net = training.wrap(model, args.compile, device, run.world)
    span = 2 * args.k - 1                                    # the longest
    p = max(args.p_scale, 1) * max(center_p.values())
    share = 1 - (1 - p) ** span                              # masked tokens if all spans were that long
    widths = 64 if args.compile or device.type == "cuda" else 1               # few shapes, for graphs

    def forward(network, source, strategy, step, i, n):
        """Returns four sums over micro-batch i of source: losses, weights, masked tokens, k-mers."""
        tokens, _, masked, weights = get_batch(source, strategy, step, i, n)
        inputs, labels = data.corrupt(tokens, masked, n_vocab)
        whole = 2 * i * args.micro_batch_size >= source[1]   # the second half: no row is padded
        extra = 0 if whole else min(-tokens.shape[1] % widths, args.block_size - tokens.shape[1])
        inputs, labels = F.pad(inputs, (0, extra), value=data.PAD), F.pad(labels, (0, extra), value=-100)
        weights = None if weights is None else F.pad(weights, (0, inputs.shape[1] - weights.shape[1]))
        mask = None if whole else inputs != data.PAD
        capacity = models.mask_capacity(inputs.numel(), share, span) if device.type == "cuda" else None
        with training.autocast(device, args.dtype):
            loss_sum, weight = network(inputs, labels, mask=mask, capacity=capacity, weights=weights)
        count = weight if weights is None else (labels != -100).sum()
        return loss_sum, weight, count, (tokens > data.MASK).sum()

    @torch.no_grad()
    def evaluate(strategy, step, source=held_out):
        """Returns mean loss and perplexity on the same sequences and masks each time, shared by the ranks."""
        model.eval()
        total = torch.zeros(4, dtype=torch.float64, device=device)
        for i, n in run.eval_batches():
            total += torch.stack(forward(model, source, strategy, step, i, n))
        model.train()
        total = run.sum_evaluation(total)
        loss = total[0] / total[1].clamp(min=1)
        return loss.item(), loss.exp().item()

    def validate(step):
        """Makes a row of the log; adds its perplexity to the curriculum, which switches to Global once that
        has settled."""
        strategy, row = curriculum["strategy"], {}
        row["val_loss"], row["val_ppl"] = evaluate(strategy, step)
        row[f"val_loss_span{args.k}"], _ = evaluate("random", step, comparable)
        due, perplexities = step % args.eval_every == 0, curriculum["perplexities"]
        if due:                                              # the last evaluation of a run may not be
            perplexities = [*perplexities, row["val_ppl"]]   # the same on all ranks
        may_switch = (args.strategy, strategy) == ("cm_gems", "genemask") and step >= args.switch_after
        if due and may_switch and settled(perplexities, args.switch_drop):
            row |= {"switch_step": step, "val_ppl_global": evaluate("global", step)[1]}
            curriculum.update(strategy="global", switch_step=step)
        curriculum["perplexities"] = perplexities            # now: a stop signal can end any evaluate
        return row

    def say_what_it_learnt():
        """Prints the demo's held-out perplexities beside those of guessing, and the next commands."""
        run.say(f"\nWhat it learnt, as perplexity on held-out DNA (any of the {args.k}-mers: {4 ** args.k})")
        for masker in ("genemask", "global"):
            tokens, _, masked, _ = get_batch(held_out, masker, 1, 0, args.eval_windows)
            often = torch.special.entr(tokens[masked].bincount() / masked.sum()).sum().exp()
            ppl = evaluate(masker, 1)[1]
            verdict = "reads the context" if ppl < often / 1.5 else "hardly looks at the context"
            run.say(f"  {masker:8} {ppl:5.1f}; {often:.1f} by the frequencies of the masked {args.k}-mers: "
                    f"the model {verdict}")
        switch = curriculum["switch_step"]
        when = f"; this one switched after step {switch}" if switch else ""
        run.say(f"""A model is best at what it did last{when}
Next, your own DNA: its words, in seconds, and a model for a laptop (--help lists every flag)
  python cm_gems.py --npmi_only --genome YOUR.fa.gz
  python cm_gems.py --genome YOUR.fa.gz --out out/mine --block_size 26 --n_layer 2 --n_head 2 --n_embd 64 \\
      --n_inner 256 --dropout 0 --batch_size 256 --micro_batch_size 128 --lr 8e-3 --steps 3000""")

    with training.user_errors(OSError, MemoryError, torch.OutOfMemoryError):
        for step in run.steps(validate):
            strategy, lr = curriculum["strategy"], args.lr * training.linear(step, args.steps, args.warmup)
            sums = run.new_sums(4)                           # loss, weights, masked tokens, k-mers
            for i, n in run.micro_batches(args.batch_size):
                with run.sync_at_last(net, i):
                    batch = train, args.batch_size, step, args.p_scale
                    loss_sum, *counts = forward(net, batch, strategy, step, i, n)
                    run.scaler.scale(loss_sum).backward()
                sums += torch.stack([loss_sum.detach(), *counts])
            run.sum_over_ranks()
            run.scaler.unscale_(optimizer)
            # from DDP's average over ranks of sums to the mean over all masked tokens of the batch
            norm = training.scale_gradients(model, run.world / sums[1].clamp(min=1e-9), args.grad_clip)
            run.update(optimizer, lr, norm)

            run.read()
            if run.to_log:
                loss_sum, weight, count, n_kmers = run.sums
                row = {"loss": loss_sum / (weight or 1), "lr": lr, "grad_norm": run.norm,
                       "strategy": strategy, "masked": count / n_kmers, "tokens_per_s": run.speed}
                row |= run.mfu(model.flops_per_token(args.block_size, row["masked"]))
                run.log(row, validate)
            if run.to_save:
                run.save()
            run.end_step()

    if args.demo:
        say_what_it_learnt()
    training.finish()
