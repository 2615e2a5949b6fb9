"""Does it really use the context? Perplexity by position, and passkey retrieval, read in segments as generation reads.

python evaluate.py                                                    # the default model on held-out files of the default corpus
python evaluate.py --data book.txt --lengths 2k,8k,32k --memory sinks --plot loss.png
python evaluate.py --task passkey --lengths 1k,2k,4k --depths 5 --trials 4 --memory window:budget=1024

A length N means the first N tokens of every document that has so many (bos included, where there is one): N - 1 predictions. The
loss at position i is that of token i + 1 after the tokens 0 to i; all lengths come from one reading, so they share documents.
"""

import argparse
import json
import math
import os
import platform
import re
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
from generate import Session

# Mohtashami & Jaggi 2023, arXiv:2305.16300, in the words of LongLoRA's test (Chen et al. 2023, arXiv:2309.12307); there the
# filler is cut by characters, here at a sentence
TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = ["The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again."]
KEY = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION, ANSWER = "What is the pass key?", "The pass key is"
ANSWER_TOKENS = 12


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
            logits, state = model(ops.array(x[None, here]), state)
            loss = ops.cross_entropy(logits[0], ops.array(y[here]))
            ops.wait(loss, state)
            losses[here] = ops.numpy(loss)
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
        tokens = tokenizer.encode(text, bos)
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
        mean = nats / predicted
        ppl = math.exp(min(mean, 700))
        rows.append(
            {"length": n, "tokens": int(predicted), "loss": mean, "perplexity": ppl, "bits_per_byte": nats / math.log(2) / max(size, 1)}
        )
    return {"lengths": rows, "by_position": by_position(total, count), "curve": by_position(total, count, 8), "documents": names}


def passkey_prompt(tokenizer, length, depth, key, chat=False):
    """(context, question): two lists of ids, together at most one sentence of filler shorter than length.

    depth: where in the filler the key stands, 0 to 1. chat: through the model's chat template, with the answer begun for it.
    Raises Refused for a length that leaves no room.
    """

    def ids(n):
        before = int(depth * n + 0.5)
        filler = [" ".join(FILLER[i % len(FILLER)] for i in range(m)) for m in (before, n - before)]
        text = "\n".join([TASK, filler[0], KEY.format(key=key), filler[1], ""])
        if not chat:
            return tokenizer.encode(text).tolist(), tokenizer.encode(f"{text}{QUESTION} {ANSWER}").tolist()
        say = lambda content, go: tokenizer.chat([{"role": "user", "content": content}], go).tolist()
        return say(text, False), say(text + QUESTION, True) + tokenizer.encode(ANSWER, bos=False).tolist()

    size = lambda n: len(ids(n)[1])
    if size(1) > length:
        raise Refused(f"a passkey prompt of {length} tokens has no room for its filler: --lengths must be {size(1)} or more")
    n = max(1, int((length - size(0)) * 50 / (size(50) - size(0))))
    while size(n) > length:
        n -= 1
    while size(n + 1) <= length:
        n += 1
    context, whole = ids(n)
    # the question begins where the prompts with and without it part
    same = next((i for i, (a, b) in enumerate(zip(context, whole)) if a != b), len(context))
    return whole[:same], whole[same:]


def matches(answer, key):
    """The first number in the answer is the key, digit for digit."""
    found = re.search(r"[0-9]+", answer)
    return found is not None and found[0] == str(key)


def passkey(session, tokenizer, length, depth, key, seen=False, chat=False):
    """One trial, greedy: a dict with the raw answer. seen: the question is read in one go with the text, so a memory that chooses
    what to keep by attention may choose by the question; else it comes after the memory has closed on the text."""
    import ops

    context, question = passkey_prompt(tokenizer, length, depth, key, chat)
    session.restart()
    logits = session.read(context + question, ANSWER_TOKENS) if seen else session.read(context, len(question) + ANSWER_TOKENS)
    logits = logits if seen else session.read(question)
    session.ready(ANSWER_TOKENS)
    out = [int(ops.argmax(logits))]
    while out[-1] not in tokenizer.eos_ids and len(out) < ANSWER_TOKENS:
        out.append(int(ops.argmax(session.step(out[-1]))))
    answer, n = tokenizer.decode(out), len(context) + len(question)
    return {
        "length": length,
        "depth": depth,
        "tokens": n,
        "key": key,
        "answer": answer,
        "correct": matches(answer, key),
        "cache": session.nbytes(),
    }


