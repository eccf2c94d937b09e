"""Fine-tune, probe and use a pretrained model: every downstream task of the papers, or your own table.

    python finetune.py --demo                                         no data; after randommask.py --demo
    python finetune.py --task emp --init out/randommask/last.pt       a group, by the RandomMask protocol
    python finetune.py --task pd/tata --init hf:DNA_bert_6 random cnn kmer     what does pretraining add?
    torchrun --nproc_per_node 8 finetune.py --task gue28 --seeds 5    8 GPUs share the runs; again: it goes on
    python finetune.py --csv my.csv --init out/randommask/last.pt     your own: columns sequence, label
    python finetune.py --predict new.fa --init out/finetune/csv_my/randommask.pt     TSV of classes
    python finetune.py --embed new.fa --init out/randommask/last.pt   .npz of embeddings
    python finetune.py --table                                        all results beside the papers'
"""
import argparse
import contextlib
import datetime
import hashlib
import itertools
import json
import math
import os
import signal
import sys
import time
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from sklearn import linear_model, metrics, pipeline, preprocessing
from tqdm import tqdm

import data
import infer
from tools import table
import training
from training import number

BETAS, EPS = (0.9, 0.999), 1e-8                              # AdamW: DNABERT-2, Liang et al., GeneMask
SORTED = 50                                                  # batches that are sorted by length together
KMER = 5                                                     # of the k-mer floor (--init kmer)

# warmup: an int is steps, a float a share of them; eval_every 0: once an epoch; select: score or loss on dev
# (the best evaluation is tested, once) or last (no dev); val: the share of train that is dev where there is
# none; dropout None: the model's own
BASE = dict(batch_size=32, lr=3e-5, weight_decay=0.01, epochs=10, max_steps=0, warmup=0.1, schedule="linear",
            grad_clip=1.0, eval_every=0, select="score", patience=0, val=0.1, dropout=None, seeds=1)
# DNABERT-2's run_dnabert1.sh: epochs, warm-up steps, evaluation interval; best dev loss
DNABERT2 = {group: dict(epochs=epochs, warmup=warmup, eval_every=every) for group, epochs, warmup, every in (
    ("emp", 3, 50, 200), ("cpd", 4, 50, 400), ("cpd/tata", 10, 50, 200), ("pd", 4, 50, 400),
    ("pd/tata", 10, 50, 200), ("ssp", 5, 50, 200), ("covid", 9, 50, 200), ("tf_m", 5, 30, 200),
    ("tf_h", 3, 30, 200))}
DNABERT2["tf_m"]["max_steps"] = 1000                         # there it takes the place of the epochs
PROTOCOLS = {                                                # name: (numbers, those of a group or task)
    # Liang et al. Table 4; warm-up, decay, clip and choice by dev score are DNABERT-2's habits (unstated)
    "randommask": (BASE | dict(weight_decay=0.0, warmup=50), {
        "emp": dict(epochs=100), "tf_m": dict(epochs=10), "tf_h": dict(epochs=10), "cpd": dict(epochs=10),
        "pd": dict(epochs=5), "ssp": dict(epochs=10), "eap": dict(epochs=10, batch_size=64)}),
    "dnabert2": (BASE | dict(select="loss"), DNABERT2),
    "cmgems": (BASE | dict(select="loss"), DNABERT2),        # Roy et al.: the same; 2 GPUs x 8 x 2 = 32
    # GeneMask Script-B: no dev set, the last epoch is tested; by shots, see get_protocol; ten draws
    "fewshot": (BASE | dict(select="last", dropout=0.1, seeds=10), {}),
    # Yu et al. 4.3, 4.4: 30 % warm-up, cosine; MTcDNA's are unstated: EMP's
    "findna": (BASE | dict(warmup=0.3, schedule="cosine"), {
        "gb": dict(batch_size=1024, lr=0.01, weight_decay=0.1, epochs=50),
        "emp": dict(lr=5e-4, epochs=20, dropout=0.1), "covid": dict(batch_size=256, lr=1e-3, epochs=100),
        "mtcdna": dict(lr=5e-4, epochs=20)}),
    # Martinek et al.: early stopping on validation loss, 5 repeats; unstated: its 10 %, patience 3, epochs
    "martinek": (BASE | dict(batch_size=48, weight_decay=0.1, lr=2e-4, select="loss", patience=3, seeds=5),
                 {}),
    "strict": (BASE, {})}                                    # ours: dev from train, test once, MCC
