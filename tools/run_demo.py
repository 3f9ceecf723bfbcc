"""The five scripts one after the other on the bundled data, then one table: what `make demo` runs.

    python tools/run_demo.py                            # prologue, into out/
    python tools/run_demo.py --layout 2d --out out_2d   # the baseline without a prologue
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tokenizer import HelpFormatter, whole, writing


def run(name, *flags, minutes):
    """Runs a script and adds its minutes to those in the dict `minutes`. Ends where it fails."""
    words = [name, *(str(flag) for flag in flags)]
    print("\n$ python", " ".join(words), flush=True)
    words[0] = str(ROOT / name)
    start = time.perf_counter()
    code = subprocess.run([sys.executable, *words]).returncode
    minutes[name] = minutes.get(name, 0) + (time.perf_counter() - start) / 60
    if code != 0:
        sys.exit(code)  # the script has said why


def run_fid(*flags, minutes):
    """What fid.py measures, as a dict."""
    words = [str(ROOT / "fid.py"), *(str(flag) for flag in flags), "--json"]
    start = time.perf_counter()
    result = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, text=True)
    minutes["fid.py"] = minutes.get("fid.py", 0) + (time.perf_counter() - start) / 60
    if result.returncode != 0:
        sys.exit(result.returncode)
    return json.loads(result.stdout.splitlines()[-1])


def held_out(log):
    """The last line of train_ar.py's log with held-out measures."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line for line in lines if "val_nats" in line][-1]


def make_table(nats, plain, guided, reconstruction, minutes):
    """{title: text} of the table."""
    n = plain["count"]
    # Without a prologue the visual tokens are all there is.
    nats_text = f"{nats['val_nats']:.2f}"
    if "val_nats_prologue" in nats:
        nats_text += (f" = {nats['val_nats_prologue']:.2f} prologue + "
                      f"{nats['val_nats_visual']:.2f} visual")
    rows = {
        f"rFID ({reconstruction['count']:,} held-out images)": f"{reconstruction['rfid']:.2f}",
        "PSNR, dB": f"{reconstruction['psnr']:.2f}",
        "held-out nats per image": nats_text,
        f"gFID without CFG ({n:,} samples)": f"{plain['fid']:.2f}",
        f"gFID with CFG ({n:,} samples)": f"{guided['fid']:.2f}",
        "class consistency without / with CFG":
            f"{plain['class_consistency']:.3f} / {guided['class_consistency']:.3f}",
    }
    for name, value in minutes.items():
        rows[f"minutes in {name}"] = f"{value:.1f}"
    rows["minutes"] = f"{sum(minutes.values()):.1f}"
    return rows


def main():
    parser = argparse.ArgumentParser(description="The five scripts on the bundled data.",
                                     formatter_class=HelpFormatter)
    flag = parser.add_argument
    flag("--layout", default="prologue", choices=["prologue", "2d", "1d"], help="of the tokenizer")
    flag("--out", default="out", help="folder for everything that is written")
    flag("--seed", type=whole(0), default=0, help="of everything random")
    flag("--num", type=whole(2), default=2000, help="samples for each gFID")
    flag("--steps", type=whole(1), nargs=2, metavar=("STAGE1", "STAGE2"),
         help="of the trainers; by default their own")
    args = parser.parse_args()
    out = Path(args.out)
    print("python sample.py draws from checkpoints/fashion_mnist in seconds; what follows trains "
          "such a pair from scratch.")

    # The five scripts, the last two once with and once without guidance
    minutes = {}
    tokenizer = out / "tokenizer.safetensors"
    steps1 = []
    steps2 = []
    if args.steps:
        steps1 = ["--steps", args.steps[0]]
        steps2 = ["--steps", args.steps[1]]
    run("train_stage1.py", "--out", out, "--seed", args.seed, "--layout", args.layout, *steps1,
        minutes=minutes)
    run("pretokenize.py", "--out", out, minutes=minutes)
    run("train_ar.py", "--out", out, "--seed", args.seed, *steps2, minutes=minutes)
    run("sample.py", "--out", out, "--seed", args.seed, "--num", args.num, minutes=minutes)
    run("sample.py", "--tokenizer", tokenizer, "--ar", out / "ar.safetensors", "--no_cfg",
        "--out", out / "no_cfg", "--seed", args.seed, "--num", args.num, minutes=minutes)
    guided = run_fid(out / "samples.npz", minutes=minutes)
    plain = run_fid(out / "no_cfg" / "samples.npz", minutes=minutes)
    reconstruction = run_fid("--tokenizer", tokenizer, minutes=minutes)

    # The table
    nats = held_out(out / "train_ar.jsonl")
    rows = make_table(nats, plain, guided, reconstruction, minutes)
    print(f"\nlayout {args.layout}, seed {args.seed}; features of the Fashion-MNIST classifier")
    for title, text in rows.items():
        print(f"  {title:38} {text}")
    with writing(out / "demo.json") as temporary:
        content = {"layout": args.layout, "seed": args.seed} | rows
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    names = ["samples.png", "reconstructions.png"]
    if args.layout == "prologue":
        names.append("fixed_prologue.png")
    print("pictures:", ", ".join(str(out / name) for name in names))


if __name__ == "__main__":
    main()
