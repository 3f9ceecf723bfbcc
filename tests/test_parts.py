"""Tests of single parts: losses, quantizers, attention, sampling from logits, images, files.

    python -m pytest tests/test_parts.py
"""

import json
import os
import sys
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

import train_ar
import train_stage1
from ar import AR, check_pair, sample_codes
from pretokenize import (BUNDLED, Images, center_crop, default_val, five_crops, join_parts,
                         load_batches, part_file, parts_folder)
from sample import PRESETS, pack_for_cpu, preset_settings
from test_all import LABELS, gradients, models
from tokenizer import (InputError, Tokenizer, attention, nearest_code, prob_ste, save_checkpoint,
                       to_float, to_uint8, unit_norm, writing)
from train_stage1 import Discriminator, Perceptual, Stage1, lecam_penalty, update_ema

# Quantizers


def test_vq_loss_weighs_commitment_a_quarter():
    tokenizer, _, _ = models()
    quantizer = tokenizer.visual_quantizer
    h = torch.randn(2, 16, 64)
    z = quantizer.project(h)
    q = quantizer.lookup(nearest_code(z.detach(), quantizer.codebook))

    _, _, loss = quantizer(h)
    weights = (quantizer.proj.weight, quantizer.codebook)
    of_proj, of_codebook = torch.autograd.grad(loss, weights)
    commitment = 0.25 * (z - q.detach()).square().mean()
    toward_z = (q - z.detach()).square().mean()
    torch.testing.assert_close(of_proj, torch.autograd.grad(commitment, weights[0])[0])
    torch.testing.assert_close(of_codebook, torch.autograd.grad(toward_z, weights[1])[0])


def test_prob_ste_is_onehot_forward_and_softmax_backward():
    torch.manual_seed(0)
    z = unit_norm(torch.randn(5, 6, dtype=torch.double))
    codebook = torch.randn(12, 6, dtype=torch.double)
    weight = torch.randn(5, 12)
    onehot, codes = prob_ste(z, codebook, 0.1)
    assert torch.equal(onehot, F.one_hot(codes, 12).double())
    assert torch.equal(codes, nearest_code(z.float(), codebook))

    def soft(z, codebook):
        return (weight * (z @ unit_norm(codebook).T / 0.1).softmax(-1)).sum()

    z.requires_grad_()
    codebook.requires_grad_()
    hard = (weight * prob_ste(z, codebook, 0.1)[0]).sum()
    of_z, of_codebook = torch.autograd.grad(hard, (z, codebook))
    # Finite differences of the softmax at one place of each
    step = torch.zeros_like(z)
    step[2, 3] = 1e-6
    slope = (soft(z + step, codebook) - soft(z - step, codebook)) / 2e-6
    assert abs(slope - of_z[2, 3]) < 1e-5
    step = torch.zeros_like(codebook)
    step[7, 1] = 1e-6
    slope = (soft(z, codebook + step) - soft(z, codebook - step)) / 2e-6
    assert abs(slope - of_codebook[7, 1]) < 1e-5


def test_direct_ce_reaches_the_visual_codebook_and_its_input():
    tokenizer, ar, images = models("2d")
    stage1 = Stage1(tokenizer, ar, 3.0, direct_ce=True)
    _, _, ce = stage1(images, LABELS, None)
    nats = ar.measure(tokenizer.encode(images), LABELS)["nats_visual"]
    torch.testing.assert_close(ce, nats.mean() / 16, rtol=1e-5, atol=1e-5)
    reached = gradients(ce, stage1)
    for name in ("tokenizer.visual_quantizer.codebook", "tokenizer.visual_quantizer.proj.weight",
                 "tokenizer.encoder.input.weight", "ar.embedding.weight"):
        assert name in reached, name
    assert not any("decoder" in name for name in reached)


# Losses


