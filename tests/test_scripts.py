"""The scripts as a user runs them: what they leave, resuming, kills, ranks, full disks, --init.

    OMP_NUM_THREADS=1 python -m pytest tests/test_scripts.py

A script is run by calling its main() in this process or in a copy of it, because a process of its
own would spend ten seconds on imports. Where the words are the pipeline's, so must the files be.
"""

import functools
import importlib
import itertools
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pretokenize
from ar import AR
from pretokenize import Images, center_crop
from tokenizer import Tokenizer, read_safetensors, save_checkpoint
from train_ar import Tokens

torch.set_num_threads(1)  # a copy of a process that has had more threads may hang
TEMPORARY = tempfile.TemporaryDirectory()  # gone when the tests end
STEPS = ["--steps", 6, "--save_every", 2, "--eval_every", 3, "--log_every", 1, "--batch_size", 8,
         "--warmup", 1, "--hold", 1000]
TRAINERS = ["train_stage1", "train_ar"]


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


def call(name, *args):
    """Runs a script as `python name.py args` does."""
    with mock.patch.object(sys, "argv", [f"{name}.py", *map(str, args)]):
        importlib.import_module(name).main()


def refusal(name, *args):
    """The sentence that ends a script; an error of another kind, with a traceback, fails a test."""
    with pytest.raises(SystemExit) as caught:
        call(name, *args)
    assert "\n" not in str(caught.value.code).strip()
    return str(caught.value.code)


def start(name, *args, before=lambda: None):
    """Starts a script in a copy of this process, in which `before` is called first. Returns its
    number and a pipe out of which comes what it prints."""
    out, into = os.pipe()
    number = os.fork()
    if number > 0:
        os.close(into)
        return number, open(out)
    signal.alarm(90)  # should it hang
    sys.stdout = sys.stderr = open(into, "w", buffering=1)
    code = 1
    try:
        before()
        call(name, *args)
        code = 0
    except SystemExit as error:
        print(error)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def end(number, pipe):
    """Exit code, or that of the signal below 0, and output of a script that `start` began."""
    text = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]), text


def kill_at(moment):
    """From now on counts all calls and returns of functions, and at this one kills the process."""
    events = itertools.count()

    def count(*_):
        if next(events) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)


def two_ranks(name, *args, before=lambda rank: None):
    """Exit codes and outputs of a script on two ranks, with the environment that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def prepare(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="1")
        before(rank)

    processes = [start(name, *args, before=lambda rank=rank: prepare(rank)) for rank in (0, 1)]
    return [end(*process) for process in processes]


def trainer(name, out):
    """The words of the pipeline's run of a trainer, into the folder `out`."""
    if name == "train_stage1":
        return [name, "--data", folder() / "train", "--out", out, "--eval_images", 8, *STEPS]
    return [name, "--codes", pipeline() / "codes.safetensors", "--tokenizer",
            pipeline() / "tokenizer.safetensors", "--out", out, "--dropout", 0, *STEPS]


@functools.cache
def pipeline():
    """What the scripts leave in one folder, with six steps of each trainer."""
    out = Path(TEMPORARY.name) / "out"
    data = ["--data", folder() / "train", "--out", out]
    call(*trainer("train_stage1", out))
    call("pretokenize", *data, "--flip")
    call("train_ar", "--out", out, "--dropout", 0, *STEPS)
    call("sample", "--out", out, "--num_samples", 6, "--data", folder() / "val", "--columns", 2)
    return out


