"""The benchmark sets of data.py: tables, each task's reader on made and on real files; tools/report.py."""
import csv
import gzip
import json
import os
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

import data

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("NANODNA_SHARED") or ROOT.parent / "shared") / "data"
README = (SHARED / "README.md").read_text() if (SHARED / "README.md").exists() else ""
TABLES = re.findall(r"^\| (\S+) \| (\d+) rows, (\d+)(?:–(\d+) .*?)? bp, ((?:\d:\d+ ?)+)", README, re.M)
CSV, COORDINATES = (json.loads((ROOT / "tests" / "cases" / name).read_text())
                    for name in ("csv.json", "coordinates.json"))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def expand(spec):
    """Text of a case table: a string, or a list of strings and [string, times]."""
    return spec if isinstance(spec, str) else "".join(x if isinstance(x, str) else x[0] * x[1] for x in spec)


def refusal(function, *args):
    with pytest.raises(ValueError) as e:
        function(*args)
    assert "\n" not in str(e.value) and ";" in str(e.value) and len(str(e.value)) < 900, e.value
    return str(e.value)


def put(path, text):
    """Writes a text file, with its folders; .gz by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def put_fasta(path, contigs):
    return put(path, "".join(f">{name} x\n{text}\n" for name, text in contigs.items()))


def put_table(path, sequences, labels, column="sequence"):
    """.csv, or .tsv: as 6-mers with blanks between them, quoted, like some of the few-shot files."""
    mark = "\t" if ".tsv" in path.name else ","
    if mark == "\t":
        sequences = ['"' + " ".join(s[i:i + 6] for i in range(len(s) - 5)) + '"' for s in sequences]
    put(path, "\n".join(f"{s}{mark}{label}" for s, label in [(column, "label"), *zip(sequences, labels)]))


def texts(rows):
    return [data.decode(np.frombuffer(key, np.uint8)) for key in data.row_keys(rows, strands=False)]


def pairs(rows):
    return list(zip(texts(rows), rows.labels.tolist()))


def dna(n, length, seed):
    return [data.decode(row) for row in np.random.default_rng(seed).integers(4, size=(n, length))]


@pytest.mark.fault("CSV cases")
@pytest.mark.parametrize("case", CSV, ids=lambda case: case["name"])
def test_57_tables(case, tmp_path):
    path, classes = tmp_path / case.get("file", "t.csv"), case.get("classes", ["0", "1"])
    path.write_bytes(bytes.fromhex(case["hex"]) if "hex" in case else
                     expand(case["text"]).encode(case.get("encoding", "latin-1")))
    if "word" in case:                                       # with known classes, and with the file's own
        for how in [classes] * case.get("known", True) + [None] * case.get("own", True):
            assert re.match(f"{path}: .*({case['word']})", refusal(data.read_table, path, how))
        return
    read = data.read_table(path, classes * (not {"targets", "found"} & set(case)), case.get("targets"))
    rows, counts = data.rows_from(*read), case.get("notes", {})
    assert texts(rows) == [expand(sequence).upper() for sequence, _ in case["rows"]]
    assert rows.labels.dtype == (np.float64 if "targets" in case else np.int64)
    assert np.array_equal(rows.labels, np.array([label for _, label in case["rows"]], rows.labels.dtype))
    assert rows.notes.pop("classes", None) == (tuple(case["found"]) if "found" in case else None)
    assert {name: n for name, n in rows.notes.items() if n} == counts
    assert data.read_table(path, labels=False)[:2] == (read[0], None)


def test_numbers_are_finite_and_not_too_large():
    for text, words in (("1e42", "beyond 3e38; give the column in other units"), ("1e999", "beyond 3e38"),
                        ("inf", "not a finite decimal number")):
        assert words in refusal(data.numbers, {"x": [text]}, ["t.csv: line 2"])


def test_split_rows():
    sequences = [s[:n] for n, s in enumerate(dna(49, 50, 1), 1)] + dna(51, 20, 2)
    rows = data.rows_from(sequences, [0] * 60 + [1] * 30 + [2] * 10)
    parts, again, other = (data.split_rows(rows, (0.7, 0.2, 0.1), seed) for seed in (3, 3, 4))
    assert [np.bincount(part.labels).tolist() for part in parts] == [[42, 21, 7], [12, 6, 2], [6, 3, 1]]
    assert sorted(sum(map(pairs, parts), [])) == sorted(zip(sequences, rows.labels.tolist()))
    assert list(map(pairs, parts)) == list(map(pairs, again)) != list(map(pairs, other))
    assert "split (0.5, 0.5)" in refusal(data.split_rows, data.rows_from(["AC", "AA"], [0, 1]), (0.5, 0.5), 0)
    rows = data.rows_from(sequences * 2 + sequences[::3], [0] * 60 + [1] * 40 + [0] * 100 + [1] * 34)
    parts = data.split_rows(rows, (0.7, 0.2, 0.1), 3)        # equal sequences together, by their first label
    assert [len(set(texts(part))) for part in parts] == [70, 20, 10]
    assert [len(set(texts(part)) & set(sequences[:60])) for part in parts] == [42, 12, 6]
    assert sorted(sum(map(pairs, parts), [])) == sorted(pairs(rows))
    assert len(set(sum((list(set(texts(part))) for part in parts), []))) == 100
    parts = data.split_rows(data.rows_from(dna(10, 8, 0), [[i, -i / 2] for i in range(10)]), (0.8, 0.2), 0)
    assert [part.labels.shape for part in parts] == [(8, 2), (2, 2)] and parts[0].labels.dtype == np.float64


def test_a_class_that_is_too_rare_is_named():
    rows = data.rows_from(dna(30, 20, 0), [0, 1] * 14 + [1, 2])
    said = refusal(data.split_rows, rows, (0.8, 0.1, 0.1), 0, ("a", "b", "=x\x1b"))
    assert "class '=x\\x1b' has 1" in said and "30 different sequences" in said and "members" not in said
    assert "class 2 has 1" in refusal(data.split_rows, rows, (0.8, 0.1, 0.1), 0)


def test_task_table():
    sizes = {"emp": 10, "tf_m": 5, "tf_h": 5, "pd": 3, "cpd": 3, "ssp": 1, "covid": 1, "eap": 1, "gue28": 28,
             "randommask28": 28, "cmgems27": 27, "gb8": 8, "gb5": 5, "mtcdna": 3, "fewshot": 5}
    assert {group: len(set(names)) for group, names in data.GROUPS.items()} == sizes and len(data.TASKS) == 47
    assert set(data.GROUPS["gue28"]) ^ set(data.GROUPS["randommask28"]) == {"covid", "eap"}
    assert data.task_names(["pd", "emp/H3", "pd/tata"]) == ["pd/all", "pd/notata", "pd/tata", "emp/H3"]
    assert "gue28" in (said := refusal(data.task_names, ["28"])) and "emp/H3K14ac" in said
    assert "one set" in refusal(data.read_task, "emp", "data")
    emp = [sum(data.TASKS[name].rows.values()) for name in data.GROUPS["emp"]]
    assert emp == [14965, 33048, 34880, 31677, 30683, 36799, 28837, 27782, 14601, 34095]


def test_a_set_of_your_own_is_one_row(tmp_path, monkeypatch):
    monkeypatch.setitem(data.TASKS, "mine", data.task("own", "mine", "my/folder", 300, classes=("a", "b")))
    assert "my/folder: no train.csv" in refusal(data.read_task, "mine", tmp_path)
    for split in ("train", "dev", "test"):
        put_table(tmp_path / f"my/folder/{split}.csv", ["ACGT", "GGCC"], [0, 1])
    assert pairs(data.read_task("mine", tmp_path)["dev"]) == [("ACGT", 0), ("GGCC", 1)]
    assert data.task_names(["mine"]) == ["mine"]
    assert not any("mine" in names for names in data.GROUPS.values())


def make(task, folder, layout):
    """Small files of a task in its source's layout: {split: [(sequence, label)] in the order of reading}."""
    made, splits = {}, {"train": "Train", "test": "Test", "dev": "Val"}
    for split, name in list(splits.items())[:2 + (task.suite != "GenomicBenchmarks")]:
        labels = [i for i in range(len(task.classes)) for _ in range(3)]
        sequences = dna(len(labels), 20, len(name))
        if layout == "folders":
            for i, (text, label) in enumerate(zip(sequences, labels)):
                put(folder / split / task.classes[label] / f"{i}.txt", text)
        elif task.regression:
            labels = [[i / 4, -i / 2] for i in labels]
            put_fasta(folder / f"Sequences_{name}.fa", dict(enumerate(sequences)))
            put(folder / f"Sequences_activity_{name}.txt", "\t".join(task.classes) + "\n" + "".join(
                f"{dev}\t{hk}\n" for dev, hk in labels))
        else:
            put_table(folder / (split + ".csv" + ".gz" * (split == "test")), sequences, labels, layout)
        made[split] = list(zip(sequences, labels))
    return made


