"""The rules in attention/: one reading on every kind of array, and of each paper a property that a wrong rule would fail."""

import dataclasses
import importlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import JOINED, RULES

import plugins
from errors import Refused
from kernels.layout import layout
from kernels.spans import FAR, Span, Truth

every_rule = pytest.mark.parametrize("name", RULES + JOINED)
PICTURES = {
    ("bigbird:block=2,window=1,n_global=1,n_random=0", 0): "x..... xx.... xxx... xxxx.. xx..x. xx..xx",
    ("bigbird:block=1,window=2,n_global=0,n_random=0", 0): "x..... xx.... .xx... ..xx.. ...xx. ....xx",
    ("strided:window=1,stride=3", 0): "x..... .x.... ..x... x..x.. .x..x. ..x..x",
    ("strided:window=2,stride=4", 0): "x..... xx.... .xx... ..xx.. x..xx. .x..xx",
    ("dilated:window=2,dilation=3,heads=1", 0): "x..... .x.... ..x... x..x.. .x..x. ..x..x",
    ("dilated:window=2,dilation=3,heads=1", 1): "x..... xx.... .xx... ..xx.. ...xx. ....xx",
    ("s2:group=4", 0): "x..... xx.... xxx... xxxx.. ....x. ....xx",
    ("s2:group=4", 1): "x..... xx.... xxx... xxxx.. ....x. ....xx",
    ("s2:group=4", 2): "x..... xx.... ..x... ..xx.. ..xxx. ..xxxx",
    ("duo:window=2,sinks=1", 1): "x..... xx.... xxx... xxxx.. xxxxx. xxxxxx",
    ("duo:window=2,sinks=1", 2): "x..... xx.... xxx... x.xx.. x..xx. x...xx",
}


def parse(spec, layer=0, n_head=4, n_kv_head=2):
    return plugins.place(plugins.parse("attention", spec), layer=layer, n_layer=layer + 1, n_head=n_head, n_kv_head=n_kv_head)


def seen(rule, n, head=0, start=0):
    at = start + np.arange(n)
    return rule.module.allowed(at[:, None], at, head, rule.options)


@pytest.mark.parametrize("spec, head", PICTURES, ids=lambda x: str(x))
def test_a_rule_is_its_picture(spec, head):
    want = np.array([[c == "x" for c in row] for row in PICTURES[spec, head].split()])
    np.testing.assert_array_equal(seen(parse(spec), 6, head), want)


@every_rule
def test_every_token_sees_itself_and_none_ahead(name):
    for start in (0, 2**20 - 7, FAR - 80):
        for head in range(4):
            see = seen(parse(name), 80, head, start)
            assert see.diagonal().all() and not np.triu(see, 1).any()


@pytest.mark.parametrize("framework", ["numpy", "torch", "mlx.core"])
@every_rule
def test_one_reading_on_every_kind_of_array(name, framework):
    """int32 arrays near 2^22, of frameworks too, say what int64 says, so nothing overflows; padding before position 0 breaks nothing."""
    xp = pytest.importorskip(framework)
    array = lambda x: xp.asarray(np.asarray(x, "int32")) if framework != "mlx.core" else xp.array(np.asarray(x, "int32"))
    rule, h = parse(name, layer=31, n_head=64, n_kv_head=8), np.arange(64)[:, None, None]
    for start in (-3, 2**20 - 9, FAR - 30):
        q, k = np.arange(start, start + 30)[:, None], np.concatenate([np.arange(-1, 20), start + np.arange(30)])
        got = np.array(rule.module.allowed(array(q), array(k), array(h), rule.options).tolist())
        want = rule.module.allowed(q, k, h, rule.options)
        live = (q >= 0) & (k >= 0) & (h >= 0)
        np.testing.assert_array_equal((got & live), want & live)


