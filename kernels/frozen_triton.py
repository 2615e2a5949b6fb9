"""What stands between the frozen products of a block, in Triton: norms and the gate, a row a program, reckoned in float32. Their backward
passes read what their forward passes read, and leave in the gradient's place what those gave, so that nobody has to keep it."""

import os

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def norm_kernel(X, GAIN, Y, R, wide, eps, C: tl.constexpr, CP: tl.constexpr):
    """Y = X R GAIN, R = 1 / sqrt(mean(X^2) + eps). wide: what a row of Y takes; CP: a power of two that holds C."""
    i = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CP)
    inside = c < C
    x = tl.load(X + i * C + c, mask=inside, other=0.0).to(tl.float32)
    r = 1 / tl.sqrt(tl.sum(x * x, 0) / C + eps)
    tl.store(R + i, r)
    tl.store(Y + i * wide + c, x * r * tl.load(GAIN + c, mask=inside, other=0.0).to(tl.float32), mask=inside)


@triton.jit
def norm_back_kernel(X, GAIN, R, DY, BESIDE, DX, wide, C: tl.constexpr, CP: tl.constexpr):
    """DX = BESIDE + the gradient that comes through the norm from DY, which becomes the norm's output Y."""
    i = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CP)
    inside = c < C
    r = tl.load(R + i)
    gain = tl.load(GAIN + c, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(X + i * C + c, mask=inside, other=0.0).to(tl.float32) * r
    g = tl.load(DY + i * wide + c, mask=inside, other=0.0).to(tl.float32) * gain
    beside = tl.load(BESIDE + i * C + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(DX + i * C + c, beside + r * (g - x * (tl.sum(g * x, 0) / C)), mask=inside)
    tl.store(DY + i * wide + c, x * gain, mask=inside)


@triton.jit
def gate_kernel(GU, H, wide, F: tl.constexpr, FB: tl.constexpr, BACK: tl.constexpr):
    """H = silu(G) U, [G, U] being a row of GU. BACK: H holds its gradient and becomes H, and [G, U] become their gradients."""
    i = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * FB + tl.arange(0, FB)
    inside = c < F
    at = GU + i * 2 * F + c
    to = H + i * wide + c
    g = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(at + F, mask=inside, other=0.0).to(tl.float32)
    z = tl.sigmoid(g)
    if BACK:
        d = tl.load(to, mask=inside, other=0.0).to(tl.float32)
        tl.store(at, d * u * z * (1 + g * (1 - z)), mask=inside)
        tl.store(at + F, d * g * z, mask=inside)
    tl.store(to, g * z * u, mask=inside)


@triton.jit
def loss_kernel(Z, TARGET, LOSS, V: tl.constexpr, VB: tl.constexpr):
    """LOSS of a row of logits in nats, 0 where the target is negative; the logits become its gradient."""
    i = tl.program_id(0).to(tl.int64)
    t = tl.load(TARGET + i)
    there = t >= 0
    # read before anything is written
    own = tl.load(Z + i * V + tl.maximum(t, 0)).to(tl.float32)
    m = -1e30
    l = 0.0
    for v in range(0, V, VB):
        c = v + tl.arange(0, VB)
        z = tl.load(Z + i * V + c, mask=c < V, other=-1e30).to(tl.float32)
        new = tl.maximum(m, tl.max(z, 0))
        l = l * tl.exp(m - new) + tl.sum(tl.exp(z - new), 0)
        m = new
    tl.debug_barrier()
    tl.store(LOSS + i, tl.where(there, tl.log(l) + m - own, 0.0))
    for v in range(0, V, VB):
        c = v + tl.arange(0, VB)
        z = tl.load(Z + i * V + c, mask=c < V, other=-1e30).to(tl.float32)
        tl.store(Z + i * V + c, tl.where(there, tl.exp(z - m) / l - tl.where(c == t, 1.0, 0.0), 0.0), mask=c < V)


@triton.jit
def dequantise_kernel(
    CODE, SCALE, LOW, B, OUT, s, wide, at, rank, beside,
    N: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, WB: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """A row of OUT: N numbers of codes, 32 / BITS of them in a word, and beside them a row of s B from column `at` on, zeros around it."""
    i = tl.program_id(0).to(tl.int64)
    each: tl.constexpr = 32 // BITS
    w = tl.program_id(1) * WB + tl.arange(0, WB)
    inside = w < N // each
    word = tl.load(CODE + i * (N // each) + w, mask=inside, other=0)
    g = i * (N // GROUP) + w * each // GROUP
    scale = tl.load(SCALE + g, mask=inside, other=0.0).to(tl.float32)
    low = tl.load(LOW + g, mask=inside, other=0.0).to(tl.float32)
    part = tl.arange(0, each)[None, :]
    # whatever the sign brings in from the left is cut off
    q = (word[:, None] >> (part * BITS)) & ((1 << BITS) - 1)
    x = q.to(tl.float32) * scale[:, None] + low[:, None]
    tl.store(OUT + i * wide + w[:, None] * each + part, x, mask=inside[:, None])
    if tl.program_id(1) == 0:
        c = tl.arange(0, BP)
        b = tl.load(B + i * rank + c - at, mask=(c >= at) & (c < at + rank), other=0.0).to(tl.float32)
        tl.store(OUT + i * wide + N + c, b * s, mask=c < beside)


@triton.jit
def rows_kernel(W, ROW, Y, C: tl.constexpr, CP: tl.constexpr):
    """Y = W[ROW]. W may lie in the host's memory, page-locked: then a row comes from there as it is read."""
    i = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CP)
    row = tl.load(ROW + i).to(tl.int64)
    tl.store(Y + i * C + c, tl.load(W + row * C + c, mask=c < C, other=0.0), mask=c < C)


def can(x):
    """Is x where the kernels run?"""
    return x.is_cuda or INTERPRETED


def dequantise(w, out, b=None, s=1.0, at=0):
    """Write a kernels.coded.Coded [n_out, n_in] into the first columns of rows `out`; of the others s b [n_out, rank] becomes the part
    from the one numbered `at` on, and the rest zero."""
    (n, n_in), wide = w.shape, out.stride(0)
    beside, words = out.shape[1] - n_in, n_in * w.bits // 32
    block = min(512, triton.next_power_of_2(words))
    dequantise_kernel[(n, triton.cdiv(words, block))](
        w.code.view(torch.int32), w.scale, w.low, w.scale if b is None else b, out,
        s, wide, at, 0 if b is None else b.shape[1], beside,
        n_in, w.group, w.bits, block, triton.next_power_of_2(max(1, beside)),
    )  # fmt: skip
    return out


def rows(w, i):
    """Rows of w [n, C] by their numbers i [...] -> [..., C], where i is."""
    y = torch.empty(*i.shape, w.shape[1], dtype=w.dtype, device=i.device)
    rows_kernel[(i.numel(),)](w, i.contiguous(), y, w.shape[1], triton.next_power_of_2(w.shape[1]))
    return y


def norm(x, gain, eps, beside=0):
    """x [n, C] -> the norm's output with so many columns of room beside it, [n, C + beside], and R [n] float32."""
    n, C = x.shape
    y, r = x.new_empty(n, C + beside), x.new_empty(n, dtype=torch.float32)
    norm_kernel[(n,)](x, gain, y, r, C + beside, eps, C, triton.next_power_of_2(C), num_warps=8)
    return y, r


def norm_back(x, gain, r, dy, beside):
    """The gradient of x [n, C]: beside + what comes through the norm from the first C columns of dy, which become the norm's output."""
    (n, C), dx = x.shape, torch.empty_like(x)
    norm_back_kernel[(n,)](x, gain, r, dy, beside, dx, dy.stride(0), C, triton.next_power_of_2(C), num_warps=8)
    return dx


def gate(gu, beside):
    """silu(g) u [n, F + beside] of gu [n, 2 F]."""
    n, F = gu.shape[0], gu.shape[1] // 2
    h = gu.new_empty(n, F + beside)
    gate_kernel[(n, triton.cdiv(F, 1024))](gu, h, F + beside, F, 1024, False)
    return h


def gate_back(gu, dh):
    """The first F columns of dh become silu(g) u, and gu becomes its own gradient."""
    n, F = gu.shape[0], gu.shape[1] // 2
    gate_kernel[(n, triton.cdiv(F, 1024))](gu, dh, dh.stride(0), F, 1024, True)


def loss(z, targets):
    """Loss [n] float32 of logits z [n, V], which become its gradient."""
    (n, V), out = z.shape, z.new_empty(len(z), dtype=torch.float32)
    loss_kernel[(n,)](z, targets, out, V, min(8192, triton.next_power_of_2(V)), num_warps=16)
    return out
