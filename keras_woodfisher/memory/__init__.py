"""Where gradients are kept, and the plan that bounds what they take."""
