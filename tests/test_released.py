"""Tests of tools/released.py: the official numbers of one tiny instance, every layout against an
evaluation of the adaptive networks with nothing folded, and bad input.

    python -m pytest tests/test_released.py

The released files themselves are not needed. Random weights of tiny networks stand in for them,
under the released names of directories, files and tensors.
"""

import json
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tools"))

import released

from ar import AR
from tokenizer import InputError, Tokenizer

NAMES = {
    "1d": "1d",
    "2d": "2d",
    "prologue": "prologue-b-b",
    "post": "prologue-post",
    "onestage": "prologue-onestage",
}

# The random instance: 32 x 32 pixels are 4 x 4 patches of 8 x 8.
N = 16  # visual tokens
K = 3  # prologue tokens
V = 64  # visual codebook size
P = 8  # prologue codebook size
D = 64  # width
HEAD = 32  # width of a head
CODE = 14  # width of a code


# Files in the released layout


def official_weights(shapes, part):
    """The weights of the tiny official instance, by the recipe that data/official_layout.json
    states. part: enc, dec or ar.
    """
    weights = {}
    for name, shape in shapes.items():
        seed = zlib.crc32(f"prologue/{part}/{name}".encode()) & 0x7FFFFFFF
        draw = np.random.RandomState(seed).standard_normal(shape)
        if "pos_select_mask" in name:
            scale = 0.0
        elif any(word in name for word in ("gate", "affine", "cond_proj", "norm.weight")):
            scale = 0.3
        elif "embedding" in name:
            scale = 1.0
        elif len(shape) > 1:
            scale = shape[-1] ** -0.5
        else:
            scale = 0.05
        weights[name] = torch.from_numpy((draw * scale).astype(np.float32))
    return weights


