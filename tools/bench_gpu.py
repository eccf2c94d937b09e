"""One prepared call for a machine with a GPU, reached as `python -m tools.bench gpu --out DIR`.

DIR/gpu.jsonl gets a row a measurement, at once, so that a stopped call still tells; DIR/gpu.log has what the
jobs printed. A job may crash or hang: it runs in processes of its own, which are killed at its limit, and a
row says so. The limits sum to 470 s; time that an item leaves over goes to the next ones.

What is measured is the scripts' own step: a script runs from its file with its flags and is watched between
two steps. The jobs of an item start side by side, because compiling takes long, but time their steps in turn.
With --device cpu all sizes are tiny: that proves the call, and its times mean nothing.
"""
import contextlib
import fcntl
import functools
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import runpy
import signal
import sys
import tempfile
import time
from collections import defaultdict, namedtuple
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
import finetune
import models
import training
from tools import bench

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LIMITS = {"ceilings": 20, "resume": 100, "ranks": 60, "bert": 140, "findna": 100, "tuning": 30, "card": 20}
FORK = multiprocessing.get_context("fork")                   # imports are shared, CUDA starts in the children
STRETCHES = 3                                                # timed stretches of a job; their median counts
CARD = 11e9                                                  # bytes of the small card
ATTENTION = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION
KERNELS = {"attention": r"flash|fmha|cudnn.*(sdpa|attn)|attention|softmax",              # first match counts
           "matrix products": r"gemm|nvjet|cutlass|cublas|xmma|splitK|::(add|b)?mm$|linear|matmul",
           "copies": r"mem(cpy|set)|copy_|nccl"}             # all others: elementwise and reductions

# shrink: divides the sizes of products; heads: B, H, D of attention; lengths: its T; warm, timed: steps;
# lanes: jobs side by side; demo, bert, findna, tuning: flags
WHOLE = SimpleNamespace(
    copy=2 ** 32, shrink=1, heads=(64, 12, 64), lengths=(508, 512),
    demo="", steps=60, demo_tuning="--demo --epochs 1", batch=64, bert="--micro_batch_size 64", findna="",
    micro_batches=(64, 8), tuning_batch=32, tuning="", bases=(70, 300), warm=8, timed=12, lanes=4, compile={},
    resident=3_100_000_000)
NET = "--n_layer 1 --n_head 2 --n_embd 16"
TINY = SimpleNamespace(
    copy=2 ** 16, shrink=100, heads=(2, 2, 8), lengths=(14, 16),
    demo="--n_layer 1 --batch_size 8 --micro_batch_size 4 --eval_windows 8", steps=8,
    demo_tuning=f"--csv {{work}}/20.csv --k 3 --block_size 34 {NET} --epochs 1 --batch_size 4",
    batch=8, bert=f"--k 3 --block_size 18 {NET} --micro_batch_size 4",
    findna="--length 54 --n_layer 1 --track_size 2 --hidden 8 --windows 64", micro_batches=(8, 4),
    tuning_batch=4, tuning=f"--k 3 --block_size 34 {NET}", bases=(20, 40), warm=2, timed=2, lanes=1,
    compile={"backend": "eager"}, resident=2_000_000)
Call = namedtuple("Call", "rows work device size")           # file of the rows, folder for all else


# Changes to a script that a measurement asks for; each is applied in the script's own process

class OneOfMany(int):
    """The number of ranks of a run on one rank that takes the path of several: DDP, no_sync, NCCL."""

    def __gt__(self, other):
        return int(self) >= other


def as_one_of_many(call):
    """Runs on a process group of one rank: NCCL on a GPU, gloo on a CPU. DDP has several buckets."""
    real, store = training.set_up, new_folder(call)

    def set_up(*args, **kwargs):
        device, dtype, *_ = real(*args, **kwargs)
        kind = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(kind, f"file://{store}/store", None, 1, 0)
        return device, dtype, 0, OneOfMany(1)
    training.set_up = set_up
    dist._DEFAULT_FIRST_BUCKET_BYTES = 2 ** 15               # or a demo's network fits into one
    training.DistributedDataParallel = functools.partial(training.DistributedDataParallel, bucket_cap_mb=0.05)


