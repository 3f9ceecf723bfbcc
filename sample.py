"""Draw images: a class grid, a fixed-prologue grid, and many samples for fid.py.

    python sample.py                                        # the pair in out/, else the shipped one
    python sample.py --classes bag sneaker --cfg_visual 3    # chosen classes, by name or number
    python sample.py --pair checkpoints/fashion_mnist        # a pair in another folder than --out
    python tools/released.py prologue-l-xl --out l_xl && python sample.py --out l_xl
    torchrun --nproc_per_node 8 sample.py --num_samples 50000 --batch_size 1024 --out l_xl

Class and noise of an image depend on its number and the seed alone, so ranks and batch size change
nothing but the rounding. In --out it leaves

    samples.png            a row for each of ten classes
    fixed_prologue.png     each row one prologue, its visual tokens drawn anew (for models with a
                           prologue)
    samples.npz            arr_0 uint8 (N, H, W, 3), arr_1 labels, `how` they were drawn as JSON
"""

import argparse
import difflib
import functools
import json
import platform
import unicodedata
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from ar import AR, SCHEDULES
from pretokenize import save_grid, to_uint8
from tokenizer import Tokenizer, atomic_write, check_flags, compile_blocks, finish, open_out, setup

SHIPPED = Path(__file__).parent / "checkpoints" / "fashion_mnist"

FILTERS = ("top_k", "top_p")  # flags that go to ar.sample_codes as they are

# tiny and unguided are ours; the others are of paper table A5 (recipes/evaluate.sh has its rest).
# Columns: cfg_prologue, cfg_visual, cfg_power: used with guidance, where temperatures are 1;
# temperature_prologue, temperature: used only without guidance.
PRESETS = {
    "tiny": (1.0, 2.0, 0.25, 1.0, 1.0),
    "unguided": (1.0, 1.0, 1.0, 1.0, 1.0),
    "1d": (1.0, 19.0, 1.75, 1.0, 0.85),
    "2d": (1.0, 10.0, 1.5, 1.0, 0.85),
    "prologue-b-b": (0.7, 3.75, 0.2, 0.7, 0.9),
    "prologue-post": (0.6, 3.75, 0.25, 0.8, 0.8),
    "prologue-onestage": (0.8, 3.75, 0.25, 0.8, 0.8),
    "prologue-b-l": (0.8, 3.0, 0.225, 0.7, 0.9),
    "prologue-b-xl": (0.8, 2.75, 0.25, 0.8, 0.9),
    "prologue-l-b": (0.65, 2.75, 0.25, 0.8, 0.95),
    "prologue-l-l": (0.7, 2.5, 0.25, 0.95, 0.9),
    "prologue-l-xl": (0.7, 2.25, 0.225, 1.0, 0.9),
}


def default_preset(ar):
    """The row of PRESETS that a model is drawn with where no flag names one."""
    if ar.config.num_classes == 1:  # the images of a single class: nothing to guide towards
        return "unguided"
    return ar.config.preset or "tiny"


def preset_settings(name, no_cfg=False):
    """A row of PRESETS as keyword arguments of AR.generate."""
    cfg_prologue, cfg_visual, cfg_power, temperature_prologue, temperature = PRESETS[name]
    if no_cfg:
        cfg_prologue = cfg_visual = 1.0
    else:
        temperature_prologue = temperature = 1.0
    return dict(cfg_prologue=cfg_prologue, cfg_visual=cfg_visual, cfg_power=cfg_power,
                temperature_prologue=temperature_prologue, temperature=temperature)


def pair_folder(pair, out=None):
    """The folder of the pair to draw from, the first of these that is given: --pair, --out, the
    folder out if a pair was trained there, the pair that comes with the code."""
    trained = "out" if Path("out/ar.safetensors").exists() else SHIPPED
    folder = Path(pair or out or trained)
    if not (folder / "ar.safetensors").exists():
        raise SystemExit(f"{folder} holds no ar.safetensors: --pair names the folder of a pair")
    return folder


def load_pair(folder, device):
    """Tokenizer and AR model in a folder, which must belong together."""
    tokenizer = Tokenizer.load(folder / "tokenizer.safetensors").to(device)
    ar = AR.load(folder / "ar.safetensors").to(device)
    if ar.config.tokenizer != tokenizer.config.fingerprint:  # a joint AR model's is ""
        raise SystemExit(f"{folder}: ar.safetensors was trained on codes of another tokenizer")
    return tokenizer, ar