def write_shards(directory, shards):
    """Writes {0: tensors, 2: tensors} as model.safetensors and model_2.safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, tensors in shards.items():
        name = "model.safetensors"
        if number > 0:
            name = f"model_{number}.safetensors"
        copies = {key: tensor.clone() for key, tensor in tensors.items()}
        safetensors.torch.save_file(copies, directory / name)


def write_pair(folder, name, enc, dec, ar):
    """Writes a released pair. In the files beside the right ones, such as the raw encoder beside
    its EMA, stand weights that would give other numbers.
    """
    tokenizer_directory, ar_directory = released.PAIRS[name]
    other_enc = {key: tensor + 1 for key, tensor in enc.items()}
    other_dec = {key: tensor + 1 for key, tensor in dec.items()}
    other_ar = {key: tensor + 1 for key, tensor in ar.items()}
    if name == "prologue-onestage":
        shards = {0: enc, 1: dec, 2: other_enc, 3: other_dec, 5: ar, 6: other_ar}
        write_shards(folder / tokenizer_directory, shards)
    else:
        shards = {0: other_enc, 1: other_dec, 2: enc, 3: dec}
        write_shards(folder / tokenizer_directory, shards)
        write_shards(folder / ar_directory, {0: ar, 1: other_ar})


def random_network(
    prefix, in_dim, dim, hidden, biases, queries=0, out=None, cond=8, classes=6, layers=2, head=HEAD
):
    """A network under the released names, with random weights and random conditioning."""
    shapes = {
        "cond_proj.0.weight": (cond, classes),
        "cond_proj.0.bias": (cond,),
        "cond_proj.1.weight": (cond,),
    }
    for i in range(layers):
        layer = f"layers.{i}"
        shapes[f"{layer}.adaln_1.affine.weight"] = (dim, cond)
        shapes[f"{layer}.adaln_1.affine.bias"] = (dim,)
        shapes[f"{layer}.attn1.q_norm.weight"] = (head,)
        shapes[f"{layer}.attn1.k_norm.weight"] = (head,)
        shapes[f"{layer}.attn1.to_q.weight"] = (dim, dim)
        shapes[f"{layer}.attn1.to_kv.weight"] = (2 * dim, dim)
        shapes[f"{layer}.attn1.proj.weight"] = (dim, dim)
        shapes[f"{layer}.gate1.weight"] = (dim, cond)
        shapes[f"{layer}.adaln_mlp.affine.weight"] = (dim, cond)
        shapes[f"{layer}.adaln_mlp.affine.bias"] = (dim,)
        shapes[f"{layer}.ffn.fc1.weight"] = (2 * hidden, dim)
        shapes[f"{layer}.ffn.fc2.weight"] = (dim, hidden)
        shapes[f"{layer}.gate_mlp.weight"] = (dim, cond)
        if biases:
            shapes[f"{layer}.attn1.proj.bias"] = (dim,)
            shapes[f"{layer}.gate1.bias"] = (dim,)
            shapes[f"{layer}.ffn.fc1.bias"] = (2 * hidden,)
            shapes[f"{layer}.ffn.fc2.bias"] = (dim,)
            shapes[f"{layer}.gate_mlp.bias"] = (dim,)
    if in_dim:
        shapes["input_layer.weight"] = (dim, in_dim)
        shapes["input_layer.bias"] = (dim,)
    if queries:
        shapes["learnable_query"] = (1, queries, dim)
    if out:
        shapes["out_norm.affine.weight"] = (dim, cond)
        shapes["out_norm.affine.bias"] = (dim,)
        shapes["out.weight"] = (out, dim)
        if biases:
            shapes["out.bias"] = (out,)
    tensors = {}
    for name, shape in shapes.items():
        scale = 0.3
        if len(shape) > 1:
            scale = shape[-1] ** -0.5
        tensors[f"{prefix}.{name}"] = torch.randn(shape) * scale
    return tensors


def random_quantizer(prefix, tokens, codebook_size, width):
    return {
        f"{prefix}.pos_select_mask": torch.zeros(tokens, codebook_size),
        f"{prefix}.embedding.weight": torch.randn(codebook_size, CODE),
        f"{prefix}.proj_in.weight": torch.randn(CODE, width),
        f"{prefix}.proj_in.bias": torch.randn(CODE),
    }


def encoder_queries(layout):
    """How many learned vectors the encoder "enc" has beside the patches."""
    return {"1d": N, "2d": 0, "post": 0, "prologue": K, "onestage": K}[layout]


def random_pair(layout, classes=5):
    """Tensors of encoder, decoder and AR model of a layout."""
    has_prologue = layout not in ("1d", "2d")
    patch = 3 * 8 * 8
    enc = random_network("enc", patch, D, 171, biases=True, queries=encoder_queries(layout))
    enc.update(random_quantizer("quantizer", N, V, D))
    if layout == "post":
        enc.update(random_network("semantic_enc", D, 32, 88, biases=True, queries=K))
        enc.update(random_quantizer("semantic_quantizer", K, P, 32))
    elif has_prologue:
        enc.update(random_quantizer("semantic_quantizer", K, P, D))

    decoder_queries = N if layout == "1d" else 0
    dec = random_network("dec", CODE, D, 171, biases=True, queries=decoder_queries, out=patch)

    vocabulary = V + P + 1 if has_prologue else V
    ar = random_network("ar_model", 0, D, 176, biases=False, out=vocabulary)
    ar["bos_emb.weight"] = torch.randn(classes + 1, D)
    ar["semantic_emb.weight"] = torch.randn(vocabulary, D)
    return enc, dec, ar


# The straightforward way, one image at a time and nothing folded


class AdaptiveTransformer:
    """A released network as the authors' code evaluates it, step by step."""

    def __init__(self, tensors, prefix):
        self.tensors = {}
        for name, tensor in tensors.items():
            if name.startswith(f"{prefix}."):
                self.tensors[name[len(prefix) + 1 :]] = tensor
        self.c = self.condition()

    def linear(self, name, x):
        y = x @ self.tensors[f"{name}.weight"].T
        if f"{name}.bias" in self.tensors:
            y = y + self.tensors[f"{name}.bias"]
        return y

    def normalize(self, x):
        return x / x.norm(dim=-1, keepdim=True) * x.shape[-1] ** 0.5

    def condition(self):
        """c (C,), from the one-hot label that means unconditional."""
        labels = self.tensors["cond_proj.0.weight"].shape[1]
        label = F.one_hot(torch.tensor(labels - 1), labels).float()
        h = self.normalize(self.linear("cond_proj.0", label))
        return F.gelu(h * (1 + self.tensors["cond_proj.1.weight"]), approximate="tanh")

    def attention(self, layer, h, turn, causal):
        """h (T, D), turn (T, 1, d/2) complex -> (T, D)"""
        q = self.linear(f"{layer}.attn1.to_q", h).unflatten(-1, (-1, HEAD))  # (T, heads, d)
        k, v = self.linear(f"{layer}.attn1.to_kv", h).unflatten(-1, (2, -1, HEAD)).unbind(1)
        q = self.normalize(q) * (1 + self.tensors[f"{layer}.attn1.q_norm.weight"])
        k = self.normalize(k) * (1 + self.tensors[f"{layer}.attn1.k_norm.weight"])
        q = torch.view_as_real(torch.view_as_complex(q.unflatten(-1, (-1, 2))) * turn).flatten(-2)
        k = torch.view_as_real(torch.view_as_complex(k.unflatten(-1, (-1, 2))) * turn).flatten(-2)
        scores = torch.einsum("qhd,khd->hqk", q, k) / HEAD**0.5
        if causal:
            future = torch.ones(scores.shape[1:]).triu(1).bool()
            scores = scores.masked_fill(future, -torch.inf)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)

    def __call__(self, x, positions, theta, axes, causal=False):
        """x (T, in) -> (T + queries, out); positions (T + queries, 3) along the three RoPE axes,
        theta (T + queries,), axes: how many dimensions of a head each of them has.
        """
        if "input_layer.weight" in self.tensors:
            x = self.linear("input_layer", x)
        if "learnable_query" in self.tensors:
            x = torch.cat([x, self.tensors["learnable_query"][0]])
        angles = []
        for axis, dim in enumerate(axes):
            frequencies = theta[:, None] ** (-torch.arange(0, dim, 2) / dim)
            angles.append(positions[:, axis, None] * frequencies)
        angles = torch.cat(angles, 1)  # (T, d/2)
        turn = torch.polar(torch.ones_like(angles), angles)[:, None]

        layers = {name.split(".")[1] for name in self.tensors if name.startswith("layers.")}
        for i in range(len(layers)):
            layer = f"layers.{i}"
            h = self.normalize(x) * (1 + self.linear(f"{layer}.adaln_1.affine", self.c))
            h = self.linear(f"{layer}.attn1.proj", self.attention(layer, h, turn, causal))
            x = x + self.linear(f"{layer}.gate1", self.c) * h
            h = self.normalize(x) * (1 + self.linear(f"{layer}.adaln_mlp.affine", self.c))
            a, b = self.linear(f"{layer}.ffn.fc1", h).chunk(2, -1)
            h = self.linear(f"{layer}.ffn.fc2", F.gelu(b, approximate="tanh") * a)
            x = x + self.linear(f"{layer}.gate_mlp", self.c) * h
        if "out.weight" in self.tensors:
            x = self.normalize(x) * (1 + self.linear("out_norm.affine", self.c))
            x = self.linear("out", x)
        return x


