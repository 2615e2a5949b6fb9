"""What saves memory in training changes neither losses nor gradients, nor the steps of the optimizer."""

import numpy as np
import pytest
from conftest import apart, loss_and_gradients, text
from test_adapters import fresh, moved, same
from test_train import args, metrics, own_cache, refusal, weights, world  # noqa: F401

import ops
import segments
import train

T = 24


def close(got, want, bound=1e-5):
    (loss, grads), (loss_, grads_) = got, want
    assert abs(loss - loss_) < 1e-6 * abs(loss_) and grads.keys() == grads_.keys()
    for name, g in grads_.items():
        assert apart(grads[name], g) < bound, name


MODELS = {"full": {}, "longformer": {"attn": "longformer:window=7,n_global=2", "pos": "t5:buckets=4"}, "lora": {"adapter": "lora:rank=2"}}


@pytest.mark.parametrize("how", ["checkpoint", "checkpoint_offloaded"])
@pytest.mark.parametrize("kind", MODELS)
def test_blocks_recomputed_together_change_nothing(kind, how):
    """By 1, 2 and 4 of 5 layers: the last ones are fewer."""
    model = moved(fresh(num_hidden_layers=5, **MODELS[kind]))
    tokens, calls, run = text(T, 2), [], getattr(ops, how)
    want = loss_and_gradients(model, tokens)
    for n, times in ((1, 5), (2, 3), (4, 2)):
        model.model.run, model.model.together = lambda *a: calls.append(1) or run(*a), n
        close(loss_and_gradients(model, tokens), want)
        assert len(calls) == times
        calls.clear()


@pytest.mark.parametrize("how", ["checkpoint", "checkpoint_offloaded"])
def test_so_they_do_in_segments(how):
    """Through all boundaries: the gradient of a state passes blocks that are recomputed together."""
    model = fresh(num_hidden_layers=3, attn="window:window=9", memory="window:budget=8")
    batch = train.data.Batch(text(T, 2), text(T, 2, seed=1), np.zeros((2, T), "int32"), [[], []])
    found = []
    for together, run in ((1, ops.call), (2, getattr(ops, how))):
        model.model.together, model.model.run = together, run
        outs, grads = segments.accumulate(model, segments.cut(batch, 8), train.nats, {})
        found.append((sum(out[0].item() for out in outs), {n: ops.numpy(g) for n, g in grads.items()}))
    close(found[1], found[0])


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_an_optimizer_on_the_host_steps_alike(adapter):
    """To the bit; and a state that is saved by one is taken up by the other."""
    found, tokens = {}, text(T)
    for offload in (False, True):
        model = fresh(adapter=adapter)
        ops.freeze(model, [n for n in ops.parameters(model) if not model.trains(n)])
        optimizer = ops.AdamW(model, (0.9, 0.95), 1e-8, 0.1, offload)
        for step in range(4):
            if step == 2:
                saved, optimizer = optimizer.state(), ops.AdamW(model, (0.9, 0.95), 1e-8, 0.1, not offload)
                optimizer.restore(saved)
            _, grads = ops.value_and_grad(model, lambda model=model: ops.cross_entropy(model(ops.array(tokens)), ops.array(tokens)).mean())
            optimizer.step(grads, 0.01)
        found[offload] = {**weights(model), **{n: ops.numpy(x) for n, x in optimizer.state().items()}}
    same(found[True], found[False])


def test_a_run_goes_on_with_other_savers(world, tmp_path, monkeypatch):  # noqa: F811
    """To the bit, as it would have without them: killed in its third step, and resumed with averages and inputs on the host."""
    how, real, done = {"steps": 4, "save-every": 2, "eval-every": 2}, train.train_step, []
    assert train.main(args(world, tmp_path / "whole", **how)) == 0
    monkeypatch.setattr(
        train, "train_step", lambda *a: real(*a) if done.append(1) or len(done) < 3 else (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        train.main(args(world, tmp_path / "run", **how))
    monkeypatch.setattr(train, "train_step", real)
    savers = ["--checkpoint", "2", "--checkpoint-offload", "--optimizer-offload"]
    assert train.main(["--resume", str(tmp_path / "run"), *savers]) == 0
    same(*(ops.read_safetensors(tmp_path / name / "step-000004" / "optimizer.safetensors") for name in ("run", "whole")))
    assert metrics(tmp_path / "run", "loss") == metrics(tmp_path / "whole", "loss")


@pytest.mark.parametrize(
    "flags, why",
    [(["--checkpoint", "-1"], "must be above 0"), (["--no-checkpoint", "--checkpoint-offload"], "give that too")],
)
def test_what_cannot_be(flags, why, world, tmp_path, monkeypatch, capsys):  # noqa: F811
    assert why in refusal([*args(world, tmp_path / "run"), *flags], monkeypatch, capsys)
