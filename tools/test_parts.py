"""Tests of single parts: losses, sampling from logits, attention, pixels and crops.

    python -m pytest tools/test_parts.py
"""
import argparse
import contextlib
import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

import sample
import train_stage1
from ar import AR, LinearCrossEntropy, check_pair, sample_codes
from common import InputError, Linear, Machine, to_float, to_uint8
from pretokenize import Images, center_crop
from sample import Sampler
from test_all import gradients, models
from tokenizer import Tokenizer, attention, nearest_code, prob_ste, unit_norm
from train_stage1 import Discriminator, Stage1, perceptual_losses


def test_vq_loss_weighs_commitment_a_quarter():
    tokenizer, _, _ = models()
    quantizer, h = tokenizer.visual_quantizer, torch.randn(2, 16, 64)
    z = quantizer.project(h).detach()
    q = quantizer.lookup(nearest_code(z, quantizer.codebook)).detach()
    loss = quantizer(h)[2]
    proj, codebook = torch.autograd.grad(loss, (quantizer.proj.weight, quantizer.codebook))
    commitment = torch.autograd.grad(0.25 * (quantizer.project(h) - q).square().mean(), quantizer.proj.weight)[0]
    picked = quantizer.lookup(nearest_code(z, quantizer.codebook))
    toward = torch.autograd.grad((picked - z).square().mean(), quantizer.codebook)[0]
    torch.testing.assert_close(proj, commitment)
    torch.testing.assert_close(codebook, toward)


def test_black_images_have_finite_gradients():
    tokenizer, ar, images = models()
    stage1 = Stage1(tokenizer, ar, 3.0)
    black = torch.full_like(images, -1)
    y, _, vq, ce = stage1(black, torch.zeros(4).long(), torch.zeros(4, dtype=torch.bool))
    gan = Discriminator(4)
    loss = (y - black).abs().mean() + vq + ce + F.softplus(-gan.net(y)).mean()
    assert all(g.isfinite().all() for g in gradients(loss, stage1).values())
    x = torch.zeros(3, 4, requires_grad=True)
    assert torch.autograd.grad(unit_norm(x).sum(), x)[0].isfinite().all()


def test_discriminator_r1_is_the_squared_gradient():
    torch.manual_seed(0)
    gan, x = Discriminator(4).eval(), torch.randn(2, 3, 32, 32)
    penalty = gan(x, x, True)[2]
    x = x.requires_grad_()
    expected = torch.autograd.grad(gan.net(x).sum(), x)[0].square().sum() / 2
    torch.testing.assert_close(penalty, expected)


def test_sampling_draws_from_the_filtered_distribution():
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    u = (torch.arange(10000) + 0.5) / 10000

    def frequencies(**filters):
        return torch.bincount(sample_codes(logits.expand(10000, 4), u, **filters), minlength=4) / 10000

    torch.testing.assert_close(frequencies(temperature=0.5), (logits[0] / 0.5).softmax(0), atol=2e-4, rtol=0)
    torch.testing.assert_close(frequencies(top_k=2), torch.tensor([0, *logits[0, 1:3].softmax(0), 0]), atol=2e-4, rtol=0)
    p = logits[0].softmax(0)  # 0.087, 0.644, 0.237, 0.032
    torch.testing.assert_close(frequencies(top_p=0.9), torch.tensor([p[0], p[1], p[2], 0]) / p[:3].sum(), atol=2e-4, rtol=0)
    edge = torch.full((4,), 1 - 2**-24)  # the largest uniform number never draws a code of probability 0
    assert sample_codes(torch.randn(4, 1000).index_fill(1, torch.arange(900, 1000), -torch.inf), edge).max() < 900


def test_attention_with_a_mask_equals_softmax():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 4, 8).unbind(0)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1), v)
    torch.testing.assert_close(attention(q, k, v, causal=True), expected)
    torch.testing.assert_close(attention(q[:, 3:], k, v, mask=torch.ones(2, 5, dtype=torch.bool).tril(3)), expected[:, 3:])


def test_pixels_round_trip_and_crops():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_uint8(to_float(levels)), levels.permute(0, 2, 3, 1))
    between = to_float(levels) + (0.4 / 127.5) * torch.tensor([-1.0, 0, 1]).view(3, 1, 1)  # rounds to the nearest level
    assert torch.equal(to_uint8(between), levels.permute(0, 2, 3, 1))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 100, 3), np.uint8))
    halved = image.resize((50, 35), Image.Resampling.BOX).resize((round(50 * 32 / 35), 32), Image.Resampling.BICUBIC)
    left = (halved.width - 32) // 2
    assert np.array_equal(center_crop(image, 32), np.asarray(halved)[:, left:left + 32])


