"""Routing Transformer: attention and centroids against numpy written from the definition, and what use and training promise."""

import numpy as np
import pytest
from conftest import TINY, apart, influence, loss_and_gradients, run, text, tiny, whole

import kernels
import ops
import plugins
from errors import Refused
from kernels import Bias, Places
from model import Config, Llama, Segment, load, save
from positions.base import Position

B, H, K, D, T = 2, 4, 2, 8, 20
SPEC = "routing:clusters=3,window=5"


def layer(spec=SPEC, heads=H, kv_heads=K, centroids=None):
    """The memory of one layer, worked by routing."""
    c = Config(vocab_size=9, hidden_size=heads * D, num_attention_heads=heads, num_key_value_heads=kv_heads, num_hidden_layers=1, attn=spec)
    memory = Llama(c).init().model.layers[0].self_attn.memory
    if centroids is not None:
        ops.set_parameters(memory, {"centroids.weight": ops.array(centroids.reshape(-1, D).astype("float32"))})
    return memory


class Loud(Position):
    """Stands for rotation: what stands later is louder, and logits count double."""

    temperature = 2.0
    late = False

    def turn(self, at, begin=None):
        return 1 + ops.cast(at.at, ops.float32) / 10

    def turned(self, x, turn):
        return x * turn[..., None]


class Slanted(Position):
    """A bias by distance, steeper in later heads."""

    def bias(self):
        return Bias(slope=ops.array(np.array([0.1, 0.5, 1.0, 2.0], "float32")))


def attend(memory, q, v, begin=None, at=None, k=None, kind=Position):
    """One text at once -> [B, H, T, D] and the state. Without rotation: what counts is who is seen."""
    n = q.shape[2]
    at = np.broadcast_to(np.arange(n) if at is None else at, (len(q), 1, n))
    padded = (at < 0).any()
    c = Config(vocab_size=9, hidden_size=8, num_attention_heads=1)
    begin = None if begin is None else ops.array(np.broadcast_to(begin, at.shape).astype("int32"))
    places, position = Places(ops.array(at.astype("int32")), None if padded else 0), kind(c, None)
    seg = Segment(places, begin, position, position.turn(places), position.bias(), False)
    q, k, v = (ops.array(x.astype("float32")) for x in (q, np.zeros_like(v) if k is None else k, v))
    s = {"n": n, "first": seg.at.first, "capacity": 0, "k": k, "v": v, "pos": seg.at.at}
    y, s = memory.attend(None, q, seg, s)
    return ops.numpy(y), s


def normed(q):
    q = q - q.mean(-1, keepdims=True)
    return q / np.sqrt((q * q).mean(-1, keepdims=True))


def oracle(q, v, members, begin=None, top=None, loud=0.0, scale=D**-0.5):
    """One routed head, from the definition: q, v [T, D] float64; members: lists of tokens, one a cluster. A token attends to those
    before it in its cluster and document, the last `top`, or to itself if there is none; clusters are averaged."""
    x, out, count = normed(q) * (1 + loud * np.arange(len(q)))[:, None], np.zeros_like(v), np.zeros((len(q), 1))
    begin = np.zeros(len(q)) if begin is None else begin
    for tokens in members:
        for t in tokens:
            seen = [j for j in sorted(tokens) if begin[t] <= j < t][-(top or len(q)) :] or [t]
            p = np.exp((x[seen] @ x[t] - (x[seen] @ x[t]).max()) * scale)
            out[t] += p @ v[seen] / p.sum()
            count[t] += 1
    return out / np.maximum(count, 1)


def window(q, k, v, n, begin=None, slope=0.0):
    """One local head."""
    at = np.arange(len(q))
    see = (at <= at[:, None]) & (at[:, None] - at < n) & (at >= (0 if begin is None else begin[:, None]))
    p = np.exp(q @ k.T / np.sqrt(D) - slope * (at[:, None] - at)) * see
    return p @ v / p.sum(-1, keepdims=True)


def draw(seed=0, heads=H, kv_heads=K):
    """q, k, v [B, heads, T, D]"""
    d = np.random.default_rng(seed)
    return [d.normal(size=(B, n, T, D)) for n in (heads, kv_heads, kv_heads)]


