"""Long texts to token streams: tokenise documents once (sources.py finds them), lay them end to end and cut rows of any length.

    corpus = Corpus.build(paths, tokenizer, cache_dir)
    batches = Batches(corpus, batch=4, length=65536, seed=0)
    batch = batches.next()                    # tokens, targets, begin [B, T] int32

A row holds pieces of several documents. `begin` keeps them apart: a token may see back to begin, and no further. Nothing is held in
memory but a document's number, and of a text only some million characters at a time.
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from errors import Refused
from sources import absolute, default_corpus, documents, expand, split, stamp, streams

__all__ = ["Batch", "Batches", "Corpus", "absolute", "default_corpus", "documents", "encode", "expand", "split"]

FORMAT = 2  # of the cache: raise it when what is written, or how texts are found and ended, changes
NONE = -1  # the target of a token that has no next one; in padding, the token too


def encode(tokenizer, text, bos=None):
    """The ids (int32) of a document as `documents` gives it: a text, or a conversation, which is what the tokenizer's chat template makes
    of it; where it has none, each message after its role and a colon."""
    if isinstance(text, list) and tokenizer.has_chat:
        return tokenizer.chat(text, generate=False)
    said = text if isinstance(text, str) else "\n\n".join(f"{m['role']}: {m['content']}" for m in text)
    return tokenizer.encode(said, bos)


class Names(Sequence):
    """Strings in a file, read one at a time. raw: uint8 [bytes]; ends: int64 [D], where each one ends."""

    def __init__(self, raw, ends):
        self.raw, self.ends = raw, ends

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, d):
        d = range(len(self))[d]
        return self.raw[self.ends[d - 1] if d else 0 : self.ends[d]].tobytes().decode()

    def __eq__(self, other):
        return list(self) == list(other)

    __hash__ = None


class Corpus:
    """Tokenised documents, one after the other, on disk.

    tokens    uint16 or uint32 [N], a memory map; every document ends with the tokenizer's eos
    offsets   int64 [D + 1], a memory map: document d is tokens[offsets[d] : offsets[d + 1]]
    names     [D] str, for reports; a Names
    origin    int32 [D], a memory map: which of the sources it was built from a document is of
    skipped   paths that held no UTF-8 text
    """

    FILES = ("tokens", "offsets", "names", "ends", "origin")

    def __init__(self, tokens, offsets, names, skipped=(), origin=None):
        self.tokens, self.offsets = tokens, np.asarray(offsets, np.int64)
        self.names, self.skipped = names, list(skipped)
        self.origin = np.zeros(len(names), np.int32) if origin is None else origin

    @classmethod
    def build(cls, paths, tokenizer, cache_dir):
        """Tokenise what `streams` finds, or take it from the cache.

        The cache depends on the tokenizer and on every file's path, size and time, never on how rows will be cut. A text passes
        through in pieces, if the tokenizer's `pieces` can cut it. Raises Refused as `streams` does, or if the tokenizer has no eos.
        """
        if tokenizer.eos_id is None:
            raise Refused("this tokenizer has no eos token to end a document with: name one as eos_token in tokenizer_config.json")
        sources = expand(paths)
        stamps = [stamp(s) for s in sources]
        key = hashlib.sha256(repr((FORMAT, tokenizer.fingerprint, tokenizer.template, stamps)).encode()).hexdigest()[:24]
        place = Path(cache_dir) / key
        corpus = cls.open(place)
        if corpus is None:
            # written beside and renamed when complete: nobody ever reads half a cache
            fresh = place.with_name(f"{key}.{os.getpid()}")
            try:
                cls.write(fresh, sources, tokenizer, sum(size for *_, facts in stamps for _, size, _ in facts))
                if cls.open(place) is None:
                    shutil.rmtree(place, ignore_errors=True)
                    os.rename(fresh, place)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
            corpus = cls.open(place)
        return corpus

    @classmethod
    def write(cls, place, sources, tokenizer, size):
        place.mkdir(parents=True, exist_ok=True)
        dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        skipped, crc, end, ends = [], dict.fromkeys(cls.FILES, 0), 0, 0

        with ExitStack() as stack:
            out = {name: stack.enter_context((place / name).open("wb")) for name in cls.FILES}
            bar = stack.enter_context(tqdm(total=size, unit="B", unit_scale=True, desc="tokenising", leave=False))

            def put(name, data):
                out[name].write(data)
                crc[name] = zlib.crc32(data, crc[name])

            def counted(text):
                for chunk in text:
                    bar.update(len(chunk.encode()))
                    yield chunk

            put("offsets", np.int64(0).tobytes())
            for i, name, text in streams(sources, skipped):
                for ids in [encode(tokenizer, text)] if isinstance(text, list) else tokenizer.pieces(counted(text)):
                    put("tokens", ids.astype(dtype).tobytes())
                    end += len(ids)
                put("tokens", np.array(tokenizer.eos_id, dtype).tobytes())
                end, ends = end + 1, ends + len(name.encode())
                put("offsets", np.int64(end).tobytes())
                put("names", name.encode())
                put("ends", np.int64(ends).tobytes())
                put("origin", np.int32(i).tobytes())
                bar.set_postfix(tokens=end, refresh=False)
        about = {"dtype": dtype.name, "crc": crc, "skipped": skipped}
        (place / "about.json").write_text(json.dumps(about), encoding="utf-8")

    @classmethod
    def open(cls, place):
        """The Corpus in a cache folder; None where there is none, or a damaged one."""
        try:
            about = json.loads((place / "about.json").read_text(encoding="utf-8"))
            kinds = {"tokens": about["dtype"], "offsets": np.int64, "names": np.uint8, "ends": np.int64, "origin": np.int32}
            found = {name: np.memmap(place / name, kinds[name], mode="r") for name in cls.FILES}
            for name, array in found.items():
                crc = 0
                for at in range(0, len(array), 1 << 24):
                    crc = zlib.crc32(array[at : at + (1 << 24)], crc)
                if crc != about["crc"][name]:
                    return None
            return cls(found["tokens"], found["offsets"], Names(found["names"], found["ends"]), about["skipped"], found["origin"])
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            return None

    def __len__(self):
        return len(self.names)

    def report(self):
        """One line on how long the documents are, in tokens."""
        sizes = np.diff(self.offsets)
        median, longest = (int(np.median(sizes)), int(sizes.max())) if len(sizes) else (0, 0)
        missing = f"; {len(self.skipped)} files skipped, not UTF-8 text" if self.skipped else ""
        return f"{len(self):,} documents, {int(sizes.sum()):,} tokens: median {median:,}, longest {longest:,}{missing}"

    def fitness(self, length, draws=None):
        """(a line on how the documents' lengths lie to rows of `length` tokens, the share of tokens with half a row of their own document
        before them). draws: see `draws`. Half of a row's tokens at most can have that much in their row, and do in endless documents."""
        sizes, half = np.diff(self.offsets), length // 2
        weight = np.ones(len(sizes)) if draws is None else draws
        total = max(1, (weight * sizes).sum())
        long = (weight * sizes)[sizes >= length].sum() / total
        past = (weight * np.maximum(sizes - half, 0)).sum() / total
        tenths = ", ".join(f"{q}%: {int(x):,}" for q, x in zip((10, 50, 90, 99), np.quantile(sizes, (0.1, 0.5, 0.9, 0.99))))
        drawn = "" if draws is None else ", as they are drawn,"
        line = f"documents by length in tokens: {tenths}; {long:.0%} of all tokens{drawn} are in documents of {length:,} or more"
        return f"{line}, and {past:.0%} have {half:,} of their document before them", past

    def draws(self, length, times, part=None):
        """How often an epoch draws each document, float64 [D], if those of at least `length` tokens are upsampled.

        Within a part, documents of at least `length` tokens are drawn `times` as often as the others; each part keeps its share of the
        tokens (per-source length upsampling, Fu et al. 2024, arXiv:2402.10171), and no document is drawn less than once. part: int [D],
        which part a document is of; None: all are of one, whose long documents are drawn `times` times and the others once.
        Of a part with N tokens, L of them in long documents: U = N + (times - 1) L, and g = max over parts of U / N, over its own U / N.
        """
        sizes = np.diff(self.offsets)
        part = np.zeros(len(sizes), int) if part is None else part
        want = np.where(sizes >= length, float(times), 1.0)
        grown = np.bincount(part, want * sizes) / np.maximum(np.bincount(part, sizes), 1)
        return want * (grown.max() / grown[part])


