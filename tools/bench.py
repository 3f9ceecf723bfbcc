"""Times the real scripts beside the arithmetic that they cannot avoid.

    python tools/bench.py stage1 --size B --batch_size 4
    python tools/bench.py ar --size B --batch_size 8
    python tools/bench.py sample plain --size B --batch_size 1 8 32
    python tools/bench.py data fid

stage1 and ar start train_stage1.py and train_ar.py on synthetic data and read the time of each step
from their log. sample calls AR.generate with guidance, and plain draws as many tokens as somebody
would who has tuned nothing. fid is the Inception network beside the package it comes from, data is
decoding and cropping. Each job is a process of its own, and its best time counts.

The floor of a job is its FLOPs over the rate of torch's own matrix product, which is measured just
before; for sampling it is the bytes of the weights over the bandwidth, where that takes longer. The
speed of a machine drifts, so compare ratios to the floor and not seconds.
"""

import argparse
import json
import math
import multiprocessing
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ar as ar_file
from ar import AR, ARConfig
from pretokenize import Images
from sample import cast_linears, pack_for_cpu
from tokenizer import SIZES, HelpFormatter, InputError, Tokenizer, TokenizerConfig, attention, whole
from train_stage1 import Discriminator, Stage1, training_view

# What the recipe of a size sets beside the size, as far as it costs time
STAGE1 = {
    "tiny": dict(ar_size="nano", gan_channels=16, crop="center"),
    "B": dict(ar_size="S", gan_channels=64, crop="random"),
    "L": dict(ar_size="S", gan_channels=64, crop="random"),
}


# Measures


def best(function, repeat):
    """The shortest of `repeat` calls after one that warms up, in seconds."""
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def gemm_rate(device, dtype):
    """FLOP/s of torch's own matrix product, of matrices large enough to keep the device busy."""
    n = 8192 if device == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / best(lambda: a @ b, 10)


def bandwidth(device, dtype, n=8192):
    """Bytes/s of a matrix-vector product, which reads its matrix once."""
    a = torch.randn(n, n, device=device, dtype=dtype)
    x = torch.randn(n, 1, device=device, dtype=dtype)
    return a.nbytes / best(lambda: a @ x, 5)


def count_flops(function, *args):
    """FLOPs of function(*args), run with tensors that have a shape and no memory. Attention is
    written out as two products, because the counter does not know the CPU's fused one.
    """
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            function(*args)
    return counter.get_total_flops()


def peak_ram(pid="self"):
    """The most memory that a process has had so far, in GiB; NaN where there is no Linux."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return math.nan
    kilobytes = status.read_text().partition("VmHWM:")[2].split()[0]
    return int(kilobytes) / 2**20


def peak_memory(device):
    """The most memory that this process has had so far on `device`, in GiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return peak_ram()


def gpu_memory_in_use():
    """Of all processes together, in GiB."""
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


# Training


def run_trainer(script, flags, log, args):
    """Starts a trainer, waits for --repeat logged steps after two that warm up, and kills it.
    Returns the images/s of the fastest step and the peak memory in GiB: on CUDA what the trainer
    holds on the GPU then, if nothing else runs there. Raises InputError.
    """
    never = 10**9
    command = [sys.executable, ROOT / script, "--out", log.parent, "--device", args.device,
               "--steps", never, "--log_every", 1, "--eval_every", never, "--save_every", never,
               "--lr", 1e-4, *flags]
    if args.compile:
        command.append("--compile")
    if args.gradient_checkpointing:
        command.append("--gradient_checkpointing")
    before = gpu_memory_in_use() if args.device == "cuda" else 0.0
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    printed = []
    try:
        for line in process.stdout:  # one for each step: the log has grown when it comes
            printed.append(line)
            steps = log.read_text().splitlines() if log.exists() else []
            if len(steps) < args.repeat + 2:
                continue
            speeds = [json.loads(step)["images_per_s"] for step in steps]
            if args.device == "cuda":
                memory = gpu_memory_in_use() - before
            else:
                memory = peak_ram(process.pid)
            return max(speeds[2:]), memory
    finally:
        process.kill()
        process.wait()
    raise InputError(f"{script} ended early:\n{''.join(printed)}")


def tokenizer_config(size, args):
    cfg = TokenizerConfig(**SIZES[size], layout=args.layout)
    if args.image_size is not None:
        cfg = replace(cfg, image_size=args.image_size)
    return cfg


