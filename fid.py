"""FID, sFID, Inception Score, precision and recall of images against images, the numbers of ADM's TensorFlow evaluator.

    python fid.py                                                # out/samples.npz against the embedded training images
    python fid.py samples.npz VIRTUAL_imagenet256_labeled.npz    # gFID as papers report it
    python fid.py --tokenizer out/tokenizer.safetensors --data data/fashion_mnist.zip/val    # rFID and PSNR
    torchrun --nproc_per_node 8 fid.py samples.npz reference.npz # any number of ranks, the same numbers

A side is an .npz (images in arr_0, statistics in mu, sigma, mu_s, sigma_s, or both: then the statistics count for FID, the
images for precision and recall), a folder, a zip or a path into a zip. All but --tokenizer and the small Fashion-MNIST
classifier stands alone: copy this file wherever you need it.
"""
import argparse
import hashlib
import io
import json
import os
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

DATA = Path(__file__).parent / "data"
INCEPTION_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class BadInput(ValueError):
    """What the user gave cannot be used; the message is one sentence."""


def note(text):
    if RANK == 0:
        print(f"note: {text}", file=sys.stderr, flush=True)


class Inception(nn.Module):
    """torch-fidelity's port of the TensorFlow Inception of 2015-12-05, with its TF1 resize to 299 and (x - 128) / 128.
    forward: uint8 (B, H, W, 3) -> {"pool": (B, 2048), "spatial": (B, 2023), "probabilities": (B, 1008)}"""

    def __init__(self, weights=None):
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
            if weights is None:  # checked against the hash in its name, renamed only when complete
                torch.hub.load_state_dict_from_url(INCEPTION_URL, check_hash=True, weights_only=True, map_location="cpu")
                weights = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.rpartition("/")[2]
            torch.load(weights, weights_only=True, map_location="cpu")  # torch-fidelity unpickles freely; this refuses code
            self.net = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(weights))
        except Exception as error:
            raise BadInput(f"the Inception weights {weights or 'could not be downloaded and'} cannot be loaded "
                           f"({str(error).splitlines()[0]}); give torch-fidelity's file {INCEPTION_URL.rpartition('/')[2]} "
                           "as --inception FILE") from None
        # sFID reads the first 7 channels of the ReLU output of Mixed_6d.branch1x1.
        self.net.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, output: setattr(self, "mixed", output))
        self.eval()

    def forward(self, images):
        pool, logits = self.net(images.permute(0, 3, 1, 2))
        # Flat as (row, column, channel), TensorFlow's order: against a stored mu_s the order counts.
        spatial = self.mixed[:, :7].permute(0, 2, 3, 1).flatten(1)
        return {"pool": pool, "spatial": spatial, "probabilities": logits.softmax(-1)}  # softmax of pool @ W.T, no bias


def feature_network(kind, size, inception, device):
    """(kind, network) for images of `size` pixels: "inception", or "fashion", the classifier, which "auto" takes for 28."""
    kind = ("fashion" if size == 28 else "inception") if kind == "auto" else kind
    if kind == "inception":
        return kind, Inception(inception).to(device)
    if size != 28:
        raise BadInput(f"--features fashion is for 28 x 28 images, these are {size} x {size}; use --features inception")
    from data.fashion_mnist_features import FashionClassifier
    return kind, FashionClassifier.load().to(device)


def map_npz(path, name):
    """Array `name` of an .npz: mapped from the file if it is stored uncompressed, else read; None if it is not there."""
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{name}.npy" not in archive.namelist():
                return None
            entry = archive.getinfo(f"{name}.npy")
            if entry.compress_type != zipfile.ZIP_STORED:
                return np.load(path)[name]
            with archive.open(entry) as member:  # the array starts where the .npy header ends
                np.lib.format.read_magic(member)
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
                header = member.tell()
        with open(path, "rb") as f:
            f.seek(entry.header_offset + 26)  # lengths of the name and of the extra field in the local zip header
            lengths = np.frombuffer(f.read(4), "<u2").sum()
        return np.memmap(path, dtype, "r", int(entry.header_offset + 30 + lengths + header), shape, "F" if fortran else "C")
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise BadInput(f"{path} is not a whole .npz file: {error}") from None


