"""attend() on Hopper GPUs, in Gluon (Triton 3.6): backward in one pass, forward with overlapped softmax; float16 and bfloat16, D 64 or 128.

As kernels/triton_.py, whose rules, positions, documents and biases these kernels share, with the machine in hand: a producer warp copies
blocks (TMA), groups of four warps multiply them (wgmma), barriers between them. After FlashAttention-3 (Shah and others 2024,
arXiv:2407.08608). The backward pass makes five products a block instead of the seven of two passes: dQ is added into float32 by the copy
engine, in the order of the registers that hold it, and `finish` brings it into rows. These additions come in no fixed order, so two runs
differ in the last bits of dq.

META has one row of 8 int32 for each piece of work: block, lo, hi, slot (-1: whole), z (row of the batch and head). Program p does the rows
FIRST[p] to FIRST[p + 1] (plan.in_order). No list is empty.
"""

import contextlib
import functools
import io

import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.errors import PTXASError

from kernels.triton_ import BESIDE, MIRROR, begins, bias_of, own, positions, seen

# fmt: off
LOG2E = 1.4426950408889634


@builtin
def tma_reduce_add(desc, coord, src, _semantic=None):
    """Add a shared tile to global memory through the copy engine (cp.reduce.async.bulk.tensor); Gluon 3.6 has the operation but no
    function for it."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, src.handle)

@gluon.constexpr_function
def _min(a, b):
    return min(a, b)

@gluon.constexpr_function
def _room(n):
    """The least power of two from n on, at least a warp's 32."""
    return max(32, 1 << (n - 1).bit_length())

@gluon.jit
def _opaque(x):
    """x, by an instruction that the compiler neither hoists nor merges: what depends on it is computed where it is used instead of
    waiting in registers."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)

@gluon.jit
def _sees(qp, kp, qb, ki, h, layer, last, RULE: gl.constexpr, EXPLICIT: gl.constexpr, DOCS: gl.constexpr, BEHIND: gl.constexpr,
          ALWAYS: gl.constexpr, OPENING: gl.constexpr, QDIM: gl.constexpr):
    """seen() of queries and keys in two layouts. QDIM: the dimension along which queries run."""
    qp = gl.expand_dims(qp, 1 - QDIM)
    qb = gl.expand_dims(qb, 1 - QDIM)
    kp = gl.expand_dims(kp, QDIM)
    return seen(qp, kp, qb, gl.expand_dims(ki, QDIM), h, layer, last, RULE, EXPLICIT, DOCS, BEHIND, ALWAYS, OPENING)

@gluon.jit
def _tabled(s, q, k, TABLE, REACH: gl.constexpr, EXPLICIT: gl.constexpr, QDIM: gl.constexpr):
    """Raw products with a table's entries. q, k: positions, or numbers that are as far from each other. A thread's columns stand constants
    apart, so that an address is a row's and a constant if the table runs as columns do: for columns of keys, backwards."""
    q = gl.expand_dims(q, 1 - QDIM)
    k = gl.expand_dims(k, QDIM)
    if EXPLICIT:
        at = TABLE + gl.minimum(gl.maximum(q - k, 0), REACH - 1)
    elif QDIM == 1:
        at = (TABLE - k) + q
    else:
        at = (TABLE - MIRROR - q) + k
    return s + gl.load(at)

@gluon.jit
def _near(least, REACH: gl.constexpr):
    """Does a table reach a tile whose least distance this is? Those that only fill an empty list may lie anywhere."""
    return (least < REACH - 1) & (least > -BESIDE)


# ---------------------------------------------------------------- backward: before and after

