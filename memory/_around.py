"""Vectors of the model's own around its segments: memory tokens, summaries. One instance for the whole model, in the file of the memory
that its layers have; memory/tokens.py is the simplest.
"""

import ops
from kernels import Places
from ops import Module


class Around(Module):
    """c: Config; o: the Options of the layers' memory, whose `size` says how many vectors.

    When a segment closes, `size` vectors follow its tokens through all layers. If they are `read`, what the last layer makes of them
    goes through all layers once more, alone, and each layer's memory keeps what it needs of it for the segments to come (Segment.reading).
    All of them have positions, so that a text's positions jump by as many at each close.
    """

    read = False
    recurrent = False  # do those of the last close follow the next segment too? Else the learned ones follow every segment

    def __init__(self, c, o):
        super().__init__()
        self.c, self.o, self.size = c, o, o.size
        self.vectors = ops.Embedding(o.size, c.hidden_size)
        self.workers = None  # what works each block where these vectors are its rows, an adapter's; None: the block as it is

    def round(self, decoder, x, at, begin, count, close, state):
        """The layers over x [B, T, C], and over these vectors if the segment closes, as Llama.read -> [B, T, C], state.

        decoder(x, places, begin, close, layers' states, ...) -> x, layers' states."""
        s, n = self.known(state["around"], x), state["next"] + count
        begin = None if begin is None else self.shifted(begin, at.at, s)
        if not close:
            x, layers = decoder(x, at, begin, close, state["layers"])
            return x, {**state, "next": n, "layers": layers, "around": s if begin is None else {**s, "begin": begin[..., -1:]}}
        T, m = x.shape[1], self.size
        pos, live = self.places(n, s)
        first = n + m if isinstance(n, int) and at.first is not None else None
        s = {**s, "begin": s["newest"] * 0 if begin is None else begin[..., -1:]}
        docs = None if begin is None else ops.expand(s["begin"], pos.shape)
        h = ops.cast(self.inputs(s), x.dtype)
        if self.workers is None:
            both = Places(ops.cat([at.at, pos], 2), at.first)
            x = ops.cat([x, h], 1)
            x, layers = decoder(x, both, None if begin is None else ops.cat([begin, docs], 2), close, state["layers"], vectors=m)
            x, h = x[:, :T], x[:, T:]
        else:
            # a segment may come in pieces, and these are one
            x, layers = decoder(x, at, begin, False, state["layers"])
            h, layers = decoder(h, Places(pos, first and first - m), docs, close, layers, vectors=m, workers=self.workers)
        h, n = decoder.norm(h), n + m * live
        if self.read:
            pos, _ = self.places(n, s)
            _, layers = decoder(h, Places(pos, first), docs, False, layers, reading=True, workers=self.workers)
            n = n + m * live
        return x, {**state, "next": n, "layers": layers, "around": self.after(h, pos, s, isinstance(live, int))}

    def start(self):
        """Nothing known yet: only `more`, how many positions these vectors have taken so far."""
        return {"more": 0}

    def known(self, s, like):
        """The whole state: h, the vectors of the last close, [B, size, C]; newest, begin: the positions of the last of them and of its
        document, [B, 1, 1]. like: an array with B rows."""
        if "h" in s:
            return s
        B = like.shape[0]
        none = ops.full((B, 1, 1), -1, ops.int32, like)
        return {**s, "h": ops.expand(self.vectors.weight[None], (B, self.size, self.c.hidden_size)), "newest": none, "begin": none}

    def still(self, s, like):
        """The same for a static graph."""
        return {**self.known(s, like), "more": ops.scalar(s["more"])}

    def shifted(self, begin, at, s):
        """begin [B, 1, T], which knows nothing of these vectors, as positions of a text with them; `at` [B, 1, T]: the tokens'."""
        more = s["more"] if isinstance(s["more"], int) else s["more"].reshape(-1, 1, 1)
        # padding has no position; a document that began before this call began where its last token said
        first = -ops.amax(ops.where(at < 0, -(2**30), -at), 2)
        return ops.where(begin + more >= first, begin + more, s["begin"])

    def places(self, n, s):
        """Positions [B, 1, size] of vectors that follow n tokens, an int, an array or [B]; and 1, or where rows differ 1 for those with
        tokens since the last close: the others have no vectors."""
        B = s["newest"].shape[0]
        start = getattr(n, "there", n)
        start = start if isinstance(start, int) else ops.cast(start, ops.int32).reshape(-1, 1, 1)
        pos = ops.expand(ops.arange(self.size, s["newest"])[None, None] + start, (B, 1, self.size))
        if isinstance(n, int) or not n.shape:
            return pos, 1
        live = start > s["newest"] + 1
        return ops.where(live, pos, -1), ops.cast(live, n.dtype)[:, 0, 0]

    def inputs(self, s):
        """The vectors that follow a segment: where they are recurrent, those of the last close, unless its document is over."""
        first = self.vectors.weight[None]
        return ops.where((s["newest"] >= s["begin"]) & self.recurrent, ops.cast(s["h"], first.dtype), first)

    def after(self, h, pos, s, alike):
        """The state after a close, h [B, size, C] being what came of the vectors, the last time at pos [B, 1, size]. alike: do all rows
        have vectors?"""
        live = pos[..., -1:] >= 0
        more = (2 if self.read else 1) * self.size * (1 if alike else ops.cast(live, ops.int32)[:, 0, 0])
        more = ops.advance(s["more"], more) if alike else s["more"] + more
        h = ops.where(live, h, ops.cast(s["h"], h.dtype))
        return {**s, "h": h, "newest": ops.where(live, pos[..., -1:], s["newest"]), "more": more}

    def initial(self, name, model):
        """The array that the parameter of this name begins with, the base's weights being there; None: random, as any other."""
