"""Which blocks of queries x keys exist: found from a pattern's rule by interval arithmetic, never from a mask.

A rule, `allowed(q, k, h, o)`, is made of operators only, so it can be read on intervals of positions: the answer is then
whether a whole block must be seen, and whether any of it may be. One square that holds everything is split in four, and each
part again as long as it is neither; a block of the given size that is still neither is partial. Time and memory follow the
blocks that exist. Blocks are known by their smallest and largest position, so scattered keys, holes and packed documents
need nothing else.

    found = layout(rule, q=(0, n), k=(0, n), block=128)
    rows = found.rows                                 # for query block i, the key blocks to visit:
    rows.items[rows.start[i] : rows.mid[i]]           # partial: the rule must be applied
    rows.items[rows.mid[i] : rows.start[i + 1]]       # full: every pair is seen
    found.columns                                     # the same for key blocks: the query blocks that see them

Checked against kernels/dense.py, block for block (tests/test_layout.py). A block that is listed as full is full and a block
that is not listed is empty, always; a partial block may be full or empty where only the rule's parts together say so.
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from errors import Refused
from kernels.recent import Recent
from kernels.spans import FAR, Span, Truth, behaviours


class Lists(NamedTuple):
    """For each block of one side the blocks of the other, ascending: items[start[i]:mid[i]] are partial, items[mid[i]:start[i + 1]]
    full. int32: start [n + 1], mid [n], items [partial + full]."""

    start: np.ndarray
    mid: np.ndarray
    items: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """The blocks of one head. pairs: int64 codes, query block << 32 | full << 31 | key block, ascending."""

    pairs: np.ndarray
    shape: tuple  # blocks of queries, blocks of keys
    block: tuple  # tokens in a block of queries, of keys

    @functools.cached_property
    def full(self):
        """How many blocks are full."""
        return int(np.count_nonzero(self.pairs & (1 << 31)))

    @property
    def partial(self):
        return len(self.pairs) - self.full

    @functools.cached_property
    def rows(self):
        """Lists by query block."""
        return lists(self.pairs, self.shape[0])

    @functools.cached_property
    def columns(self):
        """Lists by key block."""
        i, kind, j = self.pairs >> 32, self.pairs & (1 << 31), self.pairs & (1 << 31) - 1
        return lists(np.sort(j << 32 | kind | i), self.shape[1])


def lists(pairs, n):
    """Sorted codes -> Lists."""
    if len(pairs) >= 1 << 31:
        raise ValueError(f"{len(pairs)} blocks are more than int32 can count: take larger blocks")
    row = pairs >> 32
    start = np.searchsorted(row, np.arange(n + 1))
    # in a row's codes the full blocks stand behind the partial ones
    mid = np.searchsorted(pairs, np.arange(n) << 32 | 1 << 31)
    return Lists(start.astype(np.int32), mid.astype(np.int32), (pairs & (1 << 31) - 1).astype(np.int32))


def layout(rule, q, k, block=128, begin=None, always=0, head=0, opening=0):
    """The blocks that attention of queries at positions q over keys at positions k must visit -> Layout.

    q, k: (first, n) for consecutive positions, else arrays [n] of positions, -1 for an empty slot or padding. block: tokens in
    a block, or (of queries, of keys). begin [n]: first position of each query's own document, or one int, or None: 0. always:
    that many leading keys are exempt from the rule. head: the rule may read it; see `layouts`. opening: the first so many tokens
    of each document are exempt too. All as in kernels/dense.py, except that padding queries see nothing here. A block of keys
    with an empty slot, or cut short by the end, is never full.
    The last few answers are kept, by rule, options and the blocks' positions: do not write into them.
    """
    bq, bk = (block, block) if isinstance(block, int) else block
    q, k = summary(q, bq, begin), summary(k, bk)
    exempt = always, opening
    key = rule, q.tobytes(), k.tobytes(), (bq, bk), exempt, head
    return recent.get(key, lambda: find(rule, pyramid(q), pyramid(k), (bq, bk), exempt, head))


recent = Recent(1 << 28, lambda found: found.pairs.nbytes)  # bytes of pairs that are kept; their lists take about as much again
MOST = 80 << 20  # blocks of one layout, 0.7 gigabytes: a little more than the causal half of 512K tokens in blocks of 64 x 32


def layouts(rule, q, k, block=128, begin=None, always=0, heads=1, opening=0):
    """Layouts of all heads -> (list of the different ones, for each head its place in that list)."""
    who = behaviours(rule, heads)
    different = sorted(set(who))
    return [layout(rule, q, k, block, begin, always, h, opening) for h in different], [different.index(h) for h in who]


def summary(at, block, begin=None):
    """All that a layout reads of positions, for each block of them: smallest and largest position (largest -1: all empty), is it
    whole, smallest and largest `begin`, are these the only two. int64 [6, blocks]."""
    if isinstance(at, tuple) and (begin is None or isinstance(begin, int)):
        first, n = at
        lo = first + np.arange(0, n, block)
        hi = np.minimum(lo + block, first + n) - 1
        b = np.full_like(lo, begin or 0)
        return np.stack([lo, hi, hi - lo + 1 == block, b, b, b >= 0])
    at = np.arange(at[0], at[0] + at[1]) if isinstance(at, tuple) else np.asarray(at, dtype=np.int64)
    begin = np.broadcast_to(0 if begin is None else np.asarray(begin, dtype=np.int64), at.shape)
    cut, none = np.arange(0, len(at), block), FAR * 2
    least = lambda x: np.minimum.reduceat(np.where(at < 0, none, x), cut)
    most = lambda x: np.maximum.reduceat(np.where(at < 0, -1, x), cut)
    whole = np.add.reduceat((at >= 0).astype(np.int64), cut) == block
    if not len(at):
        return np.zeros((6, 0), np.int64)
    b, c = least(begin), most(begin)
    inner = (begin != np.repeat(b, block)[: len(at)]) & (begin != np.repeat(c, block)[: len(at)]) & (at >= 0)
    return np.stack([least(at), most(at), whole, b, c, np.add.reduceat(inner.astype(np.int64), cut) == 0])


def find(rule, qs, ks, block, exempt, head):
    """The layout of blocks that are known by their summaries' pyramids."""
    links = [linked(leaf, qs[0], ks, head) for leaf in rule.leaves() if hasattr(leaf.module, "LINKS")]
    listed = bool(links) and all(x is not None for x in links)
    # random links would make every block possible: leave them out of the search and add the blocks that they lead to. Joined
    # patterns have no "not": what they see without links they see with them
    full, partial = search(rule.each(unlinked) if listed else rule, qs, ks, block[1], exempt, head)
    if listed:
        partial = np.setdiff1d(np.union1d(partial, np.unique(np.concatenate(links))), full, assume_unique=True)
        i, j = partial >> 32, partial & (1 << 32) - 1
        t = judge(rule, qs[0][:, i], ks[0][:, j], j, block[1], exempt, head)
        full, partial = np.concatenate([full, partial[t.must]]), partial[t.may & ~t.must]
    pairs = np.sort(np.concatenate([partial, full | 1 << 31]))
    return Layout(pairs, (qs[0].shape[1], ks[0].shape[1]), block)


