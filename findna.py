"""FinDNA: a student sees DNA with edits and masked bases; a teacher, the student's moving average, sees the
same DNA with noise, half of the time from the other strand. The student predicts the masked bases and the
teacher's outputs for the whole sequence (Yu et al., "Self-Distillation Improves DNA Sequence Inference").

    python findna.py --demo                                  two minutes on a laptop, no data needed
    python findna.py --genome my.fa.gz                       one GPU, your own genome
    torchrun --nproc_per_node 8 findna.py                    the paper's run: 50 epochs of 100,000 windows
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 findna.py
    python findna.py --objective mnm                         ablation CM-MNM: masked bases only, no teacher
    python findna.py --backbone transformer                  ablation FinDNA-T
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))                # python -I leaves it out
import training                                              # first: it answers Ctrl-C in the slow imports
from training import file_name, number, share

import argparse
import copy
import functools
import math

import numpy as np
import torch
import torch.nn.functional as F

import data
import models

MASK_RATE = 0.3                                              # this and what follows: sections 3.1 to 3.4, 4.1
N_CLS = 10                                                   # K, blank tokens after the bases
TEMP_STUDENT, TEMP_TEACHER = 0.1, 0.04                       # Eqs 4, 5
CENTER_MOMENTUM, EMA = 0.996, 0.996                          # beta; lambda, which rises to 1
EDIT, NOISE, FLIP = 20, 0.2, 0.5                             # EvoAug's; the paper's; the released code's
VIEWS = "MDIT+NR"                                            # of student + teacher: the method, Table 4
PLAIN = "M+none"                                             # masked but not edited, for validation
BETAS, EPS = (0.9, 0.999), 1e-8                              # AdamW's own: the paper gives none
COLLAPSED = 0.01                                             # collapse threshold on q_information (nats)
# The released code's choices that flags can express; docs/findna.md lists the rest
RELEASED = dict(views="MNR+T", center_momentum=0.9, epochs=30)
DEMO = dict(genome=["demo"], length=118, windows=9600, n_layer=1, track_size=8, hidden=64,
            lr=1e-2, micro_batch_size=32, epochs=4, out="out/demo_findna", log_every=50, eval_every=200)


def delete(bases, length, start, filler):
    """Deletes bases start .. start + length - 1 of each row of (B, L); length, start (B,).

    filler (B, 2 * EDIT): bases that make up for them, length // 2 at the front and the rest at the end.
    """
    at = torch.arange(bases.shape[1], device=bases.device) + (EDIT - length // 2)[:, None]      # (B, L)
    at = at + length[:, None] * (at >= EDIT + start[:, None])
    return torch.cat([filler[:, :EDIT], bases, filler[:, EDIT:]], 1).gather(1, at)


def insert(bases, length, start, filler):
    """Inserts filler[:length] before base `start` of each row; what goes beyond L is cut off at the end."""
    at = torch.arange(bases.shape[1], device=bases.device)
    inside = at - start[:, None]                             # position in what is inserted
    source = torch.where(inside < length[:, None], bases.shape[1] + inside, at - length[:, None])
    return torch.cat([bases, filler], 1).gather(1, torch.where(inside < 0, at, source))


def translocate(bases, shift):
    """Rolls each row to the right by shift (B,): its end comes to the front."""
    at = torch.arange(bases.shape[1], device=bases.device) - shift[:, None]
    return bases.gather(1, at % bases.shape[1])


def augment(bases, letters, reach):
    """Applies the edits in `letters` (D, I, T), drawn anew for each row; reach: the largest shift of T."""
    (B, L), device = bases.shape, bases.device
    filler = torch.randint(4, (B, 3 * EDIT), dtype=torch.uint8, device=device)
    if "D" in letters:
        length = torch.randint(EDIT + 1, (B,), device=device)
        start = (torch.rand(B, device=device) * (L - length + 1)).long()
        bases = delete(bases, length, start, filler[:, :2 * EDIT])
    if "I" in letters:
        length, start = (torch.randint(n, (B,), device=device) for n in (EDIT + 1, L))
        bases = insert(bases, length, start, filler[:, 2 * EDIT:])
    if "T" in letters:
        bases = translocate(bases, torch.randint(-reach, reach + 1, (B,), device=device))
    return bases


def draw_masked(shape, device, mask_rate=MASK_RATE):
    """Draws exactly round(mask_rate x L) positions of each row: bool (B, L)."""
    chosen = torch.rand(shape, device=device).topk(round(mask_rate * shape[1]), sorted=False).indices
    return torch.zeros(shape, dtype=torch.bool, device=device).scatter_(1, chosen, True)


def other_strand(one_hot):
    """Returns the reverse complement of one-hot floats (B, L, 5); channel N stays in its place."""
    return torch.cat([one_hot[..., :4].flip(1, 2), one_hot[..., 4:].flip(1)], -1)


def make_view(bases, letters, reach, noise, flip):
    """Edits base codes (B, L), adds noise, flips strands; returns the view with, without noise (SOFT: -1)."""
    clean = data.one_hot(augment(bases, letters, reach))
    view = clean.abs() + noise * torch.randn_like(clean) if "N" in letters else clean.abs()
    if "R" in letters:
        flipped = torch.rand(len(bases), 1, 1, device=bases.device) < flip
        view, clean = (torch.where(flipped, other_strand(x), x) for x in (view, clean))
    return view, clean


def make_views(bases, views, reach, mask_rate=MASK_RATE, noise=NOISE, flip=FLIP):
    """Makes the two views of base codes (B, L): view_u, target, view_v, one-hot floats (B, L, 5).

    view_u (student) has zeros where a base is masked; target has these bases and zeros elsewhere.
    views: STUDENT+TEACHER, each some of M D I T N R (mask, the edits, noise, reverse complement), or none.
    """
    letters_u, letters_v = views.split("+")
    view_u, clean = make_view(bases, letters_u, reach, noise, flip)
    masked = draw_masked(bases.shape, bases.device, mask_rate)[..., None]
    view_v, _ = make_view(bases, letters_v, reach, noise, flip)
    if "M" in letters_v:
        view_v = view_v.masked_fill(draw_masked(bases.shape, bases.device, mask_rate)[..., None], 0)
    return view_u.masked_fill(masked, 0), clean.masked_fill(~masked, 0), view_v


def view_pair(text):
    """Parses STUDENT+TEACHER, views of make_views, of which the student's needs M: an argparse type."""
    student, _, teacher = text.partition("+")
    sound = [letters == "none" or set(letters) <= set("MDITNR") and 0 < len(letters) == len(set(letters))
             for letters in (student, teacher)]
    if not all(sound) or "M" not in student:
        raise argparse.ArgumentTypeError(f"{text!r}: give STUDENT+TEACHER, each some of M D I T N R or none; "
                                         f"the student needs M, as {VIEWS}")
    return text


