"""Infini-attention as its paper has it, written out token by token of a segment in plain numpy, and what it promises a trained model."""

import numpy as np
import pytest
from conftest import apart, run, text, tiny, weights, whole
from test_segments import batch, by_hand, in_segments, off

import ops


def infini_attention(model, tokens, n, delta):
    """Logits [T, V] of one row in segments of n, float64, by equations 2 to 6 and 10 of arXiv:2404.07143, keys turned where they stand."""
    c, w = model.config, {name: a.astype("float64") for name, a in weights(model).items()}
    H, K, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    norm = lambda x, g: x / np.sqrt((x * x).mean(-1, keepdims=True) + c.rms_norm_eps) * g
    sigma = lambda x: np.where(x > 0, x, np.exp(np.minimum(x, 0)) - 1) + 1
    memory = [[(np.zeros((D, D)), np.zeros(D)) for _ in range(K)] for _ in range(c.num_hidden_layers)]
    logits = []

    def turn(x, at):  # [T, D]
        angle = at[:, None] * c.rope_theta ** (-np.arange(0, D, 2) / D)
        a, b = x[:, : D // 2], x[:, D // 2 :]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], 1)

    for i in range(0, len(tokens), n):
        x = w["model.embed_tokens.weight"][tokens[i : i + n]]
        T, at = len(x), np.arange(i, i + len(x))
        for layer in range(c.num_hidden_layers):
            p = lambda name, layer=layer: w[f"model.layers.{layer}.{name}"]
            h = norm(x, p("input_layernorm.weight"))
            q, k, v = ((h @ p(f"self_attn.{m}_proj.weight").T).reshape(T, -1, D) for m in "qkv")
            y = []
            for head in range(H):
                g = head * K // H
                s = turn(q[:, head], at) @ turn(k[:, g], at).T / np.sqrt(D) + np.triu(np.full((T, T), -np.inf), 1)
                e = np.exp(s - s.max(-1, keepdims=True))
                y.append(e / e.sum(-1, keepdims=True) @ v[:, g])
                M, z = memory[layer][g]
                if z.any():
                    share = 1 / (1 + np.exp(-p("self_attn.memory.beta.weight")[head, 0]))
                    y[-1] = share * (sigma(q[:, head]) @ M) / (sigma(q[:, head]) @ z)[:, None] + (1 - share) * y[-1]
            for g, (M, z) in enumerate(memory[layer]):
                known = sigma(k[:, g]) @ M / (sigma(k[:, g]) @ z)[:, None] if delta and z.any() else 0
                memory[layer][g] = M + sigma(k[:, g]).T @ (v[:, g] - known), z + sigma(k[:, g]).sum(0)
            x = x + np.concatenate(y, 1) @ p("self_attn.o_proj.weight").T
            h = norm(x, p("post_attention_layernorm.weight"))
            gate = h @ p("mlp.gate_proj.weight").T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ p("mlp.up_proj.weight").T)) @ p("mlp.down_proj.weight").T
        logits.append(norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T)
    return np.concatenate(logits)


@pytest.mark.parametrize("delta", ["true", "false"])
def test_it_is_the_papers(delta):
    model, tokens = tiny(memory=f"infini:gate=sigmoid,delta={delta}"), text(40)
    draw = np.random.default_rng(5)
    for name in [n for n in ops.parameters(model) if n.endswith("beta.weight")]:
        ops.set_parameters(model, {name: ops.array(draw.normal(size=(4, 1)).astype("float32"))})
    for n in (8, 7):
        assert apart(run(model, tokens, whole(40, n))[0], infini_attention(model, tokens[0], n, delta == "true")) < 1e-3
    other = infini_attention(model, tokens[0], 8, delta != "true")
    assert apart(run(model, tokens, whole(40, 8))[0], other) > 1e-2, "or delta is not felt"


def test_at_step_0_a_trained_model_is_what_it_was():
    """Each segment as the plain model reads it; and the gate learns from the first step on."""
    model, tokens = tiny(memory="infini"), text(24)
    want = np.concatenate([run(tiny(), tokens[:, i : i + 8]) for i in range(0, 24, 8)], 1)
    assert apart(run(model, tokens, whole(24, 8)), want) < 1e-4
    _, grads = in_segments(model, batch(), 7)
    assert min(np.abs(g).max() for n, g in grads.items() if "beta" in n) > 1e-3


def test_the_gradient_flows_through_the_matrix():
    """Against one graph over all segments, packed documents included; cut it is another."""
    model, b = tiny(memory="infini:gate=sigmoid"), batch(True)
    for bptt, cuts in (("all", lambda i: False), (0, lambda i: True), (1, lambda i: i % 2 == 0)):
        assert off(in_segments(model, b, 5, bptt)[1], by_hand(model, b, 5, cuts)[1]) < 1e-5
    assert off(in_segments(model, b, 5, 0)[1], in_segments(model, b, 5)[1]) > 1e-2


def test_it_stays_as_large_as_it_is():
    model, sizes = tiny(memory="infini"), set()
    state = model.start(8, 400)
    with ops.no_grad():
        for i in range(0, 400, 8):
            logits, state = model(ops.array(text(400)[:, i : i + 8]), state)
            total = []
            ops.tree_map(lambda x, total=total: total.append(ops.nbytes(x)) or x, state)
            sizes.add(sum(total))
    assert len(sizes) == 1 and np.isfinite(ops.numpy(logits)).all()


def test_a_static_graph_may_begin_before_the_first_close():
    model, tokens = tiny(memory="infini:gate=sigmoid"), text(24)
    with ops.no_grad():
        _, state = model(ops.array(tokens[:, :5]), model.start(8, 24), close=False)
    step = ops.static(lambda x, s, close: model(x, s, close=close), model.still(state), (False, True))
    keys = [set(s) for s in step.state["layers"]]
    got = [ops.numpy(step(int(tokens[0, t]), t % 8 == 7)) for t in range(5, 24)]
    assert apart(np.concatenate(got, 1), run(model, tokens, whole(24, 8))[:, 5:]) < 1e-4
    assert [set(s) for s in step.state["layers"]] == keys
