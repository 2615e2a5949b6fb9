"""Long texts to token streams: find documents, tokenise them once, lay them end to end and cut rows of any length.

    corpus = Corpus.build(paths, tokenizer, cache_dir)
    batches = Batches(corpus, batch=4, length=65536, seed=0)
    batch = batches.next()                    # tokens, targets, begin [B, T] int32

A row holds pieces of several documents. `begin` keeps them apart: a token may see back to begin, and no further.
"""

import glob
import hashlib
import json
import os
import shutil
import sysconfig
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from errors import Refused

FORMAT = 1  # of the cache: raise it when what is written, or how texts are found and ended, changes
NONE = -1  # the target of a token that has no next one; in padding, the token too


def expand(paths):
    """Files, folders and globs -> sorted files, each once, hidden ones left out. Raises Refused for a path that is not there."""
    found = {}
    for path in [paths] if isinstance(paths, str | os.PathLike) else paths:
        path = Path(path).expanduser()
        if path.is_file():
            here = [path]
        elif path.is_dir():
            here = sorted(p for p in path.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts))
        else:
            here = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
            if not here:
                raise Refused(f"{path} matches no file: give text files, folders, .jsonl files or a glob such as 'books/*.txt'")
        found |= dict.fromkeys(here)
    return list(found)


def documents(paths, skipped=None):
    """Iterate over (name, text), a document a file, or a line of a .jsonl file ({"text": ...}); empty ones are left out.

    Any file that is UTF-8 text counts, whatever its suffix. Others are left out and their paths appended to the list
    `skipped`, for the caller to report. Raises Refused for a bad line of a .jsonl file, and where there is no text at all.
    """
    files, skipped, empty = expand(paths), [] if skipped is None else skipped, True
    for path in files:
        for name, text in lines(path) if path.suffix == ".jsonl" else whole(path, skipped):
            if text:
                empty = False
                yield name, text
    if empty:
        raise Refused(f"no text in {len(files)} files, {len(skipped)} of them not UTF-8: give text files, or .jsonl with a field 'text'")


def whole(path, skipped):
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        skipped.append(str(path))
    else:
        yield str(path), text


def lines(path):
    with open(path, "rb") as file:
        for n, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise Refused(f'{path}, line {n}: every line must be a JSON object with its document in the field "text"')
            yield f"{path}:{n}", record["text"]


def default_corpus():
    """The sources of the running interpreter's standard library, sorted: long documents that are on every machine."""
    root = Path(sysconfig.get_path("stdlib"))
    leave = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = [p for p in sorted(root.rglob("*.py")) if not leave & set(p.relative_to(root).parts) and p.stat().st_size]
    if not files:
        raise Refused(f"this Python has no standard library sources in {root}: name your own text files")
    return files


def split(files, valid=0.05):
    """Files -> (train, valid): held out by a hash of the name below the common folder, so alike on every machine.

    valid: the share held out; at least one file goes each way. 0 holds out nothing. Raises Refused for a lone file.
    """
    files = [Path(f) for f in files]
    if not valid:
        return files, []
    if len(files) < 2 or not 0 < valid < 1:
        raise Refused(f"{len(files)} files cannot be split with a share of {valid}: give at least two files and a share between 0 and 1")
    root = Path(os.path.commonpath([f.absolute().parent for f in files]))
    name = lambda f: f.absolute().relative_to(root).as_posix()
    share = {f: int.from_bytes(hashlib.sha256(name(f).encode()).digest()[:8], "big") / 2**64 for f in files}
    ranked = sorted(files, key=lambda f: (share[f], name(f)))
    n = min(max(sum(s < valid for s in share.values()), 1), len(files) - 1)
    held = set(ranked[:n])
    return [f for f in files if f not in held], [f for f in files if f in held]


