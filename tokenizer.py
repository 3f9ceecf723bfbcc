"""The image tokenizer: an image becomes K prologue codes and N visual codes; the visual codes become an image again.

    tokenizer = Tokenizer.load("out/tokenizer.safetensors")     # our file, or a directory of the authors' release
    codes = tokenizer.encode(images)                            # (B, 3, H, W) in [-1, 1] -> (B, K+N) int64
    images = tokenizer.decode(codes)                            # (B, K+N) or (B, N) -> (B, 3, H, W)

From top to bottom: small helpers, attention and the one transformer block that encoder, decoder and AR model share,
the two quantisers, the Tokenizer with its four layouts, and how it is saved and loaded.

Letters: B images, N visual tokens, K prologue tokens, D width, d head width, V visual and P prologue codebook size.
"""
import functools
import hashlib
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import InputError, Linear, exact_fp32, open_safetensors, product, read_checkpoint, save_checkpoint

try:
    from flash_attn import flash_attn_func, flash_attn_with_kvcache
except Exception:  # not only a missing package: a build for another torch fails with "undefined symbol"
    flash_attn_func = flash_attn_with_kvcache = None


def unit_norm(x):
    """x / |x| along the last axis; the epsilon stands inside the root, so x = 0 has a finite gradient."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-12).rsqrt()


@functools.cache
def can_flash(device):
    """flash-attn is installed and serves this device: CUDA of Ampere or later."""
    return flash_attn_func is not None and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def attention(q, k, v, causal=False, mask=None):
    """softmax(q k^T / sqrt(d)) v for tensors (B, T, heads, d), by flash-attn where it is installed and can be used."""
    if mask is None and q.dtype != torch.float32 and can_flash(q.device):
        return flash_attn_func(q, k, v, causal=causal)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, d)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2)


def rope_axis_dims(head_dim):
    """Widths of the three RoPE axes (row, column, l): 20, 20, 24 for a head of 64."""
    side = 2 * (head_dim * 5 // 32)
    return side, side, head_dim - 2 * side


def rope_angles(positions, dim, theta):
    """Positions (T,) on an axis of `dim` dimensions -> angles (T, dim/2), frequencies theta^(-2i/dim)."""
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
    return (positions.double()[:, None] * frequency).float()


def rope_tables(grid, sequence, head_dim):
    """RoPE angles of grid x grid patches (theta 2000) and of `sequence` 1D positions (theta 10000).
    Returns (grid*grid, head_dim/2) and (sequence, head_dim/2). A patch turns its row and column dimensions, a 1D token
    only its l dimensions. Always on the CPU, so that a model built on the meta device still has them.
    """
    row_dim, col_dim, l_dim = rope_axis_dims(head_dim)
    row, col = torch.arange(grid, device="cpu").repeat_interleave(grid), torch.arange(grid, device="cpu").repeat(grid)
    patches = torch.cat([rope_angles(row, row_dim, 2000.0), rope_angles(col, col_dim, 2000.0),
                         torch.zeros(grid * grid, l_dim // 2, device="cpu")], 1)
    line = rope_angles(torch.arange(sequence, device="cpu"), l_dim, 10000.0)
    return patches, torch.cat([torch.zeros(sequence, (row_dim + col_dim) // 2, device="cpu"), line], 1)


def rope(x, cos, sin):
    """Turns the interleaved pairs (x_0, x_1), (x_2, x_3), ... of x (B, T, heads, d) by the angles of a (T, d/2) table; a narrower
    one (the AR's) leaves the last dimensions as they are."""
    width = 2 * cos.shape[-1]
    even, odd = x[..., 0:width:2], x[..., 1:width:2]
    cos, sin = cos[:, None], sin[:, None]  # (T, 1, width/2), the same for every head
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], -1)


