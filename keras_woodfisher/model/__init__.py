"""The Keras model: its prunable variables, its optimizer, and what Keras keeps private."""
