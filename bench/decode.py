"""Tokens a second when reading a prompt and then writing one token at a time, greedy, batch 1, beside peers in the same run.

    python bench/decode.py --model checkpoints/SmolLM2-135M-Instruct --read 256 --write 64      # a CPU
    python bench/decode.py --shape 8b --read 1984 --write 256                                   # a GPU
    python bench/decode.py --shape 8b --read 2k,128k --chunk 4k --repeat 1 --peers --memory sinks:budget=2048 snapkv:budget=2048 full
    NANOLONG_BACKEND=mlx python bench/decode.py --model FOLDER --read 4k --write 256 --memory sinks:budget=512

Each memory reads each prompt, of random tokens, with one copy of the weights. What the device holds at its peak while it reads is counted
above the weights; the written tokens that compile and capture the step are not timed. A step is under way while the host learns the
token before it, as in generate.py.

Peers, those that are installed and do the same:
    transformers  its eager loop with its default (dynamic) cache: what `generate` does without further set-up; the prompt at once
    kvpress       the same loop on a cache that a press has brought down to `budget`, once, after the prompt; nothing goes while writing
    mlx-lm        its own loop, which does the same, with a rotating cache of `budget` tokens where the memory is bounded, 4 of them the
                  first
"""

import argparse
import collections
import functools
import gc
import io
import re
import time
from importlib.util import find_spec

import common
import numpy as np

import cli
import evaluate

WARM = 8  # written tokens before the clock starts: compiling and capturing a graph is not what a token costs
# what kvpress calls these memories
PRESSES = {"snapkv": "SnapKVPress", "sinks": "StreamingLLMPress", "tova": "TOVAPress", "keydiff": "KeyDiffPress"}
PEERS = {"torch": ["transformers", "kvpress"], "mlx": ["mlx-lm"]}


