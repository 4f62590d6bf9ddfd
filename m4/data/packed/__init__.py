"""Packed data sets: shards of uint16 rows with an index, for data that does not fit a folder of folders."""
