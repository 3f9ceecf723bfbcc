"""Linear probe (paper table 4): how well a linear classifier reads the class off the first K tokens
of a tokenizer.

    python tools/probe.py out/tokenizer.safetensors out_2d/tokenizer.safetensors
    python tools/probe.py l_xl/tokenizer.safetensors --tokens 16 \\
        --data imagenet.zip/ILSVRC/Data/CLS-LOC/train

The tokens are mean-pooled, normalized by the statistics of the training images (MAE's BatchNorm
without parameters), and go through softmax regression. Two kinds of features: the encoder's hidden
states, as in the paper, and the code vectors that they are quantized to, which is all that the AR
model ever sees.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretokenize import BUNDLED, Images, center_crop, default_val, load_batches
from tokenizer import InputError, Tokenizer, to_float, unit_norm, whole

BATCH_SIZE = 100


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
def features(tokenizer, images, tokens, device):
    """{"hidden": (n, D), "codes": (n, c)} of all images, centre crops."""
    size = tokenizer.cfg.image_size

    def load(index):
        return center_crop(images.open(index), size).transpose(2, 0, 1)  # (3, size, size)

    batches = torch.arange(len(images)).split(BATCH_SIZE)
    batches = [batch.tolist() for batch in batches]
    loader = load_batches(load, batches, num_workers=min(8, os.cpu_count()))
    result = {"hidden": [], "codes": []}
    for batch in tqdm(loader, total=len(batches), unit="batch"):
        hidden, codes = pooled_tokens(tokenizer, to_float(batch.to(device)), tokens)
        result["hidden"].append(hidden.cpu())
        result["codes"].append(codes.cpu())
    return {name: torch.cat(rows) for name, rows in result.items()}


def probe(train, train_labels, test, test_labels, classes, epochs=100):
    """Accuracy of softmax regression on features `test` (n, D) after training on `train` (m, D)."""
    torch.manual_seed(0)
    mean = train.mean(0)
    std = train.std(0) + 1e-6
    train = (train - mean) / std
    test = (test - mean) / std
    linear = nn.Linear(train.shape[1], classes)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(train)).split(512):
            optimizer.zero_grad()
            F.cross_entropy(linear(train[batch]), train_labels[batch]).backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        return (linear(test).argmax(1) == test_labels).float().mean().item()


def parse_args():
    parser = argparse.ArgumentParser(description="Linear probe of a tokenizer's first tokens.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("tokenizers", nargs="+", metavar="TOKENIZER", help="tokenizer files")
    flag("--data", default=str(BUNDLED / "train"), help="training images, in class folders")
    flag("--val_data",
         help="held-out images; by default the folder val beside a --data named train")
    flag("--tokens", type=whole(1), default=8, help="how many of the first tokens are pooled")
    flag("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"],
         help="auto is what torch finds")
    return parser.parse_args()


def main():
    args = parse_args()
    available = "cpu"
    if torch.accelerator.is_available():
        available = torch.accelerator.current_accelerator().type  # cuda, or mps on a Mac
    if args.device not in ("auto", "cpu", available):
        raise InputError(
            f"--device {args.device} cannot be used: torch finds only {available} here"
        )
    device = torch.device(available if args.device == "auto" else args.device)

    # Data
    val_data = args.val_data or default_val(args.data)
    if val_data is None:
        raise InputError(f"there is no folder val beside {args.data}: give --val_data")
    train_images = Images(args.data)
    test_images = Images(val_data)
    if test_images.classes != train_images.classes:
        raise InputError(f"{val_data} has other classes than {args.data}")

    # A line for each tokenizer
    for path in args.tokenizers:
        tokenizer = Tokenizer.load(path).to(device)
        cfg = tokenizer.cfg
        most = cfg.num_prologue or cfg.num_visual
        if args.tokens > most:
            raise InputError(f"--tokens {args.tokens}: {path} has only {most} of the kind")
        train = features(tokenizer, train_images, args.tokens, device)
        test = features(tokenizer, test_images, args.tokens, device)
        scores = []
        for name in train:
            accuracy = probe(train[name], train_images.labels, test[name], test_images.labels,
                             classes=len(train_images.classes))
            scores.append(f"{name} {accuracy:.4f}")
        print(f"{path} ({cfg.layout}, first {args.tokens} tokens): held-out accuracy  "
              f"{'  '.join(scores)}", flush=True)


if __name__ == "__main__":
    main()
