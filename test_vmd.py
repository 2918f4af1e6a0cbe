"""Tests: every loss, bound, schedule and sampler rule against its equation.

    python -m pytest -q test_vmd.py        # CPU, offline
"""

import contextlib
import functools
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are of the CPU
os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors: two threads are slower on a busy machine

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.testing import assert_close

import data
import diffusion
import eval as evaluation
import model as network
import sample as sampling
import train
from diffusion import active_units, draw_noise, draw_tokens, gaussian_kl, iwae, objective
from model import VMD, Cache, Config, load_checkpoint

HERE = Path(__file__).parent
LN2, LN10 = math.log(2), math.log(10)


def gen(seed):
    return torch.Generator().manual_seed(seed)


FAST = ("--steps 6 --batch-size 8 --layers 2 --encoder-layers 1 --width 16 --heads 2 "
        "--latent-dim 4 --ema 0 --log-every 2 --eval-every 3").split()
SCRIPTS = dict(train=train, sample=sampling, eval=evaluation)


def fast(out, flags="", status=0):
    """Trains for six steps into a folder -> its checkpoint, a dict."""
    assert train.main([*FAST, "--out", str(out), *flags.split()]) == status
    return weights(out)


def resumed(out):
    """Goes on in a folder -> its checkpoint."""
    assert train.main(["--resume", "--out", str(out)]) == 0
    return weights(out)


def weights(folder, name="last.pt"):
    return torch.load(Path(folder) / name, weights_only=True)


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


def read_json(path):
    return json.loads(Path(path).read_text())


def python(words, cwd, status=0, **env):
    """Runs Python in a folder, as a user does -> the finished process."""
    done = subprocess.run([sys.executable, *words], cwd=cwd, env=os.environ | env,
                          capture_output=True, text=True, timeout=180)
    assert done.returncode == status, done.stderr
    return done


@pytest.fixture
def user(trained, monkeypatch, capsys):
    """user("sample", "--num 3") runs a script in the folder `trained` -> what it printed."""
    monkeypatch.chdir(trained)

    def call(script, flags=""):
        capsys.readouterr()
        assert SCRIPTS[script].main(shlex.split(flags)) == 0
        return capsys.readouterr().out
    return call


@pytest.fixture(autouse=True)
def one_seed(monkeypatch):
    """The same random numbers for every test, and quick evaluations."""
    torch.manual_seed(0)
    monkeypatch.setattr(train, "EVAL_SEQUENCES", 50)
    monkeypatch.setitem(data.SCORING["sudoku"], "num", 10)


def tiny(L=4, r=2, Z=3, V=3, seed=0, **kw):
    """A small random network in which gates, constants and latent weights are far from zero."""
    torch.manual_seed(seed)
    kw = {"layers": 2, "bank": 20} | kw
    m = VMD(Config(V, L, r, width=16, heads=2, encoder_layers=1, latent_dim=Z, **kw))
    with torch.no_grad():
        for name, p in m.named_parameters():
            if name.endswith("ada") or name.startswith("conditioner.m") and p.dim() == 2:
                p.normal_(std=0.3)
            if name.startswith("prior_net.head"):
                p.normal_(std=0.5)
        if kw.get("prior") == "aggregate":
            m.bank.normal_(std=0.3)
    return m.eval()


def changed(a, b):
    """Which blocks of (1, K, ...) tensors differ by more than rounding -> list of block numbers."""
    return ((a - b).abs().flatten(2).amax(-1)[0] > 1e-5).nonzero().flatten().tolist()


def moved(xt, x0, z, b, r):
    """xt (1, L), x0 (1, L), z (1, K, Z), each with another block b; V = 3."""
    at, xt, x0, z = slice(b * r, (b + 1) * r), xt.clone(), x0.clone(), z.clone()
    xt[:, at] = torch.where(xt[:, at] == 3, 0, 3)
    x0[:, at] = (x0[:, at] + 1) % 3
    z[:, b] += 1
    return xt, x0, z


def normal(mu, logvar):
    return Normal(mu, (0.5 * logvar).exp())


def refused(why, call, *args, **kw):
    """`call` raises a ValueError that says why."""
    with pytest.raises(ValueError, match=re.escape(why)):
        call(*args, **kw)


LOOPED = [("adaln", 1), ("shared", 1), ("add", 1), ("adaln", 2), ("shared", 2)]


# ---- what depends on what

@pytest.mark.parametrize("conditioning, pooling, prior", [
    ("adaln", "mean", "block"), ("shared", "gated", "noised"), ("add", "mean", "standard"),
    ("add", "mean", "aggregate")])
@pytest.mark.parametrize("r", [1, 2, 3])
def test_blocks_depend_only_on_what_eq_7_and_their_prior_let_them(conditioning, pooling, prior, r):
    L, K, V = 6, 6 // r, 3
    m = tiny(L, r, conditioning=conditioning, pooling=pooling, prior=prior)
    x0, z = torch.randint(V, (1, L), generator=gen(1)), torch.randn(1, K, 3, generator=gen(2))
    xt = torch.where(torch.arange(L) % 2 == 0, V, x0)

    def outputs(xt, x0, z):
        q, p = m.encode(xt, x0), m.prior(xt, x0, z)
        return [m.decode(xt, x0, z).view(1, K, -1), torch.cat(q, -1), torch.cat(p, -1)]
    before = outputs(xt, x0, z)
    for b in range(K):
        none, own, later, onward = [], [b], list(range(b + 1, K)), list(range(b, K))
        reads = dict(noised=(own, later, none), block=(none, none, later))
        reads = reads.get(prior, (none, none, none))
        noisy, clean, latent = moved(xt, x0, z, b, r)
        for inputs, want in (                            # blocks of decoder, encoder, prior that
                ((noisy, x0, z), [own, own, reads[0]]),          # read x_t^b,
                ((xt, clean, z), [later, onward, reads[1]]),     # x_0^b,
                ((xt, x0, latent), [onward, none, reads[2]])):   # z^b
            assert [*map(changed, before, outputs(*inputs))] == want
    assert prior != "standard" or (m.prior(xt, x0, z)[0] == 0).all()


