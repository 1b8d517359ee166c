"""Decisions about training pipelines: cuts, stages, schedules, and predictions of their cost."""
