"""Items for bench.py: FinDNA's step, rotation, views, EMA and memory against straightforward torch.

    python bench_findna.py [--rounds 5]
"""
import argparse
import copy
import os

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import data
import findna
import models
import training
from tools.bench import compare, line

CONFIG = models.ChordMixerConfig()                           # FinDNA's: 40 blocks of 308 / 512
N = 2                                                        # sequences of a step here


class PlainMixer(models.ChordMixer):
    """The same weights, rotated as in the released code: split, roll, cat; modules for dropout and GELU."""

    def __init__(self, config):
        super().__init__(config)
        self.gelu, self.dropout = torch.nn.GELU(), torch.nn.Dropout(config.dropout)

    def forward(self, one_hot):
        x = self.proj(one_hot)
        for block in self.blocks:
            y = self.dropout(block.fc2(self.dropout(self.gelu(block.fc1(x)))))
            x = roll(self.dropout(y), block.track_size) + x
        return x


def roll(y, track_size):
    tracks = [y_g if g == 0 else torch.roll(y_g, -2 ** (g - 1), 1)
              for g, y_g in enumerate(torch.split(y, track_size, -1))]
    return torch.cat(tracks, -1)


class Count(TorchDispatchMode):
    """Operators that run, but for those that only look at a tensor in another shape."""

    def __init__(self):
        super().__init__()
        self.n, self.all = 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **kwargs or {})
        self.all += 1
        self.n += not op.is_view
        return out


def loop_views(bases):
    """The paper's views of each sequence in turn, edits cut and joined as text would be, then one-hot."""
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


def networks():
    """Our student and the plain one with its weights."""
    torch.manual_seed(0)
    ours = models.BaseModel(models.ChordMixer(CONFIG))
    plain = models.BaseModel(PlainMixer(CONFIG))
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def training_step(student, views, bf16, plain):
    """A function that does one step as findna.py does, or plainly; returns the loss."""
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = (torch.optim.AdamW(student.parameters(), 3e-4) if plain else
                 training.make_optimizer(student, 3e-4, 3e-4, findna.BETAS, findna.EPS))
    center, K, ema = torch.zeros(findna.N_CLS, CONFIG.n_embd), findna.N_CLS, 0.996

    def step():
        view_u, target, view_v = (F.pad(view, (0, 0, 0, K)) for view in views())
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                latent = teacher(view_v)[0][:, -K:]
                q = findna.teacher_outputs(latent, center, 2)
            x, logits = student(view_u)
            loss = (findna.mnm_loss(logits[:, :-K], target[:, :-K]) + findna.cl_loss(x[:, -K:], q, 2)) / 2 / N
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
            center.lerp_(latent.float().mean(0), 0.004)
        return loss.detach()
    return step


def chordmixer(rounds):
    """The whole step, and operators of forward and backward; same weights, outputs and gradients."""
    bases = torch.randint(4, (N, CONFIG.length - findna.N_CLS), dtype=torch.uint8)
    fixed = findna.make_views(bases, "MDIT+NR", 20)
    x, grads, ops, kept = F.pad(fixed[0], (0, 0, 0, findna.N_CLS)), [], [], []
    for network in networks():
        with Count() as count:
            out = network(x)[0]
            out.square().mean().backward()
        ops.append((count.n, count.all))
        grads.append([out, *(p.grad for p in network.backbone.parameters())])
        kept.append((saved(network, x) - saved(network, x[:1])) / CONFIG.length / 1e3)
    assert all(torch.equal(a, b) for a, b in zip(*grads))    # outputs and gradients, bit for bit
    line("chordmixer", f"operators, forward and backward: plain {ops[1][0]}, ours {ops[0][0]} (with views "
         f"{ops[1][1]}, {ops[0][1]})", (ops[0][0] <= 1300, "<= 1300"))
    line("chordmixer", f"kept a token for the backward pass: plain {kept[1]:.4g} kB, ours {kept[0]:.4g} kB",
         (kept[0] <= kept[1], "not above"))
    for bf16, goal in ((False, None), (True, 1.05)):
        ours, plain = networks()
        step = training_step(ours, lambda: findna.make_views(bases, "MDIT+NR", 20), bf16, False)
        peer = training_step(plain, lambda: loop_views(bases), bf16, True)
        a, b = (training_step(net, lambda: fixed, bf16, False)() for net in networks())
        assert abs(a - b) < (1e-2 if bf16 else 1e-5), (a, b)
        compare("findna bf16" if bf16 else "findna fp32", {"plain torch": (peer, goal)}, step, rounds,
                N * CONFIG.length / 1e3, "ktok/s")


def saved(network, one_hot):
    """Bytes that the forward pass keeps for the backward pass, without parameters."""
    kept = {p.untyped_storage().data_ptr(): p for p in network.parameters()}

    def pack(t):
        kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        network(one_hot)
    everything = sum(t.untyped_storage().nbytes() for t in kept.values())
    return everything - sum(p.nbytes for p in network.parameters())


def rotation(rounds):
    """Rotation and residual sum, forward and backward, (8, 1010, 308); bit for bit the same."""
    L, T = CONFIG.length, CONFIG.track_size
    index = models.rotations(L, CONFIG.n_tracks, CONFIG.n_blocks)
    for dtype in (torch.float32, torch.bfloat16):
        x, grad = torch.randn(2, 8, L, CONFIG.n_embd, dtype=dtype)
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
    """Both views and the targets of 64 x 1000 bases."""
    bases = torch.randint(4, (64, 1000), dtype=torch.uint8)
    compare("views", {"sequence loop": (lambda: loop_views(bases), 2.5)},
            lambda: findna.make_views(bases, "MDIT+NR", 20), rounds, 64 * 1000 / 1e6, "Mbases/s")
    edits = findna.augment(bases, "DIT", 20)
    assert edits.shape == bases.shape and data.one_hot(edits).sum() == edits.numel()


def ema(rounds):
    """The teacher's average of 12.65 M weights."""
    student, teacher = networks()

    def loop():
        for p, s in zip(teacher.parameters(), student.parameters()):
            p.data = 0.996 * p.data + 0.004 * s.data
    pairs = [[p.data for p in net.parameters()] for net in (teacher, student)]
    compare("ema", {"loop": (loop, 1)}, lambda: torch._foreach_lerp_(*pairs, 0.004), rounds, 12.65,
            "Mweights/s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=training.number(int, 1), default=5)
    parser.add_argument("--only", default="chordmixer,rotation,views,ema")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, CPU, 1 thread, load {os.getloadavg()[0]:.1f}/{os.cpu_count()} cores")
    line("item", f"{'peer':16} {'peer':>11} {'ours':>10}  {'ratio [lowest..highest]':24} {'ours':>12}")
    for name in args.only.split(","):
        {f.__name__: f for f in (chordmixer, rotation, views, ema)}[name](args.rounds)
