"""Where the models look (paper figures 6, 7, A2, A4).

    python tools/attention.py                       # the pair in out/, or else the shipped one; embedded images
    python tools/attention.py --tokenizer T --ar A --data D --images 64

ar_attention.png: each layer of the AR model, attention averaged over heads and images, the class position and the diagonal
left out; rows are queries. Local structure shows as lines beside the diagonal, the prologue as stripes on the left.
prologue_attention.png: for some images, what part of the image each prologue token reads: attention of the encoder's prologue
queries over the patches, averaged over heads and the last layers.
"""
import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
matplotlib.use("agg")
from matplotlib import pyplot

import tokenizer as tokenizer_file
from common import run, to_float, to_uint8
from pretokenize import EMBEDDED, Images
from sample import load_pair


class Recorder:
    """Stands in for tokenizer.attention and keeps the mean over heads of each call's weights, (B, queries, keys)."""

    def __init__(self):
        self.maps, self.original = [], tokenizer_file.attention

    def __call__(self, q, k, v, causal=False, mask=None):
        scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) / q.shape[-1] ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
        self.maps.append(scores.softmax(-1).mean(1))
        return self.original(q, k, v, causal, mask)

    def record(self, call):
        self.maps, tokenizer_file.attention = [], self
        call()
        tokenizer_file.attention = self.original
        return torch.stack(self.maps)  # (layers, B, queries, keys)


def ar_maps(ar, codes, labels, path):
    """One panel per layer; returns the shares of attention that visual queries give to the prologue, to the token above
    the one they predict, and to the one two to its left (its left neighbour is the diagonal)."""
    maps = Recorder().record(lambda: ar(codes, labels)).mean(1)  # (layers, L, L)
    length, k = maps.shape[1], ar.cfg.num_prologue
    maps[:, :, 0] = 0  # position 0 is the class
    maps[:, torch.arange(length), torch.arange(length)] = 0
    figure, axes = pyplot.subplots(1, len(maps), figsize=(4 * len(maps), 4.4), squeeze=False)
    for i, (axis, weights) in enumerate(zip(axes[0], maps)):
        axis.imshow(weights.sqrt(), cmap="magma")
        if k:
            axis.axvline(k + 0.5, color="gray", linestyle="--", linewidth=0.8)
        axis.set(title=f"layer {i + 1}", xticks=[], yticks=[])
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    side = round(ar.cfg.num_visual**0.5)
    first = length - ar.cfg.num_visual + 1  # the query that has just read the first visual token
    queries = torch.arange(first + side, length)  # those with a token above the one they predict
    weights = maps[:, queries] / maps[:, queries].sum(-1, keepdim=True)  # the query at q predicts token q + 1
    rows = torch.arange(len(queries))
    return {"prologue": weights[:, :, 1:k + 1].sum(-1).mean(1), "above": weights[:, rows, queries - side + 1].mean(1),
            "two left": weights[:, rows, queries - 1].mean(1)}


def prologue_maps(tokenizer, x, path):
    """Rows of images: the image, then one heat map for each prologue token."""
    n, side = tokenizer.cfg.num_visual, round(tokenizer.cfg.num_visual**0.5)
    maps = Recorder().record(lambda: tokenizer.encode(x))
    if tokenizer.cfg.layout == "post":
        maps = maps[tokenizer.cfg.encoder[0]:]  # the prologue encoder's
    maps = maps[-max(1, 2 * len(maps) // 3):].mean(0)[:, n:, :n]  # (B, K, N), of the last two thirds of the layers
    figure, axes = pyplot.subplots(len(x), maps.shape[1] + 1, figsize=(1.1 * (maps.shape[1] + 1), 1.1 * len(x)), squeeze=False)
    for row, image, heat in zip(axes, to_uint8(x), maps):
        row[0].imshow(image)
        for axis, weights in zip(row[1:], heat):
            axis.imshow(np.asarray(image).mean(-1), cmap="gray")
            axis.imshow(weights.view(side, side), cmap="jet", alpha=0.6, extent=(-0.5, x.shape[3] - 0.5, x.shape[2] - 0.5, -0.5),
                        interpolation="bilinear")
    for axis in axes.flat:
        axis.axis("off")
    figure.tight_layout(pad=0.2)
    figure.savefig(path, dpi=80)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="out")
    parser.add_argument("--tokenizer", help="by default tokenizer.safetensors in --out")
    parser.add_argument("--ar", help="by default ar.safetensors in --out")
    parser.add_argument("--data", default=str(EMBEDDED / "val"))
    parser.add_argument("--images", type=int, default=64, help="images that the AR model's maps are averaged over")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer, ar, paths = load_pair(args, "cpu")
    print(f"{paths[0]} and {paths[1]}")
    images = Images(args.data, tokenizer.cfg.image_size)
    index = [i * len(images) // args.images for i in range(args.images)]
    x = to_float(torch.stack([images[i, i][0][0] for i in index]))
    shares = ar_maps(ar, tokenizer.encode(x), torch.from_numpy(images.labels[index]), out / "ar_attention.png")
    for name, values in shares.items():
        print(f"attention to {name:10}" + "  ".join(f"layer {i + 1}: {v:.3f}" for i, v in enumerate(values.tolist())))
    print(f"{out / 'ar_attention.png'}: the AR model's layers")
    if tokenizer.cfg.num_prologue:
        prologue_maps(tokenizer, x[::max(1, len(x) // 8)][:8], out / "prologue_attention.png")
        print(f"{out / 'prologue_attention.png'}: what each prologue token reads")


if __name__ == "__main__":
    run(main)
