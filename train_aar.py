"""Stage 2: train the generator AAR on the tokens of a trained SAT, on the same sounds.

    python train_aar.py --data wavs/ --sat sat.pt --out aar.pt                    train
    python train_aar.py --data wavs/ --sat sat.pt --eval aar.pt --cfg 0 2 4       measure on the held-back clips
"""
import importlib.util
import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import soxr
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import aar
import train_sat
from aar import AAR, UserError

SAMPLING = {"cfg": 2.0, "top_k": 0, "top_p": 0.5, "ramp": False}        # of our generators, at every scale alike


def arguments(argv=None):
    p = train_sat.common_arguments(__doc__, "aar.pt")
    p.add_argument("--sat", default="sat.pt", help="checkpoint of stage 1, ours or the authors' (default: sat.pt)")
    p.add_argument("--embedder", choices=["mel", "clap"], help="what makes the condition (default: clap with --clap)")
    p.add_argument("--clap", metavar="FILE", help="checkpoint of laion-clap, for --embedder clap")
    p.add_argument("--next-token", action="store_true", help="the baseline: one token per step")
    p.add_argument("--eval", metavar="FILE", help="train nothing; measure on the held-back clips")
    p.add_argument("--cfg", type=float, nargs="+", default=[SAMPLING["cfg"]], help="for --eval: guidance, one or more")
    return p.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    device, preset = train_sat.begin(args)
    if args.eval:
        return evaluate(args, device)
    sat = aar.load_sat(args.sat, device)
    kind = args.embedder or ("clap" if args.clap else "mel")
    embedder = build_embedder(kind, sat.config.sample_rate, args.clap).to(device)
    config = replace(preset.aar, scales=sat.config.scales, latent=sat.config.latent, V=sat.config.V)
    if args.init:
        model = aar.load_aar(args.init, sat)
        config, was = model.config, model.embedder["kind"]
        if (kind, args.next_token) != (was, config.next_token):
            raise UserError(f"{args.init} was made with --embedder {was}, next_token={config.next_token}: do the same")
    train(args, sat, embedder, config, preset.plan_aar, device)


# --- The condition: what the generator is told about the sound ---------------------------------------------------
class MelEmbedder(nn.Module):
    """Download-free stand-in for CLAP, from 32 mel cepstra over time: (B, 1, N) -> (B, 512) of unit length."""

    def __init__(self, sample_rate):
        super().__init__()
        self.mel = aar.Mel(sample_rate, 1024, 64)
        i = torch.arange(32)[:, None]                                # float64, rounded: equal on all processors
        dct = (torch.cos(i * (torch.arange(64).double() + 0.5) * np.pi / 64) / 64).float()     # (32, 64)
        self.register_buffer("over_time", dct[:14].T)                # in the state, so that fingerprints tell it
        self.register_buffer("over_mels", dct * (i + 1).sqrt())      # to cepstra, the higher ones lifted

    @torch.no_grad()
    def forward(self, wav):
        c = self.over_mels @ (self.mel.dB(wav) + 60)                 # (B, 32, frames); the first: mean dB above -60
        course = F.interpolate(c, size=64, mode="linear") @ self.over_time     # (B, 32, 14): how each changes
        spread = torch.stack([c.std(2, correction=0), c.diff(dim=2).std(2, correction=0)], 2)
        return F.normalize(torch.cat([course, spread], 2).flatten(1), dim=-1)  # 32 x (14 + 2) = 512


def laion_clap(size):
    """laion-clap's audio transformer with random weights; size "tiny" or "base"."""
    if (spec := importlib.util.find_spec("laion_clap")) is None:
        raise ImportError("laion_clap is not installed: see README.md")
    folder = Path(spec.origin).parent / "clap_module"
    # `import laion_clap` asks the network for tokenizers, for minutes: import its audio file below an empty package,
    # with stand-ins for the two helpers whose file imports h5py and torchvision; they touch no embedding.
    sys.modules.setdefault("_clap", types.ModuleType("_clap")).__path__ = [str(folder)]
    sys.modules["_clap.utils"] = types.SimpleNamespace(do_mixup=None, interpolate=lambda x, ratio: x)
    config = json.loads((folder / f"model_configs/HTSAT-{size}.json").read_text())["audio_cfg"]
    return importlib.import_module("_clap.htsat").create_htsat_model(types.SimpleNamespace(**config))


