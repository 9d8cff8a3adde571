"""This room makes stores: collect, import, concat, split, sample, append; see docs/datasets.md."""
