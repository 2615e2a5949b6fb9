"""Shifted sparse attention (LongLoRA, Chen et al. 2023, arXiv:2309.12307): full causal attention inside groups; for the second
half of the heads the groups start half a group later, so that text flows between them.

The paper's code shifts by a roll, and there the first tokens see the last ones; here the first half group simply stands alone.
"""

# the paper trains with this and evaluates with full attention: its scores with s2 left on are worse (15.8 against 9.5)
TRAINING_ONLY = True


class Options:
    group: int = 2048  # tokens in a group; the paper takes a quarter of the training length
    n_head: int = 2


def allowed(q, k, h, o):
    # 0 for the first half of the heads, half a group for the second; keys are never moved, so grouped heads need no more
    shift = 2 * h // o.n_head % 2 * (o.group // 2)
    return (k <= q) & ((q + shift) // o.group == (k + shift) // o.group)


def check(o):
    if o.group < 2 or o.group % 2:
        raise ValueError(f"group={o.group} has no half: it must be even, and at least 2")