def test_images_are_read_as_they_come(tmp_path):
    """16-bit grey, CMYK, palette and a wrong extension; mirrored half of the time in training, classes from Kaggle's table."""
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8), np.uint8)
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "b.jpeg", "png")
    Image.merge("CMYK", [Image.fromarray(255 - pixels)] * 3 + [Image.new("L", (8, 8))]).save(tmp_path / "c.tif")
    Image.fromarray(pixels).convert("P").save(tmp_path / "d.png")
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\na,n02 1 2 3 4\nb,n01 1 2 3 4\nc,n02 1\nd,n01 1\n")
    images = Images(tmp_path, 8, "none")
    assert images.classes == ["n01", "n02"] and images.labels.tolist() == [1, 0, 1, 0]
    for i in range(4):
        assert np.array_equal(images[i, i][0][0].permute(1, 2, 0)[..., 0], pixels), images.names[i]
    train = Images(tmp_path, 8, "center", flip=True, train=True)
    mirrored = [bool((train[visit, 1][0][0][0].numpy() == pixels[:, ::-1]).all()) for visit in range(50)]
    assert train[0, 1][0].shape == (1, 3, 8, 8) and 10 < sum(mirrored) < 40


def test_perceptual_losses(monkeypatch):
    """LPIPS equals the lpips package's on random VGG weights, and black images give finite gradients in both losses."""
    import lpips
    import torchvision
    torch.manual_seed(0)
    with torch.device("meta"):
        vgg = torchvision.models.vgg16()
    vgg.features.to_empty(device="cpu")
    for p in vgg.features.parameters():
        torch.nn.init.normal_(p, std=0.05)
    monkeypatch.setattr(train_stage1, "load_torchvision", lambda build, *rest: vgg if "vgg" in build.__name__ else build())
    ours, theirs = perceptual_losses("both", None, None, "cpu"), lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    layers = iter(vgg.features)
    for part in (theirs.net.slice1, theirs.net.slice2, theirs.net.slice3, theirs.net.slice4, theirs.net.slice5):
        for layer in part:
            layer.load_state_dict(next(layers).state_dict())
    a, b = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    torch.testing.assert_close(ours[0][1](a, b), theirs(a, b).mean(), rtol=1e-3, atol=1e-6)
    black = torch.full_like(a, -1).requires_grad_()
    for _, net in ours:
        for image in (black, a.clone().requires_grad_()):
            gradient, = torch.autograd.grad(net(image, a), image)
            assert gradient.isfinite().all()
        assert not any(p.requires_grad for p in net.parameters())
    assert [weight for weight, _ in ours] == [1.0, 0.1]


def test_prologue_queries_follow_the_image_but_patches_keep_their_place():
    tokenizer, _, images = models()
    patch = images.clone()
    patch[:, :, :8, 8:16] = 0  # row 0, column 1
    seen = {}
    tokenizer.encoder.register_forward_hook(lambda module, args, output: seen.update(x=args[0]))
    assert not torch.equal(tokenizer.hidden(images)[1], tokenizer.hidden(patch)[1])
    assert (seen["x"][:, 1] == 0).all() and (seen["x"][:, [0, 2, 3, 4]] != 0).any(2).all()  # patch 1 is row 0, column 1
    tokenizer.hidden(images)
    assert torch.equal(seen["x"][0, 1].view(8, 8, 3), images[0, :, :8, 8:16].permute(1, 2, 0))


def test_direct_ce_reaches_the_visual_codebook_and_its_input():
    tokenizer, ar, images = models("2d")
    stage1 = Stage1(tokenizer, ar, 3.0, direct_ce=True)
    reconstruction, codes, _, ce = stage1(images, torch.zeros(4).long(), None)
    torch.testing.assert_close(ce, ar.cross_entropy(codes, torch.zeros(4).long()), rtol=1e-5, atol=1e-5)
    grads = gradients(ce, stage1)
    assert {"tokenizer.visual_quantizer.codebook", "tokenizer.visual_quantizer.proj.weight", "tokenizer.encoder.input.weight",
            "ar.embedding.weight"} <= grads.keys() and not any("decoder" in name for name in grads)


