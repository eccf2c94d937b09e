"""Mutation test, by hand: each of these wrong programs must fail a quick test.

    python tests/mutants.py [-k WORD] [--jobs 2]

Applies one change at a time to a copy of the repository and runs the tests named beside it. Prints the test
that kills each mutant. Exits with 1 if one survives, or if the text to change is not there exactly once.
"""
import argparse
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections import namedtuple
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 600                                                  # seconds for the tests of one mutant
GOLDEN, HELD_OUT = "tests/runs/test_golden_steps.py", "tests/runs/test_held_out.py"
REPEATS = "tests/runs/test_repeats_runs.py"
UNIT = {name: f"tests/unit/test_{name}.py" for name in (
    "before", "bench", "benchmarks", "campaign", "cm_gems", "data", "defaults", "findna", "finetune",
    "finetune_rules", "layers", "messages", "models", "mutagenesis", "pairs", "randommask", "repeats",
    "splits", "strands", "table", "tools", "training", "variants")}
PRECISION, DUE = "tests/runs/test_precision_runs.py", "tests/runs/test_cm_gems_runs.py"
Mutant = namedtuple("Mutant", "file what old new tests")


def mutants(file, tests, changes):
    """changes: {what is wrong: (old, new)} or (old, new, tests)."""
    return [Mutant(file, what, *(change if len(change) == 3 else (*change, tests)))
            for what, change in changes.items()]


MUTANTS = mutants("randommask.py", [GOLDEN, "-k", "randommask"], {
    "validates on training windows": ("forward(model, val, n", "forward(model, train, n"),
    "cosine schedule": ("training.linear(step", "training.cosine(step"),
    "ignores --lr": ("args.lr * training", "1e-4 * training"),
    "warm-up of 5 %": ("PAPER_STEPS else 0.02)", "PAPER_STEPS else 0.05)"),
    "warm-up of 9,600": ("WARMUP = 10_000", "WARMUP = 9_600", [UNIT["defaults"]]),
    "betas of AdamW": ("(0.9, 0.98), 1e-6", "(0.9, 0.999), 1e-6"),
    "eps of AdamW": ("(0.9, 0.98), 1e-6", "(0.9, 0.98), 1e-8"),
    "ignores --weight_decay": ("args.lr, args.weight_decay", "args.lr, 0.01"),
    "ignores --grad_clip": ("args.grad_clip)", "1.0)"),
    "phase 1 throughout": ("lr = phase_at(step, edges)", "lr = phase_at(1, edges)"),
    "mean over sequences": ("run.world / sums[1].clamp(min=1e-9)", "sums.new_ones(()) / args.batch_size"),
    "validates with dropout": ("model.eval()", "model.train()"),
    "no dropout after a validation": ("model.train()", "model.eval()"),
    "the same batch at every step": ("training.seed(args.seed, *key)", "training.seed(args.seed, key[-1])"),
    "--seed is ignored": ("training.seed(args.seed, *key)", "training.seed(42, *key)"),
    "other validation windows each time": ("phase, 0, i))", "phase, step, i))",
                                           [HELD_OUT, "-k", "randommask"]),
    "p of k = 6 for every k": ("MASK_RATE / first_span(k, stride)", "MASK_RATE / 6", [UNIT["defaults"]]),
    "DNABERT's masks by --p": ("args.p if phase else dnabert_p", "args.p"),
    "phase 1 is DNABERT's whatever --p": ("(phase, args.p) == (1, dnabert_p)", "phase == 1"),
    "spans of k tokens at every stride": ("math.ceil(k / stride)", "k", [UNIT["randommask"]]),
    "480,000 steps become 500,000": ("PAPER_STEPS = 480_000", "PAPER_STEPS = 500_000", [UNIT["defaults"]]),
    "an edge belongs to the next phase": ("step > edge", "step >= edge", [UNIT["randommask"]]),
    "spans grow to one side": ("(span - 1) // 2 + half", "(span - 1) // 2", [UNIT["randommask"]]),
    "one span a batch": ("torch.randint(phase, (len(tokens),)", "torch.randint(phase, (1,)",
                         [UNIT["randommask"]])})

MUTANTS += mutants("findna.py", [GOLDEN, "-k", "findna"], {
    "alpha and 1 - alpha swapped": ("(alpha * mnm + (1 - alpha) * cl)", "((1 - alpha) * mnm + alpha * cl)"),
    "teacher with dropout": ("copy.deepcopy(model).eval()", "copy.deepcopy(model)"),
    "ignores --lr": ("args.lr * training", "3e-4 * training"),
    "linear schedule": ("training.cosine(step", "training.linear(step"),
    "warm-up of 5 %": ("complete_warmup(args, 0.3)", "complete_warmup(args, 0.05)"),
    "betas of BERT": ("(0.9, 0.999), 1e-8", "(0.9, 0.98), 1e-8"),
    "eps of BERT": ("(0.9, 0.999), 1e-8", "(0.9, 0.999), 1e-6"),
    "ignores --weight_decay": ("args.lr, args.weight_decay", "args.lr, 3e-4"),
    "lambda a step late": ("(step - 1) / steps", "step / steps"),
    "lambda stays 0.996": ("list(model.parameters()), 1 - ema", "list(model.parameters()), 1 - args.ema"),
    "beta of the released code": ("CENTER_MOMENTUM, EMA = 0.996", "CENTER_MOMENTUM, EMA = 0.9"),
    "temperatures swapped": ("TEMP_STUDENT, TEMP_TEACHER = 0.1, 0.04",
                             "TEMP_STUDENT, TEMP_TEACHER = 0.04, 0.1"),
    "q is not centered": ("(outputs.float() - center)", "outputs.float()"),
    "the teacher sees view u": ("teacher(F.pad(view_v", "teacher(F.pad(view_u"),
    "latent and projected swapped": ("(logits if projected else x)", "(x if projected else logits)"),
    "softmax over the other axis": ('2 if args.cl_softmax == "features" else 1',
                                    '1 if args.cl_softmax == "features" else 2'),
    "means in place of sums": ("(1 - alpha) * cl) / n_masked", "(1 - alpha) * cl) / n_q"),
    "contrastive loss of the latent outputs": ('default="projected"', 'default="latent"', [UNIT["defaults"]]),
    "center of the last micro-batch": ("sums[2:] += outputs", "sums[2:] = outputs"),
    "alpha also without a teacher": ('"mnm": 1.0', '"mnm": args.alpha'),
    "validates on training windows": ("draw_starts(val, n", "draw_starts(train, n"),
    "validates with dropout": ("model.eval()", "model.train()"),
    "no dropout after a validation": ("model.train()", "model.eval()"),
    "ignores --fresh_windows": ("if args.fresh_windows else", "if False else", [HELD_OUT, "-k", "fresh"]),
    "the same order in each epoch": ("default_rng((seed, epoch, 1, 1))", "default_rng((seed, 1, 1))"),
    "masks 15 %": ("MASK_RATE = 0.3 ", "MASK_RATE = 0.15", [UNIT["findna"]]),
    "64 on every number of GPUs": ("args.batch_size // training.read_ranks()[1]", "args.batch_size",
                                   [UNIT["defaults"]]),
    "noise of 0.1": ("EDIT, NOISE, FLIP = 20, 0.2", "EDIT, NOISE, FLIP = 20, 0.1", [UNIT["findna"]]),
    "complement without reversal": ("one_hot[..., :4].flip(1, 2)", "one_hot[..., :4].flip(2)",
                                    [UNIT["findna"]]),
    "other validation windows each time": (
        "seed, 0, i))\n            view_u", "seed, run.step, i))\n            view_u",
        [HELD_OUT, "-k", "findna"]),
    "alpha of 0.9": ('"--alpha", type=number(float, 1e-9, 1), default=0.5',
                     '"--alpha", type=number(float, 1e-9, 1), default=0.9', [UNIT["defaults"]])})