class Batch(NamedTuple):
    """tokens, targets, begin: int32 [B, T]. names: for each row the documents in it.

    targets   the next token of the same document, also across the end of a row; -1 at a document's last token
    begin     where in the row the token's own document starts; 0 if it goes on from the row before
    """

    tokens: np.ndarray
    targets: np.ndarray
    begin: np.ndarray
    names: list


class Batches:
    """Rows of `length` tokens for ever: documents in a new order each epoch, end to end, epoch after epoch.

    The order depends on seed, epoch and draws alone, so `state()` is a handful of ints, and `restore` gives exactly the batches that
    would have followed; batch and length may be set anew at any time (a length curriculum). draws: how often an epoch draws each
    document (Corpus.draws), float [D]; what is over a whole number is drawn once more by chance. Raises Refused for an empty corpus.
    """

    def __init__(self, corpus, batch, length, seed=0, shuffle=True, draws=None):
        if not len(corpus):
            raise Refused("the corpus has no document: name files that hold text")
        if batch < 1 or length < 1:
            raise Refused(f"a batch of {batch} rows of {length} tokens is empty: both must be at least 1")
        self.corpus, self.batch, self.length, self.seed, self.shuffle, self.draws = corpus, batch, length, seed, shuffle, draws
        self.place = (0, 0, 0)  # epoch, how many documents into it, how many tokens into that document
        self.known = None, None

    def next(self):
        """The next Batch."""
        rows = []
        for _ in range(self.batch):
            row, self.place = self.row(self.place)
            rows.append(row)
        return stack(rows)

    def one_epoch(self, max_rows=None):
        """Iterate over the Batches of the first epoch, the same ones every time and wherever `next` has got to.

        max_rows: stop after so many rows. What is missing in the last row and in the last batch is padding: tokens and
        targets are -1, and begin keeps it apart from every document.
        """
        rows, place, done = [], (0, 0, 0), 0
        while place[0] == 0 and (max_rows is None or done < max_rows):
            row, place = self.row(place, only=0)
            rows, done = [*rows, row], done + 1
            if len(rows) == self.batch:
                yield stack(rows)
                rows = []
        if rows:
            yield stack(rows + [self.blank()] * (self.batch - len(rows)))

    def state(self):
        """Where the stream stands, as ints."""
        return dict(zip(("epoch", "document", "token"), self.place)) | {"seed": self.seed, "tokens": int(self.corpus.offsets[-1])}

    def restore(self, state):
        """Go on from `state()`. Raises Refused if it was taken with another seed or corpus."""
        if (state["seed"], state["tokens"]) != (self.seed, int(self.corpus.offsets[-1])):
            mine, its = f"seed {self.seed}, {self.corpus.offsets[-1]} tokens", f"seed {state['seed']}, {state['tokens']} tokens"
            raise Refused(f"the run to resume read other data ({its}) than this one ({mine}): resume with the same texts and seed")
        self.place = state["epoch"], state["document"], state["token"]

    def restart(self):
        """Back to the first token of the first epoch."""
        self.place = (0, 0, 0)

    def order(self, epoch):
        """The documents of an epoch in order, int [D], or as many as are drawn."""
        if self.known[0] != epoch:
            random, which = np.random.default_rng([self.seed, epoch]), np.arange(len(self.corpus))
            if self.draws is not None:
                whole = np.floor(self.draws)
                which = np.repeat(which, (whole + (random.random(len(which)) < self.draws - whole)).astype(int))
            self.known = epoch, random.permutation(which) if self.shuffle else which
        return self.known[1]

    def blank(self):
        return np.full(self.length, NONE, np.int32), np.full(self.length, NONE, np.int32), np.zeros(self.length, np.int32), []

    def row(self, place, only=None):
        """One row from `place` on, within epoch `only` if given -> ((tokens, targets, begin, names), the place after it)."""
        corpus, (epoch, rank, inside) = self.corpus, place
        tokens, targets, begin, names = self.blank()
        at = 0
        while at < self.length and only in (None, epoch):
            order = self.order(epoch)
            d = order[rank]
            first, end = corpus.offsets[d] + inside, corpus.offsets[d + 1]
            n = int(min(self.length - at, end - first))
            # one more than the row takes: the last token's target
            piece = corpus.tokens[first : min(first + n + 1, end)]
            tokens[at : at + n] = piece[:n]
            targets[at : at + len(piece) - 1] = piece[1:]
            begin[at : at + n] = at
            names.append(corpus.names[d])
            at, inside = at + n, inside + n
            if first + n == end:
                rank, inside = rank + 1, 0
            if rank == len(order):
                epoch, rank = epoch + 1, 0
        begin[at:] = at
        return (tokens, targets, begin, names), (epoch, rank, inside)


def stack(rows):
    tokens, targets, begin, names = zip(*rows)
    return Batch(np.stack(tokens), np.stack(targets), np.stack(begin), list(names))