class ImageSource:
    """uint8 images (N, H, W, 3) of an npz's arr_0, a folder, a zip or a path into a zip; source[i:j] reads that part. With
    `crop`, files of any size become ADM's centre crop of that side."""

    def __init__(self, path, crop=None):
        path = self.path = Path(path)
        self.crop, self.lossy, self.array, self.names = crop, False, None, None
        self.archive = next((p for p in (path, *path.parents) if p.suffix.lower() == ".zip" and p.is_file()), None)
        if path.suffix == ".npz" and path.is_file():
            self.array = map_npz(path, "arr_0")
            kind = "missing" if self.array is None else f"{self.array.dtype} of shape {self.array.shape}"
            if not (kind.startswith("uint8") and self.array.ndim == 4 and self.array.shape[3] == 3):
                raise BadInput(f"{path}: arr_0 is {kind}; images as uint8 from 0 to 255 of shape (N, H, W, 3) are needed")
            self.size = self.array.shape[1:]
            return
        if self.archive:
            inside = path.relative_to(self.archive).as_posix()
            if not zipfile.is_zipfile(self.archive):
                raise BadInput(f"{self.archive} is not a whole zip file")
            self.zip = zipfile.ZipFile(self.archive)
            names = [n for n in self.zip.namelist() if inside == "." or n.startswith(inside + "/")]
        elif path.is_dir():
            names = [str(p) for p in path.rglob("*")]
        else:
            raise BadInput(f"{path} does not exist or is no .npz, folder, zip or path into a zip")
        self.names = sorted(n for n in names if n.lower().endswith((".png", ".jpg", ".jpeg", ".webp", ".bmp")))
        if not self.names:
            raise BadInput(f"{path} holds no images")
        self.lossy = self.names[0].lower().endswith((".jpg", ".jpeg", ".webp"))
        self.size = self.read(self.names[0]).shape

    def read(self, name):
        try:
            with Image.open(io.BytesIO(self.zip.read(name)) if self.archive else name) as image:
                if image.mode.startswith("I"):  # 16 bits of grey, which PIL would clip instead of scaling
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                image = image.convert("RGB")
        except Exception as error:  # PIL, zipfile and zlib raise a dozen kinds
            raise BadInput(f"{name} in {self.path} cannot be read as an image: {error}") from None
        if not self.crop:
            return np.asarray(image)
        from pretokenize import center_crop
        return center_crop(image, self.crop)

    def __len__(self):
        return len(self.array if self.names is None else self.names)

    def __getitem__(self, part):
        if self.names is None:
            return np.array(self.array[part])
        with ThreadPoolExecutor(1 if self.archive else None) as pool:  # one zip handle, one reader
            images = list(pool.map(self.read, self.names[part]))
        for name, image in zip(self.names[part], images):
            if image.shape != self.size:
                raise BadInput(f"{name} in {self.path} is {image.shape[1]} x {image.shape[0]}, the first image there is "
                               f"{self.size[1]} x {self.size[0]}")
        return np.stack(images)


def sum_ranks(*tensors):
    for tensor in tensors if WORLD > 1 else ():
        dist.all_reduce(tensor)


class Moments:
    """Mean and covariance of feature rows that come in batches, summed in float64."""

    def __init__(self):
        self.count, self.sum, self.outer = 0, 0, 0

    def add(self, x):
        x = x.cpu().double()
        self.count, self.sum, self.outer = self.count + len(x), self.sum + x.sum(0), self.outer + x.T @ x

    def result(self):
        """mu (d,), sigma (d, d) with n - 1 as float64 arrays, over all ranks."""
        count = torch.tensor(float(self.count), dtype=torch.float64)
        sum_ranks(count, self.sum, self.outer)
        mu = self.sum / count
        sigma = (self.outer - count * torch.outer(mu, mu)) / (count - 1)
        if not (mu.isfinite().all() and sigma.isfinite().all()):
            raise BadInput("the features hold values that are not finite: at least 2 images are needed, and sound weights")
        return mu.numpy(), sigma.numpy()


