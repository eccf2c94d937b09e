"""findna.py as a user runs it: evaluations, ablations, demo; what finetune.py makes of its checkpoints. Its
faults are in tests/faults."""
import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import findna
import finetune
import models
from harness import equal, log_rows, random_dna, refused, run, write_fasta
from methods import STEPS, fresh, go, whole                  # noqa: F401, fixtures

K = findna.N_CLS
EVALUATED = {"val_loss", "val_mnm_loss", "val_acc", "val_cl_loss", "view_kl", "view_kl_sum", "center_norm",
             "q_entropy", "mean_q_entropy", "q_information", "cls_cos"}


def test_evaluations_of_a_run(whole):
    rows = log_rows(whole("findna") / "out")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if EVALUATED & row.keys()] == list(range(2, STEPS + 1, 2))
    assert all(EVALUATED <= row.keys() for row in rows[1::2])


ABLATIONS = [dict(batch_size=11), dict(objective="cl", dropout=0.1, fresh_windows=True),
             dict(objective="mnm"), dict(cl_space="latent", cl_softmax="tokens"),
             dict(backbone="transformer", n_embd=8, n_head=2),
             dict(views="MDT+DIT", translocation=30, alpha=0.9)]


@pytest.mark.fault("uneven shares on two ranks: findna")
@pytest.mark.parametrize("flags", ABLATIONS, ids=lambda flags: " ".join(map(str, flags.values())))
def test_ablations_and_uneven_shares_on_two_ranks(fresh, flags):
    states, logs = [], []
    for ranks in (1, 2):
        fresh("findna")
        assert go("findna", ranks=ranks, steps=8, eval_every=8, **flags).codes == [0] * ranks
        states.append(torch.load("out/last.pt", weights_only=True))
        logs.append(log_rows(Path("out")))
    objective, alpha = flags.get("objective"), flags.get("alpha", 0.5)
    assert ("teacher" in states[0]) == ("cl_loss" in logs[0][0]) == (objective != "mnm")
    for part in {"model", "teacher", "center"} & states[0].keys():
        torch.testing.assert_close(states[0][part], states[1][part], rtol=0, atol=1e-6)
    for a, b in zip(*logs, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
        mnm, cl = a["mnm_loss"], a.get("cl_loss")
        n_q = 14 if "cl_softmax" in flags else K             # the sums of 9 masked bases and so many [CLS]
        cl = cl and cl * n_q / 9
        want = {"mnm": mnm, "cl": cl}[objective] if objective else alpha * mnm + (1 - alpha) * cl
        assert a["loss"] == pytest.approx(want)
    n_channels = 14 if "cl_space" in flags else 5
    assert objective or states[0]["center"].shape == (K, n_channels)


def test_it_learns_and_warns(fresh):
    fresh("findna")
    fasta = write_fasta(Path("a.fa"), {"a": "ACGGT" * 1000})
    assert go("findna", genome=fasta, steps=100, lr=0.02, track_size=4, hidden=32, alpha=0.9, dropout=0,
              views="M+none", log_every=50, eval_every=100).code == 0
    assert log_rows(Path("out"))[-1]["val_acc"] > 0.9
    fresh("findna")
    fasta = write_fasta(Path("a.fa"), {"a": "A" * 5000})     # all sequences are alike
    result = go("findna", genome=fasta, views="M+none", eval_every=1, steps=8, dropout=0)
    assert result.code == 0 and result.out.count("warning: ") == 1 and "collapsed" in result.out, result


def test_demo(out):
    result = run(f"--demo --steps 2 --data_dir {out} --out demo --eval_windows 64 --device cpu".split(),
                 script="findna.py")
    assert result.code == 0 and "if these were never masked" in result.out, result


def test_show_masks(fresh):
    fresh("findna")
    result = go("findna", show_masks=3)
    lines = result.out.splitlines()
    assert result.code == 0 and len(lines) == 12 and not Path("out").exists(), result
    for head, clean, masked, other in (lines[i:i + 4] for i in range(0, 12, 4)):
        assert "30.0% masked" in head and masked.count(".") == 9 and set(clean + other) <= set("ACGT")
        assert all(a == b or b == "." for a, b in zip(clean, masked, strict=True)) and len(other) == 30


@pytest.fixture
def table(fresh, whole):
    """Sequences of 8 to 30 bases, all A and C, or G and T, also in a.csv; a checkpoint as of a long run."""
    fresh("findna")
    rng = np.random.default_rng(0)
    texts = [random_dna(rng.integers(8, 31), rng, "AC" if i % 2 else "GT") for i in range(60)]
    rows = "".join(f"{text},{i % 2}\n" for i, text in enumerate(texts))
    Path("a.csv").write_text("sequence,label\n" + rows)
    state = torch.load(whole("findna") / "out/last.pt", weights_only=True)
    torch.save(state | {"step": 5000, "args": state["args"] | {"steps": 5000}}, "long.pt")
    return texts, Path("long.pt")


def tune(*args):
    """Rows of results of a run of finetune.py that must succeed."""
    result = run(["--csv", "a.csv", "--device", "cpu", "--out", "ft", *map(str, args)], script="finetune.py")
    assert result.code == 0 and result.err == "", result
    return [json.loads(line) for line in open("ft/results.jsonl")]


def test_finetune_and_probe(table):
    _, init = table
    for flags in (["--epochs", 8, "--lr", 0.05], ["--mode", "probe"],
                  ["--mode", "probe", "--pool", "cls", "--eval_network", "student"],
                  ["--epochs", 1, "--head", "mlp", "--blocks", "log2"], ["--epochs", 1, "--pool", "cls"]):
        rows = tune("--init", init, *[f"random:{init}"] * ("--lr" in flags), *flags)
    assert [row["score"] for row in rows[:3]] == [1, 1, 1] and rows[4]["head"] == "mlp"
    assert [row["overrides"] for row in rows] == [{"epochs": 8, "lr": 0.05}] * 2 + [
        {}, {"pool": "cls", "eval_network": "student"}, {"epochs": 1, "head": "mlp", "blocks": "log2"},
        {"epochs": 1, "pool": "cls"}]
    assert [row["n_blocks"] for row in rows] == [None] * 4 + [5, None]
    state, want = torch.load(init, weights_only=True), {}
    for network in ("teacher", "model"):
        digest = hashlib.sha256()
        for name, tensor in state[network].items():
            digest.update(tensor.numpy().tobytes() if name != "head.weight" and name != "head.bias" else b"")
        want[network] = digest.hexdigest()[:12]
    weights = [row["weights"] for row in rows]
    assert weights == [want["teacher"], weights[1], want["teacher"], want["model"], *[want["teacher"]] * 2]
    assert weights[1] not in want.values()                   # fresh ones


@pytest.mark.parametrize("step, steps, ema, network", [
    (20, 20, 0.996, "student"), (2400, 2400, 0.996, "teacher"), (2200, 2200, 0.996, "student"),
    (1200, 99999, 0.996, "teacher"), (1100, 99999, 0.996, "student"), (20, 20, 0.5, "teacher")])
def test_a_teacher_of_a_short_run_is_not_used(table, capsys, step, steps, ema, network):
    """At the end exp(-0.002 x steps) of the initial weights are left, long before it exp(-0.004 x step)."""
    state = torch.load("long.pt", weights_only=True) | {"step": step}
    state["args"] |= {"steps": steps, "ema": ema}
    torch.save(state, "a.pt")
    _, weights = finetune.read_checkpoint("a.pt")
    out = capsys.readouterr().out
    wanted = state["model" if network == "student" else "teacher"]
    equal(weights["backbone.proj.weight"], wanted["backbone.proj.weight"])
    assert ("using the student" in out) == (network == "student")
    equal(finetune.read_checkpoint("a.pt", "teacher")[1]["backbone.proj.bias"],
          state["teacher"]["backbone.proj.bias"])


def test_predict_and_embed(table):
    """A sequence's outputs do not depend on its batch, and are those of the teacher."""
    texts, init = table
    model = tune("--init", init, "--epochs", 8, "--lr", 0.05)[0]["model"]
    write_fasta(Path("all.fa"), {f"s{i}": text for i, text in enumerate(texts)})
    write_fasta(Path("one.fa"), {"s7": texts[7]})
    for name, (tool, flags) in itertools.product(("all", "one"), (
            ("predict", f"--init {model} --out {{0}}.tsv"),
            ("embed", f"--init {init} --out {{0}}.npz --per_base"),
            ("embed", f"--init {init} --out {{0}}.cls.npz --pool cls"))):
        assert run([f"{name}.fa", *flags.format(name).split()], script=f"tools.{tool}").code == 0
    rows, [row] = ([line.split("\t")[3:] for line in open(f"{name}.tsv")][1:] for name in ("all", "one"))
    assert sum(row[0] == "01"[i % 2] for i, row in enumerate(rows)) >= 57
    assert [float(p) for p in rows[7][1:]] == pytest.approx([float(p) for p in row[1:]], abs=1e-5)
    state = torch.load(init, weights_only=True)
    net = models.BaseModel(models.make_backbone(state["config"])).eval()
    net.load_state_dict(state["teacher"])
    bases = data.one_hot(torch.from_numpy(data.encode(texts[7]))[None])
    with torch.no_grad():
        x, y = net(bases)[0][0], net(F.pad(bases, (0, 0, 0, K)))[0][0, -K:]
    for name, i in (("all", 7), ("one", 0)):
        found, cls = np.load(f"{name}.npz"), np.load(f"{name}.cls.npz")["embeddings"]
        here = found["per_base"][found["offsets"][i]:found["offsets"][i + 1]]
        for got, want in ((here, x), (found["embeddings"][i], x.mean(0)), (cls[i], y.mean(0))):
            np.testing.assert_allclose(got, want, atol=1e-5)


def test_finetune_refusals(table):
    state = torch.load(table[1], weights_only=True)
    torch.save(state, "both.pt")
    del state["teacher"], state["center"]
    torch.save(state, "mnm.pt")
    assert go("findna", backbone="transformer", n_embd=8, n_head=2, steps=1, length=21).code == 0
    write_fasta(Path("all.fa"), {"a": "A" * 40})
    for script, args, word in (
            ("finetune.py", "--csv a.csv --init mnm.pt --eval_network teacher", "use student"),
            ("finetune.py", "--csv a.csv --init out/last.pt --blocks log2", "transformer"),
            ("finetune.py", "--csv a.csv --init random:nowhere.pt", "nowhere.pt"),
            ("tools.embed", "a.csv --init random:both.pt", "no such checkpoint")):
        assert word in refused(run([*args.split(), "--device", "cpu"], script=script))
    assert tune("--init", "mnm.pt", "--epochs", 1)[0]["mixer"] == state["config"]
