#!/usr/bin/env bash
# Prologue-Base, the tokenizer of Tables 1, 2, A1 and A3: 16 prologue tokens of 1,024 codes, 256
# visual tokens of 16,384 codes, LPIPS-VGG.
#
# 150 epochs (750k steps at batch 256) to 3e-5, as the paper says. The authors' script trains 200
# epochs to 1e-5. The paper does not say how long the warmup is and mentions no hold: both are those
# of the script, in all recipes of stage 1.
set -e
cd "$(dirname "$0")/.."
source recipes/common.sh

$LAUNCH train_stage1.py --out "$RUNS/prologue_b" --data "$DATA/train" --compile \
    --size B --layout prologue --crop random --flip \
    --tau 0.1 --ar_size S --ce_weight 3 --visual_dropout 0.5 \
    --perceptual vgg --gan_weight 0.1 --gan_channels 64 --lecam_weight 0.001 \
    --r1_weight 0.01 --r1_every 25 \
    --steps 750000 --batch_size 256 --lr 1e-4 --min_lr 3e-5 --warmup 20000 --hold 100000 \
    --ema_half_life 1000 --log_every 100 --eval_every 5000 --save_every 5000 "$@"
