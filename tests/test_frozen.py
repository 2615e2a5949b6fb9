"""Training beside frozen matrices (kernels/frozen.py) against the model as model.py has it: loss, state and every gradient."""

import numpy as np
import pytest
from conftest import apart, text
from test_adapters import fresh, moved, trained

import data
import kernels
import ops
from errors import Refused

if not kernels.TRITON:
    pytest.skip("needs Triton, and CUDA or TRITON_INTERPRET=1", allow_module_level=True)

from kernels import coded, frozen, frozen_triton
from kernels.codes import numbers

T = 40
WAYS = {
    "whole": {},
    "longformer": {"attn": "longformer:window=9,n_global=2", "memory": "sinks:budget=10,sinks=2,kv_positions=absolute", "segment": 10},
    "xl": {"memory": "xl:length=8", "segment": 10},
    "tokens": {"memory": "tokens:size=2,keep=window,budget=8", "segment": 10},
    "alibi": {"pos": "alibi", "attn": "window:window=7", "memory": "window:budget=6", "segment": 7},
}


def ready(adapter, segment=None, seed=1, **how):
    """A model that is ready to train: the adapter's parameters somewhere, the rest frozen."""
    model = moved(fresh(adapter=adapter, **how))
    ops.freeze(model, [n for n in ops.parameters(model) if not model.trains(n)])
    return model


def step(model, segment=None, begin=None):
    """(loss, gradients) of a batch of two rows, the second one of two documents if so asked."""
    begin = np.zeros((2, T), "int32") if begin is None else begin
    return trained(model, data.Batch(text(T, 2), text(T, 2, seed=1), begin, [[], []]), segment)


def same(got, want, close=5e-5):
    (loss, grads), (loss_, grads_) = got, want
    assert abs(loss - loss_) < 1e-4 * abs(loss_) and grads.keys() == grads_.keys()
    for name, g in grads_.items():
        assert apart(ops.numpy(grads[name]), ops.numpy(g)) < close, name
    assert sum(float(abs(g).sum()) > 0 for g in grads_.values()) > len(grads_) / 2


SOME = "lora:rank=3,targets=q_proj+v_proj+down_proj,rslora=true"


@pytest.mark.parametrize("way, adapter", [*((way, "lora:rank=4") for way in WAYS), ("whole", SOME), ("longformer", SOME)])
def test_it_is_the_same_model(way, adapter):
    segment = WAYS[way].get("segment")
    plain, fused = ready(adapter, **WAYS[way]), ready(adapter, **WAYS[way])
    frozen.use(fused)
    assert all("forward" in vars(block) for block in fused.model.layers)
    same(step(fused, segment), step(plain, segment))


def test_documents_checkpoints_and_chunks():
    begin = np.zeros((2, T), "int32")
    begin[1, 17:] = 17
    plain, fused = ready("lora"), ready("lora")
    frozen.use(fused)
    fused.model.run, fused.chunk = ops.checkpoint, 11
    same(step(fused, begin=begin), step(plain, begin=begin))


def test_a_step_is_seen_by_the_next_one():
    plain, fused = ready("lora"), ready("lora")
    frozen.use(fused)
    for model in (plain, fused):
        ops.AdamW(model, (0.9, 0.95), 1e-8, 0.0).step(step(model)[1], 0.1)
    same(step(fused), step(plain), 2e-4)


def test_groups_of_heads_are_the_plain_path():
    plain, fused = ready("lora"), ready("lora")
    frozen.use(fused)
    fused.group_heads(2)
    same(step(fused), step(plain))


def test_dropout_is_the_plain_path():
    plain, fused = ready("lora:dropout=0.5"), ready("lora:dropout=0.5")
    frozen.use(fused)
    before = step(fused)
    for model in (plain, fused):
        model.shake(5)
    same(step(fused), step(plain))
    assert abs(before[0] - step(fused)[0]) > 1e-3


