"""What `fit` takes as data, as groups of examples."""