TOKENIZER_AXES = (10, 10, 12)  # row, column, l
PLACES = [(row, column) for row in range(4) for column in range(4)]
GRID = torch.tensor([[row, column, 0.0] for row, column in PLACES])  # positions of the patches
LINE = torch.tensor([[0.0, 0.0, i] for i in range(N)])  # and of learned vectors
GRID_THETA = torch.full((N,), 2000.0)
LINE_THETA = torch.full((N,), 10000.0)


def run_on_grid(network, x, queries=0):
    """x (N, in) on the grid, and behind it the network's own queries."""
    positions = torch.cat([GRID, LINE[:queries]])
    theta = torch.cat([GRID_THETA, LINE_THETA[:queries]])
    return network(x, positions, theta, TOKENIZER_AXES)


def quantize(enc, name, h):
    z = F.linear(h, enc[f"{name}.proj_in.weight"], enc[f"{name}.proj_in.bias"])
    codes = F.normalize(enc[f"{name}.embedding.weight"], dim=-1)
    return (F.normalize(z, dim=-1) @ codes.T).argmax(-1)


def slow_encode(enc, layout, image):
    """image (3, 32, 32) -> codes (K+N,) or (N,)"""
    patches = []
    for row, column in PLACES:
        patch = image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        patches.append(patch.permute(1, 2, 0).flatten())
    h = run_on_grid(
        AdaptiveTransformer(enc, "enc"), torch.stack(patches), queries=encoder_queries(layout)
    )
    if layout == "1d":
        return quantize(enc, "quantizer", h[N:])
    visual = quantize(enc, "quantizer", h[:N])
    if layout == "2d":
        return visual
    if layout == "post":
        h = run_on_grid(AdaptiveTransformer(enc, "semantic_enc"), h, queries=K)
    return torch.cat([quantize(enc, "semantic_quantizer", h[N:]), visual])


