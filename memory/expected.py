"""Expected Attention (Devoto et al. 2025, arXiv:2510.00636): keep what queries that have not come yet are expected to look at.

    q ~ N(mu, Sigma) before they are turned;  mu' = R mu, Sigma' = R Sigma R^T, R the mean rotation of the next T positions
    z_j = E[exp(q^T k_j / sqrt(d))] = exp(mu'^T k_j / sqrt(d) + k_j^T Sigma' k_j / 2d);  score_j = z_j / sum z * |v_j|    (the lowest go)

T is `future`. mu and Sigma are those of the document's last `window` queries, each query head by itself; z / sum z is averaged over the
query heads of a key head. The first tokens stay; the newest have no privilege. The paper weighs by what a value adds to the layer's output,
|W_o v|; here, as in the authors' kvpress, by |v|. There a prompt's statistics are those of all its queries, and in decoding of the newest;
here always of the newest. Only rotation is expected: a bias by distance, and a pattern, are not looked at.
"""

import ops
from memory import _pruned
from memory._pruned import Pruned, newest, ranked


class Options:
    budget: int = 1024  # tokens kept by each key head
    window: int = 128  # last queries that stand for those to come
    future: int = 512  # positions ahead that are expected
    sinks: int = 4  # first tokens that always stay
    kv_positions: str = "absolute"


def check(o):
    _pruned.check(o)
    if not 0 <= o.sinks < o.budget:
        raise ValueError(f"sinks={o.sinks}, budget={o.budget}: the budget must be larger than the sinks that it includes")
    if o.window < 1 or o.future < 1:
        raise ValueError(f"window={o.window}, future={o.future}: both must be at least 1")


class Memory(Pruned):
    def __init__(self, c, o):
        super().__init__(c, o)
        self.window = o.window

    def rank(self, attn, seg, s):
        k, v = self.unpack(attn, s)
        pos, begin = s["pos"], 0 if seg.begin is None else seg.begin[..., -1:]
        if self.late(seg):
            k = seg.position.turned(k, seg.position.again(pos, seg.turn))
        k, v = (ops.stop(ops.cast(x, ops.float32)) for x in (k, v))
        (B, K), D = k.shape[:2], k.shape[3]
        free = pos - begin >= self.o.sinks
        scale, total = seg.position.temperature * D**-0.5, 0.0
        mu, x, n = self.queries(seg, s, begin)
        group = lambda a, g: a.reshape(B, K, -1, *a.shape[2:])[:, :, g]
        for g in range(mu.shape[1] // K):
            near, spread = (k @ ops.swap(group(a, g), 2, 3) * scale for a in (mu, x))  # [B, K, N, 1], [B, K, N, window]
            z = near[..., 0] + (spread * spread).sum(-1) / n / 2
            total = total + ops.softmax(ops.where(free, z, -1e30), 2)
        score = total * (v * v).sum(-1) ** 0.5
        return ops.where(free | (pos < begin), ranked(score, s), 1e9)

    def queries(self, seg, s, begin):
        """Of the last queries their mean [B, H, 1, D], what differs from it [B, H, window, D], both turned as those to come will be on
        average, and how many they are [B, 1, 1]."""
        q = ops.stop(ops.cast(s["q"], ops.float32))
        # those of documents before it stand before it
        mine = ops.cast(s["q_at"] - begin >= self.o.sinks, ops.float32)[..., None]
        n = mine.sum(2)[:, :, None]
        n = ops.where(n < 1, 1.0, n)
        mu = (q * mine).sum(2)[:, :, None] / n
        last = ops.amax(newest(s), 1)
        turn = seg.position.again(last + 1 + ops.arange(self.o.future, last)[None, None], seg.turn)
        ahead = lambda x: x if turn is None else seg.position.turned(x, [mean(a, x.shape[2]) for a in turn[:2]])
        return ahead(mu), ahead((q - mu) * mine), n[..., 0]


def mean(a, n):
    """[B, 1, T, pairs] -> its mean over T, n times."""
    return ops.expand((a.sum(2) / a.shape[2])[:, :, None], (*a.shape[:2], n, a.shape[3]))
