"""RandomMask: BERT on overlapping 6-mers whose masked spans grow in five phases (Liang et al., "Rethinking
the BERT-like Pretraining for DNA Sequences"). Longer spans hide more bases: the task does not become trivial.

    python randommask.py --demo                              two minutes on a laptop, no data needed
    python randommask.py --genome my.fa.gz                   one GPU, your own genome
    torchrun --nproc_per_node 8 randommask.py                the paper's run: hg38, 480,000 steps of 512
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 randommask.py \\
        --micro_batch_size 32                                two nodes: 16 micro-batches for 16 GPUs
    python randommask.py --mask dnabert                      baseline: six-token spans throughout
    python randommask.py --mask single --stride 6            baseline: non-overlapping 6-mers
    python randommask.py --mask dnabert --stride 2           in between (Fig 6): spans of three tokens
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))                # python -I leaves it out
import training                                              # first: it answers Ctrl-C in the slow imports
from training import file_name, number

import math

import torch

import data
import models

PAPER_STEPS = 480_000                                        # Algorithm 1
HG38 = 2_937_639_113                                         # A, C, G and T of its chr1-22, X and Y
STEPS = {"small": 100_000, "mini": 30_000, "tiny": 20_000}   # of --size; ours
WARMUP = 10_000                                              # DNABERT; of other totals 2 %
EDGES = (30_000, 60_000, 100_000, 150_000)                   # Algorithm 1: last steps of phases 1 to 4
MILESTONES = (1_000, 30_000, 300_000)                        # checkpoints of Figs 2, 3, 5, 7 and 8
MASK_RATE = 0.15                                             # section 5.1; / 6 = the P of Algorithm 1
BETAS, EPS = (0.9, 0.98), 1e-6                               # DNABERT's run_pretrain.py: the paper gives none
DEMO = dict(genome=["demo"], k=3, block_size=34, n_layer=2, n_head=4, n_embd=64, dropout=0.0, lr=3e-3,
            batch_size=64, micro_batch_size=32, steps=3600, out="out/demo", log_every=200, eval_every=1000)


def phase_edges(steps):
    """Returns the last steps of phases 1 to 4: Algorithm 1's, scaled by steps / 480,000."""
    return [round(edge * steps / PAPER_STEPS) for edge in EDGES]


def phase_at(step, edges):
    """Returns the phase, 1 to 5, of a step; an edge belongs to the phase it ends (Algorithm 1: S <= 30k)."""
    return 1 + sum(step > edge for edge in edges)


def paper_passes(k, stride):
    """Returns the passes over hg38 of 480,000 steps of 512 windows of 512 tokens; 6-mers at stride 1: 43."""
    return PAPER_STEPS * 512 * ((512 - 3) * stride + k) / HG38


def first_span(k, stride):
    """Returns the number of tokens that a span has at first: as many as can contain the same base."""
    return math.ceil(k / stride)


def paper_p(k, stride):
    """Returns Algorithm 1's P, 0.15 / 6; for other k and strides 0.15 / tokens of the first span."""
    return MASK_RATE / first_span(k, stride)


