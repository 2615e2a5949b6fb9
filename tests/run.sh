#!/usr/bin/env bash
# The suite, once per backend, and the Triton kernels interpreted. One thread a framework: the sizes are tiny, and threads that
set -u
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=true
status=0
for backend in torch mlx; do
    echo "== $backend"
    NANOLONG_BACKEND=$backend python -m pytest "$@" || status=1
done
if python -c "import triton" 2>/dev/null; then
    echo "== triton, interpreted"
    TRITON_INTERPRET=1 NANOLONG_BACKEND=torch python -m pytest tests/test_triton.py tests/test_rotate.py tests/test_engines.py -k "triton and not bfloat16" "$@" || status=1
fi
exit $status
