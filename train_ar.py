"""Stage 2: train the AR model from scratch on the frozen tokenizer's codes.

    python train_ar.py                                           # tiny, out/codes.npz, a few minutes
    torchrun --nproc_per_node 8 train_ar.py --size B --compile --out out_b

Cross-entropy over [prologue, EOS, visual], the class dropped 10% of the time for classifier-free guidance, one of the
stored crops drawn at each visit. In --out it leaves ar.safetensors (raw weights, the ones that are sampled),
train_ar.jsonl, train_ar.png and train_ar.pt (for --resume).
"""
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

import fid
from ar import AR, SIZES, ARConfig, check_pair
from common import (InputError, Machine, Progress, Referee, exact_fp32, load_state, lr_at, param_groups, positive, run, save_grid,
                    save_state, step_generator, training_parser, visited)
from pretokenize import EMBEDDED
from sample import PRESETS, Sampler, generation_fid, sampling_defaults
from tokenizer import Tokenizer, TokenizerConfig, Transformer

# Defaults by --size. B: the paper's recipe beside the Base tokenizer, 400 epochs of ImageNet at batch 512.
RECIPES = {
    "tiny": dict(steps=1600, batch_size=32, lr=1e-3, min_lr=1e-5, warmup=50, hold=400, log_every=50, eval_every=400,
                 save_every=400),
    "S": dict(steps=1_000_000, batch_size=512, lr=2e-4, min_lr=5e-5, warmup=20_000, hold=100_000, log_every=100,
              eval_every=5000, save_every=5000),
}
RECIPES |= {size: RECIPES["S"] for size in ("B", "L", "XL")} | {"nano": RECIPES["tiny"]}


class Tokens:
    """A token file: codes (images, crops, K+N) uint16, labels (images,), and the config of what made it. Raises InputError."""

    def __init__(self, path):
        if not Path(path).is_file():
            raise InputError(f"{path} does not exist; make it with pretokenize.py, or name another with --codes")
        try:  # the codes are mapped from the file, so the processes of a node share one copy
            self.codes, self.labels, config = (fid.map_npz(path, name) for name in ("codes", "labels", "config"))
            config = json.loads(str(config))
            self.classes, self.fingerprint = config["classes"], config["fingerprint"]
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path} is not a token file of pretokenize.py, or not a whole one: {error}") from None
        self.cfg = TokenizerConfig(**config["tokenizer"])

    def batch(self, images, crops, device):
        """codes (B, K+N) and labels (B,) of the given image numbers and crop numbers."""
        return (torch.from_numpy(self.codes[images, crops].astype(np.int64)).to(device),
                torch.from_numpy(np.array(self.labels[images])).to(device))


@torch.no_grad()
def evaluate(ar, tokens, machine, count):
    """Held-out nats per image of each part of the sequence, class given, first crop, over the first `count` images."""
    count, k = min(count, len(tokens.codes)), ar.cfg.num_prologue
    sums = torch.zeros(3, device=machine.device)
    for part in torch.arange(machine.rank, count, machine.world).split(64):
        codes, labels = tokens.batch(part.numpy(), 0, machine.device)
        with machine.autocast():
            nats = ar.cross_entropy(codes, labels, reduction="none")  # (B, L)
        sums += torch.stack([part.sum() for part in nats.tensor_split([k, k + (k > 0)], 1)])
    prologue, eos, visual = (machine.sum(sums) / count).tolist()
    return {"val_nats": prologue + eos + visual, "val_nats_prologue": prologue, "val_nats_visual": visual}


def build(args, tokenizer, tokens):
    """A new AR model for the tokenizer's codes, or the one of --init. Raises InputError."""
    torch.manual_seed(args.seed)
    cfg = ARConfig.for_tokenizer(tokenizer.cfg, **SIZES[args.size], num_classes=len(tokens.classes), dropout=args.dropout,
                                 classes=tokens.classes, tokenizer=tokens.fingerprint)
    if not args.init:
        return AR(cfg)
    old = AR.load(args.init, tokenizer)
    if (old.cfg.classes or tokens.classes) != tokens.classes or old.cfg.num_classes != cfg.num_classes:
        raise InputError(f"{args.init} was trained on other classes than the token file: {old.cfg.num_classes} "
                         f"({', '.join(old.cfg.classes[:3])}...) and {cfg.num_classes} ({', '.join(cfg.classes[:3])}...)")
    check_pair(tokenizer, old, names=("the tokenizer", args.init))
    ar = AR(replace(cfg, layers=old.cfg.layers, dim=old.cfg.dim, head_dim=old.cfg.head_dim))
    ar.load_state_dict(old.state_dict())
    return ar


def parse_args():
    parser, _ = training_parser("Train an AR model on tokens.", SIZES, RECIPES)
    flag = parser.add_argument
    flag("--codes", help="token file; by default codes.npz in --out")
    flag("--val_codes", help="held-out token file; by default the --codes name with _val, if there is one")
    flag("--tokenizer", help="tokenizer file or released directory, to draw samples; by default tokenizer.safetensors in --out")
    flag("--init", metavar="AR", help="AR file or released directory whose weights to start from (fine-tuning)")
    flag("--beta2", type=float, default=0.96, help="of AdamW; beta1 is 0.9")
    flag("--weight_decay", type=float, default=0.03, help="on matrices only")
    flag("--dropout", type=float, default=0.1, help="on embedding, attention output and MLP output")
    flag("--class_dropout", type=float, default=0.1, help="share of images trained without their class")
    flag("--grad_clip", type=float, default=1.0, help="largest gradient norm; 0 = off")
    flag("--eval_images", type=positive, default=2000, help="held-out images per evaluation")
    flag("--fid_every", type=int, default=0, help="steps between gFIDs, a multiple of --eval_every; 0 = never")
    flag("--fid_samples", type=positive, default=2000, help="images drawn for each gFID")
    flag("--reference", default=str(EMBEDDED / "train"), help="npz, folder or zip that gFID compares with")
    flag("--inception", metavar="FILE", help="torch-fidelity's Inception weights for gFID, instead of downloading them")
    flag("--preset", choices=PRESETS, help="row of the paper's table A5 whose guidance gFID is measured with, beside none")
    args = parser.parse_args()
    if args.fid_every % args.eval_every:
        parser.error(f"--fid_every {args.fid_every} is not a multiple of --eval_every {args.eval_every}")
    return args


