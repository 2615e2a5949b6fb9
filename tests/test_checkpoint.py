"""Save, load, save again: the same bits, the same logits, and a folder that other libraries open."""

import json

import numpy as np
import pytest
from conftest import TINY, apart, has, run, small, text, tiny, weights

import model as nanolong
import ops
import plugins
from errors import Refused
from model import Config, Llama, load, save

SPECS = [{"attn": "window:window=5"}, {"pos": "none", "memory": "sinks:budget=9"}, {"attn": "full/local:block=6"}]


def same(a, b):
    assert list(a) == list(b)
    for n in a:
        np.testing.assert_array_equal(a[n], b[n], err_msg=n)


def files(folder):
    """Name -> contents; JSON without its order."""
    return {p.name: json.loads(p.read_text()) if p.suffix == ".json" else p.read_bytes() for p in folder.iterdir()}


def fresh(**changes):
    return Llama(Config(**{**TINY, "num_hidden_layers": 2, **changes})).init(seed=2, std=0.2)


@pytest.mark.parametrize("folder, name", [(f, n) for f in ("attention", "positions", "memory") for n in plugins.names(f)])
def test_every_mechanism_survives(folder, name, tmp_path, tokenizer_files):
    flag = {"attention": "attn", "positions": "pos", "memory": "memory"}[folder]
    model = tiny(**{flag: small(folder, name)})
    save(model, tmp_path / "one", tokenizer_files)
    again, tokenizer = load(tmp_path / "one", dtype="float32")
    # a pattern made for training stands in training alone
    again.model.patterns(training=getattr(again.model.layers[0].self_attn.asked.module, "TRAINING_ONLY", False))
    same(weights(model), weights(again))
    np.testing.assert_array_equal(run(model, text(20), [[8], [12]]), run(again, text(20), [[8], [12]]))
    save(again, tmp_path / "two", tmp_path / "one")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert tokenizer.vocab_size == 256


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_our_own_fields_stand_apart(spec, tmp_path, tokenizer_files):
    save(fresh(**spec), tmp_path / "out", tokenizer_files)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["nanolong"] == spec and not spec.keys() & config.keys()
    assert not list(tmp_path.glob("*.partial*"))
    # a flag wins over the checkpoint
    again, _ = load(tmp_path / "out", attn="full", pos="rope", memory="full", dtype="float32")
    assert apart(run(again, text(20)), run(fresh(), text(20))) < 1e-6
    assert "nanolong" not in again.config.to_hf()


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"rope_theta": 500000.0, "head_dim": 12}], ids=str)
def test_others_open_it(changes, tmp_path, tokenizer_files):
    model = fresh(**changes)
    save(model, tmp_path / "out", tokenizer_files)
    want = run(model, text(20, 2))
    if ops.BACKEND == "torch":
        transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        got = theirs(torch.as_tensor(text(20, 2)).long()).logits.detach().numpy()
    else:
        pytest.importorskip("mlx_lm")
        from mlx_lm.utils import load_model

        got = ops.numpy(load_model(tmp_path / "out")[0](ops.array(text(20, 2))))
    assert apart(got, want) < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_types(dtype, tmp_path, tokenizer_files):
    """Weights rounded once stay as they are."""
    save(fresh(), tmp_path / "wide", tokenizer_files)
    model, _ = load(tmp_path / "wide", dtype=dtype)
    assert {p.dtype for p in ops.parameters(model).values()} == {getattr(ops, dtype)}
    assert model(ops.array(text(8))).dtype == ops.float32
    save(model, tmp_path / "out", tmp_path / "wide")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype
    same(weights(model), weights(load(tmp_path / "out", dtype=dtype)[0]))


def test_a_save_that_fails_leaves_the_old_one(tmp_path, tokenizer_files, monkeypatch):
    save(fresh(), tmp_path / "out", tokenizer_files)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    monkeypatch.setattr(nanolong.json, "dumps", lambda *a, **b: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(tiny(), tmp_path / "out", tokenizer_files)
    assert [p.name for p in tmp_path.iterdir() if p.name != "tokenizer"] == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


@pytest.mark.skipif(not has("safetensors"), reason="needs safetensors")
@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json cannot be read"),
        (lambda f: edit(f, hidden_size="wide"), "hidden_size cannot be 'wide'"),
        (lambda f: edit(f, num_attention_heads=0), "num_attention_heads cannot be 0"),
        (lambda f: edit(f, nanolong={"memory": 3}), "memory cannot be 3"),
        (lambda f: edit(f, rope_theta="x", rope_parameters=None), "rope_theta cannot be 'x'"),
        (lambda f: edit(f, rope_scaling="yarn"), "config.json cannot be read: AttributeError"),
        (lambda f: edit(f, rope_scaling={"rope_type": "llama3"}), "config.json cannot be read: KeyError"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json cannot be read"),
        (lambda f: edit(f, hidden_act="gelu"), "hidden_act 'gelu'"),
        (lambda f: edit(f, nanolong={"attn": "nonsense"}), "--attn 'nonsense' is not known"),
        (lambda f: edit(f, rope_scaling={"rope_type": "nonsense"}), "rope type 'nonsense'"),
        (lambda f: edit(f, intermediate_size=40), "has shape .*48.*, but config.json makes it .*40"),
        (lambda f: edit(f, num_hidden_layers=3), "lacks 9 of the model's weights, model.layers.2"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is not there"),
        (lambda f: (f / "model.safetensors").write_bytes(b"nonsense"), "not a readable safetensors file"),
        (lambda f: cut(f / "model.safetensors"), "not a readable safetensors file"),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a"}}'), "outside its folder"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_broken_folder_is_refused_in_one_line(spoil, says, tmp_path, tokenizer_files):
    save(fresh(), tmp_path / "out", tokenizer_files)
    spoil(tmp_path / "out")
    with pytest.raises(Refused, match=says) as no:
        load(tmp_path / "out")
    assert "\n" not in str(no.value)


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def test_a_training_pattern_is_for_training(tmp_path, tokenizer_files):
    """LongLoRA's s2 is evaluated and used with full attention; the checkpoint remembers what it was trained with."""
    model = tiny("s2:group=8")
    save(model, tmp_path / "m", tokenizer_files)
    loaded, _ = load(tmp_path / "m", dtype="float32", device="cpu")
    tokens = text(24)
    assert loaded.config.attn == "s2:group=8"
    assert apart(run(loaded, tokens), run(tiny("full"), tokens)) < 1e-5
    loaded.model.patterns(training=True)
    assert apart(run(loaded, tokens), run(model, tokens)) < 1e-5 < 0.1 < apart(run(model, tokens), run(tiny("full"), tokens))
