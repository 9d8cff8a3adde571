"""The report of runs: a page and a picture."""
