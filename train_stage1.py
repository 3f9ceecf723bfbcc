"""Stage 1: train the tokenizer and, beside it, the small AR model whose cross-entropy shapes the prologue tokens.

    python train_stage1.py                                       # tiny, embedded data, CPU or GPU, a few minutes
    python train_stage1.py --layout 2d --out out_2d              # the baseline without a prologue
    python train_stage1.py --layout post --init out_2d/tokenizer.safetensors --out out_post   # a prologue for a frozen one
    python train_stage1.py --onestage --ar_size tiny --out out_onestage    # the AR of stage 2 in place of the joint one
    torchrun --nproc_per_node 8 train_stage1.py --size B --data imagenet.zip/ILSVRC/Data/CLS-LOC/train --compile

    loss = L1 + perceptual + gan_weight * GAN_G + vq + lambda * CE      (paper equation 2; lambda reaches the encoder only)

One forward and one backward of encoder, decoder and AR per step, then one of the discriminator. In --out it leaves
tokenizer.safetensors (EMA weights), joint_ar.safetensors, train_stage1.jsonl, train_stage1.png, and train_stage1.pt for
--resume. With --onestage the tokenizer is the raw one, beside the ar.safetensors that grew with it.
"""
import argparse
import contextlib
import copy
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import ar as ar_model
import fid
from common import (InputError, Machine, Progress, Referee, exact_fp32, load_state, lr_at, param_groups, positive, run, save_grid,
                    save_state, step_generator, to_float, to_uint8, training_parser, update_ema, visited)
from pretokenize import EMBEDDED, Images, default_val
from tokenizer import LAYOUTS, SIZES, Tokenizer, TokenizerConfig, Transformer

# Defaults by --size: the paper's for B and L (150 and 200 epochs of ImageNet at batch 256), minutes on two cores for tiny.
RECIPES = {
    "tiny": dict(steps=2000, batch_size=32, lr=5e-4, min_lr=5e-5, warmup=50, hold=1000, ar_size="nano", perceptual="none",
                 gan_weight=0.02, gan_channels=16, crop="center", log_every=50, eval_every=500, save_every=500),
    "B": dict(steps=750_000, batch_size=256, lr=1e-4, min_lr=3e-5, warmup=20_000, hold=100_000, ar_size="S", perceptual="vgg",
              gan_weight=0.1, gan_channels=64, crop="random", log_every=100, eval_every=5000, save_every=5000),
}
RECIPES["L"] = RECIPES["B"] | dict(steps=1_000_000, min_lr=1e-5, perceptual="convnext")


class Stage1(nn.Module):
    """Tokenizer and joint AR in one forward. lambda multiplies the gradient that CE sends into the one-hot codes and
    nothing else: the encoder is trained on lambda * CE and the AR on CE, as two separate updates would."""

    def __init__(self, tokenizer, ar, ce_weight, direct_ce=False):
        super().__init__()
        self.tokenizer, self.ar, self.ce_weight, self.direct_ce = tokenizer, ar, ce_weight, direct_ce

    def forward(self, images, labels, drop):
        """images (B, 3, H, W), labels (B,), drop (B,) bool -> reconstruction, codes (B, K+N), VQ loss, CE"""
        reconstruction, codes, onehot, vq_loss = self.tokenizer(images, self.direct_ce)
        if self.ar is None:
            return reconstruction, codes, vq_loss, None
        onehot = onehot + (self.ce_weight - 1) * (onehot - onehot.detach())  # the same values, the gradient times lambda
        return reconstruction, codes, vq_loss, self.ar.cross_entropy(codes, labels, onehot, None if self.direct_ce else drop)