def slow_decode(enc, dec, layout, codes):
    """codes (K+N,) or (N,) -> image (3, 32, 32)"""
    q = F.normalize(enc["quantizer.embedding.weight"], dim=-1)[codes[-N:]]
    network = AdaptiveTransformer(dec, "dec")
    if layout == "1d":  # the codes are the line, and the network's queries the grid
        positions = torch.cat([LINE, GRID])
        theta = torch.cat([LINE_THETA, GRID_THETA])
        patches = network(q, positions, theta, TOKENIZER_AXES)[N:]
    else:
        patches = run_on_grid(network, q)
    image = torch.empty(3, 32, 32)
    for (row, column), patch in zip(PLACES, patches):
        square = patch.view(8, 8, 3).permute(2, 0, 1)
        image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = square
    return image


def slow_logits(ar, codes, label):
    """codes (K+N,) or (N,) -> logits (L, vocabulary)"""
    tokens = codes
    if len(codes) > N:
        tokens = torch.cat([codes[:K] + V, torch.tensor([V + P]), codes[K:]])
    x = torch.cat([ar["bos_emb.weight"][label][None], ar["semantic_emb.weight"][tokens[:-1]]])
    positions = torch.zeros(len(x), 3)
    positions[:, 0] = torch.arange(len(x))  # of the AR model's axes the first is l
    theta = torch.full((len(x),), 10000.0)
    network = AdaptiveTransformer(ar, "ar_model")
    return network(x, positions, theta, axes=(12, 10, 10), causal=True)


# The tests


