#!/usr/bin/env bash
# Stage 1: the tokenizers of Tables 1, 2, 3, A1, A2, A3 and Fig. 5, each into $RUNS/ROW.
#
#   recipes/stage1.sh prologue_b --micro_batch_size 16      # flags win over the row's
#   recipes/stage1.sh direct_2d_0.03                        # Fig. 5 at lambda = 0.03
#   DRY=1 recipes/stage1.sh 2d                              # only prints the command
#
# Epochs and last learning rate. A step here is two of the authors' script, where all end at 1e-5.
#   Base rows     150 to 3e-5   as the paper says; the script: 1d and 2d 150, prologue_b 200
#   Large rows    200 to 1e-5   as both say
#   onestage      200 to 1e-5   as the script says, the paper names none
#   post          260 to 1e-5   as the script says, the paper names none
# Warmup and hold are the script's, for the paper names none. The script has no command for 2d_l,
# Fig. 5 and the rows of Tables A1 and A2 below.
#
# Cost by estimate, nothing of it was run: GB on each of 8 cards with 32 images, plus 1 for CUDA,
# and hours at 40% of the bf16 peak, which is low for VGG, ConvNeXt and the head in TF32.
#   row            GB    8 H100   8 A100    the paper, 8 A100
#   prologue_b     21       8.7       28                   30
#   prologue_l     25        18       56                   44
#   l_b_vgg        30        19       61
#   2d             18       7.6       24
#   1d             24      12.8       41
#   onestage       24        14       45
#   post            8       4.7       15
# Without --compile prologue_b takes 24 and prologue_l 30, both 14 with --gradient_checkpointing.
source "$(dirname "$0")/common.sh"
row=${1:?give a row, such as prologue_b}
shift
# These and the command at the end are prologue_b; of two equal flags the last counts
losses=(--perceptual vgg --gan_weight 0.1 --gan_channels 64)
joint_ar=(--ar_size S --tau 0.1 --ce_weight 3 --visual_dropout 0.5)
large=(--size L --perceptual convnext --steps 1000000 --min_lr 1e-5)

case $row in
    prologue_b) change=() ;;
    prologue_l) change=("${large[@]}") ;;
    1d | 2d)    change=(--layout "$row") joint_ar=() ;;
    2d_l)       change=("${large[@]}" --layout 2d) joint_ar=() ;;
    post)       INIT=${INIT:-$RUNS/2d/tokenizer.safetensors} losses=()
                finished "$(dirname "$INIT")"
                change=(--layout post --init "$INIT" --steps 1300000 --min_lr 1e-5) ;;
    onestage)   # leaves ar.safetensors: there is no stage 2
                change=(--onestage --ar_size B --steps 1000000 --min_lr 1e-5) ;;
    # Table A1: one factor at a time
    p256)       change=(--prologue_codebook_size 256) ;;
    p4096)      change=(--prologue_codebook_size 4096) ;;
    k4)         change=(--num_prologue 4) ;;
    k64)        change=(--num_prologue 64) ;;
    tau001)     change=(--tau 0.01) ;;
    tau1)       change=(--tau 1) ;;
    ce1)        change=(--ce_weight 1) ;;
    ce6)        change=(--ce_weight 6) ;;
    drop0)      change=(--visual_dropout 0) ;;
    drop1)      change=(--visual_dropout 1) ;;
    # Table A2: another perceptual loss or codebook size for prologue_l
    l_b_vgg)    change=("${large[@]}" --perceptual vgg) ;;
    l_b_16k)    change=("${large[@]}" --codebook_size 16384) ;;
    # Fig. 5: cross-entropy on the visual tokens themselves; lambda 0 is 1d and 2d
    direct_1d_* | direct_2d_*)
                change=(--layout "${row:7:2}")
                joint_ar=(--direct_ce --ar_size S --tau 1 --ce_weight "${row##*_}") ;;
    one_gpu)    change=(--size S --steps 200000 --warmup 5000 --hold 30000 --micro_batch_size 64) ;;
    *)          echo "$row is not a row of $0" >&2; exit 1 ;;
esac

launch train_stage1.py --out "$RUNS/$row" --data "$DATA/train" --crop random --flip \
    --size B --layout prologue "${losses[@]}" "${joint_ar[@]}" --steps 750000 --batch_size 256 \
    --lr 1e-4 --min_lr 3e-5 --warmup 20000 --hold 100000 \
    --log_every 100 --eval_every 5000 --save_every 5000 --compile --resume "${change[@]}" "$@"
