"""The exhaustive sweep: fail allocation 1, 2, 3 … of a scenario, and prove after each that nothing was lost."""
