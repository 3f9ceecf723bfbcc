"""Tests of the scripts as a user runs them: what they leave, resuming, ranks, and the one sentence that ends bad input.

    python -m pytest tools/test_scripts.py
"""
import functools
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE))

import pretokenize
import sample
import train_ar
import train_stage1
from common import run, to_float
from pretokenize import Images
from tokenizer import Tokenizer

TEMPORARY = tempfile.TemporaryDirectory()  # gone when the tests end


@functools.cache
def folder():
    """48 random training and 16 held-out images in two classes."""
    root = Path(TEMPORARY.name) / "images"
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 8)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 255, (28, 28, 3), np.uint8)).save(root / split / name / f"{i}.png")
    return root


def script(name, *args, ranks=1):
    """Runs a script in a process of its own, or under torchrun, and returns (exit code, stdout + stderr)."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", "29533"] if ranks > 1 else []
    command = [sys.executable, *launcher, HERE / name, *args] + ["--num_workers", "0"] * (name != "fid.py")
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return result.returncode, result.stdout + result.stderr


STAGE1 = ["--batch_size", 8, "--warmup", 1, "--hold", 1000, "--eval_images", 8, "--eval_every", 100, "--log_every", 1]
STAGE2 = ["--batch_size", 8, "--warmup", 1, "--hold", 1000, "--dropout", 0, "--eval_every", 100, "--log_every", 1]


def losses(path, *keys):
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [[line[key] for key in keys] for line in lines if keys[0] in line]


def state(path):
    return torch.load(path, weights_only=True)


def assert_same_gradients(path, reference):
    """After one step AdamW's first moment is the gradient times a constant."""
    a, b = (state(p)["optimizer"]["state"] for p in (path, reference))
    assert a.keys() == b.keys() and len(a) > 10
    for i in a:
        torch.testing.assert_close(a[i]["exp_avg"], b[i]["exp_avg"], rtol=1e-3, atol=2e-6)


@functools.cache
def pipeline():
    """The five scripts, four steps of each training."""
    out = Path(TEMPORARY.name) / "out"
    data = ["--data", folder() / "train", "--out", out]
    for name, *args in (("train_stage1.py", *data, "--steps", 4, *STAGE1), ("pretokenize.py", *data, "--flip"),
                        ("train_ar.py", "--out", out, "--steps", 4, *STAGE2),
                        ("sample.py", "--out", out, "--num", 6, "--data", folder() / "val"),
                        ("fid.py", out / "samples.npz", folder() / "train", "--json")):
        code, text = script(name, *args)
        assert code == 0, text
    result = json.loads(next(line for line in text.splitlines() if line.startswith("{")))
    assert result["count"] == 6 and result["fid"] > 0 and "class_consistency" in result
    return out


def test_resume_continues_the_loss_curve_exactly(tmp_path):
    data = ["--data", folder() / "train", "--out", tmp_path]
    (tmp_path / "ar").mkdir()
    for name in ("codes.npz", "tokenizer.safetensors"):
        (tmp_path / "ar" / name).write_bytes((pipeline() / name).read_bytes())

    def twice(*command):
        first, second = (script(*command, "--steps", steps, "--resume") for steps in (2, 4))
        assert first[0] == second[0] == 0 and "going on from step 2" in second[1], first[1] + second[1]

    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda command: twice(*command), (("train_stage1.py", *data, *STAGE1),
                                                        ("train_ar.py", "--out", tmp_path / "ar", *STAGE2))))
    keys = ("l1", "vq", "ce", "gan", "discriminator")
    assert losses(tmp_path / "train_stage1.jsonl", *keys) == losses(pipeline() / "train_stage1.jsonl", *keys)
    a, b = state(tmp_path / "train_stage1.pt"), state(pipeline() / "train_stage1.pt")
    for name in ("tokenizer", "ema", "ar", "gan"):
        assert all(torch.equal(a[name][key], b[name][key]) for key in b[name])
    resumed, unbroken = (losses(out / "train_ar.jsonl", "ce", "grad_norm") for out in (tmp_path / "ar", pipeline()))
    assert resumed == unbroken


