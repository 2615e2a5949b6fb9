"""--adapter summary: whose rows the LoRA works on, that training reaches it, what a run leaves, and how a long text is read by it."""

import json

import numpy as np
import pytest
from conftest import apart, run, text, tiny, whole
from test_adapters import base, fresh, moved, same, weights  # noqa: F401
from test_segments import batch, by_hand, in_segments, off
from test_train import args, metrics, own_cache, refusal, world  # noqa: F401

import generate
import ops
import plugins
import segments
import train
from errors import Refused
from model import load, save

T, MEMORY = 32, "summary:k=3,chunks=4"
MODES = ["summary:rank=2", "summary:rank=2,targets=q_proj+down_proj", "summary:rank=2,who=both"]
every = lambda what, specs: pytest.mark.parametrize(what, specs, ids=lambda x: str(x).removeprefix("summary:"))


def trained(adapter, memory=MEMORY, **more):
    """A model after some training, gates open."""
    return moved(fresh(memory=memory + ",closed=false", adapter=adapter, **more), 0.2)


@every("positions", ["none", "near", "absolute"])
@every("adapter", MODES)
def test_step_0_is_each_segment_by_itself(adapter, positions):
    model = tiny(memory=f"{MEMORY},positions={positions}", adapter=adapter)
    alone = np.concatenate([run(tiny(), text(T, 2)[:, i : i + 8]) for i in range(0, T, 8)], 1)
    assert apart(run(model, text(T, 2), whole(T)), alone) < 1e-4
    # or this test is blind
    assert apart(run(trained(adapter, f"{MEMORY},positions={positions}"), text(T, 2), whole(T))[:, 8:], alone[:, 8:]) > 0.1


@every("keep", ["none", "window"])
def test_tokens_are_the_base_s_where_there_is_no_summary(keep):
    """To the bit, whatever the LoRA has learned; behind a summary they are not, and if it works on them they never are."""
    plain = run(tiny(memory="none" if keep == "none" else "full"), text(T, 2), whole(T))
    got = run(trained(MODES[0], f"{MEMORY},keep={keep}"), text(T, 2), whole(T))
    np.testing.assert_array_equal(got[:, :8], plain[:, :8])
    assert apart(got[:, 8:16], plain[:, 8:16]) > 0.1
    assert apart(run(trained(MODES[2], f"{MEMORY},keep={keep}"), text(T, 2), whole(T))[:, :8], plain[:, :8]) > 0.1


def test_vectors_pass_a_lora_as_if_it_were_merged():
    """Written out: the base reads the segment, and the vectors go behind it through a model whose matrices have the product in them."""
    model, n = trained(MODES[0]), 8
    both = fresh(memory=MEMORY + ",closed=false", adapter="summary:rank=2,who=both")
    theirs = {name.replace("around.workers.", "model.layers."): p for name, p in ops.parameters(model).items()}
    ops.set_parameters(both, theirs)
    plain = fresh(memory=MEMORY + ",closed=false")
    ops.set_parameters(plain, {name: p for name, p in ops.parameters(model).items() if "workers" not in name})
    tokens, vectors = ops.array(text(n)), ops.cast(model.around.vectors.weight[None], ops.float32)
    place = lambda a, m: train.llama.Places(ops.array(np.arange(a, a + m, dtype="int32")[None, None]), a)
    with ops.no_grad():
        _, state = model(tokens, model.start())
        _, layers = plain.model(plain.model.embed_tokens(tokens), place(0, n), None, False, plain.start()["layers"])
        h, layers = both.model(vectors, place(n, 3), None, True, layers, vectors=3)
        h = both.model.norm(h)
        assert apart(ops.numpy(state["around"]["h"]), ops.numpy(h)) < 1e-5
        _, layers = both.model(h, place(n + 3, 3), None, False, layers, reading=True)
    for got, want in zip(state["layers"], layers):
        assert apart(*(ops.numpy(s["side"]["v"][:, :, -3:]) for s in (got, want))) < 1e-5


@every("adapter", MODES)
def test_pieces_are_the_segment_and_rows_are_padded(adapter):
    model, tokens = trained(adapter), text(T, 2)
    want = run(model, tokens, whole(T))
    assert apart(run(model, tokens, [[3, 5], [1] * 8, [7, 1], [8]]), want) < 1e-4
    tokens[1, 5:8] = tokens[1, 20:] = -1
    alone = tokens[1:, tokens[1] >= 0]
    assert apart(run(model, tokens, whole(T))[1:, tokens[1] >= 0], run(model, alone, [[5], [8], [4]])) < 1e-4
    begin = np.where(np.arange(T) < 13, 0, 13)[None].astype("int32")
    got = run(model, text(T), whole(T), begin=begin)[:, 13:]
    assert apart(got[:, :3], run(model, text(T)[:, 13:16])) < 1e-4


