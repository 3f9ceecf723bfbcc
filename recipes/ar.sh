#!/usr/bin/env bash
# Stages 1.5 and 2: the tokens of a tokenizer and an AR model on them, the latter into $RUNS/ROW.
#
#   recipes/ar.sh b_b --micro_batch_size 32       # flags go to train_ar.py and win over the row's
#
# GB on each of 8 cards by estimate: state (22 bytes a parameter: weights, gradients, Adam, DDP's
# buckets, bf16 copies; no EMA), compiled blocks (52 KB a token in XL, 42 in L, 31 in B), logits
# (4 x fp32, 17,409 wide on Base tokenizers, 5,121 on Large ones).
#   row              images a card   at a time   state   blocks   logits   sum   the paper's cards
#   AR-B on Base                64          64       3        7        5    15                   8
#   AR-B on Large              256         256       2       26        6    34
#   b_l                         64          64       8       17        5    30
#   b_xl                        64          64      15       29        5    49
#   l_l                        256          64       7       17        1    25                   8
#   l_xl                       256          64      14       29        1    44                  32
# On Base tokenizers 400 epochs, 2e-4 to 5e-5, as the paper says; on Large ones 800, 4e-4 to 1e-5,
# as it says and as the authors' script has for all rows, warmup included. L-XL has 150 more in the
# paper; that the learning rate falls over all 950 is our reading.
source "$(dirname "$0")/common.sh"
row=${1:?give a row, such as b_b}
shift
large=(--steps 500000 --batch_size 2048 --lr 4e-4 --min_lr 1e-5)
case $row in  # from: the tokenizer's row
    b_b)     from=prologue_b change=() ;;
    b_l)     from=prologue_b change=(--size L) ;;
    b_xl)    from=prologue_b change=(--size XL) ;;
    l_b)     from=prologue_l change=("${large[@]}") ;;
    l_l)     from=prologue_l change=("${large[@]}" --size L --micro_batch_size 64) ;;
    l_xl)    from=prologue_l change=("${large[@]}" --size XL --micro_batch_size 64
                 --steps 593750 --weight_decay 0.05) ;;  # 0.03 in the authors' script
    2d_l_b)  from=2d_l change=("${large[@]}") ;;
    l_b_vgg | l_b_16k) from=$row change=("${large[@]}") ;;
    1d | 2d | post | p256 | p4096 | k4 | k64 | tau001 | tau1 | ce1 | ce6 | drop0 | drop1 | direct_*)
             from=$row change=() ;;
    one_gpu) from=$row change=(--steps 125000 --warmup 8000 --micro_batch_size 64) ;;
    *)       echo "$row is not a row of $0" >&2; exit 1 ;;
esac

from=$RUNS/$from
[[ $from/codes.safetensors -nt $from/tokenizer.safetensors ]] ||
    launch pretokenize.py --data "$DATA/train" --crop ten --batch_size 640 --out "$from"
launch train_ar.py --out "$RUNS/$row" \
    --tokenizer "$from/tokenizer.safetensors" --codes "$from/codes.safetensors" \
    --size B --dropout 0.1 --beta2 0.96 --weight_decay 0.03 --steps 1000000 --batch_size 512 \
    --lr 2e-4 --min_lr 5e-5 --warmup 62500 --hold 0 \
    --log_every 100 --eval_every 5000 --save_every 5000 --compile --resume "${change[@]}" "$@"
