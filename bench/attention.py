"""Attention on one CUDA device beside its peers, in one run: forced cuDNN and FlashAttention-2 (plain causal), compiled FlexAttention.

python bench/attention.py                     # all cases; --only targets, --seconds 300
python bench/attention.py --costs             # what positions as data and biases cost
python bench/attention.py --table RESULT.json # the table and the plot again

Medians over replays of a graph of calls, so the device's time alone; bfloat16, random inputs. TFLOP/s count the pairs that the
pattern allows: 4 H D pairs forward, 2.5 times that backward. Efficiency: density x time of dense cuDNN / time of the pattern, in the
same run. Errors are ||x - exact|| / ||exact|| against float64, of one key head and its query heads: out, dq, dk, dv up to 32K tokens,
above that out and dq of 512 random queries. FlexAttention gets its block mask beforehand; its first call, with the mask, is timed apart.
"""

import argparse
import contextlib
import gc
import json
import sys
import time
from pathlib import Path

import common

L1, L4 = "longformer:window=1024,n_global=64", "longformer:window=4096,n_global=64"
BIRD = "bigbird:block=64,window=15,n_global=2,n_random=3"
# pattern, tokens, query heads, key heads, head width; the most telling first
CASES = {
    "targets": [
        (L1, 32, 16, 16, 128),
        (L1, 32, 32, 8, 128),
        (L1, 32, 9, 3, 64),
        (L4, 32, 16, 16, 128),
        (BIRD, 32, 16, 16, 128),
        (L1, 128, 16, 16, 128),
        (L4, 128, 16, 16, 128),
        ("full", 32, 16, 16, 128),
    ],
    "lengths": [(L1, n, 16, 16, 128) for n in (8, 16, 64, 256, 512)] + [("full", n, 16, 16, 128) for n in (8, 16, 64, 128)],
    "heads": [(L1, n, H, K, D) for n in (8, 32, 128) for H, K, D in ((16, 16, 64), (32, 8, 64), (32, 8, 128), (9, 3, 64), (9, 3, 128))],
    "patterns": [
        (spec, 32, 16, 16, 128)
        for spec in (
            "window:window=1024",
            "local:block=1024",
            "dilated:window=512,dilation=4",
            "s2:group=2048",
            "duo:full=25,window=1024",
            "strided",
        )
    ],
    "rest": [("full", 32, 32, 8, 128), ("full", 32, 9, 3, 64), ("full", 8, 9, 3, 64), (L4, 512, 16, 16, 128)],
}
COSTS = [(L1, 16, 16, 128), (L1, 32, 8, 128), (L1, 9, 3, 64), (L4, 16, 16, 128)]
FLEX_UP_TO = 128 << 10  # tokens: the mask is found by looking at every pair


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", choices=CASES, nargs="+", help="these cases")
    p.add_argument("--extra", action="store_true", help="a million tokens in one call, too")
    p.add_argument("--costs", type=int, nargs="*", metavar="I", help="what positions as data and biases cost, in all cases or in these")
    p.add_argument("--seconds", type=float, default=1e9, help="begin no further case after that many")
    p.add_argument("--rep", type=int, default=100, help="milliseconds of repeated calls for each median (default 100)")
    p.add_argument("--scale", type=int, default=1024, help="tokens in a K; smaller to try the script (default 1024)")
    p.add_argument("--no-peers", action="store_true")
    p.add_argument("--table", metavar="FILE", nargs="+", help="print and draw results that are there; of like rows the last counts")
    p.add_argument("--cases", metavar="SPEC@TOKENS@HEADS@WIDTH", nargs="+", help="cases of your own: longformer@8@16/16@128, in K tokens")
    p.add_argument("--plot", metavar="FILE.png", help="with --table: draw there")
    p.add_argument("--name", default="attention")
    p.add_argument("--out")
    return p


