"""Tests of fid.py against straightforward double-precision references.

    python -m pytest tools/test_fid.py
"""
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import fid
from data.fashion_mnist_features import FashionClassifier


def features(n, d, seed, scale=3.0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)) * rng.uniform(0.1, scale, d) + rng.normal(size=d)).astype(np.float32)


def by_sqrtm(a, b):
    (mu1, s1), (mu2, s2) = ((x.astype(np.float64).mean(0), np.cov(x.astype(np.float64), rowvar=False)) for x in (a, b))
    return ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)


def moments(x):
    total = fid.Moments()
    for part in torch.from_numpy(x).split(37):
        total.add(part)
    return total.result()


def test_frechet_distance_equals_sqrtm():
    a, b = features(400, 60, 0), features(300, 60, 1)
    assert abs(fid.frechet_distance(*moments(a), *moments(b)) / by_sqrtm(a, b) - 1) < 1e-6
    mu, sigma = moments(a)
    np.testing.assert_allclose(sigma, np.cov(a.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-9)
    assert abs(fid.frechet_distance(mu, sigma, mu, sigma)) < 1e-6


def test_fewer_samples_than_dimensions():
    a, b = features(20, 60, 0), features(25, 60, 1)
    assert abs(fid.frechet_distance(*moments(a), *moments(b)) / by_sqrtm(a, b) - 1) < 1e-4


def test_inception_score_over_splits():
    p = torch.randn(70, 9).mul(2).softmax(-1)
    sums = fid.ScoreSums(70, 9, split=30)
    for i in range(0, 70, 16):
        sums.add(p[i:i + 16], i)
    expected = []
    for part in (p[:30], p[30:60], p[60:]):
        q = part.double().numpy()
        expected.append(np.exp(np.mean([np.sum(row * (np.log(row) - np.log(q.mean(0)))) for row in q])))
    assert abs(sums.result() - np.mean(expected)) < 1e-6


def test_precision_recall_by_brute_force():
    x, y = features(150, 8, 0), features(120, 8, 1)

    def distance(a, b):
        return np.square(a.astype(np.float64)[:, None] - b.astype(np.float64)[None]).sum(-1)

    def manifold(points, queries):
        radius = np.sort(distance(points, points), 1)[:, 3]  # column 0 is the point itself
        return (distance(queries, points) <= radius).any(1).mean()

    precision, recall = fid.precision_recall(x, y, block=32)
    assert 0 < precision < 1 and 0 < recall < 1
    assert abs(precision - manifold(y, x)) < 1e-6 and abs(recall - manifold(x, y)) < 1e-6


def test_psnr_and_ssim():
    a = torch.rand(2, 3, 20, 24) * 255
    b = (a + 20 * torch.randn_like(a)).clamp(0, 255)
    mse = ((a - b).double() ** 2).mean((1, 2, 3))
    torch.testing.assert_close(fid.psnr(a, b).double(), 10 * torch.log10(255**2 / mse), rtol=1e-5, atol=0)
    x, y = a[0, 0].double().numpy(), b[0, 0].double().numpy()
    g = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    w, values = np.outer(g, g) / g.sum() ** 2, []
    for i in range(10):
        for j in range(14):
            p, q = x[i:i + 11, j:j + 11], y[i:i + 11, j:j + 11]
            mp, mq = (w * p).sum(), (w * q).sum()
            vp, vq, cov = (w * p * p).sum() - mp**2, (w * q * q).sum() - mq**2, (w * p * q).sum() - mp * mq
            values.append((2 * mp * mq + 6.5025) * (2 * cov + 58.5225) / ((mp**2 + mq**2 + 6.5025) * (vp + vq + 58.5225)))
    assert abs(fid.ssim(a[:1, :1].double(), b[:1, :1].double()).item() - np.mean(values)) < 1e-9
    assert fid.ssim(a, a).min() > 0.999


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random Inception weights in torch-fidelity's form."""
    from torch_fidelity import feature_extractor_inceptionv3 as module
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
        torch.manual_seed(0)
        net = module.FeatureExtractorInceptionV3("random", ["2048"])
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(net.state_dict(), path)
    return path


def test_inception_features(weights):
    network, images = fid.Inception(weights), torch.randint(0, 256, (2, 40, 48, 3), dtype=torch.uint8)
    seen = {}
    network.net.Conv2d_1a_3x3.register_forward_hook(lambda module, args, output: seen.update(input=args[0]))
    network.net.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, output: seen.update(mixed=output))
    with torch.no_grad():
        out = network(images)
    # TF1's bilinear resize: no half-pixel centres, source position = target * in / out.
    for _ in range(200):
        r, c, k = (int(torch.randint(n, ())) for n in (299, 299, 3))
        y, x = r * 40 / 299, c * 48 / 299
        y0, x0 = int(y), int(x)
        y1, x1 = min(y0 + 1, 39), min(x0 + 1, 47)
        a = images[1, :, :, k].double()
        top, bottom = a[y0, x0] + (a[y0, x1] - a[y0, x0]) * (x - x0), a[y1, x0] + (a[y1, x1] - a[y1, x0]) * (x - x0)
        assert abs((top + (bottom - top) * (y - y0) - 128) / 128 - seen["input"][1, k, r, c]) < 1e-4
    assert out["pool"].shape == (2, 2048) and out["spatial"].shape == (2, 2023) and out["probabilities"].shape == (2, 1008)
    assert out["spatial"][1, (3 * 17 + 5) * 7 + 2] == seen["mixed"][1, 2, 3, 5] and seen["mixed"].min() == 0
    logits = out["pool"] @ network.net.fc.weight.T  # without the bias
    torch.testing.assert_close(out["probabilities"], logits.softmax(-1))


