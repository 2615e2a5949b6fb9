"""Segments that are replayed (kernels/replayed.py) against segments as they come: the same losses and gradients, step after step."""

import numpy as np
import pytest
from conftest import apart, text
from test_adapters import fresh, moved

import data
import ops
import plugins
import train

if ops.BACKEND != "torch":
    pytest.skip("replays are torch's", allow_module_level=True)

from kernels import frozen
from kernels.replayed import Replay, Replays
from kernels.spans import moves

T, N = 80, 8  # tokens of a row, of a segment
LONG = "longformer:window=9,n_global=2"
KEPT = "sinks:budget=10,sinks=2,kv_positions=absolute"
ALIKE = {
    "window": {"attn": "window:window=5", "memory": "window:budget=4"},
    "longformer": {"attn": LONG, "memory": KEPT},
    "layers": {"attn": f"{LONG}/window:window=5", "memory": f"{KEPT}/window:budget=9"},
    "local": {"attn": "local:block=4", "memory": "window:budget=3"},
    "alibi": {"pos": "alibi", "attn": "window:window=7", "memory": "window:budget=6"},
    "t5": {"pos": "t5", "attn": "window:window=7", "memory": "window:budget=6"},
    "renumbered": {"attn": LONG, "memory": "sinks:budget=10,sinks=2"},
    "lora": {"attn": LONG, "memory": KEPT, "adapter": "lora:rank=4"},
    "long segments": {"attn": "window:window=4", "memory": "window:budget=3"},
    "none": {"memory": "none"},
    "xl": {"memory": "xl:length=8"},
    "compressive": {"memory": "compressive:length=8,compressed=4,rate=2,closed=false"},
    "tokens": {"memory": "tokens:size=2,keep=window,budget=8,closed=false"},
    "summary": {"memory": "summary:k=2,chunk=8,chunks=4,closed=false"},
    "state": {"memory": "state:size=2,closed=false"},
    "melodi": {"memory": "melodi:short=2,long=2,windows=3,closed=false"},
    "infini": {"memory": "infini:gate=sigmoid"},
}
# where the host's numbers would be another segment's, or nothing comes again
OTHERS = {
    "full": {},
    "dynamic": {"pos": "dynamic", "attn": "window:window=5", "memory": "window:budget=4"},
    "local": {"attn": "local:block=5", "memory": "window:budget=4"},
    "random": {"attn": "bigbird:block=4,window=1,n_random=1", "memory": "window:budget=8"},
    "dropout": {"attn": "window:window=5", "memory": "window:budget=4", "adapter": "lora:dropout=0.5"},
    "h2o": {"memory": "h2o:budget=8"},
}


def ready(adapter="full", **how):
    model = moved(fresh(adapter=adapter, **how))
    ops.freeze(model, [n for n in ops.parameters(model) if not model.trains(n)])
    model.model.patterns(training=True)
    return model


class Plain:
    """An optimizer that goes along the gradient, and notes it."""

    def __init__(self, model):
        self.model = model

    def step(self, grads, lr):
        self.seen = {n: ops.numpy(g).copy() for n, g in grads.items()}
        with ops.no_grad():
            for n, g in grads.items():
                ops.parameters(self.model)[n].sub_(lr * g)


def steps(model, bptt="all", begin=None, offload=False, n=3, T=T):
    """(loss, gradients) of n steps, each of another batch of two rows and another number of targets."""
    optimizer, found = Plain(model), []
    for seed in range(n):
        tokens = text(T + 1, 2, seed=seed)
        targets = tokens[:, 1:].copy()
        targets[:, : 7 * seed] = -1
        b = data.Batch(tokens[:, :-1], targets, np.zeros((2, T), "int32") if begin is None else begin, [[], []])
        loss, *_ = train.train_step(model, optimizer, b, 2, 1e9, 0.05, N, bptt, offload)
        found.append((loss, optimizer.seen))
    return found


def same(got, want):
    for (loss, grads), (loss_, grads_) in zip(got, want, strict=True):
        assert abs(loss - loss_) < 1e-5 * abs(loss_) and grads.keys() == grads_.keys()
        assert max(apart(grads[n], grads_[n]) for n in grads_) < 1e-4
        assert sum(float(abs(g).sum()) > 0 for g in grads_.values()) > len(grads_) / 2


def replaying(model, most=2 * N, settle=lambda: None, **how):
    """(what steps() gives, how many times a segment was replayed)."""
    model.replays, count = Replays(model, most, settle), []
    replay = Replay.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Replay, "__call__", lambda *given: count.append(1) or replay(*given))
        return steps(model, **how), len(count)


@pytest.mark.parametrize("way", ALIKE)
def test_the_step_is_the_same(way):
    got, replayed = replaying(ready(**ALIKE[way]))
    same(got, steps(ready(**ALIKE[way])))
    # once or twice each segment of the last step, and some before
    assert replayed > T // N


