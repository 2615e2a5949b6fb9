"""The tokens before this one, but not itself, unless nothing is before it: what a token sees of its cluster (routing.py)."""


class Options:
    top: int = 1  # tokens seen


def allowed(q, k, h, o):
    return (k <= q) & (q - k <= o.top) & ((k < q) | (q < 1))
