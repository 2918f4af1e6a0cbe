"""The VMD network: a masked-diffusion transformer conditioned on one Gaussian latent per block.

    model = VMD(Config(vocab_size=10, seq_len=4, block_size=2))
    mu, logvar = model.encode(xt, x0)           # q(z^b | x_t^b, x_0^{<=b}),       each (B, K, Z)
    logits = model.decode(xt, x0, z)            # p(x_0^{b,i} | x_t^b, x_0^{<b}, z^{<=b}), (B, L, V)

Source: "Variational Masked Diffusion Models", Sections 3 and 4 and Appendix C; the transformer is
that of BD3-LM (Arriola et al. 2025). Needs torch only and imports nothing of this project: copy it.

Key: B batch, L sequence length, r block size, K = L/r blocks, S blocks in a pass, D width, H heads,
d = D/H, Z latent size, V vocabulary. Data ids are 0..V-1; the mask has id V and is never an output.
t runs from 0 (clean) to 1 (all masked). latent_dim = 0 is the baseline without latents: MDM (one
block), BD3-LM (several), autoregressive (r = 1).
"""

import os
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

CONDITIONING = ("adaln", "shared", "add")
POOLING = ("mean", "gated")
PRIOR = ("standard", "block", "noised", "aggregate")  # see VMD.prior and VMD.mixture
LOGVAR_RANGE = (-12.0, 8.0)  # clamp: sigma from e^-6 to e^4
# differs from the paper: sigma = e^-2 at the start: a wide posterior lets the decoder ignore z
LOGVAR_INIT = -4.0
CHUNK = 64  # queries that attend together in training: L = 256 trains a tenth faster than in one go
CHECKPOINT_VERSION = 4


@dataclass
class Config:
    """All that fixes the network's shape. Raises ValueError on values that do not fit together."""

    # defaults: the paper's C.1 where it has them; train.py has its own, those of --preset small
    vocab_size: int  # V, without the mask
    seq_len: int  # L
    block_size: int  # r; L for one block
    width: int = 64  # D
    heads: int = 4  # H
    layers: int = 8  # of the decoder
    loops: int = 1  # times that these layers run in turn, with the same weights
    encoder_layers: int = 2
    latent_dim: int = 32  # Z per block; 0: no latent, no encoder
    latent_hidden: int = 4  # width of the hidden layers of z's MLP, in units of D
    conditioning: str = "adaln"  # how z enters the decoder: adaln (C.1), shared (C.2), add (C.3)
    pooling: str = "mean"  # how the encoder summarises a block: mean (C.1) or gated (C.2)
    # N(0, I); block p(z^b | z^{<b}) (E.2); noised p(z^b | x_t^b, x_0^{<b}) (E.3); aggregate,
    # which is N(0, I) in train mode and until train.fill_bank is called
    prior: str = "standard"
    bank: int = 16384  # posteriors of the aggregate prior, shared out among the blocks
    prefix_len: int = 0  # tokens at the start that are never masked: gated pooling skips them
    # r lists of equally many numbers: a place of the block is embedded by their sum (a board: row,
    # column, box); None: each has one number, its own
    places: list | None = None

    def __post_init__(self):
        for f in fields(self):
            value, low = getattr(self, f.name), 0 if f.name in ("latent_dim", "prefix_len") else 1
            if f.type is int and not low <= value <= 10**6:
                raise ValueError(f"{f.name} must lie in {low}..10^6, not {value}")
        if self.seq_len % self.block_size:
            raise ValueError(f"block_size {self.block_size} does not divide length {self.seq_len}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} is no multiple of 2 x heads = {2 * self.heads}")
        if self.places and len(self.places) != self.block_size:
            raise ValueError(f"places has {len(self.places)} lists, not {self.block_size}")
        known = dict(conditioning=CONDITIONING, pooling=POOLING, prior=PRIOR)
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {values}")


class Norm(nn.LayerNorm):
    """LayerNorm without bias, in float32 whatever the autocast dtype: (..., D) -> float32."""

    def __init__(self, D):
        super().__init__(D, bias=False)

    def forward(self, x):
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), None, self.eps)


