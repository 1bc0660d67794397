"""Efficient Autoregressive Audio Modeling via Next-Scale Prediction (Qiu et al., arXiv 2408.09027) in one file.

1. SAT, the tokenizer, turns 1 s of 24 kHz sound into T = 75 latent frames and quantises what is left of them at
   K = 16 growing resolutions, 1, 2, 4, ... 75: 455 tokens from coarse to fine, where residual VQ needs 750.
2. AAR, the generator, is a transformer that predicts ALL tokens of one scale at once from all coarser scales:
   p(r_1 .. r_K) = prod_k p(r_k | r_<k, condition). That makes 16 steps, where next-token prediction takes one for each
   token.
3. It trains in one pass under a block-wise causal mask: where it predicts scale k it sees the start token and the
   inputs of scales <= k, and the input of scale k is the sum of the scales BEFORE it.
4. The condition is an embedding of a reference sound (CLAP); it is the start token and steers every layer (AdaLN);
   it is dropped for 10% of the clips, so that classifier-free guidance (CFG) works.
5. Two stages: train SAT (reconstruction, then discriminators), freeze it, train AAR (cross-entropy on its tokens).

The idea lives in one loop, `MSRQ.walk`. Encoding, decoding, teacher forcing and generation differ only in how they
choose the tokens of a scale inside of it.

Shapes, everywhere:  B batch   N samples   T latent frames   K scales   s_k tokens of scale k   L tokens of all scales
                     D latent channels     V codes per codebook         C transformer width     H heads

What differs from the authors' published code, and why, is listed in README.md.
"""
import contextlib
import ctypes
import hashlib
import importlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import types
import zipfile
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from tqdm import tqdm

# A quirk of some x86 processors: they start in a state in which expm1, of which ELUs are made, takes 6 to 13 times as long, until
# a vectorised function like this one clears their registers' upper halves. Encoding takes half as long with it.
torch.tanh(torch.ones(64, dtype=torch.bfloat16))                    # called for this effect alone

# Linux's C library gives large blocks back as soon as they are free, and the next ones come as new pages, each cleared by the
# system, which costs up to a sixth of a training step. Keep up to 2 GiB of them; other C libraries than glibc have no mallopt.
if sys.platform == "linux":
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(-4, 0)                             # M_MMAP_MAX: all blocks come from the heap
        ctypes.CDLL(None).mallopt(-1, 2 ** 31 - 1)                   # M_TRIM_THRESHOLD: more than this, free at its end, goes back


# ---------------------------------------------------------------------------------------------------------------
# Configuration (Sec. 4 of the paper and the released configuration files)
# ---------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class SATConfig:
    """The tokenizer: window of `seconds` at `sample_rate` Hz, quantised at `n_scales` scales of V codes each."""
    sample_rate: int = 24000
    seconds: float = 1.0
    strides: tuple = (2, 4, 5, 8)       # hop = their product = 320 samples, 75 frames per second
    width: int = 32                     # channels after the first convolution; doubled at every stride
    lstm: int = 2                       # LSTM layers in the middle of encoder and decoder
    latent: int = 64                    # D
    V: int = 1024
    schedule: str = "quadratic"         # see scale_schedule
    n_scales: int = 16                  # K
    phis: int = 6                       # convolutions phi shared by the K scales; 0: none
    decay: float = 0.99                 # of the codebooks' moving averages
    disc_width: int = 32                # channels of the discriminators

    @property
    def hop(self):
        return math.prod(self.strides)

    @property
    def frames(self):
        return math.ceil(round(self.seconds * self.sample_rate) / self.hop)

    @property
    def samples(self):
        return self.frames * self.hop

    @property
    def scales(self):
        return scale_schedule(self.schedule, self.frames, self.n_scales)


@dataclass(frozen=True)
class AARConfig:
    """The generator; its size follows from the depth d: width 64 d, d heads (the paper: d = 16)."""
    scales: tuple = ()                  # of the tokenizer
    latent: int = 64                    # D of the tokenizer
    V: int = 1024
    depth: int = 16
    cond_dim: int = 512                 # numbers in the condition
    cond_drop: float = 0.1              # share of clips whose condition is hidden in training, for guidance
    next_token: bool = False            # the baseline of Fig. 3: one token per step over the flattened tokens


@dataclass(frozen=True)
class TrainConfig:
    """The plan of one training; shares are of its steps."""
    steps: int
    batch: int
    lr: float
    warm_up: float = 0.05               # share in which the learning rate grows
    quantize_at: float = 0.1            # stage 1: a plain autoencoder up to this share, then the codebooks start
    adversarial_at: float = 0.1         # stage 1: the discriminators join after this share
    crops: int = 2000                   # stage 2: windows of sound that are tokenised once, before training


@dataclass(frozen=True)
class Preset:
    """Sizes and plans of both stages."""
    sat: SATConfig
    aar: AARConfig
    train_sat: TrainConfig
    train_aar: TrainConfig


PRESETS = {
    "tiny": Preset(SATConfig(width=12, lstm=0, latent=32, V=256, disc_width=4),
                   AARConfig(depth=3),
                   TrainConfig(steps=3000, batch=12, lr=3e-3, adversarial_at=0.9),
                   TrainConfig(steps=2000, batch=8, lr=3e-3, crops=4000)),
    "small": Preset(SATConfig(width=16, lstm=0, disc_width=8), AARConfig(depth=6),
                    TrainConfig(steps=20_000, batch=8, lr=3e-3, adversarial_at=0.9),
                    TrainConfig(steps=5000, batch=8, lr=1e-3, crops=16000)),
    "paper": Preset(SATConfig(), AARConfig(),
                    TrainConfig(steps=400_000, batch=32, lr=3e-4, warm_up=0.01, quantize_at=0.01),
                    TrainConfig(steps=400_000, batch=64, lr=1e-4, warm_up=0.01, crops=4_000_000)),
}


class UserError(ValueError):
    """Something that the user can mend: the message says what was seen and what to do, in one line."""


def fast_dtype(device):
    """What to multiply in: bfloat16 if the device gains by it, else float32."""
    fast = (device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            or device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if fast else torch.float32


def autocast(device, on=True):
    """Inside, multiplications are done in `fast_dtype` if `on`, else in float32."""
    if device.type not in ("cuda", "cpu"):                            # mps; and meta, which knows no autocast at all
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=on and fast_dtype(device) == torch.bfloat16)


# ---------------------------------------------------------------------------------------------------------------
# Scales (Fig. 5)
# ---------------------------------------------------------------------------------------------------------------

def scale_schedule(kind: str, frames: int, n: int) -> tuple[int, ...]:
    """The number of tokens s_1 .. s_n of each scale, from 1 (flat: from `frames`) to `frames`, never decreasing (Fig. 5).

    quadratic: the square root of s_k grows evenly; linear: s_k grows evenly; log: the logarithm of s_k grows evenly;
    flat: `frames` at every scale, which turns MSRQ into the residual VQ baseline.
    Raises UserError for another kind, or if there are more scales than frames.
    """
    if n < 1 or frames < 1 or (n > frames and kind != "flat"):
        raise UserError(f"{n} scales do not fit {frames} latent frames: ask for 1 to {frames} scales")
    u = np.linspace(0, 1, n) if n > 1 else np.ones(1)
    s = {"quadratic": lambda: (1 + u * (math.sqrt(frames) - 1)) ** 2,
         "linear": lambda: 1 + u * (frames - 1),
         "log": lambda: frames ** u,
         "flat": lambda: np.full(n, frames)}
    if kind not in s:
        raise UserError(f"unknown schedule {kind!r}: choose one of {', '.join(s)}")
    return tuple(int(x) for x in np.floor(s[kind]() + 1e-6))           # 74.9999999 is meant to be 75


def down(f, s):
    """(B, D, T) -> (B, D, s): each token is the mean over its share of the frames; neighbours may share one."""
    return F.interpolate(f, size=s, mode="area") if f.shape[-1] != s else f


def up(z, T):
    """(B, D, s) -> (B, D, T): a straight line between neighbouring tokens."""
    return F.interpolate(z, size=T, mode="linear") if z.shape[-1] != T else z


# ---------------------------------------------------------------------------------------------------------------
# Quantizer: multi-scale residual quantization, MSRQ (Alg. 1 and Alg. 2)
# ---------------------------------------------------------------------------------------------------------------

