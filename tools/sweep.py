"""gFID over sampling settings: measures every combination of the values that are given.

    python tools/sweep.py cfg_visual=1.5,2,3 cfg_power=0.2,0.5  # the pair in out/, else the shipped
    python tools/sweep.py temperature=0.8,0.9,1 --no_cfg --num 5000
    python tools/sweep.py cfg_visual=2,2.25 cfg_prologue=0.6,0.7 --out l_xl --num 10000 \\
        --dtype bf16 --reference VIRTUAL_imagenet256_labeled.npz

What is not given is as the preset says; a single value, as in cfg_schedule=linear, is only set.
Image i of every combination is drawn with the noise of sample.py's image i, so that combinations
differ by their settings and not by luck. In --out it leaves sweep.json, best gFID first, and
sweep.png (with matplotlib, for one or two settings that vary).
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fid
from ar import SCHEDULES
from pretokenize import BUNDLED
from sample import (PRESETS, cast_linears, decode, default_preset, draw, load_pair, pack_for_cpu,
                    preset_settings)
from tokenizer import HelpFormatter, InputError, real, whole, writing


def schedule(text):
    if text not in SCHEDULES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(SCHEDULES)}")
    return text


# What can be swept, keyword arguments of AR.generate, and what reads a value
SETTINGS = {
    "cfg_visual": real(-1000, 1000),
    "cfg_prologue": real(-1000, 1000),
    "cfg_schedule": schedule,
    "cfg_power": real(0),
    "temperature": real(1e-3),
    "temperature_prologue": real(1e-3),
    "top_k": whole(0),
    "top_p": real(1e-3, 1),
}


def read_axes(texts):
    """["cfg_visual=3,1.5", ...] -> {"cfg_visual": [1.5, 3.0], ...}. Raises InputError."""
    axes = {}
    for text in texts:
        name, _, values = text.partition("=")
        if name not in SETTINGS or not values:
            raise InputError(
                f"{text}: NAME=VALUE,VALUE is needed, where NAME is one of {', '.join(SETTINGS)}"
            )
        if name in axes:
            raise InputError(f"{name} is given twice; its values go behind one =, with commas")
        try:
            axes[name] = sorted({SETTINGS[name](value) for value in values.split(",")})
        except argparse.ArgumentTypeError as error:
            raise InputError(f"{text}: {error}") from None
    return axes


class Samples:
    """Images 0 to num - 1 as sample.py draws them, each class equally often: a source for
    fid.extract that draws the images when they are read."""

    def __init__(self, tokenizer, ar, num, seed, settings, autocast):
        self.tokenizer = tokenizer
        self.ar = ar
        self.num = num
        self.seed = seed
        self.settings = settings
        self.autocast = autocast

    def __len__(self):
        return self.num

    def __getitem__(self, rows):
        numbers = torch.arange(self.num)[rows]  # (n,)
        labels = numbers % self.ar.cfg.num_classes
        n = len(numbers)
        with self.autocast:
            codes = draw(self.ar, labels, numbers, self.seed, n, self.settings)  # (n, K+N)
            return decode(self.tokenizer, codes, n).numpy()  # (n, H, W, 3)


def scores(samples, network, reference, device, batch_size, title):
    """A dict of gFID, Inception Score and, where the reference holds images, precision and
    recall."""
    drawn = fid.extract(network, samples, device, batch_size, title, keep=len(samples))
    result = fid.fid_and_sfid(drawn, reference, "gfid")
    result["inception_score"] = drawn["inception_score"]
    if "features" in reference:
        precision, recall = fid.precision_recall(drawn["features"], reference["features"], device)
        result["precision"] = precision
        result["recall"] = recall
    return result


def print_table(rows):
    names = list(rows[0])
    print("  ".join(f"{name:>10}" for name in names))
    for row in rows:
        cells = []
        for name in names:
            text = f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name])
            cells.append(text.rjust(max(10, len(name))))
        print("  ".join(cells))


def save_picture(path, axes, rows):
    """gFID over the values of `axes`: a curve over one, a grid of colours over two."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path.name} is left out: it needs matplotlib (pip install matplotlib)")
        return
    names = list(axes)
    if len(names) == 1:
        figure = Figure(figsize=(5, 3.5), layout="tight")
        axis = figure.subplots()
        values = axes[names[0]]
        gfid = {row[names[0]]: row["gfid"] for row in rows}
        axis.plot(values, [gfid[value] for value in values], marker="o")
        axis.set(xlabel=names[0], ylabel="gFID")
    else:
        down = axes[names[0]]
        across = axes[names[1]]
        grid = np.empty((len(down), len(across)))
        for row in rows:
            grid[down.index(row[names[0]]), across.index(row[names[1]])] = row["gfid"]
        figure = Figure(figsize=(2 + 0.8 * len(across), 1.5 + 0.6 * len(down)), layout="tight")
        axis = figure.subplots()
        axis.imshow(grid, cmap="viridis_r", alpha=0.6, aspect="auto")
        for (i, j), value in np.ndenumerate(grid):
            axis.text(j, i, f"{value:.3g}", ha="center", va="center")
        axis.set_yticks(range(len(down)), down)
        axis.set_xticks(range(len(across)), across)
        axis.set(ylabel=names[0], xlabel=names[1], title="gFID")
    with writing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)
    print(path)


