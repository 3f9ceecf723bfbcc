"""Import the authors' released weights: one of their ten pairs becomes our two files.

    pip install huggingface_hub
    python tools/released.py prologue-l-xl --out l_xl                 # downloads three files
    python tools/released.py prologue-l-xl --from ckpts --out l_xl    # or takes them from a folder
    python sample.py --out l_xl

The released transformers are adaptive. A condition c sets the weight of every norm (AdaLN) and a
gate after every attention and every MLP, each by a linear layer of its own:

    x = x + gate1(c) * attention(normalize(x) * (1 + adaln_1(c)))
    x = x + gate_mlp(c) * mlp(normalize(x) * (1 + adaln_mlp(c)))

c is computed from a label, and in every released model that label is the same one for all images.
(The class of an image enters the AR model as its first token, not through c.) So c is a constant,
and the norm weights and gates are constant vectors. This file computes them once:

    1 + adaln_1(c)          is the weight of a plain RMSNorm
    gate * (W y + b)        is (gate * W) y + gate * b, a plain linear layer whose rows are scaled

What remains is the Block of tokenizer.py. The result is the same up to the rounding of floats.

Letters in shapes: C width of the condition, D width, d width of a head, N visual tokens, K prologue
tokens, V visual and P prologue codebook size.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ar import AR, ARConfig
from tokenizer import Tokenizer, TokenizerConfig

REPOSITORY = "Zyriix/prologue"  # on huggingface.co

# name: (folder of the tokenizer, folder of the AR model)
PAIRS = {
    "1d": ("1d-tokenizer", "ar-1d-base"),
    "2d": ("2d-tokenizer", "ar-2d-base"),
    "prologue-b-b": ("prologue-b-tokenizer", "ar-prologue-b-b"),
    "prologue-b-l": ("prologue-b-tokenizer", "ar-prologue-b-l"),
    "prologue-b-xl": ("prologue-b-tokenizer", "ar-prologue-b-xl"),
    "prologue-l-b": ("prologue-l-tokenizer", "ar-prologue-l-b"),
    "prologue-l-l": ("prologue-l-tokenizer", "ar-prologue-l-l"),
    "prologue-l-xl": ("prologue-l-tokenizer", "ar-prologue-l-xl"),
    "prologue-post": ("prologue-post-tokenizer", "ar-prologue-post-b"),
    "prologue-onestage": ("prologue-onestage-joint", "prologue-onestage-joint"),
}


def files_of(name):
    """The files of a pair that hold encoder, decoder and AR model, as paths in the repository."""
    tokenizer, ar = PAIRS[name]
    # The EMA of the tokenizer and the raw weights of the AR model: these the paper evaluates.
    files = f"{tokenizer}/model_2", f"{tokenizer}/model_3", f"{ar}/model"
    if name == "prologue-onestage":
        # Trained in one stage: the AR model lies beside the tokenizer, and what it learned to
        # predict are the codes of the raw encoder, not those of its EMA.
        files = f"{tokenizer}/model", f"{tokenizer}/model_1", f"{ar}/model_5"
    return [f"{file}.safetensors" for file in files]


def read(file, folder):
    """The tensors of a released file from `folder`, or downloaded where that is None."""
    path = file
    try:
        if folder is None:
            from huggingface_hub import hf_hub_download

            return load_file(hf_hub_download(REPOSITORY, file))  # once, to Hugging Face's cache
        path = Path(folder) / file
        return load_file(path)
    except Exception as error:  # no such package, network or file, or half a file
        reason = str(error).partition("\n")[0]
        raise SystemExit(f"{path} cannot be read ({reason}): install huggingface_hub, or fetch it "
                         f"from huggingface.co/{REPOSITORY} to DIR/{file} for --from DIR") from None


# From an adaptive network to a plain one. `net` holds the tensors of a single network.


def part_of(tensors, network):
    """The tensors whose names begin with `network`, without that: "layers.0.gate1.weight", ..."""
    start = f"{network}."
    return {name[len(start) :]: x for name, x in tensors.items() if name.startswith(start)}


def affine(net, name, c):
    """The linear layer `name` of the condition c (C,) -> (D,), in float64. Rounded to float32
    at the end, it does not depend on the order in which a machine sums: all get the same files."""
    return net[f"{name}.weight"].double() @ c + net.get(f"{name}.bias", 0)


def condition(net):
    """The condition c (C,) that all adaptive layers of a network see, in float64."""
    # The label is a one-hot vector, and it is always the last one, "unconditional". Its product
    # with a weight (C, labels) is that weight's last column.
    c = net["cond_proj.0.weight"][:, -1].double() + net["cond_proj.0.bias"]
    # Then comes an RMSNorm. Here and below, the release stores the weight of a norm minus 1.
    c = F.rms_norm(c, c.shape, eps=1e-12) * (1 + net["cond_proj.1.weight"])
    return F.gelu(c, approximate="tanh")


def network_size(net):
    """(layers, width)"""
    layers = sum(name.endswith("attn1.proj.weight") for name in net)
    return layers, len(net["layers.0.attn1.proj.weight"])


def fold(net):
    """An adaptive network, as the tensors of a plain one under our names."""
    c = condition(net)
    plain = {}

    def norm(ours, theirs):
        plain[f"{ours}.weight"] = (1 + affine(net, theirs, c)).float()  # (D,)

    def linear(ours, theirs, gate=None):
        # A gate multiplies the output, so it scales the rows of the layer before it.
        weight = net[f"{theirs}.weight"]
        rows = torch.ones(len(weight))
        if gate is not None:
            rows = affine(net, gate, c).float()
        plain[f"{ours}.weight"] = rows[:, None] * weight
        if f"{theirs}.bias" in net:  # the AR model has none
            plain[f"{ours}.bias"] = rows * net[f"{theirs}.bias"]

    for i in range(network_size(net)[0]):
        ours = f"transformer.blocks.{i}"
        theirs = f"layers.{i}"
        norm(f"{ours}.norm1", f"{theirs}.adaln_1.affine")
        q = net[f"{theirs}.attn1.to_q.weight"]  # (D, D)
        kv = net[f"{theirs}.attn1.to_kv.weight"]  # (2D, D)
        plain[f"{ours}.attn.qkv.weight"] = torch.cat([q, kv])  # (3D, D)
        for name in ("q_norm", "k_norm"):
            plain[f"{ours}.attn.{name}.weight"] = 1 + net[f"{theirs}.attn1.{name}.weight"]  # (d,)
        linear(f"{ours}.attn.out", f"{theirs}.attn1.proj", gate=f"{theirs}.gate1")
        norm(f"{ours}.norm2", f"{theirs}.adaln_mlp.affine")
        linear(f"{ours}.mlp.fc1", f"{theirs}.ffn.fc1")
        linear(f"{ours}.mlp.fc2", f"{theirs}.ffn.fc2", gate=f"{theirs}.gate_mlp")

    # What stands before and after the blocks differs from network to network.
    if "input_layer.weight" in net:
        linear("input", "input_layer")
    if "learnable_query" in net:
        plain["queries"] = net["learnable_query"][0]  # (1, queries, D) before
    if "out.weight" in net:
        norm("norm", "out_norm.affine")
        linear("out", "out")
    return plain


def quantizer(net):
    """As the tensors of tokenizer.VisualQuantizer and PrologueQuantizer."""
    return {
        "proj.weight": net["proj_in.weight"],
        "proj.bias": net["proj_in.bias"],
        "codebook": net["embedding.weight"],  # (V, c)
    }


# The two models. No file of the release states a size: all are read off the shapes of the tensors.


def import_tokenizer(encoder_file, decoder_file):
    """The tensors of a tokenizer's two files -> our Tokenizer."""
    encoder = part_of(encoder_file, "enc")
    decoder = part_of(decoder_file, "dec")
    visual = part_of(encoder_file, "quantizer")
    parts = {
        "encoder": fold(encoder),
        "visual_quantizer": quantizer(visual),
        "decoder": fold(decoder),
    }
    num_visual, codebook_size = visual["pos_select_mask"].shape  # (N, V)
    patch_size = math.isqrt(len(decoder["out.bias"]) // 3)
    sizes = dict(
        image_size=patch_size * math.isqrt(num_visual),
        patch_size=patch_size,
        encoder=network_size(encoder),
        decoder=network_size(decoder),
        head_dim=len(encoder["layers.0.attn1.q_norm.weight"]),
        codebook_size=codebook_size,
        code_dim=visual["embedding.weight"].shape[1],
    )

    # What a layout has and others lack tells which one it is: see the docstring of Tokenizer.
    layout = "2d"
    if "learnable_query" in encoder:
        layout = "1d"
    prologue = part_of(encoder_file, "semantic_quantizer")
    if prologue:
        layout = "prologue"
        parts["prologue_quantizer"] = quantizer(prologue)
        sizes["num_prologue"], sizes["prologue_codebook_size"] = prologue["pos_select_mask"].shape
    # Prologue-Post's second encoder is the one other network in the file.
    networks = {name.split(".layers.")[0] for name in encoder_file if ".layers." in name}
    for network in networks - {"enc"}:
        layout = "post"
        post = part_of(encoder_file, network)
        parts["post_encoder"] = fold(post)
        sizes["post"] = network_size(post)

    weights = {f"{part}.{name}": tensor for part, tensors in parts.items()
               for name, tensor in tensors.items()}
    tokenizer = Tokenizer(TokenizerConfig(layout, **sizes))
    tokenizer.load_state_dict(weights)  # raises if a tensor or a shape does not fit
    return tokenizer


def import_ar(ar_file, tokenizer, preset):
    """The tensors of an AR model's file -> our AR over the codes of this tokenizer."""
    net = part_of(ar_file, "ar_model")
    weights = fold(net)
    weights["head.weight"] = weights.pop("out.weight")  # (vocabulary, D)
    weights["token_embedding.weight"] = ar_file["semantic_emb.weight"]  # (vocabulary, D)
    classes = ar_file["bos_emb.weight"]  # (classes + 1, D), the last: unconditional
    weights["class_embedding.weight"] = classes
    layers, dim = network_size(net)
    num_classes = len(classes) - 1
    config = ARConfig.for_tokenizer(
        tokenizer.config,
        layers=layers,
        dim=dim,
        head_dim=len(net["layers.0.attn1.q_norm.weight"]),
        num_classes=num_classes,
        classes=imagenet_classes() if num_classes == 1000 else [],
        preset=preset,
    )
    ar = AR(config)
    ar.load_state_dict(weights)
    return ar


def imagenet_classes():
    """The names of ImageNet's 1,000 classes in the order of the labels, each a different one."""
    from torchvision.models import ResNet18_Weights  # it carries the names; nothing is downloaded

    names = list(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
    # Some words name two classes, and versions of torchvision differ in how they tell them apart.
    names[134] = "crane bird"
    names[517] = "crane machine"
    names[264] = "Cardigan Welsh corgi"
    names[474] = "cardigan"
    names[638] = "maillot"
    names[639] = "maillot tank suit"
    return names


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("name", choices=PAIRS, metavar="NAME", help=", ".join(PAIRS))
    flag("--from", dest="folder", metavar="DIR",
         help="take the released folders, as prologue-l-tokenizer, from DIR; else the three "
         "files that are needed are downloaded to Hugging Face's cache")
    flag("--out", required=True, metavar="DIR",
         help="folder for tokenizer.safetensors and ar.safetensors, which replace those there")
    args = parser.parse_args()
    encoder_file, decoder_file, ar_file = [read(file, args.folder) for file in files_of(args.name)]
    tokenizer = import_tokenizer(encoder_file, decoder_file)
    ar = import_ar(ar_file, tokenizer, preset=args.name)
    # Written only now that all three are known to fit: else what is in OUT stays as it is.
    out = Path(args.out)
    tokenizer.save(out / "tokenizer.safetensors")
    ar.config.tokenizer = tokenizer.config.fingerprint
    ar.save(out / "ar.safetensors")
    print(f"{args.name} is imported to {out}. Next: python sample.py --out {out}")


if __name__ == "__main__":
    main()
