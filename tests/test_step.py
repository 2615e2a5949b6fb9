"""The one-token step: its plain pieces against the model on every backend, its kernels (on a GPU, or interpreted) against these."""

import os

import numpy as np
import pytest
from conftest import apart, named, places, small, tiny

import kernels
import ops
import plugins
from generate import Session
from kernels import codes, rows, slots, step

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
triton = pytest.mark.skipif(not kernels.TRITON, reason="needs Triton, and CUDA or TRITON_INTERPRET=1")
# ||x - wanted|| / ||wanted||
EPS = {"float32": 3e-6, "float16": 2e-3, "bfloat16": 1.5e-2}
DTYPES = ["float32", "float16"] if INTERPRETED else list(EPS)
RULES = [small("attention", n) for n in plugins.names("attention") if hasattr(plugins.load("attention", n), "allowed")]


@pytest.fixture(autouse=True)
def reading():
    with ops.no_grad():
        yield


def away(x, want):
    x, want = (ops.numpy(a).astype("float64") for a in (x, want))
    assert x.shape == want.shape
    return np.linalg.norm(x - want) / np.linalg.norm(want)


def normal(r, *shape, dtype="float32", wide=1.0):
    return ops.cast(ops.array((r.normal(size=shape) * wide).astype("float32")), getattr(ops, dtype))


# ---------------------------------------------------------------- products

PRODUCTS = {
    "queries, keys and values": (64, [64, 16, 16], {"gain", "eps"}),
    "rows that nothing divides": (72, [40, 5, 5], {"gain", "eps"}),
    "onto the stream": (96, [48], {"residual"}),
    "gate and up": (64, [128, 128], {"gain", "eps", "gated"}),
    "wider than a block": (2112, [6], {"residual", "gain", "eps"}),
    "float32 out": (40, [61], {"gain", "eps", "dtype"}),
}


@triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", PRODUCTS.values(), ids=list(PRODUCTS))
def test_products(case, dtype):
    C, n, asked = case
    r = np.random.default_rng(0)
    given = {"gain": normal(r, C, dtype=dtype), "eps": 0.3, "residual": normal(r, n[0], dtype=dtype), "gated": True, "dtype": ops.float32}
    x, w, how = normal(r, C, dtype=dtype), [normal(r, rows, C, dtype=dtype) for rows in n], {k: given[k] for k in asked}
    got, want = rows.product(x, w, **how), rows.plain(x, w, **how)
    assert got.dtype == want.dtype
    assert away(got, want) < EPS[dtype]


def test_plain_products_are_the_model_s():
    block = tiny().model.layers[0]
    mlp, attn, norm = block.mlp, block.self_attn, block.post_attention_layernorm
    # a norm that does something
    ops.set_parameters(block, {"post_attention_layernorm.weight": normal(np.random.default_rng(1), 32)})
    x = normal(np.random.default_rng(0), 32)
    y = rows.plain(x, [mlp.gate_proj.weight, mlp.up_proj.weight], norm.weight, norm.eps, gated=True)
    assert away(rows.plain(y, [mlp.down_proj.weight], residual=x), x + mlp(norm(x[None]))[0]) < 1e-5
    row = rows.plain(x, [attn.q_proj.weight, attn.k_proj.weight], norm.weight, norm.eps)
    assert away(row, ops.cat([attn.q_proj(norm(x[None])), attn.k_proj(norm(x[None]))], 1)[0]) < 1e-5
    ops.set_parameters(block, {"post_attention_layernorm.weight": norm.weight * 0 + 1})


# ---------------------------------------------------------------- one token over slots


def state(r, K, H, N, D, used, heads, base, dtype, born, mass, recent):
    """Slots at scattered positions, some of them empty, of which `used` are in use."""
    pos = np.full((1, heads, N), -1)
    for h in range(heads):
        pos[0, h, :used] = np.where(r.random(used) < 0.1, -1, base + r.permutation(used + 5)[:used])
    s = {"k": normal(r, 1, K, N, D, dtype=dtype), "v": normal(r, 1, K, N, D, dtype=dtype), "pos": places(pos).at, "n": ops.scalar(used)}
    if born:
        s["born"] = places(np.full((1, 1, N), -1)).at
    if mass:
        s["mass"] = normal(r, 1, K, N)
    if recent:
        s |= {"q": normal(r, 1, H, recent, D, dtype=dtype), "q_at": places(np.full((1, 1, recent), -1)).at}
    return s


