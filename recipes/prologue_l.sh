#!/usr/bin/env bash
# Prologue-Large, the tokenizer of Tables 2, A2 and A3: as Base, but the decoder is 24 x 1024, there
# are 4,096 visual codes, and the perceptual loss is that of ConvNeXt-S.
#
# 200 epochs (1M steps at batch 256) to 1e-5: here the paper and the authors' script agree.
set -e
cd "$(dirname "$0")/.."
source recipes/common.sh

$LAUNCH train_stage1.py --out "$RUNS/prologue_l" --data "$DATA/train" --compile \
    --size L --layout prologue --crop random --flip \
    --tau 0.1 --ar_size S --ce_weight 3 --visual_dropout 0.5 \
    --perceptual convnext --gan_weight 0.1 --gan_channels 64 --lecam_weight 0.001 \
    --r1_weight 0.01 --r1_every 25 \
    --steps 1000000 --batch_size 256 --lr 1e-4 --min_lr 1e-5 --warmup 20000 --hold 100000 \
    --ema_half_life 1000 --log_every 100 --eval_every 5000 --save_every 5000 "$@"
