"""The tests: shapes, gradient routing, sampling, exactness. `python -m pytest test_all.py`.

Tiny models with random weights. The scripts, the parts and the released format have tests of their own in tools/.
"""
from dataclasses import replace

import pytest
import torch

from ar import AR, ARConfig, guidance, sample_codes
from tokenizer import LAYOUTS, Tokenizer, TokenizerConfig
from train_stage1 import Stage1

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
    grads = gradients(stage1(images, torch.zeros(4).long(), torch.tensor([True, False, True, False]))[3], stage1)
    assert not [n for n in grads if n.startswith(("tokenizer.decoder", "tokenizer.visual_quantizer"))]
    for name in ("tokenizer.encoder.queries", "tokenizer.prologue_quantizer.codebook", "tokenizer.prologue_quantizer.proj.weight",
                 "tokenizer.encoder.input.weight", "tokenizer.encoder.transformer.blocks.0.attn.qkv.weight",
                 "ar.embedding.weight"):
        assert name in grads, name


def test_reconstruction_never_reaches_the_prologue_codebook():
    tokenizer, ar, images = models()
    stage1, drop = Stage1(tokenizer, ar, ce_weight=3.0), torch.zeros(4, dtype=torch.bool)
    reconstruction, _, vq_loss, _ = stage1(images, torch.zeros(4).long(), drop)
    both = gradients((reconstruction - images).abs().mean() + vq_loss, stage1)
    assert not [n for n in both if "prologue" in n or n.startswith("ar.")] and "tokenizer.visual_quantizer.codebook" in both
    straight_through = gradients((stage1(images, torch.zeros(4).long(), drop)[0] - images).abs().mean(), stage1)
    assert {"tokenizer.decoder.out.weight", "tokenizer.encoder.input.weight"} <= set(straight_through)


def test_lambda_scales_the_encoder_and_not_the_ar():
    tokenizer, ar, images = models()
    drop = torch.tensor([True, False, True, False])
    one = gradients(Stage1(tokenizer, ar, 1.0)(images, torch.zeros(4).long(), drop)[3], stage1 := Stage1(tokenizer, ar, 1.0))
    one = {n: g.clone() for n, g in one.items()}
    three = gradients(Stage1(tokenizer, ar, 3.0)(images, torch.zeros(4).long(), drop)[3], stage1)
    for name, grad in three.items():
        expected = one[name] * (3 if name.startswith("tokenizer") else 1)
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()), msg=name)


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
