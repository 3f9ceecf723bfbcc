"""Writes random weights in the released layout at the full shapes of Prologue-L and AR-XL, loads them, draws one image.

    python tools/measure_released.py [--dir FOLDER]     # 4.4 GB on disk, removed afterwards

Prints load time, sampling time and the peak memory of a process that does both.
"""
import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from ar import AR
from tokenizer import Tokenizer
from tools.test_released import random_network, write_shards


def write(folder):
    """prologue-l-tokenizer (encoder 12 x 768, decoder 24 x 1024, EMA shards) and ar-prologue-l-xl (32 x 1280)."""
    torch.manual_seed(0)
    enc = random_network("enc", 768, 768, 2048, True, queries=16, cond=192, classes=1001, layers=12, head=64)
    for name, tokens, size in (("quantizer", 256, 4096), ("semantic_quantizer", 16, 1024)):
        enc |= {f"{name}.pos_select_mask": torch.zeros(tokens, size), f"{name}.embedding.weight": torch.randn(size, 14),
                f"{name}.proj_in.weight": torch.randn(14, 768), f"{name}.proj_in.bias": torch.randn(14)}
    dec = random_network("dec", 14, 1024, 2731, True, out=768, cond=256, classes=1001, layers=24, head=64)
    # The raw shards 0 and 1 of a release hold the same tensors; only their presence and their names are looked at.
    write_shards(folder / "prologue-l-tokenizer", {0: enc, 2: enc, 3: dec})
    ar = random_network("ar_model", 0, 1280, 3520, False, out=5121, cond=320, classes=1001, layers=32, head=64)
    ar |= {"bos_emb.weight": torch.randn(1001, 1280), "semantic_emb.weight": torch.randn(5121, 1280)}
    write_shards(folder / "ar-prologue-l-xl", {0: ar})


def peak():
    """Peak resident memory of this process in GiB. Not getrusage's, which counts the parent's up to the exec."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 2**20


def measure(folder):
    start = time.perf_counter()
    tokenizer = Tokenizer.load(folder / "prologue-l-tokenizer")
    ar = AR.load(folder / "ar-prologue-l-xl", tokenizer)
    loaded, count = time.perf_counter(), sum(p.numel() for model in (tokenizer, ar) for p in model.parameters())
    peak_load = peak()
    ar.freeze(torch.float32)  # as sample.py does
    codes = ar.generate(torch.tensor([207]), cfg_prologue=0.7, cfg_visual=2.25, cfg_power=0.225)
    images = tokenizer.decode(codes)
    print(f"{count / 1e6:.0f}M parameters, {4 * count / 2**30:.2f} GiB; "
          f"loaded in {loaded - start:.1f} s, peak {peak_load:.2f} GiB; "
          f"one image {tuple(images.shape)} in {time.perf_counter() - loaded:.1f} s, "
          f"peak {peak():.2f} GiB")


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dir", help="folder for the 4.4 GB; by default a temporary one")
    parser.add_argument("--measure", metavar="FOLDER", help="only load and draw from FOLDER")
    args = parser.parse_args()
    if args.measure:
        return measure(Path(args.measure))
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        write(Path(folder))
        subprocess.run([sys.executable, __file__, "--measure", folder], check=True)


if __name__ == "__main__":
    main()
