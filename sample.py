"""Listen: variations of a reference, sounds for a text, reconstructions of files.

    python sample.py --ref dog.wav -n 4            variations of a sound
    python sample.py --text "a dog barks" "rain"   sounds for words (a generator trained with --embedder clap)
    python sample.py --reconstruct *.wav           files of any length through the tokenizer
    python sample.py --fad sounds/ made/           Frechet distance of two folders of sounds
    python sample.py                               one new sound of each built-in toy kind, and how many are recognised
    python sample.py --bench --preset paper        how fast each part is on this machine, with random weights

Beside the sounds it writes index.html, a page to hear, see and compare them; the second half of this file makes it.
"""
import argparse
import base64
import ctypes
import datetime
import functools
import gc
import html
import io
import itertools
import math
import os
import platform
import re
import shlex
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

import aar
from aar import UserError


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_mutually_exclusive_group()
    what.add_argument("--ref", metavar="FILE", help="sound to make variations of")
    what.add_argument("--text", metavar="WORDS", nargs="+", help="what to make sounds of; each argument is a prompt")
    what.add_argument("--reconstruct", metavar="FILE", nargs="+", help="send files through the tokenizer and back")
    what.add_argument("--fad", metavar=("REFERENCE", "MADE"), nargs=2, help="measure how far the sounds of folder MADE are from REFERENCE")
    what.add_argument("--bench", action="store_true", help="measure how fast each part is on this machine, with random weights")
    p.add_argument("--preset", choices=aar.PRESETS, help="for --bench: which sizes (default: paper with CUDA, else tiny)")
    p.add_argument("--scales", type=int, metavar="K", help="let hear only the first K scales (default: all)")
    p.add_argument("--sat", default="sat.pt", help="checkpoint of stage 1 (default: sat.pt)")
    p.add_argument("--aar", default="aar.pt", help="checkpoint of stage 2 (default: aar.pt)")
    p.add_argument("--clap", metavar="FILE", help="checkpoint of laion-clap, if the generator was trained with it; for --fad: what hears")
    p.add_argument("-n", type=int, default=4, help="how many sounds (default: 4)")
    p.add_argument("--cfg", type=float, default=6.0, help="guidance at the last scale; 0: none (default: 6)")
    p.add_argument("--top-k", type=int, default=0, help="draw from the K likeliest codes; 0: from all (default)")
    p.add_argument("--top-p", type=float, default=0.8, help="draw from the likeliest codes that hold this probability (default: 0.8)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", help="default: cuda, else mps, else cpu")
    p.add_argument("--out", default="samples", help="folder to write into (default: samples)")
    p.set_defaults(command=command("sample.py", argv))
    return p.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    device = aar.pick_device(args.device)
    aar.check_seed(args.seed)
    if args.n < 1:
        raise UserError(f"-n must be at least 1, got {args.n}")
    if args.ref == "" or "" in (args.text or []):
        raise UserError("--ref and --text must not be empty")
    if args.fad:
        return compare_folders(args, device)
    if args.bench:
        return bench(args, device)
    sat = aar.load_sat(args.sat, device)
    config, K, out = sat.config, len(sat.config.scales), Path(args.out)
    aar.check_drawing(config.V, args.cfg, args.top_k, args.top_p)
    if args.scales is not None and not 1 <= args.scales <= K:
        raise UserError(f"--scales {args.scales}: this tokenizer has 1 to {K}")
    n = args.scales or K
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {out}: cannot make this folder ({e.strerror})")
    index = out / "index.html"
    if os.path.lexists(index) and not (index.is_file() and GENERATOR in index.read_text(encoding="utf-8", errors="replace")):
        raise UserError(f"{index} exists and is not a page of this program: give another --out")
    written, sections, left_out = set(), {}, []                       # sections of the page: {heading: figures}

    def show(heading, *what):
        """Put a sound on the page, as long as a page of this size is still handy."""
        if sum(map(len, itertools.chain(*sections.values()))) > 8e6:
            left_out.append(heading)
        else:
            sections.setdefault(heading, []).append(sound(*what))

    def write(name, wav, heading=None, tokens=None, original=None):
        """Two references of one name must not overwrite each other."""
        name = next(n for n in itertools.chain([name], (f"{i}-{name}" for i in itertools.count(2))) if n not in written)
        written.add(name)
        aar.save_audio(out / name, wav, config.sample_rate)
        print(f"wrote {out / name}")
        heading = heading or name.rsplit(".", 2)[0]
        if original is not None:
            show(heading, f"{heading}, original", original, config)
        show(heading, name, wav, config, tokens)

    def coarse_to_fine(heading, name, tokens, ks):
        """Show what one hears of the first k scales, for each k."""
        for k in ks:
            n = sum(config.scales[:k])
            label = f"{name}, first {k} of {K} scales, {n} token{'s' * (n > 1)}"
            show(heading, label, sat.decode(tokens[:k])[0], config)

    def finish(title, what):
        if left_out:
            what += f"; the page has no room for {len(left_out)} more sounds"
        page(index, title, what, vars(args) | asdict(config), sections)
        print(f"wrote {index}")

    if args.reconstruct:
        what = (f"device {device}, the first {n} of {K} scales: {sum(config.scales[:n])} tokens "
                f"per {config.seconds:g} s window")
        print(what)
        for path in args.reconstruct:
            try:
                wav = aar.load_audio(path, config.sample_rate)
            except UserError as e:                                    # one bad file must not stop the others
                print(f"skipped {e}", file=sys.stderr)
                continue
            y = reconstruct(sat, wav.to(device), n)
            write(f"{Path(path).stem}.reconstruction-{n}-of-{K}-scales.wav", y, original=wav)
        if not written:
            raise UserError("no file could be read")
        return finish("Reconstructions", what)

    model, kind, clap = aar.load_aar(args.aar, sat, device)
    model.prepare()
    embedder = aar.build_embedder(kind, config.sample_rate, args.clap, clap).to(device)
    generator = torch.Generator(device).manual_seed(args.seed)
    step = "one token" if model.config.next_token else "one scale"
    what = (f"device {device}, every sound is one window of {config.seconds:g} s, {step} per step, condition {kind}, "
            f"guidance {args.cfg:g}, top-k {args.top_k}, top-p {args.top_p:g}, seed {args.seed}")
    print(what)

    def generate(cond):
        """Conditions (n, cond_dim) -> one new sound (1, N) after the other, each with its tokens, K tensors (1, s_k).

        They are made 16 at a time: any -n fits the memory.
        """
        for part in cond.split(16):
            r = model.generate(part, sat, args.cfg, args.top_k, args.top_p, generator)
            for i, wav in enumerate(sat.decode(r[:n])):
                yield wav, [r_k[i:i + 1] for r_k in r]

    if args.text:
        if kind != "clap":
            raise UserError(f"{args.aar} was trained with --embedder {kind}, which knows no words: train with --embedder clap; "
                            f"{aar.GET_CLAP}")
        names = [re.sub(r"\W+", "-", words).strip("-")[:60] or "text" for words in args.text]
        prompts = list(zip(names, embedder.text(args.text)))
    elif args.ref:
        wav = aar.load_audio(args.ref, config.sample_rate, seconds=config.seconds)
        wav = torch.nn.functional.pad(wav, (0, config.samples - wav.shape[-1])).to(device)
        prompts = [(Path(args.ref).stem, embedder(wav[None])[0])]
        reference = sat.encode(wav[None])
        write(f"{prompts[0][0]}.reference.wav", wav, "Reference", reference)
        coarse_to_fine("Reference, from coarse to fine", "reference", reference, range(1, K + 1))
    else:
        toys(args, sat, embedder, generate, write, coarse_to_fine)
        return finish("Toy sounds", what)
    for name, cond in prompts:
        for i, (wav, r) in enumerate(generate(cond.expand(args.n, -1)), start=1):
            write(f"{name}.variation-{i}.wav", wav, f"Variations of {name}", r)
            likeness = (embedder(wav[None]) @ cond).item()
            print(f"    cosine similarity to the {'words' if args.text else 'reference'}: {likeness:.2f}")
    if args.text:
        coarse_to_fine("The last one, from coarse to fine", f"the last of {name}", r, range(1, K + 1))
    finish(f"Variations of {', '.join(args.text or [Path(args.ref).name])}", what)


