"""What of transformers was tried with flexprefill: the table of what the trials showed, in docs/howto/transformers.md.

This runs all trials and writes what each showed, then docs/howto/transformers/tried.json and the page's table:

    FLEXPREFILL_TRIED=/tmp/tried pytest tests/integrations/test_transformers_matrix.py
    python tests/support/transformers_table.py /tmp/tried
"""

import json
import sys
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
RESULTS = DOCS / "howto" / "transformers" / "tried.json"
PAGE = DOCS / "howto" / "transformers.md"
START, END = "<!-- tried: written by tests/support/transformers_table.py -->", "<!-- end of tried -->"

COLUMNS = {
    "whole prompt": "a prompt's logits are those of the model's own attention",
    "causal": "another last token changes no logits before it",
    "left padding": "a batch padded on the left",
    "right padding": "a batch padded on the right",
    "packed": "two prompts in a row, `position_ids` that start anew, without a cache",
    "dynamic cache": "a padded batch in chunks after a `DynamicCache`",
    "static cache": "a padded batch in chunks after a `StaticCache`",
    "greedy": "`generate()`",
    "static greedy": '`generate(cache_implementation="static")`',
    "beams": "`generate(num_beams=3)`",
    "lookup": "`generate(prompt_lookup_num_tokens=4)`",
    "assistant": "`generate(assistant_model=…)`",
    "second turn": "`generate()` of a left-padded batch, another padded turn, `generate()` with the cache",
    "compiled steps": '`generate(cache_implementation="static", compile_config=…)`',
}
SHORT = {"yes": "✓", "refused": "refused", "not in transformers": "–"}


def write(path, result):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def read():
    """What a run of all trials showed."""
    return json.loads(RESULTS.read_text())


def keep(directory):
    """Makes docs/howto/transformers/tried.json of what the parts of a run showed; what did not run stays."""
    kept = read() if RESULTS.exists() else {"where": {}, "families": {}}
    for path in sorted(Path(directory).glob("*.json")):
        part = json.loads(path.read_text())
        kept["where"] = part["where"]
        kept["families"].setdefault(part["family"], {}).update(part["shown"])
    write(RESULTS, kept)


def table():
    """The lines between the marks."""
    results = read()
    where = ", ".join(f"{name} {version}" for name, version in results["where"].items())
    lines = [
        START,
        f"{where}. ✓: the same logits within rounding, or the same tokens. –: transformers itself does not do it.",
        "",
        *(f"{number}. {what}" for number, what in enumerate(COLUMNS.values(), 1)),
        "",
        "| |" + "|".join(str(number) for number in range(1, len(COLUMNS) + 1)) + "|",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for family, shown in results["families"].items():
        lines.append(f"| {family} |" + "|".join(SHORT[shown[column]] for column in COLUMNS) + "|")
    return "\n".join([*lines, END])


def page_part():
    """What the page has between the marks, with them."""
    text = PAGE.read_text(encoding="utf-8")
    return text[text.index(START) : text.index(END) + len(END)]


if __name__ == "__main__":
    for directory in sys.argv[1:]:
        keep(directory)
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text.replace(page_part(), table()), encoding="utf-8")
