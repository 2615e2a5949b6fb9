"""Train short, read long: small Llamas over bytes, alike but for --pos, trained from scratch at one length and read at others.

    python runs/extrapolate.py --data TRAIN --valid HELD_OUT --models out/extrapolate
    python runs/extrapolate.py --toy                             # minutes on a CPU, on Python's own library: shows that all works
    python runs/extrapolate.py --table bench/results/extrapolate.json --plot docs/extrapolate.png

Protocol. train.py trains each model from the same random weights on the same batches in the same order; a token is a byte. Then, without
further training, the first bytes of the held-out texts, as many of each, are cut into windows of 1, 2, 4 and 8 times the trained
length. A window is read at once: no cache, positions from 0. Each byte predicts the one after it, the last of a window the first of the
next, so every length predicts the same bytes; the figure is bits per byte over all of them. The loss by position is that of the longest
windows. Schemes with weights of their own have more of them: the table counts.

Models that --models holds already are not trained again, and one that was cut off begins again from its last checkpoint, so a second call
goes on. With --only some are trained, and all that are there are read.

Claimed: alibi reads on past its length without loss, sinusoidal and rotary positions do not, and T5's bias stands between (Press et al.
2021, arXiv:2108.12409); no positions at all generalise to longer tasks better than any of these (Kazemnejad et al. 2023,
arXiv:2305.19466, small tasks of reasoning); Transformer-XL's relative positions serve more memory than they were trained with (Dai et al.
2019, arXiv:1901.02860).
"""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
import data
import errors
import evaluate
import plugins
import rundir
from bench import common
from errors import Refused
from runs import lengths

SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
TRAINING = {"length": 1024, "batch": 32, "micro": 32, "steps": 800, "warmup": 80, "lr": 1e-3, "read": 1 << 19}
TOY_SHAPE = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}
TOY = {"length": 128, "batch": 16, "micro": 16, "steps": 100, "warmup": 10, "lr": 3e-3, "read": 1 << 14}
TIMES = (1, 2, 4, 8)
# what a trained model must agree in with what is asked for
SAME = ("pos", "length", "batch", "steps", "warmup", "lr", "seed", "data", "valid")


def byte_folder(folder, shape, length):
    """A folder that train.py can begin from: a tokenizer of 256 bytes and an end of text, and a config without weights."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tok = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.add_special_tokens([AddedToken("<|end|>", special=True)])
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}))
    # 257, and what makes a multiple of 8
    config = {"model_type": "llama", "vocab_size": 264, "tie_word_embeddings": True, "max_position_embeddings": length, **shape}
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}, indent=2) + "\n")
    return folder


def train(pos, out, start, files, args):
    """Train a model of this --pos into a run's folder, or go on where it was cut off; nothing where it is complete."""
    said = out / "trainer.json"
    asked = {**{k: getattr(args, k) for k in SAME if k not in ("pos", "data", "valid")}, "pos": pos, **files}
    if said.is_file():
        found = rundir.find(out)
        differs = [k for k in SAME if found["arguments"][k] != asked[k]]
        if differs:
            raise Refused(f"{out} was trained with another --{differs[0]}: name another folder with --models, or remove it")
        if found["step"] >= args.steps:
            return
        flags = ["--resume", str(out)]
    else:
        flags = ["--model", str(start), "--init", str(start / "config.json"), "--out", str(out), "--pos", pos]
        flags += ["--data", *files["data"], "--valid", *files["valid"], "--valid-rows", "64", "--keep", "1"]
        flags += [x for k in ("length", "batch", "micro", "steps", "warmup", "lr", "seed") for x in (f"--{k}", str(getattr(args, k)))]
        flags += ["--eval-every", str(args.steps), "--checkpoint" if args.checkpoint else "--no-checkpoint"]
        flags += [x for k in ("backend", "device", "dtype") if getattr(args, k) for x in (f"--{k}", getattr(args, k))]
    log = out.with_name(f"{out.name}.log")
    with open(log, "a") as said:
        done = subprocess.run([sys.executable, str(common.ROOT / "train.py"), *flags], stdout=said, stderr=said)
    if done.returncode:
        tail = log.read_text()[-1500:].replace("\r", "\n")
        raise Refused(f"train.py with --pos {pos} ended with {done.returncode} (all that it said: {log})\n{tail}")


def trained(out):
    """What a run's metrics say of its training."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [x for x in lines if "loss" in x]
    # the first steps allocate and compile, and a rare one with the end of a book in it again
    speeds = sorted(x["tokens_per_second"] for x in steps[len(steps) // 10 :])
    return {
        "tokens": steps[-1]["tokens"],
        "tokens_per_second": round(speeds[len(speeds) // 2]),
        "seconds": round(sum(x["seconds"] for x in steps), 1),
        "peak_GiB": round(max(x["peak_memory"] for x in steps) / 2**30, 2),
        "valid_loss": [x["valid_loss"] for x in lines if "valid_loss" in x],
        "loss": [round(x["loss"], 4) for x in steps[:: max(1, len(steps) // 100)]],
    }


def held_out(paths, tokenizer, longest, total):
    """[(name, tokens)]: windows of the longest length from the front of each held-out text, as many of each, `total` tokens at most."""
    whole = lengths.texts(paths, tokenizer, longest, 1 << 40)
    each = max(longest, total // len(whole) // longest * longest)
    return [(name, tokens[: each + 1]) for name, tokens in whole[: max(1, total // longest)]]


def read(out, pos, texts, args):
    """The row of a trained model."""
    import ops
    from model import load

    start = time.perf_counter()
    model, _ = load(rundir.checkpoints(out)[-1], dtype=args.dtype, device=args.device)
    row = {"scheme": pos.partition(":")[0], "pos": pos, "parameters": sum(int(np.prod(p.shape)) for p in ops.parameters(model).values())}
    row |= {"training": trained(out), "cells": []}
    for times in TIMES:
        n = args.length * times
        every = np.concatenate([lengths.read(model, tokens, n, lengths.at_once()) for _, tokens in texts]).astype(np.float64)
        row["cells"].append({"length": n, "loss": every.mean(), "bits_per_byte": every.mean() / math.log(2), "bytes": every.size})
    row["cells"][-1]["curve"] = evaluate.by_position(every.sum(0), np.full(n, len(every)), 4)
    bits = ", ".join(f"{c['bits_per_byte']:.3f} at {c['length']}" for c in row["cells"])
    speed = f"{row['training']['tokens_per_second']:,} tokens/s in training"
    cli.say(f"{pos}: {bits} bits per byte; {speed}; read in {time.perf_counter() - start:.1f} s")
    return row


def table(r):
    """The README's table."""
    first, *others = map(lengths.show, r["lengths"])
    head = ["`--pos`", "parameters", "training, tokens/s", f"bits per byte at {first}", *others]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in r["rows"]:
        cells = [row["pos"], f"{row['parameters'] / 1e6:.2f}M", f"{row['training']['tokens_per_second']:,}"]
        lines.append("| " + " | ".join(cells + [f"{c['bits_per_byte']:.3f}" for c in row["cells"]]) + " |")
    return "\n".join(lines)