CNN = dict(batch_size=32, lr=1e-3, weight_decay=0.0, warmup=0, schedule="constant",   # GB's Adam
           grad_clip=1e9)
DEFAULT_PROTOCOL = {"GUE": "randommask", "DeepSTARR": "randommask", "GenomicBenchmarks": "martinek",
                    "MTcDNA": "findna", "few-shot": "fewshot"}                         # others: strict
SCHEDULES = {"linear": training.linear, "cosine": training.cosine, "constant": lambda *_: 1.0}
FLAGS = ("batch_size", "lr", "weight_decay", "epochs", "warmup", "dropout")            # override a protocol
MIXER = {"pool": "mean", "head": "linear", "blocks": "all", "eval_network": None}      # defaults of flags
DEMO = dict(task=["demo"], k=3, block_size=34, n_layer=2, n_head=4, n_embd=64, lr=1e-3, epochs=4)


def get_protocol(name, task, shots, init, flags):
    """The numbers of a protocol for one task: its own, the group's, the task's, few-shot's, CNN's, flags."""
    base, other = PROTOCOLS[name]
    p = base | other.get(task.split("/")[0], {}) | other.get(task, {})
    if name == "fewshot":                                    # GeneMask Script-B
        p |= dict(batch_size=5, lr=1e-4, epochs=20) if (shots or 0) <= 100 else \
            dict(batch_size=15, lr=5e-5, epochs=5)
    if "epochs" in flags:
        p |= {"max_steps": 0}
    return p | (CNN if init == "cnn" else {}) | flags


def main_metric(protocol, task):
    """Martinek et al. give the F1 of the positive class; strict balances classes (MCC); else the task's."""
    if task.regression:
        return "pcc"
    if protocol == "martinek":
        return "f1_binary" if len(task.classes) == 2 else "f1_macro"
    return "mcc" if protocol == "strict" else task.metric


def scores(outputs, labels, task):
    """Outputs (n, n_out), labels -> {metric: value}; None where undefined (PCC of a constant prediction).

    ArithmeticError when an output is not finite.
    """
    if not np.isfinite(outputs).all():
        raise ArithmeticError(f"{task.name}: the outputs are not finite; lower --lr")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                      # of constant predictions: None, and flagged
        if task.regression:
            pcc, rho = ([of(x, y)[0] if len(x) > 1 else math.nan for x, y in zip(outputs.T, labels.T)]
                        for of in (stats.pearsonr, stats.spearmanr))
            row = {"pcc": np.mean(pcc), "spearman": np.mean(rho), "mse": np.mean((outputs - labels) ** 2)}
            row |= {f"pcc_{name}": value for name, value in zip(task.classes, pcc)} if len(pcc) > 1 else {}
        else:
            guess = outputs.argmax(1)
            row = {"mcc": metrics.matthews_corrcoef(labels, guess),
                   "acc": metrics.accuracy_score(labels, guess),
                   "f1_macro": metrics.f1_score(labels, guess, average="macro"),
                   "balanced_acc": metrics.balanced_accuracy_score(labels, guess)}
            if len(task.classes) == 2:
                row |= {"f1_binary": metrics.f1_score(labels, guess),
                        "auroc": metrics.roc_auc_score(labels, outputs[:, 1] - outputs[:, 0])}
    return {name: float(value) if math.isfinite(value) else None for name, value in row.items()}


