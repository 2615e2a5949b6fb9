"""Training in segments: the gradient is the one that was asked for, at the memory of one segment."""

import json
from itertools import pairwise

import numpy as np
import pytest
from conftest import text, tiny
from test_train import args, metrics, own_cache, refusal, world  # noqa: F401

import data
import ops
import rundir
import segments
import train
from kernels import Places

train.use_backend(None)

# what a memory keeps and a pattern sees: the gradient of a row in segments is that of the whole row
EXACT = [
    ("full", "full"),
    ("window:window=5", "full"),
    ("window:window=5", "window:budget=4"),
    ("full/window:window=5", "full/window:budget=9"),
    ("longformer:window=5,n_global=2", "sinks:budget=6,sinks=2,kv_positions=absolute"),
    ("longformer:window=5,n_global=2,own_projections=true", "full"),
    ("full", "sinks:budget=99,sinks=2"),
    ("routing:clusters=3,window=5,assign=argmax", "full"),
]
T = 25
# where documents begin: in mid-segment, alone in a token, over several segments, at an edge
BEGIN = [[0] * 9 + [9] * 16, [0] * 3 + [3] * 11 + [14] + [15] * 10, [0] * 7 + [7] * 18]


def batch(packed=False, rows=3):
    """Rows of 24 targets; packed: in documents."""
    tokens = text(T + 1, rows)
    begin = np.array(BEGIN, "int32")[:rows] * packed
    targets = np.where(np.roll(begin, -1, 1) == begin, tokens[:, 1:], -1)
    return data.Batch(tokens[:, :-1], targets.astype("int32"), begin, [[]] * rows)


def numbers(grads):
    return {n: ops.numpy(g) for n, g in grads.items()}


def whole(model, b):
    """Loss and gradients of the rows at once."""
    loss, grads = ops.value_and_grad(model, lambda: train.nats(model, b))
    return loss.item(), numbers(grads)


def in_segments(model, b, n, *how):
    outs, grads = segments.accumulate(model, segments.cut(b, n), train.nats, {}, *how)
    return sum(loss.item() for loss, *_ in outs), numbers(grads)


def by_hand(model, b, n, cuts):
    """The same by one graph over all segments, the state detached at boundaries i (before segment i) where cuts(i)."""

    def loss():
        state, total = model.start(), 0
        for i, piece in enumerate(segments.cut(b, n)):
            given = segments.inputs(piece)
            logits, state = model(given.tokens, ops.tree_map(ops.stop, state) if cuts(i) else state, begin=given.begin)
            total = total + ops.cross_entropy(logits, given.targets).sum()
        return total

    loss, grads = ops.value_and_grad(model, loss)
    return loss.item(), numbers(grads)


def off(got, want):
    """The largest difference of a gradient, relative to the largest entry of its parameter's."""
    assert got.keys() == want.keys()
    return max(np.abs(got[n] - want[n]).max() / (np.abs(want[n]).max() + 1e-9) for n in want)


@pytest.fixture
def learning():
    """learning(model): as it stands in training; set back afterwards, since tests share models."""
    used = []
    yield lambda model: used.append(model) or model.model.patterns(training=True) or model
    for model in used:
        model.model.patterns(training=False)


@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("attn, memory", EXACT, ids=str)
def test_the_gradient_is_that_of_the_whole_row(attn, memory, packed, learning):
    model, b = learning(tiny(attn, memory=memory)), batch(packed)
    loss, grads = whole(model, b)
    for n in (7, 2, 12):
        got = in_segments(model, b, n)
        assert abs(got[0] / loss - 1) < 1e-6 and off(got[1], grads) < 1e-5, n


