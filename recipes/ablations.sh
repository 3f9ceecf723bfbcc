#!/usr/bin/env bash
# Table A1: one factor at a time away from Prologue B-B. Each row has a tokenizer and an AR-B of its
# own, in the folder of its name. ONLY="k4 tau1" takes some of the rows; flags given here go to
# stage 1, those in AR_FLAGS to stage 2. The table's other rows are ar_b_b, ar_post and
# prologue_onestage.
#
# Both stages are as in prologue_b.sh and ar_b_b.sh, where it says what the authors' script has.
set -e
cd "$(dirname "$0")/.."
source recipes/common.sh

given=("$@")
row() {  # name, then the flags that differ
    local name=$1
    shift
    [[ " ${ONLY:-$name} " == *" $name "* ]] || return 0

    $LAUNCH train_stage1.py --out "$RUNS/$name" --data "$DATA/train" --compile \
        --size B --layout prologue --crop random --flip \
        --tau 0.1 --ar_size S --ce_weight 3 --visual_dropout 0.5 \
        --perceptual vgg --gan_weight 0.1 --gan_channels 64 --lecam_weight 0.001 \
        --r1_weight 0.01 --r1_every 25 \
        --steps 750000 --batch_size 256 --lr 1e-4 --min_lr 3e-5 --warmup 20000 --hold 100000 \
        --ema_half_life 1000 --log_every 100 --eval_every 5000 --save_every 5000 \
        "$@" "${given[@]}"
    tokens "$name"
    $LAUNCH train_ar.py --out "$RUNS/$name" --compile \
        --size B --dropout 0.1 --class_dropout 0.1 \
        --steps 1000000 --batch_size 512 --lr 2e-4 --min_lr 5e-5 --warmup 62500 --hold 0 \
        --beta2 0.96 --weight_decay 0.03 --grad_clip 1 \
        --log_every 100 --eval_every 5000 --save_every 5000 $AR_FLAGS
}

row p256   --prologue_codebook_size 256
row p4096  --prologue_codebook_size 4096
row k4     --num_prologue 4
row k64    --num_prologue 64
row tau001 --tau 0.01
row tau1   --tau 1
row ce1    --ce_weight 1
row ce6    --ce_weight 6
row drop0  --visual_dropout 0
row drop1  --visual_dropout 1
