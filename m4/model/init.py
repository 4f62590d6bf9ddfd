"""Initial values of the weights."""

INIT_STD = 0.02
