"""The Llama, whole: config, attention, block, model, load and save.

Symbols: B rows, T tokens of this call, N slots that attention sees, H query heads, K key heads, D head width, C model width,
V vocabulary. Parameter and config names are Hugging Face's. The framework hides behind `ops`; who sees whom (attention/), how
distance is felt (positions/) and what is kept of the past (memory/) are mechanisms that are plugged in by name.

    model, tokenizer = load("checkpoints/SmolLM2-135M-Instruct", attn="longformer:window=512", memory="sinks")
    logits = model(tokens)                      # [B, T] -> [B, T, V] float32
    state = model.start()
    for segment in segments:                    # training in segments, prefill in chunks, decoding: one loop
        logits, state = model(segment, state)
"""

import dataclasses
import functools
import itertools
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import ops
import plugins
import tokenizer as tokenizers
from adapters import _peft as peft
from errors import Refused
from kernels import Places, coded
from kernels.spans import behaviours
from memory.base import Memory
from ops import Module, ModuleList
from positions import _hf as rope

# ---------------------------------------------------------------- config

# fields that other libraries do not know, or under other names
OURS = ("attn", "pos", "memory", "adapter", "base_bits", "segment", "rope_theta", "partial_rotary_factor")

DIFFERS = {
    "cohere": "parallel blocks and LayerNorm",
    "falcon": "parallel blocks and LayerNorm",
    "gemma": "GELU and norms with 1 + weight",
    "gemma2": "GELU, norms with 1 + weight and capped logits",
    "gemma3_text": "GELU, norms with 1 + weight and norms on queries and keys",
    "gpt2": "learned absolute positions, LayerNorm and GELU",
    "gpt_neox": "parallel blocks, LayerNorm and GELU",
    "llama4_text": "experts and norms on queries and keys",
    "mixtral": "experts in the place of the MLP",
    "olmo2": "norms after the sublayers and on queries and keys",
    "phi3": "fused projections",
    "qwen2": "biases on queries, keys and values but not on the output",
    "qwen3": "norms on queries and keys",
}


@dataclass(frozen=True)
class Config:
    """The architecture, in the names of HF's config.json, and the mechanisms by their flags' spelling."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0  # the share of each head that rotary positions turn
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    attn: str = "full"
    pos: str = "rope"
    memory: str = "full"
    adapter: str = "full"
    base_bits: int = 16  # of the blocks' linears under an adapter, which are read and held in 4 or 8 (kernels/coded.py); 16: as they are
    segment: int | None = None  # tokens of the segments that it was trained in, and is read in; None: whole rows
    hf: dict = field(default_factory=dict)  # the config.json that this came from, to be written back

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, kind = getattr(self, f.name), f.type | int if f.type is float else f.type
            if not isinstance(value, kind) or (type(value) is int and value < 1):
                raise Refused(f"config.json: {f.name} cannot be {value!r}")
        H = self.num_attention_heads
        object.__setattr__(self, "num_key_value_heads", self.num_key_value_heads or H)
        if self.head_dim is None and self.hidden_size % H:
            raise Refused(f"config.json: hidden_size {self.hidden_size} is no multiple of its {H} heads: give head_dim")
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden_size // H)
        if H % self.num_key_value_heads:
            raise Refused(
                f"config.json: {H} query heads cannot share {self.num_key_value_heads} key heads evenly: one must divide the other"
            )

    @property
    def original_length(self):
        """Tokens that the model was made for before its positions were stretched."""
        return rope.original(self.hf, self.max_position_embeddings)

    @classmethod
    def from_hf(cls, hf):
        """From the contents of a config.json. Raises Refused, naming what differs, if this is not a Llama."""
        kind = hf.get("model_type")
        if kind not in ("llama", "mistral"):
            why = f" ({DIFFERS[kind]})" if kind in DIFFERS else ""
            raise Refused(f"config.json says model_type {kind!r}{why}: nanolong runs models of type llama and mistral")
        if hf.get("hidden_act", "silu") != "silu":
            raise Refused(f"config.json says hidden_act {hf['hidden_act']!r}: nanolong's MLP is SwiGLU (silu)")
        own = {f.name for f in dataclasses.fields(cls)} - {"hf"}
        given = {k: hf[k] for k in own & hf.keys() if hf[k] is not None}
        given["rope_theta"], pos = rope.read(hf, given.get("max_position_embeddings", cls.max_position_embeddings))
        given["partial_rotary_factor"] = rope.partial(hf) or given.get("partial_rotary_factor", 1.0)
        mechanisms = {"attn": window_of(hf), "pos": pos, **hf.get("nanolong", {})}
        return cls(**{**given, **{k: v for k, v in mechanisms.items() if k in own}}, hf=hf)

    def to_hf(self):
        """The contents of a config.json that transformers and mlx-lm read; our own fields stand under "nanolong"."""
        own = [f.name for f in dataclasses.fields(self) if f.name != "hf"]
        hf = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", **self.hf}
        hf |= {k: getattr(self, k) for k in own if k not in OURS}
        hf.pop("nanolong", None)
        hf = rope.write(self, hf)
        # what the others' fields do not say, or say as the others need it
        plain = Config.from_hf(hf)
        mine = {k: getattr(self, k) for k in own if getattr(self, k) != getattr(plain, k)}
        return {**hf, "nanolong": mine} if mine else hf


def window_of(hf):
    """HF's sliding_window and layer_types, as the spelling of --attn."""
    window = hf.get("sliding_window") if hf.get("model_type") == "mistral" else None
    if not window:
        return "full"
    kinds = hf.get("layer_types") or ["sliding_attention"]
    return "/".join(f"window:window={window}" if kind == "sliding_attention" else "full" for kind in kinds)


