"""Draws samples from a checkpoint, or fills in the blanks of a given sequence.

python sample.py                                   # ten samples of the last run
python sample.py --nfe 2 --remask margin --num 5
python sample.py --infill "3 _"                    # the given tokens stay
"""

import argparse
import sys
from pathlib import Path

import torch

import data
from diffusion import LATENT, REMASK, default_temperature, sample
from model import load_checkpoint


def build_parser():
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = lambda message: p.exit(2, f"sample.py: {message}; see --help\n")
    p.add_argument("--ckpt", default="out/last.pt", help="checkpoint of train.py")
    p.add_argument("--num", type=int, default=10, help="number of samples")
    p.add_argument("--nfe", type=int, default=1, help="network evaluations per block, N")
    p.add_argument("--remask", choices=REMASK, default="prob",
                   help="which tokens are unmasked first (Section 3.3)")
    p.add_argument("--temperature", type=float,
                   help="of the tokens, 0: argmax; default: 0 with a latent, 1 without")
    p.add_argument("--latent", choices=LATENT, default="fixed",
                   help="one z per block, a new one each step (E.1), or from the encoder (E.4)")
    p.add_argument("--infill", metavar="TOKENS",
                   help='a sequence in the form that samples are printed in, _ for blanks: "3 _"')
    p.add_argument("--batch-size", type=int, default=1000, help="sequences per network evaluation")
    p.add_argument("--seed", type=int, default=0, help="same seed, same samples")
    p.add_argument("--out", metavar="FILE", help="also write the samples to this file")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="torch device")
    return p


def run(a):
    """Prints the samples. Raises ValueError, FileNotFoundError."""
    if a.num < 1 or a.batch_size < 1:
        raise ValueError(f"--num {a.num} and --batch-size {a.batch_size} must be at least 1")
    if a.out and not Path(a.out).absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {Path(a.out).parent} to write {a.out} to")
    model, ckpt = load_checkpoint(a.ckpt, a.device)
    V, L = model.vocab_size, model.config.seq_len
    if a.temperature is None:
        a.temperature = default_temperature(model)
    start = torch.full((L,), V) if a.infill is None else data.parse(a.infill, L, V)
    x = sample(model, start.repeat(a.num, 1).to(a.device), a.nfe, a.remask, a.temperature, a.latent,
               a.batch_size, torch.Generator().manual_seed(a.seed))
    text, latent = data.show(x.cpu(), V), a.latent if model.latent_dim else "none"
    print(f"# {ckpt['args']['dataset']}, step {ckpt['step']}, nfe {a.nfe} per block, "
          f"remask {a.remask}, temperature {a.temperature:g}, latent {latent}, seed {a.seed}",
          file=sys.stderr)
    print(text)
    if a.out:
        Path(a.out).write_text(text + "\n")


def main(argv=None):
    """Returns the exit status."""
    try:
        run(build_parser().parse_args(argv))
    except (ValueError, OSError) as e:
        print(f"sample.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
