"""FID, sFID, Inception Score, precision and recall, as ADM's TensorFlow evaluator computes them.

    python fid.py                    # out/samples.npz against the bundled training images
    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz       # gFID as papers report it
    python fid.py --tokenizer out/tokenizer.safetensors             # rFID and PSNR
    torchrun --nproc_per_node 8 fid.py samples.npz reference.npz    # 8 ranks, the same numbers

Samples and reference are each an .npz (uint8 images in arr_0), a folder, a zip or a path into a
zip. A reference .npz may also store statistics of its images (mu and sigma for FID, mu_s and
sigma_s for sFID). Then FID and sFID are computed from these, and the images serve only precision
and recall. Two .npz files that hold nothing but statistics can be compared as well.

This file stands alone: copy it wherever you need it. Only --tokenizer and the classifier for
28 x 28 images (--features fashion) use other files of this project.

Letters in shapes: N images in all, B of them in a batch, H x W pixels, d features.
"""

import argparse
import atexit
import io
import json
import math
import os
import random
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

DATA = Path(__file__).parent / "data" / "fashion_mnist.zip"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
LOSSY_SUFFIXES = (".jpg", ".jpeg", ".webp")
WEIGHTS_FILE = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS_FILE}"
NUM_REFERENCE = 10000  # so many reference images serve precision and recall, as in ADM's evaluator


class InputError(SystemExit):
    """The user's input cannot be used; the message is one sentence that says why.

    Where nobody catches it, Python prints the sentence on stderr and exits with code 1.
    """


# Ranks: each works on its share of the images, as torchrun started them


def get_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(*tensors):
    """Replaces each tensor by its sum over all ranks."""
    if get_world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def gather_rows(rows):
    """The rows (n, ...) of all ranks, in the order of the ranks, as one array."""
    if get_world_size() == 1:
        return rows.numpy()
    rows_of_ranks = [None] * get_world_size()
    dist.all_gather_object(rows_of_ranks, rows)
    return torch.cat(rows_of_ranks).numpy()


def note(text):
    if get_rank() == 0:
        print(f"note: {text}", file=sys.stderr, flush=True)


# Images


class NpzImages:
    """The images in arr_0 of an .npz. Only those asked for are read: all may be 10 GB.

    Raises InputError if arr_0 is missing, damaged, or not uint8 of shape (N, H, W, 3).
    """

    def __init__(self, path):
        self.path = path
        try:
            archive = zipfile.ZipFile(path)
            self.file = archive.open("arr_0.npy")
            if np.lib.format.read_magic(self.file) == (1, 0):
                header = np.lib.format.read_array_header_1_0(self.file)
            else:
                header = np.lib.format.read_array_header_2_0(self.file)
        except Exception as error:  # zipfile and numpy raise many types
            raise InputError(f"{path}: its images, arr_0, cannot be read: {error}") from None

        self.shape, fortran_order, dtype = header
        if dtype != np.uint8 or len(self.shape) != 4 or self.shape[3] != 3 or fortran_order:
            raise InputError(
                f"{path}: arr_0 is {dtype} of shape {self.shape}, Fortran order {fortran_order}; "
                "images as uint8 from 0 to 255 of shape (N, H, W, 3) in C order are needed"
            )
        self.first_byte = self.file.tell()
        num_bytes = archive.getinfo("arr_0.npy").file_size - self.first_byte
        if min(self.shape) < 1 or math.prod(self.shape) != num_bytes:
            raise InputError(f"{path}: arr_0 of shape {self.shape} cannot have {num_bytes} bytes")

    def read(self, start, stop):
        """Images start to stop - 1 as uint8 (stop - start, H, W, 3)."""
        image_bytes = math.prod(self.shape[1:])
        try:
            self.file.seek(self.first_byte + start * image_bytes)
            data = self.file.read((stop - start) * image_bytes)
            images = np.frombuffer(data, np.uint8).reshape(stop - start, *self.shape[1:])
        except Exception as error:  # damaged bytes: zipfile and zlib raise many types
            raise InputError(f"{self.path}: its images, arr_0, cannot be read: {error}") from None
        return images.copy()  # writable, as torch.from_numpy wants it


