"""Dilated sliding window (Longformer, Beltagy et al. 2020, arXiv:2004.05150): some heads see as many tokens, but only every
dilation-th one, and so reach further; the others see the nearest ones. Only together do they miss nothing."""


class Options:
    window: int = 512  # tokens seen by each head, the token itself included
    dilation: int = 4  # distance between the tokens that a dilated head sees
    heads: int = 2  # how many heads are dilated, the first ones; the paper has 2, in the upper layers


def allowed(q, k, h, o):
    far = (q - k < o.window * o.dilation) & ((q - k) % o.dilation == 0)
    return (k <= q) & (((h >= o.heads) & (q - k < o.window)) | ((h < o.heads) & far))


def check(o):
    if o.window < 1 or o.dilation < 1 or o.heads < 0:
        raise ValueError(
            f"window={o.window}, dilation={o.dilation}, heads={o.heads}: window and dilation must be at least 1 and heads at least 0"
        )
