"""Files made to run code, fill the memory or mislead, through every way in; what the sources never do."""
import ast
import collections
import functools
import importlib
import json
import operator
import os
import pickle
import resource
import runpy
import shutil
import subprocess
import time
import zipfile
from multiprocessing import util
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import finetune                                              # noqa: F401, its imports take long
import models
import training
from harness import ROOT, at_call, changed, contents, die, fork, random_dna, refused, run, wait, write_fasta

EVIL = "open('executed', 'w').close()"                       # what each payload runs
DEEP = 100_000
COORDINATES, HEAD = "GenomicBenchmarks/coordinates/human_enhancers_cohn", "id,region,start,end,strand\n"
GENOMIC = "--task gb/human_enhancers_cohn --data_dir . --fasta g.fa"


class Call:
    """Pickles as the call f(*args), whose result it is when read."""
    def __init__(self, f, *args):
        self.call = f, args

    def __call__(self):                                      # pickle wants a callable in front of a call
        pass

    def __reduce__(self):
        return self.call


class Evil(torch.nn.Linear):
    def __setstate__(self, state):
        exec(EVIL)


SYSTEM = Call(os.system, "touch executed")
PAYLOADS = {
    "os.system": SYSTEM, "eval": Call(eval, EVIL), "Popen": Call(subprocess.Popen, ["touch", "executed"]),
    "exec in an OrderedDict": collections.OrderedDict(a=[{"b": Call(exec, EVIL)}]),
    "attrgetter": Call(Call(operator.attrgetter("system"), Call(importlib.import_module, "os")),
                       "touch executed"),
    "import_module": Call(importlib.import_module, "evil"), "run_path": Call(runpy.run_path, "evil.py"),
    "nested torch.load": Call(functools.partial(torch.load, weights_only=False), "inner.pt"),
    "torch.hub.load": Call(functools.partial(torch.hub.load, source="local"), ".", "entry"),
    "whole nn.Module": Evil(2, 2)}


def zipped(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method, compresslevel=1) as z:
        for name, raw in members.items():
            z.writestr(name, raw)


def unzipped(path):
    with zipfile.ZipFile(path) as z:
        return {member.filename: z.read(member) for member in z.infolist()}


def write_hostile(folder, weights, whole):
    """The 20 files, on the model of a sound one: whole(weights or what stands for them, note)."""
    folder.mkdir()
    for name, payload in PAYLOADS.items():
        torch.save(whole(payload), folder / name)
    torch.save(whole(SYSTEM), folder / "os.system, legacy", _use_new_zipfile_serialization=False)
    for name, protocol in (("os.system, raw pickle", 4), ("os.system, protocol 0", 0)):
        (folder / name).write_bytes(pickle.dumps(SYSTEM, protocol))
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), folder / "jit archive")
    torch.save(whole({name: torch.zeros(1).expand(10 ** 13) for name in weights}), folder / "expanded view")
    torch.save(whole(weights | {"more": torch.zeros(4 * 10 ** 8, dtype=torch.uint8)}), folder / "bomb")
    zipped(folder / "deflate bomb", unzipped(folder / "bomb"), zipfile.ZIP_DEFLATED)
    torch.save(whole(weights, "note"), folder / "sound")
    sound = unzipped(folder / "sound")
    pickled, *_, data0 = [name for name in sound if name.endswith(("data.pkl", "data/0"))]
    deep = sound[pickled].replace(b"X\4\0\0\0note", b"]" * DEEP + b"a" * (DEEP - 1))
    assert len(deep) > DEEP
    zipped(folder / "deep list", sound | {pickled: deep})
    zipped(folder / "data.pkl swapped", sound | {pickled: pickle.dumps(SYSTEM, 2)})
    zipped(folder / "short storage", sound | {data0: b"abcd"})
    zipped(folder / "missing storage", {name: raw for name, raw in sound.items() if name != data0})
    for name in ("bomb", "sound"):
        (folder / name).unlink()


BERT = dict(k=3, block_size=22, n_layer=1, n_head=2, n_embd=16)
FLAGS = {"randommask": BERT, "cm_gems": BERT | {"n_inner": 64}, "finetune": BERT | {"csv": "a.csv"},
         "findna": dict(length=30, windows=23, n_layer=1, track_size=2, hidden=8)}


