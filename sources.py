"""Where long texts come from: what --data may name, and the documents in it, one at a time and never whole in memory.

    books/            every file below a folder, hidden ones left out; a file is a document
    books/*.txt       a glob, or a file by its name
    x.jsonl           a line is a document: {"text": ...}, or a conversation: {"messages": [{"role": ..., "content": ...}, ...]};
                      .jsonl.gz too, and the rows of a .parquet where pyarrow is installed
    field:body:PATH   the same, the text being in the field "body"
    repo:PATH         a code repository is one document: its files in order, each under its path as a comment
    repos:PATH        every git checkout below a folder, each a document
    hub:OWNER/NAME[:SPLIT][:FIELD]    a data set of the Hugging Face hub, by its .jsonl, .jsonl.gz, .parquet and .txt files

A repository's files come directory by directory, the shallow ones first, READMEs before the others. Left out are hidden files, links,
what is no UTF-8 text, what is vendored (other checkouts inside of it too), what is built, generated or minified, notebooks, tables, and
files above 1 MiB. What git ignores is not asked for.
"""

import functools
import glob
import gzip
import hashlib
import itertools
import json
import os
import re
import sysconfig
import zlib
from pathlib import Path
from typing import NamedTuple

from errors import Refused

CHUNK = 1 << 22  # characters read at a time
ROWS = (".jsonl", ".jsonl.gz", ".parquet")  # files whose lines or rows are documents


class Rows(NamedTuple):
    """A file of rows whose text is in a field of another name."""

    path: Path
    field: str

    def __str__(self):
        return f"field:{self.field}:{self.path}"


class Repository(NamedTuple):
    """A folder whose files are one document."""

    path: Path

    def __str__(self):
        return f"repo:{self.path}"


# ---------------------------------------------------------------- finding


def expand(paths):
    """What --data names -> sources, each once and sorted: a Path for a file, else Rows or a Repository. Raises Refused for what is
    not there."""
    found = {}
    for path in [paths] if isinstance(paths, str | os.PathLike | Rows | Repository) else paths:
        if isinstance(path, Rows | Repository):
            found[path] = None
            continue
        kind, _, rest = str(path).partition(":")
        found |= dict.fromkeys(KINDS[kind](rest) if kind in KINDS else files(path))
    return list(found)


def files(path):
    path = Path(path).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts))
    here = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
    if not here:
        raise Refused(f"{path} matches no file: give text files, folders, .jsonl files or a glob such as 'books/*.txt'")
    return here


def rows(text):
    field, _, path = text.partition(":")
    if not field or not path:
        raise Refused(f"field:{text} lacks a field or a path: write field:NAME:PATH")
    return [Rows(p, field) for p in files(path) if p.name.endswith(ROWS)]


def folder(kind, path):
    path = Path(path).expanduser()
    if not path.is_dir():
        raise Refused(f"{kind}:{path} is no folder: give one that holds a code repository")
    return path


def checkouts(path):
    """The git checkouts below a folder; one inside of another belongs to neither."""
    found = []
    for here, below, names in os.walk(folder("repos", path)):
        if ".git" in below or ".git" in names:
            found.append(Repository(Path(here)))
            below.clear()
        below[:] = sorted(d for d in below if not d.startswith("."))
    if not found:
        raise Refused(f"repos:{path} holds no git checkout: give a folder of them, or repo:PATH for a folder that is none")
    return found


@functools.cache
def hub(text):
    """OWNER/NAME[:SPLIT][:FIELD] -> the files of a data set, fetched unless they are here already.

    A file belongs to a split if a word of its path is the split's name. Without a split it is "train", or all files if none says so.
    """
    name, split, field = [*text.split(":"), "", ""][:3]
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) or text.count(":") > 2:
        raise Refused(f"hub:{text} is no data set: write hub:OWNER/NAME, hub:OWNER/NAME:SPLIT or hub:OWNER/NAME:SPLIT:FIELD")
    try:
        import huggingface_hub
    except ImportError:
        raise Refused(f"hub:{name} can only be fetched with huggingface_hub: pip install it, or name files that are here") from None
    try:
        every = huggingface_hub.HfApi().list_repo_files(name, repo_type="dataset")
        fit = sorted(f for f in every if f.endswith((*ROWS, ".txt")) and not f.startswith("."))
        of = lambda split: [f for f in fit if split in re.split(r"[^A-Za-z0-9]+", f)]
        wanted = of(split) if split else of("train") or fit
        if wanted:
            if any(f.endswith(".parquet") for f in wanted):
                parquet(name)
            root = Path(huggingface_hub.snapshot_download(name, repo_type="dataset", allow_patterns=wanted))
    except Refused:
        raise
    except Exception as no:
        why = f"{type(no).__name__}: check the name, the network, and whether it asks for a login"
        raise Refused(f"hub:{name} could not be fetched ({why})") from None
    if not wanted:
        has = f"its text files are {', '.join(fit[:5])}" if fit else f"it has none that end in {', '.join(ROWS)} or .txt"
        raise Refused(f"hub:{name} has no file of {f'a split {split!r}' if split else 'text'}: {has}")
    return tuple(Rows(root / f, field) if field and f.endswith(ROWS) else root / f for f in wanted)


