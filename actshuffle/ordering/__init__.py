"""This room decides which row goes where: keys, boundaries, buckets, digests, mixing.  No I/O; see docs/theory.md."""
