"""Mean correction: what it does to the output's error at equal density, and what it costs.

    python examples/benchmarks/mean_correction.py
    python examples/benchmarks/mean_correction.py --cost

The first form builds the demo's heads, attends with and without correction over the same maps, and compares sampled
rows with exact dense attention; some minutes on two CPU cores, seconds on a GPU. The second one (one GPU) times
prefill_attention with and without it at given densities, in turns, and the correction alone. On a Hopper GPU both are
timed with the portable kernel too. Both forms print tables. --output keeps the figures.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch

from flexprefill import PrefillConfig, UnsupportedError, prefill_attention, search_blocks
from flexprefill.attention.mean_correction import merge_means
from flexprefill.bench.inputs import make_case, make_qkv
from flexprefill.bench.timing import make_watch, repeats_within_budget, take_turns
from flexprefill.evaluation.built_heads import HEADS, Prompt, build_prompt, read_tokens
from flexprefill.runtime.machine import describe_machine, versions
from flexprefill.search.operator import pool_keys

ALPHAS = (0.02, 0.1, 0.5, 0.9)
DENSITIES = {4096: 0.47, 8192: 0.25, 32768: 0.07, 131072: 0.025, 262144: 0.017}
COLUMNS = ("without", "with", "portable")


@dataclass
class HeadError:
    """Of one head at one alpha, over the sampled rows. Errors are norms of differences over the norm of the output.

    Attributes:
        mass: exact attention mass of the kept blocks; dropped_mass: of the dropped ones that have a mean;
            two_keys_mass: of the two greatest keys of each of those; and estimated_mass: what the means take them for,
            in units of the exact total.
        error, corrected: without and with correction.
        right_mass: as if the means had the blocks' exact mass, which leaves the error of their values alone.
    """

    head: str
    alpha: float
    density: float
    mass: float
    dropped_mass: float
    two_keys_mass: float
    estimated_mass: float
    error: float
    corrected: float
    right_mass: float

    @property
    def ratio(self) -> float:
        return self.error / self.corrected


def head_errors(prompt: Prompt, alpha: float, rows: torch.Tensor) -> list[HeadError]:
    config = PrefillConfig(alpha=alpha, dense_below=0)
    block, scale, length = config.block_size, prompt.query.shape[3] ** -0.5, prompt.tokens.shape[0]
    block_map = search_blocks(prompt.query, prompt.key, config)
    inputs = prompt.query, prompt.key, prompt.value
    plain = prefill_attention(*inputs, config, block_map=block_map)
    corrected = prefill_attention(*inputs, replace(config, mean_correction=True), block_map=block_map)
    kept_blocks, density = block_map.to_dense()[0], block_map.density()[0].tolist()
    key_means, value_means = (pool_keys(tensor, block, "reference")[0].float() for tensor in (prompt.key, prompt.value))
    position = torch.arange(length, device=rows.device)
    found = []
    for head, name in enumerate(HEADS):
        sums = dict.fromkeys(
            ("exact", "error", "corrected", "right_mass", "mass", "dropped", "two_keys", "estimated"), 0.0
        )
        values, means = prompt.value[0, head].float(), value_means[head]
        for chosen in rows.split(64):
            queries = scale * prompt.query[0, head, chosen].float()
            logits = (queries @ prompt.key[0, head].float().T).masked_fill(position > chosen[:, None], -torch.inf)
            shares = logits.softmax(-1)
            exact = shares @ values
            kept = kept_blocks[head, chosen // block]
            by_key = torch.nn.functional.pad(shares, (0, -length % block)).unflatten(1, (-1, block))
            by_block = by_key.sum(-1)
            dropped = ~kept & (torch.arange(kept.shape[1], device=rows.device) < (chosen // block)[:, None])
            estimate = (queries @ key_means[head].T + torch.tensor(block).log() - logits.logsumexp(-1)[:, None]).exp()
            of_kept = (shares * kept.repeat_interleave(block, 1)[:, :length]) @ values
            weights = by_block * dropped
            right = (of_kept + weights @ means) / (by_block * (kept | dropped)).sum(1, keepdim=True)
            sums["exact"] += exact.square().sum().item()
            for what, output in (("error", plain), ("corrected", corrected)):
                sums[what] += (output[0, head, chosen].float() - exact).square().sum().item()
            sums["right_mass"] += (right - exact).square().sum().item()
            sums["mass"] += (by_block * kept).sum().item()
            sums["dropped"] += weights.sum().item()
            sums["two_keys"] += (by_key.topk(2, -1).values.sum(-1) * dropped).sum().item()
            sums["estimated"] += (estimate * dropped).sum().item()
        errors = [(sums[what] / sums["exact"]) ** 0.5 for what in ("error", "corrected", "right_mass")]
        masses = [sums[what] / len(rows) for what in ("mass", "dropped", "two_keys", "estimated")]
        found.append(HeadError(name, alpha, density[head], *masses, *errors))
    return found


def measure_errors(settings: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    prompt = build_prompt(read_tokens(settings.length), device, settings.seed)
    rows = torch.arange(37, settings.length, settings.every, device=device)
    print(f"{settings.length:,} tokens, {len(rows)} rows of each head; relative output errors\n")
    print(
        "alpha  head       density  dropped mass  of 2 keys  estimated   without      with  ratio  with the right mass"
    )
    found = []
    for alpha in ALPHAS:
        for row in head_errors(prompt, alpha, rows):
            masses = f"{row.dropped_mass:12.3%}  {row.two_keys_mass:9.3%}  {row.estimated_mass:9.3%}"
            errors = f"{row.error:8.4f}  {row.corrected:8.4f}  {row.ratio:4.1f}×  {row.right_mass:19.4f}"
            print(f"{alpha:<5}  {row.head:<9}  {row.density:6.1%}  {masses}  {errors}", flush=True)
            found.append(asdict(row) | {"ratio": row.ratio})
    return found


def portably(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call with the correction's portable kernel, also on a Hopper GPU."""
    from flexprefill.attention import mean_correction_kernel as kernels  # imports triton

    def portable() -> Any:
        with mock.patch.object(kernels, "hopper_merges", return_value=False):
            return call()

    return portable


