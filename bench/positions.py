"""What a position scheme costs of a training step: forward and backward of the layers (no head, no optimizer), beside no positions at all.

python bench/positions.py                                    # 8B-shaped layers and SmolLM2-135M's at 32K tokens, random weights
python bench/positions.py --shapes tiny --length 512 --repeat 2
python bench/positions.py --table bench/results/positions-h100.json

`rope, plain` is rope without its kernel: kernels/rotate.py as written. Each figure is the median over steps; schemes take turns, so that a
device that gets slower does so for all.
"""

import argparse
import json
import time
from pathlib import Path

import common

common.SHAPES["135m"] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 10,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
LAYERS = {"8b": 3, "135m": 10, "tiny": 2}
PATTERNS = ("full", "longformer:window=1024,n_global=64")
SCHEMES = ("none", "rope", "rope, plain", "yarn", "dynamic", "alibi", "t5", "xl:width=64")


def step(shape, attn, pos, length):
    """A function that does one forward and backward pass of the layers."""
    import ops
    from kernels import Places, rotate

    scheme, _, plain = pos.partition(", ")
    common.SHAPES[shape]["num_hidden_layers"] = LAYERS[shape]
    dtype = ops.bfloat16 if ops.on_gpu() else ops.float32
    model = common.random_model(shape, dtype, attn=attn, pos=scheme, tie_word_embeddings=True)
    tokens = ops.array([[i % 509 for i in range(length)]])
    at = Places(ops.arange(length, tokens)[None, None], 0)
    few = length + 1 if plain else rotate.FEW

    def loss():
        x = model.model.embed_tokens(tokens)
        return ops.cast(model.model(x, at, None, False, model.start()["layers"])[0], ops.float32).mean()

    def run():
        usual, rotate.FEW = rotate.FEW, few
        ops.wait(ops.value_and_grad(model, loss))
        rotate.FEW = usual

    return run


def measured(shape, attn, length, repeat, schemes):
    """Seconds of a step by scheme."""
    runs, times = {pos: step(shape, attn, pos, length) for pos in schemes}, {pos: [] for pos in schemes}
    for turn in range(repeat + 2):
        for pos, run in runs.items():
            start = time.perf_counter()
            run()
            # the first two turns compile and allocate
            times[pos] += [time.perf_counter() - start] * (turn > 1)
    return {pos: sorted(t)[len(t) // 2] for pos, t in times.items()}


def table(result):
    """Milliseconds a step, and what is over `none` as a share of the step."""
    print("| layers | pattern | " + " | ".join(result["rows"][0]["seconds"]) + " |")
    print("|" + "---|" * (2 + len(result["rows"][0]["seconds"])))
    for row in result["rows"]:
        base = row["seconds"]["none"]
        cells = [f"{1e3 * t:.1f} ms" + (f", {100 * (t - base) / t:+.1f}%" if pos != "none" else "") for pos, t in row["seconds"].items()]
        print(f"| {row['shape']} x {row['layers']} | {row['attn']} | " + " | ".join(cells) + " |")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", nargs="+", choices=LAYERS, default=["8b", "135m"])
    p.add_argument("--patterns", nargs="+", default=PATTERNS)
    p.add_argument("--schemes", nargs="+", default=SCHEMES)
    p.add_argument("--length", type=int, default=32 << 10, help="tokens (default 32K)")
    p.add_argument("--repeat", type=int, default=9)
    p.add_argument("--table", metavar="FILE")
    p.add_argument("--name", default="positions")
    p.add_argument("--out")
    args = p.parse_args()
    if args.table:
        return table(json.loads(Path(args.table).read_text()))
    rows = []
    for shape in args.shapes:
        for attn in args.patterns:
            seconds = measured(shape, attn, args.length, args.repeat, args.schemes)
            rows.append({"shape": shape, "layers": LAYERS[shape], "attn": attn, "length": args.length, "seconds": seconds})
            print(json.dumps(rows[-1]), flush=True)
    common.save(args.name, {"rows": rows}, args.out)
    table({"rows": rows})


if __name__ == "__main__":
    main()
