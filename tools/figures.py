"""Draws the papers' figures from your own runs. Prints the numbers; writes OUT.png and OUT.pdf.

    python -m tools.figures loss out/randommask out/dnabert        logged curves of several runs
    python -m tools.figures embeddings out/randommask/step_*.pt    t-SNE of k-mer embeddings, silhouettes
    python -m tools.figures attention out/randommask/last.pt --fasta my.fa
    python -m tools.figures masks                                  what each method masks
    python -m tools.figures results out/finetune                   results.jsonl and the papers' numbers
    python -m tools.figures comparisons                            our experiments: differences, intervals

Drawing needs matplotlib (tools/requirements.txt).
"""
import functools
import io
import itertools
import json
import math
import os
from collections import namedtuple

import training                                              # first: it answers Ctrl-C in the slow imports
from training import file_name, folder_name

import numpy as np
import torch
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors

import cm_gems
import data
import findna
import finetune
import models
import randommask
from tools import evidence, table

COLORS = np.array([[*bytes.fromhex(rgb)] for rgb in (        # Okabe and Ito's palette: (8, 3), 0..1
    "0072B2", "D55E00", "009E73", "CC79A7", "E69F00", "56B4E9", "000000", "999999")]) / 255
REACH = 6                                                    # tokens on either side that count as neighbours
SHOWN = 120                                                  # bases shown in the figure of the masks
LISTED = 32                                                  # k-mers of a cluster that are listed
# What `attention` needs of a network: tokens (1, T) -> attention (layer, H, T, T); bases (n, L) -> tokens
# (n, T); k and stride of the k-mers, how many it reads at a time, the number of tokens behind them
Reader = namedtuple("Reader", "weights tokens k stride room n_last")
PANELS = (                                                   # title, unit, scale, {column of the log: style}
    ("Loss; dots: held out; triangles: masks of the next phase", "nats", "log", {
        "loss": "-", "val_loss": "o", "val_loss_next_phase": "^"}),
    ("Perplexity; dashed: DNABERT's spans; triangles: next phase", "exp(nats)", "log", {
        "val_loss": "-", "val_loss_span": "--", "val_loss_next_phase": "^"}),
    ("FinDNA, masked bases; dots: held out", "nats", "linear", {"mnm_loss": "-", "val_mnm_loss": "o"}),
    ("FinDNA, contrastive loss; dots: held out", "nats", "linear", {"cl_loss": "-", "val_cl_loss": "o"}),
    ("FinDNA, teacher: information; dashed: cosine between sequences", "nats", "linear", {
        "q_information": "-", "cls_cos": "--"}),
    ("Masked", "share of the tokens or bases", "linear", {"masked": "-"}),
    ("Learning rate", "", "linear", {"lr": "-"}))


