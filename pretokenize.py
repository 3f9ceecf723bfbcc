"""Stage 1.5: images in, tokens out. Every training image becomes a row of out/codes.safetensors.

    python pretokenize.py                               # bundled data, out/tokenizer.safetensors
    python pretokenize.py --data my_images --crop center --flip         # a folder of class folders
    torchrun --nproc_per_node 8 pretokenize.py --crop ten \\
        --data imagenet.zip/ILSVRC/Data/CLS-LOC/train

A run that was stopped goes on where it was. This file also holds what other scripts need of images:
ADM's crops, the order of training images, picture sheets, and at its end, to be skipped at first,
how images are read out of folders and zips.
"""

import argparse
import collections
import contextlib
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
from tqdm import tqdm

from tokenizer import (Tokenizer, TokenizerConfig, atomic_write, check_flags, finish, of_first_rank,
                       open_out, read_safetensors, save_checkpoint, setup)

with contextlib.suppress(ImportError):  # pip install pillow-heif: the photos of most phones
    from pillow_heif import register_heif_opener

    register_heif_opener()

BUNDLED = Path(__file__).parent / "data" / "fashion_mnist.zip"
KNOWN = Image.registered_extensions()  # {extension: format} of what Pillow reads or writes here
FORMATS = sorted({"PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF", "GIF", "AVIF", "HEIF"}
                 & set(KNOWN.values()))
EXTENSIONS = {end for end, kind in KNOWN.items() if kind in FORMATS} - {".gif"}
SPLITS = {"train", "training", "val", "valid", "validation", "test"}
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


# Crops, as in ADM (guided-diffusion), whose statistics are the reference of every ImageNet gFID

def resize_shorter_side(image, shorter):
    """Shorter side to `shorter`: halved by a box filter while at least twice that, then bicubic."""
    side = 16 * min(image.size)  # a longer strip is cut to its middle, to save gigabytes
    image = ImageOps.fit(image, (min(image.width, side), min(image.height, side)))
    while min(image.size) >= 2 * shorter:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = shorter / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, Image.Resampling.BICUBIC)


def crop_at(image, size, top, left):
    return np.asarray(image)[top : top + size, left : left + size]


