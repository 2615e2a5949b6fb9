"""Schemes that are no rotation, and one whose frequencies move: against the papers' formulas in plain numpy, float64."""

import itertools

import numpy as np
import pytest
from conftest import apart, has, loss_and_gradients, run, text, tiny, weights, whole
from test_positions import scheme

import kernels
import ops
import plugins
from errors import Refused
from model import Config, Llama, load, save
from positions import alibi, t5

T = 40


def naive(model, tokens, scores, window=None):
    """Logits [T, V] of one row, float64: a Llama in which scores(q, k, layer) [T, T] of head h, unscaled, stand for everything that
    positions do. q, k: [T, D] as projected. window: (w, g) sees the newest w tokens and the first g."""
    c, w = model.config, {n: a.astype("float64") for n, a in weights(model).items()}
    H, K, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    norm = lambda x, g: x / np.sqrt((x * x).mean(-1, keepdims=True) + c.rms_norm_eps) * g
    x, (i, j) = w["model.embed_tokens.weight"][tokens], np.ogrid[: len(tokens), : len(tokens)]
    see = (j <= i) if window is None else (j <= i) & ((i - j < window[0]) | (j < window[1]))
    for layer in range(c.num_hidden_layers):
        p = lambda name, layer=layer: w[f"model.layers.{layer}.{name}.weight"]
        h = norm(x, p("input_layernorm"))
        q, k, v = ((h @ p(f"self_attn.{n}_proj").T).reshape(len(h), -1, D) for n in "qkv")
        out = []
        for head in range(H):
            s = scores(q[:, head], k[:, head * K // H], layer, head) / np.sqrt(D)
            a = np.exp(np.where(see, s - np.where(see, s, -np.inf).max(1, keepdims=True), -np.inf))
            out.append(a / a.sum(1, keepdims=True) @ v[:, head * K // H])
        x = x + np.concatenate(out, 1) @ p("self_attn.o_proj").T
        h = norm(x, p("post_attention_layernorm"))
        gate = h @ p("mlp.gate_proj").T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ p("mlp.up_proj").T)) @ p("mlp.down_proj").T
    return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def distance(n):
    i, j = np.ogrid[:n, :n]
    return i - j


def of_alibi(model):
    """- m_h (i - j), which the square root of D does not divide."""
    c = model.config
    return lambda q, k, layer, h: q @ k.T - np.sqrt(c.head_dim) * alibi.slopes(c.num_attention_heads)[h] * distance(len(q))


def of_t5(model):
    c, w = model.config, weights(model)
    options = plugins.parse("positions", c.pos).options
    table = lambda layer: w[f"model.positions.{layer if options.layers == 'own' else 0}.relative_attention_bias.weight"].astype("float64")
    at = lambda n: t5.bucket(np.maximum(distance(n), 0), options)
    return lambda q, k, layer, h: q @ k.T + np.sqrt(c.head_dim) * options.gain * table(layer)[:, h][at(len(q))]


def of_xl(model):
    """The paper's appendix B: all distances at once, then each row shifted."""
    w, c = weights(model), model.config
    p = lambda layer, name: w[f"model.positions.{layer}.{name}.weight"].astype("float64")

    def scores(q, k, layer, h):
        n, D, width = len(q), c.head_dim, p(layer, "r_net").shape[1]
        u, v, W = p(layer, "r_w_bias")[h], p(layer, "r_r_bias")[h], p(layer, "r_net").reshape(-1, D, width)[h]
        angle = np.arange(n - 1, -1, -1)[:, None] * 10000 ** (-np.arange(0, width, 2) / width)  # the farthest first
        R = np.concatenate([np.sin(angle), np.cos(angle)], 1)
        BD = (q + v) @ W @ R.T
        shifted = np.concatenate([np.zeros((n, 1)), BD], 1).reshape(n + 1, n)[1:]
        return (q + u) @ k.T + shifted

    return scores


NAIVE = {"alibi": of_alibi, "t5:buckets=6,distance=9": of_t5, "t5:buckets=6,distance=9,layers=own": of_t5, "xl": of_xl, "xl:width=6": of_xl}
every = pytest.mark.parametrize("pos", NAIVE)


@every
def test_logits_equal_the_formula(pos):
    model = tiny(pos=pos)
    want = naive(model, text(T)[0], NAIVE[pos](model))
    assert apart(run(model, text(T))[0], want) < 1e-4
    assert apart(run(tiny(pos="none"), text(T))[0], want) > 1e-2, "or this test is blind"


@every
@pytest.mark.parametrize("heads", [3, 6, 8])
def test_any_number_of_heads(pos, heads):
    model = tiny(pos=pos, num_attention_heads=heads, num_key_value_heads=1 + (heads % 2 == 0), head_dim=8)
    assert apart(run(model, text(T))[0], naive(model, text(T)[0], NAIVE[pos](model))) < 1e-4


@every
@pytest.mark.parametrize("segment", [1, 3])
def test_a_pruned_cache_that_keeps_positions(pos, segment):
    """sinks with kv_positions=absolute: read token by token, a text sees its first tokens and the newest where they really stood."""
    model = tiny(pos=pos, memory="sinks:budget=10,sinks=2,kv_positions=absolute")
    got = run(model, text(T), whole(T, segment), room=T)[0]
    want = naive(model, text(T)[0], NAIVE[pos](model), (9, 2))
    if segment == 1:
        assert apart(got, want) < 1e-4
    else:
        # a token sees, besides what was kept, those of its own segment
        assert apart(got[:9], want[:9]) < 1e-4 and apart(got, want) > 1e-3


@pytest.mark.parametrize("pos", ["alibi", "t5", "xl", "rope", "none", "dynamic:original=16"])
def test_a_pruned_cache_that_renumbers(pos):
    """With reindex, which is the default, the sinks are felt just before the newest; without, where they stood."""
    model, absolute = (tiny(pos=pos, memory="sinks:budget=10,sinks=2" + more, layers=1) for more in ("", ",kv_positions=absolute"))
    state = model.start(4, T)
    with ops.no_grad():
        for i in range(0, T, 4):
            _, state = model(ops.array(text(T)[:, i : i + 4]), state)
    held = ops.numpy(state["layers"][0]["pos"])[0, 0]
    assert sorted(held[held >= 0]) == list(range(T - 10, T))
    new, old = (run(m, text(T), whole(T, 4), room=T) for m in (model, absolute))
    assert apart(new[:, :12], old[:, :12]) < 1e-4
    assert (apart(new, old) > 1e-3) == (pos != "none")


def test_slopes_of_the_paper():
    """Eight heads: 1/2, 1/4, ... 1/256; twelve: those, and every other one of sixteen."""
    assert alibi.slopes(8) == [2.0**-h for h in range(1, 9)]
    np.testing.assert_allclose(alibi.slopes(12)[8:], [0.70711, 0.35355, 0.17678, 0.08839], atol=1e-5)
    for H in range(1, 70):
        s = alibi.slopes(H)
        assert len(s) == len(set(s)) == H and all(0 < x < 1 for x in s)


@pytest.mark.parametrize("pos", [*NAIVE, "rope", "dynamic:original=16", "yarn:original=16"])
def test_projections_of_global_tokens_feel_distance_too(pos):
    """A second set of projections, which begins as a copy, gives what the first gives, whatever the scheme."""
    own, plain = (tiny("longformer:window=5,n_global=4" + more, pos) for more in (",own_projections=true", ""))
    for segments in (None, whole(T)) if "dynamic" not in pos else (None, [[T]]):
        assert apart(run(own, text(T), segments), run(plain, text(T), segments)) < 1e-4


# ---------------------------------------------------------------- t5


def test_buckets_by_hand():
    o = t5_options()
    got = t5.bucket(np.array([0, 1, 15, 16, 20, 26, 32, 64, 112, 113, 127, 128, 10**6]), o)
    assert got.tolist() == [0, 1, 15, 16, 17, 19, 21, 26, 30, 31, 31, 31, 31]


def t5_options(**given):
    return plugins.parse("positions", "t5:" + ",".join(f"{k}={v}" for k, v in given.items())).options


@pytest.mark.skipif(not has("torch", "transformers"), reason="the reference is transformers on torch: install both")
@pytest.mark.parametrize("buckets, far", list(itertools.product([2, 4, 7, 32, 64], [40, 128, 1000])), ids=str)
def test_buckets_equal_transformers(buckets, far):
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    d = np.arange(2 * far)
    theirs = T5Attention._relative_position_bucket(-torch.as_tensor(d), False, buckets, far).numpy()
    np.testing.assert_array_equal(t5.bucket(d, t5_options(buckets=buckets, distance=far)), theirs)


@pytest.mark.parametrize("layers, tables", [("shared", 1), ("own", 3)])
def test_tables_are_shared_or_not(layers, tables):
    model = tiny(pos=f"t5:layers={layers}", layers=3)
    assert sum("relative_attention_bias" in n for n in ops.parameters(model)) == tables == len(model.model.positions)


@pytest.mark.parametrize("pos", ["alibi", "t5", "t5:layers=own", "xl:width=8", "dynamic", "none"])
def test_fine_tuned_into_a_model_of_rope(pos, tmp_path, tokenizer_files):
    """A checkpoint takes another scheme, trains with it, and is saved and loaded with it."""
    save(tiny(), tmp_path / "rope", tokenizer_files)
    model, _ = load(tmp_path / "rope", pos=pos, dtype="float32")
    losses, adam = [], ops.AdamW(model, (0.9, 0.95), 1e-8, 0.0)
    for _ in range(8):
        loss, grads = loss_and_gradients(model, text(24, 2))
        losses.append(loss)
        adam.step({n: ops.array(g) for n, g in grads.items()}, 1e-2)
    assert losses[-1] < 0.8 * losses[0]
    save(model, tmp_path / "tuned", tokenizer_files)
    again, _ = load(tmp_path / "tuned", dtype="float32")
    assert again.config.pos == pos
    np.testing.assert_array_equal(run(again, text(24)), run(model, text(24)))
    assert (tmp_path / "tuned" / "nanolong.safetensors").is_file() == (pos[:2] in ("t5", "xl"))


@pytest.mark.parametrize("pos", ["t5:buckets=6,distance=9", "t5:buckets=6,distance=9,layers=own", "xl:width=6"])
@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "recomputed"])
def test_their_own_weights_train(pos, checkpoint, use):
    """Gradients of what a scheme learns, by central differences; whether blocks are recomputed or not."""
    use("dense")
    model = Llama(tiny(pos=pos).config).init(seed=1, std=0.2)
    model.model.run = ops.checkpoint if checkpoint else ops.call
    _, grads = loss_and_gradients(model, text(24, 2))
    mine = {n: g for n, g in grads.items() if n.startswith("model.positions.")}
    assert len(mine) == sum(n.startswith("model.positions.") for n in ops.parameters(model)) > 0
    draw = np.random.default_rng(0)
    for name, g in mine.items():
        p = ops.numpy(ops.parameters(model)[name]).copy()
        step = draw.normal(size=p.shape).astype("float32")
        at = []
        for e in (2e-3, -2e-3):
            ops.set_parameters(model, {name: ops.array(p + e * step)})
            at.append(loss_and_gradients(model, text(24, 2))[0])
        ops.set_parameters(model, {name: ops.array(p)})
        want = (at[0] - at[1]) / 4e-3
        assert (g * step).sum() == pytest.approx(want, rel=2e-2, abs=1e-3), name
        assert np.abs(g).max() > 1e-5


