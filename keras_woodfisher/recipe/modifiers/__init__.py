"""What each modifier of a recipe means."""
