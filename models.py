"""The networks, in plain torch: Bert (post-LN, as in DNABERT and RandomMask) and its classification head;
ChordMixer (FinDNA) and a transformer encoder over one-hot bases, with theirs; the CNN baseline; Hugging Face
import and export.

Bert is bert-base's architecture over a k-mer vocabulary; sizes are numbers: 12 layers of 768 give DNABERT's
89,196,549 parameters, 4 of 256 RandomMask's BERT-mini, 2 of 256 with n_head 8, n_inner 3072 LOGO (GeneMask).
"""
import dataclasses
import itertools
import json
import math
import os
import zipfile

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

PAD = 0
EPS = 1e-12                                                  # of LayerNorm (DNABERT's config.json)


@dataclasses.dataclass
class BertConfig:
    """Defaults: DNABERT's config.json (bert-base, k = 6). ValueError where the sizes do not fit together."""
    vocab_size: int = 4101                                   # 4**6 k-mers + 5 specials
    block_size: int = 512                                    # positions, [CLS] and [SEP] included
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_inner: int = 3072
    dropout: float = 0.1                                     # of hidden states and of attention weights

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"--n_embd {self.n_embd}: not a multiple of --n_head {self.n_head}; change one")

    @property
    def k(self):
        k = round(math.log(max(self.vocab_size - 5, 1), 4))
        if 4 ** k + 5 != self.vocab_size:
            raise ValueError(f"vocabulary of {self.vocab_size} tokens: not 4**k k-mers and 5 specials")
        return k


def attend(q, k, v, mask, dropout, need_weights):
    """Softmax attention over (B, H, T, D): (output, weights or None). mask: bool (B, T), True = real token.

    SDPA, but for where it is slower: on a CPU under bf16 autocast (1.5x) or with dropout (3x), as measured.
    """
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
    """One transformer layer, LayerNorm after each residual sum (post-LN)."""

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head, self.p = config.n_head, config.dropout
        self.qkv, self.proj, self.ln_attn = nn.Linear(C, 3 * C), nn.Linear(C, C), nn.LayerNorm(C, EPS)
        self.fc, self.fc_out = nn.Linear(C, config.n_inner), nn.Linear(config.n_inner, C)
        self.ln_mlp = nn.LayerNorm(C, EPS)

    def forward(self, x, mask=None, need_weights=False, first=None):
        B, T, C = x.shape
        p = self.p if self.training else 0.0
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                 # (B, H, T, D) each
        x, q = x[:, :first], q[:, :, :first]                 # all, or what the caller needs
        y, weights = attend(q, k, v, mask, p, need_weights)
        x = self.ln_attn(x + F.dropout(self.proj(y.transpose(1, 2).flatten(2)), p))
        return self.ln_mlp(x + F.dropout(self.fc_out(F.gelu(self.fc(x))), p)), weights


