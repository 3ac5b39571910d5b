"""The search: which blocks of the attention matrix matter. It reads only query and key."""