def new_figure(n, columns, width, height):
    """Makes a figure and its n axes in rows of `columns`, each of width x height inches."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("matplotlib is missing; run pip install matplotlib") from None
    matplotlib.rcParams.update({"font.size": 7, "axes.titlesize": 8, "legend.frameon": False,
                                "axes.spines.top": False, "axes.spines.right": False,
                                "text.parse_math": False})   # a name may hold $
    rows = -(-n // columns)
    fig = Figure((columns * width, rows * height), layout="constrained")
    return fig, [fig.add_subplot(rows, columns, i) for i in range(1, n + 1)]


def read_log(run):
    """Reads log.jsonl of a run folder: {column: (steps, values)}. ValueError if a line is not a row."""
    path, log = os.path.join(run, "log.jsonl"), {}
    data.check_file(path)
    for n, line in enumerate(open(path, errors="replace"), 1):
        if not line.endswith("\n"):
            print(f"{path}: line {n} is still being written; left out")
            break
        try:
            row = {name: x for name, x in json.loads(line).items() if isinstance(x, (int, float))}
            step, _ = int(row.pop("step")), row["loss"]
        except (ValueError, LookupError, AttributeError, ArithmeticError, RecursionError):
            raise ValueError(f"{path}: line {n}: {data.quoted(line.strip())} is not a row of a pretraining "
                             f"log; give a run folder of randommask, findna or cm_gems") from None
        for name, value in row.items():
            name = "val_loss_span" if name.startswith("val_loss_span") else name           # span6 if k is 6
            steps, values = log.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)
    if not log:
        raise ValueError(f"{path}: no rows yet; wait for the first")
    return {name: (np.array(steps), np.array(values)) for name, (steps, values) in log.items()}


def events(log):
    """Returns [(step, what begins after it)]: the phases of RandomMask, the switch of CM-GEMS."""
    steps, phases = log.get("phase", ((), ()))
    found = [(int(steps[i]), f"phase {phases[i + 1]}") for i in np.flatnonzero(np.diff(phases))]
    return found + [(int(step), "Global") for step in log.get("switch_step", ((), ()))[1]]


def curves(log):
    """Returns the curves of the PANELS in a log: {title: {column: (steps, values in the panel's unit)}}."""
    found = {}
    for title, unit, _, styles in PANELS:
        if unit != "exp(nats)" or "mnm_loss" not in log:     # FinDNA's loss mixes two kinds: no perplexity
            in_unit = np.exp if unit == "exp(nats)" else np.asarray
            found[title] = {name: (log[name][0], in_unit(log[name][1])) for name in styles if name in log}
    return {title: lines for title, lines in found.items() if lines}


def read_bert(path):
    """Reads a checkpoint, pretrained or fine-tuned, or hf:FOLDER: (Bert in eval mode, stride)."""
    spec, weights = finetune.read_network(path)
    if spec["kind"] != "bert":
        raise ValueError(f"{path}: a {spec['kind']} network; give a Bert of randommask, cm_gems or finetune")
    return finetune.build_net(spec, weights).bert.eval(), spec["stride"]


def read_attention(path, device):
    """Reads a checkpoint, or hf:FOLDER of any encoder over k-mers, into a Reader."""
    spec, weights = finetune.read_network(path)
    if spec["kind"] == "bert":
        net = finetune.build_net(spec, weights).eval().to(device)
        return Reader(lambda row: torch.stack(net.bert.encode(row, need_weights=True)[1])[:, 0],
                      functools.partial(data.kmer_tokens, k=net.k, stride=net.stride, specials=True),
                      net.k, net.stride, net.room, 1)
    net = finetune.build_net(spec, weights).eval().to(device) if spec["kind"] == "hf" else None
    if not net or not net.k or not net.has_cls or len(net.first) > 1 or len(net.last) > 1:
        raise ValueError(f"{path}: not an encoder that reads [CLS] k-mers [SEP]; give a BERT of randommask, "
                         f"cm_gems or finetune, or hf:FOLDER of one, or of Nucleotide Transformer")
    net.hf.set_attn_implementation("eager")                  # the others return no weights

    def tokens(bases):
        ids = [[*net.first, *net.tokenize(data.decode(row))[0], *net.last] for row in bases.cpu().numpy()]
        return torch.tensor(np.array(ids), device=device)
    return Reader(lambda row: torch.stack(net.hf(input_ids=row, output_attentions=True).attentions)[:, 0],
                  tokens, net.k, spec["stride"] or net.k, net.room, len(net.last))


def colorings(k):
    """Returns {coloring: class of each k-mer (4**k,), in token order}; the letters A, T, C, G are 0..3."""
    letters = np.arange(4 ** k)[:, None] // 4 ** np.arange(k - 1, -1, -1) % 4              # (4**k, k)
    center = letters[:, k // 2] + (4 * letters[:, k // 2 - 1] if k % 2 == 0 else 0)        # 1 or 2 letters
    return {"center": center, "margins": letters[:, 0] * 4 + letters[:, -1]} | {
        f"position {i + 1}": letters[:, i] for i in range(k)}


def silhouettes(bert):
    """Computes {coloring: silhouette of the k-mer embeddings in -1..1}, by the cosine in all dimensions.

    "shuffled" has the classes of "center" in random order.
    """
    rows, classes = bert.tok_emb.weight[5:].detach().numpy(), colorings(bert.config.k)
    shuffled = {"shuffled": np.random.default_rng(0).permutation(classes["center"])}
    return {name: float(silhouette_score(rows, ids, metric="cosine", random_state=0,
                                         sample_size=min(10_000, len(ids))))
            for name, ids in (classes | shuffled).items()}


def embeddings(bert):
    """Computes t-SNE (4**k, 2) of k-mer embeddings, {coloring: classes (4**k,)}, {coloring: silhouette}."""
    rows = bert.tok_emb.weight[5:].detach().numpy()
    if bert.config.k < 3:
        raise ValueError(f"{bert.config.k}-mers: too few for a figure; use a model with k = 3 or more")
    xy = TSNE(perplexity=min(30, len(rows) / 4), metric="cosine", random_state=0).fit_transform(rows)
    return xy, colorings(bert.config.k), silhouettes(bert)


def draw_cluster(ax, ax_list, xy, k):
    """Marks the densest cluster of the t-SNE xy (4**k, 2), a k-mer and its neighbours, and lists them."""
    distances, neighbours = NearestNeighbors(n_neighbors=min(LISTED, len(xy) // 4)).fit(xy).kneighbors(xy)
    cluster = sorted(neighbours[distances[:, -1].argmin()])
    words = [models.vocabulary(k)[5 + i] for i in cluster]
    print(f"densest cluster (black): {' '.join(words)}")
    ax.scatter(*xy[cluster].T, s=3, lw=0, c="black")
    rows = -(-len(words) // 3)                               # in three columns
    for i, word in enumerate(words):
        for j, letter in enumerate(word):
            ax_list.text(i // rows * (k + 1) + j, i % rows, letter, color=COLORS["ATCG".index(letter)],
                         weight="bold", ha="center", va="center")
    ax_list.set(xlim=(-1, 3 * k + 2), ylim=(rows, -1), title="k-mers of the cluster in black")
    ax_list.axis("off")


def shades(classes):
    """Returns colors (n, 3): the hue is the first or only letter, the lightness the second letter."""
    if classes.max() < 4:
        return COLORS[classes]
    hue, light = COLORS[classes // 4], np.array([-0.45, 0.0, 0.4, 0.7])[classes % 4, None]
    return hue * (1 - abs(light)) + light.clip(0)            # towards black, towards white


def random_windows(genome, n, length, least):
    """Draws n random windows without N: bases (n, L), place of the first, in words where they are from.

    It first draws n stretches without N of at least `least` bases, the likelier the longer they are, then a
    window in each. L is the most that fits all of them, up to `length`. If L came first, all windows could
    be from the longest record.
    """
    rng, sizes = np.random.default_rng(0), np.diff(genome.intervals)[:, 0]
    weights = np.where(sizes >= least, sizes, 0)
    if not weights.any():
        raise ValueError(f"--fasta: no {least} bases without N for a window; give more sequence")
    drawn = rng.choice(len(sizes), n, p=weights / weights.sum())
    length = min(length, int(sizes[drawn].min()))
    starts = genome.intervals[drawn, 0] + rng.integers(sizes[drawn] - length + 1)
    contigs, offsets = list(genome.contigs), list(genome.offsets.values())
    owner = np.searchsorted(offsets, starts, side="right") - 1
    at = int(starts[0]) - offsets[owner[0]]
    return (data.take_windows(genome.bases, starts, length), f"{contigs[owner[0]]}:{at}-{at + length}",
            f"from {len(set(owner))} of {len(contigs)} records")


def mean_per_base(of_kmers, k, stride):
    """Averages values of k-mers (n, T) for each base, over the k-mers that contain it: (n, L)."""
    covered = stride * torch.arange(of_kmers.shape[1])[:, None] + torch.arange(k)        # the bases of each
    return models.over_bases(of_kmers.T, covered, int(covered[-1, -1]) + 1).T


@torch.no_grad()
def attention(net, tokens):
    """Measures a Reader's attention on tokens (n, T), [CLS] k-mers and maybe [SEP]: {name: array}.

    maps (layer, H, T, T): mean over sequences. numbers (layer, 5): the share of a k-mer's attention to [CLS],
    to [SEP] (NaN: there is none) and to k-mers at most REACH tokens away; its entropy in nats; contrast, what
    the most attended k-mer of a sequence receives / what its k-mers receive on average. uniform (5,): of
    equal attention. profiles (2, 2, L): attention to each base of the first sequence, in the middle and the
    last layer, from [CLS] and from a k-mer; mean over heads and over the k-mers that contain the base.
    """
    (n, T), total, entropy, contrast = tokens.shape, 0, 0, 0
    kmers, n_kmers = slice(1, T - net.n_last), T - 1 - net.n_last
    for i, row in enumerate(tokens):                         # (layer, H, T, T) is large
        weights = net.weights(row[None])
        total, entropy = total + weights, entropy - weights.xlogy(weights)[:, :, kmers].sum(-1).mean((1, 2))
        received = weights[:, :, kmers, kmers].mean((1, 2))  # (layer, T - 2)
        contrast = contrast + received.amax(1) / received.mean(1)
        if i == 0:
            first = weights[[(len(weights) - 1) // 2, -1]].mean(1)             # (2, T, T)
    maps, at = total / n, torch.arange(n_kmers, device=tokens.device)
    given, near = maps[:, :, kmers].mean(1), (at[:, None] - at).abs() <= REACH          # (layer, T - 2, T)
    to_near, sep = (given[..., kmers] * near).sum(-1), 1 if net.n_last else math.nan
    numbers = torch.stack([given[..., 0].mean(1), sep * given[..., -1].mean(1), to_near.mean(1), entropy / n,
                           contrast / n], 1)
    uniform = torch.tensor([1 / T, sep / T, near.sum() / n_kmers / T, math.log(T), 1])
    profiles = [mean_per_base(torch.stack([x[0], x[kmers].mean(0)])[:, kmers].cpu(), net.k, net.stride)
                for x in first]
    return {"maps": maps.cpu().numpy(), "numbers": numbers.cpu().numpy(), "uniform": uniform.numpy(),
            "profiles": torch.stack(profiles).numpy()}


def draw_attention(found, place):
    """Draws found {checkpoint: result of attention}; place: where the sequence of the profiles is from."""
    fig, axes = new_figure(6, 2, 4, 2.5)
    titles = {0: "Attention to [CLS]", 2: f"To k-mers at most {REACH} tokens away", 3: "Entropy of attention",
              4: "Most attended k-mer / mean of the k-mers"}
    for color, (name, a) in zip(COLORS, found.items()):
        layers = range(1, len(a["numbers"]) + 1)
        for ax, (i, title) in zip(axes, titles.items()):
            ax.plot(layers, a["numbers"][:, i], "o-", color=color, ms=3, lw=1, label=name)
            ax.axhline(a["uniform"][i], color=color, lw=0.8, ls=":")
            ax.set(title=f"{title}; dotted: uniform", xlabel="layer", xticks=layers,
                   ylabel=("share", "", "share", "nats", "ratio")[i])
        for ax, profile in zip(axes[4:], a["profiles"]):
            for received, style in zip(profile, ("--", "-")):
                ax.plot(received * a["maps"].shape[-1], style, color=color, lw=1)
    for ax, layer in zip(axes[4:], ("Middle", "Last")):
        ax.set(title=f"{layer} layer, from k-mers to a base; dashed: from [CLS]", xlabel=f"base of {place}",
               ylabel="1 = uniform")
    for ax in axes:
        ax.set_ylim(bottom=0)                                # last, because it ends the autoscaling
    axes[0].legend()
    return fig


def draw_maps(found):
    """Draws mean attention maps: of one checkpoint those of its heads, a row per layer; of several those of
    their layers, a row per checkpoint."""
    rows = {name: a["maps"].mean(1) for name, a in found.items()}
    titles = [f"layer {i}" for i in range(1, max(map(len, rows.values())) + 1)]
    if len(found) == 1:
        [a] = found.values()
        rows = {f"layer {i}": [layer.mean(0), *layer] for i, layer in enumerate(a["maps"], 1)}
        titles = ["all heads", *(f"head {i}" for i in range(1, a["maps"].shape[1] + 1))]
    columns = len(titles)
    side = min(2.2, max(1, 8 / columns))
    fig, axes = new_figure(len(rows) * columns, columns, side, side + 0.2)
    for y, (name, maps) in enumerate(rows.items()):
        row = axes[y * columns:(y + 1) * columns]
        row[0].set_ylabel(name)
        for ax, title, m in zip(row, titles, maps):
            ax.imshow(m, vmin=0, vmax=np.quantile(m, 0.99), interpolation="nearest")
            ax.set(title=title, xticks=[], yticks=[])
        for ax in row[len(maps):]:                           # another checkpoint has more layers
            ax.axis("off")
    fig.supxlabel("across: token attended to; down: token that attends; yellow: top 1 % of a map", fontsize=7)
    return fig


def mask_rows(bases, npmi_rank, k):
    """Masks bases (n, L) by each method, all seeded alike: [(method, share of tokens masked, share (n, L))].

    The last is the share of masked tokens among those that contain a base; a base with 1 is hidden.
    """
    rate, tokens, apart = randommask.MASK_RATE, data.kmer_tokens(bases, k, 1), data.kmer_tokens(bases, k, k)
    rows = []

    def add(name, stride, draw, *args):
        training.seed(0)
        masked = draw(*args).float()
        share = mean_per_base(masked, k, stride) if stride else masked
        share = torch.nn.functional.pad(share, (0, bases.shape[1] - share.shape[1]))       # a rest under k
        rows.append((name, masked.mean().item(), share.numpy()))
    for phase, name in enumerate(("1 = DNABERT", "2", "3", "4", "5"), 1):
        add(f"RandomMask {name}", 1, randommask.random_mask, tokens, phase, rate / k, k)
    add("non-overlapping", k, randommask.random_mask, apart, 1, rate, 1)
    for name, masker in {"GeneMask": "genemask", "Global": "global"}.items():
        add(name, 1, lambda p: cm_gems.MASKERS[masker](tokens, npmi_rank, data.draw_centers(
            tokens.shape, p, tokens.device)), cm_gems.center_probability(masker, k))
    add("FinDNA", 0, findna.draw_masked, bases.shape, bases.device)
    return rows


def result_points(out):
    """Reads results.jsonl: ours {model: {(task, shots, metric): (mean, sd or nan, seeds)}}, and for its tasks
    the papers' values {column: {key: (value, ...)}}; all x 100."""
    runs, ours = table.read_runs(out), {}
    for model, cells in table.our_columns(runs)[0].items():
        ours[model] = {key: (float(mean), math.nan if sd == "" else sd, n)
                       for key, (mean, sd, n, *_) in cells.items()}
    return ours, table.paper_columns(table.PAPER, runs)[0]


def draw_results(ours, papers):
    """Draws our means and sd over seeds, a row per task but few-shot ones; hollow: the papers' values."""
    order = {name: i for i, name in enumerate(data.TASKS)}
    keys = sorted({key for cells in ours.values() for key in cells if not key[1]},
                  key=lambda key: (order.get(key[0], len(order)), key))
    fig, [ax] = new_figure(1, 1, 8, 0.25 * len(keys) + 1.2)
    for i, (model, cells) in enumerate(ours.items()):
        mean, sd, _ = zip(*(cells.get(key, (math.nan,) * 3) for key in keys))
        y = np.arange(len(keys)) + 0.6 * ((i + 1) / (len(ours) + 1) - 0.5)
        ax.errorbar(mean, y, xerr=sd, fmt="o", ms=3, lw=1, color=COLORS[i % len(COLORS)], label=model)
    names = sorted({name.split(":")[0] for name in papers})
    for marker, paper in zip(itertools.cycle("sD^v"), names):
        points = [(cells[key][0], y) for name, cells in papers.items() for y, key in enumerate(keys)
                  if name.split(":")[0] == paper and key in cells]
        ax.plot(*zip(*points), marker, ms=5, mfc="none", color=COLORS[7], label=f"{paper}: its methods")
    ax.set_yticks(range(len(keys)), [f"{task} ({table.METRICS[metric]})" for task, _, metric in keys])
    for y in range(1, len(keys)):
        same = keys[y][0].split("/")[0] == keys[y - 1][0].split("/")[0]
        ax.axhline(y - 0.5, lw=0.2 if same else 0.8, color=COLORS[7])
    ax.invert_yaxis()
    ax.set(title="Test scores: mean and sd over seeds; hollow: as published", xlabel="100 x score")
    fig.legend(loc="outside right upper")
    return fig


def draw_shots(ours):
    """Draws a panel per few-shot task: mean and sd over draws against the number of rows per class."""
    tasks = sorted({key[::2] for cells in ours.values() for key in cells if key[1]})
    shots = sorted({key[1] for cells in ours.values() for key in cells if key[1]})
    columns = min(3, len(tasks))
    fig, axes = new_figure(len(tasks), columns, 8 / columns, 2.6)
    for ax, (task, metric) in zip(axes, tasks):
        for color, (model, cells) in zip(itertools.cycle(COLORS), ours.items()):
            points = [(n, *cells[task, n, metric][:2]) for n in shots if (task, n, metric) in cells]
            if points:
                ax.errorbar(*zip(*points), fmt="o-", ms=3, lw=1, capsize=2, color=color, label=model)
        ax.set(title=task, xlabel="rows per class", xscale="log", ylabel=f"100 x {table.METRICS[metric]}")
        ax.set_xticks(shots, shots)
        ax.set_xticks([], minor=True)
    axes[0].legend()
    return fig


def draw_comparisons(found):
    """Draws {experiment: [Comparison]}: differences with their intervals, a row each, colored by verdict."""
    rows = [(name, x) for name, comparisons in found.items() for x in comparisons]
    fig, [ax] = new_figure(1, 1, 8, 0.15 * len(rows) + 0.8)
    for color, verdict in zip(COLORS[[2, 1, 7]], ("held", "not held", "cannot tell")):
        at = [(x.gaps.mean(), y, *x.interval) for y, (_, x) in enumerate(rows) if x.verdict == verdict]
        mean, y, low, high = np.array(at).reshape(-1, 4).T
        ax.plot([low, high], [y, y], lw=1.2, color=color)
        ax.plot(mean, y, "o", ms=4, color=color, label=verdict)
    ax.set_yticks(range(len(rows)), [f"{x.claim} ({x.mode})" for _, x in rows])
    for label, (_, x) in zip(ax.get_yticklabels(), rows):
        label.set_weight("bold" if x.primary else "normal")
    for y, (name, _) in enumerate(rows):
        if not y or name != rows[y - 1][0]:
            ax.axhline(y - 0.5, lw=0.5, color=COLORS[7])
            ax.text(0.01, y, name, transform=ax.get_yaxis_transform(), va="center")
    ax.axvline(0, lw=0.5, color=COLORS[6])
    ax.set(xlabel="difference in points, 95 % interval", ylim=(len(rows) - 0.5, -0.5))
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
    return fig


def write_figure(fig, stem, dpi, replace=True):
    """Writes stem.png and stem.pdf, each whole, in place of earlier ones unless replace is False."""
    os.makedirs(os.path.dirname(stem) or ".", exist_ok=True)
    names = [f"{stem}.{kind}" for kind in ("png", "pdf")]
    for name in names:
        picture = io.BytesIO()                               # matplotlib answers a full disk in many ways
        fig.savefig(picture, format=name[-3:], dpi=dpi)
        with data.new_path(name, replace=replace) as f:
            f.write(picture.getvalue())
    print(f"wrote {', '.join(names)}")


def label_paths(args):
    """Returns {label: path}. The labels are --names or the paths themselves."""
    labels = args.names or [path.removesuffix(".pt") for path in args.paths]
    if len(labels) != len(args.paths):
        raise ValueError(f"{len(args.paths)} paths, but {len(labels)} --names; give one for each")
    if len(labels) > len(COLORS):
        raise ValueError(f"{len(labels)} paths; give at most {len(COLORS)}")
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"{twice[0]}: {'two --names' if args.names else 'given twice'}; give each once")
    return dict(zip(labels, args.paths))


def print_markdown(heads, rows):
    """Prints a Markdown table."""
    for cells in (heads, ["---"] * len(heads), *rows):
        print("| " + " | ".join(f"{x:.3f}" if isinstance(x, float) else str(x) for x in cells) + " |")


def plot_loss(args):
    logs = {run: read_log(path) for run, path in label_paths(args).items()}
    columns = [name for name in ("loss", "val_loss", "val_loss_span", "val_mnm_loss", "val_acc", "masked")
               if any(name in log for log in logs.values())]
    print_markdown(["run", "step", *columns], [
        [run, log["loss"][0][-1], *(log.get(name, ("", [""]))[1][-1] for name in columns)]
        for run, log in logs.items()])
    for run, log in logs.items():
        now, later = (dict(zip(*log.get(name, ((), ())))) for name in ("val_loss", "val_loss_next_phase"))
        for step, value in later.items():
            print(f"{run}: step {step}, the same weights: {now.get(step, math.nan):.3f} nats with the masks "
                  f"of the phase, {value:.3f} with those of the next")
    lines = {run: curves(log) for run, log in logs.items()}
    panels = [panel for panel in PANELS if any(panel[0] in found for found in lines.values())]
    fig, axes = new_figure(len(panels), 2, 4, 2.5)
    for ax, (title, unit, scale, styles) in zip(axes, panels):
        for color, (run, found) in zip(COLORS, lines.items()):
            for column, (steps, values) in found.get(title, {}).items():
                ax.plot(steps, values, styles[column], color=color, ms=3, lw=1,
                        label=run if styles[column] == "-" else None)
            for step, what in events(logs[run]):
                ax.axvline(step, color=color, lw=0.8, ls=":")
                if ax is axes[0]:
                    ax.annotate(what, (step, 1), xycoords=("data", "axes fraction"), color=color, fontsize=6,
                                rotation=90, va="top", ha="right")
        ax.set(title=title, xlabel="step", ylabel=unit, yscale=scale)
        if scale == "log":                                   # ticks read 4, not 4 x 10^0
            low, high = ax.get_ylim()
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter("{x:g}" if high < 20 * low else "")
    axes[0].legend()
    return {"": fig}


def plot_embeddings(args):
    found = {name: embeddings(read_bert(path)[0]) for name, path in label_paths(args).items()}
    heads = dict.fromkeys(head for _, _, scores in found.values() for head in scores)
    print_markdown(["silhouette", *heads], [[name, *(scores.get(head, "") for head in heads)]
                                            for name, (_, _, scores) in found.items()])
    one = len(found) == 1                                    # then draw every coloring, else the center only
    panels = [(by if one else name, xy, classes[by], scores[by])
              for name, (xy, classes, scores) in found.items() for by in (classes if one else ["center"])]
    columns = 3 if one else min(4, len(panels) + 1)
    fig, (*axes, key) = new_figure(len(panels) + 1 + one, columns, 8 / columns, 8.6 / columns)
    for ax, (name, xy, classes, score) in zip(axes, panels):
        ax.axis("off")
        ax.scatter(*xy.T, s=3, lw=0, c=shades(classes), rasterized=True)
        ax.set_title(f"{name}\nsilhouette {score:.3f}")
    if one:
        [(xy, classes, _)] = found.values()
        draw_cluster(axes[0], axes[-1], xy, len(classes) - 2)
    key.imshow(shades(np.arange(16)).reshape(4, 4, 3))
    key.set(title="colors", ylabel="first or only letter", xlabel="second letter", xticks=range(4),
            yticks=range(4), xticklabels="ATCG", yticklabels="ATCG")
    return {"": fig}


def plot_attention(args):
    device, *_ = training.set_up(args.device, "float32", join=False)
    nets = {name: read_attention(path, device) for name, path in label_paths(args).items()}
    length, found, rows = min((net.room - 1) * net.stride + net.k for net in nets.values()), {}, []
    genome = data.Genome(args.fasta, args.cache)
    bases, place, sampled = random_windows(genome, args.windows, length, max(net.k for net in nets.values()))
    for name, net in nets.items():
        rest = (bases.shape[1] - net.k) % net.stride         # which no k-mer covers: spelled by some
        tokens = net.tokens(bases[:, :bases.shape[1] - rest].to(device))
        a = found[name] = attention(net, tokens)
        labels = [*range(1, len(a["numbers"]) + 1), f"uniform, {tokens.shape[1]} tokens"]
        rows += [(name, label, *("" if math.isnan(x) else x for x in numbers))
                 for label, numbers in zip(labels, [*a["numbers"].tolist(), a["uniform"].tolist()])]
    print(f"{len(bases)} windows of {bases.shape[1]} bases, the same for all, {sampled}")
    columns = ["to [CLS]", "to [SEP]", f"to +-{REACH} k-mers", "entropy", "contrast"]
    print_markdown(["checkpoint", "layer", *columns], rows)
    return {"": draw_attention(found, place), "_maps": draw_maps(found)}


def plot_masks(args):
    genome = data.open_genome(args.fasta, args.data_dir, args.cache)
    counts = cm_gems.count_kmers(genome.bases, genome.intervals, args.k)
    if counts[-1].sum() < 4 ** args.k:
        raise ValueError(f"--fasta {args.fasta[0]}: {counts[-1].sum()} {args.k}-mers are too few for "
                         f"an NPMI table; give more sequence or a smaller --k")
    bases, _, sampled = random_windows(genome, 1000, 509 + args.k, args.k)     # 510 k-mers, as in pretraining
    print(f"{len(bases)} windows of {bases.shape[1]} bases {sampled}")
    rows = mask_rows(bases, cm_gems.npmi_rank(cm_gems.npmi(counts)), args.k)
    print_markdown(["masking", "masked", "bases hidden"], [
        (name, masked, float((share == 1).mean())) for name, masked, share in rows])
    hidden = np.stack([share == 1 for _, _, share in rows])  # (rows, n, L)
    means = hidden.mean((1, 2))
    n = abs(hidden[..., :SHOWN].mean(2) - means[:, None]).sum(0).argmin()      # sequence closest to the mean
    share = np.stack([share[n, :SHOWN] for _, _, share in rows])[..., None]    # (rows, L, 1)
    fig, [ax] = new_figure(1, 1, 8, 0.22 * len(rows) + 0.9)
    ax.imshow(np.where(share == 1, COLORS[1], 1 - 0.75 * share * (1 - COLORS[0])), aspect="auto",
              interpolation="nearest")
    ax.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    ax.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    ax.grid(axis="y", which="minor", color="white", lw=3)
    ax.tick_params(which="both", length=0)
    for i, (_, masked, _) in enumerate(rows):
        ax.text(share.shape[1], i, f"{masked:.1%} masked, {means[i]:.1%} hidden", va="center")
    ax.set(xlabel=f"base of a sequence from {os.path.basename(args.fasta[0])}",
           title="Blue: some tokens on the base are masked; orange: all are, it is hidden. Right: mean over "
                 f"{hidden.shape[1]:,} sequences")
    return {"": fig}


def plot_results(args):
    ours, papers = result_points(*args.paths)
    points = [(model, *key, *point) for model, cells in ours.items() for key, point in cells.items()]
    print_markdown(["model", "task", "shots", "metric", "100 x mean", "sd", "seeds"], points)
    figures = {}
    if any(not point[2] for point in points):
        figures[""] = draw_results(ours, papers)
    if any(point[2] for point in points):
        figures["_shots"] = draw_shots(ours)
    return figures


def plot_comparisons(args):
    found = {name: [x for x in map(evidence.compare, lines) if x.gaps is not None]
             for name, lines in evidence.planned_comparisons().items()}
    print_markdown(["experiment", "claim", "mode", "difference", "low", "high", "verdict"], [
        (name, x.claim, x.mode, float(x.gaps.mean()), *map(float, x.interval), x.verdict)
        for name, comparisons in found.items() for x in comparisons])
    return {"": draw_comparisons(found)}


def parse_args():
    parser = training.make_parser(__doc__)
    figures = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")
    for plot in (plot_loss, plot_embeddings, plot_attention, plot_masks, plot_results, plot_comparisons):
        name = plot.__name__.removeprefix("plot_")
        figure = figures.add_parser(name, allow_abbrev=False)
        figure.set_defaults(plot=plot)
        add = figure.add_argument
        if name in ("loss", "embeddings", "attention"):
            add("paths", type=file_name, nargs="+",
                help="run folders" if name == "loss" else "checkpoints or hf:FOLDER")
            add("--names", nargs="+", help="their labels (default: the paths)")
        if name == "results":
            add("paths", type=file_name, nargs=1, help="output folder of finetune.py")
        if name == "attention":
            add("--fasta", type=file_name, nargs="+", required=True, help="sequences to attend to")
            add("--windows", type=training.number(int, 1), default=64, help="random windows (%(default)s)")
            add("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
        if name == "masks":
            add("--fasta", type=file_name, nargs="+", default=["demo"],
                help="sequences to mask (demo)")
            add("--data_dir", type=folder_name, default="data",
                help="folder of the demo genome (%(default)s)")
            add("--k", type=training.number(int, 2, 9), default=6, help="k of the k-mers (%(default)s)")
        if name in ("attention", "masks"):
            add("--cache", type=folder_name, help="folder for packed genomes (default: beside the FASTA)")
        add("--out", type=file_name, default=f"out/figures/{name}",
            help="file without .png or .pdf (%(default)s)")
        add("--dpi", type=training.number(int, 20, 2000), default=200, help="of the PNG (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    with training.user_errors():
        args = parse_args()
        if not os.path.basename(args.out) or args.out.endswith((".png", ".pdf")):
            raise ValueError(f"--out {args.out!r}: not a file name; give one without .png or .pdf")
        for suffix, fig in args.plot(args).items():
            write_figure(fig, args.out + suffix, args.dpi)