@pytest.mark.parametrize("attn, memory", EXACT, ids=str)
def test_a_row_of_documents_is_read_as_several(attn, memory, learning):
    """Of 3, 11, 1 and 10 tokens: those of n and more by themselves, their positions from 0."""
    model, three = learning(tiny(attn, memory=memory)), batch(True)
    b = data.Batch(*(x[1:2] for x in three))
    loss, grads = whole(model, b)
    for n, lengths in ((2, [3, 11, 1, 10]), (4, [3, 11, 1, 10]), (11, [3, 11, 11]), (12, [25])):
        rows = segments.documents(b, n)
        assert [row.tokens.shape[1] for row in rows] == [length for length in lengths if length > 1]
        assert n > 4 or not any(row.begin.any() for row in rows)
        outs, got = [], {}
        for row in rows:
            out, got = segments.accumulate(model, segments.cut(row, n), train.nats, got)
            outs += out
        assert abs(sum(one.item() for one, *_ in outs) / loss - 1) < 1e-6 and off(numbers(got), grads) < 1e-5, n
    padded = b._replace(targets=np.where(np.arange(25) < 14, b.targets, -1))
    assert [row.tokens.shape[1] for row in segments.documents(padded, 2)] == [3, 11], "what is padding, and a document of one token"
    assert segments.documents(three, 17)[0].tokens.shape == (2, 25) and segments.documents(three, 26) == [three], "side by side as they are"
    none = b._replace(targets=b.targets * 0 - 1)
    assert len(segments.documents(none, 2)) == 1


@pytest.mark.parametrize("memory", ["window:budget=4", "tokens:size=2,closed=false", "state:size=2,closed=false", "xl:length=5"])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_rows_of_documents_are_read_alike_however_many_come_at_once(memory, n, learning):
    """Where a document's segments end, and with that what a recurrence makes of it, is not for the rows beside it to say."""
    model, three = learning(tiny(memory=memory)), batch(True)
    found = []
    for micro in (1, 3):
        lost, grads = 0.0, {}
        for i in range(0, 3, micro):
            for row in segments.documents(data.Batch(*(x[i : i + micro] for x in three)), n):
                outs, grads = segments.accumulate(model, segments.cut(row, n), train.nats, grads)
                lost += sum(one.item() for one, *_ in outs)
        found.append((lost, numbers(grads)))
    (a, one), (b, all_) = found
    assert abs(a / b - 1) < 1e-6 and off(all_, one) < 1e-5


@pytest.mark.parametrize("attn, memory", EXACT[1:6:2], ids=str)
def test_segments_of_random_lengths(attn, memory, learning):
    model, b = learning(tiny(attn, memory=memory)), batch()
    loss, grads = whole(model, b)
    drawn = set()
    for seed in range(6):
        pieces = segments.cut(b, 9, 3, seed)
        lengths = [piece.tokens.shape[1] for piece in pieces]
        assert sum(lengths) == b.tokens.shape[1] and all(3 <= n <= 9 for n in lengths[:-1]) and 0 < lengths[-1] <= 9
        assert [p.tokens.tolist() for p in segments.cut(b, 9, 3, seed)] == [p.tokens.tolist() for p in pieces]
        np.testing.assert_array_equal(np.concatenate([p.targets for p in pieces], 1), b.targets)
        drawn.add(tuple(lengths))
        outs, got = segments.accumulate(model, pieces, train.nats, {})
        assert abs(sum(one.item() for one, *_ in outs) / loss - 1) < 1e-6 and off(numbers(got), grads) < 1e-5, lengths
    assert len(drawn) > 3
    # a step's come from its tokens: the same in a run that was resumed, others for other rows
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        noted = lambda model, pieces, *rest: seen.append([p.tokens.shape[1] for p in pieces]) or ([(ops.array(0.0),)], {})
        patch.setattr(segments, "accumulate", noted)
        patch.setattr(ops, "global_norm", lambda grads: ops.array(float("nan")))
        for rows in (0, 0, 1, 2, 3):
            x = text(60, 1, seed=rows)
            train.train_step(model, None, data.Batch(x, x, x * 0, [[]]), 1, 1.0, 0.0, 9, least=3)
    assert seen[0] == seen[1] and len({tuple(x) for x in seen}) > 2


