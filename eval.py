"""Scores a checkpoint: samples against the truth, and likelihood bounds.

    python eval.py                                                      # the last run
    python eval.py --nfe 1 2 4 --remask prob margin --json result.json
    python eval.py --plot joint.png                                     # needs matplotlib
    python eval.py --benchmark --dataset text8 --batch-size 16          # speed; flags of train.py

Metrics are printed in percent and written as fractions; losses are nats. --nfe counts evaluations
per block: with two blocks, the paper's "B=2, NFE=4" is --nfe 2. Sudoku: exact, answers that are the
puzzle's solution; valid, rules and clues kept; cell, of the cells to fill; each with its standard
error.
"""

import argparse
import copy
import functools
import itertools
import json
import math
import re
import sys
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import train
from diffusion import (LATENT, REMASK, active_units, default_temperature, draw_noise, iwae,
                       objective, sample)
from model import VMD, complaint, load_checkpoint, norm, one_line, rotary

SHADES = " ░▒▓█"
PERCENT = ("acc", "cond_acc", "exact", "valid", "cell", "distinct4")
METRICS = PERCENT + ("kl", "entropy", "gen_ppl")
GRIDS = {"sudoku": dict(nfe=[5, 10, 20], remask=["prob", "margin"], latent=list(LATENT))}


def build_parser():
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = lambda message: p.exit(2, f"eval.py: {message}; see --help\n")
    p.add_argument("--ckpt", default="out/last.pt", help="checkpoint of train.py")
    p.add_argument("--data-path", metavar="FILE",
                   help="array, text: the file, if it has moved since training; sudoku: score on "
                   "all puzzles of this file instead of those held out")
    p.add_argument("--clues", type=int,
                   help="sudoku: show this many random cells of test boards; default: as trained")
    g = p.add_argument_group("samples: one row for each combination")
    g.add_argument("--nfe", type=int, nargs="+",
                   help="network evaluations per block, N; default: 1; text: 4; sudoku: 5 10 20")
    g.add_argument("--remask", nargs="+", choices=REMASK,
                   help="which tokens are unmasked first; default: prob; text: random; sudoku: "
                   "prob margin")
    g.add_argument("--latent", nargs="+", choices=LATENT,
                   help="fixed, resampled (E.1), or from the encoder (E.4); default: fixed; "
                   "sudoku: all")
    g.add_argument("--temperature", type=float, nargs="+",
                   help="of the tokens, 0: argmax; default: 0 with a latent, else 1; text: 1; "
                   "sudoku without a latent: 1 0")
    g.add_argument("--num", type=int,
                   help="samples per row; default: 20000; array: 1000; text: 256; sudoku: 1000 "
                   "puzzles, or all of --data-path")
    g.add_argument("--judge", metavar="CKPT",
                   help="text: generative perplexity of the samples by this autoregressive "
                   "checkpoint (--block-size 1 --latent-dim 0) of the same vocabulary")
    g.add_argument("--gen-ppl", metavar="NAME",
                   help="text: the same by a causal language model such as gpt2-large "
                   "(needs transformers)")
    g = p.add_argument_group("bounds")
    g.add_argument("--bound-steps", type=int, nargs="*", default=[1, 2, 4, 0],
                   help="N of NELBO_N; 0: infinity; empty: no bounds")
    g.add_argument("--bound-num", type=int,
                   help="test sequences per bound, one Monte-Carlo draw each; default: 20000; "
                   "sudoku, text: 2000")
    g.add_argument("--iwae", type=int, default=0, metavar="S",
                   help="also the bound with S importance samples; 0: no")
    g = p.add_argument_group("run")
    g.add_argument("--batch-size", type=int,
                   help="sequences per network evaluation; default: 2000, fewer if they are long")
    g.add_argument("--seed", type=int, default=0, help="seed of samples and test draws")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="torch device")
    g.add_argument("--json", metavar="FILE", help="write all results to this file")
    g.add_argument("--plot", metavar="FILE",
                   help="an image (matplotlib): true and generated joint of two-token data; "
                   "sudoku: accuracy during training, from log.jsonl beside the checkpoint")
    g = p.add_argument_group("speed")
    g.add_argument("--sweep", action="store_true",
                   help="with --benchmark: also over lengths 64 to 2048 and batch sizes 1 to 256")
    g.add_argument("--benchmark", nargs=argparse.REMAINDER, metavar="FLAG",
                   help="instead of all else: how fast what these flags of train.py describe "
                   "trains and samples; all that follows goes there")
    return p


