"""Does it really use the context? Perplexity by position, and passkey retrieval, read in segments as generation reads.

python evaluate.py                                                    # the default model on held-out files of the default corpus
python evaluate.py --data book.txt --lengths 2k,8k,32k --memory sinks --plot loss.png
python evaluate.py --task passkey --lengths 1k,2k,4k --depths 5 --trials 4 --memory sinks:budget=1024

A length N means the first N tokens of every document that has so many, bos included where the model's tokenizer adds one. The loss at
position i is that of token i + 1 after tokens 0 to i, so N tokens are N - 1 predictions; the first is never one. All lengths are
measured in one reading of the same documents. passkey.py says what its prompt is and what counts as an answer.
"""

import argparse
import json
import platform
import sys
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

import cli
import data
from errors import Refused, main
from passkey import grid


def perplexity(model, tokens, segment=512, progress=lambda losses: None):
    """Loss of each next token in nats, float32 [n - 1], of one text read in segments, each closed at its end.

    tokens: integers [n]. No more than one segment's logits exist at a time. progress: is given each segment's losses.
    """
    import ops

    x, y = np.asarray(tokens[:-1], np.int32), np.asarray(tokens[1:], np.int32)
    state, losses = model.start(min(segment, len(x)), len(x)), np.empty(len(x), np.float32)
    with ops.no_grad():
        for i in range(0, len(x), segment):
            here = slice(i, i + segment)
            loss, state = model(ops.array(x[None, here]), state, targets=ops.array(y[None, here]))
            ops.wait(loss, state)
            losses[here] = ops.numpy(loss[0])
            progress(losses[here])
    return losses


def edges(n, parts=1):
    """Boundaries of the buckets 0-127, 128-255, 256-511, ... up to n positions, each in so many equal parts."""
    out, low, high = [0], 0, 128
    while out[-1] < n:
        out += [low + (high - low) * (k + 1) // parts for k in range(parts)]
        low, high = high, 2 * high
    return [e for e in out if e < n] + [n]


def by_position(total, count, parts=1):
    """Losses summed over documents, and how many, both [n] by position -> a dict for each bucket that holds any."""
    places, out = edges(len(total), parts), []
    for low, high in pairwise(places):
        if n := int(count[low:high].sum()):
            out.append({"from": low, "to": high - 1, "loss": float(total[low:high].sum() / n), "tokens": n})
    return out


def texts(files, tokenizer, longest, documents, bos):
    """(name, tokens) of the first documents that have the longest length, cut to it; None: whole ones. Raises Refused if none."""
    seen, most = 0, 0
    for name, text in data.documents(files):
        tokens = data.encode(tokenizer, text, bos)
        most = max(most, len(tokens))
        if len(tokens) >= (longest or 2):
            seen += 1
            yield name, tokens[:longest]
        if seen == documents:
            return
    if not seen:
        raise Refused(f"no document has {longest or 2} tokens, the longest has {most}: ask for shorter --lengths, or give longer texts")


def evaluate_perplexity(model, tokenizer, files, lengths, segment, documents=None, bos=None):
    """Each document once, the means over all tokens of all documents. lengths: ascending, or [None] for whole documents."""
    total, count, sums, names = np.zeros(0), np.zeros(0, int), {n: np.zeros(3) for n in lengths}, []
    with tqdm(unit="token", desc="reading", leave=False, disable=not sys.stderr.isatty()) as bar:

        def progress(losses):
            bar.update(len(losses))
            bar.set_postfix(loss=f"{losses.mean():.3f}", refresh=False)

        for name, tokens in texts(files, tokenizer, lengths[-1], documents, bos):
            losses = perplexity(model, tokens, segment, progress).astype(np.float64)
            names.append({"name": name, "tokens": len(tokens), "loss": losses.mean()})
            if len(losses) > len(total):
                total, count = (np.pad(a, (0, len(losses) - len(a))) for a in (total, count))
            total[: len(losses)] += losses
            count[: len(losses)] += 1
            for n in lengths:
                # the bytes of what was predicted: all but the first token
                size = len(tokenizer.decode(tokens[1:n]).encode())
                sums[n] += [losses[: n and n - 1].sum(), len(tokens[1:n]), size]
    rows = []
    for n, (nats, predicted, size) in sums.items():
        mean, bits = nats / predicted, nats / np.log(2)
        rows.append({"length": n, "tokens": int(predicted), "loss": mean, "perplexity": float(np.exp(mean)), "bits_per_byte": bits / size})
    return {"lengths": rows, "by_position": by_position(total, count), "curve": by_position(total, count, 8), "documents": names}


def about(model, args):
    """What the figures depend on."""
    import ops

    c, dtype = model.config, model.dtype or model.model.embed_tokens.weight.dtype
    return {
        "task": args.task,
        "positions": c.max_position_embeddings,
        "model": Path(args.model).name if args.model else "the default model",
        **{"attn": c.attn, "pos": c.pos, "memory": c.memory, "adapter": c.adapter, "base_bits": c.base_bits, "segment": args.segment},
        **{
            "dtype": str(dtype).split(".")[-1],
            "device": f"{ops.BACKEND} {ops.device()}",
            "machine": f"{platform.system()} {platform.machine()}",
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in (ops.BACKEND, "numpy", "tokenizers")}},
    }