def flags(script, **more):
    """Flags of one step of a tiny network; of finetune.py, of a run on the table."""
    more = FLAGS[script] | {"device": "cpu", "out": "out"} | more
    if script != "finetune":
        more |= {"genome": ROOM / "a.fa", "batch_size": 8, "steps": 1, "eval_windows": 4}
    return [str(x) for name, value in more.items() for x in (f"--{name}", value)]


@pytest.fixture(scope="module", autouse=True)
def room(tmp_path_factory):
    """The folder ROOM, with a genome, a table, what payloads need, and in hf a sound Hugging Face folder."""
    global ROOM
    ROOM, rng = tmp_path_factory.mktemp("room"), np.random.default_rng(0)
    write_fasta(ROOM / "a.fa", {"a": random_dna(9000, rng)})
    rows = [f"{random_dna(20, rng)},{i % 2}\n" for i in range(40)]
    (ROOM / "a.csv").write_text("sequence,label\n" + "".join(rows))
    (ROOM / "evil.py").write_text(EVIL)
    (ROOM / "hubconf.py").write_text(f"def entry(): {EVIL}")
    torch.save(SYSTEM, ROOM / "inner.pt")
    models.save_hf(models.Bert(models.BertConfig(69, 22, 1, 2, 16, 64)), ROOM / "hf")


@functools.cache
def ran(script):
    """The folder of a run of a script; of finetune.py, one that was killed."""
    out, kill = ROOM / f"{script}.run", {0: at_call("training", "save", 2, die)}
    more, patches = (dict(save_every=1e-9), kill) if script == "finetune" else ({}, {})
    result = run(flags(script, out=out, **more), patches, script=f"{script}.py")
    assert result.code == (-9 if patches else 0), result
    return out


@functools.cache
def hostile(script):
    """The folder of the hostile files on the model of a script's checkpoint; bin: of a pytorch_model.bin."""
    if script == "bin":
        weights = safetensors.torch.load_file(ROOM / "hf/model.safetensors")
        weights["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"]
        write_hostile(ROOM / script, weights, lambda weights, note=None: (
            weights if isinstance(weights, dict) else {"a": weights}) | ({"note": note} if note else {}))
    else:
        state = training.load(next(ran(script).rglob("last.pt")))
        write_hostile(ROOM / script, state["model"], lambda weights, note=None: (
            state | {"model": weights} | ({"args": note} if note else {})))
    return ROOM / script


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working folder of a test, with what the payloads need and the table in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("evil.py", "hubconf.py", "inner.pt", "a.csv"):
        shutil.copy(ROOM / name, tmp_path)
    return tmp_path


