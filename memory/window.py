"""Keep the newest tokens only (the rolling cache of Mistral 7B, arXiv:2310.06825). Simple, and the reason for `sinks`: the text
falls apart when the first tokens go."""

from memory.base import Memory as Base


class Options:
    budget: int = 1024  # tokens kept


def check(o):
    if o.budget < 1:
        raise ValueError(f"budget={o.budget} keeps nothing: it must be at least 1")


class Memory(Base):
    def __init__(self, c, o):
        super().__init__(c, o)
        self.size = o.budget

    def forget(self, attn, seg, s):
        if s["first"] is None or seg.begin is not None:
            return super().forget(attn, seg, s)
        # what stays is consecutive, and attention is faster where the host knows it
        kept = {f: s[f][:, :, -self.size :] for f in self.fields}
        return {**s, **kept, "n": self.size, "first": s["first"] + s["n"] - self.size}
