"""What the training loops share: flags, ranks, optimizer, schedules, run folder, checkpoints, stop signals.

Nothing here names a method and nothing loops over steps: the loop stays in the script. A user's mistake is a
ValueError or OSError whose text is one clear line; `user_errors` prints it and exits with 2. The other exit
codes: 0 done, 3 a loss that is not finite, 130 stopped at once by Ctrl-C, 143 by a signal after a checkpoint.
"""
import sys


def answer_ctrl_c(kind, error, trace):
    """Prints what ends the process; Ctrl-C, also during the imports below, is one line and exit code 130."""
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, trace)
    print("stopped  by Ctrl-C", file=sys.stderr, flush=True)
    if not hasattr(sys, "ps1"):                              # an interactive session goes on
        raise SystemExit(130)


sys.excepthook = answer_ctrl_c

import argparse
import contextlib
import dataclasses
import errno
import functools
import glob
import importlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import time
import zipfile

try:
    import fcntl
    import resource
except ImportError:
    print("error: nanoDNA needs Linux or macOS (file locks); use WSL on Windows", file=sys.stderr)
    raise SystemExit(2) from None

HERE = os.path.dirname(os.path.realpath(__file__))
SCRIPT = os.path.realpath(sys.argv[0]) if os.path.isfile(sys.argv[0]) else ""
if os.path.dirname(SCRIPT) in (HERE, os.path.join(HERE, "tools")):             # else: a notebook, python -c
    def leave(which, frame):
        """Ends at SIGTERM until catch_signals, also during the imports; what is half written is removed."""
        print("stopped  by SIGTERM", file=sys.stderr, flush=True)
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, leave)
    if sys.stdout:                                           # None where it is closed from the start
        def safe(text, write=sys.stdout.write, code=sys.stdout.encoding or "utf-8"):
            """Writes text without the terminal escapes that names in other people's files may hold, and
            without what the terminal's code lacks."""
            text = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
            errors = "replace" if sys.stdout.errors == "replace" else "backslashreplace"
            return write(text.encode(code, errors).decode(code))
        sys.stdout.write = safe

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

FORMAT = 1                                                   # of the checkpoint
KEYS = {"format": int, "method": str, "step": int, "model": dict, "optimizer": dict, "config": dict,
        "args": dict, "data": str}                           # what every checkpoint holds
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12,
              "H200": 989e12}                                # dense bf16, NVIDIA's data sheets
MAY_CHANGE = ("out", "resume", "init", "genome", "data_dir", "cache", "device", "compile", "log_every",
              "eval_every", "save_every", "keep", "show_masks", "dry_run", "track",  # at a resume: no effect
              "verify", "ambiguous", "bed")                          # nor these, if "data" is the same
NEWER = {"strands": "forward", "repeat_weight": 1.0}         # flags that runs of version 0.2 do not know
DTYPES = ("auto", "float32", "bfloat16", "float16")
AUTO = "auto: bfloat16 on CUDA (float16 if the GPU lacks it), float32 on a CPU (%(default)s)"
SKIPS = 100                                                  # steps in a row that float16 may skip
TIMED = (5, 20)                                              # steps after the start: speed is taken between
# BERT's miniatures (Turc et al. 2019, "Well-Read Students Learn Better"; mini: RandomMask's BERT-mini). What
# follows n_inner is ours, not tuned: shorter windows, smaller batches, no dropout, for a CPU or a small GPU
SIZES = {
    "base": {},
    "small": dict(n_layer=4, n_head=8, n_embd=512, n_inner=2048, dropout=0.0, batch_size=256,
                  micro_batch_size=16, lr=3e-4),
    "mini": dict(n_layer=4, n_head=4, n_embd=256, n_inner=1024, dropout=0.0, block_size=128, batch_size=128,
                 micro_batch_size=32, lr=5e-4),
    "tiny": dict(n_layer=2, n_head=2, n_embd=128, n_inner=512, dropout=0.0, block_size=128, batch_size=64,
                 micro_batch_size=32, lr=1e-3)}
TRACKERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}   # modules
TRIAL = (10, 30)                                             # --dry_run: steps, seconds
PASSES = 100                                                 # over the genome: more are remarked upon
DAYS = 3                                                     # on a CPU: a longer run is remarked upon
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
AGAIN = 0.4                                                  # seconds: launchers pass on a Ctrl-C within them
signals, parent = [], os.getppid()                           # stop signals received, when; who started us


def plain(text):
    """Returns text in one line that is safe on a terminal: escapes unprintable characters, cuts long text."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) < 850 else f"{text[:550]} ... {text[-250:]}"


@functools.cache
def say_once(text):
    """Prints a line unless this process has printed it before."""
    print(plain(text), flush=True)


@contextlib.contextmanager
def user_errors(*kinds):
    """Turns these exceptions (default ValueError, OSError, out of memory) into one line and exit code 2.

    Ctrl-C is always one line and exit code 130; what torch.compile raises is one line, too."""
    kinds = kinds or (ValueError, OSError, MemoryError, torch.OutOfMemoryError)
    try:
        yield
    except kinds as e:
        advice = "; lower --micro_batch_size" if isinstance(e, torch.OutOfMemoryError) else ""
        text = f"{e.filename}: {e.strerror}" if getattr(e, "filename", None) and e.strerror else str(e)
        if type(e) is MemoryError and not text:
            text = "not enough memory; raise the limit (ulimit -v, or that of the job)"
        print(f"error: {plain((text or repr(e)).splitlines()[0])}{advice}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt as e:
        answer_ctrl_c(KeyboardInterrupt, e, None)
        raise SystemExit(130) from None
    except RuntimeError as e:
        if not type(e).__module__.startswith(("torch._dynamo.", "torch._inductor.")):
            raise
        print(f"error: torch.compile: {compile_error(e)}; remove its cache ($TORCHINDUCTOR_CACHE_DIR, or "
              f"torchinductor_* in the folder for temporary files), or do not compile", file=sys.stderr)
        raise SystemExit(2) from None


def number(kind, low, high=math.inf, closed=False):
    """Makes an argparse type that parses an int or a float in [low, high), or in [low, high] where closed."""
    def parse(text):
        value = kind(text.replace("_", "x"))                 # Python would read 1_0 as 10
        if not (low <= value < high or closed and value == high):
            raise argparse.ArgumentTypeError(f"{text} is outside [{low}, {high}{']' if closed else ')'}")
        return value
    parse.__name__ = kind.__name__                           # argparse then says "invalid int value"
    return parse


share = number(float, 0, 1, closed=True)


def add_size_flag(add):
    """Adds --size, by which parse_flags replaces defaults."""
    add("--size", choices=SIZES, help="defaults of --n_layer, --batch_size, --lr ... for a network of this "
        "size (base; see docs/use.md)")


def file_name(text):
    """Parses a path or hf:FOLDER (an argparse type); refuses an empty one, as of an unset shell variable."""
    if not text or text.endswith(("hf:", "findna:", "random:")):
        raise argparse.ArgumentTypeError(f"{text!r}: is empty; name a file or folder")
    return text


def folder_name(text):
    """Parses the path of a folder, there or still to be made: an argparse type."""
    if os.path.lexists(text) and not os.path.isdir(text):    # also a link that leads nowhere
        raise argparse.ArgumentTypeError(f"{text!r}: not a folder; name one")
    return file_name(text)


class StoreOnce(argparse.Action):
    """Stores the values of a flag, but a list only once: argparse would forget the first one."""

    def __call__(self, parser, namespace, values, flag=None):
        if isinstance(values, list) and getattr(namespace, self.dest) is not self.default:
            parser.error(f"argument {flag}: given twice; give all its values after one {flag}")
        setattr(namespace, self.dest, values)


def make_parser(description):
    """Returns an argparse parser that keeps the lines of the description and takes whole flags only."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.register("action", None, StoreOnce)
    return parser


