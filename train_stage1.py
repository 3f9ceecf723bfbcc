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

Which loss reaches which weights:

    l1, perceptual, gan    encoder, visual projection, decoder
    vq                     encoder, visual projection, visual codebook
    ce                     encoder, prologue projection and codebook, all times lambda; AR model
    discriminator          discriminator

In the layout post the first encoder, its codes and the decoder are frozen, and ce alone is left;
with --direct_ce ce goes into the visual projection and codebook, times lambda.

In --out it leaves tokenizer.safetensors (the EMA), joint_ar.safetensors, train_stage1.jsonl (the
log), train_stage1.png (held-out images above their reconstructions) and train_stage1.pt (the state
for --resume). With --onestage the AR model is the final one, ar.safetensors, and the tokenizer the
raw one that it was trained with.
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
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ar import AR, ARConfig
from ar import SIZES as AR_SIZES
from pretokenize import (BUNDLED, Images, center_crop, default_val, load_batches, psnr, random_crop,
                         save_grid, to_float, to_uint8, visited_images)
from tokenizer import (LAYOUTS, SIZES, Tokenizer, TokenizerConfig, Transformer, check_finite,
                       compile_blocks, finish, setup, writing)
from train_ar import learning_rate, load_state, log_entry, report

CLASS_DROPOUT = 0.1  # share of images that --onestage trains without their class
EMA_HALF_LIFE = 1000  # steps; at most a tenth of the steps so far
LECAM_WEIGHT = 0.001
R1_WEIGHT = 0.01
R1_EVERY = 25  # steps

# Flags of the tokenizer that default to those of --size or --init
MODEL_FLAGS = ("image_size", "patch_size", "codebook_size", "code_dim", "num_prologue",
               "prologue_codebook_size", "tau")

# Models, losses and EMA


class Stage1(nn.Module):
    """Tokenizer and joint AR model in one forward, as DistributedDataParallel wants it.

    lambda (`ce_weight`) multiplies the gradient that CE sends into the one-hot codes and nothing
    else: so the encoder is trained on lambda * CE and the AR model on CE, just as by two
    separate updates.
    """

    def __init__(self, tokenizer, ar, ce_weight, direct_ce=False):
        super().__init__()
        self.tokenizer = tokenizer
        self.ar = ar  # None where no CE trains the tokenizer
        self.ce_weight = ce_weight
        self.direct_ce = direct_ce

    def forward(self, images, labels, drop):
        """images (B, 3, H, W), labels (B,), drop (B,) bool -> reconstruction (B, 3, H, W) or None
        in the layout post, VQ loss, CE in nats per token."""
        reconstruction, codes, onehot, vq_loss = self.tokenizer(images, self.direct_ce)
        if self.ar is None:
            return reconstruction, vq_loss, torch.zeros_like(vq_loss)
        onehot = onehot.detach() + self.ce_weight * (onehot - onehot.detach())
        logits = self.ar(codes, labels, onehot, drop)  # (B, L, vocabulary)
        tokens = self.ar.sequence(codes)  # (B, L)
        ce = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        return reconstruction, vq_loss, ce


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

    def forward(self, real_images, fake_images, r1=False):
        """Logits of both batches, each with BatchNorm statistics of its own, and with `r1` the R1
        penalty: |d logits / d real images|^2, summed over pixels."""
        real_images = real_images.detach().requires_grad_(r1)
        logits_real = self.net(real_images).float()  # (B, 1, h, w)
        logits_fake = self.net(fake_images.detach()).float()
        if not r1:
            return logits_real, logits_fake, logits_real.new_zeros(())
        (gradient,) = torch.autograd.grad(logits_real.sum(), real_images, create_graph=True)
        return logits_real, logits_fake, gradient.square().sum((1, 2, 3)).mean()


def lecam_penalty(logits_real, logits_fake, averages):
    """LeCam (Tseng et al. 2021) penalizes real logits above the running mean of the fake ones and
    fake logits below that of the real ones, which keeps a discriminator from overfitting few
    images. averages (2,): running mean logits of real and fake."""
    real_excess = F.relu(logits_real - averages[1]).square().mean()
    fake_excess = F.relu(averages[0] - logits_fake).square().mean()
    return real_excess + fake_excess


def unit_features(x, eps=1e-8):
    """x (B, C, H, W) / |x| along C. The package lpips has its epsilon outside the root: where all
    features are zero, as in black images, its gradient is NaN."""
    return x * (x.square().sum(1, keepdim=True) + eps).rsqrt()


