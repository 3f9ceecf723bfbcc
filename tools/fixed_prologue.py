"""How much of an image its prologue decides (a number for the paper's figures 1 and A3).

    python tools/fixed_prologue.py                          # the pair in out/, else the shipped one
    python tools/fixed_prologue.py --out DIR --pairs 500

For each pair two images of one class are drawn: with one prologue and visual tokens of their own,
or with prologues of their own too. Printed are the mean distance of the two in pixels (root mean
square, 0 to 255) and in the features of fid.py's network, and how often that network takes both
for the same class (it errs, and so do samples). All without guidance.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fid
from sample import decode, draw, load_pair, pack_for_cpu
from tokenizer import HelpFormatter, InputError, whole

BATCH_SIZE = 100


class Drawn:
    """Images of codes (n, K+N), their features and the classes that the network sees in them."""

    def __init__(self, codes, tokenizer, network, device):
        images = decode(tokenizer, codes, BATCH_SIZE)  # (n, H, W, 3) uint8
        self.images = images.float()
        features = []
        classes = []
        for batch in images.split(BATCH_SIZE):
            output = network(batch.to(device))
            features.append(output["pool"].cpu())  # (B, d)
            classes.append(output["probabilities"].argmax(1).cpu())  # (B,)
        self.features = torch.cat(features)
        self.classes = torch.cat(classes)


def print_comparison(name, a, b):
    pixels = (a.images - b.images).square().mean((1, 2, 3)).sqrt().mean()
    features = (a.features - b.features).norm(dim=1).mean()
    agreement = (a.classes == b.classes).float().mean()
    print(f"{name:20}  pixel distance {pixels:.1f}  feature distance {features:.2f}  "
          f"both in one class {agreement:.3f}")


def parse_args():
    parser = argparse.ArgumentParser(description="How much of an image its prologue decides.",
                                     formatter_class=HelpFormatter)
    flag = parser.add_argument
    flag("--out", default="out", help="folder where the pair is looked for")
    flag("--tokenizer", help="tokenizer file; by default that in --out")
    flag("--ar", help="AR file; by default that in --out; without any of these, the shipped pair")
    flag("--pairs", type=whole(1), default=1000, help="of images, for each of the two comparisons")
    flag("--seed", type=whole(0), default=0, help="of the noise")
    flag("--inception", metavar="FILE", help="torch-fidelity's weights, else they are downloaded")
    flag("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"],
         help="auto is what torch finds")
    return parser.parse_args()


@torch.no_grad()
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
    tokenizer, ar, paths = load_pair(args, device)
    print(f"{paths[0]} and {paths[1]}")
    k = ar.cfg.num_prologue
    if k == 0:
        raise InputError(f"{paths[1]} has no prologue")
    if device.type == "cpu":
        pack_for_cpu(ar)
    network = fid.feature_network("auto", tokenizer.cfg.image_size, args.inception, device)[1]

    # Images, each with noise of its own: a prologue and visual tokens, the same prologue and other
    # visual tokens, another prologue and other visual tokens
    n = args.pairs
    labels = torch.arange(n) % ar.cfg.num_classes
    drawing = dict(seed=args.seed, batch_size=BATCH_SIZE, settings={})
    codes = draw(ar, labels, range(n), **drawing)  # (n, K+N)
    same = draw(ar, labels, range(n, 2 * n), prologue=codes[:, :k], **drawing)
    other = draw(ar, labels, range(2 * n, 3 * n), **drawing)

    first = Drawn(codes, tokenizer, network, device)
    print_comparison("the same prologue", first, Drawn(same, tokenizer, network, device))
    print_comparison("the same class only", first, Drawn(other, tokenizer, network, device))


if __name__ == "__main__":
    main()
