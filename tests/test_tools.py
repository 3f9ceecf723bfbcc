"""Each tool once, on the pair of two classes that test_scripts.py trains."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from test_scripts import call, folder, pipeline, printed

import claims
from demo import Buttons
from pretokenize import Images
from sample import load_pair


def test_sweep_scores_the_images_that_sample_py_draws(tmp_path):
    call("sweep", "cfg_visual=2,1", "top_k=0", "--pair", pipeline(), "--num_samples", 6, "--out",
         tmp_path)
    rows = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    gfid = {(row["cfg_visual"], row["top_k"]): row["gfid"] for row in rows}
    assert list(gfid.values()) == sorted(gfid.values())
    drawn = json.loads(printed("fid", "--out", pipeline()))  # with guidance 2
    assert gfid == {(2, 0): pytest.approx(drawn["fid"], rel=1e-4), (1, 0): mock.ANY}


def test_curves_and_attention_leave_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    call("curves", pipeline(), "--keys", "nats", "accuracy_visual", "--path", tmp_path / "c.png")
    call("attention", "--pair", pipeline(), "--data", folder() / "val", "--images", 4, "--out",
         tmp_path)
    for name in ("c.png", "ar_attention.png", "prologue_attention.png"):
        assert np.asarray(Image.open(tmp_path / name)).std() > 1


def test_probe():
    said = printed("probe", pipeline() / "tokenizer.safetensors", "--data", folder() / "train",
                   "--epochs", 2)
    assert "(prologue, first 8 tokens)" in said
    assert said.count("top-5 1.0000") == 2  # of two classes


def test_nearest_finds_what_was_copied(tmp_path):
    images = Images(folder() / "train")
    np.savez(tmp_path / "samples.npz", [np.asarray(images.open(i)) for i in (3, 40, 40)])
    said = printed("nearest", tmp_path / "samples.npz", "--data", folder() / "train")
    assert "3 samples, 1 of them exact copies" in said
    assert "of 3 samples 0.00\n" in said


@torch.no_grad()
def test_buttons_of_the_demo():
    buttons = Buttons(*load_pair(pipeline(), "cpu"), columns=3)
    chosen = [2.0, 1.0, 0.25, 1.0, 1.0]
    pictures, prologue, *_ = buttons.resample("dog", 0, *chosen)
    _, _, kept, *_ = buttons.keep_prologue("dog", 0, 2, prologue, *chosen)
    assert torch.equal(kept, prologue[[1, 1, 1]])
    after, changed, *_ = buttons.change_token("dog", 0, 3, 1, 63, prologue, *chosen)
    assert (changed != prologue).nonzero().tolist() == [[2, 0]]
    assert np.array_equal(after[0][0], pictures[0][0])  # the noise is the same
    _, _, kept, *_ = buttons.vary("dog", 0, Images(folder() / "val").open(0), 0.5, *chosen)
    assert len(kept.unique(dim=0)) == 1


def test_bench_times_a_step():
    words = ["bench", "ar", "--size", "tiny", "--batch_size", 2, "--repeat", 1]
    assert "ar tiny, 2 images: " in printed(*words)


def test_claims(tmp_path, monkeypatch):
    """A row with all of its scripts, which run in this process and draw few images."""

    def run(command, **_):
        few = [{"500": 6, "2000": 20}.get(word, word) for word in command[2:]]
        return SimpleNamespace(returncode=0, stdout=printed(Path(command[1]).stem, *few))

    monkeypatch.setattr(claims, "subprocess", SimpleNamespace(run=run, PIPE=None))
    pool = nullcontext(SimpleNamespace(map=map))  # setup() wants the main thread
    monkeypatch.setattr(claims, "ThreadPoolExecutor", lambda jobs: pool)
    monkeypatch.setattr(claims, "BUNDLED", folder())
    monkeypatch.setattr(claims, "PLAIN", ["temperature=0.9,1", "temperature_prologue=1"])
    (tmp_path / "fashion_mnist_full.zip").symlink_to(folder())
    table = printed("claims", "2d", "--seeds", 0, "--scale", 0.002, "--out", tmp_path)
    assert table.splitlines()[-1].startswith("| 2d | 0 | ")
