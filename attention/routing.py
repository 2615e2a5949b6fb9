"""Routing Transformer (Roy et al. 2021, arXiv:2003.05997): a token sees what is like it, wherever that stands.

Each routed head keeps c centroids mu. Queries and keys are the same vectors (K <- Q, the paper's causal form), layer-normed
without scale or bias, and are compared with the centroids by direction. The other heads see a window.

In training, as in algorithm 1, each cluster takes the w tokens nearest to its centroid, in order of position; each sees those before
it, not itself unless it is the first. Tokens in several clusters get the average, tokens in none zeros. WHO IS TAKEN DEPENDS ON THE
WHOLE TEXT, later tokens included: the future leaks a little, as it does in the paper. assign=argmax trains without that.

In use, and with assign=argmax, each token belongs to its nearest centroid alone, which no later token can change, and sees the last
w tokens of its cluster before it. So token by token equals all at once.

Centroids take no gradient: after each training step mu <- decay * mu + (1 - decay) * sum of the x_i that are nearest to it (the
paper's update, its halves for queries and keys being the same). They begin as random directions, are saved with the model, and stand
still in use.

Symbols: B rows, H query heads, K key heads, R routed heads (the last of the H), T tokens, N slots, D head width, c clusters.
A routed head takes no key from its key head, only the value; its own normed queries are remembered as its keys.
"""

import numpy as np

import ops
import plugins
from errors import Refused
from kernels import Places, attend
from kernels.spans import FAR
from memory.base import Memory


class Options:
    clusters: int = 16  # of each routed head; the paper takes about the square root of the length
    top: int = 0  # w, tokens of a cluster that are seen; 0: in training length / clusters, in use all
    window: int = 256  # tokens seen by the other heads, the token itself included
    routed: int = 50  # percent of the heads that are routed
    assign: str = "top"  # in training: top, or argmax as in use
    decay: float = 0.999  # of the centroids
    seed: int = 0
    layer: int = 0


def check(o):
    if not 1 <= o.clusters <= 256 or o.top < 0 or o.window < 1:
        raise ValueError(
            f"clusters={o.clusters}, top={o.top}, window={o.window}: "
            "clusters must lie between 1 and 256, top be at least 0, and window at least 1"
        )
    if not 1 <= o.routed <= 100:
        raise ValueError(f"routed={o.routed} is no percentage above 0: it must lie between 1 and 100")
    if o.assign not in ("top", "argmax"):
        raise ValueError(f"assign={o.assign} is not known: choose top or argmax")
    if not 0 <= o.decay <= 1:
        raise ValueError(f"decay={o.decay} is no share: it must lie between 0 and 1")
    if o.seed < 0:
        raise ValueError(f"seed={o.seed}: it must be at least 0")