RECURRENT = ["tokens:size=3", "tokens:size=2,keep=window,budget=4", "state:size=3", "state:size=3,cell=mlp", "melodi:short=3,long=2"]
RECURRENT += ["summary:k=2,chunks=2"]


@pytest.mark.parametrize("memory", RECURRENT, ids=str)
def test_the_gradient_through_a_recurrence(memory, learning):
    """Against one graph over all segments: of every parameter, what a text begins with included."""
    model = learning(tiny(memory=memory + ",closed=false"))
    for packed in (False, True):
        b = batch(packed)
        want, got = by_hand(model, b, 7, lambda i: False), in_segments(model, b, 7)
        assert abs(got[0] / want[0] - 1) < 1e-6 and off(got[1], want[1]) < 1e-4
        # control: cut at every boundary it is another
        assert off(in_segments(model, b, 7, 0)[1], want[1]) > 0.05


def test_gradients_are_added_to_those_before():
    model, b = tiny("window:window=5", memory="window:budget=4"), batch()
    _, grads = segments.accumulate(model, segments.cut(b, 7), train.nats, {})
    _, grads = segments.accumulate(model, segments.cut(b, 7), train.nats, grads)
    assert off(numbers(grads), {n: 2 * g for n, g in whole(model, b)[1].items()}) < 1e-5


def test_the_loss_alone_does_not_see_a_dropped_gradient(monkeypatch):
    """Control: without what is handed from one segment to the one before, the loss is the same and the gradient is not."""
    model, b = tiny("window:window=5", memory="window:budget=4"), batch()
    loss, grads = whole(model, b)
    monkeypatch.setattr(segments, "along", lambda handed, state: 0.0)
    got = in_segments(model, b, 7)
    assert abs(got[0] / loss - 1) < 1e-6 and off(got[1], grads) > 0.05


def test_a_memory_below_the_patterns_reach_is_another_model():
    """Control: with a slot less than the window reaches back, neither loss nor gradient are the whole row's; by hand they are found."""
    model, b = tiny("window:window=5", memory="window:budget=3"), batch(True)
    loss, grads = whole(model, b)
    got, want = in_segments(model, b, 7), by_hand(model, b, 7, lambda i: False)
    assert abs(got[0] / loss - 1) > 1e-4 and off(got[1], grads) > 1e-2
    assert abs(got[0] / want[0] - 1) < 1e-6 and off(got[1], want[1]) < 1e-5


@pytest.mark.parametrize("memory", ["window:budget=4", "full", "sinks:budget=6,sinks=2"])
def test_a_cut_stops_the_gradient_where_it_says(memory):
    """Against one graph with the state detached by hand: bptt boundaries pass, the next is cut."""
    model, b, found = tiny(memory=memory), batch(True), []
    for bptt in (0, 1, 2, 99, "all"):
        found.append(in_segments(model, b, 4, bptt))
        want = by_hand(model, b, 4, lambda i, bptt=bptt: bptt != "all" and i % (bptt + 1) == 0)
        assert abs(found[-1][0] / want[0] - 1) < 1e-6 and off(found[-1][1], want[1]) < 1e-5, bptt
    cut, one, two, many, through_all = (grads for _, grads in found)
    assert min(off(cut, one), off(one, two), off(two, through_all)) > 1e-2 and off(many, through_all) == 0


def test_boundaries_are_cut_by_counting():
    assert segments.runs(list("abcde"), 0) == [["a"], ["b"], ["c"], ["d"], ["e"]]
    assert segments.runs(list("abcde"), 1) == [["a", "b"], ["c", "d"], ["e"]]
    assert segments.runs(list("abcde"), "all") == [list("abcde")]


