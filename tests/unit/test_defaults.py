"""What a script does without flags is what its paper did: each default beside its source.

Sources. Liang: the RandomMask paper. DNABERT: its run_pretrain.py, config.json and README. GM: GeneMask's
repository (Script-A pretraining, Script-B few-shot, Code-E models). Roy: CM-GEMS, slides and released code.
Yu: FinDNA (pretraining: sections 3.1 to 3.4 and 4.1). Yu's code: the released one, where the paper is silent.
"""
import importlib
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

import cm_gems
import data
import finetune
import training

# where, how often, on what: every flag that is not here is in one of the tables below
COMMON = {"genome", "data_dir", "cache", "val_contigs", "init", "micro_batch_size", "out", "resume",
          "log_every", "eval_windows", "device", "dtype", "compile", "show_masks", "demo",
          "verify", "ambiguous", "dry_run", "track", "bed", "repeat_weight"}
RANDOMMASK = {
    "k": (6, "Liang: overlapping 6-mers, as DNABERT"),
    "stride": (1, "Liang: overlapping"),
    "block_size": (512, "Liang: sequence length of 512"),
    "size": (None, "ours"),
    "n_layer": (12, "DNABERT: BERT-base"),
    "n_head": (12, "DNABERT"),
    "n_embd": (768, "DNABERT"),
    "dropout": (0.1, "DNABERT"),
    "mask": ("randommask", "Liang, Algorithm 1"),
    "p": (0.15 / 6, "Liang, Algorithm 1: P = 2.5 %"),
    "batch_size": (512, "Liang"),
    "steps": (480_000, "Liang, Algorithm 1: steps"),
    "lr": (1e-4, "Liang"),
    "warmup": (10_000, "DNABERT; of other totals 2 %"),
    "weight_decay": (0.01, "DNABERT"),
    "grad_clip": (1.0, "DNABERT"),
    "keep": ([1_000, 30_000, 300_000], "Liang, Figs 2, 5 and 8"),
    "seed": (42, "DNABERT")}
FINDNA = {
    "length": (1000, "Yu"),
    "windows": (100_000, "Yu"),
    "fresh_windows": (False, "Yu: one set"),
    "backbone": ("chordmixer", "Yu"),
    "n_layer": (4, "Yu's code; Yu: 25.4M parameters in two networks"),
    "track_size": (28, "Yu's code: 308 channels, 11 tracks"),
    "hidden": (512, "Yu's code"),
    "dropout": (0.0, "Yu's code"),
    "objective": ("both", "Yu, Eq. 1"),
    "alpha": (0.5, "Yu, Eq. 1, section 4.1"),
    "cl_space": ("projected", "Yu, section 3.4, Eq. 6: xi in R^{K x D}, D = 5"),
    "temp_student": (0.1, "Yu, section 4.1"),
    "temp_teacher": (0.04, "Yu, section 4.1"),
    "ema": (0.996, "Yu, section 3.4"),
    "center_momentum": (0.996, "Yu, Eq. 6"),
    "n_cls": (10, "Yu, section 4.1"),
    "mask_rate": (0.3, "Yu, section 4.1"),
    "noise": (0.2, "Yu, section 4.1"),
    "flip": (0.5, "Yu's code"),
    "preset": (None, "ours"),
    "views": ("MDIT+NR", "Yu, Table 4"),
    "translocation": (20, "EvoAug, Yu's code"),
    "batch_size": (64, "Yu's code"),
    "epochs": (50, "Yu"),
    "steps": (78_125, "50 epochs of 100,000 windows in batches of 64"),
    "lr": (3e-4, "Yu's code"),
    "warmup": (23_438, "Yu: 30 % of the steps"),
    "weight_decay": (3e-4, "Yu's code"),
    "seed": (42, "ours")}
