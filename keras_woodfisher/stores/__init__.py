"""Where the gradients of an update are kept: in memory, on disk, on a device, or computed again page by page."""
