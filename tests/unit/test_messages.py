"""What is said of common mistakes: by which name, how many, and what to do."""
import argparse
import os
import types

import numpy as np
import pytest
import torch
from harness import random_dna, write_fasta
from test_finetune_rules import BERT

import cm_gems
import data
import findna
import finetune
import models
import training
from tools import figures, predict, report


def flags_of(path, window=None):
    return argparse.Namespace(file=str(path), window=window, step=None)


def refusal(function, *args):
    with pytest.raises(ValueError) as e:
        function(*args)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_what_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{name}': not a folder; name one"):
            training.folder_name(str(tmp_path / name))
        assert "not a folder" in refusal(training.check_out, str(tmp_path / name), False)
    (tmp_path / "good").symlink_to(tmp_path)
    for path in (tmp_path, tmp_path / "good", tmp_path / "new"):
        assert training.folder_name(str(path)) == str(path)


def test_runs_that_are_given_twice():
    paths = argparse.Namespace(paths=["a.pt", "b"], names=None)
    assert figures.label_paths(paths) == {"a": "a.pt", "b": "b"}
    for given, names, said in ((["a", "a"], None, "a: given twice; give each once"),
                               (["a", "b"], ["x", "x"], "x: two --names; give each once"),
                               (["a", "b"], ["x"], "2 paths, but 1 --names; give one for each"),
                               ([*"abcdefghi"], None, "9 paths; give at most 8")):
        assert refusal(figures.label_paths, argparse.Namespace(paths=given, names=names)) == said


@pytest.mark.parametrize("text, said", [("sequence,label\nACGT,1\n", "this is a table, not FASTA; write"),
                                        ("sequence\tlabel\nACGT\t1\n", "this is a table, not FASTA"),
                                        ("ACGTTT\nACGT\n", "no header '>name' but 'ACGTTT'; add one")])
def test_a_table_as_a_genome(tmp_path, text, said):
    (tmp_path / "t.csv").write_text(text)
    assert said in refusal(list, data.fasta_records(str(tmp_path / "t.csv")))


def test_commas_in_names_of_contigs(tmp_path):
    rng = np.random.default_rng(0)
    names = "chr1,a", "chr1", "a", "x,y,z"
    genome = data.Genome(write_fasta(tmp_path / "g.fa", {name: random_dna(900, rng) for name in names}))
    for text, found in (("chr1,a", ["chr1,a"]), ("a,chr1", ["a", "chr1"]), ("chr1,x,y,z", ["chr1", "x,y,z"])):
        assert genome.named(text.split(","), "--f") == found
    assert genome.split(30, "x,y,z,a".split(","))[1].tolist() == [[1800, 2700], [2700, 3600]]
    for text, word in (("chr1,b", "'b'"), ("x,y", "'x'"), ("a,a,", "''")):
        assert refusal(genome.named, text.split(","), "--f").startswith(f"--f: {word} is not in the genome")


@pytest.mark.parametrize("val_contigs", [(), ("a",), ("b",), ("a", "b"), ("c", "rc"), ("d",)], ids=str)
def test_contigs_that_repeat_others(tmp_path, val_contigs):
    """The held-out bases that are also trained on, one by one."""
    rng = np.random.default_rng(0)
    texts = {name: random_dna(n, rng) for name, n in (("a", 4000), ("c", 5000), ("d", 4000))}
    other = data.decode(data.reverse_complement(data.encode(texts["c"])))
    middle = random_dna(3900, rng)                           # "e" only ends as "a" does: no repeat
    texts |= {"b": texts["a"].lower(), "rc": other, "e": texts["a"][:50] + middle + texts["a"][-50:]}
    genome, trained, held = data.Genome(write_fasta(tmp_path / "g.fa", texts)), set(), []
    for name, text in texts.items():
        n = len(text) * (name in val_contigs) if val_contigs else len(text) // 100
        for at in range(len(text)):
            place = name, at
            if name in ("b", "rc"):
                place = ("a", at) if name == "b" else ("c", len(text) - 1 - at)
            held.append(place) if at >= len(text) - n else trained.add(place)
    _, (_, line, *_) = genome.reach(30, val_contigs)
    assert "2 of the contigs repeat another, on either strand (b is a, ...)" in line
    assert f": {sum(place in trained for place in held):,} of {len(held):,} held-out bases are also" in line
    alone = data.Genome(write_fasta(tmp_path / "h.fa", {name: texts[name] for name in "acd"}))
    assert "repeat" not in " ".join(alone.reach(30)[1])
    short = {"d": texts["d"], "x": "ACGT" * 4 + "A", "y": "T" + "ACGT" * 4, "z": "C" * 17}
    [line] = data.Genome(write_fasta(tmp_path / "s.fa", short)).repeated(np.zeros(4, int))
    assert line.startswith("note: 1 of the contigs repeat another, on either strand (y is x, ...)")


