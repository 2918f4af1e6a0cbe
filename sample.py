"""Draws samples from a checkpoint, or fills in the blanks of a given sequence.

    python sample.py                                   # ten samples of the last run
    python sample.py --nfe 2 --remask margin --num 5
    python sample.py --prompt "3 _"                    # the given tokens stay
    python sample.py --prompt "the ____ of"            # text
    python sample.py --nfe 10 --remask margin          # Sudoku: solves held-out puzzles
    python sample.py --puzzle puzzles.txt              # or those of a file, or one as a string
    python sample.py --show-steps                      # a sample as it is unmasked
"""

import sys
import time
from functools import partial
from pathlib import Path

import torch

import data
from data import count, natural, number, output
from diffusion import LATENT, REMASK, default_temperature, sample
from model import load_checkpoint, usable


def build_parser():
    """The command line."""
    p = data.parser("sample.py", __doc__)
    p.add_argument("--ckpt", default="out/last.pt", help="checkpoint of train.py")
    p.add_argument("--num", type=count,
                   help="number of samples, of each --puzzle; else 10, with --puzzle or "
                   "--show-steps 1")
    p.add_argument("--nfe", type=count,
                   help="network evaluations per block, N; else 1, Sudoku 10, text 4")
    p.add_argument("--remask", choices=REMASK,
                   help="which tokens are unmasked first (Section 3.3); else prob, Sudoku margin, "
                   "text random")
    p.add_argument("--temperature", type=number,
                   help="of the tokens, 0: argmax; else 0 with a latent, 1 without and for text")
    p.add_argument("--latent", choices=LATENT, default="fixed",
                   help="one z per block, a new one each step (E.1), from the encoder (E.4), or "
                   "none")
    p.add_argument("--latent-draws", type=count, default=1, metavar="R",
                   help="draws of z for a block with given tokens, of which they choose one")
    p.add_argument("--loops", type=count,
                   help="times that the decoder's layers run; else as in training")
    p.add_argument("--prompt", metavar="TOKENS",
                   help='how every sample begins, with blanks to fill in: "3 _", "the ____ of"')
    p.add_argument("--blank", default="_", metavar="C",
                   help="the character that stands for a blank in --prompt")
    p.add_argument("--length", type=count,
                   help="text: tokens to generate, prompt included, a multiple of the block size; "
                   "several blocks can go beyond the length of training, the default")
    g = p.add_mutually_exclusive_group()
    g.add_argument("--puzzle", metavar="PUZZLE",
                   help="Sudoku: the cells in a row, 0 . _ * x for blanks, or a file of puzzles; "
                   "else held-out puzzles")
    g.add_argument("--clues", type=natural,
                   help="Sudoku: show this many random cells of held-out boards; else as trained")
    p.add_argument("--show-steps", action="store_true",
                   help="show the samples as they are unmasked, all at once, redrawn in place on a "
                   "terminal")
    p.add_argument("--batch-size", type=count, default=1000,
                   help="sequences per network evaluation")
    p.add_argument("--seed", type=natural, default=0, help="same seed, same samples")
    p.add_argument("--out", type=output, metavar="FILE",
                   help="also write the samples to this file, one a line; Sudoku: puzzle,answer")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="torch device")
    return p


def to_fill(a, ckpt, model):
    """Test sequences, or --puzzle, masks where nothing is given -> ids, given (n, L), dataset."""
    ds = data.reload(ckpt, model, clues=a.clues)
    if a.puzzle is None:
        x0, given = ds.batch(a.num, torch.Generator().manual_seed(a.seed), "test")
    else:
        ds.clues = None                                  # a puzzle keeps the clues it has
        puzzles = torch.from_numpy(data.puzzles_to_solve(a.puzzle, ds.grid)).long()
        puzzles = puzzles.repeat_interleave(a.num, 0)
        x0, given = ds.tokens(puzzles, puzzles)
    return torch.where(given, x0, model.vocab_size), given, ds


def prompted(a, model, vocab):
    """--num copies of --prompt, and masks behind it -> (num, L) ids."""
    V, L = model.vocab_size, a.length or model.seq_len
    x = torch.full((a.num, L), V)
    if a.prompt is not None:
        known = data.encode(a.prompt, vocab, V, a.blank)
        if len(known) > L:
            raise ValueError(f"--prompt has {len(known)} tokens; the sequence has {L}")
        x[:, : len(known)] = known
    return x