def test_black_images_have_finite_gradients():
    tokenizer, ar, images = models()
    stage1 = Stage1(tokenizer, ar, 3.0)
    black = torch.full_like(images, -1)
    y, vq, ce = stage1(black, LABELS, torch.zeros(4, dtype=torch.bool))
    gan = Discriminator(4)
    loss = (y - black).abs().mean() + vq + ce + F.softplus(-gan.net(y)).mean()
    assert all(g.isfinite().all() for g in gradients(loss, stage1).values())
    x = torch.zeros(3, 4, requires_grad=True)
    assert torch.autograd.grad(unit_norm(x).sum(), x)[0].isfinite().all()


def test_discriminator_r1_is_the_squared_gradient():
    torch.manual_seed(0)
    gan = Discriminator(4).eval()
    x = torch.randn(2, 3, 32, 32)
    _, _, penalty = gan(x, x, r1=True)
    x.requires_grad_()
    gradient = torch.autograd.grad(gan.net(x).sum(), x)[0]
    torch.testing.assert_close(penalty, gradient.square().sum() / 2)


def test_lecam_holds_each_side_to_the_average_of_the_other():
    averages = torch.tensor([0.5, -0.5])  # real, fake
    inside = lecam_penalty(torch.tensor([-0.5, -2.0]), torch.tensor([0.5, 3.0]), averages)
    assert inside == 0
    outside = lecam_penalty(torch.tensor([1.5]), torch.tensor([-0.5]), averages)
    assert outside == 2.0**2 + 1.0**2


def test_ema_halves_the_old_in_a_half_life():
    old = torch.nn.Linear(1, 1)
    new = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(old.weight, 1.0)
    torch.nn.init.constant_(new.weight, 3.0)
    for _ in range(8):
        update_ema(old, new, half_life=8)
    torch.testing.assert_close(old.weight, torch.tensor([[2.0]]))


