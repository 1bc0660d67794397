"""Stage 1: train the tokenizer SAT on a folder of sounds, or without --data on the built-in toy sounds.

    python train_sat.py --data wavs/ --out sat.pt            train
    python train_sat.py --data wavs/ --eval sat.pt other.pt  measure checkpoints on the held-back clips
"""
import argparse
import functools
import os
import re
import signal
import sys
import time
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from tqdm import tqdm

import aar
from aar import PRESETS, SAT, Discriminators, Mel, MelLoss, UserError

# Weights of the losses: the released configuration, and "wave", which is not in the paper.
WEIGHTS = {"time": 0.1, "wave": 5.0, "mel": 1.0, "vq": 1.0, "adversarial": 3.0, "feature": 3.0}
SUFFIXES = ".wav .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .caf .w64 .rf64".split()
TOYS = ("kick", "snare", "hat", "pluck", "bell", "siren", "bird", "wind", "buzz", "clicks")
HELD_BACK = 2 ** 31                     # seed of the windows of held-back clips: the same for every --seed
BOUNDS = {"steps": (1, 10 ** 9), "batch": (1, 10 ** 6), "lr": (1e-9, 1), "seed": (0, HELD_BACK - 1), "phis": (0, 16),
          "seconds": (0.25, 60), "rvq": (1, 100), "adversarial_at": (0, 1), "n": (1, 10 ** 6), "scales": (1, 100),
          "cfg": (0, 100), "top_k": (0, 10 ** 6), "top_p": (1e-9, 1)}          # of the numbers on all command lines
adamw = functools.partial(torch.optim.AdamW, weight_decay=0.01, fused=True, capturable=True)   # for CUDA graphs


def common_arguments(description, out):
    """The parser with what both stages understand."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", help="folder of sound files (default: built-in toy sounds)")
    p.add_argument("--preset", choices=PRESETS, help="sizes and plan (default: base with CUDA, else tiny)")
    p.add_argument("--out", default=out, help=f"checkpoint to write (default: {out})")
    p.add_argument("--steps", type=int, help="default: the preset's")
    p.add_argument("--batch", type=int, help="clips per step (default: the preset's)")
    p.add_argument("--lr", type=float, help="peak learning rate (default: the preset's)")
    p.add_argument("--seed", type=int, default=0, help="of weights, windows and steps (default: 0)")
    p.add_argument("--device", help="default: cuda, else mps, else cpu")
    p.add_argument("--resume", action="store_true", help="go on from --out exactly where it stopped")
    p.add_argument("--init", metavar="FILE", help="start from the weights of a checkpoint, ours or the authors'")
    return p


def arguments(argv=None):
    p = common_arguments(__doc__, "sat.pt")
    p.add_argument("--seconds", type=float, help="length of the window that becomes tokens (default: 1)")
    p.add_argument("--schedule", choices=["quadratic", "linear", "log"], help="scales, Fig. 5 (default: quadratic)")
    p.add_argument("--rvq", type=int, nargs="?", const=10, metavar="LEVELS", help="the baseline: residual VQ, no phi")
    p.add_argument("--phis", type=int, metavar="N", help="convolutions phi; 0: none (default: 6)")
    p.add_argument("--adversarial-at", type=float, metavar="FRACTION", help="discriminators join here; 1: never")
    p.add_argument("--eval", metavar="FILE", nargs="+", help="train nothing; measure on the held-back clips")
    return p.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    device, preset = begin(args)
    if args.eval:
        for path in args.eval:
            sat = aar.load_sat(path, device)
            rate = {"tokens_per_s": sum(sat.config.scales) / sat.config.seconds}
            print(path, rate | evaluate(sat, sounds(args.data, sat.config, args.seed)[1]))
        return
    if args.init and {args.seconds, args.rvq, args.schedule, args.phis} != {None}:
        raise UserError(f"{args.init} has its own sizes: leave out --seconds, --rvq, --schedule and --phis")
    if args.rvq and {args.schedule, args.phis} != {None}:
        raise UserError("--rvq has flat scales and no phi: leave out --schedule and --phis")
    config = replace(preset.sat, schedule="flat", n_scales=args.rvq, phis=0) if args.rvq else preset.sat
    train(args, config, preset.plan_sat, device)


def begin(args):
    """The device, and the preset with the command line's options in place of its fields. Raises UserError."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    for name, (low, high) in BOUNDS.items():
        if name in given and not (low <= np.min(given[name]) and np.max(given[name]) <= high):
            raise UserError(f"{name.replace('_', '-')} must be {low} to {high}, got {given[name]}")
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(args.device or best)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {args.device}: {str(e).splitlines()[0]}; the best here is {best}")
    os.environ.setdefault("TORCHINDUCTOR_MIX_ORDER_REDUCTION", "0")  # suspected of crashing compiled layers
    name = args.preset or ("base" if device.type == "cuda" else "tiny")
    print(f"device {device}, preset {name}" + (": about 10 + 15 hours on an H100" if name == "paper" else ""))
    given.pop("scales", None)                                        # sample.py's means something else
    changed = (replace(part, **{k: given[k] for k in vars(part) if k in given}) for part in PRESETS[name])
    return device, aar.Preset(*changed)


