"""RandomMask: BERT on overlapping 6-mers, masked in spans that grow in five phases (Liang et al., "Rethinking
the BERT-like Pretraining for DNA Sequences"). Longer spans hide more bases, so that the task stays a task.

    python randommask.py --demo                              two minutes on a laptop, no data needed
    python randommask.py --genome my.fa.gz                   one GPU, your own genome
    torchrun --nproc_per_node 8 randommask.py                the paper's run: hg38, 480,000 steps of 512
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 randommask.py \\
        --micro_batch_size 32                                two nodes: 16 micro-batches for 16 GPUs
    python randommask.py --mask dnabert                      baseline: six-token spans throughout
    python randommask.py --mask single --stride 6            baseline: non-overlapping 6-mers
"""
import argparse
import contextlib
import dataclasses
import math
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

import data
import models
import training
from training import number

PAPER_STEPS = 480_000                                        # Algorithm 1
EDGES = (30_000, 60_000, 100_000, 150_000)                   # Algorithm 1: last steps of phases 1 to 4
MILESTONES = (1_000, 30_000, 300_000)                        # checkpoints behind Figs 2, 3, 6, 7
MASK_RATE = 0.15                                             # section 5.1; / 6 = the P of Algorithm 1
BETAS, EPS = (0.9, 0.98), 1e-6                               # DNABERT's run_pretrain.py: the paper gives none
DEMO = dict(genome=["demo"], k=3, block_size=34, n_layer=2, n_head=4, n_embd=64, dropout=0.0, lr=3e-3,
            batch_size=64, micro_batch_size=32, steps=3600, out="out/demo", log_every=200, eval_every=1000)


def phase_edges(steps):
    """The last steps of phases 1 to 4 in a run of `steps`: Algorithm 1's, scaled by steps / 480,000."""
    return [round(edge * steps / PAPER_STEPS) for edge in EDGES]


def phase_at(step, edges):
    """Phase of step 1..: 1 to 5; an edge belongs to the phase it ends (Algorithm 1: S <= 30k)."""
    return 1 + sum(step > edge for edge in edges)