def test_perceptual_losses(monkeypatch):
    """LPIPS equals the lpips package's on random VGG weights; black images have finite gradients
    in both losses; `both` is vgg + 0.1 convnext."""
    import lpips
    import torchvision

    torch.manual_seed(0)
    with torch.device("meta"):
        vgg = torchvision.models.vgg16()
    vgg.features.to_empty(device="cpu")
    for p in vgg.features.parameters():
        torch.nn.init.normal_(p, std=0.05)
    convnext = torchvision.models.convnext_small()
    networks = {torchvision.models.vgg16: vgg, torchvision.models.convnext_small: convnext}
    monkeypatch.setattr(train_stage1, "pretrained", lambda build: networks[build])
    ours = Perceptual("both")
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    layers = iter(vgg.features)
    for part in (theirs.net.slice1, theirs.net.slice2, theirs.net.slice3, theirs.net.slice4,
                 theirs.net.slice5):
        for layer in part:
            layer.load_state_dict(next(layers).state_dict())

    a, b = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    torch.testing.assert_close(ours.vgg(a, b), theirs(a, b).mean(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(ours(a, b), ours.vgg(a, b) + 0.1 * ours.convnext(a, b))
    black = torch.full_like(a, -1).requires_grad_()
    (gradient,) = torch.autograd.grad(ours(black, a), black)
    assert gradient.isfinite().all()
    assert not any(p.requires_grad for p in ours.parameters())


# Attention and sampling


def test_attention_with_a_mask_equals_softmax():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 4, 8).unbind(0)  # (B, T, heads, d)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5
    future = torch.ones(5, 5).triu(1).bool()
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    torch.testing.assert_close(attention(q, k, v, causal=True), expected)
    mask = torch.ones(2, 5, dtype=torch.bool).tril(3)
    torch.testing.assert_close(attention(q[:, 3:], k, v, mask=mask), expected[:, 3:])


def test_sampling_draws_from_the_filtered_distribution():
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    u = (torch.arange(10000) + 0.5) / 10000

    def check(expected, **filters):
        codes = sample_codes(logits.expand(10000, 4), u, **filters)
        frequencies = torch.bincount(codes, minlength=4) / 10000
        torch.testing.assert_close(frequencies, expected, atol=2e-4, rtol=0)

    check((logits[0] / 0.5).softmax(0), temperature=0.5)
    two = logits[0, 1:3].softmax(0)
    check(torch.tensor([0, two[0], two[1], 0]), top_k=2)
    p = logits[0].softmax(0)  # 0.087, 0.644, 0.237, 0.032
    check(torch.tensor([p[0], p[1], p[2], 0]) / p[:3].sum(), top_p=0.9)
    # The largest uniform number never draws a code of probability 0.
    edge = torch.full((4,), 1 - 2**-24)
    masked = torch.randn(4, 1000).index_fill(1, torch.arange(900, 1000), -torch.inf)
    assert sample_codes(masked, edge).max() < 900


def test_generate_keeps_a_fixed_prologue_and_stays_inside_the_codebooks():
    _, ar, _ = models()
    labels = torch.arange(5).repeat(20)
    noise = torch.rand(100, 19, generator=torch.Generator().manual_seed(0))
    settings = dict(cfg_visual=2.0, temperature=3.0, noise=noise)
    codes = ar.generate(labels, **settings)
    assert codes.min() >= 0
    assert codes[:, :3].max() < 12
    assert 12 <= codes[:, 3:].max() < 40
    # The prologue that would have been drawn, given beforehand, changes nothing after it.
    assert torch.equal(ar.generate(labels, prologue=codes[:, :3], **settings), codes)
    other = (codes[:, :3] + 1) % 12
    fixed = ar.generate(labels, prologue=other, **settings)
    assert torch.equal(fixed[:, :3], other)
    assert not torch.equal(fixed[:, 3:], codes[:, 3:])


@pytest.mark.parametrize("layout", ["prologue", "2d"])
def test_generate_goes_on_behind_given_visual_codes(layout):
    """What would have been drawn, given beforehand, changes nothing after it; other codes do."""
    _, ar, _ = models(layout)
    k = ar.cfg.num_prologue
    labels = torch.arange(5)
    noise = torch.rand(5, k + 16, generator=torch.Generator().manual_seed(0))
    settings = dict(cfg_prologue=0.7, cfg_visual=3.0, noise=noise)
    codes = ar.generate(labels, **settings)
    again = ar.generate(labels, visual=codes[:, k : k + 5], **settings)
    assert torch.equal(again, codes)
    other = (codes[:, k : k + 5] + 1) % 40
    changed = ar.generate(labels, visual=other, **settings)
    assert torch.equal(changed[:, k : k + 5], other)
    assert not torch.equal(changed[:, k + 5 :], codes[:, k + 5 :])


@pytest.mark.parametrize("layout", ["prologue", "2d"])
def test_compiled_and_packed_models_draw_the_same(monkeypatch, layout):
    """Compiled in one graph, but by a backend that needs no C++ compiler."""
    real = torch.compile
    backend = dict(backend="aot_eager", fullgraph=True, dynamic=False)
    monkeypatch.setattr(torch, "compile", lambda function, **_: real(function, **backend))
    _, ar, _ = models(layout)
    labels = torch.arange(5)
    settings = dict(cfg_prologue=0.7, cfg_visual=3.0)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2, 5, ar.cfg.num_prologue + 16, generator=generator)
    expected = [ar.generate(labels, noise=u, **settings) for u in noise]
    with torch.autocast("cpu", torch.bfloat16):  # as train_ar.py samples with --dtype bf16
        assert ar.generate(labels, noise=noise[0], **settings).shape == expected[0].shape
    ar.compile_step()
    for u, codes in zip(noise, expected):  # the second time in caches full of the first's keys
        assert torch.equal(ar.generate(labels, noise=u, **settings), codes)
        assert torch.equal(ar.generate(labels[:3], noise=u[:3], **settings), codes[:3])
    ar.compiled_step = None
    pack_for_cpu(ar.requires_grad_(False))
    assert torch.equal(ar.generate(labels, noise=noise[0], **settings), expected[0])


