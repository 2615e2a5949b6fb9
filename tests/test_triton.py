"""The Triton kernels against float64: on a GPU, or interpreted on a CPU (TRITON_INTERPRET=1), there in float32 and float16 alone."""

import os

import numpy as np
import pytest
from conftest import places, small

import kernels
import ops
import plugins
from kernels import Bias

if not kernels.TRITON:
    pytest.skip("needs Triton, and CUDA or TRITON_INTERPRET=1", allow_module_level=True)

import torch

from backends import torch_
from kernels import plan, triton_

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# ||x - exact|| / ||exact||
EPS = {"float32": 3e-6, "float16": 2e-3, "bfloat16": 1e-2}
DTYPES = ["float32", "float16"] if INTERPRETED else list(EPS)
RULES = [small("attention", n) for n in plugins.names("attention") if hasattr(plugins.load("attention", n), "allowed")]
# rows, query heads, key heads, queries, keys, head width: odd lengths, more queries than a block, few keys, every kind of width
SHAPES = [
    (16, 2, 2, 2, 2, 8),  # of fewer vectors, so short sums now and then cancel, and rounding of 16 bits shows
    (2, 4, 2, 150, 150, 16),
    (1, 6, 2, 33, 171, 40),
    (1, 2, 1, 130, 131, 64),
    (1, 3, 1, 65, 200, 128),
    (1, 2, 2, 70, 90, 256),
]

# on a GPU the kernels for 16 bits, which may be others, too
KINDS = [("float32", 16)] if INTERPRETED else [("float32", 16), ("bfloat16", 64), ("bfloat16", 128), ("float16", 128)]

every_kind = pytest.mark.parametrize(("dtype", "D"), KINDS, ids=lambda x: str(x))
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda s: s.partition(":")[0])


def inputs(B, H, K, T, N, D, dtype):
    """Fresh random numbers each time: q, k, v that take gradients, and weights of the output."""
    draw = lambda heads, n: torch.randn(B, heads, n, D, device=ops.device(), dtype=getattr(torch, dtype))
    return *(x.requires_grad_() for x in (draw(H, T), draw(K, N), draw(K, N))), draw(H, T)


def placed(rule, H, K, layer=1):
    return plugins.place(plugins.parse("attention", rule), layer=layer, n_layer=2, n_head=H, n_kv_head=K)


