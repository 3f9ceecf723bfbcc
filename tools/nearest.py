"""Did the model memorise? Exact copies among samples, and the training images nearest to them.

    python tools/nearest.py                         # out/samples.npz and the bundled images
    python tools/nearest.py out/samples.npz --by features
    python tools/nearest.py out/samples.npz --tokenizer out/tokenizer.safetensors
    python tools/nearest.py l_xl/samples.npz --data imagenet.zip/ILSVRC/Data/CLS-LOC/train \\
        --val_data imagenet.zip/ILSVRC/Data/CLS-LOC/val --by features

It prints how many samples are exact copies of an earlier one, and the median distance of samples to
their nearest training image beside that of held-out images, which the model cannot have copied: if
samples were copies, their median would be far below. As that would not show a few copies among many
samples, it also says how many samples are nearer to a training image than the nearest 1% of
held-out images are; about 1% would be so by chance.

nearest.png has in each row a sample and then the training images nearest to it, the nearest first.

Distances are root mean square differences of pixels, 0 to 255, or with --by features Euclidean ones
in the features of fid.py's network. A sample that was learned by heart still bears the error of the
tokenizer; --tokenizer compares with what the tokenizer makes of the images, and such a sample is
then at 0. Pixels miss copies that are mirrored or shifted; training images are compared as middle
squares.
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
from pretokenize import BUNDLED, Images, center_crop, default_val, load_batches, save_grid
from sample import count_copies
from tokenizer import HelpFormatter, InputError, Tokenizer, to_float, to_uint8, whole


def pixel_vectors(images):
    """uint8 (B, H, W, 3) -> (B, d), the distance of two rows being the root mean square difference
    of their pixels."""
    pixels = images.flatten(1).float()
    return pixels / pixels.shape[1] ** 0.5


def feature_vectors(network):
    """The same with the features of a network of fid.py."""

    def vectors(images):
        # Without TF32, as in fid.py
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return network(images)["pool"].float()

    return vectors


def load_vectors(images, numbers, size, vectors_of, tokenizer, args, device):
    """Yields the rows (B, d) of the images `numbers`, or of what a tokenizer makes of them, in
    batches."""

    def load(number):
        return center_crop(images.open(number), size)

    batches = [batch.tolist() for batch in torch.tensor(numbers).split(args.batch_size)]
    loader = load_batches(load, batches, args.num_workers)
    for batch in tqdm(loader, total=len(batches), unit="batch", leave=False):
        batch = batch.to(device)  # (B, H, W, 3) uint8
        if tokenizer is not None:
            x = to_float(batch.permute(0, 3, 1, 2))
            batch = to_uint8(tokenizer.decode(tokenizer.encode(x))).to(device)
        yield vectors_of(batch)


def nearest(queries, batches, k):
    """The k nearest of all rows in batches (B, d) to each query (n, d): distances and numbers, both
    (n, k), the nearest first and of equal ones the first. Holds one batch at a time."""
    distances = queries.new_empty(len(queries), 0)
    numbers = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    first = 0
    for rows in batches:
        # Not by products of matrices, whose rounding gives copies a distance above 0
        mode = "donot_use_mm_for_euclid_dist"
        distances = torch.cat([distances, torch.cdist(queries, rows, compute_mode=mode)], 1)
        of_batch = torch.arange(first, first + len(rows), device=queries.device)
        numbers = torch.cat([numbers, of_batch.expand(len(queries), -1)], 1)
        distances, order = distances.sort(stable=True)
        distances = distances[:, :k]
        numbers = numbers.gather(1, order[:, :k])
        first += len(rows)
    return distances.cpu(), numbers.cpu()


def spread(count, length):
    """`count` whole numbers spread evenly over 0 to length - 1, or all if there are fewer. Both
    ends are among them: steps of length / count would often meet one class of samples alone."""
    return np.linspace(0, length - 1, min(count, length), dtype=int).tolist()


def parse_args():
    parser = argparse.ArgumentParser(description="Samples beside the nearest training images.",
                                     formatter_class=HelpFormatter)
    flag = parser.add_argument
    flag("samples", nargs="?", default="out/samples.npz", help="npz of sample.py")
    flag("--data", help="training images: a folder, zip, or path into a zip; by default the "
         "bundled ones for 28 x 28 samples")
    flag("--val_data",
         help="held-out images; by default the folder val beside a --data named train, if any")
    flag("--by", default="pixels", choices=["pixels", "features"], help="what distances are of")
    flag("--tokenizer",
         help="tokenizer file: compare with what it makes of the images, not with the images")
    flag("--num", type=whole(1), default=1000,
         help="samples, the first ones, and held-out images whose distances are measured")
    flag("--rows", type=whole(1), default=10, help="rows of nearest.png, samples of the whole file")
    flag("--columns", type=whole(1), default=5, help="training images in each row of it")
    flag("--out", help="folder for nearest.png; by default that of the samples")
    flag("--inception", metavar="FILE", help="torch-fidelity's weights, else they are downloaded")

    # Machine
    flag("--batch_size", type=whole(1), default=100, help="images at a time")
    flag("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"],
         help="auto is what torch finds")
    flag("--num_workers", type=whole(0), default=min(8, os.cpu_count()),
         help="threads that decode images")
    return parser.parse_args()


@torch.no_grad()
def main():
    args = parse_args()
    available = "cpu"
    if torch.accelerator.is_available():
        available = torch.accelerator.current_accelerator().type  # cuda, or mps on a Mac
    if args.device not in ("auto", "cpu", available):
        raise InputError(f"--device {args.device}: torch finds only {available} here")
    device = torch.device(available if args.device == "auto" else args.device)

    # Data
    samples = fid.NpzImages(args.samples)
    total, size, width, _ = samples.shape
    if size != width:
        raise InputError(f"{args.samples} holds images of {size} x {width}, squares are needed")
    if args.data is None and size != 28:
        raise InputError(f"{args.samples} holds images of {size} x {size}, which are not of the "
                         "bundled data: --data says what the model was trained on")
    data = args.data or str(BUNDLED / "train")
    val_data = args.val_data or default_val(data)
    images = Images(data)
    tokenizer = None
    if args.tokenizer is not None:
        tokenizer = Tokenizer.load(args.tokenizer).to(device)
        if tokenizer.cfg.image_size != size:
            raise InputError(f"{args.tokenizer} is for images of {tokenizer.cfg.image_size} pixels,"
                             f" {args.samples} holds {size} x {size}")
    vectors_of = pixel_vectors
    if args.by == "features":
        vectors_of = feature_vectors(fid.feature_network("auto", size, args.inception, device)[1])

    # Copies among the samples
    starts = range(0, total, args.batch_size)
    copies = count_copies(samples.read(i, min(i + args.batch_size, total)) for i in starts)
    print(f"{args.samples}: {total} images, {copies} of them exact copies of an earlier one",
          flush=True)

    # The rows whose neighbours are wanted: the first samples, those of the picture, and held-out
    # images spread evenly, because they are sorted by class
    count = min(args.num, total)
    shown = np.concatenate([samples.read(i, i + 1) for i in spread(args.rows, total)])
    chosen = torch.from_numpy(np.concatenate([samples.read(0, count), shown]))
    queries = [vectors_of(batch.to(device)) for batch in chosen.split(args.batch_size)]
    if val_data:
        held_out = Images(val_data)
        numbers = spread(count, len(held_out))
        queries += load_vectors(held_out, numbers, size, vectors_of, tokenizer, args, device)
    queries = torch.cat(queries)  # (count + rows of the picture + held-out images, d)

    # Their nearest training images
    batches = load_vectors(images, range(len(images)), size, vectors_of, tokenizer, args, device)
    distances, neighbours = nearest(queries, batches, args.columns)

    # Picture
    path = Path(args.out or Path(args.samples).parent) / "nearest.png"
    grid = []
    for sample, numbers in zip(shown, neighbours[count:].tolist()):
        crops = [center_crop(images.open(i), size) for i in numbers]
        grid.append(np.stack([sample, *crops]))
    save_grid(path, grid)
    print(f"{path}: in each row a sample and the {len(grid[0]) - 1} training images nearest to it")

    # Numbers
    of_samples = distances[:count, 0]
    print(f"median distance of {args.by} to the nearest of {len(images)} training images")
    print(f"  of {count} samples: {of_samples.quantile(0.5):.2f}")
    if not val_data:
        print(f"  of held-out images: none, there is no folder val beside {data} (--val_data)")
        return
    of_held_out = distances[count + len(shown) :, 0]
    near = (of_samples <= of_held_out.quantile(0.01)).sum()
    print(f"  of {len(of_held_out)} held-out images: {of_held_out.quantile(0.5):.2f}")
    print(f"nearer than the nearest 1% of held-out images: {near} samples ({near / count:.1%})")
    copied = (of_held_out == 0).sum()
    if len(of_held_out) < 100:
        print("note: 1% of fewer than 100 images is the nearest alone, which says little")
    if copied > 0:
        print(f"note: {copied} of the held-out images have a training image at distance 0, so they "
              "do not show what a model does that copies nothing")


if __name__ == "__main__":
    main()
