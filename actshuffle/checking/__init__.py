"""This room examines stores: verify, stats, quality, info.  It shares no code with the engine."""
