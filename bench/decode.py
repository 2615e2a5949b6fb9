"""Tokens a second when writing one token at a time, greedy, batch 1, beside transformers in the same run.

    python bench/decode.py --model checkpoints/SmolLM2-135M-Instruct --read 256 --write 64     # a CPU
    python bench/decode.py --shape 8b --read 1984 --write 256                                  # a GPU

transformers runs its eager loop with its default (dynamic) cache: what `generate` does without further set-up.
"""

import argparse
import gc
import time

import common
import numpy as np


def ours(args, prompt, **session):
    import ops
    from generate import Sampler, Session, generate

    class Nothing:
        eos_ids, push, flush = frozenset(), lambda s, i: "", lambda s: ""
        stream = lambda s: s

    ops.use(args.device)
    if args.shape:
        model = common.random_model(args.shape, ops.bfloat16 if ops.on_gpu() else ops.float32, memory=args.memory)
    else:
        from model import load

        model, _ = load(args.model, memory=args.memory, device=args.device)
    rates = []
    for _ in range(args.repeat):
        stats = generate(Session(model, **session), Nothing(), prompt, args.write, Sampler(temperature=0))[1]
        rates.append(
            {"decode": round(stats["speed"], 1), "prefill": round(stats["read_speed"], 1), "cache_MiB": round(stats["cache"] / 2**20, 1)}
        )
    return sorted(rates, key=lambda r: r["decode"])[len(rates) // 2]


def transformers(args, prompt):
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if args.shape:
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**common.SHAPES[args.shape]))
        model = model.to(dtype).to_empty(device=device)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.02)
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    rates = []
    with torch.no_grad():
        for _ in range(args.repeat):
            begin = time.perf_counter()
            out = model(torch.tensor([prompt], device=device), use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            wait()
            read = time.perf_counter()
            for _ in range(args.write):
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
                int(token)
            rates.append({"decode": round(args.write / (time.perf_counter() - read), 1), "prefill": round(len(prompt) / (read - begin), 1)})
    return sorted(rates, key=lambda r: r["decode"])[len(rates) // 2]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder")
    parser.add_argument("--shape", choices=common.SHAPES, help="or random weights of this shape")
    parser.add_argument("--memory", default="full")
    parser.add_argument("--read", type=int, default=256)
    parser.add_argument("--write", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--device")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--eager", action="store_true", help="also time our step without graph or compilation")
    parser.add_argument("--name", default="decode")
    parser.add_argument("--out")
    args = parser.parse_args()
    prompt = np.random.default_rng(0).integers(1, 400, args.read).tolist()
    result = {k: getattr(args, k) for k in ("model", "shape", "memory", "read", "write")}
    result["nanolong"] = ours(args, prompt, chunk=args.chunk)
    if args.eager:
        gc.collect()
        result["nanolong_eager"] = ours(args, prompt, chunk=args.chunk, graph=False)
    if not args.no_peer:
        gc.collect()
        result["transformers"] = transformers(args, prompt)
        result["ratio"] = round(result["nanolong"]["decode"] / result["transformers"]["decode"], 2)
    common.save(args.name, result, args.out)


if __name__ == "__main__":
    main()