def test_xl_layers_share_their_angles(monkeypatch):
    """Weights are a layer's own, sines and cosines are computed once a call."""
    model, calls = tiny(pos="xl", layers=3), []
    angles = ops.angles
    monkeypatch.setattr(ops, "angles", lambda *x: calls.append(1) or angles(*x))
    run(model, text(8))
    assert len(calls) == 1 and len(model.model.positions) == 3


# ---------------------------------------------------------------- dynamic


def test_dynamic_is_rope_up_to_its_length():
    model, plain = tiny(pos="dynamic:original=16"), tiny()
    assert apart(run(model, text(16)), run(plain, text(16))) < 1e-5
    assert apart(run(model, text(16), [[5], [1] * 11]), run(plain, text(16))) < 1e-4
    assert apart(run(model, text(17)), run(plain, text(17))) > 1e-4


@pytest.mark.parametrize("pieces", [[[20], *[[1]] * 12], [[7, 9], [1] * 8, [3, 5]], [[1] * 32]], ids=str)
def test_dynamic_keys_never_go_stale(pieces):
    """One layer: wherever a call ends, the last logits are those of the text so far read at once: its keys are turned by the base of the
    moment. (In deeper layers keys were made of what older bases gave, whoever caches them.)"""
    model = tiny(pos="dynamic:original=16", layers=1)
    got, ends = run(model, text(32), pieces, room=32), np.cumsum([n for segment in pieces for n in segment])
    for n in ends:
        assert apart(got[:, n - 1], run(model, text(32)[:, :n])[:, -1]) < 1e-4


