"""plan.py against what a step really takes: torch's arrays counted as they come and go, MLX's by MLX; and what follows from the plan."""

import itertools
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from test_train import args, own_cache, world  # noqa: F401

import ops
import plan
import train
from model import Config, Llama

train.use_backend(None)
SHAPE = {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE |= {"num_hidden_layers": 4, "tie_word_embeddings": True}
DEFAULT = {"micro": 1, "batch": 1, "length": 1024, "segment": None, "bptt": "all", "dtype": "float32", "checkpoint": 0, "offload": False}
DEFAULT |= {
    "embedding_offload": False,
    "checkpoint_offload": False,
    "optimizer_offload": False,
    "loss_chunk": 256,
    "mlp_tile": None,
    "head_groups": 1,
}
SEGMENTS = {"attn": "window:window=65", "memory": "window:budget=64", "segment": 256}
WAYS = {
    "full": {},
    "one chunk": {"loss_chunk": 2048},
    "checkpoint": {"checkpoint": 1},
    "checkpoint 2": {"checkpoint": 2},
    "mlp tiles": {"checkpoint": 1, "mlp_tile": 128},
    "groups": {"checkpoint": 1, "mlp_tile": 128, "head_groups": 2},
    "lora, groups": {"adapter": "lora", "checkpoint": 1, "mlp_tile": 128, "head_groups": 2},
    "two parts": {"checkpoint": 1, "batch": 2},
    "lora": {"adapter": "lora"},
    "lora, checkpoint": {"adapter": "lora", "checkpoint": 1},
    "some lora": {"adapter": "lora:targets=q_proj+v_proj"},
    "segments": SEGMENTS,
    "lora, segments": {"adapter": "lora", **SEGMENTS},
}


def made(way):
    """(arguments, a model ready to train) of a way."""
    mine = {k: v for k, v in way.items() if k in ("attn", "memory", "adapter")}
    a = SimpleNamespace(**{**DEFAULT, **{k: v for k, v in way.items() if k not in mine}})
    return a, train.prepare(Llama(Config(**SHAPE, **mine)).init(0), a)


def peak(model, a):
    """Bytes at the peak of a second step."""
    optimizer, tokens = ops.AdamW(model, (0.9, 0.95), 1e-8, 0.1), np.zeros((a.batch, a.length), "int32")
    batch = train.data.Batch(tokens, tokens, tokens, [[]] * a.batch)
    step = lambda: train.train_step(model, optimizer, batch, a.micro, 1.0, 1e-3, a.segment, a.bptt, a.offload)
    step()
    if ops.BACKEND == "mlx":
        mine = sum(map(ops.nbytes, (*ops.parameters(model).values(), *optimizer.state().values())))
        # models of other tests are there too
        others = ops.reset_peak() - mine
        step()
        return ops.peak_memory() - others
    with counting()() as count:
        for x in (*ops.parameters(model).values(), *optimizer.state().values()):
            count.see(x)
        step()
    return count.peak


def counting():
    """A mode of torch's in which the bytes of all arrays are counted as they come and go."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter

    class Count(TorchDispatchMode):
        now, peak = 0, 0

        def __init__(self):
            super().__init__()
            self.sizes = {}

        def see(self, x):
            storage = x.untyped_storage()
            key = storage._cdata
            if key not in self.sizes:
                self.sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone, key)

        def gone(self, key):
            self.now -= self.sizes.pop(key)

        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            for x in tree_iter(out):
                if isinstance(x, torch.Tensor):
                    self.see(x)
            self.peak = max(self.peak, self.now)
            return out

    return Count


@pytest.mark.parametrize("way", WAYS)
def test_it_is_what_a_step_takes(way):
    """Within a tenth on torch; MLX decides itself in which order it computes and how far ahead, and takes up to CLOSE times as much."""
    a, model = made(WAYS[way])
    ratio = plan.plan(train.sizes_of(model), a, train.runs_how(a)).peak / peak(model, a)
    assert 0.9 < ratio < 1.1 if ops.BACKEND == "torch" else 1 / CLOSE < ratio < CLOSE, ratio


CLOSE = 1.3


@pytest.mark.parametrize("adapter", ["full", "lora", "lora:targets=q_proj+v_proj", "lora:dora=true", "longlora"])
def test_every_way_has_a_plan(adapter):
    """On any device: whole numbers of bytes, and of weights and gradients at least as many as there are."""
    devices = [plan.How(2, gpu, mlx, fused) for gpu, mlx, fused in ((True, False, True), (True, False, False), (True, True, False))]
    for bits, segment in itertools.product((16, 4) if adapter.startswith("lora") else (16,), (None, 256, 8192)):
        mine = {"attn": "window:window=65", "memory": "window:budget=64"} if segment else {}
        with ops.shapes_only():
            m = train.sizes_of(Llama(Config(**SHAPE, adapter=adapter, base_bits=bits, **mine)))
        least = 4 * m.size("", trained=True)
        for checkpoint, tile, groups, bptt, away, two in itertools.product((0, 3), (None, 128), (1, 2), ("all", 0), (False, True), (1, 2)):
            a = {"length": 16384, "segment": segment, "checkpoint": checkpoint, "mlp_tile": tile, "head_groups": groups, "bptt": bptt}
            a |= {"micro": two, "batch": 2, "loss_chunk": 64 if two == 1 else 1 << 20, "offload": away, "optimizer_offload": away}
            a = SimpleNamespace(**DEFAULT | a | {"checkpoint_offload": away and checkpoint > 0})
            for how in (*devices, plan.How(4)):
                p = plan.plan(m, a, how)
                assert all(type(n) is int and n >= 0 for of in (*p.moments.values(), p.host) for n in of.values()), (a, how)
                assert p.moments["optimizer"]["weights"] >= least == p.moments["optimizer"]["gradients"] and p.table() and p.line()


@pytest.mark.parametrize("adapter, tied", [("lora", False), ("lora", True), ("longlora", False)])
def test_a_frozen_embedding_may_be_the_hosts(adapter, tied):
    """All of it, where nothing else needs it."""
    with ops.shapes_only():
        m = train.sizes_of(Llama(Config(**SHAPE | {"tie_word_embeddings": tied}, adapter=adapter)))
    here, away = (
        plan.plan(m, SimpleNamespace(**DEFAULT | {"embedding_offload": x}), plan.How(2, gpu=True, fused=True)) for x in (False, True)
    )
    less = 0 if tied or adapter == "longlora" else 2 * 1024 * 128
    assert here.peak - away.peak == less == away.host.get("embedding", 0) and "embedding" not in here.host


def test_it_is_printed_and_nothing_is_loaded(world, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(train, "build", None)
    assert train.main([*args(world, tmp_path / "run"), "--memory-plan"]) == 0
    said = capsys.readouterr().out
    assert all(part in said for part in ("weights", "optimizer", "last block", "GiB at the peak")) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "share, more, would",
    [
        (0.95, {"length": 2048}, "--checkpoint would fit"),
        (0.45, {"length": 2048, "micro": 4}, "--micro 1"),
        (0.001, {"length": 2048}, "no flag"),
    ],
)
def test_what_is_too_large_is_refused_with_what_would_fit(share, more, would, world, tmp_path, monkeypatch, capsys):  # noqa: F811
    """And what it names does fit: the same command with these flags is not refused."""
    given = [*args(world, tmp_path / "run", **more), "--no-checkpoint", "--loss-chunk", "256", "--memory-plan"]
    a = train.settle(train.parse(given))
    needs = train.look(train.config_of(a, world / "model"))(a).peak
    monkeypatch.setattr(ops, "free_memory", lambda: int(share * needs))
    monkeypatch.setattr("sys.argv", ["train.py", *given])
    with pytest.raises(train.Refused) as no:
        train.main(given)
    assert would in str(no.value), no.value
    if would != "no flag":
        flags = str(no.value).split("free: ")[1].removesuffix(" would fit").split()
        assert train.main([*given, *flags]) == 0


def test_a_run_that_goes_on_is_told_what_it_may_change(world, tmp_path, monkeypatch):  # noqa: F811
    """Fewer rows at a time would fit, but --resume refuses them; so would recomputing, which it allows."""
    out = tmp_path / "run"
    train.main(
        [*args(world, out, length=512, micro=4, steps=2), "--save-every", "1", "--keep", "2", "--no-checkpoint", "--loss-chunk", "64"]
    )
    train.rundir.shutil.rmtree(out / "step-000002")
    a = train.settle_again({"resume": str(out)}, train.rundir.find(out))
    plans, config = train.look(train.config_of(a, world / "model")), train.config_of(a, world / "model")
    needs = lambda **more: plans(SimpleNamespace(**{**vars(a), **more})).peak
    few = {"micro": 1, "stages": [stage._replace(micro=1) for stage in a.stages]}
    least = needs(checkpoint=1, mlp_tile=512, head_groups=train.groupable(config))
    for room in (needs(checkpoint=1), needs(**few)):
        monkeypatch.setattr(ops, "free_memory", lambda room=room: room)
        with pytest.raises(train.Refused) as no:
            train.main(["--resume", str(out), "--memory-plan"])
        flags = str(no.value).split("free: ")[1]
        assert "--micro" not in flags
        if room >= least:
            assert train.main(["--resume", str(out), *flags.removesuffix(" would fit").split(), "--memory-plan"]) == 0
        else:
            assert "resumed run" in flags


def test_it_chooses_the_segment(world, tmp_path, monkeypatch, capsys):  # noqa: F811
    """The longest that fits; and where not even the shortest does, that one with its blocks recomputed."""
    how = {"length": "8k", "batch": 1, "micro": 1, "attn": "window:window=65", "memory": "window:budget=64", "segment": "auto"}
    given = [*args(world, tmp_path / "run", **how), "--memory-plan"]
    needs = {}
    for n in (1024, 2048, 4096):
        a = train.settle(train.parse([*args(world, tmp_path / "run", **{**how, "segment": n}), "--memory-plan"]))
        needs[n] = train.look(train.config_of(a, world / "model"))(a).peak
    for room, said in ((needs[4096], "4096 tokens"), (needs[4096] - 1, "2048 tokens"), (needs[1024] - 1, "recomputed too")):
        monkeypatch.setattr(ops, "free_memory", lambda room=room: room)
        assert train.main(given) == 0
        assert said in capsys.readouterr().out
