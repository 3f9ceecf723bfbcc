#!/usr/bin/env bash
# ImageNet, or any folder DATA with train/ and val/, at 128 x 128 on one GPU of 24 GB: a tokenizer
# of half of Base's depth, 16 prologue tokens of 1,024 codes, 256 visual tokens of 4,096, and AR-B.
# Not from the paper and not run yet: the row one_gpu is prologue_b and b_b on fewer images (40 and
# 50 epochs of ImageNet). By estimate stage 1 needs 15 GB and stage 2 12, plus 1 for CUDA, and both
# together 12.6 hours on an H100, 40 on an A100, at 40% of their bf16 peak. A card without bf16
# (before Ampere) needs smaller micro-batches.
# Flags go to train_stage1.py, those in AR_FLAGS to train_ar.py.
export LAUNCH=${LAUNCH:-python}
source "$(dirname "$0")/common.sh"
"$ROOT/recipes/stage1.sh" one_gpu "$@"
# shellcheck disable=SC2086  # several flags
"$ROOT/recipes/ar.sh" one_gpu $AR_FLAGS
launch sample.py --out "$RUNS/one_gpu" --num_samples 0