def test_dynamic_from_numbers_on_the_device():
    """Where the host does not know the length, in a static graph or with documents, frequencies come from float32."""
    model = tiny(pos="dynamic:original=16,factor=3")
    for n in (10, 24, 40):
        assert apart(run(model, text(n), begin=np.zeros((1, n), "int32")), run(model, text(n))) < 1e-4
    for n in (1000, 2**20):
        at = kernels.Places(ops.array(np.arange(n)[None, None].astype("int32")))
        position = scheme(Config(**{**vars(model.config), "head_dim": 64}))
        known, unknown = (ops.numpy(position.turn(at._replace(first=first))[2]).ravel() for first in (0, None))
        np.testing.assert_allclose(unknown, known, rtol=1e-6, atol=1)


@pytest.mark.parametrize(
    "pos", ["dynamic:original=16", "alibi", "t5:buckets=6,distance=9", "xl", "none", "yarn:original=16", "rope:partial=0.5"]
)
@pytest.mark.parametrize("memory", ["full", "window:budget=10", "sinks:budget=10,sinks=2", "sinks:budget=10,sinks=2,kv_positions=absolute"])
def test_static_steps_equal_plain_ones(pos, memory):
    """One token a call as a static graph has it, closes included: for every scheme and memory."""
    model, tokens, n = tiny(pos=pos, memory=memory), text(T), 8
    want = run(model, tokens, [[8], *[[1] * 8] * 4], room=T)
    with ops.no_grad():
        y, state = model(ops.array(tokens[:, :n]), model.start(n, T))
    got = [ops.numpy(y)]
    step = ops.static(lambda x, s, close: model(x, s, close=close), model.still(state), (False, True))
    for t in range(n, T):
        got.append(ops.numpy(step(int(tokens[0, t]), (t + 1) % n == 0)))
    assert apart(np.concatenate(got, 1), want) < 1e-4


