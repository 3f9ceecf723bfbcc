"""The autoregressive (AR) model over [prologue, EOS, visual], given a class, and how it samples.

    ar = AR.load("out/ar.safetensors")
    logits = ar(codes, labels)                        # codes (B, K+N) -> (B, K+1+N, vocabulary)
    codes = ar.generate(labels, cfg_prologue=0.7, cfg_visual=3.75)          # -> codes (B, K+N)

A worked example with K = 2 prologue tokens, N = 3 visual tokens, V = 10 visual and P = 4 prologue
codes. Outside this file every code is counted from 0 in its own codebook; inside, one vocabulary
holds the visual codes 0..9, the prologue codes 10..13 and EOS = 14, which stands between the two:

    codes    [     1  3      7  0  5 ]
    tokens   [    11 13  14  7  0  5 ]    what position t has to predict
    input    [ class 11  13 14  7  0 ]    what position t reads; it also sees all before it

Without a prologue (K = 0) there is no EOS: the tokens are the N codes.

Letters in shapes are those of tokenizer.py, and L = K+1+N (or N) tokens.
"""

import math
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from tokenizer import (RMSNorm, Transformer, attention, init_weights, load_model, rope_angles,
                       rope_axis_dims, save_checkpoint)

# Paper table A4, but XL is 32 x 1280: the table's 24 x 2048 is a typo, its authors say. S is the
# joint AR of stage 1, nano the joint AR of the tiny tokenizer.
SIZES = {
    "nano": dict(layers=3, dim=96, head_dim=32),
    "tiny": dict(layers=4, dim=128, head_dim=32),
    "S": dict(layers=7, dim=512),
    "B": dict(layers=12, dim=768),
    "L": dict(layers=24, dim=1024),
    "XL": dict(layers=32, dim=1280),
}


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
    classes: list = field(default_factory=list)  # names in the order of the labels, where known
    tokenizer: str = ""  # fingerprint of the tokenizer whose codes these are, where known
    preset: str = ""  # the row of sample.PRESETS for this model, if it has one of its own

    @classmethod
    def for_tokenizer(cls, config, **rest):
        """The config of an AR model over the codes of a tokenizer with TokenizerConfig `config`."""
        return cls(num_prologue=config.num_prologue, num_visual=config.num_visual,
                   codebook_size=config.codebook_size,
                   prologue_codebook_size=config.prologue_codebook_size, **rest)


