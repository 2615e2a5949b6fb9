"""Transformer-XL's relative positions (Dai et al. 2019, arXiv:1901.02860, section 3.3): queries meet keys and, apart, distances.

    A_ij = q_i k_j + q_i W_R R_{i-j} + u k_j + v W_R R_{i-j}     (each head by itself, all divided by sqrt(D))

R_d holds sin(w_f d) and cos(w_f d). These split into functions of i and of j by the addition theorem, so with (a, b) = W_R^T (q_i + v),
a for the sines and b for the cosines, the terms of distance are a plain dot product of features:

    a sin(w(i-j)) + b cos(w(i-j)) = (a sin wi + b cos wi) cos wj + (b sin wi - a cos wi) sin wj

Queries and keys become `width` channels wider, and any attention computes the whole exactly; the shift of the paper's appendix B is
not needed. Each layer has its own W_R, u and v (the authors' `untie_r`).
"""

import ops
from positions.base import Position as Base
from positions.base import whole_turns


class Options:
    width: int = 0  # sines and cosines in R; 0: hidden_size, as in the paper. Fewer cost less


def check(o):
    if o.width < 0 or o.width % 2:
        raise ValueError(f"width={o.width}: sines and cosines come in pairs, so it must be even; 0 is the config's hidden_size")


def per_layer(o):
    return True


class Position(Base):
    by_head = True

    def __init__(self, c, o):
        super().__init__(c, o)
        self.H, self.width = c.num_attention_heads, o.width or c.hidden_size
        if self.width % 2:
            raise ValueError(f"hidden_size={self.width} is odd, and sines and cosines come in pairs: give an even width")
        # W_R, u and v by the names that HF gave them
        self.r_net = ops.Linear(self.width, self.H * c.head_dim)
        self.r_w_bias, self.r_r_bias = (ops.Embedding(self.H, c.head_dim) for _ in "uv")
        self.per_turn = whole_turns(10000 ** (-2 * i / self.width) for i in range(self.width // 2))

    def turn(self, at, begin=None):
        """cos, sin [B, 1 or K, n, width / 2] in float32."""
        angle = ops.angles(at.at, self.per_turn)
        return ops.cos(angle), ops.sin(angle)

    def queries(self, q, turn):
        u, v, w = (ops.cast(x.weight, q.dtype) for x in (self.r_w_bias, self.r_r_bias, self.r_net))
        cos, sin = (ops.cast(x, q.dtype) for x in turn)
        a, b = ops.split((q + v[:, None]) @ w.reshape(self.H, -1, self.width), 2, -1)  # [B, H, T, width / 2]
        return ops.cat([q + u[:, None], a * sin + b * cos, b * sin - a * cos], -1)

    def keys(self, k, turn):
        features = ops.cast(ops.cat(list(turn), -1), k.dtype)
        return ops.cat([k, ops.expand(features, (*k.shape[:3], self.width))], -1)
