"""The mathematics of diffusion: noise schedules, prediction types, the denoiser and its training loss."""
