"""Every engine of attend() against its specification, kernels/dense.py, and that against numpy: values and all gradients."""

import functools

import numpy as np
import pytest
from conftest import JOINED, apart, gradients, loss_and_gradients, named, places, small, text, tiny
from conftest import RULES as ALONE

import kernels
import ops
import plugins
from kernels import Bias

ENGINES = ["stock", "auto", "blocks", *(["triton"] if kernels.TRITON else [])]
RULES = [small("attention", n) for n in ALONE + JOINED]
# rows, query heads, key heads, queries, keys, head width
SHAPES = [(1, 4, 4, 1, 1, 8), (2, 4, 2, 17, 17, 8), (3, 6, 1, 1, 33, 16), (2, 4, 4, 37, 61, 20), (1, 2, 2, 128, 131, 32)]
# in units of the spread: the largest error in float32; in bfloat16, where an engine may round scores to 8 bits, the mean one
EPS = {"float32": 2e-5, "bfloat16": 1e-2}

every_rule = pytest.mark.parametrize("rule", RULES, ids=named)
every_engine = pytest.mark.parametrize("engine", ENGINES)


def inputs(B, H, K, T, N, D, seed=0, dtype="float32", width=None):
    """q, k, v and weights of the output; width: of values, D if None."""
    draw, width = np.random.default_rng(seed), width or D
    return [
        ops.array(draw.normal(size=(B, n, m, d)).astype("float32"), getattr(ops, dtype)) * s
        for n, m, d, s in ((H, T, D, 2), (K, N, D, 1), (K, N, width, 1), (H, T, width, 1))
    ]


def biased(kind, H=4, R=9, size=2):
    """A Bias, different in every head; None: none."""
    if kind is None:
        return None
    if kind == "slope":
        return Bias(ops.array(np.array([0.3 / (h + 1) ** 2 for h in range(H)], "float32")))
    return Bias(None, ops.array(np.random.default_rng(H).normal(size=(H, R)).astype("float32")) * size)


def trained(arrays, bias=None):
    """What of attend()'s arguments has gradients, and what makes of them the arrays and the bias again."""
    table = [] if bias is None or bias.table is None else [bias.table]
    return [*arrays[:3], *table], lambda *x: (x[:3], Bias(None, x[3]) if table else bias)


def outcome(use, engine, arrays, *how, bias=None, **named):
    """attend() and the gradients of <attend, w> by q, k and v, and a bias's table, as numpy."""
    use(engine)
    given, parts = trained(arrays, bias)

    def attend(*x):
        qkv, bias = parts(*x)
        return kernels.attend(*qkv, *how, bias=bias, **named)

    (q, _, v, w), y = arrays, attend(*given)
    assert y.dtype == q.dtype and tuple(y.shape) == (*q.shape[:3], v.shape[3])
    f = lambda *x: (ops.cast(attend(*x), ops.float32) * ops.cast(w, ops.float32)).sum()
    return [ops.numpy(a) for a in (y, *gradients(f, *given))]


def agree(use, engine, dtype, arrays, *how, rows=1, **named):
    """rows: 0 for queries whose answer is nobody's business, in what broadcasts to the output."""
    for what, a, b in zip("yqkvt", *(outcome(use, e, arrays, *how, **named) for e in (engine, "dense"))):
        a, b = (a * rows, b * rows) if what == "y" else (a, b)
        error = apart(a, b) if dtype == "float32" else np.sqrt(np.mean((a - b) ** 2)) / (b.std() + 1e-9)
        # where a query sees itself alone its gradient is nothing but rounding
        error = error if b.any() else np.abs(a).max()
        assert error <= EPS[dtype], "y" if what == "y" else f"gradient of {what}"


