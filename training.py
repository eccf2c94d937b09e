"""What every training loop calls: flag types, ranks, optimizer, schedules, run folder, checkpoint, stops.

Functions only: no loop over steps, no flags, no method. A user's mistake is a ValueError or OSError whose
text is one clear line: `user_errors` prints it and exits with 2. Others: 0 done, 3 not finite, 143 stopped.
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
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

FORMAT = 1                                                   # of the checkpoint
KEYS = {"format": int, "method": str, "step": int, "model": dict, "optimizer": dict, "config": dict,
        "args": dict, "data": str}                           # in it
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # dense bf16, NVIDIA's data sheets
MAY_CHANGE = ("out", "resume", "init", "genome", "data_dir", "cache", "device", "compile", "log_every",
              "eval_every", "save_every", "keep", "show_masks")      # at a resume: the weights depend on none
signals, parent = [], os.getppid()                           # stop signals received; who started us


def plain(text):
    """Text in one line, safe on a terminal: unprintable characters escaped, a long one cut in the middle."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) < 850 else f"{text[:550]} ... {text[-250:]}"


@contextlib.contextmanager
def user_errors(*kinds):
    """These exceptions (default ValueError, OSError, CUDA out of memory) become one line and exit code 2."""
    try:
        yield
    except kinds or (ValueError, OSError, torch.OutOfMemoryError) as e:
        advice = "; lower --micro_batch_size" if isinstance(e, torch.OutOfMemoryError) else ""
        print(f"error: {plain((str(e) or repr(e)).splitlines()[0])}{advice}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def number(kind, low, high=math.inf):
    """An argparse type: an int or a float in [low, high)."""
    def parse(text):
        value = kind(text.replace("_", "x"))                 # Python would read 1_0 as 10
        if not low <= value < high:
            raise argparse.ArgumentTypeError(f"{text} is outside [{low}, {high})")
        return value
    parse.__name__ = kind.__name__                           # argparse then says "invalid int value"
    return parse


def set_up(device, dtype, join=True):
    """--device, --dtype -> (torch.device, 'float32' or 'bfloat16', rank, world).

    Under torchrun it joins the process group (unless join=False): nccl on GPUs, gloo on CPUs.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(auto if device == "auto" else device)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
    except RuntimeError:
        raise ValueError(f"--device {device}: use auto, cpu, cuda or cuda:N") from None
    bf16 = True
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"--device {device}: {torch.cuda.device_count()} CUDA GPUs here; use another")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "bfloat16" and not bf16:
        raise ValueError("--dtype bfloat16: this GPU has none; use --dtype float32")
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" and bf16 else "float32"
    if world > 1 and join:
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except RuntimeError as e:                            # as after one that was refused and has left
            raise ValueError(f"rank {rank} cannot join the others ({str(e)[:80]!r}); see theirs") from None
    return device, dtype, rank, world


def count_micro_batches(batch_size, micro_batch_size, world):
    """Micro-batches of a step. ValueError where a rank would have none."""
    n_micro = math.ceil(batch_size / micro_batch_size)
    if n_micro < world:
        raise ValueError(f"--batch_size {batch_size}: {n_micro} micro-batches for {world} ranks; "
                         f"lower --micro_batch_size or raise --batch_size")
    return n_micro


def wrap(model, compiled, device, world):
    """What to call for a forward pass: the model, compiled (None: on CUDA), over several ranks in DDP."""
    if compiled or (compiled is None and device.type == "cuda"):
        model.compile()
    return DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model


def catch_signals():
    """From here on SIGTERM, SIGINT and SIGUSR1 are noted, for stop_requested, instead of killing."""
    for which in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(which, lambda which, frame: signals.append(which))


def stop_requested():
    """True after a stop signal, or when torchrun itself has died."""
    return bool(signals) or "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != parent


def seed(*key):
    """Seeds torch from the key (seed, step, micro-batch) and returns a numpy generator of it."""
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
    """Starts copying a tensor to the host; the function returned waits for just that and gives a list."""
    if not numbers.is_cuda:
        return numbers.tolist
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True).copy_(numbers, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return lambda: copied.synchronize() or host.tolist()


def check_finite(step, losses, norm, out, rank):
    """All ranks leave with 3 unless the loss sums and the gradient norm of a step are finite."""
    if not math.isfinite(sum(losses) + norm):
        if rank == 0:
            print(f"error: step {step}: not finite (loss sum{'s' * (len(losses) > 1)} "
                  f"{', '.join(map(str, losses))}, gradient norm {norm}); the checkpoint in {out} is older: "
                  f"start anew from it with --init and a lower --lr", file=sys.stderr)
        finish(3)


def memory(device):
    """Peak memory so far, as text."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB of GPU memory"
    unit = 1e9 if sys.platform == "darwin" else 1e6          # bytes there, KiB elsewhere
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.1f} GB of memory"


