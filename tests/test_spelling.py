"""name:key=value,... as the flags take it: what is read, what is written back, and how it is refused."""

import pytest
from conftest import TINY, small

import plugins
from errors import Refused
from model import Config, Llama

EVERY = [(folder, name) for folder in plugins.FOLDERS for name in plugins.names(folder)]


@pytest.mark.parametrize("folder, name", EVERY)
def test_spelled_and_read_again(folder, name):
    for spec in (name, small(folder, name)):
        plugin = plugins.parse(folder, spec)
        assert plugins.parse(folder, str(plugin)) == plugin
        assert str(plugin) == spec, "the canonical spelling of a canonical spelling"


@pytest.mark.parametrize("folder, name", EVERY)
def test_every_option_is_refused_what_it_cannot_be(folder, name):
    options = [f for f in plugins.load(folder, name).Options.__dataclass_fields__.values() if f.name not in plugins.FILLED_IN]
    for f in options:
        if type(f.default) is not str:
            with pytest.raises(Refused, match=f"{name}: {f.name} takes .*, not 'much'"):
                plugins.parse(folder, f"{name}:{f.name}=much")
    with pytest.raises(Refused) as no:
        plugins.parse(folder, f"{name}:nonsense=1")
    assert all(f"{f.name}={plugins.spell(f.default)}" in str(no.value) for f in options), "it lists the valid options"


@pytest.mark.parametrize("folder", plugins.FOLDERS)
def test_an_unknown_name_lists_the_known(folder):
    with pytest.raises(Refused) as no:
        plugins.parse(folder, "nonsense")
    assert plugins.FOLDERS[folder] in str(no.value) and all(n in str(no.value) for n in plugins.names(folder))


@pytest.mark.parametrize(
    "folder, spec, says",
    [
        ("attention", "window:window", "needs a value"),
        ("attention", "window:window=4,window=4", "given twice"),
        ("attention", "window:window=", "takes a whole number"),
        ("attention", "window:window=1.5", "takes a whole number"),
        ("attention", "window:window=0", "at least 1"),
        ("attention", "longformer:n_global=-1", "at least 0"),
        ("attention", "local:block=0", "at least 1"),
        ("attention", "", "choose one of"),
        ("attention", "base", "choose one of"),
        ("attention", "../model", "choose one of"),
        ("positions", "pi:factor=0.5", "at least 1"),
        ("positions", "pi:factor=k", "takes a number"),
        ("positions", "llama3:low=4", "below high"),
        ("memory", "window:budget=0", "at least 1"),
        ("memory", "sinks:budget=4", "larger than the sinks"),
        ("memory", "sinks:layer=1", "has no option"),
    ],
)
def test_refused(folder, spec, says):
    with pytest.raises(Refused, match=says) as no:
        plugins.parse(folder, spec)
    assert "\n" not in str(no.value) and str(no.value).startswith(plugins.FOLDERS[folder])


@pytest.mark.parametrize("text, n", [("4k", 4096), ("1m", 2**20), ("2K", 2048), (" 12 ", 12), ("-3", -3)])
def test_numbers(text, n):
    assert plugins.number(text) == n
    assert n < 1 or plugins.parse("attention", f"window:window={text}").options.window == n


@pytest.mark.parametrize("text", ["", "k", "4kk", "4km", "1.5k", "4 k k", "0x10"])
def test_no_numbers(text):
    with pytest.raises(ValueError):
        plugins.number(text)


def test_a_pattern_is_tiled_over_depth():
    layers = plugins.tile("attention", "full/window:window=4/local", 7)
    assert [p.name for p in layers] == ["full", "window", "local", "full", "window", "local", "full"]
    assert layers[4].options.window == 4
    with pytest.raises(Refused, match="names 3 layers, but the model has 2"):
        plugins.tile("attention", "full/full/full", 2)
    with pytest.raises(Refused, match="choose one of"):
        plugins.tile("attention", "full//window", 4)


def test_the_model_builds_what_each_layer_is_told():
    model = Llama(Config(**TINY, num_hidden_layers=3, attn="full/window:window=4", pos="rope/none/rope", memory="sinks:budget=9/full"))
    layers = [block.self_attn for block in model.model.layers]
    assert [str(a.rule) for a in layers] == ["full", "window:window=4", "full"]
    assert [a.memory.size for a in layers] == [9, None, 9]
    assert model.model.feels[0] == model.model.feels[2] != model.model.feels[1] and len(model.model.positions) == 2


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"attn": "nonsense"}, "--attn 'nonsense' is not known"),
        ({"pos": "rope", "head_dim": 7}, "head_dim=7 is odd"),
        ({"num_key_value_heads": 3}, "cannot share"),
        ({"hidden_size": 33}, "no multiple"),
    ],
)
def test_impossible_combinations_are_refused_before_anything_loads(changes, says):
    with pytest.raises(Refused, match=says):
        Llama(Config(**{**TINY, "num_hidden_layers": 1, **changes}))