class Discriminator(nn.Module):
    """PatchGAN: three stride-2 convolutions, BatchNorm, LeakyReLU(0.2), a grid of logits."""

    def __init__(self, channels):
        super().__init__()
        layers, width = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)], channels
        for stride, out in ((2, 2 * channels), (2, 4 * channels), (1, 8 * channels)):
            layers += [nn.Conv2d(width, out, 4, stride, 1, bias=False), nn.BatchNorm2d(out), nn.LeakyReLU(0.2)]
            width = out
        self.net = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))
        for module in self.net:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1, 0.02)
        self.register_buffer("averages", torch.zeros(2))  # LeCam: mean logits of real and of fake images

    def forward(self, real, fake, r1):
        """Logits of both batches, each with its own BatchNorm statistics, and R1: |dD(real)/dreal|^2 summed over pixels."""
        real = real.detach().requires_grad_(r1)
        logits_real, logits_fake = self.net(real), self.net(fake.detach())
        if not r1:
            return logits_real, logits_fake, logits_real.new_zeros(())
        gradient, = torch.autograd.grad(logits_real.sum(), real, create_graph=True)
        return logits_real, logits_fake, gradient.square().sum((1, 2, 3)).mean()


class LPIPS(nn.Module):
    """LPIPS on VGG16 with the lpips package's linear weights; the root is guarded, because flat black images have
    all-zero features and the package's own root gives NaN gradients there. (B, 3, H, W) in [-1, 1] -> scalar."""

    def __init__(self, weights=None):
        super().__init__()
        import lpips
        import torchvision
        self.vgg = load_torchvision(torchvision.models.vgg16, weights, "--vgg_weights").features[:30]
        linear = Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth"
        self.linear = nn.ParameterList(torch.load(linear, weights_only=True, map_location="cpu").values())  # 5 of (1, c, 1, 1)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])

    def features(self, images):
        x = (images - self.shift) / self.scale
        for i, layer in enumerate(self.vgg):
            x = layer(x)
            if i in (3, 8, 15, 22, 29):  # relu1_2, 2_2, 3_3, 4_3, 5_3
                yield x.float() * (x.float().square().sum(1, keepdim=True) + 1e-8).rsqrt()

    def forward(self, images, target):
        with torch.no_grad():
            wanted = list(self.features(target))
        return sum((w * (a - b).square()).sum(1).mean() for w, a, b in zip(self.linear, self.features(images), wanted))


class ConvNextLoss(nn.Module):
    """MSE between ConvNeXt-S's 1,000 logits of both images at 224 x 224. (B, 3, H, W) in [-1, 1] -> scalar."""

    def __init__(self, weights=None):
        super().__init__()
        import torchvision
        self.net = load_torchvision(torchvision.models.convnext_small, weights, "--convnext_weights")
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])

    def logits(self, images):
        x = F.interpolate(images / 2 + 0.5, (224, 224), mode="bilinear", antialias=True)
        return self.net((x - self.mean) / self.std).float()

    def forward(self, images, target):
        with torch.no_grad():
            wanted = self.logits(target)
        return F.mse_loss(self.logits(images), wanted)


def load_torchvision(build, file, flag):
    """A torchvision network with the weights in `file`, or with the downloaded ImageNet ones. Raises InputError."""
    import torchvision
    weights = torchvision.models.get_model_weights(build).IMAGENET1K_V1
    name = weights.url.rpartition("/")[2]
    try:
        if not file:
            return build(weights=weights)
        model = build()
        model.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
        return model
    except Exception as error:
        raise InputError(f"the perceptual loss needs torchvision's {name} and {file or 'its download'} gave none "
                         f"({str(error).splitlines()[0]}); give the file as {flag}, or --perceptual none") from None


def perceptual_losses(kind, vgg_weights, convnext_weights, device):
    """[(weight, network)] of none, vgg, convnext, or both = vgg + 0.1 * convnext; frozen and in eval mode."""
    nets = [LPIPS(vgg_weights)] if kind in ("vgg", "both") else []
    nets += [ConvNextLoss(convnext_weights)] if kind in ("convnext", "both") else []
    return [(weight, net.eval().requires_grad_(False).to(device)) for weight, net in zip((1.0, 0.1), nets)]


