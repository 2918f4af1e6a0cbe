"""Scores a checkpoint: samples against the truth, and likelihood bounds.

    python eval.py                                                      # the last run
    python eval.py --nfe 1 2 4 --remask prob margin --json result.json
    python eval.py --benchmark vocab_size=27 seq_len=256 block_size=4   # speed of a Config

Shares are printed in percent and written as fractions; losses are nats. --nfe counts evaluations
per block: with two blocks, the paper's "B=2, NFE=4" is --nfe 2. Sudoku: exact, answers that are the
puzzle's solution; valid, rules and clues kept; cell, of the cells to fill; each with its standard
error.
"""

import itertools
import json
import math
import re
import sys
import time
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import data
from data import count, natural, number, output
from diffusion import (LATENT, REMASK, active_units, default_temperature, draw_noise, iwae,
                       objective, sample)
from model import VMD, Config, load_checkpoint, one_line, usable

PERCENT = ("acc", "cond_acc", "exact", "valid", "cell", "distinct4")
SETTINGS = ("nfe", "remask", "temperature", "latent", "num")  # of a row; the others are metrics
T_MIN = 1e-5  # of the bounds


def build_parser():
    """The command line."""
    p = data.parser("eval.py", __doc__)
    p.add_argument("--ckpt", default="out/last.pt", help="checkpoint of train.py")
    p.add_argument("--data-path", metavar="FILE",
                   help="array, text: the file, if it has moved since training; Sudoku: score on "
                   "all puzzles of this file instead of those held out")
    p.add_argument("--clues", type=natural,
                   help="Sudoku: show this many random cells of test boards; else as trained, or "
                   "the clues of --data-path")
    p.add_argument("--loops", type=count,
                   help="times that the decoder's layers run; else as in training")
    g = p.add_argument_group("samples: one row for each combination")
    g.add_argument("--nfe", type=count, nargs="+",
                   help="network evaluations per block, N; else 1, text 4, Sudoku 5 10 20")
    g.add_argument("--remask", nargs="+", choices=REMASK,
                   help="which tokens are unmasked first; else prob, text random, Sudoku margin")
    g.add_argument("--latent", nargs="+", choices=LATENT, default=["fixed"],
                   help="fixed, resampled (E.1), from the encoder (E.4), or none (alone: bounds, "
                   "too, are without z)")
    g.add_argument("--latent-draws", type=count, default=1, metavar="R",
                   help="draws of z for a block with given tokens, of which they choose one")
    g.add_argument("--temperature", type=number, nargs="+",
                   help="of the tokens, 0: argmax; else 0 with a latent, 1 without and for text; "
                   "Sudoku without a latent 1 0")
    g.add_argument("--num", type=count,
                   help="samples per row; else 20,000, array and Sudoku 1,000 (or all of "
                   "--data-path), text 256")
    g.add_argument("--judge", metavar="CKPT",
                   help="text: generative perplexity of the samples by this autoregressive "
                   "checkpoint (--block-size 1 --latent-dim 0) of the same vocabulary")
    g.add_argument("--gen-ppl", metavar="NAME",
                   help="text: the same by a causal language model such as gpt2-large (needs "
                   "transformers)")
    g = p.add_argument_group("bounds")
    g.add_argument("--bound-steps", type=natural, nargs="*", default=[1, 2, 4, 0],
                   help="N of NELBO_N; 0: infinity; empty: no bounds")
    g.add_argument("--bound-num", type=count,
                   help="test sequences per bound, at least 2, one Monte-Carlo draw each; else "
                   "20,000, Sudoku and text 2,000")
    g.add_argument("--iwae", type=natural, default=0, metavar="S",
                   help="also the bound with S importance samples; 0: no")
    g = p.add_argument_group("run")
    g.add_argument("--batch-size", type=count,
                   help="sequences per network evaluation; else 2,000, fewer if they are long")
    g.add_argument("--seed", type=natural, default=0, help="seed of samples and test draws")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="torch device")
    g.add_argument("--json", type=output, metavar="FILE", help="write all results to this file")
    g.add_argument("--benchmark", nargs="+", metavar="FIELD=VALUE",
                   help="instead of all else: how fast a network of these fields of model.Config "
                   "trains and samples, with and without z, in batches of --batch-size (else 16)")
    return p