@pytest.mark.parametrize("name", [name for name in data.TASKS if data.TASKS[name].suite[0] in "GD"])
def test_made_files(name, tmp_path, monkeypatch):
    task, listdir = data.TASKS[name], os.listdir
    said = refusal(data.read_task, name, tmp_path)
    assert str(tmp_path / task.folder) in said and task.source in said and name in said
    for layout in ("folders", "seq") if task.suite == "GenomicBenchmarks" else ("sequence",):
        made = make(task, tmp_path / layout / task.folder, layout)
        for backwards in (False, True):                      # however the directory lists its files
            monkeypatch.setattr(os, "listdir", lambda path: sorted(listdir(path), reverse=backwards))
            splits = data.read_task(name, tmp_path / layout)
            assert {split: pairs(rows) for split, rows in splits.items() if rows} == made
    lost = next(path for path in (tmp_path / layout / task.folder).iterdir() if "est" in path.name)
    lost.rename(lost.with_name("away"))
    assert lost.name.removesuffix(".gz") in refusal(data.read_task, name, tmp_path / layout)


@pytest.mark.fault("coordinates")
@pytest.mark.parametrize("case", COORDINATES[1:], ids=lambda case: case["name"])
def test_coordinates(case, tmp_path):
    folder, fasta = tmp_path / "GenomicBenchmarks/coordinates/human_enhancers_cohn", tmp_path / "a.fa"
    genome, head, row = COORDINATES[0]["genome"], "id,region,start,end,strand\n", "0,chr1,0,4,+\n"
    for name in ("train/negative", "train/positive", "test/negative", case.get("add", "test/positive")):
        put(folder / f"{name}.csv.gz", head + row)
    rows = f"1,{case.get('interval', 'chr1,0,4,+')}\n" * case.get("repeat", 1)
    put(folder / "test/positive.csv.gz", case.get("head", head) + row + rows)
    put(fasta, case.get("fasta", genome))
    for path in map(folder.joinpath, case.get("damage", ())):
        path.write_bytes(path.read_bytes()[:-9])
    for path in map(folder.joinpath, case.get("remove", ())):
        os.remove(path)
    if "gzip" in case:
        fasta.write_bytes(gzip.compress(fasta.read_bytes()))
    args = "gb/human_enhancers_cohn", tmp_path, None, 0, [fasta] * case.get("fastas", 1)
    if "word" in case:
        assert re.search(case["word"], refusal(data.read_task, *args))
    else:
        assert "".join(texts(data.read_task(*args)["test"])[2:]) == case["want"]
        put(fasta, genome.replace("x\n", "x\nT"))
        os.utime(fasta, (1, 1))                              # another genome of this name, with an old date
        assert texts(data.read_task(*args)["test"])[0] == "TACG" and not list(tmp_path.glob("*.fai"))


