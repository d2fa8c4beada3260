"""How a model is cut, laid out and served, found without its weights."""
