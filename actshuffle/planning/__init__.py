"""This room turns rows and memory into levels, tasks, peaks and forecasts.  No I/O; see docs/scaling.md."""
