"""The memory alone: what works a recurrent memory trains (its gates, vectors and mixes: of tokens.py the vectors of Bulatov et al. 2022,
arXiv:2207.06881), and the base stays as it is.

Memories begin with their gates closed (memory/_beside.py), so step 0 is the base reading each segment by itself, and without the memory's
file beside it the base is always what it was. rank=8 puts LoRA (lora.py) on top, for a base that is to learn to be read so.
"""

import ops
import plugins

lora = plugins.load("adapters", "lora")
initial, shake = lora.initial, lora.shake
LR = 1e-3
# what trains is used behind a segment's end only
NEEDS_SEGMENTS = True


class Options(lora.Options):
    rank: int = 0  # of the LoRA; 0: none


def check(o):
    if o.rank:
        lora.check(o)


def apply(model, o):
    c = model.config
    plugged = plugins.tile("memory", c.memory, c.num_hidden_layers)
    if not any(hasattr(p.module, "Around") or ops.parameters(p.module.Memory(c, p.options)) for p in plugged):
        have = "tokens, state, melodi, infini or compressive"
        raise ValueError(f"--memory {c.memory} has no parameters of its own, and the base is not to change: choose {have}")
    if o.rank:
        lora.apply(model, o)


def trains(name, o):
    return lora.trains(name, o)
