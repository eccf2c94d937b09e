"""Embeddings of any layer against transformers and a network without the later ones; score against a loop."""
import math

import numpy as np
import pytest
import torch
from harness import random_dna
from test_finetune_rules import K, SPEC

import data
import finetune
import models
from tools import embed

TEXTS = [random_dna(n, np.random.default_rng(n)) for n in (30, 34, 25, 34)]
MIXERS = {"chordmixer": dict(length=34, n_layer=3, track_size=4, hidden=8, dropout=0.0),
          "encoder": dict(length=34, n_layer=3, n_head=2, n_embd=8, dropout=0.0)}


def deep_bert(stride=1, k=K, seed=5):
    """A pretrained BERT of two layers, whose predictions are far from uniform."""
    bert = SPEC["bert"] | {"n_layer": 2, "vocab_size": 4 ** k + 5}
    net = finetune.build_net(SPEC | {"bert": bert, "stride": stride, "k": k, "pool": "mean"}, seed=seed)
    net.bert.tok_emb.weight.data *= 20
    return finetune.Model("x.pt", net, "cpu")


def test_layers_are_the_hidden_states_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = deep_bert()
    models.save_hf(model.net.bert, str(tmp_path / "hf"))
    theirs = transformers.BertModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False).eval()
    other = finetune.load_model(f"hf:{tmp_path / 'hf'}")
    for text in TEXTS:
        with torch.no_grad():
            states = theirs(data.tokenize([text], K), output_hidden_states=True).hidden_states
        assert len(states) == 3
        for layer in range(-3, 3):
            want = states[layer][0, 1:-1].mean(0).numpy()
            for one in (model, other):
                assert one.embed([text], layer)[0] == pytest.approx(want, abs=1e-5)
        rows = data.on_device(data.rows_from([text]), "cpu")
        of_bases = embed.per_base(model.net, rows, 9, **model.at_layer(1))
        assert of_bases[0] == pytest.approx(states[1][0, 1].numpy(), abs=1e-5)      # in one k-mer only
    with pytest.raises(ValueError, match=r"--layer 3: x.pt takes 0 \(.*\) to 2 \(.*\), or -1 to -3,"):
        model.embed(TEXTS, 3)


def test_layers_of_another_encoder(tmp_path):
    """A network that transformers runs: HfHead takes its hidden states."""
    transformers = pytest.importorskip("transformers")
    config = transformers.EsmConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                    intermediate_size=32, max_position_embeddings=64, pad_token_id=0)
    net, ids = transformers.EsmModel(config, add_pooling_layer=False).eval(), torch.tensor([[4, 5, 6, 7, 4]])
    head = finetune.HfHead.__new__(finetune.HfHead)
    torch.nn.Module.__init__(head)
    head.hf = net
    with torch.no_grad():
        states = net(ids, output_hidden_states=True)
        for layer, want in ((0, states.hidden_states[0]), (1, states.hidden_states[1]),
                            (None, states.last_hidden_state)):
            torch.testing.assert_close(head.states(ids, torch.ones_like(ids), layer), want)


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[1::2]], ids=["padded", "alike"])
def test_layers_of_a_mixer_are_those_of_a_shorter_network(kind, texts):
    """Layer n: the last of a network with n layers, before its last normalisation; 0: the embeddings."""
    spec = {"kind": "mixer", "mixer": MIXERS[kind], "n_cls": 0}
    model = finetune.Model("x.pt", finetune.build_net(spec, seed=2), "cpu")
    for layer in range(4):
        short = finetune.build_net(spec, seed=2).eval()
        if kind == "chordmixer":
            del short.backbone.blocks[layer * short.backbone.config.n_blocks:]
        else:
            del short.backbone.layers.layers[layer:]
            short.backbone.layers.norm = short.backbone.layers.norm if layer == 3 else None
            if layer == 0:
                short.backbone.layers.forward = lambda x, **_: x
        want = finetune.Model("x.pt", short, "cpu").embed(texts)
        for same in (layer, layer - 4):
            np.testing.assert_allclose(model.embed(texts, same), want, atol=1e-6)


