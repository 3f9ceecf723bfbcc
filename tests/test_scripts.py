"""Tests of the scripts as a user runs them: what they leave, resuming, ranks, signals, bad input.

    python -m pytest tests/test_scripts.py
"""

import functools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from ar import AR
from pretokenize import Images, center_crop
from tokenizer import Tokenizer, to_float
from train_ar import Tokens

TEMPORARY = tempfile.TemporaryDirectory()  # gone when the tests end
STAGE1 = ["--batch_size", 8, "--warmup", 1, "--hold", 1000, "--eval_images", 8, "--eval_every", 100,
          "--log_every", 1]
STAGE2 = ["--batch_size", 8, "--warmup", 1, "--hold", 1000, "--eval_every", 100, "--log_every", 1,
          "--dropout", 0]


@functools.cache
def folder():
    """48 random training and 16 held-out images in two classes."""
    root = Path(TEMPORARY.name) / "images"
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 8)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (28, 28, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def command(name, *args, ranks=1):
    """The command line of a script, under torchrun for several ranks."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", ranks]
        launcher += ["--master_port", 29533]
    return [str(word) for word in (*launcher, ROOT / name, *args)]


def script(name, *args, ranks=1, timeout=120):
    """Runs a script in a process of its own; returns its exit code and what it printed."""
    result = subprocess.run(command(name, *args, ranks=ranks), capture_output=True, text=True,
                            timeout=timeout, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return result.returncode, result.stdout + result.stderr


def run(*args, **settings):
    """The same for a script that has to succeed; returns what it printed."""
    code, text = script(*args, **settings)
    assert code == 0, text
    return text


@functools.cache
def pipeline():
    """What the five scripts leave, with four steps of each training."""
    out = Path(TEMPORARY.name) / "out"
    data = ["--data", folder() / "train", "--out", out]
    run("train_stage1.py", *data, "--steps", 4, *STAGE1)
    run("pretokenize.py", *data, "--flip")
    run("train_ar.py", "--out", out, "--steps", 4, *STAGE2)
    run("sample.py", "--out", out, "--num", 6, "--data", folder() / "val")
    text = run("fid.py", out / "samples.npz", folder() / "train", "--json")
    result = json.loads(next(line for line in text.splitlines() if line.startswith("{")))
    assert result["count"] == 6
    assert result["fid"] > 0
    assert "class_consistency" in result
    return out


def stage2_folder(path):
    """A new folder with what train_ar.py starts from."""
    path.mkdir()
    for name in ("codes.npz", "codes_val.npz", "tokenizer.safetensors"):
        (path / name).write_bytes((pipeline() / name).read_bytes())
    return path


def log(path, *keys):
    """The values of these keys in all lines of a log that have them."""
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [[line[key] for key in keys] for line in lines if keys[0] in line]


def state(path):
    return torch.load(path, weights_only=True)


# What they leave


def test_pipeline_leaves_what_it_says():
    out = pipeline()
    assert {p.name for p in out.iterdir()} == {
        "tokenizer.safetensors", "joint_ar.safetensors", "train_stage1.jsonl", "train_stage1.png",
        "train_stage1.pt", "codes.npz", "codes_val.npz", "ar.safetensors", "train_ar.jsonl",
        "train_ar.png", "train_ar.pt", "samples.npz", "samples.json", "samples.png",
        "fixed_prologue.png", "reconstructions.png"}
    with np.load(out / "codes.npz") as tokens:
        assert tokens["codes"].shape == (48, 2, 8 + 49)
        assert tokens["codes"].dtype == np.uint16
        assert tokens["labels"].tolist() == [0] * 24 + [1] * 24
        assert json.loads(str(tokens["config"]))["classes"] == ["cat", "dog"]
        images = Images(folder() / "train")
        pixels = torch.tensor(center_crop(images.open(30), 28)).permute(2, 0, 1)[None]
        tokenizer = Tokenizer.load(out / "tokenizer.safetensors")
        assert np.array_equal(tokenizer.encode(to_float(pixels)), tokens["codes"][30, :1])
    with np.load(out / "samples.npz") as samples:
        assert samples["arr_0"].shape == (6, 28, 28, 3)
        assert samples["arr_1"].tolist() == [0, 1, 0, 1, 0, 1]
    held_out = log(out / "train_stage1.jsonl", "val_psnr", "val_accuracy_prologue",
                   "val_usage_visual", "val_perplexity_prologue")
    assert len(held_out) == 1


def test_variations_of_a_picture(tmp_path):
    """A row for the picture: itself, its reconstruction, two images that keep its upper half; and
    a last row without it."""
    out = pipeline()
    Image.new("L", (50, 40), 128).save(tmp_path / "grey.bmp")
    pair = ["--tokenizer", out / "tokenizer.safetensors", "--ar", out / "ar.safetensors"]
    words = ["sample.py", *pair, "--columns", 2, "--out", tmp_path / "out", "--image"]
    run(*words, tmp_path / "grey.bmp", "--classes", "dog", "--keep", 0.5)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["variations.png"]
    assert Image.open(tmp_path / "out" / "variations.png").size == (4 * 58 + 2, 2 * 58 + 2)
    code, text = script(*words, out / "train_ar.jsonl")
    assert code == 1
    assert "train_ar.jsonl cannot be read as an image: PIL knows no such format" in text


def test_samples_and_tokens_depend_on_no_batch_size_nor_ranks(tmp_path):
    out = pipeline()
    pair = ["--tokenizer", out / "tokenizer.safetensors", "--ar", out / "ar.safetensors"]
    run("sample.py", *pair, "--data", folder() / "val", "--out", tmp_path, "--num_samples", 6,
        "--batch_size", 4, ranks=2)
    run("pretokenize.py", "--data", folder() / "train", *pair[:2], "--flip", "--out", tmp_path,
        "--batch_size", 6, "--num_workers", 2, ranks=2)
    for file, name in (("samples.npz", "arr_0"), ("codes.npz", "codes")):
        assert np.array_equal(np.load(tmp_path / file)[name], np.load(out / file)[name]), file


# Training


def test_resume_continues_exactly(tmp_path):
    data = ["--data", folder() / "train", "--out", tmp_path]
    ar = ["--out", stage2_folder(tmp_path / "ar")]
    for words in (("train_stage1.py", *data, *STAGE1), ("train_ar.py", *ar, *STAGE2)):
        assert "so this run begins at step 1" in run(*words, "--steps", 2, "--resume")
        assert "going on from step 2" in run(*words, "--steps", 4, "--resume")
        run(*words, "--steps", 4, "--resume")  # there is nothing left to do
    keys = ("l1", "vq", "ce", "gan", "discriminator")
    unbroken = log(pipeline() / "train_stage1.jsonl", *keys)
    assert log(tmp_path / "train_stage1.jsonl", *keys) == unbroken
    a = state(tmp_path / "train_stage1.pt")
    b = state(pipeline() / "train_stage1.pt")
    for name in ("tokenizer", "ema", "ar", "discriminator"):
        assert all(torch.equal(a[name][key], b[name][key]) for key in b[name])
    unbroken = log(pipeline() / "train_ar.jsonl", "ce", "grad_norm")
    assert log(tmp_path / "ar" / "train_ar.jsonl", "ce", "grad_norm") == unbroken


def test_accumulation_and_two_ranks_give_the_gradients_of_one_batch(tmp_path):
    pipeline()  # before the threads: a cache does not lock

    def train(variant):
        name, ranks, flags = variant
        out = stage2_folder(tmp_path / name)
        run("train_ar.py", "--out", out, "--steps", 1, *STAGE2, *flags, ranks=ranks)
        # Without the discriminator, whose BatchNorm sees the images of one forward.
        run("train_stage1.py", "--data", folder() / "train", "--out", out, "--steps", 1, *STAGE1,
            "--gan_weight", 0, *flags, ranks=ranks)
        return out

    accumulated = ["--micro_batch_size", 2, "--gradient_checkpointing"]
    variants = [("one", 1, []), ("accumulated", 1, accumulated), ("ranks", 2, [])]
    with ThreadPoolExecutor(2) as pool:
        one, *others = pool.map(train, variants)
    for out in others:
        for name in ("train_stage1.pt", "train_ar.pt"):
            a = state(one / name)["optimizer"]["state"]
            b = state(out / name)["optimizer"]["state"]
            assert a.keys() == b.keys()
            assert len(a) > 10
            for i in a:  # after one step AdamW's first moment is the gradient times a constant
                torch.testing.assert_close(b[i]["exp_avg"], a[i]["exp_avg"], rtol=1e-3, atol=2e-6)


def test_variants_train_on_two_ranks_and_what_they_leave_is_of_use(tmp_path):
    """DistributedDataParallel allows no parameter to be without a gradient there."""
    data = ["--data", folder() / "train", "--steps", 2, *STAGE1]
    frozen = tmp_path / "2d" / "tokenizer.safetensors"
    variants = {
        "2d": ["--layout", "2d"],
        "post": ["--layout", "post", "--init", frozen],
        "1d": ["--layout", "1d", "--direct_ce", "--tau", 1, "--ce_weight", 0.3],
        "onestage": ["--onestage"],
    }
    for name, flags in variants.items():
        run("train_stage1.py", *data, *flags, "--out", tmp_path / name, ranks=2)
    for name in ("2d", "post", "1d"):  # and each goes on
        begin = ["--init", tmp_path / name / "tokenizer.safetensors"]
        run("train_stage1.py", *data, *variants[name], *begin, "--out", tmp_path / f"{name}_on")
    a = Tokenizer.load(frozen)
    b = Tokenizer.load(tmp_path / "post_on" / "tokenizer.safetensors")
    pixels = np.asarray(Images(folder() / "val").open(0))
    x = to_float(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    assert torch.equal(a.encode(x), b.encode(x)[:, 8:])  # post leaves the visual codes as they were
    run("sample.py", "--out", tmp_path / "onestage", "--num", 4, "--sheet", 3)
    assert Image.open(tmp_path / "onestage" / "sheet.png").size == (3 * 58 + 2, 3 * 58 + 2)


def test_init_goes_on_with_other_classes_and_other_images(tmp_path):
    """With a learning rate of 0 a run ends with the weights that it begins with."""
    out = pipeline()
    still = ["--lr", 0, "--min_lr", 0, "--steps", 1]
    with np.load(out / "codes.npz") as file:
        tokens = dict(file)
    tokens["config"] = str(tokens["config"]).replace('"cat"', '"cow"')
    np.savez(tmp_path / "codes.npz", **tokens)
    text = run("train_ar.py", "--codes", tmp_path / "codes.npz", "--tokenizer",
               out / "tokenizer.safetensors", "--init", out / "ar.safetensors", "--out", tmp_path,
               *STAGE2, *still)
    assert "1 of 2 classes are new" in text
    before = AR.load(out / "ar.safetensors")
    after = AR.load(tmp_path / "ar.safetensors")
    assert after.cfg.classes == ["cow", "dog"]
    cat, dog, unconditional = before.bos.weight
    torch.testing.assert_close(after.bos.weight,
                               torch.stack([(cat + dog) / 2, dog, unconditional]))
    assert torch.equal(before.embedding.weight, after.embedding.weight)
    assert torch.equal(before.head.weight, after.head.weight)

    # A model that knew no classes
    text = run("train_ar.py", "--codes", tmp_path / "codes.npz", "--tokenizer",
        out / "tokenizer.safetensors", "--init", out / "joint_ar.safetensors", "--out", tmp_path,
        *STAGE2, *still)
    cow, dog, unconditional = AR.load(tmp_path / "ar.safetensors").bos.weight
    assert torch.equal(cow, unconditional)
    assert torch.equal(dog, unconditional)
    assert "this replaces the run" in text

    run("train_stage1.py", "--data", folder() / "val", "--init", out / "tokenizer.safetensors",
        "--init_ar", out / "joint_ar.safetensors", "--out", tmp_path, *STAGE1, *still)
    before = Tokenizer.load(out / "tokenizer.safetensors").state_dict()
    after = Tokenizer.load(tmp_path / "tokenizer.safetensors").state_dict()
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name
    a = AR.load(out / "joint_ar.safetensors")
    b = AR.load(tmp_path / "joint_ar.safetensors")
    assert torch.equal(a.head.weight, b.head.weight)


def test_wandb_gets_every_line_of_the_log(tmp_path):
    """With a stand-in for the package, because the real one wants an account."""
    (tmp_path / "wandb.py").write_text(textwrap.dedent("""
        import json

        class init:
            def __init__(self, project, name, config):
                self.lines = [[project, name, config["steps"]]]

            def log(self, entry, step):
                self.lines.append({"step": step} | entry)

            def finish(self):
                print(json.dumps(self.lines))
        """))
    out = stage2_folder(tmp_path / "out")
    for name, flags in (("train_ar", STAGE2), ("train_stage1", STAGE1)):
        words = command(f"{name}.py", "--out", out, "--steps", 2, "--wandb", "garments", *flags)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
        result = subprocess.run(words, capture_output=True, text=True, env=environment)
        head, *lines = json.loads(result.stdout.splitlines()[-1])
        assert head == ["garments", f"{out} {name}", 2]
        log = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        assert lines == log


def test_token_files_of_two_runs_do_not_mix(tmp_path):
    out = stage2_folder(tmp_path / "out")
    (out / "codes.npz").unlink()
    data = ["--data", folder() / "val", "--out", out]
    code, text = script("pretokenize.py", *data, "--val_data", "nowhere")
    assert code == 1
    assert "nowhere" in text
    assert not (out / "codes.npz").exists()  # said before the long work
    run("pretokenize.py", *data)
    assert (out / "codes.npz").exists()
    assert not (out / "codes_val.npz").exists()  # those of the earlier run


def test_without_classes_all_images_are_of_one(tmp_path):
    out = stage2_folder(tmp_path / "out")
    run("train_ar.py", "--out", out, "--no_classes", "--steps", 1, *STAGE2)
    assert AR.load(out / "ar.safetensors").cfg.classes == ["all"]
    run("sample.py", "--out", out, "--num", 2)
    assert json.loads((out / "samples.json").read_text())["cfg_visual"] == 1
    pictures = []
    for flags in ([], ["--classes", "all"]):  # the one class is what it knows, not "unconditional"
        run("sample.py", "--out", out, "--image", ROOT / "results" / "shoe.png", *flags)
        pictures.append((out / "variations.png").read_bytes())
    assert pictures[0] == pictures[1]
    run("train_stage1.py", "--data", folder() / "train", "--out", tmp_path / "one", "--onestage",
        "--no_classes", "--steps", 1, *STAGE1)
    assert AR.load(tmp_path / "one" / "ar.safetensors").cfg.classes == ["all"]
    for source in (Tokens(out / "codes.npz"), Images(folder() / "train")):
        source.drop_classes()
        assert not source.labels.any()


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """With a learning rate that throws the weights out of range, the run says what is not finite
    and stops, and no state with such weights is ever written."""
    data = ["--data", folder() / "train", "--out", tmp_path, *STAGE1]
    run("train_stage1.py", *data, "--steps", 2)
    code, text = script("train_stage1.py", *data, "--steps", 60, "--lr", 1e30, "--save_every", 1,
                        "--resume")
    assert code == 1
    assert "not finite" in text or "has not been finite for" in text
    assert "Traceback" not in text
    for tensor in state(tmp_path / "train_stage1.pt")["tokenizer"].values():
        assert tensor.isfinite().all()


def test_sigterm_saves_and_ends_and_the_run_goes_on_exactly(tmp_path):
    for name, ranks in (("one", 1), ("two", 2)):
        words = ["train_stage1.py", "--data", folder() / "train", "--out", tmp_path / name, *STAGE1,
                 "--num_workers", 2]
        process = subprocess.Popen(command(*words, "--steps", 10**6, ranks=ranks), text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        for line in process.stdout:
            if line.startswith("step 3"):
                break
        process.send_signal(signal.SIGTERM)
        text = process.communicate(timeout=40)[0]
        assert "asked to stop: saved after step" in text
        step = state(tmp_path / name / "train_stage1.pt")["step"]
        assert f"going on from step {step}" in run(*words, "--steps", step + 1, "--resume")


@pytest.mark.parametrize("name", ["train_stage1.py", "train_ar.py"])
def test_a_run_that_is_killed_three_times_ends_with_the_same_weights(tmp_path, name):
    """At moments that are random but for the seed, in a step, a measure or a save."""
    def words(out):
        if name == "train_ar.py":
            return [name, "--out", stage2_folder(out), *STAGE2]
        return [name, "--data", folder() / "train", "--out", out, *STAGE1]

    often = ["--steps", 12, "--save_every", 2, "--eval_every", 3]
    run(*words(tmp_path / "whole"), *often)
    killed = words(tmp_path / "killed")
    rng = np.random.default_rng(0)
    for _ in range(3):
        process = subprocess.Popen(command(*killed, *often, "--resume"), text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        lines = rng.integers(1, 8)
        for line in process.stdout:
            if line.startswith("step"):
                lines -= 1
            if lines == 0:
                break
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.wait()
    run(*killed, *often, "--resume")
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes(), path.name
    logs = [tmp_path / out / name.replace(".py", ".jsonl") for out in ("whole", "killed")]
    for key, lines in (("ce", 12), ("val_nats_visual", 4)):
        assert len(log(logs[0], key)) == lines
        assert log(logs[0], key) == log(logs[1], key)


def test_the_changes_that_the_readme_shows(tmp_path):
    """Takes FSQ, the hinge loss and the AR size out of README.md, makes the changes and trains."""
    readme = (ROOT / "README.md").read_text()
    blocks = [textwrap.dedent(block) for block in re.findall(r"```python\n(.*?)```", readme, re.S)]
    fsq = next(block for block in blocks if block.startswith("class VisualQuantizer"))
    hinge = next(block for block in blocks if "F.relu" in block)
    size = re.search(r'`("mine": dict\(.*?\),)`', readme).group(1)
    changed = {name: (ROOT / name).read_text() for name in ("tokenizer.py", "ar.py",
                                                            "train_stage1.py", "pretokenize.py")}
    start = changed["tokenizer.py"].index("class VisualQuantizer")
    end = changed["tokenizer.py"].index("def prob_ste")
    old = changed["tokenizer.py"][start:end]
    changed["tokenizer.py"] = changed["tokenizer.py"].replace(old, f"{fsq}\n\n")
    changed["ar.py"] = changed["ar.py"].replace("SIZES = {\n", f"SIZES = {{\n    {size}\n")
    for line in hinge.strip().splitlines():
        name = line.split(" = ")[0].strip()
        old = re.search(rf"^ *{name} = F\..*$", changed["train_stage1.py"], re.M).group(0)
        indent = " " * (len(old) - len(old.lstrip()))
        new = indent + line.strip()
        changed["train_stage1.py"] = changed["train_stage1.py"].replace(old, new)
    for name, text in changed.items():
        assert text != (ROOT / name).read_text() or name == "pretokenize.py"
        (tmp_path / name).write_text(text)
    data = ["--data", folder() / "train", "--out", tmp_path / "out"]
    run(tmp_path / "train_stage1.py", *data, "--steps", 4, *STAGE1, "--codebook_size", 256,
        "--code_dim", 4, "--ar_size", "mine")
    run(tmp_path / "pretokenize.py", *data)
    with np.load(tmp_path / "out" / "codes.npz") as file:
        assert file["codes"][..., 8:].max() < 256


# Going on


@pytest.mark.parametrize("name", ["sample.py", "pretokenize.py"])
def test_killed_runs_go_on_from_whole_parts(tmp_path, name):
    """700 images are two parts; the run is killed when the first is there."""
    out = pipeline()
    pair = ["--tokenizer", out / "tokenizer.safetensors"]
    if name == "sample.py":
        words = [name, *pair, "--ar", out / "ar.safetensors", "--num", 700, "--columns", 1]
        file, array = "samples.npz", "arr_0"
    else:
        (tmp_path / "many" / "a").mkdir(parents=True)
        for i in range(700):
            Image.new("L", (28, 28), i % 256).save(tmp_path / "many" / "a" / f"{i}.bmp")
        words = [name, *pair, "--data", tmp_path / "many"]
        file, array = "codes.npz", "codes"
    run(*words, "--out", tmp_path / "whole")
    process = subprocess.Popen(command(*words, "--out", tmp_path / "killed"),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = []
    while not first and process.poll() is None:
        time.sleep(0.02)
        first = list((tmp_path / "killed").glob(f".{file}.*.parts/000000.npy"))
    process.kill()
    process.wait()
    assert first
    other = (tmp_path / "killed").glob(f".{file}.*.parts/*")
    assert len(list(other)) < 3
    text = run(*words, "--out", tmp_path / "killed")
    assert "700/700" not in text  # it counts what was left to do
    a = np.load(tmp_path / "whole" / file)[array]
    b = np.load(tmp_path / "killed" / file)[array]
    assert np.array_equal(a, b)
    assert not list((tmp_path / "killed").glob(".*"))


# Bad input: one sentence, exit code 1 (2 from the parser), an end within seconds, nothing left


def bad_inputs(tmp_path):
    """(part of the sentence, script, arguments)"""
    train = folder() / "train"
    tokenizer = pipeline() / "tokenizer.safetensors"
    ar = pipeline() / "ar.safetensors"
    codes = pipeline() / "codes.npz"
    pair = ["--tokenizer", tokenizer, "--ar", ar]
    made = tmp_path / "made"
    made.mkdir()

    with zipfile.ZipFile(made / "empty.zip", "w") as archive:
        archive.writestr("readme.txt", "")
    (made / "broken" / "cat").mkdir(parents=True)
    (made / "broken" / "cat" / "half.png").write_bytes((train / "cat/0.png").read_bytes()[:200])
    (made / "large").mkdir()
    Image.new("L", (40, 28)).save(made / "large" / "wide.png")
    (made / "cut.safetensors").write_bytes(tokenizer.read_bytes()[:5000])
    other = Tokenizer.load(tokenizer)
    other.decoder.out.bias += 1
    other.save(made / "other.safetensors")
    with np.load(pipeline() / "codes_val.npz") as file:
        val = dict(file)
    cow = dict(val, config=str(val["config"]).replace("cat", "cow"))
    np.savez(made / "cow.npz", **cow)
    np.savez(made / "floats.npz", **dict(val, codes=val["codes"].astype(np.float32)))
    np.savez(made / "beyond.npz", **dict(val, codes=val["codes"] + np.uint16(300)))
    np.savez(made / "labels.npz", **dict(val, labels=val["labels"] + 7))
    np.savez(made / "objects.npz", **dict(val, codes=np.array([{}], dtype=object)))
    np.savez(made / "unlabelled.npz", codes=val["codes"])
    cfg = AR.load(ar).cfg
    AR(replace(cfg, num_prologue=4)).save(made / "k4.safetensors")
    (made / "state").mkdir()
    (made / "state" / "train_stage1.pt").write_bytes(b"")
    (made / "parts").mkdir()
    parts = state(pipeline() / "train_stage1.pt")
    parts.pop("ema")
    torch.save(parts, made / "parts" / "train_stage1.pt")

    stage1 = ["train_stage1.py", "--data", train]
    broken = ["train_stage1.py", "--data", made / "broken", *STAGE1]
    yield "nowhere is no folder, no zip file", ["train_stage1.py", "--data", "nowhere"]
    yield "0.png is no folder, no zip", ["train_stage1.py", "--data", train / "cat" / "0.png"]
    yield "empty.zip holds no images", ["train_stage1.py", "--data", made / "empty.zip"]
    yield "half.png cannot be read as an image", ["pretokenize.py", "--data", made / "broken",
                                                  "--tokenizer", tokenizer]
    yield "half.png cannot be read as an image", [*broken, "--num_workers", 0]
    yield "half.png cannot be read as an image", [*broken, "--num_workers", 2]
    yield "wide.png is 40 x 28; without a crop", ["train_stage1.py", "--data", made / "large",
                                                  "--crop", "none", *STAGE1]
    yield "28 is not a multiple of the patch size 5", [*stage1, "--patch_size", 5]
    yield "--lr: 'nan' is not a finite number", [*stage1, "--lr", "nan"]
    yield "--codebook_size: '0' is not a whole number", [*stage1, "--codebook_size", 0]
    yield "--visual_dropout: '2' is not a finite number from 0 to 1", [*stage1,
                                                                       "--visual_dropout", 2]
    yield "--seed: '-1' is not a whole number", [*stage1, "--seed", -1]
    yield "does not divide into 1 ranks", [*stage1, "--batch_size", 8, "--micro_batch_size", 3]
    yield "the discriminator needs 2 images", [*stage1, "--batch_size", 1]
    yield "--layout post needs --init", [*stage1, "--layout", "post"]
    yield "has layout prologue: give --layout prologue", [*stage1, "--layout", "2d", "--init",
                                                          tokenizer]
    yield "--num_prologue 4: --init", [*stage1, "--num_prologue", 4, "--init", tokenizer]
    yield "knows 2 classes, this run has 0", [*stage1, "--init", tokenizer, "--init_ar", ar]
    inside_a_file = made / "cut.safetensors" / "out"
    yield "cannot be written: Not a directory", [*stage1, *STAGE1, "--out", inside_a_file]
    yield "cannot be loaded: ", [*stage1, "--resume", "--out", made / "state"]
    yield "cannot be loaded: 'ema'", [*stage1, *STAGE1, "--resume", "--out",
                                                        made / "parts"]
    yield "'ar' weights where 'tokenizer'", ["pretokenize.py", "--data", train, "--tokenizer", ar]
    yield "cut.safetensors is not a whole", ["sample.py", "--tokenizer", made / "cut.safetensors",
                                             "--ar", ar]
    yield "--classes 7: a number from 0 to 1", ["sample.py", *pair, "--classes", 7]
    yield "--cfg_visual: 'nan' is not a finite", ["sample.py", *pair, "--cfg_visual", "nan"]
    yield "another tokenizer", ["sample.py", "--tokenizer", made / "other.safetensors", "--ar", ar]
    stage2 = ["train_ar.py", "--tokenizer", tokenizer]
    yield "made by another tokenizer", ["train_ar.py", "--codes", codes, "--tokenizer",
                                        made / "other.safetensors"]
    yield "different classes", [*stage2, "--codes", codes, "--val_codes", made / "cow.npz"]
    yield "together: num_prologue is 8", [*stage2, "--codes", codes, "--init",
                                          made / "k4.safetensors"]
    yield "should be uint16", [*stage2, "--codes", made / "floats.npz"]
    yield "beyond the end of the codebook", [*stage2, "--codes", made / "beyond.npz"]
    yield "labels should be from 0 to 1", [*stage2, "--codes", made / "labels.npz"]
    yield "objects.npz is no whole token file", [*stage2, "--codes", made / "objects.npz"]
    yield "unlabelled.npz is no whole token file", [*stage2, "--codes", made / "unlabelled.npz"]
    yield "nothing.npz does not exist", ["fid.py", "nothing.npz"]


def test_bad_input_gets_one_sentence_and_leaves_nothing(tmp_path):
    pipeline()
    cases = list(bad_inputs(tmp_path))

    def check(case):
        sentence, words = case
        if "--out" not in words and words[0] != "fid.py":
            words = [*words, "--out", tmp_path / "out"]
        code, text = script(*words, timeout=60)
        return sentence, code, text

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(check, cases))
    for sentence, code, text in results:
        assert sentence in text, (sentence, text)
        assert code in (1, 2), (code, text)
        assert "Traceback" not in text, text
        assert len(text.split("error: ")[-1].strip().splitlines()) <= 5, text
    written = [p for p in (tmp_path / "out").rglob("*") if p.suffix != ".jsonl"]
    assert not written, written
    assert [p.name for p in (tmp_path / "made" / "state").iterdir()] == ["train_stage1.pt"]


@pytest.mark.parametrize("name", ["train_stage1.py", "pretokenize.py", "sample.py"])
def test_a_full_disk_gets_a_sentence_and_spoils_nothing(tmp_path, name):
    """No file may grow beyond 2 kB, as if there were no more room."""
    out = tmp_path / "out"
    out.mkdir()
    for file in ("tokenizer.safetensors", "ar.safetensors"):
        (out / file).write_bytes((pipeline() / file).read_bytes())
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    words = ["--out", out, "--data", folder() / "train"]
    if name == "train_stage1.py":
        words += ["--steps", 1, *STAGE1]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))

    result = subprocess.run(command(name, *words), capture_output=True, text=True, timeout=60,
                            preexec_fn=limit, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 1
    assert "cannot be written" in result.stderr
    assert "Traceback" not in result.stderr
    for file, content in before.items():
        assert (out / file).read_bytes() == content
    assert not list(out.rglob("*.tmp"))


def test_a_rank_that_fails_ends_the_others(tmp_path):
    """Only rank 1 meets the broken image; both have to be gone within seconds."""
    (tmp_path / "data" / "a").mkdir(parents=True)
    for i in range(8):
        Image.new("L", (28, 28), i).save(tmp_path / "data" / "a" / f"{i}.png")
    (tmp_path / "data" / "a" / "3.png").write_bytes(b"no image")
    code, text = script("train_stage1.py", "--data", tmp_path / "data", "--out", tmp_path / "out",
                        *STAGE1, "--num_workers", 2, ranks=2, timeout=60)
    assert code == 1
    assert "3.png cannot be read as an image" in text


def test_resume_refuses_another_run_and_names_what_has_changed(tmp_path):
    data = ["train_stage1.py", "--data", folder() / "train", "--out", tmp_path, *STAGE1]
    run(*data, "--steps", 1)
    assert "note: --lr was 0.0005 and is now 0.001" in run(*data, "--steps", 2, "--lr", 1e-3,
                                                           "--resume")
    before = (tmp_path / "train_stage1.pt").read_bytes()
    code, text = script(*data, "--steps", 3, "--seed", 1, "--resume")
    assert code == 1
    assert "was made with seed 0, this run has 1" in text
    assert (tmp_path / "train_stage1.pt").read_bytes() == before
    # Codes made anew are another run too.
    out = stage2_folder(tmp_path / "ar")
    run("train_ar.py", "--out", out, "--steps", 1, *STAGE2)
    with np.load(out / "codes.npz") as file:
        tokens = dict(file)
    np.savez(out / "codes.npz", **dict(tokens, codes=tokens["codes"][:, ::-1]))
    code, text = script("train_ar.py", "--out", out, "--steps", 2, *STAGE2, "--resume")
    assert code == 1
    assert "was made with codes" in text
