"""One forward pass over a text, logits of every position, beside transformers in the same run, taking turns.

python bench/forward.py --model checkpoints/SmolLM2-135M-Instruct --length 2048
"""

import argparse
import time

import common
import numpy as np


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="forward")
    parser.add_argument("--out")
    args = parser.parse_args()
    import os

    os.environ["NANOLONG_BACKEND"] = "torch"
    import torch
    from transformers import AutoModelForCausalLM

    from model import load

    ours, _ = load(args.model, dtype="float32", device=args.device)
    theirs = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    tokens = torch.tensor(np.random.default_rng(0).integers(0, 1000, (1, args.length)), device=args.device)
    wait = torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None
    times = {"nanolong": [], "transformers": []}
    with torch.no_grad():
        difference = (ours(tokens) - theirs(tokens).logits).abs().max().item()
        for _ in range(args.repeat):
            for name, f in (("nanolong", lambda: ours(tokens)), ("transformers", lambda: theirs(tokens, use_cache=False).logits)):
                start = time.perf_counter()
                f()
                wait()
                times[name].append(time.perf_counter() - start)
    median = {name: round(sorted(t)[len(t) // 2], 3) for name, t in times.items()}
    result = {"model": args.model, "length": args.length, "seconds": median, "least": {n: round(min(t), 3) for n, t in times.items()}}
    result |= {"ratio": round(median["nanolong"] / median["transformers"], 3), "largest_difference": difference}
    common.save(args.name, result, args.out)


if __name__ == "__main__":
    main()
