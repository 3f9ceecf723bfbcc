"""Stage 1: train the tokenizer and, beside it, the small AR model that shapes the prologue tokens.

    python train_stage1.py                              # tiny, bundled data, minutes on a CPU
    python train_stage1.py --layout 2d --out out_2d     # the baseline without a prologue
    python train_stage1.py --layout post --init out_2d/tokenizer.safetensors --out out_post
    python train_stage1.py --onestage --ar_size tiny --out out_onestage     # no stage 2 after this
    torchrun --nproc_per_node 8 train_stage1.py --size B ...          # see recipes/prologue_b.sh

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
raw one that it grew up with.
"""

import argparse
import copy
import functools
import inspect
import json
import math
import os
import random
import shutil
import signal
import time
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ar import AR, ARConfig, check_pair
from ar import SIZES as AR_SIZES
from pretokenize import (BUNDLED, Images, center_crop, default_val, load_batches, no_crop,
                         random_crop, save_grid)
from tokenizer import (LAYOUTS, SIZES, HelpFormatter, InputError, Tokenizer, TokenizerConfig,
                       Transformer, attention_backend, real, to_float, to_uint8, whole, writing)

# Models and losses


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
        # The value stays, the gradient is multiplied by lambda.
        onehot = onehot + (self.ce_weight - 1) * (onehot - onehot.detach())
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
            layers.append(nn.Conv2d(width, out, 4, stride, padding=1, bias=False))
            layers.append(nn.BatchNorm2d(out))
            layers.append(nn.LeakyReLU(0.2))
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
        logits_real = self.net(real_images)  # (B, 1, h, w)
        logits_fake = self.net(fake_images.detach())
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


class LPIPS(nn.Module):
    """LPIPS on VGG16 with the linear weights of the package lpips: images and target (B, 3, H, W)
    in [-1, 1] -> scalar. The root is guarded: black images have features that are zero everywhere,
    for which the package's own formula gives NaN gradients."""

    def __init__(self):
        super().__init__()
        import lpips
        import torchvision

        self.vgg = pretrained(torchvision.models.vgg16).features[:30]
        linear = Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth"
        weights = torch.load(linear, weights_only=True, map_location="cpu")
        self.linear = nn.ParameterList(weights.values())  # five of (1, channels, 1, 1)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])

    def features(self, images):
        """The features behind five of VGG's layers, of unit norm along the channels."""
        x = (images - self.shift) / self.scale
        features = []
        for i, layer in enumerate(self.vgg):
            x = layer(x)
            if i in (3, 8, 15, 22, 29):  # relu1_2, 2_2, 3_3, 4_3, 5_3
                norm = (x.square().sum(1, keepdim=True) + 1e-8).sqrt()
                features.append(x / norm)
        return features

    def forward(self, images, target):
        with torch.no_grad():
            target_features = self.features(target)
        loss = 0.0
        for weight, a, b in zip(self.linear, self.features(images), target_features):
            loss = loss + (weight * (a - b).square()).sum(1).mean()
        return loss


class ConvNextLoss(nn.Module):
    """Mean squared difference of the 1,000 logits that ConvNeXt-S gives both images at 224 x 224:
    images and target (B, 3, H, W) in [-1, 1] -> scalar."""

    def __init__(self):
        super().__init__()
        import torchvision

        self.net = pretrained(torchvision.models.convnext_small)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])

    def logits(self, images):
        x = F.interpolate(images / 2 + 0.5, (224, 224), mode="bilinear", antialias=True)
        return self.net((x - self.mean) / self.std)

    def forward(self, images, target):
        with torch.no_grad():
            target_logits = self.logits(target)
        return F.mse_loss(self.logits(images), target_logits)


class Perceptual(nn.Module):
    """The perceptual loss by name: none, vgg, convnext, or both = vgg + 0.1 * convnext."""

    def __init__(self, name):
        super().__init__()
        self.vgg = LPIPS() if name in ("vgg", "both") else None
        self.convnext = ConvNextLoss() if name in ("convnext", "both") else None
        self.convnext_weight = 0.1 if name == "both" else 1.0
        self.eval().requires_grad_(False)

    def forward(self, images, target):
        loss = images.new_zeros(())
        if self.vgg is not None:
            loss = loss + self.vgg(images, target)
        if self.convnext is not None:
            loss = loss + self.convnext_weight * self.convnext(images, target)
        return loss


def pretrained(build):
    """A torchvision network with ImageNet weights, which torch keeps in its hub folder."""
    import torchvision

    weights = torchvision.models.get_model_weights(build).IMAGENET1K_V1
    try:
        return build(weights=weights)
    except Exception as error:  # of urllib, of a full disk, of a file cut off
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise InputError(f"{weights.url} cannot be loaded ({error}); put the file into {folder}, "
                         "or train with --perceptual none") from None


