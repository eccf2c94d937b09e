"""The networks in plain torch, then Hugging Face folders.

Bert (post-LN) over k-mers is the network of DNABERT, RandomMask and GeneMask. Its size is set by the config:
12 layers of 768 are DNABERT (89,196,549 parameters), 4 of 256 RandomMask's BERT-mini, 2 of 256 with n_head 8
and n_inner 3072 LOGO (GeneMask). ChordMixer (FinDNA) and Encoder read one-hot bases; Cnn and Penguinn are
baselines. Then: means over tokens and windows, and log_p, what a masked-LM head thinks of each base.
load_hf and save_hf read and write a Bert in the layout of transformers; load_other and make_other read other
networks with transformers itself; load_findna reads FinDNA's released weights.
"""
import collections
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import shutil
import tempfile
import zipfile

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

PAD, MASK = 0, 4                                             # ids of tokens
MASKED = 0.15                                                # of the tokens at a time in log_p: BERT's
NORM_EPS = 1e-12                                             # LayerNorm epsilon (DNABERT's config.json)


def check_sizes(config):
    """Raises ValueError unless a config's sizes are positive integers that fit together and its dropout is in
    [0, 1)."""
    for name, size in vars(config).items():
        if name != "dropout" and (type(size) is not int or size < 1):
            raise ValueError(f"{name} is {size!r:.80}, expected a positive integer")
    if type(config.dropout) not in (int, float) or not 0 <= config.dropout < 1:
        raise ValueError(f"dropout is {config.dropout!r:.80}, expected a number in [0, 1)")
    if config.n_embd % getattr(config, "n_head", 1):
        raise ValueError(f"--n_embd {config.n_embd}: not a multiple of --n_head {config.n_head}; change one")


@dataclasses.dataclass
class BertConfig:
    """Sizes of a Bert. Defaults: DNABERT's config.json (bert-base, k = 6). ValueError if they do not fit."""
    vocab_size: int = 4101                                   # 4**6 k-mers + 5 specials
    block_size: int = 512                                    # tokens, including [CLS] and [SEP]
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_inner: int = 3072
    dropout: float = 0.1                                     # on hidden states and attention weights

    __post_init__ = check_sizes

    @property
    def k(self):
        k = round(math.log(max(self.vocab_size - 5, 1), 4))
        if 4 ** k + 5 != self.vocab_size:
            raise ValueError(f"vocabulary of {self.vocab_size} tokens: expected 4**k k-mers and 5 specials")
        return k


def attend(q, k, v, mask, dropout, need_weights):
    """Computes softmax attention over q, k, v (B, H, T, D): the output, and the weights or None.

    mask: bool (B, T), True = real token. Uses SDPA, except on a CPU under bf16 autocast (where it is 1.5x
    slower) or with dropout (3x slower), as measured."""
    if mask is not None:
        mask = mask[:, None, None, :]
    slow = q.device.type == "cpu" and (dropout > 0 or torch.is_autocast_enabled("cpu"))
    if not (slow or need_weights):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout), None
    scores = q / math.sqrt(q.shape[-1]) @ k.transpose(-2, -1)                   # (B, H, T, T)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1)
    return F.dropout(weights, dropout) @ v, weights if need_weights else None


class Block(nn.Module):
    """One transformer layer with LayerNorm after each residual sum (post-LN)."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head, self.p = config.n_head, config.dropout
        self.qkv, self.proj, self.ln_attn = nn.Linear(C, 3 * C), nn.Linear(C, C), nn.LayerNorm(C, NORM_EPS)
        self.fc, self.fc_out = nn.Linear(C, config.n_inner), nn.Linear(config.n_inner, C)
        self.ln_mlp = nn.LayerNorm(C, NORM_EPS)

    def forward(self, x, mask=None, need_weights=False, first=None):
        B, T, C = x.shape
        p = self.p if self.training else 0.0
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                 # (B, H, T, D) each
        x, q = x[:, :first], q[:, :, :first]                 # None: all tokens
        y, weights = attend(q, k, v, mask, p, need_weights)
        x = self.ln_attn(x + F.dropout(self.proj(y.transpose(1, 2).flatten(2)), p))
        return self.ln_mlp(x + F.dropout(self.fc_out(F.gelu(self.fc(x))), p)), weights


class Bert(nn.Module):
    """bert(tokens) -> logits (B, T, V); bert(inputs, labels) -> (loss summed over labels, their count)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        C, V = config.n_embd, config.vocab_size
        self.tok_emb = nn.Embedding(V, C, padding_idx=PAD)   # tied to the decoder of the masked-LM head
        self.pos_emb = nn.Embedding(config.block_size, C)
        self.type_emb = nn.Embedding(2, C)                   # BERT's segments; DNA uses row 0 only
        self.ln_emb = nn.LayerNorm(C, NORM_EPS)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.head, self.ln_head = nn.Linear(C, C), nn.LayerNorm(C, NORM_EPS)
        self.head_bias = nn.Parameter(torch.zeros(V))
        for name, p in self.named_parameters():              # N(0, 0.02), biases 0 (DNABERT's config.json)
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        with torch.no_grad():
            self.tok_emb.weight[PAD] = 0

    def encode(self, tokens, mask=None, need_weights=False, first=None, layer=None):
        """Turns tokens (B, T) into hidden states (B, T, C).

        mask: bool (B, T), True = real token; None if no row is padded (fast path).
        first: return only the first N hidden states; the last layer then computes no others.
        layer: return the states after that many layers (0: the input embeddings), not the last ones.
        need_weights: also return each layer's attention (B, H, T, T)."""
        T, p = tokens.shape[1], self.config.dropout if self.training else 0.0
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens for {self.config.block_size} positions; use shorter sequences")
        x = self.tok_emb(tokens) + self.pos_emb.weight[:T] + self.type_emb.weight[0]
        x, all_weights = F.dropout(self.ln_emb(x), p), []
        for i, block in enumerate([*self.blocks][:layer], 1):
            x, weights = block(x, mask, need_weights, first if i == len(self.blocks) else None)
            all_weights.append(weights)
        return (x, all_weights) if need_weights else x

    def decode(self, x):
        """Turns states (N, C) into logits (N, V'): V padded with -inf to a multiple of 64 (fast GEMMs)."""
        x = self.ln_head(F.gelu(self.head(x)))
        extra = -self.config.vocab_size % 64
        bias = F.pad(self.head_bias, (0, extra), value=-math.inf)
        return F.linear(x, F.pad(self.tok_emb.weight, (0, 0, 0, extra)), bias)

    def forward(self, inputs, labels=None, mask=None, capacity=None, weights=None):
        """Turns inputs (B, T) into logits, or with labels (B, T; -100 = no loss) into (loss_sum, count).

        Only labelled positions reach the decoder. capacity: an upper bound on their number (mask_capacity);
        it fixes the shape, so the host need not wait for the GPU. If there are more, the loss is NaN.
        weights (B, T): of the losses, whose sum is then weighted; the count becomes their sum."""
        x = self.encode(inputs, mask)                        # (B, T, C)
        if labels is None:
            return self.decode(x)[..., :self.config.vocab_size]
        at, wanted = labelled_positions(labels, capacity)
        losses = F.cross_entropy(self.decode(x.flatten(0, 1)[at]).float(), wanted,       # its log, too
                                 reduction="sum" if weights is None else "none")
        loss_sum = losses if weights is None else (losses * weights.flatten()[at]).sum()
        count = (labels != -100).sum()
        if capacity is not None:
            loss_sum = loss_sum + torch.where(count > capacity, math.nan, 0.0)
        return loss_sum, count if weights is None else weights.where(labels != -100, 0).sum()

    def saved_per_token(self, T, fused):
        """Returns how many numbers per token forward keeps for backward, with a quarter of the tokens masked.

        fused: attention keeps no (T, T) weights, as on a GPU; on a CPU with dropout it keeps three."""
        c, C = self.config, self.config.n_embd
        layer = 8 * C + 2 * c.n_inner + bool(c.dropout) * (2 * C + (0 if fused else 3 * c.n_head * T))
        return c.n_layer * layer + 3 * C + (4 * C + 3 * c.vocab_size) / 4

    def flops_per_token(self, T, masked):
        """Returns the training FLOPs per token in matrix products; a share `masked` of tokens is decoded."""
        c = self.config
        dense = c.n_layer * (4 * c.n_embd ** 2 + 2 * c.n_embd * c.n_inner)
        return 6 * (dense + masked * c.n_embd * (c.n_embd + c.vocab_size)) + 12 * c.n_layer * T * c.n_embd


