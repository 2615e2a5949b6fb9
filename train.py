"""Fine-tune or pretrain a Llama on long texts, on one device, in a run that survives being killed.

    python train.py --attn longformer                       # a small chat model on long Python files, nothing else needed
    python train.py --model checkpoints/mine --data books/ --length 32k --batch 8
    python train.py --init config.json --data books/        # random weights of this config; the tokenizer is --model's
    python train.py --attn window:window=512 --length 64k --segment 2k --memory window:budget=511    # a row in segments
    python train.py --data repos:src/ --curriculum 4k,8k,32k --pos yarn:factor=auto    # longer and longer rows: see curriculum.py
    python train.py --attn s2 --pos pi:factor=4 --length 32k --adapter longlora    # the base frozen but for norms and embedding
    python train.py --adapter summary --length 16k --segment 2k --data books/    # each chunk becomes a few vectors, and is read as those
    python train.py --resume out/SmolLM2-135M-Instruct-longformer

Losses are in nats a token: summed over the target tokens of a whole step, divided by their number, however the rows are split.
Weights, gradients and AdamW's averages are float32, activations bfloat16 on a GPU. What a run leaves behind: see rundir.py.
"""

import argparse
import errno
import functools
import json
import math
import os
import re
import resource
import signal
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

import cli
import curriculum
import data
import errors
import plan
import plugins
import rundir
from errors import Refused

# Memory: weights, gradients and AdamW's two averages take 16 bytes a parameter at any length. Activations grow with
# micro * length (of one block with --checkpoint, else of all), logits with --loss-chunk * vocabulary.
DEFAULTS = {
    # two cores train a 135M model on about 80 tokens a second: five to ten minutes
    "cpu": {"length": 2048, "batch": 1, "steps": 12, "warmup": 2, "valid_rows": 2, "checkpoint": 0},
    # MLX's fused attention has no fused backward: scores of one block, growing with length * length, must fit
    "mac": {"length": 4096, "batch": 4, "steps": 100, "warmup": 10, "valid_rows": 8, "checkpoint": 1},
    "cuda": {"length": 8192, "batch": 8, "steps": 200, "warmup": 20, "valid_rows": 16, "checkpoint": 1},
}
COMMON = {"micro": 1, "weight_decay": 0.1, "clip": 1.0, "seed": 0, "keep": 2, "offload": False}
COMMON |= {"loss_chunk": 2048, "upsample": 1, "rewarm": 0, "checkpoint_offload": False, "optimizer_offload": False}
COMMON |= {"embedding_offload": False, "memory_plan": False, "head_groups": 1}
UNSET = ("model", "init", "data", "valid", "attn", "pos", "memory", "adapter", "device", "dtype", "segment", "bptt", "lr", "min_lr")
UNSET += ("base_bits", "eval_every", "save_every", "out", "mlp_tile", "curriculum", "stages", "segment_least")
POSITIVE = ("length", "batch", "micro", "steps", "lr", "clip", "eval_every", "valid_rows", "save_every", "keep", "loss_chunk", "upsample")
# what a resumed run may change: nothing that moves its losses
FREE = {"device", "eval_every", "save_every", "keep", "resume", "offload", "loss_chunk", "mlp_tile", "head_groups"}
FREE |= {"checkpoint", "checkpoint_offload", "optimizer_offload", "embedding_offload", "memory_plan"}


# tokenised texts, used again by every run
CACHE = Path(os.environ.get("NANOLONG_CACHE", plugins.ROOT / ".cache"))