def run(main):
    """Run a script's main(); what the user can mend ends in one line and exit code 2, without a traceback."""
    try:
        return main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, RuntimeError) as e:
        message = " ".join(str(e).rpartition("UserError: ")[2].split())              # without a worker's traceback
        if isinstance(e, RuntimeError) and not isinstance(e, soundfile.SoundFileError):
            if not re.search("(out of|allocate|shared) memory|failed writing", message):
                raise
            message = message[:200] + " (a smaller --batch needs less)" * ("memory" in message)
        print("error:", message, file=sys.stderr)
        sys.exit(2)


# --- Sounds: a folder, or toys -----------------------------------------------------------------------------------
def find_sounds(folder):
    """Sound files below a folder, links followed -> [(hash of the path in it, path, seconds)], sorted."""
    paths, found, seen = [], [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(root)) in seen:                 # a link to a folder that was visited
            folders[:], names = [], []
        seen.add(real)
        paths += [Path(root, name) for name in names]
    audio = [path for path in paths if path.suffix.lower() in SUFFIXES]
    for path in audio:
        try:
            aar.load_audio(path, 24000, seconds=0.01)                # can its beginning be read?
            found.append((zlib.crc32(bytes(path.relative_to(folder))), path, soundfile.info(path).duration))
        except (UserError, OSError, RuntimeError) as e:
            print(f"skipped {e}", file=sys.stderr)
    print(f"{folder}: {len(found)} readable sounds, {len(audio) - len(found)} unreadable, "
          f"{len(paths) - len(audio)} files of other kinds")
    if not found:
        what = "no sounds" if os.path.isdir(folder) else "no such folder"
        raise UserError(f"{folder}: {what}; give a folder of {' '.join(SUFFIXES)}")
    return sorted(found)


class Windows:
    """Windows (1, samples) of files: item i, for any i >= 0, is a random place of file i % len that is not silent."""

    def __init__(self, files, config, seed):
        self.files, self.config, self.seed, self.augment = files, config, seed, False

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        rng, gain = np.random.default_rng((self.seed, i)), 1.0
        rate, samples = self.config.sample_rate, self.config.samples
        if self.augment:                                             # read at one rate, played at another: shifted
            rate, gain = rate * 2 ** (rng.uniform(-2, 2) / 12), 10 ** (rng.uniform(-6, 6) / 20)
        seconds = samples / rate
        for _, path, length in (self.files[j % len(self)] for j in range(i, i + len(self))):
            wavs = []
            try:
                while len(wavs) < 4 and all(wav.std(correction=0) <= 1e-3 for wav in wavs):  # offsets are silent
                    wavs.append(aar.load_audio(path, rate, rng.uniform(0, max(0.0, length - seconds)), seconds))
                wav = max(wavs, key=lambda wav: wav.std(correction=0))
                wav = wav * min(gain, 1 / (wav.abs().max().item() + 1e-9))
                return F.pad(wav, (0, samples - wav.shape[1]))
            except UserError as e:
                print(f"skipped {e}", file=sys.stderr)               # the next file takes its place
        raise UserError("none of the sounds can be read")


