"""Stage 1: train the tokenizer SAT on a folder of sounds, or without --data on the built-in toy sounds.

    python train_sat.py --data wavs/ --out sat.pt          train
    python train_sat.py --data wavs/ --eval sat.pt opus:12 a table of checkpoints, and of Opus, on the held-back clips
"""
import argparse
import dataclasses
import io
import math
import os
from pathlib import Path

import soundfile
import torch

import aar
import sample
from aar import PRESETS, SAT, Discriminators, Mel, MelLoss, UserError

# What each part of the loss weighs: the released configuration, and "wave", which is not in the paper.
WEIGHTS = {"time": 0.1, "wave": 5.0, "mel": 1.0, "vq": 1.0, "adversarial": 3.0, "feature": 3.0}


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", help="folder of sound files (default: built-in toy sounds)")
    p.add_argument("--preset", choices=PRESETS, help="default: paper with CUDA, else tiny")
    p.add_argument("--out", default="sat.pt", help="checkpoint to write (default: sat.pt)")
    p.add_argument("--steps", type=int, help="default: the preset's")
    p.add_argument("--batch", type=int, help="clips per step (default: the preset's)")
    p.add_argument("--accumulate", type=int, default=1, metavar="N", help="take the batch in N parts: less memory, same result")
    p.add_argument("--lr", type=float, help="peak learning rate (default: the preset's)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", help="default: cuda, else mps, else cpu")
    p.add_argument("--resume", action="store_true", help="go on from --out exactly where it stopped")
    p.add_argument("--schedule", default="quadratic", choices=["quadratic", "linear", "log"], help="scales, Fig. 5")
    p.add_argument("--seconds", type=float, default=1.0, help="length of the window, of which a sound becomes tokens (default: 1)")
    p.add_argument("--rvq", type=int, nargs="?", const=10, metavar="LEVELS",
                   help="the baseline: residual VQ, LEVELS (default: 10) of all frames, no phi")
    p.add_argument("--phis", type=int, metavar="N", help="convolutions phi; 0: none (default: the preset's)")
    p.add_argument("--adversarial-at", type=float, metavar="SHARE",
                   help="the discriminators join after this share of the steps; 1: never (default: the preset's)")
    p.add_argument("--eval", metavar="CHECKPOINT", nargs="+",
                   help="train nothing, measure checkpoints and, as opus:KBITS, the Opus codec on the held-back clips")
    p.set_defaults(command=sample.command("train_sat.py", argv))
    return p.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    device = aar.pick_device(args.device)
    preset = PRESETS[args.preset or ("paper" if device.type == "cuda" else "tiny")]
    plan = aar.plan_from(preset.train_sat, args)
    if args.eval:
        return compare(args, device)
    if not 0.1 <= args.seconds <= 60:                                 # shorter ones do not fill the losses' windows
        raise UserError(f"--seconds {args.seconds:g}: a window lasts 0.1 to 60 s")
    config = dataclasses.replace(preset.sat, schedule=args.schedule, seconds=args.seconds)
    if args.phis is not None:
        config = dataclasses.replace(config, phis=args.phis)
    if args.rvq is not None:
        if args.phis or args.schedule != "quadratic":
            raise UserError("--rvq has no phi and no other schedule: leave out --phis and --schedule")
        config = dataclasses.replace(config, schedule="flat", n_scales=args.rvq, phis=0)
    if not 1 <= config.n_scales <= 1000 or not 0 <= config.phis <= config.n_scales:
        raise UserError(f"--rvq must be 1 to 1000, --phis 0 to {config.n_scales} (the number of scales); "
                        f"got {config.n_scales}, {config.phis}")
    with aar.alone(args.out):
        train(args, config, plan, device)


def build(config, lr, device):
    """A new tokenizer, its discriminators and the optimizers of both players."""
    sat, discriminators = SAT(config).to(device), Discriminators(config.disc_width).to(device)
    # AdamW takes the lengths of weight norm (one number a row) and the LSTMs: for these large matrices Muon would cost a fifth of
    # a step of `paper`.
    lstms = {p for module in sat.modules() if isinstance(module, torch.nn.LSTM) for p in module.parameters()}
    matrices = [p for p in sat.parameters() if p.numel() > len(p) and p not in lstms]
    rest = [p for p in sat.parameters() if p.numel() == len(p) or p in lstms]
    how = {"lr": lr, "betas": (0.8, 0.99), "weight_decay": 0.01, "fused": device.type != "meta"}       # which has no fused one
    return sat, discriminators, {"muon": aar.Muon(matrices, lr), "optimizer": torch.optim.AdamW(rest, **how),
                                 "d_optimizer": torch.optim.AdamW(discriminators.parameters(), **how)}


