"""What the tools write: whole files or none, nothing made up for what is not read; names."""
import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import ROOT, SHARED, at_call, contents, random_dna, refused, results_row, run, write_fasta

import data
import finetune
import models
from tools import export, figures

K, CONFIG = 6, models.BertConfig(4101, 128, 1, 2, 16, 32, 0.0)
CASE = {"tiny.fa": {"p1": "ATGC", "p2": "ATGCA", "p3": "ATGCAT", "p4": "ATTCCGATTCCGATTCCG", "p5": "N" * 12,
                    "p6": "TACG"},
        "tail.fa": {"t20": "ATTCCGATTCCGATTCCGAT", "t23": "ATTCCGATTCCGATTCCGATAAC"},
        "long.fa": {"L": random_dna(1000, np.random.default_rng(0))}}          # shared/cases/04-embed-short


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working folder, with a pretrained and a fine-tuned model, the FASTA files, a table's results."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    state = {"format": 1, "method": "randommask", "step": 7, "optimizer": {}, "config": vars(CONFIG),
             "data": "d", "model": models.Bert(CONFIG).state_dict(),
             "args": {"stride": 1, "init": "hf:/home/me/x", "genome": ["/data/g.fa", "b/h.fa"], "lr": 0.1}}
    torch.save(state, "pre.pt")
    spec = {"kind": "bert", "bert": vars(CONFIG), "k": K, "stride": 1, "n_out": 2, "classes": ["=neg", "pos"],
            "regression": False}
    net = finetune.build_net({name: spec[name] for name in spec if name != "classes"})
    torch.save(state | {"method": "finetune", "config": spec, "model": net.state_dict()}, "tuned.pt")
    for name, records in CASE.items():
        write_fasta(tmp_path / name, records)
    Path("results.jsonl").write_text(json.dumps(results_row()) + "\n")
    return tmp_path


def use(tool, *args, patches={}):
    device = ["--device", "cpu"] if tool in ("predict", "embed", "mutagenesis") else []
    return run([*args, *device], patches, script=f"tools.{tool}")


def table(path):
    head, *rows = [line.split("\t") for line in Path(path).read_text().splitlines()]
    return {row[0]: dict(zip(head, row)) for row in rows}


def test_a_sequence_without_a_base_has_no_vector_and_no_class(here):
    result = use("embed", "tiny.fa", "--init", "pre.pt")
    assert "NaN for 4 sequences of which the network reads no base: p1, p2, p5, p6" in result.out, result
    found = np.load("tiny.npz")
    none = np.isnan(found["embeddings"])
    assert none.all(1).tolist() == [True, True, False, False, True, True] and none.sum() == 64
    result = use("predict", "tiny.fa", "--init", "tuned.pt")
    assert "without a base that the network reads 4" in result.out, result
    rows = table("tiny.predictions.tsv")
    assert [int(row["n_bases"]) for row in rows.values()] == [0, 0, 6, 18, 0, 0]
    assert all((row["class"] == row["p_pos"] == "") == (row["n_bases"] == "0") for row in rows.values())
    flags = ["--empty", "--excel_safe", "--out", "all.tsv"]
    assert use("predict", "tiny.fa", "--init", "tuned.pt", *flags).code == 0
    rows = table("all.tsv")
    assert {row["class"] for row in rows.values()} <= {"'=neg", "pos"} and "p_=neg" in rows["p1"]
    found = finetune.load_model("tuned.pt").predict(["ATGC", "ATGCAT"])
    assert np.isnan(found).any(1).tolist() == [True, False]