def stage1_step(cfg, batch_size, recipe):
    """What train_stage1.py computes in a step without a perceptual loss; means stand in for the
    losses, which cost next to nothing.
    """
    ar = None
    if cfg.num_prologue > 0:
        ar_cfg = ARConfig.for_tokenizer(cfg, num_classes=0, **ar_file.SIZES[recipe["ar_size"]])
        ar = AR(ar_cfg)
    stage1 = Stage1(Tokenizer(cfg), ar, ce_weight=3.0)
    gan = Discriminator(recipe["gan_channels"])
    x = torch.empty(batch_size, 3, cfg.image_size, cfg.image_size)
    labels = torch.empty(batch_size, dtype=torch.int64)
    drop = torch.empty(batch_size, dtype=torch.bool)

    y, vq, ce = stage1(x, labels, drop)
    gan.requires_grad_(False)
    (y.mean() + vq + ce + gan.net(y).mean()).backward()
    gan.requires_grad_(True)
    logits_real, logits_fake, _ = gan(x, y)
    (logits_real.mean() + logits_fake.mean()).backward()


def bench_stage1(args, batch_size):
    if args.size not in STAGE1:
        raise InputError(f"stage1 takes --size {', '.join(STAGE1)}")
    cfg = tokenizer_config(args.size, args)
    recipe = STAGE1[args.size]
    flags = ["--size", args.size, "--layout", args.layout, "--image_size", cfg.image_size,
             "--ar_size", recipe["ar_size"], "--gan_channels", recipe["gan_channels"],
             "--gan_weight", 0.1, "--perceptual", args.perceptual, "--crop", recipe["crop"],
             "--flip", "--batch_size", batch_size, "--num_workers", 0]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        rng = np.random.default_rng(0)
        for i in range(16):
            pixels = rng.integers(0, 255, (cfg.image_size, cfg.image_size, 3), np.uint8)
            Image.fromarray(pixels).save(data / f"{i}.png")
        flags += ["--data", data]
        speed, memory = run_trainer("train_stage1.py", flags,
                                    Path(folder) / "train_stage1.jsonl", args)
    return dict(seconds=batch_size / speed, images=batch_size, peak_gb=memory,
                flops=count_flops(stage1_step, cfg, batch_size, recipe))


def ar_step(cfg, size, batch_size):
    """What train_ar.py computes in a step."""
    ar = AR(ARConfig.for_tokenizer(cfg, **ar_file.SIZES[size]))
    codes = torch.empty(batch_size, cfg.num_prologue + cfg.num_visual, dtype=torch.int64)
    labels = torch.empty(batch_size, dtype=torch.int64)
    ar(codes, labels).mean().backward()


def bench_ar(args, batch_size):
    cfg = tokenizer_config(args.tokenizer_size, args)
    with tempfile.TemporaryDirectory() as folder:
        # A tokenizer that has learned nothing and random codes, as pretokenize.py would write them
        tokenizer = Tokenizer(cfg)
        tokenizer.save(Path(folder) / "tokenizer.safetensors")
        rng = np.random.default_rng(0)
        codes = rng.integers(0, cfg.codebook_size, (256, 1, cfg.num_visual), np.uint16)
        if cfg.num_prologue > 0:
            prologue = rng.integers(0, cfg.prologue_codebook_size, (256, 1, cfg.num_prologue),
                                    np.uint16)
            codes = np.concatenate([prologue, codes], 2)
        config = dict(tokenizer=asdict(cfg), fingerprint=tokenizer.fingerprint(),
                      classes=[str(i) for i in range(1000)])
        np.savez(Path(folder) / "codes.npz", codes=codes, labels=rng.integers(0, 1000, 256),
                 config=json.dumps(config))
        flags = ["--size", args.size, "--batch_size", batch_size]
        speed, memory = run_trainer("train_ar.py", flags, Path(folder) / "train_ar.jsonl", args)
    return dict(seconds=batch_size / speed, images=batch_size, peak_gb=memory,
                flops=count_flops(ar_step, cfg, args.size, batch_size))


# Sampling


def make_ar(args):
    """An AR model with random weights, in eval mode, and the number type of its blocks."""
    torch.manual_seed(0)
    cfg = tokenizer_config(args.tokenizer_size, args)
    ar = AR(ARConfig.for_tokenizer(cfg, **ar_file.SIZES[args.size])).eval().to(args.device)
    dtype = torch.float32
    if args.device == "cuda":
        dtype = torch.bfloat16
        cast_linears(ar, dtype)
    return ar, dtype


