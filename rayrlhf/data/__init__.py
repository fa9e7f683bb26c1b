"""Data: from the rows of a data set to token ids, and which of them a step uses."""
