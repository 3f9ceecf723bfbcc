"""The image tokenizer: an image becomes K prologue codes and N visual codes; the visual codes
become an image again.

    tokenizer = Tokenizer.load("out/tokenizer.safetensors")
    codes = tokenizer.encode(images)  # (B, 3, H, W) in [-1, 1] -> (B, K+N) int64, prologue first
    images = tokenizer.decode(codes)  # (B, K+N) or (B, N) -> (B, 3, H, W)

From top to bottom: attention and the one transformer block that encoder, decoder and AR model
share, the two quantizers, the Tokenizer with its four layouts, and at the end what every script
needs: pixels, files, bad input.

Letters in shapes: B images, N visual tokens, K prologue tokens, T tokens of any kind, D width, d
width of a head, c width of a code, V visual and P prologue codebook size.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

flash_attn_func = None
flash_attn_problem = None
try:
    from flash_attn import flash_attn_func
except ModuleNotFoundError:
    pass
except Exception as error:  # built for another torch, it fails with "undefined symbol"
    flash_attn_problem = str(error).partition("\n")[0]


# Attention


def can_flash(device, dtype):
    """Whether flash-attn is installed and serves this device and number type: half precision on
    Ampere or later."""
    if flash_attn_func is None or device.type != "cuda" or dtype == torch.float32:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def attention_backend(device, dtype):
    """What `attention` uses, in words, for the scripts to print."""
    if can_flash(device, dtype):
        return "flash-attn"
    name = "torch's scaled_dot_product_attention"
    if flash_attn_problem:
        return f"{name} (flash-attn does not load: {flash_attn_problem})"
    return name


def attention(q, k, v, causal=False, mask=None):
    """softmax(q k^T / sqrt(d)) v for tensors (B, T, heads, d); mask (T of q, T of k) bool, True
    where q may look."""
    if mask is None and can_flash(q.device, q.dtype):
        return flash_attn_func(q, k, v, causal=causal)
    q = q.transpose(1, 2)  # (B, heads, T, d)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return out.transpose(1, 2)  # (B, T, heads, d)


# Rotary position embedding (RoPE). The dimensions of a head are divided among three axes. A patch
# has the position (row, column, 0), the l-th prologue token (0, 0, l): so both can share one
# attention, and the order of the prologue is independent of rows and columns.


def rope_axis_dims(head_dim):
    """Dimensions of the axes row, column, l in a head: 20, 20, 24 of 64."""
    side = 2 * (head_dim * 5 // 32)
    return side, side, head_dim - 2 * side


def rope_angles(positions, dim, theta):
    """Positions (T,) on an axis of `dim` dimensions -> angles (T, dim/2), with frequencies
    theta^(-2i/dim)."""
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
    return (positions.double()[:, None] * frequencies).float()


def rope_of_patches(grid, head_dim):
    """Angles (grid*grid, d/2) of the patches of an image, row by row; theta is 2000. On the CPU
    even if a model is built on the meta device, because angles are in no checkpoint."""
    row_dim, column_dim, l_dim = rope_axis_dims(head_dim)
    places = torch.arange(grid, device="cpu")
    rows = rope_angles(places.repeat_interleave(grid), row_dim, 2000.0)
    columns = rope_angles(places.repeat(grid), column_dim, 2000.0)
    return torch.cat([rows, columns, torch.zeros(grid * grid, l_dim // 2, device="cpu")], 1)


def rope_of_line(length, head_dim):
    """Angles (length, d/2) of tokens in a line; theta is 10000."""
    row_dim, column_dim, l_dim = rope_axis_dims(head_dim)
    line = rope_angles(torch.arange(length, device="cpu"), l_dim, 10000.0)
    return torch.cat([torch.zeros(length, (row_dim + column_dim) // 2, device="cpu"), line], 1)


def rope(x, cos, sin):
    """Turns the pairs (x_0, x_1), (x_2, x_3), ... of x (B, T, heads, d) by the angles of a table
    (T, d/2). A narrower table, which the AR model has, leaves the last dimensions as they are."""
    width = 2 * cos.shape[-1]
    cos = cos[:, None]  # (T, 1, width/2), the same for every head
    sin = sin[:, None]
    even = x[..., 0:width:2]
    odd = x[..., 1:width:2]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    turned = turned.flatten(-2)  # (B, T, heads, width)
    if width == x.shape[-1]:
        return turned
    return torch.cat([turned, x[..., width:]], -1)


# The transformer


class RMSNorm(nn.Module):
    """x / |x| * sqrt(dim) * weight, in fp32 also under autocast."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), eps=1e-12)


