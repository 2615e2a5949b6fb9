"""Block.forward for one token of one text, as five kernels: queries, keys and values; attention and what is remembered; the output; gate
and up; down.

This stands above model.py, whose classes it knows, and is chosen in generate.py alone. What is not what is written anew here runs as it is
written, compiled: attention alone where its memory, positions or projections have ways of their own (`plain`), the block where its MLP has.
NANOLONG_KERNEL other than auto and triton switches all of it off.
"""

import ops
from kernels import ENGINE, TRITON, codes, rows, slots
from memory._past import Past
from memory._pruned import Pruned
from memory.base import Memory
from memory.quantised import Memory as Quantised
from model import MLP, Attention, Block, Llama
from positions.base import Rotary

MLX = ops.BACKEND == "mlx"
if MLX:
    from kernels import step_mlx


def fast_call():
    """A function (block or head, *args) for one-token steps, as Decoder.run and Llama.run."""
    compiled = ops.fast_call()
    if not (TRITON and ENGINE in ("auto", "triton")):
        return compiled

    def run(f, *args):
        x = args[0]
        if isinstance(f, Block) and len(x) == x.shape[1] == 1 and rows.can(x):
            return step(f, *args, compiled)
        if getattr(f, "__func__", None) is Llama.head and x.shape[0] == x.shape[1] == 1 and rows.can(x) and headed(f.__self__, x):
            return head(f.__self__, x)
        return compiled(f, *args)

    return run


def written_call():
    """A function (all blocks or head, *args) for steps that are no graph, which MLX's are on Metal alone; None: as they are written."""
    return step_mlx.fast_call() if MLX and ENGINE == "auto" else None


def step(block, x, seg, s, compiled):
    """Block.forward: x [1, 1, C] -> [1, 1, C], state."""
    stock = type(block) is Block and owner(block.self_attn.memory, "leave") is Memory
    if not stock or not stacked(block.mlp, block.post_attention_layernorm, x):
        return compiled(block, x, seg, s)
    if plain(block, x, seg, s):
        y, s = attention(block, x.reshape(-1), seg, s, compiled)
    elif seg.close and in_place(block.self_attn.memory, seg, s):
        y, s = compiled(sublayer, block, x, seg._replace(close=False), s)
        y, s = y.reshape(-1), close(block.self_attn, seg, s, compiled)
    else:
        y, s = compiled(sublayer, block, x, seg, s)
        y = y.reshape(-1)
    return mlp(block, y).reshape(x.shape), s


def sublayer(block, x, seg, s):
    """The first half of Block.forward, as it is written."""
    y, s = block.self_attn(block.input_layernorm(x), seg, s)
    return x + y, s


def attention(block, x, seg, s, compiled):
    """The first half of Block.forward: x [C] -> [C], state."""
    attn, norm, memory = block.self_attn, block.input_layernorm, block.self_attn.memory
    row = rows.product(x, [attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight], norm.weight, norm.eps)
    how = {k: a for k, a in memory.how(seg).items() if k != "bias"}
    what, note = (attn.rule, seg.begin), noted(memory)
    if isinstance(memory, Quantised):
        here = {f: a for f, a in s.items() if f != "past"}
        y, new = codes.token(row, seg.turn, seg.at.at, here, s["past"], *what, memory.bits, **how, born=note["born"], recent=note["recent"])
        s = {**new, "past": s["past"]}
    else:
        y, s = slots.token(row, seg.turn, seg.at.at, s, *what, **how, **note)
    if seg.close:
        s = close(attn, seg, s, compiled)
    return rows.product(y, [attn.o_proj.weight], residual=x), {**s, "first": None}


def close(attn, seg, s, compiled):
    """Memory.close, a past being written in place where that is the same."""
    memory = attn.memory
    if not in_place(memory, seg, s):
        return compiled(memory.close, attn, seg, s)
    worst, new = compiled(memory.leaving, attn, seg, s)
    return {**memory.emptied(s), "past": codes.join(worst, s["past"], new), "first": None}


