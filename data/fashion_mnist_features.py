"""Trains the small classifier whose features fid.py uses for 28 x 28 images:
data/fashion_mnist_features.safetensors.

    python data/fashion_mnist_features.py    # 60,000 training images, about 5 minutes on two cores

The labels are numbered by the sorted class names, as everywhere in this project.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from data.fashion_mnist import CLASSES, load


class FashionClassifier(nn.Module):
    """A small CNN for 28 x 28 Fashion-MNIST; its 128 pooled features serve as an offline,
    in-domain Inception."""

    widths = {"pool": 128}

    def __init__(self):
        super().__init__()
        layers = []
        channels = 1
        for width, stride in ((32, 1), (64, 2), (64, 1), (128, 2), (128, 1)):
            layers.append(nn.Conv2d(channels, width, 3, stride, 1, bias=False))
            layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU())
            channels = width
        self.net = nn.Sequential(*layers)
        self.head = nn.Linear(channels, 10)

    def forward(self, images):
        """uint8 (B, 28, 28, 3) -> {"pool": (B, 128), "probabilities": (B, 10)}"""
        x = images.float().mean(-1)[:, None] / 127.5 - 1  # (B, 1, 28, 28)
        pool = self.net(x).mean((2, 3))  # (B, 128)
        return {"pool": pool, "probabilities": self.head(pool).softmax(-1)}

    @classmethod
    def load(cls):
        model = cls()
        weights = Path(__file__).with_name("fashion_mnist_features.safetensors")
        model.load_state_dict(safetensors.torch.load_file(weights))
        return model.eval()


def load_split(source, split):
    """images (n, 28, 28, 3) and labels (n,) numbered by the sorted class names."""
    images, labels = load(source, split)
    number = torch.tensor([sorted(CLASSES).index(name) for name in CLASSES])
    x = torch.from_numpy(images)[..., None].expand(-1, -1, -1, 3)
    return x, number[labels.astype(np.int64)]


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--source", default="/usr/share/datasets/fashion-mnist", help="folder of the four files")
    flag("--out", default=Path(__file__).with_name("fashion_mnist_features.safetensors"))
    flag("--epochs", type=int, default=5)
    args = parser.parse_args()

    # Data, model, optimizer
    torch.manual_seed(0)
    x, y = load_split(args.source, "train")
    x_val, y_val = load_split(args.source, "val")
    model = FashionClassifier()
    batch_size = 250
    steps = args.epochs * len(x) // batch_size
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    order = torch.cat([torch.randperm(len(x)) for _ in range(args.epochs)])

    # Training
    for step, index in enumerate(order.split(batch_size)):
        # Mirrored half of the time: features should not depend on which way a shoe points.
        kept = (torch.rand(len(index)) < 0.5)[:, None, None, None]
        images = x[index].where(kept, x[index].flip(2))
        loss = F.nll_loss(model(images)["probabilities"].clamp_min(1e-7).log(), y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}/{steps} loss {loss.item():.3f}", flush=True)

    # Test
    model.eval()
    right = 0
    with torch.no_grad():
        for images, labels in zip(x_val.split(500), y_val.split(500)):
            right += (model(images)["probabilities"].argmax(1) == labels).sum().item()
    print(f"accuracy on the 10,000 test images: {right / len(x_val):.4f}")
    safetensors.torch.save_file(model.state_dict(), args.out)


if __name__ == "__main__":
    main()