class ScoreSums:
    """What the Inception Score needs of p(y|x): sums over splits of 5,000 consecutive images."""

    def __init__(self, total, classes, split=5000):
        self.split = split
        self.sums = torch.zeros(-(-total // split), classes + 2, dtype=torch.float64)  # p, p log p over the classes, count

    def add(self, p, first):
        """p (B, classes) of the images first, first + 1, ..."""
        p, index = p.cpu().double(), torch.arange(first, first + len(p)) // self.split
        p_log_p = torch.special.xlogy(p, p).sum(1, keepdim=True)
        self.sums.index_add_(0, index, torch.cat([p, p_log_p, torch.ones_like(p_log_p)], 1))

    def result(self):
        """Mean over the splits of exp(mean KL(p(y|x) || p(y)))."""
        sum_ranks(self.sums)
        means = self.sums / self.sums[:, -1:]
        kl = means[:, -2] - torch.special.xlogy(means[:, :-2], means[:, :-2]).sum(1)
        return kl.exp().mean().item()


@torch.no_grad()
def extract(network, source, device, batch_size, title, keep=None):
    """One pass over an image source -> {"pool": (mu, sigma), "spatial": ..., "inception_score"}, and on rank 0 "features", the
    pooled features (N, d) float32 of the first `keep` images (all if None), and "predicted" (N,), the likeliest classes."""
    first, last = RANK * len(source) // WORLD, (RANK + 1) * len(source) // WORLD  # this rank's consecutive images
    moments, score, features, predicted = {}, None, [], []
    for i in tqdm(range(first, last, batch_size), desc=title, unit="batch", disable=RANK > 0):
        batch = source[i:min(i + batch_size, last)]
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # the numbers shall not depend on the card
            out = network(torch.from_numpy(batch).to(device))
        for name in ("pool", "spatial"):
            if name in out:
                moments.setdefault(name, Moments()).add(out[name])
        score = score or ScoreSums(len(source), out["probabilities"].shape[1])
        score.add(out["probabilities"], i)
        predicted.append(out["probabilities"].argmax(1).cpu())
        if keep is None or i < keep:
            features.append(out["pool"][:None if keep is None else keep - i].float().cpu())
    if score is None:
        raise BadInput(f"{len(source)} images are too few for {WORLD} ranks")
    result = {name: m.result() for name, m in moments.items()} | {"inception_score": score.result()}
    for name, parts in (("features", features), ("predicted", predicted)):
        gathered = [parts]
        if WORLD > 1:
            gathered = [None] * WORLD if RANK == 0 else None
            dist.gather_object(parts, gathered)
        if RANK == 0 and gathered[0]:
            result[name] = torch.cat([part for parts in gathered for part in parts]).numpy()
    return result


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)); the last trace is that of the root of the symmetric R S2 R with
    R = S1^(1/2), which has real eigenvalues whatever its rank."""
    values, vectors = np.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ sigma2 @ root).clip(0)).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace)


def squared_distances(a, b, b_norms):
    """(n, d), (m, d), |b|^2 (m,) -> (n, m) float32"""
    return torch.addmm(b_norms + a.square().sum(1)[:, None], a, b.T, alpha=-2).clamp_min_(0)


def precision_recall(samples, reference, device="cpu", k=3, block=1000):
    """Share of samples within the k-NN manifold of the reference, and the reverse; features (n, d), (m, d) float32. A point
    lies in a manifold if it is no further from one of its points than that point's k-th nearest neighbour."""
    x, y = torch.from_numpy(samples).to(device), torch.from_numpy(reference).to(device)
    norms_x, norms_y = x.square().sum(1), y.square().sum(1)

    def radii(a, norms):  # the nearest is the point itself
        return torch.cat([squared_distances(part, a, norms).topk(min(k + 1, len(a)), largest=False).values[:, -1]
                          for part in a.split(block)])

    radius_x, radius_y = radii(x, norms_x), radii(y, norms_y)
    in_reference, in_samples = [], torch.zeros(len(y), dtype=torch.bool, device=device)
    for i in range(0, len(x), block):
        d = squared_distances(x[i:i + block], y, norms_y)  # (block, m)
        in_reference.append((d <= radius_y).any(1))
        in_samples |= (d <= radius_x[i:i + block, None]).any(0)
    return torch.cat(in_reference).float().mean().item(), in_samples.float().mean().item()


