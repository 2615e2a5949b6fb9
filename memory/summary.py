"""Summaries that pile up: AutoCompressor (Chevalier et al. 2023, arXiv:2305.14788). Each segment ends with `k` summary tokens; what the
last layer makes of them stands before all later segments.

    [sigma_1 ; .. ; sigma_{i-1} ; S_i ; <Sum>_1 .. <Sum>_k] -> N layers -> [.. ; sigma_i]        (section 3.1, summary accumulation)

So a text of n segments is k n vectors, and the newest `chunks` segments' are kept. It differs from memory tokens (tokens.py) in that
nothing is rewritten: old summaries stay, and the summary tokens are the same learned vectors behind every segment. (The paper trains in
segments of random lengths: --segment-least, and stops gradients after two: --bptt 1.) As there, layers take
a summary for tokens, its keys and values stand beside the slots, and a gate keeps it out of a trained model at first. The summary tokens
begin as the embedding of the token that ends a text, as in the paper's code, and a little noise. --adapter summary trains them and a LoRA.

positions: how far from the text do its summaries stand?
    none      nowhere: neither they nor who looks at them is turned, so the hundredth is as near as the first. A model that was trained on
              few chunks reads many. Their order is known all the same, since each was read after those before it
    near      side by side right before the segment, as in the paper's concatenation: each chunk moves those before it k positions away
    absolute  where they were written: each chunk moves those before it by its own length and 2 k, beyond any distance of training
What a scheme adds to logits (alibi, t5) follows where they were written in both of the latter.
"""

import numpy as np

import ops
from memory import tokens
from memory._around import Around as Base
from memory._beside import queued

POSITIONS = ("none", "near", "absolute")


class Options:
    k: int = 32  # summary tokens of a segment
    chunks: int = 128  # segments whose summaries are kept
    chunk: int = 2048  # the segment's tokens, in generation
    keep: str = "none"  # the memory of the layers
    budget: int = 1024  # tokens that it keeps, if any
    positions: str = "none"  # of the summaries: none, near or absolute
    closed: bool = True  # a gate, closed at first
    gain: float = 10.0

    @property
    def size(self):
        return self.k


def check(o):
    if min(o.k, o.chunks, o.chunk) < 1:
        raise ValueError(f"k={o.k}, chunks={o.chunks}, chunk={o.chunk}: each must be at least 1")
    if o.positions not in POSITIONS:
        raise ValueError(f"positions={o.positions} is not known: choose one of {', '.join(POSITIONS)}")
    tokens.check(o)


class Around(Base):
    read, recurrent = True, False

    def initial(self, name, model):
        words, end = ops.numpy(model.model.embed_tokens.weight), model.config.hf.get("eos_token_id")
        end = end[0] if isinstance(end, list) else end
        first = words.mean(0) if end is None else words[end]
        noise = np.random.default_rng(0).normal(size=(self.size, len(first)))
        return ops.array((first + words.std() * (1.0 if end is None else 0.1) * noise).astype("float32"))


class Memory(tokens.Memory):
    moves = True

    def __init__(self, c, o, *rest):
        super().__init__(c, o, *rest)
        self.vectors, self.segment, self.positions = o.k * o.chunks, o.chunk, o.positions

    def standing(self, attn, x, seg, pos):
        if self.positions == "absolute":
            return super().standing(attn, x, seg, pos)
        k, v = attn.kv(x)
        return {"k": k, "v": v, "pos": pos}

    def stand(self, attn, x, seg, s, pos=None):
        return {**s, "side": queued(s.get("side"), self.standing(attn, x, seg, seg.at.at), self.vectors)}

    def glance(self, attn, q, seg, s):
        if self.positions == "none":
            return self.aside(attn, q, seg, s["side"], felt=False)
        if self.positions == "near":
            pos = s["side"]["pos"]
            M = pos.shape[2]
            near = pos[..., -1:] - (M - 1) + ops.arange(M, pos)
            s = {**s, "side": {**s["side"], "turned": ops.where(pos < 0, 0, near)}}
        return super().glance(attn, q, seg, s)