class Pattern(Memory):
    memories = ("full",)  # a cluster's tokens lie anywhere in the past
    fields = (*Memory.fields, "shared", "cluster", "rank")  # [B, R, N, D] keys, [B, R, N] the cluster, how many of it came before
    observes, looks = True, False

    def __init__(self, c, o, pattern):
        super().__init__(c, o)
        self.pattern = pattern
        p, others = pattern.options, plugins.load("attention", "_others")
        self.whole_rows = p.assign == "top"
        self.R = max(1, (c.num_attention_heads * p.routed + 50) // 100)
        self.centroids = ops.Embedding(self.R * p.clusters, c.head_dim)
        self.near = plugins.parse("attention", f"window:window={p.window}")
        self.others = plugins.Plugin("others", others, others.Options(p.top or FAR))

    def initial(self, attn, name):
        draw = np.random.default_rng([self.pattern.options.seed, self.pattern.options.layer])
        return ops.array(draw.normal(size=self.centroids.weight.shape).astype("float32"))

    def learn(self, seen):
        decay = self.pattern.options.decay
        mu = ops.cast(ops.stop(self.centroids.weight), ops.float32)
        ops.set_parameters(self, {"centroids.weight": decay * mu + (1 - decay) * seen.reshape(mu.shape)})

    def attend(self, attn, q, seg, s):
        (_, H, T, D), K, L, before = q.shape, s["v"].shape[1], q.shape[1] - self.R, s["n"] - q.shape[2]
        scale = seg.position.temperature * D**-0.5
        x = normed(q[:, L:])  # [B, R, T, D]
        score = ops.stop(x) @ ops.swap(self.directions(), 1, 2)  # [B, R, T, c]
        cluster = ops.where(seg.at.at < 0, -1, ops.cast(ops.argmax(score, -1), ops.int32))
        if self.learning:
            s = {**s, "seen": (ops.swap(self.belongs(cluster), 2, 3) @ ops.stop(x)).sum(0)}  # [R, c, D]
        # keys that are queries too: what a scheme does to both alike, and no bias
        x = seg.position.turned(ops.cast(x, q.dtype), seg.turn)
        rank = self.ranks(cluster, s)
        s = self.put(s, {"shared": x, "cluster": cluster, "rank": rank}, before)
        used = self.used(s)
        v = ops.repeat(used["v"], H // K, 1)[:, L:]
        if isinstance(before, int) and before == 0 and T > 1:
            y = self.whole(x, v, score, cluster, seg, scale)
        else:
            y = self.onward(x, v, cluster, rank, used, seg, scale)
        if not L:
            return y, s
        # whole key heads as they are, else one for each query head
        k, v = (ops.repeat(used[f], H // K, 1)[:, :L] if L * K % H and K > 1 else used[f][:, : max(1, L * K // H)] for f in "kv")
        if seg.position.late:
            k = seg.keys(k, used["pos"])
        q, bias = seg.queries(q)[:, :L], seg.bias and seg.bias.of(range(L))
        near = attend(q, k, v, seg.at, Places(used["pos"], used["first"]), self.near, seg.begin, scale=scale, bias=bias)
        return ops.cat([near, y], 1), s

    def directions(self):  # [R, c, D]
        mu = ops.cast(ops.stop(self.centroids.weight), ops.float32)
        return (mu / ((mu * mu).sum(-1)[:, None] ** 0.5 + 1e-9)).reshape(self.R, -1, mu.shape[-1])

    def belongs(self, cluster):
        """[B, R, T] -> [B, R, T, c] float32, 1 where the token's cluster is."""
        return ops.cast(cluster[..., None] == ops.arange(self.pattern.options.clusters, cluster), ops.float32)

    def ranks(self, cluster, s):
        """How many tokens of its cluster came before, [B, R, T]; s: the state before this call."""
        one = self.belongs(cluster)
        rank = ops.cast((ops.cumsum(one, 2) * one).sum(-1), ops.int32) - 1
        if "cluster" not in s:
            return rank
        return rank + ops.cast((s["cluster"][:, :, None] == cluster[..., None]).sum(-1), ops.int32)  # of [B, R, T, N]

    def whole(self, x, v, score, cluster, seg, scale):
        """A text by itself: tokens are gathered by cluster, and a row of them is a text like any other."""
        (B, R, T, _), p = x.shape, self.pattern.options
        begin = 0 if seg.begin is None else seg.begin
        if self.learning and p.assign == "top":
            w = min(p.top or -(-T // p.clusters), T)
            i = ops.top(ops.swap(ops.where((cluster < 0)[..., None], -1e30, score), 2, 3), w)  # [B, R, c, w]
            # where the host knows that nothing is padded there may be one document and nothing to tell apart
            label = None if seg.begin is None and seg.at.first is not None else ops.where(cluster < 0, -1, begin)
        else:
            # all clusters in one row, one behind the other, padding last; a cluster's tokens are a document there
            order = ops.where(cluster < 0, p.clusters, cluster) * T + ops.arange(T, cluster)
            i = ops.sort_by(order, ops.expand(ops.arange(T, cluster)[None, None], (B, R, T)))[:, :, None]  # [B, R, 1, T]
            label = cluster * FAR + begin
        return self.among(x, v, ops.cast(i, ops.int32), label, scale)

    def among(self, x, v, i, label, scale):
        """Attention within rows of gathered tokens: i int [B, R, rows, w], which; label [B, R, T]: alike in one document, or None.

        A token's place in its row is its position there, so causal is causal. Returns [B, R, T, D], averaged over the rows.
        """
        B, R, rows, w = i.shape
        T, D = x.shape[2:]
        gather = lambda a: ops.take(a, i.reshape(B, R, -1)).reshape(B * R * rows, 1, w, *a.shape[3:])
        at = ops.expand(ops.arange(w, i)[None, None], (B * R * rows, 1, w))
        begin = None
        if label is not None:
            label = gather(label)
            first = ops.where(label[..., 1:] != label[..., :-1], at[..., 1:], 0)
            begin = ops.running_max(ops.cat([at[..., :1], first], -1), -1)
        k, places = gather(x), Places(at, 0)
        y = attend(k, k, gather(v), places, places, self.others, begin, scale=scale).reshape(1, -1, D)
        to = (i.reshape(B * R, -1) + ops.arange(B * R, i)[:, None] * T).reshape(-1)
        total = ops.add(ops.full((1, B * R * T, D), 0, ops.float32, y), to, y)
        count = ops.add(ops.full((1, B * R * T, 1), 0, ops.float32, y), to, ops.full((1, y.shape[1], 1), 1, ops.float32, y))
        return ops.cast(total / ops.where(count > 0, count, 1.0), x.dtype).reshape(B, R, T, D)

    def onward(self, x, v, cluster, rank, used, seg, scale):
        """A text that goes on. A token stands at cluster * FAR + its rank, so that a cluster is a document, beginning with the
        first token of the text's own document."""
        if self.learning and self.pattern.options.assign == "top":
            raise Refused("--attn routing takes the top tokens of a whole text: train on whole rows, or with assign=argmax")
        B, R, T, D = x.shape
        # every head has its own places: heads become rows
        fold = lambda a: a.reshape(B * R, 1, *a.shape[2:])
        stand = lambda cluster, rank: Places(fold(ops.where(cluster < 0, -1, cluster * FAR + rank)))
        begin = cluster * FAR
        if seg.begin is not None:
            same = used["cluster"][:, :, None] == cluster[..., None]  # [B, R, T, N]
            begin = begin + ops.cast((same & (used["pos"][:, :, None] < seg.begin[..., None])).sum(-1), ops.int32)
        at, slots = stand(cluster, rank), stand(used["cluster"], used["rank"])
        y = attend(fold(x), fold(used["shared"]), fold(v), at, slots, self.others, fold(begin), scale=scale)
        return y.reshape(B, R, T, D)


def normed(x):
    """Layer norm without scale or bias, float32: every vector has length D ** 0.5."""
    x = ops.cast(x, ops.float32)
    x = x - x.mean(-1)[..., None]
    return x / ((x * x).mean(-1)[..., None] + 1e-6) ** 0.5
