"""Replicas that hold feed-forward weights once (SiDP). Works on any list of transformer blocks."""
