"""Curves out of the .jsonl logs (paper figure 4).

    python tools/curves.py out out_2d                           # held-out nats of stage 2
    python tools/curves.py out --log train_stage1.jsonl --keys l1 ce val_psnr
    python tools/curves.py out out_2d --log watch.jsonl --keys val_gfid val_gfid_no_cfg --x images

A panel for each key, a curve for each run. Needs matplotlib.
"""

import argparse
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tokenizer import HelpFormatter, InputError


def read_log(path):
    """The lines of a log as dicts. Raises InputError if there are none."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; --log names another log")
    entries = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue  # cut off by a kill
    if not entries:
        raise InputError(f"{path} has no lines yet")
    return entries


def add_images(path, entries):
    """Adds the images seen so far to the lines that have only the step, which those of held-out
    measures are: the batch size of a run is fixed. Raises InputError if no line has both."""
    known = [entry for entry in entries if entry.get("images", 0) > 0]
    if not known:
        raise InputError(f"{path} does not say how many images a step has; draw it with --x step")
    batch_size = known[0]["images"] / known[0]["step"]
    for entry in entries:
        entry.setdefault("images", entry["step"] * batch_size)


def parse_args():
    parser = argparse.ArgumentParser(description="Curves out of the .jsonl logs.",
                                     formatter_class=HelpFormatter)
    flag = parser.add_argument
    flag("runs", nargs="+", help="--out folders of runs")
    flag("--log", default="train_ar.jsonl", help="name of the log in each of them")
    flag("--keys", nargs="+", default=["val_nats", "val_nats_visual"], help="what to draw")
    flag("--x", default="step", choices=["step", "images"], help="the horizontal axis")
    flag("--path", help="the picture; by default curves.png in the first of the folders")
    return parser.parse_args()


def main():
    args = parse_args()
    figure = Figure(figsize=(4.5 * len(args.keys), 3.5), layout="tight")
    axes = figure.subplots(1, len(args.keys), squeeze=False)[0]
    for run in args.runs:
        path = Path(run) / args.log
        entries = read_log(path)
        if args.x == "images":
            add_images(path, entries)
        for axis, key in zip(axes, args.keys):
            points = [entry for entry in entries if key in entry]
            if not points:
                known = sorted({name for entry in entries for name in entry})
                raise InputError(f"{path} holds no {key}; it has {', '.join(known)}")
            x = [entry[args.x] for entry in points]
            y = [entry[key] for entry in points]
            axis.plot(x, y, marker=".", label=run)
            axis.set(xlabel=args.x, title=key)
    axes[0].legend()
    path = Path(args.path or Path(args.runs[0]) / "curves.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    print(path)


if __name__ == "__main__":
    main()