class Perceptual(nn.Module):
    """The perceptual loss by name: none; vgg, which is LPIPS on VGG16; convnext, the mean squared
    difference of the 1,000 logits of ConvNeXt-S."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        if name == "vgg":
            import lpips

            lpips.normalize_tensor = unit_features
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


def discriminator_loss(discriminator, x, y, with_r1, share):
    """Loss of the discriminator on images x against reconstructions y, and its terms for the log.
    share: of this micro-batch in the step, by which it moves LeCam's averages (decay 0.999)."""
    logits_real, logits_fake, r1 = discriminator(x, y, with_r1)
    means = torch.stack([logits_real.mean(), logits_fake.mean()]).detach()
    if dist.is_initialized():
        dist.all_reduce(means)
        means = means / dist.get_world_size()
    discriminator.averages.lerp_(means, 0.001 * share)
    lecam = lecam_penalty(logits_real, logits_fake, discriminator.averages)
    vanilla = F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean()
    loss = vanilla + LECAM_WEIGHT * lecam + R1_WEIGHT / 2 * r1
    return loss, dict(discriminator=loss, lecam=lecam, r1=r1, logits_real=means[0],
                      logits_fake=means[1])


def build_tokenizer(args):
    """A new tokenizer, or one that starts from the weights of --init. The layout post adds a
    prologue to a 2d one; encoder, visual quantizer and decoder are then frozen."""
    changed = {name: value for name, value in vars(args).items()
               if name in MODEL_FLAGS and value is not None}
    cfg = TokenizerConfig(**SIZES[args.size], layout=args.layout)
    if args.init is None:
        return Tokenizer(replace(cfg, **changed))
    old = Tokenizer.load(args.init)
    if (old.cfg.layout, args.layout) == ("2d", "post"):
        cfg = replace(old.cfg, layout="post", post=cfg.post, tau=cfg.tau,
                      num_prologue=cfg.num_prologue,
                      prologue_codebook_size=cfg.prologue_codebook_size)
    elif args.layout == old.cfg.layout:
        cfg = old.cfg
    else:
        raise SystemExit(f"--init {args.init} has the layout {old.cfg.layout}: give --layout "
                         f"{old.cfg.layout} to train it on (only a 2d one can change, to post)")
    tokenizer = Tokenizer(replace(cfg, fingerprint="", **changed))
    tokenizer.load_state_dict(old.state_dict(), strict=False)  # the layout post has more
    if args.layout == "post":
        for module in (tokenizer.encoder, tokenizer.visual_quantizer, tokenizer.decoder):
            module.requires_grad_(False)
    return tokenizer


@torch.no_grad()
def update_ema(ema, model, half_life):
    """ema <- model, so that after `half_life` steps half of what was there is left."""
    weight = 1 - 0.5 ** (1 / half_life)
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), weight)


# Data and held-out measures


def training_view(images, visit, size, args):
    """The crop that a visit sees, mirrored half of the time with --flip: uint8 (size, size, 3).
    Depends on (seed, visit) only."""
    (index,) = visited_images(args.seed, visit, 1, len(images))
    rng = random.Random(f"{args.seed} {visit}")
    image = images.open(index)
    view = random_crop(image, size, rng) if args.crop == "random" else center_crop(image, size)
    return view[:, ::-1] if args.flip and rng.random() < 0.5 else view


@torch.no_grad()
def evaluate(picture, tokenizer, ar, images, args, device, autocast):
    """Measures of --eval_images held-out images: PSNR in dB, for both codebooks how many codes are
    used and their perplexity, and with an AR model AR.measure. The first go to the file `picture`,
    above their reconstructions."""
    count = min(args.eval_images, len(images))
    indices = visited_images(0, 0, count, len(images))  # the same at each call, in random order
    batches = torch.tensor(indices).split(64)
    views = load_batches(lambda index: center_crop(images.open(index), tokenizer.cfg.image_size),
                         batches, args.num_workers)
    sums = defaultdict(float)
    all_codes = []
    for chosen, x in zip(batches, views):  # x (B, H, W, 3) uint8
        labels = images.labels[chosen] if args.onestage else torch.zeros(len(x)).long()
        with autocast:
            codes = tokenizer.encode(to_float(x.to(device)))  # (B, K+N)
            y = to_uint8(tokenizer.decode(codes))  # (B, H, W, 3)
            measures = ar.measure(codes, labels.to(device)) if ar is not None else {}
        if not all_codes:
            save_grid(picture, [x[:16], y[:16]])
        measures["psnr"] = psnr(x, y)
        for name, values in measures.items():
            sums[f"val_{name}"] += values.sum().item() / count
        all_codes.append(codes)
    sizes = [tokenizer.cfg.num_prologue, tokenizer.cfg.num_visual]
    for group, codes in zip(("prologue", "visual"), torch.cat(all_codes).split(sizes, 1)):
        if codes.numel() > 0:
            _, uses = codes.unique(return_counts=True)
            sums[f"val_usage_{group}"] = len(uses)
            entropy = torch.special.entr(uses / uses.sum()).sum()
            sums[f"val_perplexity_{group}"] = entropy.exp().item()
    return sums


