"""A frozen base in 4 or 8 bits (kernels/coded.py) against the model whose matrices are the numbers that the codes stand for."""

import json

import numpy as np
import pytest
from conftest import apart, gradients, loss_and_gradients, python, run, text, whole
from test_adapters import fresh, moved
from test_train import args, metrics, own_cache, refusal, uneven, world  # noqa: F401

import convert
import ops
import train
from errors import Refused
from kernels import coded
from model import load, save

WIDE = {"intermediate_size": 64}  # which groups of 32 divide, as they do TINY's other width
T = 24
BITS = pytest.mark.parametrize("bits", [4, 8])


def matrix(n_out=48, n_in=128, seed=0):
    return np.random.default_rng(seed).normal(size=(n_out, n_in)).astype("float32")


def plain(model):
    """A model of floats with the same numbers."""
    twin = fresh(**{**vars(model.config), "base_bits": 16})
    ops.set_parameters(twin, ops.parameters(model))
    ops.set_parameters(twin, {n: w.dense(ops.float32) for n, w in coded.held(model).items()})
    return twin


# ---------------------------------------------------------------- the codes


@BITS
@pytest.mark.parametrize("n_in", [128, 96], ids=["64", "32"])
def test_a_number_is_half_a_step_away_at_most(bits, n_in):
    w = matrix(n_in=n_in)
    w[3, :64] = 0.25
    held = coded.Coded(ops.array(w), bits, ops.float32)
    groups = w.reshape(len(w), -1, held.group)
    step = np.ptp(groups, -1, keepdims=True) / (2**bits - 1)
    off = np.abs(ops.numpy(held.dense(ops.float32)).reshape(groups.shape) - groups)
    assert (off <= 0.5001 * step + 1e-6).all() and off.max() > 0.4 * step.max()
    assert held.nbytes() == w.size * bits // 8 + 2 * 4 * w.size // held.group


@BITS
def test_scales_of_16_bits_are_rounded_before_the_codes_are(bits):
    w = matrix()
    exact, held = (ops.numpy(coded.Coded(ops.array(w), bits, dtype).dense(ops.float32)) for dtype in (ops.float32, ops.bfloat16))
    assert np.square(held - w).mean() < (1.02 if bits == 4 else 1.3) * np.square(exact - w).mean()


@BITS
def test_mlx_reads_the_same_format(bits):
    mx = pytest.importorskip("mlx.core")
    held = coded.Coded(ops.array(matrix()), bits, ops.float32)
    code, scale, low = (mx.array(ops.numpy(a)) for a in (held.code, held.scale, held.low))
    theirs = mx.dequantize(code.view(mx.uint32), scale, low, group_size=held.group, bits=bits)
    assert apart(np.array(theirs), ops.numpy(held.dense(ops.float32))) < 1e-6
    # whose own codes of the same matrix are further from it
    own = mx.dequantize(*mx.quantize(mx.array(matrix()), group_size=held.group, bits=bits), group_size=held.group, bits=bits)
    assert np.square(np.array(own) - matrix()).mean() > np.square(np.array(theirs) - matrix()).mean()


HELD = """
import sys, numpy as np
from test_coded import fresh, coded, ops, WIDE
held = coded.held(fresh(adapter="lora", base_bits=int(sys.argv[2]), **WIDE))
np.savez(sys.argv[1], **{f"{n}/{f}": ops.numpy(getattr(w, f)) for n, w in held.items() for f in ("code", "scale", "low")})
"""


@BITS
def test_both_backends_hold_the_same_numbers(bits, tmp_path):
    pytest.importorskip("mlx"), pytest.importorskip("torch")
    python(HELD, "mlx" if ops.BACKEND == "torch" else "torch", tmp_path / "held.npz", bits)
    theirs, ours = np.load(tmp_path / "held.npz"), coded.held(fresh(adapter="lora", base_bits=bits, **WIDE))
    assert len(ours) == 14 and len(theirs) == 42
    for name, w in ours.items():
        for f in ("code", "scale", "low"):
            np.testing.assert_array_equal(theirs[f"{name}/{f}"], ops.numpy(getattr(w, f)), err_msg=name)


