"""What each recipe costs on paper: counted FLOPs per image, GPU-hours at a stated MFU, and the memory of its state.

    python tools/cost.py                            # A100: 312 TFLOP/s in bf16, MFU 40%
    python tools/cost.py --tflops 990 --mfu 0.4     # H100

FLOPs are counted by torch on the meta device over one training step of one image, forward and backward, perceptual network and
discriminator included. Memory is that of weights, gradients, AdamW's two moments (16 bytes a parameter) and EMA (4 bytes).
"""
import argparse
import contextlib
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

import ar as ar_model
import tokenizer as tokenizer_file
import train_stage1
from tokenizer import SIZES, Tokenizer, TokenizerConfig

tokenizer_file.exact_fp32 = lambda device: contextlib.nullcontext()  # there is no autocast on the meta device
PAPER = {"Prologue-Base": 30 * 8, "Prologue-Large": 44 * 8, "AR B-B": 13 * 8, "AR L-L": 25 * 8, "AR L-XL": 25 * 32}  # A100-hours


def count(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def networks(size, ar_size, classes):
    """Tokenizer and AR model of a size on the meta device."""
    with torch.device("meta"):
        tokenizer = Tokenizer(TokenizerConfig(**SIZES[size]))
        ar = ar_model.AR(ar_model.ARConfig.for_tokenizer(tokenizer.cfg, num_classes=classes, **ar_model.SIZES[ar_size]))
        for part in (tokenizer.encoder, tokenizer.decoder, ar):
            part.angles = part.angles.to("meta")
    return tokenizer, ar


def stage1(size):
    """FLOPs per image and bytes of the state."""
    import torchvision
    recipe = train_stage1.RECIPES[size]
    tokenizer, ar = networks(size, recipe["ar_size"], 0)
    with torch.device("meta"):
        gan = train_stage1.Discriminator(recipe["gan_channels"])
        convnext = recipe["perceptual"] == "convnext"
        network = torchvision.models.convnext_small().eval() if convnext else torchvision.models.vgg16().features
        images, labels, side = torch.empty(2, 3, 256, 256), torch.empty(2, dtype=torch.int64), 224 if convnext else 256

        def step():
            y, codes, onehot, vq = tokenizer(images)
            gan.requires_grad_(False)
            network.requires_grad_(False)
            loss = y.mean() + vq + ar(codes, labels, onehot, torch.empty(2, dtype=torch.bool)).mean() + gan.net(y).mean()
            (loss + network(y[:, :, :side, :side]).mean()).backward()
            network(images[:, :, :side, :side])
            gan.requires_grad_(True)
            real, fake, _ = gan(images, y, False)
            (real.mean() + fake.mean()).backward()

        flops = count(step) / 2
    tokenizer_size = sum(p.numel() for p in tokenizer.parameters())
    return flops, 20 * tokenizer_size + 16 * sum(p.numel() for part in (ar, gan) for p in part.parameters())


def stage2(tokenizer_size, size):
    _, ar = networks(tokenizer_size, size, 1000)
    with torch.device("meta"):
        codes = torch.empty(1, ar.cfg.num_prologue + ar.cfg.num_visual, dtype=torch.int64)
        labels = torch.empty(1, dtype=torch.int64)
        flops = count(lambda: ar(codes, labels).mean().backward())
    return flops, 16 * sum(p.numel() for p in ar.parameters())


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--tflops", type=float, default=312, help="peak TFLOP/s of the GPU in bf16")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that training is assumed to reach")
    args = parser.parse_args()
    rows = [("Prologue-Base", *stage1("B"), 750_000 * 256), ("Prologue-Large", *stage1("L"), 1_000_000 * 256)]
    for name, tokenizer, size, images in (
            ("AR B-B", "B", "B", 1_000_000 * 512), ("AR B-L", "B", "L", 1_000_000 * 512), ("AR B-XL", "B", "XL", 1_000_000 * 512),
            ("AR L-B", "L", "B", 500_000 * 2048), ("AR L-L", "L", "L", 500_000 * 2048), ("AR L-XL", "L", "XL", 593_750 * 2048)):
        rows.append((name, *stage2(tokenizer, size), images))
    print("| recipe | GFLOPs per image and step | images | GPU-hours | the paper's A100-hours | state, GB |")
    print("| --- " * 6 + "|")
    for name, flops, state, images in rows:
        hours = flops * images / (args.tflops * 1e12 * args.mfu) / 3600
        print(f"| {name} | {flops / 1e9:,.0f} | {images / 1e6:,.0f}M | {hours:,.0f} | {PAPER.get(name, '')} "
              f"| {state / 1e9:.1f} |")


if __name__ == "__main__":
    main()
