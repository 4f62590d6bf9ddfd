"""Data: synthesis, preparation, splits and the packed store that training reads."""
