"""This room reads finished stores: datasets, batches, epochs, traces of rows; see docs/loading.md."""
