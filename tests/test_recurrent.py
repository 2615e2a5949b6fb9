"""Memories that sum up the past: state, melodi and compressive, each against its definition written out, and what all must hold."""

import numpy as np
import pytest
from conftest import apart, influence, run, text, tiny, whole

import ops
import plugins
import segments
import train
from errors import Refused
from kernels import Places
from memory.compressive import COMPRESS
from model import Segment, load, save

train.use_backend(None)

T = 24
SQUEEZED = [f"compressive:length=6,compressed=4,rate=3,compress={kind}" for kind in COMPRESS]
SUMS = ["state:size=3", "state:size=3,cell=mlp", "melodi:short=3,long=2,windows=2", "summary:k=3,chunks=2", *SQUEEZED]
# what each is with a gate that is closed
BASE = {"state": "none", "melodi": "none", "summary": "none", "compressive": "xl:length=6"}
numbers = lambda grads: {n: ops.numpy(g) for n, g in grads.items()}


@pytest.fixture
def learning():
    used = []
    yield lambda model: used.append(model) or model.model.patterns(training=True) or model
    for model in used:
        model.model.patterns(training=False)


@pytest.mark.parametrize("memory", SUMS)
def test_a_closed_gate_leaves_the_model_as_it_was(memory):
    tokens, base = text(T, 2), tiny(memory=BASE[memory.partition(":")[0]])
    want = run(base, tokens, whole(T))
    assert apart(run(tiny(memory=memory), tokens, whole(T)), want) < 1e-4
    assert apart(run(tiny(memory=memory + ",closed=false"), tokens, whole(T)), want) > 1e-2


@pytest.mark.parametrize("memory", SUMS)
def test_odd_pieces_and_rows_of_different_length(memory):
    """The options that the folder's own tests do not take."""
    model, tokens = tiny(memory=memory + ",closed=false"), text(32, 3)
    want = run(model, tokens, whole(32))
    for pieces in ([[1] * 8] * 4, [[3, 5], [7, 1], [1, 2, 5], [8]]):
        assert apart(run(model, tokens, pieces, room=32), want) < 1e-4
    # a row has nothing in the second segment: what it knew then is known in the fourth
    tokens[1, 5:8] = tokens[2, 5:8] = tokens[1, 8:10] = tokens[2, 8:16] = -1
    together = run(model, tokens, whole(32))
    for row, alone in ((1, [[5], [6], [8], [8]]), (2, [[5], [8], [8]])):
        live = tokens[row] >= 0
        assert apart(together[row : row + 1, live], run(model, tokens[row : row + 1, live], alone)) < 1e-4


@pytest.mark.parametrize("memory", SUMS)
def test_it_reaches_over_a_segment(memory):
    """In a model of one layer, further back than what is kept as it is."""
    moved = influence(tiny(memory=memory + ",closed=false", layers=1), text(32), whole(32))
    assert moved[:8, 24:].max() > 1e-4
    assert influence(tiny(memory=BASE[memory.partition(":")[0]], layers=1), text(32), whole(32))[:8, 24:].max() < 1e-6


@pytest.mark.parametrize("memory", SUMS)
def test_the_state_does_not_grow(memory):
    model, sizes = tiny(memory=memory), []
    with ops.no_grad():
        state = model.start()
        for i in range(6):
            _, state = model(ops.array(text(8, seed=i)), state)
            total = []
            ops.tree_map(lambda a, total=total: total.append(ops.nbytes(a)), state)
            sizes.append(sum(total))
    assert len(set(sizes[1:])) == 1


@pytest.mark.parametrize("memory", ["state", "melodi:short=3,long=2", "compressive"])
def test_weights_are_saved(memory, tmp_path, tokenizer_files):
    model = tiny(memory=memory + (",closed=false" if ":" in memory else ":closed=false"))
    save(model, tmp_path / "c", tokenizer_files)
    again, _ = load(tmp_path / "c")
    assert apart(run(again, text(T), whole(T)), run(model, text(T), whole(T))) < 1e-6


# ---------------------------------------------------------------- melodi


