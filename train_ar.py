"""Stage 2: train the AR model that generates, from scratch on the frozen tokenizer's codes.

    python train_ar.py                                     # tiny, out/codes.safetensors, minutes
    torchrun --nproc_per_node 8 train_ar.py --size B ...   # see recipes/ar.sh

One step: for each image one of its tokenized crops is drawn, for a tenth of the images the class is
replaced by "unconditional" (which classifier-free guidance needs), and the cross-entropy of
[prologue, EOS, visual] is the whole loss.

In --out it leaves ar.safetensors (the raw weights, which are sampled), ar_best.safetensors (where
held-out nats were lowest), beside them the tokenizer, train_ar.jsonl (the log) and train_ar.pt (the
state for --resume). This file also holds what train_stage1.py, the same loop with a GAN, shares.
"""

import argparse
import json
import shutil
import signal
import sys
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
from pretokenize import Tokens, visited_images
from tokenizer import (Transformer, atomic_write, average, check_finite, check_flags,
                       compile_blocks, finish, of_first_rank, open_out, read_safetensors, setup)

CLASS_DROPOUT = 0.1  # share of images that are trained without their class
GRAD_CLIP = 1.0  # largest norm of the gradient
BETAS = (0.9, 0.96)  # of AdamW
# What people watch of the log, and its name on a terminal
SHOWN = {"images_per_s": "images/s", "minutes_left": "min left", "l1": "l1", "vq": "vq", "ce": "ce",
         "perceptual": "perceptual", "discriminator": "D", "nats": "nats", "val_psnr": "PSNR",
         "val_nats": "held-out nats", "val_nats_prologue": "prologue", "val_nats_visual": "visual"}


# Model and held-out measures

def build_model(args, tokens, rank):
    """A new AR model for the codes, or one with the weights of --init, whatever its classes are: a
    known class keeps its embedding, any other starts as no class."""
    config = ARConfig.for_tokenizer(tokens.config, **SIZES[args.size],
                                    num_classes=len(tokens.classes), classes=tokens.classes,
                                    dropout=args.dropout, tokenizer=tokens.config.fingerprint)
    if args.init is None:
        return AR(config)
    old = AR.load(args.init)
    if old.config.tokenizer not in ("", config.tokenizer):
        raise SystemExit(f"--init {args.init} was trained on codes of another tokenizer")
    sizes = {name: getattr(old.config, name) for name in ("layers", "dim", "head_dim", "preset")}
    ar = AR(replace(config, **sizes))
    weights = old.state_dict()
    *embeddings, no_class = weights["class_embedding.weight"]  # each (D,)
    names = old.config.classes
    if len(names) == len(config.classes) == 1000 and config.classes[0] == "n01440764":
        names = config.classes  # ImageNet's n-numbers, whose order is that of its labels
    known = dict(zip(names, embeddings))
    kept = sum(name in known for name in config.classes)
    if rank == 0:
        print(f"--init: {kept} of {len(config.classes)} classes keep their embedding")
    embeddings = [known.get(name, no_class) for name in config.classes]
    weights["class_embedding.weight"] = torch.stack([*embeddings, no_class])
    ar.load_state_dict(weights)
    return ar


@torch.no_grad()
def evaluate(ar, tokens, count, device, autocast):
    """AR.measure, as val_..., in the mean over the first crops of `count` held-out images."""
    count = min(count, len(tokens.codes))
    indices = torch.arange(count) * len(tokens.codes) // count  # spread over all classes
    means = defaultdict(float)
    for chosen in indices.split(64):
        codes, labels = tokens.batch(chosen)
        with autocast:
            measures = ar.measure(codes.to(device), labels.to(device))
        for name, values in measures.items():
            means[f"val_{name}"] += values.sum().item() / count
    return means


def parse_args():
    parser = argparse.ArgumentParser(description="Train an AR model; recipes/ has the paper's.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--codes", help="token file, beside its codes_val; else codes.safetensors in --out")
    flag("--tokenizer", help="file that made the codes; else tokenizer.safetensors in --out")
    flag("--size", default="tiny", choices=SIZES, help="of the AR model")
    flag("--init", metavar="AR", help="file to start from; its size counts, classes may be others")
    flag("--dropout", type=float, default=0.1, help="on embedding, attention and MLP outputs")
    flag("--weight_decay", type=float, default=0.03, help="on matrices only")
    return parse_trainer_args(parser, hold=0.25, steps=1300, lr=1e-3, min_lr=1e-5, eval_images=2000)


