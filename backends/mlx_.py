"""MLX behind the names of ops. Mirrored, name for name and in the same order, by torch_.py."""

import contextlib
import inspect
import typing

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
from mlx.utils import tree_flatten
from mlx.utils import tree_map as _tree_map

from errors import Refused

# types and devices

float32, float16, bfloat16, int32, uint8, bool_ = mx.float32, mx.float16, mx.bfloat16, mx.int32, mx.uint8, mx.bool_


def use(device=None):
    """Choose where arrays live: cpu or gpu (also spelled metal, mps, cuda); None: the best there is. Returns the name."""
    name = "gpu" if device in ("gpu", "metal", "mps", "cuda") else device or devices()[0]
    if name not in devices():
        raise Refused(f"device {device!r} is not there: MLX here has {', '.join(devices())}")
    mx.set_default_device(mx.Device(getattr(mx, name)))
    return name


def devices():
    return ["gpu", "cpu"] if mx.is_available(mx.gpu) else ["cpu"]


def device():
    return mx.default_device()


def on_gpu():
    return device().type == mx.gpu


def captures():
    """Does static() make one graph of a step here?"""
    return on_gpu() and mx.metal.is_available()


def seed(n):
    mx.random.seed(n)


def peak_memory():
    """Bytes of the device at the peak so far; None where nobody counts."""
    return mx.get_peak_memory()


def reset_peak():
    """Count the peak from here on; returns the bytes of the device that are in use now, None where nobody counts."""
    mx.reset_peak_memory()
    return mx.get_active_memory()


def free_memory():
    """Bytes of the device that arrays may take; None where it has no memory of its own."""
    said = mx.device_info() if on_gpu() else {}
    return said.get("max_recommended_working_set_size") or said.get("free_memory") or said.get("memory_size")


def wait(*trees):
    """Return when these trees of arrays are computed."""
    mx.eval(*trees)


def begin(*trees):
    """Have what was asked for so far computed: MLX notes what is to be done, and everything that it is done with."""
    mx.eval(*trees)


# arrays

Array = mx.array


def array(x, dtype=None):
    return mx.array(x, dtype=dtype)


def numpy(x):
    import numpy

    return numpy.array(x.astype(float32) if x.dtype == bfloat16 else x)


def arange(n, like):
    return mx.arange(n, dtype=int32)


def copy(x):
    """The same array in memory of its own, and no more of it."""
    return x + mx.zeros((), x.dtype)


def full(shape, fill, dtype, like=None):
    return mx.full(shape, fill, dtype=dtype)


def normal(shape, dtype):
    """Independent standard normal numbers."""
    return mx.random.normal(shape, dtype)


def chance(shape, p, seed):
    """Bools that are true with probability p: a function of the seed, an int, alone, so that what is computed twice is the same."""
    return mx.random.bernoulli(p, shape, key=mx.random.key(seed))


def is_array(x):
    return isinstance(x, mx.array)


def is_real(x):
    """Does the array hold real numbers, which can have a gradient?"""
    return mx.issubdtype(x.dtype, mx.floating)


def nbytes(x):
    return x.nbytes


where, cos, sin, exp, argmax, nearest = mx.where, mx.cos, mx.sin, mx.exp, mx.argmax, mx.round
silu, sigmoid = nn.silu, mx.sigmoid


def cast(x, dtype):
    return x.astype(dtype)


def cat(xs, axis):
    return mx.concatenate(xs, axis)


def split(x, n, axis):
    return mx.split(x, n, axis)


def pieces(x, n, axis):
    """x in pieces of n, the last one shorter where n does not divide it. Their gradients are joined once, where those of slices would be
    as large as x, each."""
    return mx.split(x, list(range(n, x.shape[axis], n)), axis)


def swap(x, a, b):
    return x.swapaxes(a, b)


def expand(x, shape):
    return mx.broadcast_to(x, [a if b == -1 else b for a, b in zip(x.shape, shape)])


def repeat(x, n, axis):
    return mx.repeat(x, n, axis) if n > 1 else x


def cumsum(x, axis):
    return mx.cumsum(x, axis)


def running_max(x, axis):
    """The largest entry so far."""
    return mx.cummax(x, axis=axis)


def amax(x, axis):
    return x.max(axis, keepdims=True)


def minimum(x, n):
    """No entry above the number n."""
    return mx.minimum(x, n)


def softmax(x, axis):
    # the default sums bfloat16 in bfloat16
    return mx.softmax(x, axis, precise=True)


def logsumexp(x, axis):
    return mx.logsumexp(x, axis)


