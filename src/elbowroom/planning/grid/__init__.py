"""Decisions about grids: how each layer's work is split over the workers, and what that costs."""
