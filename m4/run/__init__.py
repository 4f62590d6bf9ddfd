"""One run on disk and on the screen."""