def show_step(draw, states, x):
    """Prints x (n, L), ids after an evaluation, as draw(x, the state before); adds it to states."""
    x = x.cpu()
    if sys.stdout.isatty():
        time.sleep(0.3)                                  # for the eye
        print("\033[H\033[J", end="")                    # clears the screen
    print(f"evaluation {len(states)}\n{draw(x, states[-1])}\n", flush=True)
    states.append(x)


def draw_unfinished(ds, given, x, before):
    """Sudoku boards as text, newly filled cells marked. x, before (n, L) ids, given (n, L) bool."""
    puzzle, answer = ds.boards(x, given)
    new = answer != ds.boards(before, given)[1]
    return "\n\n".join(map(data.draw_boards, puzzle, answer, new))


def show_boards(puzzles, answers, path):
    """Writes puzzle,answer lines to `path` unless it is None, then prints the boards."""
    if path:
        with open(path, "w", encoding="utf-8") as f:
            for puzzle, answer in zip(puzzles.tolist(), answers.tolist()):
                print("".join(map(str, puzzle)), "".join(map(str, answer)), sep=",", file=f)
    good = data.solved(puzzles, answers)
    for puzzle, answer, solved in zip(puzzles, answers, good):
        print(f"{data.draw_boards(puzzle, answer)}\nsolved: {'yes' if solved else 'no'}\n")
    boards = answers[good].unique(dim=0)
    line = f"{good.sum()} of {len(good)} solved, {len(boards)} different"
    if not puzzles.any():                                # the others may be learnt by heart
        line += f", {data.held_out(boards.numpy()).sum()} of them held out"
    print(line)


def script(argv):
    """Samples, writes, prints. Raises ValueError, FileNotFoundError."""
    a = build_parser().parse_args(argv)
    a.num = a.num or (1 if a.puzzle or a.show_steps else 10)
    model, ckpt = load_checkpoint(a.ckpt, usable(a.device), a.loops)
    args, vocab = {"dataset": "array"} | ckpt.get("args", {}), ckpt.get("vocab")
    V, sudoku = model.vocab_size, args["dataset"] == "sudoku"
    how = data.SCORING.get(args["dataset"], data.SCORING["array"])   # data of yours: rows of ids
    for flag, fits in (("puzzle", sudoku), ("clues", sudoku), ("prompt", not sudoku),
                       ("length", vocab is not None)):
        if getattr(a, flag) is not None and not fits:
            raise ValueError(f"--{flag} does not go with {args['dataset']}, which {a.ckpt} was "
                             "trained on")
    if a.temperature is None:
        a.temperature = how["temperature"]
    if a.temperature is None:
        a.temperature = default_temperature(model, a.latent)
    nfe, remask = a.nfe or how["nfe"], a.remask or how["remask"]
    if sudoku or args.get("prefix_len") and a.prompt is None:
        start, given, ds = to_fill(a, ckpt, model)
    else:
        start, given, ds = prompted(a, model, vocab), None, None
    on_step, batch_size = None, a.batch_size
    if a.show_steps:
        draw = partial(draw_unfinished, ds, given) if sudoku else (
            lambda x, before: data.show(x, V, vocab))
        on_step, batch_size = partial(show_step, draw, [start]), len(start)
    x = sample(model, start.to(a.device), nfe, remask, a.temperature, a.latent, batch_size,
               generator=torch.Generator().manual_seed(a.seed + 1), on_step=on_step,
               latent_draws=a.latent_draws).cpu()
    latent = a.latent if model.latent_dim else "none"
    print(f"# {args['dataset']}, step {ckpt.get('step')}, nfe {nfe} per block, remask {remask}, "
          f"temperature {a.temperature:g}, latent {latent}, seed {a.seed}", file=sys.stderr)
    if sudoku:
        show_boards(*ds.boards(x, given), a.out)
    else:
        text = data.show(x, V, vocab)
        if a.out:
            Path(a.out).write_text(text + "\n", encoding="utf-8")
        print(text)


main = partial(data.run_script, "sample.py", script)         # argv -> exit status


if __name__ == "__main__":
    sys.exit(main())
