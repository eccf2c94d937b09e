"""Pairs of sequences (a column sequence_2): tokens, strands, counts and logits against literal programs."""
import numpy as np
import pytest
import torch
from harness import random_dna
from test_finetune_rules import SPEC, texts_of
from test_strands import flipped
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import data
import finetune
import models

A, B = texts_of(7, 1, 8, 18), texts_of(7, 2, 8, 18)          # of 6 to 15 3-mers: at most 30, and 31 fit
PAIRS = list(zip(A, B))


def on_cpu(pairs):
    return data.on_device(data.rows_from(pairs), "cpu")


def head(**spec):
    net = finetune.build_net(SPEC | spec).eval()
    for p in net.parameters():
        p.data.mul_(4)
    return net


def literal(a, b, k, stride, room=99):
    """Ids of [CLS] a [SEP] b [SEP], n k-mers of each; while these are too many, the longer loses one."""
    a, b = ([text[i:i + k] for i in range(0, len(text) - k + 1, stride)] for text in (a, b))
    while len(a) + len(b) > room:
        (a if len(a) > len(b) else b).pop()
    ids = {word: i for i, word in enumerate(models.vocabulary(k))}
    words = ["[CLS]", *a, "[SEP]", *b, "[SEP]"]
    return [ids.get(word, data.UNK) for word in words], (len(a), len(b))


@pytest.mark.parametrize("stride, long", [(1, "chunk"), (2, "chunk"), (3, "chunk"), (1, "truncate"),
                                          (3, "truncate")])
def test_tokens_of_pairs(stride, long):
    pairs = [*PAIRS, ("AC", "ACGTN"), ("ACGNNACGA", "GG")]
    if long == "truncate":
        pairs += list(zip(texts_of(9, 3, 2, 150), texts_of(9, 4, 2, 150)))
    rows, net = on_cpu(pairs), head(stride=stride, long=long)
    index = np.random.default_rng(0).permutation(len(pairs))
    tokens, mask, n_windows = net.inputs(rows, index)
    assert n_windows is None
    for i, *row in zip(index, tokens.tolist(), mask.tolist()):
        words, _ = literal(*pairs[i], 3, stride, 31)
        n, n_pad = len(words), tokens.shape[1] - len(words)
        assert row[0] == words + [data.PAD] * n_pad
        assert row[1] == [True] * n + [False] * n_pad
    lost = sum(literal(*pair, 3, stride) != literal(*pair, 3, stride, 31) for pair in pairs)
    short = sum(min(map(len, pair)) < 3 for pair in pairs)
    assert finetune.count_unfit(net, rows) == {"truncated": lost, "shorter_than_k": short}
    assert (lost > 3) == (long == "truncate")


@pytest.mark.parametrize("stride", [1, 3])
def test_bases_that_are_read(stride):
    """Those under a k-mer without N, of both sequences, of which the longer is cut."""
    pairs = [("AC", "ACGTN"), ("AC", "GT"), *zip(texts_of(9, 3, 2, 90), texts_of(9, 4, 2, 90))]
    rows, net = data.rows_from(pairs), head(stride=stride, long="truncate")
    want = []
    for pair in pairs:
        n = 0
        for text, n_kmers in zip(pair, literal(*pair, 3, stride, 31)[1]):
            starts = range(0, n_kmers * stride, stride)
            n += len({j for i in starts if "N" not in text[i:i + 3] for j in range(i, i + 3)})
        want.append(n)
    assert finetune.n_bases(net, rows).tolist() == want and want[1] == 0


def test_logits_are_those_of_transformers(tmp_path):
    """Also through the exported tokenizer, whose template for pairs has only type 0."""
    net = head(classes=("no", "yes"), regression=False, pairs=True)
    net.bert.type_emb.weight.data[1] += 1                    # a type 1 would show
    models.save_hf(net, str(tmp_path / "x"), net.spec["classes"])
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "x").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "x")
    types = Tokenizer.from_file(str(tmp_path / "x/tokenizer.json")).encode(A[0], B[0]).type_ids
    assert set(types) == {0} and len(types) > 10             # transformers may leave them out
    with torch.no_grad():
        want = theirs(**tokenizer(A, B, return_tensors="pt", padding=True)).logits.numpy()
    model = finetune.Model("x", net, "cpu")
    assert np.ptp(want[:, 1]) > 0.01 and model.apply(PAIRS) == pytest.approx(want, abs=1e-4)
    again = finetune.load_model(f"hf:{tmp_path / 'x'}")      # the folder says that it wants pairs
    assert again.apply(PAIRS) == pytest.approx(want, abs=1e-4)
    with pytest.raises(ValueError, match="fine-tuned on pairs of sequences"):
        again.predict(A)