@pytest.mark.parametrize("kind", [None, "slope", "table"])
def test_dense_equals_numpy(use, kind):
    """The specification itself, written out once more in float64."""
    B, H, K, T, N, D = 2, 4, 2, 9, 13, 8
    q, k, v, _ = (ops.numpy(a).astype("float64") for a in inputs(B, H, K, T, N, D))
    at, keys = np.arange(4, 13), np.arange(13)
    s = np.einsum("bhtd,bhnd->bhtn", q, k.repeat(2, 1)) * 0.3
    bias, far = biased(kind, R=3), at[:, None] - keys
    if kind == "slope":
        s -= ops.numpy(bias.slope).astype("float64")[:, None, None] * far
    if kind == "table":
        s += ops.numpy(bias.table).astype("float64")[:, far.clip(0, 2)]
    s[:, :, (keys > at[:, None]) | (at[:, None] - keys >= 5)] = -np.inf
    p = np.exp(s - s.max(-1, keepdims=True))
    want = np.einsum("bhtn,bhnd->bhtd", p / p.sum(-1, keepdims=True), v.repeat(2, 1))
    use("dense")
    how = places(at), places(keys), plugins.parse("attention", "window:window=5")
    got, lse = kernels.attend(*inputs(B, H, K, T, N, D)[:3], *how, scale=0.3, bias=bias, lse=True)
    assert apart(ops.numpy(got), want) < 1e-5 and apart(ops.numpy(lse), np.log(np.exp(s).sum(-1))) < 1e-5


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@every_engine
@every_rule
def test_engines_agree(use, rule, engine, shape, dtype):
    """The last T of N consecutive tokens: the host knows, so plain causal attention may take its fast path."""
    T, N = shape[3:5]
    q_at = places(np.arange(N - T, N))._replace(first=N - T)
    agree(use, engine, dtype, inputs(*shape, dtype=dtype), q_at, places(np.arange(N))._replace(first=0), plugins.parse("attention", rule))


@every_engine
def test_consecutive_keys_that_are_not_the_queries_own(use, engine):
    """Consecutive as the host knows them, but the keys begin, or end, later than the fast path may assume."""
    for first, keys_first in ((5, 0), (8, 3), (14, 2)):
        q_at = places(np.arange(first, first + 6))._replace(first=first)
        k_at = places(np.arange(keys_first, keys_first + 16))._replace(first=keys_first)
        agree(use, engine, "float32", inputs(2, 4, 2, 6, 16, 8), q_at, k_at, plugins.parse("attention", "full"))


@every_engine
@every_rule
def test_engines_agree_on_scattered_keys(use, rule, engine):
    """Key heads that remember different tokens, holes, keys of the future, documents, exempt slots, and a scale."""
    shape = B, _, K, T, N, _ = 2, 4, 2, 21, 45, 8
    draw = np.random.default_rng(3)
    k_at = np.stack([draw.permutation(60)[:N] for _ in range(B * K)]).reshape(B, K, N)
    k_at = np.where(draw.random(k_at.shape) < 0.2, -1, k_at)
    k_at[..., :T] = np.arange(30, 30 + T)  # so that no row is empty
    q_at = np.arange(30, 30 + T)
    begin = ops.array(np.where(q_at < 41, 0, 41).astype("int32")[None, None].repeat(B, 0))
    how = (places(q_at), places(k_at), plugins.parse("attention", rule), begin, 3, 0, 0.2)
    agree(use, engine, "float32", inputs(*shape), *how)


@every_engine
def test_rows_that_see_nothing_give_zeros(use, engine):
    """A query before every key, and one whose document has no key yet; their gradients are zeros too, not NaN."""
    arrays = inputs(2, 4, 2, 6, 9, 8)
    q_at, k_at = places([3, 3, 20, 21, 22, 23]), places([*range(10, 18), -1])
    begin = ops.array(np.array([[[0, 0, 0, 0, 19, 19]]] * 2, "int32"))
    y, dq, dk, dv = outcome(use, engine, arrays, q_at, k_at, plugins.parse("attention", "full"), begin)
    for a in (y, dq):
        assert (a[:, :, [0, 1, 4, 5]] == 0).all() and (a[:, :, [2, 3]] != 0).all()
    assert all(np.isfinite(a).all() for a in (dk, dv)) and (dk[:, :, 8] == 0).all() and (dv[:, :, 8] == 0).all()
    agree(use, engine, "float32", arrays, q_at, k_at, plugins.parse("attention", "full"), begin)


def with_lse(use, engine, arrays, *how, lost=0.0, bias=None, **named):
    """y, lse and the gradients of <y, w> + <sin lse, w's first column>; lost: the gradient that rows without keys get handed."""
    use(engine)
    (*qkv, w), (given, parts) = arrays, trained(arrays, bias)

    def f(*x):
        qkv, bias = parts(*x)
        y, lse = kernels.attend(*qkv, *how, lse=True, bias=bias, **named)
        some = lse > -1e30
        u = ops.where(some, ops.cast(w[..., 0], ops.float32), lost)
        return ops.cast(y * w, ops.float32).sum() + (u * ops.where(some, ops.sin(ops.where(some, lse, 0.0)), lse)).sum()

    y, lse = kernels.attend(*qkv, *how, lse=True, bias=bias, **named)
    assert y.dtype == qkv[0].dtype and lse.dtype == ops.float32 and tuple(lse.shape) == tuple(y.shape[:3])
    return [ops.numpy(a) for a in (y, lse, *gradients(f, *given))]