def test_mtcdna(tmp_path, capsys):
    rng, want = np.random.default_rng(0), set()
    for species, label in data.MTCDNA.items():
        cdna = [dna(1, n, rng)[0] for n in (5000, 5001, *rng.integers(4000, 9500, 8))]
        put_fasta(tmp_path / f"MTcDNA/{species}.X1.cdna.all.fa.gz", dict(enumerate(cdna)))
        want |= {(text[:8192].ljust(8192, "N"), label) for text in cdna if len(text) > 5000}
    splits, short = (data.read_task(f"mtcdna/{n}", tmp_path) for n in (8192, 1024))
    assert sorted(sum(map(pairs, splits.values()), [])) == sorted(want)
    shares = [len(rows.labels) / len(want) for rows in splits.values()]
    assert shares == pytest.approx([0.6, 0.2, 0.2], abs=1.5 / len(want))
    assert f"{len(want)} of 40 transcripts" in capsys.readouterr().out
    assert all([text[:1024] for text in texts(splits[split])] == texts(short[split]) for split in splits)
    os.remove(tmp_path / "MTcDNA/Mus_spretus.X1.cdna.all.fa.gz")
    assert "0 files Mus_spretus" in refusal(data.read_task, "mtcdna/1024", tmp_path)


@pytest.mark.parametrize("name", data.GROUPS["fewshot"])
def test_few_shot_draws(name, tmp_path, capsys):
    task, (train, n_sets, *tests) = data.TASKS[name], data.FEW_SHOT[name]
    n, folder = len(task.classes), tmp_path / task.folder
    pool = dna(20 * n_sets * n, 30, 7)
    for shots in (20, 10):                                   # the second file has twice its rows
        put_table(folder / train.format(shots), pool, [i % n for i in range(len(pool))])
        put_table(folder / tests[-1].format(shots), pool[:9], [0, 1, 0] * 3)
    draws = [pairs(data.read_task(name, tmp_path, 20, draw)["train"]) for draw in range(10)]
    assert sorted(sum(draws[:n_sets], [])) == sorted((text, i % n) for i, text in enumerate(pool))
    assert all(sum(y == label for _, y in draw) == 20 for draw in draws for label in range(n))
    assert ("stands in" in capsys.readouterr().out) == (len(tests) > 1)
    for args, word in (((20, 10), "draw 10"), ((10,), "rows by class"), ((50,), train.format(50))):
        assert word in refusal(data.read_task, name, tmp_path, *args)


