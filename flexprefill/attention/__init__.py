"""Attention over the kept blocks of a map: the choice of a kernel, and FlexAttention itself."""
