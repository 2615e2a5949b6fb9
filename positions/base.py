"""What a position scheme can do: turn queries and keys by their positions, and scale the logits."""

import math

import ops
from ops import Module


class Position(Module):
    """How distance is felt; one instance serves every layer that names it. c: Config; o: the scheme's Options.

    This base feels nothing: it is `none`, and each scheme overrides what it needs.
    """

    temperature = 1.0  # multiplies the logits, never the rotation: stored keys must stay free to turn again

    def __init__(self, c, o):
        super().__init__()
        self.c, self.o = c, o

    def turn(self, pos):
        """Whatever the layers need of these positions ([B, n] or [B, K, n] integers), computed once a call."""
        return None

    def turned(self, x, turn):
        """x [B, H, T, D], queries or keys, as seen from their positions."""
        return x


class Rotary(Position):
    """RoPE (Su et al. 2021, arXiv:2104.09864) in HF's half-split layout: pair i is (x_i, x_{i + D/2}), turned by pos * f_i."""

    def frequencies(self):
        """f_i in radians a token, one for each of the D/2 pairs."""
        raise NotImplementedError

    def __init__(self, c, o):
        super().__init__(c, o)
        if c.head_dim % 2:
            raise ValueError(f"rotary positions turn pairs, and head_dim={c.head_dim} is odd: use an even head_dim or --pos none")
        # whole turns of 2^32: integer position * integer frequency is exact at any distance, where float32 angles are not
        self.per_turn = tuple(round(f / (2 * math.pi) * 2**32) for f in self.frequencies())

    def turn(self, pos):
        """cos, sin [..., n, D/2] in float32."""
        angle = ops.angles(pos, self.per_turn)
        return ops.cos(angle), ops.sin(angle)

    def turned(self, x, turn):
        cos, sin = (ops.cast(t, x.dtype) for t in turn)
        a, b = ops.split(x, 2, -1)
        return ops.cat([a * cos - b * sin, b * cos + a * sin], -1)
