"""Dynamic NTK scaling (emozilla 2023, r/LocalLLaMA; YaRN, arXiv:2309.00071, section 3.3; HF's rope type `dynamic`): ntk.py with a
base that follows the length l of the text so far. Up to the L tokens that the model was trained with it is plain RoPE.

    theta' = theta * (s * l / L - (s - 1))^(D / (D - 2)), l = max(length, L)

The base moves, so keys are remembered unturned and turned each time they are seen, all by the base of the moment: a cached key never
goes stale. What the layers above made of an older base does stay, so past L a text read in pieces differs from one that is read at
once, as in any implementation. The length is that of the row's longest document.
"""

import numpy as np

import ops
from kernels.rotate import circle
from positions.base import whole_turns
from positions.rope import Position as Rope


class Options:
    factor: float = 2.0  # s
    original: int = 0  # L, tokens before scaling; 0: the config's max_position_embeddings


def check(o):
    if o.factor < 1:
        raise ValueError(f"factor={o.factor} would shorten the context: it must be at least 1")
    if o.original < 0:
        raise ValueError(f"original={o.original}: it must be at least 1, or 0 for the config's max_position_embeddings")


class Position(Rope):
    late, moves = True, False

    def __init__(self, c, o):
        super().__init__(c, o)
        if self.D == 2:
            raise ValueError("a single pair turns, which no other base can slow: use --pos pi")

    @property
    def original(self):
        return self.o.original or self.c.max_position_embeddings

    def slower(self, length):
        """theta' / theta to the power of (D - 2) / D, for a number or an array."""
        return 1 + self.o.factor * (length - self.original) / self.original

    def frequencies(self, length=0):
        i = np.arange(self.D // 2)
        return super().frequencies() * self.slower(max(length, self.original)) ** (-2 * i / max(self.D - 2, 1))

    def turn(self, at, begin=None):
        """cos, sin, and the frequencies [pairs] or [B, 1, 1, pairs] in 2^-32 turns a token."""
        if at.first is not None and begin is None:
            per_turn = ops.array(np.array(whole_turns(self.frequencies(at.first + at.at.shape[2])), "int32"))
        else:
            length = ops.amax(at.at - (0 if begin is None else begin), 2)[..., None] + 1  # [B, 1, 1, 1]
            length = ops.where(length < self.original, self.original, length)
            power = ops.constant(tuple(-2 * i / (self.D - 2) for i in range(self.D // 2)))
            slowed = self.slower(ops.cast(length, ops.float32)) ** power
            per_turn = ops.cast(slowed * ops.constant(tuple(map(float, self.per_turn))) + 0.5, ops.int32)
        return *circle(at.at, per_turn), per_turn

    def again(self, pos, turn):
        return *circle(pos, turn[2]), turn[2]