def test_effects_of_substitutions(here):
    """A table with three lines a base, also where nothing is read; a picture of the first two sequences."""
    flags = ["--init", "tuned.pt", "--class", "pos", "--gradient", "--attention", "--draw", "2"]
    result = use("mutagenesis", "tiny.fa", *flags)
    assert result.code == 0 and "wrote tiny.mutagenesis.tsv" in result.out and not result.err, result
    assert "sequences 6, with_n 1" in result.out and "without a base that the network reads 4" in result.out
    for name, start in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        assert Path(f"tiny.mutagenesis.{name}").read_bytes().startswith(start)
    head, *rows = [line.split("\t") for line in Path("tiny.mutagenesis.tsv").read_text().splitlines()]
    assert head == "id position ref alt effect output gradient_x_input attention".split()
    records = {name: text for name, text in CASE["tiny.fa"].items() if "N" not in text}
    assert [row[:4] for row in rows] == [[name, str(at), ref, alt] for name, text in records.items()
                                         for at, ref in enumerate(text) for alt in "ACGT" if alt != ref]
    unread = [row for row in rows if row[0] in ("p1", "p2", "p6")]
    assert {(row[4], *row[6:]) for row in unread} == {("", "", "")} and {row[5] for row in rows} == {"pos"}
    text, model = CASE["tiny.fa"]["p4"], finetune.load_model("tuned.pt")
    p = model.predict([text, "C" + text[1:]])[:, 1].astype(float)
    [row] = [row for row in rows if row[:4] == ["p4", "0", "A", "C"]]
    assert float(row[4]) == pytest.approx(np.diff(np.log(p / (1 - p)))[0], abs=1e-5)


def test_effects_refuse_what_cannot_be_shown(here):
    Path("there.tsv").write_text("mine")
    before = contents(here)
    without = {0: lambda: sys.modules.update(matplotlib=None)}
    for flags, patches, message in (
            (["--init", "pre.pt"], {}, "pre.pt: not fine-tuned; make a classifier with finetune.py"),
            (["--init", "tuned.pt", "--class", "none"], {}, "--class 'none': the model has =neg, pos; name"),
            (["--init", "tuned.pt", "--out", "there.tsv"], {}, "there.tsv: already exists"),
            (["--init", "tuned.pt"], without, "pip install matplotlib, or give --draw 0")):
        assert message in refused(use("mutagenesis", "long.fa", *flags, patches=patches))
        assert contents(here) == before
    result = use("mutagenesis", "tiny.fa", "--init", "tuned.pt", "--draw", "0", patches=without)
    assert result.code == 0 and contents(here).keys() - before.keys() == {"tiny.mutagenesis.tsv"}, result


def test_a_layer_that_is_not_there_is_refused(here):
    for flags in (["--layer", "2"], ["--layer", "-3", "--per_base"]):
        result = use("embed", "tiny.fa", "--init", "pre.pt", *flags)
        assert f"--layer {flags[1]}: pre.pt takes 0 (the input embeddings) to 1" in refused(result)
    assert use("embed", "tail.fa", "--init", "pre.pt", "--layer", "0").code == 0
    first = finetune.load_model("pre.pt").embed([*CASE["tail.fa"].values()], 0)
    assert np.array_equal(np.load("tail.npz")["embeddings"], first)


def test_a_base_that_is_not_read_has_no_vector(here):
    for name, stride, flags, want in (("tail.fa", 6, [], [18, 19, *range(38, 43)]),
                                      ("long.fa", 1, ["--long", "truncate"], [*range(131, 1000)])):
        flags = [name, "--init", "pre.pt", "--per_base", "--stride", stride, *flags]
        result = use("embed", *flags)
        assert f"NaN for {len(want)} of " in result.out and [*CASE[name]][0] in result.out, result
        found = np.load(f"{name[:-3]}.npz")
        assert np.flatnonzero(np.isnan(found["per_base"]).any(1)).tolist() == want
        assert np.isfinite(found["embeddings"]).all()


def test_a_vcf_that_does_not_fit_leaves_no_file(here):
    head = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
    wrong = "error: a.vcf: line 3: p4:2 'C': REF differs from FASTA, which has 'T'; use"
    for flags, code, message in (([], 2, wrong), (["--skip_mismatch"], 0, ""), (
            ["--skip_mismatch"], 2, "error: a.variants.tsv: already exists")):
        Path("a.vcf").write_text(head + "p4\t2\t.\tC\tA\t.\t.\t.\n")
        result = use("variants", "a.vcf", "--fasta", "tiny.fa", "--init", "pre.pt", "--device", "cpu", *flags)
        assert result.code == code and message in result.err and result.err.count("\n") == bool(code), result
        assert Path("a.variants.tsv").exists() == bool(flags) and not [*here.glob("*.tmp")]


