"""Using a trained model: asking it questions."""
