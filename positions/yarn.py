"""YaRN (Peng et al. 2023, arXiv:2309.00071; HF's rope type `yarn`): NTK by parts, and sharper attention.

Pairs that turn more than beta_fast times within L tokens are kept, those that turn less than beta_slow times are interpolated, and
in between a ramp over the pair's index mixes the two (section 3.2). Logits are multiplied by m^2, m = 0.1 ln s + 1 (eq. 22).
"""

import math

from positions.rope import Position as Rope


class Options:
    factor: float = 4.0  # s, how many times longer
    original: int = 0  # L, tokens before scaling (HF original_max_position_embeddings); 0: the config's max_position_embeddings
    beta_fast: float = 32.0  # turns within L above which a pair is kept
    beta_slow: float = 1.0  # turns within L below which a pair is interpolated
    attention_factor: float = 0.0  # m: HF scales cos and sin by it, so logits by its square; 0: 0.1 ln s + 1
    truncate: bool = True  # round the ends of the ramp to whole pairs


def check(o):
    if o.factor < 1:
        raise ValueError(f"factor={o.factor} would shorten the context: it must be at least 1")
    if o.original < 0:
        raise ValueError(f"original={o.original}: it must be at least 1, or 0 for the config's max_position_embeddings")
    if not 0 < o.beta_slow < o.beta_fast:
        raise ValueError(f"beta_slow={o.beta_slow}, beta_fast={o.beta_fast}: beta_slow must be above 0 and below beta_fast")
    if o.attention_factor < 0:
        raise ValueError(f"attention_factor={o.attention_factor}: it must be above 0, or 0 for 0.1 ln factor + 1")


def sharpness(factor, scale=1.0):
    """m of eq. 22; scale: HF's mscale."""
    return 0.1 * scale * math.log(factor) + 1


class Position(Rope):
    def __init__(self, c, o):
        super().__init__(c, o)
        self.temperature = (o.attention_factor or sharpness(o.factor)) ** 2

    def frequencies(self):
        o, D, theta = self.o, self.D, self.c.rope_theta
        if theta <= 1:
            raise ValueError(f"rope_theta={theta} turns all pairs alike, so there are no parts: it must be above 1")
        L = o.original or self.c.max_position_embeddings
        # the pair, as a fraction of an index, that turns so many times within L
        low, high = (D * math.log(L / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (o.beta_fast, o.beta_slow))
        if o.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, D - 1)
        high += 0.001 * (low == high)
        ramp = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(D // 2)]
        return [f / o.factor * r + f * (1 - r) for f, r in zip(super().frequencies(), ramp)]