class Bert(nn.Module):
    """bert(tokens) -> logits (B, T, V); bert(inputs, labels) -> (loss sum over labelled positions, count)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        C, V = config.n_embd, config.vocab_size
        self.tok_emb = nn.Embedding(V, C, padding_idx=PAD)   # also the decoder of the masked-LM head
        self.pos_emb = nn.Embedding(config.block_size, C)
        self.type_emb = nn.Embedding(2, C)                   # BERT's segments; DNA has one, always row 0
        self.ln_emb = nn.LayerNorm(C, EPS)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.head, self.ln_head = nn.Linear(C, C), nn.LayerNorm(C, EPS)
        self.head_bias = nn.Parameter(torch.zeros(V))
        for name, p in self.named_parameters():              # N(0, 0.02), biases 0 (DNABERT's config.json)
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        with torch.no_grad():
            self.tok_emb.weight[PAD] = 0

    def encode(self, tokens, mask=None, need_weights=False, first=None):
        """tokens (B, T) -> hidden states (B, T, C); with need_weights also the attention of each layer.

        mask: bool (B, T), True = real token; None where no row is padded (fast path). Attention (B, H, T, T).
        first: only the first so many hidden states, which spares the last layer the work of the others.
        """
        T, p = tokens.shape[1], self.config.dropout if self.training else 0.0
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens for {self.config.block_size} positions; use shorter sequences")
        x = self.tok_emb(tokens) + self.pos_emb.weight[:T] + self.type_emb.weight[0]
        x, all_weights = F.dropout(self.ln_emb(x), p), []
        for i, block in enumerate(self.blocks, 1):
            x, weights = block(x, mask, need_weights, first if i == len(self.blocks) else None)
            all_weights.append(weights)
        return (x, all_weights) if need_weights else x

    def decode(self, x):
        """Hidden states (N, C) -> logits (N, V'): V' = V rounded up to 64 for fast GEMMs, the rest -inf."""
        x = self.ln_head(F.gelu(self.head(x)))
        extra = -self.config.vocab_size % 64
        bias = F.pad(self.head_bias, (0, extra), value=-math.inf)
        return F.linear(x, F.pad(self.tok_emb.weight, (0, 0, 0, extra)), bias)

    def forward(self, inputs, labels=None, mask=None, capacity=None):
        """Logits, or (loss_sum, count) where labels (B, T) are given (-100 = no loss).

        Only labelled positions reach the decoder. capacity: how many at most, as a static shape, so a GPU
        need not wait for their number (mask_capacity); if there are more the loss is NaN, never a wrong one.
        """
        x = self.encode(inputs, mask)                        # (B, T, C)
        if labels is None:
            return self.decode(x)[..., :self.config.vocab_size]
        at, wanted = labelled_positions(labels, capacity)
        loss_sum = F.cross_entropy(self.decode(x.flatten(0, 1)[at]), wanted, reduction="sum")
        count = (labels != -100).sum()
        if capacity is not None:
            loss_sum = loss_sum + torch.where(count > capacity, math.nan, 0.0)
        return loss_sum, count

    def flops_per_token(self, T, masked):
        """Matmul FLOPs of training per token: 6 a weight, attention, the decoder for the `masked` share."""
        c = self.config
        dense = c.n_layer * (4 * c.n_embd ** 2 + 2 * c.n_embd * c.n_inner)
        return 6 * (dense + masked * c.n_embd * (c.n_embd + c.vocab_size)) + 12 * c.n_layer * T * c.n_embd


@dataclasses.dataclass
class ChordMixerConfig:
    """Defaults: FinDNA's, 1,000 bases and 10 [CLS]: 4 layers of 10 blocks, 11 tracks of 28 channels."""
    length: int = 1010                                       # of the pretraining inputs; others work, too
    n_layer: int = 4
    track_size: int = 28
    hidden: int = 512
    dropout: float = 0.0

    @property
    def n_blocks(self):                                      # of a layer: ceil(log2 length)
        return (self.length - 1).bit_length()

    @property
    def n_tracks(self):
        return self.n_blocks + 1

    @property
    def n_embd(self):
        return self.n_tracks * self.track_size


class Rotate(torch.autograd.Function):
    """Turns the tracks of x (B * L, C) by the indices of `rotations`, and gradients back: no sums are due."""

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
    """Indices that turn the tracks, each of D channels, of x viewed as (B, L * n_tracks, D), and back.

    Track 0 stays, track g = 1..n_rotated turns by 2**(g-1): out[t] = in[(t + 2**(g-1)) % L].
    With lengths (B,) each sequence turns within its own length and the padding behind it stays where it is;
    the view is then (1, B * L * n_tracks, D).
    """
    track = torch.arange(n_tracks, device=device)
    offset = torch.where(track > n_rotated, 0, (1 << track) // 2)              # 0, 1, 2, 4, ...
    at, length, first = torch.arange(L, device=device)[:, None], L, 0          # (L, 1)
    if lengths is not None:                                                    # (B, 1, 1)
        length, first = lengths[:, None, None], L * torch.arange(len(lengths), device=device)[:, None, None]
    return [((torch.where(at < length, (at + shift) % length, at) + first) * n_tracks + track).flatten().int()
            for shift in (offset, -offset)]


class MixerBlock(nn.Module):
    """x + rotate(MLP(x)): no normalisation. Each track brings in the bases at one distance."""

    def __init__(self, config):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(config.n_embd, config.hidden), nn.Linear(config.hidden, config.n_embd)
        self.track_size, self.p = config.track_size, config.dropout

    def forward(self, x, index, inverse):
        p = self.p if self.training else 0.0
        y = self.fc2(F.dropout(F.gelu(self.fc1(x)), p))      # (B * L, C)
        y = F.dropout(y, 1 - (1 - p) ** 2)                   # two in a row there: the MLP's and the block's
        return x + Rotate.apply(y, index, inverse, self.track_size)


class ChordMixer(nn.Module):
    """one_hot (B, L, 5) float -> (B, L, C), for any L (Khalitov et al., as FinDNA uses it).

    lengths (B,): of rows that are padded; what is behind never reaches a real position. n_blocks: only the
    first so many blocks of each layer, and tracks, as a network made for sequences of up to 2**n_blocks has.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.proj = nn.Linear(5, config.n_embd)
        self.blocks = nn.ModuleList(MixerBlock(config) for _ in range(config.n_layer * config.n_blocks))

    def forward(self, one_hot, lengths=None, n_blocks=None):
        (B, L, _), c, x = one_hot.shape, self.config, self.proj(one_hot.flatten(0, 1))           # (B * L, C)
        n_blocks = min(n_blocks or c.n_blocks, c.n_blocks)
        index, inverse = rotations(L, c.n_tracks, n_blocks, lengths, x.device)
        for i, block in enumerate(self.blocks):
            if i % c.n_blocks < n_blocks:
                x = block(x, index, inverse)
        return x.view(B, L, -1)


@dataclasses.dataclass
class EncoderConfig:
    """FinDNA-T: the size is ours, the paper gives none."""
    length: int = 1010
    n_layer: int = 4
    n_head: int = 8
    n_embd: int = 320
    dropout: float = 0.0

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"--n_embd {self.n_embd}: not a multiple of --n_head {self.n_head}; change one")


class Encoder(nn.Module):
    """one_hot (B, L, 5) float -> (B, L, C): pre-LN transformer, learned positions. lengths (B,): as above."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        C = config.n_embd
        self.proj, self.pos_emb = nn.Linear(5, C), nn.Embedding(config.length, C)
        layer = nn.TransformerEncoderLayer(C, config.n_head, 4 * C, config.dropout, "gelu", batch_first=True,
                                           norm_first=True)
        self.layers = nn.TransformerEncoder(layer, config.n_layer, nn.LayerNorm(C), False)     # not nested
        nn.init.normal_(self.pos_emb.weight, std=0.02)

    def forward(self, one_hot, lengths=None):
        L = one_hot.shape[1]
        if L > self.config.length:
            raise ValueError(f"{L} bases for {self.config.length} positions; use shorter sequences")
        padding = None if lengths is None else torch.arange(L, device=lengths.device) >= lengths[:, None]
        return self.layers(self.proj(one_hot) + self.pos_emb.weight[:L], src_key_padding_mask=padding)


def make_backbone(fields):
    """The network over one-hot bases of the config in a checkpoint."""
    if "track_size" in fields:
        return ChordMixer(ChordMixerConfig(**fields))
    return Encoder(EncoderConfig(**fields))


class BaseModel(nn.Module):
    """A backbone and a linear layer to the five bases: one_hot (B, L, 5) -> (B, L, C), logits (B, L, 5)."""

    def __init__(self, backbone):
        super().__init__()
        self.config, self.backbone = backbone.config, backbone
        self.head = nn.Linear(backbone.config.n_embd, 5)

    def forward(self, one_hot):
        x = self.backbone(one_hot)
        return x, self.head(x)


class Cnn(nn.Module):
    """GenomicBenchmarks' CNN, the baseline of Martinek et al.: bases (B, length) uint8 -> (B, n_out).

    As published there is no non-linearity after the second and third convolution nor between the linears.
    """

    def __init__(self, length, n_out):
        super().__init__()
        self.length = length                                 # longest training sequence; shorter: N behind
        width = length
        for _ in range(3):
            width = (width - 7) // 2                         # a convolution of 8, a pool of 2
        if width < 1:
            raise ValueError(f"--init cnn: {length} bases are too few for 3 convolutions; use another --init")
        self.emb = nn.Embedding(5, 100)
        self.convs = nn.Sequential(
            nn.Conv1d(100, 16, 8), nn.BatchNorm1d(16), nn.ReLU(), nn.MaxPool1d(2),
            nn.Conv1d(16, 8, 8), nn.BatchNorm1d(8), nn.MaxPool1d(2),
            nn.Conv1d(8, 4, 8), nn.BatchNorm1d(4), nn.MaxPool1d(2))
        self.hidden, self.out = nn.Linear(4 * width, 512), nn.Linear(512, n_out)

    def forward(self, bases):
        x = self.convs(self.emb(bases.long()).transpose(1, 2))                 # (B, 4, width)
        x = self.hidden(x.flatten(1))
        with torch.autocast(x.device.type, enabled=False):
            return self.out(x.float())


def copy_weights(model, init, load):
    """Starts `model` from --init: for a Bert also hf:FOLDER, else a checkpoint, which load(path) reads.

    ValueError naming the sizes in which their config differs.
    """
    if init.startswith("hf:") and isinstance(model, Bert):
        source = load_hf(init[3:])
        config, weights = dataclasses.asdict(source.config), source.state_dict()
    else:
        state = load(init)
        config, weights = state["config"], state["model"]
    ours = dataclasses.asdict(model.config)
    sizes = [name for name in ours if name != "dropout"]
    differ = [f"{name} {config.get(name)}" for name in sizes if config.get(name) != ours[name]]
    if differ:
        raise ValueError(f"--init {init}: a network with {', '.join(differ)}; give the flags that match")
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        raise ValueError(f"--init {init}: {show(str(e).splitlines()[-1])}; is it such a network?") from None


def labelled_positions(labels, capacity=None):
    """labels (B, T) -> flat indices (N,) of the positions with a label, in order, and their labels (N,).

    N = capacity, whatever the labels: left-over slots hold index 0 and label -100. Without one N is the next
    multiple of 256: with a shape of its own in every step a CPU's heap fragments and grows for ever.
    """
    flat = labels.flatten()
    wanted = flat != -100
    if capacity is None:
        capacity = -(-int(wanted.sum()) // 256) * 256
    number = wanted.cumsum(0) - 1
    slot = torch.where(wanted & (number < capacity), number, capacity)
    at = flat.new_zeros(capacity + 1).scatter(0, slot, torch.arange(len(flat), device=flat.device))[:capacity]
    used = torch.arange(capacity, device=flat.device) <= number[-1]
    return at, torch.where(used, flat[at], -100)


def mask_capacity(n_tokens, share, span):
    """Room for the masked ones of n_tokens, a share of them masked in spans: mean + 10 sd."""
    return min(n_tokens, math.ceil(n_tokens * share + 10 * math.sqrt(share * (1 - share) * span * n_tokens)))


def vocabulary(k):
    """Token names in id order: 5 specials, then the k-mers as base-4 numbers of A,T,C,G (DNABERT's order)."""
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map("".join, itertools.product("ATCG", repeat=k))]


def hf_names(config):
    """Our parameter name -> its name or names (q, k, v: stacked in ours) in the stock `bert` layout."""
    names = {"tok_emb.weight": ["bert.embeddings.word_embeddings.weight"],
             "pos_emb.weight": ["bert.embeddings.position_embeddings.weight"],
             "type_emb.weight": ["bert.embeddings.token_type_embeddings.weight"],
             "head_bias": ["cls.predictions.bias"]}
    layers = {"ln_emb": ["bert.embeddings.LayerNorm"], "head": ["cls.predictions.transform.dense"],
              "ln_head": ["cls.predictions.transform.LayerNorm"]}
    for i in range(config.n_layer):
        theirs = f"bert.encoder.layer.{i}."
        layers |= {f"blocks.{i}.qkv": [f"{theirs}attention.self.{n}" for n in ("query", "key", "value")],
                   f"blocks.{i}.proj": [theirs + "attention.output.dense"],
                   f"blocks.{i}.ln_attn": [theirs + "attention.output.LayerNorm"],
                   f"blocks.{i}.fc": [theirs + "intermediate.dense"],
                   f"blocks.{i}.fc_out": [theirs + "output.dense"],
                   f"blocks.{i}.ln_mlp": [theirs + "output.LayerNorm"]}
    return names | {f"{ours}.{kind}": [f"{name}.{kind}" for name in theirs]
                    for ours, theirs in layers.items() for kind in ("weight", "bias")}


def show(value):
    """A foreign value for a message: repr, at most 80 characters."""
    return repr(value)[:80]


def stock_tensors(model):
    """The weights of a Bert or a Classifier by their names in the stock `bert` layout."""
    bert, tensors = getattr(model, "bert", model), {}
    for ours, theirs in hf_names(bert.config).items():
        parts = bert.state_dict()[ours].detach().cpu().chunk(len(theirs))
        tensors |= {name: part.clone() for name, part in zip(theirs, parts)}
    if bert is model:                                        # a pooler that was never trained: the identity
        C = bert.config.n_embd
        return tensors | {"bert.pooler.dense.weight": torch.eye(C), "bert.pooler.dense.bias": torch.zeros(C)}
    head = {"pooler": "bert.pooler.dense", "out": "classifier"}
    tensors |= {f"{name}.{kind}": getattr(getattr(model, ours), kind).detach().cpu().clone()
                for ours, name in head.items() for kind in ("weight", "bias")}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("cls.")}


def save_folder(folder, tensors, files):
    """Writes model.safetensors and files {name: text, or what JSON holds}; a ValueError if folder has any."""
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise ValueError(f"{folder}: already exists; give the folder of a new export")
    tmp = f"{str(folder).rstrip('/')}.{os.getpid()}.tmp"
    os.makedirs(tmp)
    save_file(tensors, os.path.join(tmp, "model.safetensors"), metadata={"format": "pt"})
    for name, content in files.items():
        with open(os.path.join(tmp, name), "w", encoding="utf-8") as f:
            f.write(content if isinstance(content, str) else json.dumps(content, indent=1))
    os.replace(tmp, folder)


def save_hf(model, folder, classes=(), regression=False, card=""):
    """Writes config, model.safetensors, vocab.txt, the tokenizer files that transformers loads, and a card.

    model: a Bert (a masked LM; its pooler is the identity: it was never trained) or a Classifier (classes:
    the names of its outputs). The tokenizer takes k-mers (upper case) between blanks.
    ValueError if the folder exists and is not empty.
    """
    c = getattr(model, "bert", model).config
    config = {"architectures": ["BertForMaskedLM"], "model_type": "bert", "vocab_size": c.vocab_size,
              "hidden_size": c.n_embd, "num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head,
              "intermediate_size": c.n_inner, "max_position_embeddings": c.block_size, "type_vocab_size": 2,
              "hidden_act": "gelu", "layer_norm_eps": EPS, "hidden_dropout_prob": c.dropout,
              "attention_probs_dropout_prob": c.dropout, "initializer_range": 0.02, "pad_token_id": PAD,
              "torch_dtype": "float32"}
    if classes:
        config |= {"architectures": ["BertForSequenceClassification"],
                   "id2label": {str(i): name for i, name in enumerate(classes)},
                   "label2id": {name: i for i, name in enumerate(classes)},
                   "problem_type": "regression" if regression else "single_label_classification"}
    words = vocabulary(c.k)
    files = {"config.json": config, "vocab.txt": "\n".join(words) + "\n", **hf_tokenizer(words, c.block_size)}
    save_folder(folder, stock_tensors(model), files | ({"README.md": card} if card else {}))


def hf_tokenizer(words, block_size):
    """tokenizer.json and tokenizer_config.json of a word-level tokenizer over k-mers separated by blanks."""
    added = [{"id": i, "content": word, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for i, word in enumerate(words[:5])]
    one, two = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    cls, sep = ({"SpecialToken": {"id": word, "type_id": 0}} for word in ("[CLS]", "[SEP]"))
    frame = {"type": "TemplateProcessing", "single": [cls, one, sep], "pair": [cls, one, sep, two, sep],
             "special_tokens": {w: {"id": w, "ids": [words.index(w)], "tokens": [w]} for w in words[2:4]}}
    model = {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {word: i for i, word in enumerate(words)}}
    names = {f"{word[1:-1].lower()}_token": word for word in words[:5]}        # "pad_token": "[PAD]", ...
    return {"tokenizer.json": {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
                          "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"},
                          "post_processor": frame, "decoder": None, "model": model},
            "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": False,
                                 "model_max_length": block_size, **names}}


