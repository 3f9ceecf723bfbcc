"""Stage 1.5: images in, tokens out. Every training image becomes one row of codes in out/codes.npz.

    python pretokenize.py                               # bundled data, out/tokenizer.safetensors
    python pretokenize.py --data my_images --crops center --flip        # a folder of class folders
    torchrun --nproc_per_node 8 pretokenize.py --crops ten \\
        --data imagenet.zip/ILSVRC/Data/CLS-LOC/train

A run that was stopped goes on where it was. This file also holds what the other scripts need of
images: reading them out of folders and zips, ADM's crops, and picture sheets.
"""

import argparse
import collections
import csv
import functools
import hashlib
import io
import json
import math
import os
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from tokenizer import (Block, HelpFormatter, InputError, Tokenizer, attention_backend, to_float,
                       whole, writing)

BUNDLED = Path(__file__).parent / "data" / "fashion_mnist.zip"
EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}
PART_SIZE = 500  # images in a part file, see `join_parts`


# Images in folders and zips


def split_zip(path):
    """Splits a/b.zip/c/d into a/b.zip and "c/d/"; gives None and "" where there is no zip."""
    path = Path(path)
    for parent in (path, *path.parents):
        if parent.suffix.lower() == ".zip" and parent.is_file():
            inside = path.relative_to(parent).as_posix()
            return parent, "" if inside == "." else f"{inside}/"
    return None, ""


class Images:
    """The images under a folder, or under a path into a zip file that is read as it is.

    names: sorted paths below it. classes: sorted names of the first folders on these paths.
    labels: (len(images),) int64, the class of each image. A flat folder has a single class, unless
    Kaggle's LOC_val_solution.csv stands in a folder above it (ImageNet's validation set).
    """

    def __init__(self, path):
        self.archive, inside = split_zip(path)
        if self.archive:
            try:
                self.zip = zipfile.ZipFile(self.archive)  # may be read by several threads
            except (zipfile.BadZipFile, OSError) as error:
                raise InputError(f"{self.archive} is not a whole zip file: {error}") from None
            self.root = inside
            names = [name[len(inside) :] for name in self.zip.namelist() if name.startswith(inside)]
        elif Path(path).is_dir():
            self.root = f"{path}/"
            names = list_files(path)
        else:
            raise InputError(f"{path} is no folder, no zip file and no path into a zip file")
        self.names = sorted(name for name in names if is_image(name))
        if not self.names:
            raise InputError(f"{path} holds no images ({' '.join(sorted(EXTENSIONS))})")
        folders = [name.split("/")[0] if "/" in name else "" for name in self.names]
        if set(folders) == {""}:  # all images lie side by side
            folders = self.classes_of_kaggle() or folders
        classes, labels = np.unique(folders, return_inverse=True)
        self.classes = classes.tolist()
        self.labels = torch.from_numpy(labels.astype(np.int64))

    def classes_of_kaggle(self):
        """The class of each image by LOC_val_solution.csv, or None where there is none."""
        for folder in (Path(self.root), *Path(self.root).parents):
            table = folder / "LOC_val_solution.csv"
            try:
                text = self.read(table.as_posix()).decode()
            except (KeyError, OSError):
                continue
            try:
                rows = list(csv.reader(text.splitlines()))[1:]
                classes = {stem: boxes.split()[0] for stem, boxes in rows}
                return [classes[Path(name).stem] for name in self.names]
            except (ValueError, IndexError, KeyError) as error:
                raise InputError(f"{table} is not Kaggle's table of the images here, with rows as "
                                 f"ILSVRC2012_val_1,n01751748 ... ({error})") from None
        return None

    def drop_classes(self):
        """From now on all images are of one class."""
        self.classes = ["all"]
        self.labels[:] = 0

    def read(self, name):
        """The bytes of a file, by its path in the zip or on disk."""
        return self.zip.read(name) if self.archive else Path(name).read_bytes()

    def __len__(self):
        return len(self.names)

    def open(self, index):
        """A PIL image in RGB, whatever the file's mode or extension. Raises InputError."""
        name = self.root + self.names[index]
        place = f"{name} in {self.archive}" if self.archive else name
        return open_image(place, lambda: self.read(name))

    def digest(self, contents=False):
        """A short hash of the names; with `contents` also of what changes when an image is replaced
        under its name: checksums in a zip, sizes and times in a folder."""
        sha = hashlib.sha256("\n".join(self.names).encode())
        if contents and self.archive:
            for name in self.names:
                sha.update(b"%d " % self.zip.getinfo(self.root + name).CRC)
        elif contents:
            for name in self.names:
                stat = os.stat(self.root + name)
                sha.update(b"%d %d " % (stat.st_size, stat.st_mtime_ns))
        return sha.hexdigest()[:16]


