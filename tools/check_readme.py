"""Runs every command in README.md's bash blocks and every recipe on a few tiny images for a few
steps, so that none of them rots.

    python tools/check_readme.py    # prints each command and its seconds; exit code 1 if one fails

What installs or trains for minutes is listed as skipped. Flags that make a run large are overridden
by flags appended to the command, since the last of two equal flags counts. torchrun is left out:
everything runs on one process, two commands at a time.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

from test_released import official_weights, write_pair

SKIPPED = ("make", "pip", "git", "cd", "python tools/claims.py", "python tools/bench.py",
           "python tools/demo.py", "python tools/run_demo.py", "python tools/watch.py", "recipes/")

# What is appended to a command
TRAINING = "--steps 4 --batch_size 8 --log_every 2 --eval_images 8"
STAGE1 = f"--size tiny --ar_size nano --perceptual none --gan_channels 8 --num_workers 0 {TRAINING}"
STAGE2 = f"--size nano {TRAINING}"
SAMPLE = "--num 20 --columns 2 --batch_size 20"
APPENDED = {
    "train_stage1.py": STAGE1,
    "pretokenize.py": "--num_workers 0",
    "train_ar.py": STAGE2,
    "sample.py": SAMPLE,
    "tools/released.py": "--from ckpts",
}

# Recipes in the order in which one needs what another leaves; the chains do not need each other.
# Those that train many rows are told by the environment to train one.
CHAINS = [
    ["tokenizer_2d", "ar_2d", "prologue_post", "ar_post"],
    ["prologue_b", "ar_b_b", "ar_b_l", "ar_b_xl", "evaluate"],
    ["prologue_l", "ar_l_b", "ar_l_l", "ar_l_xl"],
    ["tokenizer_2d_l", "ar_2d_l_b"],
    ["tokenizer_1d", "ar_1d"],
    ["prologue_onestage"],
    ["one_gpu"],
    ["ablations"],
    ["ablations_l"],
    ["direct_ce"],
    ["evaluate_all"],
]
ENVIRONMENT = {
    "ablations": {"ONLY": "k4", "AR_FLAGS": STAGE2},
    "ablations_l": {"ONLY": "l-b-vgg", "AR_FLAGS": STAGE2},
    "direct_ce": {"LAYOUTS": "2d", "CE_WEIGHTS": "0.3", "AR_FLAGS": STAGE2},
    "evaluate_all": {"ONLY": "prologue-l-xl"},
    "one_gpu": {"AR_FLAGS": f"{STAGE2} --micro_batch_size 8"},
}


# Tiny stand-ins for everything that the commands name


def random_image(rng, height, width):
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8))


def write_imagenet(path, rng):
    """Kaggle's zip: train in class folders, val flat, and the classes of val in a table."""
    table = ["ImageId,PredictionString"]
    with zipfile.ZipFile(path, "w") as archive:

        def write(name):
            with archive.open(f"ILSVRC/Data/CLS-LOC/{name}", "w") as file:
                random_image(rng, 40, 50).save(file, "jpeg")

        for i in range(24):
            write(f"train/n0{i % 2}/{i}.JPEG")
        for i in range(16):
            write(f"val/ILSVRC2012_val_{i}.JPEG")
            table.append(f"ILSVRC2012_val_{i},n0{i % 2} 1 2 3 4 ")
        archive.writestr("LOC_val_solution.csv", "\n".join(table) + "\n")


def write_released(folder):
    """A pair in the released format, small but for the 1,000 classes, which make ImageNet's names
    known. 4 x 4 patches of 7 x 7 pixels make images of 28 x 28, whose features need no download.
    """
    shapes = json.loads((ROOT / "data" / "official_layout.json").read_text())["shapes"]
    shapes["enc"]["enc.input_layer.weight"] = [128, 3 * 7 * 7]
    shapes["dec"]["dec.out.weight"] = [3 * 7 * 7, 128]
    shapes["dec"]["dec.out.bias"] = [3 * 7 * 7]
    shapes["ar"]["bos_emb.weight"] = [1001, 128]
    weights = [official_weights(shapes[part], part) for part in ("enc", "dec", "ar")]
    for name in ("prologue-l-xl", "prologue-l-b"):
        write_pair(folder, name, *weights)


