"""Longformer's second set of projections, for global tokens as queries: against numpy, at any way of reading, saved and loaded."""

import numpy as np
import pytest
from conftest import TINY, apart, influence, loss_and_gradients, run, text, tiny, weights, whole

import ops
import plugins
from errors import Refused
from model import Config, Llama, load, save

PLAIN, T, N = "longformer:window=3,n_global=5", 24, 5
SPEC = PLAIN + ",own_projections=true"
DOCUMENTS = np.array([[0] * 3 + [3] * 9 + [12] * 12], "int32")


def model(moved=True, memory="full", **changes):
    """A tiny model whose second set has moved away from the first."""
    m = Llama(Config(**{**TINY, "num_hidden_layers": 2, "attn": SPEC, "memory": memory, **changes})).init(seed=1, std=0.2)
    draw = np.random.default_rng(9)
    for name, p in ops.parameters(m).items() if moved else ():
        if "_global" in name:
            ops.set_parameters(m, {name: p + ops.array(draw.normal(size=p.shape).astype("float32")) * 0.1})
    return m


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True}, {"num_key_value_heads": 4}], ids=str)
def test_it_begins_as_the_base(changes):
    for begin in (None, DOCUMENTS):
        want = run(tiny(PLAIN, **changes), text(T), begin=begin)
        assert apart(run(model(moved=False, **changes), text(T), begin=begin), want) < 1e-5
        assert apart(run(model(**changes), text(T), begin=begin), want) > 1e-2


