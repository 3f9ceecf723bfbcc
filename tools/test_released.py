"""Tests that the released checkpoints load: the official numbers of one tiny instance, and every layout against an
unfolded evaluation of random weights with random conditioning.

    python -m pytest tools/test_released.py
"""
import json
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from ar import AR
from common import InputError
from tokenizer import LAYOUTS, Tokenizer


def official_weights(shapes, part):
    """The tiny official instance's weights, by the recipe that data/official_layout.json states."""
    weights = {}
    for key, shape in shapes.items():
        draw = np.random.RandomState(zlib.crc32(f"prologue/{part}/{key}".encode()) & 0x7FFFFFFF).standard_normal(shape)
        scale = 0.3 if any(word in key for word in ("gate", "affine", "cond_proj", "norm.weight")) else \
            1.0 if "embedding" in key else shape[-1]**-0.5 if len(shape) > 1 else 0.05
        weights[key] = torch.from_numpy((draw * scale * ("pos_select_mask" not in key)).astype(np.float32))
    return weights


def write_shards(directory, shards):
    directory.mkdir(parents=True)
    for number, tensors in shards.items():
        safetensors.torch.save_file({k: v.clone() for k, v in tensors.items()},
                                    directory / (f"model_{number}.safetensors" if number else "model.safetensors"))


def test_released_weights_give_the_official_numbers(tmp_path):
    reference = json.loads((ROOT / "data" / "official_layout.json").read_text())
    enc, dec, ar = (official_weights(reference["shapes"][part], part) for part in ("enc", "dec", "ar"))
    write_shards(tmp_path / "tok", {0: {name: w + 1 for name, w in enc.items()}, 1: ar, 2: enc, 3: dec})
    write_shards(tmp_path / "ar", {0: ar})
    before = (tmp_path / "ar" / "model.safetensors").read_bytes()
    tokenizer = Tokenizer.load(tmp_path / "tok")
    ar = AR.load(tmp_path / "ar", tokenizer)
    row, col = torch.meshgrid(torch.arange(64) / 64, torch.arange(64) / 64, indexing="ij")
    images = [[0.9 * torch.sin(6.28 * ((b + 1) * col + (k + 1) * row) + k) for k in range(3)] for b in range(2)]
    images = torch.stack([torch.stack(image) for image in images])
    codes, labels, expected = tokenizer.encode(images), torch.tensor([3, 7]), reference["expected"]
    assert codes.tolist() == expected["codes"]
    close = dict(rtol=0, atol=1e-4)
    torch.testing.assert_close(tokenizer.decode(codes)[1, :, 10, ::8].flatten(), torch.tensor(expected["decoded"]), **close)
    torch.testing.assert_close(ar(codes, labels)[1, ::5, ::13].flatten(), torch.tensor(expected["logits"]), **close)
    greedy = ar.generate(labels, cfg_prologue=0.7, cfg_visual=3.75, cfg_power=0.2, top_k=1)
    assert ar.sequence(greedy).tolist() == expected["greedy_tokens"]
    assert (tmp_path / "ar" / "model.safetensors").read_bytes() == before


def random_network(prefix, in_dim, dim, hidden, biases, queries=0, out=None, cond=8, classes=6, layers=2, head=32):
    """A network with the released names, random weights and random conditioning."""
    shapes = {"cond_proj.0.weight": (cond, classes), "cond_proj.0.bias": (cond,), "cond_proj.1.weight": (cond,)}
    for i in range(layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in {
            "adaln_1.affine.weight": (dim, cond), "adaln_1.affine.bias": (dim,), "adaln_mlp.affine.weight": (dim, cond),
            "adaln_mlp.affine.bias": (dim,), "attn1.q_norm.weight": (head,), "attn1.k_norm.weight": (head,),
            "attn1.to_q.weight": (dim, dim), "attn1.to_kv.weight": (2 * dim, dim), "attn1.proj.weight": (dim, dim),
            "gate1.weight": (dim, cond), "gate_mlp.weight": (dim, cond), "ffn.fc1.weight": (2 * hidden, dim),
            "ffn.fc2.weight": (dim, hidden)}.items()}
        if biases:
            shapes |= {f"layers.{i}.{name}.bias": (size,) for name, size in {
                "attn1.proj": dim, "gate1": dim, "gate_mlp": dim, "ffn.fc1": 2 * hidden, "ffn.fc2": dim}.items()}
    if in_dim:
        shapes |= {"input_layer.weight": (dim, in_dim), "input_layer.bias": (dim,)}
    if queries:
        shapes["learnable_query"] = (1, queries, dim)
    if out:
        shapes |= {"out_norm.affine.weight": (dim, cond), "out_norm.affine.bias": (dim,), "out.weight": (out, dim)}
        shapes |= {"out.bias": (out,)} if biases else {}
    return {f"{prefix}.{name}": torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.3)
            for name, shape in shapes.items()}


