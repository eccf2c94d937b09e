"""A network from --init, and what it makes of sequences: its inputs, outputs and embeddings; what finetune.py
does at --predict, --embed and --export."""
import collections
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import warnings

import numpy as np
import torch
from scipy import special

from tools import card
import data
import models
from tools import table
import training

LONGEST = 1 << 20                                            # bases of a sequence in one piece


def cut_windows(lengths, spec):
    """Sequence lengths -> (owner, first, n) of the token windows: sequence, first base, number of k-mers.

    Each k-mer is in one window of at most block_size - 2; with long 'truncate' the first window is all.
    """
    room = spec["bert"]["block_size"] - 2
    n = np.maximum((lengths - spec["k"]) // spec["stride"] + 1, 0)
    windows = np.ones_like(n) if spec["long"] == "truncate" else np.maximum(-(-n // room), 1)
    owner = np.repeat(np.arange(len(n)), windows)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(windows) - windows, windows)
    return owner, nth * room * spec["stride"], np.minimum(n[owner] - nth * room, room)


def get_tokens(bases, starts, n, spec):
    """n k-mers from each start in the flat codes -> tokens (B, T), mask (B, T) or None where all are alike.

    Else T is a multiple of 32 (or block_size): few shapes, few [PAD] (64: 18 % of the tokens, 32: 12 %, on
    the lengths of human_enhancers_ensembl).
    """
    longest, alike = max(int(n.max()), 1), n.min() == n.max() > 0
    T = longest if alike else min(-(-(longest + 2) // 32) * 32, spec["bert"]["block_size"]) - 2
    starts, n = (torch.from_numpy(x).to(bases.device, non_blocking=True)[:, None] for x in (starts, n))
    at = starts + torch.arange((T - 1) * spec["stride"] + spec["k"], device=bases.device)
    tokens = data.kmer_tokens(bases[at.clamp_(max=len(bases) - 1)], spec["k"], spec["stride"], specials=True)
    if alike:
        return tokens, None
    at = torch.arange(T + 2, device=bases.device)
    return tokens.masked_fill(at == n + 1, data.SEP).masked_fill(at > n + 1, data.PAD), at < n + 2


def get_inputs(rows, index, spec):
    """Sequences of rows (bases on the device) as the network takes them: tokens, mask, owner; a mixer:
    one-hot bases, lengths (None where all are alike); a CNN: bases."""
    starts, lengths, device = rows.offsets[index], np.diff(rows.offsets)[index], rows.bases.device
    if spec["kind"] == "cnn":
        at = torch.arange(spec["length"], device=device)
        starts, lengths = (torch.from_numpy(x).to(device)[:, None] for x in (starts, lengths))
        return [rows.bases[(starts + at).clamp_(max=len(rows.bases) - 1)].masked_fill(at >= lengths, 4)]
    if spec["kind"] == "mixer":
        alike = lengths.min() == lengths.max()               # else few shapes: a multiple of 64
        longest = int(lengths.max()) if alike else -(-int(lengths.max()) // 64) * 64
        n_cls = spec["n_cls"] if spec["pool"] == "cls" else 0
        at = torch.arange(longest + n_cls, device=device)
        starts, lengths = (torch.from_numpy(x).to(device)[:, None] for x in (starts, lengths))
        bases = rows.bases[(starts + at).clamp_(max=len(rows.bases) - 1)]
        return [data.one_hot(bases.masked_fill(at >= lengths, data.BLANK)),
                None if alike else lengths[:, 0] + n_cls]
    owner, first, n = cut_windows(lengths, spec)
    tokens, mask = get_tokens(rows.bases, starts[owner] + first, n, spec)
    return [tokens, mask, None if len(owner) == len(index) else torch.from_numpy(owner).to(device)]


def pieces(index, lengths, spec, most):
    """Splits an index array where `most` windows fill a forward pass; a sequence stays whole."""
    if spec["kind"] == "cnn":
        return np.split(index, range(most, len(index), most))
    windows = -(-lengths[index] // spec["mixer"]["length"]) if spec["kind"] == "mixer" else \
        np.bincount(cut_windows(lengths[index], spec)[0])    # a mixer: as many as would hold the bases
    cuts, full = [], 0
    for i, n in enumerate(windows.tolist()):
        if full and full + n > most:
            cuts.append(i)
            full = 0
        full += n
    return np.split(index, cuts)


def on_device(rows, device, labels=None):
    """Rows with their bases on the device, and these labels."""
    return rows._replace(bases=torch.from_numpy(rows.bases).to(device), labels=labels)


@torch.no_grad()
def apply(function, rows, spec, most):
    """function(*inputs) of all sequences, of like lengths together: float32 array, in the order of rows."""
    lengths = np.diff(rows.offsets)
    order = np.argsort(lengths, kind="stable")
    with torch.autocast(rows.bases.device.type, torch.bfloat16, enabled=spec["dtype"] == "bfloat16"):
        parts = [function(*get_inputs(rows, index, spec)).float()
                 for index in pieces(order, lengths, spec, most)]
    return torch.cat(parts).cpu().numpy()[np.argsort(order)]


def pooled(bert, pool):
    """A function for apply() that embeds: mean over the k-mers, or [CLS] (of several windows: their mean)."""
    def function(tokens, mask, owner):
        x = bert.encode(tokens, mask)                        # (B, T, C)
        real = (tokens == data.UNK) | (tokens > data.MASK) if pool == "mean" else tokens == data.CLS
        total, n = (x * real[..., None]).sum(1), real.sum(1).float()
        if owner is not None:
            empty = total.new_zeros(int(owner[-1]) + 1, total.shape[1])
            total, n = empty.index_add(0, owner, total.float()), empty[:, 0].float().index_add(0, owner, n)
        return total / n.clamp(min=1)[:, None]
    return function


def embedder(net, pool):
    """A function for apply() that embeds sequences with a classifier, without its head."""
    return net.embed if isinstance(net, models.BaseClassifier) else pooled(net.bert, pool)


@torch.no_grad()
def per_base(net, rows, spec, most):
    """Embedding of every base (len(rows.bases), C), fp32; of a Bert the mean over the k-mers that hold it."""
    total, lengths = torch.zeros(len(rows.bases), net.out.in_features), np.diff(rows.offsets)
    count = torch.zeros(len(rows.bases), 1)
    for index in pieces(np.arange(len(lengths)), lengths, spec, most):
        if spec["kind"] == "mixer":
            x, starts, n, k, stride = net.outputs(*get_inputs(rows, index, spec)), rows.offsets[index], \
                lengths[index], 1, 1
        else:
            owner, first, n = cut_windows(lengths[index], spec)
            starts, k, stride = rows.offsets[index][owner] + first, spec["k"], spec["stride"]
            x = net.bert.encode(*get_tokens(rows.bases, starts, n, spec))[:, 1:-1]
        x = x.float().cpu()                                  # (B, T, C)
        at, starts, n = torch.arange(x.shape[1]), *map(torch.from_numpy, (starts, n))
        real = at < n[:, None]
        at = (starts[:, None] + at * stride)[real]           # first bases of the k-mers
        for offset in range(k):
            total.index_add_(0, at + offset, x[real])
            count.index_add_(0, at + offset, torch.ones(len(at), 1))
    return (total / count.clamp(min=1)).numpy()


def check_spec(spec, weights):
    """An exception where a network of this spec has not these weights; takes no memory, whatever it says."""
    sizes = spec.get("bert") or spec.get("mixer") or {}
    if sizes.get("n_layer", 0) > len(weights) or spec["kind"] == "bert" and not (
            spec["k"] == models.BertConfig(**sizes).k and 1 <= spec["stride"] <= spec["k"]):
        raise LookupError("other sizes than its weights")
    if "classes" in spec and (type(spec["regression"]) is not bool or len(spec["classes"]) != spec["n_out"]):
        raise LookupError("other classes than outputs")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")                      # that nothing is copied
        build_net({"n_out": 1, "pool": "mean", "head": "linear", "n_blocks": None} | spec, weights)


def read_checkpoint(path, args):
    """A checkpoint of ours -> (spec, weights). Of FinDNA's two networks the one that --eval_network names."""
    state = training.load(path)
    spec, weights, method = state["config"], state["model"], state["method"]
    network = args.eval_network or ("teacher" if "teacher" in state else "student")
    if method == "findna" and network not in ("student", *state):
        raise ValueError(f"--eval_network teacher: {path} was pretrained without one; use student")
    try:
        if method == "findna":
            weights = {name: t for name, t in state.get(network, weights).items() if "backbone" in name}
            spec = {"kind": "mixer", "mixer": spec, "n_cls": spec["length"] - state["args"]["length"]}
        elif method != "finetune":
            config = models.BertConfig(**spec)
            spec = {"kind": "bert", "bert": dataclasses.asdict(config), "k": config.k,
                    "stride": state["args"].get("stride", 1)}
        check_spec(spec, weights)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise ValueError(f"--init {path}: not a model of these scripts ({e!r:.80}); use another") from None
    return spec, weights


def read_init(init, args):
    """--init -> (spec, weights or None, name, fingerprint). spec rebuilds the network, and is stored."""
    spec, weights, config, name = {"kind": init}, None, None, init
    if init == "random":
        config = models.BertConfig(4 ** args.k + 5, args.block_size, args.n_layer, args.n_head, args.n_embd,
                                   4 * args.n_embd, 0.1)
        name = f"random {args.n_layer}x{args.n_embd} h{args.n_head} k{args.k}"
    elif init.startswith("hf:"):
        model = models.load_hf(init[3:])
        config, weights = model.config, model.state_dict()
    elif init.startswith("random:"):                         # the architecture of a checkpoint, only
        spec = {name: value for name, value in read_checkpoint(init[7:], args)[0].items()
                if name not in ("classes", "regression")}
    elif init not in ("cnn", "kmer"):
        spec, weights = read_checkpoint(init, args)
    if config:
        spec = {"kind": "bert", "bert": dataclasses.asdict(config), "k": config.k, "stride": 1}
    if args.stride and spec["kind"] == "bert":
        spec["stride"] = args.stride
    digest = hashlib.sha256()
    for tensor in (weights or {}).values():
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return spec, weights, name, digest.hexdigest()[:12]


def build_net(spec, weights=None, seed=42):
    """The network of a spec: a fine-tuned one as it is, else a new head on pretrained or random weights."""
    training.seed(seed)
    if spec["kind"] == "cnn":
        net = models.Cnn(spec["length"], spec["n_out"])
    elif spec["kind"] == "mixer":
        net = models.BaseClassifier(models.make_backbone(spec["mixer"]), spec["n_out"], spec["n_cls"] * (
            spec["pool"] == "cls"), spec["head"] == "mlp", spec["n_blocks"])
    else:
        net = models.Classifier(models.Bert(models.BertConfig(**spec["bert"])), spec["n_out"])
    if weights and "classes" in spec:
        net.load_state_dict(weights)
    elif weights:                                            # pretrained, or of a classifier without its head
        body, prefix = (net.backbone, "backbone.") if spec["kind"] == "mixer" else (net.bert, "bert.")
        body.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in weights.items()
                              if not name.startswith(("pooler.", "hidden.", "out."))})
    return net


def count_lengths(lengths, spec):
    """Counts of the sequences that do not fit the network: cut, in several windows, without a k-mer."""
    if spec["kind"] == "mixer":
        return {}
    if spec["kind"] != "bert":
        return {"truncated": int((lengths > spec.get("length", math.inf)).sum())}
    most = (spec["bert"]["block_size"] - 3) * spec["stride"] + spec["k"]       # bases of one window
    return {"truncated" if spec["long"] == "truncate" else "in_windows": int((lengths > most).sum()),
            "shorter_than_k": int((lengths < spec["k"]).sum())}


def read_sequences(path, window, step):
    """FASTA or table -> (id, codes) of each sequence (of a table: its number), or of the windows of each."""
    if os.path.splitext(path.removesuffix(".gz"))[1].lower() in data.DELIMITER:
        texts = data.read_table(path, labels=False)[0]
        records = ((str(i), data.encode(text)) for i, text in enumerate(texts, 1))
    else:
        data.check_file(path)
        records = ((name, codes) for name, codes, _ in data.fasta_records(path))
    for name, codes in records:
        if len(codes) > LONGEST and not window:
            raise ValueError(f"{path}: {name} has {len(codes):,} bases; give --window (and --step)")
        last = len(codes) - window if window else 0          # start of the last window, flush with the end
        for start in [*range(0, last, step or 1), last] if last > 0 else [0]:
            part = codes[start:start + window] if window else codes
            yield f"{name}:{start}-{start + len(part)}" if window else name, part


def read_blocks(path, args, size=1 << 24):
    """(ids, Rows) of read_sequences, about `size` bases at a time."""
    ids, parts, total = [], [], 0
    for name, codes in itertools.chain(read_sequences(path, args.window, args.step), [(None, ())]):
        if ids and (name is None or total + len(codes) > size):
            yield ids, data.rows_of(np.concatenate(parts), [len(part) for part in parts], None, {})
            ids, parts, total = [], [], 0
        ids.append(name)
        parts.append(codes)
        total += len(codes)


def read_model(args):
    """The one --init of --predict, --embed, --export: (spec, net on the CPU)."""
    if len(args.init) != 1 or args.init[0] in ("random", "cnn", "kmer") or args.init[0][:7] == "random:":
        raise ValueError(f"--init {' '.join(args.init)}: give one checkpoint, or hf:FOLDER")
    spec, weights, *_ = read_init(args.init[0], args)
    spec = {"long": "chunk", "n_out": 1, "pool": args.pool, "head": "linear", "n_blocks": None} | spec | {
        "dtype": args.dtype}
    return spec | ({"long": args.long} if args.long else {}), weights


@contextlib.contextmanager
def new_file(args, path, suffix):
    """A binary file that becomes --out once it is whole; by default named after the input, in this folder."""
    out = args.out or os.path.splitext(os.path.basename(path).removesuffix(".gz"))[0] + suffix
    if os.path.exists(out):
        raise ValueError(f"--out {out}: exists already; name another file")
    try:
        with open(out + ".tmp", "wb") as f:
            yield f
        os.replace(f.name, out)
        print(f"wrote {out}")
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(out + ".tmp")


def predict(args, device):
    """--predict: a TSV of id, length and class with probabilities, or values of a regression."""
    spec, weights = read_model(args)
    if "classes" not in spec:
        raise ValueError(f"--init {args.init[0]}: not fine-tuned; make a classifier with --task or --csv")
    net, names = build_net(spec, weights).to(device).eval(), spec["classes"]
    odd = collections.Counter()
    with new_file(args, args.predict, ".predictions.tsv") as file, io.TextIOWrapper(file) as f:
        heads = names if spec["regression"] else ["class", *(f"p_{name}" for name in names)]
        f.write("\t".join(["id", "length", *heads]) + "\n")
        for ids, rows in read_blocks(args.predict, args):
            outputs = apply(net, on_device(rows, device), spec, args.micro_batch_size)
            values = outputs if spec["regression"] else special.softmax(outputs, 1)
            for name, length, row in zip(ids, np.diff(rows.offsets), values):
                cells = [] if spec["regression"] else [names[row.argmax()]]
                f.write("\t".join([name, str(length), *cells, *(f"{value:.6g}" for value in row)]) + "\n")
            odd.update({"sequences": len(ids), "with_n": rows.notes["with_n"]})
            odd.update(count_lengths(np.diff(rows.offsets), spec))
    print(", ".join(f"{name} {count:,}" for name, count in odd.items()))


def embed(args, device):
    """--embed: an .npz of ids and embeddings (n, C); --per_base: also of all bases, with their offsets."""
    spec, weights = read_model(args)
    if spec["kind"] == "cnn":
        raise ValueError(f"--init {args.init[0]}: has no embeddings to give; use a Bert or a ChordMixer")
    spec["pool"] = args.pool
    net = build_net(spec, weights).to(device).eval()
    ids, found, bases, offsets = [], [], [], [np.zeros(1, np.int64)]
    with new_file(args, args.embed, ".npz") as f:
        for names, rows in read_blocks(args.embed, args):
            rows = on_device(rows, device)
            ids += names
            found.append(apply(embedder(net, args.pool), rows, spec, args.micro_batch_size))
            if args.per_base:
                bases.append(per_base(net, rows, spec, args.micro_batch_size))
                offsets.append(rows.offsets[1:] + offsets[-1][-1])
        arrays = {"ids": np.array(ids), "embeddings": np.concatenate(found)}
        if args.per_base:
            arrays |= {"per_base": np.concatenate(bases), "offsets": np.concatenate(offsets)}
        np.savez(f, **arrays)
    print(", ".join(f"{name} {array.shape}" for name, array in arrays.items()))


def recorded(init, state):
    """Scores of a fine-tuned checkpoint in its results.jsonl, else the last losses in the log beside it."""
    numbers = [row["test"] | {"task": row["task"], "seed": row["seed"]} for row in
               table.read_rows(os.path.dirname(os.path.dirname(init))) if state.get("id") == row["id"]]
    log = os.path.join(os.path.dirname(init), "log.jsonl")
    rows = open(log, errors="replace").readlines() if not numbers and os.path.exists(log) else []
    rows = [row for row in rows if row.startswith('{"step": ') and row.endswith("}\n")]      # whole ones
    if rows:
        last = json.loads(rows[-1])
        return {name: value for name, value in last.items() if "val" in name or name in ("step", "loss")}
    return numbers


def export(args):
    """--export: a folder for others: a Bert in the Hugging Face layout, a ChordMixer with how to load it."""
    spec, weights = read_model(args)
    if spec["kind"] == "cnn":
        raise ValueError(f"--init {args.init[0]}: a CNN is not exported; use a Bert or a ChordMixer")
    state = {"method": "hf", "step": "unknown", "data": "unknown", "args": {"init": args.init[0]}}
    state = state if args.init[0].startswith("hf:") else training.load(args.init[0])
    net = build_net(spec, weights)
    text = card.model_card(state, spec, args.export, recorded(args.init[0], state))
    if spec["kind"] == "mixer":
        keep = net.state_dict() if "classes" in spec else {
            name: tensor for name, tensor in net.state_dict().items() if name.startswith("backbone.")}
        models.save_folder(args.export, keep, {"config.json": spec, "README.md": text})
    elif "classes" in spec:
        models.save_hf(net, args.export, spec["classes"], spec["regression"], text)
    else:
        models.save_hf(net.bert, args.export, card=text)
    print(f"{args.init[0]} -> {args.export}")