def epoch_batches(lengths, batch_size, seed, epoch):
    """Index arrays of one epoch, a function of (seed, epoch): shuffled, sorted by length within parts."""
    rng = np.random.default_rng((seed, epoch))
    order, batches = rng.permutation(len(lengths)), []
    for part in np.split(order, range(SORTED * batch_size, len(order), SORTED * batch_size)):
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += np.split(part, range(batch_size, len(part), batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]


def kmer_counts(rows):
    """Counts of the 5-mers without N: float32 (n, 1024)."""
    ids = data.kmer_tokens(torch.from_numpy(rows.bases)[None], KMER, 1)[0].numpy()
    parts = (ids[start:max(end - KMER + 1, start)] for start, end in zip(rows.offsets, rows.offsets[1:]))
    return np.stack([np.bincount(part, minlength=4 ** KMER + 5)[5:].astype(np.float32) for part in parts])


def fit_linear(train, labels, test, task):
    """scikit-learn's logistic regression (regression: ridge) on standardised features: outputs on test."""
    model = linear_model.RidgeCV(np.logspace(-1, 5, 7)) if task.regression else \
        linear_model.LogisticRegression(max_iter=1000, C=0.01)
    model = pipeline.make_pipeline(preprocessing.StandardScaler(), model).fit(train, labels)
    if task.regression:
        return model.predict(test).reshape(len(test), -1)
    outputs = model.decision_function(test)
    return outputs if outputs.ndim > 1 else np.stack([-outputs, outputs], 1) / 2


def loss_of(outputs, labels, reduction):
    """Cross-entropy of class ids; for float targets the mean squared error."""
    if labels.dtype == torch.int64:
        return F.cross_entropy(outputs, labels, reduction=reduction)
    return F.mse_loss(outputs, labels, reduction=reduction) / (labels.shape[1] if reduction == "sum" else 1)


def train_batch(net, rows, labels, index, spec, most):
    """Forward and backward of one batch, `most` windows at a time; (loss sum, sequences) on the device."""
    total, lengths, device = 0, np.diff(rows.offsets), rows.bases.device
    for piece in infer.pieces(index, lengths, spec, most):
        with torch.autocast(device.type, torch.bfloat16, enabled=spec["dtype"] == "bfloat16"):
            outputs = net(*infer.get_inputs(rows, piece, spec))
        loss = loss_of(outputs.float(), labels[torch.from_numpy(piece).to(device, non_blocking=True)], "sum")
        (loss / len(index)).backward()
        total += torch.stack([loss.detach(), loss.new_full((), len(piece))])   # new_tensor would sync a GPU
    return total


def select(net, dev, task, run, best, step, args):
    """Evaluates on dev; keeps in best the weights if they are better than any before. A row for the log."""
    key = run["args"]
    net.eval()
    outputs = infer.apply(net, dev, run["config"], args.micro_batch_size)
    net.train()
    loss = loss_of(torch.from_numpy(outputs), torch.from_numpy(dev.labels), "mean").item()
    row = {"loss": loss} | scores(outputs, dev.labels, task)
    value = -loss if key["numbers"]["select"] == "loss" else row[key["metric"]]
    best["worse"] += 1
    if not best["weights"] or value is not None and value > best["value"]:
        weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        best |= {"value": -math.inf if value is None else value, "step": step, "worse": 0, "scores": row,
                 "weights": weights}
    return {"dev_loss": loss, f"dev_{key['metric']}": row[key["metric"]]}


def fine_tune(net, train, dev, task, run, folder, args):
    """The loop: trains net, leaves in it the weights that the protocol selects, returns what happened.

    A function of (seed, step): goes on from the checkpoint in folder as if never stopped. At a stop signal it
    saves and exits with 143. ArithmeticError when the loss is not finite.
    """
    spec, key, p, device = run["config"], run["args"], run["args"]["numbers"], train.bases.device
    lengths, labels = np.diff(train.offsets), torch.from_numpy(train.labels).to(device)
    per_epoch = math.ceil(len(labels) / p["batch_size"])
    steps = p["max_steps"] or per_epoch * p["epochs"]
    warmup = min(p["warmup"] if type(p["warmup"]) is int else round(p["warmup"] * steps), steps)
    optimizer = training.make_optimizer(net, p["lr"], p["weight_decay"], BETAS, EPS)
    done, best = 0, {"value": -math.inf, "step": 0, "worse": 0, "weights": {}, "scores": {}}
    total, batches = torch.zeros(2, device=device), None     # loss sum, sequences since the last evaluation
    if any(os.path.exists(os.path.join(folder, name)) for name in ("last.pt", "prev.pt")):
        state = training.load_run(folder, run, model=net, optimizer=optimizer, total=total)
        done, best = state["step"], state["best"]
    lock, saved = training.open_run(folder, args, done), time.monotonic()      # locked until we return
    bar = tqdm(initial=done, total=steps, unit="step", disable=not sys.stderr.isatty())
    while done < steps and not (p["patience"] and best["worse"] >= p["patience"]):
        (epoch, i), step = divmod(done, per_epoch), done + 1
        if i == 0 or batches is None:
            batches = epoch_batches(lengths, p["batch_size"], key["seed"], epoch)
        training.seed(key["seed"], step)
        for group in optimizer.param_groups:
            group["lr"] = p["lr"] * SCHEDULES[p["schedule"]](step, steps, warmup)
        total += train_batch(net, train, labels, batches[i], spec, args.micro_batch_size)
        norm = training.scale_gradients(net, total.new_ones(()), p["grad_clip"])
        total[0] += 0 * norm                                 # stays NaN once a norm is not finite
        optimizer.step()
        optimizer.zero_grad()
        if step % (p["eval_every"] or per_epoch) == 0 or step == steps:
            loss, n = total.tolist()
            if not math.isfinite(loss):
                raise ArithmeticError(f"{key['task']}: the loss is not finite before step {step}; lower --lr")
            row = {"step": step, "epoch": step / per_epoch, "loss": loss / n}
            training.log(folder, row | (select(net, dev, task, run, best, step, args) if dev else {}))
            total.zero_()
        done, stop = step, training.stop_requested()
        if stop or time.monotonic() - saved > args.save_every:
            state = {"step": step, "model": net.state_dict(), "optimizer": optimizer.state_dict()}
            training.save(run | state | {"best": best, "total": total}, folder)
            saved = time.monotonic()
        if stop:
            print(f"stopped  by a signal after step {step}; the same command goes on from there", flush=True)
            raise SystemExit(143)
        bar.update()
    if dev:
        net.load_state_dict(best["weights"])
    return {"steps": done, "epochs": done / per_epoch, "dev": best["scores"],
            "tested_step": best["step"] or done}


def read_csv(args):
    """--csv -> (Task, splits): one table is split, two are train and test, three train, dev and test."""
    first, *others = args.csv
    if len(others) > 2:
        raise ValueError(f"--csv: {len(args.csv)} tables; give one, train and test, or train, dev and test")
    targets = [name.lower() for name in args.targets or ()]
    if len(set(targets)) < len(targets) or {"sequence", "seq"} & set(targets):
        raise ValueError(f"--targets {' '.join(args.targets)}: give each number column once")
    names = ("train", "dev", "test") if len(others) == 2 else ("train", "test")
    sequences, labels, notes = data.read_table(first, targets=args.targets)
    classes = tuple(args.targets or notes.pop("classes"))
    rows = [data.rows_from(sequences, labels, notes)]
    print(f"{first}: {len(labels):,} rows; {rows[0].notes}", flush=True)
    for path in others:
        sequences, labels, notes = data.read_table(path, classes, args.targets)
        rows.append(data.rows_from(sequences, labels, notes))
    if not others:
        names, rows = ("train", "dev", "test"), data.split_rows(rows[0], args.split, args.seed)
    stem = os.path.basename(first).removesuffix(".gz")
    task = data.Task(f"csv/{os.path.splitext(stem)[0]}", "csv", classes, bool(args.targets),
                     "pcc" if args.targets else "mcc", "", {}, "", first, "yours")
    return task, dict.fromkeys(("train", "dev", "test")) | dict(zip(names, rows))


def fingerprint(splits):
    """Of the sequences and labels of all splits: 12 hex digits."""
    digest = hashlib.sha256()
    for array in (array for rows in splits.values() if rows for array in rows[:3]):
        digest.update(np.ascontiguousarray(array).view(np.uint8))
    return digest.hexdigest()[:12]


def assign(splits, p, seed, linear):
    """What is trained, selected and tested on: ({"train", "dev", "test": Rows or None}, said in words)."""
    (train, dev, test), said = (splits[split] for split in ("train", "dev", "test")), "test"
    if test is None:
        dev, test, said = None, dev, "dev (there is no test)"
    if test is None:
        raise ValueError("neither a test nor a dev split to test on; give one")
    if linear or p["select"] == "last":
        dev = None
    elif dev is None:
        train, dev = data.split_rows(train, (1 - p["val"], p["val"]), seed)
        said += f"; dev is {p['val']:.0%} of train"
    return {"train": train, "dev": dev, "test": test}, said


def count_odd(parts, spec):
    """Counts for the row: what was accepted, cut or repeated in each split. And bool: test rows in train."""
    parts = {split: rows for split, rows in parts.items() if rows}
    odd = {f"{split}_{name}": n for split, rows in parts.items() for name, n in rows.notes.items()}
    train, test = set(data.row_keys(parts["train"])), data.row_keys(parts["test"])
    seen = np.array([key in train for key in test])
    if "dev" in parts:
        dev = set(data.row_keys(parts["dev"]))
        odd["test_in_dev"] = sum(key in dev for key in test)
    odd |= infer.count_lengths(np.concatenate([np.diff(rows.offsets) for rows in parts.values()]), spec)
    return {name: n for name, n in (odd | {"test_in_train": int(seen.sum())}).items() if n}, seen


def trained_outputs(task, parts, spec, weights, run, folder, args, device):
    """Fine-tunes; (outputs on test, how it went). The first seed's model is kept under the task's name."""
    key, parts = run["args"], {split: rows for split, rows in parts.items() if rows}
    if task.regression:                                      # targets are standardised to train
        mean, sd = parts["train"].labels.mean(0), parts["train"].labels.std(0) + 1e-12
        parts = {split: rows._replace(labels=(rows.labels - mean) / sd) for split, rows in parts.items()}
    parts = {split: infer.on_device(rows, device, rows.labels) for split, rows in parts.items()}
    net = infer.build_net(spec, weights, key["seed"]).to(device)
    if args.compile:
        net.compile()
    how = fine_tune(net, parts["train"], parts.get("dev"), task, run, folder, args)
    if task.regression:                                      # back, for good
        with torch.no_grad():
            sd, mean = (torch.as_tensor(x, device=device) for x in (sd, mean))
            net.out.weight.mul_(sd[:, None])
            net.out.bias.mul_(sd).add_(mean)
    if key["seed"] == args.seed:
        name = key["init"].removesuffix("/last.pt").rstrip("/").split("/")[-1].removesuffix(".pt").split()[0]
        name = "random_" * key["init"].startswith("random:") + name.split(":")[-1]
        how["model"] = os.path.join(os.path.dirname(folder), f"{name}.pt")
        with contextlib.suppress(ValueError):                # none, or no model: this one takes the place
            if training.load(how["model"]).get("id") != os.path.basename(folder):
                how["model"] = os.path.join(os.path.dirname(folder), f"{os.path.basename(folder)}.pt")
        os.makedirs(os.path.join(folder, "model"), exist_ok=True)
        state = {"step": how["steps"], "model": net.state_dict(), "optimizer": {},
                 "id": os.path.basename(folder),
                 "config": spec | {"classes": task.classes, "regression": task.regression}}
        training.save(run | state, os.path.join(folder, "model"))
        os.replace(os.path.join(folder, "model", "last.pt"), how["model"])
    net.eval()
    return infer.apply(net, parts["test"], spec, args.micro_batch_size), how


def linear_outputs(parts, spec, weights, seed, task, args, device):
    """Outputs on test of scikit-learn's linear model on 5-mer counts, or on frozen embeddings (probe)."""
    if spec["kind"] == "kmer":
        features = [kmer_counts(parts[split]) for split in ("train", "test")]
    else:
        net = infer.build_net(spec, weights, seed).to(device).eval()
        features = [infer.apply(infer.embedder(net, args.pool), infer.on_device(parts[split], device), spec,
                          args.micro_batch_size) for split in ("train", "test")]
    return fit_linear(features[0], parts["train"].labels, features[1], task)


def run_one(task, splits, key, spec, weights, args, device):
    """One row of results.jsonl, unless it is there: trains by the protocol, tests once."""
    start, linear = time.perf_counter(), spec["kind"] == "kmer" or args.mode == "probe"
    parts, said = assign(splits, key["numbers"], key["seed"], linear)
    body = ("kind", "bert", "k", "stride", "mixer", "n_cls")
    spec = {name: spec[name] for name in body if name in spec} | {
        "long": args.long or "chunk", "dtype": args.dtype, "n_out": len(task.classes)}
    if spec["kind"] == "mixer":
        spec |= {"pool": args.pool, "head": args.head, "n_blocks": None}
        if args.blocks == "log2":                            # as a network made for the longest sequence has
            if "track_size" not in spec["mixer"]:
                raise ValueError(f"--blocks log2: {key['init']} is a transformer; use another --init")
            longest = np.diff(parts["train"].offsets).max() + spec["n_cls"] * (args.pool == "cls")
            spec["n_blocks"] = max(1, int(longest - 1).bit_length())
    if spec["kind"] == "cnn":
        spec["length"] = int(np.diff(parts["train"].offsets).max())
    if spec["kind"] in spec and key["numbers"].get("dropout") is not None:    # a Bert's, a mixer's
        spec[spec["kind"]] = spec[spec["kind"]] | {"dropout": key["numbers"]["dropout"]}
    identity = hashlib.sha256(json.dumps([key, spec], sort_keys=True).encode()).hexdigest()[:8]
    shots = f" {key['shots']}-shot" if key["shots"] else ""
    title = f"{task.name}{shots} | {key['init']} | seed {key['seed']}"
    if identity in {row["id"] for row in table.read_rows(args.out)}:
        print(f"{title} | done before, see {args.out}/results.jsonl", flush=True)
        return
    sizes = {split: len(rows.labels) for split, rows in parts.items() if rows}
    odd, seen = count_odd(parts, spec)
    print(f"{title} | protocol {key['protocol']}\n  rows {sizes}; tested on {said}; {odd or 'nothing odd'}\n"
          f"  classes {dict(enumerate(task.classes))}; {key['numbers']}", flush=True)
    name = f"{task.name}{shots}".replace("/", "_").replace(" ", "_")
    folder, how = os.path.join(args.out, name, identity), {}
    if linear:
        outputs = linear_outputs(parts, spec, weights, key["seed"], task, args, device)
    else:
        run = {"method": "finetune", "config": spec, "data": key["data"],
               "args": key | {"micro_batch_size": args.micro_batch_size}}      # dropout depends on it
        outputs, how = trained_outputs(task, parts, spec, weights, run, folder, args, device)
    test = scores(outputs, parts["test"].labels, task)
    one = len(set(outputs.argmax(1))) == 1
    if task.regression:                                      # or one value, as the targets spread
        one = (outputs.std(0) <= 1e-6 * parts["train"].labels.std(0)).all()
    if 0 < seen.sum() < len(seen):                           # without what train has, too
        how["test_unseen"] = scores(outputs[~seen], parts["test"].labels[~seen], task)
    row = {"id": identity} | key | {
        "score": test[key["metric"]], "collapsed": bool(one), "test": test, "tested_on": said, "rows": sizes,
        "classes": task.classes, "counts": odd, "device": str(device), "stride": 1,
        "seconds": round(time.perf_counter() - start, 1)}
    table.append_row(args.out, row | spec | how)
    for name in ("last.pt", "prev.pt"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(folder, name))
    shown = [f"{name} {value if name == 'mse' else 100 * value:.4g}" for name, value in test.items()
             if value is not None]
    if "test_unseen" in how:
        score = how["test_unseen"][key["metric"]] or 0
        shown.append(f"without rows of train: {key['metric']} {100 * score:.2f}")
    print(f"  test {', '.join(shown)}" + (" | COLLAPSED: one class (or value) for all rows" if one else "")
          + (f" | model {how['model']}" if "model" in how else ""), flush=True)


def plan_runs(args):
    """Every (task name or None, shots, repeat, --init, protocol) asked for. Linear models need no repeats."""
    for name in data.task_names(args.task) if args.task else [None]:
        suite = data.TASKS[name].suite if name else "csv"
        protocol = args.protocol or DEFAULT_PROTOCOL.get(suite, "strict")
        repeats = range(args.seeds or PROTOCOLS[protocol][0]["seeds"])
        few, draws = suite == "few-shot", data.FEW_SHOT[name][1] if name in data.FEW_SHOT else 1
        for shots, repeat, init in itertools.product(args.shots if few else [None], repeats, args.init):
            if repeat < draws or args.mode == "finetune" and init != "kmer":
                yield name, shots, repeat, init, protocol


def read_inits(args):
    """{--init: what read_init gives}. ValueError for what cannot be trained."""
    inits = {init: infer.read_init(init, args) for init in args.init}
    for init, (spec, weights, *_) in inits.items():
        if spec["kind"] == "cnn" and (weights or args.mode == "probe"):
            raise ValueError(f"--init {init}: a CNN starts from nothing, and has nothing to probe; drop it")
    return inits


def run_all(args, inits, runs, device, rank, world):
    """This rank's share of the runs; the exit code. What cannot be read or learnt is said and passed over."""
    flags = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    errors, code, cached = set(), 0, None
    for n, (name, shots, repeat, init, protocol) in enumerate(runs):
        if n % world != rank:
            continue
        if training.stop_requested():                        # in a probe, or after the last step of a run
            print("stopped by a signal; the same command goes on from there", flush=True)
            return 143
        spec, weights, shown, digest = inits[init]
        own = {flag: getattr(args, flag) for flag, default in MIXER.items()
               if spec["kind"] == "mixer" and getattr(args, flag) != default}
        try:
            if cached != (name, shots, shots and repeat):    # a set is read once, a few-shot draw each time
                task, splits = read_csv(args) if args.csv else (data.TASKS[name], data.read_task(
                    name, args.data_dir, shots, repeat % 10, args.fasta))
                cached = name, shots, shots and repeat
            linear = args.mode == "probe" or init == "kmer"
            p = {} if linear else get_protocol(protocol, task.name, shots, init, flags)
            if task.regression and not linear and p["select"] == "score":
                p["select"] = "loss"                         # PCC is blind to the scale
            key = {"task": task.name, "shots": shots, "seed": args.seed + repeat, "init": shown,
                   "weights": digest, "mode": args.mode, "pool": args.pool if args.mode == "probe" else None,
                   "protocol": protocol, "overrides": flags | own, "metric": main_metric(protocol, task),
                   "numbers": p, "data": fingerprint(splits)}
            run_one(task, splits, key, spec, weights, args, device)
        except (ValueError, ArithmeticError) as e:
            code = 3 if isinstance(e, ArithmeticError) else 2
            if str(e) not in errors:                         # of the first repeat
                print(f"error: {training.plain(str(e))}", file=sys.stderr, flush=True)
            errors.add(str(e))
    return code


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, positive = parser.add_argument, number(int, 1)
    what = parser.add_mutually_exclusive_group(required=True).add_argument
    what("--task", nargs="+", help=f"sets (emp/H3) or groups: {' '.join(data.GROUPS)}")
    what("--csv", nargs="+", help="train.csv, or train and test, or train, dev and test: sequence,label")
    what("--predict", metavar="FILE", help="FASTA or table -> TSV of classes and probabilities")
    what("--embed", metavar="FILE", help="FASTA or table -> .npz of embeddings")
    what("--export", metavar="FOLDER", help="write --init in the Hugging Face layout")
    what("--table", action="store_true", help="print and write all results in --out beside the papers'")
    what("--demo", action="store_true", help="a planted motif in synthetic DNA")
    add("--init", nargs="+", default=["random"],
        help="checkpoint, random:CHECKPOINT (its shape), hf:FOLDER, random, cnn, kmer (random)")
    add("--mode", choices=("finetune", "probe"), default="finetune", help="probe: frozen, linear")
    add("--protocol", choices=PROTOCOLS, help="(that of the papers that use the set; csv: strict)")
    add("--seeds", type=positive, help="repeats (the protocol's)")
    add("--seed", type=number(int, 0, 2 ** 31), default=42, help="of the first repeat (%(default)s)")
    add("--shots", type=positive, nargs="+", default=[10], help="few-shot: rows of each class (%(default)s)")
    add("--split", type=fractions, default=(0.8, 0.1, 0.1), help="--csv of one table (.8,.1,.1)")
    add("--targets", nargs="+", metavar="COLUMN", help="--csv: a regression on these columns")
    add("--batch_size", type=positive, help="sequences of a step (the protocol's, as the next five)")
    add("--lr", type=number(float, 1e-30), help="peak learning rate")
    add("--weight_decay", type=number(float, 0), help="not on biases and LayerNorm")
    add("--epochs", type=positive, help="passes over the training sequences")
    add("--warmup", type=number(int, 0), help="steps of linear warm-up")
    add("--dropout", type=number(float, 0, 1), help="(else the model's)")
    add("--micro_batch_size", type=positive, default=128, help="windows of a forward pass (%(default)s)")
    add("--stride", type=positive, help="1 overlapping, k non-overlapping k-mers (as pretrained)")
    add("--long", choices=("chunk", "truncate"), help="above block_size (chunk; else as fine-tuned)")
    add("--k", type=number(int, 1, 9), default=6, help="--init random: its k-mers (%(default)s)")
    add("--block_size", type=number(int, 3), default=512, help="--init random: positions (%(default)s)")
    add("--n_layer", type=positive, default=12, help="--init random: layers (%(default)s)")
    add("--n_head", type=positive, default=12, help="--init random: attention heads (%(default)s)")
    add("--n_embd", type=positive, default=768, help="--init random: width (%(default)s)")
    add("--pool", choices=("mean", "cls"), default="mean", help="probe, embed, FinDNA: mean, [CLS]")
    add("--eval_network", choices=("teacher", "student"), help="FinDNA: which (the teacher if it has one)")
    add("--head", choices=("linear", "mlp"), default="linear", help="FinDNA: its layers (%(default)s)")
    add("--blocks", choices=("all", "log2"), default="all", help="FinDNA: of each layer, all, or the first "
        "log2 of the longest training sequence (%(default)s)")
    add("--per_base", action="store_true", help="embed: each base, too")
    add("--window", type=positive, help="predict, embed: windows of so many bases of each sequence ...")
    add("--step", type=positive, help="... so far apart (the window)")
    add("--data_dir", default="data", help="where the sets lie (%(default)s)")
    add("--fasta", nargs="+", help="GenomicBenchmarks: genome of the coordinate tables")
    add("--out", help="folder of results (out/finetune); predict, embed: the file to write")
    add("--save_every", type=number(float, 0), default=60, help="seconds between checkpoints (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on CUDA")
    add("--compile", action="store_true", help="torch.compile the network")
    if parser.parse_args().demo:
        parser.set_defaults(**DEMO)
    return parser.parse_args()


def fractions(text):
    """'0.8,0.1,0.1' -> three positive floats that sum to 1."""
    parts = [float(part) for part in text.split(",")]
    if len(parts) != 3 or min(parts) <= 0 or not math.isclose(sum(parts), 1):
        raise argparse.ArgumentTypeError(f"{text}: give three shares that sum to 1, as 0.8,0.1,0.1")
    return parts


if __name__ == "__main__":
    with training.user_errors():
        args = parse_args()
        if args.demo:
            torch.set_num_threads(1)
            if os.path.exists("out/demo/last.pt"):
                args.init = ["out/demo/last.pt", "random"] if args.init == ["random"] else args.init
            else:
                print("no out/demo/last.pt (randommask.py --demo makes it): from random weights")
        device, args.dtype, rank, world = training.set_up(args.device, args.dtype, join=False)
        for flag, of in (("step", "window"), ("targets", "csv"), ("per_base", "embed")):
            if getattr(args, flag) and not getattr(args, of):
                raise ValueError(f"--{flag}: belongs to --{of}; add that or drop it")
        if args.out == "":
            raise ValueError("--out '': name a folder, or the file to write")
        args.step = args.step or args.window
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))                # and no half-written file
        if args.predict:
            infer.predict(args, device)
        elif args.embed:
            infer.embed(args, device)
        elif args.export:
            infer.export(args)
        else:
            args.out = args.out or "out/finetune"
            if os.path.exists(args.out) and not os.path.isdir(args.out):
                raise ValueError(f"--out {args.out}: a file; name a folder")
            inits, runs = read_inits(args), list(plan_runs(args))
    if args.table:
        with training.user_errors():
            table.write_table(args.out)
    elif args.task or args.csv:
        training.catch_signals()
        with training.user_errors(OSError, torch.OutOfMemoryError):
            code = run_all(args, inits, runs, device, rank, world)
        if world > 1:                                        # torchrun ends all ranks once one has failed:
            for which in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):      # they leave together
                signal.signal(which, signal.SIG_DFL)
            torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))
            training.finish(code)
        if args.demo and not code:
            print("\nWhat pretraining adds: the same network, from its weights and from random ones:\n")
            table.write_table(args.out)
            print("\nNext, your own table (columns sequence, label) and a checkpoint of randommask.py:\n"
                  "  python finetune.py --csv YOUR.csv --init out/mine/last.pt random kmer --lr 3e-4")
        raise SystemExit(code)
