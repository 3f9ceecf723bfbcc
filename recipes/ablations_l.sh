#!/usr/bin/env bash
# Table A2: another perceptual loss and a larger codebook for Prologue L-B. Each row has a tokenizer
# and an AR-B of its own, in the folder of its name. ONLY="l-b-vgg" takes one of the rows; flags
# given here go to stage 1, those in AR_FLAGS to stage 2. The table's other row is ar_l_b.
#
# Both stages are as in prologue_l.sh and ar_l_b.sh.
set -e
cd "$(dirname "$0")/.."
source recipes/common.sh

given=("$@")
row() {  # name, then the flags that differ
    local name=$1
    shift
    [[ " ${ONLY:-$name} " == *" $name "* ]] || return 0

    $LAUNCH train_stage1.py --out "$RUNS/$name" --data "$DATA/train" --compile \
        --size L --layout prologue --crop random --flip \
        --tau 0.1 --ar_size S --ce_weight 3 --visual_dropout 0.5 \
        --perceptual convnext --gan_weight 0.1 --gan_channels 64 --lecam_weight 0.001 \
        --r1_weight 0.01 --r1_every 25 \
        --steps 1000000 --batch_size 256 --lr 1e-4 --min_lr 1e-5 --warmup 20000 --hold 100000 \
        --ema_half_life 1000 --log_every 100 --eval_every 5000 --save_every 5000 \
        "$@" "${given[@]}"
    tokens "$name"
    $LAUNCH train_ar.py --out "$RUNS/$name" --compile \
        --size B --dropout 0.1 --class_dropout 0.1 \
        --steps 500000 --batch_size 2048 --lr 4e-4 --min_lr 1e-5 --warmup 62500 --hold 0 \
        --beta2 0.96 --weight_decay 0.03 --grad_clip 1 \
        --log_every 100 --eval_every 5000 --save_every 5000 $AR_FLAGS
}

row l-b-vgg --perceptual vgg
row l-b-16k --codebook_size 16384
