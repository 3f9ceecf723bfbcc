"""The autoregressive model over [prologue, EOS, visual], given a class, and how it samples.

    ar = AR.load("out/ar.safetensors")                      # our file, or an AR directory of the authors' release
    logits = ar(codes, labels)                              # codes (B, K+N) -> (B, K+1+N, vocab)
    codes = ar.generate(labels, cfg_visual=3.75, cfg_prologue=0.7)

Outside this file codes are counted from 0, prologue first. Inside, one vocabulary holds the visual codes 0..V-1, the
prologue codes V..V+P-1 and EOS = V+P. Without a prologue (K = 0) there is no EOS and the sequence is just the N codes.

Letters: B images, N visual tokens, K prologue tokens, L = K+1+N (or N), D width, V and P codebook sizes.
"""
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from common import InputError, Linear, packed, product, read_checkpoint, save_checkpoint
from tokenizer import (RMSNorm, Transformer, attention, can_flash, flash_attn_with_kvcache, fold, init_weights, is_onestage,
                       released_shard, rope_angles, rope_axis_dims)

# Paper table A4, but XL is 32 x 1280: the table's 24 x 2048 is a typo, its authors say. S is the joint AR of stage 1, nano
# that of the tiny tokenizer.
SIZES = {
    "nano": dict(layers=3, dim=96, head_dim=32),
    "tiny": dict(layers=4, dim=128, head_dim=32),
    "S": dict(layers=7, dim=512),
    "B": dict(layers=12, dim=768),
    "L": dict(layers=24, dim=1024),
    "XL": dict(layers=32, dim=1280),
}
SCHEDULES = ("constant", "linear", "cosine")
LOGITS = 2**24  # that the training loss holds at a time, 64 MB of fp32


@dataclass
class ARConfig:
    layers: int = 12
    dim: int = 768
    head_dim: int = 64
    num_prologue: int = 16  # K
    num_visual: int = 256  # N
    codebook_size: int = 16384  # V
    prologue_codebook_size: int = 1024  # P
    num_classes: int = 1000
    dropout: float = 0.0
    classes: list = field(default_factory=list)  # class names in the order of the labels, where they are known
    tokenizer: str = ""  # fingerprint of the tokenizer whose codes these are, where it is known

    @classmethod
    def for_tokenizer(cls, cfg, **rest):
        """The config of an AR model over the codes of a tokenizer with TokenizerConfig `cfg`."""
        return cls(num_prologue=cfg.num_prologue, num_visual=cfg.num_visual, codebook_size=cfg.codebook_size,
                   prologue_codebook_size=cfg.prologue_codebook_size, **rest)


class KVCache:
    """Keys and values of one layer while `generate` draws, allocated once for all positions."""

    def __init__(self, length, static):
        self.length, self.static, self.k, self.v = length, static, None, None

    def attend(self, q, k, v, start):
        """q, k, v (B, T, heads, d) of the positions start.. -> (B, T, heads, d), attention to all positions so far.
        A compiled step has start as a tensor (1,) and T = 1: no shape of it changes, a mask hides what lies behind start."""
        if self.k is None:
            # In memory (B, heads, L, d), so that a head reads its keys in one go; L is a multiple of 8 for the mask's sake.
            self.k, self.v = (x.new_zeros(len(x), x.shape[2], self.length, x.shape[3]).transpose(1, 2) for x in (k, v))
            for x in (self.k, self.v) if self.static else ():  # a CUDA graph may write only to what never moves
                torch._dynamo.mark_static_address(x)
        if torch.is_tensor(start):
            self.k[:, start], self.v[:, start] = k, v
            return attention(q, self.k, self.v, mask=(torch.arange(self.length, device=q.device) <= start)[None])
        if q.dtype != torch.float32 and can_flash(q.device):
            return flash_attn_with_kvcache(q, self.k, self.v, k, v, cache_seqlens=start, causal=True)
        end = start + k.shape[1]
        self.k[:, start:end], self.v[:, start:end] = k, v
        return attention(q, self.k[:, :end], self.v[:, :end], causal=k.shape[1] > 1)  # T > 1 only at start 0


def guidance(scale, schedule, power, t):
    """CFG scale at progress t in [0, 1] of a token group; it is applied as s * cond + (1 - s) * uncond, so 1 is off."""
    ramp = {"constant": 1.0, "linear": t**power, "cosine": (1 - math.cos(math.pi * t**power)) / 2}[schedule]
    return 1 + (scale - 1) * ramp


