# What the recipes share; each variable can be set from outside. One node of 8 GPUs is the default. On several nodes, run
# the recipe on each of them, with the first one's name for HOST:
#
#   LAUNCH="torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 --rdzv_id 1" recipes/prologue_b.sh
#
# The working directory must be on a file system that all nodes share; tokens and samples are written by all ranks into one file,
# so where that is NFS, run pretokenize.py and sample.py on one node.
#
# DATA holds train/ (class folders) and val/; Kaggle's zip is read as it is. Further flags given to a recipe go to its
# training script and win over those in the recipe: recipes/prologue_b.sh --resume --micro_batch_size 16
DATA=${DATA:-imagenet.zip/ILSVRC/Data/CLS-LOC}
LAUNCH=${LAUNCH:-torchrun --nproc_per_node 8}
RUNS=${RUNS:-runs}

# tokens NAME: the ten-crop tokens of the tokenizer in $RUNS/NAME, unless they are there already
tokens() {
    [ -f "$RUNS/$1/codes.npz" ] || $LAUNCH pretokenize.py --data "$DATA/train" --crops ten --batch_size 2560 --out "$RUNS/$1"
}
