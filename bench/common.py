"""What the benchmarks share: shapes, random models, clocks, and results with the device and versions beside them."""

import json
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# the sizes of Llama 3.1 8B, of Llama 3.2 1B and of SmolLM2-135M, and a tiny one to try a script with
SHAPES = {
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
    },
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def random_model(shape, dtype, **mechanisms):
    """A Llama of this shape with random weights of width 0.02, made on the device."""
    import ops
    from model import Config, Llama

    with ops.shapes_only():
        model = Llama(Config(**SHAPES[shape], **mechanisms))
    for name, p in ops.parameters(model).items():
        new = ops.full(p.shape, 1.0, dtype) if "norm" in name else ops.normal(tuple(p.shape), dtype) * 0.02
        ops.set_parameters(model, {name: new})
    return model


def remember(model, spec):
    """Give a model another --memory; the weights stay."""
    import plugins
    from model import remember

    c, layers, full = model.config, model.model.layers, plugins.parse("adapters", "full")
    memories = plugins.tile("memory", spec, len(layers), n_head=c.num_attention_heads, n_kv_head=c.num_key_value_heads)
    for block, memory in zip(layers, memories):
        block.self_attn.memory = remember(memory, block.self_attn.asked, full, c)


def machine():
    """The device and the versions that a figure belongs to."""
    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "mlx", "transformers", "peft", "mlx-lm", "kvpress"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    try:
        import torch

        name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    except ImportError:
        name = None
    return {"device": name or cpu(), **found}


def cpu():
    """The processor's own name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        return f"{model}, {sum(line.startswith('processor') for line in lines)} cores"
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def seconds(f, repeat=5):
    """The median time of f() after one call to warm up; f must wait for its result itself."""
    f()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def save(name, result, out=None, quiet=False):
    """Write a result to bench/results/NAME.json (or to the folder `out`) and print it (quiet: do not)."""
    path = Path(out or ROOT / "bench" / "results") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **result}, indent=2) + "\n")
    if quiet:
        return
    print(json.dumps(result, indent=2))
    print(f"written to {path}", file=sys.stderr)