def new_parser(description, strands=True):
    """Returns the parser of a pretraining script, with the flags of what is read (strands: --strands too)."""
    parser = make_parser(description)
    add = parser.add_argument_group("data").add_argument
    add("--genome", type=file_name, nargs="+", default=["hg38"],
        help="FASTA files, plain or gzip; or hg38; or demo (hg38)")
    add("--data_dir", type=folder_name, default="data", help="folder of hg38.fa.gz (%(default)s)")
    add("--cache", type=folder_name, help="folder for the packed genome (default: beside the FASTA)")
    add("--verify", action="store_true", help="compare the packed genome with the FASTA, base by base")
    add("--ambiguous", choices=("N", "random"), default="N",
        help="read IUPAC codes as N, or each as a random one of its bases (N)")
    add("--val_contigs", type=lambda text: text.split(","), default=[],
        help="contigs held out for validation, comma-separated (the last 1 %% of each; see docs/data.md)")
    add("--bed", type=file_name, help="take windows only from the intervals of this BED file")
    add("--repeat_weight", type=share, default=1.0,
        help="weight of lower-case (soft-masked) bases in the loss, 0 to 1 (%(default)s)")
    if strands:
        add("--strands", choices=("forward", "both"), default="forward",
            help="strand of a training window; both: either, at random (%(default)s)")
    return parser


def add_optimization_flags(parser, batch_size, micro_batch_size, lr, warmup, weight_decay):
    """Adds the optimizer's flags with these defaults (warmup in words); returns add_argument of the group."""
    add, positive = parser.add_argument_group("optimization").add_argument, number(int, 1)
    add("--batch_size", type=positive, default=batch_size,
        help="sequences of a step, over all GPUs (%(default)s)")
    add("--micro_batch_size", type=positive, default=micro_batch_size, help=f"sequences of a forward pass "
        f"({micro_batch_size or 'on GPUs batch_size / ranks, at most 64; on a CPU 8'})")
    add("--lr", type=number(float, 1e-30), default=lr, help="peak learning rate (%(default)s)")
    add("--warmup", type=number(int, 0), help=f"steps of linear warm-up ({warmup} of the steps)")
    add("--weight_decay", type=number(float, 0), default=weight_decay, help="of AdamW (%(default)s)")
    add("--grad_clip", type=number(float, 1e-30), default=1.0, help="largest gradient norm (%(default)s)")
    return add


