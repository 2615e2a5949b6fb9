"""KeyDiff (Park et al. 2025, arXiv:2504.15364): keep the keys that differ most from the others; no attention is looked at.

    score_j = - cos(mu, k_j), mu = mean over what is kept of k_i / |k_i|    (each key head by itself, the lowest go)

Keys are compared turned, as the cache of the paper's model holds them. Nothing else is privileged: the newest tokens go like any other,
and of equal keys (without rotation the first layer has them) either.
"""

import ops
from memory._pruned import Pruned, check  # noqa: F401


class Options:
    budget: int = 1024  # tokens kept by each key head
    kv_positions: str = "absolute"


class Memory(Pruned):
    def rank(self, attn, seg, s):
        k, pos = self.unpack(attn, s)[0], s["pos"]
        if self.late(seg):
            k = seg.position.turned(k, seg.position.again(pos, seg.turn))
        k = ops.stop(ops.cast(k, ops.float32))
        k = k / ((k * k).sum(-1)[..., None] ** 0.5 + 1e-9)
        # mu's length does not change the order
        mu = (k * ops.cast(pos >= 0, ops.float32)[..., None]).sum(2)[:, :, None]
        return -(k * mu).sum(-1)
