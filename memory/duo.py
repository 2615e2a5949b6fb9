"""DuoAttention (Xiao et al. 2024, arXiv:2410.10819): retrieval heads keep everything, streaming heads the first tokens and the newest.

    attn_{i,j} = alpha_{i,j} full_attn + (1 - alpha_{i,j}) streaming_attn      (in use one of them: alpha_{i,j} above a threshold or not)

alpha of layer i and key head j is learned by the paper; here it is read. heads=FILE is a table, a line of numbers for each layer, a column
for each key head: the full_attention_heads.tsv of the authors' release. The `share` of all heads that have the largest alpha stay full,
in whatever layers they are (of equal ones the earlier; the released code draws lots). heads=2 keeps the first two key heads of each layer
full, and without heads it is the first `share` of each, as in --attn duo.

The two kinds lie side by side, each in a rectangle of its own, so a streaming head costs no more than its budget. Tokens stay where they
stood, as in the release. There streaming heads see sinks and window alone within a chunk of the prompt too; here all of the open segment.
"""

import functools

import numpy as np

import ops
import plugins
from kernels import attend
from memory.base import Memory as Base

FULL, SINKS = (plugins.load("memory", name) for name in ("full", "sinks"))


class Options:
    heads: str = ""  # a file of alphas, or how many of each layer's key heads stay full; nothing: the first share of them
    share: float = 0.5  # of the key heads stay full
    budget: int = 384  # tokens kept by the other heads, the sinks included
    sinks: int = 128  # first tokens that always stay there
    layer: int = 0
    n_layer: int = 1
    n_kv_head: int = 2


def check(o):
    SINKS.check(streaming(o))
    if not 0 <= o.share <= 1:
        raise ValueError(f"share={o.share} is no share: it must lie between 0 and 1")
    if o.heads and not o.heads.isdigit():
        alphas(o.heads)


def streaming(o):
    """The options of the streaming heads' memory."""
    return SINKS.Options(o.budget, o.sinks, "absolute")


@functools.lru_cache
def alphas(path):
    """The table of a file, float64 [layers, key heads]."""
    try:
        with open(path, encoding="utf-8") as file:
            rows = [[float(x) for x in line.split()] for line in file if line.strip()]
        return np.array(rows, float).reshape(len(rows), -1).clip(0, 1)
    except OSError as no:
        raise ValueError(f"heads={path} is neither a number nor a file that can be read: {no.strerror}") from None
    except ValueError:
        raise ValueError(f"heads={path} is no table: it must hold a line of numbers for each layer, one for each key head") from None


def retrieval(o):
    """The key heads of this layer that stay full, ascending."""
    K = o.n_kv_head
    if not o.heads:
        return [h for h in range(K) if h < o.share * K]
    if o.heads.isdigit():
        if int(o.heads) > K:
            raise ValueError(f"a layer has {K} key heads: heads may be no more")
        return list(range(int(o.heads)))
    table = alphas(o.heads)
    if table.shape != (o.n_layer, K):
        of = " x ".join(map(str, table.shape))
        raise ValueError(f"the file holds {of} numbers, for a model of {o.n_layer} layers with {K} key heads it must be {o.n_layer} x {K}")
    best = np.argsort(-table.reshape(-1), kind="stable")[: int(o.share * table.size + 0.5)]
    return sorted(int(i) % K for i in best if i // K == o.layer)


class Keys:
    """An attention layer as the memory of some heads sees it: their keys and values, projected already."""

    def __init__(self, k, v):
        self.k, self.v = k, v

    def kv(self, x):
        return self.k, self.v


class Memory(Base):
    """A state holds that of each kind of heads: "full" and "streaming", where the layer has any."""

    parts_heads, looks = True, False

    def __init__(self, c, o):
        super().__init__(c, o)
        heads, stays = {"full": retrieval(o), "streaming": []}, FULL.Memory(c, FULL.Options())
        heads["streaming"] = [h for h in range(c.num_key_value_heads) if h not in heads["full"]]
        self.always = o.sinks
        self.kinds = {"full": stays, "streaming": SINKS.Memory(c, streaming(o))}
        self.kinds = {kind: memory for kind, memory in self.kinds.items() if heads[kind]}
        # of each kind its key heads and its query heads
        G = c.num_attention_heads // c.num_key_value_heads
        self.k_heads = {kind: tuple(heads[kind]) for kind in self.kinds}
        self.q_heads = {kind: tuple(h * G + i for h in heads[kind] for i in range(G)) for kind in self.kinds}
        order = [h for kind in self.kinds for h in self.q_heads[kind]]
        self.back = tuple(order.index(h) for h in range(len(order)))

    def each(self, f, s):
        """f(a kind's memory, its state), for both kinds."""
        return {**s, **{kind: f(memory, s[kind]) for kind, memory in self.kinds.items()}}

    def settle(self, read):
        super().settle(read)
        for memory in self.kinds.values():
            memory.settle(read)

    def start(self, segment, total):
        return {kind: memory.start(segment, total) for kind, memory in self.kinds.items()}

    def write(self, attn, x, seg, s):
        k, v = attn.kv(x)
        mine = {kind: Keys(some(k, heads), some(v, heads)) for kind, heads in self.k_heads.items()}
        return {**s, **{kind: memory.write(mine[kind], x, seg, s[kind]) for kind, memory in self.kinds.items()}}

    def attend(self, attn, q, seg, s):
        q, ys = seg.queries(q), []
        for kind, memory in self.kinds.items():
            heads, (k, v, slots) = self.q_heads[kind], memory.seen(attn, q, seg, s[kind])
            how = {**memory.how(seg), "bias": seg.bias and seg.bias.of(heads)}
            ys.append(attend(some(q, heads), k, v, seg.at, slots, attn.rule, seg.begin, **how))
        return some(ops.cat(ys, 1), self.back), s

    def close(self, attn, seg, s):
        return self.each(lambda memory, t: memory.close(attn, seg, t), s)

    def still(self, s):
        return self.each(lambda memory, t: memory.still(t), s)

    def moving(self, s):
        return self.each(lambda memory, t: memory.moving(t), s)

    def room(self, s, segment, n):
        return self.each(lambda memory, t: memory.room(t, segment, n), s)

    def packed(self, s):
        return self.each(lambda memory, t: memory.packed(t), s)

    def cut(self, s, n):
        return None if self.forgets else self.each(lambda memory, t: memory.cut(t, n), s)

    def stays(self, n):
        return next(reversed(self.kinds.values())).stays(n)

    @property
    def grows(self):
        return "full" in self.kinds

    @property
    def forgets(self):
        return "streaming" in self.kinds


def some(x, heads):
    """Some heads of x [B, heads, ...], in their order."""
    first, n = heads[0], len(heads)
    if heads == tuple(range(first, first + n)):
        return x if n == x.shape[1] else x[:, first : first + n]
    return ops.entries(x, ops.constant(heads), 1)
