"""Stage 1: train the tokenizer and, beside it, the small AR model that shapes the prologue tokens.

    python train_stage1.py                              # tiny, bundled data, minutes on a CPU
    python train_stage1.py --layout 2d --out out_2d     # the baseline without a prologue
    python train_stage1.py --layout post --init out_2d/tokenizer.safetensors --out out_post
    python train_stage1.py --onestage --ar_size tiny --out out_onestage     # no stage 2 after this
    torchrun --nproc_per_node 8 train_stage1.py --size B ...          # see recipes/stage1.sh

One step, for images x (paper equation 2):

    h_visual, h_prologue = encoder(x)
    q, codes, vq = nearest visual codes of h_visual              # straight-through
    onehot = prologue codes of h_prologue                        # Prob-STE
    y = decoder(q)
    ce = cross-entropy of the joint AR model on [onehot, EOS, codes], codes hidden half of the time
    loss = l1(x, y) + vq + perceptual(x, y) + gan_weight * gan(y) + ce
    update tokenizer and AR model by the gradients of loss       # ce's into onehot times lambda
    update the discriminator on x against y
    EMA of the tokenizer <- tokenizer                            # the weights that are used later

Why a prologue learns anything: the targets of cross-entropy are integers, so it reaches the encoder
only through what the AR model reads. For half of the images the visual tokens are hidden from it;
whatever the prologue tells of such an image lowers the loss. No term asks a prologue token to be
easy to predict.

Which loss reaches which weights:

    l1, perceptual, gan    encoder, visual projection, decoder
    vq                     encoder, visual projection, visual codebook
    ce                     encoder, prologue projection and codebook, all times lambda; AR model
    discriminator          discriminator

In the layout post the first encoder, its codes and the decoder are frozen: only ce is left. With
--direct_ce (1d, 2d) the visual quantizer takes the prologue's place under ce.

In --out it leaves tokenizer.safetensors (the EMA), joint_ar.safetensors and, named train_stage1, a
log, held-out images above their reconstructions, and the state for --resume. With --onestage the AR
model is the final one, ar.safetensors, and the tokenizer the raw one that it was trained with.
"""

import argparse
import contextlib
import copy
import functools
import os
import random
import time
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ar import AR, ARConfig
from ar import SIZES as AR_SIZES
from pretokenize import (BUNDLED, Images, center_crop, default_val, load_batches, psnr, random_crop,
                         save_grid, to_float, to_uint8, visited_images)
from tokenizer import (LAYOUTS, SIZES, Tokenizer, TokenizerConfig, average, check_finite, finish,
                       open_out, setup, unit_norm)
from train_ar import (announce, check_moments, for_training, is_due, learning_rate, load_state,
                      log_line, on_ctrl_c, parse_trainer_args, save_state, split_batch, to_device,
                      write_log)

CLASS_DROPOUT = 0.1  # share of images that --onestage trains without their class
EMA_HALF_LIFE = 1000  # steps; at most a tenth of the steps so far
LECAM_WEIGHT = 0.001
R1_WEIGHT = 0.01
R1_EVERY = 25  # steps

# Flags that replace single values of --size or --init
MODEL_FLAGS = {
    "image_size": "side in pixels",
    "patch_size": "side in pixels; each patch is a visual token",
    "codebook_size": "visual codes V",
    "code_dim": "dimensions of a code",
    "num_prologue": "prologue tokens K, not for 1d and 2d",
    "prologue_codebook_size": "prologue codes P",
    "tau": "temperature of Prob-STE",
}


# Models, losses and EMA

