"""Projections of their own for global tokens (Longformer, Beltagy et al. 2020, arXiv:2004.05150, section 3.1).

The paper has two sets: Q_s, K_s, V_s for the sliding window and Q_g, K_g, V_g, begun as copies, for global attention. As in its code
(HF LongformerSelfAttention), the second set is for global tokens as queries, with all that they see; any other query reads everything,
global tokens too, with the first set. In a causal model a global token g, one of the document's first n_global, sees all j <= g, and
these are global tokens themselves: so the second set works among the first n_global tokens of each document alone.

The keys and values that later global tokens need are at most n_global, beside whatever the memory keeps.
"""

import ops
import plugins
from kernels import Places, attend
from memory.base import Memory, blank


class Pattern(Memory):
    def __init__(self, c, o, pattern):
        super().__init__(c, o)
        H, K = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_global, self.k_global, self.v_global = (ops.Linear(c.hidden_size, n, c.attention_bias) for n in (H, K, K))
        # in its own document a global token sees all before it
        self.n = pattern.options.n_global
        self.among = plugins.parse("attention", f"window:window={self.n}")

    def initial(self, attn, name):
        linear, _, leaf = name.rpartition(".")
        if not linear.endswith("global"):
            # the memory's own
            return super().initial(attn, name)
        return ops.stop(getattr(getattr(attn, linear.replace("global", "proj")), leaf)) + 0

    def write(self, attn, x, seg, s):
        s, first = super().write(attn, x, seg, s), seg.at.first if seg.begin is None else None
        # in a single document the host knows how many of these tokens are global: mostly none
        T = x.shape[1] if first is None else min(max(self.n - first, 0), x.shape[1])
        if not T and "global" in s:
            return s
        T = max(T, 1)
        x, pos, begin = x[:, :T], seg.at.at[:, :, :T], None if seg.begin is None else seg.begin[:, :, :T]
        turn = seg.position.again(pos, seg.turn)
        q = seg.position.queries(attn.heads(self.q_global(x)), turn)
        # they are few: turned as they are seen, whatever the scheme
        new = {"k": attn.heads(self.k_global(x)), "v": attn.heads(self.v_global(x)), "pos": pos}
        old = s.get("global") or {f: blank(f, a, self.n) for f, a in new.items()}
        seen = {f: ops.cat([old[f], a], 2) for f, a in new.items()}
        # the first call of a text sees only itself, at places that the host may know
        keys, slots = (seen, Places(seen["pos"])) if "global" in s else (new, Places(pos, first))
        scale = seg.position.temperature * self.c.head_dim**-0.5
        y = attend(q, seg.keys(keys["k"], keys["pos"]), keys["v"], Places(pos, first), slots, self.among, begin, scale=scale, bias=seg.bias)
        # the newest are all that a later global token of the same document may need
        keep = ops.top(seen["pos"], self.n)
        return {**s, "now": y, "global": {f: ops.take(a, keep) for f, a in seen.items()}}

    def attend(self, attn, q, seg, s):
        now, s = s.get("now"), {f: a for f, a in s.items() if f != "now"}
        y, s = super().attend(attn, q, seg, s)
        if now is None:
            return y, s
        T = now.shape[2]
        since = seg.at.at[:, :, :T] - (0 if seg.begin is None else seg.begin[:, :, :T])
        return ops.cat([ops.where((since < self.n)[..., None], now, y[:, :, :T]), y[:, :, T:]], 2), s
