"""Do memories remember? Small Llamas, alike but for --memory, on tasks whose answer lies some segments back, and on text in short segments.

    python runs/remember.py --data NOVELS --valid TWO_OTHERS --jobs 12           # all tasks, all memories, two seeds: a GPU, minutes
    python runs/remember.py --toy --memories none infini --tasks copy            # a minute on a CPU: shows that all works
    python runs/remember.py --tasks text --data NOVELS --valid TWO_OTHERS --jobs 9 --seeds 1 --join bench/results/remember.json
    python runs/remember.py --table bench/results/remember.json --plot docs/remember.png

Protocol. Each model begins from the same random weights, is trained by train.py's own step in segments, and knows of earlier segments what
its memory hands on; gradients go through all boundaries (where a memory cuts them, xl and compressive, through none). In every row
something is said in one segment and asked for at the end of the last one, the distance being the number of segments from the one to the
other, and the rest is filler. copy: a string of random symbols, to be said again in order. recall: pairs of a key and a value, the values
being asked for by their keys in another order. passkey: digits in a sentence of words that the filler has too, at a random place of the
segment. Training begins at distance 0, inside of one segment; when fresh rows of the longest distance so far are right to 95%, it grows by
one. Half of the rows have the longest distance, the others a random one up to it. It ends when the farthest distance is passed, or after so
many steps or seconds. Accuracy is that of answer tokens on fresh rows, the right answers before each being given; chance is what guessing
among the symbols of the task gives. text: train.py on bytes of novels, as many steps for each memory, in short segments, and bits per byte
of held-out novels, read in rows as long as in training. All memories see segments of the same length. What a memory keeps of a row between
segments is counted in bytes.

What the sizes leave: `xl` keeps each layer's inputs of one segment, so a layer sees one segment back and each further layer one more, but
no gradient teaches them to pass anything on. `compressive` keeps its last segment raw and squeezes those before it, two tokens into one,
without a gradient either: what it knows of distance 2 and beyond stands in squeezed slots alone. `tokens`, `summary`, `state`, `melodi`
and `infini` keep no token, only vectors that they have made of them, or a matrix.

On text there are two more: `xl-small` caches as many tokens as `tokens` has vectors, which is what the paper of these compares with, and
hands on as many bytes; `tokens+xl` has both, a whole segment in the cache.

Claimed: recurrent memory tokens solve copying and associative retrieval over more segments than Transformer-XL does with its cached past
(Bulatov et al. 2022, arXiv:2207.06881). On text they are better than Transformer-XL with as many cached tokens, and that is better than no
memory: with 10 of each, in segments of 128 bytes, 1.23 and 1.28 bits a byte (enwik8, their table 4), in segments of 50 words perplexity
26.4, 29.0 and 39.1 (their table 5). A longer cache is better than both, 1.18 with 100 tokens, 26.5 with a whole segment, and better still
with memory tokens beside it (24.0 and 24.1, segments of 150). A compressive memory is better than Transformer-XL's (Rae et al. 2019,
arXiv:1911.05507).
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
import data
import errors
import passkey
import rundir
import tokenizer as tokenizers
import train
from bench import common
from errors import Refused
from runs import extrapolate, lengths

# sized so that what is asked for is not among raw tokens, but for xl; {n}: a segment's tokens
MEMORIES = {
    "none": "none",
    "xl": "xl:length={n}",
    "compressive": "compressive:length={n},compressed=96,rate=2,closed=false",
    "tokens": "tokens:size=8,closed=false",
    "summary": "summary:k=8,chunks=16,closed=false",
    "state": "state:size=8,closed=false",
    "melodi": "melodi:short=8,long=4,windows=16,closed=false",
    "infini": "infini:gate=sigmoid",
}
# and on text alone
ON_TEXT = {"xl-small": "xl:length=8", "tokens+xl": "tokens:size=8,keep=xl,budget={n},closed=false"}
SPELT = MEMORIES | ON_TEXT
COLORS = ("#999999", "#e0a458", "#59a14f", "#d1495b", "#e377c2", "#4c78a8", "#b07aa1", "#76b7b2", "#f2cf9b", "#8c2d3a")
COLORS = dict(zip(SPELT, COLORS))
color = lambda label: COLORS.get(label.partition(":")[0], "black")
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
TRAINING = {"segment": 20, "rows": 256, "steps": 1200, "warmup": 50, "lr": 2e-3, "farthest": 4, "beyond": 8, "fresh": 256, "seconds": 200}
TEXT_SHAPE = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {"text_segment": 64, "text_segments": 6, "text_rows": 128, "text_steps": 500, "text_lr": 2e-3, "read": 1 << 20}
TOY = {"rows": 32, "steps": 300, "farthest": 2, "beyond": 3, "fresh": 64}
TOY |= {"text_segment": 32, "text_segments": 4, "text_rows": 16, "text_steps": 60, "read": 1 << 14}
PASSED = 0.95
CHECK = 20  # steps between looks at fresh rows


# ---------------------------------------------------------------- tasks: what is said, what is asked, what is right

SYMBOLS, FILLER, SAY, ASK = 16, 16, 32, 33
WORDS = {word: FILLER + i for i, word in enumerate(dict.fromkeys(" ".join([*passkey.FILLER, "pass key"]).split()))}
VOCABULARY = 64


def copy(draw, rows, n=6):
    """Random symbols, said again in their order."""
    x = draw.integers(0, SYMBOLS, (rows, n))
    mark = lambda token: np.full((rows, 1), token)
    return np.concatenate([mark(SAY), x], 1), np.concatenate([mark(ASK), x], 1), np.concatenate([x, mark(data.NONE)], 1)


def recall(draw, rows, n=4):
    """Pairs of a key and a value; every value is asked for by its key, in another order."""
    keys = FILLER + draw.permuted(np.tile(np.arange(SYMBOLS), (rows, 1)), axis=1)[:, :n]
    values, order = draw.integers(0, SYMBOLS, (rows, n)), draw.permuted(np.tile(np.arange(n), (rows, 1)), axis=1)
    pairs = lambda a, b: np.stack([a, b], 2).reshape(rows, -1)
    asked, right = (np.take_along_axis(x, order, 1) for x in (keys, values))
    return pairs(keys, values), pairs(asked, right), pairs(right, np.full_like(right, data.NONE))


def key(draw, rows, n=4):
    """A pass key of n digits in a sentence of its own."""
    digits = draw.integers(0, 10, (rows, n))
    said = np.tile([WORDS[w] for w in ("The", "pass", "key", "is")], (rows, 1))
    right = np.concatenate([np.full((rows, said.shape[1] - 1), data.NONE), digits, np.full((rows, 1), data.NONE)], 1)
    return np.concatenate([said, digits], 1), np.concatenate([said, digits], 1), right


def symbols(draw, rows, n):
    """Filler: random symbols that no task asks for."""
    return draw.integers(ASK + 1, VOCABULARY, (rows, n))


def words(draw, rows, n):
    """Filler: the passkey's sentences, from a random one on."""
    text = np.array([WORDS[w] for w in " ".join(passkey.FILLER).split()])
    return text[(draw.integers(0, len(text), (rows, 1)) + np.arange(n)) % len(text)]