@dataclasses.dataclass
class ChordMixerConfig:
    """Sizes of a ChordMixer. Defaults: FinDNA's, 4 layers of 10 blocks, 11 tracks of 28 channels."""
    length: int = 1010                                       # 1,000 bases + 10 [CLS]; takes other lengths too
    n_layer: int = 4
    track_size: int = 28
    hidden: int = 512
    dropout: float = 0.0

    __post_init__ = check_sizes

    @property
    def n_blocks(self):                                      # per layer: ceil(log2 length)
        return (self.length - 1).bit_length()

    @property
    def n_tracks(self):
        return self.n_blocks + 1

    @property
    def n_embd(self):
        return self.n_tracks * self.track_size


class Rotate(torch.autograd.Function):
    """Rotates the tracks of x (B * L, C) by `rotations`; the backward pass is the inverse permutation."""

    @staticmethod
    def forward(ctx, x, index, inverse, track_size):
        ctx.save_for_backward(inverse)
        ctx.track_size = track_size
        return x.view(-1, len(index), track_size).index_select(1, index).view_as(x)

    @staticmethod
    def backward(ctx, grad):
        [inverse] = ctx.saved_tensors
        rows = grad.reshape(-1, len(inverse), ctx.track_size)
        return rows.index_select(1, inverse).view_as(grad), None, None, None


