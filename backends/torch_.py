"""PyTorch behind the names of ops. Mirrored, name for name and in the same order, by mlx_.py."""

import collections
import functools
import inspect
import os
import typing
import weakref
from contextlib import nullcontext

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint as _checkpoint

from backends._parked import Parked
from errors import Refused

# types and devices

float32, float16, bfloat16, int32, uint8, bool_ = torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.uint8, torch.bool


def use(device=None):
    """Choose where arrays live: cpu, cuda, cuda:1, mps; None: the best there is. Returns the name."""
    name = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        _device.append(torch.zeros(1, device=name).device)
    except (RuntimeError, AssertionError):
        raise Refused(f"device {name!r} is not there: torch here has {', '.join(devices())}") from None
    return name


def devices():
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, yes in there.items() if yes]


_device = []


def device():
    if not _device:
        use()
    return _device[-1]


def on_gpu():
    return device().type != "cpu"


def captures():
    """Does static() make one graph of a step here?"""
    return device().type == "cuda"


def seed(n):
    torch.manual_seed(n)


def peak_memory():
    """Bytes of the device at the peak so far; None where nobody counts."""
    return torch.cuda.max_memory_allocated() if device().type == "cuda" else None


def reset_peak():
    """Count the peak from here on; returns the bytes of the device that are in use now, None where nobody counts."""
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()


def free_memory():
    """Bytes of the device that arrays may take; None where it has no memory of its own."""
    return torch.cuda.mem_get_info(device())[0] if device().type == "cuda" else None


def wait(*trees):
    """Return when everything asked for so far is computed."""
    if device().type == "cuda":
        torch.cuda.synchronize()


def begin(*trees):
    """Have what was asked for so far computed: it is, here."""


# arrays

Array = torch.Tensor


def array(x, dtype=None):
    return torch.as_tensor(x, dtype=dtype, device=device())


def numpy(x):
    return x.detach().to("cpu", torch.float32 if x.dtype == bfloat16 else x.dtype).numpy()


def arange(n, like):
    return torch.arange(n, dtype=int32, device=like.device)


def copy(x):
    """The same array in memory of its own, and no more of it."""
    return x.clone(memory_format=torch.contiguous_format)


def full(shape, fill, dtype, like=None):
    return torch.full(shape, fill, dtype=dtype, device=device() if like is None else like.device)


def normal(shape, dtype):
    """Independent standard normal numbers."""
    return torch.randn(shape, dtype=dtype, device=device())


def chance(shape, p, seed):
    """Bools that are true with probability p: a function of the seed, an int, alone, so that what is computed twice is the same."""
    return torch.rand(shape, device=device(), generator=torch.Generator(device()).manual_seed(seed)) < p


def is_array(x):
    return isinstance(x, torch.Tensor)


def is_real(x):
    """Does the array hold real numbers, which can have a gradient?"""
    return x.is_floating_point()


def nbytes(x):
    return x.numel() * x.element_size()


where, cos, sin, exp, argmax, nearest = torch.where, torch.cos, torch.sin, torch.exp, torch.argmax, torch.round
silu, sigmoid = F.silu, torch.sigmoid


def cast(x, dtype):
    return x.to(dtype)


def cat(xs, axis):
    return torch.cat(xs, axis)


def split(x, n, axis):
    return x.chunk(n, axis)


def pieces(x, n, axis):
    """x in pieces of n, the last one shorter where n does not divide it. Their gradients are joined once, where those of slices would be
    as large as x, each."""
    return x.split(n, axis)


def swap(x, a, b):
    return x.transpose(a, b)


def expand(x, shape):
    return x.expand(shape)


def repeat(x, n, axis):
    return x.repeat_interleave(n, dim=axis) if n > 1 else x


def cumsum(x, axis):
    return torch.cumsum(x, axis)


def running_max(x, axis):
    """The largest entry so far."""
    return x.cummax(axis)[0]


