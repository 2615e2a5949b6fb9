"""RoPE (Su et al. 2021, arXiv:2104.09864): f_i = theta^(-2i/D), theta from the model's config."""

from positions.base import Rotary


class Options:
    partial: float = 0.0  # the share of each head that turns; 0: the config's partial_rotary_factor, which is 1 where it says nothing


def check(o):
    if not 0 <= o.partial <= 1:
        raise ValueError(f"partial={o.partial}: it must be above 0 and at most 1, or 0 for the config's")


class Position(Rotary):
    def frequencies(self):
        return [self.c.rope_theta ** (-2 * i / self.D) for i in range(self.D // 2)]
