"""Layouts against the mask itself, block for block, at random options, odd lengths, far positions, holes and documents; and spans."""

import dataclasses
import time
import tracemalloc

import numpy as np
import pytest
from conftest import JOINED, RULES

import kernels
import plugins
from kernels import layout as module
from kernels.layout import Layout, layout, layouts
from kernels.recent import Recent
from kernels.spans import FAR, Span, Truth, behaviours, is_causal, reach

# rules whose blocks are known exactly, each being one condition besides causality; in the others, partial blocks may be loose
EXACT = {"full", "window", "local", "s2"}
HEADS = 4
every_rule = pytest.mark.parametrize("name", [*RULES, *JOINED, "bigbird&strided|local"])


def parse(spec):
    return plugins.place(plugins.parse("attention", spec), layer=1, n_layer=2, n_head=HEADS, n_kv_head=2)


def drawn(name, draw):
    """The rule with random options that its check accepts; joined ones too."""
    for operator in "|&":
        if operator in name:
            return parse(operator.join(str(drawn(part, draw)) for part in name.split(operator)))
    blank = plugins.load("attention", name).Options()
    fields = [f.name for f in dataclasses.fields(blank) if f.name not in plugins.FILLED_IN and type(f.default) is int]
    while True:
        high = draw.choice([3, 40, 200])
        spec = name + ":" + ",".join(f"{f}={draw.integers(0, 4 if f in ('n_random', 'heads') else high)}" for f in fields)
        try:
            return parse(spec)
        except ValueError:
            continue


def mask(rule, q, k, begin=0, always=0, head=0, opening=0):
    """kernels/dense.py's `visible` on numpy, but padding queries see nothing."""
    b, q = np.broadcast_to(begin, q.shape)[:, None], q[:, None]
    see = rule.module.allowed(q - b, k - b, head, rule.options) | (np.arange(len(k)) < always) | (k - b < opening)
    return see & (k <= q) & (k >= b) & (q >= 0)