def load_data(a, model, ckpt):
    """The dataset that the checkpoint was trained on, or that the flags name instead."""
    if "data_path" not in ckpt.get("args", {}):
        raise ValueError(f"{a.ckpt} does not say what it was trained on: it can be sampled only")
    sudoku, trained_on = ckpt["args"]["dataset"] == "sudoku", ckpt["args"]["data_path"]
    ds = data.reload(ckpt, model, clues=a.clues, data_path=None if sudoku else a.data_path)
    if sudoku and a.data_path:
        if trained_on and Path(a.data_path).resolve() == Path(trained_on).resolve():
            raise ValueError(f"most puzzles of {a.data_path} were trained on; without --data-path "
                             "those held out are scored")
        ds.test_set = torch.from_numpy(data.read_puzzles(a.data_path, ds.grid))
        ds.clues = a.clues                               # None: its puzzles keep those they have
    return ds


def fill_defaults(a, model, ds):
    """Sets the flags that were not given to what suits the data and the model."""
    how = data.SCORING[ds.name]
    defaults = how | {k: [how[k]] for k in ("nfe", "remask", "temperature")}
    if ds.name == "sudoku":
        defaults["nfe"] = [5, 10, 20]
        if not model.latent_dim:                         # argmax may suit a baseline here
            defaults["temperature"] = [1.0, 0.0]
        if a.data_path:                                  # all of the file
            defaults["num"] = ds.test_set.shape[1]
    # some GB of activations and logits
    defaults["batch_size"] = max(1, min(2000, 2**17 // ds.seq_len,
                                        2**26 // ds.seq_len // ds.vocab_size))
    for k, v in defaults.items():
        if getattr(a, k) is None:
            setattr(a, k, v)


def load_judge(a, ckpt):
    """The function from samples x (n, L) to perplexities (n,) that the flags ask for, or None."""
    if not (a.judge or a.gen_ppl):
        return None
    if ckpt["vocab"] is None or a.judge and a.gen_ppl:
        raise ValueError("--judge and --gen-ppl are for text, and one of the two can be given")
    if a.judge:
        judge, other = load_checkpoint(a.judge, a.device)
        if (judge.block_size != 1 or judge.latent_dim or other.get("vocab") != ckpt["vocab"]
                or judge.config.seq_len < ckpt["config"]["seq_len"]):
            raise ValueError(f"{a.judge} is no autoregressive model (--block-size 1 --latent-dim "
                             "0) of the same vocabulary and at least the same length")
        return lambda x: torch.cat([own_perplexity(judge, part.to(a.device)).cpu()
                                    for part in x.split(a.batch_size)])
    try:
        import transformers
        tokenizer = transformers.AutoTokenizer.from_pretrained(a.gen_ppl)
        lm = transformers.AutoModelForCausalLM.from_pretrained(a.gen_ppl).to(a.device).eval()
    except (ImportError, OSError, ValueError) as e:
        raise ValueError(f"cannot load {a.gen_ppl}: {one_line(e)} (--gen-ppl needs transformers: "
                         "pip install transformers)") from None

    def judged(x):
        texts = data.texts(x, len(ckpt["vocab"]), ckpt["vocab"])
        plain = [re.sub(r" ?\[(CLS|SEP)\] ?", " ", text).strip() for text in texts]
        return torch.tensor([hf_perplexity(lm, tokenizer, text) for text in plain])
    return judged


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
    x0, given = ds.batch(a.num, torch.Generator().manual_seed(a.seed), "test")
    start = torch.where(given, x0, ds.vocab_size)
    if not ds.scored:                                    # nothing to answer: as many as asked for
        start = torch.full((a.num, ds.seq_len), ds.vocab_size)
    latents = a.latent if model.latent_dim else ["none"]
    choices = itertools.product(latents, a.temperature, a.remask, a.nfe)
    for latent, temperature, remask, nfe in choices:
        if temperature is None:
            temperature = default_temperature(model, latent)

        def draw(start):
            return sample(model, start.to(a.device), nfe, remask, temperature, latent, a.batch_size,
                          generator=torch.Generator().manual_seed(a.seed + 1),
                          latent_draws=a.latent_draws).cpu()

        x = draw(start)
        first = x if first is None else first
        row = dict(nfe=nfe, remask=remask, temperature=temperature, latent=latent, num=len(x),
                   **ds.metrics(x, x0, given))
        if judge:
            ppl = judge(x)
            row |= dict(gen_ppl=ppl.mean().item(), gen_ppl_sd=ppl.std(correction=0).item())
        if ds.name == "needle":                          # the first token is given
            begun = torch.where(torch.arange(ds.seq_len) == 0, x0, ds.vocab_size)
            row["cond_acc"] = ds.metrics(draw(begun))["acc"]
        rows.append(row)
    return rows, first


@torch.no_grad()
def bound_rows(model, ds, a):
    """printed, NELBO_N and IWAE on test data, each {bound, steps, nats, se}; nats per sequence.

    Where no token is given also nats_per_token.
    """
    x0, given = ds.batch(a.bound_num, torch.Generator().manual_seed(a.seed), "test")
    g = torch.Generator(a.device).manual_seed(a.seed + 2)    # not the stream that chose the data
    if len(x0) < 2:
        raise ValueError("a standard error needs two test sequences; leave the bounds out with "
                         "--bound-steps and no number")
    bounds = [("printed", "vmd", 0)] + [("nelbo", "nelbo", n) for n in a.bound_steps]
    if a.iwae:
        bounds += [(f"iwae_{a.iwae}", "iwae", n) for n in a.bound_steps if n]
    rows = []
    for name, kind, steps in bounds:
        values = []
        for part in zip(x0.split(a.batch_size), given.split(a.batch_size)):
            x, known = (v.to(a.device) for v in part)
            if kind == "iwae":
                values.append(iwae(model, x, steps, a.iwae, known, g))
            else:
                noise = draw_noise(*x.shape, model.block_size, model.latent_dim, steps, T_MIN, g,
                                   a.device)
                values.append(objective(model, x, noise, kind, given=known)[0])
        v = torch.cat(values).cpu().double()
        row = dict(bound=name, steps=steps or None, nats=v.mean().item(),
                   se=v.std().item() / math.sqrt(len(v)))
        if not given.any():                              # else some tokens cost nothing
            row["nats_per_token"] = row["nats"] / x0.shape[1]
        rows.append(row)
    return rows


def benchmark(a):
    """Tokens/s of training and sampling, with and without z, beside a matmul -> result dict.

    Random tokens; the median of five runs taken in turn, the least, the most.
    """
    types, values = {f.name: f.type for f in fields(Config) if f.type in (int, str)}, {}
    for pair in a.benchmark:
        name, _, value = pair.partition("=")
        if name not in types or types[name] is int and not value.isdecimal():
            raise ValueError(f"--benchmark: {pair} is not FIELD=VALUE with one of {list(types)}")
        values[name] = types[name](value)
    missing = {"vocab_size", "seq_len", "block_size"} - values.keys()
    if missing:
        raise ValueError(f"--benchmark needs {', '.join(sorted(missing))}")
    config, B, nfe = Config(**values), a.batch_size or 16, (a.nfe or [1])[0]
    x0 = torch.randint(config.vocab_size, (B, config.seq_len), device=a.device)
    square = torch.randn(2048, 2048, device=a.device)

    def train_step(model, opt):
        opt.zero_grad()
        (objective(model.train(), x0)[0].mean() / config.seq_len).backward()
        opt.step()

    def draw(model):
        sample(model.eval(), torch.full_like(x0, config.vocab_size), nfe, temperature=1.0)

    runs = {"matmul": lambda: square @ square}
    for name, Z in {"VMD": config.latent_dim, "control": 0}.items():
        model = VMD(replace(config, latent_dim=Z)).to(a.device)
        opt = torch.optim.AdamW(model.parameters(), fused=True)
        runs[f"training, {name}"] = partial(train_step, model, opt)
        runs[f"sampling, {name}"] = partial(draw, model)
    print(f"batch {B}, {nfe} step(s) per block, {torch.get_num_threads()} threads, {a.device}")
    seconds, rows = {name: [] for name in runs}, []
    for name in [*runs] * 5:                             # in turn: noise hits all alike
        timer = Timer("run()", globals=dict(run=runs[name]), num_threads=torch.get_num_threads())
        seconds[name].append(timer.timeit(1).median)     # after two calls that warm up
    for name, times in seconds.items():
        rates = sorted(x0.numel() / s for s in times)
        least, median, most = rates[0], rates[2], rates[4]
        gflops = flop_of(runs[name]) * median / x0.numel() / 1e9
        share = gflops / (rows[0]["gflops"] if rows else gflops)         # the matmul comes first
        rows.append(dict(what=name, gflops=gflops, of_matmul=share,
                         tokens_per_second=[least, median, most]))
        tokens = f"{median:>12,.0f} tokens/s ({least:,.0f} to {most:,.0f})"
        print(f"{name:<20}{gflops:>8.1f} GFLOP/s {share:>5.0%}"
              + (tokens if name != "matmul" else ""))
    return dict(config=values, batch_size=B, nfe=nfe, rows=rows, device=a.device,
                threads=torch.get_num_threads())


def flop_of(run):
    """Floating-point operations of the matrix products in run(), attention included."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def heat_map(truth, generated, encoding="utf-8"):
    """Two (V, V) joint distributions as text, shaded up to the largest true one (Figures 3-5).

    Where the encoding of the terminal lacks the block characters there are plainer ones.
    """
    shades = " ░▒▓█"
    if b"?" in shades.encode(encoding, "replace"):
        shades = " .:+#"

    def cell(p):
        return shades[min(len(shades) - 1, math.ceil(4 * float(p / truth.max()) - 0.2))] * 2
    V = len(truth)
    lines = [f"{'true':^{2 * V}}      {'generated':^{2 * V}}      row: first token, column: second"]
    for i, (t, g) in enumerate(zip(truth, generated)):
        lines.append("".join(map(cell, t)) + f"   {i}  " + "".join(map(cell, g)))
    return "\n".join(lines)


def print_results(result, ds):
    """The tables."""
    columns = [k for k in result["rows"][0] if k not in SETTINGS]
    heads = [k[-2:] if k.endswith(("_se", "_sd")) else k for k in columns]
    print(f"{'nfe':>4} {'remask':>7} {'temp':>5} {'latent':>9}"
          + "".join(f" {head:>9}" for head in heads))
    for r in result["rows"]:
        line = f"{r['nfe']:>4} {r['remask']:>7} {r['temperature']:>5g} {r['latent']:>9}"
        for c in columns:
            percent = c.removesuffix("_se") in PERCENT
            line += f" {r[c]:>9.2%}" if percent else f" {r[c]:>9.4f}"
        print(line)
    if result["bounds"]:
        print(f"\n{'nats per sequence':<40}{'value':>10} {'s.e.':>7}"
              + (f"   entropy of the data {ds.entropy:.4f}" if ds.entropy else "")
              + (f"{'bits/token':>12}{'perplexity':>12}" if ds.vocab else ""))
    for b in result["bounds"]:
        is_bound = b["bound"] != "printed" or not result["latent_dim"]
        name = f"{b['bound'].upper()}, N = {b['steps'] or 'infinity'}"
        if b["bound"] == "printed":
            name = "printed (paper's objective" + (")" if is_bound else ", not a bound)")
        line = f"{name:<40}{b['nats']:>10.4f} {b['se']:>7.4f}"
        if ds.vocab:
            line += f"{b['nats_per_token'] / math.log(2):>12.4f}"
            line += f"{math.exp(b['nats_per_token']):>12.5g}" if is_bound else ""
        print(line)
    if result["latent_dim"]:
        print(f"\nactive latent units per block: {result['active_units']} of "
              f"{result['latent_dim']}")


def script(argv):
    """Evaluates, writes, prints. Raises ValueError, FileNotFoundError."""
    a = build_parser().parse_args(argv)
    usable(a.device)
    if a.benchmark:
        return write_json(a.json, benchmark(a))
    if a.iwae and not any(a.bound_steps):
        raise ValueError("--iwae needs a finite --bound-steps, N above 0")
    model, ckpt = load_checkpoint(a.ckpt, a.device, a.loops)
    if a.latent == ["none"]:
        model.latent_dim = 0                             # so bounds and defaults are without z, too
    start, ds = time.time(), load_data(a, model, ckpt)
    fill_defaults(a, model, ds)
    two_tokens = ds.seq_len == 2 and ds.entropy is not None
    judge = load_judge(a, ckpt)
    bounds = bound_rows(model, ds, a) if a.bound_steps else []
    rows, x = sample_rows(model, ds, a, judge)
    x0, given = ds.batch(min(a.bound_num, 5000), torch.Generator().manual_seed(a.seed), "test")
    active = active_units(model, x0.to(a.device), given=given.to(a.device), batch_size=a.batch_size)
    result = dict(dataset=ds.name, checkpoint=a.ckpt, step=ckpt["step"], seed=a.seed,
                  device=a.device, seconds=round(time.time() - start, 2),
                  params=model.param_counts(), latent_dim=model.latent_dim,
                  active_units=active.tolist(), train_args=ckpt["args"], eval_args=vars(a),
                  rows=rows, bounds=bounds)
    if two_tokens:
        result["joint"] = ds.joint(x).tolist()
    write_json(a.json, result)
    where = f" {a.data_path}" if a.data_path else ""
    print(f"{ds.name}{where}, {a.ckpt}, step {ckpt['step']}, {len(x):,} samples, seed {a.seed}, "
          f"{a.device}")
    print_results(result, ds)
    if two_tokens:
        print("\n" + heat_map(ds.true_joint(), ds.joint(x), sys.stdout.encoding or "utf-8"))


def write_json(path, result):
    """Writes the result, if a path is given."""
    if path:
        Path(path).write_text(json.dumps(result, indent=1) + "\n")


main = partial(data.run_script, "eval.py", script)         # argv -> exit status


if __name__ == "__main__":
    sys.exit(main())
