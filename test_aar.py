"""The properties that make the program right, each beside a naive reference. Run them with: pytest -q test_aar.py"""
import base64
import contextlib
import copy
import dataclasses
import html.parser
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shlex
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import types
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import soundfile
import torch
import torch.nn.functional as F
from torch import nn

import aar
import sample
import train_aar
import train_sat
from aar import (AAR, CLAP, PRESETS, SAT, AARConfig, Codebook, Discriminators, Mel, MelEmbedder, MelLoss, SATConfig,
                 SoundFolder, ToySounds, TrainConfig, UserError, load_audio, scale_schedule)

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")
torch.set_num_threads(1)                                              # equal to the bit from run to run


@pytest.fixture(autouse=True)
def same_seed():
    torch.manual_seed(0)


def small_sat(**changes):
    """A tokenizer of 40 frames of 40 samples, 5 scales and 16 codes, with random phis and a hundred times smaller than tiny."""
    config = SATConfig(sample_rate=8000, seconds=0.2, strides=(2, 4, 5), width=4, lstm=0, latent=6, V=16, n_scales=5, phis=3,
                       disc_width=2)
    sat = SAT(dataclasses.replace(config, **changes))
    for phi in sat.quantizer.phis:
        nn.init.normal_(phi.weight, std=0.2)
    return sat.eval()


def small_aar(sat, **changes):
    """A generator for `sat` whose weights are all random, so that condition, level and position make a difference."""
    config = AARConfig(scales=sat.config.scales, latent=sat.config.latent, V=sat.config.V, depth=2, cond_dim=5)
    model = AAR(dataclasses.replace(config, **changes))
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model.eval()


def random_tokens(sat, B=2):
    return [torch.randint(sat.config.V, (B, s)) for s in sat.config.scales]


def noise(*shape, seed=1):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sine(hz, rate, seconds=1.0, amplitude=0.5):
    return amplitude * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)


def pitch(x, rate):
    """Frequency of the highest peak of the spectrum, in Hz."""
    x = np.asarray(x, dtype=np.float64).ravel()
    return np.abs(np.fft.rfft(x * np.hanning(len(x)), 8 * len(x))).argmax() * rate / (8 * len(x))


# ---------------------------------------------------------------------------------------------------------------
# Scales
# ---------------------------------------------------------------------------------------------------------------

def test_quadratic_schedule_is_the_paper_s():
    """75 frames at 16 scales are 455 tokens, those of the paper."""
    want = (1, 2, 4, 6, 9, 12, 16, 20, 25, 31, 37, 43, 50, 58, 66, 75)
    assert scale_schedule("quadratic", 75, 16) == want == PRESETS["paper"].sat.scales == PRESETS["tiny"].sat.scales
    assert sum(want) == 455


@pytest.mark.parametrize("kind, g, g_inverse", [("quadratic", math.sqrt, lambda u: u * u), ("linear", float, float),
                                                ("log", math.log, math.exp)])
def test_schedule_grows_evenly_from_1_to_all_frames(kind, g, g_inverse):
    """Between 1 and `frames`, g(s_k) grows evenly, rounded down; never decreasing, whatever the numbers."""
    for frames, n in itertools.product((2, 3, 7, 10, 49, 64, 75, 100, 750), (2, 3, 5, 10, 16, 49, 75)):
        if n <= frames:
            s = scale_schedule(kind, frames, n)
            assert len(s) == n and s[0] == 1 and s[-1] == frames and list(s) == sorted(s)
            for k, s_k in enumerate(s):
                want = g_inverse(g(1) + (g(frames) - g(1)) * k / (n - 1))
                assert s_k == math.floor(want + 1e-6), (frames, n, k)


def test_schedule_of_one_scale_and_flat():
    """A single scale holds all frames, and so does each flat one; there may be more flat ones than frames."""
    assert all(scale_schedule(kind, 7, 1) == (7,) for kind in ("quadratic", "linear", "log", "flat"))
    assert scale_schedule("flat", 3, 5) == (3,) * 5


@pytest.mark.parametrize("kind, frames, n", [("cubic", 75, 16), ("linear", 75, 76), ("log", 75, 0), ("quadratic", 0, 1),
                                             ("quadratic", 75, -1), ("flat", 75, 0)])
def test_schedule_refuses(kind, frames, n):
    """What makes no schedule is the user's error."""
    with pytest.raises(UserError):
        scale_schedule(kind, frames, n)


# ---------------------------------------------------------------------------------------------------------------
# Codec
# ---------------------------------------------------------------------------------------------------------------

def paper_like(**changes):
    """The paper's tokenizer (strides, LSTM, scales, phis), narrow."""
    torch.manual_seed(0)
    return SAT(dataclasses.replace(PRESETS["paper"].sat, **({"width": 2, "latent": 4, "V": 16} | changes))).eval()


@pytest.mark.parametrize("make", [small_sat, paper_like])
@pytest.mark.parametrize("samples", [1, 39, 40, 41, 320, 321, 639, 1600, 24000, 30001])
@torch.no_grad()
def test_reconstruction_is_as_long_as_the_input(make, samples):
    """A sound of any length gives ceil(N / hop) frames, and comes back with its N samples."""
    sat = make()
    x = noise(2, 1, samples)
    assert sat.latents(x).shape == (2, sat.config.latent, math.ceil(samples / sat.config.hop))
    y, tokens, _ = sat(x)
    assert y.shape == x.shape and y.isfinite().all()
    assert [r_k.shape for r_k in tokens] == [(2, s) for s in sat.config.scales]


