#!/usr/bin/env bash
# shellcheck disable=SC2086  # LAUNCH and FID_FLAGS are several words
# What the recipes share; each variable can be set from outside. DATA holds train/ (class folders)
# and val/ and may lie in a zip: Kaggle's is read as it is. RUNS is where runs go. Relative paths
# mean the folder you are in. LAUNCH starts a script; on one GPU it is python, and on 4 nodes that
# all see RUNS, the first of which is HOST, start the recipe on each with
# LAUNCH="torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500"
#
# A recipe prints each command that it runs, and with DRY=1 only prints them. Trainers save their
# state every half-hour or sooner on H100s (--save_every); started again, a recipe goes on from it.
set -eo pipefail
trap 'exit 1' INT TERM  # ends the recipe, not only its command
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DATA=${DATA:-imagenet.zip/ILSVRC/Data/CLS-LOC}
RUNS=${RUNS:-runs}
LAUNCH=${LAUNCH:-torchrun --standalone --nproc_per_node 8}
exec 4>&1  # what the recipe prints, also from within a pipe

run() {
    { printf "%q " "$@"; echo; } >&4
    [[ $DRY ]] || "$@"
}
launch() { run $LAUNCH "$ROOT/$1" "${@:2}"; }
fid() { run python "$ROOT/fid.py" "$@" $FID_FLAGS | tr -d "\n" && echo ${DRY:+-n}; }  # one line

value_of() {  # NAME STATE of a trainer: its step, or the steps of the whole run
    python -c "import sys, torch
print(torch.load(sys.argv[2], 'cpu', mmap=True, weights_only=True)[sys.argv[1]])" "$@"
}
finished() {  # FOLDER: ends the recipe if stage 1 still has steps to go there
    local state=$1/train_stage1.pt step
    [[ $DRY || ! -e $state ]] && return  # without a state it came from elsewhere
    step=$(value_of step "$state")
    [[ $step = "$(value_of steps "$state")" ]] && return
    echo "$1: stage 1 has saved step $step, which is not its last: start its recipe again, or" \
        "move train_stage1.pt away to take the tokenizer as it is" >&2
    exit 1
}
