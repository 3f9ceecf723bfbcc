"""fid.py against plain formulas and as a user runs it. `python -m pytest tests/test_fid.py`"""

import json
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch_fidelity import feature_extractor_inceptionv3 as inception

sys.path.insert(0, f"{os.path.dirname(__file__)}/..")

import fid
from data.fashion_mnist_features import CLASSES, FashionClassifier
from pretokenize import BUNDLED, Images, psnr, to_float, to_uint8
from tokenizer import SIZES, Tokenizer, TokenizerConfig, save_checkpoint


def features(n, d, seed):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)) + rng.normal(size=d)) * rng.uniform(0.1, 3, d)


def test_inception_score_and_frechet_distance():
    p = torch.eye(8)[[0, 1, 2, 3, 4, 5, 6, 7] + 8 * [0]]  # a split of eight classes, one of one
    assert fid.inception_score(p, split=8) == pytest.approx((8 + 1) / 2)
    known = fid.frechet_distance(np.zeros(2), np.diag([1.0, 4]), np.ones(2), np.diag([9.0, 1]))
    assert known == pytest.approx(2 + (1 - 3) ** 2 + (2 - 1) ** 2)  # means, deviations
    for n, tolerance in ((400, 1e-6), (20, 1e-4)):  # of 20 rows the covariances are singular
        x = features(n, 60, seed=0)
        y = features(n, 60, seed=1)
        root = sqrtm(np.cov(x.T) @ np.cov(y.T)).real
        expected = np.square(x.mean(0) - y.mean(0)).sum()
        expected += np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root)
        found = fid.frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
        assert found == pytest.approx(expected, rel=tolerance)


def test_precision_and_recall_by_brute_force():
    x = torch.from_numpy(features(150, 8, seed=0))
    y = torch.from_numpy(features(120, 8, seed=1))
    expected = []
    for points, queries in ((y, x), (x, y)):
        radius = (points[:, None] - points).norm(dim=2).sort(1).values[:, 3]  # 0: to itself
        inside = (queries[:, None] - points).norm(dim=2) <= radius
        expected.append(inside.any(1).double().mean().item())
    assert 0 < min(expected) < max(expected) < 1
    assert fid.precision_recall(x, y, block=32) == pytest.approx(expected)


def test_inception_features(tmp_path, monkeypatch):
    """Of random weights, because the trained ones would be downloaded."""
    with monkeypatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
        random = inception.FeatureExtractorInceptionV3("random", ["2048"])
    torch.save(random.state_dict(), tmp_path / "inception.pth")
    _, network = fid.feature_network((23, 13), tmp_path / "inception.pth", "cpu")
    seen = []
    network.net.Conv2d_1a_3x3.register_forward_hook(lambda *args: seen.append(args[1][0]))
    network.net.Mixed_6d.branch1x1.register_forward_hook(lambda *args: seen.append(args[2]))
    images = torch.randint(0, 256, (2, 23, 13, 3), dtype=torch.uint8)
    with torch.no_grad():
        output = network(images)
    resized, mixed = seen  # (2, 3, 299, 299), (2, 192, 17, 17)
    # TF1 knows no half-pixel centres: enlarged 13 and 23 times, each 13th row is one of the image.
    expected = (images.permute(0, 3, 1, 2) - 128.0) / 128
    torch.testing.assert_close(resized[:, :, ::13, ::23], expected)
    torch.testing.assert_close(resized[:, :, 1], resized[:, :, 0].lerp(resized[:, :, 13], 1 / 13))
    # sFID's features are flat in the order (row, column, channel).
    assert output["spatial"][1, (3 * 17 + 5) * 7 + 2] == mixed[1, 2, 3, 5]
    logits = output["pool"] @ network.net.fc.weight.T  # without the bias
    torch.testing.assert_close(output["probabilities"], logits.softmax(-1))


@pytest.fixture
def run(monkeypatch, capsys):
    """Calls fid.main and returns its scores."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["fid.py", *args, "--batch_size", "5"])
        fid.main()
        return json.loads(capsys.readouterr().out)

    return call


@pytest.fixture
def sides(tmp_path, monkeypatch):
    """Two sets of twelve images, each as a.npz and as a folder a of ten classes."""
    monkeypatch.chdir(tmp_path)
    val = Images(BUNDLED / "val")
    images = np.stack([val.open(183 * i % 2000) for i in range(24)]).reshape(2, 12, 28, 28, 3)
    for name, side in zip("ab", images):
        np.savez(f"{name}.npz", side, np.arange(12)[:, None] % 10)  # labels (N, 1)
        for i, image in enumerate(side):
            os.makedirs(f"{name}/{CLASSES[i % 10]}", exist_ok=True)
            Image.fromarray(image).save(f"{name}/{CLASSES[i % 10]}/{i}.png")
    return torch.from_numpy(images)


def test_files_and_folders_have_the_same_scores(run, sides):
    expected = run("a.npz", "b.npz")
    scores = run("a", "b")
    for name in ("count", "fid", "inception_score", "precision", "recall"):
        assert scores[name] == pytest.approx(expected[name], rel=1e-4), name


@torch.no_grad()
def test_stored_statistics_count_before_the_images_beside_them(run, sides):
    network = FashionClassifier.load()
    a, b = [network(side)["pool"].double().numpy() for side in sides]
    stored = dict(mu=b.mean(0) + 1, sigma=np.cov(b.T))
    np.savez("only.npz", **stored)
    np.savez("both.npz", sides[1].numpy(), **stored)
    both = run("a.npz", "both.npz")
    expected = fid.frechet_distance(a.mean(0), np.cov(a.T), *stored.values())
    assert both["fid"] == pytest.approx(expected, rel=1e-4)
    assert both["recall"] == run("a.npz", "b.npz")["recall"]
    only = run("a.npz", "only.npz")
    assert only["fid"] == both["fid"]
    assert "recall" not in only


def test_a_reference_of_many_sizes_is_cropped(run, sides):
    Image.open("b/bag/8.png").resize((56, 70)).save("b/bag/8.png")
    with pytest.raises(SystemExit, match="bag/8.png"):
        run("a.npz", "b")
    expected = run("a.npz", "b", "--crop")
    save_checkpoint("codes.safetensors", "codes", {}, {"data": "b"})  # beside the samples
    assert run("a.npz") == expected


def test_reconstructions(run, sides):
    tokenizer = Tokenizer(TokenizerConfig(**SIZES["tiny"], layout="2d"))
    tokenizer.save("tokenizer.safetensors")
    y = to_uint8(tokenizer.decode(tokenizer.encode(to_float(sides[0]))))
    np.savez("y.npz", y)
    scores = run("a", "--tokenizer", "tokenizer.safetensors")
    assert scores["rfid"] == pytest.approx(run("y.npz", "a")["fid"], rel=1e-4)
    assert scores["psnr"] == pytest.approx(psnr(y, sides[0]).mean().item(), rel=1e-5)