def test_both_strands_of_pairs():
    both = data.both_strands(data.rows_from(PAIRS, list(range(7))))
    others = list(zip(flipped(A), flipped(B)))
    want = data.rows_from(PAIRS + others[::-1])
    assert both.bases.tolist() == want.bases.tolist() and both.offsets.tolist() == want.offsets.tolist()
    assert both.first.tolist() == want.first.tolist()
    assert both.labels.tolist() == [*range(7), *range(6, -1, -1)]
    net, rows = head(strands="average"), on_cpu(PAIRS)
    got, net.spec["strands"] = finetune.apply(net, rows, 4), "forward"
    one, other = finetune.apply(net, rows, 4), finetune.apply(net, on_cpu(others), 4)
    assert got == pytest.approx((one + other) / 2, abs=1e-5) and abs(one - other).max() > 1e-3


def test_splits_keep_both_strands_of_a_pair_together():
    others = list(zip(flipped(A), flipped(B)))
    mixed = [("ACGT" + A[0], B[0]), (B[0], A[0]), (A[0] + B[0][0], B[0][1:])]            # other pairs
    rows = data.rows_from([*PAIRS, *others, PAIRS[0], *mixed], [0] * 18)
    assert data.first_rows(rows).tolist() == [*range(7), *range(7), 0, 15, 16, 17]
    assert (rows.notes["duplicates"], rows.notes["reverse_complements"]) == (1, 7)
    parts = data.split_rows(rows, (0.5, 0.5), 1)
    keys = [set(data.row_keys(part)) for part in parts]
    assert not keys[0] & keys[1] and sum(len(part.labels) for part in parts) == 18
    for part in parts:                                       # each still knows where its second ones begin
        texts = [data.rows_from([(a, b)]) for a, b in [*PAIRS, *others, *mixed]]
        known = {row.bases.tobytes(): row.first[0] for row in texts}
        found = np.split(part.bases, part.offsets[1:-1])
        assert [known[x.tobytes()] for x in found] == part.first.tolist()
    other = data.rows_from([("ACGTA", "CC"), ("AC", "GTACC")])                # equal end to end
    assert data.fingerprint({"train": other._replace(labels=np.zeros(2, int))}) != data.fingerprint(
        {"train": data.rows_from([("AC", "GTACC"), ("ACGTA", "CC")], [0, 0])})


def test_kmer_floor_of_pairs():
    single = data.kmer_counts(data.rows_from(A)), data.kmer_counts(data.rows_from(B))
    assert np.array_equal(data.kmer_counts(data.rows_from(PAIRS)), np.concatenate(single, 1))


def test_embeddings_and_scores_of_pairs():
    net = head(pool="mean")
    model = finetune.Model("x", net, "cpu")
    for pair, got in zip(PAIRS, model.embed(PAIRS)):
        tokens = torch.tensor([literal(*pair, 3, 1)[0]])
        x = net.bert.encode(tokens)[0][tokens[0] > data.MASK]
        assert got == pytest.approx(x.mean(0).detach().numpy(), abs=1e-4)
    net.bert.ln_head.weight.data += 1
    with pytest.raises(ValueError, match="single sequences, not pairs"):
        model.score(PAIRS)


@pytest.mark.parametrize("spec, sequences, message", [
    ({"kind": "cnn", "length": 90}, PAIRS, "kind cnn reads no pairs"),
    ({"kind": "mixer", "mixer": dict(length=40, n_layer=1, track_size=4, hidden=8, dropout=0.0), "n_cls": 2},
     PAIRS, "kind mixer reads no pairs"),
    ({"classes": ("a", "b"), "regression": False}, PAIRS, "fine-tuned on single sequences; give no pairs"),
    ({"classes": ("a", "b"), "regression": False, "pairs": True}, A, "fine-tuned on pairs of sequences"),
    ({}, [("ACGT" * 9, "ACGT" * 9), *PAIRS], "1 pairs have more than 31 k-mers; cut"),
    ({}, [*PAIRS, ("ACGT", "")], "sequence 7: no sequence_2; complete"),
    ({}, [("", "ACGT")], "sequence 0: no sequence; complete"),
    ({}, [("ACGT", "AC\nGT")], r"sequence 0: '\\n' is not a DNA letter"),
    ({}, [("ACGT", "AC"), ("AC", "GX")], r"sequence 1: 'X' is not a DNA letter \(in 'AC GX'\)"),
    ({}, [*PAIRS, "ACGT"], "give a list of one string"), ({}, [("AC",) * 3], "give a list of one string")])
def test_what_reads_no_pairs_says_so(spec, sequences, message):
    net = finetune.build_net(({} if "kind" in spec else SPEC) | {"n_out": 2} | spec).eval()
    with pytest.raises(ValueError, match=message):
        finetune.Model("x", net, "cpu").apply(sequences)


def test_a_table_of_pairs(out):
    rng = np.random.default_rng(0)
    a, b = random_dna(20, rng), random_dna(30, rng)
    open("x.csv", "w").write(f"id,sequence_2,label,sequence\nu,{b},0,{a}\nv,{a},1,{b.lower()}\n")
    sequences, labels, _ = data.read_table("x.csv")
    assert sequences == [(a, b), (b.lower(), a)] and labels == [0, 1]
    open("x.csv", "a").write(f"w,,1,{a}\n")
    with pytest.raises(ValueError, match="x.csv: line 4: no sequence_2; complete"):
        data.read_table("x.csv")
