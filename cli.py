"""What the scripts share on the command line: the flags of the four folders, the backend, whole numbers with a suffix."""

import argparse
import os
import sys
from pathlib import Path

import plugins
import rundir
from errors import Refused


class Parser(argparse.ArgumentParser):
    """argparse, saying no as the rest of nanolong does."""

    def __init__(self, **kw):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kw)

    def error(self, message):
        raise Refused(f"{message} (--help lists the flags)")


def whole(text):
    """argparse type: a whole number, 4k meaning 4096."""
    try:
        return plugins.number(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number (4096, or 4k)") from None


def add_model_flags(parser):
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="FOLDER", help="checkpoint folder (default: SmolLM2-135M-Instruct, fetched on first use)")
    add("--attn", metavar="SPEC", help=f"who may see whom: {', '.join(plugins.names('attention'))}")
    add("--pos", metavar="SPEC", help=f"how distance is felt: {', '.join(plugins.names('positions'))}")
    add("--memory", metavar="SPEC", help=f"what is kept of the past: {', '.join(plugins.names('memory'))}")
    add("--adapter", metavar="SPEC", help=f"what trains: {', '.join(plugins.names('adapters'))}")
    add("--base-bits", type=int, choices=[4, 8, 16], help="of the linears under an adapter (default: the checkpoint's, else 16)")
    add("--backend", choices=["torch", "mlx"], help="default: mlx on a Mac, else torch, else whichever is installed")
    add("--device", help="cpu, cuda, mps, gpu (default: the best there is)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="of the activations (default: bfloat16 on a GPU, float32 on a CPU)")


def use_backend(name):
    """Choose the backend (None: the environment, or the best there is) before anything imports it; returns ops."""
    if name:
        os.environ["NANOLONG_BACKEND"] = name
    import ops

    if name and name != ops.BACKEND:
        raise Refused(f"--backend {name} comes too late: {ops.BACKEND} is in use already")
    return ops


def check_spelling(attn=None, pos=None, memory=None, adapter=None):
    """Refuse a wrong spelling of a mechanism before anything loads."""
    for folder, spec in zip(plugins.FOLDERS, (attn, pos, memory, adapter)):
        for part in plugins.layers(folder, spec) if spec is not None else ():
            plugins.parse(folder, part)


def model_folder(args):
    """The checkpoint folder that --model names; without it the default model, fetched on first use."""
    if args.model:
        return Path(args.model)
    from convert import default_model

    return default_model()


def load(args):
    """The model and tokenizer that the flags ask for."""
    from model import load

    model, tokenizer = load(model_folder(args), args.attn, args.pos, args.memory, args.adapter, args.dtype, args.device, args.base_bits)
    for line in lost(model):
        say(line)
    return model, tokenizer


def lost(model):
    """Notes on memories that forget what the attention pattern of their layer would still see, each combination once."""
    import numpy as np

    from kernels.spans import is_causal, reach

    c, n, found = model.config, 1 << 17, {}
    asked = plugins.tile("memory", c.memory, c.num_hidden_layers, n_head=c.num_attention_heads, n_kv_head=c.num_key_value_heads)
    for block, memory in zip(model.model.layers, asked):
        rule, mine = block.self_attn.rule, block.self_attn.memory
        which = str(rule), str(memory)
        if which in found or not mine.forgets or plugins.is_share(mine.given) or not hasattr(rule.module, "allowed") or is_causal(rule, n):
            continue
        needed, stays = reach(rule, n, np.arange(n)), mine.stays(n)
        if (needed & ~stays).any() if stays is not None else needed.sum() > mine.size:
            first = ", the text's first ones among them" if needed[0] else ""
            far = needed[n // 4 : n // 2].any()
            what = "tokens however far back" if far else f"{needed.sum()} of the past{first}"
            found[which] = f"note: --attn {rule} may see {what}, and --memory {memory} forgets some of them: they are not seen again"
    return list(found.values())


def say(text):
    """A remark for the person at the terminal; standard output is for results."""
    print(text, file=sys.stderr, flush=True)


def write(path, fill):
    """A file written by fill(a path beside it): there whole or not at all. Raises Refused."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        fill(partial)
        rundir.sync(partial)
        os.replace(partial, path)
    except OSError as no:
        raise Refused(f"{path} could not be written: {no.strerror or no}") from None
    finally:
        partial.unlink(missing_ok=True)
