"""From a place in a shard to a batch: decoding, captions, fetching, the data module, cached latents."""
