"""Tokens a second and peak memory of train.py itself, as typed, for some steps.

python bench/train.py --attn longformer --length 8k --batch 8 --steps 6      # any flag of train.py; 3 steps at least

--name NAME, --out FOLDER: where the JSON goes (bench/results/train.json). Speed is the median over steps, the first two left out.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import common


def main():
    flags = sys.argv[1:]
    if {"-h", "--help"} & {*flags}:
        return print(__doc__)
    name, out = "train", None
    for own in ("--name", "--out"):
        if own in flags:
            i = flags.index(own)
            name, out = (flags[i + 1], out) if own == "--name" else (name, flags[i + 1])
            del flags[i : i + 2]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, str(common.ROOT / "train.py"), *flags, "--out", str(run)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        if done.returncode:
            sys.exit(done.stderr[-2000:] + f"\n{' '.join(command)} ended with {done.returncode}")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    # the first steps allocate, tune and compile
    speeds = sorted(line["tokens_per_second"] for line in steps[2:])
    common.save(
        name,
        {
            "command": "python train.py " + " ".join(flags),
            "tokens_per_second": round(speeds[len(speeds) // 2]),
            "tokens_per_second_range": [round(speeds[0]), round(speeds[-1])],
            "peak_GiB": round(max(line["peak_memory"] for line in steps) / 2**30, 2),
            "loss": [round(line["loss"], 3) for line in steps],
            "valid_loss": [round(line["valid_loss"], 4) for line in lines if "valid_loss" in line],
        },
        out,
    )


if __name__ == "__main__":
    main()
