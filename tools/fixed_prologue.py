"""How much of an image its prologue decides (a number for the paper's figures 1 and A3).

    python tools/fixed_prologue.py                          # the pair in out/, or else the shipped one
    python tools/fixed_prologue.py --out DIR --pairs 500

For each pair two images of one class are drawn: with one prologue and visual tokens drawn apart, or with prologues drawn
apart too. Printed are the mean distance of the two in pixels (root mean square, 0 to 255) and in the features of fid.py's
network, and how often that network takes both for the same class (it errs, and so do samples). All without guidance.
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import fid
from common import InputError, run, to_uint8
from sample import load_pair


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="out")
    parser.add_argument("--tokenizer", help="by default tokenizer.safetensors in --out")
    parser.add_argument("--ar", help="by default ar.safetensors in --out")
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inception", help="torch-fidelity's Inception weights, instead of downloading them")
    args = parser.parse_args()
    tokenizer, ar, paths = load_pair(args, "cpu")
    print(f"{paths[0]} and {paths[1]}")
    if not ar.cfg.num_prologue:
        raise InputError(f"{paths[1]} has no prologue")
    network = fid.feature_network("auto", tokenizer.cfg.image_size, args.inception, "cpu")[1]
    generator = torch.Generator().manual_seed(args.seed)
    labels, k = torch.arange(args.pairs) % ar.cfg.num_classes, ar.cfg.num_prologue

    def draw(prologue=None):
        """Images (pairs, H, W, 3), and the network's outputs."""
        parts, outputs = [], []
        for i in range(0, args.pairs, 100):
            part = slice(i, i + 100)
            codes = ar.generate(labels[part], generator=generator, prologue=None if prologue is None else prologue[part])
            images = to_uint8(tokenizer.decode(codes))
            parts.append((codes, images))
            outputs.append(network(images))
        codes, images = (torch.cat(part) for part in zip(*parts))
        return codes, images.float(), {key: torch.cat([o[key] for o in outputs]) for key in outputs[0]}

    codes, images, out = draw()
    for name, other in (("the same prologue", draw(codes[:, :k])), ("the same class only", draw())):
        _, others, theirs = other
        pixels = (images - others).square().mean((1, 2, 3)).sqrt().mean()
        feature = (out["pool"] - theirs["pool"]).norm(dim=1).mean()
        agreement = (out["probabilities"].argmax(1) == theirs["probabilities"].argmax(1)).float().mean()
        print(f"{name:20}  pixel distance {pixels:.1f}  feature distance {feature:.2f}  both in one class {agreement:.3f}")


if __name__ == "__main__":
    run(main)