def load_hf(folder):
    """A Bert from a folder in stock `bert` layout: config.json and model.safetensors or pytorch_model.bin.

    Old names (gamma/beta, a decoder copy of the tied weights, position_ids) are read; the pooler is left out.
    ValueError, in one line, for other architectures, another vocabulary order, missing or unknown weights.
    """
    path = os.path.join(folder, "config.json")
    try:
        with open(path) as f:
            theirs = dict(json.load(f))
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise ValueError(f"{path}: not a config ({show(e)}); give a Hugging Face folder") from None
    want = {"model_type": "bert", "hidden_act": "gelu", "layer_norm_eps": EPS, "type_vocab_size": 2,
            "is_decoder": False, "position_embedding_type": "absolute"}
    for key, value in want.items():
        if theirs.get(key, value) != value:
            raise ValueError(f"{path}: {key} {show(theirs[key])}; only stock BERT ({value!r}) loads")
    sizes = {name: theirs.get(name) for name in (
        "vocab_size", "max_position_embeddings", "num_hidden_layers", "num_attention_heads", "hidden_size",
        "intermediate_size")}
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ValueError(f"{path}: {name} {show(size)}; a BERT config has a positive number there")
    dropout = theirs.get("hidden_dropout_prob", 0.1)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise ValueError(f"{path}: hidden_dropout_prob {show(dropout)}; it is a share")
    try:
        config = BertConfig(*sizes.values(), dropout)
        k = config.k
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    tensors, path = hf_tensors(folder)
    if config.n_layer > len(tensors) or k > 8:
        raise ValueError(f"{path}: {config.n_layer} layers, {k}-mers in its config; too many")
    missing = [name for names in hf_names(config).values() for name in names if name not in tensors]
    if missing:
        raise ValueError(f"{path}: no weights {show(missing[0])}; a BERT with its masked-LM head is needed")
    try:
        state = {ours: torch.cat([tensors.pop(n) for n in names]) for ours, names in hf_names(config).items()}
        with torch.device("meta"):                           # takes no memory, and no time to draw weights
            model = Bert(config)
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    except RuntimeError as e:
        raise ValueError(f"{path}: {show(str(e).splitlines()[-1])}; config and weights disagree") from None
    if tensors:
        raise ValueError(f"{path}: weights a BERT has not: {show(sorted(tensors))}; is it another model?")
    check_vocabulary(os.path.join(folder, "vocab.txt"), k)
    return model


