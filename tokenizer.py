"""Text to token ids and back: byte-level BPE (GPT-2, Llama 3, SmolLM2) and sentencepiece (Llama 2), from a model's own files.

tok = load(folder)                        # tokenizer.json, else a sentencepiece tokenizer.model
ids = tok.encode(text)                    # int32 [N]
text = tok.decode(ids)                    # what a stream() of the same ids gives, piece by piece
ids = tok.chat([{"role": "user", "content": "Hello"}])

from_gguf(metadata, folder)               # a GGUF's vocabulary     -> tokenizer.json, tokenizer_config.json
from_tiktoken(tokenizer_model, folder)    # Meta Llama 3's own file -> the same
"""

import codecs
import functools
import hashlib
import json
import re
from datetime import datetime
from pathlib import Path

import jinja2
import jinja2.ext
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as Backend

from errors import Refused
from vocabulary import BYTE_OF, from_gguf, from_tiktoken

__all__ = ["FILES", "Stream", "Tokenizer", "from_gguf", "from_tiktoken", "load"]

# everything that a model folder says about its tokenizer, to be copied along with the weights
FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)

PIECE = 1 << 16  # characters encoded at a time
# Unicode noncharacters: no text has a use for them, so they can mark what the user wrote inside a rendered chat
OPEN, CLOSE = "\ufdd0", "\ufdd1"


def load(folder):
    """The Tokenizer of a model folder. Raises Refused when there is none or its files cannot be read."""
    return Tokenizer(folder)