def open_image(name, read):
    """A PIL image in RGB of the bytes that read() returns. Raises InputError with the name."""
    try:
        with Image.open(io.BytesIO(read())) as image:
            if image.mode.startswith("I"):  # 16 bits of grey, which PIL would clip, not scale
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise InputError(f"{name} cannot be read as an image: PIL knows no such format") from None
    except Exception as error:  # PIL, zipfile and zlib raise a dozen kinds
        raise InputError(f"{name} cannot be read as an image: {error}") from None


def list_files(folder):
    """Paths of all files below a folder, relative to it, with forward slashes."""

    def fail(error):
        raise InputError(f"{error.filename} cannot be read: {error.strerror}")

    names = []
    for parent, _, files in os.walk(folder, onerror=fail, followlinks=True):
        for file in files:
            path = os.path.relpath(os.path.join(parent, file), folder)
            names.append(path.replace(os.sep, "/"))
    return names


def is_image(name):
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith("__MACOSX")


def default_val(data):
    """The path `val` beside training images at a path `train`, or None if nothing is there."""
    if Path(data).name != "train":
        return None
    val = Path(data).with_name("val")
    archive, inside = split_zip(val)
    if archive is None:
        return str(val) if val.is_dir() else None
    with zipfile.ZipFile(archive) as file:
        return str(val) if any(name.startswith(inside) for name in file.namelist()) else None


# Crops, as in ADM (guided-diffusion), whose statistics are the reference of every ImageNet gFID


def shrink(image, shorter):
    """Shorter side to `shorter`: halved by a box filter while it is at least twice that, then
    bicubic."""
    while min(image.size) >= 2 * shorter:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = shorter / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, Image.Resampling.BICUBIC)


def cut(image, size, top, left):
    return np.asarray(image)[top : top + size, left : left + size]


