"""The rotary schemes: frequencies and temperatures of transformers, what a saved folder tells others, and a property of each paper."""

import itertools
import json
import math

import numpy as np
import pytest
from conftest import TINY, apart, has, run, text, tiny

import ops
import plugins
from errors import Refused
from model import Config, Llama, load, save
from positions import _hf

TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
GRID = list(itertools.product([16, 64, 80, 128], [100.0, 10000.0, 5e5], [1.0, 4.0, 31.5], [64, 4096, 8192]))
MORE = {
    "yarn": [
        {},
        {"truncate": False, "beta_fast": 20.0},
        {"attention_factor": 1.7},
        {"mscale": 0.7, "mscale_all_dim": 1.0},
        {"factor": None},
    ],
    "longrope": [{}, {"attention_factor": 1.3}, {"factor": None}],
}
# tokens in all, in units of max_position_embeddings: frequencies that move with it
LENGTHS = {"dynamic": [0.5, 1.0, 1.7, 32]}


def scheme(c):
    plugin = plugins.parse("positions", c.pos)
    return plugin.module.Position(c, plugin.options)


def rope_fields(kind, D, factor, L):
    rope = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": L}
    if kind == "llama3":
        return {**rope, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "longrope":
        return {**rope, "short_factor": [1.0] * (D // 2), "long_factor": [1 + i / D for i in range(D // 2)]}
    return rope if kind == "yarn" else {"rope_type": kind} if kind == "default" else {"rope_type": kind, "factor": factor}


def config(D, theta, L, rope, **changes):
    """A config.json of Llama's with heads of width D; rope: its rope fields in the spelling before transformers 5."""
    sizes = {"model_type": "llama", "hidden_size": 2 * D, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": D}
    return {**sizes, "max_position_embeddings": 2 * L, "rope_theta": theta, "rope_scaling": rope, **changes}


@pytest.mark.skipif(not has("torch", "transformers"), reason="the reference is transformers on torch: install both")
@pytest.mark.parametrize("kind", TYPES)
def test_frequencies_and_temperature_equal_transformers(kind, monkeypatch):
    """Their formulas, in float64 so that a difference of 1e-6 is one of formulas."""
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch, "float32", torch.float64)
    theirs = ROPE_INIT_FUNCTIONS.get(kind, LlamaRotaryEmbedding.compute_default_rope_parameters)
    # the default type alone takes no notice of partial_rotary_factor there
    shares = (1.0,) if kind == "default" else (1.0, 0.5)
    for (D, theta, factor, L), more, share in itertools.product(GRID, MORE.get(kind, [{}]), shares):
        rope = {**rope_fields(kind, int(D * share), factor, L), **more, **({} if share == 1 else {"partial_rotary_factor": share})}
        hf = config(D, theta, L, rope)
        ours = scheme(Config.from_hf(hf))
        for times in LENGTHS.get(kind, [None]):
            n = int(2 * L * times) if times else L + 1
            f, m = theirs(LlamaConfig(**{**hf, "rope_scaling": {"rope_theta": theta, **hf["rope_scaling"]}}), seq_len=n)
            mine = ours.frequencies(n) if times else ours.frequencies()
            np.testing.assert_allclose(mine, np.float64(f), rtol=1e-6, err_msg=f"{D} {theta} {factor} {L} {more} {share} {n}")
            assert ours.temperature == pytest.approx(m**2, rel=1e-6)


def test_ntk_slows_the_slowest_pair_as_interpolation_does():
    for D, theta, factor in itertools.product([4, 16, 128], [100.0, 5e5], [1.0, 4.0, 31.5]):
        c = {"hidden_size": 2 * D, "num_attention_heads": 2, "rope_theta": theta}
        plain, ntk, pi = (scheme(Config(**c, pos=pos)).frequencies() for pos in ("rope", f"ntk:factor={factor}", f"pi:factor={factor}"))
        assert ntk[0] == plain[0] == 1 and ntk[-1] == pytest.approx(pi[-1])
        assert all(x > y * (1 - 1e-9) for x, y in zip(ntk, pi))


def test_yarn_by_parts():
    """Values by hand for Llama 2: the ramp is from pair 20 to 46, and m for factors 2, 4, 8, 16."""
    c = {"hidden_size": 256, "num_attention_heads": 2, "max_position_embeddings": 4096}
    plain, yarn = scheme(Config(**c)).frequencies(), scheme(Config(**c, pos="yarn")).frequencies()
    ratio = np.array(yarn) / plain
    assert (ratio[:21] == 1).all() and np.allclose(ratio[46:], 1 / 4) and (np.diff(ratio[20:47]) < 0).all()
    assert ratio[33] == pytest.approx((1 + 1 / 4) / 2)
    m = [scheme(Config(**c, pos=f"yarn:factor={s}")).temperature ** 0.5 for s in (1, 2, 4, 8, 16)]
    np.testing.assert_allclose(m, [1, 1.0693, 1.1386, 1.2079, 1.2773], atol=1e-4)
    longer = Config(**{**c, "max_position_embeddings": 16384}, pos="yarn:original=4096")
    assert scheme(longer).frequencies() == yarn, "original=0 is the config's length"


# ---------------------------------------------------------------- what a saved folder says

SPOKEN = {
    "rope": "default",
    "pi:factor=3": "linear",
    "dynamic:factor=3": "dynamic",
    "dynamic:original=16": "dynamic",
    "ntk:factor=4": "default",
    "llama3:original=16": "llama3",
    "yarn:factor=4": "yarn",
    "yarn:factor=4,original=16,beta_fast=8,beta_slow=2": "yarn",
    "yarn:factor=2.5,attention_factor=1.5": "yarn",
}


def fresh(**changes):
    return Llama(Config(**{**TINY, "num_hidden_layers": 2, "max_position_embeddings": 32, **changes})).init(seed=2, std=0.2)


@pytest.mark.parametrize("before", ["rope", "llama3:original=16", "yarn:factor=2", "none", "ntk:factor=2"])
@pytest.mark.parametrize("pos", SPOKEN)
def test_others_read_a_scheme_from_the_flag(before, pos, tmp_path, tokenizer_files):
    """A checkpoint loaded with another --pos and saved: others' logits are ours, whatever it said before."""
    save(fresh(pos=before), tmp_path / "before", tokenizer_files)
    model, _ = load(tmp_path / "before", pos=pos, dtype="float32")
    save(model, tmp_path / "out", tokenizer_files)
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (hf["rope_scaling"] or {"rope_type": "default"})["rope_type"] == hf["rope_parameters"]["rope_type"] == SPOKEN[pos]
    assert hf["rope_parameters"]["rope_theta"] == hf["rope_theta"]
    want = run(model, text(60, 2))
    assert pos == "rope" or apart(run(fresh(), text(60, 2)), want) > 1e-2, "or this test is blind"
    if ops.BACKEND == "torch":
        transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
        theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        got = theirs(torch.as_tensor(text(60, 2)).long()).logits.detach().numpy()
    else:
        pytest.importorskip("mlx_lm")
        from mlx_lm.utils import load_model

        got = ops.numpy(load_model(tmp_path / "out")[0](ops.array(text(60, 2))))
    assert apart(got, want) < 1e-4
    # and our own reading is the same Config, which says the same again
    again, _ = load(tmp_path / "out", dtype="float32")
    same = lambda c: {k: v for k, v in vars(c).items() if k != "hf"}
    assert same(again.config) == same(model.config) and again.config.to_hf().items() <= hf.items()
    # without our own fields the logits stay
    bare = Config.from_hf({k: v for k, v in hf.items() if k != "nanolong"})
    assert scheme(bare).per_turn == scheme(model.config).per_turn
    assert scheme(bare).temperature == pytest.approx(scheme(model.config).temperature)


@pytest.mark.parametrize(
    "pos, longest",
    [
        ("rope", 32),
        ("pi", 32),
        ("ntk", 128),
        ("yarn", 128),
        ("yarn:original=16,factor=8", 128),
        ("dynamic", 32),
        ("dynamic:original=16", 16),
    ],
)
def test_the_length_that_others_see(pos, longest):
    """transformers expects yarn's factor to be the ratio of the lengths; of a changed base nothing else tells."""
    c = Config(**TINY, max_position_embeddings=32, pos=pos)
    hf = c.to_hf()
    assert hf["max_position_embeddings"] == longest
    again = Config.from_hf(hf)
    same = plugins.parse("positions", again.pos) == plugins.parse("positions", pos)
    assert same and again.max_position_embeddings == 32 and again.to_hf() == hf


def test_an_original_length_beside_the_rope_fields():
    """It counts, as in transformers, until another --pos is written."""
    hf = config(16, 500.0, 64, rope_fields("yarn", 16, 2.0, 64), original_max_position_embeddings=32)
    c = Config.from_hf(hf)
    assert c.pos == "yarn:factor=2.0,original=32" and c.to_hf()["original_max_position_embeddings"] == 32
    again = Config.from_hf(Config(**{**vars(c), "pos": "yarn:factor=2.0,original=16"}).to_hf())
    assert (
        again.pos == "yarn:factor=2.0,original=16"
        and "nanolong" not in again.to_hf()
        and "original_max_position_embeddings" not in again.hf
    )


def test_schemes_without_a_name_are_ours_alone():
    """Positions that HF cannot say leave its fields as they came."""
    hf = config(16, 500.0, 64, rope_fields("yarn", 16, 2.0, 64))
    for pos in ("none", "yarn/none", "longrope"):
        said = Config(**{**vars(Config.from_hf(hf)), "pos": pos}).to_hf()
        assert said["nanolong"] == {"pos": pos} and said["rope_scaling"] == hf["rope_scaling"] and said["rope_theta"] == 500.0


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("spelling", ["type", "rope_type", "rope_parameters"])
def test_what_came_goes_back(kind, spelling):
    """A config.json that nothing changed keeps its rope fields to the bit, and both spellings read alike."""
    rope = rope_fields(kind, 16, 4.0, 64)
    want = Config.from_hf(config(16, 500.0, 64, rope))
    if spelling == "rope_parameters":
        hf = config(16, 1.0, 64, None, rope_parameters={**rope, "rope_theta": 500.0})
    else:
        hf = config(16, 500.0, 64, {spelling: kind, **{k: v for k, v in rope.items() if k != "rope_type"}})
    got = Config.from_hf(hf)
    assert (got.pos, got.rope_theta, scheme(got).per_turn) == (want.pos, 500.0, scheme(want).per_turn)
    back = got.to_hf()
    assert {k: back[k] for k in hf} == hf and "nanolong" not in back


# ---------------------------------------------------------------- far away, and refused


@pytest.mark.parametrize("pos", ["ntk", "yarn:original=16", "longrope"])
def test_only_distances_count_a_million_tokens_away(pos):
    assert apart(run(tiny(pos=pos), text(24), [[24]], at=2**20), run(tiny(pos=pos), text(24), [[24]])) < 1e-3


def test_longrope_follows_the_length():
    """The long list for a model made longer than its original length, the short one with temperature 1 for any other."""
    hf = config(16, 500.0, 64, {k: v for k, v in rope_fields("longrope", 16, 0, 64).items() if k != "factor"})
    long, short = scheme(Config.from_hf(hf)), scheme(Config.from_hf({**hf, "max_position_embeddings": 64}))
    np.testing.assert_allclose(np.divide(short.frequencies(), long.frequencies()), hf["rope_scaling"]["long_factor"])
    assert short.temperature == 1 and long.temperature == pytest.approx(1 + math.log(2) / math.log(64))


@pytest.mark.parametrize(
    "spec, says",
    [
        ("ntk:factor=0.5", "factor=0.5 would shorten"),
        ("yarn:factor=0.99", "factor=0.99 would shorten"),
        ("yarn:original=-1", "at least 1, or 0"),
        ("yarn:beta_fast=1", "beta_slow must be above 0 and below beta_fast"),
        ("yarn:attention_factor=-1", "above 0, or 0 for"),
        ("yarn:truncate=maybe", "true or false"),
        ("longrope:factor=0.5", "factor=0.5 would shorten the context"),
    ],
)
def test_bad_options_are_refused(spec, says):
    with pytest.raises(Refused, match=says) as no:
        plugins.parse("positions", spec)
    assert "\n" not in str(no.value)


LISTS = {"rope_type": "longrope", "original_max_position_embeddings": 32, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    "changes, says",
    [
        *(({"head_dim": 7, "pos": pos}, "head_dim=7 is odd") for pos in ("ntk", "yarn")),
        ({"head_dim": 2, "pos": "ntk"}, "single pair"),
        ({"rope_theta": 1.0, "pos": "yarn"}, "must be above 1"),
        ({"pos": "longrope"}, "config.json must list short_factor"),
        ({"pos": "longrope", "hf": {"rope_scaling": {**LISTS, "long_factor": [2.0] * 3}}}, "long_factor in config.json has 3 numbers"),
        ({"pos": "longrope", "hf": {"rope_scaling": {**LISTS, "original_max_position_embeddings": "far"}}}, "'far': it must be a number"),
        ({"pos": "longrope", "hf": {"rope_scaling": {**LISTS, "long_factor": [0, 1, 1, 1]}}}, "numbers above 0"),
        (
            {"pos": "longrope", "max_position_embeddings": 32, "hf": {"rope_scaling": {**LISTS, "short_factor": []}}},
            "short_factor .* 0 num",
        ),
    ],
    ids=str,
)
def test_impossible_models_are_refused(changes, says):
    with pytest.raises(Refused, match=says) as no:
        Llama(Config(**{**TINY, "num_hidden_layers": 1, **changes}))
    assert "\n" not in str(no.value)


@pytest.mark.parametrize(
    "rope, says",
    [
        ({"rope_type": "nonsense"}, "rope type 'nonsense'.* default, linear, dynamic, llama3, yarn, longrope"),
        ({"type": "mrope"}, "rope type 'mrope'"),
        ({"type": "dynamic", "factor": 0.5}, "factor=0.5 would shorten"),
        ({"type": "linear", "factor": 0.5}, "factor=0.5 would shorten"),
        ({"type": "yarn", "factor": "much"}, "factor takes a number"),
        ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": "far"}, "original takes a whole number"),
        ({"full_attention": {"rope_type": "default"}}, "one flat object"),
    ],
    ids=str,
)
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_rope_fields_that_cannot_be_are_refused(spelling, rope, says):
    with pytest.raises(Refused, match=says) as no:
        Config.from_hf({"model_type": "llama", **TINY, spelling: rope})
    assert "\n" not in str(no.value)


def test_where_both_spellings_stand_the_older_counts():
    hf = config(16, 500.0, 64, {"type": "linear", "factor": 3.0}, rope_parameters={"rope_type": "default", "rope_theta": 7.0})
    assert _hf.read(hf) == (500.0, "pi:factor=3.0")
