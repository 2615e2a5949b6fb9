"""NTK-aware scaling (bloc97 2023, r/LocalLLaMA; analysed in YaRN, arXiv:2309.00071, section 3.1): another base and nothing else.

theta' = theta * s^(D / (D - 2)): the slowest pair is slowed s times, as in position interpolation, and the fastest not at all.
"""

from positions.rope import Position as Rope


class Options:
    factor: float = 4.0  # s, how many times longer than trained


def check(o):
    if o.factor < 1:
        raise ValueError(f"factor={o.factor} would shorten the context: it must be at least 1")


def base(theta, factor, D):
    """theta' for heads of width D."""
    return theta * factor ** (D / (D - 2))


class Position(Rope):
    def frequencies(self):
        D = self.D
        if D == 2:
            raise ValueError("a single pair turns, which no other base can slow: use --pos pi")
        theta = base(self.c.rope_theta, self.o.factor, D)
        return [theta ** (-2 * i / D) for i in range(D // 2)]