# ---------------------------------------------------------------- the model


class Segment(NamedTuple):
    """What the layers need to know about the tokens of this call."""

    at: Places  # positions [B, 1, T]; -1 is padding
    begin: Any  # [B, 1, T] first position of the token's own document, or None: everything is one document
    position: Any  # the layer's position scheme
    turn: Any  # what the scheme computed from the positions, once for all layers that feel them alike
    bias: Any  # what the scheme adds to the logits, a kernels.Bias, or None
    close: bool  # the segment ends with this call: forget, compress, summarise now
    vectors: int = 0  # so many of the tokens, at the end, are vectors of the model's own (memory._around.Around)
    reading: bool = False  # all are, and the segment is over: they are there for memories to keep, and for later segments to read
    last: int | None = None  # the layer's output is wanted for the last so many tokens only; None: for all

    def queries(self, q):
        """This segment's queries [B, H, T, D], as attend() takes them."""
        return self.position.queries(q, self.turn)

    def keys(self, k, pos=None):
        """Keys [B, K, n, D] as attend() takes them, at this segment's positions or at others, [B, 1 or K, n]."""
        return self.position.keys(k, self.turn if pos is None else self.position.again(pos, self.turn))

    def wanted(self, x, axis=1):
        """x without those of the tokens, along an axis, whose output nobody wants."""
        return x if self.last is None else x[(slice(None),) * axis + (slice(-self.last, None),)]


class Attention(Module):
    def __init__(self, c, rule, memory):
        super().__init__()
        self.H, self.K, self.D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = ops.Linear(c.hidden_size, self.H * self.D, c.attention_bias)
        self.k_proj = ops.Linear(c.hidden_size, self.K * self.D, c.attention_bias)
        self.v_proj = ops.Linear(c.hidden_size, self.K * self.D, c.attention_bias)
        self.o_proj = ops.Linear(self.H * self.D, c.hidden_size, c.attention_bias)
        self.asked = self.rule = rule  # as given, and as it is in force: see patterns()
        self.memory = memory
        self.groups = 1  # training: key heads with their query heads are taken in so many groups, one after the other

    def heads(self, x):  # [B, T, heads * D] -> [B, heads, T, D]
        return ops.swap(x.reshape(x.shape[0], x.shape[1], -1, self.D), 1, 2)

    def kv(self, x):
        return self.heads(self.k_proj(x)), self.heads(self.v_proj(x))

    def joined(self, y):  # [B, heads, T, D] -> [B, T, heads * D]
        return ops.swap(y, 1, 2).reshape(y.shape[0], y.shape[2], -1)

    def forward(self, x, seg, s):
        # the segment joins what is remembered, so past and present are seen as one; only at its end is anything forgotten
        s = self.memory.write(self, x, seg, s)
        if self.groups > 1:
            y = self.by_groups(x, seg, s)
        else:
            y, s = self.memory.attend(self, self.heads(self.q_proj(x)), seg, s)
            y = self.o_proj(self.joined(y))
        if seg.close:
            s = self.memory.close(self, seg, s)
        return y, s

    def by_groups(self, x, seg, s):
        """forward()'s y, one group of heads after the other, each recomputed in the backward pass: queries and outputs of all heads are
        never there at once. Keys and values are, since they are remembered."""
        k, v, slots = self.memory.seen(self, x[:, None], seg, s)
        n, y = self.H // self.groups, None

        def group(given, seg, q_proj, o_proj, of):
            x, k, v = given
            y = self.memory.look(self, self.heads(q_proj.part(x, outs=of)), k, v, slots, seg, None)
            return o_proj.part(self.joined(y), ins=of)

        added = lambda y, part: part if y is None else y + part
        for i, kv in enumerate(zip(ops.split(k, self.groups, 1), ops.split(v, self.groups, 1))):
            heads = range(n * i, n * (i + 1))
            mine = seg if seg.bias is None else seg._replace(bias=seg.bias.of(heads))
            of = slice(heads.start * self.D, heads.stop * self.D)
            # in one expression: a variable would keep this part while the next is made
            y = added(y, ops.checkpoint(group, [ops.after(x, y), *kv], mine, self.q_proj, self.o_proj, of))
        bias = getattr(self.o_proj, "bias", None)
        return y if bias is None else y + ops.cast(bias, y.dtype)