class ImageSource:
    """The images of an .npz, a folder, a zip or a path into a zip, all of `size` (H, W).

    source[i:j] is uint8 (j - i, H, W, 3). With `crop`, image files of any size become ADM's centre
    crop of crop x crop pixels. Raises InputError if there are no images, one cannot be read, or
    one differs in size from the first.
    """

    def __init__(self, path, crop=None):
        self.path = Path(path)
        self.crop = crop
        self.npz = None
        self.zip = None  # the open zip, if the image files are in one; any thread may read it
        self.names = []  # of the image files
        if is_npz(path):
            self.npz = NpzImages(path)
            self.size = self.npz.shape[1:3]
            if crop and self.size != (crop, crop):
                raise InputError(f"{path} holds images of size {self.size}, not {crop} x {crop}")
            return
        names = [name for name in self.list_files() if not name.startswith("__MACOSX")]
        self.names = sorted(name for name in names if name.lower().endswith(IMAGE_SUFFIXES))
        if not self.names:
            raise InputError(f"{path} holds no images")
        # Class folders in order would put few classes into each split of the Inception Score, and
        # into the first images, which serve precision and recall.
        random.Random(0).shuffle(self.names)
        self.size = self.read_file(self.names[0]).shape[:2]

    def list_files(self):
        """Names of all files in the folder, or in the zip, which is opened."""
        if self.path.is_dir():
            return [os.path.join(folder, name)
                    for folder, _, files in os.walk(self.path, followlinks=True)
                    for name in files]
        candidates = [self.path, *self.path.parents]
        zips = [path for path in candidates if path.suffix.lower() == ".zip" and path.is_file()]
        if not zips:
            raise InputError(f"{self.path} does not exist or is no .npz, folder or path into a zip")
        try:
            self.zip = zipfile.ZipFile(zips[0])
        except Exception as error:
            raise InputError(f"{zips[0]} is not a whole zip file: {error}") from None
        names = self.zip.namelist()
        if self.path == zips[0]:
            return names
        folder = self.path.relative_to(zips[0]).as_posix() + "/"
        return [name for name in names if name.startswith(folder)]

    def read_file(self, name):
        """One image file as uint8 (H, W, 3)."""
        try:
            file = io.BytesIO(self.zip.read(name)) if self.zip else name
            with Image.open(file) as image:
                if image.mode.startswith("I"):  # 16 bits of grey, which PIL would clip, not scale
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                image = image.convert("RGB")
        except Exception as error:  # PIL, zipfile and zlib raise many types
            raise InputError(f"{name} in {self.path} is no readable image: {error}") from None
        if not self.crop:
            return np.asarray(image)
        from pretokenize import center_crop

        return center_crop(image, self.crop)

    def __len__(self):
        return self.npz.shape[0] if self.npz else len(self.names)

    def __getitem__(self, rows):
        start, stop, _ = rows.indices(len(self))
        if self.npz:
            return self.npz.read(start, stop)
        names = self.names[start:stop]
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(self.read_file, names))
        for name, image in zip(names, images):
            if image.shape[:2] != self.size:
                raise InputError(
                    f"{name} in {self.path} has (height, width) {image.shape[:2]}, "
                    f"the first image there {self.size}; all must have one size"
                )
        return np.stack(images)


def is_npz(path):
    return str(path).endswith(".npz") and Path(path).is_file()


# Networks whose features are compared