def stop(x):
    return mx.stop_gradient(x)


def take(x, i):
    """x [B, H, N] or [B, H, N, W] at slots i [B, 1 or H, n]."""
    i = mx.broadcast_to(i, [*x.shape[:2], i.shape[-1]])
    return mx.take_along_axis(x, i if x.ndim == 3 else i[..., None], 2)


def top(rank, n):
    """Indices of the n largest along the last axis, in slot order."""
    return mx.sort(mx.argsort(-rank, -1)[..., :n], -1)


def top_first(rank, n):
    """The same for n > 0, of equal ones the first."""
    return top(rank, n)


def sort_by(key, i):
    """Indices i in rising order of key, both [..., n]."""
    return mx.take_along_axis(i, mx.argsort(key, -1), -1)


def descending(x):
    """The last axis sorted, largest first."""
    return -mx.sort(-x, -1)


def put(x, new, n):
    """Write new at slots n.. of axis 2 and return x; in place where nobody else holds it. n: int or array."""
    # out of bounds would corrupt the heap: callers check on the host
    if not isinstance(n, int):
        return mx.slice_update(x, new.astype(x.dtype), n.reshape(1), axes=(2,))
    # another name for x, which the assignment gives another value: one kernel, where a place that is an array takes two
    x = x[...]
    x[:, :, n : n + new.shape[2]] = new
    return x


def entries(x, i, axis):
    """The entries i [n] along an axis."""
    return mx.take(x, i, axis)


def add(x, i, y):
    """x with y added to its entries i [n] of axis 1; in place where nobody else holds it."""
    return x.at[:, i].add(y.astype(x.dtype))


def after(x, done):
    """x, once `done` is computed: keeps lazy work from piling up."""
    return x if done is None else mx.depends([x], [done])[0]


def mark(*xs):
    """What `after` may wait for in the place of these arrays, so that they can still be written in place."""
    # a copy of one number: waiting for the array itself would hold it
    return sum(x[(0,) * x.ndim].astype(float32) for x in xs)


def operator(name, forward, backward, outputs):
    """forward(*args) -> arrays as a function whose gradients are backward(*args, *arrays, *their gradients), those of its first
    arguments; outputs(*args): shape and dtype of each array. Annotations say what the arguments are: arrays, numbers, strings.
    The gradient of an array that is None is an empty one. MLX wants to know only how many gradients there are: a compiled graph holds
    what it sees of both."""
    made = len(typing.get_args(inspect.signature(backward).return_annotation))

    def run(*args):
        some = [i for i in range(made) if args[i] is not None]

        def whole(xs):
            there = dict(zip(some, xs))
            return *(there.get(i) for i in range(made)), *args[made:]

        f = mx.custom_function(lambda *xs: forward(*whole(xs)))

        def gradients(xs, dy, y):
            grads = backward(*whole(xs), *y, *dy)
            return [grads[i] for i in some]

        f.vjp(gradients)
        return f(*(args[i] for i in some))

    return run


def tracing():
    """Is a compiler reading along that cannot follow work on the host? MLX compiles a trace: it need not follow."""
    return False


def known(x):
    """The array as numpy, or None inside a traced function, where it has no values yet."""
    # to read it again is a copy, some microseconds: nothing is remembered, and nothing can be out of date
    try:
        return numpy(x)
    except ValueError:
        return None


_constants = {}


def constant(numbers):
    """A tuple of numbers as an array, int32 or float32, made once: what a module needs again and again."""
    if numbers not in _constants:
        _constants[numbers] = mx.array(numbers, dtype=int32 if isinstance(numbers[0], int) else float32)
    return _constants[numbers]


def angles(pos, per_turn):
    """Angles in radians, [..., n, pairs], of integer positions [..., n] at frequencies in 2^-32 turns a token, a tuple or an integer
    array: exact for any position."""
    per_turn = constant(per_turn) if isinstance(per_turn, tuple) else per_turn
    return (pos.astype(mx.uint32)[..., None] * per_turn.astype(mx.uint32)).astype(float32) * (6.283185307179586 / 2**32)


def sdpa(q, k, v, mask, scale):
    """The framework's fused attention. mask: None, an array that broadcasts to [B, H, T, N], or "causal" (the last T of N). An array is
    bool, or float32 and added to the scaled logits, -inf where nothing may be seen. A query that may see nothing gives zeros."""
    if is_array(mask) and mask.dtype == float32:
        return _plain(q, k, v, mask, scale)
    y = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    # a row that may see nothing comes back as an average of v, or as no number at all: it means zero
    return y if mask is None or isinstance(mask, str) else mx.where(mask.any(-1, keepdims=True), y, 0)