class MLP(Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = ops.Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.up_proj = ops.Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.down_proj = ops.Linear(c.intermediate_size, c.hidden_size, c.mlp_bias)

    def forward(self, x):
        return self.down_proj(ops.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(Module):
    def __init__(self, c, rule, memory):
        super().__init__()
        self.input_layernorm = ops.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, rule, memory)
        self.post_attention_layernorm = ops.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)
        self.tile = None  # training: tokens that the MLP takes at once; None: all

    def forward(self, x, seg, s):
        y, s = self.self_attn(self.input_layernorm(x), seg, s)
        x = seg.wanted(x + y)
        x = x + tiled(lambda x, norm, mlp: mlp(norm(x)), self.tile, [x], self.post_attention_layernorm, self.mlp)
        return self.self_attn.memory.leave(self, x, seg, s)


def tiled(f, n, arrays, *modules):
    """f(*arrays, *modules) over [B, T, ...], n tokens at a time, each tile made once more in the backward pass; n None: all at once."""
    T = arrays[0].shape[1]
    if not n or n >= T:
        return f(*arrays, *modules)
    parts = []
    for x, *rest in zip(*(ops.pieces(a, n, 1) for a in arrays)):
        parts.append(ops.checkpoint(f, ops.after(x, parts[-1] if parts else None), *rest, *modules))
    return ops.cat(parts, 1)