def parse(argv=None):
    """The flags that were given, and only those, as a dict; paths absolute, so that a run can be resumed from anywhere."""
    table = "\n".join(f"  {name:5}" + "  ".join(f"{k} {v}" for k, v in d.items()) for name, d in {**DEFAULTS, "all": COMMON}.items())
    about = f"{__doc__}\ndefaults by device (mac: MLX, or torch on mps):\n{table}"
    p = cli.Parser(prog="train.py", description=about, argument_default=argparse.SUPPRESS)
    cli.add_model_flags(p)
    p.add_argument("--init", metavar="CONFIG.json", help="start from random weights of this config; the tokenizer is --model's")
    p.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        help="files, folders, globs, .jsonl, repo:, hub: (see sources.py; default: Python's own library)",
    )
    p.add_argument("--valid", nargs="+", metavar="PATH", help="held-out texts (default: a twentieth of the data's files)")
    p.add_argument("--upsample", type=cli.whole, metavar="K", help="draw documents of --length or more tokens K times as often as others")
    p.add_argument("--length", type=cli.whole, help="tokens a row; 4k is 4096")
    p.add_argument(
        "--curriculum", metavar="STAGES", help="lengths one after the other: 4k,8k,32k or, with steps, 4k:100,32k:50; see curriculum.py"
    )
    p.add_argument("--rewarm", type=cli.whole, metavar="STEPS", help="steps of rising lr at each change of --curriculum (default 0)")
    p.add_argument(
        "--segment",
        type=lambda text: text if text == "auto" else cli.whole(text),
        metavar="TOKENS|auto",
        help="read a row in pieces of so many tokens, --memory carrying the past from one to the next; auto: as many as fit, 1k to 16k",
    )
    p.add_argument(
        "--segment-least",
        type=cli.whole,
        metavar="TOKENS",
        help="segments of random lengths from so many tokens to --segment, other ones for every row (as AutoCompressor trains)",
    )
    p.add_argument("--bptt", type=depth, metavar="K|all", help="boundaries between segments that gradients pass in a row (default: all)")
    p.add_argument("--offload", action=argparse.BooleanOptionalAction, help="what is kept at the boundaries waits in the host's memory")
    p.add_argument("--batch", type=cli.whole, help="rows a step")
    p.add_argument("--micro", type=cli.whole, help="rows at a time: less memory, the same result")
    p.add_argument("--steps", type=cli.whole)
    p.add_argument("--lr", type=float, help="at its highest, after the warm-up (default: LR in the adapter's file, for full 1e-4)")
    p.add_argument("--warmup", type=cli.whole, help="steps of rising lr; a cosine follows")
    p.add_argument("--min-lr", type=float, help="at the last step (default: a tenth of --lr)")
    p.add_argument("--weight-decay", type=float)
    p.add_argument("--clip", type=float, help="largest norm of a step's gradient")
    p.add_argument("--seed", type=int)
    p.add_argument(
        "--checkpoint",
        nargs="?",
        const=1,
        type=cli.whole,
        metavar="N",
        help="recompute activations, N blocks at a time (default 1), a third slower",
    )
    p.add_argument("--no-checkpoint", dest="checkpoint", action="store_const", const=0)
    p.add_argument(
        "--checkpoint-offload", action=argparse.BooleanOptionalAction, help="what recomputing starts from waits in the host's memory"
    )
    p.add_argument("--optimizer-offload", action=argparse.BooleanOptionalAction, help="AdamW's averages wait in the host's memory")
    p.add_argument(
        "--embedding-offload",
        action=argparse.BooleanOptionalAction,
        help="a frozen embedding waits in the host's memory, its rows being read there",
    )
    p.add_argument("--loss-chunk", type=cli.whole, metavar="TOKENS", help="logits of so many tokens exist at once (default 2048)")
    p.add_argument(
        "--mlp-tile", type=cli.whole, metavar="TOKENS", help="an MLP takes so many tokens at once: less memory, a third forward of it"
    )
    p.add_argument(
        "--head-groups", type=cli.whole, metavar="G", help="attention takes its heads in G groups, one after the other: less memory, slower"
    )
    p.add_argument("--memory-plan", action="store_true", help="say what memory a step will take, part by part, and leave")
    p.add_argument("--eval-every", type=cli.whole, metavar="STEPS", help="default: a quarter of --steps")
    p.add_argument("--valid-rows", type=cli.whole, metavar="ROWS", help="held-out rows that a validation reads, always the same ones")
    p.add_argument("--save-every", type=cli.whole, metavar="STEPS", help="default: --eval-every")
    p.add_argument("--keep", type=cli.whole, help="newest checkpoints that stay")
    p.add_argument("--out", help="default: out/MODEL-MECHANISMS, numbered if it is there")
    p.add_argument("--resume", metavar="OUT", help="go on from a run's newest checkpoint, with the arguments that it began with")
    given = vars(p.parse_args(argv))
    given |= {k: os.path.abspath(given[k]) for k in ("model", "init", "out") if k in given}
    return given | {k: [data.absolute(path) for path in given[k]] for k in ("data", "valid") if k in given}


def depth(text):
    """argparse type of --bptt: a whole number, or all."""
    n = text if text == "all" else cli.whole(text)
    if n != "all" and n < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0: it takes a number of boundaries, or all")
    return n


def use_backend(name):
    """Import what stands on a framework; not at the top of the file, because the backend must be chosen before."""
    global coded, frozen, kernels, llama, ops, replayed, segments
    # of torch's allocator on CUDA, which reads it at the first array: rows near the limit leave it no room for gaps
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    ops = cli.use_backend(name)
    import kernels
    import model as llama
    import segments
    from kernels import coded, frozen, replayed


