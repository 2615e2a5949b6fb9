"""ALiBi (Press et al. 2021, arXiv:2108.12409): no embedding; each head's logits fall with distance, at a slope of its own.

    q_i k_j / sqrt(D) - m_h (i - j), m_h = 2^(-8h/H) for heads h = 1..H

For a number of heads that is no power of two, the slopes of the next lower one, then every other slope of the next higher (as in the
authors' code). The slopes are fixed. Attention computes the bias from positions: there is no array of it.
"""

import ops
from kernels import Bias
from positions.base import Position as Base


def slopes(H):
    """m_h of H heads."""
    power = 1 << (H.bit_length() - 1)
    first = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    return first + [2 ** (-4 * h / power) for h in range(1, 2 * (H - power), 2)]


class Position(Base):
    def bias(self):
        return Bias(slope=ops.constant(tuple(slopes(self.c.num_attention_heads))))
