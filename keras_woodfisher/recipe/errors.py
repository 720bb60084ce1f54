"""What is wrong in a recipe, and where."""


class RecipeError(ValueError):
    """A recipe can't be read.

    Args:
        message: What was found, what is allowed, and the mend.
        line: Line in the recipe's file, from 1.
        field: Field or variable; a nested one as `mfac_options.num_grads`.
        source: File name, or `recipe` for a text or a mapping.
    """

    def __init__(
        self, message: str, *, line: int | None = None, field: str | None = None, source: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.line = line
        self.field = field
        self.source = source

    def __str__(self) -> str:
        line = None if self.line is None else f"line {self.line}"
        where = ", ".join(part for part in (self.source, line, self.field) if part)
        return f"{where}: {self.message}" if where else self.message
