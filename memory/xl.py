"""Transformer-XL's memory (Dai et al. 2019, arXiv:1901.02860, section 3.2): each layer remembers its inputs, without their gradient.

    q = h W_q, k = [SG(m) ; h] W_k, v = [SG(m) ; h] W_v        (h: the segment's normed inputs; m: the last `length` before it)

Remembered tokens are projected anew by every segment, so W_k and W_v learn from them too, but nothing before the segment does: the
gradient is cut here, and deeper --bptt has nothing to flow through. With --pos xl it is the paper's model. A text that is only read
keeps keys and values, which are the same as long as weights stand still, and projects each token once.
"""

import ops
from memory.base import Memory as Base


class Options:
    length: int = 1024  # tokens kept


def check(o):
    if o.length < 1:
        raise ValueError(f"length={o.length} keeps nothing: it must be at least 1")


class Memory(Base):
    cuts = moves = True

    def __init__(self, c, o):
        super().__init__(c, o)
        self.size = o.length

    @property
    def fields(self):
        return ("x", "pos") if self.learning else super().fields

    @property
    def unturned(self):
        return self.learning

    def pack(self, attn, x, seg):
        return {"x": x[:, None]} if self.learning else super().pack(attn, x, seg)  # [B, 1, T, C]

    def unpack(self, attn, s):
        return attn.kv(s["x"][:, 0]) if self.learning else super().unpack(attn, s)

    def close(self, attn, seg, s):
        return super().close(attn, seg, {**s, "x": ops.stop(s["x"])} if self.learning else s)
