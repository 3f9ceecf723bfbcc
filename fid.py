"""FID, sFID, Inception Score, precision and recall, as ADM's TensorFlow evaluator computes them.

    python fid.py                    # out/samples.npz against the model's training images
    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz       # gFID as papers report it
    python fid.py --tokenizer out/tokenizer.safetensors             # rFID and PSNR

Samples and reference are each an .npz (uint8 images in arr_0), a folder, a zip or a path into a
zip. A reference .npz may also store statistics of its images (mu and sigma for FID, mu_s and
sigma_s for sFID). Then FID and sFID are computed from these, and the images serve only precision
and recall.
"""

import argparse
import contextlib
import functools
import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from torch import nn
from tqdm import tqdm

from pretokenize import (BUNDLED, Images, center_crop, load_batches, psnr, to_float, to_uint8,
                         visited_images)
from tokenizer import Tokenizer, check_flags, read_safetensors, setup

WEIGHTS_FILE = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS_FILE}"


def image_batches(path, batch_size, size=None, crop=False):
    """Images of an .npz, a folder or a zip -> (H, W), iterator of uint8 (B, H, W, 3). All have one
    size, `size` (H, W) where it is given; `crop` makes image files ADM's centre crops."""

    def check(shape, name, count=4):
        if count < 4:  # precision and recall look at three neighbours
            raise SystemExit(f"{path} holds {count} images, and a score needs thousands")
        if tuple(shape) != tuple(size or shape):
            raise SystemExit(f"{name} is {shape[1]} x {shape[0]} and not {size[1]} x {size[0]}: "
                             "--crop brings a reference to the samples' size")

    if str(path).endswith(".npz"):
        array = open_npz(path).get("arr_0")
        if array is None or array.dtype != np.uint8 or array.shape[3:] != (3,):
            raise SystemExit(f"{path}: arr_0 should be images as uint8 of shape (N, H, W, 3)")
        check(array.shape[1:3], path, len(array))
        return array.shape[1:3], torch.from_numpy(array).split(batch_size)

    images = Images(path)
    size = size or images.open(0).size[::-1]
    check(size, path, len(images))

    def load(index):
        image = images.open(index)
        pixels = center_crop(image, size[0]) if crop else np.asarray(image)
        check(pixels.shape[:2], images.names[index])
        return pixels

    # In random order: a split of the Inception Score should hold all classes
    order = torch.tensor(visited_images(0, 0, len(images), len(images)))
    return size, load_batches(load, order.split(batch_size), min(8, os.cpu_count()))


@functools.cache
def open_npz(path):
    """{name: array} of an .npz; an empty dict for anything else."""
    if not str(path).endswith(".npz"):
        return {}
    if not Path(path).is_file():
        raise SystemExit(f"{path} does not exist; sample.py makes samples.npz")
    try:
        return dict(np.load(path))
    except Exception as error:  # numpy and zipfile raise half a dozen kinds
        raise SystemExit(f"{path} is not a whole .npz file of plain arrays: {error}") from None


class Inception(nn.Module):
    """TensorFlow's Inception of 2015-12-05, in torch-fidelity's port with its TF1 resize to 299.
    `weights` is torch-fidelity's file; without one it is downloaded. What is read from the network:
    https://github.com/openai/guided-diffusion/tree/main/evaluations"""

    widths = {"pool": 2048, "spatial": 2023}

    def __init__(self, weights=None):
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            if weights is None:  # checked against the hash in its name, renamed when complete
                with contextlib.redirect_stdout(sys.stderr):  # it prints where it loads from
                    torch.hub.load_state_dict_from_url(WEIGHTS_URL, check_hash=True,
                                                       weights_only=True)
                weights = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_FILE
            # torch-fidelity unpickles without a check; this line refuses a file that holds code.
            torch.load(weights, weights_only=True, map_location="cpu")
            outputs = ["2048", "logits_unbiased"]
            self.net = FeatureExtractorInceptionV3("inception", outputs, str(weights))
        except Exception as error:  # no network, no such file, a file cut off, other weights
            reason = str(error).partition("\n")[0]
            raise SystemExit(f"the weights of Inception cannot be loaded ({reason}): fetch "
                             f"{WEIGHTS_URL} and give it as --inception FILE") from None
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


def feature_network(size, inception, device):
    """The name of the network for images of size (H, W), and itself: Inception, or for 28 x 28
    without a file `inception` of weights a classifier of Fashion-MNIST, which needs no download
    and gives the same dict without "spatial"."""
    if inception is not None or tuple(size) != (28, 28):
        return "inception", Inception(inception).to(device)
    from data.fashion_mnist_features import FashionClassifier

    return "fashion", FashionClassifier.load().to(device)


def inception_score(p, split=5000):
    """Mean over splits of consecutive images of exp(mean KL(p(y|x) || p(y))); p (N, classes)."""
    scores = []
    for part in p.double().split(split):
        p_y = part.mean(0)  # (classes,)
        kl = torch.special.entr(p_y).sum() - torch.special.entr(part).sum(1).mean()
        scores.append(kl.exp())
    return torch.stack(scores).mean().item()


