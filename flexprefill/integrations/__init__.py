"""flexprefill inside other libraries: ``transformers`` and ``distributed`` are for users, the others are parts."""