def rotations(L, n_tracks, n_rotated, lengths=None, device=None):
    """Returns the row indices that rotate the tracks of x (B, L * n_tracks, track_size), and their inverse.

    Track 0 stays; track g = 1..n_rotated is rotated by 2**(g-1): out[t] = in[(t + 2**(g-1)) % L].
    With lengths (B,), each sequence is rotated within its own length, the padding behind it stays in place,
    and the indices are for x viewed as (1, B * L * n_tracks, track_size)."""
    track = torch.arange(n_tracks, device=device)
    offset = torch.where(track > n_rotated, 0, (1 << track) // 2)              # 0, 1, 2, 4, ...
    at, length, first = torch.arange(L, device=device)[:, None], L, 0          # (L, 1)
    if lengths is not None:                                                    # (B, 1, 1)
        length, first = lengths[:, None, None], L * torch.arange(len(lengths), device=device)[:, None, None]
    return [((torch.where(at < length, (at + shift) % length, at) + first) * n_tracks + track).flatten().int()
            for shift in (offset, -offset)]


class MixerBlock(nn.Module):
    """x + rotate(MLP(x)), without normalisation. Each track sees the bases at one distance."""

    def __init__(self, config):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(config.n_embd, config.hidden), nn.Linear(config.hidden, config.n_embd)
        self.track_size, self.p = config.track_size, config.dropout

    def forward(self, x, index, inverse):
        p = self.p if self.training else 0.0
        y = self.fc2(F.dropout(F.gelu(self.fc1(x)), p))      # (B * L, C)
        y = F.dropout(y, 1 - (1 - p) ** 2)                   # the released code drops twice in a row
        return x + Rotate.apply(y, index, inverse, self.track_size)


class ChordMixer(nn.Module):
    """one_hot (B, L, 5) float -> (B, L, C), for any L (Khalitov et al., as FinDNA uses it).

    lengths (B,): lengths of padded rows; padding never reaches a real position.
    n_blocks: use only the first N blocks of each layer and N rotated tracks, as if built for length 2**N.
    layer: return the states after that many layers (0: the input embeddings), not the last ones."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.proj = nn.Linear(5, config.n_embd)
        self.blocks = nn.ModuleList(MixerBlock(config) for _ in range(config.n_layer * config.n_blocks))

    def forward(self, one_hot, lengths=None, n_blocks=None, layer=None):
        (B, L, _), c, x = one_hot.shape, self.config, self.proj(one_hot.flatten(0, 1))           # (B * L, C)
        n_blocks = min(n_blocks or c.n_blocks, c.n_blocks)
        index, inverse = rotations(L, c.n_tracks, n_blocks, lengths, x.device)
        for i, block in enumerate([*self.blocks][:None if layer is None else layer * c.n_blocks]):
            if i % c.n_blocks < n_blocks:
                x = block(x, index, inverse)
        return x.view(B, L, -1)


@dataclasses.dataclass
class EncoderConfig:
    """Sizes of an Encoder. Defaults: FinDNA-T; the paper gives no sizes, these are ours."""
    length: int = 1010
    n_layer: int = 4
    n_head: int = 8
    n_embd: int = 320
    dropout: float = 0.0

    __post_init__ = check_sizes


class Encoder(nn.Module):
    """one_hot (B, L, 5) -> (B, L, C): pre-LN transformer, learned positions. lengths (B,): of padded rows.

    layer: as in ChordMixer; only the last states are normalised."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        C = config.n_embd
        self.proj, self.pos_emb = nn.Linear(5, C), nn.Embedding(config.length, C)
        make = functools.partial(nn.TransformerEncoderLayer, C, config.n_head, 4 * C, config.dropout, "gelu",
                                 batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(make(), config.n_layer, nn.LayerNorm(C), False)    # not nested
        self.layers.layers = nn.ModuleList(make() for _ in range(config.n_layer))    # not copies of one
        nn.init.normal_(self.pos_emb.weight, std=0.02)

    def forward(self, one_hot, lengths=None, layer=None):
        L = one_hot.shape[1]
        if L > self.config.length:
            raise ValueError(f"{L} bases for {self.config.length} positions; use shorter sequences")
        padding = None if lengths is None else torch.arange(L, device=lengths.device) >= lengths[:, None]
        x = self.proj(one_hot) + self.pos_emb.weight[:L]
        if layer is None:
            return self.layers(x, src_key_padding_mask=padding)
        for block in self.layers.layers[:layer]:
            x = block(x, src_key_padding_mask=padding)
        return x


def make_backbone(fields):
    """Makes the ChordMixer or Encoder of a checkpoint over one-hot bases from its config."""
    if "track_size" in fields:
        return ChordMixer(ChordMixerConfig(**fields))
    return Encoder(EncoderConfig(**fields))


class BaseModel(nn.Module):
    """A backbone and a linear layer to the bases: one_hot (B, L, 5) -> states (B, L, C), logits (B, L, 5)."""

    def __init__(self, backbone):
        super().__init__()
        self.config, self.backbone = backbone.config, backbone
        self.head = nn.Linear(backbone.config.n_embd, 5)

    def forward(self, one_hot):
        x = self.backbone(one_hot)
        return x, self.head(x)

    def flops_per_token(self, L, teacher):
        """Returns the training FLOPs per position in matrix products; a teacher adds its forward pass."""
        c, n = self.config, sum(p.numel() for name, p in self.named_parameters()
                                if p.dim() == 2 and "pos_emb" not in name)
        attention = 0 if isinstance(self.backbone, ChordMixer) else 2 * c.n_layer * L * c.n_embd
        return (8 if teacher else 6) * (n + attention)

    def saved_per_token(self, L, fused):
        """Returns how many numbers per base forward keeps for the backward pass; fused: as in a Bert."""
        c, C, drops = self.config, self.config.n_embd, bool(self.config.dropout)
        if isinstance(self.backbone, ChordMixer):
            return len(self.backbone.blocks) * (C + 2 * c.hidden + drops * (C + c.hidden)) + C + 15
        return c.n_layer * (17 * C + drops * (8 * C + (0 if fused else 3 * c.n_head * L))) + C + 15


class Cnn(nn.Module):
    """GenomicBenchmarks' CNN: bases (B, length) uint8 -> (B, n_out).

    As published since June 2022, it has no non-linearity after the second and third convolution (before, each
    had a ReLU) or between the linear layers."""

    def __init__(self, length, n_out):
        super().__init__()
        self.length = length                                 # bases; shorter sequences end in N
        width = length
        for _ in range(3):
            width = (width - 7) // 2                         # convolution of 8, pooling of 2
        if width < 1:
            raise ValueError(f"--init cnn: {length} bases are too few for 3 convolutions; use another --init")
        self.emb = nn.Embedding(5, 100)
        self.convs = nn.Sequential(
            nn.Conv1d(100, 16, 8), nn.BatchNorm1d(16), nn.ReLU(), nn.MaxPool1d(2),
            nn.Conv1d(16, 8, 8), nn.BatchNorm1d(8), nn.MaxPool1d(2),
            nn.Conv1d(8, 4, 8), nn.BatchNorm1d(4), nn.MaxPool1d(2))
        self.hidden, self.out = nn.Linear(4 * width, 512), Outputs(512, n_out)

    def forward(self, bases):
        x = self.convs(self.emb(bases.long()).transpose(1, 2))                 # (B, 4, width)
        return self.out(self.hidden(x.flatten(1)))


class Penguinn(nn.Module):
    """PENGUINN (Klimentova et al. 2020), the CNN of Martinek et al.: bases (B, length) uint8 -> (B, n_out).

    binary: as published, one logit z, here as two outputs (0, z), whose cross-entropy is that of sigmoid(z).
    Batch norm and initial weights are Keras's."""

    def __init__(self, length, n_out, binary):
        super().__init__()
        self.length, self.binary = length, binary            # shorter sequences end in N, which is all zeros
        if length < 16:
            raise ValueError(f"--init penguinn: {length} bases are too few; use another --init")
        layers, widths = [], (4, 16, 8, 4, 3)
        for C, D in itertools.pairwise(widths):              # padding "same"
            layers += [nn.ZeroPad1d((3, 4)), nn.Conv1d(C, D, 8), nn.ReLU(), nn.BatchNorm1d(D, 1e-3, 0.01),
                       nn.MaxPool1d(2), nn.Dropout(0.3)]
        self.convs, self.hidden = nn.Sequential(*layers), nn.Linear(3 * (length // 16), 512)
        self.norm, self.out = nn.BatchNorm1d(512, 1e-3, 0.01), Outputs(512, 1 if binary else n_out)
        for layer in self.modules():
            if isinstance(layer, (nn.Conv1d, nn.Linear)):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, bases):
        x = self.convs(F.one_hot(bases.long(), 5)[..., :4].float().transpose(1, 2))
        x, norm = F.relu(self.hidden(x.flatten(1))), self.norm                 # x was (B, 3, width)
        alone = len(x) == 1                                  # has no variance: takes the running one
        x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias,
                         self.training and not alone, norm.momentum, norm.eps)
        x = self.out(F.dropout(x.float(), 0.2, self.training))
        return F.pad(x, (1, 0)) if self.binary else x


class Outputs(nn.Linear):
    """The last layer, in float32 also under autocast: bf16 is too coarse for a large target."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def concatenated(pool, pooled):
    """Returns pooled("mean"), pooled("cls") or, where pool is "both", the two side by side: (B, 2 C)."""
    return torch.cat([pooled("mean"), pooled("cls")], 1) if pool == "both" else pooled(pool)


def summed(pool, x, real):
    """Sums x (B, T, C), in float32, where real[pool] (B, T) is True, and counts the terms: both (B, C) or
    (B, 2 C)."""
    x = x.float()
    sums = concatenated(pool, lambda pool: (x * real[pool][..., None]).sum(1))
    n = concatenated(pool, lambda pool: real[pool].sum(1, keepdim=True).expand(-1, x.shape[2]))
    return sums, n.float()


def covered(x, starts, n, k=1, stride=1):
    """Returns the first n states of each row of x (B, T, C): (N, C), and the bases each covers (N, k)."""
    at, starts, n = torch.arange(x.shape[1]), torch.from_numpy(starts), torch.from_numpy(n)
    real = at < n[:, None]
    first = (starts[:, None] + at * stride)[real]
    return x.float().cpu()[real], first[:, None] + torch.arange(k)


def over_bases(x, covered, n):
    """Averages for each of n bases the rows of x (N, C) that cover it: (n, C), NaN where none does; covered
    (N, width): the bases of each row."""
    x, total = F.pad(x.float(), (0, 1), value=1.0), torch.zeros(n, x.shape[1] + 1)
    for at in covered.T:
        total.index_add_(0, at, x)
    return total[:, :-1] / total[:, -1:]


def in_parts(function, size, *windows):
    """Calls function(*windows) on at most `size` windows at a time; for a gradient, computes each part twice.

    windows: tensors with a row a window, or None; the function returns one such tensor or several."""
    if len(windows[0]) <= size:
        return function(*windows)
    if torch.is_grad_enabled():
        function = functools.partial(checkpoint, function, use_reentrant=False)
    parts = zip(*(itertools.repeat(None) if x is None else x.split(size) for x in windows))
    parts = [function(*part) for part in parts]
    return torch.cat(parts) if torch.is_tensor(parts[0]) else [torch.cat(x) for x in zip(*parts)]


def by_sequence(x, n_windows):
    """Sums x (windows, C) over the windows of each sequence; n_windows (B,): how many it has."""
    owner = torch.arange(len(n_windows), device=x.device)
    owner = owner.repeat_interleave(n_windows, output_size=len(x))             # without it, a GPU would wait
    return x.new_zeros(len(n_windows), x.shape[1]).index_add(0, owner, x)


def over_windows(x, n_windows):
    """Averages x (windows, C) over the windows of each sequence; n_windows None: one window each."""
    return x if n_windows is None else by_sequence(x, n_windows) / n_windows[:, None]


def pooled(total, n, n_windows=None):
    """Turns what `summed` returns for each window into means (B, C) over all windows of a sequence."""
    if n_windows is not None:
        total, n = (by_sequence(x.float(), n_windows) for x in (total, n))
    return total / n.clamp(min=1)


def log_p(bert, tokens, mask, stride):
    """Sums log P over the k bases of each k-mer of a row, and counts these bases: (B, 1) each.

    A pass hides every `passes`-th run of `stride` bases, by masking all k-mers over it. P of a base is its
    share among the four k-mers that have the other bases right."""
    k, real = bert.config.k, tokens > MASK
    column, letter = (torch.arange(n, device=tokens.device) for n in (tokens.shape[1], 4))
    span, total = math.ceil(k / stride), torch.zeros(len(tokens), device=tokens.device)
    passes = math.ceil(span / MASKED)
    for i in range(passes):
        run = ((i - column) % passes).expand_as(tokens)      # that is hidden, in each k-mer
        hidden = real & (run < span)
        logits = bert.decode(bert.encode(tokens.masked_fill(hidden, MASK), mask)[hidden]).float()
        ids, row = tokens[hidden] - 5, hidden.nonzero()[:, 0]
        for j in range(stride):
            base = run[hidden] * stride + j
            unit = 4 ** (k - 1 - base).clamp(min=0)          # of this base in the number of the k-mer
            digit = ids // unit % 4
            four = (ids - digit * unit)[:, None] + unit[:, None] * letter + 5
            log_p = logits.gather(1, four).log_softmax(1).gather(1, digit[:, None])[:, 0]
            total.index_add_(0, row, log_p * (base < k))
    return total[:, None], k * real.sum(1, keepdim=True).float()


def flag_of(name, size):
    """Returns the flag of a pretraining script, and its value, for a part of a network's config."""
    if name == "vocab_size":
        return f"--k {next((k for k in range(1, 9) if 4 ** k + 5 == size), '?')}"
    plain = {"length": f"--length + --n_cls {size}", "n_inner": f"--n_inner {size} (only cm_gems.py has it)"}
    return plain.get(name, f"--{name} {size}")


def copy_weights(model, init, load):
    """Loads weights into `model` from --init: a checkpoint that load(path) reads, hf:FOLDER or findna:FILE.

    ValueError if the sizes differ; it names the flags."""
    if init.startswith("hf:") and isinstance(model, Bert):
        source = load_hf(init[3:])
        config, weights = vars(source.config), source.state_dict()
    elif init.startswith("findna:") and isinstance(model, BaseModel):
        config, weights = load_findna(init[7:])
    elif init.startswith(("hf:", "findna:")):
        raise ValueError(f"--init {init}: hf: is for BERTs, findna: for findna.py; give a checkpoint")
    else:
        state = load(init)
        config, weights = state["config"], state["model"]
    differ = {name: config.get(name) for name, size in vars(model.config).items()
              if name != "dropout" and config.get(name) != size}
    if None in differ.values():
        raise ValueError(f"--init {init}: another kind of network; use one that this script has made")
    if differ:
        flags = ", ".join(map(flag_of, differ, differ.values()))
        raise ValueError(f"--init {init}: a network of {flags}; set the flags to match")
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        reason = str(e).splitlines()[-1]
        raise ValueError(f"--init {init}: {reason!r:.80}; is it the same kind of network?") from None


def labelled_positions(labels, capacity=None):
    """Returns flat indices (N,) of the labelled positions of labels (B, T), in order, and their labels (N,).

    N = capacity; spare slots have label -100 and each another index, since the backward pass on a GPU goes
    through equal ones in turn. Without capacity, N is the next multiple of 256:
    if the shape changed at every step, a CPU's heap would fragment and grow without end."""
    flat = labels.flatten()
    wanted = flat != -100
    if capacity is None:
        capacity = -(-int(wanted.sum()) // 256) * 256
    number = wanted.cumsum(0) - 1
    slot = torch.where(wanted & (number < capacity), number, capacity)
    at = torch.arange(capacity + 1, device=flat.device) % len(flat)
    at = at.scatter(0, slot, torch.arange(len(flat), device=flat.device))[:capacity]
    used = torch.arange(capacity, device=flat.device) <= number[-1]
    return at, torch.where(used, flat[at], -100)


def mask_capacity(n_tokens, share, span):
    """Returns an upper bound on masked tokens out of n_tokens, a share masked in spans: mean + 10 sd."""
    return min(n_tokens, math.ceil(n_tokens * share + 10 * math.sqrt(share * (1 - share) * span * n_tokens)))


def vocabulary(k):
    """Lists tokens in id order: 5 specials, then k-mers as base-4 numbers of A,T,C,G (DNABERT's order)."""
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map("".join, itertools.product("ATCG", repeat=k))]


HF_SIZES = {"vocab_size": "vocab_size", "block_size": "max_position_embeddings",
            "n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size",
            "n_inner": "intermediate_size", "dropout": "hidden_dropout_prob"}  # BertConfig: config.json
STOCK = {"model_type": "bert", "hidden_act": "gelu", "layer_norm_eps": NORM_EPS, "type_vocab_size": 2,
         "is_decoder": False, "position_embedding_type": "absolute"}
KMER_COUNTS = [4 ** k for k in range(1, 20)]
MODULES = {                                                  # ours: in transformers (qkv: three, stacked)
    "tok_emb": ["bert.embeddings.word_embeddings"], "pos_emb": ["bert.embeddings.position_embeddings"],
    "type_emb": ["bert.embeddings.token_type_embeddings"], "ln_emb": ["bert.embeddings.LayerNorm"],
    "qkv": ["attention.self.query", "attention.self.key", "attention.self.value"],
    "proj": ["attention.output.dense"], "ln_attn": ["attention.output.LayerNorm"],
    "fc": ["intermediate.dense"], "fc_out": ["output.dense"], "ln_mlp": ["output.LayerNorm"],
    "head": ["cls.predictions.transform.dense"], "ln_head": ["cls.predictions.transform.LayerNorm"],
    "pooler": ["bert.pooler.dense"], "out": ["classifier"]}


def kmer_normalizer(k, stride):
    """Returns a tokenizer.json's rules (regex, text) that turn DNA, or k-mers between spaces, into k-mers.

    Each base (upper case) is followed by copies (lower case) of the k - 1 bases behind it: ACGT with k = 3
    becomes AcgCgtGtT. What is shorter than k, or between two strides, is removed; spaces part the rest."""
    base, copy, upper = "[ACGTN]", "[acgtn]", [(letter.lower(), letter) for letter in "ACGTN"]
    rules = [*upper, (r"[^\sACGTN]", "N")]
    for ahead in range(k - 1):                               # before the next base: what stands ahead
        rules += [(f"(?<=[A-Za-z])(?=(?:{base}{copy}*){{{ahead}}}{letter})", low) for low, letter in upper]
    whole = f"{base}{copy}{{{k - 1}}}"
    rules += [(f"{base}{copy}{{0,{k - 2}}}(?!{copy})", "")] if k > 1 else []
    rules += [(rf"{whole}\K(?:{whole}){{1,{stride - 1}}}", "")] if stride > 1 else []
    return [*rules, (f"(?={base})", " "), *upper]


def kmer_tokenizer(k, stride):
    """Makes a tokenizer.json (package tokenizers) that turns DNA, or a pair, into [CLS], k-mers, [SEP].

    Its ids are those of vocabulary(k)."""
    words = vocabulary(k)
    single = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
              {"SpecialToken": {"id": "[SEP]", "type_id": 0}}]
    second = [{"Sequence": {"id": "B", "type_id": 0}}, {"SpecialToken": {"id": "[SEP]", "type_id": 0}}]
    return {
        "version": "1.0", "truncation": None, "padding": None, "decoder": None,
        "added_tokens": [{"id": i, "content": word, "special": True, "normalized": False, "lstrip": False,
                          "rstrip": False, "single_word": False} for i, word in enumerate(words[:5])],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Replace", "pattern": {"Regex": pattern}, "content": text}
            for pattern, text in kmer_normalizer(k, stride)]},
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {w: i for i, w in enumerate(words)}},
        "post_processor": {
            "type": "TemplateProcessing", "single": single, "pair": single + second, "special_tokens": {
                word: {"id": word, "ids": [i], "tokens": [word]} for i, word in enumerate(words[:5])}}}


