"""The tests: shapes, gradient routing, sampling, exactness. `python -m pytest test_all.py`.

Tiny models with random weights everywhere; what needs several processes runs the real scripts on a few images.
"""
import functools
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ar import AR, ARConfig, check_pair, guidance, sample_codes
from common import InputError
from tokenizer import LAYOUTS, Tokenizer, TokenizerConfig, nearest_code, prob_ste, unit_norm
from train_stage1 import Stage1

HERE = Path(__file__).parent
CFG = TokenizerConfig(image_size=32, patch_size=8, encoder=(2, 64), decoder=(2, 64), post=(1, 64), head_dim=32,
                      codebook_size=40, code_dim=6, num_prologue=3, prologue_codebook_size=12)  # N = 16


def models(layout="prologue", seed=0, **ar):
    torch.manual_seed(seed)
    tokenizer = Tokenizer(replace(CFG, layout=layout)).eval()
    ar = AR(ARConfig.for_tokenizer(tokenizer.cfg, layers=2, dim=64, head_dim=32, num_classes=5, **ar)).eval()
    for p in ar.parameters():  # wide weights, so that logits differ enough to be told apart
        p.data += 0.3 * torch.randn_like(p)
    return tokenizer, ar, torch.rand(4, 3, 32, 32) * 2 - 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes(layout):
    tokenizer, ar, images = models(layout)
    k, n = tokenizer.cfg.num_prologue, 16
    assert k == (3 if layout in ("prologue", "post") else 0)
    codes = tokenizer.encode(images)
    assert codes.shape == (4, k + n) and codes.dtype == torch.int64
    assert codes[:, :k].numel() == 0 or codes[:, :k].max() < 12
    assert codes[:, k:].max() < 40 and codes.min() >= 0
    assert tokenizer.decode(codes).shape == (4, 3, 32, 32)
    assert torch.equal(tokenizer.decode(codes), tokenizer.decode(codes[:, k:]))  # the decoder sees visual codes only
    reconstruction, same, onehot, vq_loss = tokenizer(images)
    assert torch.equal(same, codes) and vq_loss.ndim == 0
    assert reconstruction is None if layout == "post" else reconstruction.shape == images.shape  # post trains no pixels
    assert onehot is None if k == 0 else onehot.shape == (4, 3, 12)
    length, vocab = (n, 40) if k == 0 else (k + 1 + n, 40 + 12 + 1)
    assert ar(codes, torch.arange(4)).shape == (4, length, vocab)
    assert ar.cross_entropy(codes, torch.arange(4), reduction="none").shape == (4, length)


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def test_cross_entropy_reaches_the_prologue_path_only():
    tokenizer, ar, images = models()
    stage1 = Stage1(tokenizer, ar, ce_weight=3.0)
    grads = gradients(stage1(images, torch.tensor([True, False, True, False]))[3], stage1)
    assert not [n for n in grads if n.startswith(("tokenizer.decoder", "tokenizer.visual_quantizer"))]
    for name in ("tokenizer.encoder.queries", "tokenizer.prologue_quantizer.codebook", "tokenizer.prologue_quantizer.proj.weight",
                 "tokenizer.encoder.input.weight", "tokenizer.encoder.transformer.blocks.0.attn.qkv.weight",
                 "ar.embedding.weight"):
        assert name in grads, name


def test_reconstruction_never_reaches_the_prologue_codebook():
    tokenizer, ar, images = models()
    stage1, drop = Stage1(tokenizer, ar, ce_weight=3.0), torch.zeros(4, dtype=torch.bool)
    reconstruction, _, vq_loss, _ = stage1(images, drop)
    both = gradients((reconstruction - images).abs().mean() + vq_loss, stage1)
    assert not [n for n in both if "prologue" in n or n.startswith("ar.")] and "tokenizer.visual_quantizer.codebook" in both
    straight_through = gradients((stage1(images, drop)[0] - images).abs().mean(), stage1)
    assert {"tokenizer.decoder.out.weight", "tokenizer.encoder.input.weight"} <= set(straight_through)


def test_lambda_scales_the_encoder_and_not_the_ar():
    tokenizer, ar, images = models()
    drop = torch.tensor([True, False, True, False])
    one = gradients(Stage1(tokenizer, ar, 1.0)(images, drop)[3], stage1 := Stage1(tokenizer, ar, 1.0))
    one = {n: g.clone() for n, g in one.items()}
    three = gradients(Stage1(tokenizer, ar, 3.0)(images, drop)[3], stage1)
    for name, grad in three.items():
        expected = one[name] * (3 if name.startswith("tokenizer") else 1)
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-7, msg=name)


