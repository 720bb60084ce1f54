"""Reports as HTML that needs nothing else: no script, no network, no file beside it."""
