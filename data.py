"""Datasets: synthetic (Sections 4.1, 4.2, D.2), Sudoku (4.3), text (4.4), integer arrays of yours.

    ds = load("pairs")                               # or load("sudoku", grid=6, layout="board")
    x0, given = ds.batch(512, torch.Generator())     # (512, L) int64, and bool or None
    ds.metrics(samples)                              # {"acc": 0.993, "kl": 0.011}

Every dataset has name, vocab_size (V, without the mask, whose id is V), seq_len (L), prefix_len
(tokens at the start that are always given), entropy (nats or None), vocab (list of V strings, or
None where ids are numbers), about (in words); nfe, remask, temperature (None: the sampler's own
default), score_num, bound_num: how it is scored if nothing else is asked for; scored: whether its
metrics are worth watching during training; and
    batch, valid, test (n, generator) -> x0 (n, L) ids, given (n, L) bool or None: tokens that are
        conditioned on and never masked; for training, for choosing between models, for reporting
    metrics(x, x0, given) -> scores of samples x drawn for test sequences x0; synthetic data need x
Needs numpy, torch, requests, tqdm and imports nothing of this project: copy it.
"""

import functools
import gzip
import hashlib
import itertools
import math
import os
import re
import tarfile
import time
import unicodedata
import zipfile
import zlib
from functools import cached_property
from pathlib import Path

import numpy as np
import requests
import torch
from tqdm import tqdm

SYNTHETIC = ("pairs", "pairs_nonuniform", "pairs_strength", "d1", "d2", "needle")
DATASETS = SYNTHETIC + ("sudoku", "text8", "lm1b", "text", "array")
OPTIONS = {  # what `load` takes, by dataset
    "pairs_strength": ("strength",), "needle": ("length",), "array": ("data_path", "vocab_size"),
    "text8": ("length", "data_dir"), "lm1b": ("length", "data_dir"),
    "text": ("length", "data_path", "alphabet", "max_gib"),
    "sudoku": ("grid", "layout", "clues", "source", "puzzles", "data_path", "data_dir", "max_gib")}
TYPES = {  # of these options
    "strength": (float, int), "max_gib": (float, int), "data_path": (str, Path),
    "data_dir": (str, Path), "alphabet": str, "layout": str, "source": str}  # the others: int
MAX_VOCAB = 1_000_000
MAX_GIB = 1.0  # largest text or CSV file that is read into memory
KL_FLOOR = 1e-12  # least generated probability; the paper's 25.3 is log(0.1 / 1e-12)


