"""Draw images: a class grid, a fixed-prologue grid, reconstructions, and an .npz of many samples for fid.py.

    python sample.py                                        # from out/tokenizer.safetensors and out/ar.safetensors
    python sample.py --classes bag sneaker --cfg_visual 3   # a grid of chosen classes, by name or number
    torchrun --nproc_per_node 8 sample.py --num 50000 --batch_size 1024

Label and noise of an image are functions of its index and the seed, so batch size and ranks change nothing. In --out it
leaves samples.png, fixed_prologue.png, reconstructions.png and samples.npz (arr_0 uint8 (N, H, W, 3), arr_1 labels).
"""
import argparse
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from ar import AR, SCHEDULES, check_pair, guidance
from common import InputError, Machine, common_flags, run, save_grid, save_npz
from pretokenize import EMBEDDED, Images, to_float
from tokenizer import Tokenizer, attention_backend, to_uint8


def noise_for(seed, indices, count):
    """Uniform noise (len(indices), count); row i depends on (seed, indices[i]) alone."""
    return torch.from_numpy(np.stack([np.random.default_rng((seed, int(i))).random(count, dtype=np.float32) for i in indices]))


class Sampler:
    """Draws codes and pixels with the flags' guidance and temperatures."""

    def __init__(self, ar, tokenizer, machine, args):
        self.ar, self.tokenizer, self.machine, self.seed = ar, tokenizer, machine, args.seed
        self.count = ar.cfg.num_prologue + ar.cfg.num_visual
        self.settings = {key: getattr(args, key) for key in (
            "cfg_prologue", "cfg_visual", "cfg_schedule", "cfg_power", "temperature", "temperature_prologue", "top_k", "top_p")}

    def codes(self, labels, indices, prologue=None):
        """labels (B,), image indices (B,) -> codes (B, K+N)"""
        with self.machine.autocast():
            return self.ar.generate(labels.to(self.machine.device), prologue=prologue,
                                    noise=noise_for(self.seed, indices, self.count), **self.settings)

    def pixels(self, codes):
        """codes (B, K+N) -> uint8 (B, H, W, 3)"""
        with self.machine.autocast():
            return to_uint8(self.tokenizer.decode(codes))


