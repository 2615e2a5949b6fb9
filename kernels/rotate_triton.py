"""rotate() in Triton: each number is read and written once, and reckoned in float32. The gradient is the rotation back."""

import os

import torch
import triton
import triton.language as tl


@triton.jit
def rotate_kernel(
    X, Y, COS, SIN, n, xb, xh, xn, yb, yh, yn, cb, ch, cn, direction,
    H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, PP: tl.constexpr, RP: tl.constexpr, ROWS: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one batch row, all heads. PP, RP: powers of two that hold P pairs and the D - 2P channels that stay; EACH: heads
    have angles of their own."""
    b = tl.program_id(1).to(tl.int64)
    r = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    p = tl.arange(0, PP)[None, :]
    inside = (r < n) & (p < P)
    at = b * cb + r * cn + p
    cos = tl.load(COS + at, mask=inside, other=0.0)
    sin = tl.load(SIN + at, mask=inside, other=0.0) * direction
    for h in tl.range(H):
        if EACH:
            cos = tl.load(COS + at + h * ch, mask=inside, other=0.0)
            sin = tl.load(SIN + at + h * ch, mask=inside, other=0.0) * direction
        x = X + b * xb + h * xh + r * xn
        y = Y + b * yb + h * yh + r * yn
        first = tl.load(x + p, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(x + P + p, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + p, first * cos - second * sin, mask=inside)
        tl.store(y + P + p, second * cos + first * sin, mask=inside)
        if D > 2 * P:
            rest = 2 * P + tl.arange(0, RP)[None, :]
            tl.store(y + rest, tl.load(x + rest, mask=(r < n) & (rest < D)), mask=(r < n) & (rest < D))


def can(x):
    """Is x where the kernel runs?"""
    return x.is_cuda or INTERPRETED


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def turned(x, cos, sin, direction):
    (B, H, n, D), P = x.shape, cos.shape[-1]
    x = x if x.stride(3) == 1 else x.contiguous()
    y = torch.empty_like(x)
    stride = [s if size > 1 else 0 for s, size in zip(cos.stride(), cos.shape)]
    rows = max(1, 1024 // triton.next_power_of_2(P))
    rotate_kernel[(triton.cdiv(n, rows), B)](
        x, y, cos, sin, n, *x.stride()[:3], *y.stride()[:3], *stride[:3], direction,
        H, D, P, triton.next_power_of_2(P), triton.next_power_of_2(max(1, D - 2 * P)), rows, stride[1] > 0,
    )  # fmt: skip
    return y


class Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turned(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx, dy):
        return turned(dy, *ctx.saved_tensors, -1.0), None, None


def rotate(x, cos, sin):
    """See kernels.rotate.rotate."""
    return Rotate.apply(x, cos.contiguous(), sin.contiguous())
