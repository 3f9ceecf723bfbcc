"""Variations of pictures of one's own: each row of variations.png is a picture, its reconstruction,
and images drawn anew under its prologue.

    python tools/variations.py results/shoe.png --classes sneaker     # the pair in out/, or shipped
    python tools/variations.py *.jpg --pair l_xl --out l_xl --keep 0.5       # upper halves, too

By default the images are drawn as of no class, and with the settings of the pair's preset.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretokenize import center_crop, open_image, save_grid, to_float
from sample import (class_numbers, decode, default_preset, draw, load_pair, pair_folder,
                    preset_settings)
from tokenizer import check_flags, open_out, setup


def variations(tokenizer, ar, picture, label, first, args):
    """A row of images uint8 (2 + columns, H, W, 3); `first` is the number of the first drawn."""
    k = tokenizer.config.num_prologue
    grid = tokenizer.config.grid
    kept = min(round(args.keep * grid), grid - 1) * grid  # visual codes, those of whole rows
    crop = torch.tensor(center_crop(picture, tokenizer.config.image_size))[None]  # (1, H, W, 3)
    codes = tokenizer.encode(to_float(crop).to(ar.head.weight.device))  # (1, K+N)
    whole = codes.expand(args.columns, -1)
    drawn = draw(ar, torch.full((args.columns,), label), range(first, first + args.columns),
                 args.seed, args.columns, preset_settings(default_preset(ar)),
                 prologue=whole[:, :k], visual=whole[:, k : k + kept])
    return torch.cat([crop, decode(tokenizer, torch.cat([codes, drawn]), args.columns + 1)])


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description="Variations of pictures of one's own.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("images", nargs="+", metavar="FILE", help="pictures")
    flag("--pair", help="folder of tokenizer and AR model; else out, or the shipped pair")
    flag("--out", default="out", help="folder for variations.png")
    flag("--classes", nargs=1, metavar="CLASS", help="name or number; else of no class")
    flag("--keep", type=float, default=0.0, help="share of the rows of patches to keep as well")
    flag("--columns", type=int, default=10, help="variations of each picture")
    flag("--seed", type=int, default=0, help="of the noise")
    flag("--device", default="auto", help="cuda, mps or cpu; auto is the best of them")
    args = parser.parse_args()
    check_flags(parser, args, "columns")
    device = setup(args.device)[2]
    tokenizer, ar = load_pair(pair_folder(args.pair), device)
    k = tokenizer.config.num_prologue
    if tokenizer.config.layout == "1d" or round(args.keep * tokenizer.config.grid) + k == 0:
        raise SystemExit("variations need a model with a prologue, or of patches and with --keep")
    label = 0 if ar.config.num_classes == 1 else ar.no_class
    if args.classes:
        (label,) = class_numbers(args.classes, ar)
    rows = [variations(tokenizer, ar, open_image(file), label, i * args.columns, args)
            for i, file in enumerate(args.images)]
    path = open_out(args.out) / "variations.png"
    save_grid(path, rows)
    print(f"{path}: in each row a picture, its reconstruction and {args.columns} variations")


if __name__ == "__main__":
    main()