class Corpus:
    """Tokenised documents, one after the other, on disk.

    tokens    uint16 or uint32 [N], a memory map; every document ends with the tokenizer's eos
    offsets   int64 [D + 1]: document d is tokens[offsets[d] : offsets[d + 1]]
    names     [D] str, for reports
    skipped   paths that held no UTF-8 text
    """

    def __init__(self, tokens, offsets, names, skipped=()):
        self.tokens, self.offsets = tokens, np.asarray(offsets, np.int64)
        self.names, self.skipped = list(names), list(skipped)

    @classmethod
    def build(cls, paths, tokenizer, cache_dir):
        """Tokenise what `documents` finds, or take it from the cache.

        The cache depends on the tokenizer and on every file's path, size and time, never on how rows will be cut. One text
        at a time is held in memory. Raises Refused as `documents` does, or if the tokenizer has no eos.
        """
        if tokenizer.eos_id is None:
            raise Refused("this tokenizer has no eos token to end a document with: name one as eos_token in tokenizer_config.json")
        files = expand(paths)
        stats = [(str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        key = hashlib.sha256(repr((FORMAT, tokenizer.fingerprint, stats)).encode()).hexdigest()[:24]
        place = Path(cache_dir) / key
        corpus = cls.open(place)
        if corpus is None:
            # written beside and renamed when complete: nobody ever reads half a cache
            fresh = place.with_name(f"{key}.{os.getpid()}")
            try:
                cls.write(fresh, files, tokenizer, sum(size for _, size, _ in stats))
                if cls.open(place) is None:
                    shutil.rmtree(place, ignore_errors=True)
                    os.rename(fresh, place)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
            corpus = cls.open(place)
        return corpus

    @staticmethod
    def write(place, files, tokenizer, size):
        place.mkdir(parents=True, exist_ok=True)
        dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        offsets, names, skipped, crc = [0], [], [], 0
        with open(place / "tokens", "wb") as out, tqdm(total=size, unit="B", unit_scale=True, desc="tokenising", leave=False) as bar:
            for name, text in documents(files, skipped):
                data = np.append(tokenizer.encode(text), tokenizer.eos_id).astype(dtype).tobytes()
                out.write(data)
                crc = zlib.crc32(data, crc)
                offsets.append(offsets[-1] + len(data) // dtype.itemsize)
                names.append(name)
                bar.update(len(text.encode()))
                bar.set_postfix(tokens=offsets[-1], refresh=False)
        about = {"dtype": dtype.name, "crc": crc, "offsets": offsets, "names": names, "skipped": skipped}
        (place / "about.json").write_text(json.dumps(about), encoding="utf-8")

    @classmethod
    def open(cls, place):
        """The Corpus in a cache folder; None where there is none, or a damaged one."""
        try:
            about = json.loads((place / "about.json").read_text(encoding="utf-8"))
            tokens = np.memmap(place / "tokens", np.dtype(about["dtype"]), mode="r")
            crc = 0
            for at in range(0, len(tokens), 1 << 24):
                crc = zlib.crc32(tokens[at : at + (1 << 24)], crc)
            whole = len(tokens) == about["offsets"][-1] and crc == about["crc"] and len(about["names"]) == len(about["offsets"]) - 1
            return cls(tokens, about["offsets"], about["names"], about["skipped"]) if whole else None
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

    The order depends on seed and epoch alone, so `state()` is a handful of ints, and `restore` gives exactly the batches that
    would have followed; batch and length may differ from then on (a length curriculum). Raises Refused for an empty corpus.
    """

    def __init__(self, corpus, batch, length, seed=0, shuffle=True):
        if not len(corpus):
            raise Refused("the corpus has no document: name files that hold text")
        if batch < 1 or length < 1:
            raise Refused(f"a batch of {batch} rows of {length} tokens is empty: both must be at least 1")
        self.corpus, self.batch, self.length, self.seed, self.shuffle = corpus, batch, length, seed, shuffle
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
        """The documents of an epoch in order, int [D]."""
        if self.known[0] != epoch:
            n = len(self.corpus)
            self.known = epoch, np.random.default_rng([self.seed, epoch]).permutation(n) if self.shuffle else np.arange(n)
        return self.known[1]

    def blank(self):
        return np.full(self.length, NONE, np.int32), np.full(self.length, NONE, np.int32), np.zeros(self.length, np.int32), []

    def row(self, place, only=None):
        """One row from `place` on, within epoch `only` if given -> ((tokens, targets, begin, names), the place after it)."""
        corpus, (epoch, rank, inside) = self.corpus, place
        tokens, targets, begin, names = self.blank()
        at = 0
        while at < self.length and only in (None, epoch):
            d = self.order(epoch)[rank]
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
            if rank == len(corpus):
                epoch, rank = epoch + 1, 0
        begin[at:] = at
        return (tokens, targets, begin, names), (epoch, rank, inside)


def stack(rows):
    tokens, targets, begin, names = zip(*rows)
    return Batch(np.stack(tokens), np.stack(targets), np.stack(begin), list(names))
