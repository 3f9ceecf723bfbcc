"""Curves of the .jsonl logs (paper figure 4).

    python tools/curves.py out out_2d                               # train_ar.jsonl of two runs
    python tools/curves.py out --log train_stage1.jsonl --keys l1 perceptual ce psnr
    python tools/curves.py out --log watch.jsonl --keys fid         # of recipes/watch.sh

A panel for each key, a colour for each run: a pale line while training, one with dots on held-out
images, which the logs call val_KEY. Of several runs in a log it is the last. Needs matplotlib.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path


def read_log(path):
    """The curves of the last run that is in a log: {key: {step: value}}."""
    if not path.is_file():
        raise SystemExit(f"{path} does not exist: --log names the log")
    curves = defaultdict(dict)
    lines = path.read_text().splitlines()
    for entry in [json.loads(line) for line in lines if line.endswith("}")]:  # not one cut off
        if "settings" in entry:
            curves.clear()  # a new run begins
        for key in entry.keys() - {"settings"}:
            curves[key][entry["step"]] = entry[key]  # the later of two lines counts, see --resume
    return curves


def main():
    parser = argparse.ArgumentParser(description="Curves of the .jsonl logs.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("runs", nargs="+", help="--out folders of runs")
    flag("--log", default="train_ar.jsonl", help="name of the log in each of them")
    flag("--keys", nargs="+", default=["nats", "accuracy"], help="what to draw")
    flag("--path", help="the picture; else curves.png in the first of the folders")
    args = parser.parse_args()

    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(args.keys), 3.5), layout="tight")
    axes = figure.subplots(1, len(args.keys), squeeze=False)[0]
    for i, run in enumerate(args.runs):
        log = Path(run) / args.log
        curves = read_log(log)
        for axis, key in zip(axes, args.keys):
            if not curves.keys() & {key, f"val_{key}"}:
                raise SystemExit(f"{log} holds no {key}; it has {', '.join(sorted(curves))}")
            for name, style, alpha in ((key, "-", 0.5), (f"val_{key}", ".-", 1)):
                if name in curves:
                    axis.plot(*zip(*sorted(curves[name].items())), style, alpha=alpha,
                              color=f"C{i}", linewidth=0.8, label=f"{run} {name}")
            axis.set(xlabel="step", title=key)
            axis.legend(fontsize="small")
    path = Path(args.path or Path(args.runs[0]) / "curves.png")
    figure.savefig(path, dpi=90)
    print(path)


if __name__ == "__main__":
    main()
