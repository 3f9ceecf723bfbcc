"""Stage 1.5: images in, tokens out. Every training image becomes a row of out/codes.safetensors.

    python pretokenize.py                               # bundled data, out/tokenizer.safetensors
    python pretokenize.py --data my_images --crop center --flip         # a folder of class folders
    torchrun --nproc_per_node 8 pretokenize.py --crop ten \\
        --data imagenet.zip/ILSVRC/Data/CLS-LOC/train

A run that was stopped goes on where it was. This file also holds what the other scripts need of
images: reading them out of folders and zips, ADM's crops, and picture sheets.
"""

import argparse
import collections
import functools
import hashlib
import io
import itertools
import json
import math
import os
import posixpath
import re
import shutil
import unicodedata
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps, PngImagePlugin
from torchvision.utils import make_grid
from tqdm import tqdm

from tokenizer import Tokenizer, finish, read_safetensors, save_checkpoint, setup, writing

BUNDLED = Path(__file__).parent / "data" / "fashion_mnist.zip"
EXTENSIONS = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}
PART_SIZE = 500  # images in a part of the tokens
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # intact files have been seen with 2 MB of text

# Pixels


def to_float(images):
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1]"""
    return images.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def to_uint8(images):
    """(B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3) on the CPU. The 128 is 127.5 + 0.5 for
    rounding, because the cast truncates; to_uint8(to_float(x)) is x."""
    levels = (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu()


def psnr(a, b):
    """10 log10(255^2 / MSE) in dB of pairs of uint8 images: twice (B, H, W, 3) -> (B,)"""
    mse = (a.float() - b.float()).square().mean((1, 2, 3))
    return 10 * (255**2 / mse.clamp_min(1e-10)).log10()


# Images in folders and zips


def open_image(file, archive=None):
    """A PIL image in RGB of a file, or of an entry of the zip `archive`, whatever its mode and
    extension: upright, transparency on white, 16 bits scaled to 8."""
    place = f"{file} in {archive}" if archive else file
    if not archive and not os.path.isfile(file):  # to read from a pipe would wait for ever
        raise SystemExit(f"{place} is no regular file")
    try:
        source = io.BytesIO(open_zip(archive).read(file)) if archive else file
        with Image.open(source) as image:
            if image.mode in ("F", "I"):
                raise SystemExit(f"{place} holds floats or 32-bit integers, whose range is unknown:"
                                 " save it with 8 or 16 bits")
            if image.mode.startswith("I;16"):  # PIL would clip, not scale
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:  # PIL, zipfile and zlib raise a dozen kinds
        raise SystemExit(f"{place} cannot be read as an image: {error}") from None


def split_zip(path):
    """Splits a/b.zip/c/d into a/b.zip and "c/d/"; gives None and "" where there is no zip."""
    path = Path(path)
    for parent in (path, *path.parents):
        if parent.suffix.lower() == ".zip" and parent.is_file():
            inside = path.relative_to(parent).as_posix()
            return parent, "" if inside == "." else f"{inside}/"
    return None, ""


@functools.cache
def open_zip(archive):
    """One handle for all, threads included: to list Kaggle's two million entries takes 15 s."""
    try:
        return zipfile.ZipFile(archive)
    except (zipfile.BadZipFile, OSError) as error:
        raise SystemExit(f"{archive} is not a whole zip file: {error}") from None


def list_folder(folder):
    """Paths of all files below a folder; a linked folder is followed, once."""
    paths = []
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()  # a loop
        else:
            paths += [os.path.join(parent, file) for file in files]
        seen.add(real)
    return paths