def noise_of(seed, numbers, length):
    """Uniform noise (len(numbers), length) in [0, 1): a row depends on (seed, its number) alone."""
    rows = [np.random.default_rng((seed, int(i))).random(length, np.float32) for i in numbers]
    return torch.from_numpy(np.stack(rows))


def draw(ar, labels, numbers, seed, batch_size, settings, progress=False, **kept):
    """Codes (n, K+N) of images with labels (n,) and numbers (n,), `batch_size` at a time. The
    settings go to AR.generate, and so do codes to keep: prologue (n, K), visual (n, m)."""
    device = ar.head.weight.device
    length = ar.config.num_prologue + ar.config.num_visual
    numbers = torch.as_tensor(numbers)
    codes = []
    bar = tqdm(total=len(labels), unit=" images", disable=not progress)
    for batch in torch.arange(len(labels)).split(batch_size):
        wanted = len(batch)
        if ar.compiled_step:  # for one batch size: a short batch is padded with its last image
            batch = torch.cat([batch, batch[-1:].expand(batch_size - wanted)])
        drawn = ar.generate(labels[batch].to(device), noise=noise_of(seed, numbers[batch], length),
                            **{name: whole[batch] for name, whole in kept.items()}, **settings)
        codes.append(drawn[:wanted])
        bar.update(wanted)
    bar.close()
    return torch.cat(codes)


def decode(tokenizer, codes, batch_size):
    """Codes (n, K+N) -> images uint8 (n, H, W, 3)."""
    return torch.cat([to_uint8(tokenizer.decode(batch)) for batch in codes.split(batch_size)])


