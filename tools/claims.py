"""The paper's comparisons in miniature: every cell a run of the ordinary scripts, the same budget for every row.

    python tools/claims.py                          # all groups, seeds 0 and 1, into claims/; goes on where it was stopped
    python tools/claims.py layouts --jobs 2         # some groups, two cells at a time on half the cores each
    python tools/claims.py --scale 10 --out claims10    # ten times the steps, where a GPU is at hand
    python tools/claims.py --report                 # only write results/claims_table.md and the plots from what is there

A cell trains a tokenizer and an AR model on the embedded data, tries the same number of sampling settings as every other
cell (500 samples each), and measures the best of them on 2,000 samples of another seed.
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

ROOT = Path(__file__).parent.parent
STAGE1 = dict(steps=1000, batch_size=32, lr=5e-4, min_lr=5e-5, warmup=50, hold=400)
STAGE2 = dict(size="nano", steps=600, batch_size=32, lr=1e-3, min_lr=1e-5, warmup=50, hold=200)
# Six settings for each cell with guidance, three without: a prologue has a scale of its own, so its visual scales are fewer.
GUIDED = {True: ["cfg_visual=1.5,2,3", "cfg_prologue=0.7,1"], False: ["cfg_visual=1.25,1.5,2,2.5,3,4"]}
PLAIN = ["temperature=0.8,0.9,1"]

# group: {row: flags of train_stage1.py}
GROUPS = {
    "layouts": {"2d": "--layout 2d", "prologue": "", "post": "--layout post", "1d": "--layout 1d", "onestage": "--onestage"},
    "direct": {f"{layout}, direct CE {weight}": f"--layout {layout} --direct_ce --ce_weight {weight}"
               for weight in (0.03, 0.3, 3) for layout in ("2d", "1d")}
    | {f"prologue, lambda {weight}": f"--ce_weight {weight}" for weight in (1, 6)},
    "ablations": {"K = 4": "--num_prologue 4", "K = 16": "--num_prologue 16", "P = 16": "--prologue_codebook_size 16",
                  "P = 256": "--prologue_codebook_size 256", "tau = 0.01": "--tau 0.01", "tau = 1": "--tau 1",
                  "visual dropout 0": "--visual_dropout 0", "visual dropout 1": "--visual_dropout 1"},
}


def last(log, key):
    """The last value of `key` in a .jsonl log, or None."""
    values = [entry[key] for entry in map(json.loads, log.read_text().splitlines()) if key in entry]
    return values[-1] if values else None


class Cell:
    def __init__(self, row, flags, seed, args):
        self.row, self.flags, self.seed, self.args = row, flags.split(), seed, args
        self.out = Path(args.out) / f"{row.replace(' ', '').replace(',', '_').replace('=', '')}-s{seed}"
        self.onestage = "--onestage" in self.flags
        self.threads = str(max(1, (os.cpu_count() or 1) // args.jobs))

    def script(self, name, *flags, out=None):
        """Runs a script with its output in cell.log; returns the seconds it took."""
        command = [sys.executable, ROOT / name, "--out", out or self.out, *flags] + ["--num_workers", "0"] * (name != "fid.py")
        start = time.perf_counter()
        with open(self.out / "cell.log", "a") as log:
            result = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=log, text=True,
                                    env=os.environ | {"OMP_NUM_THREADS": self.threads})
            log.write(result.stdout)
        if result.returncode:
            raise RuntimeError(f"{self.row}, seed {self.seed}: {name} failed, see {self.out / 'cell.log'}")
        self.printed = result.stdout
        return time.perf_counter() - start

    def train(self, name, recipe, *flags):
        recipe = recipe | {"steps": int(recipe["steps"] * self.args.scale), "hold": int(recipe["hold"] * self.args.scale)}
        flags = [*flags, *(x for key, value in recipe.items() for x in (f"--{key}", value))]
        done = self.out / f"{name}.seconds"
        if not done.exists():
            never = recipe["steps"]
            seconds = self.script(name, "--seed", self.seed, "--resume", "--eval_every", never, "--save_every", 250,
                                  "--log_every", 50, *flags)
            if last(self.out / name.replace(".py", ".jsonl"), "step") != recipe["steps"]:  # Ctrl-C reaches the trainer as well
                raise RuntimeError(f"{self.row}, seed {self.seed}: {name} was stopped")
            done.write_text(str(seconds))
        return float(done.read_text())

    def best(self, *lists):
        """Tries the settings on 500 samples, then measures the best on 2,000 others."""
        name = "guided" if "cfg" in lists[0] else "plain"
        result = self.out / f"{name}.json"
        if not result.exists():
            pair = ["--tokenizer", self.out / "tokenizer.safetensors", "--ar", self.out / "ar.safetensors"]
            plain = ["--no_cfg"] * (name == "plain")
            self.script("sample.py", *pair, *plain, "--num", 500, "--sweep", *lists, out=self.out / name)
            rows = json.loads((self.out / name / "sweep.json").read_text())["rows"]
            settings = {key: value for key, value in rows[0].items() if key not in ("gfid", "inception_score")}
            flags = [x for key, value in settings.items() for x in (f"--{key}", value)]
            self.script("sample.py", *pair, *plain, *flags, "--num", 2000, "--seed", 100 + self.seed, out=self.out / name)
            self.script("fid.py", self.out / name / "samples.npz", "--json")
            result.write_text(json.dumps({"settings": settings} | json.loads(self.printed.splitlines()[-1])))
        return json.loads(result.read_text())

    def run(self):
        if (self.out / "cell.json").exists():
            return
        self.out.mkdir(parents=True, exist_ok=True)
        flags, stage2 = self.flags, 0.0
        if "post" in flags:
            flags = [*flags, "--init", Path(self.args.out) / f"2d-s{self.seed}" / "tokenizer.safetensors"]
        if self.onestage:
            flags = [*flags, "--ar_size", STAGE2["size"]]
        stage1 = self.train("train_stage1.py", STAGE1, *flags)
        if not self.onestage:
            if not (self.out / "codes_val.npz").exists():
                self.script("pretokenize.py")
            stage2 = self.train("train_ar.py", STAGE2)
        prologue = "2d" not in flags and "1d" not in flags
        plain, guided = self.best(*PLAIN), self.best(*GUIDED[prologue])
        self.script("fid.py", "--tokenizer", self.out / "tokenizer.safetensors", "--json")
        reconstruction = json.loads(self.printed.splitlines()[-1])
        log1 = self.out / "train_stage1.jsonl"
        log2 = log1 if self.onestage else self.out / "train_ar.jsonl"
        cell = {"row": self.row, "seed": self.seed, "rfid": reconstruction["rfid"], "psnr": reconstruction["psnr"],
                "nats_prologue": last(log2, "val_nats_prologue"), "nats_visual": last(log2, "val_nats_visual"),
                "gfid_no_cfg": plain["fid"], "gfid": guided["fid"], "consistency_no_cfg": plain["class_consistency"],
                "consistency": guided["class_consistency"], "settings_no_cfg": plain["settings"], "settings": guided["settings"],
                "perplexity_prologue": last(log1, "val_perplexity_prologue"),
                "perplexity_visual": last(log1, "val_perplexity_visual"), "minutes": (stage1 + stage2) / 60}
        temporary = self.out / "cell.tmp"
        temporary.write_text(json.dumps(cell, indent=1))
        temporary.rename(self.out / "cell.json")
        print(f"{self.row}, seed {self.seed}: rFID {cell['rfid']:.2f}  gFID without CFG {cell['gfid_no_cfg']:.2f}, with "
              f"{cell['gfid']:.2f}", flush=True)


def mean(cells, key, digits=2):
    """"mean (seed 0, seed 1)" of a value, or a dash."""
    values = [cell[key] for cell in cells if cell[key] is not None]
    if not values:
        return "-"
    each = f" ({', '.join(f'{v:.{digits}f}' for v in values)})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.{digits}f}{each}"


def report(args):
    """results/claims_table.md: one table per group, each value the mean over the seeds with the seeds behind it."""
    columns = {"rFID": "rfid", "PSNR": "psnr", "nats prologue": "nats_prologue", "nats visual": "nats_visual",
               "gFID without CFG": "gfid_no_cfg", "gFID with CFG": "gfid", "class consistency without CFG": "consistency_no_cfg",
               "perplexity of the prologue": "perplexity_prologue"}
    found = {}
    for path in sorted(Path(args.out).glob("*/cell.json")):
        cell = json.loads(path.read_text())
        found.setdefault(cell["row"], []).append(cell)
    lines = []
    for group, rows in GROUPS.items():
        rows = {row: found.get(row, []) for row in ({"2d": 0, "prologue": 0} | rows)}
        lines += ["", f"## {group}", "", "| row | seeds | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 2) + "|"]
        for row, cells in rows.items():
            values = (mean(cells, key, 3 if "consistency" in key else 2) for key in columns.values())
            lines.append(f"| {row} | {len(cells)} | " + " | ".join(values) + " |" if cells else f"| {row} | not run |"
                         + " |" * len(columns))
    (ROOT / "results" / "claims_table.md").write_text(
        "# Cells of tools/claims.py\n\nWritten by `python tools/claims.py --report`. Mean (seed 0, seed 1).\n"
        + "\n".join(lines) + "\n")
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot
    plot_lambda(found, pyplot)
    plot_content(found, pyplot)


def plot_content(found, pyplot):
    """gFID without CFG against what the prologue holds, a point for each cell whose tokenizer is two-dimensional and sound."""
    from scipy.stats import spearmanr
    groups = {"2d": ["2d", "2d, direct CE 0.03", "2d, direct CE 0.3"], "post": ["post"],
              "prologue": ["prologue", "prologue, lambda 1", "prologue, lambda 6", *GROUPS["ablations"]]}
    figure, axis = pyplot.subplots(figsize=(5.5, 4))
    for name, rows in groups.items():
        part = [(cell["nats_prologue"], cell["gfid_no_cfg"]) for row in rows for cell in found.get(row, [])]
        if part:
            axis.plot(*zip(*part), "o", label=f"{name}, {len(part)} cells")
            print(f"{name}: {len(part)} cells, gFID without CFG {sum(g for _, g in part) / len(part):.2f} "
                  f"({min(g for _, g in part):.2f} to {max(g for _, g in part):.2f})")
    cells = [cell for row in groups["post"] + groups["prologue"] for cell in found.get(row, [])]
    for key in ("gfid_no_cfg", "gfid") if len(cells) > 2 else ():
        test = spearmanr([cell["nats_prologue"] for cell in cells], [cell[key] for cell in cells])
        print(f"rank correlation of the prologue's nats with {key}, {len(cells)} cells: {test.statistic:.2f} p {test.pvalue:.3f}")
    axis.set(xlabel="nats of the prologue, held out", ylabel="gFID without CFG")
    axis.legend()
    figure.tight_layout()
    figure.savefig(ROOT / "results" / "claims_content.png", dpi=90)


def plot_lambda(found, pyplot):
    """Fig. 5: reconstruction and generation over lambda."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5))
    series = {"direct CE, 2d": {0: "2d"} | {w: f"2d, direct CE {w}" for w in (0.03, 0.3, 3)},
              "direct CE, 1d": {0: "1d"} | {w: f"1d, direct CE {w}" for w in (0.03, 0.3, 3)},
              "prologue": {1: "prologue, lambda 1", 3: "prologue", 6: "prologue, lambda 6"}}
    for axis, (key, title) in zip(axes, (("rfid", "rFID"), ("gfid_no_cfg", "gFID without CFG"))):
        for name, rows in series.items():
            values = {max(weight, 0.01): [cell[key] for cell in found[row]] for weight, row in rows.items() if row in found}
            if values:  # a dot for each seed, a line through the means
                line, = axis.plot(list(values), [sum(v) / len(v) for v in values.values()], label=name)
                axis.plot(*zip(*((x, y) for x, each in values.items() for y in each)), "o", color=line.get_color())
        axis.set(xscale="log", yscale="log", xlabel="lambda (0 is drawn at 0.01)", title=title)
        axis.legend()
    figure.tight_layout()
    figure.savefig(ROOT / "results" / "claims_lambda.png", dpi=90)


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("groups", nargs="*", default=list(GROUPS), help=f"some of {', '.join(GROUPS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the steps of both stages")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument("--out", default="claims")
    parser.add_argument("--report", action="store_true", help="only report what is there")
    args = parser.parse_args()
    if not args.report:
        cells = [Cell(row, flags, seed, args) for group in args.groups for seed in args.seeds
                 for row, flags in GROUPS[group].items()]
        ready = {seed: threading.Event() for seed in args.seeds}  # post needs the tokenizer of 2d

        def work(cell):
            if cell.row == "post":
                ready[cell.seed].wait()
            try:
                cell.run()
            finally:
                if cell.row == "2d":
                    ready[cell.seed].set()

        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(work, cells))
    report(args)


if __name__ == "__main__":
    main()