@every("positions", ["none", "near", "absolute"])
@every("adapter", MODES)
def test_the_gradient_is_that_of_one_graph_over_all_segments(adapter, positions):
    """Of every parameter, the vectors and the LoRA included; recomputed too."""
    model = fresh(memory=f"summary:k=2,chunks=3,closed=false,positions={positions}", adapter=adapter)
    model = moved(model, 0.1)
    model.model.patterns(training=True)
    for packed in (False, True):
        b = batch(packed)
        want = by_hand(model, b, 7, lambda i: False)
        for model.model.run in (ops.call, ops.checkpoint):
            got = in_segments(model, b, 7)
            assert abs(got[0] / want[0] - 1) < 1e-6 and off(got[1], want[1]) < 2e-4
        reached = [n for n, g in want[1].items() if "lora_" in n or n == "around.vectors.weight"]
        assert len(reached) > 8 and all(np.abs(want[1][n]).max() > 1e-6 for n in reached)
        # control: cut at every boundary it is another
        assert off(in_segments(model, b, 7, 0)[1], want[1]) > 0.05


def test_tiles_and_what_is_computed_again_leave_tokens_alone():
    """An MLP in tiles is made once more in the backward pass, when the vectors have passed long since."""
    model, b = trained(MODES[0]), batch()
    want = in_segments(model, b, 7)
    for block in model.model.layers:
        block.tile = 2
    for model.model.run in (ops.call, ops.checkpoint):
        got = in_segments(model, b, 7)
        # these weights are ill-conditioned: float32 alone moves the gradient by 5e-4 (in float64 it is 4e-15)
        assert abs(got[0] / want[0] - 1) < 1e-6 and off(got[1], want[1]) < 2e-3


def test_without_positions_a_summary_is_as_near_from_anywhere():
    far = {}
    for positions in ("none", "near", "absolute"):
        model = trained(MODES[0], f"{MEMORY},positions={positions}")
        with ops.no_grad():
            _, state = model(ops.array(text(8)), model.start())
            here, there = (ops.numpy(model(ops.array(text(8, seed=1)), {**state, "next": state["next"] + n})[0]) for n in (0, 5000))
        far[positions] = apart(there, here)
    assert far["none"] < 1e-3 and far["absolute"] > 1e-2 and far["near"] > 1e-2


def test_the_state_holds_k_vectors_a_chunk():
    """Near: what a far chunk is away grows by k a chunk. All: the state is that of `chunks` times k."""
    model = trained(MODES[0], "summary:k=3,chunks=5")
    with ops.no_grad():
        state = model.start()
        for i in range(7):
            _, state = model(ops.array(text(8, seed=i)), state)
            held = (ops.numpy(state["layers"][0]["side"]["pos"]) >= 0).sum()
            assert held == 3 * min(i + 1, 5)
            assert state["layers"][0]["n"] == 0


def test_vectors_begin_as_the_end_of_a_text():
    model = fresh(memory="summary:k=3", hf={"eos_token_id": [7, 2]})
    w, words = weights(model)["around.vectors.weight"], weights(model)["model.embed_tokens.weight"]
    assert np.abs(w - words[7]).max() < words.std() and np.abs(w - words[6]).max() > words.std()
    assert np.abs(w[0] - w[1]).max() > 0.01
    assert 0.5 < weights(fresh(memory="summary:k=30"))["around.vectors.weight"].std() / words.std() < 2


def test_dropout_is_one_pattern_for_one_part():
    model, b = trained("summary:rank=2,dropout=0.5"), batch()
    losses = []
    for seed in (1, 1, 2, None):
        model.shake(seed)
        losses.append(segments.total(model, segments.cut(b, 7), train.nats))
    assert losses[0] == losses[1] and abs(losses[0] - losses[2]) > 1e-3 and abs(losses[0] - losses[3]) > 1e-3


# ---------------------------------------------------------------- checkpoints


@every("adapter", MODES)
def test_saved_and_loaded_and_honest_to_others(adapter, base, tmp_path):  # noqa: F811
    model, _ = load(base(), memory=MEMORY + ",closed=false", adapter=adapter, dtype="float32")
    save(moved(model), tmp_path / "adapted", tmp_path / "base")
    again, _ = load(tmp_path / "adapted", memory=MEMORY + ",closed=false,chunk=9", dtype="float32")
    same(weights(again), weights(model))
    np.testing.assert_array_equal(run(again, text(T), whole(T)), run(model, text(T), whole(T)))
    assert again.segment == 9
    said = json.loads((tmp_path / "adapted" / "adapter_config.json").read_text())
    # what works on vectors alone is no LoRA to PEFT
    both = "both" in adapter
    assert said["peft_type"] == ("LORA" if both else None) and (tmp_path / "adapted" / "adapter_model.safetensors").exists() == both
    own = ops.read_safetensors(tmp_path / "adapted" / "nanolong.safetensors")
    assert any("lora_A" in n for n in own) != both and "around.vectors.weight" in own


def session(model, chunk):
    return generate.Session(model, chunk, 4, graph=False)