@every_rule
def test_a_block_of_one_pair_is_decided(name):
    """On single positions the interval reading is the rule itself."""
    rule, draw = parse(name), np.random.default_rng(0)
    q = np.concatenate([draw.integers(0, 4000, 300), draw.integers(0, FAR, 300)])
    k = np.maximum(q - draw.integers(0, 3000, 600), 0)
    for h in range(4):
        t = Truth.of(rule.module.allowed(Span(q, q), Span(k, k), h, rule.options))
        want = rule.module.allowed(q, k, h, rule.options)
        np.testing.assert_array_equal(t.must, want)
        np.testing.assert_array_equal(t.may, want)


@pytest.mark.parametrize("name", RULES)
def test_options_are_checked(name):
    for f in dataclasses.fields(plugins.load("attention", name).Options):
        if f.name not in plugins.FILLED_IN and type(f.default) is int:
            with pytest.raises(Refused, match=f"{name}: .*{f.name}=-1"):
                plugins.parse("attention", f"{name}:{f.name}=-1")


@pytest.mark.parametrize("spec", ["s2:group=7", "s2:group=0", "duo:full=101", "bigbird:seed=65536", "bigbird:block=0", "strided:stride=0"])
def test_impossible_options_are_refused(spec):
    with pytest.raises(Refused, match=spec.partition(":")[2]):
        plugins.parse("attention", spec)


def test_heads_are_filled_in_by_the_model():
    from model import Config, Llama

    c = Config(vocab_size=9, hidden_size=24, intermediate_size=8, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2)
    layers = Llama(dataclasses.replace(c, attn="duo:full=30/bigbird/s2")).model.layers
    o = [block.self_attn.rule.options for block in layers]
    assert (o[0].n_head, o[0].n_kv_head, o[1].layer, o[2].n_head) == (6, 2, 1, 6)
    assert str(layers[0].self_attn.rule) == "duo:full=30"


# bigbird


def links(o, blocks, heads=4):
    """[heads, n_random, blocks]"""
    module = plugins.load("attention", "bigbird")
    return np.array([[module.link(blocks, h, t, o) for t in range(o.n_random)] for h in range(heads)])


def test_bigbird_draws_from_the_past_alone():
    for spec in ("bigbird:block=1", "bigbird:n_random=5,seed=65535"):
        rule, i = parse(spec, layer=200), np.concatenate([np.arange(5000), 2**20 + np.arange(3000), FAR - 1 - np.arange(3000)])
        to = links(rule.options, i, 128)
        assert (to >= 0).all() and (to <= i).all()


@pytest.mark.parametrize("framework", ["numpy", "torch", "mlx.core"])
def test_bigbird_links_fit_32_bits(framework):
    """Frameworks and Triton reckon in int32: the largest layers, heads and seeds give what int64 gives, at every block up to 2^22."""
    xp, module = pytest.importorskip(framework), plugins.load("attention", "bigbird")
    i, h = np.concatenate([np.arange(3000), FAR - 1 - np.arange(3000) * 1397 % FAR]), np.array([[0], [7], [1023]])
    array = lambda x: (xp.array if framework == "mlx.core" else xp.asarray)(x.astype("int32"))
    for o in (parse("bigbird:seed=65535", layer=1023).options, parse("bigbird").options):
        for t in (0, 3, 100):
            got = np.array(module.link(array(i), array(h), t, o).tolist())
            np.testing.assert_array_equal(got, module.link(i, h, t, o))


def test_bigbird_links_do_not_move_with_the_length():
    """Decoding at any length must see what training saw: the rows of a longer text's layout begin as the shorter one's."""
    rule = parse("bigbird:block=16,window=1,n_global=0", layer=3)
    short, long = (layout(rule, (0, n), (0, n), 16, head=2).rows for n in (16 * 40, 16 * 97))
    np.testing.assert_array_equal(short.items, long.items[: len(short.items)])
    np.testing.assert_array_equal(short.start, long.start[:41])
    # and a query alone, far out, has the links that it has in the whole text
    alone = layout(rule, (16 * 90, 16), (0, 16 * 97), 16, head=2).rows.items
    assert set(alone) == set(long.items[long.start[90] : long.start[91]]) and len(alone) > 2


