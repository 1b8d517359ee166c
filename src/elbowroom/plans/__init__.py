"""Plans: what was decided, as frozen data with a versioned JSON form."""
