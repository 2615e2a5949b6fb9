"""Patterns joined by "|" and "&": what they see is what numpy's or and and make of their parts."""

import functools
import json
import operator

import numpy as np
import pytest
from conftest import TINY, apart, run, text, tiny

import ops
import plugins
from errors import Refused
from kernels.layout import layout
from kernels.spans import behaviours, is_causal, reach
from model import Config, Llama, load, save

SPECS = {
    "window:window=4|strided:window=1,stride=7": "either",
    "local:block=9&window:window=5": "both",
    # & binds tighter
    "longformer:window=2,n_global=1|local:block=9&strided:window=1,stride=2": "mixed",
    "duo:window=3,sinks=1&bigbird:block=3,window=1,n_global=0,n_random=1|window:window=2|s2:group=4": "four",
}
every = pytest.mark.parametrize("spec", SPECS, ids=SPECS.values())


def parse(spec, layer=1, n_head=4):
    return plugins.place(plugins.parse("attention", spec), layer=layer, n_layer=2, n_head=n_head, n_kv_head=2)


def seen(spec, n, head):
    """By numpy alone, from the spelling."""
    see = lambda s: parse(s).module.allowed(np.arange(n)[:, None], np.arange(n), head, parse(s).options)
    return functools.reduce(
        operator.or_, (functools.reduce(operator.and_, (see(leaf) for leaf in part.split("&"))) for part in spec.split("|"))
    )


@every
def test_a_joined_pattern_is_what_numpy_makes_of_its_parts(spec):
    rule, at = parse(spec), np.arange(40)
    for head in range(4):
        got = rule.module.allowed(at[:, None], at, head, rule.options)
        np.testing.assert_array_equal(got, seen(spec, 40, head))
        for leaf in rule.leaves():
            alone = leaf.module.allowed(at[:, None], at, head, leaf.options)
            assert (alone != got).any(), "or this test could not tell the parts"


def test_the_parts_are_there_for_a_compiler():
    rule = parse("window:window=4|local&bigbird:seed=3", layer=7)
    assert rule.module.OPERATOR == "|" and [str(p) for p in rule.options.parts] == ["window:window=4", "local&bigbird:seed=3"]
    both = rule.options.parts[1]
    assert both.module.OPERATOR == "&" and both.options.parts[1].options.layer == 7
    assert [leaf.name for leaf in rule.leaves()] == ["window", "local", "bigbird"]
    assert not any(hasattr(leaf.options, "parts") or hasattr(leaf.module, "OPERATOR") for leaf in rule.leaves())


@every
def test_spelled_and_read_again(spec):
    rule = plugins.parse("attention", spec)
    assert str(rule) == spec and plugins.parse("attention", str(rule)) == rule and hash(plugins.parse("attention", spec)) == hash(rule)
    assert rule != plugins.parse("attention", spec.replace("window=", "window=1", 1))
    spaced = spec.replace("|", " | ").replace("&", " & ")
    assert plugins.parse("attention", spaced) == rule


@pytest.mark.parametrize(
    "spec, says",
    [
        ("window|nonsense", "--attn 'nonsense' is not known: choose one of"),
        ("window|", "--attn '' is not known"),
        ("window&&full", "--attn '' is not known"),
        ("window|strided:windw=3", "strided has no option 'windw'"),
        ("window|local:block=0", "--attn local: block=0"),
        ("(window|full)&local", "is not known"),
        ("window|routing", "--attn routing is more than a rule of positions and cannot be joined by [|]"),
        ("longformer:own_projections=true&window", "--attn longformer:own_projections=true is more than a rule of positions"),
    ],
)
def test_refused(spec, says):
    with pytest.raises(Refused, match=says) as no:
        plugins.parse("attention", spec)
    assert "\n" not in str(no.value)


@pytest.mark.parametrize("folder", ["positions", "memory", "adapters"])
def test_only_attention_patterns_are_joined(folder):
    a, b = plugins.names(folder)[0], plugins.names(folder)[-1]
    with pytest.raises(Refused, match="is not known"):
        plugins.parse(folder, f"{a}|{b}")


