"""Stage 1: train the tokenizer SAT on a folder of sounds, or without --data on the built-in toy sounds.

    python train_sat.py --data wavs/ --out sat.pt          train
    python train_sat.py --data wavs/ --eval sat.pt         measure a checkpoint on the held-back clips
"""
import argparse
import dataclasses
from pathlib import Path

import torch
from tqdm import tqdm

import aar
from aar import PRESETS, SAT, Discriminators, Mel, MelLoss, UserError

# What each part of the loss weighs: the released configuration.
WEIGHTS = {"time": 0.1, "mel": 1.0, "vq": 1.0, "adversarial": 3.0, "feature": 3.0}


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", help="folder of sound files (default: built-in toy sounds)")
    p.add_argument("--preset", choices=PRESETS, help="default: paper with CUDA, else tiny")
    p.add_argument("--out", default="sat.pt", help="checkpoint to write (default: sat.pt)")
    p.add_argument("--steps", type=int, help="default: the preset's")
    p.add_argument("--batch", type=int, help="clips per step (default: the preset's)")
    p.add_argument("--lr", type=float, help="peak learning rate (default: the preset's)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", help="default: cuda, else mps, else cpu")
    p.add_argument("--resume", action="store_true", help="go on from --out exactly where it stopped")
    p.add_argument("--schedule", default="quadratic", choices=["quadratic", "linear", "log"], help="scales, Fig. 5")
    p.add_argument("--rvq", action="store_true", help="the baseline: residual VQ, 10 levels of all 75 frames, no phi")
    p.add_argument("--eval", metavar="CHECKPOINT", help="train nothing, measure this checkpoint")
    return p.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    device = aar.pick_device(args.device)
    if args.eval:
        sat = aar.load_sat(args.eval, device)
        held_back = aar.sounds(args.data, sat.config, args.seed, held_back=True)
        print(f"device {device}, {args.eval} on {len(held_back)} held-back clips")
        for name, value in evaluate(sat, held_back).items():
            print(f"{name:12s} {f'{value:.2f}' if isinstance(value, float) else value}")
        return
    preset = PRESETS[args.preset or ("paper" if device.type == "cuda" else "tiny")]
    config = dataclasses.replace(preset.sat, schedule=args.schedule)
    if args.rvq:
        config = dataclasses.replace(config, schedule="flat", n_scales=10, phis=0)
    train(args, config, aar.plan_from(preset.train_sat, args), device)


def train(args, config, plan, device):
    """Train SAT by `plan`; writes args.out and, beside it, a wave file of originals and reconstructions."""
    torch.manual_seed(args.seed)
    sat, discriminators = SAT(config).to(device), Discriminators(config.disc_width).to(device)
    optimizer, d_optimizer = (torch.optim.AdamW(m.parameters(), plan.lr, betas=(0.8, 0.99), weight_decay=0.01)
                              for m in (sat, discriminators))
    parts = {"sat": sat, "discriminators": discriminators, "optimizer": optimizer, "d_optimizer": d_optimizer}
    start, history = aar.begin(args, "sat", config, plan, parts, seed=args.seed)
    data, held_back = (aar.sounds(args.data, config, args.seed, held_back=h) for h in (False, True))
    mel_loss = MelLoss(config.sample_rate).to(device)
    quantize_at, adversarial_at = (round(share * plan.steps) for share in (plan.quantize_at, plan.adversarial_at))
    print(f"device {device}, {sum(p.numel() for p in sat.parameters()) / 1e6:.2f} M parameters, {data}, "
          f"{sum(config.scales)} tokens per {config.seconds:g} s: scales {config.scales}")

    bar = tqdm(range(start, plan.steps), initial=start, total=plan.steps, unit="step", dynamic_ncols=True)
    log, stop = aar.Log(bar, history), aar.Stop()                     # before the workers, which must not die of Ctrl-C
    loader = aar.batches(data, plan.batch, range(start * plan.batch, plan.steps * plan.batch))
    for step in bar:
        wav, names = log.wait(loader)
        wav = wav.to(device, non_blocking=True)
        for group in (*optimizer.param_groups, *d_optimizer.param_groups):
            group["lr"] = aar.learning_rate(step, plan)
        if step == quantize_at:
            # Start the codebooks on the first V clips, so that scale 1, one vector a clip, has one for each code.
            first = aar.batches(data, plan.batch, range(config.V))
            with torch.no_grad():
                sat.quantizer.quantize(torch.cat([sat.latents(x.to(device)) for x, _ in first]), kmeans=True)

        with aar.bfloat16(device):
            if step < quantize_at:
                y, tokens, vq = sat.decoder(sat.latents(wav)), None, wav.new_zeros(())
            else:
                y, tokens, vq = sat(wav)
        losses = {"time": (wav - y).abs().mean(), "mel": mel_loss(wav, y), "vq": vq}
        if step >= adversarial_at:
            # One pass over real and fake serves both players: each takes only the gradients of its own parameters.
            with aar.bfloat16(device):
                real, fake = discriminators(wav), discriminators(y)
            d_loss = aar.discriminator_loss(real, fake)
            d_optimizer.zero_grad()
            d_loss.backward(inputs=list(discriminators.parameters()), retain_graph=True)
            losses |= {"adversarial": aar.adversarial_loss(fake), "feature": aar.feature_loss(real, fake)}
        loss = sum(WEIGHTS[name] * value for name, value in losses.items())
        optimizer.zero_grad()
        loss.backward(inputs=list(sat.parameters()))
        losses["norm"] = torch.nn.utils.clip_grad_norm_(sat.parameters(), 1.0)
        optimizer.step()
        if step >= adversarial_at:
            losses["discriminator"] = d_loss
            torch.nn.utils.clip_grad_norm_(discriminators.parameters(), 1.0)
            d_optimizer.step()
        log.add(step, names, **losses)

        if (step + 1) % max(1, plan.steps // 10) == 0 or step + 1 == plan.steps or stop.asked:
            log.write(step + 1, **({} if tokens is None else evaluate(sat, held_back, Path(args.out).with_suffix(".wav"))))
            aar.save_checkpoint(args.out, "sat", config, plan, step + 1, log.history, parts, seed=args.seed)
            if stop.asked:
                raise aar.Stopped(f"stopped after {step + 1} of {plan.steps} steps; go on with the same command and --resume")


@torch.no_grad()
def evaluate(sat, held_back, waves=None):
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
        distance = sum(spectral_distance(x.squeeze(1), y.squeeze(1), w) for w in (512, 1024, 2048)) / 3
        rows.append(torch.stack([aar.log_mel_distance(mel, x, y), distance, si_sdr(x.squeeze(1), y.squeeze(1))], 1))
        if waves and len(rows) == 1:
            pairs = torch.cat([torch.cat([a, b, a[..., :4800] * 0], -1) for a, b in zip(x, y)], -1)
            aar.save_audio(waves, pairs, config.sample_rate)
    sat.train(training)
    p = counts / counts.sum(1, keepdim=True)
    means = torch.cat(rows).mean(0).tolist()
    return {"log_mel_dB": means[0], "stft": means[1], "si_sdr_dB": means[2], "used": (counts > 0).sum(1).tolist(),
            "perplexity": torch.special.entr(p).sum(1).exp().round().int().tolist()}


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
