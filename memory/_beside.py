"""What stands beside the slots: keys and values of vectors that sum up the past, which no policy forgets and no pattern hides.

    y = y_slots + g w (y_side - y_slots),   w = Z_side / (Z_side + Z_slots)

Z is the sum of the exponentials of the logits over the slots, and over what stands beside them. With g = 1 that is softmax over both, as
the papers have it (closed=false). By default g is a gate of each head, g = tanh(gain beta) with beta = 0: a trained model is at first
unchanged by what it does not know, and learns to open it. (gain: AdamW moves a weight by about the learning rate a step.)

A state's "side": k, v [B, K, M, D], pos [B, 1, M], where each stands; -1: nothing there.
"""

import math

import numpy as np

import ops
import plugins
from kernels import Places, attend
from memory.base import Memory, blank


def check(o):
    if not 0 < o.gain < math.inf:
        raise ValueError(f"gain={o.gain} moves no gate: it must be above 0")


class Beside(Memory):
    """c: Config; o: Options with `closed` and `gain`."""

    def __init__(self, c, o, beside=None):
        super().__init__(c, o)
        self.gain, self.everything = (beside or o).gain, plugins.parse("attention", "full")
        if (beside or o).closed:
            self.beta = ops.Embedding(c.num_attention_heads, 1)
        self.closed = (beside or o).closed

    def initial(self, attn, name):
        return ops.array(np.zeros((self.c.num_attention_heads, 1), "float32")) if name == "beta.weight" else super().initial(attn, name)

    def gate(self):
        return gate(self.beta, self.gain) if self.closed else 1.0

    def stand(self, attn, x, seg, s, pos=None):
        """The state with vectors x [B, M, C], normed as a layer's input is, in the place of what stood beside. pos [B, 1, M]: where they
        stand; None: they are the segment's tokens. Rows at -1 keep what they had."""
        pos = seg.at.at if pos is None else pos
        return {**s, "side": renewed(s.get("side"), self.standing(attn, x, seg, pos))}

    def standing(self, attn, x, seg, pos):
        k, v = attn.kv(x)
        return {"k": k if seg.position.late else seg.keys(k, pos), "v": v, "pos": pos}

    def look(self, attn, q, k, v, slots, seg, s, lse=False):
        if "side" not in s:
            return super().look(attn, q, k, v, slots, seg, s, lse)
        y = super().look(attn, q, k, v, slots, seg, s, lse=True)
        return together(*y, *self.glance(attn, q, seg, s), self.gate(), lse)

    def glance(self, attn, q, seg, s):
        """What queries, not yet turned, see beside the slots, and its log-sum-exp."""
        return self.aside(attn, seg.queries(q), seg, s["side"])

    def aside(self, attn, q, seg, side, felt=True):
        """Attention over what stands beside, and its log-sum-exp. felt: are distances felt? Else neither queries nor keys are turned.
        A side's "turned" are the positions that its keys, as they are, turn to."""
        pos = side["pos"]
        k = seg.keys(side["k"], side.get("turned", pos)) if felt and (seg.position.late or "turned" in side) else side["k"]
        how = {"scale": self.how(seg)["scale"], "bias": seg.bias if felt else None}
        return attend(q, k, side["v"], seg.at, Places(pos), self.everything, seg.begin, **how, lse=True)

    def with_side(self, s, n, name="side"):
        """The state with room for n vectors beside the slots."""
        if name in s:
            return {**s, name: {f: ops.cat([blank(f, a, n - a.shape[2]), a], 2) if a.shape[2] < n else a for f, a in s[name].items()}}
        B, K, _, D = s["v"].shape
        k = ops.full((B, K, n, D), 0.0, s["v"].dtype, s["v"])
        return {**s, name: {"k": k, "v": k, "pos": ops.full((B, 1, n), -1, ops.int32, s["v"])}}


def gate(beta, gain):
    """[H, 1, 1] of an Embedding of H numbers; tanh(x) = 2 sigmoid(2x) - 1."""
    return 2 * ops.sigmoid(2 * gain * ops.cast(beta.weight, ops.float32)[..., None]) - 1


def together(y, here, z, there, g, lse=False):
    """Attention y over the slots and z over what stands beside them as one, with their log-sum-exps; with lse that of both."""
    # -inf: nothing is seen there (or, by padding, anywhere)
    here, there = ops.where(here < -1e29, 0.0, here), ops.where(there < -1e29, -1e30, there)
    w = g * ops.sigmoid(there - here)[..., None]
    y = ops.cast(ops.cast(y, ops.float32) * (1 - w) + w * ops.cast(z, ops.float32), y.dtype)
    return (y, ops.logsumexp(ops.cat([here[..., None], there[..., None]], -1), -1)) if lse else y


def queued(old, new, n):
    """The newest n of what stands in a side and in one that comes behind it; rows at -1 have nothing new, and keep what they had."""
    if old is None:
        return new
    live, there = new["pos"][..., -1:] >= 0, old["pos"].shape[2]
    m = min(n, there + new["pos"].shape[2])
    with_new = lambda f: ops.cat([old[f], new[f]], 2)[:, :, -m:]
    without = lambda f: ops.cat([blank(f, old[f], m - there), old[f]], 2) if m > there else old[f]
    return {f: ops.where(live if f == "pos" else live[..., None], with_new(f), without(f)) for f in new}


def renewed(old, new):
    """A side, and those of its rows that have nothing new as they were."""
    if old is None:
        return new
    live = new["pos"] >= 0
    return {f: ops.where(live if f == "pos" else live[..., None], a, ops.cast(old[f], a.dtype)) for f, a in new.items()}
