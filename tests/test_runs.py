"""The scripts in runs/: windows are read as evaluate.py reads segments, schemes are what --pos makes of them, tables print again."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TINY, apart, run, text, tiny

import evaluate
import tokenizer
import train
from errors import Refused
from model import Config, load, save
from runs import extend, extrapolate, lengths, remember, stream, summarise

fresh = tiny.__wrapped__


def novel(path, words, seed):
    """A file of words of a small vocabulary."""
    draw = np.random.default_rng(seed)
    path.write_text(" ".join(draw.choice(["whale", "sea", "the", "of", "é", "and\n"], words)), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("pos", ["rope", "dynamic:original=8", "alibi", "xl"])
def test_windows_are_segments(pos):
    model, tokens = tiny(pos=pos), text(49)[0]
    got = lengths.read(model, tokens, 16, at_once=32)
    want = [evaluate.perplexity(model, tokens[i : i + 17], segment=16) for i in (0, 16, 32)]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert abs(got - evaluate.perplexity(model, tokens, segment=48).reshape(3, 16)).max() > 1e-2, "a window must not see the one before"
    x, y = lengths.windows(tokens, 16)
    np.testing.assert_allclose(lengths.losses(model, x, y), got, rtol=1e-4, atol=1e-4)
    assert run(model, tokens[None]).shape == (1, 49, TINY["vocab_size"]), "the model gives logits again"


@pytest.mark.parametrize("length", [4, 8, 32])
def test_every_length_predicts_the_same_tokens(length):
    tokens = np.arange(33)
    x, y = lengths.windows(tokens, length)
    assert x.shape == y.shape == (32 // length, length)
    np.testing.assert_array_equal(x.reshape(-1), tokens[:-1])
    np.testing.assert_array_equal(y.reshape(-1), tokens[1:])


@pytest.mark.parametrize("pos", ["pi:factor=4", "ntk:factor=4", "yarn:factor=4", "dynamic:factor=2"])
def test_another_scheme_in_a_model_that_is_there(pos):
    model, tokens = fresh(max_position_embeddings=16), text(64)
    plain = run(model, tokens)
    lengths.feel(model, lengths.scheme(model.config, pos))
    got = run(model, tokens)
    assert apart(got, run(fresh(pos=pos, max_position_embeddings=16), tokens)) < 1e-6
    assert apart(got, plain) > 1e-2
    lengths.feel(model, lengths.scheme(model.config, "rope"))
    np.testing.assert_array_equal(run(model, tokens), plain)


def test_dynamic_of_factor_1_read_at_once_is_ntk():
    model, tokens = fresh(max_position_embeddings=16), text(64)
    logits = []
    for pos in ("dynamic:factor=1", "ntk:factor=4"):
        lengths.feel(model, lengths.scheme(model.config, pos))
        logits.append(run(model, tokens))
    assert apart(*logits) < 1e-5


def test_longrope_takes_a_list():
    c = Config(**TINY, num_hidden_layers=1, max_position_embeddings=16)
    slower = [1.0, 1.5, 2.0, 8.0]
    found, plain = lengths.scheme(c, "longrope", 8.0, slower), lengths.scheme(c, "rope")
    np.testing.assert_allclose(np.array(plain.frequencies()) / found.frequencies(), slower)
    assert found.temperature == pytest.approx(1 + np.log(8) / np.log(16))
    np.testing.assert_allclose(lengths.stretch(c, "pi:factor=8"), [8] * 4)
    np.testing.assert_allclose(lengths.stretch(c, "ntk:factor=8"), 8 ** (np.arange(4) / 3))


def test_search_finds_what_is_better_than_its_starts():
    want = np.array([1, 1, 1.2, 2, 3, 4, 4, 4])
    score = lambda factors: float((np.log(factors / want) ** 2).sum())
    starts = {"pi": [4.0] * 8, "ntk": list(4 ** (np.arange(8) / 7))}
    found = lengths.search(starts, score, 60, 5.0, seed=0)
    assert len(found) == 60 and found[0]["loss"] < 0.7 * min(score(s) for s in starts.values())
    for x in found:
        assert (np.diff(x["factors"]) >= 0).all() and x["factors"][0] >= 1 and x["factors"][-1] <= 5
        assert x["loss"] == score(x["factors"])
    assert lengths.search(starts, score, 60, 5.0, seed=0) == found != lengths.search(starts, score, 60, 5.0, seed=1)
    assert lengths.search(starts, score, 2, 5.0, seed=0)[0]["from"] == "ntk", "no worse than the best start"
    with pytest.raises(ValueError, match="decrease"):
        lengths.search({"odd": [2.0, 1.0]}, score, 3, 5.0, 0)


def test_lengths_and_its_table(tmp_path, tokenizer_files, capsys):
    model = fresh(vocab_size=256, max_position_embeddings=16)
    save(model, tmp_path / "model", tokenizer_files)
    texts, other = [novel(tmp_path / f"{i}.txt", 100, i) for i in range(2)], novel(tmp_path / "other.txt", 100, 9)
    flags = ["--model", str(tmp_path / "model"), "--lengths", "8,16,64", "--evaluations", "5", "--out", str(tmp_path), "--device", "cpu"]
    lengths.main([*flags, "--data", *texts, "--calibrate", other])
    printed = capsys.readouterr().out
    r = json.loads((tmp_path / "lengths.json").read_text())
    rows = {(row["scheme"], row["factor"]): row["cells"] for row in r["rows"]}
    assert len(rows) == 11 and all(len(cells) == 3 for cells in rows.values())
    assert all(cell["tokens"] == 128 for cells in rows.values() for cell in cells)
    # the figures are those of the model as load() makes it
    tokens = [tokenizer.load(tokenizer_files).encode(Path(path).read_text(encoding="utf-8"))[:65] for path in texts]
    for at, pos, (name, factor) in ((2, "yarn:factor=4", ("yarn", "L/L0")), (0, "pi:factor=4", ("pi", "4")), (1, "rope", ("ntk", "L/L0"))):
        other, cell = load(tmp_path / "model", pos=pos, dtype="float32", device="cpu")[0], rows[name, factor][at]
        want = np.mean([lengths.read(other, t, cell["length"], 64).mean() for t in tokens])
        assert cell["loss"] == pytest.approx(want, rel=1e-4) and cell["perplexity"] == pytest.approx(np.exp(want), rel=1e-3)
    # where nothing is stretched it is rope's figure, said once
    assert ["as" in cell for cell in rows["yarn", "L/L0"]] == [True, True, False] and "as" not in rows["yarn", "4"][0]
    assert rows["pi", "4"][2]["loss"] == rows["pi", "L/L0"][2]["loss"]
    found = r["longrope"]["4"]
    assert found["loss"] <= min(found["starts"].values()) and found["evaluations"] == 5
    assert sum(b["tokens"] for b in rows["rope", ""][2]["curve"]) == 128
    lengths.main(["--table", str(tmp_path / "lengths.json")])
    assert capsys.readouterr().out == printed and "| yarn, factor 4 |" in printed


def test_lengths_refuses(tmp_path, tokenizer_files):
    save(fresh(vocab_size=256, max_position_embeddings=16), tmp_path / "model", tokenizer_files)
    book = novel(tmp_path / "a.txt", 100, 0)
    flags = ["--model", str(tmp_path / "model"), "--out", str(tmp_path), "--lengths", "16,64"]
    for more, why in (
        ([], "--data is missing"),
        (["--data", book, "--lengths", "16,40"], "must divide"),
        (["--data", book, "--lengths", "16k"], "longer texts"),
        (["--data", book, "--calibrate", book], "one of --data too"),
        (["--data", book, "--schemes", "pi,oops"], "oops"),
    ):
        with pytest.raises(Refused, match=why):
            lengths.main([*flags, *more])


def test_a_token_is_a_byte(tmp_path):
    tok = tokenizer.load(extrapolate.byte_folder(tmp_path / "start", extrapolate.TOY_SHAPE, 16))
    said = "naïve – 鯨\n\n  x"
    ids = tok.encode(said)
    assert len(ids) == len(said.encode()) and tok.decode(ids) == said and max(ids) < 256
    assert tok.eos_id == 256 < json.loads((tmp_path / "start" / "config.json").read_text())["vocab_size"]


def test_extrapolate_trains_reads_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOLONG_CACHE", str(tmp_path / "cache"))
    train, valid = [novel(tmp_path / f"{i}.txt", 3000, i) for i in range(2)], [novel(tmp_path / f"v{i}.txt", 500, 7 + i) for i in range(2)]
    flags = ["--toy", "--length", "32", "--batch", "8", "--micro", "8", "--steps", "40", "--warmup", "4", "--read", "2k", "--device", "cpu"]
    flags += ["--data", *train, "--valid", *valid, "--models", str(tmp_path / "models"), "--out", str(tmp_path), "--name", "toy"]
    extrapolate.main([*flags, "--only", "alibi"])
    printed, r = capsys.readouterr().out, json.loads((tmp_path / "toy.json").read_text())
    (row,) = r["rows"]
    assert [cell["length"] for cell in row["cells"]] == [32, 64, 128, 256]
    # as many bytes of both texts, the same at each length
    assert {cell["bytes"] for cell in row["cells"]} == {2048} and [t["tokens"] for t in r["texts"]] == [1024, 1024]
    assert row["training"]["tokens"] > 40 * 8 * 31 and row["training"]["tokens_per_second"] > 0
    # better than bytes drawn evenly, and as train.py has it over other windows
    bits = row["cells"][0]["bits_per_byte"]
    assert bits < 5 and abs(bits * np.log(2) - row["training"]["valid_loss"][-1]) < 0.3
    assert "| alibi | " in printed and f"{bits:.3f}" in printed
    # what is trained is read again, and not trained again
    monkeypatch.setattr(extrapolate.subprocess, "run", lambda *args, **how: pytest.fail("nothing is left to train"))
    extrapolate.main([*flags, "--only", "alibi"])
    assert json.loads((tmp_path / "toy.json").read_text())["rows"][0]["cells"] == row["cells"]
    extrapolate.main(["--table", str(tmp_path / "toy.json")])
    assert capsys.readouterr().out.endswith(printed)
    with pytest.raises(Refused, match="not trained: alibi"):
        extrapolate.main([*flags, "--only", "alibi", "--seed", "5"])
    assert "another --seed" in capsys.readouterr().err


def test_extrapolate_reads_what_is_there_when_one_fails(tmp_path, monkeypatch, capsys):
    book = [novel(tmp_path / f"{i}.txt", 3000, i) for i in range(2)]

    def broken(command, stdout, stderr):
        stdout.write("out of memory\n")
        return type("Done", (), {"returncode": 1})

    monkeypatch.setattr(extrapolate.subprocess, "run", broken)
    with pytest.raises(Refused, match="not trained: rope, t5"):
        extrapolate.main(["--toy", "--data", *book, "--models", str(tmp_path / "m"), "--out", str(tmp_path), "--only", "rope,t5"])
    assert capsys.readouterr().err.count("out of memory") == 2


def test_protocols_say_what_is_done():
    for script in (lengths, extrapolate, remember, stream, extend, summarise):
        assert len(lengths.protocol(script.__doc__)) > 300


def test_stream_and_its_tables(tmp_path, tokenizer_files, capsys):
    save(fresh(vocab_size=256, max_position_embeddings=16), tmp_path / "model", tokenizer_files)
    book, device = [novel(tmp_path / f"{i}.txt", 150, i) for i in range(2)], ["--device", "cpu"]
    flags = ["--model", str(tmp_path / "model"), "--out", str(tmp_path), *device, "--data", *book, "--tokens", "100", "--segment", "8"]
    flags += ["--memory", "full", "sinks:budget=16,sinks=2", "--endless", "sinks:budget=16,sinks=2", "--marks", "32,64"]
    stream.main([*flags, "--write", "4", "--chunk", "16", "--close", "4"])
    printed = capsys.readouterr().out
    r = json.loads((tmp_path / "stream.json").read_text())
    rows, tokens = (
        {row["memory"]: row for row in r["rows"]},
        [tokenizer.load(tokenizer_files).encode(Path(p).read_text())[:101] for p in book],
    )
    assert r["edges"] == [0, 8, 16, 64, 100] and [c["to"] for c in rows["full"]["ranges"]] == [8, 16, 64], "full stops at 4 times 16"
    # each stream as evaluate.py reads it, the pieces as segments that nobody remembers
    for memory, segment, name in (("sinks:budget=16,sinks=2", 8, None), ("none", 16, "alone")):
        model, row = load(tmp_path / "model", memory=memory, dtype="float32", device="cpu")[0], rows[name or memory]
        want = np.stack([evaluate.perplexity(model, t, segment) for t in tokens])
        for c in row["ranges"]:
            assert c["loss"] == pytest.approx(want[:, c["from"] : c["to"]].mean(), rel=1e-4)
        assert row["tokens"] == 200 and sum(b["tokens"] for b in row["curve"]) == 200
    (cost,) = r["endless"]
    assert [c["streamed"] for c in cost["marks"]] == [32, 64] and cost["marks"][0]["held_bytes"] == cost["marks"][1]["held_bytes"] > 0
    stream.main(["--table", str(tmp_path / "stream.json")])
    assert capsys.readouterr().out == printed and "| sinks:16,sinks=2: ms a token written |" in printed
    with pytest.raises(Refused, match="--data is missing"):
        stream.main(["--device", "cpu"])


@pytest.mark.parametrize("task", list(remember.TASKS))
def test_what_is_asked_was_said_so_many_segments_back(task):
    distances, S = np.array([0, 3, 1, 2, 3, 0]), 20
    batch = remember.sample(task, np.random.default_rng(0), distances, S)
    assert batch.tokens.shape == (6, 4 * S) and not batch.begin.any() and batch.tokens.max() < remember.VOCABULARY
    for row, right, d in zip(batch.tokens.tolist(), batch.targets.tolist(), distances):
        at = [i for i, x in enumerate(right) if x >= 0]
        # asked at the end of the last segment, and taken for said before the next answer
        assert min(at) >= 3 * S and all(row[i + 1] == right[i] for i in at if i + 1 < len(row))
        there = row[(3 - d) * S : (4 - d) * S] if d else row[3 * S : min(at) - (task == "passkey") * 3]
        answers = [right[i] for i in at]
        if task == "recall":
            pairs = dict(zip(there[0:8:2], there[1:8:2]))
            assert [pairs[row[i]] for i in at] == answers
        else:
            before = remember.SAY if task == "copy" else remember.WORDS["is"]
            assert any(there[i] == before and there[i + 1 : i + 1 + len(at)] == answers for i in range(len(there)))
        # nowhere else
        assert sum(row[i : i + len(at)] == answers for i in range(3 * S)) == (d > 0) * (task != "recall")


def test_remember_trains_and_goes_on_when_one_fails(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NANOLONG_CACHE", str(tmp_path / "cache"))
    books = [novel(tmp_path / f"{i}.txt", 3000, i) for i in range(2)]
    monkeypatch.setattr(remember, "SHAPE", {**remember.SHAPE, "hidden_size": 32, "intermediate_size": 48})
    monkeypatch.setattr(remember, "TEXT_SHAPE", remember.SHAPE)
    flags = ["--toy", "--tasks", "copy", "text", "--seeds", "1", "--rows", "8", "--steps", "20", "--fresh", "8", "--device", "cpu"]
    flags += ["--data", books[0], "--valid", books[1], "--read", "1k", "--text-steps", "20", "--text-lr", "0.01"]
    flags += ["--models", str(tmp_path / "m"), "--out", str(tmp_path), "--name", "r"]
    remember.main([*flags, "--memories", "none", "infini"])
    printed, r = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_text())
    assert [(row["task"], row["label"]) for row in r["rows"]] == [(t, m) for t in ("text", "copy") for m in ("none", "infini")]
    text, copy = r["rows"][:2], r["rows"][2:]
    assert all(1 < row["bits_per_byte"] < 6 and row["steps"] == 20 for row in text)
    assert [c["distance"] for c in copy[0]["cells"]] == [0, 1, 2, 3] and copy[0]["chance"] == 1 / 16
    # a matrix of 8 x 8 and a sum of 8 in float32, and where it ends, for each of 2 layers (text: 4 heads alike)
    assert copy[0]["bytes"] < 100 < 2 * 4 * (8 * 8 + 8) * 4 <= copy[1]["bytes"] < 3000
    assert "| `infini` |" in printed and f"{text[1]['bits_per_byte']:.3f}" in printed
    remember.main(["--table", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")])
    assert printed.endswith(capsys.readouterr().out) and (tmp_path / "r.png").is_file()
    # rows that are made anew and others beside those that are there
    join = ["--tasks", "text", "--join", str(tmp_path / "r.json"), "--name", "joined"]
    remember.main([*flags, *join, "--memories", "xl-small", "tokens+xl", "infini"])
    both = json.loads((tmp_path / "joined.json").read_text())
    assert [row["label"] for row in both["rows"] if row["task"] == "text"] == ["none", "xl-small", "tokens+xl", "infini"]
    assert [row for row in both["rows"] if row["task"] == "copy"] == copy and both["joined"]["command"] == r["command"]
    again, small, and_xl = ({row["label"]: row for row in both["rows"]}[m] for m in ("infini", "xl-small", "tokens+xl"))
    assert again["memory"] == text[1]["memory"] and small["memory"] == "xl:length=8" and "keep=xl,budget=32" in and_xl["memory"]
    # as many vectors of keys and values in each layer, and those that they are made of
    assert 0 < small["bytes"] < and_xl["bytes"] - 4 * small["bytes"]
    with pytest.raises(Refused, match="text_steps 20, and this is 19"):
        remember.main([*flags, *join, "--memories", "xl-small", "--text-steps", "19"])
    with pytest.raises(Refused, match="no result of this script"):
        remember.main([*flags, *join, "--join", books[0]])
    flags += ["--tasks", "copy"]
    remember.main([*flags, "--memories", "none", "--steps", "1", "--jobs", "1"])
    assert [row["steps"] for row in json.loads((tmp_path / "r.json").read_text())["rows"]] == [1]
    # what is there is not made again, and what cannot be made is named
    monkeypatch.setattr(remember.subprocess, "run", lambda *args, **how: type("Done", (), {"returncode": 3}))
    with pytest.raises(Refused, match="not trained: copy with xl, seed 0;"):
        remember.main([*flags, "--memories", "none", "xl", "--steps", "1", "--jobs", "2"])
    assert len(json.loads((tmp_path / "r.json").read_text())["rows"]) == 1 and "ended with 3" in capsys.readouterr().err
    with pytest.raises(Refused, match="not trained: copy with none"):
        remember.main([*flags, "--memories", "none", "--segment", "12"])
    assert "at least 14" in capsys.readouterr().err
    for more, why in (
        (["--memories", "oops"], "oops"),
        (["--tasks", "sing"], "sing"),
        (["--beyond", "1"], "less"),
        (["--rows", "0"], "above 0"),
    ):
        with pytest.raises(Refused, match=why):
            remember.main([*flags, *more])


def test_extend_trains_reads_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOLONG_CACHE", str(tmp_path / "cache"))
    books = [novel(tmp_path / f"{i}.txt", 3000, i) for i in range(3)]
    flags = ["--toy", "--data", *books[:2], "--valid", books[2], "--models", str(tmp_path / "m"), "--out", str(tmp_path), "--device", "cpu"]
    extend.main([*flags, "--only", "rope", "s2-longlora"])
    printed, r = capsys.readouterr(), json.loads((tmp_path / "extend-toy.json").read_text())
    plain, row = r["rows"]
    assert (plain["name"], row["name"]) == ("rope", "s2-longlora") and plain["reads"][0]["pos"] == "rope"
    full, own = row["reads"]
    assert (full["attn"], own["attn"]) == ("full", "s2:group=256") and full["pos"].startswith("yarn:factor=8")
    # what it was trained with has a loss of its own, and no answers
    assert "passkey" in full and "passkey" not in own and own["loss"][0]["loss"] != full["loss"][-1]["loss"] != own["loss"][-1]["loss"]
    # training helps, and figures are those of the checkpoint as load() makes it
    assert all(a["loss"] < b["loss"] for a, b in zip(full["loss"], plain["reads"][0]["loss"]))
    (folder,) = (tmp_path / "m" / "s2-longlora").glob("step-*")
    (text,) = [tokenizer.load(folder).encode(Path(books[2]).read_text(encoding="utf-8"))[:2049]]
    want = lengths.read(load(folder, memory="full", dtype="float32", device="cpu")[0], text, 1024, 1024).mean(0)
    for c in full["loss"]:
        assert c["loss"] == pytest.approx(want[c["from"] : c["to"]].mean(), rel=1e-4)
    assert full["tokens"] == 2048 == r["texts"][0]["tokens"]
    t = row["training"]
    assert t["tokens"] > 6 * 1000 and list(t["speeds"]) == ["256", "512", "1024"] and t["steps"] == 6
    assert "--attn s2:group=256 --adapter longlora --pos yarn:factor=auto" in row["command"] and "$ python train.py" in printed.err
    assert "| `s2-longlora` | own |" in printed.out and "| nothing, `rope` | full |" in printed.out
    extend.main(["--table", str(tmp_path / "extend-toy.json"), "--plot", str(tmp_path / "x.png")])
    assert capsys.readouterr().out == printed.out and (tmp_path / "x.png").is_file()
    # one that fails, and one that comes too late, take nothing from the others
    with pytest.raises(Refused, match="not done: full;"):
        extend.main([*flags, "--only", "full", "--limit", "0"])
    monkeypatch.setattr(extend, "call", lambda *args: (_ for _ in ()).throw(Refused("out of memory")))
    with pytest.raises(Refused, match="not done: longformer;"):
        extend.main([*flags, "--only", "longformer", "s2-longlora"])
    rows = {row["name"]: row for row in json.loads((tmp_path / "extend-toy.json").read_text())["rows"]}
    assert list(rows) == ["rope", "longformer", "s2-longlora"] and "out of memory" in rows["longformer"]["failed"]
    assert rows["rope"] == plain and rows["s2-longlora"]["reads"][0]["loss"] == full["loss"], "what is trained is not trained again"
    with pytest.raises(Refused, match="other settings"):
        extend.main([*flags, "--only", "full", "--window", "32"])


def test_a_training_that_takes_too_long_saves_and_leaves(tmp_path):
    code = "import signal, sys, time; signal.signal(signal.SIGINT, lambda *a: sys.exit(130)); print('ready', flush=True); time.sleep(60)"
    with pytest.raises(Refused, match="cut off by --limit"):
        extend.call([sys.executable, "-c", code], tmp_path / "log", 2)
    with pytest.raises(Refused, match=r"ended with 3 .*log2\)\nwhy"):
        extend.call([sys.executable, "-c", "print('why'); raise SystemExit(3)"], tmp_path / "log2", 60)


def test_extend_refuses(tmp_path):
    for more, why in (
        (["--only", "oops"], "oops"),
        (["--curriculum", "256,512"], "must end at the longest"),
        (["--steps", "0"], "at least 1"),
        (["--curriculum", "256,512,1k", "--steps", "2"], "without any"),
    ):
        with pytest.raises(Refused, match=why):
            extend.main(["--toy", "--out", str(tmp_path), "--models", str(tmp_path / "m"), *more])


def test_every_choice_is_one_that_train_takes():
    args = extend.arguments([])
    for name in extend.CHOICES:
        given = train.parse(extend.flags(name, args))
        assert given["pos"] == "yarn:factor=auto" and given["curriculum"] == "16k,32k,64k" and "out" not in given
        assert not any("{" in str(x) for x in given.values())
    assert extend.flags("s2", args)[:2] == ["--attn", "s2:group=16384"]
    files, valid = extend.own_library()
    assert valid and not set(files) & set(valid) and all(v.startswith("repo:") for v in valid)


def test_chunks_with_summaries_and_alone(monkeypatch):
    rows = text(25, 3)
    model = fresh(memory="summary:k=2,chunks=4,chunk=8,closed=false", adapter="summary:rank=2")
    alone, together = (np.array(summarise.by_chunk(model, list(rows), 8, way)) for way in (False, True))
    want = [np.mean([evaluate.perplexity(model, row[i : i + 9], segment=8) for row in rows]) for i in (0, 8, 16)]
    np.testing.assert_allclose(alone, want, rtol=1e-4)
    np.testing.assert_allclose(
        together, np.mean([evaluate.perplexity(model, row, segment=8).reshape(3, 8).mean(1) for row in rows], 0), rtol=1e-4
    )
    assert abs(together - alone)[0] < 1e-5 < 1e-3 < abs(together - alone)[1:].min(), "the first chunk has no summaries before it"
    monkeypatch.setattr(summarise, "AT_ONCE", 2)
    np.testing.assert_allclose(summarise.by_chunk(model, list(rows), 8, True), together, rtol=1e-5)
    nothing = fresh(memory="none")
    assert summarise.by_chunk(nothing, list(rows), 8, True) == summarise.by_chunk(nothing, list(rows), 8, False)


@pytest.mark.parametrize("jobs", [0, 2])
def test_summarise_trains_reads_and_draws(tmp_path, monkeypatch, capsys, jobs):
    monkeypatch.setenv("NANOLONG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(train, "CACHE", tmp_path / "cache")
    letters = extrapolate.byte_folder(tmp_path / "bytes", TINY, 16)
    save(fresh(vocab_size=264, max_position_embeddings=16), tmp_path / "model", letters)
    books = [novel(tmp_path / f"{i}.txt", 2000, i) for i in range(2)]
    flags = ["--quick", "--model", str(tmp_path / "model"), "--data", books[0], "--valid", books[1], "--device", "cpu", "--lr", "0.01"]
    flags += ["--chunk", "8", "--k", "2", "--rank", "2", "--out", str(tmp_path), "--models", str(tmp_path / "m")]
    flags += ["--positions", "none", "near"] if jobs else []
    summarise.main([*flags, "--jobs", str(jobs)] if jobs else flags)
    said = capsys.readouterr()
    printed, r = said.out, json.loads((tmp_path / "summarise-quick.json").read_text())
    base, *rows = r["rows"]
    assert all(line in said.err for line in ("none: training begins", "none: trained in", "summaries, positions=none: 2 rows are read"))
    assert ("positions=near: step 6 of 6, loss " in said.err) == bool(jobs)
    assert len(base["loss"]) == 2, "the base has positions for no more"
    assert [row["positions"] for row in rows[::2]] == (["none", "near"] if jobs else ["none"]) and len(rows[0]["loss"]) == 5
    # figures are those of the checkpoint as load() makes it
    model = load(tmp_path / "m" / "none" / "step-000006", dtype="float32", device="cpu")[0]
    tokens = tokenizer.load(letters).encode(Path(books[1]).read_text(encoding="utf-8"))
    held = [tokens[i : i + 41] for i in range(0, len(tokens) - 40, 40)][:2]
    assert r["held_out_rows"] == len(held)
    for row, way in zip(rows, (True, False)):
        np.testing.assert_allclose(row["loss"], summarise.by_chunk(model, held, 8, way), rtol=1e-4)
    assert rows[0]["loss"][0] == pytest.approx(base["loss"][0], rel=1e-5) and rows[0]["loss"][1:] != rows[1]["loss"][1:]
    summarise.main(["--table", str(tmp_path / "summarise-quick.json"), "--plot", str(tmp_path / "s.png")])
    assert printed.endswith(capsys.readouterr().out) and (tmp_path / "s.png").is_file() and "| summaries, positions=none |" in printed
    if jobs:
        # what a --limit cuts off is read as far as it came
        summarise.main([*flags, "--jobs", "1", "--steps", "100000", "--limit", "1", "--name", "limited", "--positions", "near"])
        _, *rows = json.loads((tmp_path / "limited.json").read_text())["rows"]
        assert [row["positions"] for row in rows] == ["near"] * 2 and 0 < rows[0]["steps"] < 100000
    with pytest.raises(Refused, match="ended with"):
        summarise.main([*flags, "--jobs", "1", "--lr", "-1"])
    # what was there before it failed is not lost
    assert [row["label"] for row in json.loads((tmp_path / "summarise-quick.json").read_text())["rows"]] == ["base, full attention"]


def test_summarise_writes_what_is_done_and_begins_nothing_after_its_limit(monkeypatch, capsys):
    clock = iter(range(0, 1000, 40))
    monkeypatch.setattr(summarise.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(summarise, "learn", lambda positions, *_: (positions, 1.0))
    missing, args = [], SimpleNamespace(limit=60, jobs=0)
    found = summarise.each(["none", "near", "absolute"], None, args, missing)
    assert next(found) == ("none", "none", 1.0) and not missing, "each is handed over when it is there, not at the end"
    assert not list(found) and [why.split(":")[0] for why in missing] == ["positions=near", "positions=absolute"]
    assert capsys.readouterr().err.count("not begun within --limit 60 seconds") == 2
