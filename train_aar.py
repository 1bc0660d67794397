"""Stage 2: train the generator AAR on the tokens of a trained SAT, on the same sounds.

    python train_aar.py --data wavs/ --sat sat.pt --out aar.pt                    train
    python train_aar.py --data wavs/ --sat sat.pt --eval aar.pt --cfg 0 2 4       measure on the held-back clips, once per guidance
"""
import argparse
import dataclasses
import hashlib
import itertools
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import aar
import sample
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
    p.add_argument("--accumulate", type=int, default=1, metavar="N", help="take the batch in N parts: less memory, same result")
    p.add_argument("--lr", type=float, help="peak learning rate (default: the preset's)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", help="default: cuda, else mps, else cpu")
    p.add_argument("--resume", action="store_true", help="go on from --out exactly where it stopped")
    p.add_argument("--eval", metavar="CHECKPOINT", help="train nothing, measure this checkpoint on the held-back clips")
    p.add_argument("--cfg", type=float, nargs="+", default=[6.0], help="for --eval: guidance, as in sample.py; each value is measured")
    p.add_argument("--top-k", type=int, nargs="+", default=[0], help="for --eval, likewise")
    p.add_argument("--top-p", type=float, nargs="+", default=[0.8], help="for --eval, likewise")
    p.set_defaults(command=sample.command("train_aar.py", argv))
    return p.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    device = aar.pick_device(args.device)
    preset = PRESETS[args.preset or ("paper" if device.type == "cuda" else "tiny")]
    plan = aar.plan_from(preset.train_aar, args)
    if args.eval:
        return evaluate(args, device)
    sat = aar.load_sat(args.sat, device)
    embedder = aar.build_embedder(args.embedder, sat.config.sample_rate, args.clap).to(device)
    config = dataclasses.replace(preset.aar, scales=sat.config.scales, latent=sat.config.latent, V=sat.config.V,
                                 cond_dim=embedder.dim, next_token=args.next_token)
    with aar.alone(args.out):
        train(args, sat, embedder, config, plan, device)


