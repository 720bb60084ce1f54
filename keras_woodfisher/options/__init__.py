"""Options as checked, frozen values."""