def train(args, config, plan, device):
    """Train SAT by `plan`; writes args.out and, beside it, a wave file of originals and reconstructions and a page."""
    torch.manual_seed(args.seed)
    sat, discriminators, optimizers = build(config, plan.lr, device)
    sat.quantizer.parts = args.accumulate
    parts = {"sat": sat, "discriminators": discriminators} | optimizers
    run = {"seed": args.seed, "data": args.data and os.path.basename(os.path.realpath(args.data))}
    start, history = aar.begin(args, "sat", config, plan, parts, **run)
    if start == plan.steps:
        return
    data, held_back = (aar.sounds(args.data, config, args.seed, held_back=h) for h in (False, True))
    mel_loss = MelLoss(config.sample_rate).to(device)
    quantize_at, adversarial_at = (round(share * plan.steps) for share in (plan.quantize_at, plan.adversarial_at))
    print(f"device {device}, {sum(p.numel() for p in sat.parameters()) / 1e6:.2f} M parameters, {data}, "
          f"{sum(config.scales)} tokens per {config.seconds:g} s: scales {config.scales}")

    bar = aar.progress(range(start, plan.steps), initial=start, total=plan.steps, unit="step")
    log, stop = aar.Log(bar, history), aar.Stop()                     # before the workers, which must not die of Ctrl-C
    clips = (i for step in range(start, plan.steps) for i in aar.shard(range(step * plan.batch, (step + 1) * plan.batch)))
    loader = aar.batches(data, plan.batch // aar.world(), clips)
    for step in bar:
        wav, names = log.wait(loader)
        wav = wav.to(device, non_blocking=True)
        lr = aar.learning_rate(step, plan)
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = lr
        if step == quantize_at:
            # Start the codebooks on the first V clips, so that scale 1, one vector a clip, has one for each code.
            first = aar.batches(data, plan.batch, aar.shard(range(config.V)))
            with torch.no_grad():
                sat.quantizer.quantize(torch.cat([sat.latents(x.to(device)) for x, _ in first]), kmeans=True)
        losses = train_step(sat, discriminators, optimizers, mel_loss, wav.chunk(args.accumulate),
                            step >= quantize_at, step >= adversarial_at)
        log.add(step, names, **losses)

        if (step + 1) % max(1, plan.steps // 10) == 0 or step + 1 == plan.steps or stop.asked:
            log.flush()                                               # a broken loss is named before what follows from it
            heard = torch.stack([held_back[i][0] for i in range(min(8, len(held_back)))])
            with torch.no_grad():                                     # before the codebooks start, without them
                y = (sat.decode(sat.encode(heard.to(device))) if step >= quantize_at
                     else sat.decoder(sat.latents(heard.to(device))))
            scores = {} if step < quantize_at else evaluate(sat, held_back)
            for name, value in {"the sound": y, **scores}.items():        # a tokenizer broken by this step is not kept
                aar.check_finite(step, name, value)
            log.write(step + 1, y[:4] if scores else None, **scores)
            aar.save_checkpoint(args.out, "sat", config, plan, step + 1, log.history, parts, **run)
            with aar.spare():
                aar.save_in_turn(Path(args.out).with_suffix(".wav"), heard, y, config.sample_rate)
                sample.training_page(args, "Stage 1: the tokenizer", log.history, heard[:4], config, plan)
            if stop.asked:
                raise aar.Stopped(f"stopped after {step + 1} of {plan.steps} steps; go on with the same command and --resume")


def train_step(sat, discriminators, optimizers, mel_loss, parts, quantize=True, adversarial=True):
    """One step on a batch of sounds, given in equal parts (b, 1, N) whose gradients add up; returns the losses."""
    seen = []
    sat.zero_grad()
    discriminators.zero_grad()
    for x in parts:
        with aar.autocast(x.device):
            if quantize:
                y, _, vq = sat(x)
            else:
                y, vq = sat.decoder(sat.latents(x)), x.new_zeros(())
        losses = {"time": (x - y).abs().mean(), "wave": aar.wave_loss(x, y), "mel": mel_loss(x, y), "vq": vq}
        if adversarial:
            # One pass over real and fake serves both players: each takes only the gradients of its own parameters.
            with aar.autocast(x.device):
                real, fake = discriminators(x), discriminators(y)
            losses |= {"adversarial": aar.adversarial_loss(fake), "feature": aar.feature_loss(real, fake)}
            d_loss = aar.discriminator_loss(real, fake)
            (d_loss / len(parts)).backward(inputs=list(discriminators.parameters()), retain_graph=True)
        loss = sum(WEIGHTS[name] * value for name, value in losses.items())
        (loss / len(parts)).backward(inputs=list(sat.parameters()))
        if adversarial:
            losses["discriminator"] = d_loss
        seen.append({name: value.detach() for name, value in losses.items()})
    losses = {name: sum(part[name] for part in seen) / len(seen) for name in seen[0]}
    losses["norm"] = aar.clip_gradients(sat)
    optimizers["muon"].step()
    optimizers["optimizer"].step()
    if adversarial:
        losses["d_norm"] = aar.clip_gradients(discriminators)
        optimizers["d_optimizer"].step()
    return losses


@torch.no_grad()
def evaluate(sat, held_back):
    """Reconstruct all held-back clips; returns numbers, with per-scale lists of codes in use and of perplexity."""
    config, device = sat.config, next(sat.parameters()).device
    mel = Mel(config.sample_rate, 1024, 80).to(device)
    counts = torch.zeros(len(config.scales), config.V, device=device)
    rows = []
    training = sat.training
    sat.eval()
    for x in torch.utils.data.DataLoader(held_back, batch_size=8):
        x = x[0].to(device)
        y, tokens, _ = sat(x)
        for k, r_k in enumerate(tokens):
            counts[k] += torch.bincount(r_k.flatten(), minlength=config.V)
        rows.append(distances(mel, x, y))
    sat.train(training)
    p = counts / counts.sum(1, keepdim=True)
    return dict(zip(DISTANCES, torch.cat(rows).mean(0).tolist())) | {
        "used": (counts > 0).sum(1).tolist(), "perplexity": torch.special.entr(p).sum(1).exp().round().int().tolist()}


def compare(args, device):
    """Print a table with a row for each of args.eval, and below it the codes in use per scale."""
    below, held_back = [], aar.sounds(args.data, aar.SATConfig(), args.seed, held_back=True)
    print(f"device {device}, {len(held_back)} held-back clips of {args.data or held_back}\n")
    print("| tokenizer | tokens/s | bit/s | log-mel (dB) | STFT | SI-SDR (dB) | codes in use | perplexity | training (s) |")
    print("| --- |" + " ---: |" * 8)
    for name in args.eval:
        if name.startswith("opus:"):
            seen = opus(name, held_back)
            row = ["", seen["bits"], *(seen[key] for key in DISTANCES), "", "", ""]
        else:
            sat, history = aar.load_sat(name, device), aar.load_checkpoint(name, "sat")["history"]
            seen, config = evaluate(sat, aar.sounds(args.data, sat.config, args.seed, held_back=True)), sat.config
            rate, K = sum(config.scales) / config.seconds, len(config.scales)
            steps = [after["step"] - before["step"] for before, after in zip([{"step": 0}, *history], history)]
            row = [rate, rate * math.log2(config.V), *(seen[key] for key in DISTANCES),
                   f"{sum(seen['used']) / K / config.V:.0%}", sum(seen["perplexity"]) / K,
                   sum(n * line["s_per_step"] for n, line in zip(steps, history))]
            below += [f"{name}: {key} per scale " + " ".join(map(str, seen[key])) for key in ("used", "perplexity")]
        cells = [cell if isinstance(cell, str) else f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:.2f}" for cell in row]
        print("|", " | ".join([name, *cells]), "|")
    print(*below, sep="\n")


def opus(name, held_back):
    """The same distances for the Opus codec at `opus:KBITS`, with the bits per second that it really took."""
    try:
        level = 1 - (float(name.removeprefix("opus:")) - 6) / 250     # libsndfile: 0 is 256 kbit/s, 1 is 6
        if not 0 <= level <= 1:
            raise ValueError
    except ValueError:
        raise UserError(f"--eval {name}: Opus goes from opus:6 to opus:256 kbit/s")
    x = torch.stack([held_back[i][0] for i in range(len(held_back))])
    file = io.BytesIO()
    soundfile.write(file, x.flatten().numpy(), held_back.sample_rate, format="OGG", subtype="OPUS", compression_level=level)
    bits = 8 * file.tell() * held_back.sample_rate / x.numel()
    file.seek(0)
    y = torch.from_numpy(soundfile.read(file, dtype="float32")[0][:x.numel()]).view_as(x)
    return dict(zip(DISTANCES, distances(Mel(held_back.sample_rate, 1024, 80), x, y).mean(0).tolist())) | {"bits": bits}


DISTANCES = "log_mel_dB", "stft", "si_sdr_dB"


def distances(mel, x, y):
    """Sounds x, y (B, 1, N) -> (B, 3): log-mel, multi-resolution STFT and SI-SDR of each clip, as DISTANCES names them."""
    stft = sum(spectral_distance(x.squeeze(1), y.squeeze(1), window) for window in (512, 1024, 2048)) / 3
    return torch.stack([aar.log_mel_distance(mel, x, y), stft, si_sdr(x.squeeze(1), y.squeeze(1))], 1)


def spectral_distance(x, y, window):
    """Spectral convergence: |X - Y| / |X| of the magnitude spectrograms of x, y (B, N) -> (B,)."""
    X, Y = (torch.stft(z, window, window // 4, window=torch.hann_window(window, device=z.device), return_complex=True).abs()
            for z in (x, y))
    return (X - Y).norm(dim=(1, 2)) / X.norm(dim=(1, 2)).clamp(min=1e-5)


def si_sdr(x, y):
    """Scale-invariant signal-to-distortion ratio of y to x (B, N) -> (B,), in dB."""
    target = (x * y).sum(1, keepdim=True) / x.square().sum(1, keepdim=True).clamp(min=1e-8) * x
    return 10 * ((target.square().sum(1) + 1e-8) / ((y - target).square().sum(1) + 1e-8)).log10()


if __name__ == "__main__":
    aar.command_line(main)
