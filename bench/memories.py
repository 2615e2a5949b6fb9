"""How fast recurrent memories train: tokens a second and peak memory of train.py's own step in segments, beside `none` in the same run.

python bench/memories.py                                     # SmolLM2-135M's shape, 4 rows of 4096 tokens in segments of 512: a GPU
python bench/memories.py --shape tiny --length 512 --segment 64 --repeat 5      # a minute on a CPU
python bench/memories.py --table bench/results/memories.json

All weights train, in float32, activations are bfloat16 on a GPU; they are random, and so are tokens (bench/finetune.py makes the model and
its step). Memories are as their files have them, but that xl and compressive keep one segment raw. Timed are steps after whole ones to warm
up, optimizer included: the median. Peak memory is the device's; torch on a CPU counts none.

Gradients go as far as train.py lets them by default: through all boundaries, for which all segments but a row's last are read twice, and
where a memory cuts them (none, xl, compressive) through none, for which they are read once. `none` is there once more at the end: what
that differs by is the machine's doing.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import common
import finetune

import cli

# {n}: a segment's tokens
MEMORIES = {
    "none": "none",
    "xl": "xl:length={n}",
    "compressive": "compressive:length={n},compressed={n}",
    "tokens": "tokens",
    "state": "state",
    "infini": "infini",
    "melodi": "melodi",
    "summary": "summary",
}
AGAIN = "none, again"


def case(memory, args):
    how = {k: getattr(args, k) for k in ("length", "segment", "batch", "repeat", "checkpoint", "dtype")}
    return SimpleNamespace(**finetune.DEFAULT | how | {"memory": memory, "bptt": None, "adapter": "full", "warm": args.length})


def table(r):
    """The README's table."""
    lines = ["| `--memory` | segments are read | tokens/s | of none's | peak, GiB | of none's |", "|---|---|---|---|---|---|"]
    share = lambda row, key: f"{row[key]:.2f}" if row.get(key) else "not counted"
    for row in r["rows"]:
        if "failed" in row:
            lines.append(f"| {row['name']} | {row['failed']} | | | | |")
            continue
        name = row["name"] if row["name"] == AGAIN else f"`{row['memory']}`"
        cells = [
            name,
            "twice" if row["bptt"] else "once",
            f"{row['tokens/s']:,.0f}",
            *(share(row, k) for k in ("times_none", "peak_GiB", "peak_of_none")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=common.SHAPES, default="135m")
    p.add_argument("--memories", nargs="+", default=list(MEMORIES), help="names, or as --memory spells them")
    p.add_argument("--length", type=cli.whole, default=4096, help="tokens a row (default 4096)")
    p.add_argument("--segment", type=cli.whole, default=512, help="tokens of a segment (default 512)")
    p.add_argument("--batch", type=int, default=4, help="rows (default 4)")
    p.add_argument("--repeat", type=int, default=3, help="timed steps (default 3)")
    p.add_argument("--checkpoint", action="store_true", help="recompute activations")
    p.add_argument("--limit", type=float, default=90, metavar="SECONDS", help="begin no memory later than that (default 90)")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], help="of activations (default: bfloat16 on a GPU)")
    p.add_argument("--device")
    p.add_argument("--table", metavar="FILE", help="print the table of a result")
    p.add_argument("--name", default="memories")
    p.add_argument("--out")
    args = p.parse_args()
    if args.table:
        return print(table(json.loads(Path(args.table).read_text())))
    if not 0 < args.segment < args.length:
        p.error(f"--segment {args.segment} is not possible: it must be above 0 and below --length {args.length}")
    import ops
    import train

    train.use_backend(None)
    ops.use(args.device)
    args.dtype = args.dtype or ("bfloat16" if ops.on_gpu() else "float32")
    # weights are drawn as they train
    drawn = SimpleNamespace(sizes=common.SHAPES[args.shape], dtype="float32")
    result = {k: getattr(args, k) for k in ("shape", "length", "segment", "batch", "repeat", "checkpoint", "dtype")}
    result |= {"backend": ops.BACKEND, "rows": []}
    asked = [(name, MEMORIES.get(name, name).format(n=args.segment)) for name in dict.fromkeys(["none", *args.memories])]
    start, base = time.perf_counter(), {}
    for name, memory in (*asked, (AGAIN, "none")):
        row = {"failed": f"not begun within --limit {args.limit:g} seconds"}
        if time.perf_counter() - start < args.limit:
            row = finetune.tried(case(memory, args), drawn, False)[0]
            finetune.free()
        base = base or row
        if "failed" not in row and "failed" not in base:
            row["times_none"] = round(base["seconds"] / row["seconds"], 3)
            row["peak_of_none"] = row["peak_GiB"] and round(row["peak_GiB"] / base["peak_GiB"], 3)
        result["rows"].append({"name": name, "memory": memory, **row})
        result["seconds"] = round(time.perf_counter() - start, 1)
        cli.say(result["rows"][-1])
        common.save(args.name, result, args.out, quiet=True)
    if base.get("peak_GiB", 0) is None:
        cli.say("peak memory: on this device nobody counts; host_GiB is what the whole process held")
    print(table(result))
    sys.exit(any("failed" in row for row in result["rows"]))


if __name__ == "__main__":
    main()