@pytest.fixture
def run(monkeypatch, capsys):
    """Calls fid.py's main, or the script under torchrun, and returns (what it refused, stdout, stderr)."""
    def call(*args, ranks=1):
        if ranks > 1:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", ranks, "--master_port", 29541]
            result = subprocess.run([str(a) for a in (*launcher, ROOT / "fid.py", *args)], capture_output=True, text=True,
                                    env=os.environ | {"OMP_NUM_THREADS": "1"})
            return "" if result.returncode == 0 else result.stderr, result.stdout, result.stderr
        monkeypatch.setattr(sys, "argv", ["fid.py", *map(str, args)])
        refused = ""
        try:
            fid.main()
        except fid.BadInput as error:
            refused = str(error)
        return refused, *capsys.readouterr()
    return call


def test_sources_ranks_and_stored_statistics(run, tmp_path):
    rng = np.random.default_rng(0)
    sets = {name: rng.integers(0, 256, (n, 28, 28, 3), np.uint8) for name, n in (("a", 14), ("b", 11))}
    for name, images in sets.items():
        np.savez(tmp_path / f"{name}.npz", images)
        np.savez_compressed(tmp_path / f"{name}_small.npz", images)
        (tmp_path / name / "class").mkdir(parents=True)
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            for i, image in enumerate(images):
                Image.fromarray(image).save(tmp_path / name / "class" / f"{i:02}.png")
                archive.write(tmp_path / name / "class" / f"{i:02}.png", f"x/{i:02}.png")
    options = ["--json", "--batch_size", 4]
    results = []
    for a, b, ranks in (("a.npz", "b.npz", 1), ("a.zip/x", "b", 1), ("a_small.npz", "b.zip", 1), ("a.npz", "b.npz", 3)):
        refused, out, err = run(tmp_path / a, tmp_path / b, *options, ranks=ranks)
        assert not refused
        assert "biased" in err and "singular" in err
        results.append(json.loads(out))
    for result in results[1:]:
        for name in ("fid", "inception_score", "precision", "recall"):
            assert abs(result[name] - results[0][name]) <= 1e-6 * abs(results[0][name]), name

    # Statistics stored beside images count before them; the images still serve precision and recall.
    network = FashionClassifier.load()
    a, b = (fid.extract(network, fid.ImageSource(tmp_path / f"{name}.npz"), "cpu", 4, "") for name in "ab")
    stored = dict(mu=b["pool"][0] + 1, sigma=b["pool"][1])
    np.savez(tmp_path / "both.npz", sets["b"], **stored)
    _, out, err = run(tmp_path / "a.npz", tmp_path / "both.npz", *options)
    both = json.loads(out)
    assert "stored in" in err and both["recall"] == results[0]["recall"]
    assert abs(both["fid"] / fid.frechet_distance(*a["pool"], stored["mu"], stored["sigma"]) - 1) < 1e-6

    np.savez(tmp_path / "only.npz", **stored)
    alone = json.loads(run(tmp_path / "only.npz", tmp_path / "both.npz", *options)[1])
    assert set(alone) == {"samples", "reference", "fid"} and abs(alone["fid"]) < 1e-6
    assert "must hold them too" in run(tmp_path / "only.npz", tmp_path / "b.npz", *options)[0]

    # The cache is keyed by content: the same numbers again, and a changed file is computed anew.
    for _ in range(2):
        _, out, err = run(tmp_path / "a.npz", tmp_path / "b", "--cache", *options)
        assert abs(json.loads(out)["fid"] / results[0]["fid"] - 1) < 1e-9
    assert len(list(tmp_path.glob("b.*.fid.npz"))) == 1 and "features of " + str(tmp_path / "b") not in err
    Image.fromarray(255 - sets["b"][3]).save(tmp_path / "b" / "class" / "03.png")
    _, out, err = run(tmp_path / "a.npz", tmp_path / "b", "--cache", *options)
    assert json.loads(out)["fid"] != results[0]["fid"] and len(list(tmp_path.glob("b.*.fid.npz"))) == 2

    _, out, err = run(tmp_path / "a.npz", tmp_path / "a.npz", "--paired", "--ssim", *options)
    same = json.loads(out)
    assert same["psnr"] > 100 and same["ssim"] > 0.999 and abs(same["rfid"]) < 1e-3 and same["precision"] == same["recall"] == 1


