"""codes.token() in Triton: as slots_triton.py does it, the past's slots being codes. Symbols as there, and

GC groups of channels that share s and z, R = GB GC rows of a product, GB >= G heads, M slots of the past, DB bytes of a slot's codes
(DW: the power of two that holds them), PLANES codes in a byte, of channels PLANES i + j.

A row of the product is a query head's part in one group of channels, so that a product gives what each group's s and z multiply, and the
16 rows of the smallest product are used. Keys are multiplied as they are: queries become integers of two digits of 8 bits (2^-16 of their
group's largest), the product of integers is exact. Values become float16, exactly, in one instruction for four and one more for two.
"""

import torch
import triton
import triton.language as tl

from kernels.inline import compiled
from kernels.slots_triton import LOG2E, added, differs, looked, scratch, turned, written
from kernels.triton_ import INTERPRETED, MASKED, layer_of, seen

DIGIT = tl.constexpr(254)  # what a query's second digit counts to
SECOND = tl.constexpr("shr.u32 b, $2, 4; and.b32 b, b, 0x0F0F0F0F;")
WIDEST = tl.constexpr(16384.0)  # the largest weight times s, in float16


@triton.jit
def plane(code, j: tl.constexpr, PLANES: tl.constexpr, FAST: tl.constexpr):
    """The j-th codes of bytes, as int8: those of 8 bits less 128."""
    if PLANES == 1:
        if FAST:
            return tl.inline_asm_elementwise("xor.b32 $0, $1, 0x80808080;", "=r,r", [code], dtype=tl.int8, is_pure=True, pack=4)
        return (code.to(tl.int32) - 128).to(tl.int8)
    if FAST:
        if j == 0:
            return tl.inline_asm_elementwise("and.b32 $0, $1, 0x0F0F0F0F;", "=r,r", [code], dtype=tl.int8, is_pure=True, pack=4)
        return tl.inline_asm_elementwise(
            "{ .reg .b32 a; shr.u32 a, $1, 4; and.b32 $0, a, 0x0F0F0F0F; }", "=r,r", [code], dtype=tl.int8, is_pure=True, pack=4
        )
    return ((code.to(tl.int32) >> (4 * j)) & 15).to(tl.int8)


@triton.jit
def half(code, j: tl.constexpr, PLANES: tl.constexpr, FAST: tl.constexpr):
    """The j-th codes of bytes, as float16: the bits of 1024 + c end in those of c."""
    if FAST:
        # called pure, it would be done behind the shared memory, whose bytes are then read one by one for want of an order
        first: tl.constexpr = "mov.b32 b, $2;" if PLANES == 1 else "and.b32 b, $2, 0x0F0F0F0F;" if j == 0 else SECOND
        return tl.inline_asm_elementwise(
            "{ .reg .b32 a; .reg .b32 b; mov.b32 a, 0x64006400; " + first + " prmt.b32 $0, b, a, 0x5150; prmt.b32 $1, b, a, 0x5352;"
            " sub.f16x2 $0, $0, a; sub.f16x2 $1, $1, a; }",
            "=&r,=&r,r", [code], dtype=tl.float16, is_pure=False, pack=4,
        )  # fmt: skip
    if PLANES == 2:
        return ((code.to(tl.int32) >> (4 * j)) & 15).to(tl.float16)
    return code.to(tl.float16)


@triton.jit
def pair(x, GC: tl.constexpr, BLOCK: tl.constexpr):
    """s and z [GC, BLOCK] as they stand beside each other, [BLOCK, 2 GC]."""
    s, z = tl.split(tl.permute(tl.reshape(x.to(tl.float32), (BLOCK, 2, GC)), (2, 0, 1)))
    return s, z


@triton.jit
def digits(x, unit):
    """x / unit as two digits, int8: hi + lo / DIGIT."""
    x = x / unit
    hi = tl.floor(x + 0.5)
    lo = tl.floor((x - hi) * DIGIT + 0.5)
    return hi.to(tl.int8), lo.to(tl.int8)


