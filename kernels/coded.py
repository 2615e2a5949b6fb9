"""Matrices that stay as they are, in 4 or 8 bits: the base under an adapter, as in QLoRA (Dettmers et al. 2023, arXiv:2305.14314).

    W' = s q + z,   q = round((W - z) / s),   z = min W,   s = (max W - min W) / (2^bits - 1)      over 64 neighbours in a row, or 32

s and z have the dtype of the activations: 4.5 bits a number where that has 16, or 8.5. It is the format that MLX's own products read
(mx.quantized_matmul), and both backends hold the same numbers. mx.quantize's own codes make zero exact, and normal weights lose more by
it. QLoRA's NF4 has a table, which MLX's products do not read.

Of the model the linears of its blocks are held so (--base-bits): not the embedding, the head and the norms.
Gradients reach x and what is beside the matrix, never the codes. The adapter's own weights stay float32; on disk nothing changes.
"""

import functools

import ops
from kernels import ENGINE, TRITON
from kernels.codes import codes, numbers

BITS = 4, 8
GROUPS = 64, 32

if TRITON:
    from kernels import frozen_triton as fused


class Coded:
    """W [n_out, n_in] as codes: stands in a linear where its matrix stood."""

    requires_grad = False

    def __init__(self, w, bits, dtype):
        self.shape, self.bits, self.dtype, self.group = tuple(w.shape), bits, dtype, group(w.shape[1])
        self.code, self.scale, self.low = codes(w, bits, self.group, dtype)
        # now, or a lazy backend would hold what they were made of
        ops.wait([self.code, self.scale, self.low])

    def nbytes(self):
        return sum(map(ops.nbytes, (self.code, self.scale, self.low)))

    def dense(self, dtype):
        """W' as an array."""
        if TRITON and ENGINE in ("auto", "triton") and fused.can(self.code) and not ops.tracing():
            return fused.dequantise(self, self.scale.new_empty(self.shape, dtype=dtype))
        return numbers(self.code, self.scale, self.low, self.bits, dtype)


def group(n_in):
    """So many neighbours in a row of n_in share s and z; 0: it cannot be parted."""
    return next((g for g in GROUPS if n_in % g == 0), 0)


def dense(w, dtype):
    """A linear's weight, whatever it is held as."""
    return ops.cast(w, dtype) if ops.is_array(w) else w.dense(dtype)


def names(model):
    """Which of a model's parameters its config wants to be held so. Raises ValueError where that cannot be."""
    c = model.config
    if c.base_bits == 16:
        return set()
    if c.base_bits not in BITS:
        raise ValueError(f"{c.base_bits} bits are not known: choose 4 or 8, or 16 for the base as it is")
    found = {n: p for n, p in ops.parameters(model).items() if n.startswith("model.layers.") and n.endswith("_proj.weight")}
    for name, p in found.items():
        if not group(p.shape[1]):
            raise ValueError(f"{GROUPS[-1]} neighbours in a row share a scale, and {name} has rows of {p.shape[1]}: take 16")
        if model.adapter.name != "full" and model.trains(name):
            raise ValueError(f"codes take no gradient, and --adapter {model.adapter} trains {name}: take 16")
    return set(found)


def held(model):
    """Name -> Coded of the matrices that are held so."""
    return {name: at(model, name) for name in sorted(model.coded)}


def at(model, name):
    """What is at a path of names."""
    return functools.reduce(lambda m, step: m[int(step)] if step.isdigit() else getattr(m, step), name.split("."), model)


def hold(model):
    """Let a model that has its weights hold them so."""
    arrays = ops.parameters(model)
    for name in model.coded & arrays.keys():
        ops.set_parameters(model, {name: Coded(arrays[name], model.config.base_bits, arrays[name].dtype)})
