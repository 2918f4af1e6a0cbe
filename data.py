"""Datasets: synthetic (Sections 4.1, 4.2, D.2), Sudoku (4.3), text (4.4), integer arrays of yours.

    ds = load("pairs")                               # or load("sudoku", grid=6, layout="board")
    x0, given = ds.batch(512, torch.Generator())     # (512, L) int64 and bool
    ds.metrics(samples)                              # {"acc": 0.993, "kl": 0.011}

Every dataset has
    name, about         its name, and what there is in words
    vocab_size          V, without the mask, whose id is V
    vocab               list of V strings, or None where ids are numbers
    seq_len             L
    prefix_len          tokens at the start of a sequence that are always given
    places              L lists of numbers, what a position has in common with others (its row), or
                        None
    entropy             of a sequence, nats, or None where it is not known
    scored              whether its metrics are worth watching during training
    batch               (n, generator, split) -> x0 (n, L) ids, given (n, L) bool: tokens that are
                        never masked; split: train, valid (to choose a model by), test (to report)
    metrics             (x, x0, given) -> scores of samples x drawn for test sequences x0
At the end stands what the three scripts share, flags and errors. Imports nothing of this project:
copy it.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import itertools
import math
import os
import re
import sys
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import requests
import torch
from tqdm import tqdm

SYNTHETIC = ("pairs", "pairs_nonuniform", "pairs_strength", "d1", "d2", "needle")
TEXT = ("text8", "lm1b", "text")
DATASETS = SYNTHETIC + ("sudoku", *TEXT, "array")
OPTIONS = {  # what `load` takes, by dataset
    "pairs_strength": ("strength",),
    "needle": ("length",),
    "sudoku": ("grid", "layout", "clues", "source", "puzzles", "data_path", "data_dir"),
    "text8": ("length", "data_dir"),
    "lm1b": ("length", "data_dir"),
    "text": ("length", "data_path", "alphabet"),
    "array": ("data_path", "vocab_size", "prefix_len"),
}
# How each is scored if nothing else is asked for: evaluations per block, order and temperature of
# unmasking (None: the sampler's own), samples to score, test sequences for likelihood bounds
SCORING = dict.fromkeys(SYNTHETIC, dict(
    nfe=1, remask="prob", temperature=None, num=20_000, bound_num=20_000)) | {
    "array": dict(nfe=1, remask="prob", temperature=None, num=1000, bound_num=20_000),
    "sudoku": dict(nfe=10, remask="margin", temperature=None, num=1000, bound_num=2000),
} | dict.fromkeys(TEXT, dict(nfe=4, remask="random", temperature=1.0, num=256, bound_num=2000))
KL_FLOOR = 1e-12  # least generated probability; the paper's 25.3 is log(0.1 / 1e-12)


def choose_rows(have, n, split, generator=None):
    """n numbers of rows below `have`: for train with replacement, else different ones, or all."""
    if split == "train":
        return torch.randint(have, (n,), generator=generator)
    return torch.randperm(have, generator=generator)[:n]


def mean_and_error(**values):
    """Means of values (n,), each with its standard error as name_se."""
    out = {}
    for name, v in values.items():
        out[name] = v.double().mean().item()
        out[f"{name}_se"] = v.double().std(correction=0).item() / math.sqrt(len(v))
    return out


class Synthetic:
    """A known distribution over rows of a table (S, L) of ids; -1: a token of uniform noise."""

    vocab_size = 10
    vocab = places = None
    prefix_len = 0
    scored = True

    def __init__(self, name, table, probs=None):
        self.name = name
        self.table = torch.as_tensor(table)
        self.seq_len = self.table.shape[1]
        self.fixed = (self.table >= 0).all(0)            # (L,) bool
        probs = torch.ones(len(table)) if probs is None else torch.as_tensor(probs)
        self.probs = probs.double() / probs.double().sum()
        free = int((~self.fixed).sum())                  # tokens of noise
        plogp = torch.special.xlogy(self.probs, self.probs).sum()
        self.entropy = free * math.log(self.vocab_size) - float(plogp)
        self.about = f"entropy {self.entropy:.4f} nats"

    def batch(self, n, generator=None, split=None):
        """n fresh sequences -> x0 (n, L) int64, given (n, L) bool: nothing is."""
        x = self.table[torch.multinomial(self.probs, n, replacement=True, generator=generator)]
        if not self.fixed.all():
            noise = torch.randint(self.vocab_size, x.shape, generator=generator)
            x = torch.where(x < 0, noise, x)
        return x, torch.zeros_like(x, dtype=torch.bool)

    def metrics(self, x, x0=None, given=None):
        """Samples x (n, L) -> acc, the share that matches a row; kl, KL(true || generated)."""
        match = (x[:, None, self.fixed] == self.table[:, self.fixed]).all(-1)       # (n, S)
        p, generated = self.probs, match.double().sum(0) / len(x)
        match = match[:, p > 0]
        kl = torch.special.xlogy(p, p) - torch.special.xlogy(p, generated.clamp(min=KL_FLOOR))
        return {"acc": match.any(1).double().mean().item(), "kl": kl.sum().item()}

    def joint(self, x):
        """Two-token data only: samples x (n, 2) -> (10, 10) joint frequencies."""
        V = self.vocab_size
        return torch.bincount(x[:, 0] * V + x[:, 1], minlength=V * V).view(V, V).double() / len(x)

    def true_joint(self):
        """Two-token data only: (10, 10) true probabilities."""
        out = torch.zeros(self.vocab_size, self.vocab_size, dtype=torch.float64)
        return out.index_put((self.table[:, 0], self.table[:, 1]), self.probs)


def synthetic(name, strength=1.0, length=20):
    """A synthetic dataset; strength: p of pairs_strength, 0..1; length: L of needle."""
    V, digit = 10, torch.arange(10)
    run = (digit[:, None] + torch.arange(4)) % V             # (10, 4): c, c+1, c+2, c+3
    pair = run[:, :2]
    if name == "pairs":
        return Synthetic(name, pair)
    if name == "pairs_nonuniform":
        return Synthetic(name, pair, (digit + 1) / 55)
    if name == "d1":
        return Synthetic(name, run)
    if name == "d2":                                     # two pairs, independent of each other
        return Synthetic(name, torch.cat([pair.repeat_interleave(V, 0), pair.repeat(V, 1)], 1))
    if name == "needle":
        if not 8 <= length <= 10**6:
            raise ValueError(f"length of needle must lie in 8..10^6, not {length}")
        return Synthetic(name, torch.cat([run, torch.full((V, length - 8), -1), run], 1))
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in 0..1, not {strength}")
    table = torch.cartesian_prod(digit, digit)
    successor = table[:, 1] == (table[:, 0] + 1) % V
    return Synthetic(name, table, torch.where(successor, strength, (1 - strength) / (V - 1)) / V)


class Rows:
    """Sequences that are the rows of arrays of ids: an array of yours, or a text cut into chunks.

    splits: arrays (N, L) by name: train, valid, test. vocab: names of the ids, if they have any.
    prefix_len: that many tokens at the start are given. ends: two ids around every row.
    """

    entropy = places = None

    def __init__(self, name, splits, vocab_size, vocab=None, prefix_len=0, ends=()):
        self.name, self.splits, self.ends = name, splits, ends
        self.vocab_size, self.vocab, self.prefix_len = vocab_size, vocab, prefix_len
        self.seq_len = splits["train"].shape[1] + len(ends)
        self.scored = prefix_len > 0                     # else there is no right answer
        self.about = f"{len(splits['train']):,} training, {len(splits['test']):,} test sequences"

    def batch(self, n, generator=None, split="train"):
        """n rows, of train with replacement, else different ones -> x0, given, each (n, L)."""
        rows = self.splits[split]
        at = choose_rows(len(rows), n, split, generator).numpy()
        x = torch.from_numpy(rows[at].astype(np.int64))
        if self.ends:
            first, last = (torch.full_like(x[:, :1], i) for i in self.ends)
            x = torch.cat([first, x, last], dim=1)
        return x, (torch.arange(self.seq_len) < self.prefix_len).repeat(len(x), 1)

    def metrics(self, x, x0=None, given=None):
        """Scores of samples x (n, L).

        With a prefix exact: share of rows that are right behind it, exact_se its standard error.
        Of texts entropy: of a sample's unigrams, nats, mean and deviation (Table 5); distinct4: of
        all 4-grams of tokens, the share that are different.
        """
        if self.prefix_len:
            return mean_and_error(exact=(x == x0)[:, self.prefix_len:].all(1))
        if self.vocab is None:
            return {}
        p = torch.stack([torch.bincount(row, minlength=self.vocab_size) for row in x]) / x.shape[1]
        entropy = -torch.special.xlogy(p, p).sum(1)
        grams = x.unfold(1, min(4, x.shape[1]), 1).flatten(0, 1)
        return dict(entropy=entropy.mean().item(), entropy_sd=entropy.std(correction=0).item(),
                    distinct4=len(torch.unique(grams, dim=0)) / len(grams))


def array_rows(data_path, vocab_size=None, prefix_len=0):
    """The rows of an integer .npy array (N, L), of which the first prefix_len tokens are given.

    One row in ten, at least two, is held out for testing, by a fixed permutation; best.pt is chosen
    on the same rows: report last.pt. V is the largest id plus one unless vocab_size says more.
    Raises FileNotFoundError, ValueError.
    """
    x = load_array(data_path)
    N, L = x.shape
    if N < 3 or L < 1:
        raise ValueError(f"{data_path} must hold at least three rows of one token, not {N, L}")
    if not 0 <= prefix_len < L:
        raise ValueError(f"the prefix length must lie in 0..{L - 1}, not {prefix_len}")
    V = int(x.max()) + 1 if vocab_size is None else vocab_size
    if x.min() < 0 or x.max() >= V:
        raise ValueError(f"{data_path} has ids {x.min()}..{x.max()}, not all in 0..{V - 1}")
    order, held = np.random.default_rng(0).permutation(N), max(2, N // 10)
    train, test = x[order[held:]], x[order[:held]]
    return Rows("array", dict(train=train, valid=test, test=test), V, prefix_len=prefix_len)


# ---- Sudoku. Boards in numpy: one uint16 of candidate bits per cell, (n, n, B), B contiguous

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # rows and columns of a box of an n x n board
LAYOUTS = ("prefix", "board")
SOURCES = ("generated", "shah")
BOARDS_AT_ONCE = 512  # generated together
GENERATOR_VERSION = 1  # part of the name of cached puzzles: raise it when the generator changes
SHAH_URL = "https://drive.usercontent.google.com/download?id={}&export=download&confirm=t"
SHAH = (  # id and file name of training and test puzzles
    ("1msLy7AXAr4VBXXv7Xfkc_IG3E7retWza", "sudoku-train-data.npy"),
    ("1HlKFzrkhMUAOoDU9qGUjkMD6IjlT40v7", "sudoku-test-data.npy"))


def units(c):
    """Views of boards c (n, n, B) by rows, columns, boxes: axes 0, 1 run over a unit's cells."""
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
        for cells in u:
            for cell in cells:
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
    """Of each board (n, n, B) an undecided cell with the fewest candidates -> (B,) cell numbers.

    The first of such cells; with rng a random one.
    """
    size = np.bitwise_count(c.reshape(len(c) ** 2, -1))
    noise = 0 if rng is None else rng.random(size.shape, dtype=np.float32)
    return np.where(size > 1, size + noise, 99).argmin(0)


