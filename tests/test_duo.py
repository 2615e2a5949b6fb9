"""DuoAttention's memory: each kind of heads sees what the paper says, in the bytes that it costs; which heads, a file may say."""

from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TINY, apart, run, text, tiny, whole

import ops
import plugins
from errors import Refused
from memory.duo import retrieval
from model import Config, Llama

T, WINDOW, SINKS = 40, 6, 3
BOUND = f"budget={WINDOW - 1 + SINKS},sinks={SINKS}"
# layers x key heads; the four largest stay full
ALPHAS = [[0.1, 0.9, 0.2, 0.8], [1.0, 0.3, 0.7, 0.6], [0.0, 0.1, -0.5, 0.2]]
FULL = [(1, 3), (0, 2), ()]


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "of a model" / "heads.tsv"
    path.parent.mkdir()
    path.write_text("".join("\t".join(f"{x:.18e}" for x in row) + "\n" for row in ALPHAS))
    return path


def model(memory, pos="rope", H=4, K=4):
    changes = {"num_hidden_layers": 3, "num_attention_heads": H, "num_key_value_heads": K, "head_dim": 8}
    return Llama(Config(**{**TINY, **changes, "memory": memory, "pos": pos})).init(seed=1, std=0.2)


def patterned(full, pos, H=4, K=4):
    """A model whose query heads see everything where their key head is full, else sinks and window, by a mask."""

    def rule(heads):
        kind = ops.array(np.repeat(np.isin(np.arange(K), heads), H // K)[:, None, None])
        return lambda q, k, h, o: (k <= q) & (kind | (q - k < WINDOW) | (k < SINKS))

    made = model("full", pos, H, K)
    for block, heads in zip(made.model.layers, full):
        block.self_attn.rule = plugins.Plugin("mine", SimpleNamespace(allowed=rule(heads)), None)
    return made


def test_token_by_token_it_is_the_pattern():
    """Where the prompt comes in segments of one token, heads see what --attn duo lets them see."""
    want = run(tiny(f"duo:full=50,window={WINDOW},sinks={SINKS}"), text(T, 2))
    assert apart(run(tiny(memory=f"duo:{BOUND}"), text(T, 2), whole(T, 1), room=T), want) < 1e-4
    assert apart(run(tiny(memory=f"duo:{BOUND},heads=0"), text(T, 2), whole(T, 1)), want) > 1e-2
    assert apart(run(tiny(memory=f"duo:{BOUND},share=1.0"), text(T, 2), whole(T, 1)), run(tiny(), text(T, 2))) < 1e-4


@pytest.mark.parametrize("pos", ["rope", "alibi", "t5", "xl", "dynamic:original=64"])
@pytest.mark.parametrize("H", [4, 8])
def test_heads_from_a_file(table, pos, H, use):
    """Heads that are not neighbours keep their order, their biases and their queries."""
    got = run(model(f"duo:{BOUND},heads={table},share={1 / 3:.4f}", pos, H), text(T, 2), whole(T, 1), room=T)
    use("dense")
    assert apart(got, run(patterned(FULL, pos, H), text(T, 2))) < 1e-3
    assert apart(got, run(patterned(FULL[::-1], pos, H), text(T, 2))) > 1e-2


def test_the_largest_alphas_stay_full(table):
    place = lambda i, share: plugins.tile("memory", f"duo:heads={table},share={share}", 3, n_kv_head=4)[i].options
    assert [tuple(retrieval(place(i, 0.33))) for i in range(3)] == FULL
    assert sum(len(retrieval(place(i, 0.5))) for i in range(3)) == 6
    assert [len(retrieval(place(i, 1.0))) for i in range(3)] == [4, 4, 4]
    # of those that are equal, negative ones being zeros, the earlier
    assert [retrieval(place(2, share)) for share in (10 / 12, 11 / 12)] == [[1, 3], [0, 1, 3]]


def test_a_file_lies_in_folders(table):
    parts = plugins.tile("memory", f"duo:heads={table},share=0.25/sinks:budget=9/full", 3)
    assert [str(p) for p in parts] == [f"duo:heads={table},share=0.25", "sinks:budget=9", "full"]
    assert [p.name for p in plugins.tile("memory", "duo:heads=1/full", 2)] == ["duo", "full"]


@pytest.mark.parametrize("segment", [1, 8])
def test_bytes(table, segment):
    """Full heads hold the text, the others their budget and the open segment."""
    made, sizes = model(f"duo:{BOUND},heads={table},share=0.3334"), []
    state = made.start(segment, T)
    with ops.no_grad():
        for i in range(0, T, segment):
            _, state = made(ops.array(text(T)[:, i : i + segment]), state)
    for layer in state["layers"]:
        sizes.append([])
        ops.tree_map(lambda a: sizes[-1].append(ops.nbytes(a)) or a, layer)
    slots = WINDOW - 1 + SINKS + segment
    kv, here = 2 * 8 * 4, lambda n: n * T * 2 * 8 * 4 + (T * 4 if n else 0)
    # a position for all heads of a kind; the streaming ones' also says where a token was born
    assert [sum(s) for s in sizes] == [here(n) + slots * ((4 - n) * kv + 8) for n in (2, 2, 0)]


def test_a_share_of_the_text():
    some, tokens = (tiny(memory=f"duo:budget={b},sinks=2") for b in (0.25, 10))
    assert (run(some, text(T), whole(T), room=T) == run(tokens, text(T), whole(T), room=T)).all()


@pytest.mark.parametrize(
    "spec, says",
    [
        ("duo:budget=5,sinks=5", "larger than the sinks"),
        ("duo:share=1.5", "share"),
        ("duo:heads=3", "2 key heads"),
        ("duo:heads=absent.tsv", "file that can be read"),
        ("duo:heads=<table>", "3 x 4 numbers"),
        ("duo:heads=<words>", "no table"),
        ("duo:heads=<ragged>", "no table"),
    ],
)
def test_refused(table, spec, says):
    (table.parent / "words").write_text("a\tb\n")
    (table.parent / "ragged").write_text("1\t2\n3\n4\n")
    for name in ("words", "ragged"):
        spec = spec.replace(f"<{name}>", str(table.parent / name))
    with pytest.raises(Refused, match=says) as no:
        Llama(Config(**TINY, num_hidden_layers=2, memory=spec.replace("<table>", str(table))))
    assert "\n" not in str(no.value)


def test_patterns_that_tell_heads_apart_are_refused():
    with pytest.raises(Refused, match="take --attn full"):
        Llama(Config(**TINY, num_hidden_layers=2, memory="duo", attn="full/duo"))


def test_counters_come_back_to_the_host():
    made = tiny(memory=f"duo:{BOUND}")
    with ops.no_grad():
        _, state = made(ops.array(text(8)), made.start(8, 16))
    again = made.moving(made.still(state))
    found = [layer[kind]["n"] for layer in again["layers"] for kind in ("full", "streaming")]
    assert found == [8, 8] * 2 and {type(n) for n in found} == {int}


def test_heads_that_are_all_full_can_be_cut():
    """As the full cache is; where some stream, never."""
    made = tiny(memory="duo:share=1.0")
    with ops.no_grad():
        _, state = made(ops.array(text(T)), made.start(T, T + 9))
        layers = [block.self_attn.memory.cut(s, 11) for block, s in zip(made.model.layers, state["layers"])]
        y, _ = made(ops.array(text(20)[:, 11:]), {"next": 11, "layers": layers})
    assert apart(ops.numpy(y), run(tiny(), text(20))[:, 11:]) < 1e-4
    assert tiny(memory=f"duo:{BOUND}").model.layers[0].self_attn.memory.cut(state["layers"][0], 11) is None
