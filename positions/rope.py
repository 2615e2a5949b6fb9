"""RoPE (Su et al. 2021, arXiv:2104.09864): f_i = theta^(-2i/D), theta from the model's config."""

from positions.base import Rotary


class Position(Rotary):
    def frequencies(self):
        D = self.c.head_dim
        return [self.c.rope_theta ** (-2 * i / D) for i in range(D // 2)]