# what is said and asked, filler, is it said anywhere in a segment or at its beginning, symbols to guess among
TASKS = {"copy": (copy, symbols, False, SYMBOLS), "recall": (recall, symbols, False, SYMBOLS), "passkey": (key, words, True, 10)}


def sample(task, draw, distances, segment):
    """A data.Batch of a row for each distance, all as long as the longest needs, the question at the end of the last segment."""
    what, filler, anywhere, _ = TASKS[task]
    rows, n = len(distances), distances.max() + 1
    said, asked, right = what(draw, rows)
    room = segment - said.shape[1] - asked.shape[1]
    if room < 0:
        raise Refused(f"--segment {segment} does not hold what {task} says and asks: it must be at least {segment - room}")
    tokens = filler(draw, rows, n * segment)
    targets = np.full_like(tokens, data.NONE)
    # in the question's own segment it must end before the question
    inside = draw.integers(0, room + np.where(distances > 0, asked.shape[1], 0) + 1) if anywhere else 0
    place = lambda at, x: (np.arange(rows)[:, None], at[:, None] + np.arange(x.shape[1]))
    tokens[place((n - 1 - distances) * segment + inside, said)] = said
    tokens[:, -asked.shape[1] :], targets[:, -asked.shape[1] :] = asked, right
    whole = lambda x: x.astype("int32")
    return data.Batch(whole(tokens), whole(targets), np.zeros(tokens.shape, "int32"), [[task]] * rows)