def random_mask(tokens, phase, p, span=6):
    """Algorithm 1: tokens (B, T) -> masked bool (B, T).

    Each sequence draws its span m from span, span + 2, ... (`phase` of them); every k-mer is a center with
    probability p and hides tokens c - m/2 + 1 .. c + m/2. Phase 1 is DNABERT's masking; span 1 masks tokens.
    """
    centers = data.draw_centers(tokens.shape, p, tokens.device)
    half = torch.randint(phase, (len(tokens),), device=tokens.device)          # m = span + 2 half
    return data.span_mask(centers, tokens > data.MASK, (span - 1) // 2 + half, span // 2 + half)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, positive = parser.add_argument, number(int, 1)
    add("--genome", nargs="+", default=["hg38"], help="FASTA files (plain or gzip), or hg38, or demo (hg38)")
    add("--data_dir", default="data", help="where hg38.fa.gz lies (%(default)s)")
    add("--cache", help="folder of the packed genome (beside the FASTA)")
    add("--val_contigs", type=lambda text: text.split(","), default=[],
        help="held-out contigs, comma-separated (the last 1 %% of each contig)")
    add("--k", type=number(int, 1, 9), default=6, help="k-mer length, 1 to 8 (%(default)s)")
    add("--stride", type=positive, default=1, help="1: overlapping k-mers; k: non-overlapping (%(default)s)")
    add("--block_size", type=number(int, 3), default=512, help="tokens with [CLS] and [SEP] (%(default)s)")
    add("--n_layer", type=positive, default=12, help="layers (%(default)s)")
    add("--n_head", type=positive, default=12, help="attention heads (%(default)s)")
    add("--n_embd", type=positive, default=768, help="width (%(default)s)")
    add("--dropout", type=number(float, 0, 1), default=0.1, help="(%(default)s)")
    add("--init", help="start from these weights: a checkpoint, or hf:FOLDER")
    add("--mask", choices=("randommask", "dnabert", "single"), default="randommask", help="(%(default)s)")
    add("--p", type=number(float, 1e-9, 1), help="probability of a center (0.15 / k; single: 0.15)")
    add("--batch_size", type=positive, default=512, help="sequences of a step, over all GPUs (%(default)s)")
    add("--micro_batch_size", type=positive, default=64, help="sequences of a forward pass (%(default)s)")
    add("--steps", type=positive, default=PAPER_STEPS, help="steps; the phases scale along (%(default)s)")
    add("--lr", type=number(float, 1e-30), default=1e-4, help="peak learning rate (%(default)s)")
    add("--warmup", type=number(int, 0), help="steps of linear warm-up (2 %% of the steps)")
    add("--weight_decay", type=number(float, 0), default=0.01, help="(%(default)s)")
    add("--grad_clip", type=number(float, 1e-30), default=1.0, help="largest gradient norm (%(default)s)")
    add("--out", default="out/randommask", help="run folder (%(default)s)")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--keep", type=positive, nargs="+", help="steps whose checkpoint stays (1/480, 30/480, 300/480)")
    add("--log_every", type=positive, default=100, help="steps (%(default)s)")
    add("--eval_every", type=positive, default=5000, help="steps (%(default)s)")
    add("--eval_windows", type=positive, default=512, help="fixed validation windows (%(default)s)")
    add("--save_every", type=positive, default=1000, help="steps (%(default)s)")
    add("--seed", type=number(int, 0, 2 ** 63), default=42, help="(%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on CUDA")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (on CUDA)")
    add("--show_masks", type=positive, metavar="N", help="print what is masked in N sequences, and stop")
    add("--demo", action="store_true", help="a tiny model on a synthetic genome")
    if parser.parse_args().demo:
        parser.set_defaults(**DEMO)
    return parser.parse_args()


def complete_args(args):
    """Fills in the defaults that depend on other flags. ValueError for flags that contradict each other."""
    single = args.mask == "single"
    if args.stride != (args.k if single else 1):
        raise ValueError(f"--stride {args.stride}: --mask {args.mask} needs {args.k if single else 1}")
    if args.p is None:
        args.p = MASK_RATE if single else MASK_RATE / args.k
    if args.warmup is None:
        args.warmup = round(0.02 * args.steps)               # DNABERT: 10,000 of 500,000
    training.check_flags(args)
    if args.keep is None:
        args.keep = [max(1, round(step * args.steps / PAPER_STEPS)) for step in MILESTONES]


def build_model(args):
    """The network of the flags, started from --init where given: a checkpoint of ours, or hf:FOLDER."""
    config = models.BertConfig(4 ** args.k + 5, args.block_size, args.n_layer, args.n_head, args.n_embd,
                               4 * args.n_embd, args.dropout)
    training.seed(args.seed)
    model = models.Bert(config)
    if args.init:
        models.copy_weights(model, args.init, training.load)
    return model


if __name__ == "__main__":
    with training.user_errors():
        args = parse_args()
        complete_args(args)
        if not args.show_masks:
            training.check_out(args.out, args.resume)
        device, args.dtype, rank, world = training.set_up(args.device, args.dtype)
        if args.demo:
            torch.set_num_threads(1)                         # so small a model gains nothing from more
        say = print if rank == 0 else lambda *_, **__: None
        n_micro = training.count_micro_batches(args.batch_size, args.micro_batch_size, world)
        model = build_model(args).to(device)
        optimizer = training.make_optimizer(model, args.lr, args.weight_decay, BETAS, EPS)

        single = args.mask == "single"
        span = 1 if single else args.k
        edges = phase_edges(args.steps) if args.mask == "randommask" else []
        length = (args.block_size - 3) * args.stride + args.k                  # bases of a window
        genome = data.open_genome(args.genome, args.data_dir, args.cache)
        train, val = (data.window_table(part, length) for part in genome.split(length, args.val_contigs))
        bases, n_vocab = data.resident(genome.bases, device), 4 ** args.k + 5

        run = {"method": "randommask", "config": dataclasses.asdict(model.config), "data": genome.fingerprint,
               "args": vars(args)}
        start = 0
        if args.resume:
            start = training.load_run(args.out, run, model=model, optimizer=optimizer)["step"]
        if rank == 0 and not args.show_masks:
            lock = training.open_run(args.out, args, start)

    def get_batch(table, n, phase, *key):
        """n windows and their masks, a function of the key alone: inputs, labels (n, T)."""
        starts = data.draw_starts(table, n, training.seed(args.seed, *key))
        windows = data.take_windows(bases, starts, length).to(device)          # (n, length)
        tokens = data.kmer_tokens(windows, args.k, args.stride, specials=True)
        return data.corrupt(tokens, random_mask(tokens, phase, args.p, span), n_vocab)

    if args.show_masks:
        for phase in range(1, len(edges) + 2):
            for n, labels in enumerate(get_batch(train, args.show_masks, phase, 0, 0)[1]):
                marks = "".join(".#"[label >= 0] for label in labels[1:-1])
                say(f"phase {phase}, sequence {n}: {marks.count('#') / len(marks):.1%} masked (#)\n{marks}")
        training.finish()

    # what this run is
    tokens_per_step = args.batch_size * args.block_size
    passes = args.steps * args.batch_size * length / int(np.diff(genome.intervals).sum())
    n_params = sum(p.numel() for p in model.parameters())
    say(f"model    {n_params:,} parameters, {args.dtype}, {world} x {device.type}, {n_micro} micro-batches a "
        f"step{' in uneven shares' if n_micro % world else ''}")
    say(f"genome   {' '.join(args.genome)}: {genome}")
    say(f"tokens   {tokens_per_step:,} a step, {tokens_per_step * args.steps:,} in all: "
        f"{passes:.2g} passes over the genome")
    scaled = f" (Algorithm 1's x {args.steps} / {PAPER_STEPS})" if edges and args.steps != PAPER_STEPS else ""
    say(f"phases   spans {', '.join(f'{span}..{span + 2 * i}' for i in range(len(edges) + 1))}; last steps "
        f"{', '.join(map(str, [*edges, args.steps]))}{scaled}")
    if start:
        say(f"resume   after step {start}")

    net = training.wrap(model, args.compile, device, world)
    longest, capacity = span + 2 * len(edges), None
    if device.type == "cuda":                                # slots for masked tokens, all spans the longest
        n_tokens = min(args.micro_batch_size, max(args.batch_size, args.eval_windows)) * args.block_size
        capacity = models.mask_capacity(n_tokens, 1 - (1 - args.p) ** longest, longest)

    def forward(network, table, i, size, phase, key):
        """(loss sum, count) of micro-batch i of `size` sequences in all."""
        n = min(args.micro_batch_size, size - i * args.micro_batch_size)
        inputs, labels = get_batch(table, n, phase, key, i)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            return network(inputs, labels, capacity=capacity)

    @torch.no_grad()
    def evaluate(phase):
        """Mean loss under the masks of `phase`: the same windows and masks each time, shared by the ranks."""
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for i in range(rank, math.ceil(args.eval_windows / args.micro_batch_size), world):
            total += torch.stack(forward(model, val, i, args.eval_windows, phase, 0))     # steps count from 1
        model.train()
        loss_sum, count = training.all_reduce(total).tolist()
        return loss_sum / max(count, 1)

    def validate(step, phase):
        """Loss under this phase's masks, under DNABERT's (comparable), at an edge under the next phase's."""
        row = {"val_loss": evaluate(phase)}
        if not single:
            row[f"val_loss_span{args.k}"] = evaluate(1) if phase > 1 else row["val_loss"]
        return row | ({"val_loss_next_phase": evaluate(phase + 1)} if step in edges else {})

    unread, clock, timed = [], time.perf_counter(), start    # unread: numbers the host has not looked at yet
    training.catch_signals()
    with training.user_errors(OSError, torch.OutOfMemoryError):
        for step in tqdm(range(start + 1, args.steps + 1), initial=start, total=args.steps, unit="step",
                         disable=rank > 0 or not sys.stderr.isatty()):
            phase, lr = phase_at(step, edges), args.lr * training.linear(step, args.steps, args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            numbers = torch.zeros(4, dtype=torch.float64, device=device)       # loss sum, count, stop, norm
            for i in range(rank, n_micro, world):
                with net.no_sync() if world > 1 and i + world < n_micro else contextlib.nullcontext():
                    loss_sum, count = forward(net, train, i, args.batch_size, phase, step)
                    loss_sum.backward()
                numbers[:2] += torch.stack([loss_sum.detach(), count])
            numbers[2].fill_(training.stop_requested())      # numbers[2] = ... would make a GPU wait
            training.all_reduce(numbers)                     # 32 bytes; gradients went with the last backward
            # from DDP's average over ranks of sums to the mean over all masked tokens of the batch
            numbers[3] = training.scale_gradients(model, world / numbers[1].clamp(min=1), args.grad_clip)
            optimizer.found_inf = 1 - numbers.isfinite().all().float()         # 1: AdamW changes nothing
            optimizer.step()
            optimizer.zero_grad()

            # the host reads these numbers while the device works on the next step, or now where they are due
            last, at_edge = step == args.steps, step in edges
            to_eval = step % args.eval_every == 0 or at_edge or last
            to_save = step % args.save_every == 0 or step in args.keep or last
            to_log = step % args.log_every == 0 or to_eval
            unread.append(training.read_later(numbers))
            stop = False
            timing = step in (start + 5, start + 20)         # the first steps compile and warm up
            while unread and (len(unread) > (device.type == "cuda") or to_log or to_save or stop or timing):
                loss_sum, count, stop, norm = unread.pop(0)()
                training.check_finite(step - len(unread), [loss_sum], norm, args.out, rank)
            speed = (step - timed) * tokens_per_step / (time.perf_counter() - clock)
            if step == start + 20:
                say(f"speed    {speed:,.0f} tokens/s, {training.memory(device)}, "
                    f"{(args.steps - step) * tokens_per_step / speed / 3600:.2g} h left")
            if to_log or stop:
                row = {"step": step, "loss": loss_sum / max(count, 1), "lr": lr, "grad_norm": norm,
                       "phase": phase, "masked": count / (args.batch_size * (args.block_size - 2)),
                       "tokens_per_s": speed}
                if training.peak_flops(device):
                    flops = model.flops_per_token(args.block_size, row["masked"])
                    row["mfu"] = speed * flops / world / training.peak_flops(device)
                row |= validate(step, phase) if to_eval else {}
                if rank == 0:
                    training.log(args.out, row)
            if (to_save or stop) and rank == 0:
                state = run | {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
                training.save(state, args.out, f"step_{step}.pt" if step in args.keep else None)
            if stop:
                say(f"stopped  by a signal after step {step}; continue with --resume")
                training.finish(143)
            if to_log or to_save or step == start + 5:
                clock, timed = time.perf_counter(), step

    say(f"done     {args.steps} steps; checkpoint {args.out}/last.pt, log {args.out}/log.jsonl")
    if args.demo and not single:
        order0, order3 = data.base_entropies(genome.bases[:10 ** 7])
        loss = evaluate(1)
        verdict = "has learnt the grammar of this DNA" if loss < order3 else \
            "uses the neighbours, not yet all of the grammar" if loss < order0 else "has learnt little"
        say(f"""
What it learnt, in nats per masked token on held-out DNA ({args.k}-token spans: each hides one base):
  {math.log(4 ** args.k):.2f}  knowing nothing: any of the {4 ** args.k} {args.k}-mers
  {order0:.2f}  order-0 entropy: all but the hidden base read off the neighbours, that one guessed
  {order3:.2f}  order-3 entropy: the hidden base guessed from three bases on either side
  {loss:.2f}  this model {verdict}
Next, what this is good for: find a motif in DNA that it has not seen
  python finetune.py --demo
Or your own DNA, at a size for a laptop (ten minutes; --help has the rest):
  python randommask.py --genome YOUR.fa.gz --out out/mine --block_size 22 --n_layer 2 --n_head 2 \\
      --n_embd 64 --dropout 0 --batch_size 256 --micro_batch_size 128 --lr 8e-3 --steps 3000""")
    training.finish()
