"""Draws small colour pictures of three kinds, the worked example of README.md.

    python data/shapes.py --out shapes --num 2000    # shapes/train/circle/0.png ..., a tenth in val
"""

import argparse
import random
from pathlib import Path

from PIL import Image, ImageDraw

KINDS = ("circle", "square", "triangle")


def picture(kind, rng, size=64):
    """A shape in a light colour on a dark ground, drawn four times as large and shrunk."""
    side = 4 * size
    ground = tuple(rng.randrange(0, 90) for _ in range(3))
    colour = tuple(rng.randrange(120, 256) for _ in range(3))
    radius = rng.uniform(0.25, 0.45) * side
    x = rng.uniform(radius, side - radius)
    y = rng.uniform(radius, side - radius)
    image = Image.new("RGB", (side, side), ground)
    draw = ImageDraw.Draw(image)
    if kind == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    else:
        sides = {"square": 4, "triangle": 3}[kind]
        draw.regular_polygon((x, y, radius), sides, fill=colour)
    return image.resize((size, size), Image.Resampling.BOX)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="shapes")
    parser.add_argument("--num", type=int, default=2000, help="pictures in all")
    args = parser.parse_args()
    rng = random.Random(0)
    for i in range(args.num):
        kind = KINDS[i % 3]
        folder = Path(args.out) / ("val" if i % 10 == 9 else "train") / kind
        folder.mkdir(parents=True, exist_ok=True)
        picture(kind, rng).save(folder / f"{i}.png")


if __name__ == "__main__":
    main()
