"""The folder of a training run: checkpoints that appear whole or not at all, metrics, and finding the way back in.

trainer.json     the run's arguments, complete
metrics.jsonl    a line a step (loss, lr, grad_norm, ...) and a line a validation (valid_loss)
loss.png         the same as a picture, where matplotlib is installed
step-000100/     a checkpoint as transformers (of an adapter: PEFT) opens it, with optimizer.safetensors and trainer.json beside
*.partial        what is being written; what a killed run left of it is removed when the run goes on
"""

import json
import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

from safetensors import SafetensorError

from errors import Refused


class Stop(Exception):
    """The run cannot go on. The message is one sentence for the person who started it."""


def checkpoints(out):
    """The complete checkpoints of a run, oldest first."""
    return sorted((p for p in Path(out).glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name)), key=lambda p: int(p.name[5:]))


def find(path):
    """What a run's newest trainer.json says, with the run's folder as "out" and the checkpoint's as "folder" (None: nothing was
    saved, begin anew). path: a run, or its newest checkpoint. Raises Refused."""
    path = Path(path)
    out = path.parent if path.name.startswith("step-") else path
    found = checkpoints(out)
    if not (out / "trainer.json").is_file():
        raise Refused(f"--resume {path} is no run: it has no trainer.json")
    if path != out and (not found or path.name != found[-1].name):
        raise Refused(f"--resume {path} is not the newest checkpoint of its run: resume {out}, or move the newer ones away")
    folder = found[-1] if found else None
    return json.loads(((folder or out) / "trainer.json").read_text()) | {"out": out, "folder": folder}


def save(out, state, keep, write):
    """Checkpoint folder of state["step"], its weights written by write(folder); then all but the newest `keep` go. Raises Stop."""
    folder = out / f"step-{state['step']:06d}"
    partial = folder.with_name(folder.name + ".partial")
    try:
        partial.mkdir()
        write(partial)
        (partial / "trainer.json").write_text(json.dumps(state, indent=2) + "\n")
        for path in [*partial.iterdir(), partial]:
            sync(path)
        os.replace(partial, folder)
        sync(out)
    except (OSError, RuntimeError, SafetensorError) as no:
        shutil.rmtree(partial, ignore_errors=True)
        why = os.strerror(no.errno) if isinstance(no, OSError) and no.errno else str(no).strip()
        raise Stop(f"step {state['step']} could not be saved ({why}){last_good(out)}") from None
    for old in checkpoints(out)[:-keep]:
        # renamed first: a half removed folder must not look like a checkpoint
        gone = old.with_name(old.name + ".partial")
        os.replace(old, gone)
        shutil.rmtree(gone, ignore_errors=True)
    return folder


def last_good(out):
    """The end of a sentence that says why a run stopped."""
    found = checkpoints(out)
    return f"; the last good checkpoint is {found[-1]}, go on from it with --resume {out}" if found else "; there is no checkpoint yet"


def sync(path):
    """To the disk, so that a rename cannot become visible before the contents."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def replace(path, text):
    """Write a file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    sync(partial)
    os.replace(partial, path)


def tidy(out):
    for path in out.glob("*.partial"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


class Metrics:
    """metrics.jsonl of a run that goes on after `step`: later lines tell of work that was lost with its process, and are dropped."""

    def __init__(self, out, step):
        self.path = out / "metrics.jsonl"
        lines = self.path.read_text().splitlines(keepends=True) if self.path.is_file() else []
        # the last line of a killed run may be torn
        self.lines = [x for x in (json.loads(line) for line in lines if line.endswith("}\n")) if x["step"] <= step]
        replace(self.path, "".join(json.dumps(x) + "\n" for x in self.lines))

    def add(self, **line):
        self.lines.append(line)
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def series(self, key):
        """[(step, value), ...] of the lines that have this key."""
        return [(x["step"], x[key]) for x in self.lines if key in x]

    def plot(self):
        if not find_spec("matplotlib"):
            return print("no loss.png: matplotlib is not installed (pip install matplotlib)")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="loss (nats a token)")
        axes.plot(*zip(*self.series("loss")), linewidth=1, label="training")
        axes.plot(*zip(*self.series("valid_loss")), "o-", label="validation")
        axes.legend()
        figure.savefig(self.path.with_name("loss.png"), dpi=150)