WITHOUT_ROTATION = ["alibi", "t5:buckets=6,distance=9", "xl", "none"]
MEMORIES = ["full", "window:budget=10", "sinks:budget=10,sinks=2", "sinks:budget=10,sinks=2,kv_positions=absolute"]


@pytest.mark.parametrize("pos", [*WITHOUT_ROTATION, "rope:partial=0.5", "yarn:original=16"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_pieces_equal_the_segment(pos, memory):
    """At a budget that binds: token by token, in odd pieces, and as whole segments; and of two documents in a row, each as if alone."""
    model, tokens = tiny(pos=pos, memory=memory, attn="longformer:window=7,n_global=2"), text(24, 2)
    want = run(model, tokens, whole(24))
    for pieces in ([[1] * 8] * 3, [[3, 5], [7, 1], [1, 2, 5]]):
        assert apart(run(model, tokens, pieces, room=24), want) < 1e-4
    begin = np.repeat([[0] * 11 + [11] * 13], 2, 0).astype("int32")
    packed = run(model, tokens, whole(24), begin)
    assert apart(packed[:, :11], want[:, :11]) < 1e-4
    assert apart(packed[:, 11:], run(model, tokens[:, 11:], [[5], [8]])) < 1e-4


@pytest.mark.skipif(ops.BACKEND != "torch", reason="torch's compiler")
@pytest.mark.parametrize("pos", ["rope", "dynamic:original=16", "alibi", "t5:buckets=6,distance=9", "xl"])
def test_a_step_is_one_graph(pos):
    """A block of a one-token step, closes included, is compiled whole: no scheme breaks the graph."""
    import torch

    model = tiny(pos=pos, memory="sinks:budget=10,sinks=2")
    want = run(model, text(T), [[8], *[[1] * 8] * 4], room=T)
    usual, got = (model.run, model.model.run), []
    model.run = model.model.run = torch.compile(ops.call, fullgraph=True, dynamic=False, backend="eager")
    try:
        with ops.no_grad():
            y, state = model(ops.array(text(T)[:, :8]), model.start(8, T))
            got, state = [ops.numpy(y)], model.still(state)
            for t in range(8, T):
                y, state = model(ops.array(text(T)[:, t : t + 1]), state, close=(t + 1) % 8 == 0)
                got.append(ops.numpy(y))
    finally:
        model.run, model.model.run = usual
        torch.compiler.reset()
    assert apart(np.concatenate(got, 1), want) < 1e-4


# ---------------------------------------------------------------- partial rotary


@pytest.mark.parametrize("how", [{"pos": "rope:partial=0.5"}, {"partial_rotary_factor": 0.5}], ids=["flag", "config"])
def test_part_of_a_head_turns(how):
    """The first half of the channels turns as a head of half the width does, the other half not at all."""
    model = tiny(**how)

    def scores(q, k, layer, h):
        f = 10000.0 ** (-np.arange(0, 4, 2) / 4)

        def turned(x):
            angle, (a, b) = np.arange(len(x))[:, None] * f, (x[:, :2], x[:, 2:4])
            return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle), x[:, 4:]], 1)

        return turned(q) @ turned(k).T

    assert model.config.head_dim == 8
    assert apart(run(model, text(T))[0], naive(model, text(T)[0], scores)) < 1e-4
    assert apart(run(tiny(), text(T)), run(model, text(T))) > 1e-2


