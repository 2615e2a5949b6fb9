"""Block.forward for one token of one text on MLX, where the device waits for the host: what stands between two attentions is written down
once, and each token adds it to what is to be done in one call instead of a dozen.

This stands above model.py like kernels/step.py, which chooses it. Shapes that grow, and all that a memory does, stay as they are written;
so does a block whose attention, memory or MLP have ways of their own. Weights are those of the first call: a session's do not change.
"""

import mlx.core as mx

import ops
from memory.base import Memory, foresees
from model import MLP, Attention, Block


class Given:
    """An Attention as a memory sees it, whose keys and values are there already."""

    def __init__(self, attn):
        self.attn, self.rule = attn, attn.rule

    def kv(self, x):
        return self.k, self.v

    def __getattr__(self, name):
        return getattr(self.attn, name)


def fast_call():
    """A function (block or head, *args) for one-token steps, as Decoder.run and Llama.run."""
    made = {}

    def run(f, x, *rest):
        if x.shape[0] * x.shape[1] != 1 or not (isinstance(f, Block) and stock(f)):
            return f(x, *rest)
        if id(f) not in made:
            made[id(f)] = mx.compile(lambda x: before(f, x)), Given(f.self_attn), mx.compile(lambda x, y: behind(f, x, y))
        return step(f, *made[id(f)], x, *rest)

    return run


def step(block, first, given, last, x, seg, s):
    """Block.forward: x [1, 1, C] -> [1, 1, C], state."""
    memory = block.self_attn.memory
    q, given.k, given.v = first(x)
    s = memory.write(given, x, seg, s)
    y, s = memory.attend(given, q, seg, s)
    if seg.close:
        s = memory.close(given, seg, s)
    return last(x, y), s


def before(block, x):
    """A token's queries, keys and values, [1, heads, 1, D]."""
    attn, x = block.self_attn, block.input_layernorm(x)
    return attn.heads(attn.q_proj(x)), *attn.kv(x)


def behind(block, x, y):
    """The output of attention y [1, H, 1, D], and the block's second half."""
    x = x + block.self_attn.o_proj(ops.swap(y, 1, 2).reshape(1, 1, -1))
    return x + block.mlp(block.post_attention_layernorm(x))


def stock(block):
    """Is this block what model.py has, with a memory that does what the base does but for what it forgets?"""
    kinds = type(block), type(block.self_attn), type(block.mlp)
    memory = type(block.self_attn.memory)
    return kinds == (Block, Attention, MLP) and foresees(memory) and memory.pack is Memory.pack and memory.leave is Memory.leave
