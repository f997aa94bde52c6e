"""Training: tasks and data in, adapters and their relation graph out."""
