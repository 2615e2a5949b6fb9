"""Prompt caches: what was saved goes on as if it had never stopped, is cut back only where that is possible, and fits nothing else."""

import dataclasses
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import apart, has, named, python, small, text, tiny

import cache
import generate
import ops
import plugins
from errors import Refused
from generate import Session
from model import Config, Llama, save

MEMORIES = [small("memory", name) for name in plugins.names("memory")]
PATTERNS = [*(small("attention", name) for name in plugins.names("attention")), "longformer:window=5,n_global=4,own_projections=true"]
T = 21


class Words:
    fingerprint = "of a tokenizer"


def session(**how):
    made = Session(tiny(**how), chunk=8, segment=4)
    made.graph = False
    return made


def saved(path, **how):
    """A session that has read T tokens, and has been saved."""
    made = session(**how)
    made.read(text(T)[0], 5)
    cache.save(path, made, Words())
    return made


def onward(made, tokens=(3, 1, 4, 1, 5), steps=9):
    """Logits of a session that reads some more and then writes."""
    out = [made.read(tokens, steps), *(made.step(i) for i in range(steps))]
    return np.stack([ops.numpy(x) for x in out])


@pytest.mark.parametrize("graph", [False, True], ids=["plain", "static"])
@pytest.mark.parametrize("memory", MEMORIES, ids=named)
def test_a_saved_session_goes_on(tmp_path, memory, graph):
    made, again = saved(tmp_path / "a.cache", memory=memory), session(memory=memory)
    assert cache.resume(tmp_path / "a.cache", again, Words(), [*text(T)[0], 3]) == T
    assert again.tokens == made.tokens
    made.graph = again.graph = graph
    want = onward(made)
    assert apart(onward(again), want) < 1e-6
    assert again.nbytes() == made.nbytes()
    if memory != "none":
        assert apart(onward(session(memory=memory)), want) > 1e-2, "control: the text is remembered"


@pytest.mark.parametrize("n", [1, 3, 10, T])
@pytest.mark.parametrize("attn", PATTERNS, ids=named)
def test_a_full_cache_is_cut_at_any_token(tmp_path, attn, n):
    """A prompt that shares n tokens: what comes after them is as if only they had been read."""
    saved(tmp_path / "a.cache", attn=attn)
    for static in (False, True):
        made, want = session(attn=attn), session(attn=attn)
        prompt = [*text(T)[0, :n].tolist(), (text(T)[0, n % T] + 1) % 61, 7, 8]
        assert cache.resume(tmp_path / "a.cache", made, Words(), prompt) == n
        want.read(prompt[:n])
        made.graph = want.graph = static
        assert apart(onward(made, prompt[n:]), onward(want, prompt[n:])) < 1e-4


def test_the_last_token_of_a_prompt_is_always_read(tmp_path):
    saved(tmp_path / "a.cache")
    made = session()
    assert cache.resume(tmp_path / "a.cache", made, Words(), text(T)[0].tolist()) == T - 1
    assert cache.resume(tmp_path / "a.cache", session(), Words(), [60, 60]) == 0, "nothing in common is nothing to begin with"


@pytest.mark.parametrize("memory", [m for m in MEMORIES if m != "full"], ids=named)
def test_what_has_forgotten_is_not_cut(tmp_path, memory):
    saved(tmp_path / "a.cache", memory=memory)
    with pytest.raises(Refused, match=f"holds {T} tokens, of which this prompt begins with 9"):
        cache.resume(tmp_path / "a.cache", session(memory=memory), Words(), [*text(T)[0, :9], 60, 60])
    fresh = session(memory=memory)
    assert cache.resume(tmp_path / "a.cache", fresh, Words(), [60, 60]) == 0 and fresh.state is None


def test_arrays_that_layers_share_are_written_twice(tmp_path):
    """Without room the layers' positions are one array."""
    made, again = Session(tiny(), chunk=32), Session(tiny(), chunk=32)
    made.read(text(T)[0])
    cache.save(tmp_path / "a.cache", made, Words())
    assert cache.resume(tmp_path / "a.cache", again, Words(), [*text(T)[0], 3]) == T
    assert apart(onward(again), onward(made)) < 1e-6