def main():
    args = parse_args()

    # Device, ranks, and this rank's part of a step, in one or more micro-batches
    rank, world_size, device, autocast = setup(args.device, args.dtype)
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    out = Path(args.out)
    per_rank, micro = split_batch(args, world_size)

    # Tokens, all of one tokenizer
    codes_path = Path(args.codes or out / "codes.safetensors")
    tokens = Tokens(codes_path)
    val_path = codes_path.with_stem(f"{codes_path.stem}_val")
    val_tokens = Tokens(val_path) if val_path.exists() and args.eval_images > 0 else None
    if val_tokens and val_tokens.partner != tokens.digest:
        raise SystemExit(f"{val_path} and {codes_path} are of two runs: run pretokenize.py again")
    own = out / "tokenizer.safetensors"
    tokenizer_path = Path(args.tokenizer or own)
    made_by = {tokenizer_path, own} if own.exists() else {tokenizer_path}
    for path in made_by:
        if read_safetensors(path, "tokenizer")[1]["fingerprint"] != tokens.config.fingerprint:
            raise SystemExit(f"{path} did not make {codes_path}: run pretokenize.py or set --out")
    num_images, num_crops, _ = tokens.codes.shape

    # State, model and optimizer. The pops below free memory: 8 GB a rank for XL
    if rank == 0:
        open_out(out, "train_ar.pt", "ar.safetensors", "ar_best.safetensors")
    torch.manual_seed(args.seed)
    same = ("size", "dropout", "weight_decay", "batch_size", "seed")
    must_match = {name: getattr(args, name) for name in same}
    must_match |= {"tokenizer": tokens.config.fingerprint, "classes": tokens.classes,
                   "data": tokens.digest}
    state = load_state(out / "train_ar.pt", out / "ar.safetensors", must_match, args)
    ar = AR(ARConfig(**state["config"])) if state else build_model(args, tokens, rank)
    ar.to(device)
    optimizer = torch.optim.AdamW(ar.parameter_groups(args.weight_decay), lr=args.lr,
                                  betas=BETAS, fused=True)
    start_step = 0
    lowest = float("inf")  # held-out nats
    if state:
        ar.load_state_dict(state.pop("ar"))
        optimizer.load_state_dict(state.pop("optimizer"))
        start_step = state["step"]
        if not args.overwrite:  # it allows other held-out images
            lowest = state["lowest"]
    log = out / "train_ar.jsonl"
    on_ctrl_c(start_step, rank)
    if rank == 0:
        if start_step == 0:
            (out / "ar_best.safetensors").unlink(missing_ok=True)  # of an earlier run
        if not own.exists():  # a copy, so that --out holds a pair
            with atomic_write(own) as temporary:
                shutil.copyfile(tokenizer_path, temporary)
        announce(ar, start_step, log, args)

    # The loop
    model = for_training(ar, args)
    clock = time.perf_counter()
    for step in range(start_step + 1, args.steps + 1):
        # Learning rate
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()

        # Drawn for the global batch, each rank takes its slice; dropout's are drawn by rank
        seed = args.seed * 1_000_003 + step
        generator = torch.Generator().manual_seed(seed % 2**63)
        torch.manual_seed((seed * world_size + rank) % 2**63)
        of_rank = slice(rank * per_rank, (rank + 1) * per_rank)
        first = (step - 1) * args.batch_size + rank * per_rank
        indices = visited_images(args.seed, first, per_rank, num_images)
        crops = torch.randint(num_crops, (args.batch_size,), generator=generator)[of_rank]
        unlabelled = torch.rand(args.batch_size, generator=generator)[of_rank] < CLASS_DROPOUT
        codes, labels = tokens.batch(indices, crops.numpy())
        codes = to_device(codes, device)
        labels = to_device(labels.masked_fill(unlabelled, ar.no_class), device)

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
        if is_due(args.log_every, step, args):
            right = (logits.argmax(-1) == targets).float()  # of the last micro-batch
            terms = dict(ce=ce, nats=ce * ar.length, accuracy=right.mean(), grad_norm=norm)
            seconds = (time.perf_counter() - clock) / (step - start_step)
            line = log_line(step, lr, terms, seconds, args)
            if rank == 0:
                write_log(line, log, args)

        # Held-out measures
        if is_due(args.eval_every, step, args) and rank == 0 and val_tokens:
            ar.eval()
            with torch.compiler.set_stance("force_eager"):  # these shapes would recompile
                measures = evaluate(ar, val_tokens, args.eval_images, device, autocast)
            ar.train()
            write_log({"step": step} | measures, log, args)
            if measures["val_nats"] < lowest:
                lowest = measures["val_nats"]
                ar.save(out / "ar_best.safetensors")

        # Save, after the measures: a run that is killed while measuring goes on from before them
        if rank == 0 and is_due(args.save_every, step, args):
            check_moments(step, [optimizer])
            ar.save(out / "ar.safetensors")
            state = dict(step=step, steps=args.steps, config=asdict(ar.config),
                         must_match=must_match, lowest=lowest, ar=ar.state_dict(),
                         optimizer=optimizer.state_dict())
            save_state(out / "train_ar.pt", state)

    if rank == 0:
        print(f"done: {out / 'ar.safetensors'}. Next: python sample.py --out {out}")
    finish()


