"""The tests that explain: shapes, gradient routing, sampling. `python -m pytest test_all.py`

Tiny models with random weights. tests/ has what protects the rest: losses, files, the scripts as
a user runs them, the released checkpoints, fid.py.
"""

from dataclasses import replace

import pytest
import torch

from ar import AR, ARConfig, guidance, sample_codes
from tokenizer import LAYOUTS, Tokenizer, TokenizerConfig
from train_stage1 import Stage1

# N = 16 visual tokens of V = 64 codes, K = 3 prologue tokens of P = 12 codes
CONFIG = TokenizerConfig(image_size=32, patch_size=8, encoder=(2, 64), decoder=(2, 64),
                         post=(1, 64), head_dim=32, codebook_size=64, code_dim=6, num_prologue=3,
                         prologue_codebook_size=12)
K, N, V, P = 3, 16, 64, 12
LABELS = torch.zeros(4, dtype=torch.int64)


def models(layout="prologue"):
    """A tokenizer and an AR model of five classes with random weights, and four images."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(replace(CONFIG, layout=layout)).eval()
    ar = AR(ARConfig.for_tokenizer(tokenizer.config, layers=2, dim=64, head_dim=32, num_classes=5))
    ar.eval()
    for p in ar.parameters():  # wide weights, so that logits differ enough to be told apart
        p.data += 0.3 * torch.randn_like(p)
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    return tokenizer, ar, images


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes(layout):
    tokenizer, ar, images = models(layout)
    k = K if layout in ("prologue", "post") else 0
    codes = tokenizer.encode(images)
    assert codes.shape == (4, k + N)
    assert codes[:, k:].max() < V
    assert k == 0 or codes[:, :k].max() < P
    # The decoder sees visual codes only.
    assert tokenizer.decode(codes).shape == (4, 3, 32, 32)
    assert torch.equal(tokenizer.decode(codes), tokenizer.decode(codes[:, k:]))
    reconstruction, training_codes, onehot, _ = tokenizer(images)
    assert torch.equal(training_codes, codes)
    assert (reconstruction is None) == (layout == "post")  # its visual path is frozen
    assert (onehot is None) == (k == 0)
    assert onehot is None or onehot.shape == (4, K, P)

    shape = (4, k + 1 + N, V + P + 1) if k > 0 else (4, N, V)
    assert ar(codes, torch.arange(4)).shape == shape


def gradients(loss, model):
    """{name: gradient} of the parameters that the loss reaches."""
    names, parameters = zip(*model.named_parameters())
    found = zip(names, torch.autograd.grad(loss, parameters, allow_unused=True))
    return {name: grad for name, grad in found if grad is not None and grad.abs().sum() > 0}


def test_cross_entropy_reaches_the_prologue_path_only():
    tokenizer, ar, images = models()
    stage1 = Stage1(tokenizer, ar, ce_weight=3.0)
    drop = torch.tensor([True, False, True, False])
    _, _, ce = stage1(images, LABELS, drop)
    reached = gradients(ce, stage1)
    for name in reached:
        assert not name.startswith(("tokenizer.decoder", "tokenizer.visual_quantizer")), name
    for name in ("tokenizer.encoder.queries", "tokenizer.encoder.input.weight",
                 "tokenizer.encoder.transformer.blocks.0.attn.qkv.weight",
                 "tokenizer.prologue_quantizer.proj.weight",
                 "tokenizer.prologue_quantizer.codebook", "ar.token_embedding.weight"):
        assert name in reached, name


def test_reconstruction_never_reaches_the_prologue_codebook():
    tokenizer, ar, images = models()
    stage1 = Stage1(tokenizer, ar, ce_weight=3.0)
    drop = torch.zeros(4, dtype=torch.bool)

    reconstruction, losses, _ = stage1(images, LABELS, drop)
    reached = gradients((reconstruction - images).abs().mean() + sum(losses.values()), stage1)
    assert "tokenizer.visual_quantizer.codebook" in reached
    for name in reached:
        assert "prologue" not in name and not name.startswith("ar."), name

    # Pixels alone go straight through the visual codes, and leave their codebook to the VQ loss.
    reconstruction, _, _ = stage1(images, LABELS, drop)
    reached = gradients((reconstruction - images).abs().mean(), stage1)
    assert "tokenizer.decoder.out.weight" in reached
    assert "tokenizer.encoder.input.weight" in reached
    assert "tokenizer.visual_quantizer.codebook" not in reached


def test_lambda_scales_the_encoder_and_not_the_ar():
    tokenizer, ar, images = models()
    drop = torch.tensor([True, False, True, False])
    reached = {}
    for ce_weight in (1.0, 3.0):
        stage1 = Stage1(tokenizer, ar, ce_weight)
        _, _, ce = stage1(images, LABELS, drop)
        reached[ce_weight] = gradients(ce, stage1)
    for name, gradient in reached[3.0].items():
        expected = reached[1.0][name]
        if name.startswith("tokenizer"):
            expected = 3 * expected
        tolerance = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=tolerance, msg=name)


def test_dropped_visual_tokens_are_hidden_from_the_ar():
    tokenizer, ar, images = models()
    codes = tokenizer.encode(images)
    other = torch.cat([codes[:, :K], (codes[:, K:] + 1) % V], 1)  # the prologue stays
    drop = torch.tensor([True, True, False, False])
    a = ar(codes, LABELS, drop=drop)
    b = ar(other, LABELS, drop=drop)
    assert torch.equal(a[:2], b[:2])
    assert not torch.equal(a[2:], b[2:])


@pytest.mark.parametrize("layout", ["prologue", "2d"])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.7, 3.0), (1.0, 2.0), (1.5, 1.0)])
def test_generate_equals_the_plain_uncached_path(layout, schedule, scales):
    """Each code is drawn from the guided mix of two uncached passes over the whole sequence, with
    class and without, cut to the logits of its codebook."""
    _, ar, _ = models(layout)
    k = ar.config.num_prologue
    labels = torch.tensor([0, 3, 4])
    noise = torch.rand(3, k + N, generator=torch.Generator().manual_seed(1))
    cfg_prologue, cfg_visual = scales
    codes = ar.generate(labels, cfg_prologue, cfg_visual, schedule, cfg_power=0.5, noise=noise)
    with_class = ar(codes, labels)  # (3, L, vocabulary)
    without = ar(codes, torch.full_like(labels, ar.no_class))
    for i in range(k + N):
        position = i if i < k or k == 0 else i + 1  # EOS stands between the groups
        if i < k:
            scale = cfg_prologue
            allowed = slice(V, V + P)
        else:
            t = (position - k) / (1 + N) if k > 0 else i / N
            scale = guidance(cfg_visual, schedule, 0.5, t)
            allowed = slice(0, V)
        logits = scale * with_class + (1 - scale) * without
        drawn = sample_codes(logits[:, position, allowed], noise[:, i])
        assert torch.equal(codes[:, i], drawn)
