"""Which features work together on which backend: the calls that show it, and the table of what they showed.

This runs all calls and writes what each part of them showed, then docs/reference/combinations from that and the table:

    FLEXPREFILL_COMBINATIONS=/tmp/combinations pytest tests/house/test_combinations.py
    python tests/support/combinations.py /tmp/combinations
"""

import json
import sys
from itertools import combinations, product
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "reference" / "combinations.md"
RESULTS = DOCS / "reference" / "combinations"
BACKENDS = {"cpu": "the CPU", "triton": "FlexAttention's Triton kernel", "flash": "FlashAttention-4"}
PARTS = 8  # of a backend's calls

# names of features; those of one group exclude each other
GROUPS = (
    ("float32", "float16", "bfloat16"),
    ("block 128", "block 64"),
    ("D 64", "D 96", "D 128", "D 192", "D 256", "D 192, Dv 128"),
    ("whole prompt", "queries at an offset"),
    ("flashprefill", "xattention", "exact"),
    ("right padding", "left padding", "packed"),
    ("mask_mod", "BlockMask"),
    ("mask_heads kv",),
    ("score_rows visible",),
    ("min_blocks",),
    ("sliding_window",),
    ("soft_cap",),
    ("alibi_slopes",),
    ("score_mod",),
    ("sinks",),
    ("mean_correction",),
    ("log-sum-exp",),
)
FEATURES = tuple(name for group in GROUPS for name in group)
GROUP_OF = {name: place for place, group in enumerate(GROUPS) for name in group}
REQUIRED = GROUPS[:5]  # every call has one of each


def bases():
    """One of each group that a call has to have one of, in every way; the first is the usual one."""
    return product(*REQUIRED)


def completed(features, base):
    """Features with those of a base in whose groups they have none."""
    return (*features, *(name for group, name in zip(REQUIRED, base, strict=True) if not set(group) & set(features)))


def pairs_of(features):
    return {tuple(sorted(pair, key=FEATURES.index)) for pair in combinations(features, 2)}


def possible(pair):
    return GROUP_OF[pair[0]] != GROUP_OF[pair[1]]


def covering_calls(refused, base):
    """Calls, each a tuple of features, in which every possible pair that is not refused comes together; greedily.

    Args:
        refused: set of features and of pairs of features, each as a sorted tuple.
        base: what completes a call.
    """
    left = {pair for pair in combinations(FEATURES, 2) if possible(pair)}
    left = {pair for pair in left if not ({pair, pair[:1], pair[1:]} & refused)}
    calls = []
    while left:
        call = list(min(left, key=lambda pair: [FEATURES.index(name) for name in pair]))
        while True:
            fitting = [
                name
                for name in FEATURES
                if (name,) not in refused
                and all(possible((name, other)) for other in call)
                and not (pairs_of([*call, name]) & refused)
            ]
            if not fitting:
                break
            call.append(max(fitting, key=lambda name: len(left & pairs_of([*call, name]))))
        call = completed(call, base)
        left -= pairs_of(call)
        calls.append(call)
    return calls


def write(path, result):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


def keep(directory):
    """Makes the results of what the parts of a run showed; backends that did not run keep what they have."""
    for backend in BACKENDS:
        parts = [json.loads(path.read_text()) for path in sorted(Path(directory).glob(f"{backend}-*.json"))]
        if not parts:
            continue
        if len(parts) != PARTS:
            raise SystemExit(f"{directory} has {len(parts)} of the {PARTS} parts of {backend}")
        calls = sorted(call for part in parts for call in part["calls"])
        failed = {name: message for part in parts for name, message in part["failed"].items()}
        write(RESULTS / f"{backend}.json", {**parts[0], "calls": calls, "failed": failed})


def read(backend):
    """What a run of all calls showed; None if none was kept."""
    path = RESULTS / f"{backend}.json"
    return json.loads(path.read_text()) if path.exists() else None


def table():
    """docs/reference/combinations.md."""
    results = {backend: read(backend) for backend in BACKENDS}
    lines = [
        "# What works together",
        "",
        "The table says for every two features whether they gave the right output in one call. **C** is the CPU.",
        "**T** is FlexAttention's Triton kernel. **F** is FlashAttention-4 inside FlexAttention.",
        "`–` means refused, with a message that is listed below the table. `!` means that it did not run.",
        "",
        "Each call combined as many features as go together. Its lengths were no multiples of a block. Its output was",
        "compared with dense attention in float64 under the same boolean mask and score function.",
        "",
        "The features are explained in [windows and score functions](../howto/windows.md),",
        "[padded and packed batches](../howto/batches.md), [scorers](../explanations/scorers.md) and",
        "[mean correction](../explanations/mean_correction.md).",
        "",
        "`tests/house/test_combinations.py` made the calls. `python tests/support/combinations.py` wrote this page.",
        "",
    ]
    for backend, name in BACKENDS.items():
        if results[backend] is None:
            lines.append(f"- {name}: not run yet")
        else:
            lines.append(f"- {name}: {results[backend]['where']}, {len(results[backend]['calls'])} calls")
    lines += ["", "| |" + "|".join(str(number) for number in range(1, len(FEATURES))) + "|"]
    lines.append("|---" * len(FEATURES) + "|")
    for row, name in enumerate(FEATURES):
        cells = [_cell(results, tuple(sorted((name, other), key=FEATURES.index))) for other in FEATURES[:row]]
        cells += [""] * (len(FEATURES) - 1 - len(cells))
        lines.append(f"| {row + 1} {name} |" + "|".join(cells) + "|")
    for backend, name in BACKENDS.items():
        for kind, title in (("refused", "refuses"), ("failed", "does not run")):
            found = (results[backend] or {}).get(kind, {})
            if found:
                lines += ["", f"## What {name} {title}", ""]
                by_message = {}
                for features, message in found.items():
                    by_message.setdefault(message, []).append(features)
                lines += [f"- {'; '.join(features)}: {message}" for message, features in sorted(by_message.items())]
    return "\n".join(lines) + "\n"


def _cell(results, pair):
    if not possible(pair):
        return ""
    letters = ""
    for backend, result in results.items():
        if result is None:
            continue
        name = " + ".join(pair)
        if any({*pair} <= {*call} for call in result["calls"]):
            letters += backend[0].upper()
        elif any(one in result["refused"] for one in (name, *pair)):
            letters += "–"
        else:
            letters += "!"
    return letters


if __name__ == "__main__":
    for directory in sys.argv[1:]:
        keep(directory)
    PAGE.write_text(table())
