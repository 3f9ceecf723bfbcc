#!/usr/bin/env bash
# Table A1: one factor at a time away from Prologue-Base, each with an AR-B of its own. ONLY="k4 tau1" takes some of the rows;
# flags given here go to stage 1, those in AR_FLAGS to stage 2.
set -e
cd "$(dirname "$0")/.."
source recipes/common.sh

row() {  # name, then the flags that differ
    local name=$1
    shift
    [[ " ${ONLY:-$name} " == *" $name "* ]] || return 0
    $LAUNCH train_stage1.py --size B --data "$DATA/train" --compile --out "$RUNS/$name" "$@"
    tokens "$name"
    $LAUNCH train_ar.py --size B --compile --out "$RUNS/$name" $AR_FLAGS
}
row p256  --prologue_codebook_size 256 "$@"
row p4096 --prologue_codebook_size 4096 "$@"
row k4    --num_prologue 4 "$@"
row k64   --num_prologue 64 "$@"
row tau001 --tau 0.01 "$@"
row tau1  --tau 1 "$@"
row ce1   --ce_weight 1 "$@"
row ce6   --ce_weight 6 "$@"
row drop0 --visual_dropout 0 "$@"
row drop1 --visual_dropout 1 "$@"
