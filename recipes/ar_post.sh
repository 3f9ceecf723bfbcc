#!/usr/bin/env bash
# AR-B (12 x 768) on Prologue-Post: Tables 1 and A1.
#
# 400 epochs (1M steps at batch 512), 2e-4 to 5e-5, as the paper says of the AR models beside the
# Base tokenizer. It mentions no warmup: this is the one of the authors' script, which trains all AR
# models for 800 epochs (500k steps at batch 2048), 4e-4 to 1e-5.
set -e
cd "$(dirname "$0")/.."
source recipes/common.sh

tokens prologue_post
$LAUNCH train_ar.py --out "$RUNS/ar_post" --compile \
    --tokenizer "$RUNS/prologue_post/tokenizer.safetensors" \
    --codes "$RUNS/prologue_post/codes.npz" \
    --size B --dropout 0.1 --class_dropout 0.1 \
    --steps 1000000 --batch_size 512 --lr 2e-4 --min_lr 5e-5 --warmup 62500 --hold 0 \
    --beta2 0.96 --weight_decay 0.03 --grad_clip 1 \
    --log_every 100 --eval_every 5000 --save_every 5000 "$@"