MUTANTS += mutants("cm_gems.py", [GOLDEN, "-k", "cm_gems"], {
    "padding is attended": ("None if whole else inputs != data.PAD", "None"),
    "ignores --lr": ("args.lr * training", "8e-4 * training"),
    "cosine schedule": ("training.linear(step", "training.cosine(step"),
    "warm-up of 2 %": ("complete_warmup(args, 0.05)", "complete_warmup(args, 0.02)"),
    "betas of AdamW": ("(0.9, 0.98), 1e-6", "(0.9, 0.999), 1e-6"),
    "eps of AdamW": ("(0.9, 0.98), 1e-6", "(0.9, 0.98), 1e-8"),
    "ignores --weight_decay": ("args.lr, args.weight_decay", "args.lr, 0.01"),
    "mean over sequences": ("run.world / sums[1].clamp(min=1e-9)", "sums.new_ones(()) / args.batch_size"),
    "never switches": ('update(strategy="global", switch_step', 'update(strategy="genemask", switch_step'),
    "ignores --p_scale": ("scale * center_probability", "center_probability"),
    "DNABERT's masks by --p_scale": ('"random", step, comparable)', '"random", step)'),
    "p of spans of k for GeneMask": ('"genemask": (3 * k - 1) / 2', '"genemask": k'),
    "validates on training windows": ("held_out = val,", "held_out = train,"),
    "validates with dropout": ("model.eval()", "model.train()"),
    "no dropout after a validation": ("model.train()", "model.eval()"),
    "cm_step easy throughout": ('masker = "global" if rng.random() < share', 'masker = "global" if False'),
    "other validation windows each time": ("forward(model, source, strategy",
                                           "forward(model, (*source[:2], step, 1.0), strategy",
                                           [HELD_OUT, "-k", "cm_gems"]),
    "short pieces only": ("2 * (L - k) * quantile", "(L - k) * quantile", [UNIT["cm_gems"]]),
    "switches at an evaluation that is not due": ("if due and may_switch", "if may_switch",
                                                  [DUE, "-k", "due"]),
    "what is not due is remembered": ("        if due:  ", "        if True:  ", [DUE, "-k", "due"]),
    "switches at a drop only": ("abs(perplexities[-1] - perplexities[-2])",
                                "(perplexities[-2] - perplexities[-1])", [UNIT["cm_gems"]]),
    "a stage too early": ("stages * (step - 1) // steps", "stages * step // steps", [UNIT["cm_gems"]]),
    "floor(m / 2) high centers": ("(m + 1) // 2", "m // 2", [UNIT["cm_gems"]]),
    "all high up to 6 centers": ("half < 5", "half < 4", [UNIT["cm_gems"]]),
    "lr of DNABERT": ("lr=8e-4",
                      "lr=4e-4", [UNIT["defaults"]])})

MUTANTS += mutants("data.py", [UNIT["data"]], {
    "70/10/20": ("5 - 8 * n, 5 + 2 * n", "5 - 7 * n, 5 + 3 * n"),
    "a random k-mer of all tokens": ("masked & (draw < 5 + n)", "masked & (draw < 5 + 2 * n)"),
    "spans one to the left": ("& maskable, (right, left))", "& maskable, (right - 1, left + 1))"),
    "spans of a row one to the left": ("(right[:, None] + 1)", "right[:, None]"),
    "centers on special tokens": ("F.pad(maskable, (0, 1)).gather(1, at)", "(at < T)"),
    "any > begins a record": ('if i and record.endswith(b"\\n"):', "if i:"),
    "headers are no lines": ("line += 1 + n_lines", "line += n_lines"),
    "A, C, G, T order": ('b"ATCGN"', 'b"ACTGN"'),
    "trains on what is held out": ("np.stack([start, cut], 1)", "np.stack([start, end], 1)", [HELD_OUT]),
    "holds out 2 %": ("sizes // 100", "sizes // 50", [HELD_OUT]),
    "ignores --val_contigs": ("if val_contigs else sizes", "if False else sizes", [HELD_OUT]),
    "no window at the end of an interval": ("intervals[:, 0] - length + 1", "intervals[:, 0] - length",
                                            [GOLDEN, "-k", "randommask"])})

MUTANTS += mutants("models.py", [UNIT["models"]], {
    "no GELU in the head": ("self.ln_head(F.gelu(self.head(x)))", "self.ln_head(self.head(x))"),
    "no scaling of attention": ("q / math.sqrt(q.shape[-1])", "q"),
    "padding is attended where dropout is": ('masked_fill(~mask, float("-inf"))', "masked_fill(~mask, -1.0)"),
    "positions start at 1": ("self.pos_emb.weight[:T]", "self.pos_emb.weight[-T:]"),
    "LayerNorm eps of torch": ("NORM_EPS = 1e-12", "NORM_EPS = 1e-5"),
    "an export skips by another stride": ("{{1,{stride - 1}}}", "{{1,{stride}}}"),
    "an export passes N over": ('"[ACGTN]", "[acgtn]", [(letter', '"[ACGT]", "[acgtn]", [(letter'),
    "rotates the other way": ("(at + shift) % length", "(at - shift) % length", [UNIT["findna"]])})

MUTANTS += mutants("training.py", [GOLDEN], {
    "gradients pile up": ("optimizer.zero_grad()", "pass"),
    "the lr is never set": ('group["lr"] = lr', "pass"),
    "no clipping": ("(clip / (norm + 1e-6)).clamp(max=1)", "1"),
    "clips each gradient up": (".clamp(max=1)", ""),
    "decays biases and LayerNorm": ('"weight_decay": 0.0}', '"weight_decay": weight_decay}'),
    "linear to 0 at the last step": ("(steps - step + 1) / (steps - warmup + 1)",
                                     "(steps - step) / max(steps - warmup, 1)"),
    "cosine without warm-up": ("done = max(step - warmup, 0) / (steps - warmup + 1)", "done = step / steps"),
    "the same draws for every key": ("torch.default_generator.manual_seed(value)",
                                     "torch.default_generator.manual_seed(0)")})

MUTANTS += mutants("finetune.py", [GOLDEN, "-k", "finetune or seed"], {
    "ignores the weight decay": ('p["lr"], p["weight_decay"]', 'p["lr"], 0.01'),
    "linear schedule throughout": ('SCHEDULES[p["schedule"]]', 'SCHEDULES["linear"]'),
    "ignores the clipping": ('p["grad_clip"])', "1e9)"),
    "ignores the lr": ('p["lr"] * SCHEDULES', "3e-5 * SCHEDULES"),
    "warm-up of 10 % throughout": ('round(p["warmup"] * steps)', "round(0.1 * steps)"),
    "divides by the piece": ("(loss / len(index)).backward()", "(loss / len(piece)).backward()"),
    "the same order in each epoch": ('key["seed"], epoch)', 'key["seed"], 0)'),
    "dev scored with dropout": ("net.eval()\n    outputs = apply(net, dev", "outputs = apply(net, dev"),
    "no dropout after an evaluation": ("net.train()", "pass"),
    "the same dev for every seed": ('p["val"]), seed, names)\n', 'p["val"]), 42, names)\n'),
    "betas of BERT": ("(0.9, 0.999), 1e-8", "(0.9, 0.98), 1e-8"),
    "gradients pile up": ("optimizer.zero_grad()", "pass"),
    "EMP for 10 epochs": ('"emp": dict(epochs=100)', '"emp": dict(epochs=10)', [UNIT["defaults"]]),
    "flags do not win": ("else {}) | flags", "else {})")})