def parse_args():
    parser = argparse.ArgumentParser(description="gFID over sampling settings.",
                                     formatter_class=HelpFormatter)
    flag = parser.add_argument
    flag("axes", nargs="+", metavar="NAME=VALUE,VALUE",
         help=f"NAME is one of {', '.join(SETTINGS)}")
    flag("--tokenizer", help="tokenizer file; by default that in --out")
    flag("--ar", help="AR file; by default that in --out; without any of these, the shipped pair")
    flag("--out", default="out", help="folder for everything that is written and looked for")
    flag("--preset", choices=PRESETS,
         help="settings of what is not swept; by default the AR file's own or tiny, for a model of "
         "one class unguided")
    flag("--no_cfg", action="store_true", help="the preset's settings without guidance")
    flag("--num", type=whole(2), default=1000, help="images for each combination")
    flag("--seed", type=whole(0), default=0, help="of the noise")
    flag("--reference", default=str(BUNDLED / "train"),
         help="npz, folder or zip of images to compare with")
    flag("--inception", metavar="FILE", help="torch-fidelity's weights, else they are downloaded")
    flag("--batch_size", type=whole(1), default=100, help="images at a time")
    flag("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"],
         help="auto is what torch finds")
    flag("--dtype", default="fp32", choices=["fp32", "bf16"],
         help="of the networks that draw; features are in fp32 always")
    return parser.parse_args()


@torch.no_grad()
def main():
    args = parse_args()
    out = Path(args.out)
    axes = read_axes(args.axes)

    # Device. TF32 stays off: precision and recall take differences of large squares.
    available = "cpu"
    if torch.accelerator.is_available():
        available = torch.accelerator.current_accelerator().type  # cuda, or mps on a Mac
    if args.device not in ("auto", "cpu", available):
        raise InputError(
            f"--device {args.device} cannot be used: torch finds only {available} here"
        )
    device = torch.device(available if args.device == "auto" else args.device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16")

    # Models and settings
    tokenizer, ar, paths = load_pair(args, device)
    if args.dtype == "bf16":
        cast_linears(ar, torch.bfloat16)
    elif device.type == "cpu":
        pack_for_cpu(ar)
    preset = args.preset or default_preset(ar)
    settings = preset_settings(preset, args.no_cfg)
    settings |= dict(cfg_schedule="cosine", top_k=0, top_p=1.0)
    print(f"{paths[0]} and {paths[1]}, preset {preset}", flush=True)

    # The reference's statistics, once for all combinations
    size = tokenizer.cfg.image_size
    network = fid.feature_network("auto", size, args.inception, device)[1]
    reference = fid.reference_features(args.reference, network, device, args.batch_size, size)

    # Every combination. The file is written anew after each, for whoever stops a long sweep.
    result = dict(settings=settings, swept=list(axes), num=args.num, seed=args.seed,
                  preset=preset, dtype=args.dtype, reference=args.reference,
                  tokenizer=str(paths[0]), ar=str(paths[1]), rows=[])
    rows = result["rows"]
    for values in itertools.product(*axes.values()):
        row = dict(zip(axes, values))
        title = " ".join(f"{name}={value}" for name, value in row.items())
        samples = Samples(tokenizer, ar, args.num, args.seed, settings | row, autocast)
        row.update(scores(samples, network, reference, device, args.batch_size, title))
        rows.append(row)
        rows.sort(key=lambda row: row["gfid"])
        with writing(out / "sweep.json") as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")

    # Table and picture
    print_table(rows)
    print(out / "sweep.json")
    varied = {name: values for name, values in axes.items() if len(values) > 1}
    if len(varied) in (1, 2):
        save_picture(out / "sweep.png", varied, rows)


if __name__ == "__main__":
    main()
