"""attend(), block-sparse and portable: gather the keys that the layout names, attend, forget. Nothing T x N ever exists.

Queries are cut into blocks. For each, kernels/layout.py names the blocks of keys that the rule lets it see; these are gathered,
and the framework's own fused attention runs on them with the mask of exactly those positions. Each query meets all of its
keys in one call, so nothing has to be merged. The backward pass is FlashAttention-2's (Dao 2023, arXiv:2307.08691, algorithm 2),
written out once for both frameworks:

    P = softmax(Q K^T), dV = P^T dO, dS = P * (dO V^T - rowsum(O * dO)), dQ = dS K, dK = dS^T Q

Symbols: B rows, H query heads, K key heads, T queries, N keys, D head width. A stripe is s blocks of r queries, each with
c keys; heads that the rule treats alike (a group) have one layout, h query heads over g key heads.
"""

from typing import Any, NamedTuple

import numpy as np

import ops
from kernels import dense
from kernels.layout import Layout, layout
from kernels.spans import behaviours

BLOCK = 64, 32  # tokens in a block of queries, of keys


def stacked():
    """Scores that may live at once: a CPU is best served block by block, a GPU by few large calls."""
    return 1 << 25 if ops.on_gpu() else 1


class Group(NamedTuple):
    """Heads that behave alike: query heads, the key heads that they read, one of them to ask the rule with, and the key
    blocks that each block of queries visits."""

    heads: list
    keys: list
    head: int
    rows: Any  # layout.Lists


def attend(q, k, v, q_at, k_at, rule, begin=None, always=0, opening=0, scale=None):
    """See kernels.attend. Queries and keys must stand at consecutive positions that the host knows, and so must `begin`."""
    H, D, N = q.shape[1], q.shape[3], k.shape[2]
    scale = D**-0.5 if scale is None else scale
    # rows whose documents begin alike share a mask
    docs = documents(begin)
    begin = begin[:1] if docs is not None and len(docs) == 1 else begin
    layouts = found(rule, (q_at.first, q.shape[2]), (k_at.first, N), docs, always, opening, H)
    groups = grouped(layouts, behaviours(rule, H), k.shape[1])
    room = stacked() // (q.shape[0] * H)

    def seen(a, b, cols, head):
        """May the queries a..b see these keys? bool [s, 1 or B, r, c]; cols int [s, c] counts keys, -1 where there is none."""
        s = len(cols)
        at = q_at.first + np.arange(a, b).reshape(s, 1, -1, 1)
        cols = ops.array(cols[:, None, None])
        head = ops.full((1, 1, 1), head, ops.int32, cols)
        # no key: an empty slot, as everywhere
        where = ops.where(cols < 0, -1, cols + k_at.first)
        first = 0 if begin is None else ops.swap(begin[:, 0, a:b].reshape(begin.shape[0], s, -1, 1), 0, 1)
        return dense.sees(ops.array(at.astype("int32")), where, first, head, cols, rule, always, opening)

    return ops.custom(*passes(groups, seen, scale, room))(q, k, v)


def documents(begin):
    """`begin` on the host, one row for those that are alike, [1 or B, T]; None: there is none."""
    if begin is None:
        return None
    rows = ops.known(begin)[:, 0]
    return rows[:1] if (rows == rows[:1]).all() else rows


def found(rule, q, k, docs, always, opening, heads):
    """Layouts by behaviour: {its first head: Layout}; q, k: (first, n). Of several rows, all that any of them needs."""
    out = {}
    for h in sorted(set(behaviours(rule, heads))):
        rows = [layout(rule, q, k, BLOCK, begin, always, h, opening) for begin in ([None] if docs is None else docs)]
        # a block may be full in one row and partial in another: here that is all the same
        pairs = np.unique(np.concatenate([x.pairs & ~(1 << 31) for x in rows])) if len(rows) > 1 else None
        out[h] = rows[0] if pairs is None else Layout(pairs, rows[0].shape, BLOCK)
    return out


def area(layouts, who, T):
    """Scores that are computed, of all heads, for T queries."""
    return sum(len(layouts[h].pairs) / layouts[h].shape[0] for h in who) * T * BLOCK[1]


