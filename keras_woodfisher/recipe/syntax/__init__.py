"""From the text of a recipe to a checked outline."""