def test_steps_that_cannot_be_kept_any_more(tmp_path, capsys):
    (tmp_path / "step_2.pt").touch()
    run = types.SimpleNamespace(n_micro=1, world=1, rank=0, start=5, needs="", say=print,
                                device=torch.device("cpu"),
                                args=argparse.Namespace(dtype="float32", genome=["g"], out=str(tmp_path),
                                                        keep=[2, 4, 5, 6], micro_batch_size=1))
    training.Run.describe(run, torch.nn.Linear(1, 1), "genome", 1, 1)
    assert "resume   --keep 4 5: not kept, the run is past that\n" in capsys.readouterr().out


def test_a_link_is_no_checkpoint_of_a_run(tmp_path):
    state = {"format": 1, "method": "m", "step": 3, "model": {}, "optimizer": {}, "config": {}, "args": {},
             "data": ""}
    (tmp_path / "run").mkdir()
    torch.save(state, tmp_path / "x.pt")
    (tmp_path / "run/last.pt").symlink_to(tmp_path / "x.pt")
    assert training.load(tmp_path / "run/last.pt")["step"] == 3                # where the user names it
    assert "a link, not followed" in refusal(training.load_newest, tmp_path / "run")
    torch.save(state | {"step": 2}, tmp_path / "run/prev.pt")
    state, wrong = training.load_newest(tmp_path / "run")
    assert state["step"] == 2 and "a link, not followed" in str(wrong)


def test_no_memory_is_one_line(capsys):
    with pytest.raises(SystemExit), training.user_errors():
        raise MemoryError
    assert capsys.readouterr().err.startswith("error: not enough memory; raise the limit (ulimit -v, or")


def test_folders_of_another_kind_of_network_are_refused():
    mixer = models.BaseModel(models.ChordMixer(models.ChordMixerConfig(64, 1, 8, 64)))
    for model, init in ((mixer, "hf:x"), (models.Bert(models.BertConfig(**BERT)), "findna:x")):
        assert "hf: is for BERTs, findna: for findna.py" in refusal(models.copy_weights, model, init, None)


def test_sizes_of_another_network_are_named_as_flags():
    model, config = models.Bert(models.BertConfig(**BERT)), BERT | dict(vocab_size=4 ** 5 + 5, n_inner=64)
    states = {"x": config, "findna": {"length": 9, "n_layer": 1}, "odd": BERT | {"vocab_size": "7"}}
    for name, said in (("x", "a network of --k 5, --n_inner 64 (only cm_gems.py has it); set the flags"),
                       ("findna", "another kind of network"), ("odd", "a network of --k ?")):
        found = refusal(models.copy_weights, model, name, lambda name: {"config": states[name], "model": {}})
        assert found.startswith(f"--init {name}: {said}")


def start_of(kind):
    mixer = {"mixer": {"track_size": 16}, "encoder": {}}
    spec = {"kind": "mixer", "mixer": mixer[kind]} if kind in mixer else {"kind": kind}
    return finetune.Start(spec, None, kind, "")


@pytest.mark.parametrize("kinds, mode, unused", [
    (["kmer"], "finetune", "k stride n_layer pool lr dropout long head"),
    (["cnn"], "finetune", "k stride n_layer pool dropout long head"),
    (["bert"], "finetune", "k n_layer pool head"), (["bert"], "probe", "k n_layer lr dropout head"),
    (["mixer"], "finetune", "k stride n_layer long"), (["encoder"], "finetune", "k stride n_layer"),
    (["mixer", "bert"], "finetune", "k n_layer"), (["kmer", "random"], "finetune", "pool head")], ids=str)
def test_flags_that_do_nothing(kinds, mode, unused):
    starts = [start_of("bert" if kind == "random" else kind) for kind in kinds]
    given = "k stride n_layer pool lr dropout long head out".split()
    assert finetune.unused_flags(given, starts, argparse.Namespace(init=kinds, mode=mode)) == unused.split()


@pytest.mark.parametrize("mode, said", [("finetune", "use --init cnn"), ("probe", "drop it")])
def test_a_cnn_is_not_continued(monkeypatch, mode, said):
    weights = {"w": torch.zeros(1)}
    monkeypatch.setattr(finetune, "read_network", lambda *_: ({"kind": "cnn", "length": 9}, weights))
    args = argparse.Namespace(mode=mode, stride=None, eval_network=None)
    assert refusal(finetune.read_start, "x.pt", args).endswith(said)


def test_classes_that_look_alike_are_said(capsys):
    data.say_confusing(("Pos", "neg", "pos", "caf\u00e9", "cafe\u0301", "pos\xa0", "p\u200bos"))
    said = capsys.readouterr().out
    assert r"'Pos', 'pos', 'pos\xa0', 'p\u200bos' differ" in said and "neg" not in said
    assert r"'caf\xe9', 'cafe\u0301' differ" in said


