"""Datasets: the paper's synthetic data (Sections 4.1, 4.2, D.2) and any integer array of yours.

    ds = load("pairs")                               # or load("array", data_path="tokens.npy")
    x0 = ds.batch(512, torch.Generator())            # (512, L) int64, training data
    ds.metrics(samples)                              # {"acc": 0.993, "kl": 0.011}

Every dataset has name, vocab_size (V, without the mask, whose id is V), seq_len (L), entropy (nats
or None), batch(n, generator), test(n, generator) and metrics(x). Needs numpy and torch and imports
nothing of this project: copy it.
"""

import math

import numpy as np
import torch

SYNTHETIC = ("pairs", "pairs_nonuniform", "pairs_strength", "d1", "d2", "needle")
DATASETS = SYNTHETIC + ("array",)
MAX_VOCAB = 1_000_000
KL_FLOOR = 1e-12  # least generated probability; the paper's 25.3 is log(0.1 / 1e-12)


class Synthetic:
    """A known distribution over rows of a table: the ground truth that samples are scored against.

    table (S, L) token ids, -1 where a token is uniform noise; probs (S,). Accuracy is the share of
    samples that match a row; KL(true || generated) is over rows.
    """

    vocab_size = 10

    def __init__(self, name, table, probs=None):
        self.name, self.table = name, torch.as_tensor(table)
        self.seq_len, self.fixed = self.table.shape[1], (self.table >= 0).all(0)  # (L,) bool
        S = len(self.table)
        probs = torch.ones(S) / S if probs is None else torch.as_tensor(probs)
        self.probs = probs.double() / probs.double().sum()
        free = int((~self.fixed).sum())  # tokens of noise
        plogp = torch.special.xlogy(self.probs, self.probs).sum()
        self.entropy = free * math.log(self.vocab_size) - float(plogp)
        self._keys, self._order = self._key(self.table).sort()

    def _key(self, x):
        x = x[:, self.fixed]
        return (x * self.vocab_size ** torch.arange(x.shape[1])).sum(1)

    def batch(self, n, generator=None):
        """n fresh sequences (n, L) int64."""
        x = self.table[torch.multinomial(self.probs, n, replacement=True, generator=generator)]
        if self.fixed.all():
            return x
        noise = torch.randint(self.vocab_size, x.shape, generator=generator)
        return torch.where(x < 0, noise, x)

    test = batch  # every draw is unseen data of the same distribution

    def rows(self, x):
        """Index of the table row that each sequence of x (n, L) matches, -1 if none -> (n,)."""
        key = self._key(x)
        at = torch.searchsorted(self._keys, key).clamp(max=len(self._keys) - 1)
        return torch.where(self._keys[at] == key, self._order[at], -1)

    def metrics(self, x):
        """Samples x (n, L) -> {"acc": share that matches a row, "kl": KL over rows, nats}."""
        rows = self.rows(x)
        p, n = self.probs, len(x)
        generated = torch.bincount(rows[rows >= 0], minlength=len(p)).double() / n
        kl = torch.special.xlogy(p, p) - torch.special.xlogy(p, generated.clamp(min=KL_FLOOR))
        return {"acc": float((rows >= 0).double().mean()), "kl": float(kl.sum())}

    def joint(self, x):
        """Two-token data only: samples x (n, 2) -> (10, 10) joint frequencies."""
        V = self.vocab_size
        return torch.bincount(x[:, 0] * V + x[:, 1], minlength=V * V).view(V, V).double() / len(x)

    def true_joint(self):
        """Two-token data only: (10, 10) true probabilities."""
        out = torch.zeros(self.vocab_size, self.vocab_size, dtype=torch.float64)
        return out.index_put((self.table[:, 0], self.table[:, 1]), self.probs)