def token(f, K=2, G=2, N=133, D=16, P=8, used=120, rule="full", heads=1, base=0, begin=None, dtype="float32", layer=0, **how):
    """f (slots.token or slots.plain) on the same random numbers: values, the state after, the row, and what attention was told."""
    r, H = np.random.default_rng(3), K * G
    rule = plugins.place(plugins.parse("attention", rule), layer=layer, n_layer=2, n_head=H, n_kv_head=K)
    s = state(r, K, H, N, D, used, heads, base, dtype, how.get("born"), how.get("mass"), how.get("recent"))
    angle = ops.array((r.random((1, 1, 1, P)) * 6).astype("float32"))
    at = places([base + used + 5]).at
    begin = None if begin is None else places([base + begin]).at
    return f(normal(r, (H + 2 * K) * D, dtype=dtype), (ops.cos(angle), ops.sin(angle)), at, s, rule, begin, **how)


CASES = {
    "one head": {"G": 1, "K": 1},
    "nothing before": {"used": 0, "mass": "mass"},
    "no slot left": {"used": 132, "born": "born"},
    "eight to a key head": {"G": 8, "K": 1, "N": 70, "used": 69, "base": 2**20},
    "four, heads apart, in part turned": {"G": 4, "N": 100, "D": 48, "P": 20, "used": 91, "heads": 2, "begin": 40, "always": 3,
                                          "opening": 2, "rule": "window:window=20"},
    "three, all notes": {"K": 3, "G": 3, "heads": 3, "born": "born", "mass": "mass", "recent": 4, "base": 2**20,
                         "rule": "duo:full=50,window=20,sinks=2"},
    "wide": {"D": 64, "P": 32, "mass": "mass", "scale": 0.5},
}  # fmt: skip


def same(case, dtype="float32"):
    (y, s), (want, t) = (token(f, dtype=dtype, **case) for f in (slots.token, slots.plain))
    assert away(y, want) < EPS[dtype]
    assert s.keys() == t.keys()
    for f in s:
        assert np.abs(ops.numpy(s[f]).astype("float64") - ops.numpy(t[f])).max() < 4 * EPS[dtype], f


@triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_one_token(case, dtype):
    same(case, dtype)


@triton
@pytest.mark.parametrize("rule", RULES, ids=named)
def test_one_token_under_every_rule(rule):
    same({"rule": rule, "N": 70, "used": 61, "base": 2**20, "layer": 1, "begin": 9})


@triton
def test_a_token_that_sees_nothing_gives_zeros(monkeypatch):
    # far from all slots, and its own is behind no rule: a window of nothing
    none = plugins.Plugin(
        "none", type("m", (), {"allowed": staticmethod(nothing), "__name__": "attention.none"}), plugins.parse("attention", "full").options
    )
    y, _ = token(lambda row, turn, at, s, rule, begin: slots.token(row, turn, at, s, none, begin))
    assert (ops.numpy(y) == 0).all()


def nothing(q, k, h, o):
    return q < k - k


