#!/usr/bin/env bash
# The ten released pairs, each imported, sampled with and without guidance (50,000 images each) and
# scored; $RUNS/released/table.md has the scores beside the paper's.
#
#   recipes/evaluate_all.sh                     # downloads the pairs
#   FROM=ckpts recipes/evaluate_all.sh          # takes them from the folder of their directories
#   ONLY="2d prologue-b-b" recipes/evaluate_all.sh --dtype bf16 --compile
#
# Flags go to sample.py, those in FID_FLAGS to fid.py. It can be stopped and started again: what is
# done is skipped. The samples of a pair (20 GB) are removed when they are scored.
set -e
cd "$(dirname "$0")/.."
source recipes/common.sh

table() {
    python - "$RUNS/released" "${NUM:-50000}" <<'END'
import json
import sys
from pathlib import Path

folder = Path(sys.argv[1])
num = sys.argv[2]

# Tables 1, 2 and A1: gFID without CFG; with CFG gFID, IS, precision, recall
paper = {
    "1d": ["19.32", "6.10"],
    "2d": ["21.01", "5.02"],
    "prologue-b-b": ["10.75", "4.11", "210.3", "0.83", "0.48"],
    "prologue-b-l": ["6.56", "2.67", "251.2", "0.82", "0.56"],
    "prologue-b-xl": ["5.22", "2.43", "252.6", "0.80", "0.59"],
    "prologue-l-b": ["5.02", "2.15", "219.9", "0.79", "0.60"],
    "prologue-l-l": ["2.81", "1.52", "251.6", "0.77", "0.66"],
    "prologue-l-xl": ["2.26", "1.46", "257.7", "0.78", "0.66"],
    "prologue-post": ["11.04", "3.88"],
    "prologue-onestage": ["21.00", "5.41"],
}
columns = ["gFID without CFG", "gFID", "IS", "Pre.", "Rec."]
keys = ["fid", "fid", "inception_score", "precision", "recall"]
modes = ["no_cfg", "cfg", "cfg", "cfg", "cfg"]

lines = [f"{int(num):,} samples for each score; the paper's in brackets.", ""]
lines.append("| pair | " + " | ".join(columns) + " |")
lines.append("| --- " * (len(columns) + 1) + "|")
for name, published in paper.items():
    cells = []
    for i in range(len(columns)):
        score = folder / name / f"{modes[i]}_{num}" / "score.json"
        cell = "-"
        if score.exists():
            measured = json.loads(score.read_text())
            if keys[i] in measured:  # a reference of statistics alone gives no precision
                cell = f"{measured[keys[i]]:.2f}"
        if i < len(published):
            cell += f" ({published[i]})"
        cells.append(cell)
    lines.append(f"| {name} | " + " | ".join(cells) + " |")
(folder / "table.md").write_text("\n".join(lines) + "\n")
END
}

all="1d 2d prologue-b-b prologue-b-l prologue-b-xl prologue-l-b prologue-l-l prologue-l-xl
    prologue-post prologue-onestage"
for name in ${ONLY:-$all}; do
    out=$RUNS/released/$name
    if [ ! -f "$out/ar.safetensors" ]; then
        python tools/released.py "$name" --out "$out" ${FROM:+--from "$FROM"}
    fi
    recipes/evaluate.sh "$out/tokenizer.safetensors" "$out/ar.safetensors" "$name" "$@"
    rm -f "$out"/*cfg_*/samples.npz
    table
done
cat "$RUNS/released/table.md"
