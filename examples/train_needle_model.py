"""Trains the small model that the evaluation asks: from short prompts to long ones, within a budget of time.

    python examples/train_needle_model.py needle-model --minutes 8                       # all in one run
    python examples/train_needle_model.py needle-model --minutes 24 --stop-after 8       # in parts: run it again
    python examples/train_needle_model.py needle-model --device cpu --steps 300 --stages 128:1 --batch-tokens 4096 \
        --width 128 --layers 2 --heads 2 --kv-heads 1 --hidden 256 --lengths 128         # minutes on two CPU cores

Writes model.safetensors (bfloat16), training.json (settings, machine, recipe, losses, accuracy) and checkpoint/ into
the folder, and goes on from the checkpoint if there is one. The text is what the machine has: read, never kept.
"""

import argparse
import dataclasses
import itertools
import json
import math
import random
import sys
import time
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy, log_softmax

from flexprefill.evaluation import TASKS, Decoder, ModelSizes, Share, ask, babble, passages, read_text, save_model
from flexprefill.evaluation import text_loss as mean_text_loss
from flexprefill.evaluation.scoring import precision, states_at
from flexprefill.evaluation.tasks import common_words, needles, repeats, variables
from flexprefill.runtime.machine import describe_machine, versions

STAGES = "256:0.25,1024:0.2,4096:0.2,8192:0.25,16384:0.1"
SHORTER = 0.25  # of a stage's steps repeat a shorter stage's length
WARMUP, FLOOR = 0.02, 0.05  # of the budget; of the peak rate, at the end
TEXT_BYTES, BABBLE_BYTES, HELD_OUT_BYTES = 2**26, 2**23, 2**22
MIN_LENGTH = 128  # tokens, for all tasks to have room
LOG_EVERY = 50  # steps
SAVE_EVERY = 120  # seconds
EVALUATION_SEED = 2**40  # far from every training step's


def main() -> None:
    settings = parse()
    device = torch.device(settings.device)
    folder = settings.folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    sizes = {field.name: getattr(settings, field.name) for field in dataclasses.fields(ModelSizes)}
    model = Decoder(ModelSizes(**sizes)).to(device)
    optimizer = make_optimizer(model, settings.rate, device)
    state = resume(folder / "checkpoint", model, optimizer, settings)
    if settings.compile:
        for layer in model.layers:
            layer.compile()  # the layers share one program, and lengths after the first a second one
    train_text = torch.cat([read_text(TEXT_BYTES, held_out=False), babble(BABBLE_BYTES)]).to(device)
    held_out = read_text(HELD_OUT_BYTES, held_out=True)
    print(f"{sum(w.numel() for w in model.parameters()):,} weights, {train_text.numel():,} bytes of text", flush=True)

    train(model, optimizer, train_text, state, settings)
    save_checkpoint(folder / "checkpoint", model, optimizer, state, settings)
    finished = progress_of(state, settings) >= 1
    state["accuracy"] = evaluate(model, held_out, settings)
    single = " ".join(f"{length}: {row['single']['share']:.3f}" for length, row in state["accuracy"].items())
    model.float()
    save_model(model, folder / "model.safetensors", trained=json.dumps({"seed": settings.seed, "steps": state["step"]}))
    record = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(device),
        "versions": versions(),
        "settings": described(settings),
        "text": {"train_bytes": train_text.numel(), "babble_bytes": BABBLE_BYTES, "held_out_bytes": held_out.numel()},
        "finished": finished,
        **state,
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"single needles  {single}\n{'finished' if finished else 'run again to go on'}: {folder}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("folder", type=Path, help="for the model, its record and the checkpoint")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="of training in all, over all runs: stages and rates follow it")
    budget.add_argument("--steps", type=int, help="of training in all, instead of minutes")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="minutes of training in this run")
    parser.add_argument("--stages", type=stages, default=STAGES, help="length:share, … (default: %(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=2**17, help="a step's (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="(default: %(default)s)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda, help="(default: on CUDA)")
    parser.add_argument("--lengths", type=whole_numbers, default="4096,8192,16384,32768", help="to evaluate at")
    parser.add_argument("--samples", type=int, default=200, help="of each task at each length (default: %(default)s)")
    for field in dataclasses.fields(ModelSizes):
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=int, default=field.default, help="(default: %(default)s)")
    return parser.parse_args()


def stages(text: str) -> list[tuple[int, float]]:
    """ "256:0.5,1024:0.5" to lengths and their shares of the budget, which are made to sum to 1."""
    pairs = [part.split(":") for part in text.split(",")]
    if min(int(length) for length, _ in pairs) < MIN_LENGTH:
        raise argparse.ArgumentTypeError(f"lengths must be at least {MIN_LENGTH}, got {text!r}")
    total = sum(float(share) for _, share in pairs)
    return [(int(length), float(share) / total) for length, share in pairs]


