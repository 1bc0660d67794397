"""Listen: variations of a reference, sounds for words, reconstructions of files.

    python sample.py --ref dog.wav -n 4             variations of a sound
    python sample.py --text "a dog barks" "rain"    sounds for words (a generator with CLAP)
    python sample.py --reconstruct *.wav            files of any length through the tokenizer
    python sample.py                                a sound of each toy kind, or with other generators of any kind
    python sample.py --fad sounds/ made/            Frechet distance of two folders of sounds
    python sample.py --bench --preset paper         how long a sound takes on this machine, with random weights

Beside the sounds it writes index.html, a page to hear, see and compare them.
"""
import argparse
import base64
import html
import io
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import aar
import train_aar
import train_sat
from aar import UserError
from train_sat import TOYS


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_mutually_exclusive_group()
    what.add_argument("--ref", metavar="FILE", help="sound to make variations of; if it is long, its loudest window")
    what.add_argument("--text", metavar="WORDS", nargs="+", help="what to make sounds of; each argument is a prompt")
    what.add_argument("--reconstruct", metavar="FILE", nargs="+", help="send files through the tokenizer and back")
    what.add_argument("--fad", metavar=("REFERENCE", "MADE"), nargs=2, help="Frechet distance of two folders")
    what.add_argument("--bench", action="store_true", help="measure how long a sound takes, with random weights")
    p.add_argument("--preset", choices=aar.PRESETS, help="sizes of --bench (default: base with CUDA, else tiny)")
    p.add_argument("--sat", default="sat.pt", help="checkpoint of stage 1, ours or the authors' (default: sat.pt)")
    p.add_argument("--aar", default="aar.pt", help="checkpoint of stage 2, ours or the authors' (default: aar.pt)")
    p.add_argument("--clap", metavar="FILE", help="checkpoint of laion-clap, for a generator with CLAP and for --fad")
    p.add_argument("-n", type=int, default=4, help="how many sounds (default: 4)")
    p.add_argument("--scales", type=int, metavar="K", help="decode only the first K scales (default: all)")
    p.add_argument("--cfg", type=float, help="guidance; 0: none (default: 2; the authors': from 0 to 4)")
    p.add_argument("--top-k", type=int, help="draw from that many likeliest codes; 0: all (default: 0; authors': 200)")
    p.add_argument("--top-p", type=float, help="and that hold this much probability (default: 0.5; authors': 0.95)")
    p.add_argument("--seed", type=int, default=0, help="of the sounds (default: 0)")
    p.add_argument("--device", help="default: cuda, else mps, else cpu")
    p.add_argument("--out", default="samples", help="folder to write into (default: samples)")
    return p.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    device, preset = train_sat.begin(args)
    if args.bench:
        return bench(preset, device)
    if args.fad:
        return compare_folders(args, device)
    sat, page = aar.load_sat(args.sat, device), Page(args.out)
    rate = sat.config.sample_rate
    if args.reconstruct:
        for path in map(Path, args.reconstruct):
            try:
                wav = aar.load_audio(path, rate)
                page.add(f"{path.name}, original", wav, rate)
                page.add(f"{path.stem}.reconstruction", reconstruct(sat, wav.to(device), args.scales), rate, write=True)
            except UserError as e:                                   # one bad file must not stop the others
                print(f"skipped {e}", file=sys.stderr)
        return page.write("Reconstructions", f"Scales decoded: {args.scales or 'all'}.")

    model = aar.load_aar(args.aar, sat, device)
    kind, theirs, embedder = model.embedder["kind"], "published" in model.embedder, None
    how = {"cfg": 4.0, "top_k": 200, "top_p": 0.95, "ramp": True} if theirs else train_aar.SAMPLING
    how = how | {name: value for name, value in vars(args).items() if name in how and value is not None}
    toys = model.embedder.get("toys") and not args.ref and not args.text
    if args.ref or args.text or toys:
        embedder = train_aar.build_embedder(kind, rate, args.clap, model.embedder.get("fingerprint")).to(device)
    else:                                                            # no condition, nothing to guide
        kind, how["cfg"], prompts = "none", 0.0, [("sound", None, model.null.detach().float())]
    what = ("The authors’ weights. " * theirs + f"Guidance {'0 to ' * theirs}{how['cfg']:g}, top-k {how['top_k']}, "
            f"top-p {how['top_p']:g}, seed {args.seed}, condition {kind}" + ", similarity: its cosine" * bool(embedder))
    print(what)
    model.to(aar.fast_dtype(device))
    how["generator"] = generator = torch.Generator(device).manual_seed(args.seed)
    make = aar.graphed(lambda cond: sat.decode(model.generate(cond, sat, **how)[:args.scales]), generator)

    def variations(cond, n):
        """n pairs (sound, note). With our weights the n most similar of 4 n sounds, the best first."""
        tries = n if theirs or embedder is None else 4 * n
        cond = cond.expand(tries, -1)
        y = torch.cat([make(part.to(device)).cpu() for part in cond.split(16)])      # 16 at a time fit any memory
        if embedder is None:
            return [(x, "") for x in y]
        similarity = torch.cat([embedder(part.to(device)) for part in y.split(16)]) @ cond[0]
        return [(y[i], f"similarity {similarity[i]:.2f}") for i in similarity.argsort(descending=True)[:n]]
    if args.text and kind != "clap":
        raise UserError(f"{args.aar} was trained with --embedder {kind}, which knows no words")
    if args.text:
        prompts = [(words, None, cond) for words, cond in zip(args.text, embedder.text(args.text))]
    elif embedder:
        fresh = train_sat.Toys(sat.config, seed=train_sat.HELD_BACK + 1 + args.seed)
        references = zip(TOYS, fresh) if toys else [(Path(args.ref).stem, loudest_window(args.ref, sat.config))]
        prompts = [(name, x, embedder(x[None].to(device))[0]) for name, x in references]
    for words, x, cond in prompts:
        if x is not None:
            page.add(f"{words}.reference", x, rate, write=True)
            page.add(f"{words}.reconstruction", reconstruct(sat, x.to(device), args.scales), rate)
        name = re.sub(r"\W+", "-", words).strip("-")[:60] or "text"
        for i, (y, note) in enumerate(variations(cond, 1 if toys else args.n), start=1):
            page.add(f"{name}.variation-{i}", y, rate, write=True, note=note)
    if toys:
        print_nearest_kinds(page.folder, fresh)
    page.write(", ".join(words for words, *_ in prompts), what)


