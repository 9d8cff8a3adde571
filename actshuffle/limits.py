"""Numbers that the planner's arithmetic and the engine share, so that the one cannot drift from the other."""

PAGE = 4096  # bytes; buffers are aligned to it, and O_DIRECT wants offsets, lengths and addresses in multiples of it
HUGE = 2 << 20  # bytes of a huge page
MAX_FAN_OUT = 1 << 16  # most buckets of one split: their numbers are uint16, which numpy sorts by radix

STORE_REQUESTS = 16  # range reads that one process has in flight to an object store
STORE_PIECE = 4 << 20  # most bytes of one range read
STORE_BYTES = 2 * STORE_REQUESTS * STORE_PIECE  # bytes in flight, and the client's copies of them
STORE_PART = 8 << 20  # bytes of one part of an upload in parts; of objects from 1 GiB on, three times as many
STORE_WHOLE = 64 << 20  # objects up to this size go to a store in one request
STORE_NAMES = 1000  # names in one answer to a listing, and in one request that deletes many objects
FAN = 32  # arrays that one task adds up
RECEIPTS_AT_ONCE = 32  # receipts that are requested from an object store at the same time

WINDOW = 4  # tasks per worker thread that are in the scheduler at once
LEAST_WINDOW = 64  # fewest tasks in the scheduler at once, however few threads there are
MOST = 2**63 - 1  # rows or bytes that one number gives: more does not fit into int64


def part_bytes(nbytes: int) -> int:
    """Bytes of a part of an object of this size; stores take 10,000 parts at most, and bill each."""
    return max(STORE_PART if nbytes < 1 << 30 else 3 * STORE_PART, -(-nbytes // 9000))


def uploads(nbytes: int) -> int:
    """Requests that upload an object: one, or a start, the parts and an end."""
    return 1 if nbytes <= STORE_WHOLE else 2 + -(-nbytes // part_bytes(nbytes))