FINDNA_OURS = {"n_head", "n_embd", "cl_softmax", "grad_clip", "keep", "eval_every", "save_every"}
CM_GEMS = {
    "k": (6, "GM: 6-mers"),
    "block_size": (512, "GM Script-A"),
    "model": ("dnabert", "Roy: the columns without a prefix"),
    "size": (None, "ours"),
    "n_layer": (12, "GM Code-E: DNABERT"),
    "n_head": (12, "GM Code-E"),
    "n_embd": (768, "GM Code-E"),
    "n_inner": (3072, "GM Code-E"),
    "dropout": (0.1, "GM Code-E"),
    "strategy": ("cm_gems", "Roy"),
    "p_scale": (1.0, "GM: 0.15 over the mean span"),
    "switch_drop": (1.0, "Roy: threshold_perplexity_drop"),
    "switch_after": (0, "Roy: none"),
    "cm_step_stages": (10, "Roy: the steps divided by ten"),
    "cm_step_easy": ("genemask", "Roy"),
    "npmi": ("published", "GM Data-A"),
    "npmi_contigs": (None, "GM Code-C: hg38's chr1, chr2, chr3 where the genome is hg38"),
    "npmi_table": (None, "counted"),
    "npmi_only": (False, "ours"),
    "batch_size": (250, "GM Script-A: 10 x 25"),
    "steps": (10_000, "GM Script-A"),
    "lr": (8e-4, "GM Script-A"),
    "warmup": (500, "GM Script-A: 5 % of the steps"),
    "weight_decay": (0.01, "GM Script-A"),
    "grad_clip": (1.0, "GM Script-A"),
    "eval_every": (500, "GM Script-A: logging_steps; 5 % of the steps"),
    "save_every": (10.0, "minutes, ours; GM Script-A: 1000 steps"),
    "seed": (42, "GM Script-A")}
LOGO = {"n_layer": 2, "n_head": 8, "n_embd": 256, "n_inner": 3072, "dropout": 0.0}           # GM Code-E


@pytest.fixture
def defaults(monkeypatch):
    """defaults(script, *flags): the parsed and completed flags, as a dict."""
    def parse(script, *flags):
        module = importlib.import_module(script)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
        args = module.parse_args()[0] if script == "finetune" else module.parse_args()
        if hasattr(module, "complete_args"):
            module.complete_args(args)
        return vars(args)
    return parse


@pytest.mark.parametrize("script, table, ours", [
    ("randommask", RANDOMMASK, {"eval_every", "save_every", "strands"}), ("findna", FINDNA, FINDNA_OURS),
    ("cm_gems", CM_GEMS, {"keep", "strands"})], ids=["randommask", "findna", "cm_gems"])
def test_defaults_equal_the_paper(defaults, script, table, ours):
    args = defaults(script)
    for name, (value, source) in table.items():
        assert args[name] == value and type(args[name]) is type(value), f"--{name}: {source}"
    assert {*args} == {*table} | COMMON | ours               # a new flag belongs in one of them
    assert (args["ambiguous"], args["verify"], args["bed"], args["repeat_weight"]) == ("N", False, None, 1)
    assert args.get("strands", "forward") == "forward"
    assert args["genome"] == ["hg38"] and args["val_contigs"] == [] and not (args["init"] or args["resume"])


@pytest.mark.parametrize("script, flags, want", [
    ("randommask", "--mask dnabert", {"p": 0.15 / 6}),       # DNABERT: 15 % in spans of k
    ("randommask", "--mask single --stride 6", {"p": 0.15}),
    ("randommask", "--mask dnabert --stride 2", {"p": 0.15 / 3}),
    ("randommask", "--stride 4", {"p": 0.15 / 2}),
    ("randommask", "--k 3", {"p": 0.15 / 3}), ("randommask", "--k 4", {"p": 0.15 / 4}),
    ("randommask", "--steps 48000", {"warmup": 960, "keep": [100, 3_000, 30_000]}),
    ("randommask", "--steps 100 --warmup 0", {"warmup": 0}),
    ("randommask", "--size base", {"n_layer": 12, "n_head": 12, "n_embd": 768, "dropout": 0.1,
                                   "batch_size": 512, "micro_batch_size": 64, "lr": 1e-4, "steps": 480_000}),
    ("randommask", "--size mini", {"n_layer": 4, "n_head": 4, "n_embd": 256, "batch_size": 128,     # Turc
                                   "block_size": 128, "steps": 30_000, "warmup": 600}),
    ("randommask", "--size small --n_embd 64", {"n_layer": 4, "n_head": 8, "n_embd": 64, "steps": 100_000}),
    ("randommask", "--size tiny --steps 50 --genome x.fa", {"n_layer": 2, "n_embd": 128, "steps": 50}),
    ("randommask", "--size tiny --genome x.fa", {"steps": 20_000}),
    ("randommask", "--genome x.fa", {"steps": None, "warmup": None, "keep": []}),      # not known yet
    ("cm_gems", "--size tiny", {"n_layer": 2, "n_head": 2, "n_embd": 128, "n_inner": 512, "steps": 10_000}),
    ("findna", "--epochs 30", {"steps": 46_875, "warmup": 14_062}),
    ("findna", "--steps 1000", {"steps": 1000, "warmup": 300}),
    ("findna", "--windows 1000 --epochs 1", {"steps": 16, "warmup": 5}),       # the last batch of 40: as 64
    ("cm_gems", "--steps 1000", {"warmup": 50, "eval_every": 50}),             # Roy: the short run
    ("cm_gems", "--model logo", LOGO), ("cm_gems", "--model logo --dropout 0.2", LOGO | {"dropout": 0.2})],
    ids=lambda x: x if isinstance(x, str) else "")