# The script


def parse_args():
    parser = argparse.ArgumentParser(
        description="Train a tokenizer. Defaults are the tiny demo's, recipes/ has the paper's.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument

    # Data
    flag("--data", default=str(BUNDLED / "train"), help="a folder, zip, or path into a zip")
    flag("--val_data", help="held-out images; else the folder val beside train, else --data")
    flag("--crop", default="center", choices=["center", "random"], help="random is ADM's")
    flag("--flip", action="store_true", help="mirror half of the images")

    # Tokenizer
    flag("--size", default="tiny", choices=SIZES, help="of networks, images and codebooks")
    flag("--layout", default="prologue", choices=LAYOUTS, help="see the class Tokenizer")
    flag("--init", metavar="TOKENIZER", help="file to go on from; its size counts")
    flag("--image_size", type=int, help="side; default of this and the next six: --size")
    flag("--patch_size", type=int, help="side in pixels; each patch is a visual token")
    flag("--codebook_size", type=int, help="visual codes V")
    flag("--code_dim", type=int, help="dimensions of a code")
    flag("--num_prologue", type=int, help="prologue tokens K")
    flag("--prologue_codebook_size", type=int, help="prologue codes P")
    flag("--tau", type=float, help="temperature of Prob-STE")

    # Joint AR model
    flag("--ar_size", default="nano", choices=AR_SIZES, help="of the joint AR model")
    flag("--onestage", action="store_true", help="the AR model is the final one, with classes")
    flag("--direct_ce", action="store_true", help="1d, 2d: CE on the visual tokens (Fig. 5)")
    flag("--ce_weight", type=float, default=3.0, help="lambda: factor of CE's gradient")
    flag("--visual_dropout", type=float, default=0.5, help="share of images whose visual tokens "
         "are hidden from the AR model")

    # Losses
    flag("--perceptual", default="none", choices=["none", "vgg", "convnext"], help="vgg is LPIPS")
    flag("--gan_weight", type=float, default=0.02, help="0 trains without a discriminator")
    flag("--gan_channels", type=int, default=16, help="width of the discriminator")

    # Optimization
    flag("--steps", type=int, default=1600, help="of the whole run; the schedule follows it")
    flag("--batch_size", type=int, default=32, help="images per step, over all ranks together")
    flag("--micro_batch_size", type=int, help="images per forward and rank, to save memory")
    flag("--gradient_checkpointing", action="store_true", help="less memory, more time")
    flag("--lr", type=float, default=5e-4, help="learning rate after the warmup")
    flag("--min_lr", type=float, default=5e-5, help="at the last step, after warmup and hold")
    flag("--warmup", type=int, default=50, help="steps of linear warmup")
    flag("--hold", type=int, default=800, help="steps at --lr, before the linear decay")
    flag("--seed", type=int, default=0, help="of everything random")

    # Machine and files
    flag("--out", default="out", help="folder for everything that is written")
    flag("--resume", action="store_true", help="go on from the state in --out, if there is one")
    flag("--log_every", type=int, default=50, help="steps between lines of the log")
    flag("--eval_every", type=int, default=400, help="steps between held-out measures")
    flag("--eval_images", type=int, default=1000, help="held-out images for the measures")
    flag("--save_every", type=int, default=400, help="steps between saved states")
    flag("--wandb", metavar="PROJECT", help="also log to Weights & Biases")
    flag("--device", default="auto", help="cuda, mps or cpu; auto is the best of them")
    flag("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="auto: bf16 on new GPUs")
    flag("--compile", action="store_true", help="torch.compile the transformer blocks")
    flag("--num_workers", type=int, default=min(8, os.cpu_count()), help="decoding threads a rank")
    args = parser.parse_args()

    if args.layout == "post" and args.init is None:
        parser.error("--layout post needs --init TOKENIZER, a trained 2d one, to add a prologue to")
    if args.direct_ce and args.layout not in ("1d", "2d"):
        parser.error("--direct_ce is for the layouts 1d and 2d")
    if args.onestage and args.layout not in ("prologue", "post"):
        parser.error("--onestage is for the layouts prologue and post")
    if args.layout == "post":
        args.gan_weight = 0.0  # only CE trains it, there is no reconstruction to judge
    return args


def main():
    args = parse_args()
    out = Path(args.out)

    # Device, ranks, and this rank's share of a step, in one or more micro-batches
    rank, world_size, device, autocast = setup(args.device, args.dtype)
    cuda = device.type == "cuda"  # where copies are asynchronous
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA, but where exact_fp32 forbids it
    torch.backends.cudnn.benchmark = True
    per_rank = args.batch_size // world_size
    micro = args.micro_batch_size or per_rank
    if args.batch_size % world_size or per_rank % micro or micro < 2:
        raise SystemExit(f"--batch_size {args.batch_size} does not divide into {world_size} ranks "
                         f"with micro-batches of {micro}, which should have 2 images or more")
    share = micro / per_rank

    # Data
    if out.resolve().is_relative_to(Path(args.data).resolve()):
        raise SystemExit(f"--out {out} lies in --data {args.data}: its pictures would be taken too")
    images = Images(args.data)
    val_data = args.val_data or default_val(args.data)
    val_images = Images(val_data or args.data)
    if args.onestage and val_images.classes != images.classes:
        raise SystemExit(f"--onestage: {val_images} has other classes than {images}")

    # Models, equal on all ranks
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer(args).to(device)
    ar = None
    if tokenizer.cfg.num_prologue > 0 or args.direct_ce:
        classes = images.classes if args.onestage else []  # without classes: unconditional
        ar = AR(ARConfig.for_tokenizer(tokenizer.cfg, num_classes=len(classes), classes=classes,
                                       **AR_SIZES[args.ar_size])).to(device)
    ema = copy.deepcopy(tokenizer).eval().requires_grad_(False)
    final = tokenizer if args.onestage else ema  # the weights that are used afterwards
    memory = dict(memory_format=torch.channels_last) if cuda else {}
    perceptual_loss = Perceptual(args.perceptual).to(device, **memory)
    discriminator = Discriminator(args.gan_channels).to(device, **memory)
    stage1 = Stage1(tokenizer, ar, args.ce_weight, args.direct_ce)

    # Optimizers. beta1 is 0 for the two players of the GAN: momentum would push a player on
    # against an opponent that has moved meanwhile.
    groups = [dict(params=tokenizer.parameters(), betas=(0.0, 0.99), weight_decay=0.0)]
    if ar is not None:
        groups += ar.parameter_groups(weight_decay=0.03, betas=(0.9, 0.99))
    optimizers = [torch.optim.AdamW(groups, lr=args.lr, fused=True),
                  torch.optim.AdamW(discriminator.parameters(), lr=args.lr, fused=True,
                                    betas=(0.0, 0.99), weight_decay=1e-4)]

    # Resume, on the same type of device, which decides the memory layout of Adam's moments
    parts = [stage1, ema, discriminator, *optimizers]
    log = out / "train_stage1.jsonl"
    fixed = dict(asdict(tokenizer.cfg), images=images.digest(), crop=args.crop, flip=args.flip,
                 batch_size=args.batch_size, seed=args.seed, device=device.type)
    state = load_state(out / "train_stage1.pt", fixed, args.resume)
    start_step = 0
    log_size = 0
    if state is not None:
        for part, saved in zip(parts, state.pop("parts")):
            part.load_state_dict(saved)
        start_step = state["step"]
        log_size = state["log_size"]
    if rank == 0:
        size = sum(p.numel() for p in tokenizer.parameters()) / 1e6
        print(f"training on {images}")
        print(f"measuring {val_images}{'' if val_data else ', none are held out'}")
        print(f"{size:.1f}M parameters, from step {start_step + 1}", flush=True)

    # Compilation and ranks; the only buffers, RoPE tables, never change
    for module in stage1.modules():
        if isinstance(module, Transformer):
            module.gradient_checkpointing = args.gradient_checkpointing
    if args.compile:
        compile_blocks(stage1)
    model = DistributedDataParallel(stage1, broadcast_buffers=False) if world_size > 1 else stage1

    # Batches of visits, one for each micro-batch, that a loader reads ahead of the loop
    steps = range(start_step + 1, args.steps + 1)
    firsts = ((step - 1) * args.batch_size + rank * per_rank + i
              for step in steps for i in range(0, per_rank, micro))
    batches = (range(first, first + micro) for first in firsts)
    load = functools.partial(training_view, images, size=tokenizer.cfg.image_size, args=args)
    loader = load_batches(load, batches, args.num_workers)

    # The loop
    stage1.train()
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
        unlabelled = torch.rand(args.batch_size, generator=generator)[of_rank] < CLASS_DROPOUT
        labels = torch.zeros(per_rank, dtype=torch.int64)  # a joint AR model knows no classes
        if args.onestage:
            first = (step - 1) * args.batch_size + rank * per_rank
            labels = images.labels[visited_images(args.seed, first, per_rank, len(images))]
            labels = labels.masked_fill(unlabelled, len(images.classes))
        labels = labels.to(device, non_blocking=cuda)
        drop = drop.to(device, non_blocking=cuda)

        terms = defaultdict(float)  # of the loss, for the log
        for i in range(0, per_rank, micro):
            # A micro-batch of images
            x = next(loader)  # (B, H, W, 3) uint8
            if cuda:
                x = x.pin_memory()  # a large copy is asynchronous from pinned memory only
            x = to_float(x.to(device, non_blocking=cuda))  # (B, 3, H, W)
            model.require_backward_grad_sync = i + micro == per_rank  # of DDP: once per step

            # Tokenizer and joint AR model
            with autocast:
                y, vq, ce = model(x, labels[i : i + micro], drop[i : i + micro])
            l1 = perceptual = gan = torch.zeros((), device=device)
            if y is not None:
                l1 = F.l1_loss(y, x)
                perceptual = perceptual_loss(y, x)
            if args.gan_weight > 0:
                discriminator.requires_grad_(False)  # this gradient is for the tokenizer alone
                with autocast:
                    gan = F.softplus(-discriminator.net(y).float()).mean()
                discriminator.requires_grad_(True)
            loss = l1 + vq + perceptual + args.gan_weight * gan + ce
            (loss * share).backward()
            losses = dict(l1=l1, vq=vq, perceptual=perceptual, gan=gan, ce=ce)

            # Discriminator, on the same images and reconstructions
            if args.gan_weight > 0:
                with_r1 = step % R1_EVERY == 0  # differentiates twice: not in bf16
                with contextlib.nullcontext() if with_r1 else autocast:
                    loss, more = discriminator_loss(discriminator, x, y, with_r1, share)
                (loss * share).backward()
                losses |= more
            for name, value in losses.items():
                terms[name] += value.detach() * share

        # Step and EMA
        if world_size > 1 and args.gan_weight > 0:
            for p in discriminator.parameters():
                dist.all_reduce(p.grad)
                p.grad /= world_size
        for optimizer in optimizers:
            optimizer.step()
        update_ema(ema, tokenizer, min(EMA_HALF_LIFE, 0.1 * step))

        # Log
        if step % args.log_every == 0 or step == args.steps:
            terms["grad_norm"] = nn.utils.clip_grad_norm_(stage1.parameters(), torch.inf)
            seconds = (time.perf_counter() - clock) / (step - start_step)
            entry = log_entry(step, lr, terms, seconds, args)
            if rank == 0:
                log_size = report(entry, log, log_size, args)

        # Held-out measures and pictures
        if (step % args.eval_every == 0 or step == args.steps) and rank == 0:
            with torch.compiler.set_stance("force_eager"):  # these shapes would recompile
                measures = evaluate(out / "train_stage1.png", final, ar, val_images, args, device,
                                    autocast)
                log_size = report({"step": step} | measures, log, log_size, args)

        # Save, after the measures: a run that is killed while measuring goes on from before them
        if (step % args.save_every == 0 or step == args.steps) and rank == 0:
            check_finite(f"step {step}", dict(nn.ModuleList(parts[:3]).named_parameters()))
            final.save(out / "tokenizer.safetensors")
            if ar is not None:
                ar.cfg.tokenizer = final.cfg.fingerprint if args.onestage else ""
                ar.save(out / ("ar.safetensors" if args.onestage else "joint_ar.safetensors"))
            state = dict(step=step, log_size=log_size, fixed=fixed,
                         parts=[part.state_dict() for part in parts])
            with writing(out / "train_stage1.pt") as temporary:
                torch.save(state, temporary)

    finish()


if __name__ == "__main__":
    main()