def table(rows):
    """Lines of right-aligned columns; numbers that are not whole get four places."""
    cells = [[f"{c:,}" if isinstance(c, int) else f"{c:.4f}" if isinstance(c, float) else c for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths)) for row in cells)


def show(r):
    """The protocol, then the figures."""
    if any(d["tokens"] > r["positions"] for d in r.get("documents", r.get("trials"))):
        cli.say(f"note: the model's config.json promises {r['positions']} positions, and some texts are longer")
    print(f"{r['task']}: {r['model']}, --attn {r['attn']} --pos {r['pos']} --memory {r['memory']}, {r['dtype']} on {r['device']}")
    if r["task"] == "perplexity":
        print(f"{len(r['documents'])} documents in segments of {r['segment']}, {'with' if r['bos'] else 'without'} bos\n")
        rows = [[r["length"] or "whole", r["tokens"], r["loss"], r["perplexity"], r["bits_per_byte"]] for r in r["lengths"]]
        print(table([["length", "tokens", "nats/token", "perplexity", "bits/byte"], *rows]))
        rows = [[f"{b['from']}-{b['to']}", b["tokens"], b["loss"]] for b in r["by_position"]]
        print("\n" + table([["position", "tokens", "nats/token"], *rows]))
    else:
        asked = "with the text, before the memory closed on it" if r["question_seen"] else "after the memory had closed on the text"
        print(f"greedy, {r['keys']} keys a cell; the text in segments of {r['segment']}, the question {asked}\n")
        rows = [[n, *(f"{100 * x:.0f}%" for x in [*row, np.mean(row)])] for n, row in zip(r["lengths"], r["accuracy"])]
        print(table([["length", *(f"at {100 * d:.0f}%" for d in r["depths"]), "mean"], *rows]))


