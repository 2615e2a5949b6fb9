"""What every mechanism must hold, whatever it is. They are found by listing the folders: a new file is tested at once."""

import numpy as np
import pytest
from conftest import JOINED, apart, influence, named, run, small, text, tiny, whole

import kernels
import ops
import plugins
from memory import base
from model import MLP

T = 24
ATTN, POS, MEMORY = ([small(folder, name) for name in plugins.names(folder)] for folder in ("attention", "positions", "memory"))
# joined patterns, and a pattern with weights of its own, like the base's when they begin: test_own_projections.py moves them
ATTN += [*(small("attention", joined) for joined in JOINED), "longformer:window=5,n_global=4,own_projections=true"]
GENEROUS = plugins.names("memory")  # by default a memory holds far more than these texts
# these sum up the past when a segment closes instead of keeping its tokens, so they never equal full attention
FOLDS = {"compressive", "infini", "melodi", "none", "quantised", "state", "summary", "tokens"}
# a number between two codes falls to either side, for a last bit more or less: pieces agree to about a step of 8 bits
ROUNDS = {"quantised"}
# frequencies that move with the length of the text
LENGTH_MATTERS = {"dynamic"}
SEGMENTS = whole(T)
# the same segments, fed one token at a time and in odd pieces
PIECES = {"ones": [[1] * 8] * 3, "odd": [[3, 5], [7, 1], [1, 2, 5]]}
# documents inside a segment, up to its edge, from its edge on, and over the next edge with more tokens than a small budget
DOCUMENTS = [0, 3, 8, 12]

name = lambda spec: spec.partition(":")[0]
ident = lambda x: named(x) if isinstance(x, str) else None
exact = lambda memory: 5e-3 if name(memory) in ROUNDS else 1e-4
every = lambda what, specs, **how: pytest.mark.parametrize(what, specs, ids=how.get("ids", ident))


def exempts(attn, memory):
    """Has the memory slots that a sparse pattern does not bind? Then the pattern alone is no reference (test_sinks.py has one)."""
    return name(attn) != "full" and tiny(memory=memory).model.layers[0].self_attn.memory.always > 0


def documents(T):
    """begin [1, T]: the position where each token's document begins."""
    return np.array([[max(d for d in DOCUMENTS if d <= i) for i in range(T)]], "int32")


# ---------------------------------------------------------------- 1. no future leak


@every("memory", MEMORY)
@every("pos", POS)
@every("attn", ATTN)
def test_no_future_leak(attn, pos, memory):
    moved = influence(tiny(attn, pos, memory), text(T), SEGMENTS)
    assert np.tril(moved, -1).max() < 1e-5, "a logit moved with a token that comes after it"
    assert np.diag(moved).min() > 1e-3, "a logit must move with its own token, or this test is blind"


@every("memory", MEMORY)
@every("attn", ATTN)
def test_documents_do_not_see_each_other(attn, memory):
    begin = documents(T)
    for segments in (None, SEGMENTS):
        moved = influence(tiny(attn, memory=memory), text(T), segments, begin)
        assert moved[begin[0][:, None] != begin[0]].max() < 1e-5
        assert moved[0, 1] > 1e-3


@every("attn", ATTN)
def test_one_layer_sees_what_the_rule_allows(attn):
    """In a model of one layer the logits at q move with token k if and only if some head may see it."""
    rule = plugins.parse("attention", attn)
    if not hasattr(rule.module, "allowed"):
        pytest.skip("not a pattern of positions")
    k, q, h = np.ogrid[:T, :T, :4]
    moved = influence(tiny(attn, layers=1), text(T)) > 1e-5
    np.testing.assert_array_equal(moved, (rule.module.allowed(q, k, h, rule.options) & (h >= 0)).any(-1))


# ---------------------------------------------------------------- 2. piece by piece equals all at once


