"""Stage 2: train the AR model that generates, from scratch on the frozen tokenizer's codes.

    python train_ar.py                                          # tiny, out/codes.npz, minutes
    torchrun --nproc_per_node 8 train_ar.py --size B ...        # see recipes/ar_b_b.sh

One step: for each image one of its tokenized crops is drawn, for a tenth of the images the class is
replaced by "unconditional" (which classifier-free guidance needs), and the cross-entropy of
[prologue, EOS, visual] is the whole loss.

In --out it leaves ar.safetensors (the raw weights, which are sampled), train_ar.jsonl (the log),
train_ar.png (samples of the first classes, without guidance) and train_ar.pt (the state for
--resume).
"""

import argparse
import functools
import hashlib
import json
import math
import os
import shutil
import signal
import time
import zipfile
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from ar import AR, SIZES, ARConfig, check_pair
from pretokenize import save_grid
from tokenizer import (HelpFormatter, InputError, Tokenizer, TokenizerConfig, attention_backend,
                       real, to_uint8, whole, writing)

# Data


class Tokens:
    """A token file of pretokenize.py. Raises InputError if it is damaged.

    codes: (images, crops, K+N) uint16. labels: (images,) int64. classes: their names. cfg and
    fingerprint: of the tokenizer that made the codes.
    """

    def __init__(self, path):
        if not Path(path).is_file():
            raise InputError(f"{path} does not exist; pretokenize.py makes it, or give --codes")
        try:
            with np.load(path, allow_pickle=False) as file:
                self.codes = file["codes"]
                self.labels = file["labels"]
                config = json.loads(str(file["config"]))
            self.cfg = TokenizerConfig(**config["tokenizer"])
            self.classes = config["classes"]
            self.fingerprint = config["fingerprint"]
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} is no whole token file of pretokenize.py: {error}") from None
        k = self.cfg.num_prologue
        n = self.cfg.num_visual
        if self.codes.dtype != np.uint16 or self.codes.ndim != 3 or self.codes.shape[2] != k + n:
            raise InputError(f"{path}: codes are {self.codes.dtype} {self.codes.shape} and should "
                             f"be uint16 (images, crops, {k + n})")
        if self.codes.size == 0 or self.labels.shape != self.codes.shape[:1]:
            raise InputError(f"{path}: codes {self.codes.shape} and labels {self.labels.shape} "
                             "should be of the same images, one of them and one crop at least")
        if not np.isin(self.labels, np.arange(len(self.classes))).all():
            raise InputError(f"{path}: labels should be from 0 to {len(self.classes) - 1}")
        too_large = self.codes[..., k:].max() >= self.cfg.codebook_size
        if k > 0 and self.codes[..., :k].max() >= self.cfg.prologue_codebook_size:
            too_large = True
        if too_large:
            raise InputError(f"{path}: there are codes beyond the end of the codebook")

    def batch(self, images, crops, device):
        """Codes (B, K+N) and labels (B,), int64, of image numbers (B,) and crop numbers (B,)."""
        codes = torch.from_numpy(self.codes[images, crops].astype(np.int64))
        labels = torch.from_numpy(self.labels[images].astype(np.int64))
        return codes.to(device), labels.to(device)

    def drop_classes(self):
        """From now on all images are of one class."""
        self.classes = ["all"]
        self.labels[:] = 0

    def digest(self):
        """A short hash of the codes."""
        return hashlib.sha256(np.ascontiguousarray(self.codes)).hexdigest()[:16]


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, count):
    return np.random.default_rng((seed, epoch)).permutation(count)


