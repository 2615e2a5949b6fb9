"""plan.py against the arrays of a step as a GPU makes them, at full size and without a GPU: on torch's meta device, where an array has a
size and no numbers, and kernels do nothing. What the libraries' own kernels work in is as bench/plan.py found it on an H100."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from test_memory_plan import DEFAULT, counting

import kernels
import ops
import plan
import train
from bench.common import SHAPES
from model import Config, Llama

if not kernels.TRITON:
    pytest.skip("needs Triton, and CUDA or TRITON_INTERPRET=1", allow_module_level=True)

import torch

import memory.base
from backends import torch_
from kernels import coded, frozen_triton, rotate_triton

train.use_backend(None)
LORA = {"adapter": "lora:rank=16"}
LONG = {"attn": "longformer:window=4096,n_global=64", "memory": "sinks:budget=4160,sinks=64,kv_positions=absolute"}
WAYS = {
    "full": {},
    "full, one chunk": {"loss_chunk": 1 << 20},
    "full, checkpoint": {"checkpoint": 1, "length": 32768},
    "full, tiles": {"checkpoint": 2, "mlp_tile": 1024, "length": 32768},
    "full, groups": {"checkpoint": 2, "mlp_tile": 1024, "head_groups": 4, "length": 32768},
    "full, two parts": {"checkpoint": 1, "batch": 2},
    "full, segments": {**LONG, "segment": 8192, "length": 32768},
    "lora": LORA,
    "lora, checkpoint": {**LORA, "checkpoint": 1},
    "lora, tiles": {**LORA, "checkpoint": 1, "mlp_tile": 1024},
    "lora, tiles kept": {**LORA, "mlp_tile": 1024},
    "lora, groups": {**LORA, "checkpoint": 1, "mlp_tile": 1024, "head_groups": 4},
    "lora, large chunk": {**LORA, "checkpoint": 1, "loss_chunk": 8192},
    "lora, some": {"adapter": "lora:targets=q_proj+v_proj"},
    "lora, segments": {**LORA, **LONG, "segment": 8192, "length": 32768},
    "lora, segments, checkpoint": {**LORA, **LONG, "segment": 8192, "length": 32768, "checkpoint": 1},
    "lora, one boundary": {**LORA, **LONG, "segment": 8192, "length": 32768, "bptt": 1},
    "lora, 4 bits": {**LORA, "base_bits": 4, "checkpoint": 1},
    "dora": {"adapter": "lora:rank=16,dora=true"},
    "dora, checkpoint": {"adapter": "lora:rank=16,dora=true", "checkpoint": 1},
    "longlora": {"adapter": "longlora:rank=16", "checkpoint": 1},
}


class Nothing:
    """A kernel."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


class Fused(torch.autograd.Function):
    """Attention, by what it keeps and works in. stock: the framework's own, for which a query head has keys of its own."""

    @staticmethod
    def forward(ctx, q, k, v, stock):
        out, ctx.stock = torch.empty_like(q), stock
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, *_ = ctx.saved_tensors
        found = *map(torch.empty_like, (q, k, v)), None
        room = [q.new_empty(q.shape, dtype=torch.float32), q.new_empty(2, *q.shape[:3], dtype=torch.float32)]
        room += [torch.empty_like(q) for _ in range(2)] if ctx.stock and q.shape[1] > k.shape[1] else []
        return found


class Norm(torch.autograd.Function):
    """RMSNorm as CUDA has it."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        x, w, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(w) if ctx.needs_input_grad[1] else None


@pytest.fixture
def sizes_alone(monkeypatch):
    monkeypatch.setattr(torch_, "_device", [torch.device("meta")])
    for where, names in ((frozen_triton, ("norm", "norm_back", "gate", "loss", "dequantise")), (rotate_triton, ("rotate",))):
        monkeypatch.setattr(where, "can", lambda x: True)
        for name in names:
            monkeypatch.setattr(where, f"{name}_kernel", Nothing())
    monkeypatch.setattr(torch_.RMSNorm, "forward", lambda self, x: Norm.apply(x, self.weight.to(x.dtype)))

    def attend(q, k, v, q_at, k_at, rule, *rest, **how):
        return Fused.apply(q, k, v, rule.name == "full" and q.shape[2] == k.shape[2])

    monkeypatch.setattr(memory.base, "attend", attend)
    # where the loss is no number there is no step behind the gradients
    monkeypatch.setattr(torch.Tensor, "item", lambda x: math.nan)
    monkeypatch.setattr(ops, "array", lambda x, dtype=None: torch.empty(x.shape, dtype=dtype or torch.int32, device="meta"))


def peak(model, a):
    """Bytes at the peak of a step, up to its gradients."""
    arrays = list(ops.parameters(model).values())
    # matrices that lie beside each other (kernels/frozen.py), and what those that are codes become numbers in
    halves = [half for block in model.model.layers if "forward" in vars(block) for half in block.forward.args[1]]
    arrays += [x for half in halves for x in (half.a, half.room["w"] if hasattr(half, "room") else half.w)]
    arrays += [x for codes in coded.held(model).values() for x in (codes.code, codes.scale, codes.low)]
    tokens = np.zeros((a.batch, a.length), "int32")
    batch = train.data.Batch(tokens, tokens, tokens, [[]] * a.batch)
    with counting()() as count:
        for x in arrays:
            count.see(x)
        train.train_step(model, None, batch, a.micro, 1.0, 1e-3, a.segment, a.bptt, a.offload)
    return count.peak + 8 * sum(p.numel() for p in arrays if p.requires_grad) + plan.KERNELS


@pytest.mark.parametrize("way", WAYS)
def test_it_is_what_a_gpu_takes(way, sizes_alone):
    """Within a twentieth, of two layers of an 8B model and 8K tokens where nothing else is said."""
    mine = {k: v for k, v in WAYS[way].items() if k in ("attn", "memory", "adapter", "base_bits")}
    rest = {k: v for k, v in WAYS[way].items() if k not in mine}
    a = SimpleNamespace(**DEFAULT | {"length": 8192, "dtype": "bfloat16", "loss_chunk": 2048} | rest)
    with ops.shapes_only():
        model = Llama(Config(**SHAPES["8b"] | {"num_hidden_layers": 2}, **mine))
        sizes = train.sizes_of(model)
        ops.set_parameters(model, {n: ops.cast(p, ops.bfloat16) for n, p in ops.parameters(model).items() if n in model.coded})
        coded.hold(model)
        train.prepare(model, a)
    found = plan.plan(sizes, a, plan.How(2, gpu=True, fused=True)).peak / peak(model, a)
    assert 0.95 < found < 1.05, found