def generate(model, start, a, nfe, remask, latent, temperature):
    """Samples from start (n, L) -> (n, L) on the CPU, from a generator of their own."""
    return sample(model, start.to(a.device), nfe, remask, temperature, latent, a.batch_size,
                  torch.Generator().manual_seed(a.seed)).cpu()


def load_judge(a, ckpt):
    """The function from samples x (n, L) to perplexities (n,) that the flags ask for, or None."""
    if (a.judge or a.gen_ppl) and ckpt["vocab"] is None or a.judge and a.gen_ppl:
        raise ValueError("--judge and --gen-ppl are for text, and one of the two can be given")
    if a.judge:
        judge, other = load_checkpoint(a.judge, a.device)
        if (judge.block_size != 1 or judge.latent_dim or other["vocab"] != ckpt["vocab"]
                or judge.config.seq_len < ckpt["config"]["seq_len"]):
            raise ValueError(f"{a.judge} is no autoregressive model (--block-size 1 --latent-dim "
                             "0) of the same vocabulary and at least the same length")
        return lambda x: torch.cat([own_perplexity(judge, part.to(a.device)).cpu()
                                    for part in x.split(a.batch_size)])
    if a.gen_ppl:
        try:
            import transformers
        except ImportError:
            raise ValueError("--gen-ppl needs transformers: pip install transformers") from None
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(a.gen_ppl)
            lm = transformers.AutoModelForCausalLM.from_pretrained(a.gen_ppl).to(a.device).eval()
        except (ImportError, OSError, ValueError) as e:
            raise ValueError(f"cannot load {a.gen_ppl}: {one_line(e)}") from None
        return lambda x: torch.tensor([
            hf_perplexity(lm, tokenizer, re.sub(r" ?\[(CLS|SEP)\] ?", " ", text).strip())
            for text in data.texts(x, len(ckpt["vocab"]), ckpt["vocab"])])
    return None


@torch.no_grad()
def own_perplexity(judge, x):
    """exp(-log p(x) / L) under an autoregressive model of this project: x (n, L) -> (n,).

    With blocks of one token and no latent NELBO_1 is the chain rule, exactly.
    """
    noise = draw_noise(*x.shape, 1, 0, steps=1, device=x.device)
    return (objective(judge, x, noise, "nelbo")[0] / x.shape[1]).exp()


@torch.no_grad()
def hf_perplexity(lm, tokenizer, text):
    """Perplexity per token, after the first, of a text under a Hugging Face causal language model.

    Raises ValueError if the text is longer than the model can read, or has fewer than two tokens.
    """
    ids = tokenizer(text, return_tensors="pt").input_ids.to(lm.device)
    most = getattr(lm.config, "max_position_embeddings", math.inf)
    if not 2 <= ids.shape[1] <= most:
        raise ValueError(f"a sample of {ids.shape[1]} tokens cannot be scored by a model that "
                         f"reads 2 to {most}")
    return lm(ids, labels=ids).loss.exp().item()


def sample_rows(model, ds, a, judge=None):
    """One dict per combination of the flags -> (rows, samples of the first)."""
    rows, first = [], None
    x0, given = ds.test(a.num, torch.Generator().manual_seed(a.seed))
    start = torch.full((a.num, ds.seq_len), ds.vocab_size)
    if given is not None:
        start = torch.where(given, x0, ds.vocab_size)
    if ds.name == "needle":
        prompt = start.index_copy(1, torch.tensor([0]), x0[:, :1])
    latents = a.latent if model.latent_dim else ["none"]
    for latent, temperature, remask, nfe in itertools.product(latents, a.temperature, a.remask,
                                                              a.nfe):
        how = (nfe, remask, "fixed" if latent == "none" else latent, temperature)
        clock, x = time.time(), generate(model, start, a, *how)
        first = x if first is None else first
        row = dict(nfe=nfe, remask=remask, temperature=temperature, latent=latent, num=len(x),
                   **ds.metrics(x, x0, given))
        if judge:
            ppl = judge(x)
            row |= dict(gen_ppl=ppl.mean().item(), gen_ppl_sd=ppl.std(correction=0).item())
        if ds.name == "needle":
            row["cond_acc"] = ds.metrics(generate(model, prompt, a, *how))["acc"]
        rows.append(row | dict(seconds=round(time.time() - clock, 2)))
    return rows, first