def test_demo(tmp_path):
    splits, again = (data.read_task("demo", tmp_path / folder) for folder in "ab")
    for split, rows in splits.items():
        assert [data.DEMO_MOTIF in text for text in texts(rows)] == rows.labels.astype(bool).tolist()
        assert rows.labels.mean() == 0.5 and len(rows.labels) == data.TASKS["demo"].rows[split]
        assert pairs(rows) == pairs(again[split])
    assert len(set(sum(map(texts, splits.values()), []))) == 5000
    genome = data.open_genome(["demo"], tmp_path / "a")
    for split, contigs in (("train", "12"), ("dev", "3"), ("test", "4")):
        dna, rows = " ".join(genome.fetch(f"demo{c}", 0, 250_000) for c in contigs), splits[split]
        assert all(text in dna for text, label in zip(texts(rows)[:200], rows.labels) if not label)


@pytest.mark.parametrize("name, n, shortest, longest, balance", TABLES, ids=[row[0] for row in TABLES])
def test_real_table(name, n, shortest, longest, balance):
    path, = (path for path in SHARED.glob(f"*/{name}"))
    counts = dict(map(int, pair.split(":")) for pair in balance.split())
    rows = data.rows_from(*data.read_table(path, [str(i) for i in range(max(counts) + 1)]))
    lengths = np.diff(rows.offsets)
    assert np.bincount(rows.labels).tolist() == [counts.get(i, 0) for i in range(max(counts) + 1)]
    assert (len(lengths), lengths.min(), lengths.max()) == (int(n), int(shortest), int(longest or shortest))
    for task in data.TASKS.values():
        if task.suite == "GUE" and path.parent == SHARED / task.folder:
            assert task.rows[path.name.split(".")[0]] == int(n)


DERIVED = [path.name for path in SHARED.glob("GenomicBenchmarks_derived/*") if "coding" not in path.name]


@pytest.mark.parametrize("name", DERIVED)
def test_coordinates_give_derived_tables(name, tmp_path):
    """The real coordinates inside the regions we have, cut out of them, are the rows that others cut out."""
    genomes = {path.name[:2]: {contig: data.decode(codes) for contig, codes, _ in data.fasta_records(path)}
               for path in SHARED.glob("genomes/*.fa.gz") if path.name[:2] in ("hu", "ce", "dm")}
    human = {"1": "N" * 35287631 + genomes["hu"]["hg38_chr1:35287632-37056684"]}
    fastas = {"demo_human_or_worm": [human, {"I": genomes["ce"]["CHROMOSOME_I"]}],
              "drosophila_enhancers_stark": [genomes["dm"]]}.get(name, [human])
    want = {}
    for split in ("train", "test"):
        with open(SHARED / f"GenomicBenchmarks_derived/{name}/{split}.csv") as f:
            rows = list(csv.DictReader(f))
        want[split] = [(row["seq"].upper(), int(row["label"])) for row in rows]
        for label, of in enumerate(data.TASKS[f"gb/{name}"].classes):
            known = {(row["region"], row["start"], row["end"]) for row in rows if row["label"] == str(label)}
            with gzip.open(SHARED / f"GenomicBenchmarks/coordinates/{name}/{split}/{of}.csv.gz", "rt") as f:
                head, *lines = [x for x in f if x[:2] == "id" or tuple(x.split(",")[1:4]) in known]
            lines = lines or ["none,chr1,36000000,36000009,+"]  # nontata: no negative is in our region
            put(tmp_path / f"GenomicBenchmarks/{name}/{split}/{of}.csv.gz", head + "".join(lines))
    paths = [put_fasta(tmp_path / f"{i}.fa", contigs) for i, contigs in enumerate(fastas)]
    splits = data.read_task(f"gb/{name}", tmp_path, fasta=paths)
    assert {split: [pair for pair in pairs(splits[split]) if len(pair[0]) != 9] for split in want} == want


