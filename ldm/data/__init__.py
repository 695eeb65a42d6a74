"""Image-caption shards to batches: pack -> index -> plan -> fetch, over webdataset tar files."""
