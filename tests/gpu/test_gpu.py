"""What holds on a GPU: the facts that the call `python -m tools.bench gpu` finds. Skipped without CUDA.

The call runs in a process of its own, since CUDA does not survive a fork; its rows are read here.
"""
import json
import os
import subprocess
import sys

import pytest
from harness import ROOT

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"            # other tests fork after this question
import torch                                                 # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """{item: its rows} of a call with the items that hold facts, not times alone."""
    out = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "tools.bench", "gpu", "--out", str(out), "--only", "resume,ranks,card"]
    subprocess.run(command, cwd=ROOT, timeout=600)
    found = {}
    for line in (out / "gpu.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["item"], []).append(row)
    return found


def test_no_job_failed(rows):
    assert [row for item in rows.values() for row in item if "failed" in row] == []


def test_a_resumed_run_ends_as_one_that_was_not_stopped(rows):
    """To bf16's rounding; bit for bit with deterministic kernels and without compilation."""
    assert len(rows["resume"]) == 8
    for row in rows["resume"]:
        assert row["stopped with"] == 143 and row["relative difference"] < 0.02, row
        assert row["bitwise"] or "deterministic" not in row["name"], row


def test_nccl_changes_nothing_and_no_step_waits(rows):
    scripts = {row["name"]: row for row in rows["ranks"]}
    assert set(scripts) == {"randommask.py", "cm_gems.py", "findna.py", "finetune.py"}
    for name, row in scripts.items():
        assert row["code"] == 0 and row["steps without a wait"] > 0, row
        assert name == "finetune.py" or row["relative difference"] < 0.02, row
        assert name == "finetune.py" or row["infinite gradient: exit code"] == 3, row


def test_a_card_of_11_gb_is_enough(rows):
    assert len(rows["card"]) == 2 and all(row["peak GB"] < 11 for row in rows["card"])


def test_a_network_gives_the_same_on_the_gpu():
    """Loss and gradients in fp32, and masks from the same centers, in a process of its own."""
    code = """
import torch, data, models
torch.set_float32_matmul_precision("highest")
model, tokens = models.Bert(models.BertConfig(69, 34, 2, 2, 64, 128, 0.0)), torch.randint(5, 69, (8, 34))
centers = torch.rand(8, 34) < 0.1
masks = [data.span_mask(centers.to(d), tokens.to(d) > data.MASK, 2, 3).cpu() for d in ("cpu", "cuda")]
assert torch.equal(*masks)
labels, sums = torch.where(masks[0], tokens, -100), []
for device in ("cpu", "cuda"):
    model.zero_grad()
    loss, n = model.to(device)(tokens.to(device), labels.to(device), capacity=8 * 34)
    loss.backward()
    grads = torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])
    sums.append(torch.cat([loss.detach().cpu()[None], n.cpu()[None].float(), grads]))
assert torch.dist(*sums) / sums[0].norm() < 1e-4, torch.dist(*sums)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_saving_takes_no_memory_of_the_gpu(tmp_path):
    """The file is read back on the CPU."""
    code = """
import sys, torch, training
weights = torch.zeros(50_000_000, device="cuda")
before = torch.cuda.max_memory_allocated()
training.save({"model": {"x": weights}}, sys.argv[1])
assert torch.cuda.max_memory_allocated() - before < 1e6, torch.cuda.max_memory_allocated() - before
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True, timeout=120)


def test_copies_to_the_gpu_do_not_wait():
    """From pinned memory of their own, which is not reused before the copy has ended."""
    code = """
import numpy as np, torch, data
x, device = torch.randn(8192, 8192, device="cuda"), torch.device("cuda")
torch.cuda.set_sync_debug_mode("error")
y = x @ x @ x                                                # keeps the GPU busy
copies = [data.to_device(np.full(10 ** 6, i), device) for i in range(20)]
torch.cuda.set_sync_debug_mode("default")
assert [copy.unique().tolist() for copy in copies] == [[i] for i in range(20)]
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


@pytest.mark.parametrize("script", ["randommask", "findna", "cm_gems", "finetune"])
def test_float16_on_a_gpu(tmp_path, script):
    """Loss scaling with the fused AdamW: the step of each script, compiled and not."""
    for flag in ("--no-compile", "--compile") if script != "finetune" else ("--compile", ):
        steps = ["--epochs", "1", "--init", "random"] if script == "finetune" else [flag, "--steps", "40"]
        command = [sys.executable, ROOT / f"{script}.py", "--demo", "--device", "cuda", "--dtype", "float16",
                   "--out", tmp_path / flag, *steps]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
