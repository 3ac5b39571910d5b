"""The model that the repository ships, at 4,096 tokens on any device: dense attention against sparse."""

from pathlib import Path

import pytest
import torch
from support.inputs import DEVICE

from flexprefill import PrefillConfig
from flexprefill.evaluation import TASKS, Share, ask, babble, load_model
from flexprefill.evaluation.methods import Attender, Method

pytestmark = pytest.mark.slow  # it answers questions on thousands of tokens
MODEL = Path(__file__).parents[2] / "examples" / "needle_model" / "model.safetensors"
LENGTH = 4096
QUESTIONS = {"single": 2, "multi-key": 2, "scattered": 4}  # prompts


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL, DEVICE)


def ask_all(model, method, task):
    """The share of a task's prompts that are answered, and the mean density of the maps."""
    text, right, densities = babble(100_000), Share(0, 0), []
    for number in range(QUESTIONS[task]):
        samples = TASKS[task](torch.Generator().manual_seed(number), text, 1, LENGTH).to(DEVICE)
        attenders = [Attender(method, watch=True, rows=LENGTH) for _ in model.layers]
        right += ask(model, samples, attenders)
        densities += [density for attender in attenders for density in attender.densities]
    return right, torch.cat(densities).mean().item() if densities else 1.0


def check_retrieval(model, method, task):
    """Fails unless every prompt is answered; returns the density."""
    right, density = ask_all(model, method, task)
    assert right == Share(QUESTIONS[task], QUESTIONS[task])
    return density


@pytest.mark.parametrize(
    "task", [pytest.param(task, marks=() if task == "scattered" else pytest.mark.release) for task in QUESTIONS]
)
def test_the_shipped_model_finds_the_needle_sparse_as_dense(model, task):
    check_retrieval(model, Method("dense", None), task)
    assert check_retrieval(model, Method("sparse", PrefillConfig(alpha=0.05, dense_below=0)), task) < 0.9


@pytest.mark.parametrize("task", QUESTIONS)
def test_a_selection_that_is_broken_fails_the_same_check(model, task):
    """Blocks that know nothing of the question: sink and window alone, and as many others as alpha 1 keeps."""
    rule = {"alpha": 1.0, "sink_blocks": 1, "window_blocks": 1, "last_full_blocks": 0, "dense_below": 0}
    with pytest.raises(AssertionError):
        check_retrieval(model, Method("blind", PrefillConfig(**rule), "random"), task)
