"""The two backends are mirrors: the same numbers, the same names, and neither ever imports the other."""

import ast
import sys

import numpy as np
import pytest
from conftest import ROOT, apart, has, python

import ops
import plugins
from errors import Refused
from ops import pick

BOTH = pytest.mark.skipif(not has("torch", "mlx"), reason="needs both PyTorch and MLX")
COMBINATIONS = {
    "plain": {},
    "longformer, llama3, tied": {"attn": "longformer:window=5,n_global=2", "pos": "llama3:original=16", "tie_word_embeddings": True},
    "joined, routing": {"attn": "window:window=5|strided:window=1,stride=6/routing:clusters=3,window=5"},
    "own projections": {"attn": "longformer:window=5,n_global=4,own_projections=true"},
    "alibi, t5": {"pos": "alibi/t5:buckets=6,distance=9", "attn": "longformer:window=5,n_global=2"},
    "xl, t5 by layer": {"pos": "xl:width=6/t5:buckets=6,distance=9,layers=own", "memory": "sinks:budget=10,sinks=2"},
    "dynamic, in part": {"pos": "dynamic:original=16", "partial_rotary_factor": 0.5},
    "mixed, sinks, biases": {"attn": "full/window:window=6", "pos": "pi", "memory": "sinks:budget=10,sinks=2", "attention_bias": True},
}
# logits, loss and gradients of a text in three segments, then 20 steps of AdamW on other texts
WORKER = """
import sys, json
import numpy as np
import ops
from conftest import TINY, text
from model import Config, Llama

m = Llama(Config(**TINY, num_hidden_layers=2, **json.loads(sys.argv[1]))).init(seed=3, std=0.1)
texts = [text(25, 2, seed) for seed in range(21)]

def loss(tokens):
    x, y, state, total = ops.array(tokens[:, :-1]), ops.array(tokens[:, 1:]), m.start(), 0
    for i in range(0, 24, 8):
        logits, state = m(x[:, i : i + 8], state)
        total = total + ops.cross_entropy(logits, y[:, i : i + 8]).mean() / 3
    return total

out = {"logits": m(ops.array(texts[0]))}
out["loss"], grads = ops.value_and_grad(m, lambda: loss(texts[0]))
out["norm"] = ops.global_norm(grads)
out |= {f"gradient {n}": g for n, g in grads.items()}
adam = ops.AdamW(m, (0.9, 0.95), 1e-8, 0.1)
for tokens in texts[1:]:
    _, grads = ops.value_and_grad(m, lambda: loss(tokens))
    adam.step(grads, 1e-3)
out |= {f"weight {n}": p for n, p in ops.parameters(m).items()}
np.savez(sys.argv[2], **{k: ops.numpy(v) for k, v in out.items()})
"""


@BOTH
@pytest.mark.skipif(ops.BACKEND != "torch", reason="runs both backends at once: with the torch run is enough")
@pytest.mark.parametrize("changes", COMBINATIONS.values(), ids=COMBINATIONS)
def test_both_backends_agree(changes, tmp_path):
    import json

    results = []
    for backend in ("torch", "mlx"):
        python(WORKER, backend, json.dumps(changes), tmp_path / f"{backend}.npz")
        results.append(dict(np.load(tmp_path / f"{backend}.npz")))
    a, b = results
    assert sorted(a) == sorted(b) and sum(n.startswith("gradient") for n in a) == sum(n.startswith("weight") for n in a)
    for name in a:
        if name in ("loss", "norm"):
            assert abs(a[name] - b[name]) < 1e-5 * b[name], name
        elif name == "logits":
            assert apart(a[name], b[name]) < 1e-5
        elif name.startswith("gradient"):
            assert np.linalg.norm(a[name] - b[name]) <= 1e-4 * np.linalg.norm(b[name]), name
        else:
            assert np.linalg.norm(a[name] - b[name]) < 1e-3 * np.linalg.norm(b[name] - start(name, b)), name


def start(name, weights):
    """The weight before the steps, near enough to measure how far it has moved."""
    return weights[name] * 0 + (1 if "norm" in name else 0)


# a step of LoRA over a long row, with everything that saves memory, and the same plainly and whole
TUNED = """
import sys
from types import SimpleNamespace
import numpy as np
import ops, segments, train
from conftest import text
from data import Batch
from test_adapters import fresh, moved

train.use_backend(None)
ways = {"saving": (True, 7, 5, 2, 10, "all"), "plain": (False, None, None, 1, None, "all"), "cut": (True, 7, 5, 2, 10, 0)}
batch, out = Batch(text(40), text(40, seed=1), np.zeros((1, 40), "int32"), [[]]), {}
for way, (checkpoint, chunk, tile, groups, segment, bptt) in ways.items():
    memory = "sinks:budget=11,sinks=2,kv_positions=absolute" if segment else "full"
    model = moved(fresh(adapter="lora:rank=4", attn="longformer:window=9,n_global=2", memory=memory))
    how = {"segment": None, "micro": 1, "checkpoint": checkpoint, "checkpoint_offload": False, "loss_chunk": chunk, "mlp_tile": tile}
    how |= {"embedding_offload": False}
    train.prepare(model, SimpleNamespace(dtype="float32", head_groups=groups, **how))
    if segment:
        losses, grads = segments.accumulate(model, segments.cut(batch, segment), train.nats, {}, bptt)
        loss = sum(x.item() for x, in losses)
    else:
        loss, grads = ops.value_and_grad(model, lambda: train.nats(model, batch))
        loss = loss.item()
    out |= {f"{way} loss": loss, **{f"{way} {n}": ops.numpy(g) for n, g in grads.items()}}
np.savez(sys.argv[1], **out)
"""