class Synthetic:
    """A known distribution over rows of a table: the ground truth that samples are scored against.

    table (S, L) token ids, -1 where a token is uniform noise; probs (S,). Accuracy is the share of
    samples that match a row; KL(true || generated) is over rows.
    """

    vocab_size, prefix_len, vocab, nfe, remask, temperature = 10, 0, None, 1, "prob", None
    score_num, bound_num, scored = 20_000, 20_000, True

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
        """n fresh sequences (n, L) int64, None."""
        x = self.table[torch.multinomial(self.probs, n, replacement=True, generator=generator)]
        if not self.fixed.all():
            noise = torch.randint(self.vocab_size, x.shape, generator=generator)
            x = torch.where(x < 0, noise, x)
        return x, None

    valid = test = batch  # every draw is unseen data of the same distribution

    def rows(self, x):
        """Index of the table row that each sequence of x (n, L) matches, -1 if none -> (n,)."""
        key = self._key(x)
        at = torch.searchsorted(self._keys, key).clamp(max=len(self._keys) - 1)
        return torch.where(self._keys[at] == key, self._order[at], -1)

    def metrics(self, x, x0=None, given=None):
        """Samples x (n, L) -> {"acc": share that matches a row, "kl": KL over rows, nats}."""
        rows = self.rows(x)
        p, n = self.probs, len(x)
        generated = torch.bincount(rows[rows >= 0], minlength=len(p)).double() / n
        kl = torch.special.xlogy(p, p) - torch.special.xlogy(p, generated.clamp(min=KL_FLOOR))
        return {"acc": float((rows >= 0).double().mean()), "kl": float(kl.sum())}

    @property
    def about(self):
        """What there is, in words."""
        return f"entropy {self.entropy:.4f} nats"

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

    One row in ten, at least two, is held out for testing, by a fixed permutation. V is the largest
    id plus one unless vocab_size says more. Raises FileNotFoundError, or ValueError if the file is
    no (N, L) array of integers in 0..V-1. Pickled arrays are refused unread.
    """

    name, entropy, prefix_len, vocab, nfe, remask, temperature = ("array", None, 0, None, 1, "prob",
                                                                  None)
    score_num, bound_num, scored = 1000, 20_000, False

    def __init__(self, path, vocab_size=None):
        if not path:
            raise ValueError("dataset array needs --data-path FILE.npy")
        if not Path(path).is_file():
            raise FileNotFoundError(f"no array at {path}; make one: numpy.save(path, x)")
        try:
            x = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as e:  # a damaged file makes numpy raise almost anything
            raise ValueError(f"{path} is no plain .npy array: {str(e)[:100]!r}") from None
        what = f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else "an archive of several"
        if not isinstance(x, np.ndarray) or x.ndim != 2 or x.dtype.kind not in "iu":
            raise ValueError(f"{path} must hold an (N, L) array of integers, not {what}")
        if len(x) < 3 or x.shape[1] < 1:
            raise ValueError(f"{path} must hold at least three sequences of one token, not {what}")
        top = MAX_VOCAB if vocab_size is None else vocab_size
        if x.min() < 0 or x.max() >= top:
            raise ValueError(f"{path} has ids {x.min()}..{x.max()}; they must lie in 0..{top - 1}")
        self.seq_len, self.vocab_size = x.shape[1], vocab_size or int(x.max()) + 1
        order, held = np.random.default_rng(0).permutation(len(x)), max(2, len(x) // 10)
        self.x, self.test_rows, self.train_rows = x, order[:held], order[held:]

    def batch(self, n, generator=None):
        """n training rows drawn with replacement -> (n, L) int64, None."""
        at = torch.randint(len(self.train_rows), (n,), generator=generator)
        return torch.from_numpy(self.x[self.train_rows[at.numpy()]].astype(np.int64)), None

    def test(self, n, generator=None):
        """n different held-out rows, or all if there are fewer -> (n, L) int64, None."""
        at = distinct(len(self.test_rows), n, generator)
        return torch.from_numpy(self.x[self.test_rows[at.numpy()]].astype(np.int64)), None

    valid = test  # best.pt is chosen on these: report last.pt

    @property
    def about(self):
        """What there is, in words."""
        return f"{len(self.train_rows):,} training and {len(self.test_rows):,} test sequences"

    def metrics(self, x, x0=None, given=None):
        """Nothing: the true distribution is not known."""
        return {}


# ---- Sudoku. Boards in numpy: one uint16 of candidate bits per cell, (n, n, B), B contiguous

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # rows and columns of a box of an n x n board
LAYOUTS = ("prefix", "board")
SOURCES = ("generated", "shah", "extreme")
CHUNK = 512  # boards generated at a time
GENERATOR_VERSION = 1  # part of the name of cached puzzles: raise it when the generator changes
SHAH = "https://drive.usercontent.google.com/download?id={}&export=download&confirm=t"
EXTREME = ("https://huggingface.co/datasets/sapientinc/sudoku-extreme/resolve/"
           "58942f96baeb572ca3127e2a9e9c70f330783d6b/")
DOWNLOADS = {  # source: (url, file, sha256 or None) of training and test puzzles
    "shah": (
        (SHAH.format("1msLy7AXAr4VBXXv7Xfkc_IG3E7retWza"), "sudoku-train-data.npy", None),
        (SHAH.format("1HlKFzrkhMUAOoDU9qGUjkMD6IjlT40v7"), "sudoku-test-data.npy", None)),
    "extreme": (
        (EXTREME + "train.csv", "sudoku-extreme-train.csv",
         "64b46674db0148e0d73a16346dadeb2b1c00824d3fca3f85b2ae7037f6b4b38e"),
        (EXTREME + "test.csv", "sudoku-extreme-test.csv",
         "a2fd52aea23d331d5b4ee723c856236e838a9fb9a70e66f4e0e0cf26c338c6a8"))}


def units(c):
    """Views of boards c (n, n, B) by rows, by columns, by boxes.

    Each has five axes: the first two run over the cells of a unit, the next two over the units.
    """
    n, (h, w) = len(c), BOXES[len(c)]
    c = c.reshape(n // h, h, n // w, w, -1)
    return c.transpose(2, 3, 0, 1, 4), c, c.transpose(1, 3, 0, 2, 4)


def to_bits(boards):
    """Digits (B, n n), 0 for blanks -> candidate bits (n, n, B), all candidates for blanks."""
    n = math.isqrt(boards.shape[1])
    bits = np.append(2**n - 1, 1 << np.arange(n)).astype(np.uint16)
    return bits[np.ascontiguousarray(boards.T)].reshape(n, n, -1)


def to_digits(c):
    """Candidate bits (n, n, B) -> digits (B, n n) uint8, 0 where a cell is not decided."""
    bits = c.reshape(len(c) ** 2, -1).T
    return np.where(bits & (bits - 1), 0, np.bitwise_count(bits - 1) + 1).astype(np.uint8)


def narrow(c):
    """One round of naked and hidden singles on boards c (n, n, B), in place."""
    single = np.where(c & (c - 1), 0, c)
    for u, s in zip(units(c), units(single)):
        u &= ~np.bitwise_or.reduce(s, axis=(0, 1)) | s         # a decided cell keeps its digit
    for u in units(c):
        once, twice = np.zeros_like(u[0, 0]), np.zeros_like(u[0, 0])
        for cell in (u[i, j] for i in range(u.shape[0]) for j in range(u.shape[1])):
            twice |= once & cell
            once |= cell
        hidden = u & once & ~twice
        np.copyto(u, hidden, where=hidden != 0)


def propagate(c):
    """`narrow` to a fixpoint, in place -> contradiction (B,), solved (B,)."""
    n, before = len(c), None
    while before is None or (c != before).any():
        before = c.copy()
        narrow(c)
    decided, broken = ((c & (c - 1)) == 0).all((0, 1)), (c == 0).any((0, 1))
    for u in units(c):
        broken |= (np.bitwise_or.reduce(u, axis=(0, 1)) != 2**n - 1).any((0, 1))
    return broken, decided & ~broken


def narrowest(c, rng=None):
    """Of each board (n, n, B) an undecided cell with the fewest candidates (B,), and their number.

    rng: choose among such cells at random."""
    size = np.bitwise_count(c.reshape(len(c) ** 2, -1))
    noise = 0 if rng is None else rng.random(size.shape, dtype=np.float32)
    cell = np.where(size > 1, size + noise, 99).argmin(0)
    return cell, size[cell, np.arange(len(cell))]


def random_grids(n, count, rng):
    """Random solved boards by propagation and guessing, starting anew where a guess fails.

    -> candidate bits (n, n, count). Not exactly uniform over all boards.
    """
    B, done, out = min(count, 256), 0, []
    c = np.full((n, n, B), 2**n - 1, np.uint16)
    while done < count:
        broken, solved = propagate(c)
        out.append(c[:, :, solved])
        done += solved.sum()
        c[:, :, broken | solved] = 2**n - 1
        cell, size = narrowest(c, rng)
        flat, b = c.reshape(n * n, B), np.arange(B)
        bits, skip = flat[cell, b], (rng.random(B) * size).astype(int)
        for i in range(n - 1):                           # keep the candidate after `skip` others
            bits = np.where(skip > i, bits & (bits - 1), bits)
        flat[cell, b] = bits & (~bits + 1)
    out = np.concatenate(out, axis=2)
    return out[:, :, rng.permutation(out.shape[2])[:count]]  # not the quick ones first


def dig(solution, rng):
    """Digs holes, cells in random order, as long as singles still lead back to each cell's digit.

    So every puzzle has one solution, and naked and hidden singles find it. solution (n, n, B) bits
    -> digits (B, n n) uint8, 0 for blanks.
    """
    n, B = len(solution), solution.shape[2]
    clues, everything = solution.reshape(n * n, B).copy(), np.uint16(2**n - 1)
    for cell in rng.permuted(np.tile(np.arange(n * n)[:, None], (1, B)), axis=0):
        b = np.arange(B)
        digit = clues[cell, b]
        c = np.where(clues, clues, everything)
        c[cell, b] = everything
        while len(b):                                    # boards that are settled leave the batch
            before = c.copy()
            narrow(c.reshape(n, n, -1))
            found = c[cell, np.arange(len(b))] == digit[b]
            clues[cell[found], b[found]] = 0
            on = ~found & (c != before).any(0)
            b, cell, c = b[on], cell[on], c[:, on]
    bits = np.where(clues, clues, everything)
    return to_digits(bits.reshape(n, n, B))


def generate(n, count, seed=0):
    """Unique-solution puzzles -> puzzles, solutions (count, n n) uint8, 0 for blanks.

    About 24.6 clues for n = 9, 10.1 for 6, 4.3 for 4. Prints a progress bar where stderr is a
    terminal.
    """
    out, bar = [], tqdm(total=count, desc=f"generating {n}x{n} puzzles", unit="puzzle",
                        disable=None)
    with bar:
        for i in range(0, count, CHUNK):                  # a larger count begins with the same ones
            rng = np.random.default_rng([GENERATOR_VERSION, seed, i])
            grids = random_grids(n, CHUNK, rng)
            out.append(np.stack([dig(grids, rng), to_digits(grids)]))
            bar.update(min(CHUNK, count - i))
    return np.concatenate(out, axis=1)[:, :count]


def solve(puzzles, limit=2):
    """All puzzles at once, depth first -> one solution (B, n n) uint8 and the number found (B,).

    Counts up to `limit` solutions of each; 0: there is none. puzzles (B, n n), 0 for blanks.
    """
    n = math.isqrt(puzzles.shape[1])
    out, found = np.zeros_like(puzzles, dtype=np.uint8), np.zeros(len(puzzles), int)
    stack = [(np.arange(len(puzzles)), to_bits(puzzles))]
    while stack:
        owner, c = stack.pop()
        if len(owner) > 1024:
            stack.append((owner[1024:], c[:, :, 1024:]))
            owner, c = owner[:1024], c[:, :, :1024].copy()
        broken, solved = propagate(c)
        out[owner[solved]] = to_digits(c[:, :, solved])
        np.add.at(found, owner[solved], 1)
        on = ~broken & ~solved & (found[owner] < limit)
        if on.any():
            owner, c = owner[on], c[:, :, on]
            cell, _ = narrowest(c)
            bits = c.reshape(n * n, -1)[cell, np.arange(len(cell))]
            for d in range(n):                           # one child for each candidate
                has = (bits >> d & 1) == 1
                if has.any():
                    child = c[:, :, has].copy()
                    child.reshape(n * n, -1)[cell[has], np.arange(has.sum())] = 1 << d
                    stack.append((owner[has], child))
    return out, np.minimum(found, limit)


def violations(boards):
    """Cells that are blank or share a row, column or box with their own digit.

    boards (B, n n) digits, numpy -> (B, n n) bool.
    """
    n = math.isqrt(boards.shape[1])
    digits = np.ascontiguousarray(boards.T).reshape(n, n, -1)
    bad = (digits < 1) | (digits > n)
    for u, out in zip(units(digits), units(bad)):
        for d in range(1, n + 1):
            out |= (u == d) & ((u == d).sum((0, 1)) > 1)
    return bad.reshape(n * n, -1).T


def canonical(solutions):
    """Relabels digits so that the first row reads 1..n: (B, n n) -> (B, n n) uint8."""
    n = math.isqrt(solutions.shape[1])
    label = np.zeros((len(solutions), n + 1), np.uint8)
    np.put_along_axis(label, solutions[:, :n].astype(int), np.arange(1, n + 1, dtype=np.uint8), 1)
    return np.take_along_axis(label, solutions.astype(int), 1)


def held_out(solutions):
    """Which boards are for testing, about one in 20, by a hash of the canonical board -> (B,)."""
    n = math.isqrt(solutions.shape[1])
    rng = np.random.default_rng(7)                       # of the 12 4x4 boards it holds out 2
    weights = rng.integers(1, 2**63, n * n, dtype=np.uint64) | np.uint64(1)
    keys = [(canonical(part).astype(np.uint64) * weights).sum(1, dtype=np.uint64)
            for part in np.array_split(solutions, len(solutions) // 100_000 + 1)]
    return (np.concatenate(keys) >> np.uint64(40)) % np.uint64(20) == 0


def check_puzzles(puzzles, solutions, where):
    """Raises ValueError naming the first row whose solution breaks a rule or a clue.

    where: row index -> its name.
    """
    changed = ((puzzles != 0) & (puzzles != solutions)).any(1)
    for bad, why in ((violations(solutions).any(1), "its solution breaks the rules"),
                     (changed, "its solution changes a clue")):
        if bad.any():
            raise ValueError(f"{where(bad.argmax())}: {why}")


def read_shah(path):
    """Puzzles of Shah et al. 2024, .npy (N, 325): k, then 81 x (row, column, value, strategy).

    The k givens come first. -> (2, N, 81) uint8: puzzles, solutions. Raises ValueError naming the
    first broken row, counting from 0.
    """
    try:
        raw = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as e:  # a damaged file makes numpy raise almost anything
        raise ValueError(f"{path} is no plain .npy array: {str(e)[:100]!r}") from None
    shape = getattr(raw, "shape", None)
    if shape is None or len(shape) != 2 or shape[1] != 325 or raw.dtype.kind not in "iu":
        raise ValueError(f"{path} must hold an (N, 325) array of integers, not {shape}")
    out = []
    for start in range(0, len(raw), 100_000):
        rows = np.asarray(raw[start:start + 100_000], dtype=np.int64)
        row, column, value, strategy = rows[:, 1:].reshape(-1, 81, 4).transpose(2, 0, 1)
        cell, k = row * 9 + column, rows[:, :1]
        given = np.arange(81) < k                                                # (n, 81)
        good = ((np.sort(cell, 1) == np.arange(81)) & (column >= 0) & (column < 9)
                & (value >= 1) & (value <= 9) & (k >= 1) & ((strategy == 0) == given)).all(1)
        if not good.all():
            raise ValueError(f"{path}, row {start + good.argmin()}: not the givens and then the "
                             "blanks of a puzzle as (row 0-8, column 0-8, value 1-9, strategy)")
        both = np.zeros((2, len(rows), 81), np.uint8)
        np.put_along_axis(both[1], cell, value.astype(np.uint8), 1)
        np.put_along_axis(both[0], cell, np.where(given, value, 0).astype(np.uint8), 1)
        check_puzzles(*both, lambda i: f"{path}, row {start + i}")
        out.append(both)
    return np.concatenate(out, axis=1)


def parse_boards(texts, n, where):
    """Strings of n n characters, 1..n, . or 0 for blanks -> (N, n n) uint8.

    Raises ValueError naming the first broken one. where: index -> its name.
    """
    bad = next((i for i, t in enumerate(texts) if len(t) != n * n or not t.isascii()), None)
    if bad is None:
        cells = np.frombuffer("".join(texts).encode(), np.uint8).reshape(-1, n * n)
        cells = np.where(cells == ord("."), 0, cells - ord("0"))         # wraps below "0"
        if not (cells > n).any():
            return cells
        bad = (cells > n).any(1).argmax()
    text = texts[bad]
    if len(text) != n * n:
        raise ValueError(f"{where(bad)}: a puzzle of {n}x{n} has {n * n} characters, not "
                         f"{len(text)}")
    wrong = next(c for c in text if c not in ".0123456789"[: n + 2])
    raise ValueError(f"{where(bad)}: {wrong!r} is no cell: 1..{n}, or . or 0 for a blank")


def check_size(path, max_gib=MAX_GIB):
    """Raises FileNotFoundError without a file at path, ValueError if it is larger than allowed."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file at {path}")
    have = Path(path).stat().st_size / 2**30
    if not have <= max_gib:                              # nan allows nothing
        raise ValueError(f"{path} has {have:.3g} GiB; train.py's --max-gib allows {max_gib:g}")


