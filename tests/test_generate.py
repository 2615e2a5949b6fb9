"""generate.py: sessions, sampling, stop strings, text that streams."""

import io

import numpy as np
import pytest
from conftest import small, tiny

import cli
import generate as script
import ops
import plugins
from errors import Refused
from generate import Sampler, Session, Until, generate

MEMORIES = ["full", "sinks:budget=20", "full/window:budget=16"]
MODELS = [
    {"attn": "full"},
    {"attn": "window:window=9"},
    {"pos": "alibi"},
    {"pos": "dynamic:original=16"},
    {"attention_bias": True, "mlp_bias": True},
    {"adapter": "lora"},
]


class Letters:
    """A tokenizer whose ids are letters, and that ends no text."""

    eos_ids = frozenset()
    stream = lambda self: self
    push = lambda self, i: chr(65 + i % 26)
    flush = lambda self: ""


def write(memory, graph, turns=((30, 15), (15, 10))):
    """Logits after reading and writing in turns, as a conversation does; and the session."""
    session = Session(tiny(memory=memory), chunk=16, segment=8)
    # the static step as it is on a GPU, run as written
    session.graph = graph
    tokens, out, at = np.random.default_rng(0).integers(0, 60, 100).tolist(), [], 0
    for read, wrote in turns:
        out.append(session.read(tokens[at : at + read], wrote))
        out += [session.step(t) for t in tokens[at + read : at + read + wrote]]
        at += read + wrote
    return np.stack([ops.numpy(x) for x in out]), session


@pytest.mark.parametrize("memory", MEMORIES)
def test_the_static_step_writes_what_the_plain_one_writes(memory):
    a, b = write(memory, False)[0], write(memory, True)[0]
    assert np.abs(a - b).max() < 1e-4 * a.std() + 1e-5


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("graph", [False, True])
def test_a_session_never_overruns_its_buffers(memory, graph):
    _, session = write(memory, graph)
    if memory.startswith("sinks"):
        session.step(1)
    else:
        with pytest.raises(Refused, match="no room"):
            session.step(1)


def test_a_bounded_cache_stays_flat_far_past_its_budget():
    session = Session(tiny(memory="sinks:budget=20"), chunk=16, segment=8)
    session.read(range(40))
    sizes = set()
    for i in range(200):
        logits = ops.numpy(session.step(i % 60))
        sizes.add(session.nbytes())
        assert np.isfinite(logits).all()
    # the segment's room fills and empties; what is allocated does not move
    assert max(sizes) == min(sizes)


@pytest.mark.skipif(ops.BACKEND != "mlx", reason="MLX's steps")
@pytest.mark.parametrize("memory", [*MEMORIES, "h2o:budget=20", "sinks:budget=20/h2o:budget=20"])
@pytest.mark.parametrize("what", MODELS, ids=lambda what: "-".join(map(str, what.values())))
def test_mlx_s_steps_in_fewer_calls_write_the_same(monkeypatch, memory, what):
    from kernels import step, step_mlx

    def written(fast):
        calls = []
        kind = lambda *args: calls.append(1) or real(*args)
        real = step_mlx.step
        with monkeypatch.context() as m:
            m.setattr(step_mlx, "step", kind)
            m.setattr(step, "written_call", lambda: step_mlx.fast_call() if fast else None)
            session = Session(tiny(memory=memory, **what), chunk=16, segment=8)
            out = [session.read(range(30), 20)] + [session.step(i) for i in range(20)]
            out += [session.read(range(5), 5)] + [session.step(i) for i in range(5)]
        return np.stack([ops.numpy(x) for x in out]), len(calls)

    (want, never), (got, often) = written(False), written(True)
    assert np.abs(got - want).max() < 1e-4 * want.std() + 1e-5
    # two layers; who looks at attention's weights does so as it is written
    assert (never, often) == (0, 25 * (2 if "h2o" not in memory else memory.count("sinks")))


def asked(session):
    """How many primitives MLX has to run for the session's next step."""
    import mlx.core as mx

    dot = io.StringIO()
    mx.export_to_dot(dot, session.run.step(ops.array(np.array([[3]], "int32")), session.run.state, False)[0])
    return dot.getvalue().count("shape=rectangle")


