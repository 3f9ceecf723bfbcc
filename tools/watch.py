"""gFID and rFID of a run while it trains, in a process of its own, for which the training does not
wait.

    CUDA_VISIBLE_DEVICES=0,1,2,3 torchrun --nproc_per_node 4 train_stage1.py --out out ... &
    CUDA_VISIBLE_DEVICES=7 python tools/watch.py out --eval_images 5000
    CUDA_VISIBLE_DEVICES=7 python tools/watch.py out --preset prologue-b-b --num 10000 \\
        --reference VIRTUAL_imagenet256_labeled.npz     # the same in stage 2
    python tools/watch.py out --once                    # only measures what is new now
    python tools/curves.py out --log watch.jsonl --keys val_gfid val_gfid_no_cfg

`out` is the --out folder of the run. Every --seconds it looks whether the trainer has saved a new
tokenizer.safetensors or ar.safetensors there, and measures it: rFID and PSNR of a tokenizer on
held-out images, gFID and Inception Score of an AR model with guidance and without. Each result is a
line of out/watch.jsonl. If the trainer saves more often than this can measure, some files are left
out. Beside a training on a GPU it needs another GPU, beside one on a CPU it slows both. It knows no
end: Ctrl-C stops it, and when it is started again it goes on with what is not in watch.jsonl yet.
"""

import argparse
import json
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sweep import Samples

import fid
from ar import AR, check_pair
from pretokenize import BUNDLED, Images, center_crop, default_val
from sample import PRESETS, cast_linears, default_preset, pack_for_cpu, preset_settings
from tokenizer import HelpFormatter, InputError, Tokenizer, real, whole, writing


