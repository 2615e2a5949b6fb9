"""token() in Triton: the slots of each key head are shared out over S programs, and the last of them to finish adds the shares up.
Behind it: which slots stay when a segment closes, and how they move.

Symbols: K key heads, G query heads to each (GR: the power of two that holds them, GP: at least the 16 rows of a product), N slots, D head
width (DP: likewise a power of two), S shares. Scores are in base 2, and -1e30 where nothing may be seen, as in triton_.py. All query heads
of a key head are the rows of one product, so that keys and values are read once.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

import ops
from kernels.inline import compiled
from kernels.rows_triton import early
from kernels.spans import behaviours
from kernels.triton_ import INTERPRETED, MASKED, Maybe, layer_of, seen

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def turned(X, COS, SIN, d, D: tl.constexpr, P: tl.constexpr):
    """Heads at X, unturned and turned: pair i is (x_i, x_{i + P}), what is behind the pairs stays."""
    x = tl.load(X + d, mask=d < D, other=0.0).to(tl.float32)
    lower = d < P
    other = tl.load(X + tl.where(lower, d + P, d - P), mask=d < 2 * P, other=0.0).to(tl.float32)
    i = tl.where(lower, d, d - P)
    cos = tl.load(COS + i, mask=d < 2 * P, other=1.0)
    sin = tl.load(SIN + i, mask=d < 2 * P, other=0.0)
    return x, x * cos + tl.where(lower, -other, other) * sin


@triton.jit
def written(
    ROW, K, V, POS, BORN, RECENT, RECENT_AT, SCORE, COS, SIN, raw, q, h, heads, mine, n, p, begin, layer, N, first_slot,
    K_HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, W: tl.constexpr,
    RULE: tl.constexpr, DOCS: tl.constexpr, ALWAYS: tl.constexpr, OPENING: tl.constexpr,
):  # fmt: skip
    """The new token of key head h takes slot n. Its queries see it: the maximum, the sum and the values to go on from. K, V, POS: the
    head's own; first_slot: so many slots stand elsewhere, before these."""
    d = tl.arange(0, DP)[None, :]
    inside = d < D
    _, key = turned(ROW + (K_HEADS * G + h) * D, COS, SIN, d, D, P)
    value = tl.load(ROW + (K_HEADS * G + K_HEADS + h) * D + d, mask=inside, other=0.0).to(tl.float32)
    to = n.to(tl.int64) * D + d
    tl.store(K + to, key.to(K.dtype.element_ty), mask=inside)
    tl.store(V + to, value.to(V.dtype.element_ty), mask=inside)
    # where heads share positions all of them write the same
    tl.store(POS + n, p)
    if BORN is not None:
        tl.store(BORN + n, p)
    if RECENT is not None:
        tl.store(RECENT + (heads[:, None] * W + p % W) * D + d, raw.to(RECENT.dtype.element_ty), mask=mine[:, None] & inside)
        tl.store(RECENT_AT + p % W, p)
    own = tl.sum(q * key, 1)
    here = heads * 0
    see = seen(p + here, p + here, begin, first_slot + n + here, heads, layer, 0, RULE, True, DOCS, False, ALWAYS, OPENING)
    m = tl.where(see, own, MASKED)
    l = tl.where(see, 1.0, 0.0)
    if SCORE is not None:
        tl.store(SCORE + heads * N + n, m, mask=mine)
    return m, l, l[:, None] * value


@triton.jit
def looked(
    K, V, POS, SCORE, q, m, l, acc, start, stop, h, heads, mine, p, begin, layer, N, first_slot,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
    RULE: tl.constexpr, EACH: tl.constexpr, DOCS: tl.constexpr, ALWAYS: tl.constexpr, OPENING: tl.constexpr,
):  # fmt: skip
    """Queries q [GP, DP] over slots from start to stop, going on from m, l and acc."""
    d = tl.arange(0, DP)[None, :]
    inside = d < D
    for i in range(start, stop, BLOCK):
        slot = i + tl.arange(0, BLOCK)
        there = slot < stop
        kp = tl.load(POS + slot, mask=there, other=-1)[None, :]
        hp = h * G
        if EACH:
            # a rule's own variables may not change their shape
            kp += heads[:, None] * 0
            hp = kp * 0 + heads[:, None]
        row = slot.to(tl.int64)[:, None] * D + d
        k = tl.load(K + row, mask=there[:, None] & inside, other=0.0)
        e = tl.dot(q, tl.trans(k), input_precision="ieee")
        see = seen(p, kp, begin, first_slot + slot[None, :], hp, layer, 0, RULE, True, DOCS, False, ALWAYS, OPENING)
        e = tl.where(see, e, MASKED)
        if SCORE is not None:
            tl.store(SCORE + heads[:, None] * N + slot[None, :], e, mask=mine[:, None] & there[None, :])
        new = tl.maximum(m, tl.max(e, 1))
        # a row that has seen nothing yet has a maximum far below any score
        safe = tl.where(new > -1e20, new, 0.0)
        w = tl.math.exp2(e - safe[:, None])
        a = tl.math.exp2(m - safe)
        m = new
        l = l * a + tl.sum(w, 1)
        v = tl.load(V + row, mask=there[:, None] & inside, other=0.0)
        acc = tl.dot(w.to(v.dtype), v, acc * a[:, None], input_precision="ieee")
    return m, l, acc