def grouped(layouts, who, key_heads):
    """The heads by what they see. who: as behaviours() says."""
    groups = []
    for h, found in layouts.items():
        heads = [i for i, first in enumerate(who) if first == h]
        keys = [i * key_heads // len(who) for i in heads]
        once = sorted(set(keys))
        # query heads that share a key head gather it once, where each key head has equally many
        keys = once if all(keys.count(i) * len(once) == len(heads) for i in once) else keys
        groups.append(Group(heads, keys, h, found.rows))
    return groups


def stripes(groups, T, room):
    """(a, b, blocks of each group): queries a..b, and for every group key blocks int32 [s, c], -1 where there is none.

    Blocks of queries are stacked until one head has `room` scores; the last one may be short and stands alone.
    """
    size = BLOCK[0]
    longest = np.max([np.diff(g.rows.start) for g in groups], 0)
    i, n = 0, len(longest)
    while i < n:
        e, most = i + 1, longest[i]
        while e < T // size and (e + 1 - i) * size * BLOCK[1] * max(most, longest[e]) <= room:
            most, e = max(most, longest[e]), e + 1
        yield i * size, min(e * size, T), [table(g.rows, i, e) for g in groups]
        i = e


def table(rows, i, e):
    """The key blocks of query blocks i..e, int32 [e - i, the most of them, at least 1], filled up with -1."""
    count = np.diff(rows.start[i : e + 1])
    out = np.full((e - i, max(count.max(), 1)), -1, np.int32)
    out[np.arange(out.shape[1]) < count[:, None]] = rows.items[rows.start[i] : rows.start[e]]
    return out


def passes(groups, seen, scale, room):
    """The functions forward(q, k, v) -> y and backward(q, k, v, y, dy) -> dq, dk, dv."""
    size = BLOCK[1]
    order = [h for g in groups for h in g.heads]
    back = None if len(groups) == 1 else ops.array(np.argsort(order).astype("int32"))

    def in_blocks(x):  # [B, K, N, D] -> [B, K blocks, block, D]
        B, K, N, D = x.shape
        if N % size:
            x = ops.cat([x, ops.full((B, K, -N % size, D), 0, x.dtype, x)], 2)
        return x.reshape(B, -1, size, D)

    def cut(x, a, b, g, s):  # [B, H, T, D] -> [s, B h, r, D]
        x = x[:, :, a:b]
        x = x if back is None else ops.entries(x, ops.array(np.array(g.heads, "int32")), 1)
        return ops.swap(x.reshape(-1, s, (b - a) // s, x.shape[3]), 0, 1)

    def join(parts, heads):  # groups' [s, B h, r, D] -> [B, H, s r, D]
        parts = [ops.swap(x, 0, 1).reshape(-1, n, x.shape[0] * x.shape[2], x.shape[3]) for x, n in zip(parts, heads)]
        return parts[0] if back is None else ops.entries(ops.cat(parts, 1), back, 1)

    def fold(x, B, g):  # [s, B h, ., .] -> [s, B g, h / g ., .]: queries that share a key head become rows
        return x.reshape(x.shape[0], B * len(g.keys), -1, x.shape[3])

    def steps(T, N):
        """The stripes' work, group by group: a, b and [(group, s, where its key blocks lie among all of them, the keys' numbers)]."""
        n = -(-N // size)
        for a, b, tables in stripes(groups, T, room):
            work = []
            for g, blocks in zip(groups, tables):
                at = np.array(g.keys)[:, None] * n + np.maximum(blocks, 0).ravel()
                cols = np.where(blocks[..., None] < 0, -1, blocks[..., None] * size + np.arange(size, dtype="int32"))
                cols = np.where(cols < N, cols, -1).reshape(len(blocks), -1)
                work.append((g, len(blocks), ops.array(at.ravel().astype("int32")), cols))
            # queries that no head lets see anything keep their zeros
            if any((cols >= 0).any() for *_, cols in work):
                yield a, b, work

    def gather(x, at, g, s):  # [B, K blocks, block, D] -> [s, B g, c, D]
        y = ops.entries(x, at, 1)
        return ops.swap(y.reshape(x.shape[0] * len(g.keys), s, -1, x.shape[3]), 0, 1)

    def scatter(x, at, y):  # adds [s, B g, c, D] where it was gathered
        return ops.add(x, at, ops.swap(y, 0, 1).reshape(x.shape[0], -1, size, x.shape[3]))

    def per_head(see, B, g):  # [s, 1 or B, r, c] -> [s, 1 or B h, r, c]
        return see if see.shape[1] == 1 else ops.repeat(see, len(g.heads), 1)

    def forward(q, k, v):
        B, N = k.shape[0], k.shape[2]
        k, v, y, last = in_blocks(k), in_blocks(v), ops.full(q.shape, 0, q.dtype, q), None
        for a, b, work in steps(q.shape[2], N):
            parts = []
            for g, s, at, cols in work:
                x = ops.after(cut(q, a, b, g, s), last)
                see = per_head(seen(a, b, cols, g.head), B, g)
                last = ops.sdpa(x, gather(k, at, g, s), gather(v, at, g, s), see, scale)
                parts.append(last)
            y = ops.put(y, join(parts, [len(g.heads) for g in groups]), a)
        return y

    def backward(q, k, v, y, dy):
        B, K, N, D = k.shape
        like, k, v = k, in_blocks(k), in_blocks(v)
        dq = ops.full(q.shape, 0, q.dtype, q)
        dk, dv = (ops.full(x.shape, 0, ops.float32, x) for x in (k, v))
        last, wide = None, lambda x: ops.cast(x, ops.float32)
        for a, b, work in steps(q.shape[2], N):
            parts = []
            for g, s, at, cols in work:
                x, o, do = (cut(ops.after(t, last), a, b, g, s) for t in (q, y, dy))
                see = per_head(seen(a, b, cols, g.head), B, g)
                # a query that sees nothing has zeros for an answer, whatever its scores
                do = do * ops.cast(ops.amax(see, -1), do.dtype)
                shape = *x.shape[:3], cols.shape[1]
                x, o, do = (fold(t, B, g) for t in (x, o, do))
                keys, values = gather(k, at, g, s), gather(v, at, g, s)
                scores = wide(x @ ops.swap(keys, 2, 3)).reshape(shape)  # [s, B h, r, c]
                scores *= scale
                p = fold(ops.softmax(ops.where(see, scores, -1e30), -1), B, g)
                dv = scatter(dv, at, ops.swap(ops.cast(p, x.dtype), 2, 3) @ do)
                ds = wide(do @ ops.swap(values, 2, 3))
                ds -= (wide(o) * wide(do)).sum(-1)[..., None]
                ds *= p
                ds = ops.cast(ds, x.dtype)
                dk = scatter(dk, at, ops.swap(ds, 2, 3) @ x)
                parts.append((ds @ keys * scale).reshape(*shape[:3], D))
                last = ops.mark(parts[-1], dk, dv)
            dq = ops.put(dq, join(parts, [len(g.heads) for g in groups]), a)
        dk *= scale
        whole = lambda x: ops.cast(x.reshape(B, K, -1, D)[:, :, :N], like.dtype)
        return dq, whole(dk), whole(dv)

    return forward, backward
