"""Builds data/fashion_mnist.zip: class folders of PNGs out of the four Fashion-MNIST files (MIT
licence, Zalando SE).

    python data/fashion_mnist.py                  # the bundled subset: 10,000 train, 2,000 val
    python data/fashion_mnist.py --full --out fashion_mnist_full.zip    # all 60,000 + 10,000

The files are those of Debian's package dataset-fashion-mnist; where --source lacks them,
torchvision downloads them to data/raw. The subset takes the first images of each class, in the
order of the original files.
"""

import argparse
import gzip
import io
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tokenizer import atomic_write

CLASSES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
           "ankle-boot"]


def read_idx(source, name):
    """One IDX file, gzipped or not, as an array; images (n, 28, 28), labels (n,)."""
    path = Path(source) / name
    if path.exists():
        data = path.read_bytes()
    else:
        data = gzip.decompress(path.with_name(f"{name}.gz").read_bytes())
    if "labels" in name:
        return np.frombuffer(data, np.uint8, offset=8).copy()
    return np.frombuffer(data, np.uint8, offset=16).reshape(-1, 28, 28).copy()


def load(source, split):
    """images (n, 28, 28) uint8 and labels (n,), numbered as in CLASSES, of "train" or "val"."""
    prefix = {"train": "train", "val": "t10k"}[split]
    if not list(Path(source).glob(f"{prefix}-images*")):
        from torchvision.datasets import FashionMNIST

        raw = Path(__file__).with_name("raw")
        source = FashionMNIST(raw, train=split == "train", download=True).raw_folder
    images = read_idx(source, f"{prefix}-images-idx3-ubyte")
    labels = read_idx(source, f"{prefix}-labels-idx1-ubyte")
    return images, labels


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--source", default="/usr/share/datasets/fashion-mnist", help="folder of the four files")
    flag("--out", default=Path(__file__).with_name("fashion_mnist.zip"))
    flag("--full", action="store_true", help="every image instead of 1,000 + 200 of each class")
    args = parser.parse_args()
    with atomic_write(args.out) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for split, per_class in (("train", 1000), ("val", 200)):
            images, labels = load(args.source, split)
            for label, name in enumerate(CLASSES):
                chosen = np.flatnonzero(labels == label)
                if not args.full:
                    chosen = chosen[:per_class]
                for index in chosen:
                    png = io.BytesIO()
                    Image.fromarray(images[index]).save(png, "png", optimize=True)
                    # A fixed date keeps the archive identical from run to run.
                    path = f"{split}/{name}/{index:05d}.png"
                    entry = zipfile.ZipInfo(path, (2017, 8, 25, 0, 0, 0))
                    archive.writestr(entry, png.getvalue())
    print(f"{args.out}: {Path(args.out).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