def test_packed_layers_keep_their_bias():
    layers = torch.nn.Sequential(torch.nn.Linear(600, 500)).requires_grad_(False)
    x = torch.randn(3, 600)
    expected = layers(x)
    pack_for_cpu(layers)
    torch.testing.assert_close(layers(x), expected)


@torch.no_grad()
def test_held_out_nats_are_of_images_of_all_classes(tmp_path):
    tokenizer, ar, _ = models()
    k = tokenizer.cfg.num_prologue
    codes = np.random.default_rng(0).integers(0, 8, (30, 1, k + 16)).astype(np.uint16)
    labels = np.arange(30) // 10
    config = dict(tokenizer=asdict(tokenizer.cfg), classes=["a", "b", "c"], fingerprint="")
    np.savez(tmp_path / "codes.npz", codes=codes, labels=labels, config=json.dumps(config))
    tokens = train_ar.Tokens(tmp_path / "codes.npz")
    autocast = torch.autocast("cpu", enabled=False)
    result = train_ar.evaluate(ar, tokens, 3, "cpu", autocast, rank=0, world_size=1)
    chosen = ar.measure(*tokens.batch([0, 10, 20], 0, "cpu"))
    assert result["val_nats_visual"] == pytest.approx(chosen["nats_visual"].mean().item())


def test_presets_are_the_rows_of_table_a5():
    assert len(PRESETS) == 25  # 23 rows, of which lambda = 3 is B-B's own, the demo's, and unguided
    guided = preset_settings("prologue-l-xl")
    assert guided == dict(cfg_prologue=0.7, cfg_visual=2.25, cfg_power=0.225,
                          temperature_prologue=1.0, temperature=1.0)
    plain = preset_settings("prologue-b-b", no_cfg=True)
    assert (plain["cfg_prologue"], plain["cfg_visual"]) == (1.0, 1.0)
    assert (plain["temperature_prologue"], plain["temperature"]) == (0.7, 0.9)
    with pytest.raises(InputError, match="no preset 'x'"):
        preset_settings("x")


# Images


def test_pixels_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_uint8(to_float(levels)), levels.permute(0, 2, 3, 1))
    shift = (0.4 / 127.5) * torch.tensor([-1.0, 0, 1]).view(3, 1, 1)
    between = to_float(levels) + shift  # rounds to the nearest level
    assert torch.equal(to_uint8(between), levels.permute(0, 2, 3, 1))


def test_crops_are_those_of_adm():
    pixels = np.random.default_rng(0).integers(0, 255, (70, 100, 3), np.uint8)
    image = Image.fromarray(pixels)
    halved = image.resize((50, 35), Image.Resampling.BOX)
    shrunk = np.asarray(halved.resize((round(50 * 32 / 35), 32), Image.Resampling.BICUBIC))
    left = (shrunk.shape[1] - 32) // 2
    assert np.array_equal(center_crop(image, 32), shrunk[:, left : left + 32])


def test_five_crops_lie_in_the_centre_square():
    """A 500 x 375 picture becomes 375 x 281 and its middle square 281 x 281: the columns of the
    crops are 47 to 303, 72 to 328 and in the middle 59 to 315 (round(12.5) is 12)."""
    ramp = np.arange(375, dtype=np.uint8)[None].repeat(281, 0)
    rows = np.arange(281, dtype=np.uint8)[:, None].repeat(375, 1)
    image = Image.fromarray(np.stack([ramp, rows, ramp], 2))  # shrinks to itself
    crops = five_crops(image, 256)
    assert [crop.shape for crop in crops] == [(256, 256, 3)] * 5
    assert [int(crop[0, 0, 0]) for crop in crops] == [47, 72, 47, 72, 59]
    assert [int(crop[0, 0, 1]) for crop in crops] == [0, 0, 25, 25, 12]


