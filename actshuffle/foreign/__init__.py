"""Files that others wrote: which of them can be read, and how."""
