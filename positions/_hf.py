"""The rope fields of a config.json, read as --pos and written back from it, as transformers 5 and mlx-lm understand them.

transformers up to 4 and mlx-lm read `rope_theta` and `rope_scaling`, transformers 5 also `rope_parameters`, which holds both;
where a file has both, `rope_scaling` counts.
"""

import plugins
from errors import Refused
from positions import ntk, yarn

# HF's rope type -> our name, and our options -> HF's fields
TYPES = {
    "default": ("rope", {}),
    "linear": ("pi", {"factor": "factor"}),
    "dynamic": ("dynamic", {"factor": "factor"}),
    "llama3": (
        "llama3",
        {"factor": "factor", "low": "low_freq_factor", "high": "high_freq_factor", "original": "original_max_position_embeddings"},
    ),
    "yarn": (
        "yarn",
        {k: k for k in ("factor", "beta_fast", "beta_slow", "attention_factor", "truncate")}
        | {"original": "original_max_position_embeddings"},
    ),
    "longrope": ("longrope", {}),
}
REQUIRED = ("factor", "low_freq_factor", "high_freq_factor")


def fields(hf):
    """The rope fields in one place, by either spelling."""
    return hf.get("rope_scaling") or hf.get("rope_parameters") or {}


def original(hf, longest):
    """Tokens before scaling, as transformers looks for it; longest: max_position_embeddings, which stands in where nothing is said."""
    L = hf.get("original_max_position_embeddings") or fields(hf).get("original_max_position_embeddings") or longest
    return int(L) if isinstance(L, float) else L


def partial(hf):
    """The share of each head that turns, or None."""
    return fields(hf).get("partial_rotary_factor") or (hf.get("rope_parameters") or {}).get("partial_rotary_factor")


def read(hf, longest=2048):
    """The base theta, and the spelling of --pos. Raises Refused for a type that is not here, KeyError for a missing field."""
    rope = fields(hf)
    if any(isinstance(v, dict) for v in rope.values()):
        raise Refused("config.json gives rope fields by layer type: a Llama's are one flat object")
    theta = rope.get("rope_theta") or hf.get("rope_theta") or (hf.get("rope_parameters") or {}).get("rope_theta") or 10000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in TYPES:
        raise Refused(f"config.json asks for rope type {kind!r}, which nanolong does not have: it has {', '.join(TYPES)}")
    name, ours = TYPES[kind]
    rope = {**rope, "original_max_position_embeddings": original(hf, longest)}
    if kind == "yarn":
        # a factor left open is the ratio of the lengths (DeepSeek), and two mscales are an attention factor
        s = rope["factor"] = rope["factor"] or longest / rope["original_max_position_embeddings"]
        scales = rope.get("mscale"), rope.get("mscale_all_dim")
        if rope.get("attention_factor") is None and all(scales) and s > 1:
            over, under = (yarn.sharpness(s, x) for x in scales)
            rope["attention_factor"] = over / under
    given = {k: rope[theirs] if theirs in REQUIRED else rope.get(theirs) for k, theirs in ours.items()}
    spec = name + ":" + ",".join(f"{k}={v}" for k, v in given.items() if v is not None)
    return float(theta) if isinstance(theta, int) else theta, str(plugins.parse("positions", spec))


def write(c, hf):
    """The contents `hf` of a config.json with rope fields that say what the Config c says; as they are if they say it already,
    or if HF has no name for it. A longer context is told in max_position_embeddings where HF looks for it there."""
    longest = c.max_position_embeddings
    if c.hf and read(hf, longest) == (c.rope_theta, c.pos) and c.hf.get("max_position_embeddings", longest) == longest:
        return hf
    name, _, _ = c.pos.partition(":")
    kind = {ours: theirs for theirs, (ours, _) in TYPES.items()}.get("rope" if name == "ntk" else name)
    if "/" not in c.pos and kind == "longrope" and c.hf and (s := plugins.parse("positions", c.pos).options.factor):
        # the lists stay; transformers and mlx-lm look for s in either place
        return {**hf, **spell({**fields(hf), "factor": s}, c.rope_theta), "max_position_embeddings": round(original(hf, longest) * s)}
    if "/" in c.pos or kind in (None, "longrope"):
        return hf if c.hf else {**hf, **spell({"rope_type": "default"}, c.rope_theta)}
    o, theta = plugins.parse("positions", c.pos).options, c.rope_theta
    rope = {"rope_type": kind, **{theirs: getattr(o, k) for k, theirs in TYPES[kind][1].items()}}
    if name == "ntk":
        theta, longest = ntk.base(theta, o.factor, int(c.head_dim * c.partial_rotary_factor)), round(longest * o.factor)
    if name == "dynamic":
        # transformers and mlx-lm take max_position_embeddings for the length before scaling
        longest = o.original or longest
    if "original_max_position_embeddings" in rope:
        L = rope["original_max_position_embeddings"] = o.original or longest
        longest = max(longest, round(L * o.factor))
    if kind == "yarn" and not o.attention_factor:
        del rope["attention_factor"]
    elif kind == "yarn" and o.factor > 1:
        # mlx-lm reads m from mscale alone, transformers ignores mscale where there is an attention_factor
        rope["mscale"] = (o.attention_factor - 1) / (yarn.sharpness(o.factor) - 1)
    # an original length beside the rope fields would overrule theirs
    hf = {k: v for k, v in hf.items() if k != "original_max_position_embeddings"}
    if (share := getattr(o, "partial", 0) or c.partial_rotary_factor) != 1:
        rope["partial_rotary_factor"] = share
    return {**hf, **spell(rope, theta), "max_position_embeddings": longest}


def spell(rope, theta):
    """Both spellings."""
    return {
        "rope_theta": theta,
        "rope_scaling": None if rope == {"rope_type": "default"} else rope,
        "rope_parameters": {**rope, "rope_theta": theta},
    }
