"""Blocks and a state: full attention inside a segment, and a few vectors a layer that sum up all before it, of constant size.

    f = softmax(W_q h X^T / sqrt(C)) W_v X        each vector h looks at the segment's inputs X when it closes,
    h' = cell(h, f)                               takes in what it found, and stands before the next segment as a key and a value

cell=gru: h' = (1 - z) h + z tanh(W [f; r h]), z and r sigmoids of [f; h] (Cho et al. 2014, arXiv:1406.1078); cell=mlp: h' = h + W_2
silu(W_1 [f; h]), normed. In the manner of the Block-Recurrent Transformer (Hutchins et al. 2022, arXiv:2203.07852), whose state is one
layer's, is read through weights of its own, and takes part in the layer's attention and MLP. Here every layer has one, read through the
layer's own weights. It is float32 and of one document. A gate keeps it out of a trained model at first (_beside.py; closed=false: none).
"""

import ops
from memory import _beside
from memory._beside import Beside
from memory.base import blank


class Options:
    size: int = 8  # vectors a layer
    cell: str = "gru"  # or mlp
    closed: bool = True  # a gate, closed at first
    gain: float = 10.0


def check(o):
    _beside.check(o)
    if o.size < 1:
        raise ValueError(f"size={o.size} remembers nothing: it must be at least 1")
    if o.cell not in ("gru", "mlp"):
        raise ValueError(f"cell={o.cell} is not known: choose gru or mlp")


class Memory(Beside):
    size, moves = 0, True
    fields = ("k", "v", "pos", "x")

    def __init__(self, c, o):
        super().__init__(c, o)
        C = c.hidden_size
        self.n, self.gru, self.vectors = o.size, o.cell == "gru", ops.Embedding(o.size, C)
        self.query, self.value = ops.Linear(C, C), ops.Linear(C, C)
        self.inner = ops.Linear(2 * C, 2 * C if self.gru else C, True)
        self.outer, self.norm = ops.Linear(2 * C if self.gru else C, C, True), ops.RMSNorm(C, c.rms_norm_eps)

    def pack(self, attn, x, seg):
        return {**super().pack(attn, x, seg), "x": x[:, None]}  # [B, 1, T, C]

    def close(self, attn, seg, s):
        now, begin = self.used(s), 0 if seg.begin is None else seg.begin[..., -1:]
        pos, x = now["pos"], ops.cast(now["x"], ops.float32)
        s = self.with_vectors(s)
        # what is known of another document is not known
        h = ops.where(s["newest"] < begin, self.vectors.weight[None], s["h"])
        mine = (pos >= begin) & (pos >= 0)  # [B, 1, N]
        score = self.query(h)[:, None] @ ops.swap(x, 2, 3) * self.c.hidden_size**-0.5  # [B, 1, n, N]
        found = (ops.softmax(ops.where(mine[:, :, None], score, -1e30), -1) @ self.value(x))[:, 0]
        newest = ops.amax(ops.where(mine, pos, -1), 2)
        # rows without a token since the last close keep what they have
        h = ops.where(newest >= 0, self.cell(h, found), s["h"])
        at = ops.expand(newest, (pos.shape[0], 1, self.n))
        s = self.stand(attn, ops.cast(self.norm(h), now["x"].dtype), seg, {**s, "h": h}, at)
        s = {**s, "newest": ops.where(newest >= 0, newest, s["newest"])}
        n = 0 if isinstance(s["n"], int) else s["n"] * 0
        return {**s, **{f: blank(f, s[f], s["capacity"]) for f in self.fields}, "n": n, "first": None}

    def cell(self, h, f):
        """The state [B, n, C] after what was found in a segment."""
        if not self.gru:
            return self.norm(h + self.outer(ops.silu(self.inner(ops.cat([f, h], -1)))))
        z, r = ops.split(ops.sigmoid(self.inner(ops.cat([f, h], -1))), 2, -1)
        # tanh(x) = 2 sigmoid(2x) - 1
        new = 2 * ops.sigmoid(2 * self.outer(ops.cat([f, r * h], -1))) - 1
        return (1 - z) * h + z * new

    def with_vectors(self, s):
        """h [B, n, C] float32, and the newest position that it knows of, [B, 1, 1]; -1: none."""
        if "h" in s:
            return s
        B = s["v"].shape[0]
        h = ops.expand(ops.cast(self.vectors.weight, ops.float32)[None], (B, self.n, self.c.hidden_size))
        return {**s, "h": h, "newest": ops.full((B, 1, 1), -1, ops.int32, s["v"])}

    def still(self, s):
        return super().still(self.with_vectors(self.with_side(s, self.n)))
