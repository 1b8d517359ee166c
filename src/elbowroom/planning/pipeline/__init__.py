"""Decisions about training pipelines: cuts, stages, schedules, and what they will take."""