def test_bfloat16_loses_as_much_in_segments_as_at_once(monkeypatch):
    """Activations and states in bfloat16: the gradient is as far from float32's as that of whole rows; what is handed on matters more."""
    model, b = tiny("window:window=5", memory="window:budget=4"), batch()
    apart = lambda got, want: np.sqrt(sum(((got[n] - want[n]) ** 2).sum() for n in want) / sum((want[n] ** 2).sum() for n in want))
    exact = whole(model, b)[1]
    try:
        model.dtype = ops.bfloat16
        floor, ours = apart(whole(model, b)[1], exact), apart(in_segments(model, b, 7)[1], exact)
        monkeypatch.setattr(segments, "along", lambda handed, state: 0.0)
        dropped = apart(in_segments(model, b, 7)[1], exact)
    finally:
        model.dtype = None
    assert ours < 1.5 * floor and dropped > 5 * floor, (ours, floor, dropped)


@pytest.mark.parametrize("attn, memory", EXACT[2:5], ids=str)
def test_checkpointing_inside_and_offloading_change_nothing(attn, memory):
    model, b = tiny(attn, memory=memory), batch(True)
    want = in_segments(model, b, 7)
    try:
        model.model.run = ops.checkpoint
        for how in (("all", False), ("all", True), (1, True)):
            assert (
                off(in_segments(model, b, 7, *how)[1], want[1] if how[0] == "all" else by_hand(model, b, 7, lambda i: i % 2 == 0)[1]) < 1e-5
            )
    finally:
        model.model.run = ops.call


def test_what_waits_for_the_backward_pass_is_parked(monkeypatch):
    """Every boundary's state goes to the host and comes back, those of the row's beginning and of its last segment excepted."""
    model, b, real, moved = tiny(memory="window:budget=4"), batch(), ops.parked, []

    class Watched:
        def __init__(self, tree, more):
            self.inner = real(tree, more)
            moved.append(("away", more))

        def fetch(self):
            moved.append("fetch")
            self.inner.fetch()

        def back(self):
            moved.append("back")
            return self.inner.back()

    monkeypatch.setattr(ops, "parked", Watched)
    in_segments(model, b, 7, "all", True)
    assert moved == [("away", 1), ("away", 0), "fetch", "back", "fetch", "back"], "4 segments, 3 boundaries, the last one here"


