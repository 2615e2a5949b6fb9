"""Ada-KV (Feng et al. 2024, arXiv:2407.11550): SnapKV's scores, the budget of a layer shared among its key heads.

    B_i = how many of the layer's best h * budget scores, all heads together, are of head i

With the window aside, the paper mixes in an even share, B_i <- (1 - floor) B_i + floor * budget (its safeguard). Applied at every close,
this would shrink wide heads again and again; so here each head's own best floor * budget are safe, and the rest goes to the layer's best.
The released code max-pools over 7 and may weigh heads by how concentrated they are; here scores are SnapKV's.

WHAT IS SAVED: heads lie in a rectangle as wide as the widest head may be, `widest` times the budget, unused slots empty. So a head never
keeps more than that, and the bytes are `widest` times those of snapkv at the same budget: this chooses better tokens, it is not smaller.
"""

import ops
from memory import snapkv
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


class Memory(Snap):
    def __init__(self, c, o):
        super().__init__(c, o)
        self.size = int(o.budget * min(o.widest, c.num_key_value_heads))

    @property
    def enough(self):
        return self.o.budget

    def forget(self, attn, seg, s):
        (B, K, N), o = s["pos"].shape, self.o
        rank = ops.where(s["pos"] < 0, -1e30, self.rank(attn, seg, s))
        safe = place(rank) < o.window + int((o.budget - o.window) * o.floor)
        best = place(ops.where(safe & (s["pos"] >= 0), 1e9, rank).reshape(B, 1, -1)) < o.budget * K
        return super().forget(attn, seg, {**s, "pos": ops.where(best.reshape(B, K, N), s["pos"], -1), "solid": False})


def place(rank):
    """Where each entry stands in falling order of the last axis, 0 the largest."""
    slots = ops.expand(ops.arange(rank.shape[-1], rank)[None, None], rank.shape)
    return ops.sort_by(ops.sort_by(-rank, slots), slots)
