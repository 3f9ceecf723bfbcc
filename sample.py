"""Draw images: a class grid, a fixed-prologue grid, reconstructions, and many samples for fid.py.

    python sample.py                                        # the pair in out/, else the shipped one
    python sample.py --classes bag sneaker --cfg_visual 3    # chosen classes, by name or number
    python sample.py --image shoe.png --classes sneaker      # variations of a picture of one's own
    python tools/released.py prologue-l-xl --out l_xl && python sample.py --out l_xl
    torchrun --nproc_per_node 8 sample.py --num_samples 50000 --batch_size 1024 --out l_xl

Class and noise of an image depend on its number and the seed alone, so ranks and batch size change
nothing but the rounding, and a run that was stopped goes on where it was. In --out it leaves

    samples.png            a row for each of ten classes
    fixed_prologue.png     each row one prologue, its visual tokens drawn anew; the last row has
                           prologues of its own (for models with a prologue)
    reconstructions.png    of --data, or of the bundled images (for 28 x 28 tokenizers)
    samples.npz            arr_0 uint8 (N, H, W, 3), arr_1 labels; samples.json says how drawn
    sheet.png              with --sheet N: N x N images

and with --image variations.png alone.
"""

import argparse
import functools
import hashlib
import json
import os
import platform
import shutil
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from ar import AR, SCHEDULES, check_pair
from pretokenize import (BUNDLED, PART_SIZE, Images, center_crop, join_parts, open_image,
                         part_file, parts_folder, save_grid)
from tokenizer import (HelpFormatter, InputError, Tokenizer, attention_backend, real, to_float,
                       to_uint8, whole, writing)

# Paper table A5: guidance of both token groups and the power of its cosine; and for sampling
# without guidance the temperatures of prologue and visual tokens (with it they are 1). The first
# two rows are ours.
PRESETS = {
    "tiny": dict(cfg_prologue=1.0, cfg_visual=2.0, cfg_power=0.25, no_cfg=(1.0, 1.0)),
    "unguided": dict(cfg_prologue=1.0, cfg_visual=1.0, cfg_power=1.0, no_cfg=(1.0, 1.0)),
    "1d": dict(cfg_prologue=1.0, cfg_visual=19.0, cfg_power=1.75, no_cfg=(1.0, 0.85)),
    "2d": dict(cfg_prologue=1.0, cfg_visual=10.0, cfg_power=1.5, no_cfg=(1.0, 0.85)),
    "2d-l-b": dict(cfg_prologue=1.0, cfg_visual=5.0, cfg_power=1.75, no_cfg=(1.0, 0.9)),
    "prologue-b-b": dict(cfg_prologue=0.7, cfg_visual=3.75, cfg_power=0.2, no_cfg=(0.7, 0.9)),
    "prologue-post": dict(cfg_prologue=0.6, cfg_visual=3.75, cfg_power=0.25, no_cfg=(0.8, 0.8)),
    "prologue-onestage": dict(cfg_prologue=0.8, cfg_visual=3.75, cfg_power=0.25, no_cfg=(0.8, 0.8)),
    "prologue-b-l": dict(cfg_prologue=0.8, cfg_visual=3.0, cfg_power=0.225, no_cfg=(0.7, 0.9)),
    "prologue-b-xl": dict(cfg_prologue=0.8, cfg_visual=2.75, cfg_power=0.25, no_cfg=(0.8, 0.9)),
    "prologue-l-b": dict(cfg_prologue=0.65, cfg_visual=2.75, cfg_power=0.25, no_cfg=(0.8, 0.95)),
    "prologue-l-l": dict(cfg_prologue=0.7, cfg_visual=2.5, cfg_power=0.25, no_cfg=(0.95, 0.9)),
    "prologue-l-xl": dict(cfg_prologue=0.7, cfg_visual=2.25, cfg_power=0.225, no_cfg=(1.0, 0.9)),
    "l-b-vgg": dict(cfg_prologue=0.7, cfg_visual=3.75, cfg_power=0.25, no_cfg=(0.8, 0.85)),
    "l-b-16k": dict(cfg_prologue=0.65, cfg_visual=3.25, cfg_power=0.25, no_cfg=(0.8, 0.95)),
    "p256": dict(cfg_prologue=0.7, cfg_visual=3.25, cfg_power=0.25, no_cfg=(0.8, 0.9)),
    "p4096": dict(cfg_prologue=0.8, cfg_visual=3.5, cfg_power=0.25, no_cfg=(0.8, 0.9)),
    "k4": dict(cfg_prologue=0.6, cfg_visual=2.5, cfg_power=0.25, no_cfg=(0.8, 0.9)),
    "k64": dict(cfg_prologue=0.8, cfg_visual=3.75, cfg_power=0.25, no_cfg=(0.8, 1.0)),
    "tau001": dict(cfg_prologue=0.65, cfg_visual=2.5, cfg_power=0.25, no_cfg=(0.8, 0.9)),
    "tau1": dict(cfg_prologue=0.8, cfg_visual=3.75, cfg_power=0.25, no_cfg=(0.8, 0.85)),
    "drop0": dict(cfg_prologue=0.65, cfg_visual=3.5, cfg_power=0.25, no_cfg=(0.8, 0.85)),
    "drop1": dict(cfg_prologue=0.75, cfg_visual=3.25, cfg_power=0.25, no_cfg=(0.8, 0.9)),
    "ce1": dict(cfg_prologue=0.65, cfg_visual=3.75, cfg_power=0.25, no_cfg=(0.8, 0.85)),
    "ce6": dict(cfg_prologue=0.75, cfg_visual=3.25, cfg_power=0.25, no_cfg=(0.8, 0.9)),
}


