"""Models that peers train as well: modules with the functions of a training script."""
