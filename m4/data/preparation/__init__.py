"""Videos to token samples."""