def test_unreadable_images_are_replaced_counted_and_limited(tmp_path, capfd):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(1000):
            Image.new("L", (8, 8), 100 + i % 3).save(tmp_path / name / f"{i:04}.bmp")
    for i in (5, 6):
        (tmp_path / "a" / f"{i:04}.bmp").write_bytes(b"BM")
    images = Images(tmp_path, 8, "none")
    (views, index), = images.batches([[(0, 5), (1, 6), (2, 5)]], 0)
    assert index.tolist() == [5, 6, 5] and (views[:, 0, 0, 0, 0] == torch.tensor([101, 101, 101])).all()  # both by number 7
    assert capfd.readouterr().err.count("cannot be read") == 2 and images.unreadable == {5, 6}
    (tmp_path / "b" / "0000.bmp").write_bytes(b"BM")
    with pytest.raises(InputError, match="b/0000.bmp.*3 such of 2000, more than 0.1%"):
        list(images.batches([[(3, 1000)]], 0))


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


def test_compiled_and_frozen_models_draw_the_same(monkeypatch):
    """Compiled in one graph, but by a backend that needs no C++ compiler."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: real(f, backend="aot_eager", fullgraph=True, dynamic=False))
    for layout in ("prologue", "2d"):
        _, ar, _ = models(layout)
        labels, settings = torch.arange(5), dict(cfg_prologue=0.7, cfg_visual=3.0)
        noise = torch.rand(2, 5, ar.cfg.num_prologue + 16, generator=torch.Generator().manual_seed(0))
        expected = [ar.generate(labels, noise=u, **settings) for u in noise]
        with torch.autocast("cpu", torch.bfloat16):  # as train_ar.py samples with --dtype bf16
            assert ar.generate(labels, noise=noise[0], **settings).shape == expected[0].shape
        frozen = copy.deepcopy(ar)
        frozen.freeze(torch.float32)
        assert torch.equal(frozen.generate(labels, noise=noise[0], **settings), expected[0])
        ar.compile_step()
        for u, codes in zip(noise, expected):  # the second time in caches that hold the first one's keys
            assert torch.equal(ar.generate(labels, noise=u, **settings), codes)
            assert torch.equal(ar.generate(labels[:3], noise=u[:3], **settings), codes[:3])


def test_linear_cross_entropy_in_parts_equals_the_whole(monkeypatch):
    monkeypatch.setattr("ar.LOGITS", 700)  # parts of 7 positions
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(50, 4, requires_grad=True), torch.randn(100, 4, requires_grad=True), torch.arange(50)
    whole = F.cross_entropy(hidden @ weight.T, target)
    parts = LinearCrossEntropy.apply(hidden, weight, target)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)
    for a, b in zip(torch.autograd.grad(3 * parts, (hidden, weight)), torch.autograd.grad(3 * whole, (hidden, weight))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_linear_equals_torch():
    torch.manual_seed(0)
    ours = Linear(6, 5)
    x = torch.randn(2, 6, 3).transpose(1, 2).requires_grad_()  # not contiguous
    inputs = x, ours.weight, ours.bias
    expected = torch.nn.functional.linear(*inputs)
    torch.testing.assert_close(ours(x), expected)
    g = torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad(ours(x), inputs, g), torch.autograd.grad(expected, inputs, g)):
        torch.testing.assert_close(a, b)


def test_interrupted_sampling_goes_on(tmp_path, monkeypatch):
    tokenizer, ar, _ = models()
    machine = Machine(argparse.Namespace(device="cpu", dtype="fp32", batch_size=4, compile=False))
    sampler = Sampler(ar, tokenizer, machine, seed=0, batch_size=4, settings={"cfg_visual": 2.0})
    sample.draw_many(sampler, 10, machine, tmp_path / "whole.npz")
    drawn, pixels = [], sampler.pixels

    def failing(codes):
        drawn.append(len(codes))
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return pixels(codes)

    monkeypatch.setattr(sampler, "pixels", failing)
    for _ in range(2):
        with contextlib.suppress(KeyboardInterrupt):
            sample.draw_many(sampler, 10, machine, tmp_path / "parts.npz")
    assert drawn == [4, 4, 4, 2]  # the first four were not drawn again
    for name in ("arr_0", "arr_1"):
        assert np.array_equal(np.load(tmp_path / "parts.npz")[name], np.load(tmp_path / "whole.npz")[name])
    assert {p.name for p in tmp_path.iterdir()} == {"whole.npz", "parts.npz"}