def test_one_plain_token_is_attention_over_slots():
    """All of plain() but its attention, by hand."""
    case = {"K": 2, "G": 2, "heads": 2, "born": "born", "mass": "mass", "recent": 4, "used": 7, "N": 9}
    y, s = token(slots.plain, **case)
    taken = {}
    token(lambda row, turn, at, before, rule, begin, **how: taken.update(row=row, turn=turn, at=at, s=before, rule=rule), **case)
    row, before = ops.numpy(taken["row"]).reshape(8, 16), {f: ops.numpy(x) for f, x in taken["s"].items()}
    cos, sin = (ops.numpy(x)[0, 0, 0] for x in taken["turn"])
    turn = lambda x: np.concatenate([x[..., :8] * cos - x[..., 8:] * sin, x[..., 8:] * cos + x[..., :8] * sin], -1)
    k, v = np.concatenate([before["k"][0, :, :7], turn(row[4:6])[:, None]], 1), np.concatenate([before["v"][0, :, :7], row[6:][:, None]], 1)
    e = np.einsum("hd,hnd->hn", turn(row[:4]), k.repeat(2, 0)) / 4
    e = np.where(np.concatenate([before["pos"][0, :, :7] >= 0, [[True]] * 2], 1).repeat(2, 0), e, -np.inf)
    p = np.exp(e - e.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    np.testing.assert_allclose(ops.numpy(y).reshape(4, 16), np.einsum("hn,hnd->hd", p, v.repeat(2, 0)), rtol=1e-4, atol=1e-5)
    mass = np.concatenate([before["mass"][0, :, :7], [[0.0]] * 2], 1) + p.reshape(2, 2, 8).sum(1)
    np.testing.assert_allclose(ops.numpy(s["mass"])[0, :, :8], mass, rtol=1e-4, atol=1e-5)
    assert int(ops.host(s["n"])) == 8
    assert ops.numpy(s["pos"])[0, :, 7].tolist() == [12, 12] and ops.numpy(s["born"])[0, 0, 7] == 12
    np.testing.assert_allclose(ops.numpy(s["q"])[0, :, 12 % 4], row[:4])
    assert ops.numpy(s["q_at"])[0, 0].tolist() == [12, -1, -1, -1]


# ---------------------------------------------------------------- one token over codes


def coded(f, K=2, G=2, N=9, M=133, D=16, P=8, used=5, bits=8, channels=4, wide=1.0, rule="full", heads=1, base=0, dtype="float32", **how):
    """f (codes.token or codes.plain): slots at scattered positions as codes, some of them empty, and an open segment behind them."""
    r, H, begin = np.random.default_rng(1), K * G, how.pop("begin", None)
    rule = plugins.place(plugins.parse("attention", rule), layer=0, n_layer=2, n_head=H, n_kv_head=K)
    there = [np.where(r.random(M) < 0.1, -1, base + r.permutation(M)) for _ in range(heads)]
    past, s = {"pos": places(np.stack(there)[None]).at}, {}
    for x in "kv":
        past[f"{x}_code"], past[f"{x}_scale"] = codes.encode(normal(r, 1, K, M, D, wide=wide), bits, channels)
        s[x] = normal(r, 1, K, N, D, dtype=dtype)
    s |= {"pos": places(np.full((1, heads, N), base + M) + np.arange(N)).at, "n": ops.scalar(used)}
    s["pos"] = ops.where(s["pos"] < base + M + used, s["pos"], -1)
    if how.get("recent"):
        n = how["recent"]
        s |= {"q": normal(r, 1, H, n, D, dtype=dtype), "q_at": places(np.full((1, 1, n), -1)).at}
    angle, begin = ops.array((r.random((1, 1, 1, P)) * 6).astype("float32")), None if begin is None else places([base + begin]).at
    row = normal(r, (H + 2 * K) * D, dtype=dtype)
    return f(row, (ops.cos(angle), ops.sin(angle)), places([base + M + used]).at, s, past, rule, begin, bits=bits, **how)


CODED = {
    "a group is a head": {"channels": 16},
    "small groups": {"channels": 2, "K": 1, "G": 3},
    "four bits": {"bits": 4},
    "four bits, one group": {"bits": 4, "channels": 16, "G": 8, "K": 1},
    "in part turned, heads apart": {"D": 48, "P": 20, "channels": 12, "G": 4, "heads": 2, "recent": 4, "base": 2**20, "opening": 2},
    "four bits, a document": {"D": 48, "P": 20, "channels": 24, "bits": 4, "begin": 60, "rule": "window:window=40"},
    "heads differ": {"heads": 2, "G": 4, "rule": "duo:full=50,window=20,sinks=2"},
    "no open slot before": {"used": 0, "M": 64, "always": 3, "rule": "window:window=9"},
    "large": {"wide": 300.0},
    "tiny": {"wide": 1e-3, "bits": 4},
}


@triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CODED.values(), ids=list(CODED))
def test_one_token_over_codes(case, dtype):
    (y, s), (want, t) = (coded(f, dtype=dtype, **case) for f in (codes.token, codes.plain))
    # weights are rounded to float16 at the least
    assert away(y, want) < max(EPS[dtype], 1e-3)
    assert s.keys() == t.keys()
    for f in s:
        assert np.abs(ops.numpy(s[f]).astype("float64") - ops.numpy(t[f])).max() < 4 * EPS[dtype], f