class RMSNorm(nn.Module):
    """x / |x| * sqrt(dim) * weight, in fp32 whatever autocast says."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), eps=1e-12)


class Attention(nn.Module):
    def __init__(self, dim, head_dim, bias):
        super().__init__()
        self.head_dim = head_dim
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.q_norm, self.k_norm = RMSNorm(head_dim), RMSNorm(head_dim)
        self.out = Linear(dim, dim, bias=bias)

    def forward(self, x, cos, sin, attend):
        """x (B, T, D), attend(q, k, v) -> (B, T, heads, d): `attention`, or a cache that adds all keys and values before"""
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).unbind(2)  # each (B, T, heads, d)
        q = rope(self.q_norm(q), cos, sin).to(v.dtype)
        k = rope(self.k_norm(k), cos, sin).to(v.dtype)
        return self.out(attend(q, k, v).flatten(2))  # (B, T, D)


class MLP(nn.Module):
    """GeGLU: fc2(gelu(b) * a) with a, b = fc1(x)."""

    def __init__(self, dim, hidden, bias):
        super().__init__()
        self.fc1 = Linear(dim, 2 * hidden, bias=bias)
        self.fc2 = Linear(hidden, dim, bias=bias)

    def forward(self, x):
        a, b = self.fc1(x).chunk(2, -1)  # each (B, T, hidden)
        return self.fc2(F.gelu(b, approximate="tanh") * a)


class Block(nn.Module):
    def __init__(self, dim, head_dim, hidden, bias, dropout=0.0):
        super().__init__()
        self.norm1, self.attn = RMSNorm(dim), Attention(dim, head_dim, bias)
        self.norm2, self.mlp = RMSNorm(dim), MLP(dim, hidden, bias)
        self.drop = nn.Dropout(dropout)

    def forward(self, x, cos, sin, attend):
        x = x + self.drop(self.attn(self.norm1(x), cos, sin, attend))
        return x + self.drop(self.mlp(self.norm2(x)))


def init_weights(module, std=0.02):
    """Linear and embedding weights N(0, std), biases 0; nothing on the meta device, where it would import half of torch."""
    if isinstance(module, (nn.Linear, nn.Embedding)) and not module.weight.is_meta:
        nn.init.normal_(module.weight, std=std)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


class Transformer(nn.Module):
    """`layers` blocks over (B, T, dim); MLP hidden width round(hidden_ratio * dim)."""
    gradient_checkpointing = False  # the trainers' flag sets it for all

    def __init__(self, layers, dim, head_dim, hidden_ratio, bias, dropout=0.0):
        super().__init__()
        if dim % head_dim:
            raise InputError(f"a width of {dim} is not a multiple of the head width {head_dim}")
        self.blocks = nn.ModuleList(Block(dim, head_dim, round(hidden_ratio * dim), bias, dropout) for _ in range(layers))
        self.apply(init_weights)
        for block in self.blocks:  # the residual stream keeps its size whatever the depth
            init_weights(block.attn.out, 0.02 / math.sqrt(2 * layers)), init_weights(block.mlp.fc2, 0.02 / math.sqrt(2 * layers))

    def forward(self, x, angles, causal=False, caches=None, start=0):
        """x (B, T, D), angles (T, d/2) of its positions -> (B, T, D); with caches the T tokens stand at start, start + 1, ..."""
        cos, sin = angles.cos(), angles.sin()
        for i, block in enumerate(self.blocks):
            attend = functools.partial(caches[i].attend, start=start) if caches else functools.partial(attention, causal=causal)
            again = self.gradient_checkpointing and self.training
            x = checkpoint(block, x, cos, sin, attend, use_reentrant=False) if again else block(x, cos, sin, attend)
        return x


@torch.no_grad()
def nearest_code(z, codebook, chunk=1024):
    """Index of the code with the largest cosine to each z: unit vectors z (..., c), codebook (V, c) -> (...) int64. No more
    than chunk x V similarities exist at once."""
    codes = unit_norm(codebook.float())  # (V, c)
    return torch.cat([product(part, codes).argmax(-1) for part in z.flatten(0, -2).split(chunk)]).view(z.shape[:-1])


class VisualQuantizer(nn.Module):
    """VQ with unit-norm codes (ViT-VQGAN): nearest code by cosine, straight-through estimator, all in fp32."""

    def __init__(self, dim, codebook_size, code_dim):
        super().__init__()
        self.proj = Linear(dim, code_dim)
        init_weights(self.proj)
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim) * code_dim**-0.5)

    def project(self, h):
        return unit_norm(self.proj(h.float()))

    def lookup(self, codes):
        return unit_norm(F.embedding(codes, self.codebook))

    def forward(self, h):
        """h (B, N, D) -> straight-through codes (B, N, c), indices (B, N), loss. Paper section 2 and appendix E."""
        with exact_fp32(h.device.type):
            z = self.project(h)
            codes = nearest_code(z, self.codebook)
            q = self.lookup(codes)
            loss = 0.25 * F.mse_loss(z, q.detach()) + F.mse_loss(q, z.detach())  # commitment, codebook
        return z + (q - z).detach(), codes, loss


def prob_ste(z, codebook, tau):
    """Unit vectors z (..., c), codebook (P, c) -> one-hot (..., P) with the gradient of softmax(cos / tau), indices.

    Equation of section 2.2: p + sg(onehot - p). Written as onehot + (p - sg(p)), the forward is one-hot to the bit.
    """
    p = (z @ unit_norm(codebook).T / tau).softmax(-1)
    codes = p.detach().argmax(-1)
    return F.one_hot(codes, len(codebook)).to(p.dtype) + (p - p.detach()), codes


class PrologueQuantizer(nn.Module):
    """Prob-STE: no commitment and no codebook loss; all it ever learns comes from the AR's cross-entropy."""

    def __init__(self, dim, codebook_size, code_dim, tau):
        super().__init__()
        self.tau = tau
        self.proj = Linear(dim, code_dim)
        init_weights(self.proj)
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim) * code_dim**-0.5)

    def forward(self, h):
        """h (B, K, D) -> one-hot (B, K, P) that carries the gradient, indices (B, K)."""
        with exact_fp32(h.device.type):
            return prob_ste(unit_norm(self.proj(h.float())), self.codebook, self.tau)


