"""Numbers on which arithmetic and work must agree: what the planner counts with, the engine keeps to."""

PAGE = 4096  # bytes; buffers are aligned to it, and O_DIRECT wants offsets, lengths and addresses in multiples of it
MAX_FAN_OUT = 1 << 16  # buckets of one split: their numbers are uint16, which numpy sorts by radix

STORE_REQUESTS = 16  # range reads that one process has in flight to an object store
STORE_PIECE = 4 << 20  # bytes of one of them, at most
STORE_BYTES = 2 * STORE_REQUESTS * STORE_PIECE  # bytes in flight, and the client's copies of them
RECEIPTS_AT_ONCE = 32  # receipts that are asked of an object store at the same time

WINDOW = 4  # tasks per worker thread that are in the scheduler at once
LEAST_WINDOW = 64  # and of all together, however few threads there are
