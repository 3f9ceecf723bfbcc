"""Times the scripts on made-up data, by default with a GPU's share of the recipes for eight.

    python tools/bench.py stage1 ar --size B --compile --profile    # kernels by their share, too
    python tools/bench.py sample plain --size B --batch_size 1 8
    python tools/bench.py ar --size XL --gradient_checkpointing     # unknown flags: the trainer's

stage1 and ar run the loops of train_stage1.py and train_ar.py, sample AR.generate with guidance,
plain draws as the official code does, data decodes and crops JPEGs in one thread. The speed of a
machine drifts: compare what one call prints.
"""

import argparse
import functools
import random
import resource
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_ar
import train_stage1
from ar import AR, ARConfig
from ar import SIZES as AR_SIZES
from pretokenize import open_image, random_crop
from sample import pack_for_cpu
from tokenizer import SIZES, Tokenizer, TokenizerConfig, attention, save_checkpoint


def measure_steps(args):
    """An iterator for a loop of steps: one that compiles, an eager one that counts FLOPs, one more,
    then those that are timed, and with --profile another. Leaves seconds and flops in args."""
    yield
    torch.compiler.set_stance("force_eager")
    with FlopCounterMode(display=False) as counter:
        yield
    args.flops = counter.get_total_flops()  # without those of flash-attn
    torch.compiler.set_stance("default")
    yield
    if args.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(args.repeat):
        yield
    if args.device == "cuda":
        torch.cuda.synchronize()
    args.seconds = (time.perf_counter() - start) / args.repeat
    if args.profile:
        with torch.profiler.profile() as profiler:
            yield
        print(profiler.key_averages().table(sort_by=f"self_{args.device}_time_total", row_limit=25,
                                            max_name_column_width=80))


# The trainers


def run_trainer(module, args, *flags):
    flags = [module.__name__, "--size", args.size, "--batch_size", args.images, "--device",
             args.device, "--dtype", args.dtype, *flags, *args.trainer_flags]
    if args.compile:
        flags.append("--compile")
    meter = measure_steps(args)
    next(meter)
    optimizers = []

    def after_step(optimizer, *_):
        optimizers.append(optimizer)
        if optimizer is optimizers[0]:  # stage 1 has another for the discriminator
            next(meter)  # at the end raises StopIteration, which ends the trainer

    hook = register_optimizer_step_post_hook(after_step)
    with mock.patch.object(sys, "argv", list(map(str, flags))), suppress(StopIteration):
        module.main()
    hook.remove()


def bench_stage1(args, folder):
    """On the bundled images, enlarged: what decoding takes is the job data."""
    import lpips

    flags = ["--out", folder, "--crop", "random", "--flip"]
    if args.size != "tiny":
        flags += ["--ar_size", "S", "--gan_channels", 64, "--perceptual", "vgg"]
    random_weights = functools.partial(lpips.LPIPS, pretrained=False, pnet_rand=True)
    with mock.patch.object(lpips, "LPIPS", random_weights):  # no download
        run_trainer(train_stage1, args, *flags)


def bench_ar(args, folder):
    config = TokenizerConfig(**SIZES.get(args.size, SIZES["B"]))
    tokenizer = Tokenizer(config)
    tokenizer.save(folder / "tokenizer.safetensors")
    length = config.num_prologue + config.num_visual
    codes = torch.randint(config.prologue_codebook_size, (256, 1, length))
    tensors = dict(codes=codes.to(torch.uint16), labels=torch.randint(1000, (256,)))
    classes = [str(i) for i in range(1000)]
    about = dict(tokenizer=vars(config), digest="", partner="", classes=classes)
    save_checkpoint(folder / "codes.safetensors", "codes", tensors, about)
    run_trainer(train_ar, args, "--out", folder)


# Sampling and data


class GrowingCache:
    """In the place of ar.KVCache: keys and values are copied to a longer tensor at each token."""

    k = None

    def attend(self, q, k, v, start):
        if self.k is not None:
            k = torch.cat([self.k, k], 1)  # (2B, start + 1, heads, d)
            v = torch.cat([self.v, v], 1)
        self.k = k
        self.v = v
        return attention(q, k, v)


def generate_plainly(ar, labels, scale=3.75):
    """A step also for EOS, always both halves, and in each the logits of the whole vocabulary."""
    caches = [GrowingCache() for _ in ar.transformer.blocks]
    x = ar.first_input(torch.cat([labels, torch.full_like(labels, ar.no_class)]))  # (2B, 1, D)
    for i in range(ar.length):
        h = ar.step(x, caches, i)  # (2B, D)
        with torch.autocast(h.device.type, enabled=False):
            logits = ar.head(h)  # (2B, vocabulary)
        conditional, unconditional = logits.chunk(2)
        guided = scale * conditional + (1 - scale) * unconditional
        p = guided[:, : ar.config.codebook_size].softmax(-1)
        x = ar.token_embedding(torch.multinomial(p, 1)).repeat(2, 1, 1)  # (2B, 1, D)