KINDS = {
    "field": rows,
    "repo": lambda path: [Repository(folder("repo", path))],
    "repos": checkouts,
    "hub": hub,
}


def absolute(path):
    """The same source from any working directory."""
    kind, _, rest = str(path).partition(":")
    if kind == "field":
        name, _, rest = rest.partition(":")
        kind = f"field:{name}"
    elif kind == "hub" or kind not in KINDS:
        return str(path) if kind == "hub" else os.path.abspath(path)
    return f"{kind}:{os.path.abspath(rest)}"


def where(source):
    return source if isinstance(source, os.PathLike) else Path(source) if isinstance(source, str) else source.path


def stamp(source):
    """What a source's documents depend on: every file's path, size in bytes and time."""
    listed = listing(source.path) if isinstance(source, Repository) else [where(source)]
    facts = [(f.absolute(), f.stat()) for f in listed]
    return type(source).__name__, getattr(source, "field", None), [(str(f), s.st_size, s.st_mtime_ns) for f, s in facts]


def default_corpus():
    """The sources of the running interpreter's standard library, sorted: long documents that are on every machine."""
    root = Path(sysconfig.get_path("stdlib"))
    leave = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    found = [p for p in sorted(root.rglob("*.py")) if not leave & set(p.relative_to(root).parts) and p.stat().st_size]
    if not found:
        raise Refused(f"this Python has no standard library sources in {root}: name your own text files")
    return found


def split(sources, valid=0.05):
    """Sources -> (train, valid): held out by a hash of the name below the common folder, so alike on every machine.

    valid: the share held out; at least one source goes each way. 0 holds out nothing. Raises Refused for a lone one.
    """
    sources = [Path(s) if isinstance(s, str) else s for s in sources]
    if not valid:
        return sources, []
    if len(sources) < 2 or not 0 < valid < 1:
        what = f"{len(sources)} files cannot be split with a share of {valid}"
        raise Refused(f"{what}: give at least two files and a share between 0 and 1, or name held-out texts yourself")
    root = Path(os.path.commonpath([where(s).absolute().parent for s in sources]))
    name = lambda s: where(s).absolute().relative_to(root).as_posix()
    share = {s: int.from_bytes(hashlib.sha256(name(s).encode()).digest()[:8], "big") / 2**64 for s in sources}
    ranked = sorted(sources, key=lambda s: (share[s], name(s)))
    n = min(max(sum(x < valid for x in share.values()), 1), len(sources) - 1)
    held = set(ranked[:n])
    return [s for s in sources if s not in held], [s for s in sources if s in held]


# ---------------------------------------------------------------- reading


def documents(paths, skipped=None):
    """Iterate over (name, text): as `streams`, each text as one string."""
    for _, name, text in streams(paths, skipped):
        yield name, text if isinstance(text, list) else "".join(text)


def streams(paths, skipped=None):
    """Iterate over (i, name, text): the number of the source, the document's name, and an iterator of strings or a conversation's list
    of messages. Empty ones are left out.

    Any file that is UTF-8 text counts, whatever its suffix. Others are left out and their paths appended to the list `skipped`, for
    the caller to report. Each text is to be read before the next is asked for. Raises Refused for a bad line of a .jsonl file, and
    where there is no text at all.
    """
    sources, skipped, empty = expand(paths), [] if skipped is None else skipped, True
    for i, source in enumerate(sources):
        for name, text in read(source, skipped):
            empty = False
            yield i, name, text
    if empty:
        raise Refused(f"no text in {len(sources)} files, {len(skipped)} of them not UTF-8: give text files, or .jsonl with a field 'text'")


def read(source, skipped):
    if isinstance(source, Repository):
        return repository(source.path, skipped)
    path, field = source if isinstance(source, Rows) else (source, "text")
    if path.name.endswith(ROWS):
        return (parquet_rows if path.suffix == ".parquet" else lines)(path, field)
    return whole(path, skipped)


def whole(path, skipped):
    """A file as one document, read twice: nobody knows that a text is UTF-8 before its last character."""
    size = 0
    try:
        for chunk in chunks(path):
            size += len(chunk)
            if "\0" in chunk:
                raise ValueError("text has no zero bytes")
    except ValueError:
        size = None
    if size is None:
        skipped.append(str(path))
    elif size:
        yield str(path), chunks(path)


