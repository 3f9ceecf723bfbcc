"""Did the model memorise? Exact copies among samples, and the training images nearest to them.

    python tools/nearest.py                         # out/samples.npz and the data of out/'s tokens
    python tools/nearest.py l_xl/samples.npz --by features --data imagenet/train

It prints the median distance of samples to their nearest training image, that of held-out images,
which the model cannot have copied, and how many samples are nearer than the nearest 1% of these: by
chance 1% are. In each row of nearest.png a sample is followed by the training images nearest to it.

Distances are root mean square differences of pixels, 0 to 255, or Euclidean ones in the features of
fid.py's network. A sample learned by heart still bears the error of the tokenizer: --tokenizer
compares with what that makes of the images. Pixels miss copies that are mirrored or shifted.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fid
from pretokenize import (Images, center_crop, default_val, load_batches, save_grid, to_float,
                         to_uint8)
from tokenizer import Tokenizer, check_flags, setup


def nearest(queries, batches, k):
    """The k nearest of all rows in batches (B, d) to each query (n, d): distances and numbers, both
    (n, k), the nearest first."""
    n = len(queries)
    distances = queries.new_full((n, k), torch.inf)
    numbers = torch.zeros(n, k, dtype=torch.int64, device=queries.device)
    first = 0
    for rows in batches:
        # Not by products of matrices, whose rounding gives copies a distance above 0
        mode = "donot_use_mm_for_euclid_dist"
        distances = torch.cat([distances, torch.cdist(queries, rows, compute_mode=mode)], 1)
        of_rows = torch.arange(first, first + len(rows), device=queries.device)
        numbers = torch.cat([numbers, of_rows.expand(n, -1)], 1)
        distances, order = distances.topk(k, largest=False)
        numbers = numbers.gather(1, order)
        first += len(rows)
    return distances.cpu(), numbers.cpu()


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description="Samples beside the nearest training images.")
    flag = parser.add_argument
    flag("samples", nargs="?", default="out/samples.npz", help="npz of sample.py")
    flag("--data", help="training images; else those that codes.safetensors beside the samples "
         "names, or the bundled ones")
    flag("--val_data", help="held-out images; else the folder val beside a --data named train")
    flag("--by", default="pixels", choices=["pixels", "features"], help="what distances are of")
    flag("--tokenizer", metavar="FILE", help="compare with what it makes of the images")
    flag("--num", type=int, default=1000, help="samples, and held-out images, to measure")
    flag("--device", default="auto")
    args = parser.parse_args()
    check_flags(parser, args, "num")
    device = setup(args.device)[2]
    (size, _), batches = fid.image_batches(args.samples, 1000)
    samples = torch.cat([*batches])  # (N, H, W, 3) uint8
    codes = Path(args.samples).with_name("codes.safetensors")
    images = Images(args.data or fid.default_images(codes, (size, size), "train"))
    val_data = args.val_data or default_val(images.path)
    if val_data is None:
        raise SystemExit(f"--val_data is needed: no held-out images are beside {images.path}")
    held_out = Images(val_data)
    tokenizer = Tokenizer.load(args.tokenizer).to(device) if args.tokenizer else None
    if args.by == "features":
        _, network = fid.feature_network((size, size), None, device)

    def vectors(batches, tokenizer=None):
        """Batches (B, H, W, 3) uint8, or what the tokenizer makes of them -> batches (B, d)"""
        for batch in batches:
            batch = batch.to(device)
            if tokenizer is not None:
                codes = tokenizer.encode(to_float(batch))
                batch = to_uint8(tokenizer.decode(codes)).to(device)
            if args.by == "features":
                yield network(batch)["pool"].float()
            else:
                yield batch.flatten(1).float() / batch[0].numel() ** 0.5

    def load(source, numbers):
        keys = tqdm(numbers.split(100), leave=False)
        return load_batches(lambda i: center_crop(source.open(i), size), keys, os.cpu_count())

    # Samples and held-out images, spread over all classes, and their nearest training images
    count = min(args.num, len(samples), len(held_out))
    chosen = samples[torch.linspace(0, len(samples) - 1, count).long()]
    spread = torch.linspace(0, len(held_out) - 1, count).long()
    queries = [*vectors(chosen.split(100)), *vectors(load(held_out, spread), tokenizer)]
    batches = vectors(load(images, torch.arange(len(images))), tokenizer)
    distances, neighbours = nearest(torch.cat(queries), batches, k=5)
    of_samples, of_held_out = distances[:, 0].split(count)
    near = (of_samples <= of_held_out.quantile(0.01)).float().mean()
    copies = len(samples) - len({hash(image.numpy().tobytes()) for image in samples})
    print(f"{len(samples)} samples, {copies} of them exact copies of others")
    print(f"median distance of {args.by} to the nearest of {images}:")
    print(f"  of {count} samples {of_samples.median():.2f}")
    print(f"  of {count} held-out images {of_held_out.median():.2f}")
    print(f"nearer than the nearest 1% of held-out images: {near:.1%} of the samples")

    # Picture
    rows = []
    for i in range(0, count, count // 10 + 1):
        crops = [center_crop(images.open(number), size) for number in neighbours[i]]
        rows.append(np.stack([chosen[i], *crops]))
    save_grid(Path(args.samples).with_name("nearest.png"), rows)


if __name__ == "__main__":
    main()
