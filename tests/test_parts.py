"""Tests of single parts: quantizers, losses, drawing, images, files. `python -m pytest tests`"""

import functools
import os
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_scripts import ROOT

from ar import AR, ARConfig, padded_linear, sample_codes
from pretokenize import (center_crop, image_crops, load_batches, psnr, resize_shorter_side,
                         to_float, to_uint8, visited_images)
from sample import PRESETS, pack_for_cpu, preset_settings
from test_all import CONFIG, LABELS, gradients, models
from tokenizer import Tokenizer, atomic_write, nearest_code, prob_ste, unit_norm
from train_ar import build_model, check_moments, learning_rate
from train_stage1 import Discriminator, Perceptual, Stage1, discriminator_loss, update_ema


def test_sequence_is_the_worked_example_of_ar():
    ar = AR(ARConfig(layers=1, dim=32, head_dim=32, num_prologue=2, num_visual=3, codebook_size=10,
                     prologue_codebook_size=4, num_classes=5))
    codes = torch.tensor([[1, 3, 7, 0, 5]])
    assert ar.sequence(codes).tolist() == [[11, 13, 14, 7, 0, 5]]


def test_gradients_of_the_quantizers():
    quantizer = models()[0].visual_quantizer
    h = torch.randn(2, 16, 64)
    z = quantizer.project(h)
    q = quantizer.lookup(nearest_code(z, quantizer.codebook))
    expected = 0.25 * (z - q.detach()).square().mean() + (q - z.detach()).square().mean()
    weights = [quantizer.proj.weight, quantizer.codebook]
    found = torch.autograd.grad(quantizer(h)[2]["vq"], weights)
    torch.testing.assert_close(found, torch.autograd.grad(expected, weights))
    # Prob-STE: one-hot forward, softmax backward
    z = unit_norm(torch.randn(5, 6)).requires_grad_()
    codebook = torch.randn(12, 6, requires_grad=True)
    weight = torch.randn(5, 12)
    onehot, codes = prob_ste(z, codebook, 0.1)
    assert torch.equal(codes, nearest_code(z, codebook))
    assert torch.equal(onehot, F.one_hot(codes, 12).float())
    soft = (z @ F.normalize(codebook).T / 0.1).softmax(-1)
    found = torch.autograd.grad((weight * onehot).sum(), [z, codebook])
    expected = torch.autograd.grad((weight * soft).sum(), [z, codebook])
    torch.testing.assert_close(found, expected)


def test_direct_ce_reaches_the_visual_codebook_and_its_input():
    tokenizer, ar, images = models("2d")
    stage1 = Stage1(tokenizer, ar, 3.0, direct_ce=True)
    _, _, ce = stage1(images, LABELS, None)
    nats = ar.measure(tokenizer.encode(images), LABELS)["nats_visual"]
    torch.testing.assert_close(ce, nats.mean() / 16)
    reached = gradients(ce, stage1)
    assert {"tokenizer.visual_quantizer.codebook", "tokenizer.encoder.input.weight"} <= set(reached)


def test_discriminator_loss_with_lecam_and_r1():
    torch.manual_seed(0)
    gan = Discriminator(4)
    gan.averages += torch.tensor([0.5, -0.5])  # of real and fake
    x, y = torch.randn(2, 2, 3, 32, 32)
    loss, terms = discriminator_loss(gan, x, y, with_r1=True, micro_share=0.5)
    real = gan.net(x.requires_grad_())
    fake = gan.net(y)
    means = torch.stack([real.mean(), fake.mean()])
    averages = torch.tensor([0.5, -0.5]).lerp(means, 0.0005)
    lecam = F.relu(real - averages[1]).square().mean() + F.relu(averages[0] - fake).square().mean()
    (gradient,) = torch.autograd.grad(real.sum(), x, retain_graph=True)
    r1 = gradient.square().sum() / 2  # of two images
    vanilla = -F.logsigmoid(real).mean() - F.logsigmoid(-fake).mean()
    torch.testing.assert_close([terms["lecam"], terms["r1"]], [lecam, r1])
    torch.testing.assert_close(loss, vanilla + 0.001 * lecam + 0.005 * r1)


