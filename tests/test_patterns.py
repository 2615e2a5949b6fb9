"""The attention rules as such: one function of integers, drawn by hand here, read on numpy and on the backend alike."""

import ast

import numpy as np
import pytest
from conftest import JOINED, RULES, places, small

import ops
import plugins
from kernels import Places, dense

PICTURES = {
    "full": "x..... xx.... xxx... xxxx.. xxxxx. xxxxxx",
    "window:window=1": "x..... .x.... ..x... ...x.. ....x. .....x",
    "window:window=3": "x..... xx.... xxx... .xxx.. ..xxx. ...xxx",
    "local:block=1": "x..... .x.... ..x... ...x.. ....x. .....x",
    "local:block=4": "x..... xx.... xxx... xxxx.. ....x. ....xx",
    "longformer:window=2,n_global=1": "x..... xx.... xxx... x.xx.. x..xx. x...xx",
    "longformer:window=2,n_global=0": "x..... xx.... .xx... ..xx.. ...xx. ....xx",
}


def seen(spec, q, k, heads=4):
    """The rule on numpy: bool [heads, q, k]."""
    rule = plugins.parse("attention", spec)
    h = np.arange(heads, dtype="int32")[:, None, None]
    return np.broadcast_to(rule.module.allowed(q[:, None], k, h, rule.options), (heads, len(q), len(k)))


@pytest.mark.parametrize("spec", PICTURES)
def test_a_rule_is_its_picture(spec):
    want = np.array([[c == "x" for c in row] for row in PICTURES[spec].split()])
    at = np.arange(6, dtype="int32")
    for head in seen(spec, at, at):
        np.testing.assert_array_equal(head, want)


@pytest.mark.parametrize("start", [0, 2**20 - 19, 2**22 - 40], ids=["near 0", "near 2^20", "near 2^22"])
@pytest.mark.parametrize("name", RULES + JOINED)
def test_numpy_and_the_mask_agree(name, start):
    """Scattered keys, some before and some after the queries, an empty slot and a padding query; int32 never overflows."""
    spec, draw = small("attention", name), np.random.default_rng(0)
    q = np.sort(start + draw.choice(40, 17, replace=False)).astype("int32")
    k = np.concatenate([np.arange(5), start + draw.permutation(40)]).astype("int32")
    wide = seen(spec, q.astype("int64"), k.astype("int64"))
    np.testing.assert_array_equal(seen(spec, q, k), wide)
    assert not (wide & (k > q[:, None])).any(), "a rule may not look ahead"
    assert wide[:, q[:, None] == k].all(), "a token must see itself, or rows of nothing appear"
    q_at, k_at = places([*q, -1]), places([*k, -1])
    mask = ops.numpy(dense.visible(q_at, k_at, plugins.parse("attention", spec), None, 0, 0, 4))
    np.testing.assert_array_equal(np.broadcast_to(mask, (1, 4, 18, 46))[0, :, :17, :45], wide)
    assert not mask[..., :17, 45].any() and mask[..., 17, :].all()


@pytest.mark.parametrize("name", RULES + JOINED)
def test_documents_empty_slots_and_exempt_slots(name):
    """The mask against one loop over queries and keys, with everything that visible() takes."""
    spec = small("attention", name)
    rule = plugins.parse("attention", spec)
    draw = np.random.default_rng(1)
    q, k = np.arange(20, 32, dtype="int32"), np.where(draw.random((2, 2, 40)) < 0.2, -1, draw.integers(0, 34, (2, 2, 40))).astype("int32")
    begin = np.where(q < 25, 3, 25).astype("int32")
    see = ops.numpy(dense.visible(places(q), Places(ops.array(k)), rule, ops.array(begin[None, None]), 3, 2, 4))
    see = np.broadcast_to(see, (2, 4, 12, 40))
    for b, h, i, j in np.ndindex(see.shape):
        at, first, key = int(q[i]), int(begin[i]), int(k[b, h // 2, j])
        allowed = j < 3 or key - first < 2 or rule.module.allowed(at - first, key - first, h, rule.options)
        assert see[b, h, i, j] == bool(first <= key <= at and allowed), (b, h, i, j)


@pytest.mark.parametrize("name", [*RULES, "_either", "_both", "_others"])
def test_a_rule_imports_nothing(name):
    tree = ast.parse((plugins.ROOT / "attention" / f"{name}.py").read_text())
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]


@pytest.mark.parametrize("folder, name", [(f, n) for f in plugins.FOLDERS for n in plugins.names(f)])
def test_a_mechanism_says_what_it_is(folder, name):
    doc = plugins.load(folder, name).__doc__
    assert doc and len(doc.split()) > 3, f"{folder}/{name}.py should begin with a docstring: what it does, and the paper"