def test_lists_of_labels_are_said(capsys):
    data.say_confusing(("brain", "brain, liver", "brain;heart", "heart|liver"))
    assert "lists of labels (2, such as 'brain, liver') are classes of their own" in capsys.readouterr().out
    data.say_confusing(("brain", "brain-1", "a;b", "|", "c,d"))
    assert not capsys.readouterr().out


@pytest.mark.parametrize("size, refused", [(1e-160, True), (1e-40, True), (1e-28, False), (1, False),
                                           (1e29, False), (1e31, True)])
def test_targets_that_float32_cannot_hold(size, refused):
    labels = np.random.default_rng(0).random((50, 1)) * size
    rows = data.rows_from(["ACGT"] * 50, labels)
    task = argparse.Namespace(name="t", classes=("y",), regression=True, multilabel=False)
    parts = {"train": rows, "dev": None}
    if refused:
        assert "give it in other units" in refusal(finetune.check_parts, parts, task, {})
    else:
        finetune.check_parts(parts, task, {})
        features = np.random.default_rng(1).random((50, 3)).astype(np.float32)
        outputs = finetune.fit_linear(features, rows.labels, features, task)
        want = finetune.fit_linear(features, rows.labels / size, features, task)
        assert outputs / size == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("head, names", [("id,sequence", ["e1", "e2"]), ("sequence,Name", ["e1", "e2"]),
                                         ("sequence,other", ["1", "2"]), ("id,name,sequence", ["1", "2"])])
def test_rows_of_a_table_keep_their_names(tmp_path, head, names):
    rows = [{"id": f"e{i}", "name": f"e{i}", "other": "z", "sequence": "ACGT"} for i in (1, 2)]
    lines = [",".join(row[column] for column in head.lower().split(",")) for row in rows]
    path = tmp_path / "t.csv"
    path.write_text("\n".join([head, *lines]))
    assert [name for name, _ in predict.read_sequences(flags_of(path))] == names
    assert [name for name, _ in predict.read_sequences(flags_of(path, 3))][0] == f"{names[0]}:0-3"
    if names[0] == "e1":
        for bad in ('"a\tb"', ""):
            path.write_text(path.read_text().replace("e1", bad))
            assert "line 2" in refusal(list, predict.read_sequences(flags_of(path)))


@pytest.mark.parametrize("script, flags, unused", [
    (findna, "--objective mnm --ema 0.9 --hidden 64", "--ema"),
    (findna, "--backbone transformer --hidden 64 --views M+none --noise 0.5", "--noise, --hidden"),
    (findna, "--steps 5 --epochs 2 --flip 0.1 --alpha 0.9", "--epochs"),
    (cm_gems, "--strategy random --switch_after 9", "--switch_after"),
    (cm_gems, "--cm_step_stages 3 --switch_after 9", "--cm_step_stages"), (cm_gems, "--demo", "")])
def test_flags_without_effect_are_named(script, flags, unused, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x.py", *flags.split()])
    script.parse_args()
    assert ", ".join(training.IDLE) == unused


def test_report_counts_intervals_and_rows(tmp_path, capsys):
    task = data.TASKS["gb/human_enhancers_cohn"]
    tables = {"train": ["chr1,1,5,+", "chr1,1,5,+", "chr1,2,6,+"],
              "test": ["chr1,1,5,-", "chr1,1,6,+", "chr1,1,7,+"]}
    for split, lines in tables.items():
        os.makedirs(tmp_path / split)
        for name, n in (("negative", 0), ("positive", 10)):
            text = [line.replace(",1,", f",{1 - n // 10},") for line in lines]
            (tmp_path / split / f"{name}.csv").write_text("\n".join(["region,start,end,strand", *text]))
    report.report_intervals(task, "data", str(tmp_path))
    train, test = capsys.readouterr().out.splitlines()
    assert train.endswith("train table: 6 (published 20,843: differs) intervals, 3 repeats")
    assert test.endswith("6 (published 6,948: differs) intervals, 0 repeats, 2 (33.3%) are training "
                         "intervals")
    report.report_rows(task, "dev", data.rows_from(["ACG", "ACGT", "A" * 50], [0, 1, 1]))
    assert "  dev: 3 rows; bases min 3, median 4, max 50; 0:1, 1:2; sound" in capsys.readouterr().out


def test_a_download_goes_where_the_files_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for data_dir, flag in (("data", ""), ("my data", " --data_dir 'my data'")):
        for name in ("emp/H3", "gb/human_nontata_promoters"):
            said = refusal(data.read_task, name, data_dir)
            assert f"({name}); run python -m tools.download {name}{flag}, or get it from" in said
