"""Tests of tools/released.py: the official numbers of one tiny instance, and every layout against
an evaluation of the adaptive networks that folds nothing.

Tiny networks under the released names stand in for the released files: 64 x 64 pixels, N = 16,
K = 4, V = 64, P = 32, two layers, heads of 64.
"""

import json
import re
import runpy
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import released

from ar import AR
from tokenizer import Tokenizer, attention, rope, rope_angles, rope_table

LAYOUT = (ROOT / "data" / "official_layout.json").read_text()
NAMES = ("prologue-b-b", "1d", "2d", "prologue-post", "prologue-onestage")  # one of each layout


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


def write_pair(folder, name, classes=10):
    """Writes the files of a pair -> the tensors of all three."""
    parts = tiny_shapes(name)
    parts["ar"]["bos_emb.weight"] = [classes + 1, 128]
    everything = {}
    for file, (part, shapes) in zip(released.files_of(name), parts.items()):
        tensors = {key: random_tensor(f"{part}/{key}", shape) for key, shape in shapes.items()}
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / file)
        everything |= tensors
    return everything


def linear(net, name, x):
    return F.linear(x, net[f"{name}.weight"], net.get(f"{name}.bias"))


def normalize(x):
    return x / x.norm(dim=-1, keepdim=True) * x.shape[-1] ** 0.5


def adaptive(tensors, network, x, angles, causal=False):
    """A network as the authors' code evaluates it: x (1, T, in) -> (1, T + queries, out); angles
    (T + queries or more, 32)."""
    net = released.part_of(tensors, network)
    label = F.one_hot(torch.tensor(10), 11).float()  # the last one, unconditional
    c = normalize(linear(net, "cond_proj.0", label))
    c = F.gelu(c * (1 + net["cond_proj.1.weight"]), approximate="tanh")
    if "input_layer.weight" in net:
        x = linear(net, "input_layer", x)
    if "learnable_query" in net:
        x = torch.cat([x, net["learnable_query"]], 1)
    cos = angles[: x.shape[1], None].cos()  # (T + queries, 1, 32)
    sin = angles[: x.shape[1], None].sin()
    for i in range(2):
        layer = released.part_of(net, f"layers.{i}")
        h = normalize(x) * (1 + linear(layer, "adaln_1.affine", c))
        q = linear(layer, "attn1.to_q", h).unflatten(-1, (-1, 64))  # (1, T, heads, 64)
        k, v = linear(layer, "attn1.to_kv", h).unflatten(-1, (2, -1, 64)).unbind(2)
        q = normalize(q) * (1 + layer["attn1.q_norm.weight"])
        k = normalize(k) * (1 + layer["attn1.k_norm.weight"])
        h = attention(rope(q, cos, sin), rope(k, cos, sin), v, causal)
        h = linear(layer, "attn1.proj", h.flatten(2))
        x = x + linear(layer, "gate1", c) * h
        h = normalize(x) * (1 + linear(layer, "adaln_mlp.affine", c))
        a, b = linear(layer, "ffn.fc1", h).chunk(2, -1)
        h = linear(layer, "ffn.fc2", F.gelu(b, approximate="tanh") * a)
        x = x + linear(layer, "gate_mlp", c) * h
    if "out.weight" in net:
        x = normalize(x) * (1 + linear(net, "out_norm.affine", c))
        x = linear(net, "out", x)
    return x


