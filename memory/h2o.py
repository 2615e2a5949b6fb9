"""H2O (Zhang et al. 2023, arXiv:2306.14048): heavy hitters, the tokens that have been looked at most, and the newest ones.

    F_t(v) = sum over queries i <= t of o_i(v), o_i = softmax(Q_i K_{S_i}^T)    (algorithm 1: the least goes, once |S| > k)

Half of the budget is for the newest tokens, the other half for those of largest F. A token counts what it got while it was kept; whoever
sees more queries gets more, so old tokens have an advantage, as published. The released code takes softmax over all tokens, evicted
ones too (it masks and saves nothing), sets budgets as shares of the text, and chooses before it counts the query's own weights.
Here softmax is over what is kept, and F is summed over the query heads of a key head. Segments of one token are the paper's algorithm;
longer ones forget the rest at once. Every query is scored: for one token that is free, a long segment costs its scores twice.
"""

import ops
from kernels.dense import weights
from memory import _pruned
from memory._pruned import Pruned, newest, ranked


class Options:
    budget: int = 1024  # tokens kept by each key head
    recent: float = 0.5  # the share of them that are the newest
    kv_positions: str = "absolute"


def check(o):
    _pruned.check(o)
    if not 0 <= o.recent <= 1:
        raise ValueError(f"recent={o.recent} is no share: it must lie between 0 and 1")


class Memory(Pruned):
    # mass [B, K, N] float32: F
    fields, beside, tally = (*Pruned.fields, "mass"), {"mass": 0.0}, "mass"

    def attend(self, attn, q, seg, s):
        (B, H, T, D), (k, v, slots) = q.shape, self.seen(attn, q, seg, s)
        turned, (K, N) = seg.queries(q), v.shape[1:3]
        # unless something stands beside the slots, their weights are all that there is
        if T == 1 and type(self).look is Pruned.look:
            p = weights(turned, k, seg.at, slots, attn.rule, seg.begin, **self.how(seg)).reshape(B, K, -1, N)
            y, mass = (ops.cast(p, v.dtype) @ v).reshape(B, H, T, D), ops.stop(p).sum(2)
        else:
            y = self.look(attn, q, k, v, slots, seg, s)
            mass = self.total(attn, seg, turned, k, slots, seg.at, seg.begin)
        return y, {**s, "mass": ops.cat([s["mass"][:, :, :N] + mass, s["mass"][:, :, N:]], 2)}

    def rank(self, attn, seg, s):
        recent = s["pos"] > newest(s) - int(self.o.recent * self.o.budget)
        return ops.where(recent, 1e9, ranked(s["mass"], s))
