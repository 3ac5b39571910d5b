"""Triton's interpreter without work whose results nothing uses, which is most of its time."""

import dataclasses
import functools

import triton.language as tl
from triton.runtime import interpreter


class NothingToRestore:
    def restore(self):
        pass


@functools.cache
def modules_of(function):
    """What the interpreter patches for a function: the modules of the language that it can name."""
    return {module.__name__ for module in function.__globals__.values() if module is tl or module is tl.core}


def leave_out_needless_work():
    """A launch patches each module once, and sums that only a debug mode looks at are not made.

    A version of Triton without these places is left as it is.
    """
    builder = interpreter.interpreter_builder
    if not getattr(builder.options, "debug", True):
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    if hasattr(interpreter, "_patch_lang"):
        patch_once_a_launch()


def patch_once_a_launch():
    """By itself the interpreter patches again at every call of a helper."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = None  # by the launch that runs

    def patch_what_is_new(function):
        if patched is not None:
            if modules_of(function) <= patched:
                return NothingToRestore()
            patched.update(modules_of(function))
        return patch(function)

    def launch_from_nothing(*arguments, **named):
        nonlocal patched
        before, patched = patched, set()
        try:
            return launch(*arguments, **named)
        finally:
            patched = before

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_what_is_new, launch_from_nothing
