"""FID, sFID, Inception Score, precision and recall of images against images (ADM's protocol), and rFID and PSNR.

    python fid.py                                           # out/samples.npz against the embedded training images
    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz    # gFID as the papers report it
    python fid.py --tokenizer out/tokenizer.safetensors --data data/fashion_mnist.zip/val    # rFID, PSNR

Either side is an .npz (images in arr_0, or stored statistics mu, sigma), a folder, a zip or a path into a zip. The
features are those of the Inception network of 2015-12-05, or, for 28 x 28 images, of a small Fashion-MNIST classifier.
Everything but --tokenizer stands alone: copy this file wherever you need it.
"""
import argparse
import io
import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

DATA = Path(__file__).parent / "data"


class BadInput(ValueError):
    """What the user gave cannot be used; the message is one sentence."""


class FashionClassifier(nn.Module):
    """A small CNN for 28 x 28 Fashion-MNIST; its 128 pooled features serve as an offline, in-domain Inception.

    forward: uint8 (B, 28, 28, 3) -> {"pool": (B, 128), "probabilities": (B, 10)}
    """

    image_size = 28

    def __init__(self):
        super().__init__()
        layers, channels = [], 1
        for width, stride in ((32, 1), (64, 2), (64, 1), (128, 2), (128, 1)):
            layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.net, self.head = nn.Sequential(*layers), nn.Linear(channels, 10)

    def forward(self, images):
        x = images.float().mean(-1)[:, None] / 127.5 - 1  # (B, 1, 28, 28)
        pool = self.net(x).mean((2, 3))  # (B, 128)
        return {"pool": pool, "probabilities": self.head(pool).softmax(-1)}

    @classmethod
    def load(cls, path=DATA / "fashion_mnist_features.safetensors"):
        import safetensors.torch
        model = cls()
        model.load_state_dict(safetensors.torch.load_file(path))
        return model.eval()


class Inception(nn.Module):
    """torch-fidelity's port of the TensorFlow Inception of 2015-12-05, with its TF1 resize and (x - 128) / 128.

    forward: uint8 (B, H, W, 3) -> {"pool": (B, 2048), "spatial": (B, 2023), "probabilities": (B, 1008)}
    """

    def __init__(self, weights=None):
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        try:
            self.net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"],
                                                   feature_extractor_weights_path=weights)
        except Exception as error:
            raise BadInput(f"the Inception weights {weights or '(download)'} cannot be loaded: {error}; give torch-fidelity's "
                           "file pt_inception-2015-12-05-6726825d.pth as --inception FILE") from None
        # sFID reads the first 7 channels of the ReLU output of Mixed_6d.branch1x1.
        self.net.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, output: setattr(self, "mixed", output))
        self.eval()

    def forward(self, images):
        pool, logits = self.net(images.permute(0, 3, 1, 2))
        spatial = self.mixed[:, :7].permute(0, 2, 3, 1).flatten(1)  # flat as (row, column, channel), as TensorFlow does
        return {"pool": pool, "spatial": spatial, "probabilities": logits.softmax(-1)}


def read_images(path, batch_size):
    """Yields uint8 arrays (<= batch_size, H, W, 3) of an npz's arr_0, a folder, a zip or a path into a zip."""
    path = Path(path)
    archive = next((p for p in (path, *path.parents) if p.suffix.lower() == ".zip" and p.is_file()), None)
    if path.suffix == ".npz" and path.is_file():
        images = np.load(path)["arr_0"]
        if images.dtype != np.uint8 or images.ndim != 4:
            raise BadInput(f"{path}: arr_0 is {images.dtype} {images.shape}; uint8 images (N, H, W, 3) are needed")
        for i in range(0, len(images), batch_size):
            yield images[i:i + batch_size]
        return
    if archive:
        opened = zipfile.ZipFile(archive)
        inside = path.relative_to(archive).as_posix()
        names = [n for n in opened.namelist() if inside == "." or n.startswith(inside + "/")]
    elif path.is_dir():
        names = [str(p) for p in path.rglob("*")]
    else:
        raise BadInput(f"{path} does not exist: an .npz, a folder, a zip or a path into a zip is needed")
    names = sorted(n for n in names if n.lower().endswith((".png", ".jpg", ".jpeg", ".webp", ".bmp")))
    if not names:
        raise BadInput(f"{path} holds no images")
    batch = []
    for i, name in enumerate(names):
        try:
            image = Image.open(io.BytesIO(opened.read(name)) if archive else name).convert("RGB")
        except (OSError, SyntaxError, zipfile.BadZipFile) as error:
            raise BadInput(f"{name} in {path} cannot be read as an image: {error}") from None
        batch.append(np.asarray(image))
        if batch[0].shape != batch[-1].shape:
            raise BadInput(f"{name} is {image.width} x {image.height}, the images before it are "
                           f"{batch[0].shape[1]} x {batch[0].shape[0]}")
        if len(batch) == batch_size or i == len(names) - 1:
            yield np.stack(batch)
            batch = []


