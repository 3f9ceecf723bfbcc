# What the recipes share; each variable can be set from outside. By default one node of 8 GPUs. On
# several nodes run the recipe on each, with the name of the first for HOST:
#
#   export LAUNCH="torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d
#       --rdzv_endpoint HOST:29500 --rdzv_id 1"
#
# and on one GPU with LAUNCH=python. DATA holds train/ (class folders) and val/; Kaggle's zip is
# read as it is. All nodes must see RUNS, the folder of everything that is written.
#
# Flags given to a recipe go to its training script and win over its own: --resume goes on with a
# run that was stopped, --micro_batch_size 16 or --gradient_checkpointing save memory.
DATA=${DATA:-imagenet.zip/ILSVRC/Data/CLS-LOC}
LAUNCH=${LAUNCH:-torchrun --nproc_per_node 8}
RUNS=${RUNS:-runs}

# A trainer told to stop saves and exits with 0; without this the recipe's next command would start.
trap "exit 1" INT TERM

# tokens NAME: the ten-crop tokens of the tokenizer in $RUNS/NAME, unless they are there already
tokens() {
    if [ "$RUNS/$1/tokenizer.safetensors" -nt "$RUNS/$1/codes.npz" ]; then
        $LAUNCH pretokenize.py --data "$DATA/train" --crops ten --batch_size 2560 --out "$RUNS/$1"
    fi
}
