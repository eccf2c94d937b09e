"""tools.figures: its arrays against literal loops, without matplotlib; its commands as a user types them."""
import json
import math
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import equal, log_rows, random_dna, refused, run, write_fasta

import data
from tools import evidence, figures
import models
import randommask
import training

CONFIG = models.BertConfig(vocab_size=69, block_size=22, n_layer=3, n_head=2, n_embd=16, n_inner=32)
LOSS = [dict(step=s, loss=4 - s / 10, lr=0.1, phase=1 + (s > 2) + (s > 4), masked=0.1) for s in range(1, 7)]
LOSS[1] |= {"val_loss": 3.5, "val_loss_span3": 3.5, "val_loss_next_phase": 3.75}
TINY = """--genome {} --device cpu --k 3 --block_size 22 --n_layer 2 --n_head 2 --n_embd 16 --batch_size 4
          --micro_batch_size 4 --steps 6 --eval_windows 4 --log_every 1"""


def write_log(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def save(path, **parts):
    bert = models.Bert(CONFIG)
    config = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__}
    state = {"format": 1, "method": "randommask", "step": 1, "model": bert.state_dict(), "optimizer": {},
             "config": config, "args": {"stride": 1}, "data": ""}
    torch.save(state | parts, path)
    return bert, config


def test_log(tmp_path, capsys):
    path = write_log(tmp_path / "run", LOSS)
    with open(tmp_path / "run/log.jsonl", "a") as f:
        f.write('{"step": 7, "lo')                           # the run is alive
    log = figures.read_log(path)
    assert "line 7" in capsys.readouterr().out and list(log["loss"][0]) == [1, 2, 3, 4, 5, 6]
    assert figures.events(log) == [(2, "phase 2"), (4, "phase 3")]
    drawn = {name: line for lines in figures.curves(log).values() for name, line in lines.items()}
    assert drawn.keys() == {"loss", "val_loss", "val_loss_next_phase", "val_loss_span", "masked", "lr"}
    equal(drawn["val_loss_span"], (np.array([2]), np.exp([3.5])))
    switch = figures.read_log(write_log(tmp_path / "run", [*LOSS[:2], LOSS[2] | {"switch_step": 3}]))
    assert figures.events(switch)[-1] == (3, "Global")


