"""Linear probe (paper table 4): how well a linear classifier reads the class off a tokenizer's K
prologue tokens, or off the first K of its visual tokens where it has no prologue.

    python tools/probe.py out/tokenizer.safetensors out_2d/tokenizer.safetensors
    python tools/probe.py runs/prologue_l/tokenizer.safetensors \\
        runs/tokenizer_2d_l/tokenizer.safetensors --augment --epochs 90 \\
        --data imagenet.zip/ILSVRC/Data/CLS-LOC/train

The tokens are mean-pooled. Two kinds of features: the encoder's hidden states, as in the paper, and
the code vectors that they are quantized to, which is all that the AR model ever sees.

The protocol is that of MAE's linear probe: BatchNorm without parameters before the linear layer, no
weight decay, a learning rate of 0.1 for a batch of 256 and in proportion for others, with warmup
and a cosine; and with --augment --epochs 90 its random resized crops, flips and length. Two things
differ. The optimizer is SGD with momentum 0.9 and not LARS, which is made for MAE's batches of
16,384. And held-out images are cropped to the middle square of full height, as they are everywhere
here, where MAE keeps the middle 224 pixels of 256.
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

from pretokenize import BUNDLED, Images, center_crop, default_val, load_batches
from tokenizer import HelpFormatter, InputError, Tokenizer, real, to_float, unit_norm, whole

IMAGES_PER_BATCH = 100  # that the tokenizer sees at a time


# Features


def resized_crop(image, size, rng):
    """8% to 100% of the image's area, of a shape from 3:4 to 4:3, at a random place, resized to
    uint8 (size, size, 3)."""
    area = image.width * image.height * rng.uniform(0.08, 1)
    ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    width = min(image.width, round(math.sqrt(area * ratio)))
    height = min(image.height, round(math.sqrt(area / ratio)))
    left = rng.randint(0, image.width - width)
    top = rng.randint(0, image.height - height)
    box = (left, top, left + width, top + height)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box))


def pooled_tokens(tokenizer, images, tokens):
    """Means over the first tokens of a batch (B, 3, H, W): hidden states (B, D), codes (B, c)."""
    hidden, prologue = tokenizer.hidden(images)
    quantizer = tokenizer.visual_quantizer
    if prologue is not None:
        hidden = prologue
        quantizer = tokenizer.prologue_quantizer
    hidden = hidden[:, :tokens]
    codes = quantizer(hidden)[1]  # (B, tokens)
    vectors = F.embedding(codes, unit_norm(quantizer.codebook))  # (B, tokens, c)
    return hidden.mean(1), vectors.mean(1)


@torch.no_grad()
def features(tokenizer, images, tokens, num_workers, epoch=None):
    """{"hidden": (n, D), "codes": (n, c)} of all images, on the CPU: of their centre crops, or with
    an `epoch` of that epoch's random crops and flips."""
    size = tokenizer.cfg.image_size
    device = tokenizer.visual_quantizer.codebook.device

    def load(index):
        image = images.open(index)
        if epoch is None:
            view = center_crop(image, size)
        else:
            rng = random.Random(f"{epoch} {index}")
            view = resized_crop(image, size, rng)
            if rng.random() < 0.5:
                view = view[:, ::-1]
        return view.transpose(2, 0, 1)  # (3, size, size)

    batches = torch.arange(len(images)).split(IMAGES_PER_BATCH)
    batches = [batch.tolist() for batch in batches]
    loader = load_batches(load, batches, num_workers)
    result = {"hidden": [], "codes": []}
    for batch in tqdm(loader, total=len(batches), unit="batch", leave=False):
        hidden, codes = pooled_tokens(tokenizer, to_float(batch.to(device)), tokens)
        result["hidden"].append(hidden.cpu())
        result["codes"].append(codes.cpu())
    return {name: torch.cat(rows) for name, rows in result.items()}


# The probe


def learning_rate(progress, peak):
    """Linear warmup over the first ninth of the run, 10 of MAE's 90 epochs, then a cosine to 0."""
    warmup = 1 / 9
    if progress < warmup:
        return peak * progress / warmup
    return peak * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


def linear_probe(dim, classes):
    linear = nn.Linear(dim, classes)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(dim, affine=False, eps=1e-6), linear)