def infinite_norm(call):
    """Makes the gradient norm infinite from the third step on, which must not change the weights."""
    real, steps = training.Run.update, []

    def update(run, optimizer, lr, norm):
        steps.append(norm)
        if len(steps) < 3:
            return real(run, optimizer, lr, norm)
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in weights]
        real(run, optimizer, lr, norm + math.inf)
        if not all(map(torch.equal, before, weights)):
            raise AssertionError("a step whose gradient norm is infinite changed the weights")
    training.Run.update = update


def deterministic(call):
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)


def cuda_graphs(call):
    """Compiles with CUDA graphs. Gradients keep their memory, because a graph reuses that of its outputs."""
    if call.device == "cuda":
        nn.Module.compile = functools.partialmethod(nn.Module.compile, mode="reduce-overhead")
    make, zero = training.make_optimizer, torch.optim.Optimizer.zero_grad

    def make_optimizer(model, *args):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        return make(model, *args)
    training.make_optimizer = make_optimizer
    torch.optim.Optimizer.zero_grad = lambda optimizer: zero(optimizer, set_to_none=False)


def low_norms(call):
    """Gives LayerNorm outputs, and with them the residual stream, in bf16 (autocast: fp32)."""
    nn.LayerNorm.forward = lambda self, x: F.layer_norm(
        x, self.normalized_shape, self.weight, self.bias, self.eps).to(torch.bfloat16)


def ten_tracks(call):
    """Makes FinDNA's network, with --track_size 32, 320 wide: 10 tracks, in as many blocks as ever."""
    models.ChordMixerConfig.n_tracks = property(lambda config: config.n_blocks)


def small_card(call):
    if call.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(CARD / total)