class HeldOut:
    """`count` images spread evenly over all, as train_stage1.py chooses them, as centre crops of
    size x size: a source for fid.extract."""

    def __init__(self, path, count, size):
        self.images = Images(path)
        count = min(count, len(self.images))
        self.indices = [i * len(self.images) // count for i in range(count)]
        self.size = size

    def __len__(self):
        return len(self.indices)

    def crop(self, index):
        return center_crop(self.images.open(index), self.size)

    def __getitem__(self, rows):
        with ThreadPoolExecutor() as pool:
            return np.stack(list(pool.map(self.crop, self.indices[rows])))  # (n, size, size, 3)


# watch.jsonl


def read_log(path):
    """The lines of watch.jsonl."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def add_line(path, entry):
    """Adds a line. Later steps of the same file are from an earlier run in this folder: they go."""
    entries = [
        old for old in read_log(path) if old["file"] != entry["file"] or old["step"] < entry["step"]
    ]
    with writing(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in [*entries, entry]))
    words = [f"{name} {value:.4g}" for name, value in entry.items() if name.startswith("val_")]
    print(f"{entry['file']}, step {entry['step']}: {'  '.join(words)}", flush=True)


def saved_at(path):
    """When a file was written, or None if there is none."""
    return path.stat().st_mtime if path.exists() else None


def training_state(path):
    """The step and the flags of a training state, in which step is 0 if there is none."""
    if not path.exists():
        return 0, {}
    state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    return state["step"], state["args"]


def new_entry(out, file, saved):
    """A line without its measures. The step comes from the training state, which the trainers save
    just before the weights: their log may be many steps further on."""
    path = out / "train_stage1.pt"
    if file == "ar.safetensors" and (out / "train_ar.pt").exists():  # else it is a OneStage run
        path = out / "train_ar.pt"
    step, flags = training_state(path)
    images = step * flags.get("batch_size", 0)
    return {"step": step, "images": images, "file": file, "saved": saved}


# The measures


def measure_tokenizer(tokenizer, originals, network, device, batch_size):
    """originals: a HeldOut, and what fid.extract returned for it."""
    images, features = originals
    decoded = fid.Reconstructions(images, tokenizer, {"psnr": fid.psnr}, device)
    measured = fid.extract(network, decoded, device, batch_size, "reconstructions")
    rfid = fid.frechet_distance(*measured["pool"], *features["pool"])
    return {"val_rfid": rfid, "val_psnr": decoded.means()["psnr"]}


def measure_ar(tokenizer, ar, args, network, reference, device, autocast):
    """gFID and Inception Score with guidance, and without under names that end in _no_cfg."""
    if args.dtype == "bf16":
        cast_linears(ar, torch.bfloat16)
    elif device.type == "cpu":
        pack_for_cpu(ar)
    entry = {}
    for ending, no_cfg in (("", False), ("_no_cfg", True)):
        settings = preset_settings(args.preset or default_preset(ar), no_cfg)
        samples = Samples(tokenizer, ar, args.num, args.seed, settings, autocast)
        drawn = fid.extract(network, samples, device, args.batch_size, f"samples{ending}")
        gfid = fid.frechet_distance(*drawn["pool"], *reference["pool"])
        entry[f"val_gfid{ending}"] = gfid
        entry[f"val_inception_score{ending}"] = drawn["inception_score"]
    return entry


def parse_args():
    parser = argparse.ArgumentParser(description="gFID and rFID of a run while it trains.",
                                     formatter_class=HelpFormatter)
    flag = parser.add_argument
    flag("out", help="the --out folder of the run")
    flag("--once", action="store_true", help="measure what is new and end")
    flag("--seconds", type=real(0.1), default=30, help="between two looks")

    # Tokenizer
    flag("--val_data", help="held-out images; by default those of the training")
    flag("--eval_images", type=whole(2), default=1000, help="held-out images for rFID")

    # AR model
    flag("--tokenizer",
         help="tokenizer file, if the run is one of stage 2 that has none in its folder")
    flag("--num", type=whole(2), default=2000, help="images for each gFID")
    flag("--reference",
         help="npz, folder or zip that gFID compares with; by default the training images")
    flag("--preset", choices=PRESETS,
         help="guidance; by default the AR file's own or tiny, for a model of one class unguided")
    flag("--seed", type=whole(0), default=0, help="of the noise")

    # Machine
    flag("--inception", metavar="FILE", help="torch-fidelity's weights, else they are downloaded")
    flag("--batch_size", type=whole(1), default=100, help="images at a time")
    flag("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"],
         help="auto is what torch finds")
    flag("--dtype", default="fp32", choices=["fp32", "bf16"],
         help="of the networks that draw; all else is in fp32 always")
    return parser.parse_args()


@torch.no_grad()
def main():
    args = parse_args()
    out = Path(args.out)
    log = out / "watch.jsonl"
    tokenizer_path = Path(args.tokenizer or out / "tokenizer.safetensors")
    ar_path = out / "ar.safetensors"

    # Device
    available = "cpu"
    if torch.accelerator.is_available():
        available = torch.accelerator.current_accelerator().type  # cuda, or mps on a Mac
    if args.device not in ("auto", "cpu", available):
        raise InputError(
            f"--device {args.device} cannot be used: torch finds only {available} here"
        )
    device = torch.device(available if args.device == "auto" else args.device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16")

    # The run may not have saved anything yet
    while not tokenizer_path.exists():
        if args.once or args.tokenizer:
            raise InputError(f"{tokenizer_path} does not exist, there is nothing to measure")
        time.sleep(args.seconds)

    # Network and data, by default those of the training. What both sides are compared with is
    # computed when it is needed first.
    size = Tokenizer.load(tokenizer_path).cfg.image_size
    network = fid.feature_network("auto", size, args.inception, device)[1]
    flags = training_state(tokenizer_path.with_name("train_stage1.pt"))[1]
    data = flags.get("data", str(BUNDLED / "train"))
    val_data = args.val_data or flags.get("val_data") or default_val(data) or data
    originals = None
    reference = None

    measured = {entry["file"]: entry["saved"] for entry in read_log(log)}  # the newest of each
    refused = None
    while True:
        # The times come first: a file that is replaced while it is measured is new once more
        tokenizer_saved = saved_at(tokenizer_path)
        ar_saved = saved_at(ar_path)

        # Tokenizer
        if not args.tokenizer and tokenizer_saved != measured.get("tokenizer.safetensors"):
            tokenizer = Tokenizer.load(tokenizer_path).to(device)
            entry = new_entry(out, "tokenizer.safetensors", tokenizer_saved)
            if originals is None:
                images = HeldOut(val_data, args.eval_images, size)
                title = f"features of {val_data}"
                features = fid.extract(network, images, device, args.batch_size, title)
                originals = (images, features)
            entry |= measure_tokenizer(tokenizer, originals, network, device, args.batch_size)
            add_line(log, entry)
            measured["tokenizer.safetensors"] = tokenizer_saved

        # AR model
        pair = (tokenizer_saved, ar_saved)
        if ar_saved not in (None, measured.get("ar.safetensors")) and pair != refused:
            tokenizer = Tokenizer.load(tokenizer_path).to(device)
            ar = AR.load(ar_path).to(device)
            try:
                check_pair(tokenizer, ar, names=(tokenizer_path, ar_path))
            except InputError as error:  # stage 1 goes on, or OneStage is saving the second file
                print(f"not measured: {error}", flush=True)
                refused = pair
            else:
                entry = new_entry(out, "ar.safetensors", ar_saved)
                if reference is None:
                    reference = fid.reference_features(args.reference or data, network, device,
                                                       args.batch_size, size)
                entry |= measure_ar(tokenizer, ar, args, network, reference, device, autocast)
                add_line(log, entry)
                measured["ar.safetensors"] = ar_saved

        if args.once:
            break
        time.sleep(args.seconds)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it on the spot, nothing is half done
    main()
