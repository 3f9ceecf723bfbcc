#!/usr/bin/env bash
# gFID, IS, precision and recall as in Tables 1 and 2: 50,000 samples with and without guidance
# against ADM's reference.
#
#   recipes/evaluate.sh TOKENIZER AR PRESET
#   recipes/evaluate.sh runs/k4/tokenizer.safetensors runs/k4/ar.safetensors k4
#   recipes/evaluate.sh runs/prologue_b/tokenizer.safetensors runs/ar_b_b/ar.safetensors \
#       prologue-b-b
#
# It runs on one node. Further flags go to sample.py, those in FID_FLAGS to fid.py. Samples (10 GB a
# set) and score.json stand beside AR, in cfg_50000 and no_cfg_50000. It can be stopped and started
# again: samples and scores that are newer than the models are kept. To draw with other flags,
# remove the folders.
set -e
cd "$(dirname "$0")/.."
source recipes/common.sh

: "${3?give TOKENIZER AR PRESET}"
tokenizer=$1
ar=$2
preset=$3
shift 3
num=${NUM:-50000}
reference=${REFERENCE:-VIRTUAL_imagenet256_labeled.npz}
if [ ! -e "$reference" ]; then
    echo "$reference does not exist; REFERENCE names the file of ADM's reference" >&2
    exit 1
fi

for mode in cfg no_cfg; do
    out=$(dirname "$ar")/${mode}_$num
    score=$out/score.json
    flags=(--preset "$preset" --num_samples "$num" --batch_size "${BATCH:-2048}")
    if [ $mode = no_cfg ]; then
        flags+=(--no_cfg)
    fi
    if [[ $score -nt $tokenizer && $score -nt $ar ]]; then
        echo "kept: $score"
        continue
    fi
    if [[ ! $out/samples.npz -nt $tokenizer || ! $out/samples.npz -nt $ar ]]; then
        $LAUNCH sample.py --tokenizer "$tokenizer" --ar "$ar" --out "$out" "${flags[@]}" "$@"
    fi
    $LAUNCH fid.py "$out/samples.npz" "$reference" --json $FID_FLAGS > "$out/score.tmp"
    mv "$out/score.tmp" "$score"
    cat "$score"
done