def peak_flops(device):
    """Data-sheet bf16 FLOP/s of the GPU; 0 where unknown."""
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
    """Share of the peak lr at step 1..steps: linear warm-up to 1, then half a cosine towards 0."""
    done = max(step - warmup, 0) / (steps - warmup + 1)
    return min(step / max(warmup, 1), 0.5 + 0.5 * math.cos(math.pi * done))


def scale_gradients(model, scale, clip):
    """Multiplies the gradients by the 0-dim tensor `scale`, clips them, returns the norm before clipping."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads) * scale
    torch._foreach_mul_(grads, (scale * (clip / (norm + 1e-6)).clamp(max=1)).to(grads[0].dtype))
    return norm


def check_flags(args):
    """ValueError for flags of pretraining that contradict each other."""
    if args.init and args.resume:
        raise ValueError("--init and --resume: a resumed run has its own weights; drop one of them")
    if args.warmup > args.steps:
        raise ValueError(f"--warmup {args.warmup}: more than --steps {args.steps}")


def check_out(out, resume):
    """ValueError unless --out and --resume fit what is there; writes nothing."""
    if not out or os.path.exists(out) and not os.path.isdir(out):
        raise ValueError(f"--out {out!r}: not a folder; name one")
    if os.path.realpath(out) == os.path.dirname(os.path.realpath(sys.argv[0])):
        raise ValueError(f"--out {out}: the folder of the code; name another one")
    exists = any(os.path.exists(os.path.join(out, name)) for name in ("last.pt", "prev.pt"))
    if exists and not resume:
        raise ValueError(f"--out {out}: holds a run; continue it with --resume or choose another --out")
    if resume and not exists:
        raise ValueError(f"--resume: no checkpoint in {out}; start without --resume")


def open_run(out, args, start):
    """Rank 0 makes and locks the run folder, writes args.json and the script, cuts log rows past `start`.

    Returns the lock, to be held on to. ValueError when another process has it.
    """
    os.makedirs(out, exist_ok=True)
    lock = open(os.path.join(out, "lock"), "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--out {out}: in use by another run; wait or choose another --out") from None
    except OSError as e:
        raise ValueError(f"--out {out}: cannot be locked ({e.strerror}); choose another place") from None
    with open(os.path.join(out, "args.json"), "w") as f:
        json.dump(vars(args), f, indent=1)
    shutil.copy(sys.argv[0], out)
    path = os.path.join(out, "log.jsonl")
    rows = open(path, errors="replace").readlines() if start and os.path.exists(path) else []
    rows = [row for row in rows if row.startswith('{"step": ') and row.endswith("}\n")]      # whole ones
    with open(path + ".tmp", "w") as f:
        f.writelines(row for row in rows if json.loads(row)["step"] <= start)
    os.replace(path + ".tmp", path)
    return lock


def log(out, row):
    """Appends one row to log.jsonl and prints it."""
    with open(os.path.join(out, "log.jsonl"), "a") as f:
        f.write(json.dumps(row) + "\n")
    tqdm.write(" | ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                          for name, value in row.items()), file=sys.stdout)
    sys.stdout.flush()


def made_with():
    """What the last bits of sums depend on, as text: torch, its threads, the CPU's instructions, the GPU."""
    device = torch.cuda.get_device_name() if torch.cuda.is_initialized() else \
        torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}"


def save(state, out, milestone=None):
    """Writes out/last.pt (the one before becomes prev.pt) and a copy as milestone; none is ever half-written.

    Temp file, fsync, re-opened as a loader would, renamed. OSError in one line when it cannot be written.
    """
    tmp, link, last = (os.path.join(out, name) for name in ("last.pt.tmp", "link.tmp", "last.pt"))
    try:
        with open(tmp, "wb") as f:
            torch.save({"format": FORMAT, "made_with": made_with()} | state, f)
            f.flush()
            os.fsync(f.fileno())
        torch.load(tmp, weights_only=True, mmap=True)
        for source, name in ((tmp, milestone), (last, "prev.pt")):             # second names, no copies
            if name and os.path.exists(source):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(link)
                try:
                    os.link(source, link)
                except OSError:                              # no hard links there (exFAT, some networks)
                    shutil.copy(source, link)
                os.replace(link, os.path.join(out, name))
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(link)                          # both names were one file: replace left it
        os.replace(tmp, last)
        folder = os.open(out, os.O_RDONLY)
        os.fsync(folder)                                     # the renames, too, survive a power cut
        os.close(folder)
    except (OSError, RuntimeError) as e:                     # torch hides a full disk behind a RuntimeError
        cause = e if isinstance(e, OSError) else e.__context__
        if not isinstance(cause, OSError):
            raise
        for path in (tmp, link):
            with contextlib.suppress(OSError):
                os.unlink(path)
        raise OSError(f"cannot write {last}: {cause.strerror}; free space, go on with --resume") from None


