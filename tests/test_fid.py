"""fid.py against plain formulas and as a user runs it. `python -m pytest tests/test_fid.py`"""

import json
import shutil

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


def test_scores_of_features():
    p = torch.eye(8)[[0, 1, 2, 3, 4, 5, 6, 7] + 8 * [0]]  # a split of eight classes, one of one
    assert fid.inception_score(p, split=8) == pytest.approx((8 + 1) / 2)
    x, y = np.random.default_rng(0).normal(size=(2, 20, 60))  # so the covariances are singular
    root = sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    expected = np.square(x.mean(0) - y.mean(0)).sum()
    expected += np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root)
    found = fid.frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    assert found == pytest.approx(expected, rel=1e-4)
    # Samples 0 to 9 are points of the reference; from 9 its third neighbour, 6, is as far as 12
    reference = torch.arange(20.0)[:, None]
    assert fid.precision_recall(reference[:10], reference) == pytest.approx((1, 13 / 20))


def test_inception_features(tmp_path, monkeypatch):
    """Of random weights, because the trained ones would be downloaded."""
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
    torch.save({}, tmp_path / "inception.pth")
    _, network = fid.feature_network((23, 13), tmp_path / "inception.pth", "cpu")
    mixed = []
    network.net.Mixed_6d.branch1x1.register_forward_hook(lambda *args: mixed.append(args[2]))
    with torch.no_grad():
        output = network(torch.randint(0, 256, (2, 23, 13, 3), dtype=torch.uint8))
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
    arrays = {}
    for side in ("train", "val"):
        images = Images(side)
        arrays[side] = np.stack([images.open(i) for i in range(len(images))])
        np.savez(side, arrays[side])
    return arrays


@torch.no_grad()
def test_references_in_files_folders_and_statistics(sides):
    expected = scores("train.npz", "val.npz")
    found = scores("train", "val")
    for name in ("count", "fid", "inception_score", "precision", "recall"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    # Stored statistics count before the images beside them
    network = FashionClassifier.load()
    a, b = [network(torch.from_numpy(side))["pool"].double().numpy() for side in sides.values()]
    stored = dict(mu=b.mean(0) + 1, sigma=np.cov(b.T))
    np.savez("only.npz", **stored)
    np.savez("both.npz", sides["val"], **stored)
    only = scores("train.npz", "only.npz")
    both = scores("train.npz", "both.npz")
    distance = fid.frechet_distance(a.mean(0), np.cov(a.T), *stored.values())
    assert only["fid"] == both["fid"] == pytest.approx(distance, rel=1e-4)
    assert "recall" not in only
    assert both["recall"] == expected["recall"]
    # Other sizes are refused, or cropped as images are that codes.safetensors names
    Image.open("val/dog/5.png").resize((56, 70)).save("val/dog/5.png")
    assert "dog/5.png is 56 x 70 and not 28 x 28" in refusal("fid", "train.npz", "val")
    save_checkpoint("codes.safetensors", "codes", {}, {"data": "val"})
    assert scores("train.npz") == scores("train.npz", "val", "--crop")


def test_reconstructions(sides):
    tokenizer = Tokenizer(TokenizerConfig(**SIZES["tiny"], layout="2d"))
    tokenizer.save("tokenizer.safetensors")
    x = torch.from_numpy(sides["train"])
    y = to_uint8(tokenizer.decode(tokenizer.encode(to_float(x))))
    np.savez("y.npz", y)
    found = scores("train", "--tokenizer", "tokenizer.safetensors")
    assert found["rfid"] == pytest.approx(scores("y.npz", "train")["fid"], rel=1e-4)
    assert found["psnr"] == pytest.approx(psnr(y, x).mean().item(), rel=1e-5)


def test_samples_in_the_order_of_classes_get_a_note(tmp_path, capsys):
    many = np.zeros((5001, 28, 28, 3), np.uint8)
    for labels, noted in ((np.arange(5001) // 500, True), (np.arange(5001) % 10, False)):
        file = tmp_path / f"{noted}.npz"
        np.savez(file, arr_0=many, arr_1=labels)
        assert "none.npz does not exist" in refusal("fid", file, "none.npz")
        assert (f"{file} is sorted by class" in capsys.readouterr().err) == noted
