"""Training: one batch from the store to the loss, the update, the log line and the checkpoint."""