def add_run_flags(parser, out, eval_windows, eval_every=None, keep="none"):
    """Adds the flags of a run that mean the same in every pretraining script; these four defaults differ.

    eval_every None: the script fills in a twentieth of the steps. keep: the default of --keep in words."""
    add, positive = parser.add_argument_group("run").add_argument, number(int, 1)
    add("--out", type=file_name, default=out, help="run folder (%(default)s)")
    add("--resume", action="store_true", help="continue the run in --out, with the flags it was started with")
    add("--keep", type=positive, nargs="+", default=[], metavar="STEP",
        help=f"keep the checkpoints of these steps as step_N.pt ({keep})")
    add("--log_every", type=positive, default=100, help="log every N steps (%(default)s)")
    add("--eval_every", type=positive, default=eval_every,
        help=f"evaluate every N steps ({eval_every or 'steps / 20'})")
    add("--eval_windows", type=positive, default=eval_windows, help="validation windows (%(default)s)")
    add("--save_every", type=number(float, 0), default=10.0,
        help="minutes between checkpoints; 0: only at --keep, at a stop and at the end (%(default)g)")
    add("--seed", type=number(int, 0, 2 ** 63), default=42, help="seed of all random draws (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    add("--dtype", choices=DTYPES, default="auto", help=AUTO)
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    add("--show_masks", type=positive, metavar="N", help="print what is masked in N sequences, then stop")
    add("--dry_run", action="store_true", help="print what the run needs, time a few steps, then stop")
    add("--track", choices=TRACKERS, help="also send the log to this tracker (install its package first)")
    add("--demo", action="store_true", help="train a tiny model on a synthetic genome")


IDLE = []                                                    # flags on the command line that do nothing


def parse_flags(parser, demo, idle=lambda args: ()):
    """Parses the command line. --demo and --size replace defaults, --resume takes the run's args.json.

    A flag on the command line wins over both; load_run refuses one that would make it another run.
    idle(args): names of the flags that do nothing beside the others; `describe` says it of those given."""
    outlive_streams()
    args = parser.parse_args()
    if args.demo:
        for name in ("size", "model", "preset"):             # each is of one script or two
            if (value := getattr(args, name, None)) != parser.get_default(name):
                raise ValueError(f"--{name} {value}: the demo has settings of its own; drop one of them")
        parser.set_defaults(**demo)
    if getattr(args, "size", None):
        names = vars(args)                                   # not all scripts have n_inner
        parser.set_defaults(**{name: x for name, x in SIZES[args.size].items() if name in names})
    args = parser.parse_args()
    if args.resume and args.init:
        raise ValueError("--init and --resume: a resumed run has its own weights; drop one of them")
    if args.resume and has_checkpoint(args.out):
        parser.set_defaults(**read_args(parser, args))
        return parser.parse_args()
    IDLE[:] = [f"--{name}" for name in idle(args) if getattr(args, name) != parser.get_default(name)]
    return args


def complete_warmup(args, share):
    """Sets --warmup, unless it is given, to this share of the steps. ValueError if it or --keep is more."""
    if args.warmup is None:
        args.warmup = round(share * args.steps)
    if args.warmup > args.steps:
        raise ValueError(f"--warmup {args.warmup}: more than --steps {args.steps}")
    if max(args.keep, default=0) > args.steps:
        raise ValueError(f"--keep {max(args.keep)}: the run has {args.steps} steps; name some of these")


def read_args(parser, args):
    """Returns the flags in the args.json of the run in args.out (without it, in its checkpoint) as defaults.

    ValueError if the file is broken. Numbers become text, because argparse checks a default that is text."""
    path = os.path.join(args.out, "args.json")
    try:
        if os.path.exists(path):
            with open(path, opener=no_links) as f:
                saved = json.load(f)
        else:
            saved = load_newest(args.out)[0]["args"]
            if read_ranks()[0] == 0:
                print(f"resume   {path} is missing: the flags are those in the checkpoint", flush=True)
        unknown = ", ".join(f"--{name}" for name in sorted(saved.keys() - vars(args).keys()))
        saved = {name: value for name, value in saved.items()
                 if name in vars(args) and name not in ("out", "resume", "show_masks", "dry_run", "verify")}
        if type(saved.get("save_every")) is int:             # of version 0.2
            del saved["save_every"]
            if read_ranks()[0] == 0:
                print("resume   --save_every of this run counts steps: now 10 minutes", flush=True)
    except (OSError, ValueError, AttributeError, RecursionError) as e:
        if not os.path.exists(path):
            raise
        raise ValueError(f"{path}: cannot be read ({e!r:.80}); delete it to take the checkpoint's") from None
    if unknown:
        raise ValueError(f"--resume: {args.out} is a run of another script, which has {unknown}; resume it "
                         f"with that script (a copy is in {args.out})")
    for name, value in saved.items():
        default = parser.get_default(name)
        kinds = (str, int, float, list, type(None)) if default is None else type(default)
        items = {type(item) for item in value} if isinstance(value, list) else set()
        if not isinstance(value, kinds) or items - {int if name == "keep" else str} or \
                name == "genome" and not value:
            raise ValueError(f"{path}: {name} {value!r:.40} has the wrong type; restore the file")
        if type(value) in (int, float):
            saved[name] = str(value)
    return saved


def read_ranks():
    """Returns (rank, world, local rank) of torchrun's variables. ValueError unless they make sense."""
    names = ("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")
    texts = [os.environ.get(name, default) for name, default in names]
    rank, world, local = (int(text) if text.isdecimal() else -1 for text in texts)
    needed = {"RANK", "MASTER_ADDR", "MASTER_PORT"} if world > 1 else set()
    if not 0 <= rank < world or local < 0 or not needed <= os.environ.keys():
        given = ", ".join(f"{name} {text!r:.9}" for (name, _), text in zip(names, texts))
        raise ValueError(f"{given}: start with torchrun, which sets these, MASTER_ADDR and MASTER_PORT; or "
                         f"unset them all")
    return rank, world, local


def lacks(dtype, cpu="/proc/cpuinfo"):
    """Tells whether the CPU has no instructions for a 16-bit dtype (AMX, AVX-512, NEON); unknown: False."""
    names = {"bfloat16": "bf16", "float16": "fp16|asimdhp"}
    try:
        with open(cpu) as f:
            return dtype in names and not re.search(names[dtype], f.read())
    except OSError:
        return False


def set_up(device, dtype, join=True):
    """Turns --device, --dtype into (torch.device, 'float32', 'bfloat16' or 'float16', rank, world).

    Under torchrun it joins the process group (unless join=False): nccl on GPUs, gloo on CPUs."""
    rank, world, local = read_ranks()
    if device.split(":")[0] == "mps":
        raise ValueError("--device mps: Apple's GPUs have no float64, in which pretraining sums its losses, "
                         "and nothing here was ever tried on one; use --device cpu")
    try:
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(auto if device == "auto" else device)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
    except RuntimeError:
        raise ValueError(f"--device {device}: use auto, cpu, cuda or cuda:N") from None
    bf16 = True
    if device.type == "cuda":
        device = torch.device("cuda", local if "LOCAL_RANK" in os.environ else device.index or 0)
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA GPUs; "
                             f"use another")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "bfloat16" and not bf16:
        raise ValueError("--dtype bfloat16: this GPU does not support it; use --dtype float16")
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "bfloat16" if bf16 else "float16"
    if rank == 0 and device.type == "cpu" and lacks(dtype):
        say_once(f"note: --dtype {dtype}: this CPU has no instructions for it: 10 to 20 times slower than "
                 f"float32; leave the flag out")
    if world > 1 and join:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)        # a rank that waits for others never sees `leave`
        try:
            cuda = device.type == "cuda"                     # NCCL connects here if it knows the device
            dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
        except RuntimeError as e:                            # for instance, another rank left with an error
            raise ValueError(f"rank {rank} cannot join the others ({str(e)[:80]!r}); see their "
                             f"messages") from None
    return device, dtype, rank, world


@functools.cache
def can_compile(device):
    """Tells whether torch.compile works on this device on all ranks, by compiling a line; says why if not."""
    trial, x, error = torch.nn.Module(), torch.ones(8, device=device, requires_grad=True), ""
    trial.forward = lambda x: (2 * x + 1).square().sum()
    try:
        trial.compile()
        trial(x).backward()
    except Exception as e:                                   # of a compiler, a cache, a driver: of any kind
        error = compile_error(e)
    errors = [error] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(errors, error)
    if any(errors):
        say(f"compile  off, as torch.compile fails here: {max(errors)}")
    return not any(errors)


def compile_error(e):
    """Returns what made torch.compile fail, as one line."""
    e = getattr(e, "inner_exception", e)
    return plain(f"{type(e).__name__}: {e}".strip().splitlines()[0])[:300]


def wrap(model, compiled, device, world):
    """Returns what to call for a forward pass: the model, in DDP if world > 1.

    Compiled (None: on CUDA), where that works."""
    if (compiled or (compiled is None and device.type == "cuda")) and can_compile(device):
        model.compile()
    return DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model


def autocast(device, dtype):
    """Returns the context of a forward pass whose products are in this dtype ('float32': nothing changes)."""
    low = torch.float16 if dtype == "float16" else torch.bfloat16
    return torch.autocast(device.type, low, enabled=dtype != "float32")


def make_scaler(device, dtype):
    """Returns PyTorch's loss scaling: float16 needs it, as its numbers end at 6e-8; for others it is off."""
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    scaler.scale(torch.zeros((), device=device))             # makes the tensors that `restore` fills
    return scaler


def note_signal(which, frame):
    """Notes a stop signal for stop_requested; a second Ctrl-C stops at once."""
    now = time.monotonic()
    if which == signal.SIGINT and any(w == which and now - then > AGAIN for w, then in signals):
        raise KeyboardInterrupt
    signals.append((which, now))


def catch_signals():
    """Catches the signals in STOPS: from here on they no longer kill, and stop_requested reports them."""
    for which in STOPS:
        if which != signal.SIGHUP or signal.getsignal(which) != signal.SIG_IGN:                # nohup
            signal.signal(which, note_signal)


def release_signals():
    """Lets the signals in STOPS kill again from here on."""
    signals.clear()
    for which in STOPS:
        if signal.getsignal(which) == note_signal:
            signal.signal(which, signal.SIG_DFL if which != signal.SIGINT else signal.default_int_handler)