@triton.jit(do_not_specialize=["layer"])
def codes_kernel(
    ROW, COS, SIN, AT, BEGIN, K, V, POS, N_USED, BORN, RECENT, RECENT_AT, KC, KS, VC, VS, PAST, PART, STAT, COUNT, OUT,
    N, M, layer, scale,
    K_HEADS: tl.constexpr, POS_HEADS: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, GR: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    P: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, W: tl.constexpr,
    GB: tl.constexpr, GC: tl.constexpr, PLANES: tl.constexpr, DW: tl.constexpr, FAST: tl.constexpr,
    RULE: tl.constexpr, EACH: tl.constexpr, DOCS: tl.constexpr, ALWAYS: tl.constexpr, OPENING: tl.constexpr,
):  # fmt: skip
    """Program (h, s): share 0 of key head h is the open segment and the new token, the others are the past's."""
    h = tl.program_id(0)
    s = tl.program_id(1)
    p = tl.load(AT).to(tl.int32)
    begin = tl.load(BEGIN).to(tl.int32) if DOCS else 0
    part = (h * S + s) * GR
    if s == 0:
        g = tl.arange(0, GP)
        d = tl.arange(0, DP)[None, :]
        mine = g < G
        heads = h * G + tl.minimum(g, G - 1)
        # a graph's warm-up may run beyond the slots
        n = tl.minimum(tl.load(N_USED), N - 1).to(tl.int32)
        raw, q = turned(ROW + heads[:, None] * D, COS, SIN, d, D, P)
        q *= scale * LOG2E
        k = K + h.to(tl.int64) * N * D
        v = V + h.to(tl.int64) * N * D
        pos = POS + (h % POS_HEADS) * N
        m, l, acc = written(
            ROW, k, v, pos, BORN, RECENT, RECENT_AT, None, COS, SIN, raw, q, h, heads, mine, n, p, begin, layer, N, M,
            K_HEADS, G, D, DP, P, W, RULE, DOCS, ALWAYS, OPENING,
        )  # fmt: skip
        m, l, acc = looked(
            k, v, pos, None, q.to(K.dtype.element_ty), m, l, acc, 0, n, h, heads, mine, p, begin, layer, N, M,
            G, D, DP, 64, RULE, EACH, DOCS, ALWAYS, OPENING,
        )  # fmt: skip
        tl.store(PART + (part + g)[:, None] * DP + d, acc, mask=mine[:, None])
        tl.store(STAT + (part + g) * 2, m, mask=mine)
        tl.store(STAT + (part + g) * 2 + 1, l, mask=mine)
    else:
        share = tl.cdiv(tl.cdiv(M, S - 1), BLOCK) * BLOCK
        start = (s - 1) * share
        c = h.to(tl.int64) * M * (D // PLANES)
        sz = h.to(tl.int64) * M * (2 * GC)
        remembered(
            ROW, COS, SIN, KC + c, KS + sz, VC + c, VS + sz, PAST + (h % POS_HEADS) * M,
            PART, STAT, part, start, tl.minimum(M, start + share),
            h, p, begin, layer, scale * LOG2E,
            G, GR, D, DP, P, BLOCK, GB, GC, PLANES, DW, FAST, RULE, EACH, DOCS, ALWAYS, OPENING,
        )  # fmt: skip
    added(PART, STAT, COUNT, OUT, None, N_USED, h, K_HEADS, G, GR, D, DP, S, SP, WIDE)


@triton.jit
def remembered(
    ROW, COS, SIN, KC, KS, VC, VS, POS, PART, STAT, part, start, stop, h, p, begin, layer, scale,
    G: tl.constexpr, GR: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
    GB: tl.constexpr, GC: tl.constexpr, PLANES: tl.constexpr, DW: tl.constexpr, FAST: tl.constexpr,
    RULE: tl.constexpr, EACH: tl.constexpr, DOCS: tl.constexpr, ALWAYS: tl.constexpr, OPENING: tl.constexpr,
):  # fmt: skip
    """The head's queries over the codes of slots from start to stop."""
    R: tl.constexpr = GB * GC
    DB: tl.constexpr = D // PLANES
    C: tl.constexpr = D // GC
    r = tl.arange(0, R)
    b = tl.arange(0, DW)[None, :]
    row = ROW + (h * G + tl.minimum(r // GC, G - 1))[:, None] * D
    # the queries: row (g, c) is head g in the channels of group c
    d0 = b * PLANES
    d1 = b * PLANES + (PLANES - 1)
    _, q0 = turned(row, COS, SIN, d0, D, P)
    q0 = tl.where((d0 < D) & (d0 // C == (r % GC)[:, None]), q0, 0.0)
    _, q1 = turned(row, COS, SIN, d1, D, P)
    q1 = tl.where((d1 < D) & (d1 // C == (r % GC)[:, None]), q1, 0.0)
    unit = tl.maximum(tl.maximum(tl.max(tl.abs(q0), 1), tl.max(tl.abs(q1), 1)), 1e-30) / 127
    hi0, lo0 = digits(q0, unit[:, None])
    hi1, lo1 = digits(q1, unit[:, None])
    total = tl.sum(hi0.to(tl.int32) * DIGIT + lo0.to(tl.int32), 1)
    if PLANES == 2:
        total += tl.sum(hi1.to(tl.int32) * DIGIT + lo1.to(tl.int32), 1)
    unit = tl.reshape(unit * (scale / DIGIT), (GB, GC))
    total = tl.reshape(total.to(tl.float32), (GB, GC)) * unit
    # what was taken from codes of 8 bits
    off: tl.constexpr = 128 if PLANES == 1 else 0
    gb = tl.arange(0, GB)
    heads = h * G + tl.minimum(gb, G - 1)
    group = tl.arange(0, 2 * GC)[None, :]
    m = tl.full([GB], MASKED, tl.float32)
    # sums over slots are kept by lane, and added up at the end
    l = tl.zeros([GB, BLOCK], tl.float32)
    zero = tl.zeros([GB, GC, BLOCK], tl.float32)
    acc0 = tl.zeros([R, DW], tl.float32)
    acc1 = tl.zeros([R, DW], tl.float32)
    # the largest s so far: weights times s are counted in it, for float16 does not reach far down
    large = 1e-9
    for i in range(start, stop, BLOCK):
        slot = i + tl.arange(0, BLOCK)
        there = slot < stop
        kp = tl.load(POS + slot, mask=there, other=-1)[None, :]
        hp = h * G
        if EACH:
            # a rule's own variables may not change their shape
            kp += heads[:, None] * 0
            hp = kp * 0 + heads[:, None]
        at = slot.to(tl.int64)[:, None] * DB + b
        code = tl.load(KC + at, mask=there[:, None] & (b < DB), other=0)
        sz = slot[:, None] * (2 * GC) + group
        ks, kz = pair(tl.load(KS + sz, mask=there[:, None], other=0.0), GC, BLOCK)
        k0 = tl.trans(plane(code, 0, PLANES, FAST))
        hi = tl.dot(hi0, k0, out_dtype=tl.int32)
        lo = tl.dot(lo0, k0, out_dtype=tl.int32)
        if PLANES == 2:
            k1 = tl.trans(plane(code, 1, PLANES, FAST))
            hi = tl.dot(hi1, k1, hi, out_dtype=tl.int32)
            lo = tl.dot(lo1, k1, lo, out_dtype=tl.int32)
        e = tl.reshape((hi * DIGIT + lo).to(tl.float32), (GB, GC, BLOCK)) * unit[:, :, None]
        e = e * ks[None, :, :] + (kz + off * ks)[None, :, :] * total[:, :, None]
        e = tl.sum(e, 1)
        see = seen(p, kp, begin, slot[None, :], hp, layer, 0, RULE, True, DOCS, False, ALWAYS, OPENING)
        e = tl.where(see, e, MASKED)
        new = tl.maximum(m, tl.max(e, 1))
        # a row that has seen nothing yet has a maximum far below any score
        safe = tl.where(new > -1e20, new, 0.0)
        w = tl.math.exp2(e - safe[:, None])
        a = tl.math.exp2(m - safe)
        m = new
        l = l * a[:, None] + w
        vs, vz = pair(tl.load(VS + sz, mask=there[:, None], other=0.0), GC, BLOCK)
        zero = zero * a[:, None, None] + w[:, None, :] * vz[None, :, :]
        larger = tl.maximum(large, tl.max(tl.max(vs, 1), 0))
        ws = (w[:, None, :] * (vs * (WIDEST / larger))[None, :, :]).to(tl.float16)
        ws = tl.reshape(ws, (R, BLOCK))
        a = tl.reshape(tl.broadcast_to((a * (large / larger))[:, None], (GB, GC)), (R,))
        large = larger
        code = tl.load(VC + at, mask=there[:, None] & (b < DB), other=0)
        acc0 = tl.dot(ws, half(code, 0, PLANES, FAST), acc0 * a[:, None])
        if PLANES == 2:
            acc1 = tl.dot(ws, half(code, 1, PLANES, FAST), acc1 * a[:, None])
    zero = tl.sum(zero, 2)
    left(PART, zero, acc0 * (large / WIDEST), part, d0, G, D, DP, GB, GC, DW)
    if PLANES == 2:
        left(PART, zero, acc1 * (large / WIDEST), part, d1, G, D, DP, GB, GC, DW)
    tl.store(STAT + (part + gb) * 2, m, mask=gb < G)
    tl.store(STAT + (part + gb) * 2 + 1, tl.sum(l, 1), mask=gb < G)


@triton.jit
def left(
    PART, zero, acc, part, d, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GB: tl.constexpr, GC: tl.constexpr, DW: tl.constexpr
):
    """Of each channel the row of its own group."""
    mine = (d // (D // GC))[:, None, :] == tl.arange(0, GC)[None, :, None]
    y = tl.sum(tl.where(mine, tl.reshape(acc, (GB, GC, DW)) + zero[:, :, None], 0.0), 1)
    gb = tl.arange(0, GB)[:, None]
    tl.store(PART + (part + gb) * DP + d, y, mask=(gb < G) & (d < D))


def can(s, past, heads, bits):
    """Is this a state, and a past, that the kernel can work on? heads: of queries."""
    (B, K, _, D), GC = s["k"].shape, past["k_scale"].shape[3] // 2
    solid = all(x.is_contiguous() for x in [*s.values(), *past.values()] if torch.is_tensor(x))
    grouped = GC & (GC - 1) == 0 and D // GC % (8 // bits) == 0 and heads // K * GC <= 64
    fits = B == 1 and D <= 256 and heads // K <= 16 and s["k"].dtype == s["v"].dtype and s["pos"].shape[1] == past["pos"].shape[1]
    return (s["k"].is_cuda or INTERPRETED) and solid and grouped and fits and torch.is_tensor(s["n"]) and s["pos"].dtype == torch.int32


WARPS, STAGES = 4, 3


def programs(bits, groups):
    """How many programs an H100 has at once: three for each processor where that was timed, 8 bits in groups of 32 (LOG.md); the other
    kinds' registers leave room for two."""
    return 396 if bits == 8 and groups == 4 else 264


def shares(K, M, most):
    """How many programs read a key head's codes, and one more: together a processor of a large GPU has so many of them at once."""
    if INTERPRETED:
        # one after the other
        return 3
    return max(2, min(most // K, triton.cdiv(M, 128) + 1))


def token(row, turn, at, s, past, rule, begin=None, bits=8, always=0, opening=0, scale=None, born=None, recent=0):
    """See kernels.codes.plain."""
    k, pos, n, code = s["k"], s["pos"], s["n"], past["k_code"]
    (_, K, N, D), M, GC = k.shape, code.shape[2], past["k_scale"].shape[3] // 2
    G, DP, S = row.shape[0] // D // K - 2, max(16, triton.next_power_of_2(D)), shares(K, M, programs(bits, GC))
    GR = triton.next_power_of_2(G)
    SP = triton.next_power_of_2(S)
    part, stat, count, _ = scratch(row.device, K * G, K, S, GR, DP)
    y = row.new_empty(K * G * D)
    codes_kernel[(K, S)](
        row, *turn, at, at if begin is None else begin, k, s["v"], pos, n, s[born] if born else None,
        s["q"] if recent else None, s["q_at"] if recent else None, *(past[f] for f in ("k_code", "k_scale", "v_code", "v_scale")),
        past["pos"], part, stat, count, y,
        N, M, layer_of(rule), D**-0.5 if scale is None else scale,
        K, pos.shape[1], G, max(16, GR), GR, D, DP, turn[0].shape[-1], S, SP, 64, min(DP, max(16, 8192 // (SP * GR))), recent,
        max(GR, triton.cdiv(16, GC)), GC, 8 // bits, max(32, triton.next_power_of_2(code.shape[3])), not INTERPRETED,
        compiled(rule), differs(rule, K * G), begin is not None, always, opening, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return y, s


# ---------------------------------------------------------------- what joins the past when a segment closes


@triton.jit
def copied(X, NEW, h, source, to, M, R, WIDTH: tl.constexpr, WP: tl.constexpr, HEADS: tl.constexpr):
    """Entry `source` of a field's R new ones to slot `to`. X may be None."""
    if X is not None:  # noqa: SIM102
        if h < HEADS:
            d = tl.arange(0, WP)
            x = tl.load(NEW + (h * R + source) * WIDTH + d, mask=d < WIDTH, other=0)
            tl.store(X + (h.to(tl.int64) * M + to) * WIDTH + d, x.to(X.dtype.element_ty), mask=d < WIDTH)


@triton.jit
def join_slots(
    WORST, KC, KS, VC, VS, POS, BORN, MASS, KC1, KS1, VC1, VS1, POS1, BORN1, MASS1, M, R,
    HEADS: tl.constexpr, RP: tl.constexpr, DB: tl.constexpr, DW: tl.constexpr, GS: tl.constexpr, GW: tl.constexpr, POS_HEADS: tl.constexpr,
):  # fmt: skip
    """Program (i, h): new slot i of key head h, if it stays, takes the place of an old one that goes, the m-th to the m-th."""
    i = tl.program_id(0)
    h = tl.program_id(1)
    r = tl.arange(0, RP)
    worst = tl.load(WORST + (h % HEADS) * R + r, mask=r < R, other=-1)
    goes = tl.sum((worst == M + i).to(tl.int32))
    if goes == 0:
        # so many before it stay too, and the old ones that go come first
        m = i - tl.sum(((worst >= M) & (worst < M + i)).to(tl.int32))
        to = tl.load(WORST + (h % HEADS) * R + m)
        copied(KC, KC1, h, i, to, M, R, DB, DW, 1 << 20)
        copied(KS, KS1, h, i, to, M, R, GS, GW, 1 << 20)
        copied(VC, VC1, h, i, to, M, R, DB, DW, 1 << 20)
        copied(VS, VS1, h, i, to, M, R, GS, GW, 1 << 20)
        copied(POS, POS1, h, i, to, M, R, 1, 1, POS_HEADS)
        copied(BORN, BORN1, h, i, to, M, R, 1, 1, 1)
        copied(MASS, MASS1, h, i, to, M, R, 1, 1, 1 << 20)


def joins(past):
    """Can the kernel do it?"""
    return (past["k_code"].is_cuda or INTERPRETED) and len(past["pos"]) == 1 and set(past) <= {*FIELDS} and not torch.is_grad_enabled()


FIELDS = "k_code", "k_scale", "v_code", "v_scale", "pos", "born", "mass"


def join(worst, past, new):
    """See kernels.codes.join."""
    _, K, M, DB = past["k_code"].shape
    R, GS = new["pos"].shape[2], past["k_scale"].shape[3]
    # what was noted may be a view
    past, new = ({f: a.contiguous() for f, a in side.items()} for side in (past, new))
    both = [side.get(f) for side in (past, new) for f in FIELDS]
    DW, GW = triton.next_power_of_2(DB), triton.next_power_of_2(GS)
    shape = worst.shape[1], triton.next_power_of_2(R), DB, DW, GS, GW, past["pos"].shape[1]
    join_slots[(R, K)](worst.to(torch.int32).contiguous(), *both, M, R, *shape)
    return past
