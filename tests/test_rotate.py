"""The fused rotation against complex numbers in float64 and against the plain one; on a GPU, or interpreted (TRITON_INTERPRET=1)."""

import numpy as np
import pytest
from conftest import gradients, run, text, tiny

import kernels
import ops
from kernels import rotate
from positions.base import whole_turns

SHAPES = {
    "one row": (1, 2, 40, 8, 4, 1, 1),
    "odd": (2, 3, 33, 20, 10, 1, 1),
    "rows apart": (2, 3, 17, 16, 8, 2, 1),
    "heads apart": (2, 3, 17, 16, 8, 2, 3),
    "in part": (2, 2, 19, 24, 6, 1, 1),
    "wide": (1, 2, 70, 128, 64, 1, 1),
}
DTYPES = {"float32": 1e-6, "float16": 2e-3}


def draw(B, H, n, D, P, Bc, Hc, dtype):
    r = np.random.default_rng(n)
    x, w = (r.normal(size=(B, n, H, D)).astype("float32") for _ in "xw")
    angle = r.normal(size=(Bc, Hc, n, P)).astype("float32") * 9
    x, w = (ops.swap(ops.cast(ops.array(a), getattr(ops, dtype)), 1, 2) for a in (x, w))  # heads as projections leave them
    return x, w, ops.cos(ops.array(angle)), ops.sin(ops.array(angle))


def exact(x, cos, sin):
    x, (cos, sin) = ops.numpy(x).astype("float64"), (ops.numpy(a).astype("float64") for a in (cos, sin))
    P = cos.shape[-1]
    z = (x[..., :P] + 1j * x[..., P : 2 * P]) * (cos + 1j * sin)
    return np.concatenate([z.real, z.imag, x[..., 2 * P :]], -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("way", ["plain", pytest.param("triton", marks=pytest.mark.skipif(not kernels.TRITON, reason="needs Triton"))])
def test_pairs_turn(way, shape, dtype):
    x, w, cos, sin = draw(*shape, dtype)
    f = rotate.plain if way == "plain" else rotate.rotate_triton.rotate
    tolerance = DTYPES[dtype] * (4 if way == "plain" else 1)
    np.testing.assert_allclose(ops.numpy(f(x, cos, sin)), exact(x, cos, sin), atol=tolerance * 4, rtol=tolerance)
    wide = lambda a: ops.cast(a, ops.float32)
    (dx,) = gradients(lambda x: (wide(f(x, cos, sin)) * wide(w)).sum(), x)
    np.testing.assert_allclose(ops.numpy(dx), exact(w, cos, -sin), atol=tolerance * 4, rtol=tolerance)


@pytest.mark.skipif(not kernels.TRITON, reason="needs Triton")
def test_triton_serves_long_texts_and_not_short_ones(monkeypatch):
    calls = []
    monkeypatch.setattr(rotate.rotate_triton, "rotate", lambda *a: calls.append(1) or rotate.plain(*a))
    for n in (1, rotate.FEW - 1, rotate.FEW):
        x, _, cos, sin = draw(1, 2, n, 8, 4, 1, 1, "float32")
        rotate.rotate(x, cos, sin)
    assert len(calls) == 1


@pytest.mark.skipif(ops.BACKEND != "mlx", reason="MLX's own kernel")
@pytest.mark.parametrize("rest", [0, 6])
@pytest.mark.parametrize("pos", [0, 1, 1000, (1 << 20) + 7])
def test_mlx_turns_one_position_exactly(pos, rest):
    per_turn = whole_turns(10000.0 ** -(np.arange(8) / 8))
    x, at = draw(1, 3, 1, 16 + rest, 8, 1, 1, "float32")[0], ops.array(np.full((1, 1, 1), pos, "int32"))
    turns = pos * np.array(per_turn) % 2**32 / 2**32
    cos, sin = (ops.array(f(2 * np.pi * turns).reshape(1, 1, 1, 8).astype("float32")) for f in (np.cos, np.sin))
    for first in (None, pos):
        (found,) = rotate.rotate_mlx.prepared(kernels.Places(at, first), tuple(per_turn))
        np.testing.assert_allclose(ops.numpy(rotate.rotate(x, found)), exact(x, cos, sin), atol=1e-5)
    # counted from position 0 in float32, as the kernel would by itself
    naive = ops.numpy(rotate.rotate(x, (2**32 / (2 * np.pi) / pos / ops.array(np.array(per_turn, "float32")))) if pos else x)
    assert (abs(naive - exact(x, cos, sin)).max() > 1e-3) == (pos > 1 << 19), "that is not exact"


@pytest.mark.skipif(ops.BACKEND != "mlx", reason="MLX's own kernel")
@pytest.mark.parametrize("pos", ["rope", "yarn:factor=4", "rope:partial=0.5", "dynamic:original=8"])
def test_a_step_by_mlx_s_own_rotation(monkeypatch, pos):
    model, tokens, calls = tiny.__wrapped__(pos=pos, memory="sinks:budget=64"), text(12), []
    want, state = run(model, tokens), model.start(16)
    monkeypatch.setattr(rotate.rotate_mlx, "can", lambda pos: calls.append(pos.size) or pos.size == 1)
    for i in range(12):
        logits, state = model(ops.array(tokens[:, i : i + 1]), state, close=i % 4 == 3)
        if pos[0] != "d":
            np.testing.assert_allclose(ops.numpy(logits[:, 0]), want[:, i], atol=2e-4)
    assert (1 in calls) == (pos[0] != "d"), "dynamic turns its keys anew each time"
