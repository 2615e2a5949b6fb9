"""Keys and values in 8 or 4 bits (in the manner of KIVI, Liu et al. 2024, arXiv:2402.02750), under the budget of another memory.

    Q(x) = round((x - z) / s), z = min x, s = (max x - min x) / (2^bits - 1)    (x' = Q(x) s + z), over a group of channels of a token

s and z are float16: at 32 channels 5 bits a number, or 9. As in KIVI what is newest stays exact: here the open segment. When it closes,
it is quantised, once and for all. KIVI groups keys by channel over 32 tokens, and values by token; here both are grouped by token, for
tokens are forgotten one by one; an outlying channel spoils no more than its own group. Keys are quantised before they are turned by
their positions (as in KVQuant, arXiv:2401.18079) and turned each time they are seen: what they lose does not depend on where they stand.
KIVI's kernels read the codes; here a layer's codes are made floats for as long as it attends: the state is small, a layer at work is not.

Which tokens stay is another memory's choice, `keep`, with its own defaults: quantised:bits=4,keep=snapkv,budget=4096.
"""

import functools

import ops
import plugins
from memory._past import Past

POLICIES = ("window", "h2o", "tova", "snapkv", "keydiff", "pyramidkv", "adakv", "expected")
CODES = ("k_code", "k_scale", "v_code", "v_scale")


class Options:
    budget: int = 4096  # tokens kept
    bits: int = 8  # or 4
    channels: int = 32  # neighbours that share s and z
    keep: str = "window"
    layer: int = 0
    n_layer: int = 1


def policy(o):
    """The module of the memory that chooses, and its Options."""
    module = plugins.load("memory", o.keep)
    here = {f: getattr(o, f) for f in ("budget", "layer", "n_layer") if f in module.Options.__dataclass_fields__}
    return module, module.Options(**here)


def check(o):
    if o.bits not in (4, 8):
        raise ValueError(f"bits={o.bits} is not known: choose 4 or 8")
    if o.channels < 1:
        raise ValueError(f"channels={o.channels}: a group has at least 1")
    if o.keep not in POLICIES:
        raise ValueError(f"keep={o.keep} is not known: choose one of {', '.join(POLICIES)}")
    module, inner = policy(o)
    module.check(inner)


class Memory(Past):
    """What is past is held as codes and scales, and the other fields as they are."""

    def __new__(cls, c, o, *rest):
        return super().__new__(over(cls, policy(o)[0].Memory))

    def __init__(self, c, o):
        super().__init__(c, policy(o)[1])
        if c.head_dim % o.channels or c.head_dim % 2:
            raise ValueError(f"channels={o.channels} must divide head_dim={c.head_dim}, which must be even")
        self.bits, self.channels, self.unturned = o.bits, o.channels, True

    def sealed(self, s):
        """The codes and scales of s["k"] and s["v"], by their fields."""
        return dict(zip(CODES, (*encode(s["k"], self.bits, self.channels), *encode(s["v"], self.bits, self.channels))))

    def folded(self, t):
        return super().folded({f: a for f, a in t.items() if f not in ("k", "v")})

    def unfolded(self, past, like):
        past = super().unfolded(past, like)
        return {**past, **{f: decode(past[f"{f}_code"], past[f"{f}_scale"], self.bits, like[f].dtype) for f in "kv"}}


@functools.cache
def over(kind, chooses):
    """The class `kind` on top of the policy's own."""
    return type("Memory", (kind, chooses), {"fields": (*chooses.fields, *CODES)})


def encode(x, bits, channels):
    """[..., D] -> codes uint8 [..., D * bits / 8], and s and z of each group float16 [..., 2 D / channels]."""
    code, *scales = codes(x, bits, channels, ops.float16)
    return code, ops.cat(scales, -1)


def decode(code, scale, bits, dtype):
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