@every("pieces", PIECES.values(), ids=list(PIECES))
@every("room", [0, 10, T], ids=["grown", "outgrown", "allocated"])
@every("memory", MEMORY)
def test_pieces_equal_the_segment(memory, room, pieces):
    """At a budget that binds, and the same points of closing."""
    model = tiny(memory=memory)
    assert apart(run(model, text(T, 2), pieces, room=room), run(model, text(T, 2), SEGMENTS)) < exact(memory)


@every("memory", GENEROUS)
@every("attn", ATTN)
def test_a_budget_that_holds_everything_changes_nothing(attn, memory):
    if memory in FOLDS:
        pytest.skip("sums up the past instead of keeping it")
    if exempts(attn, memory):
        pytest.skip("some slots are exempt from the pattern")
    want = run(tiny(attn), text(T, 2))
    for segments in (SEGMENTS, [[5], [1], [11], [7]], PIECES["ones"]):
        assert apart(run(tiny(attn, memory=memory), text(T, 2), segments, room=T), want) < 1e-4


@every("pos", POS)
def test_positions_carry_over_segments(pos):
    if name(pos) in LENGTH_MATTERS:
        pytest.skip("its frequencies move with the length")
    assert apart(run(tiny(pos=pos), text(T), [[5], [1], [11], [7]]), run(tiny(pos=pos), text(T))) < 1e-4


@every("memory", MEMORY)
@every("attn", ATTN)
def test_static_steps_equal_plain_ones(attn, memory):
    """One token a call, counters inside the arrays, closes included; then back to counters on the host."""
    model, tokens, n = tiny(attn, memory=memory), text(40), 8
    want = run(model, tokens, whole(40, n), room=40)
    with ops.no_grad():
        y, state = model(ops.array(tokens[:, :n]), model.start(n, 40))
    got, shapes = [ops.numpy(y)], []
    step = ops.static(lambda x, s, close: model(x, s, close=close), model.still(state), (False, True))
    for t in range(n, 32):
        got.append(ops.numpy(step(int(tokens[0, t]), (t + 1) % n == 0)))
        shapes.append([])
        ops.tree_map(lambda a: shapes[-1].append(tuple(a.shape)) or a, step.state)
    assert all(s == shapes[0] for s in shapes), "a static graph's shapes may not change"
    with ops.no_grad():
        y, _ = model(ops.array(tokens[:, 32:]), model.moving(step.state))
    assert apart(np.concatenate([*got, ops.numpy(y)], 1), want) < exact(memory)


# ---------------------------------------------------------------- 3. rows and documents by themselves


@every("memory", MEMORY)
@every("attn", ATTN)
def test_padded_rows_equal_the_row_alone(attn, memory):
    """Rows of 24, 19 and 13 tokens, padded on the right in one segment and on the left in another."""
    model, tokens = tiny(attn, memory=memory), text(T, 3)
    tokens[1, 5:8] = tokens[2, 5:8] = tokens[1, 8:10] = tokens[2, 8:16] = -1
    together = run(model, tokens, SEGMENTS)
    for row, segments in ((0, SEGMENTS), (1, [[5], [6], [8]]), (2, [[5], [8]])):
        live = tokens[row] >= 0
        assert apart(together[row : row + 1, live], run(model, tokens[row : row + 1, live], segments)) < exact(memory)


@every("attn", ATTN)
@every("pos", POS)
def test_padded_rows_without_memory(attn, pos):
    model, tokens = tiny(attn, pos), text(T, 2)
    tokens[1, :5] = tokens[1, 20:] = -1
    together = run(model, tokens)
    assert apart(together[:1], run(model, tokens[:1])) < 1e-4
    assert apart(together[1:, 5:20], run(model, tokens[1:, 5:20])) < 1e-4


