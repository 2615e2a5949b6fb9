"""Block-sparse attention (kernels/blocks.py) beside the framework's own attention with a mask array, each case in a process of its own.

NANOLONG_BACKEND=torch python bench/blocks.py --length 16k

Memory is the peak of the first call above inputs, outputs and gradients; the mask array, which only the framework's attention
needs, is not counted among the inputs (its size is given too). The time to build the mask and the layout is not measured: the
first is once a run, the second stays in a cache.

--bias slope, or table, measures what a bias by distance costs: blocks with it beside blocks without, a table's gradient included.

--sweep tries what suits a device instead, in one process: how many scores live at once, the blocks' sizes, then longer texts.

NANOLONG_BACKEND=mlx python bench/blocks.py --sweep 24,26,28 --blocks 128x64 --lengths 16k,64k --dtype bfloat16 --heads 16/16
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time

import common

ROWS = 256  # of the mask, built at once


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--length", default="16k", help="tokens (default 16k)")
    p.add_argument("--attn", default="longformer:window=512,n_global=16", help="the pattern")
    p.add_argument("--heads", help="query heads/key heads (default 9/3 with torch, 3/1 with MLX)")
    p.add_argument("--width", type=int, default=64, help="head width (default 64)")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--bias", choices=["slope", "table"], help="blocks with this bias beside blocks without one")
    p.add_argument("--reach", type=int, default=128, help="entries of the table (default 128)")
    p.add_argument("--device")
    p.add_argument("--repeat", type=int, default=3, help="timed calls after the first one")
    p.add_argument("--name")
    p.add_argument("--out")
    p.add_argument("--sweep", metavar="BITS", help="logarithms to base 2 of the scores that live at once, as in 24,26,28")
    p.add_argument("--blocks", default="", help="of the sweep: sizes of blocks to try besides the engine's own, as in 128x32,128x64")
    p.add_argument("--lengths", default="16k", help="of the sweep: lengths; the first is where sizes are tried and the mask is timed")
    p.add_argument("--limit", type=float, default=110, help="of the sweep: seconds after which nothing more is begun")
    p.add_argument("--case", help=argparse.SUPPRESS)
    return p


def peak():
    """Bytes at the peak so far: of the device if it counts, else of the process."""
    import ops

    counted = ops.peak_memory()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if counted is None else counted


def attention(engine, rule, n):
    """f(q, k, v, and its bias if there is one) and the bytes of its mask."""
    import ops
    from kernels import Bias, Places, blocks

    at = ops.arange(n, ops.array([0]))[None, None]
    if engine == "blocks":
        return lambda q, k, v: blocks.attend(q, k, v, Places(at, 0), Places(at, 0), rule), 0
    if engine in ("slope", "table"):
        return lambda q, k, v, x: blocks.attend(q, k, v, Places(at, 0), Places(at, 0), rule, bias=Bias(**{engine: x})), 0
    mask = ops.full((n, n), False, ops.bool_)
    for i in range(0, n, ROWS):
        mask[i : i + ROWS] = rule.module.allowed(at[0, 0, i : i + ROWS][:, None], at[0], 0, rule.options)
        ops.wait(mask)
    if ops.BACKEND == "mlx":
        import mlx.core as mx

        return lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask), n * n
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    return lambda q, k, v: sdpa(q, k, v, mask, enable_gqa=True), n * n


def derivative(f):
    """(y, gradients of <y, w>) as a function of q, k, v, w, and a bias, if there is one, before w."""
    import ops

    if ops.BACKEND == "mlx":
        import mlx.core as mx

        def g(*given):
            y, grads = mx.vjp(f, list(given[:-1]), [given[-1]])
            return *y, *grads

        return g
    import torch

    def g(*given):
        given, w = [x.detach().requires_grad_() for x in given[:-1]], given[-1]
        y = f(*given)
        # slopes are constants
        return y.detach(), *(x for x in torch.autograd.grad(y, given, w, allow_unused=True) if x is not None)

    return g


def measure(args):
    """One case: seconds of each call, bytes at the peak, and a few numbers of the result."""
    import ops
    import plugins

    ops.use(args.device)
    ops.seed(0)
    engine, direction = args.case.split()
    n, (H, K), rule = plugins.number(args.length), args.heads, plugins.parse("attention", args.attn)

    def made(n):
        f, mask = attention(engine, rule, n)
        arrays = [ops.normal((1, h, n, args.width), getattr(ops, args.dtype)) for h in (H, K, K, H)]
        if engine in ("slope", "table"):
            shape = (H,) if engine == "slope" else (H, args.reach)
            arrays.insert(3, ops.normal(shape, ops.float32) if engine == "table" else ops.full(shape, 0.01, ops.float32))
        ops.wait(arrays)
        return (derivative(f), arrays, mask) if direction == "both" else (lambda *x: (f(*x),), arrays[:-1], mask)

    # libraries load and the layout's code runs before anything counts
    f, arrays, _ = made(256)
    with ops.no_grad() if direction == "forward" else contextless():
        ops.wait(f(*arrays))
        before = peak()
        f, arrays, mask = made(n)
        given = sum(ops.nbytes(x) for x in arrays)
        times = []
        for i in range(args.repeat + 1):
            start = time.perf_counter()
            out = f(*arrays)
            ops.wait(out)
            times.append(time.perf_counter() - start)
            if i == 0:
                top = peak() - before - given - sum(ops.nbytes(x) for x in out)
                sample = [float(x) for a in out if a.ndim == 4 for x in ops.numpy(a[0, 0, -1, :4])]
    return {"seconds": times[1:] or times, "peak": top, "mask": mask, "sample": sample}


def sweep(args):
    """Prints a line for each case as it is done; a case that fails says why, and the others go on."""
    import ops
    import plugins
    from kernels import blocks

    began, (H, K), rule = time.perf_counter(), args.heads, plugins.parse("attention", args.attn)
    ops.use(args.device)
    sizes = [tuple(map(int, size.split("x"))) for size in args.blocks.split(",") if size]
    lengths = [plugins.number(n) for n in args.lengths.split(",")]
    own, times, result = blocks.BLOCK, {}, []
    print(f"{args.attn}, heads {H}/{K}, width {args.width}, {args.dtype}, {ops.device()}; least of {args.repeat} after the first call, ms")
    print(f"{'':24}{'tokens':>8}{'forward':>10}{'both':>10}{'first':>10}{'MB':>8}", flush=True)

    def timed(engine, n, bits=0, size=own):
        """Seconds forward, and forward and backward; None: failed or too late."""
        name = engine if engine == "mask" else f"2^{bits}, {size[0]} x {size[1]}"
        if time.perf_counter() - began > args.limit:
            return print(f"{name:24}{n:8}  not begun after {args.limit:.0f} s", flush=True)
        blocks.BLOCK, blocks.stacked = size, lambda: 1 << bits
        try:
            f, _ = attention(engine, rule, n)
            arrays = [ops.normal((1, h, n, args.width), getattr(ops, args.dtype)) for h in (H, K, K, H)]
            ops.wait(arrays)
            reset_peak()
            taken = []
            for g, given in ((lambda *x: (f(*x),), arrays[:3]), (derivative(f), arrays)):
                with ops.no_grad() if len(given) == 3 else contextless():
                    each = []
                    for _ in range(args.repeat + 1):
                        start = time.perf_counter()
                        ops.wait(g(*given))
                        each.append(time.perf_counter() - start)
                taken += [min(each[1:] or each), each[0]]
        except (RuntimeError, MemoryError) as no:
            return print(f"{name:24}{n:8}  failed: {str(no)[:200]}", flush=True)
        forward, first, both, again = (1e3 * x for x in taken)
        memory = (ops.peak_memory() or 0) / 1e6
        print(f"{name:24}{n:8}{forward:10.2f}{both:10.2f}{first + again:10.0f}{memory:8.0f}", flush=True)
        result.append({"case": name, "tokens": n, "forward": round(forward, 3), "both": round(both, 3), "megabytes": round(memory)})
        return both

    for bits in map(int, args.sweep.split(",")):
        times[bits, own] = timed("blocks", lengths[0], bits)
    best = lambda: min((t, how) for how, t in times.items() if t)[1]
    for size in sizes if any(times.values()) else ():
        bits = best()[0]
        times[bits, size] = timed("blocks", lengths[0], bits, size)
    for n in lengths[1:] if any(times.values()) else ():
        timed("blocks", n, *best())
    timed("mask", lengths[0])
    how = {"backend": ops.BACKEND, "attn": args.attn, "heads": f"{H}/{K}", "width": args.width, "dtype": args.dtype}
    if args.name:
        common.save(args.name, {**how, "milliseconds": result}, args.out)


def reset_peak():
    import ops

    if ops.BACKEND == "mlx":
        import mlx.core as mx

        return mx.reset_peak_memory()
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def contextless():
    import contextlib

    return contextlib.nullcontext()


def main():
    args = parser().parse_args()
    backend = os.environ.setdefault("NANOLONG_BACKEND", __import__("ops").BACKEND)
    args.heads = tuple(map(int, (args.heads or ("9/3" if backend == "torch" else "3/1")).split("/")))
    if args.sweep:
        return sweep(args)
    if args.case:
        return print(json.dumps(measure(args)))
    here = {"backend": backend, "length": args.length, "attn": args.attn, "heads": "/".join(map(str, args.heads)), "width": args.width}
    result = {**here, "dtype": args.dtype, "threads": os.environ.get("OMP_NUM_THREADS", "default"), "repeat": args.repeat}
    if args.bias:
        result |= {"bias": args.bias, **({"reach": args.reach} if args.bias == "table" else {})}
    first, second = (args.bias, "blocks") if args.bias else ("blocks", "mask")
    for direction in ("forward", "both"):
        case = {}
        for engine in (first, second):
            command = [sys.executable, *sys.argv, "--case", f"{engine} {direction}"]
            done = subprocess.run(command, capture_output=True, text=True, cwd=common.ROOT)
            if done.returncode:
                sys.exit(done.stderr)
            case[engine] = json.loads(done.stdout)
            print(f"{direction} {engine}: {min(case[engine]['seconds']):.3f} s", file=sys.stderr)
        a, b = (case[e]["sample"] for e in (first, second))
        median = {e: sorted(c["seconds"])[len(c["seconds"]) // 2] for e, c in case.items()}
        least = {e: min(c["seconds"]) for e, c in case.items()}
        memory = {e: c["peak"] for e, c in case.items()}
        name = "forward" if direction == "forward" else "forward and backward"
        result[name] = {
            "median_seconds": {e: round(t, 4) for e, t in median.items()},
            "least_seconds": {e: round(t, 4) for e, t in least.items()},
            "peak_megabytes": {e: round(m / 1e6, 1) for e, m in memory.items()},
        }
        if args.bias:
            result[name]["times_slower_by_least"] = round(least[first] / least[second], 2)
            continue
        result[name] |= {
            "times_faster": round(median["mask"] / median["blocks"], 2),
            "times_faster_by_least": round(least["mask"] / least["blocks"], 2),
            "mask_megabytes": round(case["mask"]["mask"] / 1e6, 1),
            "times_less_memory": round(memory["mask"] / memory["blocks"], 1) if memory["blocks"] > 1e6 else None,
            "largest_difference": max(abs(x - y) for x, y in zip(a, b)),
        }
    common.save(args.name or f"blocks_{backend}{'_' + args.bias if args.bias else ''}", result, args.out)


if __name__ == "__main__":
    main()
