"""Times nanoDNA against its peers in the same run: transformers, pyfaidx, published loops, plain torch.

    python -m tools.bench                                    every comparison that this machine can run
    python -m tools.bench --only tokenize,mask --rounds 25
    python -m tools.bench cost                               parameters, FLOPs, memory, time of the networks
    python -m tools.bench gpu --out DIR                      all that a GPU can tell in 470 s (bench_gpu.py)

Times are CPU seconds of one thread. Peers and ours take turns in every round, in alternating order.
ratio = peer / ours, median over rounds [lowest..highest]; "ours again" is the noise floor.
Every result is checked against the peer's before it is timed. Needs tools/requirements.txt.
"""
import contextlib
import copy
import dataclasses
import datetime
import functools
import itertools
import os
import platform
import random
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
import timeit
import tracemalloc
import weakref
from collections import Counter, namedtuple
from statistics import median

import training                                              # first: it answers Ctrl-C in the slow imports

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import cm_gems
import data
import findna
import finetune
import models
import randommask

B, T, K, V, P = 64, 512, 6, 4101, randommask.MASK_RATE / 6   # a micro-batch of randommask.py
SPANS, LENGTH = range(6, 16, 2), T - 2 + K - 1               # of its last, longest phase; bases of a window
WORDS = {word: i for i, word in enumerate(models.vocabulary(K))}
MINI = models.BertConfig(n_layer=4, n_head=4, n_embd=256, n_inner=1024, dropout=0.0)
MIXER, N_SEQUENCES = models.ChordMixerConfig(), 2            # FinDNA's 40 blocks; sequences of a step here
# Networks of the item cost; stride: of the 6-mers; teacher: a second network reads each batch
Shape = namedtuple("Shape", "config stride teacher", defaults=(None, False))
SHAPES = {"FinDNA": Shape(MIXER, teacher=True), "CM-MNM": Shape(MIXER),              # Yu et al.
          "FinDNA-T": Shape(models.EncoderConfig(), teacher=True), "DNABERT": Shape(models.BertConfig(), 1),
          "NT 500M": Shape(models.BertConfig(V, 1000, 24, 20, 1280, 5120, 0.0), 6)}
N_BASES, MTCDNA = 1000, (1024, 4096, 8192)                   # of pretraining; of MTcDNA's sets
DDP_RUN = """--genome demo --device cpu --n_layer 2 --n_head 2 --n_embd 64 --dropout 0 --block_size 128
             --mask dnabert --batch_size 14 --micro_batch_size 4 --steps 3 --lr 1e-30 --eval_windows 4"""


def clock():
    """Returns CPU seconds of this process; once it uses a GPU, wall seconds after a synchronization."""
    if not torch.cuda.is_initialized():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def interleave(variants, rounds):
    """Times {name: function} in turn: {name: [seconds per call in each round]}; samples >= 0.2 s, gc off."""
    for run in variants.values():                            # warm-up, so that no compilation is timed
        run()
    timers = {name: timeit.Timer(run, timer=clock) for name, run in variants.items()}
    calls = {name: timer.autorange()[0] for name, timer in timers.items()}
    times = {name: [] for name in timers}
    for i in range(rounds):
        for name in list(timers)[::-1 if i % 2 else 1]:
            times[name].append(timers[name].timeit(calls[name]) / calls[name])
    return times