def settle(given):
    """All arguments of a new run: those given and the defaults. Raises Refused for what cannot be trained so."""
    kind = ops.use(given.get("device"))
    a = dict.fromkeys(UNSET) | COMMON | DEFAULTS[kind if kind == "cpu" else "cuda" if "cuda" in kind else "mac"]
    a |= given | {"backend": ops.BACKEND}
    if a["segment"] == "auto":
        a["checkpoint"] = given.get("checkpoint", 0)
    a["stages"] = curriculum.stages(a)
    for k, ours in (("length", a["stages"][-1].length), ("steps", a["stages"][-1].last)) if a["curriculum"] else ():
        if given.get(k, ours) != ours:
            raise Refused(f"--{k} {given[k]} contradicts --curriculum {a['curriculum']}, which says {ours}: leave it out")
        a[k] = ours
    a["warmup"] = given.get("warmup", min(a["warmup"], a["steps"]))
    cli.check_spelling(a["attn"], curriculum.settled(a["pos"]), a["memory"], a["adapter"])
    a["adapter"] = a["adapter"] or (llama.read_config(a["model"]).adapter if a["model"] else "full")
    adapter = plugins.parse("adapters", a["adapter"])
    if asked := getattr(adapter.module, "flags", None):
        known = llama.read_config(a["model"]).memory if a["model"] else "full"
        try:
            memory = a["memory"] or (known if known != "full" else None)
            a["memory"], a["segment"] = asked(memory, a["segment"], min(stage.length for stage in a["stages"]))
        except ValueError as no:
            raise Refused(f"--adapter {adapter}: {no}") from None
    a["lr"] = adapter.module.LR if a["lr"] is None else a["lr"]
    a["min_lr"] = a["lr"] / 10 if a["min_lr"] is None else a["min_lr"]
    a["eval_every"] = a["eval_every"] or max(1, a["steps"] // 4)
    a["save_every"] = a["save_every"] or a["eval_every"]
    for k in POSITIVE:
        if not 0 < a[k] < math.inf:
            raise Refused(f"{flag(k)} {a[k]} is not possible: it must be above 0")
    for k, top in (("warmup", a["steps"]), ("rewarm", a["steps"]), ("min_lr", a["lr"]), ("weight_decay", 1 / a["lr"])):
        if not 0 <= a[k] <= top:
            raise Refused(f"{flag(k)} {a[k]} is not possible: it must be from 0 to {top:g}")
    if a["batch"] % a["micro"]:
        raise Refused(f"--batch {a['batch']} is no multiple of --micro {a['micro']}: choose a --micro that divides it")
    if a["mlp_tile"] is not None and a["mlp_tile"] < 1:
        raise Refused(f"--mlp-tile {a['mlp_tile']} is not possible: it must be above 0")
    if a["checkpoint"] < 0 or (a["checkpoint_offload"] and not a["checkpoint"]):
        why = "--checkpoint-offload is about what --checkpoint keeps: give that too"
        raise Refused(why if a["checkpoint_offload"] else f"--checkpoint {a['checkpoint']} is not possible: it must be above 0")
    if a["segment"] is None and (a["bptt"] is not None or a["offload"]):
        raise Refused(f"--{'offload' if a['offload'] else 'bptt'} is about the boundaries between segments: give --segment too")
    if a["segment_least"] is not None:
        most = a["segment"]
        if most in (None, "auto") or not 0 < a["segment_least"] < most:
            of = "a --segment that says how long the others are" if most in (None, "auto") else f"--segment {most}"
            raise Refused(f"--segment-least {a['segment_least']} is not possible: it must be above 0 and below {of}")
    if a["rewarm"] and not a["curriculum"]:
        raise Refused(f"--rewarm {a['rewarm']} is about the changes of a --curriculum: give that too")
    if a["segment"] == "auto" and (a["length"] <= 1024 or min(stage.length for stage in a["stages"]) < 1024):
        raise Refused("--segment auto chooses among 1k to 16k tokens, and rows are no longer than that: give longer rows, or a --segment")
    shortest = 1 if a["segment"] in (None, "auto") else a["segment"]
    if not 0 < shortest < max(2, a["length"]):
        raise Refused(f"--segment {shortest} is not possible: it must be above 0 and below --length {a['length']}")
    if any(shortest > stage.length for stage in a["stages"]):
        raise Refused(f"--segment {shortest} is longer than rows of --curriculum {a['curriculum']}: the shortest may be one segment")
    if a["dtype"] == "float16":
        raise Refused("--dtype float16 would lose small gradients: train in bfloat16 or float32")
    if a["base_bits"] in coded.BITS and adapter.name == "full":
        raise Refused(f"--base-bits {a['base_bits']} holds what stays, and --adapter full trains all: give --adapter lora, or leave it out")
    if a["init"] and adapter.name != "full":
        raise Refused(f"--adapter {adapter} needs a trained base, and --init has none: leave one of them out")
    data.expand((a["data"] or []) + (a["valid"] or []))
    if a["init"] and not os.path.isfile(a["init"]):
        raise Refused(f"--init {a['init']} is not there: it takes a config.json")
    if a["out"] and os.path.exists(a["out"]) and (not os.path.isdir(a["out"]) or os.listdir(a["out"])):
        raise Refused(f"--out {a['out']} exists and is not empty: choose another, or go on with it: --resume {a['out']}")
    return SimpleNamespace(**a)


def settle_again(given, saved):
    """All arguments of a run that goes on: those that it began with. Raises Refused for one that would change its losses."""
    a = dict.fromkeys(UNSET) | COMMON | saved["arguments"]
    for k in given.keys() - free(a["adapter"]):
        if given[k] != a[k]:
            why = f"would change the run, which began with {a[k]}"
            raise Refused(f"{flag(k)} {given[k]} {why}: leave it out, or start a new run from the checkpoint with --model")
    if saved["step"] >= a["steps"]:
        raise Refused(f"the run in {saved['out']} is complete: train further with --model {saved['folder']}")
    # a run may be older than this list
    a["stages"] = [curriculum.Stage(*stage) for stage in a["stages"] or curriculum.stages(a)]
    return SimpleNamespace(**{**a, **given})


def free(adapter):
    """FREE, but for what moves the losses of this adapter: with dropout each tile of an MLP drops entries by its own count."""
    return FREE - {"mlp_tile"} if getattr(plugins.parse("adapters", adapter).options, "dropout", 0) else FREE


def flag(name):
    return "--" + name.replace("_", "-")


def config_of(a, source):
    """The Config to train, with the position scheme that the run ends with; a.stages get theirs. The mechanisms are put together here,
    without weights, so that what does not fit is refused early."""
    config = llama.read_config(source)
    if a.init:
        try:
            config = llama.Config.from_hf({"vocab_size": config.vocab_size, **json.loads(Path(a.init).read_text())})
        except (json.JSONDecodeError, TypeError, KeyError) as no:
            raise Refused(f"--init {a.init} is no config.json: {no}") from None
    config = with_mechanisms(config, a)
    if a.segment == "auto":
        a.segment, a.checkpoint = plan.segment(a, look(config), ops.free_memory())
        print(f"--segment auto: {a.segment} tokens" + ", recomputed too: not even 1024 fit without" * bool(a.checkpoint))
    config = llama.dataclasses.replace(config, segment=a.segment or config.segment)
    pos = lambda stage: stage.pos or curriculum.stretched(a.pos or config.pos, stage.length, config)
    a.stages = [stage._replace(pos=pos(stage)) for stage in a.stages]
    for stage in a.stages:
        config = llama.dataclasses.replace(config, pos=stage.pos)
        with ops.shapes_only():
            model = llama.Llama(config)
        model.group_heads(a.head_groups)
    if not a.segment and getattr(model.adapter.module, "NEEDS_SEGMENTS", False):
        raise Refused(f"--adapter {model.adapter} trains what carries the past from segment to segment: give --segment too")
    if a.segment:
        a.bptt = reach(model, a)
        for line in cli.lost(model):
            print(line, file=sys.stderr)
    return config


def with_mechanisms(config, a):
    return llama.dataclasses.replace(config, **{k: getattr(a, k) for k in ("attn", "memory", "adapter", "base_bits") if getattr(a, k)})


def look(config):
    """The function that gives the memory plan of arguments, for a model of this Config."""

    @functools.cache
    def sized(**given):
        with ops.shapes_only():
            return sizes_of(llama.Llama(llama.dataclasses.replace(config, **given)))

    def of(a):
        m = sized(**{k: getattr(a, k) for k in ("memory", "adapter", "base_bits") if getattr(a, k, None)})
        return max((plan.plan(m, stage.of(a), runs_how(a)) for stage in a.stages), key=lambda p: p.peak)

    return of


def sizes_of(model):
    """The model as plan.py wants it; it may be one of shapes alone."""
    named, observers = ops.parameters(model), tuple(model.observers())
    trains = frozenset(n for n in named if model.trains(n) and not n.startswith(observers))
    slots = [memory.size for memory in model.memories()]
    stay = [memory.always if memory.slides else None for memory in model.memories()]
    whole = [functools.partial(meets_all, block.self_attn.asked, block.self_attn.H) for block in model.model.layers]
    return plan.Model(model.config, {n: tuple(p.shape) for n, p in named.items()}, trains, slots, stay, whole)


def meets_all(rule, H, T, N):
    """Does attention of the last T of N tokens under a rule take all keys at once, under a mask if need be?"""
    # what has an attention of its own decides for itself, and of the very longest rows the blocks are not worth counting
    known = all(hasattr(leaf.module, "allowed") for leaf in rule.leaves()) and T * N < 1 << 38
    if ops.BACKEND == "torch" or rule.name == "full" or not known:
        return rule.name == "full"
    at = kernels.Places(None, N - T), kernels.Places(None, 0)
    return kernels.causal(*at, T, N, rule, None) or not kernels.sparse((1, H, T, 1), N, *at, rule, None, 0, 0)


def runs_how(a):
    act = 4 if llama.as_dtype(a.dtype) == ops.float32 else 2
    return plan.How(act, ops.on_gpu(), ops.BACKEND == "mlx", frozen.TRITON and ops.on_gpu())


def check_memory(a, config):
    """What a step will take, as a line. Raises Refused, naming what would fit, if the device has less."""
    planned, room, found = look(config), ops.free_memory(), look(config)(a)
    line = f"memory: {found.line()}" + (f", {room / 2**30:.1f} GiB free" if room else "")
    if a.memory_plan:
        print(found.table())
        print(line)
    if room is None or found.peak <= room:
        return line
    a = SimpleNamespace(**{**vars(a), "bounded": bounded(config), "groups": groupable(config)})
    # a run that goes on stays the run that it is
    resumed = getattr(a, "resume", None)
    would = plan.advice(a, planned, room, free(a.adapter) if resumed else None)
    none = "no flag of train.py makes it fit: take a smaller model or shorter rows"
    if resumed:
        none = "no flag that a resumed run may change makes it fit: free some memory, or start a new run from its checkpoint with --model"
    how = f"{would} would fit" if would else none
    raise Refused(f"a step would take {found.peak / 2**30:.1f} GiB, and the device has {room / 2**30:.1f} free: {how}")


def groupable(config):
    """The least --head-groups above 1 that this model can be trained with; 1: none."""
    n = next((n for n in range(2, config.num_key_value_heads + 1) if config.num_key_value_heads % n == 0), 1)
    try:
        with ops.shapes_only():
            llama.Llama(config).group_heads(n)
    except Refused:
        return 1
    return n


def bounded(config):
    """The --memory that holds all that later segments may see, where --attn is a pattern of bounded reach; else None."""
    rule = plugins.parse("attention", config.attn) if "/" not in config.attn else None
    if rule and rule.name == "window":
        return f"window:budget={rule.options.window - 1}"
    if rule and rule.name == "longformer" and not rule.options.own_projections:
        n = rule.options.n_global
        return f"sinks:budget={n + rule.options.window},sinks={n},kv_positions=absolute"


def reach(model, a):
    """--bptt for this model: as asked for, or as far as its memories let gradients flow. Raises Refused for what cannot be."""
    c, memories = model.config, model.memories()
    if any(plugins.is_share(memory.given) for memory in memories):
        raise Refused(f"--memory {c.memory} is a share of a text, and training reads rows of many: give its budget in tokens")
    if any(memory.whole_rows for memory in memories):
        raise Refused(f"--attn {c.attn} chooses among the tokens of a whole row: train without --segment, or give it assign=argmax")
    if not all(memory.cuts for memory in memories):
        return "all" if a.bptt is None else a.bptt
    if a.bptt:
        raise Refused(f"--memory {c.memory} stops the gradient itself, and --bptt {a.bptt} would have nothing to pass on: leave it out")
    return 0


def build(a, config, source, fresh):
    """(model, tokenizer), ready to train. Distance is felt as the config says."""
    if fresh and a.init:
        with ops.shapes_only():
            model = llama.Llama(config)
        model, tokenizer = model.init(a.seed), llama.tokenizers.load(source)
    else:
        ops.use(a.device)
        frozen_as = llama.as_dtype(a.dtype)
        model, tokenizer = llama.load(source, a.attn, config.pos, a.memory, a.adapter, "float32", a.device, a.base_bits, frozen_as)
    if tokenizer.vocab_size > config.vocab_size:
        raise Refused(f"the tokenizer has {tokenizer.vocab_size} tokens, but the config's vocab_size is {config.vocab_size}")
    model.config = llama.dataclasses.replace(model.config, segment=config.segment)
    return prepare(model, a), tokenizer


def prepare(model, a):
    """The model, ready to train: what trains as it is, in float32, what is frozen in the dtype of the activations."""
    model.dtype, model.chunk, model.model.together = llama.as_dtype(a.dtype), a.loss_chunk, int(a.checkpoint) or 1
    model.model.run = (ops.checkpoint_offloaded if a.checkpoint_offload else ops.checkpoint) if a.checkpoint else ops.call
    for block in model.model.layers:
        block.tile = a.mlp_tile
    model.group_heads(a.head_groups)
    named, observers = ops.parameters(model), tuple(model.observers())
    observed = {n for n in named if n.startswith(observers)}
    still = {n: p for n, p in named.items() if n not in observed and not model.trains(n)}
    ops.set_parameters(model, {n: ops.cast(p, model.dtype) for n, p in still.items()})
    ops.freeze(model, still.keys() | observed)
    model.model.patterns(training=True)
    settle = frozen.use(model)
    if a.embedding_offload:
        frozen.send_away(model)
    if replays(model, a):
        model.replays = replayed.Replays(model, a.segment * a.micro, settle)
    # read now: a checkpoint that is read lazily may be pruned before its first use
    ops.wait(ops.parameters(model))
    return model


def replays(model, a):
    """Are segments so short that a GPU would wait for its host, and can they be asked for at once?"""
    block = sum(math.prod(p.shape) for n, p in ops.parameters(model).items() if ".layers.0." in n)
    return ops.BACKEND == "torch" and ops.on_gpu() and plan.short(a, block)


def corpora(a, tokenizer):
    """The training corpus, the held-out one, and how often an epoch draws each document of the first (None: once)."""
    sources = data.expand(a.data) if a.data else data.default_corpus()
    train, valid = (sources, a.valid) if a.valid else data.split(sources)
    corpus, held_out = (data.Corpus.build(paths, tokenizer, CACHE) for paths in (train, valid))
    if a.upsample == 1:
        return corpus, held_out, None
    # each argument of --data keeps its share of the tokens
    part = {source: i for i, path in enumerate(a.data or ()) for source in data.expand(path)}
    of = np.array([part.get(source, 0) for source in train])
    return corpus, held_out, corpus.draws(a.length, a.upsample, of[corpus.origin])


def nats(model, batch):
    """The summed loss of a batch's target tokens, in nats."""
    batch = segments.inputs(batch)
    return model(batch.tokens, begin=batch.begin, targets=batch.targets).sum()


def loss_and_seen(model, batch, total):
    """(the batch's share of the loss over `total` tokens, what each of the model's observers saw...)"""
    seen = []
    # of a layer's state nobody wants more, and all layers' would be as much as their inputs
    left = lambda s: {k: x for k, x in s.items() if k == "seen"}

    def watched(tokens, **how):
        start = model.start(read=tokens.shape[1])
        if model.around is None:
            start["layers"] = [{**s, "then": left} for s in start["layers"]]
        losses, state = model(tokens, start, close=False, **how)
        seen.extend(s["seen"] for s in state["layers"] if "seen" in s)
        return losses

    return nats(watched, batch) / total, *seen


def train_step(model, optimizer, batch, micro, clip, lr, segment=None, bptt="all", offload=False, least=None):
    """One step over the rows of a batch, `micro` at a time, whole or in segments (see segments.py), those of random lengths from `least`
    on if that is given. Returns (loss in nats a token, gradient norm before clipping, target tokens). Where loss or norm is not finite
    nothing has changed."""
    # of the whole step: a mean of means would weigh a token by how its part was filled
    total = max(1, int((batch.targets >= 0).sum()))
    parts, grads = [], {}
    for i in range(0, len(batch.tokens), micro):
        part = data.Batch(*(x[i : i + micro] for x in batch))
        # the same in a run that was resumed, and however often this part is computed
        seed = zlib.crc32(part.tokens.tobytes())
        model.shake(seed)
        if segment:
            for row in segments.documents(part, segment):
                out, grads = segments.accumulate(model, segments.cut(row, segment, least, seed), nats, grads, bptt, offload, total)
                parts += out
        else:
            out, grads = ops.accumulate(model, lambda part=part: loss_and_seen(model, part, total), grads)
            parts.append(out)
    model.shake(None)
    losses, *seen = zip(*parts)
    norm, loss = ops.global_norm(grads).item(), sum(x.item() for x in losses)
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step(ops.scaled(grads, clip / norm) if norm > clip else grads, lr)
        model.learn(sum(x) for x in seen)
    return loss, norm, total


def lr_at(step, a):
    """Linear from 0 to lr over the warm-up, then a cosine that reaches min_lr at the last step. Steps count from 1."""
    if step <= a.warmup:
        return a.lr * step / a.warmup
    done = (step - a.warmup) / (a.steps - a.warmup)
    return a.min_lr + (a.lr - a.min_lr) * (1 + math.cos(math.pi * done)) / 2


def evaluate(model, corpus, a):
    """Loss in nats a token over the first rows of the held-out corpus, read as in training."""
    lost, tokens = 0.0, 0
    model.model.patterns(training=False)
    with ops.no_grad():
        rows = data.Batches(corpus, a.micro, a.length, shuffle=False).one_epoch(a.valid_rows)
        for batch in tqdm(rows, "validation", -(-a.valid_rows // a.micro), leave=False, dynamic_ncols=True):
            if a.segment:
                parted = segments.documents(batch, a.segment)
                lost += sum(segments.total(model, segments.cut(row, a.segment), nats) for row in parted)
            else:
                lost += nats(model, batch).item()
            tokens += int((batch.targets >= 0).sum())
    model.model.patterns(training=True)
    return lost / max(1, tokens)


def train(a, saved):
    """A new run, or the rest of one. Returns the exit code."""
    fresh = not (saved and saved["folder"])
    source = cli.model_folder(a) if fresh else saved["folder"]
    config = config_of(a, source)
    takes = check_memory(a, config)
    if a.memory_plan:
        return 0
    remarks(a, config)
    ops.seed(a.seed)
    state = {"step": 0, "tokens": 0} if fresh else {k: saved[k] for k in ("step", "tokens")}
    stage = curriculum.at(a.stages, state["step"] + 1)
    model, tokenizer = build(a, llama.dataclasses.replace(config, pos=stage.pos), source, fresh)
    corpus, held_out, draws = corpora(a, tokenizer)
    batches = data.Batches(corpus, stage.batch, stage.length, a.seed, draws=draws)
    optimizer = ops.AdamW(model, (0.9, 0.95), 1e-8, a.weight_decay, a.optimizer_offload)
    state |= {"tokenizer": tokenizer.fingerprint, "arguments": vars(a)}
    if not fresh:
        if saved["tokenizer"] != tokenizer.fingerprint:
            raise Refused(f"the tokenizer in {source} is not the one that the run began with: put its files back")
        restore(optimizer, source / "optimizer.safetensors")
        batches.restore(saved["data"])
    out = saved["out"] if saved else new_out(a, source)
    rundir.tidy(out)
    if not saved:
        rundir.replace(out / "trainer.json", json.dumps(state, indent=2) + "\n")
    metrics = rundir.Metrics(out, state["step"])
    if not metrics.series("valid_loss"):
        metrics.add(step=0, length=stage.length, valid_loss=evaluate(model, held_out, stage.of(a)))
    start = f"validation loss {metrics.series('valid_loss')[-1][1]:.4f} at step {state['step']} of {a.steps}"
    print(f"{out}: {sizes(model)}; {corpus.report()}; {start}")
    print(takes)
    fitness(corpus, a, draws)

    leave = listen()
    with tqdm(total=a.steps, initial=state["step"], unit="step", dynamic_ncols=True) as bar:
        for step in range(state["step"] + 1, a.steps + 1):
            if step > stage.last:
                stage = curriculum.at(a.stages, step)
                batches.batch, batches.length = stage.batch, stage.length
                model.feel(stage.pos)
                tqdm.write(str(stage))
            start, lr, batch = time.perf_counter(), lr_at(step, a) * stage.warmth(step, a.rewarm), batches.next()
            loss, norm, n = train_step(model, optimizer, batch, stage.micro, a.clip, lr, a.segment, a.bptt, a.offload, a.segment_least)
            seconds, last, ends = time.perf_counter() - start, step == a.steps, step == stage.last
            if not (math.isfinite(loss) and math.isfinite(norm)):
                texts = ", ".join(sorted({name for row in batch.names for name in row}))
                raise rundir.Stop(f"step {step}: loss {loss}, gradient norm {norm}, on a batch of {texts}{rundir.last_good(out)}")
            state |= {"step": step, "tokens": state["tokens"] + n, "data": batches.state()}
            speed, peak = {"tokens_per_second": n / seconds, "seconds": seconds}, peak_memory()
            line = {"step": step, "length": stage.length}
            metrics.add(**line, tokens=state["tokens"], loss=loss, lr=lr, grad_norm=norm, **speed, peak_memory=peak)
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}, {n / seconds:.0f} tokens/s, peak {peak / 2**30:.1f} GiB")
            if ends or step % a.eval_every == 0:
                metrics.add(**line, valid_loss=evaluate(model, held_out, stage.of(a)))
                tqdm.write(f"step {step}: validation loss {metrics.lines[-1]['valid_loss']:.4f}")
                if not math.isfinite(metrics.lines[-1]["valid_loss"]):
                    raise rundir.Stop(f"step {step}: the validation loss is not finite any more{rundir.last_good(out)}")
            stop = leave()
            if ends or stop or step % a.save_every == 0:
                # the tokenizer's files come from the checkpoint before: the one that was resumed may be gone by now
                source = rundir.save(out, state, a.keep, lambda folder, source=source: write(model, optimizer, folder, source))
            if stop:
                break
    if not last:
        print(f"stopped after step {step}, and saved; go on with: python train.py --resume {out}")
        return 130
    metrics.plot()
    (_, before), *_, (_, after) = metrics.series("valid_loss")
    lengths = f" (rows of {a.stages[0].length:,}, then of {stage.length:,})" if a.curriculum else ""
    print(f"validation loss {before:.4f} -> {after:.4f}{lengths} in {a.steps} steps; the checkpoint is {source}")
    print(f"use it: python generate.py --model {source}")
    return 0


def sizes(model):
    """How many parameters train."""
    held = coded.held(model)
    count = {n: math.prod(p.shape) for n, p in {**ops.parameters(model), **held}.items()}
    mine, total = sum(k for n, k in count.items() if model.trains(n)), sum(count.values())
    said = f"--adapter {model.adapter} trains {mine:,} of {total:,} parameters ({100 * mine / total:.3g}%)"
    if not held:
        return said
    many, size = sum(count[n] for n in held), sum(w.nbytes() for w in held.values())
    return f"{said}, and {many:,} others are held in {8 * size / many:.3g} bits each, {size / 2**30:.2f} GiB"


def write(model, optimizer, folder, source):
    llama.write(model, folder, source)
    random = {f"random.{k}": x for k, x in ops.random_state().items()}
    ops.write_safetensors(folder / "optimizer.safetensors", {**optimizer.state(), **random})


def restore(optimizer, path):
    arrays = llama.read(path, optimizer.offload)
    ops.wait(arrays)
    optimizer.restore(arrays)
    ops.restore_random({k.removeprefix("random."): x for k, x in arrays.items() if k.startswith("random.")})


def new_out(a, source):
    """The folder of a new run: --out, or a name that says what the run is and that is not taken."""
    adapter = a.adapter if a.adapter != "full" else None
    what = [Path(a.init).stem if a.init else source.name, a.attn, a.pos, a.memory, adapter]
    name = re.sub(r"[^\w.]+", "-", "-".join(filter(None, what)))
    names = (Path("out") / (f"{name}-{n}" if n > 1 else name) for n in range(1, 1 << 20))
    out = Path(a.out) if a.out else next(p for p in names if not p.exists())
    out.mkdir(parents=True, exist_ok=True)
    return out


def fitness(corpus, a, draws):
    """Say how long the documents are, and whether that is enough for rows of --length."""
    line, share = corpus.fitness(a.length, draws)
    print(line)
    if share < 0.5:
        short = f"only {share:.0%} of the tokens have {a.length // 2:,} tokens of their document before them, half of --length {a.length}"
        print(
            f"warning: {short}; below 50% a model seldom sees such distances: longer texts, --upsample or a shorter --length",
            file=sys.stderr,
        )
    if a.upsample > 1 and not (np.diff(corpus.offsets) >= a.length).any():
        print(f"note: no document has {a.length} tokens, so --upsample changes nothing", file=sys.stderr)


def remarks(a, config):
    """What is allowed and yet may surprise."""
    if a.length > config.max_position_embeddings and curriculum.AUTO not in (a.pos or ""):
        made = f"the model was made for {config.max_position_embeddings} tokens"
        print(f"note: --length is {a.length} and {made}: a stretched --pos (pi:factor=2) may train better", file=sys.stderr)
    if config.memory != "full" and not a.segment:
        print("note: without --segment, training reads whole rows; --memory is noted in the checkpoint, for generation", file=sys.stderr)


def listen():
    """From now on Ctrl-C asks to leave after the step, and a second one leaves at once. Returns the question: was it asked?"""
    asked = []

    def ask(number, frame):
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tqdm.write("finishing the step, then saving; Ctrl-C again leaves at once", file=sys.stderr)

    signal.signal(signal.SIGINT, ask)
    return lambda: bool(asked)


def peak_memory():
    """Bytes at the peak so far: the device's, or this process's where the device does not count."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return ops.peak_memory() or resident * (1 if sys.platform == "darwin" else 1024)


def main(argv=None):
    given = parse(argv)
    saved = rundir.find(given["resume"]) if "resume" in given else None
    use_backend(given.get("backend") or (saved and saved["arguments"]["backend"]))
    try:
        return train(settle_again(given, saved) if saved else settle(given), saved)
    except rundir.Stop as why:
        print(f"train.py: {why}", file=sys.stderr)
    except OSError as why:
        if why.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"train.py: the disk is full ({why}): free some space, then go on with --resume", file=sys.stderr)
    return 1


if __name__ == "__main__":
    errors.main(main)
