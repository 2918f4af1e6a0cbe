"""Draws samples from a checkpoint, or fills in the blanks of a given sequence.

python sample.py                                   # ten samples of the last run
python sample.py --nfe 2 --remask margin --num 5
python sample.py --infill "3 _"                    # the given tokens stay
python sample.py --prompt "the history of"         # text
python sample.py --nfe 10 --remask margin          # Sudoku: solves held-out puzzles
python sample.py --puzzle puzzles.txt              # or one puzzle as a string
"""

import argparse
import sys
from pathlib import Path

import torch

import data
from diffusion import LATENT, REMASK, default_temperature, sample
from model import complaint, load_checkpoint


def build_parser():
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = lambda message: p.exit(2, f"sample.py: {message}; see --help\n")
    p.add_argument("--ckpt", default="out/last.pt", help="checkpoint of train.py")
    p.add_argument("--num", type=int,
                   help="number of samples, of each --puzzle; default: 10, with --puzzle 1")
    p.add_argument("--nfe", type=int,
                   help="network evaluations per block, N; default: 1; sudoku: 10; text: 4")
    p.add_argument("--remask", choices=REMASK,
                   help="which tokens are unmasked first (Section 3.3); default: prob; "
                   "sudoku: margin; text: random")
    p.add_argument("--temperature", type=float,
                   help="of the tokens, 0: argmax; default: 0 with a latent, else 1; text: 1")
    p.add_argument("--latent", choices=LATENT, default="fixed",
                   help="one z per block, a new one each step (E.1), or from the encoder (E.4)")
    p.add_argument("--infill", metavar="TOKENS",
                   help='a sequence in the form that samples are printed in, _ for blanks: "3 _"; '
                   'text: "the ____ of", what follows is generated too')
    p.add_argument("--prompt", metavar="TEXT", help="text: how every sample begins")
    p.add_argument("--length", type=int,
                   help="text: tokens to generate, prompt included, at most as many as in "
                   "training; default: as many")
    p.add_argument("--puzzle", metavar="PUZZLE",
                   help="sudoku: n n characters, . or 0 for blanks, or a file with one per line; "
                   "default: held-out puzzles")
    p.add_argument("--clues", type=int,
                   help="sudoku: show this many random cells of test boards; default: as trained")
    p.add_argument("--batch-size", type=int, default=1000, help="sequences per network evaluation")
    p.add_argument("--seed", type=int, default=0, help="same seed, same samples")
    p.add_argument("--out", metavar="FILE",
                   help="also write the samples to this file; sudoku: puzzle,answer on each line")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="torch device")
    return p


def start_from(a, model, ckpt):
    """What to fill in -> x (n, L) ids with masks, given (n, L) bool or None, dataset or None."""
    V, vocab, args = model.vocab_size, ckpt["vocab"], ckpt["args"]
    L = model.config.seq_len if a.length is None else a.length
    if args["dataset"] != "sudoku":
        known = torch.zeros(0, dtype=torch.long)
        if vocab is None and a.infill is not None:
            known = data.parse(a.infill, L, V)
        elif vocab is not None and (a.prompt or a.infill) is not None:
            known = data.encode(a.prompt or a.infill, vocab, blank=a.infill is not None)
        if len(known) > L:
            raise ValueError(f"{len(known)} tokens are given; the sequence has {L}")
        x = torch.cat([known, torch.full((L - len(known),), V)])
        return x.repeat(a.num, 1), None, None
    options = data.options(args) | ({} if a.clues is None else {"clues": a.clues})
    if a.puzzle is None:
        ds = data.load("sudoku", **options)
        x0, given = ds.test(a.num, torch.Generator().manual_seed(a.seed))
    else:
        ds = data.load("sudoku", **options | {"clues": None})
        puzzles = torch.from_numpy(data.puzzles_to_solve(a.puzzle, ds.grid)).long()
        x0, given = (x.repeat_interleave(a.num, 0) for x in ds.tokens(puzzles, puzzles))
    return torch.where(given, x0, V), given, ds


def show_boards(puzzles, answers, file):
    """Prints Sudoku boards; writes puzzle,answer lines to `file` unless it is None."""
    for p, b in zip(puzzles.numpy(), answers.numpy()):
        print(data.draw_boards(p, b, color=sys.stdout.isatty()) + "\n")
    good = ~data.violations(answers.numpy()).any(1) & ((puzzles == 0) | (puzzles == answers)
                                                       ).all(1).numpy()
    print(f"{good.sum()} of {len(good)} solved")
    if file:
        rows = [",".join("".join(map(str, r)) for r in pair)
                for pair in zip(puzzles.tolist(), answers.tolist())]
        Path(file).write_text("\n".join(rows) + "\n", encoding="utf-8")


def run(a):
    """Prints the samples. Raises ValueError, FileNotFoundError."""
    a.num = a.num if a.num is not None else 1 if a.puzzle is not None else 10
    if not 1 <= a.num <= 10**9 or a.batch_size < 1:
        raise ValueError(f"--num {a.num} must lie in 1..10^9, --batch-size {a.batch_size} be at "
                         "least 1")
    if a.out is not None:
        data.check_output(a.out)
    model, ckpt = load_checkpoint(a.ckpt, a.device)
    name, c = ckpt["args"]["dataset"], model.config
    kind = data.Sudoku if name == "sudoku" else data.Text if ckpt["vocab"] else data.Synthetic
    for flag, kinds in (("puzzle", [data.Sudoku]), ("clues", [data.Sudoku]),
                        ("prompt", [data.Text]), ("length", [data.Text]),
                        ("infill", [data.Text, data.Synthetic])):
        if getattr(a, flag) is not None and kind not in kinds:
            raise ValueError(f"--{flag} does not go with {name}, which {a.ckpt} was trained on")
    if sum(v is not None for v in (a.puzzle, a.clues, a.prompt, a.infill)) > 1:
        raise ValueError("of --puzzle, --clues, --prompt and --infill only one can be given")
    if a.length is not None and (not 1 <= a.length <= c.seq_len or a.length % c.block_size):
        raise ValueError(f"--length {a.length} must be a multiple of the block size "
                         f"{c.block_size}, at most the {c.seq_len} tokens of training")
    temperature = default_temperature(model) if kind.temperature is None else kind.temperature
    temperature = temperature if a.temperature is None else a.temperature
    nfe, remask = a.nfe if a.nfe is not None else kind.nfe, a.remask or kind.remask
    start, given, ds = start_from(a, model, ckpt)
    x = sample(model, start.to(a.device), nfe, remask, temperature, a.latent, a.batch_size,
               torch.Generator().manual_seed(a.seed)).cpu()
    latent = a.latent if model.latent_dim else "none"
    print(f"# {name}, step {ckpt['step']}, nfe {nfe} per block, remask {remask}, "
          f"temperature {temperature:g}, latent {latent}, seed {a.seed}", file=sys.stderr)
    if ds is not None:
        return show_boards(*ds.boards(x, given), a.out)
    text = data.show(x, model.vocab_size, ckpt["vocab"])
    print(text)
    if a.out:
        Path(a.out).write_text(text + "\n", encoding="utf-8")


def main(argv=None):
    """Returns the exit status."""
    try:
        run(build_parser().parse_args(argv))
    except Exception as e:
        if complaint(e) is None:
            raise
        print(f"sample.py: {complaint(e)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
