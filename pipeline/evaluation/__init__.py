"""Features, statistics, distances, and how well a picture keeps to its prompt."""
