"""Logits equal transformers' own, for every Llama and Mistral that we claim to run; what we do not run is refused by name."""

import json
import shutil

import numpy as np
import pytest
from conftest import apart, has, run

import ops
from errors import Refused
from model import DIFFERS, Config, load, save

pytestmark = pytest.mark.skipif(not has("torch", "transformers"), reason="the reference is transformers on torch: install both")

BASE = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
BASE |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
# 60 tokens are more than 32: the lists for long texts
LONGROPE = {"short_factor": [1.0] * 8, "long_factor": [1 + i / 4 for i in range(8)], "original_max_position_embeddings": 32}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
LLAMA = {
    "gqa 1": {"num_key_value_heads": 4},
    "gqa 2": {"num_key_value_heads": 2},
    "gqa 4": {"num_key_value_heads": 1},
    "head_dim 20": {"head_dim": 20},
    "head_dim 10": {"head_dim": 10, "num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "eps": {"rms_norm_eps": 0.1},
    "theta": {"rope_theta": 500.0},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "linear, older": {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "llama3": {"rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "dynamic": {"max_position_embeddings": 32, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "dynamic, older": {"max_position_embeddings": 128, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", **YARN}},
    "yarn, older": {"rope_scaling": {"type": "yarn", "factor": 2.0}},
    "yarn, ends": {"rope_scaling": {"rope_type": "yarn", "beta_fast": 8, "beta_slow": 2.0, "truncate": False, **YARN}},
    "yarn, factor": {"rope_scaling": {"rope_type": "yarn", "attention_factor": 1.5, **YARN}},
    "yarn, mscale": {"rope_scaling": {"rope_type": "yarn", "mscale": 2.0, "mscale_all_dim": 0.5, **YARN}},
    "longrope": {"rope_scaling": {"type": "longrope", **LONGROPE}},
    "longrope, factor": {"rope_scaling": {"rope_type": "longrope", "factor": 3.0, **LONGROPE}},
    "new yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, **YARN}},
    "new longrope": {"rope_parameters": {"rope_type": "longrope", "rope_theta": 500.0, "attention_factor": 1.3, **LONGROPE}},
    "new default": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "new linear": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}},
    "new llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}},
}
MISTRAL = {
    "no window": {"sliding_window": None},
    "window 7": {"sliding_window": 7},
    "window 40": {"sliding_window": 40},
    "window 500": {"sliding_window": 500},
}
CASES = [("llama", k, v) for k, v in LLAMA.items()] + [("mistral", k, v) for k, v in MISTRAL.items()]
every = pytest.mark.parametrize("kind, changes", [(a, c) for a, _, c in CASES], ids=[f"{a}, {b}" for a, b, _ in CASES])


def theirs(kind, changes):
    """A random model of transformers': attention sharp, norms and biases not trivial."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**BASE, **changes}, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean="norm" in name, std=0.15)
    return model


def logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.as_tensor(tokens).long()).logits.numpy()


def text(T=60):
    return np.random.default_rng(5).integers(0, 97, (2, T)).astype("int32")


def folder_of(model, tmp_path, tokenizer_files, **config):
    """Their model as their save_pretrained leaves it, with a tokenizer; config: fields to put in config.json."""
    folder = tmp_path / "theirs"
    model.save_pretrained(folder)
    for file in tokenizer_files.iterdir():
        shutil.copy(file, folder / file.name)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


@every
def test_logits_equal_transformers(kind, changes, tmp_path, tokenizer_files):
    reference = theirs(kind, changes)
    folder = folder_of(reference, tmp_path, tokenizer_files)
    if "rope_scaling" in changes or "rope_theta" in changes:
        # the spelling that checkpoints had before transformers 5
        path = folder / "config.json"
        hf = {k: v for k, v in json.loads(path.read_text()).items() if k != "rope_parameters"}
        path.write_text(json.dumps({"rope_theta": 10000.0, **hf, **changes}))
    model, _ = load(folder, dtype="float32")
    want = logits(reference, text())
    assert apart(run(model, text()), want) < 1e-4
    if "dynamic" not in model.config.pos or model.config.max_position_embeddings > 60:
        assert apart(run(model, text(), [[20], [1] * 5, [35]], room=60), want) < 1e-4


@every
def test_what_we_save_they_open(kind, changes, tmp_path, tokenizer_files):
    import torch
    import transformers

    reference = theirs(kind, changes)
    save(load(folder_of(reference, tmp_path, tokenizer_files), dtype="float32")[0], tmp_path / "ours", tokenizer_files)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32, attn_implementation="eager")
    for (n, a), (m, b) in zip(reference.state_dict().items(), again.state_dict().items(), strict=True):
        assert n == m and torch.equal(a, b), n
    np.testing.assert_array_equal(logits(again, text()), logits(reference, text()))
    assert type(again) is type(reference)


@pytest.mark.parametrize("n", [1000, 4000])
def test_far_positions(n, tmp_path, tokenizer_files):
    """At position n transformers' float32 angles still hold; ours are exact."""
    import torch

    reference = theirs("llama", {"max_position_embeddings": 8192})
    model, _ = load(folder_of(reference, tmp_path, tokenizer_files), dtype="float32")
    at = torch.arange(n, n + 20)[None]
    with torch.no_grad():
        want = reference(torch.as_tensor(text(20)[:1]).long(), position_ids=at).logits.numpy()
    assert apart(run(model, text(20)[:1], [[20]], at=n), want) < 2e-3


