"""attend(): the one primitive that everything above calls. Which engine runs is chosen here and nowhere else.

dense.py is the specification. The framework's own fused attention (stock) is taken where it computes the same thing:
without a mask for plain causal attention of consecutive tokens, with a mask where little is left out. Else attention goes block by
block, where the pattern leaves any: on CUDA by Triton kernels (triton_.py), elsewhere by gathering (blocks.py).
NANOLONG_KERNEL=dense forces the specification, stock the fused kernel with a mask, blocks and triton those wherever they apply.
"""

import functools
import importlib.util
import os
from typing import Any, NamedTuple

import ops
from kernels import blocks, dense
from kernels.spans import behaviours, is_causal

ENGINE = os.environ.get("NANOLONG_KERNEL", "auto")


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


def attend(q, k, v, q_at, k_at, rule, begin=None, always=0, opening=0, scale=None, bias=None):
    """Attention of queries at positions over keys at positions, under a rule.

    q [B, H, T, D]; k, v [B, K, N, D] with K dividing H; q_at, k_at Places of T and N; rule a Plugin of attention/.
    begin [B, 1, T]: first position of each query's own document; None: 0. No query sees a key before it, and the rule is
    read in the document's own coordinates, so a packed document attends as it would alone.
    always: that many leading keys are exempt from the rule (not from causality, documents or emptiness).
    opening: so are the first so many tokens of each document.
    scale: multiplies the logits; None: D ** -0.5.
    bias: a Bias, or None.
    Returns [B, H, T, D]. A query that may see nothing gives zeros, except padding (position -1), whose rows are undefined.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if ENGINE == "dense":
        return dense.attend(q, k, v, q_at, k_at, rule, begin, always, opening, scale, bias)
    if ENGINE in ("auto", "triton") and flashes(q, k, q_at, k_at, rule, begin, bias):
        from kernels import triton_

        return triton_.attend(q, k, v, q_at, k_at, rule, begin, always, opening, scale, bias)
    if bias is not None:
        return dense.attend(q, k, v, q_at, k_at, rule, begin, always, opening, scale, bias)
    if ENGINE == "auto" and causal(q_at, k_at, q.shape[2], k.shape[2], rule, begin):
        return ops.sdpa(q, k, v, "causal" if q.shape[2] > 1 else None, scale)
    if ENGINE in ("auto", "blocks") and sparse(q.shape, k.shape[2], q_at, k_at, rule, begin, always, opening):
        return blocks.attend(q, k, v, q_at, k_at, rule, begin, always, opening, scale)
    return ops.sdpa(q, k, v, dense.visible(q_at, k_at, rule, begin, always, opening, q.shape[1]), scale)


def causal(q_at, k_at, T, N, rule, begin):
    """Is this plain causal attention of the last T of N consecutive tokens? Known on the host, or not at all."""
    if begin is not None or q_at.first is None or k_at.first is None or q_at.first + T != k_at.first + N:
        return False
    return rule.name == "full" or is_causal(rule, N, k_at.first)


def flashes(q, k, q_at, k_at, rule, begin, bias):
    """Do the Triton kernels do this, and is it theirs? One query is better served by plain products, plain causal attention by the
    stock kernel; few scores by a mask, for which no position need be known on the host."""
    T, N = q.shape[2], k.shape[2]
    if not has_triton() or T == 1:
        return False
    if ENGINE == "auto" and (T * N < LEAST or (bias is None and causal(q_at, k_at, T, N, rule, begin))):
        return False
    from kernels import triton_

    return triton_.can(q, k)


@functools.cache
def has_triton():
    """Is there Triton, and a device that it compiles for (or its interpreter)?"""
    there = ops.BACKEND == "torch" and importlib.util.find_spec("triton") is not None
    return there and (ops.device().type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


def sparse(shape, N, q_at, k_at, rule, begin, always, opening):
    """Can attention of queries [B, H, T, D] over N keys go block by block, and does that pay?"""
    _, H, T, _ = shape
    if T == 1 or q_at.first is None or k_at.first is None or ops.tracing():
        return False
    if ENGINE == "auto" and (T * N < LEAST or not worth()):
        return False
    if begin is not None and ops.known(begin) is None:
        return False
    if ENGINE == "blocks":
        return True
    what = rule, (q_at.first, T), (k_at.first, N)
    if begin is None:
        return share(*what, None, always, opening, H) < worth()
    return share.__wrapped__(*what, blocks.documents(begin), always, opening, H) < worth()


LEAST = 1 << 17  # scores of a head below which one call with a mask is as good


def worth():
    """The share of all scores below which blocks are faster: measured on CPUs; on a GPU only NANOLONG_KERNEL=blocks takes them."""
    return 0.0 if ops.on_gpu() else 0.6


@functools.lru_cache(maxsize=256)
def share(rule, q, k, docs, always, opening, heads):
    """The share of all scores that lies in blocks."""
    found = blocks.found(rule, q, k, docs, always, opening, heads)
    return blocks.area(found, behaviours(rule, heads), q[1]) / (q[1] * k[1] * heads)
