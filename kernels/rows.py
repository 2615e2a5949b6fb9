"""product(): matrices times one row, plainly on every backend, on CUDA by a kernel that streams the weights as fast as memory gives them.

A norm before the product is in it: w norm(x) = (w (x * gain)) / sqrt(mean(x^2) + eps), so that x is read once, and what the norm divides by
is known when the sums are. So are the gate after it, silu(gate) * up, and the residual.
"""

import ops
from kernels import TRITON


def plain(x, weights, gain=None, eps=0.0, residual=None, gated=False, dtype=None):
    """The specification. x [C]; weights: matrices [n, C], whose products stand behind each other in the answer; gain [C]: of an RMSNorm
    before them, of which eps is the epsilon; gated: there are two matrices, and the answer is silu(first) * second; residual: what is
    added; dtype: the answer's, None: that of x. Sums in float32."""
    x, out = ops.cast(x, ops.float32), x.dtype if dtype is None else dtype
    if gain is not None:
        x = x * ((x * x).mean() + eps) ** -0.5 * ops.cast(gain, ops.float32)
    parts = [ops.cast(w, ops.float32) @ x for w in weights]
    y = ops.silu(parts[0]) * parts[1] if gated else ops.cat(parts, 0)
    return ops.cast(y if residual is None else y + ops.cast(residual, ops.float32), out)


if TRITON:
    from kernels.rows_triton import can, product
else:
    product, can = plain, lambda x: False