def dissimilarity(view_u, view_v):
    """Returns Eq. 10 per position: the KL divergence between the softmax of the two views' rows."""
    log_u, log_v = view_u.log_softmax(-1), view_v.log_softmax(-1)
    return (log_u.exp() * (log_u - log_v)).sum(-1).mean()


def mnm_loss(logits, target):
    """Returns Eq. 2 over sequences: the sum of the cross-entropies at the masked bases of target."""
    return -(logits.float().log_softmax(-1) * target).sum()


def teacher_outputs(outputs, center, dim, temp=TEMP_TEACHER):
    """Returns q: the teacher's [CLS] (B, K, C), centered and sharpened (Eq. 5)."""
    return ((outputs.float() - center) / temp).softmax(dim)


def cl_loss(outputs, q, dim, temp=TEMP_STUDENT):
    """Returns Eq. 7 over sequences: the sum of cross-entropies of the student's [CLS] (B, K, C) with q."""
    return -(q * (outputs.float() / temp).log_softmax(dim)).sum()


def ema_at(step, steps, ema=EMA):
    """Returns lambda at step 1..steps: half a cosine from `ema` towards 1."""
    return 1 - (1 - ema) * (1 + math.cos(math.pi * (step - 1) / steps)) / 2


def initial_share(step, steps, ema):
    """Returns the share of the initial weights that is left in the teacher after `step` of `steps` steps."""
    return math.prod(ema_at(i, steps, ema) for i in range(1, step + 1))


