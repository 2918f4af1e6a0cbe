"""Trains VMD, or with --latent-dim 0 its baseline, on one CPU, one GPU, or several with torchrun.

    python train.py                                       # pairs, half a minute on a laptop
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
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import data
from data import TEXT, count, natural, number, positive, share
from diffusion import active_units, draw_noise, objective, sample
from model import CHECKPOINT_VERSION, CONDITIONING, PRIOR, VMD, Config, load_checkpoint, usable

FLAGS = {  # group: flag=(default, type or choices, help). The defaults are those of --preset small
    "data": dict(
        dataset=("pairs", data.DATASETS, "what to learn"),
        data_path=(None, str, "text: a UTF-8 file; array: an (N, L) integer .npy file; sudoku: "
                   "puzzles as text or CSV, or Shah et al.'s .npy"),
        alphabet=(None, ("text8",), "text: map it to text8's 27 symbols; else its own characters"),
        vocab_size=(None, count, "array: V, if larger than the largest id plus one"),
        prefix_len=(None, natural, "array: this many tokens at the start of a row are given"),
        strength=(None, share, "pairs_strength: probability of the successor; else 1"),
        length=(None, count, "sequence length L in tokens; else needle 20, text8 and text 256 "
                "(preset small: 64), lm1b 128 (64)"),
        grid=(None, tuple(data.BOXES), "sudoku: n of an n x n board"),
        layout=(None, data.LAYOUTS, "sudoku: the paper's puzzle + solution, or the board alone "
                "with its clues given"),
        clues=(None, natural, "sudoku: show this many random cells; else the clues of a puzzle "
               "that has one solution"),
        source=(None, data.SOURCES, "sudoku: generated here, or Shah et al. (2024), downloaded"),
        puzzles=(None, count, "sudoku: how many to generate; else 100,000"),
        data_dir=(None, str, "folder of generated and downloaded data; else .data")),
    "model": dict(
        preset=("small", ("small", "paper"), "small: tuned for two CPU cores; paper: Appendix C"),
        block_size=(0, natural, "tokens per block r, a divisor of L; 0: one block"),
        width=(64, count, "D"),
        heads=(4, count, "attention heads H"),
        layers=(3, count, "decoder layers"),
        encoder_layers=(1, count, "encoder layers"),
        latent_dim=(32, natural, "Z per block; 0: the baseline without latents"),
        conditioning=("adaln", CONDITIONING, "how z enters the decoder (C.1, C.2, C.3)"),
        prior=("standard", PRIOR, "of z^b: N(0, I), p(z^b | z^{<b}) (E.2), p(z^b | x_t^b, "
               "x_0^{<b}) (E.3); aggregate: of the training posteriors"),
        bank=(16384, count, "--prior aggregate: posteriors kept, shared out among the blocks")),
    "objective": dict(
        objective=("vmd", ("vmd", "nelbo"), "vmd: Eqs. 6, 8; nelbo: a likelihood bound"),
        objective_steps=(0, natural, "N: t from {1/N, ..., 1}, as the N-step sampler has it; 0: t "
                         "uniform on (t_min, 1]"),
        t_min=(0.2, share, "least t, above 0, where t is uniform"),
        kl_weight=(1.3, positive, "weight of the KL at the end of its geometric ramp"),
        kl_start=(1e-3, positive, "weight before the ramp; constant where it equals --kl-weight, "
                  "the default of --preset paper"),
        kl_ramp=([0.05, 0.4], share, "FROM TO, the ramp, as shares of the run")),
    "beyond the paper": dict(
        loops=(1, count, "times that the decoder's layers run; training has the mean of the losses "
               "after each, evaluation the last"),
        places=(True, bool, "sudoku boards, one block: embed row, column and box; --no-places: "
                "the cell itself"),
        latent_dropout=(0.0, share, "probability that a sequence, or a block, trains without z; "
                        "blocks that keep it then train all masked, for one step"),
        full_mask_share=(0.0, share, "vmd: share of rows whose z comes from the encoder of the "
                         "fully masked x_t, as in sampling")),
    "optimisation": dict(
        steps=(1000, count, "AdamW steps"),
        batch_size=(512, count, "sequences per step, over all processes"),
        grad_accum=(1, count, "micro-batches per step, to fit memory"),
        lr=(2e-3, positive, "peak learning rate"),
        warmup=(50, natural, "steps of linear warm-up"),
        decay_from=(0.5, share, "share of the run after which the rate falls to 0 along a cosine; "
                    "1: constant"),
        weight_decay=(0.0, number, "AdamW's"),
        clip=(1.0, number, "largest gradient norm, of nats per token; 0: no clipping"),
        ema=(0.998, share, "decay of averaged weights, which are what is evaluated; 0: none")),
    "run": dict(
        out=("out", str, "folder of checkpoints and log; an earlier run in it is moved aside"),
        resume=(False, bool, "go on from last.pt in --out, bit for bit, with that run's settings; "
                "a larger --steps trains longer"),
        init_from=(None, str, "checkpoint whose decoder to start from (E.5)"),
        freeze_decoder=(False, bool, "with --init-from: train only encoder and latent pathway"),
        seed=(0, natural, "of weights, data and noise"),
        device=(None, str, "torch device; else cuda where there is one, cpu elsewhere"),
        dtype=(None, ("float32", "bfloat16"), "autocast type; else bfloat16 for text on CUDA, "
               "float32 elsewhere"),
        compile=(False, bool, "torch.compile the objective"),
        log_every=(100, count, "steps between log lines"),
        eval_every=(250, count, "steps between evaluations, each after a checkpoint")),
}
# What --preset, and --prior aggregate, change of FLAGS: for all data, then for one kind.
# latent_hidden and pooling are fields of Config without a flag
PRESETS = {
    # differs from the paper: small enough for two CPU cores; KL ramp, clipping, cosine decay,
    # averaged weights. A larger t_min spends the samples where z matters; a KL weight above 1
    # closes the holes that the posteriors leave in the prior (for pairs z is not worth a weight of
    # 2). Puzzles: a small looped network, small batches and a high rate learn them several times
    # sooner; with one solution there is nothing for z to say, so its weight is high from the start.
    # Text: t in {1/2, 1} teaches z more than t near 0; few units, and a KL weight that starts high
    # enough for the decoder not to copy all of the text from z.
    "small": {
        "pairs": dict(steps=800, t_min=0.5, kl_weight=1.5),
        "pairs_nonuniform": dict(steps=800, t_min=0.5, kl_weight=1.5),
        "pairs_strength": dict(latent_dim=2, kl_weight=0.8),
        "d2": dict(steps=1500),
        "needle": dict(batch_size=128, t_min=0.7, kl_start=1e-2, kl_weight=2.0),
        "array": dict(steps=3000),
        "sudoku": dict(
            grid=9, layout="board", layers=2, loops=4, batch_size=32, steps=12_000, lr=8e-3,
            warmup=100, decay_from=0.4, kl_weight=4.0, kl_start=4.0, eval_every=500),
        "text": dict(
            length=64, block_size=4, width=128, encoder_layers=2, latent_dim=8, conditioning="add",
            objective="nelbo", objective_steps=2, batch_size=64, steps=1000, lr=3e-3, t_min=1e-3,
            kl_weight=1.0, kl_start=0.1, kl_ramp=[0.1, 0.25])},
    # Appendix C.1, C.2 and C.3. What the paper leaves open: heads of synthetic data, how t is kept
    # from 0; of text width, steps and averaged weights: as BD3-LM
    "paper": {
        "all": dict(                                     # kl_start None: as kl_weight
            layers=8, encoder_layers=2, batch_size=10_000, steps=2000, lr=1e-3, warmup=0,
            decay_from=1.0, clip=0.0, ema=0.0, t_min=1e-3, kl_weight=1.0, kl_start=None),
        "pairs": dict(kl_weight=4.0),                    # C.1: "for the uniform data experiments"
        "sudoku": dict(                                  # 300 epochs of 1.8 million puzzles
            grid=9, layout="prefix", width=256, heads=8, layers=6, encoder_layers=4,
            latent_dim=128, latent_hidden=1, conditioning="shared", pooling="gated", places=False,
            batch_size=1024, steps=527_344, decay_from=0.0),
        "text": dict(
            block_size=4, width=256, heads=8, encoder_layers=4, latent_dim=128, conditioning="add",
            batch_size=512, steps=1_000_000, lr=3e-4, warmup=2500, ema=0.9999)},
    # A KL weight under which posteriors part cleanly, and rows trained on the latents of sampling.
    # The smaller, the more of the data z copies: text has a larger one, and data with noise or too
    # many sequences to learn by heart.
    "aggregate": {
        "all": dict(kl_weight=0.02, full_mask_share=0.25),
        "pairs_strength": dict(latent_dim=8),
        "needle": dict(kl_weight=0.1),
        "array": dict(kl_weight=0.1),
        "sudoku": dict(kl_weight=0.1, kl_start=1e-3, full_mask_share=0.5),
        "text": dict(kl_weight=1.0, full_mask_share=0.0)},
}

LATENT_PARTS = ("encoder.", "conditioner.", "prior_net.", "bank")    # the baseline lacks these
FREE_ON_RESUME = {"resume", "out", "data_path", "data_dir", "device", "compile", "log_every",
                  "eval_every", "grad_accum", "steps"}
EVAL_SEQUENCES = 2000  # at most, in an evaluation during training: it takes 6% of a run


def build_parser(**options):
    """The command line, from FLAGS."""
    p = data.parser("train.py", __doc__, **options)
    for group, flags in FLAGS.items():
        g = p.add_argument_group(group)
        for name, (default, kind, text) in flags.items():
            how = dict(default=default, help=text)
            if kind is bool:
                how |= dict(action=argparse.BooleanOptionalAction)
            elif isinstance(kind, tuple):
                how |= dict(choices=kind, type=type(kind[0]))
            else:
                how |= dict(type=kind, nargs=len(default) if isinstance(default, list) else None)
            g.add_argument("--" + name.replace("_", "-"), **how)
    return p


def parse(argv=None):
    """argv -> settings, and the checkpoint to resume or None. Raises ValueError.

    --dataset, --preset and --prior, or the run to resume, say what the defaults are: they are read
    first.
    """
    first, _ = build_parser(add_help=False).parse_known_args(argv)
    parser, ckpt = build_parser(), None
    if first.resume:
        ckpt = load_checkpoint(Path(first.out) / "last.pt")[1]
        if "rng" not in ckpt:
            raise ValueError(f"{first.out}/last.pt is not of train.py: it cannot be resumed")
        parser.set_defaults(**ckpt["args"] | {"out": first.out})     # it may have been moved
    else:
        kind = "text" if first.dataset in TEXT else first.dataset
        for name in (first.preset, first.prior):
            changes = PRESETS.get(name, {})
            parser.set_defaults(**changes.get("all", {}) | changes.get(kind, {}))
    a = parser.parse_args(argv)
    complete(a, ckpt)
    return a, ckpt


def complete(a, ckpt):
    """Fills in the defaults that depend on others. Raises ValueError on what does not go together.
    """
    if a.kl_start is None:
        a.kl_start = a.kl_weight
    if a.data_path:
        a.data_path = os.path.abspath(a.data_path)       # eval.py may run elsewhere
    a.device = usable(a.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_cuda = a.device.startswith("cuda")
    a.dtype = a.dtype or ("bfloat16" if on_cuda and a.dataset in TEXT else "float32")
    if not a.kl_ramp[0] < a.kl_ramp[1]:
        raise ValueError(f"--kl-ramp needs FROM < TO, not {a.kl_ramp}")
    if a.t_min == 0 or a.ema == 1:
        raise ValueError("--t-min must be above 0, --ema below 1")
    if a.prior != "standard" and not a.latent_dim:
        raise ValueError(f"--prior {a.prior} needs a --latent-dim above 0")
    if a.freeze_decoder and not (a.init_from and a.latent_dim):
        raise ValueError("--freeze-decoder needs --init-from, and a --latent-dim above 0 to train")
    for k, was in ckpt["args"].items() if ckpt else ():
        if k not in FREE_ON_RESUME and getattr(a, k) != was:
            raise ValueError(f"--{k.replace('_', '-')} {getattr(a, k)} contradicts the run to "
                             f"resume, which has {was}")
    if ckpt and a.steps < ckpt["step"]:
        raise ValueError(f"--steps {a.steps}: the run to resume has done {ckpt['step']} already")
    if ckpt and torch.device(a.device).type != torch.device(ckpt["args"]["device"]).type:
        raise ValueError(f"the run to resume used {ckpt['args']['device']}: its random streams "
                         f"cannot go on on {a.device}")


def kl_weight_at(step, a):
    """KL weight: --kl-start, then a geometric ramp to --kl-weight, then constant."""
    u = (step / a.steps - a.kl_ramp[0]) / (a.kl_ramp[1] - a.kl_ramp[0])
    u = min(1.0, max(0.0, u))
    return a.kl_start ** (1 - u) * a.kl_weight**u


def lr_at(step, a):
    """Learning rate: linear warm-up, then constant, and after --decay-from a cosine to 0."""
    if step < a.warmup:
        return a.lr * (step + 1) / a.warmup
    begin = max(a.warmup, a.decay_from * a.steps)
    if step < begin:
        return a.lr
    return a.lr * 0.5 * (1 + math.cos(math.pi * (step - begin) / max(1, a.steps - begin)))


def optimise(run, loss_fn, x0, given, noise, kl_weight, lr, rank, world):
    """One step on this process's share of a batch that every process has drawn, in micro-batches.

    Returns its means of loss, recon and kl in nats per sequence, and the gradient's norm: (4,).
    """
    a, n, terms = run.a, run.a.grad_accum, 0
    weight = torch.full((), kl_weight, device=a.device)  # a number would be compiled in
    run.opt.zero_grad(set_to_none=True)
    for i in range(rank * n, rank * n + n):
        rows = slice(i, None, world * n)
        with torch.autocast(torch.device(a.device).type, torch.bfloat16,
                            enabled=a.dtype == "bfloat16"):
            values = loss_fn(run.model, x0[rows].to(a.device), noise[rows], a.objective, weight,
                             given=given[rows].to(a.device), dropout=a.latent_dropout,
                             full_mask_share=a.full_mask_share)
        values = [v.mean() / n for v in values]
        (values[0] / x0.shape[1]).backward()             # nats per token
        terms = terms + torch.stack(values).detach()
    group = run.opt.param_groups[0]                      # the only one
    if world > 1:                                        # that of the whole batch, in one message
        grads = [p.grad for p in group["params"]]
        mean = averaged(nn.utils.parameters_to_vector(grads), world)
        nn.utils.vector_to_parameters(mean, grads)
    norm = nn.utils.clip_grad_norm_(group["params"], a.clip or math.inf)
    group["lr"] = lr
    run.opt.step()
    return torch.cat([terms, norm.detach()[None]])


@torch.no_grad()
def update_average(ema, model, decay, step):
    """Exponential moving average of the weights: ema <- d ema + (1 - d) model.

    d = min(decay, (1 + step) / (10 + step)), so that short runs forget their start.
    """
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()),
                         1 - min(decay, (1 + step) / (10 + step)))


@torch.no_grad()
def validate(run):
    """Validation loss at the final KL weight, its terms, nats per sequence; active latent units.

    Of the objective without --full-mask-share, and with an aggregate prior where there is one.
    With seeds of its own, as `score`: training's random streams are not touched.
    """
    a, ds, model = run.a, run.ds, run.ema.eval()
    g, gd = torch.Generator().manual_seed(1), torch.Generator(a.device).manual_seed(2)
    x0, given = ds.batch(min(EVAL_SEQUENCES, max(64, 2**16 // ds.seq_len)), g, "valid")
    x0, given = x0.to(a.device), given.to(a.device)
    noise = draw_noise(*x0.shape, model.block_size, model.latent_dim, a.objective_steps, a.t_min,
                       gd, a.device)
    terms = []
    for at in torch.arange(len(x0), device=a.device).split(max(1, a.batch_size // a.grad_accum)):
        terms.append(objective(model, x0[at], noise[at], a.objective, a.kl_weight,
                               given=given[at], dropout=a.latent_dropout))
    loss, recon, kl = (torch.cat(v).mean().item() for v in zip(*terms))
    active = active_units(model, x0, given=given).tolist()
    return dict(loss=loss, recon=recon, kl=kl, active=active)


def score(run, num):
    """Scores of `num` samples, or of as many as there are validation sequences."""
    a, ds, model = run.a, run.ds, run.ema.eval()
    how, g = data.SCORING[ds.name], torch.Generator().manual_seed(3)
    x0, given = ds.batch(num, g, "valid")
    start = torch.where(given, x0, ds.vocab_size)
    x = sample(model, start.to(a.device), how["nfe"], how["remask"], generator=g,
               batch_size=max(a.batch_size, 2**16 // ds.seq_len)).cpu()
    return ds.metrics(x, x0, given)


@dataclass
class Run:
    """All that a checkpoint holds."""

    a: argparse.Namespace  # settings
    ds: object  # dataset
    model: VMD
    ema: VMD  # averaged weights, which are evaluated; with --ema 0 the model itself
    opt: torch.optim.Optimizer
    streams: dict  # random generators of data and noise
    step: int = 0  # steps done
    best: float = math.inf  # lowest validation loss
    seconds: float = 0.0  # spent so far

    def save(self, name):
        """Writes a checkpoint, whole or not at all. Raises OSError."""
        state = dict(
            version=CHECKPOINT_VERSION, args=vars(self.a), config=asdict(self.model.config),
            vocab=self.ds.vocab, model=self.model.state_dict(),
            ema=self.ema.state_dict() if self.a.ema else None, optimizer=self.opt.state_dict(),
            rng={k: g.get_state() for k, g in self.streams.items()}, step=self.step,
            best=self.best, seconds=self.seconds)
        with data.whole(Path(self.a.out) / name) as f:
            torch.save(state, f)

    def load(self, ckpt):
        """Goes on where the checkpoint was written."""
        self.model.load_state_dict(ckpt["model"])
        self.opt.load_state_dict(ckpt["optimizer"])
        if self.a.ema:
            self.ema.load_state_dict(ckpt["ema"])
        for k, g in self.streams.items():
            g.set_state(ckpt["rng"][k])
        self.step, self.best, self.seconds = ckpt["step"], ckpt["best"], ckpt["seconds"]


def setup(a, ckpt, world):
    """Dataset, model, optimizer and random streams, new or as the checkpoint left them -> Run."""
    if a.batch_size % (world * a.grad_accum):
        raise ValueError(f"--batch-size {a.batch_size} is not a multiple of processes x "
                         f"--grad-accum = {world * a.grad_accum}")
    local = int(os.environ.get("LOCAL_RANK", 0))
    torch.manual_seed(a.seed)
    if local:                                            # the first process of a machine downloads
        dist.barrier()
    options = {k: getattr(a, k) for k in FLAGS["data"] if k != "dataset"}
    ds = data.load(a.dataset, ckpt and ckpt["vocab"], **options)
    ds.about                                             # reads, or generates, Sudoku's data
    if world > 1 and not local:
        dist.barrier()
    r = a.block_size or ds.seq_len
    known = vars(a) | dict(vocab_size=ds.vocab_size, seq_len=ds.seq_len, block_size=r,
                           prefix_len=ds.prefix_len,
                           places=ds.places if a.places and r == ds.seq_len else None)
    config = Config(**{f.name: known[f.name] for f in fields(Config) if f.name in known})
    if ckpt and asdict(config) != ckpt["config"]:
        raise ValueError(f"data or network differ from what was trained on: {ckpt['config']}")
    model = VMD(config).to(a.device)
    if a.init_from and not ckpt:
        take_decoder(model, a.init_from, ds.vocab)
    for k, p in model.named_parameters():
        p.requires_grad_(not a.freeze_decoder or k.startswith(LATENT_PARTS))
    trained = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(trained, lr=a.lr, weight_decay=a.weight_decay, fused=True)
    streams = {"data": torch.Generator().manual_seed(2 * a.seed),
               "noise": torch.Generator(a.device).manual_seed(2 * a.seed + 1)}
    run = Run(a, ds, model, copy.deepcopy(model) if a.ema else model, opt, streams)
    if ckpt:
        run.load(ckpt)
    return run


def take_decoder(model, path, vocab):
    """Copies the decoder of another checkpoint (E.5). Raises ValueError if it has another shape."""
    source, other = load_checkpoint(path)
    for k in ("vocab_size", "block_size", "width", "heads", "layers", "loops", "places"):
        if getattr(source.config, k) != getattr(model.config, k):
            raise ValueError(f"the decoder of {path} has {k} {getattr(source.config, k)}, not "
                             f"{getattr(model.config, k)}")
    if other.get("vocab") != vocab:
        raise ValueError(f"{path} has another vocabulary")
    weights = source.state_dict()
    model.load_state_dict({k: v for k, v in weights.items() if not k.startswith(LATENT_PARTS)},
                          strict=False)


@torch.no_grad()
def fill_bank(model, ds, a):
    """Puts posteriors of training sequences, all masked, into the bank of --prior aggregate.

    Of the S of each block the last hundredth, at least one, stays N(0, I): a z far from all others
    costs finitely many nats.
    """
    S = model.bank.shape[2]
    n, g, found = S - math.ceil(S / 100), torch.Generator().manual_seed(3), []
    for first in range(0, n, 512):
        x0, given = (v.to(a.device) for v in ds.batch(min(512, n - first), g))
        xt = torch.where(given, x0, model.vocab_size)
        found.append(torch.stack(model.encode(xt, x0)).transpose(1, 2))  # (2, K, 512, Z)
    model.bank[:, :, :n] = torch.cat(found, dim=2)


def move_aside(out):
    """Moves an earlier run's files in `out` to out/1, out/2, ...: a new run loses nothing."""
    old = [name for name in ("last.pt", "best.pt", "log.jsonl") if (out / name).exists()]
    if not old:
        return
    earlier = [int(p.name) for p in out.iterdir() if p.name.isdecimal()]
    to = out / str(max(earlier, default=0) + 1)
    to.mkdir()
    for name in old:
        (out / name).rename(to / name)
    print(f"moved the earlier run in {out} to {to}")


