"""Trains VMD, or with --latent-dim 0 its baseline, on one CPU, one GPU, or several with torchrun.

    python train.py                                       # pairs, minutes on a laptop
    python train.py --dataset d2 --block-size 2 --out out/d2
    torchrun --standalone --nproc_per_node=2 train.py --dataset d1

Writes last.pt, best.pt (lowest validation loss) and log.jsonl to --out. Losses are nats per
sequence.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

try:
    import fcntl
except ImportError:                                  # Windows: folders are not locked
    fcntl = None

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import data
from diffusion import active_units, default_temperature, draw_noise, objective, sample
from model import (CHECKPOINT_VERSION, CONDITIONING, POOLING, PRIOR, VMD, Config, complaint,
                   load_checkpoint, one_line, usable)

# Appendix C.1. What the paper leaves open: heads, how t is kept from 0.
PAPER = dict(
    block_size=0, width=64, heads=4, layers=8, encoder_layers=2, latent_dim=32, latent_hidden=4,
    conditioning="adaln", pooling="mean", batch_size=10_000, steps=2000, optimizer="adam",
    lr=1e-3, schedule="constant", objective="vmd", objective_steps=0,
    decay_from=0.0, warmup=0, weight_decay=0.0, clip=0.0, ema=0.0, t_min=1e-3, kl_weight=1.0,
    kl_schedule="none", kl_start=1e-3, kl_ramp=[0.05, 0.4], dtype="float32")
# differs from the paper: two CPU cores, minutes; KL ramp, clipping, cosine decay, averaged weights.
# A larger t_min spends the samples where z matters; a KL weight above 1 closes the holes that the
# posteriors leave in the prior (for pairs z is not worth a weight of 2).
CPU = PAPER | dict(
    layers=3, encoder_layers=1, batch_size=512, steps=3000, lr=2e-3, schedule="cosine",
    decay_from=0.5, warmup=50, clip=1.0, ema=0.998, t_min=0.2, kl_weight=1.3,
    kl_schedule="geometric")
PRESETS = {name: {"paper": dict(PAPER), "cpu": dict(CPU)} for name in data.DATASETS}
PRESETS["pairs"]["paper"]["kl_weight"] = 4.0  # C.1: "for the uniform data experiments"
for name in ("pairs", "pairs_nonuniform"):
    PRESETS[name]["cpu"] |= dict(t_min=0.5, kl_weight=1.5)
PRESETS["d2"]["cpu"]["steps"] = 4000
PRESETS["pairs_strength"]["cpu"] |= dict(latent_dim=2, kl_weight=0.8)
PRESETS["needle"]["cpu"] |= dict(
    batch_size=128, steps=2000, t_min=0.7, kl_start=1e-2, kl_weight=2.0)
PRESETS["sudoku"] = {                                # C.2; 300 epochs of 1.8 million puzzles
    "paper": PAPER | dict(
        grid=9, layout="prefix", width=256, heads=8, layers=6, encoder_layers=4, latent_dim=128,
        latent_hidden=1, conditioning="shared", pooling="gated", batch_size=1024, steps=527_344,
        schedule="cosine"),
    "cpu": CPU | dict(
        grid=6, layout="board", width=96, heads=8, layers=4, batch_size=128, steps=4000,
        kl_weight=1.0, kl_ramp=[0.02, 0.25])}
TEXT = PAPER | dict(                                 # C.3; steps are BD3-LM's, the paper has none
    block_size=4, width=256, heads=8, encoder_layers=4, latent_dim=128, conditioning="add",
    batch_size=512, steps=1_000_000, optimizer="adamw", lr=3e-4, warmup=2500, ema=0.9999,
    dtype="bfloat16")
for name in ("text8", "lm1b", "text"):
    # differs from the paper: t in {1/2, 1} teaches z more than t near 0; few units, and a KL weight
    # that starts high enough for the decoder not to copy all of the text from z.
    PRESETS[name] = {"paper": dict(TEXT), "cpu": CPU | dict(
        length=64, block_size=4, width=128, encoder_layers=2, latent_dim=8, conditioning="add",
        objective="nelbo", objective_steps=2, batch_size=64, steps=1000, lr=1e-3, t_min=1e-3,
        kl_weight=1.0, kl_start=0.1, kl_ramp=[0.1, 0.25])}
FREE_ON_RESUME = {"resume", "out", "device", "compile", "log_every", "eval_every", "grad_accum"}
OPTIONAL = dict.fromkeys(["preset", "init_from", *sum(data.OPTIONS.values(), ())])
LATENT_PARTS = ("encoder.", "conditioner.", "prior_net.")  # parameters that the baseline lacks
EVAL_SEQUENCES = 2000


def build_parser():
    """The command line. A flag without a default is absent if not given: see `settle`."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                argument_default=argparse.SUPPRESS)
    p.error = lambda message: p.exit(2, f"train.py: {message}; see --help\n")
    g = p.add_argument_group("data")
    g.add_argument("--dataset", choices=data.DATASETS, default="pairs", help="what to learn")
    g.add_argument("--data-path", metavar="FILE",
                   help="text: a UTF-8 file; array: an (N, L) integer .npy file; sudoku: puzzles, "
                   "one per line, text or CSV, or Shah et al.'s .npy")
    g.add_argument("--alphabet", choices=("text8",),
                   help="text: map it to text8's 27 symbols; default: its own characters")
    g.add_argument("--vocab-size", type=int,
                   help="array: V, if larger than the largest id plus one")
    g.add_argument("--strength", type=float,
                   help="pairs_strength: probability p of the successor, 0..1; default: 1")
    g.add_argument("--length", type=int,
                   help="sequence length L in tokens; default: needle 20; text 64 with the cpu "
                   "preset, else 256, lm1b 128")
    g.add_argument("--grid", type=int, choices=tuple(data.BOXES),
                   help="sudoku: n of an n x n board; default: the preset's")
    g.add_argument("--layout", choices=data.LAYOUTS,
                   help="sudoku: the paper's puzzle + solution, or the board alone with its clues "
                   "given; default: the preset's")
    g.add_argument("--clues", type=int,
                   help="sudoku: show this many random cells; default: the clues of a puzzle that "
                   "has one solution")
    g.add_argument("--source", choices=data.SOURCES,
                   help="sudoku: generated here, or downloaded (Shah et al. 2024; sudoku-extreme); "
                   "default: generated")
    g.add_argument("--puzzles", type=int, help="sudoku: how many to generate; default: 100000")
    g.add_argument("--max-gib", type=float,
                   help="largest text or CSV file that is read, in GiB; default: 1")
    g.add_argument("--data-dir", metavar="DIR",
                   help="folder of generated and downloaded data; default: .data")
    g = p.add_argument_group("model (default: the preset's)")
    g.add_argument("--preset", choices=("paper", "cpu"),
                   help="paper: Appendix C; cpu: two cores; default: paper with CUDA, else cpu")
    g.add_argument("--block-size", type=int,
                   help="tokens per block r, a divisor of L; 0: one block")
    g.add_argument("--width", type=int, help="D")
    g.add_argument("--heads", type=int, help="attention heads H")
    g.add_argument("--layers", type=int, help="decoder layers")
    g.add_argument("--encoder-layers", type=int, help="encoder layers")
    g.add_argument("--latent-dim", type=int, help="Z per block; 0: the baseline without latents")
    g.add_argument("--latent-hidden", type=int,
                   help="width of the hidden layers of z's MLP, in units of D")
    g.add_argument("--conditioning", choices=CONDITIONING, help="how z enters the decoder")
    g.add_argument("--pooling", choices=POOLING, help="how the encoder summarises a block")
    g.add_argument("--prior", choices=PRIOR, default="standard",
                   help="of z^b: N(0, I), p(z^b | z^{<b}) (E.2), p(z^b | x_t^b, x_0^{<b}) (E.3)")
    g = p.add_argument_group("objective (default: the preset's)")
    g.add_argument("--objective", choices=("vmd", "nelbo"),
                   help="vmd: Eqs. 6, 8; nelbo: a likelihood bound")
    g.add_argument("--objective-steps", type=int,
                   help="nelbo: N, the sampler's steps per block; 0: infinity")
    g.add_argument("--t-min", type=float,
                   help="t is uniform on (t_min, 1]; clips the weight 1/t (not used with N steps)")
    g.add_argument("--kl-weight", type=float, help="weight of the KL at the end of the ramp")
    g.add_argument("--kl-schedule", choices=("none", "linear", "geometric"),
                   help="how the weight rises from --kl-start")
    g.add_argument("--kl-start", type=float, help="KL weight before the ramp, above 0")
    g.add_argument("--kl-ramp", type=float, nargs=2, metavar=("FROM", "TO"),
                   help="the ramp, as shares of the run, 0..1")
    g = p.add_argument_group("optimisation (default: the preset's)")
    g.add_argument("--steps", type=int, help="optimiser steps")
    g.add_argument("--batch-size", type=int, help="sequences per step, over all processes")
    g.add_argument("--grad-accum", type=int, default=1,
                   help="micro-batches per step, to fit memory (gradients equal but for rounding)")
    g.add_argument("--optimizer", choices=("adam", "adamw"), help="optimiser")
    g.add_argument("--lr", type=float, help="peak learning rate")
    g.add_argument("--schedule", choices=("constant", "cosine"), help="learning rate after warm-up")
    g.add_argument("--decay-from", type=float,
                   help="cosine: share of the run, 0..1, after which the rate falls to zero")
    g.add_argument("--warmup", type=int, help="steps of linear warm-up")
    g.add_argument("--weight-decay", type=float, help="for adamw")
    g.add_argument("--clip", type=float,
                   help="largest gradient norm (of nats per token); 0: no clipping")
    g.add_argument("--ema", type=float,
                   help="decay of averaged weights, which are what is evaluated; 0: none")
    g = p.add_argument_group("run")
    g.add_argument("--out", default="out",
                   help="folder of checkpoints and log; an earlier run in it is moved aside")
    g.add_argument("--resume", action="store_true", default=False,
                   help="go on from last.pt in --out, bit for bit, with that run's settings")
    g.add_argument("--init-from", metavar="CKPT",
                   help="start from another checkpoint's decoder (E.5)")
    g.add_argument("--freeze-decoder", action="store_true", default=False,
                   help="with --init-from: train only encoder and latent pathway (E.5)")
    g.add_argument("--seed", type=int, default=0,
                   help="seed of weights, data and noise; CUDA kernels may differ in the last bit")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="torch device")
    g.add_argument("--dtype", choices=("float32", "bfloat16"),
                   help="autocast type; default: float32, for text in the paper preset on CUDA "
                   "bfloat16")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                   help="torch.compile the step")
    g.add_argument("--log-every", type=int, default=100, help="steps between log lines")
    g.add_argument("--eval-every", type=int, default=250,
                   help="steps between evaluations, each after a checkpoint")
    return p