def report(capsys, monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, args)])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(str(ROOT / "tools/report.py"), run_name="__main__")
    return e.value.code, *capsys.readouterr()


def test_report_on_made_data(tmp_path, capsys, monkeypatch):
    (a, b, c, d), folder = dna(4, 101, 0), tmp_path / "GUE/tf/4"
    put_table(folder / "train.csv", [a, a, b, b.lower(), c], [0, 0, 0, 1, 1])
    put_table(folder / "dev.csv", [a, d[:-1] + "N"], [0, 1])
    put_table(folder / "test.csv", [d, d, c], [0, 0, 1])
    code, out, err = report(capsys, monkeypatch, "tf_h/4", "tf_h/1", "--data_dir", tmp_path)
    assert (code, err) == (2, "") and "tf/1: no train.csv, dev.csv, test.csv" in out
    for said in ("train: 5 (published 19,000: differs) rows; bases min 101, median 101, max 101; 0:3, 1:2; ",
                 "duplicates 2, conflicting_labels 1, lower_case 1", "1:1; with_n 1", "1:1; duplicates 1",
                 "train and dev: 1 sequences in both, 40.0% and 50.0% of", "dev and test: 0 sequences",
                 "within train: 0 of 3 different sequences (0.0%) in 0 groups, the largest of 1"):
        assert said in out
    for args in (["tf_h/9"], ["tf_h/4", "--data", "x"], []):
        code, out, err = report(capsys, monkeypatch, *args)
        assert code == 2 and "error: " in err.splitlines()[-1]


@pytest.mark.skipif(not README, reason="no shared data")
def test_report_on_real_data(capsys, monkeypatch):
    names = "tf_h/4", "gb/human_enhancers_ensembl", "splice_40", "cohn_enh", "eap"
    out = report(capsys, monkeypatch, *names, "--data_dir", SHARED)[1]
    for said in ("train: 19,000 (published 19,000: OK)", "0:9,505, 1:9,495; duplicates 3,789",
                 "train and dev: 346 sequences", "test table: 30,970 (published 30,970: OK) intervals",
                 "11,694 (37.8%) are training intervals", "dev and test: 2,699 sequences in both, 100.0% and",
                 "train/500: 15,000 rows", "duplicates 28", "cohn_enh: test.tsv is not there",
                 "Dev_log2_enrichment -3.73 to 7.64, Hk_log2_enrichment -4.12 to 6.91"):
        assert said in out


def test_classes_of_the_published_sets():
    """MTcDNA's species by hand; GenomicBenchmarks' package sorts the class folders before it numbers them."""
    species = dict(mouse="Mus_musculus Mus_spretus", turtle="Chelonoidis_abingdonii Gopherus_agassizii")
    want = {name: ("mouse", "turtle").index(of) for of, names in species.items() for name in names.split()}
    assert data.MTCDNA == want and data.TASKS["mtcdna/4096"].classes == ("mouse", "turtle")
    sets = [task for task in data.TASKS.values() if task.suite == "GenomicBenchmarks"]
    assert all(list(task.classes) == sorted(task.classes) for task in sets) and len(sets) == 9
    assert data.HG38_CONTIGS == ("chr1 chr2 chr3 chr4 chr5 chr6 chr7 chr8 chr9 chr10 chr11 chr12 chr13 chr14 "
                                 "chr15 chr16 chr17 chr18 chr19 chr20 chr21 chr22 chrX chrY").split()


@pytest.mark.skipif(not SHARED.exists(), reason="no shared data")
@pytest.mark.parametrize("name, file, gt, ag", [
    ("splice_40", "fewshot/Splice-40/test.tsv.gz", 20, 17),
    ("ssp/reconstructed", "GUE/splice/reconstructed/test.csv.gz", 200, 198)])
def test_splice_sites_have_their_names(name, file, gt, ag):
    """An intron begins with GT, at a donor, and ends with AG, at an acceptor."""
    rows = data.rows_from(*data.read_table(SHARED / file, ["0", "1", "2"]))
    found = np.array([data.decode(x) for x in np.split(rows.bases, rows.offsets[1:-1])])
    for site, at, of in (("GT", gt, "donor"), ("AG", ag, "acceptor")):
        shares = [np.mean([text[at:at + 2] == site for text in found[rows.labels == i]]) for i in range(3)]
        assert data.TASKS[name].classes[np.argmax(shares)] == of and max(shares) > 0.3