def large_genome(call):
    """Repeats the genome until it is as large as hg38."""
    real, n = data.resident, call.size.resident
    data.resident = lambda bases, device: real(np.tile(bases, -(-n // len(bases))), device)


# Watching steps

@contextlib.contextmanager
def in_turn(call):
    """Holds the device for timing while the other jobs of the call compile."""
    with open(os.path.join(call.work, "turn.lock"), "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def shares(profile, cuda):
    """Returns {kind of kernel: share of the device's time} of a profile of steps."""
    times = defaultdict(float)
    for event in profile.key_averages():
        if cuda == (event.device_type == torch.autograd.DeviceType.CUDA):
            kinds = [kind for kind, names in KERNELS.items() if re.search(names, event.key, re.I)]
            spent = event.self_device_time_total if cuda else event.self_cpu_time_total
            times[(kinds or ["other"])[0]] += spent
    return {kind: round(share / sum(times.values()), 3) for kind, share in times.items()}


def measured(call, facts):
    """Warms up, times some steps, profiles two; fills facts. A generator to advance before each step."""
    cuda, n, times = call.device == "cuda", call.size.timed, []
    yield from [None] * call.size.warm                       # compiles
    with in_turn(call):
        yield from [None] * call.size.warm
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(STRETCHES):
            start = bench.clock()
            yield from [None] * n
            times.append((bench.clock() - start) / n * 1e3)
        if cuda:
            facts["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        facts |= {"ms": median(times), "from": min(times), "to": max(times)}
        with torch.profiler.profile() as profile:
            yield from [None] * 2
        facts["shares"] = shares(profile, cuda)


def strict(call, facts):
    """Raises if a step in the middle of a demo waits for the GPU. A generator to advance before each step."""
    n = call.size.steps // 4
    yield from [None] * n
    if call.device == "cuda":
        torch.cuda.set_sync_debug_mode("error")              # raises where the host would wait
    yield from [None] * n
    if call.device == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    facts["steps without a wait"] = n if call.device == "cuda" else "not checked, no GPU"
    yield from itertools.repeat(None)


def stopped(call, facts):
    """Sends SIGTERM in the middle of a demo. A generator to advance before each step."""
    yield from [None] * (call.size.steps // 2)
    os.kill(os.getpid(), signal.SIGTERM)
    yield from itertools.repeat(None)


def hook(watcher):
    """Advances the watcher before each step of a script, and leaves when it has seen enough."""
    def advance():
        if next(watcher, watcher) is watcher:
            raise SystemExit(0)
    steps, seed = training.Run.steps, training.seed

    def run_steps(run, validate):
        training.seed = seed                                 # finetune.py has no Run: it seeds each step
        for step in steps(run, validate):
            advance()
            yield step

    def seeded(*key):
        if len(key) == 2:
            advance()
        return seed(*key)
    training.Run.steps, training.seed = run_steps, seeded


def run_script(call, script, flags, changes=(), watch=None):
    """Runs a script in a fork, with changes and a watcher; returns {"code": exit code} and what was watched.

    Ends the job unless the script leaves with 0, 3 (not finite) or 143 (stopped).
    """
    with tempfile.TemporaryDirectory() as tmp:
        def main():
            facts = {}
            nn.Module.compile = functools.partialmethod(nn.Module.compile, **call.size.compile)
            for change in changes:
                change(call)
            if watch:
                hook(watch(call, facts))
            sys.argv = [os.path.join(ROOT, script), "--device", call.device, *flags.split()]
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            finally:
                with open(f"{tmp}/facts", "w") as f:
                    json.dump(facts, f)
        process = FORK.Process(target=main)
        process.start()
        process.join()
        if process.exitcode not in (0, 3, 143):
            sys.exit(1 if process.exitcode > 0 else f"{script} {flags}: ended by signal {-process.exitcode}")
        with open(f"{tmp}/facts") as f:
            return {"code": process.exitcode} | json.load(f)


def genome_flags(call):
    """Returns the flags of a run that is watched for its first steps: genome, run folder, batch."""
    folders = f"--data_dir {call.work}/data --out {new_folder(call)}"
    return f"--genome demo {folders} --batch_size {call.size.batch}"


def new_folder(call):
    return tempfile.mkdtemp(dir=call.work)


# Jobs: functions of a call that yield rows

def about(call):
    """Makes the files that the jobs share, a demo genome and tables; says what the machine is."""
    data.open_genome(["demo"], f"{call.work}/data")
    rng = np.random.default_rng(0)
    for L in call.size.bases:
        n = 2400 if call.device == "cuda" else 120
        rows = [f"{data.decode(rng.integers(4, size=L, dtype=np.uint8))},{i % 2}\n" for i in range(n)]
        with open(f"{call.work}/{L}.csv", "w") as f:
            f.write("sequence,label\n" + "".join(rows))
    row = {"name": "machine", "machine": bench.machine(), "python": platform.python_version()}
    if call.device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        row |= {"gpu": gpu.name, "GB": gpu.total_memory / 1e9, "processors": gpu.multi_processor_count,
                "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
                "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    yield row


def seconds(call, function, least=0.02):
    """Times a call of function, alone: median s of 3 samples, each of `least` s or more, or 1,000 calls."""
    def sample(n):
        start = bench.clock()
        for _ in range(n):
            function()
        return max((bench.clock() - start) / n, 1e-9)
    with in_turn(call):
        sample(3)
        n = min(math.ceil(least / sample(1)), 1000)
        return median(sample(n) for _ in range(3))


def ceilings(call):
    """Yields the rates of a copy on the device and of bf16 matrix products."""
    s, x = call.size, torch.zeros(2, call.size.copy, dtype=torch.uint8, device=call.device)
    yield {"name": "copy", "GB/s": 2 * s.copy / seconds(call, lambda: x[0].copy_(x[1])) / 1e9}
    shapes = [(32_768, 768, n) for n in (768, 2304, 3072)] + [(64_640, k, 512) for k in (308, 312, 320, 352)]
    for m, k, n in [(8192, 8192, 8192), *shapes]:
        m, k, n = (-(-x // s.shrink) for x in (m, k, n))
        a, b = (torch.randn(shape, device=call.device, dtype=torch.bfloat16) for shape in ((m, k), (k, n)))
        flops = 2 * m * k * n
        yield {"name": f"product {m} x {k} x {n}", "TFLOP/s": flops / seconds(call, lambda: a @ b) / 1e12}


def attention(call, kind):
    """Times attention, forward and backward, by one of torch's kernels; layout and mask as in models.py."""
    B, H, D = call.size.heads
    for T, masked, p in itertools.product(call.size.lengths, (False, True), (0.0, 0.1)):
        x = torch.randn(4, B, T, H, D, device=call.device, dtype=torch.bfloat16)
        q, k, v, grad = x.movedim(0, 2).contiguous().permute(2, 0, 3, 1, 4)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        mask = torch.arange(T, device=call.device) < T - torch.arange(B, device=call.device)[:, None] % 8

        def step():
            with sdpa_kernel(kind):
                out = F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask[:, None, None] if masked else None, dropout_p=p)
            torch.autograd.grad(out, inputs, grad)
        row = {"name": f"{kind.name.lower()}, T {T}, {'mask' if masked else 'no mask'}, dropout {p}"}
        try:
            t = seconds(call, step)
            yield row | {"ms": t * 1e3, "TFLOP/s": 14 * B * H * T * T * D / t / 1e12}
        except RuntimeError as e:
            yield row | {"refused": str(e).splitlines()[0][:100]}


def weights_of(out):
    """Returns the weights that a run left, flat: last.pt of pretraining, random.pt of fine-tuning."""
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(out) for name in names
             if name in ("last.pt", "random.pt")]
    return torch.cat([x.flatten().double() for x in training.load(paths[0])["model"].values()])


def distance(a, b):
    return {"relative difference": (torch.dist(a, b) / a.norm()).item(), "bitwise": torch.equal(a, b)}


def demo_flags(call, script, out):
    """Returns the flags of a short demo that writes to out."""
    flags = f"--data_dir {call.work}/data --out {out}"
    if script == "finetune.py":
        return f"{call.size.demo_tuning.format(work=call.work)} {flags}"
    return f"--demo --steps {call.size.steps} {call.size.demo} {flags}"


def resume(call, script, flags, changes=()):
    """Compares the weights of a demo that is stopped and resumed with those of one that is not stopped."""
    whole, parts = new_folder(call), new_folder(call)
    run_script(call, script, f"{demo_flags(call, script, whole)} {flags}", changes)
    again = f"{demo_flags(call, script, parts)} {flags}"
    code = run_script(call, script, again, changes, stopped)["code"]
    run_script(call, script, again if script == "finetune.py" else f"--resume --out {parts}", changes)
    weights = weights_of(whole), weights_of(parts)
    yield {"name": title(script, flags, changes), "stopped with": code} | distance(*weights)


def title(*parts):
    """Returns the name of a row: words, and changes by their names."""
    words = [" ".join(change.__name__ for change in x) if isinstance(x, tuple) else str(x) for x in parts]
    return " ".join(word for word in words if word)


def ranks(call, script):
    """Compares a demo's weights with and without DDP on one rank; no step with DDP may wait for the GPU."""
    ddp, alone, broken = (f"{demo_flags(call, script, new_folder(call))} --eval_every 9999" for _ in range(3))
    facts = run_script(call, script, ddp + " --compile", (as_one_of_many, ), strict)
    run_script(call, script, alone + " --compile")
    code = run_script(call, script, broken + " --no-compile", (as_one_of_many, infinite_norm))["code"]
    weights = [weights_of(re.search(r"--out (\S+)", flags)[1]) for flags in (ddp, alone)]
    yield {"name": script} | facts | {"infinite gradient: exit code": code} | distance(*weights)


def ceiling(call, name, key):
    """Returns what the item ceilings measured, NaN where it is missing."""
    return next((row[key] for row in finished_rows(call.rows) if row["name"].startswith(name) and key in row),
                math.nan)


def bert_row(call, name, facts, config):
    """Adds tokens/s and MFU: against this call's matrix product, at the masks of RandomMask's first phase."""
    with torch.device("meta"):
        flops = models.Bert(config).flops_per_token(config.block_size, 0.14)
    rate, peak = call.size.batch * config.block_size / facts["ms"] * 1e3, ceiling(call, "product", "TFLOP/s")
    return {"name": name, "tokens/s": rate, "mfu": rate * flops / peak / 1e12} | facts


def bert_config(call, dropout):
    return models.BertConfig(dropout=dropout) if call.device == "cuda" else models.BertConfig(
        69, 18, 1, 2, 16, 64, dropout)


def bert(call, dropout, flags, changes=()):
    """Measures randommask.py's step."""
    facts = run_script(call, "randommask.py", f"{call.size.bert} --dropout {dropout} {flags} "
                       f"{genome_flags(call)}", changes, measured)
    yield bert_row(call, title("ours, dropout", dropout, flags, changes), facts, bert_config(call, dropout))


def bert_peer(call, dropout, compiled):
    """Measures Hugging Face's step as used today: sdpa, fused AdamW, torch.compile; on a fixed batch."""
    config, facts = bert_config(call, dropout), {}
    tokens = torch.randint(5, config.vocab_size, (call.size.batch, config.block_size), device=call.device)
    labels = torch.where(torch.rand(tokens.shape, device=call.device) < 0.14, tokens, -100)
    network = bench.hugging_face(models.Bert(config)).to(call.device)
    if compiled:
        network.compile(**call.size.compile)
    step = bench.bert_step(network, lambda: (tokens, labels), call.device == "cuda")
    for _ in measured(call, facts):
        step()
    name = title("Hugging Face sdpa, fused AdamW, dropout", dropout, "compiled" if compiled else "")
    yield bert_row(call, name, facts, config)


def mixer_bytes(config):
    """Returns the fewest bytes a token that a FinDNA step moves in bf16: those of products and rotations.

    A block, in units of C and H: forward fc1 C + H, fc2 H + C, rotation and sum 3 C; backward rotation 2 C,
    fc2 2 (C + H), GELU H, fc1 2 (H + C), sum 2 C; and a forward pass of the teacher.
    """
    C, H = config.n_embd, config.hidden
    return 2 * config.n_layer * config.n_blocks * (18 * C + 9 * H)


def findna(call, size, flags, changes=()):
    """Measures findna.py's step, at a micro-batch size; the floor: mixer_bytes at the rate of a copy."""
    text = f"{call.size.findna} --micro_batch_size {size} {flags} {genome_flags(call)}"
    facts, config = run_script(call, "findna.py", text, changes, measured), models.ChordMixerConfig()
    rate, n = ceiling(call, "copy", "GB/s") * 1e6, call.size.batch             # bytes a ms
    floor = n * config.length * mixer_bytes(config) / rate
    yield {"name": title("micro-batch", size, flags, changes), "sequences/s": n / facts["ms"] * 1e3,
           "share of the bandwidth floor": floor / facts["ms"]} | facts


def tuning(call, L, flags, changes=()):
    """Measures finetune.py's step on sequences of L bases."""
    text = f"--csv {call.work}/{L}.csv --init random --batch_size {call.size.tuning_batch} {call.size.tuning}"
    facts = run_script(call, "finetune.py", f"{text} {flags} --out {new_folder(call)}", changes, measured)
    yield {"name": title(f"{L} bases, ours", flags, changes)} | facts


def tuning_peer(call, L, compiled):
    """Measures the step of Hugging Face's Trainer on sequences of L bases: sdpa, fused AdamW, bf16."""
    facts, config = {}, bert_config(call, 0.1)
    config.block_size = max(config.block_size, L)
    spec = finetune.BertHead.body_spec(config) | {"n_out": 2, "long": "chunk", "dtype": "float32"}
    peer = bench.hugging_face(finetune.build_net(spec), classes=("a", "b")).to(call.device)
    if compiled:
        peer.compile(**call.size.compile)
    shape = call.size.tuning_batch, L - config.k + 3
    tokens = torch.randint(5, config.vocab_size, shape, device=call.device)
    batch, mask = (tokens, tokens[:, 0] % 2), torch.ones_like(tokens)
    step = bench.bert_step(peer, lambda: batch, call.device == "cuda", 1.0, attention_mask=mask)
    for _ in measured(call, facts):
        step()
    yield {"name": title(f"{L} bases, Trainer's loop", "compiled" if compiled else "")} | facts


def tuning_waits(call):
    """Runs the demo of finetune.py, no step of which may wait for the GPU."""
    flags = demo_flags(call, "finetune.py", new_folder(call))
    yield {"name": "finetune.py"} | run_script(call, "finetune.py", flags, (), strict)


def card(call, flags):
    """Measures randommask.py in fp32 on a card of 11 GB, with as many bases on it as hg38 has."""
    micro = "--micro_batch_size 16" if call.device == "cuda" else ""
    facts = run_script(call, "randommask.py", f"{call.size.bert} {micro} --dtype float32 {flags} "
                       f"{genome_flags(call)}", (small_card, large_genome), measured)
    yield {"name": title("11 GB, fp32", micro, flags)} | facts


def jobs_of(item, call):
    """Returns the jobs of an item, [(function, name)], in the order of their worth."""
    scripts, (large, small) = ("randommask.py", "cm_gems.py", "findna.py"), call.size.micro_batches
    kinds = ATTENTION if call.device == "cuda" else [SDPBackend.MATH]
    exact = (deterministic, )
    jobs = {
        "ceilings": [(ceilings, ), *((attention, kind) for kind in kinds)],
        "resume": [*((resume, script, "--compile") for script in (*scripts, "finetune.py")),
                   *((resume, script, "--no-compile", exact) for script in scripts),
                   (resume, "finetune.py", "", exact)],
        "ranks": [*((ranks, script) for script in scripts), (tuning_waits, )],
        "bert": [(bert, 0.1, "--compile"), (bert_peer, 0.1, True), (bert, 0.1, "--no-compile"),
                 (bert, 0.0, "--compile"), (bert, 0.1, "--compile --dtype bfloat16", (low_norms, )),
                 (bert_peer, 0.1, False), (bert_peer, 0.0, True),
                 (bert, 0.0, "--compile --dtype bfloat16", (low_norms, )),
                 (bert, 0.1, "--compile", exact), (bert, 0.0, "--no-compile")],
        "findna": [*((findna, size, flags, changes) for size in (large, small) for flags, changes in (
                     ("--compile", ()), ("--no-compile", ()), ("--compile", (cuda_graphs, )))),
                   (findna, large, "--compile --track_size 32", (ten_tracks, ))],
        "tuning": [(function, L, *how) for function, *how in (
                     (tuning, ""), (tuning_peer, False), (tuning, "--compile", (cuda_graphs, )),
                     (tuning, "--compile"), (tuning_peer, True)) for L in call.size.bases],
        "card": [(card, "--no-compile"), (card, "--compile")]}[item]
    return [(functools.partial(function, call, *args), title(function.__name__, *args))
            for function, *args in jobs]


# The call

def write_row(path, row):
    """Appends a row: floats with four digits, NaN left out."""
    row = {name: float(f"{x:.4g}") if type(x) is float else x for name, x in row.items() if x == x}
    with open(path, "a") as f:
        f.write(json.dumps(row) + "\n")


def finished_rows(path):
    """Reads the rows that are written to the end, as another process may be writing one."""
    with open(path) as f:
        return [json.loads(line) for line in f if line.endswith("\n")]


def last_words(log):
    """Returns the line of a log that best says why a job ended: the last with an error, else the last."""
    with open(log, errors="replace") as f:
        lines = [line.strip() for line in f if line.strip()] or ["it printed nothing"]
    errors = [line for line in lines if re.match(r"[\w.]*(error|Error|Exception)\b", line)]
    return training.plain((errors or lines)[-1])[:200]


def start(call, item, function, name):
    """Starts a job in a fork with a process group of its own; its output goes to a file."""
    handle, log = tempfile.mkstemp(dir=call.work)

    def main():
        os.setsid()
        os.chdir(call.work)
        # cold, as on a new machine; a killed job can leave half a file there
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": f"{call.work}/cache", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
        began = time.perf_counter()
        for row in function():
            write_row(call.rows, {"item": item} | row | {"job s": time.perf_counter() - began})
    process = FORK.Process(target=main)
    process.start()
    os.close(handle)
    process.name, process.log, process.began = name, log, time.monotonic()
    return process


def finish(call, item, process, late):
    """Ends a job and all that it started; a row says so if it failed. Keeps its output in the call's log."""
    process.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    if late or process.exitcode:
        why = f"killed after {time.monotonic() - process.began:.0f} s" if late else f"exit {process.exitcode}"
        why += f": {last_words(process.log)}"
        write_row(call.rows, {"item": item, "name": process.name, "failed": why})
    with open(process.log, errors="replace") as f, open(call.rows.replace(".jsonl", ".log"), "a") as log:
        log.write(f"\n##### {item}: {process.name}\n{f.read()}")


def run_item(call, item, jobs, limit, most):
    """Runs jobs [(function, name)], some side by side, each for at most `most` of the `limit` seconds."""
    end, waiting, running = time.monotonic() + limit, list(jobs), []
    lanes = call.size.lanes * (2 if item in ("resume", "ranks") else 1)        # these two time nothing
    while waiting or running:
        while waiting and len(running) < lanes and time.monotonic() < end:
            running.append(start(call, item, *waiting.pop(0)))
        time.sleep(0.02)
        for process in list(running):
            late = process.is_alive() and time.monotonic() > min(end, process.began + most)
            if late or not process.is_alive():
                running.remove(process)
                finish(call, item, process, late)
        if time.monotonic() > end and not running:
            for _, name in waiting:
                write_row(call.rows, {"item": item, "name": name, "failed": "not started: no time left"})
            waiting = []


def show(rows):
    """Prints rows as lines of a table in Markdown."""
    for row in rows:
        numbers = ", ".join(f"{name} {x}" for name, x in row.items() if name not in ("item", "name"))
        print(f"| {row['item']} | {row['name']} | {numbers} |", flush=True)


def has_cuda():
    """Tells whether the machine has a GPU; asks in a fork, because CUDA in use does not survive one."""
    process = FORK.Process(target=lambda: sys.exit(not torch.cuda.is_available()))
    process.start()
    process.join()
    return process.exitcode == 0


def main(out, device, only=None):
    """Makes the call. ValueError in one line for flags that do not fit; returns the exit code."""
    device = device if device == "cpu" else "cuda" if has_cuda() else None
    if device is None:
        raise ValueError("gpu: no CUDA device; --device cpu proves the call, with tiny sizes")
    if unknown := set(only or ()) - set(LIMITS):
        raise ValueError(f"gpu: no item {', '.join(unknown)}; choose from {', '.join(LIMITS)}")
    rows = os.path.join(os.path.abspath(out), "gpu.jsonl")
    if os.path.exists(rows):
        raise ValueError(f"--out {out}: holds a call; choose another one")
    os.makedirs(out, exist_ok=True)
    cuda, began, end = device == "cuda", time.monotonic(), 0
    scale = 1 if cuda else 100                               # a CPU is given more time
    print("| item | what | numbers |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as work:
        call, seen = Call(rows, work, device, WHOLE if cuda else TINY), 0
        open(rows, "w").close()
        os.mkdir(f"{work}/data")
        for item in LIMITS if only is None else [item for item in LIMITS if item in only]:
            end += LIMITS[item] * scale
            jobs = jobs_of(item, call)
            if not seen:
                run_item(call, "machine", [(functools.partial(about, call), "about")], 30 * scale, 30 * scale)
            run_item(call, item, jobs, began + end - time.monotonic(), 90 * scale)
            show(finished_rows(rows)[seen:])
            seen = len(finished_rows(rows))
    failed = sum("failed" in row for row in finished_rows(rows))
    print(f"\n{seen} rows in {rows}, {failed} failed; {time.monotonic() - began:.0f} s")
    return int(failed > 0)