def build_tokenizer(args):
    """A new tokenizer, or one that starts from the weights of --init. The layout post adds a
    prologue to a 2d one; encoder, visual quantizer and decoder are then frozen. Raises InputError
    where --init does not fit the other flags."""
    flags = {name: getattr(args, name) for name in MODEL_FLAGS}
    changed = {name: value for name, value in flags.items() if value is not None}
    cfg = TokenizerConfig(**SIZES[args.size], layout=args.layout)
    if args.init is None:
        return Tokenizer(replace(cfg, **changed))

    old = Tokenizer.load(args.init)
    may_change = {"tau"}
    if args.layout == "post" and old.cfg.layout == "2d":
        may_change = {"tau", "num_prologue", "prologue_codebook_size"}
        cfg = replace(old.cfg, layout="post", post=cfg.post, tau=cfg.tau,
                      num_prologue=cfg.num_prologue,
                      prologue_codebook_size=cfg.prologue_codebook_size)
    elif args.layout == old.cfg.layout:
        cfg = old.cfg
    else:
        raise InputError(f"--init {args.init} has layout {old.cfg.layout}: give --layout "
                         f"{old.cfg.layout} to train it on (only a 2d one can change, to post)")
    for name, value in changed.items():
        if name not in may_change and value != getattr(cfg, name):
            raise InputError(f"--{name} {value}: --init {args.init} has {getattr(cfg, name)}, "
                             "which stays")
    tokenizer = Tokenizer(replace(cfg, **changed))
    for name, module in old.named_children():
        getattr(tokenizer, name).load_state_dict(module.state_dict())
    if args.layout == "post":
        for module in (tokenizer.encoder, tokenizer.visual_quantizer, tokenizer.decoder):
            module.requires_grad_(False)
    return tokenizer


def build_models(args, classes):
    """Tokenizer and joint AR model, equal on all ranks; the latter None if no CE is used."""
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer(args)
    if tokenizer.cfg.num_prologue == 0 and not args.direct_ce:
        return tokenizer, None
    if not args.onestage:
        classes = []  # the joint AR model is unconditional
    size = AR_SIZES[args.ar_size]
    if args.init_ar is not None:
        old = AR.load(args.init_ar)
        check_pair(tokenizer, old, names=("the tokenizer", args.init_ar))
        if old.cfg.num_classes != len(classes):
            raise InputError(f"--init_ar {args.init_ar} knows {old.cfg.num_classes} classes, this "
                             f"run has {len(classes)} (none without --onestage)")
        if old.cfg.classes not in ([], classes):
            raise InputError(f"--init_ar {args.init_ar} was trained on the classes "
                             f"{old.cfg.classes[:3]}..., {args.data} has {classes[:3]}...")
        size = dict(layers=old.cfg.layers, dim=old.cfg.dim, head_dim=old.cfg.head_dim)
    ar_cfg = ARConfig.for_tokenizer(tokenizer.cfg, num_classes=len(classes), classes=classes,
                                    **size)
    ar = AR(ar_cfg)
    if args.init_ar is not None:
        ar.load_state_dict(old.state_dict())
    return tokenizer, ar


# Optimization


def adamw_groups(module, betas, weight_decay):
    """AdamW's parameter groups of a module: weight decay falls on matrices only."""
    trained = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim < 2]
    return [dict(params=matrices, betas=betas, weight_decay=weight_decay),
            dict(params=vectors, betas=betas, weight_decay=0.0)]


def learning_rate(step, args):
    """The learning rate at a step, which is counted from 1: linear warmup, --hold steps at --lr,
    then linear decay to --min_lr over the steps that are left, if any are."""
    if step <= args.warmup:
        return args.lr * step / args.warmup
    decay_steps = max(1, args.steps - args.warmup - args.hold)
    done = (step - args.warmup - args.hold) / decay_steps
    return args.lr + (args.min_lr - args.lr) * min(1, max(0, done))


@torch.no_grad()
def update_ema(ema, model, half_life):
    """ema <- model, so that after `half_life` steps half of what was there is left."""
    weight = 1 - 0.5 ** (1 / half_life)
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), weight)


# Data


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, count):
    return np.random.default_rng((seed, epoch)).permutation(count)