def unlinked(rule):
    """The rule without its random links."""
    links = getattr(rule.module, "LINKS", None)
    return rule._replace(options=dataclasses.replace(rule.options, **{links[1]: 0})) if links else rule


def within(found, q, k, reach):
    """The layout without the blocks in which every key is `reach` or more before every query. q, k: as they were given to layout()."""
    least, most = summary(q, found.block[0])[0], summary(k, found.block[1])[1]
    near = least[found.pairs >> 32] - most[found.pairs & (1 << 31) - 1] < reach
    return dataclasses.replace(found, pairs=found.pairs[near])


def pyramid(x):
    """Summaries of blocks, of pairs of blocks, of fours, and so on up to one."""
    levels = [x]
    while levels[-1].shape[1] > 1:
        cut = np.arange(0, levels[-1].shape[1], 2)
        least, most = (f.reduceat(levels[-1], cut, 1) for f in (np.minimum, np.maximum))
        two = least[5] & (least[3] == most[3]) & (least[4] == most[4])
        levels.append(np.stack([least[0], most[1], least[2], least[3], most[4], two]))
    return levels


def judge(rule, q, k, j, size, exempt, head):
    """The Truth of blocks with summaries q, k [6, m]; key block number j holds the keys size * j up to size * (j + 1).
    exempt: (always, opening)."""
    always, opening = exempt
    free = Truth((j + 1) * size <= always, j * size < always)
    # most blocks lie in one document or two: then each is asked for itself, else all that begin in between at once
    b, c, two = q[3], q[4], q[5] == 1
    t = of_document(rule, q, k, Span(b, np.where(two, b, c)), free, opening, head)
    if (b < c).any():
        u = of_document(rule, q, k, Span(np.where(two, c, b), c), free, opening, head)
        t = Truth(t.must & u.must, t.may | u.may)
    # an empty block's span is upside down, so nothing in it may be causal
    t = t & (Span(k[0], k[1]) <= Span(q[0], q[1]))
    return Truth(t.must & (k[2] == 1), t.may)