def teacher_sums(outputs, q, dim):
    """Returns the sums over sequences (1 + 2 K C,) of the teacher's [CLS] and their q for `collapse`."""
    return torch.cat([torch.special.entr(q).sum(dim).mean(1).sum()[None], q.sum(0).flatten(),
                      F.normalize(outputs.float(), dim=-1).sum(0).flatten()])


def collapse(sums, n, shape, dim):
    """Turns the teacher_sums of n sequences into numbers that show whether it still tells sequences apart.

    q_information, the entropy of the mean q minus the mean entropy of q, is 0 if all q are equal, flat or
    peaked. cls_cos is the mean cosine between the [CLS] of two sequences.
    """
    entropy, (mean_q, units) = sums[0].item() / n, sums[1:].view(2, *shape)
    of_mean = torch.special.entr(mean_q / n).sum(dim - 1).mean().item()
    cos = (units.square().sum(1).mean().item() - n) / max(n * (n - 1), 1)
    return {"q_entropy": entropy, "mean_q_entropy": of_mean, "q_information": of_mean - entropy,
            "cls_cos": cos}


def guesses(bases, n=100, length=100_000):
    """Returns data.score_guesses from a base's two neighbours; of a large genome in n stretches over it."""
    if len(bases) <= n * length:
        n, length = 1, len(bases)
    starts = np.linspace(0, len(bases) - length, n).astype(int)
    return data.score_guesses(np.stack([bases[start:start + length] for start in starts]), 1)


@functools.lru_cache(2)
def shuffled(n, seed, epoch):
    return np.random.default_rng((seed, epoch, 1, 1)).permutation(n)           # 4 numbers: never a step's key


def pass_over(windows, seed, first, n):
    """Returns windows first .. first + n - 1 of repeated passes over all windows (N,), each pass shuffled."""
    epochs, at = np.divmod(np.arange(first, first + n), len(windows))
    return np.concatenate([windows[shuffled(len(windows), seed, int(epoch))[at[epochs == epoch]]]
                           for epoch in np.unique(epochs)])


def idle(args):
    """Returns the names of the flags that do nothing beside the others."""
    teacher = ["cl_softmax", "cl_space", "temp_student", "temp_teacher", "ema", "center_momentum"]
    sizes = {"chordmixer": ["track_size", "hidden"], "transformer": ["n_head", "n_embd"]}
    others = {"noise": "N", "flip": "R", "translocation": "T"}
    return [*(["alpha"] if args.objective != "both" else []), *(teacher if args.objective == "mnm" else []),
            *(name for name, letter in others.items() if letter not in args.views),
            *sizes["transformer" if args.backbone == "chordmixer" else "chordmixer"],
            *(["epochs"] if args.steps else [])]