def sample_codes(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """Draws a code for each row: logits (B, V), u (B,) uniform in [0, 1) -> (B,) int64, by the inverse of the cumulative
    distribution: one number per token decides it, on any device and in any batch."""
    logits = logits.float() / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -torch.inf)
    p = logits.softmax(-1)  # (B, V)
    if top_p < 1:
        ordered, index = p.sort(-1, descending=True)
        ordered = ordered * (ordered.cumsum(-1) - ordered < top_p)  # the likeliest code always stays
        p = torch.zeros_like(p).scatter(-1, index, ordered)
    cdf = p.cumsum(-1)
    # The factor keeps the threshold strictly below the sum, where rounding could make it reach a code of probability 0.
    threshold = u[:, None] * cdf[:, -1:] * (1 - 1e-6)
    return torch.searchsorted(cdf, threshold, right=True)[:, 0]


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of hidden @ weight.T by parts of LOGITS logits: those of all positions never exist at once.
    The gradients are made in the forward, while a part's logits are at hand, and only scaled in the backward."""

    @staticmethod
    def forward(ctx, hidden, weight, target):
        """hidden (T, D), weight (vocab, D), target (T,) -> scalar in nats"""
        device, total = hidden.device.type, 0.0
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        d_hidden, d_weight, chunk = torch.empty_like(hidden), torch.zeros_like(weight), max(1, LOGITS // len(weight))
        with torch.autocast(device, enabled=False):
            w = weight.to(dtype)
            for h, t, d in zip(hidden.split(chunk), target.split(chunk), d_hidden.split(chunk)):
                h = h.to(dtype)
                log_p = product(h, w).float().log_softmax(-1)  # (chunk, vocab)
                total = total - log_p.gather(1, t[:, None]).sum()
                p = log_p.exp_().scatter_add_(1, t[:, None], log_p.new_full((len(t), 1), -1.0)).to(dtype)  # p - onehot
                d.copy_(product(p, w.T))
                d_weight += product(p.T, h.T)
        ctx.save_for_backward(d_hidden, d_weight)
        return total / len(target)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        d_hidden, d_weight = ctx.saved_tensors
        scale = gradient / len(d_hidden)
        return d_hidden * scale, d_weight * scale, None


class AR(nn.Module):
    """Decoder-only transformer; labels (B,) int64 in [0, num_classes], where num_classes means unconditional."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.compiled_step = cfg, None
        self.length = cfg.num_prologue + cfg.num_visual + (cfg.num_prologue > 0)  # L
        self.eos = cfg.codebook_size + cfg.prologue_codebook_size
        vocab = self.eos + (cfg.num_prologue > 0)
        self.bos = nn.Embedding(cfg.num_classes + 1, cfg.dim)
        self.embedding = nn.Embedding(vocab, cfg.dim)
        self.drop = nn.Dropout(cfg.dropout)
        self.transformer = Transformer(cfg.layers, cfg.dim, cfg.head_dim, 11 / 4, bias=False, dropout=cfg.dropout)
        self.norm = RMSNorm(cfg.dim)
        self.head = Linear(cfg.dim, vocab, bias=False)
        self.bos.apply(init_weights), self.embedding.apply(init_weights), self.head.apply(init_weights)
        # Of the three RoPE axes only l moves along a 1D sequence, so only the first l dimensions of a head turn.
        positions = torch.arange(self.length, device="cpu")
        self.register_buffer("angles", rope_angles(positions, rope_axis_dims(cfg.head_dim)[2], 10000.0), persistent=False)

    def sequence(self, codes):
        """codes (B, K+N) counted from 0 -> tokens (B, L) of the one vocabulary, EOS between the groups."""
        k = self.cfg.num_prologue
        if codes.shape[1] != k + self.cfg.num_visual:
            raise InputError(f"{codes.shape[1]} codes per image given to an AR model of {k}+{self.cfg.num_visual}")
        if not k:
            return codes
        eos = codes.new_full((len(codes), 1), self.eos)
        return torch.cat([codes[:, :k] + self.cfg.codebook_size, eos, codes[:, k:]], 1)

    def hidden(self, codes, labels, onehot=None, drop=None):
        """Final hidden states (B, L, D); position t has seen the class and the tokens before t.
        onehot: straight-through one-hot prologue (B, K, P), or visual codes (B, N, V) where there is none, embedded by a
        product so that CE reaches the encoder.
        drop (B,) bool: images whose visual tokens are all hidden from the input behind EOS (visual token dropout).
        """
        k, v = self.cfg.num_prologue, self.cfg.codebook_size
        tokens = self.sequence(codes)[:, :-1]  # shifted right behind the class
        if drop is not None:
            visual = torch.arange(tokens.shape[1], device=tokens.device) > k
            tokens = tokens.where(~(drop[:, None] & visual), self.eos)
        if onehot is None:
            x = self.embedding(tokens)
        elif k:
            x = torch.cat([onehot @ self.embedding.weight[v:self.eos], self.embedding(tokens[:, k:])], 1)
        else:
            x = onehot[:, :-1] @ self.embedding.weight
        x = self.drop(torch.cat([self.bos(labels)[:, None], x], 1))  # (B, L, D)
        return self.norm(self.transformer(x, self.angles, causal=True))

    def forward(self, codes, labels, onehot=None, drop=None, loss=False):
        """codes (B, K+N), labels (B,) -> logits (B, L, vocab), or with `loss` their mean cross-entropy"""
        return self.cross_entropy(codes, labels, onehot, drop) if loss else self.head(self.hidden(codes, labels, onehot, drop))

    def cross_entropy(self, codes, labels, onehot=None, drop=None, reduction="mean"):
        """CE in nats of every token over the whole vocabulary, EOS included: the mean, or (B, L) with "none"."""
        hidden, tokens = self.hidden(codes, labels, onehot, drop), self.sequence(codes)
        if reduction == "mean":
            return LinearCrossEntropy.apply(hidden.flatten(0, 1), self.head.weight, tokens.flatten())
        return torch.stack([F.cross_entropy(self.head(h).float(), t, reduction="none") for h, t in zip(hidden, tokens)])

    def freeze(self, dtype):
        """Casts Linear weights to dtype and on the CPU packs the blocks': once, after compile_step, and only to sample."""
        for part in self.modules():
            if isinstance(part, Linear):
                weight = part.weight.detach().to(dtype)
                plain = part is self.head or self.compiled_step  # the head is cut into segments first, compilers know no packing
                part.weight = nn.Parameter(weight if plain else packed(weight), requires_grad=False)

    def compile_step(self):
        """From now on `generate` compiles single tokens, on CUDA to a CUDA graph, with caches that stay for each batch size."""
        self.compiled_step, self.caches = torch.compile(self.step, mode="reduce-overhead", dynamic=False), {}

    def step(self, x, caches, start):
        """Runs inputs x (B, T, D) at positions start.. through the caches -> last hidden state (B, D)."""
        angles = self.angles[start] if torch.is_tensor(start) else self.angles[start:start + x.shape[1]]
        # Not by __call__, which the trainers' --compile replaces: it would compile anew for every length of the cache.
        return self.norm(self.transformer.forward(x, angles, caches=caches, start=start)[:, -1])

    def segment(self, labels, prefix, vocabulary, scales, noise, temperature, top_k, top_p):
        """Draws len(scales) codes (B, len(scales)) of the vocabulary's rows `vocabulary` behind tokens `prefix` (B, T).
        Guidance runs class and unconditional in one batch; it takes place unless all scales are 1."""
        guided, batch = any(scale != 1 for scale in scales), len(labels)
        x = self.embedding(prefix)
        x = torch.cat([torch.cat([self.bos(c)[:, None], x], 1)
                       for c in [labels, torch.full_like(labels, self.cfg.num_classes)][:1 + guided]])  # (B or 2B, 1 + T, D)
        caches = [KVCache(-(-self.length // 8) * 8, self.compiled_step is not None) for _ in self.transformer.blocks]
        if self.compiled_step:
            caches = self.caches.setdefault(len(x), caches)
        codes, start, head = [], 0, packed(self.head.weight[vocabulary])  # the only rows of the head that are computed
        for i, scale in enumerate(scales):
            if i and self.compiled_step:
                h = self.compiled_step(x, caches, torch.full((1,), start, device=x.device))
            else:
                h = self.step(x, caches, start)
            start += x.shape[1]
            logits = product(h, head).float()  # (B or 2B, codes)
            if guided:
                logits = scale * logits[:batch] + (1 - scale) * logits[batch:]
            codes.append(sample_codes(logits, noise[:, i], temperature, top_k, top_p))
            x = self.embedding(codes[-1] + vocabulary.start)[:, None].repeat(1 + guided, 1, 1)
        return torch.stack(codes, 1)

    @torch.no_grad()
    def generate(self, labels, cfg_prologue=1.0, cfg_visual=1.0, cfg_schedule="cosine", cfg_power=1.0,
                 temperature=1.0, temperature_prologue=None, top_k=0, top_p=1.0, prologue=None, generator=None, noise=None):
        """Samples codes (B, K+N) for labels (B,). Raises InputError.
        cfg_*: classifier-free guidance per token group, 1 = off, s * cond + (1 - s) * uncond (`guidance`); below 1 it
        pulls towards unconditional. temperature is that of the visual tokens, and of the prologue unless given apart.
        prologue (B, K) fixes the prefix. noise (B, K+N) uniform in [0, 1) decides every draw; else it comes from generator.
        """
        if self.training:
            raise InputError("generate needs the model in eval mode: call ar.eval() first")
        temperature_prologue = temperature if temperature_prologue is None else temperature_prologue
        if not (min(temperature, temperature_prologue, top_p) > 0 and top_p <= 1 and min(top_k, cfg_power) >= 0
                and math.isfinite(cfg_prologue + cfg_visual)):
            raise InputError("sampling needs temperatures above 0 (for the likeliest codes: top_k 1), top_p above 0 and at "
                             "most 1, top_k and cfg_power at least 0, and finite scales")
        k, n, v = self.cfg.num_prologue, self.cfg.num_visual, self.cfg.codebook_size
        if noise is None:
            noise = torch.rand(len(labels), k + n, generator=generator, device=generator.device if generator else None)
        noise, prefix = noise.to(labels.device), labels.new_empty(len(labels), 0)
        if k:
            if prologue is None:
                scales, vocabulary = [cfg_prologue] * k, slice(v, self.eos)
                prologue = self.segment(labels, prefix, vocabulary, scales, noise, temperature_prologue, top_k, top_p)
            # EOS is forced, so it has no step of its own: it goes in with the prologue, all at once, before the visual tokens.
            prefix = torch.cat([prologue.to(labels) + v, prefix.new_full((len(labels), 1), self.eos)], 1)
        # Progress counts EOS as 0; without a prologue the first visual token is 0.
        scales = [guidance(cfg_visual, cfg_schedule, cfg_power, (j + 1) / (n + 1) if k else j / n) for j in range(n)]
        visual = self.segment(labels, prefix, slice(0, v), scales, noise[:, k:], temperature, top_k, top_p)
        return torch.cat([prologue.to(labels), visual], 1) if k else visual

    def save(self, path):
        save_checkpoint(path, "ar", self.state_dict(), asdict(self.cfg))

    @classmethod
    def load(cls, path, tokenizer=None):
        """Our .safetensors file, or an AR directory of the authors' release. Raises InputError.
        A released directory does not say K and N: its tokenizer does, or else the 16 + 256 of the whole release are taken.
        """
        cfg, tensors = released_ar(path, tokenizer) if Path(path).is_dir() else read_checkpoint(path, "ar")
        with torch.device("meta"):
            model = cls(ARConfig(**cfg))
        model.load_state_dict(tensors, assign=True)
        return model.eval().requires_grad_(False)


def released_ar(directory, tokenizer=None):
    """Config and weights of a released AR directory (raw weights) or of OneStage's directory. Raises InputError."""
    shard = released_shard(directory, 0, "AR weights")
    if "quantizer.embedding.weight" in shard and is_onestage(directory):
        shard = released_shard(directory, 5, "the AR model of OneStage")
    if "semantic_emb.weight" not in shard:
        raise InputError(f"{directory} is no AR directory: its model.safetensors holds no token embedding")
    weights, (layers, dim) = fold(shard, "ar_model")
    vocab = len(shard["semantic_emb.weight"])
    if tokenizer:
        k, n = tokenizer.cfg.num_prologue, tokenizer.cfg.num_visual
        v, p = tokenizer.cfg.codebook_size, tokenizer.cfg.prologue_codebook_size
        if v + p + (k > 0) != vocab:
            raise InputError(f"{directory} does not belong to this tokenizer: its vocabulary has {vocab} tokens, the tokenizer's "
                             f"codes {'and EOS ' * (k > 0)}are {v + p + (k > 0)}")
    else:  # V is a power of two, the EOS one more, and whatever is left are prologue codes
        v = 1 << (vocab.bit_length() - 1)
        p, k, n = (vocab - 1 - v, 16, 256) if vocab > v else (0, 0, 256)
    cfg = dict(layers=layers, dim=dim, head_dim=weights["transformer.blocks.0.attn.q_norm.weight"].numel(), num_prologue=k,
               num_visual=n, codebook_size=v, prologue_codebook_size=p, num_classes=len(shard["bos_emb.weight"]) - 1)
    weights |= {"head.weight": weights.pop("out.weight"), "bos.weight": shard["bos_emb.weight"],
                "embedding.weight": shard["semantic_emb.weight"]}
    return cfg, weights


def check_pair(tokenizer, ar, names=("the tokenizer", "the AR model")):
    """Raises InputError unless `ar` was trained on codes of this tokenizer, as far as sizes and fingerprint tell."""
    for key in ("num_prologue", "num_visual", "codebook_size", "prologue_codebook_size"):
        a, b = getattr(tokenizer.cfg, key), getattr(ar.cfg, key)
        if a != b:
            raise InputError(f"{names[0]} and {names[1]} do not belong together: {key} is {a} in the one and {b} in the other")
    if ar.cfg.tokenizer and ar.cfg.tokenizer != tokenizer.fingerprint():
        raise InputError(f"{names[1]} was trained on codes of another tokenizer than {names[0]}: "
                         "run pretokenize.py and train_ar.py again, or give the one it was trained with")