@every("memory", MEMORY)
@every("attn", ATTN)
def test_a_packed_document_equals_the_document_alone(attn, memory):
    model, tokens, begin = tiny(attn, memory=memory), text(T), documents(T)
    packed, packed_in_segments = run(model, tokens, begin=begin), run(model, tokens, SEGMENTS, begin)
    for a, b in zip(DOCUMENTS, [*DOCUMENTS[1:], T]):
        # the document's share of each segment
        segments = [[n] for i in range(0, T, 8) if (n := min(b, i + 8) - max(a, i)) > 0]
        assert apart(packed[:, a:b], run(model, tokens[:, a:b])) < 1e-4
        assert apart(packed_in_segments[:, a:b], run(model, tokens[:, a:b], segments)) < exact(memory)


@every("pos", POS)
def test_a_packed_document_feels_its_own_distances(pos):
    if name(pos) in LENGTH_MATTERS:
        pytest.skip("its frequencies move with the length")
    model, tokens = tiny(pos=pos), text(T)
    assert apart(run(model, tokens, begin=documents(T))[:, 12:], run(model, tokens[:, 12:])) < 1e-4


@every("memory", MEMORY)
def test_rows_of_different_length_decode_as_alone(memory):
    """Prompts of 8, 5 and 1 tokens padded to 8, then 16 tokens one by one."""
    model, tokens, lengths = tiny(memory=memory), text(T, 3), (8, 5, 1)
    for row, n in enumerate(lengths):
        tokens[row, n:8] = -1
    steps = [[8], *[[1] * 4] * 4]
    together = run(model, tokens, steps, room=T)
    for row, n in enumerate(lengths):
        alone = run(model, tokens[row : row + 1, tokens[row] >= 0], [[n], *steps[1:]], room=T)
        assert apart(together[row : row + 1, tokens[row] >= 0], alone) < exact(memory)


@every("memory", MEMORY)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_writes_what_each_prompt_does_alone(memory, side):
    """Prompts of 21, 8 and 5 tokens, padded to 24 and read in chunks of 8, some of them padding alone; then nothing is padded."""
    model, lengths = tiny(memory=memory), (21, 8, 5)
    prompts = [text(n, seed=n) for n in lengths]
    pad = lambda p: np.pad(p, ((0, 0), (24 - p.shape[1], 0) if side == "left" else (0, 24 - p.shape[1])), constant_values=-1)
    rows = np.concatenate([pad(p) for p in prompts])
    tokens, logits = written(model, rows, -1 if side == "left" else [n - 1 for n in lengths])
    for i, row in enumerate(rows):
        chunks = [c for a in range(0, 24, 8) if len(c := row[None, a : a + 8][:, row[a : a + 8] >= 0][0])]
        alone, want = written(model, chunks, -1)
        assert apart(logits[i : i + 1], want) < exact(memory)
        assert (tokens[i] == alone[0]).all()


def written(model, prompt, last, n=12):
    """(tokens [B, n] that a model writes after prompts, always the likeliest, and their logits [B, n, V]). prompt: padded rows [B, 24], or
    the chunks of one; last: where the last token of each row is."""
    parts = [prompt[:, a : a + 8] for a in range(0, 24, 8)] if isinstance(prompt, np.ndarray) else [c[None] for c in prompt]
    with ops.no_grad():
        state, ys = model.start(8, sum(p.shape[1] for p in parts) + n), []
        for part in parts:
            y, state = model(ops.array(part.astype("int32")), state, padded=bool((part < 0).any()) or len(part) > 1)
            ys.append(ops.numpy(y))
        ys = np.concatenate(ys, 1)
        out = [ys[np.arange(len(ys)), last][:, None]]
        for t in range(n - 1):
            y, state = model(ops.array(out[-1].argmax(-1).astype("int32")), state, close=(t + 1) % 4 == 0)
            out.append(ops.numpy(y))
    out = np.concatenate(out, 1)
    return out.argmax(-1), out


# ---------------------------------------------------------------- 5. segments


