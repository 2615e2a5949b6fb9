"""The one-token step of an 8B-shaped Llama, taken apart: products alone, attention alone, the whole step by memory and by slots, closes.

    python bench/step.py                                    # all of it, on a CUDA GPU
    python bench/step.py --only products,attention          # a part
    python bench/step.py --shape tiny --slots 512 --kept 64 --write 16 --prompt 256 --device cpu    # shows that all works

Weights and kept entries are random; a full cache is filled by hand, bounded memories read a prompt. GB/s: weights and entries that are
read, by time. `graph_ms` is the step without the host between two steps, `tokens/s` that of a session's loop, taking the likeliest token.
"""

import argparse
import gc
import sys
import time

import common
import numpy as np


def device_time(f, repeat=30, rounds=5):
    """Milliseconds of f() on the device: the median of some rounds of many calls."""
    import torch

    if not torch.cuda.is_available():
        return common.seconds(f, 1) * 1e3
    f()
    times = []
    for _ in range(rounds):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        a.record()
        for _ in range(repeat):
            f()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b) / repeat)
    return sorted(times)[rounds // 2]


def captured(f):
    """f() as a graph where there is a GPU."""
    import torch

    if not torch.cuda.is_available():
        return f
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f()
    return graph.replay


def products(model):
    """Every kind of product over all layers, so that no weight waits in the processor's own memory."""
    import ops
    from kernels import rows

    c, blocks, out = model.config, model.model.layers, {}
    x = {
        n: ops.normal((n,), blocks[0].mlp.up_proj.weight.dtype)
        for n in (c.hidden_size, c.intermediate_size, blocks[0].self_attn.o_proj.weight.shape[1])
    }
    pick = {
        "qkv": lambda b: [b.self_attn.q_proj, b.self_attn.k_proj, b.self_attn.v_proj],
        "o": lambda b: [b.self_attn.o_proj],
        "gate, up": lambda b: [b.mlp.gate_proj, b.mlp.up_proj],
        "down": lambda b: [b.mlp.down_proj],
    }
    for name, get in pick.items():
        w = [[m.weight for m in get(b)] for b in blocks]
        how = {"gain": blocks[0].input_layernorm.weight, "eps": 1e-5} if name in ("qkv", "gate, up") else {"residual": x[c.hidden_size]}
        how |= {"gated": True} if name == "gate, up" else {}
        ms = device_time(captured(lambda w=w, how=how: [rows.product(x[m[0].shape[1]], m, **how) for m in w]))
        size = sum(ops.nbytes(a) for m in w for a in m)
        out[name] = {"us": round(ms * 1e3 / len(w), 2), "GB/s": round(size / ms / 1e6)}
    last = model.lm_head.weight if not c.tie_word_embeddings else model.model.embed_tokens.weight
    how = {"gain": model.model.norm.weight, "eps": 1e-5, "dtype": ops.float32}
    ms = device_time(captured(lambda: [rows.product(x[c.hidden_size], [last], **how) for _ in range(4)])) / 4
    out["head"] = {"us": round(ms * 1e3, 2), "GB/s": round(ops.nbytes(last) / ms / 1e6)}
    return out


def attention(c, slots_, dtype, layers=8, mass=False):
    """token() over so many slots, all in use but the last, of some layers in turn."""
    import ops
    import plugins
    from kernels import slots

    H, K, D, N = c.num_attention_heads, c.num_key_value_heads, c.head_dim, slots_ + 64
    rule, at = plugins.parse("attention", "full"), ops.array(np.full((1, 1, 1), slots_, "int32"))
    states = []
    for _ in range(layers):
        pos = ops.array(np.where(np.arange(N) < slots_, np.arange(N), -1).astype("int32")[None, None])
        pos = ops.cast(ops.expand(pos, (1, K, N)) + 0, ops.int32) if mass else pos
        states.append({"k": ops.normal((1, K, N, D), dtype), "v": ops.normal((1, K, N, D), dtype), "pos": pos, "n": ops.scalar(slots_)})
        if mass:
            states[-1]["mass"] = ops.full((1, K, N), 0.0, ops.float32)
    row, turn = ops.normal(((H + 2 * K) * D,), dtype), [ops.normal((1, 1, 1, D // 2), ops.float32) for _ in "cs"]

    def f():
        for s in states:
            slots.token(row, turn, at, s, rule, mass="mass" if mass else None)
            # the counter back
            ops.advance(s["n"], -1)

    def counter():
        for s in states:
            ops.advance(s["n"], 0)

    ms = (device_time(captured(f)) - device_time(captured(counter))) / layers
    size = 2 * K * slots_ * D * ops.nbytes(row) // row.shape[0]
    return {"us": round(ms * 1e3, 2), "GB/s": round(size / ms / 1e6)}


def of(model, **mechanisms):
    """The same weights with other mechanisms."""
    import dataclasses

    import ops
    from model import Llama

    with ops.shapes_only():
        new = Llama(dataclasses.replace(model.config, **mechanisms))
    ops.set_parameters(new, ops.parameters(model))
    new.model.patterns(training=False)
    return new


def filled(session, n):
    """A session whose layers hold n random entries at positions 0 to n - 1."""
    import ops

    for memory, s in zip(session.memories, session.state["layers"]):
        if "past" in s:
            s["past"] = coded(memory, s, n)
            continue
        for f in "kv":
            s[f][:, :, :n].normal_() if hasattr(s[f], "normal_") else None
        N = s["pos"].shape[2]
        s["pos"] = ops.array(np.where(np.arange(N) < n, np.arange(N), -1).astype("int32")[None, None])
        s["n"], s["first"] = n, None
    session.state["next"] = n


def coded(memory, s, n):
    """A `quantised` past of `size` slots, n of them random entries at positions 0 to n - 1."""
    import ops
    from memory.base import blank

    one, N = s["past"], memory.size
    past = {f: blank(f, a, N) for f, a in one.items()}
    for f in "kv":
        past[f"{f}_code"].random_(0, 256)
        # of about unit spread
        G = past[f"{f}_scale"].shape[3] // 2
        past[f"{f}_scale"][..., :G], past[f"{f}_scale"][..., G:] = 6 / (2**memory.bits - 1), -3
    past["pos"] = ops.expand(ops.array(np.where(np.arange(N) < n, np.arange(N), -1).astype("int32")), (*one["pos"].shape[:2], N)) + 0
    return past


def whole(model, args, read=None, slots_=None, write=256, plain=False):
    """A session's step: read a prompt of so many tokens, or fill a cache."""
    import ops
    from generate import Sampler, Session

    session, sampler, out = Session(model, chunk=2048), Sampler(temperature=0), {}
    start = time.perf_counter()
    tokens = np.random.default_rng(0).integers(1, 400, read or 64)
    # room for a warm-up, and for what is timed
    logits = session.read(tokens, (slots_ or 0) + write + 128)
    if slots_:
        filled(session, slots_)
    ops.wait(logits)
    out["prepared_s"] = round(time.perf_counter() - start, 2)
    start = time.perf_counter()
    token = loop(session, sampler, sampler.draw(logits, session.tokens), 1)
    out["first_s"] = round(time.perf_counter() - start, 2)
    allocated = memory(session)
    token = loop(session, sampler, token, 63)
    start = time.perf_counter()
    loop(session, sampler, token, write)
    ms = (time.perf_counter() - start) / write * 1e3
    out |= {"tokens/s": round(1e3 / ms, 1), "ms": round(ms, 4), "grown": memory(session) - allocated}
    layers = session.run.state["layers"]
    entries = sum(ops.nbytes(x) * min(session_n(s) / x.shape[2], 1) for s in layers for f, x in s.items() if f in "kv")
    entries += sum(ops.nbytes(x) for s in layers for f, x in s.get("past", {}).items())
    out["cache_MiB"] = round(session.nbytes() / 2**20, 1)
    used = {n: p for n, p in ops.parameters(model).items() if "embed" not in n}
    graphs = getattr(session.run, "graphs", None)
    if graphs:
        # the same token again and again: counters go on, so they are set back
        n = [s["n"].clone() for s in session.run.state["layers"]]
        reset = lambda: [s["n"].copy_(x) for s, x in zip(session.run.state["layers"], n)]
        times = {}
        for flag, (graph, _) in graphs.items():
            times[flag] = device_time(lambda graph=graph: graph.replay(), 20)
            reset()
        out["graph_ms"] = round(times[False], 4)
        out["GB/s"] = round((sum(map(ops.nbytes, used.values())) + entries) / times[False] / 1e6)
        if True in times:
            out["close_ms"] = round(times[True] - times[False], 4)
            out["close_share_percent"] = round(100 * (times[True] - times[False]) / (64 * times[False] + times[True] - times[False]), 3)
    return session, out


def loop(session, sampler, token, n):
    """n steps as generate() makes them: the next is under way before the host looks at the token."""
    for _ in range(n):
        known = session.ops.later(token)
        logits = session.step(token)
        known()
        token = sampler.draw(logits, session.tokens)
    session.ops.wait(token)
    return token


def session_n(s):
    import ops

    return ops.host(s["n"])


def memory(session):
    """Bytes that live on the device, of arrays and of blocks that were asked for."""
    import torch

    return torch.cuda.memory_reserved() if torch.cuda.is_available() else 0


def far(session, write=256, by=1_000_000):
    """ms a token where the session stands, and after all positions have moved on by a million."""
    import ops
    from generate import Sampler

    sampler, times, token = Sampler(temperature=0), [], ops.array(1)
    for shift in (0, by):
        for s in session.run.state["layers"]:
            for f in ("pos", "born", "q_at"):
                if f in s:
                    s[f].copy_(ops.where(s[f] < 0, s[f], s[f] + shift))
        session.run.state["next"] = ops.advance(session.run.state["next"], shift)
        token = loop(session, sampler, token, 64)
        start = time.perf_counter()
        token = loop(session, sampler, token, write)
        times.append(round((time.perf_counter() - start) / write * 1e3, 4))
    logits = ops.numpy(session.step(token))
    return {
        "near_ms": times[0],
        "far_ms": times[1],
        "percent": round(100 * (times[1] / times[0] - 1), 3),
        "finite": bool(np.isfinite(logits).all()),
    }


def equal(model, tokens=300, write=70):
    """The largest difference of logits between the graph and the same kernels called one by one; 0: bit by bit the same."""
    import ops
    from generate import Session

    prompt, logits, static = np.random.default_rng(0).integers(1, 400, tokens + write), [], ops.static
    for run in (static, ops.eager):
        session, ops.static = Session(model, chunk=2048), run
        try:
            session.read(prompt[:tokens], write + 64)
            logits.append(np.stack([ops.numpy(session.step(int(t))) for t in prompt[tokens:]]))
        finally:
            ops.static = static
    return {"largest": float(np.abs(logits[0] - logits[1]).max()), "spread": float(logits[0].std())}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=common.SHAPES, default="8b")
    parser.add_argument("--slots", default="2048,8192,32768,131072")
    parser.add_argument("--kept", type=int, default=2048, help="entries that bounded memories keep")
    parser.add_argument("--memories", default="sinks,snapkv,h2o", help="bounded memories")
    parser.add_argument("--prompt", type=int, default=131072, help="a long prompt for the first of them (0: none)")
    parser.add_argument("--write", type=int, default=256)
    parser.add_argument("--only", default="products,attention,full,bounded,equal")
    parser.add_argument("--device")
    parser.add_argument("--name", default="step")
    parser.add_argument("--out")
    args = parser.parse_args()
    import ops

    ops.use(args.device)
    sizes, parts = [int(x) for x in args.slots.split(",")], args.only.split(",")
    if min(sizes) < args.write + 128:
        sys.exit(f"step.py: --slots {min(sizes)} is too few for --write {args.write}: it takes 128 more than that, or a smaller --write")
    dtype = ops.bfloat16 if ops.on_gpu() else ops.float32
    model, result = common.random_model(args.shape, dtype), {"shape": args.shape, "write": args.write}

    def note(*path_and_value):
        *path, value = path_and_value
        at = result
        for key in path[:-1]:
            at = at.setdefault(key, {})
        at[path[-1]] = value
        print(*path, value, flush=True)
        common.save(args.name, result, args.out, quiet=True)
        gc.collect()

    with ops.no_grad():
        if "products" in parts:
            note("products", products(model))
        for n in sizes if "attention" in parts else []:
            note("attention", n, attention(model.config, n, dtype))
        if "attention" in parts:
            note("attention with mass", sizes[0], attention(model.config, sizes[0], dtype, mass=True))
    for n in sizes if "full" in parts else []:
        note("full", n, whole(of(model), args, slots_=n - 64 - args.write, write=args.write)[1])
    for bits, channels in ((8, 128), (8, 32), (4, 32)) if "quantised" in parts else []:
        size, channels = sizes[-1], min(channels, model.config.head_dim)
        other = of(model, memory=f"quantised:budget={size},bits={bits},channels={channels},turned=true")
        out = whole(other, args, slots_=size - 64 - args.write, write=args.write)[1]
        note("quantised", f"{size} entries, {bits} bits, groups of {channels}", out)
        if "equal" in parts:
            small = of(model, memory=f"quantised:budget=2048,bits={bits},channels={channels},turned=true")
            note("quantised", f"graph against eager, {bits} bits, groups of {channels}", equal(small))
    for name in args.memories.split(",") if "bounded" in parts else []:
        other = of(model, memory=f"{name}:budget={args.kept}")
        session, out = whole(other, args, read=2 * args.kept, write=args.write)
        note(name, f"prompt of {2 * args.kept}", out)
        first = name == args.memories.split(",")[0]
        if first:
            note(name, "a million tokens on", far(session, args.write))
        del session
        if first and "equal" in parts:
            note(name, "graph against eager", equal(other))
        if first and args.prompt:
            note(name, f"prompt of {args.prompt}", whole(other, args, read=args.prompt, write=args.write)[1])
    common.save(args.name, result, args.out)


if __name__ == "__main__":
    main()
