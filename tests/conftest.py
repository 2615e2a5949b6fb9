"""What every test shares: a tiny model, ways to feed it, and comparisons. NANOLONG_BACKEND picks the backend, as everywhere.

The tiny model's weights are wide (std 0.2), so that attention is sharp and a wrong mask or rotation shows in the logits.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kernels
import ops
import plugins
from errors import Refused
from kernels import Places
from model import Config, Llama

ROOT = Path(__file__).parent.parent
TINY = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
# the attention patterns that are rules of positions, and some that are joined of them: with heads, layers and random links
RULES = [name for name in plugins.names("attention") if hasattr(plugins.load("attention", name), "allowed")]
JOINED = ["window|strided", "duo&bigbird|local"]
# options small enough to matter on a text of 24 tokens; an integer option that is not named here shrinks to its bit length.
# A gate that is closed at first would hide what is behind it
SMALL = {
    "window": 5,
    "n_global": 2,
    "block": 6,
    "budget": 10,
    "sinks": 2,
    "original": 16,
    "gate": "sigmoid",
    "channels": 4,
    "bits": 8,
    "closed": False,
}
# longrope's lists come from the config alone; the length of TINY's is beyond the original
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 16, "short_factor": [1.0] * 4, "long_factor": [1.0, 1.5, 2.5, 4.0]}


def has(*modules):
    """For skipif: are these installed?"""
    return all(importlib.util.find_spec(m) for m in modules)


def small(folder, name):
    """The spelling of a mechanism with options for tiny tests, of joined patterns too."""
    return "".join(part if part in "|&" else _small(folder, part) for part in re.split("([|&])", name))


def _small(folder, name):
    fields = [f for f in dataclasses.fields(plugins.load(folder, name).Options) if f.name not in plugins.FILLED_IN]
    size = lambda f: SMALL[f.name] if f.name in SMALL else f.default if f.default <= 4 else f.default.bit_length()
    spec = name + ":" + ",".join(f"{f.name}={size(f)}" for f in fields if f.name in SMALL or type(f.default) is int)
    return str(plugins.parse(folder, spec))


def named(spec):
    """The mechanisms' names alone, as a test's id."""
    return re.sub(":[^|&/]*", "", spec)


@functools.cache
def tiny(attn="full", pos="rope", memory="full", layers=2, **changes):
    """A tiny Llama with the same random weights on every backend; a combination that is refused skips the test."""
    try:
        hf = {"rope_scaling": LONGROPE} if pos == "longrope" else {}
        c = Config(**{**TINY, "num_hidden_layers": layers, "attn": attn, "pos": pos, "memory": memory, "hf": hf, **changes})
        return Llama(c).init(seed=1, std=0.2)
    except Refused as no:
        pytest.skip(str(no))


def text(T, B=1, seed=0):
    """Random tokens [B, T]."""
    return np.random.default_rng(seed).integers(0, TINY["vocab_size"], (B, T)).astype("int32")


def whole(T, n=8):
    """T tokens in segments of n, each in one piece: the `segments` of run()."""
    return [[min(n, T - i)] for i in range(0, T, n)]


def run(model, tokens, segments=None, begin=None, at=0, room=0):
    """Logits [B, T, V] of tokens (-1 is padding); segments: lists of piece lengths, each list closing at its end; None: no memory.

    at: the first token's position. room: the total to allocate caches for, so that they are written in place.
    """
    padded, logits, i = bool((tokens < 0).any()), [], 0
    cut = lambda x, n: None if x is None else ops.array(x[:, i : i + n].astype("int32"))
    with ops.no_grad():
        if segments is None and not at:
            return ops.numpy(model(cut(tokens, tokens.shape[1]), begin=cut(begin, tokens.shape[1]), padded=padded))
        state = {**model.start(max(map(sum, segments)) if room else 0, room), "next": at}
        for segment in segments:
            for j, n in enumerate(segment):
                close = j == len(segment) - 1
                y, state = model(cut(tokens, n), state, begin=cut(begin, n), padded=padded, close=close)
                logits.append(ops.numpy(y))
                i += n
    assert i == tokens.shape[1], "the segments must add up to the text"
    return np.concatenate(logits, 1)


def influence(model, tokens, segments=None, begin=None):
    """[t, i]: how far the logits at i move when token t of one row changes, in units of their spread."""
    T = tokens.shape[1]
    rows = np.repeat(tokens, T + 1, 0)
    rows[np.arange(T), np.arange(T)] = (rows[0] + 7) % TINY["vocab_size"]
    y = run(model, rows, segments, None if begin is None else np.repeat(begin, T + 1, 0))
    return np.abs(y[:T] - y[T]).max(-1) / y[T].std()


def apart(a, b):
    """The largest difference, in units of b's spread; infinite where a is not finite."""
    assert a.shape == b.shape, f"{a.shape} against {b.shape}"
    return float(np.abs(a - b).max() / (b.std() + 1e-9)) if np.isfinite(a).all() else float("inf")


def places(positions):
    """Places of integer positions [n], [B, n] or [B, K, n]."""
    at = np.asarray(positions, "int32")
    return Places(ops.array(at.reshape((1,) * (3 - at.ndim) + at.shape) if at.ndim < 2 else at if at.ndim > 2 else at[:, None]))


def loss_and_gradients(model, tokens, **how):
    """Mean loss of the next tokens and every gradient, as numpy."""
    x, y = ops.array(tokens[:, :-1]), ops.array(tokens[:, 1:])
    loss, grads = ops.value_and_grad(model, lambda: ops.cross_entropy(model(x, **how), y).mean())
    return float(ops.numpy(loss)), {n: ops.numpy(g) for n, g in grads.items()}


def gradients(f, *arrays):
    """Gradients of f(*arrays) -> scalar by each of its arrays."""
    if ops.BACKEND == "mlx":
        import mlx.core as mx

        grads = mx.grad(f, argnums=tuple(range(len(arrays))))(*arrays)
        return grads if len(arrays) > 1 else (grads,)
    import torch

    arrays = [a.detach().requires_grad_() for a in arrays]
    return torch.autograd.grad(f(*arrays), arrays)


def weights(model):
    return {n: ops.numpy(p) for n, p in ops.parameters(model).items()}


def python(code, backend, *args, **env):
    """Run Python code in a process of its own under a backend; returns its output."""
    env = {**os.environ, "NANOLONG_BACKEND": backend, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **env}
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def use(monkeypatch):
    """use("dense"): attend() by that engine."""
    return lambda engine: monkeypatch.setattr(kernels, "ENGINE", engine)


@pytest.fixture
def tokenizer_files(tmp_path):
    """A folder with the smallest byte-level tokenizer there is."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tok = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tok.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@pytest.fixture(scope="session")
def real_model():
    """The folder of SmolLM2-135M-Instruct, made by convert.py if it is not there yet."""
    if not has("convert"):
        pytest.skip("convert.py is not there yet")
    import convert

    try:
        return Path(convert.default_model())
    except (Refused, OSError) as no:
        pytest.skip(f"the real model cannot be had here: {no}")
