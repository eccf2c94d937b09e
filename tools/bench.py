"""Ours against its peers in the same run: time, ratio, throughput, and beside them the goal.

    python -m tools.bench                                     all that this machine can measure; 4 minutes on a CPU
    python -m tools.bench --only tokenize,mask --rounds 25
    python -m tools.bench --device cuda --only gpu

Times are CPU seconds of one thread (gpu: wall seconds). Peers and ours take turns in every round, in
alternating order; ratio = peer / ours, median of rounds [lowest..highest]; "ours again" is the noise floor.
Results are checked against the peers' before they are timed: transformers, pyfaidx, published Python loops.
"""
import argparse
import contextlib
import dataclasses
import os
import random
import runpy
import shutil
import sys
import tempfile
import time
import timeit
import tracemalloc
from collections import Counter
from statistics import median

import numpy as np
import torch

import cm_gems
import data
import finetune
import models
import randommask
import training

B, T, K, V, P = 64, 512, 6, 4101, randommask.MASK_RATE / 6   # a micro-batch of randommask.py
SPANS, LENGTH = range(6, 16, 2), T - 2 + K - 1               # of its last, longest phase; bases of a window
WORDS = {word: i for i, word in enumerate(models.vocabulary(K))}
MINI = models.BertConfig(n_layer=4, n_head=4, n_embd=256, n_inner=1024, dropout=0.0)
DDP_RUN = """--genome demo --device cpu --n_layer 2 --n_head 2 --n_embd 64 --dropout 0 --block_size 128
             --mask dnabert --batch_size 14 --micro_batch_size 4 --steps 3 --lr 1e-30 --eval_windows 4"""


def clock():
    """CPU seconds of this process; once it uses a GPU, wall seconds, after waiting for the GPU."""
    if not torch.cuda.is_initialized():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def interleave(variants, rounds):
    """{name: function} -> {name: [seconds a call, one number a round]}; samples of 0.2 s or more, gc off."""
    for run in variants.values():                            # warm-up: autorange must not see a compilation
        run()
    timers = {name: timeit.Timer(run, timer=clock) for name, run in variants.items()}
    calls = {name: timer.autorange()[0] for name, timer in timers.items()}
    times = {name: [] for name in timers}
    for i in range(rounds):
        for name in list(timers)[::-1 if i % 2 else 1]:
            times[name].append(timers[name].timeit(calls[name]) / calls[name])
    return times


def line(item, text, *goals):
    """Prints one line; goals: (is it met, text)."""
    goals = ", ".join(f"{goal} {'ok' if met else 'MISSED'}" for met, goal in goals)
    print(f"{item:14} {text:76} {goals}", flush=True)


def compare(item, peers, ours, rounds, work, unit, *goals):
    """Times ours against the peers {name: (function, goal)}: a line for each. Returns our rate, work / s."""
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
    """FLOP/s of a large matrix product, the best of 5: what this machine can do in this run."""
    n = 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return 2 * n ** 3 / min(interleave({"": lambda: a @ b}, 5)[""])


def get_masked(bases, table, step):
    """randommask.py's windows, tokens and RandomMask: tokens, masked (B, T), fixed by the step."""
    starts = data.draw_starts(table, B, training.seed(42, step, 0))
    tokens = data.kmer_tokens(data.take_windows(bases, starts, LENGTH), K, 1, specials=True)
    return tokens, randommask.random_mask(tokens, len(SPANS), P)


def get_batch(bases, table, step):
    """The same and 80/10/10: inputs, labels (B, T)."""
    return data.corrupt(*get_masked(bases, table, step), V)


def loop_mask(tokens, centers, spans):
    """DNABERT's masking as published, a Python loop over centers and offsets: masked (B, T)."""
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
    """The same and 80/10/10 from two coins, as there: inputs, labels."""
    masked = loop_mask(tokens, centers, spans)
    inputs, kept = tokens.clone(), torch.bernoulli(torch.full(tokens.shape, 0.2)).bool()
    inputs[masked & ~kept] = data.MASK
    other = masked & kept & torch.bernoulli(torch.full(tokens.shape, 0.5)).bool()
    inputs[other] = torch.randint(5, V, tokens.shape)[other]
    return inputs, tokens.masked_fill(~masked, -100)