def median(cells):
    """The cell of median speed, of several that were measured alike; sentences are all the same."""
    return sorted(cells, key=lambda c: c.get("decode", c["prefill"]) if isinstance(c, dict) else 0)[len(cells) // 2]


def speeds(prompt, read, wrote, write):
    """A cell: a prompt and the seconds of reading it, tokens that were written and theirs."""
    return {"prefill": round(len(prompt) / read, 1), **({"decode": round(wrote / write, 1)} if wrote else {})}


def mib(n):
    return None if n is None else round(n / 2**20, 1)


# ---------------------------------------------------------------- nanolong


def ours(args):
    """The model, once for all memories."""
    import ops

    ops.use(args.device)
    if args.shape:
        return common.random_model(args.shape, ops.bfloat16 if ops.on_gpu() else ops.float32)
    from model import load

    return load(args.model, device=args.device)[0]


def measure(args, model, prompt, graph=True):
    """Reading and writing with the model's memory -> a cell."""
    import ops
    from generate import Session

    gc.collect()
    before = ops.reset_peak()
    session, start = Session(model, args.chunk, args.segment, graph), time.perf_counter()
    logits = session.read(prompt, WARM + args.write)
    drawn = ops.argmax(logits)
    ops.wait(drawn)
    read, peak = time.perf_counter() - start, ops.peak_memory()
    for i in range(args.write and WARM + args.write):
        if i == WARM:
            start = time.perf_counter()
        known = ops.later(drawn)
        drawn = ops.argmax(session.step(drawn))
        session.tokens[-1] = known()
    ops.wait(drawn)
    cell = speeds(prompt, read, args.write, time.perf_counter() - start)
    return cell | {"cache_MiB": mib(session.nbytes()), "peak_MiB_over_weights": mib(None if peak is None else peak - before)}


# ---------------------------------------------------------------- peers


@functools.cache
def hf_model(folder, shape, device):
    """transformers' model and its device."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if not shape:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device), device
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**common.SHAPES[shape]))
    model = model.to(dtype).to_empty(device=device)
    # what is no parameter has lost its numbers
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    return model, device


def hf(args, prompt, press=None):
    """transformers, or kvpress on top of it: a cell. press: what brings the cache down after the prompt."""
    from contextlib import nullcontext

    import torch
    from transformers import DynamicCache

    model, device = hf_model(args.model, args.shape, args.device)
    cache, start = DynamicCache(), time.perf_counter()
    with torch.no_grad():
        with press(model) if press else nullcontext():
            out = model(torch.tensor([prompt], device=device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = int(out.logits[0, -1].argmax())
        read, kept = time.perf_counter() - start, cache.get_seq_length()
        for i in range(args.write and WARM + args.write):
            if i == WARM:
                start = time.perf_counter()
            at = torch.tensor([[len(prompt) + i]], device=device)
            out = model(torch.tensor([[token]], device=device), past_key_values=cache, use_cache=True, position_ids=at)
            token = int(out.logits[0, -1].argmax())
    return speeds(prompt, read, args.write, time.perf_counter() - start) | {"kept": kept}


def kvpress(args, prompt, memory):
    """A cell, or why there is none."""
    import plugins

    plugin = plugins.parse("memory", memory)
    if plugin.name not in PRESSES:
        return f"kvpress has none of {plugin.name} that is the same"
    import kvpress

    o, how = plugin.options, {}
    if plugin.name == "snapkv":
        how = {"window_size": o.window, "kernel_size": o.pool}
    if plugin.name == "sinks":
        how = {"n_sink": o.sinks}
    # what is left of the prompt is rounded down; an ulp must not take a token away
    ratio = max(0.0, 1 - (o.budget + 0.5) / len(prompt))
    return hf(args, prompt, getattr(kvpress, PRESSES[plugin.name])(compression_ratio=ratio, **how))


@functools.cache
def mlx_model(folder, shape):
    """mlx-lm's model, in the numbers that ours has."""
    from mlx.utils import tree_flatten
    from mlx_lm import load
    from mlx_lm.models.llama import Model, ModelArgs

    import ops

    sizes = {"model_type": "llama", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, **(common.SHAPES[shape] if shape else {})}
    model = Model(ModelArgs.from_dict(sizes)) if shape else load(folder)[0]
    model.set_dtype(ops.bfloat16 if ops.on_gpu() else ops.float32)
    for _, p in tree_flatten(model.parameters()):
        # one after the other: random ones are drawn in 32 bits
        ops.wait(p)
    return model


def mlx_lm(args, prompt, memory):
    """A cell."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    import plugins

    model = mlx_model(args.model, args.shape)
    size = getattr(plugins.parse("memory", memory).options, "budget", None)
    how = {"max_tokens": 1 + (args.write and WARM + args.write), "max_kv_size": size, "prefill_step_size": args.chunk}
    times = [time.perf_counter()]
    times += [time.perf_counter() for _ in generate_step(mx.array(prompt), model, **how)]
    return speeds(prompt, times[1] - times[0], args.write, times[-1] - times[-1 - args.write])


def primitives(model, args, prompt, memory):
    """What MLX is asked to do for one written token, by primitive: ours and mlx-lm's, the prompt being remembered."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    import plugins
    from generate import Session

    session, theirs = Session(model, args.chunk, args.segment), mlx_model(args.model, args.shape)
    session.read(prompt, 4)
    # the first one tells the room where it stands
    session.step(1)
    cache = make_prompt_cache(theirs, getattr(plugins.parse("memory", memory).options, "budget", None))
    mx.eval(theirs(mx.array([prompt]), cache=cache), [c.state for c in cache])
    token = mx.array([[1]])
    return {"nanolong": counted(session.run.step(token, session.run.state, False)[0]), "mlx-lm": counted(theirs(token, cache=cache))}


def counted(*arrays):
    """The primitives that have to run before these are there: name -> how many, and all of them."""
    import mlx.core as mx

    dot = io.StringIO()
    mx.export_to_dot(dot, *arrays)
    found = collections.Counter(re.findall(r'label ="([^"]+)", shape=rectangle', dot.getvalue()))
    return {"all": found.total(), **dict(sorted(found.items()))}


def peer(name, args, prompt, memory):
    """A peer's cell, or the sentence that says why there is none."""
    package = {"mlx-lm": "mlx_lm"}.get(name, name)
    if not find_spec(package):
        return "not installed"
    if name == "mlx-lm":
        return mlx_lm(args, prompt, memory)
    return hf(args, prompt) if name == "transformers" else kvpress(args, prompt, memory)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder")
    parser.add_argument("--shape", choices=common.SHAPES, help="or random weights of this shape")
    parser.add_argument("--memory", nargs="+", default=["full"], metavar="SPEC", help="one or more")
    parser.add_argument("--read", type=evaluate.lengths, default=[256], metavar="N,N", help="prompts of so many tokens (default 256)")
    parser.add_argument("--write", type=int, default=64, help="0: reading alone")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--chunk", type=cli.whole, default=2048, help="tokens of a prompt read at once")
    parser.add_argument("--segment", type=cli.whole, default=64, help="written tokens between two closes")
    parser.add_argument("--device")
    parser.add_argument("--peers", nargs="*", choices=[*PEERS["torch"], *PEERS["mlx"]], help="default: those of the backend")
    parser.add_argument("--eager", action="store_true", help="also time our step without graph or compilation")
    parser.add_argument("--count", action="store_true", help="MLX: also count what is asked for one token, ours and mlx-lm's")
    parser.add_argument("--name", default="decode")
    parser.add_argument("--out")
    args = parser.parse_args()
    import ops
    from generate import Session

    peers = PEERS[ops.BACKEND] if args.peers is None else args.peers
    result = {k: getattr(args, k) for k in ("model", "shape", "write", "chunk", "segment")} | {"backend": ops.BACKEND, "rows": []}
    prompts = {n: np.random.default_rng(0).integers(1, 400, n).tolist() for n in args.read}
    model = ours(args)
    for memory in args.memory:
        common.remember(model, memory)
        for n, prompt in prompts.items():
            # kernels are compiled for shapes that were not seen yet
            Session(model, args.chunk, args.segment).read(np.resize(prompt, 2 * args.chunk))
            contenders = {"nanolong": lambda prompt=prompt: measure(args, model, prompt)}
            if args.eager:
                contenders["nanolong_eager"] = lambda prompt=prompt: measure(args, model, prompt, graph=False)
            contenders |= {name: functools.partial(peer, name, args, prompt, memory) for name in peers}
            # in turns, for a machine may be slower now than a minute ago
            rounds = [{name: f() for name, f in contenders.items()} for _ in range(args.repeat)]
            row = {"memory": memory, "read": n, **{name: median([r[name] for r in rounds]) for name in contenders}}
            for name in peers:
                if isinstance(row[name], dict):
                    row[f"times_{name}"] = {k: round(row["nanolong"][k] / x, 2) for k, x in row[name].items() if k != "kept"}
            if args.count:
                row["primitives"] = primitives(model, args, prompt, memory)
            result["rows"].append(row)
            cli.say(row)
            common.save(args.name, result, args.out, quiet=True)
    common.save(args.name, result, args.out)


if __name__ == "__main__":
    main()