def cache_file(path, network):
    """Where the statistics of a reference are kept: beside it, under a name with the hash of all its bytes, so never stale."""
    path = Path(path)
    base = path if path.suffix == ".npz" or path.is_dir() else ImageSource(path).archive
    sha = hashlib.sha256(f"{type(network).__name__} {path.relative_to(base.parent).as_posix()}".encode())
    for tensor in network.state_dict().values():
        sha.update(tensor.cpu().numpy().tobytes())
    for file in sorted(p for p in base.rglob("*") if p.is_file()) if base.is_dir() else [base]:
        with open(file, "rb") as f:
            sha.update(hashlib.file_digest(f, "sha256").digest())
    return base.with_name(f"{base.name}.{sha.hexdigest()[:16]}.fid.npz")


def stored_statistics(path):
    """({"pool": (mu, sigma), "spatial": (mu_s, sigma_s)} as far as an npz stores them, whether it holds nothing else)"""
    if not (str(path).endswith(".npz") and Path(path).is_file()):
        return {}, False
    names = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
    pairs = {name: [map_npz(path, key) for key in keys] for name, keys in names.items()}
    stored = {name: pair for name, pair in pairs.items() if pair[0] is not None and pair[1] is not None}
    return stored, bool(stored) and map_npz(path, "arr_0") is None


def reference_features(path, network, device, batch_size, cache, size):
    """Statistics, and features for precision and recall, of a reference; statistics stored in an npz count before images."""
    stored, nothing_else = stored_statistics(path)
    if nothing_else:
        return stored
    if stored:
        note(f"the statistics stored in {path} count, not those of its images")
    file = cache_file(path, network) if cache else None
    if file and file.exists():
        saved = np.load(file)  # a row of means above the covariance
        return {name: (saved[name][0], saved[name][1:]) for name in ("pool", "spatial") if name in saved} | {
            "features": saved["features"]} | stored
    source = ImageSource(path)
    if source.size[0] != size:
        raise BadInput(f"{path} holds images of {source.size[0]} pixels, the samples have {size}: bring both to one size first")
    result = extract(network, source, device, batch_size, f"features of {path}", keep=10000)
    if file and RANK == 0:
        with open(file.with_suffix(".tmp"), "wb") as f:
            statistics = {name: np.vstack(result[name]) for name in ("pool", "spatial") if name in result}
            np.savez(f, features=result["features"], **statistics)
            f.flush()
            os.fsync(f.fileno())
        os.replace(f.name, file)
    return result | stored


def psnr(a, b):
    """10 log10(255^2 / MSE) of each image pair in dB; (B, 3, H, W) from 0 to 255 -> (B,)."""
    return 10 * (255**2 / (a - b).square().mean((1, 2, 3)).clamp_min(1e-10)).log10()


def ssim(a, b):
    """SSIM of each pair: 11 x 11 Gaussian window of sigma 1.5, per colour, without padding; from 0 to 255 -> (B,)."""
    g = torch.exp(-(torch.arange(11, dtype=a.dtype, device=a.device) - 5).square() / (2 * 1.5**2))
    window = (torch.outer(g, g) / g.sum() ** 2)[None, None]

    def blur(x):
        return F.conv2d(x.flatten(0, 1)[:, None], window).unflatten(0, x.shape[:2])[:, :, 0]

    mu_a, mu_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mu_a**2, blur(b * b) - mu_b**2, blur(a * b) - mu_a * mu_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return ((2 * mu_a * mu_b + c1) * (2 * cov + c2) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))).mean((1, 2, 3))


