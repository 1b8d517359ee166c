"""Decisions about the weight pool: memory, layers and their owners, modes, layouts, jobs."""
