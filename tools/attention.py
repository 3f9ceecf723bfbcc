"""Where the models look (paper figures 6, 7, A2, A4).

    python tools/attention.py                   # the pair in out/, else the shipped one
    python tools/attention.py --tokenizer T --ar A --data D --images 64 --classes 207 980

ar_attention.png (figures 6, A2): each layer of the AR model on images of --data, attention averaged
over heads and images, the class position and the diagonal left out; rows are queries. Local
structure shows as lines beside the diagonal, the prologue as stripes on the left.

prologue_attention.png (figures 7, A4): drawn images, and for each prologue token how much the AR
model looks at it while it predicts each patch, averaged over heads and the last eight layers. Each
map has its own scale. The first patches have few other tokens to look at, so the top of a map tends
to be bright.

encoder_attention.png (not in the paper): images of --data, and for each prologue token how much the
encoder's query for it looks at each patch, averaged over heads and the last two thirds of the
layers.

Needs matplotlib. Letters in shapes: B images, N visual tokens, K prologue tokens, L = K+1+N tokens
(or N).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tokenizer as tokenizer_file
from pretokenize import BUNDLED, Images, center_crop
from sample import class_numbers, default_preset, draw, load_pair, pack_for_cpu, preset_settings
from tokenizer import HelpFormatter, InputError, to_float, to_uint8, whole, writing


def attention_weights(call):
    """Runs call() and returns the weights of every attention in it, in order, as a list of (B,
    queries, keys), averaged over the heads."""
    original = tokenizer_file.attention
    weights = []

    def recording(q, k, v, causal=False, mask=None):  # (B, T, heads, d)
        scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) / q.shape[-1] ** 0.5
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)  # (queries, keys)
            scores = scores.masked_fill(later, -torch.inf)
        weights.append(scores.softmax(-1).mean(1))
        return original(q, k, v, causal, mask)

    tokenizer_file.attention = recording
    try:
        call()
    finally:
        tokenizer_file.attention = original
    return weights


def save_figure(path, figure):
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=80, format="png")


# The AR model's layers


def ar_weights(ar, codes, labels):
    """(layers, L, L), the class position and the diagonal set to 0."""
    layers = attention_weights(lambda: ar(codes, labels))
    weights = torch.stack([layer.mean(0) for layer in layers])
    weights[:, :, 0] = 0
    weights.diagonal(dim1=1, dim2=2).zero_()
    return weights


def save_ar_picture(path, weights, num_prologue):
    layers = len(weights)
    figure = Figure(figsize=(4 * layers, 4.4), layout="tight")
    axes = figure.subplots(1, layers, squeeze=False)[0]
    for i in range(layers):
        axes[i].imshow(weights[i].sqrt().numpy(), cmap="magma")
        if num_prologue > 0:
            axes[i].axvline(num_prologue + 0.5, color="gray", linestyle="--", linewidth=0.8)
        axes[i].set(title=f"layer {i + 1}", xticks=[], yticks=[])
    save_figure(path, figure)


def ar_shares(weights, cfg):
    """Of each layer (layers,), the mean shares of attention that visual queries give to the
    prologue, to the token above the one they predict, and to the one two to its left (its left
    neighbour is the query itself, on the diagonal)."""
    length = weights.shape[1]
    side = round(cfg.num_visual**0.5)
    # Position p holds token p - 1 and predicts token p. The first visual token stands at `first`;
    # the queries are those with a row of tokens above the one they predict.
    first = length - cfg.num_visual + 1
    queries = torch.arange(first - 1 + side, length)
    weights = weights[:, queries]  # (layers, queries, L)
    weights = weights / weights.sum(-1, keepdim=True)
    rows = torch.arange(len(queries))
    return {
        "prologue": weights[:, :, 1 : cfg.num_prologue + 1].sum(-1).mean(1),
        "above": weights[:, rows, queries - side + 1].mean(1),
        "two left": weights[:, rows, queries - 1].mean(1),
    }


# A map over the image for each prologue token


def prologue_weights(ar, codes, labels):
    """(B, K, N): of images with codes (B, K+N), how much the AR model looks at each prologue token
    when it predicts each visual token."""
    k = ar.cfg.num_prologue
    layers = attention_weights(lambda: ar(codes, labels))
    weights = torch.stack(layers[-8:]).mean(0)  # (B, L, L)
    # The queries are the positions that predict the N visual tokens, EOS's to the last, not those
    # that hold them: what is read there decides the patch at which the map shows it, and the last
    # visual token is held nowhere, since nothing follows it. Position 0 holds the class and 1..K
    # the prologue.
    return weights[:, k + 1 :, 1 : k + 1].transpose(1, 2)


def encoder_weights(tokenizer, images):
    """(B, K, N): of images (B, 3, H, W), how much the encoder's query for each prologue token looks
    at each patch."""
    n = tokenizer.cfg.num_visual
    layers = attention_weights(lambda: tokenizer.encode(images))
    if tokenizer.cfg.layout == "post":  # its prologue has an encoder of its own
        layers = layers[tokenizer.cfg.encoder[0] :]
    last = max(1, 2 * len(layers) // 3)
    return torch.stack(layers[-last:]).mean(0)[:, n:, :n]


def save_maps(path, images, weights, grid):
    """A row for each image (B, 3, H, W): the image, then a heat map for each prologue token, of
    weights (B, K, N)."""
    rows = len(images)
    columns = weights.shape[1] + 1
    height, width = images.shape[2:]
    figure = Figure(figsize=(1.1 * columns, 1.1 * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    pixels = to_uint8(images).numpy()  # (B, H, W, 3)
    for i in range(rows):
        axes[i, 0].imshow(pixels[i])
        for j in range(1, columns):
            axes[i, j].imshow(pixels[i].mean(-1), cmap="gray")
            heat = weights[i, j - 1].view(grid, grid).numpy()
            axes[i, j].imshow(heat, cmap="jet", alpha=0.6, interpolation="bilinear",
                              extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    for axis in axes.flat:
        axis.axis("off")
    figure.tight_layout(pad=0.2)
    save_figure(path, figure)


def parse_args():
    parser = argparse.ArgumentParser(description="Where the models look.",
                                     formatter_class=HelpFormatter)
    flag = parser.add_argument
    flag("--out", default="out", help="folder for the pictures, and where the pair is looked for")
    flag("--tokenizer", help="tokenizer file; by default that in --out")
    flag("--ar", help="AR file; by default that in --out; without any of these, the shipped pair")
    flag("--data", default=str(BUNDLED / "val"), help="images in class folders")
    flag("--images", type=whole(1), default=64,
         help="of --data, that ar_attention.png is averaged over")
    flag("--classes", nargs="+", metavar="CLASS",
         help="names or numbers of the drawn images' classes; by default ten of all")
    flag("--seed", type=whole(0), default=0, help="of the noise of the drawn images")
    return parser.parse_args()


@torch.no_grad()
def main():
    args = parse_args()
    out = Path(args.out)
    tokenizer, ar, paths = load_pair(args, torch.device("cpu"))
    pack_for_cpu(ar)
    labels = torch.tensor(class_numbers(args.classes, ar))  # of the drawn images
    print(f"{paths[0]} and {paths[1]}")

    # Images, spread over all classes
    images = Images(args.data)
    if len(images.classes) != ar.cfg.num_classes:
        raise InputError(f"{args.data} has {len(images.classes)} classes, and {paths[1]} was "
                         f"trained on {ar.cfg.num_classes}")
    count = args.images
    indices = [i * len(images) // count for i in range(count)]
    crops = [center_crop(images.open(i), tokenizer.cfg.image_size) for i in indices]
    x = to_float(torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2))  # (B, 3, H, W)

    # Layers of the AR model
    weights = ar_weights(ar, tokenizer.encode(x), images.labels[indices])
    for name, shares in ar_shares(weights, ar.cfg).items():
        layers = [f"layer {i + 1}: {share:.3f}" for i, share in enumerate(shares.tolist())]
        print(f"attention to {name:10}{'  '.join(layers)}")
    save_ar_picture(out / "ar_attention.png", weights, ar.cfg.num_prologue)
    print(f"{out / 'ar_attention.png'}: the AR model's layers")
    if ar.cfg.num_prologue == 0:
        return

    # Prologue tokens in the AR model, of images that it draws as sample.py would
    settings = preset_settings(default_preset(ar))
    codes = draw(ar, labels, range(len(labels)), args.seed, batch_size=len(labels),
                 settings=settings)  # (B, K+N)
    weights = prologue_weights(ar, codes, labels)
    save_maps(out / "prologue_attention.png", tokenizer.decode(codes), weights, tokenizer.cfg.grid)
    print(f"{out / 'prologue_attention.png'}: who looks at each prologue token in the AR model")

    # Prologue tokens in the encoder
    x = x[:: max(1, count // 8)][:8]
    weights = encoder_weights(tokenizer, x)
    save_maps(out / "encoder_attention.png", x, weights, tokenizer.cfg.grid)
    print(f"{out / 'encoder_attention.png'}: what each prologue token looks at in the encoder")


if __name__ == "__main__":
    main()
