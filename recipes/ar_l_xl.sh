#!/usr/bin/env bash
# Prologue L-XL of Table 2: AR-XL, 32 x 1280.
#
# 950 epochs (593,750 steps at batch 2048), 4e-4 to 1e-5, weight decay 0.05: the paper trains it 150
# epochs longer than L-B and L-L. That the learning rate falls over all 950 is our reading. The
# authors' script trains 800 epochs with weight decay 0.03; the warmup is taken from there.
set -e
cd "$(dirname "$0")/.."
source recipes/common.sh

tokens prologue_l
$LAUNCH train_ar.py --out "$RUNS/ar_l_xl" --compile \
    --tokenizer "$RUNS/prologue_l/tokenizer.safetensors" \
    --codes "$RUNS/prologue_l/codes.npz" \
    --size XL --dropout 0.1 --class_dropout 0.1 \
    --steps 593750 --batch_size 2048 --lr 4e-4 --min_lr 1e-5 --warmup 62500 --hold 0 \
    --beta2 0.96 --weight_decay 0.05 --grad_clip 1 \
    --log_every 100 --eval_every 5000 --save_every 5000 "$@"