def chunks(path):
    with open(path, encoding="utf-8-sig", newline="") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def lines(path, field):
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        for n, line in enumerate(unpacked(file, path), 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    record = None
                yield from row(record, f"{path}:{n}", f"{path}, line {n}: every line must be a JSON object", field)


def unpacked(file, path):
    """The lines of an open file. Raises Refused where what is compressed is damaged."""
    try:
        yield from file
    except (EOFError, gzip.BadGzipFile, zlib.error) as no:
        raise Refused(f"{path} is truncated or no gzip file ({no}): fetch it again, or unpack it") from None


def parquet(name):
    """pyarrow.parquet. Raises Refused if it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise Refused(f"{name} holds .parquet files, which only pyarrow reads: pip install pyarrow, or name other files") from None
    return pyarrow.parquet


def parquet_rows(path, field):
    table, n = parquet(path).ParquetFile(path), 0
    columns = [c for c in (field, "messages") if c in table.schema_arrow.names]
    for batch in table.iter_batches(64, columns=columns):
        for record in batch.to_pylist():
            n += 1
            yield from row(record, f"{path}:{n}", f"{path}, row {n}: every row must be", field)


def row(record, name, bad, field):
    """The document of a row, if it is not empty. bad: how the complaint begins."""
    record = record if isinstance(record, dict) else {}
    text, messages = record.get(field), record.get("messages")
    said = [text] if isinstance(text, str) else [x for m in messages for x in (m["role"], m["content"])] if is_chat(messages) else []
    if any(SURROGATE.search(x) for x in said):
        why = "holds half of a surrogate pair (an escape such as \\ud800), and no UTF-8 text can"
        raise Refused(f"{name}: its text {why}: write the character whole, or leave it out")
    if isinstance(text, str):
        if text:
            yield name, iter([text])
    elif is_chat(messages):
        if messages:
            yield name, messages
    else:
        raise Refused(
            f'{bad} with its document in the field "{field}", or a list of {{"role": ..., "content": ...}} in the field "messages"'
        )


SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can say half of a pair, and no text can hold it


def is_chat(messages):
    said = lambda m: isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
    return isinstance(messages, list) and all(map(said, messages))


# ---------------------------------------------------------------- repositories

VENDORED = {"node_modules", "bower_components", "vendor", "vendored", "third_party", "thirdparty", "external", "Pods", "site-packages"}
VENDORED |= {"dist", "build", "target", "__pycache__", "venv", "env", "_vendor"}
GENERATED = re.compile(
    r"\.(min\.\w+|map|lock|ipynb|svg|csv|tsv)$|_pb2(_grpc)?\.pyi?$|\.pb\.\w+$|\.g\.dart$|(^|/)(package-lock\.json|pnpm-lock\.yaml|go\.sum)$",
    re.IGNORECASE,
)
# what generators write into the first lines
MARK = re.compile(r"@generated\b|code generated by|do not edit|auto-?(matically )?generated", re.IGNORECASE)
PROSE = (".md", ".rst", ".txt", ".tex")
HUGE = 1 << 20  # bytes
COMMENTS = {
    "// ": "c h cc cpp cxx hpp hh cu cuh m mm cs java kt scala swift go rs js jsx ts tsx mjs dart php proto zig groovy glsl metal",
    "-- ": "sql lua hs elm ada adb ads vhd vhdl",
    "% ": "tex sty cls bib erl hrl",
    "; ": "lisp cl clj cljs el scm rkt asm ll",
    "<!-- ": "md html htm xml vue",
    "/* ": "css scss less",
    "! ": "f90 f95 f03 f08",
    '" ': "vim",
    "' ": "vb bas",
}
COMMENT = {"." + suffix: begin for begin, listed in COMMENTS.items() for suffix in listed.split()}
ENDS = {"<!-- ": " -->", "/* ": " */"}


def repository(root, skipped):
    """A repository as one document."""
    texts = repository_texts(root)
    first = next(texts, None)
    if first is None:
        skipped.append(str(root))
    else:
        yield str(root), itertools.chain([first], texts)


def listing(root):
    """A repository's files in the order in which they are read, by their names and sizes alone."""
    found = []
    for here, below, names in os.walk(root):
        at = Path(here)
        own = lambda d, at=at: d not in VENDORED and not any((at / d / x).exists() for x in (".git", "pyvenv.cfg"))
        below[:] = [d for d in below if not d.startswith(".") and own(d)]
        found += [at / name for name in names if not name.startswith(".")]

    def order(path):
        above = path.relative_to(root).parts[:-1]
        return len(above), above, not path.name.lower().startswith("readme"), path.name

    name = lambda path: path.relative_to(root).as_posix()
    fits = lambda path: not path.is_symlink() and path.is_file() and 0 < path.stat().st_size <= HUGE and not GENERATED.search(name(path))
    return sorted(filter(fits, found), key=order)


def repository_texts(root):
    for path in listing(root):
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            continue
        if not text.strip() or "\0" in text:
            continue
        # lines of more than 200 characters on average: minified, or data
        if path.suffix not in PROSE and (MARK.search(text[:1000]) or len(text) > 200 * (text.count("\n") + 1)):
            continue
        begin = COMMENT.get(path.suffix.lower(), "# ")
        yield f"{begin}{path.relative_to(root).as_posix()}{ENDS.get(begin, '')}\n{text.rstrip()}\n\n"