def mean_se(values):
    """Mean and standard error of per-sequence values (n,)."""
    v = values.double()
    return v.mean().item(), (v.std() / math.sqrt(len(v))).item()


def bound_rows(model, ds, a, t_min=1e-5):
    """printed, NELBO_N and IWAE on test data, each {bound, steps, nats, se}; nats per sequence."""
    g, gd = torch.Generator().manual_seed(a.seed), torch.Generator(a.device).manual_seed(a.seed)
    x0, given = ds.test(a.bound_num, g)
    if len(x0) < 2:
        raise ValueError("a standard error needs two test sequences; leave the bounds out with "
                         "--bound-steps and no number")
    batches = [(x.to(a.device), None if given is None else given[at].to(a.device))
               for x, at in zip(x0.split(a.batch_size), torch.arange(len(x0)).split(a.batch_size))]
    r, Z, rows = model.block_size, model.latent_dim, []
    for kind, steps in [("vmd", 0)] + [("nelbo", n) for n in a.bound_steps]:
        values = []
        for x, known in batches:
            noise = draw_noise(*x.shape, r, Z, steps or None, t_min, gd, a.device)
            with torch.no_grad():
                values.append(objective(model, x, noise, kind, given=known)[0])
        nats, se = mean_se(torch.cat(values))
        rows.append(dict(bound="printed" if kind == "vmd" else "nelbo", steps=steps or None,
                         nats=nats, se=se))
    for steps in a.bound_steps if a.iwae else ():
        if steps:
            values = [iwae(model, x, steps, a.iwae, known, gd) for x, known in batches]
            nats, se = mean_se(torch.cat(values))
            rows.append(dict(bound=f"iwae_{a.iwae}", steps=steps, nats=nats, se=se))
    for row in rows if given is None else ():            # else some tokens cost nothing
        row["nats_per_token"] = row["nats"] / x0.shape[1]
    return rows


# ---- speed

class Uncached:
    """The model without its KV cache: each step of a block runs all blocks before it anew."""

    def __init__(self, model):
        self.model, self.prior_reads_z = model, model.prior_reads_z
        self.vocab_size, self.block_size = model.vocab_size, model.block_size
        self.latent_dim, self.prior, self.encode = model.latent_dim, model.prior, model.encode
        self.new_cache = model.new_cache

    def decode_block(self, x, z, cache):
        """As VMD.decode_block, but blocks stay pending for ever."""
        xs = torch.cat([p[0] for p in cache.pending] + [x], 1)
        zs = None if z is None else torch.cat([p[1] for p in cache.pending] + [z], 1)
        return self.model.decode(xs, xs, zs)[:, -x.shape[1]:]


