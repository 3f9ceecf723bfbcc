"""Linear probe (paper table 4): how well a linear classifier reads the class off the first K tokens of a tokenizer.

    python tools/probe.py out/tokenizer.safetensors out_2d/tokenizer.safetensors
    python tools/probe.py --data imagenet.zip/ILSVRC/Data/CLS-LOC/train --tokens 16 ckpts/prologue-b-tokenizer

The tokens are mean-pooled, normalised by the statistics of the training images (MAE's BatchNorm without parameters), and go
through softmax regression. Two kinds of features: the encoder's hidden states, as in the paper, and the code vectors that
they are quantised to, which is all that the AR model ever sees.
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from common import InputError, run, to_float
from pretokenize import EMBEDDED, Images, default_val
from tokenizer import Tokenizer, unit_norm


@torch.no_grad()
def features(tokenizer, data, tokens, device):
    """{"hidden": (images, D), "codes": (images, c)} of the pooled first tokens, and labels (images,)"""
    images, cfg = Images(data, tokenizer.cfg.image_size), tokenizer.cfg
    if cfg.num_prologue and tokens > cfg.num_prologue:
        raise InputError(f"--tokens {tokens}: the prologue has only {cfg.num_prologue}")
    result, keys = {"hidden": [], "codes": []}, [(i, i) for i in range(len(images))]
    for batch, _ in tqdm(images.batches([keys[i:i + 100] for i in range(0, len(keys), 100)], 0), total=len(keys) // 100):
        x = to_float(batch[:, 0].to(device))
        visual, prologue = tokenizer.hidden(x)
        hidden, quantizer = (visual, tokenizer.visual_quantizer) if prologue is None else (prologue, tokenizer.prologue_quantizer)
        codes = quantizer(hidden[:, :tokens])[1]
        result["hidden"].append(hidden[:, :tokens].mean(1).float().cpu())
        result["codes"].append(F.embedding(codes, unit_norm(quantizer.codebook)).mean(1).cpu())
    return {name: torch.cat(parts) for name, parts in result.items()}, torch.from_numpy(images.labels)


def probe(train, train_labels, test, test_labels, epochs=100):
    """Held-out accuracy of softmax regression."""
    torch.manual_seed(0)
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    linear = torch.nn.Linear(train.shape[1], int(train_labels.max()) + 1)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for index in torch.randperm(len(train)).split(512):
            optimizer.zero_grad()
            F.cross_entropy(linear(train[index]), train_labels[index]).backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        return (linear(test).argmax(1) == test_labels).float().mean().item()


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("tokenizers", nargs="+", help="tokenizer files or released directories")
    parser.add_argument("--data", default=str(EMBEDDED / "train"))
    parser.add_argument("--val_data", help="held-out images; by default val beside train")
    parser.add_argument("--tokens", type=int, default=8, help="how many of the first tokens are pooled")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    val_data = args.val_data or default_val(args.data)
    if not val_data:
        raise InputError(f"there is no folder val beside {args.data}: give held-out images as --val_data")
    for path in args.tokenizers:
        tokenizer = Tokenizer.load(path).to(args.device)
        train, labels = features(tokenizer, args.data, args.tokens, args.device)
        test, test_labels = features(tokenizer, val_data, args.tokens, args.device)
        scores = "  ".join(f"{name} {probe(train[name], labels, test[name], test_labels):.4f}" for name in train)
        print(f"{path} ({tokenizer.cfg.layout}, first {args.tokens} tokens): held-out accuracy  {scores}", flush=True)


if __name__ == "__main__":
    run(main)