@pytest.mark.parametrize("adapter, blocks", [("longlora", False), ("lora:dora=true", False), ("full", False), ("prefix", True)])
def test_what_it_does_not_do_stays(adapter, blocks):
    model = ready(adapter)
    frozen.use(model)
    assert [("forward" in vars(block)) for block in model.model.layers] == [blocks] * 2
    same(step(model), step(ready(adapter)))


def test_the_weights_are_where_they_were():
    plain, fused = ready("lora"), ready("lora")
    frozen.use(fused)
    before, after = ops.parameters(plain), ops.parameters(fused)
    assert before.keys() == after.keys() and all(apart(ops.numpy(after[n]), ops.numpy(x)) == 0 for n, x in before.items())
    attn = fused.model.layers[0].self_attn
    assert attn.q_proj.weight.untyped_storage().data_ptr() == attn.k_proj.weight.untyped_storage().data_ptr(), "one matrix in memory"


@pytest.mark.parametrize(
    "bits, way, adapter",
    [(4, "whole", "lora:rank=4"), (8, "whole", "lora:rank=3,targets=q_proj+v_proj+down_proj"), (4, "whole", "prefix")],
    ids=["all", "some", "none"],
)
def test_matrices_that_are_held_as_codes(bits, way, adapter):
    how = {"intermediate_size": 64, "base_bits": bits, **WAYS[way]}
    segment = how.get("segment")
    plain, fused = ready(adapter, **how), ready(adapter, **how)
    frozen.use(fused)
    assert all("forward" in vars(block) for block in fused.model.layers)
    fused.model.run = ops.checkpoint
    same(step(fused, segment), step(plain, segment))
    if adapter != "prefix":
        # what a step changes is seen by the next one
        grads = {n: ops.array(np.sign(ops.numpy(p))) for n, p in ops.parameters(plain).items() if plain.trains(n)}
        for model in (plain, fused):
            ops.AdamW(model, (0.9, 0.95), 1e-8, 0.0).step(dict(grads), 0.01)
        same(step(fused, segment), step(plain, segment))


@pytest.mark.parametrize("bits, n_in, beside", [(4, 128, 0), (8, 128, 64), (4, 96, 64), (4, 8256, 64)])
def test_codes_become_numbers(bits, n_in, beside):
    draw = np.random.default_rng(0)
    w, b = (ops.array(draw.normal(size=(5, n)).astype("float32")) for n in (n_in, 3))
    held, out = coded.Coded(w, bits, ops.float16), ops.full((5, n_in + beside), 7.0, ops.float32)
    frozen_triton.dequantise(held, out, *((b, 2.0, 4) if beside else ()))
    want = numbers(held.code, held.scale, held.low, bits, ops.float32)
    assert apart(ops.numpy(out[:, :n_in]), ops.numpy(want)) < 1e-6
    if beside:
        room = np.zeros((5, beside), "float32")
        room[:, 4:7] = 2 * ops.numpy(b)
        np.testing.assert_array_equal(ops.numpy(out[:, n_in:]), room)


def test_an_embedding_may_wait_in_the_hosts_memory(monkeypatch):
    plain, away = ready("lora", tie_word_embeddings=False), ready("lora", tie_word_embeddings=False)
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    read, rows = [], frozen_triton.rows
    monkeypatch.setattr(frozen_triton, "rows", lambda w, i: read.append(i.shape) or rows(w, i))
    frozen.send_away(away)
    embedding = away.model.embed_tokens.weight
    assert not embedding.is_cuda and ops.parameters(away)["model.embed_tokens.weight"] is embedding and not embedding.requires_grad
    same(step(away), step(plain))
    assert read
    for adapter, tied, why in (("longlora", False, "it trains"), ("lora", True, "the head is the same matrix")):
        with pytest.raises(Refused, match=f"--embedding-offload is not possible, since {why}"):
            frozen.send_away(ready(adapter, tie_word_embeddings=tied))
