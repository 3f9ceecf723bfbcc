"""What every script needs and no script is about: errors, files, the machine, common flags, a training loop's habits. Read
tokenizer.py first; come here when a name leads here."""
import argparse
import contextlib
import functools
import hashlib
import inspect
import json
import os
import platform
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel


class InputError(ValueError):
    """What the user gave cannot be used; the message is one sentence that names it and says what would be right."""


@contextlib.contextmanager
def writing(path):
    """Yields a temporary path beside `path`; it becomes `path` only when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)  # safetensors leaves its files to their owner alone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, kind, tensors, cfg):
    """Weights and config in one safetensors file."""
    with writing(path) as temporary:
        safetensors.torch.save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary,
                                    metadata={"kind": kind, "config": json.dumps(cfg)})


def open_safetensors(path):
    """A safetensors file as {name: tensor}, memory-mapped, and its metadata. Raises InputError."""
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist")
    try:
        with safetensors.safe_open(path, "pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is not a whole safetensors file (cut off while copying?): {error}") from None


def read_checkpoint(path, kind):
    """Config and weights of a file that `save_checkpoint` wrote for `kind`. Raises InputError."""
    tensors, metadata = open_safetensors(path)
    if metadata.get("kind") != kind:
        raise InputError(f"{path} holds {metadata.get('kind', 'something else')!r} weights where {kind!r} weights are needed")
    return json.loads(metadata["config"]), tensors


class SharedRows:
    """A large array that all ranks fill on disk, each its own rows, and rank 0 then packs into an uncompressed .npz. `key` says
    all that the rows depend on: a run started again with the same key goes on with what it lacks; others are thrown away."""

    def __init__(self, path, shape, dtype, machine, key):
        self.target, self.machine = Path(path), machine
        stem = f".{self.target.name}.{hashlib.sha256(f'{key} {shape}'.encode()).hexdigest()[:16]}"
        self.paths = [self.target.with_name(stem + end) for end in (".rows", ".done")]
        if machine.rank == 0 and not all(path.exists() for path in self.paths):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            for path in self.target.parent.glob(f".{self.target.name}.*"):
                path.unlink()
            for path, *kind in zip(self.paths, (dtype, np.bool_), (tuple(shape), shape[:1])):
                np.lib.format.open_memmap(path, "w+", *kind).flush()
        machine.barrier()
        self.array, self.done = (np.lib.format.open_memmap(path, "r+") for path in self.paths)

    def missing(self):
        """This rank's share of the rows that are still to be written."""
        indices = np.flatnonzero(~self.done)
        self.machine.barrier()  # all have looked before one writes
        return np.array_split(indices, self.machine.world)[self.machine.rank]

    def write(self, indices, rows):
        self.array[indices] = rows
        self.done[indices] = True

    def pack(self, name, **others):
        """Writes {name: the array} and `others` as .npz; the array stays readable on rank 0."""
        self.array.flush()
        self.machine.barrier()
        if self.machine.rank == 0:
            with writing(self.target) as temporary, open(temporary, "wb") as f:
                np.savez(f, **{name: self.array}, **others)
            for path in self.paths:
                path.unlink()


def to_float(images):
    """uint8 -> float in [-1, 1]"""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """Images (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3) on the CPU; x/127.5 - 1 comes back as it was."""
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()