@triton
@pytest.mark.parametrize("rule", RULES, ids=named)
def test_one_token_over_codes_under_every_rule(rule):
    (y, _), (want, _) = (coded(f, rule=rule, base=2**20, begin=9, M=70) for f in (codes.token, codes.plain))
    assert away(y, want) < 1e-3


def test_plain_codes_are_what_was_encoded():
    """Near what slots.plain says of the vectors before they became codes, and nearer with more bits."""
    off = {}
    for bits in (8, 4):
        kept = {}

        def exact(row, turn, at, s, past, rule, begin, bits, kept=kept):
            whole = {x: ops.cat([codes.decode(past[f"{x}_code"], past[f"{x}_scale"], 8, ops.float32), s[x]], 2) for x in "kv"}
            return slots.plain(row, turn, at, {**whole, "pos": ops.cat([past["pos"], s["pos"]], 2), "n": ops.scalar(133 + 5)}, rule, begin)

        want = coded(exact, bits=8)[0]
        off[bits] = away(coded(codes.plain, bits=bits)[0], want)
    assert off[8] < 1e-5 < 0.02 < off[4] < 0.5


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("fewer", [False, True], ids=["room", "no room"])
def test_what_joins_the_past(heads, fewer):
    """The slots of lowest rank go, wherever they are; all others stay, whole."""
    r, K, M, R = np.random.default_rng(heads), 2, 21, 6
    pos = np.stack([r.permutation(M) for _ in range(heads)])[None]
    pos[:, :, r.permutation(M)[: 0 if fewer else 2 * R]] = -1
    here = np.stack([100 + r.permutation(R) for _ in range(heads)])[None]
    here[:, :, 2] = -1
    rank = np.where((whole := np.concatenate([pos, here], 2)) < 0, -1e30, r.permutation(M + R) if fewer else whole).astype("float32")
    entry = lambda p, n, f: np.broadcast_to(p[..., None] % 251 + f, (1, K, p.shape[2], n)).copy()
    make = lambda p: {
        "pos": p.astype("int32"),
        **{f"{x}_code": entry(p, 12, i).astype("uint8") for i, x in enumerate("kv")},
        **{f"{x}_scale": entry(p, 4, i).astype("float16") for i, x in enumerate("kv")},
        "mass": entry(p, 1, 0.5)[..., 0].astype("float32"),
    }
    past, new = ({f: ops.array(a) for f, a in make(p).items()} for p in (pos, here))
    got = {f: ops.numpy(a) for f, a in codes.join(ops.top(-ops.array(rank), R), past, new).items()}
    for h in range(heads):
        best = np.argsort(-rank[0, h], kind="stable")[:M]
        assert sorted(got["pos"][0, h]) == sorted(whole[0, h][best])
    want = make(np.broadcast_to(got["pos"], (1, heads, M)))
    live = np.broadcast_to(got["pos"], (1, K, M)) >= 0
    assert live.sum() > M // 2
    for f in got:
        assert got[f].shape == want[f].shape
        at = live[:, : got[f].shape[1]]
        assert (got[f][at] == want[f][at]).all(), f


# ---------------------------------------------------------------- what stays when a segment closes

