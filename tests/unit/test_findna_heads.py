"""finetune.py on FinDNA's networks: windows of FinDNA-T, pooling, repeated probes."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import random_dna

import data
import finetune
import models
from tools import embed

K = 3                                                        # [CLS] of a pretraining sequence of 20 bases
SIZES = {"transformer": dict(length=20 + K, n_layer=1, n_head=2, n_embd=8, dropout=0.0),
         "chordmixer": dict(length=20 + K, n_layer=1, track_size=4, hidden=16, dropout=0.0)}
LENGTHS = [5, 20, 21, 23, 24, 40, 41, 97, 1, 20]


def make(kind, pool, lengths=LENGTHS, **spec):
    """A network with a head, sequences, their Rows."""
    spec = {"kind": "mixer", "mixer": SIZES[kind], "n_cls": K, "pool": pool, "n_out": 2} | spec
    rng = np.random.default_rng(0)
    texts = [random_dna(n, rng, "ACGTN") for n in lengths]
    rows = data.on_device(data.rows_from(texts), torch.device("cpu"))
    return finetune.build_net(spec).eval(), texts, rows


def read_alone(net, text, n_cls):
    """Hidden states of one sequence and of [CLS] behind it, as the backbone gives them."""
    one_hot = data.one_hot(torch.from_numpy(data.encode(text))[None])
    x = net.backbone(F.pad(one_hot, (0, 0, 0, n_cls)))[0].detach()
    return x[:len(text)], x[len(text):]


def wanted(net, text, pool, kind):
    """The embedding by hand: windows of equal length, means over all bases and over all [CLS]."""
    n_cls = 0 if pool == "mean" else K
    n = -(-len(text) // (20 + K - n_cls)) if kind == "transformer" else 1
    cuts = [i * len(text) // n for i in range(n + 1)]
    parts = [read_alone(net, text[a:b], n_cls) for a, b in zip(cuts, cuts[1:])]
    assert max(np.diff(cuts)) - min(np.diff(cuts)) <= 1
    mean, cls = (torch.cat(part).mean(0) for part in zip(*parts))
    return {"mean": mean, "cls": cls, "both": torch.cat([mean, cls])}[pool]


@pytest.mark.parametrize("pool", ["mean", "cls", "both"])
@pytest.mark.parametrize("kind", SIZES)
def test_each_sequence_has_its_own_embedding(kind, pool):
    net, texts, rows = make(kind, pool)
    want = torch.stack([wanted(net, text, pool, kind) for text in texts])
    for micro_batch_size in (1, 4, 100):
        got = finetune.apply(net, rows, micro_batch_size, net.embed)
        np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(finetune.apply(net, rows, 7), net.out(want).detach(), atol=1e-5)


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("lengths", [[200] * 4, [200, 150, 180]])
def test_means_over_bases_are_float32(pool, lengths):
    """ChordMixer's states are bfloat16 under autocast: the mean of many would be rounded to 8 bits."""
    net, _, rows = make("chordmixer", pool, lengths)
    net.backbone.register_forward_hook(lambda *call: states.append(call[-1]))
    states, inputs = [], net.inputs(rows, np.arange(len(lengths)))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got = net.embed(*inputs)
    want = [x[n:n + K] if pool == "cls" else x[:n] for x, n in zip(states[0].double(), lengths)]
    assert states[0].dtype == torch.bfloat16 and got.dtype == torch.float32
    torch.testing.assert_close(got.double(), torch.stack([x.mean(0) for x in want]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_windows_of_the_transformer(pool):
    net, texts, rows = make("transformer", pool)
    room, lengths = 23 if pool == "mean" else 20, np.array(LENGTHS)
    assert net.n_windows(lengths).tolist() == [-(-n // room) for n in LENGTHS]
    assert net.count(lengths) == {"in_windows": sum(n > room for n in LENGTHS)}
    owner, first, n = net.windows(lengths)
    for i, length in enumerate(LENGTHS):                     # they hold each base once, in order
        bases = [at for a, b in zip(first[owner == i], n[owner == i]) for at in range(a, a + b)]
        assert bases == list(range(length))
    states, covered = net.per_base(rows, np.array([7, 0]))
    assert covered.flatten().tolist() == [*range(rows.offsets[7], rows.offsets[8]), *range(5)]
    for i, _, width in zip(*net.windows(lengths[[7, 0]])):
        assert states.shape == (102, 8) and width <= room
    first_window = texts[7][:n[owner == 7][0]]
    torch.testing.assert_close(states[:len(first_window)],
                               read_alone(net, first_window, net.n_cls)[0], atol=1e-5, rtol=0)


def test_truncated_sequences_keep_the_first_window():
    net, texts, rows = make("transformer", "mean", long="truncate")
    assert net.count(np.array(LENGTHS)) == {"truncated": 4} and net.n_windows(np.array(LENGTHS)).max() == 1
    want = torch.stack([read_alone(net, text[:23], 0)[0].mean(0) for text in texts])
    np.testing.assert_allclose(finetune.apply(net, rows, 7, net.embed), want, atol=1e-5)


def test_mixed_lengths_near_the_limit_fit_the_positions():
    """They were rounded up to a multiple of 64 bases, beyond the positions."""
    spec = dict(mixer=SIZES["transformer"] | {"length": 100 + K})
    net, texts, rows = make("transformer", "cls", [99, 100, 70], **spec)
    assert net.inputs(rows, np.arange(3))[0].shape == (3, 100 + K, 5)
    want = torch.stack([read_alone(net, text, K)[1].mean(0) for text in texts])
    np.testing.assert_allclose(finetune.apply(net, rows, 7, net.embed), want, atol=1e-5)


@pytest.mark.parametrize("kind", SIZES)
def test_both_poolings_train_and_reload(kind, tmp_path):
    net, _, rows = make(kind, "both", [50] * 4 + [30], head="mlp")
    assert net.hidden.weight.shape == (net.out.in_features, 2 * net.out.in_features)
    x = net.hidden(torch.from_numpy(finetune.apply(net, rows, 9, net.embed)))
    literal = net.out(x * (1 + torch.erf(x / math.sqrt(2))) / 2).detach()      # GELU by its definition
    np.testing.assert_allclose(finetune.apply(net, rows, 9), literal, atol=1e-5)
    net.train()
    finetune.train_batch(net, rows._replace(labels=torch.tensor([0, 1, 0, 1, 1])), np.arange(5), 3)
    assert all(p.grad is not None and p.grad.isfinite().all() for name, p in net.named_parameters()
               if "backbone" not in name)
    whole = finetune.build_net(net.spec | {"classes": ["a", "b"], "regression": False}, net.state_dict())
    whole.spec["pool"] = "mean"                              # as load_model(pool="mean") does
    assert finetune.apply(whole.eval(), rows, 9, whole.embed).shape == (5, net.out.in_features)


@pytest.mark.parametrize("kind", SIZES)
def test_vectors_of_bases_do_not_depend_on_the_pooling(kind):
    net, texts, rows = make(kind, "both", [20, 5, 20], strands="forward", dtype="float32")
    want = torch.cat([read_alone(net, text, K)[0] for text in texts])
    np.testing.assert_allclose(embed.per_base(net, rows, 2), want, atol=1e-5)


def test_a_head_predicts_from_the_pooling_it_was_trained_with(monkeypatch):
    net, texts, _ = make("chordmixer", "mean", classes=["a", "b"], regression=False)
    spec = net.spec | {"strands": "forward", "dtype": "float32"}
    monkeypatch.setattr(finetune, "read_network", lambda *_: (dict(spec), net.state_dict()))
    whole, other = (finetune.load_model("x.pt", pool=pool) for pool in (None, "cls"))
    assert whole.predict(texts).shape == (len(texts), 2) and other.embed(texts).shape == (len(texts), 24)
    with pytest.raises(ValueError, match="pool='cls': x.pt was fine-tuned with 'mean'; load it"):
        other.predict(texts)


def test_bert_pools_both():
    spec = {"kind": "bert", "k": 3, "stride": 1, "pool": "both",
            "bert": vars(models.BertConfig(69, 10, 1, 2, 16, 32))}
    net = finetune.build_net(spec).eval()
    rows = data.on_device(data.rows_from(["ACGTACGTAACCA", "ACGT"]), torch.device("cpu"))
    both = finetune.apply(net, rows, 9, net.embed)
    for pool, part in zip(("mean", "cls"), np.split(both, 2, 1)):
        net.spec["pool"] = pool
        assert np.array_equal(part, finetune.apply(net, rows, 9, net.embed))


def plans(task, init, **flags):
    args = {"task": [task], "init": [init], "mode": "probe", "protocol": None, "seeds": None, "shots": [10],
            "own": {}}
    args = SimpleNamespace(**args | flags)
    return [plan.repeat for plan in finetune.plan_runs(args)]


def test_linear_models_repeat_where_the_protocol_says_so():
    task = "gb/human_nontata_promoters"
    for init in ("x.pt", "kmer"):
        assert plans(task, init, protocol="findna") == [*range(5)]
        assert plans(task, init, protocol="findna", seeds=2) == [0, 1]
        assert plans(task, init) == plans(task, init, protocol="strict", seeds=3) == [0]
    assert plans(task, "x.pt", protocol="findna", mode="finetune") == [*range(5)]
    assert plans("covid", "x.pt", mode="finetune") == [0]


def test_each_repeat_of_a_probe_is_fitted_on_other_rows():
    rng = np.random.default_rng(1)
    texts = [random_dna(30, rng) for _ in range(140)]
    train, test = (data.rows_from(part, np.arange(len(part)) % 2) for part in (texts[:100], texts[100:]))
    splits, p = {"train": train, "dev": None, "test": test}, finetune.LINEAR["findna"]
    keys = []
    for seed in (42, 43, 42):
        parts, tested_on = finetune.assign(splits, p, seed)
        keys.append(data.row_keys(parts["train"]))
        assert parts["dev"] is None and parts["test"] is test and len(keys[-1]) == 90
        assert np.bincount(parts["train"].labels).tolist() == [45, 45]
        assert tested_on == "test; fitted on 90% of train"
        protocol = finetune.get_protocol("findna", "gb/human_ocr_ensembl", None, "", {})
        tuned, _ = finetune.assign(splits, protocol, seed)
        assert data.row_keys(tuned["train"]) == keys[-1]     # the rows that fine-tuning trains on
    assert keys[0] == keys[2] and set(keys[0]) != set(keys[1])
    parts, tested_on = finetune.assign(splits, {}, 42)       # other protocols: all of train
    assert parts["train"] is train and tested_on == "test"


def test_the_transformer_is_a_literal_pre_ln_encoder():
    torch.manual_seed(0)
    net = models.Encoder(models.EncoderConfig(20, 2, 2, 8)).double().eval()
    x = torch.randn(3, 15, 5, dtype=torch.float64)
    w = dict(net.named_parameters())

    def linear(name, x):
        return x @ w[f"{name}weight"].T + w[f"{name}bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]
    h = linear("proj.", x) + w["pos_emb.weight"][:15]
    for of in ("layers.layers.0.", "layers.layers.1."):
        q, k, v = (part.view(3, 15, 2, 4).transpose(1, 2) for part in linear(
            f"{of}self_attn.in_proj_", norm(f"{of}norm1", h)).chunk(3, -1))
        y = ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)
        h = h + linear(f"{of}self_attn.out_proj.", y)
        y = linear(f"{of}linear1.", norm(f"{of}norm2", h))
        h = h + linear(f"{of}linear2.", y * (1 + torch.erf(y / math.sqrt(2))) / 2)
        assert y.shape == (3, 15, 32)                        # four times the width
    torch.testing.assert_close(net(x), norm("layers.norm", h))