def stock_names(name):
    """Turns our name of a parameter, of a Bert or a classifier, into its names in transformers."""
    if name.endswith("head_bias"):
        return ["cls.predictions.bias"]
    *block, module, kind = name.removeprefix("bert.").split(".")               # blocks, 3, qkv, weight
    prefix = f"bert.encoder.layer.{block[1]}." if block else ""
    return [f"{prefix}{stock}.{kind}" for stock in MODULES[module]]


def safetensors_torch():
    """Imports safetensors.torch, which only model.safetensors needs; ValueError if it is missing."""
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError("the package safetensors (for model.safetensors) is missing; run "
                         "pip install safetensors, or pip install -r tools/requirements.txt") from None
    return safetensors.torch


def save_folder(folder, tensors, files):
    """Writes tensors to model.safetensors, and files {name: text or JSON}, into a new or empty folder.

    An exception leaves no folder. ValueError if it is in use."""
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise ValueError(f"{folder}: already exists; give a new folder for the export")
    files = {"model.safetensors": safetensors_torch().save(tensors, {"format": "pt"})} | files
    os.makedirs(folder, exist_ok=True)
    try:
        for name, content in files.items():
            if not isinstance(content, bytes):
                content = (content if isinstance(content, str) else json.dumps(content, indent=1)).encode()
            with open(os.path.join(folder, name), "wb") as f:
                f.write(content)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


