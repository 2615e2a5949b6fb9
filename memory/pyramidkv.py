"""PyramidKV (Cai et al. 2024, arXiv:2406.02069): SnapKV, lower layers keeping more than upper ones.

    k_l = k_0 - l (k_0 - k_{m-1}) / (m - 1), k_{m-1} = (budget - window) / beta, k_0 = 2 (budget - window) - k_{m-1}, beside the window

for layers l = 0 .. m - 1; the mean over layers is the budget. The released code also narrows the spread when the prompt is shorter than k_0
and rounds the step down; here it depends on nothing but the model, and every layer's number is rounded by itself.
"""

from memory import snapkv
from memory.snapkv import Memory as Snap


class Options:
    budget: int = 1024  # tokens kept by each key head, the window included, in the mean over layers
    window: int = 32
    pool: int = 5
    beta: int = 20  # the last layer's share, beside the window, is 1 / beta of the mean
    kv_positions: str = "absolute"
    layer: int = 0
    n_layer: int = 1


def check(o):
    snapkv.check(o)
    if o.beta < 1:
        raise ValueError(f"beta={o.beta}: it must be at least 1, which is the same for all layers")


class Memory(Snap):
    @property
    def size(self):
        o = self.o
        mean = o.budget - o.window
        low = mean // o.beta
        # a single layer stands in the middle
        depth = o.layer / (o.n_layer - 1) if o.n_layer > 1 else 0.5
        return o.window + int(2 * mean - low + depth * (2 * low - 2 * mean) + 0.5)
