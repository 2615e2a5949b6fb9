"""Position interpolation (Chen et al. 2023, arXiv:2306.15595): positions / factor. HF's rope type `linear`."""

from positions.rope import Position as Rope


class Options:
    factor: float = 4.0  # how many times longer than trained


def check(o):
    if o.factor < 1:
        raise ValueError(f"factor={o.factor} would shorten the context: it must be at least 1")


class Position(Rope):
    def frequencies(self):
        return [f / self.o.factor for f in super().frequencies()]
