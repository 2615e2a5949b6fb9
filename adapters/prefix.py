"""Prefix-tuning (Li & Liang 2021, arXiv:2101.00190): in every layer, `size` keys and values that train stand before each document.

    head = softmax(q [P_K ; K]^T / sqrt(D)) [P_V ; V]

They are beside the slots (memory/_beside.py): no memory forgets them and no pattern hides them. A gate of each head keeps them out at
first; closed=false is the paper's model, whose step 0 is not the base. In the paper a small network makes the prefix, for the sake of
training; here its numbers train themselves.

counted=true: the prefix takes `size` positions, as in the paper, and its keys are turned to stand in front of the document: the further
a text goes on, the further away they are. By default it has no positions: it is as near to the millionth token as to the first.
"""

import numpy as np

import ops
import plugins
from kernels import Places, attend
from memory import _beside
from memory.base import Memory

LR = 1e-2


class Options:
    size: int = 16  # keys and values a layer
    counted: bool = False  # does the prefix take positions?
    closed: bool = True  # a gate, closed at first
    gain: float = 10.0
    layer: int = 0


def check(o):
    _beside.check(o)
    if o.size < 1:
        raise ValueError(f"size={o.size} is no prefix: it must be at least 1")


def apply(model, o):
    """Nothing: what the layers need comes with their memories."""


def trains(name, o):
    return False


class Beside(Memory):
    def __init__(self, c, o, *more):
        *more, adapter = more
        super().__init__(c, o, *more)
        if not self.looks:
            raise ValueError(
                "tokens are gathered or heads parted before they are seen, and a prefix is none of them: take another --attn or --memory"
            )
        self.prefix, self.all = adapter.options, plugins.parse("attention", "full")
        self.prefix_k, self.prefix_v = (ops.Embedding(self.prefix.size, c.num_key_value_heads * c.head_dim) for _ in "kv")
        if self.prefix.closed:
            self.prefix_beta = ops.Embedding(c.num_attention_heads, 1)

    def initial(self, attn, name):
        if not name.startswith("prefix_"):
            return super().initial(attn, name)
        shape = getattr(self, name.partition(".")[0]).weight.shape
        draw = np.random.default_rng([self.prefix.layer, "prefix_v" in name])
        return ops.array((draw.normal(size=shape) * (0.0 if "beta" in name else 0.02)).astype("float32"))

    def look(self, attn, q, k, v, slots, seg, s, lse=False):
        y = super().look(attn, q, k, v, slots, seg, s, lse=True)
        gate = _beside.gate(self.prefix_beta, self.prefix.gain) if self.prefix.closed else 1.0
        return _beside.together(*y, *self.before(attn, q, seg), gate, lse)

    def before(self, attn, q, seg):
        """Attention of queries, not yet turned, over the prefix, and its log-sum-exp."""
        (B, _, _, D), n, counted, at = q.shape, self.prefix.size, self.prefix.counted, seg.at.at
        each = lambda p: ops.expand(ops.swap(ops.cast(p.weight, q.dtype).reshape(n, -1, D), 0, 1)[None], (B, attn.K, n, D))
        k, v, pos = each(self.prefix_k), each(self.prefix_v), ops.expand(ops.arange(n, at)[None, None], (B, 1, n))
        # as if each document began with it
        since = ops.where(at < 0, -1, at - (0 if seg.begin is None else seg.begin) + n)
        if counted:
            q, k = seg.position.queries(q, seg.position.again(since, seg.turn)), seg.keys(k, pos)
        how = {"scale": self.how(seg)["scale"], "bias": seg.bias if counted else None}
        return attend(q, k, v, Places(since), Places(pos), self.all, **how, lse=True)
