"""rotate() of one position by MLX's own kernel, which is one launch where the plain lines are ten.

It makes its angles itself, position / tokens a radian in float32, which is not exact at any distance. Position 1 at the right number of
tokens a radian is. Where the host knows the position it reckons that number, which is nothing to wait for.
"""

import mlx.core as mx
import numpy as np

import ops


def can(pos):
    """Is there one position alone, and is the kernel more than the plain lines again?"""
    return ops.on_gpu() and pos.size == 1


def prepared(at, per_turn):
    """The Places of one position, frequencies in 2^-32 turns -> all that rotate() needs of them, tokens a radian [P]: infinitely many
    where the angle is 0."""
    if at.first is None or not isinstance(per_turn, tuple):
        return (1 / ops.angles(at.at, per_turn).reshape(-1),)
    # as ops.angles() does it
    angle = (np.uint32(at.first) * np.array(per_turn, np.uint32)).astype(np.float32) * np.float32(6.283185307179586 / 2**32)
    with np.errstate(divide="ignore"):
        return (mx.array(1 / angle),)


def rotate(x, per_radian):
    """x [B, H, 1, D] as rotate() turns it."""
    return mx.fast.rope(x, 2 * per_radian.size, traditional=False, base=None, scale=1.0, offset=1, freqs=per_radian)
