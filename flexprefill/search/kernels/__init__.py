"""The search's GPU kernels, in Triton and in Gluon (hopper). launch calls them."""
