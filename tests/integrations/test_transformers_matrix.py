"""What of transformers was tried: each trial shows what docs/howto/transformers.md says of it."""

import functools
import inspect
import itertools
import os
import platform
from pathlib import Path

import pytest
import torch
from support import transformers_table
from support.inputs import DEVICE
from support.oracle import relative_error

hf = pytest.importorskip("transformers")

from support.families import FAMILIES, MORE_FAMILIES, OWN_ATTENTION, make_model, reference_of  # noqa: E402

from flexprefill import FlexPrefillError, PrefillConfig  # noqa: E402
from flexprefill.integrations.transformers import register, unregister  # noqa: E402

NAME = "kept_all"
TRIED = (*FAMILIES, *MORE_FAMILIES)
FAST = {
    *(("mistral", column) for column in ("whole prompt", "left padding", "packed", "static greedy", "second turn")),
    ("gpt2", "left padding"),
}
IN_CI = ("llama", "mistral")
LENGTH, EDGES = 140, (0, 90, 140)
SETTINGS = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module", autouse=True)
def registered():
    register(PrefillConfig(alpha=1e-30, block_size=16), name=NAME)
    # models that a trial compiles itself share their code, and are compiled at once for all lengths
    with torch._dynamo.config.patch(recompile_limit=64, assume_static_by_default=False), torch.no_grad():
        yield
    unregister(NAME)


@functools.lru_cache(maxsize=4)
def model_of(family, implementation):
    return make_model(family, implementation).to(DEVICE)