def machine():
    """Returns as text what a measured number depends on: the machine, torch, the date and the commit."""
    found = None
    with contextlib.suppress(OSError):                       # no such file but on Linux
        found = re.search(r"model name\s*: (.*)", open("/proc/cpuinfo").read())
    name = found[1] if found else platform.processor() or platform.machine()
    describe = ["git", "-C", os.path.dirname(__file__), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return (f"{name}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, "
            f"{datetime.date.today()}, commit {commit}")


def line(item, text, *goals):
    """Prints one line; goals: (met, text)."""
    goals = ", ".join(f"{goal} {'ok' if met else 'MISSED'}" for met, goal in goals)
    print(f"{item:14} {text:76} {goals}", flush=True)


def compare(item, peers, ours, rounds, work, unit, *goals):
    """Times ours against peers {name: (function, goal)}, prints a line each; returns our work per second."""
    peers = {**peers, "ours again": (ours, None)}
    times = interleave({name: run for name, (run, _) in peers.items()} | {"ours": ours}, rounds)
    mine = median(times["ours"])
    for name, (_, goal) in peers.items():
        ratios = [theirs / ours for theirs, ours in zip(times[name], times["ours"])]
        met = [(median(ratios) >= goal, f">= {goal}x")] if goal else []
        met += [(work / mine >= least, f">= {least} {unit}") for least in goals if name != "ours again"]
        ratio = f"{median(ratios):.4g}x [{min(ratios):.4g}..{max(ratios):.4g}]"
        line(item, f"{name:16} {median(times[name]) * 1e3:>8.4g} ms {mine * 1e3:>7.4g} ms  {ratio:24} "
                   f"{work / mine:>6.4g} {unit}", *met)
    return work / mine


def matmul_peak(device, dtype):
    """Measures the machine's peak in this run: (FLOP/s of a large matrix product, best of 5; its size).

    A CPU without units for bf16 would take minutes: if a small product is slow, it measures only that.
    """
    def peak(n):
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        return 2 * n ** 3 / min(interleave({"": lambda: a @ b}, 5)[""]), n
    if device == "cuda":
        return peak(8192)
    small = peak(256)
    return small if 2 * 2048 ** 3 / small[0] > 2 else peak(2048)             # 2 s


def get_masked(bases, table, step):
    """Draws windows and their RandomMask as randommask.py does, fixed by the step: tokens, masked (B, T)."""
    starts = data.draw_starts(table, B, training.seed(42, step, 0))
    tokens = data.kmer_tokens(data.take_windows(bases, starts, LENGTH), K, 1, specials=True)
    return tokens, randommask.random_mask(tokens, len(SPANS), P)


def loop_mask(tokens, centers, spans):
    """Masks as DNABERT's published code does, by a Python loop over centers and offsets: masked (B, T)."""
    special = torch.tensor([[token <= data.MASK for token in ids] for ids in tokens.tolist()])
    masked = torch.zeros_like(centers)
    for row, m in enumerate(spans):
        hidden, end = set(), torch.where(~special[row])[0].tolist()[-1]
        for center in torch.where(centers[row] & ~special[row])[0].tolist():
            for position in range(center - (m - 1) // 2, center + m // 2 + 1):
                if 1 <= position <= end:
                    hidden.add(position)
        masked[row, list(hidden)] = True
    return masked


def loop_batch(tokens, centers, spans):
    """Masks by loop_mask, then corrupts 80/10/10 with two coins, as published: inputs, labels."""
    masked = loop_mask(tokens, centers, spans)
    inputs, kept = tokens.clone(), torch.bernoulli(torch.full(tokens.shape, 0.2)).bool()
    inputs[masked & ~kept] = data.MASK
    other = masked & kept & torch.bernoulli(torch.full(tokens.shape, 0.5)).bool()
    inputs[other] = torch.randint(5, V, tokens.shape)[other]
    return inputs, tokens.masked_fill(~masked, -100)


def random_batch(n):
    """Draws n x T random k-mers with 16 % of them masked: inputs, labels."""
    tokens = torch.randint(5, V, (n, T))
    return data.corrupt(tokens, torch.rand(n, T) < 0.16, V)


def hugging_face(model, kind="sdpa", classes=()):
    """Returns transformers' BERT with our weights: a classifier where classes are given, else a masked LM."""
    import transformers
    network = transformers.BertForSequenceClassification if classes else transformers.BertForMaskedLM
    with tempfile.TemporaryDirectory() as tmp:
        models.save_hf(model, tmp + "/hf", classes)
        return network.from_pretrained(tmp + "/hf", attn_implementation=kind).train()


def bert_step(network, batch, bf16, clip=None, **options):
    """Returns a function that trains one step on batch(), with a fused AdamW, and returns the mean loss."""
    ours = isinstance(network, models.Bert)
    optimizer = (training.make_optimizer(network, 1e-4, 0.01, randommask.BETAS, randommask.EPS) if ours
                 else torch.optim.AdamW(network.parameters(), 1e-4, fused=True))

    def step():
        inputs, labels = batch()
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16):
            out = network(inputs, labels=labels, **options)
        loss = out[0] / out[1] if ours else out.loss
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()
    return step


def saved_bytes(network, *inputs, **options):
    """Counts the bytes that the forward pass keeps for the backward pass, without the parameters."""
    kept = {p.untyped_storage().data_ptr(): p for p in network.parameters()}

    def pack(t):                                             # a kept t keeps its address to itself
        kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        network(*inputs, **options)
    everything = sum(t.untyped_storage().nbytes() for t in kept.values())
    return everything - sum(p.nbytes for p in network.parameters())


def tokenize(rounds):
    """Times turning base codes (64, 517) or text into ids (64, 512); the peer starts from k-mer strings."""
    from transformers import BertTokenizer
    text = ["".join(random.choices("ACGT", k=T + K - 1)) for _ in range(B)]
    bases = torch.from_numpy(np.stack([data.encode(s) for s in text]))
    kmers = [" ".join(s[i:i + K] for i in range(T)) for s in text]
    # transformers 5 ignores the vocab_file= of DNABERT's tutorials: every token becomes [UNK]
    hf, ids_only = BertTokenizer(vocab=WORDS, do_lower_case=False), dict.fromkeys(
        ("add_special_tokens", "return_attention_mask", "return_token_type_ids"), False)

    def peer():
        return hf(kmers, **ids_only).input_ids
    assert peer() == data.kmer_tokens(bases, K, 1).tolist() == data.tokenize(text)[:, 1:-1].tolist()
    for item, ours, goal in (("kmer_tokens", lambda: data.kmer_tokens(bases, K, 1), 800),
                             ("tokenize text", lambda: data.tokenize(text), None)):
        compare(item, {"HF BertTokenizer": (peer, goal)}, ours, rounds, B * T / 1e6, "Mtok/s")


def data_path(rounds):
    """Times micro-batches from 50 Mb in memory: windows, ids, RandomMask (and 80/10/10)."""
    bases = np.random.default_rng(0).integers(4, size=50_000_000, dtype=np.uint8)
    table, text = data.window_table(np.array([[0, len(bases)]]), LENGTH), data.decode(bases)

    def peer(starts, masker):                                # the items of a map-style dataset, collated
        items = []
        for start in starts:
            ids = [data.CLS, *[WORDS[text[i:i + K]] for i in range(start, start + T - 2)], data.SEP]
            tokens = torch.tensor([ids])
            items.append((tokens, *masker(tokens, torch.rand(1, T) < P, random.choices(SPANS))))
        return [torch.cat(part) for part in zip(*items)]
    starts = data.draw_starts(table, B, training.seed(42, 7, 0)).tolist()
    assert torch.equal(peer(starts, loop_batch)[0], get_masked(bases, table, 7)[0])
    for name, masker, ours, goal in (
            ("data path", lambda *x: [loop_mask(*x)], get_masked, (40, 50)),
            ("and 80/10/10", loop_batch, lambda *x: data.corrupt(*get_masked(*x), V), (None, ))):
        theirs = (lambda: peer(random.choices(range(len(text) - LENGTH), k=B), masker), goal[0])
        compare(name, {"per-item Python": theirs}, lambda: ours(bases, table, random.getrandbits(20)),
                rounds, B * T / 1e6, "Mtok/s", *goal[1:])


def mask(rounds):
    """Times RandomMask with one span per sequence, then 80/10/10."""
    tokens = data.kmer_tokens(torch.randint(4, (B, LENGTH), dtype=torch.uint8), K, 1, specials=True)
    centers, m = torch.rand(B, T) < P, torch.tensor(random.choices(SPANS, k=B))
    at = torch.where(centers, torch.arange(T), T)
    masked = data.row_spans(at, tokens > data.MASK, (m - 1) // 2, m // 2)
    assert torch.equal(loop_batch(tokens, centers, m.tolist())[1] >= 0, masked)
    loop = (lambda: loop_batch(tokens, torch.rand(B, T) < P, random.choices(SPANS, k=B)), 35)
    compare("mask", {"per-center loop": loop},
            lambda: data.corrupt(tokens, randommask.random_mask(tokens, len(SPANS), P), V),
            rounds, B * T / 1e6, "Mtok/s")


def train(rounds):
    """Times forward, backward and AdamW of a BERT with 4 layers of 256: 8 x 512 tokens, 16 % masked."""
    batch = random_batch(8)
    for bf16, goal, tolerance in ((False, 1.2, 1e-5), (True, 1.35, 0.02)):
        model, name = models.Bert(MINI), "train bf16" if bf16 else "train fp32"
        if bf16 and matmul_peak("cpu", torch.bfloat16)[1] < 2048:
            return line(name, "not run: a CPU without units for bf16 needs a minute a step")
        networks = {f"HF {kind}": hugging_face(model, kind) for kind in ("eager", "sdpa")}
        networks["HF sdpa compiled"], ours = copy.deepcopy(networks["HF sdpa"]), copy.deepcopy(model)
        for network in (networks["HF sdpa compiled"], ours):
            network.compile()
        peers = {name: (bert_step(network, lambda: batch, bf16), goal) for name, network in networks.items()}
        steps = [bert_step(network, lambda: batch, bf16) for network in (model, ours)]
        losses = torch.stack([step() for step in (*steps, *(step for step, _ in peers.values()))])
        assert losses.max() - losses.min() < tolerance, losses
        compare(name, peers, steps[0], rounds, 8 * T / 1e3, "ktok/s")
        both = {name: peer for name, peer in peers.items() if "compiled" in name}
        compare(f"{name} c.", both, steps[1], rounds, 8 * T / 1e3, "ktok/s")       # ours compiled, too


def fine_tuning(rounds):
    """Times a fine-tuning step of MINI, dropout 0.1, from bases to AdamW; the peer's loop is Trainer's."""
    labels = torch.arange(32) % 2
    for L in (70, 300):
        net, _, backward = tuning_pass(Shape(dataclasses.replace(MINI, dropout=0.1), 1), 32, "cpu", L)
        tokens = data.tokenize(["".join(random.choices("ACGT", k=L)) for _ in labels])
        peer, compiled = (hugging_face(net, classes=("a", "b")) for _ in range(2))
        with torch.no_grad():
            assert (net.eval()(tokens, None, None) - peer.eval()(tokens).logits).abs().max() < 1e-5
        optimizer = training.make_optimizer(net.train(), 3e-5, 0, (0.9, 0.999), 1e-8)
        compiled.compile()

        def ours():
            backward()
            training.scale_gradients(net, torch.ones(()), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        plain, fast = (bert_step(network.train(), lambda: (tokens, labels), False, 1.0,
                                 attention_mask=torch.ones_like(tokens)) for network in (peer, compiled))
        compare(f"fine-tune {L}", {"HF Trainer loop": (plain, 1.2), "the same compiled": (fast, 1.2)}, ours,
                rounds, 32, "rows/s")


def loop_gene_mask(tokens, rank, centers):
    """Masks as GeneMask does, in a Python loop over rows, centers and candidates; rank: token id -> rank."""
    masked = torch.zeros_like(centers)
    for row, ids in enumerate(tokens.tolist()):
        special = torch.tensor([token <= data.MASK for token in ids])
        end, hidden, best = torch.where(~special)[0].tolist()[-1], set(), {}
        for center in torch.where(centers[row] & ~special)[0].tolist():
            near = [center] + [center + o for o in (-2, -1, 1, 2, 3) if 1 <= center + o <= end]
            hidden.update(near)
            ranks = [rank(ids[position]) for position in near]
            best[center] = near[ranks.index(min(ranks))], min(ranks)
        half = (len(best) + 1) // 2
        high = sorted(best.values(), key=lambda found: found[1])[:len(best) if half < 5 else half]
        for position, _ in high:
            hidden.update(q for q in range(position - 5, position + 6) if 1 <= q <= end)
        masked[row, list(hidden)] = True
    return masked


def loop_global_mask(tokens, rank, centers):
    """Masks as Global does, in a Python loop over rows and tokens; each row has as many spans as centers."""
    masked = torch.zeros_like(centers)
    for row, (ids, n) in enumerate(zip(tokens.tolist(), centers.sum(1).tolist())):
        real = [position for position, token in enumerate(ids) if token > data.MASK]
        hidden = set()
        for center in sorted(real, key=lambda position: (rank(ids[position]), position))[:n]:
            hidden.update(q for q in range(center - 5, center + 6) if 1 <= q <= real[-1])
        masked[row, list(hidden)] = True
    return masked


def cm_masks(rounds):
    """Times GeneMask and Global on 64 x 512 tokens; peers: loops with the released rank look-up or a list."""
    from transformers import BertTokenizer
    npmi_rank = cm_gems.npmi_rank(np.random.default_rng(0).random(4 ** K))
    tokenizer, in_list = BertTokenizer(vocab=WORDS, do_lower_case=False), npmi_rank.tolist().__getitem__
    rank_of = dict(zip(list(WORDS)[5:], npmi_rank[5:].tolist()))

    def released(token):                                     # decodes the id, then asks a dict
        return rank_of.get(tokenizer.decode(token).replace(" ", ""), len(rank_of))
    tokens = data.kmer_tokens(torch.randint(4, (B, LENGTH), dtype=torch.uint8), K, 1, specials=True)
    for masker, loop, goal in (("genemask", loop_gene_mask, 40), ("global", loop_global_mask, 100)):
        p, ours = cm_gems.center_probability(masker, K), cm_gems.MASKERS[masker]

        def centers():
            return data.draw_centers(tokens.shape, p, tokens.device) & (tokens > data.MASK)
        drawn = centers()
        assert torch.equal(ours(tokens, npmi_rank, drawn), loop(tokens, released, drawn))
        compare(masker, {"released loop": (lambda: loop(tokens, released, centers()), goal),
                         "loop, list": (lambda: loop(tokens, in_list, centers()), None)},
                lambda: ours(tokens, npmi_rank, centers()), rounds, B * T / 1e6, "Mtok/s")


def npmi_counts(rounds):
    """Times counting the 1- to 6-mers of 1 Mb; the peer (collections.Counter) counts only the 6-mers."""
    bases = np.random.default_rng(0).integers(4, size=1 << 20, dtype=np.uint8)
    text, runs = data.decode(bases), np.array([[0, len(bases)]])

    def peer():
        return Counter(text[i:i + K] for i in range(len(text) - K + 1))
    theirs = peer()
    assert cm_gems.count_kmers(bases, runs, K)[-1].tolist() == [theirs[name] for name in list(WORDS)[5:]]
    rate = compare("count k-mers", {"Counter": (peer, 60)}, lambda: cm_gems.count_kmers(bases, runs, K),
                   rounds, len(bases) / 1e6, "Mb/s", 310)
    line("count k-mers", f"3.1 Gb in {3100 / rate:.1f} s on this core")


def memory(rounds):
    """Measures the bytes that one more token keeps for the backward pass (fp32), without the parameters."""
    model, (inputs, labels) = models.Bert(MINI), random_batch(16)
    ours, theirs = ((saved_bytes(network, inputs, labels=labels) -
                     saved_bytes(network, inputs[:8], labels=labels[:8])) / (8 * T) / 1e3
                    for network in (model, hugging_face(model)))
    line("memory", f"{'HF sdpa':16} {theirs:>8.4g} kB {ours:>7.4g} kB  {theirs / ours:.4g}x (kept per token)",
         (theirs >= ours, ">= 1x"))


def fasta(rounds):
    """Times packing 100 Mb in lines of 60 with N and lower case; pyfaidx indexes and reads every contig."""
    import pyfaidx
    with tempfile.TemporaryDirectory() as tmp:
        path, cache, rng = tmp + "/genome.fa", tmp + "/cache", np.random.default_rng(0)
        with open(path, "wb") as f:
            for n in (40, 30, 20, 10):
                codes = rng.integers(4, size=(n * 10 ** 6 // 60, 61), dtype=np.uint8)
                rows = np.frombuffer(b"ACGT", np.uint8)[codes]
                rows[:100], rows[1000:3000], rows[:, 60] = ord("N"), rows[1000:3000] | 32, ord("\n")
                f.write(b">contig%d\n" % n + rows.tobytes())

        def peer():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path + ".fai")
            return [contig[:].seq for contig in pyfaidx.Fasta(path)]

        def ours():
            shutil.rmtree(cache, ignore_errors=True)
            return data.Genome(path, cache)
        assert np.array_equal(np.concatenate([data.encode(s) for s in peer()]), ours().bases)
        compare("fasta", {"pyfaidx": (peer, 2)}, ours, rounds, 100, "Mb/s", 100)
        tracemalloc.start()
        ours()
        peak = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
    line("fasta", f"peak memory {peak:.0f} MB, {peak / 40:.1f} bytes per base of the largest contig")


def run_rank(rank, world, folder):
    """Runs randommask.py as one of `world` ranks; saves the sizes of its all-reduces in folder/sent."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    join = training.dist.init_process_group
    training.dist.init_process_group = lambda kind: join(kind, f"file://{folder}/store", None, world, rank)
    sys.argv = [randommask.__file__, *DDP_RUN.split(), "--data_dir", folder, "--out", f"{folder}/{world}"]
    with (open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.suppress(SystemExit),
          torch.profiler.profile(record_shapes=True) as watch):
        runpy.run_path(randommask.__file__, run_name="__main__")
    sent = [event.input_shapes[0][0] for event in watch.events() if event.name == "gloo:all_reduce"]
    torch.save(sent, f"{folder}/sent")


def ddp(rounds):
    """Compares randommask.py on 2 gloo ranks with one process; lr 1e-30 freezes the weights."""
    gradients = []                                           # AdamW's first moments, from 3 gradients
    with tempfile.TemporaryDirectory() as tmp:
        for world in (1, 2):
            torch.multiprocessing.spawn(run_rank, (world, tmp), nprocs=world)
            moments = training.load(f"{tmp}/{world}/last.pt")["optimizer"]["state"].values()
            gradients.append(torch.cat([state["exp_avg"].flatten() for state in moments]).double())
        sent = torch.load(f"{tmp}/sent", weights_only=True)  # 3 x (gradients, sums), evaluation
    error, n = (torch.dist(*gradients) / gradients[0].norm()).item(), len(gradients[0])
    line("ddp", f"gradient of 2 ranks, relative error {error:.1e}", (error <= 1e-6, "<= 1e-6"))
    line("ddp", f"all-reduced per step: {sent[0] / n:.4g} x 4 bytes x parameters, and {8 * sent[1]} bytes",
         (sent[:6] == [n, 4] * 3, "1x, <= 64 bytes"))


class PlainMixer(models.ChordMixer):
    """ChordMixer as released: rotation by split, roll and cat, three dropouts in a block."""

    def forward(self, one_hot):
        x, p = self.proj(one_hot), self.config.dropout
        for block in self.blocks:
            y = F.dropout(block.fc2(F.dropout(F.gelu(block.fc1(x)), p)), p)
            x = roll(F.dropout(y, p), block.track_size) + x
        return x


def roll(y, track_size):
    """Rotates the tracks of y (B, L, C) as the released code does."""
    tracks = [y_g if g == 0 else torch.roll(y_g, -2 ** (g - 1), 1)
              for g, y_g in enumerate(torch.split(y, track_size, -1))]
    return torch.cat(tracks, -1)


class Count(TorchDispatchMode):
    """Counts the operators that run, except those that only make a view."""
    n = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.n += not op.is_view
        return op(*args, **kwargs or {})


def loop_views(bases):
    """Makes the paper's views, one sequence at a time: edits by cutting and joining, then one-hot."""
    views = []
    for row in bases:
        L = len(row)
        d, n, shift = (int(torch.randint(a, b, ())) for a, b in ((0, 21), (0, 21), (-20, 21)))
        at, pad = int(torch.randint(0, L - d + 1, ())), torch.randint(4, (d + n,), dtype=row.dtype)
        u = torch.cat([pad[:d // 2], row[:at], row[at + d:], pad[d // 2:d]])
        at = int(torch.randint(0, L, ()))
        u = torch.cat([u[:at], pad[d:], u[at:]])[:L].roll(shift)
        masked = torch.zeros(L, dtype=torch.bool)
        masked[torch.randperm(L)[:round(0.3 * L)]] = True
        one_hot = F.one_hot(u.long(), 5)[:, [0, 2, 3, 1, 4]].float()
        v = F.one_hot(row.long(), 5)[:, [0, 2, 3, 1, 4]].float() + 0.2 * torch.randn(L, 5)
        if torch.rand(()) < 0.5:
            v = v.flip(0)[:, [3, 2, 1, 0, 4]]
        views.append((one_hot.masked_fill(masked[:, None], 0), one_hot * masked[:, None], v))
    return [torch.stack(part) for part in zip(*views)]


def students():
    """Returns our student, and the plain one with the same weights."""
    torch.manual_seed(0)
    ours = models.BaseModel(models.ChordMixer(MIXER))
    plain = models.BaseModel(PlainMixer(MIXER))
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def findna_step(student, views, bf16, plain):
    """Returns a function that trains one step as findna.py does, or in plain torch, and returns the loss."""
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = (torch.optim.AdamW(student.parameters(), 3e-4) if plain else
                 training.make_optimizer(student, 3e-4, 3e-4, findna.BETAS, findna.EPS))
    center, K, ema = torch.zeros(findna.N_CLS, 5), findna.N_CLS, 0.996

    def step():
        view_u, target, view_v = (F.pad(view, (0, 0, 0, K)) for view in views())
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                outputs = teacher(view_v)[1][:, -K:]
                q = findna.teacher_outputs(outputs, center, 2)
            _, logits = student(view_u)
            loss = findna.mnm_loss(logits[:, :-K], target[:, :-K]) + findna.cl_loss(logits[:, -K:], q, 2)
            loss = loss / 2 / 300 / N_SEQUENCES                  # 300 masked bases
        loss.backward()
        if plain:
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        else:
            training.scale_gradients(student, torch.ones(()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            if plain:
                for p, s in zip(teacher.parameters(), student.parameters()):
                    p.data = ema * p.data + (1 - ema) * s.data
            else:
                torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - ema)
            center.lerp_(outputs.float().mean(0), 0.004)
        return loss.detach()
    return step


def chordmixer(rounds):
    """Measures operators, memory, time of a FinDNA step; outputs and gradients are the peer's bit for bit."""
    bases = torch.randint(4, (N_SEQUENCES, MIXER.length - findna.N_CLS), dtype=torch.uint8)
    fixed = findna.make_views(bases, "MDIT+NR", 20)
    x, grads, ops, kept = F.pad(fixed[0], (0, 0, 0, findna.N_CLS)), [], [], []
    for network in students():
        with Count() as count:
            out = network(x)[0]
            out.square().mean().backward()
        ops.append(count.n)
        grads.append([out, *(p.grad for p in network.backbone.parameters())])
        kept.append((saved_bytes(network, x) - saved_bytes(network, x[:1])) / MIXER.length / 1e3)
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    line("chordmixer", f"operators, forward and backward: plain {ops[1]}, ours {ops[0]}",
         (ops[0] <= 1300, "<= 1300"))
    line("chordmixer", f"kept per token for the backward pass: plain {kept[1]:.4g} kB, ours {kept[0]:.4g} kB",
         (kept[0] <= kept[1], "not more"))
    for bf16, goal in ((False, None), (True, 1.05)):
        ours, plain = students()
        step = findna_step(ours, lambda: findna.make_views(bases, "MDIT+NR", 20), bf16, False)
        peer = findna_step(plain, lambda: loop_views(bases), bf16, True)
        a, b = (findna_step(net, lambda: fixed, bf16, False)() for net in students())
        assert abs(a - b) < (1e-2 if bf16 else 1e-5), (a, b)
        compare("findna bf16" if bf16 else "findna fp32", {"plain torch": (peer, goal)}, step, rounds,
                N_SEQUENCES * MIXER.length / 1e3, "ktok/s")


def rotation(rounds):
    """Times rotation and residual sum of (8, 1010, 308), forward and backward, bit for bit as the peer's."""
    L, T = MIXER.length, MIXER.track_size
    index = models.rotations(L, MIXER.n_tracks, MIXER.n_blocks)
    for dtype in (torch.float32, torch.bfloat16):
        x, grad = torch.randn(2, 8, L, MIXER.n_embd, dtype=dtype)
        x.requires_grad_()

        def ours():
            return x + models.Rotate.apply(x.flatten(0, 1), *index, T).view_as(x)
        want = x + roll(x, T)
        assert torch.equal(ours(), want)
        assert torch.equal(*(torch.autograd.grad(out, x, grad)[0] for out in (ours(), want)))
        plain = {"split, roll, cat": (lambda: torch.autograd.grad(x + roll(x, T), x, grad), 1.2)}
        compare(f"rotate {str(dtype)[6:]}", plain, lambda: torch.autograd.grad(ours(), x, grad), rounds,
                8 * L / 1e6, "Mtok/s")


def views(rounds):
    """Times both views and the targets for 64 x 1000 bases."""
    bases = torch.randint(4, (64, 1000), dtype=torch.uint8)
    compare("views", {"sequence loop": (lambda: loop_views(bases), 2.5)},
            lambda: findna.make_views(bases, "MDIT+NR", 20), rounds, 64 * 1000 / 1e6, "Mbases/s")


def ema(rounds):
    """Times the teacher's moving average of 12.65 M weights."""
    student, teacher = students()

    def loop():
        for p, s in zip(teacher.parameters(), student.parameters()):
            p.data = 0.996 * p.data + 0.004 * s.data
    pairs = [[p.data for p in net.parameters()] for net in (teacher, student)]
    compare("ema", {"loop": (loop, 1)}, lambda: torch._foreach_lerp_(*pairs, 0.004), rounds, 12.65,
            "Mweights/s")


class Live(TorchDispatchMode):
    """Bytes of the tensors that are alive on a CPU: `now`, and their `peak`."""

    def __init__(self, tensors):
        super().__init__()
        self.now, self.peak, self.alive = 0, 0, set()
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.alive:
            self.alive.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())

    def free(self, address, n):
        self.alive.discard(address)
        self.now -= n

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return out


def pretraining_pass(shape, n, device):
    """Returns a network, its teacher or None, and a function: forward and backward of n x 1,000 bases.

    A Bert reads k-mers beyond its positions as more windows. FinDNA has all its products, but simpler losses.
    """
    config, teacher = shape.config, None
    if shape.stride:
        length, room = (N_BASES - config.k) // shape.stride + 1, config.block_size - 2
        rows = n * -(-length // room)
        tokens = torch.randint(5, config.vocab_size, (rows, -(-n * length // rows) + 2), device=device)
        labels = torch.where(torch.rand(tokens.shape, device=device) < 0.15, tokens, -100)
        slots, net = models.mask_capacity(tokens.numel(), 0.15, config.k), models.Bert(config)
        return net.to(device), None, lambda: net(tokens, labels, capacity=slots)[0].backward()
    net = models.BaseModel(models.make_backbone(vars(config))).to(device)
    x = torch.rand(n, config.length, 5, device=device)       # bases and [CLS]
    teacher = copy.deepcopy(net).eval().requires_grad_(False) if shape.teacher else None

    def run():
        with torch.no_grad():
            target = teacher(x)[1].softmax(-1) if teacher else x
        F.cross_entropy(net(x)[1].flatten(0, 1), target.flatten(0, 1)).backward()
    return net, teacher, run


def tuning_pass(shape, n, device, L):
    """Returns the same as pretraining_pass, for finetune.py and n x L bases; on "meta" without the head."""
    rng = np.random.default_rng(0)
    rows = data.rows_of(rng.integers(4, size=n * L, dtype=np.uint8), [L] * n, np.arange(n) % 2, {})
    spec = finetune.BertHead.body_spec(shape.config, shape.stride) if shape.stride else {
        "kind": "mixer", "mixer": vars(shape.config), "n_cls": shape.config.length - N_BASES}
    spec |= {"n_out": 2, "dtype": "bfloat16" if device == "cuda" else "float32"}
    with torch.device(device):
        net = finetune.build_net(spec)
    if device == "meta":
        rows = data.on_device(rows, torch.device("cpu"))
        inputs = [x if x is None else x.to(device) for x in net.inputs(rows, np.arange(n))[:2]]
        body = functools.partial(net.bert.encode, first=1) if shape.stride else net.states
        return net, None, lambda: body(*inputs).sum().backward()
    rows = data.on_device(rows, torch.device(device), torch.from_numpy(rows.labels).to(device))
    return net, None, lambda: finetune.train_batch(net, rows, np.arange(n), 128)


def count_flops(make):
    """Counts (parameters, FLOPs of the matrix products of a step) from the shapes; nothing is computed."""
    with torch.device("meta"):
        net, _, run = make("meta")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return sum(p.numel() for p in net.parameters()), counter.get_total_flops()


def measure(make, device, rounds):
    """Measures (peak bytes, median seconds) of a step with AdamW and, for a teacher, its moving average."""
    net, teacher, run = make(device)
    optimizer = training.make_optimizer(net, 1e-4, 0.01, findna.BETAS, findna.EPS)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            run()
        optimizer.step()
        optimizer.zero_grad()
        if teacher:
            torch._foreach_lerp_(list(teacher.parameters()), list(net.parameters()), 0.004)
    step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated()
    else:
        states = [x for state in optimizer.state.values() for x in state.values()]
        with Live([*net.parameters(), *(teacher.parameters() if teacher else ()), *states]) as live:
            step()
        peak = live.peak
    return peak, median(timeit.Timer(step, timer=clock).repeat(rounds, 1))


def cost(rounds, device="cpu", batch=1, max_seconds=60, shapes=SHAPES, lengths=MTCDNA):
    """Counts parameters and FLOPs; measures the peak memory and time of a step where it is short enough."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rate, first = matmul_peak(device, dtype)[0], {}
    columns = " ".join(f"{name:>9}" for name in ("TFLOP", "x FinDNA", "peak GB", "ms"))
    line("cost", f"{f'sequences of a step: {batch}':33} {'parameters':>11} {columns}")
    for length, (name, shape) in itertools.product((None, *lengths), shapes.items()):
        if length and name == "CM-MNM":                      # fine-tuned, it is FinDNA
            continue
        make = functools.partial(tuning_pass if length else pretraining_pass, shape, batch,
                                 **{"L": length} if length else {})
        n, flops = count_flops(make)
        title = f"{name}, fine-tuning, {length} bases" if length else f"{name}, pretraining"
        text = f"{title:33} {n:>11,} {flops / 1e12:>9.3g} {flops / first.setdefault(length, flops):>9.3g}"
        if flops / rate > max_seconds:
            line("cost", f"{text}  not run, at least {flops / rate:.0f} s")
        else:
            peak, seconds = measure(make, device, rounds)
            line("cost", f"{text} {peak / 1e9:>9.3g} {seconds * 1e3:>9.4g}")


def parse_args():
    parser = training.make_parser(__doc__)
    add, positive = parser.add_argument, training.number(int, 1)
    add("items", nargs="*", metavar="ITEM", help="as --only; cost and gpu are run only where they are named")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of cost and gpu (%(default)s)")
    add("--only", type=lambda text: text.split(","), help=f"comma-separated items ({','.join(ITEMS)})")
    add("--out", type=training.folder_name, metavar="DIR", help="gpu: folder of its rows")
    add("--rounds", type=positive, default=5, help="of timing (%(default)s)")
    add("--batch", type=positive, help="cost: sequences of a step (CUDA 16, CPU 1)")
    add("--max_seconds", type=training.number(float, 0), default=60,
        help="cost: steps that would take longer are counted, but not run (%(default)s)")
    args = parser.parse_args()
    if args.items and args.only and not args.out:
        parser.error("--only and ITEM: two ways to name the same; drop one of them")
    if ("gpu" in args.items) != bool(args.out) or args.out and len(args.items) > 1:
        parser.error("gpu: give it alone, with --out DIR")
    unknown = set(args.items or args.only or ()) - {*ITEMS, "cost"} - ({"gpu"} if args.out else set())
    if args.device == "cuda" and not args.out and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA GPU here; use cpu")
    if unknown:
        parser.error(f"no item {', '.join(unknown)}; choose from {', '.join(ITEMS)}, cost; or gpu alone, "
                     f"with --out DIR")
    return args


ITEMS = {item.__name__: item for item in (
    tokenize, data_path, mask, cm_masks, npmi_counts, train, fine_tuning, memory, fasta, ddp, chordmixer,
    rotation, views, ema)}

if __name__ == "__main__":
    args = parse_args()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error",
                   "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if args.out:
        from tools import bench_gpu
        with training.user_errors():
            sys.exit(bench_gpu.main(args.out, args.device, args.only))
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    names = args.items or args.only or ITEMS
    items = ITEMS | {"cost": functools.partial(cost, device=device, max_seconds=args.max_seconds,
                                               batch=args.batch or (16 if device == "cuda" else 1))}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # malloc keeps memory after it has freed such large matrices, as in a training run
    peaks = ", ".join(f"{rate / 1e9:.3g} {name} ({n}^3)" for name, (rate, n) in (
        (name, matmul_peak("cpu", getattr(torch, name))) for name in ("float32", "bfloat16")))
    print(f"{machine()}; 1 thread; matrix product in GFLOP/s: {peaks}\n")
    if list(names) != ["cost"]:
        line("item", f"{'peer':16} {'peer':>11} {'ours':>10}  {'ratio [lowest..highest]':24} {'ours':>12}")
    for name in names:
        try:
            items[name](args.rounds)
        except ModuleNotFoundError as e:
            print(f"{name:14} skipped, {e}; pip install -r tools/requirements.txt")