class OneSequence(VMD):
    """The same network as one sequence [x_t ; x_0] under a dense 2 L x 2 L mask, to compare."""

    def decode(self, xt, x0, z):
        """As VMD.decode: the same logits, at a higher price."""
        c, x = self.config, torch.cat([xt, x0], 1)
        L, r, h = c.seq_len, c.block_size, self.embed(self.blocks(x)) + self.stack.place.weight
        mods = [None] * c.layers
        if z is not None:
            add, m = self.conditioner(torch.cat([z, z], 1))
            h, mods = (h if add is None else h + add), m or mods
        at = torch.arange(2 * L, device=x.device)
        block, clean = at % L // r, at >= L
        own = (block == block[:, None]) & (clean == clean[:, None])
        parts = [[(slice(None), [slice(None)], own | clean & (block < block[:, None]))]]
        rope = [torch.cat([angle, angle]) for angle in rotary(0, L, c.width // c.heads, x.device)]
        for layer, mod in zip(self.stack.layers, mods):
            h = layer(h, h.shape[1], mod, rope, parts, None, last=False)
        return self.head(norm(self.norm, h[:, : L // r])).flatten(1, 2).float()


def timed(runs, device, rounds=5, patience=60.0):
    """Seconds of each callable, {name: list}, called in turn so that noise hits all alike.

    Ends after `rounds`, or with the round in which `patience` seconds are over.
    """
    begin = time.perf_counter()
    out = {name: [] for name in runs}
    cuda = torch.device(device).type == "cuda"
    wait = functools.partial(torch.cuda.synchronize, device) if cuda else lambda: None
    for i in range(rounds + 1):
        for name, run in runs.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            if i:                                        # the first round warms up
                out[name].append(time.perf_counter() - start)
        if i and time.perf_counter() - begin > patience:
            break
    return out


def flop_of(run):
    """Floating-point operations of the matrix products in run(), attention included."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


class Benchmark:
    """Speed of what `train.py FLAGS` would train, on random tokens, beside a matmul.

    Rows {what, variant, unit, rate, least, most, gflops, of_matmul}: the median of five runs
    (fewer where they take minutes) taken in turn with the others of its kind, the least, the most.
    """

    def __init__(self, flags):
        self.a = train.settle(flags)[0]
        name, options = self.a.dataset, data.options(vars(self.a))
        if name in ("text8", "lm1b", "text"):            # no need to have the text
            lm1b, self.prefix = name == "lm1b", 0
            self.L = options.get("length", 128 if lm1b else 256)
            self.V = 30_522 if lm1b else 27
        else:
            ds = data.load(name, **options)
            self.L, self.V = ds.seq_len, ds.vocab_size
            self.prefix = ds.prefix_len
        self.rows, self.matmul, self.g = [], None, torch.Generator().manual_seed(0)
        Z = self.a.latent_dim
        self.Zs = {"VMD": Z, "latent 0": 0} if Z else {"latent 0": 0}
        train.prepare(self.a.device)

    def model(self, Z, L=None, kind=VMD):
        """A new network of latent size Z for sequences of L tokens."""
        a = argparse.Namespace(**vars(self.a) | dict(latent_dim=Z))
        if a.block_size == self.L:                       # one block, whatever the length
            a.block_size = 0
        prefix = self.prefix if L in (None, self.L) else 0
        return kind(train.shape(a, self.V, L or self.L, prefix)).to(a.device)

    def tokens(self, B, L=None):
        """Random ids (B, L)."""
        return torch.randint(self.V, (B, L or self.L), generator=self.g).to(self.a.device)

    def step(self, Z, B, L=None, compiled=False, kind=VMD):
        """A callable: one optimiser step, as train.py makes it, all tokens maskable."""
        a = argparse.Namespace(**(vars(self.a) | dict(compile=compiled)))
        model, x0 = self.model(Z, L, kind), self.tokens(B, L)
        ema = copy.deepcopy(model) if a.ema else None
        step_fn, opt = train.wrap(model, a, 1), train.optimizer(model, a)
        g = torch.Generator(a.device).manual_seed(0)

        def run():
            noise = draw_noise(*x0.shape, model.block_size, Z, a.objective_steps or None, a.t_min,
                               g, a.device)
            train.update(step_fn, opt, x0, None, noise, 1.0, a, 0, 1)
            if ema:
                train.update_average(ema, model, a.ema, a.steps)
        return run

    def measure(self, what, runs, work, unit, flop=None):
        """Times callables {variant: run}; work: units done by one call; flop: {variant: number}."""
        flop = {k: flop_of(run) for k, run in runs.items()} if flop is None else flop
        for variant, times in timed(runs, self.a.device).items():
            median = sorted(times)[len(times) // 2]
            gflops = flop[variant] / median / 1e9
            self.matmul = self.matmul or gflops
            self.rows.append(dict(what=what, variant=variant, unit=unit, rate=work / median,
                                  least=work / max(times), most=work / min(times), gflops=gflops,
                                  of_matmul=gflops / self.matmul))
            print(f"{what:<26}{variant:<16}{work / median:>12,.4g} {unit:<9}"
                  f"{work / max(times):>10,.4g}..{work / min(times):<10,.4g}{gflops:>9.1f} GFLOP/s"
                  f"{gflops / self.matmul:>7.0%}", flush=True)

    def train_rows(self, what, B, L=None):
        """Training steps of VMD and baseline, batch B."""
        self.measure(what, {k: self.step(Z, B, L) for k, Z in self.Zs.items()}, B * (L or self.L),
                     "tokens/s")

    def sample_rows(self, what, B, L, n):
        """Sampling with n steps per block; up to 1,024 tokens also without the cache."""
        models = {k: self.model(Z, L).eval() for k, Z in self.Zs.items()}
        first, masks = next(iter(models.values())), torch.full((B, L), self.V, device=self.a.device)
        slow = {"no cache": Uncached(first)} if first.block_size < L <= 1024 else {}
        for group in filter(None, (models, slow)):
            self.measure(what, {k: lambda m=m: sample(m, masks, n, temperature=1.0)
                                for k, m in group.items()}, B * L, "tokens/s")

    def sweep(self):
        """The same over lengths, at equal tokens per step, and over batch sizes."""
        one, r = self.a.block_size in (0, self.L), self.a.block_size
        for L in (64, 256, 1024, 2048):
            if one or L % r == 0:
                self.train_rows(f"training, L = {L}", max(1, self.a.batch_size * self.L // L), L)
                if not one:
                    self.sample_rows(f"sampling 4, L = {L}", 4, L, 1)
        for B in (1, 4, 16, 64, 256):
            self.train_rows(f"training, batch {B}", B)

    def peak_bytes(self):
        """Most memory that all these together took."""
        if torch.device(self.a.device).type == "cuda":
            return torch.cuda.max_memory_allocated(self.a.device)
        import resource                                  # not on Windows; KiB on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def main(self, sweep):
        """Prints and returns all measurements."""
        a, B, n = self.a, self.a.batch_size, 2048
        print(f"{'what':<26}{'variant':<16}{'median':>12} {'of':<9}{'range':^22}"
              f"{'rate':>9}{'of matmul':>16}")
        m = torch.randn(n, n, device=a.device, dtype=getattr(torch, a.dtype))
        self.measure("matmul", {a.dtype: lambda: m @ m}, 1, "/s", {a.dtype: 2 * n**3})
        runs = {k: self.step(Z, B) for k, Z in self.Zs.items()}
        if a.block_size not in (0, self.L):
            runs["latent 0, dense"] = self.step(0, B, kind=OneSequence)
        self.measure("training", runs, B * self.L, "tokens/s")
        if a.compile:
            Z = next(iter(self.Zs.values()))
            both = {"eager": self.step(Z, B), "compiled": self.step(Z, B, compiled=True)}
            # counted from the eager one: under a counter torch would leave the other uncompiled
            flop = dict.fromkeys(both, flop_of(both["eager"]))
            self.measure("training", both, B * self.L, "tokens/s", flop)
        models, x = {k: self.model(Z).eval() for k, Z in self.Zs.items()}, self.tokens(B)
        r = models["latent 0"].block_size
        z = {k: torch.randn(B, self.L // r, Z, device=a.device) if Z else None
             for k, Z in self.Zs.items()}
        with torch.no_grad():
            self.measure("decoder, all blocks", {
                k: lambda m=m, k=k: m.decode(x, x, z[k]) for k, m in models.items()}, 1, "NFE/s")
        self.sample_rows(f"sampling, {min(4, r)} step(s)", B, self.L, min(4, r))
        if sweep:
            self.sweep()
        peak = self.peak_bytes()
        print(f"peak memory of all these together {peak / 2**30:.2f} GiB, "
              f"{torch.get_num_threads()} threads, {a.device}")
        return dict(settings=vars(a), rows=self.rows, peak_bytes=peak, device=str(a.device),
                    threads=torch.get_num_threads())


def heat_map(truth, generated):
    """Two (V, V) joint distributions as text, shaded up to the largest true one (Figures 3-5)."""
    def cell(p):
        return SHADES[min(len(SHADES) - 1, math.ceil(4 * float(p / truth.max()) - 0.2))] * 2
    V = len(truth)
    lines = [f"{'true':^{2 * V}}      {'generated':^{2 * V}}      row: first token, column: second"]
    for i, (t, g) in enumerate(zip(truth, generated)):
        lines.append("".join(map(cell, t)) + f"   {i}  " + "".join(map(cell, g)))
    return "\n".join(lines)


def import_pyplot():
    """matplotlib.pyplot, drawing to files. Raises ValueError where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def plot_training(path, log):
    """Accuracy of samples during training as an image file (Figure 6). log: a log.jsonl."""
    plt = import_pyplot()
    records = [json.loads(line) for line in log.read_text().splitlines()]
    curve = {r["step"]: r["eval"] for r in records if "eval" in r}
    fig, ax = plt.subplots(figsize=(5, 3.4))
    for k in ("exact", "valid", "cell"):
        ax.plot(list(curve), [v[f"sampled_{k}"] for v in curve.values()], label=k)
    ax.set(xlabel="step", ylabel="share of held-out puzzles, cells", ylim=(0, 1))
    ax.legend()
    fig.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(fig)


def plot(path, truth, generated):
    """The same as an image file."""
    plt = import_pyplot()
    fig, axes = plt.subplots(1, 2, figsize=(7, 3.4))
    for ax, p, title in zip(axes, (truth, generated), ("true", "generated")):
        ax.imshow(p, vmin=0, vmax=truth.max(), cmap="Blues")
        ax.set(title=title, xlabel="second token", ylabel="first token")
    fig.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(fig)


def print_results(result, ds):
    """The tables."""
    def number(k, value):
        return f"{value:.2%}" if k in PERCENT else f"{value:.4f}"

    first = result["rows"][0]
    shown = [k for k in METRICS if k in first]
    spread = {k: next((s for s in ("_se", "_sd") if k + s in first), None) for k in shown}
    print(f"{'nfe':>4} {'remask':>7} {'temp':>5} {'latent':>9}"
          + "".join(f" {k:>9}" + (f" {spread[k][1:]:>8}" if spread[k] else "") for k in shown))
    for r in result["rows"]:
        print(f"{r['nfe']:>4} {r['remask']:>7} {r['temperature']:>5g} {r['latent']:>9}" + "".join(
            f" {number(k, r[k]):>9}" + (f" {number(k, r[k + spread[k]]):>8}" if spread[k] else "")
            for k in shown))
    if result["bounds"]:
        print(f"\n{'nats per sequence':<40}{'value':>10} {'s.e.':>7}"
              + (f"   entropy of the data {ds.entropy:.4f}" if ds.entropy else "")
              + (f"{'bits/token':>12}{'perplexity':>12}" if ds.vocab else ""))
    for b in result["bounds"]:
        name = f"{b['bound'].upper()}, N = {b['steps'] or 'infinity'}"
        is_bound = b["bound"] != "printed" or not result["latent_dim"]
        if b["bound"] == "printed":
            name = "printed (paper's objective" + (")" if is_bound else ", not a bound)")
        print(f"{name:<40}{b['nats']:>10.4f} {b['se']:>7.4f}"
              + (f"{b['nats_per_token'] / math.log(2):>12.4f}" if ds.vocab else "")
              + (f"{math.exp(b['nats_per_token']):>12.5g}" if ds.vocab and is_bound else ""))
    if result["latent_dim"]:
        print(f"\nactive latent units per block: {result['active_units']} of "
              f"{result['latent_dim']}")


def load_data(a, model, ckpt):
    """The dataset that the checkpoint was trained on, or that the flags name instead."""
    args = ckpt["args"]
    name, options = args["dataset"], data.options(args)
    if a.clues is not None and name != "sudoku":
        raise ValueError(f"--clues is for sudoku; {a.ckpt} was trained on {name}")
    if a.data_path and name not in ("array", "sudoku", "text"):
        raise ValueError(f"--data-path does not go with {name}, which {a.ckpt} was trained on")
    if name == "text" and a.data_path:
        options["data_path"] = a.data_path
    if name == "array":
        options |= dict(vocab_size=model.vocab_size, data_path=a.data_path or args["data_path"])
    if a.clues is not None:
        options["clues"] = a.clues
    ds = data.load(name, ckpt["vocab"], **options)
    if a.data_path and name == "sudoku":
        ds.test_set = torch.from_numpy(data.read_puzzles(a.data_path, ds.grid, ds.max_gib))
    if (ds.seq_len, ds.vocab_size) != (model.config.seq_len, model.vocab_size):
        raise ValueError(f"the data has L {ds.seq_len}, V {ds.vocab_size}; the checkpoint wants "
                         f"{model.config.seq_len}, {model.vocab_size}")
    return ds


def check(a):
    """Raises ValueError on flags that are out of range or contradict each other."""
    if a.sweep and a.benchmark is None:
        raise ValueError("--sweep needs --benchmark")
    for name, least in (("num", 1), ("bound_num", 2), ("batch_size", 1), ("iwae", 0)):
        if not least <= (least if getattr(a, name) is None else getattr(a, name)) <= 10**9:
            raise ValueError(f"--{name.replace('_', '-')} must lie in {least}..10^9")
    if not all(0 <= n <= 10**6 for n in a.bound_steps):
        raise ValueError("--bound-steps must lie in 0..10^6")
    if not all(1 <= n <= 10**6 for n in a.nfe or ()):
        raise ValueError("--nfe must lie in 1..10^6")
    if not all(0 <= t < math.inf for t in a.temperature or ()):
        raise ValueError("--temperature must be at least 0")
    if "" in (a.data_path, a.judge, a.gen_ppl):
        raise ValueError("--data-path, --judge or --gen-ppl is empty")
    if a.iwae and not any(a.bound_steps):
        raise ValueError("--iwae needs a finite --bound-steps, N above 0")
    for file in (a.json, a.plot):
        if file is not None:
            data.check_output(file)


def fill_defaults(a, model, ds):
    """Sets the flags that were not given to what suits the data and the model."""
    temperature = default_temperature(model) if ds.temperature is None else ds.temperature
    defaults = dict(num=ds.score_num, bound_num=ds.bound_num, nfe=[ds.nfe], remask=[ds.remask],
                    latent=["fixed"], temperature=[temperature]) | GRIDS.get(ds.name, {})
    if ds.name == "sudoku" and not model.latent_dim:     # argmax may suit a baseline here
        defaults["temperature"] = [1.0, 0.0]
    if a.data_path and ds.name == "sudoku":
        defaults["num"] = ds.test_set.shape[1]           # all of the file
    for k, v in defaults.items():
        if getattr(a, k) is None:
            setattr(a, k, v)
    if a.batch_size is None:                             # some GB of activations and logits
        a.batch_size = max(1, min(2000, 2**17 // ds.seq_len, 2**26 // ds.seq_len // ds.vocab_size))


def run(a):
    """Evaluates and prints. Raises ValueError, FileNotFoundError."""
    check(a)
    if a.benchmark is not None:
        return write_json(a.json, Benchmark(a.benchmark).main(a.sweep))
    model, ckpt = load_checkpoint(a.ckpt, a.device)
    start, ds = time.time(), load_data(a, model, ckpt)
    fill_defaults(a, model, ds)
    two_tokens = ds.seq_len == 2 and ds.entropy is not None
    journal = Path(a.ckpt).parent / "log.jsonl"
    if a.plot and not two_tokens and ds.name != "sudoku":
        raise ValueError(f"--plot draws the joint of two tokens; {ds.name} has {ds.seq_len}")
    if a.plot:
        import_pyplot()
        if not two_tokens and not journal.exists():
            raise FileNotFoundError(f"no {journal} to plot")
    judge = load_judge(a, ckpt)
    bounds = bound_rows(model, ds, a) if a.bound_steps else []
    rows, x = sample_rows(model, ds, a, judge)
    x0, given = ds.test(min(a.bound_num, 5000), torch.Generator().manual_seed(a.seed))
    active = active_units(model, x0.to(a.device), batch_size=a.batch_size,
                          given=None if given is None else given.to(a.device))
    result = dict(dataset=ds.name, checkpoint=str(a.ckpt), step=ckpt["step"], seed=a.seed,
                  device=str(a.device), seconds=round(time.time() - start, 2),
                  params=model.param_counts(), latent_dim=model.latent_dim,
                  active_units=active.tolist(), train_args=ckpt["args"], eval_args=vars(a),
                  rows=rows, bounds=bounds)
    where = f" {a.data_path}" if a.data_path else ""
    print(f"{ds.name}{where}, {a.ckpt}, step {ckpt['step']}, {len(x):,} samples, seed {a.seed}, "
          f"{a.device}")
    print_results(result, ds)
    if two_tokens:
        print("\n" + heat_map(ds.true_joint(), ds.joint(x)))
    write_json(a.json, result)
    if a.plot and two_tokens:
        plot(a.plot, ds.true_joint(), ds.joint(x))
    elif a.plot:
        plot_training(a.plot, journal)


def write_json(path, result):
    """Writes the result, if a path is given."""
    if path:
        Path(path).write_text(json.dumps(result, indent=1) + "\n")


def main(argv=None):
    """Returns the exit status."""
    try:
        run(build_parser().parse_args(argv))
    except Exception as e:
        if complaint(e) is None:
            raise
        print(f"eval.py: {complaint(e)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