def main():
    args = parse_args()
    machine, out = Machine(args), Path(args.out)
    per_rank, micro = machine.split(args)
    codes_path = Path(args.codes or out / "codes.npz")
    tokens = Tokens(codes_path)
    val_path = Path(args.val_codes or codes_path.with_name(codes_path.stem + "_val.npz"))
    val = Tokens(val_path) if args.val_codes or val_path.exists() else None
    tokenizer_path = args.tokenizer or out / "tokenizer.safetensors"
    tokenizer = Tokenizer.load(tokenizer_path).to(machine.device)
    for path, file in ((codes_path, tokens), (val_path, val)):
        if file and (file.cfg, file.fingerprint) != (tokenizer.cfg, tokenizer.fingerprint()):
            raise InputError(f"{path} was made by another tokenizer than {tokenizer_path}; run pretokenize.py again")
        if file and file.classes != tokens.classes:
            raise InputError(f"{path} and {codes_path} have different classes: {file.classes[:3]}... and {tokens.classes[:3]}...")
    ar = build(args, tokenizer, tokens).to(machine.device)
    optimizer = torch.optim.AdamW(param_groups([(ar, (0.9, args.beta2), args.weight_decay)]), lr=args.lr, fused=True)
    settings = asdict(ar.cfg) | {"batch_size": args.batch_size, "seed": args.seed, "images": len(tokens.codes),
                                 "beta2": args.beta2, "weight_decay": args.weight_decay}
    parts = {"ar": ar, "optimizer": optimizer}
    start = load_state(out / "train_ar.pt", args.resume, settings, parts, machine)
    Transformer.gradient_checkpointing = args.gradient_checkpointing
    if machine.compile:
        ar.transformer.compile()
    model = machine.wrap(ar)

    def save(step):
        if machine.rank == 0:
            ar.save(out / "ar.safetensors")
            save_state(out / "train_ar.pt", step, settings, parts)

    def measure():
        ar.eval()
        values = evaluate(ar, val, machine, args.eval_images) if val else {}
        for mode in ("", "_no_cfg") if args.fid_every and (step + 1) % args.fid_every == 0 else ():
            sampler = Sampler(ar, tokenizer, machine, args.seed, 100 * machine.world, sampling_defaults(args.preset, mode))
            measured = generation_fid(sampler, args.fid_samples, network, reference)
            values |= {f"val_{key}{mode}": value for key, value in measured.items()}
        if machine.rank == 0:
            labels = torch.arange(min(8, ar.cfg.num_classes)).repeat_interleave(10)  # a row per class, the same noise each time
            sampler = Sampler(ar, tokenizer, machine, args.seed, 100 * machine.world, {})
            save_grid(out / "train_ar.png", list(sampler.pixels(sampler.codes(labels, range(len(labels)))).split(10)))
        ar.train()
        return values

    if args.fid_every:
        network = fid.feature_network("auto", tokenizer.cfg.image_size, args.inception, machine.device)[1]
        with exact_fp32(machine.device.type):
            reference = fid.reference_features(args.reference, network, machine.device, 100, False, tokenizer.cfg.image_size)
    progress, referee = Progress(out / "train_ar.jsonl", machine, args, start), Referee(machine)
    machine.print(f"{sum(p.numel() for p in ar.parameters()) / 1e6:.1f}M parameters, {len(tokens.classes)} classes, "
                  f"{' x '.join(map(str, tokens.codes.shape))} images x crops x codes")
    ar.train()
    for step in range(start, args.steps):
        # Everything random is drawn for the whole batch from (seed, step); dropout from (seed, step, rank).
        torch.manual_seed(args.seed * 1_000_003 + step * machine.world + machine.rank)
        generator = step_generator(args.seed, step)
        numbers = range(step * args.batch_size, (step + 1) * args.batch_size)
        index = machine.share(torch.tensor(visited(args.seed, len(tokens.codes), numbers))).numpy()
        crops = machine.share(torch.randint(tokens.codes.shape[1], (args.batch_size,), generator=generator)).numpy()
        unlabelled = machine.share(torch.rand(args.batch_size, generator=generator) < args.class_dropout).to(machine.device)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, args)
        optimizer.zero_grad()
        loss = 0.0
        for i in range(0, per_rank, micro):
            codes, labels = tokens.batch(index[i:i + micro], crops[i:i + micro], machine.device)
            labels = labels.masked_fill(unlabelled[i:i + micro], ar.cfg.num_classes)
            with machine.unsynced(model, i + micro < per_rank):
                with machine.autocast():
                    part = model(codes, labels, loss=True) * micro / per_rank
                part.backward()
            loss = loss + part.detach()
        norm = torch.nn.utils.clip_grad_norm_(ar.parameters(), args.grad_clip or float("inf"))
        if referee.step_counts({"cross-entropy": loss, "gradient norm": norm}):
            optimizer.step()
        logged = {"ce": loss, "nats": loss * ar.length, "grad_norm": norm}
        if progress.end_step(step, referee, logged, measure, save):
            break


if __name__ == "__main__":
    run(main)