class Inception(nn.Module):
    """TensorFlow's Inception of 2015-12-05, in torch-fidelity's port with its TF1 resize to 299.

    `weights` is torch-fidelity's file; without one it is downloaded. Raises InputError if it
    cannot be had. Sources: https://github.com/toshas/torch-fidelity and, for what is read from the
    network, https://github.com/openai/guided-diffusion/tree/main/evaluations
    """

    def __init__(self, weights=None):
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

            if weights is None:  # checked against the hash in its name, renamed when complete
                torch.hub.load_state_dict_from_url(
                    WEIGHTS_URL, check_hash=True, weights_only=True, map_location="cpu"
                )
                weights = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_FILE
            # torch-fidelity unpickles without a check; this line refuses a file that holds code.
            torch.load(weights, weights_only=True, map_location="cpu")
            outputs = ["2048", "logits_unbiased"]
            self.net = FeatureExtractorInceptionV3("inception", outputs, str(weights))
        except Exception as error:  # no package, no network, no such file, other weights, ...
            reason = str(error).partition("\n")[0]
            raise InputError(
                f"the Inception weights {weights or WEIGHTS_URL} cannot be loaded ({reason}); "
                f"install torch-fidelity and give its file {WEIGHTS_FILE} as --inception FILE"
            ) from None
        self.net.Mixed_6d.branch1x1.register_forward_hook(self.keep_mixed)
        self.eval()

    def keep_mixed(self, module, inputs, output):
        self.mixed = output  # (B, 192, 17, 17), after its ReLU

    def forward(self, images):
        """uint8 (B, H, W, 3) -> "pool" (B, 2048), "spatial" (B, 2023), "probabilities" (B, 1008)"""
        pool, logits = self.net(images.permute(0, 3, 1, 2))  # takes (B, 3, H, W)
        # sFID reads the first 7 channels, flat in TensorFlow's order (row, column, channel). In
        # another order they would not fit a stored mu_s.
        spatial = self.mixed[:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, 17 * 17 * 7)
        # The logits are pool @ W.T without a bias, as in ADM's evaluator.
        return {"pool": pool, "spatial": spatial, "probabilities": logits.softmax(-1)}


def feature_network(name, size, inception, device):
    """The network `name` for images of `size`: (H, W), or one number if they are square.

    name: "inception", "fashion" (a classifier for 28 x 28 Fashion-MNIST, which needs no download),
    or "auto", which is "fashion" for 28 x 28. inception: file of its weights, or None.
    Returns the name and the network, which maps uint8 (B, H, W, 3) to a dict as Inception does
    ("spatial" may be missing). Raises InputError.
    """
    is_28 = size in (28, (28, 28))
    if name == "auto":
        name = "fashion" if is_28 else "inception"
    if name == "inception":
        return name, Inception(inception).to(device)
    if not is_28:
        raise InputError("--features fashion is for 28 x 28 images only, use --features inception")
    try:
        from data.fashion_mnist_features import FashionClassifier
    except ImportError as error:  # fid.py was copied elsewhere
        raise InputError(f"--features fashion needs the folder data: {error}") from None
    return name, FashionClassifier.load().to(device)


# Statistics of features


class Moments:
    """Mean and covariance of feature rows that come in batches, summed in float64."""

    def __init__(self):
        self.count = torch.zeros((), dtype=torch.float64)
        self.sum = 0  # (d,) after the first batch
        self.outer = 0  # (d, d), sum of the outer products x x^T

    def add(self, x):
        """x (B, d)"""
        x = x.cpu().double()
        self.count += len(x)
        self.sum += x.sum(0)
        self.outer += x.T @ x

    def result(self):
        """mu (d,) and sigma (d, d) as float64 arrays. Raises InputError if they are not finite."""
        mu = self.sum / self.count
        sigma = (self.outer - self.count * torch.outer(mu, mu)) / (self.count - 1)
        if not (mu.isfinite().all() and sigma.isfinite().all()):
            raise InputError("the features are not finite: the network's weights must be damaged")
        return mu.numpy(), sigma.numpy()


class ScoreSums:
    """What the Inception Score needs of p(y|x): sums over splits of 5,000 consecutive images."""

    def __init__(self, num_images, num_classes, split=5000):
        self.split = split
        # Columns: sum of p for each class, sum of p log p over all classes, number of images
        shape = (math.ceil(num_images / split), num_classes + 2)
        self.sums = torch.zeros(shape, dtype=torch.float64)

    def add(self, p, first):
        """p (B, classes) of the images first, first + 1, ..."""
        p = p.cpu().double()
        split = torch.arange(first, first + len(p)) // self.split  # (B,)
        p_log_p = torch.special.xlogy(p, p).sum(1, keepdim=True)  # (B, 1)
        self.sums.index_add_(0, split, torch.cat([p, p_log_p, torch.ones_like(p_log_p)], 1))

    def result(self):
        """Mean over the splits of exp(mean KL(p(y|x) || p(y)))."""
        means = self.sums / self.sums[:, -1:]
        p_y = means[:, :-2]  # (splits, classes)
        kl = means[:, -2] - torch.special.xlogy(p_y, p_y).sum(1)  # (splits,)
        return kl.exp().mean().item()


