"""Files of named tensors, opened without trust: safetensors, torch's .bin and .pth, GGUF.

Each reader looks at the header alone, and every length and offset in it is checked against the file before it is used, so a
truncated, malformed or hostile file is one sentence (`Refused`). What comes back is a dictionary of `Tensor`s, which know
how to read themselves; numpy holds the values, and has no bfloat16, so its bits travel as uint16.
"""

import json
import math
import mmap
import pickle
import struct
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from errors import Refused

NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
SIZES |= dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1)


class Tensor(NamedTuple):
    """One tensor of a file. `read()` gives its rows as stored: NUMPY's type for the dtype, or uint8 for a GGML block type."""

    dtype: str  # safetensors' spelling, or the name of a GGML type
    shape: tuple
    read: Callable
    keep: str  # the dtype to write it in if nobody asks for another


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


def read_json(path, text=None):
    """A JSON file (or its text) that holds an object whose keys differ. Raises Refused."""
    try:
        value = json.loads(path.read_text(encoding="utf-8") if text is None else text.decode("utf-8"), object_pairs_hook=once)
    except (OSError, ValueError, RecursionError) as no:
        raise Refused(f"{path} does not hold readable JSON: {one_line(no)}") from None
    if not isinstance(value, dict):
        raise Refused(f"{path} holds a JSON {type(value).__name__}: it should hold an object")
    return value


def once(pairs):
    twice = [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} is given twice")
    return dict(pairs)


def one_line(error):
    return " ".join(str(error).split())[:200] or type(error).__name__


def read_file(path, offset, dtype, shape):
    """An array from the middle of a file. Plain reads, for the pages of a memory map would count as ours."""
    with open(path, "rb") as f:
        f.seek(offset)
        values = np.fromfile(f, dtype, math.prod(shape))
    if values.size != math.prod(shape):
        raise Refused(f"{path} became shorter while it was read: convert it again")
    return values.reshape(shape)