class Stage1(nn.Module):
    """Tokenizer and joint AR model in one forward, as DistributedDataParallel wants it. lambda
    (`ce_weight`) multiplies the gradient that CE sends into the one-hot codes and nothing else: so
    the encoder is trained on lambda * CE and the AR model on CE, just as by two updates."""

    def __init__(self, tokenizer, ar, ce_weight, direct_ce=False):
        super().__init__()
        self.tokenizer = tokenizer
        self.ar = ar  # None where no CE trains the tokenizer
        self.ce_weight = ce_weight
        self.direct_ce = direct_ce

    def forward(self, images, labels, drop):
        """images (B, 3, H, W), labels (B,), drop (B,) bool -> reconstruction (B, 3, H, W) or None
        in the layout post, losses of the visual quantizer by name, CE in nats per token."""
        reconstruction, codes, onehot, losses = self.tokenizer(images, self.direct_ce)
        if self.ar is None:
            return reconstruction, losses, images.new_zeros(())
        onehot = onehot.detach() + self.ce_weight * (onehot - onehot.detach())
        logits = self.ar(codes, labels, onehot, drop)  # (B, L, vocabulary)
        tokens = self.ar.sequence(codes)  # (B, L)
        ce = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        return reconstruction, losses, ce


class Discriminator(nn.Module):
    """PatchGAN: three convolutions of stride 2, BatchNorm, LeakyReLU; a logit for each patch."""

    def __init__(self, channels):
        super().__init__()
        layers = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for out, stride in ((2 * channels, 2), (4 * channels, 2), (8 * channels, 1)):
            layers += [nn.Conv2d(width, out, 4, stride, padding=1, bias=False),
                       nn.BatchNorm2d(out), nn.LeakyReLU(0.2)]
            width = out
        layers.append(nn.Conv2d(width, 1, 4, stride=1, padding=1))
        self.net = nn.Sequential(*layers)
        for module in self.net:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1, 0.02)
        self.register_buffer("averages", torch.zeros(2))  # for LeCam: mean logits of real and fake

    def forward(self, images):
        """images (B, 3, H, W) -> logits (B, 1, h, w), with BatchNorm statistics of this batch"""
        return self.net(images).float()


class Perceptual(nn.Module):
    """The perceptual loss by name: none; vgg, which is LPIPS on VGG16; convnext, the mean squared
    difference of the 1,000 logits of ConvNeXt-S."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        if name == "vgg":
            import lpips

            # Theirs has its epsilon outside the root: black images, whose features are 0, give NaN
            lpips.normalize_tensor = functools.partial(unit_norm, dim=1, eps=1e-8)
            self.vgg = lpips.LPIPS(net="vgg", verbose=False)
        elif name == "convnext":
            import torchvision

            self.convnext = torchvision.models.convnext_small(weights="IMAGENET1K_V1")
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])
        self.eval().requires_grad_(False)

    def logits(self, images):
        x = F.interpolate(images / 2 + 0.5, (224, 224), mode="bilinear", antialias=True)
        return self.convnext((x - self.mean) / self.std)

    def forward(self, images, target):
        """images, target (B, 3, H, W) in [-1, 1] -> scalar"""
        if self.name == "vgg":
            return self.vgg(images, target).mean()
        if self.name == "convnext":
            return F.mse_loss(self.logits(images), self.logits(target))
        return images.new_zeros(())


def discriminator_loss(discriminator, x, y, with_r1, micro_share):
    """Loss of the discriminator on images x against reconstructions y, and its terms for the log.
    R1 is |d logits / d x|^2, summed over pixels. LeCam (Tseng et al. 2021) penalizes real logits
    above the running mean of the fake ones and fake logits below that of the real ones, against
    overfitting to few images. micro_share: what part of the step's batch this is."""
    x = x.detach().requires_grad_(with_r1)
    logits_real = discriminator(x)  # (B, 1, h, w)
    logits_fake = discriminator(y.detach())
    adversarial = F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean()
    means = torch.stack([logits_real.mean(), logits_fake.mean()]).detach()
    average(means)
    mean_real, mean_fake = discriminator.averages.lerp_(means, 0.001 * micro_share)  # decay 0.999
    lecam = F.relu(logits_real - mean_fake).square().mean()
    lecam += F.relu(mean_real - logits_fake).square().mean()
    r1 = torch.zeros_like(adversarial)
    if with_r1:
        (gradient,) = torch.autograd.grad(logits_real.sum(), x, create_graph=True)
        r1 = gradient.square().sum((1, 2, 3)).mean()
    loss = adversarial + LECAM_WEIGHT * lecam + R1_WEIGHT / 2 * r1
    return loss, dict(discriminator=loss, lecam=lecam, r1=r1, logits_real=means[0],
                      logits_fake=means[1])


