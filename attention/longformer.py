"""Longformer (Beltagy et al. 2020, arXiv:2004.05150), causal: a sliding window, and a few first tokens that everyone sees.

The paper's dilated heads are joined to it: --attn "dilated:window=512,dilation=4,heads=2|longformer:window=1".
"""


class Options:
    window: int = 1024  # tokens seen, the token itself included
    n_global: int = 64  # the document's first tokens, seen by all after them
    own_projections: bool = False  # do global tokens ask with weights of their own?


def allowed(q, k, h, o):
    return (k <= q) & ((q - k < o.window) | (k < o.n_global))


# with this option the class Pattern of that file works the layer's memory: weights are more than a rule of positions
PATTERN = ("own_projections", "_own_projections")


def check(o):
    if o.window < 1 or o.n_global < 0:
        raise ValueError(f"window={o.window}, n_global={o.n_global}: window must be at least 1 and n_global at least 0")
    if o.own_projections and not o.n_global:
        raise ValueError("own_projections=true, n_global=0: without global tokens there is nothing to project")