HOW = {"pairs": False, "strands": "forward", "long": "chunk"}                  # how sequences are read


def save_hf(model, folder, classes=(), problem="single_label_classification", card="", stride=1):
    """Writes a folder that transformers loads; its tokenizer takes DNA, or k-mers between spaces.

    model: a Bert, exported with the identity as its (untrained) pooler; or a classifier with .bert, .pooler
    and .out, the names of its outputs in classes, and transformers' problem_type. stride: bases from one
    k-mer to the next, which load_hf reads back. ValueError if the folder exists and is not empty."""
    c, tensors = getattr(model, "bert", model).config, {}
    for ours, tensor in model.state_dict().items():
        names = stock_names(ours)
        tensors |= zip(names, [part.clone() for part in tensor.cpu().chunk(len(names))])
    config = STOCK | {stock: getattr(c, ours) for ours, stock in HF_SIZES.items()} | {
        "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": c.dropout,
        "torch_dtype": "float32", "stride": stride}
    if classes:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("cls.")}
        config |= {"architectures": ["BertForSequenceClassification"],
                   "id2label": {str(i): name for i, name in enumerate(classes)},
                   "label2id": {name: i for i, name in enumerate(classes)},
                   "problem_type": problem} | {name: getattr(model, "spec", {}).get(name, plain)
                                               for name, plain in HOW.items()}
    else:
        tensors |= {"bert.pooler.dense.weight": torch.eye(c.n_embd),
                    "bert.pooler.dense.bias": torch.zeros(c.n_embd)}
    words = {f"{word[1:-1].lower()}_token": word for word in vocabulary(1)[:5]}
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": c.block_size} | words
    files = {"config.json": config, "tokenizer_config.json": tokenizer,
             "tokenizer.json": kmer_tokenizer(c.k, stride),
             "vocab.txt": "".join(f"{word}\n" for word in vocabulary(c.k))}
    if card:
        files["README.md"] = card
    save_folder(folder, tensors, files)


