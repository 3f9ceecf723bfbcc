"""fid.py against straightforward double-precision references, and its answers to bad input.

python -m pytest tests/test_fid.py
python tests/test_fid.py             # how much faster than scipy's sqrtm our distance is
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

# Statistics


def random_features(n, d, seed):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, d)) * rng.uniform(0.1, 3.0, d) + rng.normal(size=d)
    return features.astype(np.float32)


def moments_of(features):
    """mu and sigma by fid.Moments, in batches of 37"""
    moments = fid.Moments()
    for batch in torch.from_numpy(features).split(37):
        moments.add(batch)
    return moments.result()


def distance_by_sqrtm(mu1, sigma1, mu2, sigma2):
    trace = np.trace(sigma1 + sigma2 - 2 * sqrtm(sigma1 @ sigma2).real)
    return ((mu1 - mu2) ** 2).sum() + trace


def test_moments():
    features = random_features(400, 60, seed=0)
    mu, sigma = moments_of(features)
    features = features.astype(np.float64)
    np.testing.assert_allclose(mu, features.mean(0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(sigma, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("n", "m", "tolerance"), [(400, 300, 1e-6), (20, 25, 1e-4)], ids=["full rank", "fewer than d"]
)
def test_frechet_distance_equals_sqrtm(n, m, tolerance):
    a = moments_of(random_features(n, 60, seed=0))
    b = moments_of(random_features(m, 60, seed=1))
    assert fid.frechet_distance(*a, *b) == pytest.approx(distance_by_sqrtm(*a, *b), rel=tolerance)
    assert abs(fid.frechet_distance(*a, *a)) < tolerance


def test_inception_score_over_splits():
    torch.manual_seed(0)
    p = torch.randn(70, 9).mul(2).softmax(-1)
    sums = fid.ScoreSums(70, 9, split=30)
    for i in range(0, 70, 16):
        sums.add(p[i : i + 16], i)
    scores = []
    for split in (p[:30], p[30:60], p[60:]):
        split = split.double().numpy()
        kl = np.sum(split * (np.log(split) - np.log(split.mean(0))), axis=1)
        scores.append(np.exp(kl.mean()))
    assert sums.result() == pytest.approx(np.mean(scores), abs=1e-6)


def test_precision_recall_by_brute_force():
    x = random_features(150, 8, seed=0)
    y = random_features(120, 8, seed=1)

    def distances(a, b):
        return np.square(a.astype(np.float64)[:, None] - b.astype(np.float64)[None]).sum(-1)

    def share_inside(points, queries):
        radius = np.sort(distances(points, points), axis=1)[:, 3]  # column 0: the point itself
        return (distances(queries, points) <= radius).any(1).mean()

    precision, recall = fid.precision_recall(x, y, block=32)
    assert 0 < precision < 1
    assert 0 < recall < 1
    assert precision == pytest.approx(share_inside(y, x), abs=1e-6)
    assert recall == pytest.approx(share_inside(x, y), abs=1e-6)


# Pairs of images


def test_psnr():
    a = torch.rand(2, 3, 20, 24) * 255
    b = (a + 20 * torch.randn_like(a)).clamp(0, 255)
    mse = ((a - b).double() ** 2).mean((1, 2, 3))
    expected = 10 * torch.log10(255**2 / mse)
    torch.testing.assert_close(fid.psnr(a, b).double(), expected, rtol=1e-5, atol=0)


def test_ssim_window_by_window():
    a = torch.rand(1, 1, 20, 24, dtype=torch.float64) * 255
    b = (a + 20 * torch.randn_like(a)).clamp(0, 255)
    x = a[0, 0].numpy()
    y = b[0, 0].numpy()
    gaussian = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(gaussian, gaussian) / gaussian.sum() ** 2
    values = []
    for i in range(10):
        for j in range(14):
            p = x[i : i + 11, j : j + 11]
            q = y[i : i + 11, j : j + 11]
            mean_p = (window * p).sum()
            mean_q = (window * q).sum()
            var_p = (window * p * p).sum() - mean_p**2
            var_q = (window * q * q).sum() - mean_q**2
            cov = (window * p * q).sum() - mean_p * mean_q
            luminance = (2 * mean_p * mean_q + 6.5025) / (mean_p**2 + mean_q**2 + 6.5025)
            values.append(luminance * (2 * cov + 58.5225) / (var_p + var_q + 58.5225))
    assert fid.ssim(a, b).item() == pytest.approx(np.mean(values), abs=1e-9)
    assert fid.ssim(a, a).item() > 0.999


class HalfDark:
    """Stands in for a tokenizer: its codes are the images, its reconstructions are darker."""

    def encode(self, images):
        return images

    def decode(self, codes):
        return (codes + 1) / 2 - 1


def test_reconstructions():
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), np.uint8)

    class Originals:
        def __len__(self):
            return len(images)

        def __getitem__(self, rows):
            return images[rows]

    source = fid.Reconstructions(Originals(), HalfDark(), {"psnr": fid.psnr}, "cpu")
    batches = [source[0:4], source[4:7]]
    expected = images / 2  # to_uint8 rounds: half a level up or down
    assert np.abs(np.concatenate(batches) - expected).max() <= 0.5
    mse = np.square(np.concatenate(batches) - images.astype(np.float64)).mean((1, 2, 3))
    assert source.means() == {"psnr": pytest.approx(np.mean(10 * np.log10(255**2 / mse)))}


# Inception


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
    network = fid.Inception(weights)
    images = torch.randint(0, 256, (2, 40, 48, 3), dtype=torch.uint8)
    seen = {}

    def keep_input(module, args, output):
        seen["input"] = args[0]  # (2, 3, 299, 299)

    def keep_mixed(module, args, output):
        seen["mixed"] = output  # (2, 192, 17, 17)

    network.net.Conv2d_1a_3x3.register_forward_hook(keep_input)
    network.net.Mixed_6d.branch1x1.register_forward_hook(keep_mixed)
    with torch.no_grad():
        output = network(images)

    # TF1's bilinear resize: no half-pixel centres, source position = target * in / out.
    for _ in range(200):
        row = int(torch.randint(299, ()))
        column = int(torch.randint(299, ()))
        channel = int(torch.randint(3, ()))
        y = row * 40 / 299
        x = column * 48 / 299
        top = int(y)
        left = int(x)
        bottom = min(top + 1, 39)
        right = min(left + 1, 47)
        image = images[1, :, :, channel].double()
        upper = image[top, left] + (image[top, right] - image[top, left]) * (x - left)
        lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * (x - left)
        expected = (upper + (lower - upper) * (y - top) - 128) / 128
        assert abs(expected - seen["input"][1, channel, row, column]) < 1e-4

    assert output["pool"].shape == (2, 2048)
    assert output["spatial"].shape == (2, 2023)
    assert output["probabilities"].shape == (2, 1008)
    # Flat in the order (row, column, channel), after the ReLU
    assert output["spatial"][1, (3 * 17 + 5) * 7 + 2] == seen["mixed"][1, 2, 3, 5]
    assert seen["mixed"].min() == 0
    logits = output["pool"] @ network.net.fc.weight.T  # without the bias
    torch.testing.assert_close(output["probabilities"], logits.softmax(-1))


def test_feature_network(weights):
    for size in (28, (28, 28)):
        assert fid.feature_network("auto", size, None, "cpu")[0] == "fashion"
    for size in (256, (28, 40), (40, 28)):
        name, network = fid.feature_network("auto", size, weights, "cpu")
        assert name == "inception"
        assert isinstance(network, fid.Inception)


# The script


@pytest.fixture
def run(monkeypatch, capsys):
    """Calls fid.main and returns (the sentence it ended with, stdout, stderr)."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["fid.py", *map(str, args)])
        sentence = ""
        try:
            fid.main()
        except fid.InputError as error:
            sentence = str(error)
        return sentence, *capsys.readouterr()

    return call


