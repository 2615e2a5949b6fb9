"""A rule read on intervals: what it says of all pairs of some queries and keys at once, and of the future.

With positions that are spans [lo, hi], the operators of a rule, `allowed(q, k, h, o)`, lead to an answer of three values: it must
be seen, it may be, or neither. kernels/layout.py finds blocks by it; here it answers which keys any later query may see, whether a
rule is plain causal attention over some length, which heads behave alike, and whether a rule says the same of those who stand farther.
"""

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


def reach(rule, after, k, begin=0):
    """Which remembered keys may any later query see? bool like k, an integer array of positions.

    after: the position of the next query, the first that is still to come; begin: where its document begins. It never says
    no wrongly; it may say yes where the rule can only be settled query by query (random links).
    """
    k = np.asarray(k, dtype=np.int64)
    t = rule.module.allowed(Span(after - begin, FAR), Span(k - begin, k - begin), Span(0, HEADS), rule.options)
    return np.broadcast_to(Truth.of(t).may, k.shape) & (k >= begin)


def is_causal(rule, n, first=0, head=None):
    """Is the rule plain causal attention for n consecutive tokens from position `first`? In this head; None: in all heads.

    It never says yes wrongly: a window must hold n tokens, local blocks must hold them all in one.
    Ints only and nothing remembered, a few microseconds: this is asked at every call, and a compiler traces through it.
    """
    k = Span(first, first + n - 1)
    q = Span(first, first + n - 1, above=k)
    head = Span(0, HEADS) if head is None else head
    return bool(Truth.of(rule.module.allowed(q, k, head, rule.options)).must)


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


def moves(rule, head, q, k, by):
    """Does the rule say the same of queries and keys, each (first, n), if all of them stand any multiple of `by` farther? It never says
    yes wrongly."""
    span = lambda side: Moving(side[0], side[0] + side[1] - 1, by)
    try:
        return Same.of(rule.module.allowed(span(q), span(k), Moving(head, head, 0), rule.options)).known
    except TypeError:
        # an operator that only numbers have which do not move
        return False


class Moving:
    """Integers between lo and hi, and then, once, twice, ... moved, so many times `step` more. Operators only, as Span."""

    def __init__(self, lo, hi, step):
        self.lo, self.hi, self.step = lo, hi, step

    @staticmethod
    def of(x):
        return x if isinstance(x, Moving) else Moving(x, x, 0)

    def __add__(a, b):
        b = Moving.of(b)
        return Moving(a.lo + b.lo, a.hi + b.hi, a.step + b.step)

    def __neg__(a):
        return Moving(-a.hi, -a.lo, -a.step)

    def __sub__(a, b):
        return a + -Moving.of(b)

    def __rsub__(a, b):
        return Moving.of(b) - a

    def __mul__(a, b):
        b = Moving.of(b)
        a, b = (b, a) if a.step else (a, b)
        if a.step or (b.step and a.lo != a.hi):
            raise TypeError("a product of two that move, or of one with many numbers")
        ends = [x * y for x in (a.lo, a.hi) for y in (b.lo, b.hi)]
        return Moving(min(ends), max(ends), a.lo * b.step)

    def __floordiv__(a, b):
        b = Moving.of(b)
        if b.step or b.lo != b.hi or a.step % b.lo:
            raise TypeError("a quotient that moves now and then")
        return Moving(a.lo // b.lo, a.hi // b.lo, a.step // b.lo)

    def __mod__(a, b):
        b = Moving.of(b)
        if b.step or b.lo != b.hi or a.step % b.lo:
            raise TypeError("a remainder that moves")
        return Moving(0, b.lo - 1, 0)

    def __lt__(a, b):
        d = a - b
        return Same(d.step == 0 or (d.lo >= 0 < d.step) or (d.hi < 0 > d.step))

    def __le__(a, b):
        return a < Moving.of(b) + 1

    def __gt__(a, b):
        return Moving.of(b) < a

    def __ge__(a, b):
        return Moving.of(b) <= a

    def __eq__(a, b):
        d = a - b
        return Same(d.step == 0 or (d.lo > 0 < d.step) or (d.hi < 0 > d.step))

    __ne__ = __eq__
    __radd__, __rmul__, __hash__ = __add__, __mul__, None


class Same(NamedTuple):
    """Is an answer known to be the same however far all moved?"""

    known: bool

    @staticmethod
    def of(x):
        return x if isinstance(x, Same) else Same(True)

    def __and__(a, b):
        return Same(a.known and Same.of(b).known)

    def __invert__(a):
        return a

    __or__ = __rand__ = __ror__ = __and__
