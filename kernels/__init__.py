"""attend(): the one primitive that everything above calls. Which engine runs is chosen here and nowhere else.

dense.py is the specification. The framework's own fused attention (stock) is taken where it computes the same thing:
without a mask for plain causal attention of consecutive tokens, with a mask where little is left out. Else attention goes block by
block, where the pattern leaves any: on CUDA by Triton kernels (triton_.py), elsewhere by gathering (blocks.py).
NANOLONG_KERNEL=dense forces the specification, stock the fused kernel with a mask, blocks and triton those wherever they apply;
NANOLONG_HOPPER=0 leaves out the kernels made for Hopper GPUs (hopper.py), which triton_.py prefers.
"""

import importlib.util
import os
from typing import Any, NamedTuple

import ops
from kernels import blocks, dense
from kernels.spans import is_causal

ENGINE = os.environ.get("NANOLONG_KERNEL", "auto")
# Triton, and something that it compiles for, or its interpreter
TRITON = ops.BACKEND == "torch" and importlib.util.find_spec("triton") is not None
TRITON = TRITON and ("cuda" in ops.devices() or os.environ.get("TRITON_INTERPRET") == "1")


class Places(NamedTuple):
    """Positions of a run of queries or keys: data, not an offset.

    at: [B, 1, n], or [B, K, n] where key heads remember different tokens; integers, -1 marks an empty slot or padding.
    first: the position of entry 0, if the host knows that entries are consecutive and alike in every row; else None.
    """

    at: Any
    first: int | None = None


class Bias(NamedTuple):
    """What is added to scaled logits by distance, for each head. One of the two, the other None.

    slope: [H] float32: - slope[h] * (q - k). table: [H, R] float32: + table[h, min(q - k, R - 1)], trainable.
    """

    slope: Any = None
    table: Any = None

    def of(self, heads):
        """The same for some of the heads, neighbours, a range."""
        return Bias(*(None if x is None else x[heads.start : heads.stop] for x in self))


if TRITON:
    from kernels import triton_


def attend(q, k, v, q_at, k_at, rule, begin=None, always=0, opening=0, scale=None, bias=None, lse=False):
    """Attention of queries at positions over keys at positions, under a rule.

    q [B, H, T, D]; k, v [B, K, N, D] with K dividing H; q_at, k_at Places of T and N; rule a Plugin of attention/.
    begin [B, 1, T]: first position of each query's own document; None: 0. No query sees a key before it, and the rule is
    read in the document's own coordinates, so a packed document attends as it would alone.
    always: that many leading keys are exempt from the rule (not from causality, documents or emptiness).
    opening: so are the first so many tokens of each document.
    scale: multiplies the logits; None: D ** -0.5.
    bias: a Bias, or None.
    lse: return (y, lse), lse [B, H, T] float32 the natural logarithm of the sum of exp(scaled logits) over what a query sees, -inf
    where that is nothing. Both have gradients, so that attention over parts of the keys can be merged.
    Returns y [B, H, T, D]. A query that may see nothing gives zeros, except padding (position -1), whose rows are undefined.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    what = q, k, v, q_at, k_at, rule, begin, always, opening, scale
    plain = bias is None and not lse
    if ENGINE == "dense":
        return dense.attend(*what, bias, lse)
    if ENGINE == "auto" and plain and causal(q_at, k_at, q.shape[2], k.shape[2], rule, begin):
        return ops.sdpa(q, k, v, "causal" if q.shape[2] > 1 else None, scale)
    if TRITON and ENGINE in ("auto", "triton") and flashes(q, k, plain):
        return triton_.attend(*what, bias, lse)
    if bias is None and ENGINE in ("auto", "blocks") and sparse(q.shape, k.shape[2], q_at, k_at, rule, begin, always, opening, lse):
        return blocks.attend(*what, lse)
    if not plain:
        # the frameworks' fused attention keeps the log-sum-exp to itself
        return dense.attend(*what, bias, lse)
    return ops.sdpa(q, k, v, dense.visible(q_at, k_at, rule, begin, always, opening, q.shape[1]), scale)


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


def sparse(shape, N, q_at, k_at, rule, begin, always, opening, lse=False):
    """Can attention of queries [B, H, T, D] over N keys go block by block, and does that pay?"""
    _, H, T, _ = shape
    if T == 1 or q_at.first is None or k_at.first is None:
        return False
    if ENGINE == "auto" and (T * N < LEAST or not (lse or worth())):
        return False
    if ops.tracing():
        # the plan is made when the graph runs: what it leaves out is not known here
        return True
    if begin is not None and ops.known(begin) is None:
        return False
    if ENGINE == "blocks" or lse:
        return True
    return blocks.share(rule, (q_at.first, T), (k_at.first, N), blocks.documents(begin), always, opening, H) < worth()


LEAST = 1 << 17  # scores of a head below which one call with a mask is as good


def worth():
    """The share of all scores below which blocks are faster, forward and backward: measured on CPUs, and with MLX on CUDA. torch on a GPU
    has Triton instead; what that does not do goes by a mask."""
    return 0.6 if not ops.on_gpu() else 0.1 if ops.BACKEND == "mlx" else 0.0
