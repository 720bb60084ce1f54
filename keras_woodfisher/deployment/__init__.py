"""From a sparse model to something useful: small files, and the formats of other runtimes."""