@pytest.mark.skipif(ops.BACKEND != "mlx", reason="MLX's steps")
@pytest.mark.parametrize("memory", ["full", "sinks:budget=20"])
def test_mlx_s_step_asks_for_no_more_than_it_needs(monkeypatch, memory):
    import mlx.core as mx

    from kernels import rotate, step

    # what is one kernel on a GPU: two norms, two rotations, attention (and one more that holds keys and values)
    monkeypatch.setattr(mx.fast, "rms_norm", lambda x, w, eps: mx.erf(x))
    monkeypatch.setattr(mx.fast, "rope", lambda x, *a, **k: mx.tan(x))
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", lambda q, k, v, **_: mx.depends([mx.sinh(q)], [k, v])[0])
    monkeypatch.setattr(rotate.rotate_mlx, "can", lambda pos: pos.size == 1)

    def steps(layers):
        session, found = Session(tiny(memory=memory, layers=layers), chunk=16, segment=8), []
        session.read(range(30), 40)
        for i in range(20):
            session.step(i)
            found.append(asked(session))
        return found

    two, three = steps(2), steps(3)
    # and seven products, four reshapes, two new entries and two views of those in use, unless they are all there is, the gate, two sums
    assert {b - a for a, b in zip(two, three)} == ({22, 24} if memory != "full" else {24}) and len(set(two[:5])) == 1
    monkeypatch.setattr(step, "written_call", lambda: None)
    assert steps(3)[0] - steps(2)[0] > 40, "as it is written, it is more"


@pytest.mark.parametrize("memory, ahead", [("full", True), ("sinks:budget=20", True), ("window:budget=20", True), ("h2o:budget=20", False)])
def test_where_tokens_to_come_will_stand_is_noted_once(memory, ahead):
    session = Session(tiny(memory=memory), chunk=16, segment=8, graph=False)
    session.read(range(16), 12)
    for i in range(5):
        session.step(i)
    policy, s = session.memories[0], session.run.state["layers"][0]
    row = lambda s: [*ops.numpy(s["pos"])[0, 0], *(ops.numpy(s["born"])[0, 0] if "born" in s else [])]
    noted, nothing = [*range(21), *range(21, 28)], [*range(21), *[-1] * 7]
    times = 2 if "born" in s else 1
    assert s["n"] == 21 and row(s) == times * (noted if ahead else nothing)
    # who does not ask how many slots are in use sees no more of them
    assert row(policy.still(s)) == times * nothing
    assert row(policy.packed(s))[:28] == (nothing[:21] * times if memory == "full" else times * nothing)[:28]
    # a token that does not follow stands where it says
    _, state = session.model(ops.array(np.array([[3]], "int32")), {**session.run.state, "next": 40}, close=False)
    assert row(state["layers"][0])[20:23] == [20, 40, 41 if ahead else -1]


@pytest.mark.parametrize("name", plugins.names("memory"))
def test_room_is_made_for_what_takes_it(name):
    """A bounded memory wants no more for a longer text; a growing one exactly as much."""
    memory = tiny(memory=small("memory", name)).model.layers[0].self_attn.memory
    start = memory.start(4, 0)
    assert memory.room(start, 4, 0) == start
    assert (memory.room(start, 4, 99) == memory.start(4, 99) != start) if memory.grows else (memory.room(start, 4, 99) == start)


def test_full_memory_is_counted_in_bytes():
    c = tiny().config
    session = Session(tiny(), chunk=64)
    session.read(range(50), 14)
    slot = c.num_hidden_layers * (2 * c.num_key_value_heads * c.head_dim * 4 + 4)
    assert session.nbytes() == 64 * slot


def sampled(n=2000, seed=0, **how):
    """How often each of six tokens is drawn."""
    logits = ops.array(np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.04, 0.01], "float32")))
    sampler = Sampler(seed=seed, **{"temperature": 1.0, "min_p": 0.0, **how})
    return np.bincount([sampler(logits, [0, 5]) for _ in range(n)], minlength=6) / n


def test_sampling_follows_the_probabilities():
    np.testing.assert_allclose(sampled(), [0.4, 0.3, 0.15, 0.1, 0.04, 0.01], atol=0.04)


@pytest.mark.parametrize(
    "how, possible",
    [
        ({"temperature": 0}, [0]),
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.5}, [0, 1]),
        ({"top_p": 0.39}, [0]),
        ({"top_p": 0.71}, [0, 1, 2]),
        ({"min_p": 0.3}, [0, 1, 2]),
        ({"top_k": 3, "top_p": 0.8}, [0, 1]),
    ],
    ids=str,
)
def test_filters_keep_exactly_the_tokens_that_they_should(how, possible):
    # top_k=3 renormalises to .47, .35, .18: the first two reach .8
    assert np.flatnonzero(sampled(**how)).tolist() == possible


