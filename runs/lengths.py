"""A pretrained model beyond the length that it was trained at, without training: what each position scheme makes of it.

    python runs/lengths.py --data TEXTS --calibrate TEXT                          # files of more than 64K tokens each
    python runs/lengths.py --table bench/results/lengths.json --plot docs/lengths.png

Protocol. Of every text the first N tokens are read, N being the longest length, and for each length L they are cut into N / L windows of
L tokens. A window is read at once: no cache, positions from 0, so that `dynamic` means what it means elsewhere. Each token predicts the
one after it, the last of a window the first of the next, so every length predicts the same N tokens; perplexity is exp of the mean loss
in nats over all of them. The factor is max(1, L / L0), L0 being the config's max_position_embeddings, and once more the same factor,
N / L0, at every length: what a stretch costs where none is needed. A factor of 1 is plain rope and is not run again. `dynamic` with
factor 1 read at once is ntk with factor L / L0 exactly, so its factor is 2 here (transformers' example), and the longest's in the second
row. Which texts the model saw in its own training is not known: compare schemes, not models.

`longrope` stands for LongRoPE's search, made small: lists of a factor a pair, never decreasing, start from those of pi, ntk and yarn;
each next one joins two of the best four at a pair, scales a run of neighbours, and is scored by the loss on the first L tokens of
--calibrate, which is none of --data. No token is exempt (the paper's n), and the population is a handful instead of 64 over 40 rounds.
At factor N / L0 for every length it takes the list that was found for N.

Claimed: past L0 plain rope fails at once; pi holds on, though it needs fine-tuning to be good (Chen et al. 2023, arXiv:2306.15595); ntk
without tuning is better than pi, and yarn better than both (Peng et al. 2023, arXiv:2309.00071); lists found by search stretch 8 times
without tuning, better than either (Ding et al. 2024, arXiv:2402.13753).
"""

import dataclasses
import json
import shlex
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
import data
import errors
import evaluate
import plugins
from bench import common
from errors import Refused

# the spelling of --pos for a factor s
SCHEMES = {
    "rope": "rope",
    "pi": "pi:factor={s:g}",
    "ntk": "ntk:factor={s:g}",
    "dynamic": "dynamic:factor={s:g}",
    "yarn": "yarn:factor={s:g}",
    "longrope": "longrope",
}
DYNAMIC = 2.0
COLORS = {
    **{"rope": "#999999", "pi": "#e0a458", "ntk": "#59a14f", "dynamic": "#b07aa1", "yarn": "#4c78a8", "longrope": "#d1495b"},
    **{"alibi": "#59a14f", "t5": "#4c78a8", "xl": "#e0a458", "none": "#d1495b"},
}


# ---------------------------------------------------------------- windows of texts


def windows(tokens, length):
    """x, y [n, length] of integers [n * length + 1 or more]: windows side by side, and the token after each token."""
    n = (len(tokens) - 1) // length
    return (np.asarray(tokens[i : i + n * length], np.int32).reshape(n, length) for i in (0, 1))


def losses(model, x, y):
    """Loss of each target y [B, L] in nats, float32, the rows of x [B, L] read at once. Logits exist of 2048 tokens at a time."""
    import ops

    model.chunk = 2048
    with ops.no_grad():
        return ops.numpy(model(ops.array(x), targets=ops.array(y)))


