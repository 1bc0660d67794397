"""Efficient Autoregressive Audio Modeling via Next-Scale Prediction (Qiu et al., arXiv 2408.09027) in one file.

1. SAT, the tokenizer, turns 1 s of 24 kHz sound into T = 75 latent frames and quantizes the residual at K = 16 growing
   resolutions, 1, 2, 4, ... 75: 455 tokens from coarse to fine, where residual VQ needs 10 x 75 = 750.
2. AAR, the generator, is a transformer that predicts ALL tokens of one scale at once, given all coarser scales:
   p(r_1 .. r_K) = prod_k p(r_k | r_<k, condition). That takes 16 steps; next-token prediction takes one per token.
3. It trains in one pass under a block-wise causal mask: a token of scale k sees every input of scales <= k. The input
   of scale 1 is the start token; that of scale k is made of the tokens of the scales BEFORE it.
4. The condition is an embedding of a reference sound (CLAP). It is the start token and it drives the AdaLN of every
   layer. It is dropped for 10% of the clips, so that classifier-free guidance (CFG) works.
5. Two stages: train_sat.py trains SAT (reconstruction, then discriminators); train_aar.py trains AAR on its tokens.

One step serves encoding, decoding, teacher forcing and generation:

    f_hat = 0
    for each scale k:
        r_k    = nearest code of down(f - f_hat, s_k)        only when encoding (Alg. 1)
        f_hat += phi_k(up(codebook_k[r_k], T))               always (Alg. 2): this line is `MSRQ.add`
        next   = down(f_hat, s_{k+1})                        what the transformer reads for scale k+1

Shapes, everywhere:  B batch   N samples   T latent frames   K scales   s_k tokens of scale k   L tokens of all scales
                     D latent channels     V codes per codebook         C transformer width     H heads
In code k counts from 0. README.md lists what differs from the authors' published code.
"""
import functools
import hashlib
import math
import os
import re
import sys
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import soundfile
import soxr
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm


# --- Configuration (Sec. 4 of the paper and the released configuration files) ---------------------------------------
@dataclass(frozen=True)
class SATConfig:
    """The tokenizer: a window of `seconds` at `sample_rate` Hz, quantized at `n_scales` scales of V codes each."""
    sample_rate: int = 24000
    seconds: float = 1.0
    strides: tuple = (2, 4, 5, 8)       # hop = their product = 320 samples: 75 frames per second
    width: int = 32                     # channels after the first convolution; doubled at every stride
    lstm: int = 2                       # LSTM layers in the middle of encoder and decoder
    latent: int = 64                    # D
    V: int = 1024
    schedule: str = "quadratic"         # see scale_schedule
    n_scales: int = 16                  # K
    phis: int = 6                       # convolutions phi, shared by the K scales; 0: none
    disc_width: int = 32                # channels of the discriminators

    hop = property(lambda self: math.prod(self.strides))
    frames = property(lambda self: math.ceil(round(self.seconds * self.sample_rate) / self.hop))       # T
    samples = property(lambda self: self.frames * self.hop)                                             # N
    scales = property(lambda self: scale_schedule(self.schedule, self.frames, self.n_scales))           # s_1 .. s_K


@dataclass(frozen=True)
class AARConfig:
    """The generator. Its size follows from the depth d: width C = 64 d, H = d heads (the paper: d = 16)."""
    scales: tuple = (1, 2, 4, 6, 9, 12, 16, 20, 25, 31, 37, 43, 50, 58, 66, 75)     # of the tokenizer
    latent: int = 64                    # D of the tokenizer
    V: int = 1024
    depth: int = 16
    cond_dim: int = 512                 # length of the condition vector
    cond_drop: float = 0.1              # fraction of clips whose condition is hidden in training, for guidance
    next_token: bool = False            # the baseline of Fig. 3: one token per step over the flattened tokens


@dataclass(frozen=True)
class TrainConfig:
    """Training plan; `*_at` and `warm_up` are fractions of `steps`."""
    steps: int
    batch: int
    lr: float                           # at the peak
    warm_up: float = 0.05               # the learning rate grows during this fraction
    quantize_at: float = 0.1            # stage 1: a plain autoencoder until here, then the codebooks start
    adversarial_at: float = 0.1         # stage 1: the discriminators join here
    crops: int = 6000                   # stage 2: windows tokenized before training (at most 20 per second of sound)


Preset = namedtuple("Preset", "sat aar plan_sat plan_aar")             # sizes and plans of both stages
PRESETS = {                             # for a CPU; for ten minutes of a GPU; the paper's sizes
    "tiny": Preset(SATConfig(width=12, lstm=0, latent=32, V=256, disc_width=4), AARConfig(latent=32, V=256, depth=3),
                   TrainConfig(steps=3000, batch=12, lr=3e-3, adversarial_at=0.9),
                   TrainConfig(steps=2100, batch=8, lr=6e-3, crops=8000)),
    "base": Preset(SATConfig(lstm=0, disc_width=8), AARConfig(depth=8),
                   TrainConfig(steps=20_000, batch=32, lr=2e-3, adversarial_at=0.75),
                   TrainConfig(steps=2500, batch=64, lr=2e-3, crops=40_000)),
    "paper": Preset(SATConfig(), AARConfig(),
                    TrainConfig(steps=400_000, batch=32, lr=3e-4, warm_up=0.01, quantize_at=0.01),
                    TrainConfig(steps=400_000, batch=64, lr=1e-4, warm_up=0.01, crops=4_000_000)),
}


