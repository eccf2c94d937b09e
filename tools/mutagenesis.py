"""Show which bases matter to a fine-tuned model: the effect of every single-base substitution on its output.

    python -m tools.mutagenesis new.fa --init out/finetune/csv_my/randommask.pt
    python -m tools.mutagenesis new.fa --init out/finetune/csv_my/randommask.pt --class enhancer --gradient

Writes new.mutagenesis.tsv, .png and .pdf. An effect is the output with the substitution minus the output
without it. The output is the log-odds of a class, log p - log (1 - p), by default of the class that the model
predicts for the sequence; or the value of a target. The picture shows all effects of the first sequence and,
below, each base as high as the output falls when it is substituted (mean).
"""
import importlib.util
import io
import os
import sys
import warnings
from collections import Counter

import training                                              # first: it answers Ctrl-C in the slow imports
from training import number

import numpy as np
import torch
import torch.nn as nn
from scipy import stats
from tqdm import tqdm

import data
import finetune
import models
from tools import figures
from tools.predict import add_flags, count_block, open_model, output, read_sequences, say_counts

LETTERS = "ACGT"
CODES = data.encode(LETTERS)
COLORS = dict(zip(LETTERS, figures.COLORS[[2, 0, 4, 1]]))
BLOCK = 1 << 24                                              # bases of substituted sequences at a time
WIDTH, LINES = 100, 20                                       # of a picture: bases of a line, lines
ONE = np.zeros(1, np.int64)                                  # index of the only sequence in Rows


def find_output(model, name):
    """Returns the index of the class or target of this name. Without a name: 0 for the only target of a
    regression, else None for the class that is predicted."""
    names, regression = model.classes(), model.net.spec["regression"]
    if name is None and not (regression and len(names) > 1):
        return 0 if regression else None
    if name not in names:
        given = data.quoted(name) if name else "is missing"
        raise ValueError(f"--class {given}: the model has {', '.join(names)[:300]}; name one of them")
    return names.index(name)


def value_of(net, outputs, at):
    """Turns outputs (n, n_out) into (n,): log-odds of class or label `at`, or values of target `at`."""
    if net.spec["regression"] or net.spec["multilabel"]:
        return outputs[:, at]
    return outputs[:, at] - outputs[:, [i for i in range(outputs.shape[1]) if i != at]].logsumexp(1)


def copies(codes, places=ONE, letters=None):
    """Makes Rows: for each place a copy of the sequence with the letter there (None: left as it is)."""
    bases = np.tile(codes, (len(places), 1))
    bases[np.arange(len(places)), places] = codes[places] if letters is None else letters
    return data.Rows(bases.ravel(), len(codes) * np.arange(len(places) + 1), None, {})