def random_grids(n, count, rng):
    """Solved boards by random guesses -> candidate bits (n, n, count); not exactly uniform."""
    B, done, out = min(count, 256), 0, []
    c = np.full((n, n, B), 2**n - 1, np.uint16)
    while done < count:
        broken, solved = propagate(c)
        out.append(c[:, :, solved])
        done += solved.sum()
        c[:, :, broken | solved] = 2**n - 1              # begin another board
        flat, b = c.reshape(n * n, B), np.arange(B)
        cell = narrowest(c, rng)
        possible = flat[cell, b] >> np.arange(n)[:, None] & 1            # (n, B) of 0, 1
        skip = (rng.random(B) * possible.sum(0)).astype(int)             # candidates before it
        flat[cell, b] = 1 << (possible.cumsum(0) > skip).argmax(0)
    out = np.concatenate(out, axis=2)
    return out[:, :, rng.permutation(out.shape[2])[:count]]  # not the quick ones first


def dig(solution, rng):
    """Empties cells in random order unless singles no longer lead back to the cell's digit.

    So naked and hidden singles solve every puzzle. solution (n, n, B) bits -> digits (B, n n).
    """
    n, B = len(solution), solution.shape[2]
    clues, everything = solution.reshape(n * n, B).copy(), np.uint16(2**n - 1)
    for cells in rng.permuted(np.tile(np.arange(n * n)[:, None], (1, B)), axis=0):
        cell, b = cells, np.arange(B)
        digit = clues[cell, b]
        c = np.where(clues, clues, everything)
        c[cell, b] = everything
        while len(b):                                    # boards that are settled leave the batch
            before = c.copy()
            narrow(c.reshape(n, n, -1))
            found = c[cell, np.arange(len(b))] == digit[b]
            clues[cell[found], b[found]] = 0
            on = ~found & (c != before).any(0)
            b, cell, c = b[on], cell[on], np.compress(on, c, axis=1)     # it stays contiguous
    return np.where(clues.T, to_digits(solution), 0)