class Codebook(nn.Module):
    """V codes of D numbers, each the moving average of the vectors nearest to it."""

    def __init__(self, V, D, decay=0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("codes", torch.randn(V, D))
        self.register_buffer("share", torch.full((V,), 1 / V))       # moving average: how many of the vectors chose it
        self.register_buffer("sum", self.codes / V)                  # moving average of their sum: code = sum / share
        self.register_buffer("idle", torch.zeros(V))                 # how many vectors came since one chose it

    def forward(self, r):
        """Tokens (B, s) -> codes (B, s, D)."""
        return F.embedding(r, self.codes)

    @torch.no_grad()
    def nearest(self, z):
        """Vectors (..., D) -> tokens (...): argmin_v |z - code_v|^2, in which |z|^2 plays no part."""
        return (self.codes.square().sum(1) - 2 * z @ self.codes.T).argmin(-1)

    @torch.no_grad()
    def update(self, z, r, decay=None):
        """Move the codes towards the vectors z (M, D) that chose them, r (M,), and revive the dead codes.

        A code is dead if none of the last 20 V vectors of ITS scale chose it; if all codes were chosen equally, that
        would happen once in e^20. It is reborn on a random vector of the batch, together with its statistics: to change
        the code alone would be undone by the next average.
        """
        decay, (V, D), M = self.decay if decay is None else decay, self.codes.shape, len(z)
        # The two moving averages: how many of the vectors chose each code, and the sum of those.
        hits = torch.zeros_like(self.share).index_add_(0, r, torch.ones_like(z[:, 0]))          # (V,)
        sums = torch.zeros_like(self.sum).index_add_(0, r, z)                                   # (V, D)
        self.share.lerp_(hits / M, 1 - decay)
        self.sum.lerp_(sums / M, 1 - decay)
        # The dead (in k-means, which has no memory, all that were not chosen) start anew as if `reborn` had come once in V.
        self.idle.copy_(torch.where(hits > 0, 0.0, self.idle + M))
        dead = (self.idle > 20 * V) | (self.share == 0)
        reborn = z[torch.randint(M, (V,), device=z.device)]
        self.share.copy_(torch.where(dead, 1 / V, self.share))
        self.sum.copy_(torch.where(dead[:, None], reborn / V, self.sum))
        self.idle.copy_(torch.where(dead, 0.0, self.idle))
        self.codes.copy_(self.sum / self.share[:, None])

    @torch.no_grad()
    def kmeans(self, z, rounds=10):
        """Start on the vectors z (M, D). Lloyd's k-means is the moving average without memory."""
        self.codes.copy_(z[torch.randint(len(z), (len(self.codes),), device=z.device)])
        for _ in range(rounds):
            self.update(z, self.nearest(z), decay=0.0)
        self.idle.zero_()


class Phi(nn.Conv1d):
    """The convolution that smooths what `up` interpolated, mixed half and half with its input (Alg. 2)."""

    def __init__(self, D):
        super().__init__(D, D, kernel_size=9, padding=4, bias=False)
        nn.init.dirac_(self.weight)                                  # starts as the identity

    def forward(self, h):
        return 0.5 * h + 0.5 * super().forward(h)


class MSRQ(nn.Module):
    """Multi-scale residual quantizer. With equal scales and no phi it is plain residual VQ."""

    def __init__(self, config: SATConfig):
        super().__init__()
        self.scales, self.frames = config.scales, config.frames
        self.codebooks = nn.ModuleList(Codebook(config.V, config.latent, config.decay) for _ in self.scales)
        self.phis = nn.ModuleList(Phi(config.latent) for _ in range(config.phis))
        self.parts, self.seen = 1, []                                # --accumulate: how many parts a batch has; those so far

    def phi(self, k, h):
        """The phi of scale k: neighbouring scales share one."""
        return self.phis[k * len(self.phis) // len(self.scales)](h) if len(self.phis) else h

    def walk(self, choose, T=None, n=None):
        """The loop of Alg. 1 and Alg. 2, coarse to fine: tokens [r_1 .. r_n] and sums [f_hat_1 .. f_hat_n], each (B, D, T).

        `choose(k, f_hat)` returns the tokens (B, s_k) of scale k, given the sum of all coarser scales, at first 0. T: how
        many frames the tokens are stretched over (default: one window); n: how many scales (default: all). In code k
        counts from 0, in the paper from 1: f_hats[k] is what scale k + 1 reads.
        """
        r, f_hats, f_hat = [], [], 0.0
        for k in range(n or len(self.scales)):
            r.append(choose(k, f_hat))
            code = self.codebooks[k](r[k]).mT                        # (B, D, s_k)
            f_hat = f_hat + self.phi(k, up(code, T or self.frames))  # (B, D, T)
            f_hats.append(f_hat)
        return r, f_hats

    def read(self, k, f):
        """(B, D, T) -> (B, s_k, D): a residual as codebook k sees it, or f_hat as the transformer reads it for scale k."""
        return down(f, self.scales[k]).mT

    def quantize(self, f, kmeans=False):
        """Alg. 1: latents f (B, D, T) -> tokens, sums f_hat_1 .. f_hat_K, and the residuals z that chose, (B, s_k, D) each.

        With `kmeans` each codebook first starts anew on its vectors.
        """
        z = []

        @torch.no_grad()                                             # in `walk` only the phis get gradients
        def choose(k, f_hat):
            z.append(self.read(k, f - f_hat))
            if kmeans:
                self.codebooks[k].kmeans(gather(z[k].flatten(0, 1)))     # gather: of all processes that train
            return self.codebooks[k].nearest(z[k])
        with autocast(f.device, on=False):                           # nearest codes need all digits
            f = f.float()
            return *self.walk(choose, f.shape[-1]), z

    def forward(self, f):
        """Latents f (B, D, T) -> quantised latents (B, D, T), tokens, loss; in training the codebooks learn."""
        r, f_hats, z = self.quantize(f)
        f = f.float()
        if self.training:
            self.learn(z, r)
        # Two equal numbers, two gradients, since f_hat carries none to f: the first moves the latents towards their sums, the
        # second the sums, by way of the phis, towards the latents. The codes are no parameters: they follow in `learn`.
        commitment_loss = sum(F.mse_loss(f, f_hat.detach()) for f_hat in f_hats) / len(f_hats)
        phi_loss = sum(F.mse_loss(f_hat, f.detach()) for f_hat in f_hats) / len(f_hats)
        # Straight-through, ONCE around the whole of MSRQ: the value is f_hat_K, the gradient passes to f as it came.
        return f + (f_hats[-1] - f).detach(), r, commitment_loss + phi_loss

    def learn(self, z, r):
        """Move the codes by the residuals z and the tokens r that they chose, once for all parts of a batch, of all processes."""
        self.seen.append((z, r))
        if len(self.seen) == self.parts:                             # no code moves before the whole batch has chosen
            for k, codebook in enumerate(self.codebooks):
                z_k = torch.cat([z[k].flatten(0, 1) for z, _ in self.seen])
                r_k = torch.cat([r[k].flatten() for _, r in self.seen])
                codebook.update(gather(z_k), gather(r_k))
            self.seen.clear()

    def decode(self, tokens, T=None):
        """Alg. 2: tokens of the first n >= 1 scales -> f_hat_n (B, D, T)."""
        return self.walk(lambda k, _: tokens[k], T, len(tokens))[1][-1]


# ---------------------------------------------------------------------------------------------------------------
# Codec: SEANet encoder and decoder as in EnCodec (Fig. 2 left)
# ---------------------------------------------------------------------------------------------------------------

# Sound has an RMS of about 1/8. The first layer scales it to 1, since an ELU of small numbers is a straight line, which can
# learn nothing that one layer could not; the last layer scales back.
LOUDNESS = 8.0


class Residual(nn.Module):
    """SEANet's residual unit: a bottleneck beside a 1x1 convolution. (B, c, N) -> (B, c, N)."""

    def __init__(self, c):
        super().__init__()
        self.block = nn.Sequential(nn.ELU(), conv(Conv1d, c, c // 2, 3, padding=1),
                                   nn.ELU(), conv(Conv1d, c // 2, c, 1))
        self.skip = conv(Conv1d, c, c, 1)

    def forward(self, x):
        return self.skip(x) + self.block(x)


class LSTM(nn.Module):
    """LSTM over time, added to its input. (B, c, T) -> (B, c, T)."""

    def __init__(self, c, layers):
        super().__init__()
        self.lstm = nn.LSTM(c, c, layers, bias=False, batch_first=True)

    def forward(self, x):
        return x + self.lstm(x.mT)[0].mT


class Encoder(nn.Sequential):
    """Waveform (B, 1, T * hop) -> latents (B, D, T)."""

    def __init__(self, config: SATConfig):
        c = config.width
        layers = [conv(Conv1d, 1, c, 7, padding=3, gain=LOUDNESS)]
        for r in config.strides:
            layers += [Residual(c), nn.ELU(), conv(Conv1d, c, 2 * c, 2 * r, stride=r, padding=(r + 1) // 2)]
            c *= 2
        if config.lstm:
            layers += [LSTM(c, config.lstm)]
        super().__init__(*layers, nn.ELU(), conv(Conv1d, c, config.latent, 7, padding=3))


class Decoder(nn.Sequential):
    """Latents (B, D, T) -> waveform (B, 1, T * hop): the encoder's mirror image."""

    def __init__(self, config: SATConfig):
        c = config.width * 2 ** len(config.strides)
        layers = [conv(Conv1d, config.latent, c, 7, padding=3)]
        if config.lstm:
            layers += [LSTM(c, config.lstm)]
        for r in reversed(config.strides):
            layers += [nn.ELU(), conv(ConvTranspose1d, c, c // 2, 2 * r, stride=r, padding=(r + 1) // 2,
                                                      output_padding=r % 2), Residual(c // 2)]
            c //= 2
        super().__init__(*layers, nn.ELU(), conv(Conv1d, c, 1, 7, padding=3, gain=1 / LOUDNESS))


class SAT(nn.Module):
    """Scale-level audio tokenizer: encoder, MSRQ, decoder."""

    def __init__(self, config: SATConfig):
        super().__init__()
        self.config = config
        self.encoder, self.quantizer, self.decoder = Encoder(config), MSRQ(config), Decoder(config)

    def latents(self, wav):
        """Waveform (B, 1, N) of any N >= 1 -> latents (B, D, ceil(N / hop)); the last frame is padded with silence."""
        return self.encoder(F.pad(wav, (0, -wav.shape[-1] % self.config.hop)))

    @torch.no_grad()
    def encode(self, wav):
        """Waveform (B, 1, N) -> list of K tensors of tokens (B, s_k), int64, as many for any N (Alg. 1)."""
        return self.quantizer.quantize(self.latents(wav))[0]

    @torch.no_grad()
    def decode(self, tokens, samples=None):
        """Tokens of all or only the first n scales -> waveform (B, 1, samples); default: one window (Alg. 2)."""
        if not 1 <= len(tokens) <= len(self.config.scales):
            raise UserError(f"cannot decode {len(tokens)} scales: this tokenizer has 1 to {len(self.config.scales)}")
        samples = samples or self.config.samples
        f_hat = self.quantizer.decode(tokens, math.ceil(samples / self.config.hop))
        return self.decoder(f_hat)[..., :samples].float()

    def forward(self, wav):
        """Waveform (B, 1, N) -> (reconstruction (B, 1, N), tokens, loss of the quantizer)."""
        f_hat, tokens, vq_loss = self.quantizer(self.latents(wav))
        return self.decoder(f_hat)[..., :wav.shape[-1]].float(), tokens, vq_loss

    @torch.no_grad()
    def teacher_inputs(self, tokens, next_token=False):
        """Tokens -> what the transformer reads for the scales 2..K, (B, L - s_1, D).

        For the next-token baseline: the code of each token's predecessor, (B, L - 1, D).
        """
        quantizer = self.quantizer
        if next_token:
            return torch.cat([codebook(r_k) for codebook, r_k in zip(quantizer.codebooks, tokens)], 1)[:, :-1]
        _, f_hats = quantizer.walk(lambda k, _: tokens[k])
        reads = [quantizer.read(k, f_hats[k - 1]) for k in range(1, len(f_hats))]     # what was known BEFORE scale k
        return torch.cat([f_hats[0].mT[:, :0], *reads], 1)           # begins with nothing, for the case of one scale


# ---------------------------------------------------------------------------------------------------------------
# The convolutions of codec and discriminators: memory layout, weight norm, first weights
# ---------------------------------------------------------------------------------------------------------------

class Conv1d(nn.Conv1d):
    """torch's, only faster on a CPU (about 15% of a step of stage 1): the channels of a sample lie side by side in memory.

    Strides and padding only, no dilation or groups: the codec has none.
    """

    def forward(self, x):
        weight = self.weight[:, :, None].contiguous(memory_format=torch.channels_last)
        return F.conv2d(x[:, :, None], weight, self.bias, (1, self.stride[0]), (0, self.padding[0])).squeeze(2)


class ConvTranspose1d(nn.ConvTranspose1d):
    """The same for the upsampling."""

    def forward(self, x):
        weight = self.weight[:, :, None].contiguous(memory_format=torch.channels_last)
        return F.conv_transpose2d(x[:, :, None], weight, self.bias, (1, self.stride[0]), (0, self.padding[0]),
                                  (0, self.output_padding[0])).squeeze(2)


class Conv2d(nn.Conv2d):
    """The same for the discriminators."""

    def forward(self, x):
        weight = self.weight.contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation)


def conv(kind, *args, gain=1.0, **kwargs):
    """Weight-normalised convolution whose weights start with variance (gain^2 / fan_in).

    That keeps the signal's size from layer to layer; with PyTorch's default it shrinks until all sounds look alike
    to the quantizer. Only the discriminators have biases: encoder and decoder turn silence into silence. Where the codec
    changes the rate (stride above 1, also upwards), the weights start as `filter_bank`.
    """
    module = kind(*args, bias=kind is Conv2d, **kwargs)
    taps = math.prod(module.kernel_size) * module.in_channels
    if module.transposed:
        taps /= math.prod(module.stride)                             # only kernel/stride taps meet at one output
    nn.init.normal_(module.weight, std=gain / math.sqrt(taps))
    if kind in (Conv1d, ConvTranspose1d) and module.stride[0] > 1:
        r, mix = module.stride[0], module.weight.data[:, :, 0]
        for band in range(r):                                        # each band may take any mixture of the channels
            nn.init.orthogonal_(mix[band::r], gain * math.sqrt(max(mix[band::r].shape) / taps))
        module.weight.data = mix[:, :, None] * filter_bank(r, len(mix))[:, None]
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return weight_norm(module)


def filter_bank(r, channels):
    """(channels, 2 r): the r filters of an MDCT in turn, each of mean square 1 and for one of r bands of frequencies.

    Where the codec changes the rate, it starts with channels that hear, or make, one band each: the published random
    filters hear all of them alike and need long to learn tones (after 500 steps they are 0.3 dB of log-mel behind).
    """
    t = torch.arange(2 * r) + 0.5
    band = torch.arange(channels)[:, None] % r + 0.5
    return 2 * torch.cos(math.pi / r * band * (t + r / 2)) * torch.sin(math.pi * t / (2 * r))


# ---------------------------------------------------------------------------------------------------------------
# Discriminators and the losses of stage 1
# ---------------------------------------------------------------------------------------------------------------

class STFTDiscriminator(nn.Module):
    """Judges the complex spectrogram at one window length (samples). (B, 1, N) -> list of feature maps, logits last."""

    def __init__(self, window, c):
        super().__init__()
        self.window = window
        self.register_buffer("hann", torch.hann_window(window), persistent=False)
        self.convs = nn.ModuleList([conv(Conv2d, 2, c, (9, 3), padding=(4, 1))] + [
            conv(Conv2d, c, c, (9, 3), stride=(2, 1), dilation=(1, d), padding=(4, d)) for d in (1, 2, 4)] + [
            conv(Conv2d, c, c, 3, padding=1), conv(Conv2d, c, 1, 3, padding=1)])

    def forward(self, wav):
        X = torch.stft(wav.squeeze(1).float(), self.window, self.window // 4, window=self.hann, normalized=True,
                       return_complex=True)                          # (B, window/2 + 1, frames)
        return feature_maps(torch.stack([X.real, X.imag], 1), self.convs)           # of (B, 2, window/2 + 1, frames)


class PeriodDiscriminator(nn.Module):
    """Judges every p-th sample as one column (HiFi-GAN). (B, 1, N) -> list of feature maps, logits last."""

    def __init__(self, p, c):
        super().__init__()
        self.p = p
        widths = [1, c, 2 * c, 4 * c, 8 * c]
        self.convs = nn.ModuleList([
            conv(Conv2d, a, b, (5, 1), stride=(3, 1), padding=(2, 0)) for a, b in zip(widths, widths[1:])] + [
            conv(Conv2d, 8 * c, 8 * c, (5, 1), padding=(2, 0)),
            conv(Conv2d, 8 * c, 1, (3, 1), padding=(1, 0))])

    def forward(self, wav):
        wav = F.pad(wav, (0, -wav.shape[-1] % self.p))
        return feature_maps(wav.unflatten(-1, (-1, self.p)), self.convs)            # of (B, 1, N/p, p)


def feature_maps(x, convs):
    """(B, channels, rows, columns) -> what each convolution makes of it, the last one logits."""
    maps = []
    for layer in convs:
        x = layer(F.leaky_relu(x, 0.2) if maps else x)
        maps.append(x)
    return maps


class Discriminators(nn.ModuleList):
    """Multi-scale STFT and multi-period discriminators. (B, 1, N) -> a list of feature maps for each."""

    def __init__(self, c):
        super().__init__([STFTDiscriminator(w, c) for w in (2048, 1024, 512, 256, 128)]
                         + [PeriodDiscriminator(p, c) for p in (2, 3, 5, 7, 11)])

    def forward(self, wav):
        return [d(wav) for d in self]


def discriminator_loss(real, fake):
    """Hinge loss of the discriminators, mean over them; `real` and `fake` are what Discriminators returns."""
    return sum(F.relu(1 - r[-1].float()).mean() + F.relu(1 + f[-1].float()).mean() for r, f in zip(real, fake)) / len(real)


def adversarial_loss(fake):
    """Hinge loss of the generator, mean over the discriminators."""
    return sum(F.relu(1 - f[-1].float()).mean() for f in fake) / len(fake)


def feature_loss(real, fake):
    """Relative feature matching: mean over all layers but the logits of |real - fake| / |real|; real sound only sets the target."""
    def size(x):                                                      # sums in float32, but no float32 copy of the maps
        return torch.linalg.vector_norm(x, 1, dtype=torch.float32)
    pairs = [(r.detach(), f) for rs, fs in zip(real, fake) for r, f in zip(rs[:-1], fs[:-1])]
    return sum(size(r - f) / size(r).clamp(min=1e-5 * r.numel()) for r, f in pairs) / len(pairs)


class Mel(nn.Module):
    """Mel spectrogram of magnitudes, (B, 1, N) -> (B, n_mels, frames); an STFT bin of a full-scale sine is 1 (0 dB)."""

    def __init__(self, sample_rate, window, n_mels):
        super().__init__()
        from librosa.filters import mel                              # here, since librosa takes a second to import
        self.window = window
        filters = torch.from_numpy(mel(sr=sample_rate, n_fft=window, n_mels=n_mels, norm=None))
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("hann", torch.hann_window(window), persistent=False)

    def forward(self, wav):
        X = torch.stft(wav.squeeze(1).float(), self.window, self.window // 4, window=self.hann, pad_mode="constant",
                       return_complex=True)
        with autocast(wav.device, on=False):
            return self.filters @ X.abs() / (self.window / 4)

    def dB(self, wav):
        """The same in dB, floor -80."""
        return 20 * self(wav).clamp(min=1e-4).log10()


class MelLoss(nn.Module):
    """L1 + L2 distance of log10 mel spectrograms, summed over windows of 2^5 .. 2^11 samples."""

    def __init__(self, sample_rate):
        super().__init__()
        self.mels = nn.ModuleList(Mel(sample_rate, 2 ** i, 5 * 2 ** i // 32) for i in range(5, 12))

    def forward(self, x, y):
        # The added floor of -80 dB keeps the gradient of the logarithm small in silence.
        pairs = [((mel(x) + 1e-4).log10(), (mel(y) + 1e-4).log10()) for mel in self.mels]
        return sum(F.l1_loss(a, b) + F.mse_loss(a, b) for a, b in pairs)


def wave_loss(x, y):
    """Energy of the error x - y in means of 4 samples, relative to the energy of x: spectra teach no phases, and the loss `time`
    weighs too little to.

    x, y (B, 1, N); the added 1e-5 is -50 dB. Means of 4 samples at 24 kHz keep what is below about 3 kHz: means of 8 and of 2 gave
    worse sounds. Far above, where no phase can be guessed, a loss of waves would only make noise too quiet.
    """
    error = F.avg_pool1d(x - y, 4)
    return (error.square().mean(-1) / (x.square().mean(-1) + 1e-5)).mean()


def log_mel_distance(mel, x, y):
    """Mean |dB| between two sounds, (B,): use Mel(24000, 1024, 80), this project's yardstick for reconstructions."""
    return (mel.dB(x) - mel.dB(y)).abs().mean((1, 2))


# ---------------------------------------------------------------------------------------------------------------
# Transformer: acoustic autoregressive model, AAR (Fig. 2 right)
# ---------------------------------------------------------------------------------------------------------------

class Attention(nn.Module):
    """Multi-head attention with unit-length queries and keys and a learned temperature per head (QK-norm)."""

    def __init__(self, C, H):
        super().__init__()
        self.H = H
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.log_scale = nn.Parameter(torch.full((H, 1, 1), math.log(4)))     # of the cosines in the softmax

    def forward(self, x, mask=None, cache=None, at=0):
        """x (B, n, C) -> (B, n, C). `cache` (2, B, H, L, C/H) keeps keys and values, those of x from place `at` on."""
        B, n, C = x.shape
        q, k, v = self.qkv(x).view(B, n, 3, self.H, C // self.H).permute(2, 0, 3, 1, 4)     # each (B, H, n, C/H)
        # q k^T is the cosine times the temperature: `attend` divides by no sqrt(d).
        q, k = unit(q, self.log_scale.clamp(max=math.log(100)).exp()), unit(k)
        if cache is not None:
            keys, values = cache
            keys[:, :, at:at + n], values[:, :, at:at + n] = k, v
            k, v = keys[:, :, :at + n], values[:, :, :at + n]        # only blocks that may be seen: needs no mask
        return self.proj(attend(q, k, v, mask).transpose(1, 2).reshape(B, n, C))


def unit(x, length=1.0):
    """Vectors x (..., n) made `length` long, a number or a tensor. F.normalize takes twice the time to train on a CPU."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return x * (length / norm.clamp(min=1e-12)).to(x.dtype)


def attend(q, k, v, mask=None):
    """softmax(q k^T) v, where query i sees key j if mask[i, j]. (B, H, n, C/H), twice (B, H, L, C/H) -> (B, H, n, C/H)."""
    if q.is_cpu and q.dtype == torch.bfloat16 and mask is not None and len(mask) <= 1024:
        # Half the time of the fused kernel in training on a CPU; but it keeps the (L, L) squares that the fused one avoids, hence
        # the limit. Without autocast the softmax stays in bfloat16; its sums are float32 all the same.
        with autocast(q.device, on=False):
            return (q @ k.mT + torch.where(mask, 0.0, -torch.inf).to(q.dtype)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)


def modulate(x, shift, scale):
    """AdaLN: layer norm whose shift and scale come from the condition."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Layer(nn.Module):
    """Layer of the transformer; `mod` holds its six AdaLN modulations (B, 6, 1, C)."""

    def __init__(self, C, H):
        super().__init__()
        self.attention = Attention(C, H)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))

    def forward(self, x, mod, mask=None, cache=None, at=0):
        shift1, scale1, gate1, shift2, scale2, gate2 = mod.unbind(1)
        x = x + gate1 * self.attention(modulate(x, shift1, scale1), mask, cache, at)
        return x + gate2 * self.mlp(modulate(x, shift2, scale2))


def block_mask(blocks):
    """True where the query (row) may look at the key (column): at its own block and at all earlier ones, (L, L).

    Blocks of 1, 2 and 3 tokens:    1 . . . . .    reads the start token                 predicts r_1
                                    1 1 1 . . .    reads down(f_hat_1), two vectors      predicts r_2, two tokens at once
                                    1 1 1 . . .
                                    1 1 1 1 1 1    reads down(f_hat_2), three           predicts r_3, three at once
                                    1 1 1 1 1 1
                                    1 1 1 1 1 1
    To look at the whole own block is no leak: what it reads is made of the tokens of EARLIER blocks only.
    """
    block = torch.arange(len(blocks)).repeat_interleave(torch.tensor(blocks))
    return block[:, None] >= block


class AAR(nn.Module):
    """Acoustic autoregressive model: p(r_1 .. r_K) = prod_k p(r_k | r_<k, condition), one factor a block of tokens.

    A block is one scale, or, with `next_token` (Fig. 3), one token.
    """

    def __init__(self, config: AARConfig):
        super().__init__()
        self.config = config
        C, H, L, K = 64 * config.depth, config.depth, sum(config.scales), len(config.scales)
        self.blocks_per_scale = [[1] * s if config.next_token else [s] for s in config.scales]
        blocks = sum(self.blocks_per_scale, [])
        self.first = blocks[0]                                                 # tokens predicted by the start token
        self.null = nn.Parameter(torch.randn(config.cond_dim) / config.cond_dim ** 0.5)     # "no condition", learned
        self.cond = nn.Sequential(nn.Linear(config.cond_dim, C), nn.SiLU(), nn.Linear(C, C))
        self.input = nn.Linear(config.latent, C)
        # Added to the inputs: which scale (not the "scale" of AdaLN) and which place of the sequence this is.
        self.level, self.position = nn.Parameter(torch.empty(K, C)), nn.Parameter(torch.empty(L, C))
        self.adaln = nn.Linear(C, (6 * config.depth + 2) * C)                  # of all layers and the head
        self.layers = nn.ModuleList(Layer(C, H) for _ in range(config.depth))
        self.head = nn.Linear(C, config.V)
        self.register_buffer("scale_of", torch.arange(K).repeat_interleave(torch.tensor(config.scales)), persistent=False)
        self.register_buffer("mask", block_mask(blocks), persistent=False)     # (L, L)

        for module in self.modules():
            if isinstance(module, nn.Linear):                                  # half the variance that keeps a signal's size
                nn.init.trunc_normal_(module.weight, std=(2 * module.in_features) ** -0.5)
                nn.init.zeros_(module.bias)
        for p in (self.level, self.position):
            nn.init.trunc_normal_(p, std=0.3)
        for layer in self.layers:                                              # 2 d branches add to the residual stream
            for out in (layer.attention.proj, layer.mlp[2]):
                out.weight.data /= math.sqrt(2 * config.depth)
        nn.init.zeros_(self.head.weight)                                       # the first loss is ln V
        nn.init.zeros_(self.adaln.weight)                                      # every clip starts with gates 1, the rest 0
        self.adaln.bias.data[:6 * config.depth * C].view(config.depth, 6, C)[:, [2, 5]] = 1.0         # gate1, gate2 of Layer

    def condition(self, cond):
        """Condition (B, cond_dim) -> start token (B, 1, C), modulations of the layers and of the head.

        It is the same at all scales, so this runs once per clip.
        """
        c = self.cond(cond * cond.shape[-1] ** 0.5)                             # a unit vector's numbers are small
        mods = self.adaln(F.silu(c)).unflatten(-1, (-1, c.shape[-1]))[:, :, None]           # (B, 6 d + 2, 1, C)
        layers, head = mods[:, :-2].unflatten(1, (-1, 6)), mods[:, -2:]         # (B, d, 6, 1, C), (B, 2, 1, C)
        return c[:, None], layers.unbind(1), head.unbind(1)

    def logits(self, x, mods, head, mask=None, caches=None, at=0):
        """Inputs x (B, n, C) of the places at .. at + n - 1 -> logits (B, n, V): shared by training and generation."""
        here = slice(at, at + x.shape[1])
        x = x + self.level[self.scale_of[here]] + self.position[here]
        for layer, mod, cache in zip(self.layers, mods, caches or [None] * len(mods)):
            x = layer(x, mod, mask, cache, at)
        return self.head(modulate(x, *head)).float()

    def forward(self, cond, teacher_inputs):
        """Condition (B, cond_dim), SAT.teacher_inputs (B, L - first, D) -> logits (B, L, V), all blocks in one pass."""
        if self.training:
            hide = torch.rand(len(cond) * world(), 1, device=cond.device) < self.config.cond_drop
            hide = shard(hide)                                                 # each training process its part of one draw
            cond = torch.where(hide, self.null, cond)
        start, mods, head = self.condition(cond)
        x = torch.cat([start.expand(-1, self.first, -1), self.input(teacher_inputs)], 1)
        return self.logits(x, mods, head, self.mask)

    @torch.no_grad()
    def prepare(self):
        """From now on for generation only, faster: see `Prepared`. Returns itself."""
        for layer in self.layers:
            attention, mlp = layer.attention, layer.mlp
            attention.qkv, attention.proj = Prepared(attention.qkv), Prepared(attention.proj)
            layer.mlp = nn.Sequential(Prepared(mlp[0], gelu=True), Prepared(mlp[2]))
        return self

    @torch.inference_mode()
    def generate(self, cond, sat, cfg=6.0, top_k=0, top_p=0.8, generator=None):
        """Condition (B, cond_dim) and the tokenizer -> list of K tensors of tokens (B, s_k).

        cfg: guidance t grows linearly with the scale, t_k = cfg * k / (K - 1), k from 0, and the logits are
        (1 + t_k) conditional - t_k unconditional (Fig. 4). top_k, top_p: see `draw`. generator: on the model's device.
        """
        config, B, K, H = self.config, len(cond), len(self.config.scales), self.config.depth
        if cfg:
            cond = torch.cat([cond, self.null.expand(B, -1)])                  # both halves in one batch
        start, mods, head = self.condition(cond)
        dtype = self.layers[0].attention.qkv.bias.dtype
        caches = [start.new_empty(2, len(cond), H, len(self.scale_of), 64, dtype=dtype)
                  for _ in self.layers]                                        # keys, values: (B or 2 B, H, L, C/H)
        at, last = 0, None                  # places filled; codes drawn last, (B, n, D), which only next-token reads

        def choose(k, f_hat):
            """Predict the tokens of scale k: one block, or s_k blocks of one token each."""
            nonlocal at, last
            r_k = []
            for n in self.blocks_per_scale[k]:
                if at == 0:
                    x = start.expand(-1, n, -1)
                else:
                    x = self.input(last if config.next_token else sat.quantizer.read(k, f_hat))      # (B, n, C)
                    x = x.repeat(len(cond) // B, 1, 1)                         # both halves read the same
                logits = self.logits(x, mods, head, caches=caches, at=at)
                if cfg:
                    t = cfg * k / max(K - 1, 1)
                    logits = (1 + t) * logits[:B] - t * logits[B:]
                r_k.append(draw(logits, top_k, top_p, generator))
                at, last = at + n, sat.quantizer.codebooks[k](r_k[-1])
            return torch.cat(r_k, 1)
        return sat.quantizer.walk(choose)[0]


def draw(logits, top_k=0, top_p=1.0, generator=None):
    """Logits (B, n, V) -> tokens (B, n), drawn from the top_k likeliest codes (0: all) and, of what is left, from the
    likeliest that hold top_p of the probability (at least one)."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1:
        p, order = logits.softmax(-1).sort(-1, descending=True)
        drop = p.cumsum(-1) - p >= max(top_p, 1e-9)                            # those before it hold enough
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return torch.multinomial(logits.softmax(-1).flatten(0, -2), 1, generator=generator).view(logits.shape[:-1])


class Prepared(nn.Module):
    """A linear layer, and the GELU after it, for generation: weights in `fast_dtype`, on a CPU in its own order.

    A CPU's matrix unit reads weights in an order of its own. It is made once here, not anew at each of the K scales.
    """

    def __init__(self, linear, gelu=False):
        super().__init__()
        dtype = fast_dtype(linear.weight.device)
        self.bias, self.gelu = linear.bias.to(dtype), gelu
        self.packed = linear.weight.is_cpu and torch.backends.mkldnn.is_available()
        reorder = torch.ops.mkldnn._reorder_linear_weight if self.packed else torch.Tensor.contiguous
        self.weight = reorder(linear.weight.to(dtype))

    def forward(self, x):
        x, act = x.to(self.bias.dtype), ("gelu" if self.gelu else "none", [], "none")
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *act)
        x = F.linear(x, self.weight, self.bias)
        return F.gelu(x) if self.gelu else x


# ---------------------------------------------------------------------------------------------------------------
# Conditioning: what the generator is told about the sound
# ---------------------------------------------------------------------------------------------------------------

class MelEmbedder(nn.Module):
    """Download-free stand-in for CLAP: the coarse shape of the log-mel picture. (B, 1, N) -> (B, 512) of unit length.

    A 64-band log-mel spectrogram (1024/256 Hann, floor -80 dB, 0 = floor, 1 = full scale) loses its mean, so that
    loudness matters little; a cosine transform over the bands makes 32 cepstra of it, of which number i weighs
    sqrt(i + 1). Kept of each over time: the lowest 14 coefficients of another cosine transform (what happens when), its
    deviation and that of its steps (how much happens, whenever).
    """
    dim = 512

    def __init__(self, sample_rate):
        super().__init__()
        self.mel = Mel(sample_rate, 1024, 64)
        i = torch.arange(32)[:, None]
        dct = torch.cos(i * (torch.arange(64) + 0.5) * math.pi / 64)                      # (32, 64)
        self.register_buffer("time", dct[:14].T / 64)                # saved, so that the fingerprint changes with it
        self.register_buffer("pitch", dct * (i + 1).sqrt())

    @torch.no_grad()
    def forward(self, wav):
        x = self.mel.dB(wav) / 80 + 1                                                       # (B, 64, frames)
        c = self.pitch @ (x - x.mean((1, 2), keepdim=True))                                 # (B, 32, frames)
        when = F.interpolate(c, size=64, mode="linear") @ self.time                         # (B, 32, 14)
        much = torch.stack([c.std(2, correction=0), c.diff(dim=2).std(2, correction=0)], 2)
        return F.normalize(torch.cat([when, much], 2).flatten(1), dim=-1)


GET_CLAP = "get 630k-audioset-best.pt from https://huggingface.co/lukewys/laion_clap and give it with --clap"


def clap_tensors(path):
    """Tensors of a laion-clap checkpoint file as {name: tensor}, on the CPU. Raises UserError if the file is none."""
    if not os.path.isfile(path):                                      # Path's own raises for a name that is too long
        raise UserError(f"no CLAP checkpoint at {path}: {GET_CLAP}")
    # weights_only=True runs no code from the file. The published files hold numpy scalars (numpy 2 renamed core to _core).
    scalar = np.float64(0).__reduce__()[0]
    safe = [np.dtype, *(type(np.dtype(t)) for t in "fdl"),
            (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]
    try:
        with torch.serialization.safe_globals(safe):
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        return {str(name).removeprefix("module."): t for name, t in state.items() if torch.is_tensor(t)}
    except Exception as e:                                            # a broken file can raise nearly anything
        raise UserError(f"{path}: not a whole, safe checkpoint ({type(e).__name__}): {GET_CLAP}") from e


def load_part(module, tensors, part):
    """The module with the tensors named `part`.*, frozen. Raises UserError if one is missing or of another shape."""
    own = {name.removeprefix(part + "."): t for name, t in tensors.items() if name.startswith(part + ".")}
    own.pop("embeddings.position_ids", None)                          # 0, 1, 2, ...: older transformers saved it
    try:
        module.load_state_dict(own)
    except RuntimeError as e:
        raise UserError(f"the checkpoint's {part} tensors do not fit laion-clap's {part}: {GET_CLAP}") from e
    return module.eval().requires_grad_(False)


def htsat(size):
    """laion-clap's audio transformer, size "tiny" or "base", with random weights."""
    try:
        spec = importlib.util.find_spec("laion_clap")
        if spec is None:
            raise ImportError("it is not installed")
        folder = Path(spec.origin).parent / "clap_module"
        # `import laion_clap` asks the network for tokenizers, for minutes: import its audio file below an empty package.
        sys.modules.setdefault("_clap_audio", types.ModuleType("_clap_audio")).__path__ = [str(folder)]
        create = importlib.import_module("_clap_audio.htsat").create_htsat_model
    except ImportError as e:                                          # torchvision, say, which it needs and does not ask for
        raise UserError(f"laion_clap cannot be imported ({e}): pip install -r requirements.txt") from e
    config = json.loads((folder / f"model_configs/HTSAT-{size}.json").read_text())["audio_cfg"]
    return create(types.SimpleNamespace(**config))


class CLAP(nn.Module):
    """Frozen laion-clap (arXiv 2211.06687) from a file, never the network: like sounds and sentences get close vectors.

    Raises UserError if the file or the installation will not do.
    """
    dim = 512

    @torch.random.fork_rng(devices=[])                                # the first, random weights leave the seed alone
    def __init__(self, path, sample_rate):
        super().__init__()
        self.path, self.sample_rate, self.text_branch = Path(path), sample_rate, None
        tensors = clap_tensors(path)
        if any("fusion_model" in name or "mel_conv" in name for name in tensors):
            raise UserError(f"{path}: a fusion checkpoint, which is not supported: {GET_CLAP}")
        width = tensors.get("audio_branch.patch_embed.proj.bias", torch.empty(0)).numel()
        if width not in (96, 128):
            raise UserError(f"{path}: holds no audio_branch of HTSAT-tiny or HTSAT-base: {GET_CLAP}")
        self.audio_branch = load_part(htsat("tiny" if width == 96 else "base"), tensors, "audio_branch")
        self.audio_projection = load_part(self.projection(8 * width), tensors, "audio_projection")

    def projection(self, width):
        """The layers between the audio or text half and the shared 512 numbers."""
        return nn.Sequential(nn.Linear(width, self.dim), nn.ReLU(), nn.Linear(self.dim, self.dim))

    @torch.no_grad()
    def forward(self, wav):
        """Waveform (B, 1, N) -> (B, 512), unit length; only the first 10 s count."""
        import soxr
        x = soxr.resample(wav.squeeze(1).T.float().cpu().numpy(), self.sample_rate, 48000)
        x = torch.from_numpy(x.T).to(wav.device)[:, :480000]
        # As laion-clap was trained: a short sound is repeated a whole number of times, then silence fills the 10 s.
        x = x.repeat(1, 480000 // x.shape[1])
        x = F.pad(x, (0, 480000 - x.shape[1]))
        with autocast(x.device, on=False):                            # half precision would spoil the spectrogram
            x = self.audio_branch({"waveform": x}, device=x.device)["embedding"]
            return F.normalize(self.audio_projection(x), dim=-1)

    @torch.no_grad()
    def text(self, prompts):
        """A list of P sentences -> (P, 512), unit length; only the first 77 tokens of each count."""
        if self.text_branch is None:
            self.build_text()
        device = self.text_projection[0].weight.device
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
        tokens = tokens.to(device)
        x = self.text_branch(tokens.input_ids, tokens.attention_mask).pooler_output
        return F.normalize(self.text_projection(x), dim=-1)

    @torch.random.fork_rng(devices=[])
    def build_text(self):
        """Add the tokenizer and the text half, which only `text` needs; its sizes are those of the tensors."""
        from huggingface_hub import try_to_load_from_cache
        from transformers import RobertaConfig, RobertaModel, RobertaTokenizer
        tensors = clap_tensors(self.path)
        if "text_branch.embeddings.word_embeddings.weight" not in tensors:
            raise UserError(f"{self.path}: has no text half (text_branch tensors): {GET_CLAP}")
        here = self.path.resolve().parent
        cached = try_to_load_from_cache("roberta-base", "vocab.json")           # by name it would ask the network
        folders = [here, Path(cached).parent] if isinstance(cached, str) else [here]
        folders = [f for f in folders if (f / "vocab.json").is_file() and (f / "merges.txt").is_file()]
        try:
            self.tokenizer = RobertaTokenizer.from_pretrained(folders[0], local_files_only=True)
            seen = len(self.tokenizer)
        except Exception:                                             # no folder, or broken files
            seen = 0
        if seen != 50265:                                             # without words all prompts would be the same, silently
            raise UserError(f"CLAP's tokenizer has {seen} of its 50265 tokens: get vocab.json and merges.txt "
                            f"from https://huggingface.co/roberta-base and put both into {here}")
        width = tensors["text_branch.embeddings.word_embeddings.weight"].shape[1]
        layers = sum(name.endswith(".intermediate.dense.weight") for name in tensors)
        config = RobertaConfig(vocab_size=50265, hidden_size=width, num_hidden_layers=layers,
                               num_attention_heads=width // 64, intermediate_size=4 * width, max_position_embeddings=514,
                               type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1, bos_token_id=0, eos_token_id=2)
        device = self.audio_projection[0].weight.device
        branch = load_part(RobertaModel(config), tensors, "text_branch").to(device)
        self.text_projection = load_part(self.projection(width), tensors, "text_projection").to(device)
        self.text_branch = branch


def build_embedder(kind, sample_rate, clap=None, trained_with=None):
    """The condition's embedder, "mel" or "clap", frozen; `clap`: the checkpoint file of laion-clap.

    Raises UserError if its fingerprint is not that of the embedder that a generator was `trained_with`.
    """
    if kind == "clap" and clap is None:
        raise UserError(f"the embedder clap needs a checkpoint: {GET_CLAP}")
    embedder = (CLAP(clap, sample_rate) if kind == "clap" else MelEmbedder(sample_rate)).eval()
    if trained_with not in (None, fingerprint(embedder)):
        raise UserError("the generator was trained with another version of the mel embedder: train it anew"
                        if kind == "mel" else f"--clap {clap} is not the checkpoint that the generator was trained with")
    return embedder


def frechet(a, b):
    """Frechet distance of two sets of embeddings (n, C) and (m, C), as if either were Gaussian (FAD, arXiv 1812.08466):

    |mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), S the covariances, all in float64. If X^T X = S, the trace
    of the root is the sum of the singular values of X_a X_b^T, which stays exact where S has no inverse. Raises
    UserError below two clips.
    """
    if min(len(a), len(b)) < 2:
        raise UserError(f"a Frechet distance needs at least 2 sounds on either side, got {len(a)} and {len(b)}")
    a, b = a.double().cpu(), b.double().cpu()
    A, B = (torch.linalg.qr((x - x.mean(0)) / math.sqrt(len(x) - 1)).R for x in (a, b))     # at most C rows each
    return ((a.mean(0) - b.mean(0)).square().sum() + A.square().sum() + B.square().sum()
            - 2 * torch.linalg.matrix_norm(A @ B.T, "nuc")).item()


def warn_of_few(n, C):
    """Say so if a Frechet distance of n clips in C dimensions is too high to stand alone."""
    if n < C:
        print(f"warning: {n} clips are fewer than the {C} dimensions of their embeddings, which makes Frechet distances "
              "too high, those of real sounds to real sounds too: compare only figures of equally many clips", file=sys.stderr)


def neighbours(e, names):
    """How often the nearest other embedding (n, C) belongs to a sound of the same kind, and by chance, as a sentence.

    The kind is the folder of a file or the kind of a toy.
    """
    kinds = np.array([Path(name).parent.name or name.partition("-")[0] for name in names])
    same = kinds[:, None] == kinds
    if same.all():
        return "all sounds are of one kind (one folder)"
    nearest = (e @ e.T).fill_diagonal_(-torch.inf).argmax(1).cpu()
    n = len(kinds)
    return (f"the nearest other sound is of the same kind for {same[np.arange(n), nearest].mean():.0%} of {n} sounds "
            f"(chance {(same.sum() - n) / (n * (n - 1)):.0%})")


# ---------------------------------------------------------------------------------------------------------------
# Sound and files
# ---------------------------------------------------------------------------------------------------------------

def load_audio(path, sample_rate, start=0.0, seconds=None):
    """Any file that libsndfile reads -> (1, N) float32 at `sample_rate` Hz, mono; only `seconds` from `start` are read.

    Channels are averaged, or, where they cancel each other, the loudest one is taken. Peaks above 1 are scaled to 1.
    Raises UserError for what is not a readable sound.
    """
    import soundfile
    if not os.path.isfile(path):
        raise UserError(f"{path}: {'a folder, not a sound file' if os.path.isdir(path) else 'no such file'}")
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            if not 1000 <= rate <= 1_000_000:                         # a broken header: hours of sound from a few bytes
                raise OSError(f"{rate} samples per second")
            file.seek(min(int(start * rate), file.frames))
            x = file.read(-1 if seconds is None else math.ceil(seconds * rate), dtype="float32", always_2d=True)
    except (OSError, RuntimeError, TypeError, ValueError, MemoryError) as e:     # RuntimeError: libsndfile's own
        why = str(e).strip().splitlines()[-1] if str(e) else type(e).__name__
        raise UserError(f"{path}: not a readable sound file ({why})")
    if not x.size:
        raise UserError(f"{path}: holds no samples")
    if not np.isfinite(x).all():
        raise UserError(f"{path}: holds NaN or infinite samples")
    mono = x.mean(1)
    if mono.std() < 0.01 * x.std(0).max():
        mono = x[:, x.std(0).argmax()]
    if rate != sample_rate:
        import soxr
        mono = soxr.resample(mono, rate, sample_rate)
        if not mono.size:
            raise UserError(f"{path}: too short for one sample at {sample_rate} Hz")
    if seconds is not None:
        mono = mono[:math.ceil(seconds * sample_rate)]
    return torch.from_numpy(np.ascontiguousarray(mono / max(1.0, np.abs(mono).max(initial=0.0)), dtype=np.float32))[None]


def save_audio(path, wav, sample_rate):
    """Write (1, N) as a 16-bit wave file. Raises UserError if that fails."""
    import soundfile
    if rank() > 0:
        return
    try:
        soundfile.write(path, wav.detach().float().cpu().squeeze(0).clamp(-1, 1).numpy(), sample_rate, subtype="PCM_16")
    except (OSError, RuntimeError) as e:
        raise UserError(f"{path}: cannot be written ({e}); is the disk full?")


def save_in_turn(path, x, y, sample_rate):
    """Write sounds x and y (n, 1, N) as one wave file, x[0] y[0] x[1] y[1] ..., with pauses between."""
    pairs = F.pad(torch.stack([x.cpu(), y.cpu()], 1), (0, sample_rate // 5))                 # (n, 2, 1, N + pause)
    save_audio(path, pairs.reshape(1, -1), sample_rate)


TOYS = ("kick", "snare", "hat", "pluck", "bell", "siren", "bird", "wind", "buzz", "clicks")


def toy_sound(kind, rng, sample_rate, samples):
    """A sound of one of ten kinds with random parameters from the numpy generator `rng`: (1, samples) float32.

    As in a recording there is a little noise, at -45 dB.
    """
    t, u = np.arange(samples) / sample_rate, rng.uniform
    noise = rng.standard_normal(samples)

    def tone(hz):
        return np.sin(2 * np.pi * np.cumsum(hz * np.ones(samples)) / sample_rate)

    def decay(rate):
        return np.exp(-rate * t)
    if kind == "kick":
        x = tone(u(40, 60) + u(100, 200) * decay(u(25, 45))) * decay(u(5, 9))
    elif kind == "snare":
        x = 0.5 * noise * decay(u(12, 20)) + tone(u(160, 240)) * decay(u(15, 25))
    elif kind == "hat":
        x = np.diff(noise, 2, prepend=[0, 0]) * decay(u(25, 60))
    elif kind == "pluck":
        f = u(150, 600)
        x = sum(tone(f * h) * decay(2 * h + u(1, 3)) / h for h in range(1, 9))
    elif kind == "bell":
        f = u(400, 900)
        x = sum(tone(f * h) * decay(u(0.5, 1.5) * h) / h for h in (1, 2.76, 5.4, 8.93))
    elif kind == "siren":
        f = u(600, 1000)
        hz = f + f * u(0.2, 0.4) * np.sin(2 * np.pi * u(2, 4) * t)
        x = sum(tone(hz * h) / h for h in range(1, 6))
    elif kind == "bird":
        f = u(2500, 4500)
        phase = t * u(4, 8) % 1
        x = tone(f * (1 + u(0.2, 0.5) * phase)) * (phase < 0.6) * np.sin(np.pi * phase / 0.6)
    elif kind == "wind":
        x = np.convolve(noise, np.hanning(int(u(60, 160))), "same") * (1 + 0.8 * np.sin(2 * np.pi * u(0.5, 2) * t + u(0, 6)))
    elif kind == "buzz":
        f = u(70, 160)
        x = sum(tone(f * h) / h for h in range(1, 25))
    else:
        times = np.diff(t * u(6, 14) % 1, prepend=0) < 0
        x = np.convolve(times, noise[:200] * np.exp(-np.arange(200) / u(15, 40)))[:samples]
    x = x / (np.abs(x).max() + 1e-9) * 10 ** (u(-12, -2) / 20) + 10 ** (-45 / 20) * rng.standard_normal(samples)
    return torch.from_numpy(x.astype(np.float32))[None]


class ToySounds(torch.utils.data.Dataset):
    """Endless built-in sounds: item i is (wav (1, samples), name), the same for the same seed."""

    def __init__(self, sample_rate, samples, seed=0, held_back=False):
        self.sample_rate, self.samples, self.seed, self.held_back = sample_rate, samples, seed, held_back

    def __repr__(self):
        return "built-in toy sounds"

    def key(self):
        return [self.seed, self.samples]

    def __len__(self):
        return 100 if self.held_back else sys.maxsize

    def __getitem__(self, i):
        kind = TOYS[i % len(TOYS)]
        rng = np.random.default_rng((self.seed, self.held_back, i))
        return toy_sound(kind, rng, self.sample_rate, self.samples), f"{kind}-{i}"


class SoundFolder(torch.utils.data.Dataset):
    """Windows of the sound files below a folder: item i is (wav (1, samples), name), the same for the same seed.

    Every epoch visits each file once in a new order, at a random place that is not silent, or else at the loudest of four.
    Short sounds are padded with silence. Of the files, 5% are held back for validation, by a hash of their path in the
    folder, so that more files move none of them (in a small folder: the one of the lowest hash; a single file serves both
    purposes). Raises UserError if there is no sound, or if more than half of the files are unreadable.
    """
    SUFFIXES = set(".wav .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .caf .w64 .rf64".split())

    def __init__(self, folder, sample_rate, samples, seed=0, held_back=False):
        import soundfile
        self.sample_rate, self.samples, self.seed, self.held_back = sample_rate, samples, seed, held_back
        self.folder, root = folder, Path(folder)
        if not os.path.isdir(folder):
            raise UserError(f"--data {folder}: no such folder")
        self.files, self.bad = [], []

        def skip(path):
            self.bad.append(path)
            if not held_back:                                         # once, not for both halves of the data
                print(f"skipped {path}: cannot be read as sound", file=sys.stderr)
        paths = sorted(Path(d) / f for d, _, fs in os.walk(root, onerror=lambda e: skip(e.filename)) for f in fs
                       if Path(f).suffix.lower() in self.SUFFIXES)
        for path in paths:
            try:
                info = path.is_file() and soundfile.info(path)        # a pipe would wait for ever
                seconds = info and info.frames / info.samplerate
            except (OSError, RuntimeError, ValueError):
                seconds = 0
            if seconds:
                self.files.append((path, seconds))
            else:
                skip(path)
        if not paths or len(self.bad) > len(self.files):
            example = f", such as {self.bad[0]}" if self.bad else ""
            raise UserError(f"--data {folder}: {len(self.files)} readable sounds, {len(self.bad)} unreadable{example}; "
                            f"give a folder of {' '.join(sorted(self.SUFFIXES))}")
        hashes = {path: zlib.crc32(path.relative_to(root).as_posix().encode()) for path, _ in self.files}
        self.files.sort(key=lambda file: hashes[file[0]])
        n = max(1, sum(h < 2 ** 32 // 20 for h in hashes.values()))
        if len(self.files) > 1:
            self.files = self.files[:n] if held_back else self.files[n:]
        self.broken = torch.zeros(len(self.files), dtype=torch.bool).share_memory_()     # when read: known to all workers
        self.epoch = None, None                                       # the last one used, and its order

    def __repr__(self):
        return f"{len(self.files)} sounds in {self.folder} ({len(self.bad)} unreadable ones skipped)"

    def key(self):
        """Changes when the files do."""
        return [self.seed, self.samples] + [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p, _ in self.files]

    def __len__(self):
        return len(self.files) if self.held_back else sys.maxsize

    def order(self, epoch):
        """All files, shuffled. The last order is kept: to shuffle a million files takes longer than to read one."""
        if self.epoch[0] != epoch:
            self.epoch = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.files))
        return self.epoch[1]

    def __getitem__(self, i):
        n, seconds = len(self.files), self.samples / self.sample_rate
        rng = np.random.default_rng((self.seed, self.held_back, i))
        for attempt in range(n):                                      # a file that cannot be read: take the next
            j = i if self.held_back and not attempt else self.order(i // n)[(i + attempt) % n]
            path, length = self.files[j]
            try:
                loudest = -1.0
                for _ in range(4):                                    # a silent place: try another
                    start = rng.uniform(0, max(0.0, length - seconds))
                    x = load_audio(path, self.sample_rate, start, seconds)[:, :self.samples]
                    if (power := x.square().mean().item()) > loudest:
                        wav, loudest = x, power
                    if loudest > 1e-6:                                # -60 dB
                        break
                return F.pad(wav, (0, self.samples - wav.shape[-1])), str(path)
            except UserError as e:
                if not self.broken[j]:
                    self.broken[j] = True
                    print(f"skipped {e}", file=sys.stderr)
                if (broken := int(self.broken.sum())) > n / 2:
                    break
        raise UserError(f"{broken} of {n} sounds in {self.folder} cannot be read, such as {path}")


def sounds(data, config: SATConfig, seed=0, held_back=False):
    """The data set of windows for a tokenizer: a folder, or, without one, the built-in toy sounds."""
    common = config.sample_rate, config.samples, seed, held_back
    return ToySounds(*common) if data is None else SoundFolder(data, *common)


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints and training: here the method ends; what follows is plumbing that both stages share
# ---------------------------------------------------------------------------------------------------------------

VERSION = 1
MAKER = {"sat": "train_sat.py", "aar": "train_aar.py"}


def save(path, state):
    """torch.save by the first process, so that at any moment `path` is the old file or the new one, whole.

    Raises UserError if that fails.
    """
    if rank() > 0:
        return
    path = Path(os.path.realpath(path))                               # a link stays a link
    tmp = path.with_name(path.name + ".tmp")
    try:
        with open(tmp, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as e:                              # RuntimeError: torch's own, when the disk is full
        tmp.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({e}); is the disk full? What was there before is kept")


def save_checkpoint(path, kind, config, plan, step, history, parts, **run):
    """Write a checkpoint, so that at any moment `path` is the old one or the new one, whole."""
    rng = {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})
    save(path, {"kind": kind, "version": VERSION, "config": asdict(config), "plan": asdict(plan), "step": step,
                "history": history, "rng": rng, "parts": {name: part.state_dict() for name, part in parts.items()}, **run})


@contextlib.contextmanager
def spare():
    """What is written inside can be made again: if that fails, it is said, and training goes on."""
    try:
        yield
    except UserError as e:
        print(f"skipped {e}", file=sys.stderr)


@contextlib.contextmanager
def reading(path, kind):
    """Inside, whatever a foreign, broken or outdated checkpoint raises becomes the user's error."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{path}: not a whole checkpoint of this version ({type(e).__name__}); "
                        f"make one with: python {MAKER[kind]}") from e


def load(path):
    """What `save` wrote, onto the CPU; no code in it is run. Raises nearly anything if it is damaged."""
    if zipfile.ZipFile(path).testzip():                               # torch does not look at the checksums
        raise OSError("damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_checkpoint(path, kind):
    """Read a checkpoint of `kind` ("sat" or "aar") onto the CPU. Raises UserError if it is none."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such checkpoint; make one with: python {MAKER[kind]} --out {path}")
    with reading(path, kind):
        state = load(path)
        seen, version = dict(state)["kind"], state["version"]
        if seen != kind:
            raise UserError(f"{path}: a checkpoint of {MAKER[seen]}, wanted one of {MAKER[kind]}: are the two swapped?")
        if version != VERSION:
            raise UserError(f"{path}: of version {version}, wanted {VERSION}; make one with: python {MAKER[kind]}")
    return state


def begin(args, kind, config, plan, parts, **run):
    """Start at step 0, or with --resume put everything that training changes back to where the checkpoint left it.

    `run`: what else must be the same as then. Returns (step, history). Raises UserError if that would overwrite a
    checkpoint or go on with other settings.
    """
    path = Path(args.out)
    tmp = Path(os.path.realpath(path) + ".tmp")
    if os.path.isdir(path):
        raise UserError(f"--out {path}: a folder; give a file in it, such as {path / kind}.pt")
    if path.name.endswith((".wav", ".html", ".training.pt", ".validation.pt", ".lock", ".tmp")):
        raise UserError(f"--out {path}: files of such names are written beside a checkpoint; name it {kind}.pt, say")
    for old in () if args.resume else (path, path.with_suffix(".wav"), path.with_suffix(".html")):
        if os.path.exists(old):
            raise UserError(f"{old} exists: add --resume to go on with {path}, or give another --out")
    # Old and new checkpoint lie side by side for a moment, each with weights and at most two averages of their gradients.
    size = 6 * sum(t.nbytes for part in parts.values() if isinstance(part, nn.Module) for t in part.state_dict().values())
    try:
        tmp.touch()
        tmp.unlink(missing_ok=True)                                   # another process may have done so
        free = shutil.disk_usage(tmp.parent).free
    except OSError as e:
        raise UserError(f"--out {path}: cannot write into {tmp.parent} ({e.strerror})")
    if free < size:
        raise UserError(f"--out {path}: needs {size >> 20} MB, but only {free >> 20} MB are free in {tmp.parent}")
    if not args.resume:
        return 0, []
    state = load_checkpoint(path, kind)
    with reading(path, kind):
        now, then = asdict(config) | asdict(plan) | run, state["config"] | state["plan"] | state
        differs = [f"{k} {then.get(k)} -> {v}" for k, v in now.items() if then.get(k) != v]
        if differs:
            raise UserError(f"{path} was made with other settings ({'; '.join(differs)}): resume with the same ones")
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
        torch.set_rng_state(state["rng"]["cpu"])
        if "cuda" in state["rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["rng"]["cuda"])
    if state["step"] == plan.steps:
        print(f"{path} is finished: all of its {plan.steps} steps are done")
    return state["step"], state["history"]


@contextlib.contextmanager
def alone(out):
    """Inside, no other run on this machine writes the checkpoint `out`. Raises UserError if one does already."""
    lock, file = os.path.realpath(out) + ".lock", None
    if rank() == 0:
        try:
            import fcntl                                              # Windows has none: there nobody is kept out
            file = open(lock, "w")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)          # ends with the process, however that ends
        except BlockingIOError:
            raise UserError(f"--out {out}: another run is writing it; wait for its end, or give another --out")
        except (ImportError, OSError):                                # a file system without locks; `begin` sees the rest
            pass
    try:
        yield
    finally:
        if file:
            with contextlib.suppress(OSError):
                os.unlink(lock)
            file.close()


def load_sat(path, device="cpu"):
    """Checkpoint of stage 1 -> the tokenizer, frozen."""
    state = load_checkpoint(path, "sat")
    with reading(path, "sat"):
        sat = SAT(SATConfig(**state["config"]))
        sat.load_state_dict(state["parts"]["sat"])
    return sat.to(device).eval().requires_grad_(False)


def load_aar(path, sat, device="cpu"):
    """Checkpoint of stage 2 -> (generator, name and fingerprint of its embedder). Raises UserError if its tokenizer is
    another one."""
    state = load_checkpoint(path, "aar")
    with reading(path, "aar"):
        if state["sat"] != fingerprint(sat):
            raise UserError(f"{path} was trained on the tokenizer {state['sat']}, not on this one, {fingerprint(sat)}: "
                            "give the --sat that it was trained with")
        aar, embedder, clap = AAR(AARConfig(**state["config"])), state["embedder"], state["clap"]
        aar.load_state_dict(state["parts"]["aar"])
    return aar.to(device).eval().requires_grad_(False), embedder, clap


def fingerprint(model):
    """A short name of a model's weights: equal weights, equal name."""
    digest = hashlib.sha1()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def pick_device(name=None):
    """The device called `name`, or the best there is: cuda, else mps, else cpu. Raises UserError if it is not there."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name and name.partition(":")[0] not in ("cuda", "mps", "cpu"):
        raise UserError(f"--device {name}: choose one of cuda, mps, cpu; the best here is {best}")
    try:
        device = torch.device(name or best)
        if device.type == "cuda" and dist.is_initialized():           # each process of torchrun has a GPU of its own
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
        return device
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name} is not available here ({str(e).partition('. ')[0].strip()}); "
                        f"the best here is {best}")


def check_seed(seed):
    if not 0 <= seed < 2 ** 63:
        raise UserError(f"--seed must be at least 0 and below 2^63, got {seed}")


def check_drawing(V, cfg, top_k, top_p):
    if not (0 <= cfg <= 100 and 0 <= top_k <= V and 0 < top_p <= 1):
        raise UserError(f"--cfg must be 0 to 100, --top-k 0 to {V} (the number of codes), --top-p above 0 and at most 1; "
                        f"got {cfg:g}, {top_k}, {top_p:g}")


def plan_from(plan: TrainConfig, args):
    """The preset's plan with what the command line changed."""
    given = {name: value for name in ("steps", "batch", "lr", "adversarial_at")
             if (value := getattr(args, name, None)) is not None}
    limits = {"steps": 2 ** 31, "batch": 2 ** 15, "lr": 100.0, "adversarial_at": 1.0}
    for name, value in given.items():
        if not 0 < value <= limits[name]:
            raise UserError(f"--{name.replace('_', '-')} must be above 0 and at most {limits[name]}, got {value}")
    check_seed(args.seed)
    plan, n = replace(plan, **given), world()
    if args.accumulate < 1 or plan.batch % (n * args.accumulate):
        raise UserError(f"--batch {plan.batch} cannot be split into {args.accumulate} equal parts (--accumulate) "
                        f"for each of {n} processes")
    return plan


def learning_rate(step, plan: TrainConfig):
    """Linear warm-up, then a cosine down to 1% at the last step."""
    warm_up = round(plan.warm_up * plan.steps)
    if step < warm_up:
        return plan.lr * (step + 1) / warm_up
    u = (step - warm_up) / max(1, plan.steps - warm_up)
    return plan.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(u, 1.0))))


def orthogonal(G):
    """Newton-Schulz: matrices G = U S V^T (M, m, n) -> about U V^T, all singular values about 0.7 to 1.2, in Muon's five rounds.

    A round is X <- P X with P = 3.4445 I - 4.7750 A + 2.0315 A^2 and A = X X^T, whereupon A becomes P A P. So the rounds need only
    the small squares A, and the product Q of all P meets the long X once. That is cheap enough for float32, where
    torch.optim.Muon takes bfloat16 and is wrong by 10 to 20%.
    """
    def polynomial(A):
        P = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)
        P.diagonal(dim1=-2, dim2=-1).add_(3.4445)
        return P
    X = G.mT if G.shape[-2] > G.shape[-1] else G                                 # wide
    A = X @ X.mT
    size = A.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=1e-14)[..., None, None]    # squared Frobenius norm
    A = A / size
    P = Q = polynomial(A)
    for _ in range(4):
        A = P @ A @ P
        P = polynomial(A)
        Q = P @ Q
    X = (Q * size.rsqrt()) @ X
    return X.mT if X.shape != G.shape else X


class Muon(torch.optim.Muon):
    """Muon (Jordan et al. 2024) for weights of any shape, each taken as a matrix (rows, the rest) or, with `rows`, as
    matrices of so many rows one below the other.

    It makes all singular values of an update equal, so that directions of small gradients learn as fast as others. The update of a
    matrix has the size that AdamW's would have: both can share one learning rate.
    """

    def __init__(self, weights, lr, rows=None):
        self.weights, self.rows = list(weights), rows
        matrices = [nn.Parameter(w.detach().flatten(1)) for w in self.weights]      # the same memory
        super().__init__(matrices, lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self):
        """What torch's does, with `orthogonal` in place of its own."""
        group = self.param_groups[0]
        for w, matrix in zip(self.weights, group["params"]):
            if w.grad is not None:
                grad, state = w.grad.flatten(1), self.state[matrix]
                if "momentum_buffer" not in state:                   # torch's name
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
                update = grad.lerp(state["momentum_buffer"], group["momentum"])                                # Nesterov's
                update = update.unflatten(0, (-1, self.rows or len(matrix)))                                   # (blocks, rows, n)
                matrix.add_(orthogonal(update).flatten(0, 1), alpha=-0.2 * group["lr"] * max(update.shape[1:]) ** 0.5)


def rank():
    """The number of this process: 0 unless torchrun started several."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(x):
    """This process's equal part of a sequence that all processes have, the first process's first."""
    n = len(x) // world()
    return x[rank() * n:(rank() + 1) * n]


def gather(x):
    """The tensors x of all processes one after the other, which undoes `shard`."""
    if world() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def average(tensors):
    """Each tensor becomes its mean over the processes."""
    if world() > 1:
        for work in [dist.all_reduce(x, async_op=True) for x in tensors]:
            work.wait()
        for x in tensors:
            x /= world()


def clip_gradients(model):
    """Make the gradients those of the whole batch, of all processes, and at most 1 long; returns how long they were."""
    average([p.grad for p in model.parameters() if p.grad is not None])
    return nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def progress(steps, **more):
    """A progress bar over `steps`, in the first process."""
    return tqdm(steps, disable=rank() > 0, dynamic_ncols=True, **more)


def batches(data, batch, places):
    """Batches (wav (B, 1, N), names) of data[i] for i in `places`, decoded ahead in other processes."""
    workers = min(4, max(1, (os.cpu_count() or 1) // 2 // world()))
    return iter(torch.utils.data.DataLoader(data, batch, sampler=places, num_workers=workers, prefetch_factor=4,
                                            pin_memory=torch.cuda.is_available(),
                                            generator=torch.Generator()))    # so that it draws no number from ours


class Stopped(UserError):
    """The user asked for it, and nothing is lost."""


class Stop:
    """Ctrl-C asks for a stop after the step at hand; a second one stops at once."""

    def __init__(self):
        self.here = False
        self.before = signal.signal(signal.SIGINT, self)

    def __call__(self, *_):
        signal.signal(signal.SIGINT, self.before)
        self.here = True

    @property
    def asked(self):
        """The same answer in all processes, since a step takes all of them."""
        return gather(torch.tensor([int(self.here)])).any()


def check_finite(step, name, value, where="on held-back clips"):
    """Raises UserError if a number, or one of a list or tensor, is not finite."""
    value = torch.as_tensor(value, dtype=torch.float32)
    if not value.isfinite().all():
        raise UserError(f"step {step}: {name} is {value[~value.isfinite()][0]:g} {where}; the last checkpoint, if there is one, "
                        "is kept; start another run with a smaller --lr")


class Log:
    """Means of the loss parts between two lines of the log. Reads the device every ten steps only."""

    def __init__(self, bar, history):
        self.bar, self.history, self.pending = bar, history, []
        self.clear()

    def clear(self):
        self.sums, self.steps, self.waited, self.since = {}, 0, 0.0, time.perf_counter()
        self.until = self.since                                       # end of the last step: validation does not count

    def wait(self, loader):
        since = time.perf_counter()
        batch = next(loader)
        self.waited += time.perf_counter() - since
        return batch

    def add(self, step, names, **losses):
        self.pending.append((step, names, losses))
        self.until = time.perf_counter()
        if len(self.pending) == 10:
            self.flush()

    def flush(self):
        """Raises UserError at the first loss that is not finite."""
        for step, names, losses in self.pending:
            self.steps += 1
            values = torch.stack(list(losses.values()))
            average([values])
            for part, value in zip(losses, values.tolist()):
                if not math.isfinite(value):                          # only now: stage 2 must look its names up
                    check_finite(step, f"loss part {part!r}", value, f"on {', '.join(names)}")
                self.sums[part] = self.sums.get(part, 0.0) + value
            self.bar.set_postfix({part: f"{value:.3f}" for part, value in zip(losses, values.tolist())}, refresh=False)
        self.pending.clear()

    def write(self, step, sounds=None, **more):
        """Print one line and remember it, with the sounds (n, 1, N) that were made now; of the earlier ones only the first
        and the last are kept."""
        self.flush()
        n, seconds = max(1, self.steps), self.until - self.since
        row = {"step": step} | {part: value / n for part, value in self.sums.items()} | more
        row |= {"s_per_step": seconds / n, "waited": self.waited / seconds}
        self.history.append(row)

        def short(x):
            return " ".join(map(short, x)) if isinstance(x, list) else f"{x:.2f}" if isinstance(x, float) else str(x)
        self.bar.write("  ".join(f"{name} {short(value)}" for name, value in row.items()))
        if sounds is not None:
            for old in [old for old in self.history[:-1] if "sounds" in old][1:-1]:
                del old["sounds"]
            row["sounds"] = (32767 * sounds.cpu().clamp(-1, 1)).short()
        self.clear()


def command_line(main):
    """Run a script's main(); what the user can mend ends in one line and exit code 2, without a traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")                 # a file's name may be no text
    if dist.is_torchelastic_launched():
        dist.init_process_group()
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")
    try:
        main()
        sys.stdout.flush()                                            # while a reader that has gone can still be told
        if dist.is_initialized():                                     # else its threads may abort the exit
            dist.destroy_process_group()
        return
    except Stopped as e:
        print(e)
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as e:                                            # one from a worker brings the worker's traceback along
        message = str(e).rpartition("UserError: ")[2].strip()
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not re.search(r"out of memory|allocate memory|shared memory|worker \(pid", str(e)):
            raise
        message = "not enough memory: give a smaller --batch, a smaller --preset or shorter files"
    except OSError as e:                                              # a full disk, say, or nobody who reads what is printed
        sys.stdout, message = open(os.devnull, "w"), str(e)
    print("error:", re.sub(r"\s*\n\s*", " ", message), file=sys.stderr)      # a file's name may have several lines
    sys.exit(2)
