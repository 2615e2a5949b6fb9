"""StreamingLLM (Xiao et al. 2023, arXiv:2309.17453): attention sinks, the document's first tokens, and the newest tokens,
numbered by their place in the cache, so that distances never exceed it however long the text grows. (With kv_positions=absolute
tokens stay where they stood.)

Only distances count, so instead of moving every recent key back at each close, the few sinks move forward to stand just
before the oldest recent key. A sink is turned from its unrotated key each time: turning a turned key again and again would
add up rounding errors in bfloat16.
"""

import numpy as np

import ops
from memory.base import Memory as Base


class Options:
    budget: int = 1024  # tokens kept, the sinks included
    sinks: int = 4  # first tokens that always stay
    kv_positions: str = "reindex"  # reindex: the sinks follow the newest tokens; absolute: nothing moves


def check(o):
    if not 0 <= o.sinks < o.budget:
        raise ValueError(f"sinks={o.sinks}, budget={o.budget}: the budget must be larger than the sinks that it includes")
    if o.kv_positions not in ("reindex", "absolute"):
        raise ValueError(f"kv_positions={o.kv_positions} is not known: choose reindex or absolute")


class Memory(Base):
    # born: where the token really stood; pos: where it is felt to stand
    fields, beside = ("k", "v", "pos", "born"), {"born": "at"}
    slides = moves = True

    def __init__(self, c, o):
        super().__init__(c, o)
        self.always = self.opening = o.sinks

    @property
    def size(self):
        return self.o.budget

    def rank(self, attn, seg, s):
        since = s["born"] - (0 if seg.begin is None else seg.begin[..., -1:])
        return ops.where(since < self.o.sinks, 1e9 - ops.cast(since, ops.float32), ops.cast(s["pos"], ops.float32))

    def row(self, seg, s):
        plain = seg.begin is None and seg.bias is None
        # sinks that stand elsewhere are exempt from the rule, and nothing else asks where
        return super().row(seg, s) if plain or self.o.kv_positions == "reindex" else None

    def stays(self, n):
        at = np.arange(n)
        return (at < self.o.sinks) | (at >= n - (self.size - self.o.sinks))

    def forget(self, attn, seg, s):
        if self.o.kv_positions == "absolute":
            return super().forget(attn, seg, s)
        # where all stays nobody moves, though there may be gaps: vectors that are no slots have positions too
        over = s["solid"] or ops.cast(s["pos"] >= 0, ops.int32).sum(-1)[..., None] > self.size
        s, n = super().forget(attn, seg, s), self.o.sinks
        pos, born, rest = s["pos"][:, :, :n], s["born"][:, :, :n], s["pos"][:, :, n:]
        oldest = -ops.amax(ops.where(rest < 0, -(2**30), -rest), 2)
        at = ops.where((pos >= 0) & (oldest < 2**30) & over, oldest - n + ops.arange(n, pos), pos)
        if not self.late(seg):
            s = self.with_sinks(s)
            # the same sinks as before keep the key that they were born with
            plain = ops.where((born == s["sink_born"])[..., None], s["sink"], seg.keys(s["k"][:, :, :n], -pos))
            s = {**s, "k": ops.put(s["k"], seg.keys(plain, at), 0), "sink": plain, "sink_born": born + 0}
        return {**s, "pos": ops.put(s["pos"], at, 0)}

    def with_sinks(self, s):
        """`sink` [B, K, sinks, D], the unturned keys of the sinks, and `sink_born` [B, 1, sinks]; -2: not known yet."""
        if "sink" in s:
            return s
        n = self.o.sinks
        return {**s, "sink": s["k"][:, :, :n] * 0, "sink_born": s["born"][:, :, :n] * 0 - 2}

    def still(self, s):
        return super().still(self.with_sinks(self.make_room(s)))