class Toys(Windows):
    """Endless built-in sounds with random parameters: item i is (1, samples) of kind TOYS[i % 10]."""

    def __init__(self, config, seed=0):
        super().__init__([(0, kind, 60.0) for kind in TOYS * 10], config, seed)              # as 100 files of 60 s

    def __getitem__(self, i):
        rng = np.random.default_rng((self.seed, i))
        rate, samples = self.config.sample_rate, self.config.samples
        t, u, noise = np.arange(samples) / rate, rng.uniform, rng.standard_normal(samples)
        sweep = t * u(4, 8) % 1

        def tone(hz, partials=(1,), damping=0.0):
            phase = 2 * np.pi * np.cumsum(hz * np.ones(samples)) / rate
            return sum(np.sin(h * phase) * np.exp(-damping * h * t) / h for h in partials)
        x = {"kick": lambda: tone(u(40, 60) + u(100, 200) * np.exp(-u(25, 45) * t)) * np.exp(-u(5, 9) * t),
             "snare": lambda: 0.5 * noise * np.exp(-u(12, 20) * t) + tone(u(160, 240)) * np.exp(-u(15, 25) * t),
             "hat": lambda: np.diff(noise, 2, prepend=[0, 0]) * np.exp(-u(25, 60) * t),
             "pluck": lambda: tone(u(150, 600), range(1, 9), 2) * np.exp(-u(1, 3) * t),
             "bell": lambda: tone(u(400, 900), (1, 2.76, 5.4, 8.93), u(0.5, 1.5)),
             "siren": lambda: tone(u(600, 1000) * (1 + u(0.2, 0.4) * tone(u(2, 4))), range(1, 6)),
             "bird": lambda: tone(u(2500, 4500) * (1 + u(0.2, 0.5) * sweep)) * np.sin(np.pi * sweep / 0.6).clip(0),
             "wind": lambda: np.convolve(noise, np.hanning(int(u(60, 160))), "same") * (1 + 0.8 * tone(u(0.5, 2))),
             "buzz": lambda: tone(u(70, 160), range(1, 25)),
             "clicks": lambda: tone(u(1200, 2400)) * np.exp(-u(15, 30) * (t % u(0.08, 0.16)))}[TOYS[i % 10]]()
        x = x / np.abs(x).max() * 10 ** (u(-12, -2) / 20) + 10 ** (-45 / 20) * rng.standard_normal(samples)
        return torch.from_numpy(x.astype(np.float32))[None]


