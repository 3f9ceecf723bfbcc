#!/usr/bin/env bash
# Stages 1.5 and 2: the tokens of a tokenizer whose stage 1 is done, or that was downloaded, and an
# AR model on them, the latter into $RUNS/ROW. Tokens that are up to date stay.
#
#   recipes/ar.sh b_b --micro_batch_size 32       # flags go to train_ar.py and win over the row's
#
# Cost by estimate, nothing of it was run: GB on each of 8 cards, plus 1 for CUDA, in brackets with
# --gradient_checkpointing; hours of the whole row at 40% of the bf16 peak, which is low for the
# head in TF32.
#   row      images a card   at a time         GB    8 H100   8 A100    the paper
#   b_b                 64          64   14 (7.5)       7.8       25    13 on 8 A100
#   b_l                 64          64   29              25       80    25 on 8 A100
#   b_xl                64          64   47  (19)        51      161
#   l_b                256         256   35  (10)        14       45
#   l_l                256          64   26              49      154
#   l_xl               256          64   46  (19)       118      374    25 on 32 A100
# On Base tokenizers 400 epochs, 2e-4 to 5e-5, as the paper says; it names no warmup, and 62,500
# steps (25 epochs) are our choice: the authors' script has as many steps of 2,048 images (100
# epochs) in all rows. On Large ones 800 epochs, 4e-4 to 1e-5, as the paper says and as the script
# has for all rows, warmup included. L-XL has 150 more in the paper; that the learning rate falls
# over all 950 is our reading.
source "$(dirname "$0")/common.sh"
row=${1:?give a row, such as b_b}
shift
large=(--steps 500000 --batch_size 2048 --lr 4e-4 --min_lr 1e-5)
case $row in  # from: the tokenizer's row
    b_b)     from=prologue_b change=() ;;
    b_l)     from=prologue_b change=(--size L) ;;
    b_xl)    from=prologue_b change=(--size XL) ;;
    l_b)     from=prologue_l change=("${large[@]}") ;;
    l_l)     from=prologue_l change=("${large[@]}" --size L --micro_batch_size 64
                 --save_every 2500) ;;
    l_xl)    from=prologue_l change=("${large[@]}" --size XL --micro_batch_size 64 --steps 593750
                 --save_every 1000 --weight_decay 0.05) ;;  # 0.03 in the authors' script
    2d_l_b)  from=2d_l change=("${large[@]}") ;;
    l_b_vgg | l_b_16k) from=$row change=("${large[@]}") ;;
    1d | 2d | post | p256 | p4096 | k4 | k64 | tau001 | tau1 | ce1 | ce6 | drop0 | drop1 | direct_*)
             from=$row change=() ;;
    one_gpu) from=$row change=(--steps 125000 --warmup 8000 --micro_batch_size 64) ;;
    *)       echo "$row is not a row of $0" >&2; exit 1 ;;
esac

from=$RUNS/$from
finished "$from"
launch pretokenize.py --data "$DATA/train" --crop ten --batch_size 640 --out "$from"
launch train_ar.py --out "$RUNS/$row" \
    --tokenizer "$from/tokenizer.safetensors" --codes "$from/codes.safetensors" \
    --size B --dropout 0.1 --weight_decay 0.03 --steps 1000000 --batch_size 512 \
    --lr 2e-4 --min_lr 5e-5 --warmup 62500 --hold 0 \
    --log_every 100 --eval_every 5000 --save_every 5000 --compile --resume "${change[@]}" "$@"