@torch.no_grad()
def bench_sampling(args, folder):
    config = TokenizerConfig(**SIZES.get(args.size, SIZES["B"]))
    ar = AR(ARConfig.for_tokenizer(config, **AR_SIZES[args.size])).eval().to(args.device)
    labels = torch.arange(args.images, device=args.device)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in sample.py, and so is the cast
    for module in ar.transformer.modules():
        if isinstance(module, torch.nn.Linear) and args.dtype == "bf16":
            module.to(torch.bfloat16)
    if args.compile:
        ar.compile_step()
    elif args.device == "cpu" and args.job == "sample":
        pack_for_cpu(ar)
    settings = dict(cfg_prologue=0.7, cfg_visual=3.75, cfg_power=0.2)
    with torch.autocast(args.device, torch.bfloat16, args.dtype == "bf16"):
        for _ in measure_steps(args):
            if args.job == "plain":
                generate_plainly(ar, labels)
            else:
                ar.generate(labels, **settings)
    weights = list(ar.transformer.parameters())
    read = ar.length * sum(weight.nbytes for weight in weights) / args.seconds
    print(f"  {args.seconds / ar.length * 1e3:.2f} ms a token, {read / 1e9:.0f} GB/s of weights")
    used = sum(weight.numel() for weight in weights) + config.codebook_size * ar.config.dim
    args.flops = 4 * args.images * ar.length * used  # both halves; packed weights are not counted


def bench_data(args, folder):
    """A JPEG of ImageNet's usual size, again and again."""
    noise = np.random.default_rng(0).integers(0, 255, (75, 100, 3), np.uint8)
    Image.fromarray(noise).resize((500, 375)).save(folder / "image.jpeg", quality=90)
    for _ in measure_steps(args):
        for _ in range(args.images):
            random_crop(open_image(folder / "image.jpeg"), 256, random)


JOBS = {"stage1": bench_stage1, "ar": bench_ar, "sample": bench_sampling, "plain": bench_sampling,
        "data": bench_data}


def parse_args():
    parser = argparse.ArgumentParser(description="Time the scripts.")
    flag = parser.add_argument
    flag("jobs", nargs="+", choices=JOBS)
    flag("--size", default="B", choices=AR_SIZES, help="of the tokenizer and of the AR model")
    flag("--batch_size", type=int, nargs="+", help="by default 32 for stage1, else 64")
    flag("--repeat", type=int, default=5, help="steps, or draws, that are timed")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu",
         choices=["cuda", "mps", "cpu"])
    flag("--dtype", choices=["fp32", "bf16"], help="by default bf16 on CUDA")
    flag("--compile", action="store_true")
    flag("--profile", action="store_true", help="print the kernels that take the most time")
    args, args.trainer_flags = parser.parse_known_args()
    args.dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    return args


def main():
    args = parse_args()
    cuda = args.device == "cuda"
    n = 8192 if cuda else 2048
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    a, b = torch.randn(2, n, n, device=args.device, dtype=dtype)
    timer = functools.partial(Timer, globals=dict(a=a, b=b), num_threads=torch.get_num_threads())
    gemm = 2 * n**3 / timer("a @ b").timeit(10).mean / 1e12
    copy = 2 * a.nbytes / timer("a.clone()").timeit(10).mean / 1e9
    print(f"{torch.cuda.get_device_name() if cuda else 'CPU'}, torch {torch.__version__}, "
          f"{args.dtype}: matrix product {gemm:.3g} TFLOP/s, copy {copy:.0f} GB/s")
    for job in args.jobs:
        for images in args.batch_size or [32 if job == "stage1" else 64]:
            args.job = job
            args.images = images
            with tempfile.TemporaryDirectory() as folder:
                JOBS[job](args, Path(folder))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
            if cuda:
                peak = torch.cuda.max_memory_allocated() / 2**30
            rate = args.flops / args.seconds / 1e12
            print(f"{job} {args.size}{', compiled' * args.compile}, {images} images: "
                  f"{args.seconds * 1e3:.1f} ms, {images / args.seconds:.1f} images/s, "
                  f"{peak:.2f} GiB, {rate:.3g} TFLOP/s, MFU {rate / gemm:.1%}", flush=True)


if __name__ == "__main__":
    main()