def used_so_far():
    """CPU seconds of this process, and its largest memory in kB."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime, used.ru_maxrss


def measure():
    """Patch: at its end the fork leaves in `used` its CPU time, over that of a million turns of a Python loop
    (machines and their load differ), and the memory it took, in MB."""
    start, memory = used_so_far()

    def leave():
        end, most = used_so_far()
        for _ in range(10 ** 6):
            pass
        with open("used", "w") as f:
            json.dump([(end - start) / (used_so_far()[0] - end), (most - memory) / 1e3], f)
    util.Finalize(None, leave, exitpriority=1)


def trusting():
    """Patch: torch.load as it was before it took care."""
    real = torch.load
    torch.load = lambda *args, **kwargs: real(*args, **kwargs | {"weights_only": False})


def as_folder(path, name):
    """A Hugging Face folder with `path` as its weights."""
    shutil.copytree(ROOM / "hf", "hf", ignore=lambda *_: ["model.safetensors"])
    shutil.copy(path, f"hf/{name}")
    return "hf"


def resumed(path, script):
    """Flags that go on with a run whose checkpoint, and the one before, is `path`."""
    shutil.copytree(ran(script), "out")
    [last] = Path("out").rglob("last.pt")
    for name in ("last.pt", "prev.pt"):
        shutil.copy(path, last.with_name(name))
    return flags(script) + ["--resume"] * (script != "finetune")


PRETRAINING = ("randommask", "cm_gems", "findna")
WAYS = {                                                     # folder of the files; what is called with what
    "load": ("randommask", training.load, lambda path: [path]),
    "hf .bin": ("bin", models.load_hf, lambda path: [as_folder(path, "pytorch_model.bin")]),
    "hf .safetensors": ("bin", models.load_hf, lambda path: [as_folder(path, "model.safetensors")]),
    "finetune --init random:": ("randommask", "finetune", lambda path: [
        *flags("finetune"), "--init", f"random:{path}"]),
    **{f"{script} --init hf:": ("bin", script, lambda path, script=script: [
        *flags(script), "--init", f"hf:{as_folder(path, 'pytorch_model.bin')}"])
       for script in ("randommask", "cm_gems", "finetune")},
    **{f"{script} --init": (script.replace("finetune", "randommask"), script, lambda path, script=script: [
        *flags(script), "--init", path]) for script in FLAGS},
    **{f"{script} resumed": (script, script, lambda path, script=script: resumed(path, script))
       for script in FLAGS},
    **{f"tools.{tool}": ("finetune", f"tools.{tool}", lambda path, tool=tool: [
        "new" if tool == "export" else "a.csv", "--init", path]) for tool in ("predict", "embed", "export")}}
QUICK = ("load", "hf .bin", "randommask resumed", "finetune --init")
SLOW = [pytest.param(way, marks=pytest.mark.slow) for way in WAYS if way not in QUICK]


def attempt(way, name, patch=lambda: None, files=hostile):
    """Reads a hostile file in one way, in a fork: its result, and the paths that are new in the folder. A run
    that goes on reads two, last.pt and prev.pt."""
    folder, target, arguments = WAYS[way]
    for made in ("out", "hf", "new"):
        shutil.rmtree(made, ignore_errors=True)
    for made in ("a.predictions.tsv", "a.npz"):
        Path(made).unlink(missing_ok=True)
    args, before = arguments(files(folder) / name), contents(Path())

    def call():
        measure(), patch()
        with training.user_errors():
            target(*args)
    if callable(target):
        result = wait(fork(call))
    else:
        script = target if target.startswith("tools.") else f"{target}.py"
        result = run(args, {0: lambda: (measure(), patch())}, script=script)
    return result, {name for name, raw in contents(Path()).items() if before.get(name) != raw} - {"used"}


@pytest.mark.fault("hostile checkpoints", n=20)
@pytest.mark.parametrize("way", [*QUICK, *SLOW])
def test_hostile_checkpoints(here, survived, way):
    names = sorted(os.listdir(hostile(WAYS[way][0])))
    assert len(names) == 20
    for name in names:
        result, new = attempt(way, name)
        cost, memory = json.loads(Path("used").read_text())
        assert refused(result) and not new, (name, new)
        assert cost < 100 * (1 + way.endswith("resumed")) and memory < 300, (name, cost, memory)
        survived()


@pytest.mark.parametrize("name", [*PAYLOADS, "os.system, legacy", "os.system, raw pickle",
                                  "os.system, protocol 0", "data.pkl swapped"])
def test_payloads_do_run(here, name):
    """What the tests here would see if a file were trusted."""
    file = hostile("bin") / name
    fork(lambda: torch.load(file, weights_only=False)).join()
    deadline = time.monotonic() + 9                          # Popen does not wait
    while not Path("executed").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert Path("executed").exists()


@pytest.mark.slow
@pytest.mark.parametrize("way", [way for way in WAYS if "safetensors" not in way])
def test_ways_do_read(here, way):
    """Each way does read the file: with a loader that trusts it the payload runs."""
    assert "executed" in attempt(way, "os.system", trusting)[1]


NEVER = {"extractall", "extract", "system", "popen", "hub", "urlretrieve"}
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "subprocess"}


def unsafe(source):
    """Lines of a source that could run code from a file, leave a folder, or fetch without TLS."""
    for node in ast.walk(ast.parse(source)):
        imports = isinstance(node, (ast.Import, ast.ImportFrom))
        names = [x.name for x in node.names] + [getattr(node, "module", None) or ""] if imports else []
        call = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        options = {word.arg: ast.unparse(word.value) for word in getattr(node, "keywords", []) if call}
        if (MODULES & {name.split(".")[0] for name in names}
                or call in ("eval", "exec", "compile", "__import__")
                or isinstance(node, ast.Attribute) and node.attr in NEVER
                or call in ("torch.load", "torch.jit.load") and options.get("weights_only") != "True"
                or call in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False"
                or options.get("shell", "False") != "False" or options.get("weights_only", "True") != "True"
                or isinstance(node, ast.Constant) and "http://" in str(node.value)):
            yield node.lineno


@pytest.mark.fault("sources: unsafe calls")
@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")]), ids=lambda x: x.name)
def test_sources_call_nothing_unsafe(path):
    allowed = ["import subprocess"] if path.name == "bench.py" else []        # it asks git for the commit
    lines = path.read_text().splitlines()
    assert [lines[n - 1] for n in unsafe(path.read_text())] == allowed


@pytest.mark.parametrize("source", [
    "import pickle", "from pickle import loads", "import os, joblib.x", "torch.load(path)", "eval(text)",
    "torch.load(path, weights_only=False)", "f(path, weights_only=safe)", "np.load(path, allow_pickle=True)",
    "exec(text)", "run(command, shell=True)", "archive.extractall()", "archive.extract(name)",
    "os.system(text)", "get('http://example.org')", "torch.hub.load('x')", "f'http://{host}/'"])
def test_what_is_unsafe_is_seen(source):
    assert [*unsafe(source)]


ESC = "\x1b]0;owned\x07\x1b[2J\u202e"                       # sets the title, clears the screen, turns text
LONG = ESC + "x" * 3000
SHOWN = {                                                    # file: its text, and the command that reads it
    "contig name": ("a.fa", f">{LONG} y\nACGT\n", "randommask --genome a.fa"),
    "second contig": ("a.fa", f">a\nACGT\n>{ESC}\nACGT\n", "findna --genome a.fa"),
    "line before the header": ("a.fa", f"{LONG}\n>a\nACGT\n", "cm_gems --genome a.fa"),
    "letter": ("a.fa", f">a\nACGT{ESC}\n", "randommask --genome a.fa"),
    "label": ("a.csv", f"sequence,label\nACGT,{LONG}\nACGG,1\n", "finetune --csv a.csv"),
    "column": ("a.csv", f"{LONG},label\nACGT,1\nACGG,0\n", "finetune --csv a.csv"),
    "sequence": ("a.csv", f"sequence,label\n{LONG},1\nACGG,0\n", "finetune --csv a.csv"),
    "blanks": ("a.csv", f"sequence,label\nA {LONG},1\nACGG,0\n", "finetune --csv a.csv"),
    "number": ("a.csv", f"sequence,label\nACGT,{LONG}\nACGG,0\n", "finetune --csv a.csv --targets label"),
    "column of an NPMI table": ("a.csv", f"{LONG},npmi\nAAA,1\n", "cm_gems --npmi_table a.csv"),
    "row of an NPMI table": ("a.csv", f"kmer,npmi\n{LONG},{LONG}\n", "cm_gems --npmi_table a.csv"),
    "region": (f"{COORDINATES}/test/positive.csv", f"{HEAD}0,{LONG},0,4,+\n", f"finetune {GENOMIC}"),
    "strand": (f"{COORDINATES}/test/positive.csv", f"{HEAD}0,a,0,4,{LONG}\n", f"finetune {GENOMIC}"),
    "FASTA of regions": ("g.fa", f">{LONG}\nACGT\n>{ESC}2\nACGT\n", f"finetune {GENOMIC}"),
    "class folder": (f"{COORDINATES}/test/{ESC}.csv", HEAD, f"finetune {GENOMIC}"),
    "class folder, report": (f"{COORDINATES}/test/{ESC}.csv", HEAD,
                             f"tools/report {GENOMIC.partition(' ')[2]}"),
    "config value": ("hf/config.json", json.dumps({"model_type": LONG}), "randommask --init hf:hf"),
    "path of a CSV": (f"{ESC}.csv", "", f"finetune --csv {ESC}.csv"),
    "path of a FASTA": (f"{ESC}.fa", "", f"randommask --genome {ESC}.fa"),
    "path of a checkpoint": (f"{ESC}.pt", "", f"randommask --init {ESC}.pt"),
    "path of a folder": (f"{ESC}/config.json", "", f"finetune --csv a.csv --init hf:{ESC}")}


@pytest.mark.fault("escapes in names from files")
@pytest.mark.parametrize("case", SHOWN)
def test_escapes_do_not_reach_the_terminal(here, case):
    path, text, command = SHOWN[case]
    for split in ("train", "test"):
        for name in ("negative", "positive"):
            (here / COORDINATES / split).mkdir(parents=True, exist_ok=True)
            (here / COORDINATES / split / f"{name}.csv").write_text(f"{HEAD}0,a,0,4,+\n")
    (here / "g.fa").write_text(">a\nACGT\n")
    (here / path).parent.mkdir(exist_ok=True)
    (here / path).write_text(text)
    script, *args = command.split()
    tiny = flags(script) if script in FLAGS and "--task" not in args else []
    result = run(changed(tiny, args), script=f"{script}.py")
    printed = result.out + result.err
    assert result.code == 2 and printed.replace("\n", "").isprintable()
    assert "\\x1b" in printed and max(map(len, printed.splitlines())) < 900, printed


def lies(state):
    """{name: a sound checkpoint in which one part is another}: right in form, wrong in what it says."""
    zero, (first, *_) = torch.zeros(3), state["model"]
    optimizer = state["optimizer"]
    moments = {i: part | {"exp_avg": zero} for i, part in optimizer["state"].items()}
    spread = {i: part | {"exp_avg": zero[:1].expand(part["exp_avg"].shape)}
              for i, part in optimizer["state"].items()}
    doubled = []
    for _ in range(40):
        doubled = [doubled, doubled]

    def sized(**sizes):
        config = state["config"]                             # of finetune.py: the network's is one level down
        return config | ({"bert": config["bert"] | sizes} if "bert" in config else sizes)
    wrong = {"step -1": {"step": -1}, "step 10**30": {"step": 10 ** 30}, "no weights": {"model": {}},
             "a weight more": {"model": state["model"] | {"more": zero}},
             "a weight of another shape": {"model": state["model"] | {first: zero}},
             "a weight that is text": {"model": state["model"] | {first: "text"}},
             "numbers for names": {"model": {1: zero}}, "empty optimizer": {"optimizer": {}},
             "an optimizer of another network": {"optimizer": optimizer | {"param_groups": []}},
             "groups that are text": {"optimizer": {"state": {}, "param_groups": "text"}},
             "moments of another shape": {"optimizer": optimizer | {"state": moments}},
             "moments of one number": {"optimizer": optimizer | {"state": spread}},
             "moments that are text": {"optimizer": optimizer | {"state": {i: "text" for i in moments}}},
             "other sizes": {"config": {name: 2 * x if isinstance(x, int) else x for name, x in
                                        state["config"].items()}},
             "no sizes": {"config": {}},
             "sizes that are text": {"config": dict.fromkeys(state["config"], "9")},
             "10**9 layers": {"config": sized(n_layer=10 ** 9)},
             "10**12 positions": {"config": sized(block_size=10 ** 12, length=10 ** 12)},
             "10**7 wide": {"config": sized(n_embd=10 ** 7, hidden=10 ** 7)},
             "no heads": {"config": sized(n_head=0, track_size=0)},
             "a dropout that is not a number": {"config": sized(dropout=float("nan"))},
             "words without end": {"config": sized(vocab_size=1e400, length=1e400)},
             "2**40 flags": {"args": state["args"] | {"more": doubled}},
             "no flags": {"args": {}}, "flags that are tensors": {"args": dict.fromkeys(state["args"], zero)},
             "another method": {"method": "x" * 5000}, "other data": {"data": LONG}}
    return {name: state | part for name, part in wrong.items()}


@functools.cache
def lying(script):
    (folder := ROOM / f"{script}.lies").mkdir()
    for name, state in lies(training.load(next(ran(script).rglob("last.pt")))).items():
        torch.save(state, folder / name)
    return folder


UNUSED = {"step 10**30", "groups that are text", "an optimizer of another network"}   # by a run that goes on
BY_INIT = UNUSED | {"other data", "another method", "no flags", "empty optimizer", "moments of another shape",
                    "moments that are text", "a dropout that is not a number"}       # by one that starts here


@pytest.mark.fault("checkpoints that lie", n=27)
@pytest.mark.parametrize("way", [pytest.param(way, marks=[pytest.mark.slow] * (way != "finetune resumed"))
                                 for way in WAYS if "hf" not in way and way != "load"])
def test_lies(here, survived, way):
    assert len(names := sorted(os.listdir(lying(WAYS[way][0])))) == 27
    for name in names:
        result, new = attempt(way, name, files=lying)
        if result.code or name not in (UNUSED if "resumed" in way else BY_INIT):
            assert refused(result) and not new, (name, new)
        assert result.code == 2 or result.err == "", (name, result)
        cost, memory = json.loads(Path("used").read_text())
        assert cost < 100 * (1 + way.endswith("resumed")) and memory < 300, (name, cost, memory)
        survived()
