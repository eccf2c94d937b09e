"""tools/variants against plain loops over positions; its inputs, its records in order, both strands."""
import argparse
import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import random_dna, write_fasta
from scipy import spatial, special

import finetune
import models
from tools import variants

RNG = np.random.default_rng(0)
CONTIGS = {"chr1": random_dna(25, RNG) + "N" + random_dna(24, RNG), "chrS": random_dna(14, RNG), "chrT": "AC"}
HEAD = "##fileformat=VCFv4.2\n##contig=<ID=chr1>\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
MIXER, ENCODER = models.ChordMixerConfig(24, 2, 4, 8), models.EncoderConfig(24, 1, 2, 8)


def save(name, method, net, **args):
    torch.manual_seed(5)
    for p in net.parameters():                               # no two outputs are alike
        torch.nn.init.normal_(p, std=0.3)
    torch.save({"format": 1, "method": method, "step": 7, "optimizer": {}, "config": vars(net.config),
                "data": "d", "model": net.state_dict(), "args": args}, name)
    return net.eval()


def small_bert():
    return models.Bert(models.BertConfig(69, 20, 1, 2, 8, 16, 0.0))


def classifier(regression=False):
    config = vars(models.BertConfig(69, 20, 1, 2, 8, 16, 0.0))
    spec = {"kind": "bert", "bert": config, "k": 3, "stride": 1, "n_out": 3, "regression": regression}
    net = finetune.build_net(spec, seed=3)
    for p in net.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p)
    spec |= {"classes": ["a", "b", "=c"]}
    torch.save({"format": 1, "method": "finetune", "step": 7, "optimizer": {}, "config": spec, "data": "d",
                "model": net.state_dict(), "args": {}}, "tuned.pt")
    return finetune.load_model("tuned.pt")


def score(records, init, out="s.tsv", contigs=CONTIGS, **flags):
    """The rows of the TSV for these (chrom, pos, ref, alt)."""
    write_fasta(Path("g.fa"), contigs)
    Path("a.vcf").write_text(HEAD + "".join(f"{c}\t{p}\t.\t{r}\t{a}\t.\t.\t.\n" for c, p, r, a in records))
    Path(out).unlink(missing_ok=True)
    args = dict(file="a.vcf", fasta=["g.fa"], cache=None, init=init, embedding=False, window=None, step=None,
                strands="forward", skip_mismatch=False, excel_safe=False, stride=None, eval_network=None,
                micro_batch_size=7, device="cpu", dtype="float32", out=out, long=None) | flags
    variants.main(argparse.Namespace(**args))
    return [line.split("\t") for line in Path(out).read_text().splitlines()[1:]] if out == "s.tsv" else None


def all_kinds(contigs):
    """(contig, 0-based start, REF, ALT): an SNV of each base, three of some; longer ones; at both ends."""
    found = [(name, i, ref, alt) for name, text in contigs.items() for i, ref in enumerate(text)
             for alt in "CGTA"["ACGT".find(ref)] + "ACGT" * (i in (0, 9)) if ref not in ("N", alt)]
    text = contigs["chr1"]
    for i in (0, 1, 12, 21, 27, 45):
        a, b, c, d = text[i:i + 4]
        found += [("chr1", i, a + b, f"{'GA'[a == 'G']}{'TC'[b == 'T']}"), ("chr1", i, a + b + c + d, a),
                  ("chr1", i, a, a + "GTT"), ("chr1", i, a + b + c, "GATTT")]
    return [x for x in found if "N" not in x[2]]


def record(name, start, ref, alt):
    return name, start + 1, ref, alt


def shared(ref, alt):
    """How many bases REF and ALT both end with, then how many both begin with."""
    end = max(n for n in range(min(len(ref), len(alt)) + 1) if ref[len(ref) - n:] == alt[len(alt) - n:])
    ref, alt = ref[:len(ref) - end], alt[:len(alt) - end]
    return end, max(n for n in range(min(len(ref), len(alt)) + 1) if ref[:n] == alt[:n])


