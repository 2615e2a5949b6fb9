"""Training: what a step computes, what a run leaves behind, and that no way of dying loses more than the work since the last save."""

import errno
import hashlib
import importlib.util
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import data
import errors
import rundir
import train

train.use_backend(None)
from train import llama, ops  # noqa: E402

ROOT = Path(__file__).parent.parent
SHAPE = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
WORDS = ["the", "of", "and", "a", "long", "short", "sequence", "remembers", "forgets", "every", "token", "window", "memory", "."]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny checkpoint of two layers, texts to train on, and held-out ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    ops.use("cpu")
    folder = tmp_path_factory.mktemp("world")
    vocab = {c: i for i, c in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    for name in ("model", "texts", "held"):
        (folder / name).mkdir()
    tok.save(str(folder / "model" / "tokenizer.json"))
    (folder / "model" / "tokenizer_config.json").write_text('{"eos_token": "<eos>", "tokenizer_class": "PreTrainedTokenizerFast"}')
    llama.write(tiny(), folder / "model")
    draw = random.Random(0)
    for i, n in enumerate((30, 300, 3, 500, 40)):
        (folder / "texts" / f"{i}.txt").write_text(" ".join(draw.choices(WORDS, k=n)))
    (folder / "held" / "h.txt").write_text(" ".join(draw.choices(WORDS, k=100)))
    return folder


@pytest.fixture(autouse=True)
def own_cache(world, monkeypatch):
    monkeypatch.setenv("NANOLONG_CACHE", str(world / "cache"))
    monkeypatch.setattr(train, "CACHE", world / "cache")


def tiny(**changes):
    with ops.shapes_only():
        model = llama.Llama(llama.Config(**{**SHAPE, "num_hidden_layers": 2, "tie_word_embeddings": True, **changes}))
    return model.init(0, std=0.1)


def args(world, out, **more):
    """The command line of a small run."""
    given = {"model": world / "model", "data": world / "texts", "valid": world / "held", "device": "cpu", "length": 48, "batch": 4}
    given |= {"micro": 2, "steps": 12, "lr": 1e-2, "warmup": 2, "valid-rows": 2, "out": out, **more}
    return [x for k, v in given.items() if v is not None for x in (f"--{k}", str(v)) if x != ""]


def metrics(out, *keys):
    """(step, kind, value) of the lines of a run, for these keys."""
    lines = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
    return [(x["step"], k, x[k]) for x in lines for k in keys if k in x]


def weights(model):
    return {n: ops.numpy(p).copy() for n, p in ops.parameters(model).items()}


def uneven(rows=4, length=40):
    """A batch whose rows hold 39, 4, 17 and 1 targets, the third one in two documents."""
    tokens = np.random.default_rng(3).integers(1, 257, (rows, length)).astype("int32")
    targets = np.roll(tokens, -1, 1)
    for row, n in enumerate((39, 4, 17, 1)):
        targets[row, n:] = -1
    begin = np.zeros_like(tokens)
    begin[2, 9:], targets[2, 8] = 9, -1
    return data.Batch(tokens, targets, begin, [[f"{i}.txt"] for i in range(rows)])


def test_the_loss_is_per_token_of_the_whole_step_however_the_rows_are_split():
    batch, found = uneven(), {}
    for micro in (1, 2, 4):
        model = tiny()
        optimizer = ops.AdamW(model, (0.9, 0.95), 1e-8, 0.1)
        steps = [train.train_step(model, optimizer, batch, micro, 0.5, 1e-3) for _ in range(3)]
        found[micro] = np.array([s[:2] for s in steps]), weights(model)
        assert [s[2] for s in steps] == [60] * 3
    for micro in (1, 2):
        np.testing.assert_allclose(found[micro][0], found[4][0], rtol=1e-5)
        for name, w in found[4][1].items():
            np.testing.assert_allclose(found[micro][1][name], w, atol=1e-5, err_msg=name)
    # against numpy, from the logits: a mean of the rows' means would be off by a tenth
    logits = ops.numpy(tiny()(ops.array(batch.tokens), begin=ops.array(batch.begin))).astype("float64")
    each = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, np.maximum(batch.targets, 0)[..., None], -1)[..., 0]
    live = batch.targets >= 0
    assert abs(found[1][0][0, 0] - each[live].mean()) < 1e-5
    assert abs(np.mean([each[i][live[i]].mean() for i in range(4)]) - each[live].mean()) > 1e-3


