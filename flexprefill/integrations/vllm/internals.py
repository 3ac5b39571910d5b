"""What is private to vLLM, in one place (0.26 and 0.32).

- ``_cached_get_attn_backend`` remembers the class of a backend for the process. No public way makes it forget, so an
  engine made after `register` or `unregister` would get the class from before.
"""

from __future__ import annotations

from vllm.v1.attention import selector


def forget_backends() -> None:
    """Lets the next engine of this process ask anew which class its backend is."""
    selector._cached_get_attn_backend.cache_clear()