def test_temperature_and_repetition_penalty():
    cold, warm = sampled(temperature=0.5), sampled(temperature=2.0)
    p = np.array([0.4, 0.3, 0.15, 0.1, 0.04, 0.01])
    np.testing.assert_allclose(cold, p**2 / (p**2).sum(), atol=0.04)
    np.testing.assert_allclose(warm, p**0.5 / (p**0.5).sum(), atol=0.04)
    # logits are negative, so the penalty multiplies those of the tokens seen, 0 and 5
    q = np.where([1, 0, 0, 0, 0, 1], p**2, p)
    np.testing.assert_allclose(sampled(repetition_penalty=2.0), q / q.sum(), atol=0.04)


def test_the_same_seed_gives_the_same_draws():
    assert (sampled(50, seed=1) == sampled(50, seed=1)).all()
    assert (sampled(200, seed=1) != sampled(200, seed=2)).any()


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_stop_strings_end_the_text_and_are_never_shown(size):
    text = "one END two\nUser: three"
    for stops, shown in ([["\nUser:"], "one END two"], [["END", "\nUser:"], "one "], [["absent"], text], [[], text]):
        until, out = Until(stops), ""
        for i in range(0, len(text), size):
            out += until.push(text[i : i + size])
            assert not any(s in out for s in stops)
            if until.done:
                break
        assert out + until.flush() == shown
        assert until.done == (shown != text)


def test_generate_streams_counts_and_stops():
    shown = []
    session = Session(tiny(), chunk=8)
    text, stats = generate(session, Letters(), list(range(20)), 12, Sampler(temperature=0), show=shown.append)
    assert text == "".join(shown) and len(text) == stats["wrote"] == 12 and stats["read"] == 20
    # what was written but the last token has been read as well
    assert len(session.tokens) == 31 and all(type(t) is int for t in session.tokens)
    again, _ = generate(Session(tiny(), chunk=8), Letters(), list(range(20)), 12, Sampler(temperature=0), stops=[text[4:6]])
    assert again == text[: text.find(text[4:6])]


@pytest.mark.parametrize("n", [3, 12])
def test_speed_is_tokens_by_the_time_of_their_steps(n, monkeypatch):
    """By a clock that each step moves on by half a second, the first and the prompt by a minute."""
    session, clock, costs = Session(tiny(), chunk=8), [0.0], iter([60.0, 60.0, *[0.5] * n])

    def slow(f):
        def run(*args):
            clock[0] += next(costs)
            return f(*args)

        return run

    session.read, session.step = slow(session.read), slow(session.step)
    monkeypatch.setattr(script.time, "perf_counter", lambda: clock[0])
    assert generate(session, Letters(), [0], n, Sampler(temperature=0))[1]["speed"] == 2


@pytest.mark.parametrize(
    "attn, memory, says",
    [
        ("full", "window:budget=4", None),
        ("window:window=512", "full", None),
        ("window:window=512", "window:budget=511", None),
        ("window:window=512", "window:budget=510", "511 of the past, and"),
        ("window:window=512", "snapkv:budget=511", None),
        ("window:window=512", "snapkv:budget=510", "511 of the past, and"),
        ("window:window=512", "snapkv:budget=0.5", None),
        ("window:window=512", "quantised:budget=510,channels=8", "511 of the past, and"),
        ("window:window=512", "pooled:budget=2043,sinks=0", "511 of the past, and"),
        ("window:window=512", "pooled:budget=2044,sinks=0", None),
        ("window:window=512", "xl:length=510", "511 of the past, and"),
        ("window:window=512", "infini", None),
        ("longformer:window=512,n_global=3", "window:budget=511", "514 of the past, the text's first ones"),
        ("longformer:window=512,n_global=3", "window:budget=9999", "514 of the past, the text's first ones"),
        ("longformer:window=512,n_global=3", "sinks:budget=514,sinks=3", None),
        ("longformer:window=512,n_global=3", "sinks:budget=513,sinks=3", "514 of the past"),
        ("window:window=512", "duo:budget=20,sinks=4", "511 of the past"),
        ("window:window=512", "duo:budget=20,sinks=4,share=1.0", None),
        ("strided", "window", "however far back"),
        ("bigbird", "sinks", "however far back"),
        ("duo", "sinks", "however far back"),
        ("full/window:window=9", "sinks/window:budget=7", "--attn window:window=9 may see 8 of the past, and --memory window:budget=7 "),
        ("routing", "full", None),
        ("s2", "window:budget=5", None),
    ],
)
def test_what_a_memory_loses_is_said(attn, memory, says):
    model = tiny(attn, memory=memory)
    model.model.patterns(training=False)
    notes = cli.lost(model)
    assert (not notes) if says is None else (len(notes) == 1 and says in notes[0]), notes