@pytest.mark.parametrize("dtype", EPS)
@every_engine
@every_rule
def test_log_sum_exp(use, rule, engine, dtype):
    """Values and gradients, of a whole text and of one with documents."""
    begin = ops.array(np.where(np.arange(37) < 11, 20, 35).astype("int32")[None, None].repeat(2, 0))
    q_at, k_at = places(np.arange(24, 61))._replace(first=24), places(np.arange(61))._replace(first=0)
    for b in (None, begin):
        how = q_at, k_at, plugins.parse("attention", rule), b, 2
        got, want = (with_lse(use, e, inputs(2, 4, 2, 37, 61, 16, dtype=dtype), *how) for e in (engine, "dense"))
        for what, a, b in zip(("y", "lse", "dq", "dk", "dv"), got, want):
            error = apart(a, b) if dtype == "float32" else np.sqrt(np.mean((a - b) ** 2)) / b.std()
            assert error <= EPS[dtype], what


@every_engine
def test_log_sum_exp_of_nothing(use, engine):
    """It is minus infinity, and the gradient by that changes nothing."""
    q_at, k_at = places(np.arange(10, 30))._replace(first=10), places(np.arange(16, 46))._replace(first=16)
    how = q_at, k_at, plugins.parse("attention", "window:window=4")
    y, lse, dq, dk, dv = with_lse(use, engine, inputs(2, 4, 2, 20, 30, 8), *how, lost=1.0)
    assert (lse[:, :, :6] == -np.inf).all() and np.isfinite(lse[:, :, 6:]).all() and (y[:, :, :6] == 0).all() and (dq[:, :, :6] == 0).all()
    for a, b in zip((dq, dk, dv), with_lse(use, "dense", inputs(2, 4, 2, 20, 30, 8), *how)[2:]):
        assert apart(a, b) < 1e-4


every_bias = pytest.mark.parametrize("kind", ["slope", "table"])
some_rules = pytest.mark.parametrize("rule", [small("attention", n) for n in ("full", "longformer", "duo&bigbird|local")], ids=named)


def behind(T, N):
    """Places of the last T of N consecutive tokens, and of all."""
    return places(np.arange(N - T, N))._replace(first=N - T), places(np.arange(N))._replace(first=0)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("shape", [(3, 4, 1, 1, 33, 16), (2, 4, 2, 37, 61, 8)], ids=lambda s: "x".join(map(str, s)))
@every_bias
@every_engine
@some_rules
def test_a_bias(use, rule, engine, kind, shape, dtype):
    """One query or many, with documents and exempt keys or without."""
    T, N = shape[3:5]
    begin = ops.array(np.where(np.arange(N - T, N) < 50, 20, 50).astype("int32")[None, None].repeat(shape[0], 0))
    for how in ((), (begin, 2, 1)):
        agree(use, engine, dtype, inputs(*shape, dtype=dtype), *behind(T, N), plugins.parse("attention", rule), *how, bias=biased(kind))


@pytest.mark.parametrize("engine, room", [*((e, 1 << 20) for e in ENGINES), ("auto", 1100), ("auto", 1)])
@every_bias
def test_a_bias_of_scattered_keys(use, engine, kind, room, monkeypatch):
    """Key heads that remember different tokens, holes, documents; one query at a time, some, all; padding and empty rows."""
    monkeypatch.setattr(kernels, "SCORES", room)
    B, K, T, N = 2, 2, 7, 45
    draw = np.random.default_rng(3)
    k_at = np.stack([draw.permutation(60)[:N] for _ in range(B * K)]).reshape(B, K, N)
    k_at = np.where(draw.random(k_at.shape) < 0.2, -1, k_at)
    q_at = np.array([[0, 30, 31, 40, 41, 60, 100], [12, 13, 14, 55, 56, -1, -1]])
    begin = ops.array(np.where(q_at < 41, 0, np.where(q_at < 100, 41, 100)).astype("int32")[:, None])
    arrays, rows = inputs(B, 4, K, T, N, 8), (q_at >= 0)[:, None, :, None]
    arrays[3] = arrays[3] * ops.array(rows)
    how = places(q_at), places(k_at), plugins.parse("attention", "window:window=40"), begin, 3, 0, 0.2
    agree(use, engine, "float32", arrays, *how, bias=biased(kind), rows=rows)
    y = outcome(use, engine, arrays, *how, bias=biased(kind))[0]
    assert (y[0, :, -1] == 0).all(), "a document without keys"
    how = places(q_at[:1, 1:4]), places(k_at[:1]), *how[2:3], begin[:1, :, 1:4], *how[4:]
    arrays = inputs(1, 4, K, 3, N, 8)
    got, want = (with_lse(use, e, arrays, *how, bias=biased(kind)) for e in (engine, "dense"))
    assert all(apart(a, b) < 2e-5 for a, b in zip(got, want))