def leaves(value):
    """What nested dicts, lists and tuples hold; ValueError for more than a million (or 20 nested pairs)."""
    parts = [value]
    for _ in range(10 ** 6):
        if not parts:
            return
        value = parts.pop()
        if isinstance(value, (dict, list, tuple)):
            parts += value.values() if isinstance(value, dict) else value
        else:
            yield value
    raise ValueError("nested without end")


def load(path):
    """A checkpoint of ours, on the CPU: zip members stored and CRC-tested, then loaded with weights_only."""
    try:
        with zipfile.ZipFile(path) as z:
            stored = all(m.compress_type == zipfile.ZIP_STORED for m in z.infolist())
            if not stored or sum(m.file_size for m in z.infolist()) > os.path.getsize(path) or z.testzip():
                raise ValueError("damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        wrong = [name for name, kind in KEYS.items() if not isinstance(state.get(name), kind)]
        if wrong or state["format"] != FORMAT or state["step"] < 0:
            raise ValueError(f"without a good {wrong}" if wrong else "of another format")
        if not all(x.is_contiguous() for x in leaves(state) if torch.is_tensor(x)):
            raise ValueError("a tensor that is not laid out as its shape")     # fused steps never look
        if not all(type(name) is str and torch.is_tensor(x) for name, x in state["model"].items()):
            raise ValueError("weights that are none")
        flags = leaves([state["config"], state["args"]])
        if not all(isinstance(x, (str, int, float, type(None))) for x in flags):
            raise ValueError("flags that are none")
        return state
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint; check the path") from None
    except Exception as e:                                   # foreign bytes, whatever they raise
        raise ValueError(f"{path}: not a readable checkpoint ({e!r:.80}); use another one") from None


def restore(state, parts):
    """Puts a checkpoint in place. parts: {its key: network, optimizer or tensor}.

    ValueError where one does not fit.
    """
    for name, part in parts.items():
        try:
            if torch.is_tensor(part):
                if state[name].shape != part.shape:
                    raise ValueError("another shape")
                part.copy_(state[name])
            elif name == "optimizer":                        # the hyperparameters are those of the flags
                part.load_state_dict({"state": state[name]["state"],
                                      "param_groups": part.state_dict()["param_groups"]})
                for p, moments in part.state.items():        # a fused step trusts these shapes blindly
                    shapes = [moments[key].shape for key in ("exp_avg", "exp_avg_sq", "step")]
                    if shapes != [p.shape, p.shape, ()]:
                        raise ValueError("moments of another shape")
            else:
                part.load_state_dict(state[name])
        except Exception as e:                               # foreign values, whatever they raise
            raise ValueError(f"--resume: {name} of another network ({e!r:.80}); give another --out") from None


def load_run(out, run, fixed=(), **parts):
    """Puts the newest sound checkpoint of a run folder into `parts` (see restore); returns it.

    That is last.pt, else prev.pt, and it says so.
    ValueError unless it has the method, config, data and args of `run` (but for MAY_CHANGE without `fixed`).
    """
    last, prev = os.path.join(out, "last.pt"), os.path.join(out, "prev.pt")
    try:
        state, broken = load(last), False
    except ValueError as e:
        print(f"{e}\ncontinuing from the one before it, {prev}", flush=True)
        state, broken = load(prev), True
    there, now = ({"method": s["method"]} | s["args"] | {name: s[name] for name in ("config", "data")}
                  for s in (state, run))
    differ = [f"{name} {there.get(name)!r} there, {now[name]!r} now" for name in now
              if (name in fixed or name not in MAY_CHANGE) and there.get(name) != now[name]]
    if differ:
        raise ValueError(f"--resume: {out} is another run ({'; '.join(differ)[:300]}); give its flags")
    restore(state, parts)
    made, now = state.get("made_with"), made_with()
    if isinstance(made, str) and made != now:
        print(f"resume   of a run made with {plain(made)}; now {now}: last bits may differ", flush=True)
    if broken:                                               # or it would replace prev.pt at the next save
        with contextlib.suppress(FileNotFoundError):         # another rank was first
            os.replace(last, os.path.join(out, "broken.pt"))
    return state


def finish(code=0):
    """All ranks leave together."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    raise SystemExit(code)
