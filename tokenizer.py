"""The image tokenizer: an image becomes K prologue codes and N visual codes; the visual codes
become an image again.

    tokenizer = Tokenizer.load("out/tokenizer.safetensors")
    codes = tokenizer.encode(images)  # (B, 3, H, W) in [-1, 1] -> (B, K+N) int64, prologue first
    images = tokenizer.decode(codes)  # (B, K+N) or (B, N) -> (B, 3, H, W)

Letters in shapes: B images, N visual tokens, K prologue tokens, T tokens of any kind, D width, d
width of a head, c width of a code, V visual and P prologue codebook size.
"""

import contextlib
import hashlib
import json
import math
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

try:
    from flash_attn import flash_attn_func
except Exception:  # not installed, or built for another torch ("undefined symbol")
    flash_attn_func = None


# Attention

def can_flash(device, dtype):
    """Whether flash-attn serves this device and dtype: half precision on Ampere or later."""
    can = flash_attn_func is not None and device.type == "cuda" and dtype != torch.float32
    return can and torch.cuda.get_device_capability(device) >= (8, 0)


def attention(q, k, v, causal=False, mask=None):
    """softmax(q k^T / sqrt(d)) v of (B, T, heads, d); mask (T of q, T of k): where q may look."""
    if mask is None and can_flash(q.device, q.dtype):
        return flash_attn_func(q, k, v, causal=causal)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, d)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return out.transpose(1, 2)  # (B, T, heads, d)


# Rotary position embedding (RoPE). The dimensions of a head are divided among three axes. A patch
# has the position (row, column, 0), the l-th prologue token (0, 0, l): so both share one attention.

