"""Vocabularies in other formats, turned into tokenizer.json: a GGUF's key/values, and Meta Llama 3's tokenizer.model."""

import base64
import json
from pathlib import Path

from tokenizers import Tokenizer as Backend

from errors import Refused


def byte_alphabet():
    """GPT-2's spelling of the 256 bytes as printable characters, by byte (openai/gpt-2 encoder.py)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    spelled = {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(rest)}}
    return [spelled[b] for b in range(256)]


BYTE_OF = {c: b for b, c in enumerate(byte_alphabet())}


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> (are digits split one by one first?, the pattern that splits words); llama.cpp src/llama-vocab.cpp
PRE = {
    **dict.fromkeys(["gpt-2", "default", "phi-2", "olmo", "mpt"], (False, GPT2)),
    **dict.fromkeys(["smollm", "starcoder", "refact", "command-r", "codeshell"], (True, GPT2)),
    **dict.fromkeys(["llama-bpe", "llama3", "llama-v3", "falcon3"], (False, LLAMA3)),
    **dict.fromkeys(["qwen2", "deepseek-r1-qwen"], (False, LLAMA3.replace("{1,3}", ""))),
    "tekken": (False, TEKKEN),
}
# these look a whole word up before they merge anything, and begin a text with bos unless told otherwise (llama.cpp)
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type, as in sentencepiece


def from_gguf(metadata, folder):
    """A GGUF's vocabulary as tokenizer.json and tokenizer_config.json in folder, for `load` and for transformers.

    metadata: the file's key/values as plain Python values. Returns {"bos_token_id": int or None, "eos_token_id": [ints]} for
    the model's config: GGUF files know tokens that end a turn (eot) beside the one that ends a text. Raises Refused, with
    nothing written, for a kind of vocabulary that is not known.
    """
    get = lambda key, otherwise=None: metadata.get("tokenizer.ggml." + key, otherwise)
    kind, pre, tokens = get("model"), get("pre", "default"), get("tokens")
    if kind not in ("gpt2", "llama") or not tokens:
        raise Refused(f"this GGUF's vocabulary is {kind!r}: only 'gpt2' (byte-level BPE) and 'llama' (sentencepiece) are known")
    if kind == "gpt2" and pre not in PRE:
        raise Refused(f"this GGUF splits words in the manner of {pre!r}: known are {', '.join(sorted(PRE))}")
    types = get("token_type") or [NORMAL] * len(tokens)
    added = [(i, t, types[i] == CONTROL) for i, t in enumerate(tokens) if types[i] in (CONTROL, USER_DEFINED)]
    bos, eos = get("bos_token_id"), get("eos_token_id")
    whole = kind == "gpt2" and pre in WHOLE_WORDS
    adds_bos = bool(get("add_bos_token", kind == "llama" or whole)) and bos is not None
    if kind == "gpt2":
        digits, words = PRE[pre]
        merges = [m.split(" ") for m in get("merges", [])]
        spec = byte_level(tokens, merges, words, digits, whole, bool(get("add_space_prefix", False)))
        spec["normalizer"] = {"type": "NFC"} if "qwen" in pre else None
    else:
        unknown = next((t for t, kind in zip(tokens, types) if kind == UNKNOWN), None)
        added += [(i, t, True) for i, t in enumerate(tokens) if t == unknown]
        merges = score_merges(tokens, get("scores"), types)
        spec = sentencepiece_like(tokens, merges, unknown, bool(get("add_space_prefix", True)))
    named = {f"{n}_token": get(f"{k}_token_id") for n, k in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))}
    named = {name: tokens[i] for name, i in named.items() if i is not None and i < len(tokens)}
    write(folder, spec, sorted(added), named, adds_bos, metadata.get("tokenizer.chat_template"))
    ends = [i for i in (eos, get("eot_token_id"), get("eom_token_id")) if i is not None]
    return {"bos_token_id": bos, "eos_token_id": list(dict.fromkeys(ends))}


def from_tiktoken(path, folder):
    """Meta Llama 3's tokenizer.model as tokenizer.json and tokenizer_config.json in folder; returns ids as `from_gguf` does.

    The file's lines are `base64(token) rank`, the rank being the id; 256 special tokens follow (Llama 3.1's names, of which
    Llama 3's are a part). Raises Refused for any other file.
    """
    ranks = {}
    for n, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise Refused(f"{path}, line {n} is not 'base64 rank': give the tokenizer.model that Meta ships with Llama 3") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
        raise Refused(f"{path} is incomplete: ranks must count from 0 without gaps and every single byte must be there")
    spell = byte_alphabet()
    text = {token: "".join(spell[b] for b in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        # tiktoken joins whichever neighbours make the token of lowest rank, so every way to make it is a merge of that rank
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += [[text[a], text[b]] for a, b in sorted(pairs, key=lambda p: (ranks[p[0]], ranks[p[1]]))]
    n = len(ranks)
    spec = byte_level(sorted(text.values(), key={text[t]: r for t, r in ranks.items()}.get), merges, LLAMA3, whole=True)
    named = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    write(folder, spec, [(n + i, token, True) for i, token in enumerate(llama3_specials())], named, True, None)
    return {"bos_token_id": n, "eos_token_id": [n + 1, n + 8, n + 9]}


def llama3_specials():
    """The 256 special tokens of Llama 3.1, in order of id (meta-llama/llama-models tokenizer.py)."""
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(248)]
    first = ["<|begin_of_text|>", "<|end_of_text|>", *reserved[:2], "<|finetune_right_pad_id|>", reserved[2]]
    first += ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
    return first + reserved[3:]


def byte_level(tokens, merges, words, digits=False, whole=False, prefix=False):
    """tokenizer.json of a byte-level BPE: `words` is the pattern that splits text before any merge."""
    steps = [{"type": "Digits", "individual_digits": True}] if digits else []
    steps += [{"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}]
    level = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": False}
    if words == GPT2:
        # the library has this one built in
        steps, level["use_regex"] = steps[:-1], True
    model = {"type": "BPE", "fuse_unk": False, "byte_fallback": False, "ignore_merges": whole}
    model |= {"vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges}
    return {"model": model, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, level]}, "decoder": level}


def sentencepiece_like(tokens, merges, unknown, prefix):
    """tokenizer.json of a sentencepiece BPE with byte fallback, shaped as Llama 2's."""
    front = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    model = {"type": "BPE", "unk_token": unknown, "fuse_unk": True, "byte_fallback": True}
    model |= {"vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges}
    normalizer = {"type": "Sequence", "normalizers": [*front, space]}
    return {"model": model, "normalizer": normalizer, "decoder": {"type": "Sequence", "decoders": decoders}}


def score_merges(tokens, scores, types):
    """Sentencepiece joins whichever neighbours make the piece of highest score: the pairs, best first.

    Control, unknown, byte and unused pieces are never made from text, or a user could spell them.
    """
    score = {t: s for t, s, kind in zip(tokens, scores, types) if kind in (NORMAL, USER_DEFINED)}
    merges = []
    for token in sorted(score, key=score.get, reverse=True):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in score and token[i:] in score]
        merges += map(list, sorted(pairs, key=lambda p: (score[p[0]], score[p[1]]), reverse=True))
    return merges


