"""The scripts on a GPU against the same scripts on the CPU, all in one process: `python -m pytest
tests/test_gpu.py`. TEST_DEVICE=cpu puts the CPU in the GPU's place.

Products on a GPU are in TF32 and sums in another order, and a draw that was nearly a tie may give
another code. The tolerances are twice what CPU runs with operands rounded to TF32 differ by.
"""

import functools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from test_scripts import SHIPPED, TEMPORARY, log, printed

import ar
import tokenizer
import train_stage1
from pretokenize import BUNDLED, Tokens

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(),
                                reason="torch finds no CUDA here")
IMAGES = ["--data", BUNDLED / "val", "--val_data", BUNDLED / "val"]
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
CPU = ("--device", "cpu")
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


def run(name, *args):
    """What a script prints, as in a process of its own."""
    torch.compiler.reset()
    torch.backends.cudnn.allow_tf32 = True
    return printed(name, *args)


def train(name, out, *args):
    """First gradient and losses of three steps, of which the last is a resumed run's."""
    for steps in (2, 3):
        run(name, *SHORT, *args, "--out", out, "--steps", steps, "--resume")
    curves = log(out / f"{name}.jsonl")
    assert list(curves["lr"]) == [1, 2, 3]
    found = [curves["grad_norm"][1]]
    for loss in ("l1", "vq", "gan", "ce", "r1", "discriminator"):
        found += curves[loss].values()  # none where a run has no such loss
    return found


@functools.cache
def stage1(layout, *flags):
    """Folder and losses."""
    out = Path(TEMPORARY.name) / "_".join([layout, *flags])
    args = [*IMAGES, *LAYOUTS[layout], *flags]
    if layout == "post":
        args += ["--init", stage1("2d", *CPU)[0] / "tokenizer.safetensors"]
    return out, train("train_stage1", out, *args)


@pytest.mark.parametrize("layout, flags", [(layout, FP32) for layout in LAYOUTS] + [
    ("prologue", (*FP32, "--compile")), ("prologue", BF16), ("wide", (*BF16, "--compile"))])
def test_stage_1_has_the_losses_of_the_cpu(layout, flags):
    _, found = stage1(layout, *flags)
    _, expected = stage1(layout, *CPU)
    np.testing.assert_allclose(found, expected, rtol=8e-2 if "bf16" in flags else 2e-2, atol=1e-4)


def test_stage_2_has_the_codes_and_losses_of_the_cpu():
    out, _ = stage1("prologue", *CPU)
    weights = ["--tokenizer", out / "tokenizer.safetensors"]
    for name, device in (("a", "cpu"), ("b", DEVICE)):
        run("pretokenize", *IMAGES, *weights, "--out", out / name, "--device", device)
    a, b = (Tokens(out / name / "codes.safetensors").codes for name in "ab")
    assert (a == b).mean() > 0.999
    args = ["--codes", out / "a" / "codes.safetensors", *weights, "--dropout", 0]
    cpu = train("train_ar", out / "cpu", *args, *CPU)
    fp32 = train("train_ar", out / "fp32", *args, *FP32, *PARTS)
    bf16 = train("train_ar", out / "bf16", *args, *BF16, "--compile")
    np.testing.assert_allclose(fp32, cpu, rtol=1e-2)
    np.testing.assert_allclose(bf16, cpu, rtol=3e-2)


@functools.cache
def samples(*flags):
    """The file of 200 samples of the shipped pair."""
    out = Path(TEMPORARY.name) / "_".join(["samples", *flags])
    run("sample", "--pair", SHIPPED, "--out", out, "--num_samples", 200, "--batch_size", 50,
        "--columns", 2, *flags)
    return out / "samples.npz"


@pytest.mark.parametrize("flags, share", [(FP32, 0.5), ((*FP32, "--compile"), 0.5),
                                          ((*BF16, "--compile"), 0.1)])
def test_samples_are_those_of_the_cpu(flags, share):
    """With a wrong cache, mask or noise hardly any image would be."""
    cpu = np.load(samples(*CPU))["arr_0"].astype(int)
    gpu = np.load(samples(*flags))["arr_0"]
    assert (np.abs(cpu - gpu).mean((1, 2, 3)) < 1).mean() > share


def test_fid_has_the_numbers_of_the_cpu():
    cpu, gpu = (json.loads(run("fid", samples(*CPU), IMAGES[1], "--device", device))
                for device in ("cpu", DEVICE))
    for name in ("fid", "inception_score", "precision", "recall"):
        assert gpu[name] == pytest.approx(cpu[name], rel=5e-3), name