def check_vocabulary(path, k):
    """ValueError unless vocab.txt has the k-mers in the order A,T,C,G; says so where that must be assumed."""
    if not os.path.exists(path):
        print(f"{path} is missing: taking k-mer order A,T,C,G (DNABERT's)", flush=True)
        return
    with open(path, errors="replace") as f:
        words = f.read().split()
    if words != vocabulary(k):
        raise ValueError(f"{path}: not 5 specials and the {k}-mers in order A,T,C,G; only that order loads")


def load_bin(path):
    """Tensors of a pytorch_model.bin. ValueError where they would take more memory than the file has."""
    size = os.path.getsize(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as z:
            if sum(member.file_size for member in z.infolist()) > size:
                raise ValueError("compressed")
    raw = torch.load(path, map_location="cpu", weights_only=True)
    if any(tensor.nbytes > size for tensor in raw.values()):
        raise ValueError("a tensor larger than the file")
    return raw


def hf_tensors(folder, names=("model.safetensors", "pytorch_model.bin")):
    """(tensors by stock name, file) of a Hugging Face folder: old names renewed, no pooler."""
    path = next(filter(os.path.exists, (os.path.join(folder, name) for name in names)), None)
    if path is None:
        raise ValueError(f"{folder}: no model.safetensors or pytorch_model.bin; download the weights, too")
    try:
        raw = load_bin(path) if path.endswith(".bin") else load_file(path)
        raw = {n.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): t
               for n, t in raw.items()}
    except Exception as e:                                   # foreign bytes, whatever they raise
        raise ValueError(f"{path}: cannot be read ({show(e)}); download it again") from None
    decoder = raw.pop("cls.predictions.decoder.weight", None)
    tied = raw.get("bert.embeddings.word_embeddings.weight")
    if decoder is not None and (tied is None or not torch.equal(decoder, tied)):
        raise ValueError(f"{path}: the decoder is not tied to the embeddings; such models are not supported")
    unused = ("cls.predictions.decoder.bias", "bert.embeddings.position_ids", "bert.pooler.", "cls.seq_rel")
    return {name: t for name, t in raw.items() if not name.startswith(unused)}, path
