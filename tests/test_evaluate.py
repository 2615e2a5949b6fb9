"""Losses against one forward pass, buckets worked out by hand, the passkey's prompt and scoring, and the scripts' refusals."""

import json
import re
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import cli
import evaluate
import ops
import passkey
from errors import Refused, main
from generate import Session
from model import Config, Llama, save

TINY = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny(memory="full"):
    return Llama(Config(**TINY, num_key_value_heads=2, memory=memory)).init(seed=1, std=0.2)


def text(n, seed=0):
    return np.random.default_rng(seed).integers(0, 257, n)


def forward(model, tokens):
    """Cross entropy of a single forward pass, in float64."""
    with ops.no_grad():
        logits = ops.numpy(model(ops.array(tokens[None, :-1].astype("int32"))))[0].astype("float64")
    return np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(tokens) - 1), tokens[1:]]


class Words:
    """Words, digits and marks as ids, in order of appearance; a letter and the space before it are one id, as in BPE."""

    adds_bos, has_chat, eos_ids = False, True, frozenset([0])

    def __init__(self):
        self.words = ["<eos>"]

    def encode(self, text, bos=None):
        found = re.findall(r"[0-9]| ?[A-Za-z]+|[^A-Za-z0-9]", text)
        self.words += [w for w in dict.fromkeys(found) if w not in self.words]
        return np.array([self.words.index(w) for w in found], np.int32)

    def decode(self, ids):
        return "".join(self.words[i] for i in ids if i and i < len(self.words))


