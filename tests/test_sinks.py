"""StreamingLLM as its paper has it: a cache written token by token in plain numpy, and what must stay bounded."""

import numpy as np
import pytest
from conftest import apart, run, text, tiny, weights, whole

import ops


def streaming_llm(model, tokens, budget, sinks):
    """Logits [T, V] of one row, float64. Keys are cached before rotation; at every token all are turned to their index in the
    cache and the query to the last index; after it, the sinks and the newest tokens stay (arXiv:2309.17453, section 3.2)."""
    c, w = model.config, {n: a.astype("float64") for n, a in weights(model).items()}
    H, K, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    norm = lambda x, g: x / np.sqrt((x * x).mean(-1, keepdims=True) + c.rms_norm_eps) * g
    caches, logits = [[] for _ in range(c.num_hidden_layers)], []

    def turn(x, at):  # [heads, D] at a place
        angle = at * c.rope_theta ** (-np.arange(0, D, 2) / D)
        a, b = x[:, : D // 2], x[:, D // 2 :]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], 1)

    for token in tokens:
        x = w["model.embed_tokens.weight"][token]
        for i, cache in enumerate(caches):
            p = lambda name, i=i: w[f"model.layers.{i}.{name}.weight"]
            h = norm(x, p("input_layernorm"))
            q, k, v = ((p(f"self_attn.{n}_proj") @ h).reshape(-1, D) for n in "qkv")
            cache.append((k, v))
            q = turn(q, len(cache) - 1)
            ks, vs = np.stack([turn(k, j) for j, (k, _) in enumerate(cache)]), np.stack([v for _, v in cache])
            ks, vs = (a.repeat(H // K, 1) for a in (ks, vs))  # [n, H, D]
            s = np.exp(np.einsum("hd,nhd->hn", q, ks) / np.sqrt(D))
            x = x + p("self_attn.o_proj") @ np.einsum("hn,nhd->hd", s / s.sum(1, keepdims=True), vs).reshape(-1)
            if len(cache) > budget:
                del cache[sinks]
            h = norm(x, p("post_attention_layernorm"))
            gate = p("mlp.gate_proj") @ h
            x = x + p("mlp.down_proj") @ (gate / (1 + np.exp(-gate)) * (p("mlp.up_proj") @ h))
        logits.append(w["lm_head.weight"] @ norm(x, w["model.norm.weight"]))
    return np.array(logits)


@pytest.mark.parametrize("budget, sinks", [(10, 2), (7, 4), (5, 0)], ids=lambda n: str(n))
def test_sinks_equal_the_paper(budget, sinks):
    model, tokens = tiny(memory=f"sinks:budget={budget},sinks={sinks}"), text(60)
    assert apart(run(model, tokens, whole(60, 1), room=60)[0], streaming_llm(model, tokens[0], budget, sinks)) < 1e-3


def test_without_eviction_the_reference_is_the_model():
    """Control of the reference itself."""
    assert apart(streaming_llm(tiny(), text(20)[0], 20, 4), run(tiny(), text(20))[0]) < 1e-4


@pytest.mark.parametrize("segment", [1, 4, 16])
def test_sinks_far_past_the_budget(segment):
    """Over 20 budgets: the same bytes after every segment, finite logits, and no distance above budget + segment."""
    budget, T, sizes = 12, 256, set()
    model = tiny(memory=f"sinks:budget={budget},sinks=4")
    state = model.start(segment, T)
    with ops.no_grad():
        for i in range(0, T, segment):
            y, state = model(ops.array(text(T)[:, i : i + segment]), state)
            assert np.isfinite(ops.numpy(y)).all()
            for s in state["layers"]:
                pos = ops.numpy(s["pos"])
                live = pos[pos >= 0]
                assert i + segment - 1 - live.min() < budget + segment
                assert len(set(live)) == live.size, "two slots stand at one position"
                assert s["pos"].shape[2] <= budget + segment
            size = []
            ops.tree_map(lambda a, size=size: size.append(ops.nbytes(a)) or a, state["layers"])
            sizes.add(sum(size)) if i > budget else None
    assert len(sizes) == 1
    born = ops.numpy(state["layers"][0]["born"])[pos >= 0]
    assert sorted(born) == [0, 1, 2, 3, *range(T - budget + 4, T)], "the sinks and the newest tokens stay"


@pytest.mark.parametrize("other", ["window:window=5", "local:block=6"])
def test_sinks_are_exempt_from_the_pattern(other):
    """While nothing is forgotten, sinks under a window are Longformer's first tokens."""
    if other.startswith("window"):
        want = run(tiny("longformer:window=5,n_global=2"), text(24))
        assert apart(run(tiny(other, memory="sinks:sinks=2"), text(24), whole(24)), want) < 1e-4
    assert apart(run(tiny(other, memory="sinks:sinks=0"), text(24), whole(24)), run(tiny(other), text(24))) < 1e-4


def test_sinks_are_worth_keeping():
    """Control: four sinks and none differ once something is forgotten."""
    with_, without = (run(tiny(memory=f"sinks:budget=10,sinks={n}"), text(40), whole(40, 4)) for n in (4, 0))
    assert apart(with_[:, :8], without[:, :8]) < 1e-4 and apart(with_[:, 20:], without[:, 20:]) > 1e-2
