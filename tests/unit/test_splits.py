"""Splits that do not leak: near-duplicates, groups of rows, a table's own split, and the report on them.
Literal programs over sets of strings give the right answers."""
import itertools
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from harness import command_line, random_dna, refused, run

import data
import finetune
import tools.report

FLAGS = dict(init="kmer", device="cpu", out="out")


def flip(text):
    return text.upper()[::-1].translate(str.maketrans("ACGT", "TGCA"))


def kmers(text, k=15):
    found = (text[i:i + k].upper() for i in range(len(text) - k + 1))
    return [min(kmer, flip(kmer)) for kmer in found if "N" not in kmer]


def literal_groups(texts):
    """Compares every two sequences; each takes the lowest number that it is linked to, until none changes."""
    found, group, near, before = list(map(kmers, texts)), list(range(len(texts))), [], None
    for i, j in itertools.combinations(range(len(texts)), 2):
        equal = texts[i].upper() in (texts[j].upper(), flip(texts[j]))
        fewer = min(len(found[i]), len(found[j]))
        if equal or fewer and len(set(found[i]) & set(found[j])) / fewer >= 0.5:
            near.append((i, j))
    while before != group:
        before = list(group)
        for i, j in near:
            group[i] = group[j] = min(group[i], group[j])
    return group


def same(groups):
    """Which pairs are in one group."""
    groups = np.asarray(groups)
    return groups[:, None] == groups


def mutated(text, share, rng):
    return "".join(random_dna(1, rng) if rng.random() < share else base for base in text)


def relatives(seed):
    """Pairs of sequences of every kind of likeness, many near the threshold; single ones; a family."""
    rng, texts = np.random.default_rng(seed), []
    likes = [str.lower, flip, lambda x: x[10:60], lambda x: flip(x[10:60]), lambda x: x[:50] + "N" + x[51:]]
    for n in (20, 42, 43, 44, 60):
        likes += [lambda x, n=n: x[n:] + random_dna(n, rng), lambda x, n=n: flip(random_dna(n, rng) + x[:-n])]
    likes += [lambda x, share=share: mutated(x, share, rng) for share in (0.01, 0.02, 0.03, 0.04, 0.06) * 2]
    for like in likes:
        text = random_dna(100, rng)
        texts += [text, like(text)]
    texts += [like(text) for like in likes]
    texts += ["A" * 60, "A" * 20, "AC" * 40, "CA" * 35, "N" * 30, random_dna(30, rng) + "A" * 30]
    return texts + [random_dna(n, rng) for n in (1, 14, 15, 16, 40, 300)]


@pytest.mark.parametrize("seed", range(3))
def test_near_duplicates_are_those_of_a_literal_comparison(seed):
    texts = relatives(seed)
    got = data.similar_groups(data.rows_from(texts))
    assert (same(got) == same(literal_groups(texts))).all() and 30 < len(set(got)) < 60


@pytest.mark.parametrize("texts", [["A"], ["A" * 15], ["ACGT", "TTTT"], ["N" * 40, "ACGTACGTACGTACG"]])
def test_short_sequences_are_alone(texts):
    assert sorted(data.similar_groups(data.rows_from(texts))) == list(range(len(texts)))


def test_a_family_is_chained(monkeypatch):
    """More copies than a run has: what a pair loses, others make up for. A wrong link is never made."""
    monkeypatch.setattr(data, "NEAR_RUN", 8)
    rng = np.random.default_rng(0)
    families = [random_dna(200, rng) for _ in range(2)]
    texts = [mutated(families[i % 2], 0.003, rng) for i in range(120)]
    got = data.similar_groups(data.rows_from(texts))
    assert len(set(got)) == 2 and (same(got) == same(np.arange(120) % 2)).all()


@pytest.mark.parametrize("seed", range(4))
def test_groups_are_kept_whole_and_the_shares_met(seed, capsys):
    rng = np.random.default_rng(seed)
    groups = np.unique(rng.integers(150, size=1000), return_inverse=True)[1]
    classes = (rng.random(1000) < 0.2).astype(int)
    part = data.assign_groups(groups, classes, (0.7, 0.2, 0.1), seed, "t")
    assert all(len(set(part[groups == group])) == 1 for group in set(groups))
    for label, n in enumerate(np.bincount(classes)):
        got = np.bincount(part[classes == label]) / n
        assert got == pytest.approx([0.7, 0.2, 0.1], abs=0.03)
    n, largest = len(set(groups)), np.bincount(groups).max()
    assert capsys.readouterr().out == f"t: {n} groups, the largest with {largest / 1000:.1%} of the rows\n"
    again, other = (data.assign_groups(groups, classes, (0.7, 0.2, 0.1), s, "t") for s in (seed, seed + 1))
    assert (part == again).all() and (part != other).any()
    single = data.assign_groups(np.arange(100), np.arange(100) % 2, (0.8, 0.1, 0.1), seed, "t")
    assert np.bincount(single * 2 + np.arange(100) % 2).tolist() == [40, 40, 5, 5, 5, 5]