def read(model, tokens, length, at_once):
    """Losses [n, length] of a text's windows, `at_once` tokens a call, or one window where that is longer."""
    x, y = windows(tokens, length)
    rows = max(1, at_once // length)
    return np.concatenate([losses(model, x[i : i + rows], y[i : i + rows]) for i in range(0, len(x), rows)])


def texts(paths, tokenizer, length, most):
    """[(name, tokens)] of the documents, each cut to whole windows of this length, at most so many tokens, and one more token to predict.
    Shorter ones are left out; raises Refused if that is all."""
    out, longest = [], 0
    for name, text in data.documents(paths):
        tokens = data.encode(tokenizer, text)
        longest, n = max(longest, len(tokens)), min(len(tokens) - 1, most) // length * length
        if n:
            out.append((Path(name).name, tokens[: n + 1]))
    if not out:
        raise Refused(f"no text has more than {length} tokens, the longest has {longest}: give longer texts, or shorter --lengths")
    return out


def at_once():
    """Tokens a call: what a GPU of 16 GiB holds, and a CPU does not sit on for minutes."""
    import ops

    return 1 << (16 if ops.on_gpu() else 13)


# ---------------------------------------------------------------- schemes


def scheme(c, pos, factor=1.0, slower=None):
    """The Position of this spelling for a model of Config c. slower: longrope's list, each pair's factor."""
    import model as llama

    if slower is not None:
        L = c.max_position_embeddings
        rope = {"rope_type": "longrope", "factor": factor, "original_max_position_embeddings": L}
        # the longer list is for models that promise more than the original length
        rope |= {"short_factor": slower, "long_factor": slower}
        c = dataclasses.replace(c, max_position_embeddings=max(L, round(L * factor)), hf={**c.hf, "rope_scaling": rope})
    return llama.build(plugins.parse("positions", pos), "Position", c)


def feel(model, position):
    """Let all layers feel distance by this Position. The weights stay."""
    import ops

    model.model.positions, model.model.feels = ops.ModuleList([position]), (0,) * len(model.model.layers)


def stretch(c, pos):
    """How many times slower each pair turns than in plain rope, a list."""
    plain, stretched = (np.asarray(scheme(c, p).frequencies()) for p in ("rope", pos))
    return (plain / stretched).tolist()


def search(starts, score, evaluations, limit, seed):
    """The best of non-decreasing lists of factors from 1 to limit: dicts of factors, loss and from, best first.

    starts: name -> list. score: list -> loss. Raises ValueError if a start decreases."""
    draw, n, found = np.random.default_rng(seed), len(next(iter(starts.values()))), []

    def weigh(factors, origin):
        if np.any(np.diff(factors) < -1e-9):
            raise ValueError(f"factors must not decrease: {origin}")
        factors = [float(f) for f in factors]
        found.append({"from": origin, "factors": factors, "loss": float(score(factors))})
        found.sort(key=lambda x: x["loss"])

    for name, factors in starts.items():
        weigh(factors, name)
    for k in range(len(starts), evaluations):
        a, b = (np.array(found[i]["factors"]) for i in draw.integers(0, min(4, len(found)), 2))
        cut, low, high = draw.integers(0, n + 1), *np.sort(draw.integers(0, n + 1, 2))
        child = np.concatenate([a[:cut], b[cut:]])
        child[low:high] *= np.exp(0.15 * draw.normal())
        weigh(np.clip(np.maximum.accumulate(child), 1, limit), f"evaluation {k + 1}")
    return found


# ---------------------------------------------------------------- the run


def measure(model, held_out, length, longest):
    """A cell of the table; at the longest length with the loss by position."""
    start = time.perf_counter()
    by_text = [read(model, tokens, length, at_once()).astype(np.float64) for _, tokens in held_out]
    every = np.concatenate(by_text)
    cell = {"length": length, "loss": every.mean(), "perplexity": float(np.exp(every.mean())), "tokens": every.size}
    cell |= {"by_text": [x.mean() for x in by_text], "seconds": round(time.perf_counter() - start, 2)}
    if length == longest:
        cell["curve"] = evaluate.by_position(every.sum(0), np.full(length, len(every)), 4)
    return cell


def run(args, model, held_out, calibrate, result, keep):
    """Fill result["rows"], a row a scheme and way to choose its factor; keep() is called after each."""
    c, lengths, longest = model.config, args.lengths, args.lengths[-1]
    L0, most, plain, known = c.max_position_embeddings, max(1.0, longest / c.max_position_embeddings), {}, {}
    lists = result["longrope"]
    for fixed in (False, True):
        for name in args.schemes:
            if fixed and (name == "rope" or most == 1):
                continue
            ratio = [1.0 if name == "rope" else most if fixed else DYNAMIC if name == "dynamic" else max(1.0, n / L0) for n in lengths]
            how = "" if name == "rope" else f"{ratio[0]:g}" if fixed or name == "dynamic" else "L/L0"
            row = {"scheme": name, "factor": how, "cells": []}
            for length, s in zip(lengths, ratio):
                pos, stretched = SCHEMES[name].format(s=s), s > 1 and not (name == "dynamic" and length <= L0)
                if stretched and name == "longrope" and f"{s:g}" not in lists:
                    lists[f"{s:g}"] = look_for(args, model, calibrate, s, min(round(s * L0), longest))
                if (pos, s, length) not in known:
                    if stretched or name == "rope":
                        feel(model, scheme(c, pos, s, lists[f"{s:g}"]["factors"] if name == "longrope" else None))
                        known[pos, s, length] = measure(model, held_out, length, longest)
                    else:
                        known[pos, s, length] = {**plain[length], "as": "rope"}
                cell = known[pos, s, length]
                if name == "rope":
                    plain[length] = cell
                row["cells"].append({"factor": s, "pos": pos, **cell})
                cli.say(f"{label(row)}: {length} tokens, perplexity {cell['perplexity']:.3f}, {cell['seconds']} s")
            result["rows"].append(row)
            keep()


def look_for(args, model, calibrate, s, length):
    """The record of a longrope search at this factor, on the calibration text's first tokens."""
    c, tokens, start = model.config, calibrate[: length + 1], time.perf_counter()

    def score(factors):
        feel(model, scheme(c, "longrope", s, factors))
        return read(model, tokens, length, at_once()).mean(dtype=np.float64)

    starts = {name: stretch(c, SCHEMES[name].format(s=s)) for name in ("pi", "ntk", "yarn")}
    found = search(starts, score, args.evaluations, 1.25 * s, [args.seed, length])
    began = {x["from"]: x["loss"] for x in found if x["from"] in starts}
    cli.say(f"longrope, factor {s:g}: {len(found)} lists, loss {found[0]['loss']:.4f} after {began}")
    return {**found[0], "length": length, "starts": began, "evaluations": len(found), "seconds": round(time.perf_counter() - start, 1)}


def protocol(doc):
    """The paragraph of a script's docstring that says what is done."""
    return " ".join(next(p for p in doc.split("\n\n") if p.startswith("Protocol. ")).removeprefix("Protocol. ").split())


def command(script):
    """The command as typed, without the place of the results."""
    words = sys.argv[1:]
    for flag in ("--out", "--plot", "--models"):
        if flag in words:
            i = words.index(flag)
            del words[i : i + 2]
    return shlex.join(["python", f"runs/{Path(script).name}", *words])


def keeper(path, result):
    """keep() writes what is there so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return lambda: cli.write(path, lambda partial: partial.write_text(json.dumps(result, indent=1) + "\n"))


def show(n):
    """A length as in a table's head."""
    return f"{n >> 10}K" if n % 1024 == 0 else str(n)


def label(row):
    return row["scheme"] + (f", factor {row['factor']}" if row["factor"] else "")


def table(r):
    """The README's table."""
    number = lambda x: f"{x:.2f}" if x < 100 else f"{x:,.0f}"
    lines = ["| `--pos` | " + " | ".join(map(show, r["lengths"])) + " |", "|---" * (len(r["lengths"]) + 1) + "|"]
    for row in r["rows"]:
        name = label(row).replace("L/L0", f"L/{show(r['original'])}")
        lines.append("| " + " | ".join([name, *("=" if "as" in c else number(c["perplexity"]) for c in row["cells"])]) + " |")
    same = any("as" in c for row in r["rows"] for c in row["cells"])
    return "\n".join([*lines, *(["", "`=`: plain rope, since nothing is stretched there."] if same else [])])


def plot(curves, mark, path, what, unit):
    """curves: label -> (color, style, buckets of evaluate.by_position); mark: the trained length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), dpi=120, layout="constrained")
    draw(figure.subplots(), curves, mark, what, unit)
    saved(figure, path)


def draw(ax, curves, mark, what, unit):
    """The curves of plot() on axes."""
    for name, (color, style, buckets) in curves.items():
        ax.plot([(b["from"] + b["to"]) / 2 + 1 for b in buckets], [b["loss"] * unit for b in buckets], style, color=color, label=name)
    ax.axvline(mark, color="black", linewidth=0.8, linestyle=":")
    ax.set_xscale("log", base=2)
    ticks = [t for t in (1 << k for k in range(5, 24)) if t <= max(b["to"] for _, _, bs in curves.values() for b in bs) + 1]
    ax.set_xticks(ticks, map(show, ticks))
    ax.set(xlabel=f"position (dotted: the trained length, {show(mark)})", ylabel=what)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)


def saved(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    cli.write(path, lambda partial: figure.savefig(partial, format=path.suffix[1:]))
    cli.say(f"drawn into {path}")


def picture(r, path):
    curves = {}
    for row in r["rows"]:
        buckets = row["cells"][-1].get("curve")
        # with the factor of the longest length both rows are the same
        if buckets and not (row["scheme"] != "dynamic" and row["factor"] not in ("", "L/L0")):
            twice = row["scheme"] == "dynamic" and row["factor"] != f"{DYNAMIC:g}"
            curves[label(row)] = COLORS[row["scheme"]], "--" if twice else "-", buckets
    plot(curves, r["original"], path, "loss (nats a token)", 1)


def parser(doc):
    """What both scripts take."""
    p = cli.Parser(description=doc)
    p.add_argument("--out", type=Path, default=common.ROOT / "bench" / "results", metavar="FOLDER", help="where the JSON goes")
    p.add_argument("--plot", type=Path, metavar="FILE", help="draw the loss by position: .png, .pdf or .svg (needs matplotlib)")
    p.add_argument("--table", type=Path, metavar="FILE", help="print the table of a result that is there, draw its plot; run nothing")
    p.add_argument("--name", help="of the JSON (default: the script's)")
    p.add_argument("--backend", choices=["torch", "mlx"])
    p.add_argument("--device", help="cpu, cuda, mps, gpu (default: the best there is)")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32")
    p.add_argument("--seed", type=int, default=0)
    return p


def from_table(args, table, picture):
    """--table: the saved result again."""
    try:
        r = json.loads(args.table.read_text())
        print(table(r))
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as no:
        raise Refused(f"--table {args.table} is no result of this script: {type(no).__name__} {no}") from None
    if args.plot:
        picture(r, args.plot)


def arguments(argv=None):
    p = parser(__doc__)
    p.add_argument("--model", metavar="FOLDER", help="checkpoint folder (default: SmolLM2-135M-Instruct, fetched on first use)")
    p.add_argument("--data", nargs="+", metavar="PATH", help="held-out texts of more tokens than the longest length")
    p.add_argument("--calibrate", metavar="FILE", help="another text, for longrope's search; without it longrope is left out")
    p.add_argument("--lengths", type=evaluate.lengths, default=[2048 << i for i in range(6)], metavar="N,N", help="default 2k to 64k")
    p.add_argument("--schemes", type=lambda text: text.split(","), default=list(SCHEMES), metavar="NAME,NAME", help=", ".join(SCHEMES))
    p.add_argument("--evaluations", type=cli.whole, default=40, help="lists that longrope's search tries at each factor (default 40)")
    args = p.parse_args(argv)
    if args.plot and (args.plot.suffix not in (".png", ".pdf", ".svg") or not find_spec("matplotlib")):
        raise Refused(f"--plot {args.plot}: it takes a .png, .pdf or .svg, and matplotlib")
    if args.table:
        return args
    if unknown := [s for s in args.schemes if s not in SCHEMES]:
        raise Refused(f"--schemes {unknown[0]!r} is not known: choose of {', '.join(SCHEMES)}")
    if not args.data:
        raise Refused(f"--data is missing: name plain texts of more than {show(args.lengths[-1] or 0)} tokens, novels for example")
    if None in args.lengths or any(args.lengths[-1] % n for n in args.lengths):
        raise Refused("--lengths must divide the longest of them, so that all read the same tokens: 2k,4k,8k")
    if args.evaluations < 3:
        raise Refused(f"--evaluations {args.evaluations}: it begins with three lists, so give at least 3")
    wanted = [s for s in args.schemes if s != "longrope" or args.calibrate]
    # what a factor of 1 is copied from
    args.schemes = list(dict.fromkeys(["rope", *wanted]))
    return args


def main(argv=None):
    args = arguments(argv)
    if args.table:
        return from_table(args, table, picture)
    cli.use_backend(args.backend)
    from model import load

    folder = cli.model_folder(args)
    model, tokenizer = load(folder, dtype=args.dtype, device=args.device)
    c, longest = model.config, args.lengths[-1]
    if c.pos != "rope":
        raise Refused(f"{folder} has --pos {c.pos}: this begins from a model with plain rope")
    held_out = texts(args.data, tokenizer, longest, longest)
    calibrate = texts([args.calibrate], tokenizer, longest, longest)[0] if args.calibrate else (None, None)
    if calibrate[0] in dict(held_out):
        raise Refused(f"--calibrate {args.calibrate} is one of --data too: what is found on it would be read from it")
    dtype = str(model.model.embed_tokens.weight.dtype).split(".")[-1]
    result = {
        **{"machine": common.machine(), "command": command(__file__), "protocol": protocol(__doc__)},
        **{"model": folder.name, "dtype": dtype, "original": c.max_position_embeddings, "lengths": args.lengths, "seed": args.seed},
        "texts": [{"name": name, "tokens": len(tokens) - 1} for name, tokens in held_out],
        **{"calibrate": calibrate[0], "longrope": {}, "rows": []},
    }
    cli.say(f"{folder.name}, {dtype}: {len(held_out)} texts of {longest} tokens")
    keep = keeper(args.out / f"{args.name or 'lengths'}.json", result)
    run(args, model, held_out, calibrate[1], result, keep)
    print(table(result))
    if args.plot:
        picture(result, args.plot)


if __name__ == "__main__":
    errors.main(main)
