#!/usr/bin/env bash
# Fig. 5: cross-entropy on the visual tokens themselves, through Prob-STE with tau = 1. Each layout
# and lambda has a tokenizer (left half: rFID) and an AR-B (right half: gFID without CFG) of its own
# in the folder direct_LAYOUT_LAMBDA. LAYOUTS="2d" and CE_WEIGHTS="0.03 3" take some of them. Flags
# given here go to stage 1, those in AR_FLAGS to stage 2.
#
# lambda = 0 of both curves is ar_1d and ar_2d; the prologue's curve is ce1, ar_b_b and ce6, see
# ablations.sh. Schedules as in tokenizer_2d.sh and ar_2d.sh. The paper's text gives results at
# 0.03, 0.3 and 3; the authors published no script of these runs.
set -e
cd "$(dirname "$0")/.."
source recipes/common.sh

for layout in ${LAYOUTS:-1d 2d}; do
    for ce_weight in ${CE_WEIGHTS:-0.03 0.1 0.3 1 3}; do
        name=direct_${layout}_$ce_weight
        $LAUNCH train_stage1.py --out "$RUNS/$name" --data "$DATA/train" --compile \
            --size B --layout "$layout" --crop random --flip \
            --direct_ce --tau 1 --ar_size S --ce_weight "$ce_weight" \
            --perceptual vgg --gan_weight 0.1 --gan_channels 64 --lecam_weight 0.001 \
            --r1_weight 0.01 --r1_every 25 \
            --steps 750000 --batch_size 256 --lr 1e-4 --min_lr 3e-5 --warmup 20000 --hold 100000 \
            --ema_half_life 1000 --log_every 100 --eval_every 5000 --save_every 5000 "$@"
        tokens "$name"
        $LAUNCH train_ar.py --out "$RUNS/$name" --compile \
            --size B --dropout 0.1 --class_dropout 0.1 \
            --steps 1000000 --batch_size 512 --lr 2e-4 --min_lr 5e-5 --warmup 62500 --hold 0 \
            --beta2 0.96 --weight_decay 0.03 --grad_clip 1 \
            --log_every 100 --eval_every 5000 --save_every 5000 $AR_FLAGS
    done
done