def test_images_are_read_as_they_come(tmp_path):
    """16-bit grey, CMYK, palette and a wrong extension; classes from Kaggle's table."""
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8), np.uint8)
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "b.jpeg", "png")
    ink = Image.fromarray(255 - pixels)
    Image.merge("CMYK", [ink, ink, ink, Image.new("L", (8, 8))]).save(tmp_path / "c.tif")
    Image.fromarray(pixels).convert("P").save(tmp_path / "d.png")
    table = tmp_path / "LOC_val_solution.csv"
    table.write_text("ImageId,PredictionString\na,n02 1 2 3 4\nb,n01 1 2 3 4\nc,n02 1\nd,n01 1\n")
    images = Images(tmp_path)
    assert images.classes == ["n01", "n02"]
    assert images.labels.tolist() == [1, 0, 1, 0]
    for i in range(4):
        assert np.array_equal(np.asarray(images.open(i))[..., 0], pixels), images.names[i]
    table.write_text("ImageId,PredictionString\na n02 1 2 3 4\n")
    with pytest.raises(InputError, match="LOC_val_solution.csv is not Kaggle's table"):
        Images(tmp_path)


def test_held_out_images_are_looked_for_beside_train(tmp_path):
    (tmp_path / "train").mkdir()
    assert default_val(tmp_path / "train") is None
    (tmp_path / "val").mkdir()
    assert default_val(tmp_path / "train") == str(tmp_path / "val")
    assert default_val(tmp_path / "val") is None
    assert default_val(".") is None
    assert default_val(BUNDLED / "train") == str(BUNDLED / "val")


def test_a_replaced_image_changes_the_digest_of_contents(tmp_path):
    Image.new("L", (8, 8), 1).save(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "x/a.png")
    places = (tmp_path, tmp_path / "a.zip" / "x")
    before = [Images(place).digest(contents=True) for place in places]
    assert before == [Images(place).digest(contents=True) for place in places]
    names = [Images(place).digest() for place in places]
    time.sleep(0.01)  # a file's time has to move on
    Image.new("L", (8, 8), 2).save(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "x/a.png")
    after = [Images(place).digest(contents=True) for place in places]
    assert after[0] != before[0] and after[1] != before[1]
    assert names == [Images(place).digest() for place in places]


def test_mirroring_and_random_crops_are_decided_by_the_visit(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    images = Images(tmp_path)

    class Flags:
        seed, crop, flip = 0, "center", True

    views = [train_stage1.training_view(images, visit, 8, Flags) for visit in range(50)]
    mirrored = [np.array_equal(view, pixels[:, ::-1].transpose(2, 0, 1)) for view in views]
    assert 10 < sum(mirrored) < 40
    again = train_stage1.training_view(images, 7, 8, Flags)
    assert np.array_equal(again, views[7])


@pytest.mark.parametrize("num_workers", [0, 3])
def test_batches_come_in_order_and_errors_come_through(num_workers):
    def load(key):
        if key == 13:
            raise InputError("number 13 cannot be read")
        return np.full(2, key)

    batches = load_batches(load, [[4, 5], [6], [7, 8]], num_workers)
    assert [batch[:, 0].tolist() for batch in batches] == [[4, 5], [6], [7, 8]]
    with pytest.raises(InputError, match="number 13"):
        list(load_batches(load, [[1], [13], [2]], num_workers))


# Files


def test_save_and_load(tmp_path):
    tokenizer, ar, images = models("post", tokenizer="x" * 16, classes=list("abcde"))
    tokenizer.save(tmp_path / "t.safetensors")
    ar.save(tmp_path / "a.safetensors")
    loaded = Tokenizer.load(tmp_path / "t.safetensors")
    loaded_ar = AR.load(tmp_path / "a.safetensors")
    assert loaded.cfg == tokenizer.cfg
    assert loaded_ar.cfg == ar.cfg
    assert loaded.fingerprint() == tokenizer.fingerprint()
    codes = tokenizer.encode(images)
    assert torch.equal(loaded.encode(images), codes)
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))
    assert torch.equal(loaded_ar(codes, torch.arange(4)), ar(codes, torch.arange(4)))
    with pytest.raises(InputError, match="another tokenizer"):
        check_pair(loaded, loaded_ar)
    # Equal weights give equal files, byte by byte.
    loaded.save(tmp_path / "again.safetensors")
    first = (tmp_path / "t.safetensors").read_bytes()
    assert (tmp_path / "again.safetensors").read_bytes() == first


