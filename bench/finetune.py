"""One optimizer step of LoRA (r = 16 on all linears) over one long row, as train.py makes it: time, memory, loss and gradients.

    python bench/finetune.py --case attn=full,length=24k,checkpoint --case peer,length=24k
    python bench/finetune.py --case attn=longformer:window=4096,n_global=64,length=128k,segment=2k
    python bench/finetune.py --case name=a,length=8k,checkpoint --case name=b,length=8k,segment=2k --compare a b
    NANOLONG_BACKEND=mlx python bench/finetune.py --shape 1b --case attn=longformer:window=1024,n_global=64,length=100k,segment=1k

A case is made of fields: name, attn, pos, memory, adapter, dtype, length, batch, segment, base_bits, bptt, loss_chunk, mlp_tile,
head_groups, documents (in a row), repeat, warm with a value; checkpoint (of so many blocks at once, or 1), offload and
embedding_offload alone. Not given, the memory is the one that keeps what the pattern sees. Weights are random, the same in all cases, and
wide enough that attention matters; tokens are random. After a short row that compiles kernels (warm: one of so many tokens) one step is
timed, optimizer included, of rows up to 32K the median of three. The learning rate is 0, so that every step sees the same weights.

    peer      transformers' model with peft's LoRA, checkpointing and the framework's fused attention, cuDNN's where it is there
    plain     blocks as model.py has them, without kernels/frozen.py
    profile   one more step, and what the GPU did in it: milliseconds by kernel (torch on CUDA)
    replay=0  without kernels/replayed.py
    engine=   attention by this engine (NANOLONG_KERNEL);  hopper=0: without kernels/hopper.py

--compare A B: how far the gradients of B are from those of A, the norm of their difference in norms of A's, over all matrices together
and in the worst one. In 16 bits another order of sums is another gradient: --floor A B is a pair that differs by nothing else, or by a
dtype, --control A B one that should be far apart (bptt=0: the gradient of the memory dropped). A comparison should come to no more than one
and a half of the largest floor from the same A, a control to more than ten.
"""

import argparse
import gc
import math
import os
import resource
import threading
import time
import zlib
from types import SimpleNamespace

import common
import numpy as np

import cli
import plugins
from errors import Refused

WORDS = ("name", "attn", "pos", "memory", "adapter", "engine", "dtype")
NUMBERS = ("length", "segment", "base_bits", "loss_chunk", "mlp_tile", "head_groups", "documents")
NUMBERS += ("repeat", "hopper", "replay", "batch", "warm")
FLAGS = ("checkpoint", "offload", "embedding_offload", "peer", "plain", "profile")
DEFAULT = {
    **dict.fromkeys(WORDS + NUMBERS),
    **dict.fromkeys(FLAGS, False),
    "bptt": None,
    "batch": 1,
    "documents": 1,
    "attn": "full",
    "pos": "rope",
    "loss_chunk": 2048,
}
DEFAULT |= {"adapter": "lora:rank=16,alpha=16", "length": 8192}
GIB = 2**30
# of random weights, in units of 0.02: with all of them alike attention is an average, and no gradient would tell that it is wrong
WIDE = {"q_proj": 1.5, "k_proj": 1.5, "v_proj": 1.5, "o_proj": 4.0, "down_proj": 0.5, "lora_B": 1.0}


# ---------------------------------------------------------------- cases


def case(text):
    """argparse type: fields after each other; what is none belongs to the one before, since mechanisms' options have commas too."""
    fields = []
    for part in text.split(","):
        if part in FLAGS or part.partition("=")[0] in (*WORDS, *NUMBERS, "bptt", "checkpoint"):
            fields.append(part)
        elif fields:
            fields[-1] += "," + part
        else:
            raise argparse.ArgumentTypeError(f"{part!r} is no field of a case: it begins with one of {', '.join(DEFAULT)}")
    found = {"case": text}
    for field in fields:
        key, _, value = field.partition("=")
        number = key in (*NUMBERS, "checkpoint") or (key == "bptt" and value != "all")
        found[key] = (cli.whole(value) if number else value) if value else True
    c = SimpleNamespace(**DEFAULT | found)
    c.memory = c.memory or (memory_of(c.attn) if c.segment else "full")
    return c


def memory_of(attn):
    """The memory that keeps what a pattern sees of the past, of every layer's."""
    return "/".join(one_memory(plugins.parse("attention", part)) for part in plugins.layers("attention", attn))


