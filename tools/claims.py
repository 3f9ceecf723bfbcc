"""What a prologue is for, in miniature: each cell is a run of the ordinary scripts on all 60,000
images of Fashion-MNIST, a row with a seed, and all rows have the same steps.

    python tools/claims.py --jobs 2                     # all rows, four seeds, into claims/
    python tools/claims.py 2d post --seeds 4            # some
    python tools/claims.py --scale 10 --out claims10    # ten times the steps, for a GPU
    python tools/claims.py --report                     # only the table of what is there

A cell trains a tokenizer, or takes that of another row, and an AR model on its tokens; tries a grid
of sampling settings, the same for all, on 500 samples each; and measures the best on 2,000 samples
of another seed against the 10,000 bundled training images. It goes on where it was stopped.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pretokenize import BUNDLED, save_grid
from tokenizer import atomic_write, read_safetensors, save_checkpoint


@dataclass
class Row:
    flags: str = ""  # of train_stage1.py
    init: str = ""  # the row whose tokenizer the layout post freezes
    tokenizer: str = ""  # the row whose tokenizer is taken; then none is trained
    prologue: str = "learned"  # or what stands in its place: "constant", "class"
    classes: bool = False  # whether the AR model is told them


ROWS = {
    "2d": Row("--layout 2d"),
    "2d, classes": Row(tokenizer="2d", classes=True),
    "prologue": Row("--layout prologue --tau 1"),
    "prologue, lambda 1": Row("--layout prologue --tau 1 --ce_weight 1"),
    "prologue, lambda 6": Row("--layout prologue --tau 1 --ce_weight 6"),
    "post": Row("--layout post --tau 1", init="2d"),
    "constant": Row(tokenizer="post", prologue="constant"),
    "the class": Row(tokenizer="post", prologue="class"),
    "post, classes": Row(tokenizer="post", classes=True),
}

STAGE1 = dict(size="tiny", steps=4000, batch_size=32, lr=5e-4, min_lr=5e-5, warmup=50, hold=1600)
STAGE2 = dict(size="nano", steps=600, batch_size=32, lr=1e-3, min_lr=1e-5, warmup=50, hold=200)

# The grids without and with guidance; the last axis only where there is a prologue
PLAIN = ["temperature=0.4,0.5,0.6,0.7,0.8,0.9,0.95,1,1.05", "temperature_prologue=0.7,0.85,1"]
GUIDED = ["temperature=0.7,0.8,0.9", "cfg_visual=2,3,4,6", "cfg_prologue=1,1.5,2.5"]

# Column of the table: value of a cell
COLUMNS = {"rFID": "rfid", "PSNR": "psnr", "nats prologue": "val_nats_prologue",
           "nats visual": "val_nats_visual", "gFID": "gfid", "gFID / that of 2d": "share",
           "temperatures": "settings", "gFID guided": "guided_gfid",
           "temperature and scales": "guided_settings"}


def script(folder, name, *words, **flags):
    """Runs a script on one core, with all that it prints in cell.log; returns its output."""
    for flag, value in flags.items():
        words += (f"--{flag}", value)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "cell.log", "a") as log:
        result = subprocess.run([sys.executable, ROOT / name, *map(str, words)], stderr=log,
                                stdout=subprocess.PIPE, text=True,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})
        log.write(result.stdout)
    if result.returncode != 0:
        raise SystemExit(f"{name} failed, see {folder / 'cell.log'}")
    return result.stdout


def best(folder, name, axes, *flags, seed):
    """The best of the settings `axes`, and gFID with them."""
    out = folder / name
    script(folder, "tools/sweep.py", *axes, *flags, pair=folder, out=out, num_samples=500,
           reference=BUNDLED / "train")
    row = json.loads((out / "sweep.json").read_text())["rows"][0]
    settings = {axis.partition("=")[0]: row[axis.partition("=")[0]] for axis in axes}
    script(folder, "sample.py", *flags, pair=folder, out=out, num_samples=2000, seed=100 + seed,
           **settings)
    scores = script(folder, "fid.py", out / "samples.npz", BUNDLED / "train")
    return "/".join(map(str, settings.values())), json.loads(scores)["fid"]


def copy_tokens(source, target, row):
    """Copies the tokens in the folder `source` to `target`: without classes, and with a prologue
    that says nothing, or whose first token is the class, if the row says so."""
    for name in ("codes.safetensors", "codes_val.safetensors"):
        tensors, config = read_safetensors(source / name, "codes")
        codes = tensors["codes"].clone()  # (images, crops, K+N)
        labels = tensors["labels"].clone()
        if row.prologue != "learned":
            codes[..., : config["tokenizer"]["num_prologue"]] = 0
        if row.prologue == "class":
            codes[..., 0] = labels[:, None]
        if not row.classes:
            labels.zero_()
            config["classes"] = ["all"]
        save_checkpoint(target / name, "codes", dict(codes=codes, labels=labels), config)


class Cells:
    def __init__(self, args):
        self.out = Path(args.out)
        self.data = self.out / "fashion_mnist_full.zip"
        self.scale = args.scale
        # Held while a tokenizer is trained
        self.locks = {(name, seed): threading.Lock() for name in ROWS for seed in args.seeds}

    def folder(self, name, seed):
        return self.out / f"{name.replace(',', '').replace(' ', '_')}-s{seed}"

    def train(self, folder, name, settings, *flags, **more):
        steps = int(settings["steps"] * self.scale)
        settings = settings | dict(steps=steps, hold=int(settings["hold"] * self.scale))
        script(folder, name, "--resume", *flags, out=folder, save_every=500, eval_every=steps,
               **settings, **more)

    def tokenizer(self, name, seed):
        """The folder of a row's tokenizer, with its tokens and rfid.json, which is made last."""
        row = ROWS[name]
        if row.tokenizer:
            return self.tokenizer(row.tokenizer, seed)
        folder = self.folder(name, seed)
        flags = row.flags.split()
        if row.init:
            flags += ["--init", self.tokenizer(row.init, seed) / "tokenizer.safetensors"]
        with self.locks[name, seed]:
            if not (folder / "rfid.json").exists():
                data = self.data / "train"
                self.train(folder, "train_stage1.py", STAGE1, *flags, data=data, seed=seed)
                script(folder, "pretokenize.py", out=folder, data=data)
                scores = script(folder, "fid.py", BUNDLED / "val",
                                tokenizer=folder / "tokenizer.safetensors")
                with atomic_write(folder / "rfid.json") as temporary:
                    temporary.write_text(scores)
        return folder

    def run(self, name, seed):
        """Everything of a cell; the result is cell.json."""
        row = ROWS[name]
        folder = self.folder(name, seed)
        if (folder / "cell.json").exists():
            return
        source = self.tokenizer(name, seed)
        copy_tokens(source, folder / "tokens", row)
        self.train(folder, "train_ar.py", STAGE2, seed=seed,
                   codes=folder / "tokens" / "codes.safetensors",
                   tokenizer=source / "tokenizer.safetensors")

        cell = json.loads((source / "rfid.json").read_text())
        for line in (folder / "train_ar.jsonl").read_text().splitlines():
            cell |= json.loads(line)  # the last value of each stays; "settings" comes below
        cell |= dict(row=name, seed=seed, folder=str(folder))
        axes = slice(None if "val_nats_prologue" in cell else -1)
        cell["settings"], cell["gfid"] = best(folder, "plain", PLAIN[axes], "--no_cfg", seed=seed)
        if row.classes:
            guided = best(folder, "guided", GUIDED[axes], seed=seed)
            cell["guided_settings"], cell["guided_gfid"] = guided
        with atomic_write(folder / "cell.json") as temporary:
            temporary.write_text(json.dumps(cell, indent=1))
        print(f"{name}, seed {seed}: gFID {cell['gfid']:.2f} at {cell['settings']}", flush=True)