def write(folder, spec, added, named, adds_bos, template):
    """Write tokenizer.json and tokenizer_config.json. added: (id, text, special); named: {"bos_token": text, ...}."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec = {"version": "1.0", "truncation": None, "padding": None, **{"normalizer": None, "pre_tokenizer": None}, **spec}
    spec["added_tokens"] = [{"id": i, "content": t, **flags, "special": s} for i, t, s in added]
    begin = named.get("bos_token")
    if adds_bos:
        piece = lambda name, n: {name: {"id": n, "type_id": 0}}
        single, pair = [piece("Sequence", "A")], [piece("Sequence", "A"), piece("Sequence", "B")]
        front = [piece("SpecialToken", begin)]
        ids = {begin: {"id": begin, "ids": [i for i, t, _ in added if t == begin], "tokens": [begin]}}
        spec["post_processor"] = {"type": "TemplateProcessing", "single": front + single, "pair": front + pair, "special_tokens": ids}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": adds_bos, "clean_up_tokenization_spaces": False, **named}
    config |= {"chat_template": template} if template else {}
    try:
        Backend.from_str(json.dumps(spec))
    except Exception as no:  # the library raises a bare Exception
        raise Refused(f"this vocabulary cannot be made a tokenizer ({no}): get the model's own tokenizer.json") from None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("tokenizer.json", spec), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