def amax(x, axis):
    return x.amax(axis, keepdim=True)


def minimum(x, n):
    """No entry above the number n."""
    return x.clamp(max=n)


def softmax(x, axis):
    return torch.softmax(x, axis)


def logsumexp(x, axis):
    return torch.logsumexp(x, axis)


def stop(x):
    return x.detach()


def take(x, i):
    """x [B, H, N] or [B, H, N, W] at slots i [B, 1 or H, n]."""
    i = i.long().expand(*x.shape[:2], -1)
    return x.gather(2, i) if x.ndim == 3 else x.gather(2, i[..., None].expand(*i.shape, x.shape[3]))


def top(rank, n):
    """Indices of the n largest along the last axis, in slot order."""
    return rank.topk(n, -1, sorted=False)[1].sort(-1)[0]


def top_first(rank, n):
    """The same for n > 0, of equal ones the first."""
    least = rank.topk(n, -1, sorted=False)[0].amin(-1, keepdim=True)
    above, equal = rank > least, rank == least
    stay = above | (equal & (equal.cumsum(-1) <= n - above.sum(-1, keepdim=True)))
    return stay.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :n]


def sort_by(key, i):
    """Indices i in rising order of key, both [..., n]."""
    return i.gather(-1, key.argsort(dim=-1, stable=True))


def descending(x):
    """The last axis sorted, largest first."""
    return x.sort(-1, descending=True)[0]


def put(x, new, n):
    """Write new at slots n.. of axis 2 and return x; in place unless a gradient is being recorded. n: int or array."""
    if torch.is_grad_enabled() and (x.requires_grad or new.requires_grad):
        return x.index_copy(2, n + torch.arange(new.shape[2], device=x.device), new.to(x.dtype))
    if isinstance(n, int):
        x[:, :, n : n + new.shape[2]] = new
        return x
    return x.index_copy_(2, n + torch.arange(new.shape[2], device=x.device), new.to(x.dtype))


def entries(x, i, axis):
    """The entries i [n] along an axis."""
    return x.index_select(axis, i)


def add(x, i, y):
    """x with y added to its entries i [n] of axis 1; in place: x must be the caller's own."""
    return x.index_add_(1, i, y.to(x.dtype))


def after(x, done):
    """x, once `done` is computed: keeps lazy work from piling up."""
    return x


def mark(*xs):
    """What `after` may wait for in the place of these arrays, so that they can still be written in place."""
    return None


def operator(name, forward, backward, outputs):
    """forward(*args) -> arrays as a function whose gradients are backward(*args, *arrays, *their gradients), those of its first
    arguments; outputs(*args): shape and dtype of each array. Annotations say what the arguments are: arrays, numbers, strings. The
    gradient of an array that is None is an empty one. Inside of a compiled graph it is one node, so that both may do what they like
    on the host."""
    solid = lambda f: functools.wraps(f)(lambda *args: tuple(x.contiguous() for x in f(*args)))
    run = torch.library.custom_op(f"nanolong::{name}", solid(forward), mutates_args=())
    back = torch.library.custom_op(f"nanolong::{name}_backward", solid(backward), mutates_args=())
    made = len(typing.get_args(inspect.signature(backward).return_annotation))
    run.register_fake(lambda x, *rest: tuple(x.new_empty(shape, dtype=dtype) for shape, dtype in outputs(x, *rest)))
    back.register_fake(lambda *args: tuple(args[0].new_empty(0) if x is None else x.new_empty(x.shape) for x in args[:made]))

    def keep(ctx, inputs, output):
        ctx.save_for_backward(*(x if is_array(x) else None for x in inputs), *output)
        ctx.plain = [None if is_array(x) else x for x in inputs]

    def gradients(ctx, *dy):
        given, arrays = ctx.plain, ctx.saved_tensors
        args = [x if plain is None else plain for x, plain in zip(arrays, given)]
        grads = back(*args, *arrays[len(given) :], *dy)
        return *(None if x is None else g for x, g in zip(args, grads)), *[None] * (len(given) - made)

    run.register_autograd(gradients, setup_context=keep)
    return run