def exact(q, k, v, q_at, k_at, rule, begin, always, opening, bias):
    """out and lse in float64, with numpy's reading of the rule."""
    B, H, T, D = q.shape
    k, v = (x.double().repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    at, keys = (ops.numpy(x.at).astype("int64") for x in (q_at, k_at))
    at, keys = np.broadcast_to(at, (B, 1, T))[..., None], np.broadcast_to(keys, (B, keys.shape[1], k.shape[2]))[:, :, None]
    keys = keys.repeat(H // keys.shape[1], 1)
    b = 0 if begin is None else ops.numpy(begin)[..., None]
    see = rule.module.allowed(at - b, keys - b, np.arange(H)[:, None, None], rule.options)
    see = see | (np.arange(keys.shape[3]) < always) | (keys - b < opening)
    see = torch.from_numpy(np.broadcast_to(see & (keys <= at) & (keys >= b), (B, H, T, keys.shape[3])).copy()).to(q.device)
    s = q.double() @ k.transpose(2, 3) * D**-0.5
    far = torch.from_numpy((at - keys).copy()).to(q.device)
    if bias is not None and bias.slope is not None:
        s = s - bias.slope.double()[:, None, None] * far
    if bias is not None and bias.table is not None:
        R = bias.table.shape[1]
        i = far.clamp(0, R - 1).expand(s.shape) + R * torch.arange(H, device=q.device)[:, None, None]
        s = s + bias.table.double().flatten()[i]
    s = s.masked_fill(~see, -torch.inf)
    p = torch.where(see.any(-1, keepdim=True), s, 0.0).softmax(-1) * see
    return p @ v, s.logsumexp(-1)


def agree(dtype, arrays, q_at, k_at, rule, begin=None, always=0, opening=0, bias=None, lse=True):
    """out, lse and all gradients, of a sum that both enter."""
    *qkv, w = arrays
    trained = [*qkv, *([bias.table] if bias is not None and bias.table is not None else [])]
    # the allocator hands these out again: what a kernel does not write is seen
    poison = [torch.full((1 << 20,), torch.nan, device=ops.device()) for _ in range(8)]
    del poison
    want, sums = exact(*qkv, q_at, k_at, rule, begin, always, opening, bias)
    got, found = triton_.attend(*qkv, q_at, k_at, rule, begin, always, opening, None, bias, lse=True)
    assert got.dtype == arrays[0].dtype and found.dtype == torch.float32
    some = torch.isfinite(sums)
    assert (found[~some] == -torch.inf).all() and (got[~some] == 0).all()
    u = torch.randn_like(found) if lse else torch.zeros_like(found)
    total = lambda y, s: (y.double() * w.double()).sum() + (torch.where(some, s.double(), 0) * u).sum()
    pairs = [(got, want), (torch.where(some, found, 0), torch.where(some, sums, 0))]
    pairs += zip(*(torch.autograd.grad(total(*x), trained) for x in ((got, found), (want, sums))))
    for what, (a, b) in zip(("out", "lse", "dq", "dk", "dv", "dtable"), pairs):
        off = float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm().clamp(min=1e-9))
        assert off < EPS[dtype], f"{what} is off by {off:.1e}"


def row(n, first=0):
    return places(np.arange(first, first + n))._replace(first=first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_the_kernels_are_exact(shape, dtype):
    _, H, K, T, N, _ = shape
    agree(dtype, inputs(*shape, dtype), row(T, N - T), row(N), placed("longformer:window=40,n_global=7", H, K))


@every_kind
@every_rule
def test_every_rule_is_compiled(rule, dtype, D):
    agree(dtype, inputs(1, 4, 2, 150, 180, D, dtype), row(150, 30), row(180), placed(rule, 4, 2))


@every_kind
@pytest.mark.parametrize("rule", [r for r in RULES if r.partition(":")[0] in ("bigbird", "local", "duo", "longformer")])
def test_far_positions(rule, dtype, D):
    first = (1 << 20) - 70
    agree(dtype, inputs(1, 4, 2, 150, 180, D, dtype), row(150, first + 30), row(180, first), placed(rule, 4, 2))


@every_kind
@pytest.mark.parametrize("rule", [r for r in RULES if r.partition(":")[0] in ("full", "bigbird", "longformer")])
def test_scattered_keys(rule, dtype, D):
    """Key heads that remember different tokens, holes, keys of the future, documents, exempt slots and openings."""
    B, H, K, T, N = 2, 4, 2, 81, 150
    draw = np.random.default_rng()
    k_at = np.stack([draw.permutation(260)[:N] for _ in range(B * K)]).reshape(B, K, N)
    k_at = np.where(draw.random(k_at.shape) < 0.2, -1, k_at)
    q_at = np.stack([np.arange(120, 120 + T), np.arange(140, 140 + T)])
    begin = torch.from_numpy(np.where(q_at < 170, 3, 170).astype("int32"))[:, None].to(ops.device())
    arrays = inputs(B, H, K, T, N, D, dtype)
    agree(dtype, arrays, places(q_at), places(k_at), placed(rule, H, K))
    agree(dtype, arrays, places(q_at), places(k_at), placed(rule, H, K), begin, always=3, opening=5)


def test_where_everything_may_be_seen_the_host_waits_for_no_positions(monkeypatch):
    arrays, read = inputs(2, 2, 1, 70, 90, 16, "float32"), []
    monkeypatch.setattr(torch_, "_read", read)
    k_at = np.where(np.arange(90) % 7 == 3, -1, np.arange(90)[::-1])
    at = row(70, 40), places(np.stack([k_at, k_at[::-1]])[:, None])
    agree("float32", arrays, *at, placed("full", 2, 1), bias=Bias(slope=torch.tensor([0.5, 0.01], device=ops.device())))
    assert not read
    agree("float32", arrays, *at, placed("window:window=9", 2, 1))
    assert read, "or this test is blind"


@every_kind
def test_documents(dtype, D):
    begin = np.stack([np.where(np.arange(200) < 71, 0, 71), np.where(np.arange(200) < 130, 0, 130)]).astype("int32")[:, None]
    begin = torch.from_numpy(begin).to(ops.device())
    agree(dtype, inputs(2, 4, 2, 200, 200, D, dtype), row(200), row(200), placed("longformer:window=40,n_global=7", 4, 2), begin)


@every_kind
def test_queries_behind_the_last_key(dtype, D):
    """The last block of keys is cut short by their end, and no query is before that."""
    for rule in ("full", "window:window=60"):
        agree(dtype, inputs(1, 4, 2, 40, 90, D, dtype), row(40, 100), row(90), placed(rule, 4, 2))


@every_kind
def test_rows_that_see_nothing(dtype, D):
    rule = placed("window:window=5", 2, 1)
    agree(dtype, inputs(1, 2, 1, 40, 40, D, dtype), row(40), row(40, 20), rule)


@every_kind
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("kind", ["slope", "table"])
def test_biases(kind, explicit, dtype, D):
    H, T = 4, 150
    table = torch.randn(H, 33, device=ops.device(), requires_grad=True)
    bias = Bias(torch.rand(H, device=ops.device())) if kind == "slope" else Bias(None, table)
    at = places(np.arange(T)) if explicit else row(T)
    agree(dtype, inputs(2, H, 2, T, T, D, dtype), at, at, placed("longformer:window=90,n_global=9", H, 2), bias=bias)


@every_kind
@pytest.mark.parametrize("reach", [1, 2, 18, 129, 300])
def test_tables_of_every_length(reach, dtype, D):
    """Shorter than a block, longer than one, longer than the text; blocks that do not begin at the same positions."""
    H, T, N = 4, 150, 211
    bias = Bias(None, torch.randn(H, reach, device=ops.device(), requires_grad=True))
    begin = torch.from_numpy(np.where(np.arange(T) < 71, 0, 71 + 9).astype("int32"))[None, None].to(ops.device())
    for rule, b in (("full", None), ("longformer:window=90,n_global=9", begin)):
        agree(dtype, inputs(1, H, 2, T, N, D, dtype), row(T, N - T + 9), row(N, 9), placed(rule, H, 2), b, bias=bias)


@every_kind
@pytest.mark.parametrize("kind", ["slope", "table"])
def test_biases_of_far_positions(kind, dtype, D):
    """Scattered keys, some of them far away, and a text far from its beginning."""
    H, T, N, first = 4, 81, 150, (1 << 20) - 70
    table = torch.randn(H, 33, device=ops.device(), requires_grad=True)
    bias = Bias(2.0 ** -torch.arange(1, H + 1, device=ops.device()), None) if kind == "slope" else Bias(None, table)
    rule = placed("longformer:window=90,n_global=9", H, 2)
    agree(dtype, inputs(1, H, 2, T, N, D, dtype), row(T, first + N - T), row(N, first), rule, bias=bias)
    draw = np.random.default_rng()
    k_at = np.stack([draw.permutation(260)[:N] for _ in range(4)]).reshape(2, 2, N)
    k_at = np.where(draw.random(k_at.shape) < 0.2, -1, k_at + first)
    q_at = np.stack([np.arange(120, 120 + T), np.arange(140, 140 + T)]) + first
    q_at[:, 70:] = -1
    begin = torch.from_numpy(np.where(q_at < first + 170, 3, first + 170).astype("int32"))[:, None].to(ops.device())
    agree(dtype, inputs(2, H, 2, T, N, D, dtype), places(q_at), places(k_at), rule, begin, always=3, bias=bias)


@every_kind
@pytest.mark.parametrize("keys", [64, 128])
@pytest.mark.parametrize("kind", ["slope", "table", "explicit"])
def test_long_lists(kind, keys, monkeypatch, dtype, D):
    """Far blocks, then near ones; blocks of keys as long as lists of many are worth."""
    monkeypatch.setattr(triton_, "keys_for", lambda mean, call: keys)
    monkeypatch.setattr(triton_, "gains", lambda D, call: True)
    triton_.recent.clear()
    H, T, N = 2, 300, 700
    table = torch.randn(H, 40, device=ops.device(), requires_grad=True)
    bias = {"slope": Bias(torch.rand(H, device=ops.device()) / 4), "table": Bias(None, table), "explicit": None}[kind]
    at = places(np.arange(N - T, N)) if kind == "explicit" else row(T, N - T)
    k_at = places(np.arange(N)) if kind == "explicit" else row(N)
    for rule in ("full", "window:window=250"):
        agree(dtype, inputs(1, H, 1, T, N, D, dtype), at, k_at, placed(rule, H, 1), bias=bias)
    triton_.recent.clear()


@every_kind
@pytest.mark.parametrize("kind", ["slope", "table"])
def test_parts_are_merged_by_their_log_sum_exps(kind, dtype, D):
    """The log-sum-exps are those of the whole scores, whatever the kernels leave out of them."""
    H, T, N, half = 4, 90, 300, 128
    table = torch.randn(H, 18, device=ops.device())
    bias = Bias(torch.rand(H, device=ops.device()) / 4, None) if kind == "slope" else Bias(None, table)
    q, k, v, w = inputs(1, H, 2, T, N, D, dtype)
    rule = placed("full", H, 2)
    at = row(T, N - T)
    want, sums = exact(q, k, v, at, row(N), rule, None, 0, 0, bias)
    parts = [(0, half), (half, N)]
    got = [triton_.attend(q, k[:, :, a:b], v[:, :, a:b], at, row(b - a, a), rule, bias=bias, lse=True) for a, b in parts]
    lse = torch.stack([s for _, s in got])
    merged = sum(y * s.exp()[..., None] for (y, _), s in zip(got, lse - lse.logsumexp(0)))
    off = lambda a, b: float((a.double() - b).norm() / b.norm())
    assert off(lse.logsumexp(0), sums) < EPS[dtype] and off(merged, want) < EPS[dtype]
    grads = zip(*(torch.autograd.grad((y.double() * w).sum(), (q, k, v)) for y in (merged, want)))
    assert all(off(a, b.double()) < 2 * EPS[dtype] for a, b in grads)


@every_kind
def test_blocks_that_are_cut(monkeypatch, dtype, D):
    """Keys that all queries see are many programs' work; their parts add up."""
    monkeypatch.setattr(plan, "LEAST", 2)
    monkeypatch.setattr(plan, "SHARES", 1 << 20)
    triton_.recent.clear()
    for rule in ("longformer:window=40,n_global=7", "bigbird:block=16,n_global=1,n_random=1"):
        agree(dtype, inputs(2, 4, 2, 500, 500, D, dtype), row(500), row(500), placed(rule, 4, 2))
    assert any(made.slots > 3 for made in triton_.recent.made.values())
    triton_.recent.clear()


@every_kind
def test_tensors_as_the_model_has_them(dtype, D):
    """Transposed, expanded, unaligned: what a descriptor cannot take is copied."""
    rule = placed("window:window=40", 4, 2)
    q, k, v, w = inputs(2, 4, 2, 100, 100, D, dtype)
    turn = lambda x: x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    agree(dtype, (turn(q), turn(k), turn(v), w[:1, :1, :1].expand(w.shape)), row(100), row(100), rule)
    odd = torch.randn(2, 4, 100, D + 1, device=ops.device(), dtype=q.dtype)[..., 1:].detach().requires_grad_()
    agree(dtype, (odd, k, v, w), row(100), row(100), rule)


@every_kind
def test_without_lse_in_the_loss(dtype, D):
    arrays = inputs(1, 2, 1, 100, 100, D, dtype)
    agree(dtype, arrays, row(100), row(100), placed("window:window=40", 2, 1), lse=False)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_inside_torch_compile(backend):
    """One graph, no break, the same numbers, and again at another length."""
    torch._dynamo.reset()
    rule = placed("longformer:window=40,n_global=7", 4, 2)
    f = lambda q, k, v: kernels.attend(q * 2, k, v, row(q.shape[2]), row(q.shape[2]), rule) + 1
    g = torch.compile(f, fullgraph=True, backend=backend)
    kernels_before = kernels.ENGINE
    kernels.ENGINE = "triton"
    try:
        for n in (130, 171):
            q, k, v, w = inputs(1, 4, 2, n, n, 16, "float32")
            a, b = f(q, k, v), g(q, k, v)
            assert torch.equal(a, b)
            for x, y in zip(torch.autograd.grad(a, (q, k, v), w), torch.autograd.grad(b, (q, k, v), w)):
                assert torch.equal(x, y)
    finally:
        kernels.ENGINE = kernels_before


def test_the_op_keeps_its_promises():
    q, k, v, _ = inputs(1, 4, 2, 70, 70, 16, "float32")
    name = triton_.named(placed("window:window=20", 4, 2))
    torch.library.opcheck(triton_.flash, (q, k, v, name, 0, 0, None, None, None, 0, 0, 0.25, None, None))


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled under the interpreter")
def test_another_length_compiles_nothing():
    rule = placed("longformer:window=40,n_global=7", 4, 2)
    run = lambda n: agree("float32", inputs(1, 4, 2, n, n, 16, "float32"), row(n), row(n), rule, lse=False)
    count = lambda: sum(
        len(c[0]) for f in (triton_.forward_kernel, triton_.dq_kernel, triton_.dkv_kernel) for c in f.device_caches.values()
    )
    run(130)
    before = count()
    for n in (64, 171, 1024, 1031):
        run(n)
    assert count() == before > 0