def literal_score(bert, text, k, stride):
    """Mean of log P(base) over the k-mers and their bases: masks and candidates as lists of strings."""
    span, n = math.ceil(k / stride), (len(text) - k) // stride + 1
    passes, words, values = math.ceil(span / 0.15), models.vocabulary(k), []
    for i in range(passes):                                  # hides every `passes`-th run of `stride` bases
        runs = [run for run in range(n + span) if (run + 1) % passes == i]
        over = {t: run for run in runs for t in range(max(run - span + 1, 0), min(run + 1, n))}
        tokens = data.tokenize([text], k, stride)
        tokens[0, [t + 1 for t in over]] = data.MASK
        with torch.no_grad():
            log_p = bert(tokens)[0].log_softmax(-1)
        for t, run in over.items():
            word = text[t * stride:t * stride + k]
            for at in range(k):
                if (t * stride + at) // stride == run:
                    four = {x: log_p[t + 1, words.index(word[:at] + x + word[at + 1:])] for x in "ACGT"}
                    values.append(four[word[at]] - torch.stack([*four.values()]).logsumexp(0))
    assert len(values) == n * k
    return float(sum(values) / len(values))


@pytest.mark.parametrize("k, stride", [(3, 1), (3, 3), (3, 2), (2, 1)])
def test_score_is_the_literal_pseudo_log_likelihood(k, stride):
    model, long = deep_bert(stride, k), random_dna(65, np.random.default_rng(9))
    texts = [text[:31 + k] for text in TEXTS]                # one window
    want = [literal_score(model.net.bert, text, k, stride) for text in texts]
    assert np.array_equal(model.score(iter(texts)), model.score(texts))
    assert model.score(texts) == pytest.approx(want, abs=1e-4) and np.std(want) > 0.01
    if stride == 1:                                          # a mean over the k-mers of two windows
        n, m = 32, 65 - k + 1 - 32
        parts = [literal_score(model.net.bert, part, k, 1) for part in (long[:n + k - 1], long[n:])]
        assert model.score([long, "A"])[0] == pytest.approx((n * parts[0] + m * parts[1]) / (n + m), abs=1e-4)
        assert np.isnan(model.score(["A" * (k - 1)])[0])


@pytest.mark.parametrize("wrong", [
    dict(strands="both"), dict(strand="average"), dict(long="trunc"), dict(layer=2), dict(dtype="float99"),
    dict(stride=0), dict(pool="max"), dict(eval_network="teacher")])
def test_load_model_refuses_options_that_it_does_not_know(monkeypatch, wrong):
    """They were ignored, or read as the default."""
    net = deep_bert().net
    monkeypatch.setattr(finetune, "read_network", lambda *_: (dict(net.spec), net.state_dict()))
    right = finetune.load_model("x.pt", strands="average", long="truncate", stride=3, pool="cls")
    assert right.embed(["ACGTACGT"]).shape == (1, net.bert.config.n_embd)
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}.*; (see|drop)"):
        finetune.load_model("x.pt", **wrong)


@pytest.mark.parametrize("kind", MIXERS)
def test_a_mixer_has_no_stride(monkeypatch, kind):
    spec = {"kind": "mixer", "mixer": MIXERS[kind], "n_cls": 0}
    monkeypatch.setattr(finetune, "read_network", lambda *_: (spec, None))
    with pytest.raises(ValueError, match="--stride: not for a network of the kind mixer; drop it"):
        finetune.load_model("x.pt", stride=5)


def test_score_is_refused_without_a_masked_lm_head():
    classifier, headless, mixer = deep_bert(), deep_bert(), finetune.Model("x.pt", finetune.build_net(
        {"kind": "mixer", "mixer": MIXERS["encoder"], "n_cls": 0}), "cpu")
    classifier.net.spec["classes"] = ("a", "b")
    headless.net.bert.ln_head.weight.data.zero_()            # as models.load_hf leaves it
    for model in (classifier, headless, mixer):
        with pytest.raises(ValueError, match="x.pt: no masked-LM head to score with; give a BERT"):
            model.score(TEXTS)