MUTANTS += mutants("finetune.py", [GOLDEN, "-k", "finetune or seed"], {
    "the same head for every seed": ("training.seed(seed)", "training.seed(42)")})
MUTANTS += mutants("finetune.py", [UNIT["finetune"]], {
    "models get their names at once": ("fcntl.flock(f, fcntl.LOCK_EX)", "pass"),
    "a test of one class is collapsed": ("bool(collapsed) and vary(labels)", "bool(collapsed)"),
    "standardises each split": ("(rows.labels - mean) / sd for", "(rows.labels - rows.labels.mean(0)) for"),
    "scores the seen rows": ("scores(outputs[~seen], labels[~seen]", "scores(outputs[seen], labels[seen]")})
MUTANTS += mutants("data.py", [UNIT["finetune"]], {
    "the strands are different": ("min(key, other[n - end:n - start])", "key"),
    "float32 targets": ('"b" else np.float64)', '"b" else np.float32)')})

ALL_ROWS = 'np.concatenate([rows.labels for rows in parts.values() if rows])'
MUTANTS += mutants("finetune.py", [UNIT["finetune_rules"]], {
    "a graph for each length": ("net.compile(dynamic=True)", "net.compile()"),
    "targets centered by all splits": ('parts["train"].labels.mean(0)', f"{ALL_ROWS}.mean(0)"),
    "targets scaled by all splits": ('mean, sd = parts["train"].labels.mean(0), parts["train"].labels.std(0)',
        f"mean, sd = parts['train'].labels.mean(0), {ALL_ROWS}.std(0)"),
    "features standardised by train and test": (
        "preprocessing.StandardScaler()", "preprocessing.FunctionTransformer(preprocessing.StandardScaler()"
        ".fit(np.concatenate([train, test])).transform)"),
    "features as they are": ("preprocessing.StandardScaler()", "preprocessing.FunctionTransformer()"),
    "test_unseen is what was seen": ("scores(outputs[~seen], labels[~seen]",
                                     "scores(outputs[seen], labels[seen]"),
    "counts half of test_in_train": ("int(seen.sum())", "int(seen[::2].sum())"),
    "BERT counts nothing cut": ("(n > self.room).sum()", "(n > 10 ** 9).sum()"),
    "BERT counts what just fits": ("(n > self.room).sum()", "(n >= self.room).sum()"),
    "CNN counts nothing cut": ('{"truncated": int((lengths > self.length).sum())}', "{}"),
    "CNN counts what just fits": ('"truncated": int((lengths > self.length)',
                                  '"truncated": int((lengths >= self.length)'),
    "Encoder counts nothing cut": ("(lengths > self.room).sum()", "(lengths > 10 ** 9).sum()"),
    "counts what is cut in train only": (
        "for rows in parts.values()), Counter())", 'for rows in [parts["train"]]), Counter())'),
    "the same dropout at each step": ('training.seed(key["seed"], done)', 'training.seed(key["seed"], 0)'),
    "the same dropout for every seed": ('training.seed(key["seed"], done)', "training.seed(42, done)"),
    "one table split alike for every seed": ("args.split, args.seed, classes)", "args.split, 42, classes)"),
    "the same rows of a probe for every seed": ('p["val"]), seed, names)[0]', 'p["val"]), 42, names)[0]'),
    "a row of results without fsync": ("os.fsync(f.fileno())", "pass"),
    "a row of results synced before it is flushed": ("f.flush()\n        os.fsync(f.fileno())",
                                                     "os.fsync(f.fileno())\n        f.flush()")})
MUTANTS += mutants("data.py", [UNIT["finetune_rules"]], {
    "splits alike for every seed": ("random_state=seed)", "random_state=42)")})
MUTANTS += mutants("data.py", [UNIT["splits"], "-k", "literal or chained or alone or whole"], {
    "near-duplicates of one strand": ("np.minimum(ids[0], ids[1, ::-1])", "ids[0]"),
    "a third of the 15-mers is enough": ("= 15, 0.5, 64", "= 15, 0.33, 64"),
    "half of the longer one": ("np.minimum(total[i], total[j])", "np.maximum(total[i], total[j])"),
    "15-mers over the end of a sequence": (" & (at[NEAR_K - 1:] == at[:len(ids)])", ""),
    "repeats count each time": ("keys = keys[np.diff(keys, prepend=-1) > 0]", "pass"),
    "runs are not connected": ("(np.arange(len(new)) % NEAR_RUN == 0)", "(keys % NEAR_RUN == 0)"),
    "the emptiest class decides": ("[:, counts[group] > 0].max(1)", "[:, counts[group] > 0].min(1)"),
    "groups alike for every seed": ("default_rng(seed).permutation(len(counts))",
                                    "default_rng(42).permutation(len(counts))"),
    "a few groups leave splits empty": ("empty | (n_left > empty.sum())", "empty | (n_left > 0)",
                                        [UNIT["splits"], "-k", "few_groups"])})
MUTANTS += mutants("data.py", [UNIT["splits"], "-k", "refused or obeyed"], {
    "train may lack a class": ("np.setdiff1d(classes_of(rows), classes_of(rows)[part == 0])", "[]"),
    "validation is test": ('"validation": 1', '"validation": 2'),
    "an empty value is a value": ("if not text or name", "if name")})
MUTANTS += mutants("finetune.py", ["tests/unit/test_findna_heads.py", "-k", "both_poolings"], {
    "a linear layer in place of the MLP": ("F.gelu(self.hidden(x))", "self.hidden(x)")})
MUTANTS += mutants("finetune.py", [UNIT["splits"], "-k", "identity"], {
    "--split_by does not identify a run": (', "split_by"))', "))")})
MUTANTS += mutants("finetune.py", ["tests/runs/test_finetune_runs.py", "-k", "wrong_line"], {
    "a set of --tasks leaves --out": (r'r"[\w-][\w.-]*(/[\w-][\w.-]*)*"', r'r"[\w.-]+(/[\w.-]+)*"'),
    "a missing file shows after hours": (" and all(map(os.path.isfile, files))", "")})
MUTANTS += mutants("tools/report.py", [UNIT["splits"], "-k", "report"], {
    "all labels are the first one": ("rows.labels[:, i] if", "rows.labels[:, 0] if"),
    "rows of train like test": ("np.isin(groups[b], groups[a])", "np.isin(groups[a], groups[b])"),
    "GC of all letters": ("rows.bases // 2 == 1", "rows.bases // 2 >= 1"),
    "copies are near-duplicates": ("np.unique(different, return_index=True)[1]", "slice(None)",
                                   [UNIT["benchmarks"], "-k", "made_data"])})
MUTANTS += mutants("training.py", [UNIT["finetune_rules"]], {
    "fsync of another file": ("os.fsync(f.fileno())", "os.fsync(os.open(out, os.O_RDONLY))"),
    "fsync behind the rename": (
        "os.fsync(f.fileno())",
        "os.replace(tmp, last)\n            tmp = last\n            os.fsync(f.fileno())"),
    "no fsync of the folder": ("os.fsync(folder) ", "# "),
    "fsync of the folder before the rename": (
        "os.replace(tmp, last)\n        folder = os.open(out, os.O_RDONLY)\n        os.fsync(folder)",
        "folder = os.open(out, os.O_RDONLY)\n        os.fsync(folder)\n        os.replace(tmp, last)")})