class Images:
    """The images under a folder, or under a path into a zip file that is read as it is.

    names: sorted paths below it. classes: sorted names of the first folders on these paths.
    labels: (len(images),) int64, the class of each image. A flat folder has a single class, unless
    Kaggle's LOC_val_solution.csv stands in a folder above it (ImageNet's validation set).
    """

    def __init__(self, path):
        self.path = Path(path)
        self.archive, inside = split_zip(path)
        if self.archive:
            found = [(posixpath.normpath(name.replace("\\", "/")).lstrip("/"), name)
                     for name in open_zip(self.archive).namelist()]
            found = {name[len(inside) :]: place for name, place in found if name.startswith(inside)}
            if "dataset.json" in found:
                raise SystemExit(f"{path} is a dataset of StyleGAN, whose classes are in its "
                                 "dataset.json: sort its images into a folder for each class")
        elif self.path.is_dir():
            root = os.path.join(path, "")
            found = {place.removeprefix(root).replace(os.sep, "/"): place
                     for place in list_folder(path)}
        else:
            raise SystemExit(f"{path} is no folder, no zip file and no path into a zip file")
        self.names = sorted(name for name in found if is_image(name))
        self.places = [found[name] for name in self.names]
        if not self.names:
            raise SystemExit(f"{path} holds no images ({' '.join(sorted(EXTENSIONS))})")
        folders = [posixpath.dirname(name).split("/")[0] for name in self.names]
        tops = set(folders)
        # A zip of a folder has that folder alone at its top
        lone = len(tops) == 1 and all(name.count("/") > 1 for name in self.names)
        if lone or {"train", "val"} <= tops:
            raise SystemExit(f"{path} holds the folders {sorted(tops)} and not classes: add one of "
                             "them to the path")
        if "" in tops and len(tops) > 1:
            alone = self.names[folders.index("")]
            raise SystemExit(f"{path} holds the image {alone} beside folders: a folder for each "
                             "class, or all images side by side, is needed")
        if folders[0] == "":
            folders = self.classes_of_kaggle() or folders
        folders = [unicodedata.normalize("NFC", folder) for folder in folders]
        classes, labels = np.unique(folders, return_inverse=True)  # sorted
        self.classes = classes.tolist()
        self.labels = torch.from_numpy(labels)

    def classes_of_kaggle(self):
        """The class of each image by LOC_val_solution.csv, or None if no table is about them."""
        for folder in (self.path, *self.path.parents):
            file = folder / "LOC_val_solution.csv"
            archive, inside = split_zip(file)
            try:
                data = open_zip(archive).read(inside[:-1]) if archive else file.read_bytes()
            except (KeyError, OSError):
                continue
            table = dict(re.findall(r"^(\S+?),(\S+)", data.decode(), re.M))  # name,class ...
            classes = [table.get(Path(name).stem) for name in self.names]
            if all(classes):  # else it is about other images
                return classes
        return None

    def __len__(self):
        return len(self.names)

    def __str__(self):
        return f"{self.path}: {len(self)} images of {len(self.classes)} classes"

    def open(self, index):
        return open_image(self.places[index], self.archive)

    def digest(self):
        """A short hash of the names and of what changes when an image is replaced under its name:
        checksums in a zip, sizes and times in a folder."""
        sha = hashlib.sha256("\n".join(self.names).encode(errors="surrogateescape"))
        for place in self.places:
            if self.archive:
                sha.update(b"%d " % open_zip(self.archive).getinfo(place).CRC)
            else:
                stat = os.stat(place)
                sha.update(b"%d %d " % (stat.st_size, stat.st_mtime_ns))
        return sha.hexdigest()[:16]


def is_image(name):
    """By its extension; hidden files and what macOS adds to zips do not count."""
    hidden = any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
    return posixpath.splitext(name)[1].lower() in EXTENSIONS and not hidden


def default_val(data):
    """The path `val` beside training images at a path `train`, or None if nothing is there."""
    val = Path(data).parent / "val"
    archive, inside = split_zip(val)
    there = val.is_dir()
    if archive:
        there = any(name.startswith(inside) for name in open_zip(archive).namelist())
    return str(val) if there and Path(data).name == "train" else None


# Crops, as in ADM (guided-diffusion), whose statistics are the reference of every ImageNet gFID


def shrink(image, shorter):
    """Shorter side to `shorter`: halved by a box filter while it is at least twice that, then
    bicubic."""
    side = 16 * min(image.size)  # of a longer strip the middle: whole it would take gigabytes
    image = ImageOps.fit(image, (min(image.width, side), min(image.height, side)))
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


# Batches and picture sheets