def tracing():
    """Is a compiler reading along that cannot follow work on the host?"""
    return torch.compiler.is_compiling()


def known(x):
    """The array as numpy, or None inside a traced function, where it has no values yet. The last few that were asked for are
    remembered, for the device must finish before they can be read; writing into x.data goes unnoticed."""
    if tracing():
        return None
    if x.is_inference():
        # nobody counts what is written into it
        return numpy(x)
    if _read is not None:
        _read.append(x)
    for there, version, numbers in _host:
        if there() is x and version == x._version:
            return numbers
    # a copy: on a CPU the numbers would be the array's own
    _host.append((weakref.ref(x), x._version, numpy(x).copy()))
    return _host[-1][2]


_read = None  # a list while somebody listens to what the host asks for (kernels/replayed.py)
_host = collections.deque(maxlen=4)  # arrays that were asked for, their versions then, and their numbers


_constants = {}


def constant(numbers):
    """A tuple of numbers as an array, int32 or float32, made once: what a module needs again and again."""
    key = numbers, device()
    if key not in _constants:
        _constants[key] = torch.tensor(numbers, dtype=int32 if isinstance(numbers[0], int) else float32, device=device())
    return _constants[key]


def angles(pos, per_turn):
    """Angles in radians, [..., n, pairs], of integer positions [..., n] at frequencies in 2^-32 turns a token, a tuple or an integer
    array: exact for any position."""
    per_turn = constant(per_turn) if isinstance(per_turn, tuple) else per_turn
    return (pos.long()[..., None] * per_turn.long() & 0xFFFFFFFF).float() * (6.283185307179586 / 2**32)


def sdpa(q, k, v, mask, scale):
    """The framework's fused attention. mask: None, an array that broadcasts to [B, H, T, N], or "causal" (the last T of N). An array is
    bool, or float32 and added to the scaled logits, -inf where nothing may be seen. A query that may see nothing gives zeros."""
    (T, D), N = q.shape[2:], k.shape[2]
    # fused, numbers of 32 bits beside queries of 16 are a CPU's alone
    mixed = is_array(mask) and mask.is_floating_point() and q.dtype != mask.dtype and q.device.type != "cpu"
    if (T == 1 and q.is_cuda) or mixed:
        return _plain(q, k, v, mask, scale)
    if T > 1 and v.shape[3] < D:
        # where widths differ, most fused kernels give way to one that keeps all scores
        return sdpa(q, k, F.pad(v, (0, D - v.shape[3])), mask, scale)[..., : v.shape[3]]
    if is_array(mask) and q.device.type != "cpu":
        # of a row in which nothing may be seen a GPU's kernels make no numbers
        none = ~mask.any(-1, keepdim=True) if mask.dtype == bool_ else mask.amax(-1, keepdim=True) == -torch.inf
        mask = mask | none if mask.dtype == bool_ else mask.masked_fill(none, 0.0)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]).masked_fill(none, 0.0)
    causal = isinstance(mask, str) and T == N
    if isinstance(mask, str):
        mask = None if causal else causal_lower_right(T, N) if q.is_cuda else torch.ones(T, N, dtype=torch.bool).tril(N - T)
    # cuDNN's kernels, where it has them, are the fastest on recent GPUs, and torch would ask FlashAttention-2 first
    with sdpa_kernel(_fastest, set_priority=True) if causal and q.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