KEPT = {
    "heads apart": (2, 2, 40, 30, "mass"),
    "heads together": (2, 1, 33, 32, "born"),
    "few": (1, 1, 150, 7, "mass"),
    "all": (1, 1, 20, 20, "born"),
}


def numbered(K, heads, N, note):
    """A static state whose every entry says at which position it stands, some slots empty, and a rank with many equal numbers."""
    r = np.random.default_rng(N)
    pos = np.stack([r.permutation(2 * N)[:N] for _ in range(heads)])[None]
    pos = np.where(r.random(pos.shape) < 0.2, -1, pos).astype("int32")
    wide = np.broadcast_to(pos, (1, K, N)).astype("float32")
    s = {"k": np.repeat(wide[..., None], 12, 3), "v": np.repeat(2 * wide[..., None], 12, 3), "pos": pos}
    s[note] = 3 * wide if note == "mass" else 3 * pos
    rank = np.where(pos < 0, -1e30, r.integers(0, 9, pos.shape)).astype("float32")
    return ops.array(rank), {**{f: ops.array(x.copy()) for f, x in s.items()}, "n": ops.scalar(N)}


@pytest.mark.parametrize("ordered", [True, pytest.param(False, marks=triton)])
@pytest.mark.parametrize("case", KEPT.values(), ids=list(KEPT))
def test_the_best_slots_stay(case, ordered):
    K, heads, N, size, note = case
    rank, s = numbered(K, heads, N, note)
    wanted = [sorted(zip(-r, range(N), p))[:size] for r, p in zip(ops.numpy(rank)[0], ops.numpy(s["pos"])[0])]
    before = {f: x for f, x in s.items() if f != "n"}
    kept = {f: ops.numpy(x) for f, x in slots.kept(rank, s, list(before), size, ordered).items() if f != "n"}
    pos = kept["pos"]
    assert pos.shape[2] == (size if ordered else N) and (pos[:, :, size:] == -1).all()
    for h in range(heads):
        # which of equal ones stay is open, how good they are is not
        assert sorted(pos[0, h, :size][pos[0, h, :size] >= 0]) == sorted(p for *_, p in wanted[h] if p >= 0) or ordered
        if ordered:
            live = pos[0, h][pos[0, h] >= 0]
            assert (np.diff(live) > 0).all() and (pos[0, h, len(live) :] == -1).all()
    live = np.broadcast_to(pos, (1, K, pos.shape[2])) >= 0
    place = np.broadcast_to(pos, live.shape)[live]
    assert (kept["k"][live] == place[:, None]).all() and (kept["v"][live] == 2 * place[:, None]).all()
    noted = np.broadcast_to(kept[note], live.shape)
    assert (noted[live] == 3 * place).all()
    if not ordered and note == "mass":
        assert (noted[:, :, size:] == 0).all()


