#!/usr/bin/env bash
# ImageNet, or any folder DATA with train/ and val/, at 128 x 128 on one GPU of 24 GB: a tokenizer of
# half of Base's depth, 16 prologue tokens of 1,024 codes, 256 visual tokens of 4,096 codes, and AR-B
# on them.
#
# Not from the paper, and not run yet: the settings are those of prologue_b.sh and ar_b_b.sh, with
# fewer images (40 epochs of ImageNet for the tokenizer, 50 for the AR model). tools/cost.py says
# what it costs on paper. A card without bf16 (before Ampere) needs smaller micro-batches.
#
# Started again it goes on where it was stopped. Flags given to it go to train_stage1.py, those in
# AR_FLAGS to train_ar.py.
set -e
cd "$(dirname "$0")/.."
LAUNCH=${LAUNCH:-python}
source recipes/common.sh

$LAUNCH train_stage1.py --out "$RUNS/one_gpu" --data "$DATA/train" --compile \
    --size S --layout prologue --crop random --flip \
    --tau 0.1 --ar_size S --ce_weight 3 --visual_dropout 0.5 \
    --perceptual vgg --gan_weight 0.1 --gan_channels 64 --lecam_weight 0.001 \
    --r1_weight 0.01 --r1_every 25 \
    --steps 200000 --batch_size 256 --micro_batch_size 64 --lr 1e-4 --min_lr 3e-5 \
    --warmup 5000 --hold 30000 \
    --ema_half_life 1000 --log_every 100 --eval_every 5000 --save_every 5000 --resume "$@"

tokens one_gpu
$LAUNCH train_ar.py --out "$RUNS/one_gpu" --compile \
    --size B --dropout 0.1 --class_dropout 0.1 \
    --steps 125000 --batch_size 512 --micro_batch_size 64 --lr 2e-4 --min_lr 5e-5 \
    --warmup 8000 --hold 0 \
    --beta2 0.96 --weight_decay 0.03 --grad_clip 1 \
    --log_every 100 --eval_every 5000 --save_every 5000 --resume $AR_FLAGS

$LAUNCH sample.py --out "$RUNS/one_gpu" --data "$DATA/val" --num 0