def random_mask(tokens, phase, p, span=6):
    """Draws the mask of Algorithm 1 for tokens (B, T): bool (B, T).

    Each sequence draws its span m from span, span + 2, ... (`phase` values). Every k-mer is a center with
    probability p and masks the tokens c - m/2 + 1 .. c + m/2. Phase 1 is DNABERT's masking.
    """
    at = data.draw_positions(tokens.shape, p, tokens.device)
    half = torch.randint(phase, (len(tokens),), device=tokens.device)          # m = span + 2 half
    return data.row_spans(at, tokens > data.MASK, (span - 1) // 2 + half, span // 2 + half)


def parse_args():
    parser, positive = training.new_parser(__doc__), number(int, 1)
    add = parser.add_argument_group("model").add_argument
    add("--k", type=number(int, 1, 9), default=6, help="k-mer length, 1 to 8 (%(default)s)")
    add("--stride", type=positive, default=1,
        help="bases from one k-mer to the next; k: non-overlapping (%(default)s)")
    add("--block_size", type=number(int, 3), default=512, help="tokens with [CLS] and [SEP] (%(default)s)")
    training.add_size_flag(add)
    add("--n_layer", type=positive, default=12, help="layers (%(default)s)")
    add("--n_head", type=positive, default=12, help="attention heads (%(default)s)")
    add("--n_embd", type=positive, default=768, help="width (%(default)s)")
    add("--dropout", type=number(float, 0, 1), default=0.1, help="dropout (%(default)s)")
    add("--init", type=file_name, help="start from these weights: a checkpoint, or hf:FOLDER")
    add = parser.add_argument_group("method").add_argument
    add("--mask", choices=("randommask", "dnabert", "single"), default="randommask",
        help="growing spans, DNABERT's spans, or single tokens (%(default)s)")
    add("--p", type=number(float, 1e-9, 1),
        help="probability that a token is the center of a span (0.15 / tokens of the first span)")
    add = training.add_optimization_flags(                   # the paper; decay: DNABERT
        parser, batch_size=512, micro_batch_size=64, lr=1e-4, warmup="about 2 %%", weight_decay=0.01)
    add("--steps", type=positive, help=f"steps; phase edges scale with it ({PAPER_STEPS}; as many passes "
        f"over another genome; --size: {', '.join(f'{size} {n}' for size, n in STEPS.items())})")
    training.add_run_flags(parser, "out/randommask", eval_windows=512, eval_every=5000,            # ours
                           keep="1/480, 30/480 and 300/480 of the steps")
    return training.parse_flags(parser, DEMO)


def complete_args(args, reached=None):
    """Fills in the defaults that depend on other flags. ValueError for flags that contradict each other.

    reached: bases in training windows of a genome that is not all of hg38; None until it is open.
    """
    if args.stride > args.k:
        raise ValueError(f"--stride {args.stride}: skips bases between the {args.k}-mers; use 1 to {args.k}")
    if args.mask == "single" and args.stride < args.k:
        raise ValueError(f"--stride {args.stride}: --mask single needs {args.k}; or use --mask dnabert")
    if args.p is None:
        args.p = paper_p(args.k, args.stride)
    if args.steps is None:
        if reached is None and (args.genome != ["hg38"] or args.bed) and args.size not in STEPS:
            return                                           # until the genome is open
        windows = (reached or 0) / ((args.block_size - 3) * args.stride + args.k)
        passes = paper_passes(args.k, args.stride)
        args.steps = math.ceil(passes * windows / args.batch_size) or STEPS.get(args.size, PAPER_STEPS)
    training.complete_warmup(args, WARMUP / PAPER_STEPS if args.steps == PAPER_STEPS else 0.02)
    if not args.keep:
        args.keep = [max(1, round(step * args.steps / PAPER_STEPS)) for step in MILESTONES]


def build_model(args):
    """Returns the network of the flags, started from --init where given."""
    config = models.BertConfig(4 ** args.k + 5, args.block_size, args.n_layer, args.n_head, args.n_embd,
                               4 * args.n_embd, args.dropout)
    training.seed(args.seed)
    model = models.Bert(config)
    if args.init and not args.resume:
        models.copy_weights(model, args.init, training.load)
    return model


def say_what_it_learnt(args, genome, loss):
    """Prints the demo's held-out loss beside what guessing gives, and the next commands."""
    (_, order0), (_, order3) = data.score_guesses(genome.bases[:10 ** 7], 3)
    verdict = ("has learnt the grammar of this DNA" if loss < order3 else
               "uses the neighbours, not yet all of the grammar" if loss < order0 else "has learnt little")
    print(f"""
What it learnt, in nats per masked token on held-out DNA ({args.k}-token spans: each hides one base)
  {math.log(4 ** args.k):.2f}  knowing nothing: any of the {4 ** args.k} {args.k}-mers
  {order0:.2f}  order-0 entropy: the neighbours give all but the hidden base, which is guessed
  {order3:.2f}  order-3 entropy: the hidden base is guessed from three bases on either side
  {loss:.2f}  this model {verdict}
Next: see what it is good for, finding a motif in DNA that it has not seen
  python finetune.py --demo
Or train on your own DNA, at a size for a laptop (ten minutes; --help lists every flag)
  python randommask.py --genome YOUR.fa.gz --out out/mine --block_size 22 --n_layer 2 --n_head 2 \\
      --n_embd 64 --dropout 0 --batch_size 256 --micro_batch_size 128 --lr 8e-3 --steps 3000""")


if __name__ == "__main__":
    with training.user_errors():
        args = parse_args()
        complete_args(args)
        run = training.Run(args, writes=not args.show_masks)
        device, length = run.device, (args.block_size - 3) * args.stride + args.k     # bases of a window
        genome = data.open_genome(args.genome, args.data_dir, args.cache, args.ambiguous, args.verify)
        genome.restrict(args.bed)
        repeats = genome.repeats(args.repeat_weight, device)
        train, val = (data.window_table(part, length) for part in genome.split(length, args.val_contigs))
        reached, lines = genome.reach(length, args.val_contigs)
        if args.steps is None:
            complete_args(args, reached)
            passes = paper_passes(args.k, args.stride)
            run.say(f"steps    {args.steps:,}: the paper's {passes:.0f} passes over this genome")
        bases, n_vocab = data.resident(genome.bases, device), 4 ** args.k + 5
        run.check_memory(build_model, args.block_size)       # of what the genome leaves
        model = build_model(args).to(device)
        optimizer = training.make_optimizer(model, args.lr, args.weight_decay, BETAS, EPS)
        parts = {"model": model, "optimizer": optimizer}

        span = first_span(args.k, args.stride)               # 1 for non-overlapping k-mers
        dnabert_p = paper_p(args.k, args.stride)
        edges = phase_edges(args.steps) if args.mask == "randommask" else []
        if run.writes:
            run.open("randommask", model.config, genome.fingerprint, parts)

    def get_batch(table, n, phase, *key):
        """Draws and masks n windows by the key alone: inputs, labels, weights (n, T; None: all 1).
        phase 0: DNABERT's masking, whatever --p."""
        starts = data.draw_starts(table, n, training.seed(args.seed, *key))
        windows, soft = data.to_device(data.take_windows(bases, starts, length), device), None # (n, length)
        if key[0]:                                           # of a step; evaluations: forward, unweighted
            soft = data.in_repeats(windows, starts, repeats)
            if args.strands == "both":
                windows, soft = data.either_strand(windows, soft)
        tokens = data.kmer_tokens(windows, args.k, args.stride, specials=True)
        weights = None if soft is None else data.token_weights(soft, args.k, args.stride, args.repeat_weight)
        masked = random_mask(tokens, max(phase, 1), args.p if phase else dnabert_p, span)
        return *data.corrupt(tokens, masked, n_vocab), weights

    if args.show_masks:
        for phase in range(1, len(edges) + 2):
            for n, labels in enumerate(get_batch(train, args.show_masks, phase, 0, 0)[1]):
                marks = "".join(".#"[label >= 0] for label in labels[1:-1])
                share = marks.count("#") / len(marks)
                run.say(f"phase {phase}, sequence {n}: {share:.1%} masked (#)\n{marks}")
        training.finish()

    n_tokens = args.batch_size * args.block_size             # of a step
    passes = args.steps * args.batch_size * length / reached
    run.describe(model, genome, passes, n_tokens)
    run.say(*lines, sep="\n")
    run.say(f"tokens   {n_tokens:,} a step, {n_tokens * args.steps:,} in all: {passes:.2g} passes over the "
            f"bases reached")
    run.say(f"phases   spans {', '.join(f'{span}..{span + 2 * i}' for i in range(len(edges) + 1))}; last "
            f"steps {', '.join(map(str, [*edges, args.steps]))} (Algorithm 1's, scaled to --steps)")

    net = training.wrap(model, args.compile, device, run.world)
    longest, capacity = span + 2 * len(edges), None
    if device.type == "cuda":                                # slots for masked tokens, all spans the longest
        per_pass = min(args.micro_batch_size, max(args.batch_size, args.eval_windows)) * args.block_size
        capacity = models.mask_capacity(per_pass, 1 - (1 - max(args.p, dnabert_p)) ** longest, longest)

    def forward(network, table, n, phase, *key):
        """Returns three sums over a micro-batch of n sequences: losses, weights, masked tokens."""
        inputs, labels, weights = get_batch(table, n, phase, *key)
        with training.autocast(device, args.dtype):
            loss_sum, weight = network(inputs, labels, capacity=capacity, weights=weights)
        return loss_sum, weight, weight if weights is None else (labels != -100).sum()

    @torch.no_grad()
    def evaluate(phase):
        """Returns the mean loss under the masks of a phase, on the same windows and masks each time; the
        ranks share them."""
        model.eval()
        total = torch.zeros(3, dtype=torch.float64, device=device)
        for i, n in run.eval_batches():
            total += torch.stack(forward(model, val, n, phase, 0, i))          # key 0: steps count from 1
        model.train()
        loss_sum, count, _ = run.sum_evaluation(total).tolist()
        return loss_sum / max(count, 1)

    def validate(step):
        """Returns the losses under the masks of this phase, under DNABERT's (comparable) and, at an edge,
        under those of the next phase."""
        phase = phase_at(step, edges)
        row = {"val_loss": evaluate(phase)}
        if args.mask != "single":
            same = (phase, args.p) == (1, dnabert_p)
            row[f"val_loss_span{span}"] = row["val_loss"] if same else evaluate(0)
        return row | ({"val_loss_next_phase": evaluate(phase_at(step + 1, edges))} if step in edges else {})

    with training.user_errors(OSError, MemoryError, torch.OutOfMemoryError):
        for step in run.steps(validate):
            phase, lr = phase_at(step, edges), args.lr * training.linear(step, args.steps, args.warmup)
            sums = run.new_sums(3)                           # loss, weights, masked tokens
            for i, n in run.micro_batches(args.batch_size):
                with run.sync_at_last(net, i):
                    loss_sum, weight, count = forward(net, train, n, phase, step, i)
                    run.scaler.scale(loss_sum).backward()
                sums += torch.stack([loss_sum.detach(), weight, count])
            run.sum_over_ranks()
            run.scaler.unscale_(optimizer)
            # from DDP's average over ranks of sums to the mean over all masked tokens of the batch
            norm = training.scale_gradients(model, run.world / sums[1].clamp(min=1e-9), args.grad_clip)
            run.update(optimizer, lr, norm)

            run.read(also_evaluate=step in edges)
            if run.to_log:
                loss_sum, weight, count = run.sums
                masked = count / (args.batch_size * (args.block_size - 2))
                row = {"loss": loss_sum / (weight or 1), "lr": lr, "grad_norm": run.norm, "phase": phase,
                       "masked": masked, "tokens_per_s": run.speed}
                row |= run.mfu(model.flops_per_token(args.block_size, masked))
                run.log(row, validate)
            if run.to_save:
                run.save()
            run.end_step()

    if args.demo and args.mask != "single" and args.stride == 1:                # then a span hides one base
        loss = evaluate(0)                                   # on all ranks
        if run.rank == 0:
            say_what_it_learnt(args, genome, loss)
    training.finish()