def settle(argv=None):
    """argv -> (args with the preset filled in, resumed checkpoint or None). Raises ValueError."""
    parser = build_parser()
    args = OPTIONAL | vars(parser.parse_args(argv))
    unset = object()        # attributes that exist are not overwritten by defaults
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(args, unset))))
    given = {k: v for k, v in given.items() if v is not unset}
    if args["resume"]:
        _, ckpt = load_checkpoint(Path(args["out"]) / "last.pt", "cpu")
        for k, v in given.items():
            if k not in FREE_ON_RESUME and v != ckpt["args"].get(k):
                raise ValueError(f"--{k.replace('_', '-')} {v} contradicts the run to resume, "
                                 f"which has {ckpt['args'].get(k)}")
        free = {k: v for k, v in given.items() if k in FREE_ON_RESUME}
        resumed = argparse.Namespace(**(ckpt["args"] | free | {"out": args["out"]}))
        check_types(ckpt["args"], f"{args['out']}/last.pt")
        check(resumed)
        if torch.device(resumed.device).type != torch.device(ckpt["args"]["device"]).type:
            raise ValueError(f"the run to resume used {ckpt['args']['device']}: its random "
                             f"streams cannot go on on {resumed.device}")
        return resumed, ckpt
    args["preset"] = args["preset"] or ("paper" if args["device"].startswith("cuda") else "cpu")
    preset = PRESETS[args["dataset"]][args["preset"]]
    if args["dataset"] == "sudoku" and (given.get("data_path") or
                                        given.get("source", "generated") != "generated"):
        preset = preset | {"grid": 9}                    # what other people's puzzles are
    if given.get("objective") == "vmd":                  # which has no steps
        preset = preset | {"objective_steps": 0}
    if not args["device"].startswith("cuda"):            # slower than float32 on most CPUs
        preset = preset | {"dtype": "float32"}
    args = argparse.Namespace(**(args | preset | given | {"preset": args["preset"]}))
    check(args)
    for k, idle, why in (("kl_start", args.kl_schedule == "none", "--kl-schedule none"),
                         ("kl_ramp", args.kl_schedule == "none", "--kl-schedule none"),
                         ("decay_from", args.schedule == "constant", "--schedule constant"),
                         ("t_min", args.objective_steps > 0, "--objective-steps N")):
        if k in given and idle:
            raise ValueError(f"--{k.replace('_', '-')} has no effect with {why}")
    return args, None