def center_crop(image, size):
    """PIL image -> uint8 (size, size, 3): shorter side to `size`, then the middle square."""
    image = shrink(image, size)
    return cut(image, size, top=(image.height - size) // 2, left=(image.width - size) // 2)


def random_crop(image, size, rng):
    """Shorter side to a random length from size to size / 0.8, then a random square."""
    image = shrink(image, rng.randint(size, math.ceil(size / 0.8)))
    top = rng.randint(0, image.height - size)
    left = rng.randint(0, image.width - size)
    return cut(image, size, top, left)


def five_crops(image, size):
    """The corners and the middle of the centre crop of side 1.1 * size (281 for 256): the corners
    of the whole picture would be of another distribution than the reference's centre crops."""
    square = center_crop(image, int(1.1 * size))
    end = len(square) - size
    places = [(0, 0), (0, end), (end, 0), (end, end), (round(end / 2), round(end / 2))]
    return [cut(square, size, top, left) for top, left in places]


def no_crop(image, size, name):
    """The image as it is. Raises InputError unless it is size x size."""
    if image.size != (size, size):
        raise InputError(f"{name} is {image.width} x {image.height}; without a crop every image "
                         f"must be {size} x {size}")
    return np.asarray(image)


# Batches


def load_batches(load, batches, num_workers):
    """Yields for each list of keys in `batches` the tensor stack([load(key) for key in list]).

    Threads load the next two batches while one is in use. Threads suffice, because PIL reads,
    decodes and resizes outside Python's lock; there are no processes to end or to share files with.
    """

    def stack(arrays):
        return torch.from_numpy(np.stack(arrays))

    if num_workers == 0:
        for keys in batches:
            yield stack([load(key) for key in keys])
        return
    pool = ThreadPoolExecutor(num_workers)
    try:
        waiting = collections.deque()
        for keys in batches:
            waiting.append([pool.submit(load, key) for key in keys])
            if len(waiting) > 2:
                yield stack([future.result() for future in waiting.popleft()])
        while waiting:
            yield stack([future.result() for future in waiting.popleft()])
    finally:  # also when one of them has failed, or nobody wants the rest
        pool.shutdown(cancel_futures=True)


# Files


def save_grid(path, rows):
    """Rows of uint8 images (n, H, W, 3) as one PNG, two white pixels between neighbours; images
    under 56 pixels are enlarged."""
    height, width = rows[0].shape[1:3]
    scale = max(1, 56 // height)
    height = scale * height + 2
    width = scale * width + 2
    columns = max(len(row) for row in rows)
    sheet = np.full((len(rows) * height + 2, columns * width + 2, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(np.asarray(row)):
            large = image.repeat(scale, 0).repeat(scale, 1)
            top = i * height + 2
            left = j * width + 2
            sheet[top : top + height - 2, left : left + width - 2] = large
    with writing(path) as temporary:
        Image.fromarray(sheet).save(temporary, "png")


def parts_folder(target, settings):
    """The hidden folder beside the file `target` for its parts. The name holds a hash of all that
    the parts depend on, so that a run never goes on with those of another."""
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return target.with_name(f".{target.name}.{key}.parts")


def part_file(folder, part):
    return folder / f"{part:06}.npy"


def join_parts(target, name, folder, count, **others):
    """Writes the arrays of `count` part files, one behind the other, as `name` into the .npz
    `target`, and `others` beside it; then removes the parts. At most two parts are in memory."""
    parts = [part_file(folder, part) for part in range(count)]
    first = np.load(parts[0])
    rows = (count - 1) * len(first) + len(np.load(parts[-1]))
    header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False,
              "shape": (rows, *first.shape[1:])}
    with writing(target) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_2_0(file, header)
            for part in parts:
                file.write(np.load(part).tobytes())
        for key, value in others.items():
            with archive.open(f"{key}.npy", "w") as file:
                np.lib.format.write_array(file, np.asanyarray(value), allow_pickle=False)
    shutil.rmtree(folder)


# The script


def views(images, index, size, crops, flip):
    """All views of one image that are tokenized: uint8 (views, 3, size, size), mirrored ones last.
    """
    image = images.open(index)
    if crops == "ten":
        result = five_crops(image, size)
    elif crops == "center":
        result = [center_crop(image, size)]
    else:
        result = [no_crop(image, size, images.names[index])]
    if flip or crops == "ten":
        result = result + [view[:, ::-1] for view in result]
    return np.ascontiguousarray(np.stack(result).transpose(0, 3, 1, 2))


@torch.no_grad()
def tokenize(tokenizer, images, target, args, crops, flip, device, autocast, rank, world_size):
    """Writes codes (images, views, K+N) uint16, labels and config of all images to `target`."""
    cfg = tokenizer.cfg
    config = dict(
        tokenizer=asdict(cfg),
        fingerprint=tokenizer.fingerprint(),
        classes=images.classes,
        names=images.digest(contents=True),
        crops=crops,
        flip=flip,
        dtype=args.dtype,
    )
    load = functools.partial(views, images, size=cfg.image_size, crops=crops, flip=flip)
    num_views = len(load(0))

    # In parts: each rank writes whole files of its own and skips what an earlier run has written
    folder = parts_folder(target, config)
    parts = list(torch.arange(len(images)).split(PART_SIZE))
    of_rank = range(rank, len(parts), world_size)
    missing = [i for i in of_rank if not part_file(folder, i).exists()]
    images_per_batch = max(1, args.batch_size // world_size // num_views)
    batches = [batch.tolist() for i in missing for batch in parts[i].split(images_per_batch)]
    loader = load_batches(load, batches, args.num_workers)
    total = sum(len(parts[i]) for i in missing)
    progress = tqdm(total=total, desc=str(target), unit="image", disable=rank > 0)
    for i in missing:
        codes = []
        for _ in parts[i].split(images_per_batch):
            x = next(loader).to(device)  # (B, views, 3, H, W)
            with autocast:
                batch_codes = tokenizer.encode(to_float(x.flatten(0, 1)))  # (B*views, K+N)
            codes.append(batch_codes.unflatten(0, (-1, num_views)).cpu())  # (B, views, K+N)
            progress.update(len(x))
        with writing(part_file(folder, i)) as temporary, open(temporary, "wb") as file:
            np.save(file, torch.cat(codes).numpy().astype(np.uint16))
    progress.close()
    if world_size > 1:
        dist.barrier()

    # One file of all parts
    if rank == 0:
        join_parts(target, "codes", folder, len(parts), labels=images.labels.numpy(),
                   config=json.dumps(config))
        length = cfg.num_prologue + cfg.num_visual
        print(f"{target}: {len(images)} images x {num_views} crops x {length} codes", flush=True)


def parse_args():
    parser = argparse.ArgumentParser(description="Turn images into tokens.",
                                     formatter_class=HelpFormatter)
    flag = parser.add_argument
    flag("--data", default=str(BUNDLED / "train"),
         help="training images: a folder, zip, or path into a zip, with a folder for each class")
    flag("--val_data",
         help="held-out images; by default the folder val beside a --data named train, if any")
    flag("--tokenizer", help="tokenizer file; by default tokenizer.safetensors in --out")
    flag("--crops", default="center", choices=["none", "center", "ten"],
         help="none: the images have the size already; center: the middle square; ten: corners and "
         "middle of a 1.1 times larger square, each also mirrored")
    flag("--flip", action="store_true", help="add a mirrored copy of each crop (ten has them)")
    flag("--out", default="out", help="folder for everything that is written and looked for")
    flag("--batch_size", type=whole(1), default=256, help="crops at a time, over all ranks")
    flag("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"],
         help="auto is what torch finds")
    flag("--dtype", default="fp32", choices=["fp32", "bf16"],
         help="of the networks, fp32 on CUDA with TF32 products; the code search is always exact")
    flag("--compile", action="store_true", help="torch.compile the encoder")
    flag("--num_workers", type=whole(0), default=min(8, os.cpu_count()),
         help="threads that decode images, per rank")
    return parser.parse_args()


@torch.no_grad()
def main():
    args = parse_args()
    out = Path(args.out)

    # Device and ranks: torchrun sets these variables, without it one process does everything
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    available = "cpu"
    if torch.accelerator.is_available():
        available = torch.accelerator.current_accelerator().type  # cuda, or mps on a Mac
    if args.device not in ("auto", "cpu", available):
        raise InputError(f"--device {args.device}: torch finds only {available} here")
    device = torch.device(available if args.device == "auto" else args.device)
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32; exact_fp32 turns it off where it counts
    if args.compile and device.type == "cpu" and not shutil.which("g++"):
        raise InputError("--compile needs the compiler g++ on a CPU, and there is none here")
    if world_size > 1:
        # Ranks may wait for hours for the one with the most parts left to make.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=12))
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    autocast = torch.autocast(device.type, dtype, enabled=args.dtype == "bf16")
    if rank == 0:
        backend = attention_backend(device, dtype)
        print(f"{world_size} x {device.type}, {args.dtype}, attention by {backend}", flush=True)

    # Tokenizer
    tokenizer_path = Path(args.tokenizer or out / "tokenizer.safetensors")
    tokenizer = Tokenizer.load(tokenizer_path).to(device)
    cfg = tokenizer.cfg
    if max(cfg.codebook_size, cfg.prologue_codebook_size) > 2**16:
        raise InputError(f"{tokenizer_path} has a codebook of more than {2**16} codes, the most "
                         "that a token file can hold")
    if args.compile:
        for module in tokenizer.modules():
            if isinstance(module, Block):
                module.compile(dynamic=False)

    # Images
    images = Images(args.data)
    val_data = args.val_data or default_val(args.data)
    val_images = Images(val_data) if val_data else None
    if val_images is not None and val_images.classes != images.classes:
        val_images = None
        if rank == 0:
            print(f"{val_data} has other classes than {args.data}: no held-out tokens are made")

    # Held-out images first, with one crop each: they are few, and a run that goes on later makes
    # them anew
    where = dict(device=device, autocast=autocast, rank=rank, world_size=world_size)
    val_target = out / "codes_val.npz"
    if val_images is not None:
        val_crops = "none" if args.crops == "none" else "center"
        tokenize(tokenizer, val_images, val_target, args, crops=val_crops, flip=False, **where)
    elif rank == 0 and val_target.exists():
        val_target.unlink()  # held-out tokens of an earlier run would not belong to these
    tokenize(tokenizer, images, out / "codes.npz", args, crops=args.crops, flip=args.flip, **where)

    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
