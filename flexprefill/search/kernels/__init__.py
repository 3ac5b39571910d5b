"""The search's GPU kernels, Triton's and Gluon's (hopper); launch calls them."""