def test_bigbird_links_differ_by_layer_head_seed_and_number():
    i = np.arange(1000, 3000)
    a = links(parse("bigbird").options, i)
    assert (a[0, 0] == a[0, 1]).mean() < 0.01 and (a[0, 0] == a[1, 0]).mean() < 0.01
    assert (a == links(parse("bigbird", layer=1).options, i)).mean() < 0.01
    assert (a == links(parse("bigbird:seed=1").options, i)).mean() < 0.01
    np.testing.assert_array_equal(a, links(parse("bigbird").options, i))


def test_bigbird_links_are_spread_evenly():
    """Tenths of the past are drawn alike, near and far out, where blocks outnumber what a small hash could reach."""
    for start in (2000, 60000, 2**22 - 5001):
        i = np.arange(start, start + 5000)
        to = links(parse("bigbird:block=1").options, i, 8) / (i + 1)
        share = np.histogram(to, 10, (0, 1))[0] / to.size
        assert (abs(share - 0.1) < 0.01).all(), share
        # neighbours do not draw alike
        assert abs(np.corrcoef(to[0, 0, :-1], to[0, 0, 1:])[0, 1]) < 0.06


def test_bigbird_sees_as_many_blocks_as_it_says():
    """Window, first and random blocks: far out, all of them and nothing else."""
    o = parse("bigbird:block=8,window=3,n_global=2,n_random=4").options
    module, q, k = plugins.load("attention", "bigbird"), np.arange(8000, 8160), np.arange(8160)
    for h in range(4):
        count = module.allowed(q[7::8, None], k, h, o).sum(1) / 8
        assert count.max() == 9 and count.mean() > 8.8 and count.min() >= 5


# strided, dilated


def test_strided_reaches_everything_in_two_steps():
    """Sparse Transformer, section 4.2: with factorized attention any earlier token is at most two steps away."""
    see = seen(parse("strided:window=12,stride=12"), 150)
    np.testing.assert_array_equal(see @ see, np.tri(150, dtype=bool))
    assert see.sum(1).max() <= 12 + 150 // 12


def test_dilated_heads_see_as_many_tokens_further_away():
    rule = parse("dilated:window=9,dilation=5,heads=2")
    far, near = seen(rule, 100, 1), seen(rule, 100, 2)
    assert far[99].sum() == near[99].sum() == 9
    assert np.flatnonzero(far[99])[0] == 99 - 8 * 5 and np.flatnonzero(near[99])[0] == 99 - 8


