"""Melodi (Chen et al. 2024, arXiv:2410.03156): a window summed up in every layer for the next, and in one layer for all to come.

    short-term, every layer l    [m ; x ; u] -> attention, MLP -> x', u';   u = u' + mix_u(u'), m = u' + mix_m(u')
    long-term, the middle layer  y = (1 - g) y_short + g attention(q, M) without positions;   M <- the last `windows` of [M ; mix_M(u')]

x are a window's tokens, u the `short` summary tokens that follow it and see all of it, m what the layer read from the window before: it
stands in front of the next. Each mix is linear along the tokens, after a norm; mix_M makes `long` vectors of them for M, a queue.
Keys and values of m and M are made by the layer's own weights. Windows are the segments: 512 tokens in the paper, with short=128,
long=64, windows=128 for the larger memory.

As in the released code g is a sigmoid, though here of a number for each head, not each channel; and by default (closed=true, _beside.py) it
is closed at first, for m too, so that a trained model is unchanged. Departing from it, mixes see the summary tokens alone: the code
mixes the window's tokens in, which binds the weights to one length of window.
"""

import ops
from memory import _beside
from memory._around import Around as Base
from memory._beside import Beside, queued
from memory.base import blank


class Options:
    short: int = 64  # summary tokens of a window, in every layer
    long: int = 32  # vectors of a window in the long-term memory
    windows: int = 128  # windows in it
    closed: bool = True  # a gate, closed at first
    gain: float = 10.0
    layer: int = 0
    n_layer: int = 1

    @property
    def size(self):
        return self.short


def check(o):
    _beside.check(o)
    if min(o.short, o.long, o.windows) < 1:
        raise ValueError(f"short={o.short}, long={o.long}, windows={o.windows}: each must be at least 1")


class Around(Base):
    """The summary tokens: learned, and the same behind every window."""


class Mix(ops.Module):
    """Linear along the tokens: [B, n, C] -> [B, m, C]."""

    def __init__(self, c, n, m):
        super().__init__()
        self.norm, self.mix = ops.RMSNorm(c.hidden_size, c.rms_norm_eps), ops.Linear(n, m, True)

    def forward(self, u):
        return ops.swap(self.mix(ops.swap(self.norm(u), 1, 2)), 1, 2)


class Memory(Beside):
    size, moves = 0, True

    def __init__(self, c, o):
        super().__init__(c, o)
        self.to_summary, self.to_short = Mix(c, o.short, o.short), Mix(c, o.short, o.short)
        self.remembers = o.layer == o.n_layer // 2
        if self.remembers:
            self.to_long, self.open = Mix(c, o.short, o.long), ops.Embedding(c.num_attention_heads, 1)

    def initial(self, attn, name):
        return super().initial(attn, "beta.weight" if name == "open.weight" else name)

    def attend(self, attn, q, seg, s):
        y, s = super().attend(attn, q, seg, s)
        if "long" not in s:
            return y, s
        z, there = self.aside(attn, q, seg, s["long"], felt=False)
        beta = ops.cast(self.open.weight, ops.float32)[..., None]
        g = 2 * ops.sigmoid(2 * self.gain * beta) - 1 if self.closed else ops.sigmoid(beta)
        g = g * ops.cast(there > -1e29, ops.float32)[..., None]
        return ops.cast(ops.cast(y, ops.float32) * (1 - g) + g * ops.cast(z, ops.float32), y.dtype), s

    def close(self, attn, seg, s):
        n = 0 if isinstance(s["n"], int) else s["n"] * 0
        return {**s, **{f: blank(f, s[f], s["capacity"]) for f in self.fields}, "n": n, "first": None}

    def leave(self, block, x, seg, s):
        if not seg.vectors:
            return x, s
        attn, pos = block.self_attn, seg.at.at[:, :, -seg.vectors :]
        x, u = x[:, : -seg.vectors], x[:, -seg.vectors :]
        s = self.stand(attn, block.input_layernorm(u + self.to_short(u)), seg, s, pos)
        if self.remembers:
            s = self.enqueue(attn, block.input_layernorm(self.to_long(u)), pos[..., -1:], s)
        return ops.cat([x, u + self.to_summary(u)], 1), s

    def enqueue(self, attn, x, pos, s):
        """The state with vectors x [B, long, C] of the window that ends at pos [B, 1, 1] in the queue, and the oldest out of it."""
        k, v = attn.kv(x)
        new = {"k": k, "v": v, "pos": ops.expand(pos, (x.shape[0], 1, x.shape[1]))}
        return {**s, "long": queued(s.get("long"), new, self.o.long * self.o.windows)}

    def still(self, s):
        s = self.with_side(s, self.o.short)
        return super().still(self.with_side(s, self.o.long * self.o.windows, "long") if self.remembers else s)
