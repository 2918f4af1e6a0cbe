"""The VMD network: a masked-diffusion transformer conditioned on one Gaussian latent per block.

    model = VMD(Config(vocab_size=10, seq_len=4, block_size=2))
    mu, logvar = model.encode(xt, x0)           # q(z^b | x_t^b, x_0^{<=b}),       each (B, K, Z)
    logits = model.decode(xt, x0, z)            # p(x_0^{b,i} | x_t^b, x_0^{<b}, z^{<=b}), (B, L, V)

Source: "Variational Masked Diffusion Models", Sections 3 and 4 and Appendix C; the transformer is
that of BD3-LM (Arriola et al. 2025). Needs torch only and imports nothing of this project: copy it.

Key: B batch, L sequence length, r block size, K = L/r blocks, D width, H heads, Z latent size, V
vocabulary. Data ids are 0..V-1; the mask has id V and is never an output. t runs from 0 (clean) to
1 (all masked). latent_dim = 0 is the baseline without latents: MDM (one block), BD3-LM (several),
autoregressive (r = 1).
"""

import os
import warnings
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

CONDITIONING = ("adaln", "shared", "add")
POOLING = ("mean", "gated")
PRIOR = ("standard", "block", "noised")
LOGVAR_RANGE = (-12.0, 8.0)  # clamp: sigma from e^-6 to e^4
# differs from the paper: sigma = e^-2 at the start: a wide posterior lets the decoder ignore z
LOGVAR_INIT = -4.0
CHUNK = 64  # tokens whose attention is computed together in training: fewer keys that none may see
CHECKPOINT_VERSION = 2
CHECKPOINT = dict(  # what train.py writes besides the version: key, type
    config=dict, model=dict, ema=(dict, type(None)), optimizer=dict, step=int, best=float,
    seconds=float, args=dict, rng=dict, vocab=(list, type(None)))


@dataclass
class Config:
    """All that fixes the network's shape. Raises ValueError on values that do not fit together."""

    vocab_size: int  # V, without the mask
    seq_len: int  # L
    block_size: int  # r; L for one block
    width: int = 64  # D
    heads: int = 4  # H
    layers: int = 8  # decoder
    encoder_layers: int = 2
    latent_dim: int = 32  # Z per block; 0: no latent, no encoder
    latent_hidden: int = 4  # width of the hidden layers of z's MLP, in units of D
    conditioning: str = "adaln"  # how z enters the decoder: adaln (C.1), shared (C.2), add (C.3)
    pooling: str = "mean"  # how the encoder summarises a block: mean (C.1) or gated (C.2)
    prior: str = "standard"  # N(0, I); block p(z^b | z^{<b}) (E.2); noised p(z^b | x_t^b, x_0^{<b})
    prefix_len: int = 0  # tokens at the start that are never masked: gated pooling skips them

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is int and (not isinstance(value, int) or isinstance(value, bool)):
                raise ValueError(f"{f.name} must be an integer, not {value!r}")
        low = dict(latent_dim=0, prefix_len=0, encoder_layers=1 if self.latent_dim else 0)
        for f in fields(self):
            if f.type is int and getattr(self, f.name) < low.get(f.name, 1):
                least = low.get(f.name, 1)
                raise ValueError(f"{f.name} must be at least {least}, not {getattr(self, f.name)}")
            if f.type is int and getattr(self, f.name) > 10**6:
                raise ValueError(f"{f.name} must be at most 10^6, not {getattr(self, f.name)}")
        if self.seq_len % self.block_size:
            raise ValueError(f"block_size {self.block_size} does not divide length {self.seq_len}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} is no multiple of 2 x heads = {2 * self.heads}")
        for name, known in (("conditioning", CONDITIONING), ("pooling", POOLING),
                            ("prior", PRIOR)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(known)}")
        if self.prefix_len >= self.seq_len:
            raise ValueError(f"prefix_len {self.prefix_len} leaves none of {self.seq_len} tokens")


def norm(layer, x):
    """LayerNorm in float32 whatever the autocast dtype. x (..., D) -> (..., D) float32."""
    return F.layer_norm(x.float(), layer.normalized_shape, layer.weight.float(), None, layer.eps)


