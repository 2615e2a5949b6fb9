"""rotate(): pairs of channels turned by angles, plainly on every backend, in one pass over memory on CUDA."""

import ops
from kernels import ENGINE, TRITON

MLX = ops.BACKEND == "mlx"
if TRITON:
    from kernels import rotate_triton
if MLX:
    from kernels import rotate_mlx


def circle(pos, per_turn):
    """cos and sin [1 or B, 1 or H, n, P], float32, of the angles at positions [1 or B, 1 or H, n], at frequencies in 2^-32 turns."""
    angle = ops.angles(pos, per_turn)
    return ops.cos(angle), ops.sin(angle)


def prepared(at, per_turn):
    """circle() of Places, or what rotate() takes in its place where a kernel wants something else of one position alone."""
    if MLX and ENGINE == "auto" and rotate_mlx.can(at.at):
        return rotate_mlx.prepared(at, per_turn)
    return circle(at.at, per_turn)


def rotate(x, *turn):
    """x [B, H, n, D], its first 2P channels turned pair by pair: pair i is (x_i, x_{i + P}); the others stay. turn: as prepared() gives
    it, or any cos and sin [1 or B, 1 or H, n, P] float32; without gradients."""
    if len(turn) == 1:
        return rotate_mlx.rotate(x, *turn)
    # few rows are for a compiler to fuse with what is around them
    if TRITON and ENGINE in ("auto", "triton") and x.shape[2] >= FEW and not ops.tracing() and rotate_triton.can(x):
        return rotate_triton.rotate(x, *turn)
    return plain(x, *turn)


FEW = 16


def plain(x, cos, sin):
    """The specification."""
    P = cos.shape[-1]
    cos, sin = ops.cast(cos, x.dtype), ops.cast(sin, x.dtype)
    a, b, rest = x[..., :P], x[..., P : 2 * P], x[..., 2 * P :]
    return ops.cat([a * cos - b * sin, b * cos + a * sin, *([rest] if rest.shape[-1] else [])], -1)
