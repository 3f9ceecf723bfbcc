"""Times the real scripts against the arithmetic they cannot avoid: counted FLOPs over this machine's measured GEMM rate.

    python tools/bench.py stage1 --size B --image_size 256 --batch_size 4
    python tools/bench.py ar --size B --batch_size 8
    python tools/bench.py sample plain --size B --batch_size 1 8 32
    python tools/bench.py data fid

stage1 and ar start train_stage1.py and train_ar.py on synthetic data, read the time of each step from their log and the peak
memory from the process. sample calls AR.generate with guidance; plain draws as many tokens with a cache that grows by
concatenation, all rows of the head in fp32 and torch's own products. Every job is its own process; the best of --repeat counts.
The GEMM rate (and for sampling the memory bandwidth) is measured before each job, so only ratios are to be compared.
"""
import argparse
import contextlib
import functools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import ar as ar_model
import common
import tokenizer as tokenizer_file
import train_stage1
from common import product
from pretokenize import Images
from tokenizer import SIZES, Tokenizer, TokenizerConfig


def best(function, repeat):
    """Shortest of `repeat` timed calls after one warm-up, in seconds."""
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def gemm_rate(device, dtype, n=2048):
    """FLOP/s of an n x n matrix product, by torch's own `@`: MKL on x86, which peers use as well."""
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n**3 / best(lambda: a @ b, 10)


def product_rate(device, dtype, n=2048):
    """The same by `common.product`, which on the CPU is oneDNN."""
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n**3 / best(lambda: product(a, b), 10)


def bandwidth(device, dtype, n=8192):
    """Bytes/s of a matrix-vector product, which reads its matrix once."""
    a, x = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, 1, device=device, dtype=dtype)
    return n * n * a.element_size() / best(lambda: a @ x, 5)


def flops(function):
    """Counted FLOPs of a call on the meta device."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def peak_gb(pid="self"):
    """Peak resident memory in GiB."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0]) / 2**20


