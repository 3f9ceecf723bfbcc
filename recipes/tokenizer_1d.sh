#!/usr/bin/env bash
# The 1D tokenizer of Tables 1 and 3 and of Fig. 5: 256 learned queries carry the image, there is no
# prologue and no AR model in stage 1.
#
# 150 epochs (750k steps at batch 256) to 3e-5, as the paper says; to 1e-5 in the authors' script.
set -e
cd "$(dirname "$0")/.."
source recipes/common.sh

$LAUNCH train_stage1.py --out "$RUNS/tokenizer_1d" --data "$DATA/train" --compile \
    --size B --layout 1d --crop random --flip \
    --perceptual vgg --gan_weight 0.1 --gan_channels 64 --lecam_weight 0.001 \
    --r1_weight 0.01 --r1_every 25 \
    --steps 750000 --batch_size 256 --lr 1e-4 --min_lr 3e-5 --warmup 20000 --hold 100000 \
    --ema_half_life 1000 --log_every 100 --eval_every 5000 --save_every 5000 "$@"