def check_types(saved, path):
    """Raises ValueError unless a checkpoint's settings have the names and types of today's."""
    fresh = {}
    if saved["dataset"] in data.DATASETS:
        fresh = vars(settle(["--dataset", saved["dataset"]])[0])
    odd = [k for k in sorted(fresh.keys() | saved.keys()) if k not in fresh or k not in saved or (
        type(saved[k]) is not type(fresh[k]) and (k not in OPTIONAL or None not in (saved[k],
                                                                                    fresh[k])))]
    if odd or [type(x) for x in saved["kl_ramp"]] != [float, float]:
        raise ValueError(f"{path} is damaged or from another version of train.py: its settings "
                         + ", ".join(odd or ["kl_ramp"]))


def check(a):
    """Raises ValueError on settings that are out of range or contradict each other."""
    usable(a.device)
    if "" in (a.out, a.init_from, a.data_path, a.data_dir):
        raise ValueError("--out, --init-from, --data-path or --data-dir is empty")
    for names, least, words in (
            (("steps", "batch_size", "grad_accum", "log_every", "eval_every"), 1, "1 or more"),
            (("lr", "kl_start"), sys.float_info.min, "above 0"),
            (("kl_weight", "weight_decay", "clip", "warmup", "objective_steps"), 0, "0 or more")):
        for k in names:
            most = 1e9 if isinstance(getattr(a, k), int) else 1e30
            if not least <= getattr(a, k) <= most:
                raise ValueError(f"--{k.replace('_', '-')} must be {words}, at most {most:g}, not "
                                 f"{getattr(a, k)}")
    if not 0 <= a.ema < 1 or not 0 < a.t_min < 1 or not 0 <= a.decay_from < 1:
        raise ValueError(f"--ema {a.ema} and --decay-from {a.decay_from} must lie in [0, 1), "
                         f"--t-min {a.t_min} in (0, 1)")
    if not 0 <= a.kl_ramp[0] < a.kl_ramp[1] <= 1:
        raise ValueError(f"--kl-ramp needs 0 <= FROM < TO <= 1, not {a.kl_ramp}")
    if a.kl_schedule == "geometric" and a.kl_weight == 0:
        raise ValueError("a geometric ramp cannot end at --kl-weight 0; use --kl-schedule linear")
    if a.objective_steps and a.objective != "nelbo":
        raise ValueError("--objective-steps needs --objective nelbo")
    if a.weight_decay and a.optimizer != "adamw":
        raise ValueError("--weight-decay needs --optimizer adamw")
    if a.prior != "standard" and not a.latent_dim:
        raise ValueError(f"--prior {a.prior} needs a --latent-dim above 0")
    if a.freeze_decoder and not (a.init_from and a.latent_dim):
        raise ValueError("--freeze-decoder needs --init-from, and a --latent-dim above 0 to train")
    for k in OPTIONAL:
        owners = [d for d, names in data.OPTIONS.items() if k in names]
        if owners and getattr(a, k) is not None and a.dataset not in owners:
            raise ValueError(f"--{k.replace('_', '-')} is for --dataset {' or '.join(owners)}, not "
                             f"{a.dataset}")


