"""Shared parts of training techniques: tracing, layers, stages, the user's script, memory."""
