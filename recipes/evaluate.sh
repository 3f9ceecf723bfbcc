#!/usr/bin/env bash
# gFID, IS, precision and recall as in Tables 1 and 2: NUM samples with and without guidance against
# ADM's REFERENCE, on one node. Started again it skips what is newer than the weights.
#
#   recipes/evaluate.sh runs/b_b prologue-b-b       # DIR of a pair, PRESET of sample.py
#   FROM=ckpts ONLY="2d prologue-b-b" recipes/evaluate.sh released --dtype bf16 --compile
#
# `released` is the ten released pairs (or ONLY) into one table, downloaded or from the folder FROM.
# Flags go to sample.py, those in FID_FLAGS to fid.py.
source "$(dirname "$0")/common.sh"
NUM=${NUM:-50000}
REFERENCE=${REFERENCE:-VIRTUAL_imagenet256_labeled.npz}
[[ -e $REFERENCE ]] || { echo "$REFERENCE does not exist: set REFERENCE to ADM's npz" >&2; exit 1; }
cards=1
[[ $LAUNCH =~ nproc.per.node[=\ ]+([0-9]+) ]] && cards=${BASH_REMATCH[1]}

score() {  # DIR PRESET-MODE [flags of sample.py]: DIR/PRESET-MODE_NUM/score.json
    local out=$1/$2_$NUM
    [[ $out/score.json -nt $1/ar.safetensors ]] && return
    [[ $out/samples.npz -nt $1/ar.safetensors ]] || launch sample.py --pair "$1" --out "$out" \
        --num_samples "$NUM" --batch_size $((256 * cards)) "${@:3}"  # AR-XL caches 46 GB for 256
    fid "$out/samples.npz" "$REFERENCE" > "$out/score.tmp"
    mv "$out/score.tmp" "$out/score.json"
}

if [[ ${1:?give DIR and PRESET, or released} != released ]]; then
    score "$1" "${2:?give a preset of sample.py}-cfg" --preset "$2" "${@:3}"
    score "$1" "$2-no_cfg" --preset "$2" --no_cfg "${@:3}"
    head "$1/$2"-{cfg,no_cfg}_"$NUM"/score.json
    exit
fi

value() { grep -o "\"$2\": [^,}]*" "$dir/$name-$1_$NUM/score.json" | cut -d " " -f 2 || echo -; }
row() { printf "%-20s%14.6s%8.6s%8.6s%8.6s%8.6s\n" "$@"; }
table="paper, measured      gFID, no CFG    gFID      IS   Prec.  Recall"
while read -r name plain guided is precision recall <&3; do
    [[ " ${ONLY:-$name} " == *" $name "* ]] || continue
    dir=$RUNS/released/$name
    [[ -e $dir/ar.safetensors ]] ||
        python "$ROOT/tools/released.py" "$name" --out "$dir" ${FROM:+--from "$FROM"}
    "$ROOT/recipes/evaluate.sh" "$dir" "$name" "${@:2}"
    rm -f "$dir/$name"-*cfg_"$NUM"/samples.npz  # 20 GB
    table+=$'\n'$(row "$name" "$plain" "$guided" "$is" "$precision" "$recall"
        row "" "$(value no_cfg fid)" "$(value cfg fid)" "$(value cfg inception_score)" \
            "$(value cfg precision)" "$(value cfg recall)")
done 3<< END
1d 19.32 6.10 - - -
2d 21.01 5.02 - - -
prologue-b-b 10.75 4.11 210.3 0.83 0.48
prologue-b-l 6.56 2.67 251.2 0.82 0.56
prologue-b-xl 5.22 2.43 252.6 0.80 0.59
prologue-l-b 5.02 2.15 219.9 0.79 0.60
prologue-l-l 2.81 1.52 251.6 0.77 0.66
prologue-l-xl 2.26 1.46 257.7 0.78 0.66
prologue-post 11.04 3.88 - - -
prologue-onestage 21.00 5.41 - - -
END
echo "$table" | tee "$RUNS/released/table.txt"
