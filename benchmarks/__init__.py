"""Side-by-side measurements: what it costs to be protected."""