def kl_weight_at(progress, a):
    """KL weight at a share 0..1 of the run: start, ramp up to --kl-weight, hold."""
    if a.kl_schedule == "none":
        return a.kl_weight
    u = min(1.0, max(0.0, (progress - a.kl_ramp[0]) / (a.kl_ramp[1] - a.kl_ramp[0])))
    if a.kl_schedule == "linear":
        return a.kl_start + u * (a.kl_weight - a.kl_start)
    return a.kl_start ** (1 - u) * a.kl_weight**u


def lr_at(step, a):
    """Learning rate: linear warm-up, then constant; cosine: falls to 0 after --decay-from."""
    if step < a.warmup:
        return a.lr * (step + 1) / a.warmup
    begin = max(a.warmup, a.decay_from * a.steps)
    if a.schedule == "constant" or step < begin:
        return a.lr
    return a.lr * 0.5 * (1 + math.cos(math.pi * (step - begin) / max(1, a.steps - begin)))


class Step(nn.Module):
    """The objective as a module, so that DDP and torch.compile can wrap it."""

    def __init__(self, model, kind):
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, x0, given, noise, kl_weight):
        """-> nats per token (to minimise), and detached loss, recon, kl in nats per sequence."""
        terms = [v.mean() for v in objective(self.model, x0, noise, self.kind, kl_weight, given)]
        return terms[0] / x0.shape[1], torch.stack(terms).detach()


