"""Stage 1.5: images in, tokens out. Every training image becomes one row of codes in out/codes.npz, once.

    python pretokenize.py                                                  # embedded data, out/tokenizer.safetensors
    python pretokenize.py --data my_images/ --crops center --flip          # a folder of class folders
    torchrun --nproc_per_node 8 pretokenize.py --data imagenet.zip/ILSVRC/Data/CLS-LOC/train --crops ten

The file also holds the data set that stage 1 trains on: a folder or a zip of images, and ADM's crops.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import signal
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common import InputError, Machine, SharedRows, common_flags, run, to_float
from tokenizer import Tokenizer

EMBEDDED = Path(__file__).parent / "data" / "fashion_mnist.zip"
EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}
ZIPS = {}  # one open handle per process and archive: a forked worker must not share its parent's file position


def split_zip(path):
    """"a/b.zip/c/d" -> ("a/b.zip", "c/d/"); (None, "") for a path that leads through no zip file."""
    path = Path(path)
    for part in (path, *path.parents):
        if part.suffix.lower() == ".zip" and part.is_file():
            inside = path.relative_to(part).as_posix()
            return part, "" if inside == "." else inside + "/"
    return None, ""


def open_zip(archive):
    key = (os.getpid(), str(archive))
    if key not in ZIPS:
        try:
            ZIPS[key] = zipfile.ZipFile(archive)
        except zipfile.BadZipFile:
            raise InputError(f"{archive} is not a whole zip file") from None
    return ZIPS[key]


def shrink(image, shorter):
    """Shorter side to `shorter`: halved with a box filter while it is at least twice that, then bicubic (ADM's way)."""
    while min(image.size) >= 2 * shorter:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = shorter / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def crop(image, size, top, left):
    return np.asarray(image)[top:top + size, left:left + size]


def center_crop(image, size):
    """PIL image -> (size, size, 3) uint8: shorter side to `size`, middle square. ADM's evaluation crop."""
    image = shrink(image, size)
    return crop(image, size, (image.height - size) // 2, (image.width - size) // 2)


def random_crop(image, size, rng):
    """ADM's training crop: shorter side to a random length in [size, size / 0.8], then a random square."""
    image = shrink(image, rng.randint(size, math.ceil(size / 0.8)))
    return crop(image, size, rng.randint(0, image.height - size), rng.randint(0, image.width - size))


def five_crops(image, size):
    """Shorter side to 1.1 * size (281 for 256), the four corners and the centre."""
    image = shrink(image, int(1.1 * size))
    bottom, right = image.height - size, image.width - size
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)]
    return [crop(image, size, top, left) for top, left in corners]