class Attention(nn.Module):
    def __init__(self, dim, head_dim, bias):
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_norm = RMSNorm(head_dim)
        self.k_norm = RMSNorm(head_dim)
        self.out = nn.Linear(dim, dim, bias=bias)

    def forward(self, x, cos, sin, causal=False, cache=None, start=0):
        """x (B, T, D) -> (B, T, D). With a cache (ar.KVCache) the T tokens follow `start` earlier
        ones."""
        qkv = self.qkv(x).unflatten(-1, (3, -1, self.head_dim))  # (B, T, 3, heads, d)
        q, k, v = qkv.unbind(2)  # each (B, T, heads, d)
        q = rope(self.q_norm(q), cos, sin).to(v.dtype)
        k = rope(self.k_norm(k), cos, sin).to(v.dtype)
        if cache is None:
            y = attention(q, k, v, causal)
        else:
            y = cache.attend(q, k, v, start)
        return self.out(y.flatten(2))


class MLP(nn.Module):
    """GeGLU: fc2(gelu(b) * a) with a, b = fc1(x)."""

    def __init__(self, dim, hidden, bias):
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x):
        a, b = self.fc1(x).chunk(2, -1)  # each (B, T, hidden)
        return self.fc2(F.gelu(b, approximate="tanh") * a)


class Block(nn.Module):
    def __init__(self, dim, head_dim, hidden, bias, dropout=0.0):
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = Attention(dim, head_dim, bias)
        self.norm2 = RMSNorm(dim)
        self.mlp = MLP(dim, hidden, bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, cos, sin, causal=False, cache=None, start=0):
        x = x + self.dropout(self.attn(self.norm1(x), cos, sin, causal, cache, start))
        x = x + self.dropout(self.mlp(self.norm2(x)))
        return x


def init_weights(module, std=0.02):
    """Linear and embedding weights N(0, std), biases 0."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


class Transformer(nn.Module):
    """`layers` blocks over (B, T, dim); the MLP's hidden width is round(hidden_ratio * dim)."""

    def __init__(self, layers, dim, head_dim, hidden_ratio, bias, dropout=0.0):
        super().__init__()
        if dim % head_dim:
            raise InputError(f"a width of {dim} is not a multiple of the head width {head_dim}")
        hidden = round(hidden_ratio * dim)
        self.gradient_checkpointing = False  # set by the trainers
        blocks = [Block(dim, head_dim, hidden, bias, dropout) for _ in range(layers)]
        self.blocks = nn.ModuleList(blocks)
        self.apply(init_weights)
        for block in self.blocks:  # so that the residual stream does not grow with depth (GPT-2)
            init_weights(block.attn.out, std=0.02 / math.sqrt(2 * layers))
            init_weights(block.mlp.fc2, std=0.02 / math.sqrt(2 * layers))

    def forward(self, x, angles, causal=False, caches=None, start=0):
        """x (B, T, D), angles (T, d/2) of its positions -> (B, T, D); caches: one for each block,
        see Attention."""
        cos = angles.cos()
        sin = angles.sin()
        for i, block in enumerate(self.blocks):
            if caches is not None:
                x = block(x, cos, sin, causal, caches[i], start)
            elif self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, cos, sin, causal, use_reentrant=False)
            else:
                x = block(x, cos, sin, causal)
        return x


# The quantizers


def unit_norm(x):
    """x / |x| along the last axis. The epsilon stands inside the root, so that x = 0 has a finite
    gradient."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-12).rsqrt()


@contextlib.contextmanager
def exact_fp32(device_type):
    """True fp32 products: no autocast, no TF32. A code search in TF32 picks another code for 0.15%
    of the tokens."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


