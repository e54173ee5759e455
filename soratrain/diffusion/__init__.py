"""The mathematics of diffusion: pure functions of tensors, with noise and time as arguments."""
