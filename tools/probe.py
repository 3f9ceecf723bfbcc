"""Linear probe (paper table 4): how well a linear classifier reads the class off the first tokens of
a tokenizer, as many as it has prologue tokens.

    python tools/probe.py out/tokenizer.safetensors out_2d/tokenizer.safetensors
    python tools/probe.py l_xl/tokenizer.safetensors 2d_l/tokenizer.safetensors --augment \\
        --epochs 90 --batch_size 16384 --data imagenet.zip/ILSVRC/Data/CLS-LOC/train

The tokens are mean-pooled. Two kinds of features: the encoder's hidden states, as in the paper, and
the code vectors that they are quantized to, which is all that the AR model ever sees.

The protocol is that of MAE's linear probe: BatchNorm without parameters before the linear layer, no
weight decay, random resized crops and flips (--augment), a learning rate in proportion to the batch
that warms up over a ninth of the run and falls along a cosine to 0, the last epoch's accuracy on
centre crops. One thing differs: SGD with momentum 0.9 stands in for LARS, which is made for batches
of 16,384 and barely moves in the few steps of a small data set.
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
from tokenizer import InputError, Tokenizer, real, to_float, unit_norm, whole

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


class Probe:
    """A linear classifier of features (n, dim), with its optimizer."""

    def __init__(self, dim, classes, device):
        linear = nn.Linear(dim, classes)
        nn.init.trunc_normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.net = nn.Sequential(norm, linear).to(device)
        self.device = device
        self.optimizer = torch.optim.SGD(self.net.parameters(), momentum=0.9)

    def train_epoch(self, rows, labels, batch_size, rate):
        """One pass over features `rows` (n, dim); rate(share of the pass that is done) is the
        learning rate."""
        self.net.train()
        batch_size = min(batch_size, len(rows))
        batches = len(rows) // batch_size  # without the rest, of which BatchNorm knows too little
        order = torch.randperm(len(rows))
        for i in range(batches):
            batch = order[i * batch_size : (i + 1) * batch_size]
            self.optimizer.param_groups[0]["lr"] = rate((i + 1) / batches)
            logits = self.net(rows[batch].to(self.device))  # (batch, classes)
            loss = F.cross_entropy(logits, labels[batch].to(self.device))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    @torch.no_grad()
    def accuracy(self, rows, labels):
        """Shares of the features `rows` (n, dim) whose class is the likeliest, and among the five
        likeliest."""
        self.net.eval()
        right = []
        for batch, targets in zip(rows.split(8192), labels.split(8192)):
            logits = self.net(batch.to(self.device)).cpu()
            likeliest = logits.topk(min(5, logits.shape[1])).indices  # (batch, 5), best first
            right.append(likeliest == targets[:, None])
        right = torch.cat(right).float()  # (n, 5)
        return right[:, 0].mean().item(), right.sum(1).mean().item()


def learning_rate(progress, peak):
    """Linear warmup over the first ninth of the run, 10 of MAE's 90 epochs, then a cosine to 0."""
    warmup = 1 / 9
    if progress < warmup:
        return peak * progress / warmup
    return peak * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2
