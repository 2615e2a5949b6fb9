"""What pruned caches share: tokens are scored by the attention that they get, and each key head keeps its own.

Fused attention does not give its weights away, so they are made once more, for a few queries at a time, from what attend() itself is
given: rule, documents, biases and wider queries count. Query heads that share a key head vote together: their weights are summed.

Kept tokens stay where they stood (kv_positions=absolute), or are numbered anew at each close, in order and without gaps, the newest staying
where it is (reindex). Then keys are remembered unturned and are turned as they are seen, so that no error adds up.
"""

import ops
from kernels import SCORES, Places
from kernels.dense import weights
from kernels.slots import in_order
from memory.base import Memory, blank


def check(o):
    if o.budget < 1:
        raise ValueError(f"budget={o.budget} keeps nothing: it must be at least 1")
    if o.kv_positions not in ("absolute", "reindex"):
        raise ValueError(f"kv_positions={o.kv_positions} is not known: choose absolute or reindex")


class Pruned(Memory):
    heads_differ = True
    window = 0  # so many of the newest queries are remembered, to score by when the segment closes

    def __init__(self, c, o):
        super().__init__(c, o)
        self.unturned = self.ordered = self.renumbers = o.kv_positions == "reindex"

    @property
    def size(self):
        return self.o.budget

    def stays(self, n):
        return None

    def attend(self, attn, q, seg, s):
        y, s = super().attend(attn, q, seg, s)
        return y, self.remember(q, seg, s) if self.window else s

    def remember(self, q, seg, s):
        """The newest `window` queries of each row, unturned, and where they and their documents stand: q, q_at, q_begin."""
        n, at = self.window, seg.at.at
        new = {"q": ops.stop(q), "q_at": at, "q_begin": at * 0 if seg.begin is None else seg.begin}
        if not isinstance(s["n"], int):
            return {**s, **{f: ops.put(s[f], a, at[0, 0, 0] % n) for f, a in new.items()}}
        if seg.at.first is not None:
            # no more of a long segment is copied, or held by a view, than is kept
            new = {f: a[:, :, -n:] for f, a in new.items()}
        new = {f: ops.cat([s[f] if f in s else blank(f, a, n), a], 2) for f, a in new.items()}
        if seg.at.first is not None and at.shape[2] >= n:
            return {**s, **{f: a[:, :, -n:] for f, a in new.items()}}
        # rows may end in padding, and a static graph leaves another order
        keep = ops.top(new["q_at"], n)
        return {**s, **{f: ops.take(a, keep) for f, a in new.items()}}

    def still(self, s):
        """In a static graph the remembered query of position p is at p % window, so that the next one takes the place of the oldest."""
        s = super().still(s)
        if "q" not in s:
            return s
        n, last = self.window, ops.amax(s["q_at"], 2)
        slots = ops.expand(ops.arange(n, last)[None, None], s["q_at"].shape)
        order = ops.take(ops.sort_by(s["q_at"], slots), (slots + n - (last + 1) % n) % n)
        return {**s, **{f: ops.take(s[f], order) for f in ("q", "q_at", "q_begin")}}

    def looked(self, attn, seg, s):
        """The weight that each slot in use gets from the remembered queries, [B, K, N] float32."""
        q = seg.position.queries(s["q"], seg.position.again(s["q_at"], seg.turn))
        k, _, slots = self.seen(attn, s["q"], seg, s)
        return self.total(attn, seg, q, k, slots, Places(s["q_at"]), s["q_begin"])

    def total(self, attn, seg, q, k, slots, at, begin):
        """The weights that queries [B, H, T, D] give to slots, summed over queries and over the query heads of each key head."""
        (B, H, T, _), (K, N), total = q.shape, k.shape[1:3], None
        # a GPU waits for the host where it is given less at a time
        n = max(1, (SCORES << 4 * ops.on_gpu()) // (B * H * N))
        for a in range(0, T, n):
            some, docs = Places(at.at[:, :, a : a + n]), None if begin is None else begin[:, :, a : a + n]
            p = weights(ops.after(q[:, :, a : a + n], total), k, some, slots, attn.rule, docs, **self.how(seg))
            p = ops.stop(p).reshape(B, K, -1, N).sum(2)
            total = p if total is None else total + p
        return total

    def forget(self, attn, seg, s):
        last = ops.amax(newest(s), 1) if self.renumbers else None
        s = super().forget(attn, seg, s)
        if not self.renumbers:
            return s
        live = s["pos"] >= 0
        first = last + 1 - ops.cast(live, ops.int32).sum(-1)[..., None]
        return {**s, "pos": ops.where(live, ops.cast(first, ops.int32) + ops.arange(live.shape[2], live), -1)}


def newest(s):
    """The position of the newest token that is remembered, [B, 1 or K, 1]."""
    return s["pos"][:, :, -1:] if in_order(s) else ops.amax(s["pos"], 2)


def ranked(score, s):
    """Scores that are at least 0, and of tokens that nobody looks at the newest first."""
    return ops.where(score > 0, score, ops.cast(s["pos"] - newest(s) - 1, ops.float32))