@contextlib.contextmanager
def stop_signals():
    """Ctrl-C and SIGTERM end up in the list that this yields, to be looked at between steps."""
    stop = []

    def note(which, frame):
        stop.append(which)
        signal.signal(which, old[which])                 # a second one acts at once
    old = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


def averaged(x, world):
    """x, averaged over all processes."""
    x = x.clone()
    if world > 1:
        dist.all_reduce(x)
    return x / world


def announce(run):
    """Prints what will be trained, and with what."""
    a, ds, r = run.a, run.ds, run.model.block_size
    print(f"dataset {ds.name}: L {ds.seq_len}, V {ds.vocab_size}, "
          f"{ds.seq_len // r} block(s) of {r}, {ds.about}")
    print("parameters: " + ", ".join(f"{k} {v:,}" for k, v in run.model.param_counts().items()))
    shown = [k for group in FLAGS if group not in ("data", "run") for k in FLAGS[group]]
    print("settings: " + " ".join(f"{k}={getattr(a, k)}" for k in shown))
    if a.latent_dim and a.preset == "paper" and a.kl_start == a.kl_weight >= 1:
        print("the KL weight is constant, with which z is likely to stay unused (posterior "
              "collapse); --kl-start 1e-3 ramps it up")


def assess(run, log):
    """Evaluates and keeps the best checkpoint -> whether the latent, if there is one, is idle."""
    result = validate(run)
    if run.ds.scored:
        num = min(EVAL_SEQUENCES, data.SCORING[run.ds.name]["num"] // 5)
        result |= {f"sampled_{k}": v for k, v in score(run, num).items()}
    run.model.train()                                    # with --ema 0 it was run.ema
    shown = [f"{k} {v:.4f}" for k, v in result.items() if isinstance(v, float)]
    units = result["active"]
    if run.a.latent_dim:
        shown.append(f"active {units if len(units) < 9 else f'{min(units)} to {max(units)}'}")
    log("  valid " + "  ".join(shown), step=run.step, eval=result)
    if result["loss"] < run.best:
        run.best = result["loss"]
        run.save("best.pt")
    return run.a.latent_dim > 0 and sum(units) == 0


def explain_idle_latent(a):
    """What it means that no latent unit is active, and what to do about it."""
    if a.dataset == "sudoku" and a.clues is None:
        return ("  z is not used, and need not be: a puzzle with one solution leaves nothing for it"
                " to say")
    advice = "add --kl-start 1e-3" if a.kl_start == a.kl_weight else (
        "lower --kl-start or --kl-weight, or let the ramp end later (--kl-ramp)")
    if a.dataset == "sudoku" and a.preset == "small":
        advice = "see the flags of the README's boards without clues"
    return (f"  the latent has collapsed: no unit is active, z says nothing. Where given tokens "
            f"decide all others that is right; else {advice}")


def progress_line(v, steps, tokens):
    """A record of log.jsonl as a line for the terminal. steps: of the run; tokens: of a step."""
    eta = timedelta(seconds=(steps - v["step"]) * tokens // v["tokens_per_second"])
    return (f"step {v['step']}/{steps}  loss {v['loss']:.4f}  recon {v['recon']:.4f}  "
            f"kl {v['kl']:.3f} x {v['kl_weight']:.2g}  lr {v['lr']:.1e}  "
            f"grad {v['grad_norm']:.2f}  {v['tokens_per_second']:,.0f} tok/s  ETA {eta}")


def train(a, ckpt, rank, world):
    """Trains, logs, saves, evaluates. Returns an exit status."""
    run = setup(a, ckpt, world)
    ds, model, out = run.ds, run.model, Path(a.out)
    if world > 1:
        dist.barrier()                                   # all have read --init-from: files may move
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        if not ckpt:
            move_aside(out)
        announce(run)

    def log(line, **values):
        """A line for the terminal; values, if there are any, for log.jsonl."""
        if rank == 0 and values:
            with open(out / "log.jsonl", "a") as f:
                f.write(json.dumps(values) + "\n")
        if rank == 0:
            print(line, flush=True)

    loss_fn = torch.compile(objective) if a.compile else objective
    begin, idle = run.step, False
    start = time.time() - run.seconds
    with stop_signals() as stop:
        if rank == 0 and ckpt and (begin % ckpt["args"]["eval_every"] == 0
                                   or begin in (a.steps, ckpt["args"]["steps"])):
            assess(run, log)                             # a kill may have cut it off
        since, logged = time.time(), begin               # of the last line: when, and its step
        sums = torch.zeros(4, device=a.device)           # since then
        for step in range(begin, a.steps):
            kl_weight, lr = kl_weight_at(step, a), lr_at(step, a)
            x0, given = ds.batch(a.batch_size, run.streams["data"])  # every process draws all rows
            noise = draw_noise(*x0.shape, model.block_size, model.latent_dim,
                               a.objective_steps, a.t_min, run.streams["noise"], a.device)
            sums += optimise(run, loss_fn, x0, given, noise, kl_weight, lr, rank, world)
            if a.ema:
                update_average(run.ema, model, a.ema, step)

            done = run.step = step + 1
            stopped = bool(stop)
            if world > 1:                                # all stop after the same step
                asked = torch.tensor(len(stop), device=a.device)
                stopped = done % 10 == 0 and averaged(asked, world) > 0
            ending = stopped or done == a.steps
            saves = ending or done % a.eval_every == 0
            logs = ending or done % a.log_every == 0 or step == begin
            if not saves and not logs:
                continue                                 # nothing is read back from the device
            loss, recon, kl, norm = (averaged(sums, world) / (done - logged)).tolist()
            if not math.isfinite(loss + recon + kl + norm):
                log(f"the loss or its gradient is not finite in steps {logged + 1} to {done}; what "
                    f"{out} holds is from before; try a lower --lr or a --clip")
                return 1
            now = time.time()
            run.seconds = now - start
            if rank == 0 and saves:                      # before anything is printed
                if a.prior == "aggregate":
                    fill_bank(run.ema, ds, a)
                run.save("last.pt")
            if logs:
                rate = (done - logged) * a.batch_size * ds.seq_len / (now - since)
                values = dict(step=done, loss=loss, recon=recon, kl=kl, kl_weight=kl_weight, lr=lr,
                              grad_norm=norm, tokens_per_second=rate, seconds=run.seconds)
                log(progress_line(values, a.steps, a.batch_size * ds.seq_len), **values)
                sums, logged, since = torch.zeros(4, device=a.device), done, now
            if rank == 0 and saves and not stopped:
                if assess(run, log) and not idle:
                    idle = True
                    log(explain_idle_latent(a))
            since += time.time() - now                   # none of this counts as training
            if stopped:
                log(f"stopped at step {done}; --resume --out {out} goes on")
                return 130
    if rank == 0:
        report(run)
    return 0


def independent(ds):
    """Metrics of the product of the true marginals, the best that one step without z can do."""
    x, _ = ds.batch(20_000, torch.Generator().manual_seed(2), "test")
    g = torch.Generator().manual_seed(3)
    shuffled = [column[torch.randperm(len(x), generator=g)] for column in x.unbind(1)]
    return ds.metrics(torch.stack(shuffled, dim=1))


def report(run):
    """The closing lines: scores of samples; of synthetic data, beside independent tokens'."""
    a, ds, last = run.a, run.ds, Path(run.a.out) / "last.pt"
    print(f"trained {a.steps} steps in {timedelta(seconds=run.seconds // 1)}; checkpoint {last}")
    if not ds.scored:
        print(f"samples: python sample.py --ckpt {last}; bounds: eval.py")
        return
    how = data.SCORING[ds.name]
    rows = {"this model" if a.latent_dim else "this baseline": score(run, how["num"])}
    if ds.entropy is not None and run.model.block_size == ds.seq_len:
        rows["independent tokens"] = independent(ds)
    print(f"samples ({how['num']:,} at most), NFE {how['nfe']} per block, {how['remask']}")
    for name, metrics in rows.items():
        shown = [f"{k} {v:.4f}" for k, v in metrics.items() if not k.endswith("_se")]
        print(f"{name:<20}" + "  ".join(shown))


def script(argv):
    """Parses, joins the other processes under torchrun, trains -> exit status."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if world > 1 and local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    a, ckpt = parse(argv)
    torch.set_flush_denormal(True)                       # Adam on denormals is several times slower
    if a.device.startswith("cuda"):                      # TF32, on tensor cores, as BD3-LM trains
        torch.set_float32_matmul_precision("high")
    if world == 1:
        return train(a, ckpt, rank, world)
    if a.device not in ("cpu", "cuda"):
        raise ValueError(f"several processes take --device cuda or cpu, not {a.device}")
    dist.init_process_group("nccl" if a.device == "cuda" else "gloo", timeout=timedelta(days=1))
    try:
        return train(a, ckpt, rank, world)
    finally:
        dist.destroy_process_group()


main = partial(data.run_script, "train.py", script)         # argv -> exit status


if __name__ == "__main__":
    status = main()
    # threads of gloo outlive its group, and now and then abort an interpreter that shuts down
    if "WORLD_SIZE" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
