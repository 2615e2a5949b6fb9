"""What a cache in 8 or 4 bits loses, and whether keys turned before they are quantised lose more: the loss of a real model on a real text.

python bench/codes.py                                        # minutes on a CPU: SmolLM2-135M over the first 3000 tokens of argparse.py
python bench/codes.py --data one.txt two.txt --length 8k --bits 4 --channels 32 64

A text is read in short segments, each quantised as it closes, so that nearly all that a token sees are codes; the open segment is exact.
Everything is kept. Printed for each memory: the mean loss in nats a token, and how far that is above the exact cache's on the same tokens,
with the standard error of this mean; for keys that are not turned also how far it is above that of turned ones. What is within two
errors of nothing these texts cannot tell from it.
"""

import argparse
import itertools
from hashlib import sha256
from pathlib import Path

import common
import numpy as np

import cli


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="a checkpoint folder (default: SmolLM2-135M-Instruct)")
    p.add_argument("--data", type=Path, nargs="+", default=[Path(argparse.__file__)], help="texts (default: Python's own argparse.py)")
    p.add_argument("--length", type=cli.whole, default=3000, help="the first tokens of each (default 3000)")
    p.add_argument("--segment", type=cli.whole, default=64, help="tokens read at once (default 64)")
    p.add_argument("--bits", type=int, nargs="+", default=[8, 4])
    p.add_argument("--channels", type=int, nargs="+", default=[32], help="that share a scale (default 32)")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--device")
    p.add_argument("--name", default="codes")
    p.add_argument("--out")
    args = p.parse_args()
    cli.use_backend(None)
    import ops
    from convert import default_model
    from evaluate import perplexity
    from model import load

    folder, texts = Path(args.model or default_model()), [path.read_text() for path in args.data]
    model, tokenizer = load(folder, memory="full", dtype=args.dtype, device=args.device)
    tokens, rows = [tokenizer.encode(text)[: args.length] for text in texts], []

    def read(memory):
        common.remember(model, memory)
        return np.concatenate([perplexity(model, t, args.segment) for t in tokens]).astype(np.float64)

    def noted(memory, losses, **beside):
        rows.append({"memory": memory, "loss": round(losses.mean(), 5)})
        for name, other in beside.items():
            more = losses - other
            rows[-1][name] = [round(more.mean(), 5), round(more.std(ddof=1) / len(more) ** 0.5, 5)]
        said = [f", {more:+.4f} +- {error:.4f} {name.replace('_', ' ')}" for name, (more, error) in list(rows[-1].items())[2:]]
        cli.say(f"{memory}: {rows[-1]['loss']:.4f}{''.join(said)}")

    exact = read("full")
    noted("full", exact)
    for bits, channels in itertools.product(args.bits, args.channels):
        turned, unturned = (f"quantised:budget={args.length},bits={bits},channels={channels},turned={t}" for t in ("true", "false"))
        first, second = read(turned), read(unturned)
        noted(turned, first, over_exact=exact)
        noted(unturned, second, over_exact=exact, over_turned=first)
    seen = {path.name: {"tokens": len(t), "sha256": sha256(s.encode()).hexdigest()} for path, t, s in zip(args.data, tokens, texts)}
    what = {"model": folder.name, "texts": seen, "segment": args.segment, "dtype": args.dtype, "backend": ops.BACKEND}
    common.save(args.name, {**what, "memories": rows}, args.out)


if __name__ == "__main__":
    main()