# s2


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (9, 3), (8, 1), (1, 1)])
def test_s2_is_the_roll_without_its_leak(heads, kv_heads):
    """The paper's own form: the heads from the middle on are rolled back by half a group, then cut into groups that are causal inside;
    but in the last group, the text's first tokens may not see its last ones, nor the last ones' half group be seen from there."""
    group, n = 8, 48
    rule = parse(f"s2:group={group}", n_head=heads, n_kv_head=kv_heads)
    for h in range(heads):
        order = np.roll(np.arange(n), -(group // 2) if h >= heads / 2 else 0)
        want = np.zeros((n, n), bool)
        for part in order.reshape(-1, group):
            want[np.ix_(part, part)] = np.tri(group, dtype=bool)
        leak = np.triu(want, 1)
        assert leak.any() == (h >= heads / 2), "the roll leaks, or this test is blind"
        np.testing.assert_array_equal(seen(rule, n, h), want & ~leak)


def test_s2_lets_text_flow_between_groups_only_through_both_halves():
    rule = parse("s2:group=8")
    plain, shifted = seen(rule, 64, 0), seen(rule, 64, 3)
    assert not plain[8:, :8].any() and shifted[8, :8].any()
    both, reached = plain | shifted, np.eye(64, dtype=bool)
    for _ in range(16):
        reached = reached @ both
    assert reached[63, 0], "enough layers carry the first token to the last"
    assert plugins.load("attention", "s2").TRAINING_ONLY


# duo


def test_duo_between_streaming_and_full():
    full, streaming = seen(parse("full"), 60), seen(parse("longformer:window=7,n_global=3"), 60)
    assert (streaming != full).any()
    for percent, count in ((0, 0), (25, 1), (50, 2), (51, 3), (100, 4)):
        rule = parse(f"duo:full={percent},window=7,sinks=3", n_head=12, n_kv_head=4)
        for h in range(12):
            # the three query heads of a key head are of one kind
            np.testing.assert_array_equal(seen(rule, 60, h), full if h // 3 < count else streaming)


# drawing them


def drawn(capsys, *args):
    importlib.import_module("attention.__main__").main([*map(str, args)])
    return capsys.readouterr().out


def test_a_drawing_in_the_terminal(capsys):
    out = drawn(capsys, "window:window=9", "--length", 24, "--block", 4)
    assert out.splitlines()[:6] == ["▒", "█▒", "██▒", "▒██▒"[:4], "·▒█▒", "··▒█▒"] or out.splitlines()[:3] == ["▒", "█▒", "▒█▒"]
    see = seen(parse("window:window=9"), 24)
    assert f"density  {see.sum() / (24 * 25 / 2):.2%}" in out
    # 15 of 21 blocks on and below the diagonal
    assert "work     71.43%" in out and "1.4 times less" in out


def test_a_joined_pattern_is_drawn(capsys):
    spec = "window:window=9|strided:window=1,stride=11"
    out, see = drawn(capsys, spec, "--length", 64, "--block", 4), seen(parse(spec), 64)
    assert f"{spec}, 64 tokens" in out and f"density  {see.sum() / (64 * 65 / 2):.2%}" in out


def test_a_drawing_counts_what_the_layout_holds(capsys):
    out = drawn(capsys, "longformer:window=512,n_global=16", "--length", "4k")
    found = layout(parse("longformer:window=512,n_global=16"), (0, 4096), (0, 4096), 64)
    assert f"{found.full} full, {found.partial} partial, {64 * 64 - found.full - found.partial} empty" in out
    assert all(len(line) <= 64 for line in out.splitlines()[:64])


def test_a_character_shows_all_of_its_blocks(capsys):
    """Each token sees the one before: in squares of two by two, the one beside the diagonal holds a single pair."""
    lines = drawn(capsys, "window:window=2", "--length", 128, "--block", 1).splitlines()
    assert lines[:4] == ["▒", "▒▒", "·▒▒", "··▒▒"] and len(lines[63]) == 64


def test_long_patterns_fit_the_terminal(capsys):
    for length in (1, 63, 4097, 9999):
        lines = drawn(capsys, "bigbird:block=16", "--length", length, "--head", 3).splitlines()
        assert sum(line[0] in "█▒·" and " " not in line for line in lines) <= 64
        assert all(len(line) <= 64 for line in lines if " " not in line)


@pytest.mark.parametrize(
    "args, sentence",
    [
        ([], "name one pattern"),
        (["window", "--all"], "name one pattern"),
        (["--all"], "say where with --out"),
        (["nonsense"], "choose one of"),
        (["routing"], "not a pattern of positions"),
        (["window:width=3"], "has no option 'width'"),
        (["window", "--length", "0"], "cannot be drawn"),
        (["window", "--length", "1m"], "cannot be drawn"),
        (["window", "--block", "0"], "--block must be at least 1"),
        (["window", "--head", "4"], "--head less than --heads"),
        (["window", "--length", "64", "--out", "picture.txt"], "ends in .png"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_refusals(args, sentence):
    with pytest.raises(Refused, match=sentence):
        importlib.import_module("attention.__main__").main(args)


def test_a_refusal_is_exit_code_2():
    done = subprocess.run([sys.executable, "-m", "attention", "windw"], cwd=plugins.ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "choose one of" in done.stderr and "Traceback" not in done.stderr and not done.stdout


def test_pictures(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    drawn(capsys, "duo", "--length", 300, "--out", tmp_path / "deep" / "one.png")
    drawn(capsys, "--all", "--out", tmp_path / "all.png")
    for path in (tmp_path / "deep" / "one.png", tmp_path / "all.png"):
        assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size < 150_000