@every_bias
@every_engine
def test_a_query_that_sees_nothing_gives_zeros_under_a_bias(use, engine, kind):
    """Alone, and among others; in 16 bits too."""
    for q_at, dtype in (([3], "float32"), ([3, 20, 3], "float32"), ([3], "bfloat16"), ([3, 20, 3], "bfloat16")):
        arrays = inputs(2, 4, 2, len(q_at), 9, 8, dtype=dtype)
        how = places(q_at), places([*range(10, 18), -1]), plugins.parse("attention", "full")
        for bias in (biased(kind), None):
            y, dq, *rest = outcome(use, engine, arrays, *how, bias=bias)
            for a in (y, dq):
                assert all((a[:, :, i] == 0).all() == (at == 3) for i, at in enumerate(q_at))
            assert all(np.isfinite(a).all() for a in rest)


@pytest.mark.parametrize("dtype", EPS)
@every_engine
def test_slopes_far_away(use, engine, dtype):
    """The nearest keys stand thousands of tokens before the query, so that all that counts are small differences of large numbers."""
    H, T, N, far = 4, 20, 40, 5000
    bias = Bias(ops.array(np.array([1, 0.5, 0.1, 0.01], "float32")))
    q_at, k_at = places(np.arange(far, far + T))._replace(first=far), places(np.arange(N))._replace(first=0)
    arrays, rule = inputs(1, H, 2, T, N, 8, dtype=dtype), plugins.parse("attention", "full")
    q, k, v = (ops.numpy(x).astype("float64") for x in arrays[:3])
    s = q @ k.repeat(2, 1).swapaxes(2, 3) / 8**0.5
    s -= ops.numpy(bias.slope)[:, None, None].astype("float64") * (np.arange(far, far + T)[:, None] - np.arange(N))
    p = np.exp(s - s.max(-1, keepdims=True))
    want = p / p.sum(-1, keepdims=True) @ v.repeat(2, 1)
    y = outcome(use, engine, arrays, q_at, k_at, rule, bias=bias)[0]
    # float32 itself tells distances of 5000 apart by 2e-4 of a slope of 1
    assert apart(y, want) < {"float32": 1e-3, "bfloat16": 3e-2}[dtype]


@every_bias
@pytest.mark.parametrize("engine", ["dense", *ENGINES])
def test_what_of_a_bias_is_trained(use, engine, kind):
    """A table; slopes are constants on every engine."""
    use(engine)
    (q, k, v, w), how = inputs(2, 4, 2, 37, 61, 8), (*behind(37, 61), plugins.parse("attention", "full"))
    for wanted in (False, True):
        made = lambda x: Bias(x) if kind == "slope" else Bias(None, x)

        def f(x, made=made, wanted=wanted):
            y = kernels.attend(q, k, v, *how, bias=made(x), lse=wanted)
            return ((y[0] if wanted else y) * w).sum() + 0 * x.sum()

        (g,) = gradients(f, getattr(biased(kind), kind)) if ops.BACKEND == "torch" else [gradients(f, getattr(biased(kind), kind))[0]]
        assert bool((ops.numpy(g) != 0).any()) == (kind == "table")


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("width", [8, 5])
@every_engine
@some_rules
def test_narrow_values(use, rule, engine, width, dtype):
    """Values of fewer numbers than keys have: one query or many, with a bias or without, the log-sum-exp or not."""
    rule = plugins.parse("attention", rule)
    for shape in ((2, 4, 2, 1, 33, 16), (2, 4, 2, 37, 61, 16)):
        arrays, how = inputs(*shape, dtype=dtype, width=width), (*behind(*shape[3:5]), rule)
        for kind in (None, "table"):
            agree(use, engine, dtype, arrays, *how, scale=0.2, bias=biased(kind))
    got, want = (with_lse(use, e, arrays, *how, scale=0.2) for e in (engine, "dense"))
    for a, b in zip(got, want):
        assert (apart(a, b) if dtype == "float32" else np.sqrt(np.mean((a - b) ** 2)) / b.std()) <= EPS[dtype]


def merged(parts):
    """(y, lse) of attention over all keys from those over parts of them."""
    top = functools.reduce(lambda a, b: ops.where(a > b, a, b), [lse for _, lse in parts])
    weights = [ops.exp(lse - ops.stop(top))[..., None] for _, lse in parts]
    total = sum(weights)
    return sum(w * y for w, (y, _) in zip(weights, parts)) / total, top


