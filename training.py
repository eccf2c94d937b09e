"""What every training loop calls: devices and ranks, optimizer, schedules, run folder, log, checkpoint, stop signals.

Functions only: no loop over steps, no flags, no method. The user's mistakes are ValueError and OSError with one clear
line; `user_errors` prints it and exits with 2. Exit codes: 0 done, 2 user's mistake, 3 non-finite, 143 stopped.
"""
import argparse
import contextlib
import fcntl
import json
import math
import os
import resource
import shutil
import signal
import sys
import zipfile

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

FORMAT = 1
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}                  # dense bf16, NVIDIA data sheets
MAY_CHANGE = {"out", "resume", "genome", "data_dir", "cache", "device", "compile", "log_every", "save_every", "keep"}
received = []                                                # stop signals so far
parent = os.getppid()


@contextlib.contextmanager
def user_errors(*kinds, advice=""):
    """Turns these exceptions (default ValueError, OSError) into one line on stderr and exit code 2."""
    try:
        yield
    except kinds or (ValueError, OSError) as e:
        print(f"error: {str(e).splitlines()[0]}{advice}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def number(kind, low, high=math.inf):
    """An argparse type: an int or a float in [low, high)."""
    def parse(text):
        value = kind(text.replace("_", "x"))                 # Python would read 1_0 as 10
        if not low <= value < high:
            raise argparse.ArgumentTypeError(f"{text} is outside [{low}, {high})")
        return value
    parse.__name__ = kind.__name__                           # argparse: "invalid int value"
    return parse


def set_up(device, dtype):
    """Flags --device and --dtype -> (torch.device, 'float32' or 'bfloat16', rank, world).

    Under torchrun it joins the process group (nccl on GPUs, gloo on CPUs). Stop signals are caught from here on.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"--device {device}: unknown; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda: no CUDA GPU is visible here; use --device cpu")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"--device {device}: only {torch.cuda.device_count()} GPUs here; lower --nproc_per_node")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "auto":
        dtype = "bfloat16" if bf16 else "float32"
    elif dtype == "bfloat16" and device.type == "cuda" and not bf16:
        raise ValueError("--dtype bfloat16: this GPU has no bf16; use --dtype float32")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: received.append(number))
    return device, dtype, rank, world


def stop_requested():
    """True after a stop signal, or when torchrun itself has died."""
    return bool(received) or "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != parent


def seed(*key):
    """Seeds torch from the key, e.g. (seed, step, micro-batch), and returns a numpy generator of it."""
    rng = np.random.default_rng(key)
    torch.manual_seed(int(rng.integers(2 ** 63)))
    return rng


def all_reduce(numbers):
    """Sums a tensor over the ranks, in place; returns it."""
    if dist.is_initialized():
        dist.all_reduce(numbers)
    return numbers


def memory(device):
    """Peak memory so far, as text."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB of GPU memory"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB of memory"


def peak_flops(device):
    """Data-sheet bf16 FLOP/s of a GPU, 0 where unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for gpu, peak in PEAK_FLOPS.items() if gpu in name), 0)


def make_optimizer(model, lr, weight_decay, betas, eps):
    """Fused AdamW; no weight decay on biases and LayerNorm."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def linear(step, steps, warmup):
    """Share of the peak lr at step 1..steps: linear warm-up to 1, then linear decay towards 0."""
    return min(step / max(warmup, 1), (steps - step + 1) / (steps - warmup + 1))


def cosine(step, steps, warmup):
    """Share of the peak lr at step 1..steps: linear warm-up to 1, then a half cosine towards 0."""
    return min(step / max(warmup, 1), 0.5 + 0.5 * math.cos(math.pi * max(step - warmup, 0) / (steps - warmup + 1)))


def scale_gradients(model, scale, clip):
    """Multiplies the gradients by the 0-dim tensor `scale`, clips their global norm; returns the norm before clipping."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads) * scale
    torch._foreach_mul_(grads, (scale * (clip / (norm + 1e-6)).clamp(max=1.0)).to(grads[0].dtype))
    return norm


def open_run(out, resume, rank):
    """Checks the run folder before anything is written. Rank 0 makes and locks it and returns the lock to hold on to."""
    if os.path.exists(out) and not os.path.isdir(out):
        raise ValueError(f"--out {out}: is a file; name a folder")
    exists = any(os.path.exists(os.path.join(out, name)) for name in ("last.pt", "prev.pt"))
    if exists and not resume:
        raise ValueError(f"--out {out}: holds a run already; continue it with --resume or choose another --out")
    if resume and not exists:
        raise ValueError(f"--resume: no checkpoint in {out}; start without --resume")
    if rank > 0:
        return None
    os.makedirs(out, exist_ok=True)
    lock = open(os.path.join(out, "lock"), "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--out {out}: in use by another run; wait for it or choose another --out") from None
    return lock


def describe_run(out, args, start):
    """Writes args.json and a copy of the running script into the run folder; cuts log rows beyond step `start`."""
    with open(os.path.join(out, "args.json"), "w") as f:
        json.dump(vars(args), f, indent=1)
    shutil.copy(sys.argv[0], out)
    path, rows = os.path.join(out, "log.jsonl"), []
    if os.path.exists(path):
        with open(path) as f:
            rows = [line for line in f if line.endswith("\n") and start and json.loads(line)["step"] <= start]
    with open(path + ".tmp", "w") as f:
        f.writelines(rows)
    os.replace(path + ".tmp", path)


def log(out, row):
    """Appends one row to log.jsonl and prints it."""
    with open(os.path.join(out, "log.jsonl"), "a") as f:
        f.write(json.dumps(row) + "\n")
    tqdm.write(" | ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                          for name, value in row.items()), file=sys.stdout)
    sys.stdout.flush()


def save(state, out, milestone=None):
    """Writes out/last.pt (the one before becomes prev.pt), and a copy as milestone; never leaves a broken file.

    Temp file, fsync, re-opened as a loader would, renamed. OSError with one line when the disk is full.
    """
    tmp, last = os.path.join(out, "last.pt.tmp"), os.path.join(out, "last.pt")
    try:
        with open(tmp, "wb") as f:
            torch.save({"format": FORMAT} | state, f)
            f.flush()
            os.fsync(f.fileno())
        torch.load(tmp, weights_only=True, mmap=True)
        if os.path.exists(last):
            os.replace(last, os.path.join(out, "prev.pt"))
        os.replace(tmp, last)
        if milestone:
            shutil.copy(last, os.path.join(out, milestone + ".tmp"))
            os.replace(os.path.join(out, milestone + ".tmp"), os.path.join(out, milestone))
    except (OSError, RuntimeError) as e:                     # torch hides "no space left" behind a RuntimeError
        cause = e if isinstance(e, OSError) else e.__context__
        with contextlib.suppress(OSError):
            os.unlink(tmp)
        if not isinstance(cause, OSError):
            raise
        raise OSError(f"cannot write {last}: {cause.strerror}; free space and continue with --resume") from None


def load(path):
    """A checkpoint of ours, on the CPU: every zip member stored and CRC-tested, then torch.load(weights_only=True)."""
    try:
        with zipfile.ZipFile(path) as z:
            stored = all(m.compress_type == zipfile.ZIP_STORED for m in z.infolist())
            if not stored or sum(m.file_size for m in z.infolist()) > os.path.getsize(path) or z.testzip():
                raise ValueError("damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != FORMAT:
            raise ValueError(f"format {state['format']!r:.20}, this code reads {FORMAT}")
        return state
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint; check the path") from None
    except Exception as e:                                   # foreign bytes: whatever they raise, they cannot be read
        raise ValueError(f"{path}: not a readable checkpoint ({e!r:.80}); use another one") from None


def load_run(out, expected):
    """The newest sound checkpoint of a run folder (last.pt, else prev.pt, and says so), to continue with.

    expected: what a resume must have in common with it: {'method', 'config', 'data', 'args'}.
    """
    try:
        state = load(os.path.join(out, "last.pt"))
    except ValueError as e:
        print(f"{e}\ncontinuing from the one before, {os.path.join(out, 'prev.pt')}", flush=True)
        state = load(os.path.join(out, "prev.pt"))
    differ = [f"{name}: {state[name]!r} there, {value!r} now" for name, value in expected.items()
              if name != "args" and state[name] != value]
    differ += [f"--{name}: {state['args'].get(name)!r} there, {value!r} now" for name, value in expected["args"].items()
               if name not in MAY_CHANGE and state["args"].get(name) != value]
    if differ:
        raise ValueError(f"--resume: {out} is another run ({'; '.join(differ)[:400]}); give its flags, or another --out")
    return state


def finish(code=0):
    """Leaves the process group together, then exits."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    raise SystemExit(code)
