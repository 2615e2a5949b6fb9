"""kernels/blocks.py beyond tests/test_engines.py: blocks much smaller than the text, stripes of many blocks, memory before a
segment, documents that differ between rows, exempt tokens, biases, random options, when it is chosen, and what it costs in memory."""

import gc
import json
import sys
import weakref

import numpy as np
import pytest
from conftest import apart, gradients, loss_and_gradients, places, python, text, tiny
from test_engines import agree, biased, every_bias, inputs, outcome, with_lse
from test_layout import RULES, drawn, parse

import kernels
import ops
import plugins
from kernels import Bias, Places, blocks
from kernels import named as named_
from kernels.named import named, rule_of

backend = sys.modules[f"backends.{ops.BACKEND}_"]
every_rule = pytest.mark.parametrize("name", RULES)


@pytest.fixture
def cut(monkeypatch):
    """Set the blocks' sizes, and how many scores are stacked."""

    def set_(block, room):
        monkeypatch.setattr(blocks, "BLOCK", block)
        monkeypatch.setattr(blocks, "stacked", lambda: room)

    return set_


def at(first, n):
    return places(np.arange(first, first + n))._replace(first=first)


def documents(draw, first, T, rows):
    """begin [rows, 1, T]: documents of random lengths, the first of which may have begun before these tokens."""
    starts = [np.sort(draw.choice(T, 3)) for _ in range(rows)]
    return ops.array(np.stack([[max([0, *(first + s[s <= t])]) for t in range(T)] for s in starts]).astype("int32")[:, None])


def random_rule(name, i):
    """Rules' options at random; all heads of the layout tests are 4 query heads over 2 key heads."""
    return drawn(name, np.random.default_rng(sum(map(ord, name)) + i))


@pytest.mark.parametrize("block, room", [((16, 16), 1), ((32, 16), 40000), ((16, 32), 1 << 30)], ids=["alone", "some", "all at once"])
@every_rule
def test_blocks_agree(use, cut, name, block, room):
    """Random options; a text, a segment with memory before it, and the same with documents and exempt tokens."""
    cut(block, room)
    draw = np.random.default_rng(room)
    for i, (T, N) in enumerate([(150, 150), (43, 131), (64, 160)]):
        how = (None, 0, 0) if i == 0 else (documents(draw, N - T, T, 2) if i == 2 else None, 5, 3)
        agree(use, "blocks", "float32", inputs(2, 4, 2, T, N, 8), at(N - T, T), at(0, N), random_rule(name, i), *how)


@pytest.mark.parametrize("R", [None, 2, 40, 500])
@pytest.mark.parametrize("block, room", [((16, 16), 1), ((32, 16), 40000), ((16, 32), 1 << 30)], ids=["alone", "some", "all at once"])
def test_a_bias(use, cut, block, room, R):
    """Slopes, or tables that end within a block, behind some, behind all keys; a text, a segment, documents, exempt tokens, the
    log-sum-exp; values that are narrower than keys."""
    cut(block, room)
    draw = np.random.default_rng(R or 3)
    for name in ("longformer", "strided", "duo&bigbird|local"):
        for i, (T, N, width) in enumerate([(150, 150, 8), (43, 131, 8), (64, 160, 5)]):
            how = (None, 0, 0) if i == 0 else (documents(draw, N - T, T, 2) if i == 2 else None, 5, 3)
            how = at(N - T, T), at(0, N), random_rule(name, i), *how
            arrays, bias = inputs(2, 4, 2, T, N, 8, width=width), biased("slope" if R is None else "table", R=R)
            agree(use, "blocks", "float32", arrays, *how, bias=bias)
        got, want = (with_lse(use, e, arrays, *how, bias=bias) for e in ("blocks", "dense"))
        for what, a, b in zip(("y", "lse", "dq", "dk", "dv", "table"), got, want):
            assert (np.isinf(a) == np.isinf(b)).all() and apart(a[np.isfinite(b)], b[np.isfinite(b)]) < 2e-5, what