def test_defaults_that_follow_other_flags(defaults, script, flags, want):
    args = defaults(script, *flags.split())
    assert {name: args[name] for name in want} == want


@pytest.mark.parametrize("gpu, ranks, flags, want", [
    (True, 1, "", 64), (True, 8, "", 8), (True, 16, "", 4), (True, 3, "", 21), (True, 99, "", 1),
    (True, 1, "--batch_size 256", 64), (True, 1, "--batch_size 40", 40), (True, 1, "--micro_batch_size 5", 5),
    (True, 1, "--device cpu", 8), (True, 1, "--demo", 32), (False, 1, "", 8), (False, 8, "", 8)])
def test_findna_has_one_micro_batch_a_rank_on_gpus(defaults, tmp_path, monkeypatch, gpu, ranks, flags, want):
    """Where 64 or fewer sequences are enough; a resumed run keeps its own on any number of ranks."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    names = dict(RANK="0", WORLD_SIZE=str(ranks), MASTER_ADDR="here", MASTER_PORT="1")
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    args = defaults("findna", *flags.split())
    assert args["micro_batch_size"] == want
    (tmp_path / "last.pt").touch()
    (tmp_path / "args.json").write_text(json.dumps(args))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert defaults("findna", "--resume", "--out", str(tmp_path))["micro_batch_size"] == want


@pytest.mark.parametrize("resumed, advice", [(True, "take fewer ranks"), (False, "lower --micro_batch_size")])
def test_more_ranks_than_micro_batches(monkeypatch, resumed, advice):
    """A resumed run refuses another --micro_batch_size, so that the advice differs."""
    monkeypatch.setattr(training, "set_up", lambda *_: (None, "float32", 0, 8))
    monkeypatch.setattr(training, "check_out", lambda *_: None)
    flags = dict(out="", batch_size=64, micro_batch_size=64, resume=resumed, demo=False, device="", dtype="",
                 dry_run=False, track=None)
    with pytest.raises(ValueError, match=advice):
        training.Run(SimpleNamespace(**flags), writes=False)


@pytest.mark.parametrize("script, first, beside", [
    ("randommask", "", "--compile --cache elsewhere"), ("randommask", "--no-compile --lr 3e-05", "--keep 7"),
    ("cm_gems", "--npmi_contigs a,b --model logo", ""), ("cm_gems", "--demo --dropout 0.3", ""),
    ("findna", "--preset released --steps 9", "--val_contigs c")])
def test_resume_takes_the_flags_of_the_run(defaults, tmp_path, script, first, beside):
    """Also those without a value and lists; a flag beside --resume wins; values are checked as flags are."""
    before, out = defaults(script, *first.split()), ["--out", str(tmp_path)]
    saved = json.dumps(before | {"out": "moved"})
    (tmp_path / "last.pt").touch()
    (tmp_path / "args.json").write_text(saved)
    after = defaults(script, "--resume", *out, *beside.split())
    given = {"out", "resume", *(flag[2:] for flag in beside.split() if flag.startswith("--"))}
    assert {name for name in after if after[name] != before[name]} == given
    (tmp_path / "args.json").write_text(saved.replace('"log_every": ', '"log_every": -'))
    with pytest.raises(SystemExit):
        defaults(script, "--resume", *out)


def test_finetune_defaults(defaults):
    args = defaults("finetune", "--task", "emp/H3")
    want = {"init": ["random"], "mode": "finetune", "seed": 42, "shots": None, "k": 6, "block_size": 512,
            "n_layer": 12, "n_head": 12, "n_embd": 768, "pool": "mean", "head": "linear", "blocks": "all"}
    assert {name: args[name] for name in want} == want
    flags = "protocol seeds batch_size lr weight_decay epochs warmup dropout stride long eval_network".split()
    assert {name: args[name] for name in flags} == dict.fromkeys(flags)        # the protocol's, the model's
    plans = finetune.plan_runs(SimpleNamespace(**args | {"task": ["silencer"], "own": {}}))
    assert [(plan.shots, plan.repeat) for plan in plans] == [(10, repeat) for repeat in range(10)]


FEW, BINARY = "splice_40", "gb/human_enhancers_cohn"
MTCDNA = dict(lr=1e-4, batch_size=16, weight_decay=0.1, warmup=0.2, schedule="cosine", dropout=0.1, seeds=5)
PROTOCOLS = [                                                # (name, tasks, shots, --init), numbers
    # Liang, Table 4
    (("randommask", "emp/H3 emp/H4ac", None, ""), dict(lr=3e-5, batch_size=32, epochs=100, weight_decay=0)),
    (("randommask", "tf_h/0 tf_m/4 cpd/tata ssp/reconstructed", None, ""), dict(epochs=10, warmup=50)),
    (("randommask", "pd/all", None, ""), dict(lr=3e-5, batch_size=32, epochs=5, weight_decay=0, warmup=50)),
    (("randommask", "eap", None, ""), dict(lr=3e-5, batch_size=64, epochs=10, weight_decay=0, warmup=50)),
    # DNABERT-2's run_dnabert1.sh
    (("dnabert2", "emp/H3", None, ""), dict(lr=3e-5, batch_size=32, epochs=3, weight_decay=0.01, warmup=50,
                                            eval_every=200, select="loss")),
    (("dnabert2", "tf_m/0", None, ""), dict(epochs=5, warmup=30, eval_every=200, max_steps=1000)),
    (("cmgems", "pd/tata", None, ""), dict(lr=3e-5, batch_size=32, epochs=10, warmup=50, eval_every=200)),
    # GM Script-B
    (("fewshot", FEW, 100, ""), dict(lr=1e-4, batch_size=5, epochs=20, warmup=0.1, weight_decay=0.01,
                                     dropout=0.1, select="last", seeds=10)),
    (("fewshot", FEW, 500, ""), dict(lr=5e-5, batch_size=15, epochs=5, warmup=0.1, weight_decay=0.01)),
    # Yu 4.3 and 4.4; Yu's code: config_gue.yaml
    (("findna", "gb/demo_human_or_worm", None, ""), dict(lr=0.01, batch_size=1024, epochs=50, warmup=0.3,
                                                         weight_decay=0.1, schedule="cosine", seeds=5)),
    (("findna", "emp/H3", None, ""), dict(lr=5e-4, batch_size=32, epochs=20, warmup=0.3, schedule="cosine",
                                          dropout=0.1, weight_decay=0.1, seeds=5)),
    (("findna", "covid", None, ""), dict(lr=1e-3, batch_size=256, epochs=100, warmup=0.3, schedule="cosine",
                                         dropout=0.1, weight_decay=0.01, seeds=5)),
    (("findna", "mtcdna/1024", None, ""), MTCDNA | dict(epochs=80)),
    (("findna", "mtcdna/4096 mtcdna/8192", None, ""), MTCDNA | dict(epochs=50)),
    # Martinek et al.; both CNNs: Adam
    (("martinek", BINARY, None, ""), dict(lr=2e-4, batch_size=48, weight_decay=0.1, warmup=0.1, patience=3,
                                          seeds=5, select="loss")),
    (("martinek", BINARY, None, "cnn"), dict(lr=1e-3, batch_size=32, weight_decay=0, warmup=0,
                                             schedule="constant")),
    (("martinek", BINARY, None, "penguinn"), dict(lr=1e-3, batch_size=32, weight_decay=0, warmup=0, seeds=5,
                                                  schedule="constant", select="loss", patience=3))]


@pytest.mark.parametrize("case, want", PROTOCOLS, ids=[" ".join(map(str, case)) for case, _ in PROTOCOLS])
def test_protocols_equal_the_paper(case, want):
    name, tasks, shots, init = case
    clip = {} if init in ("cnn", "penguinn") else {"grad_clip": 0.5 if name == "findna" else 1.0}
    want = {"schedule": "linear"} | want | clip
    for task in tasks.split():
        got = finetune.get_protocol(name, task, shots, init, {})
        assert {number: got[number] for number in want} == want, task
        assert type(got["warmup"]) is type(want.get("warmup", got["warmup"]))  # steps, or a share of them


@pytest.mark.parametrize("task, protocol", {
    "tf_m/0": "randommask", "covid": "randommask", "eap": "randommask", "silencer": "fewshot",
    "gb/human_enhancers_cohn": "martinek", "mtcdna/1024": "findna", "demo": "strict"}.items())
def test_the_protocol_of_a_set_is_that_of_its_paper(task, protocol):
    args = SimpleNamespace(task=[task], own={}, init=["x"], mode="finetune", protocol=None, seeds=None,
                           shots=None)
    assert {plan.protocol for plan in finetune.plan_runs(args)} == {protocol}


def test_a_regression_is_chosen_by_loss():
    """PCC is blind to the scale of the predictions: docs/finetune.md, choice 7."""
    args = SimpleNamespace(mode="finetune", class_weights=None, seed=1, strands=None, split_by=None)
    start = finetune.Start({"kind": "bert"}, None, "x", "")
    for name, select in (("eap", "loss"), ("emp/H3", "score")):
        plan = finetune.Plan(name, None, 0, "x", "randommask", {})
        key = finetune.make_key(plan, data.TASKS[name], start, "", args)
        assert key["numbers"]["select"] == select


@pytest.mark.parametrize("init", ["cnn", "random:out/x/cnn.pt", "out/x/cnn.pt"])
def test_a_cnn_has_its_own_optimizer(init):
    """Also one that starts from a checkpoint, or from random weights of one."""
    args = SimpleNamespace(mode="finetune", class_weights=None, seed=1, strands=None, split_by=None)
    task, plan = "gb/human_enhancers_cohn", finetune.Plan("", None, 0, init, "martinek", {})
    key = finetune.make_key(plan, data.TASKS[task], finetune.Start({"kind": "cnn"}, None, "x", ""), "", args)
    assert (key["numbers"]["lr"], key["numbers"]["weight_decay"]) == (1e-3, 0)


def test_the_dropout_and_blocks_of_a_run():
    """Yu 4.4: dropout 0.1, also in a ChordMixer; --blocks log2: the first ceil(log2 L) of each layer."""
    args = SimpleNamespace(pool="mean", head="linear", blocks="log2", strands=None, long=None, dtype="")
    mixer = {"kind": "mixer", "mixer": dict(length=1010, track_size=28, dropout=0.0), "n_cls": 10}
    bert = {"kind": "bert", "bert": {"dropout": 0.0}, "k": 6, "stride": 1}
    for spec in (mixer, bert):
        numbers = finetune.get_protocol("findna", "emp/H3", None, "", {})
        made = finetune.complete(spec, {"numbers": numbers}, args, data.TASKS["emp/H3"], 500)
        assert made[spec["kind"]]["dropout"] == 0.1
    for longest in (1, 2, 3, 500, 512, 513, 1024, 1025):
        made = finetune.complete(mixer, {"numbers": {}}, args, data.TASKS["emp/H3"], longest)
        assert made["n_blocks"] == max(1, math.ceil(math.log2(longest)))


def test_logo_and_the_preset_of_the_released_code(defaults):
    """GM Code-E: FFN 3072 at width 256. Yu's code: center momentum 0.9, 30 epochs, teacher sees edits."""
    with torch.device("meta"):
        net = cm_gems.build_model(SimpleNamespace(**defaults("cm_gems", "--model", "logo")))
    assert sum(p.numel() for p in net.parameters()) == 4_933_125
    args = defaults("findna", "--preset", "released")
    assert [args[x] for x in ("center_momentum", "epochs", "steps", "views")] == [0.9, 30, 46_875, "MNR+T"]