def score(memory, q):
    """[B, R, T, c], of the routed heads."""
    R = memory.R
    mu = ops.numpy(memory.centroids.weight).reshape(R, -1, D)
    return np.einsum("brtd,rcd->brtc", normed(q[:, -R:]), mu / np.linalg.norm(mu, axis=-1, keepdims=True))


DOCUMENTS = np.array([0] * 7 + [7] * 1 + [8] * 12)


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (4, 4), (6, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("begin", [None, DOCUMENTS], ids=["one document", "packed"])
@pytest.mark.parametrize("spec", [SPEC, SPEC + ",top=2", SPEC + ",routed=100", SPEC + ",routed=30"])
def test_in_use_each_token_sees_the_last_of_its_nearest_cluster(spec, begin, heads, kv_heads):
    memory, (q, k, v) = layer(spec, heads, kv_heads), draw(heads=heads, kv_heads=kv_heads)
    got, _ = attend(memory, q, v, begin, k=k)
    nearest, o = score(memory, q).argmax(-1), memory.pattern.options
    assert round(heads * o.routed / 100) == memory.R
    for b, h in np.ndindex(B, heads):
        kv, r = h * kv_heads // heads, h - (heads - memory.R)
        if r < 0:
            want = window(q[b, h], k[b, kv], v[b, kv], 5, begin)
        else:
            want = oracle(q[b, h], v[b, kv], [np.flatnonzero(nearest[b, r] == c) for c in range(3)], begin, o.top)
        np.testing.assert_allclose(got[b, h], want, atol=1e-4)


@pytest.mark.parametrize("begin", [None, DOCUMENTS], ids=["one document", "packed"])
@pytest.mark.parametrize("top, w", [(0, 7), (4, 4), (99, 20)])
def test_in_training_each_cluster_takes_its_nearest_tokens(top, w, begin):
    """w = length / clusters unless it is said. A token may be in several clusters, which are averaged, or in none: zeros."""
    memory, (q, k, v) = layer(f"{SPEC},top={top}"), draw()
    memory.learning = True
    got, _ = attend(memory, q, v, begin, k=k)
    taken = np.argsort(-score(memory, q), 2)[:, :, :w]  # [B, R, w, c]
    for b, r in np.ndindex(B, memory.R):
        np.testing.assert_allclose(got[b, 2 + r], oracle(q[b, 2 + r], v[b, 1], list(taken[b, r].T), begin, top), atol=1e-4)
    counts = [(taken[0, 0] == t).sum() for t in range(T)]
    assert max(counts) > 1 and (top == 99 or min(counts) == 0), "or this test does not see averages and zeros"
    none = np.flatnonzero(np.array(counts) == 0)
    assert (got[0, 2, none] == 0).all()


@pytest.mark.parametrize("learning", [False, True], ids=["in use", "in training"])
def test_distance_is_felt_after_the_tokens_are_sorted(learning):
    """Clusters are of content; positions turn the normed vectors, and a scheme's temperature multiplies the logits."""
    memory, (q, k, v) = layer(SPEC), draw()
    memory.learning = learning
    got, _ = attend(memory, q, v, k=k, kind=Loud)
    by = score(memory, q)
    for b, r in np.ndindex(B, memory.R):
        members = np.argsort(-by[b, r], 0)[:7].T if learning else [np.flatnonzero(by[b, r].argmax(-1) == c) for c in range(3)]
        want = oracle(q[b, 2 + r], v[b, 1], [list(m) for m in members], loud=0.1, scale=2 * D**-0.5)
        np.testing.assert_allclose(got[b, 2 + r], want, atol=1e-4)


def test_a_bias_is_for_local_heads():
    """Routed heads are of content alone; local ones feel distance, each its own slope."""
    memory, (q, k, v) = layer(SPEC), draw()
    got, plain = (attend(memory, q, v, k=k, kind=kind)[0] for kind in (Slanted, Position))
    np.testing.assert_array_equal(got[:, 2:], plain[:, 2:])
    for b, h in np.ndindex(B, 2):
        want = window(q[b, h], k[b, 0], v[b, 0], 5, slope=(0.1, 0.5)[h])
        np.testing.assert_allclose(got[b, h], want, atol=1e-4)


def test_training_with_argmax_is_use():
    memory, (q, k, v) = layer(SPEC + ",assign=argmax"), draw()
    want, _ = attend(memory, q, v, DOCUMENTS, k=k)
    memory.learning = True
    got, s = attend(memory, q, v, DOCUMENTS, k=k)
    np.testing.assert_array_equal(got, want)
    assert s["seen"].shape == (2, 3, D)


@pytest.mark.parametrize("top", [0, 99])
def test_padding_takes_no_part(top):
    """Before and behind the text; with room for more than the text in a cluster, too."""
    memory, (q, k, v) = layer(f"{SPEC},top={top}"), draw()
    for learning in (False, True):
        memory.learning = learning
        at = np.where((np.arange(T) < 3) | (np.arange(T) > 15), -1, np.arange(T) - 3)
        live = at >= 0
        got, s = attend(memory, q, v, at=at, k=k)
        other, t = attend(memory, np.where(live[:, None], q, 9 * q[..., ::-1]), np.where(live[:, None], v, 1e3), at=at, k=k)
        np.testing.assert_allclose(got[:, :, live], other[:, :, live], atol=1e-5)
        if learning:
            np.testing.assert_allclose(ops.numpy(s["seen"]), ops.numpy(t["seen"]), atol=1e-4)
        if not learning or top:
            # length / clusters counts padding, any other w does not
            alone, _ = attend(memory, q[:, :, live], v[:, :, live], k=k[:, :, live])
            np.testing.assert_allclose(got[:, :, live], alone, atol=1e-5)


def separated(groups, seed=0):
    """Tokens of well separated kinds, by group [T], and the kinds' directions."""
    d = np.random.default_rng(seed)
    kinds = np.linalg.qr(d.normal(size=(D, D)))[0][: max(groups) + 1]
    kinds = kinds - kinds.mean(-1, keepdims=True)
    return kinds[groups] * 6 + d.normal(size=(len(groups), D)) * 0.1, kinds


@pytest.mark.parametrize("learning", [False, True], ids=["in use", "in training"])
def test_well_separated_groups_attend_fully_inside(learning):
    """Tokens of three kinds, equally many and mixed: every group is full causal attention by itself, without the diagonal."""
    groups = np.tile([0, 1, 2, 2, 1, 0], 4)
    x, kinds = separated(groups)
    memory = layer(SPEC + ",routed=100", heads=2, kv_heads=2, centroids=np.stack([kinds, kinds]))
    memory.learning = learning
    q, v = np.stack([x, x])[None], np.random.default_rng(1).normal(size=(1, 2, 24, D))
    got, _ = attend(memory, q, v)
    for h in range(2):
        for g in range(3):
            mine = groups == g
            s = normed(x[mine]) @ normed(x[mine]).T / np.sqrt(D)
            see = np.tri(mine.sum(), k=-1)
            see[0, 0] = 1
            p = np.exp(s - s.max()) * see
            np.testing.assert_allclose(got[0, h, mine], p @ v[0, h, mine] / p.sum(-1, keepdims=True), atol=1e-4)


def test_a_token_does_not_attend_to_itself_unless_alone():
    memory = layer(SPEC + ",routed=100")
    q, _, v = draw()
    _, s = attend(memory, q, v)
    moved = attend(memory, q, v + 1e3 * (np.arange(T) == 11)[:, None])[0] - attend(memory, q, v)[0]
    rank = ops.numpy(s["rank"])
    assert set(rank[:, :, 11].ravel()) - {0}, "or this test is blind"
    np.testing.assert_array_equal(np.abs(moved[:, :, 11]).max(-1) > 1, rank[:, :, 11] == 0)


# centroids


@pytest.mark.parametrize("learning", [False, True], ids=["in use", "in training"])
def test_centroids_take_no_gradient_and_tokens_do(learning):
    model = tiny(SPEC)
    try:
        model.model.patterns(training=learning)
        _, grads = loss_and_gradients(model, text(T + 1, 2))
    finally:
        model.model.patterns(training=False)
    for name, g in grads.items():
        # of the key projection the local heads' half trains
        assert (np.abs(g).max() > 0) == ("centroids" not in name), name


def test_centroids_move_as_the_paper_says():
    """mu <- 0.9 mu + 0.1 * sum of the normed queries that are nearest to it, over all rows; ones that nobody is near to shrink."""
    mu = np.random.default_rng(5).normal(size=(2, 3, D))
    mu[1, 2] = -(mu[1, 0] + mu[1, 1]) * 1e-3
    memory, (q, k, v) = layer(SPEC + ",decay=0.9", centroids=mu), draw()
    memory.learning = True
    _, s = attend(memory, q, v, DOCUMENTS, k=k)
    nearest = score(memory, q).argmax(-1)
    memory.learn(s["seen"])
    got = ops.numpy(memory.centroids.weight).reshape(2, 3, D)
    for r, c in np.ndindex(2, 3):
        total = normed(q[:, 2 + r])[nearest[:, r] == c].sum(0)
        np.testing.assert_allclose(got[r, c], 0.9 * mu[r, c] + 0.1 * total, atol=1e-4)


def test_a_training_step_moves_them_once_however_it_is_split(monkeypatch):
    import data
    import train

    train.use_backend(None)
    tokens = text(25, 4)
    batch = data.Batch(tokens[:, :-1], tokens[:, 1:], np.zeros((4, 24), "int32"), [[]] * 4)
    found = {}
    for micro, run_block in ((1, ops.call), (2, ops.checkpoint), (4, ops.call)):
        model = Llama(Config(**TINY, num_hidden_layers=2, attn=f"full/{SPEC}")).init(seed=1, std=0.2)
        before = ops.numpy(model.model.layers[1].self_attn.memory.centroids.weight).copy()
        model.model.patterns(training=True)
        model.model.run = run_block
        ops.freeze(model, {n for n in ops.parameters(model) if n.startswith(tuple(model.observers()))})
        optimizer = ops.AdamW(model, (0.9, 0.95), 1e-8, 0.1)
        assert not any("centroids" in n for n in optimizer.state())
        train.train_step(model, optimizer, batch, micro, 1.0, 1e-3)
        found[micro] = ops.numpy(model.model.layers[1].self_attn.memory.centroids.weight)
        assert np.abs(found[micro] - before).max() > 1e-3
        # and frozen in use
        again = found[micro].copy()
        model.model.patterns(training=False)
        with ops.no_grad():
            model(ops.array(tokens))
        np.testing.assert_array_equal(ops.numpy(model.model.layers[1].self_attn.memory.centroids.weight), again)
        # a second step still finds every parameter where the optimizer knows it
        model.model.patterns(training=True)
        train.train_step(model, optimizer, batch, micro, 1.0, 1e-3)
    for micro in (1, 2):
        np.testing.assert_allclose(found[micro], found[4], atol=1e-4)


def test_centroids_are_saved_beside_the_model(tmp_path, tokenizer_files):
    model = Llama(Config(**TINY, num_hidden_layers=2, attn=SPEC)).init(seed=1, std=0.2)
    memory = model.model.layers[1].self_attn.memory
    memory.learn(ops.array(np.random.default_rng(0).normal(size=(2, 3, D)).astype("float32")) * 300)
    save(model, tmp_path / "m", tokenizer_files)
    assert "centroids" not in str(sorted(ops.read_safetensors(tmp_path / "m" / "model.safetensors")))
    again, _ = load(tmp_path / "m", dtype="float32")
    np.testing.assert_array_equal(run(again, text(T)), run(model, text(T)))
    # and a checkpoint that has none begins with directions that depend on the seed alone
    plain = Llama(Config(**TINY, num_hidden_layers=2)).init(seed=1, std=0.2)
    save(plain, tmp_path / "plain", tokenizer_files)
    a, b, c = (load(tmp_path / "plain", attn=spec, dtype="float32")[0] for spec in (SPEC, SPEC, SPEC + ",seed=1"))
    mu = [ops.numpy(m.model.layers[i].self_attn.memory.centroids.weight) for m in (a, b, c) for i in (0, 1)]
    np.testing.assert_array_equal(mu[0], mu[2])
    assert np.abs(mu[0] - mu[1]).max() > 0.1 < np.abs(mu[0] - mu[4]).max()
    assert apart(run(load(tmp_path / "m", attn="full", dtype="float32")[0], text(T)), run(plain, text(T))) < 1e-5
    with pytest.raises(Refused, match=r"centroids\.weight has shape"):
        load(tmp_path / "m", attn="routing:clusters=4")


# the whole model


def test_training_looks_ahead_and_use_does_not():
    """What the docstring owns up to: top-w depends on later tokens; argmax does not, in training either."""
    leaks = {}
    for spec, learning in ((SPEC, False), (SPEC, True), (SPEC + ",assign=argmax", True)):
        model = tiny(spec)
        try:
            model.model.patterns(training=learning)
            leaks[spec, learning] = np.tril(influence(model, text(T)), -1).max()
        finally:
            model.model.patterns(training=False)
    assert leaks[SPEC, True] > 1e-2 > 1e-5 > max(leaks[SPEC, False], leaks[SPEC + ",assign=argmax", True])


@pytest.mark.parametrize("engine", ["stock", "blocks", *(["triton"] if kernels.TRITON else [])])
@pytest.mark.parametrize("learning", [False, True], ids=["in use", "in training"])
def test_every_engine_serves_it(engine, learning, use):
    memory, (q, k, v) = layer(SPEC), draw()
    memory.learning = learning
    use("dense")
    want, _ = attend(memory, q, v, DOCUMENTS, k=k)
    use(engine)
    np.testing.assert_allclose(attend(memory, q, v, DOCUMENTS, k=k)[0], want, atol=1e-5)


def test_training_never_asks_for_a_square_mask(monkeypatch):
    memory, (q, k, v), shapes, real = layer(SPEC), draw(), [], kernels.dense.visible
    memory.learning = True
    monkeypatch.setattr(kernels.dense, "visible", lambda *a: shapes.append(real(*a).shape) or real(*a))
    attend(memory, q, v, DOCUMENTS, k=k)
    assert sorted(tuple(s[-2:]) for s in shapes) == [(7, 7), (T, T)], "clusters of 7, and the window's mask, which blocks replace at length"


@pytest.mark.parametrize("top", [0, 2])
def test_decoding_equals_reading_at_once_with_the_last_of_a_cluster(top):
    model = tiny(f"{SPEC},top={top}")
    want = run(model, text(T, 2))
    for segments in (whole(T, 1), [[1, 2], [7], [3, 1, 6]]):
        assert apart(run(model, text(T, 2), segments, room=T), want) < 1e-4
    if top:
        assert apart(want, run(tiny(SPEC), text(T, 2))) > 1e-3


def test_layers_share_one_class():
    """A compiled step is made once for all blocks only if their memories are of one class."""
    for spec in (SPEC, "longformer:own_projections=true"):
        a, b = (block.self_attn.memory for block in tiny(spec).model.layers)
        assert type(a) is type(b)


def test_top_of_a_text_that_goes_on_is_refused():
    model = Llama(Config(**TINY, num_hidden_layers=1, attn=SPEC)).init()
    model.model.patterns(training=True)
    with pytest.raises(Refused, match="assign=argmax"):
        run(model, text(T), whole(T))


@pytest.mark.parametrize("memory", [n for n in plugins.names("memory") if n != "full"])
def test_other_memories_are_refused(memory):
    with pytest.raises(Refused, match=r"does not work with --memory .*: take --memory full"):
        Llama(Config(**TINY, num_hidden_layers=1, attn="routing", memory=memory))


@pytest.mark.parametrize(
    "option", ["clusters=0", "clusters=257", "top=-1", "window=0", "routed=0", "routed=101", "assign=best", "decay=2", "seed=-1"]
)
def test_impossible_options_are_refused(option):
    with pytest.raises(Refused, match=f"--attn routing: .*{option}"):
        plugins.parse("attention", f"routing:{option}")
