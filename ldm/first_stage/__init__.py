"""The first stage: images to latents and back, and the losses that train it."""