def rope_axis_dims(head_dim):
    """Dimensions of the axes row, column, l in a head: 20, 20, 24 of 64, in pairs."""
    side = 2 * (head_dim * 5 // 32)
    return side, side, head_dim - 2 * side


def rope_angles(positions, dim, theta):
    """Positions (T,) on an axis of `dim` dimensions -> angles (T, dim/2): times theta^(-2i/dim)."""
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return (positions.double()[:, None] * frequencies).float()


def rope_table(grid, line, head_dim):
    """Angles (grid*grid + line, d/2): first of an image's patches, row by row (theta 2000), then of
    `line` tokens in a line (theta 10000). Either has angle 0 on the other's axes."""
    row_dim, column_dim, l_dim = rope_axis_dims(head_dim)
    places = torch.arange(grid)
    rows = rope_angles(places.repeat_interleave(grid), row_dim, 2000.0)
    columns = rope_angles(places.repeat(grid), column_dim, 2000.0)
    patches = F.pad(torch.cat([rows, columns], 1), (0, l_dim // 2))  # (grid*grid, d/2)
    tokens = rope_angles(torch.arange(line), l_dim, 10000.0)
    tokens = F.pad(tokens, ((row_dim + column_dim) // 2, 0))  # (line, d/2)
    return torch.cat([patches, tokens])


def rope(x, cos, sin):
    """Turns the pairs (x_0, x_1), (x_2, x_3), ... of x (B, T, heads, d) by angles (T, 1, d/2)."""
    even = x[..., 0::2]
    odd = x[..., 1::2]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return turned.flatten(-2)  # (B, T, heads, d)


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
        """x (B, T, D) -> (B, T, D); with a cache (ar.KVCache) they follow `start` earlier ones."""
        qkv = self.qkv(x).unflatten(-1, (3, -1, self.head_dim))  # (B, T, 3, heads, d)
        q, k, v = qkv.unbind(2)  # each (B, T, heads, d)
        q = rope(self.q_norm(q), cos, sin).to(v.dtype)
        k = rope(self.k_norm(k), cos, sin).to(v.dtype)
        y = cache.attend(q, k, v, start) if cache else attention(q, k, v, causal)
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
        return x + self.dropout(self.mlp(self.norm2(x)))


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
        self.gradient_checkpointing = False  # set by the trainers
        self.blocks = nn.ModuleList(Block(dim, head_dim, round(hidden_ratio * dim), bias, dropout)
                                    for _ in range(layers))
        self.apply(init_weights)
        for block in self.blocks:  # so that the residual stream does not grow with depth (GPT-2)
            init_weights(block.attn.out, std=0.02 / math.sqrt(2 * layers))
            init_weights(block.mlp.fc2, std=0.02 / math.sqrt(2 * layers))

    def forward(self, x, angles, causal=False, caches=None, start=0):
        """x (B, T, D), angles (T, d/2) of its positions -> (B, T, D); caches: one for a block."""
        cos = angles.cos()[:, None]  # (T, 1, d/2), the same for every head
        sin = angles.sin()[:, None]
        for i, block in enumerate(self.blocks):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, cos, sin, causal, use_reentrant=False)
            else:
                x = block(x, cos, sin, causal, caches[i] if caches else None, start)
        return x


# The quantizers

def unit_norm(x, dim=-1, eps=1e-12):
    """x / |x| along an axis; the epsilon inside the root gives x = 0 a finite gradient."""
    return x * (x.square().sum(dim, keepdim=True) + eps).rsqrt()


@contextlib.contextmanager
def exact_fp32(device_type):
    """No autocast, no TF32: it would change the nearest code of up to 0.15% of the tokens."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with torch.autocast(device_type, enabled=False):
        yield
    torch.set_float32_matmul_precision(precision)


@torch.no_grad()
def nearest_code(z, codebook, chunk=1024):
    """Index of the code with the largest cosine: unit vectors z (..., c), codebook (V, c) -> (...).
    In chunks, because the similarities of a whole batch to 16,384 codes would take gigabytes."""
    q = unit_norm(codebook.float())  # (V, c)
    codes = [(part @ q.T).argmax(-1) for part in z.flatten(0, -2).split(chunk)]
    return torch.cat(codes).view(z.shape[:-1])


class VisualQuantizer(nn.Module):
    """VQ with unit-norm codes (ViT-VQGAN): nearest by cosine, straight-through, all in fp32."""

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
        """h (B, N, D) -> code vectors q (B, N, c) with a straight-through gradient, codes (B, N),
        losses by name, all added to the objective and logged. Paper section 2; 0.25 as in the
        official code (appendix E has 1, most likely the weight of the whole VQ loss)."""
        with exact_fp32(h.device.type):
            z = self.project(h)  # (B, N, c)
            codes = nearest_code(z, self.codebook)  # (B, N)
            q = self.lookup(codes)  # (B, N, c)
            commitment = F.mse_loss(z, q.detach())  # pulls the encoder toward the codes
            codebook = F.mse_loss(q, z.detach())  # pulls the codes toward the encoder
            losses = {"vq": 0.25 * commitment + codebook}
            q = z + (q - z).detach()  # forward the code; backward as if it were z
        return q, codes, losses


def prob_ste(z, codebook, tau):
    """Unit vectors z (..., c), codebook (P, c) -> one-hot (..., P) with the gradient of p =
    softmax(cos / tau), codes (...). Section 2.2: p + sg(onehot - p), where sg stops the gradient;
    written as onehot + (p - sg(p)) the forward is exactly one-hot."""
    p = (z @ unit_norm(codebook).T / tau).softmax(-1)  # (..., P)
    codes = p.detach().argmax(-1)
    onehot = torch.zeros_like(p).scatter_(-1, codes[..., None], 1.0)
    return onehot + (p - p.detach()), codes


class PrologueQuantizer(nn.Module):
    """Prob-STE, without any loss of its own: all it learns comes from the AR's cross-entropy."""

    def __init__(self, dim, codebook_size, code_dim, tau):
        super().__init__()
        self.tau = tau
        self.proj = nn.Linear(dim, code_dim)
        init_weights(self.proj)
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim) * code_dim**-0.5)

    def forward(self, h):
        """h (B, K, D) -> one-hot (B, K, P) that carries the gradient, codes (B, K)."""
        with exact_fp32(h.device.type):
            z = unit_norm(self.proj(h.float()))  # (B, K, c)
            return prob_ste(z, self.codebook, self.tau)


# The tokenizer

LAYOUTS = ("prologue", "2d", "1d", "post")

# What differs from TokenizerConfig's defaults. B, L: paper table A4; S is ours, for a single GPU
SIZES = {
    "tiny": dict(encoder=(3, 96), decoder=(3, 96), post=(3, 96), head_dim=32, image_size=28,
                 patch_size=4, codebook_size=256, code_dim=8, num_prologue=8,
                 prologue_codebook_size=64),
    "S": dict(encoder=(6, 512), decoder=(6, 512), post=(6, 512), image_size=128, patch_size=8,
              codebook_size=4096),
    "B": dict(),
    "L": dict(decoder=(24, 1024), codebook_size=4096),
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
    fingerprint: str = ""  # hash of the saved weights, by which codes and AR models name them

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise SystemExit(f"--patch_size {self.patch_size} does not divide {self.image_size}")
        if max(self.codebook_size, self.prologue_codebook_size) > 2**16:
            raise SystemExit("codebook sizes are 65,536 at most: a token file has 16 bits a code")
        if self.layout in ("1d", "2d"):
            self.num_prologue = 0
            self.prologue_codebook_size = 0
        elif self.num_prologue < 1:
            raise SystemExit(f"the layout {self.layout} has 1 or more prologue tokens; 2d has none")

    @property
    def grid(self):  # patches along a side
        return self.image_size // self.patch_size

    @property
    def num_visual(self):  # N
        return self.grid**2


class Encoder(nn.Module):
    """A transformer over the patches and, after them, learned vectors that read them (queries)."""

    def __init__(self, config, in_dim, size, num_queries, hidden_ratio=8 / 3):
        super().__init__()
        layers, dim = size
        self.input = nn.Linear(in_dim, dim)
        init_weights(self.input)
        self.queries = None
        if num_queries > 0:
            self.queries = nn.Parameter(torch.randn(num_queries, dim) * 0.02)
        self.transformer = Transformer(layers, dim, config.head_dim, hidden_ratio, bias=True)
        angles = rope_table(config.grid, num_queries, config.head_dim)  # (N + num_queries, d/2)
        self.register_buffer("angles", angles, persistent=False)

    def forward(self, x):
        """x (B, T, in_dim) -> (B, T + num_queries, D)"""
        x = self.input(x).float()  # the residual stream is fp32 also under autocast
        if self.queries is not None:
            x = torch.cat([x, self.queries.expand(len(x), -1, -1)], 1)
        return self.transformer(x, self.angles)


class Decoder(Encoder):
    """Visual code vectors -> patches. In the layout 1d the codes stand in a line, and N queries on
    the grid read them; in the other layouts each code stands in its patch's place."""

    def __init__(self, config):
        num_queries = config.num_visual if config.layout == "1d" else 0
        super().__init__(config, config.code_dim, config.decoder, num_queries)
        # rope_table is grid, line; 1d needs line (the codes), grid (the queries)
        self.angles = self.angles.roll(num_queries, 0)
        _, dim = config.decoder
        self.norm = RMSNorm(dim)
        self.out = nn.Linear(dim, 3 * config.patch_size**2)
        init_weights(self.out)

    def forward(self, q):
        """q (B, N, c) -> (B, N, patch*patch*3)"""
        x = super().forward(q)[:, -q.shape[1] :]  # (B, N, D): in 1d the queries, the last N of 2N
        with torch.autocast(x.device.type, enabled=False):  # bf16: 0.25 grey levels off
            return self.out(self.norm(x))


class Tokenizer(nn.Module):
    """Encoder, quantizers and decoder.

    2d        the N patches are the visual tokens
    1d        N learned queries are the visual tokens
    prologue  2d, and K learned queries become the prologue tokens
    post      2d, trained before and frozen; a second encoder reads its last hidden state and makes
              the prologue tokens
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        k = config.num_prologue
        num_queries = {"prologue": k, "1d": config.num_visual, "2d": 0, "post": 0}[config.layout]
        self.encoder = Encoder(config, 3 * config.patch_size**2, config.encoder, num_queries)
        _, dim = config.encoder
        self.visual_quantizer = VisualQuantizer(dim, config.codebook_size, config.code_dim)
        self.decoder = Decoder(config)
        if config.layout == "post":
            self.post_encoder = Encoder(config, dim, config.post, k, hidden_ratio=11 / 4)
            _, dim = config.post
        if k > 0:
            self.prologue_quantizer = PrologueQuantizer(dim, config.prologue_codebook_size,
                                                        config.code_dim, config.tau)

    def hidden(self, images):
        """images (B, 3, H, W) -> h_visual (B, N, D), h_prologue (B, K, D). Paper equation 1."""
        p = self.config.patch_size
        n = self.config.num_visual
        x = images.unflatten(2, (-1, p)).unflatten(4, (-1, p))  # (B, 3, rows, p, columns, p)
        x = x.permute(0, 2, 4, 3, 5, 1)  # (B, rows, columns, p, p, 3)
        h = self.encoder(x.flatten(3).flatten(1, 2))  # (B, N, p*p*3) -> (B, N + num_queries, D)
        if self.config.layout == "1d":
            return h[:, n:], h[:, :0]
        if self.config.layout == "post":
            return h, self.post_encoder(h)[:, n:]
        return h[:, :n], h[:, n:]

    def pixels(self, q):
        """Visual code vectors (B, N, c) -> images (B, 3, H, W)."""
        p = self.config.patch_size
        x = self.decoder(q)  # (B, N, p*p*3)
        x = x.unflatten(1, (self.config.grid, -1))  # (B, rows, columns, p*p*3)
        x = x.unflatten(3, (p, p, 3)).permute(0, 5, 1, 3, 2, 4)  # (B, 3, rows, p, columns, p)
        return x.flatten(4, 5).flatten(2, 3)

    def quantize(self, images, direct_ce=False):
        """images (B, 3, H, W) -> visual code vectors (B, N, c), codes (B, K+N), one-hot, losses.
        The one-hot carries CE's gradient: it is that of the prologue (B, K, P), or with direct_ce
        that of the visual codes (B, N, V), or None."""
        h_visual, h_prologue = self.hidden(images)
        q, codes, losses = self.visual_quantizer(h_visual)
        onehot = None
        if self.config.num_prologue > 0:
            onehot, prologue_codes = self.prologue_quantizer(h_prologue)
            codes = torch.cat([prologue_codes, codes], 1)  # (B, K+N)
        elif direct_ce:
            with exact_fp32(images.device.type):
                z = self.visual_quantizer.project(h_visual)
                onehot, _ = prob_ste(z, self.visual_quantizer.codebook, self.config.tau)
        return q, codes, onehot, losses

    def forward(self, images, direct_ce=False):
        """The training pass: images -> reconstruction (B, 3, H, W), codes, one-hot, losses of the
        visual quantizer. The layout post has a frozen decoder and gives no reconstruction."""
        q, codes, onehot, losses = self.quantize(images, direct_ce)
        reconstruction = self.pixels(q) if self.config.layout != "post" else None
        return reconstruction, codes, onehot, losses

    @torch.no_grad()
    def encode(self, images):
        """images (B, 3, H, W) in [-1, 1] -> codes (B, K+N) int64, each counted from 0."""
        return self.quantize(images)[1]

    @torch.no_grad()
    def decode(self, codes):
        """codes (B, K+N) or (B, N), of which the prologue is not read -> images (B, 3, H, W)."""
        visual = codes[:, -self.config.num_visual :]  # (B, N)
        return self.pixels(self.visual_quantizer.lookup(visual))

    def save(self, path):
        weights = safetensors.torch.save(self.state_dict())
        self.config.fingerprint = hashlib.sha256(weights).hexdigest()[:16]
        save_checkpoint(path, "tokenizer", self.state_dict(), asdict(self.config))

    @classmethod
    def load(cls, path):
        """A frozen tokenizer in eval mode from a file that `save` wrote."""
        return load_model(path, "tokenizer", cls, TokenizerConfig)


# What the scripts share: files, device and ranks

def open_out(out, *files):
    """The folder `out`, made if missing; deletes what a killed run left half-written of `files`.
    Ends the script if nothing can be written to it."""
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file in files:
            for leftover in out.glob(f"{file}.*.tmp"):
                leftover.unlink()
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise SystemExit(f"--out {out} cannot be written to: {error}") from None
    return out


@contextlib.contextmanager
def atomic_write(path):
    """Yields a temporary path, of this process alone, which becomes `path` when the block ends
    without an error: readers see the old file or the new one, never a half."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise SystemExit(f"{path} cannot be written (is the disk full?): {error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def check_finite(what, tensors):
    """Ends the run if one of {name: tensor} is not finite: nothing that is broken is ever saved."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise SystemExit(f"{what}: {name} is not finite")


def save_checkpoint(path, kind, tensors, config):
    """Tensors, and the dict `config` as JSON in the metadata, in one safetensors file."""
    check_finite(path, tensors)
    # One entry: safetensors orders several at random, and equal weights should give equal files.
    metadata = {"config": json.dumps({"kind": kind} | config)}
    with atomic_write(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata)
        with contextlib.suppress(OSError):  # some file systems have no modes
            os.chmod(temporary, 0o644)  # safetensors creates files only their owner can read


def read_safetensors(path, kind):
    """{name: memory-mapped tensor} and config of a file that `save_checkpoint` wrote for `kind`."""
    maker = {"codes": "pretokenize.py", "ar": "train_ar.py"}.get(kind, "train_stage1.py")
    try:
        with safetensors.safe_open(path, "pt") as file:
            config = json.loads((file.metadata() or {}).get("config", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, safetensors.SafetensorError) as error:
        raise SystemExit(f"{path}, which {maker} makes, cannot be read: {error}") from None
    if config.pop("kind", None) != kind:
        raise SystemExit(f"{path} holds no {kind} (tools/released.py imports released weights)")
    return tensors, config


def load_model(path, kind, model_class, config_class):
    """The frozen model, in eval mode, of a checkpoint. Weights in half precision become fp32."""
    tensors, config = read_safetensors(path, kind)
    check_finite(path, tensors)
    with torch.random.fork_rng(devices=[]):  # leaves the caller's random state alone
        model = model_class(config_class(**config))
    model.load_state_dict(tensors, assign=True)
    return model.float().eval().requires_grad_(False)


def check_flags(parser, args, *positive):
    """Ends a script where a number is negative or nan, or one of `positive` is below 1."""
    for name, value in vars(args).items():
        lowest = 1 if name in positive else 0
        if isinstance(value, (int, float)) and not value >= lowest:
            parser.error(f"--{name} {value} should be {lowest} or more")


def setup(device="auto", dtype="fp32", timeout_hours=1):
    """-> rank, world_size, device, autocast. Ranks are started by torchrun, or by any launcher that
    sets its environment variables. The dtype "auto" is bf16 on GPUs that have it."""
    torch.set_float32_matmul_precision("highest")  # some containers start with TF32
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="backslashreplace")  # class names on any terminal
    rank = 0
    world_size = 1
    if {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        rank = int(os.environ["RANK"])
        world_size = int(os.environ["WORLD_SIZE"])
    if device == "auto":
        device = "cpu"
        if torch.accelerator.is_available():
            device = torch.accelerator.current_accelerator().type  # cuda, or mps on a Mac
    if device == "cuda":
        cards = torch.cuda.device_count() or 1
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank % cards)))
    device = torch.device(device)
    if world_size > 1:
        # Losses and gradients travel by nccl between GPUs, what is on the CPU by gloo
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(hours=timeout_hours))
    if dtype == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bf16" if has_bf16 else "fp32"
    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    if rank == 0:
        kind = "flash-attn" if can_flash(device, torch_dtype) else "torch"
        print(f"{world_size} x {device.type}, {dtype}, attention by {kind}", file=sys.stderr)
    return rank, world_size, device, torch.autocast(device.type, torch_dtype, dtype == "bf16")


def of_first_rank(value):
    """The first rank's value on all ranks: paths and copies of data may differ between nodes."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def average(tensor):
    """Replaces a tensor, in place, by its mean over the ranks."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()


def finish():
    """Waits for the other ranks, if there are any."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def compile_blocks(model):
    """torch.compile block by block, so that equal blocks are compiled once."""
    torch._dynamo.config.optimize_ddp = False  # it would split every block of over 1 MiB
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(dynamic=False)
