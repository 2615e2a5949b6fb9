"""A length curriculum: its stages are what was written, a run passes through them, and goes on in the middle of one."""

import dataclasses
import json

import numpy as np
import pytest
from test_train import args, metrics, own_cache, refusal, tiny, world  # noqa: F401

import curriculum
import data
import plugins
import rundir
import train
from errors import Refused

train.use_backend(None)
from train import llama, ops  # noqa: E402

PLANS = {
    # text, batch, micro, steps -> length, rows, rows at a time, first and last step of each stage
    ("16,32,64", 2, 1, 9): [(16, 8, 4, 1, 3), (32, 4, 2, 4, 6), (64, 2, 1, 7, 9)],
    ("16,32,64", 2, 1, 10): [(16, 8, 4, 1, 3), (32, 4, 2, 4, 7), (64, 2, 1, 8, 10)],
    ("1k:50%,4k:25%,8k:25%", 3, 3, 40): [(1024, 24, 24, 1, 20), (4096, 6, 6, 21, 30), (8192, 3, 3, 31, 40)],
    ("16:5, 64:3", 4, 2, 77): [(16, 16, 8, 1, 5), (64, 4, 2, 6, 8)],
    # 128 tokens a step: 1 step for 100, 8 steps for 1k
    ("16:100t,64:1kt", 2, 1, 77): [(16, 8, 4, 1, 1), (64, 2, 1, 2, 9)],
    # six rows of 40 cannot be read 3 at a time and be as many tokens as one of 120
    ("40,60,120", 2, 1, 3): [(40, 6, 3, 1, 1), (60, 4, 2, 2, 2), (120, 2, 1, 3, 3)],
    ("32,48", 2, 1, 2): [(32, 3, 1, 1, 1), (48, 2, 1, 2, 2)],
    ("64,16", 8, 1, 2): [(64, 2, 1, 1, 1), (16, 8, 1, 2, 2)],
    ("64", 2, 1, 5): [(64, 2, 1, 1, 5)],
}


@pytest.mark.parametrize("asked", PLANS, ids=lambda asked: asked[0])
def test_stages_are_what_was_written(asked):
    stages = curriculum.plan(*asked)
    assert [stage[:5] for stage in stages] == PLANS[asked]
    assert len({stage.batch * stage.length for stage in stages}) == 1, "as many tokens a step"
    assert [curriculum.at(stages, step) for step in (1, stages[0].last, stages[-1].last)] == [stages[0], stages[0], stages[-1]]


@pytest.mark.parametrize(
    "text, says",
    [
        ("16,24,64", "no whole number of rows of 24"),
        ("16:5,64", "mixes"),
        ("16:50%,64:3", "mixes"),
        ("16:50%,64:60%", "110%"),
        ("16:0,64:3", "without any"),
        ("16,16,16,16,16,16,16,64", "without any"),
        ("0,64", "above 0"),
        ("16;64", "not understood"),
        ("16,,64", "not understood"),
    ],
)
def test_bad_stages_are_refused(text, says):
    with pytest.raises(Refused, match=says) as no:
        curriculum.plan(text, 2, 1, 6)
    assert "--curriculum" in str(no.value) and "\n" not in str(no.value)


LONG = {"rope_type": "longrope", "original_max_position_embeddings": 16, "short_factor": [1.0] * 4, "long_factor": [1.5] * 4}


@pytest.mark.parametrize("name", ["pi", "ntk", "yarn", "dynamic", "longrope", "llama3"])
def test_auto_is_the_length_over_the_models_own(name):
    c = llama.Config(max_position_embeddings=16)
    for length, factor in ((8, 1), (16, 1), (24, 1.5), (64, 4)):
        got = curriculum.stretched(f"{name}:factor=auto", length, c)
        assert plugins.parse("positions", got).options == plugins.parse("positions", f"{name}:factor={factor}").options
        assert got == str(plugins.parse("positions", got)), "in the canonical spelling"
    assert curriculum.stretched("none/yarn:beta_fast=16,factor=auto", 32, c) == "none/yarn:factor=2.0,beta_fast=16.0"
    assert curriculum.stretched("rope/yarn:factor=3", 64, c) == "rope/yarn:factor=3"