MUTANTS += mutants("training.py", [UNIT["training"]], {
    "each rank saves by its own clock": ("self.rank == 0 and overdue", "overdue"),
    "minutes are seconds": ("60 * self.args.save_every", "self.args.save_every"),
    "--save_every 0 saves always": ("0 < 60 * self.args.save_every < ", "60 * self.args.save_every < "),
    "every step after the first save": ("        self.saved = time.monotonic()\n", ""),
    "a save of a step that is not read": ("behind = behind and not self.to_save", "pass"),
    "steps of an old run become minutes": ('type(saved.get("save_every")) is int', "False"),
    "an overflow ends the run": ("not 0 < self.in_a_row < SKIPS", "True"),
    "an overflow never ends the run": ("not 0 < self.in_a_row < SKIPS", "not 0 < self.in_a_row"),
    "skipped steps are not counted": ('self.values["skipped"] += not finite', "pass"),
    "float16 without scaling": ('enabled=dtype == "float16"', "enabled=False"),
    "bfloat16 where there is none": ('"bfloat16" if bf16 else "float16"', '"bfloat16"'),
    "compiled though that fails": ("and can_compile(device):", ":"),
    "skipped steps of Adam are missed": ('- state.get("skipped", 0)', "", [PRECISION, "-k", "resumed"])})
MUTANTS += mutants("training.py", [UNIT["before"]], {
    "rows without their time": (' | {"time": round(time.time(), 1)}', ""),
    "a line a step": ("self.told > 60", "self.told > 0"),
    "a line a minute on a terminal": ("self.told > 60 and not sys.stderr.isatty()", "self.told > 60"),
    "days of a GPU, too": ('self.device.type == "cpu" and left >', "left >"),
    "never says that 16 bits are slow": ("return dtype in names and not", "return not dtype and"),
    "passes of the demo are warned of": ("passes > PASSES and not self.args.demo", "passes > PASSES"),
    "memory without the moments": ("4 * (4 + teachers) * sum(", "4 * (2 + teachers) * sum("),
    "memory of one sequence": ("fixed + n * each > free", "fixed + each > free"),
    "advises what does not fit": ("int(max(0.9 * free - fixed, 0) / each)", "int(max(free, 0) / each)"),
    "ignores the job's limit": ("return min(found, default", "return max(found, default"),
    "each rank has the whole memory": ('int(os.environ.get("LOCAL_WORLD_SIZE", read_ranks()[1]))', "1"),
    "a resumed run begins a new curve": ("if not start or not os.path.exists(path)", "if True"),
    "a new run continues an old curve": ("if not start or not os.path.exists(path)",
                                         "if not os.path.exists(path)"),
    "a tracker gets text": ("if isinstance(x, (int, float))}, self.step", "}, self.step"),
    "tensorboard keeps what is repeated": ("purge_step=start + 1", "purge_step=start")})
MUTANTS += mutants("training.py", [UNIT["defaults"]], {
    "--size does nothing": ("SIZES[args.size].items() if name in names", "SIZES[args.size].items() if 0")})
MUTANTS += mutants("randommask.py", [UNIT["before"]], {
    "480,000 steps of every genome": ("if reached is None and (args.genome", "if (args.genome"),
    "passes over another genome": ("2_937_639_113", "3_088_269_832"),
    "fewer steps of longer windows": ("((512 - 3) * stride + k)", "(512 - 3 + k)")})
MUTANTS += mutants("finetune.py", [UNIT["splits"], "-k", "column_split"], {
    "tables in another order than their column split": (
        "text != splits[0] or data.SPLITS.get(text.lower(), data.SPLITS[name]) != data.SPLITS[name]",
        "text != splits[0]")})
MUTANTS += mutants("training.py", [UNIT["training"], "-k", "list"], {
    "the second of two lists counts": ("if isinstance(values, list) and getattr", "if False and getattr")})
MUTANTS += mutants("tools/predict.py", [UNIT["tools"], "-k", "output"], {
    "a table named .csv": ("(\"/\", *OTHER_ENDINGS)", "\"/\"")})
MUTANTS += mutants("tools/table.py", [UNIT["table"], "-k", "one_name"], {
    "two tables of one name are one": ('and label and run["task"].startswith("csv/")', "and False")})
MUTANTS += mutants("models.py", ["tests/unit/test_findna_heads.py", "-k", "float32"], {
    "bases are added up in bfloat16": ("    x = x.float()\n    sums", "    sums")})
MUTANTS += mutants("finetune.py", ["tests/unit/test_findna_heads.py", "-k", "float32"], {
    "the mean over bases in bfloat16": ("parts[pool].float().mean(1)", "parts[pool].mean(1)")})
MUTANTS += mutants("finetune.py", [UNIT["finetune_rules"], "-k", "cut or protocol"], {
    "bases beyond the last k-mer are cut": ("(n > self.room).sum()",
                                            "(lengths > self.n_covered(self.room)).sum()"),
    "a task of one's own takes a group's numbers": ("    if task in data.TASKS:  ", "    if True:  ")})
MUTANTS += mutants("models.py", [UNIT["models"], "-k", "capacity or low_precision"], {
    "the loss of bfloat16 in bfloat16": (".flatten(0, 1)[at]).float(), wanted",
                                         ".flatten(0, 1)[at]), wanted"),
    "spare slots at one index": ("torch.arange(capacity + 1, device=flat.device) % len(flat)",
                                 "flat.new_zeros(capacity + 1)")})
MUTANTS += mutants("finetune.py", [UNIT["finetune"], "-k", "windows"], {
    "windows are added up in bfloat16": ("over_windows(x.float(), n_windows)", "over_windows(x, n_windows)")})
MUTANTS += mutants("tools/embed.py", [UNIT["strands"], "-k", "per_base"], {
    "bases in float32 whatever --dtype": ('autocast(rows.bases.device, net.spec["dtype"])',
                                          'autocast(rows.bases.device, "float32")')})
MUTANTS += mutants("models.py", [UNIT["bench"], "-k", "flops"], {
    "FinDNA's teacher costs nothing": ("(8 if teacher else 6) *", "6 *"),
    "FinDNA-T's attention costs nothing": ("(n + attention)", "n")})
MUTANTS += mutants("training.py", [UNIT["training"], "-k", "mfu"], {
    "an A1000 is an A100": ('if re.search(rf"\\b{gpu}\\b", name)', "if gpu in name")})
MUTANTS += mutants("tools/table.py", [UNIT["table"], "-k", "columns_of_their_own or dtypes"], {
    "two tables of one name are seeds": ('same[:1] if run.get("given_split") else same', "same"),
    "dtypes are seeds": ('"long", "dtype", "overrides"    #', '"long", "overrides"    #')})
MUTANTS += mutants("tools/predict.py", [UNIT["tools"], "-k", "regression"], {
    "six digits of a regression": ("'.9g' if spec['regression'] else '.6g'", "'.6g'")})
MUTANTS += mutants("finetune.py", ["tests/unit/test_splits.py", "-k", "several_tables"], {
    "a column split is passed over": ("if text != splits[0] or data", "if False and data")})
MUTANTS += mutants("data.py", ["tests/unit/test_columns.py", "-k", "second_of"], {
    "a second sequence is paired with itself": ('if wanted["sequence"] == ["sequence_2"]:', "if False:")})