@every("memory", MEMORY)
@every("attn", ATTN)
def test_an_empty_memory_is_no_memory(attn, memory):
    model, tokens = tiny(attn, memory=memory), text(T, 2)
    if exempts(attn, memory):
        pytest.skip("some slots are exempt from the pattern")
    want = run(tiny(attn), tokens[:, :8])
    assert apart(run(model, tokens[:, :8]), want) < 1e-4
    assert apart(run(model, tokens, SEGMENTS)[:, :8], want) < 1e-4
    # a memory of nothing but other documents
    begin = np.full((2, T), 8, "int32") * (np.arange(T) >= 8)
    assert apart(run(model, tokens[:, :16], SEGMENTS[:2], begin[:, :16])[:, 8:], run(tiny(attn), tokens[:, 8:16])) < 1e-4


@every("memory", MEMORY)
def test_a_memory_is_read(memory):
    """Control: some token of a closed segment moves logits after it, and a binding budget is felt."""
    if memory == "none":
        pytest.skip("forgets on purpose")
    moved = influence(tiny(memory=memory, layers=1), text(T), SEGMENTS)
    assert moved[:8, 8:].max() > 1e-2
    if memory != "full":
        assert apart(run(tiny(memory=memory), text(T), SEGMENTS), run(tiny(), text(T))) > 1e-2


@every("size, same", [(4, True), (9, True), (3, False)], ids=["window - 1", "more", "too few"])
@every("segments", [whole(T), whole(T, 5), whole(T, 1)], ids=[8, 5, 1])
def test_a_window_needs_window_minus_one_slots(size, same, segments):
    """A window of 5 reaches 4 tokens back: with 4 slots segments change nothing, with 3 they do."""
    d = apart(run(tiny("window:window=5", memory=f"window:budget={size}"), text(T), segments), run(tiny("window:window=5"), text(T)))
    assert d < 1e-4 if same else d > 1e-3


def segmented_loss(model, tokens, segments):
    """Mean loss of the next tokens and every gradient, through the memory where segments are given."""
    x, y, lengths = ops.array(tokens[:, :-1]), ops.array(tokens[:, 1:]), [n for segment in segments for n in segment]

    def loss():
        state, total, i = model.start(), 0, 0
        for n in lengths:
            logits, state = model(x[:, i : i + n], state)
            total, i = total + ops.cross_entropy(logits, y[:, i : i + n]).sum(), i + n
        return total / i

    value, grads = ops.value_and_grad(model, loss)
    return {"loss": ops.numpy(value), **{n: ops.numpy(g) for n, g in grads.items()}}


@every("attn, memory", [("full", "full"), ("window:window=5", "window:budget=4"), ("full", "sinks:budget=99")], ids=str)
def test_gradients_flow_through_the_memory(attn, memory):
    """Whatever a memory holds back to the pattern's reach: the gradient of a text in segments is that of the whole text."""
    model = tiny(attn, memory=memory)
    want, got = (segmented_loss(model, text(T + 1, 2), segments) for segments in ([[T]], whole(T, 7)))
    for n in want:
        assert np.abs(got[n] - want[n]).max() < 1e-4 * np.abs(want[n]).max(), n


@every("memory", MEMORY)
def test_a_temperature_multiplies_the_logits(memory):
    """A position scheme's temperature of 2 is queries of twice the length, in what is remembered too."""
    warm, longer = (tiny(memory=memory, rope_theta=theta) for theta in (9000.0, 9001.0))
    longer.model.positions[0].per_turn = warm.model.positions[0].per_turn
    warm.model.positions[0].temperature = 2.0
    for name, p in ops.parameters(longer).items():
        if "q_proj" in name:
            ops.set_parameters(longer, {name: p * 2})
    assert apart(run(warm, text(T), SEGMENTS), run(longer, text(T), SEGMENTS)) < exact(memory)
    assert apart(run(warm, text(T), SEGMENTS), run(tiny(memory=memory), text(T), SEGMENTS)) > 1e-2


# ---------------------------------------------------------------- 7. only distances count