def read_json(path):
    """Reads the object in a JSON file; raises if there is none."""
    if os.path.exists(path) and not os.path.isfile(path):    # a device, which never ends
        raise ValueError(f"{path}: not a regular file; give another folder")
    with open(path) as f:
        return dict(json.load(f))


def is_kmer_bert(found):
    """Tells whether config.json is of a BERT whose vocab_size, if an int, fits 5 specials and all k-mers."""
    V = found.get("vocab_size")
    return found.get("model_type", "bert") == "bert" and (type(V) is not int or V - 5 in KMER_COUNTS)


def read_config(path):
    """Reads config.json: (BertConfig, its content); raises unless it describes a stock BERT over k-mers."""
    found = {"hidden_dropout_prob": 0.1, "stride": 1} | STOCK | read_json(path)
    for key, value in STOCK.items():
        if found[key] != value:
            raise ValueError(f"{key} is {found[key]!r:.80}, expected {value!r}")
    config = BertConfig(**{ours: found.get(stock) for ours, stock in HF_SIZES.items()})
    if config.k > 8:
        raise ValueError(f"{config.k}-mers, expected at most 8-mers")
    if type(found["stride"]) is not int or not 1 <= found["stride"] <= config.k:
        raise ValueError(f"stride is {found['stride']!r:.80}, expected 1 to {config.k}")
    return config, found


def load_bin(path):
    """Loads what torch.save wrote; raises if it is compressed, or one tensor is larger than the file."""
    size = os.path.getsize(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as z:
            if sum(member.file_size for member in z.infolist()) > size:
                raise ValueError("compressed")
    found = torch.load(path, map_location="cpu", weights_only=True)
    parts = [found, *(part for part in found.values() if isinstance(part, dict))]      # FinDNA's two networks
    if any(torch.is_tensor(x) and x.nbytes > size for part in parts for x in part.values()):
        raise ValueError("a tensor larger than the file")
    return found


def hf_tensors(folder, names=("model.safetensors", "pytorch_model.bin")):
    """Reads the weights of a Hugging Face folder: (tensors, path). Replaces old names; drops the decoder and,
    without a classifier, the pooler."""
    path = next(filter(os.path.isfile, (os.path.join(folder, name) for name in names)), None)
    if path is None:
        raise ValueError(f"{folder}: no model.safetensors or pytorch_model.bin; download the weights too")
    read = load_bin if path.endswith(".bin") else safetensors_torch().load_file
    try:
        tensors = {name.replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias"): tensor
                   for name, tensor in read(path).items()}
        if not all(map(torch.is_tensor, tensors.values())):
            raise TypeError("not a dict of tensors")
    except Exception as e:                                   # hostile bytes can raise anything
        raise ValueError(f"{path}: cannot be read ({e!r:.80}); download it again") from None
    if "embeddings.word_embeddings.weight" in tensors:       # a bare BertModel
        tensors = {f"bert.{name}": tensor for name, tensor in tensors.items()}
    decoder = tensors.pop("cls.predictions.decoder.weight", None)
    tied = tensors.get("bert.embeddings.word_embeddings.weight")
    if decoder is not None and (tied is None or not torch.equal(decoder, tied)):
        raise ValueError(f"{path}: the decoder is not tied to the embeddings; such models are not supported")
    unused = ["cls.predictions.decoder.bias", "bert.embeddings.position_ids", "cls.seq_rel"]
    if "classifier.weight" not in tensors:
        unused.append("bert.pooler.")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(tuple(unused))}, path


def kmer_order(folder, k):
    """Lists the ids that the folder's vocab.txt or tokenizer.json gives to the words of vocabulary(k)."""
    text, fast = (os.path.join(folder, name) for name in ("vocab.txt", "tokenizer.json"))
    path, ours = text if os.path.exists(text) else fast, vocabulary(k)
    if not os.path.exists(path):
        print(f"{text} is missing: assuming the k-mer order A,T,C,G (DNABERT's)", flush=True)
        return list(range(len(ours)))
    if not os.path.isfile(path):                             # a device, which never ends
        raise ValueError(f"{path}: not a regular file; give another folder")
    try:
        ids = read_json(path)["model"]["vocab"] if path == fast else \
            {word: i for i, word in enumerate(open(path, errors="replace").read().split())}
        order = [int(ids[word]) for word in ours]
    except (LookupError, ValueError, TypeError, RecursionError):
        order = []
    if sorted(order) != list(range(len(ours))):
        raise ValueError(f"{path}: expected 5 specials and the {k}-mers of A, C, G, T, in any order")
    if order != list(range(len(ours))):
        print(f"{path}: another k-mer order than A,T,C,G; the weights are reordered", flush=True)
    return order


def assign_weights(model, tensors, needs_head):
    """Moves tensors of a folder into a Bert on the meta device; a missing head that nobody needs is 0."""
    headless = not needs_head and "cls.predictions.bias" not in tensors
    model.load_state_dict({
        name: torch.zeros(tensor.shape) if headless and "head" in name else
        torch.cat([tensors.pop(stock) for stock in stock_names(name)]).float()
        for name, tensor in model.state_dict().items()}, assign=True)