def log(path):
    """The lines of a log without the times in them."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    times = {"images_per_s", "minutes_left"}
    return [{key: line[key] for key in line.keys() - times} for line in lines]


def assert_as_in_the_pipeline(out, name):
    files = ["ar.safetensors"]
    if name == "train_stage1":
        files = ["tokenizer.safetensors", "joint_ar.safetensors"]
    for file in files:
        assert (out / file).read_bytes() == (pipeline() / file).read_bytes(), file
    assert log(out / f"{name}.jsonl") == log(pipeline() / f"{name}.jsonl")


# What they leave


def test_pipeline_leaves_what_it_says(capsys):
    out = pipeline()
    assert {path.name for path in out.iterdir()} == {
        "tokenizer.safetensors", "joint_ar.safetensors", "train_stage1.jsonl", "train_stage1.png",
        "train_stage1.pt", "codes.safetensors", "codes_val.safetensors", "ar.safetensors",
        "train_ar.jsonl", "train_ar.png", "train_ar.pt", "samples.npz", "samples.json",
        "samples.png", "fixed_prologue.png", "reconstructions.png"}
    tokens = Tokens(out / "codes.safetensors")
    assert tokens.codes.shape == (48, 2, 8 + 49)
    assert tokens.codes.dtype == np.uint16
    assert tokens.labels.tolist() == [0] * 24 + [1] * 24
    assert tokens.classes == AR.load(out / "ar.safetensors").cfg.classes == ["cat", "dog"]
    pixels = torch.tensor(center_crop(Images(folder() / "train").open(30), 28)).permute(2, 0, 1)
    tokenizer = Tokenizer.load(out / "tokenizer.safetensors")
    codes = tokenizer.encode(torch.stack([pixels, pixels.flip(2)]) / 127.5 - 1)
    assert np.array_equal(codes, tokens.codes[30])
    with np.load(out / "samples.npz") as samples:
        assert samples["arr_0"].shape == (6, 28, 28, 3)
        assert samples["arr_1"].tolist() == [0, 1, 0, 1, 0, 1]
    for name in TRAINERS:
        steps = [line["step"] for line in log(out / f"{name}.jsonl")]
        assert steps == [1, 2, 3, 3, 4, 5, 6, 6]  # twice where held-out images are measured
    call("fid", "--out", out, "--json")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["count"] == 6
    assert result["fid"] > 0


def test_every_layout_goes_through_all_scripts(tmp_path):
    data = ["--data", folder() / "train"]
    flags = {"2d": ["--layout", "2d"],
             "post": ["--layout", "post", "--init", tmp_path / "2d" / "tokenizer.safetensors"],
             "1d": ["--layout", "1d", "--direct_ce", "--tau", 1, "--ce_weight", 0.3],
             "onestage": ["--onestage"]}
    for name, chosen in flags.items():
        out = ["--out", tmp_path / name]
        call("train_stage1", *data, *STEPS, "--steps", 2, *chosen, *out)
        if name != "onestage":
            call("pretokenize", *data, *out)
            call("train_ar", *STEPS, "--steps", 2, *out)
        call("sample", *out, "--num_samples", 4, "--columns", 1)
        call("fid", *out, tmp_path / name / "samples.npz", folder() / "train")
    codes = {name: Tokens(tmp_path / name / "codes.safetensors").codes for name in ("2d", "post")}
    assert np.array_equal(codes["2d"], codes["post"][..., 8:])  # its visual codes are frozen


def test_variations_of_a_picture(tmp_path):
    """A row for each picture: itself, its reconstruction, two images; and a row without it."""
    Image.new("L", (50, 40), 128).save(tmp_path / "grey.bmp")
    call("sample", "--pair", pipeline(), "--columns", 2, "--out", tmp_path / "out", "--image",
         tmp_path / "grey.bmp", tmp_path / "grey.bmp", "--classes", "dog", "--keep", 0.5)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["variations.png"]
    assert Image.open(tmp_path / "out" / "variations.png").size == (4 * 58 + 2, 3 * 58 + 2)


# Resuming


@pytest.mark.parametrize("name", TRAINERS)
def test_a_run_that_goes_on_ends_as_one_that_was_never_cut(tmp_path, name):
    words = trainer(name, tmp_path)
    call(*words, "--steps", 3, "--resume")  # there is nothing to resume yet
    call(*words, "--resume")
    call(*words, "--resume")  # nothing is left to do
    assert_as_in_the_pipeline(tmp_path, name)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_run_that_is_killed_three_times_ends_as_one_that_was_not(tmp_path, name):
    """At random moments: in a step, while measuring, or half-way through a file."""
    words = [*trainer(name, tmp_path), "--resume"]
    rng = random.Random(0)
    for _ in range(3):
        moment = rng.randrange(100_000)
        code, text = end(*start(*words, before=lambda moment=moment: kill_at(moment)))
        assert code == -signal.SIGKILL, text
    call(*words)
    assert_as_in_the_pipeline(tmp_path, name)


def test_resume_refuses_another_run_and_names_what_has_changed(tmp_path):
    words = trainer("train_stage1", tmp_path)
    call(*words, "--steps", 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    sentence = refusal(*words, "--seed", 1, "--resume")
    assert "was made with seed 0, this run has 1" in sentence
    assert "crop center, this run has none" in refusal(*words, "--crop", "none", "--resume")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    # Tokens made anew are other tokens
    tokenizer = pipeline() / "tokenizer.safetensors"
    words = [*trainer("train_ar", tmp_path), "--codes", tmp_path / "codes.safetensors"]
    for flags in ([], ["--flip"]):
        call("pretokenize", "--data", folder() / "val", "--tokenizer", tokenizer, "--out", tmp_path,
             *flags)
        if not flags:
            call(*words, "--steps", 2)
    assert "was made with codes" in refusal(*words, "--resume")


def test_pretokenize_goes_on_from_its_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(pretokenize, "PART_SIZE", 10)
    words = ["pretokenize", "--data", folder() / "train", "--flip", "--tokenizer",
             pipeline() / "tokenizer.safetensors", "--batch_size", 6, "--num_workers", 1, "--out"]
    opened = []

    def open_until_broken(images, index):
        opened.append(str(images.path / images.names[index]))
        if opened[-1].endswith("train/dog/5.png"):
            raise SystemExit("the power is cut")
        return real(images, index)

    real = Images.open
    monkeypatch.setattr(Images, "open", open_until_broken)
    assert refusal(*words, tmp_path) == "the power is cut"
    assert not (tmp_path / "codes.safetensors").exists()
    before = set(opened)
    opened.clear()
    monkeypatch.setattr(Images, "open", lambda images, i: opened.append(str(images.path
                        / images.names[i])) or real(images, i))
    call(*words, tmp_path)
    again = [path for path in opened if "train" in path and path in before]
    assert len(again) < 20 < len(before)
    for file in ("codes.safetensors", "codes_val.safetensors"):
        assert (tmp_path / file).read_bytes() == (pipeline() / file).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"codes.safetensors",
                                                          "codes_val.safetensors"}
    for code, text in two_ranks(*words, tmp_path / "ranks"):
        assert code == 0, text
    assert ((tmp_path / "ranks" / "codes.safetensors").read_bytes()
            == (pipeline() / "codes.safetensors").read_bytes())


# Ranks and parts of a batch


def test_ranks_and_micro_batches_train_as_one_process(tmp_path):
    """Without the discriminator, whose BatchNorm sees the images of one forward."""
    flags = {"train_stage1": ["--steps", 3, "--gan_weight", 0], "train_ar": ["--steps", 3]}
    ranks = []
    for name in TRAINERS:
        call(*trainer(name, tmp_path / "one"), *flags[name])
        call(*trainer(name, tmp_path / "parts"), *flags[name], "--micro_batch_size", 2,
             "--gradient_checkpointing")
        ranks.append([str(ROOT / f"{name}.py"), *trainer(name, tmp_path / "ranks")[1:],
                      *flags[name]])
    both = ("import json, runpy, sys\n"
            "for sys.argv in json.loads(sys.argv[1]):\n"
            "    runpy.run_path(sys.argv[0], run_name='__main__')\n")
    (tmp_path / "both.py").write_text(both)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc_per_node", "2", tmp_path / "both.py",
                    json.dumps(ranks, default=str).replace("[[", "[[")], check=True, timeout=120,
                   env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    for out in (tmp_path / "parts", tmp_path / "ranks"):
        for name in TRAINERS:
            one = log(tmp_path / "one" / f"{name}.jsonl")
            for line, other in zip(one, log(out / f"{name}.jsonl")):
                print(out.name, name, {k: other[k] - line[k] for k in line})