def read_json(path):
    """The dict in a JSON file, {} if there is no such file. Raises Refused when it holds something else."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as no:
        raise Refused(f"{path} is not valid JSON ({no}): fetch it again from the model's source") from None
    if not isinstance(found, dict):
        raise Refused(f"{path} holds a {type(found).__name__} where a JSON object is expected: fetch it again from the model's source")
    return found


def read_settings(folder):
    """What the small files beside a vocabulary say: special tokens (name to text), chat template, bos and eos ids, add_bos."""
    found = {**read_json(folder / "special_tokens_map.json"), **read_json(folder / "tokenizer_config.json")}
    models = [read_json(folder / name) for name in ("config.json", "generation_config.json")]
    template = found.get("chat_template")
    if isinstance(template, list):
        named = {t["name"]: t["template"] for t in template}
        template = named.get("default", next(iter(named.values()), None))
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    # a special token is its text, or {"content": text, ...}, or null
    tokens = {k: v["content"] if isinstance(v, dict) else v for k, v in found.items() if k.endswith("_token")}
    tokens = {k: v for k, v in tokens.items() if v is None or isinstance(v, str)}
    # an id, a list of ids, or null
    every = lambda key: [i for m in models for i in (m[key] if isinstance(m.get(key), list) else [m.get(key)]) if type(i) is int]
    bos_ids, eos_ids = every("bos_token_id"), every("eos_token_id")
    return {"template": template, "tokens": tokens, "bos_ids": bos_ids, "eos_ids": eos_ids, "add_bos": found.get("add_bos_token")}


class Fast:
    """A tokenizer.json, run by the `tokenizers` library."""

    def __init__(self, path, settings):
        spec = read_json(path)
        ends = {settings["tokens"].get("bos_token"), settings["tokens"].get("eos_token")}
        try:
            added = {t["id"]: t for t in spec.get("added_tokens") or []}
            for token in added.values():
                # some files forget to flag the token that ends a turn, and a user's text could then write it
                token["special"] = token["special"] or token["content"] in ends
            self.run = Backend.from_str(json.dumps({**spec, "truncation": None, "padding": None}))
        except Exception as no:  # the library raises a bare Exception
            raise Refused(f"{path} is not a tokenizer ({no}): fetch it again from the model's source") from None
        decoder = json.dumps(spec.get("decoder"), ensure_ascii=False)
        self.byte_level = '"ByteLevel"' in decoder
        if not self.byte_level and "▁" not in decoder:
            raise Refused(f"{path} is neither byte-level BPE nor sentencepiece: give the tokenizer of a Llama model")
        self.special = {i: t["content"] for i, t in added.items() if t["special"]}
        self.table = [b""] * (1 + max(self.run.get_vocab(with_added_tokens=True).values()))
        for token, i in self.run.get_vocab(with_added_tokens=True).items():
            self.table[i] = added[i]["content"].encode() if i in added else self.spell(token)
        self.strip = not self.byte_level and ('"Strip"' in decoder or ('"Metaspace"' in decoder and '"never"' not in decoder))
        self.begins = self.run.encode("", add_special_tokens=True).ids[:1]
        self.cut = self.safe_cut(spec, added)
        # does a text right after a special token get sentencepiece's space in front, as a text at the beginning does?
        mark = next(iter(self.special.values()), "")
        self.same_after = self.byte_level or self.ids([mark + "x"], special=True)[0][1:] == self.ids(["x"])[0]

    def spell(self, token):
        """The bytes that a vocabulary entry stands for."""
        if self.byte_level and all(c in BYTE_OF for c in token):
            return bytes(BYTE_OF[c] for c in token)
        return token.encode() if self.byte_level else piece_bytes(token)

    def safe_cut(self, spec, added):
        """Where a long text may be cut so that the parts' tokens, joined, are the whole's: a regex, or None.

        Before a space that follows a visible character: no token of the vocabulary reaches over such a place (checked here,
        token by token), so no merge does, and the patterns that split words look ahead only from white space. Byte-level
        vocabularies may also be cut after a lone newline before a letter, for scripts without spaces. Sentencepiece puts a
        space in front of whatever it is given, so there the regex matches the space, and the cut swallows it.
        A vocabulary that fails is never cut.
        """
        kinds = set(re.findall(r'"type": "(\w+)"', json.dumps(spec.get("normalizer"))))
        over = re.compile(r"[^\s\ufffd] |\n[^\W_]" if self.byte_level else r"[^\s\ufffd] ")
        reaches = any(over.search(token.decode("utf-8", "replace")) for token in self.table)
        if reaches or not kinds <= {"Sequence", "Prepend", "Replace", "NFC"} or any(t.get("rstrip") for t in added.values()):
            return None
        if self.byte_level:
            return re.compile(r"(?<=\S)(?= )|(?<=\S\n)(?=[^\W_])")
        one, two = self.ids(["x", "x x"])
        return re.compile(r"(?<=[^\s▁]) (?=[^\s▁])") if one + one == two else None

    def find(self, token):
        return self.run.token_to_id(token)

    def ids(self, texts, special=False):
        self.run.encode_special_tokens = not special
        return [e.ids for e in self.run.encode_batch_fast(texts, add_special_tokens=False)]


class SentencePiece:
    """A tokenizer.model, run by the `sentencepiece` library, which is quick on long texts and never parses special tokens."""

    byte_level, same_after, strip, cut = False, False, True, None

    def __init__(self, path):
        import sentencepiece

        with open(path, "rb") as file:
            if re.match(rb"[A-Za-z0-9+/=]+ \d+\n", file.read(1024)):
                raise Refused(f"{path} is Meta's Llama 3 vocabulary: turn it into a tokenizer.json first, with convert.py")
        try:
            self.run = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise Refused(f"{path} is not a sentencepiece model: fetch it again from the model's source") from None
        every = range(self.run.get_piece_size())
        self.special = {i: self.run.id_to_piece(i) for i in every if self.run.is_control(i) or self.run.is_unknown(i)}
        self.table = [piece_bytes(self.run.id_to_piece(i)) for i in every]
        self.begins = [self.run.bos_id()]

    def find(self, token):
        found = self.run.piece_to_id(token)
        return found if self.run.id_to_piece(found) == token else None

    def ids(self, texts, special=False):
        return self.run.encode(texts)


def piece_bytes(piece):
    """The bytes of a sentencepiece entry: <0xNN> is a byte, ▁ is a space."""
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


class Tokenizer:
    """A model's tokenizer. Made by `load`.

    vocab_size    the largest id + 1
    bos_id        the id that begins a text, or None
    eos_id        the id that ends a document: the one named eos_token, else the first in config.json; or None
    eos_ids       every id that ends one (frozenset): a chat model has several
    fingerprint   a hash of what decides the ids of a text: the key for caches of tokens
    """

    def __init__(self, folder):
        folder = Path(folder)
        settings = read_settings(folder)
        fast, pieces = folder / "tokenizer.json", folder / "tokenizer.model"
        if not fast.is_file() and not pieces.is_file():
            raise Refused(f"{folder} has no tokenizer: put the model's tokenizer.json (or sentencepiece tokenizer.model) there")
        self.folder, self.template, self.tokens = folder, settings["template"], settings["tokens"]
        self.run = Fast(fast, settings) if fast.is_file() else SentencePiece(pieces)
        self.vocab_size = len(self.run.table)
        self.special_ids = {text: i for i, text in self.run.special.items()}
        self.bos_id = self.id_of("bos_token", settings["bos_ids"])
        self.eos_id = self.id_of("eos_token", settings["eos_ids"])
        self.eos_ids = frozenset(i for i in [self.eos_id, *settings["eos_ids"]] if i is not None and 0 <= i < self.vocab_size)
        wanted = settings["add_bos"]
        self.adds_bos = self.bos_id is not None and (self.run.begins == [self.bos_id] if wanted is None else wanted)
        digest = hashlib.sha256((fast if fast.is_file() else pieces).read_bytes())
        digest.update(repr((self.bos_id, self.eos_id, self.adds_bos)).encode())
        self.fingerprint = digest.hexdigest()[:32]

    def id_of(self, name, otherwise):
        """The id of a named special token; where the tokenizer's own files do not name one, the first of `otherwise`."""
        if name not in self.tokens:
            if isinstance(self.run, SentencePiece):
                otherwise = [getattr(self.run.run, name.replace("token", "id"))()]
            return next((i for i in otherwise if 0 <= i < self.vocab_size), None)
        text = self.tokens[name]
        found = None if text is None else self.special_ids.get(text, self.run.find(text))
        if text is not None and found is None:
            raise Refused(f"{self.folder}: tokenizer_config.json names {text!r} as {name}, but the vocabulary has no such token")
        return found

    def encode(self, text, bos=None, special=False):
        """int32 [N]. bos: begin with the bos id; None does what the model's own tokenizer does. Raises Refused if it has none.

        special=True reads special tokens written in the text, as a chat template writes them; with False "<|im_end|>" is
        ten characters like any others, so a document or a user cannot end a turn. Long texts are cut where it is safe and
        encoded in parallel.
        """
        if special and isinstance(self.run, SentencePiece):
            return np.asarray(self.head(bos) + self.parse(text, self.specials()), np.int32)
        return np.concatenate([np.zeros(0, np.int32), *self.pieces([text], bos, special)])

    def pieces(self, chunks, bos=None, special=False):
        """The ids of `encode`, int32 arrays one after the other, of a text that comes as an iterable of strings.

        What is held at a time is a chunk and the ids of some million characters, or the whole text if this vocabulary may not be cut
        (`run.cut` is None: sentencepiece's own tokenizer.model, and a tokenizer.json whose tokens reach over spaces).
        """
        yield np.asarray(self.head(bos), np.int32)
        rest, cut, chunks = "", self.run.cut, iter(chunks)
        if cut is None:
            rest, chunks = "".join(chunks), iter(())
        while True:
            group, done, chunk = [], 0, next(chunks, None)
            rest += chunk or ""
            while cut and len(rest) - done > 2 * PIECE and (found := cut.search(rest, done + PIECE)):
                group.append(rest[done : found.start()])
                # sentencepiece puts back the space that the cut swallows
                done = found.end()
                # a group at a time bounds the memory: the library holds far more than an id per token
                if len(group) == 64:
                    yield from self.encoded(group, special)
                    group = []
            rest = rest[done:]
            if chunk is None and rest:
                group.append(rest)
            if group:
                yield from self.encoded(group, special)
            if chunk is None:
                return

    def head(self, bos):
        """The ids that a text begins with."""
        if bos and self.bos_id is None:
            raise Refused(f"the tokenizer in {self.folder} has no bos token: encode without bos")
        return [self.bos_id] if (self.adds_bos if bos is None else bos) else []

    def encoded(self, texts, special):
        return (np.asarray(ids, np.int32) for ids in self.run.ids(texts, special))

    def specials(self):
        """Matches any special token; longer ones first, so none hides behind its own beginning."""
        return "|".join(map(re.escape, sorted(self.special_ids, key=len, reverse=True))) or r"(?!)"

    def parse(self, text, pattern):
        """The ids (list) of a text in which what `pattern` matches are special tokens, and everything else is plain text."""
        ids, done = [], 0
        for found in [*re.finditer(pattern, text), None]:
            plain = re.sub(f"[{OPEN}{CLOSE}]", "", text[done : found.start() if found else None])
            if not ids or self.run.same_after:
                ids += self.encode(plain, bos=False).tolist()
            elif plain:
                # after a special token sentencepiece sees no beginning of a text: let a newline take the space in front
                line, both = self.encode("\n", bos=False).tolist(), self.encode("\n" + plain, bos=False).tolist()
                ids += both[len(line) :] if both[: len(line)] == line else self.encode(plain, bos=False).tolist()
            if found:
                ids.append(self.special_ids[found[0]])
                done = found.end()
        return ids

    def decode(self, ids, special=False):
        """The text of ids; special tokens are left out unless special=True. Bytes that are no UTF-8 become U+FFFD."""
        stream = self.stream(special)
        return "".join([stream.push(i) for i in np.asarray(ids).reshape(-1).tolist()]) + stream.flush()

    def stream(self, special=False):
        """A Stream: the same text as `decode`, as the ids arrive."""
        return Stream(self, special)

    @property
    def has_chat(self):
        return self.template is not None

    @functools.cached_property
    def compiled(self):
        return chat_environment().from_string(self.template)

    def chat(self, messages, generate=True):
        """The ids (int32 [N]) of a conversation, [{"role": ..., "content": ...}, ...], through the model's own chat template.

        generate: end where the assistant begins to speak. The ids are transformers' apply_chat_template's, except that a
        special token spelled out in a message stays plain text. Raises Refused if there is no template, or it objects.
        """
        if not self.has_chat:
            raise Refused(f"the tokenizer in {self.folder} has no chat template: give plain text, or an instruction-tuned model")
        specials, named = self.specials(), {k: v for k, v in self.tokens.items() if v is not None}
        try:
            text = self.compiled.render(messages=mark(messages, specials), add_generation_prompt=generate, tools=None, **named)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as no:
            raise Refused(f"the chat template in {self.folder} refuses these messages: {no}") from None
        if OPEN not in text and CLOSE not in text:
            return self.encode(text, bos=False, special=True)
        return np.asarray(self.parse(text, f"(?<!{OPEN})(?:{specials})(?!{CLOSE})"), np.int32)