def read_outputs(tensors, found, path):
    """Takes pooler and classifier out of tensors: (their weights, names of the classes, problem_type)."""
    weights = {}
    for name in ("pooler.weight", "pooler.bias", "out.weight", "out.bias"):
        [stock] = stock_names(name)
        if stock not in tensors:
            raise ValueError(f"{path}: a classifier without {stock}; download the model again")
        weights[name] = tensors.pop(stock).float()
    n, names = len(weights["out.bias"]), found.get("id2label")
    names = names if isinstance(names, dict) else {}
    classes = [str(names.get(str(i), f"LABEL_{i}")) for i in range(n)]
    return weights, classes, found.get("problem_type") or ("regression" if n == 1 else None)


def read_hf(folder, needs_head=True):
    """Reads a folder with a BERT over k-mers: (Bert, its stride, read_outputs or None).

    ValueError, in one line, for another architecture or vocabulary, and for missing or unknown weights."""
    path = os.path.join(folder, "config.json")
    try:
        config, found = read_config(path)
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise ValueError(f"{path}: {str(e):.200}; give a folder with a stock BERT over k-mers") from None
    tensors, path = hf_tensors(folder)
    if config.n_layer > len(tensors):
        raise ValueError(f"{path}: {len(tensors)} tensors for {config.n_layer} layers in config.json")
    try:
        with torch.device("meta"):                           # allocates nothing
            model = Bert(config)
        assign_weights(model, tensors, needs_head)
    except KeyError as e:
        raise ValueError(f"{path}: no weights {e}; a BERT with its masked-LM head is needed") from None
    except RuntimeError as e:
        raise ValueError(f"{path}: {str(e).splitlines()[-1]!r:.80}; config and weights disagree") from None
    outputs = read_outputs(tensors, found, path) if "classifier.weight" in tensors else None
    if tensors:
        raise ValueError(f"{path}: unknown weights {sorted(tensors)!r:.80}; is it another model?")
    order = torch.tensor(kmer_order(folder, config.k))
    with torch.no_grad():                                    # rows of the embedding in our order
        model.tok_emb.weight.copy_(model.tok_emb.weight[order])
        model.head_bias.copy_(model.head_bias[order])
    return model, found["stride"], outputs


def load_hf(folder):
    """Loads a Bert, with its masked-LM head, from config.json and model.safetensors or pytorch_model.bin."""
    return read_hf(folder)[0]


def transformers_package():
    """Imports and quiets transformers, which only folders of other networks need; OSError if missing."""
    try:
        import transformers
    except ImportError:
        raise OSError("the package transformers (for networks other than a BERT over k-mers) is missing; "
                      "run pip install transformers, or pip install -r tools/requirements.txt") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


LOCAL = {"trust_remote_code": False, "local_files_only": True}                 # no code, no downloads
HF_UNUSED = "pooler", "contact_head"                         # parts for transformers' own tasks
FROM_CONFIG = "position_ids", "inv_freq"                     # in old files; they follow from the config


def make_other(config, dropout=None):
    """Makes the network of transformers that a config.json describes, with random weights.

    dropout: replaces every dropout of the config. ValueError in one line."""
    transformers = transformers_package()
    try:
        config = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config)
        if config.is_encoder_decoder or config.num_hidden_layers > 1000:
            raise ValueError("only encoders of at most 1,000 layers are supported")
        for name, value in list(vars(config).items()):
            if dropout is not None and type(value) in (int, float) and re.search("dropout|pdrop", name):
                setattr(config, name, dropout)
        net = transformers.AutoModel.from_config(config, trust_remote_code=False, dtype=torch.float32)
    except Exception as e:                                   # hostile settings can raise anything
        raise ValueError(f"transformers {transformers.__version__} cannot make a network of config.json "
                         f"({type(e).__name__} {str(e).strip()!r:.100})") from None
    for name in HF_UNUSED:
        if hasattr(net, name):
            setattr(net, name, None)
    return net.train()


def make_tokenizer(files):
    """Makes a tokenizer of transformers from its files {name: text}. ValueError in one line."""
    transformers = transformers_package()
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            with open(os.path.join(folder, os.path.basename(name)), "w", encoding="utf-8") as f:
                f.write(text)
        try:
            return transformers.AutoTokenizer.from_pretrained(folder, **LOCAL)
        except Exception as e:                               # as above
            raise ValueError(f"transformers {transformers.__version__} cannot make the tokenizer "
                             f"({str(e).strip()!r:.100})") from None


def kmer_spans(text, k, stride):
    """Cuts a DNA string into k-mers without N, and the rest into letters: first base, width of each token."""
    starts, widths = [], []
    for run in re.finditer("[ACGT]+|N+", text):
        (start, end), n = run.span(), 0
        if run[0][0] != "N" and end - start >= k:
            n = (end - start - k) // stride + 1
        rest = range(start + (n - 1) * stride + k if n else start, end)
        starts += [*range(start, start + n * stride, stride), *rest]
        widths += [k] * n + [1] * len(rest)
    return np.array(starts), np.array(widths)


def tokens_of(tokenizer, text, k, stride):
    """Tokenizes DNA: ids, first bases, widths of tokens, int64 (3, n). stride None: as the tokenizer does."""
    if stride:
        starts, widths = kmer_spans(text, k, stride)
        ids = tokenizer.convert_tokens_to_ids([text[i:i + n] for i, n in zip(starts, widths)])
    elif tokenizer.is_fast:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, (starts, ends) = found["input_ids"], np.array(found["offset_mapping"]).reshape(-1, 2).T
        widths = ends - starts
    else:
        words = tokenizer.tokenize(text)
        ids, widths = tokenizer.convert_tokens_to_ids(words), np.array(list(map(len, words)))
        starts = widths.cumsum() - widths
    return np.array([ids, starts, widths], np.int64)