def loudest_window(path, config):
    """The loudest window (1, N) of a file, in steps of a tenth; a shorter sound is padded with silence."""
    wav, N = aar.load_audio(path, config.sample_rate), config.samples
    wav = F.pad(wav, (0, max(0, N - wav.shape[1])))
    start = wav.unfold(1, N, N // 10).std(-1).argmax().item() * (N // 10)
    print(f"reference: the loudest window of {path}, from {start / config.sample_rate:.1f} s")
    return wav[:, start:start + N]


def reconstruct(sat, wav, n):
    """A sound of any length, (1, N), through the first n scales: windows that overlap by a tenth are cross-faded."""
    N, size, fade = wav.shape[1], sat.config.samples, sat.config.samples // 10
    wav = F.pad(wav, (0, max(size - N, (fade - N) % (size - fade))))             # to whole windows
    windows = wav.unfold(1, size, size - fade).transpose(0, 1)       # (windows, 1, size)
    y = torch.cat([sat.decode(sat.encode(window[None])[:n]) for window in windows])
    weight = torch.minimum(torch.arange(1, size + 1), torch.arange(size, 0, -1)).clamp(max=fade).to(wav)
    total, made = (F.fold(x.flatten(1).T, (1, wav.shape[1]), (1, size), stride=(1, size - fade))[0]
                   for x in (weight.expand_as(windows), weight * y))
    return (made / total)[:, :N]


def print_nearest_kinds(folder, fresh):
    """Print which kind each generated toy in a folder is nearest to, by mean and deviation of its MFCCs over time."""
    from librosa.feature import mfcc

    def statistics(wavs):                                            # a list of n sounds (1, N) -> (n, 26)
        c = np.stack([mfcc(y=wav[0].numpy(), sr=fresh.config.sample_rate, n_mfcc=13) for wav in wavs])
        return np.concatenate([c.mean(2), c.std(2)], 1)
    known = statistics([fresh[i] for i in range(10, 210)])
    made = [aar.load_audio(folder / f"{kind}.variation-1.wav", fresh.config.sample_rate) for kind in TOYS]
    distance = np.linalg.norm((statistics(made)[:, None] - known) / known.std(0), axis=2)     # (10, 200)
    nearest = [TOYS[i % 10] for i in distance.argmin(1)]
    print("nearest kinds, by MFCC statistics:", *nearest)
    print(sum(map(str.__eq__, nearest, TOYS)), "of 10 generated sounds are nearest to the kind of their reference")


def compare_folders(args, device):
    """Print the Frechet distance of the embeddings of two folders, 1 s of each sound; CLAP with --clap, else mel."""
    embedder = train_aar.build_embedder("clap" if args.clap else "mel", 24000, args.clap).to(device)
    embeddings = []
    for folder in args.fad:
        files = train_sat.find_sounds(folder)
        counted = [file for file in files if ".reference" not in file[1].suffixes]   # only variations count
        data = train_sat.Windows(counted or files, aar.SATConfig(), args.seed)
        loader = train_sat.batches(data, 16, range(len(data)))
        embeddings.append(torch.cat([embedder(x.to(device)).cpu() for x in loader]))
    reference, made = embeddings
    print(f"Frechet distance {train_aar.frechet(made, reference):.3f}: {len(made)} sounds against {len(reference)}")


def bench(preset, device):
    """Print how long a sound takes with random weights; next-token is that of residual VQ, as in Fig. 3."""
    from torch.utils.benchmark import Timer
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{name}, {torch.__version__}\n\n| what | batch | ms | ms per clip | per step |\n| --- |" + " ---: |" * 4)

    def measure(what, step, *inputs, calls=1):
        work = {"step": aar.graphed(step), "inputs": inputs}
        timer = Timer("step(*inputs)", globals=work, num_threads=torch.get_num_threads())
        timer.timeit(2)                                              # 2 calls + 2 of its own: warm-up and capture
        ms, B = 1000 * timer.blocked_autorange().median, len(inputs[0])
        print(f"| {what} | {B} | {ms:.1f} | {ms / B:.2f} | {ms / calls:.2f} |", flush=True)
        return ms

    def generation(what, config, cond):
        sat = aar.SAT(config).to(device)
        model = aar.AAR(replace(preset.aar, scales=config.scales, next_token=what == "next-token")).eval()
        model.to(device, aar.fast_dtype(device))
        return measure(what, lambda cond: sat.decode(model.generate(cond, sat, **train_aar.SAMPLING)), cond,
                       calls=sum(map(len, model.blocks_of)))
    sat = aar.SAT(preset.sat).to(device)
    wav = 0.1 * torch.randn(1, 1, preset.sat.samples, device=device)
    cond = torch.randn(preset.plan_aar.batch, preset.aar.cond_dim, device=device)
    measure("encode", sat.encode, wav)
    measure("decode", lambda *r: sat.decode(r), *sat.encode(wav))
    generation("next-scale", preset.sat, cond)
    by_scale = generation("next-scale", preset.sat, cond[:1])
    by_token = generation("next-token", replace(preset.sat, schedule="flat", n_scales=10, phis=0), cond[:1])
    print(f"| next-token / next-scale | | {by_token / by_scale:.1f} times | | |")


STYLE = """:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 75rem; margin: auto; padding: 1rem; overflow-wrap: anywhere }
main { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)) }
figure { margin: 0 } audio, img { display: block; width: 100% }"""


class Page:
    """A folder of wave files, and in it one HTML file that holds their players and pictures and needs nothing else."""

    def __init__(self, folder):
        self.folder, self.path, self.figures = Path(folder), Path(folder, "index.html"), {}
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and STYLE not in self.path.read_text(encoding="utf-8", errors="replace"):
            raise UserError(f"{self.path} is not a page of sample.py: give another --out")

    def add(self, name, wav, sample_rate, write=False, note=""):
        """Show the first 10 s of a sound (1, N) on the page; with `write` save all of it in a file of its own."""
        from librosa.display import specshow
        from matplotlib.figure import Figure
        while name in self.figures:                                  # files of one name in two folders
            name = f"{len(self.figures)}-{name}"
        if write:
            aar.save_audio(self.folder / f"{name}.wav", wav, sample_rate)
            print(f"wrote {self.folder / name}.wav  {note}")
        sound, picture, wav = io.BytesIO(), io.BytesIO(), wav[:, :10 * sample_rate].cpu()
        sound.name = "sound.flac"                                    # no loss, and half as large as a wave file
        aar.save_audio(sound, wav, sample_rate)
        figure = Figure(figsize=(4, 2.5), layout="constrained")
        axes = figure.subplots()
        image = specshow(aar.Mel(sample_rate, 1024, 80).dB(wav[None])[0].numpy(), sr=sample_rate, hop_length=256,
                         x_axis="s", y_axis="mel", cmap="magma", vmin=-80, vmax=0, ax=axes)
        figure.colorbar(image, label="dB")
        figure.savefig(picture, dpi=120)
        data = [base64.b64encode(file.getvalue()).decode() for file in (sound, picture)]
        label = html.escape(f"{name} {note}")
        self.figures[name] = (f'<figure><figcaption>{label}</figcaption><audio controls aria-label="{label}" '
                              f'src="data:audio/flac;base64,{data[0]}"></audio><img alt="Log-mel picture of {label}" '
                              f'src="data:image/png;base64,{data[1]}"></figure>')

    def write(self, title, what):
        if not self.figures:
            raise UserError("no file could be read")
        self.path.write_text(f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
                             '<meta name="viewport" content="width=device-width, initial-scale=1">'
                             f'<style>{STYLE}</style><h1>{html.escape(title)}</h1><p>{html.escape(what)}</p>'
                             f'<main>{"".join(self.figures.values())}</main></html>\n', encoding="utf-8")
        print(f"wrote {self.path}")


if __name__ == "__main__":
    train_sat.run(main)