MUTANTS += mutants("models.py", [UNIT["models"], "-k", "where_transformers"], {
    "no dropout behind attention": ("F.dropout(self.proj(y.transpose(1, 2).flatten(2)), p)",
                                    "self.proj(y.transpose(1, 2).flatten(2))"),
    "no dropout behind the MLP": ("F.dropout(self.fc_out(F.gelu(self.fc(x))), p)",
                                  "self.fc_out(F.gelu(self.fc(x)))")})
MUTANTS += mutants("finetune.py", [UNIT["finetune_rules"], "-k", "equal_scores or steps_and"], {
    "the last of equal scores": ('value > best["value"]:', 'value >= best["value"]:'),
    "epochs whatever max_steps": ('steps = p["max_steps"] or per_epoch * p["epochs"]',
                                  'steps = per_epoch * p["epochs"]')})
MUTANTS += mutants("finetune.py", [UNIT["defaults"], "-k", "chosen_by_loss"], {
    "a regression is chosen by PCC": ('p["select"] == "score":', 'p["select"] == "x":')})
MUTANTS += mutants("findna.py", [GOLDEN, "-k", "numbers_from_the_flags"], {
    "--noise is not taken": ("args.mask_rate, args.noise,\n", "args.mask_rate, NOISE,\n"),
    "--flip is not taken": ("                                            args.flip)",
                            "                                            FLIP)"),
    "--translocation is not taken": ("make_views(dna, args.views, args.translocation",
                                     "make_views(dna, args.views, EDIT"),
    "--temp_teacher is not taken": ("dim, args.temp_teacher)", "dim, TEMP_TEACHER)"),
    "--temp_student is not taken": ("dim, args.temp_student)", "dim, TEMP_STUDENT)"),
    "--ema is not taken": ("ema = ema_at(step, args.steps, args.ema)", "ema = ema_at(step, args.steps)"),
    "--center_momentum is not taken": ("1 - args.center_momentum)", "1 - CENTER_MOMENTUM)"),
    "the views' difference the other way": ("kl = n * dissimilarity(view_u, view_v)",
                                            "kl = n * dissimilarity(view_v, view_u)")})
MUTANTS += mutants("cm_gems.py", [UNIT["cm_gems"], "-k", "style_contigs"], {
    "published formulas are the textbook's": ('if args.npmi == "published" else',
                                              'if args.npmi == "textbook" else'),
    "a table of other contigs": ("repr(sorted(set(contigs)))", "repr(sorted(genome.contigs))"),
    "the table of the whole genome": ('f"{genome.fingerprint}_{zlib', 'f"{genome.fingerprint[:12]}_{zlib')})
MUTANTS += mutants("finetune.py", [UNIT["defaults"], "-k", "of_its_paper or dropout_and_blocks"], {
    "DeepSTARR as if it were yours": ('"DeepSTARR": "randommask"', '"DeepSTARR": "strict"'),
    "the dropout of a BERT alone": ("if kind in own and dropout is not None",
                                    'if kind == "bert" and dropout is not None'),
    "a block too many": ("(longest - 1).bit_length()", "longest.bit_length()")})
MUTANTS += mutants("finetune.py", [UNIT["finetune_rules"], "-k", "class_weights_reach"], {
    "probes without class weights": ('features(parts["test"]), task, args.class_weights)',
                                     'features(parts["test"]), task)')})
MUTANTS += mutants("finetune.py", [UNIT["models"], "-k", "where_transformers or initial"], {
    "no dropout before the last layer": ("self.out(F.dropout(x, self.p, self.training))", "self.out(x)"),
    "random weights without dropout": ("4 * args.n_embd, 0.1))", "4 * args.n_embd, 0.0))")})
MUTANTS += mutants("models.py", ["tests/unit/test_findna_heads.py", "-k", "literal_pre_ln"], {
    "LayerNorm behind each part of FinDNA-T": ("norm_first=True)", "norm_first=False)")})
MUTANTS += mutants("models.py", [UNIT["models"], "-k", "penguinn"], {
    "PyTorch's momentum of batch norm": ("nn.BatchNorm1d(D, 1e-3, 0.01)", "nn.BatchNorm1d(D, 1e-3, 0.1)"),
    "PyTorch's initial weights": ("nn.init.xavier_uniform_(layer.weight)", "pass")})
MUTANTS += mutants("cm_gems.py", [UNIT["defaults"], "-k", "logo_and"], {
    "LOGO with a BERT's feed-forward layers": ("args.n_inner, args.dropout)",
                                               "4 * args.n_embd, args.dropout)")})
MUTANTS += mutants("data.py", [UNIT["benchmarks"], "-k", "splice_sites or published_sets"], {
    "donors are acceptors": ('("none", "donor", "acceptor")', '("none", "acceptor", "donor")'),
    "Mus spretus is a turtle": ('"Mus_spretus": 0', '"Mus_spretus": 1')})
MUTANTS += mutants("models.py", [UNIT["before"]], {
    "attention weights cost nothing": ("3 * c.n_head * T))", "0 * T))")})
MUTANTS += mutants("models.py", [UNIT["training"]], {
    "sums over windows for means": ("by_sequence(x, n_windows) / n_windows[:, None]",
                                    "by_sequence(x, n_windows)")})
MUTANTS += mutants("finetune.py", [UNIT["training"]], {
    "skipped steps are not counted": ('1 - norm.isfinite().float()', "0",
                                      [PRECISION, "-k", "resumed and finetune"])})
for script in ("randommask", "findna", "cm_gems"):
    MUTANTS += mutants(f"{script}.py", [PRECISION, "-k", f"resumed and {script}"], {
        "gradients stay scaled": ("run.scaler.unscale_(optimizer)", "pass")})

MUTANTS += mutants("data.py", [UNIT["tools"]], {
    "MTcDNA split by another seed": ("test_size=0.2, random_state=1", "test_size=0.2, random_state=2"),
    "MTcDNA's dev is 20 % of the rest": ("test_size=0.25", "test_size=0.2"),
    "5,000 bases are enough for MTcDNA": ("len(codes) > 5000", "len(codes) >= 5000"),
    "few-shot draws of rows as they are": ("np.random.default_rng(42).permutation(len(labels))",
                                           "np.arange(len(labels))"),
    "the first few-shot draw always": ("order[:, draw]", "order[:, 0]"),
    "minus strand is read forwards": ('text.translate(complement)[::-1] if strand == "-"',
                                      'text if strand == "-"', [UNIT["benchmarks"], "-k", "coordinates["]),
    "coordinates from 1": ("int(start), int(end), strand))", "int(start) - 1, int(end), strand))",
                           [UNIT["benchmarks"], "-k", "coordinates["])})
MUTANTS += mutants("tools/predict.py", [UNIT["tools"]], {
    "the least likely class": ("values.argmax()", "values.argmin()"),
    "counts of the last block only": ("counts.update(", "counts = collections.Counter("),
    "no window at the end": ("in [*range(0, last, step), last]", "in range(0, last + 1, step)")})
MUTANTS += mutants("tools/embed.py", [UNIT["tools"]], {
    "offsets of each block from 0": ("rows.offsets[1:] + offsets[-1][-1]", "rows.offsets[1:]"),
    "bases of each piece from 0": ("covered - first, end", "covered, end",
                                   ["tests/unit/test_findna_heads.py", "-k", "vectors"])})
MUTANTS += mutants("models.py", [UNIT["tools"], UNIT["mutagenesis"]], {
    "sums over the k-mers of a base": ("total[:, :-1] / total[:, -1:]", "total[:, :-1]")})