@triton.jit
def added(
    PART, STAT, COUNT, OUT, LSE, N_USED, h,
    K_HEADS: tl.constexpr, G: tl.constexpr, GR: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    S: tl.constexpr, SP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The last of a head's S programs adds up what they left, the last of all moves the counter on. SP: a power of two that holds S."""
    # what all threads wrote must be there before one of them says so
    tl.debug_barrier()
    if tl.atomic_add(COUNT + h, 1) == S - 1:
        r = tl.arange(0, GR)
        s = tl.arange(0, SP)[:, None]
        each = (h * S + s) * GR + r[None, :]
        there = (r[None, :] < G) & (s < S)
        ms = tl.load(STAT + each * 2, mask=there, other=MASKED, cache_modifier=".cg")
        ls = tl.load(STAT + each * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
        top = tl.max(ms, 0)
        safe = tl.where(top > -1e20, top, 0.0)
        w = tl.math.exp2(ms - safe[None, :])
        total = tl.sum(ls * w, 0)
        total = tl.where(total > 0, total, 1.0)
        w /= total[None, :]
        for j in tl.static_range(0, DP, WIDE):
            c = j + tl.arange(0, WIDE)
            # many at once, so that one load does not wait for another
            parts = tl.load(PART + each[:, :, None] * DP + c[None, None, :], mask=there[:, :, None], other=0.0, cache_modifier=".cg")
            y = tl.sum(parts * w[:, :, None], 0)
            tl.store(OUT + (h * G + r)[:, None] * D + c[None, :], y.to(OUT.dtype.element_ty), mask=(r[:, None] < G) & (c[None, :] < D))
        if LSE is not None:
            tl.store(LSE + h * G + r, safe + tl.math.log2(total), mask=r < G)
        tl.store(COUNT + h, 0)
        if tl.atomic_add(COUNT + K_HEADS, 1) == K_HEADS - 1:
            # every program has read it
            tl.store(N_USED, tl.load(N_USED) + 1)
            tl.store(COUNT + K_HEADS, 0)


@triton.jit(do_not_specialize=["layer"])
def token_kernel(
    ROW, COS, SIN, AT, BEGIN, K, V, POS, N_USED, BORN, RECENT, RECENT_AT, SCORE, LSE, PART, STAT, COUNT, OUT,
    N, layer, scale,
    K_HEADS: tl.constexpr, POS_HEADS: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, GR: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    P: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, W: tl.constexpr,
    RULE: tl.constexpr, EACH: tl.constexpr, DOCS: tl.constexpr, ALWAYS: tl.constexpr, OPENING: tl.constexpr,
):  # fmt: skip
    """Program (h, s) reads share s of key head h; share 0 also sees to the new token."""
    h = tl.program_id(0)
    s = tl.program_id(1)
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)[None, :]
    mine = g < G
    heads = h * G + tl.minimum(g, G - 1)
    # a graph's warm-up may run beyond the slots
    n = tl.minimum(tl.load(N_USED), N - 1).to(tl.int32)
    p = tl.load(AT).to(tl.int32)
    begin = tl.load(BEGIN).to(tl.int32) if DOCS else 0
    raw, q = turned(ROW + heads[:, None] * D, COS, SIN, d, D, P)
    q *= scale * LOG2E
    m = tl.full([GP], MASKED, tl.float32)
    l = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, DP], tl.float32)
    K += h.to(tl.int64) * N * D
    V += h.to(tl.int64) * N * D
    POS += (h % POS_HEADS) * N
    if s == 0:
        m, l, acc = written(
            ROW, K, V, POS, BORN, RECENT, RECENT_AT, SCORE, COS, SIN, raw, q, h, heads, mine, n, p, begin, layer, N, 0,
            K_HEADS, G, D, DP, P, W, RULE, DOCS, ALWAYS, OPENING,
        )  # fmt: skip
    share = tl.cdiv(tl.cdiv(n, S), BLOCK) * BLOCK
    start = s * share
    m, l, acc = looked(
        K, V, POS, SCORE, q.to(K.dtype.element_ty), m, l, acc, start, tl.minimum(n, start + share), h, heads, mine, p, begin, layer, N, 0,
        G, D, DP, BLOCK, RULE, EACH, DOCS, ALWAYS, OPENING,
    )  # fmt: skip
    at = (h * S + s) * GR + g
    tl.store(PART + at[:, None] * DP + d, acc, mask=mine[:, None])
    tl.store(STAT + at * 2, m, mask=mine)
    tl.store(STAT + at * 2 + 1, l, mask=mine)
    added(PART, STAT, COUNT, OUT, LSE, N_USED, h, K_HEADS, G, GR, D, DP, S, S, WIDE)


