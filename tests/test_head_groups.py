"""Attention by groups of heads (--head-groups): less is there at once, and neither loss nor gradients nor the state differ."""

import numpy as np
import pytest
from conftest import apart, text
from test_adapters import fresh, moved, trained
from test_train import args, metrics, own_cache, refusal, world  # noqa: F401

import data
import ops
import train
from errors import Refused

T = 40
WINDOW = {"attn": "window:window=9", "memory": "window:budget=8", "segment": 10}
SINKS = {"attn": "longformer:window=9,n_global=2", "memory": "sinks:budget=10,sinks=2,kv_positions=absolute", "segment": 10}
WAYS = {
    "full": {},
    "bias": {"attention_bias": True},
    "alibi": {"pos": "alibi"},
    "t5": {"pos": "t5"},
    "window, segments": WINDOW,
    "longformer, segments": SINKS,
    "xl, segments": {"memory": "xl:length=8", "segment": 10},
    "lora": {"adapter": "lora:rank=4"},
    "lora, dropout": {"adapter": "lora:rank=4,dropout=0.5"},
    "dora, bias": {"adapter": "lora:rank=4,dora=true", "attention_bias": True},
    "lora, longformer, segments": {"adapter": "lora:rank=4", **SINKS},
    "lora, 4 bits": {"adapter": "lora:rank=4", "base_bits": 4, "intermediate_size": 64},
}


def step(model, segment=None):
    """(loss, gradients) of two rows, the second of two documents."""
    begin = np.zeros((2, T), "int32")
    begin[1, 17:] = 17
    model.shake(5)
    return trained(model, data.Batch(text(T, 2), text(T, 2, seed=1), begin, [[], []]), segment)


def same(got, want, close=5e-5):
    (loss, grads), (loss_, grads_) = got, want
    assert abs(loss - loss_) < 1e-5 * abs(loss_) and grads.keys() == grads_.keys()
    for name, g in grads_.items():
        assert apart(ops.numpy(grads[name]), ops.numpy(g)) < close, name


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("way", WAYS)
def test_it_is_the_same_model(way, recomputed):
    how = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, **WAYS[way]}
    segment = how.pop("segment", None)
    model = moved(fresh(**how))
    ops.freeze(model, [n for n in ops.parameters(model) if not model.trains(n)])
    want = step(model, segment)
    model.model.run = ops.checkpoint if recomputed else ops.call
    for n in (2, 4):
        model.group_heads(n)
        same(step(model, segment), want)


def test_a_group_is_a_part():
    """Control: with the heads of one group twice the model is another one."""
    model = moved(fresh(num_attention_heads=8, num_key_value_heads=4, head_dim=8))
    want = step(model)[0]
    model.group_heads(2)
    one = model.model.layers[0].self_attn.q_proj
    part, one.part = one.part, lambda x, outs: part(x, slice(0, 32))
    assert abs(step(model)[0] / want - 1) > 1e-4


@pytest.mark.parametrize(
    "groups, how, says",
    [
        (3, {}, "must divide"),
        (0, {}, "must divide"),
        (4, {}, "must divide"),
        (2, {"memory": "h2o:budget=8"}, "all heads at once"),
        (2, {"memory": "infini"}, "all heads at once"),
        (2, {"attn": "longformer:own_projections=true"}, "all heads at once"),
        (2, {"attn": "routing:window=8,clusters=2"}, "all heads at once"),
        (2, {"adapter": "prefix"}, "all heads at once"),
        (2, {"attn": "full/dilated"}, "lets heads differ"),
        (2, {"attn": "s2"}, "lets heads differ"),
        (2, {"pos": "xl"}, "weights of each head"),
    ],
)
def test_what_cannot_be_parted_is_refused(groups, how, says):
    model = fresh(**how)
    with pytest.raises(Refused, match=says):
        model.group_heads(groups)
    model.group_heads(1)


def test_a_run_is_the_same_and_what_cannot_be_is_refused(world, tmp_path, monkeypatch, capsys):  # noqa: F811
    losses = []
    for name, more in ("plain", {}), ("parted", {"head-groups": 2, "mlp-tile": 16}):
        assert train.main([*args(world, tmp_path / name, **more), "--checkpoint"]) == 0
        losses.append([x for *_, x in metrics(tmp_path / name, "loss", "valid_loss")])
    np.testing.assert_allclose(*losses, rtol=1e-4)
    for more, says in ({"head-groups": 3}, "divide"), ({"head-groups": 2, "attn": "duo"}, "heads differ"):
        assert says in refusal(args(world, tmp_path / "no", **more), monkeypatch, capsys)
    assert not (tmp_path / "no").exists()