def test_a_layer_of_a_pattern_may_be_joined():
    c = Config(**TINY, num_hidden_layers=3, attn="full/window:window=4|strided/bigbird&s2")
    layers = [block.self_attn.rule for block in Llama(c).model.layers]
    assert [str(rule) for rule in layers] == ["full", "window:window=4|strided", "bigbird&s2"]
    assert (layers[2].options.parts[0].options.layer, layers[2].options.parts[1].options.n_head) == (2, 4)


def test_the_spelling_is_saved_and_loaded(tmp_path, tokenizer_files):
    spec = "full/window:window=3|strided:window=1,stride=5"
    model = tiny(spec)
    save(model, tmp_path / "m", tokenizer_files)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["nanolong"]["attn"] == spec
    again, _ = load(tmp_path / "m", dtype="float32")
    np.testing.assert_array_equal(run(again, text(20)), run(model, text(20)))
    assert apart(run(model, text(20)), run(tiny("full/window:window=3"), text(20))) > 1e-3


def test_a_training_pattern_inside_is_full_attention_in_use():
    """As alone: s2 is evaluated with full attention, so joined by & it leaves the other, and by | everything."""
    for spec, use in (("s2:group=4&window:window=5", "window:window=5"), ("s2:group=4|window:window=5", "full")):
        model = Llama(Config(**TINY, num_hidden_layers=2, attn=spec)).init(seed=1, std=0.2)
        trained = run(model, text(24))
        model.model.patterns(training=False)
        assert apart(run(model, text(24)), run(tiny(use), text(24))) < 1e-5 < 1e-2 < apart(trained, run(model, text(24)))
        assert is_causal(model.model.layers[0].self_attn.rule, 5)
        model.model.patterns(training=True)
        np.testing.assert_array_equal(run(model, text(24)), trained)


def test_what_is_said_of_the_whole():
    assert is_causal(parse("window:window=8|strided:window=1"), 8) and not is_causal(parse("window:window=8|strided:window=1"), 9)
    assert is_causal(parse("window:window=8&local:block=8"), 8) and not is_causal(parse("window:window=9&local:block=8"), 9)
    kept = reach(parse("window:window=10|longformer:window=1,n_global=2"), 100, np.arange(100))
    np.testing.assert_array_equal(np.flatnonzero(kept), [0, 1, *range(91, 100)])
    kept = reach(parse("window:window=10&local:block=95"), 100, np.arange(100))
    np.testing.assert_array_equal(np.flatnonzero(kept), range(95, 100))
    assert behaviours(parse("window|s2"), 4) == (0, 0, 2, 2) and behaviours(parse("window|strided&local"), 4) == (0,) * 4


def test_longformer_with_dilated_heads():
    """Longformer's third figure: a window, dilated in two heads, and global tokens; it needs no option of its own."""
    rule, at = parse("dilated:window=3,dilation=4,heads=2|longformer:window=1,n_global=2"), np.arange(30)
    for head in range(4):
        got = rule.module.allowed(at[:, None], at, head, rule.options)
        assert np.flatnonzero(got[29]).tolist() == [0, 1, *([21, 25, 29] if head < 2 else [27, 28, 29])]
    found = layout(rule, (0, 4096), (0, 4096), 64, head=0)
    assert len(found.pairs) < 4 * 64


@pytest.mark.skipif(ops.BACKEND != "torch", reason="torch.compile")
def test_one_graph():
    """A compiler follows the parts without a break."""
    import torch

    model, tokens = tiny("window:window=4|strided:window=1,stride=7&local:block=9"), ops.array(text(12))
    with ops.no_grad():
        want = model(tokens)
        got = torch.compile(model, fullgraph=True, backend="eager")(tokens)
    assert apart(ops.numpy(got), ops.numpy(want)) < 1e-5
