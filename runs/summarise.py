"""Are summaries worth reading? A model's loss on held-out text by the number of chunks before it, with their summaries and without.

    python runs/summarise.py --data NOVELS --valid OTHERS --jobs 3 --plot docs/summarise.png      # a GPU, three minutes
    python runs/summarise.py --quick                                                              # a minute on a CPU: shows that all works

Protocol. train.py --adapter summary trains the vectors and their LoRA on rows of some chunks, once for each of --positions. Held-out rows
of more chunks are then read three ways: by the trained model with the summaries of all chunks before; by the same model, each chunk by
itself; and by the base with full attention, as far as the context that it was made for goes. The same tokens are predicted each time, and
their mean loss in nats is given for each chunk of the row. What is read is written at once, after each of --positions;
--limit ends trainings in processes of their own (--jobs) after so many seconds, and they are read as they are then.

Claimed: the loss of a chunk falls with the summaries before it (Chevalier et al. 2023, arXiv:2305.14788).
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
import errors
import rundir
import train
from bench import common
from errors import Refused
from runs import lengths

# a step of 4 chunks starts 70,000 kernels of 30 layers, however many rows it has, and a host needs some 25 microseconds for each: so few
# chunks in a row, few steps, and as many rows as keep a GPU busy meanwhile; chunks are short, for much is lost in them alone
SIZES = {"chunk": 256, "chunks": 4, "beyond": 16, "k": 32, "rank": 16, "batch": 64, "steps": 40, "rows": 32, "lr": 3e-3}
QUICK = {"chunk": 64, "chunks": 3, "beyond": 5, "k": 8, "batch": 2, "steps": 6, "rows": 2}
COLORS = {"none": "#d1495b", "near": "#4c78a8", "absolute": "#59a14f"}
AT_ONCE = 32  # held-out rows
STOPPED = 130  # the exit code of a training that was asked to stop, and saved
EACH = 10  # steps between two lines about a training in a process of its own


def by_chunk(model, rows, chunk, together):
    """The mean loss of each chunk of the rows, [chunks]; together: does each know of those before it?"""
    import ops

    found = []
    for some in (np.stack(rows[i : i + AT_ONCE]).astype("int32") for i in range(0, len(rows), AT_ONCE)):
        state, losses = None, []
        for i in range(0, some.shape[1] - 1, chunk):
            x, y = (ops.array(some[:, i + j : i + j + chunk]) for j in (0, 1))
            with ops.no_grad():
                state = state if together and state else model.start(read=some.shape[1])
                # what nobody reads need not be summed up
                loss, state = model(x, state, targets=y, close=together and i + chunk < some.shape[1] - 1)
            losses.append(ops.numpy(loss).mean(1))
        found.append(np.stack(losses, 1))
    return np.concatenate(found).mean(0).tolist()


def held_out(args, tokenizer, n):
    """Rows [rows, n + 1] of the held-out texts."""
    paths = args.valid or list(train.data.split(train.data.default_corpus())[1])
    rows = [tokens[i : i + n + 1] for _, tokens in lengths.texts(paths, tokenizer, n, n * args.rows) for i in range(0, len(tokens) - n, n)]
    # from all of the texts
    return [np.asarray(rows[i]) for i in np.linspace(0, len(rows) - 1, min(args.rows, len(rows))).astype(int)]


def learn(positions, folder, args, until):
    """Train, in a process of its own if there are --jobs, and return (the checkpoint's folder, seconds). until: when such a process is
    asked to stop where it is."""
    out, start = args.models.absolute() / positions, time.perf_counter()
    shutil.rmtree(out, ignore_errors=True)
    memory = f"summary:k={args.k},chunk={args.chunk},chunks={args.beyond},positions={positions}"
    flags = {"model": folder, "out": out, "memory": memory, "adapter": f"summary:rank={args.rank}", "length": args.chunk * args.chunks}
    flags |= {"batch": args.batch, "micro": args.batch, "steps": args.steps, "warmup": max(1, args.steps // 10), "lr": args.lr}
    flags |= {"eval-every": args.steps, "valid-rows": 1, "keep": 1, "seed": args.seed}
    flags |= {k: getattr(args, k) for k in ("backend", "device", "dtype") if getattr(args, k)}
    files = [x for k in ("data", "valid") if getattr(args, k) for x in (f"--{k}", *getattr(args, k))]
    flags = [x for k, v in flags.items() for x in (f"--{k}", str(v))] + files
    cli.say(f"positions={positions}: training begins")
    if not args.jobs:
        status, why = train.main(flags), ""
    else:
        log = out.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        # threads that wait for each other cost more than they do
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(log, "w") as said:
            command = [sys.executable, str(common.ROOT / "train.py"), *flags]
            status = watched(subprocess.Popen(command, stdout=said, stderr=said, env=env), positions, out, args.steps, until)
        why = ":\n" + log.read_text()[-1500:]
    if status and not (status == STOPPED and args.jobs):
        raise Refused(f"positions={positions}: training ended with {status}{why}")
    seconds = round(time.perf_counter() - start, 1)
    cli.say(f"positions={positions}: trained in {seconds} s")
    return rundir.checkpoints(out)[-1], seconds


def watched(process, positions, out, steps, until):
    """The exit code of a training when it has ended; now and then a line about where it is."""
    said, status, asked = 0, None, False
    while status is None:
        time.sleep(0.5)
        status, done = process.poll(), so_far(out)
        new = done[said:]
        if done and status is None and not asked and time.perf_counter() > until:
            # it saves what it has
            asked = True
            process.send_signal(signal.SIGINT)
            cli.say(f"positions={positions}: stopped by --limit")
        # the first one tells that all is compiled and there is room
        if len(new) >= EACH or (new and (status is not None or not said)):
            said, each = len(done), sum(line["seconds"] for line in new) / len(new)
            cli.say(f"positions={positions}: step {said} of {steps}, loss {new[-1]['loss']:.3f}, {each:.2f} s a step")
    return status


def so_far(out):
    """The lines about steps in a run's metrics; the last line may be torn."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [x for x in (json.loads(line) for line in lines if line.endswith("}\n")) if "loss" in x]


def each(asked, folder, args, missing):
    """(positions, checkpoint, seconds) of each as it is trained; why there is none goes to `missing`."""
    until = time.perf_counter() + (args.limit or math.inf)

    def one(positions):
        try:
            if time.perf_counter() > until:
                raise Refused(f"positions={positions}: not begun within --limit {args.limit} seconds")
            return positions, *learn(positions, folder, args, until)
        except Refused as no:
            # the others are worth having without it
            cli.say(no)
            missing.append(str(no))

    if not args.jobs:
        yield from filter(None, map(one, asked))
        return
    with ThreadPoolExecutor(args.jobs) as pool:
        for done in as_completed([pool.submit(one, positions) for positions in asked]):
            if done.result():
                yield done.result()


def table(r):
    n = r["settings"]["beyond"]
    lines = ["| chunks before | " + " | ".join(map(str, range(n))) + " |", "|---" * (n + 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join([row["label"], *(f"{x:.3f}" for x in row["loss"])]) + " |" for row in r["rows"]])


def picture(r, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    ax = figure.subplots()
    drawn = []
    for row in r["rows"]:
        if row["loss"] in drawn:
            # without a summary there is nothing that positions could differ by
            continue
        drawn.append(row["loss"])
        color = COLORS.get(row.get("positions"), "black")
        style, label = ("--", "each chunk alone") if "alone" in row["label"] else ("o-", row["label"])
        ax.plot(row["loss"], style, color=color, markersize=3, label=label)
    ax.axvline(r["settings"]["chunks"] - 0.5, color="black", linewidth=0.8, linestyle=":")
    ax.set(xlabel="chunks before (dotted: as many as in training)", ylabel="loss (nats a token)")
    ax.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside upper center", ncols=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    cli.write(path, lambda partial: figure.savefig(partial, format=path.suffix[1:]))


def main(argv=None):
    p = lengths.parser(__doc__)
    p.add_argument("--model", metavar="FOLDER", help="the base (default: SmolLM2-135M-Instruct)")
    p.add_argument("--data", nargs="+", metavar="PATH", help="texts to train on (default: Python's own library)")
    p.add_argument("--valid", nargs="+", metavar="PATH", help="held-out texts")
    p.add_argument("--positions", nargs="+", choices=list(COLORS), default=None, help="default: all; with --quick none alone")
    p.add_argument("--models", type=Path, default=Path("out") / "summarise", metavar="FOLDER", help="what is left of the runs")
    p.add_argument("--jobs", type=cli.whole, default=0, metavar="N", help="so many are trained at a time (default 0: all in this process)")
    p.add_argument("--limit", type=cli.whole, metavar="SECONDS", help="begin none after so many, and end those of --jobs there")
    p.add_argument("--quick", action="store_true", help="few rows, few steps")
    for k, default in SIZES.items():
        p.add_argument(f"--{k}", type=float if k == "lr" else cli.whole, help=f"default {default:g}")
    args = p.parse_args(argv)
    if args.table:
        return lengths.from_table(args, table, picture)
    for k, default in (SIZES | (QUICK if args.quick else {})).items():
        setattr(args, k, getattr(args, k) or default)
    train.use_backend(args.backend)
    from model import load

    folder = cli.model_folder(args).absolute()
    base, tokenizer = load(folder, dtype=args.dtype, device=args.device)
    rows, most = held_out(args, tokenizer, args.chunk * args.beyond), base.config.max_position_embeddings // args.chunk
    result = {"machine": common.machine(), "command": lengths.command(__file__), "protocol": lengths.protocol(__doc__)}
    result |= {"model": folder.name, "settings": {k: getattr(args, k) for k in (*SIZES, "seed")}, "held_out_rows": len(rows), "rows": []}
    write = lengths.keeper(args.out / f"{args.name or ('summarise-quick' if args.quick else 'summarise')}.json", result)

    def read(label, model, rows, together, **more):
        start = time.perf_counter()
        cli.say(f"{label}: {len(rows)} rows are read")
        row = {"label": label, **more, "loss": by_chunk(model, rows, args.chunk, together)}
        cli.say(f"{label}: {row['loss'][0]:.3f} at first, {row['loss'][-1]:.3f} at last, read in {time.perf_counter() - start:.1f} s")
        return row

    def keep(*new):
        result["rows"] = sorted([*result["rows"], *new], key=lambda row: asked.index(row["positions"]) if "positions" in row else -1)
        write()
        if args.plot:
            picture(result, args.plot)

    asked, missing = args.positions or (["none"] if args.quick else list(COLORS)), []
    keep(read("base, full attention", base, [row[: min(most, args.beyond) * args.chunk + 1] for row in rows], True))
    del base
    # into the cache, before all want it at once
    train.corpora(SimpleNamespace(data=args.data, valid=args.valid, upsample=1), tokenizer)
    for positions, checkpoint, seconds in each(asked, folder, args, missing):
        model, _ = load(checkpoint, dtype=args.dtype, device=args.device)
        more = {"positions": positions, "steps": int(checkpoint.name.removeprefix("step-")), "seconds": seconds}
        keep(*(read(f"{way}, positions={positions}", model, rows, way == "summaries", **more) for way in ("summaries", "alone")))
    print(table(result))
    if missing:
        raise Refused(f"not trained: {'; '.join(missing)}")


if __name__ == "__main__":
    errors.main(main)