@torch.no_grad()
def reconstruct(sat, wav, n):
    """A sound of any length, (1, N), through the first n scales: windows that overlap by a tenth are cross-faded."""
    size = sat.config.samples
    fade = size // 10
    weight = torch.minimum(torch.arange(1, size + 1), torch.arange(size, 0, -1)).clamp(max=fade).to(wav) / fade
    starts = range(0, max(1, wav.shape[-1] - fade), size - fade)
    padded = torch.nn.functional.pad(wav, (0, starts[-1] + size - wav.shape[-1]))
    y, total = torch.zeros_like(padded), torch.zeros_like(padded)
    for start in starts:
        window = slice(start, start + size)
        y[:, window] += weight * sat.decode(sat.encode(padded[None, :, window])[:n])[0]
        total[:, window] += weight
    return (y / total)[:, :wav.shape[-1]]


@torch.no_grad()
def compare_folders(args, device):
    """Print the Frechet distance of two folders of sounds, beside that of the reference to itself and of noise to it.

    Every sound is cut or padded to the length of the longest made one, at most 10 s. References that `main` wrote beside
    their variations do not count as made.
    """
    rate = 24000
    embedder = aar.build_embedder("clap" if args.clap else "mel", rate, args.clap).to(device)

    def load(folder, seconds):
        if not os.path.isdir(folder):
            raise UserError(f"--fad {folder}: no such folder")
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix.lower() in aar.SoundFolder.SUFFIXES and ".reference" not in path.suffixes:
                try:
                    yield aar.load_audio(path, rate, seconds=seconds), str(path)
                except UserError as e:
                    print(f"skipped {e}", file=sys.stderr)

    def embed(wavs):
        parts = [embedder(torch.nn.functional.pad(wav, (0, size - wav.shape[-1]))[None].to(device)).cpu() for wav in wavs]
        return torch.cat([torch.empty(0, embedder.dim), *parts])
    made, names = [wav for wav, _ in load(args.fad[1], 10.0)], []
    if len(made) < 2:
        raise UserError(f"--fad {args.fad[1]}: {len(made)} readable sounds; at least 2 are needed, better thousands")
    size = max(1024, *(wav.shape[-1] for wav in made))
    reference = embed(names.append(name) or wav for wav, name in load(args.fad[0], size / rate))
    made, noise = embed(made), embed(0.1 * torch.randn(1, size) for _ in made)
    mixed = reference[torch.randperm(len(reference), generator=torch.Generator().manual_seed(args.seed))]
    half = min(len(made), len(mixed) // 2)
    print(f"embedder {'CLAP' if args.clap else 'mel, the stand-in for CLAP'}; every sound cut or padded to {size / rate:g} s")
    print(f"reference: {aar.neighbours(reference, names)}")
    for name, a, b in (("made", made, reference), ("some of the reference", mixed[:half], mixed[half:]), ("white noise", noise, reference)):
        print(f"{name}: Frechet distance {aar.frechet(a, b):.3f} ({len(a)} against {len(b)} clips)")
    aar.warn_of_few(half, embedder.dim)


def mfcc_statistics(wav, sample_rate):
    """Mean and deviation over time of 13 mel-frequency cepstra, (26,): an embedding that no training uses."""
    from librosa.feature import mfcc
    c = mfcc(y=wav.squeeze(0).cpu().numpy(), sr=sample_rate, n_mfcc=13)
    return np.concatenate([c.mean(1), c.std(1)])


def toys(args, sat, embedder, generate, write, coarse_to_fine):
    """Generate a sound from a fresh reference of each toy kind and ask which kind it is nearest to."""
    config, kinds = sat.config, aar.TOYS
    fresh = aar.ToySounds(config.sample_rate, config.samples, seed=1000 + args.seed)
    references = torch.stack([fresh[i][0] for i in range(len(kinds))])
    references = references.to(next(sat.parameters()).device)
    y, tokens = zip(*generate(embedder(references)))
    known = np.stack([mfcc_statistics(fresh[i][0], config.sample_rate) for i in range(len(kinds), 21 * len(kinds))])
    spread = known.std(0)
    right = 0
    for i, kind in enumerate(kinds):
        distance = np.linalg.norm((known - mfcc_statistics(y[i], config.sample_rate)) / spread, axis=1)
        nearest = kinds[distance.argmin() % len(kinds)]
        right += nearest == kind
        r, K = sat.encode(references[i:i + 1]), len(config.scales)
        write(f"toy-{kind}.reference.wav", references[i], kind, r)
        coarse_to_fine(kind, kind, r, [k for k in (1, 2, 4, 8) if k < K] + [K])
        write(f"toy-{kind}.variation-1.wav", y[i], kind, tokens[i])
        print(f"{kind}: nearest to {'the same kind' if nearest == kind else nearest}")
    print(f"{right} of {len(kinds)} generated sounds are nearest, by MFCC statistics, to the kind of their reference")


# ---------------------------------------------------------------------------------------------------------------
# How fast: --bench
# ---------------------------------------------------------------------------------------------------------------

JOBS = ("encode", "decode", "stage 1 step, no discriminators", "stage 1 step", "stage 2 step", "next-scale generation",
        "next-token generation")


def job(name, preset, seconds, batch, device):
    """A function that does once what --bench measures under this name: random weights, random sounds, windows of `seconds`."""
    import train_aar                                                  # here, since both import this file
    import train_sat
    config = replace(preset.sat, seconds=seconds)
    if name == "next-token generation":                               # Fig. 3: the tokens of residual VQ, 750 a second
        config = replace(config, schedule="flat", n_scales=10, phis=0)
    x = 0.1 * torch.randn(batch, 1, config.samples, device=device)
    sat, discriminators, optimizers = train_sat.build(config, 1e-4, device)
    if name.startswith("stage 1"):
        mel_loss = aar.MelLoss(config.sample_rate).to(device)
        return functools.partial(train_sat.train_step, sat, discriminators, optimizers, mel_loss, [x], adversarial=name == "stage 1 step")
    sat.eval()
    r = sat.encode(x)
    if name in ("encode", "decode"):
        return functools.partial(sat.encode, x) if name == "encode" else functools.partial(sat.decode, r)
    config = replace(preset.aar, scales=config.scales, latent=config.latent, V=config.V, next_token=name == "next-token generation")
    model, optimizers = train_aar.build(config, 1e-4, device)
    cond = torch.nn.functional.normalize(torch.randn(batch, config.cond_dim, device=device), dim=-1)
    if name == "stage 2 step":
        weight = torch.ones(sum(config.scales), device=device)
        return functools.partial(train_aar.train_step, model, sat, optimizers, weight, [(torch.cat(r, 1), cond)])
    return functools.partial(model.eval().requires_grad_(False).prepare().generate, cond, sat)


def flops(run):
    """Floating-point operations of run() in matrix products and convolutions, two for each multiplication with its addition."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):      # attention as products that it knows
        run()
    return counter.get_total_flops()


def synchronize(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def measure(run, device):
    """Seconds of run(): the shortest of three after a first, since others may use the machine; the first alone if it took 20."""
    def once():
        since = time.perf_counter()
        run()
        synchronize(device)
        return time.perf_counter() - since
    synchronize(device)
    first = once()
    return first if first > 20 else min(once() for _ in range(3))


def peak_memory(device, reset=False):
    """The highest memory so far or, with `reset`, from now on, in bytes: of the GPU, or of this process where Linux tells."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        if reset:
            ctypes.CDLL(None).malloc_trim(0)                          # what is free goes back to the system
            Path("/proc/self/clear_refs").write_text("5")
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    except (OSError, AttributeError, TypeError):
        return math.nan


def bench(args, device):
    """Print a table of how fast this machine is at most and how fast each part of the program is on it."""
    size = args.preset or ("paper" if device.type == "cuda" else "tiny")
    preset = aar.PRESETS[size]
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if os.path.exists("/proc/cpuinfo") else None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu[1] if cpu else platform.machine()
    fast = aar.fast_dtype(device)
    n = 8192 if device.type == "cuda" else 2048
    peaks = {}
    print(f"{datetime.date.today()}, preset {size}, {device} ({name}), {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, training steps and transformer in {str(fast)[6:]}, codec alone in float32\n")
    print("| | s | GFLOP | GFLOP/s | of the peak | memory | window 2 s | 5 s | 10 s | batch 2 | 4 | 8 |\n| --- |" + " ---: |" * 11)

    def row(name, *cells):
        print("| " + " | ".join([name, *cells, *[""] * (11 - len(cells))]) + " |", flush=True)
    for dtype in dict.fromkeys((torch.float32, fast)):
        x = torch.randn(n, n, device=device).to(dtype)
        seconds = measure(lambda: x @ x, device)
        peaks[dtype] = 2 * n ** 3 / seconds
        row(f"matrix product of {n}, {str(dtype)[6:]}", f"{seconds:.3g}", f"{2e-9 * n ** 3:.3g}", f"{1e-9 * peaks[dtype]:.3g}", "100%")
    x = torch.empty(2 ** 28, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    seconds = measure(lambda: y.copy_(x), device)
    row(f"copy of 256 MiB: {2e-9 * len(x) / seconds:.0f} GB/s", f"{seconds:.3g}")
    del x, y

    took = {}
    for name in JOBS:
        peak, grown = peaks[torch.float32 if name in ("encode", "decode") else fast], []
        for seconds, batch in ((1, 1), (2, 1), (5, 1), (10, 1), (1, 2), (1, 4), (1, 8)):
            if seconds * batch > 1 and (name == "next-token generation" or took[name] * seconds * batch > 60):
                grown.append("")
                continue
            run = None                                                # what came before makes room
            gc.collect()
            before = peak_memory(device, reset=True)
            run = job(name, preset, seconds, batch, device)
            s = measure(run, device)
            memory = f"{1e-6 * (peak_memory(device) - before):.0f} MB"
            if seconds * batch == 1:
                took[name] = s
                work = flops(job(name, preset, seconds, batch, torch.device("meta")))
                cells = [f"{s:.3g}", f"{1e-9 * work:.3g}", f"{1e-9 * work / s:.3g}", f"{work / s / peak:.0%}", memory]
                if name == "next-scale generation":
                    scales = milliseconds_per_step(run, device)
            else:
                grown.append(f"{s / took[name]:.1f}x, {memory}")
        row(name, *cells, *grown)
    ratio = took["next-token generation"] / took["next-scale generation"]
    row(f"next-token / next-scale: {ratio:.1f}")
    print("\nmilliseconds of each scale: " + " ".join(f"{x:.1f}" for x in scales) + "; growth: times of 1 s and batch 1; memory: "
          "peak, weights included, above what the process held before; generation with guidance. Left out: what would take "
          "minutes; in GFLOP, spectra.")


def milliseconds_per_step(run, device):
    """How long each step of run(), a generation, takes."""
    times = []

    def stamp(*_):
        synchronize(device)
        times.append(1e3 * time.perf_counter())
    model = run.func.__self__
    with model.input.register_forward_hook(stamp):                    # it opens each step but the first
        stamp()
        run()
        stamp()
    return np.diff(times)


# ---------------------------------------------------------------------------------------------------------------
# Pages: one HTML file each that needs no other file and no network; the training scripts make theirs here too
# ---------------------------------------------------------------------------------------------------------------

GENERATOR = '<meta name="generator" content="AAR in one file">'
STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 75rem; margin: auto; padding: 1rem; overflow-wrap: anywhere }
.row { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)) }
h1, h2 { font-size: 1.4rem; line-height: 1.2 }
figure, h3 { margin: 0; font-size: 1rem }
pre { white-space: pre-wrap }
audio, svg { display: block; width: 100% }
svg { fill: currentColor; font-size: 11px; overflow: visible; image-rendering: pixelated }
path { fill: none; stroke: currentColor; stroke-width: 1.5; vector-effect: non-scaling-stroke }
"""
NOTE = ("Pictures of sounds: 80 mel bands, window 1024 and hop 256 samples, 0 dB is a full-scale sine. Token maps: a row "
        "for each scale, coarse at the top; a colour is a code, and near numbers mean nothing. Names of numbers: README.md.")
ANCHORS = [(8, 8, 32), (72, 24, 120), (190, 52, 98), (248, 148, 56), (255, 250, 205)]       # red, green, blue: dark to light
PALETTE = np.stack([np.interp(np.linspace(0, 4, 256), range(5), c) for c in zip(*ANCHORS)], 1).astype(np.uint8)
mel = functools.cache(aar.Mel)


def command(script, argv):
    """What was typed, for a shell."""
    return shlex.join(["python", script, *(sys.argv[1:] if argv is None else argv)])


def page(path, title, what, settings, sections):
    """Write an HTML file of sections {heading: figures}; at any moment `path` is the old one or the new one, whole."""
    body = "".join(f'<h2>{html.escape(heading)}</h2><div class="row">{"".join(figures)}</div>'
                   for heading, figures in sections.items())
    rows = [f"{name}: {value}" for name, value in settings.items() if value is not None and name != "command"]
    listed = html.escape("\n".join(rows))
    text = (f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">{GENERATOR}<title>{html.escape(title)}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body><main>'
            f"<h1>{html.escape(title)}</h1><p>{html.escape(what)}</p><p>{NOTE}</p>"
            f"<pre>{html.escape(settings['command'])}</pre>{body}"
            f"<h2>Settings</h2><pre>{listed}</pre></main></body></html>\n")
    tmp = path.with_name(path.name + ".tmp")
    try:
        tmp.write_text(text, encoding="utf-8", errors="replace")      # a file's name may be no text
        os.replace(tmp, path)
    except OSError as e:
        tmp.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({e}); is the disk full?")


def figure(name, *parts):
    return f"<figure><figcaption><h3>{html.escape(name)}</h3></figcaption>{''.join(parts)}</figure>"


def sound(name, wav, config, tokens=None):
    """Figure of a sound (1, N), or of its first 10 s, and of its tokens, K tensors (1, s_k)."""
    file, N = io.BytesIO(), 10 * config.sample_rate
    file.name = "sound.flac"                                          # no loss, and half as large as a wave file
    aar.save_audio(file, wav[:, :N], config.sample_rate)
    name += ", first 10 s" if wav.shape[1] > N else ""
    player = (f'<audio controls preload="none" aria-label="{html.escape(name)}" '
              f'src="data:audio/flac;base64,{base64.b64encode(file.getvalue()).decode()}"></audio>')
    parts = [player, mel_picture(name, wav[:, :N], config.sample_rate)]
    return figure(name, *parts, *([token_map(name, tokens, config)] if tokens else []))


def ticks(first, last, most=5):
    """Round numbers from first to last, and where they lie between: [(place from 0 to 1, number)]."""
    step = next(m * 10.0 ** e for e in range(-9, 12) for m in (1, 2, 5) if last - first < most * m * 10.0 ** e)
    numbers = step * np.arange(math.ceil(first / step), math.floor(last / step) + 1)
    return [((x - first) / (last - first), f"{x:.6g}") for x in numbers]


def plot(label, x, y, inside, legend):
    """SVG picture of `inside`, SVG in the unit square, with axes; ticks x, y: [(place from the left or the top, text)]."""
    text = "".join(f'<text x="{52 + 200 * place:.1f}" y="176" text-anchor="middle">{t}</text>' for place, t in x)
    text += "".join(f'<text x="48" y="{12 + 150 * place:.1f}" text-anchor="end">{t}</text>' for place, t in y)
    return (f'<svg role="img" aria-label="{html.escape(label)}" viewBox="0 0 340 180">{text}{legend}'
            '<svg x="52" y="8" width="200" height="150" viewBox="0 0 1 1" preserveAspectRatio="none">'
            f'{inside}<path d="M0 0h1v1h-1z"/></svg></svg>')


def png(a):
    """Numbers from 0 to 1, (rows, columns), as an SVG image that fills the unit square."""
    from PIL import Image
    file, image = io.BytesIO(), Image.fromarray((255 * np.clip(a, 0, 1)).astype(np.uint8))
    image.putpalette(PALETTE.tobytes())
    image.save(file, "PNG")
    return (f'<image width="1" height="1" preserveAspectRatio="none" '
            f'href="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"/>')


def picture(label, image, x, y, bar):
    """Plot of numbers from 0 to 1 with a colour bar; ticks as above."""
    legend = "".join(f'<text x="277" y="{12 + 150 * place:.1f}">{t}</text>' for place, t in bar)
    legend += ('<svg x="260" y="8" width="12" height="150" viewBox="0 0 1 1" preserveAspectRatio="none">'
               f'{png(np.linspace(1, 0, 150)[:, None])}</svg>')
    return plot(label, x, y, png(image), legend)


def mel_picture(name, wav, sample_rate):
    """Log-mel picture of a sound (1, N)."""
    from librosa import mel_frequencies
    hertz = mel_frequencies(82, fmax=sample_rate / 2)[1:-1]           # the middle of each band
    dB = mel(sample_rate, 1024, 80).dB(wav[None].cpu())[0]            # (80, frames)
    band, frame = divmod(int(dB.argmax()), dB.shape[1])
    label = (f"Log-mel picture of {name}: {wav.shape[1] / sample_rate:.2f} s, 0 to {sample_rate / 2000:g} kHz, "
             f"loudest at {frame * 256 / sample_rate:.2f} s and {hertz[band]:.0f} Hz with {dB.max():.0f} dB")
    x = [(place, f"{t} s") for place, t in ticks(0, wav.shape[1] / sample_rate)]
    y = [(1 - (np.interp(f, hertz, range(80)) + 0.5) / 80, f"{f / 1000:g} kHz")
         for f in (500, 1000, 2000, 4000, 8000, 16000) if f < sample_rate / 2]
    image = torch.nn.functional.adaptive_avg_pool1d(dB, min(400, dB.shape[1])).flip(0).numpy() / 80 + 1
    return picture(label, image, x, y, [(-level / 80, f"{level} dB") for level in range(0, -81, -20)])


def token_map(name, tokens, config):
    """Picture of the tokens, a row for each scale, and their numbers to read."""
    rows, K, V = [r_k[0].cpu().numpy() for r_k in tokens], len(tokens), config.V
    image = np.stack([row[np.arange(400) * len(row) // 400] for row in rows]) / (V - 1)
    numbers = "\n".join(f"scale {k}: {' '.join(map(str, row))}" for k, row in enumerate(rows, start=1))
    x = [(place, f"{t} s") for place, t in ticks(0, config.seconds)]
    y = [((k - 0.5) / K, f"scale {k}") for k in sorted({1, (K + 1) // 2, K})]
    return (picture(f"Token map of {name}; the numbers follow", image, x, y, [(0, f"code {V - 1}"), (1, "code 0")])
            + f"<details><summary>The {sum(map(len, rows))} tokens as numbers</summary><pre>{numbers}</pre></details>")


def curves(history, *names):
    """Figure of the numbers called `names`, or of the one list called so, over the steps of a training."""
    steps, values = zip(*((row["step"], np.hstack([row[name] for name in names])) for row in history if names[0] in row))
    values = np.clip(np.nan_to_num(values), -1e9, 1e9)                # (rows, lines); NaN here must not end a training
    labels = names if values.shape[1] == len(names) else [f"scale {k + 1}" for k in range(values.shape[1])]
    margin = 0.04 * (np.max(values) - np.min(values)) + 0.01 * np.abs(values).max() + 1e-6
    bottom, top = np.min(values) - margin, np.max(values) + margin
    inside = legend = ""
    for i, (label, line) in enumerate(zip(labels, values.T)):
        # Of equal lightness, neither black nor white: seen on light and on dark pages.
        colour = f'style="stroke: oklch(62% 0.17 {300 - 280 * i / max(1, len(labels) - 1):.0f})"'
        way = "L".join(f"{step / steps[-1]:.4f} {(top - v) / (top - bottom):.4f}" for step, v in zip(steps, line))
        y = 14 + 150 * i / max(16, len(labels))
        inside += f'<path {colour} d="M{way}{"h-.05" if len(steps) == 1 else ""}"/>'
        legend += f'<path {colour} d="M258 {y - 3:.1f}h8"/>'
        legend += f'<text x="270" y="{y:.1f}" font-size="9">{label} {line[-1]:.3g}</text>'
    name = ", ".join(names)
    label = f"{name} after {steps[-1]} steps: " + ", ".join(f"{label} {v:.4g}" for label, v in zip(labels, values[-1]))
    y = [(1 - place, t) for place, t in ticks(bottom, top)]
    return figure(name, plot(label, ticks(0, steps[-1], 4), y, inside, legend))


def training_page(args, title, history, originals, config, *more):
    """Write, beside the checkpoint, what the log says and how held-back sounds (n, 1, N) came out at first, before, now."""
    if aar.rank() > 0:
        return
    names = dict.fromkeys(name for row in history for name in row)
    charts = [("loss", "held_back")] if "held_back" in names else []
    charts += [(name,) for name in names if name not in ("step", "sounds", "loss", "held_back")]
    sections = {"Over the steps": [curves(history, *chart) for chart in charts]}
    heard = [row for row in history if "sounds" in row]
    for i in range(len(originals) if heard else 0):
        name = f"Held-back sound {i + 1}"
        sections[name] = [sound(f"{name}, original", originals[i], config)] + [
            sound(f"{name}, after {row['step']} steps", row["sounds"][i] / 32767, config) for row in heard]
    settings = vars(args) | {name: value for part in (config, *more) for name, value in asdict(part).items()}
    page(Path(args.out).with_suffix(".html"), title, f"After {history[-1]['step']} steps.", settings, sections)


if __name__ == "__main__":
    aar.command_line(main)