def rotary(start, length, dim, device):
    """RoPE (Su et al. 2021) at positions start.. -> cosines and sines, each (length, dim/2)."""
    freq = 10000.0 ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    angle = torch.arange(start, start + length, device=device)[:, None] * freq
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotates feature pairs (i, i + d/2) of x (..., S, d) by the position's angles (S, d/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


def join(parts):
    """Tensors (B, H, S, d) in one along S; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class Layer(nn.Module):
    """One DiT block (Peebles & Xie 2023) over a noisy and a clean stream of blocks.

    `ada` holds the six modulation vectors (gamma1, beta1, alpha1, gamma2, beta2, alpha2). Without z
    they are learned constants, as in BD3-LM, whose time conditioning is constant; z adds to them
    (Appendix C.1).
    # differs from the paper: LN(x) * (1 + gamma) + beta, as DiT does, for the printed LN(x) * gamma
    # + beta; the gates alpha start at 1 (a plain transformer), not at 0 as in adaLN-Zero: pairs
    # come out better in one step.
    """

    def __init__(self, D, H):
        super().__init__()
        self.heads = H
        self.norm1, self.norm2 = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU("tanh"), nn.Linear(4 * D, D))
        self.ada = nn.Parameter(torch.tensor([0.0, 0, 1, 0, 0, 1])[:, None].repeat(1, D))

    def forward(self, h, n, mod, rope, parts, past, last):
        """h (B, n + m, r, D), n noisy blocks, then m clean ones -> the same.

        mod: None or (B, n + m, 1, 6, D), added to `ada`. parts: who sees whom, see Stack.parts.
        past: None, or room for keys and values (2, B, H, .., D/H) and how many are there, of the
        clean blocks before these; those of h are written behind them, noisy ones last. last: the
        clean stream ends here, of it only keys and values are wanted; (B, n, r, D) comes back.
        """
        B, S, r, D = h.shape
        ada = self.ada if mod is None else self.ada + mod  # (B, S, 1, 6, D) or (6, D)
        g1, b1, a1, g2, b2, a2 = ada.unbind(-2)  # each (B, S, 1, D) or (D,)
        x = self.qkv(norm(self.norm1, h) * (1 + g1) + b1)  # (B, S, r, 3D)
        x = x.view(B, S * r, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (3, B, H, S r, D/H)
        (q, k), v = rotate(x[:2], *rope), x[2]
        if past is not None:
            room, have = past
            end = have + (S - n) * r
            for old, new in zip(room, (k, v)):
                old[:, :, have:end] = new[:, :, n * r :]
                old[:, :, end : end + n * r] = new[:, :, : n * r]
            k, v = room[:, :, :, : end + n * r]
        if last:
            h, a1, g2, b2, a2 = (u if u.dim() == 1 else u[:, :n] for u in (h, a1, g2, b2, a2))
        y = join([F.scaled_dot_product_attention(q[:, :, queries], *(
            join([u[:, :, s] for s in keys]) for u in (k, v)), mask)
            for queries, keys, mask in parts[last]])
        y = y.transpose(1, 2).reshape(B, -1, r, D)
        h = h + a1 * self.out(y)
        return h + a2 * self.mlp(norm(self.norm2, h) * (1 + g2) + b2)


class Stack(nn.Module):
    """Transformer layers over a noisy and a clean stream of blocks.

    Noisy block b sees itself and clean blocks < b; clean block b sees clean blocks <= b. With one
    block there is no clean stream, and nothing is computed for it.
    # differs from the paper: to RoPE comes a learned embedding of the place within the block. RoPE
    # alone acts on attention scores only: where all values are equal, as in a fully masked first
    # block, every position would get the same output, and one step could not write "3 4".
    """

    def __init__(self, layers, D, H, r):
        super().__init__()
        self.place = nn.Embedding(r, D)
        self.layers = nn.ModuleList(Layer(D, H) for _ in range(layers))

    @staticmethod
    def parts(n, c0, m, r, device):
        """Who attends to whom: lists of (queries, keys, mask), of all and of only noisy queries.

        Queries are a slice, keys a list of slices; a mask is boolean, None where all is seen. In
        training n = K noisy blocks stand before m = K - 1 clean ones, cut into chunks of CHUNK
        tokens, so that no attention is computed to keys behind a chunk. In sampling n = 1; the keys
        are clean blocks 0..c0+m-1, of which the last m are new, then the noisy block.
        """

        def ids(first, end):                             # of the block of each token
            return torch.arange(first, end, device=device).repeat_interleave(r)

        if n == 1:
            noisy = [(slice(r), [slice(None)], None)]
            if not m:
                return noisy, noisy
            mask = F.pad(ids(0, c0 + m) <= ids(c0, c0 + m)[:, None], (0, r, r, 0))
            mask[:r] = True                              # the noisy block sees all
            return [(slice(None), [slice(None)], mask)], noisy
        noisy, clean, size = [], [], max(1, CHUNK // r)
        for a in range(0, n, size):
            e = min(a + size, n)
            own, before = ids(a, e), ids(0, e - 1)
            mask = torch.cat([own == own[:, None], before < own[:, None]], dim=1)
            at = slice(a * r, e * r)
            keys = [at, slice(n * r, (n + e - 1) * r)] if e < n else [slice(a * r, None)]
            noisy.append((at, keys, mask if size > 1 else None))
            e = min(e, m)
            if a < e:
                mask = ids(0, e) <= ids(a, e)[:, None] if size > 1 else None
                clean.append((slice((n + a) * r, (n + e) * r), [slice(n * r, (n + e) * r)], mask))
        return noisy + clean, noisy

    def forward(self, noisy, clean=None, mods=None, n0=0, c0=0, past=None):
        """noisy (B, n, r, D): blocks n0..; clean (B, m, r, D) or None: c0.. -> (B, n, r, D).

        mods: per layer None or (B, n + m, 1, 6, D). past: None, or, with n = 1, room for the keys
        and values of all blocks, (layers, 2, B, H, .., D/H), filled up to block c0.
        """
        h = noisy if clean is None else torch.cat([noisy, clean], dim=1)
        n, m, r = noisy.shape[1], h.shape[1] - noisy.shape[1], noisy.shape[2]
        h = h + self.place.weight
        dim = h.shape[-1] // self.layers[0].heads
        angles = (rotary(b0 * r, k * r, dim, h.device) for b0, k in ((n0, n), (c0, m)))
        rope = [torch.cat(halves) for halves in zip(*angles)]            # cos, sin ((n + m) r, d/2)
        parts = self.parts(n, c0, m, r, h.device)
        for i, layer in enumerate(self.layers):
            h = layer(h, n, mods[i] if mods else None, rope, parts,
                      None if past is None else (past[i], c0 * r), last=layer is self.layers[-1])
        return h


class Encoder(nn.Module):
    """q(z^b | x_t^b, x_0^{<=b}): a mean and a log variance per block (Section 3.2).

    With own=False it does not see x_0^b: p(z^b | x_t^b, x_0^{<b}), the noised prior of E.3.
    Gated pooling leaves out the first prefix_len positions, which are never masked.
    # differs from the paper: position i of block b embeds x_t^i and x_0^i together, instead of the
    # sequence [x_t ; x_0] of twice the length: what z^b may depend on is the same, at half the
    # cost.
    """

    def __init__(self, c, own=True):
        super().__init__()
        self.own, self.prefix_len = own, c.prefix_len
        self.embed_xt = nn.Embedding(c.vocab_size + 1, c.width)
        read = own or c.seq_len > c.block_size           # every parameter has a gradient, for DDP
        self.embed_x0 = nn.Embedding(c.vocab_size, c.width) if read else None
        self.stack = Stack(c.encoder_layers, c.width, c.heads, c.block_size)
        self.norm = nn.LayerNorm(c.width, bias=False)
        self.gate = nn.Linear(c.width, 1, bias=False) if c.pooling == "gated" else None
        self.head = nn.Linear(c.width, 2 * c.latent_dim)
        with torch.no_grad():
            self.head.bias[: c.latent_dim] = 0
            self.head.bias[c.latent_dim :] = LOGVAR_INIT if own else 0

    def forward(self, xt, x0):
        """xt, x0 (B, K, r) ids -> mu, logvar (B, K, Z) float32."""
        K, r = x0.shape[1:]
        noisy, clean = self.embed_xt(xt), None  # (B, K, r, D)
        if self.embed_x0 is not None:
            clean = self.embed_x0(x0 if self.own else x0[:, : K - 1])
        if self.own:
            noisy = noisy + clean
        h = self.stack(noisy, clean[:, : K - 1] if K > 1 else None)
        h = norm(self.norm, h)  # (B, K, r, D)
        if self.gate is None:
            h = h.mean(dim=2)  # (B, K, D)
        else:
            prefix = torch.arange(K * r, device=h.device).view(K, r, 1) < self.prefix_len
            h = (self.gate(h).float().masked_fill(prefix, -1e9).softmax(dim=2) * h).sum(dim=2)
        mu, logvar = self.head(h).float().chunk(2, dim=-1)
        return mu, logvar.clamp(*LOGVAR_RANGE)


class BlockPrior(nn.Module):
    """p(z^b | z^{<b}) (E.2): a GRU over the latents of the blocks before, N(0, I) at the start."""

    def __init__(self, c):
        super().__init__()
        self.rnn = nn.GRU(c.latent_dim, c.width, batch_first=True)
        self.head = nn.Linear(c.width, 2 * c.latent_dim)
        nn.init.zeros_(self.head.weight), nn.init.zeros_(self.head.bias)

    def forward(self, z):
        """z (B, K, Z) -> mu, logvar (B, K, Z), of which block b depends on z^{<b} only."""
        h = self.rnn(F.pad(z[:, :-1], (0, 0, 1, 0)))[0]
        mu, logvar = self.head(h).float().chunk(2, dim=-1)
        return mu, logvar.clamp(*LOGVAR_RANGE)


class Conditioner(nn.Module):
    """The latent pathway of the decoder: z -> modulations of the layers, or a vector to add.

    adaln (C.1): MLP, then one Linear per layer (held as one matrix); shared (C.2): one Linear for
    all layers; add (C.3): embedded, scaled, added to the token embedding. The MLP, run once per
    block, is where z is turned into a choice that all positions agree on: it wants to be wide.
    # differs from the paper: weights start small, not at zero as in adaLN-Zero, so that the encoder
    # has a gradient.
    """

    def __init__(self, c):
        super().__init__()
        self.kind, self.layers, D = c.conditioning, c.layers, c.width
        hidden = c.latent_hidden * D
        self.mlp = nn.Sequential(nn.Linear(c.latent_dim, hidden), nn.SiLU(),
                                 nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, D))
        if self.kind == "add":
            self.scale = nn.Parameter(torch.tensor(1.0))
        else:
            self.mod = nn.Linear(D, 6 * D * (c.layers if self.kind == "adaln" else 1), bias=False)
            nn.init.normal_(self.mod.weight, std=0.02)

    def forward(self, z):
        """z (B, S, Z) -> vector to add (B, S, 1, D) or None, modulations of each layer or None."""
        B, S, _ = z.shape
        e = self.mlp(z)  # (B, S, D)
        if self.kind == "add":
            return (self.scale * e)[:, :, None], None
        mods = self.mod(F.silu(e)).view(B, S, 1, -1, 6, e.shape[-1])  # (B, S, 1, layers or 1, 6, D)
        mods = mods.unbind(3)  # each (B, S, 1, 6, D)
        return None, mods * (self.layers // len(mods))


def mapped(f, *conditions):
    """Applies f to the tensors of one Conditioner output, or across those of several."""
    add, mods = zip(*conditions)
    return (None if add[0] is None else f(*add),
            None if mods[0] is None else [f(*layer) for layer in zip(*mods)])


class Cache:
    """Keys and values of finished blocks; the next decode_block adds those that were pushed."""

    def __init__(self):
        self.kv, self.blocks, self.pending = None, 0, []
        self.conditions = []                             # of latents that may come again: (z, what)

    def push(self, x, z):
        """x (B, r) clean ids of the next block, z (B, 1, Z) or None."""
        self.pending.append((x, z))


class VMD(nn.Module):
    """Decoder, encoder, prior and latent pathway; see the module's docstring."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.vocab_size, self.block_size, self.latent_dim = c.vocab_size, c.block_size, c.latent_dim
        self.embed = nn.Embedding(c.vocab_size + 1, c.width)
        self.stack = Stack(c.layers, c.width, c.heads, c.block_size)
        self.norm = nn.LayerNorm(c.width, bias=False)
        self.head = nn.Linear(c.width, c.vocab_size)
        self.encoder = Encoder(c) if c.latent_dim else None
        self.conditioner = Conditioner(c) if c.latent_dim else None
        self.prior_reads_z, self.prior_net = c.prior == "block", None
        if c.latent_dim and c.prior != "standard":
            self.prior_net = BlockPrior(c) if self.prior_reads_z else Encoder(c, own=False)

    def param_counts(self):
        """Parameters of decoder, encoder, latent pathway; the first and last run at sampling."""
        count = lambda m: sum(p.numel() for p in m.parameters()) if m is not None else 0
        encoder, latent = count(self.encoder), count(self.conditioner) + count(self.prior_net)
        decoder = count(self) - encoder - latent
        return {"decoder": decoder, "encoder": encoder, "latent pathway": latent}

    def blocks(self, x):
        """(B, L') -> (B, L'/r, r); L' is a multiple of r, at most L."""
        assert x.shape[1] % self.block_size == 0, f"length {x.shape[1]}, blocks {self.block_size}"
        return x.view(x.shape[0], -1, self.block_size)

    def encode(self, xt, x0):
        """q(z^b | x_t^b, x_0^{<=b}). xt, x0 (B, L) ids -> mu, logvar (B, K, Z) float32."""
        return self.encoder(self.blocks(xt), self.blocks(x0))

    def prior(self, xt, x0, z):
        """p(z^b) = N(0, I), p(z^b | z^{<b}) or p(z^b | x_t^b, x_0^{<b}), by config.prior.

        xt, x0 (B, L), z (B, K, Z) -> mu, logvar (B, K, Z).
        """
        if self.prior_net is None:
            return torch.zeros_like(z), torch.zeros_like(z)
        return self.prior_net(z) if self.prior_reads_z else self.prior_net(*map(self.blocks,
                                                                                (xt, x0)))

    def decode(self, xt, x0, z):
        """Training form, all blocks at once -> logits (B, L, V) float32.

        xt, x0 (B, L) ids, z (B, K, Z) or None. Block b reads x_t^b, x_0^{<b} and z^{<=b}.
        # differs from the paper: it prints x_0^{<=b} for the decoder, which would give b away.
        """
        xt, x0 = self.blocks(xt), self.blocks(x0)[:, :-1]  # (B, K, r), (B, K - 1, r)
        condition = (None, None) if z is None else self.conditioner(z)
        if z is not None and x0.shape[1]:                # those of the clean blocks
            condition = mapped(lambda a: torch.cat([a, a[:, :-1]], 1), condition)
        return self._decode(xt, x0, *condition).flatten(1, 2)

    @torch.no_grad()
    def decode_block(self, x, z, cache):
        """Sampling form, the block after the cached ones -> logits (B, r, V) float32.

        x (B, r) ids, z (B, 1, Z) or None. Blocks pushed to the cache since the last call run in
        this same pass, each with its own latent, whose conditioning is computed once as long as it
        is the same tensor. Raises ValueError beyond the length L of the config.
        """
        x0 = torch.stack([p[0] for p in cache.pending], 1) if cache.pending else x[:, None][:, :0]
        condition = None, None
        if z is not None:
            known, cache.conditions = cache.conditions, []
            for new in [z] + [p[1] for p in cache.pending]:
                done = [what for old, what in known if old is new] or [self.conditioner(new)]
                cache.conditions.append((new, done[0]))
            condition = mapped(lambda *a: torch.cat(a, 1), *(what for _, what in cache.conditions))
        b, c = cache.blocks + len(cache.pending), self.config
        if (b + 1) * c.block_size > c.seq_len:
            raise ValueError(f"block {b + 1} of {c.block_size} tokens is beyond the length "
                             f"{c.seq_len} that the model was made for")
        if cache.kv is None:
            cache.kv = self.embed.weight.new_empty(c.layers, 2, len(x), c.heads, c.seq_len,
                                                   c.width // c.heads)
        logits = self._decode(x[:, None], x0, *condition, b, cache.blocks, cache.kv)
        cache.blocks, cache.pending = b, []
        return logits[:, 0]

    def new_cache(self):
        """An empty Cache for decode_block."""
        return Cache()

    def _decode(self, noisy, clean, add, mods, n0=0, c0=0, past=None):
        """Logits of n noisy blocks; add, mods: the conditioner's output for n noisy, m clean."""
        n = noisy.shape[1]
        h = self.embed(torch.cat([noisy, clean], dim=1))  # (B, n + m, r, D)
        h = h if add is None else h + add
        h = self.stack(h[:, :n], h[:, n:] if h.shape[1] > n else None, mods, n0, c0, past)
        return self.head(norm(self.norm, h)).float()  # (B, n, r, V)


def one_line(error):
    """The first line of an exception's message, shortened, for a message to the user."""
    return ((str(error) or repr(error)).splitlines() or [""])[0][:120]


def complaint(error):
    """What a user can do something about, as one line for the terminal; None: a defect."""
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError)):
        return text
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(
            words in text for words in ("out of memory", "can't allocate memory",
                                        "Storage size calculation overflowed")):
        return "out of memory; a smaller --batch-size or, in training, --grad-accum needs less"
    return None


