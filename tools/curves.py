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
    parser.add_argument("--path", help="the picture; by default curves.png in the first of the folders")
    args = parser.parse_args()
    figure, axes = pyplot.subplots(1, len(args.keys), figsize=(4.5 * len(args.keys), 3.5), squeeze=False)
    for run in args.runs:
        if not (Path(run) / args.log).is_file():
            raise SystemExit(f"curves.py: {Path(run) / args.log} does not exist; --log names another log")
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
    path = args.path or Path(args.runs[0]) / "curves.png"
    figure.savefig(path, dpi=90)
    print(path)


if __name__ == "__main__":
    main()
