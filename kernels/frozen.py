"""Training beside frozen matrices: Block.forward and Llama.losses for LoRA, with their backward passes written out.

Block.forward itself is the specification, and what trains where this does not apply. What this does better than autograd does (figures:
bench/finetune.py):

    LoRA rides inside of the frozen product. [W, s B] lies in memory as one matrix, B in its last columns, and the product's input has room
        beside it for t = A y. So y W^T + s t B^T is one product, and so is its gradient [dy, dt] = dout [W, s B].
    What is cheap to make is not kept. The backward passes of norms and gate, which read x, g and u anyway, leave the norm's and the gate's
        output where their gradient was, in time for the gradient of A. A token takes (4 C + 2 F) numbers a layer and its keys and values.
    Matrices that read the same are one product, and the residual is added in it.
    A matrix that is held as codes (coded.py) becomes numbers right before its product, in a room that all layers share; what a recomputed
        forward pass left there serves the backward pass that follows.
    Logits become their own gradient in place, and their product with the head is made once more for nobody.

Attention, positions and memory lie between the two halves of a block, as they are written, whatever they are.

This stands above model.py, whose classes it knows, and is chosen in train.py alone, as kernels/step.py is in generate.py.
"""

import functools

import ops
from errors import Refused
from kernels import ENGINE, TRITON
from memory.base import Memory
from model import MLP, Attention, Block

if TRITON:
    import torch

    from kernels import frozen_triton as fused


def use(model):
    """Let the blocks and the loss of a model that is ready to train run so, where they can; it is the same model. Returns what makes ready
    all that kernels read beside parameters, which is else done when it is wanted."""
    if not TRITON or ENGINE not in ("auto", "triton"):
        return lambda: None
    rooms, stacks = {}, []
    for block in model.model.layers:
        if stock(block):
            halves = [stacked(names, rooms, block.self_attn, block.mlp) for names in PRODUCTS]
            block.forward = functools.partial(forward, block, halves)
            stacks += halves
    if stock_head(model):
        model.losses = functools.partial(losses, model)
    return functools.partial(settle, stacks, rooms)


def settle(stacks, rooms):
    for stack in stacks:
        stack.refresh()
    for room in rooms.values():
        room["whose"] = None


PRODUCTS = ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)


def send_away(model):
    """Let a frozen embedding wait in the host's memory: of its matrix a step reads the rows of its tokens, and a kernel fetches these.
    Where host and device have one memory nothing changes. Raises Refused where the device needs all of it."""
    embedding = model.model.embed_tokens
    if not ops.on_gpu() or ops.BACKEND == "mlx":
        return
    if embedding.weight.requires_grad or model.readout is embedding or not TRITON:
        why = "it trains" if embedding.weight.requires_grad else "the head is the same matrix" if TRITON else "that needs Triton"
        raise Refused(f"--embedding-offload is not possible, since {why}: leave it out")
    ops.set_parameters(
        embedding,
        {"weight": torch.empty_like(embedding.weight, device="cpu", pin_memory=torch.cuda.is_available()).copy_(embedding.weight)},
    )
    embedding.forward = functools.partial(fused.rows, embedding.weight)


# ---------------------------------------------------------------- what may be written anew


def stock(block):
    """Is this the block as model.py has it, of frozen matrices and norms, beside which LoRA trains or nothing?"""
    attn, mlp = block.self_attn, block.mlp
    linears = [getattr(part, name) for part in (attn, mlp) for name in LINEARS if hasattr(part, name)]
    norms = block.input_layernorm, block.post_attention_layernorm
    return (
        (type(block), type(attn), type(mlp)) == (Block, Attention, MLP)
        and all(type(norm) is ops.RMSNorm and frozen(norm.weight) for norm in norms)
        and all(frozen(linear.weight) and linear.bias is None and plain(linear) for linear in linears)
        and len({linear.weight.dtype for linear in linears}) == 1
    )


LINEARS = [name for names in PRODUCTS for name in names]


def frozen(w):
    return not w.requires_grad


def plain(linear):
    """A matrix, with s B A beside it or nothing."""
    return type(linear) is ops.Linear or (hasattr(linear, "lora_A") and not linear.dora and linear._merged is None)


