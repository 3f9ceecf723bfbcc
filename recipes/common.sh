#!/usr/bin/env bash
# shellcheck disable=SC2086  # LAUNCH and FID_FLAGS are several words
# What the recipes share; each variable can be set from outside. DATA holds train/ (class folders)
# and val/ and may lie in a zip: Kaggle's is read as it is. RUNS is where runs go. Relative paths
# mean the folder you are in. LAUNCH starts a script; on one GPU it is python, and on 4 nodes that
# all see RUNS, the first of which is HOST, start the recipe on each with
# LAUNCH="torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500"
set -eo pipefail
trap 'exit 1' INT TERM  # ends the recipe, not only its command
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DATA=${DATA:-imagenet.zip/ILSVRC/Data/CLS-LOC}
RUNS=${RUNS:-runs}
LAUNCH=${LAUNCH:-torchrun --standalone --nproc_per_node 8}
launch() { $LAUNCH "$ROOT/$1" "${@:2}"; }
fid() { python "$ROOT/fid.py" "$@" $FID_FLAGS | tr -d "\n" && echo; }  # JSON in one line