def test_a_control_groups_memory_is_what_is_there(tmp_path):
    """Bytes of the host's memory that may wait: in a container not what the whole machine has."""
    if ops.BACKEND != "torch":
        pytest.skip("torch's own")
    from backends import _parked

    names = "memory.max", "memory.current"
    assert _parked.allowed(tmp_path, *names) is None and 0 < _parked.available() < 1 << 50
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 300\n")
    (tmp_path / "memory.current").write_text("5000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert _parked.allowed(tmp_path, *names) is None
    (tmp_path / "memory.max").write_text("9000\n")
    assert _parked.allowed(tmp_path, *names) == 9000 - 5000 + 300


def arrays_of(tree):
    found = []
    ops.tree_map(found.append, tree)
    return [ops.numpy(x) for x in found]


@pytest.mark.parametrize("segment", [3, 7, 20])
@pytest.mark.parametrize(
    "memory, slides",
    [
        ("full", True),
        ("window:budget=10", True),
        ("sinks:budget=12,sinks=4", True),
        ("sinks:budget=12,sinks=4,kv_positions=absolute", True),
        ("xl:length=10", False),
        ("h2o:budget=10", False),
    ],
)
def test_of_a_state_only_that_waits_which_the_next_has_not(memory, slides, segment):
    """And with it the state is there again, bit by bit."""
    model, state, states = tiny(memory=memory), None, []
    tokens = text(100, 2)
    with ops.no_grad():
        for i in range(0, 100, segment):
            _, state, *_ = segments.read(model, ops.array(tokens[:, i : i + segment]), state)
            states.append(state)
    for before, after in pairwise(states):
        gone = model.gone(before, after)
        again = model.again(gone, after)
        assert again.keys() == before.keys() and [s.keys() for s in again["layers"]] == [s.keys() for s in before["layers"]]
        for a, b in zip(arrays_of(again), arrays_of(before), strict=True):
            assert a.dtype == b.dtype and np.array_equal(a, b)
        # what waits: rows that the next has not, beside the leading ones
        rows, leading = gone["layers"][0]["pos"].shape[-1], model.memories()[0].always
        if slides and before["layers"][0]["n"] > leading:
            assert rows <= leading + segment and rows < before["layers"][0]["n"] + (segment >= 10)
        elif not slides:
            assert gone["layers"][0]["pos"] is before["layers"][0]["pos"]


def test_a_state_of_documents_waits_whole():
    begin = np.where(np.arange(21) < 12, 0, 12)[None].astype("int32")
    model, b = tiny(memory="window:budget=10"), data.Batch(text(21), text(21), begin, [[]])
    states, state = [], None
    with ops.no_grad():
        for piece in segments.cut(b, 7):
            given = segments.inputs(piece)
            _, state, *_ = segments.read(model, given.tokens, state, begin=given.begin)
            states.append(state)
    # its slots have changed since
    assert model.gone(states[1], states[2])["layers"][0].keys() == states[1]["layers"][0].keys()
    for a, b in zip(arrays_of(model.again(model.gone(states[1], states[2]), states[2])), arrays_of(states[1]), strict=True):
        assert np.array_equal(a, b)


def test_a_saved_state_holds_no_room():
    """What is kept at a boundary is as large as what is remembered, and nothing later is written into it."""
    model, b, state = tiny(memory="window:budget=10"), batch(), None
    for n in (7, 10, 10):
        with ops.no_grad():
            _, state, *_ = segments.read(model, ops.array(b.tokens[:, :7]), state)
        assert state["layers"][0]["n"] == state["layers"][0]["k"].shape[2] == n


def peak(model, segment, count):
    """Bytes that wait for a backward pass at their most, while a row of `count` segments is trained on."""
    b = data.Batch(*(text(segment * count, seed=s) for s in (0, 1)), np.zeros((1, segment * count), "int32"), [[]])
    step = lambda: segments.accumulate(model, segments.cut(b, segment), train.nats, {})
    if ops.BACKEND == "mlx":
        import mlx.core as mx

        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        step()
        return mx.get_peak_memory() - before
    import weakref

    import torch

    live, most = [0], [0]

    class Kept:
        def __init__(self, x):
            self.x, n = x, x.numel() * x.element_size()
            live[0] += n
            most[0] = max(most[0], live[0])
            weakref.finalize(self, lambda: live.__setitem__(0, live[0] - n))

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.x):
        step()
    return most[0]


def test_memory_is_that_of_one_segment():
    model = tiny("window:window=17", memory="window:budget=16", layers=4)
    one, eight = (peak(model, 128, count) for count in (2, 16))
    # MLX counts the states at the boundaries too
    assert eight < 1.25 * one
    assert peak(model, 2048, 2) > 4 * one, "or this test is blind"


# ---------------------------------------------------------------- Transformer-XL