_fastest = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def _plain(q, k, v, mask, scale):
    """The same in plain products; those of a single query a compiler streams at the speed of memory."""
    (B, H, T, D), K = q.shape, k.shape[1]
    s = (q.reshape(B, K, -1, D) @ k.transpose(2, 3)).float() * scale  # [B, K, G T, N]
    if mask is not None:
        s = s.reshape(B, H, T, -1)
        s = s.masked_fill(~mask, -1e30) if mask.dtype == bool_ else (s + mask).clamp(min=-1e30)
        s = s.reshape(B, K, H // K * T, -1)
    y = s.softmax(-1).to(v.dtype) @ v
    if mask is not None:
        y = y * (s.amax(-1, keepdim=True) > -1e29)
    return y.reshape(B, H, T, -1)


def cross_entropy(logits, targets):
    """Loss per token in nats, float32; 0 where the target is negative. logits [..., V], targets [...]."""
    flat, at = logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1).long()
    return F.cross_entropy(flat, at, ignore_index=-1, reduction="none").reshape(targets.shape)


# modules: weights may be kept in a wider type than the activations; they are cast where they are used


Module, ModuleList = nn.Module, nn.ModuleList


class Linear(nn.Module):
    def __init__(self, n_in, n_out, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None

    def matrix(self):
        """What forward() multiplies by, [n_out, n_in]."""
        return self.weight

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if is_array(self.weight):
            return F.linear(x, self.weight.to(x.dtype), bias)
        y = coded_product(x, self.weight)
        return y if bias is None else y + bias

    def part(self, x, outs=slice(None), ins=slice(None)):
        """Of forward() what the input's entries `ins`, which x is, do to the output's entries `outs`; with the bias if x is all of it."""
        w = self.weight.to(x.dtype) if is_array(self.weight) else self.weight.dense(x.dtype)
        bias = None if self.bias is None or ins != slice(None) else self.bias[outs].to(x.dtype)
        return F.linear(x, w[outs, ins], bias)


def coded_product(x, w):
    """x W^T of a frozen matrix that is held as codes (adapters/_quantised.py)."""
    return _Coded.apply(x, w) if torch.is_grad_enabled() and x.requires_grad else F.linear(x, w.dense(x.dtype))


class _Coded(torch.autograd.Function):
    # the matrix is made once more for the gradient: keeping it would be keeping the model
    @staticmethod
    def forward(ctx, x, w):
        ctx.w = w
        return F.linear(x, w.dense(x.dtype))

    @staticmethod
    def backward(ctx, dy):
        return dy @ ctx.w.dense(dy.dtype), None


class Embedding(nn.Module):
    def __init__(self, n, width):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, width))

    def forward(self, i):
        return F.embedding(i, self.weight)

    def as_linear(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(width)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def shapes_only():
    """Inside this context modules are built without allocating their weights."""
    return torch.device("meta")


def parameters(model):
    """name -> array, names as Hugging Face has them."""
    return dict(model.named_parameters())


def set_parameters(model, new):
    """Put arrays in the place of parameters, by name; what is no array, but codes of one, is no parameter from then on."""
    for name, x in new.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if is_array(x):
            setattr(module, leaf, nn.Parameter(x, getattr(module, leaf).requires_grad))
        else:
            delattr(module, leaf)
            setattr(module, leaf, x)


def freeze(model, names):
    """The parameters of these names take no gradient."""
    for name, p in model.named_parameters():
        p.requires_grad_(name not in names)


def no_grad():
    return torch.no_grad()


def read_safetensors(path, host=False):
    """name -> array, on the device in use, or in the host's memory."""
    return safetensors.torch.load_file(path, device="cpu" if host else str(device()))


def each_safetensor(path, host=False):
    """(name, array) of one after the other: each is read when its turn comes."""
    with safetensors.safe_open(path, framework="pt", device="cpu" if host else str(device())) as file:
        for name in file.keys():  # noqa: SIM118
            yield name, file.get_tensor(name)


def write_safetensors(path, arrays, metadata=None):
    """metadata: more strings by name, for the file's head."""
    arrays = {k: v.detach().contiguous() for k, v in arrays.items()}
    safetensors.torch.save_file(arrays, path, metadata={"format": "pt", **(metadata or {})})
    # the library leaves the file to its owner alone
    os.chmod(path, 0o644)


# training


def checkpoint(module, x, *rest):
    """module(x, *rest), its inner activations recomputed in the backward pass (Chen et al. 2016, arXiv:1604.06174). x: an array that has
    a gradient, or a list of those."""
    if is_array(x):
        return _checkpoint(module, x, *rest, **_ONCE_MORE)
    # what is not an argument by itself would be held for the backward pass, even inside of what is made once more
    n = len(x)
    return _checkpoint(lambda *given: module(given[:n], *given[n:]), *x, *rest, **_ONCE_MORE)


# what is random in training is a function of a seed of its own
_ONCE_MORE = {"use_reentrant": False, "preserve_rng_state": False}


def checkpoint_offloaded(module, x, *rest):
    """The same, x waiting in the host's memory. On a CUDA device it is copied there while the work goes on, and back while what came
    after it is at work."""
    with torch.autograd.graph.saved_tensors_hooks(_Away, _Away.back):
        return checkpoint(module, x, *rest)


class _Away:
    """A tensor that waits in the host's memory for the backward pass, which wants the newest first."""

    newest = None

    def __init__(self, x):
        self.before, _Away.newest = _Away.newest, weakref.ref(self)
        self.device, self.here = x.device, None
        if not x.is_cuda:
            self.there = x.to("cpu", copy=True)
            return
        self.side, self.there = _copying(x.device), torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            self.there.copy_(x, non_blocking=True)
        # nobody may write into its memory before it is copied
        x.record_stream(self.side)

    def fetch(self):
        # of a tensor that was in the host's memory all along nothing is fetched
        if self.here is None and self.device.type == "cuda":
            with torch.cuda.stream(self.side):
                self.here, self.done = self.there.to(self.device, non_blocking=True), self.side.record_event()

    def back(self):
        if self.device.type != "cuda":
            return self.there.to(self.device)
        self.fetch()
        torch.cuda.current_stream().wait_event(self.done)
        x, self.here = self.here, None
        x.record_stream(torch.cuda.current_stream())
        before = self.before and self.before()
        if before is not None:
            before.fetch()
        return x


@functools.cache
def _copying(device):
    """The stream on which tensors go to the host's memory and back."""
    return torch.cuda.Stream(device)


def recomputed(f, *arrays):
    """f(*arrays), what it keeps for the gradients of the arrays made once more in the backward pass."""
    return _checkpoint(f, *arrays, **_ONCE_MORE) if torch.is_grad_enabled() else f(*arrays)


def value_and_grad(model, f):
    """f() -> scalar or (scalar, other...): returns (what f returned, name -> gradient of the scalar for what trains)."""
    out = f()
    loss = out[0] if isinstance(out, tuple) else out
    names, params = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    used = loss.requires_grad
    grads = torch.autograd.grad(loss, params, materialize_grads=True) if used else [torch.zeros_like(p) for p in params]
    return (tuple(o.detach() for o in out) if isinstance(out, tuple) else out.detach()), dict(zip(names, grads))


def accumulate(model, f, grads):
    """As value_and_grad, the gradients added to grads ({} at first; used up). There is never a second whole copy of them."""
    out, _, grads = accumulate_through(model, f, [], grads)
    return out, grads


def accumulate_through(model, f, arrays, grads):
    """The same for f(*arrays): returns (what f returned, a tuple being a tree, the arrays' gradients, grads)."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, p in named.items():
        p.grad = grads.pop(name, None)
    arrays = [x.detach().requires_grad_() for x in arrays]
    out = f(*arrays)
    loss = out[0] if isinstance(out, tuple) else out
    # nothing that trains may have been used: a memory's gates, where nothing is remembered yet
    if loss.requires_grad:
        loss.backward(inputs=[*named.values(), *arrays])
    for name, p in named.items():
        grads[name], p.grad = torch.zeros_like(p) if p.grad is None else p.grad, None
    return tree_map(torch.detach, out), [torch.zeros_like(x) if x.grad is None else x.grad for x in arrays], grads


def inner(g, x):
    """A scalar whose gradient for x is g, a constant, as that of the inner product <g, x> is. Its value is of no use."""
    return _Inner.apply(g, x)


class _Inner(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, x):
        ctx.save_for_backward(g)
        return torch.zeros((), dtype=torch.float32, device=x.device)

    @staticmethod
    def backward(ctx, d):
        # neither in a wider type, nor multiplied by anything but 1
        return None, ctx.saved_tensors[0]


def scaled(arrays, factor):
    """The arrays (used up) times a number."""
    torch._foreach_mul_(list(arrays.values()), factor)
    return arrays


def global_norm(arrays):
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.float()) for g in arrays.values()]))


class AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over named parameters; weight decay on matrices only, a column being none.

    offload: the averages wait in the host's memory, and are on the device for one parameter at a time; the sums are the same.
    """

    def __init__(self, model, betas, eps, weight_decay, offload=False):
        self.named, self.offload = {n: p for n, p in model.named_parameters() if p.requires_grad}, offload
        groups = [[p for p in self.named.values() if (p.ndim > 1 and min(p.shape) > 1) == decays] for decays in (True, False)]
        groups = [{"params": g, "weight_decay": w} for g, w in zip(groups, (weight_decay, 0.0))]
        # one for each parameter, or one for all
        alone = [[{**g, "params": [p]}] for g in groups for p in g["params"]] if offload else [groups]
        self.fused = device().type == "cuda"
        self.inner = [torch.optim.AdamW(g, lr=0.0, betas=betas, eps=eps, fused=self.fused) for g in alone]

    def step(self, grads, lr):
        for name, g in grads.items():
            # the fused step wants the layout of the parameters
            self.named[name].grad = g.contiguous()
        for inner in self.inner:
            for group in inner.param_groups:
                group["lr"] = lr
            _move(inner, (lambda x: x.to(device())) if self.offload else None)
            inner.step()
            inner.zero_grad(set_to_none=True)
            _move(inner, _pinned if self.offload else None)
        # a fused step leaves no trace in the version of what it changes, by which kernels/frozen.py knows
        torch.autograd.graph.increment_version(list(self.named.values()))

    def state(self):
        """Flat name -> array, to be saved."""
        wait()
        states = {p: state for inner in self.inner for p, state in inner.state.items()}
        return {f"{n}.{k}": torch.as_tensor(x) for n, p in self.named.items() for k, x in states.get(p, {}).items()}

    def restore(self, arrays):
        owner = {p: inner for inner in self.inner for group in inner.param_groups for p in group["params"]}
        for n, p in self.named.items():
            here = {k: arrays[f"{n}.{k}"] for k in ("exp_avg", "exp_avg_sq")}
            owner[p].state[p] = {**here, "step": arrays[f"{n}.step"].to(device() if self.fused else "cpu")}
            _move(owner[p], _pinned if self.offload else None)


def _move(adam, to):
    """AdamW's averages of every parameter, elsewhere; to None: they stay."""
    for state in adam.state.values() if to else ():
        state |= {k: to(state[k]) for k in ("exp_avg", "exp_avg_sq") if k in state}


def _pinned(x):
    """The array in memory of the host's from which copies need not wait; queued behind what was asked for."""
    return x.to("cpu") if x.device.type != "cuda" else torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def random_state():
    """What the random numbers of the next steps depend on, as named arrays."""
    state = {"cpu": torch.get_rng_state()}
    return {**state, "cuda": torch.cuda.get_rng_state()} if device().type == "cuda" else state


def restore_random(state):
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu())


