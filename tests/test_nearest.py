"""Tests of tools/nearest.py, and of the count of copies that sample.py prints.

    python -m pytest tests/test_nearest.py
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tools"))

import nearest
import sample
from pretokenize import BUNDLED, Images, center_crop
from tokenizer import InputError, Tokenizer, to_float, to_uint8


def run(monkeypatch, capsys, script, *args):
    """Runs a script's main() in this process: the lines that it prints."""
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, args)])
    script.main()
    return capsys.readouterr().out.splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """30 training and 8 held-out images as files, and samples.npz: training images 4 and 17, three
    times noise, of which one is there twice, and training image 29."""
    folder = tmp_path_factory.mktemp("nearest")
    for split, count in (("train", 30), ("val", 8)):
        images = Images(BUNDLED / split)
        (folder / split).mkdir()
        for i in range(count):
            images.open(i * len(images) // count).save(folder / split / f"{i:02}.png")
    noise = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), np.uint8)
    train = training_images(folder)
    samples = [train[4], train[17], noise[0], noise[1], noise[0], train[29]]
    np.savez(folder / "samples.npz", np.stack(samples))
    return folder


def training_images(folder):
    images = Images(folder / "train")
    return np.stack([center_crop(images.open(i), 28) for i in range(len(images))])


def cells(path):
    """nearest.png as (rows, columns, 28, 28, 3): cells of 56 pixels, two between neighbours."""
    sheet = np.asarray(Image.open(path))[2:, 2:]
    rows, columns = (side // 58 for side in sheet.shape[:2])
    sheet = sheet.reshape(rows, 58, columns, 58, 3).transpose(0, 2, 1, 3, 4)
    return sheet[:, :, :56:2, :56:2]


def test_copies_are_found_whatever_the_batch_size(monkeypatch, capsys, folder, tmp_path):
    train = training_images(folder)
    samples = np.load(folder / "samples.npz")["arr_0"]
    results = []
    for batch_size in (1, 7, 100):
        lines = run(monkeypatch, capsys, nearest, folder / "samples.npz", "--data",
                    folder / "train", "--columns", 3, "--num_workers", 2, "--batch_size",
                    batch_size, "--out", tmp_path)
        results.append((lines, cells(tmp_path / "nearest.png")))
    lines, grid = results[0]
    for other_lines, other_grid in results[1:]:
        assert other_lines == lines
        assert np.array_equal(other_grid, grid)

    # All neighbours once more in plain numpy
    differences = train[None].astype(float) - samples[:, None]  # (6, 30, H, W, 3)
    distances = np.sqrt((differences**2).mean((2, 3, 4)))  # (6, 30)
    order = distances.argsort(1)[:, :3]
    assert order[[0, 1, 5], 0].tolist() == [4, 17, 29]
    assert np.array_equal(grid[:, 0], samples)
    assert np.array_equal(grid[:, 1:], train[order])

    # The numbers
    assert "6 images, 1 of them exact copies of an earlier one" in lines[0]
    median = float(lines[3].removeprefix("  of 6 samples: "))
    assert median == pytest.approx(np.median(distances.min(1)), abs=0.006)
    images = Images(folder / "val")
    held_out = np.stack([center_crop(images.open(i), 28) for i in (0, 1, 2, 4, 5, 7)])
    differences = train[None].astype(float) - held_out[:, None]
    median = float(lines[4].removeprefix("  of 6 held-out images: "))
    expected = np.median(np.sqrt((differences**2).mean((2, 3, 4))).min(1))
    assert median == pytest.approx(expected, abs=0.006)
    assert lines[5].endswith(": 3 samples (50.0%)")
    assert lines[6].startswith("note: 1% of fewer than 100")
    assert len(lines) == 7


def test_distances_of_copies_are_0(folder):
    train = nearest.pixel_vectors(torch.from_numpy(training_images(folder)))
    samples = nearest.pixel_vectors(torch.from_numpy(np.load(folder / "samples.npz")["arr_0"]))
    distances, numbers = nearest.nearest(samples, train.split(8), 40)
    assert distances.shape == numbers.shape == (6, 30)  # there are no more than 30
    assert numbers[[0, 1, 5], 0].tolist() == [4, 17, 29]
    assert (distances[:, 0] == 0).tolist() == [True, True, False, False, False, True]
    assert (distances.diff() >= 0).all()
    # Of two that are equally near the first comes first, also across batches
    twice = torch.cat([train, train])
    numbers = nearest.nearest(samples, twice.split(8), 2)[1]
    assert numbers[[0, 1, 5]].tolist() == [[4, 34], [17, 47], [29, 59]]


def test_by_features_and_without_held_out_images(monkeypatch, capsys, folder, tmp_path):
    """--num and --rows leave samples out; the picture is of the first and the last."""
    shutil.copytree(folder / "train", tmp_path / "mine")
    lines = run(monkeypatch, capsys, nearest, folder / "samples.npz", "--data", tmp_path / "mine",
                "--by", "features", "--num", 1, "--rows", 2, "--columns", 1, "--out", tmp_path)
    grid = cells(tmp_path / "nearest.png")
    train = training_images(folder)
    assert np.array_equal(grid, train[[[4, 4], [29, 29]]])
    assert "distance of features" in lines[2]
    assert float(lines[3].removeprefix("  of 1 samples: ")) < 0.01
    assert "there is no folder val beside" in lines[4]
    assert len(lines) == 5


def test_samples_of_another_size_need_data_of_their_own(monkeypatch, capsys, tmp_path):
    np.savez(tmp_path / "wide.npz", np.zeros((2, 28, 32, 3), np.uint8))
    with pytest.raises(InputError, match="28 x 32, squares are needed"):
        run(monkeypatch, capsys, nearest, tmp_path / "wide.npz")
    np.savez(tmp_path / "large.npz", np.zeros((2, 32, 32, 3), np.uint8))
    with pytest.raises(InputError, match="--data says what"):
        run(monkeypatch, capsys, nearest, tmp_path / "large.npz")


def test_sample_py_counts_copies_over_its_parts(monkeypatch, capsys, tmp_path):
    # So cold that the images of a class are all the same; 10 classes, so 2 of 12 are copies
    monkeypatch.setattr(sample, "PART_SIZE", 5)
    cold = ("--temperature", 0.001, "--temperature_prologue", 0.001, "--columns", 1)
    lines = run(monkeypatch, capsys, sample, "--num", 12, *cold, "--out", tmp_path)
    assert "samples.npz: 12 images, 2 of them exact copies of an earlier one" in lines[-1]


def test_samples_learned_by_heart_are_what_the_tokenizer_makes_of_images(monkeypatch, capsys,
                                                                         folder, tmp_path):
    path = ROOT / "checkpoints" / "fashion_mnist" / "tokenizer.safetensors"
    tokenizer = Tokenizer.load(path)
    x = to_float(torch.from_numpy(training_images(folder)[:6]).permute(0, 3, 1, 2))
    np.savez(tmp_path / "samples.npz", to_uint8(tokenizer.decode(tokenizer.encode(x))).numpy())
    medians = []
    for flags in ([], ["--tokenizer", path]):
        lines = run(monkeypatch, capsys, nearest, tmp_path / "samples.npz", "--data",
                    folder / "train", "--val_data", folder / "train", "--num_workers", 0, *flags)
        medians.append(float(lines[3].split()[-1]))
        assert lines[-1].startswith("note: 6 of the held-out images have a training image")
    assert medians[0] > 5
    assert medians[1] < 1