@torch.no_grad()
def extract(network, source, device, batch_size, title, keep=0):
    """Runs all images through a network of `feature_network`; each rank takes its share.

    source: anything with a length whose source[i:j] is uint8 (j - i, H, W, 3).
    Returns "pool" and, from Inception, "spatial": (mu, sigma); "inception_score"; "features": pool
    (keep, d) float32 of the first `keep` images; "predicted": likeliest class of each image (N,).
    Raises InputError if there are too few images or features are not finite.
    """
    rank = get_rank()
    world_size = get_world_size()
    if len(source) < max(2, world_size):
        raise InputError(f"{title}: {len(source)} images are too few; there must be at least 2, "
                         "and one for each rank")
    start = rank * len(source) // world_size
    stop = (rank + 1) * len(source) // world_size
    moments = {}
    score = None
    features = []
    predicted = []
    for i in tqdm(range(start, stop, batch_size), desc=title, unit="batch", disable=rank > 0):
        images = torch.from_numpy(source[i : min(i + batch_size, stop)])  # (B, H, W, 3)
        # Without TF32, which would make the numbers depend on the type of GPU
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            output = network(images.to(device))
        probabilities = output["probabilities"]  # (B, classes)
        if score is None:
            score = ScoreSums(len(source), probabilities.shape[1])
            moments = {name: Moments() for name in ("pool", "spatial") if name in output}
        score.add(probabilities, i)
        for name in moments:
            moments[name].add(output[name])
        features.append(output["pool"][: max(keep - i, 0)].float().cpu())  # (B or less, d)
        predicted.append(probabilities.argmax(1).cpu())  # (B,)

    sum_over_ranks(score.sums)
    result = {"inception_score": score.result()}
    for name in moments:
        sum_over_ranks(moments[name].count, moments[name].sum, moments[name].outer)
        result[name] = moments[name].result()
    result["features"] = gather_rows(torch.cat(features))
    result["predicted"] = gather_rows(torch.cat(predicted))
    return result


# Small arrays of an .npz: statistics and labels


