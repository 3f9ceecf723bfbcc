"""Draw images: a class grid, a fixed-prologue grid, reconstructions, and an .npz of many samples for fid.py.

    python sample.py                                        # the pair in out/, or checkpoints/fashion_mnist before there is one
    python sample.py --classes bag sneaker --cfg_visual 3   # a grid of chosen classes, by name or number
    torchrun --nproc_per_node 8 sample.py --num_samples 50000 --batch_size 1024 --preset prologue-l-xl \
        --tokenizer ckpts/prologue-l-tokenizer --ar ckpts/ar-prologue-l-xl

Label and noise of an image are functions of its index and the seed, so batch size and ranks change nothing. In --out it
leaves samples.png, fixed_prologue.png, reconstructions.png, samples.npz (arr_0 uint8 (N, H, W, 3), arr_1 labels) and
samples.json, the settings they were drawn with. With --sweep it leaves only sweep.json: gFID for every combination.
"""
import argparse
import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import fid
from ar import AR, SCHEDULES, check_pair
from common import (InputError, Machine, SharedRows, common_flags, exact_fp32, positive, run, save_grid, to_float, to_uint8,
                    writing)
from pretokenize import EMBEDDED, Images
from tokenizer import Tokenizer

# Paper table A5. name: (prologue scale, visual scale, power of the cosine) and, without CFG, (prologue, visual) temperature.
PRESETS = {
    "1d": ((1.0, 19.0, 1.75), (1.0, 0.85)),
    "2d": ((1.0, 10.0, 1.5), (1.0, 0.85)),
    "2d-l-b": ((1.0, 5.0, 1.75), (1.0, 0.9)),
    "prologue-b-b": ((0.7, 3.75, 0.2), (0.7, 0.9)),
    "prologue-b-l": ((0.8, 3.0, 0.225), (0.7, 0.9)),
    "prologue-b-xl": ((0.8, 2.75, 0.25), (0.8, 0.9)),
    "prologue-l-b": ((0.65, 2.75, 0.25), (0.8, 0.95)),
    "prologue-l-l": ((0.7, 2.5, 0.25), (0.95, 0.9)),
    "prologue-l-xl": ((0.7, 2.25, 0.225), (1.0, 0.9)),
    "prologue-post": ((0.6, 3.75, 0.25), (0.8, 0.8)),
    "prologue-onestage": ((0.8, 3.75, 0.25), (0.8, 0.8)),
    "prologue-l-b-vgg": ((0.7, 3.75, 0.25), (0.8, 0.85)),
    "prologue-l-b-16k": ((0.65, 3.25, 0.25), (0.8, 0.95)),
}


def sampling_defaults(preset, no_cfg):
    """Defaults of the sampling flags for --preset and --no_cfg; the tiny demo's where there is no preset."""
    (*scales, power), temperatures = PRESETS[preset] if preset else ((1.0, 2.0, 0.25), (1.0, 1.0))
    scales, temperatures = ((1.0, 1.0), temperatures) if no_cfg else (scales, (1.0, 1.0))
    names = "cfg_prologue", "cfg_visual", "cfg_power", "temperature_prologue", "temperature"
    return dict(zip(names, (*scales, power, *temperatures)))


def load_pair(args, device):
    """Tokenizer, AR model and their paths: --tokenizer and --ar, else those in --out, else the pair that comes with the code."""
    folder = Path(args.out)
    if not (args.tokenizer or args.ar or any((folder / name).exists() for name in ("tokenizer.safetensors", "ar.safetensors"))):
        folder = Path(__file__).parent / "checkpoints" / "fashion_mnist"
    paths = args.tokenizer or folder / "tokenizer.safetensors", args.ar or folder / "ar.safetensors"
    tokenizer = Tokenizer.load(paths[0]).to(device)
    ar = AR.load(paths[1], tokenizer).to(device)
    check_pair(tokenizer, ar, names=paths)
    return tokenizer, ar, paths


def noise_for(seed, indices, count):
    """Uniform noise (len(indices), count); row i depends on (seed, indices[i]) alone."""
    return torch.from_numpy(np.stack([np.random.default_rng((seed, int(i))).random(count, dtype=np.float32) for i in indices]))