@pytest.mark.parametrize("engine", ["dense", *ENGINES])
@pytest.mark.parametrize("spec", ["full", "window:window=5", "longformer:window=5,n_global=2", "duo:window=5", "bigbird:block=6,window=1"])
def test_two_halves_of_the_keys_merge(use, spec, engine):
    """Attention over all keys, values and gradients; some rows see nothing in one half."""
    rule, N, half = plugins.parse("attention", spec), 40, 23
    arrays, q_at = inputs(2, 4, 2, N, N, 8), places(np.arange(N))._replace(first=0)
    w = arrays[3]

    def f(*qkv):
        q, parts = qkv[0], []
        for a, b in ((0, half), (half, N)):
            k_at = places(np.arange(a, b))._replace(first=a)
            parts.append(kernels.attend(q, *(x[:, :, a:b] for x in qkv[1:]), q_at, k_at, rule, lse=True))
        return merged(parts)[0]

    want = outcome(use, "dense", arrays, q_at, q_at, rule)
    use(engine)
    got = [f(*arrays[:3]), *gradients(lambda *x: (f(*x) * w).sum(), *arrays[:3])]
    for what, a, b in zip("yqkv", got, want):
        assert apart(ops.numpy(a), b) < 2e-5, what


@every_engine
def test_padding_does_not_reach_anyone(use, engine):
    """Rows of 9 and 5 tokens: the padding's keys and values may be anything."""
    arrays, other = inputs(2, 4, 2, 9, 9, 8), inputs(2, 4, 2, 9, 9, 8, seed=1)
    at = np.array([range(9), [0, 1, 2, 3, 4, -1, -1, -1, -1]])
    live = ops.array((at >= 0)[:, None, :, None])
    swapped = [arrays[0], *(ops.where(live, a, b * 100) for a, b in zip(arrays[1:3], other[1:3]))]
    rule = plugins.parse("attention", "full")
    use(engine)
    a, b = (ops.numpy(kernels.attend(*qkv, places(at), places(at), rule)) for qkv in (arrays[:3], swapped))
    np.testing.assert_array_equal(a[1, :, :5], b[1, :, :5])
    agree(use, engine, "float32", [*arrays[:3], arrays[3] * live], places(at), places(at), rule, rows=(at >= 0)[:, None, :, None])


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@every_engine
@every_rule
def test_the_model_agrees(use, rule, engine, kv_heads):
    """Loss and every gradient of a whole model, batch of 2, an odd length, documents or not."""
    model, tokens = tiny(rule, num_key_value_heads=kv_heads), text(20, 2)
    for how in ({}, {"begin": ops.array(np.where(np.arange(19) < 7, 0, 7).astype("int32")[None].repeat(2, 0))}):
        use("dense")
        want, grads = loss_and_gradients(model, tokens, **how)
        use(engine)
        loss, got = loss_and_gradients(model, tokens, **how)
        assert abs(loss - want) < 1e-5 * want
        assert set(got) == set(grads) == set(ops.parameters(model))
        for n in grads:
            assert apart(got[n], grads[n]) < 1e-4, n


def test_recomputed_blocks_give_the_same_gradients():
    model, tokens, plain = tiny("window:window=5", memory="sinks:budget=10"), text(20, 2), tiny().model.run
    want, grads = loss_and_gradients(model, tokens)
    try:
        model.model.run = ops.checkpoint
        loss, got = loss_and_gradients(model, tokens)
    finally:
        model.model.run = plain
    assert loss == want and set(got) == set(grads)
    for n in grads:
        np.testing.assert_allclose(got[n], grads[n], rtol=1e-5, atol=1e-6 * np.abs(grads[n]).max(), err_msg=n)


def test_the_model_in_bfloat16(use):
    """Weights rounded to bfloat16 in both, then bfloat16 against float32 arithmetic: about 3 digits."""
    tokens = ops.array(text(24, 2))
    model = tiny()
    try:
        rounded = {n: ops.cast(p, ops.bfloat16) for n, p in ops.parameters(model).items()}
        before = {n: ops.cast(p, ops.float32) for n, p in ops.parameters(model).items()}
        ops.set_parameters(model, {n: ops.cast(p, ops.float32) for n, p in rounded.items()})
        exact = ops.numpy(model(tokens))
        ops.set_parameters(model, rounded)
        for engine in ("dense", *ENGINES):
            use(engine)
            assert np.abs(ops.numpy(model(tokens)) - exact).mean() < 3e-2 * exact.std(), engine
    finally:
        ops.set_parameters(model, before)