def test_weights_move_as_adamw_and_the_clip_say():
    model, batch, lr = tiny(), uneven(), 1e-2
    optimizer, w = ops.AdamW(model, (0.9, 0.95), 1e-8, 0.1), {n: x.astype("float64") for n, x in weights(model).items()}
    m, v = ({n: 0 * x for n, x in w.items()} for _ in range(2))
    # a quarter of the first gradient, all of the second: one scale for both would leave Adam's steps as they are
    for t, share in ((1, 0.25), (2, 2.0)):
        _, gradient = ops.value_and_grad(model, lambda: train.nats(model, batch) / 60)
        gradient = {n: ops.numpy(g).astype("float64") for n, g in gradient.items()}
        norm = math.sqrt(sum((g**2).sum() for g in gradient.values()))
        assert abs(train.train_step(model, optimizer, batch, 1, norm * share, lr)[1] / norm - 1) < 1e-5
        for n, g in gradient.items():
            g = g * min(1, share)
            m[n], v[n] = 0.9 * m[n] + 0.1 * g, 0.95 * v[n] + 0.05 * g**2
            w[n] -= lr * (0.1 if g.ndim > 1 else 0) * w[n] + lr * (m[n] / (1 - 0.9**t)) / (np.sqrt(v[n] / (1 - 0.95**t)) + 1e-8)
    for n, x in weights(model).items():
        sure = np.abs(gradient[n]) > 1e-5
        np.testing.assert_allclose(x[sure], w[n][sure], atol=1e-4, err_msg=n)


def test_a_norm_that_is_not_finite_changes_nothing(monkeypatch):
    model = tiny()
    before, optimizer, real = weights(model), ops.AdamW(model, (0.9, 0.95), 1e-8, 0.1), ops.global_norm
    monkeypatch.setattr(ops, "global_norm", lambda grads: real(grads) * math.inf)
    assert train.train_step(model, optimizer, uneven(), 2, 1.0, 1e-2)[1] == math.inf
    assert all((w == before[n]).all() for n, w in weights(model).items())


@pytest.mark.parametrize("attn", ["full", "longformer:window=7,n_global=2"])
def test_packed_documents_lose_as_much_as_documents_alone(attn):
    model, draw = tiny(attn=attn), np.random.default_rng(0)
    documents = [draw.integers(1, 257, n).astype("int32") for n in (11, 1, 19)]
    targets = [np.append(d[1:], -1) for d in documents]
    alone = sum(train.nats(model, data.Batch(d[None], t[None], d[None] * 0, [[]])).item() for d, t in zip(documents, targets))
    tokens, goals = (np.concatenate([*x, np.full(3, -1)])[None].astype("int32") for x in (documents, targets))
    begin = np.repeat([0, 11, 12, 31], [11, 1, 19, 3])[None].astype("int32")
    packed = train.nats(model, data.Batch(tokens, goals, begin, [[]])).item()
    assert abs(packed - alone) < 1e-3
    assert abs(train.nats(model, data.Batch(tokens, goals, begin * 0, [[]])).item() - alone) > 1


def test_rows_of_one_document_take_the_causal_path():
    seen, batch = [], uneven()

    class Spy:
        def __call__(self, tokens, begin, targets):
            seen.append(begin)
            return ops.cast(targets >= 0, ops.float32)

    assert train.nats(Spy(), batch).item() == 60
    train.nats(Spy(), batch._replace(begin=batch.begin * 0))
    assert seen[0] is not None and seen[1] is None


def test_random_numbers_go_on_where_they_were(tmp_path):
    draw = lambda: ops.numpy(ops.normal((64,), ops.float32)).tolist()
    ops.seed(7)
    draw()
    ops.write_safetensors(tmp_path / "random.safetensors", ops.random_state())
    later = draw()
    ops.seed(8)
    ops.restore_random(ops.read_safetensors(tmp_path / "random.safetensors"))
    assert draw() == later
    assert draw() != later


