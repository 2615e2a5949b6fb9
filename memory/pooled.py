"""Squeeze before forgetting: old tokens are averaged, `rate` to one, as the Compressive Transformer's mean pooling does (Rae et al. 2019,
arXiv:1911.05507, section 3.1), here with a trained model's keys and values and without training.

    f_c(k_1 .. k_c) = 1/c sum k_i, and so the values        (c = rate; in FIFO order, oldest first)

Tokens of a document after its sinks stand in blocks of `rate`. When a segment closes on more than the budget, the oldest whole blocks are
squeezed, as few as make room; the newest `recent` tokens never are. Where that is not enough the oldest go. What is squeezed stands at its
last token's position; keys are averaged before they are turned, for turned ones would cancel each other. The paper pools layers' inputs
and learns from it; CaM (Zhang et al. 2024) and KVMerger (Wang et al. 2024, arXiv:2407.08454) choose what to merge by scores or likeness.
A squeezed slot counts as one in the softmax, as in the paper.
"""

import numpy as np

import ops
from memory.base import Memory as Base


class Options:
    budget: int = 1024  # slots kept, of tokens and of what is squeezed
    rate: int = 4  # tokens squeezed into one slot
    sinks: int = 4  # first tokens that always stay
    recent: float = 0.25  # the share of the budget that is for the newest tokens as they are


def check(o):
    if o.rate < 2:
        raise ValueError(f"rate={o.rate} squeezes nothing: it must be at least 2")
    if o.sinks < 0 or not 0 <= o.recent <= 1:
        raise ValueError(f"sinks={o.sinks}, recent={o.recent}: sinks must be at least 0, and recent a share between 0 and 1")
    least = o.sinks + int(o.recent * o.budget) + o.rate
    if o.budget < least:
        raise ValueError(f"budget={o.budget}: with these sinks, recent tokens and rate it must be at least {least}")


class Memory(Base):
    fields = (*Base.fields, "count")  # [B, 1, N] int32, tokens in the slot
    unturned = True

    def __init__(self, c, o):
        super().__init__(c, o)
        self.always = self.opening = o.sinks

    @property
    def size(self):
        return self.o.budget

    def pack(self, attn, x, seg):
        return {**super().pack(attn, x, seg), "count": ops.full((x.shape[0], 1, x.shape[1]), 1, ops.int32, x)}

    def stays(self, n):
        at = np.arange(n)
        return (at < self.o.sinks) | (at >= n - int(self.o.recent * self.o.budget))

    def since(self, seg, s):
        """How far into its document each slot stands."""
        return s["pos"] - (0 if seg.begin is None else seg.begin[..., -1:])

    def rank(self, attn, seg, s):
        since = self.since(seg, s)
        return ops.where(since < self.o.sinks, 1e9, ops.cast(since, ops.float32))

    def forget(self, attn, seg, s):
        slots = ops.expand(ops.arange(s["pos"].shape[2], s["pos"])[None, None], s["pos"].shape)
        order = ops.sort_by(ops.where(s["pos"] < 0, 2**30, s["pos"]), slots)
        return super().forget(attn, seg, self.squeezed(seg, {**s, **{f: ops.take(s[f], order) for f in self.fields}}))

    def squeezed(self, seg, s):
        """Slots in order of position -> the same, blocks squeezed into their last slot and the others of them empty."""
        o, since, live = self.o, self.since(seg, s), s["pos"] >= 0
        last = since + o.rate - 1 - (since - o.sinks) % o.rate
        ready = live & (s["count"] == 1) & (since >= o.sinks) & (last <= ops.amax(since, 2) - int(o.recent * o.budget))
        ends = ops.cast(ready & (since == last), ops.int32)
        # as few blocks as make room, from the oldest on
        need = (ops.cast(live, ops.int32).sum(-1)[..., None] - o.budget + o.rate - 2) // (o.rate - 1)
        gone = ready & (ops.cumsum(ends, 2) - ends < need)
        end = gone & (since == last)
        mean = lambda x: ops.where(end[..., None], sum(shifted(x, i) for i in range(o.rate)) / o.rate, x)
        return {
            **s,
            "k": mean(s["k"]),
            "v": mean(s["v"]),
            "pos": ops.where(gone & (since != last), -1, s["pos"]),
            "count": ops.where(end, o.rate, s["count"]),
            "solid": False,
        }


def shifted(x, i):
    """x [B, K, N, D] moved i slots back: slot n holds what n - i held."""
    return x if i == 0 else ops.cat([x[:, :, :i], x[:, :, :-i]], 2)