class Reader:
    """Stands for a Session: keeps what it is given and answers what it is told to."""

    def __init__(self, answer):
        self.answer, self.pieces = answer, []

    def restart(self):
        self.pieces = []

    def read(self, tokens, room=0):
        self.pieces.append(list(tokens))
        self.left = list(self.answer)
        return self.step(None)

    def step(self, token):
        logits = np.zeros(257, "float32")
        logits[self.left.pop(0) if self.left else 0] = 1
        return ops.array(logits)

    def ready(self, room):
        pass

    def nbytes(self):
        return 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint folder with a tokenizer of single bytes and no bos."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    save(tiny(), path)
    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters | {"<eos>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return path


@pytest.fixture
def script(folder, monkeypatch, capsys):
    """Runs evaluate.py with these arguments: (exit code, standard output, standard error)."""

    def go(*args):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model", str(folder), "--device", "cpu", *map(str, args)])
        with pytest.raises(SystemExit) as left:
            main(evaluate.run)
        return left.value.code or 0, *capsys.readouterr()

    return go


@pytest.mark.parametrize("segment", [1, 7, 13, 64, 99, 100, 1000])
def test_segments_give_the_losses_of_one_forward(segment):
    model, tokens = tiny(), text(101)
    np.testing.assert_allclose(evaluate.perplexity(model, tokens, segment), forward(model, tokens), atol=2e-4)


@pytest.mark.parametrize("memory", ["window:budget=8", "sinks:budget=8,sinks=2"])
def test_bounded_memory_far_past_its_budget(memory):
    model, tokens, seen = tiny(memory), text(8 * 25), []

    def watched(x, state, targets):
        losses, state = model(x, state, targets=targets)
        seen.append((losses.shape[1], max(s["pos"].shape[2] for s in state["layers"])))
        return losses, state

    watched.start = model.start
    losses, full = evaluate.perplexity(watched, tokens, 5), forward(tiny(), tokens)
    assert losses.shape == (199,) and np.isfinite(losses).all()
    # nothing is forgotten before the budget is full, and then something is
    np.testing.assert_allclose(losses[:8], full[:8], atol=2e-4)
    assert np.abs(losses[20:] - full[20:]).max() > 0.01
    assert max(rows for rows, _ in seen) == 5
    assert max(slots for _, slots in seen) <= 8 + 5


def test_progress_sees_every_loss_once():
    seen = []
    losses = evaluate.perplexity(tiny(), text(30), 8, seen.append)
    assert [len(s) for s in seen] == [8, 8, 8, 5]
    np.testing.assert_array_equal(np.concatenate(seen), losses)


def test_edges():
    assert evaluate.edges(1) == [0, 1]
    assert evaluate.edges(128) == [0, 128]
    assert evaluate.edges(129) == [0, 128, 129]
    assert evaluate.edges(1000) == [0, 128, 256, 512, 1000]
    assert evaluate.edges(300, 4) == [0, 32, 64, 96, 128, 160, 192, 224, 256, 300]


def test_buckets_and_means_of_two_documents(monkeypatch, tmp_path):
    # a loss is its own position, and 1000 more in the second document
    (tmp_path / "a.txt").write_text("a" * 301)
    (tmp_path / "b.txt").write_text("é" * 65 + "b")
    (tmp_path / "c.txt").write_text("c")

    class Bytes:
        encode = staticmethod(lambda text, bos: np.frombuffer(text.encode(), np.uint8).astype(np.int32))
        decode = staticmethod(lambda ids: bytes(ids.tolist()).decode("utf-8", "replace"))

    extra = lambda tokens: 0 if tokens[0] == ord("a") else 1000
    monkeypatch.setattr(evaluate, "perplexity", lambda m, t, s, p: np.arange(len(t) - 1, dtype="float32") + extra(t))
    r = evaluate.evaluate_perplexity(None, Bytes, [tmp_path], [None], 512)
    assert [d["tokens"] for d in r["documents"]] == [301, 131]
    first = (sum(range(128)) * 2 + 1000 * 128) / 256
    second = (sum(range(128, 256)) + 128 + 129 + 2000) / 130
    third = sum(range(256, 300)) / 44
    expected = [(0, 127, 256, first), (128, 255, 130, second), (256, 299, 44, third)]
    assert [(b["from"], b["to"], b["tokens"]) for b in r["by_position"]] == [e[:3] for e in expected]
    assert [b["loss"] for b in r["by_position"]] == pytest.approx([e[3] for e in expected])
    assert sum(b["tokens"] for b in r["curve"]) == 430

    monkeypatch.setattr(evaluate, "perplexity", lambda m, t, s, p: np.full(len(t) - 1, np.log(8), "float32"))
    short, long = evaluate.evaluate_perplexity(None, Bytes, [tmp_path / "a.txt"], [100, 200], 512)["lengths"]
    assert (short["tokens"], long["tokens"]) == (99, 199)
    # three bits a token, and a token is a byte
    assert short["perplexity"] == pytest.approx(8) and long["bits_per_byte"] == pytest.approx(3)


def test_lengths_share_one_reading(script, tmp_path):
    (tmp_path / "long.txt").write_text("ab cd " * 100)
    (tmp_path / "short.txt").write_text("ab cd " * 20)
    assert script("--data", tmp_path, "--lengths", "500,100", "--segment", "64", "--json", tmp_path / "both.json")[0] == 0
    assert script("--data", tmp_path / "long.txt", "--length", "100", "--segment", "100", "--json", tmp_path / "one.json")[0] == 0
    both, one = (json.loads((tmp_path / name).read_text()) for name in ("both.json", "one.json"))
    assert [row["length"] for row in both["lengths"]] == [100, 500] and len(both["documents"]) == 1
    assert both["lengths"][0]["loss"] == pytest.approx(one["lengths"][0]["loss"], abs=1e-4)


@pytest.mark.parametrize("depth", [0, 0.25, 0.5, 1])
@pytest.mark.parametrize("length", [100, 333, 1024])
def test_the_key_stands_where_asked(length, depth):
    tokenizer = Words()
    before, question = passkey.prompt(tokenizer, length, depth, 4071)
    longest = max(len(tokenizer.encode(" " + s)) for s in passkey.FILLER)
    assert length - longest <= len(before + question) <= length
    assert tokenizer.decode(question) == passkey.QUESTION
    whole = tokenizer.decode(before)
    assert whole.startswith(passkey.TASK) and whole.count("4071") == 2
    parts = [len(tokenizer.encode(part)) for part in whole[len(passkey.TASK) :].split(passkey.KEY.format(key=4071))]
    assert parts[0] == pytest.approx(depth * sum(parts), abs=longest + 2)


def test_no_room_for_the_prompt():
    with pytest.raises(Refused, match=r"--lengths must be \d+ or more"):
        passkey.prompt(Words(), 40, 0.5, 1)


@pytest.mark.parametrize("answer, right", [("12345.", True), (" 12345\nThe", True), ("It is 12345, not 1", True), ("1234", False)])
def test_matches(answer, right):
    assert passkey.matches(answer, 12345) is right


@pytest.mark.parametrize("answer", ["123456", "012345", "1 12345", "", "twelve", "12,345", "１２３４５"])
def test_matches_not(answer):
    assert not passkey.matches(answer, 12345)


@pytest.mark.parametrize("seen", [False, True])
def test_trial(seen):
    tokenizer = Words()
    tokenizer.encode(" 4 0 7 1. and")
    right, wrong = (Reader([*tokenizer.encode(answer), 0, *tokenizer.encode(" and")]) for answer in (" 4071.", " 407."))
    trial = passkey.passkey(right, tokenizer, 200, 0.5, 4071, seen)
    assert trial["correct"] and trial["answer"] == " 4071." and trial["tokens"] == sum(map(len, right.pieces))
    assert not passkey.passkey(wrong, tokenizer, 200, 0.5, 4071, seen)["correct"]
    # the memory closes at the end of each read: the question is in a read of its own, or not
    assert [passkey.QUESTION in tokenizer.decode(p) for p in right.pieces] == ([True] if seen else [False, True])
    assert ["4071" in tokenizer.decode(p) for p in right.pieces] == ([True] if seen else [True, False])


def test_trial_writes_what_a_forward_pass_would():
    session, tokenizer = Session(tiny(), 32, graph=False), Words()
    # a trial before leaves nothing behind
    passkey.passkey(session, tokenizer, 130, 0.5, 17)
    passkey.passkey(session, tokenizer, 120, 0.5, 4071)
    before, question = passkey.prompt(tokenizer, 120, 0.5, 4071)
    ids = before + question
    for _ in range(passkey.ANSWER - 1):
        with ops.no_grad():
            ids.append(int(ops.argmax(session.model(ops.array(np.array([ids], "int32")))[0, -1])))
    assert session.tokens == ids


@pytest.mark.parametrize("memory, flat", [("full", False), ("window:budget=16", True)])
def test_bounded_memory_stays_flat(memory, flat):
    session, tokenizer = Session(tiny(memory), 32, graph=False), Words()
    short, long = (passkey.passkey(session, tokenizer, n, 0.5, 4071)["cache"] for n in (120, 400))
    assert (short == long) == flat


def test_prompts_read_together_are_answered_as_alone():
    model, tokenizer = tiny(), Words()
    # every id is a word from the beginning
    tokenizer.encode("\n".join([passkey.TASK, *passkey.FILLER, passkey.KEY, passkey.QUESTION, "0123456789", " ".join(passkey.FILLER)]))
    tokenizer.words += [f" word{'x' * i}" for i in range(257 - len(tokenizer.words))]
    asked = passkey.prompts(tokenizer, [120, 200], 3, 2)
    alone = passkey.grid(model, tokenizer, [120, 200], 3, 2, segment=512)["trials"]
    same = [(t["length"], t["depth"], t["key"], t["tokens"]) for t in alone]
    assert [(t["length"], t["depth"], t["key"], len(t["ids"])) for t in asked] == same
    for at_once in (1, 500):
        together = passkey.read_together(model, tokenizer, asked, at_once)
        assert [t["correct"] for t in together] == [t["correct"] for t in alone]
        # one that has said a number need not go on
        assert all(a["answer"].startswith(t["answer"]) and t["answer"] for a, t in zip(alone, together))
    assert len({t["answer"] for t in together}) > 3, "the prompts must be told apart"


def test_answers_end(monkeypatch):
    tokenizer, calls = Words(), []
    say = [tokenizer.encode(text).tolist() for text in (" 40. and and and", " and and and and")]
    logits = lambda tokens: ops.array(np.eye(257, dtype="float32")[tokens][:, None])

    class Model:
        start = staticmethod(lambda segment, total: None)

        def __call__(self, x, state, last):
            calls.append(tuple(x.shape))
            return logits([ids[len(calls) - 1] for ids in said]), None

    said = [say[0], [*say[1][:2], 0, *say[1]]]
    assert passkey.answers(Model(), tokenizer, np.ones((2, 30))) == [" 40.", " and and"]
    assert calls[0] == (2, 30) and set(calls[1:]) == {(2, 1)} and len(calls) == len(tokenizer.encode(" 40."))
    calls.clear()
    said = [say[1] * 4] * 2
    assert len(passkey.answers(Model(), tokenizer, np.ones((2, 30)))) == 2 and len(calls) == passkey.ANSWER


def test_grid_averages_over_trials(monkeypatch):
    keys = []
    monkeypatch.setattr(passkey, "Session", lambda *a, **k: None)

    def trial(session, tokenizer, length, depth, key, seen):
        keys.append(key)
        return {"correct": length == 10 and (depth == 0 or (depth == 1 and len(keys) % 2 == 0))}

    monkeypatch.setattr(passkey, "passkey", trial)
    r = passkey.grid(None, None, [10, 20], 3, 2)
    assert r["accuracy"] == [[1, 0, 0.5], [0, 0, 0]] and r["depths"] == [0, 0.5, 1]
    first = list(keys)
    passkey.grid(None, None, [20], 3, 2)
    assert len(set(first)) > 8 and keys[12:] == first[6:] and all(1 <= k <= 50000 for k in keys)


def test_passkey_script(script, tmp_path):
    out = tmp_path / "p.json"
    args = "--task", "passkey", "--lengths", "400", "--depths", "2", "--trials", "1", "--memory", "window:budget=32", "--segment", "64"
    code, shown, _ = script(*args, "--json", out)
    r = json.loads(out.read_text())
    assert code == 0 and "window:budget=32" in shown and "after the memory had closed" in shown
    assert len(r["trials"]) == 2 and all(isinstance(t["answer"], str) for t in r["trials"])
    assert r["question_seen"] is False and r["versions"][ops.BACKEND] and r["memory"] == "window:budget=32"
    assert "before the memory closed" in script(*args, "--question-seen")[1]


def test_perplexity_script_writes_and_draws(script, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "t.txt").write_text("some words to read, " * 20)
    code, shown, _ = script("--data", tmp_path / "t.txt", "--json", tmp_path / "r.json", "--plot", tmp_path / "r.png")
    r = json.loads((tmp_path / "r.json").read_text())
    assert code == 0 and f"{r['lengths'][0]['perplexity']:.4f}" in shown and "256-398" in shown
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.json", "r.png", "t.txt"]


REFUSED = {
    "task": (["--task", "babilong"], "choose one of perplexity, passkey"),
    "missing": (["--data", "not/there.txt"], "not/there.txt matches no file"),
    "short": (["--data", "TEXT", "--lengths", "2k"], "no document has 2048 tokens, the longest has 12"),
    "length": (["--lengths", "1,2k"], "--lengths 1 leaves nothing to predict"),
    "segment": (["--segment", "0"], "must be at least 1"),
    "all": (["--task", "passkey", "--lengths", "all"], "--lengths all is for perplexity"),
    "room": (["--task", "passkey", "--lengths", "50"], "has no room"),
    "bos": (["--data", "TEXT", "--bos"], "no bos token"),
    "json": (["--json", "no/folder/r.json"], "its folder is not there"),
    "memory": (["--memory", "nothing"], "--memory 'nothing' is not known"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, script, tmp_path):
    (tmp_path / "t.txt").write_text("twelve bytes")
    args, sentence = REFUSED[case]
    code, shown, said = script(*[str(tmp_path / "t.txt") if a == "TEXT" else a for a in args])
    assert code == 2 and not shown and sentence in said and said.count("\n") == 1


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("before")

    def broken(partial):
        partial.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        cli.write(path, broken)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with open(path) as reading:
        cli.write(path, lambda partial: partial.write_text("after"))
        assert reading.read() == "before"
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(Refused, match="could not be written"):
        cli.write(tmp_path / "gone" / "r.json", lambda partial: partial.write_text("x"))
