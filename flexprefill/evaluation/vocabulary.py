"""The tokens of the evaluation's tasks: bytes of text, marks that open and close statements, and words.

Words mean nothing by themselves. A sample draws its keys, values and names from them at random, so nothing can be
learnt by heart.
"""

from __future__ import annotations

BYTES = 256  # 0 … 255 are the bytes of a text
BEGIN, NEEDLE, ASK, SET, TRACE, COMMON, REPEAT = range(BYTES, BYTES + 7)
FIRST_WORD = BYTES + 8
SIZE = 1024
WORDS = SIZE - FIRST_WORD