def test_accumulation_and_two_ranks_give_the_gradients_of_one_batch(tmp_path):
    pipeline()  # before the threads: a cache does not lock
    variants = (1, []), (1, ["--micro_batch_size", 2, "--gradient_checkpointing"]), (2, [])

    def train(number):
        (ranks, extra), out = variants[number], tmp_path / str(number)
        out.mkdir()
        for name in ("codes.npz", "tokenizer.safetensors"):
            (out / name).write_bytes((pipeline() / name).read_bytes())
        code, text = script("train_ar.py", "--out", out, "--steps", 1, *STAGE2, *extra, ranks=ranks)
        assert code == 0, text
        code, text = script("train_stage1.py", "--data", folder() / "train", "--out", out, "--steps", 1, *STAGE1,
                            "--gan_weight", 0, *extra, ranks=ranks)  # BatchNorm sees the forward's own batch
        assert code == 0, text
        return out

    outs = list(ThreadPoolExecutor(2).map(train, range(3)))
    for out in outs[1:]:
        assert_same_gradients(out / "train_stage1.pt", outs[0] / "train_stage1.pt")
        assert_same_gradients(out / "train_ar.pt", outs[0] / "train_ar.pt")


def test_variants_train_on_two_ranks_and_what_they_leave_is_of_use(tmp_path):
    """No parameter may be without a gradient there. post and direct CE give losses, OneStage a pair that draws."""
    data = ["--data", folder() / "train", "--steps", 2, *STAGE1]
    frozen = tmp_path / "2d" / "tokenizer.safetensors"
    for name, *flags in (("2d", "--layout", "2d", "--rfid"), ("post", "--layout", "post", "--init", frozen),
                         ("1d", "--layout", "1d", "--direct_ce", "--ce_weight", 0.3), ("onestage", "--onestage")):
        code, text = script("train_stage1.py", *data, *flags, "--out", tmp_path / name, ranks=2)
        assert code == 0, text
    a, b = (Tokenizer.load(tmp_path / name / "tokenizer.safetensors") for name in ("2d", "post"))
    x = to_float(Images(folder() / "val", 28)[0, 0][0])
    assert torch.equal(a.encode(x), b.encode(x)[:, 8:])  # post leaves the visual codes as they were
    assert "val_rfid" in (tmp_path / "2d" / "train_stage1.jsonl").read_text()
    code, text = script("sample.py", "--out", tmp_path / "onestage", "--num", 4, "--sweep", "cfg_visual=1,2", "temperature=1")
    assert code == 0 and len(json.loads((tmp_path / "onestage" / "sweep.json").read_text())["rows"]) == 2, text


def test_gfid_while_training_does_not_depend_on_ranks(tmp_path):
    results = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        out.mkdir()
        for name in ("codes.npz", "tokenizer.safetensors"):
            (out / name).write_bytes((pipeline() / name).read_bytes())
        flags = [*STAGE2[:-4], "--log_every", 1, "--eval_every", 1, "--fid_every", 1, "--fid_samples", 200]
        code, text = script("train_ar.py", "--out", out, "--steps", 1, *flags, ranks=ranks)
        assert code == 0, text
        results.append(losses(out / "train_ar.jsonl", "val_gfid", "val_gfid_no_cfg"))
    np.testing.assert_allclose(*results, rtol=1e-2)  # one step of AdamW magnifies the last bits of the gradients


def test_pipeline_leaves_what_it_says():
    names = {"tokenizer.safetensors", "joint_ar.safetensors", "train_stage1.jsonl", "train_stage1.png", "train_stage1.pt",
             "codes.npz", "codes_val.npz", "ar.safetensors", "train_ar.jsonl", "train_ar.png", "train_ar.pt",
             "samples.npz", "samples.json", "samples.png", "fixed_prologue.png", "reconstructions.png"}
    assert {p.name for p in pipeline().iterdir()} == names
    tokens, tokenizer = np.load(pipeline() / "codes.npz"), Tokenizer.load(pipeline() / "tokenizer.safetensors")
    assert tokens["codes"].shape == (48, 2, 8 + 49) and tokens["codes"].dtype == np.uint16
    assert tokens["labels"].tolist() == [0] * 24 + [1] * 24 and json.loads(str(tokens["config"]))["classes"] == ["cat", "dog"]
    images = Images(folder() / "train", 28)
    code = tokenizer.encode(to_float(images[0, 30][0]))
    assert np.array_equal(code.numpy(), tokens["codes"][30, :1])
    assert np.load(pipeline() / "samples.npz")["arr_1"].tolist() == [0, 1, 0, 1, 0, 1]


