"""Where the AR model looks (paper figures 6, 7, A2, A4).

    python tools/attention.py                     # the pair in out/, else the shipped one
    python tools/attention.py --pair l_xl --out l_xl --classes 207 980 \\
        --data imagenet.zip/ILSVRC/Data/CLS-LOC/val

ar_attention.png (figures 6, A2): each layer on images of --data, averaged over heads and images,
the class position and the diagonal left out; rows are queries. Local structure shows as lines
beside the diagonal, the prologue as stripes on the left.

prologue_attention.png (figures 7, A4): drawn images, and for each prologue token how much the model
looks at it while it predicts each patch, averaged over heads and the last eight layers. The first
patches have few other tokens to look at, so the top of a map tends to be bright.

Needs matplotlib. Letters in shapes: B images, N visual and K prologue tokens, L = K+1+N tokens.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fid
import tokenizer as tokenizer_file
from pretokenize import Images, center_crop, to_float, to_uint8
from sample import class_numbers, default_preset, draw, load_pair, pair_folder, preset_settings
from tokenizer import atomic_write, check_flags, open_out


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


def known_labels(images, ar):
    """The labels (n,) of all images by which the AR model knows their classes' names."""
    names = ar.config.classes
    if len(names) == len(images.classes) == 1000 and images.classes[0] == "n01440764":
        names = images.classes  # ImageNet's, in the order of its labels
    unknown = sorted(set(images.classes) - set(names))
    if unknown:
        raise SystemExit(f"--data {images.path}: the AR model was not trained on the class "
                         f"{unknown[0]}, but on {', '.join(names[:20])}")
    return torch.tensor([names.index(name) for name in images.classes])[images.labels]


def draw_layers(figure, weights, num_prologue):
    """weights (layers, L, L) -> a square for each layer."""
    weights[:, :, 0] = 0
    weights.diagonal(dim1=1, dim2=2).zero_()
    # Of what visual queries give to others, the share that the prologue gets
    visual = weights[:, num_prologue + 1 :]  # (layers, N, L)
    to_prologue = visual[:, :, 1 : num_prologue + 1].sum(-1) / visual.sum(-1)
    figure.set_size_inches(5 * len(weights), 4.4)
    axes = figure.subplots(1, len(weights), squeeze=False)[0]
    for i, axis in enumerate(axes):
        square = axis.imshow(weights[i].sqrt().numpy(), cmap="magma")
        figure.colorbar(square, ax=axis, label="square root of the attention")
        title = f"layer {i}"  # counted from 0, as in the paper
        if num_prologue > 0:
            axis.axvline(num_prologue + 0.5, color="gray", linestyle="--", linewidth=0.8)
            title += f", {to_prologue[i].mean():.0%} to the prologue"
        axis.set(title=title, xlabel="position looked at", ylabel="position that looks")


def prologue_maps(weights, num_prologue):
    """weights (layers, B, L, L) -> how much the model looks at each prologue token when it predicts
    each visual token (B, K, N)."""
    weights = weights[-8:].mean(0)  # (B, L, L)
    # The queries are the positions that predict the N visual tokens, EOS's to the last, not those
    # that hold them. Position 0 holds the class and 1..K the prologue.
    return weights[:, num_prologue + 1 :, 1 : num_prologue + 1].transpose(1, 2)


def draw_maps(figure, images, names, maps):
    """A row for each image, uint8 (B, H, W, 3): itself and its class, then its maps (B, K, N)."""
    rows = len(images)
    columns = maps.shape[1] + 1
    grid = round(maps.shape[2] ** 0.5)
    height, width = images.shape[1:3]
    figure.set_size_inches(1.1 * columns, 1.1 * rows + 0.8)
    axes = figure.subplots(rows, columns, squeeze=False, subplot_kw=dict(xticks=[], yticks=[]))
    for i in range(rows):
        axes[i, 0].imshow(images[i])
        axes[i, 0].set_ylabel(names[i], fontsize="x-small")
        for j in range(1, columns):
            axes[0, j].set_title(f"prologue {j}", fontsize="x-small")
            axes[i, j].imshow(images[i].float().mean(-1), cmap="gray")
            last = axes[i, j].imshow(maps[i, j - 1].view(grid, grid), cmap="jet", alpha=0.6,
                                     interpolation="bilinear", extent=(0, width, height, 0))
    figure.colorbar(last, ax=axes, ticks=[], location="bottom", fraction=0.2 / rows,
                    label="attention, from a map's least to its most")


def save_figure(path, figure):
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=80, format="png")
    print(path)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description="Where the AR model looks.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--pair", help="folder of tokenizer and AR model; else out, or the shipped pair")
    flag("--out", default="out", help="folder for the pictures")
    flag("--data", help="images in class folders; else those that codes.safetensors of the pair "
         "names, or the bundled held-out ones")
    flag("--images", type=int, default=64, help="of --data that ar_attention.png averages over")
    flag("--classes", nargs="+", metavar="CLASS",
         help="names or numbers of the drawn images' classes; else ten of all")
    args = parser.parse_args()
    from matplotlib.figure import Figure

    check_flags(parser, args, "images")
    out = open_out(args.out)
    pair = pair_folder(args.pair)
    tokenizer, ar = load_pair(pair, "cpu")
    num_prologue = ar.config.num_prologue

    # Layers, on images that are spread over all classes
    shape = (tokenizer.config.image_size, tokenizer.config.image_size)
    images = Images(args.data or fid.default_images(pair / "codes.safetensors", shape, "val"))
    labels = known_labels(images, ar)
    indices = [i * len(images) // args.images for i in range(args.images)]
    crops = [center_crop(images.open(i), tokenizer.config.image_size) for i in indices]
    x = to_float(torch.from_numpy(np.stack(crops)))  # (B, 3, H, W)
    weights = attention_weights(ar, tokenizer.encode(x), labels[indices])
    figure = Figure(layout="compressed")
    draw_layers(figure, weights.mean(1), num_prologue)
    save_figure(out / "ar_attention.png", figure)
    if num_prologue == 0:
        return

    # Prologue tokens, on images that it draws as sample.py would
    chosen = class_numbers(args.classes, ar)
    names = [ar.config.classes[i] if ar.config.classes else str(i) for i in chosen]
    labels = torch.tensor(chosen)
    settings = preset_settings(default_preset(ar))
    codes = draw(ar, labels, range(len(labels)), 0, len(labels), settings)  # (B, K+N)
    maps = prologue_maps(attention_weights(ar, codes, labels), num_prologue)
    figure = Figure(layout="compressed")
    draw_maps(figure, to_uint8(tokenizer.decode(codes)), names, maps)
    save_figure(out / "prologue_attention.png", figure)


if __name__ == "__main__":
    main()
