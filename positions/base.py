"""What a position scheme can do: turn queries and keys by their positions, scale the logits, and add to them by distance."""

import math

from kernels import Places
from kernels.rotate import circle, prepared, rotate
from ops import Module


def whole_turns(frequencies):
    """Radians a token as integers in 2^-32 turns a token: integer position * integer frequency is exact at any distance, where float32
    angles are not."""
    return tuple(round(float(f) / (2 * math.pi) * 2**32) for f in frequencies)


class Position(Module):
    """How distance is felt. c: Config; o: the scheme's Options. One instance serves every layer that names it; a file whose function
    per_layer(o) says so gets one for each layer.

    This base feels nothing: it is `none`, and each scheme overrides what it needs.
    """

    temperature = 1.0  # multiplies the logits, never the rotation: stored keys must stay free to turn again
    by_head = False  # do queries() have weights of each head?
    moves = True  # is all that turn() gives made of positions as data, and nothing of what the host knows of them?
    late = True  # keys are remembered as they are, and made ready each time they are seen; False: once, when they are remembered

    def __init__(self, c, o):
        super().__init__()
        self.c, self.o = c, o

    @property
    def felt(self):
        """Instances for which this is equal share what turn() gives."""
        return type(self), self.o

    def turn(self, at, begin=None):
        """Whatever the layers need of these positions, computed once a call. at: Places [B, 1, n]; begin [B, 1, n]: the first
        position of each token's document, None: 0."""
        return None

    def again(self, pos, turn):
        """The same for other positions [B, 1 or K, n] at the same moment; turn: what turn() gave for this call."""
        return self.turn(Places(pos))

    def turned(self, x, turn):
        """x [B, H, T, D], queries or keys, as seen from their positions: what a scheme does to both alike."""
        return x

    def queries(self, q, turn):
        """Queries [B, H, T, D] as attend() takes them, which may be wider than D if keys are."""
        return self.turned(q, turn)

    def keys(self, k, turn):
        """Keys [B, K, n, D] as attend() takes them."""
        return self.turned(k, turn)

    def bias(self):
        """What is added to the logits by distance, a kernels.Bias for all query heads; None: nothing."""
        return None

    def initial(self, name):
        """The array that the parameter of this name begins with; None: random, as any other."""


class Rotary(Position):
    """RoPE (Su et al. 2021, arXiv:2104.09864) in HF's half-split layout: pair i is (x_i, x_{i + D/2}), turned by pos * f_i.

    D is the part of a head that turns, its first channels: all of it, or partial_rotary_factor of it (GPT-J, GPT-NeoX); what is left
    feels no positions.
    """

    late = False

    def frequencies(self):
        """f_i in radians a token, one for each of the D/2 pairs."""
        raise NotImplementedError

    def __init__(self, c, o):
        super().__init__(c, o)
        share = getattr(o, "partial", 0) or c.partial_rotary_factor
        if not 0 < share <= 1:
            raise ValueError(f"partial_rotary_factor={share:g} is no share of a head: it must be above 0 and at most 1")
        self.D = int(c.head_dim * share)
        if self.D % 2 or not self.D:
            what = f"head_dim={c.head_dim}" if share == 1 else f"{share:g} of head_dim={c.head_dim}"
            no = "nothing" if not self.D else "odd"
            raise ValueError(f"rotary positions turn pairs, and {what} is {no}: use an even number of channels or --pos none")
        self.per_turn = whole_turns(self.frequencies())

    def turn(self, at, begin=None):
        """cos, sin [B, 1 or K, n, D/2] in float32, or what else kernels.rotate.prepared says."""
        return prepared(at, self.per_turn)

    def again(self, pos, turn):
        return circle(pos, self.per_turn)

    def turned(self, x, turn):
        return rotate(x, *turn[:2])
