"""Where the AR model looks (paper figures 6, 7, A2, A4).

    python tools/attention.py                     # the pair in out/, else the shipped one
    python tools/attention.py --pair l_xl --out l_xl --classes 207 980 \\
        --data imagenet.zip/ILSVRC/Data/CLS-LOC/val

ar_attention.png (figures 6, A2): each layer on images of --data, averaged over heads and images,
the class position and the diagonal left out; rows are queries. Local structure shows as lines
beside the diagonal, the prologue as stripes on the left.

prologue_attention.png (figures 7, A4): drawn images, and for each prologue token how much the model
looks at it while it predicts each patch, averaged over heads and the last eight layers. Each map
has its own scale. The first patches have few other tokens to look at, so the top of a map tends to
be bright.

Needs matplotlib. Letters in shapes: B images, N visual and K prologue tokens, L = K+1+N tokens.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tokenizer as tokenizer_file
from pretokenize import BUNDLED, Images, center_crop, to_float, to_uint8
from sample import (class_numbers, default_preset, draw, load_pair, pair_folder,
                    preset_settings)
from tokenizer import writing


def attention_weights(ar, codes, labels):
    """Codes (B, K+N) -> attention (layers, B, queries L, keys L), averaged over the heads."""
    original = tokenizer_file.attention
    layers = []

    def recording(q, k, v, causal):  # (B, L, heads, d)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)  # (L, L)
        layers.append(scores.masked_fill(later, -torch.inf).softmax(-1).mean(1))
        return original(q, k, v, causal)

    tokenizer_file.attention = recording
    ar(codes, labels)
    tokenizer_file.attention = original
    return torch.stack(layers)


def draw_layers(weights, num_prologue):
    """weights (layers, L, L) -> a figure with a square for each layer."""
    weights[:, :, 0] = 0
    weights.diagonal(dim1=1, dim2=2).zero_()
    # Of what visual queries give to others, the share that the prologue gets
    visual = weights[:, num_prologue + 1 :]  # (layers, N, L)
    to_prologue = visual[:, :, 1 : num_prologue + 1].sum(-1) / visual.sum(-1)
    figure = Figure(figsize=(4 * len(weights), 4.4), layout="tight")
    axes = figure.subplots(1, len(weights), squeeze=False)[0]
    for i, axis in enumerate(axes):
        axis.imshow(weights[i].sqrt().numpy(), cmap="magma")
        title = f"layer {i}"  # counted from 0, as in the paper
        if num_prologue > 0:
            axis.axvline(num_prologue + 0.5, color="gray", linestyle="--", linewidth=0.8)
            title += f", {to_prologue[i].mean():.0%} to the prologue"
        axis.set(title=title, xticks=[], yticks=[])
    return figure


def prologue_maps(weights, num_prologue):
    """weights (layers, B, L, L) -> how much the model looks at each prologue token when it predicts
    each visual token (B, K, N)."""
    weights = weights[-8:].mean(0)  # (B, L, L)
    # The queries are the positions that predict the N visual tokens, EOS's to the last, not those
    # that hold them. Position 0 holds the class and 1..K the prologue.
    return weights[:, num_prologue + 1 :, 1 : num_prologue + 1].transpose(1, 2)


def draw_maps(images, maps):
    """A figure with a row for each image, uint8 (B, H, W, 3): itself, then its maps (B, K, N)."""
    rows = len(images)
    columns = maps.shape[1] + 1
    grid = round(maps.shape[2] ** 0.5)
    height, width = images.shape[1:3]
    figure = Figure(figsize=(1.1 * columns, 1.1 * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    for i in range(rows):
        axes[i, 0].imshow(images[i])
        for j in range(1, columns):
            axes[i, j].imshow(images[i].float().mean(-1), cmap="gray")
            axes[i, j].imshow(maps[i, j - 1].view(grid, grid), cmap="jet", alpha=0.6,
                              interpolation="bilinear", extent=(0, width, height, 0))
    for axis in axes.flat:
        axis.axis("off")
    figure.tight_layout(pad=0.2)
    return figure


def save_figure(path, figure):
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=80, format="png")
    print(path)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description="Where the AR model looks.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--pair", help="folder of tokenizer and AR model; else out, or the shipped pair")
    flag("--out", default="out", help="folder for the pictures")
    flag("--data", default=str(BUNDLED / "val"), help="images in class folders")
    flag("--images", type=int, default=64, help="of --data that ar_attention.png averages over")
    flag("--classes", nargs="+", metavar="CLASS",
         help="names or numbers of the drawn images' classes; else ten of all")
    args = parser.parse_args()
    out = Path(args.out)
    tokenizer, ar = load_pair(pair_folder(args.pair), "cpu")
    num_prologue = ar.cfg.num_prologue

    # Layers, on images that are spread over all classes
    images = Images(args.data)
    if len(images.classes) != ar.cfg.num_classes:
        raise SystemExit(f"{args.data} has {len(images.classes)} classes, and the AR model was "
                         f"trained on {ar.cfg.num_classes}")
    indices = [i * len(images) // args.images for i in range(args.images)]
    crops = [center_crop(images.open(i), tokenizer.cfg.image_size) for i in indices]
    x = to_float(torch.from_numpy(np.stack(crops)))  # (B, 3, H, W)
    weights = attention_weights(ar, tokenizer.encode(x), images.labels[indices])
    save_figure(out / "ar_attention.png", draw_layers(weights.mean(1), num_prologue))
    if num_prologue == 0:
        return

    # Prologue tokens, on images that it draws as sample.py would
    labels = torch.tensor(class_numbers(args.classes, ar))
    settings = preset_settings(default_preset(ar))
    codes = draw(ar, labels, range(len(labels)), 0, len(labels), settings)  # (B, K+N)
    maps = prologue_maps(attention_weights(ar, codes, labels), num_prologue)
    save_figure(out / "prologue_attention.png",
                draw_maps(to_uint8(tokenizer.decode(codes)), maps))


if __name__ == "__main__":
    main()
