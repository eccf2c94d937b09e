"""The sbatch file of the documentation, word for word, with stubs of scontrol and torchrun (one rank)."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import harness


@pytest.mark.fault("SLURM: signal, requeue, resume")
def test_signal_checkpoint_requeue_resume(tmp_path):
    pages = [harness.ROOT / "README.md", *sorted(harness.ROOT.glob("docs/*.md"))]
    text = "\n".join(page.read_text() for page in pages)
    script, = re.findall(r"```\w*\n(#![^`]*?#SBATCH[^`]*?)```", text)
    assert "--signal=B:USR1@" in script and "--requeue" in script
    (tmp_path / "job.sh").write_text(script)
    (tmp_path / "bin").mkdir()
    stubs = {"scontrol": 'echo "$@" >> scontrol.log',
             "torchrun": f"shift 3; exec {sys.executable} {harness.ROOT}/randommask.py --demo "
                         "--out out/randommask --steps 120 --batch_size 8 --micro_batch_size 4 --n_layer 1 "
                         "--n_embd 8 --eval_windows 8 --log_every 1 --eval_every 200 --save_every 0 \"$@\""}
    for name, text in stubs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}

    def submit():
        return subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True,
                                start_new_session=True)

    def last_step():
        return torch.load(out / "last.pt", weights_only=True)["step"]
    out, job = tmp_path / "out/randommask", submit()
    try:
        deadline = time.time() + 60
        while not (out / "log.jsonl").exists() or not (out / "log.jsonl").read_text():
            assert job.poll() is None and time.time() < deadline
            time.sleep(0.01)
        job.send_signal(signal.SIGUSR1)                      # as SLURM does, to the batch shell alone
        job.communicate(timeout=60)
        assert (tmp_path / "scontrol.log").read_text() == "requeue 77\n" and (out / "last.pt").exists()
        step = last_step()
        assert 1 <= step < 120
        job = submit()                                       # SLURM starts the same file again
        printed = job.communicate(timeout=120)[0]
        assert job.returncode == 0 and f"after step {step}" in printed
        assert last_step() == 120
        assert [json.loads(line)["step"] for line in open(out / "log.jsonl")][-1] == 120
        assert (tmp_path / "scontrol.log").read_text() == "requeue 77\n"
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
