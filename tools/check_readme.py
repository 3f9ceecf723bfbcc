"""Runs every command in README.md's bash blocks and every recipe, on a few tiny images for a few steps, so that none rots.

    python tools/check_readme.py            # prints each command and its seconds; non-zero exit if one fails

Commands that install, download or train for minutes are listed as skipped. Big flags are overridden by what TINY appends:
the last of two equal flags counts. torchrun is left out, the scripts run on one process.
"""
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from test_released import official_weights, write_shards

SKIPPED = ("make ", "pip ", "hf ", "git ", "cd ", "python tools/claims.py", "python tools/bench.py", "python tools/demo.py",
           "python tools/run_demo.py", "recipes/")
TRAINING = "--steps 4 --batch_size 8 --log_every 2 --eval_images 8 --num_workers 0"
STAGE1 = f"--size tiny --ar_size nano {TRAINING} --perceptual none --gan_channels 8"
STAGE2 = f"--size nano {TRAINING}"
TINY = {"train_stage1.py": STAGE1, "train_ar.py": STAGE2, "pretokenize.py": "--num_workers 0",
        "sample.py": "--num 20 --columns 2 --batch_size 20 --num_workers 0"}
RECIPES = {"direct_ce": "CE_WEIGHTS=0.3 LAYOUTS=2d", "ablations": "ONLY=k4"}  # one of their many rows


def data(folder):
    """Tiny stand-ins for ImageNet's zip, a user's images, ADM's reference and samples, and the released directories."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(folder / "imagenet.zip", "w") as archive:
        inside, table = "ILSVRC/Data/CLS-LOC", "ImageId,PredictionString\n"
        for split, count in (("train", 12), ("val", 8)):
            for label in range(2 * count):
                name = f"n0{label % 2}/{label}.JPEG" if split == "train" else f"ILSVRC2012_val_{label}.JPEG"
                with archive.open(f"{inside}/{split}/{name}", "w") as f:
                    Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(f, "jpeg")
                table += f"ILSVRC2012_val_{label},n0{label % 2} 1 2 3 4 \n" if split == "val" else ""
        archive.writestr("LOC_val_solution.csv", table)
    for split in ("train", "val"):
        for i in range(16):
            path = folder / "my_images" / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (80, 70, 3), np.uint8)).save(path)
    for name in ("VIRTUAL_imagenet256_labeled.npz", "admnet_guided_upsampled_imagenet256.npz"):
        np.savez(folder / name, arr_0=rng.integers(0, 255, (40, 28, 28, 3), np.uint8))
    shapes = json.loads((ROOT / "data" / "official_layout.json").read_text())["shapes"]
    enc, dec, ar = (official_weights(shapes[part], part) for part in ("enc", "dec", "ar"))
    write_shards(folder / "ckpts" / "prologue-l-tokenizer", {0: enc, 1: dec, 2: enc, 3: dec})
    write_shards(folder / "ckpts" / "ar-prologue-l-xl", {0: ar})


def run(command, folder, environment):
    start = time.perf_counter()
    result = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(f"{time.perf_counter() - start:5.1f} s  {' '.join(map(str, command[-8:]))}", flush=True)
    return "" if result.returncode == 0 else f"FAILED: {shlex.join(map(str, command))}\n{result.stdout[-1500:]}"


def readme(folder, environment):
    """Every line of README's bash blocks, in order."""
    failures = []
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = [line.partition("#")[0] for line in "".join(blocks).replace("\\\n", " ").splitlines()]
    for line in (part.strip() for part in "&&".join(lines).split("&&")):
        if not line or line.startswith(SKIPPED):
            print(f"skipped: {line}" if line else "", end="\n" if line else "")
            continue
        words = [word for word in shlex.split(re.sub(r"^torchrun .*?(?=\w+\.py)", "python ", line)) if word != "--compile"]
        failures.append(run([sys.executable, ROOT / words[1], *words[2:], *TINY.get(Path(words[1]).name, "").split()],
                            folder, environment))
    return failures


def recipes(folder, environment):
    """Every recipe, tokenizers before the AR models that need them."""
    names, failures = [path.stem for path in (ROOT / "recipes").glob("*.sh")], []
    for name in sorted(names, key=lambda name: (name.startswith("ar_"), name == "prologue_post", name)):
        extra = dict(pair.split("=") for pair in RECIPES.get(name, "").split())
        flags = {"common": None, "evaluate": None}.get(name, STAGE2 if name.startswith("ar_") else STAGE1)
        if flags:
            failures.append(run(["bash", ROOT / "recipes" / f"{name}.sh", *flags.split()], ROOT, environment | extra))
    pair = [folder / "runs" / path for path in ("prologue_b/tokenizer.safetensors", "ar_b_b/ar.safetensors")]
    evaluate = ["bash", ROOT / "recipes" / "evaluate.sh", *pair, "prologue-b-b", "--columns", "1"]
    return failures + [run(evaluate, ROOT, environment)]


def main():
    with tempfile.TemporaryDirectory() as name:
        folder, start = Path(name), time.perf_counter()
        data(folder)
        python = folder / "python"  # recipes call --compile, which takes a minute for each tiny model: it is taken out
        python.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} "${{@/#--compile/--seed=0}}"\n')
        python.chmod(0o755)
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "LAUNCH": str(python), "DATA": str(folder / "imagenet.zip/ILSVRC/Data/CLS-LOC"),
            "RUNS": str(folder / "runs"), "AR_FLAGS": STAGE2, "NUM": "20", "BATCH": "20",
            "REFERENCE": str(folder / "VIRTUAL_imagenet256_labeled.npz")}
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(part, folder, environment) for part in (readme, recipes)]
            failures = [text for job in jobs for text in job.result() if text]
        print(f"{time.perf_counter() - start:.0f} s in all, {len(failures)} failed")
    sys.exit("\n".join(failures) or 0)


if __name__ == "__main__":
    main()