def lines_with_boards(path, n):
    """Yields the number and the one or two boards, as strings, of each line of a text file.

    Of the comma-separated fields those of n n characters count; a first line of words is a header.
    """
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        for number, line in enumerate(f, 1):
            fields = [w.strip() for w in line.replace('"', "").split(",")]
            boards = [w for w in fields if len(w) == n * n]
            if boards or line.strip() and not (number == 1 and re.search("[A-Za-z]", line)):
                yield number, (boards or fields)[:2 if boards else 1]


def read_text(path, n):
    """Puzzles of a text or CSV file, one per line, with or without solutions.

    The first board of a line is the puzzle, the second its solution; missing solutions are worked
    out. -> (2, N, n n) uint8. Raises ValueError naming the first broken line.
    """
    rows, out = lines_with_boards(path, n), []
    while part := list(itertools.islice(rows, 100_000)):
        def where(i, part=part):
            return f"{path}, line {part[i][0]}"
        puzzles, solutions = (parse_boards([boards[i] for _, boards in part], n, where)
                              for i in (0, -1))
        alone = np.flatnonzero([len(boards) == 1 for _, boards in part])
        if len(alone):
            solutions[alone], found = solve(puzzles[alone])
            if (found != 1).any():
                i = (found != 1).argmax()
                raise ValueError(f"{where(alone[i])}: the puzzle has "
                                 f"{'several solutions' if found[i] else 'no solution'}")
        check_puzzles(puzzles, solutions, where)
        out.append(np.stack([puzzles, solutions]))
    if not out:
        raise ValueError(f"{path} holds no puzzle of {n * n} characters")
    return np.concatenate(out, axis=1)


