"""gFID over sampling settings (paper figure A1): every combination of the values that are given.

    python tools/sweep.py cfg_visual=1.5,2,3            # the pair in out/, else the shipped one
    python tools/sweep.py temperature=0.8,0.9,1 --no_cfg
    python tools/sweep.py cfg_prologue=0.6,0.7 cfg_visual=2,2.25,2.5 --pair l_xl --out l_xl \\
        --num_samples 10000 --reference VIRTUAL_imagenet256_labeled.npz

What is not given is as the preset says; a single value, as in cfg_schedule=linear, is only set.
Image i is always drawn with the noise of sample.py's image i, so that combinations differ by their
settings and not by luck. In --out it leaves sweep.json, best gFID first.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fid
from ar import SCHEDULES
from sample import (PRESETS, decode, default_preset, draw, load_pair, pair_folder,
                    preset_settings)
from tokenizer import atomic_write, check_flags, open_out, setup

# What can be swept: keyword arguments of AR.generate
SETTINGS = dict(cfg_visual=float, cfg_prologue=float, cfg_schedule=str, cfg_power=float,
                temperature=float, temperature_prologue=float, top_k=int, top_p=float)


def read_axes(texts):
    """["cfg_visual=3,1.5", ...] -> {"cfg_visual": [1.5, 3.0], ...}"""
    axes = {}
    for text in texts:
        name, _, values = text.partition("=")
        if name not in SETTINGS:
            raise SystemExit(f"{text}: NAME=VALUE,VALUE with a NAME of {', '.join(SETTINGS)}")
        try:
            axes[name] = sorted(SETTINGS[name](value) for value in values.split(","))
        except ValueError as error:
            raise SystemExit(f"{text}: {error}") from None
        for value in axes[name]:
            if not (value in SCHEDULES if name == "cfg_schedule" else 0 <= value < float("inf")):
                raise SystemExit(f"{text}: a value is a number from 0 on, or for cfg_schedule one "
                                 f"of {', '.join(SCHEDULES)}")
    return dict(sorted(axes.items(), key=lambda axis: len(axis[1]) > 1))  # single values first


def drawn(tokenizer, ar, args, settings):
    """Yields images as sample.py draws them, each class equally often: uint8 (B, H, W, 3)."""
    for numbers in torch.arange(args.num_samples).split(args.batch_size):
        labels = numbers % ar.config.num_classes
        codes = draw(ar, labels, numbers, 0, args.batch_size, settings)  # (B, K+N)
        yield decode(tokenizer, codes, args.batch_size)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description="gFID over sampling settings.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("axes", nargs="+", metavar="NAME=VALUE,VALUE", help=", ".join(SETTINGS))
    flag("--pair", help="folder of tokenizer and AR model; else out, or the shipped pair")
    flag("--out", default="out", help="folder for sweep.json")
    flag("--preset", choices=PRESETS, help="of what is not swept; else that of the AR file or tiny")
    flag("--no_cfg", action="store_true", help="the preset's settings without guidance")
    flag("--num_samples", type=int, default=1000, help="images for each combination")
    flag("--reference", help="npz, folder or zip; else as fid.py finds it for samples in --pair")
    flag("--inception", metavar="FILE", help="torch-fidelity's weights; else downloaded")
    flag("--batch_size", type=int, default=100, help="images at a time")
    flag("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    args = parser.parse_args()
    check_flags(parser, args, "num_samples", "batch_size")
    axes = read_axes(args.axes)
    out = open_out(args.out)
    pair = pair_folder(args.pair)
    _, _, device, _ = setup(args.device)
    tokenizer, ar = load_pair(pair, device)
    preset = args.preset or default_preset(ar)
    settings = preset_settings(preset, args.no_cfg)
    print(f"{pair}, preset {preset}", flush=True)

    # Mean and covariance of the reference, once for all combinations
    torch.backends.cudnn.allow_tf32 = False  # as in fid.py
    size = (tokenizer.config.image_size, tokenizer.config.image_size)
    reference = args.reference or fid.default_images(pair / "codes.safetensors", size, "train")
    _, network = fid.feature_network(size, args.inception, device)
    stored = fid.open_npz(reference)
    if "mu" in stored:
        statistics = (stored["mu"], stored["sigma"])
    else:
        _, images = fid.image_batches(reference, args.batch_size, size, crop=True)
        statistics = fid.extract(network, images, device)["pool"]

    # Every combination. The file is written anew after each: a long sweep may be stopped.
    how = vars(args) | dict(pair=str(pair), preset=preset, settings=settings, reference=reference)
    rows = []
    for values in itertools.product(*axes.values()):
        row = dict(zip(axes, values))
        images = drawn(tokenizer, ar, args, settings | row)
        samples = fid.extract(network, images, device)
        row["gfid"] = fid.frechet_distance(*samples["pool"], *statistics)
        row["inception_score"] = samples["inception_score"]
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        rows.append(row)
        best_first = sorted(rows, key=lambda row: row["gfid"])
        with atomic_write(out / "sweep.json") as temporary:
            temporary.write_text(json.dumps(how | {"rows": best_first}, indent=1))


if __name__ == "__main__":
    main()
