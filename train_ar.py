"""Stage 2: train the AR model that generates, from scratch on the frozen tokenizer's codes.

    python train_ar.py                                     # tiny, out/codes.safetensors, minutes
    torchrun --nproc_per_node 8 train_ar.py --size B ...   # see recipes/ar.sh

One step: for each image one of its tokenized crops is drawn, for a tenth of the images the class is
replaced by "unconditional" (which classifier-free guidance needs), and the cross-entropy of
[prologue, EOS, visual] is the whole loss.

In --out it leaves ar.safetensors (the raw weights, which are sampled) and beside it the tokenizer,
train_ar.jsonl (the log) and train_ar.pt (the state for --resume).
"""

import argparse
import contextlib
import json
import shutil
import time
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from ar import AR, SIZES, ARConfig
from pretokenize import visited_images
from tokenizer import (TokenizerConfig, check_finite, compile_blocks, finish, read_safetensors,
                       setup, writing)

CLASS_DROPOUT = 0.1  # share of images that are trained without their class
GRAD_CLIP = 1.0  # largest norm of the gradient


class Tokens:
    """A token file of pretokenize.py, mapped from disk: ranks and processes share its memory.

    codes: (images, crops, K+N) uint16. labels: (images,) int64. classes: their names. cfg: of the
    tokenizer that made the codes. digest: of everything that they depend on.
    """

    def __init__(self, path):
        tensors, cfg = read_safetensors(path, "codes")
        self.codes = tensors["codes"].numpy()
        self.labels = tensors["labels"]
        self.classes = cfg["classes"]
        self.cfg = TokenizerConfig(**cfg["tokenizer"])
        self.digest = cfg["digest"]

    def batch(self, images, crops=0):
        """Codes (B, K+N) and labels (B,), int64, of image numbers (B,) and crop numbers (B,)."""
        return torch.from_numpy(self.codes[images, crops].astype(np.int64)), self.labels[images]


# What both trainers share: state, learning rate, log


def load_state(path, fixed, resume):
    """The state that a trainer saved at `path`, or None; what must not change, `fixed`, is as then.
    All ranks do as the first, also where copies of the data differ from node to node."""
    shared = [path.exists(), fixed]
    if dist.is_initialized():
        dist.broadcast_object_list(shared)
    there, fixed = shared
    if not (there and resume):
        return None
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception:  # torch would advise to unpickle freely
        raise SystemExit(f"--resume: {path} is missing or not a whole training state") from None
    for name, value in fixed.items():
        before = state["fixed"].get(name)
        if before != value:
            raise SystemExit(f"--resume: {path} was made with {name} {before} and not {value}")
    return state


def learning_rate(step, args):
    """At a step, counted from 1: linear warmup, --hold steps at --lr, then linear to --min_lr."""
    flat = args.warmup + args.hold
    ends = [0, args.warmup, flat, max(flat + 1, args.steps)]
    return float(np.interp(step, ends, [0, args.lr, args.lr, args.min_lr]))


def log_entry(step, lr, terms, seconds, args):
    """What the log says of a step: with `terms`, {name: 0-dim tensor}, as means over the ranks.
    Ends the run if one of them is not finite. seconds: of a step, in the mean since the start."""
    values = torch.stack(list(terms.values()))
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    check_finite(f"step {step}", dict(zip(terms, values)))
    entry = dict(step=step, lr=lr, images_per_s=args.batch_size / seconds,
                 minutes_left=(args.steps - step) * seconds / 60)
    return entry | dict(zip(terms, values.tolist()))


