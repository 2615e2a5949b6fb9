"""Recurrent Memory Transformer and AutoCompressor: against the papers' concatenations, written out over the plain model."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import apart, influence, run, text, tiny, whole
from test_adapters import fresh

import data
import ops
import plugins
import segments
import train
from errors import Refused
from kernels import Places
from model import Config, Llama, load, save

SPEC = "tokens:size=3,closed=false"


def by_the_paper(model, plain, tokens, n, pile=None, near=False):
    """[H_read ; X ; H_write] through the layers of a model without memory, H being what the last layer made of H_write before. pile: what
    was made of it in the last so many segments is read, and what is written is always the same. near: what is read stands side by side
    right before the segment."""
    B, T, m = *tokens.shape, model.around.size
    read, at, out = [], 0, []
    first = ops.expand(model.around.vectors.weight[None], (B, m, model.config.hidden_size))
    for i in range(0, T, n):
        # nothing is read before the first segment
        x = plain.model.embed_tokens(ops.array(tokens[:, i : i + n]))
        x = ops.cat([h for h, _ in read] + [x, first if pile or not read else read[-1][0]], 1)
        length = tokens[:, i : i + n].shape[1] + m
        before = [np.arange(at - m * len(read), at)] if near else [np.arange(p, p + m) for _, p in read]
        pos = np.concatenate([*before, np.arange(at, at + length)])
        pos = ops.expand(ops.array(pos.astype("int32"))[None, None], (B, 1, len(pos)))
        y, _ = plain.model(x, Places(pos), None, False, plain.start()["layers"])
        out.append(ops.numpy(plain.head(y[:, len(read) * m : -m])))
        # vectors stand behind the segment once more when they are read
        read, at = [*read, (plain.model.norm(y[:, -m:]), at + length)][-(pile or 1) :], at + length + m
    return np.concatenate(out, 1)


@pytest.mark.parametrize("pos", ["rope", "dynamic", "alibi"])
def test_it_is_the_papers_concatenation(pos):
    model, plain, tokens = tiny(pos=pos, memory=SPEC), tiny(pos=pos), text(20, 2)
    with ops.no_grad():
        want = by_the_paper(model, plain, tokens, 8)
    got = run(model, tokens, whole(20, 8))
    assert apart(got, want) < 1e-4
    # control: a vector less is another model
    with ops.no_grad():
        fewer = by_the_paper(tiny(pos=pos, memory="tokens:size=2,closed=false"), plain, tokens, 8)
    assert apart(got, fewer) > 1e-2


@pytest.mark.parametrize("keep", ["none", "xl", "window"])
@pytest.mark.parametrize("name", ["tokens:size=2", "summary:k=2,chunks=3"])
def test_the_gradient_goes_back_through_the_vectors(name, keep):
    """By default, whatever the layers' own memory cuts."""
    model = fresh(memory=f"{name},keep={keep},budget=4,closed=false")
    bptt = train.reach(model, SimpleNamespace(bptt=None))
    tokens, targets = text(16), text(16, seed=1)
    targets[:, :12] = -1
    b = data.Batch(tokens, targets, tokens * 0, [[]])
    of = lambda bptt: segments.accumulate(model, segments.cut(b, 4), train.nats, {}, bptt)[1]["model.embed_tokens.weight"]
    # words of the first segment alone
    first = sorted(set(tokens[0, :4]) - set(tokens[0, 4:]))
    assert first and np.abs(ops.numpy(of(bptt))[first]).sum() > 0 == np.abs(ops.numpy(of(0))[first]).sum()


@pytest.mark.parametrize("pos", ["rope", "dynamic"])
@pytest.mark.parametrize("positions", ["near", "absolute"])
@pytest.mark.parametrize("chunks", [9, 2])
def test_summaries_pile_up(chunks, positions, pos):
    spec = f"summary:k=3,chunks={chunks},closed=false,positions={positions}"
    model, plain, tokens = tiny(pos=pos, memory=spec), tiny(pos=pos), text(36, 2)
    near = positions == "near"
    with ops.no_grad():
        want, fewer = (by_the_paper(model, plain, tokens, 8, pile, near) for pile in (chunks, 1))
        other = by_the_paper(model, plain, tokens, 8, chunks, not near)
    got = run(model, tokens, whole(36, 8))
    # a summary that has left was still read by those that came after it, here as in the paper's recurrence
    n = 8 * (chunks + 1)
    assert apart(got[:, :n], want[:, :n]) < 1e-4
    assert apart(got, fewer) > 1e-2
    # control: where they stand matters
    assert apart(got, other) > 1e-2