def effects(model, codes, at, bar):
    """Computes the effects (4, L) of A, C, G and T at each base: 0 for the base that is there, NaN at N."""
    def value(rows):
        return value_of(model.net, torch.from_numpy(model.apply(rows, empty=True)).double(), at).numpy()
    before, found = value(copies(codes)), np.where(codes < 4, np.zeros((4, 1)), np.nan)
    letters, places = np.nonzero((codes != CODES[:, None]) & (codes < 4))
    size = max(BLOCK // len(codes), 1)
    for i in range(0, len(places), size):
        part = letters[i:i + size], places[i:i + size]
        found[part] = value(copies(codes, part[1], CODES[part[0]])) - before
        bar.update(len(part[0]))
    return found


def by_base(net, rows, x):
    """Averages x (windows, T), values of the network's inputs, over those that cover a base: (L,)."""
    x, covered = net.spread(x.cpu()[..., None], rows, ONE)   # (N, 1), (N, width)
    return models.over_bases(x, covered, len(rows.bases))[:, 0].numpy()


def gradient_x_input(net, rows, at):
    """Computes gradient x input (L,) on one-hot bases or on embeddings of the k-mers that contain a base."""
    reader, kept = net.get_submodule(net.READER), []

    def keep(module, inputs, output=None):
        kept.append((inputs[0] if output is None else output).detach().requires_grad_())
        return kept[0]
    hook = reader.register_forward_hook if isinstance(reader, nn.Embedding) else \
        reader.register_forward_pre_hook
    net.micro_batch_size, inputs = len(rows.bases), net.inputs(rows, ONE)      # all windows in one pass
    with hook(keep):
        value = value_of(net, net(*inputs).float(), at)
    product = kept[0].detach() * torch.autograd.grad(value.sum(), kept)[0]
    return by_base(net, rows, product.sum(-1).view(len(inputs[0]), -1))


@torch.no_grad()
def attention(net, rows, at=None):
    """Returns the attention (L,) of [CLS], from which the output is read, in the last layer: mean over the
    heads and over the k-mers that contain a base, as Ji et al. (DNABERT) show it."""
    x = models.in_parts(lambda *window: net.bert.encode(*window, need_weights=True)[1][-1][:, :, 0].mean(1),
                          1, *net.inputs(rows, ONE)[:2])
    return by_base(net, rows, x)


def explain(model, codes, at, checks, bar):
    """Explains one sequence: name of the output, effects (4, L), {name of a check: its values (L,)}."""
    net, rows, more = model.net, copies(codes), {}
    if at is None:
        at = int(model.apply(rows, empty=True).argmax())
    found = effects(model, codes, at, bar)
    if not finetune.n_bases(net, rows)[0]:
        found[:] = np.nan
    for function in checks:
        x = function(net, data.on_device(rows, model.device), at)
        if net.spec["strands"] == "average":
            other = copies(data.reverse_complement(codes))
            x = (x + function(net, data.on_device(other, model.device), at)[::-1]) / 2
        more[function.__name__] = x
    return model.classes()[at], found, more


def effect_lines(name, codes, label, found, more):
    """Yields the lines of one sequence: one for each substitution."""
    for at, ref in enumerate(data.decode(codes)):
        for alt, effect in zip(LETTERS, found[:, at]):
            if ref not in ("N", alt):
                numbers = [effect, *(x[at] for x in more.values())]
                first, *others = ["" if np.isnan(x) else f"{x:.6g}" for x in numbers]
                yield "\t".join([name, str(at), ref, alt, first, label, *others]) + "\n"


def agreement(found, x):
    """Correlates the ranks of the size of x and of the effects' mean size, over the bases that are read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                      # of a constant: NaN
        return stats.spearmanr(abs(found).mean(0), abs(x), nan_policy="omit")[0]


def mutate(model, args):
    """Writes the table; returns what `draw` takes of the first sequences, and the name of the picture."""
    if model.net.spec.get("pairs"):
        raise ValueError(f"--init {args.init}: fine-tuned on pairs of sequences; use a model of single ones")
    for flag, fits in (("gradient", model.net.READER), ("attention", model.net.BODY == "bert")):
        if getattr(args, flag) and not fits:
            raise ValueError(f"--{flag}: not for a network of the kind {model.net.spec['kind']}; drop it")
    at, out, counts, drawn = find_output(model, args.output), output(args, ".mutagenesis.tsv"), Counter(), []
    checks = [gradient_x_input] * args.gradient + [attention] * args.attention
    alike, bar = {f.__name__: [] for f in checks}, tqdm(unit=" effects", disable=not sys.stderr.isatty())
    stem = os.path.splitext(out)[0]
    for name in (f"{stem}.png", f"{stem}.pdf") if args.draw else ():
        if name == out:
            raise ValueError(f"--out {out}: this is the table, and pictures go beside it; name it .tsv")
        if os.path.lexists(name):
            raise ValueError(f"{name}: already exists; name another one by --out, or give --draw 0")
    with data.new_path(out) as file, io.TextIOWrapper(file, "utf-8") as f, bar:
        f.write("\t".join(["id", "position", "ref", "alt", "effect", "output", *alike]) + "\n")
        for name, codes in read_sequences(args):
            if data.BETWEEN in codes:
                raise ValueError(f"{args.file}: sequence_2: not for pairs; give single sequences")
            label, found, more = explain(model, codes, at, checks, bar)
            f.writelines(effect_lines(name, codes, label, found, more))
            rows = data.rows_of(codes, [len(codes)], None, {})
            counts.update(count_block(model.net, rows, finetune.n_bases(model.net, rows)))
            for check, x in more.items():
                alike[check].append(agreement(found, x))
            if len(drawn) < args.draw:
                drawn.append((f"{name}: {label}", codes, found, more))
    print(f"wrote {out}")
    say_counts(counts)
    for check, values in alike.items():
        known = [x for x in values if np.isfinite(x)]
        print(f"{check}: rank correlation of its size with the mean size of a base's effects "
              f"{sum(known) / max(len(known), 1):.3f} (mean over {len(known):,} sequences)")
    return drawn, stem


def draw_letters(ax, codes, heights):
    """Draws each base as a letter of this height, upside down below 0."""
    from matplotlib import patches, textpath, transforms
    glyphs = {letter: textpath.TextPath((0, 0), letter, 1, prop="DejaVu Sans:bold") for letter in LETTERS}
    for at, (letter, height) in enumerate(zip(data.decode(codes), heights)):
        if letter in glyphs and height:                      # NaN draws nothing
            box = glyphs[letter].get_extents()
            to = transforms.Affine2D().translate(-box.x0, -box.y0).scale(1 / box.width, height / box.height)
            path = glyphs[letter].transformed(to.translate(at - 0.5, 0))
            ax.add_patch(patches.PathPatch(path, color=COLORS[letter], lw=0))
    ax.axhline(0, color="black", lw=0.5)


def draw(drawn):
    """Draws these sequences, WIDTH bases a line: all effects, then each base as high as it matters."""
    parts = [(*one, at) for one in drawn for at in range(0, len(one[1]), WIDTH)]
    if len(parts) > LINES:
        print(f"the picture has the first {LINES} of {len(parts)} lines of {WIDTH} bases, the table all")
    n, top = 2 + len(drawn[0][3]), max(np.nanmax(abs(found), initial=1e-9) for _, _, found, _ in drawn)
    fig, axes = figures.new_figure(n * len(parts[:LINES]), 1, 11, 0.8)
    width = min(WIDTH, max(len(codes) for _, codes, *_ in drawn))
    for i, (title, codes, found, more, at) in enumerate(parts[:LINES]):
        own, to = axes[n * i:n * (i + 1)], slice(at, at + WIDTH)
        image = own[0].imshow(found[:, to], cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto")
        own[0].set_yticks(range(4), LETTERS)
        own[0].set_title(title if at == 0 else "", loc="left")
        for ax, (what, values) in zip(own[1:], {"fall": -found.sum(0) / 3, **more}.items()):
            draw_letters(ax, codes[to], values[to])
            low, high = np.nanmin(values, initial=0), np.nanmax(values, initial=1e-9)
            ax.set(ylabel=what.replace("_", "\n", 1).replace("_", " "), ylim=(1.1 * low, 1.1 * high))
        for ax in own:
            ax.set_xticks(range(0, width, 10), [at + x if ax is own[-1] else "" for x in range(0, width, 10)])
            ax.set_xlim(-0.5, width - 0.5)
    fig.colorbar(image, ax=axes, aspect=60, pad=0.01, label="effect of a substitution")
    return fig


if __name__ == "__main__":
    parser = training.make_parser(__doc__)
    add = add_flags(parser)
    add("--class", dest="output", metavar="NAME", help="class or target (default: the predicted class)")
    add("--gradient", action="store_true", help="also gradient x input (BERT, ChordMixer, cnn)")
    add("--attention", action="store_true", help="also the attention of [CLS] to each base (BERT)")
    add("--draw", type=number(int, 0, 100), default=1, help="sequences in the picture; 0: none (%(default)s)")
    parser.set_defaults(dtype="float32")                     # effects are small differences
    with training.user_errors():
        args = parser.parse_args()
        if args.draw and not importlib.util.find_spec("matplotlib"):
            raise ValueError("matplotlib is missing; run pip install matplotlib, or give --draw 0")
        drawn, stem = mutate(open_model(args), args)
        if drawn:
            figures.write_figure(draw(drawn), stem, 150, replace=False)
