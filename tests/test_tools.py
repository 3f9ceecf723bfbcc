"""Each tool once, on the pair of two classes that test_scripts.py trains; and the recipes."""

import importlib
import io
import json
import os
import shlex
import subprocess
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from test_scripts import ROOT, call, folder, pipeline

from pretokenize import Images
from sample import load_pair

sys.path.insert(0, str(ROOT / "tools"))


def printed(name, *args):
    """What a script prints to standard output."""
    page = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    with redirect_stdout(page):
        call(name, *args)
    return page.buffer.getvalue().decode()


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
    lines = printed("probe", pipeline() / "tokenizer.safetensors", "--data", folder() / "train",
                    "--epochs", 2).splitlines()
    assert "(prologue, first 8 tokens)" in lines[0]
    for line in lines[1:]:
        assert 0 <= float(line.split()[-3]) <= float(line.split()[-1]) == 1  # of two classes


def test_nearest_finds_what_was_copied(tmp_path):
    images = Images(folder() / "train")
    np.savez(tmp_path / "samples.npz", [np.asarray(images.open(i)) for i in (3, 40, 40)])
    said = printed("nearest", tmp_path / "samples.npz", "--data", folder() / "train")
    assert "3 samples, 1 of them exact copies" in said
    assert "of 3 samples 0.00\n" in said
    sheet = np.asarray(Image.open(tmp_path / "nearest.png"))
    assert np.array_equal(sheet[2:58, 2:58], sheet[2:58, 60:116])  # itself is the nearest


@torch.no_grad()
def test_buttons_of_the_demo():
    pair = load_pair(pipeline(), "cpu")
    buttons = importlib.import_module("demo").Buttons(*pair, columns=3)
    chosen = [2.0, 1.0, 0.25, 1.0, 1.0]
    pictures, prologue, table, _ = buttons.resample("dog", 0, *chosen)
    assert [picture.shape for picture, _ in pictures] == 3 * [(28, 28, 3)]
    assert table[1] == [2, *prologue[1].tolist()]
    _, _, kept, _, _ = buttons.keep_prologue("dog", 0, 2, prologue, *chosen)
    assert torch.equal(kept, prologue[[1, 1, 1]])
    after, changed, _, _ = buttons.change_token("dog", 0, 3, 1, 63, prologue, *chosen)
    assert (changed != prologue).nonzero().tolist() == [[2, 0]]
    assert np.array_equal(after[0][0], pictures[0][0])  # the noise is the same
    picture = Images(folder() / "val").open(0)
    _, _, kept, _, text = buttons.vary("dog", 0, picture, 0.5, *chosen)
    assert len(kept.unique(dim=0)) == 1
    assert "the lower 3 of 7 rows" in text


def test_bench_times_a_step():
    words = ["bench", "ar", "--size", "tiny", "--batch_size", 2, "--repeat", 1]
    assert "ar tiny, 2 images: " in printed(*words)


def test_claims(tmp_path, monkeypatch):
    """A row with all of its scripts, which run in this process and draw few images."""
    claims = importlib.import_module("claims")

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
    assert Image.open(tmp_path / "claims.png").size == (100 + 16 * 58 + 2, 58 + 2)


ROWS = {"stage1": "prologue_b prologue_l 1d 2d 2d_l post onestage direct_2d_3 one_gpu",
        "ar": "b_b b_l b_xl l_b l_l l_xl 2d_l_b post one_gpu"}


def test_recipes_give_flags_that_the_scripts_know(tmp_path):
    recipes = ROOT / "recipes"
    for path in [*recipes.glob("*.sh"), *ROOT.glob("tools/*.sh")]:
        subprocess.run(["bash", "-n", path], check=True)
    runs = [(recipes / f"{name}.sh", row) for name, rows in ROWS.items() for row in rows.split()]
    for command in [*runs, (recipes / "ablations.sh",), (recipes / "one_gpu.sh",)]:
        lines = subprocess.run(["bash", *command], capture_output=True, text=True, check=True,
                               cwd=tmp_path, env=os.environ | {"LAUNCH": "echo"}).stdout
        for line in lines.splitlines():
            script, *words = shlex.split(line)
            with mock.patch.object(sys, "argv", [script, *words]):
                importlib.import_module(Path(script).stem).parse_args()