class Decoder(Module):
    def __init__(self, c):
        super().__init__()
        L, heads = c.num_hidden_layers, {"n_head": c.num_attention_heads, "n_kv_head": c.num_key_value_heads}
        rules, memories = (plugins.tile(*what, L, **heads) for what in (("attention", c.attn), ("memory", c.memory)))
        self.embed_tokens = ops.Embedding(c.vocab_size, c.hidden_size)
        adapter = plugins.parse("adapters", c.adapter)
        beside = [plugins.place(adapter, layer=i) for i in range(L)]
        self.layers = ModuleList([Block(c, rule, remember(m, rule, a, c)) for rule, m, a in zip(rules, memories, beside)])
        self.norm = ops.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.positions = ModuleList([])
        self.feel(c)
        self.run = ops.call  # how a block is called: compiled, or recomputed in the backward pass (ops.fast_call, ops.checkpoint)
        self.together = 1  # so many blocks are called at once, and recomputed together

    def feel(self, c):
        """Let the layers feel distance as c.pos says; a scheme that was there before keeps its weights."""
        schemes = plugins.tile("positions", c.pos, len(self.layers), n_head=c.num_attention_heads, n_kv_head=c.num_key_value_heads)
        # one instance for all layers that feel distance alike, unless each has weights of its own
        alone = lambda i, p: i if getattr(p.module, "per_layer", lambda o: False)(p.options) else None
        which = [(p.name, p.options, alone(i, p)) for i, p in enumerate(schemes)]
        distinct, before = list(dict.fromkeys(which)), list(self.positions)
        now = [build(schemes[which.index(d)], "Position", c) for d in distinct]
        same = lambda i, p: i < len(before) and type(before[i]) is type(p) and before[i].o == p.o
        self.positions = ModuleList([before[i] if same(i, p) else p for i, p in enumerate(now)])
        self.feels = tuple(map(distinct.index, which))

    def patterns(self, training):
        """Patterns made for training only (LongLoRA's s2) stand in training alone: in use they are full attention. Memories are
        told too: some learn from what they see in training."""
        aside = lambda leaf: plugins.parse("attention", "full") if getattr(leaf.module, "TRAINING_ONLY", False) else leaf
        for block in self.layers:
            attn = block.self_attn
            attn.rule = attn.asked if training else attn.asked.each(aside)
            attn.memory.learning = training

    def forward(self, x, at, begin, close, states, vectors=0, reading=False, workers=None, last=None):
        """x [B, T, C] -> [B, T, C], or [B, last, C] of the last tokens only, and the layers' new states. workers: a module for each block,
        called in its place, the block being its last argument."""
        turns, after = {}, []
        for p in self.positions:
            if p.felt not in turns:
                turns[p.felt] = p.turn(at, begin)
        segments = [Segment(at, begin, p, turns[p.felt], p.bias(), close, vectors, reading) for p in self.positions]
        works = [(block,) for block in self.layers] if workers is None else zip(workers, self.layers)
        # states may be an iterator that lets each go as it is asked for: nothing here may hold them all
        segments = [segments[i] for i in self.feels]
        if last is not None and last < x.shape[1]:
            # all tokens are in the states; what would be above them goes nowhere
            segments[-1] = segments[-1]._replace(last=last)
        layers = zip(works, segments, states)
        while some := list(itertools.islice(layers, self.together)):
            then = [s.pop("then", None) for *_, s in some]
            ((work, *block), seg, s), *more = some
            # alone it is called as it is: a compiler knows it again
            x, *s = self.run(through, x, some) if more else self.run(work, x, seg, s, *block)
            # a state's "then" is called with the layer's new state as soon as that is there, so that less is held (segments.py, train.py)
            after += [s if f is None else f(s) for s, f in zip(s, then)]
        return x, after


def through(x, layers):
    """x through blocks in turn, layers being ((block, what else it is given...), its Segment, its state) -> x and their states."""
    after = []
    for (work, *block), seg, s in layers:
        x, s = work(x, seg, s, *block)
        after.append(s)
    return x, *after