SCHEMES = ["theta", "linear", "dynamic", "llama3", "yarn", "yarn, mscale", "longrope"]


@pytest.mark.parametrize("n", [3000, 2**20, 2**22 - 40])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_far_out_in_float64(scheme, n, tmp_path, tokenizer_files, monkeypatch):
    """Up to four million tokens out, for every scheme, our float32 gives the logits of transformers reckoning in float64."""
    import torch

    reference = theirs("llama", LLAMA[scheme])
    folder = folder_of(reference, tmp_path, tokenizer_files)
    model, _ = load(folder, dtype="float32")
    for name in ("float", "float32"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    exact = type(reference)(reference.config)
    exact.load_state_dict(reference.state_dict())
    with torch.no_grad():
        want = exact.double()(torch.as_tensor(text(40)[:1]).long(), position_ids=torch.arange(n, n + 40)[None]).logits.numpy()
    monkeypatch.undo()
    assert want.dtype == np.float64
    got = run(model, text(40)[:1], [[40]], at=n)
    assert apart(got, want) < 1e-4
    with torch.no_grad():
        rounded = reference(torch.as_tensor(text(40)[:1]).long(), position_ids=torch.arange(n, n + 40)[None]).logits.numpy()
    assert n < 2**20 or apart(rounded, want) > 1e-2, "or this test is blind: float32 angles are off"


def test_mistral_layer_types(tmp_path, tokenizer_files):
    """Windows in some layers only, as newer Mistral configs list them."""
    folder = folder_of(theirs("mistral", {"sliding_window": 7}), tmp_path, tokenizer_files)
    path, kinds = folder / "config.json", ["sliding_attention", "full_attention"]
    path.write_text(json.dumps({**json.loads(path.read_text()), "layer_types": kinds}))
    mixed, _ = load(folder, dtype="float32")
    ours, _ = load(folder, attn="window:window=7/full", dtype="float32")
    assert mixed.config.attn == "window:window=7/full"
    np.testing.assert_array_equal(run(mixed, text()), run(ours, text()))


@pytest.mark.parametrize("kind", [*DIFFERS, "t5", "nonsense", None])
def test_other_architectures_are_refused(kind):
    with pytest.raises(Refused) as no:
        Config.from_hf({**BASE, "model_type": kind})
    assert repr(kind) in str(no.value) and "llama and mistral" in str(no.value) and "\n" not in str(no.value)
    assert DIFFERS.get(kind, "") in str(no.value)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"rope_type": "nonsense"}}, "rope type 'nonsense'"),
        ({"rope_parameters": {"rope_type": "nonsense"}}, "rope type 'nonsense'"),
        ({"num_key_value_heads": 3}, "cannot share 3 key heads"),
        ({"hidden_size": 65}, "no multiple of its 4 heads"),
        ({"nanolong": {"pos": "nonsense"}}, "--pos 'nonsense'"),
    ],
    ids=str,
)
def test_what_we_cannot_do_is_refused(changes, says):
    from model import Llama

    with pytest.raises(Refused, match=says), ops.shapes_only():
        Llama(Config.from_hf({"model_type": "llama", **BASE, **changes}))