def test_the_learning_rate_rises_and_falls_as_stated():
    a = train.SimpleNamespace(lr=1.0, min_lr=0.1, warmup=4, steps=24)
    assert [train.lr_at(s, a) for s in (1, 2, 4)] == [0.25, 0.5, 1.0]
    assert abs(train.lr_at(14, a) - 0.55) < 1e-9 and abs(train.lr_at(24, a) - 0.1) < 1e-9
    assert train.lr_at(2, train.SimpleNamespace(lr=1.0, min_lr=0.1, warmup=0, steps=2)) == 0.1


def test_gradient_checkpointing_recomputes_and_changes_nothing(world, tmp_path, monkeypatch):
    calls, real = [], ops.checkpoint
    monkeypatch.setattr(ops, "checkpoint", lambda *a: calls.append(1) or real(*a))
    for flag in ("--checkpoint", "--no-checkpoint"):
        assert train.main([*args(world, tmp_path / flag, steps=4, attn="longformer:window=9"), flag]) == 0
        assert bool(calls) == (flag == "--checkpoint")
        calls.clear()
    with_, without = (metrics(tmp_path / flag, "loss", "grad_norm", "valid_loss") for flag in ("--checkpoint", "--no-checkpoint"))
    np.testing.assert_allclose([x[2] for x in with_], [x[2] for x in without], rtol=1e-5)


def test_bfloat16_activations_train_float32_weights(world, tmp_path):
    assert train.main(args(world, tmp_path / "low", dtype="bfloat16")) == 0
    assert train.main(args(world, tmp_path / "high")) == 0
    low, high = (np.array([x[2] for x in metrics(tmp_path / o, "loss")]) for o in ("low", "high"))
    assert 0 < np.abs(low - high).max() < 0.05
    saved = llama.read(tmp_path / "low" / "step-000012" / "model.safetensors")
    assert {str(x.dtype).split(".")[-1] for x in saved.values()} == {"float32"}
    # a weight kept in bfloat16 would have its low half empty
    assert any((ops.numpy(x).view("uint32") & 0xFFFF).any() for n, x in saved.items() if "embed" in n)