def mlp(block, x):
    """The second half: x [C] -> [C]."""
    mlp, norm = block.mlp, block.post_attention_layernorm
    y = rows.product(x, [mlp.gate_proj.weight, mlp.up_proj.weight], norm.weight, norm.eps, gated=True)
    return rows.product(y, [mlp.down_proj.weight], residual=x)


def head(model, x):
    """Llama.head."""
    norm = model.model.norm
    return rows.product(x.reshape(-1), [model.readout.weight], norm.weight, norm.eps, dtype=ops.float32).reshape(1, 1, -1)


# ---------------------------------------------------------------- what may be written anew


def headed(model, x):
    kind = ops.Embedding if model.config.tie_word_embeddings else ops.Linear
    return type(model) is Llama and normed(model.model.norm) and bare(model.readout, x, kind)


def stacked(mlp, norm, x):
    return type(mlp) is MLP and normed(norm) and all(bare(m, x) for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))


def bare(linear, x, kind=ops.Linear):
    """Is this a matrix and nothing else, of the numbers that x is made of?"""
    w = getattr(linear, "weight", None)
    return type(linear) is kind and getattr(linear, "bias", None) is None and ops.is_array(w) and w.dtype == x.dtype and w.is_contiguous()


def normed(norm):
    return type(norm) is ops.RMSNorm


def plain(block, x, seg, s):
    """Is this Attention.forward over slots that a memory keeps as memory/base.py does: keys turned when they are written, one text, and
    beside attention nothing but what `noted` tells? Or are some of the slots codes, and all else so?"""
    attn, memory = block.self_attn, block.self_attn.memory
    linears = all(bare(m, x) for m in (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj))
    if type(attn) is not Attention or not linears or not normed(block.input_layernorm) or not turns(seg) or memory.late(seg):
        return False
    if any(owner(memory, f) is not Memory for f in ("write", "pack", "put", "unpack", "seen", "look", "used", "how", "late")):
        return False
    if seg.begin is not None and getattr(memory, "window", 0):
        # where the documents of remembered queries begin is not noted
        return False
    note, coded = noted(memory), isinstance(memory, Quantised)
    if note is None or (coded and (note["mass"] or "count" in s["past"])):
        return False
    attends = next(c for c in type(memory).__mro__ if "attend" in vars(c) and not (coded and c is Past))
    known = attends in (Memory, Pruned) or "tally" in vars(attends)
    return known and (codes.can(s, s["past"], attn.H, memory.bits) if coded else slots.can(s, attn.H))


def in_place(memory, seg, s):
    """Does a past of codes stay where it is when the segment closes? Where heads have slots in common (adakv), it does not."""
    if not isinstance(memory, Quantised) or seg.begin is not None or owner(memory, "forget") not in (Memory, Pruned):
        return False
    return "count" not in s["past"] and codes.joins(s["past"])


def turns(seg):
    """Are queries and keys turned by cos and sin alike in all heads, and is nothing added to the logits?"""
    position, turn = seg.position, seg.turn
    if not isinstance(position, Rotary) or any(owner(position, f) not in Rotary.__mro__ for f in ("queries", "keys", "turned")):
        return False
    return seg.bias is None and len(turn) == 2 and len(turn[0].shape) == 4 and turn[0].shape[1] == 1


def noted(memory):
    """What is noted of the token, as slots.token() takes it; None: something that it does not."""
    born = [f for f, what in memory.beside.items() if what == "at"]
    rest = {f: what for f, what in memory.beside.items() if what != "at"}
    window = getattr(memory, "window", 0)
    if len(born) > 1 or rest != ({memory.tally: 0.0} if memory.tally else {}) or (window and owner(memory, "remember") is not Pruned):
        return None
    return {"born": born[0] if born else None, "mass": memory.tally, "recent": window}


def owner(thing, name):
    """The class that says what `name` is."""
    return next(c for c in type(thing).__mro__ if name in vars(c))