@every("adapter", MODES)
def test_a_text_is_read_chunk_by_chunk(adapter):
    """As training reads it; and what is remembered does not grow with the tokens, only with the chunks, until they are full."""
    model, tokens = trained(adapter, "summary:k=3,chunks=3"), text(40)[0]
    reads = session(model, 8)
    got = ops.numpy(reads.read(tokens, room=4))
    assert apart(got, run(model, tokens[None], whole(40))[0, -1]) < 1e-4
    first = reads.nbytes()
    for i in range(3):
        reads.read(text(40, seed=i)[0], room=4)
    assert reads.nbytes() == first
    step = ops.numpy(reads.step(3))
    assert np.isfinite(step).all()


# ---------------------------------------------------------------- train.py


def test_it_takes_its_own_memory_and_segments(world, tmp_path):  # noqa: F811
    settled = lambda **flags: train.settle(train.parse(args(world, tmp_path / "run", **flags)))
    for flags, memory, segment in (
        ({}, "summary:chunk=12", 12),
        ({"segment": 16}, "summary:chunk=16", 16),
        ({"segment": 2048, "length": 8192}, "summary", 2048),
        ({"length": 16384}, "summary", 2048),
        ({"memory": "summary:k=4,chunk=24"}, "summary:k=4,chunk=24", 24),
    ):
        a = settled(adapter="summary", **flags)
        assert (a.memory, a.segment) == (memory, segment)


@every("adapter", ["summary:rank=2", "summary:rank=2,who=both"])
def test_a_run_as_typed_and_what_reads_it(adapter, world, tmp_path, monkeypatch, capsys):  # noqa: F811
    out = tmp_path / "run"
    flags = {"adapter": adapter, "memory": "summary:k=3,chunks=4,chunk=16", "steps": 6, "dtype": "float32"}
    assert train.main(args(world, out, **flags)) == 0
    valid = [v for *_, v in metrics(out, "valid_loss")]
    assert valid[-1] < valid[0]
    folder = out / "step-000006"
    said = json.loads((folder / "config.json").read_text())["nanolong"]
    assert said["adapter"] == adapter and said["memory"] == flags["memory"] and said["segment"] == 16
    assert load(folder)[0].segment == 16
    # on from there, in its own segments, without a flag
    assert train.main(args(world, tmp_path / "more", model=folder, steps=1, warmup=0)) == 0
    (tmp_path / "book.txt").write_text("the long memory remembers every token . " * 20)
    line = ["generate.py", "--model", str(folder), "--memory", "summary:chunk=16,k=3", "--prompt-file", str(tmp_path / "book.txt")]
    monkeypatch.setattr("sys.argv", [*line, "--prompt", "Who ?", "--tokens", "3", "--device", "cpu"])
    generate.run()
    assert "[read 8" in capsys.readouterr().err


def test_a_resumed_run_equals_one_that_never_stopped(world, tmp_path, monkeypatch):  # noqa: F811
    real, steps = train.train_step, []
    flags = {"steps": 4, "save-every": 2, "adapter": "summary:rank=2,dropout=0.1", "dtype": "float32"}
    flags["memory"] = "summary:k=3,chunks=4,chunk=16"
    assert train.main(args(world, tmp_path / "whole", **flags)) == 0
    monkeypatch.setattr(train, "train_step", lambda *a: steps.append(1) or (real(*a) if len(steps) < 4 else 1 / 0))
    with pytest.raises(ZeroDivisionError):
        train.main(args(world, tmp_path / "run", **flags))
    monkeypatch.setattr(train, "train_step", real)
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert metrics(tmp_path / "run", "loss", "valid_loss") == metrics(tmp_path / "whole", "loss", "valid_loss")


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"adapter": "summary:who=all"}, "who=all is not known: choose vectors or both"),
        ({"adapter": "summary:rank=0"}, "rank=0 trains nothing"),
        ({"adapter": "summary:dora=true"}, "take who=both"),
        ({"adapter": "summary"}, "--memory full has no summaries to train: take summary"),
        ({"adapter": "summary", "memory": "tokens"}, "--memory tokens has no summaries"),
        ({"adapter": "summary", "memory": "summary:keep=xl"}, "keep=xl projects"),
        ({"memory": "summary:positions=here"}, "positions=here is not known: choose one of none, near, absolute"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(changes, says):
    with pytest.raises(Refused, match=says) as no:
        fresh(**changes)
    assert "\n" not in str(no.value)


def test_flags_that_do_not_fit_are_refused(world, tmp_path, monkeypatch, capsys):  # noqa: F811
    say = lambda **flags: refusal(args(world, tmp_path / "run", adapter="summary", **flags), monkeypatch, capsys)
    assert "no summaries to train" in say(memory="infini", segment=16)
    assert "say chunk=16 there" in say(memory="summary:k=4,chunk=12", segment=16)
    assert "below --length" in say(memory="summary")
    assert not (tmp_path / "run").exists()
    # a pattern of it, each layer the same
    assert plugins.parse("adapters", "summary").module.flags("summary:chunk=9/summary:chunk=9", None, 99)[1] == 9