def transformer_xl(model, tokens, n, length):
    """Logits by the paper's recurrence, written out: m' = SG([m; h])[-length:], keys and values of [m; h], queries of h."""
    decoder, memories, logits = model.model, [None] * len(model.model.layers), []
    places = lambda a, b: Places(ops.array(np.arange(a, b, dtype="int32")[None, None]))
    for i in range(0, tokens.shape[1], n):
        x = decoder.embed_tokens(ops.array(tokens[:, i : i + n]))
        for layer, (block, which) in enumerate(zip(decoder.layers, decoder.feels)):
            attn, p, h = block.self_attn, decoder.positions[which], block.input_layernorm(x)
            both = h if memories[layer] is None else ops.cat([memories[layer], h], 1)
            memories[layer] = ops.stop(both[:, -length:])
            first, end = i + h.shape[1] - both.shape[1], i + h.shape[1]
            k, v = attn.kv(both)
            q = p.queries(attn.heads(attn.q_proj(h)), p.turn(places(i, end)))
            k, v = (ops.repeat(a, attn.H // attn.K, 1) for a in (p.keys(k, p.turn(places(first, end))), v))
            see = ops.array(np.arange(first, end) <= np.arange(i, end)[:, None])
            weights = ops.softmax(ops.where(see, q @ ops.swap(k, 2, 3) * p.temperature * attn.D**-0.5, -1e30), -1)
            x = x + attn.o_proj(ops.swap(weights @ v, 1, 2).reshape(*h.shape[:2], -1))
            x = x + block.mlp(block.post_attention_layernorm(x))
        logits.append(model.head(x))
    return ops.cat(logits, 1)


@pytest.mark.parametrize("length", [3, 10, 99])
@pytest.mark.parametrize("pos", ["rope", "xl", "yarn:factor=2,original=16"])
def test_xl_is_the_papers_recurrence(pos, length, learning):
    model, b = learning(tiny(pos=pos, memory=f"xl:length={length}")), batch()
    theirs = lambda x, begin, targets: ops.cross_entropy(transformer_xl(model, b.tokens, 7, length), targets)
    loss, grads = ops.value_and_grad(model, lambda: train.nats(theirs, b))
    for n in (0, "all"):
        got = in_segments(model, b, 7, n)
        assert abs(got[0] / loss.item() - 1) < 1e-6 and off(got[1], numbers(grads)) < 1e-5
    # cut keys and values would give W_k and W_v less: remembered tokens are projected by every segment
    other = in_segments(tiny(pos=pos, memory=f"window:budget={length}"), b, 7, 0)
    assert abs(got[0] / other[0] - 1) < 1e-6
    apart = {n for n in grads if np.abs(other[1][n] - got[1][n]).max() > 1e-3 * np.abs(got[1][n]).max()}
    assert any("k_proj" in n for n in apart) and any("v_proj" in n for n in apart)


@pytest.mark.parametrize("pos", ["rope", "xl", "alibi", "dynamic"])
def test_xl_in_training_reads_as_in_use(pos, learning):
    """Inputs that are projected anew give the same losses as keys and values that were kept, documents and odd segments included."""
    model, b = tiny(pos=pos, memory="xl:length=6"), batch(True)
    used = segments.total(model, segments.cut(b, 4), train.nats)
    assert "k" in model(ops.array(b.tokens), model.start())[1]["layers"][0]
    learning(model)
    assert "x" in model(ops.array(b.tokens), model.start())[1]["layers"][0]
    assert abs(segments.total(model, segments.cut(b, 4), train.nats) / used - 1) < 1e-6
    assert abs(whole(model, b)[0] / used - 1) > 1e-4, "or the memory was never too small"


# ---------------------------------------------------------------- train.py


@pytest.mark.parametrize("attn, memory", [("window:window=9", "window:budget=8"), ("routing:clusters=3,window=9,assign=argmax", "full")])
def test_a_run_in_segments_is_the_run_of_whole_rows(attn, memory, world, tmp_path):  # noqa: F811
    how = {"steps": 3, "attn": attn, "memory": memory, "dtype": "float32"}
    keys = ("loss", "grad_norm", "valid_loss")
    assert train.main(args(world, tmp_path / "whole", **how)) == 0
    for micro, more in ((2, []), (4, ["--offload", "--checkpoint"])):
        out = tmp_path / f"micro-{micro}"
        assert train.main([*args(world, out, segment=20, **{**how, "micro": micro}), *more]) == 0
        got, want = (np.array([x for *_, x in metrics(o, *keys)]) for o in (out, tmp_path / "whole"))
        np.testing.assert_allclose(got, want, rtol=2e-4)
    assert json.loads((out / "trainer.json").read_text())["arguments"]["bptt"] == "all"


RUNS = [("xl:length=8", None, 0, None), ("sinks:budget=12,sinks=2", 1, 1, 9), ("infini", None, "all", None)]


@pytest.mark.parametrize("memory, bptt, said, least", RUNS)
def test_a_run_in_segments_learns_and_resumes_to_the_bit(memory, bptt, said, least, world, tmp_path, monkeypatch):  # noqa: F811
    real, out, steps = train.train_step, tmp_path / "run", []
    how = {"steps": 8, "save-every": 4, "segment": 16, "segment-least": least, "memory": memory, "bptt": bptt}
    how |= {"pos": "xl"} if "xl" in memory else {}
    assert train.main(args(world, tmp_path / "whole", **how)) == 0
    monkeypatch.setattr(train, "train_step", lambda *a: steps.append(1) or (real(*a) if len(steps) < 6 else 1 / 0))
    with pytest.raises(ZeroDivisionError):
        train.main(args(world, out, **how))
    monkeypatch.setattr(train, "train_step", real)
    assert train.main(["--resume", str(out)]) == 0
    assert metrics(out, "loss", "valid_loss") == metrics(tmp_path / "whole", "loss", "valid_loss")
    losses = [x for *_, x in metrics(out, "loss")]
    assert losses[-1] < losses[0] - 0.5
    assert json.loads((out / "trainer.json").read_text())["arguments"]["bptt"] == said
    assert [p.name for p in rundir.checkpoints(out)] == ["step-000004", "step-000008"]
    # the validation reads as the training does
    model, tokenizer = train.llama.load(out / "step-000008", device="cpu")
    held, valid = data.Corpus.build([world / "held"], tokenizer, tmp_path / "c"), metrics(out, "valid_loss")[-1][2]
    loss = lambda segment: train.evaluate(model, held, train.SimpleNamespace(micro=2, length=48, valid_rows=2, segment=segment))
    assert abs(loss(16) - valid) < 1e-5 and abs(loss(None) - valid) > 1e-4
    own = out / "step-000008" / "nanolong.safetensors"
    if memory == "infini":
        assert all(np.abs(ops.numpy(x)).max() > 1e-3 for n, x in ops.read_safetensors(own).items()), "the gates moved"


BAD = {
    "as long as a row": ({"segment": 48}, "--length 48"),
    "nothing": ({"segment": 0}, "--segment 0"),
    "bptt alone": ({"bptt": 1}, "--segment"),
    "a negative bptt": ({"segment": 16, "bptt": -1}, "--bptt"),
    "a bptt that is no number": ({"segment": 16, "bptt": "some"}, "--bptt"),
    "bptt of a memory that cuts": ({"segment": 16, "bptt": 2, "memory": "xl"}, "--memory xl"),
    "least as long as the others": ({"segment": 16, "segment-least": 16}, "--segment-least 16"),
    "least alone": ({"segment-least": 16}, "--segment-least 16"),
    "a share of unknown texts": ({"segment": 16, "memory": "snapkv:budget=0.25"}, "budget in tokens"),
    "a pattern of whole rows": ({"segment": 16, "attn": "full/routing"}, "assign=argmax"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_makes_no_sense_is_refused(what, world, tmp_path, monkeypatch, capsys):  # noqa: F811
    how, named = BAD[what]
    monkeypatch.setattr(train.llama, "load", lambda *a, **k: pytest.fail("loaded before it was refused"))
    assert named in refusal(args(world, tmp_path / "run", **how), monkeypatch, capsys)
    assert not (tmp_path / "run").exists()


def test_offload_alone_is_refused(world, tmp_path, monkeypatch, capsys):  # noqa: F811
    assert "--offload" in refusal([*args(world, tmp_path / "run"), "--offload"], monkeypatch, capsys)


def test_without_segment_a_memory_is_for_later(world, tmp_path, capsys):  # noqa: F811
    assert train.main(args(world, tmp_path / "run", steps=1, warmup=0, memory="window:budget=8")) == 0
    assert "note: without --segment" in capsys.readouterr().err
    assert train.main(args(world, tmp_path / "other", steps=1, warmup=0, memory="window:budget=8", segment=16)) == 0
    assert "note: without" not in capsys.readouterr().err
