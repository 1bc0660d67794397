"""Stage 2: train the generator AAR on the tokens of a trained SAT, on the same sounds.

    python train_aar.py --data wavs/ --sat sat.pt --out aar.pt
"""
import argparse
import dataclasses
import hashlib
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import aar
from aar import AAR, PRESETS


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", help="folder of sound files (default: built-in toy sounds)")
    p.add_argument("--preset", choices=PRESETS, help="default: paper with CUDA, else tiny")
    p.add_argument("--sat", default="sat.pt", help="checkpoint of stage 1 (default: sat.pt)")
    p.add_argument("--out", default="aar.pt", help="checkpoint to write (default: aar.pt)")
    p.add_argument("--embedder", choices=["mel", "clap"], default="mel", help="what makes the condition (default: mel)")
    p.add_argument("--clap", metavar="FILE", help="checkpoint of laion-clap, for --embedder clap")
    p.add_argument("--next-token", action="store_true", help="the baseline: one token per step")
    p.add_argument("--steps", type=int, help="default: the preset's")
    p.add_argument("--batch", type=int, help="clips per step (default: the preset's)")
    p.add_argument("--lr", type=float, help="peak learning rate (default: the preset's)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", help="default: cuda, else mps, else cpu")
    p.add_argument("--resume", action="store_true", help="go on from --out exactly where it stopped")
    return p.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    device = aar.pick_device(args.device)
    preset = PRESETS[args.preset or ("paper" if device.type == "cuda" else "tiny")]
    plan = aar.plan_from(preset.train_aar, args)
    sat = aar.load_sat(args.sat, device)
    embedder = aar.build_embedder(args.embedder, sat.config.sample_rate, args.clap).to(device)
    config = dataclasses.replace(preset.aar, scales=sat.config.scales, latent=sat.config.latent, V=sat.config.V,
                                 cond_dim=embedder.dim, next_token=args.next_token)
    train(args, sat, embedder, config, plan, device)


