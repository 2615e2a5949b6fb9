"""How much memory a step of training will take, by counting arrays, before anything is loaded.

    weights       what trains 4 bytes a parameter, what is frozen as wide as an activation
    gradients     4 bytes for what trains, growing through the backward pass as activations go
    optimizer     AdamW's two averages, 8 bytes for what trains; with --optimizer-offload one parameter's at a time
    activations   what the blocks keep for the backward pass (kept() counts it), or with --checkpoint every n-th block's input
    block         a block at work beside that: blocks that are recomputed, and the gradients inside one
    loss          logits of a chunk, three times in float32: their softmax, and two gradients; once as they are where nothing of it trains
    boundaries    with --segment: the state at work, the gradients handed through it, and what waits of the others

The peak is the largest of a few moments: the loss, the last block's backward pass, the first one's (all gradients are there, and before,
where some are recomputed together, its group's), and the optimizer's step. A state is counted as the keys and values of its slots.

Pure Python, no framework: sizes come from the config and from a model without weights. bench/plan.py measures how near this comes.
"""

import math
from typing import Any, NamedTuple

GIB = 2**30


class Model(NamedTuple):
    """A model by its sizes. c: Config; shapes: name -> shape; trains: the names that take gradients; slots: how many tokens the memory of
    each layer keeps at a boundary, None being all; stay: how many of these are there for good, while the newest come and go, None where
    any may go; whole: for each layer, whether attention of so many queries over so many keys meets all of these at once."""

    c: Any
    shapes: dict
    trains: frozenset
    slots: list
    stay: list
    whole: list

    def size(self, *within, trained=None):
        """Numbers in the parameters whose names hold one of these parts."""
        named = (n for n in self.shapes if trained is None or (n in self.trains) == trained)
        return sum(math.prod(self.shapes[n]) for n in named if any(part in n for part in within))

    def reads(self, *linears):
        """Does what these linears read serve a gradient of theirs?"""
        return any(f".{name}." in n for n in self.trains for name in linears)

    def scaled(self, *linears):
        """Of these linears of a block, what a token gets out of those that DoRA scales, which is kept beside that."""
        return sum(self.shapes.get(f"model.layers.0.{part}.{name}.{DORA}", (0,))[0] for part in PARTS for name in linears)


class How(NamedTuple):
    """What runs it. act: bytes of an activation; gpu: a device with its own memory; mlx: by MLX; fused: can kernels/frozen.py run?"""

    act: int
    gpu: bool = False
    mlx: bool = False
    fused: bool = False


class Plan(NamedTuple):
    """moments: name -> {part: bytes} on the device; host: {part: bytes} that wait in the host's memory."""

    moments: dict
    host: dict

    @property
    def worst(self):
        return max(self.moments, key=lambda m: sum(self.moments[m].values()))

    @property
    def peak(self):
        return sum(self.moments[self.worst].values())

    def line(self):
        host = f", {sum(self.host.values()) / GIB:.1f} GiB of the host's beside" if self.host else ""
        return f"{self.peak / GIB:.1f} GiB at the peak ({self.worst}){host}"

    def table(self):
        """Every moment and its parts in GiB, as text."""
        parts = list(dict.fromkeys(part for of in self.moments.values() for part in of))
        rows = [["GiB", *self.moments], *([part, *(cell(of.get(part)) for of in self.moments.values())] for part in parts)]
        rows += [["all", *(cell(sum(of.values())) for of in self.moments.values())]]
        lines = ["".join(f"{x:>14}" if i else f"{x:12}" for i, x in enumerate(row)) for row in rows]
        return "\n".join([*lines, *(f"{part:12}{cell(n):>14} in the host's memory" for part, n in self.host.items())])


def cell(n):
    return f"{n / GIB:.3f}" if n else "-"


