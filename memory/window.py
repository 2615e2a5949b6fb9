"""Keep the newest tokens only (the rolling cache of Mistral 7B, arXiv:2310.06825). Simple, and the reason for `sinks`: the text
falls apart when the first tokens go."""

from memory.base import Memory as Base


class Options:
    budget: int = 1024  # tokens kept


def check(o):
    if o.budget < 1:
        raise ValueError(f"budget={o.budget} keeps nothing: it must be at least 1")


class Memory(Base):
    slides = moves = True

    @property
    def size(self):
        return self.o.budget