MUTANTS += mutants("finetune.py", ["tests/unit/test_findna_heads.py", "-k", "predicts"], {
    "a head reads another pooling": ("self.net.spec[\"pool\"] != self.pool", "False")})
MUTANTS += mutants("tools/mutagenesis.py", [UNIT["mutagenesis"], "-k", "literal or slope or heads"], {
    "effects without what was before": (" - before", ""),
    "logits for log-odds": (" - outputs[:, [i for", "  # - outputs[:, [i for"),
    "rows of effects in the order of the codes": ('LETTERS = "ACGT"', 'LETTERS = "ATCG"'),
    "substitutes the next letter": ("CODES[part[0]]", "CODES[part[0] - 1]"),
    "the gradient alone": ("kept[0].detach() * torch", "torch"),
    "attention of the first k-mer": ("[:, :, 0].mean(1)", "[:, :, 1].mean(1)")})
MUTANTS += mutants("tools/figures.py", ["tests/unit/test_encoders.py", "-k", "nucleotide_transformer"], {
    "the last k-mer counts as [SEP]": ("slice(1, T - net.n_last)", "slice(1, T - 1)"),
    "overlapping k-mers for NT": ('spec["stride"] or net.k', '1')})
MUTANTS += mutants("data.py", [UNIT["data"], "-k", "span_mask"], {
    "spans of the first row for all": ("(torch.as_tensor(x, device=at.device).expand(B)",
                                       "(torch.as_tensor(x, device=at.device).expand(B)[:1].expand(B)")})
MUTANTS += mutants("cm_gems.py", [UNIT["cm_gems"], "-k", "can_switch"], {
    "a switch at the last step counts": ("last = (args.steps - 1) //", "last = args.steps //"),
    "one evaluation is enough": ("max(2 * args.eval_every,", "max(args.eval_every,")})
MUTANTS += mutants("finetune.py", [UNIT["defaults"], UNIT["messages"]], {
    "FinDNA clips at 1": ('schedule="cosine", grad_clip=0.5', 'schedule="cosine"'),
    "--long counts for a ChordMixer": ("or any(encoders)", "or encoders")})
MUTANTS += mutants("training.py", ["tests/faults/test_faults.py", "-k", "wrong_flags and demo"], {
    "the demo takes --size": ('name in ("size", "model"', 'name in ("model"')})
MUTANTS += mutants("models.py", [UNIT["layers"], "-k", "layers"], {
    "BERT has one layer, the last": ("[*self.blocks][:layer]", "[*self.blocks]"),
    "a block for a layer": ("else layer * c.n_blocks", "else layer"),
    "a layer too few": ("self.layers.layers[:layer]", "self.layers.layers[1:layer]")})
MUTANTS += mutants("finetune.py", [UNIT["layers"]], {
    "layers from the end are one off": ("layer % (last + 1)", "layer % last"),
    "scores a headless BERT": (" or not net.bert.ln_head.weight.any()", "")})
MUTANTS += mutants("models.py", [UNIT["layers"]], {
    "other k-mers over a base stay": ("real & (run < span)", "real & (run < 1)"),
    "bases behind a k-mer count": ("log_p * (base < k)", "log_p"),
    "P among all k-mers": (".log_softmax(1).gather(1, digit", ".gather(1, digit")})
MUTANTS += mutants("tools/variants.py", [UNIT["variants"], "-x"], {
    "k-mers that end at the base are not masked": ("starts + width > span", "starts + width > 1 + span"),
    "the next k-mer is masked, too": ("(starts < span[:, 1])", "(starts <= span[:, 1])"),
    "sum over the tokens": ("(total / own.sum(1))", "(total / (own.sum(1) > 0))"),
    "ALT and REF swapped": ("score[2](outputs[alt], outputs[ref])", "score[2](outputs[ref], outputs[alt])"),
    "nothing is masked": ("tokens[one].masked_fill(masked, data.MASK)", "tokens[one]"),
    "the base is not zeroed": ("one_hot[one].masked_fill(masked[..., None], 0)", "one_hot[one]"),
    "no [CLS] behind the bases": ('net.spec["pool"] = "cls"', "pass"),
    "starts count from [CLS]": ("device=tokens.device) - 1)", "device=tokens.device))"),
    "indels mask no neighbours": ("int(len(ref) != len(alt))", "0"),
    "every allele its own window": ("alleles[i][:-1] != alleles[i - 1][:-1]", "True"),
    "one window for all": ("alleles[i][:-1] != alleles[i - 1][:-1]", "False"),
    "the other strand is centred as this one": ("- allele.end)[turn]", "- allele.end)"),
    "not reverse complemented": ("data.reverse_complement(codes), left", "codes, left"),
    "classifiers read one part only": ('in_parts="score" not in score[0]', "in_parts=False"),
    "what is cut may be a window": ('and net.BODY and spec["long"] == "chunk"', ""),
    "language models read parts": ('in_parts="score" not in score[0]', "in_parts=True"),
    "windows end with the contig": (", size - allele.length - after), before)", ", 0), before)"),
    "probabilities as they are": ("special.log_softmax, axis=1", "special.softmax, axis=1"),
    "an empty ALT is scored": ("DNA.fullmatch(ref) and DNA.fullmatch(alt)", "DNA.fullmatch(ref + alt)"),
    "REF is not compared": ("!= data.decode(data.encode(ref))", "is None"),
    "two contigs of one spelling": ("if len(alike) == 1", "if alike"),
    "quotes end a description": (""".replace('"', '\\\\"')""", ""),
    "a formula in a cell": ("*map(text, [*start, alt])", "*[*start, alt]")})
MUTANTS += mutants("tools/export.py", [UNIT["tools"]], {
    "scores of all runs": ('row["id"] == state.get("id")', "True"),
    "losses of the first row": ("log[-1].items()", "log[0].items()"),
    "the untrained head, too": ('if "classes" in net.spec or name.startswith("backbone.")', "")})
MUTANTS += mutants("tools/table.py", [UNIT["table"], "-k", "pooled or common or published"], {
    "sd of the population": ("ddof=1", "ddof=0"),
    "of equal runs, the first": ("runs[tuple(run[part] for part in PARTS)] = run",
                                 "runs.setdefault(tuple(run[part] for part in PARTS), run)"),
    "an own dev is not of train": ('rows["dev"] if "dev is" in share else 0', "0"),
    "mean over the sets that some have": ("len(row) and row.all()", "len(row) and row.any()")})
MUTANTS += mutants("data.py", [UNIT["strands"]], {
    "the other strand of another sequence": ("2 * n - 1 - index, index", "n + index, index"),
    "the same strands in each step": ("default_rng((seed, step, 1))", "default_rng((seed, 1))"),
    "strands average other sequences": ("outputs[n:][::-1]) / 2", "outputs[n:]) / 2")})
MUTANTS += mutants("finetune.py", [UNIT["strands"]], {
    "dev on one strand": ('rows = data.both_strands(rows) if average else rows\n    function',
                          "average = False\n    function")})
MUTANTS += mutants("finetune.py", [UNIT["pairs"]], {
    "no [SEP] between a pair": ("(at == a) | (at == end)", "at == end"),
    "the second one begins a base early": ("+ rows.first[index] + 1))", "+ rows.first[index]))"),
    "the shorter one of a pair is cut": ("room - n[:, ::-1], [room", "room - n, [room"),
    "long pairs are cut unasked": ('if n_long and self.spec["long"] == "chunk":', "if False:"),
    "any model takes pairs": ('pairs != spec["pairs"]', "False"),
    "the bases behind a k-mer are counted": ("(n - 1) * self.stride + self.k, 0)",
                                             "n * self.stride + self.k, 0)")})
