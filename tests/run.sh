#!/usr/bin/env bash
# The suite, once per backend. One thread a framework: the sizes are tiny, and threads that wait for each other are slower.
set -u
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=true
status=0
for backend in torch mlx; do
    echo "== $backend"
    NANOLONG_BACKEND=$backend python -m pytest "$@" || status=1
done
exit $status