def run_import(monkeypatch, name, out, folder=None):
    """python tools/released.py NAME --from FOLDER --out OUT -> Tokenizer and AR of what it wrote"""
    words = ["released.py", name, "--out", str(out)]
    if folder is not None:
        words += ["--from", str(folder)]
    monkeypatch.setattr(sys, "argv", words)
    released.main()
    return Tokenizer.load(out / "tokenizer.safetensors"), AR.load(out / "ar.safetensors")


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_official_numbers(tmp_path, monkeypatch, capsys):
    reference = json.loads((ROOT / "data" / "official_layout.json").read_text())
    expected = reference["expected"]
    weights = [official_weights(reference["shapes"][part], part) for part in ("enc", "dec", "ar")]
    folder = tmp_path / "ckpts"
    write_pair(folder, "prologue-b-b", *weights)
    before = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}

    tokenizer, ar = run_import(monkeypatch, "prologue-b-b", tmp_path / "out", folder)

    rows, columns = torch.meshgrid(torch.arange(64) / 64, torch.arange(64) / 64, indexing="ij")
    images = torch.empty(2, 3, 64, 64)
    for b in range(2):
        for k in range(3):
            images[b, k] = 0.9 * torch.sin(6.28 * ((b + 1) * columns + (k + 1) * rows) + k)
    labels = torch.tensor([3, 7])
    codes = tokenizer.encode(images)
    assert codes.tolist() == expected["codes"]
    decoded = tokenizer.decode(codes)[1, :, 10, ::8].flatten()
    assert_close(decoded, torch.tensor(expected["decoded"]))
    logits = ar(codes, labels)[1, ::5, ::13].flatten()
    assert_close(logits, torch.tensor(expected["logits"]))
    greedy = ar.generate(labels, cfg_prologue=0.7, cfg_visual=3.75, cfg_power=0.2, top_k=1)
    assert ar.sequence(greedy).tolist() == expected["greedy_tokens"]

    assert ar.cfg.preset == "prologue-b-b"
    assert ar.cfg.tokenizer == tokenizer.fingerprint()
    assert ar.cfg.classes == []  # this instance has ten classes, not ImageNet's
    assert capsys.readouterr().out.endswith(f"python sample.py --out {tmp_path / 'out'}\n")
    assert {path: path.read_bytes() for path in before} == before
    assert len(list(folder.rglob("*.*"))) == len(before)


@pytest.mark.parametrize("layout", NAMES)
def test_layouts_equal_the_adaptive_networks(layout, tmp_path, monkeypatch):
    torch.manual_seed(0)
    enc, dec, ar_tensors = random_pair(layout)
    write_pair(tmp_path / "ckpts", NAMES[layout], enc, dec, ar_tensors)
    tokenizer, ar = run_import(monkeypatch, NAMES[layout], tmp_path / "out", tmp_path / "ckpts")

    image = torch.rand(3, 32, 32) * 2 - 1
    codes = slow_encode(enc, layout, image)
    assert torch.equal(tokenizer.encode(image[None])[0], codes)
    assert_close(tokenizer.decode(codes[None])[0], slow_decode(enc, dec, layout, codes))
    label = torch.tensor([2])
    assert_close(ar(codes[None], label)[0], slow_logits(ar_tensors, codes, label=2))

    # Saved and loaded once more, nothing changes.
    tokenizer.save(tmp_path / "again" / "tokenizer.safetensors")
    ar.save(tmp_path / "again" / "ar.safetensors")
    tokenizer_again = Tokenizer.load(tmp_path / "again" / "tokenizer.safetensors")
    ar_again = AR.load(tmp_path / "again" / "ar.safetensors")
    assert torch.equal(tokenizer_again.decode(codes[None]), tokenizer.decode(codes[None]))
    assert torch.equal(ar_again(codes[None], label), ar(codes[None], label))


def test_class_names(tmp_path, monkeypatch):
    write_pair(tmp_path / "ckpts", "2d", *random_pair("2d", classes=1000))
    _, ar = run_import(monkeypatch, "2d", tmp_path / "out", tmp_path / "ckpts")
    names = ar.cfg.classes
    assert names.index("golden retriever") == 207
    assert names[0] == "tench"
    assert names[999] == "toilet tissue"
    assert len({name.lower() for name in names}) == 1000

    # The names that are given here replace names of the same word, whatever torchvision's version.
    from torchvision.models import ResNet18_Weights

    for label, name in enumerate(ResNet18_Weights.IMAGENET1K_V1.meta["categories"]):
        assert names[label].split()[0] == name.split()[0]