def visited_image(seed, visit, count):
    """As in train_stage1.py: index of the image at a visit. Visits number the images that training
    reads, from 0, over all epochs and ranks; each epoch is a new random order."""
    return int(epoch_order(seed, visit // count, count)[visit % count])


# Model and optimization


def build_model(args, tokens, tokenizer, rank):
    """A new AR model for the codes, or one that starts from the weights of --init, whatever its
    classes are. Raises InputError if its codes have other sizes."""
    torch.manual_seed(args.seed)
    cfg = ARConfig.for_tokenizer(tokens.cfg, **SIZES[args.size], num_classes=len(tokens.classes),
                                 classes=tokens.classes, dropout=args.dropout,
                                 tokenizer=tokens.fingerprint)
    if args.init is None:
        return AR(cfg)
    old = AR.load(args.init)
    if old.cfg.tokenizer not in ("", tokens.fingerprint) and rank == 0:
        print(f"note: --init {args.init} was trained on codes of another tokenizer")
    old.cfg.tokenizer = ""  # only the sizes have to agree
    check_pair(tokenizer, old, names=("the tokenizer", args.init))
    ar = AR(replace(cfg, layers=old.cfg.layers, dim=old.cfg.dim, head_dim=old.cfg.head_dim,
                    preset=old.cfg.preset))
    weights = old.state_dict()
    # A model that does not name its classes keeps their embeddings if there are as many as here
    same_numbers = not old.cfg.classes and old.cfg.num_classes == cfg.num_classes
    if not same_numbers:
        weights["bos.weight"] = class_embeddings(weights["bos.weight"], old.cfg.classes,
                                                 cfg.classes)
        new = len(set(cfg.classes) - set(old.cfg.classes))
        if new > 0 and rank == 0:
            print(f"{new} of {len(cfg.classes)} classes are new to {args.init}")
    ar.load_state_dict(weights)
    return ar


def class_embeddings(old, old_classes, classes):
    """Class embeddings `old` (old classes + 1, D) -> (classes + 1, D). A class keeps its own, a new
    one starts as the mean of all, or as the unconditional one if there were no classes. The last
    row, which means unconditional, stays the last."""
    start = old[-1]
    if len(old) > 1:
        start = old[:-1].mean(0)
    known = dict(zip(old_classes, old))
    rows = [known.get(name, start) for name in classes]
    return torch.stack([*rows, old[-1]])


def adamw_groups(module, betas, weight_decay):
    """AdamW's parameter groups: weight decay on matrices only."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim < 2]
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


# Held-out measures


@torch.no_grad()
def evaluate(ar, tokens, count, device, autocast, rank, world_size):
    """Nats per image and top-1 accuracy of each token group, given the class, over the first crops
    of `count` images, of which each rank takes a share."""
    count = min(count, len(tokens.codes))
    sums = defaultdict(float)
    # Spread evenly, because images are sorted by class
    indices = [i * len(tokens.codes) // count for i in range(rank, count, world_size)]
    for i in range(0, len(indices), 64):
        codes, labels = tokens.batch(indices[i : i + 64], 0, device)
        with autocast:
            measures = ar.measure(codes, labels)
        for name, values in measures.items():
            sums[name] += values.sum().item()
    if world_size > 1:
        of_each_rank = [None] * world_size
        dist.all_gather_object(of_each_rank, sums)
        sums = defaultdict(float)
        for part in of_each_rank:
            for name, value in part.items():
                sums[name] += value
    result = {f"val_{name}": value / count for name, value in sums.items()}
    nats = [value for name, value in result.items() if name.startswith("val_nats")]
    return {"val_nats": sum(nats)} | result


@torch.no_grad()
def save_samples(path, ar, tokenizer, seed, device, autocast):
    """Ten samples of each of the first classes, without guidance, with the same noise each time."""
    labels = torch.arange(min(10, ar.cfg.num_classes), device=device).repeat_interleave(10)
    with autocast:
        codes = ar.generate(labels, generator=torch.Generator().manual_seed(seed))
        images = to_uint8(tokenizer.decode(codes))
    save_grid(path, images.split(10))


# State and log


def save_state(path, step, fixed, args, ar, optimizer):
    """Writes all that `load_state` needs. Raises InputError, and leaves the state that is there,
    if weights are not finite."""
    if not all(p.isfinite().all() for p in ar.parameters()):
        raise InputError(f"step {step}: the weights are not finite, nothing is saved")
    state = {"step": step, "fixed": fixed, "args": args}
    state["ar"] = ar.state_dict()
    state["optimizer"] = optimizer.state_dict()
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


def parse_args():
    parser = argparse.ArgumentParser(
        description="Train an AR model. Defaults are the tiny demo's, recipes/ has the paper's.",
        formatter_class=HelpFormatter)
    flag = parser.add_argument

    # Data and model
    flag("--codes", help="token file; by default codes.npz in --out")
    flag("--val_codes",
         help="held-out token file; by default --codes with _val in its name, if there is one")
    flag("--tokenizer",
         help="tokenizer file that made the codes; by default tokenizer.safetensors in --out")
    flag("--no_classes", action="store_true",
         help="an unconditional model: all images count as one class")
    flag("--size", default="tiny", choices=SIZES, help="of the AR model")
    flag("--init", metavar="AR",
         help="AR file whose weights to start from; its size counts, its classes may be others")
    flag("--dropout", type=real(0, 0.99), default=0.1,
         help="on embedding, attention output and MLP output")
    flag("--class_dropout", type=real(0, 1), default=0.1,
         help="share of images trained without their class")

    # Optimization
    flag("--steps", type=whole(1), default=1300,
         help="of the whole run; the learning rate follows it")
    flag("--batch_size", type=whole(1), default=32, help="images per step, over all ranks together")
    flag("--micro_batch_size", type=whole(1),
         help="images per forward and rank, to save memory; by default all of a rank")
    flag("--gradient_checkpointing", action="store_true",
         help="less memory: blocks run once more in the backward")
    flag("--lr", type=real(0), default=1e-3, help="learning rate after the warmup")
    flag("--min_lr", type=real(0), default=1e-5, help="learning rate at the last step")
    flag("--warmup", type=whole(0), default=50, help="steps of linear warmup")
    flag("--hold", type=whole(0), default=300,
         help="steps at --lr, then linear decay over what is left of --steps")
    flag("--beta2", type=real(0, 0.9999), default=0.96, help="of AdamW; beta1 is 0.9")
    flag("--weight_decay", type=real(0), default=0.03, help="on matrices only")
    flag("--grad_clip", type=real(0), default=1.0, help="largest gradient norm; 0 is off")
    flag("--seed", type=whole(0), default=0, help="of everything random")

    # Machine and files
    flag("--out", default="out", help="folder for everything that is written and looked for")
    flag("--resume", action="store_true", help="go on from the state in --out, if there is one")
    flag("--log_every", type=whole(1), default=50, help="steps between lines of the log")
    flag("--wandb", metavar="PROJECT",
         help="also send the log to this project at Weights & Biases (pip install wandb)")
    flag("--eval_every", type=whole(1), default=400,
         help="steps between held-out measures and pictures")
    flag("--eval_images", type=whole(1), default=2000, help="held-out images for the measures")
    flag("--save_every", type=whole(1), default=400, help="steps between saved states")
    flag("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"],
         help="auto is what torch finds")
    flag("--dtype", default="auto", choices=["auto", "fp32", "bf16"],
         help="auto is bf16 on GPUs that have it (Ampere and later), else fp32")
    flag("--compile", action="store_true", help="torch.compile the transformer blocks")
    return parser.parse_args()


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

    # Data and tokenizer, which must belong together
    codes_path = Path(args.codes or out / "codes.npz")
    tokens = Tokens(codes_path)
    val_path = Path(args.val_codes or codes_path.with_name(f"{codes_path.stem}_val.npz"))
    val_tokens = None
    if args.val_codes or val_path.exists():
        val_tokens = Tokens(val_path)
    if args.no_classes:
        tokens.drop_classes()
        if val_tokens is not None:
            val_tokens.drop_classes()
    if val_tokens is not None:
        if val_tokens.classes != tokens.classes:
            raise InputError(f"{val_path} and {codes_path} have different classes: "
                             f"{val_tokens.classes[:3]}... and {tokens.classes[:3]}...")
        if val_tokens.fingerprint != tokens.fingerprint:
            raise InputError(f"{val_path} and {codes_path} are of different tokenizers")
    tokenizer_path = Path(args.tokenizer or out / "tokenizer.safetensors")
    tokenizer = Tokenizer.load(tokenizer_path).to(device)
    if tokenizer.fingerprint() != tokens.fingerprint:
        raise InputError(f"{codes_path} was made by another tokenizer than {tokenizer_path}; run "
                         "pretokenize.py again")

    # Model and optimizer
    ar = build_model(args, tokens, tokenizer, rank).to(device)
    groups = adamw_groups(ar, betas=(0.9, args.beta2), weight_decay=args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    if rank == 0:
        parameters = sum(p.numel() for p in ar.parameters()) / 1e6
        images, crops, length = tokens.codes.shape
        print(f"{parameters:.1f}M parameters, {len(tokens.classes)} classes, {images} images x "
              f"{crops} crops x {length} codes", flush=True)
        if args.batch_size > images:
            print(f"note: a batch holds some of the {images} images more than once")

    # Resume
    fixed = dict(  # must not change on --resume
        ar=asdict(ar.cfg),
        codes=tokens.digest(),
        batch_size=args.batch_size,
        seed=args.seed,
    )
    start_step = 0
    if rank == 0 and not args.resume and (out / "train_ar.pt").exists():
        print(f"note: this replaces the run in {out}; --resume goes on with it")
    if args.resume:
        parts = {"ar": ar, "optimizer": optimizer}
        start_step = load_state(out / "train_ar.pt", fixed, vars(args), parts, rank, world_size)
        for group, given in zip(optimizer.param_groups, groups):  # flags win over the state
            group["betas"] = given["betas"]
            group["weight_decay"] = given["weight_decay"]

    # Compilation and ranks. Block by block, so that equal blocks are compiled once.
    ar.transformer.gradient_checkpointing = args.gradient_checkpointing
    if args.compile:
        for block in ar.transformer.blocks:
            block.compile(dynamic=False)
    model = ar
    if world_size > 1:
        model = DistributedDataParallel(ar)

    # On SIGTERM or Ctrl-C: finish the step, save, end
    stop = torch.zeros(1)
    signal.signal(signal.SIGTERM, lambda *_: stop.fill_(1))
    signal.signal(signal.SIGINT, lambda *_: stop.fill_(1))

    # The loop
    wandb_run = None
    if rank == 0:
        if args.wandb and start_step < args.steps:
            wandb_run = start_wandb(args, "train_ar")
        start_log(out / "train_ar.jsonl", start_step)
    ar.train()
    skipped = torch.zeros((), device=device)  # steps in a row, up to now
    asked_to_stop = torch.zeros(1)
    start = time.perf_counter()
    clock = start
    clock_step = start_step
    for step in range(start_step + 1, args.steps + 1):
        # Learning rate
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        optimizer.zero_grad()

        # Random numbers are drawn for the global batch, of which each rank takes its slice; only
        # for dropout each rank draws its own
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        torch.manual_seed((args.seed * 1_000_003 + step) * world_size + rank)
        of_rank = slice(rank * per_rank, (rank + 1) * per_rank)
        first = (step - 1) * args.batch_size
        visits = range(first, first + args.batch_size)[of_rank]
        images = np.array([visited_image(args.seed, v, len(tokens.codes)) for v in visits])
        num_crops = tokens.codes.shape[1]
        crops = torch.randint(num_crops, (args.batch_size,), generator=generator)[of_rank].numpy()
        unlabelled = torch.rand(args.batch_size, generator=generator)[of_rank] < args.class_dropout

        loss_of_step = 0.0
        for i in range(0, per_rank, micro):
            # Forward and loss
            codes, labels = tokens.batch(images[i : i + micro], crops[i : i + micro], device)
            labels = labels.masked_fill(unlabelled[i : i + micro].to(device), ar.cfg.num_classes)
            if world_size > 1:  # gradients travel between the ranks once per step
                model.require_backward_grad_sync = i + micro == per_rank
            with autocast:
                logits = model(codes, labels)  # (B, L, vocabulary)
            loss = F.cross_entropy(logits.flatten(0, 1), ar.sequence(codes).flatten())

            # Backward
            (loss * micro / per_rank).backward()
            loss_of_step += loss.detach() * micro / per_rank

        # Step. If a gradient is not finite (then it is so on all ranks, which have averaged them),
        # found_inf makes fused AdamW skip the update, without a value that the CPU has to wait for.
        norm = torch.nn.utils.clip_grad_norm_(ar.parameters(), args.grad_clip or math.inf)
        finite = norm.isfinite()
        optimizer.found_inf = (~finite).float()
        optimizer.step()
        skipped = torch.where(finite, torch.zeros_like(skipped), skipped + 1)

        # All ranks stop at the same step. A copy is reduced: a signal may set `stop` meanwhile.
        asked_to_stop = stop.clone()
        if world_size > 1:
            dist.all_reduce(asked_to_stop, dist.ReduceOp.MAX)
        last = step == args.steps or bool(asked_to_stop)

        # Log
        if step % args.log_every == 0 or last:
            values = torch.stack([loss_of_step, norm])
            if world_size > 1:
                dist.all_reduce(values)
            ce, grad_norm = (values / world_size).tolist()
            seconds = time.perf_counter() - clock
            entry = {"step": step, "images": step * args.batch_size, "ce": ce}
            entry["nats"] = ce * ar.length  # per image
            entry["grad_norm"] = grad_norm
            entry["lr"] = learning_rate(step, args)
            entry["images_per_s"] = (step - clock_step) * args.batch_size / seconds
            if rank == 0:
                write_log(out / "train_ar.jsonl", entry, wandb_run)
                left = (args.steps - step) * args.batch_size / entry["images_per_s"]
                print(f"{as_text(entry)}  {left / 60:.0f} min left", flush=True)
            if skipped >= 10:
                bad = "the cross-entropy" if not math.isfinite(ce) else "the gradient"
                raise InputError(f"{bad} has not been finite for {int(skipped)} steps, which were "
                                 "skipped; try --resume with a lower --lr")
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
            ar.eval()
            with torch.compiler.set_stance("force_eager"):  # other shapes than the loop's
                if val_tokens is not None:
                    entry = evaluate(ar, val_tokens, args.eval_images, device, autocast, rank=rank,
                                     world_size=world_size)
                    if rank == 0:
                        write_log(out / "train_ar.jsonl", {"step": step} | entry, wandb_run)
                        print(f"  held out: {as_text(entry)}", flush=True)
                if rank == 0:
                    save_samples(out / "train_ar.png", ar, tokenizer, args.seed, device, autocast)
            ar.train()

        # Save, behind the measures: a run that is killed while measuring goes on from before them
        if (step % args.save_every == 0 or last) and rank == 0:
            save_state(out / "train_ar.pt", step, fixed, vars(args), ar, optimizer)
            ar.save(out / "ar.safetensors")
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