def test_prob_ste_is_onehot_forward_and_softmax_backward():
    torch.manual_seed(0)
    z, codebook = unit_norm(torch.randn(5, 6, dtype=torch.double)), torch.randn(12, 6, dtype=torch.double)
    weight = torch.randn(5, 12)
    onehot, codes = prob_ste(z, codebook, 0.1)
    assert torch.equal(onehot, F.one_hot(codes, 12).double()) and torch.equal(codes, nearest_code(z.float(), codebook))

    def soft(z, codebook):
        return (weight * (z @ unit_norm(codebook).T / 0.1).softmax(-1)).sum()

    z.requires_grad_(), codebook.requires_grad_()
    dz, dc = torch.autograd.grad((weight * prob_ste(z, codebook, 0.1)[0]).sum(), (z, codebook))
    for tensor, grad, i, j in ((z, dz, 2, 3), (codebook, dc, 7, 1)):  # finite differences of the softmax
        h = torch.zeros_like(tensor)
        h[i, j] = 1e-6
        high, low = ((soft(tensor + s * h, codebook) if tensor is z else soft(z, tensor + s * h)) for s in (1, -1))
        assert abs((high - low).item() / 2e-6 - grad[i, j].item()) < 1e-5


def plain_generate(ar, labels, noise, cfg_prologue, cfg_visual, schedule, power, **filters):
    """Sampling without a cache: the whole sequence runs anew for each token, all logits computed, the wrong ones masked."""
    k, n, v = ar.cfg.num_prologue, ar.cfg.num_visual, ar.cfg.codebook_size
    codes, uncond = torch.zeros(len(labels), k + n, dtype=torch.int64), torch.full_like(labels, ar.cfg.num_classes)
    for i in range(k + n):
        position = i + (k > 0 and i >= k)  # EOS stands between the groups
        if i < k:
            s, first, last = guidance(cfg_prologue, "constant", power, i / k), v, v + ar.cfg.prologue_codebook_size
        else:
            s = guidance(cfg_visual, schedule, power, (position - k) / (1 + n) if k else i / n)
            first, last = 0, v
        logits = s * ar(codes, labels)[:, position] + (1 - s) * ar(codes, uncond)[:, position]
        codes[:, i] = sample_codes(logits[:, first:last], noise[:, i], **filters)
    return codes


@pytest.mark.parametrize("layout", ["prologue", "2d"])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.7, 3.0), (1.0, 2.0), (1.5, 1.0)])
def test_generate_equals_the_plain_uncached_path(layout, schedule, scales):
    _, ar, _ = models(layout)
    labels = torch.tensor([0, 3, 4])
    noise = torch.rand(3, ar.cfg.num_prologue + 16, generator=torch.Generator().manual_seed(1))
    settings = dict(cfg_prologue=scales[0], cfg_visual=scales[1])
    codes = ar.generate(labels, cfg_schedule=schedule, cfg_power=0.5, noise=noise, **settings)
    assert torch.equal(codes, plain_generate(ar, labels, noise, schedule=schedule, power=0.5, **settings))
    greedy = ar.generate(labels, cfg_schedule=schedule, cfg_power=0.5, top_k=1, noise=noise, **settings)
    assert torch.equal(greedy, plain_generate(ar, labels, noise, schedule=schedule, power=0.5, top_k=1, **settings))
    assert not torch.equal(greedy, codes)


def test_generate_keeps_a_fixed_prologue_and_stays_inside_the_codebooks():
    _, ar, _ = models()
    labels, noise = torch.arange(5).repeat(20), torch.rand(100, 19, generator=torch.Generator().manual_seed(0))
    codes = ar.generate(labels, cfg_visual=2.0, temperature=3.0, noise=noise)
    assert codes.min() >= 0 and codes[:, :3].max() < 12 and codes[:, 3:].max() < 40 and codes[:, 3:].max() >= 12
    # The prologue that would have been drawn, given beforehand, changes nothing after it.
    assert torch.equal(ar.generate(labels, cfg_visual=2.0, temperature=3.0, noise=noise, prologue=codes[:, :3]), codes)
    other = (codes[:, :3] + 1) % 12
    fixed = ar.generate(labels, cfg_visual=2.0, temperature=3.0, noise=noise, prologue=other)
    assert torch.equal(fixed[:, :3], other) and not torch.equal(fixed[:, 3:], codes[:, 3:])


def test_save_and_load(tmp_path):
    tokenizer, ar, images = models("post", tokenizer="x" * 16, classes=list("abcde"))
    tokenizer.save(tmp_path / "t.safetensors"), ar.save(tmp_path / "a.safetensors")
    codes = tokenizer.encode(images)
    loaded, loaded_ar = Tokenizer.load(tmp_path / "t.safetensors"), AR.load(tmp_path / "a.safetensors")
    assert loaded.cfg == tokenizer.cfg and loaded_ar.cfg == ar.cfg and loaded.fingerprint() == tokenizer.fingerprint()
    assert torch.equal(loaded.encode(images), codes) and torch.equal(loaded.decode(codes), tokenizer.decode(codes))
    assert torch.equal(loaded_ar(codes, torch.arange(4)), ar(codes, torch.arange(4)))
    with pytest.raises(InputError, match="another tokenizer"):
        check_pair(loaded, loaded_ar)
    assert not list(tmp_path.glob("*.tmp"))


