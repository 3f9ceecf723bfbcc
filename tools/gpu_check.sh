#!/usr/bin/env bash
# What only a GPU can tell, in eight minutes on one card, with nothing to download: test_gpu.py, and
# bench.py at the size of the recipes. All that is printed is appended to $OUT/gpu.txt as it comes:
#
#   bash tools/gpu_check.sh                     # OUT=results
#   OUT=/tmp DEV=cpu bash tools/gpu_check.sh    # a dry run with tiny sizes
#
# PYTHON names the interpreter, BUDGET the seconds in all; what no longer fits is skipped.
cd "$(dirname "$0")/.." || exit
OUT=${OUT:-results}
DEV=${DEV:-cuda}
PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-480}
export TEST_DEVICE=$DEV PYTHONUNBUFFERED=1
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-/tmp/inductor}
mkdir -p "$OUT"

say() { echo "$*" | tee -a "$OUT/gpu.txt"; }

# stage LIMIT COMMAND...: for at most LIMIT seconds
stage() {
    local limit=$1 left=$((BUDGET - SECONDS)) began=$SECONDS
    shift
    [ "$limit" -gt $left ] && limit=$left
    if [ "$limit" -lt 15 ]; then
        say "== skipped: $*"
        return
    fi
    say "== $* (at most $limit s)"
    timeout -k 5 "$limit" "$@" 2>&1 | tee -a "$OUT/gpu.txt"
    say "-- exit ${PIPESTATUS[0]} after $((SECONDS - began)) s"
}

bench() { stage "$1" "$PYTHON" tools/bench.py --device "$DEV" "${@:2}"; }

say "# $(date -u +%FT%TZ), commit $(git rev-parse --short HEAD 2> /dev/null), $DEV"
test_args=(-q -p no:cacheprovider --tb=short --show-capture=no -rfEs --durations=10)
if [ "$DEV" = cuda ]; then
    say "$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader)"
    "$PYTHON" -c "import xdist" 2> /dev/null && test_args+=(-n 6 --dist worksteal)
fi
stage 130 env OMP_NUM_THREADS=2 "$PYTHON" -m pytest "${test_args[@]}" tests/test_gpu.py

if [ "$DEV" = cuda ]; then
    bench 90 stage1 --size B --compile --profile --num_workers 12
    bench 45 ar --size B --compile --profile
    bench 90 sample plain --size B --batch_size 64 1 256 --compile
    bench 45 ar --size XL --compile
    bench 40 stage1 ar --size B --profile
    bench 40 sample --size B --compile --profile --repeat 2
    bench 25 sample --size B
else
    bench 120 stage1 ar sample plain data --size tiny --batch_size 4 --repeat 2 --profile
    bench 180 stage1 ar sample --size tiny --batch_size 4 --repeat 2 --compile
fi
say "# done after $SECONDS s"
