"""LongRoPE (Ding et al. 2024, arXiv:2402.13753; HF's rope type `longrope`): each pair slowed by a factor found by search.

The factors stand in the config's rope fields: `long_factor` for a model whose max_position_embeddings exceeds its original
length L, `short_factor` for any other. transformers looks at each text instead, and takes the short list up to L tokens; here
one model has one set of frequencies, so that cached keys stay valid when a text grows past L, as in mlx-lm.
Logits are multiplied by m^2, m = sqrt(1 + ln s / ln L), s being `factor`, or max_position_embeddings / L.

The option `factor` takes the place of both: s = factor, and the long list where it is above 1.
"""

import math

from positions import _hf
from positions.rope import Position as Rope


class Options:
    factor: float = 0.0  # s; 0: what the config says


def check(o):
    if o.factor and o.factor < 1:
        raise ValueError(f"factor={o.factor} would shorten the context: it must be at least 1, or 0 for the config's")


class Position(Rope):
    def __init__(self, c, o):
        self.rope = _hf.fields(c.hf)
        self.original = _hf.original(c.hf, c.max_position_embeddings)
        if not isinstance(self.original, int) or self.original < 2:
            raise ValueError(
                f"config.json says original_max_position_embeddings {self.original!r}: it must be a number of tokens, 2 or more"
            )
        self.longer = o.factor > 1 if o.factor else c.max_position_embeddings > self.original
        super().__init__(c, o)
        s = o.factor or self.rope.get("factor") or c.max_position_embeddings / self.original
        m = self.rope.get("attention_factor") or (math.sqrt(1 + math.log(s) / math.log(self.original)) if s > 1 else 1.0)
        self.temperature = m**2

    def frequencies(self):
        which = "long_factor" if self.longer else "short_factor"
        factors, pairs = self.rope.get(which), self.D // 2
        if not isinstance(factors, list):
            raise ValueError(f"config.json must list {which} among its rope fields, one number for each of the {pairs} pairs")
        if len(factors) != pairs:
            raise ValueError(
                f"{which} in config.json has {len(factors)} numbers, but {self.D} channels of a head turn, which makes {pairs} pairs"
            )
        if not all(isinstance(x, int | float) and x > 0 for x in factors):
            raise ValueError(f"{which} in config.json must hold numbers above 0")
        return [f / x for f, x in zip(super().frequencies(), factors)]
