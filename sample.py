"""Listen: variations of a reference, sounds for words, reconstructions of files.

    python sample.py --ref dog.wav -n 4             variations of a sound
    python sample.py --text "a dog barks" "rain"    sounds for words (a generator with CLAP)
    python sample.py --reconstruct *.wav            files of any length through the tokenizer
    python sample.py                                toy generator: a sound of each kind; others: without a condition
    python sample.py --fad sounds/ made/            Frechet distance of two folders of sounds
    python sample.py --bench --preset paper         how fast each part is on this machine, with random weights

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


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_mutually_exclusive_group()
    what.add_argument("--ref", metavar="FILE", help="sound to make variations of; of a longer one the loudest window")
    what.add_argument("--text", metavar="WORDS", nargs="+", help="what to make sounds of; each argument is a prompt")
    what.add_argument("--reconstruct", metavar="FILE", nargs="+", help="send files through the tokenizer and back")
    what.add_argument("--fad", metavar=("REFERENCE", "MADE"), nargs=2, help="Frechet distance of two folders")
    what.add_argument("--bench", action="store_true", help="measure how fast each part is, with random weights")
    p.add_argument("--preset", choices=aar.PRESETS, help="sizes of --bench (default: base with CUDA, else tiny)")
    p.add_argument("--sat", default="sat.pt", help="checkpoint of stage 1, ours or the authors' (default: sat.pt)")
    p.add_argument("--aar", default="aar.pt", help="checkpoint of stage 2, ours or the authors' (default: aar.pt)")
    p.add_argument("--clap", metavar="FILE", help="checkpoint of laion-clap, for a generator with CLAP and for --fad")
    p.add_argument("-n", type=int, default=4, help="how many sounds (default: 4)")
    p.add_argument("--scales", type=int, metavar="K", help="decode only the first K scales (default: all)")
    p.add_argument("--cfg", type=float, help="guidance; 0: none (default: 2; the authors': from 0 to 4)")
    p.add_argument("--top-k", type=int, help="draw from the K likeliest codes; 0: all (default: 0; the authors': 200)")
    p.add_argument("--top-p", type=float, help="and that hold this probability (default: 0.5; the authors': 0.95)")
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
            except UserError as e:                                   # one bad file must not stop the others
                print(f"skipped {e}", file=sys.stderr)
                continue
            page.add(f"{path.name}, original", wav, rate)
            page.add(f"{path.stem}.reconstruction", reconstruct(sat, wav.to(device), args.scales), rate, write=True)
        return page.write("Reconstructions", f"Scales decoded: {args.scales or 'all'}.")

    model = aar.load_aar(args.aar, sat, device)
    kind, theirs, embedder = model.embedder["kind"], "published" in model.embedder, None
    how = {"cfg": 4.0, "top_k": 200, "top_p": 0.95, "ramp": True} if theirs else train_aar.SAMPLING
    how = how | {name: value for name, value in vars(args).items() if name in how and value is not None}
    what = ("The authors’ weights. " * theirs + f"Guidance {'0 to ' * theirs}{how['cfg']:g}, top-k {how['top_k']}, "
            f"top-p {how['top_p']:g}, seed {args.seed}, condition {kind}. Similarity: cosine of the conditions.")
    print(what)
    model.to(aar.fast_dtype(device))
    how["generator"] = generator = torch.Generator(device).manual_seed(args.seed)
    make = aar.graphed(lambda cond: sat.decode(model.generate(cond, sat, **how)[:args.scales]), generator)
    if args.ref or args.text or model.embedder.get("toys"):
        embedder = train_aar.build_embedder(kind, rate, args.clap, model.embedder.get("fingerprint")).to(device)

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
        prompts = list(zip(args.text, embedder.text(args.text)))
    elif args.ref:
        name, wav = Path(args.ref).stem, loudest_window(args.ref, sat.config)
        page.add(f"{name}.reference", wav, rate, write=True)
        page.add("reconstruction: what the tokenizer allows", reconstruct(sat, wav.to(device), args.scales), rate)
        prompts = [(name, embedder(wav[None].to(device))[0])]
    elif embedder:
        return toys(args, sat, embedder, variations, page, what)
    else:
        prompts, how["cfg"] = [("sound", model.null.detach().float())], 0.0      # no condition, nothing to guide
    for words, cond in prompts:
        name = re.sub(r"\W+", "-", words).strip("-")[:60] or "text"
        for i, (y, note) in enumerate(variations(cond, args.n), start=1):
            page.add(f"{name}.variation-{i}", y, rate, write=True, note=note)
    page.write(", ".join(words for words, _ in prompts), what)


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
    wav = F.pad(wav, (0, max(size - N, (fade - N) % (size - fade))))
    windows = wav.unfold(1, size, size - fade).transpose(0, 1)       # (windows, 1, size)
    y = torch.cat([sat.decode(sat.encode(window[None])[:n]) for window in windows])
    weight = torch.minimum(torch.arange(1, size + 1), torch.arange(size, 0, -1)).clamp(max=fade).to(wav)
    total, made = (F.fold(x.flatten(1).T, (1, wav.shape[1]), (1, size), stride=(1, size - fade))[0]
                   for x in (weight.expand_as(windows), weight * y))
    return (made / total)[:, :N]


def toys(args, sat, embedder, variations, page, what):
    """Generate a sound from a fresh reference of each toy kind and ask which kind it is nearest to."""
    from librosa.feature import mfcc
    rate, kinds, right = sat.config.sample_rate, train_sat.TOYS, 0

    def statistics(wav):
        c = mfcc(y=wav.squeeze(0).numpy(), sr=rate, n_mfcc=13)       # no training uses this embedding
        return np.concatenate([c.mean(1), c.std(1)])
    fresh = train_sat.Toys(sat.config, seed=train_sat.HELD_BACK + 1 + args.seed)
    known = np.stack([statistics(fresh[i]) for i in range(10, 210)])
    for kind, x in zip(kinds, fresh):
        (y, _), = variations(embedder(x[None].to(next(sat.parameters()).device))[0], 1)
        distance = np.linalg.norm((known - statistics(y)) / known.std(0), axis=1)
        nearest = kinds[distance.argmin() % 10]
        right += nearest == kind
        page.add(f"toy-{kind}.reference", x, rate, write=True)
        page.add(f"toy-{kind}.variation-1", y, rate, write=True, note=f"nearest to {nearest}")
    print(f"{right} of 10 generated sounds are nearest, by MFCC statistics, to the kind of their reference")
    page.write("Toy sounds", what)


def compare_folders(args, device):
    """Print the Frechet distance of two folders, 1 s of each sound, and of two halves of the reference."""
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
    if len(reference) > 3:
        print(f"Frechet distance {train_aar.frechet(reference[::2], reference[1::2]):.3f}: two halves of the reference")


def bench(preset, device):
    """Print how long each part takes with random weights; a training step is one of the preset's batches."""
    from torch.utils.benchmark import Timer
    config, cuda = preset.sat, device.type == "cuda"
    print(torch.cuda.get_device_name(device) if cuda else f"{torch.get_num_threads()} threads", torch.__version__, "\n")
    print("| what | batch | ms | ms per clip | calls | ms per call | GB of the GPU |\n| --- |" + " ---: |" * 6)

    def measure(what, step, *inputs, calls=1):
        work = {"step": aar.graphed(step), "inputs": inputs}
        timer = Timer("step(*inputs)", globals=work, num_threads=torch.get_num_threads())
        torch.cuda.reset_peak_memory_stats() if cuda else None
        timer.timeit(2)                                              # four calls: three to warm up, then the capture
        ms, B = 1000 * timer.blocked_autorange().median, len(inputs[0])
        peak = torch.cuda.max_memory_allocated() / 2 ** 30 if cuda else 0
        print(f"| {what} | {B} | {ms:.1f} | {ms / B:.2f} | {calls} | {ms / calls:.2f} | {peak:.1f} |", flush=True)
        return ms

    def generation(what, config, cond):
        sat = aar.SAT(config).to(device)
        model = aar.AAR(replace(preset.aar, scales=config.scales, next_token=what == "next-token")).eval()
        model.to(device, aar.fast_dtype(device))
        return measure(what, lambda cond: sat.decode(model.generate(cond, sat, **train_aar.SAMPLING)), cond,
                       calls=sum(map(len, model.blocks_of)))

    sat, discriminators, optimizers, _ = train_sat.build(config, device)
    wav = 0.1 * torch.randn(preset.plan_sat.batch, 1, config.samples, device=device)
    cond = torch.randn(preset.plan_aar.batch, preset.aar.cond_dim, device=device)
    measure("encode", sat.encode, wav[:1])
    measure("decode", lambda *r: sat.decode(r), *sat.encode(wav[:1]))
    generation("next-scale", config, cond)
    by_scale = generation("next-scale", config, cond[:1])
    parts = sat, discriminators, optimizers, aar.MelLoss(config.sample_rate).to(device)
    for what, adversarial in (("step of stage 1", False), ("step of stage 1, discriminators", True)):
        measure(what, lambda x: train_sat.train_step(*parts, quantize=True, adversarial=adversarial, x=x), wav)
    model, optimizers, _ = train_aar.build(preset.aar, sat, device, steps=preset.plan_aar.steps)
    r = torch.randint(config.V, (len(cond), sum(config.scales)), device=device)
    measure("step of stage 2", lambda r, cond: train_aar.train_step(model, sat, optimizers, r, cond), r, cond)
    del model, optimizers, parts, sat, discriminators                # what follows needs the memory of none of them
    # Fig. 3: against residual VQ, 750 tokens a second
    by_token = generation("next-token", replace(config, schedule="flat", n_scales=10, phis=0), cond[:1])
    print(f"| next-token / next-scale | | {by_token / by_scale:.1f} times | | | | |")