@triton.jit
def mass_kernel(SCORE, LSE, MASS, N_USED, N, G: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """MASS += the weights of the newest token's queries, summed over those of a key head; its own slot begins with its own."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    h = tl.program_id(1)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.minimum(tl.load(N_USED), N).to(tl.int32)
    if tl.program_id(0) * BLOCK < n:
        total = tl.load(MASS + h * N + slot, mask=slot < n - 1, other=0.0)
        for j in tl.static_range(G):
            e = tl.load(SCORE + (h * G + j) * N + slot, mask=slot < n, other=MASKED)
            total += tl.math.exp2(e - tl.load(LSE + h * G + j))
        tl.store(MASS + h * N + slot, total, mask=slot < n)


def can(s, heads):
    """Is this a state that the kernel can work on? heads: of queries."""
    k, v = s["k"], s["v"]
    solid = all(x.is_contiguous() for x in s.values() if torch.is_tensor(x))
    fits = len(k) == 1 and k.shape == v.shape and k.dtype == v.dtype and k.shape[3] <= 256 and heads // k.shape[1] <= 16
    return (k.is_cuda or INTERPRETED) and solid and fits and torch.is_tensor(s["n"]) and s["pos"].dtype == torch.int32


@functools.cache
def scratch(device, H, *shape):
    """What the shares leave, counters that stand at 0 between two calls, and a log-sum-exp. One call at a time may run on a device."""
    made = lambda *shape: torch.empty(*shape, device=device, dtype=torch.float32)
    return made(*shape), made(*shape[:3], 2), torch.zeros(shape[0] + 1, device=device, dtype=torch.int32), made(H)


@functools.cache
def scores(device, H, N):
    return torch.empty(H, N, device=device, dtype=torch.float32)


@functools.cache
def differs(rule, heads):
    """Does a rule tell heads apart?"""
    return any(behaviours(rule, heads))


def shares(K, N):
    """How many programs read the slots of one key head: about as many in all as a large GPU has processors, or twice that if there is much
    to read; a power of two."""
    if INTERPRETED:
        # one after the other
        return 2
    return triton.next_power_of_2(max(1, 132 // K) // 2 + 1) * (2 if N >= 65536 else 1)


def token(row, turn, at, s, rule, begin=None, always=0, opening=0, scale=None, born=None, mass=None, recent=0):
    """See kernels.slots.plain."""
    k, pos, n = s["k"], s["pos"], s["n"]
    _, K, N, D = k.shape
    G, DP, S = row.shape[0] // D // K - 2, max(16, triton.next_power_of_2(D)), shares(K, N)
    GR = triton.next_power_of_2(G)
    part, stat, count, lse = scratch(row.device, K * G, K, S, GR, DP)
    score = scores(row.device, K * G, N) if mass else None
    y = row.new_empty(K * G * D)
    token_kernel[(K, S)](
        row, *turn, at, at if begin is None else begin, k, s["v"], pos, n, s[born] if born else None,
        s["q"] if recent else None, s["q_at"] if recent else None, score, lse if mass else None, part, stat, count, y,
        N, layer_of(rule), D**-0.5 if scale is None else scale,
        K, pos.shape[1], G, max(16, GR), GR, D, DP, turn[0].shape[-1], S, 64, min(DP, max(16, 8192 // (S * GR))), recent,
        compiled(rule), differs(rule, K * G), begin is not None, always, opening, num_warps=4, num_stages=3,
    )  # fmt: skip
    if mass:
        pdl = early(row.device)
        mass_kernel[(triton.cdiv(N, 256), K)](score, lse, s[mass], n, N, G, 256, pdl, **({"launch_pdl": True} if pdl else {}))
    return y, s


# ---------------------------------------------------------------- what stays when a segment closes


@triton.jit
def best_kernel(RANK, STAYS, INDEX, N, size, BLOCK: tl.constexpr):
    """Of each row of N numbers the `size` largest, of equal ones the first: for each entry whether it is one, or the indices, rising.

    Floats are whole numbers in the same order once those below zero are turned over; the least that belongs to the largest is found bit by
    bit, from the highest, which is one count each."""
    h = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    # a zero below zero is a zero
    bits = (tl.load(RANK + h * N + i, mask=i < N, other=0.0) + 0.0).to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000
    # behind all numbers, and what is none: an index may not lie outside the row
    key = tl.where(i < N, key, 0)
    least = tl.zeros([], tl.uint32)
    for b in range(32):
        more = least | (tl.full([], 0x80000000, tl.uint32) >> b)
        least = tl.where(tl.sum((key >= more).to(tl.int32)) >= size, more, least)
    above = (key > least).to(tl.int32)
    equal = (key == least).to(tl.int32)
    stays = above | (equal & (tl.cumsum(equal, 0) <= size - tl.sum(above)).to(tl.int32))
    if INDEX is not None:
        tl.store(INDEX + h * size + tl.cumsum(stays, 0) - 1, i, mask=stays > 0)
    else:
        tl.store(STAYS + h * N + i, stays, mask=i < N)


def looking(N):
    """How best_kernel is started on rows of N."""
    block = max(16, triton.next_power_of_2(N))
    return {"BLOCK": block, "num_warps": min(16, max(4, block // 512))}


@triton.jit
def order_kernel(KEY, ORDER, N, LAST: tl.constexpr, FEW: tl.constexpr, BLOCK: tl.constexpr):
    """Which entry of a row has a place in rising order, equal ones in the order in which they stand. Each is compared with each, which is
    faster than sorting as long as a row is short. LAST: a key behind all others. FEW divides BLOCK."""
    h = tl.program_id(1)
    first = tl.program_id(0) * FEW
    i = first + tl.arange(0, FEW)
    mine = tl.load(KEY + h * N + i, mask=i < N, other=0)[:, None]
    here = first // BLOCK * BLOCK
    before = tl.zeros([FEW, BLOCK], tl.int32)
    for a in range(0, N, BLOCK):
        j = a + tl.arange(0, BLOCK)
        other = tl.load(KEY + h * N + j, mask=j < N, other=LAST)[None, :]
        less = other < mine
        # an equal one comes first if it stands first, as all do in the blocks before this one
        if a < here:
            less = other <= mine
        elif a == here:
            less |= (other == mine) & (j[None, :] < i[:, None])
        before += less.to(tl.int32)
    tl.store(ORDER + h * N + tl.sum(before, 1), i, mask=i < N)


@triton.jit
def move(X, h, source, to, moves, blank, N, HEADS: tl.constexpr):
    """A field of one number a slot: the number at `source` to slot `to` if it moves; what it leaves is blank. X may be None."""
    if X is not None:
        if h < HEADS:
            x = tl.load(X + h * N + source)
            if moves > 0:
                tl.store(X + h * N + to, x)
            tl.store(X + h * N + source, (x * 0 + blank).to(X.dtype.element_ty))


@triton.jit
def fill_kernel(
    STAYS, K, V, POS, BORN, MASS, N, size,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, FRONT: tl.constexpr, BACK: tl.constexpr, POS_HEADS: tl.constexpr,
):  # fmt: skip
    """Slot size + i of key head h: if it stays it moves to the place of a slot before `size` that goes, the m-th to the m-th."""
    i = tl.program_id(0)
    h = tl.program_id(1)
    STAYS += (h % HEADS) * N
    back = tl.arange(0, BACK)
    moves = tl.load(STAYS + size + i)
    m = tl.sum(tl.load(STAYS + size + back, mask=back < i, other=0))
    front = tl.arange(0, FRONT)
    goes = 1 - tl.load(STAYS + front, mask=front < size, other=1)
    # so many slots are not behind the m-th that goes
    to = tl.sum(((tl.cumsum(goes, 0) <= m) & (front < size)).to(tl.int32))
    source = size + i
    d = tl.arange(0, DP)
    at = h.to(tl.int64) * N * D + d
    row = d < D * moves
    tl.store(K + at + to * D, tl.load(K + at + source * D, mask=row, other=0.0), mask=row)
    tl.store(V + at + to * D, tl.load(V + at + source * D, mask=row, other=0.0), mask=row)
    move(POS, h, source, to, moves, -1, N, POS_HEADS)
    move(BORN, h, source, to, moves, -1, N, 1)
    move(MASS, h, source, to, moves, 0, N, 1 << 20)


def keeps(s, fields):
    """Can the kernels do it? A static state of keys and values, and beside positions no more than fill_kernel moves."""
    narrow = [s[f] for f in fields if s[f].ndim == 3 and f != "pos"]
    if [f for f in fields if s[f].ndim == 4] != ["k", "v"] or s["pos"].shape[2] > MOST or torch.is_grad_enabled():
        return False
    born, mass = ([x for x in narrow if x.dtype == t] for t in (torch.int32, torch.float32))
    known = len(born) + len(mass) == len(narrow) and len(born) < 2 and len(mass) < 2 and all(x.shape[1] == 1 for x in born)
    return known and (ops.tracing() or can(s, s["k"].shape[1]))


MOST = 1 << 14  # slots that one program looks through, or that are compared each with each


@torch.library.custom_op("nanolong::keep", mutates_args=("k", "v", "pos", "born", "mass"))
def keep_op(rank: Tensor, k: Tensor, v: Tensor, pos: Tensor, born: Maybe, mass: Maybe, size: int) -> None:
    (_, K, N, D), heads = k.shape, rank.shape[1]
    stays = torch.empty(heads, N, device=k.device, dtype=torch.int32)
    best_kernel[(heads,)](rank.contiguous(), stays, None, N, size, **looking(N))
    front, back = triton.next_power_of_2(size), triton.next_power_of_2(N - size)
    shape = heads, D, triton.next_power_of_2(D), front, back, pos.shape[1]
    fill_kernel[(N - size, K)](stays, k, v, pos, born, mass, N, size, *shape)


@keep_op.register_fake
def _(rank, k, v, pos, born, mass, size):
    return None


def keep(rank, s, fields, size):
    """See kernels.slots.kept."""
    narrow = {s[f].dtype: s[f] for f in fields if s[f].ndim == 3 and f != "pos"}
    if size < s["pos"].shape[2]:
        keep_op(rank, s["k"], s["v"], s["pos"], narrow.get(torch.int32), narrow.get(torch.float32), size)
    return s


@torch.library.custom_op("nanolong::order", mutates_args=())
def order_op(key: Tensor) -> Tensor:
    out = torch.empty(key.shape, device=key.device, dtype=torch.int32)
    N = key.shape[-1]
    # where there is much to do keys are read less often
    few = 4 if key.numel() <= 1 << 14 else 16
    last = float("inf") if key.is_floating_point() else 2**31 - 1
    order_kernel[(triton.cdiv(N, few), key.numel() // N)](key.contiguous(), out, N, last, few, 4096 // few)
    return out


@order_op.register_fake
def _(key):
    return torch.empty_like(key, dtype=torch.int32)


def order(key):
    """See kernels.slots.order."""
    return order_op(key)


def orders(key):
    """Can the kernel do it, and is it the faster way?"""
    return (key.is_cuda or INTERPRETED) and key.shape[-1] <= MOST and not torch.is_grad_enabled()


@torch.library.custom_op("nanolong::best", mutates_args=())
def best_op(rank: Tensor, size: int) -> Tensor:
    out = torch.empty(*rank.shape[:-1], size, device=rank.device, dtype=torch.int32)
    N = rank.shape[-1]
    best_kernel[(rank.numel() // N,)](rank.contiguous(), None, out, N, size, **looking(N))
    return out


@best_op.register_fake
def _(rank, size):
    return torch.empty(*rank.shape[:-1], size, device=rank.device, dtype=torch.int32)


def best(rank, size):
    """See kernels.slots.best."""
    N = rank.shape[-1]
    if N <= MOST:
        return best_op(rank, size)
    # the largest of all are among the largest of each part
    parts = torch.nn.functional.pad(rank, (0, -N % MOST), value=-float("inf")).unflatten(-1, (-1, MOST))
    at = best_op(parts, size)
    some = (at + MOST * torch.arange(len(parts[0, 0]), device=at.device, dtype=at.dtype)[:, None]).flatten(-2)
    return ops.take(some, best_op(parts.gather(-1, at.long()).flatten(-2), size))


def chooses(rank, size):
    """Can the kernel do it?"""
    few = size * triton.cdiv(rank.shape[-1], MOST) <= MOST
    return (rank.is_cuda or INTERPRETED) and rank.dtype == torch.float32 and few and not torch.is_grad_enabled()
