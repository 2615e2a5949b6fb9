"""attend(): the one primitive that everything above calls. Which engine runs is chosen here and nowhere else.

dense.py is the specification. The framework's own fused attention (stock) is taken where it computes the same thing:
without a mask for plain causal attention of consecutive tokens, with a mask where little is left out. Else attention goes block by
block, where the pattern leaves any: on CUDA by Triton kernels (triton_.py), elsewhere by gathering (blocks.py). A bias by distance is
too large an array to be made at once: with one, everything but few scores goes block by block, or some queries at a time.
NANOLONG_KERNEL=dense forces the specification, stock the fused kernel with a mask, blocks and triton those wherever they apply;
NANOLONG_HOPPER=0 leaves out the kernels made for Hopper GPUs (hopper.py), which triton_.py prefers. A session's steps of one token have
kernels of their own on CUDA (step.py), which do more than attention: any NANOLONG_KERNEL but auto and triton leaves these out.
"""

import importlib.util
import os
from typing import Any, NamedTuple

import ops
from kernels import blocks, dense
from kernels.spans import is_causal

ENGINE = os.environ.get("NANOLONG_KERNEL", "auto")
heard = (
    None  # a list while somebody listens to what attention is asked: the rule, heads, queries and keys (first, n), begin, always, opening
)
# Triton, and something that it compiles for, or its interpreter
TRITON = ops.BACKEND == "torch" and importlib.util.find_spec("triton") is not None
TRITON = TRITON and ("cuda" in ops.devices() or os.environ.get("TRITON_INTERPRET") == "1")


class Places(NamedTuple):
    """Positions of a run of queries or keys: data, not an offset.

    at: [B, 1, n], or [B, K, n] where key heads remember different tokens; integers, -1 marks an empty slot or padding.
    first: the position of entry 0, if the host knows that entries are consecutive and alike in every row; else None.
    own_last: of keys, does the host know that none is empty, that the queries' own tokens come last and that all others precede them?
    """

    at: Any
    first: int | None = None
    own_last: bool = False


class Bias(NamedTuple):
    """What is added to scaled logits by distance, for each head. One of the two, the other None.

    slope: [H] float32: - slope[h] * (q - k); a constant, without gradient. table: [H, R] float32: + table[h, min(q - k, R - 1)],
    trainable.
    """

    slope: Any = None
    table: Any = None

    def of(self, heads):
        """The same for some of the heads, a range or a tuple."""
        pick = lambda x: x[heads.start : heads.stop] if isinstance(heads, range) else ops.entries(x, ops.constant(heads), 0)
        return Bias(*(None if x is None else pick(x) for x in self))


if TRITON:
    from kernels import triton_


def attend(q, k, v, q_at, k_at, rule, begin=None, always=0, opening=0, scale=None, bias=None, lse=False):
    """Attention of queries at positions over keys at positions, under a rule.

    q [B, H, T, D]; k [B, K, N, D], v [B, K, N, Dv], K dividing H and Dv <= D; q_at, k_at Places of T and N; rule a Plugin of attention/.
    begin [B, 1, T]: first position of each query's own document; None: 0. No query sees a key before it, and the rule is
    read in the document's own coordinates, so a packed document attends as it would alone.
    always: that many leading keys are exempt from the rule (not from causality, documents or emptiness).
    opening: so are the first so many tokens of each document.
    scale: multiplies the logits; None: D ** -0.5.
    bias: a Bias, or None.
    lse: return (y, lse), lse [B, H, T] float32 the natural logarithm of the sum of exp(scaled logits) over what a query sees, -inf
    where that is nothing. Both have gradients, so that attention over parts of the keys can be merged.
    Returns y [B, H, T, Dv]. A query that may see nothing gives zeros, except padding (position -1), whose rows are undefined.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if heard is not None:
        heard.append((rule, q.shape[1], (q_at.first, q.shape[2]), (k_at.first, k.shape[2]), begin, always, opening))
    if k_at.own_last and q_at.first is not None and begin is None and bias is None and rule.name == "full":
        # no distance counts, only who comes first: the keys may as well be consecutive
        k_at = Places(k_at.at, q_at.first + q.shape[2] - k.shape[2])
    what = q, k, v, q_at, k_at, rule, begin, always, opening, scale
    plain = bias is None and not lse
    if ENGINE == "dense":
        return dense.attend(*what, bias, lse)
    if ENGINE == "auto" and plain and causal(q_at, k_at, q.shape[2], k.shape[2], rule, begin) and not behind(q, k):
        return ops.sdpa(q, k, v, "causal" if q.shape[2] > 1 else None, scale)
    if TRITON and ENGINE in ("auto", "triton") and flashes(q, k, plain):
        return narrowed(triton_.attend, *what, bias, lse)
    if ENGINE in ("auto", "blocks") and sparse(q.shape, k.shape[2], q_at, k_at, rule, begin, always, opening, not plain):
        return blocks.attend(*what, bias, lse)
    if plain:
        return ops.sdpa(q, k, v, dense.visible(q_at, k_at, rule, begin, always, opening, q.shape[1]), scale)
    return by_parts(*what, bias, lse)


def behind(q, k):
    """Is the framework's own causal attention the slower one? On a GPU it is, where keys come before the first query."""
    return TRITON and q.shape[2] < k.shape[2] and q.shape[2] * k.shape[2] >= MANY and triton_.can(q, k)