def test_auto_of_a_model_that_was_stretched_before():
    """Its own length is the one before, which schemes that look for it are told."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    c = llama.Config.from_hf({"model_type": "llama", "max_position_embeddings": 64, "rope_scaling": yarn})
    assert curriculum.stretched("yarn:factor=auto", 32, c) == "yarn:factor=2.0,original=16"
    assert curriculum.stretched("pi:factor=auto", 32, c) == "pi:factor=2.0"
    with pytest.raises(Refused, match="no option 'factor'"):
        curriculum.stretched("rope:factor=auto", 32, c)


def test_longrope_of_a_stage_is_written_for_others():
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "model_type": "llama", "max_position_embeddings": 64}
    c = llama.Config.from_hf({**shape, "rope_scaling": LONG})
    scheme = lambda c: (lambda p: p.module.Position(c, p.options))(plugins.parse("positions", c.pos))
    for length, which in ((16, "short_factor"), (32, "long_factor")):
        stage = dataclasses.replace(c, pos=curriculum.stretched("longrope:factor=auto", length, c))
        plain = scheme(dataclasses.replace(c, pos="rope"))
        np.testing.assert_allclose(np.divide(plain.frequencies(), scheme(stage).frequencies()), LONG[which])
        hf = stage.to_hf()
        assert hf["rope_scaling"]["factor"] == length / 16 and hf["max_position_embeddings"] == length
        back = llama.Config.from_hf(json.loads(json.dumps(hf)))
        assert back.original_length == 16 and (scheme(back).temperature, back.pos) == (scheme(stage).temperature, stage.pos)
    assert scheme(stage).temperature == pytest.approx(1 + np.log(2) / np.log(16))


def test_another_scheme_takes_over_and_weights_stay():
    model, tokens = tiny(pos="t5:buckets=4,distance=8/pi:factor=2", max_position_embeddings=16), ops.array(np.arange(40)[None])
    shifted = lambda x: x + ops.array(np.arange(x.shape[0], dtype="float32")[:, None])
    bias = {n: shifted(x) for n, x in ops.parameters(model).items() if "positions" in n}
    ops.set_parameters(model, bias)
    model.feel("t5:buckets=4,distance=8/pi:factor=3")
    want, other = (tiny(pos="t5:buckets=4,distance=8/pi:factor=3", max_position_embeddings=16) for _ in "ab")
    ops.set_parameters(want, bias)
    logits = [ops.numpy(m(tokens)) for m in (model, want, other)]
    assert bias and model.config.pos == want.config.pos
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)
    assert np.abs(logits[0] - logits[2]).max() > 1e-2


@pytest.fixture(scope="module")
def short(world, tmp_path_factory):  # noqa: F811
    """The tiny model, made for 16 tokens."""
    folder = tmp_path_factory.mktemp("short")
    llama.save(tiny(max_position_embeddings=16), folder / "model", world / "model")
    return folder / "model"


STAGED = {"curriculum": "12,24,48", "length": None, "batch": 2, "micro": 1, "steps": 9, "pos": "yarn:factor=auto", "keep": 9}


def test_a_run_passes_through_its_stages(world, short, tmp_path, monkeypatch, capsys):  # noqa: F811
    out, real, read = tmp_path / "run", train.nats, []
    monkeypatch.setattr(train, "nats", lambda model, batch: read.append(batch.tokens.shape) or real(model, batch))
    assert train.main(args(world, out, **{**STAGED, "model": short, "rewarm": 2, "min-lr": 1e-3, "eval-every": 9})) == 0
    assert [x[2] for x in metrics(out, "length")] == [12] * 5 + [24] * 4 + [48] * 4
    monkeypatch.setattr(train, "nats", real)
    # in training and in validation as many tokens at a time: two parts a step
    assert read == [(4, 12)] * (2 + 6 + 2) + [(2, 24)] * (6 + 2) + [(1, 48)] * (6 + 2)
    # the stream goes on across stages, cut in rows of each stage's length
    corpus, seen = data.Corpus.build([world / "texts"], llama.tokenizers.load(short), tmp_path / "c"), 0
    rows = data.Batches(corpus, 8, 12, 0)
    for (step, _, tokens), (_, _, lr) in zip(metrics(out, "tokens"), metrics(out, "lr")):
        rows.batch, rows.length = {12: (8, 12), 24: (4, 24), 48: (2, 48)}[12 << (step - 1) // 3]
        batch = rows.next()
        seen += int((batch.targets >= 0).sum())
        assert tokens == seen, step
        # the cosine over all steps, at half of it in the first step of a later stage
        a = train.SimpleNamespace(lr=1e-2, min_lr=1e-3, warmup=2, steps=9)
        assert lr == pytest.approx(train.lr_at(step, a) * (0.5 if step in (4, 7) else 1))
        # the first step of a stage starts from the checkpoint that the stage before left, and feels distance anew
        if step in (4, 7):
            pos = {4: "yarn:factor=1.5", 7: "yarn:factor=3.0"}[step]
            model = llama.load(out / f"step-00000{step - 1}", pos=pos, device="cpu")[0]
            model.model.patterns(training=True)
            want = train.nats(model, batch).item() / int((batch.targets >= 0).sum())
            assert dict(x[::2] for x in metrics(out, "loss"))[step] == pytest.approx(want, abs=1e-4)
            assert abs(train.nats(llama.load(out / f"step-00000{step - 1}", pos="rope", device="cpu")[0], batch).item() / 96 - want) > 1e-4
    assert [llama.read_config(p).pos for p in rundir.checkpoints(out)] == ["yarn:factor=1.0", "yarn:factor=1.5", "yarn:factor=3.0"]
    rope = json.loads((out / "step-000006" / "config.json").read_text())["rope_scaling"]
    assert rope["factor"] == 1.5 and rope["original_max_position_embeddings"] == 16
    # validations read the same tokens in rows of the stage's length
    model, tokenizer = llama.load(out / "step-000006", device="cpu")
    held = data.Corpus.build([world / "held"], tokenizer, tmp_path / "c")
    a = train.SimpleNamespace(micro=1, length=24, valid_rows=4, segment=None)
    assert train.evaluate(model, held, a) == pytest.approx(dict(x[::2] for x in metrics(out, "valid_loss"))[6], abs=1e-5)
    said = capsys.readouterr()
    assert "rows of 12, then of 48" in said.out and "steps 4 to 6: 4 rows of 24" in said.out + said.err


HOW = {
    "whole rows": {"pos": "ntk:factor=auto"},
    "segments": {"segment": 12, "memory": "tokens:size=2", "pos": None},
    "upsampled": {"pos": "pi:factor=auto", "upsample": 3},
}


@pytest.mark.parametrize("how", HOW)
def test_a_run_resumes_in_any_stage_to_the_same_losses(how, world, short, tmp_path, monkeypatch):  # noqa: F811
    given = {**STAGED, "model": short, "save-every": 1, "eval-every": 4, **HOW[how]}
    assert train.main(args(world, tmp_path / "whole", **given)) == 0
    real, out, steps = train.train_step, tmp_path / "run", []
    # within the first stage, and at the end of it, and within the second
    stops = (2, 4, 6)

    def broken(*a):
        steps.append(1)
        return real(*a) if len(steps) not in stops else 1 / 0

    monkeypatch.setattr(train, "train_step", broken)
    with pytest.raises(ZeroDivisionError):
        train.main(args(world, out, **given))
    for _ in stops[1:]:
        with pytest.raises(ZeroDivisionError):
            train.main(["--resume", str(out)])
    stopped = rundir.find(out)["step"]
    assert stopped == len(steps) - len(stops) and train.main(["--resume", str(out)]) == 0
    keys = ("loss", "valid_loss", "grad_norm", "lr", "tokens", "length")
    assert metrics(out, *keys) == metrics(tmp_path / "whole", *keys)
    weights = [(o / "step-000009" / "model.safetensors").read_bytes() for o in (out, tmp_path / "whole")]
    assert weights[0] == weights[1]
    losses = [x for *_, x in metrics(out, "loss")]
    assert losses[-1] < losses[0]


def test_a_run_from_before_there_were_stages_goes_on(world, tmp_path, monkeypatch):  # noqa: F811
    assert train.main(args(world, tmp_path / "whole", steps=4)) == 0
    real, out, steps = train.train_step, tmp_path / "run", []
    monkeypatch.setattr(train, "train_step", lambda *a: steps.append(1) or (real(*a) if len(steps) < 4 else 1 / 0))
    with pytest.raises(ZeroDivisionError):
        train.main(args(world, out, steps=4, **{"save-every": 1}))
    monkeypatch.setattr(train, "train_step", real)
    path = out / "step-000003" / "trainer.json"
    saved = json.loads(path.read_text())
    saved["arguments"] = {k: x for k, x in saved["arguments"].items() if k not in ("curriculum", "stages", "rewarm", "upsample")}
    path.write_text(json.dumps(saved))
    assert train.main(["--resume", str(out)]) == 0
    assert metrics(out, "loss") == metrics(tmp_path / "whole", "loss")


def test_a_stage_of_one_segment_is_a_row_alone(world, short, tmp_path):  # noqa: F811
    """RMT's curriculum begins with one segment, which knows of no memory."""
    given = {**STAGED, "model": short, "segment": 12, "memory": "none", "pos": None}
    assert train.main(args(world, tmp_path / "run", **given)) == 0
    plain = {**STAGED, "model": short, "curriculum": None, "length": 12, "batch": 8, "micro": 4, "pos": None}
    assert train.main(args(world, tmp_path / "plain", **plain)) == 0
    got, want = ([x for *_, x in metrics(tmp_path / o, "loss")][:3] for o in ("run", "plain"))
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize(
    "more, says",
    [
        ({"length": 24}, "--length 24 contradicts"),
        ({"curriculum": "12:2,48:2"}, "--steps 9 contradicts"),
        ({"curriculum": "12,36,48"}, "no whole number of rows of 36"),
        ({"segment": 24}, "--segment 24 is longer than rows"),
        ({"rewarm": 10}, "--rewarm 10"),
        ({"curriculum": None, "length": 48, "rewarm": 2}, "--rewarm 2 is about the changes"),
        ({"pos": "yarn:factor=often"}, "factor takes a number"),
        ({"pos": "alibi:factor=auto"}, "no option 'factor'"),
        ({"upsample": 0}, "--upsample 0"),
        ({"data": "repo:nowhere"}, "is no folder"),
    ],
)
def test_what_contradicts_is_refused(more, says, world, short, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(llama, "load", lambda *a, **k: pytest.fail("loaded before it was refused"))
    said = refusal(args(world, tmp_path / "run", **{**STAGED, "model": short, **more}), monkeypatch, capsys)
    assert says in said and not (tmp_path / "run").exists()


def test_each_argument_of_data_keeps_its_share(world, tmp_path):  # noqa: F811
    for name, sizes in (("books", (900, 50)), ("notes", (40, 30, 30))):
        (tmp_path / name).mkdir()
        for i, n in enumerate(sizes):
            (tmp_path / name / f"{i}.txt").write_text("x" * (n - 1))
    given = [str(tmp_path / "notes"), str(tmp_path / "books")]
    a = train.SimpleNamespace(data=given, valid=[str(world / "held")], upsample=4, length=100)
    corpus, held_out, draws = train.corpora(a, llama.tokenizers.load(world / "model"))
    assert len(held_out) == 1 and corpus.origin.tolist() == [0, 1, 2, 3, 4]
    # of the books 950 tokens become 3650, so notes come as many times more often
    np.testing.assert_allclose(draws, [3650 / 950] * 3 + [4, 1])
    a.data = [str(tmp_path)]
    np.testing.assert_allclose(train.corpora(a, llama.tokenizers.load(world / "model"))[2], [4, 1, 1, 1, 1])
    a.upsample = 1
    assert train.corpora(a, llama.tokenizers.load(world / "model"))[2] is None


def test_an_epoch_reads_a_long_text_more_often(world, tmp_path, monkeypatch):  # noqa: F811
    real, read = train.nats, []
    monkeypatch.setattr(train, "nats", lambda model, batch: read.append(batch.tokens) or real(model, batch))
    for i, sign in enumerate("lss"):
        (tmp_path / f"{i}.txt").write_text(sign * (49 if sign == "s" else 99))
    given = {"data": tmp_path / "?.txt", "valid": world / "held", "upsample": 4, "length": 100, "batch": 5, "micro": 5, "valid-rows": 1}
    assert train.main(args(world, tmp_path / "run", **given, steps=1, warmup=0)) == 0
    assert [(read[1] == llama.tokenizers.load(world / "model").encode(sign)[0]).sum() for sign in "ls"] == [4 * 99, 2 * 49]


def test_short_texts_are_warned_of(world, tmp_path, capsys):  # noqa: F811
    assert train.main(args(world, tmp_path / "run", length=4096, batch=1, micro=1, steps=1, warmup=0, upsample=2)) == 0
    said = capsys.readouterr()
    assert "2,048 tokens of their document before them" in said.err and "no document has 4096" in said.err
    assert train.main(args(world, tmp_path / "other", length=8, steps=1, warmup=0)) == 0
    said = capsys.readouterr()
    assert "warning" not in said.err and "of all tokens are in documents of 8 or more" in said.out