def random_batch(n):
    tokens = torch.randint(5, V, (n, T))
    return data.corrupt(tokens, torch.rand(n, T) < 0.16, V)


def hugging_face(model):
    """transformers' BertForMaskedLM with our weights, for each attention implementation: {name: model}."""
    from transformers import BertForMaskedLM
    with tempfile.TemporaryDirectory() as tmp:
        models.save_hf(model, tmp + "/hf")
        return {f"HF {kind}": BertForMaskedLM.from_pretrained(tmp + "/hf", attn_implementation=kind).train()
                for kind in ("eager", "sdpa")}


def training_step(network, batch, bf16, **options):
    """A function that does one step on batch() and returns the mean loss; HF's has torch's default AdamW."""
    ours = isinstance(network, models.Bert)
    optimizer = (training.make_optimizer(network, 1e-4, 0.01, randommask.BETAS, randommask.EPS) if ours
                 else torch.optim.AdamW(network.parameters(), 1e-4))

    def step():
        inputs, labels = batch()
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bf16):
            out = network(inputs, labels=labels, **options)
        loss = out[0] / out[1] if ours else out.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()
    return step


def tokenize(rounds):
    """Base codes (64, 517), or text, -> ids (64, 512); the peer starts from k-mer strings."""
    from transformers import BertTokenizer
    text = ["".join(random.choices("ACGT", k=T + K - 1)) for _ in range(B)]
    bases = torch.from_numpy(np.stack([data.encode(s) for s in text]))
    kmers = [" ".join(s[i:i + K] for i in range(T)) for s in text]
    # vocab=, not the vocab_file= of DNABERT's tutorials: transformers 5 ignores that, all is [UNK]
    hf, ids_only = BertTokenizer(vocab=WORDS, do_lower_case=False), dict.fromkeys(
        ("add_special_tokens", "return_attention_mask", "return_token_type_ids"), False)

    def peer():
        return hf(kmers, **ids_only).input_ids
    assert peer() == data.kmer_tokens(bases, K, 1).tolist() == data.tokenize(text)[:, 1:-1].tolist()
    for item, ours, goal in (("kmer_tokens", lambda: data.kmer_tokens(bases, K, 1), 800),
                             ("tokenize text", lambda: data.tokenize(text), None)):
        compare(item, {"HF BertTokenizer": (peer, goal)}, ours, rounds, B * T / 1e6, "Mtok/s")


def data_path(rounds):
    """Windows -> ids -> RandomMask (and 80/10/10), one micro-batch after another, from 50 Mb in memory."""
    bases = np.random.randint(0, 4, 50_000_000, np.uint8)
    table, text = data.window_table(np.array([[0, len(bases)]]), LENGTH), data.decode(bases)

    def peer(starts, masker):                                # as the items of a map-style dataset, collated
        items = []
        for start in starts:
            ids = [data.CLS, *[WORDS[text[i:i + K]] for i in range(start, start + T - 2)], data.SEP]
            tokens = torch.tensor([ids])
            items.append((tokens, *masker(tokens, torch.rand(1, T) < P, random.choices(SPANS))))
        return [torch.cat(part) for part in zip(*items)]
    starts = data.draw_starts(table, B, training.seed(42, 7, 0)).tolist()
    assert torch.equal(peer(starts, loop_batch)[0], get_masked(bases, table, 7)[0])
    for name, masker, ours, goal in (("data path", lambda *x: [loop_mask(*x)], get_masked, (40, 50)),
                                     ("and 80/10/10", loop_batch, get_batch, (None, ))):
        theirs = (lambda: peer(random.choices(range(len(text) - LENGTH), k=B), masker), goal[0])
        compare(name, {"per-item Python": theirs}, lambda: ours(bases, table, random.getrandbits(20)),
                rounds, B * T / 1e6, "Mtok/s", *goal[1:])


