#!/usr/bin/env bash
# Tables 1 and 2: 50,000 samples with and without guidance, and their gFID against ADM's reference.
#
#   recipes/evaluate.sh TOKENIZER AR PRESET          e.g. runs/prologue_b/tokenizer.safetensors runs/ar_b_b/ar.safetensors prologue-b-b
set -e
cd "$(dirname "$0")/.."
source recipes/common.sh

: "${3?give TOKENIZER AR PRESET}"
pair=(--tokenizer "$1" --ar "$2" --preset "$3" --num_samples "${NUM:-50000}" --batch_size "${BATCH:-2048}")
shift 3
for mode in "" --no_cfg; do
    $LAUNCH sample.py "${pair[@]}" $mode --out "$RUNS/samples$mode" "$@"
    $LAUNCH fid.py "$RUNS/samples$mode/samples.npz" "${REFERENCE:-VIRTUAL_imagenet256_labeled.npz}" --json
done