def build(config, lr, device):
    """A new generator and its optimizer."""
    model = AAR(config).to(device)
    matrices = [m.weight for layer in model.layers for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    # Muon takes 64 rows of a matrix at a time, in qkv those of a head: its cost, the same at any batch, falls to a tenth.
    how = {"lr": lr, "betas": (0.9, 0.95), "weight_decay": 0.0, "fused": device.type != "meta"}       # which has no fused one
    return model, {"muon": aar.Muon(matrices, lr, rows=64), "optimizer": torch.optim.AdamW(rest, **how)}


def train(args, sat, embedder, config, plan, device):
    """Train AAR by `plan`; writes args.out and, beside it, a wave file of references and generated sounds and a page."""
    torch.manual_seed(args.seed)
    model, optimizers = build(config, plan.lr, device)
    parts = {"aar": model} | optimizers
    run = {"seed": args.seed, "data": args.data and os.path.basename(os.path.realpath(args.data)), "sat": aar.fingerprint(sat),
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

    bar = aar.progress(range(start, plan.steps), initial=start, total=plan.steps, unit="step")
    log, stop = aar.Log(bar, history), aar.Stop()
    for step in bar:
        pick = torch.from_numpy(np.random.default_rng((args.seed, step)).integers(len(tokens), size=plan.batch))
        pick = aar.shard(pick)
        lr = aar.learning_rate(step, plan)
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = lr
        loss, norm = train_step(model, sat, optimizers, weight, [(tokens[i].to(device), cond[i].to(device))
                                                                 for i in pick.chunk(args.accumulate)])
        log.add(step, (data[i][1] for i in pick.tolist()), loss=loss, norm=norm)

        if (step + 1) % max(1, plan.steps // 10) == 0 or step + 1 == plan.steps or stop.asked:
            log.flush()                                               # a broken loss stops here, before it is drawn from
            scores = validate(model, sat, *held)
            for name, value in scores.items():                        # nor is one kept that this step has broken
                aar.check_finite(step, name, value)
            heard = torch.stack([held_back[i][0] for i in range(min(4, len(held_back)))])
            y = listen(model, sat, held[1][:len(heard)])
            log.write(step + 1, y, **scores)
            aar.save_checkpoint(args.out, "aar", config, plan, step + 1, log.history, parts, **run)
            with aar.spare():
                aar.save_in_turn(Path(args.out).with_suffix(".wav"), heard, y, sat.config.sample_rate)
                sample.training_page(args, "Stage 2: the generator", log.history, heard, sat.config, config, plan)
            if stop.asked:
                raise aar.Stopped(f"stopped after {step + 1} of {plan.steps} steps; go on with the same command and --resume")


def train_step(model, sat, optimizers, weight, parts):
    """One step on a batch of tokens and conditions, given in equal parts (r, cond) whose gradients add up.

    Returns the loss of the batch and the length of its gradient.
    """
    total = 0.0
    model.zero_grad()
    for r, cond in parts:
        loss = losses(model, sat, r, cond)[0]
        ((loss * weight).mean() / len(parts)).backward()
        total += loss.mean().detach() / len(parts)
    norm = aar.clip_gradients(model)
    for optimizer in optimizers.values():
        optimizer.step()
    return total, norm


def losses(model, sat, r, cond):
    """Tokens r (B, L), cond (B, cond_dim) -> cross-entropy of each token and whether it is the likeliest, (B, L) both."""
    r = r.long()
    teacher_inputs = sat.teacher_inputs(r.split(model.config.scales, 1), model.config.next_token)
    with aar.autocast(r.device):
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
def free_running(model, sat, f, cond):
    """Whether each token is right when the model reads its own likeliest codes: latents f (B, D, T), cond (B, cond_dim) -> (B, L).

    Right is the code nearest to what is left of f after the scales so far; after true scales that is the true code, after
    wrong ones the code that best repairs them. So only what is read differs from the teacher-forced accuracy.
    """
    r, right = model.generate(cond, sat, cfg=0, top_k=1), []

    def choose(k, f_hat):
        quantizer = sat.quantizer
        right.append(quantizer.codebooks[k].nearest(quantizer.read(k, f - f_hat)) == r[k])
        return r[k]
    sat.quantizer.walk(choose)
    return torch.cat(right, 1)


def ranks(y, references, n=100):
    """Which rank its own reference has for each generated sound, (N,), by similarity of embeddings (N, C) and (N, C).

    The candidates are the n references from its own on, in a circle. Ties count against it: silence is not like everything.
    """
    N = len(references)
    candidates = (torch.arange(N)[:, None] + torch.arange(min(n, N))) % N                          # (N, n), its own first
    similarity = (references[candidates] @ y[:, :, None]).squeeze(2)
    return 1 + (similarity[:, 1:] >= similarity[:, :1]).sum(1)


@torch.no_grad()
def evaluate(args, device):
    """Print what a generator makes of the conditions of held-back clips, beside real sounds, reconstructions and noise."""
    settings = list(itertools.product(args.cfg, args.top_k, args.top_p))
    sat = aar.load_sat(args.sat, device)
    for setting in settings:
        aar.check_drawing(sat.config.V, *setting)
    model, kind, trained_with = aar.load_aar(args.eval, sat, device)
    model.prepare()
    embedder = aar.build_embedder(kind, sat.config.sample_rate, args.clap, trained_with).to(device)
    data, held_back = (aar.sounds(args.data, sat.config, args.seed, held_back=h) for h in (False, True))
    n = min(len(held_back), 1000)

    def batched(function, *inputs):
        return torch.cat([function(*(x.to(device) for x in part)).cpu() for part in zip(*(x.split(16) for x in inputs))])

    def row(name, y, seconds=""):
        rank = ranks(y, cond)
        print(f"| {name} | {aar.frechet(y, cond):.3f} | {(y * cond).sum(1).mean():.2f} | {rank.float().mean():.1f} | "
              f"{(rank == 1).float().mean():.0%} | {seconds} |", flush=True)

    waves, names = zip(*aar.batches(held_back, 16, range(n)))
    wav = torch.cat(waves)
    cond = batched(embedder, wav)
    tokens = batched(lambda x: torch.cat(sat.encode(x), 1), wav)
    waves, more_names = zip(*aar.batches(data, 16, range(n)))
    training = torch.cat([batched(embedder, x) for x in waves])

    print(f"device {device}, {args.eval}, {n} held-back clips, and in each line as many; embedder {kind}: "
          + aar.neighbours(torch.cat([cond, training]), sum((*names, *more_names), ())))
    aar.warn_of_few(n, embedder.dim)
    print(f"| | Frechet | similarity | rank of {min(n, 100)} | first | s per clip |\n| --- |" + " ---: |" * 5)
    row("training clips", training)
    row("reconstructions", batched(lambda r: embedder(sat.decode(r.split(sat.config.scales, 1))), tokens))
    row("white noise", batched(embedder, wav.std(-1, keepdim=True) * torch.randn_like(wav)))
    for cfg, top_k, top_p in settings:
        generator = torch.Generator(device).manual_seed(args.seed)
        since = time.perf_counter()
        y = batched(lambda c: sat.decode(model.generate(c, sat, cfg, top_k, top_p, generator)), cond)
        seconds = (time.perf_counter() - since) / n
        row(f"cfg {cfg:g}, top-k {top_k}, top-p {top_p:g}", batched(embedder, y), f"{seconds:.3f}")

    own = per_scale(batched(lambda x, c: free_running(model, sat, sat.latents(x), c), wav, cond), sat.config.scales)
    scores = validate(model, sat, tokens, cond)
    print(f"\nheld-back cross-entropy per token: {scores['held_back']:.2f}\n\n| scale | loss | accuracy | free-running |\n" + "| ---: " * 4 + "|")
    for s, loss, right, right_own in zip(sat.config.scales, scores["per_scale"], scores["accuracy"], own):
        print(f"| {s} | {loss:.2f} | {right:.1%} | {right_own:.1%} |")


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
            state = aar.load(cache)
            if state["key"] == key:
                return state["tokens"], state["cond"]
        except Exception:                                             # damaged or foreign: made anew
            pass
    device, tokens, cond = next(sat.parameters()).device, [], []
    clips = aar.shard([i % n for i in range(n + -n % aar.world())])   # as many for each process
    for wav, _ in aar.progress(aar.batches(data, 16, clips), total=math.ceil(len(clips) / 16), desc=f"{name} tokens", unit="batch"):
        wav = wav.to(device)
        tokens.append(torch.cat(sat.encode(wav), 1).cpu())
        cond.append(embedder(wav).cpu())
    tokens, cond = aar.gather(torch.cat(tokens))[:n].short(), aar.gather(torch.cat(cond))[:n]
    with aar.spare():
        aar.save(cache, {"key": key, "tokens": tokens, "cond": cond})
    return tokens, cond


def listen(model, sat, cond):
    """What the generator makes now of conditions (n, cond_dim): sounds (n, 1, N)."""
    device = next(model.parameters()).device
    model.eval()
    y = sat.decode(model.generate(cond.to(device), sat, generator=torch.Generator(device).manual_seed(0)))
    model.train()
    return y


if __name__ == "__main__":
    aar.command_line(main)