# --- Scales (Fig. 5) ------------------------------------------------------------------------------------------------
def scale_schedule(kind: str, frames: int, n: int) -> tuple[int, ...]:
    """The number of tokens s_1 .. s_n of each scale; it ends in `frames` and never decreases (Fig. 5).

    The square root of s_k grows evenly (quadratic), or s_k itself (linear), or its logarithm (log); flat is `frames` at
    every scale: residual VQ. Raises KeyError for another kind, ValueError for more scales than frames (but if flat).
    """
    if n < 1 or frames < 1 or (n > frames and kind != "flat"):
        raise ValueError(f"{n} scales do not fit {frames} latent frames: ask for 1 to {frames} scales")
    u = np.linspace(0, 1, n) if n > 1 else np.ones(1)
    s = {"quadratic": (1 + u * (math.sqrt(frames) - 1)) ** 2, "linear": 1 + u * (frames - 1),
         "log": frames ** u, "flat": np.full(n, frames)}[kind]
    return tuple(int(s_k) for s_k in np.floor(s + 1e-6))               # 74.9999999 means 75


@functools.cache
@torch.inference_mode(False)            # what is cached must serve a later backward, too
def resampling(n, m, mode, device):
    """The matrix (n, m) that resamples n frames to m in `mode`: row i is what the unit vector e_i becomes."""
    return F.interpolate(torch.eye(n, device="cpu")[None], size=m, mode=mode)[0].to(device)


def down(f, s):
    """(B, D, T) -> (B, D, s): each token averages the frames it covers; neighbours may overlap by one."""
    return f @ resampling(f.shape[-1], s, "area", f.device)


def up(z, T):
    """(B, D, s) -> (B, D, T): linear interpolation between neighbouring tokens."""
    return z @ resampling(z.shape[-1], T, "linear", z.device)


# --- Quantizer: multi-scale residual quantization, MSRQ (Alg. 1 and Alg. 2) -----------------------------------------
class Codebook(nn.Module):
    """V codes of D numbers, each the moving average of the vectors nearest to it."""

    def __init__(self, V, D):
        super().__init__()
        self.register_buffer("codes", torch.randn(V, D))
        self.register_buffer("usage", torch.full((V,), 1 / V))       # moving average: fraction of vectors that chose it
        self.register_buffer("sum", self.codes / V)                  # code * usage: codes = sum / usage

    def nearest(self, z):
        """Vectors (..., D) -> tokens (...): argmin_v |z - code_v|^2, without |z|^2, which is the same for all v."""
        return (self.codes.square().sum(1) - 2 * z @ self.codes.T).argmin(-1)

    @torch.no_grad()
    def update(self, z, r, decay=0.99):
        """Move the codes towards the vectors z (M, D) that chose them, r (M,), and restart dead codes.

        A code is dead if its usage is below 1% of uniform use. It restarts on a random vector; `usage` and `sum`
        restart too, or the next update would pull the code back.
        """
        V, M = len(self.codes), len(z)
        chose = (r[:, None] == torch.arange(V, device=r.device)).to(z.dtype)         # (M, V), one-hot
        self.usage.lerp_(chose.mean(0), 1 - decay)
        self.sum.lerp_(chose.T @ z / M, 1 - decay)
        dead = self.usage < 0.01 / V
        restart = z[torch.randint(M, (V,), device=z.device)]
        self.sum.copy_(torch.where(dead[:, None], restart / V, self.sum))
        self.usage.masked_fill_(dead, 1 / V)
        self.codes.copy_(self.sum / self.usage[:, None])

    def kmeans(self, z, rounds=10):
        """Start on the vectors z (M, D): Lloyd's k-means is the moving average without memory."""
        self.codes.copy_(z[torch.randint(len(z), (len(self.codes),), device=z.device)])
        for _ in range(rounds):
            self.update(z, self.nearest(z), decay=0.0)


