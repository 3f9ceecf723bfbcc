#!/usr/bin/env bash
# Prologue-Post of Tables 1 and A1: a second encoder, 10 x 512, makes prologue tokens for the frozen
# 2D tokenizer INIT. Nothing is reconstructed, so there are no losses but the cross-entropy.
#
# Steps and learning rate are those of Base (750k to 3e-5), as the paper names no others. The
# authors' script trains 1.3M steps to 1e-5. To start from their 2D tokenizer, as it does:
#
#   python tools/released.py 2d --out runs/released/2d
#   INIT=runs/released/2d/tokenizer.safetensors recipes/prologue_post.sh
set -e
cd "$(dirname "$0")/.."
source recipes/common.sh

$LAUNCH train_stage1.py --out "$RUNS/prologue_post" --data "$DATA/train" --compile \
    --size B --layout post --init "${INIT:-$RUNS/tokenizer_2d/tokenizer.safetensors}" \
    --crop random --flip \
    --tau 0.1 --ar_size S --ce_weight 3 --visual_dropout 0.5 \
    --steps 750000 --batch_size 256 --lr 1e-4 --min_lr 3e-5 --warmup 20000 --hold 100000 \
    --ema_half_life 1000 --log_every 100 --eval_every 5000 --save_every 5000 "$@"
