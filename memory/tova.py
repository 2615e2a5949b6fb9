"""TOVA (Oren et al. 2024, arXiv:2401.06104): drop the token that the newest query looks at least.

    a_j = mean over heads of softmax(q_t K^T / sqrt(d))_j, j over what is kept and the newest token    (the least goes)

All heads of a layer keep the same tokens; the newest has no privilege. As in the released code, more than one may go at once: when a
segment closes, the `budget` tokens stay that its last query looks at most. That code keeps them in order of weight, which changes
nothing. Segments of one token are the paper's algorithm.
"""

from memory._pruned import Pruned, check, ranked  # noqa: F401


class Options:
    budget: int = 1024  # tokens kept
    kv_positions: str = "absolute"


class Memory(Pruned):
    heads_differ = False
    window = 1

    def rank(self, attn, seg, s):
        return ranked(self.looked(attn, seg, s).sum(1)[:, None], s)