def test_samples_do_not_depend_on_batch_size_or_ranks(tmp_path):
    out = pipeline()
    pair = ["--tokenizer", out / "tokenizer.safetensors", "--ar", out / "ar.safetensors", "--data", folder() / "val"]
    code, text = script("sample.py", *pair, "--out", tmp_path, "--num_samples", 6, "--batch_size", 4, ranks=2)
    assert code == 0, text
    assert np.array_equal(np.load(tmp_path / "samples.npz")["arr_0"], np.load(pipeline() / "samples.npz")["arr_0"])


@pytest.fixture
def fails(monkeypatch, capsys):
    """Calls a script's main with arguments that must end it; returns its one sentence."""
    def call(module, *args):
        monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, args), "--num_workers", "0"])
        with pytest.raises(SystemExit) as stopped:
            run(module.main)
        assert isinstance(stopped.value.code, str) and "\n" not in stopped.value.code, stopped.value.code
        return stopped.value.code
    return call


def test_bad_input_gets_one_sentence(tmp_path, fails):
    train, out, t = folder() / "train", ["--out", tmp_path], pipeline() / "tokenizer.safetensors"
    assert "nowhere does not exist" in fails(train_stage1, "--data", "nowhere", *out)
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("readme.txt", "")
    assert "empty.zip holds no images" in fails(train_stage1, "--data", tmp_path / "empty.zip", *out)
    broken = tmp_path / "broken" / "cat"
    broken.mkdir(parents=True)
    (broken / "half.png").write_bytes((train / "cat" / "0.png").read_bytes()[:200])
    assert "cat/half.png" in fails(pretokenize, "--data", tmp_path / "broken", "--tokenizer", t, *out)
    assert "28 is not a multiple of the patch size 5" in fails(train_stage1, "--data", train, "--patch_size", 5, *out)
    monkey = {"RANK": "0", "WORLD_SIZE": "3"}
    os.environ.update(monkey)
    assert "--batch_size 8 cannot be divided among 3 ranks" in fails(train_stage1, "--data", train, "--batch_size", 8, *out)
    for name in monkey:
        del os.environ[name]
    a = pipeline() / "ar.safetensors"
    assert "'ar' weights where 'tokenizer'" in fails(pretokenize, "--data", train, "--tokenizer", a, *out)
    (tmp_path / "cut.safetensors").write_bytes(t.read_bytes()[:5000])
    assert "cut.safetensors is not a whole" in fails(sample, "--tokenizer", tmp_path / "cut.safetensors", "--ar", a, *out)
    assert "--classes 7" in fails(sample, "--tokenizer", t, "--ar", a, "--classes", 7, *out)
    other = Tokenizer.load(t)
    other.decoder.out.bias += 1
    other.save(tmp_path / "other.safetensors")
    codes = ["--codes", pipeline() / "codes.npz"]
    assert "made by another tokenizer" in fails(train_ar, *codes, "--tokenizer", tmp_path / "other.safetensors", *out)
    assert "another tokenizer" in fails(sample, "--tokenizer", tmp_path / "other.safetensors", "--ar", a, *out)
    tokens = dict(np.load(pipeline() / "codes_val.npz"))
    tokens["config"] = str(tokens["config"]).replace("cat", "cow")
    np.savez(tmp_path / "val.npz", **tokens)
    assert "different classes" in fails(train_ar, *codes, "--val_codes", tmp_path / "val.npz", "--tokenizer", t, *out)
    assert "trained on other classes" in fails(train_ar, "--codes", tmp_path / "val.npz", "--tokenizer", t, "--init", a, *out)
    code, text = script("fid.py", "nothing.npz")
    assert code == 1 and "fid.py: nothing.npz does not exist" in text
    assert {p.name for p in tmp_path.iterdir()} == {"empty.zip", "broken", "cut.safetensors", "other.safetensors", "val.npz"}