class Llama(Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.model = Decoder(c)
        if not c.tie_word_embeddings:
            self.lm_head = ops.Linear(c.hidden_size, c.vocab_size)
        self.around = surround(c)
        self.adapter, self.base = plugins.parse("adapters", c.adapter), None  # base: the folder of what does not train
        self.dtype = None  # of the activations; None: the embedding's
        self.run = ops.call  # how the head is called
        self.chunk = None  # losses: tokens whose logits exist at once; None: all
        self.replays = None  # training in segments: a kernels.replayed.Replays, or None
        try:
            self.adapter.module.apply(self, self.adapter.options)
        except ValueError as no:
            raise Refused(f"--adapter {self.adapter}: {no}") from None
        try:
            self.coded = coded.names(self)  # of the parameters that are held as codes
        except ValueError as no:
            raise Refused(f"--base-bits {c.base_bits}: {no}") from None

    def head(self, x):
        """[..., C] -> logits [..., V] in float32."""
        return logits(x, self.model.norm, self.readout)

    @property
    def segment(self):
        """Tokens of the segments that the model is made for, or None: as its memory says, or as it was trained."""
        said = [block.self_attn.memory.segment for block in self.model.layers]
        return next(filter(None, said), self.config.segment)

    @property
    def readout(self):
        return self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head

    def losses(self, x, targets):
        """Loss of each target in nats, [B, T] float32, 0 where it is negative: x [B, T, C]. A chunk's logits are made once more in the
        backward pass, so that no [T, V] is ever held."""
        n = self.chunk and max(1, self.chunk // x.shape[0])
        return tiled(losses, n, [x, targets], self.model.norm, self.readout)

    def start(self, segment=0, total=0, read=0):
        """Nothing remembered yet. segment, total: the most tokens that will come piece by piece between closes, and at all;
        with them known, caches are allocated once. read: the text that a memory's budget may be a share of has so many; 0: total."""
        memories = self.memories()
        share = {"read": read or total} if any(plugins.is_share(memory.given) for memory in memories) else {}
        if share == {"read": 0}:
            of = f"--memory {self.config.memory} is a share of a text, and here nobody knows how long the text will be"
            raise Refused(f"{of}: give its budget in tokens")
        self.settle(share)
        around = {} if self.around is None else {"around": self.around.start()}
        segment += self.around.size if around and segment else 0
        return {"next": 0, "layers": [memory.start(segment, total) for memory in memories], **share, **around}

    def settle(self, state):
        """Budgets that are shares become tokens of the state's text."""
        if "read" in state:
            for block in self.model.layers:
                block.self_attn.memory.settle(state["read"])

    def forward(self, tokens, state=None, begin=None, padded=False, close=True, last=None, targets=None):
        """Logits of a whole text, or of the next piece of one.

        tokens [B, T] integers. state: from start() or the call before; without it this is a text by itself, and only the
        logits are returned. begin [B, T]: the position of the first token of each token's own document (documents packed in
        a row do not see each other). padded: tokens of -1 are padding. close: the segment ends with these tokens. last:
        logits of the last so many positions only. targets [B, T]: return each one's loss in nats instead, [B, T] float32, 0 where it is
        negative; `chunk` tokens' logits at a time.
        Returns logits [B, T, V] float32, and with a state the new state.
        """
        alone = state is None
        state = self.start(read=tokens.shape[1]) if alone else state
        self.settle(state)
        pos, count = self.number(tokens, state["next"], padded)
        at = Places(pos, int(state["next"]) if isinstance(state["next"], int) and not padded else None)
        x = self.model.embed_tokens(ops.where(tokens < 0, 0, tokens) if padded else tokens)
        x = x if self.dtype is None else ops.cast(x, self.dtype)
        x, state = self.read(x, at, None if begin is None else begin[:, None], count, close and not alone, state, last)
        y = self.run(self.head, x if last is None else x[:, -last:]) if targets is None else self.losses(x, targets)
        return y if alone else (y, state)

    def read(self, x, at, begin, count, close, state, last=None):
        """All layers over x [B, T, C] -> [B, T, C] and the new state. count: how many tokens they are, an int or [B]. last: of so many
        tokens at least the output is wanted; None: of all."""
        if self.around is not None:
            return self.around.round(self.model, x, at, begin, count, close, state)
        x, layers = self.model(x, at, begin, close, state["layers"], last=last)
        return x, {**state, "next": state["next"] + count, "layers": layers}

    def number(self, tokens, start, padded):
        """Positions [B, 1, T] of tokens that follow `start` others, and how many they are."""
        B, T = tokens.shape
        # the device's own number, where it has one (kernels.replayed.Known)
        start = getattr(start, "there", start)
        if T == 1 and isinstance(start, int) and not padded:
            return ops.full((B, 1, 1), start, ops.int32, tokens), 1
        if not padded:
            pos = ops.arange(T, tokens)[None, None] + (start if isinstance(start, int) else ops.cast(start, ops.int32).reshape(-1, 1, 1))
            return ops.expand(pos, (B, 1, T)), T
        live = tokens >= 0
        count = ops.cumsum(ops.cast(live, ops.int32), 1)
        pos = ops.where(live, count - 1 + (start if isinstance(start, int) else start[:, None]), -1)
        return pos[:, None], count[:, -1]

    def group_heads(self, n):
        """Training: let attention take its heads in n groups (Attention.by_groups). Raises Refused where heads need each other."""
        c, said = self.config, f"--head-groups {n}"
        if n < 1 or c.num_key_value_heads % n:
            raise Refused(f"{said} is not possible: it must divide the model's {c.num_key_value_heads} key heads")
        for block in self.model.layers:
            attn, memory = block.self_attn, type(block.self_attn.memory)
            if n > 1 and any(getattr(memory, f) is not getattr(Memory, f) for f in ("attend", "look", "seen")):
                raise Refused(f"{said}: --memory {c.memory} with --attn {c.attn} and --adapter {c.adapter} works on all heads at once")
            if n > 1 and any(behaviours(attn.asked, attn.H)):
                raise Refused(f"{said}: --attn {attn.asked} lets heads differ, and a group would not know which ones it has")
            attn.groups = n
        if n > 1 and any(p.by_head for p in self.model.positions):
            raise Refused(f"{said}: --pos {c.pos} has weights of each head in its queries: take another")

    def trains(self, name):
        """Does the parameter of this name train, by gradients or by what it observes?"""
        return own(name) or self.adapter.module.trains(name, self.adapter.options)

    def shake(self, seed):
        """What is random in training (an adapter's dropout) is a function of this int, or with None nothing is."""
        getattr(self.adapter.module, "shake", lambda *a: None)(self, seed)

    def observers(self):
        """Where parameters are that no gradient moves: prefix of their names -> the memory that learns them from what it sees."""
        layers = ((f"model.layers.{i}.self_attn.memory.", block.self_attn.memory) for i, block in enumerate(self.model.layers))
        return {prefix: memory for prefix, memory in layers if memory.observes}

    def learn(self, seen):
        """Let the observers learn. seen: of each the array that it left in its layer's state, summed over the rows of a step."""
        for memory, x in zip(self.observers().values(), seen):
            memory.learn(x)

    def feel(self, pos):
        """Feel distance by another spelling of --pos from now on."""
        self.config = dataclasses.replace(self.config, pos=pos)
        self.model.feel(self.config)

    def gone(self, state, later):
        """What of a state the one at the next boundary, `later`, does not have; see again()."""
        return {**state, "layers": [m.gone(*of) for m, *of in zip(self.memories(), state["layers"], later["layers"])]}

    def again(self, state, later):
        """The state of which gone() left this; `later` is used up."""
        over = (lambda s, later: s) if self.replays is None else self.replays.over
        layers = zip(self.memories(), state["layers"], later["layers"])
        return {**state, "layers": [over(m.again(s, after), after) for m, s, after in layers]}

    def memories(self):
        return [block.self_attn.memory for block in self.model.layers]

    def still(self, state):
        """The same state with static shapes and no number that only the host knows: for a step that is one graph."""
        self.settle(state)
        layers = [block.self_attn.memory.still(s) for block, s in zip(self.model.layers, state["layers"])]
        n = state["next"]
        around = {} if self.around is None else {"around": self.around.still(state["around"], layers[0]["pos"])}
        return {**state, "next": ops.scalar(n) if isinstance(n, int) else n, "layers": layers, **around}

    def moving(self, state):
        """The inverse of still: counters as the host's own ints again, where all rows are alike."""
        layers = [block.self_attn.memory.moving(s) for block, s in zip(self.model.layers, state["layers"])]
        n = state["next"]
        known = lambda n: ops.host(n) if len(n.shape) == 0 else n
        around = {} if self.around is None else {"around": {**state["around"], "more": known(state["around"]["more"])}}
        return {**state, "next": known(n), "layers": layers, **around}

    def init(self, seed=0, std=0.02):
        """Random weights, the same on every backend: normal of width std, norms 1, biases 0. Mechanisms' own begin as they say."""
        draw = np.random.default_rng(seed)
        # those last: they may be copies, and the others are the same whatever the mechanisms add
        for added in (False, True):
            self.fill([name for name in ops.parameters(self) if (own(name) or ADAPTED in name) == added], draw, std)
            coded.hold(self)
        return self

    def fill(self, names, draw, std=0.02):
        """Give the parameters of these names the values that they begin with."""
        shapes = {name: p.shape for name, p in ops.parameters(self).items()}
        for name in names:
            said = None
            if name.startswith(POSITIONS):
                i, _, leaf = name.removeprefix(POSITIONS).partition(".")
                said = self.model.positions[int(i)].initial(leaf)
            elif ADAPTED in name:
                said = self.adapter.module.initial(self, name, self.adapter.options)
            elif name.startswith(AROUND):
                said = self.around.initial(name.removeprefix(AROUND), self)
            elif own(name):
                attn, leaf = self.model.layers[int(name.split(".")[2])].self_attn, name.partition(".memory.")[2]
                said = attn.memory.initial(attn, leaf)
            if said is None:
                shape = shapes[name]
                value = np.ones(shape) if "norm" in name else draw.normal(size=shape) * std if len(shape) > 1 else np.zeros(shape)
                said = ops.array(value.astype("float32"))
            ops.set_parameters(self, {name: said})


def logits(x, norm, readout):
    return ops.cast(getattr(readout, "as_linear", readout)(norm(x)), ops.float32)


def losses(x, targets, norm, readout):
    return ops.cross_entropy(logits(x, norm, readout), targets)


def own(name):
    """Is this parameter a mechanism's own, which other libraries do not know?"""
    return ".memory." in name or name.startswith((POSITIONS, AROUND))


POSITIONS, AROUND = "model.positions.", "around."
ADAPTED = ".lora_"  # in the names of what an adapter puts in


def surround(c):
    """The vectors around the model's segments that its layers' memories work with, or None. Raises Refused unless all layers agree."""
    plugged = plugins.tile("memory", c.memory, c.num_hidden_layers)
    sizes = [p.options.size if hasattr(p.module, "Around") else 0 for p in plugged]
    if len(set(sizes)) > 1 or len({p.module.Around for p in plugged if hasattr(p.module, "Around")}) > 1:
        raise Refused(f"--memory {c.memory}: vectors around a segment pass through all layers, so all must say the same about them")
    return build(plugged[0], "Around", c) if sizes[0] else None


def remember(memory, rule, adapter, c):
    """The layer's memory; worked by its attention pattern where that is more than a rule of positions: then its class Pattern
    overrides what it needs of Memory, and is given the Plugin. So is the class Beside of an adapter that has one."""
    pattern, beside = plugins.pattern(rule), getattr(adapter.module, "Beside", None)
    if memory.name not in getattr(pattern, "memories", [memory.name]):
        raise Refused(f"--attn {rule} does not work with --memory {memory}: take --memory {' or '.join(pattern.memories)}")
    kind, given = memory.module.Memory, []
    for worker, plugin in ((pattern, rule), (beside, adapter)):
        if worker:
            kind, given = worked(worker, kind), [*given, plugin]
    try:
        made = kind(c, memory.options, *given)
    except ValueError as no:
        raise Refused(f"{' with '.join(map(str, (memory, *given)))}: {no}") from None
    if pattern is None and made.parts_heads and any(behaviours(rule, c.num_attention_heads)):
        raise Refused(f"--memory {memory} sorts the heads in its own way, and --attn {rule} lets them differ too: take --attn full")
    return made


@functools.cache
def worked(pattern, memory):
    # one class for all layers, so that a compiled step serves them all
    return type("Memory", (pattern, memory), {})


def build(plugin, kind, c):
    """The module's class of this kind, made for this config; its complaint about the config as a sentence with the flag."""
    try:
        return getattr(plugin.module, kind)(c, plugin.options)
    except ValueError as no:
        raise Refused(f"{plugin}: {no}") from None


# ---------------------------------------------------------------- load and save


def load(folder, attn=None, pos=None, memory=None, adapter=None, dtype=None, device=None, base_bits=None, frozen=None):
    """A checkpoint folder in Hugging Face's layout -> (model, tokenizer).

    attn, pos, memory, adapter, base_bits: as the flags spell them; None: what the checkpoint says. dtype: float32, bfloat16 or float16;
    None: bfloat16 on a GPU, float32 on a CPU. frozen: the backend's own dtype of what does not train; None: the same. device: as the
    backend names it; None: the best there is. Tensors are read one by one, so that the model is never there twice. Raises Refused.
    """
    ops.use(device)
    folder = Path(folder)
    config, base = read_config(folder), peft.base(folder)
    given = {"attn": attn, "pos": pos, "memory": memory, "adapter": adapter, "base_bits": base_bits}
    given = {k: v for k, v in given.items() if v is not None}
    if base and adapter and plugins.parse("adapters", adapter) != plugins.parse("adapters", config.adapter):
        why = f"--adapter {adapter} cannot be put on {folder}, which is --adapter {config.adapter}"
        raise Refused(f"{why}: leave it out to go on with that, or merge that first (python convert.py {folder} OUT)")
    with ops.shapes_only():
        model = Llama(dataclasses.replace(config, **given))
    wanted = ops.parameters(model)
    dtype = as_dtype(dtype)
    still = frozen or dtype
    trains = lambda name: model.trains(name) or name.startswith(tuple(model.observers()))
    for path in (*adapter_files(folder, config), *weight_files(base)) if base else weight_files(folder):
        for name, a in peft.read(each(path)):
            if name not in wanted:
                continue
            if tuple(a.shape) != tuple(wanted.pop(name).shape):
                shape = list(ops.parameters(model)[name].shape)
                raise Refused(f"{path}: {name} has shape {list(a.shape)}, but config.json makes it {shape}")
            held = name in model.coded
            a = coded.Coded(a, model.config.base_bits, still) if held else ops.cast(a, dtype if trains(name) else still)
            ops.set_parameters(model, {name: a})
    missing = [n for n in wanted if not own(n) and (base or ADAPTED not in n)]
    if missing:
        raise Refused(f"{folder} lacks {len(missing)} of the model's weights, {missing[0]} for one: is the download complete?")
    # what others begin as copies of is there first
    model.fill(sorted(wanted, key=own), np.random.default_rng(0))
    model.base = (base or folder).absolute()
    model.model.patterns(training=False)
    return model, tokenizers.load(folder)


def as_dtype(name):
    """The backend's dtype of this name; None: what suits the device."""
    name = name or ("bfloat16" if ops.on_gpu() else "float32")
    if name not in ("float32", "bfloat16", "float16"):
        raise Refused(f"dtype {name!r} is not known: choose float32, bfloat16 or float16")
    return getattr(ops, name)


def read_config(folder):
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise Refused(f"{folder} is no checkpoint folder: it has no config.json (python convert.py SOURCE {folder} makes one)")
    try:
        return Config.from_hf(json.loads(path.read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as no:
        raise Refused(f"{path} cannot be read: {type(no).__name__} {no}") from None


def weight_files(folder):
    """The model's safetensors, one or sharded, and our own parameters' file beside it."""
    index = folder / "model.safetensors.index.json"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    if any(Path(name).name != name for name in names):
        raise Refused(f"{index} names a file outside its folder")
    files = [folder / name for name in names]
    lost = [f for f in files if not f.is_file()]
    if lost:
        raise Refused(f"{lost[0]} is not there (python convert.py SOURCE {folder} makes a checkpoint folder of other formats)")
    return files + own_file(folder)


def own_file(folder):
    return [f for f in [folder / "nanolong.safetensors"] if f.is_file()]


def adapter_files(folder, config):
    """The files of an adapter's checkpoint, which come before its base's."""
    weights = folder / peft.WEIGHTS
    if config.adapter == "full":
        raise Refused(f"{folder} has an adapter_config.json, but its config.json does not say how it was trained: merge it with convert.py")
    return [f for f in [weights] if f.is_file()] + own_file(folder)


def read(path, host=False):
    return dict(each(path, host))


def each(path, host=False):
    """(name, array) of a file, one after the other; host: in the host's memory."""
    try:
        yield from ops.each_safetensor(path, host)
    except Exception as no:
        raise Refused(f"{path} is not a readable safetensors file: {no}") from None


def save(model, folder, source=None):
    """Write a checkpoint folder that transformers and mlx-lm open: config.json, model.safetensors (the mechanisms' own parameters
    in nanolong.safetensors), and the tokenizer's files copied from the folder `source`; of a model with an adapter what trains
    alone (adapters/_peft.py). The folder appears whole or not at all."""
    folder = Path(folder)
    partial, before = (folder.with_name(f"{folder.name}.{what}-{os.getpid()}") for what in ("partial", "before"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(model, partial, source)
        if folder.exists():
            os.replace(folder, before)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)


def write(model, folder, source=None):
    """The files of a checkpoint into a folder that exists."""
    arrays = ops.parameters(model)
    if model.coded and model.adapter.name == "full":
        raise Refused(f"the base is held in {model.config.base_bits} bits, and a checkpoint holds it as it was: load it with base_bits=16")
    files = {"nanolong.safetensors": {n: a for n, a in arrays.items() if own(n)}}
    if model.adapter.name == "full":
        files["model.safetensors"] = {n: a for n, a in arrays.items() if not own(n)}
    elif model.base is None:
        raise Refused(f"--adapter {model.adapter} is saved without its base, and this model has none: load() a folder with it")
    else:
        trained = {n: a for n, a in arrays.items() if not own(n) and model.trains(n)}
        said = peft.fields(model.base, trained, model.adapter.options, model.config)
        (folder / peft.CONFIG).write_text(json.dumps(said, indent=2) + "\n")
        files |= peft.files(trained, said)
    for name, those in files.items():
        if those:
            ops.write_safetensors(folder / name, those)
    kind = str(model.model.embed_tokens.weight.dtype).split(".")[-1]
    hf = {**model.config.to_hf(), "torch_dtype": kind, "dtype": kind}
    (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
    for name in tokenizers.FILES if source else ():
        if (Path(source) / name).is_file():
            shutil.copy(Path(source) / name, folder / name)