@every_bias
def test_a_bias_in_bfloat16(use, cut, kind):
    """Its own numbers are not rounded to 8 bits, neither in the scores nor in what a table's last entry takes from 100 000 pairs."""
    cut((32, 16), 1)
    where, rule = (at(0, 500), at(0, 500)), parse("longformer:window=300,n_global=40")
    bias = Bias(ops.array(np.array([3, 1, 0.3, 0.1], "float32"))) if kind == "slope" else biased(kind, R=20, size=1)
    if kind == "table":
        # the same for all distances but very large: only its differences count
        bias = Bias(None, bias.table + 1000)
    agree(use, "blocks", "bfloat16", inputs(2, 4, 2, 500, 500, 16, dtype="bfloat16"), *where, rule, scale=0.2, bias=bias)


@pytest.mark.parametrize("H, K", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("spec", ["bigbird:block=8,window=1,n_global=0", "dilated:window=9,heads=1", "duo:window=9", "s2:group=32"])
def test_heads_that_differ(use, cut, spec, H, K):
    """A head of its own, three of four, half of them, over every number of key heads."""
    cut((16, 16), 1)
    agree(use, "blocks", "float32", inputs(2, H, K, 70, 90, 8), at(20, 70), at(0, 90), parse(spec))


def test_heads_that_take_turns(use, cut):
    """Three groups of heads, none of them neighbours in order, over two key heads."""
    cut((16, 16), 1)
    allowed = lambda q, k, h, o: (k <= q) & (q - k < 4 + (h * 2) % 3 * 9)
    module = type("turns", (), {"allowed": staticmethod(allowed)})
    rule = plugins.Plugin("turns", module, plugins.parse("attention", "full").options)
    for bias in (None, biased("slope", 10), biased("table", 10)):
        agree(use, "blocks", "float32", inputs(2, 10, 2, 70, 70, 8), at(0, 70), at(0, 70), rule, bias=bias)


def test_far_out(use, cut):
    cut((16, 32), 1)
    for spec in ("longformer:window=20,n_global=3", "bigbird:block=16,window=2,n_global=1", "strided:window=8,stride=24"):
        agree(use, "blocks", "float32", inputs(1, 4, 2, 60, 99, 8), at(2**20 + 39, 60), at(2**20, 99), parse(spec), None, 4)
    where = at(2**20 + 39, 60), at(2**20, 99)
    for kind in ("slope", "table"):
        agree(use, "blocks", "float32", inputs(1, 4, 2, 60, 99, 8), *where, parse("full"), None, 4, bias=biased(kind))


@pytest.mark.parametrize("first, keys", [(0, 20), (90, 0), (8, 3), (0, 60), (55, 0)])
def test_keys_that_are_not_the_queries_own(use, cut, first, keys):
    """Queries before all keys, behind all of them, in their midst; a query that sees nothing gives zeros."""
    cut((16, 16), 1)
    q_at, k_at, arrays = at(first, 40), at(keys, 50), inputs(2, 4, 2, 40, 50, 8)
    agree(use, "blocks", "float32", arrays, q_at, k_at, parse("window:window=12"))
    y, dq, _, _ = outcome(use, "blocks", arrays, q_at, k_at, parse("window:window=12"))
    empty = [t for t in range(40) if not any(0 <= first + t - k < 12 for k in range(keys, keys + 50))]
    assert (y[:, :, empty] == 0).all() and (dq[:, :, empty] == 0).all()


@pytest.mark.parametrize("spec", ["longformer:window=30,n_global=4", "bigbird:block=16,window=1,n_global=1"])
def test_bfloat16(use, cut, spec):
    """Root mean square error below a hundredth of the spread: probabilities are rounded to 8 bits, sums are not."""
    cut((32, 16), 1)
    agree(use, "blocks", "bfloat16", inputs(2, 4, 2, 200, 200, 64, dtype="bfloat16"), at(0, 200), at(0, 200), parse(spec))


def test_gradients_add_up_in_float32(use, cut):
    """A global key takes its gradient from 300 blocks: in bfloat16 the sum would stop growing."""
    cut((4, 4), 1)
    arrays = inputs(1, 1, 1, 1200, 1200, 16, dtype="bfloat16")
    arrays = [arrays[0] * 0, arrays[1], arrays[2], ops.full((1, 1, 1200, 16), 1, ops.bfloat16)]
    dv = outcome(use, "blocks", arrays, at(0, 1200), at(0, 1200), parse("longformer:window=3,n_global=1"))[3]
    want = sum(1 / min(t + 1, 4) for t in range(1200))
    assert abs(dv[0, 0, 0] - want).max() < 1e-2 * want


@pytest.mark.parametrize("how", ["plain", "recomputed", "documents"])
def test_the_model(use, cut, how, monkeypatch):
    """A whole model with blocks of 16: loss and all gradients."""
    cut((16, 16), 1)
    model, tokens = tiny("longformer:window=20,n_global=3/bigbird:block=8,window=2,n_global=1"), text(120, 2)
    begin = {"begin": documents(np.random.default_rng(1), 0, 119, 2)[:, 0]} if how == "documents" else {}
    use("dense")
    want, grads = loss_and_gradients(model, tokens, **begin)
    use("blocks")
    if how == "recomputed":
        monkeypatch.setattr(model.model, "run", ops.checkpoint)
    loss, got = loss_and_gradients(model, tokens, **begin)
    assert abs(loss - want) < 1e-5 * want and set(got) == set(grads)
    for n in grads:
        assert apart(got[n], grads[n]) < 1e-4, n


def test_when_blocks_are_chosen(use, monkeypatch):
    """Where they leave enough out and the host knows where everything stands; never for a single token."""
    use("auto")

    def chosen(spec, T, N, q_at=None, k_at=None, begin=None, **named):
        q_at, k_at = q_at or Places(None, N - T), k_at or Places(None, 0)
        return kernels.sparse((1, 4, T, 8), N, q_at, k_at, parse(spec), begin, 0, 0, **named)

    assert chosen("longformer:window=64", 1024, 1024) and chosen("longformer:window=64", 32, 8192)
    assert not chosen("longformer:window=64", 1, 1 << 20), "one token"
    assert not chosen("longformer:window=64", 64, 64), "too short to pay"
    assert not chosen("longformer:window=4096", 512, 4096), "everything is seen"
    assert not chosen("longformer:window=64", 1024, 1024, q_at=Places(None)) and not chosen("window", 1024, 1024, k_at=Places(None))
    begin = lambda cut: ops.array(np.where(np.arange(1024) < cut, 0, cut).astype("int32")[None, None])
    assert chosen("full", 1024, 1024, begin=begin(512)) and chosen("longformer:window=64", 1024, 1024, begin=begin(10))
    assert chosen("longformer:window=4096", 512, 4096, more=True), "a bias, or the log-sum-exp"
    assert not chosen("full", 64, 64, more=True) and not chosen("full", 1, 1 << 20, more=True), "few scores"
    monkeypatch.setattr(kernels, "worth", lambda: 0.0)
    assert chosen("full", 1024, 1024, more=True) and not chosen("longformer:window=64", 1024, 1024), "a device where blocks never pay"
    use("blocks")
    assert chosen("longformer:window=4096", 64, 64) and not chosen("longformer:window=64", 1, 4096)


@every_bias
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_no_bias_of_all_pairs(use, monkeypatch, kind, backward):
    """Consecutive tokens go block by block, scattered ones in parts; few scores at once, and never by the specification. What a part
    needs for its gradients is made once more: what is kept between the passes is no bias either."""
    use("auto")
    made, plain, asked, sparse = [], kernels.dense.biases, [], blocks.attend
    monkeypatch.setattr(kernels.dense, "attend", None)
    monkeypatch.setattr(kernels.dense, "biases", lambda *x: made.append(plain(*x)) or made[-1])
    monkeypatch.setattr(blocks, "attend", lambda *x: asked.append(x) or sparse(*x))
    monkeypatch.setattr(kernels, "SCORES", 20000)
    arrays, n, rule = inputs(1, 2, 1, 400, 400, 8), places(np.arange(400)), parse("full")

    def run(*where):
        made.clear(), asked.clear()
        f = lambda q, k, v: kernels.attend(q, k, v, *where, rule, bias=biased(kind, 2))
        ops.wait(gradients(lambda *x: f(*x).sum(), *arrays[:3]) if backward else f(*arrays[:3]))
        return len(asked), [int(np.prod(x.shape)) for x in made]

    assert run(at(0, 400), at(0, 400)) == ((0, []) if kernels.TRITON else (1, []))
    if not kernels.TRITON:
        sizes = run(n, n)[1]
        # 25 queries each time; the second pass makes them again
        assert max(sizes) == 20000 and len(sizes) == (32 if backward else 16)


torch_only = pytest.mark.skipif(ops.BACKEND != "torch", reason="about torch")
mlx_only = pytest.mark.skipif(ops.BACKEND != "mlx", reason="about MLX")


def cut_in_two(T, cut, rows=1):
    return ops.array(np.where(np.arange(T) < cut, 0, cut).astype("int32")[None, None].repeat(rows, 0))


class Attending(ops.Module):
    """attend() with its rule where a compiler finds it in a model."""

    def __init__(self, spec, T, N, lse):
        super().__init__()
        self.rule, self.where, self.lse = parse(spec), (at(N - T, T), at(0, N)), lse

    def forward(self, q, k, v, w, begin, slope=None, table=None):
        bias = None if slope is None and table is None else Bias(slope, table)
        out = kernels.attend(q, k, v, *self.where, self.rule, begin, 2, bias=bias, lse=self.lse)
        return (out[0] * w).sum() + (ops.sin(out[1]) * w[..., 0]).sum() if self.lse else (out * w).sum()


@torch_only
@pytest.mark.parametrize("lse", [False, True], ids=["y", "lse"])
@pytest.mark.parametrize("how", ["plain", "documents"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_node_of_a_compiled_graph(use, cut, backend, how, lse):
    """torch.compile without breaks, under forward and backward; another rule in the same place is another graph."""
    import torch

    cut((16, 16), 1)
    use("auto")
    arrays, begin = inputs(2, 4, 2, 400, 415, 8), cut_in_two(400, 150, 2) + 15 if how == "documents" else None
    f = Attending("longformer:window=20,n_global=3", 400, 415, lse)
    nodes = []
    torch.compiler.reset()

    def counting(graph, example):
        nodes.append([n for n in graph.graph.nodes if "nanolong" in str(n.target)])
        return torch._dynamo.lookup_backend(backend)(graph, example)

    compiled = torch.compile(lambda *x: f(*x), fullgraph=True, backend=counting)
    for spec in ("longformer:window=20,n_global=3", "longformer:window=30,n_global=3", "duo:window=30"):
        f.rule = parse(spec)
        for got, want in zip(*(gradients(lambda *x, g=g: g(*x, arrays[3], begin), *arrays[:3]) for g in (compiled, f))):
            assert apart(ops.numpy(got), ops.numpy(want)) < 1e-4, spec
    assert [len(n) for n in nodes] == [1, 1, 1]


@every_bias
def test_a_bias_compiled(use, cut, kind):
    """Forward and backward in one graph, in which a bias may be anything."""
    cut((16, 16), 1)
    use("auto")
    f, (*arrays, w) = Attending("longformer:window=20,n_global=3", 400, 415, True), inputs(2, 4, 2, 400, 415, 8)
    for bias in (biased(kind), Bias(*(None if x is None else x * 2 for x in biased(kind)))):
        given = [*arrays, *([] if kind == "slope" else [bias.table])]
        g = lambda q, k, v, *table, bias=bias: f(q, k, v, w, None, bias.slope, *table)
        want = gradients(g, *given)
        if ops.BACKEND == "mlx":
            import mlx.core as mx

            compiled = mx.compile(lambda slope, *x: gradients(lambda q, k, v, *table: f(q, k, v, w, None, slope, *table), *x))
            got = compiled(bias.slope, *given)
        else:
            import torch

            got = gradients(torch.compile(g, fullgraph=True, backend="aot_eager"), *given)
        assert len(got) == len(want) and all(apart(ops.numpy(a), ops.numpy(b)) < 1e-4 for a, b in zip(got, want))


@torch_only
@pytest.mark.parametrize("lse", [False, True], ids=["y", "lse"])
@pytest.mark.parametrize("how", ["plain", "documents", "slope", "table"])
def test_the_operator_is_what_it_says(how, lse):
    """Schema, gradients and shapes as torch's own check wants them, of queries that lie in memory as a model's do."""
    import torch

    q, k, v = (ops.swap(torch.randn(2, 50, h, d), 1, 2).requires_grad_() for h, d in ((4, 8), (2, 8), (2, 5)))
    begin = cut_in_two(50, 20) if how == "documents" else None
    slope, table = torch.rand(4) if how == "slope" else None, torch.randn(4, 11).requires_grad_() if how == "table" else None
    name = named(parse("longformer:window=9,n_global=2"))
    torch.library.opcheck(blocks.attention, (q, k, v, table, slope, begin, name, [0, 1, 2, 3], 0, 0, 0, 0, 0.3, lse))


@torch_only
def test_lengths_that_change_share_a_graph(use):
    import torch

    use("blocks")
    rule, graphs = parse("longformer:window=9,n_global=2"), []
    counting = lambda graph, example: graphs.append(graph) or graph
    torch.compiler.reset()
    f = lambda *x: kernels.attend(*x, Places(None, 0), Places(None, 0), rule)
    compiled = torch.compile(f, fullgraph=True, backend=counting, dynamic=True)
    for n in (50, 61, 130):
        arrays = inputs(1, 4, 2, n, n, 8)[:3]
        assert apart(ops.numpy(compiled(*arrays)), ops.numpy(f(*arrays))) < 1e-5
    assert len(graphs) == 1


@torch_only
@pytest.mark.parametrize("how", ["plain", "documents"])
def test_the_compiled_model(use, cut, how):
    """A whole model as one graph: loss and all gradients."""
    import torch

    cut((16, 16), 1)
    use("blocks")
    model, tokens = tiny("longformer:window=20,n_global=3/duo:window=9"), ops.array(text(120, 2))
    begin = {"begin": cut_in_two(120, 50, 2)[:, 0]} if how == "documents" else {}
    torch.compiler.reset()
    results = []
    for f in (torch.compile(lambda: model(tokens, **begin), fullgraph=True, backend="aot_eager"), lambda: model(tokens, **begin)):
        results.append(ops.value_and_grad(model, lambda f=f: f().square().mean())[1])
    for n, want in results[1].items():
        assert apart(ops.numpy(results[0][n]), ops.numpy(want)) < 1e-4, n


@mlx_only
@pytest.mark.parametrize("lse", [False, True], ids=["y", "lse"])
def test_compiled_whole(use, lse):
    """Loss and gradients in one compiled graph; documents that are only traced there fall back to the mask, or to dense."""
    import mlx.core as mx

    use("auto")
    arrays, f = inputs(1, 4, 2, 512, 512, 8), Attending("window:window=20", 512, 512, lse)
    known = cut_in_two(512, 200)
    for begin, given in ((None, None), (known, None), (None, known)):
        g = mx.value_and_grad(lambda q, k, v, w, b, begin=begin: f(q, k, v, w, begin if b is None else b), argnums=(0, 1, 2))
        (y, got), (z, want) = mx.compile(g)(*arrays, given), g(*arrays, given)
        assert abs((y - z).item()) < 1e-2 and all(apart(ops.numpy(i), ops.numpy(j)) < 1e-4 for i, j in zip(got, want))


@mlx_only
@pytest.mark.parametrize("how", ["plain", "documents"])
def test_the_compiled_model_in_mlx(use, cut, how):
    import mlx.core as mx

    cut((16, 16), 1)
    use("blocks")
    model, tokens = tiny("longformer:window=20,n_global=3/duo:window=9"), ops.array(text(120, 2))
    begin = {"begin": cut_in_two(120, 50, 2)[:, 0]} if how == "documents" else {}
    loss = lambda x: model(x, **begin).square().mean()
    results = [ops.value_and_grad(model, lambda f=f: f(tokens)) for f in (mx.compile(loss), loss)]
    assert abs((results[0][0] - results[1][0]).item()) < 1e-4 * results[1][0].item()
    compiled = mx.compile(lambda x: ops.value_and_grad(model, lambda: loss(x))[1])(tokens)
    for n, want in results[1][1].items():
        assert apart(ops.numpy(compiled[n]), ops.numpy(want)) < 1e-4, n


@torch_only
@pytest.mark.parametrize("T", [1, 3])
def test_plain_products(T):
    """What takes the place of fused attention for one query on a GPU, and for masks that no kernel there takes."""
    q, k, v, _ = inputs(2, 4, 2, T, 20, 8, width=5)
    see = ops.array(np.random.default_rng(0).random((2, 4, T, 20)) < 0.5)
    see[1, 2, 0] = False
    for mask in (None, see, see[:1, :1], see[:, :1], ops.where(see, 3.0 * see.cumsum(-1), -float("inf"))):
        got, want = backend._plain(q, k, v, mask, 0.3), ops.sdpa(q, k, v, mask, 0.3)
        assert got.shape == (2, 4, T, 5) and apart(ops.numpy(got), ops.numpy(want)) < 1e-5
        assert mask is None or mask.shape[1] == 1 or (got[1, 2, 0] == 0).all()


def test_names_of_rules():
    """A name is read back as the rule, in a process that never heard of it too; no two rules share one."""
    made, before = {}, dict(named_.made)
    for kind in plugins.names("attention"):
        for i in range(3):
            rule = drawn(kind, np.random.default_rng(i)) if hasattr(plugins.load("attention", kind), "allowed") else parse(kind)
            for here in (
                {},
                {"layer": 1, "n_layer": 7, "n_head": 8, "n_kv_head": 4},
                {"layer": 2, "n_layer": 7, "n_head": 8, "n_kv_head": 2},
            ):
                placed = plugins.place(rule, **here)
                assert made.setdefault(named(placed), placed) == placed
    named_.made.clear()
    try:
        assert all(rule_of(name) == rule and named(rule) == name for name, rule in made.items())
    finally:
        named_.made.update(before)
    modules = [type("mine", (), {"allowed": staticmethod(lambda q, k, h, o, n=n: (k <= q) & (q - k < n))}) for n in (3, 9)]
    rules = [plugins.Plugin("mine", m, parse("full").options) for m in modules]
    assert len({named(r) for r in rules}) == 2 and [rule_of(named(r)).module for r in rules] == modules


@torch_only
def test_documents_are_read_once(use, cut, monkeypatch):
    """However many layers there are, forward and backward: once an array, again when it was written into, never one for another."""
    import torch

    use("blocks")
    read, plain = [], backend.numpy
    monkeypatch.setattr(backend, "numpy", lambda x: read.append(x.shape) or plain(x))
    model, tokens, begin = tiny("longformer:window=20,n_global=3", layers=4), text(81, 2), cut_in_two(80, 33, 2)[:, 0]

    def loss():
        y = ops.cross_entropy(model(ops.array(tokens[:, :-1]), begin=begin), ops.array(tokens[:, 1:])).mean()
        return ops.value_and_grad(model, lambda: y)[0].item()

    def count(f):
        read.clear()
        value = f()
        return value, read.count((2, 1, 80))

    first, n = count(loss)
    assert n == 1
    begin[:, 60:] = 60
    second, n = count(loss)
    assert n == 1 and abs(second - first) > 1e-4
    use("dense")
    assert abs(loss() - second) < 1e-5
    for i in range(20):
        # a new array may lie where the last one was
        x = torch.full((1, 1, 50), i, dtype=torch.int32)
        assert (ops.known(x) == i).all()
        x += 1
        assert (ops.known(x) == i + 1).all()
        del x
    with torch.inference_mode():
        x = torch.zeros(3)
        assert ops.known(x)[0] == 0
        x += 1
        assert ops.known(x)[0] == 1


@mlx_only
def test_documents_written_into(use):
    """An array of MLX's says nothing of being written into, so it is read again."""
    begin = cut_in_two(80, 33)
    assert ops.known(begin).max() == 33
    begin[:, :, 60:] = 60
    assert ops.known(begin).max() == 60


def test_a_plan_is_made_once(use, cut, monkeypatch):
    """For all layers, forward and backward, and for every step that is alike."""
    cut((16, 16), 1)
    use("blocks")
    made, plain = [], blocks.stripes
    monkeypatch.setattr(blocks, "stripes", lambda *how: made.append(how) or plain(*how))
    blocks.recent.clear()
    model, tokens = tiny("longformer:window=21,n_global=2", layers=3), text(98, 2)
    begin = {"begin": cut_in_two(97, 33, 2)[:, 0]}
    for n, how in ((1, {}), (1, {}), (2, begin), (2, begin)):
        loss_and_gradients(model, tokens, **how)
        assert len(made) == n
    # what is kept is bounded, and the last one stays
    monkeypatch.setattr(blocks.recent, "room", 1)
    loss_and_gradients(model, tokens)
    assert len(blocks.recent) == 1 and len(made) == 2


@pytest.mark.parametrize("first", [0, 30])
@pytest.mark.parametrize(
    "spec, H, K", [("duo:window=9,full=50", 8, 4), ("duo:window=9,full=25", 8, 4), ("duo:window=9,full=50", 6, 2), ("turns", 6, 2)]
)
def test_heads_that_see_all(use, cut, monkeypatch, spec, H, K, first):
    """They are left to the framework's causal attention, neighbours or not, and the others to blocks."""
    cut((16, 16), 1)
    monkeypatch.setattr(blocks, "ALONE", 0)
    asked, plain = [], ops.sdpa
    monkeypatch.setattr(ops, "sdpa", lambda *x: asked.append(x) or plain(*x))
    rule = (
        parse(spec)
        if spec != "turns"
        else plugins.Plugin(
            "turns", type("turns", (), {"allowed": lambda q, k, h, o: (k <= q) & ((h % 3 == 1) | (q - k < 9))}), parse("full").options
        )
    )
    rule = plugins.place(rule, n_head=H, n_kv_head=K)
    arrays, where = inputs(2, H, K, 70, 70 + first, 8), (at(first, 70), at(0, 70 + first))
    agree(use, "blocks", "float32", arrays, *where, rule)
    causal = [x for x in asked if isinstance(x[3], str)]
    heads = sum(bool(np.asarray(rule.module.allowed(np.array(1000), np.array(500), h, rule.options)).all()) for h in range(H))
    assert causal and all(x[0].shape[1] == heads for x in causal) and heads < H
    asked.clear()
    agree(use, "blocks", "float32", arrays, *where, rule, documents(np.random.default_rng(0), first, 70, 2))
    for kind in ("slope", "table"):
        agree(use, "blocks", "float32", arrays, *where, rule, bias=biased(kind, H))
    assert not [x for x in asked if isinstance(x[3], str)]


def test_plans_do_not_mix(use, cut):
    """Calls that differ in one thing only, one after the other."""
    cut((16, 16), 1)
    begin = lambda i: documents(np.random.default_rng(i), 20, 60, 2)
    usual = {
        "rule": "window:window=9",
        "q": (20, 60),
        "k": (0, 80),
        "begin": None,
        "always": 0,
        "opening": 0,
        "heads": (2, 4, 2),
    }
    others = {
        "rule": ["window:window=30", "longformer:window=9"],
        "q": [(19, 60), (20, 59)],
        "k": [(1, 80), (0, 79)],
        "always": [7],
    }
    others |= {"begin": [begin(1), begin(2)], "opening": [9], "heads": [(1, 4, 2), (2, 4, 4), (2, 4, 1), (2, 2, 2)]}
    for name, values in others.items():
        for value in [usual[name], *values, usual[name]]:
            x = {**usual, name: value}
            arrays, last = inputs(*x["heads"], x["q"][1], x["k"][1], 8), (x["begin"], x["always"], x["opening"])
            agree(use, "blocks", "float32", arrays, at(*x["q"]), at(*x["k"]), parse(x["rule"]), *last)


@torch_only
def test_a_plan_made_in_inference_serves_training(use, cut):
    import torch

    cut((16, 16), 1)
    use("blocks")
    blocks.recent.clear()
    for spec in ("longformer:window=9,n_global=2", "bigbird:block=8,window=1,n_global=0", "dilated:window=9,heads=1"):
        arrays, how = inputs(1, 4, 2, 70, 70, 8), (at(0, 70), at(0, 70), parse(spec))
        with torch.inference_mode():
            kernels.attend(*(x.clone() for x in arrays[:3]), *how)
        agree(use, "blocks", "float32", arrays, *how)


def test_too_many_blocks_are_refused(monkeypatch):
    """Before memory is spent, in a sentence; what fits is not."""
    from errors import Refused
    from kernels import layout

    monkeypatch.setattr(layout, "MOST", 1 << 19)
    for spec in ("full", "duo:window=9", "strided:window=9,stride=9"):
        with pytest.raises(Refused, match=f"--attn {spec[:4]}.*choose a pattern that sees less"):
            layout.layout(parse(spec), (0, 1 << 20), (0, 1 << 20), (64, 32))
    assert len(layout.layout(parse("longformer:window=32"), (0, 1 << 20), (0, 1 << 20), (64, 32)).pairs) < 1 << 17
    n = 255 * 64
    monkeypatch.setattr(layout, "MOST", 255 * 256 // 2 + 512)
    assert len(layout.layout(parse("full"), (0, n), (0, n), (64, 64)).pairs) == 255 * 256 // 2


@torch_only
def test_nothing_is_held(use):
    """Queries are let go with the answer, without waiting for the garbage collector."""
    use("blocks")
    gc.collect()
    gc.disable()
    try:
        q, k, v, _ = inputs(1, 4, 2, 100, 100, 8)
        q.requires_grad_()
        y = kernels.attend(q, k, v, at(0, 100), at(0, 100), parse("window:window=20"))
        y.sum().backward()
        gone = weakref.ref(q), weakref.ref(k), weakref.ref(y)
        del q, k, v, y, _
        assert not any(r() is not None for r in gone)
    finally:
        gc.enable()


PEAK = """
import json, sys
import numpy as np
import ops
from conftest import gradients, places
from kernels import attend
from test_engines import biased
from test_layout import parse
import kernels

kernels.ENGINE, backward, rule, took = "blocks", "backward" in sys.argv[1], parse("longformer:window=128,n_global=8"), {}
bias = biased("table", R=200) if "table" in sys.argv[1] else None
def run(n):
    q, k, v = (ops.normal((1, h, n, 32), ops.float32) for h in (4, 2, 2))
    at = places(np.arange(n))._replace(first=0)
    ops.wait(q, k, v)
    f = lambda q, k, v: attend(q, k, v, at, at, rule, bias=bias)
    out = gradients(lambda *x: f(*x).sum(), q, k, v) if backward else f(q, k, v)
    ops.wait(out)
    del out
def peak():
    if ops.BACKEND == "mlx":
        return ops.peak_memory()
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
run(256)
for n in (2048, 8192):
    before = peak()
    run(n)
    took[n] = peak() - before
print(json.dumps(took))
"""


@pytest.mark.parametrize("direction", ["forward", "backward", "backward with a table"])
def test_memory_grows_linearly(direction):
    """A mask array alone would take 67 MB at 8192, scores 1 GB; four times the length takes about four times the memory."""
    took = json.loads(python(PEAK, ops.BACKEND, direction, OMP_NUM_THREADS="1"))
    assert took["8192"] < 40e6 and took["8192"] < 8 * max(took["2048"], 3e6), took
