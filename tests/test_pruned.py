"""Pruned caches as their papers have them: caches of plain Python lists, filled token by token in float64, and what must stay bounded."""

import re

import numpy as np
import pytest
from conftest import apart, run, small, text, tiny, weights, whole
from test_mechanisms import segmented_loss

import ops
import plugins
from errors import Refused
from generate import Session
from model import Llama

PRUNED = ["h2o", "tova", "snapkv", "keydiff", "pyramidkv", "adakv", "expected"]
every = pytest.mark.parametrize


# ---------------------------------------------------------------- the published definitions, on lists


class Entry:
    """A token that a key head remembers. mass: the weight that it got from each query so far, query heads of the key head summed."""

    def __init__(self, k, v, at):
        self.k, self.v, self.at, self.mass = k, v, at, 0.0


class Layer:
    """heads: a list of Entries for each key head; asked: every (position, queries [H, D]) so far."""

    def __init__(self, i, K):
        self.i, self.heads, self.asked = i, [[] for _ in range(K)], []


def turn(x, at, theta):  # [..., D] at a position
    D = x.shape[-1]
    angle = at * theta ** (-np.arange(0, D, 2) / D)
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


class Reference:
    """The model in float64. forget(self, layer): the policy, called when a segment closes. window: of attention; slopes: ALiBi's."""

    def __init__(self, model, forget, o, window=10**9, slopes=None):
        self.c, self.w = model.config, {n: a.astype("float64") for n, a in weights(model).items()}
        self.forget, self.o, self.window, self.slopes = forget, o, window, slopes
        self.layers = [Layer(i, self.c.num_key_value_heads) for i in range(self.c.num_hidden_layers)]
        self.t = 0

    def attention(self, q, t, head, entries):
        """The weights that query q [D] of query head `head` at position t gives to entries."""
        place = (lambda x, at: x) if self.slopes is not None else lambda x, at: turn(x, at, self.c.rope_theta)
        see = [e.at <= t < e.at + self.window for e in entries]
        logit = lambda e: place(q, t) @ place(e.k, e.at) / np.sqrt(len(q)) - (0 if self.slopes is None else self.slopes[head] * (t - e.at))
        p = np.array([np.exp(logit(e)) if yes else 0.0 for e, yes in zip(entries, see)])
        return p / max(p.sum(), 1e-300)

    def segment(self, tokens):
        c, w, D, out = self.c, self.w, self.c.head_dim, []
        G = c.num_attention_heads // c.num_key_value_heads
        norm = lambda x, g: x / np.sqrt((x * x).mean(-1, keepdims=True) + c.rms_norm_eps) * g
        for token in tokens:
            x = w["model.embed_tokens.weight"][token]
            for layer in self.layers:
                p = lambda name, i=layer.i: w[f"model.layers.{i}.{name}.weight"]
                h = norm(x, p("input_layernorm"))
                q, k, v = ((p(f"self_attn.{n}_proj") @ h).reshape(-1, D) for n in "qkv")
                layer.asked.append((self.t, q))
                y = []
                for j, entries in enumerate(layer.heads):
                    entries.append(Entry(k[j], v[j], self.t))
                    for head in range(j * G, j * G + G):
                        a = self.attention(q[head], self.t, head, entries)
                        y.append(sum(x * e.v for x, e in zip(a, entries)))
                        for x_, e in zip(a, entries):
                            e.mass += x_
                x = x + p("self_attn.o_proj") @ np.concatenate(y)
                h = norm(x, p("post_attention_layernorm"))
                gate = p("mlp.gate_proj") @ h
                x = x + p("mlp.down_proj") @ (gate / (1 + np.exp(-gate)) * (p("mlp.up_proj") @ h))
            out.append(w["lm_head.weight"] @ norm(x, w["model.norm.weight"]))
            self.t += 1
        for layer in self.layers:
            self.forget(self, layer)
            if getattr(self.o, "kv_positions", "absolute") == "reindex":
                for entries in layer.heads:
                    for n, e in enumerate(sorted(entries, key=lambda e: -e.at)):
                        e.at = self.t - 1 - n
        return out

    def observed(self, layer, n):
        """For each key head the weights of the last n queries on what it holds, summed: a list of arrays."""
        G, scores = self.c.num_attention_heads // self.c.num_key_value_heads, []
        for j, entries in enumerate(layer.heads):
            asked = [(t, q[h], h) for t, q in layer.asked[-n:] for h in range(j * G, j * G + G)]
            scores.append(sum(self.attention(q, t, h, entries) for t, q, h in asked))
        return scores