@pytest.mark.skipif(not (SHARED / "cases/04-embed-short").exists(), reason="no shared cases")
def test_the_case_is_as_here():
    for name, records in CASE.items():
        found = {name: data.decode(codes) for name, codes, _ in data.fasta_records(
            SHARED / "cases/04-embed-short" / name)} if name != "long.fa" else records
        assert found == records


@pytest.mark.parametrize("k, stride", [(1, 1), (3, 1), (3, 2), (3, 3)])
def test_bases_read(k, stride):
    rng = np.random.default_rng(k + stride)
    texts = [random_dna(n, rng, "ACGTN") for n in rng.integers(1, 30, size=40)] + ["N", "A" * k]
    limits = rng.integers(0, 30, size=len(texts))
    got = data.bases_read(data.rows_from(texts), np.minimum(limits, list(map(len, texts))), k, stride)
    for text, limit, n in zip(texts, limits, got):
        starts = [i for i in range(0, len(text[:limit]) - k + 1, stride) if "N" not in text[i:i + k]]
        assert n == len({i + j for i in starts for j in range(k)})


SPECS = {"bert": {"k": 3, "stride": 1, "bert": vars(models.BertConfig(69, 10, 1, 2, 16, 32, 0.0))},
         "mixer": {"n_cls": 3, "mixer": dict(length=23, n_layer=1, n_head=2, n_embd=8, dropout=0.0)}}


@pytest.mark.parametrize("kind", SPECS)
def test_windows_of_one_record_share_no_forward_pass(kind, monkeypatch):
    """At most --micro_batch_size of them at a time, in each use of the network; same outputs, gradients."""
    net = finetune.build_net({"kind": kind, "pool": "both", "n_out": 2} | SPECS[kind])
    rng, sizes, gradients = np.random.default_rng(0), [], []
    texts = [random_dna(300, rng), "ACGTACG", random_dna(80, rng)]
    rows, labels = data.on_device(data.rows_from(texts), torch.device("cpu")), torch.tensor([0, 1, 0])
    owner, name = (net.bert, "encode") if kind == "bert" else (net, "states")
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda x, *a, **b: (sizes.append(len(x)), real(x, *a, **b))[1])
    uses = [lambda n: finetune.apply(net, rows, n), lambda n: finetune.apply(net, rows, n, net.embed),
            lambda n: net.per_base(rows, np.arange(3))[0].detach()]
    for use_net in uses:
        whole, parts = use_net(1000), (sizes.clear(), use_net(4))[1]
        np.testing.assert_allclose(whole, parts, atol=1e-6)
        assert max(sizes) <= 4
    for n in (1000, 4):
        sizes.clear(), net.zero_grad()
        finetune.train_batch(net, rows._replace(labels=labels), np.arange(3), n)
        gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
        assert (max(sizes) <= 4) == (n == 4)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_windows_of_figures_come_from_all_records(here):
    rng = np.random.default_rng(0)
    write_fasta(here / "g.fa", {f"r{i}": random_dna(110 if i == 50 else 101, rng) for i in range(100)} | {
        "short": "ACG"})
    bases, _, words = figures.random_windows(data.Genome("g.fa"), 200, 515, 6)
    assert bases.shape == (200, 101) and int(words.split()[1]) > 60, words    # of 101 records
    with pytest.raises(ValueError, match="no 120 bases"):
        figures.random_windows(data.Genome("g.fa"), 9, 515, 120)


