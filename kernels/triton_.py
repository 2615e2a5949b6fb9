"""attend() as flash attention over lists of blocks, in Triton: forward and backward, the pattern's rule compiled in.

FlashAttention-2 (Dao 2023, arXiv:2307.08691) where a program walks a list of blocks instead of a range. The lists come from
kernels/layout.py by kernels/plan.py, so time and memory follow the pattern; the rule itself (kernels/inline.py) is applied on partial
blocks only. The backward pass is two passes, dK and dV by blocks of keys and dQ by blocks of queries, without atomic additions.

Symbols: B rows, H query heads, K key heads, G = H / K, n queries, n_keys keys, D head width (DP: the next power of two); BQ x BK a block;
s scores, p weights, l row sums, m row maxima. Everything is in base 2: lse is log2 of a row's sum of 2^s, 1e30 where it sees nothing.
Masked scores are -1e30, not -inf, so no NaN can arise.
"""

import collections
import contextlib
import functools
import os
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import PTXASError
from triton.tools.tensor_descriptor import TensorDescriptor

import ops
from kernels import plan
from kernels.inline import compiled
from kernels.layout import layout, within
from kernels.named import named, rule_of
from kernels.recent import Recent
from kernels.spans import behaviours

Maybe = Optional[Tensor]  # noqa: UP045, so that a schema can be read off
LOG2E = 1.4426950408889634
MASKED = tl.constexpr(-1e30)
PARTIAL = tl.constexpr(0x7FFFFFFF)
# entries on either side of a table: a block whose least distance is near has no distance beyond them
BESIDE = tl.constexpr(256)
# from where a table has distance 0 back to where it has it in the other direction
MIRROR = tl.constexpr(2 * 256 + 1)
BLOCK_BITS, BLOCK = tl.constexpr(plan.BLOCKS), tl.constexpr((1 << plan.BLOCKS) - 1)

# ---------------------------------------------------------------- inside the kernels


@triton.jit
def seen(
    q, k, b, ki, h, layer, last,
    RULE: tl.constexpr, EXPLICIT: tl.constexpr, DOCS: tl.constexpr, BEHIND: tl.constexpr, ALWAYS: tl.constexpr, OPENING: tl.constexpr,
):  # fmt: skip
    """May queries at q (their documents beginning at b) see keys at k, the ki-th ones? As kernels/dense.sees(). Rows beyond the end
    of the keys stand behind every query, or (BEHIND) at least behind the last key, or at -1 if positions are read."""
    see = RULE(q - b, k - b, h, layer)
    if ALWAYS > 0:
        see = see | (ki < ALWAYS)
    if OPENING > 0:
        see = see | (k - b < OPENING)
    see = see & (k <= q)
    if BEHIND:
        see = see & (k <= last)
    if EXPLICIT or DOCS:
        see = see & (k >= b)
    return see


@triton.jit
def positions(AT, FIRST, r, n, EXPLICIT: tl.constexpr):
    """Positions of rows r: read from AT, or consecutive from FIRST."""
    if EXPLICIT:
        return tl.load(AT + r, mask=r < n, other=-1)
    else:
        return FIRST + r


@triton.jit
def begins(BEGIN, r, n, DOCS: tl.constexpr):
    """Where the documents of rows r begin."""
    if DOCS:
        return tl.load(BEGIN + r, mask=r < n, other=0)
    else:
        return r * 0


@triton.jit
def biased(s, q, k, near, least, each, TABLE, REACH: tl.constexpr, EXPLICIT: tl.constexpr, BIAS: tl.constexpr):
    """Raw products with the bias, but for what is the same for all keys of a query: a softmax does not feel it (see own).

    slope: each * (k - near), near a position of the block of queries: exact for keys that are not far. table: what distant keys have is
    subtracted from all of it (Call.bias), so it is read only where a distance, the least of the block being `least`, is below REACH - 1.
    By masks: Triton 3.6 cannot lower some branches that float32 scores pass through.
    """
    if BIAS == "slope":
        return s + each * (k - near).to(tl.float32)
    elif BIAS == "table":
        if EXPLICIT:
            s += tl.load(TABLE + tl.maximum(q - k, 0), mask=q - k < REACH - 1, other=0.0)
        else:
            # a block that is listed only so that its list is not empty may lie anywhere; the mask must be an array
            least = q * 0 + least
            s += tl.load(TABLE + (q - k), mask=(least < REACH - 1) & (least > -BESIDE), other=0.0)
        return s
    else:
        return s


@triton.jit
def own(q, near, each, scale, BIAS: tl.constexpr):
    """What biased() leaves out for queries at q, in base 2: only the log-sum-exp shows it."""
    if BIAS == "slope":
        return each * scale * (near - q).to(tl.float32)
    elif BIAS == "table":
        return each * scale
    else:
        return 0.0


@triton.jit
def bias_of(EACH, TABLE, h, REACH: tl.constexpr, BIAS: tl.constexpr):
    """A head's slope or its table's last entry, and its table from distance 0 on."""
    if BIAS == "slope":
        return tl.load(EACH + h), TABLE
    elif BIAS == "table":
        return tl.load(EACH + h), TABLE + (2 * h + 1) * (REACH + 2 * BESIDE) + BESIDE
    else:
        return 0.0, TABLE


@triton.jit
def latest(at, last, EXPLICIT: tl.constexpr):
    """The largest position of a block; `last`: that of consecutive ones."""
    if EXPLICIT:
        return tl.max(at)
    else:
        return last