@pytest.mark.parametrize("make", [small_sat, paper_like])
@pytest.mark.parametrize("windows", [1, 0.7, 2])
def test_decode_of_encode_is_the_reconstruction(make, windows):
    """encode then decode is what forward does, for less, just as much, and more than a window."""
    sat = make()
    x = noise(2, 1, round(windows * sat.config.samples))
    y, tokens, _ = sat(x)
    encoded = sat.encode(x)
    assert all(torch.equal(a, b) and b.dtype == torch.int64 for a, b in zip(tokens, encoded))
    torch.testing.assert_close(sat.decode(encoded, x.shape[-1]), y, rtol=0, atol=1e-5)
    if windows == 1:
        torch.testing.assert_close(sat.decode(encoded), y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("module, shape, size, want", [(aar.Encoder, (4, 1, 24000), 1 / 8, 1), (aar.Decoder, (4, 32, 75), 1, 1 / 8)])
@torch.no_grad()
def test_signal_keeps_its_size_through_a_new_codec(module, shape, size, want):
    """With its first weights neither half of the codec lets the signal vanish or blow up; the latents are about 1."""
    assert want / 4 < module(paper_like(width=8, latent=32).config)(size * torch.randn(shape)).std() < want * 4


@pytest.mark.parametrize("make", [small_sat, paper_like])
@torch.no_grad()
def test_silence_stays_silence(make):
    """Encoder, phi and decoder add nothing of their own to silence."""
    sat = make()
    f = sat.latents(torch.zeros(1, 1, sat.config.samples))
    assert not f.any() and not sat.decoder(f).any() and not sat.quantizer.phi(0, f).any()


# ---------------------------------------------------------------------------------------------------------------
# Quantizer
# ---------------------------------------------------------------------------------------------------------------

def naive_down(x, s):
    """(T, D) -> (s, D): token i is the mean of frames floor(i T / s) .. ceil((i + 1) T / s)."""
    T = len(x)
    return np.stack([x[i * T // s:-(-(i + 1) * T // s)].mean(0) for i in range(s)])


def naive_up(z, T):
    """(s, D) -> (T, D): straight lines between tokens that stand in the middle of their share of the frames."""
    s = len(z)
    out = []
    for t in range(T):
        at = min(max((t + 0.5) * s / T - 0.5, 0), s - 1)
        left = int(at)
        right = min(left + 1, s - 1)
        out.append(z[left] * (1 - (at - left)) + z[right] * (at - left))
    return np.stack(out)


def naive_phi(h, weight):
    """(T, D): half of h and half of its convolution with 9 taps."""
    T = len(h)
    y = np.zeros_like(h)
    for t, tap in itertools.product(range(T), range(9)):
        if 0 <= t + tap - 4 < T:
            y[t] += weight[:, :, tap] @ h[t + tap - 4]
    return 0.5 * h + 0.5 * y


def naive_msrq(quantizer, f):
    """Alg. 1 for one clip f (T, D) in float64: tokens, and the sum after each scale."""
    f_hat, tokens, sums = np.zeros_like(f), [], []
    for k, s in enumerate(quantizer.scales):
        codes = quantizer.codebooks[k].codes.double().numpy()
        r_k = [int(((codes - z) ** 2).sum(1).argmin()) for z in naive_down(f - f_hat, s)]
        h = naive_up(codes[r_k], len(f))
        if len(quantizer.phis):
            phi = quantizer.phis[int(k / len(quantizer.scales) * len(quantizer.phis))]
            h = naive_phi(h, phi.weight.detach().double().numpy())
        f_hat = f_hat + h
        tokens.append(r_k)
        sums.append(f_hat)
    return tokens, sums


@pytest.mark.parametrize("changes", [{}, {"schedule": "linear"}, {"schedule": "log", "phis": 1}, {"phis": 5}, {"n_scales": 1},
                                     {"schedule": "flat", "n_scales": 4, "phis": 0}], ids=str)
@pytest.mark.parametrize("T", [40, 13])
@torch.no_grad()
def test_quantizer_equals_the_loop_of_the_paper(changes, T):
    """Tokens and sums equal those of Alg. 1, written with loops in float64; flat and without phi: residual VQ."""
    quantizer = small_sat(**changes).quantizer
    f = torch.randn(3, 6, T)
    out, tokens, _ = quantizer(f)
    _, f_hats, _ = quantizer.quantize(f)
    for b in range(len(f)):
        want, sums = naive_msrq(quantizer, f[b].T.double().numpy())
        assert [r_k[b].tolist() for r_k in tokens] == want
        for n in range(1, len(sums) + 1):
            want_n = torch.from_numpy(sums[n - 1]).T.float()
            torch.testing.assert_close(f_hats[n - 1][b], want_n, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(quantizer.decode([r_k[b:b + 1] for r_k in tokens[:n]], T)[0], want_n, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out[b], want_n, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_residual_vq_is_plain():
    """With flat scales and no phi each level stores, frame by frame, the code nearest to what the former left over."""
    quantizer = small_sat(schedule="flat", n_scales=4, phis=0).quantizer
    f = torch.randn(2, 6, 40)
    residual = f.mT.double()
    for codebook, r_k in zip(quantizer.codebooks, quantizer.quantize(f)[0]):
        want = torch.cdist(residual, codebook.codes.double()).argmin(-1)
        assert torch.equal(r_k, want)
        residual = residual - codebook.codes.double()[want]
    torch.testing.assert_close(quantizer(f)[0].mT.double(), f.mT.double() - residual, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_scales", [1, 2, 5, 16])
@pytest.mark.parametrize("training", [False, True])
def test_gradient_passes_the_quantizer_once(n_scales, training):
    """Whatever is computed from the quantised latents, the encoder sees 1 times its gradient, not K times."""
    quantizer = small_sat(n_scales=n_scales).quantizer.train(training)
    f = torch.randn(2, 6, 40, requires_grad=True)
    out = quantizer(f)[0]
    weight = torch.randn(2, 6, 40)
    here, = torch.autograd.grad((weight * out.sin() + out ** 3).sum(), f)
    at = out.detach().requires_grad_()
    there, = torch.autograd.grad((weight * at.sin() + at ** 3).sum(), at)
    assert torch.equal(here, there) and not torch.equal(out.detach(), f.detach())


def test_quantizer_loss():
    """The mean over the scales of |f - f_hat_k|^2 twice: once it moves the encoder only, once the phis only."""
    quantizer = small_sat().quantizer
    f = torch.randn(2, 6, 40, requires_grad=True)
    _, tokens, loss = quantizer(f)
    f_hats = [quantizer.decode(tokens[:n]) for n in range(1, 6)]
    to_f, to_phi = torch.autograd.grad(loss, [f, quantizer.phis[0].weight])
    torch.testing.assert_close(loss, 2 * torch.stack([(f - f_hat).square().mean() for f_hat in f_hats]).mean())
    torch.testing.assert_close(to_f, sum(2 * (f - f_hat) for f_hat in f_hats).detach() / f.numel() / 5)
    want, = torch.autograd.grad(sum((f.detach() - f_hat).square().mean() for f_hat in f_hats) / 5, quantizer.phis[0].weight)
    torch.testing.assert_close(to_phi, want)


def test_codebook_follows_the_mean_of_its_vectors():
    """The moving averages of use and sum, vector by vector; no code is dead here, and all move."""
    book = Codebook(8, 3, decay=0.9)
    share, total = [1 / 8] * 8, [code / 8 for code in book.codes.double()]
    for _ in range(5):
        z = torch.randn(24, 3)
        r = torch.cat([torch.arange(8), torch.randint(8, (16,))])
        book.update(z, r)
        for v in range(8):
            mine = [z_i.double() for z_i, r_i in zip(z, r) if r_i == v]
            share[v] = 0.9 * share[v] + 0.1 * len(mine) / 24
            total[v] = 0.9 * total[v] + 0.1 * sum(mine) / 24
        want = torch.stack([a / b for a, b in zip(total, share)]).float()
        torch.testing.assert_close(book.codes, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("V, M", [(16, 4), (64, 1), (4, 64)])
def test_a_dead_code_comes_alive_and_stays(V, M):
    """A code that none of 20 V vectors chose is reborn on a vector of the batch, not before, and survives the next update."""
    book, updates = Codebook(V, 3), math.floor(20 * V / M)
    last = book.codes[-1].clone()
    turn = itertools.cycle(range(V - 1))                              # never the last code
    for i in range(updates + 1):
        assert torch.allclose(book.codes[-1], last, rtol=1e-4)
        z = torch.randn(M, 3) + 10
        book.update(z, torch.tensor([next(turn) for _ in range(M)]))
    born = book.codes[-1].clone()
    assert (z - born).abs().amax(1).min() < 1e-5
    assert torch.equal(book.nearest(born), torch.tensor(V - 1))
    book.update(z, torch.zeros(M, dtype=torch.int64))
    torch.testing.assert_close(book.codes[-1], born)
    book.update(born[None], torch.tensor([V - 1]))                    # its statistics are alive: it averages with newcomers
    torch.testing.assert_close(book.codes[-1], born)


@pytest.mark.parametrize("V, M", [(256, 8), (1024, 32), (256, 600)])
def test_rare_codes_live(V, M):
    """With codes chosen at random, the rarest at a third of uniform, hardly one is taken for dead, however small the batch."""
    book = Codebook(V, 1)
    home = torch.arange(V).float()[:, None]
    book.codes.copy_(home)
    book.sum.copy_(home / V)
    share = torch.linspace(1 / 3, 5 / 3, V)
    for _ in range(700):
        r = torch.multinomial(share, M, replacement=True)
        book.update(home[r], r)
    assert ((book.codes - home).abs() > 1e-2 * V).float().mean() < 0.03


def test_kmeans_puts_the_codes_on_the_data():
    """Started on 16 far clusters, 64 codes quantise them much better than random codes, and as well as sitting in each."""
    book = Codebook(64, 3)
    centres = 10 * torch.randn(16, 3)
    z = centres[torch.arange(1024) % 16] + 0.1 * torch.randn(1024, 3)

    def error():                                                      # mean squared distance to the nearest code
        return (z - book(book.nearest(z))).square().sum(1).mean()
    random = error()
    book.kmeans(z)
    assert error() < 0.01 * random and error() < 2 * 3 * 0.1 ** 2
    assert torch.cdist(book.codes, centres).amin(1).max() < 1
    z, book = torch.randn(1024, 3), Codebook(8, 3)                    # no clusters: Lloyd's rounds beat any choice of vectors
    book.kmeans(z)
    assert error() < 0.9 * min(torch.cdist(z, z[torch.randperm(1024)[:8]]).amin(1).square().mean() for _ in range(10))


def test_start_of_the_quantizer_fits_every_scale():
    """After the k-means start each further scale leaves less of the latents over, and in all far less than random codes."""
    quantizer = small_sat().quantizer
    for phi in quantizer.phis:
        nn.init.dirac_(phi.weight)
    f = torch.cumsum(torch.randn(32, 6, 40), -1)

    def errors():
        return [(f - f_hat).square().mean().item() for f_hat in quantizer.quantize(f)[1]]
    random = errors()
    quantizer.quantize(f, kmeans=True)
    assert errors() == sorted(errors(), reverse=True) and errors()[-1] < 0.3 * random[-1]


def test_only_training_moves_the_codebooks():
    """Quantising in eval mode leaves every weight as it was; in training mode all codebooks learn."""
    quantizer = small_sat().quantizer
    before, f = [b.codes.clone() for b in quantizer.codebooks], torch.randn(4, 6, 40)
    quantizer(f)
    assert all(torch.equal(a, b.codes) for a, b in zip(before, quantizer.codebooks))
    quantizer.train()(f)
    assert not any(torch.equal(a, b.codes) for a, b in zip(before, quantizer.codebooks))


# ---------------------------------------------------------------------------------------------------------------
# Losses of stage 1
# ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("window, n_mels", [(1024, 80), (1024, 64), (2048, 80)])
def test_a_full_scale_sine_is_0_dB(window, n_mels):
    """At a frequency of a bin the bin reads 1; its band reads the triangle's sum over a Hann window's 1/2, 1, 1/2."""
    mel, rate = Mel(24000, window, n_mels), 24000
    for j in (20, 43, 100, 200, window // 4):
        x = torch.from_numpy(sine(j * rate / window, rate, amplitude=1.0)).float()[None, None]
        want = (mel.filters[:, j] + 0.5 * mel.filters[:, j - 1] + 0.5 * mel.filters[:, j + 1]).max()
        middle = mel(x)[0][:, 10:30]                                  # frames without the silence around the sound
        torch.testing.assert_close(middle.amax(0), want.expand(20), rtol=1e-2, atol=1e-3)
        assert -6.1 < mel.dB(x)[0][:, 10:30].max() < 6.1
        bins = copy.deepcopy(mel)
        bins.filters = torch.eye(window // 2 + 1)
        loudest = bins.dB(x)[0][:, 10:30]
        assert (loudest.argmax(0) == j).all() and loudest.amax(0).abs().max() < 0.1


def test_silence_is_80_dB_below():
    """Silence reads -80 dB everywhere."""
    assert (Mel(24000, 1024, 80).dB(torch.zeros(1, 1, 9000)) == -80).all()


def test_log_mel_distance():
    """Equal sounds are 0 dB apart, one at half the amplitude 6.02 dB; each clip of a batch for itself."""
    mel, x = Mel(24000, 1024, 80), noise(2, 1, 24000)
    y = torch.cat([x[:1], x[1:] / 2])
    torch.testing.assert_close(aar.log_mel_distance(mel, x, y), torch.tensor([0.0, 20 * math.log10(2)]), rtol=0, atol=1e-2)


def test_distances_that_the_evaluation_prints():
    """SI-SDR of a sound plus orthogonal noise of a tenth of its size is 20 dB, at any level; half the sound is half a spectrum."""
    x = noise(3, 8000)
    n = noise(3, 8000, seed=2)
    n = n - (n * x).sum(1, keepdim=True) / x.square().sum(1, keepdim=True) * x
    n = n / n.norm(dim=1, keepdim=True) * x.norm(dim=1, keepdim=True) / 10
    for level in (1.0, 0.1):
        torch.testing.assert_close(train_sat.si_sdr(x, level * (x + n)), torch.full((3,), 20.0), rtol=1e-3, atol=1e-2)
    for window in (512, 2048):
        torch.testing.assert_close(train_sat.spectral_distance(x, 0.5 * x, window), torch.full((3,), 0.5))
        assert train_sat.spectral_distance(x, x, window).max() == 0


def test_wave_loss():
    """The share of the energy that is wrong, of each clip for itself: 1 for nothing, 4 for the opposite, at any level.

    That holds of low sounds; what is high enough (6 kHz), of any phase, costs nothing.
    """
    low = torch.from_numpy(np.stack([sine(100, 24000), sine(150, 24000, amplitude=0.05)])).float()[:, None]
    for y, want in ((low, 0.0), (0 * low, 1.0), (-low, 4.0), (0.5 * low, 0.25)):
        assert aar.wave_loss(low, y) == pytest.approx(want, rel=0.02)
    high = torch.from_numpy(sine(6000, 24000)).float()[None, None]
    assert aar.wave_loss(high, -high) < 0.01
    naive = ((low - high).unfold(2, 4, 4).mean(3) ** 2).mean(2) / (low ** 2).mean(2)
    assert aar.wave_loss(low, high.expand_as(low)) == pytest.approx(naive.mean().item(), rel=0.02)
    y = torch.zeros_like(low).requires_grad_()
    aar.wave_loss(0 * low, y).backward()
    assert y.grad.isfinite().all()


def test_mel_loss_is_smallest_for_the_same_sound():
    """Zero for equal sounds, more for a sound that differs more, finite with a finite gradient in silence."""
    loss, x = MelLoss(24000), noise(1, 1, 24000)
    assert loss(x, x) == 0 < loss(x, x + 0.01 * noise(1, 1, 24000, seed=2)) < loss(x, 0.3 * x) < loss(x, 0 * x)
    silent = torch.zeros(1, 1, 24000, requires_grad=True)
    gradient, = torch.autograd.grad(loss(x, silent * 1.0), silent)
    assert gradient.isfinite().all()


def test_discriminator_losses():
    """The hinge losses of equal logits, by hand; equal feature maps are 0 apart, and real sound gets no gradient."""
    real = [[torch.randn(2, 3, requires_grad=True), torch.tensor([0.5, 2.0])], [torch.randn(1, 4), torch.tensor([-3.0])]]
    fake = [[real[0][0].detach().clone().requires_grad_(), torch.tensor([-2.0, 0.5])], [real[1][0], torch.tensor([3.0])]]
    # hinge: relu(1 - real) + relu(1 + fake), mean over logits, mean over discriminators
    torch.testing.assert_close(aar.discriminator_loss(real, fake), torch.tensor(((0.5 + 0) / 2 + (0 + 1.5) / 2 + 4 + 4) / 2))
    torch.testing.assert_close(aar.adversarial_loss(fake), torch.tensor(((3 + 0.5) / 2 + 0) / 2))
    assert aar.feature_loss(real, fake) == 0
    doubled = [[2 * fake[0][0], *fake[0][1:]], [2 * fake[1][0], *fake[1][1:]]]
    torch.testing.assert_close(aar.feature_loss(real, doubled), torch.tensor(1.0))
    aar.feature_loss(real, doubled).backward()
    assert real[0][0].grad is None and fake[0][0].grad is not None


@pytest.mark.parametrize("samples", [1, 63, 2047, 24000])
def test_discriminators_judge_any_length(samples):
    """Ten lists of finite feature maps come out, whatever the length; some logit depends on the sound."""
    if samples < 2048:
        samples += 1024                                               # half of the longest window, which the edge mirrors
    judge = Discriminators(2)
    a, b = judge(noise(1, 1, samples)), judge(noise(1, 1, samples, seed=2))
    assert len(a) == 10 and all(m.isfinite().all() for maps in a for m in maps)
    assert all(not torch.equal(x[-1], y[-1]) for x, y in zip(a, b))


# ---------------------------------------------------------------------------------------------------------------
# Transformer
# ---------------------------------------------------------------------------------------------------------------

@pytest.fixture(params=[False, True], ids=["next-scale", "next-token"])
def pair(request):
    """A small tokenizer and a generator for it, each way of generating in turn."""
    sat = small_sat(seconds=0.06, n_scales=4)                         # 12 frames: scales 1 3 6 12
    return sat, small_aar(sat, next_token=request.param)


def blocks_of(model):
    """For each place the number of its block: its scale, or in the next-token baseline itself."""
    scales = model.config.scales
    return torch.tensor([i if model.config.next_token else k for i, k in
                         enumerate(k for k, s in enumerate(scales) for _ in range(s))])


def generate_and_spy(sat, model, cond, **settings):
    """Generate; returns the tokens, what AAR.input read, what AAR.head wrote, and the logits that were drawn from."""
    read, wrote, drawn, draw = [], [], [], aar.draw
    hooks = [model.input.register_forward_hook(lambda _, args, out: read.append(args[0].clone())),
             model.head.register_forward_hook(lambda _, args, out: wrote.append(out.clone()))]
    aar.draw = lambda logits, *args: (drawn.append(logits.clone()), draw(logits, *args))[1]
    try:
        tokens = model.generate(cond, sat, **settings)
    finally:
        aar.draw = draw
        for hook in hooks:
            hook.remove()
    return tokens, *(torch.cat(x, 1) if x else None for x in (read, wrote, drawn))


def test_teacher_inputs_are_pictures_of_what_is_known(pair):
    """For scale k: the mean of the coarser scales' sum over each share of the frames; next-token: the former code."""
    sat, model = pair
    r, B = random_tokens(sat), 2
    got = sat.teacher_inputs(r, model.config.next_token)
    for b in range(B):
        if model.config.next_token:
            want = torch.stack([book.codes[t] for book, r_k in zip(sat.quantizer.codebooks, r) for t in r_k[b]])[:-1]
        else:
            want = torch.cat([torch.from_numpy(naive_down(sat.quantizer.decode([r_k[b:b + 1] for r_k in r[:k]])[0].T.double().detach().numpy(), s))
                              for k, s in enumerate(sat.config.scales) if k]).float()
        torch.testing.assert_close(got[b], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cfg", [0, 3.0])
def test_training_reads_what_generation_reads(pair, cfg):
    """teacher_inputs of the generated tokens are what the transformer read while it generated them."""
    sat, model = pair
    tokens, read, _, _ = generate_and_spy(sat, model, torch.randn(2, 5), cfg=cfg)
    want = sat.teacher_inputs(tokens, model.config.next_token)
    for half in read.split(2):                                        # with guidance: conditional, unconditional
        torch.testing.assert_close(half, want, rtol=0, atol=1e-6)


def naive_transformer(model, cond, x):
    """Logits (L, V) of one clip, in float64, head by head and place by place: cond (cond_dim), x (L - first, D)."""
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    depth, block, C = model.config.depth, blocks_of(model), 64 * model.config.depth

    def linear(name, v):
        return v @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(v, shift, scale):
        return (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift
    c = linear("cond.2", F.silu(linear("cond.0", cond.double() * len(cond) ** 0.5)))
    mods = linear("adaln", F.silu(c)).view(-1, C)
    levels = [k for k, s in enumerate(model.config.scales) for _ in range(s)]
    h = torch.cat([c.expand(model.first, -1), linear("input", x.double())]) + w["level"][levels] + w["position"]
    for i in range(depth):
        shift1, scale1, gate1, shift2, scale2, gate2 = mods[6 * i:6 * i + 6]
        q, k, v = linear(f"layers.{i}.attention.qkv", norm(h, shift1, scale1)).split(C, -1)
        y = torch.zeros_like(h)
        for head, place in itertools.product(range(depth), range(len(h))):
            part = slice(64 * head, 64 * head + 64)
            seen = block <= block[place]
            cosine = F.normalize(k[seen, part], dim=-1) @ F.normalize(q[place, part], dim=-1)
            y[place, part] = (cosine * w[f"layers.{i}.attention.log_scale"][head].exp()).flatten().softmax(0) @ v[seen, part]
        h = h + gate1 * linear(f"layers.{i}.attention.proj", y)
        inner = F.gelu(linear(f"layers.{i}.mlp.0", norm(h, shift2, scale2)))
        h = h + gate2 * linear(f"layers.{i}.mlp.2", inner)
    return linear("head", norm(h, *mods[6 * depth:]))


@torch.no_grad()
def test_transformer_equals_a_naive_one(pair):
    """The masked pass equals attention written head by head and place by place: the condition is the start token and
    steers every block; level and position are added; queries and keys have unit length, times a temperature."""
    sat, model = pair
    cond, x = torch.randn(2, 5), torch.randn(2, len(blocks_of(model)) - model.first, 6)
    want = torch.stack([naive_transformer(model, *clip) for clip in zip(cond, x)]).float()
    torch.testing.assert_close(model(cond, x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype, far", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("L", [9, 1100])
def test_attention_and_its_gradients_equal_naive_ones(dtype, far, L):
    """Written out (bfloat16, few tokens) or fused, masked or for a few queries of a cache: as in float64; long vectors get length 1."""
    x = [torch.randn(2, 3, L, 4).to(dtype).requires_grad_() for _ in range(3)]
    X = [p.detach().double().requires_grad_() for p in x]
    for mask, n in ((aar.block_mask([1, 3, L - 4]), L), (None, 2)):
        q, k = aar.unit(x[0][:, :, :n], 4.0), aar.unit(x[1])
        Q, K = 4 * F.normalize(X[0][:, :, :n], dim=-1), F.normalize(X[1], dim=-1)
        scores = Q @ K.mT if mask is None else (Q @ K.mT).masked_fill(~mask, -torch.inf)
        y, Y = aar.attend(q, k, x[2], mask), scores.softmax(-1) @ X[2]
        weight = torch.randn_like(Y)
        for a, b in zip((y, *torch.autograd.grad(y, x, weight.to(dtype))), (Y, *torch.autograd.grad(Y, X, weight))):
            assert a.dtype == dtype and (a - b).norm() < far * b.norm()
    assert torch.equal(aar.unit(torch.zeros(2, 4)), torch.zeros(2, 4))


@pytest.mark.skipif(sys.platform != "linux", reason="counts Linux's page faults")
def test_freed_memory_is_kept():
    """A large block is made of an earlier one's pages, and the system clears no new ones; 3 GiB of them are given back. (In a
    process of its own: in this one, whose heap has holes, a block finds old pages without our doing.)"""
    code = """if True:
        import aar, numpy, resource, torch
        def size():
            return [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")][0]  # KiB
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.zeros(50_000_000)                                  # 200 MB, 48828 pages
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        first, *_, last = [faults() for _ in range(10)]             # small pieces part the first blocks
        before = size()
        numpy.empty(3 * 2 ** 28, "float32")
        print(first, last, size() - before)
    """
    first, last, kept = map(int, subprocess.check_output([sys.executable, "-c", code], cwd=HERE, text=True).split())
    assert first > 40_000 and last < 1000 and kept < 2 ** 20


@torch.no_grad()
def test_a_token_changes_only_what_comes_later(pair):
    """Another token of a block changes no logit of this block and of earlier ones, and some logit of every later one."""
    sat, model = pair
    cond, r, scales, block = torch.randn(1, 5), torch.cat(random_tokens(sat, 1), 1), sat.config.scales, blocks_of(model)

    def logits(r):
        return model(cond, sat.teacher_inputs(r.split(scales, 1), model.config.next_token))[0]
    before = logits(r)
    for i in range(r.shape[1]):
        other = r.clone()
        other[0, i] = (other[0, i] + 1) % sat.config.V
        change = (logits(other) - before).abs().amax(1)
        assert change[block <= block[i]].max() < 1e-5
        assert all(change[block == later].max() > 1e-4 for later in range(block[i] + 1, block[-1] + 1))


@torch.no_grad()
def test_a_place_sees_its_whole_block_and_all_before(pair):
    """What is read at a place reaches exactly the logits of its own block, all of it, and of all later blocks."""
    sat, model = pair
    cond, block = torch.randn(1, 5), blocks_of(model)
    x = torch.randn(1, len(block) - model.first, 6)
    before = model(cond, x)[0]
    for i in range(x.shape[1]):
        other = x.clone()
        other[0, i] += 1
        change = (model(cond, other)[0] - before).abs().amax(1)
        sees = block >= block[model.first + i]
        assert change[~sees].max() < 1e-5 and change[sees].min() > 1e-4


@pytest.mark.parametrize("cfg", [0, 1.7])
@torch.no_grad()
def test_cached_generation_equals_the_masked_pass(pair, cfg):
    """The logits while generating, with a cache, are those of the full forward pass on the same tokens, and guidance
    is (1 + t_k) conditional - t_k unconditional, t_k growing evenly from 0 at the first scale to cfg at the last."""
    sat, model = pair
    cond, scales = torch.randn(3, 5), sat.config.scales
    tokens, _, wrote, drawn = generate_and_spy(sat, model, cond, cfg=cfg)
    x = sat.teacher_inputs(tokens, model.config.next_token)
    conditional, free = model(cond, x), model(model.null.expand(3, -1), x)
    torch.testing.assert_close(wrote[:3], conditional, rtol=1e-4, atol=1e-4)
    t = torch.tensor([cfg * k / (len(scales) - 1) for k, s in enumerate(scales) for _ in range(s)])[:, None]
    torch.testing.assert_close(drawn, conditional + t * (conditional - free), rtol=1e-4, atol=1e-4)
    assert (conditional - free).abs().max() > 0.1


@pytest.mark.parametrize("dtype, far", [(torch.float32, 1e-5), (aar.fast_dtype(CPU), 0.03)])
@torch.no_grad()
def test_prepared_generation_equals_the_masked_pass(pair, dtype, far, monkeypatch):
    """Prepared weights write the logits of the full forward pass of the others: in float32 the same, in bfloat16 nearly."""
    sat, model = pair
    cond, prepared = torch.randn(3, 5), copy.deepcopy(model)
    monkeypatch.setattr(aar, "fast_dtype", lambda device: dtype)
    tokens, _, wrote, _ = generate_and_spy(sat, prepared.prepare(), cond, cfg=0)
    want = model(cond, sat.teacher_inputs(tokens, model.config.next_token))
    assert (wrote - want).norm() < far * (want - want.mean(-1, keepdim=True)).norm()


def test_likeliest_codes(pair):
    """top_k=1 takes at each place the likeliest code, given those before; a vanishing guidance is none."""
    sat, model = pair
    cond = torch.randn(2, 5)
    tokens = model.generate(cond, sat, cfg=0, top_k=1)
    want = model(cond, sat.teacher_inputs(tokens, model.config.next_token)).argmax(-1)
    assert torch.equal(torch.cat(tokens, 1), want)
    assert torch.equal(torch.cat(model.generate(cond, sat, cfg=1e-9, top_k=1), 1), want)
    assert [r_k.shape for r_k in tokens] == [(2, s) for s in sat.config.scales]


def test_seed_makes_the_sound(pair):
    """The same seed gives the same tokens and sound, another seed others."""
    sat, model = pair
    cond = torch.randn(2, 5)
    a, b, c = (torch.cat(model.generate(cond, sat, generator=torch.Generator().manual_seed(seed)), 1) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a[0], a[1])


@pytest.mark.parametrize("n_scales", [1, 2])
def test_few_scales(n_scales):
    """One scale is enough: everything comes from the start token."""
    sat = small_sat(seconds=0.06, n_scales=n_scales)
    model = small_aar(sat)
    tokens = model.generate(torch.randn(2, 5), sat)
    assert model(torch.randn(2, 5), sat.teacher_inputs(tokens)).shape == (2, sum(sat.config.scales), 16)
    assert sat.decode(tokens).shape == (2, 1, 480)


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (1, 1.0), (3, 1.0), (8, 1.0), (100, 1.0), (0, 0.5), (0, 0.9), (0, 1e-9),
                                          (4, 0.7)])
def test_sample_draws_from_the_likeliest(top_k, top_p):
    """Draws follow the probabilities of the top_k likeliest codes, cut where they hold top_p, in both rows."""
    logits = torch.randn(1, 2, 8) * 1.5
    draws = aar.draw(logits.expand(20000, -1, -1), top_k, top_p, torch.Generator().manual_seed(0))
    for row in range(2):
        e = [math.exp(x) for x in logits[0, row].tolist()]
        order = sorted(range(8), key=lambda v: -e[v])[:top_k or 8]
        kept, total = [], sum(e[v] for v in order)
        for v in order:                                               # until those before hold top_p
            if kept and sum(e[u] for u in kept) / total >= top_p:
                break
            kept.append(v)
        want = [e[v] / sum(e[u] for u in kept) if v in kept else 0 for v in range(8)]
        got = torch.bincount(draws[:, row], minlength=8) / 20000
        assert all((g == 0) == (w == 0) and abs(g - w) < 0.015 for g, w in zip(got.tolist(), want))


def test_hidden_condition_does_not_matter():
    """In training with cond_drop=1 the condition is never seen, with 0 always; in eval mode it is, whatever cond_drop."""
    sat = small_sat()
    x = sat.teacher_inputs(random_tokens(sat))
    a, b = torch.randn(2, 2, 5)
    for drop, training in itertools.product((0.0, 1.0), (False, True)):
        torch.manual_seed(0)
        model = small_aar(sat, cond_drop=drop).train(training)
        hidden = bool(drop and training)
        assert torch.equal(model(a, x), model(b, x)) == hidden
        assert torch.equal(model(a, x), model(model.null.expand(2, -1), x)) == hidden


def test_conditions_are_dropped_clip_by_clip():
    """With cond_drop=0.3 three of ten clips of a batch lose their condition, and the null condition learns from them."""
    sat = small_sat(n_scales=1, seconds=0.02)
    model = small_aar(sat, cond_drop=0.3).train()
    cond = torch.randn(1, 5).expand(2000, -1)
    logits = model(cond, sat.teacher_inputs(random_tokens(sat, 2000)))
    logits.sum().backward()
    hidden = (logits - model.eval()(cond[:1], sat.teacher_inputs(random_tokens(sat, 1)))).abs().amax((1, 2)) > 1e-3
    assert 0.25 < hidden.float().mean() < 0.35
    assert model.null.grad.abs().max() > 0


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_whatever_the_sizes(seed):
    """75 random tokenizers and generators a seed: every use of the scales agrees on shapes and values, for any sizes."""
    rng = random.Random(seed)
    for _ in range(75):
        torch.manual_seed(rng.random())
        strides, frames, B = tuple(rng.choices((2, 3, 4, 5), k=rng.randint(1, 3))), rng.randint(1, 14), rng.randint(1, 3)
        kind = rng.choice(("quadratic", "linear", "log", "flat"))
        sat = SAT(SATConfig(sample_rate=8000, seconds=frames * math.prod(strides) / 8000, strides=strides, width=2, lstm=rng.randint(0, 1),
                            latent=rng.randint(1, 8), V=rng.randint(2, 20), schedule=kind, phis=rng.randint(0, 4),
                            n_scales=rng.randint(1, 5 if kind == "flat" else frames))).eval()
        config, D, scales = sat.config, sat.config.latent, sat.config.scales
        for phi in sat.quantizer.phis:
            nn.init.normal_(phi.weight, std=0.2)
        assert config.frames == frames

        x = torch.randn(B, 1, rng.randint(1, 2 * config.samples))
        y, tokens, _ = sat(x)
        assert y.shape == x.shape and y.isfinite().all()
        torch.testing.assert_close(sat.decode(sat.encode(x), x.shape[-1]), y)

        model = small_aar(sat, depth=1, next_token=rng.random() < 0.3)
        cond = torch.randn(B, 5)
        r, read, wrote, _ = generate_and_spy(sat, model, cond, cfg=rng.choice((0, 2.0)), top_k=rng.randint(0, config.V), top_p=rng.random())
        for sound in (tokens, r):
            assert [r_k.shape for r_k in sound] == [(B, s) for s in scales]
            assert all(0 <= r_k.min() and r_k.max() < config.V for r_k in sound)
        inputs = sat.teacher_inputs(r, model.config.next_token)
        assert inputs.shape == (B, sum(scales) - model.first, D)
        assert read is not None or model.first == sum(scales)           # all is said by the start token
        torch.testing.assert_close(inputs if read is None else read[:B], inputs, rtol=0, atol=1e-6)
        torch.testing.assert_close(wrote[:B], model(cond, inputs), rtol=1e-4, atol=1e-4)
        n = rng.randint(1, len(scales))
        parts = sum(sat.quantizer.decode(r[:k + 1]) - (sat.quantizer.decode(r[:k]) if k else 0) for k in range(n))
        assert sat.decode(r[:n]).shape == (B, 1, config.samples)
        torch.testing.assert_close(sat.quantizer.decode(r[:n]), parts, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------

def small_plan(**changes):
    return TrainConfig(**{"steps": 4, "batch": 2, "lr": 1e-3, "quantize_at": 0.25, "adversarial_at": 0.5} | changes)


def options(out, *more):
    """The command line options that both training loops read."""
    return train_sat.arguments(["--device", "cpu", "--out", str(out), *map(str, more)])


def test_learning_rate():
    """Grows evenly to its peak during the warm-up, then falls, never rising, to about 1% at the end."""
    plan = TrainConfig(steps=1000, batch=1, lr=2.0, warm_up=0.1)
    rates = [aar.learning_rate(step, plan) for step in range(1000)]
    assert rates[:100] == pytest.approx([2.0 * (i + 1) / 100 for i in range(100)])
    assert max(rates) == pytest.approx(2.0) and rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[550] == pytest.approx(1.01, rel=1e-2) and rates[-1] == pytest.approx(0.02, rel=1e-2)


def test_muon_moves_all_directions_equally():
    """One update of a convolution: singular values within 0.6 .. 1.3 of each other's mean, the size of AdamW's 0.2 lr."""
    layer, idle = aar.conv(aar.Conv1d, 12, 16, 3), aar.Phi(4)
    weight = layer.parametrizations.weight.original1
    before, optimizer = weight.detach().clone(), aar.Muon([weight, idle.weight], lr=0.01)
    (layer(noise(2, 12, 50)) * torch.logspace(-1, 0, 16)[:, None]).square().sum().backward()
    spread = torch.linalg.svdvals(weight.grad.flatten(1))
    optimizer.step()
    update = (weight.detach() - before).flatten(1)
    values = torch.linalg.svdvals(update)
    assert spread[0] > 30 * spread[-1] and values[0] < 2.2 * values[-1]
    assert (update * weight.grad.flatten(1)).sum() < 0
    assert update.square().mean().sqrt() == pytest.approx(0.2 * 0.01, rel=0.3)
    assert torch.equal(idle.weight, aar.Phi(4).weight)               # no gradient, no step


def test_muon_in_blocks_is_muon_of_the_blocks():
    """With `rows` a weight moves as if each block of so many rows were a weight of its own."""
    whole = nn.Parameter(torch.randn(12, 5))
    blocks = [nn.Parameter(block.clone()) for block in whole.detach().split(4)]
    a, b = aar.Muon([whole], 0.1, rows=4), aar.Muon(blocks, 0.1)
    before = whole.detach().clone()
    for _ in range(3):
        whole.grad = torch.randn(12, 5)
        for block, grad in zip(blocks, whole.grad.split(4)):
            block.grad = grad.clone()
        a.step()
        b.step()
    assert torch.allclose(whole, torch.cat(blocks), rtol=0, atol=1e-3) and (whole - before).norm() > 0.1
    undivided = aar.Muon([nn.Parameter(before.clone())], 0.1)
    undivided.weights[0].grad = whole.grad
    undivided.step()
    divided = aar.Muon([nn.Parameter(before.clone())], 0.1, rows=4)
    divided.weights[0].grad = whole.grad
    divided.step()
    assert (divided.weights[0] - undivided.weights[0]).norm() > 0.01         # and that is another step


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 12, 12)])
def test_orthogonal_equals_newton_schulz(shape):
    """Squares only, float32, singular values from 1 to 1e-5: the plain rounds on the whole matrix in float64; nothing of nothing."""
    U, s, V = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    G = 7 * U @ (torch.logspace(0, -5, s.shape[-1], dtype=torch.float64)[:, None] * V)
    X = G / torch.linalg.matrix_norm(G)[..., None, None]
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    assert (aar.orthogonal(G.float()) - X).norm() < 1e-3 * X.norm()
    assert torch.equal(aar.orthogonal(torch.zeros(2, 4, 6)), torch.zeros(2, 4, 6))


def test_muon_equals_torch_s():
    """Three steps move tall, wide and square weights as torch.optim.Muon does, which rounds to bfloat16."""
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((12, 5), (5, 12), (7, 7))]
    start, others = copy.deepcopy(ours), copy.deepcopy(ours)
    optimizers = aar.Muon(ours, 0.1), torch.optim.Muon(others, 0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours, others):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, c in zip(ours, others, start):
        assert (a - b).norm() <= 0.02 * (b - c).norm()


def test_names_are_looked_up_only_when_a_loss_breaks():
    """In stage 2 a name costs the reading of a file: the log asks for none as long as all losses are finite."""
    asked = []
    log = aar.Log(types.SimpleNamespace(set_postfix=lambda *_, **__: None), [])
    for step in range(25):
        log.add(step, (asked.append(i) or f"clip {i}" for i in range(3)), loss=torch.tensor(1.0), norm=torch.tensor(2.0))
    log.flush()
    assert not asked and log.sums == {"loss": 25.0, "norm": 50.0}
    log.add(25, (f"clip {i}" for i in range(3)), loss=torch.tensor(1.0), norm=torch.tensor(math.nan))
    with pytest.raises(aar.UserError, match="step 25: loss part 'norm' is nan on clip 0, clip 1, clip 2"):
        log.flush()


def test_each_player_learns_from_its_own_loss(tmp_path, monkeypatch):
    """The step of stage 1 gives generator and discriminators the gradients of separate, naive passes, each of its own."""
    made, first, gradients, clip = {}, {}, [], nn.utils.clip_grad_norm_

    def keep(name, make):
        def wrapped(*args):
            made[name] = make(*args)
            return made[name]
        return wrapped

    def wait(log, loader):
        wav, names = next(loader)
        first.setdefault("state", (wav, *map(copy.deepcopy, (made["sat"], made["judges"]))))
        return wav, names

    def spy(parameters, norm):
        parameters = list(parameters)
        gradients.append([None if p.grad is None else p.grad.clone() for p in parameters])
        return clip(parameters, norm)
    monkeypatch.setattr(train_sat, "SAT", keep("sat", SAT))
    monkeypatch.setattr(train_sat, "Discriminators", keep("judges", Discriminators))
    monkeypatch.setattr(aar.Log, "wait", wait)
    monkeypatch.setattr(aar, "autocast", lambda device, on=True: contextlib.nullcontext())
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", spy)
    train_sat.train(options(tmp_path / "sat.pt"), small_sat().config,      # a plain autoencoder at first: no random codes
                    small_plan(steps=1, quantize_at=1, adversarial_at=0), CPU)

    wav, sat, judges = first["state"]
    y = sat.decoder(sat.latents(wav))
    fake = judges(y)
    weights = train_sat.WEIGHTS
    loss = (weights["time"] * (wav - y).abs().mean() + weights["wave"] * aar.wave_loss(wav, y) + weights["mel"] * MelLoss(8000)(wav, y)
            + weights["adversarial"] * aar.adversarial_loss(fake) + weights["feature"] * aar.feature_loss(judges(wav), fake))
    own = [p for part in (sat.encoder, sat.decoder) for p in part.parameters()]
    seen = dict(zip((name for name, _ in sat.named_parameters()), gradients[0]))
    names = [name for name, _ in sat.named_parameters() if not name.startswith("quantizer")]
    for name, want in zip(names, torch.autograd.grad(loss, own)):
        torch.testing.assert_close(seen[name], want, rtol=1e-3, atol=1e-5)
    d_loss = aar.discriminator_loss(judges(wav), judges(y.detach()))
    for got, want in zip(gradients[1], torch.autograd.grad(d_loss, list(judges.parameters())), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


def test_stage_1_overfits_one_batch():
    """A small tokenizer learns four sounds by heart, through its quantizer: the mel loss falls below a third."""
    sat, loss = small_sat(width=8, V=64).train(), MelLoss(8000)
    x = torch.stack([ToySounds(8000, 1600)[i][0] for i in (3, 5, 6, 8)])
    with torch.no_grad():
        sat.quantizer.quantize(sat.latents(x), kmeans=True)
    optimizer, losses = torch.optim.AdamW(sat.parameters(), 4e-3, betas=(0.8, 0.99)), []
    for _ in range(150):
        y, _, vq = sat(x)
        losses.append(loss(x, y).item())
        optimizer.zero_grad()
        (loss(x, y) + vq).backward()
        nn.utils.clip_grad_norm_(sat.parameters(), 1.0)
        optimizer.step()
    assert loss(x, sat.eval()(x)[0]) < losses[0] / 3


def test_every_scale_adds_to_what_one_hears():
    """A trained tokenizer is meaningful up to any scale: on new sounds the distance falls from scale to scale."""
    config, loss, mel = small_sat(width=6, latent=8, V=32).config, MelLoss(8000), Mel(8000, 256, 40)
    sat, discriminators, optimizers = train_sat.build(config, 3e-3, CPU)
    for step in range(100):
        x = torch.stack([ToySounds(8000, 1600)[i][0] for i in range(4 * step, 4 * step + 4)])
        if step == 20:
            with torch.no_grad():
                sat.quantizer.quantize(sat.latents(x), kmeans=True)
        train_sat.train_step(sat, discriminators, optimizers, loss, [x], quantize=step >= 20, adversarial=False)
    x = torch.stack([ToySounds(8000, 1600, held_back=True)[i][0] for i in range(50)])
    tokens = sat.eval().encode(x)
    heard = [aar.log_mel_distance(mel, x, sat.decode(tokens[:k])).mean() for k in range(1, 1 + len(tokens))]
    assert all(finer < coarser + 0.1 for coarser, finer in itertools.pairwise(heard)) and heard[-1] < 0.75 * heard[0], heard


@pytest.mark.parametrize("next_token", [False, True])
def test_stage_2_overfits_one_batch(next_token):
    """A small generator learns random tokens by heart, and then says them when it hears their condition."""
    sat = small_sat(seconds=0.06, n_scales=4)
    model = AAR(AARConfig(scales=sat.config.scales, latent=6, V=16, depth=2, cond_dim=5, cond_drop=0.1, next_token=next_token))
    r, cond = random_tokens(sat, 4), F.normalize(torch.randn(4, 5), dim=1)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(120):
        loss = train_aar.losses(model, sat, torch.cat(r, 1), cond)[0].mean()
        if step == 0:
            assert abs(loss - math.log(16)) < 0.3                     # guessing
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert train_aar.losses(model, sat, torch.cat(r, 1), cond)[0].mean() < 0.1
    said = model.generate(cond, sat, cfg=0, top_k=1)
    assert torch.equal(torch.cat(said, 1), torch.cat(r, 1))


@pytest.mark.parametrize("what", ["tokenizer", "discriminators", "generator", "next-token", "mel"])
def test_runs_on_the_meta_device(what):
    """No module makes tensors on a device of its own: a training and a generation step run where there is no memory."""
    meta, x = torch.device("meta"), torch.zeros(2, 1, 1600, device="meta")
    sat = small_sat().to(meta)
    if what == "mel":
        assert MelEmbedder(8000).to(meta)(x).device == meta
        return
    if what == "tokenizer":
        module = sat.train()
        y, _, vq = sat(x)
        loss = MelLoss(8000).to(meta)(x, y) + vq
        sat.quantizer.quantize(sat.latents(x), kmeans=True)
        assert sat.decode(sat.encode(x)).device == meta
    elif what == "discriminators":
        module = Discriminators(2).to(meta)
        real, fake = module(x), module(0.5 * x)
        loss = aar.discriminator_loss(real, fake) + aar.adversarial_loss(fake) + aar.feature_loss(real, fake)
    else:
        module = small_aar(sat, next_token=what == "next-token").to(meta).train()
        cond, r = torch.zeros(2, 5, device=meta), torch.zeros(2, sum(sat.config.scales), dtype=torch.int64, device=meta)
        loss = train_aar.losses(module, sat, r, cond)[0].mean()
        assert all(r_k.device == meta for r_k in module.generate(cond, sat, cfg=1.0, top_k=4, top_p=0.9))
    loss.backward()
    torch.optim.AdamW(module.parameters()).step()
    assert loss.device == meta


def interrupt(monkeypatch, owner, name, n):
    """At the n-th call of owner.name this process is sent an interrupt, as Ctrl-C does."""
    left, call = itertools.count(1), getattr(owner, name)

    def wrapped(*args, **more):
        if next(left) == n:
            signal.raise_signal(signal.SIGINT)
        return call(*args, **more)
    monkeypatch.setattr(owner, name, wrapped)


def small_training(stage, out, data, *more, **plan):
    """Train a small tokenizer, whose codes die soon, so that chance plays a part, or a generator for one; as the scripts do."""
    torch.manual_seed(0)
    sat, args = small_sat(decay=0.2), options(out, *["--data", data] * bool(data), *more)
    if stage == "sat":
        return train_sat.train(args, sat.config, small_plan(**plan), CPU)
    args.embedder = "mel"
    config = AARConfig(scales=sat.config.scales, latent=6, V=16, depth=1, cond_drop=0.5)
    train_aar.train(args, sat, MelEmbedder(8000), config, small_plan(**{"batch": 8} | plan), CPU)


def differences(one, other):
    """Paths of the leaves that two checkpoints do not have in common, to the bit, but for what a clock measured."""
    one, other = (torch.load(path, weights_only=True) for path in (one, other))
    return [path for (path, a), (_, b) in zip(leaves(one), leaves(other), strict=True)
            if not (torch.equal(a, b) if torch.is_tensor(a) else a == b) and not path.endswith((".s_per_step", ".waited"))]


@pytest.mark.parametrize("owner, name", [(aar, "learning_rate"), (aar.Log, "add")], ids=["before", "after"])
@pytest.mark.parametrize("stage", ["sat", "aar"])
def test_resumed_equals_uninterrupted(stage, owner, name, tmp_path, monkeypatch, wav_folder):
    """Stopped by Ctrl-C in the third step, before or after its work, and resumed: the same to the bit as in one go."""
    one, stopped = tmp_path / "one-go.pt", tmp_path / "stopped.pt"
    small_training(stage, one, wav_folder)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="--resume"):
        interrupt(patch, owner, name, 3)
        small_training(stage, stopped, wav_folder)
    assert aar.load_checkpoint(stopped, stage)["step"] in (2, 3)
    if name == "learning_rate":                                       # tokens that were kept may get damaged
        for path in tmp_path.glob("stopped.*.pt"):
            content = path.read_bytes()
            path.write_bytes(content[:600] + bytes(255 - b for b in content[600:1200]) + content[1200:])
    small_training(stage, stopped, wav_folder, "--resume")
    assert aar.load_checkpoint(stopped, stage)["step"] == 4
    assert not [path for path in differences(one, stopped) if not path.startswith(".history")]


@pytest.mark.parametrize("stage", ["sat", "aar"])
def test_killed_at_any_moment(stage, tmp_path, wav_folder):
    """Killed at random moments, 20 in both stages, the last checkpoint is whole, and goes on to what one run makes, to the bit."""
    one, killed, plan = tmp_path / "one-go.pt", tmp_path / "killed.pt", {"steps": 6, "adversarial_at": 0.6}

    def start(out):
        """In a process of its own, so that it can be killed, together with those that load sounds for it."""
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            aar.tqdm.set_lock(threading.RLock())                      # the usual one is shared with those killed while they held it
            try:
                small_training(stage, out, wav_folder, *["--resume"] * out.exists(), **plan)
                os._exit(0)
            finally:
                os._exit(1)
        return pid
    Mel(8000, 64, 5)                                                  # imports librosa once, here
    since = time.perf_counter()
    small_training(stage, one, wav_folder, **plan)
    life, rng, kills = (time.perf_counter() - since) / 2, random.Random(0), 0
    while kills <= 10:
        pid, until = start(killed), time.perf_counter() + rng.uniform(0, life) if kills < 10 else math.inf
        while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.perf_counter() < until:
            time.sleep(0.001)
        if ended == (0, 0):
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            if killed.exists():
                assert aar.load_checkpoint(killed, stage)["step"] in range(1, 7)
        else:                                                         # faster than the killer
            assert ended[1] == 0 and not differences(one, killed)
            for path in tmp_path.glob("killed.*"):
                path.unlink()
        kills += ended == (0, 0) or kills == 10


@pytest.mark.parametrize("stage", ["sat", "aar"])
def test_same_seed_same_checkpoint(stage, tmp_path, wav_folder):
    """Two runs with one seed write the same numbers, to the bit, another seed others; the seed is in the checkpoint."""
    a, b, c = (tmp_path / name for name in ("a.pt", "b.pt", "c.pt"))
    for out, seed in zip((a, b, c), (5, 5, 6)):
        small_training(stage, out, wav_folder, "--seed", seed)
    assert not differences(a, b) and f".parts.{stage}." in str(differences(a, c))
    assert aar.load_checkpoint(a, stage)["seed"] == 5


@pytest.mark.parametrize("stage", ["sat", "aar"])
def test_trains_in_half_precision(stage, tmp_path, wav_folder, monkeypatch):
    """With bfloat16, also where a processor has none: every part of the loss is a finite float32."""
    seen, add = [], aar.Log.add
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(aar.Log, "add", lambda log, step, names, **losses: (seen.append(losses), add(log, step, names, **losses)))
    small_training(stage, tmp_path / "half.pt", wav_folder)
    assert all(value.dtype == torch.float32 and value.isfinite() for losses in seen for value in losses.values())
    assert len(seen) == 4 and len(seen[-1]) == (9 if stage == "sat" else 2)


def test_memory_is_flat(tmp_path, wav_folder):
    """From step 100 to step 500 of both loops, and from the 100th to the 500th generation, a process hardly grows."""
    code = f"""if True:
        import resource, torch, aar, train_aar, train_sat, test_aar as t
        seen, add = [], aar.Log.add

        def peak(step):
            if step in (100, 499):
                seen.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if {sys.platform!r} == "linux" else 1024))

        class One(aar.Discriminators):
            def __init__(self, c):
                super().__init__(c)
                del self[:-1]
        aar.Log.add = lambda log, step, *args, **more: (peak(step), add(log, step, *args, **more))
        train_sat.Discriminators = One
        sat = t.small_sat(seconds=0.14, strides=(5, 8), n_scales=3, phis=1, width=2)
        plan = t.small_plan(steps=500, batch=1, quantize_at=0.02, adversarial_at=0.1)
        model = aar.AARConfig(scales=sat.config.scales, latent=6, V=16, depth=1)
        args = t.options({str(tmp_path / "x.pt")!r}, "--data", {str(wav_folder)!r})
        train_sat.train(args, sat.config, plan, t.CPU)
        args.embedder, args.out = "mel", {str(tmp_path / "y.pt")!r}
        train_aar.train(args, sat, aar.MelEmbedder(8000), model, plan, t.CPU)
        model = t.small_aar(sat, depth=1)
        for i in range(500):
            sat.decode(model.generate(torch.zeros(1, 5), sat))
            peak(i)
        print(*seen)"""
    out = subprocess.check_output([sys.executable, "-c", code], cwd=HERE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    seen = [float(kB) for kB in out.splitlines()[-1].split()]
    assert len(seen) == 6 and all(after - before < 4000 for before, after in zip(seen[::2], seen[1::2])), seen


def leaves(tree, path=""):
    """All (path, leaf) of nested dictionaries and lists."""
    if isinstance(tree, (dict, list, tuple)):
        items = sorted(tree.items(), key=str) if isinstance(tree, dict) else enumerate(tree)
        return [leaf for k, v in items for leaf in leaves(v, f"{path}.{k}")]
    return [(path, tree)]


@pytest.fixture(scope="module")
def wav_folder(tmp_path_factory):
    """Eight short sounds and one broken file."""
    folder = tmp_path_factory.mktemp("wavs")
    for i, hz in enumerate((150, 220, 330, 480, 700, 1000, 1500, 2200)):
        soundfile.write(folder / f"{hz}.wav", sine(hz, 16000, 1.2) + 0.01 * np.random.default_rng(i).standard_normal(19200), 16000)
    (folder / "broken.wav").write_text("no sound")
    return folder


def train_both_stages(folder, data, accumulate=1):
    """Four steps of each stage on batches of four, in float32, with codes that die soon; the checkpoints go to `folder`.

    The loss of the features is left out: its denominators are means over the part of the batch at hand.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aar, "fast_dtype", lambda device: torch.float32)
        patch.setitem(train_sat.WEIGHTS, "feature", 0.0)
        torch.manual_seed(0)
        sat, plan = small_sat(decay=0.2), small_plan(batch=4)
        args = options(folder / "sat.pt", "--data", data, "--accumulate", accumulate)
        train_sat.train(args, sat.config, plan, CPU)
        args.out, args.embedder = folder / "aar.pt", "mel"
        config = AARConfig(scales=sat.config.scales, latent=6, V=16, depth=1, cond_drop=0.5)
        train_aar.train(args, sat, MelEmbedder(8000), config, plan, CPU)


@pytest.fixture(scope="module")
def joint(tmp_path_factory, wav_folder):
    """Checkpoints of `train_both_stages` in one process and one part."""
    folder = tmp_path_factory.mktemp("joint")
    train_both_stages(folder, wav_folder)
    return folder


def assert_same_training(one, other):
    """Both folders hold the same checkpoints up to rounding: losses, lengths of gradients, codebooks and weights."""
    for stage in ("sat", "aar"):
        a, b = (aar.load_checkpoint(folder / f"{stage}.pt", stage) for folder in (one, other))
        for row, same in zip(a["history"], b["history"], strict=True):
            for name in ("loss",) if stage == "aar" else ("mel", "vq", "adversarial", "discriminator"):
                assert row.get(name, 0) == pytest.approx(same.get(name, 0), rel=1e-4)
            assert row["norm"] == pytest.approx(same["norm"], rel=1e-3)
        for (path, x), (_, y) in zip(leaves(a["parts"]), leaves(b["parts"]), strict=True):
            if torch.is_tensor(x) and "optimizer" not in path and "muon" not in path:
                # Of weights the median, since AdamW makes a step of full length of a gradient that is all rounding.
                apart = (x - y).abs().float()
                assert apart.max() < 5e-3 if "codebooks" in path else apart.median() < 5e-5, f"{stage}{path}"


@pytest.mark.parametrize("accumulate", [2, 4])
def test_batch_in_parts_is_the_batch(accumulate, tmp_path, wav_folder, joint):
    """With --accumulate N a step is that of the whole batch, codebooks included."""
    train_both_stages(tmp_path, wav_folder, accumulate)
    assert_same_training(joint, tmp_path)


def test_two_processes_are_one(tmp_path, wav_folder, joint):
    """Two processes of torchrun do the steps of one process on the joint batch: weights, codebooks, revived codes."""
    script = tmp_path / "both.py"
    script.write_text(f"import sys\nfrom pathlib import Path\nsys.path.insert(0, {str(HERE)!r})\nimport aar, test_aar\n"
                      f"folder, data = map(Path, ({str(tmp_path)!r}, {str(wav_folder)!r}))\n"
                      "aar.command_line(lambda: test_aar.train_both_stages(folder, data))\n")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)],
                          env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}, capture_output=True, text=True,
                          timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("tokens per 0.2 s") == 1                 # one process speaks
    assert_same_training(joint, tmp_path)


@pytest.mark.parametrize("stage, name", [("sat", "time"), ("aar", "loss")])
def test_stops_at_a_loss_that_is_not_finite(stage, name, tmp_path, wav_folder, monkeypatch):
    """A loss that breaks in the sixth step ends in one line with step, part and the clips; the checkpoint is that of the fifth."""
    made, rate, out = [], aar.learning_rate, tmp_path / "last.pt"

    def learning_rate(step, plan):
        if step == 5:                                                 # as after a step too far
            (made[0].quantizer.phis[0].weight if stage == "sat" else made[0].null).data.fill_(math.nan)
        return rate(step, plan)
    for owner, model in ((train_sat, SAT), (train_aar, AAR)):
        monkeypatch.setattr(owner, model.__name__, lambda config, model=model: made.append(model(config)) or made[-1])
    monkeypatch.setattr(aar, "learning_rate", learning_rate)
    with pytest.raises(UserError) as error:
        small_training(stage, out, wav_folder, steps=8)
    assert re.match(rf"step 5: loss part '{name}' is nan on {re.escape(str(wav_folder))}/\d+.wav, .*last checkpoint", str(error.value))
    state = aar.load_checkpoint(out, stage)
    assert state["step"] == 5 and all(x.isfinite().all() for _, x in leaves(state["parts"]) if torch.is_tensor(x))


@pytest.mark.parametrize("stage", ["sat", "aar"])
def test_a_model_broken_by_its_step_is_not_kept(stage, tmp_path, wav_folder):
    """A learning rate of 100 ends in one line that tells where; if a checkpoint was written, it is whole and can be drawn from."""
    out = tmp_path / "wild.pt"
    for quantize_at in (0, 1):
        with pytest.raises(UserError, match=r"step \d: .* is (nan|inf) on .*smaller --lr"):
            small_training(stage, out, wav_folder, lr=100.0, warm_up=0.0, steps=40, quantize_at=quantize_at)
        state = aar.load_checkpoint(out, stage) if out.exists() else {"parts": {}}
        assert all(x.isfinite().all() for _, x in leaves(state["parts"]) if torch.is_tensor(x))
        for path in tmp_path.glob("wild.*"):
            path.unlink()


@contextlib.contextmanager
def full_disk(size):
    """Inside, no file can become longer than `size` bytes."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


@pytest.mark.parametrize("stage", ["sat", "aar"])
def test_training_on_a_full_disk(stage, tmp_path, wav_folder, capsys):
    """What can be made again is left out and named; a checkpoint that cannot be written ends the run, the last one is kept."""
    out, new = tmp_path / "last.pt", tmp_path / "new.pt"
    small_training(stage, out, wav_folder)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    size = 14_000 if stage == "sat" else 110_000                      # what the workers hand over is written too
    with full_disk(size), pytest.raises(UserError, match="new.pt: cannot be written .*disk full"):
        small_training(stage, new, wav_folder, steps=8, quantize_at=0)
    skipped = capsys.readouterr().err
    assert stage == "sat" or "new.training.pt: cannot be written" in skipped
    assert {path.name: path.read_bytes() for path in tmp_path.glob("last*")} == before and not new.exists()
    assert not list(tmp_path.glob("*.tmp"))


def test_one_run_at_a_time_writes_a_checkpoint(tmp_path):
    """A second one is refused, also by way of a link, until the first ends, however it ends; nothing is left behind."""
    out, link, (read, write) = tmp_path / "sat.pt", tmp_path / "link.pt", os.pipe()
    link.symlink_to(out.name)
    if (pid := os.fork()) == 0:
        with aar.alone(out):
            os.write(write, b"begun")
            signal.pause()
    try:
        assert os.read(read, 5) == b"begun"
        for path in (out, link):
            with pytest.raises(UserError, match="another run"), aar.alone(path):
                pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with aar.alone(link), aar.alone(tmp_path / "other.pt"):
        pass
    assert list(tmp_path.iterdir()) == [link]


def test_no_room_is_known_before_training(tmp_path, monkeypatch):
    """A disk without room for two checkpoints, a folder that is none or cannot be written into: said at once."""
    usage = shutil.disk_usage(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out .*cannot write into"):
        small_training("sat", tmp_path / "file/sat.pt", tmp_path)
    small_training("sat", tmp_path / "sat.pt", None)
    need = 2 * (tmp_path / "sat.pt").stat().st_size
    for share, fits in ((2, True), (0.5, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=int(share * need)))
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match="--out .*are free in"):
            small_training("sat", tmp_path / f"{fits}.pt", None)


def test_finished_runs_and_forgotten_data(tmp_path, wav_folder, capsys):
    """A finished run says so and is not touched; a run on a folder is not resumed on other sounds."""
    for stage in ("sat", "aar"):
        out = tmp_path / f"{stage}.pt"
        small_training(stage, out, wav_folder)
        before = out.read_bytes()
        capsys.readouterr()
        small_training(stage, out, wav_folder, "--resume")
        assert capsys.readouterr().out == f"{out} is finished: all of its 4 steps are done\n" and out.read_bytes() == before
        with pytest.raises(UserError, match="data .* -> "):
            small_training(stage, out, tmp_path, "--resume")


# ---------------------------------------------------------------------------------------------------------------
# Sound files
# ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix, subtype, channels, rate", [
    ("wav", "PCM_U8", 1, 22050), ("wav", "PCM_16", 2, 44100), ("wav", "PCM_24", 8, 48000), ("wav", "PCM_32", 1, 5000),
    ("wav", "FLOAT", 3, 192000), ("wav", "DOUBLE", 1, 24000), ("wav", "ULAW", 1, 8000), ("wav", "PCM_16", 1, 11025),
    ("flac", "PCM_16", 2, 32000), ("flac", "PCM_24", 1, 96000), ("ogg", "VORBIS", 1, 44100), ("ogg", "OPUS", 2, 48000),
    ("mp3", "MPEG_LAYER_III", 2, 44100), ("mp3", "MPEG_LAYER_III", 1, 16000), ("aiff", "PCM_16", 1, 12000)])
def test_load_audio_reads_every_format(tmp_path, suffix, subtype, channels, rate):
    """A sine keeps its pitch, level and length, whatever the format, the rate and the number of channels."""
    path = tmp_path / f"x.{suffix}"
    soundfile.write(path, np.stack([sine(1000, rate)] * channels, 1), rate, subtype=subtype)
    x = load_audio(path, 24000)
    assert x.dtype == torch.float32 and x.shape[0] == 1 and abs(x.shape[1] - 24000) < 100
    assert abs(pitch(x, 24000) - 1000) < 1
    assert x[0, 6000:18000].square().mean().sqrt() == pytest.approx(0.5 / math.sqrt(2), rel=0.05)


@pytest.mark.parametrize("rate", [5000, 24000, 192000])
@pytest.mark.parametrize("samples", [1, 2, 50, 240])
def test_load_audio_of_next_to_nothing(tmp_path, rate, samples):
    """A file of a few samples gives at least one sample, about as many as its length asks for, or the user's error."""
    soundfile.write(tmp_path / "x.wav", sine(440, rate, 1)[1:samples + 1], rate)
    try:
        x = load_audio(tmp_path / "x.wav", 24000)
    except UserError:
        assert samples * 24000 / rate < 1
        return
    assert x.shape[1] >= 1 and abs(x.shape[1] - samples * 24000 / rate) <= 1 and x.isfinite().all()


def test_load_audio_of_ten_milliseconds_of_zeros(tmp_path):
    """Silence is silence."""
    soundfile.write(tmp_path / "x.wav", np.zeros((441, 2)), 44100)
    assert torch.equal(load_audio(tmp_path / "x.wav", 24000), torch.zeros(1, 240))


def test_load_audio_scales_peaks_above_1(tmp_path):
    """Float samples above 1 are scaled to 1, not clipped; others are left alone."""
    x = sine(300, 24000)
    for amplitude in (8.0, 2.0, 1.0):
        soundfile.write(tmp_path / "x.wav", amplitude * x, 24000, subtype="FLOAT")
        got = load_audio(tmp_path / "x.wav", 24000)[0]
        torch.testing.assert_close(got, torch.from_numpy(amplitude * x / max(1, amplitude * 0.5)).float(), rtol=0, atol=1e-5)
    soundfile.write(tmp_path / "x.wav", np.sign(x + 1e-9), 24000)       # the resampler overshoots
    assert load_audio(tmp_path / "x.wav", 16000).abs().max() <= 1


@pytest.mark.parametrize("format", ["AIFF", "FLAC", "OGG", "CAF"])
def test_load_audio_looks_into_the_file(tmp_path, format):
    """A sound under the name of another format is read, and an offset of its samples is left alone."""
    x = 0.3 + sine(500, 24000)
    soundfile.write(tmp_path / "x.wav", x, 24000, format=format)
    apart = load_audio(tmp_path / "x.wav", 24000)[0] - torch.from_numpy(x).float()
    assert apart.abs().max() < (0.04 if format == "OGG" else 1e-4) and apart.mean().abs() < 2e-3     # Vorbis adds some noise


def test_load_audio_averages_the_channels(tmp_path):
    """Two channels are averaged; where they cancel each other, as with one turned over, the sound is still heard."""
    a, b = sine(500, 24000), sine(900, 24000)
    soundfile.write(tmp_path / "x.wav", np.stack([a, b], 1), 24000, subtype="FLOAT")
    torch.testing.assert_close(load_audio(tmp_path / "x.wav", 24000)[0], torch.from_numpy((a + b) / 2).float())
    soundfile.write(tmp_path / "x.wav", np.stack([a, -a], 1), 24000, subtype="FLOAT")
    torch.testing.assert_close(load_audio(tmp_path / "x.wav", 24000)[0].abs(), torch.from_numpy(a).float().abs())


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
@pytest.mark.parametrize("rate", [24000, 44100])
def test_load_audio_reads_a_part(tmp_path, suffix, rate):
    """`seconds` from `start` are those samples of the whole; at the end there are fewer; none are the user's error."""
    t = np.arange(rate) / rate
    soundfile.write(tmp_path / f"x.{suffix}", 0.5 * np.sin(2 * np.pi * (200 * t + 800 * t * t)), rate)
    whole = load_audio(tmp_path / f"x.{suffix}", 24000)[0]
    for start, seconds in ((0.0, 0.3), (0.25, 0.5), (0.9, 0.5)):
        part = load_audio(tmp_path / f"x.{suffix}", 24000, start, seconds)[0]
        want = whole[round(24000 * start):round(24000 * (start + seconds))]
        assert abs(len(part) - len(want)) <= 1
        inner = slice(100, min(len(part), len(want)) - 100)           # the resampler needs a run-up
        torch.testing.assert_close(part[inner], want[inner], rtol=0, atol=0.02)
    with pytest.raises(UserError):
        load_audio(tmp_path / f"x.{suffix}", 24000, 5.0, 1.0)


@pytest.mark.parametrize("content", [b"", b"RIFF", b"<html>404</html>", b"RIFF\xff\xff\xff\xffWAVEfmt ", bytes(5000),
                                     np.random.default_rng(0).bytes(5000)], ids=lambda c: repr(c[:16]))
@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg", "raw", "txt"])
def test_load_audio_refuses_what_is_no_sound(tmp_path, content, suffix):
    """A file that holds no sound is the user's error, whatever its name."""
    (tmp_path / f"x.{suffix}").write_bytes(content)
    with pytest.raises(UserError, match="x." + suffix):
        load_audio(tmp_path / f"x.{suffix}", 24000)


def test_load_audio_refuses_other_things(tmp_path):
    """No file, a folder, a file without samples, and samples that are no numbers are the user's error."""
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 24000)
    for name, value in (("nan.wav", np.nan), ("inf.wav", np.inf)):
        soundfile.write(tmp_path / name, np.r_[np.zeros(99), value], 24000, subtype="FLOAT")
    for name in ("absent.wav", "", "none.wav", "nan.wav", "inf.wav"):
        with pytest.raises(UserError):
            load_audio(tmp_path / name, 24000)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "aiff"])
@pytest.mark.parametrize("share", [0.0005, 0.3, 0.9, 0.9999])
def test_load_audio_of_a_truncated_file(tmp_path, suffix, share):
    """A file that breaks off gives its beginning, or it is the user's error."""
    path, t = tmp_path / f"x.{suffix}", np.arange(48000) / 24000
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * (200 * t + 800 * t * t)), 24000)
    whole, data = load_audio(path, 24000)[0], path.read_bytes()
    path.write_bytes(data[:int(share * len(data))])
    try:
        x = load_audio(path, 24000)[0]
    except UserError:
        return
    n = min(len(x), int(0.8 * share * len(whole)))
    assert 0 < len(x) <= len(whole) + 2000
    torch.testing.assert_close(x[:n], whole[:n], rtol=0, atol=0.02)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "aiff", "caf", "w64", "au"])
def test_load_audio_of_damaged_files(tmp_path, suffix):
    """Random bytes anywhere in a file, most often in its header: finite samples, or the user's error."""
    path, rng = tmp_path / f"x.{suffix}", np.random.default_rng(0)
    soundfile.write(path, sine(440, 8000, 0.2), 8000)
    good, read = np.frombuffer(path.read_bytes(), np.uint8), 0
    for i in range(60):
        data, places = good.copy(), rng.integers((len(good), 60)[i % 3 > 0], size=rng.integers(1, 8))
        data[places] = rng.integers(256, size=len(places))
        path.write_bytes(data)
        for part in ((), (0.05, 0.1)):
            try:
                x = load_audio(path, 24000, *part)
            except UserError as e:
                assert str(path) in str(e) and "\n" not in str(e)
                continue
            assert x.ndim == 2 and len(x) == 1 and x.isfinite().all() and x.abs().max() <= 1
            read += 1
    assert read or suffix == "ogg"                                    # which has checksums


@pytest.mark.parametrize("suffix, subtype", [("wav", "PCM_U8"), ("flac", "PCM_16"), ("ogg", "VORBIS")])
def test_load_audio_reads_a_second_of_an_hour(tmp_path, suffix, subtype):
    """A second in the middle of an hour takes the memory of a second."""
    path = tmp_path / f"x.{suffix}"
    with soundfile.SoundFile(path, "w", 5000, 1, subtype) as file:
        for _ in range(60):
            file.write(np.zeros(300000))
    tracemalloc.start()
    x = SoundFolder(tmp_path, 5000, 5000)[0][0]
    assert x.shape == (1, 5000) and load_audio(path, 24000, 1800, 1).shape == (1, 24000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6                                                 # an hour would be 72 MB


def test_save_audio(tmp_path):
    """What is saved is loaded, to 16 bits, clipped at 1."""
    x = noise(1, 5000) * 5
    aar.save_audio(tmp_path / "x.wav", x, 24000)
    torch.testing.assert_close(load_audio(tmp_path / "x.wav", 24000), x.clamp(-1, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", aar.TOYS)
def test_toy_sounds(kind):
    """Each kind is audible, finite, within -1 .. 1, of the length asked for; the same for the same place and seed only."""
    i = aar.TOYS.index(kind)
    data, other = ToySounds(24000, 24000), ToySounds(24000, 24000, seed=1)
    held_back = ToySounds(24000, 24000, held_back=True)
    wav, name = data[i]
    assert name.startswith(kind) and wav.shape == (1, 24000) and wav.dtype == torch.float32
    assert wav.isfinite().all() and 0.2 < wav.abs().max() <= 1
    assert torch.equal(wav, ToySounds(24000, 24000)[i][0])
    assert not any(torch.equal(wav, x[0]) for x in (data[i + 10], other[i], held_back[i]))


def noise_folder(folder, names, rate=8000, seconds=0.5):
    """Write a sound of noise for each name; returns {path: samples}."""
    written = {}
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        x = np.random.default_rng(i).uniform(-0.5, 0.5, round(seconds * rate)).astype(np.float32)
        soundfile.write(path, x, rate, format="WAV", subtype="FLOAT")
        written[str(path)] = x
    return written


def test_folder_items_are_windows_of_its_files(tmp_path):
    """Item i is a piece of the file that it names, the same whenever it is asked for; every epoch visits each file once;
    names with spaces, umlauts, capitals, in folders within folders and in a loop of links are found once."""
    names = ["a b.wav", "ä ö ü.wav", "deep/er/c.WAV", "日本.wav", "'quote\".wav", "-n.wav", "%d{}.wav", "x.y.z.wav"]
    written = noise_folder(tmp_path, names)
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "notes.txt").write_text("no sound, and no sound by its name")
    data, again, other = (SoundFolder(tmp_path, 8000, 1600, seed) for seed in (0, 0, 1))
    held = SoundFolder(tmp_path, 8000, 1600, held_back=True)
    n = len(names) - len(held)
    items = [data[i] for i in range(3 * n)]
    for wav, name in items:
        x, wav = written[name], wav[0].numpy()
        places = np.flatnonzero(x == wav[0])
        assert wav.shape == (1600, ) and any(np.array_equal(x[p:p + 1600], wav) for p in places)
    epochs = [[name for _, name in items[e * n:(e + 1) * n]] for e in range(3)]
    assert all(sorted(epoch) == sorted(set(written) - {held[0][1]}) for epoch in epochs) and epochs[0] != epochs[1]
    assert all(torch.equal(wav, again[i][0]) and name == again[i][1] for i, (wav, name) in reversed(list(enumerate(items))))
    assert any(not torch.equal(wav, other[i][0]) for i, (wav, _) in enumerate(items))
    assert not torch.equal(items[0][0], next(data[i][0] for i in range(n, 2 * n) if data[i][1] == items[0][1]))


def test_folder_holds_back_the_same_files_when_it_grows(tmp_path):
    """About 5% are held back, never trained on; more files, or the folder in another place, move no file across."""
    def split(folder):
        return [{Path(p).relative_to(folder).as_posix() for p, _ in SoundFolder(folder, 8000, 80, held_back=h).files} for h in (True, False)]
    noise_folder(tmp_path / "a", [f"{i}.wav" for i in range(0, 200, 2)], seconds=0.01)
    held, train = split(tmp_path / "a")
    assert not held & train and len(held | train) == 100 and 1 <= len(held) <= 15
    noise_folder(tmp_path / "a", [f"{i}.wav" for i in range(1, 200, 2)], seconds=0.01)
    more_held, more_train = split(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert split(tmp_path / "b") == [more_held, more_train]
    assert held <= more_held and train <= more_train and len(more_held | more_train) == 200


@pytest.mark.parametrize("n", [1, 2, 3])
def test_folder_of_few_files(tmp_path, n):
    """One file serves both purposes, of more none does; a short sound is filled up with silence."""
    noise_folder(tmp_path, [f"{i}.wav" for i in range(n)], seconds=0.1)
    data, held = (SoundFolder(tmp_path, 8000, 1600, held_back=h) for h in (False, True))
    assert len(held) == 1 and (n == 1 or held[0][1] not in {data[i][1] for i in range(9)})
    for i in range(5):
        wav, name = data[i]
        assert wav[0, 800:].abs().max() == 0 < wav[0, :800].abs().max()


def test_folder_looks_for_sound_in_silence(tmp_path):
    """Of a file that is 70% silent most windows are not silent."""
    for i in range(2):
        soundfile.write(tmp_path / f"{i}.wav", np.r_[np.zeros(70000), noise(30000).numpy()], 8000)
    data = SoundFolder(tmp_path, 8000, 800)
    assert sum(bool(data[i][0].abs().max() > 0) for i in range(60)) > 30


def test_folder_keeps_the_loudest_of_silent_places(tmp_path, monkeypatch):
    """Where four places are silent, the loudest of them is heard, whichever came first; the first that is not silent ends it."""
    load, heard = aar.load_audio, []
    monkeypatch.setattr(aar, "load_audio", lambda *args: heard.append(load(*args)) or heard[-1])
    soundfile.write(tmp_path / "x.wav", np.random.default_rng(0).standard_normal(80000) * np.logspace(-9, -1, 80000), 8000, subtype="FLOAT")
    data, silent = SoundFolder(tmp_path, 8000, 800), 0
    for i in range(40):
        heard.clear()
        wav, levels = data[i][0], [x.square().mean().item() for x in heard]
        assert wav.square().mean().item() == max(levels) and max(levels[:-1], default=0) <= 1e-6
        assert len(heard) == 4 or levels[-1] > 1e-6
        silent += levels[-1] <= 1e-6
    assert 5 < silent < 35


def test_folder_of_millions(tmp_path):
    """Items of a folder of five million files cost about as much as those of a small one: they are shuffled once an epoch."""
    noise_folder(tmp_path, ["x.wav"])
    data = SoundFolder(tmp_path, 8000, 800)
    data.files, data.broken = data.files * 5_000_000, torch.zeros(5_000_000, dtype=torch.bool)
    data[0]
    since = time.process_time()
    for i in range(1, 100):
        data[i]
    assert time.process_time() - since < 1


def test_folder_skips_and_names_bad_files(tmp_path, capsys):
    """Files that break when opened or only when read are skipped and named; the others are still all visited."""
    good = noise_folder(tmp_path, [f"good-{i}-.wav" for i in range(12)])
    (tmp_path / "text.wav").write_text("no sound")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 8000)
    for i in range(3):
        soundfile.write(tmp_path / f"nan{i}.wav", np.full(4000, np.nan), 8000, subtype="FLOAT")
    data = SoundFolder(tmp_path, 8000, 1600)
    assert {p.name for p in data.bad} == {"text.wav", "empty.wav"} and "2 unreadable" in repr(data)
    names = {data[i][1] for i in range(3 * len(data.files))}
    assert names == {str(p) for p, _ in data.files} & set(good)
    skipped = capsys.readouterr().err
    for path, _ in data.files:
        assert skipped.count(path.name) == (1 if path.name.startswith("nan") else 0)


def test_folder_names_a_bad_file_once_in_all_workers(tmp_path, capfd):
    """However many processes read, for however many epochs, the windows are the same and a file that breaks is named once."""
    noise_folder(tmp_path, [f"good{i}.wav" for i in range(5)])
    for i in range(3):
        soundfile.write(tmp_path / f"nan{i}.wav", np.full(4000, np.nan), 8000, subtype="FLOAT")
    data = SoundFolder(tmp_path, 8000, 800)
    want = [data[i] for i in range(60)]
    fresh = SoundFolder(tmp_path, 8000, 800)
    capfd.readouterr()
    for (wav, name), (x, y) in zip(want, torch.utils.data.DataLoader(fresh, 1, sampler=range(60), num_workers=3)):
        assert torch.equal(wav, x[0]) and (name,) == tuple(y)
    skipped, reads = capfd.readouterr().err, {name for _, name in want}
    nans = [str(path) for path, _ in fresh.files if path.name.startswith("nan")]
    assert nans and all(skipped.count(path) == 1 for path in nans) and not reads & set(nans)


def test_folder_of_odd_files(tmp_path):
    """Links that lead nowhere or in a circle, a pipe, a name that is no text, files and folders without permission: skipped."""
    folder = tmp_path / "x"
    good = noise_folder(folder, [f"good-{i}.wav" for i in range(6)])
    (folder / "nowhere.wav").symlink_to("absent.wav")
    (folder / "circle.wav").symlink_to("circle.wav")
    (folder / "link.wav").symlink_to("good-0.wav")
    os.mkfifo(folder / "pipe.wav")
    noise_folder(folder, ["locked.wav", "locked/inside.wav"])
    shutil.copy(folder / "good-0.wav", os.fsencode(folder) + b"/\xff\xe4.wav")
    private = {path: path.stat().st_mode for path in tmp_path.parents if not path.stat().st_mode & 0o005}
    private[tmp_path] = 0o700
    (folder / "locked.wav").chmod(0)
    (folder / "locked").chmod(0)
    try:
        if os.getuid() == 0:                                          # nothing is locked for root: be somebody else
            for path in private:
                path.chmod(0o755)
            os.seteuid(65534)
        with contextlib.redirect_stderr(io.StringIO()) as err:
            data = SoundFolder(folder, 8000, 1600)
            names = {data[i][1] for i in range(3 * len(data.files))}
        with pytest.raises(UserError, match="locked.wav"):
            load_audio(folder / "locked.wav", 8000)
    finally:
        os.seteuid(os.getuid())
        for path, mode in private.items() if os.getuid() == 0 else ():
            path.chmod(mode)
        (folder / "locked").chmod(0o700)
    skipped = err.getvalue()
    for name in ("nowhere.wav", "circle.wav", "pipe.wav", "locked.wav", "locked", "\udcff\udce4.wav"):
        assert re.search(rf"skipped {re.escape(str(folder / name))}: ", skipped)
    assert names <= set(good) | {str(folder / "link.wav")} and len(names) == len(data.files)


def test_folder_of_nothing_readable(tmp_path):
    """No folder, no files, no sounds, mostly broken files, and files that all break when read are the user's error."""
    for name in ("absent", "nothing", "other", "broken", "nan"):
        folder = tmp_path / name
        if name != "absent":
            folder.mkdir()
        if name == "other":
            (folder / "x.txt").write_text("no sound")
        if name == "broken":
            noise_folder(folder, ["x.wav"])
            for i in range(3):
                (folder / f"{i}.wav").write_text("no sound")
        if name == "nan":
            soundfile.write(folder / "x.wav", np.full(4000, np.nan), 8000, subtype="FLOAT")
        with pytest.raises(UserError):
            SoundFolder(folder, 8000, 1600)[0]
    with pytest.raises(UserError, match="no such folder"):
        SoundFolder("", 8000, 1600)


@pytest.mark.parametrize("good, bad", [(3, 3), (3, 4), (1, 1), (0, 1), (4, 1), (1, 5)])
def test_folder_stops_when_most_files_break(tmp_path, good, bad):
    """Files that break only when they are read are borne up to a half of all."""
    noise_folder(tmp_path, [f"{i}.wav" for i in range(good)])
    for i in range(bad):
        soundfile.write(tmp_path / f"nan{i}.wav", np.full(4000, np.nan), 8000, subtype="FLOAT")
    data = SoundFolder(tmp_path, 8000, 1600)
    data.files = [(path, 0.5) for path in sorted(tmp_path.iterdir())]                   # without any held back
    data.broken = torch.zeros(good + bad, dtype=torch.bool)
    with pytest.raises(UserError, match=f"{bad} of {good + bad}|cannot be read") if bad > good else contextlib.nullcontext():
        for i in range(4 * (good + bad)):
            data[i]


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------

class Evil:
    def __reduce__(self):
        return Path.touch, (Path("evil"),)


def save(path, kind, model, **extra):
    """Write a checkpoint as training does."""
    aar.save_checkpoint(path, kind, model.config, small_plan(), 1, [], {kind: model}, **extra)
    return path


def test_checkpoint_round_trip(tmp_path):
    """A loaded tokenizer and generator are frozen and do what the saved ones did."""
    sat = small_sat(seconds=0.06)
    model = small_aar(sat)
    sat2 = aar.load_sat(save(tmp_path / "sat.pt", "sat", sat))
    model2, embedder, _ = aar.load_aar(save(tmp_path / "aar.pt", "aar", model, sat=aar.fingerprint(sat), embedder="mel", clap=""), sat2)
    x, cond = noise(2, 1, 480), torch.randn(2, 5)
    assert sat2.config == sat.config and model2.config == model.config and embedder == "mel"
    assert torch.equal(sat(x)[0], sat2(x)[0])
    a, b = (m.generate(cond, s, generator=torch.Generator().manual_seed(0)) for m, s in ((model, sat), (model2, sat2)))
    assert torch.equal(torch.cat(a, 1), torch.cat(b, 1))
    assert not any(p.requires_grad or m.training for m in (sat2, model2) for p in m.parameters())
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["aar.pt", "sat.pt"]


def test_generator_of_another_tokenizer_is_refused(tmp_path):
    """A generator knows the tokens of the one tokenizer that it was trained with; the least change of weights is another."""
    sat = small_sat()
    path = save(tmp_path / "aar.pt", "aar", small_aar(sat), sat=aar.fingerprint(sat), embedder="mel")
    other = copy.deepcopy(sat)
    other.quantizer.codebooks[2].codes[3, 1] += 1e-6
    with pytest.raises(UserError, match="another tokenizer|--sat"):
        aar.load_aar(path, other)


def test_what_is_no_checkpoint_is_refused(tmp_path, monkeypatch):
    """Of the wrong stage, version or program, truncated, a folder, absent: the user's error; and no code in it runs."""
    monkeypatch.chdir(tmp_path)
    good = save(Path("good.pt"), "aar", small_aar(small_sat()), sat="", embedder="mel").read_bytes()
    for n in (0, 10, 1000, len(good) // 2, len(good) - 10):
        Path(f"truncated-{n}.pt").write_bytes(good[:n])
    contents = {"list": [1, 2], "bare": {"weight": torch.ones(2)}, "other": {"kind": "sat"}, "tensor": torch.ones(2), "none": None,
                "new": torch.load("good.pt", weights_only=True) | {"kind": "sat", "version": aar.VERSION + 1}, "evil": {"kind": Evil()}}
    for name, content in contents.items():
        torch.save(content, f"{name}.pt")
    Path("evil.pickle").write_bytes(pickle.dumps({"kind": Evil()}, protocol=2))
    Path("text.pt").write_text("<html>404</html>")
    Path("folder").mkdir()
    for path in sorted(Path().iterdir()) + [Path("absent.pt")]:
        with pytest.raises(UserError, match=re.escape(str(path))):
            aar.load_sat(path)
    assert not Path("evil").exists()


def test_checkpoint_is_whole_at_any_moment(tmp_path, monkeypatch):
    """If writing fails, whenever, the old checkpoint is still there, whole, and no other file; a link to it stays a link."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "sat.pt").symlink_to("folder/sat.pt")
    path = save(tmp_path / "sat.pt", "sat", small_sat())
    old = path.read_bytes()
    for size in (0, 100, len(old) // 2, len(old) - 1):
        with full_disk(size), pytest.raises(UserError, match="cannot be written"):
            save(path, "sat", small_sat())
        assert path.read_bytes() == old and path.is_symlink()
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["sat.pt"]


def test_damaged_checkpoints(tmp_path):
    """Whatever byte of a checkpoint changes, it is refused or loads as it was; and so does one of which the end is missing."""
    rng, sat = random.Random(0), small_sat(width=2, n_scales=2, phis=1)
    path, bad = save(tmp_path / "sat.pt", "sat", sat), tmp_path / "bad.pt"
    good, want, refused = path.read_bytes(), aar.fingerprint(sat), 0
    data = good.index(b"data/0")
    for i in range(200):
        content, place = bytearray(good), rng.choice((rng.randrange(len(good)), rng.randrange(data), rng.randrange(len(good) - 2000, len(good))))
        content[place] ^= 1 << rng.randrange(8)
        bad.write_bytes(content[:place] if i % 10 == 0 else content)
        try:
            assert aar.fingerprint(aar.load_sat(bad)) == want
        except UserError as e:
            assert str(e).startswith(f"{bad}: ") and "\n" not in str(e)
            refused += 1
    assert refused > 100
    for i in range(60):                                               # nothing of a checkpoint but, perhaps, its beginning
        bad.write_bytes((b"", b"PK\3\4", b"\x80\2", good[:data])[i % 4] + rng.randbytes(rng.choice((1, 50, 5000))))
        for load in (aar.load_sat, lambda path: CLAP(path, 8000)):
            with pytest.raises(UserError, match=re.escape(str(bad))):
                load(bad)


@pytest.mark.parametrize("stage", ["sat", "aar"])
def test_checkpoints_that_do_not_fit(stage, tmp_path, wav_folder):
    """Of another version of the program, or with anything missing or of another kind: refused in one line, also by --resume."""
    path, sat = tmp_path / "x.pt", small_sat(decay=0.2)
    small_training(stage, path, wav_folder)
    good = torch.load(path, weights_only=True)
    part = good["parts"][stage]
    first, weight = next(iter(part.items()))
    changes = [{"config": good["config"] | more} for more in ({"new": 1}, {"V": "16"}, {"V": -1})] + [{"config": None}, {"config": {}}]
    changes += [{"parts": {stage: part | {first: other}}} for other in (weight[:0], "text")] + [{"parts": {}}, {"parts": 3}, {"parts": {stage: {}}}]
    changes += [{"sat": None}] if stage == "aar" else []
    for change in changes:
        torch.save(good | change, path)
        with pytest.raises(UserError, match=re.escape(str(path))) as error:
            aar.load_sat(path) if stage == "sat" else aar.load_aar(path, sat)
        assert "\n" not in str(error.value)
    for change in {"config": None}, {"parts": {}}, {"rng": {}}, {"rng": {"cpu": 1}}, {"plan": None}, {"seed": 9}:
        torch.save(good | change, path)
        with pytest.raises(UserError) as error:
            small_training(stage, path, wav_folder, "--resume")
        assert "\n" not in str(error.value)


def test_swapped_checkpoints(tmp_path):
    """A generator given as the tokenizer, or the reverse, is recognised as such."""
    sat = small_sat()
    a, b = save(tmp_path / "a.pt", "sat", sat), save(tmp_path / "b.pt", "aar", small_aar(sat), sat="", embedder="mel", clap="")
    with pytest.raises(UserError, match="b.pt: a checkpoint of train_aar.py, wanted one of train_sat.py: .*swapped"):
        aar.load_sat(b)
    with pytest.raises(UserError, match="a.pt: a checkpoint of train_sat.py, wanted one of train_aar.py: .*swapped"):
        aar.load_aar(a, sat)


# ---------------------------------------------------------------------------------------------------------------
# Conditioning
# ---------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_mel_embedder():
    """Unit length, each clip for itself; nearer for the same toy at another level than for any other kind of toy; silence too."""
    embedder = MelEmbedder(24000)
    x = torch.stack([ToySounds(24000, 24000)[i][0] for i in range(10)])
    e, quiet = embedder(x), embedder(0.7 * x)
    assert e.shape == (10, embedder.dim)
    torch.testing.assert_close(e.norm(dim=1), torch.ones(10))
    torch.testing.assert_close(torch.cat([embedder(clip[None]) for clip in x]), e)
    assert torch.equal(torch.cdist(quiet, e).argmin(1), torch.arange(10))
    assert embedder(torch.zeros(1, 1, 24000)).isfinite().all()


def fake_clap_checkpoint(path, size="tiny", text_width=64, prefix="module."):
    """Write a checkpoint file in laion-clap's format with random weights; text_width 0: without the text half."""
    def projection(width):
        return nn.Sequential(nn.Linear(width, 512), nn.ReLU(), nn.Linear(512, 512))

    parts = {"audio_branch": aar.htsat(size), "audio_projection": projection({"tiny": 768, "base": 1024}[size])}
    if text_width:
        from transformers import RobertaConfig, RobertaModel
        parts["text_branch"] = RobertaModel(RobertaConfig(
            vocab_size=50265, hidden_size=text_width, num_hidden_layers=1, num_attention_heads=text_width // 64,
            intermediate_size=4 * text_width, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1))
        parts["text_projection"] = projection(text_width)
    state = {f"{prefix}{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}
    state[prefix + "logit_scale_a"] = torch.tensor(2.66)              # one of the tensors that CLAP leaves alone
    if text_width:
        state[prefix + "text_branch.embeddings.position_ids"] = torch.arange(514)[None]
    torch.save({"epoch": 1, "name": "fake", "state_dict": state, "loss": np.float64(0.5), "step": np.int64(7)}, path)
    return path


def fake_tokenizer(folder, size=50265):
    """Write vocab.json and merges.txt: RoBERTa's special tokens, letters, a space, "ra", and fillers; returns the vocabulary."""
    words = ["<s>", "<pad>", "</s>", "<unk>", *map(chr, range(33, 127)), "\u0120", "ra"]
    words += [f"filler{i}" for i in range(size - len(words) - 1)] + ["<mask>"]
    vocab = {word: i for i, word in enumerate(words)}
    Path(folder, "vocab.json").write_text(json.dumps(vocab))
    Path(folder, "merges.txt").write_text("#version: 0.2\nr a\n")
    return vocab


@pytest.fixture(scope="module")
def clap_file(tmp_path_factory):
    torch.manual_seed(0)
    return fake_clap_checkpoint(tmp_path_factory.mktemp("clap") / "clap.pt")


@pytest.fixture(scope="module")
def clap(clap_file):
    return CLAP(clap_file, 48000)


@pytest.fixture
def no_network(monkeypatch):
    """Every attempt to reach another machine is noted, and fails."""
    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise OSError("no network in this test")
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return attempts


quiet_clap = pytest.mark.filterwarnings("ignore:torch.meshgrid")      # laion-clap's


@quiet_clap
def test_clap_is_frozen_of_unit_length_and_offline(clap_file, no_network):
    """Building it draws no random number of ours, training a parent does not wake it, and nothing is asked of the network."""
    seed = torch.get_rng_state()
    clap = CLAP(clap_file, 48000)
    assert torch.equal(seed, torch.get_rng_state())
    e = nn.ModuleList([clap.train()]).eval()[0](noise(2, 1, 48000))
    assert e.shape == (2, clap.dim) and e.dtype == torch.float32 and not e.requires_grad
    torch.testing.assert_close(e.norm(dim=1), torch.ones(2))
    assert not any(p.requires_grad for p in clap.parameters())
    assert "laion_clap" not in sys.modules and not no_network


@quiet_clap
def test_clap_hears_ten_seconds(clap):
    """A short sound is repeated whole and padded; of a long one the first 10 s count; each clip of a batch for itself."""
    x, long = noise(1, 1, 201600), noise(1, 1, 576000)
    by_hand = torch.cat([x, x, torch.zeros(1, 1, 480000 - 2 * x.shape[2])], dim=2)
    torch.testing.assert_close(clap(x), clap(by_hand), rtol=0, atol=1e-6)
    torch.testing.assert_close(clap(long), clap(long[..., :480000]), rtol=0, atol=1e-6)
    both = torch.cat([by_hand, long[..., :480000]])
    torch.testing.assert_close(clap(both), torch.cat([clap(by_hand), clap(long)]), atol=1e-5, rtol=0)
    assert (clap(x) - clap(long)).norm() > 1e-3
    with torch.autocast("cpu", torch.bfloat16):                       # half precision outside does not reach in
        torch.testing.assert_close(clap(x), clap(by_hand), rtol=0, atol=1e-6)


@quiet_clap
def test_clap_hears_the_same_at_another_rate(clap_file, clap):
    """The same sine written at two rates sounds alike, and unlike one of twice the pitch."""
    def heard(model, hz):
        return model(torch.from_numpy(sine(hz, model.sample_rate, 5)).float()[None, None])
    here, there, octave = heard(clap, 440), heard(CLAP(clap_file, 24000), 440), heard(clap, 880)
    assert (here - there).norm() < 0.2 * (here - octave).norm()


@quiet_clap
def test_clap_of_base_size_with_plain_names(tmp_path):
    """HTSAT-base is told from HTSAT-tiny by its tensors; neither "state_dict" nor "module." nor a text half are needed."""
    path = fake_clap_checkpoint(tmp_path / "base.pt", size="base", text_width=0, prefix="")
    torch.save(torch.load(path, weights_only=False)["state_dict"], path)
    clap = CLAP(path, 48000)
    assert clap.audio_projection[0].in_features == 1024 and clap(noise(1, 1, 48000)).shape == (1, 512)
    with pytest.raises(UserError, match="no text half"):
        clap.text(["a dog"])


def test_clap_text_equals_roberta_by_hand(clap_file, clap, no_network):
    """Token by token with a naive tokenizer, unpadded; only the first 77 tokens count; different words, different vectors."""
    vocab = fake_tokenizer(clap_file.parent)
    prompts = ["rain on a train", "dog barks " * 20]
    e = clap.text(prompts)
    assert e.shape == (2, 512) and e.dtype == torch.float32 and not e.requires_grad and not no_network
    for prompt, got in zip(prompts, e):
        words = re.findall("ra|.", prompt.replace(" ", "\u0120"))[:75]
        ids = torch.tensor([[0, *(vocab[word] for word in words), 2]])                       # <s> ... </s>
        want = F.normalize(clap.text_projection(clap.text_branch(ids).pooler_output)[0], dim=0)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert (e[0] - e[1]).norm() > 1e-3


def test_clap_without_its_tokenizer(clap_file, no_network, tmp_path, monkeypatch):
    """A tokenizer that is absent, broken, or of another size is the user's error, and can be mended without a new start."""
    folder = clap_file.parent
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    clap = CLAP(clap_file, 48000)

    def refused(match):
        with pytest.raises(UserError, match=match + ".*vocab.json and merges.txt.*" + re.escape(str(folder))):
            clap.text(["rain"])
    fake_tokenizer(folder)
    (folder / "merges.txt").unlink()
    refused("has 0 of its 50265 tokens")
    fake_tokenizer(folder, size=300)
    refused("has 300 of its 50265 tokens")
    (folder / "vocab.json").write_text("<html>404</html>")
    refused("has 0 of its 50265 tokens")
    fake_tokenizer(folder)
    assert clap.text(["rain"]).shape == (1, 512) and not no_network


def test_clap_numbers_of_either_numpy(tmp_path):
    """numpy scalars in a checkpoint are read, whichever numpy wrote them, in torch's old format too."""
    path = tmp_path / "old.pt"
    torch.save({"state_dict": {"module.a": torch.ones(2)}, "loss": np.float64(1), "lr": np.float32(1), "step": np.int64(1)}, path,
               _use_new_zipfile_serialization=False)
    for core in (b"core", b"_core"):
        data, found = re.subn(rb"numpy\._?core\.", b"numpy." + core + b".", path.read_bytes())
        path.write_bytes(data)
        assert found and list(aar.clap_tensors(path)) == ["a"]


def test_what_is_no_clap_is_refused(tmp_path, clap_file, monkeypatch):
    """Foreign, truncated, absent files and other tensors are the user's error, which tells where to get the right one."""
    monkeypatch.chdir(tmp_path)
    good = torch.load(clap_file, weights_only=False)["state_dict"]
    width = "module.audio_branch.patch_embed.proj.bias"
    fusion = "module.audio_branch.patch_embed.fusion_model.local_att.0.weight"
    contents = {"list": [1, 2], "none": {"state_dict": None}, "odd": {"state_dict": {1: 2, width: "x"}}, "evil": {"state_dict": Evil()},
                "other": {"weight": torch.zeros(3)}, "wide": {width: torch.zeros(256)}, "bare": {width: torch.zeros(96)},
                "less": {k: v for k, v in good.items() if "audio_projection" not in k}, "fusion": good | {fusion: torch.zeros(1)}}
    for name, content in contents.items():
        torch.save(content, f"{name}.pt")
    Path("text.pt").write_text("<html>404</html>")
    Path("empty.pt").touch()
    Path("short.pt").write_bytes(clap_file.read_bytes()[:100_000])
    Path("evil.pickle").write_bytes(pickle.dumps({"state_dict": Evil()}, protocol=2))
    for path in sorted(Path().iterdir()) + [Path("absent.pt")]:
        with pytest.raises(UserError, match="630k-audioset-best.pt"):
            CLAP(path, 48000)
    assert not Path("evil").exists()
    with pytest.raises(UserError, match="630k-audioset-best.pt"):
        aar.build_embedder("clap", 24000)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        CLAP(clap_file, 48000)


def test_another_version_of_the_stand_in_is_refused():
    """A generator is used with the very embedder that it was trained with: what the stand-in computes is in its fingerprint."""
    embedder, other = MelEmbedder(8000), MelEmbedder(8000)
    other.pitch[3] *= 1.01
    assert aar.build_embedder("mel", 8000, None, aar.fingerprint(embedder)).dim == 512
    with pytest.raises(UserError, match="mel embedder"):
        aar.build_embedder("mel", 8000, None, aar.fingerprint(other))


# ---------------------------------------------------------------------------------------------------------------
# Measures of generated sounds
# ---------------------------------------------------------------------------------------------------------------

def naive_frechet(a, b):
    """The formula: numpy's covariances and the square roots of the eigenvalues of their product."""
    a, b = a.double().numpy(), b.double().numpy()
    S, T = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(S @ T).real.clip(0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(S) + np.trace(T) - 2 * root


@pytest.mark.parametrize("n, m, C", [(50, 80, 6), (300, 40, 40), (5, 7, 30), (2, 200, 10)])
def test_frechet_distance_equals_the_formula(n, m, C):
    """For correlated numbers, for more and for fewer clips than numbers; the same either way round; 0 to itself."""
    a, b = torch.randn(n, C) @ torch.randn(C, C) + 1, torch.randn(m, C) @ torch.randn(C, C)
    assert aar.frechet(a, b) == pytest.approx(naive_frechet(a, b), rel=1e-4)
    assert aar.frechet(a, b) == pytest.approx(aar.frechet(b, a), rel=1e-9)
    assert aar.frechet(a, a) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_equals_a_matrix_square_root():
    """Where both covariances have an inverse: tr (S T)^1/2 by scipy's square root; and by hand in one dimension."""
    from scipy.linalg import sqrtm
    a, b = torch.randn(60, 8) @ torch.randn(8, 8), 0.5 * torch.randn(50, 8) + 1e3       # a mean that float32 would not stand
    S, T = np.cov(a.double().T), np.cov(b.double().T)
    want = (a.double().mean(0) - b.double().mean(0)).square().sum().item() + np.trace(S + T - 2 * sqrtm(S @ T).real)
    assert aar.frechet(a, b) == pytest.approx(want, rel=1e-9)
    x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [14.0]])                 # deviations sqrt(2), sqrt(8)
    assert aar.frechet(x, y) == pytest.approx(11 ** 2 + 2)
    for few in (x[:1], x[:0]):
        with pytest.raises(UserError, match="at least 2"):
            aar.frechet(few, y)


def test_neighbours_of_the_same_kind():
    """Counted by hand: the nearest OTHER sound by angle, kinds by folder or, for toys, by name, chance over all pairs."""
    angles = torch.tensor([0.0, 1, 40, 42, 90, 91]).deg2rad()
    e = torch.stack([angles.cos(), angles.sin()], 1)
    paths = ["x/dog/1.wav", "y/dog/2.wav", "x/cat/1.wav", "x/dog/3.wav", "x/rain/1.wav", "x/rain/dog.wav"]
    toys = ["dog-0", "dog-11", "cat-2", "dog-23", "rain-4", "rain-15"]
    for names in (paths, toys):
        assert "67% of 6 sounds (chance 27%)" in aar.neighbours(e, names)               # 4 of 6; 3 + 1 of 15 pairs
    assert "one kind" in aar.neighbours(e, ["x/1.wav"] * 6)


@pytest.mark.parametrize("n", [4, 9, 100])
def test_rank_of_the_reference(n):
    """A loop over the candidates; own reference first for perfect sounds, last for silence, in the middle for anything else."""
    references, y = F.normalize(torch.randn(9, 5), dim=1), F.normalize(torch.randn(9, 5), dim=1)
    want = [1 + sum(float(y[i] @ references[(i + j) % 9]) >= float(y[i] @ references[i]) for j in range(1, min(n, 9))) for i in range(9)]
    assert train_aar.ranks(y, references, n).tolist() == want
    assert train_aar.ranks(references, references, n).tolist() == [1] * 9
    assert train_aar.ranks(0 * y, references, n).tolist() == [min(n, 9)] * 9
    y, references = F.normalize(torch.randn(2, 500, 5), dim=2)
    assert 45 < train_aar.ranks(y, references).float().mean() < 56


@torch.no_grad()
def test_free_running_accuracy(pair):
    """Right is the code nearest to what the model's own scales leave of the sound: a loop over all codes, token by token."""
    sat, model = pair
    f, cond = sat.latents(noise(2, 1, sat.config.samples)), torch.randn(2, 5)
    right = train_aar.free_running(model, sat, f, cond)
    r = model.generate(cond, sat, cfg=0, top_k=1)
    at, f_hat = 0, torch.zeros_like(f)
    for k, s in enumerate(sat.config.scales):
        codes = sat.quantizer.codebooks[k].codes
        for b, j in itertools.product(range(2), range(s)):
            left = naive_down((f - f_hat)[b].T.numpy(), s)[j]
            nearest = np.square(codes.numpy() - left).sum(1).argmin()
            assert right[b, at + j] == (nearest == r[k][b, j])
        at, f_hat = at + s, sat.quantizer.decode([r_k for r_k in r[:k + 1]])
    assert right.shape == (2, at)

    class Knows:
        """Always says the true codes."""
        def generate(self, cond, sat, **settings):
            return sat.quantizer.quantize(f)[0]
    assert train_aar.free_running(Knows(), sat, f, cond).all()


# ---------------------------------------------------------------------------------------------------------------
# Scripts
# ---------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a script as a user does, in a process of its own, where there is neither network nor laion-clap."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "sitecustomize.py").write_text("""
import socket, sys
def refuse(*args, **kwargs): raise SystemExit("asked the network")
connect, socket.getaddrinfo = socket.socket.connect, refuse
socket.socket.connect = lambda self, *args: (connect if self.family == socket.AF_UNIX else refuse)(self, *args)
sys.modules.update(laion_clap=None, transformers=None, torchvision=None)
""")

    def run(script, *args, code=0):
        environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, str(HERE / script), "--device", "cpu", *map(str, args)], env=environment, cwd=folder,
                              capture_output=True, text=True, timeout=900)
        assert done.returncode == code, done.stdout + done.stderr
        return done
    return run


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory, wav_folder):
    """Options that name both checkpoints of a few steps of the tiny preset, in a folder with an awkward name."""
    folder = tmp_path_factory.mktemp("trained") / "ä folder"
    folder.mkdir()
    common = ["--preset", "tiny", "--data", wav_folder, "--batch", 2]
    done = run("train_sat.py", *common, "--steps", 4, "--out", folder / "sat.pt")
    assert "455 tokens" in done.stdout and "8" in done.stdout
    done = run("train_aar.py", *common, "--steps", 3, "--sat", folder / "sat.pt", "--out", folder / "aar.pt")
    assert "next-scale" in done.stdout and f"{math.log(256):.3f}" in done.stdout
    return ["--sat", str(folder / "sat.pt"), "--aar", str(folder / "aar.pt")]


def waves(folder):
    """{name: (samples, rate)} of the wave files in a folder, none of which may be silent or broken."""
    found = {path.name: soundfile.read(path) for path in sorted(Path(folder).glob("*.wav"))}
    assert all(np.isfinite(x).all() and np.abs(x).max() > 0 for x, _ in found.values())
    return found


def test_training_writes_what_one_can_hear(trained):
    """Each stage leaves a checkpoint and a wave file of originals, each followed by what the model makes of it."""
    folder = Path(trained[1]).parent
    found = waves(folder)
    assert set(found) == {"sat.wav", "aar.wav"} and aar.load_checkpoint(trained[1], "sat")["step"] == 4
    for x, rate in found.values():
        assert rate == 24000 and len(x) >= 48000                     # one held-back clip and its copy at least
    assert not list(folder.glob("*.tmp"))
    history = aar.load_checkpoint(trained[3], "aar")["history"]
    assert [row["step"] for row in history] == [1, 2, 3] and len(history[-1]["per_scale"]) == 16
    assert 4 < history[0]["loss"] < 7                                # about ln 256 = 5.5


def test_sample_makes_variations_of_a_reference(run, trained, wav_folder, tmp_path):
    """-n sounds of a second and the reference are written; the same seed writes the same, another seed other sounds."""
    ref = wav_folder / "700.wav"
    run("sample.py", *trained, "--ref", ref, "-n", 2, "--out", tmp_path / "a")
    found = waves(tmp_path / "a")
    assert len(found) == 3 and all(x.shape == (24000, ) and rate == 24000 for x, rate in found.values())
    assert abs(pitch(found["700.reference.wav"][0], 24000) - 700) < 2
    for seed, same in ((0, True), (1, False)):
        sample.main([*trained, "--device", "cpu", "--ref", str(ref), "-n", "2", "--seed", str(seed), "--out", str(tmp_path / str(seed))])
        again = waves(tmp_path / str(seed))
        assert all(np.array_equal(found[name][0], again[name][0]) == (same or "reference" in name) for name in found)


def test_sample_makes_any_number(trained, wav_folder, tmp_path, monkeypatch):
    """However large -n, only a few sounds are made at a time; with --scales one hears the first scales of them."""
    sizes, scales, generate, decode = [], [], AAR.generate, SAT.decode
    monkeypatch.setattr(AAR, "generate", lambda model, cond, *args: sizes.append(len(cond)) or generate(model, cond, *args))
    monkeypatch.setattr(SAT, "decode", lambda sat, tokens, *args: scales.append(len(tokens)) or decode(sat, tokens, *args))
    sample.main([*trained, "--device", "cpu", "--ref", str(wav_folder / "700.wav"), "--out", str(tmp_path), "-n", "20", "--scales", "3"])
    assert sizes == [16, 4] and scales[-2:] == [3, 3] and len(waves(tmp_path)) == 21


def test_sample_reconstructs_files_of_any_length(trained, tmp_path):
    """The reconstruction is as long as its file, and another one for other --scales."""
    lengths = {"a": 10, "b c": 24000, "d": 24001, "e": 61234}
    for name, n in lengths.items():
        soundfile.write(tmp_path / f"{name}.wav", sine(440, 24000, 3)[1:n + 1], 24000)
    for scales in ("16", "3"):
        sample.main([*trained, "--device", "cpu", "--out", str(tmp_path / scales), "--scales", scales, "--reconstruct",
                     *(str(tmp_path / f"{name}.wav") for name in lengths)])
        found = waves(tmp_path / scales)
        assert {name: len(found[f"{name}.reconstruction-{scales}-of-16-scales.wav"][0]) for name in lengths} == lengths
    assert not np.allclose(waves(tmp_path / "16")["e.reconstruction-16-of-16-scales.wav"][0], found["e.reconstruction-3-of-16-scales.wav"][0], atol=1e-3)


def test_flops_are_those_of_the_formula():
    """Two for each number of a weight and each row of a linear layer; attention is two matrix products."""
    layer, x, q = nn.Linear(5, 7), torch.randn(2, 3, 5), torch.randn(2, 4, 6, 8)
    assert sample.flops(lambda: layer(x)) == 2 * 2 * 3 * 5 * 7
    assert sample.flops(lambda: F.scaled_dot_product_attention(q, q, q)) == 2 * (2 * 2 * 4 * 6 * 6 * 8)
    with torch.inference_mode():
        assert sample.flops(lambda: layer(x)) == 2 * 2 * 3 * 5 * 7


def test_bench(monkeypatch, capsys):
    """The numbers of the table belong together: seconds, GFLOP and GFLOP/s of each line, the ratio, a time for each scale."""
    config = small_sat(sample_rate=2000, seconds=1.0, strides=(5, 5, 10), n_scales=3).config          # 8 frames a second
    tiny = dataclasses.replace(PRESETS["tiny"], sat=config, aar=AARConfig(depth=1, cond_dim=5))
    monkeypatch.setitem(PRESETS, "tiny", tiny)
    sample.main(["--bench", "--preset", "tiny", "--device", "cpu"])
    text = capsys.readouterr().out
    rows = {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()
                                               if line.startswith("|"))}
    assert len({len(cells) for cells in rows.values()}) == 1
    for name in sample.JOBS:
        s, work, speed = map(float, rows[name][:3])
        assert speed == pytest.approx(work / s, rel=0.02) and rows[name][3].endswith("%")
        assert [bool(cell) for cell in rows[name][5:]] == [name != "next-token generation"] * 6
    ratio = next(float(name.split()[-1]) for name in rows if name.startswith("next-token / next-scale: "))
    assert ratio == pytest.approx(float(rows["next-token generation"][0]) / float(rows["next-scale generation"][0]), rel=0.02, abs=0.1)
    scales = re.search("of each scale: ([^;]*);", text)[1]
    assert len(scales.split()) == 3 and min(map(float, scales.split())) > 0


def test_sample_overwrites_no_reconstruction(trained, tmp_path):
    """Files of the same name in two folders, or of two formats, give a reconstruction each, or are the user's error."""
    paths = [tmp_path / name for name in ("a/x.wav", "b/x.wav", "b/x.flac")]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, sine(440, 24000, 0.1), 24000)
    try:
        sample.main([*trained, "--device", "cpu", "--out", str(tmp_path / "out"), "--reconstruct", *map(str, paths)])
    except UserError:
        return
    assert len(waves(tmp_path / "out")) == 3


@torch.no_grad()
def test_reconstruction_has_no_seams():
    """Windows are cross-faded: a tokenizer that does nothing gives back any sound as it was, everywhere."""
    class Nothing:
        config = small_sat().config

        def encode(self, wav):
            return [wav]

        def decode(self, tokens):
            return tokens[0]
    for n in (1, 159, 160, 161, 1599, 1600, 1601, 3040, 3041, 10000):
        x = noise(1, n)
        torch.testing.assert_close(sample.reconstruct(Nothing(), x, 1), x)


def test_the_toy_game(trained, tmp_path, capsys):
    """Without a reference there is a new sound of each toy kind, and a count of those that are nearest to their own kind."""
    sample.main([*trained, "--device", "cpu", "--out", str(tmp_path)])
    assert len(waves(tmp_path)) == 2 * len(aar.TOYS)
    assert re.search(r"(\d+) of 10 ", capsys.readouterr().out)


def test_sample_tells_how_like_its_reference_a_variation_is(trained, wav_folder, tmp_path, capsys):
    """The printed cosine similarity is that of the written sounds."""
    sample.main([*trained, "--device", "cpu", "--ref", str(wav_folder / "700.wav"), "-n", "3", "--out", str(tmp_path)])
    printed = [float(x) for x in re.findall(r"similarity to the reference: (\S+)", capsys.readouterr().out)]
    e = MelEmbedder(24000)(torch.stack([load_audio(path, 24000) for path in sorted(tmp_path.glob("*.wav"))]))   # reference first
    assert printed == pytest.approx((e[1:] @ e[0]).tolist(), abs=0.02)


def test_distance_of_two_folders(tmp_path, capsys):
    """A folder is at 0 from its copy, however long the files' silence, and farther from other sounds; bad files do not count."""
    for kind, toy, seed in (("a/kick", 0, 0), ("a/wind", 7, 0), ("copy/kick", 0, 0), ("copy/wind", 7, 0), ("other", 5, 0)):
        (tmp_path / kind).mkdir(parents=True)
        for i in range(4):
            wav = ToySounds(24000, 12000, seed)[10 * i + toy][0]
            aar.save_audio(tmp_path / kind / f"{i}.wav", wav, 24000)
    aar.save_audio(tmp_path / "other" / "0.reference.wav", wav, 24000)
    (tmp_path / "other" / "broken.wav").write_text("no sound")
    found = []
    for made in ("copy", "other"):
        sample.main(["--device", "cpu", "--fad", str(tmp_path / "a"), str(tmp_path / made)])
        done = capsys.readouterr()
        found.append({name: (float(d), int(n), int(m)) for name, d, n, m in
                      re.findall(r"(.+): Frechet distance (\S+) \((\d+) against (\d+) clips\)", done.out)})
        assert "100% of 8 sounds (chance 43%)" in done.out and "stand-in" in done.out and "0.5 s" in done.out
        assert "fewer than the 512" in done.err and ("broken.wav" in done.err) == (made == "other")
    copy, other = found
    assert copy["made"] == (pytest.approx(0, abs=1e-3), 8, 8) and other["made"][1:] == (4, 8)
    assert copy["some of the reference"][1:] == (4, 4) and copy["white noise"][1:] == (8, 8)
    assert 0.1 < other["made"][0] and 0.5 < copy["white noise"][0]


def test_windows_of_two_seconds(run, wav_folder, tmp_path):
    """--seconds stretches the schedule of stage 1; the other scripts follow the checkpoint and tell the length of the window."""
    common = ["--preset", "tiny", "--data", wav_folder, "--batch", 1, "--steps", 1]
    checkpoints = ["--sat", tmp_path / "sat.pt", "--aar", tmp_path / "aar.pt"]
    assert "887 tokens per 2 s" in run("train_sat.py", *common, "--out", tmp_path / "sat.pt", "--seconds", 2).stdout
    assert "887 tokens" in run("train_aar.py", *common, *checkpoints[:2], "--out", tmp_path / "aar.pt").stdout
    done = run("sample.py", *checkpoints, "--ref", wav_folder / "700.wav", "-n", 1, "--out", tmp_path / "out")
    assert "one window of 2 s" in done.stdout
    assert {name: len(x) for name, (x, _) in waves(tmp_path / "out").items()} == {"700.reference.wav": 48000, "700.variation-1.wav": 48000}


def test_evaluation_of_a_generator(tmp_path, capsys):
    """Its figures are those of the held-back clips, by hand; a line for each setting; nothing is written."""
    noise_folder(tmp_path / "wavs", [f"{kind}/{i}.wav" for kind in "ab" for i in range(40)])
    sat, embedder = small_sat(), MelEmbedder(8000)
    model = small_aar(sat, cond_dim=512)
    save(tmp_path / "sat.pt", "sat", sat)
    save(tmp_path / "aar.pt", "aar", model, sat=aar.fingerprint(sat), embedder="mel", clap=aar.fingerprint(embedder))
    model.prepare()
    before = set(tmp_path.iterdir())
    train_aar.main(["--device", "cpu", "--data", str(tmp_path / "wavs"), "--sat", str(tmp_path / "sat.pt"), "--eval", str(tmp_path / "aar.pt"),
                    "--cfg", "0", "2", "--top-k", "1", "0"])
    done = capsys.readouterr()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.out.splitlines() if line.startswith("|")]
    rows = {row[0]: [float(x.strip("%")) for x in row[1:5]] for row in table[2:9]}
    assert list(rows)[3:] == [f"cfg {t}, top-k {k}, top-p 0.8" for t in (0, 2) for k in (1, 0)]
    held_back = SoundFolder(tmp_path / "wavs", 8000, sat.config.samples, held_back=True)
    x = torch.stack([held_back[i][0] for i in range(len(held_back))])
    cond, tokens = embedder(x), sat.encode(x)
    for name, y in (("reconstructions", sat.decode(tokens)), ("cfg 0, top-k 1, top-p 0.8", sat.decode(model.generate(cond, sat, cfg=0, top_k=1)))):
        e = embedder(y)
        rank = train_aar.ranks(e, cond).float()
        want = [naive_frechet(e, cond), (e * cond).sum(1).mean().item(), rank.mean().item(), 100 * (rank == 1).float().mean().item()]
        assert [rows[name][i] - want[i] for i in range(4)] == pytest.approx([0] * 4, abs=0.51) and rows[name][0] == pytest.approx(want[0], abs=2e-3)
    assert 2 <= len(x) and f"{len(x)} held-back clips" in done.out and "fewer than the 512" in done.err
    want = train_aar.validate(model, sat, torch.cat(tokens, 1), cond)
    assert f"per token: {want['held_back']:.2f}" in done.out
    assert [row[:3] for row in table[-len(sat.config.scales):]] == [[str(s), f"{loss:.2f}", f"{right:.1%}"] for s, loss, right in zip(
        sat.config.scales, want["per_scale"], want["accuracy"])]
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("extra", [["--rvq"], ["--schedule", "log"], ["--phis", "0", "--adversarial-at", "1"]],
                         ids=" ".join)
def test_both_stages_of_the_baselines(extra, wav_folder, tmp_path, capsys):
    """Residual VQ and other schedules train, with a next-token generator; a checkpoint can be measured."""
    common = ["--device", "cpu", "--preset", "tiny", "--data", str(wav_folder), "--batch", "1", "--steps", "1"]
    sat_pt = str(tmp_path / "sat.pt")
    train_sat.main([*common, "--out", sat_pt, "--adversarial-at", "0.4", *extra])
    train_sat.main([*common, "--eval", sat_pt])
    assert f"| {sat_pt} | " in capsys.readouterr().out
    config, history = aar.load_sat(sat_pt).config, aar.load_checkpoint(sat_pt, "sat")["history"]
    tokens, plain = sum(config.scales), "--phis" in extra
    assert tokens == 750 if extra == ["--rvq"] else 75 < tokens <= 455
    assert (config.phis == 0) == (plain or extra == ["--rvq"]) and ("adversarial" in history[0]) != plain
    if extra != ["--rvq"]:
        train_aar.main([*common, "--sat", sat_pt, "--out", str(tmp_path / "aar.pt"), "--next-token"])
        assert f"{tokens} tokens, next-token" in capsys.readouterr().out


def test_sounds_before_the_codebooks_start(tmp_path):
    """As long as there are no codebooks, what one hears is the plain autoencoder, not noise from random codes."""
    train_sat.train(options(tmp_path / "sat.pt"), small_sat().config, small_plan(steps=1, quantize_at=1), CPU)
    sat, (pairs,) = aar.load_sat(tmp_path / "sat.pt"), [wav for wav, _ in waves(tmp_path).values()]
    x = aar.sounds(None, sat.config, 0, held_back=True)[2][0]
    heard = pairs.reshape(8, 2, -1)[2, 1, :sat.config.samples]
    np.testing.assert_allclose(heard, sat.decoder(sat.latents(x[None]))[0, 0].clamp(-1, 1), atol=1e-3)


def test_training_on_toy_sounds(tmp_path):
    """Without --data the built-in sounds are used, by both stages."""
    plan, sat = small_plan(steps=2), small_sat()
    train_sat.train(options(tmp_path / "sat.pt"), sat.config, plan, CPU)
    args = options(tmp_path / "aar.pt")
    args.embedder = "mel"
    sat = aar.load_sat(tmp_path / "sat.pt")
    train_aar.train(args, sat, MelEmbedder(8000), AARConfig(scales=sat.config.scales, latent=6, V=16, depth=1), plan, CPU)
    assert aar.load_aar(tmp_path / "aar.pt", sat)[0].config.depth == 1 and len(waves(tmp_path)) == 2


@quiet_clap
def test_clap_conditions_the_generator(clap_file, wav_folder, tmp_path, capsys):
    """Stage 2 trains on CLAP's embeddings, and --text makes sounds from words then."""
    fake_tokenizer(clap_file.parent)
    common = ["--device", "cpu", "--preset", "tiny", "--data", str(wav_folder), "--batch", "1", "--steps", "1"]
    checkpoints = ["--sat", str(tmp_path / "sat.pt")]
    save(tmp_path / "sat.pt", "sat", small_sat(sample_rate=24000, seconds=0.1))
    train_aar.main([*common, *checkpoints, "--out", str(tmp_path / "aar.pt"), "--embedder", "clap", "--clap", str(clap_file)])
    sample.main(["--device", "cpu", *checkpoints, "--aar", str(tmp_path / "aar.pt"), "--clap", str(clap_file), "--text", "rain / on: \"a\" train", "ra",
                 "-n", "2", "--out", str(tmp_path / "out")])
    files = list(waves(tmp_path / "out"))
    assert len(files) == 4 and sum(name.startswith("ra.") for name in files) == 2
    likeness = [float(x) for x in re.findall(r"similarity to the words: (\S+)", capsys.readouterr().out)]
    embedder = CLAP(clap_file, 24000)
    e = embedder(torch.stack([load_audio(tmp_path / "out" / name, 24000) for name in files]))
    want = (e * embedder.text(["ra", "ra", *["rain / on: \"a\" train"] * 2])).sum(1).tolist()            # files by name
    assert likeness == pytest.approx(want[2:] + want[:2], abs=0.02)
    with pytest.raises(UserError, match="--clap"):
        sample.main(["--device", "cpu", *checkpoints, "--aar", str(tmp_path / "aar.pt"), "--text", "rain", "--out", str(tmp_path)])


@pytest.mark.parametrize("script, args", [("train_sat.py", ["--steps", 0]), ("train_aar.py", ["--sat", "absent.pt"]),
                                          ("sample.py", ["--sat", "absent.pt"])])
def test_user_errors_end_in_one_line(run, script, args):
    """What the user can mend: exit code 2, one line on stderr, no traceback."""
    done = run(script, *args, code=2)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and not done.stdout


@pytest.mark.parametrize("main, args", [
    (train_sat.main, "--steps -1"), (train_sat.main, "--batch 0"), (train_sat.main, "--lr nan"), (train_sat.main, "--lr -1"),
    (train_sat.main, "--seed -1 --steps 1"), (train_sat.main, "--device nonsense"), (train_sat.main, "--data {tmp}/absent"),
    (train_sat.main, "--data {tmp}"), (train_sat.main, "--out {tmp}/no/sat.pt"), (train_sat.main, "--out {tmp}/new.pt --resume"),
    (train_sat.main, "--out {tmp}/sat.html"), (train_aar.main, "--sat {sat} --out {tmp}/aar.wav"),
    (train_sat.main, "--out {sat}"), (train_sat.main, "--out {sat} --resume --rvq"), (train_sat.main, "--out {sat} --resume --steps 9"),
    (train_sat.main, "--out {aar} --resume"), (train_sat.main, "--eval {aar}"), (train_sat.main, "--eval {tmp}/absent.pt"),
    (train_sat.main, "--seconds 0"), (train_sat.main, "--seconds nan"), (train_sat.main, "--seconds inf"), (train_sat.main, "--seconds 0.1"),
    (train_aar.main, "--sat {sat} --eval {sat}"), (train_aar.main, "--sat {sat} --eval {tmp}/absent.pt"),
    (train_aar.main, "--sat {sat} --eval {aar} --cfg 1 nan"), (train_aar.main, "--sat {sat} --eval {aar} --top-p 0.5 0"),
    (train_aar.main, "--sat {sat} --eval {aar} --data {tmp}/absent"), (sample.main, "--fad {tmp}/absent {wav}"), (sample.main, "--fad {tmp} {tmp}"),
    (sample.main, "--fad {tmp} {tmp} --clap {tmp}/absent.pt"),
    (train_aar.main, "--sat {aar}"), (train_aar.main, "--sat {sat} --embedder clap"), (train_aar.main, "--sat {sat} --steps 0"),
    (train_aar.main, "--sat {sat} --embedder clap --clap {tmp}/absent.pt"), (train_aar.main, "--sat {sat} --out {tmp}/no/aar.pt"),
    (train_aar.main, "--sat {sat} --out {aar} --resume --steps 3 --batch 2 --next-token"), (train_aar.main, "--sat {sat} --out {aar}"),
    (sample.main, "--sat {aar} --aar {aar}"), (sample.main, "--sat {sat} --aar {sat}"), (sample.main, "{both} -n 0"),
    (sample.main, "{both} --top-p 0"), (sample.main, "{both} --top-p 1.5"), (sample.main, "{both} --top-k -1"),
    (sample.main, "{both} --top-k 257"), (sample.main, "{both} --cfg nan"), (sample.main, "{both} --text rain"),
    (sample.main, "{both} --ref {tmp}/absent.wav"), (sample.main, "{both} --ref {sat}"), (sample.main, "{both} --reconstruct {tmp}/absent.wav"),
    (sample.main, "{both} --reconstruct {wav} --scales 0"), (sample.main, "{both} --reconstruct {wav} --scales 17"),
    (sample.main, "{both} --out {sat} --reconstruct {wav}"),
    (train_sat.main, "--steps 99999999999999999999"), (train_sat.main, "--batch 1000000"), (train_sat.main, "--lr inf"),
    (train_sat.main, "--seed 99999999999999999999"), (train_sat.main, "--eval {sat} --seed -1"), (train_sat.main, "--out {tmp}/x.wav"),
    (train_sat.main, "--out {wav-like}"), (train_sat.main, "--data {sat}"), (train_sat.main, "--device meta"),
    (train_sat.main, "--device cuda:99"), (train_aar.main, "--sat {sat} --seed -1"), (train_aar.main, "--sat {sat} --out {wav-like}"),
    (train_aar.main, "--sat {sat} --lr 0"),
    (sample.main, "{both} --cfg inf"), (sample.main, "{both} --cfg -1"), (sample.main, "{both} --cfg 1e30"), (sample.main, "{both} --seed -1"),
    (sample.main, "{both} --seed 99999999999999999999"), (sample.main, "{both} --ref {tmp}"), (sample.main, "{both} --reconstruct {tmp}"),
    (sample.main, "{both} --scales 17"), (sample.main, "{both} --ref {wav} --scales 0"), (sample.main, "{both} --ref="),
    (sample.main, "{both} --text="), (sample.main, "--fad {tmp} {tmp} --seed 99999999999999999999"),
    (train_sat.main, "--rvq --seconds 0.05"), (train_sat.main, "--rvq --phis 6"), (train_sat.main, "--rvq --schedule log"),
    (train_sat.main, "--rvq 0"), (train_sat.main, "--rvq 100000000"),
    (train_sat.main, "--phis -1"), (train_sat.main, "--phis 17"), (train_sat.main, "--out {tmp}"), (train_sat.main, "--out="),
    (train_sat.main, "--out {tmp}/x.training.pt"), (train_sat.main, "--out {long}"), (train_sat.main, "--data {loop}"),
    (train_aar.main, "--sat {sat} --embedder clap --clap {long}"), (sample.main, "{both} --ref {long}"), (sample.main, "--fad {loop} {tmp}"),
    (sample.main, "{both} --out {loop}"), (train_aar.main, "--sat {sat} --eval {aar} --cfg inf"),
    (train_aar.main, "--sat {sat} --eval {aar} --top-k 257"), (train_aar.main, "--sat {sat} --eval {aar} --seed -1"),
    (train_sat.main, "--eval opus:loud"), (train_sat.main, "--eval {tmp}")],
    ids=lambda x: x if isinstance(x, str) else x.__module__)
def test_user_errors(main, args, trained, wav_folder, tmp_path, monkeypatch):
    """Options that make no sense, and files that are absent or of another kind, are the user's error; nothing is written."""
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    before = [Path(path).read_bytes() for path in trained[1::2]]
    names = {"{both}": trained, "{sat}": trained[1:2], "{aar}": trained[3:], "{wav}": [str(wav_folder / "700.wav")],
             "{wav-like}": [str(wav_folder / "700.pt")],              # beside it lies a sound of the same name
             "{loop}": ["loop"], "{long}": [260 * "x"]}
    args = [x for word in args.split() for x in names.get(word, [word.replace("{tmp}", str(tmp_path))])]
    with pytest.raises(UserError) as error:
        main(["--device", "cpu", *args] if "--device" not in args else args)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert [Path(path).read_bytes() for path in trained[1::2]] == before
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("error, line", [
    (MemoryError(), "error: not enough memory"), (RuntimeError("CUDA out of memory. Tried to allocate"), "error: not enough memory"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "error: not enough memory"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "error: not enough memory"),
    (RuntimeError("a fault of ours"), None), (OSError(28, "No space left on device"), "error: [Errno 28] No space left"),
    (BrokenPipeError(32, "Broken pipe"), "error: [Errno 32] Broken"), (UserError("new\nline.wav: no"), "error: new line.wav: no\n"), (UserError("Caught UserError in ...\nTraceback\naar.UserError: mend it\n"), "error: mend it\n")],
    ids=lambda x: repr(x)[:30])
def test_errors_at_the_command_line(error, line, capsys):
    """Too little memory, wherever it is missed, ends in one line too; a fault of the program keeps its traceback; what is no
    text is printed all the same."""
    def main():
        print("\udcff")
        raise error
    with pytest.raises(SystemExit if line else RuntimeError) as seen:
        aar.command_line(main)
    if line:
        assert seen.value.code == 2 and capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize("main", [train_sat.main, train_aar.main, sample.main], ids=lambda main: main.__module__)
def test_help(main, capsys):
    """--help explains every option in a line."""
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(option in text for option in ("--device", "--seed", "--out"))


def test_import_is_light():
    """Importing the program imports none of the slow libraries that only parts of it need."""
    code = "import sys, aar; print([m for m in ('laion_clap', 'transformers', 'librosa', 'soundfile', 'soxr') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=HERE, text=True).strip() == "[]"


# ---------------------------------------------------------------------------------------------------------------
# Pages
# ---------------------------------------------------------------------------------------------------------------

class Page(html.parser.HTMLParser):
    """The elements of a page as dictionaries of their attributes, tag and text; raises AssertionError where tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append({"tag": tag, "text": "", "inside": [e["tag"] for e in self.open]} | dict(attributes))
        if tag != "meta":                                             # the only one of ours that has no end
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, *tags):
        return [e for e in self.elements if e["tag"] in tags]

    def sounds(self):
        """{label: samples}; each label occurs once."""
        found = {e["aria-label"]: soundfile.read(embedded(e["src"]), dtype="float32")[0] for e in self.all("audio")}
        assert len(found) == len(self.all("audio"))
        return found


def embedded(uri):
    return io.BytesIO(base64.b64decode(uri.split(";base64,")[1], validate=True))


AWKWARD = "a <b>&amp; \"c'\xe4"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """{name: path} of pages of all kinds, made by models of next to no size."""
    folder = tmp_path_factory.mktemp("pages")
    torch.manual_seed(0)
    ref = folder / f"{AWKWARD}.wav"
    soundfile.write(ref, sine(440, 8000, 12), 8000)
    config = small_sat().config
    train_sat.train(options(folder / "sat.pt"), config, small_plan(steps=6, quantize_at=0.2), CPU)
    sat = aar.load_sat(folder / "sat.pt")
    args = options(folder / "aar.pt")
    args.embedder = "mel"
    train_aar.train(args, sat, MelEmbedder(8000), AARConfig(scales=sat.config.scales, latent=6, V=16, depth=1), small_plan(), CPU)
    common = ["--device", "cpu", "--sat", str(folder / "sat.pt"), "--aar", str(folder / "aar.pt"), "-n", "2"]
    for name, more in {"ref": ["--ref", str(ref)], "toys": [], "reconstruct": ["--reconstruct", str(ref)]}.items():
        sample.main([*common, "--out", str(folder / name), *more])
    return {name: folder / name / "index.html" for name in ("ref", "toys", "reconstruct")} | {
        name: folder / f"{name}.html" for name in ("sat", "aar")}


@pytest.mark.parametrize("name", ["ref", "toys", "reconstruct", "sat", "aar"])
def test_page_is_whole_and_labelled(pages, name):
    """A page is well-formed, asks for nothing from outside, and everything that is seen or heard has a name to read."""
    text = pages[name].read_text(encoding="utf-8")
    assert "://" not in text and "<script" not in text and "@import" not in text and "url(" not in text
    page = Page(text)
    root, title = page.all("html")[0], page.all("title")[0]["text"]
    assert root["lang"] == "en" and title and [h["text"] for h in page.all("h1")] == [title]
    assert any(e.get("name") == "viewport" for e in page.all("meta"))
    levels = [int(e["tag"][1]) for e in page.all("h1", "h2", "h3")]
    assert levels[0] == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:]))
    sources = [e[key] for e in page.elements for key in ("src", "href") if key in e]
    assert sources and all(source.startswith("data:") for source in sources)
    outer = [e for e in page.all("svg") if "svg" not in e["inside"]]
    assert outer and all(e["role"] == "img" and e["aria-label"] for e in outer) and all(e["alt"] for e in page.all("img"))
    assert all("controls" in e and e["aria-label"] for e in page.all("audio"))
    assert all(np.abs(x).max() > 0 for x in page.sounds().values())
    for image in page.all("image"):
        assert min(PIL.Image.open(embedded(image["href"])).size) > 0
    assert len(text) < 4e6 and not list(pages[name].parent.glob("*.tmp"))
    assert page.all("pre")[0]["text"].startswith(f"python {'sample' if name in ('ref', 'toys', 'reconstruct') else 'train_sat'}.py --device cpu")


def test_page_of_a_reference(pages):
    """It holds the reference, its first 1 .. K scales and the variations; tokens read off the page decode to its sounds."""
    page, sat = Page(pages["ref"].read_text(encoding="utf-8")), aar.load_sat(pages["ref"].parents[1] / "sat.pt")
    sounds, files, K = page.sounds(), waves(pages["ref"].parent), len(sat.config.scales)
    assert len(files) == 3 and all(np.allclose(sounds[name], x, atol=1e-4) for name, (x, _) in files.items())   # 16 bits
    assert page.all("h1")[0]["text"] == f"Variations of {AWKWARD}.wav" and not page.all("b")
    assert shlex.quote(str(pages["ref"].parents[1] / f"{AWKWARD}.wav")) in page.all("pre")[0]["text"]
    tokens = [[torch.tensor([[int(r) for r in row.split()]]) for row in re.findall(r"scale \d+: ([\d ]+)", e["text"])]
              for e in page.all("pre") if "details" in e["inside"]]
    assert len(tokens) == 3 and all([r.shape[1] for r in r_k] == list(sat.config.scales) for r_k in tokens)
    for k in range(1, K + 1):
        n = sum(sat.config.scales[:k])
        label = f"reference, first {k} of {K} scales, {n} token{'s' if n > 1 else ''}"
        np.testing.assert_allclose(sounds[label], sat.decode(tokens[0][:k])[0, 0], atol=1e-4)
    for r_k, name in zip(tokens[1:], sorted(files)[1:]):
        np.testing.assert_allclose(sounds[name], sat.decode(r_k)[0, 0], atol=1e-3)


def test_page_of_long_sounds(pages):
    """Of a sound of 12 s a page holds the first ten, original and reconstruction, and says so."""
    sounds = Page(pages["reconstruct"].read_text(encoding="utf-8")).sounds()
    assert [len(x) for x in sounds.values()] == [80000] * 2 and all("first 10 s" in label for label in sounds)
    assert abs(pitch(sounds[f"{AWKWARD}, original, first 10 s"], 8000) - 440) < 2


def test_page_of_the_toys(pages):
    """Each kind has a section with the reference, a few of its scales, and the generated sound."""
    page = Page(pages["toys"].read_text(encoding="utf-8"))
    assert [h["text"] for h in page.all("h2")] == [*aar.TOYS, "Settings"]
    assert len(page.all("audio")) == len(aar.TOYS) * (2 + len([1, 2, 4, 5]))


def test_page_of_a_training(pages):
    """Curves for all numbers of the log, and held-back sounds at first, before and now; the checkpoint keeps these three."""
    history = aar.load_checkpoint(pages["sat"].with_suffix(".pt"), "sat")["history"]
    assert [row["step"] for row in history if "sounds" in row] == [2, 5, 6]
    page = Page(pages["sat"].read_text(encoding="utf-8"))
    charts = {e["text"] for e in page.all("h3")}
    assert charts >= {"time", "mel", "vq", "adversarial", "feature", "discriminator", "log_mel_dB", "used", "perplexity"}
    labels = [e["aria-label"] for e in page.all("audio")]
    assert labels == [f"Held-back sound {i}, {what}" for i in (1, 2, 3, 4)
                      for what in ("original", "after 2 steps", "after 5 steps", "after 6 steps")]
    now = soundfile.read(pages["sat"].with_suffix(".wav"))[0].reshape(8, -1)[3, 3200:4800]
    np.testing.assert_allclose(page.sounds()["Held-back sound 4, after 6 steps"], now, atol=1e-3)
    page = Page(pages["aar"].read_text(encoding="utf-8"))
    assert {"loss, held_back", "per_scale", "accuracy"} <= {e["text"] for e in page.all("h3")}
    assert any("scale 5" in e["text"] for e in page.all("svg"))


def axis(page, unit, key):
    """(places, numbers) of the ticks whose text ends in `unit`."""
    found = [(float(e[key]), float(e["text"].removesuffix(unit))) for e in page.all("text") if e["text"].endswith(unit)]
    return np.array(sorted(found)).T


def test_mel_picture_agrees_with_its_axes():
    """A tone burst is brightest at the time, the frequency and the level that the axes and the colour bar say."""
    mel, rate = Mel(8000, 1024, 80), 8000
    for hz, at, amplitude in ((1000, 0.4, 0.5), (2000, 1.0, 0.05), (500, 1.5, 0.25)):
        wav = torch.zeros(1, 16000)
        burst = torch.from_numpy(np.hanning(1600) * sine(hz, rate, 0.2, amplitude)).float()
        wav[0, int(at * rate) - 800:int(at * rate) + 800] = burst
        page = Page(sample.mel_picture("burst", wav, rate))
        bar, image = (np.asarray(PIL.Image.open(embedded(e["href"])).convert("RGB"), dtype=int) for e in page.all("image"))
        level = np.abs(image[:, :, None] - bar[:, 0]).sum(-1).argmin(-1)                     # place in the bar, 0 at the top
        row, column = np.unravel_index(level.argmin(), level.shape)
        box = next(e for e in page.all("svg") if "svg" in e["inside"] and e["width"] == "200")
        x = float(box["x"]) + 200 * (column + 0.5) / image.shape[1]
        y = float(box["y"]) + 150 * (row + 0.5) / image.shape[0]
        assert abs(np.interp(x, *axis(page, " s", "x")) - at) < 0.03
        assert abs(np.interp(y + 4, *axis(page, " kHz", "y")) - hz / 1000) < 0.06            # 4: half of a letter
        places, dB = axis(page, " dB", "y")
        seen = np.interp(8 + 150 * level.min() / len(bar) + 4, places, dB)
        assert abs(seen - mel.dB(wav[None]).max().item()) < 1.5
        said = re.search(r"loudest at ([\d.]+) s and (\d+) Hz", page.all("svg")[0]["aria-label"])
        assert abs(float(said[1]) - at) < 0.03 and abs(float(said[2]) - hz) < 60


def test_curves_agree_with_their_axes():
    """Points read off a curve by its ticks are the numbers of the log, for one number, two, a list; one row; and NaN."""
    history = [{"step": s, "a": 0.01 * s + 3, "b": -0.02 * s, "many": [s ** 0.5, 5.0, 7.0]} for s in (100, 250, 400, 1000)]
    for names, want in ((("a",), [[4, 5.5, 7, 13]]), (("a", "b"), [[4, 5.5, 7, 13], [-2, -5, -8, -20]]),
                        (("many",), [[10, 15.81, 20, 31.62], [5] * 4, [7] * 4])):
        page = Page(sample.curves(history, *names))
        ticks = {key: np.polyfit(*np.array([(float(e[at]), float(e["text"])) for e in page.all("text")
                                            if e.get("text-anchor") == anchor]).T, 1)
                 for key, at, anchor in (("x", "x", "middle"), ("y", "y", "end"))}
        lines = [e for e in page.all("path") if e["inside"].count("svg") == 2 and "style" in e]
        for line, values in zip(lines, want, strict=True):
            points = np.array([[float(v) for v in point.split()] for point in line["d"].removeprefix("M").split("L")])
            np.testing.assert_allclose(np.polyval(ticks["x"], 52 + 200 * points[:, 0]), [100, 250, 400, 1000], atol=3)
            np.testing.assert_allclose(np.polyval(ticks["y"], 12 + 150 * points[:, 1]), values, atol=0.1)
    for odd in (history[:1], [{"step": 1, "a": 0.0}], history + [{"step": 1100, "a": math.nan}, {"step": 1200, "a": math.inf}]):
        assert "nan" not in sample.curves(odd, "a").lower()


def test_ticks():
    """At most so many as asked for, at least one; round, evenly spaced, inside, and where they say that they are."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        first = rng.normal() * 10 ** rng.uniform(-3, 3)
        last = first + 0.02 * abs(first) + 10 ** rng.uniform(-4, 6)  # six digits tell these apart
        places, numbers = np.array([(place, float(x)) for place, x in sample.ticks(first, last)]).T
        assert 1 <= len(places) <= 6 and 0 <= places[0] and places[-1] <= 1
        np.testing.assert_allclose(first + places * (last - first), numbers, rtol=1e-4, atol=1e-4 * (last - first))
        if len(numbers) > 2:
            np.testing.assert_allclose(np.diff(numbers), numbers[1] - numbers[0], rtol=1e-2)


def test_page_is_whole_at_any_moment(tmp_path, monkeypatch):
    """If writing fails the old page is still there; and names that are no text do no harm."""
    path = tmp_path / "x.html"
    sample.page(path, "old", "", {"command": ""}, {})
    old = path.read_bytes()
    sample.page(tmp_path / "y.html", "\udcff<", "\udcff", {"command": "\udcff"}, {"\udcff": []})
    with monkeypatch.context() as patch, pytest.raises(UserError, match="no space left"):
        patch.setattr(Path, "write_text", lambda *args, **more: (_ for _ in ()).throw(OSError("no space left on device")))
        sample.page(path, "new", "", {"command": ""}, {})
    assert path.read_bytes() == old


def test_a_page_of_others_is_not_overwritten(pages, tmp_path):
    """An index.html that this program did not write stays as it is; its own is replaced."""
    args = ["--device", "cpu", "--sat", str(pages["sat"].with_suffix(".pt")), "--out", str(tmp_path), "--reconstruct",
            str(pages["sat"].with_suffix(".wav"))]
    index = tmp_path / "index.html"
    index.write_text("<h1>mine</h1>")
    with pytest.raises(UserError, match="--out"):
        sample.main(args)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["<h1>mine</h1>"]
    index.unlink()
    index.mkdir()
    with pytest.raises(UserError, match="--out"):
        sample.main(args)
    index.rmdir()
    for scales in "12":
        sample.main([*args, "--scales", scales])
        assert f"first {scales} of 5 scales" in index.read_text(encoding="utf-8")


def test_a_full_page_says_so(pages, tmp_path, monkeypatch):
    """Sounds for which the page would become too large are written as files all the same, and counted."""
    monkeypatch.setattr(sample, "sound", lambda *args: " " * 5_000_000)
    sample.main(["--device", "cpu", "--sat", str(pages["sat"].with_suffix(".pt")), "--out", str(tmp_path), "--reconstruct",
                 *[str(pages["sat"].with_suffix(".wav"))] * 4])
    assert len(waves(tmp_path)) == 4 and "no room for 6 more sounds" in (tmp_path / "index.html").read_text(encoding="utf-8")


class Browser:
    """A headless Chromium that is told what to do, and asked, through a pair of pipes (DevTools protocol)."""

    def __init__(self, binary, profile):
        (read, self.write), (self.read, write) = os.pipe(), os.pipe()

        def pipes():                                                  # the browser reads from 3 and writes to 4
            a, b = os.dup(read), os.dup(write)
            os.dup2(a, 3)
            os.dup2(b, 4)
        self.process = subprocess.Popen(
            [binary, "--headless", "--no-sandbox", "--remote-debugging-pipe", "--autoplay-policy=no-user-gesture-required",
             "--mute-audio", f"--user-data-dir={profile}"], preexec_fn=pipes, close_fds=False, stderr=subprocess.DEVNULL)
        os.close(read), os.close(write)
        self.timer = threading.Timer(900, self.process.kill)          # so that nothing waits for ever
        self.timer.start()
        self.session, self.ids, self.rest, self.events = {}, itertools.count(1), b"", []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self(f"{domain}.enable")

    def message(self):
        while b"\0" not in self.rest:
            self.rest += os.read(self.read, 2 ** 20) or pytest.fail("the browser ended")
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def __call__(self, method, **params):
        """Ask one thing; what else the browser says before its answer is kept in `events`."""
        i = next(self.ids)
        os.write(self.write, json.dumps({"id": i, "method": method, "params": params} | self.session).encode() + b"\0")
        while (answer := self.message()).get("id") != i:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path, width, scheme):
        self("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600)
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self("Page.navigate", url=path.as_uri())
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self.events.append(self.message())

    def run(self, script):
        """What an async function with this body returns."""
        answer = self("Runtime.evaluate", expression=f"(async () => {{ {script} }})()", awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    binary = next(filter(None, map(shutil.which, names)), None)
    if not binary:
        pytest.skip(f"none of {', '.join(names)} is installed: apt-get install chromium-headless-shell")
    browser = Browser(binary, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.timer.cancel()
    browser.process.kill()
    browser.process.wait()


@pytest.mark.parametrize("name", ["ref", "toys", "reconstruct", "sat", "aar"])
def test_page_in_a_browser(pages, browser, name):
    """No complaints, no requests; each player plays, each picture has a size; on a phone, in the dark, by keyboard, by ear."""
    corner = {}
    for width, scheme in ((1200, "light"), (320, "dark")):
        browser.open(pages[name], width, scheme)
        assert browser.run("return document.documentElement.scrollWidth") <= width
        shot = PIL.Image.open(io.BytesIO(base64.b64decode(browser("Page.captureScreenshot")["data"]))).convert("L")
        corner[scheme] = shot.getpixel((2, 2))
    assert corner["dark"] < 60 and corner["light"] > 200
    n = len(Page(pages[name].read_text(encoding="utf-8")).all("audio"))
    played = browser.run("""const played = []
        for (const audio of document.querySelectorAll("audio")) {
            await audio.play()
            played.push([audio.readyState, audio.duration, audio.error])
            audio.pause()
        }
        return played""")
    assert len(played) == n > 0 and all(ready >= 2 and duration >= 0.2 and error is None for ready, duration, error in played)
    sizes = browser.run("""const sizes = []
        for (const image of document.querySelectorAll("image")) {
            const picture = new Image()
            picture.src = image.href.baseVal
            await picture.decode()
            sizes.push(picture.naturalWidth, picture.naturalHeight, image.getBoundingClientRect().width)
        }
        for (const svg of document.querySelectorAll("svg[role=img]")) sizes.push(svg.getBoundingClientRect().height)
        return sizes""")
    assert len(sizes) > n and min(sizes) > 0
    browser.run("document.activeElement.blur(); scrollTo(0, 0)")
    for kind in ("keyDown", "keyUp"):
        browser("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
    assert browser.run("return document.activeElement.tagName") == "AUDIO"
    nodes = [node for node in browser("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    named = [node["role"]["value"] for node in nodes if node.get("name", {}).get("value")]
    assert {role: sum(node["role"]["value"] == role for node in nodes) for role in ("Audio", "image", "heading")} == {
        role: named.count(role) for role in ("Audio", "image", "heading")} and named.count("Audio") == n
    bad = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    assert not [event for event in browser.events if event["method"] in bad]
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert all(url.startswith(("data:", pages[name].as_uri())) for url in asked)


# ---------------------------------------------------------------------------------------------------------------
# Classroom: what the README teaches is true of the code
# ---------------------------------------------------------------------------------------------------------------

README, SOURCE = ((HERE / name).read_text(encoding="utf-8") for name in ("README.md", "aar.py"))


def section(title):
    """What stands in the README below `## title`."""
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def cited(text):
    """The algorithms, figures and sections of the paper that a text names."""
    return set(re.findall(r"(?:Alg|Fig|Sec)\. \d+(?: left| right)?", text))


def test_paper_to_code_and_back():
    """Each name of the table is in the file that it links to, each flag is taken; what the table cites aar.py cites too."""
    rows = re.findall(r"^\| (.+) \| (.+) \|$", section("From the paper to the code"), re.M)[2:]
    assert len(rows) >= 15 and all("`" in code for _, code in rows)
    modules = {"aar.py": aar, "train_sat.py": train_sat, "train_aar.py": train_aar}
    for paper, code in rows:
        names = re.findall(r"\[`([^`]+)`\]\(([^)]+)\)", code)
        assert len(names) == code.count("`") / 2, code
        for name, file in names:
            if name.startswith(file + " "):
                modules[file].arguments(shlex.split(name)[1:])        # ends the program if it knows no such flag
            else:
                value = modules[file]
                for part in name.split("."):
                    value = getattr(value, part)
                assert name.partition(".")[0] in (HERE / file).read_text(encoding="utf-8")
    table = cited("\n".join(paper for paper, _ in rows))
    assert table == cited(SOURCE) >= {"Alg. 1", "Alg. 2", "Fig. 2 left", "Fig. 2 right", "Fig. 3", "Fig. 4", "Fig. 5"}


def exercise(number):
    """The text of an exercise, its diffs, and for each of its commands (script, options)."""
    text = re.search(rf"^### {number}\. .*?(?=^##|\Z)", section("Exercises"), re.M | re.S)[0]
    commands = [line.split(maxsplit=2)[1:] for line in text.splitlines() if line.startswith("python ")]
    return text, re.findall(r"^```diff\n(.*?)^```", text, re.M | re.S), commands


def options_of(number, script):
    """What the script's parser makes of each command of an exercise that calls it."""
    return [{"train_sat.py": train_sat, "train_aar.py": train_aar, "sample.py": sample}[name].arguments(shlex.split(line))
            for name, line in exercise(number)[2] if name == script]


def hunks(diff):
    """The changes of a diff one by one: pairs of lines that go and of lines that come, both with their first sign."""
    return re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)+)", diff, re.M)


@contextlib.contextmanager
def changed(diff):
    """Inside, small_sat and AAR are made of aar.py with the lines of `diff` in place of those that they replace."""
    source = SOURCE
    for pair in hunks(diff):
        old, new = (re.sub("^.", "", lines, flags=re.M) for lines in pair)
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    module = type(aar)("changed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "changed", module)
        exec(compile(source, "changed aar.py", "exec"), vars(module))
        patch.setitem(globals(), "SAT", module.SAT)
        patch.setitem(globals(), "AAR", module.AAR)
        yield


@torch.no_grad()
def errors(sat, f, start_on=None):
    """Start the codebooks on latents; mean square of what each number of scales leaves over of f."""
    torch.manual_seed(0)
    sat.quantizer.quantize(f if start_on is None else start_on, kmeans=True)
    return [(f - f_hat).square().mean().item() for f_hat in sat.quantizer.quantize(f)[1]]


def latents_of(n=64, D=6, T=40, seed=2):
    """Latents that change slowly, as those of sounds do: (n, D, T)."""
    return F.avg_pool1d(10 * noise(n, D, T + 8, seed=seed), 9, 1) * 3


def test_exercises_are_ten_and_complete():
    """Each has a command that its script understands, and says what one sees in numbers; no place is left to fill in."""
    for number in range(1, 11):
        text, _, commands = exercise(number)
        assert commands and re.search(r"\d", text.partition("```\n")[2]) and "@" not in text
        for script in {name for name, _ in commands}:
            options_of(number, script)
    assert "### 11" not in section("Exercises")


def test_exercise_schedule():
    """The more tokens, the less is left over; the text says how many tokens each schedule has."""
    text, _, _ = exercise(1)
    kinds = ["quadratic"] + [args.schedule for args in options_of(1, "train_sat.py") if not args.eval]
    tokens = {kind: sum(scale_schedule(kind, 75, 16)) for kind in kinds}
    left = {kind: errors(small_sat(schedule=kind, phis=0), latents_of())[-1] for kind in kinds}
    assert len(kinds) == 3 and all(str(n) in text for n in tokens.values())
    assert sorted(kinds, key=tokens.get) == sorted(kinds, key=left.get, reverse=True) == ["log", "quadratic", "linear"]


def test_exercise_scales():
    """Less is left over the more scales one hears, and the first of them take away most."""
    heard = [args.scales for args in options_of(2, "sample.py")]
    sat = small_sat(phis=0, n_scales=16)
    left = [latents_of().square().mean().item(), *(errors(sat, latents_of())[n - 1] for n in heard)]
    assert len(heard) == 3 and left == sorted(left, reverse=True) and left[2] < 0.5 * left[0]


def test_exercise_phi():
    """Trained alone, phi makes the sums come nearer to the latents than straight lines do."""
    args, = options_of(3, "train_sat.py")
    last = []
    for phis in (3, args.phis):
        sat = small_sat(phis=phis)
        quantizer = sat.quantizer
        for phi in quantizer.phis:
            nn.init.dirac_(phi.weight)
        errors(sat, latents_of())
        optimizer = torch.optim.Adam(quantizer.phis.parameters(), 1e-2) if phis else None
        for _ in range(40):
            loss = quantizer(latents_of())[2]
            if optimizer:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        last.append(loss.item())
    assert last[0] < 0.97 * last[1]


@pytest.mark.parametrize("which", ["block", "causal", "open"])
def test_exercise_mask(which):
    """Of tokens that nobody can know, the open mask learns to read the answer; generation has none to show. The causal one
    hides from a place what stands to its right in its own block, which generation shows it."""
    diffs = dict(zip(["causal", "open"], exercise(4)[1])) | {"block": ""}
    with changed(diffs[which]):
        sat = small_sat(n_scales=3, seconds=0.1, phis=0)
        model = AAR(AARConfig(scales=sat.config.scales, latent=6, V=16, depth=1, cond_dim=5)).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        r = torch.cat(random_tokens(sat, 32), 1)
        loss = train_aar.losses(model, sat, r, noise(32, 5))[0]
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    coarse, guessing = train_aar.per_scale(loss, sat.config.scales)[0], math.log(16)
    assert coarse < 0.3 * guessing if which == "open" else coarse > 0.95 * guessing
    model.eval()
    x = sat.teacher_inputs(random_tokens(sat))
    other = x.clone()
    other[:, -1] += 1                                                 # the last place; what does the first of its block say?
    place = sum(sat.config.scales[:-1])
    here, there = (model(noise(2, 5), inputs)[:, place] for inputs in (x, other))
    assert torch.equal(here, there) == (which == "causal")


def test_exercise_guidance():
    """With more guidance tokens are drawn that the condition makes likelier than no condition does, and fewer different ones."""
    args, = options_of(5, "train_aar.py")
    sat = small_sat()
    model = small_aar(sat)
    cond = noise(64, 5)[:1].expand(64, -1) * 10
    told, various = [], []
    for cfg in args.cfg:
        r = model.generate(cond, sat, cfg=cfg, top_p=1.0, generator=torch.Generator().manual_seed(0))
        x, r = sat.teacher_inputs(r), torch.cat(r, 1)
        with_, without = (model(c, x).log_softmax(-1).gather(2, r[..., None]) for c in (cond, model.null.expand(64, -1)))
        told.append((with_ - without).mean().item())
        various.append(np.mean([len(set(place.tolist())) for place in r.T]))
    assert len(told) == 3 and told == sorted(told) and various == sorted(various, reverse=True) and various[-1] < various[0]


def test_exercise_top_k():
    """The likeliest code everywhere: one and the same sound, whatever the seed. Without top-k every one is another."""
    args, = options_of(6, "sample.py")
    sat = small_sat()
    model = small_aar(sat)
    for top_k, same in ((args.top_k, True), (0, False)):
        r = [model.generate(noise(1, 5).expand(4, -1), sat, args.cfg, top_k, 1.0, torch.Generator().manual_seed(seed))[-1]
             for seed in (0, 1)]
        assert bool((torch.cat(r) == r[0][0]).all()) == same


def test_exercise_gradient():
    """The same values and K times the gradient."""
    diff, = exercise(7)[1]
    f, outs, gradients = latents_of(2).requires_grad_(), [], []
    for change in ("", diff):
        torch.manual_seed(0)
        with changed(change):
            out = small_sat().quantizer(f)[0]
        outs.append(out)
        gradients.append(torch.autograd.grad(out.sin().sum(), f)[0])
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(gradients[1], 5 * gradients[0], rtol=1e-3, atol=1e-3)


def test_exercise_collapse():
    """Without k-means and revival few codes are used; with either of the two most are."""
    diff, = exercise(8)[1]
    no_kmeans, no_revival = map("".join, hunks(diff))
    used = {}
    for name, change in (("collapsed", diff), ("revival", no_kmeans), ("k-means", no_revival), ("both", "")):
        torch.manual_seed(0)
        with changed(change):
            quantizer = small_sat(phis=0).train().quantizer
        f = 0.2 * latents_of(256) + 2                                 # far from most codes, which lie around 0
        quantizer.quantize(f, kmeans=True)
        for part in f.split(16) * 4:
            r = quantizer(part)[1]
        used[name] = np.mean([len(r_k.unique()) for r_k in quantizer.quantize(f)[0]])
    assert used["collapsed"] < 0.5 * min(used["revival"], used["k-means"], used["both"]), used


def test_exercise_next_token(monkeypatch):
    """A call of the transformer for each scale or for each token, as many as the text says."""
    args = options_of(9, "train_aar.py")[0]
    calls = []
    for next_token in (False, args.next_token):
        sat = small_sat()
        model = small_aar(sat, next_token=next_token)
        with monkeypatch.context() as patch:
            patch.setattr(AAR, "logits", lambda self, *args, _logits=AAR.logits, **more: calls.append(next_token)
                          or _logits(self, *args, **more))
            model.generate(noise(1, 5), sat)
    scales = PRESETS["tiny"].sat.scales
    assert [calls.count(False), calls.count(True)] == [len(sat.config.scales), sum(sat.config.scales)]
    assert f"{len(scales)} calls" in exercise(9)[0] and f"or {sum(scales)}" in exercise(9)[0]


def test_exercise_own_recordings(tmp_path):
    """Codes that know only the toys leave more over of other sounds than codes that were started on such sounds."""
    train, compare = options_of(10, "train_sat.py")
    assert train.data == compare.data and train.out in compare.eval
    sat = small_sat(phis=0)
    for i in range(64):
        aar.save_audio(tmp_path / f"{i}.wav", torch.from_numpy(sine(200 + 40 * i, 8000, 0.2)).float()[None], 8000)
    toys, own = (aar.sounds(data, sat.config) for data in (None, tmp_path))
    toys, own = (sat.latents(torch.stack([data[i][0] for i in range(60)])).detach() for data in (toys, own))
    assert errors(sat, own, start_on=own)[-1] < 0.8 * errors(sat, own, start_on=toys)[-1]


def test_troubleshooting_is_of_this_program():
    """Each message and number of the log that it quotes is in the code, each option is one of a script."""
    code = "".join((HERE / f"{name}.py").read_text(encoding="utf-8") for name in ("aar", "train_sat", "train_aar", "sample"))
    rows = [row.strip("| ").split(" | ") for row in section("Troubleshooting").strip().splitlines()[2:]]
    assert len(rows) >= 12 and all(len(row) == 3 for row in rows)
    for row in rows:
        for quoted in re.findall(r"`([^`]+)`", row[0]):
            for part in re.split(r" \.\.\.|'mel' is nan|0 of its", quoted):
                assert part.strip() in code, part
        for flag in re.findall(r"--[a-z-]+", " ".join(row)):
            assert f'"{flag}"' in code, flag