def test_bad_input_gets_one_sentence(run, weights, tmp_path):
    images = np.zeros((4, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "good.npz", images)
    np.savez(tmp_path / "float.npz", images / 255)
    np.savez(tmp_path / "small.npz", images[:, :16, :16])
    np.savez(tmp_path / "stats.npz", mu=np.zeros(5), sigma=np.eye(5))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:1000])
    (tmp_path / "mixed").mkdir()
    Image.fromarray(images[0]).save(tmp_path / "mixed" / "0.png")
    Image.fromarray(images[0, :16]).save(tmp_path / "mixed" / "1.png")
    (tmp_path / "code.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    (tmp_path / "lossy").mkdir()
    Image.fromarray(images[0]).save(tmp_path / "lossy" / "0.jpg")
    Image.fromarray(images[0]).save(tmp_path / "lossy" / "1.jpg")
    good, inception = tmp_path / "good.npz", ["--inception", weights]
    for args, words in (
            ((tmp_path / "float.npz", good), "arr_0 is float64"), ((tmp_path / "no.npz", good), "no.npz does not exist"),
            ((tmp_path / "cut.npz", good), "cut.npz is not a whole .npz file"),
            ((tmp_path / "mixed", good, *inception), "1.png in"),
            ((good, tmp_path / "stats.npz", *inception), "the reference has statistics of 5 features"),
            ((good, tmp_path / "small.npz", "--paired", *inception), "both must be the same"),
            ((good, good, "--features", "fashion"), "is for 28 x 28 images"),
            ((good, good, "--inception", tmp_path / "code.pth"), "weights-inception-2015-12-05-6726825d.pth as --inception"),
            ((good, good, "--inception", tmp_path / "none.pth"), "none.pth cannot be loaded")):
        refused = run(*args)[0]
        assert words in refused and "\n" not in refused, (args, refused)
    assert "JPEG" in run(tmp_path / "lossy", good, "--inception", tmp_path / "none.pth")[2]


if __name__ == "__main__":  # how much faster than sqrtm at 2048 dimensions
    a, b = moments(features(4000, 2048, 0)), moments(features(4000, 2048, 1))
    start = time.perf_counter()
    ours = fid.frechet_distance(*a, *b)
    middle = time.perf_counter()
    theirs = ((a[0] - b[0]) ** 2).sum() + np.trace(a[1] + b[1] - 2 * sqrtm(a[1] @ b[1]).real)
    end = time.perf_counter()
    print(f"FID of 2048 dims: {middle - start:.1f} s; with scipy's sqrtm {end - middle:.1f} s; "
          f"relative difference {ours / theirs - 1:.1e}")
