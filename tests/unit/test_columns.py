"""Tables with columns of other names or another delimiter; the report on both strands."""
import argparse

import numpy as np
import pytest
from harness import random_dna, write_fasta
from test_finetune_rules import SPEC

import data
import finetune
from tools import predict, report

TABLE = "Probe ID;DNA;Effect;label;notes\np1;ACGTACGTAC;high;x;a, b\np2;TTGACCATGA;low;y;c\n"


def flags_of(path, **flags):
    return argparse.Namespace(file=str(path), window=None, step=None, **flags)


def test_columns_by_name(tmp_path):
    """The named columns are read, whatever else the header has; without the flags, the message names them."""
    (tmp_path / "t.csv").write_text(TABLE)
    flags = data.column_flags(argparse.Namespace(sequence_column="dna", label_column="Effect", delimiter=";"))
    sequences, ids, notes = data.read_table(tmp_path / "t.csv", flags=flags)
    assert sequences == ["ACGTACGTAC", "TTGACCATGA"]
    assert ids == [0, 1] and notes["classes"] == ("high", "low")
    named = predict.read_sequences(flags_of(tmp_path / "t.csv", sequence_column="DNA", id_column="probe id",
                                            delimiter=";"))
    assert [name for name, _ in named] == ["p1", "p2"]
    for given, words in (({}, "--sequence_column and --delimiter ';'"),
                         ({"delimiter": ";"}, "--sequence_column"),
                         ({"delimiter": ";", "sequence_column": "RNA"}, "no column rna"),
                         ({"delimiter": ";", "sequence_column": "DNA", "label_column": "y"}, "no column y")):
        with pytest.raises(ValueError, match=f"t.csv: line 1: .*{words}"):
            data.read_table(tmp_path / "t.csv", flags=data.column_flags(argparse.Namespace(**given)))
    with pytest.raises(ValueError, match="no column uid"):
        list(predict.read_sequences(flags_of(tmp_path / "t.csv", sequence_column="DNA", id_column="uid",
                                             delimiter=";")))


@pytest.mark.parametrize("text, message", [
    (";sequence;label\n0;ACGT;0\n1;ACGA;1\n", "no column sequence .*or see .*--delimiter ';'"),   # of pandas
    ("LOCUS,sequence,klass\nx,ACGT,0\ny,ACGA,1\n", "no column label")])
def test_tables_that_begin_like_another_format(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=f"t.csv: line 1: {message}"):
        data.read_table(tmp_path / "t.csv")


def test_the_second_of_each_pair_alone(tmp_path):
    (tmp_path / "t.csv").write_text("sequence,sequence_2,label\nACGTACGTAC,TTTT,0\nTTGACCATGA,GGGG,1\n")
    flags = data.column_flags(argparse.Namespace(sequence_column="Sequence_2"))
    assert data.read_table(tmp_path / "t.csv", flags=flags)[0] == ["TTTT", "GGGG"]
    assert data.read_table(tmp_path / "t.csv")[0] == [("ACGTACGTAC", "TTTT"), ("TTGACCATGA", "GGGG")]


def test_targets_are_the_columns_that_they_name(tmp_path):
    """Whatever the other flags rename, and also where a target has the name of another kind of column."""
    (tmp_path / "t.csv").write_text("sequence,label,effect\nACGTACGTAC,9,1.5\nTTGACCATGA,8,2.5\n")
    flags = data.column_flags(argparse.Namespace(label_column="effect"))
    assert data.read_table(tmp_path / "t.csv", targets=["label"], flags=flags)[1] == [(9,), (8,)]
    with pytest.raises(ValueError, match="no column name"):
        data.read_table(tmp_path / "t.csv", targets=["label", "name"])


@pytest.mark.parametrize("text, want", [(";", ";"), ("tab", "\t"), (r"\t", "\t"), ("|", "|")])
def test_delimiters(text, want):
    assert data.delimiter(text) == want
    for wrong in ("", "ab", '"', "\n"):
        with pytest.raises(argparse.ArgumentTypeError):
            data.delimiter(wrong)


def test_a_split_column_with_another_delimiter(tmp_path):
    rng = np.random.default_rng(0)
    rows = [f"{random_dna(20, rng)};{i % 2};{split}" for i, split in enumerate(
        ["train"] * 8 + ["dev"] * 4 + ["test"] * 2)]
    (tmp_path / "t.csv").write_text("\n".join(["sequence;label;split", *rows]))
    args = argparse.Namespace(csv=[str(tmp_path / "t.csv")], targets=None, multilabel=None, split=None,
                              split_by=None, seed=1, delimiter=";")
    _, splits = finetune.read_user_csv(args)
    assert [len(splits[split].labels) for split in ("train", "dev", "test")] == [8, 4, 2]


def test_report_on_strands(tmp_path, monkeypatch, capsys):
    """Classes and probabilities of each sequence and its reverse complement, against a plain loop."""
    rng = np.random.default_rng(3)
    texts = [random_dna(30, rng) for _ in range(40)]
    other = [text[::-1].translate(str.maketrans("ACGT", "TGCA")) for text in texts]
    write_fasta(tmp_path / "t.fa", {f"s{i}": text for i, text in enumerate([*texts, "AC"])})
    net = finetune.build_net(SPEC | {"classes": ("no", "yes"), "regression": False})
    for p in net.parameters():
        p.data.mul_(5)
    net.out.bias.data.zero_()
    model = finetune.Model("x", net, "cpu")
    monkeypatch.setattr(finetune, "load_model", lambda init, strands: model if strands == "forward" else None)
    none = dict(targets=None, multilabel=None)
    report.report_strands(argparse.Namespace(tasks=["strands", str(tmp_path / "t.fa")], init="x", **none))
    line = capsys.readouterr().out
    one, two = model.predict(texts), model.predict(other)
    assert ": 40 sequences (and 1 that the network does not read)" in line
    assert f"other strand {np.mean((one[:, 1] > 0.5) != (two[:, 1] > 0.5)):.1%}" in line
    gap, r = np.mean(abs(one[:, 1] - two[:, 1])), np.corrcoef(one[:, 1], two[:, 1])[0, 1]
    assert f"yes: mean difference {gap:.3g}, correlation {r:.3f}" in line
    write_fasta(tmp_path / "one.fa", {"a": texts[0], "b": "NNN"})
    report.report_strands(argparse.Namespace(tasks=["strands", str(tmp_path / "one.fa")], init="x", **none))
    assert capsys.readouterr().out.endswith("one.fa: 1 sequences (and 1 that the network does not read)\n")
    with pytest.raises(ValueError, match="--init"):
        report.report_strands(argparse.Namespace(tasks=["strands"], init=None))
