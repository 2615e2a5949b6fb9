"""attend(), block-sparse and portable: gather the keys that the layout names, attend, forget. Nothing T x N ever exists.

Queries are cut into blocks. For each, kernels/layout.py names the blocks of keys that the rule lets it see; these are gathered,
and the framework's own fused attention runs on them with the mask of exactly those positions. Each query meets all of its
keys in one call, so nothing has to be merged. The backward pass is FlashAttention-2's (Dao 2023, arXiv:2307.08691, algorithm 2),
written out once for both frameworks, with the gradient of the log-sum-exp L, where a merge asks for it:

    P = softmax(Q K^T), dV = P^T dO, dS = P * (dO V^T - rowsum(O * dO) + dL), dQ = dS K, dK = dS^T Q

A bias by distance is added to the scores of the stripe at hand; a table's gradient is dS summed by distance. Slopes have none.

Symbols: B rows, H query heads, K key heads, T queries, N keys, D head width (of values it may be less), R entries of a table. A stripe
is s blocks of r queries, each with c keys; heads that the rule treats alike (a group) have one layout, h query heads over g key heads.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

import ops
from kernels import dense
from kernels.layout import Layout, layout
from kernels.named import named, rule_of
from kernels.recent import Recent
from kernels.spans import behaviours, is_causal
from ops import Array

# tokens in a block of queries, of keys (bench/blocks.py --sweep)
BLOCK = (128, 64) if ops.BACKEND == "mlx" and ops.on_gpu() else (64, 32)
# keys above which heads that see all before them are left to the framework: MLX's holds all scores of a gradient at once
ALONE = 0 if ops.BACKEND == "torch" else 1 << 17


def stacked():
    """Scores that may live at once: a CPU is best served block by block, a GPU by few large calls."""
    return 1 << 28 if ops.on_gpu() else 1


def attend(q, k, v, q_at, k_at, rule, begin=None, always=0, opening=0, scale=None, bias=None, lse=False):
    """See kernels.attend. Queries and keys must stand at consecutive positions that the host knows; `begin` it must be able to read."""
    H, D = q.shape[1], q.shape[3]
    scale = D**-0.5 if scale is None else scale
    who, (slope, table) = named(rule), (None, None) if bias is None else bias

    def sparse(q, k, v, heads):
        return attention(q, k, v, table, slope, begin, who, heads, q_at.first, k_at.first, always, opening, scale, lse)

    sides = (q_at.first, q.shape[2]), (k_at.first, k.shape[2])
    plain = () if lse or bias is not None or ops.tracing() else causal_heads(rule, *sides, begin is not None, H)
    if not plain:
        y, sums = sparse(q, k, v, list(range(H)))
        return (y, sums) if lse else y
    rest = [h for h in range(H) if h not in plain]
    parts = []
    for heads in (list(plain), rest):
        keys = shared([h * k.shape[1] // H for h in heads])
        parts.append([of_heads(x, i) for x, i in ((q, heads), (k, keys), (v, keys))])
    y = ops.cat([ops.sdpa(*parts[0], "causal", scale), sparse(*parts[1], rest)[0]], 1)
    return of_heads(y, np.argsort([*plain, *rest]).tolist())


@functools.lru_cache(maxsize=256)
def causal_heads(rule, q, k, documents, heads):
    """The heads that see all before them and are better left to the framework, if there are others. q, k: (first, n)."""
    (at, T), (first, N) = q, k
    if documents or at + T != first + N or T > N or N <= ALONE:
        return ()
    who = behaviours(rule, heads)
    plain = {h for h in set(who) if is_causal(rule, N, first, h)}
    return tuple(h for h in range(heads) if who[h] in plain) if plain < set(who) else ()


def shared(keys):
    """The key heads to read for query heads that want these: query heads that share one read it once, where each serves equally many."""
    once = sorted(set(keys))
    return once if keys == [i for i in once for _ in range(len(keys) // len(once))] else keys


def of_heads(x, heads, at=None):
    """The heads of x [B, H, ., .], as a view if they are neighbours. at: the same as an array, if there is one."""
    a, b = heads[0], heads[-1] + 1
    if heads == list(range(a, b)):
        return x if b - a == x.shape[1] else x[:, a:b]
    return ops.entries(x, ops.array(np.array(heads, np.int32)) if at is None else at, 1)


# ---------------------------------------------------------------- the plan: what the host finds out once


class Rows(NamedTuple):
    """Where documents begin, as something to look up by: int32 [count, T] as bytes."""

    data: bytes
    count: int

    def each(self):
        return np.frombuffer(self.data, np.int32).reshape(self.count, -1)


def documents(begin):
    """`begin` on the host as Rows, one for those that are alike; None: there is none."""
    if begin is None:
        return None
    rows = ops.known(begin)[:, 0].astype(np.int32)
    rows = rows[:1] if (rows == rows[:1]).all() else rows
    return Rows(rows.tobytes(), len(rows))


def found(rule, q, k, docs, always, opening, who):
    """Layouts by behaviour: {a head: Layout} for the heads `who`; q, k: (first, n). Of several rows, all that any of them needs."""
    out = {}
    for h in sorted(set(who)):
        rows = [layout(rule, q, k, BLOCK, begin, always, h, opening) for begin in ([None] if docs is None else docs.each())]
        # a block may be full in one row and partial in another: here that is all the same
        pairs = np.unique(np.concatenate([x.pairs & ~(1 << 31) for x in rows])) if len(rows) > 1 else None
        out[h] = rows[0] if pairs is None else Layout(pairs, rows[0].shape, BLOCK)
    return out


@functools.lru_cache(maxsize=64)
def share(rule, q, k, docs, always, opening, heads):
    """The share of all scores that blocks compute, of the heads that are left to them."""
    plain = causal_heads(rule, q, k, docs is not None, heads)
    who = [h for i, h in enumerate(behaviours(rule, heads)) if i not in plain]
    layouts = found(rule, q, k, docs, always, opening, who)
    return sum(len(layouts[h].pairs) / layouts[h].shape[0] for h in who) * BLOCK[1] / (k[1] * len(who))


class Group(NamedTuple):
    """Heads that behave alike: query heads, as an array too, the key heads that they read, and one of them to ask the rule with,
    [1, 1, 1]."""

    heads: list
    at: Any
    keys: list
    head: Any


class Work(NamedTuple):
    """A stripe's work for one group: positions of the queries, int32 [s, 1, r, 1], and the blocks of keys that each block of them
    visits, [s, c / block], -1 where there is none; the same as numbers among all key heads' blocks, [g s c / block], 0 for none."""

    group: Group
    at: Any
    blocks: Any
    where: Any