def unfolded(t, prefix, x, positions, axes, theta, causal=False):
    """The adaptive transformer as the paper's code has it, step by step, for x (T, D); positions (T, 3), theta (T,)."""
    p = {name[len(prefix) + 1:]: w for name, w in t.items() if name.startswith(prefix + ".")}

    def linear(name, x):
        return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0)

    def rms(x):
        return x / x.norm(dim=-1, keepdim=True) * x.shape[-1]**0.5

    label = F.one_hot(torch.tensor(p["cond_proj.0.weight"].shape[1] - 1), p["cond_proj.0.weight"].shape[1]).float()
    c = F.gelu(rms(linear("cond_proj.0", label)) * (1 + p["cond_proj.1.weight"]), approximate="tanh")
    if "input_layer.weight" in p:
        x = linear("input_layer", x)
    if "learnable_query" in p:
        x = torch.cat([x, p["learnable_query"][0]])
    angles = torch.cat([positions[:, [i]] * theta[:, None]**(-torch.arange(0, d, 2) / d) for i, d in enumerate(axes)], 1)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # (T, 1, d/2)
    for i in range(len({name.split(".")[1] for name in p if name.startswith("layers.")})):
        h = rms(x) * (1 + linear(f"layers.{i}.adaln_1.affine", c))
        q, k, v = linear(f"layers.{i}.attn1.to_q", h), *linear(f"layers.{i}.attn1.to_kv", h).chunk(2, -1)
        q, k, v = (y.unflatten(-1, (-1, 32)) for y in (q, k, v))
        q, k = (rms(y) * (1 + p[f"layers.{i}.attn1.{name}_norm.weight"]) for name, y in (("q", q), ("k", k)))
        q, k = (torch.view_as_complex(y.unflatten(-1, (-1, 2))) * turn for y in (q, k))
        q, k = torch.view_as_real(q).flatten(-2), torch.view_as_real(k).flatten(-2)
        scores = torch.einsum("qhd,khd->hqk", q, k) / 32**0.5
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
        h = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = x + linear(f"layers.{i}.gate1", c) * linear(f"layers.{i}.attn1.proj", h)
        a, b = linear(f"layers.{i}.ffn.fc1", rms(x) * (1 + linear(f"layers.{i}.adaln_mlp.affine", c))).chunk(2, -1)
        x = x + linear(f"layers.{i}.gate_mlp", c) * linear(f"layers.{i}.ffn.fc2", F.gelu(b, approximate="tanh") * a)
    return linear("out", rms(x) * (1 + linear("out_norm.affine", c))) if "out.weight" in p else x


