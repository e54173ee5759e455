"""Networks as plain modules: one device, no knowledge of configs, trainers or parallelism."""
