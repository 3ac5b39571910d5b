"""What a call's attention is: sequences, window, caps and sinks, with their checks, and plain-PyTorch attention."""