def blocks(see, q, bq, bk):
    """What the blocks of a mask truly are: 0 empty, 1 partial, 2 full. Padding queries do not count; a short block of keys is not full."""
    out = np.zeros((-(-see.shape[0] // bq), -(-see.shape[1] // bk)), int)
    for i, j in np.ndindex(out.shape):
        rows = slice(i * bq, (i + 1) * bq)
        part = see[rows, j * bk : (j + 1) * bk]
        out[i, j] = part.any() and 1 + int(part[q[rows] >= 0].all() and part.shape[1] == bk)
    return out


def drawing(found):
    """The blocks that a layout's rows list, and its columns; each must stand once, partial before full, each kind ascending."""
    pictures = []
    for lists, (n, m) in ((found.rows, found.shape), (found.columns, found.shape[::-1])):
        assert lists.start.dtype == lists.mid.dtype == lists.items.dtype == np.int32
        assert lists.start.shape == (n + 1,) and lists.mid.shape == (n,) and lists.start[-1] == len(lists.items)
        out = np.zeros((n, m), int)
        for i in range(n):
            partial, full = lists.items[lists.start[i] : lists.mid[i]], lists.items[lists.mid[i] : lists.start[i + 1]]
            assert (np.diff(partial) > 0).all() and (np.diff(full) > 0).all()
            out[i, partial] += 1
            out[i, full] += 2
        pictures.append(out)
    np.testing.assert_array_equal(pictures[0], pictures[1].T)
    assert (pictures[0] == 2).sum() == found.full and (pictures[0] == 1).sum() == found.partial
    return pictures[0]


def compare(rule, q, k, block, begin=None, always=0, head=0, exact=False, opening=0):
    """The layout against the mask. Returns how many partial blocks are loose."""
    ends = lambda at: np.arange(at[0], sum(at)) if isinstance(at, tuple) else at
    got = drawing(layout(rule, q, k, block, begin, always, head, opening))
    true = blocks(mask(rule, ends(q), ends(k), 0 if begin is None else begin, always, head, opening), ends(q), *block)
    assert not ((true > 0) & (got == 0)).any(), f"{rule}: a block is missed"
    assert not ((true < 2) & (got == 2)).any(), f"{rule}: a block that is not full is listed as full"
    loose = (got == 1) & (true != 1)
    assert not exact or not loose.any(), f"{rule}: a block is partial that the rule decides"
    return loose.sum()


# exact against the mask


@pytest.mark.parametrize("start", [0, 2**20 - 77, FAR - 300], ids=["near 0", "near 2^20", "near 2^22"])
@every_rule
def test_consecutive(name, start):
    """Odd lengths, blocks that are not square, queries that begin later than the keys, every kind of head."""
    draw = np.random.default_rng(sum(map(ord, name)) + start)
    for i in range(12):
        n = int(draw.integers(1, 300))
        m = int(draw.integers(1, n + 1))
        block = tuple(int(b) for b in draw.choice([1, 7, 16, 33, 64], 2))
        block = block if n < 100 else tuple(max(b, 7) for b in block)
        q, k = (start + n - m, m), (start, n)
        if i % 3 == 0 and start:
            k = (0, 60)
        compare(
            drawn(name, draw), q, k, block, always=int(draw.integers(0, 20)) * (i % 2), head=i % HEADS, exact=name in EXACT and i % 2 == 0
        )


@pytest.mark.parametrize("start", [0, 2**20], ids=["near 0", "near 2^20"])
@every_rule
def test_holes_and_documents(name, start):
    """Empty slots, padding, packed documents, scattered and unordered keys, exempt slots."""
    draw = np.random.default_rng(sum(map(ord, name)) + start)
    for i in range(8):
        n, block = int(draw.integers(20, 200)), tuple(int(b) for b in draw.choice([8, 16, 25], 2))
        rule, at = drawn(name, draw), start + np.arange(n)
        starts = np.sort(draw.choice(n, 3))
        begin = start + starts[np.searchsorted(starts, np.arange(n), "right") - 1] * (np.arange(n) >= starts[0])
        holes = lambda x: np.where(draw.random(len(x)) < 0.1, -1, x)
        compare(rule, at, at, block, begin, head=i % HEADS)
        compare(rule, holes(at), holes(at), block, begin, always=int(draw.integers(0, 30)), head=i % HEADS)
        compare(rule, at[n // 2 :], draw.permutation(holes(at)), block, begin[n // 2 :], head=i % HEADS)
        # whole blocks of padding among the queries and of empty slots among the keys
        half = np.arange(n) < n // 2
        compare(rule, at[n // 2 :], np.where(half, -1, at), block, head=i % HEADS)
        compare(rule, np.where(np.arange(n) % 60 < 30, at, -1), at, block, head=i % HEADS, exact=name == "full")
        # queries each with a beginning of their own
        compare(rule, at, at, block, start + (np.arange(n) * draw.random(n)).astype(int), head=i % HEADS)
        compare(rule, at, at, block, start + np.arange(n) % draw.integers(2, 4) * (np.arange(n) // 5), head=i % HEADS)


@pytest.mark.parametrize("start", [0, 2**20 - 77], ids=["near 0", "near 2^20"])
def test_random_links_are_all_listed(start):
    """With little else to see, so that a link that is missed shows: links longer and shorter than a block, packed documents too."""
    draw = np.random.default_rng(start)
    for i in range(40):
        n, size = int(draw.integers(100, 400)), int(draw.choice([1, 5, 16, 37, 64]))
        rule = parse(f"bigbird:block={size},window=1,n_global=0,n_random={draw.integers(1, 4)},seed={i}")
        block, at = tuple(int(b) for b in draw.choice([8, 16, 64], 2)), start + np.arange(n)
        # far out, links lead to keys near the start as well
        keys = at if not start else np.concatenate([np.arange(20000, 20300), at])
        # one document; several in a row; two that take turns
        begin = (None, start + np.arange(n) // 90 * 90, start + np.minimum(np.arange(n) % 2 * 61, np.arange(n)))[i % 3]
        compare(rule, at, keys, block, begin, head=i % HEADS)


def test_links_of_joined_patterns_are_all_listed():
    """Links that another pattern cuts short or stands beside; two patterns with links of different lengths."""
    draw, bare = np.random.default_rng(0), "window=1,n_global=0,n_random"
    for i in range(30):
        n, a, b = int(draw.integers(100, 400)), *draw.choice([1, 5, 16, 37], 2)
        other = (f"window:window={n // 2}", f"bigbird:block={b},{bare}=3,seed=9", "strided:window=1,stride=2")[i % 3]
        rule = parse(f"bigbird:block={a},{bare}=2,seed={i}{'|&'[i // 3 % 2]}{other}")
        compare(rule, (0, n), (0, n), tuple(int(x) for x in draw.choice([8, 16, 64], 2)), head=i % HEADS)


def test_joined_links_do_not_make_every_block_possible():
    """As many blocks as the parts have, near enough; at a million tokens in as little time."""
    n = 1 << 14
    count = lambda spec: len(layout(parse(spec), (0, n), (0, n), 64).pairs)
    links, beside, within = "bigbird:window=1,n_global=0", count("bigbird|window:window=300"), count("bigbird&window:window=9000")
    assert beside <= count("bigbird") + count("window:window=300") and within <= count("bigbird")
    assert count(f"{links}&window:window=64") < 3 * n / 64
    start = time.perf_counter()
    layout(parse("bigbird|strided:window=64,stride=65536"), (0, 1 << 20), (0, 1 << 20))
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize("start", [0, 2**20], ids=["near 0", "near 2^20"])
@every_rule
def test_first_tokens_that_are_exempt(name, start):
    """The first tokens of each document: one document, several, holes, and with exempt slots."""
    draw = np.random.default_rng(sum(map(ord, name)) + start)
    for i in range(10):
        n, block, opening = int(draw.integers(20, 200)), tuple(int(b) for b in draw.choice([8, 16, 25], 2)), int(draw.integers(1, 30))
        rule, at = drawn(name, draw), start + np.arange(n)
        begin = start + np.arange(n) // 50 * 50
        holes = lambda x: np.where(draw.random(len(x)) < 0.1, -1, x)
        compare(rule, (start, n), (start, n), block, None if i % 2 else start, head=i % HEADS, opening=opening)
        compare(rule, at, at, block, begin, head=i % HEADS, opening=opening)
        compare(rule, holes(at), draw.permutation(holes(at)), block, begin, int(draw.integers(0, 9)), i % HEADS, opening=opening)


def test_exempt_tokens_fill_their_blocks():
    found = drawing(layout(parse("window:window=8"), (0, 64), (0, 64), 8, opening=16))
    assert (found[2:, :2] == 2).all() and (found[4:, 2:3] == 0).all()


@every_rule
def test_documents_are_laid_out_as_each_alone(name):
    """Blocks that lie inside one document are as tight as without packing."""
    rule = drawn(name, np.random.default_rng(5))
    alone = drawing(layout(rule, (0, 128), (0, 128), 16))
    packed = drawing(layout(rule, (0, 256), (0, 256), 16, begin=np.repeat([0, 128], 128)))
    want = np.zeros_like(packed)
    want[:8, :8] = want[8:, 8:] = alone
    np.testing.assert_array_equal(packed, want)


@every_rule
def test_a_block_of_two_documents_is_tight(name):
    """Its queries do not list all of the first document's keys because its length is uncertain."""
    draw = np.random.default_rng(8)
    for _ in range(10):
        cut, rule = int(draw.integers(130, 140)), drawn(name, draw)
        found = drawing(layout(rule, (0, 256), (0, 256), 16, begin=np.where(np.arange(256) < cut, 0, cut), head=1))
        first = drawing(layout(rule, (0, 144), (0, 144), 16, head=1))
        assert not ((found[8, :8] > 0) & (first[8, :8] == 0)).any(), rule


def test_links_of_scattered_queries():
    """Queries of one block far apart have too many links to list: they are searched for, and none is missed."""
    draw = np.random.default_rng(0)
    q, k = np.sort(draw.choice(FAR, 64)), np.sort(draw.choice(FAR, 300))
    rule = parse("bigbird:block=1,window=1,n_global=0")
    k[:50] = rule.module.link(q[:50], 0, 1, rule.options)
    compare(rule, q, np.sort(k), (16, 4))
    assert mask(rule, q, k).sum() >= 50


def test_one_loose_union():
    """What intervals cannot tell: two conditions that only together fill a block. It is partial, never missed."""
    rule = parse("longformer:window=20,n_global=8")
    assert compare(rule, (16, 16), (0, 16), (16, 16)) == 0
    assert compare(parse("longformer:window=24,n_global=8"), (16, 16), (0, 16), (16, 16)) == 1


@every_rule
def test_nothing_at_all(name):
    rule = parse(name)
    for q, k in (((0, 0), (0, 10)), ((0, 10), (0, 0)), (np.full(9, -1), (0, 9)), ((0, 9), np.full(9, -1)), ((0, 9), (10, 9))):
        found = layout(rule, q, k, 4)
        assert found.full == found.partial == 0 and len(found.rows.items) == 0


# heads


@every_rule
def test_heads_of_one_behaviour_share_a_layout(name):
    draw, n = np.random.default_rng(1), 150
    at = np.arange(n)
    for _ in range(5):
        rule = drawn(name, draw)
        masks = [mask(rule, at, at, head=h) for h in range(HEADS)]
        found, of_head = layouts(rule, (0, n), (0, n), 16, heads=HEADS)
        for h in range(HEADS):
            assert not (blocks(masks[h], at, 16, 16) > drawing(found[of_head[h]]) * 2).any()
            for g in range(h):
                assert of_head[h] != of_head[g] or (masks[h] == masks[g]).all(), "heads that differ share a layout"


def test_how_many_layouts_there_are():
    count = lambda spec, heads=HEADS: len(set(behaviours(parse(spec), heads)))
    assert [count(s) for s in ("full", "window", "longformer", "local", "strided")] == [1] * 5
    assert count("bigbird") == HEADS and count("bigbird:n_random=0") == 1
    assert behaviours(parse("s2"), HEADS) == (0, 0, 2, 2) and behaviours(parse("duo"), HEADS) == (0, 0, 2, 2)
    assert behaviours(parse("dilated:heads=1"), HEADS) == (0, 1, 1, 1) and Span.heard is None


# speed, memory, cache


def best(f, times=4):
    """The shortest of a few runs in seconds: other programs can only make it longer."""
    took = []
    for _ in range(times):
        module.recent.clear()
        start = time.perf_counter()
        f()
        took.append(time.perf_counter() - start)
    return min(took)


@pytest.mark.parametrize(
    "spec, n, limit",
    [("window:window=4096", 1 << 20, 0.1), ("longformer:window=4096", 1 << 22, 0.4), ("bigbird", 1 << 20, 1), ("s2", 1 << 22, 0.4)],
    ids=lambda x: str(x).partition(":")[0],
)
def test_a_million_tokens(spec, n, limit):
    """A few times what a quiet core needs at most, or N x N is at work somewhere; and rows out there, against the mask."""
    rule = parse(spec)
    assert best(lambda: layout(rule, (0, n), (0, n))) < limit
    found = layout(rule, (0, n), (0, n))
    for i in (1, 100, n // 128 - 1):
        got = found.rows.items[found.rows.start[i] : found.rows.start[i + 1]]
        for first in (0, max(i - 63, 0)):
            keys = np.arange(first * 128, (first + 64) * 128)
            see = mask(rule, np.arange(i * 128, i * 128 + 128), keys).reshape(128, 64, 128)
            np.testing.assert_array_equal(np.isin(first + np.arange(64), got), see.any((0, 2)))


def test_memory_follows_the_blocks():
    def peak(n):
        module.recent.clear()
        tracemalloc.start()
        layout(parse("longformer:window=1024"), (0, n), (0, n)).columns  # noqa: B018
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    assert peak(1 << 19) < 2.5 * peak(1 << 18)


def test_answers_are_remembered_and_never_mixed_up():
    module.recent.clear()
    rule = parse("window:window=9")
    first = layout(rule, (0, 64), (0, 64), 8)
    assert layout(rule, np.arange(64), np.arange(64), 8) is first
    others = [
        layout(rule, (0, 65), (0, 65), 8),
        layout(rule, (1, 64), (0, 64), 8),
        layout(rule, (0, 64), (0, 64), (8, 4)),
        layout(rule, (0, 64), (0, 64), 8, begin=np.repeat([0, 32], 32)),
        layout(rule, (0, 64), (0, 64), 8, always=3),
        layout(rule, (0, 64), (0, 64), 8, opening=3),
        layout(parse("window:window=10"), (0, 64), (0, 64), 8),
        layout(parse("local:block=9"), (0, 64), (0, 64), 8),
    ]
    assert first not in others and layout(rule, (0, 64), (0, 64), 8) is first
    assert compare(rule, (0, 64), (0, 64), (8, 8)) == compare(rule, (0, 65), (0, 65), (8, 8)) == 0


def test_what_is_remembered_is_bounded(monkeypatch):
    module.recent.clear()
    monkeypatch.setattr(module.recent, "room", 4000)
    found = [layout(parse("full"), (0, n), (0, n), 8) for n in range(64, 128, 8)]
    assert len(module.recent) < len(found) and sum(x.pairs.nbytes for x in module.recent.made.values()) == module.recent.held <= 4000
    assert layout(parse("full"), (0, 120), (0, 120), 8) is found[-1]
    assert isinstance(layout(parse("full"), (0, 999), (0, 999), 8), Layout) and len(module.recent) == 1


def test_asking_again_costs_the_same_however_much_is_remembered():
    measured = []
    kept = Recent(100, lambda x: measured.append(x) or 1)
    for key in range(50):
        assert kept.get(key, lambda key=key: [key]) == [key]
    assert len(measured) == 50
    for key in reversed(range(50)):
        assert kept.get(key, None) == [key]
    assert len(measured) == 50 and len(kept) == kept.held == 50
    # the one that nobody asked for longest goes
    kept.room = 50
    kept.get("new", lambda: [0])
    assert 49 not in kept.made and 48 in kept.made and len(kept) == kept.held == 50


# intervals


def test_spans_contain_every_value_and_little_else():
    """Every operator on small intervals against all of their members. Ends are exact, or for % when an interval wraps, [0, n - 1]."""
    draw = np.random.default_rng(0)
    operators = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
        "reversed": lambda a, b: 5 - a + 2 * b + (-b),
        "//": lambda a, b: a // 7 + b * 0,
        "%": lambda a, b: a % 7 + b * 0,
        "% span": lambda a, b: a % (b * b + 1),
        "<": lambda a, b: a < b,
        "<=": lambda a, b: a <= b,
        ">": lambda a, b: a > b,
        ">=": lambda a, b: a >= b,
        "==": lambda a, b: a == b,
        "!=": lambda a, b: a != b,
        "&|~": lambda a, b: ~((a < b) & (a > 0)) | (b == 3),
        "plain": lambda a, b: (True & (a < 4)) | (b <= 3) | False,
    }
    for name, f in operators.items():
        for _ in range(60):
            (al, bl), wide = draw.integers(-12, 12, 2), draw.integers(0, 9, 2)
            a, b = np.arange(al, al + wide[0] + 1)[:, None], np.arange(bl, bl + wide[1] + 1)
            true = np.broadcast_to(f(a, b), (len(a), len(b)))
            for kind in (int, lambda x: np.array([x])):
                got = f(Span(kind(a[0, 0]), kind(a[-1, 0])), Span(kind(b[0]), kind(b[-1])))
                if isinstance(got, Truth):
                    assert (got.must, got.may) == (true.all(), true.any()) if name not in ("&|~", "plain") else got.must <= true.all()
                    assert got.may >= true.any(), name
                else:
                    assert got.lo <= true.min() and got.hi >= true.max(), name
                    exact = name in "+-*//" or (name == "%" and a[0, 0] // 7 == a[-1, 0] // 7)
                    assert not exact or (got.lo, got.hi) == (true.min(), true.max()), name


# what the rule says of the future and of a whole length


@pytest.mark.parametrize("after", [40, 2**20 + 3])
@every_rule
def test_reach(name, after):
    """What is let go is seen by no later query of any head, in any document."""
    draw = np.random.default_rng(after)
    for _ in range(6):
        rule = drawn(name, draw)
        k = np.unique(np.concatenate([np.arange(30), after - 1 - np.arange(60)]))
        k = k[(k >= 0) & (k < after)]
        begin = int(draw.choice([0, 7, after - 20]))
        later, kept = np.arange(after, after + 700), reach(rule, after, k, begin)
        seen = np.any([mask(rule, later, k, begin, head=h).any(0) for h in range(HEADS)], 0)
        assert not (seen & ~kept).any(), rule
        if name in EXACT - {"s2"} | {"longformer"}:
            np.testing.assert_array_equal(kept, seen)


def test_a_window_reaches_back_by_one_less_than_itself():
    kept = reach(parse("longformer:window=10,n_global=3"), 100, np.arange(100))
    np.testing.assert_array_equal(np.flatnonzero(kept), [0, 1, 2, *range(91, 100)])


@every_rule
def test_is_causal(name):
    """Never yes wrongly; and yes where the options are larger than the text."""
    draw = np.random.default_rng(2)
    for _ in range(40):
        rule, n, first = drawn(name, draw), int(draw.integers(1, 90)), int(draw.choice([0, 50, 2**20]))
        at = np.arange(first, first + n)
        plain = all((mask(rule, at, at, head=h) == np.tri(n, dtype=bool)).all() for h in range(HEADS))
        said = is_causal(rule, n, first)
        assert plain or not said, (rule, n, first)
        if name in ("full", "window") or (name == "local" and first == 0):
            assert said == plain, (rule, n, first)
    assert is_causal(parse(name), 128) or name == "dilated"


def test_a_window_that_holds_everything_takes_the_fast_path():
    place = lambda first: kernels.Places(None, first)
    causal = lambda spec, T, N, at=0: kernels.causal(place(at + N - T), place(at), T, N, parse(spec), None)
    assert causal("window:window=8", 8, 8) and causal("window:window=8", 1, 8) and causal("full", 3, 99)
    assert not causal("window:window=8", 9, 9) and not causal("window:window=8", 1, 9)
    assert causal("local:block=8", 4, 8, at=16) and not causal("local:block=8", 4, 8, at=15)
    assert not kernels.causal(place(4), place(0), 4, 9, parse("full"), None), "keys beyond the queries"
