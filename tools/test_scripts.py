"""Tests of the scripts as a user runs them: what they leave, and the one sentence they end with on bad input.

    python -m pytest tools/test_scripts.py
"""
import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

import pretokenize
import sample
import train_ar
import train_stage1
from common import run, to_float
from pretokenize import Images
from test_all import folder, pipeline, script
from tokenizer import Tokenizer

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