def sounds(folder, config, seed=0):
    """(Training set; held-back set: 5% of the files by hash, at most 256; a key that changes with the files)."""
    if folder is None:
        return Toys(config, seed), Toys(config, HELD_BACK), "toys"
    files = find_sounds(folder)
    n = min(max(2, sum(h < 2 ** 32 // 20 for h, _, _ in files)), max(1, len(files) - 1))
    if len(files) == 1:
        print("a single sound: it is trained on and held back as well")
    seen = [(h, zlib.crc32(np.fromfile(path, np.uint8, 65536), path.stat().st_size)) for h, path, _ in files]
    key = f"{zlib.crc32(repr(seen).encode()):08x}"
    return Windows(files[n:] or files, config, seed), Windows(files[:n][:256], config, HELD_BACK), key


def batches(data, batch, items):
    """Batches (B, 1, N) of data[i] for i in `items`, decoded ahead in other processes."""
    ask = signal.signal(signal.SIGINT, signal.SIG_IGN)               # they inherit it: Ctrl-C must not end them
    workers, cuda = max(1, min(4, os.cpu_count() // 2)), torch.cuda.is_initialized()
    loader = iter(torch.utils.data.DataLoader(data, batch, sampler=items, num_workers=workers, pin_memory=cuda))
    signal.signal(signal.SIGINT, ask)
    return loader


# --- Training ----------------------------------------------------------------------------------------------------
def learning_rate(step, plan):
    """Linear warm-up, then a cosine down to 1%."""
    n = round(plan.warm_up * plan.steps)
    return plan.lr * ((step + 1) / n if step < n else 0.505 + 0.495 * np.cos(np.pi * (step - n) / (plan.steps - n)))


def orthogonal(G, rounds=5):
    """Newton-Schulz: a matrix G = U S V^T -> about U V^T: singular values 0.7 to 1.2, less where S < 0.0014 |G|."""
    tall = len(G) > G.shape[1]
    X = ((G.mT if tall else G) / G.norm().clamp(min=1e-7)).to(aar.fast_dtype(G.device))
    for _ in range(rounds):
        A = X @ X.mT                                                 # X is wide, so A is the smaller square
        A = torch.addmm(A, A, A, beta=-4.7750, alpha=2.0315)         # -4.7750 A + 2.0315 A A
        X = torch.addmm(X, A, X, beta=3.4445)                        # 3.4445 X + A X
    return (X.mT if tall else X).to(G.dtype)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): orthogonal steps, so that all directions of a weight matrix learn equally fast."""
    momentum = 0.95

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in (w for w in group["params"] if w.grad is not None):
                if w not in self.state:
                    self.state[w]["momentum"] = torch.zeros_like(w)
                m = self.state[w]["momentum"].lerp_(w.grad, 1 - self.momentum)
                update = orthogonal(w.grad.lerp(m, self.momentum).flatten(1))     # Nesterov momentum, as a matrix
                w.sub_(0.2 * max(update.shape) ** 0.5 * group["lr"] * update.view_as(w))     # as long as AdamW's steps


def build(config, device, init=None):
    """A tokenizer, its discriminators, the optimizers of both players and their learning rate."""
    sat = (aar.load_sat(init, device) if init else SAT(config).to(device)).train()
    discriminators = Discriminators(sat.config.disc_width).to(device, memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark = True                            # try its algorithms once, then take the fastest
    lr = torch.zeros((), device=device)
    learned = [p for p in sat.parameters() if p.requires_grad]
    # Muon takes no gains of weight norm, (c, 1, 1), and no LSTMs, whose large matrices would be slow.
    kernels = [p for p in learned if p.ndim == 3 and p.numel() > len(p)]
    rest = [p for p in learned if all(p is not kernel for kernel in kernels)]
    return sat, discriminators, {"muon": Muon(kernels, {"lr": lr}), "adamw": adamw(rest, lr, (0.8, 0.99)),
                                 "d_adamw": adamw(discriminators.parameters(), lr, (0.8, 0.99))}, lr


def train_step(sat, discriminators, optimizers, mel_loss, quantize, adversarial, x):
    """One step on sounds x (B, 1, N); returns the losses, {name: tensor}. Never waits for the device."""
    fast = aar.autocast(x.device, aar.fast_dtype(x.device, convolutions=True))
    sat.zero_grad()
    discriminators.zero_grad()
    with fast:
        y, _, vq = sat(x) if quantize else (sat.decoder(sat.latents(x)).float(), None, x.new_zeros(()))
    losses = {"time": (x - y).abs().mean(), "wave": aar.wave_loss(x, y), "mel": mel_loss(x, y), "vq": vq}
    if adversarial:
        x, y = x.chunk(2)[0], y.chunk(2)[0]                          # half of them: judging takes most of the time
        with fast:                                                   # not detached: these maps serve both players
            real, fake = discriminators(x), discriminators(y)
        losses |= {"adversarial": aar.adversarial_loss(fake), "feature": aar.feature_loss(real, fake),
                   "discriminator": aar.discriminator_loss(real, fake)}
        losses["discriminator"].backward(inputs=list(discriminators.parameters()), retain_graph=True)
        losses["d_norm"] = torch.nn.utils.clip_grad_norm_(discriminators.parameters(), 1.0)
    loss = sum(weight * losses[name] for name, weight in WEIGHTS.items() if name in losses)
    loss.backward(inputs=[p for p in sat.parameters() if p.requires_grad])     # each player learns from its own loss
    losses["norm"] = torch.nn.utils.clip_grad_norm_(sat.parameters(), 1.0)
    for optimizer in optimizers.values():
        optimizer.step()
    return {name: value.detach() for name, value in losses.items()}


def start(args, kind, config, plan, parts, lr, **settings):
    """The state of a new run, or with --resume that of args.out, loaded into `parts`. Raises UserError."""
    settings |= asdict(config) | asdict(plan) | {"seed": args.seed, "init": args.init}
    state = {"kind": kind, "config": asdict(config), "run": settings, "step": 0, "history": []}
    if args.resume:
        state = aar.load(args.out, kind)
        was = state.get("run", {})
        if differs := [f"{k} {was.get(k)} -> {v}" for k, v in settings.items() if was.get(k) != v]:
            raise UserError(f"{args.out} has other settings ({'; '.join(differs)}): use the same, or --init")
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
            for group in getattr(part, "param_groups", ()):          # of an optimizer: one lr for all, on this device
                group.update(lr=lr, capturable=True)
    elif os.path.lexists(args.out):
        raise UserError(f"{args.out} exists: --resume goes on with it, or give another --out")
    out = Path(args.out).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    inside = args.data and out.is_relative_to(Path(args.data).resolve())     # else sat.wav becomes a training sound
    if inside or out.suffix not in (".pt", ".pth") or not os.access(out.parent, os.W_OK):
        raise UserError(f"--out {args.out}: must end in .pt, in a folder that can be written, outside of --data")
    print(f"{sum(p.numel() for p in parts[kind].parameters()) / 1e6:.2f} M parameters, scales {config.scales}")
    return state


def loop(args, plan, state, parts, lr, one_step, report):
    """Do the steps that are left: one_step(i) -> losses {name: tensor}.

    At every tenth of the plan, every ten minutes and at Ctrl-C (TERM, HUP), it logs the mean losses and report(i) ->
    {name: number or list}, plots and saves. The random numbers of step i depend on i and the seed: --resume is exact.
    """
    pending, rows, stop, since = [], [], [], time.time()

    def ask(number, _):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)                        # a second one stops at once
    for number in signal.valid_signals() & {1, 2, 15}:               # HUP (not in Windows), INT, TERM
        if (number, signal.getsignal(number)) != (1, signal.SIG_IGN):          # nohup ignores HUP
            signal.signal(number, ask)
    bar = tqdm(range(state["step"], plan.steps), initial=state["step"], total=plan.steps, unit="step")
    for step in bar:
        torch.manual_seed(args.seed + step)
        lr.fill_(learning_rate(step, plan))
        losses, done = one_step(step), step + 1
        pending.append((list(losses), torch.stack(list(losses.values()))))           # copied: a replay overwrites them
        due = stop or done == plan.steps or done % max(1, plan.steps // 10) == 0 or time.time() > since + 600
        if due or len(pending) == 10:                                # only here the program waits for the device
            for i, (names, values) in enumerate(pending, done - len(pending)):
                rows.append(dict(zip(names, values.tolist())))
                if bad := [name for name, value in rows[-1].items() if not np.isfinite(value)]:
                    raise UserError(f"step {i}: {bad[0]} is not finite; the last checkpoint is kept; lower --lr")
            pending = []
            bar.set_postfix(rows[-1], refresh=False)
        if due:
            means = {name: np.mean([row[name] for row in rows if name in row]) for name in rows[-1]}
            row = {"step": done, "s_per_step": (time.time() - since) / len(rows)} | means | report(step)
            state["history"].append({name: np.round(value, 3).tolist() for name, value in row.items()})
            bar.write(str(state["history"][-1]))
            draw_curves(Path(args.out).with_suffix(".png"), state["history"])
            state |= {"step": done, "parts": {name: part.state_dict() for name, part in parts.items()}}
            aar.save(args.out, state)
            if stop and done < plan.steps:
                bar.close()
                raise UserError(f"stopped after {done} of {plan.steps} steps; --resume goes on")
            rows, since = [], time.time()


def draw_curves(path, history):
    """A picture of every number of the log over the steps; lists have a line for each scale."""
    from matplotlib.figure import Figure                             # without pyplot: needs no display
    names = [name for name in history[-1] if name != "step"]
    figure = Figure(figsize=(6, 2 * len(names)), layout="constrained")
    for ax, name in zip(figure.subplots(len(names)), names):
        ax.plot(*zip(*((row["step"], row[name]) for row in history if name in row)), marker=".")
        ax.set_ylabel(name)
    figure.savefig(path)


def save_in_turn(path, x, y, sample_rate):
    """Write sounds x and y (n, 1, N) as one wave file, x[0] y[0] x[1] y[1] ..., with pauses between."""
    pairs = F.pad(torch.stack([x, y], 1), (0, sample_rate // 5))                 # (n, 2, 1, N + pause)
    aar.save_audio(path, pairs.reshape(1, -1), sample_rate)


def train(args, config, plan, device):
    """Train SAT; writes args.out, and beside it the curves and a wave file of originals and reconstructions."""
    torch.manual_seed(args.seed)
    sat, discriminators, optimizers, lr = build(config, device, args.init)
    config = sat.config
    data, held_back, key = sounds(args.data, config, args.seed)
    parts = {"sat": sat, "discriminators": discriminators} | optimizers
    state = start(args, "sat", config, plan, parts, lr, sounds=key)
    mel_loss = MelLoss(config.sample_rate).to(device)
    quantize_at = 0 if args.init else round(plan.quantize_at * plan.steps)
    adversarial_at = round(plan.adversarial_at * plan.steps)
    heard = torch.stack([held_back[i] for i in range(min(8, len(held_back)))]).to(device)
    loader = batches(data, plan.batch, range(state["step"] * plan.batch, plan.steps * plan.batch))

    @functools.lru_cache(1)                                          # a new phase frees the CUDA graph of the last
    def step_of_phase(quantize, adversarial):
        return aar.graphed(lambda x: train_step(sat, discriminators, optimizers, mel_loss, quantize, adversarial, x))

    def one_step(step):
        if step == quantize_at and not args.init:                    # k-means on V clips: V vectors at scale 1
            with torch.no_grad():
                first = [sat.latents(x.to(device)) for x in batches(data, plan.batch, range(config.V))]
                sat.quantizer.quantize(torch.cat(first), kmeans=True)
        x, adversarial = next(loader).to(device, non_blocking=True), step >= adversarial_at
        if adversarial:                                              # a random half of them will be judged
            x = x[torch.randperm(len(x), device=device)]
        return step_of_phase(step >= quantize_at, adversarial)(x)

    def report(step):
        if step < quantize_at:                                       # the codebooks are random
            return {}
        save_in_turn(Path(args.out).with_suffix(".wav"), heard, sat.decode(sat.encode(heard)), config.sample_rate)
        return evaluate(sat, held_back)
    loop(args, plan, state, parts, lr, one_step, report)


@torch.no_grad()
def evaluate(sat, held_back):
    """Reconstruct the held-back clips -> log-mel distance (dB), SI-SDR (dB), how many codes each scale uses."""
    device, log_mel, si_sdr, tokens = next(sat.parameters()).device, [], [], []
    mel = Mel(sat.config.sample_rate, 1024, 80).to(device)
    for x in torch.utils.data.DataLoader(held_back, batch_size=16):
        x = x.to(device)
        tokens.append(sat.encode(x))
        y = sat.decode(tokens[-1])
        cos2 = F.cosine_similarity(x, y, dim=-1).square().clamp(1e-8, 1 - 1e-6)
        log_mel.append((mel.dB(x) - mel.dB(y)).abs().mean((1, 2)))
        si_sdr.append(10 * (cos2 / (1 - cos2)).log10())              # |projection of y on x|^2 / |rest of y|^2
    log_mel, si_sdr = (round(torch.cat(x).mean().item(), 3) for x in (log_mel, si_sdr))
    used = [len(torch.cat(r_k).unique()) for r_k in zip(*tokens)]
    return {"log_mel_dB": log_mel, "si_sdr_dB": si_sdr, "used": used}


if __name__ == "__main__":
    run(main)