def plan(m, a, how):
    """The Plan of a step of Model m with the arguments `a` of train.py."""
    c, act, L, C = m.c, how.act, m.c.num_hidden_layers, m.c.hidden_size
    N, S = a.length, a.segment or a.length
    T = a.micro * S  # tokens at work
    # kernels/frozen.py: its matrices are there, and its blocks work, where they take all tokens and heads at once
    stacked = how.fused and not m.size(DORA) and all(".lora_" in n or ".memory." in n for n in m.trains)
    fused = stacked and not a.mlp_tile and a.head_groups == 1
    mine, frozen = m.size("", trained=True), m.size("", trained=False)
    # MLX has one memory
    away = lambda flag: flag and how.gpu and not how.mlx

    # under --base-bits matrices are codes with a scale and a least number for each 64, and one layer's are there as numbers
    bits, matrices = getattr(c, "base_bits", 16), m.size("_proj.weight", trained=False)
    coded = matrices * (act - bits / 8 - 2 * act / 64) - act * matrices / L if bits < 16 else 0
    weights = 4 * mine + act * (frozen + (beside(m) if stacked else 0)) - int(coded)
    # of an embedding that is nothing else rows are read in the host's memory
    embedding = act * m.size("embed_tokens.", trained=False) * bool(away(a.embedding_offload) and m.size("lm_head."))
    weights -= embedding
    adam = max((8 * math.prod(m.shapes[n]) for n in m.trains), default=0) if away(a.optimizer_offload) else 8 * mine
    host = {"optimizer": 8 * mine if away(a.optimizer_offload) else 0, "embedding": embedding}
    resting = {"weights": weights, "optimizer": 0 if away(a.optimizer_offload) else adam, "kernels": KERNELS if how.gpu else 0}

    # a state holds keys and values; the one at work is there, and so is its gradient, which MLX multiplies in float32
    past = [min(N - S, N if n is None else n) if a.segment else 0 for n in m.slots]
    state = act * 2 * a.micro * c.num_key_value_heads * c.head_dim * sum(past)
    # segments of random lengths are more
    waiting = -(-N // ((S + (getattr(a, "segment_least", None) or S)) // 2)) - 1
    waiting = waiting if a.bptt in ("all", None) else min(a.bptt, waiting)
    # of one that waits those tokens that the next has not; the row is one document, or all wait whole
    gone = sum(n if always is None else min(n, always + S if bound else always) for n, always, bound in zip(past, m.stay, m.slots))
    wait = max(0, waiting - 1) * state * gone // max(1, sum(past))
    host["boundaries"] = wait if away(a.offload) else 0
    resting |= {"boundaries": state * bool(waiting) + (min(wait, state) if away(a.offload) else wait)}
    resting |= {"handed": ((act + 4) * state // act if how.mlx else state) if waiting else 0}

    # MLX has no fused backward pass: what is not sparse keeps its weights, and makes three arrays as large beside them
    # of a group these too are made once more
    H, whole = c.num_attention_heads // a.head_groups, a.head_groups == 1
    everything = [meets(S, S + n) for n, meets in zip(past, m.whole)]
    # the first segment has no past, and may be all that its pattern sees
    met = [max((S + n) * all_, S * meets(S, S)) for n, all_, meets in zip(past, everything, m.whole)]
    scores = [act * H * T * n * how.mlx for n in met]
    blocks = [kept(m, how, a, T, n * a.micro, fused) + s * whole for n, s in zip(past, scores)]
    x = act * C * T
    group = sum(sorted(blocks)[-a.checkpoint :]) - x if a.checkpoint else 0
    inputs = -(-L // a.checkpoint) * x if a.checkpoint else 0
    host["activations"] = inputs if a.checkpoint and away(a.checkpoint_offload) else 0
    # one input is there, and on its way the next
    activations = (2 * x if host["activations"] else inputs) if a.checkpoint else sum(blocks)
    waits = x if host["activations"] else 0
    attention = max(attending(m, how, a, T, n * a.micro, fused, all_) for n, all_ in zip(past, everything))
    attention += (3 if whole else 4) * max(scores)
    # for a scale a matrix is made in float32, and two on the way there
    matrix = 12 * max((math.prod(m.shapes.get(n.replace(DORA, "weight"), [0])) for n in m.shapes if DORA in n), default=0)
    # MLX asks for so much more before what was asked for first is done and gone
    ahead = AHEAD * act * min(T, (a.mlp_tile or T) * a.micro) * c.intermediate_size * how.mlx
    work = x + max(inside(m, how, a, T, fused) + ahead, attention, matrix)
    # the last one of a group that is recomputed; when the first one's turn has come, others have gone and left their gradients
    block, alone = group + work, (max(blocks) - x) * bool(a.checkpoint) + work
    left = 4 * max(0, a.checkpoint - 1) * m.size(".layers.0.", trained=True)

    head, n = ("lm_head." if m.size("lm_head.") else "embed_tokens."), min(T, a.loss_chunk)
    trained = m.size(head, trained=True)
    # with a second part of the step all gradients are there from the outset, else the embedding's comes last, behind the first block
    more = bool(a.batch > a.micro or waiting)
    gradients, first = 4 * mine, 4 * (mine if more else trained)
    late = 0 if more or head == "embed_tokens." else 4 * m.size("embed_tokens.", trained=True)
    loss = lost(m, how, n, x, trained, n < T) + 8 * n * c.vocab_size * how.mlx
    # what is replayed (kernels/replayed.py) has its place, and gradients of a state are there twice while they are handed on
    replayed = how.gpu and not how.mlx and short(a, m.size(".layers.0."))
    least = (x if a.checkpoint else blocks[0]) + state * bool(replayed and waiting)
    # and its stream has libraries' memory of its own
    resting["kernels"] += KERNELS * replayed
    moments = {
        "loss": {**resting, "gradients": 4 * (mine * more + trained * (n < T)), "activations": activations - waits, "loss": loss},
        "last block": {**resting, "gradients": first, "activations": activations, "block": block},
        "first group": {**resting, "gradients": gradients - late - left, "activations": least, "block": block},
        "first block": {**resting, "gradients": gradients - late, "activations": least, "block": alone},
        "optimizer": {**resting, "gradients": gradients, "optimizer": adam},
    }
    if a.checkpoint < 2 or more:
        # they are the same, or what the last block has is more
        del moments["first group"]
    return Plan(moments, {k: v for k, v in host.items() if v})


def short(a, block):
    """Are segments of the arguments `a` so short that a GPU would wait for its host, a block having so many numbers?"""
    return bool(a.segment) and a.segment * a.micro * block <= SHORT and not a.checkpoint_offload


SHORT = 4096 * 218 << 20  # tokens times numbers: a host of some ten microseconds a kernel is the slower one (8B shape, H100)
AHEAD = 10  # arrays as wide as the MLP: MLX lets so many pieces of work wait (measured on a CPU)
KERNELS = 1 << 26  # bytes that a GPU's libraries work in: 32 MiB for each of the two threads that multiply


def beside(m):
    """Numbers beside frozen matrices in which LoRA's ride, and of its A beside each other (kernels/frozen.py)."""
    total = 0
    for names in ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",):
        mine = [(n, s) for n, s in m.shapes.items() if any(f".{name}.weight" in n for name in names)]
        ranks = sum(s[0] for n, s in m.shapes.items() if any(f".0.{part}.{name}.lora_A" in n for part in PARTS for name in names))
        total += -(-ranks // 64) * 64 * (sum(s[0] for _, s in mine) + m.c.num_hidden_layers * mine[0][1][1])
    return total


PARTS, DORA = ("self_attn", "mlp"), "lora_magnitude_vector.weight"


def kept(m, how, a, T, past, fused):
    """Bytes that a block keeps for its backward pass, of T tokens that see `past` others too."""
    c, act = m.c, how.act
    C, H, HD, KD = c.hidden_size, c.num_attention_heads, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    ranks = sum(s[0] for n, s in m.shapes.items() if ".layers.0." in n and "lora_A" in n)
    # keys and values; logarithms of sums, and two norms' roots
    total = 2 * act * KD * (T + past) + 4 * T * (H + 2) + behind(m, how, a, T, fused)
    if fused:
        # input, queries and attention's answer
        return total + act * T * (C + 2 * HD + 64)
    numbers = C + ranks + m.scaled("q_proj", "k_proj", "v_proj")
    if a.head_groups > 1:
        # what each group begins with
        numbers += C
    else:
        # queries and attention's answer; what a product reads, and on a CPU attention's answer in another layout
        numbers += 2 * HD + C * m.reads("q_proj", "k_proj", "v_proj") + HD * (not how.gpu) * m.reads("o_proj")
    # a norm in steps keeps its quotient for its own weight
    numbers += C * (not how.gpu) * m.reads("input_layernorm")
    # weights as wide as activations are copies
    return total + act * T * numbers + (act * m.size(".layers.0.", trained=True) if act < 4 else 0)


def behind(m, how, a, T, fused):
    """Of kept() what is behind attention, and gone when that has its turn: the middle, and what the MLP keeps."""
    C, F = m.c.hidden_size, m.c.intermediate_size
    if fused:
        return how.act * T * (C + 2 * F + 3 * 64)
    numbers = C + m.scaled("o_proj")
    if not a.mlp_tile:
        # the gate's two sides, and silu of one; what products read, and what a norm in steps keeps
        numbers += 3 * F + C * m.reads("gate_proj", "up_proj") + F * m.reads("down_proj") + m.scaled("gate_proj", "up_proj", "down_proj")
        numbers += C * (not how.gpu) * m.reads("input_layernorm")
    return how.act * T * numbers


def inside(m, how, a, T, fused):
    """Bytes at work behind attention beside what is kept and the gradient of the block's output, at the worst moment."""
    act, tile = how.act, min(T, a.mlp_tile * a.micro) if a.mlp_tile else T
    C, F = m.c.hidden_size, m.c.intermediate_size
    if fused:
        # two gradients, or when it is made again the gate's answer and the output
        return act * T * (C + F + 64)
    if tile == T:
        # silu's gradient is no one kernel of MLX's
        return act * (5 if how.mlx else 2) * F * T
    # a tile with its gradients, beside gradients of others; or one that is made, beside others and what attention gave
    adapted = any(".gate_proj.lora_" in n for n in m.shapes)
    return act * (C * T + max(6 * F * tile, C * T + (3 + adapted) * F * tile))


def attending(m, how, a, T, past, fused, everything):
    """Bytes at work in attention's backward pass beside what is kept and the gradient of the block's middle, which is as large as that of
    its output; what is behind() is gone. everything: does the layer see all that there is?"""
    if how.mlx and a.head_groups == 1:
        return 0
    act, G, C, H, D = how.act, a.head_groups, m.c.hidden_size, m.c.num_attention_heads, m.c.head_dim
    K = m.c.num_key_value_heads
    # gradients of queries are summed in float32; the frameworks' own kernels give each query head keys of its own
    kernels = T * H * (4 * D + 8 + 2 * act * D * (everything and not past and K < H)) if how.gpu else 0
    if G == 1:
        # of the answer, of queries, of keys and values
        return act * D * (2 * H * T + 2 * K * (T + past)) + kernels - behind(m, how, a, T, fused)
    # three arrays of a sum as wide as the model, the middle not being there, and one more where LoRA's product is a part of it; or a
    # group's queries, its answer and their gradients; and gradients of keys and values
    sums = act * T * (2 + any(".o_proj.lora_" in n for n in m.shapes)) * C
    return max(sums, (act * T * 4 * H * D + kernels) // G) + act * T * 2 * K * D


def lost(m, how, n, x, trained, chunks):
    """Bytes of the loss of n tokens at a time, chunks: not all; x: bytes of the last block's output; trained: numbers of the head, if it
    trains."""
    act, V = how.act, m.c.vocab_size
    if how.fused and not trained and not m.size("model.norm.", trained=True):
        # logits become their gradient, and that their input's; or that times what the loss is divided by, out of place
        return max(2 * x + act * n * (V + m.c.hidden_size), 5 * x)
    # the softmax and two gradients, or the head's own gradient, which is made as wide as its copy
    copy = act * (act < 4)
    head = max(12 * n * V + copy * trained, act * n * V + (copy + act) * trained, (copy and copy + 4) * trained)
    return head + (3 if chunks else 2) * x


# ---------------------------------------------------------------- what would fit

SAVERS = {
    "--checkpoint": lambda a: {"checkpoint": a.checkpoint or 1},
    "--loss-chunk 512": lambda a: {"loss_chunk": min(a.loss_chunk, 512)},
    "--mlp-tile 1k": lambda a: {"mlp_tile": min(a.mlp_tile or 1024, 1024)},
    "--micro 1": lambda a: {"micro": 1, "stages": [stage._replace(micro=max(1, stage.micro // a.micro)) for stage in a.stages]},
    "--head-groups {groups}": lambda a: {"head_groups": a.groups} if a.groups > a.head_groups else {},
    "--segment 2k --memory {bounded}": lambda a: {"segment": 2048, "memory": a.bounded, "bptt": "all"} if can_segment(a) else {},
    "--offload": lambda a: {"offload": True} if a.segment else {},
    "--checkpoint-offload": lambda a: {"checkpoint_offload": True} if a.checkpoint else {},
    "--optimizer-offload": lambda a: {"optimizer_offload": True},
    "--embedding-offload": lambda a: {"embedding_offload": True},
    "--adapter lora": lambda a: {"adapter": "lora"} if a.adapter == "full" and not a.init else {},
    "--base-bits 4": lambda a: {"base_bits": 4} if getattr(a, "base_bits", 4) != 4 and a.adapter != "full" else {},
}


def can_segment(a):
    return a.bounded and not a.segment and not a.curriculum and a.length > 2048


def advice(a, look, room, only=None):
    """The flags with which a step fits into `room` bytes: one alone if one does, else the first ones together that do; None: none do.
    look(a): the Plan for these arguments. only: arguments that may change; None: any."""
    fits = lambda a: look(a).peak <= room
    changed = lambda a, more: type(a)(**{**vars(a), **more})
    may = lambda change: only is None or change(a).keys() <= only
    flags = {flag.format(**vars(a)): change for flag, change in SAVERS.items() if may(change)}
    for flag, change in flags.items():
        if change(a) and fits(changed(a, change(a))):
            return flag
    taken = []
    for flag, change in flags.items():
        b = changed(a, change(a))
        if look(b).peak < look(a).peak:
            taken, a = [*taken, flag], b
        if fits(a):
            return " ".join(taken)


def segment(a, look, room):
    """The longest segment, from 16k to 1k tokens, with which a step fits: a.segment and, if none does without, a.checkpoint."""
    lengths = [n << 10 for n in (16, 8, 4, 2, 1) if n << 10 < a.length and n << 10 <= min(stage.length for stage in a.stages)]
    for n, checkpoint in (*((n, a.checkpoint) for n in lengths), *((n, 1) for n in lengths[-1:])):
        b = type(a)(**{**vars(a), "segment": n, "checkpoint": checkpoint})
        if room is None or look(b).peak <= room:
            break
    return n, checkpoint
