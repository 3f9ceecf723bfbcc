"""Where the gain of a prologue comes from, measured on finished cells of tools/claims.py.

    python tools/claims.py layouts no_classes --seeds 0 1 2     # hours on a CPU
    python tools/why.py --seeds 0 1 2                           # tables, and results/claims_why.png

Four measures, each of cells whose visual tokens are the very same (those of 2d, which post and its
controls leave as they are), as the mean over the seeds:

1. Nats of the visual tokens by row of the image: where does a prologue make them easier to predict?
2. gFID of completions: the upper rows of held-out images are given, with the images' own prologues,
   and the rest is drawn. If a prologue is a plan for what is not there yet, what it gains shrinks
   with the rows that are given.
3. gFID, Inception Score, precision and recall over the temperature of the visual tokens: does
   diversity move from the visual tokens into the prologue?
4. The nats that the class saves, by token group: what guidance by the class can act on.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from claims import ROOT, build_cells

import fid
from ar import AR
from pretokenize import BUNDLED
from sample import decode, draw
from tokenizer import HelpFormatter, InputError, Tokenizer, whole, writing

WITHOUT_CLASSES = ["2d, no classes", "constant", "post, no classes", "post, tau 1", "the class",
                   "k-means, 2 tokens"]
WITH_CLASSES = ["2d", "post"]
MEASURES = ["gfid", "inception_score", "precision", "recall"]  # of tools/sweep.py
BATCH_SIZE = 100


class Pair:
    """A finished cell: its models, its held-out codes (images, K+N) and labels (images,)."""

    def __init__(self, cell):
        path = cell.out / "cell.json"
        if not path.exists():
            raise InputError(f"{path} does not exist: run tools/claims.py \"{cell.name}\" "
                             f"--seeds {cell.seed}")
        self.cell = json.loads(path.read_text())
        self.out = cell.out
        self.tokenizer = Tokenizer.load(cell.tokenizer_folder() / "tokenizer.safetensors")
        self.ar = AR.load(cell.out / "ar.safetensors")
        with np.load(cell.codes_folder() / "codes_val.npz") as file:
            self.codes = torch.from_numpy(file["codes"][:, 0].astype(np.int64))
            self.labels = torch.from_numpy(file["labels"])
        if not cell.row.classes:
            self.labels = torch.zeros_like(self.labels)
        self.k = self.ar.cfg.num_prologue
        self.grid = self.tokenizer.cfg.grid


def nats_by_row(pair):
    """Nats of the visual tokens of each row of the image, mean over the held-out images: (grid,)"""
    total = torch.zeros(pair.grid)
    for codes, labels in zip(pair.codes.split(BATCH_SIZE), pair.labels.split(BATCH_SIZE)):
        tokens = pair.ar.sequence(codes)  # (B, L)
        logits = pair.ar(codes, labels)  # (B, L, vocabulary)
        nats = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
        visual = nats.view(tokens.shape)[:, -pair.grid**2 :]  # (B, N)
        total += visual.unflatten(1, (pair.grid, pair.grid)).sum((0, 2))
    return total / len(pair.codes)


def class_nats(pair):
    """Nats that the class saves in the prologue and in the visual tokens, per held-out image."""
    unknown = torch.full_like(pair.labels, pair.ar.cfg.num_classes)
    saved = {"nats_prologue": 0.0, "nats_visual": 0.0}
    for batch in torch.arange(len(pair.codes)).split(BATCH_SIZE):
        given = pair.ar.measure(pair.codes[batch], pair.labels[batch])
        without = pair.ar.measure(pair.codes[batch], unknown[batch])
        for name in saved:
            if name in given:
                saved[name] += (without[name] - given[name]).sum().item() / len(pair.codes)
    return saved["nats_prologue"], saved["nats_visual"]


class Completions:
    """`count` held-out images with their upper `kept` rows and their prologue given and the rest
    drawn, at the cell's best temperatures: a source for fid.extract."""

    def __init__(self, pair, kept, count):
        self.pair = pair
        self.kept = kept
        self.numbers = torch.arange(count) * len(pair.codes) // count  # of all classes

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, part):
        pair = self.pair
        numbers = self.numbers[part]  # (n,)
        codes = pair.codes[numbers]
        prologue = codes[:, : pair.k] if pair.k > 0 else None
        visual = codes[:, pair.k : pair.k + self.kept * pair.grid]
        drawn = draw(pair.ar, pair.labels[numbers], numbers, 0, len(numbers),
                     pair.cell["settings_no_cfg"], prologue=prologue, visual=visual)
        return decode(pair.tokenizer, drawn, len(numbers)).numpy()


