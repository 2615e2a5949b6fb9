"""SmolLM2-135M-Instruct from 8K to 64K tokens: yarn, some minutes of fine-tuning on long texts, and what each way to do it gives.

    bash runs/extend_smollm2.sh --data NOVELS --valid TWO_OTHERS          # a quarter of an hour on one H100
    python runs/extend.py --only longformer s2-longlora --steps 40        # some of the choices, shorter
    python runs/extend.py --toy                                           # a minute or two on a CPU: shows that all works
    python runs/extend.py --table bench/results/extend.json --plot docs/extend.png

Protocol. Each choice is one run of train.py from the same checkpoint over the same batches in the same order, as many tokens a step in
all stages; the stages' rows are longer and longer, and yarn's factor is their length over the model's own; s2's groups stay a quarter of
the longest. Full fine-tuning learns at --lr, an adapter at its own file's rate. Loss is measured on windows of the longest length from
the front of each held-out text, as many of each: a window is read at once, positions from 0, with the factor of the longest length, and
the mean is taken over the positions of a range, in nats a token. Passkey is the prompt of passkey.py in plain text, read at once and
answered greedily; depths are spread evenly from before the filler to after it, and the keys are the same for every model. What a pattern
was trained with and what it is read with are two things: `full` is full causal attention over everything, whatever was trained; `own` is
the pattern itself, over whole texts, with nothing forgotten. s2 is made for training alone: read with its own it has a loss, to show why,
and answers nothing. Before training the model is read with plain rope and with yarn. Training seconds are the sum over steps, first
compilations included, without validation and saving; tokens/s are the median of the last stage; the peak is the device's. One seed; which
texts the model saw before is not known: compare the choices, not the model with others.

Claimed: yarn needs a fraction of the training tokens that earlier schemes do (Peng et al. 2023, arXiv:2309.00071); training with shifted
groups and reading with full attention comes close to training with full attention, where LoRA alone falls behind and norms and
embedding close the gap (Chen et al. 2023, arXiv:2309.12307); longer stages one after the other train a window with global tokens (Beltagy
et al. 2020, arXiv:2004.05150).
"""

import gc
import json
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
import curriculum
import data
import errors
import evaluate
import passkey
import plugins
import rundir
import train
from bench import common
from errors import Refused
from runs import extrapolate, lengths, stream

# what train.py is told beside what all choices have; the most telling ones first, for a run that is cut short
LONGFORMER = "longformer:window={window},n_global={n_global}"
CHOICES = {
    "longformer": {"attn": LONGFORMER},
    "s2-longlora": {"attn": "s2:group={group}", "adapter": "longlora"},
    "full": {"attn": "full"},
    # the paper's control: as longlora, but for norms and embedding
    "s2-lora": {"attn": "s2:group={group}", "adapter": "lora:targets=q_proj+k_proj+v_proj+o_proj"},
    # the same loss and gradients as longformer's, in the memory of a segment
    "longformer-segments": {
        **{"attn": LONGFORMER, "segment": "{segment}"},
        "memory": "sinks:budget={budget},sinks={n_global},kv_positions=absolute",
    },
    "s2": {"attn": "s2:group={group}"},
}
BEFORE = ("rope", "yarn")
LONG = {"lengths": "8k,16k,32k,64k", "asked": "8k,16k,32k,64k", "curriculum": "16k,32k,64k", "batch": 1, "steps": 100, "lr": 2e-4}
LONG |= {"window": 4096, "n_global": 64, "segment": 8192, "rows": 4, "depths": 5, "trials": 2}
# bytes instead of tokens, so that a passkey's prompt needs some hundred
TOY = {"lengths": "128,256,512,1k", "asked": "512,1k", "curriculum": "256,512,1k", "batch": 1, "steps": 6, "lr": 1e-3}
TOY |= {"window": 64, "n_global": 4, "segment": 128, "rows": 2, "depths": 2, "trials": 1}
TOY_TRAINED = 128
COLORS = {
    **{"rope": "#999999", "yarn": "#333333", "longformer": "#4c78a8", "longformer-segments": "#76b7b2", "full": "#59a14f"},
    **{"s2": "#e0a458", "s2-longlora": "#d1495b", "s2-lora": "#b07aa1"},
}