def picture(r, path):
    """The loss by position, or the passkey grid, as a picture."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(7, 4), layout="constrained")
    ax = fig.subplots()
    if r["task"] == "perplexity":
        ax.plot([(b["from"] + b["to"]) / 2 + 1 for b in r["curve"]], [b["loss"] for b in r["curve"]])
        ax.set(xscale="log", xlabel="position", ylabel="loss (nats per token)")
    else:
        fig.colorbar(ax.imshow(np.transpose(r["accuracy"]), vmin=0, vmax=1, cmap="RdYlGn", aspect="auto"), label="accuracy")
        ax.set_xticks(range(len(r["lengths"])), r["lengths"])
        ax.set_yticks(range(len(r["depths"])), [f"{100 * d:.0f}%" for d in r["depths"]])
        ax.set(xlabel="length (tokens)", ylabel="depth of the key")
    ax.set_title(f"{r['model']}, --attn {r['attn']} --pos {r['pos']} --memory {r['memory']}", fontsize="small")
    cli.write(path, lambda partial: fig.savefig(partial, format=path.suffix[1:]))


def lengths(text):
    """argparse type: 2k,4k -> [2048, 4096], ascending; all -> [None]."""
    return [None] if text == "all" else sorted({cli.whole(part) for part in text.split(",")})


def arguments():
    parser = cli.Parser(description=__doc__)
    cli.add_model_flags(parser)
    add = parser.add_argument_group("task").add_argument
    add("--task", default="perplexity", metavar="NAME", help=f"{' or '.join(TASKS)} (default perplexity)")
    add(
        "--lengths",
        "--length",
        type=lengths,
        metavar="N,N",
        help="2k,4k; all: whole documents (default: all of --data, else 2k; 512,1k)",
    )
    add("--segment", type=cli.whole, help="tokens read at once; a bounded memory forgets after each (default: as trained, or 512)")
    add("--json", type=Path, metavar="FILE", help="write the whole result, with every raw answer or the loss by position")
    add("--plot", type=Path, metavar="FILE", help="draw the loss by position or the passkey grid: .png, .pdf or .svg (needs matplotlib)")
    add = parser.add_argument_group("perplexity").add_argument
    add(
        "--data",
        nargs="+",
        metavar="PATH",
        help="texts, folders, .jsonl, repo:, hub: (default: held-out files of the default corpus)",
    )
    add("--documents", type=cli.whole, help="read so many documents that are long enough (default: all of --data, else 4)")
    add("--bos", action=argparse.BooleanOptionalAction, help="begin documents with the bos token (default: as the model's tokenizer does)")
    add = parser.add_argument_group("passkey").add_argument
    add("--depths", type=cli.whole, default=5, help="so many places for the key, evenly from before the filler to after it (default 5)")
    add("--trials", type=cli.whole, default=2, help="keys for each length and depth (default 2)")
    add("--seed", type=int, default=0, help="of the keys (default 0)")
    add("--question-seen", action="store_true", help="read the question with the text, before the memory closes on it")
    args = parser.parse_args()
    counts, shortest = (args.segment, args.depths, args.trials, args.documents), (args.lengths or [None])[0]
    wrong = [
        (args.task not in TASKS, f"--task {args.task!r} is not known: choose one of {', '.join(TASKS)}"),
        (args.task == "passkey" and args.lengths == [None], "--lengths all is for perplexity: give the prompts' lengths, as in 1k,2k"),
        (shortest is not None and shortest < 2, f"--lengths {shortest} leaves nothing to predict: give at least 2"),
        (any(n is not None and n < 1 for n in counts), "--segment, --depths, --trials and --documents must be at least 1"),
        (args.seed < 0, f"--seed {args.seed} is negative: give 0 or more"),
        (args.plot and not find_spec("matplotlib"), "--plot needs matplotlib: pip install matplotlib"),
        (args.plot and args.plot.suffix not in (".png", ".pdf", ".svg"), f"--plot {args.plot}: end its name in .png, .pdf or .svg"),
        *((f and not f.absolute().parent.is_dir(), f"{f} cannot be written: its folder is not there") for f in (args.json, args.plot)),
    ]
    for is_wrong, sentence in wrong:
        if is_wrong:
            raise Refused(sentence)
    return args


def opened(args):
    """The model and tokenizer; what is left open about segments is settled."""
    model, tokenizer = cli.load(args)
    args.segment = args.segment or model.segment or 512
    return model, tokenizer


def run_perplexity(args):
    files = data.expand(args.data) if args.data else data.split(data.default_corpus())[1]
    sizes = args.lengths or ([None] if args.data else [2048])
    model, tokenizer = opened(args)
    r = about(model, args) | {"bos": tokenizer.adds_bos if args.bos is None else args.bos}
    return r | evaluate_perplexity(model, tokenizer, files, sizes, args.segment, args.documents or (None if args.data else 4), args.bos)


def run_passkey(args):
    model, tokenizer = opened(args)
    r = about(model, args) | {"keys": args.trials, "seed": args.seed, "question_seen": args.question_seen}
    how = args.depths, args.trials, args.seed, args.segment, args.question_seen
    return r | grid(model, tokenizer, args.lengths or [512, 1024], *how)


TASKS = {"perplexity": run_perplexity, "passkey": run_passkey}


def run():
    args = arguments()
    cli.use_backend(args.backend)
    cli.check_spelling(args.attn, args.pos, args.memory, args.adapter)
    r = TASKS[args.task](args)
    show(r)
    if args.json:
        cli.write(args.json, lambda partial: partial.write_text(json.dumps(r, indent=1) + "\n"))
    if args.plot:
        picture(r, args.plot)


if __name__ == "__main__":
    main(run)