MUTANTS += mutants("data.py", [UNIT["pairs"]], {
    "k-mer counts of the first one": ("counts[:, ::2]", "counts[:, :1]"),
    "both strands swap a pair": ("    if rows.first is None:\n        return reverse_complement(rows.bases)",
                                 "    if True:\n        return reverse_complement(rows.bases)"),
    "an empty second sequence": ("if not all(pair):", "if not any(pair):"),
    "sequence_2 is dropped": ('"sequence_2": ["sequence_2"]}', '"sequence_2": ["-"]}')})
MUTANTS += mutants("models.py", [UNIT["pairs"]], {
    "type 1 in the tokenizer": ('{"id": "B", "type_id": 0}', '{"id": "B", "type_id": 1}'),
    "an export forgets pairs": ('.get(name, plain)', '.get(name[1:], plain)')})
MUTANTS += mutants("finetune.py", ["tests/unit/test_labels.py"], {
    "labels weigh as their number": ("return loss / share", "return loss"),
    "the weight of the other value": ("torch.where(labels, weights[1], weights[0])",
                                      "torch.where(labels, weights[0], weights[1])"),
    "weights of a batch are not used": ('device)], "sum", weights)', 'device)], "sum")'),
    "AUPRC of class 0": ("in ([1] if n_classes == 2", "in ([0] if n_classes == 2"),
    "means over labels without a score": ("np.nanmean(values)", "np.mean(values)"),
    "F1 of 0, too": ("metrics.f1_score(y, x > 0)}", "metrics.f1_score(y, x > 0, average='macro')}"),
    "ties of p are ties": ("log_odds = np.stack([x -", "log_odds = np.stack([0 * x -"),
    "weights do not reach dev": ('"mean", weights).item()', '"mean").item()')})
MUTANTS += mutants("training.py", [UNIT["training"], "-k", "warm_up"], {
    "no peak without warm-up": ("warmup = max(warmup, 1)       ", "pass  #")})
MUTANTS += mutants("models.py", [UNIT["findna"], "-k", "start_apart"], {
    "layers are copies": ("nn.ModuleList(make() for", "nn.ModuleList(self.layers.layers[0] for")})
MUTANTS += mutants("data.py", [UNIT["findna"], "-k", "guesses or entropies"], {
    "a guess from the left flank alone": ("joint.max(1).values.sum()", "joint.sum(2).max(1).values.sum()"),
    "nats of both flanks and the base": ("whole - flanks)", "whole)")})
MUTANTS += mutants("training.py", [UNIT["training"], "-k", "shares"], {
    "shares end below 1": ("or closed and value == high", "or False")})
MUTANTS += mutants("findna.py", [UNIT["findna"], "-k", "guesses"], {
    "guesses from the start of the genome": ("np.linspace(0, len(bases) - length, n)",
                                             "np.arange(n) * length")})
MUTANTS += mutants("models.py", [UNIT["models"], "-k", "single_label"], {
    "one output is a regression": ('found.get("problem_type") or (', '"" or (')})
MUTANTS += mutants("tools/variants.py", ["tests/unit/test_variants.py", "-k", "sigmoid"], {
    "labels share a softmax": ('if spec["multilabel"] else', 'if spec["regression"] else')})
MUTANTS += mutants("tools/table.py", [UNIT["table"], "-k", "grid"], {
    "test chooses of a grid": ('run["dev"].get("loss" if run["by_loss"] else run["metric"])',
                               'run["test"].get(run["metric"], run["score"])'),
    "each few-shot draw chooses": ('"data" if run["key"].shots else ""', '""'),
    "the highest loss is chosen": ('-value if run["by_loss"]', 'value if run["by_loss"]'),
    "of a grid, all settings are columns": ("kept += settings[best]", "kept += sum(settings.values(), [])")})
MUTANTS += mutants("data.py", ["tests/unit/test_columns.py"], {
    "named columns are not read": ("[flags[name].lower()] for name in {*", "[name] for name in {*"),
    "the delimiter of the suffix": ("delimiter or DELIMITER[suffix]", "DELIMITER[suffix]"),
    "a named id may be missing": ('("sequence_2",) if flags["id"] or labels', '("sequence_2",) if labels')})
MUTANTS += mutants("tools/report.py", ["tests/unit/test_columns.py"], {
    "strands of other sequences": ("x[len(x) // 2:][::-1]]", "x[len(x) // 2:]]")})
MUTANTS += mutants("tools/evidence.py", ["tests/unit/test_evidence.py"], {
    "runs of a checkpoint are not averaged": ("np.mean(each[:n] if n > 1 else each)", "each[0]"),
    "draws that only one arm has": ("np.mean(each[:n] if n > 1 else each)", "np.mean(each)"),
    "the same seeds in each draw": ("size=(draws, 1, gaps.shape[1])", "size=(1, 1, gaps.shape[1])"),
    "p over all cells": ("gaps.mean(1), gaps.mean(0)", "gaps.ravel(), gaps.mean(0)"),
    "the first values of a log": ("for row in read_jsonl(log) for", "for row in read_jsonl(log)[::-1] for"),
    "verdicts on one seed or set": ("min(gaps.shape) < 2", "min(gaps.shape) < 1"),
    "shares that depend on the length": ('seen["numbers"][row] / seen["uniform"]', 'seen["numbers"][row]'),
    "observations of any step are one": ('row["arm"], row["step"]), []', 'row["arm"], 9), []'),
    "random weights of several networks are one arm": ("arm_of(row, len(random) > 1)", "arm_of(row)"),
    "any metric is the score": ('row["test"].get(metric) if metric else row["score"]', 'row["score"]'),
    "runs without a checkpoint have no seed": ('(row["init"], row["seed"])', '(row["init"], None)'),
    "training sizes are datasets": ("gaps = by_dataset(tasks, gaps)", "pass"),
    "sets of a benchmark are one dataset": ("task if task in data.TASKS else re.sub", "re.sub"),
    "rows of other settings are averaged": ("alike.setdefault(key, value) != value", "False"),
    "the settings of a seed": ("in (place, settings), (", "in ((*place, seed), settings), ("),
    "rows of other machines are lost": ("for row in [*old, *rows]}", "for row in rows}"),
    "every run is looked into": ("[*kept, os.path.join(folder, \"last.pt\")] if kept else []",
                                 "[*kept, os.path.join(folder, \"last.pt\")]")})
MUTANTS += mutants("data.py", [UNIT["messages"], "-k", "repeat_others"], {
    "contigs of equal ends are taken for equal": ("hashlib.sha256(x).digest() for x in (codes",
                                                  "hashlib.sha256(x[:END]).digest() for x in (codes"),
    "ends of the other strand as they are": ("starts[1] ^= starts[1] < 4", "pass"),
    "ends beyond a short contig": ("np.minimum(np.arange(END), sizes[:, None] - 1)",
                                   "np.arange(END)[None] + 0 * sizes[:, None]")})
MUTANTS += mutants("tools/report.py", [UNIT["messages"], "-k", "report"], {
    "intervals that are not in train": ("interval in train for", "interval not in train for"),
    "repeats are different intervals": ("len(intervals) - len(set(intervals))", "len(set(intervals))"),
    "strands are different intervals": ("interval[:3] for", "interval[:4] for"),
    "the mean length": ("np.median(lengths)", "np.mean(lengths)"),
    "sequences of either split": ("set(keys[a]) & set(keys[b])", "set(keys[a]) | set(keys[b])",
                                  [UNIT["benchmarks"], "-k", "report_on_made"])})