class Sampler:
    """Draws codes and pixels; `settings` are the keyword arguments of AR.generate, batch_size that of all ranks together."""

    def __init__(self, ar, tokenizer, machine, seed, batch_size, settings):
        self.ar, self.tokenizer, self.machine, self.seed, self.settings = ar, tokenizer, machine, seed, settings
        self.count, self.batch_size = ar.cfg.num_prologue + ar.cfg.num_visual, max(1, batch_size // machine.world)

    def codes(self, labels, indices, prologue=None):
        """labels (n,), image indices (n,), prologue (n, K) or None -> codes (n, K+N), --batch_size at a time"""
        parts, indices = [], torch.as_tensor(indices)
        for i in range(0, len(labels), self.batch_size):
            # A compiled step knows one batch size, so a short batch is filled up with its last image.
            end = i + self.batch_size if self.ar.compiled_step else min(i + self.batch_size, len(labels))
            part = torch.arange(i, end).clamp(max=len(labels) - 1)
            with self.machine.autocast():
                parts.append(self.ar.generate(
                    labels[part].to(self.machine.device), prologue=None if prologue is None else prologue[part],
                    noise=noise_for(self.seed, indices[part], self.count), **self.settings))
        return torch.cat(parts)[:len(labels)]

    def pixels(self, codes):
        """codes (n, K+N) -> uint8 (n, H, W, 3)"""
        with self.machine.autocast():
            return torch.cat([to_uint8(self.tokenizer.decode(part)) for part in codes.split(self.batch_size)])


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
    index = [i * len(images) // (4 * columns) for i in range(4 * columns)]
    x = to_float(torch.stack([images[i, i][0][0] for i in index])).to(sampler.machine.device)
    with sampler.machine.autocast():
        decoded = sampler.pixels(sampler.tokenizer.encode(x))
    return [row for pair in zip(to_uint8(x).split(columns), decoded.split(columns)) for row in pair]


def draw_many(sampler, num, machine, path):
    """Writes the .npz of `num` images, each class equally often: arr_0 uint8 (num, H, W, 3), arr_1 labels."""
    size, labels = sampler.tokenizer.cfg.image_size, torch.arange(num) % sampler.ar.cfg.num_classes
    weights = hashlib.sha256(sampler.ar.head.weight.detach().cpu().float().numpy()).hexdigest()
    key = sampler.settings, sampler.seed, sampler.tokenizer.fingerprint(), weights
    rows = SharedRows(path, (num, size, size, 3), np.uint8, machine, key)
    missing = torch.from_numpy(rows.missing())
    for i in tqdm(range(0, len(missing), sampler.batch_size), desc="samples", unit="batch", disable=machine.rank > 0):
        part = missing[i:i + sampler.batch_size]
        rows.write(part.numpy(), sampler.pixels(sampler.codes(labels[part], part)).numpy())
    rows.pack("arr_0", arr_1=labels.numpy())


class Drawn:
    """Images 0 .. num - 1 of a sampler as a source for fid.extract, each drawn when it is read."""

    def __init__(self, sampler, num):
        self.sampler, self.num = sampler, num

    def __len__(self):
        return self.num

    def __getitem__(self, part):
        index = torch.arange(self.num)[part]
        return self.sampler.pixels(self.sampler.codes(index % self.sampler.ar.cfg.num_classes, index)).numpy()


def generation_fid(sampler, num, network, reference):
    """gFID and Inception Score of `num` images, each class equally often, drawn and measured by all ranks."""
    network = exact_fp32(sampler.machine.device.type)(network.forward)  # no TF32, no autocast in each call
    drawn = fid.extract(network, Drawn(sampler, num), sampler.machine.device, sampler.batch_size, "samples", keep=0)
    return {"gfid": fid.frechet_distance(*drawn["pool"], *reference["pool"]), "inception_score": drawn["inception_score"]}


def sweep(sampler, args, out):
    """A table of every combination of the values in --sweep, best gFID first."""
    size, lists = sampler.tokenizer.cfg.image_size, {}
    for text in args.sweep:
        key, _, values = text.partition("=")
        try:
            again, lists[key] = key in lists, [type(sampler.settings[key])(value) for value in values.split(",")]
            if again or key == "cfg_schedule" and not set(lists[key]) <= set(SCHEDULES):
                raise ValueError
        except (KeyError, ValueError):
            raise InputError(f"--sweep {text}: wanted is a name of {', '.join(sampler.settings)}, each once, '=', and values "
                             "with commas between them") from None
    network = fid.feature_network("auto", size, args.inception, sampler.machine.device)[1]
    with exact_fp32(sampler.machine.device.type):
        reference = fid.reference_features(args.reference, network, sampler.machine.device, sampler.batch_size, False, size)
    base, rows = sampler.settings, []
    for chosen in (dict(zip(lists, values)) for values in itertools.product(*lists.values())):
        sampler.settings = base | chosen
        rows.append(chosen | generation_fid(sampler, args.num, network, reference))
    rows.sort(key=lambda row: row["gfid"])
    if sampler.machine.rank == 0:
        with writing(out / "sweep.json") as temporary:
            temporary.write_text(json.dumps({"settings": base, "num": args.num, "seed": args.seed, "rows": rows}, indent=1))
        print("\n".join("  ".join(f"{text:>{max(10, len(name))}}" for name, text in zip(rows[0], line)) for line in
                        [list(rows[0])] + [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in r.values()] for r in rows]))


def parse_args():
    preset = argparse.ArgumentParser(add_help=False)
    preset.add_argument("--preset", choices=PRESETS, help="sampling defaults of a row of the paper's table A5")
    preset.add_argument("--no_cfg", action="store_true", help="sampling defaults without guidance")
    chosen = preset.parse_known_args()[0]
    parser = argparse.ArgumentParser(description="Draw images.", parents=[preset],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--tokenizer", help="tokenizer file or released directory; by default that in --out, or else the shipped one")
    flag("--ar", help="AR file or released directory; by default that in --out, or else the shipped one")
    flag("--data", help="images of the reconstruction grid; by default the embedded ones for a 28 x 28 tokenizer")
    flag("--export", metavar="DIR", help="only write both models there as single files, also released ones")
    flag("--num", "--num_samples", type=int, default=1000,
         help="images in samples.npz, 0 for only the grids; under torchrun, which takes --num for its own, --num_samples")
    flag("--sweep", nargs="+", metavar="NAME=VALUE,VALUE", help="only measure gFID of --num images for each combination of the "
         "values, as in: --sweep cfg_visual=1.5,2,3 cfg_power=0.2,0.5 temperature=0.9,1.0")
    flag("--reference", default=str(EMBEDDED / "train"), help="npz, folder or zip that --sweep compares with")
    flag("--inception", metavar="FILE", help="torch-fidelity's Inception weights for --sweep, instead of downloading them")
    flag("--classes", nargs="+", metavar="CLASS", help="names or numbers of the grids' classes; by default ten of all")
    flag("--columns", type=positive, default=10, help="images per row of a grid")
    flag("--cfg_visual", type=float,
         help="guidance of the visual tokens: 1 = off, s * cond + (1 - s) * uncond; below 1 it pulls towards unconditional")
    flag("--cfg_prologue", type=float, help="guidance of the prologue tokens, in the same sense")
    flag("--cfg_schedule", default="cosine", choices=SCHEDULES, help="how the visual scale grows from 1 along the sequence")
    flag("--cfg_power", type=float, help="power of the progress in the schedule; smaller grows earlier")
    flag("--temperature", type=float, help="of the visual tokens")
    flag("--temperature_prologue", type=float, help="of the prologue tokens")
    flag("--top_k", type=int, default=0, help="draw among the k likeliest codes only; 0 = off")
    flag("--top_p", type=float, default=1.0, help="draw among the likeliest codes that hold this share; 1 = off")
    common_flags(parser, batch_size=100)
    parser.set_defaults(**sampling_defaults(chosen.preset, chosen.no_cfg))
    args = parser.parse_args()
    if args.num < 2 * bool(args.sweep):
        parser.error("--num must be at least 0, and with --sweep at least 2")
    return args


def main():
    args = parse_args()
    machine, out = Machine(args), Path(args.out)
    tokenizer, ar, paths = load_pair(args, machine.device)
    machine.print(f"{paths[0]} and {paths[1]}")
    if ar.cfg.num_classes == 0:
        raise InputError(f"{paths[1]} is the joint AR of stage 1, which knows no classes; an ar.safetensors is needed")
    if machine.compile:
        tokenizer.decoder.transformer.compile()
    if machine.compile and machine.device.type == "cuda":  # on a CPU the packed weights of `freeze` are faster
        ar.compile_step()
    if args.export:
        if machine.rank == 0:
            tokenizer.save(Path(args.export) / "tokenizer.safetensors")
            ar.save(Path(args.export) / "ar.safetensors")
        return
    ar.freeze(machine.dtype)
    sampler = Sampler(ar, tokenizer, machine, args.seed, args.batch_size, {key: getattr(args, key) for key in (
        "cfg_prologue", "cfg_visual", "cfg_schedule", "cfg_power", "temperature", "temperature_prologue", "top_k", "top_p")})
    if args.sweep:
        return sweep(sampler, args, out)
    classes = class_numbers(args.classes, ar)
    if machine.rank == 0:
        names = [f"{i} {ar.cfg.classes[i]}" if ar.cfg.classes else str(i) for i in classes]
        labels = torch.tensor(classes).repeat_interleave(args.columns)
        save_grid(out / "samples.png", list(sampler.pixels(sampler.codes(labels, range(len(labels)))).split(args.columns)))
        print(f"{out / 'samples.png'}: a row each of {', '.join(names)}")
        if ar.cfg.num_prologue:
            save_grid(out / "fixed_prologue.png", fixed_prologue_grid(sampler, classes, args.columns))
            print(f"{out / 'fixed_prologue.png'}: each row one prologue, visual tokens drawn anew; last row different prologues")
        data = args.data or (EMBEDDED / "val" if tokenizer.cfg.image_size == 28 else None)
        if data:
            save_grid(out / "reconstructions.png", reconstruction_grid(sampler, data, args.columns))
            print(f"{out / 'reconstructions.png'}: originals above their reconstructions")
    if args.num:
        draw_many(sampler, args.num, machine, out / "samples.npz")
        if machine.rank == 0:
            settings = sampler.settings | {"tokenizer": str(paths[0]), "ar": str(paths[1]), "seed": args.seed, "num": args.num}
            with writing(out / "samples.json") as temporary:
                temporary.write_text(json.dumps(settings, indent=1) + "\n")
            print(f"{out / 'samples.npz'}: {args.num} images")


if __name__ == "__main__":
    run(main)
