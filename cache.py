"""Prompt caches: what a model remembers of a text, as one safetensors file, so that the text is read once and asked about often.

python generate.py --prompt-file book.txt --cache book.cache --prompt "Who is the narrator?"     # reads the book, writes the file
python generate.py --prompt-file book.txt --cache book.cache --prompt "Where does she live?"     # reads the question alone

The file holds the tokens and the state after them: arrays under their names in the state ("layers.0.k"), and in the file's head, as
JSON under "nanolong", the host's own numbers and what the state depends on. Whichever backend wrote it, both read it. A segment closes
where the file ends: a memory that forgets may keep other tokens of a text that is read on than of one that is read at once.
"""

import hashlib
import json
from itertools import takewhile

import numpy as np
from safetensors import SafetensorError, safe_open

import cli
import ops
from errors import Refused

# the host keeps no strings in a state: this one stands for an array
ARRAY = "array"
ROPE = ("rope_scaling", "rope_parameters")


def depends(model, tokenizer):
    """What a state depends on, as strings: it fits nothing else."""
    c, dtype = model.config, model.dtype or model.model.embed_tokens.weight.dtype
    of = {"model": fingerprint(model), "dtype": str(dtype).split(".")[-1], "tokenizer": tokenizer.fingerprint}
    # a table of heads may change under its name (memory/duo.py)
    heads = [memory.k_heads for memory in model.memories() if hasattr(memory, "k_heads")]
    return of | {"attn": c.attn, "pos": c.pos, "memory": c.memory} | ({"heads": json.dumps(heads)} if heads else {})


def fingerprint(model):
    """A hash of the architecture, and of the first numbers of every weight."""
    c = vars(model.config)
    same = {k: v for k, v in c.items() if k not in ("hf", "attn", "pos", "memory")} | {k: c["hf"].get(k) for k in ROPE}
    digest = hashlib.sha256(json.dumps(same, sort_keys=True).encode())
    for name, p in sorted(ops.parameters(model).items()):
        digest.update(name.encode() + ops.numpy(ops.cast(p.reshape(-1)[:64], ops.float32)).tobytes())
    return digest.hexdigest()[:32]


def save(path, session, tokenizer):
    """Write what the session remembers: the file is there whole or not at all. Raises Refused."""
    model, arrays = session.model, {"tokens": ops.array(np.array(session.tokens, "int32"))}
    layers = [memory.packed(s) for memory, s in zip(session.memories, session.state["layers"])]
    host = apart({**session.state, "layers": layers}, "state", arrays)
    # the library wants no memory shared, and layers may share their positions
    arrays = {name: a if ops.is_real(a) else a + 0 for name, a in arrays.items()}
    head = {"nanolong": json.dumps({"state": host, **depends(model, tokenizer)})}
    try:
        cli.write(path, lambda partial: ops.write_safetensors(partial, arrays, head))
    except (SafetensorError, RuntimeError) as no:
        raise Refused(f"{path} could not be written: {no}") from None


def load(path, session, tokenizer):
    """(tokens, state) of a file that fits the session's model. Raises Refused, naming what does not."""
    try:
        with safe_open(path, framework="numpy") as file:
            said = json.loads((file.metadata() or {})["nanolong"])
        host = said["state"]
    except OSError as no:
        raise Refused(f"{path} cannot be read: {no.strerror or no}") from None
    except (SafetensorError, ValueError, KeyError, TypeError):
        raise Refused(f"{path} is no prompt cache: remove it, or give --cache another name") from None
    for what, mine in depends(session.model, tokenizer).items():
        if said.get(what) != mine:
            named = {"model": "a model of other weights", "tokenizer": "another tokenizer", "heads": "another choice of full heads"}
            flag = named.get(what, f"--{what} {said.get(what)}")
            here = "" if what in named else f", and here it is {mine}"
            raise Refused(f"{path} was written with {flag}{here}: give it the same, or --cache another name")
    arrays = ops.read_safetensors(path)
    return ops.numpy(arrays["tokens"]).tolist(), whole(host, "state", arrays)


def apart(tree, name, arrays):
    """The tree with ARRAY in the places of its arrays, which are added to `arrays` by name."""
    if isinstance(tree, dict):
        return {k: apart(x, f"{name}.{k}", arrays) for k, x in tree.items()}
    if isinstance(tree, list | tuple):
        return [apart(x, f"{name}.{i}", arrays) for i, x in enumerate(tree)]
    if ops.is_array(tree):
        arrays[name], tree = tree, ARRAY
    return tree


def whole(tree, name, arrays):
    """The inverse of apart."""
    if isinstance(tree, dict):
        return {k: whole(x, f"{name}.{k}", arrays) for k, x in tree.items()}
    if isinstance(tree, list):
        return [whole(x, f"{name}.{i}", arrays) for i, x in enumerate(tree)]
    return arrays[name] if tree == ARRAY else tree


def common(*texts):
    """So many first tokens are the same in all."""
    return sum(1 for _ in takewhile(lambda same: len(set(same)) == 1, zip(*texts)))


def resume(path, session, tokenizer, tokens):
    """Let the session remember what the file and the prompt `tokens` share, but for the prompt's last token, which has to be read. Raises
    Refused where a memory has forgotten and cannot go back to it. Returns how many tokens need not be read."""
    held, state = load(path, session, tokenizer)
    n = min(common(held, tokens), len(tokens) - 1)
    if n < len(held):
        cut = [memory.cut(s, n) for memory, s in zip(session.memories, state["layers"])]
        if n and None in cut:
            what = f"{path} holds {len(held)} tokens, of which this prompt begins with {n}, and --memory {session.model.config.memory}"
            raise Refused(f"{what} cannot go back to them: give --cache another name, or a prompt that begins with all of them")
        state = {**state, "next": n, "layers": cut}
    if n:
        session.resume(tokens[:n], state)
    return n