# What both trainers share: flags, state, learning rate, log

def parse_trainer_args(parser, *positive, hold, **defaults):
    """Adds the flags that both trainers have, parses all and checks them. defaults: those in which
    the trainers differ; hold: that of --hold, as a share of --steps; positive: see check_flags."""
    flag = parser.add_argument

    # Optimization
    flag("--steps", type=int, help="of the whole run; the schedule follows it")
    flag("--batch_size", type=int, default=32, help="images per step, over all ranks together")
    flag("--micro_batch_size", type=int, help="images per forward and rank, to save memory")
    flag("--gradient_checkpointing", action="store_true", help="less memory, more time")
    flag("--lr", type=float, help="learning rate after the warmup")
    flag("--min_lr", type=float, help="at the last step, after warmup and hold")
    flag("--warmup", type=int, default=50, help="steps of linear warmup")
    flag("--hold", type=int, help=f"steps at --lr before the linear decay; else {hold} of --steps")
    flag("--seed", type=int, default=0, help="of everything random")

    # Machine and files
    flag("--out", default="out", help="folder for everything that is written and looked for")
    flag("--resume", action="store_true", help="go on from the state in --out, if there is one")
    flag("--overwrite", action="store_true", help="a new run over the old; with --resume: new data")
    flag("--log_every", type=int, default=50, help="steps between lines of the log; 0: at the end")
    flag("--eval_every", type=int, default=400, help="steps between measures; 0: at the end")
    flag("--eval_images", type=int, help="held-out images for the measures; 0: no measures")
    flag("--save_every", type=int, default=400, help="steps between saves; 0: at the end")
    flag("--device", default="auto", help="cuda, mps or cpu; auto is the best of them")
    flag("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="auto: bf16 on new GPUs")
    flag("--compile", action="store_true", help="torch.compile the transformer blocks")
    parser.set_defaults(**defaults)

    args = parser.parse_args()
    check_flags(parser, args, "steps", "batch_size", "micro_batch_size", *positive)
    if args.hold is None:
        args.hold = int(hold * args.steps)
    return args


def to_device(x, device):
    """A copy of x on the device, on CUDA while the CPU goes on (which pinned memory allows)."""
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def is_due(every, step, args):
    """Whether `step` is the last one or a multiple of `every` (0: never)."""
    return step == args.steps or step % (every or args.steps) == 0


def on_ctrl_c(step, rank=0):
    """From now on Ctrl-C ends the trainer in a line, which names the step that is saved."""
    line = f"stopped: --resume goes on from step {step}"
    signal.signal(signal.SIGINT, lambda *_: sys.exit(line if rank == 0 else 1))


def load_state(path, weights, must_match, args):
    """The state that a trainer saved at `path` after its `weights`, or None for a new run.
    must_match: {name: value} as it was then. All ranks do as the first: copies of data differ."""
    there, old_weights, must_match = of_first_rank((path.exists(), weights.exists(), must_match))
    if (there or old_weights) and not (args.resume or args.overwrite):
        raise SystemExit(f"{weights} is there already: give --resume, --overwrite or another --out")
    if not there or not args.resume:
        return None
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception:  # torch would advise to unpickle freely
        raise SystemExit(f"--resume: {path} is missing or not a whole training state") from None
    before = state["config"] | state["must_match"]
    for name, value in must_match.items():
        if before.get(name) != value and not (args.overwrite and name == "data"):
            raise SystemExit(f"--resume: {path} was made with {name} {before.get(name)} and not "
                             f"{value} (only data may differ, with --overwrite)")
    return state


def check_moments(step, optimizers):
    """Ends the run if a moment of Adam's is not finite, which would freeze a weight for ever."""
    for optimizer in optimizers:
        for moments in optimizer.state.values():
            check_finite(f"step {step}, Adam", moments)


def save_state(path, state):
    """Writes everything that --resume needs, and lets Ctrl-C name the step."""
    with atomic_write(path) as temporary:
        torch.save(state, temporary)
    on_ctrl_c(state["step"])


def split_batch(args, world_size, lowest=1):
    """Images of a rank, and of a micro-batch, in which there should be `lowest` or more."""
    per_rank = args.batch_size // world_size
    micro = args.micro_batch_size or per_rank
    if args.batch_size % world_size or per_rank % micro or micro < lowest:
        raise SystemExit(f"--batch_size {args.batch_size} does not divide into {world_size} ranks "
                         f"with micro-batches of {micro}, each of {lowest} or more images")
    return per_rank, micro


def for_training(model, args):
    """The model with --gradient_checkpointing, --compile and, between ranks, averaged gradients."""
    for module in model.modules():
        if isinstance(module, Transformer):
            module.gradient_checkpointing = args.gradient_checkpointing
    if args.compile:
        compile_blocks(model)
    if dist.is_initialized():
        model = DistributedDataParallel(model)
        model.broadcast_buffers = False  # the only ones, RoPE tables, never change
    return model.train()


def learning_rate(step, args):
    """At a step, counted from 1: linear warmup, --hold steps at --lr, then linear to --min_lr."""
    flat = args.warmup + args.hold
    warm = min(1, step / max(1, args.warmup))
    left = np.interp(step, [flat, max(flat + 1, args.steps)], [1, 0])  # of the decay
    return float(warm * (args.min_lr + (args.lr - args.min_lr) * left))  # torch.save wants no numpy


def log_line(step, lr, terms, seconds, args):
    """A line of the log: step, speed, and `terms`, {name: 0-dim tensor}, averaged over the ranks.
    Ends the run if one of them is not finite. seconds: of a step, in the mean since the start."""
    values = torch.stack(list(terms.values()))
    average(values)
    check_finite(f"step {step}", dict(zip(terms, values)))
    line = dict(step=step, lr=lr, images_per_s=args.batch_size / seconds,
                minutes_left=(args.steps - step) * seconds / 60)
    return line | dict(zip(terms, values.tolist()))


def write_log(line, path, args):
    """Appends a line to a trainer's log and shows some of it. A step's last line counts."""
    with open(path, "a") as log:
        print(json.dumps(line), file=log)
    words = [f"{text} {line[name]:.4g}" for name, text in SHOWN.items() if line.get(name)]
    if words:
        print(f"{line['step']}/{args.steps}", *words, sep="  ", flush=True)


def announce(model, start_step, log, args):
    """Prints the model's size and how far the run is. A new run begins its log with its flags, and
    removes the state of the run that it replaces, if any: all has been checked by now."""
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{size:.1f}M parameters; {start_step} of {args.steps} steps are done")
    if start_step == 0:
        log.with_suffix(".pt").unlink(missing_ok=True)
        write_log({"settings": vars(args)}, log, args)


if __name__ == "__main__":
    main()
