"""Import the authors' released weights: one of their ten pairs becomes our two files.

    python tools/released.py prologue-l-xl --out l_xl                 # downloads three files
    python tools/released.py prologue-l-xl --from ckpts --out l_xl    # or takes them from a folder
    python sample.py --out l_xl

The released transformers are adaptive. A condition c sets the weight of every norm (AdaLN) and a
gate behind every attention and every MLP, each by a linear layer of its own:

    x = x + gate1(c) * attention(normalize(x) * (1 + adaln_1(c)))
    x = x + gate_mlp(c) * mlp(normalize(x) * (1 + adaln_mlp(c)))

c is computed from a label, and in every released model that label is the same one for all images.
(The class of an image enters the AR model as its first token, not through c.) So c is a constant,
and the norm weights and gates are constant vectors. This file computes them once:

    1 + adaln_1(c)          is the weight of a plain RMSNorm
    gate * (W y + b)        is (gate * W) y + gate * b, a plain linear layer whose rows are scaled

What remains is the Block of tokenizer.py. The result is the same up to the rounding of floats, and
nothing is left to do for a condition when the model runs.

Letters in shapes: C width of the condition, D width, N visual tokens, K prologue tokens, V visual
and P prologue codebook size.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ar import AR, ARConfig
from tokenizer import InputError, Tokenizer, TokenizerConfig, open_safetensors

REPOSITORY = "Zyriix/prologue"  # on huggingface.co

# name: (directory of the tokenizer, directory of the AR model)
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


# Finding and reading the files


def files_of(name):
    """The files of a pair that hold encoder, decoder and AR model, as paths in the repository."""
    tokenizer, ar = PAIRS[name]
    if name == "prologue-onestage":
        # Trained in one stage: the AR model stands beside the tokenizer, and what it learned to
        # predict are the codes of the raw encoder, not those of its EMA.
        encoder_file = f"{tokenizer}/model.safetensors"
        decoder_file = f"{tokenizer}/model_1.safetensors"
        ar_file = f"{ar}/model_5.safetensors"
    else:
        # The EMA of the tokenizer and the raw weights of the AR model: these the paper evaluates.
        encoder_file = f"{tokenizer}/model_2.safetensors"
        decoder_file = f"{tokenizer}/model_3.safetensors"
        ar_file = f"{ar}/model.safetensors"
    return encoder_file, decoder_file, ar_file


def download(file):
    """The path of a file of the repository in Hugging Face's cache, where it is downloaded once."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise InputError(
            "downloading needs a package that is missing: pip install huggingface_hub "
            "(or give a folder that holds the released directories with --from)"
        ) from None
    try:
        return Path(hf_hub_download(REPOSITORY, file))
    except Exception as error:  # of huggingface_hub, its HTTP library or the disk: many classes
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{file} of {REPOSITORY} could not be downloaded: {reason}") from None


class Shard(dict):
    """The tensors of one released file by name. One that is asked for and missing ends the script
    with a sentence: the file is then another one than it should be, or not complete.
    """

    def __init__(self, path, holds):
        """holds: what should be in the file, in words. The tensors are memory-mapped: the disk is
        read where a tensor is used.
        """
        tensors, _ = open_safetensors(path)
        super().__init__(tensors)
        self.path = path
        self.holds = holds

    def __missing__(self, name):
        raise InputError(f"{self.path} should hold {self.holds}, but it has no tensor {name}")


def read_shard(file, holds, folder):
    """A released file from `folder`, or downloaded where that is None."""
    if folder is None:
        return Shard(download(file), holds)
    path = Path(folder) / file
    if not path.is_file():
        raise InputError(
            f"{path} does not exist, which should hold {holds}: --from takes the folder that the "
            f"directories of {REPOSITORY} were downloaded to"
        )
    return Shard(path, holds)


# From an adaptive network to a plain one. `network` is what the names of its tensors begin with.


def constant_condition(shard, network):
    """The condition c (C,) that all adaptive layers of a network see, in float64."""
    # The label is a one-hot vector, and it is always the last one, "unconditional". Its product
    # with a weight (C, labels) is that weight's last column.
    column = shard[f"{network}.cond_proj.0.weight"][:, -1]
    c = column.double() + shard[f"{network}.cond_proj.0.bias"]
    # Then comes an RMSNorm. Here and below, the release stores the weight of a norm minus 1.
    c = F.rms_norm(c, c.shape, eps=1e-12) * (1 + shard[f"{network}.cond_proj.1.weight"])
    return F.gelu(c, approximate="tanh")


def affine(shard, name, c, bias=True):
    """The linear layer `name` of the condition c (C,) -> (D,), in float64. Rounded to float32
    at the end, it does not depend on the order in which a machine sums: all get the same files.
    """
    y = shard[f"{name}.weight"].double() @ c
    if bias:
        y = y + shard[f"{name}.bias"]
    return y


def fold_norm(shard, name, c):
    """The weight (D,) of the plain RMSNorm that an adaptive norm is when its condition is c."""
    return (1 + affine(shard, name, c)).float()


