"""The scripts on a GPU against the same scripts on the CPU, all in one process: `python -m pytest
tests/test_gpu.py`. TEST_DEVICE=cpu puts the CPU in the GPU's place.

Products on a GPU are in TF32 and sums in another order, and a draw that was nearly a tie may give
another code. The tolerances are twice what CPU runs with operands rounded to TF32 differ by.
"""

import functools
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, f"{os.path.dirname(__file__)}/..")

import ar
import fid
import pretokenize
import sample
import tokenizer
import train_ar
import train_stage1

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(),
                                reason="torch finds no CUDA here")
TEMPORARY = tempfile.TemporaryDirectory()  # gone when the tests end
IMAGES = ["--data", pretokenize.BUNDLED / "val", "--val_data", pretokenize.BUNDLED / "val"]
# A low rate, because AdamW's first step is the sign of the gradient: there roundings grow
SHORT = ["--batch_size", 16, "--lr", 2e-5, "--warmup", 1, "--log_every", 1, "--eval_images", 64]
PARTS = ["--micro_batch_size", 8, "--gradient_checkpointing"]
LAYOUTS = {
    "prologue": [],
    "2d": ["--layout", "2d"],
    "post": ["--layout", "post"],
    "1d": ["--layout", "1d", "--direct_ce", "--tau", 1, "--ce_weight", 0.3],
    "onestage": ["--onestage", *PARTS],
    "wide": ["--size", "wide", "--ar_size", "wide", *PARTS],
}
FP32 = ("--device", DEVICE, "--dtype", "fp32")
BF16 = ("--device", DEVICE, "--dtype", "bf16")


@pytest.fixture(scope="module", autouse=True)
def wide_networks_and_r1_in_every_second_step():
    with pytest.MonkeyPatch.context() as patch:
        wide = dict(tokenizer.SIZES["tiny"], encoder=(1, 768), decoder=(1, 768), head_dim=64)
        patch.setitem(tokenizer.SIZES, "wide", wide)
        patch.setitem(ar.SIZES, "wide", dict(layers=1, dim=768))
        patch.setattr(train_stage1, "R1_EVERY", 2)
        if DEVICE == "cpu":  # no compiler: the graphs run as they are
            patch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        yield


def run(script, *args):
    """Calls main as in a process of its own."""
    torch.compiler.reset()
    torch.backends.cudnn.allow_tf32 = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__name__, *map(str, args)])
        script.main()


def train(script, out, *args):
    """First gradient and losses of three steps, of which the last is a resumed run's."""
    log = out / f"{script.__name__}.jsonl"
    text = ""
    for steps in (2, 3):
        run(script, *SHORT, *args, "--out", out, "--steps", steps, "--resume")
        assert log.read_text().startswith(text)  # its times as well: no step was made again
        text = log.read_text()
    lines = [json.loads(line) for line in text.splitlines() if "images_per_s" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    names = {"l1", "vq", "gan", "ce", "r1", "discriminator"} & set(lines[0])
    return [lines[0]["grad_norm"]] + [line[name] for line in lines for name in sorted(names)]


@functools.cache
def stage1(layout, *flags):
    """Folder and losses."""
    out = Path(TEMPORARY.name) / "_".join([layout, *flags])
    args = [*IMAGES, *LAYOUTS[layout], *flags]
    if layout == "post":
        args += ["--init", stage1("2d", "--device", "cpu")[0] / "tokenizer.safetensors"]
    return out, train(train_stage1, out, *args)


@pytest.mark.parametrize("layout, flags", [(layout, FP32) for layout in LAYOUTS] + [
    ("prologue", (*FP32, "--compile")), ("prologue", BF16), ("wide", (*BF16, "--compile"))])
def test_stage_1_has_the_losses_of_the_cpu(layout, flags):
    _, found = stage1(layout, *flags)
    _, expected = stage1(layout, "--device", "cpu")
    np.testing.assert_allclose(found, expected, rtol=8e-2 if "bf16" in flags else 2e-2, atol=1e-4)


def test_stage_2_has_the_codes_and_losses_of_the_cpu():
    out, _ = stage1("prologue", "--device", "cpu")
    weights = ["--tokenizer", out / "tokenizer.safetensors"]
    for name, device in (("a", "cpu"), ("b", DEVICE)):
        run(pretokenize, *IMAGES, *weights, "--out", out / name, "--device", device)
    a, b = (train_ar.Tokens(out / name / "codes.safetensors").codes for name in "ab")
    assert (a == b).mean() > 0.999
    args = ["--codes", out / "a" / "codes.safetensors", *weights, "--dropout", 0]
    cpu = train(train_ar, out / "cpu", *args, "--device", "cpu")
    fp32 = train(train_ar, out / "fp32", *args, *FP32, *PARTS)
    bf16 = train(train_ar, out / "bf16", *args, *BF16, "--compile")
    np.testing.assert_allclose(fp32, cpu, rtol=1e-2)
    np.testing.assert_allclose(bf16, cpu, rtol=3e-2)


def test_one_rank_of_ddp_has_the_gradients_of_none():
    """Of compiled blocks of over 1 MiB; on a GPU by NCCL."""
    model = tokenizer.Transformer(2, 768, 64, 8 / 3, bias=True).to(DEVICE)
    x = torch.randn(4, 8, 768, device=DEVICE)

    def gradient(forward):
        model.zero_grad()
        forward(x, x[0, :, :32]).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    expected = gradient(model)
    tokenizer.compile_blocks(model)
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    found = gradient(torch.nn.parallel.DistributedDataParallel(model))
    dist.destroy_process_group()
    assert (found - expected).norm() < 5e-3 * expected.norm()


@functools.cache
def samples(*flags):
    """The file of 200 samples of the shipped pair."""
    out = Path(TEMPORARY.name) / "_".join(["samples", *flags])
    run(sample, "--pair", sample.SHIPPED, "--out", out, "--num_samples", 200, "--batch_size", 50,
        "--columns", 2, *flags)
    return out / "samples.npz"


@pytest.mark.parametrize("flags, share", [(FP32, 0.5), ((*FP32, "--compile"), 0.5),
                                          ((*BF16, "--compile"), 0.1)])
def test_samples_are_those_of_the_cpu(flags, share):
    """With a wrong cache, mask or noise hardly any image would be."""
    cpu = np.load(samples("--device", "cpu"))["arr_0"].astype(int)
    gpu = np.load(samples(*flags))["arr_0"]
    assert (np.abs(cpu - gpu).mean((1, 2, 3)) < 1).mean() > share


def test_fid_has_the_numbers_of_the_cpu(capsys):
    scores = []
    for device in ("cpu", DEVICE):
        run(fid, samples("--device", "cpu"), IMAGES[1], "--device", device)
        scores.append(json.loads(capsys.readouterr().out))
    for name in ("fid", "inception_score", "precision", "recall"):
        assert scores[1][name] == pytest.approx(scores[0][name], rel=5e-3), name


@pytest.mark.skipif(tokenizer.flash_attn_func is None, reason="flash-attn is not installed")
def test_flash_attn_is_the_attention_of_torch(monkeypatch):
    q, k, v = torch.randn(3, 2, 65, 4, 64, device=DEVICE, dtype=torch.bfloat16)
    flash = tokenizer.attention(q, k, v, causal=True)
    monkeypatch.setattr(tokenizer, "flash_attn_func", None)
    torch.testing.assert_close(flash, tokenizer.attention(q, k, v, True), rtol=2e-2, atol=2e-2)