class Paired:
    """The source of what `make` makes of the originals; sums the measures of each pair that is read."""

    def __init__(self, originals, make, measures):
        self.originals, self.make, self.measures = originals, make, measures
        self.sums = torch.zeros(len(measures), dtype=torch.float64)

    def __len__(self):
        return len(self.originals)

    def __getitem__(self, part):
        originals = self.originals[part]
        images = self.make(part, originals)
        a, b = (torch.from_numpy(x).permute(0, 3, 1, 2).float() for x in (images, originals))
        self.sums += torch.stack([measure(a, b).double().sum() for measure in self.measures.values()])
        return images

    def result(self):
        """{name: mean over all images of all ranks}"""
        sum_ranks(self.sums)
        return dict(zip(self.measures, (self.sums / len(self)).tolist()))


def reconstruct(path, device):
    """(uint8 images -> their reconstructions by the tokenizer at `path`, its image size)"""
    from common import to_float, to_uint8
    from tokenizer import Tokenizer
    tokenizer = Tokenizer.load(path).to(device)

    def make(part, originals):
        images = to_float(torch.from_numpy(originals).to(device)).permute(0, 3, 1, 2)
        return to_uint8(tokenizer.decode(tokenizer.encode(images))).numpy()

    return make, tokenizer.cfg.image_size


def pair_measures(args):
    measures = {"psnr": psnr} | ({"ssim": ssim} if args.ssim else {})
    if args.lpips:
        import lpips
        try:
            network = lpips.LPIPS(net="vgg", verbose=False).to(args.device).eval()
        except Exception as error:
            raise BadInput(f"--lpips needs torchvision's VGG16 weights, and their download failed: {error}") from None
        measures["lpips"] = lambda a, b: network(a.to(args.device) / 127.5 - 1, b.to(args.device) / 127.5 - 1).flatten().cpu()
    return measures


