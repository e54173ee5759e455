"""From raw video files to WebDataset shards with an index."""