@pytest.mark.parametrize("keep", ["none", "xl", "window", "snapkv"])
def test_a_closed_gate_leaves_the_model_as_it_was(keep):
    spec = f"tokens:size=3,keep={keep},budget=64"
    base = {"none": "none", "xl": "xl:length=64"}.get(keep, "full")
    model, tokens = tiny(memory=spec, pos="none"), text(24, 2)
    want = run(tiny(memory=base, pos="none"), tokens, whole(24))
    assert apart(run(model, tokens, whole(24)), want) < 1e-4
    assert apart(run(tiny(memory=spec + ",closed=false", pos="none"), tokens, whole(24)), want) > 1e-2


def test_it_carries_further_than_what_the_layers_keep():
    """Two segments back, where neither a window nor nothing reaches."""
    moved = influence(tiny(memory=SPEC), text(24), whole(24))
    assert moved[:8, 16:].max() > 1e-3
    assert influence(tiny(memory="none"), text(24), whole(24))[:8, 8:].max() < 1e-6


def test_rows_that_forget_nothing_keep_their_places():
    """Sinks follow what is left when something goes between; in a row of fewer tokens nothing does, though vectors stand in the gaps."""
    model, tokens = tiny(memory="tokens:size=2,keep=sinks,budget=12,closed=false"), text(24, 2)
    padded = tokens.copy()
    padded[1, [4, 5, 8, 9, 10, 11]] = -1
    alone = run(model, tokens[1:, padded[1] >= 0], [[4], [2], [6], [6]])
    assert apart(run(model, padded, whole(24, 6))[1:, padded[1] >= 0], alone) < 1e-4


def test_the_state_does_not_grow():
    model, sizes = tiny(memory=SPEC), []
    with ops.no_grad():
        state = model.start()
        for i in range(6):
            _, state = model(ops.array(text(8, seed=i)), state)
            total = []
            ops.tree_map(lambda a, total=total: total.append(ops.nbytes(a)), state)
            sizes.append(sum(total))
    assert len(set(sizes)) == 1


def test_the_vectors_are_saved(tmp_path, tokenizer_files):
    model = tiny(memory=SPEC)
    save(model, tmp_path / "c", tokenizer_files)
    again, _ = load(tmp_path / "c")
    assert "around.vectors.weight" in ops.parameters(again)
    assert apart(run(again, text(24), whole(24)), run(model, text(24), whole(24))) < 1e-6


def test_what_cannot_be_is_refused():
    for spec, sentence in (
        ("tokens:size=0", "at least 1"),
        ("tokens:keep=h2o", "keep=h2o is not known"),
        ("tokens:gain=0", "moves no gate"),
        ("tokens:keep=sinks,budget=2", "larger than the sinks"),
    ):
        with pytest.raises(Refused, match=sentence):
            plugins.parse("memory", spec)
    for spec in ("tokens/full", "tokens:size=3/tokens:size=4"):
        with pytest.raises(Refused, match="all must say the same"):
            Llama(Config(memory=spec, hidden_size=32, num_attention_heads=4))


@pytest.mark.parametrize("memory", [SPEC, "tokens:size=3,keep=window,budget=6,closed=false", "summary:k=3,closed=false", "melodi:short=3"])
def test_a_session_has_room_for_the_vectors(memory):
    """Whatever a static graph writes between two closes: the segment's tokens, and behind them the vectors."""
    from generate import Session

    session, tokens = Session(tiny(memory=memory), chunk=8, segment=4), text(24)
    got = [session.read(tokens[0, :16])]
    kept = session.memories[0].size
    assert all(s["capacity"] >= kept + 4 + 3 for s in session.state["layers"])
    got += [session.step(int(t)) for t in tokens[0, 16:]]
    want = run(tiny(memory=memory), tokens, [[8], [8], [1] * 4, [1] * 4])
    assert apart(np.stack([ops.numpy(y) for y in got]), want[0, 15:]) < 1e-4


def test_a_checkpoint_is_read_in_the_segments_of_its_training(tmp_path, tokenizer_files):
    c = Config(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=256, memory=SPEC, segment=7)
    save(Llama(c).init(), tmp_path / "c", tokenizer_files)
    hf = json.loads((tmp_path / "c" / "config.json").read_text())
    assert hf["nanolong"]["segment"] == 7 and "segment" not in hf
    assert load(tmp_path / "c")[0].segment == 7
    # a memory that says so knows better
    assert load(tmp_path / "c", memory="summary:k=3,chunk=9")[0].segment == 9
    assert load(tmp_path / "c", memory="full")[0].segment == 7 and tiny().segment is None