class AR(nn.Module):
    """Decoder-only transformer. Labels (B,) are int64; num_classes means unconditional."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        num_eos = 1 if config.num_prologue > 0 else 0
        self.length = config.num_prologue + num_eos + config.num_visual  # L
        self.eos = config.codebook_size + config.prologue_codebook_size
        self.no_class = config.num_classes  # the label that means unconditional
        vocabulary = self.eos + num_eos
        # A class begins the sequence, as BOS does in a language model; the last row is for no class
        self.class_embedding = nn.Embedding(config.num_classes + 1, config.dim)
        self.token_embedding = nn.Embedding(vocabulary, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.transformer = Transformer(config.layers, config.dim, config.head_dim,
                                       hidden_ratio=11 / 4, bias=False, dropout=config.dropout)
        self.norm = RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, vocabulary, bias=False)
        for module in (self.class_embedding, self.token_embedding, self.head):
            init_weights(module)
        # The only axis, l, takes the first dimensions of a head, as in the official code
        positions = torch.arange(self.length)
        angles = rope_angles(positions, rope_axis_dims(config.head_dim)[2], 10000.0)
        angles = F.pad(angles, (0, config.head_dim // 2 - angles.shape[1]))  # (L, d/2)
        self.register_buffer("angles", angles, persistent=False)
        self.compiled_step = None  # see compile_step
        self.caches = {}  # batch size: the caches of the compiled step

    def first_input(self, labels):
        """labels (B,) -> what position 0 reads (B, 1, D); a second condition would come in here."""
        return self.class_embedding(labels)[:, None]

    def sequence(self, codes):
        """codes (B, K+N), each counted from 0 -> tokens (B, L) of the one vocabulary."""
        k = self.config.num_prologue
        if k == 0:
            return codes
        eos = codes.new_full((len(codes), 1), self.eos)
        return torch.cat([codes[:, :k] + self.config.codebook_size, eos, codes[:, k:]], 1)

    def forward(self, codes, labels, onehot=None, drop=None):
        """codes (B, K+N), labels (B,) -> logits (B, L, vocabulary) in fp32.

        onehot: straight-through one-hot prologue (B, K, P), or without a prologue that of the
            visual codes (B, N, V). It is multiplied in, so that CE reaches the encoder.
        drop: (B,) bool, images whose visual tokens are hidden from the input: EOS stands in for
            each (visual token dropout). What is left to predict them from is the prologue.
        """
        k = self.config.num_prologue
        tokens = self.sequence(codes)[:, :-1]  # (B, L-1), the last token is never an input
        if drop is not None and k > 0:
            visual = torch.arange(self.length - 1, device=tokens.device) > k  # all after EOS
            tokens = tokens.masked_fill(drop[:, None] & visual, self.eos)
        if onehot is None:
            x = self.token_embedding(tokens)
        elif k > 0:
            v = self.config.codebook_size
            prologue_embedding = self.token_embedding.weight[v : self.eos]  # (P, D)
            x = torch.cat([onehot @ prologue_embedding, self.token_embedding(tokens[:, k:])], 1)
        else:  # the vocabulary is the visual codebook
            x = onehot[:, :-1] @ self.token_embedding.weight
        x = torch.cat([self.first_input(labels), x], 1)  # (B, L, D)
        x = self.transformer(self.dropout(x), self.angles, causal=True)
        with torch.autocast(x.device.type, enabled=False):
            head = padded_linear if x.is_cuda else F.linear
            return head(self.norm(x), self.head.weight)

    def parameter_groups(self, weight_decay, **settings):
        """For AdamW: weight decay on matrices only."""
        matrices = [p for p in self.parameters() if p.ndim > 1]
        vectors = [p for p in self.parameters() if p.ndim < 2]
        return [dict(params=matrices, weight_decay=weight_decay, **settings),
                dict(params=vectors, weight_decay=0.0, **settings)]

    @torch.no_grad()
    def measure(self, codes, labels):
        """How well codes (B, K+N) are predicted, in all and by token group: a dict of nats per
        image (B,) and top-1 accuracy (B,), as nats, nats_prologue, accuracy_prologue, ..."""
        k = self.config.num_prologue
        n = self.config.num_visual
        tokens = self.sequence(codes)  # (B, L)
        logits = self(codes, labels)  # (B, L, vocabulary)
        nats = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
        nats = nats.view(tokens.shape)  # (B, L)
        right = (logits.argmax(-1) == tokens).float()  # (B, L)
        result = dict(nats=nats.sum(1), nats_visual=nats[:, -n:].sum(1),
                      accuracy_visual=right[:, -n:].mean(1))
        if k > 0:
            result |= dict(nats_prologue=nats[:, :k].sum(1), accuracy_prologue=right[:, :k].mean(1))
        return result

    def compile_step(self):
        """From now on `generate` compiles the step of a single token, on CUDA to a CUDA graph. Such
        a graph has fixed addresses, so each batch size keeps its caches and every batch overwrites
        them; what an earlier batch left lies after `start` and is masked."""
        self.compiled_step = torch.compile(self.step, mode="reduce-overhead", dynamic=False)

    def step(self, x, caches, start):
        """Inputs x (B, T, D) that follow `start` earlier ones -> last hidden state (B, D). `start`
        is an int, or in a compiled step a tensor (1,): then no shape changes, and T is 1."""
        places = start if torch.is_tensor(start) else slice(start, start + x.shape[1])
        angles = self.angles[places]  # (T, d/2)
        x = self.transformer(x, angles, causal=True, caches=caches, start=start)
        return self.norm(x[:, -1])

    def draw_tokens(self, labels, prefix, codebook, scales, noise, **sampling):
        """Draws codes (B, len(scales)), one after the other. In shapes 2B is B without guidance.
        prefix: tokens (B, T) that they follow. codebook: slice of the vocabulary, to draw from.
        scales: guidance of each code. noise: (B, n >= len(scales)). sampling: of sample_codes."""
        halves = 1
        if any(scale != 1 for scale in scales):
            halves = 2  # the class and the unconditional one run as one batch
            labels = torch.cat([labels, torch.full_like(labels, self.no_class)])
        x = self.token_embedding(prefix).repeat(halves, 1, 1)  # (2B, T, D)
        x = torch.cat([self.first_input(labels), x], 1)  # (2B, 1+T, D)
        compiled = self.compiled_step is not None
        caches = [KVCache(self.length, compiled) for _ in self.transformer.blocks]
        if compiled:
            caches = self.caches.setdefault(len(x), caches)  # those of an earlier call, if any
        start = 0
        codes = []
        for i, scale in enumerate(scales):
            if compiled and i > 0:
                h = self.compiled_step(x, caches, torch.full((1,), start, device=x.device))
            else:
                h = self.step(x, caches, start)  # (2B, D)
            start += x.shape[1]
            with torch.autocast(h.device.type, enabled=False):
                logits = self.head(h)[:, codebook]  # (2B, codes)
            if halves == 2:
                conditional, unconditional = logits.chunk(2)
                logits = scale * conditional + (1 - scale) * unconditional  # (B, codes)
            code = sample_codes(logits, noise[:, i], **sampling)  # (B,)
            codes.append(code)
            x = self.token_embedding(code + codebook.start)[:, None]  # (B, 1, D)
            x = x.repeat(halves, 1, 1)  # (2B, 1, D)
        if not logits.isfinite().all():
            raise SystemExit("logits are not finite: damaged weights, or extreme guidance")
        return torch.stack(codes, 1)

    @torch.no_grad()
    def generate(self, labels, cfg_prologue=1.0, cfg_visual=1.0, cfg_schedule="cosine",
                 cfg_power=1.0, temperature=1.0, temperature_prologue=None, prologue=None,
                 visual=None, noise=None, **filters):
        """Samples codes (B, K+N) for labels (B,). The model must be in eval mode.

        cfg_prologue: scale of the classifier-free guidance (CFG) of all prologue tokens; 1 is off,
            below 1 it pulls towards unconditional.
        cfg_visual: that of the visual tokens, reached by cfg_schedule and cfg_power (`guidance`).
        temperature: of the visual tokens, and of the prologue unless temperature_prologue is given.
        prologue: (B, K), codes to keep instead of drawing them.
        visual: (B, m) with m < N, visual codes that the image begins with; the rest is drawn.
        noise: (B, K+N) uniform in [0, 1), which decides every draw; else it is torch.rand's.
        filters: top_k and top_p of sample_codes.
        """
        k = self.config.num_prologue
        n = self.config.num_visual
        v = self.config.codebook_size
        if temperature_prologue is None:
            temperature_prologue = temperature
        if noise is None:
            noise = torch.rand(len(labels), k + n)
        noise = noise.to(labels.device)
        prefix = labels.new_empty(len(labels), 0)  # (B, 0)
        if k > 0:
            if prologue is None:
                scales = [cfg_prologue] * k
                prologue = self.draw_tokens(labels, prefix, slice(v, self.eos), scales, noise,
                                            temperature=temperature_prologue, **filters)
            # EOS is never drawn: it goes in together with the prologue, all K+1 at once.
            eos = prologue.new_full((len(labels), 1), self.eos)
            prefix = torch.cat([prologue + v, eos], 1)  # (B, K+1)
        if visual is None:
            visual = prefix[:, :0]  # (B, 0)
        kept = visual.shape[1]
        prefix = torch.cat([prefix, visual], 1)  # (B, K+1+m), or (B, m) without a prologue
        # Progress: EOS is at 0, or without a prologue the first visual token
        progress = [(i + 1) / (n + 1) if k > 0 else i / n for i in range(kept, n)]
        scales = [guidance(cfg_visual, cfg_schedule, cfg_power, t) for t in progress]
        rest = self.draw_tokens(labels, prefix, slice(0, v), scales, noise[:, k + kept :],
                                temperature=temperature, **filters)
        codes = torch.cat([visual, rest], 1)  # (B, N)
        return torch.cat([prologue, codes], 1) if k > 0 else codes

    def save(self, path):
        save_checkpoint(path, "ar", self.state_dict(), asdict(self.config))

    @classmethod
    def load(cls, path):
        """A frozen AR model in eval mode from a file that `save` wrote."""
        return load_model(path, "ar", cls, ARConfig)


def padded_linear(x, weight):
    """x (..., D), weight (V, D) -> x @ weight.T (..., V). An odd vocabulary (17,409) would leave
    the rows of the product unaligned, for which GPUs have slow kernels only."""
    padded = F.pad(weight, (0, 0, 0, -len(weight) % 64))
    return F.linear(x, padded)[..., : len(weight)]


# Sampling

class KVCache:
    """Keys and values of one layer for all L positions, allocated once and filled while drawing."""

    def __init__(self, length, fixed=False):
        """fixed: promises torch.compile that it stays in its place, where CUDA graphs write."""
        self.length = math.ceil(length / 8) * 8  # masked attention kernels want a multiple of 8
        self.fixed = fixed
        self.kv = None

    def attend(self, q, k, v, start):
        """q, k, v (B, T, heads, d) of T positions that follow `start` earlier ones -> (B, T, heads,
        d), attention to all positions so far; see AR.step."""
        if self.kv is None:
            batch, _, heads, d = k.shape
            # In memory (2, B, heads, L, d), so that a head reads its keys in one go.
            self.kv = k.new_zeros(2, batch, heads, self.length, d).transpose(2, 3)
            if self.fixed:
                torch._dynamo.mark_static_address(self.kv)
        new = torch.stack([k, v])  # (2, B, T, heads, d)
        if torch.is_tensor(start):  # a mask hides what is still to come
            self.kv[:, :, start] = new
            mask = torch.arange(self.length, device=q.device) <= start  # (L,)
            return attention(q, *self.kv, mask=mask[None])
        end = start + k.shape[1]
        self.kv[:, :, start:end] = new
        # Several positions at once come only at the start; a single one may look at all there is.
        return attention(q, *self.kv[:, :, :end], causal=k.shape[1] > 1)


SCHEDULES = ("constant", "linear", "cosine")


def guidance(scale, schedule, power, t):
    """CFG scale s at progress t in [0, 1], used as s * conditional + (1 - s) * unconditional; so 1
    is off. It is `scale` throughout, or grows from 1 to it by t^power along a line or a cosine."""
    ramp = 1.0 if schedule == "constant" else t**power
    if schedule == "cosine":
        ramp = (1 - math.cos(math.pi * ramp)) / 2
    return 1 + (scale - 1) * ramp


def sample_codes(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """Draws a code for each row: logits (B, V), u (B,) uniform in [0, 1) -> (B,) int64, by the
    inverse of the cumulative distribution: one number decides a token, so that, up to the rounding
    of the logits, a draw is the same on any device and in any batch. top_k keeps the k likeliest
    codes (0 is off), top_p the likeliest that together have this probability (1 is off); the
    likeliest code always stays."""
    logits = logits.float() / max(temperature, 1e-6)  # 0 draws the likeliest code
    if top_k > 0:
        kept = logits.topk(min(top_k, logits.shape[-1])).values  # (B, k), largest first
        logits = logits.masked_fill(logits < kept[:, -1:], -torch.inf)
    p = logits.softmax(-1)  # (B, V)
    if top_p < 1:
        ordered, index = p.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= max(top_p, 1e-9), 0)
        p = torch.zeros_like(p).scatter(-1, index, ordered)
    cdf = p.cumsum(-1)
    # The factor keeps the threshold below the sum, where rounding (a GPU's cumsum need not be
    # monotone) could make it reach a code of probability 0.
    threshold = u[:, None] * cdf[:, -1:] * (1 - 1e-6)
    codes = torch.searchsorted(cdf, threshold, right=True)[:, 0]
    return codes.clamp(max=logits.shape[-1] - 1)  # beyond the end only where logits are NaN
