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
[[ $DRY || -d $dir ]] || { echo "$dir is no folder" >&2; exit 1; }
copy=$dir/watch  # what is measured: the run may save again meanwhile

saved() {  # STATE FILE: a whole save that is not measured yet; trainers save the state last
    [[ $1 -nt $copy/$2 && -e $dir/$2 && ! $dir/$2 -nt $1 ]]
}
take() {  # STATE FILE...
    mkdir -p "$copy"
    cp "${@:2}" "$copy"
    step=$(value_of step "$1")
}
add() { sed "s/{/{\"step\": $step, /" | tee -a "$dir/watch.jsonl"; }
rfid() { fid "$DATA/val" --tokenizer "$copy/tokenizer.safetensors"; }
gfid() {
    launch sample.py --out "$copy" --num_samples "${NUM:-10000}" "$@" >&4 &&
        fid "$copy/samples.npz" ${REFERENCE:+"$REFERENCE"}
}
if [[ $DRY ]]; then
    rfid
    gfid "${@:2}"
    exit
fi

while sleep 60; do
    state=$dir/train_stage1.pt
    if saved "$state" tokenizer.safetensors; then
        take "$state" "$dir/tokenizer.safetensors"
        rfid | add
    fi
    [[ -e $dir/train_ar.pt ]] && state=$dir/train_ar.pt  # else OneStage's
    if saved "$state" ar.safetensors; then
        take "$state" "$dir"/{tokenizer,ar}.safetensors
        if ! gfid "${@:2}" | add; then  # such as a pair of which one half was just replaced
            echo "$dir: step $step could not be scored, again in a minute" >&2
            rm "$copy/ar.safetensors"
        fi
    fi
done
