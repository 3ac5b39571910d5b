"""vLLM's long prompts through the search, as a plug-in that vLLM finds by itself.

    FLEXPREFILL=on vllm serve MODEL --attention-backend CUSTOM

or, from Python:

    from flexprefill.integrations.vllm import register

    register()
    llm = LLM(MODEL, attention_backend="CUSTOM")

Long prompts, and chunks of them, go through the search. All else stays with vLLM's own attention: steps of decoding,
short prompts, layers with a sliding window. Nothing changes where nobody asked. See docs/howto/serving.md.

On a CPU vLLM has one backend, which the plug-in then takes the place of, with or without ``--attention-backend``.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping

from flexprefill.config import PrefillConfig
from flexprefill.integrations.vllm.reporting import Report, record_request, report
from flexprefill.integrations.vllm.settings import DEFAULT_MIN_QUERIES, FIRST_PROCESS, FOLDER, SWITCH, TICKET, Settings

__all__ = ["Report", "plugin", "record_request", "register", "report", "unregister"]

logger = logging.getLogger("vllm.flexprefill")


def register(
    config: PrefillConfig | None = None,
    *,
    layers: Mapping[int, PrefillConfig | None] | None = None,
    min_keys: int | None = None,
    min_queries: int = DEFAULT_MIN_QUERIES,
) -> None:
    """Switches the plug-in on for the engines that this process makes from now on.

    It writes environment variables, which the engines' own processes inherit.

    Args:
        config: The settings of every layer. Default: those published for the model's type, and ``PrefillConfig()`` for
            other types.
        layers: Settings of single layers, by their index. None keeps a layer dense.
        min_keys: Prompts of fewer tokens so far go to vLLM's own attention. Default: ``config.dense_below``. Without it
            8,192, or 16,384 with the two-sided search.
        min_queries: Chunks of fewer tokens go to vLLM's own attention.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.
        ImportError: vLLM is not installed.
    """
    settings = Settings(config, {} if layers is None else layers, min_keys, min_queries)
    settings.write(os.environ)
    plugin()


def unregister() -> None:
    """Takes back `register`. Engines that run go on as they are."""
    for name in (SWITCH, FIRST_PROCESS):
        os.environ.pop(name, None)
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from flexprefill.integrations.vllm.internals import forget_backends

    for backend in (AttentionBackendEnum.CUSTOM, AttentionBackendEnum.CPU_ATTN):
        backend.clear_override()
    forget_backends()


def plugin() -> None:
    """What vLLM calls in each of its processes (the entry point ``flexprefill`` of ``vllm.general_plugins``).

    It does nothing unless the environment variable ``FLEXPREFILL`` is on.

    Raises:
        ValueError, FlexPrefillError, OSError: A variable says nothing that is known. The message names it.
    """
    settings = Settings.read()
    if settings is None:
        return
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from flexprefill.integrations.vllm.internals import forget_backends

    if current_platform.is_cuda():
        register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.flash_attention.FlexPrefillBackend")
    elif current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.cpu.FlexPrefillCPUBackend")
    else:
        logger.warning("flexprefill is for CUDA and the CPU: all stays with vLLM's own attention")
        return
    forget_backends()
    _make_folder()


def _make_folder() -> None:
    """Makes the server's folder, unless a process before this one did."""
    if FIRST_PROCESS in os.environ:
        return
    process = os.getpid()
    os.environ[FIRST_PROCESS] = str(process)
    folder = os.environ.get(FOLDER)
    if not folder:
        os.environ[FOLDER] = folder = tempfile.mkdtemp(prefix="flexprefill-")
        atexit.register(_remove_folder, folder, process)  # a forked child has the same list of things to do
    os.makedirs(folder, exist_ok=True)
    for name in os.listdir(folder):
        if name.startswith("figures-") or name == TICKET:  # of a server before
            os.remove(os.path.join(folder, name))


def _remove_folder(folder: str, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
