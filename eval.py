"""Scores a checkpoint: samples against the truth, and likelihood bounds.

    python eval.py                                                      # the last run
    python eval.py --nfe 1 2 4 --remask prob margin --json result.json
    python eval.py --plot joint.png                                     # needs matplotlib

Metrics are printed in percent and written as fractions; all else is nats. --nfe counts evaluations
per block: with two blocks, the paper's "B=2, NFE=4" is --nfe 2.
"""

import argparse
import itertools
import json
import math
import sys
import time
from pathlib import Path

import torch

import data
from diffusion import (LATENT, REMASK, active_units, default_temperature, draw_noise, iwae,
                       objective, sample)
from model import load_checkpoint

SHADES = " ░▒▓█"


def build_parser():
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = lambda message: p.exit(2, f"eval.py: {message}; see --help\n")
    p.add_argument("--ckpt", default="out/last.pt", help="checkpoint of train.py")
    p.add_argument("--data-path", metavar="FILE",
                   help="array: the .npy file, if it has moved since training")
    g = p.add_argument_group("samples: one row for each combination")
    g.add_argument("--nfe", type=int, nargs="+", default=[1],
                   help="network evaluations per block, N")
    g.add_argument("--remask", nargs="+", choices=REMASK, default=["prob"],
                   help="which tokens are unmasked first")
    g.add_argument("--latent", nargs="+", choices=LATENT, default=["fixed"],
                   help="fixed, resampled (E.1), or from the encoder (E.4)")
    g.add_argument("--temperature", type=float, nargs="+",
                   help="of the tokens, 0: argmax; default: 0 with a latent, 1 without")
    g.add_argument("--num", type=int, default=20_000, help="samples per row")
    g = p.add_argument_group("bounds")
    g.add_argument("--bound-steps", type=int, nargs="*", default=[1, 2, 4, 0],
                   help="N of NELBO_N; 0: infinity; empty: no bounds")
    g.add_argument("--bound-num", type=int, default=20_000,
                   help="test sequences per bound, one Monte-Carlo draw each")
    g.add_argument("--iwae", type=int, default=0, metavar="S",
                   help="also the bound with S importance samples; 0: no")
    g = p.add_argument_group("run")
    g.add_argument("--batch-size", type=int, default=2000, help="sequences per network evaluation")
    g.add_argument("--seed", type=int, default=0, help="seed of samples and test draws")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="torch device")
    g.add_argument("--json", metavar="FILE", help="write all results to this file")
    g.add_argument("--plot", metavar="FILE",
                   help="two-token data: true and generated joint as an image (matplotlib)")
    return p


def generate(model, start, a, nfe, remask, latent, temperature):
    """Samples from start (n, L) -> (n, L) on the CPU, from a generator of their own."""
    return sample(model, start.to(a.device), nfe, remask, temperature, latent, a.batch_size,
                  torch.Generator().manual_seed(a.seed)).cpu()


def sample_rows(model, ds, a):
    """One dict per combination of the flags -> (rows, samples of the first)."""
    V, rows, first = ds.vocab_size, [], None
    blank = torch.full((a.num, ds.seq_len), V)
    prompt = blank.clone()
    prompt[:, 0] = ds.test(a.num, torch.Generator().manual_seed(a.seed))[:, 0]
    latents = a.latent if model.latent_dim else ["none"]
    for latent, temperature, remask, nfe in itertools.product(latents, a.temperature, a.remask,
                                                              a.nfe):
        how = (nfe, remask, "fixed" if latent == "none" else latent, temperature)
        start, x = time.time(), generate(model, blank, a, *how)
        first = x if first is None else first
        row = dict(nfe=nfe, remask=remask, temperature=temperature, latent=latent, **ds.metrics(x))
        if ds.name == "needle":
            row["cond_acc"] = ds.metrics(generate(model, prompt, a, *how))["acc"]
        rows.append(row | dict(seconds=round(time.time() - start, 2)))
    return rows, first


def mean_se(values):
    """Mean and standard error of per-sequence values (n,)."""
    v = values.double()
    return v.mean().item(), (v.std() / math.sqrt(len(v))).item()