def column_text(cells, key):
    """The mean over the seeds, if there is one, and then the value of each."""
    values = [cell[key] for cell in cells if key in cell]
    if not values or isinstance(values[0], str):
        return "; ".join(values)
    each = ", ".join(f"{value:.2f}" for value in values)
    return f"{np.mean(values):.2f} ({each})"


def report(out):
    """Prints the table; claims.png has samples for each of its rows, of its first seed, beside the
    row's name and best temperatures."""
    cells = [json.loads(path.read_text()) for path in out.glob("*/cell.json")]
    cells.sort(key=lambda cell: cell["seed"])
    print(f"| row | seeds | {' | '.join(COLUMNS)} |\n{'| --- ' * (len(COLUMNS) + 2)}|")
    pictures = []
    labels = []
    for name, row in ROWS.items():
        of_row = [cell for cell in cells if cell["row"] == name]
        if not of_row:
            continue
        base = "2d, classes" if row.classes else "2d"
        gfids = {cell["seed"]: cell["gfid"] for cell in cells if cell["row"] == base}
        for cell in of_row:
            cell["share"] = cell["gfid"] / gfids.get(cell["seed"], np.nan)
        seeds = ", ".join(str(cell["seed"]) for cell in of_row)
        texts = [column_text(of_row, key) for key in COLUMNS.values()]
        print(f"| {name} | {seeds} | {' | '.join(texts)} |")
        samples = Path(of_row[0]["folder"]) / "plain" / "samples.npz"
        pictures.append(np.load(samples)["arr_0"][:16])
        labels.append(f"{name}\n{of_row[0]['settings']}")
    save_grid(out / "claims.png", pictures)
    sheet = Image.open(out / "claims.png")
    height = sheet.height // len(labels)
    labelled = ImageOps.expand(sheet, (100, 0, 0, 0), "white")
    for i, label in enumerate(labels):
        ImageDraw.Draw(labelled).text((4, height * i + 16), label, "black")
    labelled.save(out / "claims.png")


def main():
    parser = argparse.ArgumentParser(description="The paper's comparison in miniature.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("rows", nargs="*", default=list(ROWS), help="some of them")
    flag("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    flag("--scale", type=float, default=1.0, help="factor on the steps of both stages")
    flag("--jobs", type=int, default=1, help="cells at a time, of one thread each")
    flag("--out", default="claims", help="folder of the cells")
    flag("--report", action="store_true", help="only print the table of what is there")
    args = parser.parse_args()
    cells = Cells(args)
    if not args.report:
        if not cells.data.exists():
            script(cells.out, "data/fashion_mnist.py", "--full", out=cells.data)
        tasks = []
        for seed in args.seeds:  # tokenizers first, because others wait for them
            own = [name for name in args.rows if not ROWS[name].tokenizer]
            tasks += [(cells.tokenizer, name, seed) for name in own]
            tasks += [(cells.run, name, seed) for name in args.rows]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda task: task[0](*task[1:]), tasks))
    report(cells.out)


if __name__ == "__main__":
    main()