@torch.no_grad()
def nearest_code(z, codebook, chunk=1024):
    """Index of the code with the largest cosine: unit vectors z (..., c), codebook (V, c) -> (...)
    int64. In chunks, because the similarities of a whole batch to 16,384 codes would take
    gigabytes."""
    codes = unit_norm(codebook.float())  # (V, c)
    nearest = [(part @ codes.T).argmax(-1) for part in z.flatten(0, -2).split(chunk)]
    return torch.cat(nearest).view(z.shape[:-1])


class VisualQuantizer(nn.Module):
    """VQ with unit-norm codes (ViT-VQGAN): nearest code by cosine, straight-through estimator, all
    in fp32."""

    def __init__(self, dim, codebook_size, code_dim):
        super().__init__()
        self.proj = nn.Linear(dim, code_dim)
        init_weights(self.proj)
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim) * code_dim**-0.5)

    def project(self, h):
        return unit_norm(self.proj(h.float()))

    def lookup(self, codes):
        return unit_norm(F.embedding(codes, self.codebook))

    def forward(self, h):
        """h (B, N, D) -> straight-through codes (B, N, c), indices (B, N), loss. Paper section 2;
        the 0.25 is the official code's, the paper (appendix E) gives a weight of 1, which may be
        that of the whole loss."""
        with exact_fp32(h.device.type):
            z = self.project(h)  # (B, N, c)
            codes = nearest_code(z, self.codebook)  # (B, N)
            q = self.lookup(codes)  # (B, N, c)
            commitment = F.mse_loss(z, q.detach())  # pulls the encoder toward the codes
            codebook = F.mse_loss(q, z.detach())  # pulls the codes toward the encoder
            loss = 0.25 * commitment + codebook
            q = z + (q - z).detach()  # forward the code; backward as if it were z
        return q, codes, loss


def prob_ste(z, codebook, tau):
    """Unit vectors z (..., c), codebook (P, c) -> one-hot (..., P) with the gradient of softmax(cos
    / tau), indices.

    Section 2.2: p + sg(onehot - p), where sg stops the gradient. Written as onehot + (p - sg(p)),
    the forward is exactly one-hot.
    """
    p = (z @ unit_norm(codebook).T / tau).softmax(-1)  # (..., P)
    codes = p.detach().argmax(-1)
    onehot = F.one_hot(codes, len(codebook)).to(p.dtype)
    return onehot + (p - p.detach()), codes


class PrologueQuantizer(nn.Module):
    """Prob-STE. No commitment and no codebook loss: all that it learns comes from the AR model's
    cross-entropy."""

    def __init__(self, dim, codebook_size, code_dim, tau):
        super().__init__()
        self.tau = tau
        self.proj = nn.Linear(dim, code_dim)
        init_weights(self.proj)
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim) * code_dim**-0.5)

    def forward(self, h):
        """h (B, K, D) -> one-hot (B, K, P) that carries the gradient, indices (B, K)."""
        with exact_fp32(h.device.type):
            z = unit_norm(self.proj(h.float()))  # (B, K, c)
            return prob_ste(z, self.codebook, self.tau)


# The tokenizer

LAYOUTS = ("prologue", "2d", "1d", "post")