@pytest.mark.parametrize("way", OTHERS)
def test_what_would_differ_is_not_replayed(way):
    got, replayed = replaying(ready(**OTHERS[way]))
    same(got, steps(ready(**OTHERS[way])))
    assert replayed == 0


def test_a_memory_made_from_another_says_so_itself():
    model = ready(**ALIKE["window"])
    for memory in model.memories():
        memory.__class__ = type("Memory", (type(memory),), {})
    assert replaying(model)[1] == 0


@pytest.mark.parametrize("bptt", [0, 2])
def test_cuts(bptt):
    model, plain = ready(**ALIKE["longformer"]), ready(**ALIKE["longformer"])
    model.replays = Replays(model, 2 * N)
    same(steps(model, bptt), steps(plain, bptt))


def test_boundaries_that_wait():
    model, plain = ready(**ALIKE["longformer"]), ready(**ALIKE["longformer"])
    model.replays = Replays(model, 2 * N)
    same(steps(model, offload=True), steps(plain))


@pytest.mark.parametrize("size, replayed", [(5, False), (60, True)])
def test_documents_are_replayed_where_they_are_rows_by_themselves(size, replayed):
    """Those below a segment stay in their row, and a `begin` is no number that a replay can move."""
    begin = np.tile((np.arange(T) // size * size).astype("int32"), (2, 1))
    model, plain = ready(**ALIKE["longformer"]), ready(**ALIKE["longformer"])
    model.replays = Replays(model, 2 * N)
    same(steps(model, begin=begin), steps(plain, begin=begin))
    assert bool(model.replays.made) == replayed


def test_another_model_is_noticed():
    model = ready(**ALIKE["longformer"])
    model.replays = Replays(model, 2 * N)
    steps(model)
    made = dict(model.replays.made)
    model.replays.begin()
    assert model.replays.made == made and any(made.values())
    ops.set_parameters(model, {n: ops.copy(p) for n, p in ops.parameters(model).items()})
    model.replays.begin()
    assert not model.replays.made
    steps(model)
    # as a curriculum's next stage has it
    model.feel("yarn:factor=2")
    model.replays.begin()
    assert not model.replays.made


def test_long_segments_are_not_replayed():
    model = ready(**ALIKE["longformer"])
    assert replaying(model, most=2 * N - 1)[1] == 0


@pytest.mark.skipif(not frozen.TRITON, reason="needs Triton, and CUDA or TRITON_INTERPRET=1")
@pytest.mark.parametrize("bits", [16, 8])
def test_beside_frozen_matrices(bits):
    how = {**ALIKE["window"], "base_bits": bits, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    model, plain = (ready("lora:rank=4", **how) for _ in range(2))
    # Triton's interpreter is slow
    few = {"n": 3 if bits == 16 else 1, "T": 5 * N}
    got, replayed = replaying(model, settle=frozen.use(model), **few)
    frozen.use(plain)
    same(got, steps(plain, **few))
    assert replayed > 1


def test_a_position_that_the_host_keeps_to_itself_would_show():
    """The control: as if positions were the recording's."""
    model, plain = ready(**ALIKE["longformer"]), ready(**ALIKE["longformer"])
    model.replays = Replays(model, 2 * N)
    number = model.number
    model.number = lambda tokens, start, padded: number(tokens, int(start) + 0, padded)
    with pytest.raises(AssertionError):
        same(steps(model), steps(plain))


@pytest.mark.parametrize(
    "spec, q, k, by, yes",
    [
        ("window:window=5", (40, 8), (30, 18), 8, True),
        ("longformer:window=5,n_global=2", (40, 8), (30, 18), 8, True),
        ("longformer:window=5,n_global=32", (40, 8), (30, 18), 8, False),
        ("longformer:window=5,n_global=30", (40, 8), (30, 18), 8, True),
        ("local:block=4", (40, 8), (30, 18), 8, True),
        ("local:block=16", (40, 8), (30, 18), 8, False),
        ("dilated:window=4,dilation=3", (40, 8), (30, 18), 8, True),
        ("strided:window=4,stride=5", (40, 8), (30, 18), 8, True),
        ("s2:group=8", (40, 8), (30, 18), 8, True),
        ("s2:group=6", (40, 8), (30, 18), 8, False),
        ("bigbird:block=4,window=2,n_global=1,n_random=0", (40, 8), (30, 18), 8, True),
        ("bigbird:block=4,n_random=1", (40, 8), (30, 18), 8, False),
        ("full", (40, 8), (30, 18), 8, True),
    ],
)
def test_rules_know_what_moves(spec, q, k, by, yes):
    rule = plugins.place(plugins.parse("attention", spec), layer=0, n_layer=1, n_head=4, n_kv_head=2)
    assert [moves(rule, h, q, k, by) for h in range(4)] == [yes] * 4
    see = lambda m: [[bool(rule.module.allowed(i + m, j + m, 1, rule.options)) for j in range(k[0], sum(k))] for i in range(q[0], sum(q))]
    assert all(see(by * m) == see(0) for m in range(6)) or not yes