def read_array(path, name, dtype):
    """A small array of an .npz, or None if there is none. Raises InputError."""
    if not is_npz(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as npz:
            if name not in npz:
                return None
            return npz[name].astype(dtype, casting="same_kind")
    except Exception as error:  # numpy, zipfile and zlib raise many types
        raise InputError(f"{path}: its array {name} cannot be read: {error}") from None


def stored_statistics(path):
    """The statistics that an .npz stores: (mu, sigma) as "pool", (mu_s, sigma_s) as "spatial".

    Raises InputError if they are not a finite vector (d,) and a finite matrix (d, d).
    """
    result = {}
    for feature, mu_name, sigma_name in (("pool", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
        mu = read_array(path, mu_name, np.float64)
        sigma = read_array(path, sigma_name, np.float64)
        if mu is None or sigma is None:
            continue
        if mu.ndim != 1 or sigma.shape != mu.shape * 2:
            raise InputError(
                f"{path}: {mu_name} and {sigma_name} have shapes {mu.shape} and {sigma.shape}; "
                "a mean (d,) and a covariance (d, d) are needed"
            )
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise InputError(f"{path}: {mu_name} or {sigma_name} holds values that are not finite")
        result[feature] = (mu, sigma)
    return result


def read_labels(path, n):
    """The class labels (n,) in arr_1 of an .npz, or None. Raises InputError."""
    labels = read_array(path, "arr_1", np.int64)
    if labels is not None and labels.shape != (n,):
        raise InputError(f"{path}: arr_1 has shape {labels.shape}, not ({n},): a label an image")
    return labels


def has_images(path):
    """Whether an .npz holds more than statistics."""
    with zipfile.ZipFile(path) as npz:
        return "arr_0.npy" in npz.namelist()


def reference_features(path, network, device, batch_size, size):
    """What `extract` returns for a reference, the statistics replaced by those that are stored.

    size: of the images to compare with, (H, W) or one number. An .npz of nothing but statistics
    gives these alone. Raises InputError.
    """
    stored = stored_statistics(path)
    if stored:
        if not has_images(path):
            return stored
        note(f"the statistics stored in {path} count, not those of its images")
    source = ImageSource(path)
    if isinstance(size, int):
        size = (size, size)
    if source.size != size:
        raise InputError(
            f"{path} holds images of (height, width) {source.size}, the samples have {size}; "
            "bring both to one size first"
        )
    title = f"features of {path}"
    result = extract(network, source, device, batch_size, title, keep=NUM_REFERENCE)
    result.update(stored)
    return result


# Scores


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of means (d,) and covariances (d, d).

    S1 S2 has the eigenvalues of the symmetric R S2 R, R = S1^(1/2); so they are real and found
    safely whatever the rank, and the trace of the root is the sum of their roots.
    """
    values, vectors = np.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ sigma2 @ root).clip(0)).sum()
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace
    return float(distance)


def fid_and_sfid(samples, reference, fid_name="fid"):
    """FID and, where both sides have its features, sFID of two results of `extract`.

    Raises InputError if the two sides come from networks with different numbers of features.
    """
    result = {}
    for name, feature in ((fid_name, "pool"), ("sfid", "spatial")):
        if feature in samples and feature in reference:
            mu1, sigma1 = samples[feature]
            mu2, sigma2 = reference[feature]
            if len(mu1) != len(mu2):
                raise InputError(
                    f"the reference has statistics of {len(mu2)} features, the samples of "
                    f"{len(mu1)}; both must come from the same network (--features)"
                )
            result[name] = frechet_distance(mu1, sigma1, mu2, sigma2)
    return result


def squared_distances(a, b, b_squares):
    """(n, d), (m, d), |b|^2 (m,) -> (n, m)"""
    squares = b_squares + a.square().sum(1)[:, None]  # (n, m)
    return torch.addmm(squares, a, b.T, alpha=-2).clamp_min_(0)


def neighbour_distances(points, squares, k, block):
    """Squared distance of each point (n, d) to its k-th nearest neighbour, (n,)."""
    k = min(k + 1, len(points))  # the nearest is the point itself
    result = []
    for rows in points.split(block):
        distances = squared_distances(rows, points, squares)  # (block, n)
        result.append(distances.topk(k, largest=False).values[:, -1])
    return torch.cat(result)


def precision_recall(samples, reference, device="cpu", k=3, block=1000):
    """Improved precision and recall of features (n, d) and (m, d), float32 arrays.

    A point lies in the manifold of a set if it is no further from some point of the set than that
    point's k-th nearest neighbour in the set is. Precision is the share of samples in the
    manifold of the reference, recall the share of reference images in that of the samples.
    Source: https://arxiv.org/abs/1904.06991
    """
    samples = torch.from_numpy(samples).to(device)
    reference = torch.from_numpy(reference).to(device)
    sample_squares = samples.square().sum(1)  # (n,)
    reference_squares = reference.square().sum(1)  # (m,)
    sample_radius = neighbour_distances(samples, sample_squares, k, block)  # (n,)
    reference_radius = neighbour_distances(reference, reference_squares, k, block)  # (m,)
    sample_is_inside = []
    reference_is_inside = torch.zeros(len(reference), dtype=torch.bool, device=device)
    # In blocks of samples: all n x m distances at once would not fit in memory.
    for rows, radius in zip(samples.split(block), sample_radius.split(block)):
        distances = squared_distances(rows, reference, reference_squares)  # (block, m)
        sample_is_inside.append((distances <= reference_radius).any(1))
        reference_is_inside |= (distances <= radius[:, None]).any(0)
    precision = torch.cat(sample_is_inside).float().mean().item()
    recall = reference_is_inside.float().mean().item()
    return precision, recall


def psnr(a, b):
    """10 log10(255^2 / MSE) of each pair of images in dB: (B, 3, H, W) from 0 to 255 -> (B,)."""
    mse = (a - b).square().mean((1, 2, 3))
    return 10 * (255**2 / mse.clamp_min(1e-10)).log10()


def ssim(a, b):
    """SSIM of each pair of images: (B, 3, H, W) from 0 to 255 -> (B,).

    As Wang et al. 2004: a Gaussian window of 11 x 11 with sigma 1.5, for each colour, no padding.
    """
    x = torch.arange(11, dtype=a.dtype, device=a.device) - 5
    gaussian = torch.exp(-x.square() / (2 * 1.5**2))
    window = torch.outer(gaussian, gaussian) / gaussian.sum() ** 2  # (11, 11)

    def blur(images):  # (B, C, H, W) -> (B, C, H - 10, W - 10)
        planes = images.flatten(0, 1)[:, None]  # (B * C, 1, H, W)
        return F.conv2d(planes, window[None, None]).unflatten(0, images.shape[:2])[:, :, 0]

    mean_a = blur(a)
    mean_b = blur(b)
    var_a = blur(a * a) - mean_a**2
    var_b = blur(b * b) - mean_b**2
    cov = blur(a * b) - mean_a * mean_b
    c1 = (0.01 * 255) ** 2
    c2 = (0.03 * 255) ** 2
    numerator = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    denominator = (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return (numerator / denominator).mean((1, 2, 3))


def load_lpips(device):
    """LPIPS (VGG16) as a function like psnr and ssim. Raises InputError if it cannot be loaded."""
    try:
        import lpips

        network = lpips.LPIPS(net="vgg", verbose=False).to(device).eval()
    except Exception as error:  # no package, no network, ...
        raise InputError(f"--lpips needs the package lpips and VGG16 weights: {error}") from None

    def distance(a, b):  # (B, 3, H, W) from 0 to 255 -> (B,); the network takes -1 to 1
        return network(a.to(device) / 127.5 - 1, b.to(device) / 127.5 - 1).flatten().cpu()

    return distance


class Reconstructions:
    """What a tokenizer makes of the images of a source, as a source of its own for `extract`.

    Each batch that is read is also compared with its originals by all `measures`, which are
    functions like psnr under the name to print; `means` returns their means over all images.
    """

    def __init__(self, originals, tokenizer, measures, device):
        self.originals = originals
        self.tokenizer = tokenizer
        self.measures = measures
        self.device = device
        self.sums = torch.zeros(len(measures), dtype=torch.float64)

    def __len__(self):
        return len(self.originals)

    def __getitem__(self, rows):
        from tokenizer import to_float, to_uint8  # here, because all else works without that file

        originals = torch.from_numpy(self.originals[rows]).permute(0, 3, 1, 2)  # (B, 3, H, W)
        codes = self.tokenizer.encode(to_float(originals.to(self.device)))  # (B, K + N)
        images = to_uint8(self.tokenizer.decode(codes))  # (B, H, W, 3)
        a = images.permute(0, 3, 1, 2).float()
        b = originals.float()
        for i, measure in enumerate(self.measures.values()):
            self.sums[i] += measure(a, b).double().sum()
        return images.numpy()

    def means(self):
        sum_over_ranks(self.sums)
        return dict(zip(self.measures, (self.sums / len(self)).tolist()))


# The script


def positive_int(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def parse_args():
    parser = argparse.ArgumentParser(
        description="FID, sFID, Inception Score, precision and recall; rFID and PSNR."
    )
    flag = parser.add_argument
    flag("samples", nargs="?", help="npz, folder or zip of images; by default samples.npz in --out")
    flag("reference", nargs="?", default=str(DATA / "train"),
         help="npz, folder or zip of images; by default the bundled training images")
    flag("--tokenizer", metavar="FILE", help="score its reconstructions of --data instead: rFID, "
         "and PSNR as the mean over images of that of their uint8 pixels")
    flag("--data", default=str(DATA / "val"),
         help="images to reconstruct with --tokenizer; by default the bundled held-out ones")
    flag("--ssim", action="store_true", help="with --tokenizer: add SSIM")
    flag("--lpips", action="store_true", help="with --tokenizer: add LPIPS (VGG16)")
    networks = ["auto", "inception", "fashion"]
    flag("--features", default="auto", choices=networks,
         help="network: auto, the default, is fashion for 28 x 28 images and else inception")
    flag("--inception", metavar="FILE",
         help="file of its weights, torch-fidelity's; by default they are downloaded")
    flag("--batch_size", type=positive_int, default=100,
         help="images per forward of each rank; by default %(default)s")
    flag("--out", default="out", help="folder where samples.npz is looked for; by default out")
    flag("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"],
         help="auto, the default, is what torch finds")
    flag("--json", action="store_true", help="print one JSON line instead of the table")
    args = parser.parse_args()
    if args.tokenizer and args.samples:
        parser.error("--tokenizer is scored against its originals, --data; give no other images")
    if (args.ssim or args.lpips) and not args.tokenizer:
        parser.error("--ssim and --lpips compare pairs of images: give --tokenizer with them")
    if args.samples is None:
        args.samples = f"{args.out}/samples.npz"
    return args


def pick_device(name, local_rank):
    """The device of this rank; ranks take turns on the GPUs. Raises InputError."""
    available = []  # best first
    if torch.cuda.is_available():
        available.append("cuda")
    if torch.backends.mps.is_available():
        available.append("mps")
    available.append("cpu")
    if name == "auto":
        name = available[0]
    if name not in available:
        raise InputError(f"--device {name} is not available here, use {' or '.join(available)}")
    if name == "cuda":
        name = f"cuda:{local_rank % torch.cuda.device_count()}"
    return name


def print_result(result, as_json):
    """Raises InputError instead of printing a score that is not finite."""
    for name, value in result.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{name} is {value}: images, statistics or weights must be damaged")
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        text = f"{value:.4f}" if isinstance(value, float) else value
        print(f"{name:18} {text}")


def main():
    args = parse_args()
    rank = int(os.environ.get("RANK", 0))  # torchrun sets these
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(args.device, int(os.environ.get("LOCAL_RANK", 0)))

    # Two files of statistics: there is nothing to extract
    if not args.tokenizer and stored_statistics(args.samples) and not has_images(args.samples):
        samples = stored_statistics(args.samples)
        scores = fid_and_sfid(samples, stored_statistics(args.reference))
        if not scores:
            raise InputError(f"{args.samples} holds only statistics, and {args.reference} none")
        if rank == 0:
            result = {"samples": args.samples, "reference": args.reference}
            result.update(scores)
            print_result(result, args.json)
        return

    # Images and network
    if world_size > 1:
        dist.init_process_group("gloo")  # what the ranks exchange is on the CPU
        # Also after an error: gloo's threads would sometimes abort a Python that ends before them.
        atexit.register(dist.destroy_process_group)
    if args.tokenizer:
        from tokenizer import Tokenizer

        tokenizer = Tokenizer.load(args.tokenizer).to(device)
        originals = ImageSource(args.data, crop=tokenizer.cfg.image_size)
        measures = {"psnr": psnr}
        if args.ssim:
            measures["ssim"] = ssim
        if args.lpips:
            measures["lpips"] = load_lpips(device)
        source = Reconstructions(originals, tokenizer, measures, device)
        size = originals.size
        result = {"samples": f"reconstructions by {args.tokenizer}", "reference": args.data}
    else:
        source = ImageSource(args.samples)
        size = source.size
        result = {"samples": args.samples, "reference": args.reference}
        if any(name.lower().endswith(LOSSY_SUFFIXES) for name in source.names):
            note(f"{args.samples} holds JPEG or WebP files: compression alone moves FID, use PNG")
    network_name, network = feature_network(args.features, size, args.inception, device)
    result["features"] = network_name
    result["count"] = len(source)

    # Features, the reference first: a mistake in it shows before the long work
    if args.tokenizer:
        title = "features of originals"
        against = extract(network, originals, device, args.batch_size, title, keep=NUM_REFERENCE)
    else:
        against = reference_features(args.reference, network, device, args.batch_size, size)
    title = "features of samples"
    samples = extract(network, source, device, args.batch_size, title, keep=len(source))
    if args.tokenizer:
        pairs = source.means()

    # Rank 0 has all it needs, the other ranks leave
    if world_size > 1:
        dist.barrier()
    if rank > 0:
        return

    # Scores
    name = "rfid" if args.tokenizer else "fid"
    result.update(fid_and_sfid(samples, against, name))
    result["inception_score"] = samples["inception_score"]
    if "features" in against:  # the reference holds images, not only statistics
        precision, recall = precision_recall(samples["features"], against["features"], device)
        result["precision"] = precision
        result["recall"] = recall
    if args.tokenizer:
        result.update(pairs)
    elif network_name == "fashion":
        labels = read_labels(args.samples, len(source))
        if labels is not None:
            result["class_consistency"] = float((samples["predicted"] == labels).mean())
    print_result(result, args.json)

    # How far they can be trusted
    n = len(source)
    d = len(samples["pool"][0])
    if n < 10000:
        note("fewer than 10,000 images: these numbers are biased, compare only at equal counts")
    if n <= d:
        note(f"{n} images for {d} features: the covariance is singular, FID says little")


if __name__ == "__main__":
    main()
