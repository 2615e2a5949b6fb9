"""Infini-attention (Munkhdalai et al. 2024, arXiv:2404.07143): a segment sees itself, and all before it as one matrix for each head.

    A_mem = phi(Q) M / phi(Q) z,   phi = elu + 1        read, equation 3; z the sum of the keys
    A = g A_mem + (1 - g) A_dot                         mixed by a learned gate for each head, equation 10
    M' = M + phi(K)^T (V - phi(K) M / phi(K) z)         folded in at the segment's end, equation 5 (without delta: + phi(K)^T V)

Queries and keys meet the matrix without their positions. Where nothing is in it, at a document's beginning, the segment stands alone.
The paper's gate is sigmoid(beta), half open when training from scratch begins; into a trained model it would break. So by default the
gate is tanh(gain * beta) with beta = 0: at step 0 a model reads each segment as it did. (gain: AdamW moves a weight by about the
learning rate a step, and the gate must move by tenths.) M and z are float32 and of one document.

Symbols: B rows, T tokens, H query heads, K key heads, D head width.
"""

import math

import numpy as np

import ops
from memory.base import Memory as Base
from memory.base import blank


class Options:
    gate: str = "zero"  # zero: tanh, closed at first, for a trained model; sigmoid: the paper's, half open at first
    gain: float = 10.0  # of beta in a gate=zero
    delta: bool = True  # fold in only what the matrix does not give already


def check(o):
    if o.gate not in ("zero", "sigmoid"):
        raise ValueError(f"gate={o.gate} is not known: choose zero or sigmoid")
    if not 0 < o.gain < math.inf:
        raise ValueError(f"gain={o.gain} moves no gate: it must be above 0")


def phi(x):
    """elu(x) + 1, float32."""
    x = ops.cast(x, ops.float32)
    return ops.where(x > 0, x + 1, ops.exp(ops.minimum(x, 0)))


def recall(x, s):
    """phi(x) M / phi(x) z: x [B, K, n, D] -> [B, K, n, D] float32."""
    return phi(x) @ s["M"] / (phi(x) @ s["z"][..., None] + 1e-6)


class Memory(Base):
    size, moves = 0, True
    unturned = True  # the matrix wants keys without positions

    def __init__(self, c, o):
        super().__init__(c, o)
        self.beta = ops.Embedding(c.num_attention_heads, 1)

    def initial(self, attn, name):
        return ops.array(np.zeros((self.c.num_attention_heads, 1), "float32"))

    def stays(self, n):
        # in the matrix
        return np.ones(n, bool)

    def gate(self):
        """[H, 1, 1], the share of the past."""
        beta = ops.cast(self.beta.weight, ops.float32)[..., None]
        # tanh(x) = 2 sigmoid(2x) - 1
        return ops.sigmoid(beta) if self.o.gate == "sigmoid" else 2 * ops.sigmoid(2 * self.o.gain * beta) - 1

    def attend(self, attn, q, seg, s):
        y, s = super().attend(attn, q, seg, s)
        if "M" not in s:
            return y, s
        B, H, T, D = q.shape
        # a temperature is as good as longer queries
        past = recall((q * seg.position.temperature).reshape(B, attn.K, -1, D), s).reshape(B, H, T, D)
        known = (s["last"] >= 0) if seg.begin is None else (s["last"] >= seg.begin)  # [B, 1, 1 or T]
        g = self.gate() * ops.cast(known, ops.float32)[..., None]
        return ops.cast(g * past + (1 - g) * ops.cast(y, ops.float32), y.dtype), s

    def close(self, attn, seg, s):
        now, s = self.used(s), self.with_matrix(s)
        pos, begin = now["pos"], 0 if seg.begin is None else seg.begin[..., -1:]
        # of the document that goes on: what stood in the matrix, and what this segment adds
        same = ops.cast(s["last"] >= begin, ops.float32)
        s = {**s, "M": s["M"] * same[..., None], "z": s["z"] * same}
        mine = (pos >= begin) & (pos >= 0)
        k, v = phi(now["k"]) * ops.cast(mine, ops.float32)[..., None], ops.cast(now["v"], ops.float32)
        news = v - recall(now["k"], s) if self.o.delta else v
        newest = ops.amax(ops.where(mine, pos, -1), 2)
        last = ops.where(newest > s["last"], newest, s["last"])
        s = {**s, "M": s["M"] + ops.swap(k, 2, 3) @ news, "z": s["z"] + k.sum(2), "last": last}
        # the segment's own slots are free again
        n = 0 if isinstance(s["n"], int) else ops.minimum(s["n"], 0)
        return {**s, **{f: blank(f, s[f], s["capacity"]) for f in self.fields}, "n": n, "first": None}

    def with_matrix(self, s):
        """M [B, K, D, D], z [B, K, D] and `last` [B, 1, 1], the newest position in them; -1: nothing is."""
        if "M" in s:
            return s
        B, K, _, D = s["k"].shape
        full = lambda shape, x, dtype: ops.full(shape, x, dtype, s["k"])
        return {**s, "M": full((B, K, D, D), 0, ops.float32), "z": full((B, K, D), 0, ops.float32), "last": full((B, 1, 1), -1, ops.int32)}

    def still(self, s):
        return super().still(self.with_matrix(s))
