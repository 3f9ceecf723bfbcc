#!/usr/bin/env bash
# Table A1, or the rows that are named: a tokenizer and an AR-B of its own for each, in $RUNS/ROW.
# The table's other rows are prologue_b, post, onestage in stage1.sh and b_b, post in ar.sh.
# STAGE1_FLAGS and AR_FLAGS go to the trainers.
#
#   recipes/ablations.sh l_b_vgg l_b_16k direct_{1d,2d}_{0.03,0.1,0.3,1,3}      # Table A2, Fig. 5
source "$(dirname "$0")/common.sh"
[[ $# -gt 0 ]] || set -- p256 p4096 k4 k64 tau001 tau1 ce1 ce6 drop0 drop1

# shellcheck disable=SC2086  # several flags
for row in "$@"; do
    "$ROOT/recipes/stage1.sh" "$row" $STAGE1_FLAGS
    "$ROOT/recipes/ar.sh" "$row" $AR_FLAGS
done