@BITS
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_is_the_product_with_what_the_codes_stand_for(bits, bias):
    linears = [ops.Linear(128, 48, bias) for _ in range(2)]
    held = coded.Coded(ops.array(matrix()), bits, ops.float32)
    ops.set_parameters(linears[0], {"weight": held})
    ops.set_parameters(linears[1], {"weight": held.dense(ops.float32)})
    for linear in linears if bias else ():
        ops.set_parameters(linear, {"bias": ops.array(matrix(1, 48)[0])})
    assert set(ops.parameters(linears[0])) == ({"bias"} if bias else set())
    x = ops.array(matrix(10, 128, seed=1).reshape(2, 5, 128))
    got, want = (ops.numpy(linear(x)) for linear in linears)
    assert apart(got, want) < 1e-5
    got, want = (ops.numpy(gradients(lambda x, linear=linear: ops.sin(linear(x)).sum(), x)[0]) for linear in linears)
    assert apart(got, want) < 1e-5 and np.abs(want).max() > 1


# ---------------------------------------------------------------- the model


@BITS
@pytest.mark.parametrize("adapter", ["lora", "lora:dora=true,rank=4", "longlora", "prefix:closed=false"])
def test_training_beside_codes_is_training_beside_their_numbers(bits, adapter):
    model = moved(fresh(adapter=adapter, base_bits=bits, **WIDE))
    twin = plain(model)
    for m in (model, twin):
        ops.freeze(m, [n for n in ops.parameters(m) if not m.trains(n)])
    (loss, grads), (loss_, grads_) = (loss_and_gradients(m, text(T, 2)) for m in (model, twin))
    assert abs(loss - loss_) < 1e-5 * loss_ and grads.keys() == grads_.keys() and grads
    for n, g in grads_.items():
        assert np.abs(grads[n] - g).max() <= 1e-4 * np.abs(g).max() + 1e-7, n
    # or nothing was quantised
    assert apart(run(model, text(T)), run(moved(fresh(adapter=adapter, **WIDE)), text(T))) > 0.001


@pytest.mark.parametrize("adapter", ["lora", "lora:dora=true"])
def test_step_0_is_the_base_in_as_many_bits(adapter):
    base, model = (fresh(adapter=a, base_bits=4, **WIDE) for a in ("full", adapter))
    assert apart(run(model, text(T), whole(T)), run(base, text(T), whole(T))) < 1e-5
    assert apart(run(model, text(T), whole(T)), run(fresh(**WIDE), text(T), whole(T))) > 0.01


def test_the_floats_are_gone():
    model, before = fresh(adapter="longlora", base_bits=4, **WIDE), fresh(adapter="longlora", **WIDE)
    left = {n for n in ops.parameters(model) if n.endswith("_proj.weight")}
    assert not left and ops.parameters(before).keys() - ops.parameters(model).keys() == coded.held(model).keys()
    kept = {n for n in ops.parameters(model) if "lora_" not in n}
    assert kept == {n for n in ops.parameters(before) if "norm" in n or "embed" in n or "lm_head" in n}
    # 4 bits, and two numbers of 32 a group of 32 or 64
    down = {n: ops.nbytes(p) for n, p in ops.parameters(before).items() if "down_proj.weight" in n}
    floats = sum(ops.nbytes(p) for n, p in ops.parameters(before).items() if n in model.coded)
    want = ((floats - sum(down.values())) * 6 + sum(down.values()) * 5) // 32
    assert sum(w.nbytes() for w in coded.held(model).values()) == want and len(down) == 2
    assert f"others are held in {32 * want / floats:.3g} bits each" in train.sizes(model) and "held" not in train.sizes(before)


# ---------------------------------------------------------------- checkpoints and runs


@pytest.fixture
def base(tmp_path, world):  # noqa: F811
    save(fresh(**WIDE, vocab_size=257), tmp_path / "base", world / "model")
    return tmp_path / "base"


