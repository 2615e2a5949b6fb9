"""Ada-KV (Feng et al. 2024, arXiv:2407.11550): SnapKV's scores, the budget of a layer shared among its key heads.

    B_i = how many of the layer's best h * budget scores, all heads together, are of head i

With the window aside, the paper mixes in an even share, B_i <- (1 - floor) B_i + floor * budget (its safeguard). Applied at every close,
this would shrink wide heads again and again; so here each head's own best floor * budget are safe, and the rest goes to the layer's best.
The released code max-pools over 7 and may weigh heads by how concentrated they are; here scores are SnapKV's.

WHAT IS SAVED: a layer's kept tokens stand in one line, head after head, and together they are budget * heads, so the bytes are those of
snapkv at the same budget. A layer at work gathers its line into a rectangle as wide as the widest head may be, `widest` times the budget;
no head keeps more than that. So memory is small at rest, and each call copies the layer's past once.
"""

import ops
from memory import snapkv
from memory._past import Past
from memory.base import blank
from memory.snapkv import Memory as Snap


class Options:
    budget: int = 1024  # tokens kept by each key head, the window included, in the mean over a layer's heads
    window: int = 32
    pool: int = 5
    floor: float = 0.2  # the share of the budget that each head has for itself
    widest: float = 2.0  # the most that a head keeps, in budgets
    kv_positions: str = "absolute"


def check(o):
    snapkv.check(o)
    if not 0 <= o.floor <= 1 or o.widest < 1:
        raise ValueError(f"floor={o.floor}, widest={o.widest}: floor must lie between 0 and 1, and widest be at least 1")


class Memory(Past, Snap):
    @property
    def size(self):
        return int(self.o.budget * min(self.o.widest, self.c.num_key_value_heads))

    @property
    def enough(self):
        return self.o.budget

    def forget(self, attn, seg, s):
        (B, K, N), o = s["pos"].shape, self.o
        rank = ops.where(s["pos"] < 0, -1e30, self.rank(attn, seg, s))
        safe = place(rank) < o.window + int((o.budget - o.window) * o.floor)
        best = place(ops.where(safe & (s["pos"] >= 0), 1e9, rank).reshape(B, 1, -1)) < o.budget * K
        return super().forget(attn, seg, {**s, "pos": ops.where(best.reshape(B, K, N), s["pos"], -1)})

    def whole(self, s, sealed=None):
        # heads remember differently much: slots of the rectangle are empty
        return {**super().whole(s, sealed), "solid": False}

    def folded(self, t):
        """One line [B, 1, K * budget, ...] of each field, empty slots last, and `count` [B, K]: so many slots are each head's."""
        (B, K, N), live = t["pos"].shape, t["pos"] >= 0
        line = lambda a: a.reshape(B, 1, K * N, *a.shape[3:])
        slots = ops.expand(ops.arange(K * N, live)[None, None], (B, 1, K * N))
        order = ops.sort_by(line(ops.where(live, 0, 1)), slots)[..., : K * self.o.budget]
        count = ops.cast(ops.cast(live, ops.int32).sum(-1), ops.int32)
        return {**{f: ops.take(line(a), order) for f, a in t.items()}, "count": count}

    def unfolded(self, past, like):
        (B, K), n = past["count"].shape, past["pos"].shape[2]
        width, first = min(self.size, n), ops.cumsum(past["count"], 1) - past["count"]
        i = ops.arange(width, first)
        mine = i < past["count"][..., None]  # [B, K, width]
        at = ops.minimum(first[..., None] + i, n - 1).reshape(B, 1, -1)
        t = {f: ops.take(a, at).reshape(B, K, width, *a.shape[3:]) for f, a in past.items() if f != "count"}
        return {**t, "pos": ops.where(mine, t["pos"], -1)}

    def padded(self, past):
        line = {f: a for f, a in past.items() if f != "count"}
        short = past["count"].shape[1] * self.o.budget - past["pos"].shape[2]
        return {**{f: ops.cat([a, blank(f, a, short)], 2) for f, a in line.items()}, "count": past["count"]}


def place(rank):
    """Where each entry stands in falling order of the last axis, 0 the largest."""
    slots = ops.expand(ops.arange(rank.shape[-1], rank)[None, None], rank.shape)
    return ops.sort_by(ops.sort_by(-rank, slots), slots)