class Array:
    """The rows of an integer .npy array (N, L).

    One row in ten, at least one, is held out for testing, by a fixed permutation. V is the largest
    id plus one unless vocab_size says more. Raises FileNotFoundError, or ValueError if the file is
    no (N, L) array of integers in 0..V-1. Pickled arrays are refused unread.
    """

    name, entropy = "array", None

    def __init__(self, path, vocab_size=None):
        try:
            x = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            raise FileNotFoundError(f"no array at {path}; make one: numpy.save(path, x)") from None
        except Exception as e:  # a damaged file makes numpy raise almost anything
            raise ValueError(f"{path} is no plain .npy array: {str(e)[:100]!r}") from None
        what = f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else "an archive of several"
        if not isinstance(x, np.ndarray) or x.ndim != 2 or x.dtype.kind not in "iu":
            raise ValueError(f"{path} must hold an (N, L) array of integers, not {what}")
        if len(x) < 2 or x.shape[1] < 1:
            raise ValueError(f"{path} must hold at least two sequences of one token, not {what}")
        top = MAX_VOCAB if vocab_size is None else vocab_size
        if x.min() < 0 or x.max() >= top:
            raise ValueError(f"{path} has ids {x.min()}..{x.max()}; they must lie in 0..{top - 1}")
        self.seq_len, self.vocab_size = x.shape[1], vocab_size or int(x.max()) + 1
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(x)))
        x = torch.from_numpy(x.astype(np.int32))[order]
        held = max(1, len(x) // 10)
        self.x_test, self.x_train = x[:held], x[held:]

    def batch(self, n, generator=None):
        """n training rows drawn with replacement -> (n, L) int64."""
        return self.x_train[torch.randint(len(self.x_train), (n,), generator=generator)].long()

    def test(self, n, generator=None):
        """n held-out rows drawn with replacement -> (n, L) int64."""
        return self.x_test[torch.randint(len(self.x_test), (n,), generator=generator)].long()

    def metrics(self, x):
        """Nothing: the true distribution is not known."""
        return {}


def load(name, strength=1.0, length=20, data_path=None, vocab_size=None):
    """Dataset by name.

    strength: p of pairs_strength; length: L of needle; data_path, vocab_size: of array. Raises
    ValueError on an unknown name or an impossible option.
    """
    V, k = 10, torch.arange(10)[:, None]
    run = (k + torch.arange(4)) % V  # (10, 4): c, c+1, c+2, c+3
    if name == "pairs":
        return Synthetic(name, run[:, :2])
    if name == "pairs_nonuniform":
        return Synthetic(name, run[:, :2], torch.arange(1, 11) / 55)
    if name == "pairs_strength":
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must lie in 0..1, not {strength}")
        table = torch.cartesian_prod(torch.arange(V), torch.arange(V))
        succ = table[:, 1] == (table[:, 0] + 1) % V
        return Synthetic(name, table, torch.where(succ, strength, (1 - strength) / (V - 1)) / V)
    if name == "d1":
        return Synthetic(name, run)
    if name == "d2":
        first, second = run[:, :2].repeat_interleave(V, 0), run[:, :2].repeat(V, 1)
        return Synthetic(name, torch.cat([first, second], 1))
    if name == "needle":
        if length < 8:
            raise ValueError(f"length of needle must be at least 8, not {length}")
        return Synthetic(name, torch.cat([run, torch.full((V, length - 8), -1), run], 1))
    if name == "array":
        if not data_path:
            raise ValueError("dataset array needs --data-path FILE.npy")
        return Array(data_path, vocab_size)
    raise ValueError(f"dataset {name!r} is not one of {', '.join(DATASETS)}")


def show(x, vocab_size):
    """One line per sequence: ids separated by spaces, _ for the mask. x (n, L)."""
    words = [["_" if v == vocab_size else str(v) for v in row] for row in x.tolist()]
    return "\n".join(map(" ".join, words))


def parse(text, seq_len, vocab_size):
    """The inverse of `show` for one line, "3 _" -> (L,) ids. Raises ValueError."""
    words = text.split()
    if len(words) != seq_len:
        raise ValueError(f"{text!r} has {len(words)} tokens, not {seq_len}; _ stands for a blank")
    for w in words:
        if w != "_" and not (w.isascii() and w.isdigit() and int(w) < vocab_size):
            raise ValueError(f"token {w!r} is neither _ nor an id in 0..{vocab_size - 1}")
    return torch.tensor([vocab_size if w == "_" else int(w) for w in words])
