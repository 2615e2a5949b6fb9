"""Local blocks: full causal attention inside blocks that do not overlap (Parmar et al. 2018, arXiv:1802.05751)."""


class Options:
    block: int = 1024  # tokens in a block


def allowed(q, k, h, o):
    return (k <= q) & (q // o.block == k // o.block)


def check(o):
    if o.block < 1:
        raise ValueError(f"block={o.block} holds nothing: it must be at least 1")