@BITS
def test_a_checkpoint_is_opened_as_it_was_trained_or_on_the_base_as_it_is(bits, base, tmp_path):
    model, _ = load(base, adapter="lora", dtype="float32", base_bits=bits)
    save(moved(model), tmp_path / "out", base)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["nanolong"]["base_bits"] == bits
    want, floats = run(model, text(T)), run(load(tmp_path / "out", dtype="float32", base_bits=16)[0], text(T))
    np.testing.assert_array_equal(run(load(tmp_path / "out", dtype="float32")[0], text(T)), want)
    assert 1e-4 < np.abs(floats - want).mean() / want.std() < (0.5 if bits == 4 else 0.05)
    convert.main([str(tmp_path / "out"), str(tmp_path / "merged")])
    merged, _ = load(tmp_path / "merged", dtype="float32")
    assert merged.config.base_bits == 16 and apart(run(merged, text(T)), floats) < 2e-5


def test_what_does_not_train_is_read_in_the_dtype_of_the_activations(base):
    model, _ = load(base, adapter="lora", dtype="float32", base_bits=8, frozen=ops.bfloat16)
    kinds = {n: str(p.dtype).split(".")[-1] for n, p in ops.parameters(model).items()}
    assert {kinds[n] for n in kinds if model.trains(n)} == {"float32"} and {kinds[n] for n in kinds if not model.trains(n)} == {"bfloat16"}
    assert {str(w.dtype).split(".")[-1] for w in coded.held(model).values()} == {"bfloat16"}


@pytest.fixture
def wide(base, world):  # noqa: F811
    return world, {"model": base, "adapter": "lora", "segment": 16, "memory": "window:budget=9", "dtype": "float32"}


def test_a_resumed_run_equals_one_that_never_stopped(wide, tmp_path, monkeypatch):
    (world, flags), real, out, steps = wide, train.train_step, tmp_path / "run", []  # noqa: F811
    flags |= {"steps": 4, "save-every": 2, "base-bits": 4}
    assert train.main(args(world, tmp_path / "whole", **flags)) == 0
    monkeypatch.setattr(train, "train_step", lambda *a: steps.append(1) or (real(*a) if len(steps) < 4 else 1 / 0))
    with pytest.raises(ZeroDivisionError):
        train.main(args(world, out, **flags))
    monkeypatch.setattr(train, "train_step", real)
    assert train.main(["--resume", str(out)]) == 0
    assert metrics(out, "loss", "valid_loss") == metrics(tmp_path / "whole", "loss", "valid_loss")
    # and on from its checkpoint, in as many bits, without saying so
    assert (
        train.main(args(world, tmp_path / "more", **{**flags, "model": out / "step-000004", "steps": 1, "warmup": 0, "base-bits": None}))
        == 0
    )
    assert load(tmp_path / "more" / "step-000001")[0].config.base_bits == 4


def test_flags_that_do_not_fit_are_refused(wide, world, tmp_path, monkeypatch, capsys):  # noqa: F811
    say = lambda **flags: refusal(args(world, tmp_path / "no", **{**wide[1], **flags}), monkeypatch, capsys)
    assert "--adapter full trains all" in say(adapter="full", **{"base-bits": 4})
    assert "invalid choice: 3" in say(**{"base-bits": 3})
    assert not (tmp_path / "no").exists()
    with pytest.raises(Refused, match=r"32 neighbours.*layers.0.mlp.down_proj.weight has rows of 48"):
        fresh(adapter="lora", base_bits=4)
    with pytest.raises(Refused, match="5 bits are not known"):
        fresh(adapter="lora", base_bits=5, **WIDE)
    model = fresh(adapter="lora", base_bits=4, **WIDE)
    with pytest.raises(Refused, match=r"convert.py merges"):
        model.adapter.module.merge(model)
    with pytest.raises(Refused, match="base_bits=16"):
        save(fresh(base_bits=4, **WIDE), tmp_path / "no")


def test_an_adapter_that_trains_a_matrix_is_refused(monkeypatch):
    from adapters import lora

    monkeypatch.setattr(lora, "trains", lambda name, o: "lora_" in name or "down_proj" in name)
    with pytest.raises(Refused, match=r"codes take no gradient.*down_proj"):
        fresh(adapter="lora", base_bits=4, **WIDE)