def center_crop(image, size):
    """PIL image -> uint8 (size, size, 3): shorter side to `size`, then the middle square."""
    image = resize_shorter_side(image, size)
    return crop_at(image, size, top=(image.height - size) // 2, left=(image.width - size) // 2)


def random_crop(image, size, rng):
    """Shorter side to a random length from size to size / 0.8, then a random square."""
    image = resize_shorter_side(image, rng.randint(size, math.ceil(size / 0.8)))
    top = rng.randint(0, image.height - size)
    left = rng.randint(0, image.width - size)
    return crop_at(image, size, top, left)


def image_crops(images, index, size, crop, flip):
    """All crops of one image that are tokenized: uint8 (crops, size, size, 3), mirrored ones last.
    ten: corners and middle of the centre crop of side 1.1 * size (281 for 256), and of its mirror
    image; the whole picture's corners would have another distribution than the reference's."""
    square = center_crop(images.open(index), int(1.1 * size) if crop == "ten" else size)
    places = [(0, 0)]
    if crop == "ten":
        end = len(square) - size
        middle = round(end / 2)
        places = [(0, 0), (0, end), (end, 0), (end, end), (middle, middle)]
    sides = [square, square[:, ::-1]] if flip else [square]
    return np.stack([crop_at(side, size, *place) for side in sides for place in places])


# Tokens

class Tokens:
    """A token file, mapped from disk: ranks and processes share its memory.

    codes: (images, crops, K+N) uint16. labels: (images,) int64. classes: their names. config: of
    the tokenizer that made the codes. digest: of everything that they depend on. partner: for
    held-out tokens the digest of the training tokens that were made with them.
    """

    def __init__(self, path):
        tensors, about = read_safetensors(path, "codes")
        self.codes = tensors["codes"].numpy()
        self.labels = tensors["labels"]
        self.classes = about["classes"]
        self.config = TokenizerConfig(**about["tokenizer"])
        self.digest = about["digest"]
        self.partner = about["partner"]

    def batch(self, images, crops=0):
        """Codes (B, K+N) and labels (B,), int64, of image numbers (B,) and crop numbers (B,)."""
        return torch.from_numpy(self.codes[images, crops].astype(np.int64)), self.labels[images]


def short_hash(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def about_tokens(tokenizer, images, crop, flip, partner):
    """What stands in a token file beside the tokens, and decides whether it is up to date."""
    about = dict(tokenizer=asdict(tokenizer.config), classes=images.classes,
                 images=images.digest(), crop=crop, flip=flip, partner=partner)
    about["digest"] = short_hash(about)
    about["data"] = os.path.abspath(images.path)  # not in the digest: data may move
    return of_first_rank(about)


@torch.no_grad()
def tokenize(tokenizer, images, about, target, args, device, rank, world_size):
    """Writes codes (images, crops, K+N) uint16 and labels (images,) to the file `target`."""
    if target.exists() and read_safetensors(target, "codes")[1]["digest"] == about["digest"]:
        if rank == 0:
            print(f"{target} is up to date")
        return

    # In numbered parts, every rank its own; those of an earlier run with the same settings stay
    folder = Path(f"{target}.{about['digest']}.parts")
    parts = torch.arange(len(images)).split(PART_SIZE)
    files = [folder / f"{i}.pt" for i in range(len(parts))]
    missing = [i for i in range(rank, len(parts), world_size) if not files[i].exists()]
    num_crops = (1 + about["flip"]) * (5 if about["crop"] == "ten" else 1)
    per_batch = max(1, args.batch_size // world_size // num_crops)
    load = functools.partial(image_crops, images, size=tokenizer.config.image_size,
                             crop=about["crop"], flip=about["flip"])
    total = sum(len(parts[i]) for i in missing)
    bar = tqdm(total=total, desc=str(target), unit=" images", disable=rank > 0)
    for i in missing:
        codes = []
        for crops in load_batches(load, parts[i].split(per_batch), args.num_workers):
            x = to_float(crops.to(device).flatten(0, 1))  # (B*crops, 3, H, W)
            codes.append(tokenizer.encode(x).unflatten(0, (-1, num_crops)).cpu())  # (B, crops, K+N)
            bar.update(len(crops))
        with atomic_write(files[i]) as temporary:
            torch.save(torch.cat(codes).to(torch.uint16), temporary)
    bar.close()
    if world_size > 1:
        dist.barrier()

    # One file of all parts
    if rank == 0:
        codes = torch.cat([torch.load(file, weights_only=True) for file in files])
        save_checkpoint(target, "codes", {"codes": codes, "labels": images.labels}, about)
        print(f"{target}: images x crops x codes {tuple(codes.shape)}")


# Batches and picture sheets

def visited_images(seed, first, count, num_images):
    """Image numbers (count,) of the visits first, first + 1, ... A visit reads one image; they are
    counted through all epochs, each in a new order, so runs resume on any number of ranks."""
    visits = range(first, first + count)
    return [int(epoch_order(seed, v // num_images, num_images)[v % num_images]) for v in visits]


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, num_images):
    return np.random.default_rng((seed, epoch)).permutation(num_images)


def load_batches(load, batches, num_workers):
    """Yields for each list of numbers in `batches` the tensor stack([load(i) for i in list]), with
    two more being loaded meanwhile. Threads suffice: PIL works outside Python's lock."""
    waiting = collections.deque()
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        for numbers in itertools.chain(batches, [[], []]):  # two that push the last out
            waiting.append([pool.submit(load, int(i)) for i in numbers])
            if len(waiting) > 2:
                batch = [future.result() for future in waiting.popleft()]
                yield torch.from_numpy(np.stack(batch))


def save_grid(path, rows):
    """Rows, of one length, of uint8 images (n, H, W, 3) as one PNG; small images are enlarged."""
    images = np.stack([np.asarray(row) for row in rows])  # (rows, n, H, W, 3)
    scale = max(1, 56 // images.shape[2])
    images = images.repeat(scale, 2).repeat(scale, 3)
    images = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    columns = np.concatenate(images, 1)  # (n, rows * H, W, 3)
    sheet = np.concatenate(columns, 1)  # (rows * H, n * W, 3)
    with atomic_write(path) as temporary:
        Image.fromarray(sheet).save(temporary, "png")


# Images in folders and zips: what real files are like. To be skipped at first.

def open_image(file, archive=None):
    """PIL image in RGB of a file or zip entry: upright, transparency on white, 16 bits as 8."""
    place = f"{file} in {archive}" if archive else file
    try:
        source = io.BytesIO(open_zip(archive).read(file)) if archive else file
        with Image.open(source, formats=FORMATS) as image:
            if image.mode in ("F", "I"):
                raise SystemExit(f"{place} has floats or 32-bit integers: save 8 or 16 bits")
            image.load()
            with contextlib.suppress(Exception):  # cameras write a dozen kinds of broken EXIF
                ImageOps.exif_transpose(image, in_place=True)  # turns first, then rewrites EXIF
            if image.mode.startswith("I;16"):  # PIL would clip, not scale
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
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


def list_zip(archive, inside):
    """{name: place} of all files of a zip below the path `inside`; a name has slashes only."""
    found = {}
    for place in open_zip(archive).namelist():
        name = place.replace("\\", "/")
        path = posixpath.normpath(name).lstrip("/")
        if path.startswith(inside) and not name.endswith("/"):
            found[path[len(inside) :]] = place
    return found


def list_folder(folder, below="", above=()):
    """{name: place} of all files below a folder, following links but to a folder `above` it."""
    real = os.path.realpath(folder)
    if real in above:
        return {}
    found = {}
    try:
        for entry in os.scandir(folder):
            if entry.is_dir():
                found |= list_folder(entry.path, f"{below}{entry.name}/", (*above, real))
            elif entry.is_file():
                found[below + entry.name] = entry.path
            elif not entry.name.startswith("."):  # to read from a pipe would wait for ever
                raise SystemExit(f"{entry.path} is no regular file, or a link to nothing")
    except OSError as error:
        raise SystemExit(f"the folder {folder} cannot be read: {error}") from None
    return found


def texts_above(path, name):
    """The texts of the files `name` in a folder or path into a zip, and above it, nearest first."""
    path = Path(path).absolute()
    for folder in (path, *path.parents):
        archive, inside = split_zip(folder / name)
        try:
            data = open_zip(archive).read(inside[:-1]) if archive else (folder / name).read_bytes()
        except (KeyError, OSError):
            continue
        yield data.decode()


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
            found = list_zip(self.archive, inside)
        elif self.path.is_dir():
            found = list_folder(path)
        else:
            raise SystemExit(f"{path} is no folder, no zip file and no path into a zip file")
        if "dataset.json" in found:
            raise SystemExit(f"{path} has a dataset.json of StyleGAN: sort its images into classes")
        # Not hidden files, and not what macOS adds to zips
        visible = sorted(name for name in found if not re.search(r"(^|/)(\.|__MACOSX)", name))
        self.names = [name for name in visible if extension(name) in EXTENSIONS]
        self.places = [found[name] for name in self.names]
        others = [name for name in visible if extension(name) not in EXTENSIONS]
        self.left_out = self.describe(others)
        if not self.names:
            raise SystemExit(f"{path} holds no images{self.left_out}")

        # Classes are the top folders, if these are no splits of a data set
        folders = [name.split("/")[0] if "/" in name else "" for name in self.names]
        tops = set(folders)
        splits = {top.casefold() for top in tops} & SPLITS
        only_folder = len(tops) == 1 and all(name.count("/") > 1 for name in self.names)
        if len(splits) > 1 or only_folder:
            raise SystemExit(f"{path} holds no classes but {sorted(tops)}: add one to the path")
        if "" in tops and len(tops) > 1:
            raise SystemExit(f"{path} holds images beside folders: put all into folders, or none")
        if folders[0] == "":
            folders = self.classes_of_kaggle() or folders
        folders = [unicodedata.normalize("NFC", folder) for folder in folders]
        classes, labels = np.unique(folders, return_inverse=True)  # sorted
        self.classes = classes.tolist()
        self.labels = torch.from_numpy(labels)

    def describe(self, others):
        """What is left out: names of files that are no images, or of a kind that Pillow lacks."""
        if not others:
            return ""
        counts = collections.Counter(extension(name) or "others" for name in others)
        text = f", left out: {', '.join(f'{count} {end}' for end, count in counts.items())}"
        lost = {name.split("/")[0] for name in others if "/" in name}
        lost -= {name.split("/")[0] for name in self.names}
        if lost:
            text += f", and so all of {', '.join(sorted(lost))}"
        return text

    def classes_of_kaggle(self):
        """The class of each image by LOC_val_solution.csv, or None if no table is about them."""
        for text in texts_above(self.path, "LOC_val_solution.csv"):
            table = dict(re.findall(r"^(\S+?),(\S+)", text, re.M))  # name,class ...
            classes = [table.get(Path(name).stem) for name in self.names]
            if all(classes):  # else it is about other images
                return classes
        return None

    def __len__(self):
        return len(self.names)

    def __str__(self):
        return f"{self.path}: {len(self)} images of {len(self.classes)} classes{self.left_out}"

    def open(self, index):
        return open_image(self.places[index], self.archive)

    def digest(self):
        """A short hash of names, labels and the images' checksums in a zip or sizes in a folder."""
        if self.archive:
            values = [open_zip(self.archive).getinfo(place).CRC for place in self.places]
        else:
            values = [os.stat(place).st_size for place in self.places]
        return short_hash([self.names, self.labels.tolist(), values])


def extension(name):
    return posixpath.splitext(name)[1].lower()


def default_val(data):
    """The first of val, valid and validation that is beside training images at a path `train`."""
    if Path(data).name.casefold() != "train":
        return
    for name in ("val", "valid", "validation"):
        path = Path(data).with_name(name)
        archive, inside = split_zip(path)
        if path.is_dir() or archive and list_zip(archive, inside):
            return str(path)


def parse_args():
    parser = argparse.ArgumentParser(description="Turn images into tokens.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--data", default=str(BUNDLED / "train"), help="a folder, zip, or path into a zip")
    flag("--val_data", help="held-out images; else val, valid or validation beside train")
    flag("--tokenizer", help="tokenizer file; else tokenizer.safetensors in --out")
    flag("--crop", default="center", choices=["center", "ten"], help="ten: corners and middle")
    flag("--flip", action="store_true", help="add mirrored crops, which ten has anyway")
    flag("--out", default="out", help="folder for everything that is written and looked for")
    flag("--batch_size", type=int, default=256, help="crops at a time, over all ranks")
    flag("--device", default="auto", help="cuda, mps or cpu; auto is the best of them")
    flag("--num_workers", type=int, default=min(8, os.cpu_count()), help="decoding threads a rank")
    args = parser.parse_args()
    check_flags(parser, args, "batch_size")
    return args


def main():
    args = parse_args()
    # In true fp32, as TF32 would change codes. Ranks may wait for hours for the slowest
    rank, world_size, device, _ = setup(args.device, timeout_hours=12)
    out = Path(args.out)
    tokenizer = Tokenizer.load(args.tokenizer or out / "tokenizer.safetensors").to(device)

    # Images
    images = Images(args.data)
    val_data = args.val_data or default_val(args.data)
    val_images = Images(val_data) if val_data else None
    if rank == 0:
        print(images)
        print(f"held out: {val_images}" if val_data else "no held-out images")
    if val_images and val_images.classes != images.classes:
        other = min(set(images.classes) ^ set(val_images.classes))
        raise SystemExit(f"{val_data} and {args.data}: the class {other!r} is in one of them only")

    # Tokens: held-out images first, with one crop each, because they are few
    if rank == 0:
        open_out(out, "codes.safetensors", "codes_val.safetensors")
    where = dict(args=args, device=device, rank=rank, world_size=world_size)
    val_target = out / "codes_val.safetensors"
    about = about_tokens(tokenizer, images, args.crop, args.flip or args.crop == "ten", partner="")
    if val_images:
        val_about = about_tokens(tokenizer, val_images, "center", False, partner=about["digest"])
        tokenize(tokenizer, val_images, val_about, val_target, **where)
    elif rank == 0:
        val_target.unlink(missing_ok=True)  # those of an earlier run would not belong to these
    tokenize(tokenizer, images, about, out / "codes.safetensors", **where)

    # Parts are needed no more, not even those of runs with other settings
    finish()
    if rank == 0:
        for folder in out.glob("codes*.parts"):
            shutil.rmtree(folder)
        print(f"done. Next: python train_ar.py --out {out}")


if __name__ == "__main__":
    main()
