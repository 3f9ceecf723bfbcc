#!/usr/bin/env bash
# gFID, IS, precision and recall as in Tables 1 and 2, below the paper's: NUM samples with and
# without guidance against ADM's REFERENCE, on one node. Started again it skips what is newer than
# the weights.
#
#   recipes/evaluate.sh runs/b_b prologue-b-b       # DIR of a pair, ROW of table A5
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

# Table A5 of the rows that are not in sample.py: --cfg_prologue, --cfg_visual and --cfg_power, which
# are used with guidance; --temperature_prologue and --temperature, which are used without
settings="2d-l-b 1.0 5.0 1.75 1.0 0.9
l-b-vgg 0.7 3.75 0.25 0.8 0.85
l-b-16k 0.65 3.25 0.25 0.8 0.95
p256 0.7 3.25 0.25 0.8 0.9
p4096 0.8 3.5 0.25 0.8 0.9
k4 0.6 2.5 0.25 0.8 0.9
k64 0.8 3.75 0.25 0.8 1.0
tau001 0.65 2.5 0.25 0.8 0.9
tau1 0.8 3.75 0.25 0.8 0.85
drop0 0.65 3.5 0.25 0.8 0.85
drop1 0.75 3.25 0.25 0.8 0.9
ce1 0.65 3.75 0.25 0.8 0.85
ce6 0.75 3.25 0.25 0.8 0.9"

score() {  # DIR NAME [flags of sample.py]: DIR/NAME_NUM/score.json
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
print_row() { printf "%-20s%14.6s%8.6s%8.6s%8.6s%8.6s\n" "$@"; }
table="                      gFID, no CFG    gFID      IS   Prec.  Recall"
evaluate() {  # DIR ROW [flags of sample.py]
    local guided=(--preset "$2") plain=(--preset "$2") row
    if row=($(grep "^$2 " <<< "$settings")); then
        guided=(--cfg_prologue "${row[1]}" --cfg_visual "${row[2]}" --cfg_power "${row[3]}")
        plain=(--temperature_prologue "${row[4]}" --temperature "${row[5]}")
    fi
    score "$1" "$2-cfg" "${guided[@]}" "${@:3}"
    score "$1" "$2-no_cfg" --no_cfg "${plain[@]}" "${@:3}"
    [[ $DRY ]] && return
    guided=$1/$2-cfg_$NUM/score.json
    plain=$1/$2-no_cfg_$NUM/score.json
    row=($(grep "^$2 " <<< "$paper" || echo "$2"))
    table+=$'\n'$(print_row "${row[@]}"
        print_row "    measured" "$(value "$plain" fid)" "$(value "$guided" fid)" \
            "$(value "$guided" inception_score)" "$(value "$guided" precision)" \
            "$(value "$guided" recall)")
}

out=${1:?give DIR and ROW, or released}
if [[ $out == released ]]; then
    out=$RUNS/released
    for name in ${ONLY:-$(head -n 10 <<< "$paper" | cut -d " " -f 1)}; do
        [[ -e $out/$name/ar.safetensors ]] || run python "$ROOT/tools/released.py" "$name" \
            --out "$out/$name" ${FROM:+--from "$FROM"}
        evaluate "$out/$name" "$name" "${@:2}"
        [[ $DRY ]] || rm -f "$out/$name/$name"-*cfg_"$NUM"/samples.npz  # 20 GB
    done
else
    evaluate "$out" "${2:?give a row of table A5}" "${@:3}"
fi
[[ $DRY ]] || echo "$table" | tee "$out/table.txt"