def test_a_layer_without_positions():
    """iRoPE and NoPE mixes: a pattern over the layers."""
    model, f = tiny(pos="none/rope"), 10000.0 ** (-np.arange(0, 8, 2) / 8)

    def scores(q, k, layer, h):
        angle = np.arange(len(q))[:, None] * f * layer
        turned = lambda x: (x[:, :4] + 1j * x[:, 4:]) * np.exp(1j * angle)
        return (turned(q) @ turned(k).conj().T).real

    assert apart(run(model, text(T))[0], naive(model, text(T)[0], scores)) < 1e-4


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "spec, says",
    [
        ("t5:buckets=1", "at least 2"),
        ("t5:buckets=32,distance=16", "distance above half"),
        ("t5:layers=both", "choose shared or own"),
        ("xl:width=7", "must be even"),
        ("xl:width=-2", "must be even"),
        ("dynamic:factor=0.5", "would shorten"),
        ("dynamic:original=-1", "at least 1, or 0"),
        ("rope:partial=1.5", "at most 1"),
        ("alibi:slope=2", "no option 'slope'"),
    ],
)
def test_bad_options_are_refused(spec, says):
    with pytest.raises(Refused, match=says) as no:
        plugins.parse("positions", spec)
    assert "\n" not in str(no.value)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"pos": "rope:partial=0.4", "head_dim": 8}, "0.4 of head_dim=8 is odd"),
        ({"pos": "rope:partial=0.1", "head_dim": 8}, "0.1 of head_dim=8 is nothing"),
        ({"pos": "dynamic", "head_dim": 2}, "single pair"),
        ({"pos": "dynamic", "head_dim": 7}, "head_dim=7 is odd"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ({"pos": "xl", "hidden_size": 33, "head_dim": 8}, "even width"),
    ],
    ids=str,
)
def test_impossible_models_are_refused(changes, says):
    from conftest import TINY

    with pytest.raises(Refused, match=says) as no:
        Llama(Config(**{**TINY, "num_hidden_layers": 1, **changes}))
    assert "\n" not in str(no.value)


def test_unknown_kv_positions_are_refused():
    with pytest.raises(Refused, match="choose reindex or absolute"):
        plugins.parse("memory", "sinks:kv_positions=maybe")