def _plain(q, k, v, mask, scale):
    """The same in plain products: fused, a mask would be rounded to the dtype of q, and not every device has its gradient."""
    (B, H, T, D), K = q.shape, k.shape[1]
    s = (q.reshape(B, K, -1, D) @ k.swapaxes(2, 3)).astype(float32) * scale  # [B, K, G T, N]
    s = mx.maximum(s.reshape(B, H, T, -1) + mask, -1e30).reshape(s.shape)
    y = (mx.softmax(s, -1).astype(v.dtype) @ v).reshape(B, H, T, -1)
    return mx.where(mask.max(-1, keepdims=True) > -float("inf"), y, 0)


def cross_entropy(logits, targets):
    """Loss per token in nats, float32; 0 where the target is negative. logits [..., V], targets [...]."""
    loss = nn.losses.cross_entropy(logits.astype(float32), mx.maximum(targets, 0))
    return mx.where(targets < 0, 0.0, loss)


# modules: weights may be kept in a wider type than the activations; they are cast where they are used


class Module(nn.Module):
    def __call__(self, *args, **named):
        return self.forward(*args, **named)

    def __setattr__(self, name, value):
        vars(self).pop(name, None)
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            # found as any attribute is: MLX has its modules where Python looks last, which one token through many layers feels
            vars(self)[name] = value


ModuleList = list


class Linear(Module):
    def __init__(self, n_in, n_out, bias=False):
        super().__init__()
        self.weight = mx.zeros((n_out, n_in))
        if bias:
            self.bias = mx.zeros((n_out,))

    def matrix(self):
        """What forward() multiplies by, [n_out, n_in]."""
        return self.weight

    def forward(self, x):
        w = self.get("weight")
        y = x @ w.astype(x.dtype).T if w is not None else coded_product(x, self.weight)
        return y + self.bias.astype(x.dtype) if "bias" in self else y

    def part(self, x, outs=slice(None), ins=slice(None)):
        """Of forward() what the input's entries `ins`, which x is, do to the output's entries `outs`; with the bias if x is all of it."""
        w = self.weight.astype(x.dtype) if is_array(self.weight) else self.weight.dense(x.dtype)
        y = x @ w[outs, ins].T
        return y + self.bias[outs].astype(x.dtype) if "bias" in self and ins == slice(None) else y


def coded_product(x, w):
    """x W^T of a frozen matrix that is held as codes (adapters/_quantised.py)."""
    scale, low = (a.astype(x.dtype) for a in (w.scale, w.low))
    return mx.quantized_matmul(x, w.code.view(mx.uint32), scale, low, group_size=w.group, bits=w.bits)


class Embedding(Module):
    def __init__(self, n, width):
        super().__init__()
        self.weight = mx.zeros((n, width))

    def forward(self, i):
        return self.weight[i]

    def as_linear(self, x):
        return x @ self.weight.astype(x.dtype).T