def parse_args():
    parser, positive = training.new_parser(__doc__, strands=False), number(int, 1)      # but R in --views
    positive_float = number(float, 1e-9)
    add = parser.add_argument_group("model").add_argument    # length: the paper; sizes: its code
    add("--length", type=number(int, EDIT + 1), default=1000, help="bases of a window (%(default)s)")
    add("--backbone", choices=("chordmixer", "transformer"), default="chordmixer",
        help="network (%(default)s)")
    add("--n_layer", type=positive, default=4, help="layers (%(default)s)")
    add("--track_size", type=positive, default=28, help="chordmixer: channels of a track (%(default)s)")
    add("--hidden", type=positive, default=512, help="chordmixer: width of its MLPs (%(default)s)")
    add("--n_head", type=positive, default=8, help="transformer: attention heads (%(default)s)")   # ours
    add("--n_embd", type=positive, default=320, help="transformer: width (%(default)s)")            # ours
    add("--dropout", type=number(float, 0, 1), default=0.0, help="dropout (%(default)s)")
    add("--init", type=file_name, help="start from these weights: a checkpoint, or findna:FILE")
    add = parser.add_argument_group("method").add_argument
    add("--preset", choices=("released",), help="views, center momentum, epochs of the released code")
    add("--windows", type=number(int, 1, 10 ** 9), default=100_000, help="windows of an epoch (%(default)s)")
    add("--fresh_windows", action="store_true", help="draw new windows at each step, not one set for all")
    add("--objective", choices=("both", "mnm", "cl"), default="both",
        help="both losses, mnm: masked bases only, cl: contrastive only (%(default)s)")
    add("--alpha", type=number(float, 1e-9, 1), default=0.5,
        help="weight of the masked-base loss; 1 - alpha weighs the contrastive loss (%(default)s)")
    add("--cl_softmax", choices=("features", "tokens"), default="features", help="softmax axis (%(default)s)")
    add("--cl_space", choices=("latent", "projected"), default="projected",
        help="[CLS] outputs before or after the projection to bases (%(default)s)")
    add("--temp_student", type=positive_float, default=TEMP_STUDENT,
        help="tau: temperature of the student's softmax (%(default)s)")
    add("--temp_teacher", type=positive_float, default=TEMP_TEACHER,
        help="tau: temperature of the teacher's softmax (%(default)s)")
    add("--ema", type=share, default=EMA, help="teacher's lambda at the start; rises to 1 (%(default)s)")
    add("--center_momentum", type=share, default=CENTER_MOMENTUM,
        help="beta: share of itself that the teacher's center keeps in a step (%(default)s)")
    add("--n_cls", type=positive, default=N_CLS, help="blank [CLS] tokens after the bases (%(default)s)")
    add("--views", type=view_pair, default=VIEWS, metavar="STUDENT+TEACHER",
        help="Mask, Delete, Insert, Translocate, Noise, Reverse complement, none (%(default)s)")
    add("--mask_rate", type=number(float, 1e-9, 1), default=MASK_RATE,
        help="share of masked bases (%(default)s)")
    add("--noise", type=number(float, 0), default=NOISE, help="standard deviation of the noise (%(default)s)")
    add("--flip", type=share, default=FLIP, help="probability of the other strand (%(default)s)")
    add("--translocation", type=number(int, 0), default=EDIT, metavar="SHIFT",
        help="largest shift of a translocation; --length: any breakpoint (%(default)s)")
    add = training.add_optimization_flags(                   # warm-up, epochs: paper; clip: ours; else: code
        parser, batch_size=64, micro_batch_size=None, lr=3e-4, warmup="30 %%", weight_decay=3e-4)
    add("--epochs", type=positive, default=50, help="passes over the windows (%(default)s)")
    add("--steps", type=positive, help="steps, instead of --epochs")
    training.add_run_flags(parser, "out/findna", eval_windows=512, eval_every=2000)                # ours
    if parser.parse_args().preset:
        parser.set_defaults(**RELEASED)
    return training.parse_flags(parser, DEMO, idle)


def complete_args(args):
    """Fills in the defaults that depend on other flags. ValueError for flags that contradict each other."""
    if args.steps is None:
        args.steps = math.ceil(args.epochs * args.windows / args.batch_size)
    if not 0 < round(args.mask_rate * args.length) < args.length:
        raise ValueError(f"--mask_rate {args.mask_rate}: masks none or all of {args.length} bases; change it")
    training.complete_warmup(args, 0.3)                      # the paper's
    if args.micro_batch_size is None:                        # a resumed run keeps its own: draws depend on it
        each, gpu = args.batch_size // training.read_ranks()[1], torch.cuda.is_available()
        args.micro_batch_size = min(64, max(each, 1)) if gpu and args.device != "cpu" else 8


