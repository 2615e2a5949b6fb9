"""LoRA (Hu et al. 2021, arXiv:2106.09685): beside each frozen matrix, the product of two thin ones that train.

    h = W_0 x + s B A x,   s = alpha / r        B [n_out, r] begins at zero, A [r, n_in] at random: step 0 is the base

rslora=true: s = alpha / sqrt(r), so that a larger rank learns no slower (Kalajdzievski 2023, arXiv:2312.03732).
dora=true: DoRA (Liu et al. 2024, arXiv:2402.09353): h = m (W_0 + s B A) x / ||W_0 + s B A||, the norm being each row's, a constant to the
gradient, and m [n_out], which trains too, beginning as ||W_0||.

A begins as in PEFT, uniform within 1 / sqrt(n_in). `merge` adds the product to the matrix, `unmerge` takes it off again, both exact but for
rounding; convert.py makes a plain checkpoint of a merged one.
"""

import math
import zlib

import numpy as np

import ops
from adapters._peft import scale
from errors import Refused
from kernels.coded import at, dense

# ten times what suits all weights
LR = 1e-3
ALL = slice(None)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Options:
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0  # of the entries of x that the product gets, in training
    targets: str = "all"  # linears, joined by +: q_proj+v_proj
    rslora: bool = False
    dora: bool = False


def check(o):
    if o.rank < 1:
        raise ValueError(f"rank={o.rank} trains nothing: it must be at least 1")
    if not 0 < o.alpha < math.inf:
        raise ValueError(f"alpha={o.alpha} scales the product to nothing: it must be above 0")
    if not 0 <= o.dropout < 1:
        raise ValueError(f"dropout={o.dropout} is no share below 1: it must be at least 0")
    if wrong := [name for name in targets(o) if name not in LINEARS]:
        raise ValueError(f"targets={o.targets}: {wrong[0] or 'nothing'} is no linear: choose all, or of {'+'.join(LINEARS)}")


def targets(o):
    return LINEARS if o.targets == "all" else tuple(dict.fromkeys(o.targets.split("+")))


class Lora(ops.Linear):
    """A linear whose own weight, under its old name, is W_0."""

    def __init__(self, n_in, n_out, bias, o):
        super().__init__(n_in, n_out, bias)
        # what merged rows were multiplied by: they do not tell how long they were
        self.scale, self.dora, self._merged = scale(o.alpha, o.rank, o.rslora), o.dora, None
        self.dropout, self.seed = o.dropout, None
        self.lora_A, self.lora_B = ops.Linear(n_in, o.rank), ops.Linear(o.rank, n_out)
        if o.dora:
            self.lora_magnitude_vector = ops.Embedding(n_out, 1)

    def forward(self, x):
        return self.and_more(super().forward(x), x)

    def part(self, x, outs=ALL, ins=ALL):
        return self.and_more(super().part(x, outs, ins), x, outs, ins)

    def and_more(self, y, x, outs=ALL, ins=ALL):
        """What the frozen matrix made of x, and what trains beside it; of a part() that of the same part."""
        if self._merged is not None:
            return y
        more = self.more(x, outs, ins)
        if not self.dora:
            return y + more
        bias, ratio = getattr(self, "bias", None) if ins == ALL else None, ops.cast(self.ratio()[outs, 0], x.dtype)
        if bias is None:
            return ratio * (y + more)
        bias = ops.cast(bias[outs], x.dtype)
        return ratio * (y - bias + more) + bias

    def more(self, x, outs=ALL, ins=ALL):
        """s B A x."""
        return self.lora_B.part(self.scale * self.lora_A.part(self.dropped(x, ins), ins=ins), outs)

    def dropped(self, x, ins=ALL):
        if not self.dropout or self.seed is None:
            return x
        # a part of the input loses the entries that it loses in the whole
        stay = ops.chance((*x.shape[:-1], self.lora_A.weight.shape[1]), 1 - self.dropout, self.seed)
        return ops.where(stay[..., ins], x / (1 - self.dropout), 0.0)

    def product(self):
        """s B A, float32 [n_out, n_in]."""
        return self.scale * (ops.cast(self.lora_B.weight, ops.float32) @ ops.cast(self.lora_A.weight, ops.float32))

    def ratio(self):
        """m / ||W_0 + s B A||, float32 [n_out, 1]; without DoRA 1."""
        if not self.dora:
            return 1.0
        whole = ops.stop(dense(self.weight, ops.float32) + self.product())
        return ops.cast(self.lora_magnitude_vector.weight, ops.float32) / norm(whole)

    def matrix(self):
        if self._merged is not None:
            return self.weight
        return self.ratio() * (dense(self.weight, ops.float32) + self.product())

    def merge(self):
        if not ops.is_array(self.weight):
            raise Refused("a base of few bits would lose what is merged into it: convert.py merges into the base as it is on disk")
        ratio = self.ratio()
        ops.set_parameters(self, {"weight": ops.cast(ops.stop(self.matrix()), self.weight.dtype)})
        self._merged = ratio

    def unmerge(self):
        weight = ops.cast(self.weight, ops.float32) / self._merged - self.product()
        ops.set_parameters(self, {"weight": ops.cast(ops.stop(weight), self.weight.dtype)})
        self._merged = None


def norm(w):
    """The length of each row, [n_out, 1]."""
    return (w * w).sum(-1)[:, None] ** 0.5


def apply(model, o):
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name in targets(o):
                if linear := getattr(part, name, None):
                    n_out, n_in = linear.weight.shape
                    setattr(part, name, Lora(n_in, n_out, getattr(linear, "bias", None) is not None, o))


def initial(model, name, o):
    path, _, leaf = name.partition(".lora_")
    linear = at(model, path)
    if leaf == "magnitude_vector.weight":
        return norm(ops.stop(dense(linear.weight, ops.float32)))
    shape = getattr(linear, f"lora_{leaf[0]}").weight.shape
    if leaf == "B.weight":
        return ops.array(np.zeros(shape, "float32"))
    # the same whatever else is drawn, and in whatever order
    return ops.array(np.random.default_rng(zlib.crc32(name.encode())).uniform(-1, 1, shape).astype("float32") * shape[1] ** -0.5)


def trains(name, o):
    return ".lora_" in name


def adapted(model):
    """The model's Lora modules, in order."""
    parts = [part for block in model.model.layers for part in (block.self_attn, block.mlp)]
    return [found for part in parts for name in LINEARS if isinstance(found := getattr(part, name, None), Lora)]


def shake(model, seed):
    """Segments of a row drop the same entries."""
    for i, linear in enumerate(adapted(model)):
        linear.seed = None if seed is None else seed + (i << 32)


def merge(model):
    """Work the products into the matrices: the same model, as fast as the base. Where weights are bfloat16 they are rounded."""
    for linear in adapted(model):
        if linear._merged is None:
            linear.merge()


def unmerge(model):
    """Take the products out again."""
    for linear in adapted(model):
        if linear._merged is not None:
            linear.unmerge()