def test_a_run_learns_and_leaves_what_it_promises(world, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main(args(world, out, steps=60, **{"save-every": 10, "eval-every": 25}, attn="longformer:window=16", keep=2)) == 0
    loss, valid = metrics(out, "loss"), metrics(out, "valid_loss")
    assert [x[0] for x in loss] == list(range(1, 61)) and [x[0] for x in valid] == [0, 25, 50, 60]
    # words of a known list, in random order: from a guess among 257 bytes to well under half of it
    assert abs(valid[0][2] - math.log(257)) < 0.5 and valid[-1][2] < 0.45 * valid[0][2]
    rows, targets = data.Batches(data.Corpus.build([world / "texts"], llama.tokenizers.load(world / "model"), tmp_path / "c"), 4, 48, 0), 0
    for step, _, tokens in metrics(out, "tokens"):
        targets += int((rows.next().targets >= 0).sum())
        assert tokens == targets, step
    assert [p.name for p in rundir.checkpoints(out)] == ["step-000050", "step-000060"]
    assert sorted(p.name for p in out.iterdir() if p.is_file()) == ["loss.png", "metrics.jsonl", "trainer.json"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert f"{valid[0][2]:.4f} -> {valid[-1][2]:.4f}" in said and f"generate.py --model {out / 'step-000060'}" in said
    # the checkpoint, opened anew, has the loss that was measured
    model, tokenizer = llama.load(out / "step-000060", device="cpu")
    a = train.SimpleNamespace(micro=1, length=48, valid_rows=2, segment=None)
    held = data.Corpus.build([world / "held"], tokenizer, tmp_path / "c")
    assert abs(train.evaluate(model, held, a) - valid[-1][2]) < 1e-5


def test_the_bare_command(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train.DEFAULTS["cpu"], "length", 512)
    monkeypatch.setitem(sys.modules, "convert", train.SimpleNamespace(default_model=lambda: world / "model"))
    monkeypatch.setattr(data, "default_corpus", lambda: sorted((world / "texts").iterdir()))
    monkeypatch.setattr(
        train, "evaluate", lambda model, corpus, a, real=train.evaluate: held.append(corpus.names) or real(model, corpus, a)
    )
    held = []
    assert train.main(["--attn", "longformer"]) == 0
    (out,) = (tmp_path / "out").iterdir()
    valid = metrics(out, "valid_loss")
    assert out.name == "model-longformer" and valid[-1][2] < valid[0][2]
    assert llama.read_config(rundir.checkpoints(out)[-1]).attn == "longformer"
    # what is held out is not trained on
    corpus = data.Corpus.build(data.split(data.default_corpus())[0], llama.tokenizers.load(world / "model"), world / "cache")
    assert held[0] and not set(held[0]) & set(corpus.names) and len(held[0]) + len(corpus) == 5


def test_transformers_opens_a_checkpoint(world, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    assert train.main(args(world, tmp_path / "run", steps=3)) == 0
    folder = tmp_path / "run" / "step-000003"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    assert transformers.AutoTokenizer.from_pretrained(folder).encode("token") == list(llama.tokenizers.load(folder).encode("token"))
    tokens = uneven().tokens
    ours = ops.numpy(llama.load(folder, device="cpu")[0](ops.array(tokens)))
    with torch.no_grad():
        np.testing.assert_allclose(ours, theirs(torch.tensor(tokens).long()).logits.numpy(), atol=1e-4)
    assert np.abs(ours - ops.numpy(tiny()(ops.array(tokens)))).max() > 0.01


def test_random_weights_of_a_config(world, tmp_path):
    (tmp_path / "wide.json").write_text(json.dumps({"model_type": "llama", **SHAPE, "hidden_size": 48, "num_hidden_layers": 1}))
    given = args(world, tmp_path / "run", steps=2, init=tmp_path / "wide.json")
    assert train.main(given) == 0
    assert llama.read_config(tmp_path / "run" / "step-000002").hidden_size == 48
    assert abs(metrics(tmp_path / "run", "valid_loss")[0][2] - math.log(257)) < 0.1


def start(argv, **how):
    env = {**os.environ, "NANOLONG_BACKEND": ops.BACKEND, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *argv]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)


def test_killed_at_any_moment_it_resumes_to_the_same_losses(world, tmp_path):
    long = {"steps": 150, "save-every": 4, "eval-every": 30, "micro": 2}
    assert train.main(args(world, tmp_path / "whole", **long)) == 0
    out, draw, killed = tmp_path / "killed", random.Random(time.time_ns()), []
    for i, target in enumerate((5, 40, 75, 110)):
        process = start(args(world, out, **long) if i == 0 else ["--resume", str(out)], cwd=tmp_path)
        while process.poll() is None and (not (out / "metrics.jsonl").is_file() or len(metrics_so_far(out)) < target):
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.05))
        # the third one by Ctrl-C, which saves
        process.send_signal(signal.SIGINT if i == 2 else signal.SIGKILL)
        said, _ = process.communicate()
        assert process.returncode == (130 if i == 2 else -signal.SIGKILL)
        killed.append(len(metrics_so_far(out)))
        if i == 2:
            done = rundir.find(out)["step"]
            assert f"stopped after step {done}" in said and f"--resume {out}" in said and max(metrics_so_far(out)) == done
    assert killed[-1] < 150 and rundir.checkpoints(out), killed
    # what a kill in mid-save leaves behind
    (out / "step-000148.partial").mkdir()
    (out / "step-000148.partial" / "model.safetensors").write_text("half")
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 149, "loss": 9.9}\n{"step": 150, "lo')
    process = start(["--resume", str(out)], cwd=tmp_path)
    said = process.communicate()
    assert process.returncode == 0, said
    keys = ("loss", "valid_loss", "grad_norm", "lr", "tokens")
    assert metrics(out, *keys) == metrics(tmp_path / "whole", *keys)
    digest = lambda o, name: hashlib.sha256((o / "step-000150" / name).read_bytes()).hexdigest()
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert digest(out, name) == digest(tmp_path / "whole", name), name
    assert not list(out.glob("*.partial")) and len(rundir.checkpoints(out)) == 2


def metrics_so_far(out):
    """Steps in a file that is being written."""
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(x)["step"] for x in lines if x.endswith("\n") and '"loss"' in x]


