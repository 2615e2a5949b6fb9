#!/usr/bin/env bash
# SmolLM2-135M-Instruct from 8K to 64K tokens in a quarter of an hour on one H100: every choice trained and measured side by side.
#
#   bash runs/extend_smollm2.sh                                      # trains on Python's own library
#   bash runs/extend_smollm2.sh --data NOVELS --valid TWO_OTHERS     # any flag of runs/extend.py
#
# One of the choices by itself, as runs/extend.py calls it:
#
#   python train.py --attn longformer:window=4096,n_global=64 --pos yarn:factor=auto --curriculum 16k,32k,64k --batch 1 --steps 100 \
#       --warmup 10 --lr 2e-4 --data NOVELS
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
exec python "$root/runs/extend.py" --plot "$root/docs/extend.png" "$@"
