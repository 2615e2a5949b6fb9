"""Recurrent Memory Transformer (Bulatov et al. 2022, arXiv:2207.06881): vectors around the segments, which the model reads and writes.

    [H_read ; X ; H_write] -> N layers -> [. ; Y ; M'],   M' is the next segment's H_read and H_write            (equations 2 and 3)

`size` memory vectors follow each segment and see all of it; what the last layer makes of them (normed) stands before the next segment.
The layers know no difference between a memory vector and a token, but that read vectors are beside the slots: no budget forgets them, and
a gate keeps them out of a trained model at first (see _beside.py; closed=false is the paper's model). In the paper a text's first segment
already reads vectors, which know nothing; here it reads none, and a document that begins in mid-segment none of another's.
The gradient goes back through as many segments as --bptt says, in the paper 0 to 4. `keep` is what the layers remember beside that: by
default nothing; xl is the paper's combination with Transformer-XL.
"""

import functools

import ops
import plugins
from memory import _beside
from memory._around import Around as Base
from memory._beside import Beside

KEEP = ("none", "window", "sinks", "xl", "snapkv", "tova", "keydiff")


class Options:
    size: int = 16  # memory vectors
    keep: str = "none"  # the memory of the layers
    budget: int = 1024  # tokens that it keeps, if any
    closed: bool = True  # a gate, closed at first
    gain: float = 10.0


def policy(o):
    """The module of the layers' memory, and its Options."""
    module = plugins.load("memory", o.keep)
    fields = module.Options.__dataclass_fields__
    return module, module.Options(**{f: o.budget for f in ("budget", "length") if f in fields})


def check(o):
    _beside.check(o)
    if o.size < 1:
        raise ValueError(f"size={o.size} remembers nothing: it must be at least 1")
    if o.keep not in KEEP:
        raise ValueError(f"keep={o.keep} is not known: choose one of {', '.join(KEEP)}")
    module, inner = policy(o)
    getattr(module, "check", lambda o: None)(inner)


class Around(Base):
    read = recurrent = True


class Memory(Beside):
    moves, cuts = True, False  # whatever becomes of the slots, the gradient goes on through the vectors

    def __new__(cls, c, o, *rest):
        return super().__new__(over(cls, policy(o)[0].Memory))

    def __init__(self, c, o):
        super().__init__(c, policy(o)[1], o)
        self.vectors = o.size  # so many stand beside the slots

    def write(self, attn, x, seg, s):
        return self.stand(attn, x, seg, s) if seg.reading else super().write(attn, x, seg, s)

    def attend(self, attn, q, seg, s):
        return (self.glance(attn, q, seg, s)[0], s) if seg.reading else super().attend(attn, q, seg, s)

    def close(self, attn, seg, s):
        # what was written is read by another way
        written = ops.arange(s["pos"].shape[2], s["pos"]) >= s["n"] - seg.vectors
        return super().close(attn, seg, {**s, "pos": ops.where(written, -1, s["pos"]), "first": None, "solid": False})

    def still(self, s):
        return super().still(self.with_side(s, self.vectors))


@functools.cache
def over(kind, keeps):
    """The class `kind` on top of the policy's own."""
    return type("Memory", (kind, keeps), {"moves": vars(kind).get("moves", False)})