def bound_rows(model, ds, a, t_min=1e-5):
    """printed, NELBO_N and IWAE on test data, each {bound, steps, nats, se}; nats per sequence."""
    g, gd = torch.Generator().manual_seed(a.seed), torch.Generator(a.device).manual_seed(a.seed)
    batches = [x.to(a.device) for x in ds.test(a.bound_num, g).split(a.batch_size)]
    r, Z, rows = model.block_size, model.latent_dim, []
    for kind, steps in [("vmd", 0)] + [("nelbo", n) for n in a.bound_steps]:
        values = []
        for x in batches:
            noise = draw_noise(*x.shape, r, Z, steps or None, t_min, gd, a.device)
            with torch.no_grad():
                values.append(objective(model, x, noise, kind)[0])
        nats, se = mean_se(torch.cat(values))
        rows.append(dict(bound="printed" if kind == "vmd" else "nelbo", steps=steps or None,
                         nats=nats, se=se))
    for steps in a.bound_steps if a.iwae else ():
        if steps:
            values = [iwae(model, x, steps, a.iwae, generator=gd) for x in batches]
            nats, se = mean_se(torch.cat(values))
            rows.append(dict(bound=f"iwae_{a.iwae}", steps=steps, nats=nats, se=se))
    return rows


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
    print(f"{'nfe':>4} {'remask':>7} {'temp':>5} {'latent':>9} {'acc':>8} {'KL':>8}"
          + (f" {'condAcc':>8}" if ds.name == "needle" else ""))
    for r in result["rows"]:
        cells = [f"{r['acc']:>8.2%} {r['kl']:>8.4f}" if "acc" in r else f"{'-':>8} {'-':>8}"]
        cells += [f"{r['cond_acc']:>8.2%}"] if "cond_acc" in r else []
        print(f"{r['nfe']:>4} {r['remask']:>7} {r['temperature']:>5g} {r['latent']:>9} "
              + " ".join(cells))
    if result["bounds"]:
        print(f"\n{'nats per sequence':<40}{'value':>9} {'s.e.':>7}"
              + (f"   entropy of the data {ds.entropy:.4f}" if ds.entropy else ""))
    for b in result["bounds"]:
        name = f"{b['bound'].upper()}, N = {b['steps'] or 'infinity'}"
        name = "printed (paper's objective, not a bound)" if b["bound"] == "printed" else name
        print(f"{name:<40}{b['nats']:>9.4f} {b['se']:>7.4f}")
    print(f"\nactive latent units per block: {result['active_units']} of {result['latent_dim']}")


def run(a):
    """Evaluates and prints. Raises ValueError, FileNotFoundError."""
    for name, least in (("num", 1), ("bound_num", 2), ("batch_size", 1)):
        if getattr(a, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}")
    if min(a.bound_steps, default=0) < 0 or a.iwae < 0:
        raise ValueError("--bound-steps and --iwae must be at least 0")
    if a.iwae and not any(a.bound_steps):
        raise ValueError("--iwae needs a finite --bound-steps, N above 0")
    model, ckpt = load_checkpoint(a.ckpt, a.device)
    args, start = ckpt["args"], time.time()
    if a.data_path and args["dataset"] != "array":
        raise ValueError(f"--data-path is for arrays; {a.ckpt} was trained on {args['dataset']}")
    ds = data.load(args["dataset"], args["strength"], args["length"],
                   a.data_path or args["data_path"], model.vocab_size)
    if (ds.seq_len, ds.vocab_size) != (model.config.seq_len, model.vocab_size):
        raise ValueError(f"the data has L {ds.seq_len}, V {ds.vocab_size}; the checkpoint wants "
                         f"{model.config.seq_len}, {model.vocab_size}")
    if a.plot and (ds.seq_len != 2 or ds.entropy is None):
        raise ValueError(f"--plot draws the joint of two tokens; {ds.name} has {ds.seq_len}")
    if a.plot:
        import_pyplot()
    for file in (a.json, a.plot):
        if file and not Path(file).absolute().parent.is_dir():
            raise FileNotFoundError(f"no folder {Path(file).parent} to write {file} to")
    if a.temperature is None:
        a.temperature = [default_temperature(model)]
    rows, x = sample_rows(model, ds, a)
    bounds = bound_rows(model, ds, a) if a.bound_steps else []
    x0 = ds.test(min(a.bound_num, 5000), torch.Generator().manual_seed(a.seed))
    active = active_units(model, x0.to(a.device))
    result = dict(dataset=ds.name, checkpoint=str(a.ckpt), step=ckpt["step"], seed=a.seed,
                  device=str(a.device), seconds=round(time.time() - start, 2),
                  params=model.param_counts(), latent_dim=model.latent_dim,
                  active_units=active.tolist(), train_args=args, rows=rows, bounds=bounds)
    print(f"{ds.name}, {a.ckpt}, step {ckpt['step']}, {a.num:,} samples, seed {a.seed}, {a.device}")
    print_results(result, ds)
    if ds.seq_len == 2 and ds.entropy is not None:
        print("\n" + heat_map(ds.true_joint(), ds.joint(x)))
        if a.plot:
            plot(a.plot, ds.true_joint(), ds.joint(x))
    if a.json:
        Path(a.json).write_text(json.dumps(result, indent=1) + "\n")


def main(argv=None):
    """Returns the exit status."""
    try:
        run(build_parser().parse_args(argv))
    except (ValueError, OSError) as e:
        print(f"eval.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