def build_model(args):
    """Returns the network of the flags, started from --init where given: the student of a checkpoint."""
    training.seed(args.seed)
    size = args.length + args.n_cls, args.n_layer
    if args.backbone == "chordmixer":
        config = models.ChordMixerConfig(*size, args.track_size, args.hidden, args.dropout)
        model = models.BaseModel(models.ChordMixer(config))
    else:
        config = models.EncoderConfig(*size, args.n_head, args.n_embd, args.dropout)
        model = models.BaseModel(models.Encoder(config))
    if args.init and not args.resume:
        models.copy_weights(model, args.init, training.load)
    return model


def show_views(views, say):
    """Prints for each sequence the student's view, with and without its masked bases, and the teacher's."""
    for n, (view_u, target, view_v) in enumerate(zip(*views)):
        masked = target.any(-1)
        say(f"sequence {n}, {masked.float().mean():.1%} masked (.): student unmasked, student, teacher")
        for view in (view_u + target, view_u, view_v):       # of a noisy view the likeliest bases
            shown = torch.where(masked & (view is view_u), 5, view.argmax(-1))
            say("".join("ACGTN."[i] for i in shown))


def say_what_it_learnt(args, row, guessed):
    """Prints the demo's accuracy on held-out DNA beside that of `guesses`, and the next commands."""
    (constant, order0), (flanked, flanked_nats) = guessed
    acc, loss = row["val_acc"], row["val_mnm_loss"]
    verdict = ("has learnt more of this DNA's grammar than two neighbours tell" if acc > flanked else
               "has learnt some of this DNA's grammar" if acc > constant else "has learnt little")
    teacher = "tells sequences apart" if row["q_information"] > COLLAPSED else "has collapsed"
    print(f"""
What it learnt: the share of masked bases of held-out DNA that are guessed right (and nats per base)
  25.0 %  (1.386)  knowing nothing
  {100 * constant:.1f} %  ({order0:.3f})  always the most frequent base
  {100 * flanked:.1f} %  ({flanked_nats:.3f})  from its two neighbours, if these were never masked
  {100 * acc:.1f} %  ({loss:.3f})  this model {verdict}
The teacher {teacher}: its outputs carry {row["q_information"]:.2f} nats about which sequence they belong to
Next: see what it is good for, by a probe or fine-tuning from these weights and from random ones
  python finetune.py --csv YOUR.csv --init {args.out}/last.pt random:{args.out}/last.pt kmer \\
      --lr 1e-2 --epochs 20
Or train on your own DNA, at a size for a laptop (--help lists every flag)
  python findna.py --genome YOUR.fa.gz --out out/mine --length 246 --n_layer 2 --track_size 8 --hidden 64 \\
      --windows 20000 --steps 3000 --lr 1e-2 --micro_batch_size 32""")