def save_grid(path, rows):
    """Rows of uint8 images (n, H, W, 3) as one PNG, small images enlarged, two white pixels between neighbours."""
    scale = max(1, 56 // rows[0].shape[1])
    height, width = (side * scale + 2 for side in rows[0].shape[1:3])
    sheet = np.full((len(rows) * height + 2, max(map(len, rows)) * width + 2, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(np.asarray(row).repeat(scale, 1).repeat(scale, 2)):
            sheet[i * height + 2:(i + 1) * height, j * width + 2:(j + 1) * width] = image
    with writing(path) as temporary:
        Image.fromarray(sheet).save(temporary, "png")


def run(main):
    """Runs a script's main; bad input ends it with one sentence and exit code 1."""
    try:
        main()
        if dist.is_initialized():  # together, and without Python's teardown, which gloo's threads do not always survive
            dist.barrier()
            dist.destroy_process_group()
            sys.stdout.flush()
            os._exit(0)
    except ValueError as error:
        if type(error).__name__ not in ("InputError", "BadInput"):  # the second is fid.py's
            raise  # from a DataLoader worker the first comes wrapped in that worker's traceback
        sys.exit(f"{Path(sys.argv[0]).name}: {str(error).split('InputError: ')[-1].strip()}")


def positive(text):
    """argparse type: a whole number above 0."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def training_parser(description, sizes, recipes):
    """A parser with --size and the flags that both trainers share, whose defaults are that size's recipe; and the size."""
    size = argparse.ArgumentParser(add_help=False)
    size.add_argument("--size", default="tiny", choices=sizes, help="sets the defaults below; see --size B --help")
    chosen = size.parse_known_args()[0].size
    parser = argparse.ArgumentParser(description=description, parents=[size],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    recipe = recipes[chosen]
    flag = parser.add_argument
    flag("--steps", type=positive, default=recipe["steps"], help="length of the whole run, which the learning rate follows")
    flag("--micro_batch_size", type=positive, help="images per forward and rank; by default all of the rank's share")
    flag("--gradient_checkpointing", action="store_true", help="less memory: blocks run once more in the backward")
    flag("--lr", type=float, default=recipe["lr"], help="learning rate after the warmup")
    flag("--min_lr", type=float, default=recipe["min_lr"], help="learning rate at the last step")
    flag("--warmup", type=int, default=recipe["warmup"], help="steps of linear warmup")
    flag("--hold", type=int, default=recipe["hold"], help="steps at --lr before the linear decay to --min_lr")
    flag("--log_every", type=positive, default=recipe["log_every"], help="steps between lines")
    flag("--eval_every", type=positive, default=recipe["eval_every"], help="steps between held-out measures and pictures")
    flag("--save_every", type=positive, default=recipe["save_every"], help="steps between saved states")
    flag("--resume", action="store_true", help="go on from the training state in --out, if there is one")
    common_flags(parser, recipe["batch_size"])
    return parser, chosen


def common_flags(parser, batch_size):
    """The flags that every script has."""
    flag = parser.add_argument
    flag("--out", default="out", help="folder for everything that is written and looked for")
    flag("--batch_size", type=positive, default=batch_size, help="images per step over all ranks together")
    flag("--seed", type=int, default=0, help="of everything random")
    flag("--device", default="auto", help="auto, cuda, mps or cpu")
    flag("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="auto is bf16 on CUDA and fp32 elsewhere")
    flag("--compile", action="store_true", help="torch.compile what is hot")
    flag("--num_workers", type=int, default=min(8, (os.cpu_count() or 1) // 2), help="processes that decode images, per rank")


# torch multiplies fp32 matrices on x86 by MKL, which takes slow paths on AMD processors; oneDNN, also in every build, does not.
ONEDNN = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")


def product(a, b, bias=None):
    """a (..., n) @ b.T for b (m, n), plus bias (m,): by oneDNN for fp32 on the CPU. No gradients: for those see Linear."""
    fits = ONEDNN and a.device.type == "cpu" and a.dtype == b.dtype == torch.float32 and a.numel()
    if not fits or torch.is_autocast_enabled("cpu"):
        return F.linear(a, b, bias)
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def packed(weight):
    """`weight` (m, n) in oneDNN's own order, which `product` of a few rows reads a third faster; itself where that has no use."""
    fits = ONEDNN and weight.device.type == "cpu" and weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return torch.ops.mkldnn._reorder_linear_weight(weight) if fits else weight


class ProductWithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        flat, needed = gradient.flatten(0, -2), ctx.needs_input_grad  # (T, m)
        return (product(gradient, weight.T) if needed[0] else None, product(flat.T, x.flatten(0, -2).T) if needed[1] else None,
                flat.sum(0) if needed[2] else None)


class Linear(nn.Linear):
    """nn.Linear by `product`."""

    def forward(self, x):
        plain = x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
        return super().forward(x) if plain else ProductWithGradients.apply(x, self.weight, self.bias)


@contextlib.contextmanager
def exact_fp32(device_type):
    """Products in true fp32: no autocast, no TF32. A TF32 code search picks another code for 0.15% of the tokens."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


class Machine:
    """Where a script runs: device, number type, rank and world size. A process group exists only under torchrun."""

    def __init__(self, args):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        name = args.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        try:
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"--device {name} cannot be used here ({str(error).splitlines()[0]}); try --device cpu") from None
        name = self.device.type
        bf16 = args.dtype == "bf16" or args.dtype == "auto" and name == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        if name == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32, which exact_fp32 turns off around the code search
        if args.batch_size % self.world:
            raise InputError(f"--batch_size {args.batch_size} cannot be divided among {self.world} ranks")
        if "RANK" in os.environ:
            dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo")
        from torch.utils._triton import has_triton  # there is none on Windows
        can_compile = {"cuda": has_triton, "cpu": lambda: shutil.which(os.environ.get("CXX", "g++"))}.get(name, lambda: False)
        self.compile = args.compile and bool(can_compile())
        from tokenizer import can_flash  # here, because tokenizer.py imports this file
        kernel = "flash-attn" if bf16 and can_flash(self.device) else "torch's scaled_dot_product_attention"
        self.print(f"{self.world} x {name}, {str(self.dtype)[6:]}, attention by {kernel}"
                   + (", compiled" if self.compile else ", uncompiled: --compile finds no compiler" if args.compile else ""))

    def autocast(self):
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def print(self, *text):
        if self.rank == 0:
            print(*text, flush=True)

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def share(self, tensor):
        """This rank's part of a tensor over the global batch."""
        return tensor.chunk(self.world)[self.rank]

    def sum(self, tensor):
        """The sum of a tensor over the ranks, on the CPU."""
        if self.world == 1:
            return tensor.cpu()
        tensor = tensor.to(self.device, copy=True)  # the caller's stays its rank's own
        dist.all_reduce(tensor)
        return tensor.cpu()

    def split(self, args):
        """The images of each rank and of each forward in a training step of --batch_size. Raises InputError."""
        per_rank = args.batch_size // self.world
        micro = args.micro_batch_size or per_rank
        if per_rank % micro:
            raise InputError(f"--micro_batch_size {micro} does not divide the {per_rank} images of each rank")
        return per_rank, micro

    def wrap(self, module):
        """The module in DistributedDataParallel where there are several ranks."""
        if self.world == 1:
            return module
        # Copying BatchNorm buffers before each forward would change tensors that the backward still needs.
        names = inspect.signature(DistributedDataParallel).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"  # torch renamed it
        return DistributedDataParallel(module, [self.device.index] if self.device.type == "cuda" else None, **{sync: False})

    def unsynced(self, module, yes):
        """A context in which a wrapped module's backward leaves its gradients on the rank, if `yes`."""
        return module.no_sync() if yes and self.world > 1 else contextlib.nullcontext()


def lr_at(step, args):
    """Linear warmup, a flat part of args.hold steps, then linear decay to args.min_lr at the last step."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = (step - args.warmup - args.hold) / max(1, args.steps - args.warmup - args.hold)
    return args.lr + (args.min_lr - args.lr) * min(1, max(0, done))


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, count):
    return np.random.default_rng((seed, epoch)).permutation(count)


def visited(seed, count, visits):
    """Dataset indices of the given visit numbers: the run walks through one permutation after another without a gap."""
    return [int(epoch_order(seed, visit // count, count)[visit % count]) for visit in visits]


def step_generator(seed, step):
    """Random numbers of a step, the same on every rank: each rank draws for the whole batch and takes its share."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))


@torch.no_grad()
def update_ema(ema, model, half_life):
    """ema <- model with the given half-life in steps."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - 0.5 ** (1 / max(half_life, 1e-3)))


def param_groups(modules):
    """AdamW groups for (module, betas, weight decay) triples; the decay falls on matrices only."""
    groups = []
    for module, betas, weight_decay in modules:
        trained = [p for p in module.parameters() if p.requires_grad]
        groups += [dict(params=[p for p in trained if p.ndim > 1], betas=betas, weight_decay=weight_decay),
                   dict(params=[p for p in trained if p.ndim < 2], betas=betas, weight_decay=0.0)]
    return groups


class Progress:
    """The .jsonl log and the line on screen of a training run; only rank 0 writes."""

    def __init__(self, path, machine, args, step):
        self.path, self.machine, self.args = Path(path), machine, args
        self.clock, self.images = time.perf_counter(), 0
        if machine.rank == 0:  # a resumed run forgets what was logged after its state was saved, and a line cut off by a kill
            old = self.path.read_text().splitlines() if step and self.path.exists() else []
            with writing(self.path) as temporary:
                temporary.write_text("".join(f"{x}\n" for x in old if x.endswith("}") and json.loads(x)["step"] <= step))

    def write(self, step, values):
        if self.machine.rank == 0:
            with open(self.path, "a") as f:
                f.write(json.dumps({"step": step} | values) + "\n")

    def line(self, step, values):
        """Logs and prints the values, means over the ranks, with images/s since the last line and the time left."""
        means = self.machine.sum(torch.tensor([v for v in values.values() if isinstance(v, float)])) / self.machine.world
        values |= dict(zip([k for k, v in values.items() if isinstance(v, float)], means.tolist()))
        seconds = time.perf_counter() - self.clock
        values["images_per_s"] = self.images / seconds
        left = (self.args.steps - step) * self.args.batch_size / values["images_per_s"]
        self.write(step, values)
        text = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        self.machine.print(f"step {step}/{self.args.steps}  {text}  left {int(left) // 60}:{int(left) % 60:02}")
        self.clock, self.images = time.perf_counter(), 0

    def end_step(self, step, referee, values, evaluate, save):
        """What follows a step where its turn has come: the line of `values`, saving, held-out measures. True ends the run."""
        self.images += self.args.batch_size
        done, final = step + 1, step + 1 == self.args.steps or referee.stop
        if done % self.args.log_every == 0 or final:
            self.line(done, {key: value.item() for key, value in values.items()} | {"lr": lr_at(step, self.args)})
        before = time.perf_counter()
        if done % self.args.save_every == 0 or final:
            save(done)  # before the measures: who asks a run to stop may not wait for them
        if done % self.args.eval_every == 0 or done == self.args.steps:
            if measured := evaluate():
                self.write(done, measured)
                self.machine.print("  held-out: " + "  ".join(f"{key[4:]} {value:.4g}" for key, value in measured.items()))
        self.clock += time.perf_counter() - before  # that time does not count against images/s
        if referee.stop:
            self.machine.print(f"asked to stop: saved after step {done}, go on with --resume")
        return final


class Referee:
    """All ranks agree on whether a step's losses were finite and whether somebody asked the run to stop."""

    def __init__(self, machine):
        self.machine, self.asked, self.stop, self.skipped, self.in_a_row = machine, False, False, 0, 0
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self.ask)

    def ask(self, *_):
        self.asked = True

    def step_counts(self, terms):
        """terms: {name: loss}. False if any is not finite on any rank; after 10 such steps in a row raises InputError."""
        finite = torch.stack([t.detach().isfinite().all() for t in terms.values()])
        verdict = torch.cat([~finite, finite.new_tensor([self.asked])]).int()
        if self.machine.world > 1:
            dist.all_reduce(verdict, dist.ReduceOp.MAX)
        *bad, stop = verdict.tolist()
        self.stop = bool(stop)
        if not any(bad):
            self.in_a_row = 0
            return True
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        first = list(terms)[bad.index(1)]
        self.machine.print(f"step skipped: {first} is not finite ({self.skipped} so far)")
        if self.in_a_row == 10:
            raise InputError(f"the loss term {first} was not finite for 10 steps in a row; try a lower --lr or --dtype fp32")
        return False


def save_state(path, step, settings, parts):
    """Writes the state of the modules and optimizers {name: part} after `step`; the file before it stays beside it."""
    with writing(path) as temporary:
        torch.save({name: part.state_dict() for name, part in parts.items()} | {"step": step, "settings": settings}, temporary)
        if path.exists():
            os.replace(path, path.with_suffix(".previous.pt"))


def load_state(path, resume, settings, parts, machine):
    """Loads the state at `path`, or the one before it, into `parts` if --resume asks for it; returns its step, or 0 where
    there is none. Raises InputError."""
    found = [p for p in (path, path.with_suffix(".previous.pt")) if p.exists()]
    if machine.sum(torch.tensor([len(found)])).item() != machine.world * len(found):
        raise InputError(f"not all ranks see the same files beside {path}: --out must be on a file system that all nodes share")
    if not found and resume:
        machine.print(f"--resume: there is no {path}, so this run begins at step 0")
    if not found or not resume:
        return 0
    try:
        state = torch.load(found[0], weights_only=True, map_location="cpu")
    except Exception as error:
        raise InputError(f"{found[0]} is not a whole training state ({str(error).splitlines()[0]}); remove it"
                         + (f" to go on from {found[1]}" if found[1:] else "")) from None
    for key, value in settings.items():
        if state["settings"].get(key) != value:
            raise InputError(f"--resume: {found[0]} was made with {key} {state['settings'].get(key)!r}, this run has {value!r}")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    machine.print(f"going on from step {state['step']}")
    return state["step"]
