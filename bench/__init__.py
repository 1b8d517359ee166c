"""One script per claim; ``results/`` keeps dated JSON."""