def save(path, state):
    """Writes a checkpoint so that a kill at any moment leaves the old file or the new one.

    Raises OSError, on a full disk for instance; the old file stays.
    """
    tmp = path.with_suffix(".tmp")
    try:
        with open(tmp, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as e:                 # torch.save wraps an OSError
        if tmp.is_file():
            tmp.unlink()
        why = e.__context__ if isinstance(e.__context__, OSError) else e
        raise OSError(f"cannot write {path}: {one_line(why)}; what was there stays") from None


@torch.no_grad()
def evaluate(model, ds, a, samples=None):
    """Validation loss at the final KL weight, active latent units, scores of samples (sampled_...).

    Nats per sequence. Own seeds: training's random streams are not touched.
    """
    dev = next(model.parameters()).device
    g, gd = torch.Generator().manual_seed(1), torch.Generator(dev).manual_seed(1)
    x0, given = on(dev, *ds.valid(min(EVAL_SEQUENCES, max(64, 2**16 // ds.seq_len)), g))
    noise = draw_noise(*x0.shape, model.block_size, model.latent_dim, a.objective_steps or None,
                       a.t_min, gd, dev)
    rows = torch.arange(len(x0), device=dev).split(max(1, a.batch_size // a.grad_accum))
    terms = [objective(model, x0[at], noise[at], a.objective, a.kl_weight,
                       None if given is None else given[at]) for at in rows]
    loss, recon, kl = (torch.cat(v).mean().item() for v in zip(*terms))
    out = dict(loss=loss, recon=recon, kl=kl, active=active_units(model, x0, given=given).tolist())
    if not ds.scored:
        return out
    x0, given = ds.valid(samples or min(EVAL_SEQUENCES, ds.score_num), g)
    masked = torch.full_like(x0, ds.vocab_size)
    start = masked if given is None else torch.where(given, x0, masked)
    x = sample(model, start.to(dev), ds.nfe, ds.remask, generator=g,
               batch_size=max(a.batch_size, 2**16 // ds.seq_len)).cpu()
    return out | {f"sampled_{k}": v for k, v in ds.metrics(x, x0, given).items()}


def on(device, *tensors):
    """The tensors, or None, on a device, without waiting for the copy."""
    cuda = torch.device(device).type == "cuda"
    return [t if t is None else (t.pin_memory() if cuda and t.device.type == "cpu" else t)
            .to(device, non_blocking=True) for t in tensors]


def barrier():
    """Waits for all processes. Raises ValueError if another one has ended."""
    try:
        dist.barrier()
    except RuntimeError as e:
        raise ValueError(f"another process has failed ({one_line(e)})") from None


def independent(ds, n=20_000):
    """Metrics of the product of the true marginals, the best that one step without z can do."""
    x, _ = ds.test(n, torch.Generator().manual_seed(2))
    g = torch.Generator().manual_seed(3)
    shuffled = [column[torch.randperm(n, generator=g)] for column in x.unbind(1)]
    return ds.metrics(torch.stack(shuffled, dim=1))


def announce(a, model, ds, world, log):
    """Prints what will be trained, with what, and about how long it takes."""
    counts = model.param_counts()
    K = ds.seq_len // model.block_size
    log(f"dataset {ds.name}: L {ds.seq_len}, V {ds.vocab_size}, {K} block(s) of "
        f"{model.block_size}, {ds.about}")
    log("parameters: " + ", ".join(f"{k} {v:,}" for k, v in counts.items()))
    preset = PRESETS[a.dataset][a.preset]
    log(f"preset {a.preset}: " + " ".join(f"{k}={getattr(a, k)}" for k in preset))
    m = torch.randn(1024, 1024, device=a.device)
    (m @ m).sum().item()
    start = time.time()
    for _ in range(8):
        (m @ m).sum().item()
    rate = 8 * 2 * 1024**3 / (time.time() - start)
    streams = 2 - 1 / K                              # noisy and clean tokens per token of data
    tables = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    head = model.head.weight.numel()                 # read at noisy tokens only
    path = sum(p.numel() for p in model.conditioner.parameters()) if a.latent_dim else 0
    flop = 6 * a.steps * a.batch_size * (
        ds.seq_len * (streams * (sum(counts.values()) - path - tables - head) + head) + K * path)
    log(f"about {flop:.1e} FLOP: {clock(flop / rate / 0.3 / world)} at 30% of the "
        f"{rate / 1e9:.0f} GFLOP/s that a matmul gets on this {a.device} now"
        + (f", on each of {world}" if world > 1 else ""))


def clock(seconds):
    """Seconds -> '1 h 02 min', '3 min 04 s'."""
    s = int(seconds)
    return f"{s // 3600} h {s // 60 % 60:02d} min" if s >= 3600 else f"{s // 60} min {s % 60:02d} s"


@torch.no_grad()
def update_average(ema, model, decay, step):
    """Exponential moving average of the weights: ema <- d ema + (1 - d) model.

    d = min(decay, (1 + step) / (10 + step)), so that short runs forget their start.
    """
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()),
                         1 - min(decay, (1 + step) / (10 + step)))


def optimizer(model, a):
    """Fused Adam or AdamW over what is not frozen."""
    cls = torch.optim.AdamW if a.optimizer == "adamw" else torch.optim.Adam
    decay = a.weight_decay if a.optimizer == "adamw" else 0.0
    return cls([p for p in model.parameters() if p.requires_grad], lr=a.lr, weight_decay=decay,
               fused=True)


def shape(a, vocab_size, seq_len, prefix_len=0):
    """The network's Config that the flags ask for, for data of this form."""
    return Config(vocab_size, seq_len, a.block_size or seq_len, a.width, a.heads, a.layers,
                  a.encoder_layers, a.latent_dim, a.latent_hidden, a.conditioning, a.pooling,
                  a.prior, prefix_len)


def setup(a, ckpt):
    """Dataset, model, optimizer, EMA and random streams, new or as the checkpoint left them."""
    torch.manual_seed(a.seed)
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local:                                            # the first process of a machine downloads
        barrier()
    ds = data.load(a.dataset, ckpt and ckpt["vocab"], **data.options(vars(a)))
    ds.about                                             # reads the data
    if dist.is_initialized() and not local:
        barrier()
    config = shape(a, ds.vocab_size, ds.seq_len, ds.prefix_len)
    model = VMD(config).to(a.device)
    if a.init_from and ckpt is None:
        source, other = load_checkpoint(a.init_from, a.device)
        if other["vocab"] != ds.vocab:
            raise ValueError(f"{a.init_from} has another vocabulary")
        weights, own = ({k: v for k, v in m.state_dict().items() if not k.startswith(LATENT_PARTS)}
                        for m in (source, model))
        shapes = [{k: v.shape for k, v in w.items()} for w in (weights, own)]
        if shapes[0] != shapes[1] or source.config.heads != a.heads:
            raise ValueError(f"the decoder of {a.init_from} has another shape: {source.config}")
        model.load_state_dict(weights, strict=False)
    for k, p in model.named_parameters():
        p.requires_grad_(not a.freeze_decoder or k.startswith(LATENT_PARTS))
    opt = optimizer(model, a)
    ema = copy.deepcopy(model) if a.ema else None
    streams = {"data": torch.Generator().manual_seed(2 * a.seed),
               "noise": torch.Generator(a.device).manual_seed(2 * a.seed + 1)}
    if ckpt is not None:
        if asdict(config) != ckpt["config"]:
            raise ValueError(f"the data differs from what was trained on: {ckpt['config']}")
        model.load_state_dict(ckpt["model"])
        try:
            opt.load_state_dict(ckpt["optimizer"])
            for p, state in opt.state.items():
                if any(v.shape not in ((), p.shape) for v in state.values()):
                    raise ValueError("a moment has not the shape of its parameter")
            for k, g in streams.items():
                g.set_state(ckpt["rng"][k].cpu())
            if ema:
                ema.load_state_dict(ckpt["ema"])
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as e:
            raise ValueError(f"{a.out}/last.pt is damaged: {one_line(e)}") from None
    return ds, model, opt, ema, streams


@contextlib.contextmanager
def stop_signals():
    """Ctrl-C and SIGTERM end up in the list that this yields, to be looked at between steps."""
    stop = []

    def note(number, frame):
        stop.append(number)
        signal.signal(number, old[number])               # a second one acts at once
    old = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


def move_aside(out):
    """Moves an earlier run's files in `out` to out/1, out/2, ...: a new run loses nothing."""
    old = [p for p in (out / n for n in ("last.pt", "best.pt", "log.jsonl")) if p.exists()]
    if old:
        to = next(out / str(i) for i in range(1, 10**6) if not (out / str(i)).exists())
        to.mkdir()
        for p in old:
            p.rename(to / p.name)
        print(f"moved the earlier run in {out} to {to}")


def trim(log, step):
    """Drops from a log.jsonl what a killed run wrote after `step`, where its checkpoint is.

    Returns whether the evaluation at `step` is there.
    """
    records = []
    for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):      # a line cut by the kill
            record = json.loads(line)
            records += [record] if record["step"] <= step else []
    part = log.with_suffix(".tmp")
    part.write_text("".join(json.dumps(r) + "\n" for r in records))
    os.replace(part, log)
    return any(r["step"] == step and "eval" in r for r in records)


@contextlib.contextmanager
def locked(folder):
    """No second run writes to the folder meanwhile. Raises ValueError if one does."""
    if fcntl is None:
        yield
        return
    fd, taken = os.open(folder, os.O_RDONLY), False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:                                 # or the file system cannot lock folders
        taken = isinstance(e, BlockingIOError)
    try:
        if taken:
            raise ValueError(f"another run writes to {folder}; give this one another --out")
        yield
    finally:
        os.close(fd)


def update(step_fn, opt, x0, given, noise, kl_weight, a, rank, world):
    """One optimiser step on this process's rows -> (loss, recon, kl) nats, gradient norm."""
    opt.zero_grad(set_to_none=True)
    parts, total = world * a.grad_accum, 0
    for j in range(a.grad_accum):
        rows = slice(rank * a.grad_accum + j, None, parts)
        # gradients are averaged with the last micro-batch
        wait = world > 1 and j < a.grad_accum - 1
        with step_fn.no_sync() if wait else contextlib.nullcontext():
            with torch.autocast(torch.device(a.device).type, torch.bfloat16,
                                enabled=a.dtype == "bfloat16"):
                part = on(a.device, x0[rows], None if given is None else given[rows])
                weight = torch.full((), kl_weight, device=a.device)
                loss, terms = step_fn(*part, noise[rows], weight)
            (loss / a.grad_accum).backward()
        total = total + terms / a.grad_accum
    norm = nn.utils.clip_grad_norm_([p for g in opt.param_groups for p in g["params"]],
                                    a.clip or math.inf)
    opt.step()
    return total, norm


def wrap(model, a, world):
    """The objective of the model as one callable, under DDP and torch.compile where asked for."""
    step_fn = Step(model, a.objective)
    if a.compile:
        step_fn.compile()
    if world > 1:
        ids = [torch.cuda.current_device()] if a.device.startswith("cuda") else None
        step_fn = nn.parallel.DistributedDataParallel(step_fn, device_ids=ids)
    return step_fn


class Recorder:
    """Means of the losses since the last line; writes to the terminal and to log.jsonl."""

    def __init__(self, a, tokens, step, log, journal):
        self.a, self.tokens, self.log, self.journal = a, tokens, log, journal
        self.reset(step)

    def reset(self, step):
        """Starts the means anew."""
        self.sums, self.since, self.clock = torch.zeros(3, device=self.a.device), step, time.time()

    def write(self, **record):
        """One line of log.jsonl."""
        self.journal.write(json.dumps(record) + "\n")
        self.journal.flush()

    def line(self, done, kl_weight, lr, norm, seconds):
        """The log line of a step."""
        n, a = done - self.since, self.a
        loss, recon, kl = (self.sums / n).tolist()
        rate = n * self.tokens / (time.time() - self.clock)
        self.log(f"step {done}/{a.steps}  loss {loss:.4f}  recon {recon:.4f}  "
                 f"kl {kl:.3f} x {kl_weight:.2g}  lr {lr:.1e}  grad {norm:.2f}  "
                 f"{rate:,.0f} tok/s  ETA {clock(seconds / done * (a.steps - done))}")
        self.write(step=done, loss=loss, recon=recon, kl=kl, kl_weight=kl_weight, lr=lr,
                   grad_norm=norm.item(), tokens_per_second=rate, seconds=seconds)
        self.reset(done)

    def evaluation(self, done, result):
        """The line of an evaluation, and a warning in plain words if the latent has collapsed."""
        self.write(step=done, eval=result)
        shown = [f"{k} {v:.4f}" for k, v in result.items() if isinstance(v, float)]
        units = result["active"]
        if self.a.latent_dim:
            shown.append(f"active {units if len(units) < 9 else f'{min(units)} to {max(units)}'}")
        self.log("  valid " + "  ".join(shown))
        if self.a.latent_dim and sum(result["active"]) == 0:
            self.log("  the latent has collapsed: no unit is active, z says nothing. Where the "
                     "given tokens decide all others that is right; else lower --kl-start or "
                     "--kl-weight, or let the ramp end later (--kl-ramp)")


def train(a, ckpt, rank, world):
    """Sets everything up, then trains, alone in the folder --out. Returns an exit status."""
    parts = setup(a, ckpt)
    if a.batch_size % (world * a.grad_accum):
        raise ValueError(f"--batch-size {a.batch_size} is not a multiple of "
                         f"processes x --grad-accum = {world * a.grad_accum}")
    if world > 1:
        barrier()                                    # all have read --init-from before files move
    if rank:
        return loop(a, ckpt, parts, rank, world)
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        announce(a, parts[1], parts[0], world, tqdm.write)
        if ckpt is None:
            move_aside(out)
        assessed = ckpt is None or trim(out / "log.jsonl", ckpt["step"])
        return loop(a, ckpt, parts, rank, world, assessed)


def loop(a, ckpt, parts, rank, world, assessed=True):
    """The training loop. assessed: the evaluation due at the step of `ckpt`, if any, was made."""
    ds, model, opt, ema, streams = parts
    out, log = Path(a.out), (tqdm.write if rank == 0 else lambda line: None)
    begin, best, spent = 0, math.inf, 0.0
    if ckpt:
        begin, best, spent = ckpt["step"], ckpt["best"], ckpt["seconds"]
        if (out / "best.pt").exists():               # a kill may have come between best and last
            best = min(best, load_checkpoint(out / "best.pt")[1]["best"])
    judged, step_fn, start = ema or model, wrap(model, a, world), time.time()

    def state(step):
        return dict(version=CHECKPOINT_VERSION, model=model.state_dict(),
                    ema=ema.state_dict() if ema else None,
                    optimizer=opt.state_dict(), step=step, best=best,
                    seconds=spent + time.time() - start, args=vars(a),
                    config=asdict(model.config), vocab=ds.vocab,
                    rng={k: g.get_state() for k, g in streams.items()})

    def assess(done):
        nonlocal best
        result = evaluate(judged, ds, a)
        recorder.evaluation(done, result)
        if result["loss"] < best:
            best = result["loss"]
            save(out / "best.pt", state(done))

    def stopping(done):
        if world > 1 and done % 10 == 0:             # all processes stop after the same step
            flag = torch.tensor(len(stop), device=a.device)
            dist.all_reduce(flag)
            return flag.item() > 0
        return world == 1 and bool(stop)

    journal = open(out / "log.jsonl", "a") if rank == 0 else open(os.devnull, "w")
    progress = tqdm(total=a.steps, initial=begin, disable=rank > 0 or not sys.stderr.isatty(),
                    unit="step")
    with journal, progress as bar, stop_signals() as stop:
        recorder = Recorder(a, a.batch_size * ds.seq_len, begin, log, journal)
        if not assessed and (begin % a.eval_every == 0 or begin == a.steps):
            assess(begin)
        bad = torch.full((3,), math.inf, device=a.device)    # the first step that is not finite
        for step in range(begin, a.steps):
            kl_weight, lr = kl_weight_at(step / a.steps, a), lr_at(step, a)
            for group in opt.param_groups:
                group["lr"] = lr
            # every process draws the whole batch and keeps its rows
            x0, given = ds.batch(a.batch_size, streams["data"])
            noise = draw_noise(*x0.shape, model.block_size, model.latent_dim,
                               a.objective_steps or None, a.t_min, streams["noise"], a.device)
            terms, norm = update(step_fn, opt, x0, given, noise, kl_weight, a, rank, world)
            recorder.sums += terms
            finite = torch.stack([terms[1], terms[2], norm]).isfinite()
            bad = torch.where(finite, bad, bad.clamp(max=step + 1))
            if ema:
                update_average(ema, model, a.ema, step)
            bar.update()
            done, stopped = step + 1, stopping(step + 1)
            ending = stopped or done == a.steps
            if not (ending or done % a.log_every == 0 or done % a.eval_every == 0):
                continue                                     # nothing is read back from the device
            if world > 1:
                dist.all_reduce(bad, dist.ReduceOp.MIN)
            if bad.min() < math.inf:
                term = ("reconstruction", "KL", "gradient")[bad.argmin()]
                kept = out / "last.pt"
                log(f"the {term} is not finite at step {bad.min():.0f}; "
                    + (f"{kept} is from before it" if kept.exists() else "nothing was saved yet")
                    + "; try a lower --lr or a --clip")
                return 1
            if ending or done % a.log_every == 0:
                if world > 1:
                    dist.all_reduce(recorder.sums)
                    recorder.sums /= world
                recorder.line(done, kl_weight, lr, norm, spent + time.time() - start)
            if rank == 0 and (ending or done % a.eval_every == 0):
                pause = time.time()
                save(out / "last.pt", state(done))
                if not stopped:
                    assess(done)
                recorder.clock += time.time() - pause
            if stopped:
                log(f"stopped at step {done}; go on with: python train.py --resume --out {out}")
                return 130
    if rank == 0:
        report(judged, ds, a, spent + time.time() - start, log)
    return 0


def report(model, ds, a, seconds, log):
    """The closing lines: scores of samples; of synthetic data, beside independent tokens'."""
    log(f"trained {a.steps} steps in {clock(seconds)}; checkpoint {Path(a.out) / 'last.pt'}")
    if not ds.scored:
        log(f"samples: python sample.py --ckpt {Path(a.out) / 'last.pt'}; bounds: eval.py")
        return
    n = ds.score_num
    scores = {k.removeprefix("sampled_"): v for k, v in evaluate(model, ds, a, n).items()}
    if ds.entropy is not None:
        one = model.block_size == ds.seq_len
        title = f"one step{'' if one else ' per block'}, {n:,} samples"
        log(f"{title:26}{'accuracy':>10}{'KL (nats)':>12}")
        rows = {"this model" if model.latent_dim else "this baseline": scores}
        rows |= {"independent tokens": independent(ds)} if one else {}
        for name, r in rows.items():
            log(f"{name:{max(26, len(title))}}{r['acc']:>10.2%}{r['kl']:>12.4f}")
    elif "exact" in scores:
        n = min(n, ds.test_set.shape[1])
        log(f"of {n:,} held-out puzzles, NFE {ds.nfe}, {ds.remask}, temperature "
            f"{default_temperature(model):g}: the solution {scores['exact']:.2%}, "
            f"valid {scores['valid']:.2%}, cells right {scores['cell']:.2%}")


def prepare(device):
    """Settings of the process under which training is fastest."""
    torch.set_flush_denormal(True)                   # Adam on denormals is several times slower
    if device.startswith("cuda"):                    # TF32, on tensor cores, as BD3-LM trains
        torch.set_float32_matmul_precision("high")


def main(argv=None):
    """Parses, joins the other processes under torchrun, trains. Returns the exit status."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        local = int(os.environ.get("LOCAL_RANK", 0))
        if world > 1 and local < torch.cuda.device_count():
            torch.cuda.set_device(local)
        a, ckpt = settle(argv)
        prepare(a.device)
        if world > 1 and a.device not in ("cpu", "cuda"):
            raise ValueError(f"several processes take --device cuda or cpu, not {a.device}")
        if world > 1:
            dist.init_process_group("nccl" if a.device.startswith("cuda") else "gloo",
                                    timeout=timedelta(days=1))   # downloads and data may take long
        return train(a, ckpt, rank, world)
    except Exception as e:
        if complaint(e) is None:
            raise
        print(f"train.py: {complaint(e)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    status = main()
    if "WORLD_SIZE" in os.environ:
        # DistributedDataParallel keeps its process group and so gloo's threads, which may still
        # drop tensors: in an interpreter that is shutting down that aborts the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
