"""The five scripts one after the other on the embedded data, then one table: `make demo` calls this.

    python tools/run_demo.py                            # prologue, into out/
    python tools/run_demo.py --layout 2d --out out_2d   # the baseline without a prologue
"""
import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--layout", default="prologue")
    parser.add_argument("--out", default="out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num", type=int, default=2000, help="samples for each gFID")
    args = parser.parse_args()
    out, seconds = Path(args.out), {}

    def script(name, *flags, show=True):
        """Runs a script, adds its time to the table and returns the JSON line it printed, if any."""
        command = [sys.executable, str(ROOT / name), *map(str, flags)]
        print("\n$ python", " ".join(command[1:]).replace(f"{ROOT}/", ""), flush=True)
        start = time.perf_counter()
        output = subprocess.run(command, check=True, stdout=None if show else subprocess.PIPE, text=True).stdout
        seconds[name] = seconds.get(name, 0) + time.perf_counter() - start
        return output and json.loads(output.splitlines()[-1])

    print("python sample.py draws from checkpoints/fashion_mnist in seconds; what follows trains such a pair from scratch.")
    common = ["--out", out, "--seed", args.seed]
    script("train_stage1.py", *common, "--layout", args.layout)
    script("pretokenize.py", *common)
    script("train_ar.py", *common)
    script("sample.py", *common, "--num", args.num)
    script("sample.py", "--tokenizer", out / "tokenizer.safetensors", "--ar", out / "ar.safetensors", "--num", args.num,
           "--seed", args.seed, "--out", out / "no_cfg", "--no_cfg")
    guided = script("fid.py", out / "samples.npz", "--json", show=False)
    plain = script("fid.py", out / "no_cfg" / "samples.npz", "--json", show=False)
    reconstruction = script("fid.py", "--tokenizer", out / "tokenizer.safetensors", "--json", show=False)
    nats = [json.loads(line) for line in (out / "train_ar.jsonl").read_text().splitlines() if "val_nats" in line][-1]

    rows = {
        "rFID (2,000 held-out images)": f"{reconstruction['rfid']:.2f}",
        "PSNR, dB": f"{reconstruction['psnr']:.2f}",
        "held-out nats per image": f"{nats['val_nats']:.2f} = {nats['val_nats_prologue']:.2f} prologue + "
                                   f"{nats['val_nats_visual']:.2f} visual",
        f"gFID without CFG ({args.num:,} samples)": f"{plain['fid']:.2f}",
        f"gFID with CFG ({args.num:,} samples)": f"{guided['fid']:.2f}",
        "class consistency without / with CFG": f"{plain['class_consistency']:.3f} / {guided['class_consistency']:.3f}",
    } | {f"minutes in {name}": f"{s / 60:.1f}" for name, s in seconds.items()} | {"minutes": f"{sum(seconds.values()) / 60:.1f}"}
    print(f"\nlayout {args.layout}, seed {args.seed}; features of the Fashion-MNIST classifier")
    print("\n".join(f"  {name:38} {value}" for name, value in rows.items()))
    (out / "demo.json").write_text(json.dumps({"layout": args.layout, "seed": args.seed} | rows, indent=1) + "\n")
    pictures = ["samples.png", "reconstructions.png"] + ["fixed_prologue.png"] * (args.layout != "2d")
    print("pictures:", ", ".join(str(out / name) for name in pictures))


if __name__ == "__main__":
    main()