# (layers, width) of the encoder, the decoder and the post layout's prologue encoder, and what else
# differs from the defaults of TokenizerConfig. B and L are those of paper table A4, S is ours, for
# a single GPU.
SIZES = {
    "tiny": dict(encoder=(3, 96), decoder=(3, 96), post=(3, 96), head_dim=32, image_size=28,
                 patch_size=4, codebook_size=256, code_dim=8, num_prologue=8,
                 prologue_codebook_size=64),
    "S": dict(encoder=(6, 512), decoder=(6, 512), post=(6, 512), image_size=128, patch_size=8,
              codebook_size=4096),
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
    code_dim: int = 14  # c
    num_prologue: int = 16  # K; 0 in the layouts 1d and 2d
    prologue_codebook_size: int = 1024  # P
    tau: float = 0.1  # temperature of Prob-STE

    def __post_init__(self):
        if self.layout not in LAYOUTS:
            raise InputError(f"layout {self.layout!r} should be one of {', '.join(LAYOUTS)}")
        if self.image_size % self.patch_size:
            raise InputError(f"an image size of {self.image_size} is not a multiple of the patch "
                             f"size {self.patch_size}")
        if self.layout in ("1d", "2d"):
            self.num_prologue = 0
            self.prologue_codebook_size = 0
        self.encoder = tuple(self.encoder)  # JSON turns tuples into lists
        self.decoder = tuple(self.decoder)
        self.post = tuple(self.post)

    @property
    def grid(self):
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def num_visual(self):
        """N"""
        return self.grid**2


class Encoder(nn.Module):
    """A transformer over the input vectors and, behind them, learned vectors that read them (the
    queries)."""

    def __init__(self, in_dim, size, num_queries, angles, head_dim, hidden_ratio):
        super().__init__()
        layers, dim = size
        self.input = nn.Linear(in_dim, dim)
        init_weights(self.input)
        self.queries = None
        if num_queries > 0:
            self.queries = nn.Parameter(torch.randn(num_queries, dim) * 0.02)
        self.transformer = Transformer(layers, dim, head_dim, hidden_ratio, bias=True)
        self.register_buffer("angles", angles, persistent=False)

    def forward(self, x):
        """x (B, T, in_dim) -> (B, T + num_queries, D)"""
        x = self.input(x).float()  # the residual stream is fp32 also under autocast
        if self.queries is not None:
            x = torch.cat([x, self.queries.expand(len(x), -1, -1)], 1)
        return self.transformer(x, self.angles)


class Decoder(nn.Module):
    """Visual code vectors -> patches. In the layout 1d the codes are a line, and learned queries on
    the grid read them."""

    def __init__(self, cfg):
        super().__init__()
        layers, dim = cfg.decoder
        angles = rope_of_patches(cfg.grid, cfg.head_dim)
        self.queries = None
        if cfg.layout == "1d":
            angles = torch.cat([rope_of_line(cfg.num_visual, cfg.head_dim), angles])
            self.queries = nn.Parameter(torch.randn(cfg.num_visual, dim) * 0.02)
        self.input = nn.Linear(cfg.code_dim, dim)
        self.transformer = Transformer(layers, dim, cfg.head_dim, hidden_ratio=8 / 3, bias=True)
        self.norm = RMSNorm(dim)
        self.out = nn.Linear(dim, 3 * cfg.patch_size**2)
        init_weights(self.input)
        init_weights(self.out)
        self.register_buffer("angles", angles, persistent=False)

    def forward(self, q):
        """q (B, N, c) -> (B, N, patch*patch*3)"""
        n = q.shape[1]
        x = self.input(q).float()
        if self.queries is not None:
            x = torch.cat([x, self.queries.expand(len(x), -1, -1)], 1)  # (B, 2N, D)
        x = self.transformer(x, self.angles)
        return self.out(self.norm(x[:, -n:]))


class Tokenizer(nn.Module):
    """Encoder, quantizers and decoder.

    2d        the N patches are the visual tokens
    1d        N learned queries are the visual tokens
    prologue  2d, and K learned queries become the prologue tokens
    post      2d, trained before and frozen; a second encoder reads its last hidden state and makes
              the prologue tokens
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        num_queries = 0
        if cfg.layout == "prologue":
            num_queries = cfg.num_prologue
        elif cfg.layout == "1d":
            num_queries = cfg.num_visual
        dim = cfg.encoder[1]
        patches = rope_of_patches(cfg.grid, cfg.head_dim)
        angles = torch.cat([patches, rope_of_line(num_queries, cfg.head_dim)])
        self.encoder = Encoder(3 * cfg.patch_size**2, cfg.encoder, num_queries, angles,
                               cfg.head_dim, hidden_ratio=8 / 3)
        self.visual_quantizer = VisualQuantizer(dim, cfg.codebook_size, cfg.code_dim)
        self.decoder = Decoder(cfg)
        if cfg.layout == "post":
            angles = torch.cat([patches, rope_of_line(cfg.num_prologue, cfg.head_dim)])
            self.post_encoder = Encoder(dim, cfg.post, cfg.num_prologue, angles, cfg.head_dim,
                                        hidden_ratio=11 / 4)
            dim = cfg.post[1]
        if cfg.num_prologue > 0:
            self.prologue_quantizer = PrologueQuantizer(dim, cfg.prologue_codebook_size,
                                                        cfg.code_dim, cfg.tau)

    def hidden(self, images):
        """images (B, 3, H, W) -> h_visual (B, N, D), h_prologue (B, K, D) or None. Paper equation
        1."""
        size = self.cfg.image_size
        p = self.cfg.patch_size
        n = self.cfg.num_visual
        if images.shape[1:] != (3, size, size):
            shape = tuple(images.shape[1:])
            raise ValueError(f"images {shape} given to a tokenizer of (3, {size}, {size})")
        x = images.unflatten(2, (-1, p)).unflatten(4, (-1, p))  # (B, 3, rows, p, columns, p)
        x = x.permute(0, 2, 4, 3, 5, 1)  # (B, rows, columns, p, p, 3)
        h = self.encoder(x.flatten(3).flatten(1, 2))  # (B, N, p*p*3) -> (B, N + num_queries, D)
        if self.cfg.layout == "2d":
            return h, None
        if self.cfg.layout == "1d":
            return h[:, n:], None
        if self.cfg.layout == "post":
            return h, self.post_encoder(h)[:, n:]
        return h[:, :n], h[:, n:]

    def pixels(self, q):
        """Visual code vectors (B, N, c) -> images (B, 3, H, W)."""
        p = self.cfg.patch_size
        x = self.decoder(q).float()  # (B, N, p*p*3)
        x = x.unflatten(1, (self.cfg.grid, -1))  # (B, rows, columns, p*p*3)
        x = x.unflatten(3, (p, p, 3))  # (B, rows, columns, p, p, 3)
        x = x.permute(0, 5, 1, 3, 2, 4)  # (B, 3, rows, p, columns, p)
        return x.flatten(4, 5).flatten(2, 3)

    def forward(self, images, direct_ce=False):
        """The training pass: images (B, 3, H, W) -> reconstruction (B, 3, H, W), codes (B, K+N),
        one-hot, VQ loss.

        The one-hot carries CE's gradient: it is that of the prologue (B, K, P), or with direct_ce
        that of the visual codes (B, N, V), or None. The layout post has a frozen decoder and gives
        no reconstruction.
        """
        h_visual, h_prologue = self.hidden(images)
        q, codes, vq_loss = self.visual_quantizer(h_visual)
        onehot = None
        if h_prologue is not None:
            onehot, prologue_codes = self.prologue_quantizer(h_prologue)
            codes = torch.cat([prologue_codes, codes], 1)  # (B, K+N)
        elif direct_ce:
            with exact_fp32(images.device.type):
                z = self.visual_quantizer.project(h_visual)
                onehot, _ = prob_ste(z, self.visual_quantizer.codebook, self.cfg.tau)
        reconstruction = None
        if self.cfg.layout != "post":
            reconstruction = self.pixels(q)
        return reconstruction, codes, onehot, vq_loss

    @torch.no_grad()
    def encode(self, images):
        """images (B, 3, H, W) in [-1, 1] -> codes (B, K+N) int64, prologue first, each counted from
        0."""
        h_visual, h_prologue = self.hidden(images)
        _, codes, _ = self.visual_quantizer(h_visual)
        if h_prologue is not None:
            _, prologue_codes = self.prologue_quantizer(h_prologue)
            codes = torch.cat([prologue_codes, codes], 1)
        return codes

    @torch.no_grad()
    def decode(self, codes):
        """codes (B, K+N) or (B, N) -> images (B, 3, H, W), about [-1, 1]; the prologue is not
        looked at."""
        n = self.cfg.num_visual
        k = self.cfg.num_prologue
        if codes.shape[1] not in (n, k + n):
            raise ValueError(f"{codes.shape[1]} codes per image given to a tokenizer of {k}+{n}")
        return self.pixels(self.visual_quantizer.lookup(codes[:, -n:]))

    def fingerprint(self):
        """A short hash of the weights: token files and AR checkpoints carry it to say which
        tokenizer they belong to."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            sha.update(name.encode())
            sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        return sha.hexdigest()[:16]

    def save(self, path):
        save_checkpoint(path, "tokenizer", self.state_dict(), asdict(self.cfg))

    @classmethod
    def load(cls, path):
        """A frozen tokenizer in eval mode from a file that `save` wrote. Raises InputError."""
        return read_checkpoint(path, "tokenizer", lambda cfg: cls(TokenizerConfig(**cfg)))


# Pixels


def to_float(images):
    """uint8 0..255 -> float in [-1, 1]"""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """(B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3) on the CPU. The 128 is 127.5 + 0.5 for
    rounding, because the cast truncates; to_uint8(to_float(x)) is x."""
    levels = (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu()


# Files


@contextlib.contextmanager
def writing(path):
    """Yields a path beside `path` to write to, which becomes `path` only when the block ends
    without an error: whoever reads sees the old file or the new one, whole. Raises InputError where
    nothing can be written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError,
            safetensors.SafetensorError) as error:  # of Python, torch.save and safetensors
        if temporary.exists():
            temporary.unlink()
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be written: {reason}") from None


def save_checkpoint(path, kind, tensors, cfg):
    """Weights and config in one safetensors file. Raises InputError for weights that are not
    finite: the file that stands there is then the last good one, and stays."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"{path} is not written: the weights {name} are not finite")
    # One entry, because safetensors orders several at random, and equal weights should give equal
    # files.
    metadata = {"config": json.dumps({"kind": kind} | cfg)}
    with writing(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata)
        os.chmod(temporary, 0o644)  # safetensors creates files only their owner can read


def open_safetensors(path):
    """A safetensors file as {name: memory-mapped tensor}, and its metadata. Raises InputError."""
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist, or is no file")
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return tensors, file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is not a whole safetensors file: {error}") from None


def read_checkpoint(path, kind, build):
    """The model in a file that `save_checkpoint` wrote for `kind`; build(config dict) makes it.
    Raises InputError."""
    tensors, metadata = open_safetensors(path)
    try:
        cfg = json.loads(metadata["config"])
        found = cfg.pop("kind")
    except (KeyError, ValueError, TypeError, AttributeError):
        raise InputError(f"{path} is no checkpoint of these scripts: its metadata holds no config "
                         "(released weights are imported by tools/released.py)") from None
    if found != kind:
        raise InputError(f"{path} holds {found!r} weights where {kind!r} weights are needed")
    try:
        with torch.device("meta"):  # nothing is allocated or initialized twice
            model = build(cfg)
        model.load_state_dict(tensors, assign=True)
        for name, buffer in model.named_buffers():
            if buffer.is_meta:  # has to be made with device="cpu", as the angles of RoPE are
                raise ValueError(f"the buffer {name} is in no checkpoint")
    except (InputError, TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: config or weights do not fit this code: {reason}") from None
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"{path} is of no use: its weights {name} are not finite")
    return model.eval().requires_grad_(False)


# Bad input, and flags


class InputError(SystemExit):
    """What the user gave cannot be used; the message is one sentence that names it and says what
    would be right. Nobody has to catch it: Python prints the sentence and exits with code 1."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help that names the default of a flag, but for switches and where the text explains it."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def whole(minimum):
    """An argparse type: whole numbers of at least `minimum`."""

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            message = f"{text!r} is not a whole number of at least {minimum}"
            raise argparse.ArgumentTypeError(message)
        return value

    return parse


def real(minimum, maximum=math.inf):
    """An argparse type: finite numbers from `minimum` to `maximum`."""

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and minimum <= value <= maximum):
            end = "" if maximum == math.inf else f" to {maximum:g}"
            message = f"{text!r} is not a finite number from {minimum:g}{end}"
            raise argparse.ArgumentTypeError(message)
        return value

    return parse
