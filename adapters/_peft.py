"""The checkpoint folder of an adapter, which PEFT opens, and mlx-lm where the adapter is LoRA alone:

    adapter_config.json           PEFT's fields and mlx-lm's; base_model_name_or_path is the folder of the base
    adapter_model.safetensors     what trains, by PEFT's names
    adapters.safetensors          the same by mlx-lm's, which knows of LoRA only
    nanolong.safetensors          what the mechanisms have of their own
    config.json, tokenizer files  as in any checkpoint: the whole model's

PEFT takes the base's config.json, so what changes there (stretched positions) it must be told: or merge the adapter, with convert.py.
No framework is needed here: arrays are whatever they were.
"""

from pathlib import Path

from errors import Refused
from readers import read_json

CONFIG, WEIGHTS, MLX = "adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"
PREFIX = "base_model.model."


def base(folder):
    """The folder of the base if this is the checkpoint of an adapter, else None. Raises Refused where the base is gone."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        return None
    named = read_json(path).get("base_model_name_or_path")
    if not isinstance(named, str) or not (Path(named) / "config.json").is_file():
        raise Refused(f"the base model of {folder} is not in {named}: put it back, or correct base_model_name_or_path in {path}")
    return Path(named)


def scale(alpha, rank, rslora):
    """What B A is multiplied by."""
    return alpha / (rank**0.5 if rslora else rank)


def theirs(name):
    """PEFT's name of a parameter."""
    return PREFIX + name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def ours(name):
    name = name.removeprefix(PREFIX)
    return name + ".weight" if name.endswith("lora_magnitude_vector") else name


def fields(base, trained, o, c):
    """The contents of adapter_config.json. trained: the names of what trains; o: the adapter's options; c: the Config."""
    where = {"base_model_name_or_path": str(base), "task_type": "CAUSAL_LM", "inference_mode": True}
    linears = [name.partition(".lora_A.")[0].split(".", 3)[3] for name in trained if ".lora_A." in name]
    if not linears:
        return {"peft_type": None, **where}
    whole = list(dict.fromkeys(name.split(".")[-2] for name in trained if ".lora_" not in name))
    tied = "embed_tokens" in whole and c.tie_word_embeddings
    peft = {
        "peft_type": "LORA",
        **where,
        "r": o.rank,
        "lora_alpha": o.alpha,
        "lora_dropout": o.dropout,
        "use_rslora": o.rslora,
        "use_dora": o.dora,
        "target_modules": sorted({name.split(".")[-1] for name in linears}),
        # PEFT would leave the head that is tied to the embedding as it was
        "modules_to_save": [*whole, *["lm_head"] * tied] or None,
        "ensure_weight_tying": tied,
        "bias": "none",
        "fan_in_fan_out": False,
    }
    if whole:
        return peft
    parameters = {"rank": o.rank, "scale": scale(o.alpha, o.rank, o.rslora), "dropout": o.dropout, "keys": sorted(set(linears))}
    mlx = {"fine_tune_type": "dora" if o.dora else "lora", "num_layers": c.num_hidden_layers, "lora_parameters": parameters}
    return {**peft, **mlx}


def files(arrays, said):
    """{file name: {name: array}} of the arrays that train, by our names; said: what fields() gave."""
    if not arrays:
        return {}
    magnitude = lambda name, a: a[:, 0] if "lora_magnitude_vector" in name else a
    out = {WEIGHTS: {theirs(name): magnitude(name, a) for name, a in arrays.items()}}
    if said.get("ensure_weight_tying"):
        # a copy: a file of tensors may not hold the same one twice
        out[WEIGHTS][theirs("lm_head.weight")] = arrays["model.embed_tokens.weight"] + 0
    if "lora_parameters" in said:
        out[MLX] = {}
        for name, a in arrays.items():
            stem, _, leaf = name.rpartition("lora_")
            leaf = {"A.weight": "lora_a", "B.weight": "lora_b", "magnitude_vector.weight": "m"}[leaf]
            out[MLX][stem + leaf] = a[:, 0] if leaf == "m" else a.T
    return out


def read(arrays):
    """(name, array) pairs of adapter_model.safetensors by our names."""
    return ((ours(name), a[:, None] if name.endswith("lora_magnitude_vector") else a) for name, a in arrays)
