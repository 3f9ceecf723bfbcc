#!/usr/bin/env bash
# Scores a run while it trains, on a GPU of its own: gFID of NUM samples of each AR model saved in
# DIR, rFID of each tokenizer that stage 1 saves there. Each is a line of DIR/watch.jsonl.
#
#   export CUDA_VISIBLE_DEVICES=7 REFERENCE=VIRTUAL_imagenet256_labeled.npz
#   recipes/watch.sh runs/b_b --preset prologue-b-b --no_cfg            # flags of sample.py
#   DATA=data/fashion_mnist.zip NUM=2000 recipes/watch.sh out           # the demo
LAUNCH=${LAUNCH:-python}
source "$(dirname "$0")/common.sh"
dir=${1:?give the folder of a run}
copy=$dir/watch  # what is measured: the run may save again meanwhile
mkdir -p "$copy"

take() {  # STATE of a trainer, which it saves right after the weights, and these FILEs
    cp "${@:2}" "$copy"
    step=$(python -c "import sys, torch; print(torch.load(sys.argv[1], 'cpu', mmap=True)['step'])" \
        "$1")
}
add() { sed "s/{/{\"step\": $step, /" | tee -a "$dir/watch.jsonl"; }

while sleep 60; do
    if [[ $dir/train_stage1.pt -nt $copy/tokenizer.safetensors ]]; then
        take "$dir/train_stage1.pt" "$dir/tokenizer.safetensors"
        fid "$DATA/val" --tokenizer "$copy/tokenizer.safetensors" | add
    fi
    state=$dir/train_ar.pt
    [[ -e $state ]] || state=$dir/train_stage1.pt  # OneStage
    if [[ -e $dir/ar.safetensors && $state -nt $copy/ar.safetensors ]]; then
        take "$state" "$dir"/{tokenizer,ar}.safetensors
        launch sample.py --out "$copy" --num_samples "${NUM:-10000}" "${@:2}"
        fid "$copy/samples.npz" ${REFERENCE:+"$REFERENCE"} | add
    fi
done
