"""A pool of replicas that hold feed-forward weights once (SiDP), for any transformer blocks."""