def test_nothing_that_is_not_finite_replaces_a_checkpoint(tmp_path):
    tokenizer, _, _ = models()
    path = tmp_path / "t.safetensors"
    tokenizer.save(path)
    good = path.read_bytes()
    tokenizer.decoder.out.bias.data[0] = torch.nan
    with pytest.raises(InputError, match="decoder.out.bias are not finite"):
        tokenizer.save(path)
    assert path.read_bytes() == good
    assert os.listdir(tmp_path) == ["t.safetensors"]


@pytest.mark.parametrize("damage, sentence", [
    (dict(cfg=dict(layout="3d")), "layout '3d' should be one of"),
    (dict(cfg=dict(layers=3)), "unexpected keyword argument 'layers'"),
    (dict(cfg=dict(patch_size=0)), "do not fit this code"),
    (dict(drop="decoder.out.bias"), "Missing key"),
    (dict(nan="decoder.out.bias"), "decoder.out.bias are not finite"),
    (dict(kind="ar"), "holds 'ar' weights where 'tokenizer' weights are needed"),
])
def test_damaged_checkpoints_get_a_sentence(tmp_path, monkeypatch, damage, sentence):
    tokenizer, _, _ = models()
    tensors = dict(tokenizer.state_dict())
    tensors.pop(damage.get("drop"), None)
    cfg = vars(tokenizer.cfg) | damage.get("cfg", {})
    path = tmp_path / "t.safetensors"
    if "nan" in damage:
        tensors[damage["nan"]] = torch.full_like(tensors[damage["nan"]], torch.nan)
        monkeypatch.setattr(torch.Tensor, "isfinite", lambda x: torch.ones_like(x).bool())
    save_checkpoint(path, damage.get("kind", "tokenizer"), tensors, cfg)
    monkeypatch.undo()
    with pytest.raises(InputError, match=sentence) as caught:
        Tokenizer.load(path)
    assert "t.safetensors" in str(caught.value)


def test_a_part_run_goes_on_and_ends_as_a_whole_file(tmp_path):
    target = tmp_path / "codes.npz"
    folder = parts_folder(target, {"seed": 0})
    assert folder != parts_folder(target, {"seed": 1})
    parts = [np.arange(12).reshape(3, 4), np.arange(12, 20).reshape(2, 4)]
    for i, rows in enumerate(parts):
        with writing(part_file(folder, i)) as temporary, open(temporary, "wb") as file:
            np.save(file, rows)
    other = parts_folder(target, {"seed": 1})  # of a run that may want to go on
    other.mkdir()
    join_parts(target, "codes", folder, 2, labels=np.arange(5), config="{}")
    with np.load(target, allow_pickle=False) as file:
        assert np.array_equal(file["codes"], np.arange(20).reshape(5, 4))
        assert np.array_equal(file["labels"], np.arange(5))
        assert str(file["config"]) == "{}"
    assert set(tmp_path.iterdir()) == {target, other}


def test_what_cannot_be_written_gets_a_sentence_and_spoils_nothing(tmp_path):
    (tmp_path / "file").write_text("whole")
    with pytest.raises(InputError, match="out cannot be written"), writing(tmp_path / "file/out"):
        pass
    with pytest.raises(InputError, match="file cannot be written"):
        with writing(tmp_path / "file") as temporary:
            temporary.write_text("ha")
            raise OSError(28, "No space left on device")
    assert (tmp_path / "file").read_text() == "whole"
    assert os.listdir(tmp_path) == ["file"]