def default_preset(ar):
    """The row of PRESETS that a model is drawn with where no flag names one."""
    if ar.cfg.num_classes == 1:  # images of the one class are all images: nothing to guide towards
        return "unguided"
    return ar.cfg.preset or "tiny"


def preset_settings(name, no_cfg=False):
    """A row of PRESETS as keyword arguments of AR.generate. Raises InputError."""
    if name not in PRESETS:
        raise InputError(f"there is no preset {name!r}; choose one of {', '.join(PRESETS)}")
    row = dict(PRESETS[name])
    temperature_prologue, temperature = row.pop("no_cfg")
    if not no_cfg:
        return row | dict(temperature_prologue=1.0, temperature=1.0)
    row["cfg_prologue"] = 1.0
    row["cfg_visual"] = 1.0
    return row | dict(temperature_prologue=temperature_prologue, temperature=temperature)


def load_pair(args, device):
    """Tokenizer, AR model and their paths: --tokenizer and --ar, else those in --out; if neither
    flag is given and neither file is there, the pair that comes with the code. Raises InputError.
    """
    folder = Path(args.out)
    names = ("tokenizer.safetensors", "ar.safetensors")
    given = args.tokenizer or args.ar
    if not given and not any((folder / name).exists() for name in names):
        folder = Path(__file__).parent / "checkpoints" / "fashion_mnist"
    tokenizer_path = Path(args.tokenizer or folder / names[0])
    ar_path = Path(args.ar or folder / names[1])
    tokenizer = Tokenizer.load(tokenizer_path).to(device)
    ar = AR.load(ar_path).to(device)
    check_pair(tokenizer, ar, names=(tokenizer_path, ar_path))
    if ar.cfg.num_classes == 0:
        raise InputError(f"{ar_path} is the joint AR model of stage 1, which knows no classes; an "
                         "ar.safetensors is needed")
    return tokenizer, ar, (tokenizer_path, ar_path)


def noise_of(seed, numbers, length):
    """Uniform noise (len(numbers), length) in [0, 1): a row depends on (seed, its number) alone."""
    rows = [np.random.default_rng((seed, int(i))).random(length, np.float32) for i in numbers]
    return torch.from_numpy(np.stack(rows))


def draw(ar, labels, numbers, seed, batch_size, settings, prologue=None, visual=None):
    """Codes (n, K+N) of images with labels (n,) and numbers (n,), `batch_size` at a time; settings
    are keyword arguments of AR.generate, prologue (n, K) and visual (n, m) are kept where given."""
    device = ar.head.weight.device
    length = ar.cfg.num_prologue + ar.cfg.num_visual
    numbers = torch.as_tensor(numbers)
    codes = []
    for batch in torch.arange(len(labels)).split(batch_size):
        wanted = len(batch)
        if ar.compiled_step:  # for one batch size: a short batch is padded with its last image
            batch = torch.cat([batch, batch[-1:].expand(batch_size - wanted)])
        given = {}
        if prologue is not None:
            given["prologue"] = prologue[batch]
        if visual is not None:
            given["visual"] = visual[batch]
        noise = noise_of(seed, numbers[batch], length)
        drawn = ar.generate(labels[batch].to(device), noise=noise, **given, **settings)
        codes.append(drawn[:wanted])
    return torch.cat(codes)


def decode(tokenizer, codes, batch_size):
    """Codes (n, K+N) -> images uint8 (n, H, W, 3)."""
    return torch.cat([to_uint8(tokenizer.decode(batch)) for batch in codes.split(batch_size)])


