"""Kept for code that imports `actshuffle.data.dataset`, as earlier documentation told it to."""