def fold_block(shard, layer, c, bias):
    """The adaptive block whose names begin with `layer`, as the tensors of tokenizer.Block. bias:
    whether gates and linear layers have one.
    """
    gate1 = affine(shard, f"{layer}.gate1", c, bias).float()  # (D,)
    gate_mlp = affine(shard, f"{layer}.gate_mlp", c, bias).float()  # (D,)
    plain = {}

    plain["norm1.weight"] = fold_norm(shard, f"{layer}.adaln_1.affine", c)
    q = shard[f"{layer}.attn1.to_q.weight"]  # (D, D)
    kv = shard[f"{layer}.attn1.to_kv.weight"]  # (2D, D)
    plain["attn.qkv.weight"] = torch.cat([q, kv])  # (3D, D)
    plain["attn.q_norm.weight"] = 1 + shard[f"{layer}.attn1.q_norm.weight"]  # (d,), stored minus 1
    plain["attn.k_norm.weight"] = 1 + shard[f"{layer}.attn1.k_norm.weight"]
    # A gate multiplies the output, so it scales the rows of the layer in front of it.
    plain["attn.out.weight"] = gate1[:, None] * shard[f"{layer}.attn1.proj.weight"]  # (D, D)

    plain["norm2.weight"] = fold_norm(shard, f"{layer}.adaln_mlp.affine", c)
    plain["mlp.fc1.weight"] = shard[f"{layer}.ffn.fc1.weight"]  # (2 hidden, D)
    plain["mlp.fc2.weight"] = gate_mlp[:, None] * shard[f"{layer}.ffn.fc2.weight"]  # (D, hidden)

    if bias:
        plain["attn.out.bias"] = gate1 * shard[f"{layer}.attn1.proj.bias"]
        plain["mlp.fc1.bias"] = shard[f"{layer}.ffn.fc1.bias"]
        plain["mlp.fc2.bias"] = gate_mlp * shard[f"{layer}.ffn.fc2.bias"]
    return plain


def layer_names(shard, network):
    """["enc.layers.0", "enc.layers.1", ...] for the network "enc"."""
    start = f"{network}.layers."
    numbers = {name[len(start) :].split(".")[0] for name in shard if name.startswith(start)}
    return [f"{start}{i}" for i in range(len(numbers))]


def fold_transformer(shard, network, bias):
    """All blocks of a network, as the tensors of tokenizer.Transformer."""
    c = constant_condition(shard, network)
    plain = {}
    for i, layer in enumerate(layer_names(shard, network)):
        for name, tensor in fold_block(shard, layer, c, bias).items():
            plain[f"transformer.blocks.{i}.{name}"] = tensor
    return plain


def fold_encoder(shard, network):
    """As the tensors of tokenizer.Encoder, with queries where the network has some."""
    plain = fold_transformer(shard, network, bias=True)
    plain["input.weight"] = shard[f"{network}.input_layer.weight"]
    plain["input.bias"] = shard[f"{network}.input_layer.bias"]
    if f"{network}.learnable_query" in shard:
        plain["queries"] = shard[f"{network}.learnable_query"][0]  # (1, queries, D) before
    return plain


def fold_decoder(shard):
    """As the tensors of tokenizer.Decoder: an encoder with a norm and a linear layer behind it."""
    plain = fold_encoder(shard, "dec")
    plain["norm.weight"] = fold_norm(shard, "dec.out_norm.affine", constant_condition(shard, "dec"))
    plain["out.weight"] = shard["dec.out.weight"]  # (patch * patch * 3, D)
    plain["out.bias"] = shard["dec.out.bias"]
    return plain


def fold_ar(shard):
    """As the tensors of ar.AR."""
    plain = fold_transformer(shard, "ar_model", bias=False)
    c = constant_condition(shard, "ar_model")
    plain["norm.weight"] = fold_norm(shard, "ar_model.out_norm.affine", c)
    plain["head.weight"] = shard["ar_model.out.weight"]  # (vocabulary, D)
    plain["embedding.weight"] = shard["semantic_emb.weight"]  # (vocabulary, D)
    plain["bos.weight"] = shard["bos_emb.weight"]  # (classes + 1, D)
    return plain


def quantizer(shard, name):
    """As the tensors of tokenizer.VisualQuantizer and PrologueQuantizer."""
    return {
        "proj.weight": shard[f"{name}.proj_in.weight"],
        "proj.bias": shard[f"{name}.proj_in.bias"],
        "codebook": shard[f"{name}.embedding.weight"],  # (V, c)
    }


# The two models. No file of the release states a size: all are read off the shapes of the tensors.


def network_size(shard, network):
    """(layers, width)"""
    layers = layer_names(shard, network)
    return len(layers), len(shard[f"{network}.layers.0.attn1.proj.weight"])


def build(model_class, cfg, weights):
    """The model of these weights, in eval mode."""
    with torch.device("meta"):  # it gets its memory from the weights
        model = model_class(cfg)
    model.load_state_dict(weights, assign=True)  # raises RuntimeError if a shape does not fit
    return model.eval().requires_grad_(False)


