"""flexprefill inside other libraries. Each module needs the library of its name and loads it."""
