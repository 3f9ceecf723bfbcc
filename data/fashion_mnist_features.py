"""Trains the small classifier whose features fid.py uses for 28 x 28 images: data/fashion_mnist_features.safetensors.

    python data/fashion_mnist_features.py       # 60,000 training images, about 5 minutes on two cores

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
    """A small CNN for 28 x 28 Fashion-MNIST; its 128 pooled features serve as an offline, in-domain Inception.

    forward: uint8 (B, 28, 28, 3) -> {"pool": (B, 128), "probabilities": (B, 10)}
    """

    def __init__(self):
        super().__init__()
        layers, channels = [], 1
        for width, stride in ((32, 1), (64, 2), (64, 1), (128, 2), (128, 1)):
            layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.net, self.head = nn.Sequential(*layers), nn.Linear(channels, 10)

    def forward(self, images):
        x = images.float().mean(-1)[:, None] / 127.5 - 1  # (B, 1, 28, 28)
        pool = self.net(x).mean((2, 3))  # (B, 128)
        return {"pool": pool, "probabilities": self.head(pool).softmax(-1)}

    @classmethod
    def load(cls):
        model = cls()
        model.load_state_dict(safetensors.torch.load_file(Path(__file__).with_name("fashion_mnist_features.safetensors")))
        return model.eval()


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--source", default="/usr/share/datasets/fashion-mnist", help="folder of the four IDX files")
    parser.add_argument("--out", default=Path(__file__).with_name("fashion_mnist_features.safetensors"))
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    number = torch.tensor([sorted(CLASSES).index(name) for name in CLASSES])
    (x, y), (x_val, y_val) = [(torch.from_numpy(images)[..., None].expand(-1, -1, -1, 3), number[labels.astype(np.int64)])
                              for images, labels in (load(args.source, "train"), load(args.source, "val"))]
    model = FashionClassifier()
    steps, batch_size = args.epochs * len(x) // 250, 250
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    order = torch.cat([torch.randperm(len(x)) for _ in range(args.epochs)]).split(batch_size)
    for step, index in enumerate(order):
        # Mirrored half of the time: features should not depend on which way a shoe points.
        images = x[index].where((torch.rand(len(index)) < 0.5)[:, None, None, None], x[index].flip(2))
        loss = F.nll_loss(model(images)["probabilities"].clamp_min(1e-7).log(), y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}/{steps} loss {loss.item():.3f}", flush=True)
    model.eval()
    with torch.no_grad():
        right = sum((model(a)["probabilities"].argmax(1) == b).sum().item() for a, b in zip(x_val.split(500), y_val.split(500)))
    print(f"accuracy on the 10,000 test images: {right / len(x_val):.4f}")
    safetensors.torch.save_file(model.state_dict(), args.out)


if __name__ == "__main__":
    main()