@pytest.mark.parametrize("n", [3, 4, 9, 10])
def test_a_few_groups_leave_no_split_empty(n):
    """Nine donors of about a ninth each are seven, one and one, not nine, none and none."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        groups = rng.permutation(np.arange(300) % n)
        part = data.assign_groups(groups, rng.integers(2, size=300), (0.8, 0.1, 0.1), seed, "t")
        assert np.bincount([part[groups == group][0] for group in range(n)]).tolist() == [n - 2, 1, 1]


def write(path, **columns):
    path.write_text("\n".join(map(",".join, [columns, *zip(*columns.values())])))
    return str(path)


def split(path, **flags):
    """{split: sequences} of one table, as finetune.py reads it."""
    flags = dict(csv=[path], targets=None, multilabel=None, split=None, split_by=None, seed=42) | flags
    splits = finetune.read_user_csv(SimpleNamespace(**flags))[1]
    return {name: [data.decode(rows.bases[start:end]) for start, end in itertools.pairwise(rows.offsets)]
            for name, rows in splits.items() if rows}


@pytest.fixture
def table(tmp_path):
    """120 random windows, two rows each, 20 bases apart; 6 windows a gene. What each sequence belongs to."""
    rng, columns = np.random.default_rng(0), {"sequence": [], "label": [], "Gene": []}
    windows = {}
    for i, text in enumerate(random_dna(120, rng) for _ in range(120)):
        columns["sequence"] += [text[:100], text[20:]]
        columns["label"] += [str(i % 2)] * 2
        columns["Gene"] += [f"g{i // 6}"] * 2
        windows |= {text[:100]: i, text[20:]: i}
    genes = dict(zip(columns["sequence"], columns["Gene"]))
    return SimpleNamespace(path=tmp_path / "t.csv", columns=columns, gene=genes, window=windows)


def test_a_column_split_in_one_of_several_tables_is_refused(table):
    """Its dev and test rows would be trained on."""
    one = write(table.path, **table.columns, Split=["train", "train", "val", "test"] * 60)
    other = write(table.path.with_name("u.csv"), **table.columns, split=["test"] * 240)
    train = write(table.path.with_name("v.csv"), **table.columns, split=["Train"] * 240)
    for tables, place, name in (
            ([one, other], "t.csv: line 4", "train"), ([train, one], "t.csv: line 2", "test"),
            ([train, other, one], "u.csv: line 2", "dev"), ([other, train], "u.csv: line 2", "train")):
        with pytest.raises(ValueError, match=f"{place}: column split: .* in table {name} of train"):
            split(None, csv=tables)
    assert {*split(None, csv=[train, other])} == {"train", "test"}               # each in its place
    assert {*split(None, csv=[one, one], label_column="split")} == {"train", "test"}       # these are labels
    assert {name: len(texts) for name, texts in split(one, label_column="split").items()} == {
        "train": 192, "dev": 24, "test": 24}
    numbers = write(table.path, **table.columns, split=list(map(str, range(240))))
    assert len(split(numbers, targets=["Split"])["train"]) == 192


@pytest.mark.parametrize("by, of", [("Gene", "gene"), ("gene", "gene"), ("similarity", "window")])
def test_rows_that_belong_together_stay_together(table, by, of, capsys):
    path, of = write(table.path, **table.columns), getattr(table, of)
    parts = split(path, split_by=by)
    assert {name: len(texts) for name, texts in parts.items()} == {"train": 192, "dev": 24, "test": 24}
    assert sorted(sum(parts.values(), [])) == sorted(table.columns["sequence"])
    values = [{of[text] for text in texts} for texts in parts.values()]
    assert sum(map(len, values)) == len(set(of.values()))
    said = capsys.readouterr().out
    assert f"t.csv: --split_by {by}: {len(set(of.values()))} groups, the largest with" in said
    apart = split(path)
    assert {table.window[text] for text in apart["train"]} & {table.window[text] for text in apart["test"]}
    assert split(path, split_by=by, seed=43)["train"] != parts["train"]


@pytest.mark.parametrize("flags, said", [({}, "its column split\n"),
                                         ({"split": (0.5, 0.2, 0.3)}, "its column split, not by --split\n")])
def test_a_column_split_is_obeyed(table, flags, said, capsys):
    names = ["train", "Train", "test", "val", "validation", "dev", "train", "train"] * 30
    parts = split(write(table.path, **table.columns, Split=names), **flags)
    spellings = {"train": ["train", "Train"], "dev": ["val", "validation", "dev"], "test": ["test"]}
    want = {split: [text for text, of in zip(table.columns["sequence"], names) if of in spellings[split]]
            for split in spellings}
    assert parts == want and said in capsys.readouterr().out
    names = ["train", "test"] * 120
    assert set(split(write(table.path, **table.columns, split=names))) == {"train", "test"}


@pytest.mark.parametrize("columns, flags, message", [
    ({"split": ["train", "holdout"] * 120}, {}, "t.csv: line 3: split is 'holdout'; use train, dev, val,"),
    ({"split": ["train", ""] * 120}, {}, "t.csv: line 3: split is ''; use train, dev"),
    ({"split": ["train"] * 240}, {"split_by": "gene"}, "t.csv: line 1: the column split contradicts"),
    ({"split": ["dev"] * 120 + ["test"] * 120}, {}, "t.csv: no row of '0' is in train"),
    ({"split": ["train", "train", "test", "test"] * 60}, {}, "t.csv: no row of '1' is in train"),
    ({"donor": ["a", "b", ""] * 80}, {"split_by": "donor"}, "t.csv: line 4: donor is ''; use any text"),
    ({"donor": ["a"] * 240}, {"split_by": "donor"}, "t.csv: --split_by donor: 1 groups, the largest"),
    ({"donor": ["a"] * 200 + ["b", "c"] * 20}, {"split_by": "donor"}, "with 83.3% of the rows: no split"),
    ({"donor": ["a"] * 120 + ["b"] * 120}, {"split_by": "donor"}, "2 groups, the largest with 50.0%"),
    ({}, {"split_by": "label"}, "t.csv: --split_by label: 2 groups"),
    ({}, {"split_by": "donor"}, "t.csv: line 1: no column donor in the header"),
    ({}, {"split_by": "Split"}, "t.csv: line 1: no column split in the header"),
    ({}, {"split_by": ""}, "t.csv: line 1: no column  in the header")])
def test_splits_that_cannot_be_are_refused(table, columns, flags, message):
    path = write(table.path, **table.columns | columns)
    with pytest.raises(ValueError) as e:
        split(path, **flags)
    assert message in str(e.value) and "\n" not in str(e.value) and ";" in str(e.value)


def test_a_group_larger_than_a_share_is_said(table, capsys):
    donors = ["a"] * 100 + [f"d{i}" for i in range(140)]
    split(write(table.path, **table.columns, donor=donors), split_by="donor")
    said = "141 groups, the largest with 41.7% of the rows, more than the smallest share (10%)\n"
    assert said in capsys.readouterr().out


def test_the_split_of_a_regression(table):
    table.columns["label"] = [f"{i / 7}" for i in range(240)]
    parts = split(write(table.path, **table.columns), targets=["label"], split_by="similarity")
    assert [len(texts) for texts in parts.values()] == [192, 24, 24]


def test_split_by_belongs_to_the_identity_of_a_run(table, out):
    path = write(table.path, **table.columns)
    for split_by, n in (([], 1), ([], 1), (["similarity"], 2), (["gene"], 3), (["gene"], 3)):
        result = run(["--csv", path, *command_line(FLAGS), *(["--split_by", *split_by] if split_by else [])],
                     script="finetune.py")
        rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        assert result.code == 0 and len(rows) == n, result
    assert [row["overrides"] for row in rows] == [{}, {"split_by": "similarity"}, {"split_by": "gene"}]
    assert len({row["id"] for row in rows}) == len({row["data"] for row in rows}) == 3
    assert "done before" in result.out and rows[0]["score"] > 0.5 > rows[1]["score"]
    for flags in (["--csv", path, path], ["--task", "demo"]):
        assert "--split_by: belongs to one --csv table; drop it" in refused(
            run([*flags, "--split_by", "gene"], script="finetune.py"))


def report(*args):
    return run(list(args), script="tools.report")


def test_the_report_names_near_duplicates_and_the_split_that_keeps_them(table):
    """Random labels: whatever a model scores is a leak."""
    rng = np.random.default_rng(1)
    table.columns["label"] = [label for label in rng.integers(2, size=120).astype(str) for _ in range(2)]
    result = report(write(table.path, **table.columns))
    before, after = result.out.split("Near-duplicates in train make a test too easy.")
    leaks, fair = (float(re.search(r"5-mer counts: mcc (-?[\d.]+)", text)[1]) for text in (before, after))
    assert result.code == 0 and leaks > 60 and abs(fair) < 45 and "GC and length: mcc" in before
    assert "near-duplicates (half of the 15-mers in common, on either strand):\n    within train: 1" in before
    n, share = re.search(r"train and test: (\d+) rows of test \(([\d.]+)%\) have one", before).groups()
    rows = data.rows_from(table.columns["sequence"], list(map(int, table.columns["label"])))
    train, _, test = ([table.window[data.decode(part.bases[i:i + 100])] for i in part.offsets[:-1]]
                      for part in data.split_rows(rows, (0.8, 0.1, 0.1), 42))
    assert int(n) == sum(window in train for window in test) and share == f"{int(n) / 24:.1%}"[:-1]
    assert "train and test: 0 rows of test (0.0%)" in after
    assert re.search(r"within test: (\d+) of \1 different sequences \(100.0%\) in 1\d groups, ", after)
    gc = [np.mean([base in "GC" for base in text]) for text in table.columns["sequence"]]
    whole = report(write(table.path, **table.columns, split=["train"] * 240))
    for label in "01":
        x = [gc[i] for i in range(240) if table.columns["label"][i] == label]
        said = f"train, {label}: length 100.0 (sd 0.0), GC {np.mean(x):.1%} (sd {np.std(x):.1%})\n"
        assert said in whole.out


def test_the_report_on_several_tables(table, tmp_path):
    """A test of the training windows, shifted. Where the user has split, no other split is tried."""
    columns = table.columns
    for i, name in enumerate(("train", "test")):
        write(tmp_path / f"{name}.csv", **{key: values[i::2] for key, values in columns.items()})
    out = report(str(tmp_path / "train.csv"), str(tmp_path / "test.csv")).out
    assert "train and test: 120 rows of test (100.0%) have one, or an equal sequence, in train" in out
    assert "too easy; give one table" in out and float(re.search(r"5-mer counts: mcc ([\d.]+)", out)[1]) > 70
    columns["y"] = [str(len(text) + i / 7) for i, text in enumerate(columns["sequence"])]
    out = report(write(table.path, **columns, split=["train", "test"] * 120), "--targets", "y").out
    for said in ("train, all: length 100.0", "5-mer counts: pcc", "by its column split", "(100.0%) have one"):
        assert said in out
    assert "task" in refused(report(str(table.path), "emp/H3"))
    assert "--targets, --multilabel: belong" in refused(report("emp/H3", "--targets", "y"))


def test_a_report_into_a_folder_that_cannot_be_made():
    assert "/proc/none" in refused(report("demo", "--data_dir", "/proc/none"))


def test_the_report_on_labels(table):
    """--multilabel: how many rows have each label, their GC, and the mean AUROC of the linear models."""
    table.columns |= {"a": ["1" if text[0] in "GC" else "0" for text in table.columns["sequence"]],
                      "b": ["1" if text.count("G") > 25 else "0" for text in table.columns["sequence"]]}
    labels = ["--multilabel", "a", "b"]
    out = report(write(table.path, **table.columns, split=["train", "test"] * 120), *labels).out
    for name in "ab":
        has = [text for text, x in zip(table.columns["sequence"][::2], table.columns[name][::2]) if x == "1"]
        gc = [np.mean([base in "GC" for base in text]) for text in has]
        assert f"train, {name}: length 100.0 (sd 0.0), GC {np.mean(gc):.1%} (sd {np.std(gc):.1%})\n" in out
        assert f"{name} {len(has)}" in out
    assert re.search(r"GC and length: auroc \d", out)
    assert "--targets, --multilabel: belong" in refused(report("emp/H3", *labels))


def test_gc_in_a_report_is_of_the_known_bases():
    """N is neither; the length counts it."""
    rows = data.rows_from(["ACGTN", "GGNNN", "NNN", "ATAT"], [0] * 4)
    np.testing.assert_array_equal(tools.report.gc_and_length(rows), [[0.5, 5], [1, 5], [0, 3], [0, 4]])
