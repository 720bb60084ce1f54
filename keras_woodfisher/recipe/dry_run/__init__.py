"""What a recipe would do and cost, found out without training."""