@pytest.mark.parametrize("conditioning, loops", LOOPED)
@pytest.mark.parametrize("r", [1, 2, 4])
@pytest.mark.parametrize("Z", [0, 3])
def test_cached_logits_equal_uncached_ones(conditioning, loops, r, Z):
    L, V = 8, 3
    m = tiny(L, r, Z, conditioning=conditioning, loops=loops)
    x0, z = torch.randint(V, (5, L)), torch.randn(5, L // r, Z) if Z else None
    xt = torch.where(torch.rand(5, L) < 0.5, V, x0)
    full = m.decode(xt, x0, z)
    for skip in (1, 2):        # blocks finished one at a time, or by twos
        cache = m.new_cache()
        for b in range(skip - 1, L // r, skip):
            at, x = slice(b * r, (b + 1) * r), torch.cat([x0[:, : b * r], xt[:, b * r:]], dim=1)
            zb = z[:, : b + 1].clone() if Z else None
            for _ in range(2):        # a second pass adds nothing
                logits = m.decode_block(x[:, : (b + 1) * r], zb, cache)
                assert_close(logits, full[:, at], atol=1e-5, rtol=0)
            if Z:                     # the last latent may be another one
                other = torch.cat([zb[:, :-1], zb[:, -1:] + 1], dim=1)
                elsewhere = m.decode_block(x[:, : (b + 1) * r], other, cache)
                assert (elsewhere - logits).abs().max() > 1e-3
                m.decode_block(x[:, : (b + 1) * r], zb, cache)   # the one that stays
        refused("beyond the length 8", m.decode_block, torch.cat([x, x], dim=1), z, cache)


def one_sequence(m, xt, x0, z):
    """`VMD.decode` as BD3-LM's code does it: [x_t ; x_0], 2 L tokens, a dense 2 L x 2 L mask."""
    (B, L), r, c = x0.shape, m.block_size, m.config
    block, d = torch.arange(L) // r, c.width // c.heads
    of, clean = torch.cat([block, block]), torch.arange(2 * L) >= L
    own = ~clean[:, None] & ~clean & (of[:, None] == of)
    before = clean & (of < of[:, None] + clean[:, None])                 # clean: its own as well
    h, mods = m.embed(torch.cat([xt, x0], 1)) + m.stack.place.weight.repeat(2 * L // r, 1), None
    if z is not None:
        mods = m.conditioner(z[:, of])                                   # of every token
        if c.conditioning == "add":
            h, mods = h + mods, None
        else:
            mods = mods.expand(-1, -1, c.layers, -1, -1)
    angle = torch.arange(L).repeat(2)[:, None] * 10000.0 ** (-torch.arange(0, d, 2) / d)
    turn = torch.polar(torch.ones_like(angle), angle)                    # (2 L, d/2)

    def rope(x):                                                         # (B, H, 2 L, d)
        x = torch.complex(*(a.contiguous() for a in x.chunk(2, -1))) * turn
        return torch.cat([x.real, x.imag], -1)
    start = h
    for i in range(c.loops * c.layers):
        layer = m.stack.layers[i % c.layers]
        if i and i % c.layers == 0:
            h = h + start
        ada = layer.ada if mods is None else layer.ada + mods[:, :, i % c.layers]
        g1, b1, a1, g2, b2, a2 = ada.unbind(-2)
        qkv = layer.qkv(layer.norm1(h) * (1 + g1) + b1).view(B, 2 * L, 3, -1, d)
        q, k, v = qkv.transpose(1, 3).unbind(2)                          # each (B, H, 2 L, d)
        y = F.scaled_dot_product_attention(rope(q), rope(k), v, own | before)
        h = h + a1 * layer.out(y.transpose(1, 2).flatten(2))
        h = h + a2 * layer.mlp(layer.norm2(h) * (1 + g2) + b2)
    return m.head(m.norm(h[:, :L]))


@pytest.mark.parametrize("conditioning, loops", LOOPED)
@pytest.mark.parametrize("r, Z", [(1, 2), (2, 2), (3, 2), (2, 0), (6, 2)])
@pytest.mark.parametrize("chunk", [64, 4])
def test_logits_and_gradients_are_those_of_one_sequence_under_a_dense_mask(
        conditioning, loops, r, Z, chunk, monkeypatch):
    monkeypatch.setattr(network, "CHUNK", chunk)       # 4: several chunks, of one block or more
    m = tiny(6, r, Z, 5, conditioning=conditioning, loops=loops)
    xt, x0 = torch.randint(6, (5, 6), generator=gen(0)), torch.randint(5, (5, 6), generator=gen(1))
    z = torch.randn(5, 6 // r, Z, generator=gen(2)) if Z else None
    way = torch.randn(5, 6, 5, generator=gen(3))
    got, want = m.decode(xt, x0, z), one_sequence(m, xt, x0, z)
    assert_close(got, want, rtol=1e-4, atol=1e-5)
    used = [p for p in m.parameters() if p.requires_grad]
    got, want = (torch.autograd.grad((y * way).sum(), used, allow_unused=True) for y in (got, want))
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None) and (a is None or a.sub(b).abs().max() < 1e-4)


def test_training_has_the_mean_loss_of_the_predictions_after_each_loop():
    m, x0, noise = tiny(loops=3), torch.randint(3, (5, 4)), draw_noise(5, 4, 2, 3)
    losses = []
    for loops in (1, 2, 3):
        fewer = tiny(loops=loops)
        fewer.load_state_dict(m.state_dict())
        losses.append(torch.stack(objective(fewer, x0, noise)))
    assert (losses[0] - losses[2]).abs().max() > 1e-3
    masks = torch.full((5, 4), 3)
    x = diffusion.sample(m, masks, 2, generator=gen(0))
    assert_close(torch.stack(objective(m.train(), x0, noise)), torch.stack(losses).mean(0))
    assert torch.equal(diffusion.sample(m, masks, 2, generator=gen(0)), x)   # the last loop only


def test_a_place_is_embedded_as_the_scaled_sum_of_its_numbers():
    places = [[0, 2], [0, 3], [1, 2], [1, 3]]
    m, plain, x = tiny(L=4, r=4, places=places), tiny(L=4, r=4), torch.tensor([[3, 0, 3, 1]])
    for part in ("stack", "encoder.stack"):
        weight = m.get_submodule(part).place.weight.data
        sums = torch.stack([weight[a] + weight[b] for a, b in places]) / 2**0.5
        plain.get_submodule(part).place.weight.data = sums
    plain.load_state_dict({k: v for k, v in m.state_dict().items() if "place" not in k},
                          strict=False)
    z = torch.randn(1, 1, 3)
    assert_close(m.decode(x, x, z), plain.decode(x, x, z))
    assert_close(m.encode(x, x % 3), plain.encode(x, x % 3))
    refused("places has 3 lists", tiny, L=4, r=4, places=places[:3])


def test_masked_positions_of_a_fully_masked_block_are_told_apart():
    """With RoPE alone they are not: attention over equal values is the same everywhere."""
    m, masks = tiny(4, 4, Z=0), torch.full((1, 4), 3)
    assert torch.pdist(m.decode(masks, masks, None)[0]).min() > 1e-3
    m.stack.place.weight.data.zero_()
    assert torch.pdist(m.decode(masks, masks, None)[0]).max() < 1e-6


def test_without_latents_a_block_of_one_is_an_autoregressive_model():
    m, x0 = tiny(4, 1, Z=0), torch.cartesian_prod(*[torch.arange(3)] * 4)
    nll = diffusion.token_nats(m.decode(torch.full_like(x0, 3), x0, None), x0).sum(1)   # chain rule
    assert_close((-nll).exp().sum().item(), 1.0)
    for _ in range(2):
        noise = draw_noise(81, 4, 1, 0, steps=1)
        assert_close(objective(m, x0, noise, "nelbo")[0], nll)        # no variance at all
    assert_close(evaluation.own_perplexity(m, x0), (nll / 4).exp())   # as a judge


def test_gated_pooling_ignores_the_prefix():
    m = tiny(4, 4, pooling="gated", prefix_len=2)
    m.encoder.stack.layers[0].ada.data.zero_()        # no mixing of positions but by pooling
    a, prefix, other = (torch.tensor([x]) for x in ([0, 1, 2, 0], [2, 1, 2, 0], [0, 1, 1, 0]))
    mu = m.encode(a, a)[0]
    assert_close(m.encode(prefix, prefix)[0], mu)
    assert (m.encode(other, other)[0] - mu).abs().max() > 1e-4


def test_parameter_counts_add_up():
    control, m = tiny(Z=0), tiny(Z=3)
    for model in (control, m):
        assert sum(model.param_counts().values()) == sum(p.numel() for p in model.parameters())
    without, counts = control.param_counts(), m.param_counts()
    assert without["encoder"] == without["latent pathway"] == 0
    assert counts["encoder"] > 0 and counts["latent pathway"] > 0
    assert without["decoder"] == counts["decoder"]           # the same network otherwise


@pytest.mark.parametrize("r, chunk, tokens, read, pairs", [
    (4, 99, 12, 8, 8 * 12), (4, 4, 12, 8, 4 * 4 + 4 * 8), (8, 99, 8, 8, 8 * 8)])
def test_the_last_layer_computes_only_what_is_read(monkeypatch, r, chunk, tokens, read, pairs):
    """One layer, D = 16: keys and values of `tokens`, the rest of the layer for those `read`."""
    monkeypatch.setattr(network, "CHUNK", chunk)             # 4: the first block sees itself only
    m, x = tiny(8, r, Z=0, V=27, layers=1), torch.zeros(1, 8, dtype=torch.long)
    linear = tokens * 16 * 48 + read * (16 * 16 + 2 * 16 * 64 + 16 * 27)
    attention = 2 * pairs * 16
    assert evaluation.flop_of(lambda: m.decode(x, x, None)) == 2 * (linear + attention)


# ---- bounds by enumeration

class PerfectPairs:
    """Knows the ten pairs (k, k + 1).

    With Z = 1 the pair is the decile of Phi(z), and q(z | x_0) a narrow Gaussian inside it.
    """

    vocab_size, block_size, edge = 10, 2, 1e-7

    def __init__(self, latent_dim):
        self.latent_dim = latent_dim

    def encode(self, xt, x0):
        lo, hi = (torch.special.ndtri((x0[:, 0] + a) / 10).clamp(-4, 4) for a in (0.0, 1.0))
        mu, sigma, both = (lo + hi) / 2, (hi - lo) / 12, (xt == 10).all(1)  # six sigma to each edge
        mu, logvar = torch.where(both, mu, 0.0), torch.where(both, 2 * sigma.log(), 0.0)
        return mu[:, None, None], logvar[:, None, None]

    def decode(self, xt, x0, z):
        uniform = torch.full((len(xt),), -1)
        k = uniform if z is None else (torch.special.ndtr(z[:, 0, 0]) * 10).long().clamp(0, 9)
        k = torch.where(xt[:, 1] < 10, (xt[:, 1] - 1) % 10, k)
        k = torch.where(xt[:, 0] < 10, xt[:, 0], k)
        known = torch.stack([k, (k + 1) % 10], 1)                                          # (B, 2)
        logits = torch.where(torch.arange(10) == known[..., None], 0.0, math.log(self.edge))
        return torch.where((k < 0)[:, None, None], 0.0, logits)


PAIRS = torch.stack([torch.arange(10), (torch.arange(10) + 1) % 10], 1)


def moment(a, b, steps):
    """E of t^a (1 - t)^b, t uniform on (0, 1) or on the grid 1/N, ..., 1."""
    if steps is None:
        return math.gamma(a + 1) * math.gamma(b + 1) / math.gamma(a + b + 2)
    return sum((n / steps) ** a * (1 - n / steps) ** b for n in range(1, steps + 1)) / steps


def exact(model, x0, kind, steps, eps):
    """E of `objective` over t and masks, by summing over all masks; eps (S, K, Z) is averaged."""
    (B, L), r = x0.shape, model.block_size
    K, total, everything = L // r, torch.zeros(B), torch.ones_like(x0, dtype=torch.bool)
    for bits in itertools.product([False, True], repeat=L):
        masked = torch.tensor(bits).expand(B, L)
        m = torch.tensor(bits).view(K, r).sum(1).tolist()
        present = [moment(n, r - n, steps) for n in m]
        weighted = [n and moment(n - 1, r - n, steps) for n in m]        # by 1/t
        for e in eps:
            ce, kl = per_block(model, x0, masked, masked if kind == "vmd" else everything, e)
            for b in range(K):
                share = weighted[b] * math.prod(present[:b] + present[b + 1:])
                total += share * (ce + kl if kind == "vmd" else ce)[:, b] / len(eps)
    if kind == "nelbo":
        total += per_block(model, x0, everything, everything, eps[0])[1].sum(1)
    return total


def per_block(model, x0, masked, hidden, e, *keep):
    """Cross entropy of the masked tokens and KL of each block, (B, K) each, for noise e (K, Z).

    The encoder sees as masked what is `hidden`.
    """
    B, V, r = len(x0), model.vocab_size, model.block_size
    z, kl = None, torch.zeros(B, x0.shape[1] // r)
    if model.latent_dim:
        mu, logvar = model.encode(torch.where(hidden, V, x0), x0)
        active = hidden.view(B, -1, r).any(-1)
        # q = p where nothing is masked
        z = torch.where(active[..., None], mu + torch.exp(logvar / 2) * e, e)
        kl = kl_divergence(normal(mu, logvar), Normal(0.0, 1.0)).sum(-1) * active
    logits = model.decode(torch.where(masked, V, x0), x0, z, *keep)
    logp = logits.log_softmax(-1).gather(2, x0[..., None])[..., 0]
    return (-logp * masked).view(B, -1, r).sum(-1), kl


@torch.no_grad()
def test_nelbo_is_a_bound_and_the_printed_value_is_not():
    m, x0, eps = PerfectPairs(1), PAIRS.repeat(10_000, 1), torch.randn(20, 1, 1, generator=gen(0))
    for steps in (1, 2, 4, 64, None):
        bound = exact(m, PAIRS, "nelbo", steps, eps).mean()
        value = objective(m, x0, draw_noise(100_000, 2, 2, 1, steps, 1e-5), "nelbo")[0].mean()
        assert bound >= LN10
        assert_close(value, bound, rtol=0.01, atol=0)
    printed = exact(m, PAIRS, "vmd", None, eps).mean()
    assert 0.5 * LN10 <= printed < LN10 - 0.2                # its optimum is ln(10) / 2
    value = objective(m, x0.repeat(2, 1), draw_noise(200_000, 2, 2, 1))[0].mean()
    assert_close(value, printed, rtol=0.02, atol=0)


@torch.no_grad()
def test_without_latents_the_bounds_have_known_values():
    m, x0 = PerfectPairs(0), PAIRS.repeat(10_000, 1)
    for steps, want in ((1, 2 * LN10), (2, 1.5 * LN10), (None, LN10)):
        noise = draw_noise(100_000, 2, 2, 0, steps, 1e-5, gen(1))
        nelbo, printed = (objective(m, x0, noise, kind)[0] for kind in ("nelbo", "vmd"))
        assert_close(nelbo.mean().item(), want, rtol=0.01, atol=0)
        assert_close(printed, nelbo)                         # without z they are one


@pytest.mark.parametrize("L, r, Z", [(3, 3, 2), (4, 2, 2), (4, 4, 0), (4, 1, 2)])
@pytest.mark.parametrize("kind, steps", [("vmd", None), ("vmd", 2), ("nelbo", None), ("nelbo", 4)])
@torch.no_grad()
def test_monte_carlo_agrees_with_the_sum_over_all_masks(L, r, Z, kind, steps):
    m, g, n = tiny(L, r, Z, layers=1), gen(3), 40_000
    x0, eps = torch.randint(3, (1, L), generator=g), torch.randn(3, L // r, Z, generator=g)
    noise = draw_noise(n, L, r, Z, steps, 1e-6, g)
    noise.eps = eps[torch.randint(3, (n,), generator=g)]     # the draws that are summed over
    value = objective(m, x0.expand(n, L), noise, kind)[0].double()
    want, se = exact(m, x0, kind, steps, eps).item(), value.std().item() / n**0.5
    assert se < 0.03 * want and abs(value.mean().item() - want) < 4 * se + 1e-6 * want


@torch.no_grad()
def test_given_tokens_are_conditioned_on():
    m, x = tiny(4, 2), torch.tensor([[0, 1, 2, 0]])
    x0, given = x.expand(4000, 4), torch.tensor([False, True, True, True])
    noise = draw_noise(4000, 4, 2, 3, steps=1)
    loss, recon, kl = objective(m, x0, noise, "nelbo", given=given)
    ce, every_kl = per_block(m, x, ~given[None], ~given[None], noise.eps[0])
    # block 2, all given, costs no KL
    assert_close(recon[0], ce.sum()), assert_close(kl[0], every_kl[0, 0])
    # at t = 1 all that is not given is masked: both objectives are one
    assert_close(objective(m, x0, noise, "vmd", given=given)[0], loss)
    few, one = iwae(m, x0, 1, 8, given=given), loss.mean()
    assert few.mean() < one and one - few.mean() < kl.mean()
    everything = torch.ones(4, dtype=torch.bool)
    for kind in ("nelbo", "vmd"):
        assert all((v == 0).all() for v in objective(m, x0, noise, kind, given=everything))
    assert (iwae(m, x, 2, 3, given=everything) == 0).all()


def exact_nll(model, x0, steps, zs, weights):
    """-log p(x_0) with independent uniform reveal steps: all of them summed, z by quadrature."""
    L, V, S = x0.shape[1], model.vocab_size, len(zs)
    x0, z = x0.expand(S, L), zs if model.latent_dim else None
    total = torch.zeros(S, dtype=torch.float64)
    for reveal in itertools.product(range(1, steps + 1), repeat=L):
        reveal, logp = torch.tensor(reveal), 0
        for n in range(1, steps + 1):
            logits = model.decode(torch.where(reveal <= n, V, x0), x0, z).double()
            lp = logits.log_softmax(-1).gather(2, x0[..., None])[..., 0]
            logp += lp[:, reveal == n].sum(1)
        total += logp.exp() / steps**L
    return -(total * weights).sum().log().item()


@pytest.mark.parametrize("Z, prior", [(0, "standard"), (1, "standard"), (1, "aggregate")])
@pytest.mark.parametrize("steps", [1, 2, 3])
@torch.no_grad()
def test_iwae_is_unbiased_and_lies_between_the_exact_nll_and_nelbo(Z, prior, steps):
    m, n, g = tiny(3, 3, Z, seed=4, prior=prior, bank=5, layers=1), 20_000, gen(5)
    x0, grid = torch.tensor([[2, 0, 1]]), torch.linspace(-9, 9, 2001)[:, None, None]
    if Z:
        m.encoder.head.bias.data[1] = 0.0    # sigma near 1: weights of a small variance
    if prior == "aggregate":
        logp = diffusion.log_mixture(grid, m.mixture)[:, 0]
    else:
        logp = Normal(0.0, 1.0).log_prob(grid)[:, 0, 0]
    density = logp.double().exp() * 18 / 2000
    assert_close(density.sum().item(), 1.0, atol=1e-3, rtol=0)
    nll = exact_nll(m, x0, steps, grid, density)
    one = iwae(m, x0.expand(n, 3), steps, 1, generator=g).double()
    p, se = (-one).exp().mean().item(), (-one).exp().std().item() / n**0.5
    assert abs(p - math.exp(-nll)) < 4 * se + 1e-6 and se < 0.05 * p     # w estimates p(x_0)
    noise = draw_noise(n, 3, 3, Z, steps, generator=g)
    nelbo = objective(m, x0.expand(n, 3), noise, "nelbo")[0].double()
    tolerance = 4 * (nelbo.std().item() + one.std().item()) / n**0.5 + 1e-6
    assert abs(one.mean() - nelbo.mean()) < tolerance        # one sample: the same bound
    bound = nelbo.mean().item() + tolerance
    if prior == "standard":
        quantiles = torch.special.ndtri((torch.arange(100) + 0.5) / 100).view(100, 1, 1)
        bound = exact(m, x0, "nelbo", steps, quantiles if Z else torch.zeros(1, 1, 0)).item()
    many = iwae(m, x0.expand(4000, 3), steps, 16, generator=g).double()
    se = many.std().item() / 4000**0.5
    assert nll - 4 * se - 1e-6 < many.mean() < bound + 4 * se + 1e-6
    if Z or steps > 1:
        assert many.mean() < bound


@pytest.mark.parametrize("prior", network.PRIOR)
def test_iwae_weights_of_several_blocks_are_those_of_the_sampler(prior):
    m, n = tiny(2, 1, 1, seed=6, prior=prior), 20_000
    m.encoder.head.bias.data[1] = 0.0
    every = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    probs = torch.stack([(-iwae(m, x.expand(n, 2), 1, 1, generator=gen(i)).double()).exp()
                         for i, x in enumerate(every)])
    p, variance = probs.mean(1), probs.var(1) / n
    se = variance.sum().sqrt()
    assert abs(p.sum() - 1) < 4 * se and se < 0.03           # sums to one over all x_0
    # and one step of the sampler draws each x_0 as often
    x = diffusion.sample(m, torch.full((n, 2), 3), 1, temperature=1.0, generator=gen(99))
    share = torch.bincount(x[:, 0] * 3 + x[:, 1], minlength=9).double() / n
    assert ((share - p).abs() < 4.5 * (share * (1 - share) / n + variance).sqrt()).all()


@pytest.mark.parametrize("idle", [[1], [0, 1]])
@pytest.mark.parametrize("kind", ["vmd", "nelbo"])
@pytest.mark.parametrize("prior", network.PRIOR[:3])
def test_kl_is_that_of_the_chain_of_priors(prior, kind, idle):
    m, g = tiny(6, 2, prior=prior), gen(0)
    x0, eps = torch.randint(3, (5, 6), generator=g), torch.randn(5, 3, 3, generator=g)
    noise = draw_noise(5, 6, 2, 3, generator=g)
    noise.t[:], noise.eps = 0.5, eps
    noise.u[:, ::2] = 0.1                                    # something masked in each block,
    quiet = torch.isin(torch.arange(6) // 2, torch.tensor(idle))         # but not in these
    noise.u[:, quiet] = 0.9
    masked, given = noise.u < 0.5, quiet if kind == "nelbo" else None
    xt = torch.where(masked if kind == "vmd" else ~quiet, 3, x0)         # what q and p read
    mu, logvar = m.encode(xt, x0)
    z, kls = mu + (0.5 * logvar).exp() * eps, []
    for b in range(3):                                       # block by block
        p_mu, p_logvar = (a[:, b] for a in m.prior(xt, x0, z))
        if b in idle:
            z[:, b] = p_mu + (0.5 * p_logvar).exp() * eps[:, b]
        else:
            q, p = normal(mu[:, b], logvar[:, b]), normal(p_mu, p_logvar)
            kls.append(kl_divergence(q, p).sum(-1))
    loss, recon, kl = objective(m, x0, noise, kind, 0.25, given)
    assert_close(loss, recon + 0.25 * kl)
    assert_close(kl, sum(kls) / (0.5 if kind == "vmd" else 1))
    ce = diffusion.token_nats(m.decode(torch.where(masked, 3, x0), x0, z), x0)
    assert_close(recon, (ce * masked).sum(1) / 0.5)


def test_gaussian_kl_is_that_of_torch_distributions():
    mu, logvar, p_mu, p_logvar = torch.randn(4, 5, 2, 3)
    q, p = normal(mu, logvar), normal(p_mu, p_logvar)
    assert_close(gaussian_kl(mu, logvar, p_mu, p_logvar), kl_divergence(q, p).sum(-1))
    assert_close(gaussian_kl(mu, logvar), kl_divergence(q, Normal(0.0, 1.0)).sum(-1))
    assert_close(diffusion.log_normal(p_mu, mu, logvar), q.log_prob(p_mu).sum(-1))
    refused("one shape", gaussian_kl, mu, logvar[:1])


@pytest.mark.parametrize("kind", ["vmd", "nelbo"])
@pytest.mark.parametrize("conditioning, pooling, prior", [
    ("adaln", "mean", "standard"), ("shared", "gated", "block"), ("add", "mean", "noised")])
def test_gradients_by_finite_differences(kind, conditioning, pooling, prior):
    m, g = tiny(4, 2, conditioning=conditioning, pooling=pooling, prior=prior), gen(7)
    m.encoder.head.bias.data[3:] = 0.0                       # sigma near 1, or it hardly matters
    x0 = torch.randint(3, (16, 4), generator=g)
    noise = draw_noise(16, 4, 2, 3, t_min=0.2, generator=g)

    def loss():
        return objective(m, x0, noise, kind, 0.7)[0].double().mean()
    loss().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in m.parameters())
    for part in m.children():
        params, ends, h = list(part.parameters()), [], 2e-3
        here = parameters_to_vector(params).detach()
        grad = parameters_to_vector(p.grad for p in params)
        for move in (h, -h):                             # along the gradient itself, forward, back
            vector_to_parameters(here + move * grad / grad.norm(), params)
            ends.append(loss().item())
        vector_to_parameters(here, params)
        assert_close((ends[0] - ends[1]) / (2 * h), grad.norm().item(), rtol=0.02, atol=1e-3)


def test_times_are_stratified():
    n = draw_noise(50, 8, 2, 3, 4, 0.01, gen(8))
    assert n.t.shape == (50, 4) and n.u.shape == (50, 8) and n.eps.shape == (50, 4, 3)
    # equal counts of 1/4, ..., 1
    assert_close(n.t.flatten().sort().values, torch.arange(1, 5).repeat_interleave(50) / 4)
    t = draw_noise(50, 8, 2, 3, None, 0.01, gen(8)).t
    cells = ((1 - t) / 0.99 * 200).clamp(max=199.999).floor()
    assert cells.unique().numel() >= 199                     # one in each cell
    assert t.min() > 0.01 and t.max() <= 1
    assert draw_noise(1000, 2, 2, 0, generator=gen(0)).t.mean().sub(0.5005).abs() < 1e-3


def test_active_units_counts_what_moves_with_the_data():
    class Fixed(PerfectPairs):
        def encode(self, xt, x0):
            assert (xt == 10).all()
            k = x0[:, 0].float()
            mu = torch.stack([k, 0.01 * k, torch.ones(len(k))], 1)[:, None]
            return mu, torch.zeros_like(mu)
    m = Fixed(3)
    assert active_units(m, PAIRS).tolist() == [1]
    m.prior = lambda xt, x0, z: m.encode(xt, x0)        # E.2, E.3: no more than the prior says
    assert active_units(m, PAIRS).tolist() == [0]
    assert active_units(PerfectPairs(0), PAIRS).tolist() == [0]


def test_extreme_posteriors_and_times_give_finite_losses_and_gradients():
    m, x0 = tiny(Z=2), torch.tensor([[0, 1, 2, 0]] * 6)
    noise = draw_noise(6, 4, 2, 2, generator=gen(0))
    for logvar, t, u, kind in itertools.product(
            (-1e30, 1e30, 0.0), (1e-5, 1.0), (0.0, 1 - 1e-7), ("vmd", "nelbo")):
        m.encoder.head.bias.data[2:] = logvar
        noise.t.fill_(t)
        noise.u.fill_(u)                                 # all masked, none
        m.zero_grad()
        loss = objective(m, x0, noise, kind)[0]
        loss.sum().backward()
        assert loss.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in m.parameters())


# ---- beyond the paper: aggregate prior, latent dropout, given tokens that choose z

def test_the_aggregate_prior_is_the_mixture_of_its_bank():
    m, masks = tiny(6, 2, Z=2, prior="aggregate", bank=150), torch.full((20_000, 6), 3)
    m.bank[:, 1] += 1                                    # each block has a mixture of its own
    components = torch.distributions.Independent(normal(*m.bank), 1)
    uniform = torch.distributions.Categorical(torch.ones(3, 50))
    mixture = torch.distributions.MixtureSameFamily(uniform, components)
    z = torch.randn(70, 3, 2) * 2
    assert_close(diffusion.log_mixture(z, m.mixture), mixture.log_prob(z))
    zs, drawn = [], diffusion.draw_latent(m, masks, masks * 0, torch.randn(20_000, 3, 2),
                                          torch.rand(20_000, 3), torch.zeros(20_000, 3) > 0)[0]
    m.decode_block = lambda x, z, cache: zs.append(z[:, -1:]) or torch.zeros(len(x), 2, 3)
    diffusion.sample(m, masks, generator=gen(0))
    for z in (drawn, torch.cat(zs, dim=1)):              # drawn from it
        assert_close(z.mean(0), mixture.mean, atol=0.05, rtol=0)
        assert_close(z.var(0), mixture.variance, atol=0, rtol=0.06)
    assert m.train().mixture is None                     # training is against N(0, I)


@pytest.mark.parametrize("conditioning", network.CONDITIONING)
def test_a_dropped_block_pays_no_kl_and_does_not_see_its_latent(conditioning):
    m, x0 = tiny(6, 2, conditioning=conditioning), torch.randint(3, (8, 6), generator=gen(0))
    xt, z, keep = torch.full((8, 6), 3), torch.randn(8, 3, 3), torch.ones(8, 3, dtype=torch.bool)
    assert_close(m.decode(xt, x0, z, ~keep), m.decode(xt, x0, None))
    keep[:, 1] = False
    dropped, other = m.decode(xt, x0, z, keep), z + torch.tensor([0.0, 1, 0])[:, None]
    assert_close(dropped, m.decode(xt, x0, other, keep), rtol=0, atol=0)
    assert (dropped - m.decode(xt, x0, z)).abs().max() > 1e-3
    noise = draw_noise(8, 6, 2, 3, generator=gen(1))
    noise.t[:], noise.u[:, ::2] = 0.5, 0.1               # something masked in each block, not all
    noise.u[:, 1::2] = 0.9
    noise.drop[:] = 0.3
    noise.drop[[0, 2, 4], 0] = 0.1                       # rows 0 and 2 whole, of row 4 one block,
    noise.drop[[1, 5], 1] = 0.1                          # of row 1 none, of row 5 one
    keep = torch.ones(8, 3, dtype=torch.bool)
    keep[[0, 2]] = keep[4, 0] = keep[5, 1] = False
    t = torch.where(keep, 1.0, 0.5)                      # the blocks that keep z are all masked
    masked = noise.u < t.repeat_interleave(2, 1)
    ce, every_kl = per_block(m, x0, masked, masked, noise.eps, keep)
    _, recon, kl = objective(m, x0, noise, dropout=0.2)
    assert_close(recon, (ce / t).sum(1)), assert_close(kl, (every_kl * keep).sum(1))


def test_without_a_latent_every_model_is_its_decoder_alone():
    m, masks = tiny(6, 2), torch.full((50, 6), 3)
    x = diffusion.sample(m, masks, 1, latent="none", temperature=0.0)
    assert (x == m.decode(masks, x, None).argmax(-1)).all()
    assert len(torch.unique(diffusion.sample(m, masks, latent="none"), dim=0)) > 5   # temperature 1


def test_full_mask_share_gives_those_rows_the_z_of_the_fully_masked_encoder():
    m, x0, noise = tiny(4, 2), torch.randint(3, (8, 4)), draw_noise(8, 4, 2, 3, generator=gen(0))
    masked = noise.u < noise.t.repeat_interleave(2, 1)
    hidden = masked | (torch.arange(8)[:, None] < 4)         # from the encoder, of the first half
    assert (hidden[:4] > masked[:4]).any() and not hidden[4:].all()
    ce, every_kl = per_block(m, x0, masked, hidden, noise.eps)
    _, recon, kl = objective(m, x0, noise, full_mask_share=0.5)
    assert_close(recon, (ce / noise.t).sum(1)), assert_close(kl, (every_kl / noise.t).sum(1))


def test_given_tokens_choose_z_from_its_posterior():
    n, model, zs = 20_000, PerfectPairs(1), []
    decode, model.edge = model.decode, 0.03 / 0.73       # p(first token | z): 0.73, and 9 x 0.03
    model.decode = lambda xt, x0, z: zs.append(z[:, 0, 0]) or decode(xt, x0, z)

    def draw(x, R):
        """Samples, the decile of each row's z, and how many rows were evaluated."""
        zs.clear()
        out = diffusion.sample(model, x, 1, latent_draws=R, generator=gen(0))
        return out, (torch.special.ndtr(zs[-1]) * 10).long(), sum(map(len, zs))
    x = torch.tensor([[4, 10]]).repeat(n, 1)
    _, k, rows = draw(x, 200)
    want = torch.where(torch.arange(10) == 4, 0.73, 0.03)                # p(k | first is 4)
    assert (torch.bincount(k, minlength=10) / n - want).abs().max() < 0.015
    assert rows == n * 201                               # one more evaluation of R rows
    x[::2] = 10
    plain, k, _ = draw(x, 1)
    assert abs((k[1::2] == 4).double().mean() - 0.1) < 0.02              # R = 1: Algorithm 2
    out, _, rows = draw(x, 3)
    assert rows == n + n // 2 * 3 and (out[1::2, 0] == 4).all()
    assert (out[::2] == plain[::2]).all()                # rows without given tokens: untouched
    m, masks = tiny(6, 2), torch.full((5, 6), 3)         # nor is there one in any row
    some, none = (diffusion.sample(m, masks, latent_draws=R, generator=gen(0)) for R in (3, 1))
    assert (some == none).all()
    refused("latent_draws 0 at least 1", diffusion.sample, m, masks, latent_draws=0)
    noised = tiny(prior="noised")
    refused("knows the given tokens", diffusion.sample, noised, masks, latent_draws=3)
    diffusion.sample(noised, masks, latent="none", latent_draws=3)       # no z is drawn


def test_the_bank_is_of_training_sequences_and_survives_a_resume(tmp_path):
    fast(tmp_path, "--prior aggregate --bank 30 --dataset d1 --block-size 2 --ema 0.9")
    m, ckpt = load_checkpoint(tmp_path / "last.pt")
    x0, _ = data.load("d1").batch(14, gen(3))            # 15 for each block, the last N(0, I)
    want = torch.stack(m.encode(torch.full_like(x0, 10), x0)).transpose(1, 2)    # all masked
    assert_close(m.bank[:, :, :14], want)
    assert (m.bank[:, :, 14:] == 0).all() and (ckpt["model"]["bank"] == 0).all()
    assert torch.equal(resumed(tmp_path)["ema"]["bank"], m.bank)
    flags = f"--ckpt {tmp_path}/last.pt --num 20 --bound-num 9 --latent none"
    assert evaluation.main(flags.split()) == 0


# ---- the sampler

class Recorder:
    """A model of random logits that keeps every block it is shown; blocks of r, V = 5."""

    vocab_size, latent_dim, new_cache = 5, 2, Cache

    def __init__(self, r):
        self.block_size, self.calls, self.encoded, self.g = r, [], [], gen(9)

    def encode(self, xt, x0):
        self.encoded.append((xt.clone(), x0.clone()))
        shape = len(xt), xt.shape[1] // self.block_size, 2
        return torch.full(shape, 7.0), torch.full(shape, -40.0)

    def decode_block(self, x, z, cache):
        before, block = x.clone().split([x.shape[1] - self.block_size, self.block_size], dim=1)
        logits = torch.randn(*block.shape, 5, generator=self.g)
        self.calls.append((block, z[:, -1:], (before, z[:, :-1]), logits))
        return logits


@pytest.mark.parametrize("remask", diffusion.REMASK)
@pytest.mark.parametrize("latent", ["fixed", "resample", "encoder"])
def test_sampler_reveals_floor_counts_in_exactly_n_evaluations(remask, latent):
    L, r, N, V = 14, 7, 5, 5
    x, M = torch.randint(V, (6, L), generator=gen(1)), torch.tensor([7, 6, 5, 3, 1, 0])
    hidden = (r - 1 - torch.arange(r) < M[:, None]).repeat(1, 2)       # the last M of each block
    model = Recorder(r)
    out = diffusion.sample(model, torch.where(hidden, V, x), N, remask, 1.0, latent)
    assert len(model.calls) == 2 * N        # N per block, two blocks
    for i, (xt, *_) in enumerate(model.calls):        # before step n, floor(M n / N) are masked
        assert ((xt == V).sum(1) == M * (N - i % N) // N).all()
    assert (out[~hidden] == x[~hidden]).all() and (out < V).all()
    for _, _, (before, z), _ in model.calls[N:]:        # the first block, with the z that wrote it
        assert (before == out[:, :r]).all() and (z == model.calls[N - 1][1]).all()
    for (_, z, _, _), (xt, new, _, _) in zip(model.calls[:N - 1], model.calls[1:N]):
        open_rows = (xt == V).any(1)        # the others keep the z that wrote them
        assert (new[~open_rows] == z[~open_rows]).all()
        if latent == "encoder":        # z ~ q(z | x_t, x_0-hat), here N(7, e^-40)
            assert (new[open_rows] == 7).all()
        else:
            assert (new == z)[open_rows].all() == (latent == "fixed")
    assert len(model.encoded) == (2 * (N - 1) if latent == "encoder" else 0)
    for i, (xt, guess) in enumerate(model.encoded):        # of x_0-hat, the argmax
        b, n = divmod(i, N - 1)
        (earlier, _, _, logits), (shown, *_) = model.calls[b * N + n: b * N + n + 2]
        guessed = torch.where(shown == V, logits.argmax(-1), shown)
        guessed, new = torch.cat([out[:, : b * r], guessed], dim=1), (earlier != shown).any(1)
        assert torch.equal(xt, torch.cat([out[:, : b * r], shown], dim=1))
        assert torch.equal(guess[new], guessed[new])     # the others keep their own


def test_a_resampled_latent_is_drawn_from_the_prior_given_x_t_and_the_last_earlier_ones():
    model, seen = Recorder(2), []

    def prior(xt, x0, z):                                # its n-th answer is n, whatever it reads
        seen.append((xt.clone(), z[:, :-1]))
        return torch.full_like(z, len(seen)), torch.full_like(z, -40.0)
    model.prior = prior
    diffusion.sample(model, torch.full((1, 4), 5), 2, latent="resample")
    for n, ((xt, earlier), (block, z, *_)) in enumerate(zip(seen, model.calls, strict=True), 1):
        assert (xt[:, -2:] == block).all() and (z == n).all()
        assert earlier.tolist() == [[[2, 2]] * (n > 2)]  # that of the first block's last step


@pytest.mark.parametrize("remask", ["prob", "margin"])
def test_the_sampler_reveals_the_most_confident_positions_first(remask):
    model = Recorder(8)
    out = diffusion.sample(model, torch.full((20, 8), 5), 4, remask)
    shown = [c[0] for c in model.calls] + [out]
    for (xt, _, _, logits), after in zip(model.calls, shown[1:]):
        score = diffusion.confidence(logits.double().softmax(-1), remask)
        still, new = after == 5, (xt == 5) & (after < 5)
        assert (after[new] == logits.argmax(-1)[new]).all() and (new.sum(1) == 2).all()
        least, most = score.masked_fill(~new, 2).amin(1), score.masked_fill(~still, -1).amax(1)
        assert (least > most).all()


def test_blocks_with_nothing_to_fill_cost_nothing():
    model, x = Recorder(2), torch.tensor([[1, 2, 3, 4, 5, 0]])
    diffusion.sample(model, x, nfe=3)
    # two blocks are given; of three steps only the first has something to unmask
    assert [before.tolist() for _, _, (before, _), _ in model.calls] == [[[1, 2, 3, 4]]]
    for nfe in (3, 100):
        model.calls.clear()
        diffusion.sample(model, torch.full((9, 6), 5), nfe)
        assert len(model.calls) == 6


def test_remask_rules_rank_positions_as_section_3_3_says():
    p = torch.tensor([[[0.50, 0.45, 0.05], [0.45, 0.10, 0.45], [0.48, 0.26, 0.26]]]).double()
    assert diffusion.confidence(p, "prob")[0].argsort(descending=True).tolist() == [0, 2, 1]
    assert_close(diffusion.confidence(p, "margin").float(), torch.tensor([[0.05, 0.0, 0.22]]))
    one = torch.ones(1, 2, 1)                                   # V = 1
    assert (diffusion.confidence(one, "margin") == 1).all()


def test_random_remasking_reveals_uniformly_whatever_the_confidence():
    model, seen = Recorder(3), []
    logits = torch.eye(3, 5) * torch.tensor([[9.0], [1.0], [0.0]])
    model.decode_block = lambda x, z, cache: seen.append(x.clone()) or logits.expand(len(x), 3, 5)
    diffusion.sample(model, torch.full((6000, 3), 5), 3, "random", generator=gen(0))
    for x, left in zip(seen, (1.0, 2 / 3, 1 / 3)):
        assert_close((x == 5).float().mean(0), torch.full((3,), left), atol=0.03, rtol=0)


def test_tokens_are_drawn_in_float64_and_from_the_right_distribution():
    rare = torch.tensor([[[0.0, math.log(1e-10)]]])
    u = torch.tensor([[1 - 5e-11]], dtype=torch.float64)        # in the last 1e-10; 1.0 in float32
    assert draw_tokens(rare, 1.0, u).item() == 1 and draw_tokens(rare, 1.0, u - 1e-9).item() == 0
    logits = torch.tensor([1.0, 0.0, -1.0])
    u = torch.rand(100_000, 1, dtype=torch.float64, generator=gen(2))
    for temperature in (0.5, 1.0, 2.0):
        x = draw_tokens(logits.expand(100_000, 1, 3), temperature, u)
        share = torch.bincount(x[:, 0]) / 100_000
        assert_close(share, (logits / temperature).softmax(0), atol=0.006, rtol=0)
    assert (draw_tokens(logits.expand(4, 1, 3), 0.0, torch.ones(4, 1)) == 0).all()


@pytest.mark.parametrize("latent", diffusion.LATENT)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sample_depends_on_the_seed_and_its_number_only(latent, temperature):
    m, masks = tiny(6, 3, seed=11), torch.full((9, 6), 3)
    masks[1, :3], masks[2, 2:5], masks[5, 3] = 1, 2, 0        # some tokens and whole blocks given
    masks[3::2, 0] = 1
    m.encoder.head.weight.data *= 40                     # a z that decides tokens

    def draw(nfe, num=9, size=None, seed=1):
        how = nfe, "random", temperature, latent, size
        return diffusion.sample(m, masks[:num], *how, gen(seed))
    for nfe in (2, 5):                                   # 5: some rows have steps without work
        first = draw(nfe)
        assert all((first == draw(nfe, size=size)).all() for size in (4, 1))
        assert all((first[:num] == draw(nfe, num)).all() for num in (5, 1))
        assert temperature == 0 or (first != draw(nfe, seed=2)).any()


def test_the_noise_of_the_sampler_is_normal_and_uniform(monkeypatch):
    dtypes, model, n = [], Recorder(2), 20_000
    monkeypatch.setattr(diffusion, "draw_tokens", lambda logits, temperature, u: dtypes.append(
        u.dtype) or draw_tokens(logits * 0, temperature, u))
    x = diffusion.sample(model, torch.full((n, 4), 5), 1, temperature=1.0, generator=gen(0))
    z = torch.cat([call[1] for call in model.calls]).flatten().sort().values
    share = (torch.arange(len(z)) + 0.5) / len(z)
    assert (torch.special.ndtr(z) - share).abs().max() < 0.006           # Kolmogorov and Smirnov
    assert (torch.bincount(x.flatten()) / x.numel() - 0.2).abs().max() < 0.01
    assert dtypes == [torch.float64] * 2


@pytest.mark.parametrize("size", [5, 2])
def test_on_step_sees_every_state(size):
    m, masks, seen = tiny(6, 2), torch.full((5, 6), 3), []
    plain = diffusion.sample(m, masks, 2, generator=gen(0))
    x = diffusion.sample(m, masks, 2, batch_size=size, generator=gen(0),
                         on_step=lambda x: seen.append(x.clone()))
    assert (x == plain).all() and len(seen) == 6 * math.ceil(5 / size)   # 3 blocks, 2 steps
    states = torch.stack(seen[:6])                                       # of the first batch
    assert torch.equal((states == 3).sum(2), torch.arange(5, -1, -1)[:, None].expand(6, size))
    assert ((states[:-1] == states[1:]) | (states[:-1] == 3)).all()
    assert (states[-1] == x[:size]).all()


def test_longer_sequences_are_written_window_by_window():
    m, masks = tiny(8, 2, Z=0, V=5), torch.full((4, 20), 5)         # windows of 4 blocks, 2 new
    long = diffusion.sample(m, masks, 2, temperature=0.0)
    for first in (0, 4, 8, 12):                                     # no noise: each is `sample`
        window = masks[:, :8].clone()
        window[:, :4] = long[:, first : first + 4] if first else 5
        again = diffusion.sample(m, window, 2, temperature=0.0)
        assert (again == long[:, first : first + 8]).all() and (again < 5).all()
    model = Recorder(2)
    model.seq_len = 8
    diffusion.sample(model, masks)
    zs = [torch.cat([before, z], dim=1) for _, z, (_, before), _ in model.calls[3::2]]
    for old, new in itertools.pairwise(zs):                         # given blocks keep their z
        assert (old[:, 2:] == new[:, :2]).all()
    assert len(zs) == 4 and len(model.calls) == 10
    refused("with one block", diffusion.sample, tiny(8, 8, V=5), masks[:, :16])


def test_a_device_without_float64_is_sent_none(monkeypatch):
    """Apple's mps, in name only: the types of all that is sent there, and back."""
    sent = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, _: sent.append(self.dtype) or self)
    u, *_ = diffusion.sampler_noise(9, 2, 2, 3, 2, gen(0), torch.device("mps"))
    draw_tokens(torch.randn(9, 2, 5), 1.0, u[:, 0])
    assert sent and torch.float64 not in sent


def test_the_latent_buys_the_joint_in_one_step():
    ds, masks = data.load("pairs"), torch.full((20_000, 2), 10)
    one, baseline, two = (
        ds.metrics(diffusion.sample(PerfectPairs(Z), masks, nfe, generator=gen(0)))
        for Z, nfe in ((1, 1), (0, 1), (0, 2)))
    assert one["acc"] == two["acc"] == 1 and one["kl"] < 0.001
    assert abs(baseline["acc"] - 0.1) < 0.01 and abs(baseline["kl"] - LN10) < 0.1


def test_sampler_and_objective_refuse_what_they_do_not_know():
    model, masks = Recorder(2), torch.full((1, 2), 5)
    for kw in (dict(remask="best"), dict(latent="some"), dict(nfe=0), dict(temperature=-1.0)):
        refused(str(*kw.values()), diffusion.sample, model, masks, **kw)
    refused("block size", diffusion.sample, model, torch.full((1, 3), 5))
    refused("neither vmd nor nelbo", objective, model, masks, kind="elbo")


@pytest.mark.parametrize("Z, latent, latents", [
    (0, "fixed", 0), (3, "fixed", 4), (3, "resample", 8), (3, "encoder", 8)])    # of 4 blocks
def test_cached_samples_are_the_uncached_ones_and_condition_once(Z, latent, latents):
    m, masks, calls = tiny(L=8, r=2, Z=Z, V=5), torch.full((20, 8), 5), []
    if Z:
        m.conditioner.register_forward_hook(lambda *args: calls.append(args))
    offered = ("vocab_size", "block_size", "latent_dim", "encode", "decode")
    plain, how = SimpleNamespace(**{k: getattr(m, k) for k in offered}), (2, "prob", 1.0, latent)
    x = diffusion.sample(m, masks, *how, generator=gen(0))
    assert len(calls) == latents and len(torch.unique(x, dim=0)) > 5
    assert (diffusion.sample(plain, masks, *how, generator=gen(0)) == x).all()


# ---- data

@pytest.mark.parametrize("name, entropy, chance", [
    ("pairs", LN10, 0.1), ("d1", LN10, 1e-3), ("d2", 2 * LN10, 0.01), ("needle", 13 * LN10, 1e-7)])
def test_synthetic_data_are_what_the_paper_says(name, entropy, chance):
    ds = data.load(name)
    x, _ = ds.batch(4000, gen(0))
    assert x.shape == (4000, ds.seq_len) and x.min() == 0 and x.max() == 9
    assert_close(ds.entropy, entropy)
    assert ((x[:, 1] - x[:, 0]) % 10 == 1).all()
    if name == "needle":
        assert (x[:, :4] == x[:, -4:]).all() and ((x[:, :3] + 1) % 10 == x[:, 1:4]).all()
        assert torch.bincount(x[:, 4:-4].flatten(), minlength=10).min() > 4000 * 12 / 10 * 0.9
    metrics = ds.metrics(x)
    assert metrics["acc"] == 1 and metrics["kl"] < 0.02
    assert abs(train.independent(ds)["acc"] - chance) < 0.1 * chance + 0.001


def test_probabilities_and_kl_of_the_other_two_token_data():
    ds = data.load("pairs_nonuniform")
    assert_close(ds.true_joint()[9, 0].item(), 10 / 55)
    x, _ = ds.batch(200_000, gen(0))
    assert_close(ds.joint(x), ds.true_joint(), atol=0.003, rtol=0)
    for p in (0.1, 0.3, 1.0):
        joint = data.load("pairs_strength", strength=p).true_joint()
        assert_close(joint[3, 4].item(), p / 10), assert_close(joint[3, 5].item(), (1 - p) / 90)
        assert_close(joint.sum().item(), 1.0)
    x = torch.tensor([[0, 1], [0, 1], [1, 2], [1, 3]])    # by hand: 10 pairs, two seen; a wrong one
    want = 0.1 * (math.log(0.1 / 0.5) + math.log(0.1 / 0.25) + 8 * math.log(0.1 / 1e-12))
    assert_close(data.load("pairs").metrics(x), {"acc": 0.75, "kl": want})


def test_arrays_are_split_and_their_first_tokens_given(tmp_path):
    x = torch.arange(80).view(20, 4)
    np.save(tmp_path / "x.npy", x.numpy().astype(np.uint8))
    ds = data.load("array", data_path=tmp_path / "x.npy")
    assert (ds.vocab_size, ds.seq_len, ds.scored) == (80, 4, False)
    (x0, given), held = ds.batch(500), ds.batch(9, split="test")[0]
    assert x0.dtype == torch.int64 and not given.any() and ds.metrics(held, held) == {}
    assert len(held) == 2                                    # every row has its place
    assert torch.equal(torch.cat([torch.unique(x0, dim=0), held]).sort(0).values, x)
    ds = data.load("array", data_path=tmp_path / "x.npy", prefix_len=3, vocab_size=90)
    assert (ds.vocab_size, ds.prefix_len, ds.scored) == (90, 3, True)
    for x0, given in (ds.batch(2, split=split) for split in ("train", "valid", "test")):
        assert given.tolist() == [[True, True, True, False]] * len(x0)
    x = (x0 := torch.zeros(4, 4, dtype=torch.long)).clone()
    x[0, 3] = x[1, 0] = 1                                    # wrong; another question, not counted
    assert_close(ds.metrics(x, x0), {"exact": 0.75, "exact_se": math.sqrt(0.75 * 0.25 / 4)})


def test_what_is_no_array_of_ids_is_refused(tmp_path):
    path, x = tmp_path / "x.npy", np.arange(12).reshape(3, 4)
    for value, options, why in (
            (x, dict(vocab_size=11), "x.npy has ids 0..11, not all in 0..10"),
            (-x, {}, "x.npy has ids -11..0"), (x, dict(prefix_len=4), "0..3, not 4"),
            (x[:2], {}, "at least three rows"), (x / 1, {}, "integers"), (x[0], {}, "2 axes")):
        np.save(path, value)
        refused(why, data.load, "array", data_path=path, **options)
    path.write_bytes(pickle.dumps(x))                        # never to be unpickled
    refused("x.npy is no plain .npy array", data.load, "array", data_path=path)


def test_options_that_make_no_dataset_are_refused():
    for name, options, why in (
            ("nothing", {}, "'nothing' is not one of pairs,"), ("text", {}, "--data-path"),
            ("pairs", {"length": 9}, "an option of needle, text8, lm1b, text, not of pairs"),
            ("pairs", {"size": 9}, "no dataset"), ("pairs_strength", {"strength": 1.5}, "0..1"),
            ("sudoku", {"grid": 5}, "grid"), ("sudoku", {"clues": 81}, "0..80"),
            ("sudoku", {"source": "shah", "puzzles": 5}, "to generate"),
            ("text", {"data_path": "x", "alphabet": "y"}, "alphabet")):
        refused(why, data.load, name, **options)


def test_prompts_are_mapped_as_the_training_data_were():
    letters, text8 = list("_ab\u00e9"), list(data.ALPHABET)
    pieces = ["[UNK]", "[CLS]", "[SEP]", "ab", "c", "##c", "_"]
    for text, vocab, blank, want in (
            ("", None, "_", []), (" 3  _", None, "_", [3, 10]), ("3??", None, "??", [3, 10]),
            ("ab_\u00e9", letters, "_", [1, 2, 4, 3]), ("ab_?", letters, "?", [1, 2, 0, 4]),
            ("a_", letters, None, [1, 0]),
            ("A_ 1\u00e9x__", text8, "_", [1, 27, 0, 15, 14, 5, 0, 24, 27, 27]),
            ("A_b", text8, None, [1, 0, 2]),
            ("AB _ c_abc", pieces, "_", [1, 3, 7, 4, 7, 3, 5]), ("_", pieces, "_", [1, 7]),
            ("ab _ c", pieces, "", [1, 3, 6, 4])):
        ids = data.encode(text, vocab, 10, blank)
        assert ids.tolist() == want and ids.dtype == torch.int64, text
    for text in ("3 x", "3 10", "3 -1", "3 \u00b2", "3 ?"):
        refused("0..9", data.encode, text, None, 10)
    refused("'c' is not among the 4 symbols of the model", data.encode, "abc_", letters)
    assert data.show(torch.tensor([[3, 10], [0, 9]]), 10) == "3 _\n0 9"


# ---- Sudoku

@pytest.mark.parametrize("n", [4, 6, 9])
def test_cells_share_a_number_if_and_only_if_they_share_a_unit(n):
    places = data.Sudoku(n, "board").places
    for i in range(n * n):
        like = [j for j in range(n * n) if j != i and set(places[i]) & set(places[j])]
        assert like == peers(n, i)
    assert data.Sudoku(n, "prefix").places is None


@functools.cache
def generated(n):
    """200 puzzles and their solutions, (2, 200, n n)."""
    both = data.generate(n, 200)
    both.setflags(write=False)
    return both


@pytest.fixture(scope="session")
def sudoku4(tmp_path_factory):
    """4x4 puzzles in a layout: one file for all tests."""
    return functools.partial(data.load, "sudoku", grid=4, puzzles=300,
                             data_dir=tmp_path_factory.mktemp("sudoku4"))


@functools.cache
def peers(n, cell):
    """The other cells in the row, column or box of a cell."""
    h, w = {4: (2, 2), 6: (2, 3), 9: (3, 3)}[n]
    r, c = divmod(cell, n)
    return [i for i in range(n * n) if i != cell and (
        i // n == r or i % n == c or (i // n // h, i % n // w) == (r // h, c // w))]


def brute_force(board):
    """Number of solutions, at most 2, by plain backtracking; board: n n digits, 0 for a blank."""
    if 0 not in board:
        return 1
    n, at, found = math.isqrt(len(board)), board.index(0), 0
    for d in set(range(1, n + 1)) - {board[j] for j in peers(n, at)}:
        found += brute_force(board[:at] + [d] + board[at + 1:])
        if found > 1:
            return 2
    return found


@pytest.mark.parametrize("n, clues, boards", [(4, 4.3, 11), (6, 10.1, 190), (9, 24.6, 199)])
def test_generated_puzzles_are_of_the_stated_kind(n, clues, boards):
    puzzles, solutions = generated(n)
    assert not data.violations(solutions).any() and ((puzzles == 0) | (puzzles == solutions)).all()
    assert abs((puzzles > 0).sum(1).mean() - clues) < 0.5
    assert len(relabelled(solutions)) >= boards                          # different ones
    assert data.propagate(data.to_bits(puzzles))[1].all()                # singles alone solve them
    fewer = puzzles.copy()                               # with one clue fewer they are stuck
    fewer[np.arange(200), (fewer > 0).argmax(1)] = 0
    assert not data.propagate(data.to_bits(fewer))[1].any()


@pytest.mark.parametrize("n", [4, 6])
def test_solver_counts_solutions_as_brute_force_does(n):
    puzzles, rng = generated(n)[0, :80].copy(), np.random.default_rng(0)
    puzzles[40:][rng.random((40, n * n)) < 0.2] = 0       # some become ambiguous
    puzzles[77:, :2] = 1                                  # some impossible
    want = [brute_force(p) for p in puzzles[:77].tolist()] + [0] * 3
    assert want[:40] == [1] * 40 and set(want) == {0, 1, 2}
    puzzles = np.tile(puzzles, (15, 1))                   # more than are worked on at a time
    found, count = data.solve(puzzles)
    assert count.tolist() == want * 15
    p, s = puzzles[count > 0], found[count > 0]
    assert not data.violations(s).any() and ((p == 0) | (p == s)).all()
    assert data.solve(np.zeros((1, 16), np.uint8), limit=1000)[1] == 288     # all 4x4 boards


def test_9x9_puzzles_have_one_solution_says_qqwing():
    if not shutil.which("qqwing"):
        pytest.skip("qqwing, an independent solver, is not installed (Debian package qqwing)")
    puzzles, solutions = ([text_of(b) for b in boards] for boards in generated(9))
    out = subprocess.run(["qqwing", "--solve", "--csv", "--count-solutions"], text=True,
                         input="\n".join(puzzles) + "\n", capture_output=True, check=True,
                         timeout=60).stdout.splitlines()[1:]
    rows = [line.split(",")[:2] for line in out if line.strip(" ,")]
    assert rows == [[s, "1"] for s in solutions]


@pytest.mark.parametrize("n", [4, 6, 9])
def test_violations_are_those_of_the_rules(n):
    boards, rng = generated(n)[1], np.random.default_rng(0)
    noise = rng.integers(0, n + 2, boards.shape)
    boards = np.where(rng.random(boards.shape) < 0.03, noise, boards)
    want = (boards == 0) | (boards > n)
    for i in range(n * n):
        want[:, i] |= (boards[:, peers(n, i)] == boards[:, [i]]).any(1)
    assert (data.violations(boards) == want).all() and 0 < want.any(1).mean() < 1


def text_of(board):
    return "".join(map(str, board.tolist())).replace("0", ".")


def relabelled(boards):
    """Boards (B, n n) without the names of their digits: of each cell the first like it."""
    boards = np.asarray(boards)
    first = (boards[:, :, None] == boards[:, None, :]).argmax(2)
    return set(map(tuple, first.tolist()))


@pytest.mark.parametrize("n", [4, 6, 9])
def test_test_boards_are_no_training_boards_under_another_labelling(n, tmp_path):
    both, path = generated(n), tmp_path / "x.csv"
    both = np.concatenate([both, np.where(both > 0, n + 1 - both, 0)], axis=1)    # each twice
    path.write_text("\n".join(f"{text_of(p)},{text_of(s)}" for p, s in zip(*both)))
    ds, test = data.load("sudoku", grid=n, layout="board", data_path=path), data.held_out(both[1])
    assert (ds.train_set.numpy() == both[:, ~test]).all() and 0.02 < test.mean() < 0.15
    assert (ds.test_set.numpy() == both[:, test]).all()
    held = ds.batch(400, split="test")[0]
    assert sorted(held.tolist()) == sorted(both[1, test].tolist())                # each once
    train_boards, test_boards = relabelled(ds.train_set[1]), relabelled(ds.test_set[1])
    drawn = relabelled(ds.batch(2000, gen(0))[0])         # augmented
    assert not test_boards & (train_boards | drawn)
    assert n == 9 or drawn <= train_boards


def test_augmented_puzzles_are_puzzles_and_all_symmetries_occur():
    ds = data.load("sudoku", grid=9, layout="board")
    one = torch.from_numpy(generated(9)[:, :1].astype(int)).expand(2, 4000, 81)
    puzzle, solution = ds.augment(one, gen(0))
    assert not data.violations(solution.numpy()).any()
    assert ((puzzle == 0) | (puzzle == solution)).all()
    assert ((puzzle > 0).sum(1) == (one[0] > 0).sum(1)).all()
    assert (data.solve(puzzle[:50].numpy().astype(np.uint8))[1] == 1).all()
    assert len(torch.unique(solution, dim=0)) == 4000
    assert torch.bincount(solution[:, 0], minlength=10)[1:].min() > 300      # 444 expected
    # the first two cells come to every cell, and to one row or one column, about equally often
    marked = (torch.arange(81) < 2).long().expand(2, 4000, 81)
    at = ds.augment(marked, gen(1))[0].nonzero()[:, 1].view(4000, 2)
    counts = torch.bincount(at.flatten(), minlength=81)
    assert counts.min() > 60 and counts.max() < 140                          # 99 expected
    assert abs((at[:, 0] // 9 == at[:, 1] // 9).double().mean() - 0.5) < 0.03


def test_layouts(sudoku4):
    prefix, board = sudoku4(layout="prefix"), sudoku4(layout="board")
    assert (prefix.seq_len, prefix.vocab_size, prefix.prefix_len) == (34, 7, 17)
    assert (board.seq_len, board.vocab_size, board.prefix_len) == (16, 5, 0)
    assert data.load("sudoku").seq_len == 164                              # C.2
    x0, given = prefix.batch(5, gen(0), "test")
    puzzle, solution = x0[:, :16], x0[:, 17:33]
    assert (x0[:, 16] == 5).all() and (x0[:, 33] == 6).all()               # SEP, EOS
    assert given.tolist() == [[True] * 17 + [False] * 16 + [True]] * 5
    assert [a.tolist() for a in prefix.boards(x0, given)] == [puzzle.tolist(), solution.tolist()]
    x0, given = board.batch(5, gen(0), "test")
    assert (x0 == solution).all() and (given == (puzzle > 0)).all()


@pytest.mark.parametrize("layout", data.LAYOUTS)
def test_clues_shows_that_many_random_cells(layout, sudoku4):
    ds = sudoku4(layout=layout, clues=3)
    puzzle, solution = ds.boards(*ds.batch(3000, gen(0)))
    assert ((puzzle > 0).sum(1) == 3).all() and ((puzzle == 0) | (puzzle == solution)).all()
    assert abs((puzzle > 0).double().mean(0) - 3 / 16).max() < 0.03


def test_puzzle_scores_by_hand(sudoku4):
    s = torch.tensor([[1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1]])
    other = torch.tensor([[2, 1, 3, 4, 3, 4, 1, 2, 1, 2, 4, 3, 4, 3, 2, 1]])     # valid as well
    given = (torch.arange(16) // 4 == 1).repeat(4, 1)
    x = s.repeat(4, 1)
    x[1] = other                                # 4 of 12 cells differ
    x[2, 0] = 2                                 # breaks a rule
    x[3, 15] = 5                                # the mask: nothing was written
    ds = sudoku4(layout="board")
    got = ds.metrics(x, s.repeat(4, 1), given)
    assert_close(got["exact"], 0.25), assert_close(got["valid"], 0.5)
    assert_close(got["cell"], (12 + 8 + 11 + 11) / 48)
    assert_close(got["exact_se"], math.sqrt(0.25 * 0.75 / 4))
    assert ds.boards(x, given)[1][3, 15] == 0
    # the prefix layout can overwrite a clue, here the first cell: a legal board, but not valid
    ds = sudoku4(layout="prefix")
    puzzle = torch.where(torch.arange(16) < 1, s, 0)
    (x0, given), (x, _) = ds.tokens(puzzle, s), ds.tokens(puzzle, other)
    got = ds.metrics(x, x0, given)
    assert got["exact"] == got["valid"] == 0 and abs(got["cell"] - 12 / 15) < 1e-6
    full, given = ds.tokens(s, s)               # a board without blanks
    for x in (x0, full):
        got = ds.metrics(x, x, given)
        assert got["exact"] == got["valid"] == got["cell"] == 1


def test_generated_puzzles_are_cached(tmp_path, monkeypatch):
    def cached(count):
        return data.cached_puzzles(4, count, tmp_path)
    first = cached(600)
    assert (first[:, :200] == generated(4)).all()            # more puzzles begin with the same
    assert (first[:, 512:] != first[:, :88]).any()           # and go on with others
    assert cached(90).shape == (2, 90, 16)
    monkeypatch.setattr(data, "generate", None)
    assert (cached(600) == first).all()
    with pytest.raises(KeyboardInterrupt), data.whole(tmp_path / "x"):
        raise KeyboardInterrupt
    assert len(list(tmp_path.iterdir())) == 2                # what is not finished is not there


def forms_of(puzzle, solution):
    """A puzzle and its solution in the forms in which they are found in files."""
    p, s = text_of(puzzle), text_of(solution)
    rows, drawn = textwrap.wrap(p, math.isqrt(len(p))), data.draw_boards(puzzle, solution)
    return [
        *(p.replace(".", blank) for blank in ".0_*xX"),
        f"{p} {s}",
        f'id,puzzle,solution,clues,difficulty\n0,"{p}","{s}",24,1.5',        # Kaggle's
        f"source,question,answer,rating\na b,{p},{s},7\n",
        "\n".join(["Puzzle no. 1", *rows]),
        "\n".join(" ".join(row) for row in rows),
        "\n".join(";".join(row) + ";" for row in rows),
        ",".join(p), ",".join(p + s),                                       # a line of cells
        drawn, drawn.replace("|", "\u2502").replace("-", "\u2500")]


@pytest.mark.parametrize("n", [4, 6, 9])
def test_puzzles_are_read_in_every_form(n, tmp_path):
    both, path = generated(n)[:, :2], tmp_path / "x.txt"
    for first, second in zip(forms_of(*both[:, 0]), forms_of(*both[:, 1])):
        text = f"{first}\n{second}\n"
        assert (data.puzzles_to_solve(text, n) == both[0]).all(), text
        for content in (text, "\ufeff" + text.replace("\n", "\r\n")):      # as Windows writes it
            path.write_bytes(content.encode())
            assert (data.read_puzzles(path, n) == both).all(), text
        assert (data.puzzles_to_solve(str(path), n) == both[0]).all(), text


def test_wrong_lines_of_puzzles_are_named(tmp_path):
    path, puzzles, solutions = tmp_path / "x.csv", *generated(9)
    p, s, other = text_of(puzzles[0]), text_of(solutions[0]), text_of(solutions[1])
    rows, swapped = textwrap.wrap(p, 9), s[1] + s[0] + s[2:]
    for lines, why in (
            ([p[:-1]], f"line 4: '{p[:40]}' has no place after 0 cells: a 9x9 puzzle has 81"),
            ([rows[0], rows[1] * 2], f"line 5: '{rows[1] * 2}' has no place after 9 cells"),
            (rows[:8], "line 12: 'end of file' has no place after 72 cells"),
            ([p, p[:-1] + "a"], f"line 5: '{p[:40]}' has no place after 0 cells"),
            ([f"{p},{swapped}"], "line 4: its solution breaks the rules"),
            ([f"{p},{other}"], "line 4: its solution changes a clue"),
            (["", *["." * 9] * 9], "line 5: the puzzle has several solutions"),
            ([swapped.replace("9", ".")], "line 4: the puzzle has no solution")):
        path.write_text("\n".join(["puzzle,solution", f"{p},{s}", "", *lines]))
        refused(f"x.csv, {why}", data.read_puzzles, path, 9)
    path.write_text("puzzle,solution\n")
    refused("x.csv holds no 9x9 puzzle", data.read_puzzles, path, 9)


def test_puzzles_to_solve_may_have_many_solutions_but_no_contradiction(tmp_path):
    refused("'x.txt' (no file) holds no 4x4 puzzle", data.puzzles_to_solve, "x.txt", 4)
    path = tmp_path / "x.txt"
    for n, bad in ((9, "1...1" + "." * 76), (4, "123....4" + "." * 8)):
        path.write_text("." * n * n + "\n" + bad)       # a digit twice in a row; a cell without one
        refused("x.txt, line 2: the clues contradict", data.puzzles_to_solve, str(path), n)


def test_boards_are_drawn_by_hand():
    s = np.array([1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1])
    p, x, cell = np.where(np.arange(16) % 5 == 0, s, 0), s.copy(), np.arange(16)
    assert data.draw_boards(p, x).splitlines() == [
        "1 _ | _ _    1'2 | 3 4 ",
        "_ 4 | _ _    3 4'| 1 2 ",
        "----+-----   ----+-----",
        "_ _ | 4 _    2 1 | 4'3 ",
        "_ _ | _ 1    4 3 | 2 1'"]
    other = data.draw_boards(p, np.array([0, 2, 1, 3, 4])[s])   # a board, but not of these clues
    assert other.count("!") == 2
    x[1], x[15] = 1, 0                                     # a repeated digit, a lost clue
    right = [line[13:] for line in data.draw_boards(p, x).splitlines()]
    assert right[0] == "1!1!| 3 4 " and right[3:] == ["2 1!| 4'3 ", "4 3 | 2 _'"]
    drawn = data.draw_boards(p, np.where(cell == 3, 0, s), new=cell == 2).splitlines()
    assert drawn[0] == "1 _ | _ _    1'2 | 3+_ "           # new; a blank has no mark


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `body` in the way that `mode` says, and notes the Range headers it was sent."""

    body, mode, seen = bytes(range(256)) * 1000, "range", []

    def do_GET(self):
        wanted, mode = self.headers.get("Range"), self.mode
        self.seen.append(wanted)
        start = int(wanted[6:-1]) if wanted and mode != "no range" else 0
        body = b"" if mode.isdigit() else self.body[start:]
        status = int(mode) if mode.isdigit() else 200 if not start else 206 if body else 416
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "text/html" if mode == "html" else "application/zip")
        self.end_headers()
        self.wfile.write(body[:100_000] if mode == "cut" and not start else body)


@pytest.fixture
def server():
    handler = type("Handler", (Server,), dict(seen=[]))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
        handler.url = f"http://127.0.0.1:{httpd.server_port}/x.npy"
        yield handler
        httpd.shutdown()


@pytest.mark.parametrize("mode, before, ranges", [
    ("range", 0, [None]), ("range", 100, ["bytes=100-"]),
    ("no range", 100, ["bytes=100-"]),                       # the server sends all of it
    ("cut", 0, [None, "bytes=65536-"]),                      # requests hands on 65,536 at a time
    ("range", 256_000, ["bytes=256000-", None])])            # nothing follows: anew
def test_downloads_go_on_where_they_were_cut(server, tmp_path, mode, before, ranges):
    body, file, part = server.body, tmp_path / "d" / "x.npy", tmp_path / "d" / "x.npy.part"
    server.mode, good = mode, hashlib.sha256(body).hexdigest()
    if before:
        part.parent.mkdir()
        part.write_bytes(body[:before])
    if mode == "cut":
        with pytest.raises(OSError):
            data.download(server.url, file, good)
    assert data.download(server.url, file, good).read_bytes() == body
    assert [r and r.replace("100000", "65536") for r in server.seen] == ranges
    assert not part.exists()
    assert data.download("http://127.0.0.1:9/x", file, good) == file         # nobody is asked


@pytest.mark.parametrize("mode, error, why", [
    ("range", ValueError, "does not have sha256"), ("html", ValueError, "a web page"),
    ("404", OSError, "404"), ("closed", OSError, "127.0.0.1")])
def test_bad_downloads_leave_nothing_under_the_final_name(server, tmp_path, mode, error, why):
    server.mode = mode
    url = "http://127.0.0.1:9/x" if mode == "closed" else server.url      # nobody listens there
    with pytest.raises(error, match=why):
        data.download(url, tmp_path / "x.npy", "0" * 64)
    assert not any(tmp_path.iterdir())


def shah_rows():
    """`generated(9)` as Shah et al. store it: number of givens, the givens, then the blanks."""
    rows = []
    for puzzle, solution in zip(*generated(9)):
        cells = np.argsort(puzzle == 0, kind="stable")
        strategy = np.where(puzzle[cells] > 0, 0, 2)
        steps = np.stack([cells // 9, cells % 9, solution[cells], strategy], axis=1)
        rows.append([(puzzle > 0).sum(), *steps.ravel()])
    return np.array(rows)


def test_puzzles_of_shah_et_al_are_downloaded(server, tmp_path, monkeypatch):
    packed = io.BytesIO()
    np.save(packed, shah_rows())
    server.body = packed.getvalue()
    monkeypatch.setattr(data, "SHAH_URL", server.url + "?id={}")
    ds = data.load("sudoku", source="shah", data_dir=tmp_path)
    assert (ds.test_set.numpy() == generated(9)).all()
    assert [f.name for f in tmp_path.iterdir()] == ["sudoku-test-data.npy"]      # when needed
    assert (ds.train_set.numpy() == generated(9)).all() and len(server.seen) == 2


def test_broken_rows_of_shah_et_al_are_named(tmp_path):
    raw, path = shah_rows(), tmp_path / "x.npy"
    at = 1 + 4 * raw[7, 2::4].tolist().index(0)          # a cell of column 0
    shape = "not the givens and then the blanks"
    for changes, why in (
            ({0: 40}, shape), ({3: 0}, shape), ({321: 4}, shape),        # givens, a value, a row
            ({at: raw[7, at] - 1, at + 1: 9}, shape),                    # column 9 of the row above
            ({3: raw[7, 3] % 9 + 1}, "its solution breaks the rules")):
        bad = raw.copy()
        bad[7, list(changes)] = list(changes.values())
        np.save(path, bad)
        refused(f"x.npy, row 7: {why}", data.read_puzzles, path, 9)
    np.save(path, raw[:, :-1])
    refused("x.npy must have 325 columns", data.read_puzzles, path, 9)


# ---- text

def test_wordpiece_goldens_by_hand():
    vocab = ("[PAD] [UNK] [CLS] [SEP] [MASK] un ##aff ##able want ##want ##wa ##ed cafe ##s "
             ", ! ' don t \u6771 \u4eac a ##b \u201c x").split()
    wp = data.WordPiece(vocab)
    for text, want in (
            ("UNaffable", "un ##aff ##able"),              # the example of BERT's own code
            ("UNwanted,  unwanted!", "un ##want ##ed , un ##want ##ed !"),
            ("Caf\u00e9s", "cafe ##s"), ("cafe\u0301", "cafe"),
            ("don't", "don ' t"), ("\u6771\u4eac", "\u6771 \u4eac"),
            ("\u201ca\u201c", "\u201c a \u201c"), ("a\tx\nx\u00a0x", "a x x x"),
            ("a\u200bb\u0007b", "a ##b ##b"), ("zebra a", "[UNK] a"), ("unx", "[UNK]"),
            ("a" + "b" * 99, "a" + " ##b" * 99), ("a" + "b" * 100, "[UNK]"), ("  ", "")):
        assert [vocab[i] for i in wp.encode(text)] == want.split(), text


def test_detokenizer_goldens_by_hand():
    for line, want in (
            ("He said , \" it 's late . \" Really ?", "He said, \"it's late.\" Really?"),
            ("See http : / / x.org or https : / / y.org !", "See http://x.org or https://y.org!"),
            ("It cost $ 5 ; not \u00a3 6 : no .", "It cost $5; not \u00a36: no."),
            ("either / or ( as they say ) [ sic ] .", "either/or (as they say) [sic] ."),
            ("What ? Yes ! And so on .", "What? Yes! And so on."),
            ("\" Really ? \"", "\"Really?\""), ("the dogs ' ears", "the dogs ' ears"),
            ("' quoted '", "'quoted'")):
        assert data.detokenize(line) == want


def joined(chunks, vocab):
    return "".join(vocab[i] for i in chunks.flatten())


def random_text(alphabet, n):
    return "".join(np.random.default_rng(0).choice(list(alphabet), n))


def test_text_files_are_split_and_chunked_without_gap_or_overlap(tmp_path):
    path, text = tmp_path / "t.txt", random_text("ab\u00e9\n \u6771", 2003)
    for content in (text, "\ufeff" + text.replace("\n", "\r\n")):              # as Windows does
        path.write_bytes(content.encode())
        ds = data.load("text", data_path=path, length=7)
        assert ds.vocab == sorted(set(text)) and (ds.seq_len, ds.vocab_size) == (7, 6)
        for chunks, (a, b) in zip(ds.splits.values(), ((0, 1802), (1802, 1902), (1902, 2003))):
            assert joined(chunks, ds.vocab) == text[a: b - (b - a) % 7]        # 90, 95, 100 %
    for (split, chunks), n in zip(ds.splits.items(), (5, 14, 14)):
        x, given = ds.batch(n, gen(0), split)
        assert x.dtype == torch.int64 and not given.any() and len(x) == n
        assert {*map(tuple, x.tolist())} <= {*map(tuple, chunks.tolist())}
    assert len(torch.unique(x, dim=0)) == 14                                   # each once
    assert data.show(x[:1], 6, ds.vocab) == joined(x[0], ds.vocab).replace("\n", "\\n")


def test_alphabets_of_text_files(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("abc" * 99)
    load = functools.partial(data.load, "text", data_path=path, length=7)
    assert load(alphabet="text8").vocab_size == 27 and load(list("abcd")).vocab_size == 4
    refused("'c' is not among the 2 symbols of the model", load, list("ab"))
    refused("too little text", load, length=50)
    path.write_bytes(b"abc\xff")
    refused("t.txt is not UTF-8: 'utf-8' codec can't decode byte 0xff in position 3", load)
    for V in (2, 255, 256, 300):                             # ids of one and of two bytes
        vocab = [*map(chr, range(V))]
        assert data.character_ids("".join(vocab), vocab).tolist() == list(range(V))
        refused(f"{chr(V)!r} is not among the {V}", data.character_ids, chr(V), vocab)


def test_text8_is_mapped_downloaded_checked_and_split(server, tmp_path, monkeypatch):
    assert data.to_text8("In 1984, Caf\u00e9s!") == "in one nine eight four caf s "
    text, packed = random_text(data.ALPHABET, 9000), io.BytesIO()
    with zipfile.ZipFile(packed, "w") as z:
        z.writestr("readme", "x")
        z.writestr("text8", text)
    server.body = packed.getvalue()
    monkeypatch.setattr(data, "TEXT8", (server.url, data.TEXT8[1]))
    refused("does not have sha256", data.read_text8, tmp_path)       # it is not the real one
    monkeypatch.setattr(data, "TEXT8", (server.url, hashlib.sha256(server.body).hexdigest()))
    ds = data.load("text8", data_dir=tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["text8.zip"]
    assert (ds.seq_len, ds.vocab) == (256, list(" abcdefghijklmnopqrstuvwxyz"))
    for chunks, start, n in zip(ds.splits.values(), (0, 8100, 8550), (31, 1, 1)):
        assert joined(chunks, ds.vocab) == text[start: start + 256 * n]


def tar_of(files):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo("root/" + name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return packed.getvalue()


def test_lm1b_is_streamed_detokenised_encoded_and_packed(server, tmp_path, monkeypatch):
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] + list("abcdefgh") + ["##" + c for c in "abcdefgh"]
    pounds = "d \u00a3 d\n"                                  # "\u00a3d" is one word, unknown
    training, heldout = (s + "-monolingual.tokenized.shuffled/" for s in ("training", "heldout"))
    server.body = tar_of({
        training + "news.en-00001-of-00100": "ab c\n" * 300,
        training + "news.en-00002-of-00100": "e\n" * 3,
        heldout + "news.en.heldout-00000-of-00050": pounds * 9,
        heldout + "news.en-00000-of-00100": pounds,
        "README": "a b c\n"})
    pieces = tmp_path / "bert-base-uncased-vocab.txt"
    pieces.write_text("\n".join(vocab) + "\n")
    monkeypatch.setattr(data, "BERT_VOCAB", ("", hashlib.sha256(pieces.read_bytes()).hexdigest()))
    monkeypatch.setattr(data, "LM1B", (server.url, hashlib.sha256(server.body).hexdigest()))
    train_ids, held, got = data.read_lm1b(tmp_path)
    a, b, c, d, e = (vocab.index(piece) for piece in ("a", "##b", "c", "d", "e"))
    assert got == vocab and train_ids.tolist() == [a, b, c, 3] * 300 + [e, 3] * 3
    assert held.tolist() == [d, 1, 3] * 9
    assert {p.name for p in tmp_path.iterdir()} == {pieces.name, "lm1b.tar.gz",
                                                    "lm1b-train.uint16", "lm1b-heldout.uint16"}
    ds = data.load("lm1b", length=10, data_dir=tmp_path)
    x, _ = ds.batch(2)
    assert x.tolist() == [[2, a, b, c, 3, a, b, c, 3, 3]] * 2        # [CLS], eight, [SEP]
    assert [len(s) for s in ds.splits.values()] == [(1206 - 12) // 8, 12 // 8, 27 // 8]
    assert data.show(x[:1], len(vocab), vocab) == "[CLS] ab c [SEP] ab c [SEP] [SEP]"


def test_scores_of_text_samples_by_hand(tmp_path):
    (tmp_path / "t.txt").write_text("abcd" * 300)
    ds = data.load("text", data_path=tmp_path / "t.txt", length=4)
    got = ds.metrics(torch.tensor([[0] * 8, [0, 1] * 4]))     # 1 and 2 of 5 4-grams are different
    assert_close(got, dict(entropy=LN2 / 2, entropy_sd=LN2 / 2, distinct4=3 / 10))


# ---- training

def test_settings_come_from_the_preset_and_then_from_the_flags():
    for flags, want in (
            ("", dict(preset="small", dataset="pairs", layers=3, kl_weight=1.5, t_min=0.5)),
            ("--dataset needle --kl-weight 4", dict(kl_weight=4, kl_start=0.01, batch_size=128)),
            ("--dataset text8", dict(objective="nelbo", dtype="float32")),       # all kinds of text
            ("--prior aggregate", dict(kl_weight=0.02, kl_start=0.001, full_mask_share=0.25)),
            ("--preset paper", dict(layers=8, batch_size=10_000, kl_weight=4, kl_start=4)),  # C.1
            ("--preset paper --kl-weight 2", dict(kl_weight=2, kl_start=2)),
            ("--preset paper --dataset text8", dict(layers=8, lr=3e-4, warmup=2500))):       # C.3
        assert vars(train.parse(flags.split())[0]).items() >= want.items(), flags
    a = train.parse(["--dataset", "sudoku", "--preset", "paper"])[0]
    assert abs(a.steps * a.batch_size / 300 - 1.8e6) < 2000
    known = vars(a) | dict(vocab_size=12, seq_len=164, block_size=164, prefix_len=82, places=None)
    n = VMD(Config(**{k: known[k] for k in vars(tiny().config)})).param_counts()
    assert abs((n["decoder"] + n["latent pathway"]) / 5.2e6 - 1) < 0.03


def test_schedules():
    a = train.parse("--decay-from 0 --kl-start 0.01 --kl-weight 4 --kl-ramp 0.2 0.6 --lr 0.1 "
                    "--warmup 10 --steps 110".split())[0]
    kl_weights = [train.kl_weight_at(s, a) for s in (0, 22, 44, 66, 110)]
    assert kl_weights == pytest.approx([0.01, 0.01, 0.2, 4, 4])          # the geometric mean
    for decay_from, steps, rates in (
            (0, (0, 9, 10, 60, 110), (0.01, 0.1, 0.1, 0.05, 0)),
            (0.5, (54, 55, 82.5, 110), (0.1, 0.1, 0.05, 0)), (1, (109,), (0.1,))):
        a.decay_from = decay_from
        assert [train.lr_at(s, a) for s in steps] == pytest.approx(list(rates))


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_training_is_bit_identical(tmp_path, monkeypatch, which):
    flags = "--dataset d1 --block-size 2"
    a = fast(tmp_path / "a", flags + " --log-every 5 --eval-every 6")
    schedule = train.kl_weight_at

    def interrupt(step, a):
        if step == 3:
            signal.raise_signal(which)
        return schedule(step, a)
    with monkeypatch.context() as patch:
        patch.setattr(train, "kl_weight_at", interrupt)
        stopped = fast(tmp_path / "b", flags, status=130)
    assert stopped["step"] == 4                              # after the signal's step
    b = resumed(tmp_path / "b")
    assert a["step"] == b["step"] == 6 and same(a["model"], b["model"])


def test_a_finished_run_resumes_to_itself_or_longer_and_a_new_one_moves_it_aside(tmp_path, capsys):
    first = fast(tmp_path)["model"]
    assert same(first, resumed(tmp_path)["model"])
    assert not same(first, fast(tmp_path, "--seed 1")["model"])
    assert same(first, weights(tmp_path / "1")["model"])
    assert f"moved the earlier run in {tmp_path}" in capsys.readouterr().out
    assert train.main(["--resume", "--steps", "8", "--out", str(tmp_path)]) == 0
    assert weights(tmp_path)["step"] == 8


def gradients(ckpt):
    """After one Adam step from zero its first moment is 0.1 x the gradient."""
    return [s["exp_avg"] for s in ckpt["optimizer"]["state"].values()]


def test_processes_micro_batches_and_compiling_give_one_gradient(tmp_path, monkeypatch):
    flags = ("--steps 1 --clip 0 --dataset d2 --block-size 2 --batch-size 16 --latent-dropout 0.3 "
             "--full-mask-share 0.25")
    one = gradients(fast(tmp_path / "one", flags))
    accum = gradients(fast(tmp_path / "accum", flags + " --grad-accum 2"))
    plain, calls = torch.compile, []                         # the graph: no code generator needed
    monkeypatch.setattr(torch, "compile",
                        lambda f: calls.append(f) or plain(f, backend="aot_eager"))
    compiled = gradients(fast(tmp_path / "compiled", flags + " --compile"))
    assert len(calls) == 1
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", HERE / "train.py"]
    python([*run, *FAST, *flags.split(), "--grad-accum", "2", "--out", "both"], tmp_path)
    assert max(g.abs().max() for g in one) > 1e-3
    for other in (accum, compiled, gradients(weights(tmp_path / "both"))):
        assert_close(other, one, rtol=1e-4, atol=1e-7)


# Runs of which the first process ends itself before the `nth` call of a function.
KILLS = """
import builtins, itertools, json, os, signal, socket, sys
import torch, torch._dynamo                  # the second is what an optimizer imports
import train
train.EVAL_SEQUENCES, train.report = 20, lambda *a: None     # seconds that no death needs to hit
torch.set_num_threads(1)                     # a fork copies no threads
out, world, flags = sys.argv[1], int(sys.argv[2]), sys.argv[3:]

def die(owner, name, nth):
    plain, calls = getattr(owner, name), itertools.count(1)
    def deadly(*args, **kw):
        if next(calls) == nth:
            os._exit(9)
        return plain(*args, **kw)
    setattr(owner, name, deadly)

def start(flags, death=None):
    with socket.create_server(("127.0.0.1", 0)) as free:
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    pids = []
    for rank in range(world):
        pids.append(os.fork())
        if pids[-1] == 0:
            os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
            if death and rank == 0:
                die(*death)
            os._exit(train.main(flags))
    first = os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1])
    for pid in pids[1:]:
        if death:
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return first

assert start([*flags, "--out", out + "/whole"]) == 0
deaths = [(torch, "save", 3), (os, "replace", 3), (json, "dumps", 5), (builtins, "print", 8),
          (train, "assess", 2)]              # all on the way from step 4 to its evaluation
for i, death in enumerate(deaths if world == 1 else deaths[1:3]):
    folder = f"{out}/{i}"
    assert start([*flags, "--out", folder], death) == 9, death
    step = torch.load(folder + "/last.pt", weights_only=True)["step"]
    assert 0 < step < 6, (death, step)
    assert start(["--resume", "--out", folder]) == 0, death
"""


@pytest.mark.parametrize("world, deaths", [(1, 5), (2, 2)])
def test_a_run_that_dies_anywhere_resumes_to_the_same_end(tmp_path, world, deaths):
    flags = [*FAST, "--log-every", "1", "--eval-every", "2", "--ema", "0.9"]
    python(["-c", KILLS, str(tmp_path), str(world), *flags], HERE)
    for name, i in itertools.product(("last.pt", "best.pt"), range(deaths)):
        whole, other = weights(tmp_path / "whole", name), weights(tmp_path / str(i), name)
        for k in ("step", "best", "model", "ema", "optimizer", "rng"):
            assert_close(whole[k], other[k], rtol=0, atol=0)


def test_a_save_that_fails_says_so_and_leaves_the_old_checkpoint(tmp_path, monkeypatch, capsys):
    plain = os.replace

    def full(a, b):
        if Path(b).exists():
            raise OSError("disk full")
        plain(a, b)
    monkeypatch.setattr(os, "replace", full)
    assert fast(tmp_path, status=2)["step"] == 3
    err = capsys.readouterr().err
    assert err.startswith("train.py: cannot write") and "disk full" in err and err.count("\n") == 1


@pytest.mark.parametrize("factors", [(1, math.nan, 1), (1, 1, math.inf), (1e38, 1, 1)])
def test_what_is_not_finite_stops_training_and_the_last_good_checkpoint_stays(
        tmp_path, capsys, monkeypatch, factors):
    """A reconstruction, a KL, a gradient that is not finite, in step 5."""
    plain, calls = train.objective, itertools.count(1)

    def poisoned(*args, **kw):
        bad = next(calls) == 5
        return [v * (f if bad else 1) for v, f in zip(plain(*args, **kw), factors)]
    monkeypatch.setattr(train, "objective", poisoned)
    monkeypatch.setattr(train, "validate", lambda run: dict(loss=1.0, active=[1]))
    kept = fast(tmp_path, status=1)
    out = capsys.readouterr().out
    assert f"not finite in steps 5 to 6; what {tmp_path} holds is from before" in out
    assert kept["step"] == 3 and all(v.isfinite().all() for v in kept["model"].values())


@pytest.mark.parametrize("source, freeze", [
    ("--latent-dim 0", ""), ("--prior aggregate --bank 20", "--freeze-decoder")])
def test_the_decoder_of_another_run_is_taken_and_trained_on_or_frozen(tmp_path, source, freeze):
    base = fast(tmp_path / "a", source + " --ema 0.9")["ema"]            # averaged where there are
    flags = f"--prior aggregate --bank 30 --init-from {tmp_path}/a/last.pt {freeze}"
    ckpt = fast(tmp_path / "b", flags)
    tuned = ckpt["model"]
    kept = {k for k in base if base[k].shape == tuned[k].shape and (base[k] == tuned[k]).all()}
    decoder = {k for k in base if not k.startswith(train.LATENT_PARTS)}
    assert kept == (decoder if freeze else set())
    assert sum(g.any().item() for g in gradients(ckpt)) == len(tuned.keys() - kept - {"bank"})


def test_averaged_weights_follow_their_definition():
    model, ema = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    want = ema.weight.item()
    for step, w in enumerate([1.0, 2.0, 5.0, -3.0]):
        model.weight.data.fill_(w)
        train.update_average(ema, model, 0.25, step)
        decay = min(0.25, (1 + step) / (10 + step))        # 0.1, 0.18, 0.25, 0.25
        want = decay * want + (1 - decay) * w
        assert_close(ema.weight.item(), want)


def test_the_latent_learns_pairs_and_the_baseline_cannot(tmp_path):
    """The claim of the paper, small: one step, two tokens that depend on each other."""
    acc = {}
    for Z in (8, 0):
        fast(tmp_path, f"--latent-dim {Z} --width 32 --layers 1 --steps 300 --batch-size 128 "
             "--lr 5e-3 --ema 0.98 --log-every 300 --eval-every 300")
        m, _ = load_checkpoint(tmp_path / "last.pt")
        x = diffusion.sample(m, torch.full((5000, 2), 10), generator=gen(0))
        acc[Z] = data.load("pairs").metrics(x)["acc"]
    assert acc[8] > 0.8 and acc[0] < 0.15, acc


def test_best_is_not_overwritten_by_worse(tmp_path, monkeypatch):
    losses = iter([2.0, 1.0, 3.0])
    monkeypatch.setattr(train, "validate", lambda run: dict(loss=next(losses, 9.0), active=[1]))
    fast(tmp_path, "--eval-every 2")
    assert resumed(tmp_path)["step"] == 6                    # evaluates once more: 9.0
    best = weights(tmp_path, "best.pt")
    assert best["step"] == 4 and best["best"] == 1.0


def test_best_stays_when_a_finished_run_is_trained_longer(tmp_path, monkeypatch):
    losses = iter([2.0, 1.0, 1.0])
    monkeypatch.setattr(train, "validate", lambda run: dict(loss=next(losses, 9.0), active=[1]))
    fast(tmp_path, "--eval-every 4")                         # evaluates after steps 4 and 6
    assert train.main(["--resume", "--steps", "8", "--out", str(tmp_path)]) == 0
    assert weights(tmp_path, "best.pt")["step"] == 6


def test_an_evaluation_that_was_cut_off_is_made_up_for(tmp_path, monkeypatch):
    def cut(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(train, "assess", cut)
        assert fast(tmp_path, status=130)["step"] == 3
    assert train.main(["--resume", "--eval-every", "4", "--out", str(tmp_path)]) == 0
    lines = [json.loads(s) for s in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if "eval" in r] == [3, 4, 6]


def test_the_collapse_message_comes_once_and_its_advice_fits_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "active_units", lambda *a, **k: torch.zeros(1, dtype=torch.long))
    fast(tmp_path, "--eval-every 2 --preset paper --batch-size 8")
    out = capsys.readouterr().out
    assert out.count("no unit is active") == out.count("the KL weight is constant") == 1
    for flags, advice in (
            ("", "lower --kl-start or --kl-weight"), ("--preset paper", "add --kl-start 1e-3"),
            ("--dataset sudoku", "z is not used, and need not be"),
            ("--dataset sudoku --clues 2", "the README's boards without clues")):
        assert advice in train.explain_idle_latent(train.parse(flags.split())[0]), flags
    a = train.parse("--preset paper --kl-start 1e-3".split())[0]         # and a ramp it is
    assert [train.kl_weight_at(step, a) for step in (0, a.steps)] == [1e-3, 4]


# ---- scripts, as users run them

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which a user has run train.py, briefly."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "t.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 100)
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 5, (40, 6)))
    np.save(folder / "least.npy", np.arange(20)[:, None] % 2)            # L = 1, V = 2
    python([HERE / "train.py", *FAST], folder)
    with contextlib.chdir(folder):
        fast("sud", "--dataset sudoku --grid 4 --puzzles 300 --steps 40 --lr 0.01")
        fast("txt", "--dataset text --data-path t.txt --length 16")
    return folder


def test_scripts_run_one_after_the_other_without_flags(trained):
    assert {p.name for p in (trained / "out").iterdir()} == {"last.pt", "best.pt", "log.jsonl"}
    lines = python([HERE / "sample.py"], trained).stdout.splitlines()
    assert len(lines) == 10 and all(re.fullmatch(r"\d \d", s) for s in lines)
    flags = ("--num 200 --bound-num 100 --nfe 1 2 --iwae 2 --remask prob margin "
             "--latent fixed none --json r.json").split()
    out = python([HERE / "eval.py", *flags], trained).stdout
    assert "not a bound" in out and "generated" in out and "active latent units" in out
    r = read_json(trained / "r.json")
    rows, bounds = r["rows"], r["bounds"]
    assert {"dataset", "checkpoint", "step", "seed", "device", "seconds", "params"} <= r.keys()
    assert r["eval_args"]["num"] == 200
    assert len(rows) == 8 and 0 <= rows[0]["acc"] <= 1
    assert {"nfe", "remask", "temperature", "latent", "acc", "kl"} <= rows[0].keys()
    assert {(row["latent"], row["temperature"]) for row in rows} == {("fixed", 0), ("none", 1)}
    assert [(b["bound"], b["steps"]) for b in bounds] == [
        ("printed", None), ("nelbo", 1), ("nelbo", 2), ("nelbo", 4), ("nelbo", None),
        ("iwae_2", 1), ("iwae_2", 2), ("iwae_2", 4)]
    assert all({"nats", "se"} <= b.keys() for b in bounds)


def test_held_out_puzzles_are_solved_drawn_and_written(user):
    out = user("sample", "--ckpt sud/last.pt --num 3 --out s.csv")
    assert out.count("solved: ") == 3 and " of 3 solved" in out
    rows = [line.split(",") for line in Path("s.csv").read_text().splitlines()]
    assert [[len(board) for board in row] for row in rows] == [[16, 16]] * 3
    for puzzle, answer in rows:
        assert all(p in ("0", a) for p, a in zip(puzzle, answer)) and "0" not in answer
    assert "_ _ | _ _    " in user("sample", "--ckpt sud/last.pt --clues 0 --num 1")


SOLVED = ["1234341221434321", "2134341212434321", "3214143223414123"]


def test_boards_written_without_clues_are_counted_if_they_are_held_out(sudoku4, capsys):
    ds = sudoku4(layout="board")
    held, trained = ds.test_set[1, [0, 0]], ds.train_set[1, :1]
    boards = torch.cat([held, trained, torch.ones_like(trained)])
    sampling.show_boards(torch.zeros_like(boards), boards, None)
    assert capsys.readouterr().out.endswith("3 of 4 solved, 2 different, 1 of them held out\n")


def test_puzzles_of_ones_own_are_a_string_or_a_file(user):
    solve = "--ckpt sud/last.pt --puzzle "
    out = user("sample", solve + "1234............ --num 2")
    assert out.count("1 2 | 3 4    1") == 2 and out.count("solved: ") == 2
    # what is solved stays as it is
    out = user("sample", solve + SOLVED[0] + " --num 2")
    assert "2 of 2 solved, 1 different" in out and out.count("solved: yes") == 2
    Path("p.txt").write_text(f"{SOLVED[0]}\n{'0' * 16}\n")
    out = user("sample", solve + "p.txt")
    assert out.count("solved: ") == 2
    Path("drawn.txt").write_text(out)                         # what it draws, it reads
    assert user("sample", solve + "drawn.txt").splitlines()[0] == out.splitlines()[0]


def test_all_puzzles_of_a_file_are_scored(user, capsys):
    user("eval", "--ckpt sud/last.pt --num 20 --bound-num 10 --json e.json")
    rows = read_json("e.json")["rows"]
    assert len(rows) == 3 and {"exact", "exact_se", "valid", "cell"} <= rows[0].keys()
    file = "--ckpt sud/last.pt --data-path p.txt "
    Path("p.txt").write_text("".join(f"{b},{b}\n" for b in SOLVED))           # nothing left to do
    ckpt = weights("sud")
    ckpt["args"]["clues"] = 0                                 # of training: the file's keep theirs
    torch.save(ckpt, "no_clues.pt")
    for file in (file, file.replace("sud/last.pt", "no_clues.pt")):
        out = user("eval", file + "--bound-steps --nfe 2 --remask margin --json e.json")
        row = read_json("e.json")["rows"][0]
        assert "3 samples" in out and row["valid"] == row["cell"] == 1
    Path("p.txt").write_text(SOLVED[0] + "\n")                # one puzzle has no standard error
    assert status_of(capsys, "eval", file.split()) == 2
    user("eval", file + "--bound-steps")


def test_puzzles_that_were_trained_on_are_not_scored_wherever_one_is(user, capsys):
    Path("mine.txt").write_text("\n".join(map(text_of, data.generate(4, 100)[0])))
    fast("mine", "--dataset sudoku --grid 4 --data-path mine.txt")
    Path("elsewhere").mkdir()
    flags = "--ckpt ../mine/last.pt --data-path ../mine.txt".split()
    with contextlib.chdir("elsewhere"):
        assert status_of(capsys, "eval", flags, "were trained on") == 2


@pytest.mark.parametrize("flags, pattern", [
    ("--prompt '3 _' --nfe 2", r"3 \d"), ("--prompt '3 4'", "3 4"),
    ("--prompt '* 4' --blank '*'", r"\d 4"), ("--ckpt txt/last.pt", ".{16}"),
    ("--ckpt txt/last.pt --prompt 'the quick'", "the quick.{7}"),
    ("--ckpt txt/last.pt --prompt a__b --length 8", "a..b.{4}"),
    ("--ckpt txt/last.pt --prompt the --length 40", "the.{37}")])     # longer than in training
def test_prompts_are_kept_filled_in_and_continued(user, flags, pattern):
    lines = user("sample", "--num 6 --out samples.txt " + flags).splitlines()
    assert len(lines) == 6 and Path("samples.txt").read_text().splitlines() == lines
    assert len(set(lines)) > 1 or "txt" not in flags
    assert all(re.fullmatch(pattern, s.replace("\\n", "\n"), re.S) for s in lines), lines


def test_text_is_judged(user):
    fast("ar", "--dataset text --data-path t.txt --length 16 --block-size 1 --latent-dim 0")
    out = user("eval", "--ckpt txt/last.pt --num 5 --bound-num 10 --judge ar/last.pt --json t.json")
    r = read_json("t.json")
    assert {"entropy", "entropy_sd", "gen_ppl_sd", "distinct4"} <= r["rows"][0].keys()
    assert r["rows"][0]["gen_ppl"] > 1 and "bits/token" in out and "perplexity" in out
    assert all(b["nats_per_token"] == b["nats"] / 16 for b in r["bounds"])


def test_steps_are_shown(user):
    states = user("sample", "--show-steps --nfe 2 --num 2").split("\n\n")
    assert [s.splitlines()[0] for s in states[:2]] == ["evaluation 1", "evaluation 2"]
    assert all(s.count("_") == n for s, n in zip(states, (2, 0, 0)))
    assert states[1].splitlines()[1:] == states[2].splitlines()
    out = user("sample", "--ckpt sud/last.pt --show-steps --nfe 3")
    *states, final, count = out.strip().split("\n\n")
    assert len(states) == 3 and " of 1 solved, " in count and "solved: " in final
    for state in states:                                 # something new, and no verdict yet
        assert re.search(r"\d[+!]", state) and "solved" not in state


def test_prefixes_of_arrays_are_given(user, capsys):
    fast("arr", "--dataset array --data-path tokens.npy --prefix-len 2")
    assert "this model          exact " in capsys.readouterr().out
    lines = user("sample", "--ckpt arr/last.pt --num 4").splitlines()
    ds = data.load("array", data_path="tokens.npy", prefix_len=2)
    held = ds.batch(9, split="test")[0].tolist()
    prefixes = [f"{a} {b} " for a, b, *_ in held]
    assert len(lines) == 4 and all(s.startswith(tuple(prefixes)) for s in lines)
    out = user("sample", "--ckpt arr/last.pt --num 1 --prompt '3 1 _ _'")
    assert out.startswith("3 1 ")


def test_any_terminal_gets_the_result_and_a_reader_may_leave(trained):
    flags = "--num 50 --bound-num 10 --json ascii.json".split()
    out = python([HERE / "eval.py", *flags], trained, PYTHONIOENCODING="ascii").stdout
    assert "##" in out and "?" not in out and (trained / "ascii.json").exists()
    command = f"{sys.executable} {HERE}/sample.py --num 9999 | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=trained, capture_output=True, text=True)
    assert done.returncode in (0, 141) and "Error" not in done.stderr, done.stderr


@pytest.mark.parametrize("flags, score", [
    ("--dataset pairs_nonuniform --conditioning shared", "acc"),
    ("--dataset pairs_strength --strength 0.3 --dtype bfloat16 --weight-decay 0.1", "acc"),
    ("--dataset d1 --block-size 2 --prior block", "acc"),
    ("--dataset d1 --prior noised --objective nelbo --objective-steps 2", "acc"),
    ("--prior aggregate --bank 20 --latent-dropout 0.5 --full-mask-share 0.5", "acc"),
    ("--dataset d2 --block-size 1 --latent-dim 0", "acc"),
    ("--dataset needle --length 9 --conditioning add", "cond_acc"),
    ("--dataset array --data-path tokens.npy --prefix-len 2", "exact"),
    ("--dataset array --data-path least.npy --batch-size 1", "num"),
    ("--dataset text --data-path t.txt --alphabet text8 --length 8 --block-size 8", "entropy"),
    ("--preset paper --dataset sudoku --grid 4 --puzzles 300 --ema 0.9", "valid"),
    ("--dataset sudoku --puzzles 300 --clues 20 --latent-dim 0", "valid")])
def test_every_dataset_and_choice_trains_samples_and_evaluates(user, capsys, flags, score):
    ckpt, words = fast("other", flags), flags.split()
    settings = ckpt["args"] | ckpt["config"]
    one = settings["dataset"] in data.SYNTHETIC and settings["block_size"] == settings["seq_len"]
    assert ("independent tokens" in capsys.readouterr().out) == one     # what one step is beside
    for flag, value in zip(words[::2], words[1::2]):
        value = os.path.abspath(value) if flag == "--data-path" else value
        assert str(settings[flag[2:].replace("-", "_")]) == value
    for latent in diffusion.LATENT:
        user("sample", f"--ckpt other/last.pt --latent {latent} --nfe 2")
    out = user("eval", "--ckpt other/last.pt --num 50 --bound-num 20 --json o.json")
    assert ("not a bound" in out) == (settings["latent_dim"] > 0)
    r = read_json("o.json")
    assert all(score in row for row in r["rows"])
    assert all(math.isfinite(b["nats"]) for b in r["bounds"])
    cold_too = score == "valid" and not settings["latent_dim"]     # argmax may suit a baseline
    assert len({row["temperature"] for row in r["rows"]}) == 1 + cold_too


@pytest.mark.parametrize("script", ["sample", "eval"])
def test_choices_reach_the_sampler(user, monkeypatch, script):
    seen, plain = [], diffusion.sample
    monkeypatch.setattr(SCRIPTS[script], "sample",
                        lambda *args, **kw: seen.append(args[2:] + (kw["latent_draws"],))
                        or plain(*args, **kw))
    flags = ("--num 3 --nfe 2 --remask margin --temperature 0.5 --latent encoder --batch-size 7 "
             "--latent-draws 2")
    user(script, flags + " --bound-num 2" * (script == "eval"))
    assert set(seen) == {(2, "margin", 0.5, "encoder", 7, 2)}


def test_heat_map_draws_what_it_is_given():
    t = data.load("pairs").true_joint()
    lines = evaluation.heat_map(t, torch.full((10, 10), 0.01, dtype=torch.float64)).splitlines()[1:]
    assert len(lines) == 10 and all(line.endswith("░" * 20) for line in lines)
    assert lines[0].startswith("  ██  ") and lines[9].startswith("██  ")


def test_benchmark_counts_and_compares(user):
    fields = "vocab_size=27 seq_len=8 block_size=4 width=16 heads=2 layers=1 latent_dim=2"
    user("eval", f"--json b.json --batch-size 2 --nfe 2 --benchmark {fields}")
    rows = read_json("b.json")["rows"]
    assert [r["what"] for r in rows] == ["matmul", "training, VMD", "sampling, VMD",
                                         "training, control", "sampling, control"]
    assert all(r["gflops"] > 0 and r["tokens_per_second"][0] > 0 for r in rows)


# One case for each rule, and what the line must say; types and ranges are the next test's.
WRONG = """
train --dataset chess | invalid choice: 'chess'
train --ema 1 | --ema below 1
train --t-min 0 | --t-min must be above 0
train --kl-ramp 0.6 0.2 | FROM < TO
train --block-size 3 | 3 does not divide length 2
train --width 30 | no multiple of 2 x heads
train --prior block --latent-dim 0 | --prior block needs
train --freeze-decoder | needs --init-from
train --grad-accum 3 --batch-size 8 | not a multiple of
train --device tpu9 | device 'tpu9'
train --init-from out/last.pt | has width 16, not 64
train --resume --lr 0.5 | --lr 0.5 contradicts
train --resume --steps 1 | has done
train --dataset sudoku --puzzles 1 --grid 4 | too few puzzles
train --dataset sudoku --grid 6 --source shah | shah has 9x9 boards
sample --ckpt none.pt | no checkpoint at none.pt
sample --prompt '3 4 5' | --prompt has 3 tokens
sample --out no/such/folder/x | cannot be written
sample --puzzle 1............... | --puzzle does not go with pairs
sample --prompt '3 _' --blank ab | '_' is neither a blank (ab)
sample --ckpt sud/last.pt --clues 3 --puzzle 1............... | not allowed with argument --clues
eval --bound-num 1 | needs two test sequences
eval --iwae 2 --bound-steps 0 | needs a finite --bound-steps
eval --clues 3 | clues is an option of sudoku
eval --judge out/last.pt | --judge and --gen-ppl are for text
eval --ckpt txt/last.pt --judge txt/last.pt | no autoregressive model
eval --ckpt sud/last.pt --data-path none.txt | 'none.txt'
eval --json no/such/folder/x | cannot be written
eval --benchmark vocab_size=27 | needs block_size, seq_len
eval --benchmark colour=1 | colour=1 is not FIELD=VALUE
"""


def status_of(capsys, script, flags, word=""):
    """Exit status, after checking that 2 comes with one line on stderr, which says `word`."""
    try:
        status = SCRIPTS[script].main(flags)
    except SystemExit as e:        # argparse's own way out
        status = e.code
    err = capsys.readouterr().err.strip()
    one_line = "\n" not in err and err.startswith(f"{script}.py: ") and word in err
    assert status != 2 or one_line, (flags, err)
    return status


@pytest.mark.parametrize("line", WRONG.strip().splitlines())
def test_wrong_input_gets_one_line_and_status_2(trained, monkeypatch, capsys, line):
    command, word = line.split(" | ")
    script, *flags = shlex.split(command)
    monkeypatch.chdir(trained)
    before = [p.read_bytes() for p in sorted(Path("out").iterdir())]
    assert status_of(capsys, script, flags, word) == 2
    assert before == [p.read_bytes() for p in sorted(Path("out").iterdir())]


def test_flags_refuse_numbers_of_the_wrong_type_or_range(capsys):
    wrong = {data.count: ("x", "1.5", "0", "99999999999"), data.natural: ("-1", "x"),
             data.positive: ("0", "nan", "inf", "-1"), data.number: ("-1", "nan", "inf"),
             data.share: ("-0.1", "1.1", "nan")}
    for kind, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError):
                kind(value)
    for script, module in SCRIPTS.items():               # and every numeric flag has such a type
        for action in module.build_parser()._actions:
            assert action.type not in (int, float) or action.choices, action.dest


def test_a_bad_checkpoint_is_named_and_runs_nothing(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "pwned"),))
    m = tiny()
    good = dict(config=vars(m.config), model=m.state_dict())
    bad = dict(bomb={"model": Bomb()}, version=good | {"version": 2},
               wide=good | {"config": good["config"] | {"width": 32}})
    for name, content in bad.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "noise").write_bytes(bytes(range(256)) * 2)
    for name in (*bad, "noise"):
        refused(f"{name} is no checkpoint that can be used", load_checkpoint, tmp_path / name)
    for name in ("bomb", "noise"):                       # not torch's advice to load it anyway
        refused(f"{name} is no checkpoint that can be used: it is damaged", load_checkpoint,
                tmp_path / name)
    assert not (tmp_path / "pwned").exists()


def test_checkpoints_of_other_programs_are_read(tmp_path, user, capsys):
    m, path = tiny(4, 2, loops=2), tmp_path / "last.pt"
    prefixed = {f"module._orig_mod.{k}": v for k, v in m.state_dict().items()}
    torch.save(dict(config=vars(m.config), model=prefixed), path)
    assert same(load_checkpoint(path)[0].state_dict(), m.state_dict())
    assert [load_checkpoint(path, loops=n)[0].stack.depth for n in (None, 3)] == [4, 6]
    assert len(user("sample", f"--ckpt {path} --num 3").splitlines()) == 3
    assert status_of(capsys, "eval", ["--ckpt", str(path)]) == 2
    assert status_of(capsys, "train", ["--resume", "--out", str(tmp_path)]) == 2
    foreign = dict(args={"dataset": "mine"}, optimizer={})
    torch.save(dict(config=vars(m.config), model=prefixed, **foreign), path)
    assert len(user("sample", f"--ckpt {path} --num 3").splitlines()) == 3
    assert status_of(capsys, "eval", ["--ckpt", str(path)], "sampled only") == 2
    assert status_of(capsys, "train", ["--resume", "--out", str(tmp_path)], "not of train.py") == 2


def test_readme_examples_run_beside_the_files_they_import(trained, tmp_path):
    text = (HERE / "README.md").read_text()
    blocks = [b for b in re.findall(r"(?:^    .*\n)+", text, re.M) if "\n    from " in "\n" + b]
    for name in ("model", "diffusion", "data"):          # each alone
        blocks.append(f"import {name}\nprint({name})")
    needs = [re.findall(r"^ *(?:from|import) (model|diffusion|data)", b, re.M) for b in blocks]
    assert needs == [["model", "diffusion"], ["data", "diffusion", "model"], ["diffusion"],
                     ["model"], ["diffusion"], ["data"]]
    for i, (block, names) in enumerate(zip(blocks, needs)):
        folder = tmp_path / str(i)
        (folder / "out").mkdir(parents=True)
        shutil.copy(trained / "out" / "last.pt", folder / "out")
        for name in names:
            shutil.copy(HERE / f"{name}.py", folder)
        assert python(["-c", textwrap.dedent(block)], folder, PYTHONPATH="").stdout


def test_readme_commands_parse(tmp_path):
    """Those that a shell makes of the README's, loops and variables included."""
    shell = ('python() { printf "%s\\0" "$@"; echo; }; torchrun() { python "$@"; }\n'
             'qqwing() { :; }; zcat() { :; }\n')
    commands = []
    for block in re.findall(r"(?:^    .*\n)+", (HERE / "README.md").read_text(), re.M):
        if re.search(r"^ *(python|torchrun) .*\.py", block, re.M):
            done = subprocess.run(["bash", "-euc", shell + block], cwd=tmp_path, check=True,
                                  capture_output=True, text=True)
            commands += [line.split("\0")[:-1] for line in done.stdout.splitlines()]
    parsed = 0
    for words in commands:
        for script, module in SCRIPTS.items():
            if f"{script}.py" in words:
                module.build_parser().parse_args(words[words.index(f"{script}.py") + 1:])
                parsed += 1
    assert parsed > 20