@pytest.mark.parametrize("k", [3, 4, 6])
def test_colorings(k):
    names = models.vocabulary(k)[5:]
    for name, classes in figures.colorings(k).items():
        at = {"center": [(k - 1) // 2, k // 2] if k % 2 == 0 else [k // 2], "margins": [0, k - 1]}.get(
            name) or [int(name.split()[1]) - 1]
        texts = ["".join(word[i] for i in at) for word in names]
        assert len(set(zip(classes.tolist(), texts))) == 4 ** len(at) == len(set(classes.tolist()))
        if len(at) == 1:
            assert ["ATCG"[i] for i in classes] == texts     # the letters of the key of the colors


def test_silhouettes_find_what_is_there():
    bert = models.Bert(models.BertConfig(261, 22, 1, 2, 16, 32))
    center, rng = figures.colorings(4)["center"], np.random.default_rng(0)
    planted = np.eye(16)[center] + 0.05 * rng.normal(size=(256, 16))
    bert.tok_emb.weight.data[5:] = torch.from_numpy(planted)
    xy, classes, scores = figures.embeddings(bert)
    assert scores["center"] > 0.8 and scores["margins"] < 0.1 and scores["shuffled"] < 0.1
    near = abs(xy[:, None] - xy[None]).sum(-1)
    near[np.arange(256), np.arange(256)] = np.inf
    assert (center[near.argmin(1)] == center).all() and list(classes) == list(figures.colorings(4))
    assert figures.shades(center).shape == (256, 3) and 0 <= figures.shades(center).min()
    assert len(np.unique(figures.shades(np.arange(16)), axis=0)) == 16


def test_attention_equals_literal_loops_and_sdpa(tmp_path):
    torch.manual_seed(0)
    bert = models.Bert(CONFIG).eval()
    for p in bert.parameters():
        p.data.normal_(std=0.3)                              # attention that is not uniform
    save(tmp_path / "x.pt", model=bert.state_dict())
    tokens = data.kmer_tokens(torch.randint(4, (3, 22)).to(torch.uint8), 3, 1, specials=True)      # (3, 22)
    x, weights = bert.encode(tokens, need_weights=True)
    torch.testing.assert_close(x, bert.encode(tokens), rtol=1e-5, atol=1e-5)   # SDPA
    found = figures.attention(figures.read_attention(str(tmp_path / "x.pt"), "cpu"), tokens)
    for layer, w in enumerate(weights):
        w = w.detach().double().numpy()                      # (3, H, 22, 22)
        np.testing.assert_allclose(found["maps"][layer], w.mean(0), atol=1e-6)
        given = [w[n, h, i] for n in range(3) for h in range(2) for i in range(1, 21)]
        at = [i for n in range(3) for h in range(2) for i in range(1, 21)]
        want = [np.mean([row[0] for row in given]), np.mean([row[-1] for row in given]),
                np.mean([sum(row[j] for j in range(1, 21) if abs(i - j) <= 6) for i, row in zip(at, given)]),
                np.mean([-(row * np.log(row)).sum() for row in given])]
        received = [[np.mean([w[n, h, i, j] for h in range(2) for i in range(1, 21)]) for j in range(1, 21)]
                    for n in range(3)]                       # by each k-mer of each sequence
        want.append(np.mean([max(row) / np.mean(row) for row in received]))
        np.testing.assert_allclose(found["numbers"][layer], want, atol=1e-5)
        assert want[-1] > 1.001
    near = np.mean([sum(abs(i - j) <= 6 for j in range(1, 21)) for i in range(1, 21)])
    np.testing.assert_allclose(found["uniform"], [1 / 22, 1 / 22, near / 22, math.log(22), 1], rtol=1e-6)
    for layer, profile in zip((1, 2), found["profiles"]):    # middle and last of three
        w = weights[layer][0].detach().mean(0)
        for row, received in zip(profile, (w[0, 1:-1], w[1:-1, 1:-1].mean(0))):
            want = [np.mean([received[t] for t in range(20) if t <= base < t + 3]) for base in range(22)]
            np.testing.assert_allclose(row, want, atol=1e-6)


def test_the_densest_cluster_is_listed(capsys):
    xy = np.random.default_rng(0).normal(size=(256, 2))
    planted = np.random.default_rng(1).choice(256, figures.LISTED, replace=False)
    xy[planted] = 5 + 0.01 * xy[planted]
    fig, (ax, ax_list) = figures.new_figure(2, 2, 3, 3)
    figures.draw_cluster(ax, ax_list, xy, 4)
    words = [models.vocabulary(4)[5 + i] for i in sorted(planted)]
    assert capsys.readouterr().out == f"densest cluster (black): {' '.join(words)}\n"
    assert sorted(map(tuple, ax.collections[0].get_offsets())) == sorted(map(tuple, xy[planted]))
    assert "".join(text.get_text() for text in ax_list.texts) == "".join(words)


@pytest.mark.parametrize("k, stride", [(6, 1), (6, 6), (6, 4), (3, 1)])
def test_mean_per_base(k, stride):
    of_kmers = torch.rand(2, 9)
    found = figures.mean_per_base(of_kmers, k, stride)
    assert found.shape == (2, 8 * stride + k)
    for base in range(found.shape[1]):
        on_it = [of_kmers[:, t] for t in range(9) if t * stride <= base < t * stride + k]
        torch.testing.assert_close(found[:, base], torch.stack(on_it).mean(0))


def test_masks():
    torch.manual_seed(0)
    bases = torch.randint(4, (400, 515), dtype=torch.uint8)
    rank = torch.randperm(4101)
    rows = {name: (masked, share) for name, masked, share in figures.mask_rows(bases, rank, 6)}
    assert len(rows) == 9 and all(share.shape == (400, 515) for _, share in rows.values())
    for phase in range(1, 6):
        want = 1 - np.mean([(1 - 0.025) ** (6 + 2 * i) for i in range(phase)])
        masked, share = rows[f"RandomMask {phase}" + " = DNABERT" * (phase == 1)]
        assert masked == pytest.approx(want, abs=0.006)
    assert (rows["RandomMask 5"][1] == 1).mean() > 3 * (rows["RandomMask 1 = DNABERT"][1] == 1).mean()
    assert set(np.unique(rows["FinDNA"][1])) == set(np.unique(rows["non-overlapping"][1])) == {0, 1}
    assert rows["FinDNA"][0] == pytest.approx(0.3, abs=1e-3) and rows["GeneMask"][0] > rows["Global"][0]
    training.seed(0)
    tokens = data.kmer_tokens(bases, 6, 1)
    masked = randommask.random_mask(tokens, 1, 0.025)
    hidden = [all(masked[0, t] for t in range(max(0, b - 5), min(510, b + 1))) for b in range(515)]
    assert hidden == (rows["RandomMask 1 = DNABERT"][1][0] == 1).tolist()


def results(tmp_path):
    fields = {"id": "0", "weights": "", "data": "", "long": "chunk", "pool": None, "mode": "finetune",
              "stride": 1, "protocol": "randommask", "overrides": {}, "collapsed": False, "test": {}}
    scores = {("lab/x", None, "spearman"): (0.5,), ("tf_m/0", None, "mcc"): (0.5, 0.6),
              ("emp/H3", None, "mcc"): (0.7,), ("prom_core", 10, "acc"): (0.5, 0.7),
              ("prom_core", 50, "acc"): (0.8,)}
    rows = [fields | {"task": task, "shots": n, "seed": seed, "init": init, "metric": metric, "score": score}
            for (task, n, metric), group in scores.items() for init in ("cnn", "x.pt")
            for seed, score in enumerate(group)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path)


def test_result_points(tmp_path):
    ours, papers = figures.result_points(results(tmp_path))
    mean, sd, n = ours["x.pt"]["tf_m/0", None, "mcc"]
    assert (mean, sd, n) == pytest.approx((55, np.std([50, 60], ddof=1), 2))
    assert math.isnan(ours["cnn"]["emp/H3", None, "mcc"][1]) and ours["cnn"].keys() == ours["x.pt"].keys()
    assert papers["RandomMask: DNABERT"]["emp/H3", None, "mcc"][0] == 75.82    # its Table 3
    path = tmp_path / "results.jsonl"
    path.write_text(path.read_text().replace('"score": 0.6', '"score": 0.5'))
    assert figures.result_points(str(tmp_path))[0]["cnn"]["tf_m/0", None, "mcc"] == (50, 0, 2)


def test_every_curve_is_in_the_picture():
    a = {"maps": np.ones((2, 1, 4, 4)) / 4, "profiles": np.ones((2, 2, 9)) / 4, "uniform": np.full(5, 0.2)}
    numbers = [np.full((2, 5), 0.1), np.full((2, 5), 0.9)]
    fig = figures.draw_attention({str(i): a | {"numbers": x} for i, x in enumerate(numbers)}, "x")
    assert len(fig.axes) == 6
    for ax in fig.axes:
        low, high = ax.get_ylim()
        assert all(low <= y <= high for line in ax.lines for y in np.asarray(line.get_ydata(), float)), ax


def test_comparisons_are_in_the_picture():
    """Each at its difference, with its interval, in the color of its verdict; the primary one is bold."""
    made = [evidence.Comparison(f"a > {b}", "probe", b == "b", 1, np.array([[x]]), (x - 1, x + 2), None, end)
            for b, x, end in (("b", 3, "held"), ("c", -4, "not held"), ("d", 0, "cannot tell"))]
    [ax] = figures.draw_comparisons({"one": made[:2], "two": made[2:]}).axes
    points = {line.get_label(): line for line in ax.lines if line.get_marker() == "o"}
    assert {name: [*line.get_xdata(), *line.get_ydata()] for name, line in points.items()} == {
        "held": [3, 0], "not held": [-4, 1], "cannot tell": [0, 2]}
    color = points["held"].get_color()
    assert [2, 5, 0, 0] in [[*x.get_xdata(), *x.get_ydata()] for x in ax.lines if x.get_color() is color]
    assert [(x.get_text(), x.get_weight()) for x in ax.get_yticklabels()] == [
        ("a > b (probe)", "bold"), ("a > c (probe)", "normal"), ("a > d (probe)", "normal")]


def figure(*args, patches={}):
    return run(args, patches, script="tools.figures")


def pictures(folder):
    found = {path.name: path.read_bytes()[:4] for path in folder.iterdir()}
    assert all(start == (b"%PDF" if name.endswith("pdf") else b"\x89PNG") for name, start in found.items())
    return sorted(name for name in found if name.endswith("png"))


def test_commands_on_real_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fasta = write_fasta(tmp_path / "a.fa", {"a": random_dna(6000, np.random.default_rng(0))})
    flags = TINY.format(fasta).split()
    assert run([*flags, "--out", "rm"]).code == 0
    assert run([*flags, "--mask", "dnabert", "--out", "db"]).code == 0
    cm = "--switch_drop 1e9 --out cm --eval_every 2".split()
    assert run([*flags, *cm], script="cm_gems.py").code == 0
    mixer = f"""--genome {fasta} --device cpu --length 40 --n_layer 1 --track_size 4 --hidden 8 --batch_size 4
                --micro_batch_size 4 --steps 4 --windows 40 --eval_windows 4 --log_every 1 --out fin"""
    assert run(mixer.split(), script="findna.py").code == 0

    result = figure("loss", "rm", "db", "cm", "fin", "--dpi", 50, "--out", "f/loss")
    assert result.code == 0 and result.out.count("the same weights") == 2, result          # phases 1, 3 end
    last = log_rows(tmp_path / "db")[-1]
    assert f"| db | 6 | {last['loss']:.3f} | {last['val_loss']:.3f} |" in result.out
    assert "densest cluster" in figure("embeddings", "rm/last.pt", "--dpi", 50, "--out", "f/one").out
    two = ["rm/last.pt", "cm/last.pt", "--names", "a", "b"]
    result = figure("embeddings", *two, "--dpi", 50, "--out", "f/two")
    assert result.code == 0 and "| a | " in result.out and "shuffled" in result.out
    for name, inits in {"att1": ["rm/last.pt"], "att2": ["rm/last.pt", "db/last.pt"]}.items():
        inits += ["--fasta", fasta, "--windows", 3]
        result = figure("attention", *inits, "--dpi", 50, "--out", f"f/{name}")
        assert result.code == 0 and "| 2 | 0." in result.out and "uniform, 22 tokens" in result.out, result
        assert "3 windows of 22 bases, the same for all" in result.out, result
    assert figure("masks", "--fasta", fasta, "--k", 3, "--dpi", 50, "--out", "f/masks").code == 0
    result = figure("results", results(tmp_path), "--dpi", 50, "--out", "f/results")
    assert result.code == 0 and "| x.pt | prom_core | 50 | acc | 80.000 | nan | 1 |" in result.out, result
    result = figure("comparisons", "--dpi", 50, "--out", "f/comparisons")
    assert result.code == 0 and "| findna | findna, teacher > mnm | probe | " in result.out, result
    assert pictures(tmp_path / "f") == [f"{name}.png" for name in (
        "att1", "att1_maps", "att2", "att2_maps", "comparisons", "loss", "masks", "one", "results",
        "results_shots", "two")]


def test_strides_side_by_side(tmp_path, monkeypatch):
    """Fig 6: pretraining at each stride, then its embeddings; attention on the same bases for all."""
    monkeypatch.chdir(tmp_path)
    fasta = write_fasta(tmp_path / "a.fa", {"a": random_dna(6000, np.random.default_rng(0))})
    for stride in (1, 2, 3):
        flags = [*TINY.format(fasta).split(), "--steps", 2, "--mask", "dnabert", "--stride", stride]
        assert run([*flags, "--out", f"s{stride}"]).code == 0
        assert figures.read_bert(f"s{stride}/last.pt")[1] == stride
    paths = ["s1/last.pt", "s2/last.pt", "s3/last.pt", "--names", "1", "2", "3", "--dpi", 50]
    result = figure("embeddings", *paths, "--out", "f/strides")
    assert result.code == 0 and all(f"| {stride} | " in result.out for stride in (1, 2, 3)), result
    result = figure("attention", *paths, "--fasta", fasta, "--windows", 2, "--out", "f/att")
    assert result.code == 0 and "2 windows of 22 bases, the same for all" in result.out, result
    tokens = [f"uniform, {n} tokens" for n in (22, 12, 9)]   # (22 - 3) // stride + 1 k-mers, and two more
    assert all(text in result.out for text in tokens), result
    assert pictures(tmp_path / "f") == ["att.png", "att_maps.png", "strides.png"]


def test_a_classifier_and_an_export(tmp_path):
    bert, config = save(tmp_path / "last.pt")
    classifier = {f"bert.{name}": tensor for name, tensor in bert.state_dict().items()}
    torch.save(torch.load(tmp_path / "last.pt") | {
        "method": "finetune", "model": classifier | {"out.bias": torch.ones(2)},
        "config": {"kind": "bert", "bert": config, "k": 3, "stride": 3}}, tmp_path / "tuned.pt")
    models.save_hf(bert, tmp_path / "hf")
    for path, stride in ((tmp_path / "last.pt", 1), (tmp_path / "tuned.pt", 3), (f"hf:{tmp_path / 'hf'}", 1)):
        found, found_stride = figures.read_bert(str(path))
        assert found_stride == stride and not found.training
        equal(dict(found.state_dict()), dict(bert.state_dict()))


BROKEN = {
    "loss none": "no such file", "loss empty": "no rows yet", "loss text": "line 2", "loss other": "line 1",
    "loss list": "line 1", "loss nan_step": "line 1", "loss rm rm": "once", "loss rm --names a b": "--names",
    "loss": "required", "loss rm --dpi 0": "--dpi", "loss rm --dp 9": "--dp", "pie": "pie",
    "embeddings none.pt": "no such checkpoint", "embeddings text/log.jsonl": "not a readable checkpoint",
    "embeddings findna.pt": "a mixer", "embeddings k1.pt": "1-mers", "embeddings hf:none": "none",
    "attention good.pt": "--fasta", "attention good.pt --fasta none.fa": "none.fa",
    "attention good.pt --fasta text/log.jsonl": "log.jsonl", "masks --fasta short.fa": "too few",
    "results rm": "no results yet", "loss huge": "line 1", "loss deep": "line 1", "loss columns": "line 1",
    "results deep": "no results yet", "loss rm --out ''": "--out", "embeddings heads.pt": "heads.pt",
    "attention good.pt --fasta tiny.fa": "3 bases",
    "results text": "no results yet", "loss rm --out rm/log.jsonl/x": "rm/log.jsonl"}


def bad_files():
    good = json.dumps(LOSS[0]) + "\n"
    for name, text in {"rm": good, "empty": "", "text": good + "\x1b[31mhello\n", "other": '{"score": 1}\n',
                       "list": "[1]\n", "huge": good.replace("1,", "1e400,", 1), "deep": "[" * 100_000 + "\n",
                       "columns": good.replace("0.1", "null").replace("3.9", '"x"'),
                       "nan_step": good.replace('"step": 1', '"step": null')}.items():
        Path(name).mkdir()
        Path(name, "log.jsonl").write_text(text)
    Path("text/results.jsonl").write_text("hello\n")
    Path("deep/results.jsonl").write_text("[" * 100_000 + "\n")
    write_fasta(Path("tiny.fa"), {"a": "ACNNNGT"})
    _, config = save("good.pt")
    mixer = {"length": 26, "n_layer": 1, "track_size": 4, "hidden": 8, "dropout": 0.0}
    save("findna.pt", method="findna", config=mixer, args={"length": 16},
         model=models.BaseModel(models.make_backbone(mixer)).state_dict())
    save("heads.pt", config=config | {"n_head": 0})
    small = models.BertConfig(9, 22, 1, 2, 16, 32)
    save("k1.pt", config={name: getattr(small, name) for name in small.__dataclass_fields__},
         model=models.Bert(small).state_dict())
    write_fasta(Path("short.fa"), {"a": "ACGTACGTAC"})


@pytest.mark.fault("figures: bad input", n=len(BROKEN))
def test_bad_input(tmp_path, monkeypatch, survived):
    monkeypatch.chdir(tmp_path)
    bad_files()
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    for args, word in BROKEN.items():
        message = refused(figure(*shlex.split(args)))
        assert word in message and "\x1b" not in message, (args, message)
        survived()
    made = {path for path in tmp_path.rglob("*") if path.is_file()} - set(before)
    assert not {path for path in made if "nanodna" not in str(path)}           # the cache of a sound FASTA


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_log(tmp_path / "rm", LOSS)
    result = figure("loss", "rm", patches={0: lambda: sys.modules.update(matplotlib=None)})
    assert "pip install matplotlib" in refused(result) and result.out.startswith("| run | step |")
