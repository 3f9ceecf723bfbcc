"""fid.py against plain formulas and as a user runs it. `python -m pytest tests/test_fid.py`"""

import json
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from test_scripts import folder, printed, refusal
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

import fid
from data.fashion_mnist_features import FashionClassifier
from pretokenize import Images, psnr, to_float, to_uint8
from tokenizer import SIZES, Tokenizer, TokenizerConfig, save_checkpoint


def features(n, d, seed):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)) + rng.normal(size=d)) * rng.uniform(0.1, 3, d)


def test_inception_score_and_frechet_distance():
    p = torch.eye(8)[[0, 1, 2, 3, 4, 5, 6, 7] + 8 * [0]]  # a split of eight classes, one of one
    assert fid.inception_score(p, split=8) == pytest.approx((8 + 1) / 2)
    x = features(20, 60, seed=0)  # fewer rows than columns: the covariances are singular
    y = features(20, 60, seed=1)
    root = sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    expected = np.square(x.mean(0) - y.mean(0)).sum()
    expected += np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root)
    found = fid.frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    assert found == pytest.approx(expected, rel=1e-4)


def test_precision_and_recall_by_brute_force():
    x = torch.from_numpy(features(150, 8, seed=0))
    y = torch.from_numpy(features(120, 8, seed=1))
    expected = []
    for points, queries in ((y, x), (x, y)):
        radius = (points[:, None] - points).norm(dim=2).sort(1).values[:, 3]  # 0: to itself
        inside = (queries[:, None] - points).norm(dim=2) <= radius
        expected.append(inside.any(1).double().mean().item())
    assert fid.precision_recall(x, y) == pytest.approx(expected)


def test_inception_features(tmp_path, monkeypatch):
    """Of random weights, because the trained ones would be downloaded."""
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
    torch.save({}, tmp_path / "inception.pth")
    _, network = fid.feature_network((23, 13), tmp_path / "inception.pth", "cpu")
    mixed = []
    network.net.Mixed_6d.branch1x1.register_forward_hook(lambda *args: mixed.append(args[2]))
    images = torch.randint(0, 256, (2, 23, 13, 3), dtype=torch.uint8)
    with torch.no_grad():
        output = network(images)
    # sFID's features are flat in the order (row, column, channel).
    assert output["spatial"][1, (3 * 17 + 5) * 7 + 2] == mixed[0][1, 2, 3, 5]
    logits = output["pool"] @ network.net.fc.weight.T  # without the bias
    torch.testing.assert_close(output["probabilities"], logits.softmax(-1))


def scores(*args):
    return json.loads(printed("fid", *args, "--batch_size", 5))


@pytest.fixture
def sides(tmp_path, monkeypatch):
    """The images in the folders train and val, which are also in train.npz and val.npz."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder(), tmp_path, dirs_exist_ok=True)
    arrays = []
    for side in ("train", "val"):
        images = Images(side)
        arrays.append(np.stack([images.open(i) for i in range(len(images))]))
        np.savez(side, arrays[-1])
    return [torch.from_numpy(array) for array in arrays]


@torch.no_grad()
def test_stored_statistics_count_before_the_images_beside_them(sides):
    network = FashionClassifier.load()
    a, b = [network(side)["pool"].double().numpy() for side in sides]
    stored = dict(mu=b.mean(0) + 1, sigma=np.cov(b.T))
    np.savez("only.npz", **stored)
    np.savez("both.npz", sides[1].numpy(), **stored)
    both = scores("train.npz", "both.npz")
    expected = fid.frechet_distance(a.mean(0), np.cov(a.T), *stored.values())
    assert both["fid"] == pytest.approx(expected, rel=1e-4)
    assert both["recall"] == scores("train.npz", "val.npz")["recall"]
    only = scores("train.npz", "only.npz")
    assert only["fid"] == both["fid"]
    assert "recall" not in only


def test_folders_have_the_scores_of_files_and_are_cropped(sides):
    expected = scores("train.npz", "val.npz")
    found = scores("train", "val")
    for name in ("count", "fid", "inception_score", "precision", "recall"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    Image.open("val/dog/5.png").resize((56, 70)).save("val/dog/5.png")
    assert "dog/5.png is 56 x 70 and not 28 x 28" in refusal("fid", "train.npz", "val")
    expected = scores("train.npz", "val", "--crop")
    save_checkpoint("codes.safetensors", "codes", {}, {"data": "val"})  # beside the samples
    assert scores("train.npz") == expected


def test_reconstructions(sides):
    tokenizer = Tokenizer(TokenizerConfig(**SIZES["tiny"], layout="2d"))
    tokenizer.save("tokenizer.safetensors")
    y = to_uint8(tokenizer.decode(tokenizer.encode(to_float(sides[0]))))
    np.savez("y.npz", y)
    found = scores("train", "--tokenizer", "tokenizer.safetensors")
    assert found["rfid"] == pytest.approx(scores("y.npz", "train")["fid"], rel=1e-4)
    assert found["psnr"] == pytest.approx(psnr(y, sides[0]).mean().item(), rel=1e-5)


def test_samples_in_the_order_of_classes_get_a_note(sides, capsys):
    many = np.resize(sides[0].numpy(), (5001, 28, 28, 3))
    for labels, noted in ((np.arange(5001) // 500, True), (np.arange(5001) % 10, False)):
        np.savez(f"{noted}.npz", arr_0=many, arr_1=labels)
        with mock.patch.object(fid, "extract", side_effect=SystemExit), pytest.raises(SystemExit):
            scores(f"{noted}.npz", "val")
        assert (f"{noted}.npz is sorted by class" in capsys.readouterr().err) == noted
