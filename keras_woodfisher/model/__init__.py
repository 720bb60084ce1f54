"""The Keras model: its prunable variables, its optimizer, and what it takes as data."""