def narrowed(engine, q, k, v, *rest):
    """An engine that wants values as wide as keys: zeros beside them, cut off from the answer."""
    D, width = k.shape[3], v.shape[3]
    if width == D:
        return engine(q, k, v, *rest)
    out = engine(q, k, ops.cat([v, ops.full((*v.shape[:3], D - width), 0, v.dtype, v)], 3), *rest)
    cut = lambda y: y[..., :width]
    return (cut(out[0]), out[1]) if rest[-1] else cut(out)


def by_parts(q, k, v, q_at, k_at, rule, begin, always, opening, scale, bias, lse):
    """With a bias or the log-sum-exp, which the frameworks' fused attention keeps to itself: so many queries at a time that only so many
    scores, and no T x N, exist at once."""
    (B, H, T, _), N = q.shape, k.shape[2]

    def some(a, b):
        at, docs = Places(q_at.at[:, :, a:b]), None if begin is None else begin[:, :, a:b]

        def f(q, k, v, *table):
            given = Bias(None, *table) if table else bias
            if lse:
                return dense.attend(q, k, v, at, k_at, rule, docs, always, opening, scale, given, lse)
            see = dense.visible(at, k_at, rule, docs, always, opening, H)
            return ops.sdpa(q, k, v, ops.where(see, dense.biases(at, k_at, given, H), -float("inf")), scale)

        return f

    table = [] if bias is None or bias.table is None else [bias.table]
    n = max(1, SCORES // (B * H * N))
    if n >= T:
        return some(0, T)(q, k, v, *table)
    parts, last = [], None
    for a in range(0, T, n):
        b = min(a + n, T)
        parts.append(ops.recomputed(some(a, b), ops.after(q[:, :, a:b], last), k, v, *table))
        last = parts[-1][0] if lse else parts[-1]
    return tuple(ops.cat(x, 2) for x in zip(*parts)) if lse else ops.cat(parts, 2)


def causal(q_at, k_at, T, N, rule, begin):
    """Is this plain causal attention of the last T of N consecutive tokens? Known on the host, or not at all."""
    if begin is not None or q_at.first is None or k_at.first is None or q_at.first + T != k_at.first + N:
        return False
    return rule.name == "full" or is_causal(rule, N, k_at.first)


def flashes(q, k, plain):
    """Can the Triton kernels do this, and is it theirs? One query is better served by plain products, few scores by a mask, for which
    no position need be known on the host."""
    few = q.shape[2] == 1 or (plain and q.shape[2] * k.shape[2] < LEAST)
    return triton_.can(q, k) and not (ENGINE == "auto" and few)


def sparse(shape, N, q_at, k_at, rule, begin, always, opening, more=False):
    """Can attention of queries [B, H, T, D] over N keys go block by block, and does that pay? more: a bias or the log-sum-exp is asked
    for, and it pays whatever is left out."""
    _, H, T, _ = shape
    if T == 1 or q_at.first is None or k_at.first is None:
        return False
    if ENGINE == "auto" and (T * N < LEAST or not (more or worth())):
        return False
    if ops.tracing():
        # the plan is made when the graph runs: what it leaves out is not known here
        return True
    if begin is not None and ops.known(begin) is None:
        return False
    if ENGINE == "blocks" or more:
        return True
    return blocks.share(rule, (q_at.first, T), (k_at.first, N), blocks.documents(begin), always, opening, H) < worth()


LEAST = 1 << 17  # scores of a head below which one call with a mask is as good
MANY = 1 << 24  # scores of a head from which Triton's kernels pay for their start
SCORES = 8 * LEAST  # of all heads and rows, that exist at once where a bias or the log-sum-exp is made for some queries at a time


def worth():
    """The share of all scores below which blocks are faster, forward and backward: measured on CPUs, and with MLX on CUDA. torch on a GPU
    has Triton instead; what that does not do goes by a mask."""
    return 0.6 if not ops.on_gpu() else 0.1 if ops.BACKEND == "mlx" else 0.0
