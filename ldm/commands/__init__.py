"""The applications behind the command lines: training, sampling, evaluation, cached latents."""