@torch.no_grad()
def extract(network, batches, device, title):
    """{"pool": (N, d), ...} float32 features of an iterable of uint8 image batches."""
    parts = {}
    for batch in tqdm(batches, desc=title, unit="batch"):
        for name, values in network(torch.from_numpy(np.ascontiguousarray(batch)).to(device)).items():
            parts.setdefault(name, []).append(values.float().cpu().numpy())
    return {name: np.concatenate(values) for name, values in parts.items()}


def statistics(features):
    """Mean (d,) and covariance (d, d) with n - 1, in float64."""
    features = features.astype(np.float64)
    return features.mean(0), np.cov(features, rowvar=False)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)); the root's trace from eigenvalues of S1^(1/2) S2 S1^(1/2)."""
    values, vectors = np.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ sigma2 @ root).clip(0)).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace)


def inception_score(probabilities, split=5000):
    """exp of the mean KL(p(y|x) || p(y)), averaged over splits of 5,000 images."""
    scores = []
    for i in range(0, len(probabilities), split):
        p = probabilities[i:i + split].astype(np.float64)
        kl = p * (np.log(p.clip(1e-30)) - np.log(p.mean(0, keepdims=True).clip(1e-30)))
        scores.append(np.exp(kl.sum(1).mean()))
    return float(np.mean(scores))


def neighbour_radius(features, k=3, block=2048):
    """Squared distance of each feature (N, d) to its k-th nearest neighbour, itself not counted."""
    return torch.cat([torch.cdist(part, features).square().topk(k + 1, largest=False).values[:, -1]
                      for part in features.split(block)])


def coverage(features, reference, radius, block=2048):
    """Share of `features` that lie within the radius of at least one reference feature."""
    inside = [(torch.cdist(part, reference).square() <= radius).any(1) for part in features.split(block)]
    return float(torch.cat(inside).float().mean())


def evaluate(samples, reference, device="cpu"):
    """All measures between two feature dicts of `extract` as a dict. A reference may hold only (mu, sigma) pairs."""
    result = {"fid": frechet_distance(*statistics(samples["pool"]), *reference["statistics"]["pool"])}
    if "spatial" in samples and "spatial" in reference["statistics"]:
        result["sfid"] = frechet_distance(*statistics(samples["spatial"]), *reference["statistics"]["spatial"])
    result["inception_score"] = inception_score(samples["probabilities"])
    if "pool" in reference:
        real = torch.from_numpy(reference["pool"][:10000]).to(device)
        fake = torch.from_numpy(samples["pool"]).to(device)
        result["precision"] = coverage(fake, real, neighbour_radius(real))
        result["recall"] = coverage(real, fake, neighbour_radius(fake))
    return result


def load_reference(path, network, batch_size, device):
    """Features and statistics of the reference; statistics stored in an npz count before those of its images."""
    reference, stored = {}, {}
    if str(path).endswith(".npz") and Path(path).is_file():
        stored = np.load(path)
    if "arr_0" in stored or not stored:
        reference = extract(network, read_images(path, batch_size), device, f"features of {path}")
    names = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
    reference["statistics"] = {name: tuple(stored[key] for key in keys) if keys[0] in stored else statistics(reference[name])
                               for name, keys in names.items() if keys[0] in stored or name in reference}
    return reference


