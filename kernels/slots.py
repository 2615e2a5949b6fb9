"""token(): what a layer does with one token between its matrix products: rotate query and key, remember, attend to all slots, and note
what the memory wants to know. kept(): the slots that stay when a segment closes.

Plainly on every backend; on CUDA in a kernel that reads each slot once, the slots being divided over the processors.
"""

import ops
from kernels import ENGINE, TRITON, Places, attend
from kernels.dense import weights
from kernels.rotate import plain as turned


def plain(row, turn, at, s, rule, begin=None, always=0, opening=0, scale=None, born=None, mass=None, recent=0):
    """The specification. One token of one text, and one layer. H query heads, K key heads, N slots, D head width.

    row [(H + 2 K) D]: the token's query heads, key heads and values. turn: cos and sin of its position [1, 1, 1, P] (kernels/rotate.py).
    at [1, 1, 1] int32: the position. s: a layer's state (memory/base.py) of k, v [1, K, N, D], pos [1, 1 or K, N] and n, an array: the
    token takes slot n. rule, begin, always, opening, scale: as in attend(). What is noted beside:
    born: the field [1, 1, N] that holds the position as pos does, which may be renumbered. mass: the field [1, K, N] float32 that sums up
    the weights which a slot gets. recent: so many of the newest queries are kept unturned, s["q"] [1, H, recent, D], and their positions
    s["q_at"] [1, 1, recent]: that of position p at p % recent.
    Returns the values that the token sees, weighted, [H D], and the state after: of the same arrays where they can be written in place.
    """
    q, s = written(row, turn, at, s, born, mass, recent)
    what = q, s["k"], Places(at), Places(s["pos"]), rule, begin, always, opening, scale
    y = attend(*what[:2], s["v"], *what[2:]).reshape(-1)
    if mass:
        K, N = s["k"].shape[1:3]
        s = {**s, mass: ops.put(s[mass], s[mass] + weights(*what).reshape(1, K, -1, N).sum(2), 0)}
    return y, {**s, "n": ops.advance(s["n"], 1)}


def written(row, turn, at, s, born=None, mass=None, recent=0):
    """The token's queries, turned, [1, H, 1, D], and the state with its key, its value and what is noted of it; n is not moved on."""
    n, K, D = s["n"], s["k"].shape[1], s["k"].shape[3]
    H = row.shape[0] // D - 2 * K
    q, k, v = (row[a * D : b * D].reshape(1, -1, 1, D) for a, b in ((0, H), (H, H + K), (H + K, H + 2 * K)))
    new = {"k": turned(k, *turn), "v": v, "pos": ops.expand(at, (1, s["pos"].shape[1], 1))}
    if born:
        new[born] = at
    if mass:
        new[mass] = ops.full((1, K, 1), 0.0, ops.float32, v)
    s = {**s, **{f: ops.put(s[f], x, n) for f, x in new.items()}}
    if recent:
        s = {**s, **{f: ops.put(s[f], x, at[0, 0, 0] % recent) for f, x in (("q", q), ("q_at", at))}}
    return turned(q, *turn), s


def kept(rank, s, fields, size, ordered=True):
    """The state s with the `size` slots of highest rank [B, 1 or K, N] in its fields, arrays [B, 1 or K, N, ...], and no others.

    They stand in order of position, empty ones last. Where that is not asked for, those among the first `size` slots may stay where they
    are, others take the place of what goes, and the room behind them stays, empty: what is written in place need not move.
    """
    if not ordered and not isinstance(s["n"], int) and ENGINE in ("auto", "triton") and keeps(s, fields):
        return keep(rank, s, fields, size)
    stay = best(rank, size)
    if not in_order(s):
        at = ops.take(s["pos"], stay)
        stay = ops.take(stay, order(ops.where(at < 0, 2**30, at)))
    return {**s, **{f: ops.take(s[f], stay) for f in fields}}


def in_order(s):
    """Does the host know that a state's slots in use stand in order of position, none of them empty?"""
    return isinstance(s["n"], int) and s.get("solid", False)


def best(rank, size):
    """Indices of the `size` largest of rank [B, H, N] along its last axis, of equal ones the first, in slot order.

    Where a pattern hides much and neighbours are averaged, many scores are equal to the bit, and a row must keep what it keeps alone."""
    if ENGINE in ("auto", "triton") and chooses(rank, size):
        return choose(rank, size)
    return ops.top_first(rank, size)


def order(key):
    """Indices in rising order of key [.., .., n], along its last axis; of equal ones the first are first."""
    if ENGINE in ("auto", "triton") and orders(key):
        return sort(key)
    return ops.sort_by(key, ops.expand(ops.arange(key.shape[-1], key)[None, None], key.shape))


if TRITON:
    from kernels.slots_triton import best as choose
    from kernels.slots_triton import can, chooses, keep, keeps, orders, token
    from kernels.slots_triton import order as sort
else:
    token, can, keeps, orders = plain, lambda s, heads: False, lambda s, fields: False, lambda key: False
    chooses = lambda rank, size: False
