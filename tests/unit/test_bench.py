"""tools/bench.py: the item cost against hand calculations, at tiny sizes."""
import functools

import pytest
import torch
from torch import nn

import data
import models
from tools import bench

BATCH, MIXER = 2, models.ChordMixerConfig(1010, 1, 4, 8)     # 10 blocks of 44 and 8 channels
ENCODER, BERT = models.EncoderConfig(1010, 1, 2, 16), models.BertConfig(69, 102, 1, 2, 16, 32, 0.0)
SHAPES = {"FinDNA": bench.Shape(MIXER, teacher=True), "CM-MNM": bench.Shape(MIXER),
          "FinDNA-T": bench.Shape(ENCODER, teacher=True), "DNABERT": bench.Shape(BERT, 1)}


def mixer_products(tokens, head):
    """Multiply-adds of one forward pass of MIXER: input projection, blocks, projection to the bases."""
    return tokens * (5 * 44 + 10 * 2 * 44 * 8 + head * 44 * 5)


def encoder_products(rows, T, head):
    return rows * T * (5 * 16 + 12 * 16 ** 2 + 2 * T * 16 + head * 16 * 5)


def test_flops_equal_hand_calculations():
    """Twice the multiply-adds; backward: twice forward, but for the input projection (no input gradient)."""
    made = functools.partial(bench.pretraining_pass, n=BATCH)
    tokens = BATCH * 1010
    n, flops = bench.count_flops(lambda device: made(SHAPES["CM-MNM"], device=device))
    assert flops == 2 * (3 * mixer_products(tokens, 1) - tokens * 5 * 44)
    assert n == sum(p.numel() for p in models.BaseModel(models.ChordMixer(MIXER)).parameters())
    _, both = bench.count_flops(lambda device: made(SHAPES["FinDNA"], device=device))
    assert both - flops == 2 * mixer_products(tokens, 1)     # the teacher's forward pass
    per_token = models.BaseModel(models.ChordMixer(MIXER)).flops_per_token
    assert tokens * per_token(1010, False) == 6 * mixer_products(tokens, 1)
    assert tokens * per_token(1010, True) == 8 * mixer_products(tokens, 1)
    _, flops = bench.count_flops(lambda device: made(SHAPES["FinDNA-T"], device=device))
    once = encoder_products(BATCH, 1010, 1)
    assert flops == 2 * (4 * once - tokens * 5 * 16)
    assert tokens * models.BaseModel(models.Encoder(ENCODER)).flops_per_token(1010, True) == 8 * once
    _, flops = bench.count_flops(lambda device: made(SHAPES["DNABERT"], device=device))
    rows, T = BATCH * 10, 102                                # 998 3-mers in windows of 100
    slots = models.mask_capacity(rows * T, 0.15, 3)
    decoder = slots * 16 * (16 + 128)                        # 69 tokens, rounded up to 64s
    assert flops == 6 * (rows * T * (4 * 16 ** 2 + 2 * 16 * 32 + 2 * T * 16) + decoder)


def test_flops_of_fine_tuning_equal_hand_calculations():
    make = functools.partial(bench.tuning_pass, SHAPES["FinDNA"], BATCH, L=4096)
    assert bench.count_flops(make)[1] == 2 * (3 * mixer_products(BATCH * 4096, 0) - BATCH * 4096 * 5 * 44)
    make = functools.partial(bench.tuning_pass, SHAPES["FinDNA-T"], BATCH, L=2020)
    once = encoder_products(2 * BATCH, 1010, 0)              # two windows a sequence
    assert bench.count_flops(make)[1] == 2 * (3 * once - BATCH * 2020 * 5 * 16)


def test_fine_tuning_and_its_peers_start_from_the_same_weights(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(bench, "MINI", models.BertConfig(4101, 512, 1, 2, 16, 32, 0.0))
    pairs, made, outputs = [], bench.hugging_face, {}
    tokens = data.tokenize(["ACGTTGCA" * 10, "AACCGGTT" * 10])

    def make(net, *args, **kwargs):
        pairs.append((net, made(net, *args, **kwargs)))
        return pairs[-1][1]

    def compare(name, peers, ours, *_):
        for net, peer in pairs:
            torch.testing.assert_close(net.eval()(tokens, None, None), peer.eval()(tokens).logits, atol=1e-5,
                                       rtol=0)
        before = pairs[-2][0](tokens, None, None)
        ours()
        outputs[name] = before - pairs[-2][0](tokens, None, None), peers["HF Trainer loop"][0]()
        pairs.clear()
    monkeypatch.setattr(bench, "hugging_face", make)
    monkeypatch.setattr(bench, "compare", compare)
    bench.fine_tuning(1)
    assert list(outputs) == ["fine-tune 70", "fine-tune 300"]
    assert all(change.abs().max() > 0 and loss.isfinite() for change, loss in outputs.values())


def test_live_bytes():
    x = torch.ones(1000)
    with bench.Live([x]) as live:
        y = x * 2
        view = y[:10]
        del y
        assert live.now == live.peak == 8000                 # the view keeps it
        z = x + 1
        assert live.now == live.peak == 12_000
        del view, z
        assert live.now == 4000 and live.peak == 12_000


def test_peak_of_a_step_is_between_bounds():
    """At least weights, gradients and AdamW's two moments, and the kept activations of a linear layer."""
    net, x = nn.Linear(100, 1000), torch.randn(500, 100)
    made = net, None, lambda: net(x).square().sum().backward()
    peak, seconds = bench.measure(lambda device: made, "cpu", 1)
    state, hidden = 4 * 101_000 * 4, 500 * 1000 * 4
    assert state + hidden <= peak <= 2 * state + 4 * hidden and seconds > 0


@pytest.mark.parametrize("max_seconds", [60, 0])
def test_cost_prints_every_network_and_length(capsys, monkeypatch, max_seconds):
    monkeypatch.setattr(bench, "matmul_peak", lambda device, dtype: (1e10, 256))
    bench.cost(1, "cpu", BATCH, max_seconds, SHAPES, (64, ))
    header, *lines = capsys.readouterr().out.splitlines()
    assert "sequences of a step: 2" in header and [line[15:].split(",")[0] for line in lines] == [
        *SHAPES, "FinDNA", "FinDNA-T", "DNABERT"]
    assert all(("not run" in line) == (max_seconds == 0) for line in lines)
    assert all("64 bases" in line for line in lines[4:])


@pytest.mark.parametrize("flags, said", [("--only gpu", "no item gpu"), ("cost --device cuda", "no CUDA")])
def test_what_cannot_be_run_is_refused(monkeypatch, capsys, flags, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bench", *flags.split()])
    with pytest.raises(SystemExit, match="2"):
        bench.parse_args()
    assert said in capsys.readouterr().err


def test_a_slow_product_is_measured_small(monkeypatch):
    """A CPU without units for bf16 needs a quarter of an hour for the large one."""
    sizes = []

    def slow(variants, rounds):
        sizes.append(variants[""]().shape[0])
        return {"": [0.05]}                                  # seconds of 256^3: 26 s of 2048^3
    monkeypatch.setattr(bench, "interleave", slow)
    assert bench.matmul_peak("cpu", torch.float32) == (2 * 256 ** 3 / 0.05, 256) and sizes == [256]