def device():
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def pairs(rule, n, heads):
    """Pairs that the pattern allows, of all heads together."""
    import numpy as np

    from kernels.layout import layouts

    found, who = layouts(rule, (0, n), (0, n), 64, heads=heads)
    count = []
    for head, f in zip([who.index(i) for i in range(len(found))], found):
        i, j = f.pairs >> 32, f.pairs & (1 << 31) - 1
        part = (f.pairs >> 31 & 1) == 0
        total, at = f.full * 64 * 64, np.arange(64)
        for c in np.array_split(np.flatnonzero(part), max(1, part.sum() // 4096)):
            q, k = (i[c] * 64)[:, None, None] + at[:, None], (j[c] * 64)[:, None, None] + at
            total += int((rule.module.allowed(q, k, head, rule.options) & (k <= q) & (q < n)).sum())
        count.append(total)
    return sum(count[w] for w in who)


def exact(q, k, v, do, rule, h, rows):
    """Yields (rows, p, out, dq) in float64 for query head h, some rows at a time."""
    import torch

    n, scale = k.shape[2], q.shape[3] ** -0.5
    g = h * k.shape[1] // q.shape[1]
    keys, values = k[0, g].double(), v[0, g].double()
    at = torch.arange(n, device=k.device)
    for r in rows.split(max(1, (1 << 26) // n)):
        see = rule.module.allowed(r[:, None], at[None], h, rule.options) & (at[None] <= r[:, None])
        p = ((q[0, h, r].double() @ keys.T) * scale).masked_fill(~see, -torch.inf).softmax(-1)
        d = do[0, h, r].double()
        out, dp = p @ values, d @ values.T
        ds = p * (dp - (out * d).sum(-1, keepdim=True)) * scale
        yield r, p, ds, out, ds @ keys, d


def errors(got, q, k, v, do, rule):
    """||x - exact|| / ||exact|| of out, dq, dk, dv (or out, dq alone) for one key head."""
    import torch

    H, n, K = q.shape[1], q.shape[2], k.shape[1]
    g = int(torch.randint(K, ()))
    whole = n <= 32 << 10
    rows = torch.arange(n, device=q.device) if whole else torch.randint(n, (512,), device=q.device).unique()
    sums = torch.zeros(4, 2, dtype=torch.float64)
    dk, dv = torch.zeros_like(k[0, g], dtype=torch.float64), torch.zeros_like(v[0, g], dtype=torch.float64)
    far = lambda a, b: torch.stack([(a.double() - b).square().sum(), b.square().sum()]).cpu()
    for h in range(g * H // K, (g + 1) * H // K):
        for r, p, ds, out, dq, d in exact(q, k, v, do, rule, h, rows):
            sums[0] += far(got[0][0, h, r], out)
            sums[1] += far(got[1][0, h, r], dq)
            if whole:
                dk += ds.T @ q[0, h, r].double()
                dv += p.T @ d
    if whole:
        sums[2], sums[3] = far(got[2][0, g], dk), far(got[3][0, g], dv)
    return [float(f"{x:.2e}") for x in (sums[:, 0] / sums[:, 1]).sqrt()[: 4 if whole else 2]]


def milliseconds(f, rep):
    """The time of the device alone for f(): many calls in one graph, the median of its replays, so that a slow host does not count.
    What cannot be captured is timed call by call."""
    import torch

    if device() == "cpu":
        f()
        return 1.0
    stream = torch.cuda.current_stream()
    ticks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def time_of(g):
        ticks[0].record()
        g()
        ticks[1].record()
        torch.cuda.synchronize()
        return ticks[0].elapsed_time(ticks[1])

    f()
    once = sorted(time_of(f) for _ in range(3))[1]
    calls = max(1, min(50, int(rep / 5 / once)))
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                f()
    except RuntimeError as no:
        print(f"timed call by call: {str(no).splitlines()[0][:100]}", file=sys.stderr)
        return sorted(time_of(f) for _ in range(9))[4]
    return sorted(time_of(graph.replay) for _ in range(7))[3] / calls


def measure(f, q, k, v, do, rule, flops, rep):
    """Times, TFLOP/s and errors of f(q, k, v), and the seconds of its first call, forward and backward."""
    import torch

    sync = torch.cuda.synchronize if device() == "cuda" else lambda: None
    # what is not written must show
    poison = [torch.full_like(q, torch.nan) for _ in range(4)]
    del poison
    start = time.perf_counter()
    y = f(q, k, v)
    grads = torch.autograd.grad(y, (q, k, v), do, retain_graph=True)
    sync()
    first = time.perf_counter() - start
    wrong = errors((y.detach(), *grads), q.detach(), k.detach(), v.detach(), do, rule)
    del grads
    with torch.no_grad():
        forward = milliseconds(lambda: f(q, k, v), rep)
    backward = milliseconds(lambda: torch.autograd.grad(y, (q, k, v), do, retain_graph=True), rep)
    rate = lambda ms, x: round(x / ms / 1e9)
    return {
        "forward_ms": round(forward, 4),
        "backward_ms": round(backward, 4),
        "forward_tflops": rate(forward, flops),
        "backward_tflops": rate(backward, 2.5 * flops),
        "error": wrong,
        "first_call_s": round(first, 2),
    }


def ours(rule, n, explicit=False, bias=None):
    """kernels.attend as the model calls it."""
    import ops
    from kernels import Places, attend

    at = Places(ops.arange(n, ops.array([0]))[None, None], None if explicit else 0)
    return lambda q, k, v: attend(q, k, v, at, at, rule, bias=bias)


def stock(backend):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    def f(q, k, v):
        with sdpa_kernel([getattr(SDPBackend, backend) if device() == "cuda" else SDPBackend.MATH]):
            return sdpa(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    return f


def flex(rule, n, heads):
    """Compiled FlexAttention under the rule, and the seconds that its block mask took."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    by_head = len({rule.module.allowed(5000, 3000, h, rule.options) for h in range(heads)}) > 1 or hasattr(rule.module, "LINKS")
    start = time.perf_counter()
    see = lambda b, h, q, k: rule.module.allowed(q, k, h, rule.options)
    mask = create_block_mask(see, None, heads if by_head else None, n, n, device=device(), _compile=device() == "cuda")
    if device() == "cuda":
        torch.cuda.synchronize()
    took = time.perf_counter() - start
    run = torch.compile(flex_attention, dynamic=False) if device() == "cuda" else flex_attention
    return lambda q, k, v: run(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]), took


def inputs(n, H, K, D):
    import torch

    dtype = torch.bfloat16 if device() == "cuda" else torch.float32
    q, k, v = (torch.randn(1, h, n, D, device=device(), dtype=dtype, requires_grad=True) for h in (H, K, K))
    return q, k, v, torch.randn_like(q)


def case(spec, n, H, K, D, args, dense):
    """One row of the table: ours and the peers. dense: times of cuDNN by shape, filled here."""
    import plugins

    rule = plugins.place(plugins.parse("attention", spec), layer=0, n_layer=1, n_head=H, n_kv_head=K)
    q, k, v, do = inputs(n, H, K, D)
    counted = pairs(rule, n, H)
    flops, full = 4 * D * counted, 4 * D * H * n * (n + 1) // 2
    row = {"pattern": spec, "tokens": n, "heads": f"{H}/{K}", "width": D, "density": round(flops / full, 5)}
    row["nanolong"] = measure(ours(rule, n), q, k, v, do, rule, flops, args.rep)
    if args.no_peers:
        return row
    causal = plugins.parse("attention", "full")
    if (n, H, K, D) not in dense and n <= FLEX_UP_TO:
        dense[n, H, K, D] = {
            name: attempt(lambda b=b: measure(stock(b), q, k, v, do, causal, full, args.rep))
            for name, b in (("cudnn", "CUDNN_ATTENTION"), ("flash2", "FLASH_ATTENTION"))
        }
    peers = dense.get((n, H, K, D), {})
    row.update(peers if spec == "full" else {})
    if "forward_ms" in peers.get("cudnn", {}):
        for way in ("forward", "backward"):
            spent = row["nanolong"][f"{way}_ms"] / peers["cudnn"][f"{way}_ms"]
            row["nanolong"][f"{way}_efficiency"] = round(row["density"] / spent, 3)
    if n <= FLEX_UP_TO:

        def peer():
            f, took = flex(rule, n, H)
            return {**measure(f, q, k, v, do, rule, flops, args.rep), "mask_s": round(took, 2)}

        row["flex"] = attempt(peer)
        if "forward_ms" in row["flex"]:
            for way in ("forward", "backward"):
                row[f"{way}_times_flex"] = round(row["flex"][f"{way}_ms"] / row["nanolong"][f"{way}_ms"], 3)
    return row


def attempt(f):
    try:
        return f()
    except Exception as no:
        return {"failed": f"{type(no).__name__}: {str(no).splitlines()[-1][:150] if str(no) else ''}"}


def costs(spec, H, K, D, args):
    """What explicit positions and biases cost: ALiBi's slopes, and T5's table of 114 distances, trained."""
    import torch

    import plugins
    from kernels import Bias

    rule, n = plugins.parse("attention", spec), 32 * args.scale
    q, k, v, do = inputs(n, H, K, D)
    flops = 4 * D * pairs(rule, n, H)
    slope = torch.exp2(-torch.arange(1, H + 1, device=device()) / 2)
    table = torch.randn(H, 114, device=device(), requires_grad=True)
    ways = {"plain": {}, "explicit": {"explicit": True}, "slope": {"bias": Bias(slope)}, "table": {"bias": Bias(None, table)}}
    out, zero = {}, lambda f: milliseconds(f, args.rep)
    for name, how in ways.items():
        f = ours(rule, n, **how)

        trained = q, k, v, *([table] if name == "table" else [])

        def both(f=f, trained=trained):
            y = f(q, k, v)
            with torch.no_grad():
                forward = zero(lambda: f(q, k, v))
            return {"forward_ms": forward, "backward_ms": zero(lambda: torch.autograd.grad(y, trained, do, retain_graph=True))}

        out[name] = attempt(both)
        if "forward_ms" in out[name]:
            out[name].update({w: round(flops * (1 if w[0] == "f" else 2.5) / out[name][f"{w}_ms"] / 1e9) for w in ("forward", "backward")})
    return {"pattern": spec, "tokens": n, "heads": f"{H}/{K}", "width": D, **out}


def cost_line(row):
    """A row of the table of costs: over plain, forward / backward."""

    def over(way):
        if "forward_ms" not in row[way]:
            return "-"
        more = (row[way][f"{w}_ms"] / row["plain"][f"{w}_ms"] - 1 for w in ("forward", "backward"))
        return " / ".join(f"{100 * x:+.0f}%" for x in more)

    plain = row["plain"]
    cells = [row["pattern"], f"{row['heads']} x {row['width']}", f"{plain['forward']} / {plain['backward']}"]
    return "| " + " | ".join([*cells, *map(over, ("explicit", "slope", "table"))]) + " |"


COST_HEADER = "| pattern | heads x width | plain, TFLOP/s | positions as data | slope | table |\n|---|---|---|---|---|---|"


def million(rule, args):
    """Forward and backward over 1M tokens in one call: seconds and GiB, of which inputs, output and gradients."""
    import torch

    n = 1024 * args.scale
    q, k, v, do = inputs(n, 16, 16, 128)
    f, sync = ours(rule, n), torch.cuda.synchronize if device() == "cuda" else lambda: None
    for _ in range(2):
        sync()
        start = time.perf_counter()
        y = f(q, k, v)
        sync()
        middle = time.perf_counter()
        grads = torch.autograd.grad(y, (q, k, v), do)
        sync()
        end = time.perf_counter()
    wrong = errors((y.detach(), *grads), q.detach(), k.detach(), v.detach(), do, rule)
    return {
        "tokens": n,
        "forward_s": round(middle - start, 4),
        "backward_s": round(end - middle, 4),
        "peak_GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device() == "cuda" else None,
        "tensors_GiB": round(8 * q.numel() * q.element_size() / 2**30, 2),
        "error": wrong,
    }


def line(row):
    """A row of the README's table."""
    mine, peer, tokens = row["nanolong"], row.get("flex", {}), row["tokens"] >> 10
    pair = lambda r, suffix="tflops": f"{r[f'forward_{suffix}']} / {r[f'backward_{suffix}']}" if f"forward_{suffix}" in r else "-"
    ratio = f"{row['forward_times_flex']:.2f}x / {row['backward_times_flex']:.2f}x" if "forward_times_flex" in row else "-"
    stock = " ".join(f"{name} {pair(row[name])}" for name in ("cudnn", "flash2") if name in row)
    cells = (
        row["pattern"],
        f"{tokens}K",
        f"{row['heads']} x {row['width']}",
        pair(mine),
        pair(peer),
        ratio,
        pair(mine, "efficiency"),
        stock or "-",
    )
    return "| " + " | ".join(cells) + f" | {max(mine['error']):.1e} |"


HEADER = """| pattern | tokens | heads x width | nanolong | FlexAttention | times faster | efficiency | dense | error |
|---|---|---|---|---|---|---|---|---|"""


def plot(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), dpi=120, layout="constrained")
    for ax, way in zip(axes, ("forward", "backward")):
        for spec, shade in ((L1, "#4c78a8"), ("full", "#e0a458")):
            for peer, style in (("nanolong", "o-"), ("flex", "s--"), ("cudnn", "^:")):
                mine = [r for r in rows if r["pattern"] == spec and (r["heads"], r["width"]) == ("16/16", 128)]
                at = sorted((r["tokens"], r[peer][f"{way}_ms"]) for r in mine if f"{way}_ms" in r.get(peer, {}))
                if at:
                    ax.plot(
                        *zip(*at), style, color=shade, label=f"{peer}, {'causal' if spec == 'full' else 'window 1024 + 64 global'}", ms=4
                    )
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks([8192 << i for i in range(7)], [f"{8 << i}K" for i in range(7)])
        ax.set_xlabel("tokens")
        ax.set_title(f"{way}, milliseconds (16 heads of 128, bfloat16)", fontsize=10)
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path)
    print(f"drawn into {path}", file=sys.stderr)


def main():
    args = parser().parse_args()
    if args.table:
        results = [json.loads(Path(path).read_text()) for path in args.table]
        if found := [row for r in results for row in r.get("costs", [])]:
            print("\n".join([COST_HEADER, *map(cost_line, found)]))
        rows = [row for r in results for row in r["rows"]]
        if not rows:
            return None
        rows = list({(r["pattern"], r["tokens"], r["heads"], r["width"]): r for r in rows}.values())
        print("\n".join([HEADER, *map(line, rows)]))
        return plot(rows, args.plot) if args.plot else None
    import torch

    import ops

    if device() == "cpu" and args.scale > 64:
        sys.exit("attention.py: there is no CUDA device, and a CPU would take hours: --scale 8 tries the script")
    ops.use(device())
    start, rows, dense = time.time(), [], {}
    result = {"timed": "graphs of calls", "rows": rows}
    chosen = [c for name in args.only or ([] if args.cases or args.costs is not None else CASES) for c in CASES[name]]
    for spec, n, heads, width in (text.split("@") for text in args.cases or []):
        chosen.append((spec, int(n), *map(int, heads.split("/")), int(width)))
    # a stream that can be captured: work of the backward pass runs where that of the forward pass did
    aside = torch.cuda.stream(torch.cuda.Stream()) if device() == "cuda" else contextlib.nullcontext()
    with aside:
        run(args, chosen, result, start, dense)


def run(args, chosen, result, start, dense):
    """The cases, one after the other; the result is written after each."""
    rows = result["rows"]
    if args.extra:
        import plugins

        rule = plugins.parse("attention", L1)
        result["extra"] = {"million": attempt(lambda: million(rule, args))}
        print(json.dumps(result["extra"]), flush=True)
    if args.costs is not None:
        print(COST_HEADER)
        result["costs"] = []
        for i in args.costs or range(len(COSTS)):
            result["costs"].append(costs(*COSTS[i], args))
            print(cost_line(result["costs"][-1]), flush=True)
            common.save(args.name, result, args.out)
    for spec, n, H, K, D in chosen:
        if time.time() - start > args.seconds:
            result["not_run"] = len(chosen) - len(rows)
            break
        rows.append(case(spec, n * args.scale, H, K, D, args, dense))
        gc.collect()
        if device() == "cuda":
            import torch

            torch.cuda.empty_cache()
        print(line(rows[-1]), flush=True)
        # what was measured stays if the rest is cut off
        path = Path(args.out or common.ROOT / "bench" / "results") / f"{args.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": common.machine(), **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
