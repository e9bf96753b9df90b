"""The fleet in one process: the shipped machines on virtual time, from one seed."""
