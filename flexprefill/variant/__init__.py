"""What a call's attention is: sequences, window, caps and sinks, with their checks, and plain-PyTorch attention."""

from flexprefill.variant.sequences import Sequences
from flexprefill.variant.variant import AttentionVariant

__all__ = ["AttentionVariant", "Sequences"]
