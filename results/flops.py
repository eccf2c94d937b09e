"""Prints the GFLOP of matrix products in a step of a pretraining script, attention by plain products.

    python results/flops.py randommask.py FLAGS              the flags of the run, without --steps and --out
"""
import contextlib
import io
import os
import runpy
import sys
import tempfile

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, os.getcwd())


def count(script, flags, steps):
    """Counts the FLOPs of a run of so many steps, whose evaluations are the same for any number of steps."""
    with tempfile.TemporaryDirectory() as out, sdpa_kernel(SDPBackend.MATH), \
            FlopCounterMode(display=False) as counter, contextlib.redirect_stdout(io.StringIO()):
        sys.argv = [script, *flags, "--steps", str(steps), "--out", f"{out}/run", "--warmup", "1",
                    "--eval_every", "1000000", "--eval_windows", "8"]
        with contextlib.suppress(SystemExit):
            runpy.run_path(script, run_name="__main__")
    return counter.get_total_flops()


if __name__ == "__main__":
    _, script, *flags = sys.argv
    few, more = (count(script, flags, steps) for steps in (10, 30))
    print(f"{(more - few) / 20 / 1e9:.3f} GFLOP a step")