def test_a_run_killed_before_its_first_checkpoint_begins_anew(world, tmp_path, monkeypatch):
    real = train.train_step
    monkeypatch.setattr(train, "train_step", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train.main(args(world, tmp_path / "run"))
    monkeypatch.setattr(train, "train_step", real)
    assert train.main(["--resume", str(tmp_path / "run")]) == 0 and train.main(args(world, tmp_path / "other")) == 0
    assert metrics(tmp_path / "run", "loss", "valid_loss") == metrics(tmp_path / "other", "loss", "valid_loss")


@pytest.mark.parametrize("attn", ["routing:clusters=3,window=9", "longformer:window=9,n_global=4,own_projections=true"])
def test_what_a_mechanism_learns_survives_a_stop(attn, world, tmp_path, monkeypatch):
    """Centroids that no gradient moves, and weights that a mechanism adds: trained, saved, and resumed to the bit."""
    real, out, steps = train.train_step, tmp_path / "run", []
    how = {"steps": 6, "save-every": 3, "attn": attn, "dtype": "float32"}
    assert train.main(args(world, tmp_path / "whole", **how)) == 0
    monkeypatch.setattr(train, "train_step", lambda *a: steps.append(1) or (real(*a) if len(steps) < 5 else 1 / 0))
    with pytest.raises(ZeroDivisionError):
        train.main(args(world, out, **how))
    monkeypatch.setattr(train, "train_step", real)
    assert train.main(["--resume", str(out)]) == 0
    assert metrics(out, "loss", "valid_loss") == metrics(tmp_path / "whole", "loss", "valid_loss")
    files = [[(folder / f"step-00000{i}" / "nanolong.safetensors").read_bytes() for i in (3, 6)] for folder in (out, tmp_path / "whole")]
    assert files[0] == files[1] and files[0][0] != files[0][1]
    losses = [x for *_, x in metrics(out, "loss")]
    assert losses[-1] < losses[0] - 0.5
    assert not any("centroids" in n for n in ops.read_safetensors(out / "step-000006" / "optimizer.safetensors"))


def test_a_loss_that_is_not_a_number_stops_the_run(world, tmp_path, monkeypatch, capsys):
    real, out, steps = train.nats, tmp_path / "run", []

    def nats(model, batch):
        steps.append(batch.names)
        return real(model, batch) * (math.nan if len(steps) == 1 + 2 * 8 else 1)

    monkeypatch.setattr(train, "nats", nats)
    # one validation batch, then two micro-batches a step: the second half of step 8 breaks
    assert train.main(args(world, out, steps=20, **{"eval-every": 20, "save-every": 4})) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert len(said) == 1 and "step 8: loss nan" in said[0]
    assert all(name in said[0] for rows in steps[-2:] for row in rows for name in row)
    assert [p.name for p in rundir.checkpoints(out)] == ["step-000004"] and "step-000004" in said[0]
    assert max(x[0] for x in metrics(out, "loss")) == 7
    monkeypatch.setattr(train, "nats", real)
    assert train.main(["--resume", str(out)]) == 0 and train.main(args(world, tmp_path / "whole", steps=20, **{"eval-every": 20})) == 0
    assert metrics(out, "loss") == metrics(tmp_path / "whole", "loss")


@pytest.mark.parametrize("how", ["raised", "real"])
def test_a_full_disk_leaves_the_last_checkpoint_whole(world, tmp_path, monkeypatch, capsys, how):
    out, real, written = tmp_path / "run", ops.write_safetensors, []
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def writer(path, arrays):
        written.append(path)
        if len(written) < 4:
            real(path, arrays)
        elif how == "real":
            # the writer's own way of failing in the middle of a file
            resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limit[1]))
            try:
                real(path, arrays)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        else:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(ops, "write_safetensors", writer)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    code = train.main(args(world, out, **{"save-every": 4}))
    signal.signal(signal.SIGXFSZ, before)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert code == 1 and len(said) == 1 and "step 8 could not be saved" in said[0] and "step-000004" in said[0]
    assert how == "real" or "No space left" in said[0]
    assert [p.name for p in out.iterdir() if p.is_dir()] == ["step-000004"]
    monkeypatch.setattr(ops, "write_safetensors", real)
    assert train.main(["--resume", str(out)]) == 0 and train.main(args(world, tmp_path / "whole")) == 0
    assert metrics(out, "loss") == metrics(tmp_path / "whole", "loss")