def parse_args():
    parser = argparse.ArgumentParser(description="FID and friends.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("samples", nargs="?", help="npz, folder or zip of generated images; by default samples.npz in --out")
    flag("reference", nargs="?", help="npz, folder or zip to compare with; by default the embedded training images")
    flag("--tokenizer", help="evaluate this tokenizer's reconstructions of --data against --data: rFID and PSNR")
    flag("--data", default=str(DATA / "fashion_mnist.zip" / "val"), help="images to reconstruct with --tokenizer")
    flag("--paired", action="store_true", help="both sides hold the same images in the same order: add PSNR")
    flag("--ssim", action="store_true", help="beside PSNR also SSIM")
    flag("--lpips", action="store_true", help="beside PSNR also LPIPS (VGG)")
    flag("--features", default="auto", choices=["auto", "inception", "fashion"], help="auto is fashion for 28 x 28 images")
    flag("--inception", metavar="FILE", help="torch-fidelity's Inception weights, instead of downloading them")
    flag("--cache", action="store_true", help="keep the reference's statistics in a file beside it")
    flag("--json", action="store_true", help="print one JSON line instead of the table")
    flag("--batch_size", type=int, default=100, help="images per forward of each rank")
    flag("--out", default="out", help="folder where samples.npz is looked for if no path is given")
    flag("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if args.tokenizer and args.reference or args.batch_size < 1:
        parser.error("--batch_size must be above 0; with --tokenizer give at most one path, a reference other than --data")
    return args


def distances(samples, against, name):
    """FID under the given name, and sFID where both sides have its statistics."""
    result = {}
    for measure, key in ((name, "pool"), ("sfid", "spatial")):
        if key in samples and key in against:
            if samples[key][0].shape != against[key][0].shape:
                raise BadInput(f"the reference has statistics of {len(against[key][0])} features, the samples have "
                               f"{len(samples[key][0])}: both must come from the same network (--features)")
            result[measure] = frechet_distance(*samples[key], *against[key])
    return result


def report(result, args):
    table = "\n".join(f"{k:18} {v:.4f}" if isinstance(v, float) else f"{k:18} {v}" for k, v in result.items())
    if not RANK:
        print(json.dumps(result) if args.json else table)


def main():
    args = parse_args()
    if WORLD > 1:
        dist.init_process_group("gloo")  # only float64 sums and gathered features travel, on the CPU
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    reference, originals = args.reference or str(DATA / "fashion_mnist.zip" / "train"), None
    if args.tokenizer:
        make, size = reconstruct(args.tokenizer, args.device)
        originals, reference, name = ImageSource(args.data, crop=size), args.samples, f"reconstructions by {args.tokenizer}"
        if reference:
            note("a reconstruction scored against other images than its own originals: do not compare it with rFIDs")
    else:
        name = args.samples or f"{args.out}/samples.npz"
        (stored, only), against = stored_statistics(name), stored_statistics(reference)[0]
        if only:  # there is nothing to extract: two FIDs are all there can be
            if stored.keys() - against.keys():
                raise BadInput(f"{name} holds statistics only, so the reference must hold them too, and {reference} lacks some")
            return report({"samples": name, "reference": reference} | distances(stored, against, "fid"), args)
        images = ImageSource(name)
        size = images.size[0]
        if images.lossy:
            note(f"{name} holds JPEG or WebP files: lossy compression alone moves FID by more than most papers, save PNG")
        if args.paired:
            originals = ImageSource(reference)
            if len(images) != len(originals) or images.size != originals.size:
                raise BadInput(f"--paired: {name} holds {len(images)} images of {images.size[:2]} and {reference} "
                               f"{len(originals)} of {originals.size[:2]}; both must be the same")
            make = lambda part, originals: images[part]
    if (args.ssim or args.lpips) and not originals:
        raise BadInput("--ssim and --lpips compare pairs: give --tokenizer or --paired with them")
    kind, network = feature_network(args.features, size, args.inception, args.device)
    source = Paired(originals, make, pair_measures(args)) if originals else images
    samples = extract(network, source, args.device, args.batch_size, "features of samples")
    if args.tokenizer and not reference:
        against = extract(network, originals, args.device, args.batch_size, "features of originals", keep=10000)
    else:
        against = reference_features(reference, network, args.device, args.batch_size, args.cache, size)
    pairs = source.result() if originals else {}
    if RANK:
        return
    result = {"samples": name, "reference": str(reference or args.data), "features": kind, "count": len(source)}
    result |= distances(samples, against, "rfid" if originals and not (args.tokenizer and reference) else "fid")
    result["inception_score"] = samples["inception_score"]
    if "features" in against:
        result["precision"], result["recall"] = precision_recall(samples["features"], against["features"], args.device)
    result |= pairs
    labels = map_npz(name, "arr_1") if not args.tokenizer and name.endswith(".npz") else None
    if kind == "fashion" and labels is not None:
        result["class_consistency"] = float((samples["predicted"] == labels).mean())
    report(result, args)
    if len(source) < 10000:
        note("fewer than 10,000 images: these numbers are biased, compare them only at equal counts")
    if len(source) <= len(samples["pool"][0]):
        note(f"{len(source)} images for {len(samples['pool'][0])} features: the covariance is singular, FID says little")


if __name__ == "__main__":
    try:
        main()
        if dist.is_initialized():  # without Python's teardown, which gloo's threads do not always survive
            sys.stdout.flush()
            os._exit(0)
    except ValueError as error:
        if type(error).__name__ not in ("BadInput", "InputError"):  # the second comes from the tokenizer's files
            raise
        sys.exit(f"{os.path.basename(sys.argv[0])}: {error}")