def read_safetensors(path):
    """{name: Tensor} of one safetensors file; every byte must belong to exactly one tensor. Raises Refused."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        if size < 8 or n > min(size - 8, 100 << 20):
            raise Refused(f"{path} is truncated or not a safetensors file: it claims a header of {n} bytes and has {size}")
        header = read_json(path, f.read(n))
    header.pop("__metadata__", None)
    entries = []
    for name, entry in header.items():
        try:
            dtype, shape, (begin, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if dtype not in SIZES or not all(type(i) is int and i >= 0 for i in (*shape, begin, stop)):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise Refused(f"{path}: the header's entry for {name} is malformed: {one_line(entry)}") from None
        entries.append((begin, stop, name, dtype, shape))
    tensors, end = {}, 0
    for begin, stop, name, dtype, shape in sorted(entries):
        bytes_ = math.prod(shape) * SIZES[dtype]
        if (begin, stop) != (end, end + bytes_):
            raise Refused(f"{path}: {name} claims bytes {begin} to {stop}, but its shape and its neighbours say {end} to {end + bytes_}")
        tensors[name] = Tensor(dtype, shape, partial(read_file, path, 8 + n + begin, NUMPY.get(dtype), shape), dtype)
        end = stop
    if 8 + n + end != size:
        raise Refused(f"{path} is truncated or malformed: it has {size} bytes, and its header accounts for {8 + n + end}")
    return tensors


def read_torch(path):
    """{name: Tensor} of one .bin or .pth. torch unpickles tensors and containers only: a file that would run code is refused."""
    try:
        import torch
    except ImportError:
        raise Refused(f"{path} can only be read with PyTorch: pip install torch, or give a safetensors version of the model") from None
    try:
        # files older than torch's zip format cannot be mapped, only loaded
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as no:
        why = "it holds objects that could run code" if isinstance(no, pickle.UnpicklingError) else "it is truncated or malformed"
        raise Refused(f"{path} is not a plain file of tensors ({why}): give a safetensors version of the model") from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(t, torch.Tensor) for k, t in state.items()):
        raise Refused(f"{path} should hold a dictionary of named tensors, and nothing else")
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

    def read(t):
        t = t.detach().contiguous()
        return t.view(torch.int16).numpy().view("<u2") if t.dtype == torch.bfloat16 else t.numpy()

    tensors = {}
    for name, t in state.items():
        # a view that repeats its storage could claim any size
        if t.layout != torch.strided or t.device.type != "cpu" or t.untyped_storage().nbytes() < t.numel() * t.element_size():
            raise Refused(f"{path}: {name} is not a plain tensor: save the model again as safetensors")
        dtype = names.get(t.dtype, str(t.dtype))
        tensors[name] = Tensor(dtype, tuple(t.shape), partial(read, t), dtype)
    return tensors


class Cursor:
    """Reads a GGUF header, in which every length comes from the file: one that leads past its end is refused, not followed."""

    SCALARS = "BbHhIif?  Qqd"  # struct's letters by GGUF's type numbers; 8 is a string and 9 an array

    def __init__(self, path, data):
        self.path, self.data, self.at = path, data, 0

    def skip(self, n):
        if n > len(self.data) - self.at:
            raise Refused(f"{self.path} is truncated or malformed: its header asks for {n} bytes at {self.at} of {len(self.data)}")
        self.at += n
        return self.at - n

    def numbers(self, letter, n=1):
        return struct.unpack_from(f"<{n}{letter}", self.data, self.skip(n * struct.calcsize(f"<{letter}")))

    def string(self):
        n = self.numbers("Q")[0]
        start = self.skip(n)
        try:
            return self.data[start : start + n].decode("utf-8")
        except UnicodeDecodeError:
            raise Refused(f"{self.path} is malformed: a string of its header is not UTF-8") from None

    def values(self, kind, n):
        if kind == 8:
            return [self.string() for _ in range(n)]
        if kind >= len(self.SCALARS) or kind == 9:
            raise Refused(f"{self.path} is malformed: its header holds a value of type {kind}")
        return list(self.numbers(self.SCALARS[kind], n))

    def value(self):
        kind = self.numbers("I")[0]
        return self.values(self.numbers("I")[0], self.numbers("Q")[0]) if kind == 9 else self.values(kind, 1)[0]


def read_gguf(path):
    """(metadata as plain values, {name: Tensor}) of a GGUF file (the format: docs/gguf.md in ggml's repository). Raises Refused."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        if f.read(4) != b"GGUF":
            raise Refused(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
        head = Cursor(path, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
    head.skip(4)
    version = head.numbers("I")[0]
    if version not in (2, 3):
        raise Refused(f"{path} is GGUF version {version}: versions 2 and 3, little-endian, can be read")
    n_tensors, n_values = head.numbers("Q", 2)
    metadata, entries = {}, {}
    for _ in range(n_values):
        key = head.string()
        if key in metadata:
            raise Refused(f"{path} is malformed: the key {key!r} is given twice")
        metadata[key] = head.value()
    for _ in range(n_tensors):
        name, dims = head.string(), head.numbers("I")[0]
        shape = head.numbers("Q", dims)[::-1]
        if name in entries or not 1 <= dims <= 4 or 0 in shape:
            raise Refused(f"{path} is malformed: the tensor {name!r} is given twice, or has the shape {list(shape)[:8]}")
        entries[name] = (*head.numbers("I"), shape, *head.numbers("Q"))
    align = metadata.get("general.alignment", 32)
    if type(align) is not int or align <= 0:
        raise Refused(f"{path} is malformed: general.alignment is {align!r}")
    start, end, tensors = -(-head.at // align) * align, 0, {}
    for name, (number, shape, offset) in sorted(entries.items(), key=lambda item: item[1][2]):
        kind, block, unit = ggml_type(path, name, number)
        stop = offset + math.prod(shape) // block * unit
        if offset % align or offset < end or shape[-1] % block or start + stop > size:
            raise Refused(f"{path} is truncated or malformed: {name} claims bytes {start + offset} to {start + stop} of {size}")
        packed = shape if kind in NUMPY else (*shape[:-1], shape[-1] // block * unit)
        read = partial(read_file, path, start + offset, NUMPY.get(kind, "u1"), packed)
        tensors[name], end = Tensor(kind, shape, read, kind if kind in NUMPY else "F16"), stop
    return metadata, tensors


def ggml_type(path, name, number):
    """(name, values per block, bytes per block) of a GGML tensor type. Raises Refused for one that cannot be unpacked."""
    plain = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2)}
    if number in plain:
        return plain[number]
    try:
        import gguf
    except ImportError:
        raise Refused(f"{path} is quantised, and can only be read with the gguf package: pip install gguf") from None
    try:
        kind = gguf.GGMLQuantizationType(number)
        block, unit = gguf.GGML_QUANT_SIZES[kind]
        # the package knows the sizes of more types than it can unpack
        gguf.quants.dequantize(np.zeros((1, unit), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        raise Refused(f"{path}: {name} has the GGML type {number}: F32, F16, BF16, Q4_0 to Q8_0 and Q2_K to Q6_K can be read") from None
    return kind.name, block, unit
