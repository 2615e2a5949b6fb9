"""Full causal attention: every token sees itself and all before it (Vaswani et al. 2017, arXiv:1706.03762)."""


def allowed(q, k, h, o):
    return k <= q
