"""All that the integration takes from inside transformers. Seen with transformers 5.17.

transformers has no public way to:

- take back a registered attention: ``del`` on an interface reaches the names of one object alone;
- ask which names are taken;
- know inside a mask function whether queries see what follows them;
- ask a paged cache which layers slide (``sliding_windows``) and to write and read it (``update``);
- be asked whether a model's class can take a registered implementation: a model asks its own
  ``get_correct_attn_implementation``, which knows transformers' names alone.

The functions imported here are documented for models, not for other packages.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa_attention_forward
    from transformers.masking_utils import causal_mask_function as causal_mask_function
    from transformers.masking_utils import sdpa_mask as sdpa_mask
except ImportError as error:
    raise ImportError(
        "flexprefill.integrations.transformers needs transformers from 5.17 on: pip install 'flexprefill[transformers]'"
    ) from error

PAGED = "paged|"  # how the names for continuous batching begin
# transformers looks for these parts in a name, and would take ours for one of its own
RESERVED = ("flash", "sdpa", "eager", "flex_attention", "|", "/")

_INTERFACES = (AttentionInterface, AttentionMaskInterface)


def is_taken(name: str) -> bool:
    """Whether an attention or a mask function is registered under a name, for all models."""
    return any(name in interface._global_mapping for interface in _INTERFACES)


def forget_name(name: str) -> None:
    """Takes back what was registered under a name."""
    for interface in _INTERFACES:
        interface._global_mapping.pop(name, None)


def paged_window(cache: Any, layer: int) -> int | None:
    """The sliding window of a layer in a PagedAttentionCache, of which it holds no more keys. None: it holds all."""
    window = cache.sliding_windows[layer]
    return None if window == 1 else int(window)


def paged_kind(cache: Any, layer: int) -> str:
    """The name under which a batch's lengths of keys stand for a layer, where a model has layers of two kinds."""
    return "full_attention" if paged_window(cache, layer) is None else "sliding_attention"


def keys_in_cache(cache: Any, key: Tensor, value: Tensor, **indices: Any) -> tuple[Tensor, Tensor]:
    """Writes new keys and values [1, Hkv, tokens, D] to a PagedAttentionCache, and gives those of all requests.

    Returns:
        [keys, Hkv, D] and [keys, Hkv, Dv], request by request.
    """
    keys, values = cache.update(key_states=key, value_states=value, **indices)
    return keys, values


def is_bidirectional(arguments: Mapping[str, Any]) -> bool:
    """Whether a mask function is asked for a mask of queries that see what follows them, as in an encoder.

    transformers passes this argument only then.
    """
    return "allow_is_bidirectional_skip" in arguments


Check = Callable[[Any, object], None]
_METHOD = "get_correct_attn_implementation"
_asked = getattr(PreTrainedModel, _METHOD)


def watch_models(check: Check | None) -> None:
    """Calls ``check(model, implementation)`` when a model is made or gets an implementation. None stops it.

    It wraps ``PreTrainedModel.get_correct_attn_implementation``. Stopping puts back what was there.
    """
    if check is None:
        setattr(PreTrainedModel, _METHOD, _asked)
        return

    @functools.wraps(_asked)
    def get_correct_attn_implementation(model: Any, requested_attention: Any, *others: Any, **named: Any) -> Any:
        answer = _asked(model, requested_attention, *others, **named)
        check(model, answer)
        return answer

    setattr(PreTrainedModel, _METHOD, get_correct_attn_implementation)


def _source_of(model_class: type) -> str:
    """The source of the module that defines a class; empty if there is none."""
    try:
        return inspect.getsource(sys.modules[model_class.__module__])
    except (KeyError, OSError, TypeError):
        return ""


def has_own_attention(model_class: type) -> bool:
    """Whether a class's module has attention of its own that never uses the AttentionInterface.

    ``PreTrainedModel._can_set_attn_implementation`` reads the source too, but knows only one spelling.
    """
    source = _source_of(model_class)
    named = re.search(r"^class \w*Attention\w*\(nn\.Module\):", source, re.MULTILINE)
    return named is not None and not re.search(r"ALL_ATTENTION_FUNCTIONS|AttentionInterface", source)


def attention_classes_without(model_class: type, implementation: str) -> str | None:
    """The name of a table from which a class takes its attention, if the implementation's name is not in it.

    Tables with VISION in their names belong to classes with Vision in theirs.
    """
    source = _source_of(model_class)
    for name in re.findall(r"\b(\w*ATTENTION_CLASSES)\[\s*(?:self\.)?config\._attn_implementation", source):
        table = getattr(sys.modules[model_class.__module__], name, {})
        if ("VISION" in name) == ("Vision" in model_class.__name__) and implementation not in table:
            return name
    return None