class Stream:
    """Text as the ids arrive, at a constant cost per id: the pushes and the flush, joined, are `decode` of all the ids."""

    def __init__(self, tokenizer, special):
        self.table, self.strip = tokenizer.run.table, tokenizer.run.strip
        self.silent = () if special else tokenizer.run.special
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token):
        """The text that this id completes, perhaps ""; a character still missing bytes waits. Raises Refused for an unknown id."""
        if not 0 <= token < len(self.table):
            raise Refused(f"token id {token} is outside of the vocabulary: ids go from 0 to {len(self.table) - 1}")
        return self.out(self.utf8.decode(b"" if token in self.silent else self.table[token]))

    def flush(self):
        """What is left at the end: U+FFFD for a character that never became complete, or ""."""
        return self.out(self.utf8.decode(b"", final=True))

    def out(self, text):
        # sentencepiece put a space in front of the text: take it back, once
        if self.strip and text:
            text, self.strip = text.removeprefix(" "), False
        return text


def mark(value, specials):
    """The same messages with every special token inside them between OPEN and CLOSE."""
    if isinstance(value, str):
        return re.sub(specials, rf"{OPEN}\g<0>{CLOSE}", re.sub(f"[{OPEN}{CLOSE}]", "", value))
    if isinstance(value, dict):
        return {k: mark(v, specials) for k, v in value.items()}
    return [mark(v, specials) for v in value] if isinstance(value, list | tuple) else value


class Generation(jinja2.ext.Extension):
    """{% generation %} marks what the assistant said, for training on it alone; in a prompt it is only its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def chat_environment():
    """Jinja as chat templates expect it from transformers; sandboxed, for a template is a stranger's code."""

    def objects(message):
        raise jinja2.TemplateError(message)

    # jinja's own tojson escapes HTML
    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    env.filters["tojson"] = tojson
    env.globals.update(raise_exception=objects, strftime_now=lambda form: datetime.now().strftime(form))
    return env
