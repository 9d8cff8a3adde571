"""Tools around the shuffle: collect, import, read, load, trace, cut, append, describe.

All of them stand on the engine's stores, plans and executors; nothing of the engine imports from here.
"""