if __name__ == "__main__":
    with training.user_errors():
        args = parse_args()
        complete_args(args)
        run = training.Run(args, writes=not args.show_masks)
        device = run.device
        genome = data.open_genome(args.genome, args.data_dir, args.cache, args.ambiguous, args.verify)
        genome.restrict(args.bed)
        repeats = genome.repeats(args.repeat_weight, device)
        train, val = (data.window_table(part, args.length)
                      for part in genome.split(args.length, args.val_contigs))
        windows = data.draw_starts(train, args.windows, np.random.default_rng((args.seed, 0, 1, 2)))
        bases = data.resident(genome.bases, device)
        run.check_memory(build_model, args.length + args.n_cls, teachers=args.objective != "mnm")
        model = build_model(args).to(device)
        optimizer = training.make_optimizer(model, args.lr, args.weight_decay, BETAS, EPS)
        teacher = None if args.objective == "mnm" else copy.deepcopy(model).eval().requires_grad_(False)
        alpha = {"both": args.alpha, "mnm": 1.0, "cl": 0.0}[args.objective]
        projected, dim = args.cl_space == "projected", 2 if args.cl_softmax == "features" else 1
        width, L = 5 if projected else model.config.n_embd, args.length + args.n_cls
        flops_per_base = L / args.length * model.flops_per_token(L, bool(teacher))
        center = torch.zeros(args.n_cls, width if teacher else 0, device=device)
        n_masked, n_q = round(args.mask_rate * args.length), center.shape[2 - dim]     # terms of the two sums
        parts = {"model": model, "optimizer": optimizer}
        if teacher:
            parts |= {"teacher": teacher, "center": center}
        if run.writes:
            run.open("findna", model.config, genome.fingerprint, parts)

    def take(starts):
        """Returns the windows (n, length) at `starts`, on the device."""
        return data.to_device(data.take_windows(bases, starts, args.length), device)

    def get_views(starts, edges=None):
        """Makes view_u, target (weighted if edges of repeats are given), view_v; call training.seed first."""
        dna = take(starts)
        dna = dna if edges is None else dna + data.SOFT * data.in_repeats(dna, starts, edges)
        view_u, target, view_v = make_views(dna, args.views, args.translocation, args.mask_rate, args.noise,
                                            args.flip)
        return view_u, target.where(target >= 0, args.repeat_weight), view_v

    def get_batch(step, i, n):
        """Returns get_views of micro-batch i (n windows) of a step."""
        first, rng = i * args.micro_batch_size, training.seed(args.seed, step, i)
        return get_views(data.draw_starts(train, n, rng) if args.fresh_windows else
                         pass_over(windows, args.seed, (step - 1) * args.batch_size + first, n), repeats)

    if args.show_masks:
        starts = data.draw_starts(train, args.show_masks, training.seed(args.seed, 0, 0))
        show_views(get_views(starts), run.say)
        training.finish()

    guessed = (constant, order0), (flanked, flanked_nats) = guesses(genome.bases)
    reached, lines = genome.reach(args.length, args.val_contigs)
    per_step = args.batch_size * args.length
    run.describe(model, genome, args.steps * per_step / reached, per_step, "bases")
    run.say(*lines, sep="\n")
    epochs = args.steps * args.batch_size / args.windows
    run.say(f"windows  {args.windows:,} an epoch, {epochs:.3g} epochs; {n_masked} of {args.length} bases "
            f"masked")
    run.say(f"guesses  of a base: {constant:.1%} are right from its frequency ({order0:.3f} nats), "
            f"{flanked:.1%} from its two neighbours ({flanked_nats:.3f} nats)")

    if teacher:
        left = initial_share(args.steps, args.steps, args.ema)
        run.say(f"teacher  keeps {left:.2g} of its initial weights to the end; above 0.01 finetune.py uses "
                f"the student")

    net = training.wrap(model, args.compile, device, run.world)
    if teacher:
        training.wrap(teacher, args.compile, device, 1)      # the teacher has no gradients to share

    def loss_of(mnm, cl):
        """Returns Eq. 1 with the sums of Eqs 2 and 7, divided by M to keep the numbers readable."""
        return (alpha * mnm + (1 - alpha) * cl) / n_masked

    def cls_of(x, logits):
        """Returns the outputs (B, K, C or 5) at the [CLS], out of what the network returns."""
        return (logits if projected else x)[:, -args.n_cls:]

    def forward(network, view_u, target, view_v):
        """Returns the sums mnm, cl over sequences, the student's logits, the teacher's [CLS] and their q."""
        outputs, q, cl = center[None], None, torch.zeros((), device=device)
        with training.autocast(device, args.dtype):
            if teacher:
                with torch.no_grad():
                    outputs = cls_of(*teacher(F.pad(view_v, (0, 0, 0, args.n_cls))))
                    q = teacher_outputs(outputs, center, dim, args.temp_teacher)
            x, logits = network(F.pad(view_u, (0, 0, 0, args.n_cls)))
            if teacher:
                cl = cl_loss(cls_of(x, logits), q, dim, args.temp_student)
            logits = logits[:, :-args.n_cls]
            return mnm_loss(logits, target), cl, logits, outputs, q

    @torch.no_grad()
    def validate(step):
        """Makes a row of the log from the same windows and draws each time, which the ranks share."""
        model.eval()
        total = torch.zeros(6 + 2 * center.numel(), dtype=torch.float64, device=device)
        for i, n in run.eval_batches():
            starts = data.draw_starts(val, n, training.seed(args.seed, 0, i))
            view_u, target, view_v = get_views(starts)
            mnm, cl, _, outputs, q = forward(model, view_u, target, view_v)
            kl = n * dissimilarity(view_u, view_v)
            # masked, but not edited: comparable with guesses and between --views
            view_u, target, view_v = make_views(take(starts), PLAIN, 0, args.mask_rate)
            plain, _, logits, *_ = forward(model, view_u, target, view_v)
            right = target.gather(-1, logits.argmax(-1, keepdim=True)).sum()
            total[:5] += torch.stack([mnm, cl, right, kl, plain])
            if teacher:
                total[5:] += teacher_sums(outputs, q, dim)
        model.train()
        total, n = run.sum_evaluation(total), args.eval_windows
        mnm, cl, right, kl, plain = (total[:5] / n).tolist()
        row = {"val_loss": loss_of(mnm, cl), "val_mnm_loss": plain / n_masked, "val_acc": right / n_masked}
        if teacher:
            row |= {"val_cl_loss": cl / n_q, "view_kl": kl, "view_kl_sum": kl * args.length,
                    "center_norm": center.norm().item()} | collapse(total[5:], n, center.shape, dim)
        return row

    warned = False
    with training.user_errors(OSError, MemoryError, torch.OutOfMemoryError):
        for step in run.steps(validate):
            lr = args.lr * training.cosine(step, args.steps, args.warmup)
            ema = ema_at(step, args.steps, args.ema)
            sums = run.new_sums(2 + center.numel())          # losses mnm, cl; then of the teacher's [CLS]
            if repeats is not None:                          # a weighted mean: its weights before backward
                weights = sum(get_batch(step, *part)[1].sum() for part in run.micro_batches(args.batch_size))
                scale = args.batch_size * n_masked / training.all_reduce(weights).clamp(min=1e-9)
            for i, n in run.micro_batches(args.batch_size):
                with run.sync_at_last(net, i):
                    mnm, cl, _, outputs, _ = forward(net, *get_batch(step, i, n))
                    mnm = mnm if repeats is None else mnm * scale
                    run.scaler.scale(loss_of(mnm, cl)).backward()
                sums[:2] += torch.stack([mnm.detach(), cl.detach()])
                sums[2:] += outputs.float().sum(0).flatten()
            run.sum_over_ranks()
            run.scaler.unscale_(optimizer)
            # from DDP's average over ranks of sums to the mean over all sequences of the batch
            scale = sums.new_full((), run.world / args.batch_size)
            norm = training.scale_gradients(model, scale, args.grad_clip)
            run.update(optimizer, lr, norm)
            if teacher:
                with torch.no_grad():
                    torch._foreach_lerp_(list(teacher.parameters()), list(model.parameters()), 1 - ema)
                    center.lerp_((sums[2:] / args.batch_size).float().view_as(center),
                                 1 - args.center_momentum)

            run.read()
            if run.to_log:
                mnm, cl = (loss_sum / args.batch_size for loss_sum in run.sums[:2])
                row = {"loss": loss_of(mnm, cl), "mnm_loss": mnm / n_masked}
                row |= {"cl_loss": cl / n_q, "ema": ema} if teacher else {}
                row |= {"lr": lr, "grad_norm": run.norm, "masked": n_masked / args.length,
                        "tokens_per_s": run.speed}
                row |= run.mfu(flops_per_base)
                row = run.log(row, validate)
                if step > args.warmup and not warned and row.get("q_information", 1) < COLLAPSED:
                    warned = True
                    run.say(f"warning: step {step}: collapsed, the teacher's outputs hardly tell sequences "
                            f"apart ({row['q_information']:.2g} nats); try another --seed or --lr")
            if run.to_save:
                run.save()
            run.end_step()

    if args.demo and teacher:
        row = validate(args.steps)                           # on all ranks
        if run.rank == 0:
            say_what_it_learnt(args, row, guessed)
    training.finish()