@torch.no_grad()
def evaluate(tokenizer, ar, images, network, machine, args):
    """Measures over --eval_images held-out images, shared among the ranks, and 16 originals with their reconstructions.
    With a feature network also rFID of these images."""
    cfg, count, k = tokenizer.cfg, min(args.eval_images, len(images)), tokenizer.cfg.num_prologue
    keys = [(i, i * len(images) // count) for i in range(machine.rank, count, machine.world)]  # spread over the classes
    sums = torch.zeros(5)  # PSNR, L1, nats of prologue, EOS, visual
    moments = fid.Moments(), fid.Moments()
    seen = [torch.zeros(0, k + cfg.num_visual, dtype=torch.int64)]
    pictures = [torch.zeros(0, cfg.image_size, cfg.image_size, 3, dtype=torch.uint8)] * 2
    for batch, index in images.batches([keys[i:i + 64] for i in range(0, len(keys), 64)], 0):
        x = to_float(batch[:, 0].to(machine.device))
        with machine.autocast():
            codes = tokenizer.encode(x)
            y = tokenizer.decode(codes)
            labels = torch.from_numpy(images.labels[index.numpy()]).to(machine.device) * (args.onestage > 0)
            nats = ar.cross_entropy(codes, labels, reduction="none").cpu() if ar else torch.zeros(1, 1)
        a, b = to_uint8(x), to_uint8(y)
        for part, pixels in zip(moments, (a, b) if network else ()):
            part.add(exact_fp32(machine.device.type)(network.forward)(pixels.to(machine.device))["pool"])
        pictures = [torch.cat([old, new[::max(1, 16 // machine.world)]])[:16] for old, new in zip(pictures, (a, b))]
        sums += torch.stack([fid.psnr(a.float(), b.float()).sum(), (x - y).abs().mean((1, 2, 3)).sum().cpu(),
                             *(part.sum() for part in nats.tensor_split([k, k + (k > 0)], 1))])
        seen.append(codes.cpu())
    psnr, l1, *nats = (machine.sum(sums) / count).tolist()
    values = {"val_psnr": psnr, "val_l1": l1}
    if ar:
        values |= dict(zip(("val_nats_prologue", "val_nats_eos", "val_nats_visual"), nats))
    groups = zip(("prologue", "visual"), torch.cat(seen).tensor_split([k], 1), (cfg.prologue_codebook_size, cfg.codebook_size))
    for name, codes, size in groups if k else list(groups)[1:]:
        counts = machine.sum(torch.bincount(codes.flatten(), minlength=size)).double()
        values[f"val_usage_{name}"] = int((counts > 0).sum())
        values[f"val_perplexity_{name}"] = torch.special.entr(counts / counts.sum()).sum().exp().item()
    if network:
        values["val_rfid"] = fid.frechet_distance(*moments[0].result(), *moments[1].result())
    return values, pictures


def parse_args():
    parser, size = training_parser("Train a tokenizer.", SIZES, RECIPES)
    model, recipe, cfg = SIZES[size], RECIPES[size], TokenizerConfig(**SIZES[size])
    flag = parser.add_argument
    flag("--data", default=str(EMBEDDED / "train"), help="training images: a folder, or a path into a zip, of class folders")
    flag("--val_data", help="held-out images; by default the folder val beside a --data named train, else --data")
    flag("--layout", default="prologue", choices=LAYOUTS, help="see the class Tokenizer")
    flag("--init", metavar="TOKENIZER", help="layout post: the trained 2d tokenizer to freeze")
    flag("--image_size", type=positive, default=cfg.image_size, help="side in pixels")
    flag("--patch_size", type=positive, default=cfg.patch_size, help="side in pixels; each patch is a visual token")
    flag("--codebook_size", type=int, default=cfg.codebook_size, help="visual codes V")
    flag("--code_dim", type=int, default=cfg.code_dim, help="dimensions of a code")
    flag("--num_prologue", type=int, default=cfg.num_prologue, help="prologue tokens K")
    flag("--prologue_codebook_size", type=int, default=cfg.prologue_codebook_size, help="prologue codes P")
    flag("--tau", type=float, help="temperature of Prob-STE; by default 0.1, and 1 with --direct_ce")
    flag("--onestage", action="store_true", help="the AR is the final one: labels, 10%% of them dropped, and no stage 2")
    flag("--direct_ce", action="store_true", help="layouts 1d and 2d: CE on the visual tokens themselves (Fig. 5)")
    flag("--ar_size", default=recipe["ar_size"], choices=ar_model.SIZES, help="size of the joint AR")
    flag("--ema_half_life", type=float, default=1000, help="steps; at most a tenth of the steps so far")
    flag("--ce_weight", type=float, default=3.0, help="lambda: what the encoder's CE gradient is multiplied by")
    flag("--visual_dropout", type=float, default=0.5, help="share of images whose visual tokens the AR does not see")
    flag("--perceptual", default=recipe["perceptual"], choices=["none", "vgg", "convnext", "both"],
         help="both is vgg + 0.1 convnext")
    flag("--vgg_weights", help="torchvision's VGG16 file, instead of downloading it")
    flag("--convnext_weights", help="torchvision's ConvNeXt-Small file, instead of downloading it")
    flag("--gan_weight", type=float, default=recipe["gan_weight"], help="0 trains without a discriminator")
    flag("--gan_channels", type=int, default=recipe["gan_channels"], help="discriminator width")
    flag("--lecam_weight", type=float, default=0.001, help="LeCam term of the discriminator")
    flag("--r1_weight", type=float, default=0.01, help="R1 penalty of the discriminator")
    flag("--r1_every", type=positive, default=25, help="steps between R1 penalties")
    flag("--crop", default=recipe["crop"], choices=["none", "center", "random"], help="random is ADM's")
    flag("--flip", action=argparse.BooleanOptionalAction, default=recipe["crop"] == "random", help="mirror half of the images")
    flag("--eval_images", type=positive, default=1000, help="held-out images per evaluation")
    flag("--rfid", action="store_true", help="also measure rFID of these images")
    flag("--inception", metavar="FILE", help="torch-fidelity's Inception weights for --rfid, instead of downloading them")
    args = parser.parse_args()
    keys = ("layout", "image_size", "patch_size", "codebook_size", "code_dim", "num_prologue", "prologue_codebook_size", "tau")
    if (args.layout == "post") != bool(args.init):
        parser.error("--layout post and --init TOKENIZER, the trained 2d tokenizer, go together")
    if args.direct_ce and args.layout not in ("1d", "2d") or args.onestage and args.layout not in ("prologue", "post"):
        parser.error("--direct_ce is for the layouts 1d and 2d, --onestage for prologue and post")
    if args.layout == "post":  # nothing but CE trains it
        args.perceptual, args.gan_weight = "none", 0.0
        for key in ("image_size", "patch_size", "codebook_size", "code_dim"):
            if getattr(args, key) != parser.get_default(key):
                parser.error(f"--{key} has no say with --layout post: it is that of the --init tokenizer")
    args.tau = args.tau if args.tau is not None else 1.0 if args.direct_ce else cfg.tau
    args.model = model | {key: getattr(args, key) for key in keys}
    return args


def build(args, machine, classes):
    """Tokenizer and joint AR (None where no CE trains the tokenizer), the same on every rank."""
    torch.manual_seed(args.seed)
    cfg, ar, frozen = TokenizerConfig(**args.model), None, None
    if args.layout == "post":
        frozen = Tokenizer.load(args.init)
        if frozen.cfg.layout != "2d":
            raise InputError(f"--init {args.init} has the layout {frozen.cfg.layout}; post needs a trained 2d tokenizer")
        cfg = replace(frozen.cfg, layout="post", post=cfg.post, num_prologue=args.num_prologue, tau=args.tau,
                      prologue_codebook_size=args.prologue_codebook_size)
    tokenizer = Tokenizer(cfg)
    if frozen:
        for name, part in frozen.named_children():
            getattr(tokenizer, name).load_state_dict(part.state_dict())
            getattr(tokenizer, name).requires_grad_(False)
    if tokenizer.cfg.num_prologue or args.direct_ce:  # unconditional, unless it is the final one
        classes = classes if args.onestage else []
        ar = ar_model.AR(ar_model.ARConfig.for_tokenizer(tokenizer.cfg, num_classes=len(classes), classes=classes,
                                                         **ar_model.SIZES[args.ar_size]))
    return tokenizer.to(machine.device), ar and ar.to(machine.device)


def discriminator_loss(discriminator, real, fake, averages, args, r1):
    """Vanilla GAN loss, LeCam towards the averages (real, fake) of mean logits, R1; and the mean logits of this batch."""
    logits_real, logits_fake, penalty = discriminator(real, fake, r1)
    logits_real, logits_fake = logits_real.float(), logits_fake.float()
    loss = F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean()
    lecam = F.relu(logits_real - averages[1]).square().mean() + F.relu(averages[0] - logits_fake).square().mean()
    loss = loss + args.lecam_weight * lecam + args.r1_weight / 2 * penalty
    return loss, torch.stack([logits_real.mean(), logits_fake.mean()]).detach()


def main():
    args = parse_args()
    machine, out = Machine(args), Path(args.out)
    per_rank, micro = machine.split(args)
    if args.gan_weight and (micro < 2 or args.image_size < 24):
        raise InputError(f"the discriminator needs 2 images of 24 pixels per forward, here are {micro} of {args.image_size} "
                         "pixels: raise --batch_size or --image_size, or train without it by --gan_weight 0")
    images = Images(args.data, args.image_size, args.crop, args.flip, args.seed, train=True)
    tokenizer, ar = build(args, machine, images.classes)
    size, val_data = tokenizer.cfg.image_size, args.val_data or default_val(args.data) or args.data
    images.size = size  # the layout post takes it from --init
    if val_data == args.data:
        machine.print(f"no held-out data (--val_data): measures are taken on {args.data} itself")
    val = Images(val_data, size, "none" if args.crop == "none" else "center")
    if args.onestage and val.classes != images.classes:
        raise InputError(f"--onestage: {val_data} has other classes than {args.data}; give held-out images as --val_data")
    network = fid.feature_network("auto", size, args.inception, machine.device)[1] if args.rfid else None
    ema = copy.deepcopy(tokenizer).eval().requires_grad_(False)
    gan = Discriminator(args.gan_channels).to(machine.device) if args.gan_weight else None
    perceptual = perceptual_losses(args.perceptual, args.vgg_weights, args.convnext_weights, machine.device)
    parts = [(tokenizer, (0.0, 0.99), 0.0)] + ([(ar, (0.9, 0.99), 0.03)] if ar else [])
    optimizers = [torch.optim.AdamW(param_groups(parts), lr=args.lr, fused=True)]
    if gan:
        optimizers.append(torch.optim.AdamW(gan.parameters(), lr=args.lr, betas=(0.0, 0.99), weight_decay=1e-4, fused=True))
    state = {"tokenizer": tokenizer, "ema": ema} | ({"ar": ar} if ar else {}) | ({"gan": gan} if gan else {})
    state |= zip(("optimizer", "gan_optimizer"), optimizers)
    settings = asdict(tokenizer.cfg) | {"batch_size": args.batch_size, "seed": args.seed, "ar_size": args.ar_size,
                                        "names": images.digest(), "ce_weight": args.ce_weight, "onestage": args.onestage,
                                        "direct_ce": args.direct_ce, "gan_channels": args.gan_channels if gan else 0}
    start = load_state(out / "train_stage1.pt", args.resume, settings, state, machine)
    Transformer.gradient_checkpointing = args.gradient_checkpointing
    if machine.compile:  # in place, so that the names of the weights stay as they are
        for part in filter(None, (tokenizer.encoder, tokenizer.decoder, getattr(tokenizer, "post_encoder", None), ar)):
            part.transformer.compile()
    stage1 = Stage1(tokenizer, ar, args.ce_weight, args.direct_ce)
    final = tokenizer if args.onestage else ema  # the weights that are used afterwards
    model, discriminator = machine.wrap(stage1), gan and machine.wrap(gan)

    def visits():
        """For each forward of this rank, its list of (visit, index); `visit` counts images over the whole run."""
        for step in range(start, args.steps):
            for i in range(machine.rank * per_rank, (machine.rank + 1) * per_rank, micro):
                numbers = range(step * args.batch_size + i, step * args.batch_size + i + micro)
                yield list(zip(numbers, visited(args.seed, len(images), numbers)))

    def save(step):
        if machine.rank == 0:
            final.save(out / "tokenizer.safetensors")
            if args.onestage:
                ar.cfg.tokenizer = final.fingerprint()
            if ar:
                ar.save(out / ("ar.safetensors" if args.onestage else "joint_ar.safetensors"))
            save_state(out / "train_stage1.pt", step, settings, state)

    def measure():
        values, (originals, decoded) = evaluate(final, ar, val, network, machine, args)
        if machine.rank == 0:
            save_grid(out / "train_stage1.png", [originals[:8], decoded[:8], originals[8:], decoded[8:]])
        return values

    progress, referee = Progress(out / "train_stage1.jsonl", machine, args, start), Referee(machine)
    loader = iter(images.batches(visits(), args.num_workers))
    for step in range(start, args.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, args)
            optimizer.zero_grad()
        generator = step_generator(args.seed, step)
        drop = machine.share(torch.rand(args.batch_size, generator=generator) < args.visual_dropout)
        labelled = machine.share(torch.rand(args.batch_size, generator=generator) >= 0.1)
        terms, logits = {}, torch.zeros(2, device=machine.device)
        r1 = gan is not None and args.r1_weight > 0 and step % args.r1_every == 0
        for i in range(0, per_rank, micro):
            batch, index = next(loader)
            x = to_float(batch[:, 0].to(machine.device, non_blocking=True))
            labels = torch.from_numpy(images.labels[index.numpy()] * args.onestage)  # the joint AR knows none but 0
            labels = labels.where(labelled[i:i + micro], len(images.classes) * args.onestage)
            more = i + micro < per_rank  # gradients travel between ranks once per step
            with machine.unsynced(model, more), machine.unsynced(discriminator, more and gan):
                with machine.autocast():
                    y, _, vq, ce = model(x, labels.to(machine.device), drop[i:i + micro].to(machine.device))
                    part = {} if ce is None else {"ce": ce}
                    if y is not None:
                        part |= {"l1": F.l1_loss(y, x), "vq": vq}
                    if perceptual:
                        part["perceptual"] = sum(weight * net(y, x) for weight, net in perceptual)
                    if gan:
                        gan.requires_grad_(False)
                        part["gan"] = F.softplus(-gan.net(y).float()).mean()
                        gan.requires_grad_(True)
                loss = sum((args.gan_weight if name == "gan" else 1) * value for name, value in part.items())
                (loss * micro / per_rank).backward()
                if gan:
                    with contextlib.nullcontext() if r1 else machine.autocast():  # R1 differentiates twice: in fp32
                        part["discriminator"], mean = discriminator_loss(discriminator, x, y, gan.averages, args, r1)
                    (part["discriminator"] * micro / per_rank).backward()
                    logits += mean * micro / per_rank
            terms = {name: terms.get(name, 0) + value.detach() * micro / per_rank for name, value in part.items()}
        terms["gradient"] = torch.nn.utils.get_total_norm(p.grad for p in stage1.parameters() if p.grad is not None)
        if referee.step_counts(terms):
            for optimizer in optimizers:
                optimizer.step()
            if gan:
                gan.averages.lerp_(machine.sum(logits).to(machine.device) / machine.world, 1 - 0.999)
            update_ema(ema, tokenizer, min(args.ema_half_life, 0.1 * (step + 1)))
        logged = terms | dict(zip(("logits_real", "logits_fake"), logits if gan else ()))
        if progress.end_step(step, referee, logged, measure, save):
            break


if __name__ == "__main__":
    run(main)
