"""The swap mechanism: saved tensors leave the device and come back, as a plan says."""