def result_of_sampling(ar, dtype, draw, args, batch_size):
    repeat = 1 if args.device == "cpu" else args.repeat
    with torch.no_grad(), torch.autocast(args.device, dtype, enabled=dtype != torch.float32):
        seconds = best(draw, repeat)
    cfg = ar.cfg
    matrices = sum(p.numel() for p in ar.transformer.parameters())
    # Of the head a token needs the rows of its own codebook: so many numbers over a whole sequence.
    head = cfg.num_prologue * cfg.prologue_codebook_size + cfg.num_visual * cfg.codebook_size
    head *= cfg.dim
    # All tokens of both halves pass the matrices; a step reads them once for all its images, and
    # EOS has no step of its own.
    flops = 4 * batch_size * (ar.length * matrices + head)
    read = dtype.itemsize * ((cfg.num_prologue + cfg.num_visual) * matrices + head)
    return dict(seconds=seconds, images=batch_size, peak_gb=peak_memory(args.device), flops=flops,
                bytes=read)


def bench_sample(args, batch_size):
    ar, dtype = make_ar(args)
    if args.compile:
        ar.compile_step()
    elif args.device == "cpu":
        pack_for_cpu(ar)
    labels = torch.arange(batch_size, device=args.device)

    def draw():
        ar.generate(labels, cfg_prologue=0.7, cfg_visual=3.75, cfg_power=0.2)

    return result_of_sampling(ar, dtype, draw, args, batch_size)


class GrowingCache:
    """In the place of ar.KVCache: keys and values are copied to a longer tensor at each token."""

    def __init__(self):
        self.k = None
        self.v = None

    def attend(self, q, k, v, start):
        if self.k is not None:
            k = torch.cat([self.k, k], 1)  # (2B, start + 1, heads, d)
            v = torch.cat([self.v, v], 1)
        self.k = k
        self.v = v
        return attention(q, k, v)


def generate_plainly(ar, labels, scale=3.75):
    """A step for each token and also for EOS, always both halves, and in each the logits of the
    whole vocabulary in fp32. labels (B,)
    """
    caches = [GrowingCache() for _ in ar.transformer.blocks]
    head = ar.head.weight.float()
    unconditional = torch.full_like(labels, ar.cfg.num_classes)
    x = ar.bos(torch.cat([labels, unconditional]))[:, None]  # (2B, 1, D)
    for i in range(ar.length):
        h = ar.step(x, caches, i)  # (2B, D)
        with torch.autocast(h.device.type, enabled=False):
            logits = F.linear(h.float(), head)  # (2B, vocabulary)
        conditional, unconditional = logits.chunk(2)
        guided = scale * conditional + (1 - scale) * unconditional
        p = guided[:, : ar.cfg.codebook_size].softmax(-1)
        code = torch.multinomial(p, 1)  # (B, 1)
        x = ar.embedding(code).repeat(2, 1, 1)  # (2B, 1, D)


def bench_plain(args, batch_size):
    ar, dtype = make_ar(args)
    labels = torch.arange(batch_size, device=args.device)
    return result_of_sampling(ar, dtype, lambda: generate_plainly(ar, labels), args, batch_size)


# Evaluation and data


def bench_fid(args, batch_size):
    import fid
    from torch_fidelity import feature_extractor_inceptionv3 as package

    # Random weights do: the package is kept from downloading and loading the real ones.
    extractor = package.FeatureExtractorInceptionV3
    with mock.patch.object(package, "load_state_dict_from_url", return_value={}):
        with mock.patch.object(extractor, "load_state_dict"):
            theirs = extractor("random", ["2048", "logits_unbiased"])
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "inception.pth"
        torch.save(theirs.state_dict(), weights)
        _, ours = fid.feature_network("inception", 256, weights, args.device)
    theirs = theirs.eval().to(args.device)

    images = torch.randint(0, 256, (batch_size, 256, 256, 3), dtype=torch.uint8, device=args.device)
    with torch.no_grad():
        seconds = best(lambda: ours(images), args.repeat)
        their_seconds = best(lambda: theirs(images.permute(0, 3, 1, 2)), args.repeat)
    print(f"  torch-fidelity's extractor: {batch_size / their_seconds:.2f} images/s",
          file=sys.stderr)

    rng = np.random.default_rng(0)
    scales = np.linspace(0.1, 2, 2048, dtype=np.float32)
    a = rng.standard_normal((10000, 2048), np.float32) * scales
    b = rng.standard_normal((10000, 2048), np.float32) * scales
    moments_a = (a.mean(0).astype(np.float64), np.cov(a, rowvar=False))
    moments_b = (b.mean(0).astype(np.float64), np.cov(b, rowvar=False))
    distance_seconds = best(lambda: fid.frechet_distance(*moments_a, *moments_b), 1)
    print(f"  FID of 2,048 features: {distance_seconds:.2f} s", file=sys.stderr)
    pr_seconds = best(lambda: fid.precision_recall(a, b, args.device), 1)
    print(f"  precision and recall of 10,000 and 10,000: {pr_seconds:.1f} s", file=sys.stderr)
    return dict(seconds=seconds, images=batch_size, peak_gb=peak_memory(args.device),
                flops=11.4e9 * batch_size)


