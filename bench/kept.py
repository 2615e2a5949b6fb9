"""Which tokens stay: our memories beside kvpress, on the same text and the same weights.

python bench/kept.py --data book.txt --length 512 --budget 128          # needs transformers and kvpress (pip install kvpress)

A layer's choice depends on what the layers below it read, so both read the text at once and forget only then: every layer of kvpress
is watched as it chooses, and ours closes one segment. Printed for each memory: the share of kvpress's tokens that ours keeps too, over all
layers and key heads and for the worst head, and how many tokens a head keeps in the mean.
"""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

WINDOW, FUTURE, SINKS, POOL = 32, 512, 4, 5


def presses(share):
    """name -> (how we spell it, kvpress's press)."""
    try:
        import kvpress
    except ImportError:
        sys.exit("kept.py: kvpress is not installed, and it is what this compares with: pip install kvpress")

    snap = {"compression_ratio": 1 - share, "window_size": WINDOW, "kernel_size": POOL}
    return {
        "snapkv": (f"window={WINDOW},pool={POOL}", kvpress.SnapKVPress(**snap)),
        "tova": ("", kvpress.TOVAPress(1 - share)),
        "pyramidkv": (f"window={WINDOW},pool={POOL},beta=20", kvpress.PyramidKVPress(**snap, beta=20)),
        "adakv": (f"window={WINDOW},pool={POOL},floor=0.2,widest=99", kvpress.AdaKVPress(kvpress.SnapKVPress(**snap), 0.2)),
        "keydiff": ("", kvpress.KeyDiffPress(1 - share)),
        "expected": (f"window=4096,future={FUTURE},sinks={SINKS}", kvpress.ExpectedAttentionPress(1 - share, FUTURE, SINKS)),
    }


def theirs(folder, tokens, press):
    """[layers][key heads] -> the positions that kvpress keeps."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    kept, n, compress = [], len(tokens), press.compress
    scorer = getattr(press, "press", press)
    score = scorer.score

    def watched(module, hidden, keys, values, attentions, kwargs):
        # scores are made of the true values; what is chosen are values that say where they stand
        scorer.score = lambda module, hidden, keys, _, *rest: score(module, hidden, keys, values, *rest)
        marked = values * 0 + torch.arange(n, dtype=values.dtype)[:, None]
        module.masked_key_indices = None
        out = compress(module, hidden, keys, marked, attentions, kwargs)[1]
        heads = [set(row) for row in out[0, :, :, 0].int().tolist()]
        # AdaKV masks instead of choosing
        gone, module.masked_key_indices = module.masked_key_indices, None
        for h, t in zip(*(x.tolist() for x in gone[1:])) if gone else ():
            heads[h].discard(t)
        kept.append(heads)
        return keys, values

    press.compress = watched
    with torch.no_grad(), press(model):
        model(torch.tensor(tokens)[None], past_key_values=DynamicCache())
    return kept


def ours(folder, tokens, spec):
    import ops
    from model import load

    model, _ = load(folder, memory=spec, dtype="float32", device="cpu")
    with ops.no_grad():
        _, state = model(ops.array(np.asarray(tokens, "int32")[None]), model.start(len(tokens), len(tokens)))
    out = []
    for block, s in zip(model.model.layers, state["layers"]):
        memory = block.self_attn.memory
        pos = ops.numpy((memory.whole(s) if hasattr(memory, "whole") else s)["pos"])[0]
        out.append([set(row[row >= 0].tolist()) for row in np.broadcast_to(pos, (model.config.num_key_value_heads, pos.shape[1]))])
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="a checkpoint folder (default: SmolLM2-135M-Instruct)")
    p.add_argument("--data", required=True, help="a text file")
    p.add_argument("--length", type=int, default=512, help="its first tokens (default 512)")
    p.add_argument("--budget", type=int, default=128, help="tokens kept by a key head (default 128)")
    p.add_argument("--only", nargs="+", help="memories (default: all)")
    p.add_argument("--json", help="write the figures there")
    args = p.parse_args()
    import tokenizer
    from convert import default_model

    folder = Path(args.model or default_model())
    tokens = tokenizer.load(folder).encode(Path(args.data).read_text())[: args.length].tolist()
    # half a token more, so that their rounding down meets the budget
    share, rows = (args.budget + 0.5) / len(tokens), []
    for name, (how, press) in presses(share).items():
        if args.only and name not in args.only:
            continue
        a, b = theirs(folder, tokens, press), ours(folder, tokens, f"{name}:budget={args.budget}" + ("," + how if how else ""))
        same = np.array([[len(x & y) / len(x) for x, y in zip(*layers)] for layers in zip(a, b)])
        size = [np.mean([len(x) for layer in kept for x in layer]) for kept in (a, b)]
        rows.append({"memory": name, "how": how, "same": same.mean(), "least": same.min(), "theirs": size[0], "ours": size[1]})
        shares = f"{same.mean():8.2%} the same, worst head {same.min():8.2%}"
        print(f"{name:10}{shares}, tokens a head {size[0]:.1f} and {size[1]:.1f}", flush=True)
    if args.json:
        what = {"kvpress": version("kvpress"), "model": folder.name, "length": len(tokens), "budget": args.budget}
        Path(args.json).write_text(json.dumps({**what, "memories": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