def train(tokenizer, images, tokens, args, device):
    """A probe for each kind of features, trained on `images`: {"hidden": network, "codes":
    network}."""
    torch.manual_seed(0)
    epoch = 0 if args.augment else None
    rows = features(tokenizer, images, tokens, args.num_workers, epoch)
    classes = len(images.classes)
    probes = nn.ModuleDict({name: linear_probe(rows[name].shape[1], classes) for name in rows})
    probes.to(device)
    optimizer = torch.optim.SGD(probes.parameters(), momentum=0.9)
    batch_size = min(args.batch_size, len(images))
    steps = len(images) // batch_size  # of an epoch, without a smaller batch at its end, as MAE
    for epoch in range(args.epochs):
        if args.augment and epoch > 0:
            rows = features(tokenizer, images, tokens, args.num_workers, epoch)
        order = torch.randperm(len(images))
        for step in range(steps):
            batch = order[step * batch_size : (step + 1) * batch_size]
            progress = (epoch + (step + 1) / steps) / args.epochs
            peak = args.lr * batch_size / 256
            optimizer.param_groups[0]["lr"] = learning_rate(progress, peak)
            targets = images.labels[batch].to(device)
            loss = 0  # the probes share no weights, so their sum trains each by its own loss
            for name, probe in probes.items():
                logits = probe(rows[name][batch].to(device))  # (batch, classes)
                loss = loss + F.cross_entropy(logits, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return probes.eval()


@torch.no_grad()
def accuracy(probe, rows, labels, device):
    """Top-1 and top-5 accuracy of a probe on features (n, D) with labels (n,)."""
    logits = torch.cat([probe(batch.to(device)).cpu() for batch in rows.split(8192)])
    likeliest = logits.topk(min(5, logits.shape[1])).indices  # (n, 5), best first
    right = (likeliest == labels[:, None]).float()
    return right[:, 0].mean().item(), right.sum(1).mean().item()


def parse_args():
    parser = argparse.ArgumentParser(description="Linear probe of a tokenizer's first tokens.",
                                     formatter_class=HelpFormatter)
    flag = parser.add_argument
    flag("tokenizers", nargs="+", metavar="TOKENIZER", help="tokenizer files")
    flag("--data", default=str(BUNDLED / "train"), help="training images, in class folders")
    flag("--val_data",
         help="held-out images; by default the folder val beside a --data named train")
    flag("--tokens", type=whole(1),
         help="how many of the first tokens are pooled; by default as many as the tokenizer has "
         "prologue tokens, or where it has none, the most that another TOKENIZER has")

    # Training of the probe
    flag("--epochs", type=whole(1), default=30, help="MAE trains for 90")
    flag("--batch_size", type=whole(2), default=512, help="images per step of the probe")
    flag("--lr", type=real(0), default=0.1,
         help="peak learning rate for a batch of 256, in proportion to --batch_size")
    flag("--augment", action="store_true",
         help="random resized crops and flips, as MAE: the features are computed anew in every "
         "epoch, else once of centre crops")

    # Machine
    flag("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"],
         help="auto is what torch finds")
    flag("--num_workers", type=whole(0), default=min(8, os.cpu_count()),
         help="threads that decode images")
    return parser.parse_args()


def main():
    args = parse_args()
    available = "cpu"
    if torch.accelerator.is_available():
        available = torch.accelerator.current_accelerator().type  # cuda, or mps on a Mac
    if args.device not in ("auto", "cpu", available):
        raise InputError(f"--device {args.device}: torch finds only {available} here")
    device = torch.device(available if args.device == "auto" else args.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32; exact_fp32 turns it off where it counts

    # Data
    val_data = args.val_data or default_val(args.data)
    if val_data is None:
        raise InputError(f"there is no folder val beside {args.data}: give --val_data")
    train_images = Images(args.data)
    test_images = Images(val_data)
    if test_images.classes != train_images.classes:
        raise InputError(f"{val_data} has other classes than {args.data}")
    if len(train_images) < 2:
        raise InputError(f"{args.data} holds a single image: BatchNorm needs at least two")

    # Tokenizers, and how many tokens of each are pooled
    tokenizers = [Tokenizer.load(path).to(device) for path in args.tokenizers]
    longest_prologue = max(tokenizer.cfg.num_prologue for tokenizer in tokenizers)
    counts = []
    for path, tokenizer in zip(args.tokenizers, tokenizers):
        count = args.tokens or tokenizer.cfg.num_prologue or longest_prologue
        if count == 0:
            raise InputError(f"{path} has no prologue: --tokens says how many of its first tokens "
                             "are pooled")
        most = tokenizer.cfg.num_prologue or tokenizer.cfg.num_visual
        if count > most:
            raise InputError(f"{path} has only {most} of the {count} tokens that are to be pooled")
        counts.append(count)

    # A line for each tokenizer
    for path, tokenizer, count in zip(args.tokenizers, tokenizers, counts):
        probes = train(tokenizer, train_images, count, args, device)
        rows = features(tokenizer, test_images, count, args.num_workers)
        scores = []
        for name, probe in probes.items():
            top1, top5 = accuracy(probe, rows[name], test_images.labels, device)
            scores.append(f"{name} top-1 {top1:.4f} top-5 {top5:.4f}")
        print(f"{path} ({tokenizer.cfg.layout}, first {count} tokens): held-out accuracy  "
              f"{'  '.join(scores)}", flush=True)


if __name__ == "__main__":
    main()