def train(args, sat, embedder, config, plan, device):
    """Train AAR by `plan`; writes args.out and, beside it, a wave file of references and generated sounds."""
    torch.manual_seed(args.seed)
    model = AAR(config).to(device)
    matrices = [m.weight for layer in model.layers for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = {"muon": aar.Muon(matrices, plan.lr),
                  "optimizer": torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0)}
    parts = {"aar": model} | optimizers
    run = {"seed": args.seed, "data": args.data and Path(args.data).resolve().name, "sat": aar.fingerprint(sat),
           "embedder": args.embedder, "clap": aar.fingerprint(embedder)}
    start, history = aar.begin(args, "aar", config, plan, parts, **run)
    if start == plan.steps:
        return
    data, held_back = (aar.sounds(args.data, sat.config, args.seed, held_back=h) for h in (False, True))
    print(f"device {device}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {data}, "
          f"{sum(config.scales)} tokens, {'next-token' if config.next_token else 'next-scale'}")
    tokens, cond = tokenize(args, sat, embedder, data, min(plan.crops, plan.steps * plan.batch), "training")
    held = tokenize(args, sat, embedder, held_back, len(held_back), "validation")
    unigram = unigram_loss(tokens, held[0], config.V)
    print(f"ln V = {math.log(config.V):.3f} is the loss of guessing; knowing only how often each code stands at each place: "
          f"{unigram.mean():.2f}, per scale " + " ".join(f"{x:.2f}" for x in per_scale(unigram, config.scales)))

    # The few coarse tokens decide what the sound is: a token of scale k weighs 1 / sqrt(s_k).
    weight = torch.cat([torch.full((s,), s ** -0.5) for s in config.scales]).to(device)
    weight /= weight.mean()

    bar = tqdm(range(start, plan.steps), initial=start, total=plan.steps, unit="step", dynamic_ncols=True)
    log, stop = aar.Log(bar, history), aar.Stop()
    for step in bar:
        pick = torch.from_numpy(np.random.default_rng((args.seed, step)).integers(len(tokens), size=plan.batch))
        lr = aar.learning_rate(step, plan)
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = lr
        loss = losses(model, sat, tokens[pick].to(device), cond[pick].to(device))[0]
        model.zero_grad()
        (loss * weight).mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
        log.add(step, (data[i][1] for i in pick.tolist()), loss=loss.mean(), norm=norm)

        if (step + 1) % max(1, plan.steps // 10) == 0 or step + 1 == plan.steps or stop.asked:
            log.write(step + 1, **validate(model, sat, *held))
            aar.save_checkpoint(args.out, "aar", config, plan, step + 1, log.history, parts, **run)
            with aar.spare():
                listen(model, sat, held_back, held[1], Path(args.out).with_suffix(".wav"))
            if stop.asked:
                raise aar.Stopped(f"stopped after {step + 1} of {plan.steps} steps; go on with the same command and --resume")


def losses(model, sat, r, cond):
    """Tokens r (B, L), cond (B, cond_dim) -> cross-entropy of each token and whether it is the likeliest, (B, L) both."""
    r = r.long()
    teacher_inputs = sat.teacher_inputs(r.split(model.config.scales, 1), model.config.next_token)
    with aar.bfloat16(r.device):
        logits = model(cond, teacher_inputs)
    return F.cross_entropy(logits.transpose(1, 2), r, reduction="none"), logits.argmax(-1) == r


def per_scale(x, scales):
    """Mean over the tokens of each scale: (B, L) or (L,) -> list of K numbers."""
    return [part.float().mean().item() for part in x.split(list(scales), -1)]


def unigram_loss(tokens, held_back, V):
    """Cross-entropy of held-back tokens (n, L) under the counts (plus one) of each code at each place: (L,)."""
    counts = 1.0 + torch.stack([torch.bincount(place, minlength=V) for place in tokens.T])          # (L, V)
    return -(counts / counts.sum(1, keepdim=True)).log().gather(1, held_back.T.long()).mean(1)


@torch.no_grad()
def validate(model, sat, tokens, cond):
    """Teacher-forced on held-back clips: mean loss, and per scale the loss and how often the likeliest code is right."""
    device = next(model.parameters()).device
    model.eval()
    parts = [losses(model, sat, r.to(device), c.to(device)) for r, c in zip(tokens.split(32), cond.split(32))]
    model.train()
    loss, right = (torch.cat(part) for part in zip(*parts))
    return {"held_back": loss.mean().item(), "per_scale": per_scale(loss, model.config.scales),
            "accuracy": per_scale(right, model.config.scales)}


@torch.no_grad()
def tokenize(args, sat, embedder, data, n, name):
    """Tokens (n, L) int16 and conditions (n, cond_dim) of the first n windows; the same window is tokenised and embedded.

    They are kept in a file beside the checkpoint and made anew when the tokenizer, the embedder or the sounds changed.
    """
    cache = Path(args.out).with_suffix(f".{name}.pt")
    key = repr((aar.fingerprint(sat), args.embedder, aar.fingerprint(embedder), n, data.key()))
    key = hashlib.sha1(key.encode()).hexdigest()
    if cache.is_file():
        try:
            state = torch.load(cache, weights_only=True)
            if state["key"] == key:
                return state["tokens"], state["cond"]
        except Exception:                                             # truncated or foreign: made anew
            pass
    device, tokens, cond = next(sat.parameters()).device, [], []
    for wav, _ in tqdm(aar.batches(data, 16, range(n)), total=math.ceil(n / 16), desc=f"{name} tokens", unit="batch"):
        wav = wav.to(device)
        tokens.append(torch.cat(sat.encode(wav), 1).short().cpu())
        cond.append(embedder(wav).cpu())
    tokens, cond = torch.cat(tokens), torch.cat(cond)
    with aar.spare():
        aar.save(cache, {"key": key, "tokens": tokens, "cond": cond})
    return tokens, cond


def listen(model, sat, held_back, cond, path, n=4):
    """Write references and what is generated from their conditions, in turn, with a pause between."""
    device, sample_rate = next(model.parameters()).device, sat.config.sample_rate
    model.eval()
    y = sat.decode(model.generate(cond[:n].to(device), sat, generator=torch.Generator(device).manual_seed(0))).cpu()
    model.train()
    pause = torch.zeros(1, sample_rate // 5)
    pairs = [torch.cat([held_back[i][0], pause, y[i], pause], -1) for i in range(len(y))]
    aar.save_audio(path, torch.cat(pairs, -1), sample_rate)


if __name__ == "__main__":
    aar.command_line(main)
