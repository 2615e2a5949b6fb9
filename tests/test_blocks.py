"""kernels/blocks.py beyond tests/test_engines.py: blocks much smaller than the text, stripes of many blocks, memory before a
segment, documents that differ between rows, exempt tokens, random options, when it is chosen, and what it costs in memory."""

import gc
import json
import weakref

import numpy as np
import pytest
from conftest import apart, loss_and_gradients, places, python, text, tiny
from test_engines import agree, inputs, outcome
from test_layout import RULES, drawn, parse

import kernels
import ops
import plugins
from kernels import Places, blocks

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
    agree(use, "blocks", "float32", inputs(2, 10, 2, 70, 70, 8), at(0, 70), at(0, 70), rule)


def test_far_out(use, cut):
    cut((16, 32), 1)
    for spec in ("longformer:window=20,n_global=3", "bigbird:block=16,window=2,n_global=1", "strided:window=8,stride=24"):
        agree(use, "blocks", "float32", inputs(1, 4, 2, 60, 99, 8), at(2**20 + 39, 60), at(2**20, 99), parse(spec), None, 4)


@pytest.mark.parametrize("first, keys", [(0, 20), (90, 0), (8, 3), (0, 60)])
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


def test_when_blocks_are_chosen(use):
    """Where they leave enough out and the host knows where everything stands; never for a single token."""
    use("auto")

    def chosen(spec, T, N, q_at=None, k_at=None, begin=None):
        q_at, k_at = q_at or Places(None, N - T), k_at or Places(None, 0)
        return kernels.sparse((1, 4, T, 8), N, q_at, k_at, parse(spec), begin, 0, 0)

    assert chosen("longformer:window=64", 1024, 1024) and chosen("longformer:window=64", 32, 8192)
    assert not chosen("longformer:window=64", 1, 1 << 20), "one token"
    assert not chosen("longformer:window=64", 64, 64), "too short to pay"
    assert not chosen("longformer:window=4096", 512, 4096), "everything is seen"
    assert not chosen("longformer:window=64", 1024, 1024, q_at=Places(None)) and not chosen("window", 1024, 1024, k_at=Places(None))
    begin = lambda cut: ops.array(np.where(np.arange(1024) < cut, 0, cut).astype("int32")[None, None])
    assert chosen("full", 1024, 1024, begin=begin(512)) and chosen("longformer:window=64", 1024, 1024, begin=begin(10))
    use("blocks")
    assert chosen("longformer:window=4096", 64, 64) and not chosen("longformer:window=64", 1, 4096)


@pytest.mark.skipif(ops.BACKEND != "torch", reason="about torch.compile")
def test_a_compiler_reads_along(use):
    """Blocks are planned on the host: inside one compiled graph the mask is taken, and nothing breaks the graph."""
    import torch

    use("auto")
    arrays, where, rule = inputs(1, 4, 2, 512, 512, 8)[:3], at(0, 512), parse("window:window=20")
    f = lambda *x: kernels.attend(*x, where, where, rule)
    assert apart(ops.numpy(torch.compile(f, fullgraph=True, backend="eager")(*arrays)), ops.numpy(f(*arrays))) < 1e-5


@pytest.mark.skipif(ops.BACKEND != "mlx", reason="about mx.compile")
def test_compiled_whole(use):
    """Loss and gradients in one compiled graph; documents that are only traced there fall back to the mask."""
    import mlx.core as mx

    use("auto")
    arrays, where, rule = inputs(1, 4, 2, 512, 512, 8), at(0, 512), parse("window:window=20")
    begin = ops.array(np.where(np.arange(512) < 200, 0, 200).astype("int32")[None, None])
    for b in (None, begin):
        f = lambda q, k, v, w, b: (kernels.attend(q, k, v, where, where, rule, b) * w).sum()
        g = mx.value_and_grad(f, argnums=(0, 1, 2))
        (y, got), (z, want) = mx.compile(g)(*arrays, b), g(*arrays, b)
        assert abs((y - z).item()) < 1e-3 and all(apart(ops.numpy(i), ops.numpy(j)) < 1e-4 for i, j in zip(got, want))


@pytest.mark.skipif(ops.BACKEND != "torch", reason="about autograd in torch")
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
from test_layout import parse
import kernels

kernels.ENGINE, backward, rule, took = "blocks", sys.argv[1] == "backward", parse("longformer:window=128,n_global=8"), {}
def run(n):
    q, k, v = (ops.normal((1, h, n, 32), ops.float32) for h in (4, 2, 2))
    at = places(np.arange(n))._replace(first=0)
    ops.wait(q, k, v)
    f = lambda q, k, v: attend(q, k, v, at, at, rule)
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


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_memory_grows_linearly(direction):
    """A mask array alone would take 67 MB at 8192, scores 1 GB; four times the length takes about four times the memory."""
    took = json.loads(python(PEAK, ops.BACKEND, direction, OMP_NUM_THREADS="1"))
    assert took["8192"] < 40e6 and took["8192"] < 8 * max(took["2048"], 3e6), took