def run_trainer(script, flags, log, steps):
    """Starts a trainer, waits for `steps` logged steps, kills it -> (shortest step in images/s, peak GiB)."""
    process = subprocess.Popen([sys.executable, str(ROOT / script), *map(str, flags)], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    output, lines = "", []
    for line in process.stdout:
        output += line
        lines = [json.loads(x) for x in log.read_text().splitlines()] if log.exists() else []
        if len(lines) >= steps:
            memory = peak_gb(process.pid)
            process.kill()
            process.wait()
            return max(entry["images_per_s"] for entry in lines[1:]), memory
    sys.exit(f"{script} ended early:\n{output}")


def quiet(steps):
    never = 10**9
    return ["--steps", never, "--log_every", 1, "--eval_every", never, "--save_every", never, "--warmup", 10]


def tokenizer_config(args):
    return TokenizerConfig(**SIZES[args.tokenizer_size] | {"layout": args.layout} |
                           ({"image_size": args.image_size} if args.image_size else {}))


def bench_stage1(args, batch_size):
    args.tokenizer_size = args.size
    cfg, recipe = tokenizer_config(args), train_stage1.RECIPES[args.size]
    with tempfile.TemporaryDirectory() as folder:
        for i in range(16):
            noise = np.random.default_rng(i).integers(0, 255, (cfg.image_size, cfg.image_size, 3), np.uint8)
            (Path(folder) / "data").mkdir(exist_ok=True)
            Image.fromarray(noise).save(Path(folder) / "data" / f"{i}.png")
        speed, memory = run_trainer("train_stage1.py", [
            "--size", args.size, "--layout", args.layout, "--image_size", cfg.image_size, "--batch_size", batch_size,
            "--perceptual", args.perceptual, "--data", f"{folder}/data", "--out", folder, "--device", args.device,
            "--num_workers", 0, *quiet(0), *args.passed_on], Path(folder) / "train_stage1.jsonl", args.repeat + 2)

    def iteration():
        tokenizer_file.exact_fp32 = lambda device: contextlib.nullcontext()  # there is no autocast on the meta device
        with torch.device("meta"):
            tokenizer, gan = Tokenizer(cfg), train_stage1.Discriminator(recipe["gan_channels"])
            ar = ar_model.AR(ar_model.ARConfig.for_tokenizer(cfg, num_classes=0, **ar_model.SIZES[recipe["ar_size"]])) \
                if cfg.num_prologue else None
            for part in [tokenizer.encoder, tokenizer.decoder] + ([ar] if ar else []):
                part.angles = part.angles.to("meta")
            images = torch.empty(batch_size, 3, cfg.image_size, cfg.image_size)
            y, codes, onehot, vq = tokenizer(images)
            loss = y.mean() + vq + gan.net(y).mean()
            if ar:
                labels, drop = torch.empty(batch_size, dtype=torch.int64), torch.empty(batch_size, dtype=torch.bool)
                loss = loss + ar(codes, labels, onehot, drop).mean()
            loss.backward()
            real, fake, _ = gan(images, y, False)
            (real.mean() + fake.mean()).backward()

    return {"seconds": batch_size / speed, "flops": flops(iteration), "peak_gb": memory, "images": batch_size}


def bench_ar(args, batch_size):
    cfg = tokenizer_config(args)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Tokenizer(cfg)
        tokenizer.save(Path(folder) / "tokenizer.safetensors")
        rng, count = np.random.default_rng(0), 256
        codes = np.concatenate([rng.integers(0, size, (count, 1, n), np.uint16) for size, n in (
            (max(1, cfg.prologue_codebook_size), cfg.num_prologue), (cfg.codebook_size, cfg.num_visual))], 2)
        config = {"tokenizer": vars(cfg), "fingerprint": tokenizer.fingerprint(), "classes": [str(i) for i in range(1000)]}
        np.savez(Path(folder) / "codes.npz", codes=codes, labels=rng.integers(0, 1000, count), config=json.dumps(config))
        speed, memory = run_trainer("train_ar.py", [
            "--size", args.size, "--batch_size", batch_size, "--out", folder, "--device", args.device, *quiet(0),
            *args.passed_on], Path(folder) / "train_ar.jsonl", args.repeat + 2)

    def iteration():
        with torch.device("meta"):
            ar = ar_model.AR(ar_model.ARConfig.for_tokenizer(cfg, **ar_model.SIZES[args.size]))
            ar.angles = ar.angles.to("meta")
            codes = torch.empty(batch_size, cfg.num_prologue + cfg.num_visual, dtype=torch.int64)
            ar(codes, torch.empty(batch_size, dtype=torch.int64)).mean().backward()

    return {"seconds": batch_size / speed, "flops": flops(iteration), "peak_gb": memory, "images": batch_size}


class GrowingCache:
    """Stands in for ar.KVCache."""

    def __init__(self):
        self.k = self.v = None

    def attend(self, q, k, v, start):
        self.k, self.v = (k, v) if self.k is None else (torch.cat([self.k, k], 1), torch.cat([self.v, v], 1))
        return tokenizer_file.attention(q, self.k, self.v)


@torch.no_grad()
def generate_plainly(ar, labels, scale=3.75):
    """A step for each token and EOS, both halves in each, all logits of both in fp32."""
    caches, batch, head = [GrowingCache() for _ in ar.transformer.blocks], len(labels), ar.head.weight.float()
    x = ar.bos(torch.cat([labels, torch.full_like(labels, ar.cfg.num_classes)]))[:, None]
    for i in range(ar.length):
        h = ar.step(x, caches, i)
        with torch.autocast(h.device.type, enabled=False):
            logits = torch.nn.functional.linear(h.float(), head)
        p = (scale * logits[:batch] + (1 - scale) * logits[batch:])[:, :ar.cfg.codebook_size].softmax(-1)
        x = ar.embedding(torch.multinomial(p, 1)).repeat(2, 1, 1)


def bench_sample(args, batch_size, plain=False):
    cfg = tokenizer_config(args)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    ar = ar_model.AR(ar_model.ARConfig.for_tokenizer(cfg, **ar_model.SIZES[args.size])).eval().to(args.device)
    if plain:
        common.ONEDNN = False
    elif args.compile:
        ar.compile_step()
    ar.freeze(dtype)
    labels = torch.arange(batch_size, device=args.device)

    def draw():
        with torch.autocast(args.device, dtype=dtype, enabled=dtype != torch.float32):
            if plain:
                generate_plainly(ar, labels)
            else:
                ar.generate(labels, cfg_prologue=0.7, cfg_visual=3.75, cfg_power=0.2)

    seconds = best(draw, 1 if args.device == "cpu" else args.repeat)
    matrices = sum(p.numel() for p in ar.transformer.parameters())
    # Each token of both halves passes all matrices once and its segment's rows of the head; each step reads them once.
    head = cfg.num_prologue * cfg.prologue_codebook_size + cfg.num_visual * cfg.codebook_size
    return {"seconds": seconds, "flops": 4 * batch_size * (ar.length * matrices + head * ar.cfg.dim),
            "bytes": dtype.itemsize * ((cfg.num_prologue + cfg.num_visual) * matrices + head * ar.cfg.dim),
            "peak_gb": torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else peak_gb(), "images": batch_size}


def bench_fid(args, batch_size):
    import fid
    from torch_fidelity import feature_extractor_inceptionv3 as module
    module.load_state_dict_from_url = lambda *a, **k: {}
    module.FeatureExtractorInceptionV3.load_state_dict = lambda *a: None
    theirs = module.FeatureExtractorInceptionV3("random", ["2048", "logits_unbiased"])
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(theirs.state_dict(), file.name)
        ours = fid.Inception(file.name).to(args.device)
    theirs = theirs.to(args.device)
    images = torch.randint(0, 256, (batch_size, 256, 256, 3), dtype=torch.uint8, device=args.device)
    with torch.no_grad():
        seconds = best(lambda: ours(images), args.repeat)
        other = best(lambda: theirs(images.permute(0, 3, 1, 2)), args.repeat)
    features = [torch.randn(10000, 2048).numpy() * np.linspace(0.1, 2, 2048, dtype=np.float32) for _ in range(2)]
    pr = best(lambda: fid.precision_recall(*features, args.device), 1)
    moments = [(x.mean(0).astype(np.float64), np.cov(x, rowvar=False)) for x in features]
    distance = best(lambda: fid.frechet_distance(*moments[0], *moments[1]), 1)
    print(f"  torch-fidelity's extractor {batch_size / other:.2f} images/s; FID of 2048 dims {distance:.2f} s; "
          f"precision and recall of 10k x 10k {pr:.1f} s", file=sys.stderr)
    return {"seconds": seconds, "flops": 11.4e9 * batch_size, "peak_gb": peak_gb(), "images": batch_size}


def bench_data(args, batch_size):
    """Decoding, ADM's random crop and flip of JPEGs of ImageNet's usual 500 x 375, in one process."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "class").mkdir()
        for i in range(32):
            small = np.random.default_rng(i).integers(0, 255, (75, 100, 3), np.uint8)
            image = Image.fromarray(small).resize((500, 375), Image.Resampling.BICUBIC)
            image.save(Path(folder) / "class" / f"{i}.jpeg", quality=90)
        images = Images(folder, 256, "random", flip=True, train=True)
        seconds = best(lambda: [images[i, i] for i in range(32)], args.repeat)
    return {"seconds": seconds, "flops": 0, "peak_gb": peak_gb(), "images": 32}


JOBS = {"data": bench_data, "stage1": bench_stage1, "ar": bench_ar, "sample": bench_sample, "fid": bench_fid,
        "plain": functools.partial(bench_sample, plain=True)}


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("jobs", nargs="+", choices=JOBS)
    flag("--size", default="B", choices=ar_model.SIZES, help="tokenizer size of stage1, AR size of ar and sample")
    flag("--tokenizer_size", default="B", choices=SIZES, help="whose codes ar and sample work on")
    flag("--layout", default="prologue", choices=["prologue", "2d", "1d"])
    flag("--image_size", type=int, help="by default the size's own")
    flag("--batch_size", type=int, nargs="+", default=[4])
    flag("--perceptual", default="none", choices=["none", "vgg", "convnext", "both"])
    flag("--repeat", type=int, default=3)
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flag("--compile", action="store_true")
    flag("--gradient_checkpointing", action="store_true")
    flag("--json", action="store_true", help="one JSON object a line")
    flag("--here", action="store_true", help=argparse.SUPPRESS)  # this is the job's own process
    args = parser.parse_args()
    args.passed_on = ["--compile"] * args.compile + ["--gradient_checkpointing"] * args.gradient_checkpointing
    if not args.here:  # a process for each, so that peak memory is its own
        rest = [a for a in sys.argv[1:] if a.startswith("--json")]
        flags = ["--size", args.size, "--tokenizer_size", args.tokenizer_size, "--layout", args.layout, "--perceptual",
                 args.perceptual, "--repeat", args.repeat, "--device", args.device, *args.passed_on]
        flags += ["--image_size", args.image_size] if args.image_size else []
        for job in args.jobs:
            for batch_size in args.batch_size:
                subprocess.run([sys.executable, __file__, job, "--batch_size", str(batch_size), "--here", *rest,
                                *map(str, flags)], check=True)
        return
    job, batch_size = args.jobs[0], args.batch_size[0]
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    rate, faster, read = (measure(args.device, dtype) for measure in (gemm_rate, product_rate, bandwidth))
    result = JOBS[job](args, batch_size)
    if job == "data":
        line = {"name": job, "seconds": result["seconds"], "images_per_s": result["images"] / result["seconds"]}
        print(json.dumps(line) if args.json else f"data: {line['images_per_s']:.0f} images/s per process")
        return
    floor = max(result["flops"] / rate, result.get("bytes", 0) / read)
    line = {"name": f"{job} {args.size} batch {batch_size}", "seconds": result["seconds"], "floor_seconds": floor,
            "ratio": result["seconds"] / floor, "ratio_to_product": result["seconds"] * faster / result["flops"],
            "peak_gb": result["peak_gb"],
            "images_per_s": result["images"] / result["seconds"]}
    if args.json:
        print(json.dumps(line))
    else:
        print(f"{line['name']}: {line['seconds']:.3g} s, {line['ratio']:.2f}x the floor of {floor:.3g} s (GEMM {rate / 1e9:.0f} "
              f"GFLOP/s, {read / 1e9:.1f} GB/s), {line['ratio_to_product']:.2f}x its FLOPs by oneDNN ({faster / 1e9:.0f}), "
              f"peak {line['peak_gb']:.2f} GiB, {line['images_per_s']:.3f} images/s")


if __name__ == "__main__":
    main()