def bench_data(args, batch_size):
    """Decoding, random crop and flip of JPEGs of ImageNet's usual 500 x 375, in one thread."""
    settings = argparse.Namespace(seed=0, crop="random", flip=True)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "class").mkdir()
        rng = np.random.default_rng(0)
        for i in range(32):
            small = Image.fromarray(rng.integers(0, 255, (75, 100, 3), np.uint8))
            image = small.resize((500, 375), Image.Resampling.BICUBIC)
            image.save(Path(folder) / "class" / f"{i}.jpeg", quality=90)
        images = Images(folder)

        def load_all():
            for visit in range(32):
                training_view(images, visit, 256, settings)

        seconds = best(load_all, args.repeat)
    return dict(seconds=seconds, images=32, peak_gb=peak_ram(), flops=None)


# The script

JOBS = {"stage1": bench_stage1, "ar": bench_ar, "sample": bench_sample, "plain": bench_plain,
        "fid": bench_fid, "data": bench_data}


def run_job(job, batch_size, args):
    """Runs one job and prints its line."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    rate = gemm_rate(args.device, dtype)
    read_rate = bandwidth(args.device, dtype)
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    result = JOBS[job](args, batch_size)

    seconds = result["seconds"]
    images_per_s = result["images"] / seconds
    line = {"name": job, "seconds": seconds, "images_per_s": images_per_s}
    text = f"{job}: {images_per_s:.0f} images/s in one thread"
    if result["flops"] is not None:
        floor = max(result["flops"] / rate, result.get("bytes", 0) / read_rate)
        name = f"{job} batch {batch_size}"
        if job != "fid":
            name = f"{job} {args.size} batch {batch_size}"
        line = {"name": name, "seconds": seconds, "floor_seconds": floor, "ratio": seconds / floor,
                "peak_gb": result["peak_gb"], "images_per_s": images_per_s}
        text = (f"{name}: {seconds:.3g} s, {seconds / floor:.2f}x the floor of {floor:.3g} s (GEMM "
                f"{rate / 1e9:.0f} GFLOP/s, {read_rate / 1e9:.1f} GB/s), peak "
                f"{result['peak_gb']:.2f} GiB, {images_per_s:.3f} images/s")
    print(json.dumps(line) if args.json else text, flush=True)


def parse_args():
    parser = argparse.ArgumentParser(description="Time the scripts beside their arithmetic.",
                                     formatter_class=HelpFormatter)
    flag = parser.add_argument
    flag("jobs", nargs="+", choices=JOBS, metavar="JOB", help=f"some of {', '.join(JOBS)}")
    flag("--size", default="B", choices=ar_file.SIZES,
         help="of the tokenizer for stage1, of the AR model for ar, sample and plain")
    flag("--tokenizer_size", default="B", choices=SIZES,
         help="of the tokenizer whose codes ar, sample and plain work on")
    flag("--layout", default="prologue", choices=["prologue", "2d", "1d"], help="of the tokenizer")
    flag("--image_size", type=whole(1), help="side in pixels; by default that of the size")
    flag("--batch_size", type=whole(1), nargs="+", default=[4], help="images at a time")
    flag("--perceptual", default="none", choices=["none", "vgg", "convnext", "both"],
         help="of stage1; it is not part of the floor")
    flag("--repeat", type=whole(1), default=3,
         help="times of which the best counts; sample and plain run only once on a CPU")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu",
         choices=["cuda", "cpu"], help="by default what torch finds")
    flag("--compile", action="store_true", help="also a flag of the trainers, and for sample")
    flag("--gradient_checkpointing", action="store_true", help="a flag of the trainers")
    flag("--json", action="store_true", help="one JSON object for each job")
    return parser.parse_args()


def main():
    args = parse_args()
    # A process for each job, so that peak memory is its own. Forked, it would begin with ours.
    context = multiprocessing.get_context("spawn")
    for job in args.jobs:
        for batch_size in args.batch_size:
            process = context.Process(target=run_job, args=(job, batch_size, args))
            process.start()
            process.join()
            if process.exitcode != 0:
                sys.exit(process.exitcode)


if __name__ == "__main__":
    main()