def windows(text, start, ref, alt, size, more):
    """Of ALT and REF: window, first base to mask and the one after; more: of an indel, on either side."""
    end, begin = shared(ref, alt)
    more *= len(ref) != len(alt)
    for allele in (alt, ref):
        at, stop = start + begin, start + len(ref) - end
        allele = allele[begin:len(allele) - end]
        whole = text[:at] + allele + text[stop:]
        first = max(min(at - (size - (stop - at)) // 2, len(whole) - size), 0)
        yield whole[first:first + size], at - first - more, at - first + len(allele) + more


def kmers_loop(net, k, stride):
    """Mean log P of the masked k-mers, one position at a time."""
    words = {word: i for i, word in enumerate(models.vocabulary(k))}

    def mean_log_p(window, first, last):
        ids = [words.get(window[i:i + k], 1) for i in range(0, len(window) - k + 1, stride)]
        at = [i for i, word in enumerate(ids) if i * stride < last and i * stride + k > first and word > 4]
        inputs = torch.tensor([[2, *(4 if i in at else word for i, word in enumerate(ids)), 3]])
        with torch.no_grad():
            logits = net(inputs)[0]
        return np.mean([special.log_softmax(logits[i + 1].numpy())[ids[i]] for i in at]) if at else np.nan
    return mean_log_p


def bases_loop(net, n_cls):
    """Mean log P of the masked bases; the input is one-hot A, C, G, T, N, and n_cls rows of zeros."""
    def mean_log_p(window, first, last):
        at = [i for i in range(max(first, 0), min(last, len(window))) if window[i] != "N"]
        x = torch.zeros(1, len(window) + n_cls, 5)
        for i, letter in enumerate(window):
            x[0, i, "ACGTN".index(letter)] = float(i not in at)
        with torch.no_grad():
            logits = net(x)[1][0]
        return np.mean([special.log_softmax(logits[i].numpy())["ACGTN".index(window[i])] for i in at])
    return mean_log_p


@pytest.mark.parametrize("kind", ["stride 1", "stride 3", "stride 2", "chordmixer", "encoder"])
def test_masked_scores_are_those_of_a_plain_loop(out, kind):
    """Overlapping, non-overlapping and half-overlapping 3-mers; masked bases of FinDNA."""
    if kind.startswith("stride"):
        stride = int(kind[-1])
        net, size = models.Bert(models.BertConfig(69, 10, 2, 2, 8, 16, 0.0)), 7 * stride + 3
        loop = kmers_loop(save("x.pt", "randommask", net, stride=stride), 3, stride)
    else:
        backbone = models.ChordMixer(MIXER) if kind == "chordmixer" else models.Encoder(ENCODER)
        net, size = models.BaseModel(backbone), 19
        loop = bases_loop(save("x.pt", "findna", net, length=size), 24 - size)
    found = all_kinds(CONTIGS)
    rows = score([record(*x) for x in found], "x.pt")
    for (name, start, ref, alt), row in zip(found, rows, strict=True):
        after, before = (loop(*x) for x in windows(CONTIGS[name], start, ref, alt, size, 1))
        assert float(row[5] or "nan") == pytest.approx(after - before, 1e-5, 2e-5, nan_ok=True), row
        assert row[6] == ("no base read" if np.isnan(after - before) else "")
    assert sum(row[6] == "" for row in rows) > 80


def test_scores_do_not_depend_on_the_batch_or_the_order(out):
    save("x.pt", "randommask", small_bert(), stride=1)
    records = [record(*x) for x in all_kinds(CONTIGS)]
    rows = score(records, "x.pt")
    for size, order in ((1, 1), (500, -1)):
        again = score(records[::order], "x.pt", micro_batch_size=size)[::order]
        assert [row[:5] for row in again] == [row[:5] for row in rows]
        values = [[float(row[5] or 99) for row in x] for x in (again, rows)]
        assert values[0] == pytest.approx(values[1], 1e-5, 1e-5)


def test_alternatives_of_a_place_share_a_forward_pass(out, monkeypatch):
    sizes, real = [], models.Bert.encode
    monkeypatch.setattr(models.Bert, "encode", lambda net, x, *a: sizes.append(len(x)) or real(net, x, *a))
    save("x.pt", "randommask", small_bert(), stride=1)
    text = CONTIGS["chr1"][:20]
    score([record("chr1", i, ref, ",".join({*"ACGT"} - {ref})) for i, ref in enumerate(text)], "x.pt")
    assert sizes == [7, 7, 6]


@pytest.mark.parametrize("regression, size", [(False, 15), (True, 15), (False, 33)])
def test_a_classifier_is_scored_by_its_outputs(out, regression, size):
    """Also in windows that are longer than its 20 bases, which it reads in parts."""
    model, found = classifier(regression), all_kinds(CONTIGS)
    rows = score([record(*x) for x in found], "tuned.pt", window=size)
    for (name, start, ref, alt), row in zip(found, rows, strict=True):
        after, before = (model.predict([x[0]])[0] for x in windows(CONTIGS[name], start, ref, alt, size, 0))
        want = after - before if regression else np.log(after) - np.log(before)
        assert [float(x or "nan") for x in row[5:8]] == pytest.approx(want, 1e-4, 1e-4, nan_ok=True)
        assert row[8] == ("no base read" if name == "chrT" else "")


def test_embeddings_are_compared_by_angle_and_distance(out):
    model, found = classifier(), all_kinds(CONTIGS)[::2]
    rows = score([record(*x) for x in found], "tuned.pt", embedding=True)
    for (name, start, ref, alt), row in zip(found, rows, strict=True):
        if name == "chrT":
            assert row[5:] == ["", "", "no base read"]
            continue
        a, b = (model.embed([x[0]])[0].astype(float) for x in windows(CONTIGS[name], start, ref, alt, 20, 0))
        want = spatial.distance.cosine(a, b), spatial.distance.euclidean(a, b)
        assert [float(x) for x in row[5:7]] == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("kind", ["kmers", "classifier", "findna"])
def test_the_mean_of_both_strands_is_the_same_on_the_other_strand(out, kind):
    if kind == "classifier":
        classifier()
    elif kind == "kmers":
        save("x.pt", "randommask", small_bert(), stride=3)
    else:
        save("x.pt", "findna", models.BaseModel(models.ChordMixer(MIXER)), length=18)
    init, turn = "tuned.pt" if kind == "classifier" else "x.pt", str.maketrans("ACGT", "TGCA")
    found, other = all_kinds(CONTIGS), {name: text.translate(turn)[::-1] for name, text in CONTIGS.items()}
    there = [(name, len(CONTIGS[name]) - start - len(ref), *(x.translate(turn)[::-1] for x in (ref, alt)))
             for name, start, ref, alt in found]
    rows = [score([record(*x) for x in x], init, contigs=y, strands="average")
            for x, y in ((found, CONTIGS), (there, other))]
    for (*_, ref, alt), *both in zip(found, *rows, strict=True):
        # an indel within a repeat may be trimmed at its other end: then it is another place in the window
        same = shared(ref, alt)[::-1] == shared(ref[::-1], alt[::-1])
        assert not same or [float(x or 99) for x in both[0][5:-1]] == pytest.approx(
            [float(x or 99) for x in both[1][5:-1]], 2e-5, 2e-5)
    forward = score([record(*x) for x in found], init)
    assert max(abs(float(a[5]) - float(b[5])) for a, b in zip(forward, rows[0]) if a[5] and b[5]) > 0.01


MIXED = [("1", 3, "G", "<DEL>,*,A,N"), ("chr1", 4, "a", "c,A"), ("1", 26, "N", "A"), ("chr1", 5, "T", "."),
         ("chr1", 6, "C", "C]chr1:9],]chr1:9]C,.C,C."), ("chr1", 7, "A", "A" + "C" * 30), ("MT", 1, "A", "C"),
         ("chr1", 9, "T", "G"), ("chr1", 999, "A", "C"), ("chr1", 0, "A", "C")]
REASONS = ["symbolic ALT", "ALT is *", "", "ambiguous base", "", "ALT equals REF", "ambiguous base", "no ALT",
           *["breakend"] * 4, "longer than 10 bases", "contig not in FASTA", "REF differs from FASTA",
           *["position outside contig"] * 2]


def mixed_contigs():
    """With two contigs that MT could be: it is neither."""
    return CONTIGS | {"chr1": "CAGATCAGG" + CONTIGS["chr1"][9:], "M": "ACGT", "chrM": "ACGT"}


def test_every_alternative_has_a_row_in_the_order_of_the_file(out, capsys):
    save("x.pt", "randommask", small_bert(), stride=1)
    rows = score(MIXED, "x.pt", contigs=mixed_contigs(), skip_mismatch=True)
    want = [(c, str(p), ".", r, alt) for c, p, r, alts in MIXED for alt in alts.split(",")]
    assert [tuple(row[:5]) for row in rows] == want and [row[6] for row in rows] == REASONS
    assert all((row[5] == "") == (row[6] != "") for row in rows)
    said = capsys.readouterr().out
    assert "another name in the FASTA: 1 is chr1\n" in said
    assert all(x in said for x in ("records 10", "scored 2", "breakend 4", "position outside contig 2"))


def test_labels_have_a_sigmoid_each():
    """A label that does not change has no effect, whatever the others do."""
    spec = {"kind": "bert", "classes": ["a", "b"], "regression": False, "multilabel": True}
    model = argparse.Namespace(net=argparse.Namespace(spec=spec), classes=lambda: spec["classes"],
                               apply=lambda rows: np.array(rows, float))
    columns, outputs, combine = variants.choose_score(model, embedding=False)
    assert [*columns] == ["d_a", "d_b"]
    alt, ref = outputs([[0, 3]]), outputs([[0, -3]])
    np.testing.assert_allclose(combine(alt, ref), [[0, np.log((1 + np.exp(3)) / (1 + np.exp(-3)))]])


@pytest.mark.parametrize("name", ["s.vcf", "s.vcf.gz"])
def test_a_vcf_keeps_all_but_our_fields(out, name):
    classifier()
    write_fasta(Path("g.fa"), mixed_contigs())
    score(MIXED, "tuned.pt", name, mixed_contigs(), skip_mismatch=True)
    raw = Path(name).read_bytes()
    lines = (gzip.decompress(raw) if name.endswith("gz") else raw).decode().splitlines()
    if name.endswith("gz"):                                  # BGZF: blocks that tell their size, an empty one
        ends = [0]
        while ends[-1] < len(raw):
            assert raw[ends[-1] + 12:ends[-1] + 16] == b"BC\2\0"
            ends.append(ends[-1] + int.from_bytes(raw[ends[-1] + 16:ends[-1] + 18], "little") + 1)
        assert ends[-1] == len(raw) and raw[ends[-2]:].hex() == (
            "1f8b08040000000000ff0600424302001b0003000000000000000000")         # of the SAM specification
    assert [x for x in lines if "nanoDNA" not in x[:20]][:3] == HEAD.splitlines()
    assert [x[:26] for x in lines if x.startswith("##INFO")] == [
        *(f"##INFO=<ID=nanoDNA_{i},Numbe" for i in range(3)), "##INFO=<ID=nanoDNA_not,Num"]
    rows = [line.split("\t") for line in lines if line[0] != "#"]
    assert [(c, int(p), r, a) for c, p, _, r, a, *_ in rows] == MIXED
    fields = [dict(x.split("=") for x in row[7].split(";")) for row in rows]
    for (*_, alts), found in zip(MIXED, fields):
        for i in range(3):
            assert alts == "." or len(found[f"nanoDNA_{i}"].split(",")) == alts.count(",") + 1
    reasons = [x for found, (*_, alts) in zip(fields, MIXED)
               for x in found.get("nanoDNA_not", ".," * alts.count(",") + ".").split(",")]
    assert reasons == [reason.replace(" ", "_") or "." for reason in REASONS]
    values = [row[5:8] for row in score(MIXED, "tuned.pt", contigs=mixed_contigs(), skip_mismatch=True)]
    columns = [[found[f"nanoDNA_{i}"].split(",") if alts != "." else ["."] for i in range(3)]
               for found, (*_, alts) in zip(fields, MIXED)]
    assert [[x or "." for x in row] for row in values] == [
        [*row] for x in columns for row in zip(*x)]
    with pytest.raises(ValueError, match="already; remove it there"):
        variants.vcf_header(lines[:7], {"score": ""}, "x")


def test_cells_of_a_vcf_cannot_become_other_cells(out):
    columns, line = {"d_x": 'of a"b\\; >'}, "1\t5\t=x\tA\tC\t.\t.\tAC=1\tGT\t0/1"
    head, fields = variants.vcf_header(HEAD.splitlines(), columns, "a/x\n\".pt")
    assert fields == ["nanoDNA_0"] and head[-3].endswith('Description="of a\\"b\\\\; >; model x\\".pt">')
    assert variants.vcf_text(line, [(["0.5"], "")], fields).split("\t")[7] == "AC=1;nanoDNA_0=0.5"
    assert variants.tsv_text(line, [(["0.5"], "")], variants.excel_safe) == "1\t5\t'=x\tA\tC\t0.5\t\n"


GOOD = "chr1\t3\t.\tG\tA\t.\t.\t.\n"


@pytest.mark.parametrize("text, message", [
    ("", "line 1: the header must end"), ("##fileformat=VCFv4.2\n", "line 1: the header must end"),
    (">chr1\nACGT\n", "line 1: '>chr1' is not ##fileformat=VCFv4.x; use a VCF"),
    ("##fileformat=VCFv4.2\n" + GOOD, "line 2: the header must end"),
    (HEAD.replace("QUAL", "QAUL") + GOOD, "line 3: the header must end"),
    (HEAD + GOOD.replace("\t", " "), "line 4: not the 8 columns"),
    (HEAD + GOOD + "chr1\t3\n", "line 5: not the 8 columns"),
    (HEAD + GOOD.replace("3", "3x"), "line 4: POS '3x' and REF 'G'"),
    (HEAD + GOOD.replace("G", "G!"), "line 4: POS '3' and REF 'G!'"),
    (HEAD + GOOD.replace("A", "A,,C"), "line 4: ALT '' is not an allele"),
    (HEAD + GOOD.replace("A", "A?"), "line 4: ALT 'A\\?' is not an allele"),
    (HEAD + GOOD.replace(".", "a\u202eb", 1), "line 4: not the 8 columns of the header, or a control char"),
    (HEAD + GOOD.replace(".", "\udcff", 1), "line 4: not the 8 columns of the header, or a control char"),
    (HEAD + GOOD.replace("G", "T"), "line 4: chr1:3 'T': REF differs from FASTA, which has 'G'; us"),
    (HEAD + GOOD.replace("3", "99"), "line 4: chr1:99 'G': position outside contig, which has 50 bas"),
    (HEAD + GOOD.replace("chr1", "chrX"), "line 4: chrX:3 'G': contig not in FASTA, which has chr1, c")])
def test_a_bad_vcf_is_refused_in_one_line(out, text, message):
    save("x.pt", "randommask", small_bert(), stride=1)
    Path("b.vcf").write_text(text, "utf-8", "surrogateescape")
    with pytest.raises(ValueError, match=f"^b.vcf: {message}") as e:
        score([], "x.pt", contigs=mixed_contigs(), file="b.vcf")
    assert "\n" not in str(e.value) and not Path("s.tsv").exists()


def test_what_a_model_cannot_score_is_refused(out):
    net = save("x.pt", "randommask", small_bert(), stride=1)
    for flags, message in (({"window": 2}, "--window 2: the model reads 3 to 20 bases"),
                           ({"window": 21}, "--window 21: the"), ({"out": "x.csv"}, "--out x.csv: name")):
        with pytest.raises(ValueError, match=message):
            score([], "x.pt", **flags)
    net.ln_head.weight.data.zero_()                          # as load_model leaves what a folder lacks
    for kind in ("hf", "bert"):
        model = argparse.Namespace(init="x", net=argparse.Namespace(spec={"kind": kind}, bert=net))
        with pytest.raises(ValueError, match="has no masked-LM head that is read"):
            variants.choose_score(model, embedding=False)


def test_a_plain_vcf_and_its_gzip_give_the_same(out):
    """The second one is as an editor on Windows saves it: line ends, and a byte-order mark."""
    save("x.pt", "randommask", small_bert(), stride=1)
    rows = score(MIXED[:2], "x.pt", contigs=mixed_contigs())
    text = "\ufeff" + Path("a.vcf").read_text().replace("\n", "\r\n") + "\r\n"
    Path("c.vcf.gz").write_bytes(b"".join([*variants.bgzip(text.encode()), *variants.bgzip(b"")]))
    assert rows == score(MIXED[:2], "x.pt", contigs=mixed_contigs(), file="c.vcf.gz")


def test_a_folder_of_transformers_gives_the_same(out):
    pytest.importorskip("safetensors")
    models.save_hf(save("x.pt", "randommask", small_bert(), stride=1), "folder")
    rows = [score(MIXED[:2], init, contigs=mixed_contigs()) for init in ("hf:folder", "x.pt")]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("spec, more", [({"kind": "cnn"}, {"length": 12, "BODY": None}), (
    {"kind": "bert", "bert": {"block_size": 12}, "k": 4, "stride": 1, "long": "truncate"}, {"BODY": "bert"})])
def test_what_is_cut_is_no_window(spec, more):
    with pytest.raises(ValueError, match="--window 14: the model reads [14] to 1[23] bases"):
        variants.window_size(argparse.Namespace(spec=spec, **more), 14, in_parts=True)


@pytest.mark.parametrize("spec, more, wanted, size", [
    ({"kind": "cnn"}, {"length": 12}, None, 12),
    ({"kind": "hf", "stride": None}, {"bases_in_room": 99.9}, None, 99),
    ({"kind": "mixer", "mixer": {"length": 30}, "n_cls": 10}, {"room": None}, 50, 50),       # any length
    ({"kind": "bert", "bert": {"block_size": 12}, "k": 4, "stride": 4}, {}, None, 40),
    ({"kind": "bert", "bert": {"block_size": 12}, "k": 4, "stride": 4}, {}, 31, 28)])
def test_a_window_is_what_the_model_reads(spec, more, wanted, size):
    assert variants.window_size(argparse.Namespace(spec=spec, **more), wanted, in_parts=False) == size
