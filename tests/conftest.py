"""One thread; and what is slow to import comes before the first fork, so that a forked run starts at once."""
import multiprocessing
import os
import sys
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest                                                # noqa: E402
import torch                                                 # noqa: E402
import tqdm                                                  # noqa: E402

torch.set_num_threads(1)
torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])      # imports torch._dynamo
tqdm.tqdm.monitor_interval = 0                               # no thread in a process that forks


@pytest.fixture(autouse=True)
def no_process_stays():
    yield
    for process in multiprocessing.active_children():        # of a test that failed
        process.kill()