LAYOUTS = ("prologue", "2d", "1d", "post")
# (layers, width) of encoder, decoder and the post layout's prologue encoder: paper table A4.
SIZES = {
    "tiny": dict(encoder=(3, 96), decoder=(3, 96), post=(3, 96), head_dim=32, patch_size=4, image_size=28,
                 codebook_size=256, code_dim=8, num_prologue=8, prologue_codebook_size=64),
    "B": dict(encoder=(12, 768), decoder=(12, 768), post=(10, 512), codebook_size=16384),
    "L": dict(encoder=(12, 768), decoder=(24, 1024), post=(10, 512), codebook_size=4096),
}


@dataclass
class TokenizerConfig:
    layout: str = "prologue"
    image_size: int = 256
    patch_size: int = 16
    encoder: tuple = (12, 768)  # layers, width
    decoder: tuple = (12, 768)
    post: tuple = (10, 512)
    head_dim: int = 64
    codebook_size: int = 16384  # V
    code_dim: int = 14
    num_prologue: int = 16  # K, 0 in the layouts 1d and 2d
    prologue_codebook_size: int = 1024  # P
    tau: float = 0.1

    def __post_init__(self):
        self.encoder, self.decoder, self.post = tuple(self.encoder), tuple(self.decoder), tuple(self.post)  # JSON has lists
        if self.layout not in LAYOUTS:
            raise InputError(f"layout {self.layout!r} is unknown; choose one of {', '.join(LAYOUTS)}")
        if self.image_size % self.patch_size:
            raise InputError(f"an image size of {self.image_size} is not a multiple of the patch size {self.patch_size}")
        if self.layout in ("1d", "2d"):
            self.num_prologue = self.prologue_codebook_size = 0

    @property
    def num_visual(self):  # N
        return (self.image_size // self.patch_size) ** 2


class Encoder(nn.Module):
    """Transformer over projected input vectors, with learned vectors (`queries` of them) placed after them."""

    def __init__(self, in_dim, size, queries, angles, head_dim, hidden_ratio):
        super().__init__()
        layers, dim = size
        self.input = Linear(in_dim, dim)
        init_weights(self.input)
        self.queries = nn.Parameter(torch.randn(queries, dim) * 0.02) if queries else None
        self.transformer = Transformer(layers, dim, head_dim, hidden_ratio, bias=True)
        self.register_buffer("angles", angles, persistent=False)

    def forward(self, x):
        """x (B, T, in_dim) -> (B, T + queries, D); the residual stream is fp32 also under autocast"""
        x = self.input(x).float()
        if self.queries is not None:
            x = torch.cat([x, self.queries.expand(len(x), -1, -1)], 1)
        return self.transformer(x, self.angles)


class Decoder(Encoder):
    """Visual code vectors -> patches. In the layout 1d the codes are a line, and learned queries on the grid read them."""

    def __init__(self, cfg, patches, line):
        queries, angles = (cfg.num_visual, torch.cat([line, patches])) if cfg.layout == "1d" else (0, patches)
        super().__init__(cfg.code_dim, cfg.decoder, queries, angles, cfg.head_dim, 8 / 3)
        self.norm = RMSNorm(cfg.decoder[1])
        self.out = Linear(cfg.decoder[1], 3 * cfg.patch_size**2)
        init_weights(self.out)

    def forward(self, q):
        """q (B, N, code_dim) -> (B, N, patch*patch*3)"""
        return self.out(self.norm(super().forward(q)[:, -q.shape[1]:]))


class Tokenizer(nn.Module):
    """Encoder, quantisers and decoder.

    2d        the N patches are the visual tokens
    1d        N learned queries are the visual tokens
    prologue  2d, and K learned queries become the prologue tokens
    post      2d, frozen, and a second encoder reads its last hidden state to make the prologue tokens
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        dim, queries = cfg.encoder[1], {"2d": 0, "1d": cfg.num_visual, "prologue": cfg.num_prologue, "post": 0}[cfg.layout]
        patches, line = rope_tables(cfg.image_size // cfg.patch_size, max(cfg.num_visual, cfg.num_prologue), cfg.head_dim)
        angles = torch.cat([patches, line[:queries]])
        self.encoder = Encoder(3 * cfg.patch_size**2, cfg.encoder, queries, angles, cfg.head_dim, 8 / 3)
        self.visual_quantizer = VisualQuantizer(dim, cfg.codebook_size, cfg.code_dim)
        self.decoder = Decoder(cfg, patches, line[:cfg.num_visual])
        if cfg.layout == "post":
            angles = torch.cat([patches, line[:cfg.num_prologue]])
            self.post_encoder = Encoder(dim, cfg.post, cfg.num_prologue, angles, cfg.head_dim, 11 / 4)
        if cfg.num_prologue:
            dim = cfg.post[1] if cfg.layout == "post" else dim
            self.prologue_quantizer = PrologueQuantizer(dim, cfg.prologue_codebook_size, cfg.code_dim, cfg.tau)

    def hidden(self, images):
        """images (B, 3, H, W) -> h_visual (B, N, D), h_prologue (B, K, D) or None. Paper equation 1."""
        p, size = self.cfg.patch_size, self.cfg.image_size
        if images.shape[1:] != (3, size, size):
            raise InputError(f"images of shape {tuple(images.shape[1:])} given to a tokenizer of (3, {size}, {size})")
        x = images.unflatten(2, (-1, p)).unflatten(4, (-1, p))  # (B, 3, rows, p, columns, p)
        x = x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B, N, p*p*3), flat as (row, column, channel)
        h = self.encoder(x)
        n = self.cfg.num_visual
        if self.cfg.layout == "1d":
            return h[:, n:], None
        if self.cfg.layout == "post":
            return h, self.post_encoder(h)[:, n:]
        return h[:, :n], h[:, n:] if self.cfg.num_prologue else None

    def pixels(self, q):
        """Visual code vectors (B, N, code_dim) -> images (B, 3, H, W)."""
        p, grid = self.cfg.patch_size, self.cfg.image_size // self.cfg.patch_size
        x = self.decoder(q).float().unflatten(2, (p, p, 3)).unflatten(1, (grid, grid))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def forward(self, images, direct_ce=False):
        """The training pass: reconstruction (none in the layout post, whose visual path is frozen), codes (B, K+N),
        one-hot prologue (B, K, P) or None, VQ loss. With `direct_ce` the one-hot is that of the visual codes (B, N, V)."""
        h_visual, h_prologue = self.hidden(images)
        q, codes, vq_loss = self.visual_quantizer(h_visual)
        onehot = None
        if direct_ce:
            with exact_fp32(images.device.type):
                onehot, _ = prob_ste(self.visual_quantizer.project(h_visual), self.visual_quantizer.codebook, self.cfg.tau)
        if h_prologue is not None:
            onehot, prologue_codes = self.prologue_quantizer(h_prologue)
            codes = torch.cat([prologue_codes, codes], 1)
        return None if self.cfg.layout == "post" else self.pixels(q), codes, onehot, vq_loss

    @torch.no_grad()
    def encode(self, images):
        """images (B, 3, H, W) in [-1, 1] -> codes (B, K+N) int64, prologue first, each counted from 0."""
        h_visual, h_prologue = self.hidden(images)
        codes = self.visual_quantizer(h_visual)[1]
        return codes if h_prologue is None else torch.cat([self.prologue_quantizer(h_prologue)[1], codes], 1)

    @torch.no_grad()
    def decode(self, codes):
        """codes (B, K+N) or (B, N) -> images (B, 3, H, W), about [-1, 1]; the prologue is not looked at."""
        n = self.cfg.num_visual
        if codes.shape[1] not in (n, n + self.cfg.num_prologue):
            raise InputError(f"{codes.shape[1]} codes per image given to a tokenizer of {self.cfg.num_prologue}+{n}")
        return self.pixels(self.visual_quantizer.lookup(codes[:, -n:]))

    def fingerprint(self):
        """A short hash that tells tokenizers apart: token files and AR checkpoints carry it. Of the weights outside the
        transformers, because those of a released tokenizer are folded and differ in the last bit from CPU to CPU."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            if "transformer" in name or "norm" in name:
                continue
            sha.update(name.encode())
            sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        return sha.hexdigest()[:16]

    def save(self, path):
        save_checkpoint(path, "tokenizer", self.state_dict(), asdict(self.cfg))

    @classmethod
    def load(cls, path):
        """Our .safetensors file, or a tokenizer directory of the authors' release. Raises InputError."""
        cfg, tensors = released_tokenizer(path) if Path(path).is_dir() else read_checkpoint(path, "tokenizer")
        with torch.device("meta"):  # nothing is allocated or initialised twice
            model = cls(TokenizerConfig(**cfg))
        model.load_state_dict(tensors, assign=True)
        return model.eval().requires_grad_(False)


# The released checkpoints. Their networks are conditioned on a label that is the same constant in every release, so the
# adaptive norms and gates are constants too and fold into the plain weights above without changing a number.


def fold(official, prefix):
    """The adaptive network at `prefix` of the official tensors -> ({our name: tensor} of the plain one, (layers, width))."""
    t = {name[len(prefix) + 1:]: tensor for name, tensor in official.items() if name.startswith(prefix + ".")}
    # The condition is the one-hot "unconditional" label, the last: one column of the projection, then an RMS norm.
    c = unit_norm(t["cond_proj.0.weight"][:, -1] + t["cond_proj.0.bias"]) * len(t["cond_proj.0.bias"]) ** 0.5
    c = F.gelu(c * (1 + t["cond_proj.1.weight"]), approximate="tanh")

    def affine(name):
        return t[f"{name}.weight"] @ c + t.get(f"{name}.bias", 0)  # the AR's gates have no bias

    plain, layers = {}, len({name.split(".")[1] for name in t if name.startswith("layers.")})
    for i in range(layers):
        ours, layer = f"transformer.blocks.{i}", f"layers.{i}"
        plain[f"{ours}.norm1.weight"] = 1 + affine(f"{layer}.adaln_1.affine")
        plain[f"{ours}.norm2.weight"] = 1 + affine(f"{layer}.adaln_mlp.affine")
        plain[f"{ours}.attn.q_norm.weight"] = 1 + t[f"{layer}.attn1.q_norm.weight"]
        plain[f"{ours}.attn.k_norm.weight"] = 1 + t[f"{layer}.attn1.k_norm.weight"]
        plain[f"{ours}.attn.qkv.weight"] = torch.cat([t[f"{layer}.attn1.to_q.weight"], t[f"{layer}.attn1.to_kv.weight"]])
        for name, theirs in (("attn.out", "attn1.proj"), ("mlp.fc1", "ffn.fc1"), ("mlp.fc2", "ffn.fc2")):
            plain[f"{ours}.{name}.weight"] = t[f"{layer}.{theirs}.weight"]
            if f"{layer}.{theirs}.bias" in t:  # the AR has none
                plain[f"{ours}.{name}.bias"] = t[f"{layer}.{theirs}.bias"]
        for name, gate in (("attn.out", "gate1"), ("mlp.fc2", "gate_mlp")):
            # In place: the file is mapped privately, so its pages are replaced, never written and never doubled.
            plain[f"{ours}.{name}.weight"].mul_(affine(f"{layer}.{gate}")[:, None])
            if f"{ours}.{name}.bias" in plain:
                plain[f"{ours}.{name}.bias"].mul_(affine(f"{layer}.{gate}"))
    for name, theirs in (("input", "input_layer"), ("out", "out")):
        plain |= {f"{name}.{part}": t[f"{theirs}.{part}"] for part in ("weight", "bias") if f"{theirs}.{part}" in t}
    if "out_norm.affine.weight" in t:
        plain["norm.weight"] = 1 + affine("out_norm.affine")
    if "learnable_query" in t:
        plain["queries"] = t["learnable_query"][0]
    return plain, (layers, plain["transformer.blocks.0.norm1.weight"].numel())


def released_shard(directory, number, holds):
    """Tensors of the model[_number].safetensors of a released directory. Raises InputError."""
    path = Path(directory) / (f"model_{number}.safetensors" if number else "model.safetensors")
    if not path.is_file():
        raise InputError(f"{directory} lacks {path.name} ({holds}); a released directory, wholly downloaded, is needed")
    return open_safetensors(path)[0]


def is_onestage(directory):
    """Whether a released tokenizer directory is OneStage's: its joint AR is a full one, not the 7 x 512 of all others."""
    if not (Path(directory) / "model_5.safetensors").is_file():
        return False
    shard = released_shard(directory, 5, "joint AR")
    blocks = {name.split(".")[2] for name in shard if name.startswith("ar_model.layers.")}
    named = "onestage" in Path(directory).resolve().name.lower()
    return bool(blocks) and (named or len(blocks) > 7 or shard["ar_model.out.weight"].shape[1] > 512)


def released_tokenizer(directory):
    """Config and weights of a released tokenizer directory: the EMA, but OneStage's raw ones. Raises InputError."""
    first = released_shard(directory, 0, "encoder")
    if "quantizer.embedding.weight" not in first:
        raise InputError(f"{directory} is no tokenizer directory: its model.safetensors holds no visual codebook")
    raw = is_onestage(directory)
    enc = first if raw else released_shard(directory, 2, "EMA of the encoder")
    dec = released_shard(directory, 1, "decoder") if raw else released_shard(directory, 3, "EMA of the decoder")
    networks = sorted({name.partition(".layers.")[0] for name in enc if ".layers." in name} - {"enc"})
    encoder, encoder_size = fold(enc, "enc")
    decoder, decoder_size = fold(dec, "dec")
    n, v = enc["quantizer.pos_select_mask"].shape
    patch_size = math.isqrt(len(decoder["out.bias"]) // 3)
    cfg = dict(layout="1d" if "queries" in encoder else "2d", encoder=encoder_size, decoder=decoder_size, patch_size=patch_size,
               image_size=patch_size * math.isqrt(n), codebook_size=v, code_dim=enc["quantizer.embedding.weight"].shape[1],
               head_dim=encoder["transformer.blocks.0.attn.q_norm.weight"].numel())
    parts, quantizers = {"encoder": encoder, "decoder": decoder}, {"visual_quantizer": "quantizer"}
    if "semantic_quantizer.embedding.weight" in enc:
        quantizers["prologue_quantizer"] = "semantic_quantizer"
        cfg["num_prologue"], cfg["prologue_codebook_size"] = enc["semantic_quantizer.pos_select_mask"].shape
        cfg["layout"] = "post" if networks else "prologue"
    if networks:
        parts["post_encoder"], cfg["post"] = fold(enc, networks[0])
    for ours, theirs in quantizers.items():
        parts[ours] = {"proj.weight": enc[f"{theirs}.proj_in.weight"], "proj.bias": enc[f"{theirs}.proj_in.bias"],
                       "codebook": enc[f"{theirs}.embedding.weight"]}
    return cfg, {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