def usable(device):
    """Returns the name of a torch device, or raises ValueError if it cannot be used here."""
    try:
        torch.zeros((), dtype=torch.float64, device=device).item()  # the sampler needs float64
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as e:
        raise ValueError(f"device {device!r} cannot be used: {one_line(e)}") from None
    return device


def load_checkpoint(path, device="cpu", ema=True):
    """Reads a file written by train.py -> (model in eval mode, checkpoint dict).

    ema: use the averaged weights where the run kept them. Only tensors and plain values are
    unpickled (weights_only=True). Raises FileNotFoundError, or ValueError if the device cannot be
    used or the file is not such a checkpoint.
    """
    usable(device)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {path}; make one: python train.py")
    try:
        with warnings.catch_warnings(action="ignore"):   # about pickles that are not ours
            ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged file makes torch.load raise almost anything
        raise ValueError(f"{path} is not a readable checkpoint: {one_line(e)}") from None
    if not isinstance(ckpt, dict) or ckpt.get("version") != CHECKPOINT_VERSION:
        raise ValueError(f"{path} is not a version {CHECKPOINT_VERSION} checkpoint of train.py")
    if not isinstance(ckpt.get("args"), dict) or not isinstance(ckpt["args"].get("dataset"), str):
        raise ValueError(f"{path} is no checkpoint of train.py: its settings name no dataset")
    odd = {k for k in CHECKPOINT.keys() | ckpt.keys() - {"version"}
           if k not in ckpt or not isinstance(ckpt[k], CHECKPOINT.get(k, ()))}
    if odd:
        raise ValueError(f"{path} is no checkpoint of train.py: missing, unknown or of a wrong "
                         f"type are {one_line(', '.join(sorted(map(str, odd))))}")
    try:
        config = Config(**ckpt["config"])
        if max(config.layers, config.encoder_layers) > len(ckpt["model"]):
            raise ValueError("more layers than weights")
        with torch.device("meta"):                       # nothing is allocated for a forged size
            model = VMD(config)
    except (TypeError, ValueError, RuntimeError) as e:
        raise ValueError(f"{path} holds no possible configuration: {one_line(e)}") from None
    vocab = ckpt["vocab"]
    if vocab is not None and (len(vocab) != config.vocab_size
                              or not all(isinstance(c, str) for c in vocab)):
        raise ValueError(f"{path} is damaged: its vocabulary is no list of {config.vocab_size} "
                         "strings")
    for weights in (ckpt["ema"], ckpt["model"]):
        if weights is not None:
            check_weights(path, weights, model.state_dict())
    weights = ckpt["ema"] if ema and ckpt["ema"] is not None else ckpt["model"]
    model.load_state_dict(dict(weights), assign=True)    # a copy: torch would note `assign` in it
    return model.to(device).eval(), ckpt


def check_weights(path, weights, own):
    """Raises ValueError unless the weights have names, shapes and types of `own` and are finite."""
    for name in sorted(map(str, own.keys() | weights.keys())):
        w, want = weights.get(name), own.get(name)
        if not isinstance(w, torch.Tensor) or want is None:
            wrong = "is missing" if want is not None else "is not one of this model"
        elif (w.shape, w.dtype) != (want.shape, want.dtype):
            wrong = f"is {tuple(w.shape)} {w.dtype}, not {tuple(want.shape)} {want.dtype}"
        elif not w.isfinite().all():
            wrong = "is not finite"
        else:
            continue
        raise ValueError(f"{path} is damaged: the weight {one_line(name)} {wrong}")