def measure_calls(calls: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of every repeat of each call, in turns."""
    for one in calls.values():
        one()
    watches = {name: make_watch(one, device, graph=True) for name, one in calls.items()}
    often = {name: repeats_within_budget(repeats, watch, watch.measure()) for name, watch in watches.items()}
    times, failed = take_turns(watches, often, lambda steps: None)
    assert not failed, failed
    return times


def measure_cost(settings: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    print("tokens   density  backend     without         with   portable")
    found = []
    for length, density in DENSITIES.items():
        qkv = make_qkv(length, 32, 8, 128, torch.bfloat16, device)
        case = make_case(qkv, density, PrefillConfig(dense_below=0))
        kept = case.block_map.density().mean().item()

        def add(backend: str, calls: dict[str, Callable[[], Any]], length: int = length, kept: float = kept) -> None:
            if hopper:
                calls["portable"] = portably(calls["with"])
            try:
                times = measure_calls(calls, settings.repeats, device)
            except UnsupportedError as error:
                print(f"{length:>7,}  {backend} not measured: {error}")
                return
            columns = (f"{median(times[name]):8.3f} ms" if name in times else "" for name in COLUMNS)
            print(f"{length:>7,}  {kept:6.1%}  {backend:<7}", *(f"{one:>11}" for one in columns), sep="  ", flush=True)
            found.append({"length": length, "density": kept, "backend": backend, "times_ms": times})

        for backend in ("flash", "triton"):

            def call(correct: bool, backend: str = backend, case: Any = case) -> Callable[[], Any]:
                config = replace(case.config, mean_correction=correct)
                return lambda: prefill_attention(case.query, case.key, case.value, config, backend=backend)

            add(backend, {"without": call(False), "with": call(True)})
        # what it reads of the first attention, with made-up numbers, and pooling
        lse = torch.full(case.query.shape[:3], 5.0, device=device)
        arguments = *qkv, case.block_map.words, torch.zeros_like(case.query), lse
        sizes = case.block_map.block_size, qkv[0].shape[3] ** -0.5, "triton"
        add("alone", {"with": lambda arguments=arguments, sizes=sizes: merge_means(*arguments, *sizes)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cost", action="store_true", help="time it, on a GPU")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )
    parser.add_argument("--length", type=int, default=32_768, help="tokens of the demo's text (default: %(default)s)")
    parser.add_argument("--every", type=int, default=53, help="one row in so many is compared (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the demo's heads (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=20, help="of the timing (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="a JSON file for every repeat (default: none)")
    settings = parser.parse_args()
    device = torch.device(settings.device)
    what = "cost" if settings.cost else "error"
    measured = (measure_cost if settings.cost else measure_errors)(settings, device)
    record = {
        "command": f"python examples/benchmarks/mean_correction.py{' --cost' if settings.cost else ''}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(device),
        "versions": versions(),
        "settings": {name: getattr(settings, name) for name in ("length", "every", "seed", "repeats")},
        what: measured,
    }
    if settings.output:
        settings.output.write_text(json.dumps(record, indent=1) + "\n")
        print(f"\nfigures  {settings.output}")


if __name__ == "__main__":
    main()