@pytest.mark.parametrize("shape", [(2, 3, 41), (1, 1, 1100), (2, 8, 1100)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_order(dtype, shape):
    """Equal keys stay in the order in which they stand, near each other or far apart; short rows, long ones and many."""
    key, n = np.random.default_rng(0).integers(-5, 2**30 if dtype == "int32" else 9, shape), shape[2] // 2
    key[:, :, -n:] = key[:, :, :n]
    got = slots.order(ops.array(key.astype(dtype)))
    np.testing.assert_array_equal(ops.numpy(got), key.argsort(-1, kind="stable"))


@pytest.mark.parametrize(
    "shape", [(1, 1, 20, 20), (2, 3, 41, 1), (2, 3, 41, 17), (1, 2, 900, 300), (1, 1, 40000, 64)], ids=lambda s: "x".join(map(str, s))
)
@pytest.mark.parametrize("equal", [False, True])
def test_the_largest(shape, equal):
    """As many as asked for, of equal ones the first, in slot order; numbers below and above zero, huge ones, and many equal ones."""
    *shape, n = shape
    r = np.random.default_rng(n)
    rank = r.integers(-3, 3, shape) if equal else r.normal(size=shape) * 10.0 ** r.integers(-6, 30, shape)
    rank = rank.astype("float32")
    at = ops.numpy(slots.best(ops.array(rank), n))
    assert at.shape == (*shape[:2], n) and (np.diff(at) > 0).all()
    np.testing.assert_array_equal(np.sort(np.take_along_axis(rank, at.astype("int64"), 2)), np.sort(rank)[:, :, -n:])
    np.testing.assert_array_equal(at, np.sort(np.argsort(-rank, kind="stable")[:, :, :n]))


@triton
def test_the_largest_of_what_is_hardly_a_number():
    """Zeros of either sign are equal, so that the first stay; and a row of what is no number gives indices of its own."""
    nan = np.float32("nan")
    rank = np.array([[[-0.0, 0.0, -1.0, 0.0, -0.0] * 5, [nan] * 25, [-nan] * 25]], "float32")
    at = ops.numpy(slots.best(ops.array(rank), 7))
    assert at[0, 0].tolist() == [0, 1, 3, 4, 5, 6, 8]
    assert (np.diff(at) > 0).all() and (at < 25).all()


# ---------------------------------------------------------------- the whole step

# attention, positions, memory; does the step take both kernels, or those of the products alone?
WHOLE = [
    ("full", "rope", "full", True),
    ("longformer:window=9,n_global=3", "rope", "sinks:budget=12", True),
    ("full", "yarn:factor=2,original=16", "snapkv:budget=12,window=4", True),
    ("window:window=9", "rope:partial=0.5", "h2o:budget=12", True),
    ("full", "rope", "full/pyramidkv:budget=12,window=4", True),
    # what is kept of its past lies otherwise
    ("full", "rope", "adakv:budget=12,window=4", False),
    ("full", "rope", "snapkv:budget=12,window=4,kv_positions=reindex", False),
    ("full", "rope", "quantised:budget=12,channels=4", False),
    ("full", "rope", "quantised:budget=12,channels=4,keep=h2o,turned=true", False),
    # or as codes
    ("full", "rope", "quantised:budget=12,channels=4,turned=true", True),
    ("window:window=9", "rope", "quantised:budget=60,channels=8,bits=4,turned=true", True),
    ("full", "rope", "quantised:budget=12,channels=2,keep=tova,turned=true", True),
    ("full", "rope", "quantised:budget=40,channels=2,keep=snapkv,turned=true", True),
    ("longformer:window=9,n_global=3,own_projections=true", "rope", "window:budget=12", False),
    ("full", "alibi", "sinks:budget=12", False),
    ("full", "dynamic:original=16", "h2o:budget=12", False),
    ("full", "rope", "infini", False),
]


def write(graph, spec, **more):
    """Logits of a text that is read, written, read on and written again."""
    session, out, i = Session(tiny(*spec, vocab_size=60, **more), chunk=16, segment=4), [], 0
    session.graph = graph
    tokens = np.random.default_rng(0).integers(0, 60, 40).tolist()
    for read, wrote in ((14, 5), (3, 3)):
        out.append(ops.numpy(session.read(tokens[i : i + read], wrote)))
        # at once: a graph writes all logits to the same place
        out += [ops.numpy(session.step(t)) for t in tokens[i + read : i + read + wrote]]
        i += read + wrote
    return np.stack(out)


@pytest.fixture
def counted(monkeypatch):
    """How often each kernel is called."""
    calls = {"token": 0, "product": 0}

    def count(module, name):
        f = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: calls.update({name: calls[name] + 1}) or f(*a, **k))

    count(slots, "token")
    count(codes, "token")
    count(rows, "product")
    return calls


@triton
@pytest.mark.parametrize("spec", WHOLE if INTERPRETED else WHOLE[:3], ids=lambda s: "-".join(map(named, s[:3])))
def test_the_step_writes_what_the_plain_one_writes(spec, counted):
    *spec, whole = spec
    want = write(False, spec)
    assert counted == {"token": 0, "product": 0}
    # weights that multiply codes are float16, and a key may be rounded to either side
    assert apart(write(True, spec), want) < (0.03 if whole and "quantised" in spec[2] else 1e-4)
    # 8 tokens, 2 layers: four products each and the head, or two and the head
    if INTERPRETED:
        assert counted == ({"token": 16, "product": 8 * 9} if whole else {"token": 0, "product": 8 * 5})
    else:
        # called while the graphs are made
        assert counted["token"] > 0


@triton
@pytest.mark.skipif(not INTERPRETED, reason="a graph would count each kernel three times")
def test_what_the_kernels_do_not_do_is_left_to_the_model(counted, monkeypatch):
    biased = {"attention_bias": True, "mlp_bias": True}
    assert (
        apart(write(True, ("full", "rope", "sinks:budget=12"), **biased), write(False, ("full", "rope", "sinks:budget=12"), **biased))
        < 1e-4
    )
    assert counted == {"token": 0, "product": 8}, "a head has no bias"
    monkeypatch.setattr(step, "ENGINE", "stock")
    write(True, ("full", "rope", "full"))
    assert counted["token"] == 0 and counted["product"] == 8


@triton
@pytest.mark.parametrize("memory", ["snapkv:budget=12,window=4", "h2o:budget=12", "sinks:budget=12", "full"])
def test_reading_goes_on_in_order(memory):
    """Closes of static states leave slots in any order; whoever counts them afterwards finds them in order of position, with their keys."""
    model = tiny(memory=memory)
    tokens = np.random.default_rng(0).integers(0, 60, 40)
    session = Session(model, chunk=14, segment=4)
    session.graph = True
    session.read(tokens[:14], 17)
    for t in tokens[14:31]:
        session.step(int(t))
    for s, t in zip(session.run.state["layers"], model.moving(session.run.state)["layers"]):
        n, was, pos = t["n"], ops.numpy(s["pos"]), ops.numpy(t["pos"])
        assert n == int(ops.host(s["n"])) and slots.in_order(t) and pos.shape == was.shape and (pos[:, :, n:] == -1).all()
        assert (np.sort(was[:, :, :n]) == pos[:, :, :n]).all() and (np.diff(pos[:, :, :n]) > 0).all()
        by = was[:, :, :n].argsort(-1)[..., None]
        np.testing.assert_array_equal(np.take_along_axis(ops.numpy(s["k"])[:, :, :n], by, 2), ops.numpy(t["k"])[:, :, :n])


@pytest.mark.parametrize("memory", ["none", "infini"])
def test_reading_goes_on_after_nothing_is_left(memory):
    """A step may close a segment of which no slot stays; the text goes on all the same."""
    tokens, out = np.random.default_rng(0).integers(0, 60, 20).tolist(), []
    for graph in (False, kernels.TRITON):
        session = Session(tiny(memory=memory), chunk=14, segment=4)
        session.graph = graph
        session.read(tokens[:6], 4)
        for t in tokens[6:10]:
            session.step(t)
        out.append(ops.numpy(session.read(tokens[10:], 4)))
    assert apart(out[1], out[0]) < 1e-4


def test_a_remembered_query_finds_its_place():
    """Static or not, in any order of reading and writing, the newest queries are remembered."""
    for turns in ([5], [3, 9], [14], [2, 2]):
        model = tiny(memory="snapkv:budget=12,window=4")
        tokens = ops.array(np.random.default_rng(0).integers(0, 60, (1, sum(turns) + 6)).astype("int32"))
        state, i = model.start(16), 0
        for n in turns:
            _, state = model(tokens[:, i : i + n], state)
            i += n
        run = ops.eager(lambda x, s, close, model=model: model(x, s, close=close), model.still(state))
        for _ in range(6):
            run(int(tokens[0, i]))
            i += 1
            at = ops.numpy(run.state["layers"][0]["q_at"])[0, 0]
            assert sorted(at.tolist()) == list(range(i - 4, i)) and (at % 4 == np.arange(4)).all()
        _, state = model(tokens[:, :2], model.moving(run.state))
        assert sorted(ops.numpy(state["layers"][0]["q_at"])[0, 0].tolist()) == list(range(i - 2, i + 2))