def report(entry, path, size, args):
    """A line of a trainer's log: in the file, of which the first `size` bytes are this run's, with
    --wandb at Weights & Biases, and for people. Returns the new size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as log:
        log.truncate(min(size, log.tell()))
        print(json.dumps(entry), file=log, flush=True)
        size = log.tell()
    if args.wandb:
        import wandb

        run = wandb.run or wandb.init(project=args.wandb, name=str(path), config=vars(args))
        run.log(entry, step=entry["step"])
    with contextlib.suppress(BrokenPipeError):  # the reader of a pipe has left: go on
        print(*(f"{name} {value:.6g}" for name, value in entry.items()), sep="  ", flush=True)
    return size


# Model and held-out measures


def build_model(args, tokens):
    """A new AR model for the codes, or one that starts from the weights of --init, whatever its
    classes are: a class with a known name keeps its embedding, any other starts as no class."""
    cfg = ARConfig.for_tokenizer(tokens.cfg, **SIZES[args.size], num_classes=len(tokens.classes),
                                 classes=tokens.classes, dropout=args.dropout,
                                 tokenizer=tokens.cfg.fingerprint)
    if args.init is None:
        return AR(cfg)
    old = AR.load(args.init)
    ar = AR(replace(cfg, layers=old.cfg.layers, dim=old.cfg.dim, head_dim=old.cfg.head_dim,
                    preset=old.cfg.preset))
    weights = old.state_dict()
    bos = weights["bos.weight"]  # (old classes + 1, D), the last row is the unconditional one
    known = dict(zip(old.cfg.classes, bos))
    rows = [known.get(name, bos[-1]) for name in cfg.classes]
    weights["bos.weight"] = torch.stack([*rows, bos[-1]])
    ar.load_state_dict(weights)
    return ar


@torch.no_grad()
def evaluate(ar, tokens, count, device, autocast):
    """Nats per image and top-1 accuracy of each token group, given the class, over the first crops
    of `count` images."""
    count = min(count, len(tokens.codes))
    indices = torch.arange(count) * len(tokens.codes) // count  # spread over all classes
    sums = defaultdict(float)
    for chosen in indices.split(64):
        codes, labels = tokens.batch(chosen)
        with autocast:
            measures = ar.measure(codes.to(device), labels.to(device))
        for name, values in measures.items():
            sums[f"val_{name}"] += values.sum().item() / count
    return sums


# The script


def parse_args():
    parser = argparse.ArgumentParser(
        description="Train an AR model. Defaults are the tiny demo's, recipes/ has the paper's.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument

    # Data and model
    flag("--codes", help="token file, beside its codes_val; else codes.safetensors in --out")
    flag("--tokenizer", help="file that made the codes; else tokenizer.safetensors in --out")
    flag("--size", default="tiny", choices=SIZES, help="of the AR model")
    flag("--init", metavar="AR", help="file to start from; its size counts, classes may be others")
    flag("--dropout", type=float, default=0.1, help="on embedding, attention and MLP outputs")

    # Optimization
    flag("--steps", type=int, default=1300, help="of the whole run; the schedule follows it")
    flag("--batch_size", type=int, default=32, help="images per step, over all ranks together")
    flag("--micro_batch_size", type=int, help="images per forward and rank, to save memory")
    flag("--gradient_checkpointing", action="store_true", help="less memory, more time")
    flag("--lr", type=float, default=1e-3, help="learning rate after the warmup")
    flag("--min_lr", type=float, default=1e-5, help="at the last step, after warmup and hold")
    flag("--warmup", type=int, default=50, help="steps of linear warmup")
    flag("--hold", type=int, default=300, help="steps at --lr, before the linear decay")
    flag("--beta2", type=float, default=0.96, help="of AdamW; beta1 is 0.9")
    flag("--weight_decay", type=float, default=0.03, help="on matrices only")
    flag("--seed", type=int, default=0, help="of everything random")

    # Machine and files
    flag("--out", default="out", help="folder for everything that is written and looked for")
    flag("--resume", action="store_true", help="go on from the state in --out, if there is one")
    flag("--log_every", type=int, default=50, help="steps between lines of the log")
    flag("--eval_every", type=int, default=400, help="steps between held-out measures")
    flag("--eval_images", type=int, default=2000, help="held-out images for the measures")
    flag("--save_every", type=int, default=400, help="steps between saved states")
    flag("--wandb", metavar="PROJECT", help="also log to Weights & Biases")
    flag("--device", default="auto", help="cuda, mps or cpu; auto is the best of them")
    flag("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="auto: bf16 on new GPUs")
    flag("--compile", action="store_true", help="torch.compile the transformer blocks")
    return parser.parse_args()


def main():
    args = parse_args()
    out = Path(args.out)

    # Device, ranks, and this rank's share of a step, in one or more micro-batches
    rank, world_size, device, autocast = setup(args.device, args.dtype)
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    cuda = device.type == "cuda"
    per_rank = args.batch_size // world_size
    micro = args.micro_batch_size or per_rank
    if args.batch_size % world_size or per_rank % micro:
        raise SystemExit(f"--batch_size {args.batch_size} does not divide into {world_size} ranks "
                         f"with micro-batches of {micro}")

    # Tokens, all of one tokenizer, of which --out gets a copy, so that it holds a pair
    codes_path = Path(args.codes or out / "codes.safetensors")
    tokens = Tokens(codes_path)
    val_path = codes_path.with_stem(f"{codes_path.stem}_val")
    val_tokens = Tokens(val_path) if val_path.exists() else None
    own = out / "tokenizer.safetensors"
    tokenizer_path = Path(args.tokenizer or own)
    made_by = [tokenizer_path, own] if own.exists() else [tokenizer_path]
    fingerprints = {path: read_safetensors(path, "tokenizer")[1].get("fingerprint")
                    for path in made_by}
    if val_tokens is not None:
        fingerprints[val_path] = val_tokens.cfg.fingerprint
    for path, fingerprint in fingerprints.items():
        if fingerprint != tokens.cfg.fingerprint:
            raise SystemExit(f"{path} and {codes_path} are of two tokenizers: run pretokenize.py "
                             "again, or give the tokenizer of these codes, or another --out")
    num_images, num_crops, length = tokens.codes.shape
    if rank == 0:
        print(f"{codes_path}: {num_images} images of {len(tokens.classes)} classes x {num_crops} "
              f"crops x {length} codes", flush=True)
        if not own.exists():
            with writing(own) as temporary:
                shutil.copyfile(tokenizer_path, temporary)

    # Model and optimizer
    torch.manual_seed(args.seed)
    ar = build_model(args, tokens).to(device)
    optimizer = torch.optim.AdamW(ar.parameter_groups(args.weight_decay), lr=args.lr,
                                  betas=(0.9, args.beta2), fused=True)

    # Resume; what is popped is not kept in memory, 8 GB a rank for XL
    log = out / "train_ar.jsonl"
    start_step = 0
    log_size = 0
    lowest = (float("inf"), 0)  # held-out nats, and their step
    fixed = dict(asdict(ar.cfg), codes=tokens.digest, batch_size=args.batch_size, seed=args.seed,
                 beta2=args.beta2, weight_decay=args.weight_decay)
    state = load_state(out / "train_ar.pt", fixed, args.resume)
    if state is not None:
        ar.load_state_dict(state.pop("ar"))
        optimizer.load_state_dict(state.pop("optimizer"))
        start_step = state["step"]
        log_size = state["log_size"]
        lowest = state["lowest"]
    if rank == 0:
        size = sum(p.numel() for p in ar.parameters()) / 1e6
        print(f"{size:.1f}M parameters, from step {start_step + 1}", flush=True)

    # Compilation and ranks; the only buffers, RoPE tables, never change
    ar.transformer.gradient_checkpointing = args.gradient_checkpointing
    if args.compile:
        compile_blocks(ar)
    model = DistributedDataParallel(ar, broadcast_buffers=False) if world_size > 1 else ar

    # The loop
    ar.train()
    clock = time.perf_counter()
    for step in range(start_step + 1, args.steps + 1):
        # Learning rate
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()

        # Random numbers are drawn for the global batch, of which each rank takes its slice; only
        # for dropout each rank draws its own
        seed = args.seed * 1_000_003 + step
        generator = torch.Generator().manual_seed(seed % 2**63)
        torch.manual_seed((seed * world_size + rank) % 2**63)
        of_rank = slice(rank * per_rank, (rank + 1) * per_rank)
        first = (step - 1) * args.batch_size + rank * per_rank
        images = visited_images(args.seed, first, per_rank, num_images)
        crops = torch.randint(num_crops, (args.batch_size,), generator=generator)[of_rank]
        unlabelled = torch.rand(args.batch_size, generator=generator)[of_rank] < CLASS_DROPOUT
        codes, labels = tokens.batch(images, crops.numpy())
        codes = codes.to(device, non_blocking=cuda)
        labels = labels.masked_fill(unlabelled, ar.cfg.num_classes).to(device, non_blocking=cuda)

        # Forward and backward
        ce = torch.zeros((), device=device)
        for i in range(0, per_rank, micro):
            part = slice(i, i + micro)
            model.require_backward_grad_sync = i + micro == per_rank  # of DDP: once per step
            with autocast:
                logits = model(codes[part], labels[part])  # (B, L, vocabulary)
            targets = ar.sequence(codes[part])  # (B, L)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            (loss * micro / per_rank).backward()
            ce += loss.detach() * micro / per_rank

        # Step
        norm = torch.nn.utils.clip_grad_norm_(ar.parameters(), GRAD_CLIP)
        optimizer.step()

        # Log
        if step % args.log_every == 0 or step == args.steps:
            right = (logits.argmax(-1) == targets).float()  # of the last micro-batch
            terms = dict(ce=ce, nats=ce * ar.length, accuracy=right.mean(), grad_norm=norm)
            seconds = (time.perf_counter() - clock) / (step - start_step)
            entry = log_entry(step, lr, terms, seconds, args)
            if rank == 0:
                log_size = report(entry, log, log_size, args)

        # Held-out measures
        if (step % args.eval_every == 0 or step == args.steps) and rank == 0 and val_tokens:
            ar.eval()
            with torch.compiler.set_stance("force_eager"):  # these shapes would recompile
                measures = evaluate(ar, val_tokens, args.eval_images, device, autocast)
            lowest = min(lowest, (measures["val_nats"], step))
            measures["lowest_step"] = lowest[1]
            log_size = report({"step": step} | measures, log, log_size, args)
            ar.train()

        # Save, after the measures: a run that is killed while measuring goes on from before them
        if (step % args.save_every == 0 or step == args.steps) and rank == 0:
            ar.save(out / "ar.safetensors")
            state = dict(step=step, log_size=log_size, lowest=lowest, fixed=fixed,
                         ar=ar.state_dict(), optimizer=optimizer.state_dict())
            with writing(out / "train_ar.pt") as temporary:
                torch.save(state, temporary)

    finish()


if __name__ == "__main__":
    main()
