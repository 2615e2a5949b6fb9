"""T5's relative positions (Raffel et al. 2019, arXiv:1910.10683, section 2.1): a learned scalar for each head and bucket of distances
is added to the logits.

Half of the buckets are a distance each, the others grow logarithmically up to `distance`; beyond it all is one bucket (causal buckets,
as in T5's decoder). One table serves all layers, as in T5, or each layer has its own. T5 does not divide its logits by sqrt(D); here
they are divided, as everywhere in a Llama. AdamW moves every weight by about the learning rate a step, and a bias must reach several
units (T5's Adafactor took larger steps): so what is added is `gain` times the weight.
"""

import numpy as np

import ops
from kernels import Bias
from positions.base import Position as Base


class Options:
    buckets: int = 32
    distance: int = 128  # tokens from which all distances are alike
    gain: float = 10.0
    layers: str = "shared"  # shared: one table for all layers; own: one for each


def check(o):
    if o.buckets < 2 or o.distance <= o.buckets // 2:
        raise ValueError(f"buckets={o.buckets}, distance={o.distance}: there must be at least 2, and the distance above half of them")
    if o.layers not in ("shared", "own"):
        raise ValueError(f"layers={o.layers} is not known: choose shared or own")


def per_layer(o):
    return o.layers == "own"


def bucket(distance, o):
    """The bucket of each distance, integers >= 0 -> integers."""
    d, exact = np.asarray(distance), o.buckets // 2
    # float32, as T5 reckons
    log = np.log(np.maximum(d, 1).astype("float32") / np.float32(exact)) / np.float32(np.log(o.distance / exact))
    return np.where(d < exact, d, np.minimum(exact + (log * np.float32(o.buckets - exact)).astype(int), o.buckets - 1))


class Position(Base):
    def __init__(self, c, o):
        super().__init__(c, o)
        self.relative_attention_bias = ops.Embedding(o.buckets, c.num_attention_heads)
        of = bucket(np.arange(o.distance + 1), o)
        # up to the first distance of the last bucket: those beyond are alike
        self.of = tuple(of[: 1 + int(np.argmax(of == of[-1]))].tolist())

    def bias(self):
        by_bucket = ops.cast(ops.swap(self.relative_attention_bias.weight, 0, 1), ops.float32) * self.o.gain
        return Bias(table=ops.entries(by_bucket, ops.constant(self.of), 1))
