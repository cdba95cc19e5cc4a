"""Models: where they come from, loading, saving, and score(), which turns a model into log-probabilities."""