def of_document(rule, q, k, begin, free, opening, head):
    """The Truth of blocks for queries whose document begins at `begin`, a Span."""
    at, keys = Span(q[0], q[1]), Span(k[0], k[1])
    own = keys >= begin
    if begin.hi.any():
        # what is clipped here lies before the document, where `own` says no
        at, keys = (Span(np.maximum(x.lo - begin.hi, 0), np.maximum(x.hi - begin.lo, 0)) for x in (at, keys))
    return (rule.module.allowed(at, keys, head, rule.options) | free | (keys < opening)) & own


def search(rule, qs, ks, size, exempt, head):
    """(full, partial): codes query block << 32 | key block, from the summaries' pyramids. size: keys in a block."""
    i = j = np.zeros(min(qs[0].shape[1], ks[0].shape[1], 1), np.int64)
    full = [i[:0]]
    for level in range(max(len(qs), len(ks)) - 1, -1, -1):
        q, k = (x[min(level, len(x) - 1)] for x in (qs, ks))
        inside = (i < q.shape[1]) & (j < k.shape[1])
        i, j = i[inside], j[inside]
        t = judge(rule, q[:, i], k[:, j], j, size << level, exempt, head)
        open_ = t.may & ~t.must
        # those that are found, and those to look at next
        blocks = sum(map(len, full)) + (np.count_nonzero(t.must) << 2 * level) + (np.count_nonzero(open_) << 2 * (level > 0))
        if blocks > MOST:
            raise Refused(
                f"--attn {rule} leaves more than {MOST >> 20} million blocks of {qs[0].shape[1]} x {ks[0].shape[1]}, too many to list: "
                "choose a pattern that sees less, or read the text in shorter segments"
            )
        if t.must.any():
            full.append(leaves(i[t.must], j[t.must], level, qs[0], ks[0].shape[1]))
        i, j = i[open_], j[open_]
        if level:
            i, j = (np.repeat(2 * i, 4) + np.tile([0, 0, 1, 1], len(i)), np.repeat(2 * j, 4) + np.tile([0, 1, 0, 1], len(j)))
    return np.concatenate(full), i << 32 | j


def leaves(i, j, level, q, nk):
    """The codes of all blocks in squares that are full; blocks of padding among the queries left out."""
    a, c = np.divmod(np.arange(1 << 2 * level), 1 << level)
    i, j = ((x[:, None] << level) + part for x, part in ((i, a), (j, c)))
    inside = (i < q.shape[1]) & (j < nk)
    i, j = i[inside], j[inside]
    return (i << 32 | j)[q[1][i] >= 0]


def linked(rule, q, ks, head):
    """Codes of the blocks that random links lead to, or None if the queries are too scattered for that to be short.

    A rule's file says LINKS = (option of the block's length, option of the number of links) and link(i, h, t, o): the block
    that the t-th link of block i leads to.
    """
    o, (size, count) = rule.options, rule.module.LINKS
    size, count = getattr(o, size), getattr(o, count)
    # as in judge(): blocks of one document or two ask for each, the others for all that begin in between
    b, c, two = q[3], q[4], q[5] == 1
    row, second = np.flatnonzero(q[1] >= 0), np.flatnonzero((q[1] >= 0) & two & (b < c))
    row, b, c = (np.concatenate(x) for x in ((row, second), (b[row], c[second]), (np.where(two, b, c)[row], c[second])))
    first, last = np.maximum(q[0][row] - c, 0) // size, np.maximum(q[1][row] - b, 0) // size
    n = last - first + 1
    if n.sum() > 1 << 21:
        return None
    i = np.repeat(first - np.cumsum(n) + n, n) + np.arange(n.sum())
    row, b, c = (np.repeat(x, n) for x in (row, b, c))
    found = [np.zeros(0, np.int64)]
    for t in range(count):
        lo = rule.module.link(i, head, t, o) * size
        found.append(meeting(row, lo + b, lo + size - 1 + c, ks))
    return np.unique(np.concatenate(found))


def meeting(row, lo, hi, ks):
    """Codes row << 32 | j of the key blocks j with positions between lo and hi, each [m]."""
    j = np.zeros(len(row) if ks[0].shape[1] else 0, np.int64)
    row, lo, hi = (x[: len(j)] for x in (row, lo, hi))
    for level in range(len(ks) - 1, -1, -1):
        j = j if level == len(ks) - 1 else np.add.outer(2 * j, [0, 1]).ravel()
        if len(j) > len(row):
            row, lo, hi = (np.repeat(x, 2) for x in (row, lo, hi))
        inside = j < ks[level].shape[1]
        row, lo, hi, j = (x[inside] for x in (row, lo, hi, j))
        meets = (ks[level][0, j] <= hi) & (ks[level][1, j] >= lo)
        row, lo, hi, j = (x[meets] for x in (row, lo, hi, j))
    return row << 32 | j