def cast_linears(ar, dtype):
    """Casts an AR model that only samples, once and not in every step; norms, embeddings and head
    stay in fp32. Sampling then goes under autocast."""
    for module in ar.transformer.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(dtype)


def pack_for_cpu(ar):
    """Lets an AR model that only samples, in fp32 on an x86 CPU, read its weights in oneDNN's own
    order: for large layers and the few rows of a step that is two to three times as fast."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return
    for layer in ar.modules():
        if isinstance(layer, torch.nn.Linear) and layer.weight.numel() > 2**18:
            weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight)
            layer.forward = functools.partial(packed_linear, weight=weight, bias=layer.bias)


def packed_linear(x, weight, bias):
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def class_numbers(chosen, ar):
    """Class names or numbers, as given on the command line, -> numbers; up to ten spread over all
    classes if none are given. Raises InputError."""
    count = ar.cfg.num_classes
    names = ar.cfg.classes
    if not chosen:
        rows = min(10, count)
        return [i * count // rows for i in range(rows)]
    numbers = []
    for text in chosen:
        if text in names:
            numbers.append(names.index(text))
        elif text.isdecimal() and int(text) < count:
            numbers.append(int(text))
        else:
            known = f" or one of {', '.join(names[:20])}" if names else ""
            raise InputError(f"--classes {text}: a number from 0 to {count - 1} is needed{known}")
    return numbers


def save_grids(tokenizer, ar, args, settings, batch_size):
    """samples.png, and where it applies fixed_prologue.png, sheet.png, reconstructions.png."""
    out = Path(args.out)
    k = ar.cfg.num_prologue
    size = tokenizer.cfg.image_size
    columns = args.columns
    classes = class_numbers(args.classes, ar)
    labels = torch.tensor(classes).repeat_interleave(columns)  # (rows * columns,)
    drawing = dict(seed=args.seed, batch_size=batch_size, settings=settings)

    # A row for each class
    codes = draw(ar, labels, range(len(labels)), **drawing)
    save_grid(out / "samples.png", decode(tokenizer, codes, batch_size).split(columns))
    names = [f"{i} {ar.cfg.classes[i]}" if ar.cfg.classes else str(i) for i in classes]
    print(f"{out / 'samples.png'}: a row each of {', '.join(names)}")

    # The first prologue of each class kept through a row, other noise behind it; then a row of
    # other prologues of the last class
    if k > 0:
        prologues = codes[::columns, :k].repeat_interleave(columns, 0)  # (rows * columns, K)
        numbers = range(1000, 1000 + len(labels))  # not those of the first grid: other noise
        rows = draw(ar, labels, numbers, prologue=prologues, **drawing)
        other = draw(ar, labels[-columns:], range(2000, 2000 + columns), **drawing)
        images = decode(tokenizer, torch.cat([rows, other]), batch_size)
        save_grid(out / "fixed_prologue.png", images.split(columns))
        print(f"{out / 'fixed_prologue.png'}: each row one prologue, then a row of others")

    # A square sheet of images of the chosen classes in turn, or of all in random order
    if args.sheet > 0:
        count = args.sheet**2
        generator = torch.Generator().manual_seed(args.seed)
        order = torch.randperm(ar.cfg.num_classes, generator=generator)
        if args.classes:
            order = torch.tensor(classes)
        labels = order[torch.arange(count) % len(order)]
        codes = draw(ar, labels, range(3000, 3000 + count), **drawing)
        save_grid(out / "sheet.png", decode(tokenizer, codes, batch_size).split(args.sheet))
        print(f"{out / 'sheet.png'}: {args.sheet} x {args.sheet} images")

    # Images of --data above their reconstructions
    data = args.data
    if data is None and size == 28:
        data = BUNDLED / "val"
    if data is not None:
        images = Images(data)
        indices = [i * len(images) // (4 * columns) for i in range(4 * columns)]
        crops = np.stack([center_crop(images.open(i), size) for i in indices])
        x = to_float(torch.from_numpy(crops).permute(0, 3, 1, 2)).to(ar.head.weight.device)
        y = decode(tokenizer, tokenizer.encode(x), batch_size)
        rows = []
        for originals, decoded in zip(to_uint8(x).split(columns), y.split(columns)):
            rows += [originals, decoded]
        save_grid(out / "reconstructions.png", rows)
        print(f"{out / 'reconstructions.png'}: originals above their reconstructions", flush=True)


def save_variations(tokenizer, ar, args, settings, batch_size):
    """variations.png: a row for each picture of --image, with itself, its reconstruction and images
    drawn under its prologue and behind the upper part of it that --keep says; then a row of images
    of the same class with prologues of their own."""
    k = ar.cfg.num_prologue
    grid = tokenizer.cfg.grid
    columns = args.columns
    kept = min(round(args.keep * grid), grid - 1) * grid  # visual codes, those of whole rows
    if kept > 0 and tokenizer.cfg.layout == "1d":
        raise InputError("--keep needs visual tokens that are patches, layout 1d has none")
    if k == 0 and kept == 0:
        raise InputError("--image needs a model with a prologue, or --keep at least a row")
    label = ar.cfg.num_classes  # unconditional
    if ar.cfg.num_classes == 1:
        label = 0  # all images, see default_preset
    if args.classes:
        label = class_numbers(args.classes, ar)[0]
    labels = torch.full((columns,), label)
    drawing = dict(seed=args.seed, batch_size=batch_size, settings=settings)
    rows = []
    for i, file in enumerate(args.image):
        picture = center_crop(open_image(file, Path(file).read_bytes), tokenizer.cfg.image_size)
        x = to_float(torch.tensor(picture).permute(2, 0, 1)[None]).to(ar.head.weight.device)
        codes = tokenizer.encode(x).expand(columns, -1)  # (columns, K+N)
        prologue = codes[:, :k] if k > 0 else None
        varied = draw(ar, labels, range(i * columns, (i + 1) * columns), prologue=prologue,
                      visual=codes[:, k : k + kept], **drawing)
        images = decode(tokenizer, torch.cat([codes[:1], varied]), batch_size)
        rows.append(torch.cat([to_uint8(x), images]))
    labels = torch.full((columns + 2,), label)  # as many as the other rows have
    others = draw(ar, labels, range(1000, 1000 + len(labels)), **drawing)
    rows.append(decode(tokenizer, others, batch_size))
    path = Path(args.out) / "variations.png"
    save_grid(path, rows)
    print(f"{path}: in each row a picture, its reconstruction and {columns} variations; in the "
          "last row images each with its own prologue")


def fingerprint(ar):
    """A short hash of the AR model's weights."""
    sha = hashlib.sha256()
    for tensor in ar.state_dict().values():
        sha.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