def test_perceptual_losses(monkeypatch):
    """With random weights, because trained ones would be downloaded."""
    import lpips
    from torchvision import models as networks

    features = networks.vgg.make_layers(networks.vgg.cfgs["D"])
    monkeypatch.setattr(networks, "vgg16", lambda pretrained: SimpleNamespace(features=features))
    monkeypatch.setattr(networks, "convnext_small", lambda weights: torch.nn.Identity())
    monkeypatch.setattr(lpips, "normalize_tensor", lpips.normalize_tensor)
    loss = Perceptual("vgg")  # replaces this function of the package
    zero = torch.zeros(1, 3, 2, 2, requires_grad=True)  # as some features of black images are
    assert torch.autograd.grad(lpips.normalize_tensor(zero).sum(), zero)[0].isfinite().all()
    convnext = Perceptual("convnext")
    one = torch.ones(1, 3, 8, 8)
    mean = torch.tensor([0.485, 0.456, 0.406])  # of ImageNet's pixels, from 0 to 1
    std = torch.tensor([0.229, 0.224, 0.225])
    pixels = ((1 - mean) / std)[:, None, None].expand(1, 3, 224, 224)
    torch.testing.assert_close(convnext.logits(one), pixels)
    torch.testing.assert_close(convnext(one, -one), (1 / std).square().mean())
    a, b = torch.rand(2, 1, 3, 64, 64) * 2 - 1
    found = loss(a, b)
    monkeypatch.undo()
    torch.testing.assert_close(found, loss.vgg(a, b).mean(), rtol=1e-3, atol=1e-6)


def test_sampling_draws_from_the_filtered_distribution():
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0])
    p = logits.softmax(0)  # 0.087, 0.644, 0.237, 0.032
    u = (torch.arange(10000) + 0.5) / 10000
    for expected, filters in (((2 * logits).softmax(0), dict(temperature=0.5)),
                              (p * torch.tensor([0, 1, 1, 0]), dict(top_k=2)),
                              (p * torch.tensor([1, 1, 1, 0]), dict(top_p=0.9)),
                              (p * torch.tensor([0, 1, 0, 0]), dict(top_p=0))):
        codes = sample_codes(logits.expand(10000, 4), u, **filters)
        shares = torch.bincount(codes, minlength=4) / 10000
        torch.testing.assert_close(shares, expected / expected.sum(), atol=2e-4, rtol=0)
    # The largest uniform number never draws a code of probability 0.
    masked = torch.randn(100, 1000).index_fill(1, torch.arange(900, 1000), -torch.inf)
    assert sample_codes(masked, torch.full((100,), 1 - 2**-24)).max() < 900


@pytest.mark.parametrize("given, kept", [("prologue", slice(0, 3)), ("visual", slice(3, 8))])
def test_generate_goes_on_after_given_codes(given, kept):
    """What would have been drawn, given beforehand, changes nothing after it; other codes do."""
    _, ar, _ = models()
    labels = torch.arange(5)
    settings = dict(cfg_visual=3.0, temperature_prologue=0, noise=torch.rand(5, 19), labels=labels)
    codes = ar.generate(**settings)
    assert torch.equal(codes[:, :3], ar.generate(labels, top_k=1)[:, :3])
    assert torch.equal(ar.generate(labels, temperature=0), ar.generate(labels, top_k=1))
    assert torch.equal(ar.generate(**settings, **{given: codes[:, kept]}), codes)
    other = (codes[:, kept] + 1) % 12
    changed = ar.generate(**settings, **{given: other})
    assert torch.equal(changed[:, kept], other)
    assert not torch.equal(changed[:, kept.stop :], codes[:, kept.stop :])


def test_compiled_packed_and_padded_layers_compute_the_same(monkeypatch):
    weight = torch.randn(67, 8)
    torch.testing.assert_close(padded_linear(weight[:5], weight), weight[:5] @ weight.T)
    eager = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", eager)  # it needs no C++ compiler
    ar = AR(ARConfig.for_tokenizer(CONFIG, layers=1, dim=320)).eval().requires_grad_(False)
    settings = [dict(labels=torch.arange(5), cfg_visual=3.0, noise=u) for u in torch.rand(2, 5, 19)]
    expected = [ar.generate(**kwargs) for kwargs in settings]
    ar.compile_step()
    for kwargs, codes in zip(settings, expected):  # at last in caches full of the first's keys
        assert torch.equal(ar.generate(**kwargs), codes)
    ar.compiled_step = None
    pack_for_cpu(ar)  # it takes layers of over 2^18 weights, and these have more
    assert torch.equal(ar.generate(**settings[0]), expected[0])
    ar.norm.weight[3] = torch.nan
    with pytest.raises(SystemExit, match="logits are not finite"):
        ar.generate(**settings[0])


def test_presets_are_the_rows_of_table_a5():
    text = (ROOT / "recipes" / "evaluate.sh").read_text()
    (others,) = re.findall(r'settings="(.*?)"', text, re.S)
    others = [line.split()[1:] for line in others.splitlines()]
    rows = np.array([*list(PRESETS.values())[2:], *others], float)  # without two of ours
    assert rows.sum(0) == pytest.approx([17.25, 98.5, 9.9, 19.15, 20.4])  # of the table's columns
    assert list(preset_settings("prologue-l-b").values()) == [0.65, 2.75, 0.25, 1, 1]
    assert list(preset_settings("prologue-l-b", no_cfg=True).values()) == [1, 1, 0.25, 0.8, 0.95]


