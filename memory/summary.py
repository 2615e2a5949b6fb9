"""Summaries that pile up: AutoCompressor (Chevalier et al. 2023, arXiv:2305.14788). Each segment ends with `k` summary tokens; what the
last layer makes of them stands before all later segments.

    [sigma_1 ; .. ; sigma_{i-1} ; S_i ; <Sum>_1 .. <Sum>_k] -> N layers -> [.. ; sigma_i]        (section 3.1, summary accumulation)

So a text of n segments is k n vectors, each of them a position further on, and the newest `chunks` segments' are kept. It differs from
memory tokens (tokens.py) in that nothing is rewritten: old summaries stay, and the summary tokens are the same learned vectors behind
every segment. As there, layers take a summary for tokens, its keys and values stand beside the slots, and a gate keeps it out of a trained
model at first. With an adapter that trains the summary tokens and a LoRA it is the paper's fine-tuning; the paper cuts the gradient behind
every second segment, --bptt 1.
"""

import ops
from memory import tokens
from memory._around import Around as Base


class Options:
    k: int = 32  # summary tokens of a segment
    chunks: int = 128  # segments whose summaries are kept
    chunk: int = 2048  # the segment's tokens, in generation
    keep: str = "none"  # the memory of the layers
    budget: int = 1024  # tokens that it keeps, if any
    closed: bool = True  # a gate, closed at first
    gain: float = 10.0

    @property
    def size(self):
        return self.k


def check(o):
    if min(o.k, o.chunks, o.chunk) < 1:
        raise ValueError(f"k={o.k}, chunks={o.chunks}, chunk={o.chunk}: each must be at least 1")
    tokens.check(o)


class Around(Base):
    read, recurrent = True, False


class Memory(tokens.Memory):
    def __init__(self, c, o, *rest):
        super().__init__(c, o, *rest)
        self.vectors, self.segment = o.k * o.chunks, o.chunk

    def stand(self, attn, x, seg, s, pos=None):
        new, n = self.standing(attn, x, seg, seg.at.at), self.vectors
        s = self.with_side(s, n)
        live = new["pos"][..., -1:] >= 0
        # a row with nothing new keeps what it has
        queue = lambda f, a: ops.where(live if f == "pos" else live[..., None], ops.cat([s["side"][f], a], 2)[:, :, -n:], s["side"][f])
        return {**s, "side": {f: queue(f, a) for f, a in new.items()}}