def one_memory(rule):
    o = rule.options
    if rule.name == "longformer":
        return f"sinks:budget={o.n_global + o.window},sinks={o.n_global},kv_positions=absolute"
    reach = {"window": "window", "local": "block", "s2": "group"}.get(rule.name)
    return f"window:budget={max(1, getattr(o, reach) - 1)}" if reach else "full"


def rows(batch, length, vocabulary, documents=1):
    import data

    tokens = np.random.default_rng(0).integers(0, vocabulary, (batch, length)).astype("int32")
    # documents that are alike long, but for the last one
    n = -(-length // documents)
    begin = np.tile(np.arange(length, dtype="int32") // n * n, (batch, 1))
    targets = np.where(np.roll(begin, -1, 1) == begin, np.roll(tokens, -1, 1), -1)
    targets[:, -1] = -1
    return data.Batch(tokens, targets, begin, [[]] * batch)


def weight(name, shape, dtype):
    """The random weight of this name, made in this dtype; LoRA's too, whose B would begin at zero and give A no gradient."""
    import ops

    if "norm" in name:
        return ops.full(shape, 1.0, dtype)
    ops.seed(zlib.crc32(name.encode()))
    if "lora_A" in name:
        return ops.normal(shape, ops.float32) * shape[1] ** -0.5
    wide = next((by for part, by in WIDE.items() if f"{part}." in name and ("lora" not in name or part == "lora_B")), 1.0)
    return ops.normal(shape, ops.float32 if "lora" in name else dtype) * (0.02 * wide)


# ---------------------------------------------------------------- nanolong


class Noted:
    """An optimizer that leaves its last gradients to be looked at."""

    def __init__(self, inner):
        self.inner, self.seen = inner, {}

    def step(self, grads, lr):
        self.seen = grads
        self.inner.step(grads, lr)


def ours(c, shape, drawn):
    """(step(length) -> loss, the gradients of the last step: name -> array), by train.py's own functions. drawn: the dtype in which
    weights are drawn, so that cases of another one have the same."""
    import ops
    import train
    from kernels.coded import Coded
    from model import Config, Llama

    how = {k: getattr(c, k) for k in ("attn", "pos", "memory", "adapter", "segment")} | ({"base_bits": c.base_bits} if c.base_bits else {})
    with ops.shapes_only():
        model = Llama(Config(**shape, **how))
    for name, p in ops.parameters(model).items():
        new = weight(name, tuple(p.shape), getattr(ops, drawn))
        ops.wait(new)
        new = Coded(new, c.base_bits, getattr(ops, c.dtype or drawn)) if name in model.coded else new
        ops.set_parameters(model, {name: new})
    savers = {"checkpoint": c.checkpoint, "checkpoint_offload": False, "loss_chunk": c.loss_chunk, "mlp_tile": c.mlp_tile}
    savers |= {"embedding_offload": c.embedding_offload}
    savers |= {"segment": None if c.replay == 0 else c.segment, "micro": c.batch, "head_groups": c.head_groups or 1}
    train.prepare(model, SimpleNamespace(dtype=c.dtype or drawn, **savers))
    if c.plain:
        for module in (model, *model.model.layers):
            vars(module).pop("losses", None), vars(module).pop("forward", None)
    optimizer = Noted(ops.AdamW(model, (0.9, 0.95), 1e-8, 0.1))
    c.bptt = train.reach(model, c) if c.segment else None

    def step(length):
        optimizer.seen = {}
        segment = c.segment if c.segment and c.segment < length else None
        batch = rows(c.batch, length, model.config.vocab_size, c.documents)
        loss = train.train_step(model, optimizer, batch, c.batch, math.inf, 0.0, segment, c.bptt, c.offload)[0]
        ops.wait(ops.parameters(model))
        return loss

    return step, lambda: optimizer.seen


# ---------------------------------------------------------------- the peer


def peer(c, shape, drawn):
    """The same of transformers and peft: their defaults, and what their users would turn on for a long row."""
    from contextlib import nullcontext

    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers import LlamaConfig, LlamaForCausalLM

    import ops

    if c.documents > 1:
        raise Refused("documents= is ours alone: the peer's rows are one text each")
    device, options = ops.device(), plugins.parse("adapters", c.adapter).options
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa", use_cache=False))
    model = model.to(getattr(torch, c.dtype or drawn)).to_empty(device=device)
    # what is no parameter has lost its numbers, and what was one matrix is two
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    model.tie_weights()
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules=linears, task_type="CAUSAL_LM"))
    own = lambda name: name.removeprefix("base_model.model.").replace(".default.", ".").replace(".base_layer.", ".")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weight(own(name), tuple(p.shape), getattr(torch, drawn)))
    if c.checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    named = {own(n): p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1, fused=device.type == "cuda")
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

    def step(length):
        optimizer.zero_grad(set_to_none=True)
        tokens = ops.array(rows(c.batch, length, model.config.vocab_size).tokens).long()
        with sdpa_kernel(order, set_priority=True) if device.type == "cuda" else nullcontext():
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
        optimizer.step()
        ops.wait()
        return loss.item()

    return step, lambda: {n: p.grad for n, p in named.items()}


