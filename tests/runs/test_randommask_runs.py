"""randommask.py as a user runs it: phases, maskings, starting weights, demo. Its faults: tests/faults."""
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import models
import training
from harness import cases, equal, log_rows, refused, run, write_case, write_fasta
from methods import STEPS, fresh, go, whole                  # noqa: F401, fixtures


def test_phases_and_evaluations_of_a_run(whole):
    rows = log_rows(whole("randommask") / "out")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["phase"] for row in rows] == [1, 2, 3, 3, 4, 4] + [5] * 14
    assert [row["step"] for row in rows if "val_loss" in row] == [1, *range(2, STEPS + 1, 2)]
    assert [row["step"] for row in rows if "val_loss_next_phase" in row] == [1, 2, 4, 6]
    assert all(0 < row["masked"] < 0.6 and 3 < row["loss"] < 6 for row in rows)


def test_milestones(fresh):
    fresh("randommask")
    assert go("randommask", keep=[3, STEPS]).code == 0
    assert sorted(name for name in os.listdir("out") if "step" in name) == ["step_20.pt", "step_3.pt"]
    assert training.load("out/step_3.pt")["step"] == 3


def test_init(fresh):
    """A run starts from a checkpoint or a Hugging Face folder; its resume needs no --init and refuses one."""
    last = fresh("randommask") / "out/last.pt"
    state = training.load(last)
    model = models.Bert(models.BertConfig(**state["config"]))
    model.load_state_dict(state["model"])
    models.save_hf(model, "hf")
    for init in (last, "hf:hf"):
        flags = dict(steps=2, lr=1e-30, weight_decay=0, keep=1)
        assert "n_embd" in refused(go("randommask", init=init, n_embd=32)) and not os.path.exists("out")
        assert go("randommask", init=init, **flags).code == 0
        assert "drop one" in refused(go("randommask", init=init, **flags))
        assert go("randommask", **flags).code == 0
        for name, tensor in training.load("out/last.pt")["model"].items():
            np.testing.assert_allclose(tensor, state["model"][name], rtol=0, atol=1e-25)
        shutil.rmtree("out")


@pytest.mark.parametrize("mask, phases", [("randommask", 5), ("dnabert", 1)])
def test_show_masks(fresh, mask, phases):
    fresh("randommask")
    result = go("randommask", show_masks=40, mask=mask, block_size=102, val_contigs="b")
    lines = result.out.splitlines()
    assert result.code == 0 and len(lines) == 2 * 40 * phases and not os.path.exists("out"), result
    for head, shown in zip(lines[::2], lines[1::2]):
        assert set(shown) <= {".", "#"} and len(shown) == 100 and f"{shown.count('#')}.0% masked" in head
    shares = ["".join(lines[80 * i + 1:80 * (i + 1):2]).count("#") / 4000 for i in range(phases)]
    assert 0.1 < shares[0] < 0.2 and (phases == 1 or shares[4] > 0.2)


@pytest.mark.parametrize("mask, stride, p, share", [
    ("dnabert", 1, False, 0.125), ("single", 6, False, 0.15), ("dnabert", 2, False, 0.13),
    ("dnabert", 6, False, 0.15),
    pytest.param("randommask", 1, 1e-9, 0, marks=pytest.mark.fault("numerics: nothing masked"))])
def test_maskings(fresh, mask, stride, p, share):
    fresh("randommask")
    assert go("randommask", k=6, stride=stride, block_size=14, batch_size=32, micro_batch_size=16, mask=mask,
              p=p, val_contigs="b").code == 0
    rows = log_rows(Path("out"))
    assert np.mean([row["masked"] for row in rows]) == pytest.approx(share, abs=0.03)
    assert {row["phase"] for row in rows} == ({1, 2, 3, 4, 5} if mask == "randommask" else {1})
    assert share or {row["loss"] for row in rows} == {row["grad_norm"] for row in rows} == {0}
    spans = {name for name in rows[-1] if name.startswith("val_loss_span")}
    assert spans == {f"val_loss_span{math.ceil(6 / stride)}" for _ in range(mask != "single")}
    assert (rows[-1]["val_loss"] > 3) == (share > 0)


def test_non_overlapping_by_either_name(fresh):
    """Spans of one token are single tokens: the same run, bit for bit."""
    fresh("randommask")
    flags = dict(k=6, stride=6, block_size=14, steps=2, keep=2, val_contigs="b")
    for mask in ("single", "dnabert"):
        assert go("randommask", mask=mask, out=mask, **flags).code == 0
    one, two = (training.load(f"{mask}/last.pt") for mask in ("single", "dnabert"))
    assert one["args"]["p"] == two["args"]["p"] == 0.15
    equal(one["model"], two["model"])


def test_it_learns(fresh):
    fresh("randommask")
    fasta = write_fasta(Path("a.fa"), {"a": "ACGT" * 1000})
    assert go("randommask", genome=fasta, steps=100, lr=0.01, mask="dnabert", n_embd=32, dropout=0,
              eval_every=100).code == 0
    rows = log_rows(Path("out"))
    assert rows[0]["loss"] > 4 and rows[-1]["val_loss"] < 1.5                  # ln 64 = 4.2, ln 4 = 1.4


def test_demo(out):
    result = run(f"--demo --steps 9 --data_dir {out} --out demo --eval_windows 64 --device cpu".split())
    assert result.code == 0 and "order-3" in result.out, result
    assert log_rows(out.with_name("demo"))[-1]["step"] == 9  # an explicit flag wins


@pytest.mark.fault("FASTA cases: randommask")
@pytest.mark.parametrize("case", [c for c in cases("fasta.json") if "word" in c], ids=lambda c: c["name"])
def test_bad_fasta(fresh, case):
    fresh("randommask")
    before = os.listdir()
    assert refused(go("randommask", genome=write_case(case, Path("case.fa"))))
    assert not os.path.exists("out") and ("split" in case or {*os.listdir()} == {*before, "case.fa"})