def puzzles_to_solve(text, n):
    """A puzzle as a string, or the puzzles of a file -> (N, n n) uint8; need not be unique.

    Raises ValueError on wrong length or characters, or if the clues contradict each other.
    """
    rows = [("the puzzle", [text])]
    if Path(text).is_file():
        check_size(text)
        rows = [(f"{text}, line {i}", boards) for i, boards in lines_with_boards(text, n)]
    if not rows:
        raise ValueError(f"{text} holds no puzzle of {n * n} characters")
    puzzles = parse_boards([boards[0] for _, boards in rows], n, lambda i: rows[i][0])
    for bad, why in (((violations(puzzles) & (puzzles > 0)).any(1),
                      "two equal clues share a row, column or box"),
                     (propagate(to_bits(puzzles))[0], "the clues leave a cell without a digit")):
        if bad.any():
            raise ValueError(f"{rows[bad.argmax()][0]}: {why}")
    return puzzles


def read_puzzles(path, n, max_gib=MAX_GIB):
    """Puzzles and solutions of a file -> (2, N, n n) uint8; .npy: `read_shah`, else `read_text`."""
    check_size(path, math.inf if str(path).endswith(".npy") else max_gib)
    return read_shah(path) if str(path).endswith(".npy") and n == 9 else read_text(path, n)