def tokenizer_facts(net, tokenizer, stride):
    """Returns the ids before and after a sequence, k, and how many tokens fit between them in a window.

    k is 0 where the vocabulary lacks some k-mers. ValueError for a tokenizer that does not read DNA, or does
    not fit the network or the stride."""
    dna, vocabulary = "ACGTTGCAAGCT" * 4, tokenizer.get_vocab()
    ids, bare = tokenizer(dna)["input_ids"], tokenizer(dna, add_special_tokens=False)["input_ids"]
    n = next((i for i in range(len(ids)) if ids[i:i + len(bare)] == bare), None)
    if n is None or not bare or tokenizer.unk_token_id in bare:
        raise ValueError(f"its tokenizer does not read DNA: {dna[:12]} becomes "
                         f"{tokenizer.convert_ids_to_tokens(bare[:3])}")
    if max(vocabulary.values()) >= net.get_input_embeddings().num_embeddings:
        raise ValueError(f"its tokenizer has {len(vocabulary)} tokens, more than the network")
    lengths = collections.Counter(len(word) for word in vocabulary if not word.strip("ACGT"))
    k = max(lengths, default=0)
    k = k if lengths[k] == 4 ** k else 0
    if stride and not 1 <= stride <= k:
        takes = f"takes a stride of 1 to {k}" if k else "is not one of k-mers; drop the flag"
        raise ValueError(f"--stride {stride}: its vocabulary {takes}")
    sizes = [tokenizer.model_max_length, getattr(net.config, "max_position_embeddings", None) or 10 ** 9]
    for name, module in net.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            offset = 0 if module.padding_idx is None else module.padding_idx + 1   # as RoBERTa counts them
            sizes.append(module.num_embeddings - offset)
    return ids[:n], ids[n + len(bare):], k, int(min(sizes)) - len(ids) + len(bare)


def read_other(folder):
    """Loads AutoModel and AutoTokenizer of a folder: (network, tokenizer files, names of unused weights)."""
    transformers = transformers_package()
    net, found = transformers.AutoModel.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **LOCAL)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **LOCAL)
    wrong = [*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])]
    wrong = [name for name in wrong if not name.startswith(HF_UNUSED)]
    unused = [name for name in found["unexpected_keys"] if not name.endswith(FROM_CONFIG)]
    spare = [name for name in HF_UNUSED if hasattr(net, name) and not any(
        lost.startswith(name) for lost in found["missing_keys"])]
    parts, prefix = [name for name, _ in net.named_children()], f"{net.base_model_prefix}."
    wrong += [name for name in unused if name.removeprefix(prefix).split(".")[0] in parts]
    if wrong:
        raise ValueError(f"weights and config.json disagree ({sorted(wrong)[0]})")
    with tempfile.TemporaryDirectory() as tmp:
        tokenizer.save_pretrained(tmp)
        files = {name: open(os.path.join(tmp, name), encoding="utf-8").read() for name in os.listdir(tmp)}
    return net, files, sorted({*spare, *(name.split(".")[0] for name in unused)})


def load_other(folder):
    """Loads a folder of any encoder that transformers implements: (config, tokenizer files, weights).

    Never runs code of the folder. ValueError in one line."""
    transformers_package()
    path = os.path.join(folder, "config.json")
    config = read_json(path)
    if "AutoModel" in str(config.get("auto_map")):
        raise ValueError(f"{path}: asks for the folder's own code (auto_map), which is never run "
                         f"(trust_remote_code=False); give a folder of a network that transformers has")
    try:
        with torch.device("meta"):                           # allocates nothing
            n_weights = sum(p.numel() for p in make_other(config).parameters())
        files = [name for name in os.listdir(folder) if name.endswith((".bin", ".safetensors"))]
        if n_weights > sum(os.path.getsize(os.path.join(folder, name)) for name in files):
            raise ValueError(f"{n_weights:,} weights in config.json, fewer in the files")
        net, files, unused = read_other(folder)
    except Exception as e:                                   # foreign files can raise anything
        reason = str(e).strip().splitlines() or [repr(e)]
        raise ValueError(f"{folder}: {reason[0]:.250} (trust_remote_code=False); give a folder of an encoder "
                         f"that transformers has, with weights and tokenizer") from None
    print(f"{folder}: {type(net).__name__} of transformers (trust_remote_code=False); weights not used: "
          f"{', '.join(unused) or 'none'}", flush=True)
    weights = {name: tensor for name, tensor in net.state_dict().items() if not name.startswith(HF_UNUSED)}
    return config, files, weights


SWAN = re.compile(r"encoder\.SwanDNA_blocks\.(\d+)\.SwanDNA_blocks\.(\d+)\.(?:\w+\.)*(fc[12])\.(weight|bias)")
SWAN_CHANNELS = [0, 1, 2, 4, 3]                              # their a, c, g, n, t in our order A, C, G, T, N


def findna_names(tensors):
    """Renames weights of the released layout: {our name in a BaseModel: tensor}, number of blocks a layer."""
    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    at = {name: match.groups() for name in tensors if (match := SWAN.fullmatch(name))}
    n_blocks = 1 + max((int(block) for _, block, *_ in at.values()), default=-1)
    ours = {f"backbone.blocks.{int(layer) * n_blocks + int(block)}.{module}.{kind}": tensors[name]
            for name, (layer, block, module, kind) in at.items()}
    ours |= {"backbone.proj.weight": tensors["embedding.weight"][:, SWAN_CHANNELS],
             "backbone.proj.bias": tensors["embedding.bias"],
             "head.weight": tensors["linear.weight"][SWAN_CHANNELS],
             "head.bias": tensors["linear.bias"][SWAN_CHANNELS]}
    if len(ours) != len(tensors):
        raise LookupError("weights with other names")
    return {name: tensor.float().contiguous() for name, tensor in ours.items()}, n_blocks


def load_findna(path, network=None):
    """Loads FinDNA's released weights: (ChordMixerConfig as a dict, weights of a BaseModel).

    network: teacher (default) or student. ValueError, in one line, for any other file."""
    try:
        found = load_bin(path)
        found = found.get((network or "teacher").capitalize(), found)
        weights, n_blocks = findna_names(found)
        C, hidden = len(weights["backbone.proj.bias"]), len(weights["backbone.blocks.0.fc1.bias"])
        n_layer = (len(weights) - 4) // (4 * n_blocks)
        length = 1010 if n_blocks == 10 else 2 ** n_blocks   # the paper's 1,000 bases and 10 [CLS]
        config = ChordMixerConfig(length, n_layer, C // (n_blocks + 1), hidden)
        with torch.device("meta"):
            BaseModel(ChordMixer(config)).load_state_dict(weights, assign=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; check the path") from None
    except Exception as e:                                   # hostile bytes can raise anything
        raise ValueError(f"{path}: not FinDNA's released weights ({e!r:.80}); use another file") from None
    return dataclasses.asdict(config), weights
