#!/usr/bin/env bash
# AR-B (12 x 768) on the Large 2D tokenizer: the 2D baseline L-B of Table A3.
#
# 800 epochs (500k steps at batch 2048), 4e-4 to 1e-5, as the paper says of the AR models beside the
# Large tokenizer; the warmup is that of the authors' script.
set -e
cd "$(dirname "$0")/.."
source recipes/common.sh

tokens tokenizer_2d_l
$LAUNCH train_ar.py --out "$RUNS/ar_2d_l_b" --compile \
    --tokenizer "$RUNS/tokenizer_2d_l/tokenizer.safetensors" \
    --codes "$RUNS/tokenizer_2d_l/codes.npz" \
    --size B --dropout 0.1 --class_dropout 0.1 \
    --steps 500000 --batch_size 2048 --lr 4e-4 --min_lr 1e-5 --warmup 62500 --hold 0 \
    --beta2 0.96 --weight_decay 0.03 --grad_clip 1 \
    --log_every 100 --eval_every 5000 --save_every 5000 "$@"
