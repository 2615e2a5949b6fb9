"""Documents found and refused, the cache, and rows against a stream written out by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import data
from data import Batches, Corpus
from errors import Refused

ROOT = Path(__file__).parent.parent


class Bytes:
    """A tokenizer whose ids are bytes; it counts what it encodes."""

    vocab_size, eos_id, fingerprint, template, has_chat = 257, 256, "bytes", None, False

    def __init__(self):
        self.texts = []

    def encode(self, text, bos=None):
        return np.concatenate(list(self.pieces([text])))

    def pieces(self, chunks):
        self.texts.append("")
        for chunk in chunks:
            self.texts[-1] += chunk
            yield np.frombuffer(chunk.encode(), np.uint8).astype(np.int32)


def corpus_of(*lengths):
    """Documents of given lengths; every token of document d is 1000 d + its place, so each token says where it is from."""
    offsets = np.cumsum([0, *lengths])
    tokens = np.concatenate([1000 * d + np.arange(n) for d, n in enumerate(lengths)]).astype(np.uint32)
    return Corpus(tokens, offsets, [f"doc{d}" for d in range(len(lengths))])


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "texts"
    (root / "sub" / ".git").mkdir(parents=True)
    (root / "b.txt").write_bytes("\ufeffzwei\r\n".encode())
    (root / "a.weird").write_text("eins é")
    (root / "sub" / "c.py").write_text("drei")
    (root / "sub" / "empty.py").write_text("")
    (root / "sub" / ".git" / "config").write_text("hidden")
    (root / ".hidden").write_text("hidden")
    (root / "latin.txt").write_bytes(b"caf\xe9")
    (root / "blob").write_bytes(b"a\0b")
    (root / "d.jsonl").write_text('{"text": "vier", "id": 1}\n\n{"text": "f\\u00fcnf"}\n')
    return root


def test_documents(folder):
    skipped = []
    found = [(os.path.relpath(name, folder), text) for name, text in data.documents(folder, skipped)]
    want = [("a.weird", "eins é"), ("b.txt", "zwei\r\n"), ("d.jsonl:1", "vier"), ("d.jsonl:3", "fünf")]
    want += [(os.path.join("sub", "c.py"), "drei")]
    assert found == want
    assert sorted(os.path.basename(s) for s in skipped) == ["blob", "latin.txt"]
    assert [t for _, t in data.documents([str(folder / "*.txt"), folder / "b.txt"])] == ["zwei\r\n"], "found twice, read once"
    assert [t for _, t in data.documents(str(folder / "**" / "*.py"))] == ["drei"]


@pytest.mark.parametrize("line", ["[1]", '{"body": "x"}', '{"text": 3}', "nonsense", '"text"', "[" * 100000])
def test_a_bad_line_is_named(tmp_path, line):
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(Refused, match=r'x\.jsonl, line 3: .*"text"'):
        list(data.documents(tmp_path))


@pytest.mark.parametrize("record", [{"text": "x \ud800"}, {"messages": [{"role": "user", "content": "\udfff"}]}])
def test_half_a_character_is_named(tmp_path, record):
    (tmp_path / "x.jsonl").write_text('{"text": "fine \\ud83d\\ude00"}\n' + json.dumps(record))
    with pytest.raises(Refused, match=r"x\.jsonl:2: .*surrogate"):
        list(data.documents(tmp_path))


def test_nothing_found(tmp_path):
    with pytest.raises(Refused, match="matches no file"):
        list(data.documents(tmp_path / "nowhere"))
    (tmp_path / "blob").write_bytes(b"\xff")
    with pytest.raises(Refused, match="no text in 1 files, 1 of them not UTF-8"):
        list(data.documents(tmp_path))


def test_default_corpus():
    files = data.default_corpus()
    names = {f.name for f in files}
    assert {"argparse.py", "typing.py", "decoder.py"} <= names and files == sorted(files)
    assert not any({"test", "tests", "idle_test", "site-packages"} & set(f.parts[-3:-1]) for f in files)
    train, valid = data.split(files)
    assert 0.01 < len(valid) / len(files) < 0.12 and sorted(train + valid) == files


def test_split_depends_on_names_alone(tmp_path):
    names = [f"{i // 7}/{i}.txt" for i in range(60)]
    below = lambda root, fs: [f.relative_to(root).as_posix() for f in fs]
    here, there = [[Path(r) / n for n in names] for r in ("/here", "/over/there")]
    a, b = data.split(here, 0.2), data.split(list(reversed(there)), 0.2)
    assert below("/here", a[1]) == sorted(below("/over/there", b[1]), key=names.index) and 3 < len(a[1]) < 25
    # what is held out of many stays held out when others are added
    assert set(data.split(here[:40], 0.2)[1]) <= set(a[1])
    for share in (1e-9, 0.999999):
        train, valid = data.split(here[:3], share)
        assert train and valid and len(train) + len(valid) == 3
    assert data.split(here, 0) == (here, [])
    with pytest.raises(Refused, match="at least two files"):
        data.split(here[:1])


def test_build_and_cache(folder, tmp_path):
    tok = Bytes()
    corpus = Corpus.build(folder, tok, tmp_path / "cache")
    assert len(corpus) == 5 and corpus.tokens.dtype == np.uint16 and isinstance(corpus.tokens, np.memmap)
    for d, (_, text) in enumerate(data.documents(folder)):
        assert corpus.tokens[corpus.offsets[d] : corpus.offsets[d + 1]].tolist() == [*text.encode(), 256]
    assert corpus.report() == "5 documents, 31 tokens: median 6, longest 8; 2 files skipped, not UTF-8 text"
    done = len(tok.texts)
    again = Corpus.build(folder, tok, tmp_path / "cache")
    assert len(tok.texts) == done, "from the cache"
    assert np.array_equal(again.tokens, corpus.tokens) and again.names == corpus.names and again.skipped == corpus.skipped
    # another tokenizer, another time, another size: another cache
    other = Bytes()
    other.fingerprint, other.vocab_size = "other", 70000
    assert Corpus.build(folder, other, tmp_path / "cache").tokens.dtype == np.uint32 and len(other.texts) == 5
    os.utime(folder / "b.txt", ns=(1, 1))
    Corpus.build(folder, tok, tmp_path / "cache")
    assert len(tok.texts) == done + 5
    assert len(list((tmp_path / "cache").iterdir())) == 3, "nothing temporary is left"
    other.eos_id = None
    with pytest.raises(Refused, match="no eos"):
        Corpus.build(folder, other, tmp_path / "cache")


def truncate(place):
    os.truncate(place / "tokens", 10)


def flip(place):
    raw = bytearray((place / "tokens").read_bytes())
    raw[4] ^= 1
    (place / "tokens").write_bytes(raw)


def half_a_json(place):
    (place / "about.json").write_text((place / "about.json").read_text()[:40])


def remove(place):
    (place / "tokens").unlink()


@pytest.mark.parametrize("damage", [truncate, flip, half_a_json, remove])
def test_a_damaged_cache_is_rebuilt(folder, tmp_path, damage):
    want = np.array(Corpus.build(folder, Bytes(), tmp_path / "cache").tokens)
    damage(next((tmp_path / "cache").iterdir()))
    tok = Bytes()
    assert np.array_equal(Corpus.build(folder, tok, tmp_path / "cache").tokens, want) and len(tok.texts) == 5
    assert Corpus.build(folder, tok, tmp_path / "cache") and len(tok.texts) == 5


def test_a_refused_text_leaves_no_cache(folder, tmp_path):
    (folder / "z.jsonl").write_text("nonsense\n")
    with pytest.raises(Refused, match="line 1"):
        Corpus.build(folder, Bytes(), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("length", [1, 3, 7, 64])
@pytest.mark.parametrize("lengths", [(1,), (5,), (2, 1, 9), (1, 1, 1, 30, 4, 17)])
def test_rows_are_the_stream(lengths, length):
    """Against the definition, token by token: each token of the corpus carries its document and place in its value."""
    batches = Batches(corpus_of(*lengths), 3, length, seed=5)
    total, seen = sum(lengths), []
    while len(seen) < 3 * total + 1:
        batch = batches.next()
        for a in batch[:3]:
            assert a.shape == (3, length) and a.dtype == np.int32
        for tokens, targets, begin, names in zip(*batch):
            starts = []
            for t in range(length):
                d, i = divmod(int(tokens[t]), 1000)
                assert targets[t] == (tokens[t] + 1 if i + 1 < lengths[d] else -1)
                if t == 0 or i == 0:
                    starts.append(t)
                    assert names[len(starts) - 1] == f"doc{d}"
                assert begin[t] == starts[-1]
            assert len(names) == len(starts)
            seen += tokens.tolist()
    for epoch in range(3):
        here = seen[epoch * total : (epoch + 1) * total]
        assert sorted(here) == sorted(batches.corpus.tokens.tolist()), "every token once an epoch"


def test_shuffled_anew_by_seed_and_epoch():
    corpus = corpus_of(*[1] * 50)
    draw = lambda seed, shuffle=True: Batches(corpus, 2, 50, seed, shuffle).next().tokens
    a, b = draw(1), draw(2)
    assert np.array_equal(a, draw(1)) and not np.array_equal(a, b) and not np.array_equal(a[0], a[1])
    assert np.array_equal(draw(1, False), np.tile(1000 * np.arange(50), (2, 1)))


@pytest.mark.parametrize("steps", range(0, 12))
def test_resume(steps):
    make = lambda: Batches(corpus_of(5, 1, 13, 8), 2, 3, seed=9)
    batches = make()
    for _ in range(steps):
        batches.next()
    state = json.loads(json.dumps(batches.state()))
    assert all(type(v) is int for v in state.values())
    want = [batches.next() for _ in range(12)]
    other = make()
    other.next()
    other.restore(state)
    for w in want:
        got = other.next()
        assert all(np.array_equal(x, y) for x, y in zip(w[:3], got[:3])) and w.names == got.names
    other.restart()
    assert np.array_equal(other.next().tokens, make().next().tokens)
    with pytest.raises(Refused, match="other data"):
        Batches(corpus_of(5, 1), 2, 3, seed=9).restore(state)
    with pytest.raises(Refused, match="seed 9"):
        Batches(corpus_of(5, 1, 13, 8), 2, 3, seed=8).restore(state)


def test_length_may_grow_on_resume():
    short = Batches(corpus_of(40, 30), 1, 4, seed=0)
    first = [short.next().tokens for _ in range(5)]
    longer = Batches(short.corpus, 1, 16, seed=0)
    longer.restore(short.state())
    assert np.array_equal(np.concatenate([*first, longer.next().tokens], 1), Batches(short.corpus, 1, 36, seed=0).next().tokens)


def test_one_epoch():
    batches = Batches(corpus_of(5, 6), 2, 4, seed=0, shuffle=False)
    batches.next()
    state = batches.state()
    first, second = batches.one_epoch()
    assert first.tokens.tolist() == [[0, 1, 2, 3], [4, 1000, 1001, 1002]]
    assert second.tokens.tolist() == [[1003, 1004, 1005, -1], [-1] * 4]
    assert second.targets.tolist() == [[1004, 1005, -1, -1], [-1] * 4]
    assert first.begin.tolist() == [[0] * 4, [0, 1, 1, 1]] and second.begin.tolist() == [[0, 0, 0, 3], [0] * 4]
    assert second.names == [["doc1"], []] and batches.state() == state
    again = list(batches.one_epoch())
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(again, (first, second)))
    assert [b.tokens.shape for b in batches.one_epoch(max_rows=1)] == [(2, 4)]
    assert [b.tokens.tolist() for b in batches.one_epoch(max_rows=2)] == [first.tokens.tolist()]
    exact = list(Batches(corpus_of(4, 4), 1, 4, shuffle=False).one_epoch())
    assert len(exact) == 2 and not any((b.tokens < 0).any() for b in exact), "no padding where none is needed"


def test_empty_refused():
    with pytest.raises(Refused, match="no document"):
        Batches(Corpus(np.zeros(0, np.uint16), [0], []), 1, 4)
    with pytest.raises(Refused, match="at least 1"):
        Batches(corpus_of(3), 1, 0)


def test_no_framework_is_imported():
    code = "import sys, data; sys.exit(bool({'torch', 'mlx', 'transformers', 'tokenizers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
