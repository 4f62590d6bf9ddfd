"""Looking at a prepared data set."""