@triton.jit
def my_work(WHO, ITEM, LO, HI, Z, wide):
    """(head counted over rows, its block or -1, the list's ends, the place of this piece): heads first, so that neighbours share blocks."""
    pid = tl.program_id(0)
    z = pid % Z
    at = tl.load(WHO + z) * wide + pid // Z
    return z, tl.load(ITEM + at), tl.load(LO + at), tl.load(HI + at), at


@triton.jit(do_not_specialize=["n", "n_keys", "q_first", "k_first", "wide", "layer", "Z"])
def forward_kernel(
    Q, K, V, O, LSE, Q_AT, K_AT, BEGIN, EACH, TABLE, WHO, ITEM, LO, HI, LIST,
    Z, wide, n, n_keys, q_first, k_first, layer, scale,
    H: tl.constexpr, G: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, REACH: tl.constexpr, K_HEADS: tl.constexpr,
    RULE: tl.constexpr, EXPLICIT: tl.constexpr, DOCS: tl.constexpr, BEHIND: tl.constexpr, ALWAYS: tl.constexpr, OPENING: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head over its blocks of keys."""
    z, i, lo, hi, _ = my_work(WHO, ITEM, LO, HI, Z, wide)
    if i < 0:
        return
    b, h = z // H, z % H
    r = i * BQ + tl.arange(0, BQ)
    at = positions(Q_AT + b * n, q_first, r, n, EXPLICIT)
    qp = at[:, None]
    qb = begins(BEGIN + b * n, r, n, DOCS)[:, None]
    each, TABLE = bias_of(EACH, TABLE, h, REACH, BIAS)
    K_AT += (b * K_HEADS + h // G % K_HEADS) * n_keys
    near = latest(qp, q_first + i * BQ + BQ - 1, EXPLICIT)
    q = Q.load([b, h, i * BQ, 0]).reshape(BQ, DP)
    m = tl.full([BQ], MASKED, tl.float32)
    l = tl.zeros([BQ], tl.float32)
    acc = tl.zeros([BQ, DP], tl.float32)
    for t in tl.range(lo, hi):
        e = tl.load(LIST + t)
        j = (e & PARTIAL) * BK
        s = tl.dot(q, K.load([b, h // G, j, 0]).reshape(BK, DP).T, input_precision=PRECISION)
        ki = j + tl.arange(0, BK)
        if BIAS != "none":
            kp = positions(K_AT, k_first, ki, n_keys, EXPLICIT)[None, :]
            s = biased(s, qp, kp, near, q_first + i * BQ - k_first - j - BK + 1, each, TABLE, REACH, EXPLICIT, BIAS)
        if e < 0:
            # positions are long in coming: without a bias full blocks do not wait for them
            at_keys = positions(K_AT, k_first, ki, n_keys, EXPLICIT)[None, :]
            see = seen(qp, at_keys, qb, ki[None, :], h, layer, k_first + n_keys - 1, RULE, EXPLICIT, DOCS, BEHIND, ALWAYS, OPENING)
            s = tl.where(see, s, MASKED)
        new = tl.maximum(m, tl.max(s, 1) * scale)
        # a row that has seen nothing yet has a maximum far below any score
        safe = tl.where(new > -1e20, new, 0.0)
        p = tl.math.exp2(s * scale - safe[:, None])
        a = tl.math.exp2(m - safe)
        m, l = new, l * a + tl.sum(p, 1)
        acc = tl.dot(p.to(Q.dtype), V.load([b, h // G, j, 0]).reshape(BK, DP), acc * a[:, None], input_precision=PRECISION)
    some = l > 0
    l = tl.where(some, l, 1.0)
    O.store([b, h, i * BQ, 0], (acc / l[:, None]).to(Q.dtype).reshape(1, 1, BQ, DP))
    tl.store(LSE + z.to(tl.int64) * n + r, tl.where(some, m + tl.math.log2(l) + own(at, near, each, scale, BIAS), 1e30), mask=r < n)


@triton.jit(do_not_specialize=["n", "sb", "sh", "sn", "tb", "th", "tn"])
def delta_kernel(
    O, DO, DLSE, DELTA, n, sb, sh, sn, tb, th, tn,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, WITH_LSE: tl.constexpr,
):  # fmt: skip
    """DELTA = rowsum(O * DO) - DLSE: what dS = P * (dP - DELTA) subtracts."""
    z, r, d = tl.program_id(1), tl.program_id(0) * BQ + tl.arange(0, BQ), tl.arange(0, DP)
    b, h, r64 = (z // H).to(tl.int64), (z % H).to(tl.int64), r.to(tl.int64)[:, None]
    inside = (r[:, None] < n) & (d[None, :] < D)
    x = tl.load(O + b * sb + h * sh + r64 * sn + d[None, :], mask=inside, other=0).to(tl.float32)
    y = tl.load(DO + b * tb + h * th + r64 * tn + d[None, :], mask=inside, other=0).to(tl.float32)
    delta, at = tl.sum(x * y, 1), z.to(tl.int64) * n + r
    if WITH_LSE:
        # DLSE is by lse in base 2
        delta -= tl.load(DLSE + at, mask=r < n, other=0) * 1.4426950408889634
    tl.store(DELTA + at, delta, mask=r < n)


@triton.jit(do_not_specialize=["n", "n_keys", "q_first", "k_first", "wide", "layer", "Z"])
def dq_kernel(
    Q, K, V, DO, DQ, LSE, DELTA, Q_AT, K_AT, BEGIN, EACH, TABLE, WHO, ITEM, LO, HI, LIST,
    Z, wide, n, n_keys, q_first, k_first, layer, scale, plain,
    H: tl.constexpr, G: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, REACH: tl.constexpr, K_HEADS: tl.constexpr,
    RULE: tl.constexpr, EXPLICIT: tl.constexpr, DOCS: tl.constexpr, BEHIND: tl.constexpr, ALWAYS: tl.constexpr, OPENING: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ = dS K of one block of queries."""
    z, i, lo, hi, _ = my_work(WHO, ITEM, LO, HI, Z, wide)
    if i < 0:
        return
    b, h = z // H, z % H
    r = i * BQ + tl.arange(0, BQ)
    at = z.to(tl.int64) * n + r
    qp = positions(Q_AT + b * n, q_first, r, n, EXPLICIT)[:, None]
    qb = begins(BEGIN + b * n, r, n, DOCS)[:, None]
    each, TABLE = bias_of(EACH, TABLE, h, REACH, BIAS)
    K_AT += (b * K_HEADS + h // G % K_HEADS) * n_keys
    near = latest(qp, q_first + i * BQ + BQ - 1, EXPLICIT)
    q = Q.load([b, h, i * BQ, 0]).reshape(BQ, DP)
    do = DO.load([b, h, i * BQ, 0]).reshape(BQ, DP)
    lse = tl.load(LSE + at, mask=r < n, other=1e30)[:, None] - own(qp, near, each, scale, BIAS)
    delta = tl.load(DELTA + at, mask=r < n, other=0.0)[:, None]
    dq = tl.zeros([BQ, DP], tl.float32)
    for t in tl.range(lo, hi):
        e = tl.load(LIST + t)
        j = (e & PARTIAL) * BK
        k = K.load([b, h // G, j, 0]).reshape(BK, DP)
        s = tl.dot(q, k.T, input_precision=PRECISION)
        ki = j + tl.arange(0, BK)
        kp = positions(K_AT, k_first, ki, n_keys, EXPLICIT)[None, :]
        s = biased(s, qp, kp, near, q_first + i * BQ - k_first - j - BK + 1, each, TABLE, REACH, EXPLICIT, BIAS)
        if e < 0:
            s = tl.where(
                seen(qp, kp, qb, ki[None, :], h, layer, k_first + n_keys - 1, RULE, EXPLICIT, DOCS, BEHIND, ALWAYS, OPENING), s, MASKED
            )
        p = tl.math.exp2(s * scale - lse)
        dp = tl.dot(do, V.load([b, h // G, j, 0]).reshape(BK, DP).T, input_precision=PRECISION)
        ds = p * (dp - delta)
        dq = tl.dot(ds.to(Q.dtype), k, dq, input_precision=PRECISION)
    DQ.store([b, h, i * BQ, 0], (dq * plain).to(Q.dtype).reshape(1, 1, BQ, DP))


@triton.jit(do_not_specialize=["n", "n_keys", "q_first", "k_first", "wide", "layer", "Z"])
def dkv_kernel(
    Q, K, V, DO, DK, DV, PART, LSE, DELTA, Q_AT, K_AT, BEGIN, EACH, TABLE, WHO, ITEM, LO, HI, SLOT, LIST,
    Z, wide, n, n_keys, q_first, k_first, layer, scale, plain,
    H: tl.constexpr, G: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, REACH: tl.constexpr, K_HEADS: tl.constexpr,
    RULE: tl.constexpr, EXPLICIT: tl.constexpr, DOCS: tl.constexpr, BEHIND: tl.constexpr, ALWAYS: tl.constexpr, OPENING: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dV = P^T dO and dK = dS^T Q of one block of keys, or a float32 part of them in PART [slot, B K, 2, BK, DP]."""
    z, j, lo, hi, at = my_work(WHO, ITEM, LO, HI, Z, wide)
    if j < 0:
        return
    HK: tl.constexpr = H // G
    b, hk = z // HK, z % HK
    slot = tl.load(SLOT + at)
    ki = j * BK + tl.arange(0, BK)
    kp = positions(K_AT + (b * K_HEADS + hk % K_HEADS) * n_keys, k_first, ki, n_keys, EXPLICIT)[:, None]
    k = K.load([b, hk, j * BK, 0]).reshape(BK, DP)
    v = V.load([b, hk, j * BK, 0]).reshape(BK, DP)
    dk = tl.zeros([BK, DP], tl.float32)
    dv = tl.zeros([BK, DP], tl.float32)
    for t in tl.range(lo, hi):
        e = tl.load(LIST + t)
        h = hk * G + ((e & PARTIAL) >> BLOCK_BITS)
        i = (e & BLOCK) * BQ
        r = i + tl.arange(0, BQ)
        row = (b * H + h).to(tl.int64) * n + r
        q = Q.load([b, h, i, 0]).reshape(BQ, DP)
        # transposed [BK, BQ], so that p and ds feed the next products from registers
        s = tl.dot(k, q.T, input_precision=PRECISION)
        do = DO.load([b, h, i, 0]).reshape(BQ, DP)
        lse = tl.load(LSE + row, mask=r < n, other=1e30)[None, :]
        delta = tl.load(DELTA + row, mask=r < n, other=0.0)[None, :]
        qp = positions(Q_AT + b * n, q_first, r, n, EXPLICIT)[None, :]
        each, MINE = bias_of(EACH, TABLE, h, REACH, BIAS)
        near = latest(qp, q_first + i + BQ - 1, EXPLICIT)
        s = biased(s, qp, kp, near, q_first + i - k_first - j * BK - BK + 1, each, MINE, REACH, EXPLICIT, BIAS)
        if e < 0:
            qb = begins(BEGIN + b * n, r, n, DOCS)[None, :]
            s = tl.where(
                seen(qp, kp, qb, ki[:, None], h, layer, k_first + n_keys - 1, RULE, EXPLICIT, DOCS, BEHIND, ALWAYS, OPENING), s, MASKED
            )
        p = tl.math.exp2(s * scale - (lse - own(qp, near, each, scale, BIAS)))
        dv = tl.dot(p.to(Q.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, do.T, input_precision=PRECISION)
        dk = tl.dot((p * (dp - delta)).to(Q.dtype), q, dk, input_precision=PRECISION)
    if slot < 0:
        DK.store([b, hk, j * BK, 0], (dk * plain).to(Q.dtype).reshape(1, 1, BK, DP))
        DV.store([b, hk, j * BK, 0], dv.to(Q.dtype).reshape(1, 1, BK, DP))
    else:
        to = PART + ((slot * Z + z).to(tl.int64) * 2 * BK + tl.arange(0, BK)[:, None]) * DP + tl.arange(0, DP)[None, :]
        tl.store(to, dk * plain)
        tl.store(to + BK * DP, dv)


@triton.jit(do_not_specialize=["n", "n_keys", "q_first", "k_first", "wide", "layer", "Z", "m"])
def dtable_kernel(
    Q, K, V, O, DO, LSE, DLSE, TO, Q_AT, K_AT, BEGIN, EACH, TABLE, WHO, ITEM, LO, HI, LIST,
    Z, wide, n, n_keys, q_first, k_first, layer, scale, m,
    H: tl.constexpr, G: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, REACH: tl.constexpr, K_HEADS: tl.constexpr,
    RULE: tl.constexpr, EXPLICIT: tl.constexpr, DOCS: tl.constexpr, BEHIND: tl.constexpr, ALWAYS: tl.constexpr, OPENING: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, WITH_LSE: tl.constexpr,
):  # fmt: skip
    """The sums of dS over one block of queries by distance, added to TO [Z, m, REACH - 1], which only this program does: keys and
    queries that are consecutive make diagonals. Positions that are scattered: every dS is added to TO [H, REACH - 1]."""
    z, i, lo, hi, _ = my_work(WHO, ITEM, LO, HI, Z, wide)
    if i < 0:
        return
    b, h = z // H, z % H
    r = i * BQ + tl.arange(0, BQ)
    at = z.to(tl.int64) * n + r
    qp = positions(Q_AT + b * n, q_first, r, n, EXPLICIT)[:, None]
    qb = begins(BEGIN + b * n, r, n, DOCS)[:, None]
    each, TABLE = bias_of(EACH, TABLE, h, REACH, BIAS)
    K_AT += (b * K_HEADS + h // G % K_HEADS) * n_keys
    q = Q.load([b, h, i * BQ, 0]).reshape(BQ, DP)
    do = DO.load([b, h, i * BQ, 0]).reshape(BQ, DP)
    delta = tl.sum(O.load([b, h, i * BQ, 0]).reshape(BQ, DP).to(tl.float32) * do.to(tl.float32), 1)[:, None]
    if WITH_LSE:
        delta -= tl.load(DLSE + at, mask=r < n, other=0)[:, None] * 1.4426950408889634
    lse = tl.load(LSE + at, mask=r < n, other=1e30)[:, None] - own(qp, 0, each, scale, BIAS)
    TO += (h if EXPLICIT else z.to(tl.int64) * m + i) * (REACH - 1)
    row = tl.arange(0, BQ)[:, None]
    residue = tl.arange(0, BK)
    for t in tl.range(lo, hi):
        # all blocks that are listed have distances below REACH - 1; a condition would keep their copies from overlapping
        e = tl.load(LIST + t)
        j = (e & PARTIAL) * BK
        apart = q_first + i * BQ - k_first - j
        ki = j + tl.arange(0, BK)
        kp = positions(K_AT, k_first, ki, n_keys, EXPLICIT)[None, :]
        s = tl.dot(q, K.load([b, h // G, j, 0]).reshape(BK, DP).T, input_precision=PRECISION)
        s = biased(s, qp, kp, 0, apart - BK + 1, each, TABLE, REACH, EXPLICIT, BIAS)
        if e < 0:
            s = tl.where(
                seen(qp, kp, qb, ki[None, :], h, layer, k_first + n_keys - 1, RULE, EXPLICIT, DOCS, BEHIND, ALWAYS, OPENING), s, MASKED
            )
        dp = tl.dot(do, V.load([b, h // G, j, 0]).reshape(BK, DP).T, input_precision=PRECISION)
        ds = tl.math.exp2(s * scale - lse) * (dp - delta)
        if EXPLICIT:
            far = tl.maximum(qp - kp, 0)
            tl.atomic_add(TO + far, ds, mask=(far < REACH - 1) & (ds != 0.0), sem="relaxed")
        else:
            # rows rotated so that a column holds the distances of one residue, then summed for each multiple of BK
            column = (row - residue[None, :]) & (BK - 1)
            turned = tl.gather(ds, column, 1)
            for w in tl.static_range(-1, BQ // BK):
                far = apart + w * BK + residue
                total = tl.sum(tl.where(row - residue[None, :] - column == w * BK, turned, 0.0), 0)
                # one thread adds to a number, tile by tile: in a fixed order
                tl.atomic_add(TO + far, total, mask=(far >= 0) & (far < REACH - 1), sem="relaxed")


@triton.jit(do_not_specialize=["m", "wide"])
def add_parts_kernel(PART, WHO, BLOCK, FIRST, COUNT, DK, DV, m, HK: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr):
    """The sums of a cut block's parts, in order, so that the result does not depend on timing."""
    z, Z = tl.program_id(1), tl.num_programs(1)
    at = tl.load(WHO + z) * m + tl.program_id(0)
    first, count = tl.load(FIRST + at), tl.load(COUNT + at)
    if count == 0:
        return
    r = tl.arange(0, BK)[:, None] * DP + tl.arange(0, DP)[None, :]
    dk = tl.zeros([BK, DP], tl.float32)
    dv = tl.zeros([BK, DP], tl.float32)
    for c in tl.range(first, first + count):
        part = PART + (c * Z + z).to(tl.int64) * 2 * BK * DP + r
        dk += tl.load(part)
        dv += tl.load(part + BK * DP)
    j = tl.load(BLOCK + at) * BK
    DK.store([z // HK, z % HK, j, 0], dk.to(DK.dtype).reshape(1, 1, BK, DP))
    DV.store([z // HK, z % HK, j, 0], dv.to(DV.dtype).reshape(1, 1, BK, DP))


# ---------------------------------------------------------------- around the kernels


class Shape(NamedTuple):
    """What a kernel needs: tokens in a block of queries and of keys, warps, stages of the pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


def shapes(D, dtype):
    """The blocks of forward, dQ and dK/dV. Measured on an H100 in bfloat16 (bench/attention.py); the others must only fit."""
    if dtype == torch.float32:
        size = 64 if D <= 64 else 32 if D <= 128 else 16
        return (Shape(size, size, 4, 2),) * 3
    if D > 128:
        return Shape(64, 64, 8, 2), Shape(64, 32, 8, 2), Shape(32, 64, 8, 2)
    return (Shape(64, 64, 4, 2),) * 3


def table_shape(D, dtype):
    """The blocks of the table's gradient."""
    return shapes(D, dtype)[1]._replace(stages=2)


def can(q, k):
    """Can the kernels do this? Head width a multiple of 8 up to 256, on CUDA (or interpreted)."""
    return (q.is_cuda or INTERPRETED) and q.shape[3] % 8 == 0 and q.shape[3] <= 256 and q.shape[1] // k.shape[1] <= 64


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Where(NamedTuple):
    """Who stands where: positions that are consecutive from `q_first` and `k_first`, or arrays [1 or B, 1, n] and
    [1 or B, 1 or K, n_keys]; where each query's document begins, [1 or B, 1, n], or None: at 0."""

    q_first: int
    k_first: int
    q_at: Maybe
    k_at: Maybe
    begin: Maybe


class Lists(NamedTuple):
    """What a kernel reads: arrays on the device, and how long their lists are on average; key blocks that are cut [3, classes, m];
    how many parts they write; which class each row and head belongs to."""

    arrays: tuple
    mean: float
    cut: Any
    slots: int
    who: Any


def lists(kind, q, k, call, size):
    """The Lists of a kernel for these tensors and places, from a cache if they are there. kind: "query" or "key", what a piece of
    work is a block of, or these "in order" (kernels/hopper.py), or "near": "query", of the blocks
    with a distance that has a bias of its own; size: tokens in a block of queries, of keys."""
    (B, H, n, _), (K, n_keys), w, rule = q.shape, k.shape[1:3], call.where, rule_of(call.rule)
    if rule.name == "full" and kind != "near" and w.begin is None and w.k_at is not None:
        # only emptiness and who comes first count: the kernel looks at that in every block, and the host waits for no numbers
        host = None, anywhere(n_keys), None
    else:
        host = [None if x is None else ops.known(x) for x in w[2:]]
    sides = (w.q_first, n), (w.k_first, n_keys)
    data = (x if x is None else (x.shape, written(x)) for x in host)
    reach = call.reach() if kind == "near" else None
    key = kind, size, rule, sides, *data, B, H, K, q.device, call.always, call.opening, reach
    make = lambda: listed(kind, found(host, sides, size, rule, B, H, K, call.always, call.opening, reach), K, q.device)
    return recent.get(key, make)


@functools.cache
def anywhere(n):
    """Positions [1, 1, n] of keys none of whose blocks is known to be seen as a whole, or not at all."""
    return -(np.arange(n)[None, None] % 2)


def written(x):
    """The bytes of an array that ops.known() gave, made and hashed once."""
    for there, data in writings:
        if there is x:
            return data
    writings.append((x, x.tobytes()))
    return writings[-1][1]


# pieces of work for each program that takes a share of all: above, sharing out costs more than it gives (measured on an H100)
MANY = {"query in order": 256, "key in order": 64}
writings = collections.deque(maxlen=4)

recent = Recent(1 << 26, lambda made: sum(x.numel() for x in made.arrays))  # numbers that are kept on the device


def found(host, sides, size, rule, B, H, K, always, opening, reach=None):
    """The layouts [B][H]; what stands alike is asked for once, and is one object. reach: of blocks with a distance below reach - 1."""
    q_at, k_at, begin = host
    who, known, out = behaviours(rule, H), {}, []
    for b in range(B):
        out.append([])
        for h in range(H):
            rows = [None if x is None else x[b % x.shape[0], 0] for x in (q_at, begin)]
            keys = None if k_at is None else k_at[b % k_at.shape[0], h * K // H % k_at.shape[1]]
            q, k = (side if x is None else x for side, x in zip(sides, (rows[0], keys)))
            mark = who[h], *(x if x is None else x.tobytes() for x in (*rows, keys))
            if mark not in known:
                known[mark] = layout(rule, q, k, size, rows[1], always, who[h], opening)
                if reach is not None:
                    known[mark] = within(known[mark], q, k, reach - 1)
            out[-1].append(known[mark])
    return out


def listed(kind, layouts, K, device):
    work = plan.by_key(layouts, K) if kind.startswith("key") else plan.by_query(layouts)
    put = lambda x: torch.from_numpy(x).to(device, non_blocking=True)
    arrays = plan.in_order(work, MANY[kind]) if kind in MANY else (work.who, work.item, work.lo, work.hi, work.slot, work.list)
    mean = (work.hi - work.lo).sum() / max(1, (work.item >= 0).sum())
    return Lists(tuple(map(put, arrays)), mean, put(work.cut), work.slots, put(work.who))


@functools.cache
def hopper_on(device):
    """The kernels written for Hopper GPUs (kernels/hopper.py), where the device and this Triton's Gluon are what they were written for."""
    if INTERPRETED or os.environ.get("NANOLONG_HOPPER") == "0" or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    try:
        from triton.experimental.gluon import language

        if not hasattr(language, "thread_barrier"):
            return None
        from kernels import hopper
    except ImportError:
        return None
    return hopper


def hopper_for(q):
    """kernels/hopper.py if it does this: 16 bits, D 64 or 128."""
    fits = q.dtype != torch.float32 and q.shape[3] in (64, 128)
    return hopper_on(q.device) if fits else None


def ready(x):
    """x as a tensor descriptor can take it: rows of contiguous, aligned numbers."""
    fine = x.stride(3) == 1 and all(s * x.element_size() % 16 == 0 for s in x.stride()[:3]) and x.data_ptr() % 16 == 0
    return x if fine else x.contiguous() if not x.is_contiguous() else x.clone()


def described(x, block):
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, block, width_of(x)])


class Call(NamedTuple):
    """Everything that both passes need besides tensors of queries and keys."""

    rule: str
    where: Where
    always: int
    opening: int
    scale: float
    slope: Maybe
    table: Maybe

    def arrays(self, q, k, like):
        """Positions [B, n], [B, 1 or K, n_keys], documents [B, n] int32, and the bias; in the place of what is not there, which is
        never read, `like`."""
        B, w = q.shape[0], self.where
        whole = lambda x, *shape: like if x is None else x.expand(shape).to(torch.int32).contiguous()
        at = whole(w.q_at, B, 1, q.shape[2]), whole(w.k_at, B, self.key_heads(), k.shape[2]), whole(w.begin, B, 1, q.shape[2])
        return *at, *(like if x is None else x for x in self.bias())

    def bias(self):
        """What the kernels read of a bias, in the unit of raw products: each head's slope, or its table's last entry; and the table
        less that entry, so that distant keys have none, with room on either side for distances that it does not have, backwards and then
        forwards."""
        if self.table is None:
            return None if self.slope is None else self.slope / self.scale, None
        table = self.table.detach().float()
        both = table.index_select(1, both_ways(table.shape[1], table.device))
        return table[:, -1] / self.scale, (both - table[:, -1:]) / self.scale

    def key_heads(self):
        """How many key heads have positions of their own."""
        return 1 if self.where.k_at is None else self.where.k_at.shape[1]

    def reach(self):
        """How many distances have a bias of their own; all beyond share the last."""
        return 1 if self.table is None else self.table.shape[1]

    def options(self, q, k):
        """What is compiled in, whatever the kernel."""
        w = self.where
        return {
            "RULE": compiled(rule_of(self.rule)),
            "EXPLICIT": w.q_at is not None,
            "DOCS": w.begin is not None,
            "BEHIND": w.q_at is None and w.q_first + q.shape[2] > w.k_first + k.shape[2],
            "ALWAYS": self.always,
            "OPENING": self.opening,
            "BIAS": "slope" if self.slope is not None else "table" if self.table is not None else "none",
            "REACH": self.reach(),
            "K_HEADS": self.key_heads(),
        }

    def sizes(self, q, k, shape):
        return {
            "H": q.shape[1],
            "G": q.shape[1] // k.shape[1],
            "DP": width_of(q),
            "BQ": shape.queries,
            "BK": shape.keys,
            "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
            "num_warps": shape.warps,
            "num_stages": shape.stages,
        }


def keys_for(mean, call):
    """Keys in a block of the Hopper forward pass. Long lists are worth larger blocks, though more of their scores are masked; with a table
    and positions in memory these would not fit into the registers."""
    return 128 if mean > 32 and (call.table is None or call.where.q_at is None) else 64


def gains(D, call):
    """Is the Hopper forward pass the faster one? At width 64 the plain kernel is, but where it has to wait for a table's entries (measured
    on an H100)."""
    return D == 128 or call.table is not None


@functools.cache
def both_ways(R, device):
    """The places of R entries with BESIDE copies of the first and of the last beside them, backwards and then forwards."""
    at = torch.arange(-BESIDE.value, R + BESIDE.value, device=device).clamp(0, R - 1)
    return torch.cat([at.flip(0), at])


def run_forward(q, k, v, call):
    """out like q, and lse [B, H, n] float32 in base 2, 1e30 where a query sees nothing."""
    B, H, n, D = q.shape
    # strides as the queries have them: what lies there transposed is wanted transposed
    out, lse = torch.empty_like(q), q.new_empty(B, H, n, dtype=torch.float32)
    q, k, v = ready(q), ready(k), ready(v)
    rule = rule_of(call.rule)
    arrays, first = call.arrays(q, k, lse), (call.where.q_first, call.where.k_first)
    hopper = hopper_for(q)
    if hopper and gains(D, call):
        work = lists("query in order", q, k, call, (128, 64))
        keys = keys_for(work.mean, call)
        work = work if keys == 64 else lists("query in order", q, k, call, (128, 128))
        hopper.run_forward(q, k, v, out, lse, work.arrays, arrays, first, layer_of(rule), call.scale, call.options(q, k), keys)
        return out, lse
    shape = shapes(D, q.dtype)[0]
    who, item, lo, hi, _, entries = lists("query", q, k, call, shape[:2]).arrays
    wide = item.shape[1]
    forward_kernel[(B * H * wide,)](
        described(q, shape.queries), described(k, shape.keys), described(v, shape.keys), described(out, shape.queries),
        lse, *arrays, who, item, lo, hi, entries, B * H, wide, n, k.shape[2], *first, layer_of(rule), call.scale * LOG2E,
        **call.options(q, k), **call.sizes(q, k, shape),
    )  # fmt: skip
    return out, lse


def run_backward(q, k, v, out, lse, do, dlse, call, train_table=True):
    """dq, dk, dv and the table's gradient, None if there is no table or it is not wanted."""
    (B, H, n, D), (K, n_keys) = q.shape, k.shape[1:3]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    q, k, v, do = ready(q), ready(k), ready(v), ready(do)
    dlse = None if dlse is None else dlse.contiguous()
    rule = rule_of(call.rule)
    arrays, first, layer = call.arrays(q, k, lse), (call.where.q_first, call.where.k_first), layer_of(rule)
    wanted = train_table and call.table is not None
    dtable = table_gradient(q, k, v, out, lse, do, dlse, call, arrays) if wanted else None
    hopper = hopper_for(q)
    # a rule that is dear to ask is better served by smaller blocks, of which more are full
    if hopper and not any(hasattr(leaf.module, "LINKS") for leaf in rule.leaves()):
        size = 64, 2 * 64 if D == 128 else 64
        work = lists("key in order", q, k, call, size)
        # where ptxas crashes (hopper.first_that_compiles) the plain kernels must do
        with contextlib.suppress(PTXASError):
            part = hopper.run_backward(
                q, k, v, out, lse, do, dlse, dq, dk, dv, work.arrays, work.slots, arrays, first, layer, call.scale, call.options(q, k)
            )
            add_parts(part, work, dk, dv, size[1])
            return dq, dk, dv, dtable
    _, shape_q, shape_k = shapes(D, q.dtype)
    DP, delta = width_of(q), torch.empty_like(lse)
    delta_kernel[(triton.cdiv(n, 64), B * H)](
        out, do, lse if dlse is None else dlse, delta, n, *out.stride()[:3], *do.stride()[:3], H, D, DP, 64, dlse is not None
    )
    same = n, n_keys, *first, layer, call.scale * LOG2E, call.scale
    work = lists("key", q, k, call, shape_k[:2])
    who, item, lo, hi, slot, entries = work.arrays
    wide = item.shape[1]
    part = q.new_empty(work.slots, B * K, 2, shape_k.keys, DP, dtype=torch.float32) if work.slots else None
    dkv_kernel[(B * K * wide,)](
        described(q, shape_k.queries), described(k, shape_k.keys), described(v, shape_k.keys), described(do, shape_k.queries),
        described(dk, shape_k.keys), described(dv, shape_k.keys), delta if part is None else part, lse, delta, *arrays,
        who, item, lo, hi, slot, entries, B * K, wide, *same, **call.options(q, k), **call.sizes(q, k, shape_k),
    )  # fmt: skip
    add_parts(part, work, dk, dv, shape_k.keys)
    who, item, lo, hi, _, entries = lists("query", q, k, call, shape_q[:2]).arrays
    wide = item.shape[1]
    dq_kernel[(B * H * wide,)](
        described(q, shape_q.queries), described(k, shape_q.keys), described(v, shape_q.keys), described(do, shape_q.queries),
        described(dq, shape_q.queries), lse, delta, *arrays,
        who, item, lo, hi, entries, B * H, wide, *same, **call.options(q, k), **call.sizes(q, k, shape_q),
    )  # fmt: skip
    return dq, dk, dv, dtable


def table_gradient(q, k, v, out, lse, do, dlse, call, arrays):
    """The gradient of call.table [H, R]: only blocks with near keys are looked at. What distant keys have is the rest: all dS of a query
    add up to the gradient by its log-sum-exp."""
    (B, H, n, D), R = q.shape, call.reach()
    near = lse.new_zeros(H, R - 1)
    if R > 1:
        shape = table_shape(D, q.dtype)
        who, item, lo, hi, _, entries = lists("near", q, k, call, shape[:2]).arrays
        wide, m = item.shape[1], triton.cdiv(n, shape.queries)
        scattered = call.where.q_at is not None
        to = near if scattered else lse.new_zeros(B, H, m, R - 1)
        tile = lambda x, rows: described(ready(x), rows)
        dtable_kernel[(B * H * wide,)](
            tile(q, shape.queries), tile(k, shape.keys), tile(v, shape.keys), tile(out, shape.queries), tile(do, shape.queries),
            lse, lse if dlse is None else dlse, to, *arrays, who, item, lo, hi, entries, B * H, wide, n, k.shape[2],
            call.where.q_first, call.where.k_first, layer_of(rule_of(call.rule)), call.scale * LOG2E, m,
            **call.options(q, k), **call.sizes(q, k, shape), WITH_LSE=dlse is not None,
        )  # fmt: skip
        near = near if scattered else to.sum((0, 2))
    all_of_it = near.new_zeros(H) if dlse is None else torch.where(lse > 1e29, 0, dlse).sum((0, 2)) * LOG2E
    return torch.cat([near, (all_of_it - near.sum(1))[:, None]], 1).to(call.table.dtype)


def add_parts(part, work, dk, dv, keys):
    """Sums the parts of cut blocks of keys into dk and dv."""
    if part is None:
        return
    (B, K), m = dk.shape[:2], work.cut.shape[2]
    add_parts_kernel[(m, B * K)](
        part, work.who, *work.cut, described(dk, keys), described(dv, keys), m, K, width_of(dk), keys, num_warps=8
    )  # fmt: skip


def width_of(x):
    """The head width as the kernels have it: a power of two, at least 16."""
    return width_for(x.shape[3])


def width_for(n):
    """The least power of two from n on, at least 16."""
    return 1 << max(n - 1, 15).bit_length()


def layer_of(rule):
    """The layer's index, where a rule reads it."""
    return getattr(rule.options, "layer", 0)


# ---------------------------------------------------------------- for autograd


def called(rule, q_first, k_first, q_at, k_at, begin, always, opening, scale, slope, table):
    """A Call of what stands behind q, k, v."""
    return Call(rule, Where(q_first, k_first, q_at, k_at, begin), always, opening, scale, slope, table)


def save(ctx, inputs, output):
    q, k, v, rule, q_first, k_first, q_at, k_at, begin, always, opening, scale, slope, table = inputs
    ctx.save_for_backward(q, k, v, *output, q_at, k_at, begin, slope, table)
    ctx.rest = (rule, q_first, k_first), (always, opening, scale)
    ctx.set_materialize_grads(False)


def gradients(ctx, do, dlse, run):
    """By run, which is flash_backward or is called as it is."""
    q, k, v, out, lse, q_at, k_at, begin, slope, table = ctx.saved_tensors
    first, last = ctx.rest
    do = torch.zeros_like(out) if do is None else do
    train_table = table is not None and ctx.needs_input_grad[-1]
    *grads, dtable = run(q, k, v, out, lse, do, dlse, *first, q_at, k_at, begin, *last, slope, table, train_table)
    return *grads, *[None] * 10, dtable if train_table else None


class Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, *rest):
        found = run_forward(q, k, v, called(*rest))
        save(ctx, (q, k, v, *rest), found)
        return found

    @staticmethod
    def backward(ctx, do, dlse):
        run = lambda *given: run_backward(*given[:7], called(*given[7:-1]), given[-1])
        return gradients(ctx, do, dlse, run)


# for compilers: one node of a graph, whose way through torch's dispatcher takes a host longer than a short segment takes the device


@torch.library.custom_op("nanolong::flash", mutates_args=())
def flash(
    q: Tensor, k: Tensor, v: Tensor, rule: str, q_first: int, k_first: int, q_at: Maybe, k_at: Maybe, begin: Maybe,
    always: int, opening: int, scale: float, slope: Maybe, table: Maybe,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return run_forward(q, k, v, called(rule, q_first, k_first, q_at, k_at, begin, always, opening, scale, slope, table))


@flash.register_fake
def _(q, k, v, *_):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("nanolong::flash_backward", mutates_args=())
def flash_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, do: Tensor, dlse: Maybe, rule: str, q_first: int, k_first: int, q_at: Maybe,
    k_at: Maybe, begin: Maybe, always: int, opening: int, scale: float, slope: Maybe, table: Maybe, train_table: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    call = called(rule, q_first, k_first, q_at, k_at, begin, always, opening, scale, slope, table)
    *grads, dtable = run_backward(q, k, v, out, lse, do, dlse, call, train_table)
    return *grads, lse.new_empty(0) if dtable is None else dtable


@flash_backward.register_fake
def _(q, k, v, *rest):
    *_, table, train_table = rest
    return *map(torch.empty_like, (q, k, v)), torch.empty_like(table) if train_table else q.new_empty(0, dtype=torch.float32)


flash.register_autograd(lambda ctx, do, dlse: gradients(ctx, do, dlse, flash_backward), setup_context=save)


def attend(q, k, v, q_at, k_at, rule, begin=None, always=0, opening=0, scale=None, bias=None, lse=False):
    """See kernels.attend: the tensors on CUDA, their head width a multiple of 8 up to 256."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    known = q_at.first is not None and k_at.first is not None
    where = (q_at.first, k_at.first, None, None) if known else (0, 0, q_at.at, k_at.at)
    slope, table = (None, None) if bias is None else bias
    run = flash if ops.tracing() else Flash.apply
    y, sums = run(q, k, v, named(rule), *where, begin, always, opening, scale, slope, table)
    return (y, torch.where(sums > 1e29, -torch.inf, sums / LOG2E)) if lse else y
