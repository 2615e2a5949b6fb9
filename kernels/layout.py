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

FAR = 1 << 22  # positions stay below this
HEADS = 1 << 10  # and heads below this


class Span:
    """Integers between lo and hi, inclusive; both are ints or arrays of one shape. Divisors must be positive.

    Operators only, like the rules themselves: with ints a compiler can trace through, with arrays numpy reads many spans at once.
    """

    heard = None  # a list while someone listens: every plain number that meets a span

    def __init__(self, lo, hi, above=None):
        # above: a span of keys, each known to be at most its query, which is in this one
        self.lo, self.hi, self.above = lo, hi, above

    @staticmethod
    def of(x):
        if isinstance(x, Span):
            return x
        if Span.heard is not None:
            Span.heard.append(x)
        return Span(x, x)

    def __add__(a, b):
        b = Span.of(b)
        return Span(a.lo + b.lo, a.hi + b.hi)

    def __sub__(a, b):
        b = Span.of(b)
        least = a.lo - b.hi
        return Span(least * (least > 0) if a.above is b else least, a.hi - b.lo)

    def __rsub__(a, b):
        return Span.of(b) - a

    def __neg__(a):
        return 0 - a

    def __mul__(a, b):
        b = Span.of(b)
        if b.lo is b.hi:
            x, y = a.lo * b.lo, a.hi * b.lo
            return Span(lesser(x, y), -lesser(-x, -y))
        x, y = a * Span(b.lo, b.lo), a * Span(b.hi, b.hi)
        return Span(lesser(x.lo, y.lo), -lesser(-x.hi, -y.hi))

    def __floordiv__(a, n):
        return Span(a.lo // n, a.hi // n)

    def __mod__(a, b):
        b = Span.of(b)
        n = -lesser(-b.lo, -1)
        same = (b.lo == b.hi) & (a.lo // n == a.hi // n)
        return Span(same * (a.lo % n), b.hi - 1 + same * (a.hi % n - b.hi + 1))

    def __lt__(a, b):
        b = Span.of(b)
        return Truth(a.hi < b.lo, a.lo < b.hi)

    def __le__(a, b):
        b = Span.of(b)
        return Truth(True, True) if b.above is a else Truth(a.hi <= b.lo, a.lo <= b.hi)

    def __gt__(a, b):
        return Span.of(b) < a

    def __ge__(a, b):
        return Span.of(b) <= a

    def __eq__(a, b):
        b = Span.of(b)
        return Truth((a.lo == b.hi) & (a.hi == b.lo), (a.lo <= b.hi) & (b.lo <= a.hi))

    def __ne__(a, b):
        return ~(a == b)

    __radd__, __rmul__, __hash__ = __add__, __mul__, None


def lesser(x, y):
    return y + (x - y) * (x < y)


class Truth(NamedTuple):
    """The answer for a block: `must`, for every pair in it; `may`, for some pair, perhaps."""

    must: np.ndarray
    may: np.ndarray

    @staticmethod
    def of(x):
        if isinstance(x, Truth):
            return x
        if Span.heard is not None:
            Span.heard.append(x)
        return Truth(x, x)

    def __and__(a, b):
        b = Truth.of(b)
        return Truth(a.must & b.must, a.may & b.may)

    def __or__(a, b):
        b = Truth.of(b)
        return Truth(a.must | b.must, a.may | b.may)

    def __invert__(a):
        return Truth(a.may ^ True, a.must ^ True)

    __rand__, __ror__ = __and__, __or__


# what a rule says of the future, of a whole length, and of heads


def reach(rule, after, k, begin=0):
    """Which remembered keys may any later query see? bool like k, an integer array of positions.

    after: the position of the next query, the first that is still to come; begin: where its document begins. It never says
    no wrongly; it may say yes where the rule can only be settled query by query (random links).
    """
    k = np.asarray(k, dtype=np.int64)
    t = rule.module.allowed(Span(after - begin, FAR), Span(k - begin, k - begin), Span(0, HEADS), rule.options)
    return np.broadcast_to(Truth.of(t).may, k.shape) & (k >= begin)


def is_causal(rule, n, first=0):
    """Is the rule plain causal attention for n consecutive tokens from position `first`?

    It never says yes wrongly: a window must hold n tokens, local blocks must hold them all in one.
    Ints only and nothing remembered, a few microseconds: this is asked at every call, and a compiler traces through it.
    """
    k = Span(first, first + n - 1)
    q = Span(first, first + n - 1, above=k)
    return bool(Truth.of(rule.module.allowed(q, k, Span(0, HEADS), rule.options)).must)


@functools.lru_cache(maxsize=256)
def behaviours(rule, heads):
    """For every head the first head that behaves as it does, [heads]: rules that do not read h give zeros.

    A rule is operators only, so what it makes of the head alone is a few plain numbers, and these, as they meet the
    positions, are all that can tell one head from another.
    """
    first = {}
    return tuple(first.setdefault(traits(rule, h), h) for h in range(heads))


def traits(rule, h):
    Span.heard = []
    try:
        rule.module.allowed(Span(0, FAR), Span(0, FAR), h, rule.options)
        return tuple(Span.heard)
    finally:
        Span.heard = None


# layouts


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


def layout(rule, q, k, block=128, begin=None, always=0, head=0):
    """The blocks that attention of queries at positions q over keys at positions k must visit -> Layout.

    q, k: (first, n) for consecutive positions, else arrays [n] of positions, -1 for an empty slot or padding. block: tokens in
    a block, or (of queries, of keys). begin [n]: first position of each query's own document, or one int, or None: 0. always:
    that many leading keys are exempt from the rule. head: the rule may read it; see `layouts`. All as in kernels/dense.py,
    except that padding queries see nothing here. A block of keys with an empty slot, or cut short by the end, is never full.
    The last few answers are kept, by rule, options and the blocks' positions: do not write into them.
    """
    bq, bk = (block, block) if isinstance(block, int) else block
    q, k = summary(q, bq, begin), summary(k, bk)
    key = rule, q.tobytes(), k.tobytes(), (bq, bk), always, head
    found = recent.pop(key, None)
    recent[key] = found = found or find(rule, pyramid(q), pyramid(k), (bq, bk), always, head)
    while len(recent) > 1 and sum(x.pairs.nbytes for x in recent.values()) > ROOM:
        del recent[next(iter(recent))]
    return found


recent = {}  # layouts by rule, options and the blocks' positions, the last one asked for at the end
ROOM = 1 << 28  # bytes of pairs that are kept; their lists take about as much again


def layouts(rule, q, k, block=128, begin=None, always=0, heads=1):
    """Layouts of all heads -> (list of the different ones, for each head its place in that list)."""
    who = behaviours(rule, heads)
    different = sorted(set(who))
    return [layout(rule, q, k, block, begin, always, h) for h in different], [different.index(h) for h in who]


def summary(at, block, begin=None):
    """All that a layout reads of positions, for each block of them: smallest and largest position (largest -1: all empty), is it
    whole, smallest and largest `begin`. int64 [5, blocks]."""
    if isinstance(at, tuple) and (begin is None or isinstance(begin, int)):
        first, n = at
        lo = first + np.arange(0, n, block)
        hi = np.minimum(lo + block, first + n) - 1
        b = np.full_like(lo, begin or 0)
        return np.stack([lo, hi, hi - lo + 1 == block, b, b])
    at = np.arange(at[0], at[0] + at[1]) if isinstance(at, tuple) else np.asarray(at, dtype=np.int64)
    begin = np.broadcast_to(0 if begin is None else np.asarray(begin, dtype=np.int64), at.shape)
    cut, none = np.arange(0, len(at), block), FAR * 2
    least = lambda x: np.minimum.reduceat(np.where(at < 0, none, x), cut)
    most = lambda x: np.maximum.reduceat(np.where(at < 0, -1, x), cut)
    whole = np.add.reduceat((at >= 0).astype(np.int64), cut) == block
    return np.stack([least(at), most(at), whole, least(begin), most(begin)]) if len(at) else np.zeros((5, 0), np.int64)


def find(rule, qs, ks, block, always, head):
    """The layout of blocks that are known by their summaries' pyramids."""
    links = getattr(rule.module, "LINKS", None)
    targets = linked(rule, qs[0], ks, head) if links else None
    # random links would make every block possible: leave them out of the search and add the blocks that they lead to
    searched = rule if targets is None else rule._replace(options=dataclasses.replace(rule.options, **{links[1]: 0}))
    full, partial = search(searched, qs, ks, block[1], always, head)
    if targets is not None:
        partial = np.setdiff1d(np.union1d(partial, targets), full, assume_unique=True)
        i, j = partial >> 32, partial & (1 << 32) - 1
        t = judge(rule, qs[0][:, i], ks[0][:, j], j, block[1], always, head)
        full, partial = np.concatenate([full, partial[t.must]]), partial[t.may & ~t.must]
    pairs = np.sort(np.concatenate([partial, full | 1 << 31]))
    return Layout(pairs, (qs[0].shape[1], ks[0].shape[1]), block)


def pyramid(x):
    """Summaries of blocks, of pairs of blocks, of fours, and so on up to one."""
    levels = [x]
    while levels[-1].shape[1] > 1:
        cut = np.arange(0, levels[-1].shape[1], 2)
        least, most = (f.reduceat(levels[-1], cut, 1) for f in (np.minimum, np.maximum))
        levels.append(np.stack([least[0], most[1], least[2], least[3], most[4]]))
    return levels


def judge(rule, q, k, j, size, always, head):
    """The Truth of blocks with summaries q, k [5, m]; key block number j holds the keys size * j up to size * (j + 1)."""
    at, keys, b = Span(q[0], q[1]), Span(k[0], k[1]), Span(q[3], q[4])
    causal, own = keys <= at, keys >= b
    if q[4].any():
        # what is clipped here lies before the document, where `own` says no
        at, keys = (Span(np.maximum(x.lo - b.hi, 0), np.maximum(x.hi - b.lo, 0)) for x in (at, keys))
    exempt = Truth((j + 1) * size <= always, j * size < always)
    t = (rule.module.allowed(at, keys, head, rule.options) | exempt) & causal & own
    # an empty block's span is upside down, so nothing in it may be causal
    return Truth(t.must & (k[2] == 1), t.may)


def search(rule, qs, ks, size, always, head):
    """(full, partial): codes query block << 32 | key block, from the summaries' pyramids. size: keys in a block."""
    i = j = np.zeros(min(qs[0].shape[1], ks[0].shape[1], 1), np.int64)
    full = [i[:0]]
    for level in range(max(len(qs), len(ks)) - 1, -1, -1):
        q, k = (x[min(level, len(x) - 1)] for x in (qs, ks))
        inside = (i < q.shape[1]) & (j < k.shape[1])
        i, j = i[inside], j[inside]
        t = judge(rule, q[:, i], k[:, j], j, size << level, always, head)
        if t.must.any():
            full.append(leaves(i[t.must], j[t.must], level, qs[0], ks[0].shape[1]))
        open_ = t.may & ~t.must
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
    live = np.flatnonzero(q[1] >= 0)
    first, last = (np.maximum(x[live], 0) // size for x in (q[0] - q[4], q[1] - q[3]))
    n = last - first + 1
    if n.sum() > 64 * (len(n) + FAR // size):
        return None
    row = np.repeat(live, n)
    i = np.repeat(first - np.cumsum(n) + n, n) + np.arange(n.sum())
    found = [np.zeros(0, np.int64)]
    for t in range(count):
        lo = rule.module.link(i, head, t, o) * size
        found.append(meeting(row, lo + q[3][row], lo + size - 1 + q[4][row], ks))
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