def test_no_token_reaches_over_the_seam(tmp_path):
    """What is written is what every question leaves alone: not the last word, which takes a newline along if there is one."""
    ids = lambda text: [sum(map(ord, word)) % 61 for word in re.findall(r"\w+\W?|\W", text)]
    how = SimpleNamespace(cache=tmp_path / "a.cache", tokens=3, prompt_file="book.txt")
    for question in ("who", "1, 2", " so"):
        made = session(memory="sinks:budget=10,sinks=2")
        generate.remember(made, Words(), how, ids, "it was a cold day", question)
        assert made.tokens == ids("it was a cold day")[:4]


@pytest.mark.parametrize(
    "change, says",
    [
        ({"memory": "sinks:budget=10,sinks=3"}, "--memory sinks:budget=10,sinks=2"),
        ({"attn": "window:window=4"}, "--attn full"),
        ({"pos": "alibi"}, "--pos rope"),
        ({"rope_theta": 9000.0}, "other weights"),
        ({"layers": 1}, "other weights"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(tmp_path, change, says):
    saved(tmp_path / "a.cache", memory="sinks:budget=10,sinks=2")
    with pytest.raises(Refused, match=says) as no:
        cache.load(tmp_path / "a.cache", session(**{"memory": "sinks:budget=10,sinks=2", **change}), Words())
    assert "\n" not in str(no.value)


def test_other_weights_dtypes_and_tokenizers_are_refused(tmp_path):
    path, model = tmp_path / "a.cache", tiny()
    saved(path)
    other = Llama(model.config).init(seed=2, std=0.2)
    with pytest.raises(Refused, match="other weights"):
        cache.load(path, Session(other), Words())
    same = Llama(model.config).init(seed=1, std=0.2)
    assert cache.load(path, Session(same), Words())[0] == text(T)[0].tolist()
    same.dtype = ops.bfloat16
    with pytest.raises(Refused, match="--dtype float32, and here it is bfloat16"):
        cache.load(path, Session(same), Words())
    strange = Words()
    strange.fingerprint = "another"
    with pytest.raises(Refused, match="another tokenizer"):
        cache.load(path, Session(model), strange)


def test_a_table_of_heads_that_has_changed_is_refused(tmp_path):
    table, path, alphas = tmp_path / "heads.tsv", tmp_path / "a.cache", plugins.load("memory", "duo").alphas
    config = dataclasses.replace(tiny().config, memory=f"duo:heads={table},budget=10,sinks=2")

    def made(alpha):
        table.write_text(alpha)
        alphas.cache_clear()
        return Session(Llama(config).init(seed=1, std=0.2), chunk=8, segment=4)

    first = made("1 0\n0 1\n")
    first.read(text(T)[0], 5)
    cache.save(path, first, Words())
    assert cache.load(path, made("0.9 0.2\n0 1\n"), Words())[0] == text(T)[0].tolist(), "control: the same heads"
    with pytest.raises(Refused, match="another choice of full heads"):
        cache.load(path, made("0 1\n1 0\n"), Words())


def test_files_that_are_no_caches_are_refused(tmp_path):
    path = tmp_path / "a.cache"
    saved(path)
    whole = path.read_bytes()
    for contents in (b"", b"not a cache at all", whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(contents)
        with pytest.raises(Refused, match="no prompt cache"):
            cache.load(path, session(), Words())
    ops.write_safetensors(path, {"x": ops.array(np.zeros(3, "float32"))})
    with pytest.raises(Refused, match="no prompt cache"):
        cache.load(path, session(), Words())
    with pytest.raises(Refused, match="cannot be read"):
        cache.load(tmp_path / "absent", session(), Words())


@pytest.mark.parametrize("how", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full disk", "killed"])
def test_a_broken_write_leaves_nothing(tmp_path, monkeypatch, how):
    def broken(path, arrays, head=None):
        path.write_bytes(b"half")
        raise how

    monkeypatch.setattr(ops, "write_safetensors", broken)
    with pytest.raises((Refused, KeyboardInterrupt)):
        saved(tmp_path / "a.cache")
    assert not list(tmp_path.iterdir())


OTHER = """
import sys, numpy, cache, ops
from pathlib import Path
from test_cache import Words, onward, session
made = session(memory=sys.argv[2])
assert cache.resume(Path(sys.argv[1]), made, Words(), [*map(int, sys.argv[3].split()), 3]) == 21
numpy.save(sys.argv[1], onward(made))
"""


@pytest.mark.skipif(not has("torch", "mlx"), reason="needs both backends")
@pytest.mark.parametrize("memory", ["full", "sinks:budget=10,sinks=2"], ids=named)
def test_the_other_backend_reads_it(tmp_path, memory):
    made = saved(tmp_path / "a.cache", memory=memory)
    python(OTHER, "mlx" if ops.BACKEND == "torch" else "torch", tmp_path / "a.cache", memory, " ".join(map(str, made.tokens)))
    assert apart(np.load(tmp_path / "a.cache.npy"), onward(made)) < 1e-3


TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "


@pytest.fixture
def folder(tmp_path, tokenizer_files):
    (tokenizer_files / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE})
    )
    c = Config(vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    save(Llama(c).init(seed=1, std=0.2), tmp_path / "model", tokenizer_files)
    (tmp_path / "book.txt").write_text("It was a bright cold day in April, and the clocks were striking thirteen.\n")
    return tmp_path


def typed(folder, monkeypatch, capsys, *flags):
    """What generate.py says when it is called with these flags: standard output, standard error."""
    flags = "--model", folder / "model", "--prompt-file", folder / "book.txt", "--tokens", 8, "--temperature", 0, "--device", "cpu", *flags
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, flags)])
    generate.run()
    return tuple(capsys.readouterr())


@pytest.mark.parametrize("flags", [[], ["--chat"], ["--memory", "full"], ["--chat", "--memory", "full"]], ids=" ".join)
def test_questions_about_a_file(folder, monkeypatch, capsys, flags):
    """The text is read once, and the answers are those of a session that closes where the cache was written."""
    flags = [*(flags if "--memory" in flags else [*flags, "--memory", "sinks:budget=40"])]
    ask = lambda question, *more: typed(folder, monkeypatch, capsys, *flags, "--prompt", question, *more)
    cached = "--cache", folder / "book.cache"
    first, said = ask("Who speaks?", *cached)
    assert "tokens written" in said
    written = (folder / "book.cache").stat().st_mtime_ns
    again, said = ask("Who speaks?", *cached)
    assert again == first and "need not be read" in said
    other, said = ask(" Where is it?", *cached)
    assert "need not be read" in said and other != first
    assert (folder / "book.cache").stat().st_mtime_ns == written
    if "full" in flags:
        assert other == ask(" Where is it?")[0]


@pytest.mark.parametrize("flags", [[], ["--chat"]], ids=["text", "chat"])
def test_the_file_alone(folder, monkeypatch, capsys, flags):
    """Without a question the text itself is gone on with, and questions may come later."""
    flags = [*flags, "--memory", "sinks:budget=40", "--cache", folder / "a.cache"]
    outs = [typed(folder, monkeypatch, capsys, *flags, *more)[0] for more in ((), (), ("--prompt", "Who?"))]
    assert outs[0] == outs[1] != outs[2]


def test_refused_before_anything_loads(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--prompt", "x", "--cache", "a.cache"])
    with pytest.raises(Refused, match="give --prompt-file too"):
        generate.run()
    with pytest.raises(Refused, match="its folder is not there"):
        typed(folder, monkeypatch, capsys, "--cache", folder / "gone" / "a.cache")
    (folder / "book.txt").write_text("x")
    with pytest.raises(Refused, match="too short"):
        typed(folder, monkeypatch, capsys, "--cache", folder / "a.cache")
