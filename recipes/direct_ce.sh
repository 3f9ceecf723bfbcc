#!/usr/bin/env bash
# Fig. 5: cross-entropy on the visual tokens themselves, through Prob-STE with tau = 1, lambda swept.
set -e
cd "$(dirname "$0")/.."
source recipes/common.sh

for layout in ${LAYOUTS:-1d 2d}; do
    for ce_weight in ${CE_WEIGHTS:-0.03 0.1 0.3 1 3}; do
        $LAUNCH train_stage1.py --size B --layout "$layout" --direct_ce --ce_weight "$ce_weight" \
            --data "$DATA/train" --compile --out "$RUNS/direct_${layout}_$ce_weight" "$@"
    done
done