def by_hand(m, tokens, begin):
    """Logits of a one-layer model without rotation, float64, from the paper's definition: a global token's query, and all keys and values
    that it reads, come from the second set; every other query reads all with the first."""
    c, w = m.config, {n.removeprefix("model.layers.0."): a.astype("float64") for n, a in weights(m).items()}
    norm = lambda x, g: x / np.sqrt((x * x).mean(-1, keepdims=True) + c.rms_norm_eps) * w[g + ".weight"]
    H, K, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    x = w["model.embed_tokens.weight"][tokens]
    h, at = norm(x, "input_layernorm"), np.arange(len(tokens))
    first = {n: (h @ w[f"self_attn.{n}_proj.weight"].T).reshape(len(h), -1, D) for n in "qkv"}
    second = {n: (h @ w[f"self_attn.memory.{n}_global.weight"].T).reshape(len(h), -1, D) for n in "qkv"}
    y = np.zeros((len(h), H, D))
    for t, i in np.ndindex(len(h), H):
        p = second if t - begin[t] < N else first
        see = (at <= t) & (at >= begin[t]) & ((t - at < 3) | (at - begin[t] < N))
        s = np.exp(p["k"][see, i * K // H] @ p["q"][t, i] / np.sqrt(D))
        y[t, i] = s @ p["v"][see, i * K // H] / s.sum()
    x = x + y.reshape(len(h), -1) @ w["self_attn.o_proj.weight"].T
    h = norm(x, "post_attention_layernorm")
    gate, up = (h @ w[f"mlp.{n}_proj.weight"].T for n in ("gate", "up"))
    x = x + (gate / (1 + np.exp(-gate)) * up) @ w["mlp.down_proj.weight"].T
    return norm(x, "model.norm") @ w["lm_head.weight"].T


@pytest.mark.parametrize("begin", [np.zeros((1, T), "int32"), DOCUMENTS], ids=["one document", "packed"])
def test_against_numpy(begin):
    m = model(num_hidden_layers=1, pos="none")
    assert apart(run(m, text(T), begin=begin)[0], by_hand(m, text(T)[0], begin[0])) < 1e-4


@pytest.mark.parametrize("memory", ["full", "sinks:budget=99"])
@pytest.mark.parametrize(
    "segments", [whole(T), whole(T, 1), [[3, 5], [7, 1], [1, 2, 5]], [[1, 1], [2, 20]]], ids=["8s", "1s", "odd", "early"]
)
def test_pieces_equal_the_whole(memory, segments):
    tokens, m = text(T, 2), model(memory=memory)
    for begin in (None, np.repeat(DOCUMENTS, 2, 0)) if memory == "full" else (None,):
        want = run(model(), tokens, begin=begin)
        if memory == "full":
            for room in (0, T):
                assert apart(run(m, tokens, segments, begin, room=room), want) < 1e-4
    if memory != "full":
        # sinks see everything, whatever the pattern: only the global tokens themselves are the same
        assert apart(run(m, tokens, segments)[:, :N], want[:, :N]) < 1e-4


def test_rows_of_different_length():
    """Prompts of 8, 3 and 1 tokens padded to 8: what a later global token needs is not pushed out by padding."""
    m, tokens, lengths = model(), text(T, 3), (8, 3, 1)
    for row, n in enumerate(lengths):
        tokens[row, n:8] = -1
    steps = [[8], *[[1] * 4] * 4]
    together = run(m, tokens, steps, room=T)
    for row, n in enumerate(lengths):
        live = tokens[row] >= 0
        assert apart(together[row : row + 1, live], run(m, tokens[row : row + 1, live], [[n], *steps[1:]], room=T)) < 1e-4


def test_static_steps():
    m, tokens = model(), text(T)
    want = run(m, tokens, whole(T), room=T)
    with ops.no_grad():
        y, state = m(ops.array(tokens[:, :2]), m.start(8, T), close=False)
    got = [ops.numpy(y)]
    step = ops.static(lambda x, s, close: m(x, s, close=close), m.still(state), (False, True))
    for t in range(2, T):
        got.append(ops.numpy(step(int(tokens[0, t]), (t + 1) % 8 == 0)))
    assert apart(np.concatenate(got, 1), want) < 1e-4


def test_no_leak_and_documents():
    m = model()
    for segments in (None, whole(T)):
        moved = influence(m, text(T), segments, DOCUMENTS)
        assert np.tril(moved, -1).max() < 1e-5
        assert moved[DOCUMENTS[0][:, None] != DOCUMENTS[0]].max() < 1e-5


def test_a_temperature_multiplies_the_logits_of_both_sets():
    warm, longer = model(), model()
    warm.model.positions[0].temperature = 2.0
    ops.set_parameters(longer, {n: p * 2 for n, p in ops.parameters(longer).items() if "q_proj" in n or "q_global" in n})
    assert apart(run(warm, text(T)), run(longer, text(T))) < 1e-4 < 1e-2 < apart(run(warm, text(T)), run(model(), text(T)))


def test_both_sets_train():
    m = model()
    _, grads = loss_and_gradients(m, text(T + 1, 2))
    assert sum("_global" in n for n in grads) == 6 and all(np.abs(g).max() > 0 for g in grads.values())


def test_the_second_set_costs_nothing_after_the_first_tokens():
    m, calls = model(), []
    real = m.model.layers[0].self_attn.memory.q_global.forward
    m.model.layers[0].self_attn.memory.q_global.forward = lambda x: calls.append(x.shape[1]) or real(x)
    run(m, text(T), [[T]])
    run(m, text(T), [[3], [1], [4], [16]])
    assert calls == [N, 3, 1, 1]


def test_saved_and_loaded(tmp_path, tokenizer_files):
    m = model()
    save(m, tmp_path / "m", tokenizer_files)
    assert len(ops.read_safetensors(tmp_path / "m" / "nanolong.safetensors")) == 6
    again, _ = load(tmp_path / "m", dtype="float32")
    np.testing.assert_array_equal(run(again, text(T)), run(m, text(T)))
    # other libraries' weights begin with copies, in memory of their own
    save(tiny(PLAIN), tmp_path / "plain", tokenizer_files)
    fresh, _ = load(tmp_path / "plain", attn=SPEC, dtype="float32")
    assert apart(run(fresh, text(T)), run(tiny(PLAIN), text(T))) < 1e-5
    name = "model.layers.0.self_attn.memory.q_global.weight"
    before = ops.numpy(ops.parameters(fresh)[name]).copy()
    adam, (_, grads) = ops.AdamW(fresh, (0.9, 0.95), 1e-8, 0.0), loss_and_gradients(fresh, text(T))
    adam.step({n: ops.array(g * (name not in n)) for n, g in grads.items()}, 1e-2)
    np.testing.assert_array_equal(ops.numpy(ops.parameters(fresh)[name]), before)


def test_refused():
    with pytest.raises(Refused, match="own_projections=true, n_global=0"):
        plugins.parse("attention", "longformer:n_global=0,own_projections=true")
