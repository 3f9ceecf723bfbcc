"""What each recipe costs on paper: counted FLOPs, GPU-hours at an assumed MFU, memory of the state.

    python tools/cost.py                            # A100: 312 TFLOP/s in bf16, MFU 40%
    python tools/cost.py --tflops 990 --mfu 0.4     # H100

torch counts the FLOPs of one training step, forward and backward, perceptual network and
discriminator included, on tensors that have a shape and no memory. The state is what a run keeps
whatever its batch size: weights, gradients and AdamW's two moments, 16 bytes for each parameter,
and 4 more for each parameter that has an EMA.
"""

import argparse
import sys
from pathlib import Path

import torch
import torchvision
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ar as ar_file
from ar import AR, ARConfig
from tokenizer import SIZES, HelpFormatter, Tokenizer, TokenizerConfig, real
from train_stage1 import Discriminator, Stage1

# What recipes/*.sh train. The hours are those of the paper's appendix E, hours times A100s.
STAGE1 = {
    "Prologue-Base": dict(size="B", perceptual="vgg", steps=750_000, batch_size=256,
                          paper_hours=30 * 8),
    "Prologue-Large": dict(size="L", perceptual="convnext", steps=1_000_000, batch_size=256,
                           paper_hours=44 * 8),
    "one_gpu, stage 1": dict(size="S", perceptual="vgg", steps=200_000, batch_size=256,
                             paper_hours=None),
}
STAGE2 = {
    "AR B-B": dict(tokenizer="B", size="B", steps=1_000_000, batch_size=512, paper_hours=13 * 8),
    "AR B-L": dict(tokenizer="B", size="L", steps=1_000_000, batch_size=512, paper_hours=None),
    "AR B-XL": dict(tokenizer="B", size="XL", steps=1_000_000, batch_size=512, paper_hours=None),
    "AR L-B": dict(tokenizer="L", size="B", steps=500_000, batch_size=2048, paper_hours=None),
    "AR L-L": dict(tokenizer="L", size="L", steps=500_000, batch_size=2048, paper_hours=25 * 8),
    "AR L-XL": dict(tokenizer="L", size="XL", steps=593_750, batch_size=2048, paper_hours=25 * 32),
    "one_gpu, AR": dict(tokenizer="S", size="B", steps=125_000, batch_size=512, paper_hours=None),
}


def num_parameters(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def cost_of_stage1(size, network, side):
    """FLOPs per image and bytes of the state; network: of the perceptual loss, which sees images of
    side x side pixels. For tensors without memory, see `count`.
    """
    batch = 2
    tokenizer = Tokenizer(TokenizerConfig(**SIZES[size]))
    image_size = tokenizer.cfg.image_size
    ar = AR(ARConfig.for_tokenizer(tokenizer.cfg, num_classes=0, **ar_file.SIZES["S"]))
    stage1 = Stage1(tokenizer, ar, ce_weight=3.0)
    gan = Discriminator(64)
    x = torch.empty(batch, 3, image_size, image_size)
    labels = torch.empty(batch, dtype=torch.int64)
    drop = torch.empty(batch, dtype=torch.bool)

    # A step as in train_stage1.py; means stand in for the losses, which cost next to nothing.
    with FlopCounterMode(display=False) as counter:
        y, vq, ce = stage1(x, labels, drop)
        gan.requires_grad_(False)
        loss = y.mean() + vq + ce + gan.net(y).mean() + network(y[:, :, :side, :side]).mean()
        loss.backward()
        network(x[:, :, :side, :side])  # the target's side of the perceptual loss
        gan.requires_grad_(True)
        logits_real, logits_fake, _ = gan(x, y)
        (logits_real.mean() + logits_fake.mean()).backward()

    state = 20 * num_parameters(tokenizer) + 16 * num_parameters(ar, gan)
    return counter.get_total_flops() / batch, state


def cost_of_stage2(tokenizer, size):
    """FLOPs per image and bytes of the state. For tensors without memory, see `count`."""
    cfg = TokenizerConfig(**SIZES[tokenizer])
    ar = AR(ARConfig.for_tokenizer(cfg, num_classes=1000, **ar_file.SIZES[size]))
    codes = torch.empty(1, cfg.num_prologue + cfg.num_visual, dtype=torch.int64)
    labels = torch.empty(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        ar(codes, labels).mean().backward()
    return counter.get_total_flops(), 16 * num_parameters(ar)


def count(function, *args):
    """function(*args) with tensors that have a shape and no memory. Attention is written out as
    two products, because the counter does not know the CPU's fused one.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH):
        return function(*args)


def perceptual_network(name, image_size):
    """The network, with random weights, and the side of the images that it sees."""
    if name == "convnext":
        network = torchvision.models.convnext_small().eval()
        side = 224
    else:
        network = torchvision.models.vgg16().features
        side = image_size
    return network.requires_grad_(False), side


def print_row(name, flops, state, images, paper_hours, args):
    hours = flops * images / (args.tflops * 1e12 * args.mfu) / 3600
    paper = "" if paper_hours is None else paper_hours
    print(f"| {name} | {flops / 1e9:,.0f} | {images / 1e6:,.0f}M | {hours:,.0f} | {paper} "
          f"| {state / 1e9:.1f} |")


def main():
    parser = argparse.ArgumentParser(description="What each recipe costs on paper.",
                                     formatter_class=HelpFormatter)
    flag = parser.add_argument
    flag("--tflops", type=real(1e-3), default=312, help="peak TFLOP/s of the GPU in bf16")
    flag("--mfu", type=real(1e-3, 1), default=0.4,
         help="share of the peak that training is assumed to reach")
    args = parser.parse_args()

    print("| recipe | GFLOPs per image and step | images | GPU-hours | the paper's A100-hours "
          "| state, GB |")
    print("| --- " * 6 + "|")
    for name, row in STAGE1.items():
        image_size = TokenizerConfig(**SIZES[row["size"]]).image_size
        network, side = perceptual_network(row["perceptual"], image_size)
        flops, state = count(cost_of_stage1, row["size"], network, side)
        images = row["steps"] * row["batch_size"]
        print_row(name, flops, state, images, row["paper_hours"], args)
    for name, row in STAGE2.items():
        flops, state = count(cost_of_stage2, row["tokenizer"], row["size"])
        images = row["steps"] * row["batch_size"]
        print_row(name, flops, state, images, row["paper_hours"], args)


if __name__ == "__main__":
    main()
