"""attend(), as a specification: the mask from the rule, scores in float32, softmax, product. Nothing clever."""

import ops


def visible(q_at, k_at, rule, begin, always, opening, heads):
    """May query t see key n? bool [B, 1 or H, T, N]. One comparison covers empty slots, padding and documents: an empty
    slot stands at -1, and no query's document begins below 0. Padding queries see everything, so no softmax is empty."""
    q, k = q_at.at[..., None], k_at.at[..., None, :]  # [B, 1, T, 1], [B, 1 or K, 1, N]
    if k.shape[1] > 1:
        k = ops.repeat(k, heads // k.shape[1], 1)
    b = 0 if begin is None else begin[..., None]
    h = ops.arange(heads, k).reshape(heads, 1, 1)
    return sees(q, k, b, h, ops.arange(k.shape[-1], k), rule, always, opening)


def sees(q, k, b, h, n, rule, always, opening):
    """May a query at position q, its document beginning at b, see the n-th key, at position k, in head h? Arrays that broadcast."""
    see = rule.module.allowed(q - b, k - b, h, rule.options)
    if always:
        see = see | (n < always)
    if opening:
        see = see | (k - b < opening)
    return (see & (k <= q) & (k >= b)) | (q < 0)


def biases(q_at, k_at, bias, heads):
    """What is added to the logits, [B, H, T, N]. Slopes are constants: they have no gradient."""
    k = ops.repeat(k_at.at, heads // k_at.at.shape[1], 1)
    distance = q_at.at[..., None] - k[..., None, :]
    if bias.slope is not None:
        return -ops.stop(bias.slope)[:, None, None] * distance
    H, R = bias.table.shape
    at = ops.where(distance < 0, 0, ops.minimum(distance, R - 1)) + ops.arange(H, distance).reshape(H, 1, 1) * R
    return ops.entries(bias.table.reshape(-1), at.reshape(-1), 0).reshape(at.shape)


def attend(q, k, v, q_at, k_at, rule, begin=None, always=0, opening=0, scale=None, bias=None, lse=False):
    """See kernels.attend. Queries that may see nothing give zeros."""
    H, D = q.shape[1], q.shape[3]
    see = visible(q_at, k_at, rule, begin, always, opening, H)
    k, v = (ops.cast(ops.repeat(x, H // k.shape[1], 1), ops.float32) for x in (k, v))
    s = ops.cast(q, ops.float32) @ ops.swap(k, 2, 3) * (D**-0.5 if scale is None else scale)
    if bias is not None:
        s = s + biases(q_at, k_at, bias, H)
    s = ops.where(see, s, -1e30)
    p = ops.softmax(s, -1) * ops.cast(see, ops.float32)
    y = ops.cast(p @ v, q.dtype)
    return (y, ops.where(ops.amax(see, -1)[..., 0], ops.logsumexp(s, -1), -float("inf"))) if lse else y


def weights(q, k, q_at, k_at, rule, begin=None, always=0, opening=0, scale=None, bias=None):
    """The weights that attend() gives to keys, [B, H, T, N] in float32: what a memory's scores are made of. Padding gives none."""
    (B, H, T, D), K = q.shape, k.shape[1]
    # [B, K, H / K, T, N]: what does not differ between the heads that share a key head is made once for them
    at, keys = q_at.at[:, :, None, :, None], k_at.at[:, :, None, None]
    b, h = 0 if begin is None else begin[:, :, None, :, None], ops.arange(H, keys).reshape(K, -1, 1, 1)
    see = sees(at, keys, b, h, ops.arange(keys.shape[-1], keys), rule, always, opening)
    s = ops.cast(q.reshape(B, K, -1, D) @ ops.swap(k, 2, 3), ops.float32).reshape(B, K, H // K, T, -1)
    s = s * (D**-0.5 if scale is None else scale)
    if bias is not None:
        s = s + biases(q_at, k_at, bias, H).reshape(-1, *s.shape[1:])
    p = ops.softmax(ops.where(see, s, -1e30), -1) * ops.cast(see & (at >= 0), ops.float32)
    return p.reshape(B, H, T, -1)
