#!/usr/bin/env bash
# Prologue-OneStage of Table A1: the full AR-B, which sees the classes, in the place of the small
# joint AR model. It leaves ar.safetensors: there is no stage 2.
#
# Steps and learning rate are those of Prologue-Base, as the paper names no others. The authors'
# script trains 200 epochs to 1e-5.
set -e
cd "$(dirname "$0")/.."
source recipes/common.sh

$LAUNCH train_stage1.py --out "$RUNS/prologue_onestage" --data "$DATA/train" --compile \
    --size B --layout prologue --crop random --flip \
    --tau 0.1 --onestage --ar_size B --ce_weight 3 --visual_dropout 0.5 \
    --perceptual vgg --gan_weight 0.1 --gan_channels 64 --lecam_weight 0.001 \
    --r1_weight 0.01 --r1_every 25 \
    --steps 750000 --batch_size 256 --lr 1e-4 --min_lr 3e-5 --warmup 20000 --hold 100000 \
    --ema_half_life 1000 --log_every 100 --eval_every 5000 --save_every 5000 "$@"
