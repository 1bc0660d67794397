"""The specification: each test is named by its property, with a naive reference beside what it checks."""
import base64
import copy
import dataclasses
import functools
import html
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import soundfile
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import aar
import sample
import train_aar
import train_sat
from aar import (AAR, PRESETS, SAT, AARConfig, Codebook, Discriminators, Mel, MelLoss, SATConfig, TrainConfig,
                 UserError, load_audio, scale_schedule)
from train_aar import CLAP, MelEmbedder
from train_sat import TOYS, Toys, Windows

HERE = Path(aar.__file__).resolve().parent
CPU, META = torch.device("cpu"), torch.device("meta")
torch.set_num_threads(1)                                              # equal to the bit from run to run
torch.use_deterministic_algorithms(True, warn_only=True)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")           # the same for CUDA
pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid", "ignore:n_fft")             # of small sizes
Evil = type("Evil", (), {"__reduce__": lambda self: (Path.touch, (Path("evil"),))})       # its pickle makes a file


@pytest.fixture(autouse=True)
def same_start(monkeypatch):
    """Every test starts from one seed, leaves the signals as they were, and asks for no other machine's address."""
    torch.manual_seed(0)
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **_: asked.append(args) or 1 / 0)
    monkeypatch.setattr(train_sat, "draw_curves", lambda *_: None)
    if torch.cuda.is_available():
        monkeypatch.setattr(aar, "fast_dtype", lambda *_, **__: torch.float32)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert not asked


def small_sat(**changes):
    """A tokenizer of 40 frames of 40 samples, 5 scales and 16 codes; phis, unlike in a new one, random."""
    config = dict(sample_rate=8000, seconds=0.2, strides=(2, 4, 5), width=4, lstm=1, latent=6, V=16, n_scales=5, phis=3)
    sat = SAT(SATConfig(**config | {"disc_width": 2} | changes))
    for p in sat.quantizer.phis.parameters():
        nn.init.normal_(p, std=0.2)
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


def clip(*sounds):                                                    # numpy sounds -> (B, 1, N) float32
    return torch.from_numpy(np.stack(sounds)).float()[:, None]


def near(a, b, far=1e-4):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=0, atol=far)


# --- Scales and quantizer --------------------------------------------------------------------------------------------
def test_schedule_grows_evenly_from_1_to_all_frames():
    """From 1 to `frames` g(s_k) grows evenly, rounded down: by default the paper's; what cannot be is refused."""
    paper = (1, 2, 4, 6, 9, 12, 16, 20, 25, 31, 37, 43, 50, 58, 66, 75)
    assert scale_schedule("quadratic", 75, 16) == paper == SATConfig().scales == AARConfig().scales
    kinds = {"quadratic": (math.sqrt, lambda u: u * u), "linear": (float, float), "log": (math.log, math.exp)}
    assert all(scale_schedule(kind, 7, 1) == (7,) for kind in kinds) and scale_schedule("flat", 3, 5) == (3,) * 5
    for frames, n, kind in itertools.product((2, 3, 7, 49, 64, 75, 100, 750), (2, 3, 5, 16, 49, 75), kinds):
        if n <= frames:
            (g, g_inverse), u = kinds[kind], [k / (n - 1) for k in range(n)]
            want = [math.floor(g_inverse(g(frames) * v + g(1) * (1 - v)) + 1e-6) for v in u]
            assert scale_schedule(kind, frames, n) == tuple(want)
    for case in (("cubic", 75, 16), ("linear", 75, 76), ("log", 75, 0), ("quadratic", 0, 1), ("flat", 75, 0)):
        with pytest.raises((KeyError, ValueError)):
            scale_schedule(*case)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_presets_are_whole(preset):
    """`AAR(preset.aar)` works as it stands, with the preset's tokenizer, from sound to tokens to sound."""
    with META:
        sat, model = SAT(preset.sat).eval(), AAR(preset.aar).eval()
        assert preset.aar.scales == preset.sat.scales and preset.aar.latent == preset.sat.latent
        tokens = sat.encode(torch.zeros(2, 1, 24000))
        assert model(torch.zeros(2, 512), sat.teacher_inputs(tokens)).shape == (2, 455, preset.aar.V)
        assert sat.decode(model.generate(torch.zeros(2, 512), sat)).shape == (2, 1, 24000)


