"""The paper's comparisons in miniature: every cell is a run of the ordinary scripts, and every row
has the same budget.

    python tools/claims.py                      # all groups, seeds 0 and 1, into claims/
    python tools/claims.py layouts --jobs 2     # some groups, two cells at a time
    python tools/claims.py --scale 10 --out claims10    # ten times the steps, for a GPU
    python tools/claims.py --report             # only the table and the plots, of what is there

A cell trains a tokenizer and an AR model on the bundled data, tries as many sampling settings as
every other cell (500 samples each), and measures the best of them on 2,000 samples of another seed.
A run that was stopped goes on where it was. Beside the cells, in --out, it writes claims_table.md,
claims_lambda.png and claims_content.png to --results.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tokenizer import InputError, real, whole, writing

# What differs from the trainers' defaults, which are those of the demo
STAGE1 = dict(steps=1000, batch_size=32, lr=5e-4, min_lr=5e-5, warmup=50, hold=400)
STAGE2 = dict(size="nano", steps=600, batch_size=32, lr=1e-3, min_lr=1e-5, warmup=50, hold=200)

# Settings that a cell tries: three without guidance, six with it. A prologue has a scale of its
# own, so that fewer visual scales are tried with it.
PLAIN = ["temperature=0.8,0.9,1"]
GUIDED = ["cfg_visual=1.25,1.5,2,2.5,3,4"]
GUIDED_PROLOGUE = ["cfg_visual=1.5,2,3", "cfg_prologue=0.7,1"]

# group: {row: flags of train_stage1.py}
GROUPS = {
    "layouts": {
        "2d": "--layout 2d",
        "prologue": "",
        "post": "--layout post",
        "1d": "--layout 1d",
        "onestage": "--onestage --ar_size nano",
    },
    "direct": {
        "2d, direct CE 0.03": "--layout 2d --direct_ce --tau 1 --ce_weight 0.03",
        "1d, direct CE 0.03": "--layout 1d --direct_ce --tau 1 --ce_weight 0.03",
        "2d, direct CE 0.3": "--layout 2d --direct_ce --tau 1 --ce_weight 0.3",
        "1d, direct CE 0.3": "--layout 1d --direct_ce --tau 1 --ce_weight 0.3",
        "2d, direct CE 3": "--layout 2d --direct_ce --tau 1 --ce_weight 3",
        "1d, direct CE 3": "--layout 1d --direct_ce --tau 1 --ce_weight 3",
        "prologue, lambda 1": "--ce_weight 1",
        "prologue, lambda 6": "--ce_weight 6",
    },
    "ablations": {
        "K = 4": "--num_prologue 4",
        "K = 16": "--num_prologue 16",
        "P = 16": "--prologue_codebook_size 16",
        "P = 256": "--prologue_codebook_size 256",
        "tau = 0.01": "--tau 0.01",
        "tau = 1": "--tau 1",
        "visual dropout 0": "--visual_dropout 0",
        "visual dropout 1": "--visual_dropout 1",
    },
}

# Column of the table: value of a cell
COLUMNS = {
    "rFID": "rfid",
    "PSNR": "psnr",
    "nats prologue": "nats_prologue",
    "nats visual": "nats_visual",
    "gFID without CFG": "gfid_no_cfg",
    "gFID with CFG": "gfid",
    "class consistency without CFG": "consistency_no_cfg",
    "perplexity of the prologue": "perplexity_prologue",
}


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

    def __init__(self, row, flags, seed, args):
        self.row = row
        self.flags = flags.split()
        self.seed = seed
        self.args = args
        name = row.replace(" ", "").replace(",", "_").replace("=", "")
        self.out = Path(args.out) / f"{name}-s{seed}"
        self.threads = max(1, os.cpu_count() // args.jobs)

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
            raise InputError(f"{self.row}, seed {self.seed}: {name} failed, see {log}")
        return result.stdout.rstrip().rpartition("\n")[2]

    def train(self, name, settings, *flags):
        """Runs a trainer, unless an earlier run of this script has; returns its seconds."""
        seconds = self.out / f"{name}.seconds"
        if not seconds.exists():
            steps = int(settings["steps"] * self.args.scale)
            hold = int(settings["hold"] * self.args.scale)
            settings = settings | dict(steps=steps, hold=hold)
            start = time.perf_counter()
            self.script(name, "--out", self.out, "--seed", self.seed, "--resume", "--log_every", 50,
                        "--save_every", 250, "--eval_every", steps, *as_flags(settings), *flags)
            log = self.out / Path(name).with_suffix(".jsonl")
            if last_value(log, "step") != steps:  # Ctrl-C reaches the trainer too, and it saves
                raise InputError(f"{self.row}, seed {self.seed}: {name} was stopped")
            seconds.write_text(str(time.perf_counter() - start))
        return float(seconds.read_text())

    def best(self, name, axes, *flags):
        """Tries the settings `axes` on 500 samples and measures the best on 2,000 others. Returns
        what fid.py says of these, and the settings.
        """
        result = self.out / f"{name}.json"
        if not result.exists():
            folder = self.out / name
            flags = ["--tokenizer", self.out / "tokenizer.safetensors",
                     "--ar", self.out / "ar.safetensors", "--out", folder, *flags]
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

        # Stage 1
        flags = list(self.flags)
        if self.row == "post":
            flags += ["--init", Path(self.args.out) / f"2d-s{self.seed}" / "tokenizer.safetensors"]
        seconds = self.train("train_stage1.py", STAGE1, "--num_workers", 0, *flags)
        log1 = self.out / "train_stage1.jsonl"
        log2 = log1

        # Stage 2
        if self.row != "onestage":
            if not (self.out / "codes_val.npz").exists():
                self.script("pretokenize.py", "--out", self.out, "--num_workers", 0)
            seconds += self.train("train_ar.py", STAGE2)
            log2 = self.out / "train_ar.jsonl"

        cell = self.measure(log1, log2)
        cell["minutes"] = seconds / 60
        with writing(self.out / "cell.json") as temporary:
            temporary.write_text(json.dumps(cell, indent=1))
        print(f"{self.row}, seed {self.seed}: rFID {cell['rfid']:.2f}  gFID without CFG "
              f"{cell['gfid_no_cfg']:.2f}, with {cell['gfid']:.2f}", flush=True)

    def measure(self, log1, log2):
        """The measures of the trained pair, those of the two logs of the trainers included."""
        has_prologue = last_value(log1, "val_perplexity_prologue") is not None
        plain = self.best("plain", PLAIN, "--no_cfg")
        guided = self.best("guided", GUIDED_PROLOGUE if has_prologue else GUIDED)
        reconstruction = json.loads(self.script("fid.py", "--json", "--tokenizer",
                                                self.out / "tokenizer.safetensors"))
        return {
            "row": self.row,
            "seed": self.seed,
            "rfid": reconstruction["rfid"],
            "psnr": reconstruction["psnr"],
            "nats_prologue": last_value(log2, "val_nats_prologue", default=0.0),
            "nats_visual": last_value(log2, "val_nats_visual"),
            "gfid_no_cfg": plain["fid"],
            "gfid": guided["fid"],
            "consistency_no_cfg": plain["class_consistency"],
            "consistency": guided["class_consistency"],
            "settings_no_cfg": plain["settings"],
            "settings": guided["settings"],
            "perplexity_prologue": last_value(log1, "val_perplexity_prologue"),
            "perplexity_visual": last_value(log1, "val_perplexity_visual"),
        }


def run_cells(args):
    """Runs the cells of the groups, --jobs at a time."""
    cells = []
    for group in args.groups:
        for seed in args.seeds:
            cells += [Cell(row, flags, seed, args) for row, flags in GROUPS[group].items()]
    tokenizer_2d = {seed: threading.Event() for seed in args.seeds}  # post starts from it

    def work(cell):
        if cell.row == "post":
            tokenizer_2d[cell.seed].wait()
        try:
            cell.run()
        finally:
            if cell.row == "2d":
                tokenizer_2d[cell.seed].set()

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, cells))


# The report


def read_cells(out):
    """{row: its cells, by seed}. Raises InputError where there are none."""
    cells = {}
    for path in sorted(Path(out).glob("*/cell.json")):
        cell = json.loads(path.read_text())
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
    """A table for each group, with the rows 2d and prologue at its head."""
    lines = ["# Cells of tools/claims.py", "",
             "Written by `python tools/claims.py --report`. Mean (seed 0, seed 1)."]
    for group, rows in GROUPS.items():
        lines += ["", f"## {group}", ""]
        lines.append(f"| row | seeds | {' | '.join(COLUMNS)} |")
        lines.append("| --- " * (len(COLUMNS) + 2) + "|")
        for row in dict.fromkeys(["2d", "prologue", *rows]):  # each once
            if row not in cells:
                lines.append(f"| {row} | not run |" + " |" * len(COLUMNS))
                continue
            values = " | ".join(mean_text(cells[row], key) for key in COLUMNS.values())
            lines.append(f"| {row} | {len(cells[row])} | {values} |")
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


def save_content_plot(path, cells):
    """gFID without CFG over what the prologue holds: a point for each cell whose tokenizer is
    two-dimensional and sound.
    """
    from matplotlib.figure import Figure

    rows = {
        "2d": ["2d", "2d, direct CE 0.03", "2d, direct CE 0.3"],
        "post": ["post"],
        "prologue": ["prologue", "prologue, lambda 1", "prologue, lambda 6", *GROUPS["ablations"]],
    }
    figure = Figure(figsize=(5.5, 4), layout="tight")
    axis = figure.subplots()
    with_prologue = []
    for name, members in rows.items():
        group = [cell for row in members for cell in cells.get(row, [])]
        if not group:
            continue
        if name != "2d":
            with_prologue += group
        nats = [cell["nats_prologue"] for cell in group]
        gfid = [cell["gfid_no_cfg"] for cell in group]
        axis.plot(nats, gfid, "o", label=f"{name}, {len(group)} cells")
        print(f"{name}: {len(group)} cells, gFID without CFG {sum(gfid) / len(gfid):.2f} "
              f"({min(gfid):.2f} to {max(gfid):.2f})")
    axis.set(xlabel="nats of the prologue, held out", ylabel="gFID without CFG")
    axis.legend()
    with writing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)
    print_correlations(with_prologue)


def print_correlations(cells):
    """Whether more in the prologue goes with a lower gFID."""
    from scipy.stats import spearmanr

    if len(cells) < 3:
        return
    nats = [cell["nats_prologue"] for cell in cells]
    for key in ("gfid_no_cfg", "gfid"):
        test = spearmanr(nats, [cell[key] for cell in cells])
        print(f"rank correlation of the prologue's nats with {key}, {len(cells)} cells: "
              f"{test.statistic:.2f} p {test.pvalue:.3f}")


def report(args):
    cells = read_cells(args.out)
    results = Path(args.results)
    save_table(results / "claims_table.md", cells)
    print(results / "claims_table.md")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("the plots need matplotlib: pip install matplotlib") from None
    save_lambda_plot(results / "claims_lambda.png", cells)
    save_content_plot(results / "claims_content.png", cells)


def main():
    parser = argparse.ArgumentParser(description="The paper's comparisons in miniature.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("groups", nargs="*", default=list(GROUPS), metavar="GROUP",
         help=f"some of {', '.join(GROUPS)}")
    flag("--seeds", type=whole(0), nargs="+", default=[0, 1], help="one cell for each")
    flag("--scale", type=real(1e-3), default=1.0, help="factor on the steps of both stages")
    flag("--jobs", type=whole(1), default=1, help="cells at a time; they share the cores")
    flag("--out", default="claims", help="folder of the cells")
    flag("--results", default=str(ROOT / "results"), help="folder of the table and the plots")
    flag("--report", action="store_true", help="only report what is there")
    args = parser.parse_args()
    for group in args.groups:
        if group not in GROUPS:
            parser.error(f"there is no group {group!r}; choose some of {', '.join(GROUPS)}")
    if not args.report:
        run_cells(args)
    report(args)


if __name__ == "__main__":
    main()
