"""A length curriculum (`--curriculum`): rows of one length for a while, then of another, with as many tokens a step throughout.

    4k,8k,32k                  equal shares of --steps
    4k:50%,8k:25%,32k:25%      shares of --steps
    4k:100,8k:50,32k:50        steps, --steps being their sum
    4k:100mt,8k:50mt,32k:50mt  tokens read (m: 2^20), rounded up to whole steps

--length, --batch and --micro are the last stage's: rows of a quarter of its length come four times as many. The order of the documents,
AdamW's averages and the learning rate's one cosine over all steps go on from stage to stage as if nothing had changed; --rewarm N raises
the rate linearly from 0 to that cosine over the first N steps of each stage but the first. Each stage ends with a validation, of the same
held-out tokens in rows of the stage's length, and with a checkpoint.

`factor=auto` in --pos is the stage's length over the model's own (its max_position_embeddings before any scaling), and never below 1.
"""

import dataclasses
import math
import re
from types import SimpleNamespace
from typing import NamedTuple

import plugins
from errors import Refused

AUTO = "factor=auto"


class Stage(NamedTuple):
    length: int  # tokens a row
    batch: int  # rows a step
    micro: int  # rows at a time
    first: int  # its steps, counted from 1
    last: int
    pos: str | None = None  # the spelling of --pos, without auto; None: not settled yet

    def of(self, a):
        """A run's arguments as they are in this stage."""
        mine = {"length": self.length, "batch": self.batch, "micro": self.micro, "valid_rows": -(-a.valid_rows * a.length // self.length)}
        return SimpleNamespace(**{**vars(a), **mine})

    def warmth(self, step, rewarm):
        """What multiplies the learning rate at a step of this stage."""
        return 1.0 if self.first == 1 or not rewarm else min(1.0, (step - self.first + 1) / rewarm)

    def __str__(self):
        return f"steps {self.first} to {self.last}: {self.batch} rows of {self.length:,}, --pos {self.pos}"


def stages(a):
    """The Stages of a run of these arguments, a dict. Raises Refused."""
    if a["curriculum"]:
        return plan(a["curriculum"], a["batch"], a["micro"], a["steps"])
    return [Stage(a["length"], a["batch"], a["micro"], 1, a["steps"])]


def plan(text, batch, micro, steps):
    """The Stages of a spelling. batch, micro: rows of the last stage's length; steps: all, for shares of them."""
    said = [re.fullmatch(r"(\d+[km]?)(?::(\d+(?:\.\d+)?%|\d+[km]?t?))?", part.strip().lower()) for part in text.split(",")]
    if not all(said):
        raise Refused(
            f"--curriculum {text} is not understood: write lengths, as in 4k,8k,32k, or 4k:100,32k:50 with steps (50%, 10mt: tokens)"
        )
    lengths, amounts = [plugins.number(m[1]) for m in said], [m[2] for m in said]
    kinds = {a and ("%t".find(a[-1])) for a in amounts}
    if len(kinds) > 1:
        raise Refused(f"--curriculum {text} mixes spellings: give every stage its steps, its tokens (10mt), its share (50%), or none any")
    if min(lengths) < 1:
        raise Refused(f"--curriculum {text} has a stage of rows of no tokens: lengths must be above 0")
    tokens = batch * lengths[-1]
    for n in lengths:
        if tokens % n:
            what = f"{batch} rows of {lengths[-1]} tokens are no whole number of rows of {n}"
            raise Refused(f"--curriculum {text}: {what}: choose lengths that divide {tokens}, or another --batch")
    ends = last_steps(text, amounts, tokens, steps)
    firsts = [1, *(end + 1 for end in ends)]
    if any(first > end for first, end in zip(firsts, ends)):
        raise Refused(f"--curriculum {text} leaves a stage of {steps} steps without any: give more --steps, or each stage its own")
    rows = [tokens // n for n in lengths]
    # rows at a time too are as many tokens as in the last stage, if that divides the rows
    most = [max(1, micro * lengths[-1] // n) for n in lengths]
    parts = [max((m for m in range(1, most + 1) if n % m == 0), default=1) for n, most in zip(rows, most)]
    return [Stage(*stage) for stage in zip(lengths, rows, parts, firsts, ends)]


def last_steps(text, amounts, tokens, steps):
    """The last step of each stage."""
    if amounts[0] is None:
        return [round(steps * (i + 1) / len(amounts)) for i in range(len(amounts))]
    if amounts[0].endswith("%"):
        shares = [float(a[:-1]) for a in amounts]
        if abs(sum(shares) - 100) > 0.01:
            raise Refused(f"--curriculum {text}: the shares make {sum(shares):g}%, and should make 100%")
        return [round(steps * sum(shares[: i + 1]) / 100) for i in range(len(shares))]
    counts = [math.ceil(plugins.number(a[:-1]) / max(tokens, 1)) if a.endswith("t") else plugins.number(a) for a in amounts]
    return [sum(counts[: i + 1]) for i in range(len(counts))]


def at(stages, step):
    """The Stage that a step is in."""
    return next(stage for stage in stages if step <= stage.last)


def settled(pos):
    """The spelling of --pos with any number in the place of auto: is it one?"""
    return pos and pos.replace(AUTO, "factor=1")


def stretched(pos, length, c):
    """The spelling of --pos for rows of this length of a model of Config c, with numbers in the place of auto."""
    return "/".join(stretch(part, length, c) if AUTO in part else part for part in pos.split("/"))


def stretch(part, length, c):
    plugin, L = plugins.parse("positions", settled(part)), c.original_length
    o = dataclasses.replace(plugin.options, factor=max(1.0, length / L))
    if c.max_position_embeddings != L and getattr(o, "original", None) == 0:
        # the scheme would take the stretched length for the one before
        o = dataclasses.replace(o, original=L)
    return str(plugin._replace(options=o))
