"""The command line and the batch jobs: what people call."""
