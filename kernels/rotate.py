"""rotate(): pairs of channels turned by angles, plainly on every backend, in one pass over memory on CUDA."""

import ops
from kernels import ENGINE, TRITON

if TRITON:
    from kernels import rotate_triton


def rotate(x, cos, sin):
    """x [B, H, n, D], its first 2P channels turned pair by pair: pair i is (x_i, x_{i + P}); the others stay. cos, sin [1 or B, 1 or H,
    n, P] float32, without gradients."""
    # few rows are for a compiler to fuse with what is around them
    if TRITON and ENGINE in ("auto", "triton") and x.shape[2] >= FEW and not ops.tracing() and rotate_triton.can(x):
        return rotate_triton.rotate(x, cos, sin)
    return plain(x, cos, sin)


FEW = 16


def plain(x, cos, sin):
    """The specification."""
    P = cos.shape[-1]
    cos, sin = ops.cast(cos, x.dtype), ops.cast(sin, x.dtype)
    a, b, rest = x[..., :P], x[..., P : 2 * P], x[..., 2 * P :]
    return ops.cat([a * cos - b * sin, b * cos + a * sin, *([rest] if rest.shape[-1] else [])], -1)