def count_copies(batches):
    """How many of the images in batches uint8 (n, H, W, 3) are exact copies of an earlier one."""
    hashes = [hashlib.sha256(image.tobytes()).digest() for batch in batches for image in batch]
    return len(hashes) - len(set(hashes))


def parse_args():
    parser = argparse.ArgumentParser(description="Draw images.",
                                     formatter_class=HelpFormatter)
    flag = parser.add_argument
    flag("--tokenizer", help="tokenizer file; by default that in --out")
    flag("--ar", help="AR file; by default that in --out; without any of these, the shipped pair")
    flag("--out", default="out", help="folder for everything that is written and looked for")

    # What to draw
    flag("--num", "--num_samples", type=whole(0), default=1000,
         help="images in samples.npz, 0 for only the grids; torchrun takes --num for its own, so "
         "under it write --num_samples")
    flag("--classes", nargs="+", metavar="CLASS",
         help="names or numbers of the grids' rows; by default ten of all")
    flag("--columns", type=whole(1), default=10, help="images per row of a grid")
    flag("--sheet", type=whole(0), default=0, metavar="N",
         help="also draw a sheet of N x N images of --classes, or of random ones; 0 is none")
    flag("--image", nargs="+", metavar="FILE",
         help="only draw variations of these pictures under their prologues, as images of the "
         "first of --classes, or else of no class")
    flag("--keep", type=real(0, 0.99), default=0.0, metavar="SHARE",
         help="share of the picture's rows, from the top, that --image keeps as well")
    flag("--data", help="images of the reconstruction grid; by default the bundled ones for a "
         "28 x 28 tokenizer, else none")
    flag("--seed", type=whole(0), default=0, help="of the noise")

    # How to draw; by default as the preset says
    flag("--preset", choices=PRESETS,
         help="row of the paper's table A5, tiny or unguided; by default that of the AR file or "
         "tiny, for a model of one class unguided")
    flag("--no_cfg", action="store_true", help="the preset's settings without guidance")
    flag("--cfg_visual", type=real(-1000, 1000),
         help="guidance of the visual tokens: 1 is off, s * cond + (1 - s) * uncond")
    flag("--cfg_prologue", type=real(-1000, 1000),
         help="guidance of the prologue tokens; below 1 it pulls towards unconditional")
    flag("--cfg_schedule", default="cosine", choices=SCHEDULES,
         help="how the visual guidance grows from 1 along the sequence")
    flag("--cfg_power", type=real(0), help="of the progress; below 1 it grows early")
    flag("--temperature", type=real(1e-3), help="of the visual tokens")
    flag("--temperature_prologue", type=real(1e-3), help="of the prologue tokens")
    flag("--top_k", type=whole(0), default=0, help="draw among the k likeliest codes; 0 is off")
    flag("--top_p", type=real(1e-3, 1), default=1.0,
         help="draw among the likeliest codes that hold this share; 1 is off")

    # Machine
    flag("--batch_size", type=whole(1), default=100, help="images at a time, over all ranks")
    flag("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"],
         help="auto is what torch finds")
    flag("--dtype", default="fp32", choices=["fp32", "bf16"],
         help="of the networks, fp32 on CUDA with TF32 products; bf16 keeps head and "
         "guidance in fp32")
    flag("--compile", action="store_true", help="torch.compile decoder and single-token step")
    args = parser.parse_args()
    if args.keep > 0 and not args.image:
        parser.error("--keep goes with --image")
    return args


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
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    autocast = torch.autocast(device.type, dtype, enabled=args.dtype == "bf16")
    if args.compile and device.type == "cpu" and not shutil.which("g++"):
        raise InputError("--compile needs the compiler g++ on a CPU, and there is none here")
    if world_size > 1:
        # Ranks may wait for hours for the one with the most parts left to draw.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=12))
    if rank == 0:
        backend = attention_backend(device, dtype)
        print(f"{world_size} x {device.type}, {args.dtype}, attention by {backend}", flush=True)

    # Models
    tokenizer, ar, paths = load_pair(args, device)
    if args.dtype == "bf16":
        cast_linears(ar, dtype)
    if args.compile:
        for block in tokenizer.decoder.transformer.blocks:
            block.compile(dynamic=False)
        ar.compile_step()
    elif device.type == "cpu" and args.dtype == "fp32":
        pack_for_cpu(ar)
    batch_size = min(PART_SIZE, max(1, args.batch_size // world_size))

    # Settings: those of the preset, where no flag says otherwise
    preset = args.preset or default_preset(ar)
    settings = preset_settings(preset, args.no_cfg)
    for name in settings:
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    settings |= dict(cfg_schedule=args.cfg_schedule, top_k=args.top_k, top_p=args.top_p)
    if rank == 0:
        print(f"{paths[0]} and {paths[1]}, preset {preset}", flush=True)

    # Grids, or variations of given pictures
    with autocast:
        if rank == 0 and args.image:
            save_variations(tokenizer, ar, args, settings, batch_size)
        elif rank == 0:
            save_grids(tokenizer, ar, args, settings, batch_size)

    # Many images, each class equally often, in parts: each rank writes whole files of its own and
    # skips what an earlier run has written
    if args.num > 0 and not args.image:
        labels = torch.arange(args.num) % ar.cfg.num_classes
        how = dict(num=args.num, seed=args.seed, dtype=args.dtype, tokenizer=str(paths[0]),
                   ar=str(paths[1]),
                   weights="EMA of the tokenizer (raw after --onestage), raw AR model",
                   preset=preset, **settings)
        target = out / "samples.npz"
        folder = parts_folder(target, [how, tokenizer.fingerprint(), fingerprint(ar)])
        parts = list(torch.arange(args.num).split(PART_SIZE))
        numbers = range(rank, len(parts), world_size)
        missing = [i for i in numbers if not part_file(folder, i).exists()]
        progress = tqdm(total=sum(len(parts[i]) for i in missing), unit="image", disable=rank > 0)
        for i in missing:
            images = []
            for batch in parts[i].split(batch_size):
                with autocast:
                    codes = draw(ar, labels[batch], batch, args.seed, batch_size, settings)
                    images.append(decode(tokenizer, codes, batch_size))
                progress.update(len(batch))
            with writing(part_file(folder, i)) as temporary, open(temporary, "wb") as file:
                np.save(file, torch.cat(images).numpy())
        progress.close()
        if world_size > 1:
            dist.barrier()

        # One file of all parts
        if rank == 0:
            copies = count_copies(np.load(part_file(folder, i)) for i in range(len(parts)))
            join_parts(target, "arr_0", folder, len(parts), arr_1=labels.numpy())
            with writing(out / "samples.json") as temporary:
                temporary.write_text(json.dumps(how, indent=1) + "\n")
            print(f"{target}: {args.num} images, {copies} of them exact copies of an earlier one")

    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