def run_with_ranks(ranks, *args):
    """stdout of fid.py under torchrun"""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", ranks, "--master_port", 29541]
    command = [sys.executable, *launcher, ROOT / "fid.py", *args]
    result = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Two sets of random 28 x 28 images, each as a.npz, a_small.npz, a.zip and a folder a with a
    link to the class folder."""
    folder = tmp_path_factory.mktemp("sides")
    rng = np.random.default_rng(0)
    for name, n in (("a", 14), ("b", 11)):
        images = rng.integers(0, 256, (n, 28, 28, 3), np.uint8)
        np.savez(folder / f"{name}.npz", images, np.arange(n) % 10)
        np.savez_compressed(folder / f"{name}_small.npz", images)
        (folder / f"class_of_{name}").mkdir()
        (folder / name).mkdir()
        (folder / name / "class").symlink_to(folder / f"class_of_{name}")
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            for i, image in enumerate(images):
                file = folder / name / "class" / f"{i:02}.png"
                Image.fromarray(image).save(file)
                archive.write(file, f"x/{i:02}.png")
    return folder


OPTIONS = ["--json", "--batch_size", 4]


def test_all_kinds_of_sources_give_the_same_numbers(run, sides):
    sentence, out, err = run(sides / "a.npz", sides / "b.npz", *OPTIONS)
    assert not sentence
    assert "biased" in err
    assert "singular" in err
    expected = json.loads(out)
    assert expected["count"] == 14
    assert 0 < expected["class_consistency"] < 1
    others = [
        run(sides / "a.zip" / "x", sides / "b", *OPTIONS)[1],
        run(sides / "a_small.npz", sides / "b.zip", *OPTIONS)[1],
        run_with_ranks(3, sides / "a.npz", sides / "b.npz", *OPTIONS),
    ]
    for other in others:
        for name in ("fid", "inception_score", "precision", "recall"):
            assert json.loads(other)[name] == pytest.approx(expected[name], rel=1e-6), name


def test_npz_rows_in_any_order(sides):
    source = fid.ImageSource(sides / "a.npz")
    images = np.load(sides / "a.npz")["arr_0"]
    small = fid.ImageSource(sides / "a_small.npz")
    for rows in (slice(5, 9), slice(0, 3), slice(12, 20), slice(2, 2)):
        np.testing.assert_array_equal(source[rows], images[rows])
        np.testing.assert_array_equal(small[rows], images[rows])


def test_kept_features(sides):
    network = FashionClassifier.load()
    source = fid.ImageSource(sides / "a.npz")
    features = fid.extract(network, source, "cpu", 4, "", keep=14)["features"]
    expected = network(torch.from_numpy(source[0:14]))["pool"].detach().numpy()
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
    for keep in (0, 6):
        kept = fid.extract(network, source, "cpu", 4, "", keep=keep)["features"]
        np.testing.assert_array_equal(kept, features[:keep])


def test_stored_statistics(run, sides, tmp_path):
    network = FashionClassifier.load()
    a = fid.extract(network, fid.ImageSource(sides / "a.npz"), "cpu", 4, "")
    b = fid.extract(network, fid.ImageSource(sides / "b.npz"), "cpu", 4, "")
    stored = {"mu": b["pool"][0] + 1, "sigma": b["pool"][1]}
    np.savez(tmp_path / "both.npz", np.load(sides / "b.npz")["arr_0"], **stored)
    np.savez(tmp_path / "only.npz", **stored)

    # They count before the images beside them, which still serve precision and recall.
    images = json.loads(run(sides / "a.npz", sides / "b.npz", *OPTIONS)[1])
    _, out, err = run(sides / "a.npz", tmp_path / "both.npz", *OPTIONS)
    both = json.loads(out)
    assert "stored in" in err
    assert both["recall"] == images["recall"]
    expected = fid.frechet_distance(*a["pool"], stored["mu"], stored["sigma"])
    assert both["fid"] == pytest.approx(expected, rel=1e-6)
    assert both["fid"] > images["fid"] + 1

    # Without images there are no other scores.
    only = json.loads(run(sides / "a.npz", tmp_path / "only.npz", *OPTIONS)[1])
    assert only["fid"] == both["fid"]
    assert "recall" not in only
    only = json.loads(run(tmp_path / "only.npz", tmp_path / "both.npz", *OPTIONS)[1])
    assert set(only) == {"samples", "reference", "fid"}
    assert abs(only["fid"]) < 1e-6
    assert "holds only statistics" in run(tmp_path / "only.npz", sides / "b.npz", *OPTIONS)[0]


# Bad input


def test_bad_images(run, weights, tmp_path):
    images = np.zeros((4, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "good.npz", images)
    np.savez(tmp_path / "float.npz", images / 255)
    np.savez(tmp_path / "small.npz", images[:, :16, :16])
    np.savez(tmp_path / "wide.npz", images[:, :, :16])
    np.savez(tmp_path / "fortran.npz", np.asfortranarray(images))
    np.savez(tmp_path / "one.npz", images[:1])
    np.savez(tmp_path / "objects.npz", np.full((4, 32, 32, 3), None))
    np.savez(tmp_path / "labels.npz", images[:, :28, :28], np.arange(3))
    np.savez(tmp_path / "halves.npz", images[:, :28, :28], np.full(4, 0.5))
    np.savez(tmp_path / "28x40.npz", np.zeros((4, 28, 40, 3), np.uint8))
    np.savez(tmp_path / "28x28.npz", images[:, :28, :28])
    (tmp_path / "cut.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:1000])
    for name, content in (("mixed", images[0, :16]), ("lossy", images[0])):
        (tmp_path / name).mkdir()
        Image.fromarray(images[0]).save(tmp_path / name / "0.png")
        Image.fromarray(content).save(tmp_path / name / "1.png")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "0.png").write_text("not an image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.zip").write_bytes(b"PK")
    inception = ["--inception", weights, "--features", "inception"]
    for samples, reference, words in (
        ("no.npz", "good.npz", "no.npz does not exist"),
        ("good.npz", "no", "no does not exist"),
        ("float.npz", "good.npz", "arr_0 is float64"),
        ("fortran.npz", "good.npz", "C order"),
        ("objects.npz", "good.npz", "arr_0 is object"),
        ("cut.npz", "good.npz", "cut.npz: its array mu cannot be read"),
        ("cut.zip", "good.npz", "cut.zip is not a whole zip file"),
        ("one.npz", "good.npz", "1 images are too few"),
        ("mixed", "good.npz", "1.png in"),
        ("text", "good.npz", "0.png in"),
        ("empty", "good.npz", "empty holds no images"),
        ("good.npz", "small.npz", "bring both to one size"),
        ("good.npz", "wide.npz", "bring both to one size"),
        ("28x28.npz", "28x40.npz", "bring both to one size"),
        ("28x40.npz", "28x28.npz", "bring both to one size"),
    ):
        sentence = run(tmp_path / samples, tmp_path / reference, *inception)[0]
        assert words in sentence, (samples, reference, sentence)
        assert "\n" not in sentence
    for name in ("labels.npz", "halves.npz"):
        assert "arr_1" in run(tmp_path / name, tmp_path / "28x28.npz")[0]


def npy_header(shape, dtype="'|u1'"):
    """The bytes before the array in an .npy file of format 1.0"""
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "array",
    [
        npy_header("(4, 28, 28, 3)") + bytes(100),  # too short
        npy_header("(99999999999, 28, 28, 3)") + bytes(4 * 28 * 28 * 3),
        npy_header("(-4, 28, -28, 3)") + bytes(4 * 28 * 28 * 3),
        npy_header("(4, 28, 28, 3)", "'|O'") + bytes(4 * 28 * 28 * 3 * 8),  # pointers
        npy_header("(4, 28, 28, 3) + exit()"),
        b"\x93NUMPY\x09\x09" + bytes(20),
        b"\x93NUMPY",
        b"",
        b"text",
    ],
)
@pytest.mark.parametrize("name", ["arr_0", "mu", "arr_1"])
def test_crafted_arrays(run, sides, tmp_path, array, name):
    path = tmp_path / "crafted.npz"
    with np.load(sides / "a.npz") as npz:
        np.savez(path, **{other: npz[other] for other in npz if other != name}, sigma=np.eye(3))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{name}.npy", array)
    # Statistics of the samples do not count beside their images, so mu is put on the other side.
    sentence = run(sides / "a.npz", path)[0] if name == "mu" else run(path, sides / "a.npz")[0]
    assert "crafted.npz" in sentence
    assert "\n" not in sentence


def test_damaged_bytes(run, sides, tmp_path):
    for name in ("a.npz", "a_small.npz"):
        content = bytearray((sides / name).read_bytes())
        content[len(content) // 3] ^= 255
        (tmp_path / name).write_bytes(content)
        assert "arr_0, cannot be read" in run(tmp_path / name, sides / "b.npz")[0]


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_no_file_can_run_code(run, sides, tmp_path):
    payload = np.array([Payload(tmp_path / "made")])
    np.savez(tmp_path / "mu.npz", mu=payload, sigma=np.eye(3))
    assert "array mu cannot be read" in run(sides / "a.npz", tmp_path / "mu.npz")[0]
    torch.save(Payload(tmp_path / "made"), tmp_path / "code.pth")
    with pytest.raises(fid.InputError, match="code.pth cannot be loaded"):
        fid.Inception(tmp_path / "code.pth")
    assert not (tmp_path / "made").exists()


def test_bad_statistics(run, sides, tmp_path):
    good = {"mu": np.zeros(128), "sigma": np.eye(128)}
    not_finite = np.eye(128)
    not_finite[3, 4] = np.nan
    for changed, words in (
        ({"sigma": np.ones(128)}, "a covariance (d, d)"),
        ({"sigma": np.eye(128)[:100]}, "a covariance (d, d)"),
        ({"mu": np.zeros((1, 128))}, "a covariance (d, d)"),
        ({"mu": np.array(0.0)}, "a covariance (d, d)"),
        ({"mu": np.full(128, np.inf)}, "not finite"),
        ({"sigma": not_finite}, "not finite"),
        ({"mu": np.full(128, "zero")}, "its array mu cannot be read"),
        ({"mu": np.full(128, None)}, "its array mu cannot be read"),
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, "the reference has statistics of 5 features"),
    ):
        path = tmp_path / "statistics.npz"
        np.savez(path, **{**good, **changed})
        sentence = run(sides / "a.npz", path)[0]
        assert words in sentence, (list(changed), sentence)
        assert "\n" not in sentence
    np.savez(tmp_path / "good.npz", **good)
    assert "of 128 features" in run(path, tmp_path / "good.npz")[0]  # here, both sides are stored


def test_scores_that_are_not_finite_are_not_printed(capsys):
    with pytest.raises(fid.InputError, match="fid is nan"):
        fid.print_result({"samples": "x", "fid": float("nan")}, as_json=True)
    moments = fid.Moments()
    moments.add(torch.tensor([[1.0, 2.0], [float("nan"), 2.0]]))
    with pytest.raises(fid.InputError, match="not finite"):
        moments.result()
    assert capsys.readouterr().out == ""


def test_bad_weights_and_notes(run, tmp_path):
    images = np.zeros((2, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "good.npz", images)
    (tmp_path / "lossy").mkdir()
    Image.fromarray(images[0]).save(tmp_path / "lossy" / "0.jpg")
    Image.fromarray(images[0]).save(tmp_path / "lossy" / "1.jpg")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    for name in ("empty.pth", "other.pth", "none.pth"):
        sentence, _, err = run(
            tmp_path / "lossy", tmp_path / "good.npz", "--inception", tmp_path / name
        )
        assert f"{name} cannot be loaded" in sentence
        assert f"{fid.WEIGHTS_FILE} as --inception" in sentence
        assert "\n" not in sentence
        assert "JPEG" in err
    sentence = run(tmp_path / "good.npz", tmp_path / "good.npz", "--features", "fashion")[0]
    assert "is for 28 x 28 images" in sentence


def test_bad_flags(run, capsys):
    for flags, words in (
        (["--batch_size", "0"], "--batch_size"),
        (["--batch_size", "-3"], "--batch_size"),
        (["--batch_size", "nan"], "--batch_size"),
        (["--device", "foo"], "--device"),
        (["--ssim"], "--tokenizer"),
        (["samples.npz", "--tokenizer", "x"], "--data"),
        (["--paired"], "--paired"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(*flags)
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert "--device cuda is not available" in run("--device", "cuda")[0]


def test_an_error_is_one_sentence_and_exit_code_1():
    command = [sys.executable, ROOT / "fid.py", "nothing.npz"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("nothing.npz does not exist")
    assert len(result.stderr.splitlines()) == 1


def test_stands_alone(sides, tmp_path):
    """A copy of fid.py reads images, and says what it needs for the rest."""
    (tmp_path / "fid.py").write_text((ROOT / "fid.py").read_text())
    command = [sys.executable, tmp_path / "fid.py", sides / "a.npz", sides / "b.npz"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("--features fashion needs the folder data")


def compare_with_sqrtm():
    a = moments_of(random_features(4000, 2048, seed=0))
    b = moments_of(random_features(4000, 2048, seed=1))
    start = time.perf_counter()
    ours = fid.frechet_distance(*a, *b)
    middle = time.perf_counter()
    theirs = distance_by_sqrtm(*a, *b)
    end = time.perf_counter()
    print(f"FID of 2048 dims: {middle - start:.1f} s; with scipy's sqrtm {end - middle:.1f} s")
    print(f"relative difference {ours / theirs - 1:.1e}")


if __name__ == "__main__":
    compare_with_sqrtm()