@pytest.mark.fault("outputs: written whole or not at all", n=5)
def test_new_path(here, survived):
    Path("a.tsv.tmp").write_text("mine")
    before = contents(here)
    for error in (KeyboardInterrupt, ValueError, OSError(errno.ENOSPC, "No space left on device")):
        for folder in (False, True):
            with pytest.raises((error if isinstance(error, type) else OSError, OSError), match=None), \
                    data.new_path("a.tsv", folder) as f:
                Path(f, "x").write_text("half") if folder else f.write(b"half")
                raise error
        assert contents(here) == before and sorted(os.listdir()) == sorted(before)
        survived()
    with pytest.raises(ValueError, match="a.tsv: already exists"), data.new_path("a.tsv") as one:
        with data.new_path("a.tsv") as two:                  # two processes at once: the first to end stays
            two.write(b"two")
        one.write(b"one")
    assert contents(here) == before | {"a.tsv": b"two"}
    survived()
    with pytest.raises(ValueError, match="already exists"), data.new_path("new", folder=True) as one:
        with data.new_path("new", folder=True) as two:
            Path(two, "x").write_text("two")
        Path(one, "x").write_text("one")
    assert contents(here) == before | {"a.tsv": b"two", "new/x": b"two"}
    assert len(os.listdir()) == len(before) + 2
    survived()


WRITERS = {"predict": ["long.fa", "--window", 10, "--init", "tuned.pt"],
           "embed": ["long.fa", "--per_base", "--init", "pre.pt"], "export": ["new", "--init", "pre.pt"],
           "table": ["."], "figures": ["loss", "run", "--out", "f/loss", "--dpi", 20]}


@pytest.mark.fault("outputs: full disk", n=6)
def test_full_disk(here, survived):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
    (here / "run").mkdir()
    (here / "run/log.jsonl").write_text('{"step": 1, "loss": 2}\n')
    before = contents(here)
    for tool, args in WRITERS.items():
        message = refused(use(tool, *args, patches={0: limit}))
        assert "cannot be written (File too large); free space" in message
        assert contents(here) == before and not [*here.rglob("*.tmp")], tool
        survived()
    assert "demo.fa: cannot be written" in refused(run(["--demo"], {0: limit}))
    assert not [*here.rglob("demo*")]
    survived()


@pytest.mark.fault("outputs: Ctrl-C and SIGTERM at work", n=5)
def test_a_stop_leaves_nothing(here, survived):
    before, INT = contents(here), signal.SIGINT
    for tool, which in zip(("predict", "predict", "embed", "export", "table"), (signal.SIGTERM, *[INT] * 4)):
        stop = at_call("data", "new_path", 1, lambda real, *args, **kwargs: stopped(
            real(*args, **kwargs), which))
        result = use(tool, *WRITERS[tool], patches={0: stop})
        name = "Ctrl-C" if which == INT else "SIGTERM"
        assert (result.code, result.err) == (128 + which, f"stopped  by {name}\n"), result
        assert contents(here) == before and not [*here.rglob("*.tmp")]
        survived()


class stopped:
    """A context that is entered, and then gets a signal."""
    def __init__(self, real, which):
        self.real, self.which = real, which

    def __enter__(self):
        self.real.__enter__()
        try:
            os.kill(os.getpid(), self.which)
        except BaseException:
            self.real.__exit__(*sys.exc_info())
            raise

    def __exit__(self, *error):
        return self.real.__exit__(*error)


SCRIPTS = ["randommask.py", "findna.py", "cm_gems.py", "finetune.py", *(f"tools.{name}" for name in (
    "predict", "embed", "export", "table", "figures", "report", "download", "bench"))]


@pytest.mark.fault("outputs: Ctrl-C while torch is imported", n=len(SCRIPTS))
def test_ctrl_c_at_the_start(tmp_path, survived):
    for name in ("numpy", "torch", "tqdm"):                  # whichever is first
        (tmp_path / f"{name}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    for script in SCRIPTS:
        args = [ROOT / script] if script.endswith(".py") else ["-m", script]
        result = subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True,
                                env=os.environ | {"PYTHONPATH": str(tmp_path)})
        assert (result.returncode, result.stderr) == (130, "stopped  by Ctrl-C\n"), (script, result)
        survived()


