"""A text without end: what a bounded memory makes of a stream that is far longer than the model was trained for, and what it costs.

    python runs/stream.py --data TWO_NOVELS --plot docs/stream.png           # minutes on a GPU
    python runs/stream.py --quick                                            # a minute on a CPU, on Python's own library
    python runs/stream.py --table bench/results/stream.json --plot docs/stream.png

Protocol. Loss: the first N tokens of each text are one stream, read in segments from an empty memory to the end; a memory forgets when a
segment closes, so a token sees what was kept and its own segment. Each token predicts the one after it; perplexity is exp of the mean
loss in nats over all texts, by position. The level to compare with, `alone`, is the same tokens in pieces of the trained length L0, each
read at once from nothing. A memory that keeps everything stops after 4 of these pieces. A window needs no renumbering: only distances
count, and within it none exceeds its length; so what it lacks is the first tokens, not a range of positions. Cost: generate.py's session
reads the texts end to end, again and again, to each mark; there it writes tokens, greedily, 16 of them to warm up, and goes on with
them. Times are of whole steps, closes included; reading is the median chunk before the mark; memory is what the session holds, and the
device's peak above the weights since the mark before.

Claimed: a window breaks down as soon as the first tokens go, sinks and a window do not, over 4 million tokens (Xiao et al. 2023,
arXiv:2309.17453).
"""

import sys
import time
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
import data
import errors
import evaluate
import plugins
from bench import common
from errors import Refused
from runs import lengths

LONG = {"tokens": 200 << 10, "segment": 512, "chunk": 4096, "write": 256, "marks": "4k,16k,64k,256k,1m", "budget": 4096, "texts": 2}
QUICK = {"tokens": 2048, "segment": 128, "chunk": 256, "write": 32, "marks": "512,1k,2k", "budget": 256, "alone": 512, "texts": 1}
WARM = 16  # written tokens before the clock starts
COLORS = {
    **{"alone": "#999999", "full": "#bab0ac", "window": "#d1495b", "sinks": "#4c78a8", "snapkv": "#59a14f", "h2o": "#e0a458"},
    **{"tova": "#b07aa1", "keydiff": "#76b7b2", "pyramidkv": "#9c755f", "adakv": "#edc948", "quantised": "#ff9da7"},
}


def memories(n):
    """The spellings of --memory that are compared at a budget of n tokens, and of those that are timed."""
    both = (f"{name}:budget={n},kv_positions={how}" for name in ("sinks", "snapkv") for how in ("reindex", "absolute"))
    return ["full", f"window:budget={n}", *both], [f"sinks:budget={n}", f"snapkv:budget={n}"]


# ---------------------------------------------------------------- loss


def losses(model, tokens, segment):
    """Loss of each next token in nats, float32 [B, n], of streams [B, n + 1] of integers, side by side, read in segments."""
    import ops

    x, y = tokens[:, :-1], tokens[:, 1:]
    state, out = model.start(segment, x.shape[1]), np.empty(x.shape, np.float32)
    pieces = range(0, x.shape[1], segment)
    with ops.no_grad():
        for i in tqdm(pieces, "reading", unit="segment", leave=False, disable=not sys.stderr.isatty()):
            here = slice(i, i + segment)
            logits, state = model(ops.array(x[:, here]), state)
            loss = ops.cross_entropy(logits, ops.array(y[:, here]))
            ops.wait(loss, state)
            out[:, here] = ops.numpy(loss)
    return out


def alone(model, tokens, length):
    """The same of pieces that are each read from nothing; the last one may be shorter."""
    n = (tokens.shape[1] - 1) // length * length
    pieces = [lengths.read(model, row, length, lengths.at_once()).reshape(1, n) for row in tokens]
    rest = tokens[:, n:]
    return np.concatenate([np.concatenate(pieces), losses(model, rest, length)], 1) if rest.shape[1] > 1 else np.concatenate(pieces)


