"""Masked diffusion with a Gaussian latent: objectives, bounds and samplers, for any model.

    noise = draw_noise(B, L, r, Z, generator=g)
    loss, recon, kl = objective(model, x0, noise)              # Eq. 6 and 8, nats per sequence
    x = sample(model, x_with_masks, nfe=4, remask="margin")    # Algorithms 2 and 4

Source: "Variational Masked Diffusion Models" (equation and algorithm numbers are its own). Needs
torch only and imports nothing of this project: copy it.

A model offers vocab_size V, block_size r, latent_dim Z (0: no latent), and
    decode(xt, x0, z) -> logits (B, L, V)       reads x_t^b, x_0^{<b}, z^{<=b}; z None if Z = 0;
                                                or (T, B, L, V) in training: T losses, averaged.
                                                With dropout a fourth argument, keep (B, K) bool:
                                                the blocks that have their latent
    encode(xt, x0) -> mu, logvar (B, K, Z)      q(z^b | x_t^b, x_0^{<=b}); not needed if Z = 0
It may offer
    seq_len                                     the longest sequence it reads; else any
    prior(xt, x0, z) -> mu, logvar (B, K, Z)    p(z^b | x_t^b, x_0^{<b}, z^{<b}); else N(0, I)
    prior_reads_z, prior_reads_x                true if that prior depends on z^{<b}, on x_t^b
    mixture                                     (2, K, J, Z), means and log variances of J Gaussians
                                                whose mean is p(z^b), in place of prior; or None
    new_cache(), decode_block(x, z, cache)      decode(x, x, z) of the last block, (B, r, V), with
                                                a cache of the blocks before it; else `decode`
The sampler calls prior, encode and decode on the blocks so far, (B, b r) ids: x0 may have masks in
its last block for prior and decode, and the last of z is not yet drawn for prior.

Key: B batch, L length, r block size, K = L/r blocks, Z latent size, V vocabulary; N steps (network
evaluations) per block. t runs from 0 (clean) to 1 (all masked): a token is masked with probability
t. Ids are int64, the mask's is V. Every loss is in nats, summed over the tokens of a sequence: one
value per sequence, shape (B,).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

REMASK = ("random", "prob", "margin")
LATENT = ("fixed", "resample", "encoder", "none")


@dataclass
class Noise:
    """One draw of all randomness of `objective`."""

    t: torch.Tensor  # (B, K) times
    u: torch.Tensor  # (B, L) uniform: tokens below t are masked
    eps: torch.Tensor  # (B, K, Z) standard normal, of z
    pick: torch.Tensor  # (B, K) uniform: the component of a mixture prior
    drop: torch.Tensor  # (B, K) uniform: blocks that train without their latent
    # (B,) 0, 1/B, 2/B, ...: a row's place in the whole batch, which says what dropout and
    # full_mask_share do to it, in micro-batches too
    row: torch.Tensor

    def __getitem__(self, rows):
        return Noise(*(v[rows] for v in vars(self).values()))


def draw_noise(B, L, r, Z, steps=0, t_min=1e-3, generator=None, device="cpu"):
    """The randomness of one draw of `objective` for x_0 (B, L) in blocks of r -> Noise.

    Stratified: of the B K values of t one lies in each of B K equal cells, in random order. steps:
    0 for t uniform on (t_min, 1], N for t in {1/N, ..., 1}, whatever t_min.
    """
    K, kw = L // r, dict(generator=generator, device=device)
    cell = torch.randperm(B * K, **kw).view(B, K)
    s = (cell + torch.rand(B, K, **kw)) / (B * K)  # (B, K) in [0, 1)
    if not steps:
        t = (1 - s * (1 - t_min)).clamp(min=t_min)
    else:
        t = ((s * steps).floor() + 1).clamp(max=steps) / steps
    u, eps = torch.rand(B, L, **kw), torch.randn(B, K, Z, **kw)
    pick, drop = torch.rand(B, K, **kw), torch.rand(B, K, **kw)
    return Noise(t, u, eps, pick, drop, torch.arange(B, device=device) / B)


def gaussian_kl(mu, logvar, prior_mu=None, prior_logvar=None):
    """KL(N(mu, e^logvar) || N(prior_mu, e^prior_logvar)) summed over the latent, in nats.

    Diagonal Gaussians, all (B, K, Z); the prior defaults to N(0, I) (Kingma & Welling 2014,
    Appendix B). Returns (B, K). Raises ValueError if the shapes differ.
    """
    prior_mu = torch.zeros_like(mu) if prior_mu is None else prior_mu
    prior_logvar = torch.zeros_like(mu) if prior_logvar is None else prior_logvar
    shapes = {tuple(a.shape) for a in (mu, logvar, prior_mu, prior_logvar)}
    if len(shapes) != 1:
        raise ValueError(f"means and log variances must have one shape, not {sorted(shapes)}")
    d = logvar - prior_logvar
    return 0.5 * (d.exp() + (mu - prior_mu) ** 2 * (-prior_logvar).exp() - 1 - d).sum(-1)


def log_normal(z, mu, logvar):
    """log N(z; mu, e^logvar), diagonal, summed over the latent, in nats: (B, K, Z) -> (B, K)."""
    return -0.5 * ((z - mu) ** 2 * (-logvar).exp() + logvar + math.log(2 * math.pi)).sum(-1)


def component(mixture, pick):
    """The Gaussians of a mixture (2, K, J, Z) that pick, uniform, chooses -> (2, *pick.shape, Z).

    pick (B, K) or, from the mixture of one block, (B, R).
    """
    K, J = mixture.shape[1:3]
    block = torch.arange(K, device=pick.device)
    return mixture[:, block, (pick * J).long().clamp(max=J - 1)]


def log_mixture(z, mixture):
    """log p(z^b) of a mixture (2, K, J, Z), each of J Gaussians 1/J: z (B, K, Z) -> (B, K) nats.

    float64, as it expands squares; on the CPU where a device lacks it (Apple's mps).
    """
    work = "cpu" if z.device.type == "mps" else z.device
    out = []
    for v, (mu, logvar) in zip(z.to(work).double().unbind(1), mixture.to(work).double().unbind(1)):
        precision = (-logvar).exp()                              # (J, Z); v (B, Z)
        constant = (mu**2 * precision + logvar + math.log(2 * math.pi)).sum(-1)
        square = v**2 @ precision.T - 2 * v @ (mu * precision).T + constant      # (B, J)
        out.append((-0.5 * square).logsumexp(1) - math.log(len(mu)))
    return torch.stack(out, dim=1).to(z)


def token_nats(logits, x0):
    """-log p(x_0^i) of every token: logits (B, L, V), x0 (B, L) -> (B, L) nats, float32.

    Logits (T, B, L, V), predictions after each of T loops: the mean of their nats.
    """
    if logits.dim() == 4:
        return torch.stack([token_nats(v, x0) for v in logits]).mean(0)
    nats = F.cross_entropy(logits.float().flatten(0, 1), x0.flatten(), reduction="none")
    return nats.view_as(x0)


def not_given(x0, given):
    """Which tokens may be masked: given (L,) or (B, L) bool, or None for all -> (B, L) bool."""
    return torch.ones_like(x0, dtype=torch.bool) if given is None else ~given.expand(x0.shape)


def prior_of(model, xt, x0, z):
    """Mean and log variance, (B, K, Z) each, of the model's prior; N(0, I) if it has none."""
    if not hasattr(model, "prior"):
        return torch.zeros_like(z), torch.zeros_like(z)
    return model.prior(xt, x0, z)


def draw_latent(model, xt, x0, eps, pick, active, closed_form=True):
    """z ~ q(z | x_t, x_0) where the block is active, z ~ p elsewhere: there q = p costs no KL.

    eps (B, K, Z) standard normal, pick (B, K) uniform, active (B, K) -> z (B, K, Z), None without
    latents, and (B, K) nats: KL(q || p), or with closed_form=False, or for a mixture, its estimate
    log q(z) - log p(z).
    # differs from the paper: q = p where the encoder sees nothing masked.
    """
    if not model.latent_dim:
        return None, torch.zeros(active.shape, device=active.device)
    K, mixture = eps.shape[1], getattr(model, "mixture", None)
    encoded = model.encode(xt, x0)                       # (mean, log variance), as q and p
    z = encoded[0] + (0.5 * encoded[1]).exp() * eps
    chain = getattr(model, "prior_reads_z", False) and not active.all()
    for _ in range(K if chain else 1):                   # later priors read what earlier ones drew
        p = prior_of(model, xt, x0, z) if mixture is None else component(mixture[:, :K], pick)
        q = tuple(torch.where(active[..., None], a, b) for a, b in zip(encoded, p))
        z = q[0] + (0.5 * q[1]).exp() * eps
    if closed_form and mixture is None:
        return z, gaussian_kl(*q, *p)
    log_p = log_normal(z, *p) if mixture is None else log_mixture(z, mixture)
    return z, (log_normal(z, *q) - log_p) * active


def objective(model, x0, noise=None, kind="vmd", kl_weight=1.0, given=None, dropout=0.0,
              full_mask_share=0.0):
    """One Monte-Carlo draw of an objective. x0 (B, L) ids -> loss, recon, kl, each (B,) nats.

    recon and kl are the terms of loss, the weight 1/t included, kl_weight not.

    "vmd", the paper's objective, Eqs. 6 and 8: over blocks, the sum of
        (1/t) [sum over masked of CE + kl_weight KL(q(z | x_t, x_0) || p)].
        Its value is NOT a bound on -log p(x_0), see the README.
    "nelbo": over blocks, the sum of
        (1/t) sum over masked of CE + kl_weight KL(q(z | x_0) || p),
        the KL once per block and q reading the fully masked x_t. With kl_weight = 1 and noise of
        steps=N an unbiased estimate of NELBO_N >= -log p(x_0) of the sampler that fixes z and
        draws tokens at temperature 1 and reveals each at one of N steps, independently and
        uniformly; steps=0: N = infinity, as t_min goes to 0. (The rules of `sample` reveal equal
        numbers per step: they are that sampler at N = 1, and random order is, as N grows.) A prior
        that reads x_t (E.3) is read at t = 1: the bound is of the sampler that keeps that z.
    noise: of `draw_noise`; None: drawn here.
    given: (L,) or (B, L) bool, tokens that are never masked; all is then conditional on them. A
    block of which the encoder sees nothing masked (nelbo: of which all is given) takes q = p and
    pays no KL.
    dropout: probability that a sequence (first half of the rows), or a block (second half), has no
    latent: its conditioning is zero and no KL is paid (beyond the paper, Ho & Salimans 2022). With
    dropout the blocks that keep it train at t = 1: z is for one step, no z for several.
    full_mask_share: of the rows of "vmd", how many take z from the encoder of the fully masked x_t,
    as the sampler does (beyond the paper).
    """
    if kind not in ("vmd", "nelbo"):
        raise ValueError(f"objective {kind!r} is neither vmd nor nelbo")
    (B, L), r, V = x0.shape, model.block_size, model.vocab_size
    if noise is None:
        noise = draw_noise(B, L, r, model.latent_dim, device=x0.device)
    t, keep = noise.t, None                              # keep: blocks with a latent; None: all
    if dropout and model.latent_dim:
        drop = torch.where(noise.row[:, None] < 0.5, noise.drop[:, :1], noise.drop)
        keep = drop >= dropout
        t = torch.where(keep, 1.0, t)
    maskable = not_given(x0, given)
    masked = (noise.u < t.repeat_interleave(r, 1)) & maskable            # (B, L)
    whole = noise.row < (full_mask_share if kind == "vmd" else 1)        # (B,)
    hidden = torch.where(whole[:, None], maskable, masked)       # what the encoder sees as masked
    active = hidden.view(B, -1, r).any(-1)               # (B, K)
    z, kl = draw_latent(model, x0.masked_fill(hidden, V), x0, noise.eps, noise.pick, active)
    xt = x0.masked_fill(masked, V)
    if keep is None:
        logits = model.decode(xt, x0, z)
    else:
        logits, kl = model.decode(xt, x0, z, keep), kl * keep
    ce = (token_nats(logits, x0) * masked).view(B, -1, r).sum(-1)        # (B, K)
    recon = (ce / t).sum(1)
    kl = (kl / t if kind == "vmd" else kl).sum(1)
    return recon + kl_weight * kl, recon, kl


@torch.no_grad()
def iwae(model, x0, steps, samples, given=None, generator=None):
    """A tighter bound on -log p(x_0) of the N-step sampler (IWAE, Burda et al. 2016).

    Each of `samples` samples is a latent and a whole reveal trajectory of weight
    w = p(z) / q(z | x_0) prod_n prod_{i revealed at n} p(x_0^i | x_{t_n}, z), an unbiased estimate
    of p(x_0); E[-log mean w] is a bound for every number of samples. x0 (B, L) -> (B,) nats. Costs
    steps x samples evaluations.
    """
    (B, L), V, r, dev = x0.shape, model.vocab_size, model.block_size, x0.device
    maskable = not_given(x0, given)
    active, all_masked = maskable.view(B, -1, r).any(-1), torch.where(maskable, V, x0)
    log_w = []
    for _ in range(samples):
        eps = torch.randn(B, L // r, model.latent_dim, generator=generator, device=dev)
        pick = torch.rand(B, L // r, generator=generator, device=dev)
        z, cost = draw_latent(model, all_masked, x0, eps, pick, active, closed_form=False)
        lw = -cost.sum(1)
        reveal = torch.randint(1, steps + 1, (B, L), generator=generator, device=dev)
        for n in range(steps, 0, -1):
            logits = model.decode(torch.where((reveal <= n) & maskable, V, x0), x0, z)
            lw = lw - (token_nats(logits, x0) * ((reveal == n) & maskable)).sum(1)
        log_w.append(lw)
    return math.log(samples) - torch.stack(log_w).logsumexp(0)


@torch.no_grad()
def active_units(model, x0, threshold=0.01, given=None, batch_size=1000):
    """Active latent units of each block, Var_x E_q[z_j] > threshold (Burda et al. 2016).

    x0 (B, L) -> (K,) ints. q reads the fully masked sequence; the prior's mean is subtracted from
    its own. Zero everywhere: the posterior has collapsed, z says nothing.
    """
    if not model.latent_dim:
        return torch.zeros(x0.shape[1] // model.block_size, dtype=torch.long)
    xt = x0.masked_fill(not_given(x0, given), model.vocab_size)
    shifts = []                                          # of q's mean against the prior's
    for part in zip(xt.split(batch_size), x0.split(batch_size)):
        mu = model.encode(*part)[0]
        shifts.append(mu - prior_of(model, *part, mu)[0])         # (n, K, Z)
    return (torch.cat(shifts).var(dim=0, correction=0) > threshold).sum(-1)


def confidence(probs, remask):
    """Score by which masked positions are unmasked first, highest first (Section 3.3).

    probs (B, r, V) -> (B, r). prob: probability of the most probable value; margin: its
    lead over the second.
    """
    top = probs.topk(min(2, probs.shape[-1]), dim=-1).values
    if remask == "margin" and probs.shape[-1] > 1:
        return top[..., 0] - top[..., 1]
    return top[..., 0]


def draw_tokens(logits, temperature, u):
    """Tokens from softmax(logits / temperature) by inverse CDF in float64; argmax at temperature 0.

    logits (B, r, V), u (B, r) uniform, float64 -> (B, r) ids. float32 would lower the effective
    temperature (Zheng et al. 2025). This happens on the device of u, see `sampler_noise`.
    """
    if temperature == 0:
        return logits.argmax(-1)
    home, logits = logits.device, logits.to(u.device).double()
    logits = logits - logits.amax(-1, keepdim=True)      # no overflow however cold
    cdf = (logits / temperature).softmax(-1).cumsum(-1)
    u = (u * cdf[..., -1])[..., None]
    tokens = torch.searchsorted(cdf, u, right=True)[..., 0]
    return tokens.clamp(max=logits.shape[-1] - 1).to(home)


def default_temperature(model, latent="fixed"):
    """0, the argmax of the algorithms, with a latent; 1 without, where z gives no variety."""
    return 0.0 if model.latent_dim and latent != "none" else 1.0


@torch.no_grad()
def sample(model, x, nfe=1, remask="prob", temperature=None, latent="fixed", batch_size=None,
           generator=None, on_step=None, latent_draws=1):
    """Algorithms 2 and 4: fills the masks (id V) of x (B, L) ids -> (B, L). Other tokens stay.

    nfe: network evaluations per block, N. Of the M masked tokens of a row's block, floor(M (n-1)/N)
    stay masked after step n = N..1; `remask` (random, prob, margin) says which. A block without any
    mask costs none, nor does a step that unmasks nothing in any row (N > M).
    # differs from the paper: it leaves counts and ties open; here ties go to the left.
    temperature: of the tokens; 0 is argmax, as in the paper. None: `default_temperature`.
    latent: fixed, one z ~ p per block; resample, a new one each step (E.1), given x_t if the prior
    reads it; encoder, after the first step z ~ q(z | x_t, x_0-hat), x_0-hat the argmax (E.4); none,
    no latent (of a model trained with dropout).
    latent_draws: R; where a block has given tokens R latents are drawn for its first step and one
    is kept, see `choose_z`. Later ones (resample, encoder) are drawn one by one.
    generator: on the CPU. Row i depends on it and on i only, but for rounding in the network: not
    on B, not on batch_size.
    on_step(x): is called with the rows of a batch, (b, L), after each evaluation.
    A block model fills sequences longer than its own seq_len window by window: each begins with
    the last half of the one before, in whole blocks, whose tokens are given. (Their z is the one
    that wrote them only if it is fixed, from N(0, I) and the only draw.)
    model: in eval mode. Raises ValueError on an impossible choice.
    """
    temperature = default_temperature(model, latent) if temperature is None else temperature
    for value, known in ((remask, REMASK), (latent, LATENT)):
        if value not in known:
            raise ValueError(f"{value!r} is not one of {known}")
    if not 1 <= nfe <= 10**6 or not 0 <= temperature < math.inf or latent_draws < 1:
        raise ValueError(f"nfe {nfe} must lie in 1..10^6, temperature {temperature} be at least 0, "
                         f"latent_draws {latent_draws} at least 1")
    if latent_draws > 1 and latent != "none" and getattr(model, "prior_reads_x", False):
        raise ValueError("a prior that reads x_t (E.3) knows the given tokens already: "
                         f"latent_draws must be 1, not {latent_draws}")
    (B, L), r, Z = x.shape, model.block_size, 0 if latent == "none" else model.latent_dim
    if L % r:
        raise ValueError(f"length {L} is no multiple of the block size {r}")
    K, size = L // r, getattr(model, "seq_len", L) // r  # blocks in all, of a window,
    overlap = size // 2                                  # given to the next window
    if K > size and not overlap:
        raise ValueError(f"length {L} is beyond the {size * r} tokens that the model was made for, "
                         "and with one block there is nothing to go on from")
    draws = 1 if latent in ("fixed", "none") else nfe    # latents of a block, one after the other
    # a stream of its own for `choose_z`: the rest is the same for every R
    second = torch.Generator().manual_seed(torch.randint(2**62, (), generator=generator).item())
    out = []
    for part in x.split(batch_size or B):
        part = part.clone()
        noise = sampler_noise(len(part), K, r, Z, draws, generator, x.device)
        rivals = sampler_noise(len(part), K, 1, Z, latent_draws - 1, second, x.device)
        for first in range(0, max(1, K - overlap), size - overlap):
            blocks, window = slice(first, first + size), slice(first * r, (first + size) * r)
            _sample(model, part[:, window], [v[:, blocks] for v in noise],
                    [v[:, blocks] for v in rivals], nfe, remask, temperature, latent,
                    (lambda: on_step(part.clone())) if on_step else None)
        out.append(part)
    return torch.cat(out)


def sampler_noise(B, K, r, Z, draws, generator, device):
    """Uniform u and order (B, K, r), picks (B, K, draws); normal eps (B, K, draws, Z).

    float64 uniforms are drawn one by one: those of a row do not depend on the rows behind it. u
    stays float64, see `draw_tokens`.
    """
    noise = torch.rand(B, K, 2 * r + draws * (Z + 1), dtype=torch.float64, generator=generator)
    u, order, picks, eps = noise.split([r, r, draws, draws * Z], dim=2)
    eps = torch.special.ndtri(eps.clamp(min=1e-300)).float().view(B, K, draws, Z)
    u = u if device.type == "mps" else u.to(device)      # mps has no float64
    return u, order.float().to(device), picks.float().to(device), eps.to(device)


def draw_z(model, x, zs, eps, pick, guess=None):
    """R draws of z^b from the prior or, given a guess of x_0, from the encoder -> (B, R, Z).

    x, guess (B, b r) ids of blocks 1..b; zs (B, b - 1, Z) earlier latents; eps (B, R, Z), pick
    (B, R) noise.
    """
    if guess is not None:
        mu, logvar = (v[:, -1:] for v in model.encode(x, guess))
    elif getattr(model, "mixture", None) is not None:
        mu, logvar = component(model.mixture[:, zs.shape[1], None], pick)
    else:                                                # eps: a prior of z^b does not read z^b
        p = prior_of(model, x, x, torch.cat([zs, eps[:, :1]], dim=1))
        mu, logvar = (v[:, -1:] for v in p)
    return mu + (0.5 * logvar).exp() * eps


def choose_z(model, x, zs, candidates, choice):
    """Where block b has given tokens and masks, one of R latents; else the first -> (B, 1, Z).

    Sampling importance resampling (Rubin 1988): a latent is kept in proportion to the probability
    of the given tokens, each read off the fully masked block, so that R draws of p(z^b) become one
    of p(z^b | given). (It is no use where training never masked these tokens.) x (B, b r) ids, zs
    (B, b - 1, Z), candidates (B, R, Z) drawn from p(z^b), choice (B, 1) uniform. R evaluations,
    one after the other; none if R = 1. Beyond the paper.
    """
    z, r, V = candidates[:, :1], model.block_size, model.vocab_size
    if candidates.shape[1] == 1:
        return z
    known = (x[:, -r:] < V).sum(1)
    rows = ((known > 0) & (known < r)).nonzero()[:, 0]
    if len(rows) == 0:
        return z
    x, zs, candidates = x[rows], zs[rows], candidates[rows]      # of n rows
    block, hidden = x[:, -r:], x.clone()
    hidden[:, -r:] = V
    log_p = []
    for one in candidates.split(1, dim=1):
        logits = model.decode(hidden, hidden, torch.cat([zs, one], dim=1))[:, -r:]
        nats = token_nats(logits, block.clamp(max=V - 1)) * (block < V)
        log_p.append(-nats.sum(1))
    cdf = torch.stack(log_p, dim=1).softmax(1).cumsum(1)         # (n, R)
    chosen = torch.searchsorted(cdf, choice[rows] * cdf[:, -1:], right=True)
    chosen = chosen.clamp(max=len(log_p) - 1)[..., None].expand(-1, -1, z.shape[2])
    return z.index_copy(0, rows, candidates.gather(1, chosen))


def _sample(model, x, noise, rivals, nfe, remask, temperature, latent, on_step):
    """Fills x (B, L) in place. noise: of `sampler_noise`.

    rivals: the same with r = 1, for the R - 1 further candidates of each block's first z; its
    order is the uniform number by which `choose_z` chooses among all R.
    """
    V, r = model.vocab_size, model.block_size
    (u, order, picks, eps), (_, choice, rival_picks, rival_eps) = noise, rivals
    first_eps = torch.cat([eps[:, :, :1], rival_eps], dim=2)             # (B, K, R, Z)
    first_picks = torch.cat([picks[:, :, :1], rival_picks], dim=2)       # (B, K, R)
    cache = model.new_cache() if hasattr(model, "decode_block") else None
    zs = eps[:, :0, 0] if eps.shape[-1] else None        # (B, b, Z), of the blocks so far
    # with R = 1 nothing else is read back from the device
    counts = (x == V).view(len(x), -1, r).sum(-1).T.cpu()        # (K, B)
    for b, M in enumerate(counts):                       # M (B,): masks of each row
        so_far, guess, past = x[:, : (b + 1) * r], None, zs      # past: None without latents
        block = so_far[:, -r:]                           # views: x is filled in place
        if past is not None:
            candidates = draw_z(model, so_far, past, first_eps[:, b], first_picks[:, b])
            z = choose_z(model, so_far, past, candidates, choice[:, b])
            zs = torch.cat([past, z], dim=1)
        for i, n in enumerate(range(nfe, 0, -1)):
            due = M * n // nfe - M * (n - 1) // nfe      # what this step unmasks
            if not due.any():
                continue
            due = due.to(x.device)
            if i and past is not None and latent != "fixed":
                new = draw_z(model, so_far, past, eps[:, b, i, None], picks[:, b, i, None], guess)
                z = torch.where(due[:, None, None] > 0, new, z)          # others keep theirs
                zs = torch.cat([past, z], dim=1)
            if cache is not None:
                logits = model.decode_block(so_far, zs, cache)           # (B, r, V)
            else:
                logits = model.decode(so_far, so_far, zs)[:, -r:]
            score = order[:, b]
            if remask != "random":
                score = confidence(logits.softmax(-1), remask)
            score = score.masked_fill(block < V, -1)     # below all that are masked
            first_to_last = score.argsort(dim=1, descending=True, stable=True)
            reveal = first_to_last.argsort(dim=1) < due[:, None]         # the rank, from 0
            block.copy_(torch.where(reveal, draw_tokens(logits, temperature, u[:, b]), block))
            if on_step:
                on_step()
            if latent == "encoder":                      # x_0-hat
                filled = torch.where(block == V, logits.argmax(-1), block)
                new = torch.cat([so_far[:, :-r], filled], dim=1)
                # a row that had nothing due keeps its own: it does not know of this evaluation
                guess = new if guess is None else torch.where(due[:, None] > 0, new, guess)