def outlive_streams():
    """Lets stdout and stderr go nowhere once they break (full disk, closed pipe): a run can do without."""
    def guard(stream, call):
        def guarded(*args):
            try:
                return call(*args)
            except OSError as e:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())               # also takes what is still in its buffer
                os.close(null)
                print(f"warning: {stream.name}: {e.strerror}; the run goes on without it", file=sys.stderr)
        return guarded
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):
        stream.write, stream.flush = guard(stream, stream.write), guard(stream, stream.flush)


def stop_requested():
    """Tells whether a stop signal has come, or torchrun itself has died."""
    return bool(signals) or "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != parent


def until_stopped(items):
    """Yields the items; InterruptedError once a stop signal has come."""
    for item in items:
        if stop_requested():
            raise InterruptedError("stopped by a signal")
        yield item


def seed(*key):
    """Seeds torch from the key (seed, step, micro-batch) and returns a numpy generator seeded by it too."""
    rng = np.random.default_rng(key)
    value = int(rng.integers(2 ** 63))
    torch.default_generator.manual_seed(value)               # torch.manual_seed: 90 us more
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(value)
    return rng


def all_reduce(numbers):
    """Sums a tensor over the ranks, in place; returns it."""
    if dist.is_initialized():
        dist.all_reduce(numbers)
    return numbers


def read_later(numbers):
    """Starts copying a tensor to the host; the returned function waits for that copy and gives a list."""
    if not numbers.is_cuda:
        return numbers.tolist
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True).copy_(numbers, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return lambda: copied.synchronize() or host.tolist()


def free_memory(device):
    """Returns the bytes a rank can have: of its GPU, or its share of the machine's or control group's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found, groups = [], ["/sys/fs/cgroup", "/sys/fs/cgroup/memory"]
    with contextlib.suppress(OSError, ValueError):           # Linux
        found.append(1024 * int(re.search(r"MemAvailable:\s*(\d+)", open("/proc/meminfo").read())[1]))
        for line in open("/proc/self/cgroup"):
            groups.append(groups[":memory:" in line] + line.strip().split(":")[2])
    for path in itertools.product(groups, ("memory.max", "memory.limit_in_bytes")):
        with contextlib.suppress(OSError, ValueError):       # "max": no limit
            found.append(int(open(os.path.join(*path)).read()))
    return min(found, default=math.inf) / int(os.environ.get("LOCAL_WORLD_SIZE", read_ranks()[1]))


def memory(device):
    """Returns the peak memory so far, as text."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB of GPU memory"
    unit = 1e9 if sys.platform == "darwin" else 1e6          # macOS counts bytes, Linux KiB
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.1f} GB of memory"


def make_optimizer(model, lr, weight_decay, betas, eps):
    """Returns a fused AdamW; biases and LayerNorm parameters have no weight decay."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def linear(step, steps, warmup):
    """Returns the share of the peak lr at step 1..steps: linear warm-up to 1, then linear decay towards 0."""
    warmup = max(warmup, 1)                                  # step 1 is then the peak
    return min(step / warmup, (steps - step + 1) / (steps - warmup + 1))


def cosine(step, steps, warmup):
    """Returns the share of the peak lr at step 1..steps: linear warm-up to 1, half a cosine towards 0."""
    warmup = max(warmup, 1)
    done = max(step - warmup, 0) / (steps - warmup + 1)
    return min(step / warmup, 0.5 + 0.5 * math.cos(math.pi * done))


def set_lr(optimizer, lr):
    """Sets the learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def scale_gradients(model, scale, clip):
    """Multiplies the gradients by the 0-dim tensor `scale`, clips them, returns the norm before clipping."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads) * scale
    torch._foreach_mul_(grads, (scale * (clip / (norm + 1e-6)).clamp(max=1)).to(grads[0].dtype))
    return norm


def share_out(costs, world):
    """Deals the indices of `costs` out to the ranks: the costliest first, each to the rank with the least."""
    loads, shares = [0] * world, [[] for _ in range(world)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        rank = loads.index(min(loads))
        loads[rank] += costs[i]
        shares[rank].append(i)
    return [sorted(share) for share in shares]


def say(*lines, **kwargs):
    """Prints on rank 0."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*lines, **kwargs, flush=True)


