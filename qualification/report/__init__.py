"""The release qualification: one report from the records of any number of runs and machines, and a gate."""
