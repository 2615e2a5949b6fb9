"""All blocks for one token of one text on MLX, where the device waits for the host: every array that need not be written down is time.

This stands above model.py like kernels/step.py, which chooses it. A token is a row here, and its heads are its columns: no array is turned,
and a weight once. Where the host knows that a memory only puts a key and a value behind the others, that is all that is
done; what else a memory does stays as it is written, and so does a block whose attention, memory or MLP have ways of their own. Weights
are those of the first call: a session's do not change.
"""

import functools

import mlx.core as mx

import ops
from kernels import ENGINE
from memory.base import Memory, foresees
from model import MLP, Attention, Block, through


class Given:
    """An Attention as a memory sees it, whose keys and values are there already."""

    def __init__(self, attn):
        self.attn, self.rule = attn, attn.rule

    def kv(self, x):
        return self.k, self.v

    def __getattr__(self, name):
        return getattr(self.attn, name)


def fast_call():
    """A function (through or head, *args) for one-token steps, as Decoder.run and Llama.run where all blocks are called together."""
    made = {}

    def run(f, x, *rest):
        if f is not through or x.shape[0] * x.shape[1] != 1:
            return f(x, *rest)
        row, after = x.reshape(1, -1), []
        for (work, *given), seg, s in rest[0]:
            if id(work) not in made:
                made[id(work)] = written(work) if stock(work) else None
            if made[id(work)]:
                row, s = step(work, *made[id(work)], row, seg, s)
            else:
                x, s = work(row[None], seg, s, *given)
                row = x.reshape(1, -1)
            after.append(s)
        return row[None], *after

    return run


def step(block, first, given, last, x, seg, s):
    """Block.forward: x [1, C] -> [1, C], state."""
    memory = block.self_attn.memory
    q, k, v = first(x)
    if steady(memory, given.rule, seg, s):
        y, s = token(q, k, v, seg, s, memory.how(seg)["scale"])
    else:
        given.k, given.v = k, v
        s = memory.write(given, x[None], seg, s)
        y, s = memory.attend(given, q, seg, s)
    if seg.close:
        s = memory.close(given, seg, s)
    return last(x, y), s


def steady(memory, rule, seg, s):
    """Does the host know that Memory.write() puts down a key and a value and no more, and that attention sees every slot in use?"""
    told = "ahead" in s and s["n"] < s["pos"].shape[2] and seg.at.first is not None and s["ahead"] == seg.at.first - s["n"]
    alone = rule.name == "full" and s.get("solid") and seg.begin is None and seg.bias is None
    return told and alone and ENGINE == "auto" and not memory.late(seg) and set(memory.beside.values()) <= {"at"}


def token(q, k, v, seg, s, scale):
    """Memory.write() and attend() where the step is steady: y [1, H, 1, D], state."""
    n = s["n"]
    k, v = ops.put(s["k"], seg.keys(k), n), ops.put(s["v"], v, n)
    s = {**s, "k": k, "v": v, "n": n + 1, "first": s["first"] if s["first"] == s["ahead"] else None}
    return ops.sdpa(seg.queries(q), k[:, :, : n + 1], v[:, :, : n + 1], None, scale), s


def written(block):
    """What comes before attention, the Attention that its memory is given, and what comes behind."""
    attn, mlp = block.self_attn, block.mlp
    q, k, v, o = map(row_times, (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj))
    gate, up, down = map(row_times, (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    norm, norm_behind, D = row_norm(block.input_layernorm), row_norm(block.post_attention_layernorm), attn.D

    def before(x):
        """A token's queries, keys and values, [1, heads, 1, D]."""
        x = norm(x)
        return q(x).reshape(1, -1, 1, D), k(x).reshape(1, -1, 1, D), v(x).reshape(1, -1, 1, D)

    def behind(x, y):
        """The output of attention y [1, H, 1, D], and the block's second half."""
        x = x + o(y.reshape(1, -1))
        row = norm_behind(x)
        return x + down(gated(gate(row), up(row)))

    return before, Given(attn), behind


@functools.partial(mx.compile, shapeless=True)
def gated(gate, up):
    return ops.silu(gate) * up


def row_times(linear):
    """A Linear as a function of a row; a bare matrix is turned once, which is another view of the same numbers."""
    if type(linear) is not ops.Linear or not ops.is_array(linear.weight) or "bias" in linear:
        return linear
    w = linear.weight.T
    ops.wait(w)
    return lambda x: x @ (w if w.dtype == x.dtype else w.astype(x.dtype))


def row_norm(norm):
    """An RMSNorm, its weight at hand."""
    w, eps = norm.weight, norm.eps
    return lambda x: mx.fast.rms_norm(x, w.astype(x.dtype), eps)


def stock(block):
    """Is this a block as model.py has it, with a memory that does what the base does but for what it forgets?"""
    if type(block) is not Block or type(block.self_attn) is not Attention or type(block.mlp) is not MLP:
        return False
    memory = type(block.self_attn.memory)
    return foresees(memory) and memory.pack is Memory.pack and memory.leave is Memory.leave