def accuracy(model, batch, segment):
    """The share of right answer tokens, and the bytes that the memory keeps of a row before the last segment."""
    import ops
    import segments

    model.model.patterns(training=False)
    state, right = None, 0
    with ops.no_grad():
        for piece in segments.cut(batch, segment):
            kept, given, asked = state, segments.inputs(piece), piece.targets >= 0
            logits, state, *_ = segments.read(model, given.tokens, state, begin=given.begin)
            if asked.any():
                right += int((ops.numpy(ops.argmax(logits, -1)) == piece.targets)[asked].sum())
    model.model.patterns(training=True)
    found = []
    ops.tree_map(lambda x: found.append(ops.nbytes(x)) if x.shape and x.shape[0] == len(batch.tokens) else None, kept)
    return right / int((batch.targets >= 0).sum()), sum(found) // len(batch.tokens)


def learn(task, memory, seed, a):
    """The row of a model that is trained on a task."""
    import model as llama
    import ops
    from kernels.replayed import Replays

    start = time.perf_counter()
    ops.seed(seed)
    config = llama.Config(vocab_size=VOCABULARY, memory=memory, **SHAPE)
    with ops.shapes_only():
        model = llama.Llama(config)
    # as wide as keeps the size of what goes through a matrix
    model.init(seed, std=config.hidden_size**-0.5)
    model.dtype = llama.as_dtype(a.dtype or "float32")
    model.model.patterns(training=True)
    bptt = train.reach(model, SimpleNamespace(bptt=None))
    if ops.BACKEND == "torch" and ops.on_gpu():
        # kernels so small are asked for one by one more slowly than they run
        model.replays = Replays(model, a.rows * a.segment)
    optimizer = ops.AdamW(model, (0.9, 0.95), 1e-8, 0.01)
    learning, testing = (np.random.default_rng([seed, i]) for i in (1, 2))
    test = lambda d, rows: accuracy(model, sample(task, testing, np.full(rows, d), a.segment), a.segment)
    far, passed, step, losses = 0, [], 0, []
    while step < a.steps and far <= a.farthest and time.perf_counter() - start < a.seconds:
        step += 1
        distances = np.where(learning.random(a.rows) < 0.5, far, learning.integers(0, far + 1, a.rows))
        lr = a.lr * min(1, step / a.warmup)
        batch = sample(task, learning, distances, a.segment)
        loss, norm, _ = train.train_step(model, optimizer, batch, a.rows, 1.0, lr, a.segment, bptt)
        if not math.isfinite(loss + norm):
            raise Refused(f"{task}, {memory}: loss {loss} at step {step}")
        losses.append(loss)
        if step % CHECK == 0:
            now = test(far, a.fresh)[0]
            if step % (5 * CHECK) == 0:
                cli.say(f"{task}, {memory}: step {step}, distance {far}, loss {loss:.3f}, accuracy {now:.2f}")
            if now >= PASSED:
                passed.append({"distance": far, "step": step, "seconds": round(time.perf_counter() - start, 1)})
                far += 1
    row = {"task": task, **about(model, memory, seed), "steps": step, "seconds": round(time.perf_counter() - start, 1), "passed": passed}
    cells, kept = [], 0
    for d in range(a.beyond + 1):
        right, kept = test(d, 4 * a.fresh)
        cells.append({"distance": d, "accuracy": right})
    row |= {"chance": 1 / TASKS[task][3], "bytes": kept, "cells": cells, "loss": [round(x, 4) for x in losses[:: max(1, a.steps // 100)]]}
    return row


def about(model, memory, seed):
    import ops

    return {"memory": memory, "seed": seed, "parameters": sum(int(np.prod(p.shape)) for p in ops.parameters(model).values())}


# ---------------------------------------------------------------- text


def read(memory, seed, a):
    """The row of a model that train.py trains on text."""
    from model import load

    start, name = time.perf_counter(), slug("text", memory, seed)
    length = a.text_segment * a.text_segments
    folder = extrapolate.byte_folder(a.models.absolute() / f"start-{name}", TEXT_SHAPE, length)
    out = a.models.absolute() / name
    # what a run that was cut off left
    shutil.rmtree(out, ignore_errors=True)
    flags = {"model": folder, "init": folder / "config.json", "out": out, "memory": memory, "seed": seed, "segment": a.text_segment}
    flags |= {"length": length, "batch": a.text_rows, "micro": a.text_rows, "steps": a.text_steps, "warmup": a.text_steps // 10}
    flags |= {"lr": a.text_lr, "valid-rows": max(1, a.read // length), "eval-every": max(1, a.text_steps // 4), "keep": 1}
    flags |= {k: getattr(a, k) for k in ("backend", "device", "dtype") if getattr(a, k)}
    files = [x for k in ("data", "valid") if getattr(a, k) for x in (f"--{k}", *getattr(a, k))]
    if status := train.main([x for k, v in flags.items() for x in (f"--{k}", str(v))] + [*files, "--no-checkpoint"]):
        raise Refused(f"text, {memory}: training ended with {status}")
    model, _ = load(rundir.checkpoints(out)[-1], device=a.device)
    training = extrapolate.trained(out)
    row = {"task": "text", **about(model, memory, seed), "steps": a.text_steps, "seconds": round(time.perf_counter() - start, 1)}
    row |= {"bytes": kept(model, a.text_segment), "bits_per_byte": training["valid_loss"][-1] / math.log(2), "training": training}
    return row


def kept(model, segment):
    """The bytes that the model's memory keeps of a row after many segments."""
    batch = data.Batch(*(np.zeros((1, 16 * segment), "int32") for _ in range(3)), [[]])
    return accuracy(model, batch, segment)[1]


# ---------------------------------------------------------------- all of them


def one(task, memory, seed, args):
    return read(memory, seed, args) if task == "text" else learn(task, memory, seed, args)


def slug(*words):
    return re.sub(r"[^\w.]+", "-", "-".join(map(str, words)))


def elsewhere(task, memory, seed, args):
    """The same row, made by a process of its own, or by an earlier call's."""
    name, parts = slug(task, memory, seed), args.models.absolute() / "parts"
    part, log, size = parts / f"{name}.json", parts / f"{name}.log", {k: getattr(args, k) for k in (*TRAINING, *TEXT)}
    if not (row := finished(part, size)):
        parts.mkdir(parents=True, exist_ok=True)
        given = size | {k: getattr(args, k) for k in ("backend", "device", "dtype", "data", "valid")}
        given |= {"tasks": task, "memories": memory, "seed": seed, "seeds": 1, "models": args.models.absolute(), "out": parts, "name": name}
        flags = []
        for k, v in given.items():
            flags += [] if v is None else [f"--{k.replace('_', '-')}", *map(str, v if isinstance(v, list) else [v])]
        # each has a core: threads that wait for each other cost more than they do; and in segments so short a mask costs less than a plan
        env = {"NANOLONG_KERNEL": "dense", **os.environ, "OMP_NUM_THREADS": "1"}
        with open(log, "w") as said:
            done = subprocess.run([sys.executable, str(Path(__file__).resolve()), *flags], stdout=said, stderr=said, env=env)
        if not (row := finished(part, size)):
            raise Refused(f"{name} ended with {done.returncode}:\n{log.read_text()[-1500:]}")
    return row


def finished(part, size):
    """The row of a part's file, if it is there and of this size."""
    try:
        r = json.loads(part.read_text())
        return r["rows"][0] if all(r["settings"][k] == v for k, v in size.items()) else None
    except (OSError, ValueError, LookupError):
        return None


def run(args, result, keep):
    """Fill result["rows"]; keep() is called after each. Returns what is missing, as sentences."""
    missing, done, start = [], set(), time.perf_counter()
    asked = wanted(args)
    order = [*(at for row in result["rows"] if (at := place(row)) not in asked), *asked]

    def work(what):
        task, label, seed = what
        try:
            if args.limit and time.perf_counter() - start > args.limit:
                raise Refused(f"{task} with {label}, seed {seed}: not begun within --limit {args.limit} seconds")
            row = (elsewhere if args.jobs else one)(task, sized(label, task, args), seed, args)
        except Refused as no:
            # the others are worth having without it
            cli.say(no)
            return missing.append(f"{task} with {label}, seed {seed}")
        done.add(what)
        rows = [*(r for r in result["rows"] if place(r) != (task, label, seed)), {**row, "label": label}]
        result["rows"] = sorted(rows, key=lambda r: order.index(place(r)))
        result["seconds"] = round(time.perf_counter() - start, 1)
        keep()
        cli.say(f"{len(done) + len(missing)} of {len(asked)}: {said(row)}")

    if args.jobs:
        if "text" in args.tasks:
            # into the cache, before all want it at once
            paths = SimpleNamespace(data=args.data, valid=args.valid, upsample=1)
            train.corpora(paths, tokenizers.load(extrapolate.byte_folder(args.models.absolute() / "start", TEXT_SHAPE, 1)))
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(work, asked))
    else:
        for what in asked:
            work(what)
    return missing


def wanted(args):
    """Task, memory and seed of every row, the longest first."""
    tasks = sorted(args.tasks, key=lambda t: t != "text")
    return [(t, m, s) for s in range(args.seed, args.seed + args.seeds) for t in tasks for m in memories(t, args)]


def memories(task, args):
    """Those that a task is tried with."""
    return args.memories or list(SPELT if task == "text" else MEMORIES)


def sized(label, task, args):
    """The spelling of a memory for a task: as given, or by name alone as it is sized here."""
    return SPELT.get(label, label).format(n=args.text_segment if task == "text" else args.segment)


def place(row):
    return row["task"], row["label"], row["seed"]


def joined(result, args):
    """The result with the rows of the one that --join names, which this call makes anew or leaves as they are."""
    sizes = lambda tasks: {k for t in tasks for k in (TEXT if t == "text" else TRAINING)}
    try:
        r = json.loads(args.join.read_text())
        before, after = r["settings"], result["settings"]
        stay = {task for row in r["rows"] if (task := row["task"]) in args.tasks and place(row) not in wanted(args)}
        if differs := sorted(k for k in sizes(stay) if before[k] != after[k]):
            raise Refused(f"--join {args.join} was made with {differs[0]} {before[differs[0]]}, and this is {after[differs[0]]}")
        labels = {label: {} for label in r["memories"]} | result["memories"]
        specs = {label: {**r["memories"].get(label, {}), **new} for label, new in labels.items()}
        earlier = {k: r[k] for k in ("machine", "command", "joined") if k in r}
        settings = {**after, **before, **{k: after[k] for k in sizes(args.tasks)}}
        return {**result, "joined": earlier, "settings": settings, "memories": specs, "rows": r["rows"]}
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as no:
        raise Refused(f"--join {args.join} is no result of this script: {type(no).__name__} {no}") from None


# ---------------------------------------------------------------- what they say


def said(row):
    """A row as a line."""
    what = f"{row['task']}, {row['memory']}, seed {row['seed']}: {row['steps']} steps, {row['seconds']} s, "
    if row["task"] == "text":
        return what + f"{row['bits_per_byte']:.3f} bits per byte"
    return what + f"accuracy {', '.join('{accuracy:.2f}'.format(**c) for c in row['cells'])} at distances 0 to {len(row['cells']) - 1}"


def grouped(r):
    """memory -> task -> its rows, one a seed; in the order of SPELT, what is not there last."""
    found = {label: {} for label in SPELT}
    for row in r["rows"]:
        found.setdefault(row["label"], {}).setdefault(row["task"], []).append(row)
    return {label: by_task for label, by_task in found.items() if by_task}


def table(r):
    """The README's table: accuracy at some distances, the mean of the seeds; what text came to on the way and at the end."""
    groups = grouped(r)
    tasks = [t for t in TASKS if any(t in g for g in groups.values())]
    farthest, beyond = (r["settings"][k] for k in ("farthest", "beyond"))
    shown = sorted({0, 1, min(2, farthest), farthest, beyond})
    head = ["`--memory`", *(f"{t}, {', '.join(map(str, shown))} back" for t in tasks)]
    read = [row for g in groups.values() for row in g.get("text", [])]
    n = min((len(way(row)) for row in read), default=0)
    text = "text, bits per byte" + (f" after {', '.join(str(read[0]['steps'] * (i + 1) // n) for i in range(n))} steps" if n > 1 else "")
    head += ["steps", "kept, KB"] * bool(tasks) + [text, "kept, KB"] * bool(read)
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    mean = lambda rows, d: np.mean([row["cells"][d]["accuracy"] for row in rows])
    for name, by_task in groups.items():
        cells = [f"`{name}`"]
        for t in tasks:
            rows = by_task.get(t, [])
            cells.append(", ".join(f"{mean(rows, d):.0%}" for d in shown) if rows else "")
        some = [rows for t, rows in by_task.items() if t in tasks]
        if tasks:
            cells.append(", ".join(f"{np.mean([row['steps'] for row in rows]):.0f}" for rows in some))
            cells.append(", ".join(dict.fromkeys(f"{rows[0]['bytes'] / 1024:.1f}" for rows in some)))
        if read:
            rows = by_task.get("text", [])
            cells.append(" and ".join(", ".join(f"{x:.3f}" for x in way(row)[-n:]) for row in rows))
            cells.append(f"{rows[0]['bytes'] / 1024:.1f}" if rows else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def way(row):
    """Bits per byte of held-out text, each time that it was read while a model trained on text."""
    return [x / math.log(2) for x in row["training"]["valid_loss"][1:]]


def picture(r, path):
    from matplotlib.figure import Figure

    groups = grouped(r)
    tasks = [t for t in (*TASKS, "text") if any(t in g for g in groups.values())]
    figure = Figure(figsize=(1 + 3.2 * len(tasks), 3.6), dpi=120, layout="constrained")
    lines = {}
    for ax, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks):
        here = {name: g[task] for name, g in groups.items() if task in g}
        ax.set_title(task)
        if task == "text":
            bits = [np.mean([row["bits_per_byte"] for row in rows]) for rows in here.values()]
            ax.bar(list(here), bits, color=[color(name) for name in here])
            for i, rows in enumerate(here.values()):
                ax.plot([i] * len(rows), [row["bits_per_byte"] for row in rows], ".", color="black", markersize=4)
            ax.set(ylabel="bits per byte", ylim=(min(bits) - 0.1, max(bits) + 0.05))
            ax.tick_params(axis="x", rotation=60)
            continue
        for name, rows in here.items():
            far = [c["distance"] for c in rows[0]["cells"]]
            every = np.array([[c["accuracy"] for c in row["cells"]] for row in rows])
            (lines[name],) = ax.plot(far, every.mean(0), "o-", markersize=3, color=color(name), label=name)
            ax.fill_between(far, every.min(0), every.max(0), color=color(name), alpha=0.15, linewidth=0)
        ax.axhline(rows[0]["chance"], color="black", linewidth=0.8, linestyle=":")
        ax.axvline(r["settings"]["farthest"] + 0.5, color="black", linewidth=0.8, linestyle="--")
        ax.set(xlabel="segments back", ylabel="accuracy", ylim=(0, 1.03))
        ax.grid(alpha=0.3)
    if lines:
        figure.legend(handles=lines.values(), loc="outside lower center", ncols=len(lines), fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    cli.write(path, lambda partial: figure.savefig(partial, format=path.suffix[1:]))
    cli.say(f"drawn into {path} (dotted: chance; dashed: the longest distance trained at)")


def arguments(argv=None):
    p = lengths.parser(__doc__)
    p.add_argument("--toy", action="store_true", help="few rows, few steps")
    p.add_argument("--tasks", nargs="+", choices=[*TASKS, "text"], default=[*TASKS, "text"], metavar="TASK", help="default: all")
    p.add_argument("--memories", nargs="+", metavar="SPEC", help=f"default: {' '.join(MEMORIES)}, and on text {' '.join(ON_TEXT)}")
    p.add_argument("--join", type=Path, metavar="FILE", help="an earlier result, whose other rows stand beside these")
    p.add_argument("--seeds", type=cli.whole, default=2, metavar="N", help="how many, from --seed on (default 2)")
    p.add_argument("--jobs", type=cli.whole, default=0, metavar="N", help="processes at a time (default 0: all in this one)")
    p.add_argument("--limit", type=cli.whole, metavar="SECONDS", help="begin nothing after so many, and say what is missing")
    p.add_argument("--data", nargs="+", metavar="PATH", help="texts to train on (default: Python's own library)")
    p.add_argument("--valid", nargs="+", metavar="PATH", help="held-out texts (default: a twentieth of the data's files)")
    p.add_argument("--models", type=Path, default=Path("out") / "remember", metavar="FOLDER", help="what is left of the runs")
    for k, default in (TRAINING | TEXT).items():
        kind, toy = float if isinstance(default, float) else cli.whole, f", with --toy {TOY[k]}" if k in TOY else ""
        p.add_argument(f"--{k.replace('_', '-')}", type=kind, help=f"default {default}{toy}")
    args = p.parse_args(argv)
    for k, default in (TRAINING | TEXT | (TOY if args.toy else {})).items():
        if getattr(args, k) is None:
            setattr(args, k, default)
        if not getattr(args, k) > 0:
            raise Refused(f"--{k.replace('_', '-')} {getattr(args, k)} is not possible: it must be above 0")
    if args.beyond < args.farthest:
        raise Refused(f"--beyond {args.beyond} is less than --farthest {args.farthest}: it is how far accuracy is looked at")
    return args


def main(argv=None):
    args = arguments(argv)
    if args.table:
        return lengths.from_table(args, table, picture)
    specs = {}
    for t in args.tasks:
        for label in memories(t, args):
            specs.setdefault(label, {})[t] = sized(label, t, args)
    cli.check_spelling(memory="/".join(spec for by_task in specs.values() for spec in by_task.values()))
    train.use_backend(args.backend)
    import ops

    kind = ops.use(args.device)
    settings = {k: getattr(args, k) for k in (*TRAINING, *TEXT, "seed", "seeds", "jobs")} | {"device": kind}
    settings |= {"dtype": args.dtype or "float32", "text_dtype": args.dtype or ("bfloat16" if ops.on_gpu() else "float32")}
    result = {
        **{"machine": common.machine(), "command": lengths.command(__file__), "protocol": lengths.protocol(__doc__)},
        **{"shape": SHAPE, "text_shape": TEXT_SHAPE, "settings": settings, "memories": specs, "rows": []},
    }
    result = joined(result, args) if args.join else result
    missing = run(args, result, lengths.keeper(args.out / f"{args.name or ('remember-toy' if args.toy else 'remember')}.json", result))
    if result["rows"]:
        print(table(result))
    if args.plot and result["rows"]:
        picture(result, args.plot)
    if missing:
        raise Refused(f"not trained: {'; '.join(missing)}; the reasons stand above")


if __name__ == "__main__":
    errors.main(main)
