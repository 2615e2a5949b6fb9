"""What saves memory in training changes neither loss nor gradients."""

import contextlib

import numpy as np
import pytest
from conftest import text, tiny

import ops


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_in_chunks_they_are_the_same(tied):
    """And their gradients, though no [T, V] is held: of rows of 23 tokens, 2 of them, 7 or 10 tokens a chunk, documents and padding too."""
    model = tiny(tie_word_embeddings=tied)
    tokens = text(24, 2)
    targets = np.where(np.arange(24) % 5 == 3, -1, np.roll(tokens, -1, 1)).astype("int32")
    x, y = ops.array(tokens), ops.array(targets)
    loss = lambda: model(x, targets=y).sum()
    want, gradients = ops.value_and_grad(model, loss)
    try:
        for model.chunk in (14, 21, 2, 48, 999):
            got, mine = ops.value_and_grad(model, loss)
            assert abs(got.item() / want.item() - 1) < 1e-6
            for name, g in gradients.items():
                assert np.abs(ops.numpy(mine[name]) - ops.numpy(g)).max() < 1e-5 * np.abs(ops.numpy(g)).max(), name
    finally:
        model.chunk = None
    np.testing.assert_allclose(ops.numpy(model(x, targets=y)), ops.numpy(ops.cross_entropy(model(x), y)), atol=1e-5)


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_mlps_in_tiles_are_the_same(recomputed):
    """Alone, and in blocks that are themselves made once more."""
    model = tiny()
    x, y = ops.array(text(24, 2)), ops.array(text(24, 2, seed=1))
    loss = lambda: model(x, targets=y).sum()
    want, gradients = ops.value_and_grad(model, loss)
    try:
        model.model.run = ops.checkpoint if recomputed else ops.call
        for n in (7, 24, 1):
            for block in model.model.layers:
                block.tile = n
            got, mine = ops.value_and_grad(model, loss)
            assert abs(got.item() / want.item() - 1) < 1e-6
            for name, g in gradients.items():
                assert np.abs(ops.numpy(mine[name]) - ops.numpy(g)).max() < 1e-5 * np.abs(ops.numpy(g)).max(), name
    finally:
        model.model.run = ops.call
        for block in model.model.layers:
            block.tile = None


@pytest.mark.skipif(ops.BACKEND != "mlx", reason="torch works in the order in which it is told")
@pytest.mark.parametrize("what", ["tiles", "chunks"])
def test_parts_are_made_one_after_the_other(what, monkeypatch):
    """Eight or sixteen parts take little more than one, in the backward pass too, though nothing but its order says so."""
    import mlx.core as mx

    from backends import mlx_

    # wide where the parts are wide, so that nothing else matters
    heads = {"attn": "full", "num_attention_heads": 16, "num_key_value_heads": 8}
    wide = {"tiles": {"intermediate_size": 1999}, "chunks": {"vocab_size": 3999}, "groups": heads}
    model = tiny(**{"attn": "window:window=17", **wide[what]})
    x, y = ops.array(text(512)), ops.array(text(512, seed=1))

    def peak():
        mx.clear_cache()
        before = ops.reset_peak()
        ops.accumulate(model, lambda: model(x, targets=y).sum(), {})
        return ops.peak_memory() - before

    ops.freeze(model, [n for n in ops.parameters(model) if "norm" not in n])
    try:
        whole = peak()
        if what == "groups":
            model.group_heads(8)
        else:
            model.chunk = 32
            for block in model.model.layers:
                block.tile = 32
        parts = peak()
        monkeypatch.setattr(mlx_, "_in_turn", contextlib.nullcontext)
        assert parts < whole / 4 and peak() > 1.5 * parts, (whole, parts)
    finally:
        model.chunk = None
        model.group_heads(1)
        for block in model.model.layers:
            block.tile = None
        ops.freeze(model, [])