def rotary(position, d):
    """RoPE (Su et al. 2021): positions (n,) -> cosines and signed sines of the angles, (n, d)."""
    frequency = 10000.0 ** (-torch.arange(0, d, 2, device=position.device, dtype=torch.float32) / d)
    angle = position[:, None] * frequency                # (n, d/2)
    return angle.cos().repeat(1, 2), torch.cat([-angle.sin(), angle.sin()], dim=1)


def rotate(x, rope):
    """Rotates feature pairs (i, i + d/2) of x (..., n, d) by the angles of `rotary`."""
    cos, sin = rope
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)


class Layer(nn.Module):
    """One DiT block (Peebles & Xie 2023).

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
        self.norm1, self.norm2 = Norm(D), Norm(D)
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU("tanh"), nn.Linear(4 * D, D))
        self.ada = nn.Parameter(torch.tensor([0.0, 0, 1, 0, 0, 1])[:, None].repeat(1, D))

    def forward(self, h, mod, rope, attend):
        """h (B, S, r, D), S blocks of r tokens -> (B, S', r, D), the last S' of them.

        mod: added to `ada`, (B, S, 1, 6, D) or with 1 for any of these. rope: `rotary` of the
        tokens. attend: q, k, v (B, H, S r, d) -> (B, H, S' r, d); who sees whom is its business.
        """
        B, S, r, D = h.shape
        first, second = (self.ada + mod).split(3, dim=-2)        # (B, S, 1, 3, D), or B, S of 1
        gamma, beta, alpha = first.unbind(-2)                    # each (B, S, 1, D)
        qkv = self.qkv(self.norm1(h) * (1 + gamma) + beta)       # (B, S, r, 3D)
        qkv = qkv.view(B, S * r, 3, self.heads, -1).permute(2, 0, 3, 1, 4)     # (3, B, H, S r, d)
        q, k = rotate(qkv[:2], rope)
        y = attend(q, k, qkv[2])                                 # (B, H, S' r, d)
        y = y.transpose(1, 2).reshape(B, -1, r, D)
        if y.shape[1] < S:                                       # an axis of size 1 stays as it is
            h, alpha, second = (u[:, -y.shape[1]:] for u in (h, alpha, second))
        h = h + alpha * self.out(y)
        gamma, beta, alpha = second.unbind(-2)
        return h + alpha * self.mlp(self.norm2(h) * (1 + gamma) + beta)


class Stack(nn.Module):
    """Transformer layers over blocks of r tokens.

    # differs from the paper: beside RoPE there is a learned embedding of the place within the
    # block. RoPE alone acts on attention scores only: where all values are equal, as in a fully
    # masked first block, every position would get the same output, and one step could not write
    # "3 4". Where `places` says so, positions share numbers: a board learns its rows, columns and
    # boxes sooner.
    """

    def __init__(self, layers, D, H, r, places, loops=1):
        super().__init__()
        self.depth = layers * loops                      # layers run in a pass
        numbers = torch.tensor(places or [[i] for i in range(r)])        # (r, numbers of a place)
        self.register_buffer("numbers", numbers, persistent=False)
        self.place = nn.Embedding(int(numbers.max()) + 1, D)
        self.layers = nn.ModuleList(Layer(D, H) for _ in range(layers))

    def forward(self, h, block, attend, mods=None):
        """h (B, S, r, D), block (S,) their numbers -> states after each loop, each (B, S', r, D).

        attend(i, q, k, v): that of `Layer`, for the i-th layer to run; S': blocks that it answers
        for in the last. mods: a tensor for each layer, or one for all; None: zeros. From the second
        loop on the input is added again (Bansal et al. 2022, Yang et al. 2023).
        """
        r, D = h.shape[2:]
        place = self.place(self.numbers).sum(1) / self.numbers.shape[1] ** 0.5   # variance of one
        h = start = h + place
        token = torch.arange(r, device=h.device)
        rope = rotary((block[:, None] * r + token).flatten(), D // self.layers[0].heads)
        mods = mods or [h.new_zeros(1, 1, 1, 1, 1)]
        layers = len(self.layers)
        states = []
        for i in range(self.depth):
            if i > 0 and i % layers == 0:                # another loop
                states.append(h)
                h = h + start
            h = self.layers[i % layers](h, mods[i % len(mods)], rope, partial(attend, i))
        states.append(h)
        return [state[:, -h.shape[1] :] for state in states]     # the last layer leaves S'


def two_streams(K, r, depth, device):
    """Training: K - 1 clean blocks stand before K noisy ones -> block numbers, `attend`.

    A clean block sees clean blocks up to itself; a noisy block sees clean blocks before it, and
    itself. The last layer answers for noisy blocks only: nobody reads the clean ones after it.
    Queries attend in chunks. The last block of a chunk that ends at `end` sees clean tokens up to
    end - r.
    """
    block = torch.arange(K, device=device)
    if K == 1:
        return block, lambda i, q, k, v: F.scaled_dot_product_attention(q, k, v)
    block_of = block.repeat_interleave(r)                # (L,), of each token
    clean_len, size = (K - 1) * r, max(1, CHUNK // r) * r
    # chunks of whole blocks, each: where its queries are, where its keys, who sees whom
    clean, noisy = [], []
    for first in range(0, K * r, size):
        end = min(first + size, K * r)
        own = slice(clean_len + first, clean_len + end)
        clean_before = block_of[: end - r] < block_of[first:end, None]
        own_block = block_of[first:end] == block_of[first:end, None]
        noisy.append((own, [slice(end - r), own], torch.cat([clean_before, own_block], dim=1)))
        clean_end = min(end, clean_len)
        if first < clean_end:
            clean_upto = block_of[:clean_end] <= block_of[first:clean_end, None]
            clean.append((slice(first, clean_end), [slice(clean_end)], clean_upto))

    def attend(i, q, k, v):
        y = []
        for queries, parts, mask in noisy if i == depth - 1 else clean + noisy:
            keys = torch.cat([k[:, :, at] for at in parts], dim=2)
            values = torch.cat([v[:, :, at] for at in parts], dim=2)
            y.append(F.scaled_dot_product_attention(q[:, :, queries], keys, values, mask))
        return torch.cat(y, dim=2)

    return torch.cat([block[:-1], block]), attend


class Cache:
    """Sampling: keys and values of finished blocks, for `decode_block`."""

    def __init__(self):
        self.kv = None                                   # (depth, 2, B, H, L, d)
        self.done = 0                                    # blocks whose keys and values are in it
        self.z, self.conditions = None, []               # the latest z; conditioning of its blocks

    def attend(self, r, i, q, k, v):
        """Attention of new blocks of r, the last one noisy: each sees all before it, and itself.

        i, q, k, v: as `Stack` calls it. The last layer answers for the noisy block only.
        """
        start, end = self.done * r, self.done * r + q.shape[2]
        self.kv[i, 0, :, :, start:end], self.kv[i, 1, :, :, start:end] = k, v
        k, v = self.kv[i, :, :, :, :end]
        if i == len(self.kv) - 1:
            q = q[:, :, -r:]
        if q.shape[2] == r:                              # the noisy block sees all
            return F.scaled_dot_product_attention(q, k, v)
        block_of = torch.arange(end, device=q.device) // r
        return F.scaled_dot_product_attention(q, k, v, block_of <= block_of[start:, None])


class Encoder(nn.Module):
    """q(z^b | x_t^b, x_0^{<=b}): a mean and a log variance per block (Section 3.2).

    With sees_x0=False it does not see x_0^b: p(z^b | x_t^b, x_0^{<b}), the noised prior of E.3.
    # differs from the paper: position i of block b embeds x_t^i and x_0^i together, instead of the
    # sequence [x_t ; x_0] of twice the length: what z^b may depend on is the same, with one block
    # at half the cost.
    """

    def __init__(self, c, sees_x0=True):
        super().__init__()
        self.sees_x0, self.prefix_len = sees_x0, c.prefix_len
        self.embed_xt = nn.Embedding(c.vocab_size + 1, c.width)
        has_x0 = sees_x0 or c.seq_len > c.block_size     # else it gets no gradient
        self.embed_x0 = nn.Embedding(c.vocab_size, c.width) if has_x0 else None
        self.stack = Stack(c.encoder_layers, c.width, c.heads, c.block_size, c.places)
        self.norm = Norm(c.width)
        self.gate = nn.Linear(c.width, 1, bias=False) if c.pooling == "gated" else None
        self.head = nn.Linear(c.width, 2 * c.latent_dim)
        with torch.no_grad():
            self.head.bias[: c.latent_dim] = 0
            self.head.bias[c.latent_dim :] = LOGVAR_INIT if sees_x0 else 0

    def forward(self, xt, x0):
        """xt, x0 (B, K, r) ids -> mu, logvar (B, K, Z) float32."""
        K, r = xt.shape[1:]
        h = self.embed_xt(xt)                                    # (B, K, r, D)
        if self.sees_x0:
            h = h + self.embed_x0(x0)
        if K > 1:
            h = torch.cat([self.embed_x0(x0[:, :-1]), h], dim=1)         # (B, 2K - 1, r, D)
        h = self.stack(h, *two_streams(K, r, self.stack.depth, h.device))[-1]
        h = self.norm(h)                                   # (B, K, r, D)
        if self.gate is None:
            h = h.mean(dim=2)                                    # (B, K, D)
        else:
            prefix = torch.arange(K * r, device=h.device).view(K, r, 1) < self.prefix_len
            weight = self.gate(h).float().masked_fill(prefix, -1e9).softmax(dim=2)
            h = (weight * h).sum(dim=2)
        mu, logvar = self.head(h).float().chunk(2, dim=-1)
        return mu, logvar.clamp(*LOGVAR_RANGE)


class BlockPrior(nn.Module):
    """p(z^b | z^{<b}) (E.2): a GRU over the latents of the blocks before, N(0, I) at the start."""

    def __init__(self, c):
        super().__init__()
        self.rnn = nn.GRU(c.latent_dim, c.width, batch_first=True)
        self.head = nn.Linear(c.width, 2 * c.latent_dim)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, z):
        """z (B, K, Z) -> mu, logvar (B, K, Z), of which block b depends on z^{<b} only."""
        h = self.rnn(F.pad(z[:, :-1], (0, 0, 1, 0)))[0]
        mu, logvar = self.head(h).float().chunk(2, dim=-1)
        return mu, logvar.clamp(*LOGVAR_RANGE)


class Conditioner(nn.Module):
    """The latent pathway of the decoder, run once per block: z -> its conditioning, one tensor.

    adaln (C.1): MLP, then one Linear per layer (held as one matrix); shared (C.2): one Linear for
    all layers; add (C.3): embedded, scaled, added to the token embedding. The MLP is where z is
    turned into a choice that all positions agree on: it wants to be wide.
    # differs from the paper: weights start small, not at zero as in adaLN-Zero, so that the encoder
    # has a gradient.
    """

    def __init__(self, c):
        super().__init__()
        D, hidden = c.width, c.latent_hidden * c.width
        self.kind = c.conditioning
        self.mlp = nn.Sequential(nn.Linear(c.latent_dim, hidden), nn.SiLU(),
                                 nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, D))
        if self.kind == "add":
            self.scale = nn.Parameter(torch.tensor(1.0))
        else:
            self.mod = nn.Linear(D, 6 * D * (c.layers if self.kind == "adaln" else 1), bias=False)
            nn.init.normal_(self.mod.weight, std=0.02)

    def forward(self, z):
        """z (B, K, Z) -> (B, K, D) for add, (B, K, 1, 6, D) for shared, (B, K, layers, 6, D)."""
        e = self.mlp(z)                                          # (B, K, D)
        if self.kind == "add":
            return self.scale * e
        return self.mod(F.silu(e)).unflatten(-1, (-1, 6, e.shape[-1]))


class VMD(nn.Module):
    """Decoder, encoder, prior and latent pathway; see the module's docstring."""

    new_cache = Cache  # an empty one, for decode_block

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.vocab_size, self.seq_len = c.vocab_size, c.seq_len
        self.block_size, self.latent_dim = c.block_size, c.latent_dim
        self.embed = nn.Embedding(c.vocab_size + 1, c.width)
        self.stack = Stack(c.layers, c.width, c.heads, c.block_size, c.places, c.loops)
        self.norm = Norm(c.width)
        self.head = nn.Linear(c.width, c.vocab_size)
        self.encoder = Encoder(c) if c.latent_dim else None
        self.conditioner = Conditioner(c) if c.latent_dim else None
        self.prior_reads_z, self.prior_reads_x = c.prior == "block", c.prior == "noised"
        self.prior_net = None
        self.register_buffer("bank", None)
        if c.latent_dim and c.prior == "aggregate":      # means and log variances; zeros: N(0, I)
            K = c.seq_len // c.block_size
            self.bank = torch.zeros(2, K, max(2, c.bank // K), c.latent_dim)
        elif c.latent_dim and c.prior != "standard":
            self.prior_net = BlockPrior(c) if self.prior_reads_z else Encoder(c, sees_x0=False)

    def param_counts(self):
        """Parameters of decoder, encoder, latent pathway; the first and last run at sampling."""
        counts = {"decoder": 0, "encoder": 0, "latent pathway": 0}
        parts = dict(encoder="encoder", conditioner="latent pathway", prior_net="latent pathway")
        for name, p in self.named_parameters():
            counts[parts.get(name.split(".")[0], "decoder")] += p.numel()
        return counts

    def in_blocks(self, x):
        """(B, L') -> (B, L'/r, r); L' is a multiple of r."""
        return x.unflatten(1, (-1, self.block_size))

    def encode(self, xt, x0):
        """q(z^b | x_t^b, x_0^{<=b}). xt, x0 (B, L) ids -> mu, logvar (B, K, Z) float32."""
        return self.encoder(self.in_blocks(xt), self.in_blocks(x0))

    def prior(self, xt, x0, z):
        """p(z^b) = N(0, I), p(z^b | z^{<b}) or p(z^b | x_t^b, x_0^{<b}), by config.prior.

        xt, x0 (B, L), z (B, K, Z) -> mu, logvar (B, K, Z). (aggregate: N(0, I), that of training.)
        """
        if self.prior_net is None:
            return torch.zeros_like(z), torch.zeros_like(z)
        if self.prior_reads_z:
            return self.prior_net(z)
        return self.prior_net(self.in_blocks(xt), self.in_blocks(x0))

    @property
    def mixture(self):
        """(2, K, J, Z), the bank of the aggregate prior; None for others and in training, which is
        against N(0, I)."""
        return None if self.training else self.bank

    def decode(self, xt, x0, z, keep=None):
        """Training form, all blocks at once -> logits (B, L, V) float32.

        xt, x0 (B, L) ids, z (B, K, Z) or None. Block b reads x_t^b, x_0^{<b} and z^{<=b}. keep
        (B, K) bool: blocks whose latent is dropped have zero conditioning. In training mode, with
        several loops: (loops, B, L, V), those after each.
        # differs from the paper: it prints x_0^{<=b} for the decoder, which would give b away.
        """
        x = self.in_blocks(xt)                                      # (B, K, r)
        K, condition = x.shape[1], None if z is None else self.conditioner(z)
        if keep is not None:
            condition = (condition.flatten(2) * keep[..., None]).view_as(condition)
        if K > 1:                                                # 2K - 1 blocks, clean ones first
            x = torch.cat([self.in_blocks(x0)[:, :-1], x], dim=1)
            condition = None if z is None else torch.cat([condition[:, :-1], condition], dim=1)
        streams = two_streams(K, self.block_size, self.stack.depth, x.device)
        every_loop = self.training and self.config.loops > 1
        return self.logits(x, condition, *streams, every_loop).flatten(-3, -2)

    @torch.no_grad()
    def decode_block(self, x, z, cache):
        """Sampling form, decode(x, x, z) of the last block -> logits (B, r, V) float32.

        x (B, b r) ids, z (B, b, Z) or None, a new tensor where it has changed; of finished blocks
        both are the same in every call. Finished blocks that the cache lacks run in this same pass.
        Raises ValueError beyond the config's length L.
        """
        x, c = self.in_blocks(x), self.config                       # (B, b, r)
        b, S = x.shape[1], x.shape[1] - cache.done
        if b * c.block_size > c.seq_len:
            raise ValueError(f"block {b} of {c.block_size} tokens is beyond the length "
                             f"{c.seq_len} that the model was made for")
        if cache.kv is None:
            shape = (self.stack.depth, 2, len(x), c.heads, c.seq_len, c.width // c.heads)
            cache.kv = self.embed.weight.new_empty(shape)
        if z is not None and z is not cache.z:           # else nothing of it is new
            known = cache.conditions[: b - 1]            # the last block's may have changed
            new = z[:, len(known) :].split(1, dim=1)
            cache.z, cache.conditions = z, known + [self.conditioner(u) for u in new]
        condition = None if z is None else torch.cat(cache.conditions[-S:], dim=1)
        block = torch.arange(cache.done, b, device=x.device)
        logits = self.logits(x[:, -S:], condition, block, partial(cache.attend, c.block_size))
        cache.done = b - 1
        return logits[:, 0]

    def logits(self, x, condition, block, attend, every_loop=False):
        """x (B, S, r) ids, condition (B, S, ...) of the Conditioner or None -> (B, S', r, V).

        every_loop: (loops, B, S', r, V), after each.
        """
        h, mods = self.embed(x), None                            # (B, S, r, D)
        if condition is not None and self.conditioner.kind == "add":
            h = h + condition[:, :, None]
        elif condition is not None:
            mods = condition[:, :, None].unbind(3)               # each (B, S, 1, 6, D)
        states = self.stack(h, block, attend, mods)              # each (B, S', r, D)
        h = torch.stack(states) if every_loop else states[-1]
        return self.head(self.norm(h)).float()


def one_line(error):
    """An exception's message on one line, shortened."""
    return " ".join((str(error) or repr(error)).split())[:160]


def usable(device):
    """Returns the name of a torch device, or raises ValueError if it cannot be used here."""
    try:
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ValueError(f"device {device!r} cannot be used: {one_line(e)}") from None
    return device


def load_checkpoint(path, device="cpu", loops=None):
    """Reads a file of train.py, or any {"config", "model"} -> (model in eval mode, its dict).

    The averaged weights are taken where the run kept them. Only tensors and plain values are
    unpickled (weights_only=True); prefixes that DDP and torch.compile leave in names are removed.
    loops: of the decoder; None: as many as in training.
    Raises FileNotFoundError, or ValueError if it is no checkpoint of this version.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {path}; make one: python train.py")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a damaged file makes torch.load raise almost anything, in many words
        raise ValueError(f"{path} is no checkpoint that can be used: it is damaged, or holds more "
                         "than tensors and plain values") from None
    try:
        if ckpt.get("version", CHECKPOINT_VERSION) != CHECKPOINT_VERSION:
            raise ValueError(f"it has version {ckpt['version']}, this code {CHECKPOINT_VERSION}")
        weights = ckpt["model"] if ckpt.get("ema") is None else ckpt["ema"]
        weights = {k.replace("_orig_mod.", "").removeprefix("module."): v
                   for k, v in weights.items()}
        model = VMD(Config(**ckpt["config"] | ({"loops": loops} if loops else {})))
        model.load_state_dict(weights)
    except Exception as e:  # what another program has saved may lack anything
        raise ValueError(f"{path} is no checkpoint that can be used: {one_line(e)}") from None
    return model.to(device).eval(), ckpt