def pack_for_cpu(ar):
    """Lets an AR model that only samples, in fp32 on an x86 CPU, read its weights in oneDNN's own
    order: for large layers and the few rows of a step that is two to three times as fast."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return
    for layer in ar.modules():
        if isinstance(layer, torch.nn.Linear) and layer.weight.numel() > 2**18:
            weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight)
            layer.forward = functools.partial(torch.ops.mkldnn._linear_pointwise, W=weight,
                                              B=layer.bias, attr="none", scalars=[], algorithm="")


def class_numbers(chosen, ar):
    """Class names or numbers of the command line -> numbers; without any ten of all classes."""
    count = ar.config.num_classes
    if not chosen:
        return sorted({i * count // 10 for i in range(10)})
    known = {str(i): i for i in range(count)} | dict(zip(ar.config.classes, range(count)))
    numbers = [known.get(unicodedata.normalize("NFC", text)) for text in chosen]
    if None in numbers:
        text = chosen[numbers.index(None)]
        names = difflib.get_close_matches(text, ar.config.classes) or ar.config.classes[:20]
        raise SystemExit(f"--classes {text}: a number from 0 to {count - 1} is needed, or a name, "
                         f"such as {names}")
    return numbers


def save_grids(tokenizer, ar, args, settings, batch_size):
    """samples.png, and with a prologue fixed_prologue.png."""
    out = Path(args.out)
    k = ar.config.num_prologue
    columns = args.columns
    classes = class_numbers(args.classes, ar)
    labels = torch.tensor(classes).repeat_interleave(columns)  # (rows * columns,)
    drawing = dict(seed=args.seed, batch_size=batch_size, settings=settings, progress=True)

    # A row for each class
    codes = draw(ar, labels, range(len(labels)), **drawing)
    save_grid(out / "samples.png", decode(tokenizer, codes, batch_size).split(columns))
    names = [" ".join([str(i), *ar.config.classes[i : i + 1]]) for i in classes]
    print(f"{out / 'samples.png'}: a row each of {', '.join(names)}")

    # The first prologue of each class kept through a row, other noise after it
    if k > 0:
        prologues = codes[::columns, :k].repeat_interleave(columns, 0)  # (rows * columns, K)
        numbers = range(1000, 1000 + len(labels))  # not those of the first grid: other noise
        codes = draw(ar, labels, numbers, prologue=prologues, **drawing)
        save_grid(out / "fixed_prologue.png", decode(tokenizer, codes, batch_size).split(columns))
        print(f"{out / 'fixed_prologue.png'}: each row one prologue")


def parse_args():
    parser = argparse.ArgumentParser(description="Draw images.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--pair", help="folder of the pair; else --out, else out, else checkpoints/fashion_mnist")
    flag("--out", help="folder that is written to and, without --pair, drawn from; else out")

    # What to draw
    flag("--num_samples", type=int, default=1000, help="images in samples.npz; 0: only the grids")
    flag("--classes", nargs="+", help="names or numbers of the grids' rows; else ten of all")
    flag("--columns", type=int, default=10, help="images per row of a grid")
    flag("--seed", type=int, default=0, help="of the noise")

    # How to draw; by default as the preset says
    flag("--preset", choices=PRESETS, metavar="ROW", help="of table A5; else the AR file's, "
         "unguided or tiny; one of %(choices)s")
    flag("--no_cfg", action="store_true", help="the preset's settings without guidance")
    flag("--cfg_visual", type=float, help="guidance: 1 is off, s * cond + (1 - s) * uncond")
    flag("--cfg_prologue", type=float, help="below 1 it pulls towards unconditional")
    flag("--cfg_schedule", default="cosine", choices=SCHEDULES, help="of the visual guidance")
    flag("--cfg_power", type=float, help="of the progress; below 1 it grows early")
    flag("--temperature", type=float, help="of the visual tokens")
    flag("--temperature_prologue", type=float, help="of the prologue tokens")
    flag("--top_k", type=int, default=0, help="draw among the k likeliest codes; 0 is off")
    flag("--top_p", type=float, default=1.0, help="draw among those that hold this share")

    # Machine
    flag("--batch_size", type=int, default=100, help="images at a time, over all ranks")
    flag("--device", default="auto", help="cuda, mps or cpu; auto is the best of them")
    flag("--dtype", default="fp32", choices=["fp32", "bf16"], help="of the networks")
    flag("--compile", action="store_true", help="torch.compile decoder and single-token step")
    args = parser.parse_args()
    check_flags(parser, args, "columns", "batch_size")
    return args


@torch.no_grad()
def main():
    args = parse_args()
    folder = pair_folder(args.pair, args.out)
    rank, world_size, device, autocast = setup(args.device, args.dtype, timeout_hours=12)
    args.out = args.out or "out"
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would make a new plan for every token

    # Models
    tokenizer, ar = load_pair(folder, device)
    out = open_out(args.out, "samples.npz") if rank == 0 else Path(args.out)
    if args.dtype == "bf16":  # cast once and not in every step; norms, embeddings and head stay
        for module in ar.transformer.modules():
            if isinstance(module, torch.nn.Linear):
                module.to(torch.bfloat16)
    if args.compile:
        compile_blocks(tokenizer.decoder)
        ar.compile_step()
    elif device.type == "cpu" and args.dtype == "fp32":
        pack_for_cpu(ar)
    batch_size = max(1, args.batch_size // world_size)

    # Settings: those of the preset, where no flag says otherwise
    preset = args.preset or default_preset(ar)
    settings = preset_settings(preset, args.no_cfg)
    for name in (*settings, "cfg_schedule", *FILTERS):
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    if rank == 0:
        print(f"{tokenizer.config.layout} pair in {folder}, preset {preset}")

    # Grids
    if rank == 0:
        with autocast:
            save_grids(tokenizer, ar, args, settings, batch_size)

    # Many images, each class equally often; each rank draws a part
    if args.num_samples > 0:
        labels = torch.arange(args.num_samples) % ar.config.num_classes
        numbers = torch.arange(args.num_samples).tensor_split(world_size)[rank]
        with autocast:
            codes = draw(ar, labels[numbers], numbers, args.seed, batch_size, settings, rank == 0)
            images = decode(tokenizer, codes, batch_size).numpy()
        parts = [images] * world_size
        if world_size > 1:
            dist.gather_object(images, parts if rank == 0 else None)
        if rank == 0:
            how = json.dumps(vars(args) | dict(pair=str(folder), preset=preset) | settings)
            with atomic_write(out / "samples.npz") as temporary, open(temporary, "wb") as file:
                np.savez(file, arr_0=np.concatenate(parts), arr_1=labels.numpy(), how=how)
            print(f"{out}/samples.npz: {args.num_samples} images. Next: python fid.py --out {out}")

    finish()


if __name__ == "__main__":
    main()