class MSRQ(nn.Module):
    """Multi-scale residual quantizer. With equal scales and no phi it is plain residual VQ."""

    def __init__(self, config: SATConfig):
        super().__init__()
        self.scales = config.scales
        self.codebooks = nn.ModuleList(Codebook(config.V, config.latent) for _ in self.scales)
        self.phis = nn.ModuleList(nn.Conv1d(config.latent, config.latent, 9, padding=4) for _ in range(config.phis))
        for phi in self.phis:
            nn.init.dirac_(phi.weight)                               # start as the identity

    def phi(self, k, h):
        """A convolution refines what `up` interpolated, mixed half and half with it. Neighbouring scales share one."""
        n, K = len(self.phis), len(self.scales)
        if n == 0:
            return h
        ticks = np.linspace(0.5 / n, 1 - 0.5 / n, n)                 # phi i is at ticks[i], scale k at k / (K - 1)
        return 0.5 * h + 0.5 * self.phis[np.abs(ticks - k / max(K - 1, 1)).argmin()](h)

    def add(self, f_hat, k, r_k):
        """The step of Alg. 1 and Alg. 2: f_hat (B, D, T) plus what the tokens r_k (B, s_k) of scale k stand for."""
        code = self.codebooks[k].codes[r_k].mT                       # (B, D, s_k)
        return f_hat + self.phi(k, up(code, f_hat.shape[-1]))

    def quantize(self, f, kmeans=False):
        """Alg. 1: f (B, D, T) -> lists over k: tokens (B, s_k), f_hat (B, D, T), residuals at scale k (B, s_k, D)."""
        f_hat, steps = torch.zeros_like(f), []
        for k, s in enumerate(self.scales):
            z = down((f - f_hat).detach(), s).mT                     # (B, s_k, D)
            if kmeans:                                               # each codebook first starts on its vectors
                self.codebooks[k].kmeans(z.flatten(0, 1))
            r_k = self.codebooks[k].nearest(z)
            f_hat = self.add(f_hat, k, r_k)
            steps.append((r_k, f_hat, z))
        return [list(column) for column in zip(*steps)]

    def forward(self, f):
        """Latents f (B, D, T) -> quantized latents (B, D, T), tokens, loss; in training the codebooks learn."""
        with autocast(f.device, torch.float32):                      # no bfloat16 where codes are chosen; see below
            f = f.float()
            tokens, f_hats, residuals = self.quantize(f)
            # Same value, different gradients: the commitment loss trains the encoder, the second one the phis.
            losses = [F.mse_loss(f, f_hat.detach()) + F.mse_loss(f_hat, f.detach()) for f_hat in f_hats]
            if self.training:                                        # no code moves before all scales have chosen
                for codebook, z, r_k in zip(self.codebooks, residuals, tokens):
                    codebook.update(z.flatten(0, 1), r_k.flatten())
        # Straight-through, ONCE around the whole of MSRQ: the value is f_hat_K, the gradient passes to f unchanged.
        return f + (f_hats[-1] - f).detach(), tokens, sum(losses) / len(losses)

    def decode(self, tokens, T):
        """Alg. 2: tokens of the first n scales -> [f_hat_1 .. f_hat_n], each (B, D, T)."""
        codes = self.codebooks[0].codes
        f_hats = [codes.new_zeros(len(tokens[0]), codes.shape[1], T)]
        for k, r_k in enumerate(tokens):
            f_hats.append(self.add(f_hats[-1], k, r_k))
        return f_hats[1:]


# --- Codec: SEANet encoder and decoder as in EnCodec (Fig. 2 left) --------------------------------------------------
def conv(c_in, c_out, kernel, stride=1, transposed=False, gain=1.0):
    """Weight-normalized convolution (B, c_in, N) -> (B, c_out, N / stride), or N * stride if transposed."""
    padding = (kernel - stride + 1) // 2                             # per side, rounded up: strides skip an extra one
    if transposed:
        module = nn.ConvTranspose1d(c_in, c_out, kernel, stride, padding, output_padding=(kernel - stride) % 2)
    else:
        module = nn.Conv1d(c_in, c_out, kernel, stride, padding, padding_mode="reflect" if padding else "zeros")
    fan_in = c_in * kernel / (stride if transposed else 1)           # only kernel / stride taps meet at one output
    # PyTorch's default lets the signal shrink until sounds look alike to the quantizer; variance 1 / fan_in keeps it.
    nn.init.normal_(module.weight, std=gain / math.sqrt(fan_in))
    return weight_norm(module)


