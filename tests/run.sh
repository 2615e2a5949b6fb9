#!/usr/bin/env bash
# The suite, once per backend, and the Triton kernels interpreted. One thread a framework: the sizes are tiny, and threads that
# wait for each other cost more than they do; the second core runs MLX's part beside torch's, which is printed when it is done.
set -u
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=true
# once, before two suites want it; without a network their tests of it skip
python -c "import convert; convert.default_model()" >/dev/null 2>&1
status=0
log=$(mktemp)
trap 'kill ${mlx:-} 2>/dev/null; rm -f "$log"' EXIT
NANOLONG_BACKEND=mlx python -m pytest "$@" >"$log" 2>&1 &
mlx=$!
echo "== torch"
NANOLONG_BACKEND=torch python -m pytest "$@" || status=1
if python -c "import triton" 2>/dev/null; then
    echo "== triton, interpreted"
    TRITON_INTERPRET=1 NANOLONG_BACKEND=torch python -m pytest tests/test_triton.py tests/test_rotate.py tests/test_engines.py -k "triton and not bfloat16" "$@" || status=1
    TRITON_INTERPRET=1 NANOLONG_BACKEND=torch python -m pytest tests/test_step.py tests/test_frozen.py tests/test_gpu_memory.py "$@" || status=1
    TRITON_INTERPRET=1 NANOLONG_BACKEND=torch python -m pytest tests/test_replayed.py -k frozen "$@" || status=1
fi
wait $mlx || status=1
echo "== mlx"
cat "$log"
exit $status
