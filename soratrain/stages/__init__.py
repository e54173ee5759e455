"""One file a stage: the LightningModule that trains a network, or the job that uses it."""