def find_post_encoder(shard):
    """What the names of Prologue-Post's second encoder begin with, or None in other layouts. It is
    the one network beside "enc" in the encoder's shard.
    """
    networks = {name.split(".layers.")[0] for name in shard if ".layers." in name}
    return min(networks - {"enc"}, default=None)


def import_tokenizer(encoder, decoder):
    """The two shards of a tokenizer -> our Tokenizer."""
    parts = {
        "encoder": fold_encoder(encoder, "enc"),
        "visual_quantizer": quantizer(encoder, "quantizer"),
        "decoder": fold_decoder(decoder),
    }
    visual_tokens, codebook_size = encoder["quantizer.pos_select_mask"].shape  # (N, V)
    patch_size = math.isqrt(len(decoder["dec.out.bias"]) // 3)
    sizes = dict(
        image_size=patch_size * math.isqrt(visual_tokens),
        patch_size=patch_size,
        encoder=network_size(encoder, "enc"),
        decoder=network_size(decoder, "dec"),
        head_dim=len(encoder["enc.layers.0.attn1.q_norm.weight"]),
        codebook_size=codebook_size,
        code_dim=encoder["quantizer.embedding.weight"].shape[1],
    )

    # What a layout has and others lack tells which one it is: see the docstring of Tokenizer.
    if "semantic_quantizer.embedding.weight" in encoder:
        layout = "prologue"
        mask = encoder["semantic_quantizer.pos_select_mask"]  # (K, P)
        sizes["num_prologue"], sizes["prologue_codebook_size"] = mask.shape
        parts["prologue_quantizer"] = quantizer(encoder, "semantic_quantizer")
    elif "queries" in parts["encoder"]:
        layout = "1d"
    else:
        layout = "2d"
    post_encoder = find_post_encoder(encoder)
    if post_encoder:
        layout = "post"
        sizes["post"] = network_size(encoder, post_encoder)
        parts["post_encoder"] = fold_encoder(encoder, post_encoder)

    weights = {}
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            weights[f"{part}.{name}"] = tensor
    return build(Tokenizer, TokenizerConfig(layout, **sizes), weights)


def import_ar(shard, tokenizer, preset):
    """The shard of an AR model -> our AR over the codes of this tokenizer."""
    tokens = tokenizer.cfg.codebook_size + tokenizer.cfg.prologue_codebook_size
    if tokenizer.cfg.num_prologue > 0:
        tokens += 1  # EOS
    vocabulary = len(shard["semantic_emb.weight"])
    if vocabulary != tokens:
        raise InputError(
            f"{shard.path} does not belong to this tokenizer: its vocabulary has {vocabulary} "
            f"tokens, and the tokenizer makes {tokens}"
        )
    num_classes = len(shard["bos_emb.weight"]) - 1  # the last one means unconditional
    layers, dim = network_size(shard, "ar_model")
    cfg = ARConfig.for_tokenizer(
        tokenizer.cfg,
        layers=layers,
        dim=dim,
        head_dim=len(shard["ar_model.layers.0.attn1.q_norm.weight"]),
        num_classes=num_classes,
        classes=imagenet_classes() if num_classes == 1000 else [],
        tokenizer=tokenizer.fingerprint(),
        preset=preset,
    )
    return build(AR, cfg, fold_ar(shard))


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


def import_pair(name, folder):
    """The pair `name` from `folder`, or downloaded where that is None -> Tokenizer, AR."""
    encoder_file, decoder_file, ar_file = files_of(name)
    encoder = read_shard(encoder_file, "the encoder of a tokenizer", folder)
    decoder = read_shard(decoder_file, "the decoder of a tokenizer", folder)
    ar_shard = read_shard(ar_file, "an AR model", folder)
    try:
        files = f"{encoder.path} and {decoder.path}"
        tokenizer = import_tokenizer(encoder, decoder)
        files = ar_shard.path
        ar = import_ar(ar_shard, tokenizer, preset=name)
    except (RuntimeError, ValueError, IndexError) as error:  # of torch, for shapes
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{files}: the shapes of the tensors do not fit: {reason}") from None
    return tokenizer, ar


def main():
    parser = argparse.ArgumentParser(
        description="Import a released pair of tokenizer and AR model.",
        epilog=f"The weights: https://huggingface.co/{REPOSITORY}",
    )
    parser.add_argument("name", choices=PAIRS, metavar="NAME", help=", ".join(PAIRS))
    parser.add_argument(
        "--from",
        dest="folder",
        metavar="DIR",
        help="folder that holds the released directories, such as DIR/prologue-l-tokenizer; "
        "without it the three files that are needed are downloaded to Hugging Face's cache",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="folder for tokenizer.safetensors and ar.safetensors; files of these names there "
        "are replaced",
    )
    args = parser.parse_args()
    tokenizer, ar = import_pair(args.name, args.folder)
    # Written only now that both are known to fit: a bad file leaves what stands in OUT as it is.
    out = Path(args.out)
    tokenizer.save(out / "tokenizer.safetensors")
    ar.save(out / "ar.safetensors")
    print(f"{args.name} is imported to {out}. Next: python sample.py --out {out}")


if __name__ == "__main__":
    main()
