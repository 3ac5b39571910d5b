import pytest


@pytest.fixture(scope="module")
def little_text():
    """Prompts for pretrained models are made of 64 Ki characters: millions take seconds to tokenize, each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flexprefill.evaluation.prompts.TEXT_SIZE", 2**16)
        yield