def projection(width):
    """The layers between the audio or text half of CLAP and the shared 512 numbers."""
    return nn.Sequential(nn.Linear(width, 512), nn.ReLU(), nn.Linear(512, 512))


class CLAP(nn.Module):
    """Frozen laion-clap (arXiv 2211.06687) from a file: sounds and sentences that fit get close vectors."""
    where = "get 630k-audioset-best.pt from https://huggingface.co/lukewys/laion_clap and give it with --clap"

    @torch.random.fork_rng(devices=[])                               # random weights before loading must not move it
    def __init__(self, path, sample_rate):
        super().__init__()
        self.path, self.sample_rate = Path(path), sample_rate
        scalar = np.float64(0).__reduce__()[0]                       # the published files hold scalars of either numpy
        safe = [np.dtype, *(type(np.dtype(t)) for t in "fdl"),
                (scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]
        try:
            with torch.serialization.safe_globals(safe):
                state = torch.load(path, map_location="cpu", weights_only=True)
            state = {name.removeprefix("module."): x for name, x in state.get("state_dict", state).items()}
            width = len(state["audio_branch.patch_embed.proj.bias"])
            self.tensors = {name: x for name, x in state.items() if not name.endswith("position_ids")}
            self.audio_branch = self.part("audio_branch", laion_clap("tiny" if width == 96 else "base"))
            self.audio_projection = self.part("audio_projection", projection(8 * width))
        except Exception as e:                                       # a broken file can raise nearly anything
            raise UserError(f"--clap {path}: no CLAP that fits ({type(e).__name__}: {str(e)[:80]}); {self.where}")

    def part(self, name, module):
        """The module with the tensors `name`.*, frozen."""
        module.load_state_dict({k[len(name) + 1:]: x for k, x in self.tensors.items() if k.startswith(name + ".")})
        return module.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, wav):
        """Waveform (B, 1, N) -> (B, 512), unit length; only the first 10 s count."""
        x = soxr.resample(wav.squeeze(1).T.float().cpu().numpy(), self.sample_rate, 48000)
        x = torch.from_numpy(x.T).to(wav.device)[:, :480000]
        x = x.repeat(1, 480000 // x.shape[1])                        # as it was trained: whole repeats, then silence
        x = self.audio_branch({"waveform": F.pad(x, (0, 480000 - x.shape[1]))}, device=x.device)["embedding"]
        return F.normalize(self.audio_projection(x), dim=-1)

    @torch.no_grad()
    def text(self, prompts):
        """A list of P sentences -> (P, 512), unit length; only the first 77 tokens of each count."""
        from transformers import RobertaConfig, RobertaModel, RobertaTokenizer
        device, folder = self.audio_projection[0].weight.device, self.path.resolve().parent
        try:
            tokenizer = RobertaTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception:                                            # no files, or broken ones
            tokenizer = ()
        if len(tokenizer) != 50265:                                  # without words all prompts would be the same
            raise UserError(f"CLAP's tokenizer has {len(tokenizer)} of its 50265 tokens: get vocab.json and merges.txt "
                            f"from https://huggingface.co/roberta-base and put both into {folder}")
        try:
            width = self.tensors["text_branch.embeddings.word_embeddings.weight"].shape[1]
            layers = sum("text" in name and name.endswith("intermediate.dense.weight") for name in self.tensors)
            branch = self.part("text_branch", RobertaModel(RobertaConfig(
                hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, type_vocab_size=1,
                intermediate_size=4 * width, max_position_embeddings=514, layer_norm_eps=1e-5))).to(device)
            project = self.part("text_projection", projection(width)).to(device)
        except (KeyError, RuntimeError):
            raise UserError(f"--clap {self.path}: has no whole text half; {self.where}")
        tokens = tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt").to(device)
        return F.normalize(project(branch(tokens.input_ids, tokens.attention_mask).pooler_output), dim=-1)


def build_embedder(kind, sample_rate, clap=None, trained_with=None):
    """The embedder "mel" or "clap". Raises UserError if it is not the one that a generator was `trained_with`."""
    if kind == "clap" and clap is None:
        raise UserError(f"the embedder clap needs a checkpoint: {CLAP.where}")
    embedder = CLAP(clap, sample_rate) if kind == "clap" else MelEmbedder(sample_rate)
    if trained_with not in (None, aar.fingerprint(embedder)):
        raise UserError(f"the generator was trained with another {kind}: give the same --clap, or train it anew")
    return embedder.eval()


# --- Training ----------------------------------------------------------------------------------------------------
def tokenize(sat, embedder, data, n):
    """Tokens (n, L) int16 and conditions (n, cond_dim) of the first n windows of `data`."""
    device, tokens, cond = next(sat.parameters()).device, [], []
    for wav in tqdm(train_sat.batches(data, 16, range(n)), "tokens", -(-n // 16), unit="batch"):
        tokens.append(torch.cat(sat.encode(wav.to(device)), 1).short().cpu())
        cond.append(embedder(wav.to(device)).cpu())                  # the window that is tokenized is embedded
    return torch.cat(tokens), torch.cat(cond)


def teacher_forced(model, sat, r, cond):
    """Tokens r (B, L), cond (B, cond_dim) -> cross-entropy of each token (B, L), logits (B, L, V)."""
    r = r.long()
    teacher_inputs = sat.teacher_inputs(r.split(model.config.scales, 1), model.config.next_token)
    with aar.autocast(r.device, aar.fast_dtype(r.device)):
        logits = model(cond, teacher_inputs)
    return F.cross_entropy(logits.mT, r, reduction="none"), logits


def train_step(model, sat, optimizers, r, cond):
    """One step on tokens r (B, L) and conditions (B, cond_dim); returns the losses, {name: tensor}."""
    model.zero_grad()
    loss, _ = teacher_forced(model, sat, r, cond)
    # The few coarse tokens decide what the sound is: a token of scale k weighs 1 / sqrt(s_k).
    weight = torch.cat([loss.new_full((s,), s ** -0.5) for s in model.config.scales])
    (loss * weight / weight.mean()).mean().backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers.values():
        optimizer.step()
    return {"loss": loss.detach().mean(), "norm": norm}


def build(config, sat, device, init=None, steps=0):
    """A generator for a training of `steps` steps, its optimizers and their learning rate."""
    model = aar.load_aar(init, sat, device) if init else AAR(config).to(device)
    lr = torch.zeros((), device=device)
    matrices = [m.weight for layer in model.layers for m in layer.modules() if isinstance(m, nn.Linear)]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    if device.type == "cuda" and steps >= 20_000:                    # fewer would not win back the time to compile
        torch._dynamo.config.suppress_errors = True                  # where that fails, run them as they are
        for layer in model.layers:
            layer.compile()
    return model, {"muon": train_sat.Muon(matrices, {"lr": lr}), "adamw": train_sat.adamw(rest, lr, (0.9, 0.95))}, lr


def train(args, sat, embedder, config, plan, device):
    """Train AAR; writes args.out, and beside it the curves and a wave file of references and generated sounds."""
    torch.manual_seed(args.seed)
    model, optimizers, lr = build(config, sat, device, args.init, plan.steps)
    data, held_back, key = train_sat.sounds(args.data, sat.config, args.seed)
    data.augment = True                                              # half an hour of sound is soon learned by heart
    parts, kind = {"aar": model} | optimizers, "clap" if isinstance(embedder, CLAP) else "mel"
    made_of = {"embedder": kind, "clap": aar.fingerprint(embedder), "sat": aar.fingerprint(sat)}
    state = train_sat.start(args, "aar", config, plan, parts, lr, sounds=key, **made_of)
    n = max(1, int(min(plan.steps * plan.batch, plan.crops, 20 * sum(seconds for *_, seconds in data.files))))
    print(f"{n} clips, next-{'token' if config.next_token else 'scale'}; guessing costs ln V = {np.log(config.V):.2f}")
    tokens, cond = tokenize(sat, embedder, data, n)
    held = tokenize(sat, embedder, held_back, len(held_back))
    heard = torch.stack([held_back[i] for i in range(min(4, len(held_back)))]).to(device)
    graph = aar.graphed(lambda r, cond: train_step(model, sat, optimizers, r, cond))

    def one_step(step):
        model.train()
        pick = torch.randint(n, (plan.batch,))
        return graph(tokens[pick].to(device), cond[pick].to(device))

    @torch.compiler.set_stance("force_eager")                        # only the shapes of training are compiled
    def report(step):
        model.eval()
        y = sat.decode(model.generate(held[1][:len(heard)].to(device), sat, **SAMPLING))
        train_sat.save_in_turn(Path(args.out).with_suffix(".wav"), heard, y, sat.config.sample_rate)
        return validate(model, sat, *held)
    train_sat.loop(args, plan, state, parts, lr, one_step, report)


@torch.no_grad()
def validate(model, sat, tokens, cond):
    """Teacher-forced on held-back clips: mean loss; per scale the loss and how often the likeliest code is right."""
    device, parts = next(model.parameters()).device, []
    for r, c in zip(tokens.to(device).split(32), cond.to(device).split(32)):
        loss, logits = teacher_forced(model, sat, r, c)
        parts.append(torch.stack([loss, (logits.argmax(-1) == r).float()]))
    means = torch.cat(parts, 1).mean(1)                              # (2, L)
    of_scales = [[round(part.mean().item(), 3) for part in x.split(model.config.scales)] for x in means]
    return {"held_back": round(means[0].mean().item(), 3), "per_scale": of_scales[0], "accuracy": of_scales[1]}


# --- Measures of a generator -------------------------------------------------------------------------------------
def frechet(a, b):
    """|mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of embeddings (n, C), (m, C) (FAD, arXiv 1812.08466).

    With X^T X = S the trace of the root is the sum of the singular values of X_a X_b^T, also where S has no inverse.
    """
    if min(len(a), len(b)) < 2:
        raise UserError(f"a Frechet distance needs at least 2 sounds on either side, got {len(a)} and {len(b)}")
    a, b = a.double(), b.double()
    A, B = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    return ((a.mean(0) - b.mean(0)).square().sum() + A.square().sum() + B.square().sum()
            - 2 * torch.linalg.matrix_norm(A @ B.T, "nuc")).item()


def ranks(y, references):
    """The rank of its own reference for each generated sound, (n,), by similarity of embeddings (n, C) and (n, C)."""
    similarity = y @ references.T
    return (similarity >= similarity.diag()[:, None]).sum(1)         # ties count against it


@torch.no_grad()
def evaluate(args, device):
    """Print how near generated sounds come to held-back clips and to their own reference, and what each scale costs."""
    sat = aar.load_sat(args.sat, device)
    model = aar.load_aar(args.eval, sat, device)
    kind = model.embedder["kind"]
    embedder = build_embedder(kind, sat.config.sample_rate, args.clap, model.embedder.get("fingerprint")).to(device)
    data, held_back, _ = train_sat.sounds(args.data, sat.config, args.seed)
    (r, cond), (_, trained) = (tokenize(sat, embedder, part, len(held_back)) for part in (held_back, data))

    def embeddings(tokens_of, x):
        return torch.cat([embedder(sat.decode(tokens_of(part.to(device)))).cpu() for part in x.split(16)])

    def row(name, y, references):
        rank = ranks(y, references)
        print(f"| {name} | {frechet(y, cond):.3f} | {(y * references).sum(1).mean():.2f} | {rank.float().median():.0f} "
              f"| {(rank <= 10).float().mean():.0%} | {(rank == 1).float().mean():.0%} |", flush=True)
    print(f"| {args.eval} | Frechet | similarity | median rank of {len(r)} | top 10 | first |\n| --- |" + " ---: |" * 5)
    row("training clips", trained, cond)
    row("reconstructions", embeddings(lambda r: r.long().split(sat.config.scales, 1), r), cond)
    for cfg in args.cfg:
        for name, ramp, x in (("", False, cond), (", growing from 0", True, cond), (", of training", False, trained)):
            how = SAMPLING | {"cfg": cfg, "ramp": ramp, "generator": torch.Generator(device).manual_seed(args.seed)}
            row(f"cfg {cfg:g}{name}", embeddings(lambda c: model.generate(c, sat, **how), x), x)
    print(validate(model, sat, r, cond))


if __name__ == "__main__":
    train_sat.run(main)