def run(monkeypatch, script, *words):
    """Runs a script in this process, as from the command line."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
    runpy.run_path(str(ROOT / script), run_name="__main__")


def import_pair(monkeypatch, name, folder):
    run(monkeypatch, "tools/released.py", name, "--from", folder, "--out", folder)
    return Tokenizer.load(folder / "tokenizer.safetensors"), AR.load(folder / "ar.safetensors")


def assert_close(actual, expected):
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=0, atol=1e-4)


def test_official_numbers_and_the_scripts(tmp_path, monkeypatch):
    write_pair(tmp_path, "prologue-b-b")
    tokenizer, ar = import_pair(monkeypatch, "prologue-b-b", tmp_path)
    line = torch.arange(64) / 64
    b = torch.arange(2).view(2, 1, 1, 1)
    k = torch.arange(3).view(3, 1, 1)
    images = 0.9 * torch.sin(6.28 * ((b + 1) * line + (k + 1) * line[:, None]) + k)
    labels = torch.tensor([3, 7])
    expected = json.loads(LAYOUT)["expected"]
    codes = tokenizer.encode(images)
    assert codes.tolist() == expected["codes"]
    greedy = ar.generate(labels, cfg_prologue=0.7, cfg_visual=3.75, cfg_power=0.2, top_k=1)
    assert ar.sequence(greedy).tolist() == expected["greedy_tokens"]
    assert_close(tokenizer.decode(codes)[1, :, 10, ::8].flatten(), expected["decoded"])
    assert_close(ar(codes, labels)[1, ::5, ::13].flatten(), expected["logits"])

    run(monkeypatch, "sample.py", "--out", tmp_path, "--num_samples", 3, "--columns", 1)
    samples = np.load(tmp_path / "samples.npz")
    assert samples["arr_0"].shape == (3, 64, 64, 3)
    assert json.loads(str(samples["how"]))["preset"] == "prologue-b-b"
    (tmp_path / "data").mkdir()
    Image.new("RGB", (90, 80)).save(tmp_path / "data" / "0.png")
    run(monkeypatch, "pretokenize.py", "--data", tmp_path / "data", "--out", tmp_path)
    assert load_file(tmp_path / "codes.safetensors")["codes"].shape == (1, 1, 20)


@pytest.mark.parametrize("name", NAMES)
def test_layouts_equal_the_adaptive_networks(name, tmp_path, monkeypatch):
    tensors = write_pair(tmp_path, name)
    tokenizer, ar = import_pair(monkeypatch, name, tmp_path)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1

    patches = image.view(3, 4, 16, 4, 16).permute(1, 3, 2, 4, 0).reshape(1, 16, 768)
    angles = rope_table(grid=4, line=16, head_dim=64)  # (32, 32)
    h = adaptive(tensors, "enc", patches, angles)
    if name == "1d":
        h = h[:, 16:]
    q, codes, _ = tokenizer.visual_quantizer(h[:, :16])
    if name == "prologue-post":
        h = adaptive(tensors, "semantic_enc", h, angles)
    if "prologue" in name:
        codes = torch.cat([tokenizer.prologue_quantizer(h[:, 16:])[1], codes], 1)
    assert torch.equal(tokenizer.encode(image), codes)

    if name == "1d":  # first the codes, a line, and then the grid of queries
        angles = angles.roll(16, 0)
    patches = adaptive(tensors, "dec", q, angles)[0, -16:].view(4, 4, 16, 16, 3)
    assert_close(tokenizer.decode(codes)[0], patches.permute(4, 0, 2, 1, 3).reshape(3, 64, 64))

    tokens = ar.sequence(codes)
    first = tensors["bos_emb.weight"][[2]]  # (1, D)
    x = torch.cat([first[None], tensors["semantic_emb.weight"][tokens]], 1)
    angles = F.pad(rope_angles(torch.arange(100), 24, 10000.0), (0, 20))  # only l turns
    logits = adaptive(tensors, "ar_model", x[:, :-1], angles, causal=True)
    assert_close(ar(codes, torch.tensor([2])), logits)


def test_download_and_class_names(tmp_path, monkeypatch):
    hub = SimpleNamespace(hf_hub_download=lambda repository, file: tmp_path / repository / file)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    write_pair(tmp_path / "Zyriix" / "prologue", "2d", classes=1000)
    run(monkeypatch, "tools/released.py", "2d", "--out", tmp_path)
    classes = AR.load(tmp_path / "ar.safetensors").cfg.classes
    assert [classes[i] for i in (0, 207, 999)] == ["tench", "golden retriever", "toilet tissue"]
    assert len({name.lower() for name in classes}) == 1000


def test_files(tmp_path, monkeypatch):
    files = released.files_of("prologue-l-xl") + released.files_of("prologue-onestage")
    assert [file.removesuffix(".safetensors") for file in files] == [
        "prologue-l-tokenizer/model_2",
        "prologue-l-tokenizer/model_3",
        "ar-prologue-l-xl/model",
        "prologue-onestage-joint/model",
        "prologue-onestage-joint/model_1",
        "prologue-onestage-joint/model_5",
    ]
    with pytest.raises(SystemExit, match="1d-tokenizer/model_2.safetensors does not exist: --from"):
        import_pair(monkeypatch, "1d", tmp_path)