def build_tokenizer(args):
    """A new tokenizer, or one with the weights of --init, of which a 2d one can become post."""
    changed = {name: value for name, value in vars(args).items() if name in MODEL_FLAGS}
    config = TokenizerConfig(**SIZES[args.size], layout=args.layout)
    if args.init is None:
        if args.layout == "post":
            raise SystemExit("--layout post needs --init TOKENIZER, a trained 2d one")
        return Tokenizer(replace(config, **changed))
    old = Tokenizer.load(args.init)
    if (old.config.layout, args.layout) == ("2d", "post"):
        config = replace(old.config, layout="post", post=config.post, tau=config.tau,
                         num_prologue=config.num_prologue,
                         prologue_codebook_size=config.prologue_codebook_size)
    elif args.layout == old.config.layout:
        config = old.config
    else:
        raise SystemExit(f"--init {args.init} is {old.config.layout}: only 2d can change, to post")
    tokenizer = Tokenizer(replace(config, fingerprint="", **changed))
    tokenizer.load_state_dict(old.state_dict(), strict=False)  # the layout post has more
    return tokenizer


@torch.no_grad()
def update_ema(ema, model, half_life):
    """ema <- model, so that after `half_life` steps half of what was there is left."""
    weight = 1 - 0.5 ** (1 / half_life)
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), weight)


# Data and held-out measures

def training_view(images, visit, size, args):
    """The crop that a visit sees, uint8 (size, size, 3); it depends on (seed, visit) only."""
    (index,) = visited_images(args.seed, visit, 1, len(images))
    rng = random.Random(f"{args.seed} {visit}")
    image = images.open(index)
    view = random_crop(image, size, rng) if args.crop == "random" else center_crop(image, size)
    return view[:, ::-1] if args.flip and rng.random() < 0.5 else view


def held_out(images, size, args):
    """Labels (n,) and crops (n, H, W, 3) uint8 of --eval_images images, the same for each measure;
    read at the start, so that a broken one shows there."""
    count = min(args.eval_images, len(images))
    chosen = visited_images(0, 0, count, len(images))  # in random order
    loader = load_batches(lambda index: center_crop(images.open(index), size), [chosen],
                          args.num_workers)
    return images.labels[chosen] if args.onestage else torch.zeros(count).long(), next(loader)


@torch.no_grad()
def evaluate(picture, tokenizer, ar, labels, images, device, autocast):
    """Means over held-out images uint8 (n, H, W, 3): PSNR in dB, AR.measure; and of each codebook
    the codes in use and their perplexity. The first go to `picture` with their reconstructions."""
    means = defaultdict(float)
    all_codes = []
    for x, batch_labels in zip(images.split(64), labels.split(64)):  # x (B, H, W, 3)
        with autocast:
            codes = tokenizer.encode(to_float(x.to(device)))  # (B, K+N)
            y = to_uint8(tokenizer.decode(codes))  # (B, H, W, 3)
            measures = ar.measure(codes, batch_labels.to(device)) if ar is not None else {}
        if not all_codes:
            save_grid(picture, [x[:16], y[:16]])
        measures["psnr"] = psnr(x, y)
        for name, values in measures.items():
            means[f"val_{name}"] += values.sum().item() / len(images)
        all_codes.append(codes)
    sizes = [tokenizer.config.num_prologue, tokenizer.config.num_visual]
    for group, codes in zip(("prologue", "visual"), torch.cat(all_codes).split(sizes, 1)):
        if codes.numel() > 0:
            _, uses = codes.unique(return_counts=True)
            means[f"val_usage_{group}"] = len(uses)
            entropy = torch.special.entr(uses / uses.sum()).sum()
            means[f"val_perplexity_{group}"] = entropy.exp().item()
    return means