class Residual(nn.Module):
    """SEANet's residual unit: a bottleneck beside a 1x1 convolution. (B, c, N) -> (B, c, N)."""

    def __init__(self, c):
        super().__init__()
        self.block = nn.Sequential(nn.ELU(), conv(c, c // 2, 3), nn.ELU(), conv(c // 2, c, 1))
        self.skip = conv(c, c, 1)

    def forward(self, x):
        return self.skip(x) + self.block(x)


class LSTM(nn.Module):
    """LSTM over time, added to its input. (B, c, T) -> (B, c, T)."""

    def __init__(self, c, layers):
        super().__init__()
        self.lstm = nn.LSTM(c, c, layers, batch_first=True)

    def forward(self, x):
        return x + self.lstm(x.mT)[0].mT


class Encoder(nn.Sequential):
    """Waveform (B, 1, T * hop) -> latents (B, D, T)."""

    def __init__(self, config: SATConfig):
        c = config.width
        layers = [conv(1, c, 7, gain=8)]                             # sounds have RMS 1/8; ELU bends near 1
        for r in config.strides:
            layers += [Residual(c), nn.ELU(), conv(c, 2 * c, 2 * r, stride=r)]
            c *= 2
        layers += [LSTM(c, config.lstm)] if config.lstm else []
        super().__init__(*layers, nn.ELU(), conv(c, config.latent, 7))


class Decoder(nn.Sequential):
    """Latents (B, D, T) -> waveform (B, 1, T * hop): the encoder's mirror image."""

    def __init__(self, config: SATConfig):
        c = config.width * 2 ** len(config.strides)
        layers = [conv(config.latent, c, 7)]
        layers += [LSTM(c, config.lstm)] if config.lstm else []
        for r in reversed(config.strides):
            layers += [nn.ELU(), conv(c, c // 2, 2 * r, stride=r, transposed=True), Residual(c // 2)]
            c //= 2
        super().__init__(*layers, nn.ELU(), conv(c, 1, 7, gain=1 / 8))


class SAT(nn.Module):
    """Scale-level audio tokenizer: encoder, MSRQ, decoder."""

    def __init__(self, config: SATConfig):
        super().__init__()
        self.config = config
        self.encoder, self.quantizer, self.decoder = Encoder(config), MSRQ(config), Decoder(config)
        for name, p in self.named_parameters():
            if "bias" in name:                                       # fixed at 0: 0.4 dB less log-mel error;
                nn.init.zeros_(p).requires_grad_(False)              # the authors' weights bring their own

    def latents(self, wav):
        """Waveform (B, 1, N) -> latents (B, D, T); zeros fill up the last frame; T >= 4, as the padding reflects 3."""
        N, hop = wav.shape[-1], self.config.hop
        return self.encoder(F.pad(wav, (0, max(-N % hop, 4 * hop - N))))

    @torch.no_grad()
    def encode(self, wav):
        """One window (B, 1, N), N = config.samples -> list of K tensors of tokens (B, s_k), int64 (Alg. 1)."""
        return self.quantizer.quantize(self.latents(wav).float())[0]

    @torch.no_grad()
    def decode(self, tokens):
        """Tokens of all or only the first n scales -> waveform (B, 1, N) of one window (Alg. 2)."""
        return self.decoder(self.quantizer.decode(tokens, self.config.frames)[-1]).float()

    def forward(self, wav):
        """Waveform (B, 1, N) -> (reconstruction (B, 1, N), tokens, loss of the quantizer)."""
        f_hat, tokens, vq_loss = self.quantizer(self.latents(wav))
        return self.decoder(f_hat)[..., :wav.shape[-1]].float(), tokens, vq_loss

    @torch.no_grad()
    def teacher_inputs(self, tokens, next_token=False):
        """Tokens -> inputs of scales 2..K (B, L - s_1, D); next_token: each predecessor's code (B, L - 1, D)."""
        if next_token:
            return torch.cat([book.codes[r_k] for book, r_k in zip(self.quantizer.codebooks, tokens)], 1)[:, :-1]
        f_hats = self.quantizer.decode(tokens, self.config.frames)
        inputs = [down(f_hat, s).mT for f_hat, s in zip(f_hats, self.config.scales[1:])]     # scale k + 1 reads f_hat_k
        return torch.cat([f_hats[0].mT[:, :0], *inputs], 1)          # (B, 0, D) first: a single scale has no inputs


# --- Discriminators and the losses of stage 1 -----------------------------------------------------------------------
class Discriminator(nn.Module):
    """Judges a 2-D view of the sound. (B, 1, N) -> the output of each convolution; the last one holds the logits."""

    def __init__(self, view, convs):
        super().__init__()
        self.view, self.convs = view, nn.ModuleList(convs)
        for layer in self.convs:
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, wav):
        maps = [self.convs[0](self.view(wav))]
        for layer in self.convs[1:]:
            maps.append(layer(F.leaky_relu(maps[-1], 0.2)))
        return maps


def spectrogram(wav, window):
    """(B, 1, N) -> (B, 2, window / 2 + 1, frames): real and imaginary part of the STFT; `window` in samples."""
    hann = torch.hann_window(window, device=wav.device)
    X = torch.stft(wav.squeeze(1).float(), window, window // 4, window=hann, normalized=True, return_complex=True)
    return torch.stack([X.real, X.imag], 1)


def columns(wav, p):
    """(B, 1, N) -> (B, 1, N / p, p): every p-th sample is in one column (HiFi-GAN)."""
    return F.pad(wav, (0, -wav.shape[-1] % p)).unflatten(-1, (-1, p))


class Discriminators(nn.ModuleList):
    """Multi-scale STFT and multi-period discriminators of width c. (B, 1, N) -> a list of feature maps for each."""

    def __init__(self, c):
        super().__init__()
        for window in (2048, 1024, 512, 256, 128):
            self.append(Discriminator(functools.partial(spectrogram, window=window), [
                nn.Conv2d(2, c, (9, 3), padding=(4, 1)),
                *(nn.Conv2d(c, c, (9, 3), stride=(2, 1), dilation=(1, d), padding=(4, d)) for d in (1, 2, 4)),
                nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, 1, 3, padding=1)]))
        for p in (2, 3, 5, 7, 11):
            self.append(Discriminator(functools.partial(columns, p=p), [
                *(nn.Conv2d(a, b, (5, 1), stride=(3, 1), padding=(2, 0))
                  for a, b in ((1, c), (c, 2 * c), (2 * c, 4 * c), (4 * c, 8 * c))),
                nn.Conv2d(8 * c, 8 * c, (5, 1), padding=(2, 0)),
                nn.Conv2d(8 * c, 1, (3, 1), padding=(1, 0))]))

    def forward(self, wav):
        return [d(wav) for d in self]


def discriminator_loss(real, fake):
    """Hinge loss of the discriminators, mean over them; `real` and `fake` are what Discriminators returns."""
    pairs = [(r[-1].float(), f[-1].float()) for r, f in zip(real, fake)]
    return sum(F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in pairs) / len(pairs)


def adversarial_loss(fake):
    """Hinge loss of the generator, mean over the discriminators."""
    return sum(F.relu(1 - f[-1].float()).mean() for f in fake) / len(fake)


def feature_loss(real, fake):
    """Mean |real - fake| / mean |real|, averaged over all layers but the logits; only fake gets gradients."""
    pairs = [(r.detach().float(), f.float()) for rs, fs in zip(real, fake) for r, f in zip(rs[:-1], fs[:-1])]
    return sum((r - f).abs().mean() / r.abs().mean().clamp(min=1e-5) for r, f in pairs) / len(pairs)


class Mel(nn.Module):
    """Mel spectrogram, (B, 1, N) -> (B, n_mels, frames): sums of STFT magnitudes, 1 where a full-scale sine peaks."""

    def __init__(self, sample_rate, window, n_mels):
        super().__init__()
        from librosa.filters import mel                              # here, since librosa takes a second to import
        self.window = window
        filters = torch.from_numpy(mel(sr=sample_rate, n_fft=window, n_mels=n_mels, norm=None))
        self.register_buffer("filters", filters, persistent=False)

    def forward(self, wav):
        with autocast(wav.device, torch.float32):
            hann = torch.hann_window(self.window, device=wav.device)
            X = torch.stft(wav.squeeze(1).float(), self.window, self.window // 4, window=hann, pad_mode="constant",
                           return_complex=True)
            return self.filters @ X.abs() / (self.window / 4)

    def dB(self, wav):
        """The same in dB, floor -80."""
        return 20 * self(wav).clamp(min=1e-4).log10()


class MelLoss(nn.Module):
    """L1 + L2 distance of log10 mel spectrograms, floor -80 dB, summed over windows of 2^5 .. 2^11 samples."""

    def __init__(self, sample_rate):
        super().__init__()
        self.mels = nn.ModuleList(Mel(sample_rate, 2 ** i, 5 * 2 ** i // 32) for i in range(5, 12))

    def forward(self, x, y):
        pairs = [((mel(x) + 1e-4).log10(), (mel(y) + 1e-4).log10()) for mel in self.mels]   # 1e-4: no steep gradients
        return sum(F.l1_loss(a, b) + F.mse_loss(a, b) for a, b in pairs)


def wave_loss(x, y):
    """Energy of x - y, mostly below 3 kHz (means of 4 samples at 24 kHz), divided by that of x. Not in the paper.

    Spectral losses ignore phase, and the L1 loss in time is too weak to teach it. Above 3 kHz phases cannot be guessed:
    the best guess for this loss would be silence, so noise would become too quiet. The added 1e-5 is -50 dB.
    """
    error = F.avg_pool1d(x - y, 4)
    return (error.square().mean(-1) / (x.square().mean(-1) + 1e-5)).mean()


# --- Transformer: acoustic autoregressive model, AAR (Fig. 2 right) -------------------------------------------------
class Attention(nn.Module):
    """Multi-head attention with unit-length queries and keys and a learned logit scale per head (QK-norm)."""

    def __init__(self, C, H):
        super().__init__()
        self.H = H
        self.qkv, self.proj = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(C)), nn.Parameter(torch.zeros(C))       # keys have none
        self.log_scale = nn.Parameter(torch.full((H, 1, 1), math.log(4)))     # cosines times 4 at first, at most 100

    def forward(self, x, mask=None, cache=None, at=0):
        """x (B, n, C), positions `at` to `at` + n - 1 -> (B, n, C). `cache`: keys and values, each (B, H, L, C/H)."""
        B, n, C = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).view(B, n, 3, self.H, C // self.H).permute(2, 0, 3, 1, 4)
        q, k, v = qkv                                                # each (B, H, n, C/H)
        length = qkv[:2].norm(dim=-1, keepdim=True).clamp(min=1e-12)         # of q and k at once: (2, B, H, n, 1)
        q = (q * (self.log_scale.clamp(max=math.log(100)).exp() / length[0])).to(v.dtype)
        k = (k / length[1]).to(v.dtype)                              # autocast on CUDA made both float32
        if cache is not None:
            cache[0][:, :, at:at + n], cache[1][:, :, at:at + n] = k, v
            k, v = (past[:, :, :at + n] for past in cache)           # only blocks that may be seen, so no mask
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        return self.proj(x.transpose(1, 2).reshape(B, n, C))


def modulate(x, scale, shift):
    """AdaLN: layer_norm(x) * scale + shift, both made of the condition. addcmul(a, b, c) is a + b * c, fused."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), scale)


class Layer(nn.Module):
    """Layer of the transformer. `mod` (B, 6, 1, C): gates, 1 + scales, shifts, by AAR.condition once for each clip."""

    def __init__(self, C, H):
        super().__init__()
        self.attention = Attention(C, H)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU("tanh"), nn.Linear(4 * C, C))
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(C, 6 * C))

    def forward(self, x, mod, mask=None, cache=None, at=0):
        gate1, gate2, scale1, scale2, shift1, shift2 = mod.unbind(1)
        x = torch.addcmul(x, gate1, self.attention(modulate(x, scale1, shift1), mask, cache, at))
        return torch.addcmul(x, gate2, self.mlp(modulate(x, scale2, shift2)))


def block_mask(blocks):
    """True where the query (row) may look at the key (column): at its own block and at all earlier ones, (L, L).

    Blocks of 1, 2, 3 tokens:   1 . . . . .    reads the start token                 predicts r_1
                                1 1 1 . . .    reads down(f_hat_1), two vectors      predicts r_2, two tokens at once
                                1 1 1 . . .
                                1 1 1 1 1 1    reads down(f_hat_2), three vectors    predicts r_3, three at once
                                1 1 1 1 1 1
                                1 1 1 1 1 1
    Looking at the whole own block leaks nothing: its inputs are made of the tokens of EARLIER blocks only.
    """
    block = torch.tensor([i for i, n in enumerate(blocks) for _ in range(n)])
    return block[:, None] >= block


class AAR(nn.Module):
    """Acoustic autoregressive model. It predicts blocks: a block is one scale, or, with `next_token`, one token."""

    def __init__(self, config: AARConfig):
        super().__init__()
        self.config = config
        C, H, L, K = 64 * config.depth, config.depth, sum(config.scales), len(config.scales)
        self.blocks_of = [[1] * s if config.next_token else [s] for s in config.scales]     # the blocks of each scale
        blocks = sum(self.blocks_of, [])
        self.first = blocks[0]                                       # tokens that read the start token; 1 unless flat
        self.null = nn.Parameter(torch.randn(config.cond_dim) / config.cond_dim ** 0.5)     # "no condition", learned
        self.cond = nn.Sequential(nn.Linear(config.cond_dim, C, False), nn.GELU("tanh"), nn.Linear(C, C, False))
        self.input = nn.Linear(config.latent, C)
        self.level, self.position = nn.Parameter(0.3 * torch.randn(K, C)), nn.Parameter(0.3 * torch.randn(L, C))
        self.layers = nn.ModuleList(Layer(C, H) for _ in range(config.depth))
        self.head_adaln = nn.Sequential(nn.SiLU(), nn.Linear(C, 2 * C))
        self.head = nn.Linear(C, config.V)
        level_of = torch.tensor([k for k, s in enumerate(config.scales) for _ in range(s)])  # (L,): k of each
        self.register_buffer("level_of", level_of, persistent=False)
        self.register_buffer("mask", block_mask(blocks), persistent=False)                              # (L, L)
        nn.init.normal_(self.cond[0].weight, std=0.7)                # of a unit vector: each output has std 0.7
        for linear in (self.head, self.head_adaln[1], *(layer.adaln[1] for layer in self.layers)):
            nn.init.zeros_(linear.weight)                            # the first loss is ln V
            nn.init.zeros_(linear.bias)
        for layer in self.layers:
            layer.attention.proj.weight.data /= math.sqrt(2 * config.depth)      # 2 d branches add to the stream
            layer.mlp[2].weight.data /= math.sqrt(2 * config.depth)
            layer.adaln[1].bias.data[:2 * C] = 1.0                   # gates and 1 + scale start at 1, shifts at 0

    def condition(self, cond):
        """cond (B, cond_dim) -> start token (B, 1, C), modulations of layers (B, 6, 1, C) and head (B, 2, 1, C)."""
        c = self.cond(cond)
        mods = [layer.adaln(c).view(len(c), 6, 1, -1) for layer in self.layers]
        head = self.head_adaln(c).view(len(c), 2, 1, -1)
        for scales in (*(mod[:, 2:4] for mod in mods), head[:, :1]):
            scales += 1                                              # here, not again for every block
        return c[:, None], [*mods, head]

    def logits(self, x, mods, mask=None, caches=None, at=0):
        """Inputs x (B, n, C), positions `at` to `at` + n - 1 -> logits (B, n, V): for training and generation."""
        x = x + (self.level[self.level_of[at:at + x.shape[1]]] + self.position[at:at + x.shape[1]])
        for i, layer in enumerate(self.layers):
            x = layer(x, mods[i], mask, caches and caches[i], at)
        return self.head(modulate(x, *mods[-1].unbind(1))).float()

    def forward(self, cond, teacher_inputs):
        """Condition (B, cond_dim), SAT.teacher_inputs (B, L - first, D) -> logits (B, L, V), all blocks in one pass."""
        if self.training:
            hide = torch.rand(len(cond), 1, device=cond.device) < self.config.cond_drop
            cond = torch.where(hide, self.null, cond)
        start, mods = self.condition(cond)
        x = torch.cat([start.expand(-1, self.first, -1), self.input(teacher_inputs)], 1)
        return self.logits(x, mods, self.mask)

    @torch.no_grad()
    def generate(self, cond, sat, cfg=4.0, top_k=200, top_p=0.95, generator=None, ramp=True):
        """Condition (B, cond_dim) and the tokenizer -> list of K tensors of tokens (B, s_k). Defaults: the authors'.

        Guidance: the logits are (1 + t_k) conditional - t_k unconditional. t_k grows from 0 to cfg (Fig. 4) or, without
        `ramp`, is cfg. top_k, top_p: see `draw`. It computes in the dtype of the weights: model.bfloat16() is faster.
        """
        config, B, L, dtype = self.config, len(cond), len(self.level_of), self.input.weight.dtype
        if cfg:
            cond = torch.cat([cond, self.null.expand(B, -1)])        # both halves in one batch
        start, mods = self.condition(cond.to(dtype))
        caches = [[start.new_empty(len(cond), config.depth, L, 64) for _ in range(2)] for _ in self.layers]  # C/H = 64
        f_hat = cond.new_zeros(B, config.latent, sat.config.frames, dtype=torch.float32)
        tokens, at, read = [], 0, None                               # read (B, n, D): what both halves read next
        for k in range(len(config.scales)):
            r_k = []
            for n in self.blocks_of[k]:
                x = self.input(read.to(dtype)).repeat(len(cond) // B, 1, 1) if at else start.expand(-1, n, -1)
                logits = self.logits(x, mods, caches=caches, at=at)
                if cfg:
                    t = cfg * k / max(len(config.scales) - 1, 1) if ramp else cfg
                    logits = (1 + t) * logits[:B] - t * logits[B:]
                r_k.append(draw(logits, top_k, top_p, generator))
                at += n
                if config.next_token:
                    read = sat.quantizer.codebooks[k].codes[r_k[-1]]
            tokens.append(torch.cat(r_k, 1))
            if not config.next_token and at < L:
                f_hat = sat.quantizer.add(f_hat, k, tokens[-1])
                read = down(f_hat, config.scales[k + 1]).mT
        return tokens


def draw(logits, top_k=0, top_p=1.0, generator=None):
    """Logits (B, n, V) -> tokens (B, n), from the fewest of the top_k codes (0: all) that hold top_p of their mass."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1:
        p, order = logits.softmax(-1).sort(-1, descending=True)
        drop = p.cumsum(-1) - p >= max(top_p, 1e-9)                  # those before it hold enough
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)         # back in the order of the codes
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return (logits.softmax(-1) / noise).argmax(-1)                   # samples as multinomial does, but never waits


# === Here the method ends. Below: precision, CUDA graphs, sound files, checkpoints ==================================

def autocast(device, dtype):
    """torch.autocast to bfloat16, or switched off for float32. The meta device, which has none, counts as a CPU."""
    return torch.autocast("cpu" if device.type == "meta" else device.type, torch.bfloat16, dtype == torch.bfloat16)


def fast_dtype(device, convolutions=False):
    """bfloat16 if the device multiplies faster in it, else float32. A CPU's bfloat16 convolutions can be wrong."""
    fast = (device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            or device.type == "cpu" and not convolutions and torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if fast else torch.float32


def graphed(step, generator=None):
    """`step`, a function of tensors, as a CUDA graph: one launch, not thousands. `generator`: what it draws from.

    Calls 1 to 3 run as they are, call 4 is captured; it and later ones replay, each into the same output tensors, which
    `step` must detach. Without CUDA, for shapes other than the first call's, or if the capture fails, it is `step`.
    """
    static, calls, side, graph, out = [], 0, None, None, None        # graph: False after a capture that failed

    def call(*inputs):
        nonlocal static, calls, side, graph, out
        static, device = static or [x.clone() for x in inputs], inputs[0].device
        if graph is False or device.type != "cuda" or [x.shape for x in static] != [x.shape for x in inputs]:
            return step(*inputs)
        for a, b in zip(static, inputs):
            a.copy_(b)
        calls += 1
        rng, stream = generator or torch.cuda.default_generators[device.index], torch.cuda.current_stream(device)
        with torch.cuda.device(device), torch.cuda.stream(stream):   # also restored after a failed capture
            if calls <= 3:                                           # warm-up, on the stream of the capture
                torch.cuda.synchronize()
                with torch.cuda.stream(side := side or torch.cuda.Stream()):
                    out = step(*static)
                torch.cuda.synchronize()
                return out
            if calls == 4:
                graph, state = torch.cuda.CUDAGraph(), rng.get_state()
                try:
                    getattr(graph, "register_generator_state", lambda _: None)(rng)    # some PyTorch does it itself
                    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):   # loaders go on
                        out = step(*static)
                except RuntimeError as e:
                    print(f"no CUDA graph ({e.__context__ or e!r:.100}): kernels run one by one", file=sys.stderr)
                    graph = False                                    # the generator is still in capture mode: reset it
                    rng.graphsafe_set_state(torch.Generator(device).graphsafe_get_state())
                    rng.set_state(state)
        if graph is False:
            return step(*inputs)
        graph.replay()
        return out
    return call


class UserError(ValueError):
    """Something that the user can mend: the message says, in one line, what was seen and what to do."""


def load_audio(path, sample_rate, start=0.0, seconds=None):
    """Any sound file, or `seconds` of it from `start` -> (1, N) float32 mono at `sample_rate` Hz. Raises UserError."""
    try:
        if not os.path.isfile(path):
            raise ValueError("a folder" if os.path.isdir(path) else "no such file")
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            if not 1000 <= rate <= 1_000_000:                        # a broken header: hours of sound from a few bytes
                raise ValueError(f"{rate} samples per second")
            file.seek(min(int(start * rate), file.frames))
            x = file.read(-1 if seconds is None else math.ceil(seconds * rate), dtype="float32", always_2d=True)
        if not x.size or not np.isfinite(x).all():
            raise ValueError("NaN or infinite samples" if x.size else "no samples")
        # The mean of the channels, or, where they cancel, the loudest.
        mono = x.mean(1) if x.mean(1).std() >= 0.01 * x.std(0).max() else x[:, x.std(0).argmax()]
        mono = mono if rate == sample_rate else soxr.resample(mono, rate, sample_rate)
        mono = mono[:None if seconds is None else math.ceil(seconds * sample_rate)]
        return torch.from_numpy(mono / max(1.0, np.abs(mono).max())).float()[None]
    except (OSError, RuntimeError, TypeError, ValueError, MemoryError) as e:        # RuntimeError: libsndfile's own
        raise UserError(f"{path}: not a readable sound ({' '.join(str(e).split()) or type(e).__name__})")


def save_audio(path, wav, sample_rate):
    """Write (1, N) with 16 bits per sample; the ending of the name decides the format."""
    soundfile.write(path, wav.detach().float().cpu().squeeze(0).clamp(-1, 1).numpy(), sample_rate, subtype="PCM_16")


def save(path, state):
    """torch.save, so that `path` is at any moment the old file or the new one."""
    path = os.path.realpath(path)                                    # a link stays a link
    torch.save(state, path + ".tmp")
    os.replace(path + ".tmp", path)


def load(path, kind):
    """Checkpoint of `kind`, "sat" or "aar", ours or the authors', on the CPU; runs no code in it. Raises UserError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        theirs = {"generator_state_dict": "sat", "model_state_dict": "aar"}
        seen = state.get("kind") or next((theirs[name] for name in theirs if name in state), "something else")
    except Exception as e:                                           # a damaged file can raise nearly anything
        what = "no such" if isinstance(e, FileNotFoundError) else f"{type(e).__name__}: not a whole"
        raise UserError(f"{path}: {what} checkpoint; train_{kind}.py writes one once its steps have begun")
    if seen != kind:
        raise UserError(f"{path}: a checkpoint of {seen}, wanted one of {kind}, which train_{kind}.py makes")
    return state


def fingerprint(model):
    """A short name of a model's weights: equal weights, equal name."""
    weights = b"".join(name.encode() + x.cpu().numpy().tobytes() for name, x in sorted(model.state_dict().items()))
    return hashlib.sha1(weights).hexdigest()[:12]


def load_sat(path, device="cpu"):
    """Checkpoint of stage 1, ours or the authors' -> the tokenizer. Raises UserError if the file is none."""
    state = load(path, "sat")
    tensors = state.get("generator_state_dict")
    return (published(path, tensors) if tensors else ours(path, state, SAT, SATConfig)).to(device).eval()


def load_aar(path, sat, device="cpu"):
    """Checkpoint of stage 2, ours or the authors', and its tokenizer -> the generator. Raises UserError."""
    state = load(path, "aar")
    if "model_state_dict" in state:
        model = published(path, state["model_state_dict"], sat.config)
        model.embedder = {"kind": "clap", "published": True}         # which embedder made its conditions
    else:
        model, run = ours(path, state, AAR, AARConfig), state["run"]
        model.embedder = {"kind": run["embedder"], "fingerprint": run["clap"], "toys": run["sounds"] == "toys"}
        if run["sat"] != fingerprint(sat):
            raise UserError(f"{path}: was trained on another tokenizer: give the --sat that it was trained with")
    return model.to(device).eval()


def ours(path, state, model_class, config_class):
    """A model from a checkpoint of this program. Raises UserError if it is of another version."""
    try:
        model = model_class(config_class(**state["config"]))
        model.load_state_dict(state["parts"][state["kind"]])
        if state["step"] < (steps := state["run"]["steps"]):
            print(f"warning: the training of {path} stopped after {state['step']} of {steps} steps", file=sys.stderr)
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise UserError(f"{path}: not a checkpoint of this version ({type(e).__name__}): train anew")
    return model


THEIRS = [                              # our name -> the authors' name: regular expressions, one after the other
    (r"^(encoder|decoder)", r"\1.model"), (r"skip", "shortcut"),
    (r"parametrizations\.weight\.original0", "weight_g"), (r"parametrizations\.weight\.original1", "weight_v"),
    (r"^(.*coder\.model\.\d+(\.block\.\d|\.shortcut)?)\.(weight_g|weight_v|bias)$", r"\1.conv.conv.\3"),
    (r"^(decoder\.model\.(3|6|9|12))\.conv\.conv", r"\1.convtr.convtr"),
    (r"^quantizer\.phis", "quantizer.vq.quant_resi.qresi_ls"),
    (r"^quantizer\.codebooks\.(\d+)\.codes", r"quantizer.vq.layers.\1._codebook.embed"),
    (r"^level$", "lvl_embed.weight"), (r"^position$", "pos_1LC"), (r"^null$", "uncond_embedding"),
    (r"^input", "word_embed"), (r"^cond\.0", "class_emb.fc1"), (r"^cond\.2", "class_emb.fc2"),
    (r"^layers", "blocks"), (r"mlp\.0", "ffn.fc1"), (r"mlp\.2", "ffn.fc2"),
    (r"attention\.qkv", "attn.mat_qkv"), (r"attention\.log_scale", "attn.scale_mul_1H11"), (r"attention", "attn"),
    (r"head_adaln", "head_nm.ada_lin"), (r"adaln", "ada_lin")]


def published(path, tensors, tokenizer=None):
    """The authors' tensors {name: tensor} as a SAT or, for a SATConfig `tokenizer`, as an AAR. Raises UserError."""
    theirs = {name.removeprefix("module."): x for name, x in tensors.items()}
    try:
        if tokenizer is None:
            V, D = theirs["quantizer.vq.layers.0._codebook.embed"].shape
            model = SAT(SATConfig(V=V, latent=D))
        else:
            model = AAR(AARConfig(tokenizer.scales, tokenizer.latent, tokenizer.V, len(theirs["head.weight"].T) // 64))
        state = {name: x for name, x in model.state_dict().items() if not name.endswith((".usage", ".sum"))}
        for name, own in state.items():
            x = theirs[functools.reduce(lambda text, rule: re.sub(*rule, text), THEIRS, name)]
            state[name] = x.reshape(own.shape) if x.numel() == own.numel() else x
        if tokenizer is not None:
            state["position"] = torch.cat([state["position"][:1] + theirs["pos_start"][0], state["position"][1:]])
        elif len(state["encoder.15.bias"]) != D:
            # Latents of another size than the codec's: the Linear layers fold into the convolutions beside them.
            for layer, way, rule in (("encoder.15", "in", "oc,cik->oik"), ("decoder.0", "out", "cj,ock->ojk")):
                A, a = theirs[f"quantizer.vq.project_{way}.weight"], theirs[f"quantizer.vq.project_{way}.bias"]
                g, v = (f"{layer}.parametrizations.weight.original{i}" for i in range(2))
                weight = state[v] * (state[g] / state[v].norm(dim=(1, 2), keepdim=True))
                bias = state[f"{layer}.bias"]
                state[f"{layer}.bias"] = A @ bias + a if way == "in" else bias + weight.sum(2) @ a
                state[v] = torch.einsum(rule, A, weight)
                state[g] = state[v].norm(dim=(1, 2), keepdim=True)
        sums = {name[:-5] + "sum": x / len(x) for name, x in state.items() if name.endswith(".codes")}  # uniform use
        model.load_state_dict(state | sums, strict=False)
    except KeyError as e:
        raise UserError(f"{path}: damaged or partial: the tensor {e.args[0]} is missing")
    except (RuntimeError, ValueError) as e:
        raise UserError(f"{path}: not of the released sizes, or of another --sat ({str(e).splitlines()[-1].strip()})")
    return model