# ---------------------------------------------------------------- measuring


class Host:
    """The most of the host's memory that this process held at once inside of the context: bytes that are there, and page-locked ones."""

    def __enter__(self):
        self.done, self.most = threading.Event(), 0
        self.count("reset_peak_host_memory_stats")
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *why):
        self.done.set()
        self.thread.join()

    def watch(self):
        while not self.done.wait(0.02):
            self.most = max(self.most, resident())

    def GiB(self):
        pinned = (self.count("host_memory_stats") or {}).get("allocated_bytes.peak")
        return {"host_GiB": round(self.most / GIB, 2), "pinned_GiB": None if pinned is None else round(pinned / GIB, 2)}

    def count(self, name):
        import ops

        if ops.BACKEND == "torch" and ops.on_gpu():
            import torch

            return getattr(torch.cuda, name, dict)()


def resident():
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def with_engine(c):
    """Attention by the case's engine from now on."""
    import kernels

    os.environ["NANOLONG_HOPPER"] = str(1 if c.hopper is None else c.hopper)
    kernels.ENGINE = c.engine or os.environ.get("NANOLONG_KERNEL", "auto")
    if kernels.TRITON:
        kernels.triton_.hopper_on.cache_clear()


def warm(c):
    """The length of a row that has every kind of segment: those while the memory fills, and the last one."""
    if c.warm:
        return c.warm
    if not c.segment:
        return min(c.length, 8192)
    kept = max(getattr(plugins.parse("memory", m).options, "budget", 0) for m in plugins.layers("memory", c.memory))
    # and some more, of which kernels/replayed.py may record one
    return min(c.length, c.segment * (5 + -(-kept // c.segment)))


def measure(c, args, wanted):
    """(a row of figures, the gradients on the host if they are wanted)."""
    import ops

    with_engine(c)
    start = time.perf_counter()
    step, grads = (peer if c.peer else ours)(c, args.sizes, args.dtype)
    made = time.perf_counter() - start
    start, times = time.perf_counter(), []
    for _ in range(2 if c.segment and c.segment <= 4096 else 1):
        # what was seen once may be recorded (kernels/replayed.py)
        step(warm(c))
    warmed, held = time.perf_counter() - start, ops.reset_peak()
    with Host() as host:
        for _ in range(c.repeat or (3 if c.length <= 32768 else 1)):
            start = time.perf_counter()
            loss = step(c.length)
            times.append(time.perf_counter() - start)
    peak, seconds = ops.peak_memory(), sorted(times)[len(times) // 2]
    gib = lambda n: None if n is None else round(n / GIB, 3)
    found = {
        "seconds": round(seconds, 3),
        "range": [round(min(times), 3), round(max(times), 3)],
        "tokens/s": round(c.batch * c.length / seconds, 1),
    }
    found |= {"peak_GiB": gib(peak), "reserved_GiB": gib(reserved()), "before_GiB": gib(held), **host.GiB(), "loss": round(loss, 5)}
    found |= {"bptt": c.bptt} if c.segment else {}
    found |= {"made_s": round(made, 1), "warm_s": round(warmed, 1)}
    found |= {"profile": profile(lambda: step(c.length))} if c.profile else {}
    return found, {n: ops.numpy(g) for n, g in grads().items()} if wanted else None


def reserved():
    """The most that torch has taken of a CUDA device: what it holds for later too, graphs' own memory for one."""
    import ops

    if ops.BACKEND == "torch" and ops.on_gpu():
        import torch

        return torch.cuda.max_memory_reserved()


def profile(step, most=40):
    """What a step keeps the GPU busy with: milliseconds and calls of the longest kernels, and all of them beside the step's own time."""
    import torch

    start = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        step()
        wall = time.perf_counter() - start
    events = sorted(seen.key_averages(), key=lambda e: -e.self_device_time_total)
    rows = [[round(e.self_device_time_total / 1e3, 2), e.count, e.key[:120]] for e in events[:most]]
    total = sum(e.self_device_time_total for e in events) / 1e3
    return {"step_ms": round(wall * 1e3, 1), "all_ms": round(total, 1), "calls": sum(e.count for e in events), "kernels": rows}


def free():
    import ops

    gc.collect()
    if ops.BACKEND == "mlx":
        import mlx.core as mx

        mx.clear_cache()
    elif ops.on_gpu():
        import torch

        torch.cuda.empty_cache()


def tried(c, args, wanted):
    """measure(), or the first sentence of what went wrong."""
    try:
        return measure(c, args, wanted)
    except Exception as no:
        said = str(no).strip().splitlines() or [""]
        return {"failed": f"{type(no).__name__}: {said[0][:300]}"}, None


# ---------------------------------------------------------------- gradients


def apart(a, b):
    """The norm of the difference of gradients b and a in norms of a's, of all and of the worst matrix."""
    if a.keys() != b.keys():
        raise Refused(f"these have other parameters than those, {sorted(a.keys() ^ b.keys())[0]} for one")
    off = {n: float(np.linalg.norm(b[n] - a[n])) for n in a}
    size = {n: float(np.linalg.norm(a[n])) for n in a}
    root = lambda xs: math.sqrt(sum(x * x for x in xs.values()))
    share, name = max((off[n] / (size[n] + 1e-30), n) for n in a)
    return {"all": root(off) / root(size), "worst": share, "where": name}


def compared(args, rows, grads):
    """The comparisons, and what they come to."""
    found, losses = [], {r["name"]: r.get("loss") for r in rows}
    for kind in ("compare", "floor", "control"):
        for pair in getattr(args, kind):
            if any(grads.get(name) is None for name in pair):
                found.append({"kind": kind, "pair": pair, "failed": "no gradients of one of them"})
                continue
            a, b = pair
            loss = abs(losses[b] / losses[a] - 1)
            found.append({"kind": kind, "pair": pair, **apart(grads[a], grads[b]), "loss": loss})
    for f in found:
        floor = max((g["all"] for g in found if g["kind"] == "floor" and "all" in g and g["pair"][0] == f["pair"][0]), default=0)
        if floor and "all" in f and f["kind"] != "floor":
            f["floors"] = round(f["all"] / floor, 2)
            f["as_wished"] = f["floors"] <= 1.5 if f["kind"] == "compare" else f["floors"] > 10
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=common.SHAPES, default="8b")
    parser.add_argument("--layers", type=cli.whole, metavar="N", help="so many layers of the shape: gradients of fewer are less chaotic")
    parser.add_argument("--case", type=case, action="append", required=True, metavar="FIELD,FIELD")
    for kind, what in (("compare", "within rounding?"), ("floor", "what rounding does"), ("control", "what a mistake does")):
        parser.add_argument(f"--{kind}", nargs=2, action="append", default=[], metavar=("A", "B"), help=f"names of cases: {what}")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of frozen weights and activations (default: bfloat16 on a GPU)")
    parser.add_argument("--device")
    parser.add_argument("--name", default="finetune")
    parser.add_argument("--out")
    args = parser.parse_args()
    args.sizes = common.SHAPES[args.shape] | ({"num_hidden_layers": args.layers} if args.layers else {})
    import ops
    import train

    train.use_backend(None)
    ops.use(args.device)
    args.dtype = args.dtype or ("bfloat16" if ops.on_gpu() else "float32")
    pairs = args.compare + args.floor + args.control
    names = [c.name or str(i) for i, c in enumerate(args.case, 1)]
    if lost := {n for pair in pairs for n in pair} - set(names):
        parser.error(f"no case is named {sorted(lost)[0]}: they are {', '.join(names)}")
    result = {"shape": args.shape, "layers": args.sizes["num_hidden_layers"], "dtype": args.dtype, "backend": ops.BACKEND, "rows": []}
    grads = {}
    for name, c in zip(names, args.case):
        found, grads[name] = tried(c, args, any(name in pair for pair in pairs))
        free()
        result["rows"].append({"name": name, "case": c.case, "memory": None if c.peer else c.memory, "length": c.length, **found})
        cli.say(result["rows"][-1])
        common.save(args.name, result, args.out, quiet=True)
    for r, c in zip(result["rows"], args.case):
        other = next((p for p, d in zip(result["rows"], args.case) if d.peer and d.length == c.length and "seconds" in p), None)
        if other and not c.peer and "seconds" in r:
            r["times_peer"] = round(r["tokens/s"] / other["tokens/s"], 2)
            if r["peak_GiB"]:
                r["share_of_peers_memory"] = round(r["peak_GiB"] / other["peak_GiB"], 2)
    result["gradients"] = compared(args, result["rows"], grads)
    common.save(args.name, result, args.out)


if __name__ == "__main__":
    main()
