"""The networks: plain torch modules that know neither Lightning, Hydra nor each other's training."""
