"""Tests on a GPU: the scripts there against the same scripts on the CPU, compiled against eager.

    python -m pytest tests/test_gpu.py      # all are skipped where torch finds no CUDA

Products there are in TF32 and sums in another order, so numbers agree to about three digits, and a
draw that was nearly a tie may give another code. The tolerances are those of CPU runs with operands
rounded to TF32, with room above.
"""

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import tokenizer as tokenizer_file
from tokenizer import attention

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA here")

TEMPORARY = tempfile.TemporaryDirectory()  # gone when the tests end
SHORT = ["--log_every", 1, "--warmup", 1]
LAYOUTS = {
    "prologue": [],
    "2d": ["--layout", "2d"],
    "post": ["--layout", "post"],
    "1d": ["--layout", "1d", "--direct_ce", "--tau", 1, "--ce_weight", 0.3],
    "onestage": ["--onestage"],
}


def run(name, *args, ranks=1):
    """Runs a script, under torchrun for several ranks; returns what it printed."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
    command = [str(word) for word in (*launcher, ROOT / name, *args)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@functools.cache
def train(layout, *flags, ranks=1):
    """The folder of three steps of stage 1 with these flags, which are strings."""
    name = " ".join([layout, *flags, str(ranks)]).replace(" ", "_")
    out = Path(TEMPORARY.name) / name
    args = [*LAYOUTS[layout], *flags]
    if layout == "post":
        args += ["--init", train("2d", "--device", "cpu") / "tokenizer.safetensors"]
    # A low rate, because AdamW's first step is the sign of the gradient: there roundings grow
    run("train_stage1.py", "--out", out, "--steps", 3, "--lr", 5e-5, "--eval_images", 64, *SHORT,
        *args, ranks=ranks)
    return out


def losses(path):
    """{name: [its values, step by step]} of the terms in a log."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [line for line in lines if "lr" in line]
    names = [name for name in ("l1", "vq", "gan", "ce", "discriminator") if name in steps[0]]
    return {name: [line[name] for line in steps] for name in names}


def assert_close(a, b, rtol):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stage_1_has_the_losses_of_the_cpu(layout):
    cpu = losses(train(layout, "--device", "cpu") / "train_stage1.jsonl")
    for flags in (["--dtype", "fp32"], ["--dtype", "fp32", "--compile"]):
        gpu = losses(train(layout, "--device", DEVICE, *flags) / "train_stage1.jsonl")
        assert_close(gpu, cpu, rtol=5e-3)
    bf16 = losses(train(layout, "--device", DEVICE, "--dtype", "bf16") / "train_stage1.jsonl")
    assert_close(bf16, cpu, rtol=2e-2)


def test_stage_2_has_the_losses_of_the_cpu_and_resumes():
    out = train("prologue", "--device", "cpu")
    run("pretokenize.py", "--out", out, "--device", DEVICE)
    logs = {}
    for name, flags in {
        "cpu": ["--device", "cpu"],
        "fp32": ["--device", DEVICE, "--dtype", "fp32"],
        "compiled": ["--device", DEVICE, "--dtype", "fp32", "--compile"],
        "bf16": ["--device", DEVICE, "--dtype", "bf16"],
    }.items():
        args = ["--tokenizer", out / "tokenizer.safetensors", "--codes", out / "codes.npz",
                "--dropout", 0, *SHORT, *flags, "--out", out / name]
        run("train_ar.py", "--steps", 3, *args)
        text = run("train_ar.py", "--steps", 4, "--resume", *args)
        assert "going on from step 3" in text
        logs[name] = losses(out / name / "train_ar.jsonl")
        assert len(logs[name]["ce"]) == 4
    assert_close(logs["fp32"], logs["cpu"], rtol=2e-3)
    assert_close(logs["compiled"], logs["cpu"], rtol=2e-3)
    assert_close(logs["bf16"], logs["cpu"], rtol=2e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")
def test_two_gpus_have_the_losses_of_one():
    flags = ["--device", DEVICE, "--dtype", "fp32", "--gan_weight", "0"]  # no BatchNorm
    one = train("prologue", *flags)
    two = train("prologue", *flags, ranks=2)
    assert_close(losses(two / "train_stage1.jsonl"), losses(one / "train_stage1.jsonl"), rtol=2e-3)


@functools.cache
def samples(*flags):
    """300 samples of the shipped pair as uint8 (300, 28, 28, 3)."""
    out = Path(TEMPORARY.name) / " ".join(["samples", *flags]).replace(" ", "_")
    run("sample.py", "--num", 300, "--out", out, *flags)
    with np.load(out / "samples.npz") as file:
        return file["arr_0"]


@pytest.mark.parametrize("flags, share", [([], 0.5), (["--compile"], 0.5),
                                          (["--dtype", "bf16"], 0.1),
                                          (["--dtype", "bf16", "--compile"], 0.1)])
def test_samples_are_those_of_the_cpu(flags, share):
    """With a wrong cache, mask or noise hardly any image would be."""
    cpu = samples("--device", "cpu").astype(int)
    gpu = samples("--device", DEVICE, *flags).astype(int)
    alike = np.abs(cpu - gpu).mean((1, 2, 3)) < 1
    assert alike.mean() > share


def test_fid_has_the_numbers_of_the_cpu():
    samples("--device", "cpu")
    file = Path(TEMPORARY.name) / "samples_--device_cpu" / "samples.npz"
    scores = {}
    for device in ("cpu", DEVICE):
        text = run("fid.py", file, "--device", device, "--json")
        scores[device] = json.loads(text.splitlines()[-1])
    for name in ("fid", "inception_score", "precision", "recall", "class_consistency"):
        assert scores[DEVICE][name] == pytest.approx(scores["cpu"][name], rel=5e-3), name


@pytest.mark.skipif(tokenizer_file.flash_attn_func is None, reason="flash-attn is not installed")
@pytest.mark.parametrize("causal", [False, True])
def test_flash_attn_is_the_attention_of_torch(causal, monkeypatch):
    q, k, v = torch.randn(3, 2, 65, 4, 64, device=DEVICE, dtype=torch.bfloat16)
    flash = attention(q, k, v, causal)
    monkeypatch.setattr(tokenizer_file, "flash_attn_func", None)
    torch.testing.assert_close(flash, attention(q, k, v, causal), rtol=2e-2, atol=2e-2)
