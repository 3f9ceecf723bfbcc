"""Linear probe (paper table 4): how well a linear classifier reads the class off a tokenizer's K
prologue tokens, or off the first K of its visual tokens where it has no prologue.

    python tools/probe.py out/tokenizer.safetensors out_2d/tokenizer.safetensors
    python tools/probe.py l/tokenizer.safetensors --augment --epochs 90 --data imagenet/train

The tokens are mean-pooled. Two kinds of features: the encoder's hidden states, as in the paper, and
the code vectors that they are quantized to, which is all that the AR model ever sees.

With --augment --epochs 90 the protocol is MAE's, but for two things. The optimizer is SGD with
momentum 0.9 and not LARS, which is made for MAE's batches of 16,384. And held-out images are
cropped to the middle square of full height, where MAE keeps the middle 224 pixels of 256.
"""

import argparse
import math
import os
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretokenize import BUNDLED, Images, center_crop, default_val, load_batches, to_float
from tokenizer import Tokenizer, check_flags, setup, unit_norm


def resized_crop(image, size, rng):
    """8% to 100% of the image's area, of a shape from 3:4 to 4:3, at a random place, resized to
    uint8 (size, size, 3) and mirrored half of the time."""
    area = image.width * image.height * rng.uniform(0.08, 1)
    ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    width = min(image.width, round(math.sqrt(area * ratio)))
    height = min(image.height, round(math.sqrt(area / ratio)))
    left = rng.randint(0, image.width - width)
    top = rng.randint(0, image.height - height)
    box = (left, top, left + width, top + height)
    crop = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box))
    return crop[:, ::-1] if rng.random() < 0.5 else crop


def pooled_tokens(tokenizer, images, tokens):
    """Means over the first tokens of a batch (B, 3, H, W): hidden states (B, D), codes (B, c)."""
    hidden, prologue = tokenizer.hidden(images)
    quantizer = tokenizer.visual_quantizer
    if tokenizer.config.num_prologue > 0:
        hidden = prologue
        quantizer = tokenizer.prologue_quantizer
    hidden = hidden[:, :tokens]
    codes = quantizer(hidden)[1]  # (B, tokens)
    vectors = F.embedding(codes, unit_norm(quantizer.codebook))  # (B, tokens, c)
    return hidden.mean(1), vectors.mean(1)


@torch.no_grad()
def features(tokenizer, images, tokens, num_workers, epoch=None):
    """Hidden states (n, D) and codes (n, c) of all images: of their centre crops, or with an
    `epoch` of that epoch's random crops."""
    size = tokenizer.config.image_size
    device = tokenizer.visual_quantizer.codebook.device

    def load(index):
        image = images.open(index)
        if epoch is None:
            return center_crop(image, size)
        return resized_crop(image, size, random.Random(f"{epoch} {index}"))

    batches = [batch.tolist() for batch in torch.arange(len(images)).split(100)]
    pooled = []
    for batch in tqdm(load_batches(load, batches, num_workers), total=len(batches), leave=False):
        x = to_float(batch.to(device))  # (B, 3, H, W)
        pooled.append(pooled_tokens(tokenizer, x, tokens))
    return [torch.cat(rows) for rows in zip(*pooled)]


def train(tokenizer, images, tokens, args, device):
    """A probe for each kind of features, trained on `images`: [network, network]."""
    torch.manual_seed(0)
    rows = features(tokenizer, images, tokens, args.num_workers, 0 if args.augment else None)
    probes = nn.ModuleList()
    for x in rows:
        linear = nn.Linear(x.shape[1], len(images.classes))
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        norm = nn.BatchNorm1d(x.shape[1], affine=False, eps=1e-6)
        probes.append(nn.Sequential(norm, linear).to(device))
    optimizer = torch.optim.SGD(probes.parameters(), momentum=0.9)
    labels = images.labels.to(device)
    batch_size = min(args.batch_size, len(images))
    steps = len(images) // batch_size  # of an epoch, without a smaller batch at its end, as MAE
    for epoch in range(args.epochs):
        if args.augment and epoch > 0:
            rows = features(tokenizer, images, tokens, args.num_workers, epoch)
        order = torch.randperm(len(images)).to(device)
        for step, batch in zip(range(1, steps + 1), order.split(batch_size)):
            # Linear warmup over the first ninth, 10 of MAE's 90 epochs, then a cosine to 0
            ninths = 9 * (epoch + step / steps) / args.epochs
            share = min(ninths, (1 + math.cos(math.pi * (ninths - 1) / 8)) / 2)
            optimizer.param_groups[0]["lr"] = 0.1 * batch_size / 256 * share
            optimizer.zero_grad()
            for probe, x in zip(probes, rows):
                F.cross_entropy(probe(x[batch]), labels[batch]).backward()
            optimizer.step()
    return probes.eval()


def main():
    parser = argparse.ArgumentParser(description="Linear probe of a tokenizer's first tokens.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("tokenizers", nargs="+", metavar="TOKENIZER", help="tokenizer files")
    flag("--data", default=str(BUNDLED / "train"), help="training images, in class folders")
    flag("--val_data", help="held-out images; else the folder val beside a --data named train")
    flag("--tokens", type=int, help="how many of the first tokens are pooled; else as many as the "
         "longest prologue of a TOKENIZER")
    flag("--epochs", type=int, default=30, help="MAE trains for 90")
    flag("--batch_size", type=int, default=512, help="images per step of the probe")
    flag("--augment", action="store_true",
         help="random resized crops and flips, as MAE, with new features in every epoch")
    flag("--num_workers", type=int, default=min(8, os.cpu_count()), help="that decode images")
    flag("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    args = parser.parse_args()
    check_flags(parser, args, "epochs", "batch_size", "num_workers")
    _, _, device, _ = setup(args.device)
    images = Images(args.data)
    val_data = args.val_data or default_val(args.data)
    if val_data is None or Images(val_data).classes != images.classes:
        raise SystemExit(f"--val_data is needed: images of the classes of {args.data}")
    val_images = Images(val_data)
    tokenizers = [Tokenizer.load(path).to(device) for path in args.tokenizers]
    tokens = args.tokens or max(tokenizer.config.num_prologue for tokenizer in tokenizers) or 16
    for path, tokenizer in zip(args.tokenizers, tokenizers):
        count = min(tokens, tokenizer.config.num_prologue or tokenizer.config.num_visual)
        probes = train(tokenizer, images, count, args, device)
        rows = features(tokenizer, val_images, count, args.num_workers)
        print(f"{path} ({tokenizer.config.layout}, first {count} tokens), held-out accuracy:")
        for name, probe, x in zip(("hidden states", "codes"), probes, rows):
            likeliest = probe(x).topk(min(5, len(images.classes))).indices.cpu()  # (n, 5)
            right = (likeliest == val_images.labels[:, None]).float()
            print(f"{name:14} top-1 {right[:, 0].mean():.4f}  top-5 {right.sum(1).mean():.4f}")


if __name__ == "__main__":
    main()