def stock_head(model):
    return all(frozen(m.weight) for m in (model.model.norm, model.readout)) and getattr(model.readout, "bias", None) is None


def dropping(parts):
    """Does LoRA leave out entries of what it gets, in this step?"""
    return any(getattr(linear, "dropout", 0) and linear.seed is not None for part in parts for linear in part.linears)


# ---------------------------------------------------------------- matrices


def stacked(names, rooms, *parts):
    linears = [next(getattr(part, name) for part in parts if hasattr(part, name)) for name in names]
    return Stack(linears) if all(ops.is_array(linear.weight) for linear in linears) else CodedStack(linears, rooms)


class Stack:
    """Linears that read the same input, as one frozen matrix [W, s B]: [n_out of all, n_in + beside], B block by block."""

    def __init__(self, linears):
        self.linears, self.ranks = linears, [linear.lora_A.weight.shape[0] if adapted(linear) else 0 for linear in linears]
        self.outs, self.n_in = [linear.weight.shape[0] for linear in linears], linears[0].weight.shape[1]
        # rows stay aligned as tensor cores want them
        self.beside, self.dtype = -(-sum(self.ranks) // 64) * 64, linears[0].weight.dtype
        self.a, self.seen = ops.full((self.beside, self.n_in), 0.0, self.dtype), None
        self.settle()

    def settle(self):
        self.w = ops.full((sum(self.outs), self.n_in + self.beside), 0.0, self.dtype)
        for linear, rows in zip(self.linears, self.w.split(self.outs)):
            rows[:, : self.n_in] = linear.weight.detach()
            # no second copy: the model's own matrix is a part of this one
            ops.set_parameters(linear, {"weight": rows[:, : self.n_in]})

    def trained(self):
        """A and B of the linears that have them, in turn."""
        return [w for linear in self.linears if adapted(linear) for w in (linear.lora_A.weight, linear.lora_B.weight)]

    def starts(self):
        """Beside the matrix, the first column of each B."""
        return [sum(self.ranks[:i]) for i in range(len(self.ranks))]

    def blocks(self, x):
        """The parts of [n_out of all, beside] in which each B stands."""
        return [part[:, at : at + r] for part, at, r in zip(x.split(self.outs), self.starts(), self.ranks) if r]

    def scales(self):
        return [linear.scale for linear in self.linears if adapted(linear)]

    def refresh(self):
        """A and B as the last step left them."""
        trained = self.trained()
        now = [(w.data_ptr(), w._version) for w in trained]
        if now != self.seen:
            with torch.no_grad():
                self.a[: sum(self.ranks)] = torch.cat(trained[::2]) if trained else 0
                self.take(trained[1::2])
            self.seen = now

    def take(self, bs):
        for to, b, s in zip(self.blocks(self.w[:, self.n_in :]), bs, self.scales()):
            to.copy_(b * s)

    def matrix(self):
        """[W, s B], after refresh()."""
        return self.w

    def __call__(self, y, residual=None):
        """y [n, n_in + beside], of which the last columns are room -> (the products [n, n_out of all], t [n, beside])."""
        self.refresh()
        t = y[:, : self.n_in] @ self.a.T
        y[:, self.n_in :] = t
        w = self.matrix().T
        return (y @ w if residual is None else torch.addmm(residual, y, w)), t

    def back(self, dout, t):
        """[dy, dt] [n, n_in + beside], and the gradients of each B."""
        both = (dout.T @ t).float() if self.beside else None
        d = dout @ self.matrix()
        d[:, : self.n_in].addmm_(d[:, self.n_in :], self.a)
        if not self.beside:
            return d, []
        scales = self.scales()
        if len(set(scales)) == 1:
            # mostly they are alike, and one product does
            return d, self.blocks(both.mul_(scales[0]))
        return d, [block * s for block, s in zip(self.blocks(both), scales)]

    def back_a(self, dt, y):
        """The gradients of each A: y [n, n_in] is what the products were made of."""
        if not self.beside:
            return []
        return list((dt.T @ y).float()[: sum(self.ranks)].split([r for r in self.ranks if r]))


class CodedStack(Stack):
    """The same of matrices that are held as codes. rooms: by shape, what all layers' matrices are made numbers in, and whose are there."""

    def __init__(self, linears, rooms):
        self.rooms = rooms
        super().__init__(linears)

    def settle(self):
        key = sum(self.outs), self.n_in + self.beside, self.dtype
        if key not in self.rooms:
            self.rooms[key] = {"w": ops.full(key[:2], 0.0, self.dtype), "whose": None}
        self.room = self.rooms[key]

    def take(self, bs):
        self.room["whose"] = None

    def matrix(self):
        # one stream computes all: nobody reads any more what is overwritten
        if self.room["whose"] is not self:
            for linear, rows, at in zip(self.linears, self.room["w"].split(self.outs), self.starts()):
                b = {"b": linear.lora_B.weight.detach(), "s": linear.scale, "at": at} if adapted(linear) else {}
                fused.dequantise(linear.weight, rows, **b)
            self.room["whose"] = self
        return self.room["w"]


def adapted(linear):
    return hasattr(linear, "lora_A")


def in_turn(a, b):
    return [g for pair in zip(a, b) for g in pair]


# ---------------------------------------------------------------- the block


def forward(block, halves, x, seg, s):
    """Block.forward."""
    (qkv, o, gu, down), attn, memory = halves, block.self_attn, block.self_attn.memory
    if not fused.can(x) or x.dtype != qkv.dtype or dropping(halves) or block.tile or attn.groups > 1:
        return Block.forward(block, x, seg, s)
    if packs(memory):
        q, *kv = Front.apply(x, block.input_layernorm, qkv, attn.D, attn.H, *qkv.trained())
        s = memory.write(Ready(attn, *kv), x, seg, s)
        del kv
    else:
        # a memory that makes keys and values of more than this segment's tokens
        x_ = block.input_layernorm(x)
        q, s = attn.heads(attn.q_proj(x_)), memory.write(attn, x_, seg, s)
    y, s = memory.attend(attn, q, seg, s)
    # the product that they are parts of has no place beside the MLP
    del q
    if seg.close:
        s = memory.close(attn, seg, s)
    x, y = seg.wanted(x), seg.wanted(y, 2)
    x = Rear.apply(x, y, block.post_attention_layernorm, o, gu, down, *o.trained(), *gu.trained(), *down.trained())
    return memory.leave(block, x, seg, s)


def packs(memory):
    """Does this memory ask for nothing but the keys and values of the segment's tokens when it writes?"""
    return all(owner(memory, f) is Memory for f in ("write", "pack"))


def owner(thing, name):
    """The class that says what `name` is."""
    return next(c for c in type(thing).__mro__ if name in vars(c))


class Ready:
    """Attention whose keys and values are made already."""

    def __init__(self, attn, k, v):
        self.attn, self.made = attn, (k, v)

    def kv(self, x):
        return self.made

    def __getattr__(self, name):
        return getattr(self.attn, name)


def flat(x):
    return x.reshape(-1, x.shape[-1])


if TRITON:

    class Front(torch.autograd.Function):
        """x [B, T, C] -> queries [B, H, T, D], keys and values [B, K, T, D] of the normed x, not yet turned."""

        @staticmethod
        def forward(ctx, x, norm, qkv, D, H, *trained):
            B, T, _ = x.shape
            y, r = fused.norm(flat(x.contiguous()), norm.weight, norm.eps, qkv.beside)
            out, t = qkv(y)
            ctx.save_for_backward(x, r, t)
            ctx.rest = norm, qkv
            q, k, v = (part.reshape(B, T, -1, D).transpose(1, 2) for part in out.split(qkv.outs, 1))
            # what stays of them should not keep the whole product
            return q, k, v.contiguous()

        @staticmethod
        def backward(ctx, *grads):
            (x, r, t), (norm, qkv) = ctx.saved_tensors, ctx.rest
            rows = flat(x.contiguous())
            dout = rows.new_empty(len(rows), sum(qkv.outs))
            for to, g in zip(dout.split(qkv.outs, 1), grads):
                to.reshape(*x.shape[:2], g.shape[1], -1).copy_(g.transpose(1, 2))
            d, db = qkv.back(dout, t)
            dx = fused.norm_back(rows, norm.weight, r, d, torch.zeros_like(rows))
            da = qkv.back_a(d[:, qkv.n_in :], d[:, : qkv.n_in])
            return dx.reshape(x.shape), None, None, None, None, *in_turn(da, db)

    class Rear(torch.autograd.Function):
        """x [B, T, C] and what attention gave, [B, H, T, D] -> the block's output [B, T, C]."""

        @staticmethod
        def forward(ctx, x, y, norm, o, gu, down, *trained):
            rows = y.new_empty(x.shape[0] * x.shape[1], o.n_in + o.beside)
            rows[:, : o.n_in].reshape(*x.shape[:2], y.shape[1], -1).copy_(y.transpose(1, 2))
            mid, t_o = o(rows, flat(x))
            rows, r = fused.norm(mid, norm.weight, norm.eps, gu.beside)
            both, t_gu = gu(rows)
            del rows
            out, t_down = down(fused.gate(both, down.beside), mid)
            ctx.save_for_backward(y, mid, r, both, t_o, t_gu, t_down)
            ctx.rest, ctx.used = (norm, o, gu, down), False
            return out.reshape(x.shape)

        @staticmethod
        def backward(ctx, dout):
            if ctx.used:
                raise RuntimeError("this backward pass uses up what it reads: call backward() once")
            ctx.used = True
            (y, mid, r, both, t_o, t_gu, t_down), (norm, o, gu, down) = ctx.saved_tensors, ctx.rest
            shape, dout = dout.shape, flat(dout.contiguous())
            d, db_down = down.back(dout, t_down)
            fused.gate_back(both, d)
            da_down = down.back_a(d[:, down.n_in :], d[:, : down.n_in])
            d, db_gu = gu.back(both, t_gu)
            dmid = fused.norm_back(mid, norm.weight, r, d, dout)
            da_gu = gu.back_a(d[:, gu.n_in :], d[:, : gu.n_in])
            d, db_o = o.back(dmid, t_o)
            da_o = o.back_a(d[:, o.n_in :], flat(y.transpose(1, 2).reshape(*shape[:2], -1))) if o.beside else []
            dy = d[:, : o.n_in].reshape(*shape[:2], y.shape[1], -1).transpose(1, 2)
            grads = in_turn(da_o, db_o) + in_turn(da_gu, db_gu) + in_turn(da_down, db_down)
            return dmid.reshape(shape), dy, None, None, None, None, *grads


# ---------------------------------------------------------------- the loss


def losses(model, x, targets):
    """Llama.losses, where neither the last norm nor the head trains."""
    if not fused.can(x) or x.dtype != model.readout.weight.dtype:
        return type(model).losses(model, x, targets)
    return Losses.apply(x, targets, model.model.norm, model.readout.weight, model.chunk or x.shape[0] * x.shape[1])


if TRITON:

    class Losses(torch.autograd.Function):
        """Losses of targets [B, T], as Llama.losses: x [B, T, C]. The gradient of a row of x is that of its loss times a number: it is made
        at once, while the row's logits are there."""

        @staticmethod
        def forward(ctx, x, targets, norm, w, chunk):
            rows, t = flat(x.contiguous()), targets.reshape(-1)
            y, r = fused.norm(rows, norm.weight, norm.eps)
            out, wanted = r.new_empty(len(rows)), ctx.needs_input_grad[0]
            for i in range(0, len(rows), chunk):
                z = y[i : i + chunk] @ w.T
                out[i : i + chunk] = fused.loss(z, t[i : i + chunk])
                if wanted:
                    y[i : i + chunk] = z @ w
                # before the next ones are made
                del z
            ctx.save_for_backward(*(rows, r, y) if wanted else ())
            ctx.norm = norm
            return out.reshape(targets.shape)

        @staticmethod
        def backward(ctx, g):
            (rows, r, dy), norm = ctx.saved_tensors, ctx.norm
            # out of place: what is kept must be there for a second backward pass
            dx = fused.norm_back(rows, norm.weight, r, (dy * g.reshape(-1, 1)).to(dy.dtype), torch.zeros_like(rows))
            return dx.reshape(*g.shape, -1), None, None, None, None