def mask(rounds):
    """RandomMask with a span for each sequence, and 80/10/10."""
    tokens = data.kmer_tokens(torch.randint(4, (B, LENGTH), dtype=torch.uint8), K, 1, specials=True)
    centers, m = torch.rand(B, T) < P, torch.tensor(random.choices(SPANS, k=B))
    masked = data.span_mask(centers, tokens > data.MASK, (m - 1) // 2, m // 2)
    assert torch.equal(loop_batch(tokens, centers, m.tolist())[1] >= 0, masked)
    loop = (lambda: loop_batch(tokens, torch.rand(B, T) < P, random.choices(SPANS, k=B)), 20)
    compare("mask", {"per-center loop": loop},
            lambda: data.corrupt(tokens, randommask.random_mask(tokens, len(SPANS), P), V),
            rounds, B * T / 1e6, "Mtok/s")


def train(rounds):
    """Forward, backward and AdamW of BERT: 4 layers of 256, 8 x 512 tokens, 16 % of them masked."""
    batch = random_batch(8)
    for bf16, goal, tolerance in ((False, 1.2, 1e-5), (True, 1.35, 0.02)):
        model = models.Bert(MINI)
        peers = {name: (training_step(network, lambda: batch, bf16), goal)
                 for name, network in hugging_face(model).items()}
        ours = training_step(model, lambda: batch, bf16)
        losses = torch.stack([ours(), *(step() for step, _ in peers.values())])
        assert losses.max() - losses.min() < tolerance, losses
        compare("train bf16" if bf16 else "train fp32", peers, ours, rounds, 8 * T / 1e3, "ktok/s")


def fine_tuning(rounds):
    """A fine-tuning step, bases to AdamW, of MINI with dropout 0.1; the peer's loop is that of Trainer."""
    from transformers import BertForSequenceClassification
    for L in (70, 300):
        rng, config = np.random.default_rng(0), dataclasses.replace(MINI, dropout=0.1)
        rows = data.rows_of(rng.integers(4, size=32 * L, dtype=np.uint8), [L] * 32, np.arange(32) % 2, {})
        rows = finetune.on_device(rows, torch.device("cpu"), torch.from_numpy(rows.labels))
        net = finetune.build_net(finetune.BertHead.body_spec(config) | {"n_out": 2})
        with tempfile.TemporaryDirectory() as tmp:
            models.save_hf(net, tmp + "/hf", ("a", "b"))
            peer = BertForSequenceClassification.from_pretrained(tmp + "/hf")
        tokens = net.inputs(rows, np.arange(32))[0]
        with torch.no_grad():
            assert (net.eval()(tokens) - peer.eval()(tokens).logits).abs().max() < 1e-5
        optimizers = (training.make_optimizer(net.train(), 3e-5, 0, (0.9, 0.999), 1e-8),
                      torch.optim.AdamW(peer.train().parameters(), 3e-5))

        def ours():
            finetune.train_batch(net, rows, rows.labels, np.arange(32), 128)
            training.scale_gradients(net, torch.ones(()), 1.0)
            optimizers[0].step()
            optimizers[0].zero_grad()

        def theirs():
            peer(tokens, attention_mask=torch.ones_like(tokens), labels=rows.labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
            optimizers[1].step()
            optimizers[1].zero_grad()
        compare(f"fine-tune {L}", {"HF Trainer loop": (theirs, 1.2)}, ours, rounds, 32, "rows/s")


def released_rank(rank_of):
    """Rank of a token id as the released code finds it: the tokenizer decodes the id, a dict has the rank."""
    from transformers import BertTokenizer
    tokenizer = BertTokenizer(vocab=WORDS, do_lower_case=False)
    return lambda token: rank_of.get(tokenizer.decode(token).replace(" ", ""), len(rank_of))


def loop_gene_mask(tokens, centers, rank):
    """GeneMask, a Python loop over sequences, centers and candidates; rank: token id -> rank."""
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


def loop_global_mask(tokens, m, rank):
    """Global, a Python loop over sequences and tokens."""
    masked = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, (ids, n) in enumerate(zip(tokens.tolist(), m.tolist())):
        real = [position for position, token in enumerate(ids) if token > data.MASK]
        hidden = set()
        for center in sorted(real, key=lambda position: (rank(ids[position]), position))[:n]:
            hidden.update(q for q in range(center - 5, center + 6) if 1 <= q <= real[-1])
        masked[row, list(hidden)] = True
    return masked


def cm_masks(rounds):
    """Masks of a micro-batch of 64 x 512 tokens; peers: loops with the released look-up, and with a list."""
    npmi_rank = cm_gems.npmi_rank(np.random.default_rng(0).random(4 ** K))
    table, rank_of = npmi_rank.tolist(), dict(zip(list(WORDS)[5:], npmi_rank[5:].tolist()))
    tokens = data.kmer_tokens(torch.randint(4, (B, T - 2 + K - 1), dtype=torch.uint8), K, 1, specials=True)
    released = released_rank(rank_of)
    for masker, loop in (("genemask", loop_gene_mask), ("global", loop_global_mask)):
        p = cm_gems.center_probability(masker, K)

        def get(mask, rank=None):
            centers = data.draw_centers(tokens.shape, p, tokens.device) & (tokens > data.MASK)
            return mask(tokens, *((npmi_rank, centers) if rank is None else
                                  (centers if masker == "genemask" else centers.sum(1), rank)))
        centers = data.draw_centers(tokens.shape, p, tokens.device) & (tokens > data.MASK)
        want = loop(tokens, centers if masker == "genemask" else centers.sum(1), released)
        assert torch.equal(cm_gems.MASKERS[masker](tokens, npmi_rank, centers), want)
        compare(masker, {"released loop": (lambda: get(loop, released), 100),
                         "loop, list": (lambda: get(loop, table.__getitem__), None)},
                lambda: get(cm_gems.MASKERS[masker]), rounds, B * T / 1e6, "Mtok/s")


def npmi_counts(rounds):
    """1..6-mers of 1 Mb, those of 6 alone by collections.Counter; equal counts."""
    bases = np.random.default_rng(0).integers(4, size=1 << 20, dtype=np.uint8)
    text, runs = data.decode(bases), np.array([[0, len(bases)]])

    def peer():
        return Counter(text[i:i + K] for i in range(len(text) - K + 1))
    theirs = peer()
    assert cm_gems.count_kmers(bases, runs, K)[-1].tolist() == [theirs[name] for name in list(WORDS)[5:]]
    rate = compare("count k-mers", {"Counter": (peer, 40)}, lambda: cm_gems.count_kmers(bases, runs, K),
                   rounds, len(bases) / 1e6, "Mb/s", 310)
    line("count k-mers", f"3.1 Gb in {3100 / rate:.1f} s on this core")


def memory(rounds):
    """What the forward pass keeps for the backward pass, without parameters, for one more token (fp32)."""
    def saved(network, inputs, labels):
        kept = {p.untyped_storage().data_ptr(): p for p in network.parameters()}

        def pack(t):                                         # while t is kept, nothing else gets its address
            kept.setdefault(t.untyped_storage().data_ptr(), t)
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            network(inputs, labels=labels)
        everything = sum(t.untyped_storage().nbytes() for t in kept.values())
        return everything - sum(p.nbytes for p in network.parameters())
    model, (inputs, labels) = models.Bert(MINI), random_batch(16)
    ours, theirs = ((saved(network, inputs, labels) - saved(network, inputs[:8], labels[:8])) / (8 * T) / 1e3
                    for network in (model, hugging_face(model)["HF sdpa"]))
    line("memory", f"{'HF sdpa':16} {theirs:>8.4g} kB {ours:>7.4g} kB  {theirs / ours:.4g}x (kept a token)",
         (theirs >= ours, ">= 1x"))


def fasta(rounds):
    """Packing of 100 Mb in lines of 60 with N and lower case; pyfaidx: build the index, read every contig."""
    import pyfaidx
    with tempfile.TemporaryDirectory() as tmp:
        path, cache = tmp + "/genome.fa", tmp + "/cache"
        with open(path, "wb") as f:
            for n in (40, 30, 20, 10):
                codes = np.random.randint(0, 4, (n * 10 ** 6 // 60, 61), np.uint8)
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
        compare("fasta", {"pyfaidx": (peer, None)}, ours, rounds, 100, "Mb/s", 100)
        tracemalloc.start()
        ours()
        peak = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
    line("fasta", f"peak memory {peak:.0f} MB, {peak / 40:.1f} bytes for each base of the largest contig")


def run_rank(rank, world, folder):
    """randommask.py itself as one of `world` ranks; leaves the shapes of its all-reduces in folder/sent."""
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
    """randommask.py on 2 gloo ranks, 2 micro-batches each, against 1 process; lr 1e-30 keeps the weights."""
    gradients = []                                           # AdamW's first moments: sums of 3 gradients
    with tempfile.TemporaryDirectory() as tmp:
        for world in (1, 2):
            torch.multiprocessing.spawn(run_rank, (world, tmp), nprocs=world)
            moments = training.load(f"{tmp}/{world}/last.pt")["optimizer"]["state"].values()
            gradients.append(torch.cat([state["exp_avg"].flatten() for state in moments]).double())
        sent = torch.load(f"{tmp}/sent", weights_only=True)  # 3 x (gradients, vector), evaluation
    error, n = (torch.dist(*gradients) / gradients[0].norm()).item(), len(gradients[0])
    line("ddp", f"gradient of 2 ranks, relative error {error:.1e}", (error <= 1e-6, "<= 1e-6"))
    line("ddp", f"all-reduced in a step: {sent[0] / n:.4g} x 4 bytes x parameters, and {8 * sent[1]} bytes",
         (sent[:6] == [n, 4] * 3, "1x, <= 64 bytes"))


def gpu(rounds):
    """BERT-base, bf16, compiled, 3.1 Gb of bases on the GPU; our step makes its batch, peers' is given."""
    model, batch = models.Bert(models.BertConfig(dropout=0.0)), [x.to("cuda") for x in random_batch(B)]
    networks = {name: network.to("cuda") for name, network in hugging_face(model).items()}
    with torch.no_grad():
        loss_sum, count = model.to("cuda")(*batch)
        assert (loss_sum / count - networks["HF sdpa"](batch[0], labels=batch[1]).loss).abs() < 1e-4
    model.compile()
    networks["HF sdpa compiled"] = torch.compile(networks["HF sdpa"])
    peers = {name: (training_step(network, lambda: batch, True), goal)
             for (name, network), goal in zip(networks.items(), (1.8, 1.35, 1.05))}
    bases = torch.randint(4, (3_100_000_000,), dtype=torch.uint8, device="cuda")
    table = data.window_table(np.array([[0, len(bases)]]), LENGTH)
    slots = models.mask_capacity(B * T, 1 - (1 - P) ** SPANS[-1], SPANS[-1] + 2)
    ours = training_step(model, lambda: get_batch(bases, table, random.getrandbits(20)), True, capacity=slots)
    rate = compare("gpu", peers, ours, rounds, B * T / 1e3, "ktok/s") * 1e3
    share, peak = (get_batch(bases, table, 0)[1] >= 0).float().mean(), matmul_peak("cuda", torch.bfloat16)
    mfu = rate * model.flops_per_token(T, share.item()) / peak
    line("gpu", f"MFU {mfu:.1%} of {peak / 1e12:.0f} TFLOP/s (8192^3 product)", (mfu >= 0.55, ">= 55 %"))
    torch.cuda.set_sync_debug_mode("error")                  # what makes the host wait for the GPU now raises
    ours()
    torch.cuda.set_sync_debug_mode("default")
    line("gpu", "no host sync in a step")


if __name__ == "__main__":
    items = {item.__name__: item for item in (
        tokenize, data_path, mask, cm_masks, npmi_counts, train, fine_tuning, memory, fasta, ddp, gpu)}
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--only", default=",".join(items), help="items, comma-separated")
    parser.add_argument("--rounds", type=training.number(int, 1), default=5)
    args = parser.parse_args()
    if unknown := set(args.only.split(",")) - set(items):
        parser.error(f"--only: no item {', '.join(unknown)}; there are {', '.join(items)}")
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error",
                   "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # once such large matrices were freed, malloc keeps the memory of smaller ones, as in a training run
    fp32, bf16 = (matmul_peak("cpu", dtype) / 1e9 for dtype in (torch.float32, torch.bfloat16))
    print(f"torch {torch.__version__}, CPU, 1 thread, load {os.getloadavg()[0]:.1f}/{os.cpu_count()} cores; "
          f"2048^3 matrix product {fp32:.0f} GFLOP/s fp32, {bf16:.0f} bf16\n")
    line("item", f"{'peer':16} {'peer':>11} {'ours':>10}  {'ratio [lowest..highest]':24} {'ours':>12}")
    for name in args.only.split(","):
        if name == "gpu" and (args.device == "cpu" or not torch.cuda.is_available()):
            print("gpu            skipped, no CUDA device")
            continue
        try:
            items[name](args.rounds)
        except ModuleNotFoundError as e:
            print(f"{name:14} skipped, {e}; pip install -r tests/requirements.txt")