TEMPORARY = tempfile.TemporaryDirectory()  # shared with tools/test_scripts.py, gone when the tests end


@functools.cache
def folder():
    """48 random training and 16 held-out images in two classes."""
    root = Path(TEMPORARY.name) / "images"
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 8)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 255, (28, 28, 3), np.uint8)).save(root / split / name / f"{i}.png")
    return root


def script(name, *args, ranks=1):
    """Runs a script in a process of its own, or under torchrun, and returns (exit code, stdout + stderr)."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", "29533"] if ranks > 1 else []
    command = [sys.executable, *launcher, HERE / name, *args] + ["--num_workers", "0"] * (name != "fid.py")
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return result.returncode, result.stdout + result.stderr


STAGE1 = ["--batch_size", 8, "--warmup", 1, "--hold", 1000, "--eval_images", 8, "--eval_every", 100, "--log_every", 1]
STAGE2 = ["--batch_size", 8, "--warmup", 1, "--hold", 1000, "--dropout", 0, "--eval_every", 100, "--log_every", 1]


def losses(path, *keys):
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [[line[key] for key in keys] for line in lines if keys[0] in line]


def state(path):
    return torch.load(path, weights_only=True)


def assert_same_gradients(path, reference, key):
    """After one step AdamW's first moment is the gradient times a constant."""
    a, b = (state(p)[key]["state"] if key == "optimizer" else state(p)[key][0]["state"] for p in (path, reference))
    assert a.keys() == b.keys() and len(a) > 10
    for i in a:
        torch.testing.assert_close(a[i]["exp_avg"], b[i]["exp_avg"], rtol=1e-3, atol=2e-6)


@functools.cache
def pipeline():
    """The five scripts, four steps of each training."""
    out = Path(TEMPORARY.name) / "out"
    data = ["--data", folder() / "train", "--out", out]
    for name, *args in (("train_stage1.py", *data, "--steps", 4, *STAGE1), ("pretokenize.py", *data, "--flip"),
                        ("train_ar.py", "--out", out, "--steps", 4, *STAGE2),
                        ("sample.py", "--out", out, "--num", 6, "--data", folder() / "val"),
                        ("fid.py", out / "samples.npz", folder() / "train", "--json")):
        code, text = script(name, *args)
        assert code == 0, text
    result = json.loads(next(line for line in text.splitlines() if line.startswith("{")))
    assert result["count"] == 6 and result["fid"] > 0 and "class_consistency" in result
    return out


def test_resume_continues_the_loss_curve_exactly(tmp_path):
    data = ["--data", folder() / "train", "--out", tmp_path]
    (tmp_path / "ar").mkdir()
    for name in ("codes.npz", "tokenizer.safetensors"):
        (tmp_path / "ar" / name).write_bytes((pipeline() / name).read_bytes())

    def twice(*command):
        first, second = (script(*command, "--steps", steps, "--resume") for steps in (2, 4))
        assert first[0] == second[0] == 0 and "going on from step 2" in second[1], first[1] + second[1]

    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda command: twice(*command), (("train_stage1.py", *data, *STAGE1),
                                                        ("train_ar.py", "--out", tmp_path / "ar", *STAGE2))))
    keys = ("l1", "vq", "ce", "gan", "discriminator")
    assert losses(tmp_path / "train_stage1.jsonl", *keys) == losses(pipeline() / "train_stage1.jsonl", *keys)
    a, b = state(tmp_path / "train_stage1.pt"), state(pipeline() / "train_stage1.pt")
    for name in ("tokenizer", "ema", "ar", "gan"):
        assert all(torch.equal(a[name][key], b[name][key]) for key in b[name])
    resumed, unbroken = (losses(out / "train_ar.jsonl", "ce", "grad_norm") for out in (tmp_path / "ar", pipeline()))
    assert resumed == unbroken


def test_accumulation_and_two_ranks_give_the_gradients_of_one_batch(tmp_path):
    pipeline()  # before the threads: a cache does not lock
    variants = (1, []), (1, ["--micro_batch_size", 2]), (2, [])

    def train(number):
        (ranks, extra), out = variants[number], tmp_path / str(number)
        out.mkdir()
        for name in ("codes.npz", "tokenizer.safetensors"):
            (out / name).write_bytes((pipeline() / name).read_bytes())
        code, text = script("train_ar.py", "--out", out, "--steps", 1, *STAGE2, *extra, ranks=ranks)
        assert code == 0, text
        code, text = script("train_stage1.py", "--data", folder() / "train", "--out", out, "--steps", 1, *STAGE1,
                            "--gan_weight", 0, *extra, ranks=ranks)  # BatchNorm sees the forward's own batch
        assert code == 0, text
        return out

    outs = list(ThreadPoolExecutor(2).map(train, range(3)))
    for out in outs[1:]:
        assert_same_gradients(out / "train_stage1.pt", outs[0] / "train_stage1.pt", "optimizers")
        assert_same_gradients(out / "train_ar.pt", outs[0] / "train_ar.pt", "optimizer")
