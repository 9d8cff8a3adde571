"""saetrain beside other trainers, from shuffled and unshuffled stores, on several ranks."""