def cached_puzzles(n, count, seed=0, data_dir=".data"):
    """`generate`, kept in data_dir under version, seed and count, with a checksum beside it."""
    if not 1 <= count <= 10**8:
        raise ValueError(f"the number of puzzles must lie in 1..10^8, not {count}")
    path = Path(data_dir) / f"sudoku{n}x{n}-v{GENERATOR_VERSION}-seed{seed}-{count}.npy"
    note = path.with_suffix(".sha256")
    if path.exists() and note.exists() and note.read_text().strip() == sha256_of(path):
        return np.load(path, allow_pickle=False)
    both = generate(n, count, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    with open(part, "wb") as f:
        np.save(f, both)
    os.replace(part, path)
    part.write_text(sha256_of(path) + "\n")
    os.replace(part, note)
    return both


class Sudoku:
    """Puzzles and their solutions, n x n, n = 4, 6 or 9 (Section 4.3, C.2). Ids: digits, 0 blank.

    layout: prefix, the paper's: puzzle, SEP = n + 1, solution, EOS = n + 2 (164 tokens for n = 9),
        of which the whole solution may be masked; board: the solution alone, its clues given.
    clues: None, those of a puzzle with one solution; K, K random cells: many may be valid.
    source: generated; shah, extreme (n = 9): downloaded to data_dir. data_path: a file instead.
    puzzles: how many to generate, default 100,000.

    Boards whose digits can be relabelled into one another are all for training or all for testing,
    except where the source has its own split.

    Training data are augmented on the fly: digits are relabelled; for n = 9 also bands, rows,
    stacks and columns are permuted and the board is transposed. Smaller boards have so few classes
    under these (2 and 49) that this would turn training boards into test boards.
    """

    name, entropy, vocab, nfe, remask, temperature = "sudoku", None, None, 10, "margin", None
    score_num, bound_num, scored = 1000, 2000, True

    def __init__(self, grid=9, layout="prefix", clues=None, source="generated", puzzles=None,
                 data_path=None, data_dir=".data", max_gib=MAX_GIB):
        if grid not in BOXES or layout not in LAYOUTS or source not in SOURCES:
            raise ValueError(f"grid {grid} must be one of {tuple(BOXES)}, layout {layout!r} of "
                             f"{LAYOUTS}, source {source!r} of {SOURCES}")
        if clues is not None and not 0 <= clues < grid**2:
            raise ValueError(f"clues {clues} must lie in 0..{grid**2 - 1}")
        if source != "generated" and (grid != 9 or data_path):
            raise ValueError(f"source {source} has 9x9 boards (--grid 9) and needs no data_path")
        if puzzles is not None and (source != "generated" or data_path):
            raise ValueError("puzzles is the number to generate; these come from a file")
        self.grid, self.layout, self.clues, self.cells = grid, layout, clues, grid**2
        prefix = layout == "prefix"
        self.vocab_size = grid + 3 if prefix else grid + 1
        self.seq_len = 2 * self.cells + 2 if prefix else self.cells
        self.prefix_len = self.cells + 1 if prefix else 0
        self.source, self.data_path, self.data_dir = source, data_path, data_dir
        self.max_gib = max_gib
        self.puzzles = 100_000 if puzzles is None else puzzles

    @cached_property
    def split(self):
        """Training and test puzzles of a source without a split of its own, (2, N, n n) uint8."""
        every = (read_puzzles(self.data_path, self.grid, self.max_gib) if self.data_path else
                 cached_puzzles(self.grid, self.puzzles, 0, self.data_dir))
        test = held_out(every[1])
        if test.all() or not test.any():
            raise ValueError("too few puzzles: none is left to train on, or none to test on")
        return every[:, ~test], every[:, test]

    def part(self, i):
        """Training (0) or test puzzles (1), puzzle and solution: (2, N, n n) uint8."""
        if self.source == "generated":
            return torch.from_numpy(self.split[i])
        url, file, sha256 = DOWNLOADS[self.source][i]
        path = download(url, Path(self.data_dir) / file, sha256)
        return torch.from_numpy(read_puzzles(path, 9, self.max_gib))

    train_set = cached_property(lambda self: self.part(0))    # read when first needed
    test_set = cached_property(lambda self: self.part(1))

    @property
    def about(self):
        """What there is, in words."""
        train, test = self.train_set, self.test_set
        clues = (train[0] > 0).sum(1).float().mean() if self.clues is None else self.clues
        return (f"{self.grid}x{self.grid}, {train.shape[1]:,} training and {test.shape[1]:,} test "
                f"puzzles, {clues:.1f} clues")

    def batch(self, n, generator=None):
        """n training puzzles drawn with replacement, augmented -> x0 (n, L) int64, given (n, L)."""
        train = self.train_set
        at = torch.randint(train.shape[1], (n,), generator=generator)
        return self.tokens(*self.augment(train[:, at].long(), generator), generator)

    def test(self, n, generator=None):
        """n different held-out puzzles, or all if there are fewer -> x0, given, as `batch`."""
        test = self.test_set
        at = distinct(test.shape[1], n, generator)
        return self.tokens(*test[:, at].long(), generator)

    valid = test  # best.pt is chosen on these: report last.pt

    def augment(self, both, generator=None):
        """Random symmetries, the same for puzzle and solution: (2, n, n n) -> (2, n, n n)."""
        n, B = self.grid, both.shape[1]

        def permutations(count, size):
            return torch.rand(B, count, size, generator=generator).argsort(-1)
        digits = permutations(1, n)[:, 0] + 1
        relabel = torch.cat([torch.zeros(B, 1, dtype=torch.long), digits], dim=1)  # 0 stays blank
        if n == 9:
            rows, columns = ((permutations(1, 3)[:, 0, :, None] * 3 + permutations(3, 3)).view(B, 9)
                             for _ in range(2))          # new row i is old row rows[i]
            cell = rows[:, :, None] * 9 + columns[:, None, :]                    # (B, 9, 9)
            flip = torch.rand(B, 1, 1, generator=generator) < 0.5
            cell = torch.where(flip, cell.transpose(1, 2), cell).reshape(1, B, 81)
            both = both.gather(2, cell.expand(2, -1, -1))
        return relabel[None].expand(2, -1, -1).gather(2, both)

    def tokens(self, puzzle, solution, generator=None):
        """puzzle, solution (n, n n) digits -> x0 (n, L) int64, given (n, L) bool."""
        if self.clues is not None:
            order = torch.rand(solution.shape, generator=generator).argsort(1).argsort(1)
            puzzle = torch.where(order < self.clues, solution, 0)
        if self.layout == "board":
            return solution, puzzle > 0
        sep, eos = (torch.full_like(solution[:, :1], self.grid + i) for i in (1, 2))
        x0 = torch.cat([puzzle, sep, solution, eos], dim=1)
        given = torch.ones_like(x0, dtype=torch.bool)
        given[:, self.prefix_len:-1] = False
        return x0, given

    def boards(self, x, given):
        """Sequences x, given (n, L) -> puzzle, answer (n, n n) digits, 0 for blanks and masks."""
        if self.layout == "board":
            puzzle, answer = torch.where(given, x, 0), x
        else:
            puzzle, answer = x[:, : self.cells], x[:, self.prefix_len:-1]
        return puzzle, torch.where(answer > self.grid, 0, answer)

    def metrics(self, x, x0, given):
        """Answers x for the puzzles of x0 -> shares, each with its standard error (_se).

        exact: equals the solution; valid: keeps rules and clues; cell: of the blank cells, those
        that equal the solution.
        """
        (puzzle, answer), solution = self.boards(x, given), self.boards(x0, given)[1]
        blank = puzzle == 0
        valid = ~torch.from_numpy(violations(answer.numpy()).any(1))
        values = dict(exact=(answer == solution).all(1),
                      valid=valid & (blank | (answer == puzzle)).all(1),
                      cell=((answer == solution) & blank).sum(1) / blank.sum(1).clamp(min=1))
        out = {}
        for k, v in values.items():
            v = v.double()
            out |= {k: v.mean().item(), f"{k}_se": v.std(correction=0).item() / math.sqrt(len(v))}
        return out


def draw_boards(puzzle, answer, color=False):
    """Puzzle and answer side by side as text: ' after clues, ! after violations, _ for blanks.

    puzzle, answer (n n,) digits. color: clues also bold, violations red (ANSI).
    """
    n = math.isqrt(len(puzzle))
    h, w = BOXES[n]
    puzzle, answer = np.asarray(puzzle), np.asarray(answer)
    bad = violations(answer[None])[0] | (puzzle != 0) & (answer != puzzle)

    def cell(digit, mark=" ", code=None):
        text = (str(digit) if digit else "_") + mark
        return f"\033[{code}m{text}\033[0m" if color and code else text

    lines = []
    for i in range(n):
        at = range(i * n, (i + 1) * n)
        left = [cell(puzzle[j], code=1 if puzzle[j] else None) for j in at]
        right = [cell(answer[j], "!", 31) if bad[j] else cell(answer[j], "'", 1) if puzzle[j]
                 else cell(answer[j]) for j in at]
        rows = ["".join(("| " if j and j % w == 0 else "") + c for j, c in enumerate(side))
                for side in (left, right)]
        if i and i % h == 0:
            rule = "+-".join(["--" * w] * (n // w))
            lines.append(f"{rule}   {rule}")
        lines.append("   ".join(rows))
    return "\n".join(lines) + f"\nsolved: {'no' if bad.any() else 'yes'}"


# ---- text

TEXT8 = ("http://mattmahoney.net/dc/text8.zip",
         "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232")
TEXT8_MIRROR = ("https://github.com/RaRe-Technologies/gensim-data/releases/download/text8/text8.gz")
TEXT8_MD5 = "3bea1919949baf155f99411df5fada7e"  # of the 100,000,000 bytes inside
LM1B = ("http://www.statmt.org/lm-benchmark/1-billion-word-language-modeling-benchmark-r13output"
        ".tar.gz", "01ba60381110baf7f189dfd2b8374de371e8c9a340835793f190bdae9e90a34e")
LM1B_FILE = re.compile(  # the held-out shards lie there a second time, before their split in 50
    r"/(?:(training)-monolingual\.tokenized\.shuffled/news\.en-000\d\d-of-00100"
    r"|(heldout)-monolingual\.tokenized\.shuffled/news\.en\.heldout-000\d\d-of-00050)$")
DAMAGED = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, KeyError)
BERT_VOCAB = ("https://huggingface.co/bert-base-uncased/resolve/"
              "86b5e0934494bd15c9632b12f734a8a67f723594/vocab.txt",
              "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3")
ALPHABET = " abcdefghijklmnopqrstuvwxyz"  # text8's 27 symbols
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def to_text8(text):
    """text8's own mapping: lower case, digits spelled out, everything else one space."""
    text = re.sub("[0-9]", lambda m: f" {DIGITS[int(m[0])]} ", text.lower())
    return re.sub("[^a-z]+", " ", text)


def read_text8(data_dir):
    """The 100,000,000 characters of text8 as bytes, downloaded once, from the mirror if need be."""
    path = Path(data_dir) / "text8"
    if not path.exists():
        try:
            packed = download(TEXT8[0], path.with_suffix(".zip"), TEXT8[1])
            with zipfile.ZipFile(packed) as z:
                raw = z.read("text8")                    # by name: no path in the archive is used
        except (OSError, ValueError, *DAMAGED):
            with gzip.open(download(TEXT8_MIRROR, path.with_suffix(".gz"))) as z:
                try:
                    raw = z.read(100_000_001)
                except DAMAGED:
                    raw = b""
        digest = hashlib.md5(raw).hexdigest()
        if digest != TEXT8_MD5:
            raise ValueError(f"text8 has md5 {digest}, not {TEXT8_MD5}: remove {path}.* and retry")
        write_whole(path, raw)
    return path.read_bytes()


def write_whole(path, raw):
    """Writes bytes so that under its own name the file is whole."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(raw)
    os.replace(part, path)


def detokenize(line):
    """Undoes LM1B's tokenisation of one line, with the rules of BD3-LM's pipeline, in its order."""
    line = line.replace("http : / / ", "http://").replace("https : / / ", "https://")
    line = re.sub(r" '(\w+)", r"'\1", line)
    line = re.sub(r" (\w+) \. ", r" \1. ", line)
    line = re.sub(r" (\w+) \.$", r" \1.", line)
    for mark in "?!":
        line = line.replace(f" {mark} ", f"{mark} ")
        line = re.sub(rf" \{mark}$", mark, line)
    for mark in ",:;":
        line = line.replace(f" {mark} ", f"{mark} ")
    line = line.replace(" / ", "/")
    for opening, closing in ('""', "''", "()", "[]"):
        a, b = re.escape(opening), re.escape(closing)
        line = re.sub(rf"{a} ([^{a}{b}]+) {b}", rf"{opening}\1{closing}", line)
    return line.replace("$ ", "$").replace("\u00a3 ", "\u00a3")


class WordPiece:
    """BERT's uncased tokenizer (Devlin et al. 2019): text -> ids of a given vocabulary.

    vocab: list of tokens; must hold [UNK], [CLS], [SEP]. Raises ValueError if it does not.
    """

    def __init__(self, vocab):
        self.vocab, self.ids = vocab, {token: i for i, token in enumerate(vocab)}
        for token in ("[UNK]", "[CLS]", "[SEP]"):
            if token not in self.ids:
                raise ValueError(f"the vocabulary lacks {token}")
        self.unk, self.cls, self.sep = (self.ids[t] for t in ("[UNK]", "[CLS]", "[SEP]"))
        self.word = functools.lru_cache(1 << 20)(self._word)

    def encode(self, text):
        """Ids of a text, without [CLS] and [SEP]."""
        if not text.isascii() or not text.isprintable():
            text = "".join(self._clean(c) for c in text)
        return [i for word in text.split(" ") for i in self.word(word)]

    @staticmethod
    def _clean(c):
        """White space to a space, control characters to nothing, spaces around CJK."""
        if c in "\t\n\r" or unicodedata.category(c).startswith("Z"):
            return " "
        if c in "\0\ufffd" or unicodedata.category(c) in ("Cc", "Cf"):
            return ""
        o = ord(c)
        cjk = (0x4E00 <= o <= 0x9FFF or 0x3400 <= o <= 0x4DBF or 0x20000 <= o <= 0x2A6DF
               or 0x2A700 <= o <= 0x2CEAF or 0xF900 <= o <= 0xFAFF or 0x2F800 <= o <= 0x2FA1F)
        return f" {c} " if cjk else c

    def _word(self, word):
        """Ids of one word: lower case, no accents, split at punctuation, greedy longest match."""
        word = unicodedata.normalize("NFD", word.lower())
        word = "".join(c for c in word if unicodedata.category(c) != "Mn")
        out = []
        for piece in re.split(r"([!-/:-@\[-`{-~])", word) if word.isascii() else self._split(word):
            out += self._match(piece) if piece else []
        return tuple(out)

    @staticmethod
    def _split(word):
        """Splits at ASCII and Unicode punctuation."""
        out = [""]
        for c in word:
            if unicodedata.category(c).startswith("P") or c.isascii() and not c.isalnum() and (
                    c.isprintable()):
                out += [c, ""]
            else:
                out[-1] += c
        return out

    def _match(self, piece):
        """Greedy longest match first, ## after the first part; [UNK] where nothing matches."""
        if len(piece) > 100:
            return [self.unk]
        out, start = [], 0
        while start < len(piece):
            for end in range(len(piece), start, -1):
                i = self.ids.get(("##" if start else "") + piece[start:end])
                if i is not None:
                    break
            else:
                return [self.unk]
            out.append(i)
            start = end
        return out


def read_lm1b(data_dir):
    """LM1B as BERT WordPiece ids -> training and held-out tokens (uint16 memmaps), vocabulary.

    Lines are detokenised, encoded, closed with [SEP] and concatenated, as in BD3-LM's pipeline.
    The archive is read as a stream: nothing in it is extracted, no path in it is used.
    """
    folder = Path(data_dir)
    paths = [folder / f"lm1b-{split}.uint16" for split in ("train", "heldout")]
    vocab_file = download(BERT_VOCAB[0], folder / "bert-base-uncased-vocab.txt", BERT_VOCAB[1])
    vocab = vocab_file.read_text(encoding="utf-8").splitlines()
    if not all(p.exists() for p in paths):
        archive, pieces = download(LM1B[0], folder / "lm1b.tar.gz", LM1B[1]), WordPiece(vocab)
        parts = [p.with_name(f"{p.name}.{os.getpid()}.part") for p in paths]
        try:
            encode_lm1b(archive, pieces, *parts)
            for part, path in zip(parts, paths):
                os.replace(part, path)
        except DAMAGED as e:
            raise ValueError(f"{archive} is damaged ({type(e).__name__}): remove it") from None
        finally:
            for part in parts:
                part.unlink(missing_ok=True)
    return *(np.memmap(p, np.uint16, "r") for p in paths), vocab


def encode_lm1b(archive, pieces, train_path, held_path):
    """Writes the ids of the archive's training and held-out lines to two files, uint16."""
    with (open(train_path, "wb") as train, open(held_path, "wb") as held,
          tarfile.open(archive, mode="r|gz") as tar,
          tqdm(total=30_607_716, unit="line", desc="encoding LM1B", disable=None) as bar):
        for member in tar:
            where = LM1B_FILE.search(member.name)
            if where is None or not member.isfile():
                continue
            out = train if where[1] else held
            for line in tar.extractfile(member):
                ids = pieces.encode(detokenize(line.decode("utf-8").rstrip("\n")))
                out.write(np.array([*ids, pieces.sep], np.uint16).tobytes())
                bar.update()


class Text:
    """Chunks of L tokens, not overlapping, of a long text (Section 4.4, C.3). Ids index `vocab`.

    length: L, default 256, of lm1b 128.
    text8: 27 characters, 90 / 5 / 5 million for training, validation, test. lm1b: BERT WordPiece,
    [CLS] + L - 2 tokens + [SEP]; the held-out set is the test set, the last hundredth of the
    training set is for validation. text: the characters of a UTF-8 file, 90 / 5 / 5 %, or, with
    alphabet="text8", its letters as text8 has them.
    vocab: encode with this one instead of the text's own (a checkpoint's).
    """

    entropy, prefix_len, nfe, remask, temperature = None, 0, 4, "random", 1.0
    score_num, bound_num, scored = 256, 2000, False

    def __init__(self, name, length=None, data_path=None, alphabet=None, vocab=None,
                 data_dir=".data", max_gib=MAX_GIB):
        default = 128 if name == "lm1b" else 256
        self.name, L = name, default if length is None else length
        if L < (3 if name == "lm1b" else 1):
            raise ValueError(f"length {L} is too short")
        if name == "lm1b":
            train, test, self.vocab = read_lm1b(data_dir)
            cut = len(train) - len(train) // 100
            splits, width = (train[:cut], train[cut:], test), L - 2
        elif name == "text8":
            raw = np.frombuffer(read_text8(data_dir), np.uint8)
            ids = np.where(raw == 32, 0, raw - 96).astype(np.uint8)
            self.vocab, width = list(ALPHABET), L
            splits = ids[:90_000_000], ids[90_000_000:95_000_000], ids[95_000_000:]
        else:
            ids, self.vocab = self.read_file(data_path, alphabet, vocab, max_gib)
            width, n = L, len(ids)
            splits = ids[: n * 90 // 100], ids[n * 90 // 100: n * 95 // 100], ids[n * 95 // 100:]
        self.vocab_size, self.seq_len = len(self.vocab), L
        self.splits = [s[: len(s) // width * width].reshape(-1, width) for s in splits]
        if not min(map(len, self.splits)):
            raise ValueError(f"too little text: training, validation and test need {width} tokens "
                             f"each and have {', '.join(str(len(s)) for s in splits)}")

    @staticmethod
    def read_file(path, alphabet, vocab, max_gib):
        """Characters of a UTF-8 file -> ids (n,), vocabulary."""
        if not path:
            raise ValueError("dataset text needs --data-path FILE")
        check_size(path, max_gib)
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise ValueError(f"{path} is not UTF-8: {e.reason} at byte {e.start}") from None
        if alphabet == "text8":
            text, vocab = to_text8(text), list(ALPHABET)
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        seen = np.zeros(0x110000, bool)
        seen[points] = True
        vocab = [chr(i) for i in np.flatnonzero(seen)] if vocab is None else vocab
        place = np.zeros(0x110000, np.uint8 if len(vocab) <= 256 else np.int32)
        known = [ord(c) for c in vocab]
        place[known], seen[known] = np.arange(len(vocab)), False
        if seen.any():
            raise ValueError(f"{path} has {chr(seen.argmax())!r}, which is not in the vocabulary "
                             "of the model")
        return place[points], vocab

    @property
    def about(self):
        """What there is, in words."""
        counts = (f"{len(s):,} {what}" for s, what in zip(self.splits, ("training", "validation",
                                                                        "test")))
        return ", ".join(counts) + " chunks"

    def rows(self, split, at):
        """Chunks by number -> x0 (n, L) int64, None."""
        x = torch.from_numpy(self.splits[split][at.numpy()].astype(np.int64))
        if self.name == "lm1b":
            cls, sep = (torch.full_like(x[:, :1], self.vocab.index(t)) for t in ("[CLS]", "[SEP]"))
            x = torch.cat([cls, x, sep], dim=1)
        return x, None

    def batch(self, n, generator=None):
        """n training chunks drawn with replacement -> x0 (n, L) int64, None."""
        return self.rows(0, torch.randint(len(self.splits[0]), (n,), generator=generator))

    def valid(self, n, generator=None):
        """n different validation chunks, or all if there are fewer -> as `batch`."""
        return self.rows(1, distinct(len(self.splits[1]), n, generator))

    def test(self, n, generator=None):
        """n different test chunks, or all if there are fewer -> as `batch`."""
        return self.rows(2, distinct(len(self.splits[2]), n, generator))

    def metrics(self, x, x0=None, given=None):
        """Samples x (n, L) -> unigram entropy of a sample, nats, mean and deviation (Table 5);
        distinct4: of all 4-grams of tokens in the samples, the share that are different.
        """
        p = torch.stack([torch.bincount(row, minlength=self.vocab_size) for row in x]) / x.shape[1]
        entropy = -torch.special.xlogy(p, p).sum(1)
        grams = x.unfold(1, min(4, x.shape[1]), 1).flatten(0, 1)
        return dict(entropy=entropy.mean().item(), entropy_sd=entropy.std(correction=0).item(),
                    distinct4=len(torch.unique(grams, dim=0)) / len(grams))


def distinct(have, n, generator=None):
    """n different numbers below `have` in random order, or all if there are fewer."""
    return torch.randperm(have, generator=generator)[:n]


# ---- downloads

TIMEOUT = 30  # seconds without an answer, or without another byte


def sha256_of(path):
    """Hex digest of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def download(url, path, sha256=None, tries=4):
    """Fetches url to path unless it is there -> path.

    Streams to PATH.part, goes on from there after an interruption (Range), checks the sha256, then
    renames: under its own name a file is whole. Without a known sha256, that of the first download
    is kept beside it, and wanted of a later one. Retries with back-off. Raises OSError, or
    ValueError on wrong content.
    """
    path = Path(path)
    note = path.with_name(path.name + ".sha256")
    if sha256 is None and note.exists():
        sha256 = note.read_text().strip()
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    for i in range(tries):
        try:
            fetch(url, part)
            break
        except requests.HTTPError as e:
            code = e.response.status_code
            if i + 1 == tries or code < 500 and code not in (416, 429):
                raise OSError(f"cannot download {url}: HTTP status {code}") from None
        except requests.RequestException as e:
            if i + 1 == tries:
                raise OSError(f"cannot download {url}: {type(e).__name__}; what came so far is "
                              f"kept in {part}") from None
        time.sleep(2**i)
    digest = sha256_of(part)
    if sha256 not in (None, digest):
        part.unlink()
        raise ValueError(f"{url} has sha256 {digest}, not {sha256}; the file is not kept")
    if sha256 is None:
        note.write_text(digest + "\n")
    os.replace(part, path)
    return path


def fetch(url, part):
    """One attempt of `download`: appends to `part` what is missing. Raises requests' exceptions."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as r:
        if r.status_code == 416:                         # nothing follows: whole, or not its start
            if r.headers.get("Content-Range", "").endswith(f"/{have}"):
                return
            part.unlink(missing_ok=True)
        r.raise_for_status()
        if "html" in r.headers.get("Content-Type", ""):
            raise ValueError(f"{url} answered with a web page, not with the file: see it in a "
                             "browser (a quota, a login)")
        resumed = r.status_code == 206 and r.headers.get("Content-Range", "").startswith(
            f"bytes {have}-")
        if r.status_code == 206 and not resumed:
            part.unlink(missing_ok=True)
            raise requests.ConnectionError("a range that was not asked for")
        have = have if resumed else 0
        length = r.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        with open(part, "ab" if resumed else "wb") as f, tqdm(
                total=total, initial=have, unit="B", unit_scale=True, desc=part.stem,
                disable=None) as bar:
            for chunk in r.iter_content(1 << 16):
                f.write(chunk)
                bar.update(len(chunk))
            got = f.tell()
        if total is not None and got != total:
            raise requests.ConnectionError(f"{got} bytes of {total}")


def check_output(path):
    """Raises OSError or ValueError unless `path`, a file to be written later, can be one."""
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path} to")
    if path.is_dir() or "\0" in str(path):
        raise ValueError(f"{path} is no file that can be written")


def options(args):
    """The options of `load` that settings (a dict, as in a checkpoint) hold for their dataset."""
    return {k: args[k] for k in OPTIONS.get(args.get("dataset"), ()) if args.get(k) is not None}


def load(name, vocab=None, **given):
    """Dataset by name. Options, all with defaults but data_path of array and text:

    strength: p of pairs_strength, 0..1; length: L of needle; data_path, vocab_size: of `Array`;
    grid, layout, clues, source, puzzles, data_path, data_dir, max_gib: of `Sudoku`; length,
    data_path, alphabet, data_dir, max_gib, and vocab, where a checkpoint fixes it: of `Text`.
    Raises ValueError on an unknown name, an option of another dataset or an impossible value.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset {name!r} is not one of {', '.join(DATASETS)}")
    for k in given:
        if k not in OPTIONS.get(name, ()):
            owners = ", ".join(d for d in DATASETS if k in OPTIONS.get(d, ())) or "no dataset"
            raise ValueError(f"{k} is an option of {owners}, not of {name}")
        if given[k] is not None and not isinstance(given[k], TYPES.get(k, int)):
            raise ValueError(f"{k} cannot be {given[k]!r}")
    V, k = 10, torch.arange(10)[:, None]
    run = (k + torch.arange(4)) % V  # (10, 4): c, c+1, c+2, c+3
    if name == "sudoku":
        return Sudoku(**given)
    if name in ("text8", "lm1b", "text"):
        return Text(name, vocab=vocab, **given)
    if name == "array":
        return Array(given.get("data_path"), given.get("vocab_size"))
    if name == "pairs":
        return Synthetic(name, run[:, :2])
    if name == "pairs_nonuniform":
        return Synthetic(name, run[:, :2], torch.arange(1, 11) / 55)
    if name == "d1":
        return Synthetic(name, run)
    if name == "d2":
        first, second = run[:, :2].repeat_interleave(V, 0), run[:, :2].repeat(V, 1)
        return Synthetic(name, torch.cat([first, second], 1))
    if name == "needle":
        length = given.get("length", 20)
        if not 8 <= length <= 10**6:
            raise ValueError(f"length of needle must lie in 8..10^6, not {length}")
        return Synthetic(name, torch.cat([run, torch.full((V, length - 8), -1), run], 1))
    strength = given.get("strength", 1.0)
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in 0..1, not {strength}")
    table = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    succ = table[:, 1] == (table[:, 0] + 1) % V
    return Synthetic(name, table, torch.where(succ, strength, (1 - strength) / (V - 1)) / V)


def show(x, vocab_size, vocab=None):
    """One line per sequence: ids separated by spaces, or text; _ for the mask. x (n, L)."""
    return "\n".join(line.replace("\n", "\\n") for line in texts(x, vocab_size, vocab))


def texts(x, vocab_size, vocab=None):
    """As `show`, but a list of strings with line breaks as they are."""
    names = [*(vocab or map(str, range(vocab_size))), "_"]
    words = [[names[v] for v in row] for row in x.tolist()]
    if vocab is None or "[CLS]" in vocab:
        return [" ".join(w).replace(" ##", "") for w in words]
    return ["".join(w) for w in words]


def encode(text, vocab, blank=False):
    """Text -> ids (n,), as `Text` has them; blank: _ stands for the mask. Raises ValueError."""
    if "[CLS]" in vocab:
        pieces = WordPiece(vocab)
        parts = re.split("(_)", text) if blank else [text]
        ids = [i for p in parts for i in ([len(vocab)] if blank and p == "_" else pieces.encode(p))]
        return torch.tensor([pieces.cls, *ids])
    place = {c: i for i, c in enumerate(vocab)} | ({"_": len(vocab)} if blank else {})
    for c in text:
        if c not in place:
            raise ValueError(f"{c!r} is not among the {len(vocab)} characters of the model")
    return torch.tensor([place[c] for c in text], dtype=torch.long)


def parse(text, seq_len, vocab_size):
    """The inverse of `show` for one line, "3 _" -> (L,) ids. Raises ValueError."""
    words = text.split()
    if len(words) != seq_len:
        raise ValueError(f"{text!r} has {len(words)} tokens, not {seq_len}; _ stands for a blank")
    for w in words:
        if w != "_" and not (w.isascii() and w.isdigit() and int(w) < vocab_size):
            raise ValueError(f"token {w!r} is neither _ nor an id in 0..{vocab_size - 1}")
    return torch.tensor([vocab_size if w == "_" else int(w) for w in words])