@BOTH
@pytest.mark.skipif(ops.BACKEND != "torch", reason="runs both backends at once: with the torch run is enough")
def test_fine_tuning_in_little_memory_agrees(tmp_path):
    """Segments, checkpoints, chunks, tiles, groups and an adapter together: on both backends the gradients of whole rows on either."""
    results = []
    for backend in ("torch", "mlx"):
        python(TUNED, backend, tmp_path / f"{backend}.npz")
        results.append(dict(np.load(tmp_path / f"{backend}.npz")))
    a, b = results
    assert a.keys() == b.keys()
    names = [n.removeprefix("plain ") for n in a if n.startswith("plain model")]
    assert len(names) == 2 * 7 * 2
    off = lambda x, y: max(float(np.linalg.norm(x(n) - y(n)) / np.linalg.norm(y(n))) for n in names)
    ways = [lambda n, r=r, way=way: r[f"{way} {n}"] for r in results for way in ("saving", "plain", "cut")]
    for saving, plain, cut in (ways[:3], ways[3:]):
        assert off(saving, plain) < 1e-4 and off(saving, ways[1]) < 1e-4
        assert off(cut, plain) > 1e-2, "a gradient that is dropped shows"
    for way in ("saving", "plain", "cut"):
        assert abs(a[f"{way} loss"] / b[f"{way} loss"] - 1) < 1e-5


# ---------------------------------------------------------------- the same names


def public(backend):
    """What ops exports, in order: (kind, name, arguments)."""
    out = []
    for node in ast.parse((ROOT / "backends" / f"{backend}_.py").read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            methods = [m for m in getattr(node, "body", []) if isinstance(node, ast.ClassDef) and isinstance(m, ast.FunctionDef)]
            arguments = ast.unparse(node.args) if isinstance(node, ast.FunctionDef) else [(m.name, ast.unparse(m.args)) for m in methods]
            out.append((node.name, arguments))
        elif isinstance(node, ast.Assign):
            out += [(name.id, None) for t in node.targets for name in (t.elts if isinstance(t, ast.Tuple) else [t])]
    return [(name, what) for name, what in out if not name.startswith("_")]


# what one framework has as a class of its own, the other writes out
ALIASES = {"Module", "ModuleList"}


def test_both_backends_have_the_same_names_in_the_same_order():
    torch, mlx = public("torch"), public("mlx")
    assert [n for n, _ in torch] == [n for n, _ in mlx]
    for (name, a), (_, b) in zip(torch, mlx):
        assert a == b or name in ALIASES, name


# ---------------------------------------------------------------- neither imports the other

ALONE = """
import importlib, importlib.abc, importlib.util, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is not installed here")

BLOCKED = sys.argv[1].split(",")
sys.meta_path.insert(0, Absent())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in BLOCKED else find(name, *a)
import ops, plugins
for module in sys.argv[2].split(","):
    importlib.import_module(module)
for folder in plugins.FOLDERS:
    for name in plugins.names(folder):
        try:
            plugins.load(folder, name)
        except ImportError as no:
            assert "works on" in str(no), no
from conftest import tiny, text, run
run(tiny(memory="sinks:budget=9"), text(20), [[8], [12]])
assert not [m for m in sys.modules if m.split(".")[0] in BLOCKED]
print(ops.BACKEND)
"""
SCRIPTS = [n for n in ("convert", "data", "evaluate", "generate", "train") if (ROOT / f"{n}.py").is_file()]


@pytest.mark.parametrize("backend, other", [("torch", "mlx,mlx_lm"), ("mlx", "torch")], ids=["torch alone", "mlx alone"])
@pytest.mark.parametrize("named", [True, False], ids=["asked for", "found"])
def test_one_framework_suffices(backend, other, named):
    if not has(backend):
        pytest.skip(f"{backend} is not installed")
    assert python(ALONE, backend if named else "", other, ",".join(["model", "kernels", *SCRIPTS])).split() == [backend]


@pytest.mark.parametrize("script", [n for n in SCRIPTS if "__main__" in (ROOT / f"{n}.py").read_text()])
def test_help(script):
    """--help answers at once and imports no framework."""
    code = """
import runpy, sys
script, sys.argv = sys.argv[1], [sys.argv[1], "--help"]
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
slow = [m for m in ("torch", "mlx.core", "transformers") if m in sys.modules]
assert not slow, slow
"""
    said = python(code, ops.BACKEND, f"{script}.py")
    assert "usage:" in said and (script not in ("generate", "train", "evaluate") or "--memory" in said)


@pytest.mark.parametrize("asked, installed, says", [("jax", True, "choose torch or mlx"), ("mlx", False, "asked for but not installed")])
def test_a_backend_that_is_not_there(monkeypatch, asked, installed, says):
    monkeypatch.setenv("NANOLONG_BACKEND", asked)
    monkeypatch.setattr(ops, "find_spec", lambda name: installed or name == "torch")
    with pytest.raises(Refused, match=says):
        pick()


def test_nothing_above_the_backends_knows_the_framework():
    """Only backends/ and kernels/ may; a mechanism that truly needs to says "works on" and which."""
    for path in [ROOT / "model.py", *(p for f in plugins.FOLDERS for p in (ROOT / f).glob("*.py"))]:
        source = path.read_text()
        for node in ast.walk(ast.parse(source)):
            names = (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
            )
            assert not {n.split(".")[0] for n in names} & {"torch", "mlx"} or "works on" in source, path
    assert ops.BACKEND in sys.modules
