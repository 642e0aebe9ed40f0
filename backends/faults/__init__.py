"""How a real failure is brought about: plans and their counters, ballast, limits."""
