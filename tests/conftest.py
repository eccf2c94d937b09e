"""Settings of all tests, and the table of the faults: `python -m pytest -q tests -m fault`.

One thread. Slow imports come before the first fork, so that a forked run starts at once."""
import multiprocessing
import os
from collections import defaultdict

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import pytest                                                # noqa: E402
import torch                                                 # noqa: E402
import tqdm                                                  # noqa: E402

torch.set_num_threads(1)
torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])      # imports torch._dynamo
tqdm.tqdm.monitor_interval = 0                               # no thread in a process that forks

BOARD = defaultdict(lambda: [0, 0, 0.0])                     # kind: tried, survived, seconds


@pytest.fixture(autouse=True)
def no_process_stays():
    yield
    for process in multiprocessing.active_children():        # left by a test that failed
        process.kill()


@pytest.fixture
def out(tmp_path, monkeypatch):
    """The run folder, not yet made, in the working folder of the test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "out"


@pytest.fixture
def survived(request):
    """Returns the function to call after each case that passed, in a test marked fault(kind, n=...)."""
    request.node.survived = 0

    def count():
        request.node.survived += 1
    return count


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    mark = item.get_closest_marker("fault")
    if mark and report.when == "call" and not report.skipped:
        n = mark.kwargs.get("n", 1)                          # a test of several cases must count them
        counted = getattr(item, "survived", int(report.passed and n == 1))
        report.user_properties.append(("fault", [mark.args[0], n, min(counted, n), report.duration]))
        if report.passed and counted != n:
            report.outcome, report.longrepr = "failed", f"{counted} cases were counted, not {n}"
    return report


def pytest_runtest_logreport(report):
    if report.when == "call":                                # with -n, reports come from the workers
        for kind, *amounts in (value for name, value in report.user_properties if name == "fault"):
            for i, amount in enumerate(amounts):
                BOARD[kind][i] += amount


def pytest_terminal_summary(terminalreporter, config):
    if config.option.markexpr != "not slow" and BOARD:
        line, groups = terminalreporter.write_line, defaultdict(dict)
        for kind, row in sorted(BOARD.items()):              # "kill -9 at random: findna"
            name, _, of = kind.partition(": ")
            groups[name][of] = row
        groups["all"] = {"": [sum(row[i] for row in BOARD.values()) for i in range(3)]}
        terminalreporter.section("faults")
        line("| kind | tried | survived | seconds | survived of |\n|---|---|---|---|---|")
        for name, rows in groups.items():
            tried, right, seconds = (sum(row[i] for row in rows.values()) for i in range(3))
            of = ", ".join(f"{of} {row[1]:,}" for of, row in rows.items() if of)
            line(f"| {name} | {tried:,} | {right:,} | {seconds:.1f} | {of} |")