def ranges(n, L0):
    """The table's columns: up to half of L0, L0, and from there in fours."""
    edges = [0, L0 // 2, *(L0 << 2 * k for k in range(20))]
    return [*(e for e in edges if e < n), n]


def by_range(every, edges):
    """Loss [B, n] -> a dict for each range between edges that it reaches."""
    reached = [(a, b) for a, b in pairwise(edges) if b <= every.shape[1]]
    mean = [every[:, a:b].mean(dtype=np.float64) for a, b in reached]
    return [{"from": a, "to": b, "loss": x, "perplexity": float(np.exp(x))} for (a, b), x in zip(reached, mean)]


def stream(folder, args, memory, tokens, L0):
    """A row of the table. memory: a spelling, or alone."""
    from model import load

    model, _ = load(folder, memory="full" if memory == "alone" else memory, dtype=args.dtype, device=args.device)
    if memory != "alone" and any(block.self_attn.memory.grows for block in model.model.layers):
        tokens = tokens[:, : 4 * L0 + 1]
    start = time.perf_counter()
    every = alone(model, tokens, L0) if memory == "alone" else losses(model, tokens, args.segment)
    n, row = every.shape[1], {"memory": memory, "seconds": round(time.perf_counter() - start, 2)}
    row |= {"tokens": every.size, "ranges": by_range(every, [e for e in ranges(tokens.shape[1] - 1, L0) if e <= n])}
    worst = max((every[:, a : a + 4096].mean(dtype=np.float64), a) for a in range(0, max(1, n - 4095), 4096))
    row |= {"worst_4k": {"from": worst[1], "loss": worst[0]}}
    return row | {"curve": evaluate.by_position(every.sum(0, dtype=np.float64), np.full(n, len(every)), 4)}


# ---------------------------------------------------------------- cost


def endless(folder, args, memory, tokens):
    """What reading and writing cost at each mark of one stream, the texts' tokens again and again."""
    import ops
    from generate import Session
    from model import load

    model, _ = load(folder, memory=memory, dtype=args.dtype, device=args.device)
    weights = sum(ops.nbytes(p) for p in ops.parameters(model).values())
    session, row = Session(model, args.chunk, args.close), {"memory": memory, "marks": []}
    # the first chunks compile
    for _ in range(2):
        session.read(np.resize(tokens, args.chunk))
    session.restart()
    for mark in args.marks:
        ops.reset_peak()
        chunks = []
        while len(session.tokens) < mark:
            # what was written is part of the stream too
            at = len(session.tokens) % len(tokens)
            piece = np.resize(np.roll(tokens, -at), min(args.chunk, mark - len(session.tokens)))
            start = time.perf_counter()
            logits = session.read(piece, WARM + args.write)
            chunks.append((time.perf_counter() - start) / len(piece))
        for i in range(WARM + args.write):
            if i == WARM:
                start = time.perf_counter()
            logits = session.step(int(ops.argmax(logits)))
        int(ops.argmax(logits))
        cell = {"streamed": mark, "write_ms": 1000 * (time.perf_counter() - start) / args.write}
        cell |= {"read_ms": 1000 * float(np.median(chunks)), "chunks": len(chunks), "held_bytes": session.nbytes()}
        peak = ops.peak_memory()
        cell |= {"peak_bytes_over_weights": None if peak is None else peak - weights}
        row["marks"].append(cell)
        held, per = cell["held_bytes"] / 2**20, f"{cell['read_ms']:.4f} ms/token read, {cell['write_ms']:.3f} written"
        cli.say(f"{memory}: {lengths.show(mark)} streamed, {held:.1f} MiB held, {per}")
    return row


# ---------------------------------------------------------------- what is shown


def short(spec):
    return spec.replace("kv_positions=", "").replace("budget=", "")


def table(r):
    """The README's tables."""
    number, show = lambda x: f"{x:.2f}" if x < 100 else f"{x:,.0f}", lengths.show
    parts = []
    if r["rows"]:
        edges = r["edges"]
        head = ["`--memory`", *(f"{show(a) if a else 0} to {show(b)}" for a, b in pairwise(edges))]
        parts.append([head, *([short(row["memory"]), *(number(c["perplexity"]) for c in row["ranges"])] for row in r["rows"])])
    if r["endless"]:
        marks = [c["streamed"] for c in r["endless"][0]["marks"]]
        lines = [["", *map(show, marks)]]
        for row in r["endless"]:
            name, cells = short(row["memory"]), row["marks"]
            lines.append([f"{name}: ms a token read", *(f"{c['read_ms']:.4f}" for c in cells)])
            lines.append([f"{name}: ms a token written", *(f"{c['write_ms']:.3f}" for c in cells)])
            lines.append([f"{name}: MiB held", *(f"{c['held_bytes'] / 2**20:.1f}" for c in cells)])
            if cells[0]["peak_bytes_over_weights"] is not None:
                lines.append([f"{name}: peak MiB over the weights", *(f"{c['peak_bytes_over_weights'] / 2**20:.0f}" for c in cells)])
        parts.append(lines)
    return "\n\n".join(written(lines) for lines in parts)


def written(lines):
    """Rows of cells as a table in markdown, short ones filled up."""
    n = len(lines[0])
    lines = ["| " + " | ".join([*line, *[""] * (n - len(line))]) + " |" for line in lines]
    return "\n".join([lines[0], "|---" * n + "|", *lines[1:]])


def picture(r, path):
    styles, curves = {}, {}
    for row in r["rows"]:
        name = row["memory"].partition(":")[0]
        # a second spelling of the same memory is dashed, a third dotted
        styles[name] = styles.get(name, -1) + 1
        style = ("-", "--", ":", "-.")[styles[name] % 4]
        what = f"alone, pieces of {lengths.show(r['alone'])}" if name == "alone" else short(row["memory"])
        curves[what] = COLORS.get(name, "#000000"), style, row["curve"]
    lengths.plot(curves, r["trained"], path, "loss (nats a token)", 1)


def arguments(argv=None):
    p = lengths.parser(__doc__)
    p.add_argument("--model", metavar="FOLDER", help="checkpoint folder (default: SmolLM2-135M-Instruct, fetched on first use)")
    p.add_argument("--data", nargs="+", metavar="PATH", help="texts of more than --tokens tokens (with --quick: default Python's library)")
    p.add_argument("--texts", type=cli.whole, help="how many of them are read, side by side (default 2, with --quick 1)")
    p.add_argument("--quick", action="store_true", help="short streams and small budgets")
    p.add_argument("--tokens", type=cli.whole, help=f"of each stream (default {LONG['tokens'] >> 10}k, with --quick {QUICK['tokens']})")
    p.add_argument("--alone", type=cli.whole, help="length of the pieces read alone (default: the trained length, with --quick 512)")
    p.add_argument("--segment", type=cli.whole, help="tokens between two closes where loss is measured (default 512, with --quick 128)")
    p.add_argument("--memory", nargs="*", metavar="SPEC", help="whose loss is measured (default: full, window, sinks, snapkv)")
    p.add_argument("--endless", nargs="*", metavar="SPEC", help="whose cost is measured (default: sinks, snapkv)")
    p.add_argument("--marks", type=evaluate.lengths, metavar="N,N", help=f"where cost is measured (default {LONG['marks']})")
    p.add_argument("--write", type=cli.whole, help="tokens written at each mark (default 256, with --quick 32)")
    p.add_argument("--chunk", type=cli.whole, help="tokens that a session reads at once (default 4096, with --quick 256)")
    p.add_argument("--close", type=cli.whole, default=64, help="written tokens between two closes (default 64)")
    args = p.parse_args(argv)
    if args.plot and (args.plot.suffix not in (".png", ".pdf", ".svg") or not find_spec("matplotlib")):
        raise Refused(f"--plot {args.plot}: it takes a .png, .pdf or .svg, and matplotlib")
    if args.table:
        return args
    defaults = QUICK if args.quick else LONG
    for k in ("tokens", "segment", "chunk", "write", "alone", "texts"):
        if getattr(args, k) is None:
            setattr(args, k, defaults.get(k))
    args.marks = args.marks or evaluate.lengths(defaults["marks"])
    compared, timed = memories(defaults["budget"])
    args.memory, args.endless = compared if args.memory is None else args.memory, timed if args.endless is None else args.endless
    for spec in [*args.memory, *args.endless]:
        plugins.parse("memory", spec)
    if not args.data and not args.quick:
        raise Refused(f"--data is missing: name plain texts of more than {args.tokens} tokens, novels for example (or take --quick)")
    if None in args.marks or min(args.tokens, args.segment, args.chunk, args.write, args.texts, args.close, args.alone or 1) < 1:
        raise Refused("--tokens, --segment, --chunk, --write, --texts, --close, --alone and --marks are whole numbers of at least 1")
    return args


def main(argv=None):
    args = arguments(argv)
    if args.table:
        return lengths.from_table(args, table, picture)
    ops = cli.use_backend(args.backend)
    from model import load

    folder = cli.model_folder(args)
    model, tokenizer = load(folder, dtype=args.dtype, device=args.device)
    trained, dtype = model.config.max_position_embeddings, str(model.model.embed_tokens.weight.dtype).split(".")[-1]
    L0 = args.alone or trained
    del model
    found = list(evaluate.texts(args.data or data.default_corpus(), tokenizer, args.tokens + 1, args.texts, None))
    tokens = np.stack([np.asarray(t, np.int32) for _, t in found])
    result = {
        **{"machine": common.machine(), "backend": f"{ops.BACKEND} {ops.device()}", "command": lengths.command(__file__)},
        **{"protocol": lengths.protocol(__doc__), "model": folder.name, "dtype": dtype, "trained": trained, "alone": L0},
        **{k: getattr(args, k) for k in ("tokens", "segment", "chunk", "close", "write")},
        "texts": [{"name": Path(name).name, "tokens": len(t) - 1} for name, t in found],
        **{"edges": ranges(args.tokens, L0), "rows": [], "endless": []},
    }
    cli.say(f"{folder.name}, {dtype}: {len(found)} texts of {args.tokens} tokens, segments of {args.segment}")
    keep = lengths.keeper(args.out / f"{args.name or ('stream-quick' if args.quick else 'stream')}.json", result)
    for memory in ["alone", *args.memory] if args.memory else []:
        result["rows"].append(row := stream(folder, args, memory, tokens, L0))
        said = ", ".join(f"{c['perplexity']:.2f} to {lengths.show(c['to'])}" for c in row["ranges"])
        cli.say(f"{memory}: perplexity {said}; {row['seconds']} s")
        keep()
    for memory in args.endless:
        result["endless"].append(endless(folder, args, memory, tokens[:, :-1].reshape(-1)))
        keep()
    print(table(result))
    if args.plot and result["rows"]:
        picture(result, args.plot)


if __name__ == "__main__":
    errors.main(main)