def evaluate_passkey(model, tokenizer, lengths, depths, trials, seed=0, chunk=512, seen=False, chat=False):
    """A grid of accuracies [lengths, depths] and every trial. The keys depend on seed, length, depth and trial alone."""
    # a graph pays off in long answers only
    session, places, out = Session(model, chunk, graph=False), np.linspace(0, 1, depths) if depths > 1 else np.array([0.5]), []
    every = [(n, d, t) for n in lengths for d in range(depths) for t in range(trials)]
    with tqdm(every, "passkey", leave=False, disable=not sys.stderr.isatty()) as bar:
        for n, d, t in bar:
            key = int(np.random.default_rng([seed, n, d, t]).integers(1, 50001))
            out.append(passkey(session, tokenizer, n, float(places[d]), key, seen, chat))
            bar.set_postfix(correct=f"{np.mean([o['correct'] for o in out]):.2f}", length=n, refresh=False)
    grid = np.array([o["correct"] for o in out], float).reshape(len(lengths), depths, trials).mean(2)
    return {"lengths": lengths, "depths": places.tolist(), "accuracy": grid.tolist(), "trials": out}


def about(model, args):
    """What a figure depends on: written into every result."""
    import ops

    framework = {"torch": "torch", "mlx": "mlx"}[ops.BACKEND]
    dtype = model.dtype or model.model.embed_tokens.weight.dtype
    return {
        "task": args.task,
        "model": Path(args.model).name if args.model else "default",
        "attn": model.config.attn,
        "pos": model.config.pos,
        "memory": model.config.memory,
        "adapter": args.adapter or "full",
        "dtype": str(dtype).split(".")[-1],
        "backend": ops.BACKEND,
        "device": str(ops.device()),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in (framework, "numpy", "tokenizers")}},
    }


def table(head, rows):
    """Lines of right-aligned columns."""
    cells = [head, *([c if isinstance(c, str) else f"{c:,}" if isinstance(c, int) else f"{c:.4g}" for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths)) for row in cells)


def show_perplexity(r):
    shape = lambda x: f"{x:.4f}"
    rows = [
        [row["length"] or "whole", row["tokens"], shape(row["loss"]), shape(row["perplexity"]), shape(row["bits_per_byte"])]
        for row in r["lengths"]
    ]
    print(table(["length", "tokens", "nats/token", "perplexity", "bits/byte"], rows))
    rows = [[f"{b['from']}-{b['to']}", b["tokens"], shape(b["loss"])] for b in r["by_position"]]
    print("\n" + table(["position", "tokens", "nats/token"], rows))


def show_passkey(r):
    rows = [[n, *(f"{100 * x:.0f}%" for x in row), f"{100 * np.mean(row):.0f}%"] for n, row in zip(r["lengths"], r["accuracy"])]
    print(table(["length", *(f"at {d:.2f}" for d in r["depths"]), "mean"], rows))