def picture(r, path):
    style = lambda row: "--" if ", " in row["pos"] else "-"
    curves = {row["pos"]: (lengths.COLORS[row["scheme"]], style(row), row["cells"][-1]["curve"]) for row in r["rows"]}
    lengths.plot(curves, r["lengths"][0], path, "loss (bits a byte)", 1 / math.log(2))


def arguments(argv=None):
    p = lengths.parser(__doc__)
    p.add_argument("--toy", action="store_true", help="tiny models, a few steps")
    p.add_argument("--data", nargs="+", metavar="PATH", help="texts to train on (default: Python's own library)")
    p.add_argument("--valid", nargs="+", metavar="PATH", help="held-out texts (default: a twentieth of the data's files)")
    p.add_argument("--models", type=Path, metavar="FOLDER", help="the trained models (default: out/extrapolate, out/extrapolate-toy)")
    p.add_argument("--only", type=lambda text: text.split(","), metavar="NAME,NAME", help="train these, of rope, none, alibi, t5, xl")
    p.add_argument("--xl", default="width=128", metavar="OPTIONS", help="of --pos xl, whose features widen heads (default width=128)")
    for k in TRAINING:
        p.add_argument(f"--{k}", type=float if k == "lr" else cli.whole, help=f"default {TRAINING[k]}, with --toy {TOY[k]}")
    p.add_argument("--checkpoint", action="store_true", help="recompute activations: less memory, a third slower")
    args = p.parse_args(argv)
    if args.table:
        return args
    for k, default in (TOY if args.toy else TRAINING).items():
        if getattr(args, k) is None:
            # fewer steps warm up for a tenth of them, too
            setattr(args, k, args.steps // 10 if k == "warmup" else default)
    args.models = args.models or Path("out") / ("extrapolate-toy" if args.toy else "extrapolate")
    args.specs = {name: f"xl:{args.xl}" if name == "xl" and args.xl else name for name in ("rope", "none", "alibi", "t5", "xl")}
    for spec in args.specs.values():
        plugins.parse("positions", spec)
    if unknown := [name for name in args.only or () if name not in args.specs]:
        raise Refused(f"--only {unknown[0]!r} is not known: choose of {', '.join(args.specs)}")
    return args


def main(argv=None):
    args = arguments(argv)
    if args.table:
        return lengths.from_table(args, table, picture)
    cli.use_backend(args.backend)
    import ops
    import tokenizer as tokenizers

    ops.use(args.device)
    files = data.expand(args.data) if args.data else data.default_corpus()
    files, valid = (files, data.expand(args.valid)) if args.valid else data.split(files)
    shape = TOY_SHAPE if args.toy else SHAPE
    start = byte_folder(args.models.absolute() / "start", shape, args.length)
    ours = {name: args.models.absolute() / name for name in args.specs}
    here = {"data": [data.absolute(f) for f in files], "valid": [data.absolute(f) for f in valid]}
    longest = args.length * TIMES[-1]
    texts = held_out(valid, tokenizers.load(start), longest, args.read)
    settings = {k: getattr(args, k) for k in TRAINING} | {"seed": args.seed}
    settings["dtype"] = args.dtype or ("bfloat16" if ops.on_gpu() else "float32")
    result = {
        **{"machine": common.machine(), "command": lengths.command(__file__), "protocol": lengths.protocol(__doc__)},
        **{"shape": shape, "settings": settings, "lengths": [args.length * k for k in TIMES]},
        "texts": [{"name": name, "tokens": len(tokens) - 1} for name, tokens in texts],
        "rows": [],
    }
    failed, keep = [], lengths.keeper(args.out / f"{args.name or ('extrapolate-toy' if args.toy else 'extrapolate')}.json", result)
    for name, pos in args.specs.items():
        if args.only is None or name in args.only:
            cli.say(f"== {pos}")
            try:
                train(pos, ours[name], start, here, args)
            except Refused as no:
                # the others are worth having without it
                cli.say(no)
                failed.append(name)
                continue
        # what is there is read, so that each call leaves a whole table
        if rundir.checkpoints(ours[name]):
            result["rows"].append(read(ours[name], pos, texts, args))
            keep()
    print(table(result))
    if args.plot and result["rows"]:
        picture(result, args.plot)
    if failed:
        raise Refused(f"not trained: {', '.join(failed)}; the reasons stand above")


if __name__ == "__main__":
    errors.main(main)