def visited_images(seed, first, count, num_images):
    """Numbers (count,) of the images at the visits first, first + 1, ... Visits number what
    training reads, from 0, over all epochs and ranks; each epoch is a new random order. So a run
    can be resumed on another number of ranks."""
    visits = range(first, first + count)
    return [int(epoch_order(seed, v // num_images, num_images)[v % num_images]) for v in visits]


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, num_images):
    return np.random.default_rng((seed, epoch)).permutation(num_images)


def load_batches(load, batches, num_workers):
    """Yields for each list of keys in `batches` the tensor stack([load(key) for key in list]), with
    two more being loaded meanwhile. Threads suffice: PIL works outside Python's lock."""
    waiting = collections.deque()
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        for keys in itertools.chain(batches, [[], []]):  # the last two are not waited for
            waiting.append([pool.submit(load, key) for key in keys])
            if len(waiting) > 2:
                batch = [future.result() for future in waiting.popleft()]
                yield torch.from_numpy(np.stack(batch))


def save_grid(path, rows):
    """Rows of uint8 images (n, H, W, 3), all of one length, as one PNG, two white pixels between
    neighbours; images under 56 pixels are enlarged."""
    images = torch.from_numpy(np.concatenate(rows)).permute(0, 3, 1, 2)  # (n, 3, H, W)
    scale = max(1, 56 // images.shape[2])
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    sheet = make_grid(images, nrow=len(rows[0]), padding=2, pad_value=255)  # (3, height, width)
    with writing(path) as temporary:
        Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(temporary, "png")


# The script


def views(images, index, size, crop, flip):
    """All views of one image that are tokenized: uint8 (views, size, size, 3), mirrored ones last.
    The picture is mirrored before it is cut."""
    image = images.open(index)
    result = []
    for picture in (image, ImageOps.mirror(image))[: 1 + flip]:
        result += five_crops(picture, size) if crop == "ten" else [center_crop(picture, size)]
    return np.stack(result)


@torch.no_grad()
def tokenize(tokenizer, images, target, args, crop, flip, device, rank, world_size):
    """Writes codes (images, views, K+N) uint16 and labels (images,) to the file `target`."""
    cfg = dict(tokenizer=asdict(tokenizer.cfg), classes=images.classes, images=images.digest(),
               crop=crop, flip=flip)
    cfg["digest"] = hashlib.sha256(json.dumps(cfg).encode()).hexdigest()[:16]
    cfg["data"] = os.path.abspath(images.path)
    of_all = [cfg]
    if world_size > 1:
        dist.broadcast_object_list(of_all)  # nodes may have copies with other dates
    cfg = of_all[0]

    made = read_safetensors(target, "codes")[1] if target.exists() else {}
    if made.get("digest") == cfg["digest"]:
        return

    # In numbered parts, every rank its own; those of an earlier run with the same settings stay
    folder = Path(f"{target}.{cfg['digest']}.parts")
    parts = torch.arange(len(images)).split(PART_SIZE)
    files = [folder / f"{i}.pt" for i in range(len(parts))]
    missing = [i for i in range(rank, len(parts), world_size) if not files[i].exists()]
    num_views = (1 + flip) * (5 if crop == "ten" else 1)
    per_batch = max(1, args.batch_size // world_size // num_views)
    load = functools.partial(views, images, size=tokenizer.cfg.image_size, crop=crop, flip=flip)
    batches = [batch for i in missing for batch in parts[i].split(per_batch)]
    loader = load_batches(load, batches, args.num_workers)
    for i in tqdm(missing, desc=str(target), unit=f"{PART_SIZE} images", disable=rank > 0):
        codes = []
        for _ in parts[i].split(per_batch):
            x = next(loader).to(device)  # (B, views, H, W, 3)
            batch_codes = tokenizer.encode(to_float(x.flatten(0, 1)))  # (B*views, K+N)
            codes.append(batch_codes.unflatten(0, (-1, num_views)).cpu())  # (B, views, K+N)
        with writing(files[i]) as temporary:
            torch.save(torch.cat(codes).to(torch.uint16), temporary)
    if world_size > 1:
        dist.barrier()

    # One file of all parts
    if rank == 0:
        codes = torch.cat([torch.load(file, weights_only=True) for file in files])
        save_checkpoint(target, "codes", {"codes": codes, "labels": images.labels}, cfg)
        shutil.rmtree(folder)
        print(f"{target}: images x crops x codes {tuple(codes.shape)}", flush=True)


def parse_args():
    parser = argparse.ArgumentParser(description="Turn images into tokens.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--data", default=str(BUNDLED / "train"),
         help="training images: a folder, zip, or path into a zip, with a folder for each class")
    flag("--val_data", help="held-out images; else the folder val beside a --data named train")
    flag("--tokenizer", help="tokenizer file; else tokenizer.safetensors in --out")
    flag("--crop", default="center", choices=["center", "ten"], help="ten: corners and middle of a "
         "1.1 times larger square, each also mirrored")
    flag("--flip", action="store_true", help="add mirrored copies (ten has them)")
    flag("--out", default="out", help="folder for everything that is written and looked for")
    flag("--batch_size", type=int, default=256, help="crops at a time, over all ranks")
    flag("--device", default="auto", help="cuda, mps or cpu; auto is the best of them")
    flag("--num_workers", type=int, default=min(8, os.cpu_count()),
         help="threads that decode images, per rank")
    return parser.parse_args()


def main():
    args = parse_args()
    out = Path(args.out)
    # All in true fp32: in TF32 one code in 2,000 would be another. Ranks may wait for hours for
    # the one with the most parts left.
    rank, world_size, device, _ = setup(args.device, timeout_hours=12)
    tokenizer = Tokenizer.load(args.tokenizer or out / "tokenizer.safetensors").to(device)
    if tokenizer.cfg.codebook_size > 2**16:
        raise SystemExit("a token file holds codes below 65,536: the visual codebook is larger")

    # Images
    images = Images(args.data)
    val_data = args.val_data or default_val(args.data)
    val_images = Images(val_data) if val_data else None
    if rank == 0:
        print(images)
        print(val_images or "no held-out images")
    if val_images and val_images.classes != images.classes:
        other = sorted(set(images.classes) ^ set(val_images.classes))
        raise SystemExit(f"{val_data} and {args.data}: the class {other[0]} is in one of them only")

    # Tokens: held-out images first, with one crop each, because they are few
    target = out / "codes_val.safetensors"
    where = dict(device=device, rank=rank, world_size=world_size)
    if val_images:
        tokenize(tokenizer, val_images, target, args, crop="center", flip=False, **where)
    elif rank == 0:
        target.unlink(missing_ok=True)  # those of an earlier run would not belong to these
    tokenize(tokenizer, images, out / "codes.safetensors", args, crop=args.crop,
             flip=args.flip or args.crop == "ten", **where)

    finish()


if __name__ == "__main__":
    main()