@every("pos", POS)
@every("memory", MEMORY)
def test_a_text_that_starts_at_a_million(pos, memory):
    """Positions from 2^20 on give the logits of positions from 0 on: angles are exact at any distance."""
    model = tiny(pos=pos, memory=memory)
    begin = np.full((1, T), 2**20, "int32")
    near = run(model, text(T), SEGMENTS, begin=begin * 0)
    assert apart(run(model, text(T), SEGMENTS, begin, at=2**20), near) < 10 * exact(memory)


PRUNING = [m for m in plugins.names("memory") if "budget" in small("memory", m)]


@pytest.mark.parametrize("memory", PRUNING)
def test_what_the_host_claims_of_slots_is_so(memory, monkeypatch):
    """Places.own_last: in a text that forgets, with padding, after documents; and that it is claimed where that saves a mask."""
    model, tokens, claims, true = tiny(memory=small("memory", memory)), text(60, 2), [], base.attend

    def asked(q, k, v, q_at, k_at, *rest, **how):
        claims.append(k_at.own_last)
        if k_at.own_last:
            at, own, T = ops.numpy(k_at.at), ops.numpy(q_at.at), q.shape[2]
            assert at.shape[2] == k.shape[2] and (at >= 0).all() and (at[..., -T:] == own).all() and (at[..., :-T] < own[..., :1]).all()
        return true(q, k, v, q_at, k_at, *rest, **how)

    for module in {base, plugins.load("memory", memory)}:
        if hasattr(module, "attend"):
            monkeypatch.setattr(module, "attend", asked)
    run(model, tokens, [[12], [12], [5, 1, 6], [12], [12]])
    # heads that keep more or less than others have empty slots, and so have vectors behind a segment left
    assert all(claims[:2]) and all(claims) == (memory not in ("adakv", "pooled", "tokens", "summary"))
    padded = tokens.copy()
    padded[1, [11, 22, 23]] = -1
    run(model, padded, whole(60, 12))
    state = model.start()
    for i, packed in enumerate((False, True, True, False, False)):
        # the second document begins at 20, and what stays of it leaves slots empty
        begin = ops.array(np.tile((np.arange(12) + 12 * i >= 20) * 20, (2, 1)).astype("int32")) if packed else None
        _, state = model(ops.array(tokens[:, 12 * i : 12 * i + 12]), state, begin=begin)


@pytest.mark.parametrize("memory", PRUNING)
def test_forgetting_agrees_with_the_specification(memory, monkeypatch):
    model, tokens, segments = tiny(memory=small("memory", memory)), text(60), [[12], [12], [5, 1, 6], [12], [12]]
    got = run(model, tokens, segments)
    monkeypatch.setattr(kernels, "ENGINE", "dense")
    assert apart(got, run(model, tokens, segments)) < 1e-4


# ---------------------------------------------------------------- logits that nobody wants are not made


@every("memory", MEMORY)
def test_the_last_logits_alone(memory, monkeypatch):
    """They and the state are the same, and the last block's MLP has seen no others, unless the model has vectors among its tokens."""
    model, tokens = tiny(memory=memory), ops.array(text(T, 2))
    whole_, after = model(tokens[:, :8], model.start(8, T))
    logits, after_ = model(tokens[:, :8], model.start(8, T), last=3)
    assert logits.shape[1] == 3 and apart(ops.numpy(logits), ops.numpy(whole_[:, -3:])) < 1e-5
    want, _ = model(tokens[:, 8:16], after)
    mlp, last, seen = MLP.forward, model.model.layers[-1].mlp, []
    monkeypatch.setattr(MLP, "forward", lambda self, x: (self is last and seen.append(x.shape[1])) or mlp(self, x))
    got, _ = model(tokens[:, 8:16], after_, last=1)
    assert apart(ops.numpy(got), ops.numpy(want[:, -1:])) < 1e-5
    assert seen == [1] or (model.around is not None and max(seen) >= 8)