def generate(n, count):
    """Puzzles with one solution, and these -> (2, count, n n) uint8, 0 for blanks.

    About 24.6 clues for n = 9, 10.1 for 6, 4.3 for 4.
    """
    out = []
    with tqdm(total=count, desc=f"generating {n}x{n} puzzles", unit="puzzle", disable=None) as bar:
        for i in range(0, count, BOARDS_AT_ONCE):        # a larger count begins with the same ones
            rng = np.random.default_rng([GENERATOR_VERSION, 0, i])
            grids = random_grids(n, BOARDS_AT_ONCE, rng)
            out.append(np.stack([dig(grids, rng), to_digits(grids)]))
            bar.update(min(BOARDS_AT_ONCE, count - i))
    return np.concatenate(out, axis=1)[:, :count]


def solve(puzzles, limit=2):
    """Puzzles (B, n n), 0 for blanks -> a solution of each (B, n n) uint8, their number (B,).

    Depth first, all puzzles at once; counts no further than `limit`.
    """
    n = math.isqrt(puzzles.shape[1])
    out, found = np.zeros_like(puzzles, dtype=np.uint8), np.zeros(len(puzzles), int)
    parts = np.array_split(np.arange(len(puzzles)), len(puzzles) // 1000 + 1)     # to fit memory
    stack = [(owner, to_bits(puzzles[owner])) for owner in parts]
    while stack:
        owner, c = stack.pop()                           # no puzzle is twice in an owner
        broken, solved = propagate(c)
        out[owner[solved]] = to_digits(c[:, :, solved])
        found[owner[solved]] += 1
        on = ~broken & ~solved & (found[owner] < limit)
        if on.any():
            owner, c = owner[on], c[:, :, on]
            cell, b = narrowest(c), np.arange(len(owner))
            bits = c.reshape(n * n, -1)[cell, b]
            for guess in (bits & -bits, bits & (bits - 1)):    # its first candidate, or another
                child = c.copy()
                child.reshape(n * n, -1)[cell, b] = guess
                stack.append((owner, child))
    return out, np.minimum(found, limit)


def violations(boards):
    """Boards (B, n n), numpy -> cells that are blank or repeat a digit of a unit (B, n n) bool."""
    n = math.isqrt(boards.shape[1])
    digits = np.ascontiguousarray(boards.T).reshape(n, n, -1)
    bad = (digits < 1) | (digits > n)
    for u, out in zip(units(digits), units(bad)):
        for d in range(1, n + 1):
            out |= (u == d) & ((u == d).sum((0, 1)) > 1)
    return bad.reshape(n * n, -1).T


def held_out(solutions):
    """Which boards (B, n n) are for testing, about one in 20, of 4x4 one in six -> (B,).

    By a hash of the board with its digits renamed so that the first row reads 1..n.
    """
    n, keys = math.isqrt(solutions.shape[1]), []
    rng = np.random.default_rng(7)                       # it holds out 2 of the 12 4x4 classes
    weights = rng.integers(1, 2**63, n * n, dtype=np.uint64) | np.uint64(1)
    for part in np.array_split(solutions, len(solutions) // 100_000 + 1):  # 64 bits a cell: large
        name = part[:, :n].argsort(1).astype(np.uint8) + 1   # of 1, 2, ...: its place in the row
        keys.append(np.take_along_axis(name, part.astype(int) - 1, 1) @ weights)
    return (np.concatenate(keys) >> np.uint64(40)) % np.uint64(20) == 0


def refuse(bad, where, numbers, why):
    """Raises ValueError naming the first row of bad (N,) bool: "x.csv, line 4: why"."""
    if bad.any():
        raise ValueError(f"{where} {numbers[bad.argmax()]}: {why}")


def read_shah(path):
    """Puzzles of Shah et al. 2024, .npy (N, 325): k, then 81 x (row, column, value, strategy).

    The k givens come first, with strategy 0. -> (2, N, 81) uint8. Raises ValueError.
    """
    raw = load_array(path)
    if raw.shape[1] != 325 or len(raw) == 0:
        raise ValueError(f"{path} must have 325 columns and one row or more, not {raw.shape}")
    both = np.zeros((2, len(raw), 81), np.uint8)
    for start in range(0, len(raw), 100_000):            # in parts: int64 is large
        rows = np.asarray(raw[start:start + 100_000], dtype=np.int64)
        row, column, value, strategy = rows[:, 1:].reshape(-1, 81, 4).transpose(2, 0, 1)
        cell = row * 9 + column
        given = np.arange(81) < rows[:, :1]                                      # (n, 81)
        good = ((np.sort(cell, 1) == np.arange(81))      # every cell once
                & (column == column.clip(0, 8)) & (value == value.clip(1, 9))
                & given[:, :1] & (given == (strategy == 0)))
        refuse(~good.all(1), f"{path}, row", range(start, len(raw)), "not the givens and then the "
               "blanks of a puzzle as (row 0-8, column 0-8, value 1-9, strategy)")
        puzzles, solutions = both[:, start:start + len(rows)]
        np.put_along_axis(solutions, cell, value, 1)
        np.put_along_axis(puzzles, cell, np.where(given, value, 0), 1)
    return both


FOREIGN = re.compile(r"[^\d._*xX]")  # to a board of any size
TEXT_FILE = dict(encoding="utf-8-sig", errors="replace")
BLANKS = bytes.maketrans(b"._*xX", b"00000")


def read_boards(lines, n, name):
    """Boards in lines of text -> numbers of the lines they begin on, boards (2, N, n n) uint8.

    A word of n n cells is a board; a cell is 1..n, or 0 . _ * x for a blank. In a line without such
    a word the cells are a row of n, or a row of each of two boards side by side (as `draw_boards`
    prints them), or one or two whole boards. Of a line the first board is the puzzle, the second
    its solution, 0 where there is none. Lines with other letters are titles, other signs are
    nothing but space. Raises ValueError naming the first line that is wrong.
    """
    size, foreign = n * n, re.compile(rf"[^0-{n}._*xX]")
    numbers, cells = [], bytearray()
    puzzle = solution = ""
    # "end of file" is a line that has no place in a board that is not finished
    for number, line in enumerate(itertools.chain(lines, ["end of file"]), 1):
        words = re.findall(r"[\w.*]+", line)
        boards = [w for w in words if len(FOREIGN.sub("", w)) > size / 2]   # or meant to be
        row, before = "".join(words), len(puzzle)
        if boards:
            left, right = boards[0], "".join(boards[1:2])
        elif FOREIGN.search(row) and not puzzle:         # a title
            continue
        else:
            half = len(row) // 2 if len(row) in (2 * n, 2 * size) else len(row)
            left, right = row[:half], row[half:]
        if left and not puzzle:
            numbers.append(number)
        puzzle, solution = puzzle + left, solution + right
        if (foreign.search(left + right) or len(left) not in (0, n, size) or len(puzzle) > size
                or len(solution) not in (0, len(puzzle))):
            raise ValueError(f"{name}, line {number}: {line.strip()[:40]!r} has no place after "
                             f"{before} cells: a {n}x{n} puzzle has {size}, in rows of {n} or in "
                             f"one; a cell is 1..{n}, or 0 . _ * x for a blank")
        if len(puzzle) == size:
            cells += (puzzle + (solution or "0" * size)).encode()
            puzzle = solution = ""
    if not numbers:
        raise ValueError(f"{name} holds no {n}x{n} puzzle")
    digits = np.frombuffer(cells.translate(BLANKS), np.uint8) - ord("0")
    return np.array(numbers), digits.reshape(-1, 2, size).transpose(1, 0, 2)


def read_puzzles(path, n):
    """Puzzles and solutions of a file -> (2, N, n n) uint8; .npy: `read_shah`, else `read_boards`.

    Missing solutions are worked out. Raises ValueError naming the first puzzle that has no solution
    or several, or whose solution breaks a rule or changes a clue.
    """
    if str(path).endswith(".npy") and n == 9:
        both = read_shah(path)
        where, numbers = f"{path}, row", range(both.shape[1])
    else:
        with open(path, **TEXT_FILE) as lines:
            numbers, both = read_boards(lines, n, path)
        where, alone = f"{path}, line", np.flatnonzero(~both[1].any(1))
        both[1, alone], found = solve(both[0, alone])
        refuse(found == 0, where, numbers[alone], "the puzzle has no solution")
        refuse(found > 1, where, numbers[alone], "the puzzle has several solutions")
    puzzles, solutions = both
    refuse(violations(solutions).any(1), where, numbers, "its solution breaks the rules")
    changed = (puzzles != 0) & (puzzles != solutions)
    refuse(changed.any(1), where, numbers, "its solution changes a clue")
    return both


def puzzles_to_solve(text, n):
    """The puzzles of a file, or of `text` itself, by `read_boards` -> (N, n n) uint8.

    They may have several solutions. Raises ValueError, also where clues contradict each other.
    """
    file = os.path.isfile(text)
    name = text if file else f"{text[:50]!r} (no file)"
    with open(text, **TEXT_FILE) if file else io.StringIO(text) as lines:
        numbers, (puzzles, _) = read_boards(lines, n, name)
    clash = (violations(puzzles) & (puzzles > 0)).any(1)
    stuck, _ = propagate(to_bits(puzzles))
    refuse(clash | stuck, f"{name}, line", numbers, "the clues contradict each other")
    return puzzles


def cached_puzzles(n, count, data_dir):
    """`generate`, kept in data_dir under version and count."""
    path = Path(data_dir) / f"sudoku{n}x{n}-v{GENERATOR_VERSION}-seed0-{count}.npy"
    if not path.exists():
        both = generate(n, count)
        with whole(path) as f:
            np.save(f, both)
    return np.load(path, mmap_mode="r")


class Sudoku:
    """Puzzles and their solutions, n x n, n = 4, 6 or 9 (Section 4.3, C.2). Ids: digits, 0 blank.

    layout: prefix, the paper's: puzzle, SEP = n + 1, solution, EOS = n + 2 (164 tokens for n = 9),
        of which the whole solution may be masked; board: the solution alone, its clues given.
    clues: None, those of a puzzle with one solution; a number of random cells: many may be valid.
    source: generated; shah (n = 9): downloaded to data_dir. data_path: a file instead.
    puzzles: how many to generate, default 100,000.

    Except where the source has its own split, boards that differ only in the names of their digits
    are all for training or all for testing. Training data are augmented on the fly: digits are
    relabelled; for n = 9 also bands, rows, stacks and columns are permuted and the board is
    transposed. Smaller boards have so few classes under these (2 and 49) that this would turn
    training boards into test boards.
    """

    name = "sudoku"
    vocab = entropy = None
    scored = True

    def __init__(self, grid=9, layout="prefix", clues=None, source="generated", puzzles=None,
                 data_path=None, data_dir=".data"):
        if grid not in BOXES or layout not in LAYOUTS or source not in SOURCES:
            raise ValueError(f"grid {grid} must be one of {tuple(BOXES)}, layout {layout!r} of "
                             f"{LAYOUTS}, source {source!r} of {SOURCES}")
        if clues is not None and not 0 <= clues < grid**2:
            raise ValueError(f"clues {clues} must lie in 0..{grid**2 - 1}")
        if source == "shah" and grid != 9:
            raise ValueError("source shah has 9x9 boards: --grid 9")
        if [source != "generated", bool(data_path), puzzles is not None].count(True) > 1:
            raise ValueError("give one of source shah, data_path, puzzles (how many to generate)")
        self.grid, self.layout, self.clues = grid, layout, clues
        self.source, self.data_path, self.data_dir = source, data_path, data_dir
        self.puzzles = 100_000 if puzzles is None else puzzles
        n, (h, w) = grid, BOXES[grid]
        if layout == "prefix":
            self.vocab_size, self.seq_len, self.prefix_len = n + 3, 2 * n * n + 2, n * n + 1
            self.places = None
        else:
            self.vocab_size, self.seq_len, self.prefix_len = n + 1, n * n, 0
            self.places = [[i, n + j, 2 * n + i // h * h + j // w]         # row, column and box
                           for i, j in itertools.product(range(n), repeat=2)]

    @functools.cached_property
    def split(self):
        """Training and test puzzles of all sources but shah: two arrays (2, N, n n) uint8."""
        if self.data_path:
            both = read_puzzles(self.data_path, self.grid)
        else:
            both = cached_puzzles(self.grid, self.puzzles, self.data_dir)
        test = held_out(both[1])
        if test.all() or not test.any():
            raise ValueError("too few puzzles: none is left to train on, or none to test on")
        return both[:, ~test], both[:, test]

    def part(self, i):
        """Training (0) or test puzzles (1) and their solutions: (2, N, n n) uint8."""
        if self.source != "shah":
            return torch.from_numpy(self.split[i])
        id_, file = SHAH[i]
        path = download(SHAH_URL.format(id_), Path(self.data_dir) / file)
        return torch.from_numpy(read_puzzles(path, 9))

    train_set = functools.cached_property(lambda self: self.part(0))     # read when first needed
    test_set = functools.cached_property(lambda self: self.part(1))

    @property
    def about(self):
        train, test = self.train_set, self.test_set
        clues = (train[0] > 0).sum(1).float().mean() if self.clues is None else self.clues
        return (f"{self.grid}x{self.grid}, {train.shape[1]:,} training and {test.shape[1]:,} test "
                f"puzzles, {clues:.1f} clues")

    def batch(self, n, generator=None, split="train"):
        """n puzzles, augmented if for training -> x0 (n, L) int64, given (n, L) bool."""
        both = self.train_set if split == "train" else self.test_set
        both = both[:, choose_rows(both.shape[1], n, split, generator)].long()
        if split == "train":
            both = self.augment(both, generator)
        return self.tokens(*both, generator)

    def augment(self, both, generator=None):
        """Random symmetries, the same for puzzle and solution: (2, n, n n) -> (2, n, n n)."""
        n, B = self.grid, both.shape[1]

        def permutations(*shape):
            return torch.rand(B, *shape, generator=generator).argsort(-1)

        def lines():
            """Old numbers (B, 9) of the new rows, or columns: threes, and within each three."""
            return (permutations(3)[:, :, None] * 3 + permutations(3, 3)).view(B, 9)

        label = torch.nn.functional.pad(permutations(n) + 1, (1, 0))             # 0 stays blank
        if n == 9:
            rows, columns = lines(), lines()
            cell = rows[:, :, None] * 9 + columns[:, None, :]                    # (B, 9, 9)
            flip = torch.rand(B, 1, 1, generator=generator) < 0.5
            cell = torch.where(flip, cell.transpose(1, 2), cell).reshape(B, 81)
            both = both.gather(2, cell.expand(2, -1, -1))
        return label.expand(2, -1, -1).gather(2, both)

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
            puzzle, answer = x[:, : self.prefix_len - 1], x[:, self.prefix_len:-1]
        return puzzle, torch.where(answer > self.grid, 0, answer)

    def metrics(self, x, x0, given):
        """Answers x for the puzzles of x0 -> shares, each with its standard error (_se).

        exact: equals the solution; valid: keeps rules and clues; cell: of the blank cells, those
        that equal the solution (all of none).
        """
        puzzle, answer = self.boards(x, given)
        solution = self.boards(x0, given)[1]
        blank = puzzle == 0
        wrong = ((answer != solution) & blank).sum(1)
        return mean_and_error(exact=(answer == solution).all(1), valid=solved(puzzle, answer),
                              cell=1 - wrong.double() / blank.sum(1).clamp(min=1))


def solved(puzzle, answer):
    """Which answers keep the rules and the clues of their puzzles, both (n, n n) -> (n,) bool."""
    legal = ~torch.from_numpy(violations(answer.numpy()).any(1))
    return legal & ((puzzle == 0) | (answer == puzzle)).all(1)


def draw_boards(puzzle, answer, new=False):
    """Puzzle and answer side by side as text, _ for blanks. puzzle, answer (n n,) digits.

    Marks: ! what breaks a rule or changes a clue, ' clues, + cells that are new (n n,) bool.
    """
    n = math.isqrt(len(puzzle))
    h, w = BOXES[n]
    puzzle, answer = np.asarray(puzzle), np.asarray(answer)
    bad = (violations(answer[None])[0] | (puzzle != 0) & (answer != puzzle)) & (answer != 0)
    marks = np.select([bad, puzzle > 0, np.asarray(new)], ["!", "'", "+"], " ")
    left = [f"{digit or '_'} " for digit in puzzle]
    right = [f"{digit or '_'}{mark}" for digit, mark in zip(answer, marks)]

    def row(cells, i):
        return "| ".join("".join(cells[j:j + w]) for j in range(i * n, i * n + n, w))

    rule = "+-".join(["--" * w] * (n // w))
    lines = []
    for i in range(n):
        if i and i % h == 0:
            lines.append(f"{rule}   {rule}")
        lines.append(f"{row(left, i)}   {row(right, i)}")
    return "\n".join(lines)


# ---- text

TEXT8 = ("http://mattmahoney.net/dc/text8.zip",
         "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232")
LM1B = ("http://www.statmt.org/lm-benchmark/1-billion-word-language-modeling-benchmark-r13output"
        ".tar.gz", "01ba60381110baf7f189dfd2b8374de371e8c9a340835793f190bdae9e90a34e")
LM1B_FILE = re.compile(  # the held-out shards lie there a second time, before their split in 50
    r"/(?:(training)-monolingual\.tokenized\.shuffled/news\.en-000\d\d-of-00100"
    r"|(heldout)-monolingual\.tokenized\.shuffled/news\.en\.heldout-000\d\d-of-00050)$")
BERT_VOCAB = ("https://huggingface.co/bert-base-uncased/resolve/"
              "86b5e0934494bd15c9632b12f734a8a67f723594/vocab.txt",
              "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3")
ALPHABET = " abcdefghijklmnopqrstuvwxyz"  # text8's 27 symbols
CJK = re.compile("([\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
                 "\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f])")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def to_text8(text):
    """text8's own mapping: lower case, digits spelled out, everything else one space."""
    text = re.sub("[0-9]", lambda m: f" {DIGITS[int(m[0])]} ", text.lower())
    return re.sub("[^a-z]+", " ", text)


def read_text8(data_dir):
    """The 100,000,000 characters of text8, downloaded once."""
    with zipfile.ZipFile(download(TEXT8[0], Path(data_dir) / "text8.zip", TEXT8[1])) as z:
        return z.read("text8").decode("ascii")           # by name: no path in the archive is used


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
    """BERT's uncased tokenizer (Devlin et al. 2019): text -> ids of vocab, a list of tokens."""

    def __init__(self, vocab):
        self.ids = {token: i for i, token in enumerate(vocab)}
        self.unk, self.cls, self.sep = (self.ids[t] for t in ("[UNK]", "[CLS]", "[SEP]"))
        self.word = functools.lru_cache(1 << 20)(self._word)

    def encode(self, text):
        """Ids of a text, without [CLS] and [SEP]."""
        if not text.isascii() or not text.isprintable():
            text = "".join(self._clean(c) for c in CJK.sub(r" \1 ", text))
        return [i for word in text.split(" ") for i in self.word(word)]

    @staticmethod
    def _clean(c):
        """White space to a space, control characters to nothing."""
        kind = unicodedata.category(c)
        if c in "\t\n\r" or kind.startswith("Z"):
            return " "
        return "" if c == "\ufffd" or kind in ("Cc", "Cf") else c

    def _word(self, word):
        """Ids of one word: lower case, no accents, each sign apart."""
        pieces = [""]
        for c in unicodedata.normalize("NFD", word.lower()):
            kind = unicodedata.category(c)
            if kind.startswith("P") or c.isascii() and c.isprintable() and not c.isalnum():
                pieces += [c, ""]
            elif kind != "Mn":
                pieces[-1] += c
        return tuple(itertools.chain(*map(self._match, pieces)))

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
    The archive is read as a stream: no path in it is used.
    """
    folder = Path(data_dir)
    train, held = folder / "lm1b-train.uint16", folder / "lm1b-heldout.uint16"
    vocab_file = download(BERT_VOCAB[0], folder / "bert-base-uncased-vocab.txt", BERT_VOCAB[1])
    vocab = vocab_file.read_text(encoding="utf-8").splitlines()
    if not (train.exists() and held.exists()):
        pieces = WordPiece(vocab)
        archive = download(LM1B[0], folder / "lm1b.tar.gz", LM1B[1])
        with (tarfile.open(archive, mode="r|gz") as tar, whole(train) as train_file,
              whole(held) as held_file,
              tqdm(total=30_607_716, unit="line", desc="encoding LM1B", disable=None) as bar):
            for member in tar:
                shard = LM1B_FILE.search(member.name)
                if shard is None or not member.isfile():
                    continue
                out = train_file if shard[1] else held_file
                for line in tar.extractfile(member):
                    ids = pieces.encode(detokenize(line.decode("utf-8").rstrip("\n")))
                    out.write(np.array([*ids, pieces.sep], np.uint16).tobytes())
                    bar.update()
    return np.memmap(train, np.uint16, "r"), np.memmap(held, np.uint16, "r"), vocab


def character_ids(text, vocab):
    """Characters -> their ids (n,), unsigned. Raises ValueError."""
    V = len(vocab)
    ids = np.full(0x110000, V, np.min_scalar_type(V))    # by code point; V: unknown
    ids[[ord(c) for c in vocab]] = np.arange(V)
    ids = ids[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)]
    unknown = ids == V
    if unknown.any():
        raise ValueError(f"{text[unknown.argmax()]!r} is not among the {V} symbols of the model")
    return ids


def text_rows(name, length=None, data_path=None, alphabet=None, vocab=None, data_dir=".data"):
    """Chunks of L tokens, not overlapping, of a long text (Section 4.4, C.3). Ids index `vocab`.

    length: L, default 256, of lm1b 128. vocab: use this one, a checkpoint's.
    text8: 27 characters, 90 / 5 / 5 million for training, validation, test. lm1b: BERT WordPiece,
    [CLS] + L - 2 tokens + [SEP]; the held-out set is the test set, the last hundredth of the
    training set is for validation. text: the characters of a UTF-8 file, 90 / 5 / 5 %, or, with
    alphabet="text8", its letters as text8 has them.
    """
    if alphabet not in (None, "text8"):
        raise ValueError(f"alphabet {alphabet!r} is not text8")
    ends = ()
    if name == "lm1b":
        train, test, vocab = read_lm1b(data_dir)
        cut = len(train) - len(train) // 100
        splits = train[:cut], train[cut:], test
        ends = [vocab.index(t) for t in ("[CLS]", "[SEP]")]
    else:
        if name == "text8":
            text, vocab = read_text8(data_dir), list(ALPHABET)
        else:                                            # with or without byte order mark
            try:
                text = Path(data_path).read_text(encoding="utf-8-sig")
            except UnicodeDecodeError as e:
                raise ValueError(f"{data_path} is not UTF-8: {e}") from None
        if alphabet == "text8":
            text, vocab = to_text8(text), list(ALPHABET)
        vocab = vocab or sorted(set(text))
        ids = character_ids(text, vocab)
        a, b = len(ids) * 90 // 100, len(ids) * 95 // 100
        splits = ids[:a], ids[a:b], ids[b:]
    width = (length or (128 if name == "lm1b" else 256)) - len(ends)
    if width < 1:
        raise ValueError(f"length {length} is too short")
    chunks = [s[: len(s) // width * width].reshape(-1, width) for s in splits]
    if not all(map(len, chunks)):
        raise ValueError(f"too little text: training, validation and test need {width} tokens each "
                         f"and have {', '.join(str(len(s)) for s in splits)}")
    return Rows(name, dict(zip(("train", "valid", "test"), chunks)), len(vocab), vocab, ends=ends)


# ---- files and downloads

def load_array(path):
    """Integers of a .npy file, memory-mapped, never unpickled. FileNotFoundError or ValueError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no array at {path}; make one: numpy.save(path, x)")
    try:
        x = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as e:  # a damaged file makes numpy raise almost anything
        raise ValueError(f"{path} is no plain .npy array: {str(e)[:100]!r}") from None
    if getattr(x, "ndim", None) != 2 or x.dtype.kind not in "iu":
        raise ValueError(f"{path} must hold one array (N, L) of integers, with 2 axes")
    return x


@contextlib.contextmanager
def whole(path):
    """Opens a file to write to. A kill at any moment leaves the old file, or the new one whole.

    Raises OSError, on a full disk for instance; the old file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as e:                 # torch.save wraps an OSError
        why = e.__context__ or e
        raise OSError(f"cannot write {path}: {why}; what was there stays") from None
    finally:
        part.unlink(missing_ok=True)


def download(url, path, sha256=None):
    """Fetches url to path unless it is there -> path. Raises OSError; ValueError: wrong content.

    Streams to PATH.part, where the next call goes on if this one is cut off, checks the sha256,
    then renames: under its own name a file is whole.
    """
    path, part = Path(path), Path(f"{path}.part")
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    # identity: the length is that of the file; 30 seconds without another byte are an error
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={have}-" if have else None}
    with requests.get(url, headers=headers, stream=True, timeout=30) as r:
        if r.status_code == 416:                         # nothing follows: begin anew
            part.unlink()
            return download(url, path, sha256)
        r.raise_for_status()
        if "html" in r.headers.get("Content-Type", ""):
            raise ValueError(f"{url} answered with a web page, not with the file: see it in a "
                             "browser (a quota, a login)")
        have = have if r.status_code == 206 else 0       # 200: the server sends all of it
        total = have + int(r.headers.get("Content-Length", 0))
        with (open(part, "ab" if have else "wb") as f,
              tqdm(total=total or None, initial=have, unit="B", unit_scale=True, desc=path.name,
                   disable=None) as bar):
            for chunk in r.iter_content(1 << 16):
                bar.update(f.write(chunk))
    if part.stat().st_size < total:
        raise OSError(f"{url} was cut off; the same command goes on with it")
    with open(part, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if sha256 not in (None, digest):
        part.unlink()
        raise ValueError(f"{url} does not have sha256 {sha256}; the file is not kept")
    os.replace(part, path)
    return path


# ---- by name, and as text

def load(name, vocab=None, **options):
    """Dataset by name; options: its OPTIONS, None: the default; vocab: of a text, a checkpoint's.

    Raises ValueError on an unknown name, an option of another dataset or an impossible value.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset {name!r} is not one of {', '.join(DATASETS)}")
    options = {k: v for k, v in options.items() if v is not None}
    for k in options:
        if k not in OPTIONS.get(name, ()):
            owners = ", ".join(d for d in OPTIONS if k in OPTIONS[d]) or "no dataset"
            raise ValueError(f"{k} is an option of {owners}, not of {name}")
    if name in ("array", "text") and not options.get("data_path"):
        raise ValueError(f"dataset {name} needs --data-path FILE")
    if name in SYNTHETIC:
        return synthetic(name, **options)
    if name == "array":
        return array_rows(**options)
    if name == "sudoku":
        return Sudoku(**options)
    return text_rows(name, vocab=vocab, **options)


def reload(ckpt, model, **changes):
    """The dataset that a checkpoint's model was trained on; changes: other options, if not None.

    Raises ValueError if its L or V is not that of the model.
    """
    name = ckpt["args"]["dataset"]
    options = {k: ckpt["args"].get(k) for k in OPTIONS.get(name, ())}
    options |= {k: v for k, v in changes.items() if v is not None}
    if name == "array":
        options["vocab_size"] = model.vocab_size
    ds = load(name, ckpt["vocab"], **options)
    if (ds.seq_len, ds.vocab_size) != (model.seq_len, model.vocab_size):
        raise ValueError(f"the data has L {ds.seq_len}, V {ds.vocab_size}; the checkpoint wants "
                         f"{model.seq_len}, {model.vocab_size}")
    return ds


def show(x, vocab_size, vocab=None):
    """One line per sequence of x (n, L): ids separated by spaces, or text; _ for the mask."""
    return "\n".join(line.replace("\n", "\\n") for line in texts(x, vocab_size, vocab))


def texts(x, vocab_size, vocab=None):
    """As `show`, but a list of strings with line breaks as they are."""
    names = [*(vocab or map(str, range(vocab_size))), "_"]
    words = vocab is None or "[CLS]" in vocab
    out = []
    for row in x.tolist():
        text = (" " if words else "").join(names[v] for v in row)
        out.append(text.replace(" ##", "") if words else text)           # ## goes on with a word
    return out


def encode(text, vocab, vocab_size=None, blank="_"):
    """A prompt -> ids (n,) int64, mapped as the training data were; V, the mask's, for blanks.

    vocab None: ids 0..vocab_size-1 between white space, as `show` prints them. blank: what stands
    for one, or None: there are no blanks. Raises ValueError naming what cannot be mapped.
    """
    V = vocab_size if vocab is None else len(vocab)
    pieces = WordPiece(vocab) if vocab and "[CLS]" in vocab else None
    ids = [pieces.cls] if pieces else []
    for part in text.split(blank) if blank else [text]:
        if vocab is None:
            for word in part.split():
                if not (word.isascii() and word.isdigit() and int(word) < V):
                    raise ValueError(f"{word!r} is neither a blank ({blank}) nor an id in "
                                     f"0..{V - 1}")
                ids.append(int(word))
        elif pieces:
            ids += pieces.encode(part)
        else:
            part = to_text8(part) if vocab == list(ALPHABET) else part
            ids += character_ids(part, vocab).tolist()
        ids.append(V)                                    # a blank behind each part but the last
    return torch.tensor(ids[:-1], dtype=torch.int64)


# ---- what the three scripts share: flags, errors, output

def within(kind, low, high, words):
    """A type for argparse: numbers of `kind` in low..high; `words` are what the error says."""
    def convert(text):
        value = kind(text)
        if not low <= value <= high:                     # nan is nowhere
            raise ValueError
        return value
    convert.__name__ = words
    return convert


count = within(int, 1, 10**9, "whole number (1 to 10^9)")
natural = within(int, 0, 10**9, "whole number (0 to 10^9)")
positive = within(float, 1e-30, 1e30, "number (above 0)")
number = within(float, 0, 1e30, "number (0 or more)")
share = within(float, 0, 1, "number (0 to 1)")


def output(path):
    """A type for argparse: a file that can be written when the work is done."""
    if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path} cannot be written: it is a folder, or in none")
    return path


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows a script's docstring as it stands, and the defaults that there are."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def parser(name, doc, **options):
    """An argument parser that says in one line what is wrong."""
    p = argparse.ArgumentParser(prog=name, description=doc, formatter_class=Help, **options)
    p.error = lambda message: p.exit(2, f"{name}: {message}; see --help\n")
    return p


def run_script(name, script, argv=None):
    """script(argv) -> exit status: its own, or 0; 2, and one line, for what a user can mend.

    A terminal that lacks a character gets ? for it; a reader that has gone (`| head`) is no error.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")     # closed by the shell: `>&-`
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        status = script(argv) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())   # for the exit's own flush
        return 141
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as e:
        print(f"{name}: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
