"""Algorithm 1 of the RandomMask paper against a literal reading of its pseudo-code."""
import math

import pytest
import torch

import data
import randommask

PHASES = {1: 1, 30_000: 1, 30_001: 2, 60_000: 2, 60_001: 3, 100_000: 3, 100_001: 4, 150_000: 4, 150_001: 5,
          480_000: 5}


def algorithm_1(S, uniforms, choice, maskable, P=0.025):
    """The procedure for one sequence X at step S, its draws given; choice: which entry of `masks`."""
    steps, masks = [30_000, 60_000, 100_000, 150_000, 480_000], [6]
    for i in range(4):
        if steps[i] < S <= steps[i + 1]:
            masks = [6 + 2 * j for j in range(i + 2)]
    m, masked = masks[choice], set()
    for i in range(len(uniforms)):
        if maskable[i] and uniforms[i] < P:
            masked |= set(range(i - m // 2 + 1, i + m // 2 + 1))
    return [i in masked and maskable[i] for i in range(len(uniforms))]


@pytest.mark.parametrize("step", PHASES)
def test_equals_algorithm_1(step):
    phase = randommask.phase_at(step, randommask.phase_edges(480_000))
    tokens = torch.randint(5, 4101, (200, 80))
    tokens[:, 0], tokens[:, -1], tokens[::5, 30], tokens[::3, 60:] = 2, 3, 1, 0  # [CLS] [SEP] [UNK] [PAD]
    torch.manual_seed(step)
    masked = randommask.random_mask(tokens, phase, 0.025)
    torch.manual_seed(step)
    uniforms = torch.where(data.draw_centers(tokens.shape, 0.025, "cpu"), 0.0, 1.0).tolist()
    choices = torch.randint(PHASES[step], (200,)).tolist()
    want = [algorithm_1(step, u, c, t) for u, c, t in zip(uniforms, choices, (tokens > 4).tolist())]
    assert phase == PHASES[step] and masked.tolist() == want and masked.any()


@pytest.mark.parametrize("steps, edges", {480_000: [30_000, 60_000, 100_000, 150_000],
                                          4_800: [300, 600, 1_000, 1_500], 20: [1, 2, 4, 6]}.items())
def test_phase_edges_scale(steps, edges):
    ours = randommask.phase_edges(steps)
    assert ours == pytest.approx(edges, abs=0.5)
    for phase, edge in enumerate(ours, 1):
        assert [randommask.phase_at(s, ours) for s in (edge, edge + 1)] == [phase, phase + 1]


@pytest.mark.parametrize("phase, p, span, share", [
    (1, 0.025, 6, 14.1), (2, 0.025, 6, 16.2), (3, 0.025, 6, 18.3), (4, 0.025, 6, 20.3), (5, 0.025, 6, 22.2),
    (1, 0.15, 1, 15)])
def test_masked_share(phase, p, span, share):
    tokens = torch.full((3000, 512), 7)
    tokens[:, 0], tokens[:, -1] = 2, 3
    torch.manual_seed(phase)
    masked = randommask.random_mask(tokens, phase, p, span)
    assert 100 * masked[:, 16:-16].float().mean() == pytest.approx(share, abs=0.3)     # not at the ends
    assert not masked[tokens < 5].any()
    torch.manual_seed(phase)                                 # span 1: the centers alone
    assert span > 1 or torch.equal(masked, data.draw_centers(tokens.shape, p, "cpu") & (tokens > 4))


def tokens_over(base, k, stride, T):
    """The tokens that contain a base."""
    return {t for t in range(T) if t * stride <= base < t * stride + k}


@pytest.mark.parametrize("k, stride", [(k, stride) for k in (1, 3, 5, 6) for stride in range(1, k + 1)])
def test_a_span_hides_the_bases_under_its_middle(k, stride):
    """The base, or the two, in the middle of what a span covers is in no token that is visible."""
    T, span = 60, randommask.first_span(k, stride)
    inner = range(k, T * stride - k)                         # bases that all their tokens cover
    assert span == max(len(tokens_over(base, k, stride, T)) for base in inner)
    for phase in range(1, 6):
        for half in range(phase):                            # one sequence for each length of the span
            length = span + 2 * half
            centers = torch.zeros(1, T, dtype=torch.bool)
            centers[0, T // 2] = True
            masked = data.span_mask(centers, torch.ones(1, T, dtype=torch.bool), (span - 1) // 2 + half,
                                    span // 2 + half)[0].nonzero().flatten().tolist()
            assert len(masked) == length
            first, last = masked[0] * stride, masked[-1] * stride + k - 1
            middle = {(first + last) // 2, math.ceil((first + last) / 2)}
            assert all(tokens_over(base, k, stride, T) <= {*masked} for base in middle)


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 6])
def test_random_masks_hide_bases_at_every_stride(stride):
    """About 15 % of the tokens in phase 1, and each center hides at least one base, as all strides should."""
    k, span = 6, randommask.first_span(6, stride)
    tokens = torch.full((300, 200), 7)
    torch.manual_seed(stride)
    masked = randommask.random_mask(tokens, 1, 0.15 / span, span)
    assert masked.float().mean() == pytest.approx(1 - (1 - 0.15 / span) ** span, abs=0.01)
    row = {t for t in range(200) if masked[0, t]}
    runs = [t for t in row if 10 < t < 150 and {*range(t, t + span)} <= row]   # wherever a span begins
    for t in runs:
        middle = (t * stride + (t + span - 1) * stride + k - 1) // 2
        assert tokens_over(middle, k, stride, 200) <= row
    assert len(runs) > 3