@torch.no_grad()
def extract(network, batches, device):
    """Runs batches of images uint8 (B, H, W, 3) through a network of `feature_network` -> "pool"
    and, from Inception, "spatial": (mu, sigma); "inception_score"; "features": (N, d) float32."""
    outputs = defaultdict(list)
    bar = tqdm(unit=" images")
    for images in batches:
        for name, rows in network(images.to(device)).items():
            outputs[name].append(rows.float().cpu())
        bar.update(len(images))
    bar.close()
    outputs = {name: torch.cat(rows) for name, rows in outputs.items()}
    score = inception_score(outputs.pop("probabilities"))
    result = {"inception_score": score, "features": outputs["pool"]}
    for name, x in outputs.items():  # (N, d)
        x = x.double()
        result[name] = (x.mean(0).numpy(), x.T.cov().numpy())
    return result


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of means (d,) and covariances (d, d). S1 S2 has
    the eigenvalues of the symmetric R S2 R, R = S1^(1/2); so they are real and found safely
    whatever the rank, and the trace of the root is the sum of their roots."""
    values, vectors = scipy.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    trace = np.sqrt(scipy.linalg.eigvalsh(root @ sigma2 @ root).clip(0)).sum()
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace
    return max(float(distance), 0.0)


def precision_recall(samples, reference):
    """Improved precision and recall (https://arxiv.org/abs/1904.06991) of features (n, d), (m, d).
    A point lies in the manifold of a set if it is no further from some point of the set than that
    point's third nearest neighbour in the set is. Precision is the share of samples in the
    manifold of the reference, recall the share of reference images in that of the samples."""
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    return calculate_precision_recall_part(samples, reference, batch_size=1000)


def reconstructions(tokenizer, batches, device, psnrs):
    """What a tokenizer makes of batches of uint8 images (B, H, W, 3); their PSNR goes to psnrs."""
    for originals in batches:
        x = to_float(originals.to(device))  # (B, 3, H, W)
        images = to_uint8(tokenizer.decode(tokenizer.encode(x)))  # (B, H, W, 3)
        psnrs.append(psnr(images, originals))
        yield images


def default_images(codes_path, size, split):
    """The images that were tokenized into a file, else the bundled ones for 28 x 28."""
    if codes_path.exists():
        return read_safetensors(codes_path, "codes")[1]["data"]
    if tuple(size) != (28, 28):
        raise SystemExit(f"images to compare with are needed: no {codes_path} names them")
    return str(BUNDLED / split)


def parse_args():
    parser = argparse.ArgumentParser(description="Score samples or reconstructions.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("samples", nargs="?", help="npz, folder or zip of images; else samples.npz in --out")
    flag("reference", nargs="?", help="npz, folder or zip; else the tokenized or bundled images")
    flag("--crop", action="store_true", help="centre-crop the reference to the samples' size")
    flag("--tokenizer", metavar="FILE", help="score its reconstructions of the first argument, or "
         "of the held-out images that codes_val.safetensors beside it was made of")
    flag("--inception", metavar="FILE", help="weights; else downloaded, but for 28 x 28")
    flag("--batch_size", type=int, default=100, help="images per forward")
    flag("--out", default="out", help="folder where samples.npz is looked for")
    flag("--device", default="auto", help="cuda, mps or cpu; auto is the best of them")
    args = parser.parse_args()
    check_flags(parser, args, "batch_size")
    if args.tokenizer and args.reference:
        parser.error("--tokenizer compares with the originals: give one set of images")
    return args


@torch.no_grad()
def main():
    args = parse_args()
    _, _, device, _ = setup(args.device)
    torch.backends.cudnn.allow_tf32 = False  # TF32 would change the scores

    # Samples, or reconstructions, and the reference
    if args.tokenizer:
        tokenizer = Tokenizer.load(args.tokenizer).to(device)
        size = (tokenizer.config.image_size, tokenizer.config.image_size)
        codes_path = Path(args.tokenizer).with_name("codes_val.safetensors")
        reference = args.samples or default_images(codes_path, size, "val")
        _, originals = image_batches(reference, args.batch_size, size, crop=True)
        psnrs = []
        batches = reconstructions(tokenizer, originals, device, psnrs)
        result = {"samples": f"reconstructions by {args.tokenizer}"}
    else:
        path = args.samples or str(Path(args.out) / "samples.npz")
        size, batches = image_batches(path, args.batch_size)
        labels = open_npz(path).get("arr_1", np.zeros(1))
        if len(labels) > 5000 and labels[0] < labels[-1] and (np.sort(labels) == labels).all():
            print(f"note: {path} is sorted by class, so a split of the Inception Score holds few "
                  "classes, which lowers it: shuffle the samples", file=sys.stderr)
        codes_path = Path(path).with_name("codes.safetensors")
        reference = args.reference or default_images(codes_path, size, "train")
        result = {"samples": path}
    name, network = feature_network(size, args.inception, device)
    result |= {"reference": reference, "features": name}

    # Statistics that the reference stores, which take precedence over its images
    stored = open_npz(reference)
    statistics = {}
    for feature, mu, sigma in (("pool", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
        if mu in stored:
            statistics[feature] = (stored[mu], stored[sigma])
            width = network.widths.get(feature)
            if stored[mu].shape != (width,):
                raise SystemExit(f"{reference}: {mu} is not of {width} features of {name}")

    # Features
    against = statistics
    if not statistics or "arr_0" in stored:
        crop = args.crop or args.reference is None
        _, originals = image_batches(reference, args.batch_size, size, crop)
        against = extract(network, originals, device) | statistics
    samples = extract(network, batches, device)
    result["count"] = len(samples["features"])

    # Scores
    result["rfid" if args.tokenizer else "fid"] = frechet_distance(*samples["pool"],
                                                                   *against["pool"])
    if "spatial" in samples and "spatial" in against:
        result["sfid"] = frechet_distance(*samples["spatial"], *against["spatial"])
    result["inception_score"] = samples["inception_score"]
    if "features" in against:
        result["precision"], result["recall"] = precision_recall(
            samples["features"].to(device), against["features"].to(device))
    if args.tokenizer:
        result["psnr"] = torch.cat(psnrs).double().mean().item()

    print(json.dumps(result, indent=1))
    if result["count"] < 10000:
        print("note: scores of few images are biased: compare at equal counts", file=sys.stderr)


if __name__ == "__main__":
    main()