def tokens_of(*shape, seed=1):
    return torch.randint(2, 96, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def padded(side):
    """tokens, attention_mask and position_ids of a batch whose second prompt is shorter."""
    tokens, real = tokens_of(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.int64, device=DEVICE)
    real[1, slice(37) if side == "left" else slice(LENGTH - 37, LENGTH)] = 0
    return tokens * real, real, (real.cumsum(1) - 1).clamp(min=0)


def batch_logits(model, side):
    tokens, real, positions = padded(side)
    return model(tokens, attention_mask=real, **with_positions(model, positions), use_cache=False).logits[real.bool()]


def with_positions(model, positions):
    """position_ids where the model takes them: others count for themselves."""
    return {"position_ids": positions} if "position_ids" in inspect.signature(model.forward).parameters else {}


def cached_logits(model, cache):
    tokens, real, positions = padded("left")
    parts = [
        model(
            tokens[:, start:end],
            attention_mask=real[:, :end],
            past_key_values=cache,
            use_cache=True,
            **with_positions(model, positions[:, start:end]),
        ).logits
        for start, end in itertools.pairwise(EDGES)
    ]
    return torch.cat(parts, 1)[real.bool()]


def packed_logits(model):
    positions = torch.cat([torch.arange(60), torch.arange(LENGTH - 60)]).to(DEVICE)[None]
    return model(tokens_of(1, LENGTH), position_ids=positions, use_cache=False).logits


def packed_alone(model):
    tokens = tokens_of(1, LENGTH)
    return torch.cat([model(part, use_cache=False).logits for part in (tokens[:, :60], tokens[:, 60:])], 1)


def generated(model, **settings):
    tokens, real, _ = padded("left")
    if "prompt_lookup_num_tokens" in settings or "assistant_model" in settings:
        tokens, real = tokens[:1].repeat(1, 2), real[:1].repeat(1, 2)
    return model.generate(tokens, attention_mask=real, **SETTINGS, **settings)


def two_turns(model):
    tokens, real, _ = padded("left")
    cache = hf.DynamicCache(config=model.config)
    answered = model.generate(tokens, attention_mask=real, past_key_values=cache, **SETTINGS)
    turn, its = tokens_of(2, 30, seed=2), torch.ones(2, 30, dtype=torch.int64, device=DEVICE)
    its[0, :11] = 0
    real = torch.cat([real, torch.ones_like(answered[:, LENGTH:]), its], 1)
    tokens = torch.cat([answered, turn * its], 1)
    return model.generate(tokens, attention_mask=real, past_key_values=cache, **SETTINGS)


def compiled_steps(model):
    config = hf.CompileConfig(fullgraph=True, mode="default")
    config._compile_all_devices = True
    return generated(model, cache_implementation="static", compile_config=config)


def last_token_changes_nothing_before(model):
    tokens = tokens_of(1, LENGTH)
    other = tokens.clone()
    other[0, -1] = (tokens[0, -1] + 1) % 96
    logits = [model(each, use_cache=False).logits[:, :-1] for each in (tokens, other)]
    assert relative_error(*logits) <= 1e-6
    return logits[0]


TRIALS = {
    "whole prompt": lambda model: model(tokens_of(1, LENGTH), use_cache=False).logits,
    "causal": last_token_changes_nothing_before,
    "left padding": lambda model: batch_logits(model, "left"),
    "right padding": lambda model: batch_logits(model, "right"),
    "packed": packed_logits,
    "dynamic cache": lambda model: cached_logits(model, hf.DynamicCache(config=model.config)),
    "static cache": lambda model: cached_logits(model, hf.StaticCache(model.config, max_cache_len=192)),
    "greedy": generated,
    "static greedy": lambda model: generated(model, cache_implementation="static"),
    "beams": lambda model: generated(model, num_beams=3),
    "lookup": lambda model: generated(model, prompt_lookup_num_tokens=4),
    "assistant": lambda model: generated(model, assistant_model=model),
    "second turn": two_turns,
    "compiled steps": compiled_steps,
}


def shown_by(family, column):
    """ "yes", "refused" or "not in transformers"; fails where flexprefill gives another result."""
    try:
        reference = model_of(family, reference_of(family))
        expected = packed_alone(reference) if column == "packed" else TRIALS[column](reference)
        theirs = packed_logits(reference) if column == "packed" else expected
    except Exception:  # whatever a model comes up with that does not do it
        return "not in transformers"
    try:
        output = TRIALS[column](model_of(family, NAME))
    except FlexPrefillError:
        return "refused"
    if output.dtype == torch.int64:
        assert torch.equal(output, expected)
    elif column == "packed" and relative_error(output, expected) > 5e-5:
        # positions that the model learned, or states that it carries on
        assert relative_error(theirs, expected) > 1e-3
        return "not in transformers"
    else:
        assert relative_error(output, expected) <= (2e-4 if family == "gemma4" else 5e-5)
    return "yes"


def marks_of(family, column):
    if (family, column) in FAST:
        return ()
    return pytest.mark.slow if family in IN_CI else pytest.mark.release


@pytest.mark.parametrize(
    ("family", "column"),
    [pytest.param(family, column, marks=marks_of(family, column)) for family in TRIED for column in TRIALS],
)
def test_a_trial_shows_what_the_page_says(family, column):
    shown = shown_by(family, column)
    if directory := os.environ.get("FLEXPREFILL_TRIED"):
        where = {"transformers": hf.__version__, "torch": torch.__version__, platform.machine(): "CPU"}
        if DEVICE != "cpu":
            where = {**where, platform.machine(): torch.cuda.get_device_name()}
        path = Path(directory) / f"{TRIED.index(family):02}-{family}-{column.replace(' ', '_')}.json"
        transformers_table.write(path, {"where": where, "family": family, "shown": {column: shown}})
    else:
        assert shown == transformers_table.read()["families"][family][column]


@pytest.mark.parametrize("family", OWN_ATTENTION)
def test_a_class_that_attends_by_itself_is_refused(family):
    with pytest.raises(FlexPrefillError, match="computes .*its attention itself"):
        make_model(family, NAME).to(DEVICE)(tokens_of(1, 40))


def test_the_page_has_what_the_trials_showed():
    assert list(transformers_table.read()["families"]) == list(TRIED)
    assert transformers_table.page_part() == transformers_table.table()