def write_data(folder):
    rng = np.random.default_rng(0)
    write_imagenet(folder / "imagenet.zip", rng)
    for split in ("train", "val"):
        for i in range(16):
            path = folder / "my_images" / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            random_image(rng, 80, 70).save(path)
    write_released(folder / "ckpts")
    (folder / "results").mkdir()
    shutil.copy(ROOT / "results" / "shoe.png", folder / "results")

    # A finished run, ADM's reference and ADM's samples
    (folder / "l_xl").mkdir()
    for name in ("tokenizer.safetensors", "ar.safetensors"):
        shutil.copy(ROOT / "checkpoints" / "fashion_mnist" / name, folder / "l_xl")
    for name in ("l_xl/samples.npz", "VIRTUAL_imagenet256_labeled.npz",
                 "admnet_guided_upsampled_imagenet256.npz"):
        np.savez(folder / name, arr_0=rng.integers(0, 255, (40, 28, 28, 3), np.uint8))


def write_python(folder):
    """A program `python` that leaves out --compile, which takes a minute for each tiny model."""
    path = folder / "bin" / "python"
    path.parent.mkdir()
    path.write_text("#!/usr/bin/env bash\n"
                    "words=()\n"
                    'for word in "$@"; do\n'
                    '    [ "$word" = --compile ] || words+=("$word")\n'
                    "done\n"
                    f'exec {shlex.quote(sys.executable)} "${{words[@]}}"\n')
    path.chmod(0o755)


# Running


def run(words, cwd, environment):
    """Runs a command; returns what to say of it if it fails, else None."""
    words = [str(word) for word in words]
    start = time.perf_counter()
    result = subprocess.run(words, cwd=cwd, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)
    text = " ".join(words).replace(f"{ROOT}/", "")
    print(f"{time.perf_counter() - start:5.1f} s  {text[:110]}", flush=True)
    if result.returncode == 0:
        return None
    return f"FAILED: {shlex.join(words)}\n{result.stdout[-1500:]}"


def readme_commands():
    """The commands of README's bash blocks in order, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    commands = []
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        for command in line.partition("#")[0].split("&&"):
            if command.strip():
                commands.append(command.strip())
    return commands


def run_readme(folder, environment):
    """Runs the commands in `folder`; returns the failures."""
    failures = []
    for command in readme_commands():
        if command.startswith(SKIPPED):
            print(f"skipped: {command}", flush=True)
            recipe = ROOT / command.split()[0]
            if command.startswith("recipes/") and not recipe.exists():
                failures.append(f"FAILED: there is no {recipe}")
            continue
        words = shlex.split(re.sub(r"^torchrun .*?(?=\S+\.py)", "python ", command))
        script = words[1]
        words = ["python", ROOT / script, *words[2:], *APPENDED.get(script, "").split()]
        failures.append(run(words, folder, environment))
    return failures


def words_of_recipe(name, folder):
    """The command line of a recipe."""
    words = ["bash", ROOT / "recipes" / f"{name}.sh"]
    if name == "evaluate":
        words.append(folder / "runs" / "prologue_b" / "tokenizer.safetensors")
        words.append(folder / "runs" / "ar_b_b" / "ar.safetensors")
        words += ["prologue-b-b", "--columns", 1]
    elif name == "evaluate_all":
        words += ["--columns", 1]
    elif name.startswith("ar_"):
        words += STAGE2.split()
    elif name == "one_gpu":
        words += [*STAGE1.split(), "--micro_batch_size", "8"]
    else:
        words += STAGE1.split()
    return words


def run_chain(names, folder, environment):
    """Runs recipes one after the other; returns the failures."""
    failures = []
    for name in names:
        words = words_of_recipe(name, folder)
        failures.append(run(words, ROOT, environment | ENVIRONMENT.get(name, {})))
    return failures


def run_all(folder):
    """Everything, two commands at a time; returns the failures."""
    write_data(folder)
    write_python(folder)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "LAUNCH": "python",
        "DATA": str(folder / "imagenet.zip/ILSVRC/Data/CLS-LOC"),
        "RUNS": str(folder / "runs"),
        "REFERENCE": str(folder / "VIRTUAL_imagenet256_labeled.npz"),
        "FROM": str(folder / "ckpts"),
        "NUM": "20",
        "BATCH": "20",
    }
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(run_readme, folder, environment)]
        jobs += [pool.submit(run_chain, names, folder, environment) for names in CHAINS]
        failures = [failure for job in jobs for failure in job.result() if failure is not None]

    known = {"common"}.union(*CHAINS)
    for path in sorted((ROOT / "recipes").glob("*.sh")):
        if path.stem not in known:
            failures.append(f"FAILED: recipes/{path.name} is in none of the chains of this script")
    return failures


def main():
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        failures = run_all(Path(folder))
    print(f"{time.perf_counter() - start:.0f} s in all, {len(failures)} failed")
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
