"""Keys and values as codes of 8 or 4 bits, and what a layer does with one token where its past is held so (slots.token otherwise).

    Q(x) = round((x - z) / s), z = min x, s = (max x - min x) / (2^bits - 1)    (x' = Q(x) s + z), over a group of channels of a token

Plainly on every backend; on CUDA by a kernel that makes no floats of keys: q x' = s (q Q(x)) + z sum(q) over each group.
"""

import ops
from kernels import ENGINE, TRITON, Places, attend, slots

CODES = ("k_code", "k_scale", "v_code", "v_scale")


def encode(x, bits, channels):
    """[..., D] -> codes uint8 [..., D * bits / 8], and s and z of each group float16 [..., 2 D / channels]."""
    code, *scales = codes(x, bits, channels, ops.float16)
    return code, ops.cat(scales, -1)


def decode(code, scale, bits, dtype):
    """The inverse: [..., D] of this dtype."""
    return numbers(code, *ops.split(scale, 2, -1), bits, dtype)


def codes(x, bits, channels, dtype):
    """[..., D] -> codes uint8 [..., D * bits / 8], the first of two in a byte's lower half; s and z [..., D / channels] of this dtype."""
    x = ops.stop(ops.cast(x, ops.float32))
    groups = x.reshape(*x.shape[:-1], -1, channels)
    top, low = ops.amax(groups, -1), -ops.amax(-groups, -1)
    scale = (top - low) / (2**bits - 1)
    # as they will be read
    scale, low = (ops.cast(ops.cast(a, dtype), ops.float32) for a in (ops.where(scale < 1e-6, 1e-6, scale), low))
    code = ops.minimum(ops.nearest((groups - low) / scale), 2**bits - 1)
    code = ops.cast(ops.where(code < 0, 0, code), ops.int32).reshape(x.shape)
    code = code[..., ::2] + 16 * code[..., 1::2] if bits == 4 else code
    return ops.cast(code, ops.uint8), *(ops.cast(a[..., 0], dtype) for a in (scale, low))


def numbers(code, scale, low, bits, dtype):
    """The inverse of codes()."""
    code = ops.cast(code, ops.int32)
    if bits == 4:
        code = ops.cat([(code % 16)[..., None], (code // 16)[..., None]], -1)
    s, z = (ops.cast(a, ops.float32)[..., None] for a in (scale, low))
    x = ops.cast(code, ops.float32).reshape(*scale.shape, -1) * s + z
    return ops.cast(x.reshape(*scale.shape[:-1], -1), dtype)


def plain(row, turn, at, s, past, rule, begin=None, bits=8, always=0, opening=0, scale=None, born=None, recent=0):
    """The specification: slots.plain() where slots stand before those of s, as codes. Keys are turned.

    past: their CODES [1, K, M, ...] and pos [1, 1 or K, M]. bits: of a code. All else as there; `always` counts the past's slots first.
    """
    q, s = slots.written(row, turn, at, s, born, None, recent)
    k, v = (ops.cat([decode(past[f"{f}_code"], past[f"{f}_scale"], bits, s[f].dtype), s[f]], 2) for f in "kv")
    y = attend(q, k, v, Places(at), Places(ops.cat([past["pos"], s["pos"]], 2)), rule, begin, always, opening, scale)
    return y.reshape(-1), {**s, "n": ops.advance(s["n"], 1)}


def join(worst, past, new):
    """`new`, fields of R slots, joins the M slots of a past that holds the same fields, in place. Of all M + R slots those at worst
    [1, 1 or K, R], in rising order, go: the new ones that stay take the places of the old ones that go. Returns the past."""
    M, R = past["pos"].shape[2], new["pos"].shape[2]
    if ENGINE in ("auto", "triton") and joins(past):
        return join_kernel(worst, past, new)
    slots_ = ops.expand(ops.arange(M, worst)[None, None], (*worst.shape[:2], M))
    goes = (slots_[..., None] == worst[..., None, :]).sum(-1) > 0
    stays = (ops.arange(R, worst)[:, None] + M == worst[..., None, :]).sum(-1) == 0
    # the m-th that stays to the m-th that goes
    source = ops.sort_by(ops.where(stays, 0, 1), ops.expand(ops.arange(R, worst)[None, None], (*worst.shape[:2], R)))
    turn = ops.cumsum(ops.cast(goes, ops.int32), 2) - 1
    at = ops.where(goes, M + ops.take(source, ops.where(turn < 0, 0, turn)), slots_)
    return {
        f: ops.take(ops.cat([a, ops.cast(new[f], a.dtype)], 2), at if at.shape[1] <= a.shape[1] else at[:, :1]) for f, a in past.items()
    }


if TRITON:
    from kernels.codes_triton import can, joins, token
    from kernels.codes_triton import join as join_kernel
else:
    token, can, joins = plain, lambda s, past, heads, bits: False, lambda past: False