class Run:
    """What a pretraining loop needs to know about its run: ranks, steps, clock, run folder, stop signals.

    The sums of a step (losses, counts) and the gradient norm stay on the device; the host reads them while
    the device works on the next step, or at once where a log row or a checkpoint is due."""
    say = staticmethod(say)

    def __init__(self, args, writes):
        if args.resume or writes and not args.dry_run:
            check_out(args.out, args.resume)
        self.device, args.dtype, self.rank, self.world = set_up(args.device, args.dtype)
        if args.demo:
            torch.set_num_threads(1)                         # so small a model gains nothing from more
        self.args, self.writes, self.track = args, writes and not args.dry_run, None
        if self.writes and args.track:
            load_tracker(args.track)                         # a missing package is said at once
        self.n_micro = math.ceil(args.batch_size / args.micro_batch_size)
        if self.n_micro < self.world:
            advice = "take fewer ranks" if args.resume else "lower --micro_batch_size or raise --batch_size"
            raise ValueError(f"--batch_size {args.batch_size}: {self.n_micro} micro-batches for {self.world} "
                             f"ranks; {advice}")
        self.start = self.step = 0                           # steps in the checkpoint; current step
        self.unread, self.stop = [], False
        self.told, self.slow = time.monotonic(), False       # when the speed was said; as days
        self.scaler, self.in_a_row = make_scaler(self.device, args.dtype), 0   # steps without finite gradient
        self.row = {}                                        # of this step, while its evaluation is not done
        self.cost = lambda i, n, size: 1                     # of micro-batch i, for even shares
        self.fixed = ()                                      # flags of MAY_CHANGE that may not, here

    def open(self, method, config, fingerprint, parts, values=None):
        """Opens and locks the run folder; at --resume loads the checkpoint into `parts` and `values`.

        parts: {key of the checkpoint: network, optimizer or tensor}; values: {more keys: their first values},
        None for a number to come."""
        self.identity = {"method": method, "config": dataclasses.asdict(config), "data": fingerprint,
                         "args": vars(self.args)}
        self.parts, self.values = parts, values = parts, {} if values is None else values
        if self.args.dtype == "float16":
            parts["scaler"], values["skipped"] = self.scaler, 0
        state = load_run(self.args.out, self.identity, self.fixed, **parts) if self.args.resume else {}
        for name, first in values.items() if state else ():
            if type(state.get(name, state)) not in (type(first), int if first is None else None):
                raise ValueError(f"--resume: the checkpoint in {self.args.out} has no {name}; use another")
            values[name] = state[name]
        before, here = state.get("device"), self.device.type
        if isinstance(before, str) and before != here:
            self.say(f"resume   a run from {plain(before)}: on {here}, masks and dropout are drawn "
                     f"differently from here on, in evaluations too")
        self.start, self.row = state.get("step", 0), state.get("row", {})
        here = torch.tensor([self.start], device=self.device)
        if self.args.resume and all_reduce(here).item() != self.start * self.world:
            raise ValueError(f"--resume: rank {self.rank} reads step {self.start} in {self.args.out}, others "
                             f"another step; give all nodes the same folder")
        wrong = None
        try:
            if self.rank == 0:
                self.lock = open_run(self.args.out, self.args, self.start - bool(self.row),
                                     fresh=not self.args.resume)
                self.track = open_tracker(self.args, self.start)
        except (ValueError, OSError) as e:
            wrong = e
        self.raise_on_all(wrong)

    def raise_on_all(self, wrong):
        """Raises what this rank alone may have met (an exception or None); the others then leave with 2."""
        if all_reduce(torch.tensor([float(wrong is not None)], device=self.device)).item():
            raise wrong or SystemExit(2)

    def check_memory(self, build, length, teachers=0):
        """Raises ValueError unless weights, gradients, moments and a micro-batch fit in memory.

        build(args): the network, here on no device, so that nothing is allocated; length: tokens of a
        sequence; teachers: copies of the network."""
        if self.args.show_masks:                             # trains nothing
            return
        args, size = self.args, 4 if self.args.dtype == "float32" else 2.5       # some stay float32
        try:
            with torch.device("meta"):
                model = build(argparse.Namespace(**vars(args) | {"init": None}))
        except (RuntimeError, TypeError):                    # more than 64 bits can count
            raise ValueError("memory: no machine holds a network of this size; give a smaller one") from None
        fixed = 4 * (4 + teachers) * sum(p.numel() for p in model.parameters())
        each = size * length * model.saved_per_token(length, self.device.type == "cuda")
        n, free = min(args.micro_batch_size, args.batch_size), free_memory(self.device)
        self.needs = f"about {(fixed + n * each) / 1e9:.2g} GB of {free / 1e9:.2g} GB free"
        wrong = None
        if fixed + n * each > free:
            fits, size = int(max(0.9 * free - fixed, 0) / each), getattr(args, "size", "none")
            advice = "--size small" if size in (None, "base") else "a smaller network"
            advice = f"--micro_batch_size {fits} or {advice}" if fits else advice
            parts = f"{fixed / 1e9:.2g} GB for the network and its optimizer, the rest for {n} sequences"
            wrong = ValueError(f"memory: the run needs {self.needs} ({parts} of {length} at once); use "
                               f"{'a larger machine' if args.resume else advice}")
        self.raise_on_all(wrong)

    def describe(self, model, genome, passes, per_step, unit="tokens"):
        """Says what the run is. per_step: tokens (or bases) of a step, from which the speed is computed."""
        self.per_step, self.unit = per_step, unit
        uneven = " in uneven shares" if self.n_micro % self.world else ""
        self.say(f"model    {sum(p.numel() for p in model.parameters()):,} parameters, {self.args.dtype}, "
                 f"{self.world} x {self.device.type}, {self.n_micro} micro-batches of at "
                 f"most {self.args.micro_batch_size} a step{uneven}")
        if IDLE:
            self.say(f"note: {', '.join(IDLE)}: without effect beside the other flags")
        self.say(f"memory   {self.needs}")
        self.say(f"genome   {' '.join(self.args.genome)}: {genome}")
        if passes > PASSES and not self.args.demo:
            self.say(f"warning: {passes:,.0f} passes over the bases that windows reach; give fewer steps, or "
                     f"more DNA")
        if self.start:
            self.say(f"resume   after step {self.start}")
            kept = {n: os.path.exists(f"{self.args.out}/step_{n}.pt") for n in self.args.keep}
            gone = [str(n) for n, there in kept.items() if n <= self.start and not there]
            if gone:
                self.say(f"resume   --keep {' '.join(gone)}: not kept, the run is past that")

    def steps(self, validate):
        """Yields the steps that are left, with a progress bar on a terminal.

        First makes up for the evaluation, if any, that a stop signal cut short."""
        self.clock, self.timed, self.saved = time.perf_counter(), self.start, time.monotonic()
        self.told = time.monotonic()
        if self.args.dry_run:
            yield from self.trial_steps()
        catch_signals()
        if self.row:
            self.to_evaluate = self.to_log = self.to_save = True
            self.step = self.start
            self.log(self.row, validate)
            self.save()
            self.end_step()
        steps = range(self.start + 1, self.args.steps + 1)
        for step in tqdm(steps, initial=self.start, total=self.args.steps, unit="step",
                         disable=self.rank > 0 or not sys.stderr.isatty()):
            self.step = step
            yield step
        release_signals()
        self.say(f"done     {self.args.steps} steps; checkpoint {self.args.out}/last.pt, log "
                 f"{self.args.out}/log.jsonl")

    def trial_steps(self):
        """Yields steps of one micro-batch a rank, says what the run would take, and leaves: --dry_run."""
        seconds, steps, limit = [], self.args.steps, TRIAL[1] * self.world
        spent = torch.zeros((), device=self.device)          # by all ranks, which end together
        while len(seconds) < TRIAL[0] and spent.item() < limit:
            self.step, began = len(seconds) + 1, time.perf_counter()
            yield self.step
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
            spent += all_reduce(torch.full_like(spent, seconds[-1]))
        step = self.whole * float(np.median(seconds[1:] or seconds))           # the first is slower
        self.say(f"dry run  {len(seconds)} steps of a micro-batch: {self.per_step / step:,.0f} "
                 f"{self.unit}/s, {step:.3g} s a step, {steps * step / 3600:.2g} h for {steps:,} steps "
                 f"(evaluations not counted), {memory(self.device)}; nothing was written")
        finish()

    def micro_batches(self, size):
        """Yields (i, n) for this rank's micro-batches of `size` sequences: number i has n of them."""
        n = self.args.micro_batch_size
        parts = [(i, min(n, size - i * n)) for i in range(math.ceil(size / n))]
        mine = share_out([self.cost(i, n, size) for i, n in parts], self.world)[self.rank]
        if self.args.dry_run:                                # the middle one stands for all
            first, mine = mine, mine[len(mine) // 2:][:1]
            self.whole = sum(self.cost(*parts[i], size) for i in first) / self.cost(*parts[mine[0]], size)
        self.last_micro = mine[-1] if mine else None
        yield from (parts[i] for i in mine)

    def eval_batches(self):
        """Yields this rank's micro-batches of validation windows, until a stop signal comes."""
        return itertools.takewhile(lambda _: not stop_requested(), self.micro_batches(self.args.eval_windows))

    def sum_evaluation(self, total):
        """Returns a tensor summed over the ranks. InterruptedError on all of them if one is to stop."""
        total = all_reduce(torch.cat([total, total.new_full((1,), stop_requested())]))
        if total[-1]:
            self.stop = self.to_save = True
            raise InterruptedError("stopped by a signal")
        return total[:-1]

    def sync_at_last(self, net, i):
        """Returns a backward pass's context: DDP sums gradients over ranks at the last micro-batch only."""
        return net.no_sync() if self.world > 1 and i != self.last_micro else contextlib.nullcontext()

    def new_sums(self, n):
        """Returns n zeros (float64) for the sums of a step; the host will read the first four."""
        self.numbers = torch.zeros(3 + n, dtype=torch.float64, device=self.device)    # stop, save, norm, sums
        return self.numbers[3:]

    def sum_over_ranks(self):
        """Sums the new_sums of this step, and the requests to stop and to save, over the ranks, in place."""
        self.numbers[0].fill_(stop_requested())              # numbers[0] = ... would make a GPU wait
        overdue = 0 < 60 * self.args.save_every < time.monotonic() - self.saved
        self.numbers[1].fill_(self.rank == 0 and overdue)    # by one clock
        all_reduce(self.numbers)                             # a few bytes; gradients went with backward

    def update(self, optimizer, lr, norm):
        """Takes the optimizer's step; changes nothing if a sum or the gradient norm is not finite."""
        self.numbers[2] = norm
        set_lr(optimizer, lr)
        optimizer.found_inf = 1 - self.numbers.isfinite().all().float()        # 1: AdamW changes nothing
        self.scaler.step(optimizer)                          # float16: its own found_inf, of the gradients
        self.scaler.update()
        optimizer.zero_grad()

    def read(self, also_evaluate=False):
        """Decides what is due after this step (to_evaluate, to_log, to_save) and reads sums and norm for it.

        All ranks leave with 3 if one is not finite. After a stop signal a row and a checkpoint are due."""
        args, step = self.args, self.step
        if args.dry_run:
            self.to_log = self.to_save = False
            return
        last, timing = step == args.steps, step - self.start in TIMED
        self.to_evaluate = step % args.eval_every == 0 or also_evaluate or last
        self.to_log = step % args.log_every == 0 or self.to_evaluate
        self.to_save = step in args.keep or last
        self.unread.append(read_later(self.numbers[:7]))
        behind = self.device.type == "cuda" and not (self.to_log or self.to_save or timing)
        while len(self.unread) > behind:                     # a GPU's last step may stay unread
            self.stop, overdue, self.norm, *self.sums = self.unread.pop(0)()
            self.check_finite(step - len(self.unread))
            self.to_save = self.to_save or bool(self.stop or overdue)
            behind = behind and not self.to_save
        self.to_log = self.to_log or bool(self.stop)
        self.speed = (step - self.timed) * self.per_step / (time.perf_counter() - self.clock)
        if step - self.start == TIMED[-1] or time.monotonic() - self.told > 60 and not sys.stderr.isatty():
            self.tell_speed()

    def tell_speed(self):
        """Says the speed and the time left; the first time also that a CPU would take days."""
        left = (self.args.steps - self.step) * self.per_step / self.speed / 3600
        self.say(f"speed    {self.speed:,.0f} {self.unit}/s, {memory(self.device)}, {left:.2g} h left after "
                 f"step {self.step} of {self.args.steps}")
        if self.device.type == "cpu" and left > DAYS * 24 and not self.slow:
            self.say(f"note: on this CPU the run would take {left / 24:,.0f} days; use a GPU, fewer "
                     f"--steps or a smaller network")
        self.told, self.slow = time.monotonic(), left > DAYS * 24

    def check_finite(self, step):
        """Ends all ranks with exit code 3 unless the sums and the gradient norm of this step are finite.

        In float16 the loss scale may have been too large for the gradient: that step was skipped."""
        finite = math.isfinite(self.norm)
        if self.args.dtype == "float16":
            self.in_a_row = 0 if finite else self.in_a_row + 1
            self.values["skipped"] += not finite
        if not math.isfinite(sum(self.sums)) or not finite and not 0 < self.in_a_row < SKIPS:
            advice = f"the checkpoint in {self.args.out} is older: use it with --init, another --out and a " \
                "lower --lr" if has_checkpoint(self.args.out) else "start again with a lower --lr"
            sums = ", ".join(map(str, self.sums))
            self.say(f"error: step {step}: not finite (sums of losses and counts {sums}; gradient norm "
                     f"{self.norm}); {advice}", file=sys.stderr)
            finish(3)
        self.norm = self.norm if finite else None

    def mfu(self, flops_per_token):
        """Returns {"mfu": share of the GPU's data-sheet FLOP/s}, {} where that is unknown."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        known = max((gpu for gpu in PEAK_FLOPS if re.search(rf"\b{gpu}\b", name)), key=len, default=None)
        return {"mfu": self.speed * flops_per_token / self.world / PEAK_FLOPS[known]} if known else {}

    def log(self, row, validate):
        """Writes a row of the log, on rank 0, with what validate(step) adds where an evaluation is due.

        After a stop signal this is left to --resume: the checkpoint keeps the row. Returns the row."""
        if self.args.dtype == "float16":
            row = row | {"skipped": self.values["skipped"]}
        self.row = row if self.to_evaluate else {}
        if self.row and not self.stop:
            with contextlib.suppress(InterruptedError):
                row = row | validate(self.step)
                self.row = {}
        if self.rank == 0:
            log(self.args.out, {"step": self.step} | row)
            if self.track and not self.row:                  # a tracker takes a step once: when it is whole
                self.track({name: x for name, x in row.items() if isinstance(x, (int, float))}, self.step)
        return row

    def save(self):
        """Writes the checkpoint of this step, on rank 0."""
        self.saved = time.monotonic()
        if self.rank == 0:
            state = states(self.parts) | self.values | {"device": self.device.type}
            if self.row:
                state["row"] = self.row
            milestone = f"step_{self.step}.pt" if self.step in self.args.keep else None
            save(self.identity | {"step": self.step} | state, self.args.out, milestone)

    def end_step(self):
        """Leaves with 143 after a stop signal; else restarts the clock where the loop was held up."""
        if self.stop:
            self.say(f"stopped  by a signal after step {self.step}; continue with --resume")
            finish(143)
        if self.to_log or self.to_save or self.step - self.start == TIMED[0]:
            self.clock, self.timed = time.perf_counter(), self.step


def has_checkpoint(out):
    """Tells whether the run folder holds a checkpoint."""
    return any(os.path.exists(os.path.join(out, name)) for name in ("last.pt", "prev.pt"))


def check_out(out, resume):
    """Raises ValueError unless --out and --resume fit what is there; writes nothing."""
    if not out or os.path.lexists(out) and not os.path.isdir(out):
        raise ValueError(f"--out {out!r}: not a folder; name one")
    if os.path.realpath(out) == os.path.dirname(os.path.realpath(sys.argv[0])):
        raise ValueError(f"--out {out}: the folder of the code; name another one")
    if has_checkpoint(out) and not resume:
        raise ValueError(f"--out {out}: holds a run; continue it with --resume or choose another --out")
    kept = sorted(glob.glob("step_*.pt", root_dir=out), key=lambda name: (len(name), name))
    if kept and not has_checkpoint(out):
        raise ValueError(f"--out {out}: holds {kept[-1]} of a run, but no last.pt; rename it to last.pt and "
                         f"use --resume, or choose another --out")
    if resume and not has_checkpoint(out):
        raise ValueError(f"--resume: no checkpoint in {out}; start without --resume")
    for name in "args.json", "log.jsonl", os.path.basename(sys.argv[0]):
        path = os.path.join(out, name)
        if not resume and os.path.lexists(path) and not os.path.exists(os.path.join(out, "lock")):
            raise ValueError(f"--out {out}: holds a {name} that no run wrote; choose another --out")
    place = os.path.abspath(out)
    while not os.path.exists(place):
        place = os.path.dirname(place)
    if not os.access(place, os.W_OK):
        raise ValueError(f"--out {out}: {place}: Permission denied; choose another --out")


def no_links(path, flags):
    """Opens a file, as opener= of open(), in a folder where others may write: refuses a planted link."""
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)     # nor is a pipe waited for
    except OSError as e:
        if e.errno not in (errno.ELOOP, errno.EMLINK):
            raise
        raise FileExistsError(f"{path}: a link, not followed; remove it") from None


def create(path, mode="x"):
    """Opens a new file for writing in place of what has this name, which may be a planted link."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    return open(path, mode)


def copy(source, target):
    """Copies a file to a new file in place of what has the name of the target."""
    with open(source, "rb") as f, create(target, "xb") as g:
        shutil.copyfileobj(f, g)


def open_run(out, args, start, fresh=False):
    """Makes and locks the run folder, writes args.json and the script, cuts log rows after step `start`.

    Returns the lock, which the caller keeps open. ValueError when another process has it."""
    os.makedirs(out, exist_ok=True)
    lock = open(os.path.join(out, "lock"), "a", opener=no_links)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--out {out}: in use by another run; wait or choose another --out") from None
    except OSError as e:
        raise ValueError(f"--out {out}: cannot be locked ({e.strerror}); choose another place") from None
    if fresh:
        check_out(out, False)                                # another run may have begun and ended meanwhile
    path = os.path.join(out, "args.json")
    with create(path + ".tmp") as f:                         # a full disk must not empty the old one
        json.dump(vars(args), f, indent=1)
    os.replace(path + ".tmp", path)
    if os.path.isfile(sys.argv[0]):                          # not python -c
        copy(sys.argv[0], os.path.join(out, os.path.basename(sys.argv[0])))
    cut_log(out, start)
    return lock


def step_of(line):
    """Returns the step of a line of log.jsonl, None where it has none."""
    try:
        step = json.loads(line)["step"]
        return step if type(step) in (int, float) and step % 1 == 0 else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def cut_log(out, start):
    """Keeps the rows of log.jsonl up to step `start`; lines that are not rows go to log.old.jsonl."""
    path, old, lines = os.path.join(out, "log.jsonl"), os.path.join(out, "log.old.jsonl"), []
    with contextlib.suppress(FileNotFoundError), open(path, "rb", opener=no_links) as f:
        lines = [line for line in f.read().split(b"\n") if start and line.strip()]
    steps = [step_of(line) for line in lines]
    if None in steps:
        with open(old, "ab", opener=no_links) as f:
            f.writelines(line + b"\n" for line, step in zip(lines, steps) if step is None)
        print(f"resume   {path}: {steps.count(None)} lines are not log rows; moved to {old}", flush=True)
    with create(path + ".tmp") as f:
        f.writelines(json.dumps(json.loads(line)) + "\n" for line, step in zip(lines, steps)
                     if step is not None and step <= start)
    os.replace(path + ".tmp", path)


def log(out, row):
    """Appends one row to log.jsonl, with the time (seconds since 1970), and prints it."""
    with open(os.path.join(out, "log.jsonl"), "a", opener=no_links) as f:
        f.write(json.dumps(row | {"time": round(time.time(), 1)}) + "\n")
    tqdm.write(" | ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                          for name, value in row.items()), file=sys.stdout)
    sys.stdout.flush()


def load_tracker(name):
    """Imports the module of a --track. ValueError if it is not installed."""
    try:
        return importlib.import_module(TRACKERS[name])
    except ImportError:
        raise ValueError(f"--track {name}: its package is missing; pip install {name}") from None


def open_tracker(args, start):
    """Returns a function (row, step) that feeds --track, or None. A resumed run goes on in its own curve."""
    if not args.track:
        return None
    module, path = load_tracker(args.track), os.path.join(args.out, "track.txt")
    if args.track == "tensorboard":
        writer = module.SummaryWriter(args.out, purge_step=start + 1, flush_secs=30)
        return lambda row, step: [writer.add_scalar(name, x, step) for name, x in row.items()]
    if not start or not os.path.exists(path):
        with create(path) as f:
            f.write(f"{os.path.basename(os.path.abspath(args.out))}-{time.time_ns() // 10 ** 6}")
    with open(path, opener=no_links) as f:
        name = f.read()
    more = {"id": name, "dir": args.out} if args.track == "wandb" else {}
    module.init(project="nanoDNA", name=name, resume="allow", config=vars(args), **more)
    return lambda row, step: module.log(row, step=step)


def made_with():
    """Describes what the last bits of sums depend on: torch, its threads, the CPU's instructions, the GPU."""
    device = torch.cuda.get_device_name() if torch.cuda.is_initialized() else \
        torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}"


def save(state, out, milestone=None):
    """Writes out/last.pt (the one before becomes prev.pt) and a second name, milestone; never half a file.

    Temporary file, fsync, re-opened as a loader would, renamed. OSError in one line if that fails."""
    tmp, link, last = (os.path.join(out, name) for name in ("last.pt.tmp", "link.tmp", "last.pt"))
    try:
        with create(tmp, "xb") as f:
            torch.save({"format": FORMAT, "made_with": made_with()} | state, f)
            f.flush()
            os.fsync(f.fileno())
        torch.load(tmp, map_location="cpu", weights_only=True, mmap=True)
        for source, name in ((tmp, milestone), (last, "prev.pt")):             # second names, not copies
            if name and os.path.exists(source):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(link)
                try:
                    os.link(source, link)
                except OSError:                              # no hard links (exFAT, some network disks)
                    copy(source, link)
                os.replace(link, os.path.join(out, name))
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(link)                          # both names were one file: replace left it
        os.replace(tmp, last)
        folder = os.open(out, os.O_RDONLY)
        os.fsync(folder)                                     # the renames, too, survive a power cut
        os.close(folder)
    except BaseException as e:
        for path in (tmp, link):
            with contextlib.suppress(OSError):
                os.unlink(path)
        cause = e if isinstance(e, OSError) else e.__context__                 # torch hides a full disk
        if not isinstance(e, (OSError, RuntimeError)) or not isinstance(cause, OSError):
            raise
        raise OSError(f"cannot write {last}: {cause.strerror}; free space, then use --resume") from None


def leaves(value):
    """Yields what nested dicts, lists and tuples hold; ValueError for more than a million values."""
    parts = [value]
    for _ in range(10 ** 6):
        if not parts:
            return
        value = parts.pop()
        if isinstance(value, (dict, list, tuple)):
            parts += value.values() if isinstance(value, dict) else value
        else:
            yield value
    raise ValueError("more than a million values, or nested without end")


def check_state(state):
    """Raises ValueError unless a loaded checkpoint has the keys, types and tensor layouts of one of ours."""
    wrong = [name for name, kind in KEYS.items() if not isinstance(state.get(name), kind)]
    if wrong:
        raise ValueError(f"missing or of the wrong type: {wrong}")
    if state["format"] != FORMAT or state["step"] < 0:
        raise ValueError("of another format")
    if not all(x.is_contiguous() for x in leaves(state) if torch.is_tensor(x)):
        raise ValueError("a tensor that is not contiguous")  # fused steps never look
    if not all(type(name) is str and torch.is_tensor(x) for name, x in state["model"].items()):
        raise ValueError("'model' is not a dict of tensors")
    if not isinstance(state.get("row", {}), dict):
        raise ValueError("'row' is not a row of a log")
    flags = leaves([state["config"], state["args"], state.get("row")])
    if not all(isinstance(x, (str, int, float, type(None))) for x in flags):
        raise ValueError("'config', 'args' or 'row' holds more than numbers and text")


def load(path, opener=None):
    """Loads a checkpoint of ours on the CPU: members stored, CRC-tested; then torch.load(weights_only)."""
    try:
        with open(path, "rb", opener=opener) as f:
            with zipfile.ZipFile(f) as z:
                stored = all(m.compress_type == zipfile.ZIP_STORED for m in z.infolist())
                size = os.fstat(f.fileno()).st_size
                if not stored or sum(m.file_size for m in z.infolist()) > size or z.testzip():
                    raise ValueError("damaged")
            f.seek(0)
            state = torch.load(f, map_location="cpu", weights_only=True)
        check_state(state)
        return state
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint; check the path") from None
    except FileExistsError as e:                             # no_links
        raise ValueError(str(e)) from None
    except IsADirectoryError:
        raise ValueError(f"{path}: a folder; give {os.path.join(path, 'last.pt')}, or hf:{path} for one of "
                         f"Hugging Face") from None
    except Exception as e:                                   # foreign bytes, whatever they raise
        raise ValueError(f"{path}: not a readable checkpoint ({e!r:.80}); use another one") from None


def restore_optimizer(optimizer, model, state):
    """Puts the moments of a checkpoint into the optimizer of a model that has its first weights.

    ValueError unless each parameter has them, but those that never had a gradient: they are as before."""
    groups = zip(optimizer.state_dict()["param_groups"], state["optimizer"]["param_groups"], strict=True)
    optimizer.load_state_dict({"state": state["optimizer"]["state"],           # the flags give the rest
                               "param_groups": [now | {"lr": then["lr"]} for now, then in groups]})
    for name, p in model.named_parameters():
        moments = [optimizer.state.get(p, {}).get(key) for key in ("exp_avg", "exp_avg_sq", "step")]
        if moments[0] is moments[1] is moments[2] is None and torch.equal(p.cpu(), state["model"][name]):
            continue
        if [getattr(x, "shape", None) for x in moments] != [p.shape, p.shape, ()]:
            raise ValueError(f"no moments of {name}")
        if moments[2] != state["step"] - state.get("skipped", 0):
            raise ValueError(f"moments of {name} of another step")


def restore(state, parts):
    """Puts a checkpoint into `parts`, as in states. ValueError if one does not fit."""
    for name in sorted(parts, key=lambda name: name != "optimizer"):           # first, see there
        try:
            if torch.is_tensor(parts[name]):
                if state[name].shape != parts[name].shape:
                    raise ValueError("another shape")
                parts[name].copy_(state[name])
            elif name == "optimizer":
                restore_optimizer(parts[name], parts["model"], state)
            else:
                parts[name].load_state_dict(state[name])
        except Exception as e:                               # foreign values, whatever they raise
            raise ValueError(f"--resume: {name} of another network ({e!r:.80}); give another --out") from None


def states(parts):
    """Returns what a checkpoint keeps of parts {key: network, optimizer, loss scaling or tensor}."""
    return {name: part if torch.is_tensor(part) else part.state_dict() for name, part in parts.items()}


def load_newest(out):
    """Returns the newest sound checkpoint of a run folder, and what is wrong with last.pt if it is prev.pt.

    Others may write to the folder, so a link does not count as one."""
    try:
        return load(os.path.join(out, "last.pt"), no_links), None
    except ValueError as e:
        if not os.path.exists(os.path.join(out, "prev.pt")):
            raise
        return load(os.path.join(out, "prev.pt"), no_links), e


def load_run(out, run, fixed=(), **parts):
    """Puts the newest sound checkpoint of a run folder into `parts` (see restore); returns it.

    That is last.pt, else prev.pt, which it announces. ValueError unless the checkpoint has the method,
    config, data and args of `run`; MAY_CHANGE lists the flags that may differ, unless they are in `fixed`."""
    state, wrong = load_newest(out)
    if wrong:
        say(f"{wrong}\ncontinuing from the one before it, {os.path.join(out, 'prev.pt')}")
    there, now = (NEWER | {"method": s["method"]} | s["args"] | {name: s[name] for name in ("config", "data")}
                  for s in (state, run))
    differ = [f"{name} {there.get(name)!r} there, {now[name]!r} now" for name in now
              if (name in fixed or name not in MAY_CHANGE) and there.get(name) != now[name]]
    if differ:
        advice = "its FASTA and BED files as they were" if there["data"] != now["data"] else "its flags"
        if now["method"] == "finetune":                      # which has no --out for a single run
            advice += ", or remove this folder to start it again"
        raise ValueError(f"--resume: {out} is another run ({'; '.join(differ)[:300]}); give {advice}")
    restore(state, parts)
    made, here = state.get("made_with"), made_with()
    if isinstance(made, str) and made != here:
        say(f"resume   of a run made with {plain(made)}; now {here}: last bits may differ; on another "
            f"model of GPU also some random draws")
    if wrong:                                                # or it would replace prev.pt at the next save
        with contextlib.suppress(FileNotFoundError):         # another rank was first
            os.replace(os.path.join(out, "last.pt"), os.path.join(out, "broken.pt"))
    return state


def finish(code=0):
    """Lets all ranks leave together, with this exit code."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    raise SystemExit(code)