def refusal(argv, monkeypatch, capsys):
    """The one line with which a command is refused."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as leave:
        errors.main(train.main)
    said = capsys.readouterr()
    assert leave.value.code == 2 and said.out == "" and said.err.count("\n") == 1 and said.err.startswith("train.py: "), said
    return said.err


BAD = {
    "attn": ("longfromer", "longformer"),
    "pos": ("rope:base=2", "rope"),
    "adapter": ("lora9", "full"),
    "micro": ("3", "--batch 4"),
    "steps": ("0", "above 0"),
    "length": ("-4k", "--length"),
    "lr": ("nan", "--lr"),
    "warmup": ("13", "12"),
    "keep": ("0", "--keep"),
    "data": ("/no/such/*.txt", "/no/such"),
    "model": ("/no/such/model", "config.json"),
    "init": ("/no/such.json", "--init"),
    "device": ("abacus", "abacus"),
    "dtype": ("float16", "bfloat16"),
    "backend": ("jax", "torch"),
    "colour": ("red", "--colour"),
}


@pytest.mark.parametrize("flag", BAD)
def test_bad_input_is_refused_before_anything_is_written(world, tmp_path, monkeypatch, capsys, flag):
    value, named = BAD[flag]
    monkeypatch.setattr(llama, "load", lambda *a, **k: pytest.fail("loaded before it was refused"))
    assert named in refusal([*args(world, tmp_path / "run", **{flag: None}), f"--{flag}={value}"], monkeypatch, capsys)
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_resumed_is_refused(world, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    assert "no run" in refusal(["--resume", tmp_path], monkeypatch, capsys)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("precious")
    assert "not empty" in refusal(args(world, tmp_path / "taken"), monkeypatch, capsys)
    real = train.lr_at
    monkeypatch.setattr(train, "lr_at", lambda step, a: (step == 5 and os.kill(os.getpid(), signal.SIGINT)) or real(step, a))
    assert train.main(args(world, out, **{"save-every": 4})) == 130
    monkeypatch.setattr(train, "lr_at", real)
    assert [p.name for p in rundir.checkpoints(out)] == ["step-000004", "step-000005"]
    before = sorted((p, p.stat().st_mtime_ns) for p in out.rglob("*"))
    for flag, value in (
        ("length", "64"),
        ("lr", "0.02"),
        ("seed", "1"),
        ("steps", "24"),
        ("data", str(world / "held")),
        ("attn", "window"),
    ):
        said = refusal(["--resume", out, f"--{flag}={value}"], monkeypatch, capsys)
        assert f"--{flag} " in said, said
    assert "newest" in refusal(["--resume", out / "step-000004"], monkeypatch, capsys)
    assert sorted((p, p.stat().st_mtime_ns) for p in out.rglob("*")) == before
    assert train.main(["--resume", str(out / "step-000005"), "--length", "48", "--keep", "1", "--save-every", "100"]) == 0
    assert [p.name for p in rundir.checkpoints(out)] == ["step-000012"]
    assert "complete" in refusal(["--resume", out], monkeypatch, capsys)


def test_without_out_a_run_names_its_folder_and_spares_the_one_before(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert train.main(args(world, None, steps=1, warmup=0, attn="longformer:window=8")) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model-longformer-window-8", "model-longformer-window-8-2"]


@pytest.mark.parametrize("name", [n for n in ("torch", "mlx") if importlib.util.find_spec(n)])
def test_the_flag_picks_the_backend_and_the_other_stays_out(name):
    other = "torch" if name == "mlx" else "mlx"
    code = f"import sys, train; train.use_backend('{name}'); import ops; assert ops.BACKEND == '{name}' and '{other}' not in sys.modules"
    env = {k: v for k, v in os.environ.items() if k != "NANOLONG_BACKEND"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True)
