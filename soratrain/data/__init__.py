"""From shards on disk to typed batches: manifest, buckets, plan, range reads, decoding."""
