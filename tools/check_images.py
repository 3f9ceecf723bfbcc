"""Can all images be read? Opens each of them and names those that cannot be, at which a trainer
would stop.

    python tools/check_images.py my_images/train
    python tools/check_images.py imagenet.zip/ILSVRC/Data/CLS-LOC/train

It also prints how many classes there are, of how many images, and the sides of the images. Ends
with status 1 if an image cannot be read.
"""

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretokenize import Images
from tokenizer import HelpFormatter, InputError, whole


def main():
    parser = argparse.ArgumentParser(description="Name the images that cannot be read.",
                                     formatter_class=HelpFormatter)
    flag = parser.add_argument
    flag("data", help="a folder, zip, or path into a zip, as the trainers' --data")
    flag("--num_workers", type=whole(1), default=min(8, os.cpu_count()),
         help="threads that decode images")
    args = parser.parse_args()
    images = Images(args.data)

    def size_of(index):
        """(width, height) of an image, or None if it cannot be read."""
        try:
            return images.open(index).size
        except InputError as error:
            tqdm.write(str(error))
            return None

    # Classes
    counts = np.bincount(images.labels, minlength=len(images.classes))
    print(f"{args.data}: {len(images)} images, {len(images.classes)} classes of {counts.min()} to "
          f"{counts.max()} images", flush=True)

    # Images
    with ThreadPoolExecutor(args.num_workers) as pool:
        of_images = pool.map(size_of, range(len(images)))
        sizes = [size for size in tqdm(of_images, total=len(images), unit="image") if size]
    broken = len(images) - len(sizes)
    if sizes:
        shorter = np.min(sizes, 1)
        square = np.ptp(sizes, 1) == 0
        print(f"shorter side: {shorter.min()} to {shorter.max()} pixels, median "
              f"{np.median(shorter):.0f}; {square.mean():.0%} are square")
    print(f"{broken} cannot be read")
    if broken:
        sys.exit(1)


if __name__ == "__main__":
    main()