def reconstructions(args, device):
    """Originals, center-cropped, and their reconstructions: two uint8 arrays (N, H, W, 3)."""
    from common import to_float, to_uint8
    from pretokenize import Images
    from tokenizer import Tokenizer
    tokenizer = Tokenizer.load(args.tokenizer).to(device)
    images = Images(args.data, tokenizer.cfg.image_size)
    keys = [(i, i) for i in range(len(images))]
    loader = images.batches([keys[i:i + args.batch_size] for i in range(0, len(keys), args.batch_size)], args.num_workers)
    originals, decoded = [], []
    for batch, _ in tqdm(loader, desc="reconstructing", unit="batch"):
        originals.append(batch[:, 0].permute(0, 2, 3, 1).numpy())
        decoded.append(to_uint8(tokenizer.decode(tokenizer.encode(to_float(batch[:, 0].to(device))))).numpy())
    return np.concatenate(originals), np.concatenate(decoded)


def psnr(a, b):
    """Mean over images of 10 log10(255^2 / MSE), uint8 (N, H, W, 3), in dB."""
    mse = np.square(a.astype(np.float32) - b).mean((1, 2, 3)).clip(1e-10)
    return float((10 * np.log10(255**2 / mse)).mean())


def parse_args():
    parser = argparse.ArgumentParser(description="FID and friends.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("samples", nargs="?", default="out/samples.npz", help="npz, folder or zip of generated images")
    flag("reference", nargs="?", default=str(DATA / "fashion_mnist.zip" / "train"), help="npz, folder or zip to compare with")
    flag("--tokenizer", help="evaluate reconstructions of --data by this tokenizer instead of samples")
    flag("--data", default=str(DATA / "fashion_mnist.zip" / "val"), help="images to reconstruct with --tokenizer")
    flag("--features", default="auto", choices=["auto", "inception", "fashion"], help="auto is fashion for 28 x 28 images")
    flag("--inception", metavar="FILE", help="torch-fidelity's Inception weights, instead of downloading them")
    flag("--json", action="store_true", help="print one JSON line instead of the table")
    flag("--batch_size", type=int, default=100)
    flag("--num_workers", type=int, default=0, help="processes that decode the images of --data")
    flag("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.tokenizer:
        originals, decoded = reconstructions(args, args.device)
        def batches(images): return (images[i:i + args.batch_size] for i in range(0, len(images), args.batch_size))
        size, samples_name, reference_name = originals.shape[1], f"reconstructions by {args.tokenizer}", args.data
    else:
        size = next(read_images(args.samples, 1)).shape[1]
        samples_name, reference_name = args.samples, args.reference
    kind = ("fashion" if size == FashionClassifier.image_size else "inception") if args.features == "auto" else args.features
    if kind == "fashion" and size != FashionClassifier.image_size:
        raise BadInput(f"--features fashion is for 28 x 28 images, these are {size} x {size}; use --features inception")
    network = (FashionClassifier.load() if kind == "fashion" else Inception(args.inception)).to(args.device)
    if args.tokenizer:
        samples = extract(network, batches(decoded), args.device, "features of reconstructions")
        reference = extract(network, batches(originals), args.device, "features of originals")
        reference["statistics"] = {name: statistics(reference[name]) for name in ("pool", "spatial") if name in reference}
    else:
        samples = extract(network, read_images(args.samples, args.batch_size), args.device, f"features of {args.samples}")
        reference = load_reference(args.reference, network, args.batch_size, args.device)
    result = {"samples": samples_name, "reference": reference_name, "features": kind, "count": len(samples["pool"])}
    result |= evaluate(samples, reference, args.device)
    if args.tokenizer:
        result["psnr"] = psnr(originals, decoded)
        result["rfid"] = result.pop("fid")
    elif kind == "fashion" and args.samples.endswith(".npz") and "arr_1" in (stored := np.load(args.samples)):
        result["class_consistency"] = float((samples["probabilities"].argmax(1) == stored["arr_1"]).mean())
    if args.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:18} {value:.4f}" if isinstance(value, float) else f"{name:18} {value}")
    if result["count"] < 10000:
        print("fewer than 10,000 images: these numbers are biased, compare them only at equal counts")


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"{os.path.basename(sys.argv[0])}: {error}")
