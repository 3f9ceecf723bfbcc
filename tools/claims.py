"""The paper's comparisons in miniature: every cell is a run of the ordinary scripts, and all rows
of a group have the same steps.

    python tools/claims.py --jobs 2                       # all rows, into claims/
    python tools/claims.py no_classes "tau = 1" --jobs 2  # a group and a single row
    python tools/claims.py --scale 10 --out claims10      # ten times the steps, for a GPU
    python tools/claims.py --report                       # only tables and plots of what is there

A cell is a row with one seed. It trains a tokenizer on the bundled data, or takes that of another
row, and an AR model on its tokens; tries eight sampling settings without guidance and, if it knows
the classes, six with it (500 samples each); and measures the best of each on 2,000 samples of
another seed. Cells that share a tokenizer train it once. A run that was stopped goes on where it
was. In --results it leaves claims_table.md; claims_rows.png, the gFIDs of all rows without classes;
claims_samples.png, samples of 2d, post and prologue; and claims_lambda.png.
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
from scipy.cluster.vq import kmeans2, vq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pretokenize import BUNDLED, Images, save_grid
from tokenizer import HelpFormatter, InputError, real, whole, writing

# What differs from the trainers' defaults, which are those of the demo
STAGE1 = dict(steps=1000, batch_size=32, lr=5e-4, min_lr=5e-5, warmup=50, hold=400)
STAGE2 = dict(size="nano", steps=600, batch_size=32, lr=1e-3, min_lr=1e-5, warmup=50, hold=200)

# All images of Fashion-MNIST, made by data/fashion_mnist.py beside the cells
FULL = "fashion_mnist_full.zip"

# Settings that a cell tries: eight without guidance, six with it. A prologue has a temperature and
# a scale of its own, so that fewer visual ones are tried with it.
PLAIN = ["temperature=0.7,0.75,0.8,0.85,0.9,0.95,1,1.05"]
PLAIN_PROLOGUE = ["temperature=0.7,0.8,0.9,1", "temperature_prologue=0.9,1"]
GUIDED = ["cfg_visual=1.25,1.5,2,2.5,3,4"]
GUIDED_PROLOGUE = ["cfg_visual=1.5,2,3", "cfg_prologue=0.7,1"]


@dataclass
class Row:
    """A line of a table: a tokenizer, and an AR model on its tokens."""

    flags: str = ""  # of train_stage1.py
    init: str = ""  # the row whose tokenizer the layout post freezes
    tokenizer: str = ""  # the row whose tokenizer is taken; then none is trained
    prologue: str = "learned"  # or what stands in its place, see other_prologue
    classes: bool = True  # whether the AR model is told the class
    full: bool = False  # all 60,000 images instead of the bundled 10,000
    stage1: float = 1.0  # factor on the steps of stage 1
    stage2: float = 1.0  # factor on the steps of stage 2


# group: {name: row}
GROUPS = {
    "layouts": {
        "2d": Row("--layout 2d"),
        "prologue": Row(),
        "post": Row("--layout post", init="2d"),
        "1d": Row("--layout 1d"),
        "onestage": Row("--onestage --ar_size nano"),
    },
    # AR models that are not told the class, on the tokenizers above (tau 1 and onestage train their
    # own); from constant to k-means the visual tokens of post behind other prologues
    "no_classes": {
        "2d, no classes": Row(tokenizer="2d", classes=False),
        "prologue, no classes": Row(tokenizer="prologue", classes=False),
        "post, no classes": Row(tokenizer="post", classes=False),
        "post, tau 1": Row("--layout post --tau 1", init="2d", classes=False),
        "constant": Row(tokenizer="post", prologue="constant", classes=False),
        "another image's": Row(tokenizer="post", prologue="shuffled", classes=False),
        "the class": Row(tokenizer="post", prologue="class", classes=False),
        "k-means, 1 token": Row(tokenizer="post", prologue="k-means 1", classes=False),
        "k-means, 2 tokens": Row(tokenizer="post", prologue="k-means 2", classes=False),
        "k-means, 8 tokens": Row(tokenizer="post", prologue="k-means 8", classes=False),
        "onestage, no classes": Row("--onestage --ar_size nano --no_classes", classes=False),
        "1d, no classes": Row(tokenizer="1d", classes=False),
    },
    # Four times as many visual tokens, without classes, half the steps
    "long": {
        "2d, patch 2": Row("--layout 2d --patch_size 2", classes=False, stage1=0.5, stage2=0.5),
        "prologue, patch 2": Row("--patch_size 2", classes=False, stage1=0.5, stage2=0.5),
        "post, patch 2": Row("--layout post", init="2d, patch 2", classes=False, stage1=0.5,
                             stage2=0.5),
        "constant, patch 2": Row(tokenizer="post, patch 2", prologue="constant", classes=False,
                                 stage2=0.5),
        "the class, patch 2": Row(tokenizer="post, patch 2", prologue="class", classes=False,
                                  stage2=0.5),
    },
    # All 60,000 images and four times the steps of stage 1, without classes. FID is still that to
    # the bundled images, 10,000 for gFID and 2,000 for rFID.
    "full": {
        "2d, full": Row("--layout 2d", classes=False, full=True, stage1=4),
        "post, full": Row("--layout post", init="2d, full", classes=False, full=True, stage1=4),
        "post, tau 1, full": Row("--layout post --tau 1", init="2d, full", classes=False, full=True,
                                 stage1=4),
        "constant, full": Row(tokenizer="post, tau 1, full", prologue="constant", classes=False,
                              full=True),
        "the class, full": Row(tokenizer="post, tau 1, full", prologue="class", classes=False,
                               full=True),
    },
    "direct": {
        "2d, direct CE 0.03": Row("--layout 2d --direct_ce --tau 1 --ce_weight 0.03"),
        "1d, direct CE 0.03": Row("--layout 1d --direct_ce --tau 1 --ce_weight 0.03"),
        "2d, direct CE 0.3": Row("--layout 2d --direct_ce --tau 1 --ce_weight 0.3"),
        "1d, direct CE 0.3": Row("--layout 1d --direct_ce --tau 1 --ce_weight 0.3"),
        "2d, direct CE 3": Row("--layout 2d --direct_ce --tau 1 --ce_weight 3"),
        "1d, direct CE 3": Row("--layout 1d --direct_ce --tau 1 --ce_weight 3"),
        "prologue, lambda 1": Row("--ce_weight 1"),
        "prologue, lambda 6": Row("--ce_weight 6"),
    },
    "ablations": {
        "K = 4": Row("--num_prologue 4"),
        "K = 16": Row("--num_prologue 16"),
        "P = 16": Row("--prologue_codebook_size 16"),
        "P = 256": Row("--prologue_codebook_size 256"),
        "tau = 0.01": Row("--tau 0.01"),
        "tau = 1": Row("--tau 1"),
        "visual dropout 0": Row("--visual_dropout 0"),
        "visual dropout 1": Row("--visual_dropout 1"),
    },
}

# Column of the table: value of a cell
COLUMNS = {
    "rFID": "rfid",
    "PSNR": "psnr",
    "nats prologue": "nats_prologue",
    "nats visual": "nats_visual",
    "gFID without CFG": "gfid_no_cfg",
    "its visual temperature": "temperature",
    "gFID with CFG": "gfid",
    "class consistency without CFG": "consistency_no_cfg",
    "perplexity of the prologue": "perplexity_prologue",
}


# Prologues to compare a learned one with


def pixels(split):
    """The bundled images of "train" or "val" in the order of token files: (images, 784) float32."""
    images = Images(BUNDLED / split)
    grey = [np.asarray(images.open(i).convert("L")).ravel() for i in range(len(images))]
    return np.stack(grey).astype(np.float32)


def residual_k_means(num_tokens, size, seed):
    """Codes of the bundled images by residual k-means on their pixels: the first token names the
    nearest of `size` mean images, each further one the nearest of `size` means of what is left.
    Returns {split: (images, num_tokens)}."""
    rest = {split: pixels(split) for split in ("train", "val")}
    codes = {split: [] for split in rest}
    for _ in range(num_tokens):
        centres, _ = kmeans2(rest["train"], size, minit="++", seed=seed)  # (size, 784)
        for split, vectors in rest.items():
            nearest, _ = vq(vectors, centres)  # (images,)
            codes[split].append(nearest)
            rest[split] = vectors - centres[nearest]
    return {split: np.stack(columns, 1) for split, columns in codes.items()}


def other_prologue(kind, codes, labels, size, seed):
    """What stands in the place of the prologues `codes` {split: (images, K)}: nothing (constant),
    that of another image (shuffled), the class, or k-means codes of the pixels ("k-means 2": two
    tokens of them). Tokens that are not needed are 0. Returns {split: (images, K)}."""
    rng = np.random.default_rng(seed)
    result = {split: np.zeros_like(old) for split, old in codes.items()}
    if kind == "shuffled":
        for split, old in codes.items():
            result[split] = old[rng.permutation(len(old))]
    elif kind == "class":
        for split, of_images in labels.items():
            result[split][:, 0] = of_images
    elif kind.startswith("k-means"):
        count = int(kind.split()[1])
        for split, summary in residual_k_means(count, size, seed).items():
            result[split][:, :count] = summary
    return result


def write_tokens(source, target, kind, seed):
    """Copies the token files of the folder `source` to the folder `target`, with another prologue.
    """
    files = {}
    for split, name in (("train", "codes.npz"), ("val", "codes_val.npz")):
        with np.load(source / name) as file:
            files[split] = dict(file)
    cfg = json.loads(str(files["train"]["config"]))["tokenizer"]
    k = cfg["num_prologue"]
    prologues = {split: file["codes"][:, 0, :k] for split, file in files.items()}
    labels = {split: file["labels"] for split, file in files.items()}
    prologues = other_prologue(kind, prologues, labels, cfg["prologue_codebook_size"], seed)
    for split, name in (("train", "codes.npz"), ("val", "codes_val.npz")):
        files[split]["codes"][:, 0, :k] = prologues[split]
        with writing(target / name) as temporary, open(temporary, "wb") as file:
            np.savez(file, **files[split])


# A cell


def last_value(log, key, default=None):
    """The last value of `key` in a .jsonl log."""
    value = default
    for line in log.read_text().splitlines():
        value = json.loads(line).get(key, value)
    return value


def as_flags(settings):
    """{"lr": 0.1} -> ["--lr", 0.1]"""
    flags = []
    for name, value in settings.items():
        flags += [f"--{name}", value]
    return flags


class Cell:
    """One row with one seed; everything that it makes is in the folder self.out."""

    def __init__(self, name, row, seed, out, threads, scale, cells):
        self.name = name
        self.row = row
        self.seed = seed
        folder = name.replace(" ", "").replace(",", "_").replace("=", "").replace("'", "")
        self.out = Path(out) / f"{folder}-s{seed}"
        self.threads = threads
        self.scale = scale  # factor on the steps of all rows
        self.cells = cells  # {(name, seed): Cell}, for the tokenizers of others
        self.lock = threading.Lock()  # while the tokenizer is trained

    def tokenizer_folder(self):
        """The folder with the tokenizer and its tokens."""
        if self.row.tokenizer:
            return self.cells[self.row.tokenizer, self.seed].out
        return self.out

    def codes_folder(self):
        """The folder with the tokens that the AR model is trained on."""
        if self.row.prologue == "learned":
            return self.tokenizer_folder()
        return self.out

    def script(self, name, *flags):
        """Runs a script, with what it prints in cell.log, and returns its last line. Raises
        InputError.
        """
        command = [str(word) for word in (sys.executable, ROOT / name, *flags)]
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        with open(self.out / "cell.log", "a") as log:
            result = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True,
                                    env=environment)
            log.write(result.stdout)
        if result.returncode != 0:
            log = self.out / "cell.log"
            raise InputError(f"{self.name}, seed {self.seed}: {name} failed, see {log}")
        return result.stdout.rstrip().rpartition("\n")[2]

    def train(self, name, settings, factor, *flags):
        """Runs a trainer with `factor` times the steps, unless an earlier run of this script has.
        """
        done = self.out / f"{name}.done"
        if done.exists():
            return
        steps = int(settings["steps"] * factor * self.scale)
        hold = int(settings["hold"] * factor * self.scale)
        settings = settings | dict(steps=steps, hold=hold)
        self.script(name, "--out", self.out, "--seed", self.seed, "--resume", "--log_every", 50,
                    "--save_every", 250, "--eval_every", steps, *as_flags(settings), *flags)
        log = self.out / Path(name).with_suffix(".jsonl")
        if last_value(log, "step") != steps:  # Ctrl-C reaches the trainer too, and it saves
            raise InputError(f"{self.name}, seed {self.seed}: {name} was stopped")
        done.touch()

    def train_tokenizer(self):
        """Stage 1, the tokens and rFID, unless they are there."""
        if self.row.tokenizer:
            self.cells[self.row.tokenizer, self.seed].train_tokenizer()
            return
        with self.lock:
            self.out.mkdir(parents=True, exist_ok=True)
            tokenizer = self.out / "tokenizer.safetensors"
            flags = self.row.flags.split()
            if self.row.init:
                frozen = self.cells[self.row.init, self.seed]
                frozen.train_tokenizer()
                flags += ["--init", frozen.out / "tokenizer.safetensors"]
            loading = ["--num_workers", 0]
            if self.row.full:
                loading += ["--data", self.out.parent / FULL / "train"]
            self.train("train_stage1.py", STAGE1, self.row.stage1, *loading, *flags)
            if not (self.out / "codes.npz").exists():  # the last file that it makes
                self.script("pretokenize.py", "--out", self.out, *loading)
            if not (self.out / "rfid.json").exists():
                scores = self.script("fid.py", "--json", "--tokenizer", tokenizer)
                with writing(self.out / "rfid.json") as temporary:
                    temporary.write_text(scores)

    def best(self, name, axes, tokenizer, *flags):
        """Tries the settings `axes` on 500 samples and measures the best on 2,000 others. Returns
        what fid.py says of these, and the settings.
        """
        result = self.out / f"{name}.json"
        if not result.exists():
            folder = self.out / name
            flags = ["--tokenizer", tokenizer, "--ar", self.out / "ar.safetensors",
                     "--out", folder, *flags]
            self.script("tools/sweep.py", *axes, *flags, "--num", 500)
            first = json.loads((folder / "sweep.json").read_text())["rows"][0]
            names = [axis.partition("=")[0] for axis in axes]
            settings = {setting: first[setting] for setting in names}
            self.script("sample.py", *flags, "--num", 2000, "--seed", 100 + self.seed,
                        *as_flags(settings))
            scores = json.loads(self.script("fid.py", folder / "samples.npz", "--json"))
            with writing(result) as temporary:
                temporary.write_text(json.dumps({"settings": settings} | scores))
        return json.loads(result.read_text())

    def run(self):
        """Everything, unless an earlier run has done it; the result is cell.json."""
        if (self.out / "cell.json").exists():
            return
        self.out.mkdir(parents=True, exist_ok=True)
        self.train_tokenizer()
        source = self.tokenizer_folder()
        tokenizer = source / "tokenizer.safetensors"
        log1 = source / "train_stage1.jsonl"
        log2 = log1

        # Stage 2
        if "--onestage" not in self.row.flags:
            if self.row.prologue != "learned":
                write_tokens(source, self.out, self.row.prologue, self.seed)
            flags = [] if self.row.classes else ["--no_classes"]
            self.train("train_ar.py", STAGE2, self.row.stage2, "--tokenizer", tokenizer,
                       "--codes", self.codes_folder() / "codes.npz", *flags)
            log2 = self.out / "train_ar.jsonl"

        cell = self.measure(tokenizer, log1, log2)
        with writing(self.out / "cell.json") as temporary:
            temporary.write_text(json.dumps(cell, indent=1))
        guided = f", with {cell['gfid']:.2f}" if self.row.classes else ""
        print(f"{self.name}, seed {self.seed}: rFID {cell['rfid']:.2f}  gFID without CFG "
              f"{cell['gfid_no_cfg']:.2f}{guided}", flush=True)

    def measure(self, tokenizer, log1, log2):
        """The measures of the trained pair, those of the two logs of the trainers included."""
        reconstruction = json.loads((tokenizer.parent / "rfid.json").read_text())
        nats_prologue = last_value(log2, "val_nats_prologue")
        plain_axes = PLAIN if nats_prologue is None else PLAIN_PROLOGUE
        guided_axes = GUIDED if nats_prologue is None else GUIDED_PROLOGUE
        plain = self.best("plain", plain_axes, tokenizer, "--no_cfg")
        guided = {"fid": None, "class_consistency": None, "settings": None}
        if self.row.classes:
            guided = self.best("guided", guided_axes, tokenizer)
        learned = self.row.prologue == "learned"
        return {
            "row": self.name,
            "seed": self.seed,
            "rfid": reconstruction["rfid"],
            "psnr": reconstruction["psnr"],
            "nats_prologue": nats_prologue or 0.0,
            "nats_visual": last_value(log2, "val_nats_visual"),
            "gfid_no_cfg": plain["fid"],
            "gfid": guided["fid"],
            "consistency_no_cfg": plain["class_consistency"] if self.row.classes else None,
            "consistency": guided["class_consistency"],
            "settings_no_cfg": plain["settings"],
            "settings": guided["settings"],
            "perplexity_prologue": last_value(log1, "val_perplexity_prologue") if learned else None,
            "perplexity_visual": last_value(log1, "val_perplexity_visual"),
        }


def build_cells(out, seeds, threads, scale=1.0):
    """{(name of a row, seed): Cell} of all groups."""
    cells = {}
    for rows in GROUPS.values():
        for name, row in rows.items():
            for seed in seeds:
                cells[name, seed] = Cell(name, row, seed, out, threads, scale, cells)
    return cells


def run_cells(args):
    """Runs the chosen cells, --jobs at a time."""
    threads = max(1, os.cpu_count() // args.jobs)
    cells = build_cells(args.out, args.seeds, threads, args.scale)
    names = {}  # each once, also if a row is named beside its group
    for word in args.rows:
        names |= dict.fromkeys(GROUPS.get(word, [word]))
    chosen = [cells[name, seed] for seed in sorted(set(args.seeds)) for name in names]
    full = Path(args.out) / FULL
    if any(cell.row.full for cell in chosen) and not full.exists():
        command = [sys.executable, ROOT / "data/fashion_mnist.py", "--full", "--out", full]
        subprocess.run(command, check=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(Cell.run, chosen))


# The report


def read_cells(out):
    """{row: [its cells, ordered by seed]}. Raises InputError where there are none."""
    cells = {}
    for path in sorted(Path(out).glob("*/cell.json")):
        cell = json.loads(path.read_text())
        cell["folder"] = path.parent
        cell["temperature"] = cell["settings_no_cfg"]["temperature"]
        cells.setdefault(cell["row"], []).append(cell)
    if not cells:
        raise InputError(f"{out} holds no finished cell (*/cell.json), so there is nothing to "
                         "report; --out names the folder that has them")
    return cells


def mean_text(cells, key):
    """The mean of a value and behind it, if there are several, that of each cell; or a dash."""
    values = [cell[key] for cell in cells if cell[key] is not None]
    if not values:
        return "-"
    digits = 3 if "consistency" in key else 2
    text = f"{sum(values) / len(values):.{digits}f}"
    if len(values) > 1:
        each = ", ".join(f"{value:.{digits}f}" for value in values)
        text += f" ({each})"
    return text


def save_table(path, cells):
    """A table for each group."""
    lines = ["# Cells of tools/claims.py", "",
             "Written by `python tools/claims.py --report`. Mean (each seed, in this order)."]
    for group, rows in GROUPS.items():
        lines += ["", f"## {group}", ""]
        lines.append(f"| row | seeds | {' | '.join(COLUMNS)} |")
        lines.append("| --- " * (len(COLUMNS) + 2) + "|")
        for row in rows:
            if row not in cells:
                lines.append(f"| {row} | not run |" + " |" * len(COLUMNS))
                continue
            values = " | ".join(mean_text(cells[row], key) for key in COLUMNS.values())
            seeds = ", ".join(str(cell["seed"]) for cell in cells[row])
            lines.append(f"| {row} | {seeds} | {values} |")
    with writing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def save_lambda_plot(path, cells):
    """Fig. 5: reconstruction and generation over lambda, a dot for each seed and a line through
    the means.
    """
    from matplotlib.figure import Figure

    series = {
        "direct CE, 2d": {0: "2d", 0.03: "2d, direct CE 0.03", 0.3: "2d, direct CE 0.3",
                          3: "2d, direct CE 3"},
        "direct CE, 1d": {0: "1d", 0.03: "1d, direct CE 0.03", 0.3: "1d, direct CE 0.3",
                          3: "1d, direct CE 3"},
        "prologue": {1: "prologue, lambda 1", 3: "prologue", 6: "prologue, lambda 6"},
    }
    figure = Figure(figsize=(9, 3.5), layout="tight")
    for axis, key, title in zip(figure.subplots(1, 2), ("rfid", "gfid_no_cfg"),
                                ("rFID", "gFID without CFG")):
        for number, (name, rows) in enumerate(series.items()):
            color = f"C{number}"
            places = []
            means = []
            for weight, row in rows.items():
                values = [cell[key] for cell in cells.get(row, [])]
                if values:
                    places.append(max(weight, 0.01))  # the axis is logarithmic
                    means.append(sum(values) / len(values))
                    axis.plot([places[-1]] * len(values), values, "o", color=color)
            if places:
                axis.plot(places, means, color=color, label=name)
        axis.set(xscale="log", yscale="log", xlabel="lambda (0 is drawn at 0.01)", title=title)
        axis.legend()
    with writing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


def save_rows_plot(path, cells):
    """gFID of the rows without classes: a dot for each seed and a line for the mean."""
    from matplotlib.figure import Figure

    groups = ("no_classes", "long", "full")
    figure = Figure(figsize=(14, 4), layout="tight")
    for axis, group in zip(figure.subplots(1, len(groups)), groups):
        names = [name for name in GROUPS[group] if name in cells]
        for place, name in enumerate(names):
            values = [cell["gfid_no_cfg"] for cell in cells[name]]
            mean = sum(values) / len(values)
            axis.plot(values, [place] * len(values), "o", color="C0")
            axis.plot([mean, mean], [place - 0.3, place + 0.3], color="C1")
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set(xlabel="gFID, at the best temperatures", title=group)
    with writing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


def save_samples(path, cells):
    """Two rows of samples of each layout without classes, at its best temperatures, of the first
    seed; post and prologue have the same noise in the same place."""
    rows = []
    for name in ("2d, no classes", "post, no classes", "prologue, no classes"):
        with np.load(cells[name][0]["folder"] / "plain" / "samples.npz") as file:
            images = file["arr_0"][:32]
        rows += [images[:16], images[16:]]
    save_grid(path, rows)


def report(args):
    cells = read_cells(args.out)
    results = Path(args.results or args.out)
    save_table(results / "claims_table.md", cells)
    print(results / "claims_table.md")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("the plots need matplotlib: pip install matplotlib") from None
    if "2d, no classes" in cells:
        save_rows_plot(results / "claims_rows.png", cells)
    if {"2d, no classes", "post, no classes", "prologue, no classes"} <= cells.keys():
        save_samples(results / "claims_samples.png", cells)
    if not cells.keys().isdisjoint(GROUPS["direct"]):
        save_lambda_plot(results / "claims_lambda.png", cells)


def main():
    parser = argparse.ArgumentParser(description="The paper's comparisons in miniature.",
                                     formatter_class=HelpFormatter)
    flag = parser.add_argument
    flag("rows", nargs="*", default=list(GROUPS), metavar="ROW",
         help=f"names of rows, or of their groups {', '.join(GROUPS)}")
    flag("--seeds", type=whole(0), nargs="+", default=[0, 1, 2], help="one cell for each")
    flag("--scale", type=real(1e-3), default=1.0, help="factor on the steps of both stages")
    flag("--jobs", type=whole(1), default=1, help="cells at a time; they share the cores")
    flag("--out", default="claims", help="folder of the cells")
    flag("--results", help="folder of the table and the plots; by default --out")
    flag("--report", action="store_true", help="only report what is there")
    args = parser.parse_args()
    known = {*GROUPS, *(name for rows in GROUPS.values() for name in rows)}
    for word in args.rows:
        if word not in known:
            parser.error(f"there is no row or group {word!r}; choose some of {sorted(known)}")
    if not args.report:
        run_cells(args)
    report(args)


if __name__ == "__main__":
    main()
