"""product() in Triton: a program takes some rows of a matrix and goes along them, several loads of 16 bytes a thread on their way at once.

On Hopper GPUs a kernel may begin while the one before still runs (programmatic dependent launch): here the first weights are fetched
then, for nobody writes them; all else is read and written after the wait. As every kernel of a chain waits for the whole one before,
nothing is overtaken. A kernel that begins early takes room on the processors from the one before, so attention (slots_triton.py) does not.
"""

import functools
import os

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def columns(P, c, left: tl.constexpr, BK: tl.constexpr):
    """What the pointers P to columns c point at, those from `left` on being 0."""
    if left < BK:
        return tl.load(P, mask=c < left, other=0.0)
    else:
        return tl.load(P)


@triton.jit
def product_kernel(
    X, W0, W1, W2, GAIN, RESIDUAL, Y, eps,
    N0: tl.constexpr, N1: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, GATED: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """BN rows of [W0; W1; W2], N0 and N1 rows being in the first two; GATED: of W0, and of W1 the same."""
    first = tl.program_id(0) * BN
    W = W0
    r = first
    if PARTS > 1 and not GATED:
        if first >= N0:
            W = W1
            r = first - N0
    if PARTS > 2:
        if first >= N0 + N1:
            W = W2
            r = first - N0 - N1
    c = tl.arange(0, BK)[None, :]
    # large numbers in the pointers alone
    here = tl.arange(0, BN)[:, None] * C + c
    W += r.to(tl.int64) * C
    W += here
    w = columns(W, c, C, BK)
    if GATED:
        U = W1 + r.to(tl.int64) * C
        U += here
        u = columns(U, c, C, BK)
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    a = tl.zeros([BN, BK], tl.float32)
    b = tl.zeros([BN, BK], tl.float32)
    square = tl.zeros([1, BK], tl.float32)
    for k in tl.static_range(0, C, BK):
        if k > 0:
            w = columns(W + k, c, C - k, BK)
            if GATED:
                u = columns(U + k, c, C - k, BK)
        x = columns(X + k + c, c, C - k, BK).to(tl.float32)
        if GAIN is not None:
            square += x * x
            x *= columns(GAIN + k + c, c, C - k, BK).to(tl.float32)
        a += w.to(tl.float32) * x
        if GATED:
            b += u.to(tl.float32) * x
    y = tl.sum(a, 1)
    up = tl.sum(b, 1)
    if GAIN is not None:
        norm = 1 / tl.sqrt(tl.sum(square) / C + eps)
        y *= norm
        up *= norm
    if GATED:
        y = y / (1 + tl.exp(-y)) * up
    to = first + tl.arange(0, BN)
    if RESIDUAL is not None:
        y += tl.load(RESIDUAL + to).to(tl.float32)
    tl.store(Y + to, y.to(Y.dtype.element_ty))


def tile(rows, C):
    """Rows and columns of a block, and warps: measured on an H100 with 16-bit weights. rows: those of each matrix."""
    wide = min(2048, triton.next_power_of_2(C))
    n, wide, warps = (8, min(wide, 1024), 4) if len(rows) == 3 else (2, wide, 4) if 2 * rows[0] < C else (4, wide, 8)
    while any(r % n for r in rows):
        n //= 2
    return n, wide, warps


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def early(device):
    """Can kernels begin early there?"""
    return not INTERPRETED and torch.cuda.get_device_capability(device)[0] >= 9


def can(x):
    """Is x where the kernel runs, and does it need no gradient?"""
    return (x.is_cuda or INTERPRETED) and not torch.is_grad_enabled()


def product(x, weights, gain=None, eps=0.0, residual=None, gated=False, dtype=None):
    """See kernels.rows.plain. Arrays lie in one piece each."""
    rows, C, pdl = [w.shape[0] for w in weights], x.shape[0], early(x.device)
    n = rows[0] if gated else sum(rows)
    y = x.new_empty(n, dtype=dtype or x.dtype)
    BN, BK, warps = tile(rows, C)
    w = [*weights, *weights[:1] * (3 - len(weights))]
    more = {"launch_pdl": True} if pdl else {}
    product_kernel[(n // BN,)](
        x, *w, gain, residual, y, eps, rows[0], rows[1] if len(rows) > 1 else 0, C, len(rows), gated, BN, BK, pdl, num_warps=warps, **more
    )
    return y