def picture(r, path):
    """The loss by position, or the passkey grid, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    if r["task"] == "perplexity":
        ax.plot([(b["from"] + b["to"]) / 2 + 1 for b in r["curve"]], [b["loss"] for b in r["curve"]])
        ax.set(xscale="log", xlabel="position", ylabel="loss (nats per token)")
    else:
        fig.colorbar(ax.imshow(np.transpose(r["accuracy"]), vmin=0, vmax=1, cmap="RdYlGn", aspect="auto"), label="accuracy")
        ax.set_xticks(range(len(r["lengths"])), r["lengths"])
        ax.set_yticks(range(len(r["depths"])), [f"{d:.2f}" for d in r["depths"]])
        ax.set(xlabel="length (tokens)", ylabel="depth of the key")
    ax.set_title(f"{r['model']}, --attn {r['attn']} --pos {r['pos']} --memory {r['memory']}", fontsize="small")
    write(path, lambda partial: fig.savefig(partial, format=path.suffix[1:] or "png"))
    plt.close(fig)


def write(path, fill):
    """A file written by fill(a path beside it), there whole or not at all."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        fill(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def lengths(text):
    """argparse type: 2k,4k -> [2048, 4096], ascending; all -> [None]."""
    return [None] if text == "all" else sorted({cli.whole(part) for part in text.split(",")})


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_model_flags(parser)
    add = parser.add_argument_group("task").add_argument
    add("--task", default="perplexity", metavar="NAME", help="perplexity (default) or passkey")
    add(
        "--lengths",
        "--length",
        type=lengths,
        metavar="N,N",
        help="tokens to read: 2k,4k,8k; all: whole documents (default: all of --data, else 2k; 512,1k for passkey)",
    )
    add("--segment", type=cli.whole, default=512, help="tokens read at once; a bounded memory forgets after each (default 512)")
    add("--json", type=Path, metavar="FILE", help="write the whole result, with raw answers or the loss by position")
    add("--plot", type=Path, metavar="FILE", help="draw the loss by position, or the passkey grid (.png, .pdf, .svg; needs matplotlib)")
    add = parser.add_argument_group("perplexity").add_argument
    add("--data", nargs="+", metavar="PATH", help="texts, folders, globs, .jsonl (default: held-out files of the default corpus)")
    add("--documents", type=cli.whole, help="read so many documents, in order (default: all of --data, else 4)")
    add(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="begin each document with the bos token (default: as the model's tokenizer does)",
    )
    add = parser.add_argument_group("passkey").add_argument
    add("--depths", type=cli.whole, default=5, help="so many places for the key, evenly from the first sentence to the last (default 5)")
    add("--trials", type=cli.whole, default=2, help="keys for each length and depth (default 2)")
    add("--seed", type=int, default=0, help="of the keys")
    add("--chat", action="store_true", help="ask through the chat template (default: the published prompt as plain text)")
    add("--question-seen", action="store_true", help="read the question together with the text, before the memory closes on it")
    args = parser.parse_args()
    wrong = [
        (args.task not in SHOW, f"--task {args.task!r} is not known: choose one of {', '.join(SHOW)}"),
        (
            args.task == "passkey" and args.lengths == [None],
            "--lengths all is for perplexity: give the passkey prompt's lengths, as in 1k,2k",
        ),
        (
            min(filter(None, args.lengths or [2]), default=2) < 2,
            "--lengths must be at least 2: the first token has nothing before it to be predicted from",
        ),
        (
            min(args.segment, args.depths, args.trials, args.documents or 1) < 1,
            "--segment, --depths, --trials and --documents must be at least 1",
        ),
        (args.documents == 0, "--documents 0 reads nothing: give at least 1"),
        (args.plot and not find_spec("matplotlib"), "--plot needs matplotlib, which is not installed: pip install matplotlib"),
        (
            args.plot and args.plot.suffix not in (".png", ".pdf", ".svg"),
            f"--plot {args.plot} is no picture: end its name in .png, .pdf or .svg",
        ),
        *((f and not f.absolute().parent.is_dir(), f"{f} cannot be written: its folder does not exist") for f in (args.json, args.plot)),
    ]
    for is_wrong, sentence in wrong:
        if is_wrong:
            raise Refused(sentence)
    return args


SHOW = {"perplexity": show_perplexity, "passkey": show_passkey}


def run():
    args = arguments()
    cli.settle(args)
    if args.task == "perplexity":
        files = data.expand(args.data) if args.data else data.split(data.default_corpus())[1]
        args.lengths = args.lengths or ([None] if args.data else [2048])
        args.documents = args.documents or (None if args.data else 4)
    model, tokenizer = cli.load(args)
    trained = model.config.max_position_embeddings
    if args.lengths and (args.lengths[-1] or 0) > trained:
        cli.say(f"note: the model says that it was trained on {trained} positions at most")
    r = about(model, args) | {"segment": args.segment}
    where = f"{r['model']}, --attn {r['attn']} --pos {r['pos']} --memory {r['memory']}, {r['dtype']} on {r['backend']} {r['device']}"
    if args.task == "perplexity":
        r["bos"] = tokenizer.adds_bos if args.bos is None else args.bos
        r |= evaluate_perplexity(model, tokenizer, files, args.lengths, args.segment, args.documents, args.bos)
        print(
            f"perplexity: {where}\n{len(r['documents'])} documents in segments of {args.segment}, {'with' if r['bos'] else 'without'} bos\n"
        )
    else:
        args.lengths = args.lengths or [512, 1024]
        r |= {"seed": args.seed, "chat": args.chat, "question_seen": args.question_seen}
        r |= evaluate_passkey(
            model, tokenizer, args.lengths, args.depths, args.trials, args.seed, args.segment, args.question_seen, args.chat
        )
        asked = "with the text, before the memory closed on it" if args.question_seen else "after the memory had closed on the text"
        form = "chat template" if args.chat else "plain text"
        print(
            f"passkey: {where}\n{form}, greedy, {args.trials} keys a cell; text read in segments of {args.segment}, the question {asked}\n"
        )
    SHOW[args.task](r)
    if args.json:
        write(args.json, lambda partial: partial.write_text(json.dumps(r, indent=1) + "\n"))
    if args.plot:
        picture(r, args.plot)


if __name__ == "__main__":
    main(run)