def completion_gfids(pair, kept, count, network, reference):
    """gFID of the completions of `count` held-out images for each number of kept rows."""
    result = []
    for number in kept:
        images = Completions(pair, number, count)
        title = f"{pair.cell['row']}, seed {pair.cell['seed']}, {number} rows kept"
        drawn = fid.extract(network, images, torch.device("cpu"), BATCH_SIZE, title)
        result.append(fid.frechet_distance(*drawn["pool"], *reference["pool"]))
    return result


def over_temperature(pair):
    """{temperature of the visual tokens: MEASURES} of the 500 samples that the cell has tried,
    with the prologue at temperature 1."""
    result = {}
    for tried in json.loads((pair.out / "plain" / "sweep.json").read_text())["rows"]:
        if tried.get("temperature_prologue", 1) == 1:
            result[tried["temperature"]] = [tried[name] for name in MEASURES]
    return result


def print_table(title, head, rows):
    """A table in Markdown; rows {name: values}"""
    print(f"\n{title}\n\n| | {' | '.join(head)} |")
    print("| --- " * (len(head) + 1) + "|")
    for name, values in rows.items():
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in values)} |")


def save_picture(path, nats, gfids, kept, temperatures):
    """The first three measures, a curve for each row of the table."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.5), layout="tight")
    axes = figure.subplots(1, 3)
    for name in nats:
        axes[0].plot(range(1, len(nats[name]) + 1), nats[name], marker=".", label=name)
        axes[1].plot(kept, gfids[name], marker=".", label=name)
        values = sorted(temperatures[name])
        axes[2].plot(values, [temperatures[name][value][0] for value in values], marker=".",
                     label=name)
    axes[0].set(xlabel="row of the image", title="nats of the visual tokens")
    axes[1].set(xlabel="rows given", title="gFID of completions")
    axes[2].set(xlabel="temperature of the visual tokens", title="gFID of 500 samples")
    axes[2].legend()
    with writing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)
    print(f"\n{path}")


def parse_args():
    parser = argparse.ArgumentParser(description="Where the gain of a prologue comes from.",
                                     formatter_class=HelpFormatter)
    flag = parser.add_argument
    flag("--seeds", type=whole(0), nargs="+", default=[0, 1, 2], help="of the cells")
    flag("--kept", type=int, choices=range(7), nargs="+", default=[0, 1, 2, 4],
         help="rows of the image that are given, of 7")
    flag("--num", type=whole(2), default=1000, help="completions for each gFID")
    flag("--cells", default="claims", help="the --out folder of tools/claims.py")
    flag("--results", default=str(ROOT / "results"), help="folder of the picture")
    return parser.parse_args()


@torch.no_grad()
def main():
    args = parse_args()
    cells = build_cells(args.cells, args.seeds, threads=1)
    network = fid.feature_network("auto", 28, None, torch.device("cpu"))[1]
    reference = fid.reference_features(str(BUNDLED / "train"), network, torch.device("cpu"),
                                       BATCH_SIZE, 28)

    # Without classes
    nats = {}
    gfids = {}
    temperatures = {}
    for name in WITHOUT_CLASSES:
        pairs = [Pair(cells[name, seed]) for seed in args.seeds]
        nats[name] = torch.stack([nats_by_row(pair) for pair in pairs]).mean(0).tolist()
        of_seeds = [completion_gfids(pair, args.kept, args.num, network, reference)
                    for pair in pairs]
        gfids[name] = np.mean(of_seeds, 0).tolist()
        tried = [over_temperature(pair) for pair in pairs]
        temperatures[name] = {value: np.mean([of_seed[value] for of_seed in tried], 0)
                              for value in tried[0]}
    head = [f"row {i + 1}" for i in range(len(nats[WITHOUT_CLASSES[0]]))]
    print_table("Nats of the visual tokens, by row of the image", head, nats)
    print_table("gFID of completions, by rows given", [str(rows) for rows in args.kept], gfids)
    shared = sorted(set.intersection(*(set(values) for values in temperatures.values())))
    for place, measure in enumerate(MEASURES):
        rows = {name: [values[t][place] for t in shared] for name, values in temperatures.items()}
        print_table(f"{measure} of 500 samples, by temperature", [str(t) for t in shared], rows)

    # With classes
    saved = {}
    for name in WITH_CLASSES:
        of_seeds = [class_nats(Pair(cells[name, seed])) for seed in args.seeds]
        saved[name] = np.mean(of_seeds, 0)
    print_table("Nats that the class saves", ["prologue", "visual tokens"], saved)
    save_picture(Path(args.results) / "claims_why.png", nats, gfids, args.kept, temperatures)


if __name__ == "__main__":
    main()