class RMSNorm(Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = mx.zeros((width,)), eps

    def forward(self, x):
        return mx.fast.rms_norm(x, self.weight.astype(x.dtype), self.eps)


def shapes_only():
    """Inside this context modules are built without allocating their weights: MLX is lazy, so that is always so."""
    return contextlib.nullcontext()


def parameters(model):
    """name -> array, names as Hugging Face has them."""
    return dict(tree_flatten(model.parameters()))


def set_parameters(model, new):
    """Put arrays in the place of parameters, by name; what is no array, but codes of one, is no parameter from then on."""
    model.load_weights([(name, x) for name, x in new.items() if is_array(x)], strict=False)
    modules = {} if all(map(is_array, new.values())) else dict(model.named_modules())
    for name, x in new.items():
        if not is_array(x):
            path, _, leaf = name.rpartition(".")
            setattr(modules[path], leaf, x)


def freeze(model, names):
    """The parameters of these names take no gradient."""
    modules = dict(model.named_modules())
    model.unfreeze()
    for name in names:
        path, _, leaf = name.rpartition(".")
        modules[path].freeze(recurse=False, keys=[leaf])


def no_grad():
    return contextlib.nullcontext()


def read_safetensors(path, host=False):
    """name -> array, on the device in use, or in the host's memory, which is the same."""
    return mx.load(str(path), format="safetensors")


def each_safetensor(path, host=False):
    """(name, array) of one after the other: each is read when its turn comes."""
    arrays = read_safetensors(path, host)
    for name in list(arrays):
        yield name, arrays.pop(name)


def write_safetensors(path, arrays, metadata=None):
    """metadata: more strings by name, for the file's head."""
    # to a path it would add its own ending
    with open(path, "wb") as file:
        mx.save_safetensors(file, arrays, metadata={"format": "pt", **(metadata or {})})


# training


def checkpoint(module, x, *rest):
    """module(x, *rest), its inner activations recomputed in the backward pass (Chen et al. 2016, arXiv:1604.06174). x: an array that has
    a gradient, or a list of those."""
    # gradients reach what is an argument and nothing else: arrays, and the weights of this module and of those in `rest`.
    # A method's weights are those of the module that it belongs to, a plain function's those of modules in `rest`
    is_module = lambda t: isinstance(t, nn.Module)
    owners, arrays = list(filter(is_module, [getattr(module, "__self__", module)])), []
    differs = lambda t: is_array(t) and is_real(t)
    _tree_map(lambda t: owners.append(t) if is_module(t) else arrays.append(t) if differs(t) else None, rest, is_leaf=is_module)

    def again(weights, x, arrays):
        given, before = iter(arrays), [owner.trainable_parameters() for owner in owners]
        swap_in = lambda weights: [owner.update(w) for owner, w in zip(owners, weights)]
        swap_in(weights)
        try:
            return module(x, *_tree_map(lambda t: next(given) if differs(t) else t, rest, is_leaf=is_module))
        finally:
            swap_in(before)

    weights = [owner.trainable_parameters() for owner in owners]
    # of the other arrays some are constants, and nobody wants their gradients
    return _once_more(again, len(tree_flatten((weights, x))), weights, x, arrays)


def checkpoint_offloaded(module, x, *rest):
    """The same, x waiting in the host's memory: MLX has one memory for host and device."""
    return checkpoint(module, x, *rest)


def recomputed(f, *arrays):
    """f(*arrays), what it keeps for the gradients of the arrays made once more in the backward pass."""
    return _once_more(f, len(arrays), *arrays)


def _once_more(f, sure, *given):
    """mx.checkpoint(f)(*given), trees of arrays, but made once more only when the gradient has come and the backward pass that was written
    down before is done, as far as gradients of its first `sure` arrays go. Work is lazy: tiles, which do not wait for each other, would
    else lie in memory all at once."""
    flat, made = [x for _, x in tree_flatten(given)], []

    def run(*arrays):
        given_, out = iter(arrays), []
        y = f(*_tree_map(lambda t: next(given_), given))
        # a place for each array: the arrays themselves would stay
        made[:] = [_tree_map(lambda t: out.append(t) or _place if is_array(t) else t, y)]
        return out

    def backward(arrays, dy, y):
        arrays, dy, y = ([t] if is_array(t) else list(t) for t in (arrays, dy, y))
        _, grads = mx.vjp(run, mx.depends(arrays, [*dy, *y, *(_turns[-1] if _turns else [])]), dy)
        if _turns:
            _turns[-1] = grads[:sure]
        return grads

    once = mx.custom_function(run)
    once.vjp(backward)
    out = iter(once(*flat))
    return _tree_map(lambda t: next(out) if t is _place else t, made[0])


_place = object()
_turns = []  # for each gradient that is being written down: what the backward pass written last gives


@contextlib.contextmanager
def _in_turn():
    _turns.append([])
    try:
        yield
    finally:
        _turns.pop()


def value_and_grad(model, f):
    """f() -> scalar or (scalar, other...): returns (what f returned, name -> gradient of the scalar for what trains)."""
    with _in_turn():
        out, grads = nn.value_and_grad(model, f)()
    return out, dict(tree_flatten(grads))


def accumulate(model, f, grads):
    """As value_and_grad, the gradients added to grads ({} at first; used up). There is never a second whole copy of them."""
    out, _, grads = accumulate_through(model, f, [], grads)
    return out, grads


def accumulate_through(model, f, arrays, grads):
    """The same for f(*arrays): returns (what f returned, a tuple being a tree, the arrays' gradients, grads)."""

    def with_weights(weights, arrays):
        model.update(weights)
        return f(*arrays)

    with _in_turn():
        out, (new, of_arrays) = mx.value_and_grad(with_weights, argnums=(0, 1))(model.trainable_parameters(), arrays)
    new = dict(tree_flatten(new))
    # popped, so that nobody else holds them and the sums are written into their memory
    new = {n: grads.pop(n) + new.pop(n) if n in grads else new.pop(n) for n in list(new)}
    # now, or the graphs of all micro-batches with their activations would wait for the end
    mx.eval(out, new, of_arrays)
    return out, of_arrays, new


def inner(g, x):
    """A scalar whose gradient for x is g, a constant, as that of the inner product <g, x> is. Its value is of no use."""
    return (g.astype(float32) * x.astype(float32)).sum()


def scaled(arrays, factor):
    """The arrays (used up) times a number."""
    return {n: arrays.pop(n) * factor for n in list(arrays)}


def global_norm(arrays):
    return mx.sqrt(sum(g.astype(float32).square().sum() for g in arrays.values()))


class AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over named parameters; weight decay on matrices only, a column being none.

    offload: changes nothing, for MLX has one memory for host and device.
    """

    def __init__(self, model, betas, eps, weight_decay, offload=False):
        named = dict(tree_flatten(model.trainable_parameters()))
        adamw = lambda decay: mlx.optimizers.AdamW(0.0, list(betas), eps, decay, bias_correction=True)
        self.model, self.groups, self.offload = model, [], offload
        for decays, decay in ((True, weight_decay), (False, 0.0)):
            mine = {n: p for n, p in named.items() if (p.ndim > 1 and min(p.shape) > 1) == decays}
            self.groups.append((list(mine), adamw(decay)))
            self.groups[-1][1].init(mine)

    def step(self, grads, lr):
        now = parameters(self.model)
        for names, inner in self.groups:
            inner.learning_rate = lr
            new = inner.apply_gradients({n: grads[n] for n in names}, {n: now[n] for n in names})
            set_parameters(self.model, new)
        mx.eval(self.model.parameters(), *(inner.state for _, inner in self.groups))

    def state(self):
        """Flat name -> array, to be saved."""
        out = {}
        for names, inner in self.groups:
            for n in names:
                out |= {f"{n}.step": inner.state["step"], f"{n}.exp_avg": inner.state[n]["m"], f"{n}.exp_avg_sq": inner.state[n]["v"]}
        return out

    def restore(self, arrays):
        for names, inner in self.groups:
            for n in names:
                inner.state["step"] = arrays[f"{n}.step"]
                inner.state[n] = {"m": arrays[f"{n}.exp_avg"], "v": arrays[f"{n}.exp_avg_sq"]}


def random_state():
    """What the random numbers of the next steps depend on, as named arrays."""
    return {"key": mx.random.state[0]}


def restore_random(state):
    # a seed's halves are the key
    high, low = state["key"].tolist()
    mx.random.seed(high << 32 | low)


# generation


def tree_map(f, tree):
    """f over the arrays of nested dicts, lists and tuples; everything else is passed through."""
    return _tree_map(lambda x: f(x) if is_array(x) else x, tree)


def parked(tree, more=0):
    """The tree of arrays, waiting in the host's memory: `.fetch()` begins to bring it back, `.back()` is the tree where arrays live.
    more: so many trees like it will follow. MLX has one memory for host and device."""
    return _Parked(tree)


class _Parked:
    def __init__(self, tree):
        self.tree = tree

    def fetch(self):
        pass

    def back(self):
        return self.tree


def scalar(n):
    """A counter that a static graph can hold: int -> array."""
    return mx.array(n, dtype=int32)


def host(n):
    """The counter back as an int."""
    return n.item()


def later(x):
    """A function that gives the one number in x. It waits for what was asked for until now, and not for what is asked for afterwards."""
    mx.async_eval(x)
    return x.item


def advance(n, by):
    """A counter moved on."""
    return n + by


def static(step, state, flags):
    """step(x, state, flag) -> (y, state), whose shapes never change, as a function of (token, flag) that keeps the state in
    `.state`; x is the token as [1, 1]. On Metal each flag's step is compiled; on CUDA that takes half a minute, and MLX makes graphs of its
    own."""
    return eager(mx.compile(step) if captures() else step, state, flags)


def eager(step, state, flags=(False, True)):
    """The same with a step that runs as it is written, shapes free to change."""
    return _Steps(step, state, flags)


class _Steps:
    def __init__(self, step, state, flags):
        self.step, self.state, self.flags = step, state, flags

    def __call__(self, token, flag=False):
        assert flag in self.flags, "this step was not asked for"
        y, self.state = self.step(mx.array(token, dtype=int32).reshape(1, 1), self.state, flag)
        mx.async_eval(y, self.state)
        return y


def call(block, *args):
    return block(*args)


def fast_call():
    """call() for one-token steps; `static` compiles the whole step here."""
    return call
