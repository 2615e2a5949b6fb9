"""SnapKV (Li et al. 2024, arXiv:2404.14469): what the last queries look at, smoothed over neighbours, and these last tokens.

    C = sum over the L_obs last queries i of W_obs[i, :], W_obs = softmax(Q_obs K^T / sqrt(d));    pool1d(C), then the top k of each head

L_obs is `window`. Its tokens always stay; the others are pooled among themselves, zeros beyond the edges. The released code does this once,
for the prompt, per query head after keys are repeated, and never forgets what is generated. Here it is done whenever a segment closes, each
key head by the sum over its query heads; so neighbours are neighbours in what is kept, and where segments are shorter than the
window, queries of the segments before still count.
"""

import ops
from kernels.slots import in_order, order
from memory import _pruned
from memory._pruned import Pruned, newest, ranked


class Options:
    budget: int = 1024  # tokens kept by each key head, the window included
    window: int = 32  # last queries that score, and whose tokens stay
    pool: int = 5  # neighbours averaged, an odd number; 1: none
    kv_positions: str = "absolute"


def check(o):
    _pruned.check(o)
    if not 1 <= o.window < o.budget:
        raise ValueError(f"window={o.window}, budget={o.budget}: the budget must be larger than the window that it includes")
    if o.pool < 1 or o.pool % 2 == 0:
        raise ValueError(f"pool={o.pool}: neighbours on both sides make an odd number")


class Memory(Pruned):
    def __init__(self, c, o):
        super().__init__(c, o)
        self.window = o.window

    def rank(self, attn, seg, s):
        pos = s["pos"]
        observed = pos > newest(s) - self.window
        score = ops.where(observed | (pos < 0), 0.0, self.looked(attn, seg, s))
        near = smooth(score, self.o.pool) if in_order(s) else pooled(score, pos, self.o.pool)
        return ops.where(observed, 1e9, ranked(near, s))


def smooth(score, n):
    """Averages over n neighbours as they stand, [B, K, N], zeros beyond the edges."""
    edge, N = ops.full((*score.shape[:2], n // 2), 0.0, ops.float32, score), score.shape[2]
    score = ops.cat([edge, score, edge], 2)
    return sum(score[:, :, i : i + N] for i in range(n)) / n


def pooled(score, pos, n):
    """The same in order of position; slots that should not count must score 0."""
    by_position = order(ops.where(pos < 0, 2**30, pos))
    return ops.take(smooth(ops.take(score, by_position), n), order(by_position))
