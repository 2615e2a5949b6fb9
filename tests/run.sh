#!/usr/bin/env bash
# The suite, once per backend, and the Triton kernels interpreted. One thread a framework: the sizes are tiny, and threads that
# wait for each other cost more than they do; the second core runs MLX's part and some of the kernels beside torch's, printed when done.
set -u
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=true
# once, before two suites want it; without a network their tests of it skip
python -c "import convert; convert.default_model()" >/dev/null 2>&1
triton=$(python -c "import triton" 2>/dev/null && echo 1)
suite() {
    echo "== $1"
    shift
    env "$@" || status=1
}
interpreted() {
    suite "triton, interpreted" TRITON_INTERPRET=1 NANOLONG_BACKEND=torch python -m pytest "$@"
}
status=0
log=$(mktemp)
trap 'pkill -P ${beside:-0}; kill ${beside:-} 2>/dev/null; rm -f "$log"' EXIT
(
    trap - EXIT
    suite mlx NANOLONG_BACKEND=mlx python -m pytest "$@"
    if [ "$triton" ]; then
        interpreted tests/test_step.py "$@"
        interpreted tests/test_replayed.py -k frozen "$@"
    fi
    exit $status
) >"$log" 2>&1 &
beside=$!
suite torch NANOLONG_BACKEND=torch python -m pytest "$@"
if [ "$triton" ]; then
    interpreted tests/test_triton.py tests/test_rotate.py tests/test_engines.py -k "triton and not bfloat16" "$@"
    interpreted tests/test_frozen.py tests/test_gpu_memory.py "$@"
fi
wait $beside || status=1
cat "$log"
exit $status