# ---------------------------------------------------------------- training


def own_library():
    """(training, held-out) sources of Python's own library: packages as one document each, two of the longest held out."""
    root = Path(sysconfig.get_path("stdlib"))
    train, valid = data.split([path for path in data.default_corpus() if path.parent == root])
    packages = sorted(path.parent for path in root.glob("*/__init__.py") if path.parent.name not in ("site-packages", "test", "idlelib"))
    held = [path for path in packages if path.name in ("asyncio", "email")]
    whole = lambda paths: [f"repo:{path}" for path in paths]
    return [*map(str, train), *whole(p for p in packages if p not in held)], whole(held) or [*map(str, valid)]


def flags(name, args):
    """What a choice tells train.py, but for model, texts and place."""
    values = {k: getattr(args, k) for k in ("window", "n_global", "segment", "group")} | {"budget": args.window + args.n_global}
    said = {k: text.format(**values) for k, text in CHOICES[name].items()}
    if "adapter" not in said:
        # an adapter brings its own
        said["lr"] = f"{args.lr:g}"
    said |= {"pos": f"yarn:{curriculum.AUTO}", "curriculum": args.curriculum, "batch": args.batch, "steps": args.steps}
    said |= {"warmup": max(1, args.steps // 10), "eval-every": args.steps, "valid-rows": 1, "keep": 1, "seed": args.seed}
    said |= {k: getattr(args, k) for k in ("backend", "device", "dtype") if getattr(args, k)}
    return [x for k, value in said.items() for x in (f"--{k}", str(value))] + ["--checkpoint" if args.checkpoint else "--no-checkpoint"]


def trained(name, out, args, texts, seconds):
    """Train a choice into a run's folder, or go on where it was cut off; nothing where it is complete. Returns the run's record."""
    mine = flags(name, args)
    words = ["--model", str(args.folder), "--data", *texts["data"], "--valid", *texts["valid"], *mine, "--out", str(out)]
    shown = ["python", "train.py", "--model", "MODEL", "--data", "TEXTS", "--valid", "OTHERS", *mine]
    if (out / "trainer.json").is_file():
        found, asked = rundir.find(out), train.parse(words)
        differs = [k for k in asked if k not in train.FREE and found["arguments"][k] != asked[k]]
        if differs:
            raise Refused(f"{out} was trained with another --{differs[0]}: name another folder with --models, or remove it")
        words = ["--resume", str(out)] if found["step"] < args.steps else None
    start = time.perf_counter()
    if words:
        cli.say("$ " + shlex.join(shown))
        call([sys.executable, str(common.ROOT / "train.py"), *words], out.with_name(f"{out.name}.log"), seconds)
    record = {"steps": args.steps, **extrapolate.trained(out), "wall_seconds": round(time.perf_counter() - start, 1)}
    steps = [x for x in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "loss" in x]
    speeds = {n: sorted(x["tokens_per_second"] for x in steps if x["length"] == n) for n in {x["length"] for x in steps}}
    # of each stage; the slowest of one is its first step, which compiles
    record["speeds"] = {str(n): round(speeds[n][len(speeds[n]) // 2]) for n in sorted(speeds)}
    return {"command": shlex.join(shown), "training": record}


def call(command, log, seconds):
    """Run train.py, what it says going to a file; after so many seconds it is asked to save and leave. Raises Refused if it is not done."""
    with open(log, "a") as said:
        child = subprocess.Popen(command, stdout=said, stderr=said)
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGINT)
            child.wait()
            raise Refused("cut off by --limit; the same command goes on from what was saved") from None
        except BaseException:
            child.terminate()
            raise
    if code:
        tail = log.read_text()[-1500:].replace("\r", "\n")
        raise Refused(f"train.py ended with {code} (all that it said: {log})\n{tail}")


# ---------------------------------------------------------------- reading


def read(folder, attn, pos, texts, asked, args):
    """Loss by position and passkey of a checkpoint, read with a pattern; pos None: as it was trained."""
    from model import load

    start, longest = time.perf_counter(), args.lengths[-1]
    model, tokenizer = load(folder, attn=attn, pos=pos, memory="full", dtype=args.dtype, device=args.device)
    # which in use is full attention: its own is what it was in training
    aside = getattr(plugins.parse("attention", attn).module, "TRAINING_ONLY", False)
    model.model.patterns(training=aside)
    every = np.concatenate([lengths.read(model, tokens, longest, lengths.at_once()) for _, tokens in texts]).astype(np.float64)
    result = {"attn": attn, "pos": model.config.pos, "loss": stream.by_range(every, [0, *args.lengths]), "tokens": every.size}
    result["curve"] = evaluate.by_position(every.sum(0), np.full(longest, len(every)), 4)
    if asked and not aside:
        trials = passkey.read_together(model, tokenizer, asked, lengths.at_once())
        result["passkey"] = passkey.summed(trials, args.asked, args.depths)
    return result | {"seconds": round(time.perf_counter() - start, 1)}


def said(name, reading):
    loss = ", ".join(f"{c['loss']:.3f} to {lengths.show(c['to'])}" for c in reading["loss"])
    found = reading.get("passkey")
    keys = ", passkey " + " ".join(f"{100 * np.mean(row):.0f}%" for row in found["accuracy"]) if found else ""
    return f"{name}, read with {reading['attn']}: loss {loss}{keys}; {reading['seconds']} s"


def row_of(name, args, texts, files, asked, seconds):
    """The row of a choice: trained if it is to be, then read."""
    if name in BEFORE:
        pos = "rope" if name == "rope" else f"yarn:factor={max(1, args.lengths[-1] / args.original):g}"
        row, readings = {"name": name}, [(args.folder, "full", pos)]
    else:
        out = args.models.absolute() / name
        out.parent.mkdir(parents=True, exist_ok=True)
        row = {"name": name, **trained(name, out, args, files, seconds)}
        t = row["training"]
        cli.say(f"{name}: {t['tokens']:,} tokens in {t['seconds']} s, {t['speeds']} tokens/s, peak {t['peak_GiB']} GiB")
        folder, own = rundir.checkpoints(out)[-1], flags(name, args)[1]
        # in segments its own is the same pattern
        readings = [(folder, attn, None) for attn in dict.fromkeys(["full", *[own] * ("segment" not in CHOICES[name])])]
    row["reads"] = []
    for reading in readings:
        row["reads"].append(read(*reading, texts, asked, args))
        cli.say(said(name, row["reads"][-1]))
    return row


# ---------------------------------------------------------------- what is shown


def table(r):
    """The README's table, and what of the longest passkeys is found at each depth."""
    show = lengths.show
    ranges = [f"{show(a) if a else 0}-{show(b)}" for a, b in pairwise([0, *r["lengths"]])]
    head = ["trained with", "read with", f"loss {ranges[0]}", *ranges[1:], f"passkey {show(r['passkey'][0])}", *map(show, r["passkey"][1:])]
    lines, deep = [[*head, "training, s", f"tokens/s at {show(r['lengths'][-1])}", "peak, GiB"]], []
    percent = lambda x: f"{100 * x:.0f}%"
    for row in r["rows"]:
        if "failed" in row:
            lines.append([f"`{row['name']}`", "failed"])
        for i, reading in enumerate(row.get("reads", [])):
            t, found = row.get("training") if i == 0 else None, reading.get("passkey")
            name = f"`{row['name']}`" if "training" in row else f"nothing, `{reading['pos']}`"
            with_ = "full" if reading["attn"] == "full" else "own"
            cells = [name, with_, *(f"{c['loss']:.3f}" for c in reading["loss"])]
            cells += [percent(np.mean(x)) for x in found["accuracy"]] if found else [""] * len(r["passkey"])
            lines.append(cells + ([f"{t['seconds']:.0f}", f"{list(t['speeds'].values())[-1]:,}", f"{t['peak_GiB']:.1f}"] if t else []))
            if found:
                deep.append([name, with_, *map(percent, found["accuracy"][-1])])
    parts = [stream.written(lines)]
    if deep:
        at = [f"at {percent(d)}" for d in passkey.spread(r["depths"])]
        parts.append(stream.written([[f"passkey at {show(r['passkey'][-1])}", "read with", *at], *deep]))
    return "\n\n".join(parts)


def picture(r, path):
    """Loss by position, and passkey by length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    curves = {}
    for row in r["rows"]:
        for reading in row.get("reads", []):
            own = reading["attn"] != "full"
            name = f"{row['name']}, before" if "training" not in row else row["name"] + own * ", read with its own"
            color, style = COLORS[row["name"]], ":" if "training" not in row else "--" if own else "-"
            curves[name] = color, style, reading["curve"]
            if found := reading.get("passkey"):
                right.plot(found["lengths"], [100 * np.mean(x) for x in found["accuracy"]], "o" + style, color=color)
    lengths.draw(left, curves, r["original"], "loss (nats a token)", 1)
    left.get_legend().remove()
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    # what breaks down at once would leave no room for the others
    kept = [b["loss"] for name, (_, _, buckets) in curves.items() if not name.startswith("rope") for b in buckets]
    left.set_ylim(min(kept, default=0) - 0.1, max(kept, default=1) + 0.1)
    right.set_xscale("log", base=2)
    right.set_xticks(r["passkey"], map(lengths.show, r["passkey"]))
    right.set(xlabel="tokens", ylabel="passkeys found (%)", ylim=(-5, 105))
    right.grid(alpha=0.3)
    lengths.saved(figure, path)


# ---------------------------------------------------------------- the run


def toy_folder(folder):
    """A checkpoint folder of a tiny random model over bytes."""
    import model as llama
    import tokenizer as tokenizers

    start = extrapolate.byte_folder(folder / "bytes", extrapolate.TOY_SHAPE, TOY_TRAINED)
    model = llama.Llama(llama.read_config(start)).init(0)
    llama.save(model, folder / "start", start)
    assert tokenizers.load(folder / "start").eos_id is not None
    return folder / "start"


def arguments(argv=None):
    p = lengths.parser(__doc__)
    p.add_argument("--model", metavar="FOLDER", help="checkpoint folder (default: SmolLM2-135M-Instruct, fetched on first use)")
    p.add_argument("--toy", action="store_true", help="a tiny random model, short rows, few steps")
    p.add_argument("--data", nargs="+", metavar="PATH", help="texts to train on, novels for example (default: Python's own library)")
    p.add_argument("--valid", nargs="+", metavar="PATH", help="held-out texts (default: a twentieth of the data's files)")
    p.add_argument("--models", type=Path, metavar="FOLDER", help="the trained models (default: out/extend, out/extend-toy)")
    p.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join([*BEFORE, *CHOICES])}; other rows of the JSON stay")
    p.add_argument("--limit", type=float, metavar="SECONDS", help="for all: then a run saves and leaves, and no other begins")
    kinds = {"lengths": evaluate.lengths, "asked": evaluate.lengths, "curriculum": str, "lr": float}
    about = {"lengths": "edges of the ranges of positions; the last is what is trained to", "asked": "lengths of passkey prompts"}
    about |= {"curriculum": "rows of train.py's stages", "batch": "rows of the last stage a step", "steps": "of each choice"}
    about |= {"lr": "of full fine-tuning; adapters have their own", "window": "of longformer", "n_global": "of longformer"}
    about |= {"segment": "of longformer-segments", "rows": "held-out windows read", "depths": "of passkeys"}
    about |= {"trials": "keys at each length and depth; 0: no passkeys"}
    for k in LONG:
        p.add_argument(f"--{k.replace('_', '-')}", type=kinds.get(k, cli.whole), help=f"{about[k]} (default {LONG[k]}, --toy {TOY[k]})")
    p.add_argument("--group", type=cli.whole, help="of s2 (default: a quarter of the longest length)")
    p.add_argument("--no-checkpoint", dest="checkpoint", action="store_false", help="keep activations: more memory, faster")
    args = p.parse_args(argv)
    if args.table:
        return args
    for k, default in (TOY if args.toy else LONG).items():
        if getattr(args, k) is None:
            setattr(args, k, evaluate.lengths(default) if kinds.get(k) is evaluate.lengths else default)
    args.group = args.group or args.lengths[-1] // 4
    args.models = args.models or Path("out") / ("extend-toy" if args.toy else "extend")
    args.only = args.only or [*BEFORE, *CHOICES]
    if unknown := [name for name in args.only if name not in (*BEFORE, *CHOICES)]:
        raise Refused(f"--only {unknown[0]!r} is not known: choose of {', '.join([*BEFORE, *CHOICES])}")
    if None in args.lengths + args.asked or min(args.batch, args.steps, args.rows, args.depths) < 1 or args.trials < 0:
        raise Refused("--lengths, --asked, --batch, --steps, --rows and --depths are whole numbers of at least 1")
    stages = curriculum.plan(args.curriculum, args.batch, 1, args.steps)
    if stages[-1].length != args.lengths[-1]:
        raise Refused(f"--curriculum {args.curriculum} must end at the longest of --lengths, {args.lengths[-1]}")
    return args


def main(argv=None):
    args = arguments(argv)
    if args.table:
        return lengths.from_table(args, table, picture)
    begun = time.perf_counter()
    ops = cli.use_backend(args.backend)
    import tokenizer as tokenizers
    from model import read_config

    ops.use(args.device)
    args.folder = toy_folder(args.models) if args.toy and not args.model else cli.model_folder(args)
    args.folder = args.folder.absolute()
    args.original, tokenizer = read_config(args.folder).original_length, tokenizers.load(args.folder)
    files, valid = (args.data, args.valid) if args.data else own_library()
    if not valid:
        files, valid = data.split(data.expand(files))
    files = {"data": [data.absolute(f) for f in files], "valid": [data.absolute(f) for f in valid]}
    texts = extrapolate.held_out(files["valid"], tokenizer, args.lengths[-1], args.rows * args.lengths[-1])
    asked = passkey.prompts(tokenizer, args.asked, args.depths, args.trials, args.seed) if args.trials else []
    settings = {k: getattr(args, k) for k in LONG if k != "steps"} | {"group": args.group, "seed": args.seed}
    settings |= {"checkpoint": args.checkpoint, "dtype": args.dtype or ("bfloat16" if ops.on_gpu() else "float32")}
    result = {
        **{"machine": common.machine(), "command": lengths.command(__file__), "protocol": lengths.protocol(__doc__)},
        **{"model": args.folder.name, "original": args.original, "lengths": args.lengths, "passkey": args.asked, "depths": args.depths},
        **{"settings": settings, "texts": [{"name": name, "tokens": len(tokens) - 1} for name, tokens in texts], "rows": []},
    }
    path = args.out / f"{args.name or ('extend-toy' if args.toy else 'extend')}.json"
    result["rows"] = before(path, result, args.only)
    keep, order, failed = lengths.keeper(path, result), [*BEFORE, *CHOICES], []
    for name in sorted(args.only, key=order.index):
        left = args.limit and args.limit - (time.perf_counter() - begun)
        cli.say(f"== {name}")
        try:
            if left is not None and left <= 0:
                raise Refused("not begun: --limit")
            row = row_of(name, args, texts, files, asked, left)
        except Exception as no:
            # the others are worth having without it
            row = {"name": name, "failed": f"{type(no).__name__}: {no}"[:500]}
            cli.say(no if isinstance(no, Refused) else row["failed"])
            failed.append(name)
        gc.collect()
        result["rows"] = sorted([*result["rows"], row], key=lambda row: order.index(row["name"]))
        keep()
    print(table(result))
    if args.plot and any("reads" in row for row in result["rows"]):
        picture(result, args.plot)
    cli.say(f"{time.perf_counter() - begun:.0f} s in all")
    if failed:
        raise Refused(f"not done: {', '.join(failed)}; the reasons stand above, and the same command goes on")


def before(path, result, only):
    """The rows of an earlier call under the same settings that are not asked for again."""
    try:
        r = json.loads(path.read_text())
        same = all(r[k] == result[k] for k in ("model", "settings", "texts", "machine"))
        rows = [row for row in r["rows"] if row["name"] not in only and "failed" not in row]
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        return []
    if rows and not same:
        raise Refused(f"{path} has rows of other settings, texts or another machine: give this run another --name, or remove it")
    return rows


if __name__ == "__main__":
    errors.main(main)