def naive_down(x, s):
    """(T, D) -> (s, D): token i is the mean of frames floor(i T / s) .. ceil((i + 1) T / s)."""
    T = len(x)
    return np.stack([x[i * T // s:-(-(i + 1) * T // s)].mean(0) for i in range(s)])


@pytest.mark.parametrize("T", [75, 40, 13])
def test_down_and_up_equal_naive_ones(T):
    """Also for sizes that do not divide T: up is torch's interpolation, which not every device has."""
    x = torch.randn(2, 3, T)
    for s in range(1, T + 1):
        z = aar.down(x, s)
        near(aar.up(z, T), F.interpolate(z, size=T, mode="linear"))
        near(z[1].T, naive_down(x[1].T.double().numpy(), s))


def naive_phi(quantizer, k, h):
    """(T, D): half of h and half of its convolution with 9 taps, by the phi whose tick is nearest to k / (K - 1)."""
    n, K, T = len(quantizer.phis), len(quantizer.scales), len(h)
    if n == 0:
        return h
    ticks = [1 / (2 * n) + i / n for i in range(n)]                   # for the paper's 6: 1/12, 3/12 .. 11/12
    phi = quantizer.phis[min(range(n), key=lambda i: abs(ticks[i] - k / max(K - 1, 1)))]
    weight, y = phi.weight.detach().double().numpy(), np.tile(phi.bias.detach().double().numpy(), (T, 1))
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
        up = F.interpolate(torch.from_numpy(codes[r_k].T[None]), size=len(f), mode="linear")[0]
        f_hat = f_hat + naive_phi(quantizer, k, up.T.numpy())
        tokens.append(r_k)
        sums.append(f_hat)
    return tokens, sums


@pytest.mark.parametrize("changes", [{"phis": 6}, {"schedule": "log", "phis": 1}, {"schedule": "flat", "phis": 0}])
@torch.no_grad()
def test_quantizer_equals_the_loop_of_the_paper(changes):
    """Tokens and sums equal those of Alg. 1, written with loops in float64; the sums are what Alg. 2 decodes."""
    quantizer = small_sat(**changes).quantizer
    f = torch.randn(2, 6, 40)
    (out, tokens, _), f_hats = quantizer(f), quantizer.quantize(f)[1]
    for b in range(len(f)):
        want, sums = naive_msrq(quantizer, f[b].T.double().numpy())
        assert [r_k[b].tolist() for r_k in tokens] == want
        for k, want_k in enumerate(sums):
            near(f_hats[k][b].T, want_k)
            near(quantizer.decode([r_k[b:b + 1] for r_k in tokens[:k + 1]], 40)[-1][0].T, want_k)
        near(out[b].T, sums[-1])


@pytest.mark.parametrize("n_scales, training", [*itertools.product((1, 5, 16), (False, True))])
def test_gradient_passes_the_quantizer_once(n_scales, training):
    """The encoder sees 1 times the gradient of the quantized latents, not K times; only training moves the codes."""
    quantizer = small_sat(n_scales=n_scales).quantizer.train(training)
    f, weight = torch.randn(2, 6, 40, requires_grad=True), torch.randn(2, 6, 40)
    before, out = [book.codes.clone() for book in quantizer.codebooks], quantizer(f)[0]
    here, = torch.autograd.grad((weight * out.sin() + out ** 3).sum(), f)
    at = out.detach().requires_grad_()                                # the identity, at the same value
    there, = torch.autograd.grad((weight * at.sin() + at ** 3).sum(), at)
    assert torch.equal(here, there) and not torch.equal(out.detach(), f.detach())
    assert all(torch.equal(a, b.codes) != training for a, b in zip(before, quantizer.codebooks))
    assert torch.autograd.grad(quantizer(f)[0].sum(), quantizer.phis[0].weight, allow_unused=True) == (None,)


def test_quantizer_loss():
    """It is the mean over the scales of |f - f_hat_k|^2 twice: once it moves the encoder only, once the phis only."""
    quantizer, f = small_sat().quantizer, torch.randn(2, 6, 40, requires_grad=True)
    _, tokens, loss = quantizer(f)
    f_hats, weight = quantizer.decode(tokens, 40), quantizer.phis[0].weight
    to_f, to_phi = torch.autograd.grad(loss, [f, weight])
    near(to_f, sum(2 * (f - f_hat) for f_hat in f_hats).detach() / f.numel() / 5, 1e-6)
    phi_loss = sum((f.detach() - f_hat).square().mean() for f_hat in f_hats) / 5
    near(to_phi, torch.autograd.grad(phi_loss, weight)[0], 1e-6)


@pytest.mark.parametrize("V, M", [(16, 4), (64, 1), (4, 64)])
def test_a_dead_code_revives_and_stays(V, M):
    """A code below 1% of uniform use restarts on a vector of the batch, not before, and stays alive."""
    book, turn = Codebook(V, 3), itertools.cycle(range(V - 1))        # the last code is never chosen
    last = book.codes[-1].clone()
    for _ in range(math.floor(math.log(0.01) / math.log(0.99)) + 1):
        assert torch.allclose(book.codes[-1], last, rtol=1e-4)
        z = torch.randn(M, 3) + 10
        book.update(z, torch.tensor([next(turn) for _ in range(M)]))
    restarted = book.codes[-1].clone()
    assert (z - restarted).abs().amax(1).min() < 1e-5 and book.nearest(restarted) == V - 1
    book.update(z, torch.zeros(M, dtype=torch.int64))
    torch.testing.assert_close(book.codes[-1], restarted)
    book.update(restarted[None] + 1, torch.tensor([V - 1]))           # its statistics are alive
    assert 0 < (book.codes[-1] - restarted).abs().max() < 0.5


def test_kmeans_puts_the_codes_on_the_data():
    """Lloyd's rounds beat any choice of vectors as codes, at every scale of a quantizer that starts by them."""
    z, book = torch.randn(1024, 3), Codebook(8, 3)
    book.kmeans(z)
    error = (z - book.codes[book.nearest(z)]).square().sum(1).mean()
    assert error < 0.9 * min(torch.cdist(z, z[torch.randperm(1024)[:8]]).amin(1).square().mean() for _ in range(10))
    quantizer, f = SAT(small_sat().config).quantizer, torch.cumsum(torch.randn(32, 6, 40), -1)
    random, _ = (quantizer.quantize(f)[1][-1], quantizer.quantize(f, kmeans=True))
    errors = [(f - f_hat).square().mean() for f_hat in quantizer.quantize(f)[1]]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.3 * (f - random).square().mean()


# --- Codec, discriminators, and the losses of stage 1 ----------------------------------------------------------------
def naive_conv(x, weight, bias, stride, transposed):
    """One clip x (c_in, N). The padding, kernel - stride in all, is larger on the left: reflected, or trimmed."""
    kernel = weight.shape[2]
    left, right = math.ceil((kernel - stride) / 2), (kernel - stride) // 2
    if transposed:
        y = np.zeros((weight.shape[1], (x.shape[1] - 1) * stride + kernel))
        for i in range(x.shape[1]):
            y[:, i * stride:i * stride + kernel] += np.einsum("c,cok->ok", x[:, i], weight)
        return y[:, left:y.shape[1] - right] + bias[:, None]
    x = np.pad(x, ((0, 0), (left, right)), "reflect")
    windows = [x[:, i:i + kernel] for i in range(0, x.shape[1] - kernel + 1, stride)]
    return np.stack([np.einsum("ck,ock->o", window, weight) + bias for window in windows], 1)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kernel, stride", [(7, 1), (3, 1), (1, 1), (4, 2), (8, 4), (10, 5), (16, 8), (6, 3)])
@torch.no_grad()
def test_convolutions_equal_naive_ones(kernel, stride, transposed):
    """Length times or through the stride; reflect padding, of which the larger half is on the left."""
    module, x = aar.conv(3, 2, kernel, stride, transposed), torch.randn(1, 3, 12 * (1 if transposed else stride))
    nn.init.normal_(module.bias)
    weight, bias = (p.double().numpy() for p in (module.weight, module.bias))
    want = naive_conv(x[0].double().numpy(), weight, bias, stride, transposed)
    near(module(x)[0], want, 1e-5)
    assert want.shape[1] == 12 * (stride if transposed else 1)


@torch.no_grad()
def test_decode_of_encode_is_the_reconstruction():
    """encode then decode is what forward does, for any length; fewer scales are a coarser sound of the same length."""
    sat, x = small_sat(), noise(2, 1, 1600)
    for n in (200, 201, 639, 4001):
        y, tokens, _ = sat(noise(2, 1, n))
        assert y.shape == (2, 1, n) and sat.latents(y).shape == (2, 6, math.ceil(n / 40)) and tokens[1].shape == (2, 5)
    encoded, (y, tokens, _) = sat.encode(x), sat(x)
    assert all(torch.equal(a, b) and b.dtype == torch.int64 for a, b in zip(tokens, encoded))
    torch.testing.assert_close(sat.decode(encoded), y, rtol=0, atol=1e-5)
    assert sat.decode(encoded[:2]).shape == y.shape and not torch.equal(sat.decode(encoded[:2]), y)


@torch.no_grad()
def test_a_new_codec_keeps_the_size_of_signals_and_silence_silent():
    """With its first weights no half lets the signal vanish or blow up; biases are 0, and no training moves them."""
    for lstm in (0, 2):
        config = SATConfig(width=8, lstm=lstm, latent=32)
        assert 1 / 4 < aar.Encoder(config)(torch.randn(2, 1, 24000) / 8).std() < 4
        assert 1 / 32 < aar.Decoder(config)(torch.randn(2, 32, 75)).std() < 1 / 2
    sat = SAT(small_sat().config)
    f = sat.latents(torch.zeros(1, 1, 1600))
    assert not f.any() and not sat.decoder(f).any() and not sat.quantizer.phi(0, f).any()
    biases = [p for half in (sat.encoder, sat.decoder) for name, p in half.named_parameters() if "bias" in name]
    assert len(biases) > 20 and not any(p.any() or p.requires_grad for p in biases)


def test_hinge_losses_and_feature_matching():
    """As by hand: means over the logits, then over the discriminators; the real side of matching learns nothing."""
    assert [len(maps) for maps in Discriminators(2)(noise(1, 1, 1100))] == [6] * 10
    a, b, x = torch.randn(2, 3, requires_grad=True), torch.randn(1, 4), torch.randn(2, 3, requires_grad=True)
    real = [[a, torch.tensor([0.5, 2.0])], [b, torch.tensor([-3.0])]]
    fake = [[x, torch.tensor([-2.0, 0.5])], [2 * b, torch.tensor([3.0])]]
    near(aar.discriminator_loss(real, fake), ((0.5 + 0) / 2 + (0 + 1.5) / 2 + 4 + 4) / 2)
    near(aar.adversarial_loss(fake), ((3 + 0.5) / 2 + 0) / 2)
    near(aar.feature_loss(real, fake), ((a - x).abs().mean() / a.abs().mean() + 1).detach() / 2)
    aar.feature_loss(real, fake).backward()
    assert aar.feature_loss(real, real) == 0 and a.grad is None and x.grad is not None


def test_a_full_scale_sine_is_0_dB():
    """At the frequency of a bin the bin reads 1, 0 dB; silence reads -80 dB."""
    mel = Mel(24000, 1024, 80)
    assert (mel.dB(torch.zeros(1, 1, 9000)) == -80).all() and mel(noise(2, 1, 9000)).shape == (2, 80, 9000 // 256 + 1)
    mel.filters = torch.eye(513)                                      # bins instead of bands
    for j in (20, 43, 100, 256):
        loudest = mel.dB(clip(sine(j * 24000 / 1024, 24000, amplitude=1.0)))[0, :, 10:30]
        assert (loudest.argmax(0) == j).all() and loudest.amax(0).abs().max() < 0.1


def test_mel_and_wave_loss_equal_naive_ones():
    """More for a sound that differs more; the wave loss is the fraction of the energy that is wrong, below 3 kHz."""
    loss, x, y = MelLoss(24000), noise(2, 1, 24000), noise(2, 1, 24000, seed=2)
    mels = [Mel(24000, 2 ** i, 5 * 2 ** i // 32) for i in range(5, 12)]
    apart = [(mel(x).double() + 1e-4).log10() - (mel(y).double() + 1e-4).log10() for mel in mels]
    want = sum(d.abs().mean() + d.square().mean() for d in apart)
    assert loss(x, y).item() == pytest.approx(want.item(), rel=1e-4)
    assert loss(x, x) == 0 < loss(x, x + 0.01 * y) < loss(x, 0.3 * x) < loss(x, 0 * x)
    silent = torch.zeros(2, 1, 24000, requires_grad=True)
    assert torch.autograd.grad(loss(x, silent * 1.0), silent)[0].isfinite().all()
    low, high = clip(sine(100, 24000), sine(150, 24000, amplitude=0.05)), clip(sine(6000, 24000))
    for y, want in ((low, 0.0), (0 * low, 1.0), (-low, 4.0), (0.5 * low, 0.25)):
        assert aar.wave_loss(low, y) == pytest.approx(want, rel=0.02)
    naive = ((low - high).unfold(2, 4, 4).mean(3) ** 2).mean(2) / ((low ** 2).mean(2) + 1e-5)
    assert aar.wave_loss(low, high.expand_as(low)) == pytest.approx(naive.mean().item(), rel=1e-3)
    assert aar.wave_loss(high, -high) < 0.01


# --- Transformer -----------------------------------------------------------------------------------------------------
@pytest.fixture(params=[False, True], ids=["next-scale", "next-token"])
def pair(request):
    """A small tokenizer of scales 1 3 6 12 and a generator for it, each way of generating in turn."""
    sat = small_sat(seconds=0.06, n_scales=4)
    return sat, small_aar(sat, next_token=request.param)


def levels_and_blocks(model):
    """For each place the number of its scale, and of its block: the same, or in the next-token baseline its place."""
    levels = torch.tensor([k for k, s in enumerate(model.config.scales) for _ in range(s)])
    return levels, torch.arange(len(levels)) if model.config.next_token else levels


def naive_transformer(model, cond, x):
    """Logits (L, V) of one clip, in float64, head by head and place by place: cond (cond_dim), x (L - first, D)."""
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    depth, C, (levels, block) = model.config.depth, 64 * model.config.depth, levels_and_blocks(model)

    def linear(name, v):
        return v @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    def norm(v, scale, shift):
        return F.layer_norm(v, (C,), eps=1e-6) * (1 + scale) + shift
    gelu = functools.partial(F.gelu, approximate="tanh")
    c = linear("cond.2", gelu(linear("cond.0", cond.double())))
    h = torch.cat([c.expand(model.first, -1), linear("input", x.double())]) + w["level"][levels] + w["position"]
    for name in (f"layers.{i}" for i in range(depth)):
        gate1, gate2, scale1, scale2, shift1, shift2 = linear(f"{name}.adaln.1", F.silu(c)).view(6, C)
        q, k, v = (norm(h, scale1, shift1) @ w[f"{name}.attention.qkv.weight"].T).split(C, -1)
        q, v, y = q + w[f"{name}.attention.q_bias"], v + w[f"{name}.attention.v_bias"], torch.zeros_like(h)
        for head, place in itertools.product(range(depth), range(len(h))):
            part, seen = slice(64 * head, 64 * head + 64), block <= block[place]
            cosine = F.normalize(k[seen, part], dim=-1) @ F.normalize(q[place, part], dim=-1)
            p = (cosine * w[f"{name}.attention.log_scale"][head].exp()).flatten().softmax(0)
            y[place, part] = p @ v[seen, part]
        h = h + gate1 * linear(f"{name}.attention.proj", y)
        h = h + gate2 * linear(f"{name}.mlp.2", gelu(linear(f"{name}.mlp.0", norm(h, scale2, shift2))))
    return linear("head", norm(h, *linear("head_adaln.1", F.silu(c)).view(2, C)))


@torch.no_grad()
def test_transformer_equals_a_naive_one(pair):
    """The masked pass equals attention written head by head and place by place, to the own and earlier blocks."""
    model = pair[1]
    cond, x = torch.randn(2, 5), torch.randn(2, len(model.mask) - model.first, 6)
    want = torch.stack([naive_transformer(model, *one) for one in zip(cond, x)]).float()
    torch.testing.assert_close(model(cond, x), want, rtol=1e-4, atol=1e-4)
    assert aar.block_mask([3, 1]).tolist() == [[True] * 3 + [False]] * 3 + [[True] * 4]


@pytest.mark.parametrize("cfg, ramp", [(0, True), (1.7, True), (1.7, False)])
@torch.no_grad()
def test_generation_equals_the_masked_pass(pair, cfg, ramp, monkeypatch):
    """With a cache it reads what training reads and its logits are the masked pass's; t_k grows to cfg, or is cfg."""
    (sat, model), seen, draw = pair, ([], [], []), aar.draw
    cond, scales = torch.randn(3, 5), sat.config.scales
    model.input.register_forward_hook(lambda _, x, y: seen[0].append(x[0]))
    model.head.register_forward_hook(lambda _, x, y: seen[1].append(y))
    monkeypatch.setattr(aar, "draw", lambda logits, *args: (seen[2].append(logits), draw(logits, *args))[1])
    tokens = model.generate(cond, sat, cfg=cfg, ramp=ramp)
    (read, wrote, drawn), x = (torch.cat(y, 1) for y in seen), sat.teacher_inputs(tokens, model.config.next_token)
    assert [r_k.shape for r_k in tokens] == [(3, s) for s in scales] and len(wrote) == (6 if cfg else 3)
    near(read, x.repeat(len(read) // 3, 1, 1), 1e-6)
    conditional, free = model(cond, x), model(model.null.expand(3, -1), x)
    torch.testing.assert_close(wrote[:3], conditional, rtol=1e-4, atol=1e-4)
    t = torch.tensor([cfg * k / (len(scales) - 1) if ramp else cfg for k in levels_and_blocks(model)[0]])[:, None]
    torch.testing.assert_close(drawn, (1 + t) * conditional - t * free, rtol=1e-4, atol=1e-4)
    assert (conditional - free).abs().max() > 0.1


def test_condition_is_dropped_in_training_only():
    """With cond_drop=0.3 three of ten clips lose it, in training only, and the null condition learns from them."""
    sat = small_sat(seconds=0.06, n_scales=2)
    x = sat.teacher_inputs(random_tokens(sat, 1)).expand(600, -1, -1)
    a, b = torch.randn(2, 1, 5).expand(-1, 600, -1)
    for drop, training in itertools.product((0.0, 0.3, 1.0), (False, True)):
        model = small_aar(sat, cond_drop=drop).train(training)
        logits = model(a, x)
        hidden = (logits - copy.deepcopy(model).eval()(a[:1], x[:1])).abs().amax((1, 2)) > 1e-3
        assert abs(hidden.float().mean() - drop * training) < (0.08 if drop == 0.3 else 1e-6)
        assert torch.equal(model(b, x), logits) == (training and drop == 1)
        logits.sum().backward()
        assert bool(model.null.grad is not None and model.null.grad.any()) == (training and drop > 0)


@torch.no_grad()
def test_a_token_changes_only_later_blocks(pair):
    """Another token changes no logit of its block and of earlier ones, and some logit of every later one."""
    sat, model = pair
    cond, r, block = torch.randn(1, 5), torch.cat(random_tokens(sat, 1), 1), levels_and_blocks(model)[1]
    for i in range(r.shape[1]):
        other = r.clone()
        other[0, i] = (other[0, i] + 1) % sat.config.V
        inputs = [sat.teacher_inputs(x.split(sat.config.scales, 1), model.config.next_token) for x in (r, other)]
        change = (model(cond, inputs[0]) - model(cond, inputs[1]))[0].abs().amax(1)
        assert change[block <= block[i]].max() < 1e-5
        assert all(change[block == later].max() > 1e-4 for later in range(block[i] + 1, block[-1] + 1))


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (1, 1.0), (3, 1.0), (100, 1.0), (0, 0.5), (0, 1e-9), (4, 0.7)])
def test_draw_follows_the_likeliest(top_k, top_p):
    """Draws follow the probabilities of the top_k likeliest codes, cut where they hold top_p; a seed repeats them."""
    logits = torch.randn(1, 2, 8) * 1.5

    def draws(seed):
        return aar.draw(logits.expand(20000, -1, -1), top_k, top_p, torch.Generator().manual_seed(seed))
    for place in range(2):
        e = [math.exp(x) for x in logits[0, place].tolist()]
        order = sorted(range(8), key=lambda v: -e[v])[:top_k or 8]
        total = sum(e[v] for v in order)                              # it ends where those before hold top_p
        kept = [v for i, v in enumerate(order) if i == 0 or sum(e[u] for u in order[:i]) / total < top_p]
        want = [e[v] / sum(e[u] for u in kept) if v in kept else 0 for v in range(8)]
        got = torch.bincount(draws(0)[:, place], minlength=8) / 20000
        assert all((g == 0) == (w == 0) and abs(g - w) < 0.018 for g, w in zip(got.tolist(), want))     # 5 deviations
    assert torch.equal(draws(1), draws(1)) and (top_k == 1 or top_p < 0.01 or not torch.equal(draws(1), draws(2)))


# --- Stage 1 and stage 2: a step -------------------------------------------------------------------------------------
class NoSync(TorchDispatchMode):
    """Fails on what makes the program wait for the device: reading a number, and sizes that depend on numbers."""

    waits = {"_local_scalar_dense", "item", "nonzero", "multinomial", "equal", "masked_select", "_unique2", "bincount"}

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(torch.is_tensor(x) and x.dtype == torch.bool for x in args[1] or ())
        assert name not in self.waits and not by_mask, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def stage_1(device=CPU, **changes):
    sat, discriminators, optimizers, lr = train_sat.build(small_sat(**changes).config, device)
    return sat, discriminators, optimizers, MelLoss(8000).to(device), lr


@pytest.mark.parametrize("device, dtype", [(META, torch.float32), (CPU, torch.float32), (CPU, torch.bfloat16)], ids=str)
def test_no_step_waits_for_the_device(device, dtype, monkeypatch):
    """No step, in either precision, and no generation reads a number from the device or makes tensors elsewhere."""
    monkeypatch.setattr(aar, "fast_dtype", lambda *_, **__: dtype)    # with CUDA all steps are in bfloat16
    for wait in (torch.Tensor.item, torch.any, lambda x: x[x > 0], torch.nonzero, lambda x: torch.multinomial(x, 1)):
        with pytest.raises(AssertionError, match="waits"), NoSync():
            bool(wait(torch.ones(1)))                                 # the guard fires, on the host's own tensors too
    if device == META:                                                # torch's AdamW would read learning rate and step
        monkeypatch.setattr(train_sat, "adamw", lambda params, lr, betas: torch.optim.SGD(params, 1e-3))
    with device:
        sat, *rest, mel_loss, lr = stage_1(device)
        x, cond = torch.ones(2, 1, 1600), torch.ones(2, 5)
        sat.quantizer.quantize(sat.latents(x), kmeans=True)
        generators = [train_aar.build(AARConfig(sat.config.scales, 6, 16, 1, 5, next_token=next_token), sat, device)
                      for next_token in (False, True)]
        with NoSync() if device == CPU else META:
            for quantize, adversarial in ((False, False), (False, True), (True, True)):
                for _ in range(2 if device == CPU else 1):            # the first step makes the optimizers' state
                    losses = train_sat.train_step(sat, *rest, mel_loss, quantize, adversarial, x)
                assert ("discriminator" in losses) == adversarial and {x.device for x in losses.values()} == {device}
            r = torch.cat(sat.encode(x), 1)
            for model, optimizers, _ in generators:
                for _ in range(2):
                    losses = train_aar.train_step(model, sat, optimizers, r, cond)
                assert losses["loss"].device == device
                model.to(dtype)
                sound = sat.decode(model.eval().generate(cond, sat, cfg=2.0, top_k=4, top_p=0.9))
                assert sound.device == device and sound.shape == x.shape
        assert MelEmbedder(8000)(x).device == device


def test_each_player_learns_from_its_own_loss(monkeypatch):
    """A step of stage 1 gives both players the gradients of separate, naive passes, each of its own loss."""
    sat, judges, optimizers, mel_loss, lr = stage_1()
    x, _ = torch.stack([Toys(sat.config)[i] for i in range(3)]), lr.fill_(1e-3)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *_: torch.zeros(()))             # gradients as they are
    naive_sat, naive_judges = copy.deepcopy(sat), copy.deepcopy(judges)
    train_sat.train_step(sat, judges, optimizers, mel_loss, True, True, x)
    y, _, vq = naive_sat(x)
    fake, real = naive_judges(y[:2]), naive_judges(x[:2])             # they judge half of the clips, rounded up
    losses = {"time": (x - y).abs().mean(), "wave": aar.wave_loss(x, y), "mel": mel_loss(x, y), "vq": vq,
              "adversarial": aar.adversarial_loss(fake), "feature": aar.feature_loss(real, fake)}
    loss = sum(train_sat.WEIGHTS[name] * value for name, value in losses.items())
    learned = [(p, q) for p, q in zip(sat.parameters(), naive_sat.parameters()) if q.requires_grad]
    for (p, q), want in zip(learned, torch.autograd.grad(loss, [q for _, q in learned], allow_unused=True)):
        torch.testing.assert_close(p.grad, torch.zeros_like(p) if want is None else want, rtol=1e-3, atol=1e-5)
        assert not torch.equal(p, q)                                  # and takes its step
    d_loss = aar.discriminator_loss(real, naive_judges(y[:2].detach()))
    for p, want in zip(judges.parameters(), torch.autograd.grad(d_loss, list(naive_judges.parameters())), strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (12, 12)])
def test_muon_makes_all_singular_values_alike(shape, monkeypatch):
    """By SVD: orthogonal(U S V^T) is U S' V^T, S' between 0.6 and 1.3. Muon's first step is that, of AdamW's size."""
    monkeypatch.setattr(aar, "fast_dtype", lambda *_: torch.float32)
    U, _, V = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    G = (7 * U * torch.logspace(0, -2, min(shape)) @ V).float()
    X = train_sat.orthogonal(G)
    inner = U.T @ X.double() @ V.T
    assert 0.6 < inner.diag().min() and inner.diag().max() < 1.3 and not train_sat.orthogonal(0 * G).any()
    assert (inner - inner.diag().diag()).abs().max() < 1e-3 and (X.double() - U @ inner @ V).abs().max() < 1e-3
    w, idle = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.ones(2, 2))
    w.grad = G
    optimizer = train_sat.Muon([w, idle], {"lr": torch.tensor(0.01)})
    optimizer.step()
    torch.testing.assert_close(w.detach(), -0.01 * 0.2 * max(shape) ** 0.5 * X, rtol=1e-3, atol=1e-5)
    assert (idle == 1).all() and torch.allclose(optimizer.state[w]["momentum"], 0.05 * G)   # no gradient, no step


def test_learning_rate():
    """It grows evenly to its peak during the warm-up, then falls, never rising, to about 1% at the end."""
    plan = TrainConfig(steps=1000, batch=1, lr=2.0, warm_up=0.1)
    rates = [train_sat.learning_rate(step, plan) for step in range(1000)]
    assert rates[:100] == pytest.approx([(i + 1) / 50 for i in range(100)]) and rates[100:] == sorted(rates[100:])[::-1]
    assert (max(rates), rates[550], rates[-1]) == pytest.approx((2, 1.01, 0.02), rel=1e-2)


def test_stage_2_overfits_one_batch(pair):
    """A small generator starts by guessing, learns random tokens by heart, and says them to their condition."""
    sat, config = pair[0], dataclasses.replace(pair[1].config, depth=1)
    model, optimizers, lr = train_aar.build(config, sat, CPU)
    r, cond = torch.cat(random_tokens(sat, 4), 1), F.normalize(torch.randn(4, 5), dim=1)
    lr.fill_(5e-3)
    losses = [train_aar.train_step(model, sat, optimizers, r, cond)["loss"].item() for _ in range(120)]
    assert losses[0] == pytest.approx(math.log(16), rel=1e-3)
    assert train_aar.teacher_forced(model.eval(), sat, r, cond)[0].mean() < 0.1
    assert torch.equal(torch.cat(model.generate(cond, sat, cfg=0, top_k=1), 1), r)


def test_coarse_tokens_weigh_more(pair):
    """A step's gradient is that of the mean loss in which a token of scale k weighs 1 / sqrt(s_k)."""
    sat, model = pair
    r, cond = torch.cat(random_tokens(sat, 3), 1), torch.randn(3, 5)
    loss = train_aar.teacher_forced(model.eval(), sat, r, cond)[0]                # (3, L)
    weights = [s ** -0.5 for s in sat.config.scales for _ in range(s)]
    naive = sum(w * x for w, x in zip(weights, loss.mean(0))) / sum(weights)
    want = torch.autograd.grad(naive, list(model.parameters()), allow_unused=True)
    train_aar.train_step(model, sat, {}, r, cond)
    size = max(1.0, sum(g.square().sum() for g in want if g is not None).sqrt().item())
    for p, g in zip(model.parameters(), want):
        assert g is None or torch.allclose(p.grad, g / size, rtol=1e-3, atol=1e-5)


def test_a_window_is_embedded_as_it_is_tokenized():
    """Row i of the tokens and row i of the conditions come from window i."""
    sat, embedder = small_sat(), lambda wav: wav.mean(-1)
    data = [noise(1, 1, sat.config.samples, seed=i)[0] for i in range(20)]
    tokens, cond = train_aar.tokenize(sat, embedder, data, 20)
    for i, wav in enumerate(data):
        assert torch.equal(tokens[i].long(), torch.cat(sat.encode(wav[None]), 1)[0])
        near(cond[i], wav.mean(-1))


# --- Checkpoints, and the authors' -----------------------------------------------------------------------------------
def checkpoint(path, model, **run):
    """Write a checkpoint as training does; `run` are its settings."""
    kind, config = type(model).__name__.lower(), dataclasses.asdict(model.config)
    aar.save(path, {"kind": kind, "step": 2, "history": [], "run": {"steps": 2} | run, "config": config,
                    "parts": {kind: model.state_dict()}})
    return path


def test_checkpoint_round_trip(tmp_path, capsys):
    """Loaded models do what the saved ones did; a training that stopped early warns; another tokenizer is refused."""
    sat = small_sat()
    model, x, cond = small_aar(sat, cond_dim=512), noise(2, 1, 1600), torch.randn(2, 512)
    sat2 = aar.load_sat(checkpoint(tmp_path / "sat.pt", sat))
    checkpoint(tmp_path / "aar.pt", model, sat=aar.fingerprint(sat), embedder="mel", clap="x", sounds="toys")
    model2 = aar.load_aar(tmp_path / "aar.pt", sat2)
    assert sat2.config == sat.config and model2.config == model.config and not sat2.training and not model2.training
    assert model2.embedder == {"kind": "mel", "fingerprint": "x", "toys": True} and capsys.readouterr().err == ""
    assert torch.equal(sat(x)[0], sat2(x)[0])
    assert torch.equal(*(torch.cat(m.generate(cond, s, top_k=1), 1) for m, s in ((model, sat), (model2, sat2))))
    aar.load_sat(checkpoint(tmp_path / "early.pt", sat, steps=3000))
    assert "early.pt stopped after 2 of 3000 steps" in capsys.readouterr().err
    sat2.quantizer.codebooks[2].codes[3, 1] += 1e-6
    with pytest.raises(UserError, match="another tokenizer.*--sat"):
        aar.load_aar(tmp_path / "aar.pt", sat2)


def test_what_is_no_checkpoint_is_refused(tmp_path, monkeypatch):
    """Of another stage or version, truncated, foreign, absent: one line that names the file; no code in it runs."""
    monkeypatch.chdir(tmp_path)
    whole = checkpoint(Path("good.pt"), small_sat()).read_bytes()
    state = torch.load("good.pt", weights_only=True)
    config, foreign = state["config"], [[1, 2], {"weight": torch.ones(2)}, torch.ones(2), None, {"kind": Evil()}]
    for i, content in enumerate([*foreign, state | {"config": config | {"new": 1}}, state | {"kind": "aar"},
                                 state | {"config": config | {"V": "16"}}, state | {"parts": {"sat": {}}}]):
        torch.save(content, f"{i}.pt")
    for n in (0, 10, 1000, len(whole) // 2, len(whole) - 10):
        Path(f"truncated-{n}.pt").write_bytes(whole[:n])
    Path("good.pt").write_text("<html>404</html>")
    for path in [*sorted(Path().iterdir()), Path("absent.pt"), tmp_path]:
        with pytest.raises(UserError, match=f"^{re.escape(str(path))}: [^\n]*$"):
            aar.load_sat(path)
    assert not Path("evil").exists()


def test_a_checkpoint_is_whole_at_any_moment(tmp_path):
    """Killed while it saves, a process leaves the old file or the new one; a link to it stays a link."""
    path, link, rng = tmp_path / "x.pt", tmp_path / "link.pt", np.random.default_rng(0)
    link.symlink_to(path)
    aar.save(link, torch.zeros(300_000))
    for _ in range(12):
        if (pid := os.fork()) == 0:
            for i in itertools.count(1):
                aar.save(link, torch.full((300_000,), float(i)))
        time.sleep(rng.uniform(0.01, 0.06))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        x = torch.load(path, weights_only=True)
        assert len(x) == 300_000 and (x == x[0]).all() and link.is_symlink()
    assert x[0] > 0                                                   # it did save


def published_sat(D, latent):
    """{name: shape} of the authors' tokenizer, whose latents of D numbers may be projected to `latent`."""
    convs = [("encoder.model.0", 1, 32, 7), ("encoder.model.15", 512, D, 7), ("decoder.model.0", D, 512, 7),
             ("decoder.model.15", 32, 1, 7)]
    shapes = {f"{half}.lstm.{part}_{way}_l{i}": (2048, 512)[:n] for half in ("encoder.model.13", "decoder.model.1")
              for part, n in (("weight", 2), ("bias", 1)) for way in ("ih", "hh") for i in (0, 1)}
    for i, (c, r) in enumerate(((32, 2), (64, 4), (128, 5), (256, 8))):
        convs += [(f"encoder.model.{3 * i + 3}", c, 2 * c, 2 * r), (f"decoder.model.{12 - 3 * i}", 2 * c, c, 2 * r)]
        for unit in (f"encoder.model.{3 * i + 1}.", f"decoder.model.{13 - 3 * i}."):
            convs += [(unit + "block.1", c, c // 2, 3), (unit + "block.3", c // 2, c, 1), (unit + "shortcut", c, c, 1)]
    for name, c_in, c_out, kernel in convs:
        transposed = name.startswith("decoder") and kernel % 2 == 0
        name, rows = (f"{name}.convtr.convtr", (c_in, c_out)) if transposed else (f"{name}.conv.conv", (c_out, c_in))
        shapes |= {f"{name}.bias": (c_out,), f"{name}.weight_g": (rows[0], 1, 1), f"{name}.weight_v": (*rows, kernel)}
    for name in (f"quantizer.vq.quant_resi.qresi_ls.{i}" for i in range(6)):
        shapes |= {f"{name}.weight": (latent, latent, 9), f"{name}.bias": (latent,)}
    for name in (f"quantizer.vq.layers.{k}._codebook." for k in range(16)):
        shapes |= {name + "inited": (1,), name + "cluster_size": (1024,)}
        shapes |= {name + "embed": (1024, latent), name + "embed_avg": (1024, latent)}
    for way, a, b in (("in", latent, D), ("out", D, latent)) if D != latent else ():
        shapes |= {f"quantizer.vq.project_{way}.weight": (a, b), f"quantizer.vq.project_{way}.bias": (a,)}
    return shapes


def published_aar(depth, latent):
    """{name: shape} of the authors' generator."""
    C = 64 * depth
    shapes = {"pos_start": (1, 1, C), "pos_1LC": (1, 455, C), "uncond_embedding": (1, 512), "lvl_embed.weight": (16, C),
              "word_embed.weight": (C, latent), "word_embed.bias": (C,), "class_emb.fc1.weight": (C, 512),
              "class_emb.fc2.weight": (C, C), "head.weight": (1024, C), "head.bias": (1024,),
              "head_nm.ada_lin.1.weight": (2 * C, C), "head_nm.ada_lin.1.bias": (2 * C,)}
    for name in (f"blocks.{i}." for i in range(depth)):
        shapes |= {name + "attn.scale_mul_1H11": (1, depth, 1, 1), name + "attn.mat_qkv.weight": (3 * C, C)}
        shapes |= {f"{name}attn.{part}": (C,) for part in ("q_bias", "v_bias")}
        for part, a, b in (("attn.proj", C, C), ("ffn.fc1", 4 * C, C), ("ffn.fc2", C, 4 * C), ("ada_lin.1", 6 * C, C)):
            shapes |= {f"{name}{part}.weight": (a, b), f"{name}{part}.bias": (a,)}
    return shapes


def published_numbers(shapes):
    """Tensors by the rule with which the published code was filled when it gave the numbers of the next test."""
    def number(name, shape):
        x, columns = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape), shape[-1]
        for rule, offset, scale in (("weight_g|inited|cluster_size", 1, 0), ("scale_mul", np.log(4), 0.1),
                                    ("bias", 0, 0.02), ("embed(_avg)?$", 0, 0.25), ("weight_v", 0, 1),
                                    ("^pos_|^lvl_embed", 0, 0.3), ("ada_lin", 0, 0.5 / columns ** 0.5),
                                    ("qresi_ls", 0, np.prod(shape[1:]) ** -0.5),
                                    ("", 0, (columns if len(shape) > 1 else 1) ** -0.5)):
            if re.search(rule, name):
                return torch.from_numpy((offset + scale * x).astype(np.float32))
    return {name: number(name, shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """{stage: checkpoint of the authors}, the tokenizer's with `module.` before its names."""
    paths = {stage: tmp_path_factory.mktemp("theirs") / f"{stage}.pth" for stage in ("sat", "aar")}
    state = {f"module.{name}": x for name, x in published_numbers(published_sat(128, 128)).items()}
    torch.save({"generator_state_dict": state, "epoch": 1, "step": 2}, paths["sat"])
    torch.save({"model_state_dict": published_numbers(published_aar(2, 128)), "optimizer_state_dict": {}}, paths["aar"])
    return paths


@torch.no_grad()
def test_the_authors_checkpoints_do_what_their_code_does(theirs):
    """Tokens, sound, logits and likeliest codes are those that the published code (commit eaaf1bc) gave."""
    rng, t = np.random.default_rng(0), np.arange(24000) / 24000
    wav = clip(*(0.3 * np.sin(2 * np.pi * hz * t) * np.exp(-3 * t) + 0.05 * rng.standard_normal(24000)
                 for hz in (330, 1234)))
    cond = F.normalize(torch.from_numpy(rng.standard_normal((2, 512))).float(), dim=1)
    sat = aar.load_sat(theirs["sat"])
    model, tokens = aar.load_aar(theirs["aar"], sat), sat.encode(wav)
    r, logits = torch.cat(tokens, 1), model(cond, sat.teacher_inputs(tokens))
    assert r[:, :3].tolist() == [[815, 946, 946], [331, 981, 563]] and model.embedder["published"]
    near(sat.quantizer.codebooks[3].sum, sat.quantizer.codebooks[3].codes / 1024, 1e-6)      # for fine-tuning
    crcs = [zlib.crc32(codes.numpy().astype("<i2").tobytes()) for codes in (r, logits.argmax(-1))]
    assert crcs == [0x58143a9c, 0x4962e0b9]
    want = [[0.001948, -0.615191, 0.101395, 0.170357, 0.064865], [-0.085213, -0.227658, 0.138624, 0.03827, -0.02047]]
    near(sat.decode(tokens)[:, 0, [750, 3750, 6750, 15000, 22500]], torch.tensor(want), 1e-4)
    want = [[-1.118, -0.492, -0.054, -0.305], [-0.691, 1.081, 0.234, -0.616], [0.245, -0.481, 0.929, -0.641],
            [0.905, 0.115, -1.386, -1.91]]
    near(logits[0, 0:421:140, 0:769:256], torch.tensor(want), 1e-2)


@torch.no_grad()
def test_the_projections_of_the_other_variant_fold_exactly(tmp_path):
    """With dimension 1024 and latent 64: the same as with the Linear layers applied by hand."""
    tensors = published_numbers(published_sat(1024, 64))
    torch.save({"generator_state_dict": tensors}, tmp_path / "sat.pth")
    sat, h, z = aar.load_sat(tmp_path / "sat.pth"), torch.randn(1, 512, 20), torch.randn(1, 64, 20)

    def layer(name, x):                                               # weight norm, reflect padding
        v, g, bias = (tensors[f"{name}.conv.conv.{part}"] for part in ("weight_v", "weight_g", "bias"))
        return F.conv1d(F.pad(x, (3, 3), mode="reflect"), g * v / v.norm(dim=(1, 2), keepdim=True), bias)

    def project(way, x):
        return F.linear(x.mT, *(tensors[f"quantizer.vq.project_{way}.{part}"] for part in ("weight", "bias"))).mT
    near(sat.encoder[15](h), project("in", layer("encoder.model.15", h)), 1e-4)
    near(sat.decoder[0](z), layer("decoder.model.0", project("out", z)), 1e-4)
    assert sat.config == SATConfig() and len(sat.encode(noise(1, 1, 3200))) == 16


@pytest.mark.parametrize("name", ["encoder.model.3.conv.conv.weight_g", "quantizer.vq.layers.0._codebook.embed",
                                  "blocks.1.attn.q_bias", "pos_start", "decoder.model.1.lstm.weight_hh_l1"])
def test_a_damaged_checkpoint_of_theirs_is_refused(theirs, tmp_path, name):
    """A tensor that is missing, or of another shape, ends in one line; a missing one by the authors' name."""
    kind, key = ("sat", "generator_state_dict") if "coder" in name or "quant" in name else ("aar", "model_state_dict")
    state, sat = torch.load(theirs[kind], weights_only=True)[key], types.SimpleNamespace(config=SATConfig(latent=128))
    full = next(full for full in state if full.removeprefix("module.") == name)
    without = {k: x for k, x in state.items() if k != full}
    for damaged, match in ((without, re.escape(name)), (without | {full: torch.ones(3, 5)}, "")):
        torch.save({key: damaged}, tmp_path / "x.pth")
        with pytest.raises(UserError, match="x.pth.*" + match + "[^\n]*$"):
            aar.load_sat(tmp_path / "x.pth") if kind == "sat" else aar.load_aar(tmp_path / "x.pth", sat)


# --- Sounds ----------------------------------------------------------------------------------------------------------
TONE = sine(440, 24000, 0.5)
SOUNDS = {                                                            # name: (samples, rate, what becomes of it)
    "stereo": (np.stack([TONE, TONE / 3], 1), 24000, TONE * 2 / 3), "too loud": (4 * TONE, 24000, 2 * TONE),
    "anti-phase": (np.stack([TONE, -TONE], 1), 24000, TONE), "zeros": (0 * TONE, 24000, 0 * TONE),
    "one sample": (TONE[9:10], 24000, TONE[9:10]), "8 kHz": (sine(440, 8000, 0.5), 8000, TONE),
    "44.1 kHz": (sine(440, 44100, 0.5), 44100, TONE), "NaN": (np.r_[TONE, np.nan], 24000, None),
    "infinite": (np.r_[TONE, np.inf], 24000, None), "no samples": (TONE[:0], 24000, None), "absent": (None, 0, None),
    "header": (b"RIFF\xff\xff\xff\xffWAVEfmt ", 0, None), "8 bits, truncated": ("PCM_U8", 24000, TONE)}


@pytest.mark.parametrize("name", SOUNDS)
def test_load_audio_of_odd_files(tmp_path, name):
    """Channels are averaged, unless they cancel; peaks above 1 are scaled; what is no sound is the user's error."""
    (samples, rate, want), path = SOUNDS[name], tmp_path / "x.wav"
    if isinstance(samples, bytes):
        path.write_bytes(samples)
    elif isinstance(samples, str):
        soundfile.write(path, np.r_[TONE, TONE], rate, subtype=samples)
        path.write_bytes(path.read_bytes()[:44 + len(TONE)])          # it breaks off in the middle
    elif samples is not None:
        soundfile.write(path, samples, rate, subtype="FLOAT")
    if want is None:
        with pytest.raises(UserError, match="x.wav"):
            load_audio(path, 24000)
        return
    x, run_up = load_audio(path, 24000)[0], slice(200, -200) if len(want) > 400 else slice(None)
    near(x[run_up].abs(), torch.from_numpy(want).float().abs()[run_up], 0.01)
    if rate in (8000, 24000) and len(want) == 12000 == len(x):        # a part is that part of the whole
        near(load_audio(path, 24000, 0.125, 0.25)[0, 200:-200], x[3200:8800], 1e-3)


CONFIG = SATConfig(sample_rate=8000, seconds=0.2, strides=(2, 4, 5))  # windows of 1600 samples


def noise_folder(folder, names, seconds=0.5):
    """Write a sound of noise for each name; returns {path: samples}."""
    written = {}
    for i, path in enumerate(folder / name for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        written[path] = np.random.default_rng(i).uniform(-0.5, 0.5, round(seconds * 8000)).astype(np.float32)
        soundfile.write(path, written[path], 8000, format="WAV", subtype="FLOAT")
    return written


def test_every_sound_in_a_folder_is_found(tmp_path, capsys):
    """In folders within folders, behind links, even circular ones, under any name; the rest is counted or named."""
    inside, outside = tmp_path / "x", tmp_path / "elsewhere"
    names = ["a b.wav", "ä ö.wav", "deep/er/c.WAV", "日本.wav", "'quote\".wav", "-n.wav", "%d{}.wav", "x.y.z.wav"]
    good = {*noise_folder(inside, names), inside / "link/linked.wav"}
    noise_folder(outside, ["linked.wav"])
    for link, target in (("link", outside), ("circle", inside), ("nowhere.wav", "absent.wav")):
        (inside / link).symlink_to(target)
    os.mkfifo(inside / "pipe.wav")
    for name in ("text.wav", "notes.txt", "cover.jpg"):
        (inside / name).write_text("no sound")
    soundfile.write(inside / "empty.wav", np.zeros(0), 8000)
    found = train_sat.find_sounds(inside)
    assert {path: seconds for _, path, seconds in found} == dict.fromkeys(good, 0.5) and found == sorted(found)
    done = capsys.readouterr()
    assert "9 readable sounds, 4 unreadable, 2 files of other kinds" in done.out
    assert all(f"{inside / name}: " in done.err for name in ("nowhere.wav", "pipe.wav", "text.wav", "empty.wav"))


def test_windows_are_pieces_of_their_files(tmp_path, capsys):
    """They are the same for the same seed; each file is visited in turn; what breaks is named."""
    written = noise_folder(tmp_path, [f"{i}.wav" for i in range(8)])
    files = train_sat.find_sounds(tmp_path)

    def file_of(wav):
        return next(path for path, x in written.items() for p in np.flatnonzero(x == wav[0, 0].item())
                    if np.array_equal(x[p:p + 1600], wav[0]))
    data, again, other = (Windows(files, CONFIG, seed) for seed in (0, 0, 1))
    items = [data[i] for i in range(24)]
    assert [file_of(wav) for wav in items] == [path for _, path, _ in files] * 3
    assert all(torch.equal(items[i], again[i]) for i in reversed(range(24)))
    assert not any(torch.equal(items[i], other[i]) for i in range(24))
    assert not torch.equal(items[0], items[8])                        # another place in the next epoch
    assert torch.equal(next(train_sat.batches(data, 3, range(5, 9))), torch.stack(items[5:8]))
    again.augment = True                                              # by up to 6 dB
    gains = [20 * math.log10(again[i].std() / items[i].std()) for i in range(24)]
    assert -6.5 < min(gains) < -2 and 2 < max(gains) < 6.5
    soundfile.write(files[0][1], np.full(4000, np.nan), 8000, subtype="FLOAT")
    assert files[0][1] not in [file_of(data[i]) for i in range(8)]
    assert f"skipped {files[0][1]}: " in capsys.readouterr().err


def test_silent_places_are_avoided(tmp_path):
    """Of a file that is 70% silent few windows are, even if it has an offset; of four the loudest is kept."""
    data, sound = Windows([(0, tmp_path / "x.wav", 12.5)], CONFIG, 0), np.r_[np.zeros(70000), noise(30000).numpy()]
    for level, offset in itertools.product((1, 1e-4), (0, 0.002)):    # 1e-4: all of it counts as silence
        soundfile.write(tmp_path / "x.wav", level * sound + offset, 8000, subtype="FLOAT")
        assert sum(bool(data[i].std() > 1e-3 * level) for i in range(60)) > 36        # 1 - 0.7^4 = 76%


def split(folder, names, seconds=0.01):
    """Add sounds to a folder; returns the names of those that train and are held back, and the key."""
    noise_folder(folder, names, seconds)
    train, held, key = train_sat.sounds(folder, CONFIG)
    assert train[0].any() and not train[0][:, 800:].any()             # short sounds are padded
    return *({path.name for _, path, _ in part.files} for part in (train, held)), key


def test_the_same_files_are_held_back_when_a_folder_grows(tmp_path, monkeypatch, capsys):
    """About 5%, 1 to 256, never trained on, but for a single file; a folder that grows or moves moves none across."""
    train, held, key = split(tmp_path / "a", [f"{i}.wav" for i in range(0, 200, 2)])
    more_train, more_held, more_key = split(tmp_path / "a", [f"{i}.wav" for i in range(1, 200, 2)])
    assert not held & train and len(held | train) == 100 and 2 <= len(held) <= 12
    assert held <= more_held and train <= more_train and len(more_held | more_train) == 200 and key != more_key
    (tmp_path / "a").rename(tmp_path / "b")
    assert split(tmp_path / "b", []) == (more_train, more_held, more_key)
    assert split(tmp_path / "c", ["a.wav"])[:2] == ({"a.wav"}, {"a.wav"}) and "single" in capsys.readouterr().out
    train, held, _ = split(tmp_path / "d", ["kick_02.wav", "snare_04.wav"])           # both names fall among the 5%
    assert len(train) == len(held) == 1 and train != held
    monkeypatch.setattr(train_sat, "zlib", types.SimpleNamespace(crc32=lambda *_: 0))        # so do all of these
    train, held, _ = split(tmp_path / "e", [f"{i}.wav" for i in range(300)])
    assert len(train) == 1 and len(held) == 256 and not train & held


# --- Training runs ---------------------------------------------------------------------------------------------------
SCRIPTS = {"sat": train_sat, "aar": train_aar}
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(scope="module")
def wav_folder(tmp_path_factory):
    """Eight sounds of 1.2 s and one broken file."""
    folder, rng = tmp_path_factory.mktemp("wavs"), np.random.default_rng(0)
    for hz in (150, 220, 330, 480, 700, 1000, 1500, 2200):
        soundfile.write(folder / f"{hz}.wav", sine(hz, 16000, 1.2) + 0.01 * rng.standard_normal(19200), 16000)
    (folder / "broken.wav").write_text("no sound")
    return folder


def small_training(stage, out, data, *more, device="cpu", sat=None, embedder=None, **plan):
    """Train a small tokenizer, or a generator for one, as the scripts do, by default for four steps with all phases."""
    torch.manual_seed(0)
    sat, args = (sat or small_sat()).to(device), ["--device", device, "--out", str(out), "--data", str(data), *more]
    plan = {"steps": 4, "batch": 4, "lr": 1e-3, "quantize_at": 0.25, "adversarial_at": 0.5, "crops": 8} | plan
    args, plan, device = SCRIPTS[stage].arguments(args), TrainConfig(**plan), torch.device(device)
    if stage == "sat":
        return train_sat.train(args, sat.config, plan, device)
    config = AARConfig(sat.config.scales, 6, 16, depth=1, cond_drop=0.5)
    train_aar.train(args, sat, embedder or MelEmbedder(8000).to(device), config, plan, device)


def zero_padding(x, size, mode="", value=None, pad=F.pad):
    """In place of F.pad: on CUDA the gradient of reflect padding is added up in any order, so no two runs are alike."""
    return pad(x, size, value=value)


def tensors_of(path):
    return [x for x in tree_leaves(torch.load(path, weights_only=True)["parts"]) if torch.is_tensor(x)]


def at_step(monkeypatch, step, action):
    monkeypatch.setattr(train_sat, "learning_rate", lambda i, plan, rate=train_sat.learning_rate: (
        action() if i == step else 0, rate(i, plan))[1])


@pytest.mark.parametrize("how, device", [("SIGINT", "cpu"), ("SIGTERM", "cpu"), ("SIGKILL", "cpu"),
                                         pytest.param("SIGINT", "cuda", marks=cuda)])
@pytest.mark.parametrize("stage", SCRIPTS)
def test_resumed_equals_uninterrupted(stage, how, device, tmp_path, monkeypatch, wav_folder):
    """Stopped by Ctrl-C or TERM, which save, or killed, and resumed: the same as in one go, on the CPU to the bit."""
    if device == "cuda":
        monkeypatch.setattr(F, "pad", zero_padding)
    one, stopped, steps = tmp_path / "one-go.pt", tmp_path / "stopped.pt", 20       # two in each tenth of the plan
    train = functools.partial(small_training, stage, data=wav_folder, device=device, steps=steps)
    train(out=one)
    with monkeypatch.context() as patch:
        at_step(patch, steps - 2, lambda: os.kill(os.getpid(), getattr(signal, how)))
        if how == "SIGKILL":
            if (pid := os.fork()) == 0:
                train(out=stopped)
            os.waitpid(pid, 0)
        else:
            with pytest.raises(UserError, match=f"stopped after {steps - 1} of {steps} steps; --resume goes on"):
                train(out=stopped)
    assert torch.load(stopped, weights_only=True)["step"] == steps - (2 if how == "SIGKILL" else 1)
    small_training(stage, stopped, wav_folder, "--resume", device=device, steps=steps)
    small_training(stage, tmp_path / "seed.pt", wav_folder, "--seed", "1", device=device, steps=steps)
    a, b, other = (tensors_of(path) for path in (one, stopped, tmp_path / "seed.pt"))
    far = (0, 0) if device == "cpu" else (1e-4, 1e-5)
    assert len(a) > 20 and all(torch.allclose(x, y, *far) for x, y in zip(a, b, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(a, other))


def test_resume_wants_the_same_sounds_and_settings(tmp_path):
    """A renamed folder is the same; other contents, plans and seeds are named and refused."""
    noise_folder(tmp_path / "a", ["0.wav", "1.wav"])
    small_training("sat", tmp_path / "x.pt", tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    small_training("sat", tmp_path / "x.pt", tmp_path / "b", "--resume")                     # nothing is left to do
    noise_folder(tmp_path / "b", ["1.wav", "0.wav"], 0.6)
    with pytest.raises(UserError) as error:
        small_training("sat", tmp_path / "x.pt", tmp_path / "b", "--resume", "--seed", "1", lr=0.1)
    assert all(change in str(error.value) for change in ("lr 0.001 -> 0.1", "seed 0 -> 1", "sounds "))


@pytest.mark.parametrize("stage, hours", [*itertools.product(SCRIPTS, (0, 1))])
def test_a_loss_that_is_not_finite_stops_the_run(stage, hours, tmp_path, monkeypatch, wav_folder):
    """It ends in one line that names the step. The checkpoint kept is whole, even if one is saved after each step."""
    made, build, ticks, path = [], SCRIPTS[stage].build, itertools.count(), tmp_path / "x.pt"
    monkeypatch.setattr(train_sat, "time", types.SimpleNamespace(time=lambda: 3600 * hours * next(ticks)))
    monkeypatch.setattr(SCRIPTS[stage], "build", lambda *args: made.append(build(*args)) or made[-1])
    monkeypatch.setattr(SCRIPTS[stage], {"sat": "evaluate", "aar": "validate"}[stage], lambda *_: {})
    at_step(monkeypatch, 13, lambda: next(made[0][0].parameters()).data.fill_(math.nan))
    with pytest.raises(UserError, match="step 13: [a-z]+ is not finite; the last checkpoint is kept"):
        small_training(stage, path, wav_folder, steps=100, adversarial_at=1.0)
    state = torch.load(path, weights_only=True)
    assert (state["step"], len(state["history"])) == ((13, 13) if hours else (10, 1))
    assert all(x.isfinite().all() for x in tensors_of(path))


def test_s_per_step_is_the_time_of_steps(tmp_path, monkeypatch, wav_folder):
    """Neither validation nor what is written counts: by a clock on which a step takes 1 s and each of these 100."""
    now = [0.0]
    monkeypatch.setattr(train_sat, "time", types.SimpleNamespace(time=lambda: now[0]))
    for owner, name in ((train_aar, "train_step"), (train_aar, "validate"), (aar, "save"), (train_sat, "draw_curves")):
        def slow(*args, seconds=1 if name == "train_step" else 100, call=getattr(owner, name)):
            now[0] += seconds
            return call(*args)
        monkeypatch.setattr(owner, name, slow)
    small_training("aar", tmp_path / "x.pt", wav_folder)
    history = torch.load(tmp_path / "x.pt", weights_only=True)["history"]
    assert [(row["step"], row["s_per_step"]) for row in history] == [(1, 1), (2, 1), (3, 1), (4, 1)]


@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_init_starts_from_the_weights_of_a_checkpoint(whose, theirs, trained, tmp_path, wav_folder, monkeypatch):
    """--init takes the weights and sizes of a checkpoint, ours or the authors', codebooks too, and a new plan."""
    paths, out = trained if whose == "ours" else theirs, {stage: tmp_path / f"{stage}.pt" for stage in SCRIPTS}
    common = f"--device cpu --preset tiny --data {wav_folder} --steps 1 --batch 1 --init".split()
    for script in SCRIPTS.values():
        monkeypatch.setattr(script, "train_step", lambda *_: {"loss": torch.zeros(())})      # leaves the weights alone
    monkeypatch.setattr(train_sat, "evaluate", lambda *_: {})
    train_sat.main([*common, str(paths["sat"]), "--out", str(out["sat"])])
    arguments = [*common, str(paths["aar"]), "--out", str(out["aar"]), "--sat", str(paths["sat"])]
    if whose == "theirs":
        with pytest.raises(UserError, match="--embedder clap"):
            train_aar.main(arguments)
        monkeypatch.setattr(train_aar, "build_embedder", lambda *_: MelEmbedder(24000).eval())
        arguments += ["--embedder", "clap"]
    train_aar.main(arguments)
    sats = [aar.load_sat(path["sat"]) for path in (out, paths)]
    models = [aar.load_aar(path["aar"], sats[0]) for path in (out, paths)]
    for a, b in (sats, models):
        assert a.config == b.config and aar.fingerprint(a) == aar.fingerprint(b)


# --- What is measured, and the condition -----------------------------------------------------------------------------
def test_the_stand_in_hears_loudness_time_and_pitch():
    """Other noise of the same kind is the same to it; a tenth as loud, backwards or without treble it is not."""
    x, y = noise(2, 1, 8000) * torch.exp(-5 * torch.linspace(0, 1, 8000))
    e = MelEmbedder(8000)(torch.stack([x, y, x / 10, x.flip(-1), F.avg_pool1d(x, 5, 1, 2)]))
    assert e[0] @ e[1] > 0.97 and (e[2:] @ e[0]).max() < 0.9


@pytest.mark.parametrize("n, m, C", [(50, 80, 6), (300, 100, 40), (5, 7, 30)])
def test_frechet_distance_and_ranks_equal_the_formulas(n, m, C):
    """By numpy's covariances and eigenvalues, also for fewer clips than numbers; ties count against a reference."""
    a, b = torch.randn(n, C) @ torch.randn(C, C) + 1, torch.randn(m, C) @ torch.randn(C, C)
    S, T = np.cov(a.double().T), np.cov(b.double().T)
    root = np.sqrt(np.linalg.eigvals(S @ T).real.clip(0)).sum()
    want = (a.double().mean(0) - b.double().mean(0)).square().sum().item() + np.trace(S) + np.trace(T) - 2 * root
    assert train_aar.frechet(a, b) == pytest.approx(want, rel=1e-4) == train_aar.frechet(b, a)
    y, references = F.normalize(torch.randn(2, n, C), dim=2)
    want = [sum(float(y[i] @ other) >= float(y[i] @ references[i]) for other in references) for i in range(n)]
    assert train_aar.ranks(y, references).tolist() == want and train_aar.ranks(0 * y, references).tolist() == [n] * n


def test_eval_measures_on_held_back_sounds(trained, capsys):
    """Half as loud is 6 dB away, an error of a tenth 20 dB below the sound; a row for each tokenizer and guidance."""
    x, low, high, judge = noise(2, 1, 24000), sine(440, 24000), sine(880, 24000), nn.Linear(1, 1)    # has a device
    judge.config, judge.encode, judge.decode = SATConfig(), lambda wav: [wav], lambda tokens: 0.5 * tokens[0]
    assert train_sat.evaluate(judge, x)["log_mel_dB"] == pytest.approx(6.02, abs=0.01)
    judge.decode = lambda tokens: 0.3 * (tokens[0] + 0.1 * clip(high))
    assert train_sat.evaluate(judge, clip(low))["si_sdr_dB"] == pytest.approx(20, abs=0.01)
    sat, generator = map(str, trained.values())
    train_sat.main(["--device", "cpu", "--eval", sat, sat])
    seen = [line for line in capsys.readouterr().out.splitlines() if line.startswith(sat)]
    assert len(seen) == 2 and seen[0] == seen[1] and "log_mel_dB" in seen[0]
    train_aar.main(["--device", "cpu", "--sat", sat, "--eval", generator, "--cfg", "0", "50"])
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = {name: numbers for name, *numbers in lines}
    assert rows["cfg 0"] == rows["cfg 0, growing from 0"] and rows["cfg 50"] != rows["cfg 50, growing from 0"]


def roberta():
    from transformers import RobertaConfig, RobertaModel
    return RobertaModel(RobertaConfig(
        vocab_size=50265, hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=256,
        max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1)).eval()


def fake_clap(path, size="tiny", prefix="module."):
    """Write a checkpoint in laion-clap's format with random weights; of size "base" without the text half."""
    width = {"tiny": 768, "base": 1024}[size]
    parts = {"audio_branch": train_aar.laion_clap(size), "audio_projection": train_aar.projection(width)}
    if size == "tiny":
        parts |= {"text_branch": roberta(), "text_projection": train_aar.projection(64)}
    state = {f"{prefix}{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}
    state[prefix + "text_branch.embeddings.position_ids"] = torch.arange(514)[None]          # of older transformers
    torch.save({"epoch": 1, "state_dict": state, "loss": np.float64(0.5)} if prefix else state, path)
    return path


def fake_words(folder, size=50265):
    """Write vocab.json and merges.txt: special tokens, letters, a space, "ra", and fillers; returns the vocabulary."""
    words = ["<s>", "<pad>", "</s>", "<unk>", *map(chr, range(33, 127)), "\u0120", "ra"]
    words += [f"filler{i}" for i in range(size - len(words) - 1)] + ["<mask>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr a\n")
    return words


@pytest.fixture(scope="module")
def clap_file(tmp_path_factory):
    torch.manual_seed(0)
    return fake_clap(tmp_path_factory.mktemp("clap") / "clap.pt")


def test_clap_hears_ten_seconds_offline(clap_file):
    """A short sound is repeated whole, of a long one 10 s count; the same sine at two rates sounds alike."""
    seed = torch.get_rng_state()
    clap, other, x, long = CLAP(clap_file, 48000), CLAP(clap_file, 24000), noise(1, 1, 201600), noise(1, 1, 576000)
    assert torch.equal(seed, torch.get_rng_state()) and not any(p.requires_grad for p in clap.parameters())
    e = clap(torch.cat([F.pad(torch.cat([x, x], 2), (0, 480000 - 2 * x.shape[2])), long[..., :480000]]))
    near(torch.cat([clap(x), clap(long)]), e, 1e-5)
    near(e.norm(dim=1), torch.ones(2), 1e-5)
    heard = [model(clip(sine(hz, model.sample_rate, 5))) for model, hz in ((clap, 440), (other, 440), (clap, 880))]
    assert (e[0] - e[1]).norm() > 1e-3 and (heard[0] - heard[1]).norm() < 0.2 * (heard[0] - heard[2]).norm()
    assert "laion_clap" not in sys.modules                            # importing it asks the network


def test_clap_text_equals_roberta_by_hand(clap_file):
    """Token by token, unpadded; only the first 77 tokens count. A tokenizer of another size is refused."""
    folder, prompts = clap_file.parent, ["rain on a train", "dog barks " * 20]
    words, clap, branch, project = fake_words(folder), CLAP(clap_file, 48000), roberta(), train_aar.projection(64)
    e, state = clap.text(prompts), torch.load(clap_file, weights_only=False)["state_dict"]
    for part, module in (("module.text_branch.", branch), ("module.text_projection.", project)):
        module.load_state_dict({k.removeprefix(part): x for k, x in state.items()}, strict=False)
    for prompt, got in zip(prompts, e):
        ids = [0, *(words.index(word) for word in re.findall("ra|.", prompt.replace(" ", "\u0120"))[:75]), 2]
        near(got, F.normalize(project(branch(torch.tensor([ids])).pooler_output)[0], dim=0), 1e-5)
    assert (e[0] - e[1]).norm() > 1e-3
    for has, damage in ((0, (folder / "merges.txt").unlink), (300, lambda: fake_words(folder, 300)),
                        (0, lambda: (folder / "vocab.json").write_text("<html>404</html>"))):
        damage()
        with pytest.raises(UserError, match=f"has {has} of its 50265 tokens.*vocab.json and merges.txt.*{folder}"):
            clap.text(["rain"])


def test_what_is_no_clap_is_refused(tmp_path, clap_file, monkeypatch):
    """Foreign, truncated and absent files are the user's error, which tells where to get the right one."""
    monkeypatch.chdir(tmp_path)
    fake_words(tmp_path)
    base = CLAP(fake_clap(tmp_path / "base.pt", "base", prefix=""), 48000)                   # plain names will do
    assert base(noise(1, 1, 48000)).shape == (1, 512)
    with pytest.raises(UserError, match="no whole text half"):
        base.text(["a dog"])
    good, branch = torch.load(clap_file, weights_only=False)["state_dict"], "module.audio_branch.patch_embed."
    less = {k: x for k, x in good.items() if "audio_projection" not in k}
    fusion = good | {branch + "fusion_model.x": torch.ones(1)}       # of another kind, with more layers
    for i, content in enumerate([[1, 2], {"state_dict": Evil()}, less, fusion]):
        torch.save(content, f"{i}.pt")
    Path("short.pt").write_bytes(clap_file.read_bytes()[:100_000])
    for path in (*(f"{i}.pt" for i in range(4)), "short.pt", "absent.pt", None):
        with pytest.raises(UserError, match="630k-audioset-best.pt"):
            train_aar.build_embedder("clap", 48000, path)
    assert not Path("evil").exists()


# --- sample.py, its page, the command line, and the README -----------------------------------------------------------
AWKWARD = "a <b>&amp; \"c'\xe4"


@pytest.fixture(scope="module")
def trained(wav_folder, tmp_path_factory):
    """{stage: checkpoint after a few steps on the folder}, in a folder with an awkward name."""
    folder = tmp_path_factory.mktemp("trained") / AWKWARD
    folder.mkdir()
    small_training("sat", folder / "sat.pt", wav_folder)
    small_training("aar", folder / "aar.pt", wav_folder, sat=aar.load_sat(folder / "sat.pt"))
    return {stage: folder / f"{stage}.pt" for stage in SCRIPTS}


def listen(trained, out, *more):
    """Run sample.py; returns {name: samples} of the wave files it wrote."""
    both = ["--sat", trained["sat"], "--aar", trained["aar"]]
    sample.main(["--device", "cpu", "--out", str(out), *map(str, [*both, *more])])
    return {path.name: soundfile.read(path)[0] for path in sorted(Path(out).glob("*.wav"))}


def test_variations_of_a_reference(trained, tmp_path, capsys):
    """The reference is the loudest window; a seed repeats its sounds; of 4 n the n most similar are kept."""
    ref = tmp_path / "x.wav"
    soundfile.write(ref, np.r_[0.01 * sine(300, 8000, 2), sine(700, 8000, 0.3), np.zeros(8000)] + 0.1, 8000)
    a = listen(trained, tmp_path / "a", "--ref", ref, "-n", 2)
    out = capsys.readouterr().out
    b, c = (listen(trained, tmp_path / str(seed), "--ref", ref, "-n", 2, "--seed", seed) for seed in (0, 1))
    assert list(a) == ["x.reference.wav", "x.variation-1.wav", "x.variation-2.wav"] and "from 2.0 s" in out
    x = a["x.reference.wav"] - a["x.reference.wav"].mean()
    assert len(x) == 1600 and abs(np.abs(np.fft.rfft(x)).argmax() - 700 * 0.2) <= 1
    assert [np.array_equal(a[name], again[name]) for again in (b, c) for name in a] == [True] * 4 + [False] * 2
    sat = aar.load_sat(trained["sat"])
    model, cond = aar.load_aar(trained["aar"], sat), MelEmbedder(8000)(sample.loudest_window(ref, sat.config)[None])
    how = train_aar.SAMPLING | {"generator": torch.Generator().manual_seed(0)}
    y = sat.decode(model.to(aar.fast_dtype(CPU)).generate(cond.expand(8, -1), sat, **how))
    best, printed = (MelEmbedder(8000)(y) @ cond[0]).topk(2), re.findall(r"similarity (\S+)", out)
    assert [float(s) for s in printed] == pytest.approx(best.values.tolist(), abs=0.006)
    near(clip(a["x.variation-1.wav"])[0], y[best.indices[0]].clamp(-1, 1), 1e-3)
    many = listen(trained, tmp_path / "many", "--ref", ref, "-n", 17, "--scales", 2)         # more than one batch
    assert len(many) == 18 and not np.array_equal(many["x.variation-1.wav"], a["x.variation-1.wav"])


def test_reconstructions_are_as_long_as_their_files(trained, tmp_path, capsys):
    """Windows are cross-faded without a seam; a bad file does not stop the others."""
    nothing = types.SimpleNamespace(config=CONFIG, encode=lambda wav: [wav], decode=lambda tokens: tokens[0])
    for n in (1, 159, 160, 161, 1599, 1600, 1601, 3040, 3041, 10000):
        near(sample.reconstruct(nothing, noise(1, n), 1), noise(1, n), 1e-5)
    lengths = {"a": 10, "b c": 1600, "d": 1601, "e": 5123}
    for name, n in lengths.items():
        soundfile.write(tmp_path / f"{name}.wav", sine(440, 8000, 3)[1:n + 1], 8000)
    files = [tmp_path / f"{name}.wav" for name in [*lengths, "absent", "a"]]                 # two of one name
    a, b = (listen(trained, tmp_path / str(k), "--scales", k, "--reconstruct", *files) for k in (9, 2))
    assert {name.removesuffix(".reconstruction.wav"): len(x) for name, x in a.items()} == lengths | {"9-a": 10}
    assert not np.allclose(a["e.reconstruction.wav"], b["e.reconstruction.wav"], atol=1e-3)
    assert "skipped" in capsys.readouterr().err


def test_sounds_without_a_reference(trained, tmp_path, capsys):
    """A generator of toys makes one sound of each kind, and counts the kinds; another unconditional sounds."""
    assert list(listen(trained, tmp_path / "a", "-n", 3)) == [f"sound.variation-{i}.wav" for i in (1, 2, 3)]
    state = torch.load(trained["aar"], weights_only=True)
    torch.save(state | {"run": state["run"] | {"sounds": "toys"}}, tmp_path / "toys.pt")
    found = listen(trained | {"aar": tmp_path / "toys.pt"}, tmp_path / "b")
    assert len(found) == 20 and (tmp_path / "b/index.html").read_text().count("<img") == 30
    for i, kind in enumerate(TOYS):
        aar.save_audio(tmp_path / "b" / f"{kind}.variation-1.wav", Toys(SATConfig(), 1)[max(i, 5)], 24000)
    sample.print_nearest_kinds(tmp_path / "b", Toys(SATConfig()))
    assert "Guidance 0," in (s := capsys.readouterr().out) and f"{'siren ' * 6}bird wind buzz clicks\n5 of 10 " in s


def test_sounds_for_words(trained, clap_file, wav_folder, tmp_path, capsys):
    """A generator that was trained with CLAP, and no other, makes sounds of words; it wants the same CLAP."""
    fake_words(clap_file.parent)
    sat, clap, both = aar.load_sat(trained["sat"]), CLAP(clap_file, 8000), trained | {"aar": tmp_path / "aar.pt"}
    small_training("aar", both["aar"], wav_folder, "--embedder", "clap", sat=sat, embedder=clap, steps=1)
    words = ["rain / on: \"a\" train", "ra"]
    found = listen(both, tmp_path / "out", "--clap", clap_file, "-n", 2, "--text", *words)
    want = (clap(clip(*found.values())) * clap.text([words[name.startswith("ra.")] for name in found])).sum(1)
    got = sorted(re.findall(r"wrote .*/(.*\.wav)  similarity (\S+)", capsys.readouterr().out))
    assert len(found) == 4 and [float(s) for _, s in got] == pytest.approx(want.tolist(), abs=0.02)
    with pytest.raises(UserError, match="--clap"):
        listen(both, tmp_path / "no", "--text", "ra")


def test_distance_of_two_folders(tmp_path, capsys):
    """A folder is at 0 from its copy, far from other sounds; references beside variations do not count."""
    for (kind, toy), i in itertools.product((("a", 0), ("copy", 0), ("other", 5)), range(4)):
        (tmp_path / kind).mkdir(exist_ok=True)
        aar.save_audio(tmp_path / kind / f"{i}.wav", Toys(SATConfig())[10 * i + toy], 24000)
    shutil.copy(tmp_path / "a/0.wav", tmp_path / "other/0.reference.wav")
    for made, least, most in (("copy", -1e-3, 1e-3), ("other", 0.1, 9)):
        sample.main(["--device", "cpu", "--fad", str(tmp_path / "a"), str(tmp_path / made)])
        out = capsys.readouterr().out
        distance, n, m = re.search(r"distance (\S+): (\d+) sounds against (\d+)", out).groups()
        assert least <= float(distance) <= most and n == m == "4"


def test_bench_prints_its_table(monkeypatch, capsys):
    """A row for each part with its milliseconds, per clip and per call; the ratio of Fig. 3 belongs to its rows."""
    config = small_sat(sample_rate=2000, seconds=1.0, strides=(5, 5, 10), n_scales=3).config
    preset = config, AARConfig(config.scales, 6, 16, depth=1), *[TrainConfig(1, 2, 1e-3)] * 2
    monkeypatch.setitem(PRESETS, "tiny", aar.Preset(*preset))
    sample.main(["--bench", "--preset", "tiny", "--device", "cpu"])
    out = capsys.readouterr().out
    rows = re.findall(r"^\| (.*) \| (\d+) \| (.*) \| (.*) \| (.*) \|$", out, re.M)
    assert [row[0] for row in rows] == ["encode", "decode", "next-scale", "next-scale", "next-token"]
    for (_, B, *parts), calls in zip(rows, (1, 1, 3, 3, 80)):
        ms, *each = map(float, parts)
        assert all(x == pytest.approx(ms / n, abs=0.05 / n + 0.006) for x, n in zip(each, (int(B), calls)))
    assert float(re.search(r"(\S+) times", out)[1]) == pytest.approx(float(rows[4][2]) / float(rows[3][2]), rel=0.1)


def test_scripts_run_as_a_user_runs_them(trained, wav_folder, tmp_path):
    """In processes of their own, without CLAP or transformers: stage 1, stage 2, a sound; an error."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules.update(laion_clap=None, transformers=None)\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    common = ["--preset", "tiny", "--data", wav_folder, "--batch", 2, "--steps", 1]
    for script, *args in (["train_sat.py", *common, "--init", trained["sat"]], ["train_aar.py", *common],
                          ["sample.py", "--ref", wav_folder / "700.wav", "-n", 1], ["sample.py", "--sat", "absent.pt"]):
        done = subprocess.run([sys.executable, HERE / script, "--device", "cpu", *map(str, args)], cwd=tmp_path,
                              env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == (2 if "absent.pt" in args else 0), done.stdout + done.stderr
    assert re.fullmatch("error: absent.pt: no such checkpoint.*\n", done.stderr)
    assert (tmp_path / "samples/700.variation-1.wav").exists()
    for stage in SCRIPTS:                                             # held-back clips, what becomes of them; curves
        assert len(soundfile.read(tmp_path / f"{stage}.wav")[0]) == 4 * (1600 + 1600)
        assert min(PIL.Image.open(tmp_path / f"{stage}.png").size) > 100


BOTH = "--sat {sat} --aar {aar}"
ERRORS = {
    train_sat: "--steps 0; --batch -1; --lr nan; --seed -1; --device cuda:99; --data {tmp}/absent; --data {wav}; "
               "--out {sat}; --out {tmp}/new.pt --resume; --out {aar} --resume; --seconds 0.1; --out {tmp}/x.wav; "
               "--out {sat} --resume --rvq; --seconds nan; --phis 17; --init {aar}; --rvq 0; --rvq --phis 2; "
               "--data {data} --out {data}/x.pt; --eval {tmp}/absent.pt; --init {sat} --phis 2; --init {sat} --rvq",
    train_aar: "--sat {aar}; --sat {tmp}/absent.pt; --sat {sat} --embedder clap; --sat {sat} --steps 0; "
               "--sat {sat} --embedder clap --clap {tmp}/absent.pt; --sat {sat} --out {aar}; "
               "--sat {sat} --init {sat}; --sat {sat} --init {aar} --next-token; --sat {sat} --eval {sat}",
    sample: "--sat {aar} --aar {aar}; --sat {sat} --aar {sat}; {both} -n 0; {both} --top-p 0; {both} --top-p 1.5; "
            "{both} --top-k -1; {both} --cfg nan; {both} --cfg -1; {both} --text rain; {both} --seed -1; "
            "{both} --ref {tmp}/absent.wav; {both} --ref {sat}; {both} --reconstruct {tmp}/absent.wav; "
            "{both} --ref {wav} --scales 0; {both} --out {sat} --ref {wav}; --fad {tmp}/absent {tmp}"}


@pytest.mark.parametrize("line", [f"{s.__name__} {line}" for s, lines in ERRORS.items() for line in lines.split("; ")])
def test_user_errors_end_in_one_line(line, trained, wav_folder, tmp_path, monkeypatch, capsys):
    """Exit code 2, one line that starts with "error:", no traceback; no checkpoint is changed and none made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_sat, "batches", lambda *_: pytest.fail("it trains"))
    before, script, *words = [path.read_bytes() for path in trained.values()], *line.replace("{both}", BOTH).split()
    args = [word.format(**trained, wav=wav_folder / "700.wav", data=wav_folder, tmp=tmp_path) for word in words]
    with pytest.raises(SystemExit) as error:
        train_sat.run(lambda: sys.modules[script].main(args + ["--device", "cpu"] * ("--device" not in args)))
    *_, last = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and last.startswith("error: ") and len(last) < 500
    assert [path.read_bytes() for path in trained.values()] == before and not list(tmp_path.glob("*.pt"))


@pytest.fixture(scope="module")
def page(trained, tmp_path_factory):
    """A page with a reference, its reconstruction and two variations."""
    folder = tmp_path_factory.mktemp("page")
    soundfile.write(folder / f"{AWKWARD}.wav", sine(440, 8000, 12), 8000)
    listen(trained, folder, "--ref", folder / f"{AWKWARD}.wav", "-n", 2)
    return folder / "index.html"


def test_page_is_self_contained_and_labelled(page):
    """It asks for nothing from outside, and everything that is heard or seen has a name, its file's, to read."""
    text = page.read_text(encoding="utf-8")
    assert text.startswith('<!DOCTYPE html><html lang="en">') and not re.search(r"://|url\(|<script|<link", text)
    sources, alts = re.findall(' src="data:([^"]*)"', text), re.findall('<img alt="([^"]+)"', text)
    labels = [html.unescape(label) for label in re.findall('<audio controls aria-label="([^"]*)"', text)]
    assert len(labels) == len(alts) == 4 and len(sources) == text.count(" src=") == 8 and labels[0].startswith(AWKWARD)
    sounds = [soundfile.read(io.BytesIO(base64.b64decode(source.split(",")[1])))[0] for source in sources[::2]]
    assert np.array_equal(sounds[0], soundfile.read(page.parent / f"{AWKWARD}.reference.wav")[0])


def test_page_in_a_browser(page, tmp_path):
    """In Chromium each player plays and each picture has a size; it fits a phone, and is dark in the dark."""
    if not (binary := max(map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome")), key=bool)):
        pytest.skip("no Chromium is installed: apt-get install chromium-headless-shell")
    script = """<script>onload = async () => {
        const seen = {width: document.documentElement.scrollWidth, text: getComputedStyle(document.body).color}
        seen.sizes = [...document.images].flatMap(i => [i.naturalWidth, i.getBoundingClientRect().height])
        seen.played = []
        for (const audio of document.querySelectorAll("audio")) await audio.play(), seen.played.push(audio.duration)
        document.body.innerHTML = "<pre>" + JSON.stringify(seen) + "</pre>"
    }</script>"""
    (copied := tmp_path / "page.html").write_text(page.read_text(encoding="utf-8") + script, encoding="utf-8")
    for width, dark in ((1200, 1), (320, 0)):
        options = (f"--headless --no-sandbox --disable-gpu --autoplay-policy=no-user-gesture-required --mute-audio "
                   f"--window-size={width},800 --blink-settings=preferredColorScheme={1 - dark} --dump-dom "
                   f"--virtual-time-budget=20000 --user-data-dir={tmp_path}/profile {copied.as_uri()}").split()
        dom = subprocess.check_output([binary, *options], text=True, timeout=120)
        seen = json.loads(re.search(r"<pre>(.*?)</pre>", dom)[1])
        assert seen["width"] <= width and seen["played"] == [0.2] * 4 and (seen["text"] == "rgb(255, 255, 255)") == dark
        assert len(seen["sizes"]) == 8 and min(seen["sizes"]) > 100


DIFFS = re.findall(r"^ *```diff\n(.*?)^ *```", (HERE / "README.md").read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("diff", DIFFS, ids=range(len(DIFFS)))
def test_exercises_apply_as_printed(diff, monkeypatch):
    """The lines that go are in aar.py exactly once, and with those that come in their place it runs."""
    source, module = (HERE / "aar.py").read_text(encoding="utf-8"), types.ModuleType("changed")
    for change in re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)*)", diff, re.M):
        old, new = (re.sub("^.", "", lines, flags=re.M) for lines in change)
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    monkeypatch.setitem(sys.modules, "changed", module)
    exec(compile(source, "changed aar.py", "exec"), vars(module))
    sat = module.SAT(module.SATConfig(width=2, lstm=0, latent=4, V=8, disc_width=1)).train()
    model = module.AAR(module.AARConfig(latent=4, V=8, depth=1))
    assert sat(noise(1, 1, 24000))[0].shape == (1, 1, 24000)
    assert sat.decode(model.generate(torch.zeros(1, 512), sat)).shape == (1, 1, 24000)


# --- One CUDA GPU ----------------------------------------------------------------------------------------------------
@cuda
@pytest.mark.parametrize("quantize, adversarial", [(False, False), (True, False), (True, True)])
def test_replayed_steps_equal_eager_ones(quantize, adversarial, monkeypatch, capsys):
    """Eight steps of both stages, the last five replays of a CUDA graph, move the weights as eager ones do."""
    device, runs = torch.device("cuda"), []
    monkeypatch.setattr(F, "pad", zero_padding)
    for wrap in (lambda step: step, aar.graphed):
        torch.manual_seed(0)
        sat, judges, optimizers, mel_loss, lr = stage_1(device)
        model, aar_optimizers, aar_lr = train_aar.build(AARConfig(sat.config.scales, 6, 16, depth=1), sat, device)
        step = wrap(lambda x: train_sat.train_step(sat, judges, optimizers, mel_loss, quantize, adversarial, x))
        aar_step = wrap(lambda r, cond: train_aar.train_step(model, sat, aar_optimizers, r, cond))
        for i in range(8):
            torch.manual_seed(i)
            for rate in (lr, aar_lr):
                rate.fill_(1e-3 * (i + 1))
            step(noise(4, 1, 1600, seed=i).to(device))
            aar_step(torch.randint(16, (4, sum(sat.config.scales))).to(device), torch.randn(4, 512).to(device))
        runs.append([x.float() for part in (sat, judges, model) for x in part.state_dict().values()])
    assert "no CUDA graph" not in capsys.readouterr().err
    for a, b in zip(*runs):
        near(a, b, 1e-5)


@cuda
def test_replayed_generation_equals_eager(capsys):
    """The same state of the random numbers gives the same tokens; two replays draw different ones."""
    sat, generator, cond = small_sat().cuda(), torch.Generator("cuda"), torch.randn(2, 5).cuda()
    model = small_aar(sat).cuda()

    def make(cond):
        return torch.cat(model.generate(cond, sat, 2.0, 8, 0.9, generator=generator), 1)
    replayed = aar.graphed(make, generator)
    for i in range(8):
        assert torch.equal(*(call(cond).clone() for call in (make, replayed) if generator.manual_seed(i)))
    assert not torch.equal(replayed(cond).clone(), replayed(cond).clone()) and not capsys.readouterr().err
