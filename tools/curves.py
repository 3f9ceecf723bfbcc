"""Curves out of the .jsonl logs (paper figure 4).

    python tools/curves.py out out_2d                               # held-out nats of stage 2
    python tools/curves.py out out_2d --keys val_gfid val_gfid_no_cfg   # after train_ar.py --fid_every
    python tools/curves.py out --log train_stage1.jsonl --keys l1 ce val_psnr
"""
import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("runs", nargs="+", help="--out folders of runs")
    parser.add_argument("--log", default="train_ar.jsonl")
    parser.add_argument("--keys", nargs="+", default=["val_nats", "val_nats_visual"])
    parser.add_argument("--path", default="curves.png", help="the picture")
    args = parser.parse_args()
    figure, axes = pyplot.subplots(1, len(args.keys), figsize=(4.5 * len(args.keys), 3.5), squeeze=False)
    for run in args.runs:
        entries = [json.loads(line) for line in (Path(run) / args.log).read_text().splitlines()]
        for axis, key in zip(axes[0], args.keys):
            points = [(entry["step"], entry[key]) for entry in entries if key in entry]
            if not points:
                raise SystemExit(f"curves.py: {Path(run) / args.log} holds no {key}; it has "
                                 f"{', '.join(sorted({k for entry in entries for k in entry} - {'step'}))}")
            axis.plot(*zip(*points), marker=".", label=run)
            axis.set(xlabel="step", title=key)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(args.path, dpi=90)
    print(args.path)


if __name__ == "__main__":
    main()