def test_the_short_term_memory_is_the_papers_concatenation():
    """[m ; x ; u] through every layer, m from the same layer and the window before; the long-term gate shut."""
    model, plain, tokens, n = tiny(memory="melodi:short=3,long=2,closed=false"), tiny(), text(T, 2), 8
    gates = [name for name in ops.parameters(model) if "open" in name]
    kept = {name: ops.parameters(model)[name] for name in gates}
    ops.set_parameters(model, {name: p * 0 - 1e4 for name, p in kept.items()})
    try:
        got = run(model, tokens, whole(T))
    finally:
        ops.set_parameters(model, kept)
    C, out, before, at = model.config.hidden_size, [], [None, None], 0
    norm = lambda x, m: x / np.sqrt((x**2).mean(-1, keepdims=True) + m.norm.eps) * ops.numpy(m.norm.weight)
    mix = lambda u, m: np.swapaxes(np.swapaxes(norm(u, m), 1, 2) @ ops.numpy(m.mix.weight).T + ops.numpy(m.mix.bias), 1, 2)
    with ops.no_grad():
        for i in range(0, T, n):
            x = model.model.embed_tokens(ops.array(tokens[:, i : i + n]))
            x = ops.cat([x, ops.expand(model.around.vectors.weight[None], (2, 3, C))], 1)
            for layer, (block, theirs) in enumerate(zip(plain.model.layers, model.model.layers)):
                m = before[layer]
                whole_x = x if m is None else ops.cat([m, x], 1)
                first = at if m is None else at - 3
                places = Places(ops.expand(ops.arange(whole_x.shape[1], x)[None, None] + first, (2, 1, whole_x.shape[1])))
                p = plain.model.positions[0]
                seg = Segment(places, None, p, p.turn(places, None), None, False)
                y, _ = block(whole_x, seg, block.self_attn.memory.start(0, 0))
                y = y[:, -x.shape[1] :]
                u, memory = ops.numpy(y[:, n:]), theirs.self_attn.memory
                before[layer] = ops.array((u + mix(u, memory.to_short)).astype("float32"))
                x = ops.cat([y[:, :n], ops.array((u + mix(u, memory.to_summary)).astype("float32"))], 1)
            out.append(ops.numpy(plain.head(x[:, :n])))
            at += n + 3
    assert apart(got, np.concatenate(out, 1)) < 1e-4


def test_the_long_term_memory_is_one_layers_and_a_queue():
    model = tiny(memory="melodi:short=3,long=2,windows=2,closed=false")
    with ops.no_grad():
        state, seen = model.start(), []
        for i in range(4):
            _, state = model(ops.array(text(8, seed=i)), state)
            seen.append(ops.numpy(state["layers"][1]["long"]["k"]))
    assert "long" not in state["layers"][0] and [k.shape[2] for k in seen] == [2, 4, 4, 4], "no room for windows that have not been"
    np.testing.assert_array_equal(seen[3][:, :, :2], seen[2][:, :, 2:])


# ---------------------------------------------------------------- compressive


@pytest.mark.parametrize("kind", ["mean", "max", "conv", "dilated"])
def test_what_is_squeezed(kind):
    """Layer 0's inputs are known: its squeezed memories against numpy, and where they stand."""
    model, tokens = tiny(memory=f"compressive:length=6,compressed=4,rate=3,compress={kind}"), text(16)
    with ops.no_grad():
        state = model.start()
        for i in (0, 8):
            _, state = model(ops.array(tokens[:, i : i + 8]), state)
        block = model.model.layers[0]
        x = ops.numpy(block.input_layernorm(model.model.embed_tokens(ops.array(tokens))))[0].astype("float64")
    # the first segment lets 2 tokens go, the second 8: groups are counted from the newest
    zero = np.zeros((1, x.shape[1]))
    groups = [[zero[0], x[0], x[1]], [zero[0], x[2], x[3]], x[4:7], x[7:10]]
    if kind == "mean":
        want = [np.sum(g, 0) / n for g, n in zip(groups, (2, 2, 3, 3))]
    elif kind == "max":
        want = [np.max(g, 0) for g in ([x[0], x[1]], [x[2], x[3]], x[4:7], x[7:10])]
    else:
        w = ops.numpy(block.self_attn.memory.squeeze.weight).astype("float64")
        # dilated: every second of six, ending with the group's newest
        pick = {"conv": groups, "dilated": [[zero[0], zero[0], x[1]], [zero[0], zero[0], x[3]], [x[2], x[4], x[6]], [x[5], x[7], x[9]]]}[
            kind
        ]
        want = [w @ np.concatenate(g) for g in pick]
    side = state["layers"][0]["side"]
    np.testing.assert_array_equal(ops.numpy(side["pos"])[0, 0], [1, 3, 6, 9])
    v = np.stack(want) @ ops.numpy(block.self_attn.v_proj.weight).T.astype("float64")
    assert apart(ops.numpy(side["v"])[0].transpose(1, 0, 2).reshape(4, -1), v) < 1e-4