@triton.jit(do_not_specialize=["n"])
def prepare(O, DO, LSE, DLSE, LD, DQ, Q_AT, BEGIN, EACH, n, sb, sh, sn, tb, th, tn, scale, H: tl.constexpr, D: tl.constexpr,
    BQ: tl.constexpr, WITH_LSE: tl.constexpr, BIAS: tl.constexpr, EXPLICIT: tl.constexpr, DOCS: tl.constexpr):
    """For each query tile: BQ log-sum-exps (1e30 past the end), then BQ row sums of dO * O, then (where one of them lies in memory)
    positions and documents' beginnings, into LD [B * H, tiles, 2 or 4, BQ]; zeroes the tile of the float32 dQ. The log-sum-exps are
    those of scores without own(), `near` being the tile's first query."""
    i = tl.program_id(0)
    z = tl.program_id(1)
    b = (z // H).to(tl.int64)
    h = (z % H).to(tl.int64)
    r = i * BQ + tl.arange(0, BQ)
    d = tl.arange(0, D)
    r64 = r.to(tl.int64)
    x = tl.load(O + b * sb + h * sh + r64[:, None] * sn + d[None, :], mask=r[:, None] < n, other=0).to(tl.float32)
    y = tl.load(DO + b * tb + h * th + r64[:, None] * tn + d[None, :], mask=r[:, None] < n, other=0).to(tl.float32)
    tile = z.to(tl.int64) * tl.num_programs(0) + i
    to = LD + tile * (4 * BQ if EXPLICIT or DOCS else 2 * BQ) + tl.arange(0, BQ)
    lse = tl.load(LSE + z.to(tl.int64) * n + r, mask=r < n, other=1e30)
    at = positions(Q_AT + b * n, 0, r, n, EXPLICIT)
    if BIAS != "none":
        lse -= own(at, positions(Q_AT + b * n, 0, i * BQ, n, EXPLICIT), tl.load(EACH + h), scale, BIAS)
    tl.store(to, lse)
    delta = tl.sum(x * y, 1)
    if WITH_LSE:
        # DLSE is by lse in base 2
        delta -= tl.load(DLSE + z.to(tl.int64) * n + r, mask=r < n, other=0) * 1.4426950408889634
    tl.store(to + BQ, delta)
    if EXPLICIT or DOCS:
        tl.store(to + 2 * BQ, at.to(tl.float32, bitcast=True))
        tl.store(to + 3 * BQ, begins(BEGIN + b * n, r, n, DOCS).to(tl.float32, bitcast=True))
    tl.store(DQ + tile * BQ * D + tl.arange(0, BQ * D), tl.zeros([BQ * D], tl.float32))

@triton.jit(do_not_specialize=["n"])
def finish(DQ, OUT, n, sm, sb, sh, sn, H: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, WARPS: tl.constexpr):
    """float32 tiles, in the order of the registers that made them (WARPS of them), -> rows of OUT."""
    WM: tl.constexpr = min(BQ // 16, WARPS)
    WN: tl.constexpr = WARPS // WM
    MR: tl.constexpr = BQ // 16 // WM
    i = tl.program_id(0)
    z = tl.program_id(1)
    b = (z // H).to(tl.int64)
    h = (z % H).to(tl.int64)
    tile = z.to(tl.int64) * tl.num_programs(0) + i
    x = tl.load(DQ + tile * BQ * D + tl.arange(0, BQ * D)) * sm
    x = x.to(OUT.dtype.element_ty).reshape(MR, D // 8 // WN, WN, WM, 8, 4, 2, 2).permute(0, 3, 6, 4, 2, 1, 5, 7).reshape(BQ, D)
    r = i * BQ + tl.arange(0, BQ)
    d = tl.arange(0, D)
    tl.store(OUT + b * sb + h * sh + r.to(tl.int64)[:, None] * sn + d[None, :], x, mask=r[:, None] < n)

@gluon.jit
def _flat(dq, BQ: gl.constexpr, D: gl.constexpr, WARPS: gl.constexpr):
    """A dQ tile as one row in which every thread holds four neighbours and a warp 512 bytes: nothing moves, the order is undone by
    `finish`."""
    WM: gl.constexpr = _min(BQ // 16, WARPS)
    WN: gl.constexpr = WARPS // WM
    MR: gl.constexpr = BQ // 16 // WM
    x = dq.reshape([MR, WM, 2, 8, WN, D // 8 // WN, 4, 2]).permute((0, 5, 4, 1, 3, 6, 2, 7)).reshape([BQ * D])
    return gl.convert_layout(x, gl.BlockedLayout([4], [32], [WARPS], [0]), assert_trivial=True)


@gluon.jit
def _weights(st, lse, e, i, j, kp_s, lds, each, TABLE, q_first, k_first, n_keys, h, layer, scale, RULE: gl.constexpr, BIAS: gl.constexpr,
    EXPLICIT: gl.constexpr, DOCS: gl.constexpr, BEHIND: gl.constexpr, ALWAYS: gl.constexpr, OPENING: gl.constexpr, REACH: gl.constexpr,
    LATE: gl.constexpr, BQ: gl.constexpr, BK: gl.constexpr, s_l: gl.constexpr):
    """Weights [BK, BQ] from raw products; kp_s: the keys' positions, where they lie in memory; lds: what `prepare` left for the tile; LATE:
    masked after the exponential or before it (see run_backward)."""
    start = q_first + i * BQ
    if BIAS == "table":
        if EXPLICIT:
            at = lds.slice(2 * BQ, BQ).load(gl.SliceLayout(0, s_l)).to(gl.int32, bitcast=True)
            st = _tabled(st, at, kp_s.load(gl.SliceLayout(1, s_l)), TABLE, REACH, EXPLICIT, 1)
        else:
            apart = start - k_first - j * BK
            if _near(apart - BK + 1, REACH):
                st = _tabled(st, gl.arange(0, BQ, gl.SliceLayout(0, s_l)), gl.arange(0, BK, gl.SliceLayout(1, s_l)),
                    TABLE + _opaque(apart), REACH, EXPLICIT, 1)
    x = st * scale - lse[None, :]
    if BIAS == "slope":
        if EXPLICIT:
            start = gl.max(lds.slice(2 * BQ, 1).load(gl.SliceLayout(0, s_l)).to(gl.int32, bitcast=True), 0)
            away = kp_s.load(gl.SliceLayout(1, s_l)) - start
        else:
            away = k_first + j * BK - start + gl.arange(0, BK, gl.SliceLayout(1, s_l))
        x += (each * scale * away.to(gl.float32))[:, None]
    if LATE:
        x = gl.exp2(x)
    if e < 0:
        ki = _opaque(j) * BK + gl.arange(0, BK, gl.SliceLayout(1, s_l))
        kp = k_first + ki
        qp = q_first + _opaque(i) * BQ + gl.arange(0, BQ, gl.SliceLayout(0, s_l))
        qb = gl.zeros([BQ], gl.int32, gl.SliceLayout(0, s_l))
        if EXPLICIT:
            qp = lds.slice(2 * BQ, BQ).load(gl.SliceLayout(0, s_l)).to(gl.int32, bitcast=True)
            kp = kp_s.load(gl.SliceLayout(1, s_l))
        # in the other form even where all are 0: what crashes ptxas is as odd
        if DOCS or (EXPLICIT and not LATE):
            qb = lds.slice(3 * BQ, BQ).load(gl.SliceLayout(0, s_l)).to(gl.int32, bitcast=True)
        see = _sees(qp, kp, qb, ki, h, layer, k_first + n_keys - 1, RULE, EXPLICIT, DOCS, BEHIND, ALWAYS, OPENING, 1)
        x = gl.where(see, x, 0.0 if LATE else -1e30)
    return x if LATE else gl.exp2(x)


# ---------------------------------------------------------------- backward with a producer warp (D 128)

@gluon.jit
def _fill(e, stage, phase, b, hk, q_desc, do_desc, ld_desc, q_s, do_s, ld_s, full, empty, qtiles, H: gl.constexpr, G: gl.constexpr,
    D: gl.constexpr, BQ: gl.constexpr, ST: gl.constexpr):
    """Copy one query tile into the next stage, once it is free; the stage and phase after it."""
    ty: gl.constexpr = q_desc.dtype
    LD: gl.constexpr = ld_desc.block_shape[0]
    h = hk * G + ((e >> 25) & 63)
    i = e & 0x1ffffff
    mbarrier.wait(empty.index(stage), phase)
    bar = full.index(stage)
    mbarrier.expect(bar, 2 * BQ * D * 2 + LD * 4)
    tma.async_copy_global_to_shared(q_desc, [b, h, i * BQ, 0], bar, q_s.index(stage)._reinterpret(ty, [1, 1, BQ, D], q_desc.layout))
    tma.async_copy_global_to_shared(do_desc, [b, h, i * BQ, 0], bar, do_s.index(stage)._reinterpret(ty, [1, 1, BQ, D], q_desc.layout))
    tma.async_copy_global_to_shared(ld_desc, [((b * H + h) * qtiles + i) * LD], bar, ld_s.index(stage))
    stage += 1
    if stage == ST:
        stage = 0
        phase ^= 1
    return stage, phase

@gluon.jit
def _producer(q_desc, k_desc, v_desc, do_desc, ld_desc, q_s, do_s, ld_s, k_s, v_s, full, empty, k_full, v_full, kv_empty, META, FIRST,
    LIST, qtiles,
              H: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BQ: gl.constexpr, BK: gl.constexpr, ST: gl.constexpr):
    HK: gl.constexpr = H // G
    ty: gl.constexpr = q_desc.dtype
    stage = 0
    phase = 1
    kphase = 1
    for u in range(gl.load(FIRST + gl.program_id(0)), gl.load(FIRST + gl.program_id(0) + 1)):
        j = gl.load(META + u * 8)
        lo = gl.load(META + u * 8 + 1)
        hi = gl.load(META + u * 8 + 2)
        z = gl.load(META + u * 8 + 4)
        b = z // HK
        hk = z % HK
        e = gl.load(LIST + lo)
        stage, phase = _fill(e, stage, phase, b, hk, q_desc, do_desc, ld_desc, q_s, do_s, ld_s, full, empty, qtiles, H, G, D, BQ, ST)
        mbarrier.wait(kv_empty, kphase)
        kphase ^= 1
        mbarrier.expect(k_full, BK * D * 2)
        tma.async_copy_global_to_shared(k_desc, [b, hk, j * BK, 0], k_full, k_s._reinterpret(ty, [1, 1, BK, D], k_desc.layout))
        mbarrier.expect(v_full, BK * D * 2)
        tma.async_copy_global_to_shared(v_desc, [b, hk, j * BK, 0], v_full, v_s._reinterpret(ty, [1, 1, BK, D], k_desc.layout))
        for t in range(lo + 1, hi):
            e = gl.load(LIST + t)
            stage, phase = _fill(e, stage, phase, b, hk, q_desc, do_desc, ld_desc, q_s, do_s, ld_s, full, empty, qtiles, H, G, D, BQ, ST)

@gluon.jit
def _consumer(dk_desc, dv_desc, dq_desc, q_s, do_s, ld_s, k_s, v_s, ds_s, dq_s, kp_s, full, empty, k_full, v_full, kv_empty, PART, META,
    FIRST, LIST, K_AT, EACH, TABLE, Z, n_keys, q_first, k_first, layer, qtiles, scale, sm,
              H: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BQ: gl.constexpr, BK: gl.constexpr, ST: gl.constexpr, RULE: gl.constexpr,
                  BIAS: gl.constexpr, EXPLICIT: gl.constexpr, DOCS: gl.constexpr, BEHIND: gl.constexpr, ALWAYS: gl.constexpr,
                  OPENING: gl.constexpr, REACH: gl.constexpr, K_HEADS: gl.constexpr, LATE: gl.constexpr,
                  WARPS: gl.constexpr):
    HK: gl.constexpr = H // G
    ty: gl.constexpr = q_s.dtype
    WM: gl.constexpr = _min(BQ // 16, WARPS)
    WN: gl.constexpr = WARPS // WM
    s_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BQ, 16])
    kv_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    dq_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WM, WN], [16, D // WN, 16])
    a_l: gl.constexpr = gl.DotOperandLayout(0, kv_l, 2)
    # dK and dV leave through the shared memory of dQ
    out_s = dq_s._reinterpret(ty, [BK, D], gl.NVMMASharedLayout.get_default_for([BK, D], ty))
    stage = 0
    phase = 0
    kphase = 0
    zs = gl.zeros([BK, BQ], gl.float32, s_l)
    for u in range(gl.load(FIRST + gl.program_id(0)), gl.load(FIRST + gl.program_id(0) + 1)):
        j = gl.load(META + u * 8)
        lo = gl.load(META + u * 8 + 1)
        hi = gl.load(META + u * 8 + 2)
        slot = gl.load(META + u * 8 + 3)
        z = gl.load(META + u * 8 + 4)
        b = z // HK
        hk = z % HK
        if EXPLICIT:
            kp_s.store(positions(K_AT + (b * K_HEADS + hk % K_HEADS) * n_keys, k_first, j * BK + gl.arange(0, BK, gl.SliceLayout(1, s_l)),
                n_keys, EXPLICIT))
            gl.thread_barrier()
        dk = gl.zeros([BK, D], gl.float32, kv_l)
        dv = gl.zeros([BK, D], gl.float32, kv_l)
        e = gl.load(LIST + lo)
        mbarrier.wait(k_full, kphase)
        for t in range(lo, hi):
            e1 = gl.load(LIST + gl.minimum(t + 1, hi - 1))
            h = hk * G + ((e >> 25) & 63)
            i = e & 0x1ffffff
            qs = q_s.index(stage)
            dos = do_s.index(stage)
            lds = ld_s.index(stage)
            mbarrier.wait(full.index(stage), phase)
            st = warpgroup_mma(k_s, qs.permute((1, 0)), zs, use_acc=False, is_async=True)
            mbarrier.wait(v_full, kphase)
            dp = warpgroup_mma(v_s, dos.permute((1, 0)), zs, use_acc=False, is_async=True)
            lse = lds.slice(0, BQ).load(gl.SliceLayout(0, s_l))
            each, MINE = bias_of(EACH, TABLE, h, REACH, BIAS)
            st = warpgroup_mma_wait(1, deps=(st,))
            p = _weights(st, lse, e, i, j, kp_s, lds, each, MINE, q_first, k_first, n_keys, h, layer, scale, RULE, BIAS, EXPLICIT, DOCS,
                BEHIND, ALWAYS, OPENING, REACH, LATE, BQ, BK, s_l)
            dv = warpgroup_mma(gl.convert_layout(p.to(ty), a_l), dos, dv, is_async=True)
            dp = warpgroup_mma_wait(1, deps=(dp,))
            delta = lds.slice(BQ, BQ).load(gl.SliceLayout(0, s_l))
            ds = (p * (dp - delta[None, :])).to(ty)
            ds_s.store(ds)
            fence_async_shared()
            tma.store_wait(0)
            gl.thread_barrier()
            dq = warpgroup_mma(ds_s.permute((1, 0)), k_s, gl.zeros([BQ, D], gl.float32, dq_l), use_acc=False, is_async=True)
            dk = warpgroup_mma(gl.convert_layout(ds, a_l), qs, dk, is_async=True)
            dq, dv = warpgroup_mma_wait(1, deps=(dq, dv))
            dq_s.store(_flat(dq, BQ, D, WARPS).reshape([BQ * D // 256, 256]))  # while dK is under way
            fence_async_shared()
            dk = warpgroup_mma_wait(0, deps=(dk,))
            gl.thread_barrier()
            mbarrier.arrive(empty.index(stage))
            tma_reduce_add(dq_desc, [((b * H + h) * qtiles + i) * (BQ * D // 256), 0], dq_s)
            e = e1
            stage += 1
            if stage == ST:
                stage = 0
                phase ^= 1
        kphase ^= 1
        mbarrier.arrive(kv_empty)
        if slot < 0:
            tma.store_wait(0)
            gl.thread_barrier()
            out_s.store((dk * sm).to(ty))
            fence_async_shared()
            gl.thread_barrier()
            tma.async_copy_shared_to_global(dk_desc, [b, hk, j * BK, 0], out_s._reinterpret(ty, [1, 1, BK, D], dk_desc.layout))
            tma.store_wait(0)
            gl.thread_barrier()
            out_s.store(dv.to(ty))
            fence_async_shared()
            gl.thread_barrier()
            tma.async_copy_shared_to_global(dv_desc, [b, hk, j * BK, 0], out_s._reinterpret(ty, [1, 1, BK, D], dk_desc.layout))
        else:
            r = gl.arange(0, BK, gl.SliceLayout(1, kv_l))
            d = gl.arange(0, D, gl.SliceLayout(0, kv_l))
            at = PART + (slot * Z + z).to(gl.int64) * (2 * BK * D) + (_opaque(r)[:, None] * D + d[None, :])
            gl.store(at, dk * sm)
            gl.store(at + BK * D, dv)
    tma.store_wait(0)

@gluon.jit(do_not_specialize=["Z", "n_keys", "q_first", "k_first", "layer", "qtiles"])
def backward(q_desc, k_desc, v_desc, do_desc, ld_desc, dk_desc, dv_desc, dq_desc, PART, META, FIRST, LIST, K_AT, EACH, TABLE, Z,
    n_keys, q_first, k_first, layer, qtiles, scale, sm,
             H: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BQ: gl.constexpr, BK: gl.constexpr, ST: gl.constexpr, RULE: gl.constexpr,
                 BIAS: gl.constexpr, EXPLICIT: gl.constexpr, DOCS: gl.constexpr, BEHIND: gl.constexpr, ALWAYS: gl.constexpr,
                 OPENING: gl.constexpr, REACH: gl.constexpr, K_HEADS: gl.constexpr, LATE: gl.constexpr, num_warps: gl.constexpr):
    """dK and dV of a key tile over its query tiles, five products a tile, dQ tiles added to float32 by the copy engine. BQ 64, BK
    128, 8 warps and a producer warp.
        S^T = K Q^T, dP^T = V dO^T        both under way at once
        dV += P^T dO, dK += dS^T Q        P^T and dS^T from registers
        dQ tile = dS K                    dS^T through shared memory; leaves while dK is computed"""
    ty: gl.constexpr = q_desc.dtype
    sh: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BQ, D], ty)
    gl.static_assert(2 * BQ == BK)  # the float32 tile of dQ is as large as one of dK
    k_s = gl.allocate_shared_memory(ty, [BK, D], sh)
    v_s = gl.allocate_shared_memory(ty, [BK, D], sh)
    q_s = gl.allocate_shared_memory(ty, [ST, BQ, D], sh)
    do_s = gl.allocate_shared_memory(ty, [ST, BQ, D], sh)
    ld_s = gl.allocate_shared_memory(gl.float32, [ST, ld_desc.block_shape[0]], ld_desc.layout)
    ds_s = gl.allocate_shared_memory(ty, [BK, BQ], gl.NVMMASharedLayout.get_default_for([BK, BQ], ty))
    dq_s = gl.allocate_shared_memory(gl.float32, [BQ * D // 256, 256], dq_desc.layout)
    kp_s = gl.allocate_shared_memory(gl.int32, [BK if EXPLICIT else 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    kv_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for a in gl.static_range(ST):
        mbarrier.init(full.index(a), count=1)
        mbarrier.init(empty.index(a), count=1)
    mbarrier.init(k_full, count=1)
    mbarrier.init(v_full, count=1)
    mbarrier.init(kv_empty, count=1)
    gl.warp_specialize([
        (_consumer, (dk_desc, dv_desc, dq_desc, q_s, do_s, ld_s, k_s, v_s, ds_s, dq_s, kp_s, full, empty, k_full, v_full, kv_empty, PART,
            META, FIRST, LIST, K_AT, EACH, TABLE, Z, n_keys, q_first, k_first, layer, qtiles, scale, sm,
                     H, G, D, BQ, BK, ST, RULE, BIAS, EXPLICIT, DOCS, BEHIND, ALWAYS, OPENING, REACH, K_HEADS, LATE, num_warps)),
        (_producer, (q_desc, k_desc, v_desc, do_desc, ld_desc, q_s, do_s, ld_s, k_s, v_s, full, empty, k_full, v_full, kv_empty, META,
            FIRST, LIST, qtiles, H, G, D, BQ, BK, ST)),
    ], [1], [24])


# ---------------------------------------------------------------- backward without a producer (D 64: two programs on an SM)

@gluon.jit
def _load(q_desc, do_desc, ld_desc, q_s, do_s, ld_s, bar, e, b, hk, qtiles, H: gl.constexpr, G: gl.constexpr, BQ: gl.constexpr,
    D: gl.constexpr, pred):
    """Start the copies of one query tile into one stage."""
    ty: gl.constexpr = q_desc.dtype
    LD: gl.constexpr = ld_desc.block_shape[0]
    h = hk * G + ((e >> 25) & 63)
    i = e & 0x1ffffff
    mbarrier.expect(bar, 2 * BQ * D * 2 + LD * 4, pred)
    tma.async_copy_global_to_shared(q_desc, [b, h, i * BQ, 0], bar, q_s._reinterpret(ty, [1, 1, BQ, D], q_desc.layout), pred)
    tma.async_copy_global_to_shared(do_desc, [b, h, i * BQ, 0], bar, do_s._reinterpret(ty, [1, 1, BQ, D], q_desc.layout), pred)
    tma.async_copy_global_to_shared(ld_desc, [((b * H + h) * qtiles + i) * LD], bar, ld_s, pred)

@gluon.jit(do_not_specialize=["Z", "n_keys", "q_first", "k_first", "layer", "qtiles"])
def backward_small(q_desc, k_desc, v_desc, do_desc, ld_desc, dk_desc, dv_desc, DQ, PART, META, LIST, K_AT, EACH, TABLE, Z,
    n_keys, q_first, k_first, layer, qtiles, scale, sm,
                   H: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BQ: gl.constexpr, BK: gl.constexpr, RULE: gl.constexpr,
                       BIAS: gl.constexpr, EXPLICIT: gl.constexpr, DOCS: gl.constexpr, BEHIND: gl.constexpr, ALWAYS: gl.constexpr,
                       OPENING: gl.constexpr, REACH: gl.constexpr, K_HEADS: gl.constexpr, LATE: gl.constexpr, num_warps: gl.constexpr):
    """The same with 64 x 64 tiles and 4 warps that all compute; one program a row of META; dQ leaves from the registers as 16-byte
    additions."""
    HK: gl.constexpr = H // G
    ty: gl.constexpr = q_desc.dtype
    u = gl.program_id(0)
    j = gl.load(META + u * 8)
    lo = gl.load(META + u * 8 + 1)
    hi = gl.load(META + u * 8 + 2)
    slot = gl.load(META + u * 8 + 3)
    z = gl.load(META + u * 8 + 4)
    b = z // HK
    hk = z % HK
    WM: gl.constexpr = _min(BQ // 16, num_warps)
    WN: gl.constexpr = num_warps // WM
    s_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BQ, 16])
    kv_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D, 16])
    dq_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WM, WN], [16, D // WN, 16])
    a_l: gl.constexpr = gl.DotOperandLayout(0, kv_l, 2)
    sh: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BQ, D], ty)
    k_s = gl.allocate_shared_memory(ty, [BK, D], sh)
    v_s = gl.allocate_shared_memory(ty, [BK, D], sh)
    q_s = gl.allocate_shared_memory(ty, [2, BQ, D], sh)
    do_s = gl.allocate_shared_memory(ty, [2, BQ, D], sh)
    ld_s = gl.allocate_shared_memory(gl.float32, [2, ld_desc.block_shape[0]], ld_desc.layout)
    ds_s = gl.allocate_shared_memory(ty, [BK, BQ], gl.NVMMASharedLayout.get_default_for([BK, BQ], ty))
    kp_s = gl.allocate_shared_memory(gl.int32, [BK if EXPLICIT else 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bars = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for a in gl.static_range(3):
        mbarrier.init(bars.index(a), count=1)
    last = hi - 1
    e = gl.load(LIST + lo)
    e1 = gl.load(LIST + gl.minimum(lo + 1, last))
    mbarrier.expect(bars.index(2), 2 * BK * D * 2)
    tma.async_copy_global_to_shared(k_desc, [b, hk, j * BK, 0], bars.index(2), k_s._reinterpret(ty, [1, 1, BK, D], k_desc.layout))
    _load(q_desc, do_desc, ld_desc, q_s.index(0), do_s.index(0), ld_s.index(0), bars.index(0), e, b, hk, qtiles, H, G, BQ, D, True)
    tma.async_copy_global_to_shared(v_desc, [b, hk, j * BK, 0], bars.index(2), v_s._reinterpret(ty, [1, 1, BK, D], k_desc.layout))
    _load(q_desc, do_desc, ld_desc, q_s.index(1), do_s.index(1), ld_s.index(1), bars.index(1), e1, b, hk, qtiles, H, G, BQ, D, lo + 1 < hi)
    dk = gl.zeros([BK, D], gl.float32, kv_l)
    dv = gl.zeros([BK, D], gl.float32, kv_l)
    if EXPLICIT:
        kp_s.store(positions(K_AT + (b * K_HEADS + hk % K_HEADS) * n_keys, k_first, j * BK + gl.arange(0, BK, gl.SliceLayout(1, s_l)),
            n_keys, EXPLICIT))
        gl.thread_barrier()
    zs = gl.zeros([BK, BQ], gl.float32, s_l)
    mbarrier.wait(bars.index(2), 0)
    for t in range(lo, hi):
        e2 = gl.load(LIST + gl.minimum(t + 2, last))
        c = t - lo
        stage = c & 1
        h = hk * G + ((e >> 25) & 63)
        i = e & 0x1ffffff
        qs = q_s.index(stage)
        dos = do_s.index(stage)
        lds = ld_s.index(stage)
        mbarrier.wait(bars.index(stage), (c >> 1) & 1)
        st = warpgroup_mma(k_s, qs.permute((1, 0)), zs, use_acc=False, is_async=True)
        dp = warpgroup_mma(v_s, dos.permute((1, 0)), zs, use_acc=False, is_async=True)
        lse = lds.slice(0, BQ).load(gl.SliceLayout(0, s_l))
        each, MINE = bias_of(EACH, TABLE, h, REACH, BIAS)
        st = warpgroup_mma_wait(1, deps=(st,))
        p = _weights(st, lse, e, i, j, kp_s, lds, each, MINE, q_first, k_first, n_keys, h, layer, scale, RULE, BIAS, EXPLICIT, DOCS, BEHIND,
            ALWAYS, OPENING, REACH, LATE, BQ, BK, s_l)
        dv = warpgroup_mma(gl.convert_layout(p.to(ty), a_l), dos, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=(dp,))
        delta = lds.slice(BQ, BQ).load(gl.SliceLayout(0, s_l))
        ds = (p * (dp - delta[None, :])).to(ty)
        ds_s.store(ds)
        fence_async_shared()
        gl.thread_barrier()
        dq = warpgroup_mma(ds_s.permute((1, 0)), k_s, gl.zeros([BQ, D], gl.float32, dq_l), use_acc=False, is_async=True)
        dk = warpgroup_mma(gl.convert_layout(ds, a_l), qs, dk, is_async=True)
        dq, dv = warpgroup_mma_wait(1, deps=(dq, dv))
        at = DQ + ((b * H + h) * qtiles + i).to(gl.int64) * (BQ * D) + gl.arange(0, BQ * D, gl.BlockedLayout([4], [32], [num_warps], [0]))
        gl.atomic_add(at, _flat(dq, BQ, D, num_warps), sem="relaxed")
        dk = warpgroup_mma_wait(0, deps=(dk,))
        gl.thread_barrier()
        _load(q_desc, do_desc, ld_desc, qs, dos, lds, bars.index(stage), e2, b, hk, qtiles, H, G, BQ, D, t + 2 < hi)
        e = e1
        e1 = e2
    if slot < 0:
        k_s.store((dk * sm).to(ty))
        v_s.store(dv.to(ty))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(dk_desc, [b, hk, j * BK, 0], k_s._reinterpret(ty, [1, 1, BK, D], k_desc.layout))
        tma.async_copy_shared_to_global(dv_desc, [b, hk, j * BK, 0], v_s._reinterpret(ty, [1, 1, BK, D], k_desc.layout))
        tma.store_wait(0)
    else:
        r = gl.arange(0, BK, gl.SliceLayout(1, kv_l))
        d = gl.arange(0, D, gl.SliceLayout(0, kv_l))
        at = PART + (slot * Z + z).to(gl.int64) * (2 * BK * D) + (_opaque(r)[:, None] * D + d[None, :])
        gl.store(at, dk * sm)
        gl.store(at + BK * D, dv)


# ---------------------------------------------------------------- forward

@gluon.jit
def _forward_producer(q_desc, k_desc, v_desc, q_s, k_s, v_s, k_full, k_empty, v_full, v_empty, q_full, q_empty, META, FIRST, LIST,
                      H: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BK: gl.constexpr, ST: gl.constexpr):
    ty: gl.constexpr = q_desc.dtype
    stage = 0
    phase = 1
    qphase = 1
    for u in range(gl.load(FIRST + gl.program_id(0)), gl.load(FIRST + gl.program_id(0) + 1)):
        i = gl.load(META + u * 8)
        lo = gl.load(META + u * 8 + 1)
        hi = gl.load(META + u * 8 + 2)
        z = gl.load(META + u * 8 + 4)
        b = z // H
        h = z % H
        hk = h // G
        mbarrier.wait(q_empty, qphase)
        qphase ^= 1
        mbarrier.expect(q_full, 128 * D * 2)
        tma.async_copy_global_to_shared(q_desc, [b, h, i * 128, 0], q_full, q_s.index(0)._reinterpret(ty, [1, 1, 64, D], q_desc.layout))
        tma.async_copy_global_to_shared(q_desc, [b, h, i * 128 + 64, 0], q_full, q_s.index(1)._reinterpret(ty, [1, 1, 64, D],
            q_desc.layout))
        for t in range(lo, hi):
            j = (gl.load(LIST + t) & 0x1ffffff) * BK
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), BK * D * 2)
            tma.async_copy_global_to_shared(k_desc, [b, hk, j, 0], k_full.index(stage), k_s.index(stage)._reinterpret(ty, [1, 1, BK, D],
                k_desc.layout))
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), BK * D * 2)
            tma.async_copy_global_to_shared(v_desc, [b, hk, j, 0], v_full.index(stage), v_s.index(stage)._reinterpret(ty, [1, 1, BK, D],
                k_desc.layout))
            stage += 1
            if stage == ST:
                stage = 0
                phase ^= 1

@gluon.jit
def _ask(e, j, K_AT, n_keys, k_first, EXPLICIT: gl.constexpr, BIAS: gl.constexpr, BK: gl.constexpr, s_l: gl.constexpr):
    """Positions of the BK keys from j on, where they lie in memory and this tile needs them: asked for while a product is under way, for
    they are long in coming."""
    kp = gl.zeros([BK], gl.int32, gl.SliceLayout(0, s_l))
    if EXPLICIT:
        if BIAS != "none" or e < 0:
            kp = positions(K_AT, k_first, _opaque(j) + gl.arange(0, BK, gl.SliceLayout(0, s_l)), n_keys, EXPLICIT)
    return kp

@gluon.jit
def _float(x):
    """x >= 0 as float32, exact below 2^23, without the slow conversion."""
    return (x + 0x4B000000).to(gl.float32, bitcast=True) - 8388608.0

@gluon.jit
def _scores(s, e, i, qp, kp, qb, ramp, near, each, TABLE, h, n_keys, q_first, k_first, layer, RULE: gl.constexpr, BIAS: gl.constexpr,
    EXPLICIT: gl.constexpr, DOCS: gl.constexpr, BEHIND: gl.constexpr, ALWAYS: gl.constexpr, OPENING: gl.constexpr, REACH: gl.constexpr,
    BK: gl.constexpr, W: gl.constexpr, TABLED: gl.constexpr, s_l: gl.constexpr):
    """Masked raw products, with the bias if there is one, and what all scores of the tile still lack (in the same unit); qp, qb of the
    queries and kp from _ask(); ramp: the bias of a slope along a tile; TABLED: does a table reach the tile:
    0 no, 1 yes, 2 to be found out."""
    j = (e & 0x1ffffff) * BK
    lack = 0.0
    if BIAS == "slope":
        if EXPLICIT:
            s += (each * (_float(kp) - _float(near)))[None, :]
        else:
            s += ramp[None, :]
            lack = each * (k_first + j - near).to(gl.float32)
    elif BIAS == "table":
        if EXPLICIT:
            s = _tabled(s, qp, kp, TABLE, REACH, EXPLICIT, 0)
        elif TABLED > 0:
            apart = q_first + i * 128 + W * 64 - k_first - j
            if TABLED == 1 or _near(apart - BK + 1, REACH):
                s = _tabled(s, gl.arange(0, 64, gl.SliceLayout(1, s_l)), gl.arange(0, BK, gl.SliceLayout(0, s_l)), TABLE - _opaque(apart),
                    REACH, EXPLICIT, 0)
    if e < 0:
        ki = _opaque(j) + gl.arange(0, BK, gl.SliceLayout(0, s_l))
        if not EXPLICIT:
            qp = q_first + _opaque(i) * 128 + W * 64 + gl.arange(0, 64, gl.SliceLayout(1, s_l))
            kp = k_first + ki
        s = gl.where(_sees(qp, kp, qb, ki, h, layer, k_first + n_keys - 1, RULE, EXPLICIT, DOCS, BEHIND, ALWAYS, OPENING, 0), s, -1e30)
    return s, lack

@gluon.jit
def _cut(LIST, lo, hi, start, REACH: gl.constexpr, BK: gl.constexpr, COUNT: gl.constexpr):
    """Where the tiles begin that a table reaches, for queries from `start` on (counted from the first key): tiles are in the order of the
    text, so these are the last ones, fewer than COUNT. Every warp looks for itself."""
    t = hi - COUNT + gl.arange(0, COUNT, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    j = (gl.load(LIST + t, mask=t >= lo, other=0) & 0x1ffffff) * BK
    return hi - gl.sum(gl.where((t >= lo) & _near(start - j - BK + 1, REACH), 1, 0), 0)

@gluon.jit
def _step(s, lack, m, l, scale, LACK: gl.constexpr):
    """One online-softmax step on scores (s + lack) * scale, LACK: is there any: weights, new maxima, new sums, and what multiplies the
    sums so far."""
    high = gl.max(s, 1) * scale
    new = gl.maximum(m, high + lack * scale if LACK else high)
    safe = gl.where(new > -1e20, new, 0.0)
    p = gl.exp2(s * scale - (safe - lack * scale if LACK else safe)[:, None])
    a = gl.exp2(m - safe)
    return p, new, l * a + gl.sum(p, 1), a

@gluon.jit
def _forward_consumer(o_desc, q_s, k_s, v_s, k_full, k_empty, v_full, v_empty, q_full, q_empty, LSE, META, FIRST, LIST, Q_AT, K_AT, BEGIN,
    EACH, TABLE, n, n_keys, q_first, k_first, layer, scale,
                      H: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BK: gl.constexpr, ST: gl.constexpr, RULE: gl.constexpr,
                          BIAS: gl.constexpr, EXPLICIT: gl.constexpr, DOCS: gl.constexpr, BEHIND: gl.constexpr, ALWAYS: gl.constexpr,
                          OPENING: gl.constexpr, REACH: gl.constexpr, K_HEADS: gl.constexpr, QREG: gl.constexpr,
                          W: gl.constexpr):
    ty: gl.constexpr = q_s.dtype
    s_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BK, 16])
    o_l: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    stage = 0
    phase = 0
    qphase = 0
    zs = gl.zeros([64, BK], gl.float32, s_l)
    my_q = q_s.index(W)
    LACK: gl.constexpr = BIAS == "slope" and not EXPLICIT
    # small blocks have registers for a branch (measured)
    TABLE_TWICE: gl.constexpr = BIAS == "table" and not EXPLICIT and BK == 128
    for u in range(gl.load(FIRST + gl.program_id(0)), gl.load(FIRST + gl.program_id(0) + 1)):
        i = gl.load(META + u * 8)
        lo = gl.load(META + u * 8 + 1)
        hi = gl.load(META + u * 8 + 2)
        z = gl.load(META + u * 8 + 4)
        b = z // H
        h = z % H
        mine = K_AT + (b * K_HEADS + h // G % K_HEADS) * n_keys
        each, MINE = bias_of(EACH, TABLE, h, REACH, BIAS)
        qi = i * 128 + W * 64 + gl.arange(0, 64, gl.SliceLayout(1, s_l))
        qp = gl.zeros([64], gl.int32, gl.SliceLayout(1, s_l))
        near = q_first + i * 128 + W * 64 + 63
        if EXPLICIT:
            qp = positions(Q_AT + b * n, q_first, qi, n, EXPLICIT)
            near = gl.max(qp, 0) if BIAS == "slope" else 0
        qb = begins(BEGIN + b * n, qi, n, DOCS) if DOCS else gl.zeros([64], gl.int32, gl.SliceLayout(1, s_l))
        ramp = each * gl.arange(0, BK, gl.SliceLayout(0, s_l)).to(gl.float32)
        m = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, s_l))
        l = gl.zeros([64], gl.float32, gl.SliceLayout(1, s_l))
        acc = gl.zeros([64, D], gl.float32, o_l)
        e = gl.load(LIST + lo)
        cut = lo + 1
        if TABLE_TWICE:
            cut = gl.maximum(_cut(LIST, lo, hi, q_first + i * 128 + W * 64 - k_first, REACH, BK, _room((REACH + 128) // BK + 3)), cut)
        mbarrier.wait(q_full, qphase)
        qphase ^= 1
        if QREG:
            q = my_q.load(gl.DotOperandLayout(0, s_l, 2))
        else:
            q = my_q
        mbarrier.wait(k_full.index(stage), phase)
        s = warpgroup_mma(q, k_s.index(stage).permute((1, 0)), zs, use_acc=False, is_async=True)
        e1 = gl.load(LIST + gl.minimum(lo + 1, hi - 1)) if EXPLICIT else e
        kp = _ask(e, (e & 0x1ffffff) * BK, mine, n_keys, k_first, EXPLICIT, BIAS, BK, s_l)
        s = warpgroup_mma_wait(0, deps=(s,))
        gl.thread_barrier()
        mbarrier.arrive(k_empty.index(stage))
        s, lack = _scores(s, e, i, qp, kp, qb, ramp, near, each, MINE, h, n_keys, q_first, k_first, layer, RULE, BIAS, EXPLICIT, DOCS,
            BEHIND, ALWAYS, OPENING, REACH, BK, W, 2, s_l)
        p, m, l, a = _step(s, lack, m, l, scale, LACK)
        p = gl.convert_layout(p.to(ty), gl.DotOperandLayout(0, o_l, 2))
        # two loops, the far tiles and the near ones: a branch in one would cost more registers, and so time, in all tiles
        for NEAR in gl.static_range(2 if TABLE_TWICE else 1):
            for t in range(cut if NEAR == 1 else lo + 1, cut if TABLE_TWICE and NEAR == 0 else hi):
                if EXPLICIT:
                    e = e1  # known early, for positions are asked for early
                    e1 = gl.load(LIST + gl.minimum(t + 1, hi - 1))
                else:
                    e = gl.load(LIST + t)
                nstage = stage + 1
                nphase = phase
                if nstage == ST:
                    nstage = 0
                    nphase ^= 1
                mbarrier.wait(k_full.index(nstage), nphase)
                s = warpgroup_mma(q, k_s.index(nstage).permute((1, 0)), zs, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(stage), phase)
                acc = warpgroup_mma(p, v_s.index(stage), acc, is_async=True)
                kp = _ask(e, (e & 0x1ffffff) * BK, mine, n_keys, k_first, EXPLICIT, BIAS, BK, s_l)
                s = warpgroup_mma_wait(1, deps=(s,))
                s, lack = _scores(s, e, i, qp, kp, qb, ramp, near, each, MINE, h, n_keys, q_first, k_first, layer, RULE, BIAS, EXPLICIT,
                    DOCS, BEHIND, ALWAYS, OPENING, REACH, BK, W, NEAR if TABLE_TWICE else 2, s_l)
                pf, m, l, a = _step(s, lack, m, l, scale, LACK)
                acc = warpgroup_mma_wait(0, deps=(acc,))
                gl.thread_barrier()
                mbarrier.arrive(k_empty.index(nstage))
                mbarrier.arrive(v_empty.index(stage))
                acc = acc * gl.convert_layout(a, gl.SliceLayout(1, o_l))[:, None]
                p = gl.convert_layout(pf.to(ty), gl.DotOperandLayout(0, o_l, 2))
                stage = nstage
                phase = nphase
        mbarrier.wait(v_full.index(stage), phase)
        acc = warpgroup_mma(p, v_s.index(stage), acc, is_async=True)
        # a row that sees no key gives 0, and lse = +big makes its weights 0 again in the backward pass
        some = (l > 0) & (m > -1e20)
        at = qp if EXPLICIT else q_first + qi
        lse = gl.where(some, m + gl.log2(gl.where(some, l, 1.0)) + own(at, near, each, scale, BIAS), 1e30)
        r = gl.where(some, 1.0 / gl.where(some, l, 1.0), 0.0)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        gl.thread_barrier()
        mbarrier.arrive(v_empty.index(stage))
        stage += 1
        if stage == ST:
            stage = 0
            phase ^= 1
        my_q.store((acc * gl.convert_layout(r, gl.SliceLayout(1, o_l))[:, None]).to(ty))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(o_desc, [b, h, i * 128 + W * 64, 0], my_q._reinterpret(ty, [1, 1, 64, D], o_desc.layout))
        gl.store(LSE + z.to(gl.int64) * n + qi, lse, mask=qi < n)
        tma.store_wait(0)
        gl.thread_barrier()
        mbarrier.arrive(q_empty)

@gluon.jit(do_not_specialize=["n", "n_keys", "q_first", "k_first", "layer"])
def forward(q_desc, k_desc, v_desc, o_desc, LSE, META, FIRST, LIST, Q_AT, K_AT, BEGIN, EACH, TABLE, n, n_keys, q_first, k_first, layer,
            scale,
            H: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BK: gl.constexpr, ST: gl.constexpr, RULE: gl.constexpr, BIAS: gl.constexpr,
                EXPLICIT: gl.constexpr, DOCS: gl.constexpr, BEHIND: gl.constexpr, ALWAYS: gl.constexpr, OPENING: gl.constexpr,
                REACH: gl.constexpr, K_HEADS: gl.constexpr, QREG: gl.constexpr, num_warps: gl.constexpr):
    """128 queries of one head over a list of key tiles: a producer warp, two warpgroups of 64 queries. Each issues the scores of tile
    t + 1, then the product of tile t's weights with its values, and computes the softmax of t + 1 while that product runs. QREG keeps
    the queries in registers. num_warps must be 4 (those of one warpgroup)."""
    ty: gl.constexpr = q_desc.dtype
    sh: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], ty)
    q_s = gl.allocate_shared_memory(ty, [2, 64, D], sh)
    k_s = gl.allocate_shared_memory(ty, [ST, BK, D], sh)
    v_s = gl.allocate_shared_memory(ty, [ST, BK, D], sh)
    k_full = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [ST, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for a in gl.static_range(ST):
        mbarrier.init(k_full.index(a), count=1)
        mbarrier.init(v_full.index(a), count=1)
        mbarrier.init(k_empty.index(a), count=2)
        mbarrier.init(v_empty.index(a), count=2)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=2)
    gl.warp_specialize([
        (_forward_consumer, (o_desc, q_s, k_s, v_s, k_full, k_empty, v_full, v_empty, q_full, q_empty, LSE, META, FIRST, LIST, Q_AT, K_AT,
            BEGIN, EACH, TABLE, n, n_keys, q_first, k_first, layer, scale, H, G, D, BK, ST, RULE, BIAS, EXPLICIT, DOCS, BEHIND, ALWAYS,
            OPENING, REACH, K_HEADS, QREG, 0)),
        (_forward_consumer, (o_desc, q_s, k_s, v_s, k_full, k_empty, v_full, v_empty, q_full, q_empty, LSE, META, FIRST, LIST, Q_AT, K_AT,
            BEGIN, EACH, TABLE, n, n_keys, q_first, k_first, layer, scale, H, G, D, BK, ST, RULE, BIAS, EXPLICIT, DOCS, BEHIND, ALWAYS,
            OPENING, REACH, K_HEADS, QREG, 1)),
        (_forward_producer, (q_desc, k_desc, v_desc, q_s, k_s, v_s, k_full, k_empty, v_full, v_empty, q_full, q_empty, META, FIRST, LIST,
            H, G, D, BK, ST)),
    ], [4, 1], [240, 24])


# fmt: on
# ---------------------------------------------------------------- around the kernels


def described(x, rows):
    """x [B, H, n, D] in boxes of so many rows."""
    box = 1, 1, rows, x.shape[3]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(box), shared_as(box, x.dtype))


@functools.cache
def shared_as(box, dtype):
    return gl.NVMMASharedLayout.get_default_for(list(box), gl.bfloat16 if "bfloat16" in str(dtype) else gl.float16)


def run_forward(q, k, v, out, lse, work, arrays, first, layer, scale, options, keys=64):
    """work: (META, FIRST, LIST) on the device; arrays: positions of queries and keys, documents, biases, as Call.arrays gives them; first:
    (q_first, k_first); keys: 64 or 128 in a block; options: RULE, EXPLICIT, DOCS, BEHIND, ALWAYS, OPENING, BIAS, REACH, K_HEADS."""
    (_, H, n, D), (K, n_keys) = q.shape, k.shape[1:3]
    meta, start, entries = work
    forward[(len(start) - 1,)](
        described(q, 64), described(k, keys), described(v, keys), described(out, 64), lse, meta, start, entries, *arrays,
        n, n_keys, *first, layer, scale * LOG2E, H=H, G=H // K, D=D, BK=keys, ST=(4 if keys == 64 else 2), num_warps=4,
        # a bias along 128 keys takes the registers of the queries (measured for slopes: faster than with blocks of 64)
        QREG=keys == 64 or options["BIAS"] == "none",
        **options,
    )  # fmt: skip


def run_backward(q, k, v, out, lse, do, dlse, dq, dk, dv, work, slots, arrays, first, layer, scale, options):
    """Fills dq, dk, dv; returns the parts of cut blocks [slots, B K, 2, 128 or 64, D] float32 (None: no block is cut), which
    add_parts_kernel has to sum.
    D 128: blocks of 64 queries and 128 keys; D 64: 64 and 64, one program for each piece."""
    (B, H, n, D), (K, n_keys) = q.shape, k.shape[1:3]
    meta, start, entries = work
    small = D == 64
    keys, warps, tiles = (64, 4, triton.cdiv(n, 64)) if small else (128, 8, triton.cdiv(n, 64))
    parts = 4 if options["EXPLICIT"] or options["DOCS"] else 2
    ld = lse.new_empty(B * H * tiles * parts * 64)
    sums = lse.new_empty(B * H * tiles * D // 4, 256)
    part = lse.new_empty(slots, B * K, 2, keys, D) if slots else ld
    prepare[(tiles, B * H)](
        out,
        do,
        lse,
        lse if dlse is None else dlse,
        ld,
        sums,
        arrays[0],
        *arrays[2:4],
        n,
        *out.stride()[:3],
        *do.stride()[:3],
        scale * LOG2E,
        H,
        D,
        64,
        dlse is not None,
        options["BIAS"],
        options["EXPLICIT"],
        options["DOCS"],
        num_warps=4,
    )
    box = lambda x, shape: TensorDescriptor(x, list(x.shape), list(x.stride()), shape, gl.NVMMASharedLayout(0, 32, len(shape)))
    given = (
        described(q, 64),
        described(k, keys),
        described(v, keys),
        described(do, 64),
        box(ld, [parts * 64]),
        described(dk, keys),
        described(dv, keys),
    )
    rest = arrays[1], *arrays[3:], B * K, n_keys, *first, layer, tiles, scale * LOG2E, scale
    options = options | {"H": H, "G": H // K, "D": D, "BQ": 64, "BK": keys, "num_warps": warps}

    def launch(late):
        if small:
            backward_small[(len(meta),)](*given, sums, part, meta, entries, *rest, LATE=late, **options)
        else:
            backward[(len(start) - 1,)](*given, box(sums, [D // 4, 256]), part, meta, start, entries, *rest, ST=3, LATE=late, **options)

    first_that_compiles(launch, (q.dtype, *options.values()))
    finish[(tiles, B * H)](sums, dq, n, scale, *dq.stride()[:3], H, D, 64, warps, num_warps=4)
    return part if slots else None


def first_that_compiles(launch, key):
    """Launches a kernel in one of two forms. ptxas 12.8 crashes with a few rules where positions lie in memory, each time another form is
    spared; PTXASError: neither is."""
    if key in forms:
        if forms[key] is None:
            raise PTXASError("ptxas crashed before")
        launch(forms[key])
        return
    for late in (True, False):
        try:
            # with its error Triton prints the whole kernel
            with contextlib.redirect_stdout(io.StringIO()):
                launch(late)
            forms[key] = late
            return
        except PTXASError:
            forms[key] = None
    raise PTXASError("ptxas crashes with either form")


forms = {}  # by what is compiled in: LATE, or None where no form compiles
