"""Listen: variations of a reference, sounds for a text, reconstructions of files.

    python sample.py --ref dog.wav -n 4            variations of a sound
    python sample.py --text "a dog barks"          (a generator trained with --embedder clap)
    python sample.py --reconstruct *.wav           files of any length through the tokenizer
    python sample.py                               one new sound of each built-in toy kind, and how many are recognised
"""
import argparse
import itertools
import re
import sys
from pathlib import Path

import numpy as np
import torch

import aar
from aar import UserError


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_mutually_exclusive_group()
    what.add_argument("--ref", metavar="FILE", help="sound to make variations of")
    what.add_argument("--text", metavar="WORDS", help="what to make a sound of")
    what.add_argument("--reconstruct", metavar="FILE", nargs="+", help="send files through the tokenizer and back")
    p.add_argument("--scales", type=int, metavar="K", help="let hear only the first K scales (default: all)")
    p.add_argument("--sat", default="sat.pt", help="checkpoint of stage 1 (default: sat.pt)")
    p.add_argument("--aar", default="aar.pt", help="checkpoint of stage 2 (default: aar.pt)")
    p.add_argument("--clap", metavar="FILE", help="checkpoint of laion-clap, if the generator was trained with it")
    p.add_argument("-n", type=int, default=4, help="how many sounds (default: 4)")
    p.add_argument("--cfg", type=float, default=3.0, help="guidance at the last scale; 0: none (default: 3)")
    p.add_argument("--top-k", type=int, default=0, help="draw from the K likeliest codes; 0: from all (default)")
    p.add_argument("--top-p", type=float, default=0.8, help="draw from the likeliest codes that hold this probability (default: 0.8)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", help="default: cuda, else mps, else cpu")
    p.add_argument("--out", default="samples", help="folder to write into (default: samples)")
    return p.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    device = aar.pick_device(args.device)
    aar.check_seed(args.seed)
    if args.n < 1 or not 0 <= args.cfg <= 100 or not 0 < args.top_p <= 1:
        raise UserError("-n must be at least 1, --cfg 0 to 100, --top-p above 0 and at most 1")
    if "" in (args.ref, args.text):
        raise UserError("--ref and --text must not be empty")
    sat = aar.load_sat(args.sat, device)
    config, out, K = sat.config, Path(args.out), len(sat.config.scales)
    if not 0 <= args.top_k <= config.V:
        raise UserError(f"--top-k {args.top_k}: this tokenizer has {config.V} codes")
    if args.scales is not None and not 1 <= args.scales <= K:
        raise UserError(f"--scales {args.scales}: this tokenizer has 1 to {K}")
    n = args.scales or K
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {out}: cannot make this folder ({e.strerror})")
    written = set()

    def write(name, wav):
        """Two references of one name must not overwrite each other."""
        name = next(n for n in itertools.chain([name], (f"{i}-{name}" for i in itertools.count(2))) if n not in written)
        written.add(name)
        aar.save_audio(out / name, wav, config.sample_rate)
        print(f"wrote {out / name}")

    if args.reconstruct:
        print(f"device {device}, the first {n} of {K} scales: {sum(config.scales[:n])} tokens per {config.seconds:g} s window")
        for path in args.reconstruct:
            try:
                wav = aar.load_audio(path, config.sample_rate)
            except UserError as e:                                    # one bad file must not stop the others
                print(f"skipped {e}", file=sys.stderr)
                continue
            write(f"{Path(path).stem}.reconstruction-{n}-of-{K}-scales.wav", reconstruct(sat, wav.to(device), n))
        if not written:
            raise UserError("no file could be read")
        return

    model, kind, clap = aar.load_aar(args.aar, sat, device)
    embedder = aar.build_embedder(kind, config.sample_rate, args.clap).to(device)
    if aar.fingerprint(embedder) != clap:
        raise UserError(f"--clap {args.clap} is not the checkpoint that {args.aar} was trained with")
    generator = torch.Generator(device).manual_seed(args.seed)
    print(f"device {device}, one window is {config.seconds:g} s, {'one token' if model.config.next_token else 'one scale'} "
          f"per step, condition {kind}, guidance {args.cfg:g}, top-k {args.top_k}, top-p {args.top_p:g}, seed {args.seed}")

    def generate(cond):
        """One sound after the other, made 16 at a time: any -n fits the memory."""
        for part in cond.split(16):
            yield from sat.decode(model.generate(part, sat, args.cfg, args.top_k, args.top_p, generator)[:n])

    if args.text:
        if kind != "clap":
            raise UserError(f"{args.aar} was trained with --embedder {kind}, which knows no words; train with --embedder clap")
        name, cond = re.sub(r"\W+", "-", args.text).strip("-")[:60] or "text", embedder.text([args.text])
    elif args.ref:
        wav = aar.load_audio(args.ref, config.sample_rate, seconds=config.seconds)
        wav = torch.nn.functional.pad(wav, (0, config.samples - wav.shape[-1])).to(device)
        name, cond = Path(args.ref).stem, embedder(wav[None])
        write(f"{name}.reference.wav", wav)
    else:
        return toys(args, sat, embedder, generate, write)
    for i, wav in enumerate(generate(cond.expand(args.n, -1)), start=1):
        write(f"{name}.variation-{i}.wav", wav)


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


def mfcc_statistics(wav, sample_rate):
    """Mean and deviation over time of 13 mel-frequency cepstra, (26,): an embedding that no training uses."""
    from librosa.feature import mfcc
    c = mfcc(y=wav.squeeze(0).cpu().numpy(), sr=sample_rate, n_mfcc=13)
    return np.concatenate([c.mean(1), c.std(1)])


def toys(args, sat, embedder, generate, write):
    """Generate a sound from a fresh reference of each toy kind and ask which kind it is nearest to."""
    config, kinds = sat.config, aar.TOYS
    fresh = aar.ToySounds(config.sample_rate, config.samples, seed=1000 + args.seed)
    references = torch.stack([fresh[i][0] for i in range(len(kinds))])
    y = list(generate(embedder(references.to(next(sat.parameters()).device))))
    known = np.stack([mfcc_statistics(fresh[i][0], config.sample_rate) for i in range(len(kinds), 21 * len(kinds))])
    spread = known.std(0)
    right = 0
    for i, kind in enumerate(kinds):
        distance = np.linalg.norm((known - mfcc_statistics(y[i], config.sample_rate)) / spread, axis=1)
        nearest = kinds[distance.argmin() % len(kinds)]
        right += nearest == kind
        write(f"toy-{kind}.reference.wav", references[i])
        write(f"toy-{kind}.variation-1.wav", y[i])
        print(f"{kind}: nearest to {'the same kind' if nearest == kind else nearest}")
    print(f"{right} of {len(kinds)} generated sounds are nearest, by MFCC statistics, to the kind of their reference")


if __name__ == "__main__":
    aar.command_line(main)
