"""What two ops or more share: backends, noise keys, argument and layout checks."""