class Plan(NamedTuple):
    """What a call does: [(a, b, [Work])], queries a..b at a time. back: puts the groups' heads in order; None: they are."""

    steps: list
    back: Any
    nbytes: int


def planned(*how):
    """The Plan for these arguments of plan(), from those that were made last: the layers of a model, and its backward pass, find the
    arrays on the device."""
    return recent.get((*how, stacked(), BLOCK, str(ops.device())), lambda: plan(*how))


recent = Recent(1 << 27, lambda made: made.nbytes)  # bytes of arrays that are kept


def plan(rule, q, k, docs, always, opening, heads, key_heads, rows):
    """The Plan for query heads `heads` (their numbers for the rule) over key_heads, in so many rows of scores."""
    every = behaviours(rule, max(heads) + 1)
    who = [every[h] for h in heads]
    layouts = found(rule, q, k, docs, always, opening, who)
    nbytes, groups = 0, []

    def put(x):
        nonlocal nbytes
        nbytes += 4 * np.size(x)
        return ops.array(np.ascontiguousarray(x, np.int32))

    for h in layouts:
        mine = [i for i, first in enumerate(who) if first == h]
        groups.append(Group(mine, put(mine), shared([i * key_heads // len(who) for i in mine]), put([[[h]]])))
    lists, n, steps = [x.rows for x in layouts.values()], -(-k[1] // BLOCK[1]), []
    for a, b, tables in stripes(lists, q[1], stacked() // (rows * len(heads))):
        at = put((q[0] + np.arange(a, b)).reshape(len(tables[0]), 1, -1, 1))
        work = []
        for g, t in zip(groups, tables):
            work.append(Work(g, at, put(t), put((np.array(g.keys)[:, None] * n + np.maximum(t, 0).ravel()).ravel())))
        # queries that no head lets see anything keep their zeros
        if any((t >= 0).any() for t in tables):
            steps.append((a, b, work))
    order = [i for g in groups for i in g.heads]
    back = None if order == sorted(order) else put(np.argsort(order))
    return Plan(steps, back, nbytes)


def stripes(lists, T, room):
    """(a, b, key blocks of each group): queries a..b, and for every group's Lists key blocks int32 [s, c], -1 where there is none.

    Blocks of queries are stacked until one head has `room` scores; the last one may be short and stands alone.
    """
    size = BLOCK[0]
    longest = np.max([np.diff(x.start) for x in lists], 0)
    i, n = 0, len(longest)
    while i < n:
        e, most = i + 1, longest[i]
        while e < T // size and (e + 1 - i) * size * BLOCK[1] * max(most, longest[e]) <= room:
            most, e = max(most, longest[e]), e + 1
        yield i * size, min(e * size, T), [table(x, i, e) for x in lists]
        i = e


def table(rows, i, e):
    """The key blocks of query blocks i..e, int32 [e - i, the most of them, at least 1], filled up with -1."""
    count = np.diff(rows.start[i : e + 1])
    out = np.full((e - i, max(count.max(), 1)), -1, np.int32)
    out[np.arange(out.shape[1]) < count[:, None]] = rows.items[rows.start[i] : rows.start[e]]
    return out


# ---------------------------------------------------------------- the passes


class Call:
    """One call's plan, and what both passes do with it."""

    def __init__(self, q, k, table, slope, begin, rule, heads, q_first, k_first, always, opening):
        (B, _, T, _), (K, N) = q.shape, k.shape[1:3]
        docs = documents(begin)
        self.B, self.N, self.heads, self.rule, self.first, self.exempt = B, N, len(heads), rule_of(rule), k_first, (always, opening)
        # rows whose documents begin alike share a mask
        self.begin = begin[:1] if docs is not None and docs.count == 1 else begin
        self.slope, self.windows = slope, None if table is None else windows(table)
        # a bias takes as much memory again
        rows = B if table is None and slope is None else 2 * B
        self.steps, self.back, _ = planned(self.rule, (q_first, T), (k_first, N), docs, always, opening, tuple(heads), K, rows)

    def blocks(self, x):  # [B, K, N, D] -> [B, K blocks, block, D]
        B, K, N, D = x.shape
        if N % BLOCK[1]:
            x = ops.cat([x, ops.full((B, K, -N % BLOCK[1], D), 0, x.dtype, x)], 2)
        return x.reshape(B, -1, BLOCK[1], D)

    def cut(self, x, a, b, w):  # [B, H, T, D] -> [s, B h, r, D]
        x = of_heads(x[:, :, a:b], w.group.heads, w.group.at)
        s, r = w.at.shape[0], w.at.shape[2]
        return ops.swap(x.reshape(-1, s, r, x.shape[3]), 0, 1)

    def join(self, parts):  # groups' [s, B h, r, D] -> [B, H, s r, D]
        parts = [ops.swap(x, 0, 1).reshape(self.B, -1, x.shape[0] * x.shape[2], x.shape[3]) for x in parts]
        x = parts[0] if len(parts) == 1 else ops.cat(parts, 1)
        return x if self.back is None else ops.entries(x, self.back, 1)

    def fold(self, x, w):  # [s, B h, ., .] -> [s, B g, h / g ., .]: queries that share a key head become rows
        return x.reshape(x.shape[0], self.B * len(w.group.keys), -1, x.shape[3])

    def gather(self, x, w):  # [B, K blocks, block, D] -> [s, B g, c, D]
        y = ops.entries(x, w.where, 1)
        return ops.swap(y.reshape(self.B * len(w.group.keys), w.at.shape[0], -1, x.shape[3]), 0, 1)

    def scatter(self, x, w, y):  # adds [s, B g, c, D] where it was gathered
        return ops.add(x, w.where, ops.swap(y, 0, 1).reshape(x.shape[0], -1, BLOCK[1], x.shape[3]))

    def columns(self, w):
        """Numbers of the keys, negative where there is no block, and their positions, int32 [s, 1, 1, c]."""
        cols = (w.blocks[..., None] * BLOCK[1] + ops.arange(BLOCK[1], w.blocks)).reshape(w.at.shape[0], 1, 1, -1)
        # no key: an empty slot, as everywhere
        return cols, ops.where((cols < 0) | (cols >= self.N), -1, cols + self.first)

    def seen(self, a, b, w):
        """May the queries a..b see their keys? bool [s, 1 or B h, r, c]."""
        (cols, at), s, begin = self.columns(w), w.at.shape[0], 0
        if self.begin is not None:
            begin = ops.swap(self.begin[:, 0, a:b].reshape(self.begin.shape[0], s, -1, 1), 0, 1)
        see = dense.sees(w.at, at, begin, w.group.head, cols, self.rule, *self.exempt)
        return see if see.shape[1] == 1 else ops.repeat(see, len(w.group.heads), 1)

    def bias(self, w):
        """What is added to the scores for distance, float32 [s, B h, r, c]; None: nothing."""
        if self.slope is not None:
            x = ops.entries(self.slope, w.group.at, 0).reshape(-1, 1, 1) * (self.columns(w)[1] - w.at)
        elif self.windows is not None:
            x = ops.entries(self.windows, self.reached(w), 0).reshape(w.at.shape[0], len(w.group.heads), w.at.shape[2], -1)
        else:
            return None
        return x if self.B == 1 else ops.cat([x] * self.B, 1)

    def reached(self, w):
        """Which windows of the table lie beside the blocks of keys: [s h r c / block]."""
        n = self.windows.shape[0] // self.heads
        d = w.at - self.columns(w)[1][..., :: BLOCK[1]]
        d = ops.where(d < 0, 0, ops.minimum(d, n - BLOCK[1]))
        return (w.group.at.reshape(-1, 1, 1) * n + d).reshape(-1)

    def by_distance(self, x, w, ds):  # adds [s, B h, r, c] to the gradient of the windows, [1, H n, block]
        ds = ds.reshape(w.at.shape[0], self.B, -1).sum(1)
        return ops.add(x, self.reached(w), ds.reshape(1, -1, BLOCK[1]))

    def scores(self, x, keys, see, bias, scale, w):  # [s, B h, r, c] float32
        s = ops.cast(self.fold(x, w) @ ops.swap(keys, 2, 3), ops.float32).reshape(*x.shape[:3], keys.shape[2])
        s *= scale
        if bias is not None:
            s += bias
        return ops.where(see, s, -1e30)


def windows(table):
    """The table as it lies beside a block of keys, [H n, block]: row d, column j is the entry of distance d - j. A row each for
    d < R + block - 1, so n >= R + block - 1; the next block - 1 rows are there for entries_of() alone."""
    R, w = table.shape[1], BLOCK[1]
    d = ops.arange(R + 2 * w - 2, table)[:, None] - ops.arange(w, table)
    return ops.entries(table, ops.where(d < 0, 0, ops.minimum(d, R - 1)).reshape(-1), 1).reshape(-1, w)


def entries_of(x, H):
    """The gradient of the table from that of its windows: [H n, block] -> [H, R]."""
    w = BLOCK[1]
    x = x.reshape(H, -1)
    R = x.shape[1] // w - 2 * w + 2
    e, j = ops.arange(R + w - 1, x)[:, None], ops.arange(w, x)
    x = ops.entries(x, ((e + j) * w + j).reshape(-1), 1).reshape(H, -1, w).sum(-1)
    # what lies further than the last entry has its value
    return ops.cat([x[:, : R - 1], x[:, R - 1 :].sum(-1)[:, None]], 1)


def forward(
    q: Array, k: Array, v: Array, table: Array | None, slope: Array | None, begin: Array | None, rule: str, heads: list[int], q_first: int,
    k_first: int, always: int, opening: int, scale: float, wanted: bool,
) -> tuple[Array, Array]:  # fmt: skip
    """y and the log-sum-exp [B, H, T], empty unless it is wanted. rule: its name; heads: the numbers of q's heads for the rule; table
    [H, R] and slope [H], of q's heads."""
    call = Call(q, k, table, slope, begin, rule, heads, q_first, k_first, always, opening)
    k, v, y, last = call.blocks(k), call.blocks(v), ops.full((*q.shape[:3], v.shape[3]), 0, q.dtype, q), None
    lse = ops.full((*q.shape[:2], q.shape[2] if wanted else 0, 1), -float("inf"), ops.float32, q)
    wide = lambda x: ops.cast(x, ops.float32)
    for a, b, work in call.steps:
        parts, sums = [], []
        for w in work:
            x = ops.after(call.cut(q, a, b, w), last)
            keys, values, see, bias = call.gather(k, w), call.gather(v, w), call.seen(a, b, w), call.bias(w)
            if wanted:
                # from rounded scores the answers of different keys would be weighed against each other wrongly
                s = call.scores(wide(x), wide(keys), see, bias, scale, w)
                sum_ = ops.logsumexp(s, -1)[..., None]
                p = call.fold(ops.exp(s - sum_) * wide(see), w)
                last = ops.cast(p @ wide(values), q.dtype).reshape(*x.shape[:3], -1)
                sums.append(ops.where(ops.amax(see, -1), sum_, -float("inf")))
            else:
                last = ops.sdpa(x, keys, values, see if bias is None else bias + ops.where(see, 0.0, -float("inf")), scale)
            parts.append(last)
        y = ops.put(y, call.join(parts), a)
        lse = ops.put(lse, call.join(sums), a) if wanted else lse
    return y, lse[..., 0]


def backward(
    q: Array, k: Array, v: Array, table: Array | None, slope: Array | None, begin: Array | None, rule: str, heads: list[int], q_first: int,
    k_first: int, always: int, opening: int, scale: float, wanted: bool, y: Array, lse: Array, dy: Array, dlse: Array,
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """dq, dk, dv and the table's, empty if there is none."""
    K, N = k.shape[1:3]
    call = Call(q, k, table, slope, begin, rule, heads, q_first, k_first, always, opening)
    like, k, v = k, call.blocks(k), call.blocks(v)
    dq = ops.full(q.shape, 0, q.dtype, q)
    dk, dv = (ops.full(x.shape, 0, ops.float32, x) for x in (k, v))
    dtable = ops.full((1, *call.windows.shape) if table is not None else (0,), 0, ops.float32, q)
    last, wide = None, lambda x: ops.cast(x, ops.float32)
    for a, b, work in call.steps:
        parts = []
        for w in work:
            x, o, do = (call.cut(ops.after(t, last), a, b, w) for t in (q, y, dy))
            see = call.seen(a, b, w)
            # a query that sees nothing has zeros for an answer, whatever its scores
            some = ops.amax(see, -1)
            do = do * ops.cast(some, do.dtype)
            keys, values = call.gather(k, w), call.gather(v, w)
            p = call.fold(ops.softmax(call.scores(x, keys, see, call.bias(w), scale, w), -1), w)
            shape, x, do = x.shape, call.fold(x, w), call.fold(do, w)
            dv = call.scatter(dv, w, ops.swap(ops.cast(p, x.dtype), 2, 3) @ do)
            ds = wide(do @ ops.swap(values, 2, 3))
            # without rounding the same; a table's gradient sums over so much that a row of dS must sum to what it should
            delta = (wide(call.fold(o, w)) * wide(do) if table is None else p * ds).sum(-1)[..., None]
            if wanted:
                delta = delta - call.fold(ops.where(some, call.cut(dlse[..., None], a, b, w), 0.0), w)
            ds -= delta
            ds *= p
            if table is not None:
                dtable = call.by_distance(dtable, w, ds)
            ds = ops.cast(ds, x.dtype)
            dk = call.scatter(dk, w, ops.swap(ds, 2, 3) @ x)
            parts.append((ds @ keys * scale).reshape(shape))
            last = ops.mark(parts[-1], dk, dv, *([] if table is None else [dtable]))
        dq = ops.put(dq, call.join(parts), a)
    dk *= scale
    whole = lambda x: ops.cast(x.reshape(x.shape[0], K, -1, x.shape[3])[:, :, :N], like.dtype)
    return dq, whole(dk), whole(dv), dtable if table is None else entries_of(dtable, call.heads)


def outputs(q, k, v, *rest):
    """Shapes and dtypes of what forward() returns."""
    return ((*q.shape[:3], v.shape[3]), q.dtype), ((*q.shape[:2], q.shape[2] if rest[-1] else 0), ops.float32)


attention = ops.operator("blocks", forward, backward, outputs)