@pytest.mark.parametrize("layout", [*LAYOUTS, "onestage"])
def test_released_layouts_equal_the_unfolded_networks(layout, tmp_path):
    torch.manual_seed(0)
    n, k, v, codes_p, dim = 16, 3, 64, 8, 64
    enc = random_network("enc", 3 * 8 * 8, dim, 171, True, {"1d": n, "2d": 0, "post": 0}.get(layout, k))
    dec = random_network("dec", 14, dim, 171, True, n if layout == "1d" else 0, out=192)
    prologue = layout not in ("1d", "2d")
    quantizers = ("quantizer", n, v, dim), ("semantic_quantizer", k, codes_p, 32 if layout == "post" else dim)
    for name, tokens, size, width in quantizers:
        if name == "quantizer" or prologue:
            enc |= {f"{name}.pos_select_mask": torch.zeros(tokens, size), f"{name}.embedding.weight": torch.randn(size, 14),
                    f"{name}.proj_in.weight": torch.randn(14, width), f"{name}.proj_in.bias": torch.randn(14)}
    if layout == "post":
        enc |= random_network("semantic_enc", dim, 32, 88, True, k)
    vocab = v + codes_p + 1 if prologue else v
    ar = random_network("ar_model", 0, dim, 176, False, out=vocab)
    ar |= {"bos_emb.weight": torch.randn(6, dim), "semantic_emb.weight": torch.randn(vocab, dim)}
    other = {name: torch.randn_like(w) for name, w in enc.items()}, {name: torch.randn_like(w) for name, w in dec.items()}
    if layout == "onestage":
        write_shards(tmp_path / "prologue-onestage-joint", {0: enc, 1: dec, 2: other[0], 3: other[1], 5: ar})
        path = ar_path = tmp_path / "prologue-onestage-joint"
    else:
        path, ar_path = tmp_path / "tokenizer", tmp_path / "ar"
        write_shards(path, {0: other[0], 1: other[1], 2: enc, 3: dec})
        write_shards(ar_path, {0: ar})
    tokenizer = Tokenizer.load(path)
    model = AR.load(ar_path, tokenizer)

    # The straightforward way, one image at a time.
    image = torch.rand(3, 32, 32) * 2 - 1
    places = [(r, c) for r in range(4) for c in range(4)]
    patches = torch.stack([image[:, 8 * r:8 * r + 8, 8 * c:8 * c + 8].permute(1, 2, 0).flatten() for r, c in places])
    grid, line = torch.tensor([[r, c, 0.0] for r, c in places]), torch.tensor([[0.0, 0, i] for i in range(n)])
    axes = (10, 10, 12)

    def run_on_grid(t, prefix, x, extra):
        positions, theta = torch.cat([grid, line[:extra]]), torch.tensor([2000.0] * n + [10000.0] * extra)
        return unfolded(t, prefix, x, positions, axes, theta)

    def quantize(h, name):
        z = F.normalize(h @ enc[f"{name}.proj_in.weight"].T + enc[f"{name}.proj_in.bias"], dim=-1)
        return (z @ F.normalize(enc[f"{name}.embedding.weight"], dim=-1).T).argmax(-1)

    h = run_on_grid(enc, "enc", patches, {"1d": n, "2d": 0, "post": 0}.get(layout, k))
    codes = quantize(h[n:] if layout == "1d" else h[:n], "quantizer")
    if prologue:
        h = run_on_grid(enc, "semantic_enc", h, k) if layout == "post" else h
        codes = torch.cat([quantize(h[n:], "semantic_quantizer"), codes])
    assert torch.equal(tokenizer.encode(image[None])[0], codes)
    q = F.normalize(enc["quantizer.embedding.weight"], dim=-1)[codes[-n:]]
    if layout == "1d":
        out = unfolded(dec, "dec", q, torch.cat([line, grid]), axes, torch.tensor([10000.0] * n + [2000.0] * n))[n:]
    else:
        out = run_on_grid(dec, "dec", q, 0)
    pixels = torch.cat([torch.cat([out[4 * r + c].view(8, 8, 3) for c in range(4)], 1) for r in range(4)]).permute(2, 0, 1)
    torch.testing.assert_close(tokenizer.decode(codes[None])[0], pixels, rtol=0, atol=1e-4)
    tokens = torch.cat([codes[:k] + v, torch.tensor([v + codes_p]), codes[k:]]) if prologue else codes
    x = torch.cat([ar["bos_emb.weight"][2:3], ar["semantic_emb.weight"][tokens[:-1]]])
    positions = torch.arange(len(x))[:, None] * torch.tensor([1.0, 0, 0])
    logits = unfolded(ar, "ar_model", x, positions, (12, 10, 10), torch.full((len(x),), 10000.0), causal=True)
    torch.testing.assert_close(model(codes[None], torch.tensor([2]))[0], logits, rtol=0, atol=1e-4)

    tokenizer.save(tmp_path / "t.safetensors"), model.save(tmp_path / "a.safetensors")
    assert torch.equal(Tokenizer.load(tmp_path / "t.safetensors").decode(codes[None]), tokenizer.decode(codes[None]))
    assert torch.equal(AR.load(tmp_path / "a.safetensors")(codes[None], torch.tensor([2])), model(codes[None], torch.tensor([2])))
    (path / "model_3.safetensors").unlink()
    if layout != "onestage":
        with pytest.raises(InputError, match="lacks model_3.safetensors"):
            Tokenizer.load(path)
        with pytest.raises(InputError, match="is no AR directory"):
            AR.load(path)