STYLE = """:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 75rem; margin: auto; padding: 1rem; overflow-wrap: anywhere }
main { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)) }
figure { margin: 0 } audio, img { display: block; width: 100% }"""


class Page:
    """A folder of wave files, and in it one HTML file that holds their players and pictures and needs nothing else."""

    def __init__(self, folder):
        self.folder, self.path, self.figures, self.names = Path(folder), Path(folder, "index.html"), [], []
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and STYLE not in self.path.read_text(encoding="utf-8", errors="replace"):
            raise UserError(f"{self.path} is not a page of sample.py: give another --out")

    def add(self, name, wav, sample_rate, write=False, note=""):
        """Show a sound (1, N) on the page, and write it to a file of its own."""
        from librosa.display import specshow
        from matplotlib.figure import Figure
        if name in self.names:                                       # files of one name in two folders
            name = f"{len(self.names)}-{name}"
        self.names.append(name)
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
        self.figures.append(f'<figure><figcaption>{label}</figcaption><audio controls aria-label="{label}" '
                            f'src="data:audio/flac;base64,{data[0]}"></audio><img alt="Log-mel picture of {label}" '
                            f'src="data:image/png;base64,{data[1]}"></figure>')

    def write(self, title, what):
        if not self.figures:
            raise UserError("no file could be read")
        self.path.write_text(f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
                             '<meta name="viewport" content="width=device-width, initial-scale=1">'
                             f'<style>{STYLE}</style><h1>{html.escape(title)}</h1><p>{html.escape(what)}</p>'
                             f'<main>{"".join(self.figures)}</main></html>\n', encoding="utf-8")
        print(f"wrote {self.path}")


if __name__ == "__main__":
    train_sat.run(main)