def class_numbers(chosen, ar):
    """Class names or numbers of --classes -> numbers; by default up to 10 spread over all. Raises InputError."""
    count, names = ar.cfg.num_classes, ar.cfg.classes
    if not chosen:
        return [i * count // min(10, count) for i in range(min(10, count))]
    numbers = [names.index(c) if c in names else int(c) if c.isdigit() else -1 for c in chosen]
    for text, number in zip(chosen, numbers):
        if not 0 <= number < count:
            raise InputError(f"--classes {text}: a number from 0 to {count - 1} is needed"
                             + (f" or one of {', '.join(names[:20])}" if names else ""))
    return numbers


def class_grid(sampler, classes, columns):
    """A row of `columns` samples for each class."""
    labels = torch.tensor(classes).repeat_interleave(columns)
    return list(sampler.pixels(sampler.codes(labels, range(len(labels)))).split(columns))


def fixed_prologue_grid(sampler, classes, columns):
    """Each row one prologue of one class, its visual tokens drawn anew; the last row different prologues of the last class."""
    first = sampler.codes(torch.tensor(classes), range(len(classes)))[:, :sampler.ar.cfg.num_prologue]
    labels = torch.tensor(classes).repeat_interleave(columns)
    rows = sampler.codes(labels, range(1000, 1000 + len(labels)), first.repeat_interleave(columns, 0))
    other = sampler.codes(torch.tensor([classes[-1]] * columns), range(2000, 2000 + columns))
    return list(sampler.pixels(torch.cat([rows, other])).split(columns))


def reconstruction_grid(sampler, data, columns):
    """Originals above their reconstructions, spread over the data."""
    images = Images(data, sampler.tokenizer.cfg.image_size)
    rows = []
    for start in range(4):
        index = [(start * columns + i) * len(images) // (4 * columns) for i in range(columns)]
        x = to_float(torch.stack([images[i, i][0][0] for i in index])).to(sampler.machine.device)
        with sampler.machine.autocast():
            codes = sampler.tokenizer.encode(x)
        rows += [to_uint8(x), sampler.pixels(codes)]
    return rows


def draw_many(sampler, num, batch_size, machine):
    """uint8 images (num, H, W, 3) and labels (num,), each class equally often, on rank 0; None elsewhere."""
    labels = torch.arange(num) % sampler.ar.cfg.num_classes
    mine = torch.arange(machine.rank, num, machine.world)
    step = max(1, batch_size // machine.world)
    images = torch.cat([sampler.pixels(sampler.codes(labels[part], part)) for part in
                        tqdm(mine.split(step), desc="samples", unit="batch", disable=machine.rank > 0)])
    if machine.world == 1:
        return images.numpy(), labels.numpy()
    gathered = [None] * machine.world if machine.rank == 0 else None
    dist.gather_object(images, gathered)
    if machine.rank:
        return None
    result = np.zeros((num, *images.shape[1:]), np.uint8)
    for rank, part in enumerate(gathered):
        result[rank::machine.world] = part
    return result, labels.numpy()


def parse_args():
    parser = argparse.ArgumentParser(description="Draw images.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--tokenizer", help="tokenizer file or released directory; by default tokenizer.safetensors in --out")
    flag("--ar", help="AR file or released directory; by default ar.safetensors in --out")
    flag("--data", default=str(EMBEDDED / "val"), help="images of the reconstruction grid")
    flag("--num", type=int, default=1000, help="images in samples.npz; 0 draws only the grids")
    flag("--classes", nargs="+", metavar="CLASS", help="names or numbers of the grids' classes; by default ten of all")
    flag("--columns", type=int, default=10, help="images per row of a grid")
    flag("--cfg_visual", type=float, default=2.0,
         help="guidance of the visual tokens: 1 = off, s * cond + (1 - s) * uncond; below 1 it pulls towards unconditional")
    flag("--cfg_prologue", type=float, default=1.0, help="constant guidance of the prologue tokens, in the same sense")
    flag("--cfg_schedule", default="cosine", choices=SCHEDULES, help="how the visual scale grows from 1 along the sequence")
    flag("--cfg_power", type=float, default=0.25, help="power of the progress in the schedule; smaller grows earlier")
    flag("--temperature", type=float, default=1.0, help="of the visual tokens")
    flag("--temperature_prologue", type=float, help="of the prologue tokens; by default that of the visual tokens")
    flag("--top_k", type=int, default=0, help="draw among the k likeliest codes only; 0 = off")
    flag("--top_p", type=float, default=1.0, help="draw among the likeliest codes that hold this share; 1 = off")
    common_flags(parser, batch_size=100)
    args = parser.parse_args()
    if args.temperature <= 0 or (args.temperature_prologue or 1) <= 0:
        parser.error("a temperature must be above 0; for the likeliest codes use --top_k 1")
    return args


def main():
    args = parse_args()
    machine, out = Machine(args), Path(args.out)
    machine.print("attention by", attention_backend(machine.device, machine.dtype))
    paths = args.tokenizer or out / "tokenizer.safetensors", args.ar or out / "ar.safetensors"
    tokenizer = Tokenizer.load(paths[0]).to(machine.device)
    ar = AR.load(paths[1], tokenizer).to(machine.device)
    check_pair(tokenizer, ar, names=paths)
    sampler = Sampler(ar, tokenizer, machine, args)
    classes = class_numbers(args.classes, ar)
    if args.cfg_visual != 1:
        scales = (f"{guidance(args.cfg_visual, args.cfg_schedule, args.cfg_power, t):.2f}" for t in (0, 0.25, 0.5, 0.75, 1))
        machine.print("visual guidance at 0, 1/4, 1/2, 3/4 and the end of the image:", " ".join(scales))

    if machine.rank == 0:
        names = [f"{i} {ar.cfg.classes[i]}" if ar.cfg.classes else str(i) for i in classes]
        save_grid(out / "samples.png", class_grid(sampler, classes, args.columns))
        print(f"{out / 'samples.png'}: a row each of {', '.join(names)}")
        if ar.cfg.num_prologue:
            save_grid(out / "fixed_prologue.png", fixed_prologue_grid(sampler, classes, args.columns))
            print(f"{out / 'fixed_prologue.png'}: each row one prologue, visual tokens drawn anew; last row different prologues")
        save_grid(out / "reconstructions.png", reconstruction_grid(sampler, args.data, args.columns))
        print(f"{out / 'reconstructions.png'}: originals above their reconstructions")
    if args.num:
        drawn = draw_many(sampler, args.num, args.batch_size, machine)
        if machine.rank == 0:
            save_npz(out / "samples.npz", dict(arr_0=drawn[0], arr_1=drawn[1]))
            print(f"{out / 'samples.npz'}: {len(drawn[0])} images")


if __name__ == "__main__":
    run(main)