EMPTY = [
    "randommask.py --init ''", "findna.py --cache ''", "cm_gems.py --npmi_table ''",
    "finetune.py --csv a.csv ''", "finetune.py --demo --init hf:",
    "tools.predict '' --init tuned.pt", "tools.embed tiny.fa --init ''",
    "tools.predict tiny.fa --init tuned.pt --out ''", "tools.export '' --init pre.pt", "tools.table ''",
    "tools.report emp/H3 --data_dir ''", "tools.download --data_dir ''", "tools.figures masks --out ''",
    *(f"{script}.py --{flag} ''" for script in ("randommask", "findna", "cm_gems") for flag in (
        "genome", "data_dir", "cache", "init", "out")), "finetune.py --csv ''",
    *(f"finetune.py --task demo --{flag} ''" for flag in ("data_dir", "fasta", "init", "out")),
    *(f"tools.{tool} {args}" for tool in ("predict", "embed") for args in (
        "'' --init tuned.pt", "tiny.fa --init ''", "tiny.fa --init x.pt --out ''", "tiny.fa --init findna:")),
    "tools.export new --init ''", "tools.report ''", "tools.report emp/H3 --fasta ''", "tools.download ''",
    "tools.figures loss ''", "tools.figures results ''", "tools.figures embeddings ''",
    "tools.figures attention pre.pt --fasta ''", "tools.figures masks --fasta ''",
    "tools.figures masks --cache ''", "tools.figures masks --data_dir ''"]


@pytest.mark.parametrize("commands", [
    pytest.param(EMPTY[:13], marks=pytest.mark.fault("flags: empty paths", n=13)),
    pytest.param(EMPTY[13:], marks=[pytest.mark.fault("flags: empty paths", n=len(EMPTY) - 13),
                                    pytest.mark.slow])], ids=["quick", "all"])
def test_an_empty_path_is_refused(here, survived, commands):
    before = contents(here)
    for command in commands:
        script, *args = [word.strip("'") for word in command.split(" ")]
        message = refused(run(args, script=script))
        assert "''" in message or ": is empty" in message, (command, message)
        assert contents(here) == before
        survived()


def test_a_long_name_does_not_multiply(here):
    names = [f"s{i}" for i in range(300)] + ["x" * 10 ** 6]
    write_fasta(here / "n.fa", dict.fromkeys(names, "ACGTACGT"))
    result = use("embed", "n.fa", "--init", "pre.pt")
    assert result.code == 0 and "1 names of more than 256 characters are cut in ids" in result.out, result
    found = np.load("n.npz")
    assert Path("n.npz").stat().st_size < 5e6 and found["ids"].tolist() == [*names[:-1], "x" * 256]
    assert found["long_at"].tolist() == [300] and str(found["long_ids"]).split("\n") == names[-1:]
    genome = data.Genome("n.fa")
    with pytest.raises(ValueError, match="too small"):
        genome.split(9, ["s1"])


def test_names_in_outputs(here):
    state = torch.load("tuned.pt")
    for name in ("a\tb", "a\nb", "a\x1b[31m", "a\u2028b"):
        torch.save(state | {"config": state["config"] | {"classes": [name, "b"]}}, "x.pt")
        message = refused(use("predict", "tiny.fa", "--init", "x.pt"))
        assert "control character" in message and "\x1b" not in message
        assert not Path("tiny.predictions.tsv").exists()
    os.rename("tiny.fa", "\x1b[2Jtiny.fa")
    result = use("predict", "\x1b[2Jtiny.fa", "--init", "tuned.pt")
    assert result.code == 0 and "\x1b" not in result.out, result
    assert "wrote \\x1b[2Jtiny.predictions.tsv" in result.out


def test_a_card_names_no_folder_of_this_machine(here):
    assert use("export", here / "new", "--init", here / "pre.pt").code == 0
    text = Path("new/README.md").read_text()
    assert str(here) not in text and not re.search(r'"(hf:)?/', text)
    for part in ('"init": "hf:x"', '"g.fa"', '"b/h.fa"', '"lr": 0.1', 'from_pretrained("new")'):
        assert part in text
    paths = {"random:hf:/a/b/": "random:hf:b", "~/x.pt": "x.pt", "a/b": "a/b", "kmer": "kmer"}
    assert export.without_paths([*paths]) == [*paths.values()]