# generation


def tree_map(f, tree):
    """f over the arrays of nested dicts, lists and tuples; everything else is passed through."""
    if isinstance(tree, dict):
        return {k: tree_map(f, v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(tree_map(f, v) for v in tree)
    return f(tree) if is_array(tree) else tree


def parked(tree, more=0):
    """The tree of arrays, waiting in the host's memory: `.fetch()` begins to bring it back, `.back()` is the tree where arrays live.
    more: so many trees like it will follow."""
    if device().type == "cuda":
        return Parked(tree_map, tree, device(), more)
    # in memory of its own, as on a GPU
    return _Parked(tree_map(lambda x: x.to("cpu", copy=True), tree))


class _Parked:
    def __init__(self, tree):
        self.tree = tree

    def fetch(self):
        pass

    def back(self):
        return tree_map(lambda x: x.to(device()), self.tree)


def scalar(n):
    """A counter that a static graph can hold: int -> array."""
    return torch.tensor(n, dtype=torch.int64, device=device())


def host(n):
    """The counter back as an int."""
    return int(n)


def later(x):
    """A function that gives the one number in x. It waits for what was asked for until now, and not for what is asked for afterwards."""
    if not x.is_cuda:
        return x.item
    # a copy that is asked for when the number is wanted would wait behind all that was asked for meanwhile
    there, done = torch.empty(x.shape, dtype=x.dtype, pin_memory=True), torch.cuda.Event()
    there.copy_(x, non_blocking=True)
    done.record()
    return lambda: done.synchronize() or there.item()


def advance(n, by):
    """A counter moved on; an array in place, so that a static graph keeps it where it is."""
    return n + by if isinstance(n, int) else n.add_(by)


def static(step, state, flags):
    """step(x, state, flag) -> (y, state), whose shapes never change, as a function of (token, flag) that keeps the state in
    `.state`; x is the token as [1, 1]. On a CUDA device each flag's step is captured as a graph over the state's own buffers."""
    return _Graphs(step, state, flags) if captures() else eager(step, state, flags)


def eager(step, state, flags=(False, True)):
    """The same with a step that runs as it is written, shapes free to change."""
    return _Steps(step, state, flags)


class _Steps:
    def __init__(self, step, state, flags):
        self.step, self.state, self.flags = step, state, flags

    @torch.no_grad()
    def __call__(self, token, flag=False):
        assert flag in self.flags, "this step was not asked for"
        y, self.state = self.step(torch.as_tensor(token, device=device()).reshape(1, 1), self.state, flag)
        return y


class _Graphs(_Steps):
    def __init__(self, step, state, flags):
        super().__init__(step, state, flags)
        self.x = torch.zeros(1, 1, dtype=torch.int64, device=device())
        # warm-up advances the counters and writes into the slots: it is undone
        before = tree_map(torch.clone, state)
        self.graphs = {flag: self.capture(flag) for flag in flags}
        _copy(self.state, before)

    def __call__(self, token, flag=False):
        graph, y = self.graphs[flag]
        self.x.fill_(token)
        graph.replay()
        return y

    @torch.no_grad()
    def capture(self, flag):
        side = _side(self.x.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                _copy(self.state, self.step(self.x, self.state, flag)[1])
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            y, new = self.step(self.x, self.state, flag)
            _copy(self.state, new)
        return graph, y


@functools.cache
def _side(device):
    """The stream to capture on, always the same: each that multiplies gets working memory of its own, and keeps it."""
    return torch.cuda.Stream(device)


def _copy(old, new):
    """Every array of new into its place in old."""
    if isinstance(old, dict):
        for k in old:
            _copy(old[k], new[k])
    elif isinstance(old, (list, tuple)):
        for a, b in zip(old, new):
            _copy(a, b)
    elif is_array(old) and old is not new:
        old.copy_(new)


def call(block, *args):
    return block(*args)


def fast_call():
    """call() for one-token steps: on a CUDA device compiled, once for all blocks; searching tile sizes by coordinate descent is
    what makes the compiler stream a one-row product at the speed of memory."""
    if device().type != "cuda":
        return call
    # layers that remember differently much (pyramidkv, duo) are a graph each, and torch gives up after 8
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
    return torch.compile(call, fullgraph=True, dynamic=False, options={"coordinate_descent_tuning": True})
