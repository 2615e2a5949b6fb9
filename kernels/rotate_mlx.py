"""rotate() of one position by MLX's own kernel, which is one launch where the plain lines are ten.

It makes its angles itself, position / tokens a radian in float32, which is not exact at any distance. Position 1 at the right number of
tokens a radian is.
"""

import functools

import mlx.core as mx

import ops


def can(pos):
    """Is there one position alone, and is the kernel more than the plain lines again?"""
    return ops.on_gpu() and pos.size == 1


def prepared(at, per_turn):
    """The Places of one position, frequencies in 2^-32 turns -> all that rotate() needs of them, tokens a radian [P]: infinitely many
    where the angle is 0."""
    pos = at.at if at.first is None else mx.array(at.first)
    return (by_position(per_turn)(pos.reshape(1)),)


@functools.cache
def by_position(per_turn):
    """The same as a function of a position [1], which is one launch too."""
    return mx.compile(lambda pos: (1 / ops.angles(pos, per_turn)).reshape(-1))


def rotate(x, per_radian):
    """x [B, H, 1, D] as rotate() turns it."""
    return mx.fast.rope(x, 2 * per_radian.size, traditional=False, base=None, scale=1.0, offset=1, freqs=per_radian)
