"""What this package may not leave in a model."""

PATCHED = {"fit", "summary", "get_state_tree", "apply", "save_own_variables", "load_own_variables"}
AVERAGING = "_update_model_variables_moving_average"


def left_in(model):
    """Whatever of this package is in a model or its optimizer."""
    optimizer = model.optimizer
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    owners = [model, optimizer, inner, *getattr(inner, "optimizers", ())]
    found = [name for owner in owners for name in vars(owner) if name in PATCHED | {AVERAGING} or "woodfisher" in name]
    found += [v.name for v in optimizer.variables if "woodfisher" in v.name]
    constraints = [getattr(v, "constraint", None) for v in model.variables]
    return found + [type(c).__name__ for c in constraints if type(c).__module__.startswith("keras_woodfisher")]