def parse_args():
    parser = argparse.ArgumentParser(description="Train a tokenizer; recipes/ has the paper's.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument

    # Data
    flag("--data", default=str(BUNDLED / "train"), help="a folder, zip, or path into a zip")
    flag("--val_data", help="held out; else val, valid or validation beside train; else --data")
    flag("--crop", default="center", choices=["center", "random"], help="random: of place and size")
    flag("--flip", action="store_true", help="mirror half of the images")
    flag("--num_workers", type=int, default=min(8, os.cpu_count()), help="decoding threads a rank")

    # Tokenizer
    flag("--size", default="tiny", choices=SIZES, help="of networks, images and codebooks")
    flag("--layout", default="prologue", choices=LAYOUTS, help="1d, 2d: no prologue; post: --init")
    flag("--init", metavar="TOKENIZER", help="file to go on from; its size counts")
    group = parser.add_argument_group("sizes, else those of --init or --size: [tiny, S, B, L]")
    for name, text in MODEL_FLAGS.items():
        values = [getattr(TokenizerConfig(**size), name) for size in SIZES.values()]
        group.add_argument(f"--{name}", type=type(values[0]), default=argparse.SUPPRESS,
                           help=f"{text} {values}")

    # Joint AR model
    flag("--ar_size", default="nano", choices=AR_SIZES, help="of the joint AR model")
    flag("--onestage", action="store_true", help="the AR model is the final one, with classes")
    flag("--direct_ce", action="store_true", help="1d, 2d: CE on the visual tokens (Fig. 5)")
    flag("--ce_weight", type=float, default=3.0, help="lambda: factor of CE's gradient")
    flag("--visual_dropout", type=float, default=0.5, help="share with hidden visual tokens")

    # Losses
    flag("--perceptual", default="none", choices=["none", "vgg", "convnext"], help="vgg is LPIPS")
    flag("--gan_weight", type=float, default=0.02, help="0 trains without a discriminator")
    flag("--gan_channels", type=int, default=16, help="width of the discriminator")

    args = parse_trainer_args(parser, "image_size", "patch_size", "codebook_size", "code_dim",
                              "prologue_codebook_size", "gan_channels", hold=0.5, steps=1600,
                              lr=5e-4, min_lr=5e-5, eval_images=1000)
    if args.direct_ce and args.layout not in ("1d", "2d"):
        parser.error("--direct_ce is for the layouts 1d and 2d")
    if args.onestage and args.layout not in ("prologue", "post"):
        parser.error("--onestage is for the layouts prologue and post")
    if args.layout == "post":
        args.gan_weight = 0.0  # only CE trains it, there is no reconstruction to judge
    return args


def main():
    args = parse_args()

    # Device, ranks, and this rank's part of a step, in one or more micro-batches
    rank, world_size, device, autocast = setup(args.device, args.dtype)
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA, but where exact_fp32 forbids it
    torch.backends.cudnn.benchmark = True
    out = Path(args.out)
    if Path(args.data).resolve() in out.resolve().parents:
        raise SystemExit(f"--out {out} lies in --data: its pictures would be taken too")
    per_rank, micro = split_batch(args, world_size, lowest=2)  # for BatchNorm
    micro_share = micro / per_rank

    # Data
    images = Images(args.data)
    val_data = args.val_data or default_val(args.data)
    val_images = Images(val_data or args.data)
    if args.onestage and val_images.classes != images.classes:
        raise SystemExit(f"--onestage: {val_images} has other classes than {images}")

    # State of an earlier run
    if rank == 0:
        open_out(out, "train_stage1.pt", "tokenizer.safetensors", "joint_ar.safetensors")
    torch.manual_seed(args.seed)
    same = ("size", "layout", *MODEL_FLAGS, "ar_size", "onestage", "direct_ce", "crop", "flip",
            "gan_channels", "batch_size", "seed")
    must_match = {name: value for name, value in vars(args).items() if name in same}
    # On another type of device Adam's moments would have another memory layout
    must_match |= {"device": device.type, "data": images.digest(),
                   "classes": args.onestage and images.classes}
    weights = out / "tokenizer.safetensors"
    state = load_state(out / "train_stage1.pt", weights, must_match, args)

    # Models, equal on all ranks
    if state:
        tokenizer = Tokenizer(TokenizerConfig(**state["config"]))
    else:
        tokenizer = build_tokenizer(args)
    if args.layout == "post":
        for module in (tokenizer.encoder, tokenizer.visual_quantizer, tokenizer.decoder):
            module.requires_grad_(False)
    tokenizer.to(device)
    ar = None
    if tokenizer.config.num_prologue > 0 or args.direct_ce:
        classes = images.classes if args.onestage else []  # without classes: unconditional
        ar = AR(ARConfig.for_tokenizer(tokenizer.config, num_classes=len(classes), classes=classes,
                                       **AR_SIZES[args.ar_size])).to(device)
    ema = copy.deepcopy(tokenizer).eval().requires_grad_(False)
    result = tokenizer if args.onestage else ema  # the weights that are used afterwards
    memory = dict(memory_format=torch.channels_last) if device.type == "cuda" else {}
    try:
        perceptual_loss = Perceptual(args.perceptual).to(device, **memory)
    except OSError as error:
        raise SystemExit(f"--perceptual {args.perceptual} cannot download its weights ({error}): "
                         "recipes/README.md says what to fetch") from None
    discriminator = Discriminator(args.gan_channels).to(device, **memory)
    stage1 = Stage1(tokenizer, ar, args.ce_weight, args.direct_ce)

    # Optimizers. beta1 is 0 in the GAN: momentum would aim at where the opponent was
    groups = [dict(params=tokenizer.parameters(), betas=(0.0, 0.99), weight_decay=0.0)]
    if ar is not None:
        groups += ar.parameter_groups(weight_decay=0.03, betas=(0.9, 0.99))
    optimizers = [torch.optim.AdamW(groups, lr=args.lr, fused=True),
                  torch.optim.AdamW(discriminator.parameters(), lr=args.lr, fused=True,
                                    betas=(0.0, 0.99), weight_decay=1e-4)]
    stateful = [stage1, ema, discriminator, *optimizers]
    start_step = 0
    if state:
        for part, saved in zip(stateful, state.pop("parts")):
            part.load_state_dict(saved)
        start_step = state["step"]
    log = out / "train_stage1.jsonl"
    on_ctrl_c(start_step, rank)
    if rank == 0:
        print(f"training on {images}")
        print(f"measuring {val_images}{'' if val_data else ', not held out'}")
        if args.eval_images > 0:
            val_labels, val_crops = held_out(val_images, tokenizer.config.image_size, args)
        announce(tokenizer, start_step, log, args)

    # Numbers of the visits of each micro-batch, whose images a loader reads ahead of the loop
    steps = range(start_step + 1, args.steps + 1)
    firsts = ((step - 1) * args.batch_size + rank * per_rank + i
              for step in steps for i in range(0, per_rank, micro))
    batches = (range(first, first + micro) for first in firsts)
    load = functools.partial(training_view, images, size=tokenizer.config.image_size, args=args)
    loader = load_batches(load, batches, args.num_workers)

    # The loop
    model = for_training(stage1, args)
    clock = time.perf_counter()
    for step in steps:
        # Learning rate
        lr = learning_rate(step, args)
        for optimizer in optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = lr

        # Random numbers are drawn for the global batch, of which each rank takes its slice
        generator = torch.Generator().manual_seed((args.seed * 1_000_003 + step) % 2**63)
        of_rank = slice(rank * per_rank, (rank + 1) * per_rank)
        drop = torch.rand(args.batch_size, generator=generator)[of_rank] < args.visual_dropout
        labels = torch.zeros(per_rank, dtype=torch.int64)  # num_classes is 0: 0 is no_class
        if args.onestage:
            first = (step - 1) * args.batch_size + rank * per_rank
            labels = images.labels[visited_images(args.seed, first, per_rank, len(images))]
            unlabelled = torch.rand(args.batch_size, generator=generator)[of_rank] < CLASS_DROPOUT
            labels = labels.masked_fill(unlabelled, ar.no_class)
        labels = to_device(labels, device)
        drop = to_device(drop, device)

        terms = defaultdict(float)  # of the loss, for the log
        for i in range(0, per_rank, micro):
            # A micro-batch of images
            x = to_float(to_device(next(loader), device))  # (B, 3, H, W) of uint8 (B, H, W, 3)
            model.require_backward_grad_sync = i + micro == per_rank  # of DDP: once per step

            # Tokenizer and joint AR model
            with autocast:
                y, vq_losses, ce = model(x, labels[i : i + micro], drop[i : i + micro])
            l1 = perceptual = gan = torch.zeros((), device=device)
            if y is not None:
                l1 = F.l1_loss(y, x)
                perceptual = perceptual_loss(y, x)
            if args.gan_weight > 0:
                discriminator.requires_grad_(False)  # this gradient is for the tokenizer alone
                with autocast:
                    gan = F.softplus(-discriminator(y)).mean()
                discriminator.requires_grad_(True)
            loss = l1 + sum(vq_losses.values()) + perceptual + args.gan_weight * gan + ce
            (loss * micro_share).backward()
            losses = dict(l1=l1, perceptual=perceptual, gan=gan, ce=ce) | vq_losses

            # Discriminator, on the same images and reconstructions
            if args.gan_weight > 0:
                with_r1 = step % R1_EVERY == 0  # differentiates twice: not in bf16
                with contextlib.nullcontext() if with_r1 else autocast:
                    d_loss, d_terms = discriminator_loss(discriminator, x, y, with_r1, micro_share)
                (d_loss * micro_share).backward()
                losses |= d_terms
            for name, value in losses.items():
                terms[name] += value.detach() * micro_share

        # Step and EMA
        if args.gan_weight > 0:
            for p in discriminator.parameters():
                average(p.grad)
        for optimizer in optimizers:
            optimizer.step()
        update_ema(ema, tokenizer, min(EMA_HALF_LIFE, 0.1 * step))

        # Log
        if is_due(args.log_every, step, args):
            # An infinite limit: it only measures
            terms["grad_norm"] = nn.utils.clip_grad_norm_(stage1.parameters(), torch.inf)
            seconds = (time.perf_counter() - clock) / (step - start_step)
            line = log_line(step, lr, terms, seconds, args)
            if rank == 0:
                write_log(line, log, args)

        # Held-out measures and pictures
        if is_due(args.eval_every, step, args) and rank == 0 and args.eval_images > 0:
            with torch.compiler.set_stance("force_eager"):  # these shapes would recompile
                measures = evaluate(out / "train_stage1.png", result, ar, val_labels, val_crops,
                                    device, autocast)
            write_log({"step": step} | measures, log, args)

        # Save, after the measures: a run that is killed while measuring goes on from before them
        if rank == 0 and is_due(args.save_every, step, args):
            for module in (stage1, ema, discriminator):
                check_finite(f"step {step}", module.state_dict())
            check_moments(step, optimizers)
            result.save(weights)
            if ar is not None:
                ar.config.tokenizer = result.config.fingerprint if args.onestage else ""
                ar.save(out / ("ar.safetensors" if args.onestage else "joint_ar.safetensors"))
            state = dict(step=step, steps=args.steps, config=asdict(tokenizer.config),
                         must_match=must_match, parts=[part.state_dict() for part in stateful])
            save_state(out / "train_stage1.pt", state)

    if rank == 0:
        script = "sample.py"
        if not args.onestage:
            script = f"pretokenize.py --data {args.data} [--flip or --crop ten]"
        print(f"done: {weights}. Next: python {script} --out {out}")
    finish()


if __name__ == "__main__":
    main()