def ignore_signals(_):
    """For DataLoader workers: a signal to the whole job asks the trainer to save, and it needs them to finish its step."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)


class Images(torch.utils.data.Dataset):
    """The images under a folder or under a path into a zip; the classes are the sorted names of the folders there.
    A key is (visit, index). An item is (uint8 tensor (views, 3, size, size), index): every view of the image by `crops`
    "none", "center" or "ten", or with `train` one view, whose random crop and mirroring are a function of (seed, visit).
    A flat folder takes its classes from LOC_val_solution.csv above it, if there is one (Kaggle's ImageNet). Raises InputError.
    """

    def __init__(self, path, size, crops="center", flip=False, seed=0, train=False):
        self.size, self.crops, self.flip, self.seed, self.train = size, crops, flip, seed, train
        self.archive, inside = split_zip(path)
        if self.archive:
            self.root, names = inside, [n[len(inside):] for n in open_zip(self.archive).namelist() if n.startswith(inside)]
        elif Path(path).is_dir():
            self.root = str(path)
            names = [os.path.relpath(os.path.join(folder, name), path).replace(os.sep, "/")
                     for folder, _, files in os.walk(path, followlinks=True) for name in files]
        else:
            raise InputError(f"data path {path} does not exist: a folder, a zip file or a path into a zip file is needed")
        self.names = sorted(n for n in names if os.path.splitext(n)[1].lower() in EXTENSIONS and not n.startswith("__MACOSX"))
        if not self.names:
            raise InputError(f"{path} holds no images ({' '.join(sorted(EXTENSIONS))})")
        folders = [n.rpartition("/")[0].split("/")[0] for n in self.names]
        if set(folders) == {""} and (table := self.find_csv()):
            folders = [table.get(Path(n).stem, "") for n in self.names]
        classes, self.labels = np.unique(folders, return_inverse=True)
        self.classes, self.unreadable = classes.tolist(), set()

    def find_csv(self):
        """{file stem: class} of the LOC_val_solution.csv in a folder above the images, or None."""
        for folder in (Path(self.root), *Path(self.root).parents):
            file = folder / "LOC_val_solution.csv"
            try:
                text = open_zip(self.archive).read(file.as_posix()).decode() if self.archive else file.read_text()
            except (KeyError, OSError):
                continue
            return {stem: boxes.split()[0] for stem, boxes in (line.split(",") for line in text.splitlines()[1:])}

    def __len__(self):
        return len(self.names)

    def digest(self):
        """A short hash of the images' names."""
        return hashlib.sha256("\n".join(self.names).encode()).hexdigest()[:16]

    def open(self, index):
        """PIL image in RGB, whatever the file's mode or extension. Raises InputError with the file's name."""
        name = self.names[index]
        try:
            file = open_zip(self.archive).open(self.root + name) if self.archive else open(os.path.join(self.root, name), "rb")
            with file, Image.open(file) as image:
                if image.mode.startswith("I"):  # 16 bits of grey, which PIL would clip instead of scaling
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                return image.convert("RGB")
        except InputError:
            raise
        except Exception as error:  # PIL, zipfile and zlib raise a dozen kinds
            raise InputError(f"{name} in {self.archive or self.root} cannot be read as an image: {error}") from None

    def views(self, image, visit):
        """The views (size, size, 3) of one image; mirrored copies stand after the crops."""
        rng = random.Random(f"{self.seed} {visit}")
        if self.crops == "none":
            views = [np.asarray(image)]
        elif self.crops == "random":
            views = [random_crop(image, self.size, rng)]
        else:
            views = five_crops(image, self.size) if self.crops == "ten" else [center_crop(image, self.size)]
        if self.train:
            return [v[:, ::-1] for v in views] if self.flip and rng.random() < 0.5 else views
        return views + [v[:, ::-1] for v in views] if self.flip or self.crops == "ten" else views

    def __getitem__(self, key):
        visit, index = key
        image, problem = None, ""
        try:
            image = self.open(index)
        except InputError as error:  # the next image of its class that can be read takes its place
            problem, same = str(error), np.flatnonzero(self.labels == self.labels[index])
            for i in np.roll(same, -np.searchsorted(same, index))[1:10]:
                with contextlib.suppress(InputError):
                    image = image or self.open(i)
            if image is None:
                raise
        if self.crops == "none" and image.size != (self.size, self.size):
            raise InputError(f"{self.names[index]} is {image.width} x {image.height}; without a crop every image must be "
                             f"{self.size} x {self.size}")
        views = np.ascontiguousarray(np.stack(self.views(image, visit)).transpose(0, 3, 1, 2))  # (views, 3, size, size)
        return torch.from_numpy(views), index, problem

    def batches(self, keys, num_workers):
        """Yields uint8 (B, views, 3, size, size) and indices (B,) for lists of keys. Unreadable images are named and counted;
        more than 0.1% of them raise InputError."""
        for views, index, problems in torch.utils.data.DataLoader(
                self, batch_sampler=keys, num_workers=num_workers, worker_init_fn=ignore_signals,
                pin_memory=torch.cuda.is_available()):
            for i, problem in zip(index.tolist(), problems):
                if problem and i not in self.unreadable:
                    self.unreadable.add(i)
                    if len(self.unreadable) > len(self) / 1000:
                        raise InputError(f"{problem} ({len(self.unreadable)} such of {len(self)}, more than 0.1%)")
                    print(f"skipped: {problem}", file=sys.stderr, flush=True)
            yield views, index


@torch.no_grad()
def tokenize(tokenizer, images, machine, args, target, fields):
    """Codes of every view of every image, uint16 (images, views, K+N), into the .npz `target`; returns them on rank 0."""
    shape = (len(images), len(images[0, 0][0]), tokenizer.cfg.num_prologue + tokenizer.cfg.num_visual)
    rows = SharedRows(target, shape, np.uint16, machine, key=(fields["config"], images.digest()))
    todo, step = rows.missing(), max(1, args.batch_size // machine.world // shape[1])
    keys = [[(i, i) for i in todo[j:j + step].tolist()] for j in range(0, len(todo), step)]
    for batch, index in tqdm(images.batches(keys, args.num_workers), desc=str(target), unit="batch", total=len(keys),
                             disable=machine.rank > 0):
        with machine.autocast():
            part = tokenizer.encode(to_float(batch.flatten(0, 1).to(machine.device)))  # (images*views, K+N)
        rows.write(index.numpy(), part.view(len(batch), *shape[1:]).cpu().numpy())
    rows.pack("codes", **fields)
    return rows.array


def parse_args():
    parser = argparse.ArgumentParser(description="Turn images into tokens.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--data", default=str(EMBEDDED / "train"), help="training images: a folder, or a path into a zip, of class folders")
    flag("--val_data", help="held-out images; by default the folder val beside a --data named train, if there is one")
    flag("--tokenizer", help="tokenizer file or released directory; by default tokenizer.safetensors in --out")
    flag("--crops", default="center", choices=["none", "center", "ten"],
         help="none: images already have the size; center: the middle square; ten: 4 corners and centre, each mirrored")
    flag("--flip", action="store_true", help="add a mirrored copy of each crop (always so with ten)")
    common_flags(parser, batch_size=256)
    return parser.parse_args()


def default_val(data):
    """The folder `val` beside a training folder `train`, or None."""
    beside = Path(data).parent / "val"
    archive, inside = split_zip(beside)
    exists = any(n.startswith(inside) for n in open_zip(archive).namelist()) if archive else beside.is_dir()
    return str(beside) if Path(data).name == "train" and exists else None


def main():
    args = parse_args()
    machine = Machine(args)
    path = args.tokenizer or Path(args.out) / "tokenizer.safetensors"
    tokenizer = Tokenizer.load(path).to(machine.device)
    if max(tokenizer.cfg.codebook_size, tokenizer.cfg.prologue_codebook_size) > 2**16:
        raise InputError(f"{path} has a codebook of more than {2**16} codes, the most that a token file can hold")
    val_data = args.val_data or default_val(args.data)
    jobs = [(args.data, "codes.npz", args.crops, args.flip)]
    jobs += [(val_data, "codes_val.npz", "none" if args.crops == "none" else "center", False)] if val_data else []
    if machine.compile:
        for part in {tokenizer.encoder, getattr(tokenizer, "post_encoder", tokenizer.encoder)}:
            part.transformer.compile()
    classes = None
    for data, name, crops, flip in jobs:
        images = Images(data, tokenizer.cfg.image_size, crops, flip)
        if classes not in (None, images.classes):
            machine.print(f"{data} has other classes than {args.data}: no held-out tokens are made of it")
            continue
        classes = images.classes
        config = {"tokenizer": asdict(tokenizer.cfg), "fingerprint": tokenizer.fingerprint(), "classes": classes,
                  "data": str(data), "crops": crops, "flip": flip}
        codes = tokenize(tokenizer, images, machine, args, Path(args.out) / name,
                         dict(labels=images.labels, config=json.dumps(config)))
        if machine.rank == 0:
            used = [len(np.unique(part)) for part in np.split(codes[:, 0], [tokenizer.cfg.num_prologue], axis=1)]
            print(f"{Path(args.out) / name}: {' x '.join(map(str, codes.shape))} images x crops x codes; the first crops use "
                  f"{used[0]} prologue codes, {used[1]} visual codes")


if __name__ == "__main__":
    run(main)