def test_the_most_used_stays():
    """Of each group the token with most attention: the value of one of its tokens, and the one that h2o would rank first."""
    model, tokens = tiny(memory="compressive:length=6,compressed=4,rate=4,compress=used"), text(8)
    with ops.no_grad():
        _, state = model(ops.array(tokens), model.start())
        # as h2o counts, with room for everything
        _, counted = tiny(memory="h2o:budget=64")(ops.array(tokens), tiny(memory="h2o:budget=64").start())
        block = model.model.layers[0]
        v = ops.numpy(block.self_attn.v_proj(block.input_layernorm(model.model.embed_tokens(ops.array(tokens)))))[0]
    mass = ops.numpy(counted["layers"][0]["mass"]).sum(1)[0]
    best = int(mass[:2].argmax())
    got = ops.numpy(state["layers"][0]["side"]["v"])[0, :, -1].reshape(-1)
    assert np.abs(got - v[best]).max() < 1e-4 < np.abs(got - v[1 - best]).max()


def parts(model, tokens, n):
    """(gradients of the language model's loss alone, of the auxiliary loss alone), by one graph."""

    def f(which):
        def loss():
            state, total, aux = segments_start(model), 0, 0
            for i in range(0, tokens.shape[1] - 1, n):
                x, y = ops.array(tokens[:, i : i + n]), ops.array(tokens[:, i + 1 : i + n + 1])
                logits, state, _, a = segments.read(model, x[:, : y.shape[1]], state)
                total, aux = total + ops.cross_entropy(logits, y).sum(), aux + a
            return total if which == "lm" else aux

        return loss

    return [numbers(ops.value_and_grad(model, f(which))[1]) for which in ("lm", "aux")]


def segments_start(model):
    state = model.start()
    return {**state, "layers": [{**s, "capacity": 0} for s in state["layers"]]}


def test_the_compressor_learns_from_its_own_loss_alone(learning):
    model = learning(tiny(memory="compressive:length=6,compressed=4,rate=3,closed=false"))
    lm, aux = parts(model, text(25, 2), 8)
    for name in lm:
        mine = "squeeze" in name
        assert (np.abs(lm[name]).max() == 0) == mine, name
        assert (np.abs(aux[name]).max() > 0) == mine, name


def test_the_auxiliary_loss_reaches_the_trainer(learning):
    """Through segments.accumulate, which reports the language model's loss alone."""
    model = learning(tiny(memory="compressive:length=6,compressed=4,rate=3,closed=false"))
    tokens = text(25, 2)
    batch = train.data.Batch(tokens[:, :-1], tokens[:, 1:], np.zeros((2, 24), "int32"), [[]] * 2)
    _, grads = segments.accumulate(model, segments.cut(batch, 8), train.nats, {}, 0)
    lm, aux = parts(model, tokens, 8)
    for name, g in numbers(grads).items():
        want = lm[name] + aux[name]
        assert np.abs(g - want).max() < 1e-4 * np.abs(want).max() + 1e-7, name


def test_the_loss_is_the_attention_that_is_lost(learning):
    """Against numpy in float64, one layer, one segment of 10 tokens of which 6 stay."""
    model = learning(tiny(memory="compressive:length=6,compressed=4,rate=2", layers=1))
    tokens = text(10)
    block = model.model.layers[0]
    with ops.no_grad():
        x = ops.numpy(block.input_layernorm(model.model.embed_tokens(ops.array(tokens))))[0].astype("float64")
        *_, aux = segments.read(model, ops.array(tokens), None)
    attn = block.self_attn
    heads = lambda proj, m: (m @ ops.numpy(proj.weight).T.astype("float64")).reshape(len(m), -1, attn.D).transpose(1, 0, 2)
    w = ops.numpy(attn.memory.squeeze.weight).astype("float64")
    new = np.stack([w @ x[0:2].reshape(-1), w @ x[2:4].reshape(-1)])

    def look(m):
        k, v = (heads(p, m).repeat(2, 0) for p in (attn.k_proj, attn.v_proj))
        e = heads(attn.q_proj, x) @ k.transpose(0, 2, 1) / np.sqrt(attn.D)
        p = np.exp(e - e.max(-1, keepdims=True))
        return p / p.sum(-1, keepdims=True) @ v

    want = ((look(x[:4]) - look(new)) ** 2).mean()
    assert abs(float(ops.numpy(aux)) / want - 1) < 1e-4


def test_what_cannot_be_is_refused():
    for spec, sentence in (
        ("state:size=0", "at least 1"),
        ("state:cell=lstm", "choose gru or mlp"),
        ("melodi:windows=0", "at least 1"),
        ("compressive:rate=0", "at least 1"),
        ("compressive:compress=zip", "choose one of mean, max"),
        ("compressive:gain=0", "moves no gate"),
    ):
        with pytest.raises(Refused, match=sentence):
            plugins.parse("memory", spec)