def whole_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def described(settings: argparse.Namespace) -> dict:
    plain = {name: value for name, value in vars(settings).items() if name != "folder"}
    return {name: None if value == math.inf else value for name, value in plain.items()}


# data


def mixture(choose: random.Random, length: int) -> dict[str, tuple[float, object]]:
    """Tasks of a step at a length: weight and maker. Sizes that are the same in all rows of a step are drawn here.

    Most weight is on scattered questions: every row asks as often as it has room, so that a step teaches retrieval
    thousands of times, where a question at the end teaches it once a row.
    """
    room = max(1, length // 16)
    keys = max(1, round(room ** choose.random()))
    few = choose.randint(1, max(1, min(8, length // 64)))
    dense = {"keys": max(1, round(room ** choose.uniform(0.5, 1))), "questions": room, "scattered": True}
    return {
        "scattered": (6, partial(needles, **dense)),
        "end": (2, partial(needles, keys=keys, questions=choose.randint(1, min(4, keys)))),
        "values": (2, partial(needles, keys=few, values=choose.randint(2, 4), questions=few)),
        "variables": (3, partial(variables, hops=choose.randint(0, 2), questions=4)),
        "common": (1, partial(common_words, common=choose.randint(1, min(4, length // 32)))),
        "repeats": (2, partial(repeats, questions=max(1, length // 4))),
        "text": (4, None),
    }


def make_batch(text: Tensor, settings: argparse.Namespace, step: int, length: int) -> tuple[Tensor, list]:
    """A step's rows [B, length] and, by task, which rows are whose and what they ask (None: every next token)."""
    choose = random.Random(f"{settings.seed} {step}")
    generator = Generator(text.device).manual_seed(settings.seed * 2**32 + step)
    tasks = mixture(choose, length)
    rows = max(1, settings.batch_tokens // length)
    drawn = choose.choices(list(tasks), [weight for weight, _ in tasks.values()], k=rows)
    parts, asked, first = [], [], 0
    for name, (_, make) in tasks.items():
        count = drawn.count(name)
        if not count:
            continue
        samples = None if make is None else make(generator, text, count, length)
        parts.append(passages(text, generator, count, length) if samples is None else samples.tokens)
        asked.append((name, slice(first, first + count), samples))
        first += count
    return torch.cat(parts), asked


def losses(model: Decoder, tokens: Tensor, asked: list) -> dict[str, tuple[int, Tensor]]:
    """By task its number of rows and its mean loss in nats: of the answers alone, or of every token of text.

    The loss of an answer of several words is 0 where they share all probability evenly.

    Each task's mean counts for its rows: over all answers at once, tasks with few of them would not be heard.
    """
    states = model(tokens)
    found = {}
    for name, rows, samples in asked:
        if samples is None:
            logits, right = model.logits(states[rows, :-1]), tokens[rows, 1:]
            loss = cross_entropy(logits.flatten(0, 1), right.flatten())
        else:
            logits = model.logits(states_at(states[rows], samples.positions))
            loss = -log_softmax(logits, -1).gather(-1, samples.answers).mean() - math.log(samples.answers.shape[-1])
        found[name] = (rows.stop - rows.start, loss)
    return found


# training


def make_optimizer(model: Decoder, rate: float, device: torch.device) -> torch.optim.AdamW:
    """AdamW, fused; matrices decay, and what has entries about 1 (tables of tokens, factors of channels) is faster."""
    tables = [model.embedding.weight, model.head.weight]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    matrices = [weight for layer in model.layers for weight in layer.parameters() if weight.ndim == 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1, "scale": 1.0},
        {"params": tables, "weight_decay": 0.0, "scale": 4.0},
        {"params": vectors, "weight_decay": 0.0, "scale": 4.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-10, fused=device.type == "cuda")


def rate_at(progress: float) -> float:
    """The learning rate as a share of its peak: a linear warm-up, then a cosine."""
    if progress < WARMUP:
        return max(progress / WARMUP, 0.01)
    falling = (progress - WARMUP) / (1 - WARMUP)
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * min(1, falling))) / 2


def progress_of(state: dict, settings: argparse.Namespace) -> float:
    """How much of the budget is used, 0 … 1."""
    if settings.steps is not None:
        return state["step"] / settings.steps
    return state["seconds"] / (60 * settings.minutes)


def length_at(progress: float, settings: argparse.Namespace, choose: random.Random) -> int:
    """A step's length: mostly the stage's own, now and then that of an earlier one."""
    ends = list(itertools.accumulate(share for _, share in settings.stages))
    stage = sum(progress >= end for end in ends[:-1])
    if stage and choose.random() < SHORTER:
        stage = choose.randrange(stage)
    return settings.stages[stage][0]


def train(model: Decoder, optimizer, text: Tensor, state: dict, settings: argparse.Namespace) -> None:
    """Steps until the budget is used or this run's time is over; ``state`` holds step, seconds and the log."""
    device = text.device
    before, start = state["seconds"], time.monotonic()
    model.train()
    sums: dict[str, list] = {}
    saved = before
    while progress_of(state, settings) < 1 and state["seconds"] - before < 60 * settings.stop_after:
        progress = progress_of(state, settings)
        length = length_at(progress, settings, random.Random(f"length {settings.seed} {state['step']}"))
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * group["scale"] * rate_at(progress)
        tokens, asked = make_batch(text, settings, state["step"], length)
        with precision(device):
            by_task = losses(model, tokens, asked)
        loss = sum(rows * task_loss for rows, task_loss in by_task.values()) / tokens.shape[0]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state["step"] += 1
        state["tokens"] += tokens.numel()
        for name, (_, task_loss) in by_task.items():
            sums.setdefault(name, []).append(task_loss.detach())
        if state["step"] % 8 == 0 and device.type == "cuda":
            torch.cuda.synchronize()  # the clock is to count what is done, not what is queued
        state["seconds"] = before + time.monotonic() - start
        if state["step"] % LOG_EVERY == 0:
            means = {name: round(torch.stack(values).mean().item(), 4) for name, values in sums.items()}
            line = {"step": state["step"], "seconds": round(state["seconds"], 1), "length": length, "losses": means}
            line["tokens"] = state["tokens"]
            state["log"].append(line)
            sums.clear()
            shown = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
            print(
                f"{progress:4.0%}  {line['seconds']:6.0f} s  step {line['step']:5}  length {length:5}  {shown}",
                flush=True,
            )
            if not all(map(math.isfinite, means.values())):
                raise SystemExit("a loss is not finite: the checkpoint is of before")
            if state["seconds"] - saved > SAVE_EVERY:
                save_checkpoint(settings.folder / "checkpoint", model, optimizer, state, settings)
                saved = state["seconds"]


def evaluate(model: Decoder, held_out: Tensor, settings: argparse.Namespace) -> dict[int, dict]:
    """Exact answers by length and task, and the loss on held-out text in nats a byte."""
    device = next(model.parameters()).device
    model.eval()
    found: dict[int, dict] = {}
    for length in settings.lengths:
        batch = max(1, min(settings.samples, settings.batch_tokens // length))
        found[length] = {}
        generator = Generator().manual_seed(EVALUATION_SEED + length)
        for name, make in TASKS.items():
            share = Share(0, 0)
            for _ in range(math.ceil(settings.samples / batch)):
                share += ask(model, make(generator, held_out, batch, length).to(device))
            found[length][name] = {"share": share.value, "interval": share.interval, "samples": share.count}
            print(f"{length:6}  {name:<13} {share}", flush=True)
        tokens = passages(held_out, generator, batch, length)
        found[length]["text loss"] = mean_text_loss(model, tokens.to(device)).mean().item()
        print(f"{length:6}  text loss     {found[length]['text loss']:.3f} nats a byte", flush=True)
    return found


# checkpoints: three files of weights' size, so that none is larger than what machines hand over


def save_checkpoint(folder: Path, model: Decoder, optimizer, state: dict, settings: argparse.Namespace) -> None:
    folder.mkdir(exist_ok=True)
    names = {weight: name for name, weight in model.named_parameters()}
    moments = {names[weight]: values for weight, values in optimizer.state.items()}
    save_file({name: weight.detach() for name, weight in model.named_parameters()}, folder / "weights.safetensors")
    for moment in ("exp_avg", "exp_avg_sq"):
        save_file({name: values[moment] for name, values in moments.items()}, folder / f"{moment}.safetensors")
    (folder / "state.json").write_text(json.dumps({"settings": described(settings), **state}))


def resume(folder: Path, model: Decoder, optimizer, settings: argparse.Namespace) -> dict:
    """The state of the checkpoint, after loading it; that of a new training if there is none."""
    if not (folder / "state.json").exists():
        return {"step": 0, "seconds": 0.0, "tokens": 0, "log": []}
    state = json.loads((folder / "state.json").read_text())
    before, now = state.pop("settings"), json.loads(json.dumps(described(settings)))
    free = {"device", "compile", "stop_after", "lengths", "samples"}
    if changed := [name for name in now if name not in free and now[name] != before.get(name)]:
        raise SystemExit(f"{folder} was made with other settings: {', '.join(changed)}; take those or another folder")
    weights = load_file(folder / "weights.safetensors")
    moments = {moment: load_file(folder / f"{moment}.safetensors") for moment in ("exp_avg", "exp_avg_sq")}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(weights[name])
            optimizer.state[weight] = {moment: values[name].to(weight.device) for moment, values in moments.items()}
            # fused AdamW counts on the device
            optimizer.state[weight]["step"] = torch.tensor(
                float(state["step"]), device=weight.device if weight.is_cuda else "cpu"
            )
    return state


if __name__ == "__main__":
    main()
