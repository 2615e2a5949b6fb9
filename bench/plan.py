"""How near plan.py comes: the peak that it predicts of a step of train.py, and the one that the device counts in a second step.

python bench/plan.py                 # on a GPU: a 135M model, and three layers of an 8B one; about a minute
python bench/plan.py --only tiny     # a model small enough for a CPU; of torch there nobody counts, of MLX somebody does
"""

import argparse
import gc
from types import SimpleNamespace

import common
import numpy as np

LONG = {"attn": "longformer:window=4096,n_global=64", "memory": "sinks:budget=4160,sinks=64,kv_positions=absolute"}
SMALL = {"attn": "window:window=257", "memory": "window:budget=256"}
LORA = {"adapter": "lora:rank=16"}
# name: shape, layers, mechanisms and what differs from train.py's defaults
CASES = {
    "135m full": ("135m", None, {}, {"length": 8192}),
    "135m full, checkpoint": ("135m", None, {}, {"length": 32768, "checkpoint": 1}),
    "135m full, checkpoint 4, two parts": ("135m", None, {}, {"length": 16384, "checkpoint": 4, "rows": 2}),
    "135m full, mlp tiles": ("135m", None, {}, {"length": 32768, "checkpoint": 1, "mlp_tile": 2048}),
    "135m full, groups": ("135m", None, {}, {"length": 32768, "checkpoint": 1, "mlp_tile": 2048, "head_groups": 3}),
    "135m full, segments": ("135m", None, SMALL, {"length": 32768, "segment": 4096}),
    "135m full, inputs and averages on the host": (
        "135m", None, {}, {"length": 32768, "checkpoint": 1, "checkpoint_offload": True, "optimizer_offload": True},
    ),
    "8b full": ("8b", 3, {}, {"length": 4096}),
    "8b lora": ("8b", 3, LORA, {"length": 16384}),
    "8b lora, checkpoint": ("8b", 3, LORA, {"length": 65536, "checkpoint": 1}),
    "8b lora, mlp tiles": ("8b", 3, LORA, {"length": 65536, "checkpoint": 1, "mlp_tile": 4096}),
    "8b lora, groups": ("8b", 3, LORA, {"length": 65536, "checkpoint": 1, "mlp_tile": 4096, "head_groups": 4}),
    "8b lora, large loss chunk": ("8b", 3, LORA, {"length": 16384, "checkpoint": 1, "loss_chunk": 16384}),
    "8b lora, segments": ("8b", 3, {**LORA, **LONG}, {"length": 65536, "segment": 16384}),
    "8b lora, segments, offload": ("8b", 3, {**LORA, **LONG}, {"length": 65536, "segment": 8192, "offload": True}),
    "tiny full": ("tiny", 6, {}, {"length": 2048, "loss_chunk": 256}),
    "tiny full, one chunk": ("tiny", 6, {}, {"length": 2048}),
    "tiny full, checkpoint": ("tiny", 6, {}, {"length": 2048, "checkpoint": 1, "loss_chunk": 256}),
    "tiny full, mlp tiles": ("tiny", 6, {}, {"length": 2048, "checkpoint": 2, "loss_chunk": 256, "mlp_tile": 256}),
    "tiny full, groups": ("tiny", 6, {}, {"length": 2048, "checkpoint": 2, "loss_chunk": 256, "mlp_tile": 256, "head_groups": 2}),
    "tiny lora": ("tiny", 6, LORA, {"length": 2048, "loss_chunk": 256}),
    "tiny lora, segments": ("tiny", 6, {**LORA, **SMALL}, {"length": 4096, "segment": 1024, "loss_chunk": 256}),
}  # fmt: skip
DEFAULT = {"micro": 1, "rows": 1, "segment": None, "bptt": "all", "dtype": None, "checkpoint": 0, "checkpoint_offload": False}
DEFAULT |= {
    "embedding_offload": False,
    "offload": False,
    "optimizer_offload": False,
    "loss_chunk": 2048,
    "mlp_tile": None,
    "head_groups": 1,
}


def measured(shape, layers, mechanisms, given):
    """(Plan, bytes at the peak of the second step, or None)."""
    import ops
    import plan
    import train
    from model import Config, Llama

    a = SimpleNamespace(**{**DEFAULT, **given})
    a.batch, sizes = a.rows, common.SHAPES[shape]
    with ops.shapes_only():
        model = Llama(Config(**{**sizes, "num_hidden_layers": layers or sizes["num_hidden_layers"]}, **mechanisms))
    for name, p in ops.parameters(model).items():
        # what does not train as wide as it will be
        dtype = ops.float32 if model.trains(name) else train.llama.as_dtype(a.dtype)
        ops.set_parameters(model, {name: ops.full(p.shape, 1.0, dtype) if "norm" in name else ops.normal(tuple(p.shape), dtype) * 0.02})
    model = train.prepare(model, a)
    optimizer = ops.AdamW(model, (0.9, 0.95), 1e-8, 0.1, a.optimizer_offload)
    tokens = np.random.default_rng(0).integers(0, sizes["vocab_size"], (a.rows, a.length)).astype("int32")
    batch = train.data.Batch(tokens, tokens, tokens * 0, [[]] * a.rows)
    for _ in range(2):
        ops.reset_peak()
        train.train_step(model, optimizer, batch, a.micro, 1.0, 1e-4, a.segment, a.bptt, a.offload)
        ops.wait(ops.parameters(model))
    return plan.plan(train.sizes_of(model), a, train.runs_how(a)), ops.peak_memory()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", default="135m|8b", help="shapes: 135m, 8b, tiny, joined by |")
    p.add_argument("--out", help="folder of the result")
    args = p.parse_args()
    import train

    train.use_backend(None)
    import ops

    rows = {}
    for name, case in CASES.items():
        if case[0] not in args.only.split("|"):
            continue
        # one that failed is held by cycles
        gc.collect()
        try:
            found, peak = measured(*case)
        except Exception as no:  # one that fails says so, and the others are still worth their time
            rows[name] = {"failed": f"{type(no).__name__}: {str(no)[:200]}"}
            print(f"{name:45} {rows[name]['failed']}", flush=True)
            continue
        row = {"predicted_MiB": found.peak / 2**20, "moment": found.worst, "measured_MiB": peak and peak / 2**20}
        rows[name] = {**row, "ratio": peak and round(found.peak / peak, 3)}
        said = f"measured {peak / 2**20:9.1f}, ratio {found.peak / peak:.3f}" if peak else "nobody counts"
        print(f"{name:45} predicted {found.peak / 2**20:9.1f} MiB ({found.worst}), {said}", flush=True)
    common.save(f"plan-{ops.BACKEND}" + ("-tiny" if args.only == "tiny" else ""), {"cases": rows}, args.out, quiet=True)


if __name__ == "__main__":
    main()
