"""Strided (Sparse Transformer, Child et al. 2019, arXiv:1904.10509): the nearest tokens, and every stride-th token before."""


class Options:
    window: int = 128  # nearest tokens seen, the token itself included
    stride: int = 128  # the paper takes both near the square root of the length


def allowed(q, k, h, o):
    return (k <= q) & ((q - k < o.window) | ((q - k) % o.stride == 0))


def check(o):
    if o.window < 1 or o.stride < 1:
        raise ValueError(f"window={o.window}, stride={o.stride}: both must be at least 1")