def visited_image(seed, visit, count):
    """Index of the image at a visit. Visits number the images that training reads, from 0, over all
    epochs and ranks; each epoch is a new random order of all `count` images. An image depends on
    (seed, visit) only, so a run may be resumed on another number of ranks."""
    return int(epoch_order(seed, visit // count, count)[visit % count])


def training_view(images, visit, size, args):
    """The crop that a visit sees, mirrored half of the time with --flip: uint8 (3, size, size).
    Depends on (seed, visit) only."""
    index = visited_image(args.seed, visit, len(images))
    rng = random.Random(f"{args.seed} {visit}")
    image = images.open(index)
    if args.crop == "random":
        view = random_crop(image, size, rng)
    elif args.crop == "center":
        view = center_crop(image, size)
    else:
        view = no_crop(image, size, images.names[index])
    if args.flip and rng.random() < 0.5:
        view = view[:, ::-1]
    return np.ascontiguousarray(view.transpose(2, 0, 1))


def held_out_view(images, index, size, args):
    """The image without anything random: uint8 (3, size, size)."""
    image = images.open(index)
    if args.crop == "none":
        view = no_crop(image, size, images.names[index])
    else:
        view = center_crop(image, size)
    return view.transpose(2, 0, 1)


# Held-out measures


@torch.no_grad()
def evaluate(tokenizer, ar, images, args, device, autocast, rank, world_size):
    """Measures of --eval_images held-out images, of which each rank takes a share: a dict with
    PSNR in dB, L1, and for both codebooks how many codes are used and their perplexity; with an AR
    model also nats per image and top-1 accuracy of each token group."""
    cfg = tokenizer.cfg
    count = min(args.eval_images, len(images))
    indices = [i * len(images) // count for i in range(rank, count, world_size)]  # of all classes
    batches = [indices[i : i + 64] for i in range(0, len(indices), 64)]
    load = functools.partial(held_out_view, images, size=cfg.image_size, args=args)
    sums = defaultdict(float)
    for batch, batch_indices in zip(load_batches(load, batches, args.num_workers), batches):
        x = to_float(batch.to(device))  # (B, 3, H, W)
        with autocast:
            codes = tokenizer.encode(x)  # (B, K+N)
            y = tokenizer.decode(codes)
        levels_x = to_uint8(x).float()
        levels_y = to_uint8(y).float()
        mse = (levels_x - levels_y).square().mean((1, 2, 3))  # (B,)
        sums["psnr"] += (10 * (255**2 / mse.clamp_min(1e-10)).log10()).sum().item()
        sums["l1"] += (x - y).abs().mean((1, 2, 3)).sum().item()
        if ar is not None:
            labels = images.labels[batch_indices] if args.onestage else torch.zeros(len(x)).long()
            with autocast:
                measures = ar.measure(codes, labels.to(device))
            for name, values in measures.items():
                sums[name] += values.sum().item()
        prologue, visual = codes.cpu().split([cfg.num_prologue, cfg.num_visual], 1)
        sums["visual"] += torch.bincount(visual.flatten(), minlength=cfg.codebook_size)
        if cfg.num_prologue > 0:
            size = cfg.prologue_codebook_size
            sums["prologue"] += torch.bincount(prologue.flatten(), minlength=size)

    if world_size > 1:
        of_each_rank = [None] * world_size
        dist.all_gather_object(of_each_rank, sums)
        sums = defaultdict(float)
        for part in of_each_rank:
            for name, value in part.items():
                sums[name] += value

    result = {}
    for name, value in sums.items():
        if name in ("prologue", "visual"):  # how often each code occurs
            share = value.double() / value.sum()
            result[f"val_usage_{name}"] = int((value > 0).sum())
            result[f"val_perplexity_{name}"] = torch.special.entr(share).sum().exp().item()
        else:
            result[f"val_{name}"] = value / count
    return result


@torch.no_grad()
def save_pictures(path, tokenizer, images, args, device, autocast):
    """16 held-out images, each row above the row of its reconstructions."""
    indices = [i * len(images) // 16 for i in range(16)]
    views = [held_out_view(images, i, tokenizer.cfg.image_size, args) for i in indices]
    x = to_float(torch.from_numpy(np.stack(views)).to(device))
    with autocast:
        y = tokenizer.decode(tokenizer.encode(x))
    x = to_uint8(x)
    y = to_uint8(y)
    save_grid(path, [x[:8], y[:8], x[8:], y[8:]])


# State and log


def save_state(path, step, fixed, args, modules, optimizers):
    """Writes all that `load_state` needs. Raises InputError, and leaves the state that is there,
    if weights are not finite."""
    for name, module in modules.items():
        if not all(p.isfinite().all() for p in module.parameters()):
            raise InputError(f"step {step}: the weights of {name} are not finite, nothing is saved")
    state = {"step": step, "fixed": fixed, "args": args}
    for name, part in (modules | optimizers).items():
        state[name] = part.state_dict()
    with writing(path) as temporary:
        torch.save(state, temporary)


def load_state(path, fixed, args, parts, rank, world_size):
    """Loads the state at `path` into parts {name: module or optimizer} and returns its step, or 0
    if there is none. Raises InputError if it belongs to another run: `fixed` must be equal, other
    flags may have changed and are named."""
    found = torch.tensor([float(path.exists())])
    if world_size > 1:
        dist.all_reduce(found)
    if found == 0:
        if rank == 0:
            print(f"--resume: there is no {path}, so this run begins at step 1")
        return 0
    if found < world_size:
        raise InputError(f"not all ranks see {path}: --out must be on a disk that they share")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        for name, value in fixed.items():
            if state["fixed"].get(name) != value:
                raise InputError(f"--resume: {path} was made with {name} "
                                 f"{state['fixed'].get(name)}, this run has {value}")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        step = state["step"]
        args_before = state["args"]
    except Exception as error:  # of pickle, zipfile or torch; InputError is none, and passes
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{path} cannot be loaded: {reason}; without --resume the run "
                         "begins anew") from None
    if rank == 0:
        print(f"going on from step {step}")
        for name, value in args.items():
            if name in args_before and args_before[name] != value and name != "resume":
                print(f"note: --{name} was {args_before[name]} and is now {value}")
    return step


def start_log(path, step):
    """Truncates an earlier log to its complete lines up to `step`, the step to go on from."""
    kept = []
    if step > 0 and path.exists():
        for line in path.read_text(errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # cut off by a kill
    with writing(path) as temporary:
        temporary.write_text("".join(kept))


def start_wandb(args, job):
    """A run at Weights & Biases. A run that is resumed is a new one of the same name there."""
    try:
        import wandb
    except ImportError:
        raise InputError("--wandb needs the package wandb: pip install wandb") from None
    return wandb.init(project=args.wandb, name=f"{args.out} {job}", config=vars(args))


def write_log(path, entry, wandb_run):
    """Adds a line to the log, and to the run at Weights & Biases if there is one."""
    if wandb_run is not None:
        wandb_run.log(entry, step=entry["step"])
    try:
        with open(path, "a") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None


def as_text(entry):
    """{"step": 50, "l1": 0.12345} -> "step 50  l1 0.1235" """
    words = []
    for name, value in entry.items():
        words.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return "  ".join(words)


# The script

CLASS_DROPOUT = 0.1  # share of images that --onestage trains without their class

# Entries of the log that are also printed
SHOWN = ("step", "l1", "vq", "perceptual", "gan", "ce", "discriminator", "images_per_s")

# Flags of the tokenizer that default to those of --size or --init
MODEL_FLAGS = ("image_size", "patch_size", "codebook_size", "code_dim", "num_prologue",
               "prologue_codebook_size", "tau")


def parse_args():
    parser = argparse.ArgumentParser(
        description="Train a tokenizer. Defaults are the tiny demo's, recipes/ has the paper's.",
        formatter_class=HelpFormatter)
    flag = parser.add_argument

    # Data
    flag("--data", default=str(BUNDLED / "train"),
         help="training images: a folder, zip, or path into a zip, with a folder for each class")
    flag("--val_data",
         help="held-out images; by default the folder val beside a --data named train, else --data")
    flag("--crop", default="center", choices=["none", "center", "random"],
         help="random is ADM's; none wants images that have the size")
    flag("--flip", action="store_true", help="mirror half of the images")

    # Tokenizer
    flag("--size", default="tiny", choices=SIZES,
         help="of the networks, images, patches and codebooks, see tokenizer.py")
    flag("--layout", default="prologue", choices=LAYOUTS, help="see the class Tokenizer")
    flag("--init", metavar="TOKENIZER",
         help="tokenizer file to go on from, whose size counts; the layout post adds a prologue to "
         "a trained 2d one")
    flag("--image_size", type=whole(1),
         help="side of the square in pixels; like the next five by default of --size or --init")
    flag("--patch_size", type=whole(1), help="side in pixels; each patch is a visual token")
    flag("--codebook_size", type=whole(2), help="visual codes V")
    flag("--code_dim", type=whole(1), help="dimensions of a code")
    flag("--num_prologue", type=whole(1), help="prologue tokens K")
    flag("--prologue_codebook_size", type=whole(2), help="prologue codes P")
    flag("--tau", type=real(1e-3), help="temperature of Prob-STE, by default 0.1 or that of --init")

    # Joint AR model
    flag("--ar_size", default="nano", choices=AR_SIZES, help="of the joint AR model")
    flag("--init_ar", metavar="AR",
         help="AR file whose weights the joint AR model starts from; its size counts")
    flag("--onestage", action="store_true",
         help="the AR model is the final one: it sees the classes, there is no stage 2")
    flag("--no_classes", action="store_true",
         help="with --onestage: an unconditional model, all images count as one class")
    flag("--direct_ce", action="store_true",
         help="layouts 1d and 2d: cross-entropy on the visual tokens themselves (Fig. 5, there "
         "with --tau 1)")
    flag("--ce_weight", type=real(0), default=3.0,
         help="lambda: factor of CE's gradient into the tokenizer")
    flag("--visual_dropout", type=real(0, 1), default=0.5,
         help="share of images whose visual tokens are hidden from the AR model; not with "
         "--direct_ce")

    # Losses
    flag("--perceptual", default="none", choices=["none", "vgg", "convnext", "both"],
         help="vgg is LPIPS; both is vgg + 0.1 convnext")
    flag("--gan_weight", type=real(0), default=0.02, help="0 trains without a discriminator")
    flag("--gan_channels", type=whole(1), default=16, help="width of the discriminator")
    flag("--lecam_weight", type=real(0), default=0.001, help="of the discriminator's LeCam term")
    flag("--r1_weight", type=real(0), default=0.01, help="of the discriminator's R1 penalty")
    flag("--r1_every", type=whole(1), default=25, help="steps between R1 penalties")

    # Optimization
    flag("--steps", type=whole(1), default=1600,
         help="of the whole run; the learning rate follows it")
    flag("--batch_size", type=whole(1), default=32, help="images per step, over all ranks together")
    flag("--micro_batch_size", type=whole(1),
         help="images per forward and rank, to save memory; by default all of a rank")
    flag("--gradient_checkpointing", action="store_true",
         help="less memory: blocks run once more in the backward")
    flag("--lr", type=real(0), default=5e-4, help="learning rate after the warmup")
    flag("--min_lr", type=real(0), default=5e-5, help="learning rate at the last step")
    flag("--warmup", type=whole(0), default=50, help="steps of linear warmup")
    flag("--hold", type=whole(0), default=800,
         help="steps at --lr, then linear decay over what is left of --steps")
    flag("--ema_half_life", type=real(1e-3), default=1000,
         help="steps; at most a tenth of the steps so far")
    flag("--seed", type=whole(0), default=0, help="of everything random")

    # Machine and files
    flag("--out", default="out", help="folder for everything that is written")
    flag("--resume", action="store_true", help="go on from the state in --out, if there is one")
    flag("--log_every", type=whole(1), default=50, help="steps between lines of the log")
    flag("--wandb", metavar="PROJECT",
         help="also send the log to this project at Weights & Biases (pip install wandb)")
    flag("--eval_every", type=whole(1), default=400,
         help="steps between held-out measures and pictures")
    flag("--eval_images", type=whole(1), default=1000, help="held-out images for the measures")
    flag("--save_every", type=whole(1), default=400, help="steps between saved states")
    flag("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"],
         help="auto is what torch finds")
    flag("--dtype", default="auto", choices=["auto", "fp32", "bf16"],
         help="auto is bf16 on GPUs that have it (Ampere and later), else fp32")
    flag("--compile", action="store_true", help="torch.compile the transformer blocks")
    flag("--num_workers", type=whole(0), default=min(8, os.cpu_count()),
         help="threads that decode images, per rank")
    args = parser.parse_args()

    if args.layout == "post" and args.init is None:
        parser.error("--layout post needs --init TOKENIZER, the trained 2d tokenizer that it adds "
                     "a prologue to")
    if args.direct_ce and args.layout not in ("1d", "2d"):
        parser.error("--direct_ce is for the layouts 1d and 2d")
    if args.onestage and args.layout not in ("prologue", "post"):
        parser.error("--onestage is for the layouts prologue and post")
    if args.no_classes and not args.onestage:
        parser.error("--no_classes goes with --onestage; else the joint AR model knows no classes")
    if args.init_ar and args.layout in ("1d", "2d") and not args.direct_ce:
        parser.error("--init_ar: the layouts 1d and 2d have an AR model only with --direct_ce")
    if args.layout == "post":
        args.perceptual = "none"  # only CE trains it, there is no reconstruction to judge
        args.gan_weight = 0.0
    return args


def main():
    args = parse_args()
    out = Path(args.out)

    # Device and ranks: torchrun sets these variables, without it one process does everything
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    available = "cpu"
    if torch.accelerator.is_available():
        available = torch.accelerator.current_accelerator().type  # cuda, or mps on a Mac
    if args.device not in ("auto", "cpu", available):
        raise InputError(f"--device {args.device}: torch finds only {available} here")
    device = torch.device(available if args.device == "auto" else args.device)
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32; exact_fp32 turns it off where it counts
        torch.backends.cudnn.benchmark = True
    if args.dtype == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = "bf16" if has_bf16 else "fp32"
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    autocast = torch.autocast(device.type, dtype, enabled=args.dtype == "bf16")
    if args.compile and device.type == "cpu" and not shutil.which("g++"):
        raise InputError("--compile needs the compiler g++ on a CPU, and there is none here")
    if world_size > 1:
        # Losses and gradients travel by nccl between GPUs, what stands on the CPU by gloo.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if rank == 0:
        backend = attention_backend(device, dtype)
        print(f"{world_size} x {device.type}, {args.dtype}, attention by {backend}", flush=True)

    # Batch: each rank takes its share of the global one, in one or more micro-batches
    per_rank = args.batch_size // world_size
    micro = args.micro_batch_size or per_rank
    if args.batch_size % world_size or per_rank % micro:
        raise InputError(f"--batch_size {args.batch_size} does not divide into {world_size} ranks "
                         f"with micro-batches of {micro}")

    # Data
    images = Images(args.data)
    val_data = args.val_data or default_val(args.data) or args.data
    val_images = Images(val_data)
    if val_data == args.data and rank == 0:
        print(f"no held-out images (--val_data): what is measured is measured on {args.data}")
    if args.batch_size > len(images) and rank == 0:
        print(f"note: a batch holds some of the {len(images)} images more than once")
    if args.no_classes:
        images.drop_classes()
        val_images.drop_classes()
    if args.onestage and val_images.classes != images.classes:
        raise InputError(f"--onestage: {val_data} has other classes than {args.data}")

    # Models
    tokenizer, ar = build_models(args, images.classes)
    tokenizer.to(device)
    if ar is not None:
        ar.to(device)
    size = tokenizer.cfg.image_size
    ema = copy.deepcopy(tokenizer).eval().requires_grad_(False)
    final = tokenizer if args.onestage else ema  # the weights that are used afterwards
    perceptual_loss = Perceptual(args.perceptual).to(device)
    discriminator = None
    if args.gan_weight > 0:
        if micro < 2 or size < 24:
            raise InputError("the discriminator needs 2 images of 24 pixels or more per forward, "
                             f"this run has {micro} of {size}; train without it by --gan_weight 0")
        discriminator = Discriminator(args.gan_channels).to(device)
    if rank == 0:
        parameters = sum(p.numel() for p in tokenizer.parameters()) / 1e6
        print(f"{args.layout}: {parameters:.1f}M parameters, {len(images)} images of "
              f"{len(images.classes)} classes", flush=True)

    # Optimizers. beta1 is 0 for the two players of the GAN: momentum would push a player on
    # against an opponent that has moved meanwhile.
    groups = adamw_groups(tokenizer, betas=(0.0, 0.99), weight_decay=0.0)
    if ar is not None:
        groups += adamw_groups(ar, betas=(0.9, 0.99), weight_decay=0.03)
    optimizers = {"optimizer": torch.optim.AdamW(groups, lr=args.lr, fused=True)}
    if discriminator is not None:
        adamw = torch.optim.AdamW(discriminator.parameters(), lr=args.lr, fused=True,
                                  betas=(0.0, 0.99), weight_decay=1e-4)
        optimizers["discriminator_optimizer"] = adamw

    # Resume
    modules = {"tokenizer": tokenizer, "ema": ema}
    if ar is not None:
        modules["ar"] = ar
    if discriminator is not None:
        modules["discriminator"] = discriminator
    fixed = dict(  # must not change on --resume
        tokenizer=asdict(tokenizer.cfg),
        ar=None if ar is None else asdict(ar.cfg),
        gan_channels=None if discriminator is None else args.gan_channels,
        direct_ce=args.direct_ce,
        images=images.digest(),
        crop=args.crop,
        flip=args.flip,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    start_step = 0
    if rank == 0 and not args.resume and (out / "train_stage1.pt").exists():
        print(f"note: this replaces the run in {out}; --resume goes on with it")
    if args.resume:
        start_step = load_state(out / "train_stage1.pt", fixed, vars(args), modules | optimizers,
                                rank, world_size)

    # Compilation and ranks. Block by block, so that equal blocks are compiled once.
    stage1 = Stage1(tokenizer, ar, args.ce_weight, args.direct_ce)
    for module in stage1.modules():
        if isinstance(module, Transformer):
            module.gradient_checkpointing = args.gradient_checkpointing
            if args.compile:
                for block in module.blocks:
                    block.compile(dynamic=False)
    model = stage1
    discriminator_model = discriminator
    if world_size > 1:
        # A broadcast of buffers would modify BatchNorm statistics that a backward still needs.
        # Newer torch has another name for it and warns of the old one.
        names = inspect.signature(DistributedDataParallel).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        model = DistributedDataParallel(stage1, **{sync: False})
        if discriminator is not None:
            discriminator_model = DistributedDataParallel(discriminator, **{sync: False})

    # Batches: the visit numbers of this rank in a step, a list for each micro-batch, and a loader
    # that runs ahead of the loop
    def visits_of_step(step):
        first = (step - 1) * args.batch_size + rank * per_rank
        return [range(i, i + micro) for i in range(first, first + per_rank, micro)]

    steps = range(start_step + 1, args.steps + 1)
    all_visits = (visits for step in steps for visits in visits_of_step(step))
    load = functools.partial(training_view, images, size=size, args=args)
    loader = load_batches(load, all_visits, args.num_workers)

    # On SIGTERM or Ctrl-C: finish the step, save, end
    stop = torch.zeros(1)
    signal.signal(signal.SIGTERM, lambda *_: stop.fill_(1))
    signal.signal(signal.SIGINT, lambda *_: stop.fill_(1))

    # The loop
    wandb_run = None
    if rank == 0:
        if args.wandb and start_step < args.steps:
            wandb_run = start_wandb(args, "train_stage1")
        start_log(out / "train_stage1.jsonl", start_step)
    stage1.train()
    zero = torch.zeros((), device=device)
    skipped = torch.zeros((), device=device)  # steps in a row, up to now
    asked_to_stop = torch.zeros(1)
    start = time.perf_counter()
    clock = start
    clock_step = start_step
    for step in steps:
        # Learning rate
        for optimizer in optimizers.values():
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)

        # Random numbers are drawn for the global batch, of which each rank takes its slice
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        of_rank = slice(rank * per_rank, (rank + 1) * per_rank)
        drop = torch.rand(args.batch_size, generator=generator)[of_rank] < args.visual_dropout
        unlabelled = torch.rand(args.batch_size, generator=generator)[of_rank] < CLASS_DROPOUT

        terms = defaultdict(float)  # of the loss, for the log
        for i, visits in enumerate(visits_of_step(step)):
            # A micro-batch of images
            x = next(loader)  # (B, 3, H, W) uint8
            if device.type == "cuda":
                x = x.pin_memory()  # only copies from pinned memory are asynchronous
            x = to_float(x.to(device, non_blocking=device.type == "cuda"))
            of_micro = slice(i * micro, (i + 1) * micro)
            labels = torch.zeros(micro, dtype=torch.int64)  # a joint AR model knows no classes
            if args.onestage:
                labels = images.labels[[visited_image(args.seed, v, len(images)) for v in visits]]
                labels = labels.masked_fill(unlabelled[of_micro], len(images.classes))
            labels = labels.to(device)
            dropped = drop[of_micro].to(device)
            if world_size > 1:  # gradients travel between the ranks once per step
                last_micro = i == per_rank // micro - 1
                model.require_backward_grad_sync = last_micro
                if discriminator is not None:
                    discriminator_model.require_backward_grad_sync = last_micro

            # Forward and losses
            with autocast:
                y, vq, ce = model(x, labels, dropped)
            l1 = zero
            perceptual = zero
            gan_loss = zero
            if y is not None:
                l1 = F.l1_loss(y, x)
                perceptual = perceptual_loss(y, x)
            if discriminator is not None:
                discriminator.requires_grad_(False)  # this gradient is for the tokenizer alone
                with autocast:
                    logits = discriminator.net(y)
                gan_loss = F.softplus(-logits.float()).mean()
                discriminator.requires_grad_(True)
            loss = l1 + vq + perceptual + args.gan_weight * gan_loss + ce

            # Backward
            (loss * micro / per_rank).backward()
            micro_terms = dict(l1=l1, vq=vq, perceptual=perceptual, gan=gan_loss, ce=ce)

            # Discriminator, on the same images and reconstructions
            if discriminator is not None:
                with_r1 = args.r1_weight > 0 and step % args.r1_every == 0
                bf16 = args.dtype == "bf16" and not with_r1  # R1 differentiates twice: not in bf16
                with torch.autocast(device.type, dtype, enabled=bf16):
                    logits_real, logits_fake, r1 = discriminator_model(x, y, with_r1)
                logits_real = logits_real.float()
                logits_fake = logits_fake.float()
                means = torch.stack([logits_real.mean(), logits_fake.mean()]).detach()
                if world_size > 1:
                    dist.all_reduce(means)
                    means = means / world_size
                means = means.where(means.isfinite(), discriminator.averages)
                discriminator.averages.lerp_(means, (1 - 0.999) * micro / per_rank)
                lecam = lecam_penalty(logits_real, logits_fake, discriminator.averages)
                vanilla = F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean()
                discriminator_loss = vanilla + args.lecam_weight * lecam + args.r1_weight / 2 * r1
                (discriminator_loss * micro / per_rank).backward()
                micro_terms |= dict(discriminator=discriminator_loss, lecam=lecam, r1=r1)
                micro_terms |= dict(logits_real=means[0], logits_fake=means[1])
            for name, value in micro_terms.items():
                terms[name] += value.detach() * micro / per_rank

        # Step. If a gradient is not finite (then it is so on all ranks, which have averaged them),
        # found_inf makes fused AdamW skip the update, without a value that the CPU has to wait for.
        finite = torch.ones((), device=device, dtype=torch.bool)
        for name, optimizer in optimizers.items():
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
            norm = torch.nn.utils.get_total_norm(gradients)
            finite &= norm.isfinite()
            optimizer.found_inf = (~norm.isfinite()).float()
            optimizer.step()
            terms[name.replace("optimizer", "grad_norm")] = norm
        skipped = torch.where(finite, zero, skipped + 1)

        # EMA; its half-life is at most a tenth of the steps so far
        update_ema(ema, tokenizer, min(args.ema_half_life, 0.1 * step))

        # All ranks stop at the same step. A copy is reduced: a signal may set `stop` meanwhile.
        asked_to_stop = stop.clone()
        if world_size > 1:
            dist.all_reduce(asked_to_stop, dist.ReduceOp.MAX)
        last = step == args.steps or bool(asked_to_stop)

        # Log
        if step % args.log_every == 0 or last:
            values = torch.stack(list(terms.values()))
            if world_size > 1:
                dist.all_reduce(values)
            means = (values / world_size).tolist()
            seconds = time.perf_counter() - clock
            entry = {"step": step, "images": step * args.batch_size} | dict(zip(terms, means))
            entry["lr"] = learning_rate(step, args)
            entry["images_per_s"] = (step - clock_step) * args.batch_size / seconds
            if rank == 0:
                write_log(out / "train_stage1.jsonl", entry, wandb_run)
                shown = {name: entry[name] for name in SHOWN if name in entry}
                left = (args.steps - step) * args.batch_size / entry["images_per_s"]
                print(f"{as_text(shown)}  {left / 60:.0f} min left", flush=True)
            if skipped >= 10:
                bad = [name for name in terms if not math.isfinite(entry[name])]
                raise InputError(f"{bad[0]} has not been finite for {int(skipped)} steps, which "
                                 "were skipped; try --resume with a lower --lr")
            clock = time.perf_counter()
            clock_step = step

        # The first step compiles, allocates and tunes: later lines leave it out of images_per_s
        if step == start_step + 1:
            if device.type == "cuda":
                torch.cuda.synchronize()
            if rank == 0:
                print(f"first step: {time.perf_counter() - start:.1f} s", flush=True)
            clock = time.perf_counter()
            clock_step = step

        # Held-out measures and pictures; a job that is asked to stop may not have the time for them
        pause = time.perf_counter()
        if (step % args.eval_every == 0 or step == args.steps) and not asked_to_stop:
            with torch.compiler.set_stance("force_eager"):  # other batch sizes than the loop's
                entry = evaluate(final, ar, val_images, args, device, autocast, rank, world_size)
                if rank == 0:
                    write_log(out / "train_stage1.jsonl", {"step": step} | entry, wandb_run)
                    print(f"  held out: {as_text(entry)}", flush=True)
                    picture = out / "train_stage1.png"
                    save_pictures(picture, final, val_images, args, device, autocast)

        # Save, behind the measures: a run that is killed while measuring goes on from before them
        if step % args.save_every == 0 or last:
            if args.onestage:
                ar.cfg.tokenizer = final.fingerprint()
            if rank == 0:
                save_state(out / "train_stage1.pt", step, fixed, vars(args), modules, optimizers)
                final.save(out / "tokenizer.safetensors")
                if ar is not None:
                    ar.save(out / ("ar.safetensors" if args.onestage else "joint_ar.safetensors"))
        clock += time.perf_counter() - pause  # this time does not count in images_per_s

        if last:
            break

    if wandb_run is not None:
        wandb_run.finish()
    if rank == 0 and asked_to_stop:
        print(f"asked to stop: saved after step {step}, go on with --resume")
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
