#!/usr/bin/env bash
# gFID, IS, precision and recall as in Tables 1 and 2, below the paper's: NUM samples with and
# without guidance against ADM's REFERENCE, on one node. Started again it skips what is newer than
# the weights.
#
#   recipes/evaluate.sh runs/b_b prologue-b-b       # DIR of a pair, PRESET of sample.py
#   FROM=ckpts ONLY="2d prologue-b-b" recipes/evaluate.sh released --dtype bf16 --compile
#
# `released` is the ten released pairs (or ONLY) into one table, downloaded or from the folder FROM.
# Flags go to sample.py, those in FID_FLAGS to fid.py. 256 images a card need, by estimate, 12 GB
# with AR-B, 32 with AR-L, 52 with AR-XL, and 27 there with --dtype bf16.
source "$(dirname "$0")/common.sh"
NUM=${NUM:-50000}
REFERENCE=${REFERENCE:-VIRTUAL_imagenet256_labeled.npz}
[[ $DRY || -e $REFERENCE ]] ||
    { echo "$REFERENCE does not exist: set REFERENCE to ADM's npz" >&2; exit 1; }
cards=1
[[ $LAUNCH =~ nproc.per.node[=\ ]+([0-9]+) ]] && cards=${BASH_REMATCH[1]}

# Tables 1, 2, A1, A2, A3 by preset; the first ten are released
paper="1d 19.32 6.10
2d 21.01 5.02
prologue-b-b 10.75 4.11 210.3 0.83 0.48
prologue-b-l 6.56 2.67 251.2 0.82 0.56
prologue-b-xl 5.22 2.43 252.6 0.80 0.59
prologue-l-b 5.02 2.15 219.9 0.79 0.60
prologue-l-l 2.81 1.52 251.6 0.77 0.66
prologue-l-xl 2.26 1.46 257.7 0.78 0.66
prologue-post 11.04 3.88
prologue-onestage 21.00 5.41
2d-l-b 7.54 2.59
l-b-vgg 10.87 4.56
l-b-16k 6.73 2.30
p256 12.10 4.36
p4096 12.68 4.36
k4 13.49 4.20
k64 12.31 6.81
tau001 11.66 4.02
tau1 11.49 4.08
ce1 11.98 4.21
ce6 11.38 4.28
drop0 12.32 4.28
drop1 12.67 4.53"

score() {  # DIR PRESET-MODE [flags of sample.py]: DIR/PRESET-MODE_NUM/score.json
    local out=$1/$2_$NUM json
    [[ $out/score.json -nt $1/ar.safetensors ]] && return
    [[ $out/samples.npz -nt $1/ar.safetensors ]] || launch sample.py --pair "$1" --out "$out" \
        --num_samples "$NUM" --batch_size $((256 * cards)) "${@:3}"
    json=$(fid "$out/samples.npz" "$REFERENCE")
    [[ $DRY ]] && return
    echo "$json" > "$out/score.tmp"
    mv "$out/score.tmp" "$out/score.json"
}
value() { grep -o "\"$2\": [^,}]*" "$1" | cut -d " " -f 2 || echo -; }
row() { printf "%-20s%14.6s%8.6s%8.6s%8.6s%8.6s\n" "$@"; }
table="                      gFID, no CFG    gFID      IS   Prec.  Recall"
evaluate() {  # DIR PRESET [flags of sample.py]
    score "$1" "$2-cfg" --preset "$2" "${@:3}"
    score "$1" "$2-no_cfg" --preset "$2" --no_cfg "${@:3}"
    [[ $DRY ]] && return
    local guided=$1/$2-cfg_$NUM/score.json plain=$1/$2-no_cfg_$NUM/score.json known
    known=$(grep "^$2 " <<< "$paper" || echo "$2")
    # shellcheck disable=SC2086  # the words of a line
    table+=$'\n'$(row $known
        row "    measured" "$(value "$plain" fid)" "$(value "$guided" fid)" \
            "$(value "$guided" inception_score)" "$(value "$guided" precision)" \
            "$(value "$guided" recall)")
}

out=${1:?give DIR and PRESET, or released}
if [[ $out == released ]]; then
    out=$RUNS/released
    for name in ${ONLY:-$(head -n 10 <<< "$paper" | cut -d " " -f 1)}; do
        [[ -e $out/$name/ar.safetensors ]] || run python "$ROOT/tools/released.py" "$name" \
            --out "$out/$name" ${FROM:+--from "$FROM"}
        evaluate "$out/$name" "$name" "${@:2}"
        [[ $DRY ]] || rm -f "$out/$name/$name"-*cfg_"$NUM"/samples.npz  # 20 GB
    done
else
    evaluate "$out" "${2:?give a preset of sample.py}" "${@:3}"
fi
[[ $DRY ]] || echo "$table" | tee "$out/table.txt"
