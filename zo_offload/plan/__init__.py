"""Plans how a model is cut, laid out and served, without its weights."""