def test_download_takes_three_files(tmp_path, monkeypatch):
    asked_for = []

    def hf_hub_download(repository, file):
        asked_for.append((repository, file))
        return str(tmp_path / "cache" / file)

    fake = SimpleNamespace(hf_hub_download=hf_hub_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    for layout, name in (("prologue", "prologue-l-xl"), ("onestage", "prologue-onestage")):
        write_pair(tmp_path / "cache", name, *random_pair(layout))
        _, ar = run_import(monkeypatch, name, tmp_path / "out")
        assert ar.cfg.preset == name
    assert asked_for == [
        ("Zyriix/prologue", "prologue-l-tokenizer/model_2.safetensors"),
        ("Zyriix/prologue", "prologue-l-tokenizer/model_3.safetensors"),
        ("Zyriix/prologue", "ar-prologue-l-xl/model.safetensors"),
        ("Zyriix/prologue", "prologue-onestage-joint/model.safetensors"),
        ("Zyriix/prologue", "prologue-onestage-joint/model_1.safetensors"),
        ("Zyriix/prologue", "prologue-onestage-joint/model_5.safetensors"),
    ]


def test_download_that_fails_is_a_sentence(tmp_path, monkeypatch):
    def hf_hub_download(repository, file):
        raise OSError("no route\nto host")

    fake = SimpleNamespace(hf_hub_download=hf_hub_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    with pytest.raises(InputError, match="1d-tokenizer/model_2.* not be downloaded: no route to"):
        run_import(monkeypatch, "1d", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    with pytest.raises(InputError, match="pip install huggingface_hub"):
        run_import(monkeypatch, "1d", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Each of these spoils a good prologue-b-b: enc, dec and ar are its tensors, and the files lie in
# the current folder.


def no_decoder(enc, dec, ar):
    Path("prologue-b-tokenizer/model_3.safetensors").unlink()


def ar_cut_off(enc, dec, ar):
    path = Path("ar-prologue-b-b/model.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])


def ar_in_place_of_the_encoder(enc, dec, ar):
    write_shards(Path("prologue-b-tokenizer"), {2: ar})


def encoder_in_place_of_the_ar(enc, dec, ar):
    write_shards(Path("ar-prologue-b-b"), {0: enc})


def one_tensor_missing(enc, dec, ar):
    del dec["dec.layers.1.gate_mlp.bias"]
    write_shards(Path("prologue-b-tokenizer"), {3: dec})


def other_vocabulary(enc, dec, ar):
    ar["semantic_emb.weight"] = torch.zeros(V, D)
    write_shards(Path("ar-prologue-b-b"), {0: ar})


def other_shape(enc, dec, ar):
    ar["ar_model.layers.0.ffn.fc1.weight"] = torch.zeros(10, D)
    write_shards(Path("ar-prologue-b-b"), {0: ar})


def other_shape_of_a_gate(enc, dec, ar):
    enc["enc.layers.0.gate1.weight"] = torch.zeros(D, 5)
    write_shards(Path("prologue-b-tokenizer"), {2: enc})


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (no_decoder, "b-tokenizer/model_3.safetensors does not exist.*the decoder of a tokenizer"),
        (ar_cut_off, "ar-prologue-b-b/model.safetensors is not a whole safetensors file"),
        (
            ar_in_place_of_the_encoder,
            "model_2.safetensors should hold the encoder of a tokenizer, but it has no tensor enc",
        ),
        (
            encoder_in_place_of_the_ar,
            "b-b/model.safetensors should hold an AR model, but it has no tensor semantic_emb",
        ),
        (one_tensor_missing, "model_3.safetensors .*no tensor dec.layers.1.gate_mlp.bias"),
        (other_vocabulary, "vocabulary has 64 tokens, and the tokenizer makes 73"),
        (other_shape, "ar-prologue-b-b/model.safetensors: the shapes .*fc1.weight"),
        (other_shape_of_a_gate, "model_2.safetensors and .*model_3.safetensors: the shapes "),
    ],
)
def test_bad_files_are_named_and_nothing_is_written(spoil, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    enc, dec, ar = random_pair("prologue")
    write_pair(Path("."), "prologue-b-b", enc, dec, ar)
    spoil(enc, dec, ar)
    with pytest.raises(InputError, match=sentence) as error:
        run_import(monkeypatch, "prologue-b-b", Path("out"), Path("."))
    assert "\n" not in str(error.value)
    assert not Path("out").exists()
