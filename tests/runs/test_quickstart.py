"""docs/quickstart.ipynb: plain Python cells, without outputs; run from top to bottom in a fresh process."""
import json
import os
import shutil
import subprocess
import sys

import pytest
from harness import ROOT

CELLS = json.loads((ROOT / "docs/quickstart.ipynb").read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_cells_are_plain_python_without_outputs():
    for text in CODE:
        compile(text, "cell", "exec")                        # no magics
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in CELLS
               if cell["cell_type"] == "code")


def test_it_says_what_to_do_elsewhere(tmp_path):
    result = subprocess.run([sys.executable, "-c", CODE[0]], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.startswith("Start this notebook in the folder of nanoDNA")


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    """In a copy, which it fills; the pretrained model finds the sites, and the picture is there."""
    pytest.importorskip("matplotlib")
    skipped = shutil.ignore_patterns(".git", "out", "data", "__pycache__", ".*_cache", ".venv", "tests")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=skipped)
    result = subprocess.run([sys.executable, "-c", "\n\n".join(CODE)], cwd=tmp_path / "copy/docs", text=True,
                            capture_output=True, env=os.environ | {"MPLBACKEND": "Agg"})
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    made = tmp_path / "copy/out/quickstart"
    for name in ("embeddings.png", "mutagenesis.png"):
        assert (made / name).read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (made / "finetuned/results.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[0]["score"] > 0.8
    assert (made / "mutagenesis.tsv").read_text().count("\n") == 1 + 3 * 34 * 3