MUTANTS += mutants("data.py", [UNIT["benchmarks"], "-k", "demo"], {
    "demo windows that hold the motif": (
        "starts = starts[n_before[starts + length + 1 - len(motif)] == n_before[starts]]", "pass"),
    "demo dev from a contig of train": ('("dev", ("demo3",))', '("dev", ("demo2",))'),
    "demo windows with replacement": ("rng.choice(starts, n, replace=False)", "rng.choice(starts, n)")})
MUTANTS += mutants("data.py", [UNIT["messages"]], {
    "contig names end at a comma": ("range(most, 0, -1)", "range(1, 0, -1)"),
    "repeats on one strand only": ("min(strands), []", "strands[0], []"),
    "what both copies hold out is a leak": ("held_out[i] - held_out[j] if strand", "held_out[i] if strand"),
    "rows have no names": ("if len(columns) == 1 else None", "if not columns else None")})
MUTANTS += mutants("training.py", [UNIT["messages"]], {
    "a resume follows links": ('"last.pt"), no_links), None', '"last.pt")), None'),
    "steps that are past are not said": ("if n <= self.start and not there", "if False"),
    "a file is a folder": ("os.path.lexists(text) and not", "False and not")})
MUTANTS += mutants("finetune.py", [UNIT["messages"]], {
    "targets of any size": ("max(mean, sd) > 1e30 or sd < 1e-30", "False"),
    "every flag is used": ("if not used.get(name, True)", "if False")})
MUTANTS += mutants("tests/conftest.py", [UNIT["campaign"]], {
    "cases are credited without counting": ("int(report.passed and n == 1)", "n"),
    "cases may be missing": ("report.passed and counted != n", "False")})


MUTANTS += mutants("data.py", [UNIT["repeats"]], {
    "lower case begins a letter late": ("return np.flatnonzero(lower[1:] != lower[:-1])",
                                        "return np.flatnonzero(lower[1:] != lower[:-1]) + 1"),
    "each contig's case from 0": ("case.append(changes + size)", "case.append(changes)"),
    "upper case is soft-masked": ("% 2 == 1", "% 2 == 0"),
    "a cache of another version is read": ('index.get("format") != CACHE_FORMAT', "False"),
    "--verify looks at the bases only": ("if was != now or digest", "if digest"),
    "a fingerprint without the names": ("json.dumps([contigs, crc])", "json.dumps([crc])", [UNIT["data"]]),
    "gaps of index.json are taken for positions": ("np.cumsum(np.frombuffer(zlib.", "(np.frombuffer(zlib."),
    "a k-mer is soft as soon as a base is": ("F.avg_pool1d(weights, k, stride)",
                                             "-F.max_pool1d(-weights, k, stride)"),
    "repeats stay where they were": ("soft.flip(1), soft)", "soft, soft)"),
    "three of four windows of the other strand": ("windows.device) < 0.5", "windows.device) < 0.75"),
    "the case is no part of the data": ('f"+case{zlib.crc32(edges.tobytes()):08x}"', '""'),
    "BED from 1": ("int(x) for x in (start, end)", "int(x) - 1 for x in (start, end)"),
    "parts of no bases": ("parts[parts[:, 0] < parts[:, 1]]", "parts")})
MUTANTS += mutants("models.py", [UNIT["repeats"]], {
    "losses without their weights": ("(losses * weights.flatten()[at]).sum()", "losses.sum()"),
    "divided by the count": ("weights.where(labels != -100, 0).sum()", "count")})
MUTANTS += mutants("findna.py", [UNIT["repeats"]], {
    "soft-masked bases are seen as -1": ('in letters else clean.abs()', 'in letters else clean')})
MUTANTS += mutants("findna.py", [REPEATS, "-k", "findna"], {
    "a weighted sum by the count": ("mnm if repeats is None else mnm * scale", "mnm")})
MUTANTS += mutants("randommask.py", [REPEATS, "-k", "randommask"], {
    "evaluations are weighted": ("if key[0]:", "if True:"),
    "one strand only": ('if args.strands == "both":', "if False:")})
MUTANTS += mutants("cm_gems.py", [REPEATS, "-k", "cm_gems"], {
    "evaluations are weighted": ("if key:", "if True:"),
    "one strand only": ('if args.strands == "both":', "if False:")})
MUTANTS += mutants("training.py", [REPEATS, "-k", "before"], {
    "runs of version 0.2 are others": ("(NEWER | {", "({")})


def copy_repository(folder):
    """The code and its tests in folder/copy, beside the shared data if there are any."""
    unwanted = shutil.ignore_patterns(".git", "out", "__pycache__", ".*_cache", ".venv")
    shutil.copytree(ROOT, folder / "copy", ignore=unwanted)
    if (ROOT.parent / "shared").exists():
        os.symlink(ROOT.parent / "shared", folder / "shared")
    return folder / "copy"


def run_tests(copy, tests):
    """(exit code, output) of pytest in a fork: what is slow to import is there already."""
    def main():
        for fd in (1, 2):
            os.dup2(os.open(copy.parent / "output", os.O_CREAT | os.O_WRONLY | os.O_APPEND), fd)
        os.chdir(copy)
        sys.path[:] = [path for path in sys.path if path and Path(path).resolve() != ROOT / "tests"]
        sys.dont_write_bytecode = True
        sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))
    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    process.join(LIMIT)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode, (copy.parent / "output").read_text(errors="replace")


def kill(mutant):
    """Name of the test that fails on the mutant; None if it survives."""
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_repository(Path(folder))
        path = copy / mutant.file
        path.write_text(path.read_text().replace(mutant.old, mutant.new))
        code, output = run_tests(copy, mutant.tests)
    failed = re.findall(r"^(?:FAILED|ERROR) \S*?([^/\s]+::\S.*?)(?: - .*)?$", output, re.M)
    if code not in (0, 1) or code and not failed:            # such as a mutant that is not Python
        raise SystemExit(f"{mutant.file}: {mutant.what}: the tests ended with {code}\n{output[-3000:]}")
    return failed[0] if code else None


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", metavar="WORD", default="", help="only the mutants with this word")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time (%(default)s)")
    args = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if args.k in f"{mutant.file} {mutant.what}"]
    for mutant in chosen:
        n = (ROOT / mutant.file).read_text().count(mutant.old)
        if n != 1:
            raise SystemExit(f"{mutant.file}: {mutant.what}: {n} times in the code: {mutant.old!r}")
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])  # imports torch._dynamo, before the first fork
    for tests in {tuple(mutant.tests): None for mutant in chosen}:
        with tempfile.TemporaryDirectory() as folder:
            code, output = run_tests(copy_repository(Path(folder)), tests)
        if code:
            raise SystemExit(f"{' '.join(tests)}: fails without a mutant\n{output[-3000:]}")
    survivors = []
    with ThreadPool(args.jobs) as pool:
        for mutant, test in zip(chosen, pool.imap(kill, chosen)):
            print(f"{mutant.file}: {mutant.what}: {f'killed by {test}' if test else 'SURVIVED'}", flush=True)
            survivors += [] if test else [mutant]
    print(f"{len(chosen)} mutants, {len(survivors)} survived")
    for mutant in survivors:
        print(f"  {mutant.file}: {mutant.what}")
    raise SystemExit(bool(survivors))


if __name__ == "__main__":
    main()