def test_pixels_round_trip():
    levels = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    noise = torch.rand(1, 3, 64, 64) - 0.5  # to be rounded to the nearest level
    assert torch.equal(to_uint8(to_float(levels) + 0.9 / 127.5 * noise), levels)
    assert psnr(levels, levels.int() + 5).item() == pytest.approx(20 * np.log10(255 / 5))


def test_crops_are_those_of_adm_and_ten_of_its_centre_square():
    banner = Image.new("RGB", (8000, 2), "blue")
    banner.paste("red", (3990, 0, 4010, 2))
    assert (center_crop(banner, 256) == (255, 0, 0)).all()
    assert resize_shorter_side(banner, 256).size == (4096, 256)  # the whole would take 1 GB
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (70, 100, 3), np.uint8))
    halved = image.resize((50, 35), Image.Resampling.BOX)
    shrunk = np.asarray(halved.resize((46, 32), Image.Resampling.BICUBIC))
    assert np.array_equal(center_crop(image, 32), shrunk[:, 7:39])
    # Of 376 x 281 pixels none is lost, and the middle square begins at column 47, also where the
    # margin is odd. The crop in its middle begins at round(12.5) = 12, mirrored or not.
    pixels = rng.integers(0, 255, (281, 376, 3), np.uint8)
    images = SimpleNamespace(open=lambda index: Image.fromarray(pixels))
    square = pixels[:, 47:328]
    places = ((0, 0), (0, 25), (25, 0), (25, 25), (12, 12))
    expected = [side[top : top + 256, left : left + 256]
                for side in (square, square[:, ::-1]) for top, left in places]
    assert np.array_equal(image_crops(images, 0, 256, "ten", flip=True), expected)


def test_visits_and_batches():
    first, second = (visited_images(3, 10 * epoch, 10, 10) for epoch in range(2))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    # Two ranks with four images each read what one with eight does.
    assert visited_images(3, 8, 4, 10) + visited_images(3, 12, 4, 10) == visited_images(3, 8, 8, 10)
    batches = load_batches(np.sqrt, [[4, 25], [16], [1, 0], [9]], num_workers=3)
    assert [batch.tolist() for batch in batches] == [[2, 5], [4], [1, 0], [3]]


def test_learning_rate_and_ema():
    args = SimpleNamespace(lr=1.0, min_lr=0.2, warmup=10, hold=20, steps=70)
    rates = [learning_rate(step, args) for step in (1, 10, 30, 50, 70)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.6, 0.2])
    ema = torch.nn.PReLU(init=1.0)  # a module with one weight
    update_ema(ema, torch.nn.PReLU(init=3.0), half_life=0.5)
    assert ema.weight.item() == 2.5  # a quarter is left after two half-lives


def test_what_is_saved_and_read_is_finite_and_of_one_process(tmp_path):
    path = tmp_path / "tokenizer.safetensors"
    models()[0].half().save(path)  # as those do who share weights
    assert Tokenizer.load(path).decoder.out.weight.dtype == torch.float32
    tokenizer, _, _ = models()
    tokenizer.save(path)
    good = path.read_bytes()
    tokenizer.decoder.out.bias.data[0] = torch.nan
    with pytest.raises(SystemExit, match="decoder.out.bias is not finite"):
        tokenizer.save(path)
    assert path.read_bytes() == good
    path.write_bytes(good[:-2] + b"\xff\xff")  # the last number becomes NaN
    with pytest.raises(SystemExit, match="is not finite"):
        Tokenizer.load(path)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.tensor([1.0, 1e30])  # whose square is infinite
    optimizer.step()
    with pytest.raises(SystemExit, match="step 7, Adam: exp_avg_sq is not finite"):
        check_moments(7, [optimizer])
    with atomic_write(path) as temporary:
        temporary.touch()
    assert str(os.getpid()) in temporary.name


def test_init_keeps_the_embeddings_of_known_classes(tmp_path):
    config = replace(CONFIG, fingerprint="ours")
    old = AR(ARConfig.for_tokenizer(config, layers=1, dim=32, head_dim=32, tokenizer="ours",
                                    classes=[f"name {i}" for i in range(1000)]))
    old.save(tmp_path / "ar.safetensors")
    args = SimpleNamespace(size="nano", dropout=0, init=tmp_path / "ar.safetensors")
    numbers = [f"n{i:08}" for i in range(1440764, 1441764)]  # the folders of ImageNet's classes
    for classes, rows in ((numbers, [*range(1001)]), (numbers[:-1], 1000 * [1000]),
                          (["cat", "name 3"], [1000, 3, 1000])):
        ar = build_model(args, SimpleNamespace(config=config, classes=classes), rank=0)
        assert torch.equal(ar.class_embedding.weight, old.class_embedding.weight[rows])
