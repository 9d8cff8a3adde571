"""This room shuffles: request, job, tasks, spill, run; see docs/reliability.md."""
