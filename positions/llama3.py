"""Llama 3.1's scaling (Llama team 2024, arXiv:2407.21783; HF's rope type `llama3`): long wavelengths are interpolated, short
ones kept, and between L/low and L/high the two are mixed, L being the length before scaling."""

import math

from positions.rope import Position as Rope


class Options:
    factor: float = 8.0  # how many times longer
    low: float = 1.0  # wavelengths above L/low are divided by factor (HF low_freq_factor)
    high: float = 4.0  # wavelengths below L/high are kept (HF high_freq_factor)
    original: int = 8192  # L, tokens (HF original_max_position_embeddings)


def check(o):
    if o.factor < 1:
        raise ValueError(f"factor={o.factor} would shorten the context: it must be at least 1")
    if not 0 < o.low < o.high:
        raise ValueError(f"low={o.low}, high={o.high}: low must be above 0 and below high")


class Position(Rope):
    def frequencies(self):
        o, out = self.o, []
        for f in super().frequencies():
            smooth = (o.original * f / (2 * math.pi) - o.low) / (o.high - o.low)
            keep = min(max(smooth, 0.0), 1.0)
            out.append(keep * f + (1 - keep) * f / o.factor)
        return out