def h2o(self, layer):
    """Algorithm 1: while there are too many, the one of least accumulated weight goes; the newest are not asked."""
    recent = int(self.o.recent * self.o.budget)
    for entries in layer.heads:
        while len(entries) > self.o.budget:
            old = entries[: len(entries) - recent]
            entries.remove(min(old, key=lambda e: (e.mass, e.at)))


def tova(self, layer):
    total = sum(self.observed(layer, 1))
    at = [e.at for e in layer.heads[0]]
    while len(at) > self.o.budget:
        worst = min(range(len(at)), key=lambda i: (total[i], at[i]))
        total = np.delete(total, worst)
        del at[worst]
        for entries in layer.heads:
            del entries[worst]


def snap_scores(self, layer, window):
    """For each key head the tokens before the window, and their pooled scores."""
    scores, n = [], self.o.pool
    for entries, score in zip(layer.heads, self.observed(layer, window)):
        old = [e for e in entries if e.at <= self.t - 1 - window]
        padded = np.concatenate([np.zeros(n // 2), score[: len(old)], np.zeros(n // 2)])
        score = [padded[i : i + n].sum() / n for i in range(len(old))]
        scores.append(list(zip(score, old)))
    return scores


def snapkv(self, layer, budget=None):
    for entries, scored in zip(layer.heads, snap_scores(self, layer, self.o.window)):
        excess = len(entries) - (budget or self.o.budget)
        for _, e in sorted(scored, key=lambda x: (x[0], x[1].at))[: max(excess, 0)]:
            entries.remove(e)


def pyramidkv(self, layer):
    mean, L = self.o.budget - self.o.window, self.c.num_hidden_layers
    last = mean // self.o.beta
    first = 2 * mean - last
    snapkv(self, layer, self.o.window + int(np.floor(first - (first - last) * layer.i / (L - 1) + 0.5)))


def adakv(self, layer):
    """Every head's own best first, then the best of all heads, up to what the layer may hold; no head above the widest."""
    K, o = len(layer.heads), self.o
    scored = [sorted(s, key=lambda x: (-x[0], -x[1].at)) for s in snap_scores(self, layer, o.window)]
    room = K * o.budget - sum(len(e) - len(s) for e, s in zip(layer.heads, scored))
    safe = int((o.budget - o.window) * o.floor)
    keep = [s[:safe] for s in scored]
    rest = sorted(((x, j) for j, s in enumerate(scored) for x in s[safe:]), key=lambda x: (-x[0][0], -x[0][1].at))
    for x, j in rest[: max(room - sum(map(len, keep)), 0)]:
        keep[j].append(x)
    for j, entries in enumerate(layer.heads):
        best = [e for _, e in keep[j]][: int(o.widest * o.budget) - o.window]
        layer.heads[j] = [e for e in entries if e in best or e.at > self.t - 1 - o.window]


def keydiff(self, layer):
    for j, entries in enumerate(layer.heads):
        ks = [e.k if self.slopes is not None else turn(e.k, e.at, self.c.rope_theta) for e in entries]
        unit = [k / np.linalg.norm(k) for k in ks]
        anchor = np.mean(unit, 0)
        cosine = [u @ anchor / np.linalg.norm(anchor) for u in unit]
        best = sorted(range(len(entries)), key=lambda i: cosine[i])[: self.o.budget]
        layer.heads[j] = [entries[i] for i in sorted(best)]


def kept(memory, s):
    """Positions of the slots in use, [B, 1 or K, N]."""
    return ops.numpy((memory.whole(s) if hasattr(memory, "whole") else s)["pos"])


def expected(self, layer):
    """The Gaussian's expectation with the whole covariance, and the mean of the rotations as a matrix."""
    o, D, G = self.o, self.c.head_dim, self.c.num_attention_heads // self.c.num_key_value_heads
    ahead = range(self.t, self.t + o.future)
    # rows: where each channel goes
    R = np.eye(D) if self.slopes is not None else np.mean([turn(np.eye(D), t, self.c.rope_theta) for t in ahead], 0)
    for j, entries in enumerate(layer.heads):
        if len(entries) <= o.budget:
            continue
        old = [e for e in entries if e.at >= o.sinks]
        keys = np.array([e.k if self.slopes is not None else turn(e.k, e.at, self.c.rope_theta) for e in old])
        share = 0
        for h in range(j * G, j * G + G):
            q = np.array([q[h] for t, q in layer.asked[-o.window :] if t >= o.sinks])
            mu, sigma = q.mean(0) @ R, R.T @ np.atleast_2d(np.cov(q.T, bias=True)) @ R
            z = np.exp(keys @ mu / np.sqrt(D) + np.einsum("nd,de,ne->n", keys, sigma, keys) / 2 / D)
            share = share + z / z.sum()
        score = share * [np.linalg.norm(e.v) for e in old]
        order = sorted(range(len(old)), key=lambda i: (-score[i], -old[i].at))
        best = [old[i] for i in order[: o.budget - len(entries) + len(old)]]
        layer.heads[j] = [e for e in entries if e in best or e.at < o.sinks]


def pooled(self, layer):
    """While there are too many: the oldest block that is whole, older than the recent tokens and not squeezed yet; else the oldest goes."""
    o = self.o
    recent = int(o.recent * o.budget)
    for entries in layer.heads:
        while len(entries) > o.budget:
            old = [e for e in entries if e.at >= o.sinks]
            for i, e in enumerate(old):
                block = old[i : i + o.rate]
                if (e.at - o.sinks) % o.rate == 0 and not hasattr(e, "squeezed") and block[-1].at <= self.t - 1 - recent:
                    one = Entry(sum(e.k for e in block) / o.rate, sum(e.v for e in block) / o.rate, block[-1].at)
                    one.squeezed = True
                    at = entries.index(e)
                    entries[at : at + o.rate] = [one]
                    break
            else:
                entries.remove(old[0])


def both(spec, tokens, segment, **how):
    """Logits of the model and of the reference, and the positions that each layer's key heads keep after every segment."""
    pos, attn = ("alibi" if how.get("slopes") is not None else "rope"), "full"
    if "window" in how:
        attn = f"window:window={how['window']}"
    model, plugin = tiny(attn, pos, spec), plugins.parse("memory", spec)
    reference, state = Reference(model, globals()[plugin.name], plugin.options, **how), model.start(segment, tokens.shape[1])
    logits, want = [], []
    with ops.no_grad():
        for i in range(0, tokens.shape[1], segment):
            y, state = model(ops.array(tokens[:, i : i + segment]), state)
            logits.append(ops.numpy(y)[0])
            want += reference.segment(tokens[0, i : i + segment])
            for block, s, layer in zip(model.model.layers, state["layers"], reference.layers):
                held = kept(block.self_attn.memory, s)[0]
                for j, entries in enumerate(layer.heads):
                    got = held[min(j, len(held) - 1)]
                    assert sorted(got[got >= 0]) == sorted(e.at for e in entries), (i, layer.i, j)
    return np.concatenate(logits), np.array(want)


# budgets that bind soon and late; no halves that round differently
SPECS = {
    "h2o": ["budget=10", "budget=7,recent=0.3"],
    "tova": ["budget=10", "budget=3"],
    "snapkv": ["budget=10,window=4", "budget=9,window=2,pool=3", "budget=8,window=6,pool=1"],
    "keydiff": ["budget=10", "budget=3"],
    "pyramidkv": ["budget=10,window=4,pool=3", "budget=12,window=2,pool=1,beta=2"],
    "expected": ["budget=10,window=4,future=8,sinks=2", "budget=7,window=12,future=1,sinks=0", "budget=12,window=6,future=64"],
    "adakv": [
        "budget=10,window=4",
        "budget=9,window=2,pool=1,floor=0",
        "budget=9,window=2,pool=3,floor=0.5,widest=1.3",
        "budget=10,window=1,pool=1,floor=0.9",
    ],
}
SQUEEZED = ["pooled:budget=10,rate=2,sinks=2", "pooled:budget=12,rate=3,sinks=0,recent=0.5", "pooled:budget=12,rate=4,sinks=4,recent=0.1"]
SPECS["adakv"] += ["budget=10,window=1,pool=1,floor=0.9"]
ALL = [f"{name}:{o}" for name, options in SPECS.items() for o in options]
FIRST = [f"{name}:{options[0]}" for name, options in SPECS.items()]


@every("segment", [1, 4, 13])
@every("spec", [*ALL, *SQUEEZED])
def test_what_is_kept_is_what_the_paper_says(spec, segment):
    got, want = both(spec, text(40), segment)
    assert apart(got, want) < 1e-3


@every("segment", [1, 5])
@every("spec", FIRST)
def test_renumbered_as_on_lists(spec, segment):
    got, want = both(spec + ",kv_positions=reindex", text(40), segment)
    assert apart(got, want) < 1e-3
    assert apart(run(tiny(memory=spec), text(40), whole(40, segment))[0], want) > 1e-2, "control: positions matter"


@every("how", [{"window": 6}, {"slopes": 2.0 ** (-2 * np.arange(1, 5))}], ids=["window", "alibi"])
@every("spec", FIRST)
def test_scores_are_what_attention_sees(spec, how):
    """Under a pattern, and with a bias by distance for each head."""
    # no token twice: without rotation equal tokens have equal keys, and keydiff may drop either
    got, want = both(spec, np.random.default_rng(0).permutation(61)[None, :40].astype("int32"), 5, **how)
    assert apart(got, want) < 1e-3


def test_without_eviction_the_reference_is_the_model():
    """Control of the reference itself."""
    o = plugins.parse("memory", "h2o:budget=99").options
    assert apart(np.array(Reference(tiny(), h2o, o).segment(text(20)[0])), run(tiny(), text(20))[0]) < 1e-4


# ---------------------------------------------------------------- budgets


def held(model, state):
    """Bytes of each layer's state, and tokens that each key head holds: two lists."""
    size = [[] for _ in state["layers"]]
    for s, out in zip(state["layers"], size):
        ops.tree_map(lambda a, out=out: out.append(ops.nbytes(a)) or a, s)
    memories = [block.self_attn.memory for block in model.model.layers]
    return [sum(x) for x in size], [(kept(memory, s) >= 0).sum(-1) for memory, s in zip(memories, state["layers"])]


def promised(name, o, model, segment, layer):
    """Bytes of one row of a layer in float32: slots of keys, values and positions, and what scores need. Ada-KV's are SnapKV's, and how
    many are each head's."""
    c = model.config
    H, K, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    slots = (o.budget if name == "adakv" else model.model.layers[layer].self_attn.memory.size) + segment
    queries = getattr(o, "window", 1 if name == "tova" else 0) * (H * D + 2)
    return 4 * (slots * (K * (2 * D + (name == "h2o")) + (1 if name == "tova" else K)) + queries + K * (name == "adakv"))


@every("segment", [1, 8])
@every("spec", FIRST)
def test_a_long_stream_in_the_bytes_that_were_promised(spec, segment):
    model, T = tiny(memory=spec), 160
    o, name = plugins.parse("memory", spec).options, spec.partition(":")[0]
    state, sizes = model.start(segment, T), set()
    with ops.no_grad():
        for i in range(0, T, segment):
            y, state = model(ops.array(text(T)[:, i : i + segment]), state)
            assert np.isfinite(ops.numpy(y)).all()
            size, tokens = held(model, state)
            if i > 4 * o.budget:
                sizes.add(tuple(size))
                # every head holds its budget; pyramidkv's in the mean over layers, adakv's in the mean over heads
                if name == "pyramidkv":
                    assert np.mean(tokens) == o.budget
                elif name == "adakv":
                    assert all(t.mean() == o.budget for t in tokens)
                else:
                    assert all((t == o.budget).all() for t in tokens)
    assert sizes == {tuple(promised(name, o, model, segment, i) for i in range(2))}


def test_pyramid_and_shares():
    """PyramidKV's layers lie on a line whose mean is the budget; with widest=2 Ada-KV's rectangle is twice SnapKV's."""
    sizes = [b.self_attn.memory.size for b in tiny(memory="pyramidkv:budget=120,window=20,beta=20", layers=5).model.layers]
    assert sizes == [20 + 195, 20 + 148, 20 + 100, 20 + 53, 20 + 5] and abs(np.mean(sizes) - 120) <= 0.5
    alone = tiny(memory="pyramidkv:budget=120,window=20", layers=1)
    assert alone.model.layers[0].self_attn.memory.size == 120
    assert tiny(memory="adakv:budget=64").model.layers[0].self_attn.memory.size == 128


@every("how", ["", "quantised:keep="])
def test_ragged_heads_cost_what_snapkv_costs(how):
    """Whatever Ada-KV's heads keep, and however wide the widest may be: beside SnapKV's bytes only how many are each head's."""
    sizes, kinds = [], ("snapkv:budget=10,window=2", "adakv:budget=10,window=2,widest=1.5", "adakv:budget=10,window=2")
    for spec in kinds:
        if how:
            spec = how + spec.partition(":")[0] + ",budget=40,channels=8"
        model = tiny(memory=spec)
        state = model.start(8, 80)
        with ops.no_grad():
            for i in range(0, 80, 8):
                _, state = model(ops.array(text(80)[:, i : i + 8]), state)
        size, tokens = held(model, state)
        sizes.append(size)
        assert how or spec[0] == "s" or len(set(tokens[0][0])) == 2, "control: heads differ"
    counts = [4 * 2, 4 * 2]
    assert sizes[1] == sizes[2] == [a + b for a, b in zip(sizes[0], counts)]


@every("n", range(1, 9))
@every("spec", [f"{name}:budget=8" + (",window=3" if name in ("snapkv", "pyramidkv", "adakv") else "") for name in PRUNED])
def test_short_texts_lose_nothing(spec, n):
    """1 to 8 tokens under a budget of 8, in the smallest segments and in one: nothing goes, nothing is empty. PyramidKV's upper layer is
    smaller, so there only what fits it."""
    n = min(n, 3) if spec.startswith("pyramid") else n
    model, want = tiny(memory=spec), run(tiny(), text(n, 2))
    for segments in ([[n]], [[1]] * n, [[1], [n - 1]] if n > 1 else [[1]]):
        for room in (0, n):
            assert apart(run(model, text(n, 2), segments, room=room), want) < 1e-4


@every("spec", FIRST)
def test_nothing_jumps_at_the_first_eviction(spec):
    """Logits up to the close that first forgets are those of the full cache; after it they differ."""
    model = tiny(memory=spec)
    got, want = run(model, text(32, 4), [[8], [1] * 8, [8], [8]]), run(tiny(), text(32, 4))
    seen = 8 if spec.startswith("pyramid") else 16
    assert apart(got[:, :seen], want[:, :seen]) < 1e-4
    assert apart(got[:, seen:], want[:, seen:]) > 1e-2


@every("reindex", ["absolute", "reindex"])
@every("name", PRUNED)
def test_generous_budgets_are_the_full_cache(name, reindex):
    got = run(tiny(memory=f"{name}:kv_positions={reindex}"), text(40, 2), whole(40, 7), room=40)
    assert apart(got, run(tiny(), text(40, 2))) < 1e-4


@every("pos", ["rope", "dynamic:original=64", "alibi", "t5", "xl", "none"])
@every("spec", FIRST)
def test_renumbered_pieces_equal_the_segment(spec, pos):
    """With padding, two documents in a row, and static steps, as absolute positions have in test_mechanisms.py."""
    model, tokens = tiny(pos=pos, memory=spec + ",kv_positions=reindex"), text(32, 2)
    begin = np.where(np.arange(32) >= 12, 12, 0)[None].repeat(2, 0).astype("int32")
    want = run(model, tokens, whole(32), begin)
    assert apart(run(model, tokens, [[3, 5], [1] * 8, [7, 1], [8]], begin, room=32), want) < 1e-4
    alone = run(model, tokens[:, 12:], [[4], [8], [8]])
    assert apart(want[:, 12:], alone) < 1e-3
    padded = tokens.copy()
    padded[0, 5:8] = -1
    assert apart(run(model, padded, whole(32))[:1, padded[0] >= 0], run(model, tokens[:1, padded[0] >= 0], [[5], [8], [8], [8]])) < 1e-3
    static, state = [], None
    with ops.no_grad():
        y, state = model(ops.array(tokens[:1, :8]), model.start(8, 32))
    step = ops.static(lambda x, s, close: model(x, s, close=close), model.still(state), (False, True))
    static = [ops.numpy(step(int(tokens[0, t]), (t + 1) % 8 == 0)) for t in range(8, 32)]
    assert apart(np.concatenate([ops.numpy(y), *static], 1), run(model, tokens[:1], whole(32))) < 1e-3


@every("reindex", ["absolute", "reindex"])
@every("spec", FIRST)
def test_rows_and_documents_by_themselves(spec, reindex):
    """Rows whose closing segments end in padding, and a document under a pattern that counts from where it begins."""
    spec, tokens = f"{spec},kv_positions={reindex}", text(32, 2)
    padded = np.where((np.arange(32) % 16 >= 12) & (np.arange(2)[:, None] == 0), -1, tokens)
    alone = run(tiny(memory=spec), tokens[:1, padded[0] >= 0], [[8], [4], [8], [4]])
    assert apart(run(tiny(memory=spec), padded, whole(32))[:1, padded[0] >= 0], alone) < 1e-4
    model = tiny("longformer:window=5,n_global=2", memory=spec)
    begin = np.where(np.arange(32) >= 12, 12, 0)[None].astype("int32")
    want = run(model, tokens[:1, 12:], [[4], [8], [8]])
    assert apart(run(model, tokens[:1], whole(32), begin)[:, 12:], want) < 1e-4


def test_other_documents_queries_expect_nothing():
    """Where the window reaches over a document's beginning, what it keeps is what it would keep alone."""
    model, begin = tiny(memory="expected:budget=7,window=30,future=4,sinks=2"), np.where(np.arange(32) >= 12, 12, 0)[None].astype("int32")
    want = run(model, text(32)[:, 12:], [[4], [8], [8]])
    assert apart(run(model, text(32), whole(32), begin)[:, 12:], want) < 1e-4


def test_scores_in_parts(monkeypatch):
    """Queries are cut so that few scores exist at once: to nothing but rounding the same."""
    from memory import _pruned

    want = [run(tiny(memory=spec), text(40, 2), whole(40)) for spec in FIRST]
    monkeypatch.setattr(_pruned, "SCORES", 1)
    for spec, y in zip(FIRST, want):
        assert apart(run(tiny(memory=spec), text(40, 2), whole(40)), y) < 1e-4


# ---------------------------------------------------------------- shares

BUDGETED = [name for name in plugins.names("memory") if "budget" in plugins.load("memory", name).Options.__dataclass_fields__]


def shared(name, budget):
    """The tiny spelling of a memory with another budget; of vectors around segments, with layers that keep something."""
    keep = "keep=window," if "keep" in plugins.load("memory", name).Options.__dataclass_fields__ and name != "quantised" else ""
    return str(plugins.parse("memory", re.sub("budget=[0-9]+", f"{keep}budget={budget}", small("memory", name))))


@every("name", BUDGETED)
def test_a_share_is_so_many_tokens(name):
    """0.3 of 40 tokens are 12, in what comes out and in what is held; texts of other lengths in between change nothing."""
    some, tokens, other = (tiny(memory=shared(name, b)) for b in (0.3, 12, 8))
    assert shared(name, 0.3) == str(plugins.parse("memory", shared(name, 0.3)))
    want = run(tokens, text(40), whole(40), room=40)
    assert (run(some, text(40), whole(40), room=40) == want).all()
    assert apart(run(other, text(40), whole(40), room=40), want) > 1e-2
    a, b = (Session(model, chunk=8, segment=4) for model in (some, tokens))
    between = Session(some, chunk=8, segment=4)
    for i, part in enumerate((text(40)[0], [7], text(9)[0])):
        assert apart(ops.numpy(a.read(part, 9)), ops.numpy(b.read(part, 9))) < 1e-5
        between.read(text(11 + i)[0], 3)
        for token in text(9)[0].tolist():
            assert apart(ops.numpy(a.step(token)), ops.numpy(b.step(token))) < 1e-5
            between.step(3) if i == 2 and token % 3 == 0 and between.room else None
    assert a.nbytes() == b.nbytes() != between.nbytes()


@every("n", range(1, 9))
@every("name", BUDGETED)
def test_a_share_of_hardly_anything(name, n):
    """A budget is never smaller than the memory's other options allow."""
    made = Session(tiny(memory=shared(name, 0.01)), chunk=8, segment=2)
    assert np.isfinite(ops.numpy(made.read(text(n)[0], 12))).all()
    assert all(np.isfinite(ops.numpy(made.step(3))).all() for _ in range(12))
    smallest = {"sinks": 3, "duo": 3, "pooled": 7, "expected": 3, "snapkv": 6, "pyramidkv": 6, "adakv": 6}.get(name, 1)
    assert made.model.model.layers[0].self_attn.memory.o.budget == smallest


def test_shares_are_the_papers():
    """PyramidKV's layers share 0.25 of 800 tokens, Ada-KV's slots are twice as many."""
    model = tiny(memory="pyramidkv:budget=0.25,window=20", layers=5)
    model.start(read=800)
    assert [b.self_attn.memory.size for b in model.model.layers] == [
        b.self_attn.memory.size for b in tiny(memory="pyramidkv:budget=200,window=20", layers=5).model.layers
    ]


def test_a_share_of_an_unknown_length_is_refused():
    model = tiny(memory="full/snapkv:budget=0.25")
    with pytest.raises(Refused, match="give its budget in tokens"):
        model.start()
    assert apart(run(model, text(20)), run(tiny(), text(20))) < 1e-5, "a whole text forgets nothing"


# ---------------------------------------------------------------- fewer bits


@every("bits, channels", [(8, 32), (4, 8), (4, 32)])
def test_codes_are_what_the_formula_says(bits, channels):
    """Q(x) = round((x - z) / s), in float64 up to the float16 of s and z; what comes back is within half a step."""
    from kernels.codes import decode, encode

    x = np.random.default_rng(0).normal(size=(2, 3, 5, 64)).astype("float32")
    x[..., 7] *= 50
    x[0, 0, 0] = 3.0
    # where float16 rounds z to above all of the group
    x[1, 1, 1] = 1000.4 + x[1, 1, 1] / 100
    code, scale = encode(ops.array(x), bits, channels)
    assert ops.nbytes(code) == x.size * bits // 8 and ops.nbytes(scale) == x.size // channels * 4
    groups = x.astype("float64").reshape(*x.shape[:-1], -1, channels)
    z = groups.min(-1, keepdims=True).astype("float16").astype("float64")
    s = (
        np.maximum((groups.max(-1, keepdims=True) - groups.min(-1, keepdims=True)) / (2**bits - 1), 1e-6)
        .astype("float16")
        .astype("float64")
    )
    want = np.clip(np.round((groups - z) / s), 0, 2**bits - 1) * s + z
    got = ops.numpy(decode(code, scale, bits, ops.float32)).reshape(groups.shape)
    assert (np.abs(got - want) > 1e-4 * (1 + np.abs(want))).mean() < 1e-3, "but for numbers halfway between two codes"
    # float16 moves z and the largest by up to 2^-11 of themselves
    assert (np.abs(got - groups) <= s / 2 + 2**-10 * np.abs(groups).max(-1, keepdims=True) + 1e-6).all()


def test_fewer_bits_cost_more():
    """Everything kept: the first segment is exact, then 8 bits are near and 4 bits are further off."""
    want = run(tiny(), text(40, 2))
    off = [run(tiny(memory=f"quantised:bits={bits},channels=4"), text(40, 2), whole(40)) for bits in (8, 4)]
    assert all(apart(y[:, :8], want[:, :8]) < 1e-4 for y in off)
    eight, four = (apart(y, want) for y in off)
    assert 1e-4 < eight < 0.05 and 4 * eight < four < 1


@every("keep", ["window", *PRUNED])
def test_quantised_keeps_what_its_policy_keeps(keep):
    """After the first close, when nothing is rounded yet but what is kept; then what is kept of it is never rounded again."""
    o = "budget=40" if keep in ("snapkv", "pyramidkv", "adakv") else "budget=10"
    plain, model = tiny(memory=f"{keep}:{o}"), tiny(memory=f"quantised:keep={keep},{o},bits=4,channels=4")
    T, n = 90, 60
    with ops.no_grad():
        _, other = plain(ops.array(text(T)[:, :n]), plain.start())
        _, state = model(ops.array(text(T)[:, :n]), model.start())
        memories = [[block.self_attn.memory for block in m.model.layers] for m in (plain, model)]
        for i, j, a, b in zip(*memories, other["layers"], state["layers"]):
            for x, y in zip(kept(i, a)[0], kept(j, b)[0]):
                assert sorted(x[x >= 0]) == sorted(y[y >= 0])
        held = lambda memory, s: memory.unfolded(s["past"], s)
        before = [{f: ops.numpy(held(m, s)[f])[0] for f in ("pos", "k_code", "v_scale")} for m, s in zip(memories[1], state["layers"])]
        _, state = model(ops.array(text(T)[:, n : n + 3]), state)
        for b, memory, s in zip(before, memories[1], state["layers"]):
            after, same = {f: ops.numpy(held(memory, s)[f])[0] for f in b}, 0
            for head in range(2):
                at = lambda x, head=head: x["pos"][min(head, len(x["pos"]) - 1)]
                for i, p in enumerate(at(b)):
                    for j in np.flatnonzero((at(after) == p) & (p >= 0)):
                        same += 1
                        assert all((b[f][head, i] == after[f][head, j]).all() for f in ("k_code", "v_scale"))
            assert same > 4


@every("keep", ["window", *PRUNED])
def test_quantised_pieces_equal_the_segment(keep):
    """Static steps, padding and documents too. Rounding may fall to either side, so within a step of 8 bits."""
    o = "budget=40" if keep in ("snapkv", "pyramidkv", "adakv") else "budget=10"
    model, tokens, segments = tiny(memory=f"quantised:keep={keep},{o},channels=8"), text(80, 2), [[20]] * 4
    want = run(model, tokens, segments)
    assert apart(run(model, tokens, [[5, 15], [1] * 20, [19, 1], [7, 6, 7]], room=80), want) < 0.03
    padded = tokens.copy()
    padded[0, 15:20] = -1
    assert apart(run(model, padded, segments)[:1, padded[0] >= 0], run(model, tokens[:1, padded[0] >= 0], [[15], *segments[1:]])) < 0.03
    begin = np.where(np.arange(80) >= 12, 12, 0)[None].astype("int32")
    assert apart(run(model, tokens[:1], segments, begin)[:, 12:], run(model, tokens[:1, 12:], [[8], *segments[1:]])) < 0.03
    for n in (20, 13):  # from a close on, and from within the first segment
        with ops.no_grad():
            y, state = model(ops.array(tokens[:1, :n]), model.start(20, 80), close=n == 20)
        step = ops.static(lambda x, s, close: model(x, s, close=close), model.still(state), (False, True))
        steps = [ops.numpy(step(int(tokens[0, t]), (t + 1) % 20 == 0)) for t in range(n, 80)]
        assert apart(np.concatenate([ops.numpy(y), *steps], 1), want[:1]) < 0.03


@every("spec", ["h2o", "quantised:keep=h2o,channels=8"])
def test_every_query_gives_as_much_as_it_has(spec):
    """H2O's F over all that is kept, nothing forgotten: one for every query and query head, in pieces and over closes."""
    model, T = tiny(memory=spec), 30
    state = model.start(10, T)
    with ops.no_grad():
        for i, n in enumerate([4, 6, 1, 9, 10]):
            at = sum([4, 6, 1, 9, 10][:i])
            _, state = model(ops.array(text(T)[:, at : at + n]), state, close=i in (1, 3))
    for s in state["layers"]:
        mass = sum(ops.numpy(part["mass"]).sum(-1) for part in (s, s.get("past")) if part)
        np.testing.assert_allclose(mass, 2 * T, rtol=1e-4)


@every("bits", [8, 4])
def test_quantised_bytes(bits):
    """The closed past in codes, the open segment in float32; a long stream stays within them."""
    model, T, sizes = tiny(memory=f"quantised:budget=24,bits={bits},channels=8"), 96, set()
    state = model.start(8, T)
    with ops.no_grad():
        for i in range(0, T, 4):
            _, state = model(ops.array(text(T)[:, i : i + 4]), state, close=i % 8 == 4)
            sizes.add(tuple(held(model, state)[0])) if i >= 28 else None
    K, D = 2, 8
    assert sizes == {(24 * (K * 2 * (D * bits // 8 + 4) + 4) + 8 * (K * 2 * D * 4 + 4),) * 2}


# ---------------------------------------------------------------- in use


@every("spec", [*FIRST, "quantised:budget=10,channels=8"])
def test_writing_in_constant_memory(spec):
    """A session that reads in chunks and writes token by token holds the same bytes however long it goes on."""
    session, sizes = Session(tiny(memory=spec), chunk=8, segment=4), set()
    session.read(text(21)[0], 60)
    for i, token in enumerate(text(60)[0]):
        assert np.isfinite(ops.numpy(session.step(int(token)))).all()
        sizes.add(session.nbytes()) if i > 20 else None
    assert len(sizes) == 1


@every("spec", [*PRUNED, "quantised:channels=8"])
def test_bfloat16(spec):
    """Scores in float32 leave activations and caches in bfloat16."""
    model, want = Llama(tiny(memory=spec).config).init(seed=1, std=0.2), run(tiny(), text(24))
    model.dtype = ops.bfloat16
    assert apart(run(model, text(24), [[8], *[[1] * 4] * 4], room=24), want) < 0.3
    with ops.no_grad():
        _, state = model(ops.array(text(8)), model.start(8, 24))
    assert all(s[f].dtype == ops.bfloat16 for s in state["layers"] for f in "kv" if f in s)


@every("segments", [[[11], [5], [8]], [[1]] * 24], ids=["segments", "tokens"])
@every("spec", PRUNED)
def test_gradients_of_what_is_kept(spec, segments):
    """Scores take no gradient, keys and values do: where nothing is forgotten, those of the whole text."""
    want, got = (segmented_loss(tiny(memory=spec), text(25, 2), s) for s in ([[24]], segments))
    for n in want:
        assert np.abs(got[n] - want[n]).max() < 1e-4 * np.abs(want[n]).max(), n


@every(
    "spec, word",
    [
        ("h2o:budget=0", "at least 1"),
        ("h2o:recent=1.5", "share"),
        ("tova:budget=-1", "at least 1"),
        ("snapkv:budget=32", "larger than the window"),
        ("snapkv:pool=4", "odd"),
        ("keydiff:kv_positions=relative", "absolute or reindex"),
        ("pyramidkv:window=0", "window"),
        ("pyramidkv:beta=0", "beta"),
        ("expected:sinks=1024", "larger than the sinks"),
        ("expected:future=0", "at least 1"),
        ("adakv:floor=2", "floor"),
        ("adakv:widest=0.5", "widest"),
        ("quantised:bits=3", "4 or 8"),
        ("quantised:keep=sinks", "choose one of"),
        ("quantised:keep=snapkv,budget=20", "larger than the window"),
        ("snapkv:budget=0.0", "share above 0"),
        ("window:budget=1.5", "share above 0 and up to 1"),
        ("h2o:budget=0.x", "share above 0"),
        ("sinks:budget=a quarter", "or a share"),
        ("snapkv:budget=0.5,pool=4", "odd"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused(spec, word):
    with pytest.raises(Refused, match=word):
        plugins.parse("memory", spec)
