"""Pairs that tools/released.py makes of tiny networks under the released names: 64 x 64 pixels,
N = 16, K = 4, V = 64, P = 32, two layers, heads of 64."""

import json
import re
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_scripts import ROOT, call

import released
from sample import default_preset, load_pair

LAYOUT = (ROOT / "data" / "official_layout.json").read_text()
LINE = torch.arange(64) / 64
B = torch.arange(2).view(2, 1, 1, 1)
C = torch.arange(3).view(3, 1, 1)
IMAGES = 0.9 * torch.sin(6.28 * ((B + 1) * LINE + (C + 1) * LINE[:, None]) + C)
# For layouts without official numbers projections of codes, pixels and logits, as evaluated with
# all adaptive norms and gates in place, nothing folded (this file at 6f04421)
PROJECTIONS = {
    "1d": (83.8469, -18.8984, 6.7293),
    "2d": (12.4042, 96.2434, 41.8243),
    "prologue-post": (76.5727, 96.2434, 79.1158),
}


def tiny_shapes(name):
    """{name: shape} of encoder, decoder and AR model: those of the prologue layout, for which there
    are official numbers, and what other layouts have more or less."""
    parts = json.loads(LAYOUT)["shapes"]
    enc, dec, ar = parts.values()
    if name in ("1d", "2d"):
        for key in [key for key in enc if "semantic" in key]:
            del enc[key]
        ar |= {"semantic_emb.weight": [64, 128], "ar_model.out.weight": [64, 128]}
    if name == "1d":
        enc["enc.learnable_query"] = dec["dec.learnable_query"] = [1, 16, 128]
    if name != "prologue-b-b":  # the decoder is wider than the encoder
        sizes = {128: 192, 256: 384, 341: 512, 682: 1024}
        dec |= {key: [sizes.get(n, n) for n in shape] for key, shape in dec.items()}
    if name in ("2d", "prologue-post"):
        del enc["enc.learnable_query"]
    if name == "prologue-post":  # a second encoder, of width 64, reads what the first one makes
        sizes = {768: 128, 128: 64, 256: 128, 341: 176, 682: 352}
        for key, shape in released.part_of(enc, "enc").items():
            enc[f"semantic_enc.{key}"] = [sizes.get(n, n) for n in shape]
        enc["semantic_enc.learnable_query"] = [1, 4, 64]
        enc["semantic_quantizer.proj_in.weight"] = [14, 64]
    return parts


def random_tensor(name, shape):
    """By the recipe that data/official_layout.json states."""
    scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.05
    if re.search("gate|affine|cond_proj|norm.weight", name):
        scale = 0.3
    elif "embedding" in name:
        scale = 1.0
    seed = zlib.crc32(f"prologue/{name}".encode()) & 0x7FFFFFFF
    draw = np.random.RandomState(seed).standard_normal(shape) * scale
    return torch.from_numpy(draw).float()


def write_pair(folder, name, classes):
    """Writes the files of a pair."""
    parts = tiny_shapes(name)
    parts["ar"]["bos_emb.weight"] = [classes + 1, 128]
    for file, (part, shapes) in zip(released.files_of(name), parts.items()):
        tensors = {key: random_tensor(f"{part}/{key}", shape) for key, shape in shapes.items()}
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / file)


def test_official_numbers(tmp_path):
    write_pair(tmp_path, "prologue-b-b", classes=10)
    call("released", "prologue-b-b", "--from", tmp_path, "--out", tmp_path)
    tokenizer, ar = load_pair(tmp_path, "cpu")
    labels = torch.tensor([3, 7])
    expected = json.loads(LAYOUT)["expected"]
    codes = tokenizer.encode(IMAGES)
    assert codes.tolist() == expected["codes"]
    greedy = ar.generate(labels, cfg_prologue=0.7, cfg_visual=3.75, cfg_power=0.2, top_k=1)
    assert ar.sequence(greedy).tolist() == expected["greedy_tokens"]
    decoded = tokenizer.decode(codes)[1, :, 10, ::8].flatten()
    assert decoded.tolist() == pytest.approx(expected["decoded"], abs=1e-4)
    logits = ar(codes, labels)[1, ::5, ::13].flatten()
    assert logits.tolist() == pytest.approx(expected["logits"], abs=1e-4)
    assert default_preset(ar) == "prologue-b-b"


@pytest.mark.parametrize("name", PROJECTIONS)
def test_downloaded_files_of_other_layouts(name, tmp_path, monkeypatch):
    hub = SimpleNamespace(hf_hub_download=lambda repository, file: tmp_path / repository / file)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    write_pair(tmp_path / "Zyriix" / "prologue", name, classes=1000)
    call("released", name, "--out", tmp_path)
    tokenizer, ar = load_pair(tmp_path, "cpu")
    codes = tokenizer.encode(IMAGES[1:])
    numbers = [codes, tokenizer.decode(codes), ar(codes, torch.tensor([2]))]
    found = [(x.flatten().double() @ torch.arange(x.numel()).double().cos()).item()
             for x in numbers]
    assert found == pytest.approx(PROJECTIONS[name], abs=5e-3)
    classes = ar.config.classes
    assert [classes[i] for i in (0, 207, 999)] == ["tench", "golden retriever", "toilet tissue"]
    assert len({name.lower() for name in classes}) == 1000


def test_files():
    files = [*released.files_of("prologue-l-xl"), *released.files_of("prologue-onestage")]
    assert [file.removesuffix(".safetensors") for file in files] == [
        "prologue-l-tokenizer/model_2", "prologue-l-tokenizer/model_3", "ar-prologue-l-xl/model",
        *(f"prologue-onestage-joint/{name}" for name in ("model", "model_1", "model_5"))]
