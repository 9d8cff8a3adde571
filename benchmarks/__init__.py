"""The cost of a shuffle, beside the cost of moving the same bytes.  See README.md here."""
